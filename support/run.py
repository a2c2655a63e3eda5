"""Everything around a training loop: flags, run folder, seeds, resume, signals, progress, schedule.

A program (hiql.py, hiro.py, lab/baselines.py, lab/td3.py) is a module with a dataclass `Config` and
    resolve(given) -> config               a whole config from the flags given (a dict)
    prepare(config, checkpoint) -> problem a namespace with config and train(problem, run), which
                                           trains by `Run.drive` and ends with `Run.finish`;
                                           ValueError for bad input
    evaluate_checkpoint(problem, agent) -> summary
    COUNTER                                what a run counts: "update" or "step"
and calls `main(sys.modules[__name__])`. Its command line then takes
    [flags]                  one run: a folder with config.json, train.csv, eval.csv,
                             checkpoint.npz, summary.json and pictures
    --seeds A-B [--jobs N]   one process for each seed, N at once; seeds.csv beside them
    --resume DIR             go on as if the run had never stopped
    --eval DIR               evaluate the checkpoint of a run
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time

try:
    import resource
except ImportError:                     # Windows
    resource = None

import numpy as np
import scipy

from nets import flatten
from support.files import cell, load_tree, read_json, read_log, save_tree, write_json, write_rows
from support.flags import check_types, exit_with_error, flag_of, parser, seed_range, text_of

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))          # the top folder
TOO_LARGE = "these sizes are too large for this machine"

# ----------------------------------------------------------------------------- the program


@np.errstate(over="ignore", invalid="ignore")          # what is not finite is refused in words
def main(program):
    """Run the program of a module (see the top of this file) with the flags in sys.argv.

    Exit codes: 2 wrong input; 1 a loss or parameter is not finite, a file cannot be written, or a
    seed failed; 130 interrupted by Ctrl-C, 143 by SIGTERM.
    """
    command = command_of(program)
    p = parser(program.Config, program.__doc__.split("\n\n")[0] +
               "\n\nTags: [D1] ... at the top of hiql.py, [E1] ... of hiro.py, or in lab/.",
               os.path.basename(program.__file__))
    given = vars(p.parse_args())
    folder, seeds = given.pop("out", None), given.pop("seeds", None)
    jobs, resume, old = given.pop("jobs", None), given.pop("resume", None), given.pop("eval", None)
    try:
        if (resume or old) and (given or folder or seeds or (resume and old)):
            raise ValueError("--resume and --eval take the flags of the run itself; give no other")
        if jobs is not None and not seeds:
            raise ValueError("--jobs is for --seeds")
        if jobs is not None and jobs < 1:
            raise ValueError(f"--jobs must be at least 1, not {jobs}")
        if seeds:
            return _run_seeds(program, command.split(), given, seeds, folder, jobs or 1)
        if resume or old:
            problem, agent = load_run(program, resume or old)
        else:
            problem, agent = program.prepare(program.resolve(given)), None
        if old:
            return show(program.evaluate_checkpoint(problem, agent))
        if resume and os.path.exists(os.path.join(resume, "summary.json")):
            return say(f"{resume} is finished; its summary.json stays as it is")
        run = Run(resume or folder or free_folder(problem.config), problem.config, agent,
                  program.COUNTER, command)
    except (ValueError, OSError) as e:
        exit_with_error(e, p.prog)
    except (MemoryError, OverflowError) as e:
        exit_with_error(f"{TOO_LARGE} ({e})", p.prog)
    try:
        problem.train(problem, run)
        return
    except (FloatingPointError, OSError) as e:
        why, code = f"stopped: {e}", 1
    except (MemoryError, OverflowError) as e:
        why, code = f"error: {TOO_LARGE} ({e})", 2
    except (Interrupted, KeyboardInterrupt):
        why, code = "interrupted", 128 + run.stopped
    if os.path.exists(run.path("checkpoint.npz")):
        why += f"; go on with: python {command} --resume {shlex.quote(run.folder)}"
    else:
        run.discard()
        why += "; there is no checkpoint yet"
    run.end_line()
    if code > 128:
        say(why)
    else:
        print(f"{p.prog}: {why}", file=sys.stderr)
    sys.exit(code)


def say(text, end="\n"):
    """Print text. What cannot be printed ends no run: letters that the locale lacks are escaped;
    where stdout is closed, as by `| head -1`, nothing is printed any more."""
    try:
        print(text, end=end, flush=True)
    except UnicodeEncodeError:
        say(text.encode("ascii", "backslashreplace").decode(), end)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def load_run(program, folder):
    """(problem, agent) of a program's run in a folder.

    FileNotFoundError: no run, or one without a checkpoint. ValueError: that of another program, or
    files that are damaged or do not fit together. Both say where.
    """
    path, checkpoint = (os.path.join(folder, x) for x in ("config.json", "checkpoint.npz"))
    if not os.path.exists(path):
        raise FileNotFoundError(f"{folder} holds no run: there is no config.json in it")
    saved, mine = read_json(path), command_of(program)
    given = saved.get("config") if isinstance(saved, dict) else None
    if not isinstance(given, dict) or not isinstance(resumed := saved.get("resumed", []), list) or (
            not all(isinstance(x, dict) for x in resumed)):
        raise ValueError(f"{path} holds no configuration of a run")
    if saved.get("program") not in (None, "", mine):            # "": a run made from Python
        raise ValueError(f"{folder} holds a run of `python {saved['program']}`, not of `python "
                         f"{mine}`")
    try:
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        check_types(program.Config, given)                      # before anything relies on them
        config = program.resolve(given)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    if not os.path.exists(checkpoint):
        raise FileNotFoundError(f"{folder} has no checkpoint.npz: the run was stopped before its "
                                f"first one; start again with its flags and --out {folder}")
    agent = load_tree(checkpoint)
    try:
        return program.prepare(config, agent), agent
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from None


def command_of(program):
    """What follows `python` on the command line of a program: "hiql.py" or "-m lab.td3"."""
    path = os.path.relpath(os.path.realpath(program.__file__), os.path.realpath(HERE))
    return path if os.sep not in path else "-m " + path[:-3].replace(os.sep, ".")


def require_free_folder(folder, config=None):
    """ValueError if the folder holds files (temporary ones do not count), unless they are those of
    a run with this very config that was killed before its first checkpoint."""
    held = [name for name in os.listdir(folder) if not name.endswith(".tmp")] if os.path.exists(
        folder) else []
    if "checkpoint.npz" in held or "summary.json" in held:
        raise ValueError(f"{folder} already holds a run; choose another --out, or --resume "
                         f"{folder}")
    if held and not (config and set(held) <= {"config.json", "train.csv", "eval.csv"}
                     and _begun_with(folder, config)):
        raise ValueError(f"{folder} holds files, such as {min(held)}; choose another --out")


def _begun_with(folder, config):
    """Whether the folder's config.json is of a run with this config."""
    try:
        begun = read_json(os.path.join(folder, "config.json"))["config"]
        return begun == json.loads(json.dumps(dataclasses.asdict(config)))
    except (ValueError, OSError, KeyError, TypeError):
        return False


def free_folder(config, label=None):
    """runs/<env>_<agent>_<label>; if that exists, the first free one of ..._2, ..._3, ...

    label: without one "seed" and the config's seed."""
    agent = getattr(config, "agent", type(config).__module__.split(".")[-1])
    if agent == "__main__":
        agent = os.path.basename(sys.argv[0]).removesuffix(".py")
    base = os.path.join("runs", f"{config.env}_{agent}_{label or f'seed{config.seed}'}")
    names = itertools.chain([base], (f"{base}_{i}" for i in itertools.count(2)))
    return next(name for name in names if not os.path.exists(name))


def _run_seeds(program, command, given, seeds, folder, jobs):
    if "seed" in given:
        raise ValueError("give --seed or --seeds, not both")
    seeds = seed_range(seeds)
    config = program.resolve(given)
    program.prepare(config)                             # refuse bad input once, not for each seed
    folder = folder or free_folder(config, f"seeds{seeds[0]}-{seeds[-1]}")
    require_free_folder(folder)
    os.makedirs(folder, exist_ok=True)
    words = []
    for name, value in given.items():
        flag = flag_of(name)
        words += [flag] if value is True else [f"--no-{flag[2:]}"] if value is False \
            else [f"{flag}={text_of(value) if isinstance(value, tuple) else value}"]
    path = [os.path.join(HERE, command[0])] if len(command) == 1 else command
    runs = {str(s): (path, [*words, f"--seed={s}"], os.path.join(folder, f"seed{s}"))
            for s in seeds}
    rows = []

    def done(name, summary):
        rows.append(summary)
        say(f"seed {name}: success {summary['success']:.3f}" if "success" in summary else
            f"seed {name}: done")
        write_rows(os.path.join(folder, "seeds.csv"), sorted(rows, key=lambda row: row["seed"]))

    try:
        failed = run_processes(runs, jobs, done)
    except SystemExit:
        say(f"interrupted; go on with each seed N: python {' '.join(command)} --resume "
            f"{shlex.quote(os.path.join(folder, 'seedN'))}")
        raise
    if rows and "success" in rows[0]:
        scores = [row["success"] for row in rows]
        say(f"mean success {np.mean(scores):.3f}, worst {min(scores):.3f} of {len(rows)} seeds; "
            f"{os.path.join(folder, 'seeds.csv')}")
    sys.exit(1 if failed else 0)


def run_processes(runs, jobs, done):
    """Run {label: (program, words, folder)}, `jobs` at once; done(label, summary) as each one ends.

    program: what follows `python`: [path of hiql.py] or ["-m", "lab.td3"]. words: its flags, but
    for --out. A run with a checkpoint is resumed; one with a summary is not run again. Output
    goes to <folder>.log. On Ctrl-C, SIGTERM or an exception here the processes save and stop,
    and are waited for. -> labels of runs that failed.
    """
    waiting, active, failed = list(runs), {}, []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    environment = {**os.environ, "PYTHONPATH": HERE}            # for python -m
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                name = waiting.pop(0)
                program, words, folder = runs[name]
                if os.path.exists(os.path.join(folder, "summary.json")):    # ended earlier
                    done(name, read_json(os.path.join(folder, "summary.json")))
                    continue
                begun = os.path.exists(os.path.join(folder, "checkpoint.npz"))
                words = ["--resume", folder] if begun else [*words, "--out", folder]
                with open(f"{folder}.log", "w") as log:
                    active[name] = subprocess.Popen([sys.executable, *program, *words], stdout=log,
                                                    stderr=subprocess.STDOUT, env=environment)
            time.sleep(0.2)
            for name in [name for name, process in active.items() if process.poll() is not None]:
                if active.pop(name).returncode:
                    failed.append(name)
                    print(f"{name} failed; see {runs[name][2]}.log", file=sys.stderr)
                else:
                    done(name, read_json(os.path.join(runs[name][2], "summary.json")))
    except BaseException as e:
        for process in active.values():
            process.terminate()                         # a second Ctrl-C would not let them save
        for process in active.values():
            process.wait()
        if isinstance(e, KeyboardInterrupt):
            sys.exit(130)
        raise
    return failed


# ----------------------------------------------------------------------------- one run


@functools.lru_cache
def code_and_versions():
    """{"commit": short hash of HEAD, with "+" if a *.py file is not as committed, "unknown" without
    git; "versions": {name: text} of what computes}, for config.json."""
    def git(*words):
        return subprocess.run(["git", "-C", HERE, *words], check=True, capture_output=True,
                              text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=7", "HEAD")
        commit += "+" * bool(git("status", "--porcelain", "--", "*.py"))
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"commit": commit, "versions": {
        "python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__,
        "machine": platform.machine()}}


class Interrupted(Exception):
    """Ctrl-C was pressed, or SIGTERM received; the run has been saved."""


class Run:
    """The folder of one run: configuration, logs, checkpoint, summary, and the progress line."""

    def __init__(self, folder, config, checkpoint=None, counter="update", program=""):
        """checkpoint: the tree of arrays to go on from; None: a new run, in a folder without one.

        folder None: nothing is written. counter: what the run counts, "update" or "step".
        program: what follows `python` on its command line, for config.json. ValueError: the folder
        holds a run already.
        """
        self.folder, self.checkpoint, self.config = folder, checkpoint, config
        self.counter = counter
        self.before = float(checkpoint["seconds"]) if checkpoint else 0.0
        self.logs = {name: [] for name in ("train", "eval")}
        for name, rows in self.logs.items():
            if checkpoint and os.path.exists(self.path(f"{name}.csv")):
                rows += [row for row in read_log(self.path(f"{name}.csv"), counter)
                         if int(row[counter]) <= int(checkpoint[counter])]
        if folder and not checkpoint:
            require_free_folder(folder, config)
            os.makedirs(folder, exist_ok=True)
            try:
                write_json(self.path("config.json"), {
                    "program": program, "config": dataclasses.asdict(config), "argv": sys.argv[1:],
                    **code_and_versions()})
            except OSError:
                self.discard()
                raise
        elif folder:
            self._note_other_code()
        self.stopped, self.start = 0, time.perf_counter()       # stopped: by which signal
        self.shown, self.line_is_open = self.start, False
        self.first = int(checkpoint[counter]) if checkpoint else 0
        if folder:                                      # without one there is nothing to save
            signal.signal(signal.SIGINT, self._interrupt)
            signal.signal(signal.SIGTERM, self._interrupt)          # as a cluster sends it

    def _interrupt(self, number, _):
        again, self.stopped = self.stopped and number == signal.SIGINT, number
        if again:
            raise KeyboardInterrupt                     # a second Ctrl-C does not wait

    def _note_other_code(self):
        """Add to "resumed" in config.json what goes on with this run, if it is not what made the
        part before."""
        begun, now = read_json(self.path("config.json")), code_and_versions()
        last = [begun, *begun.get("resumed", [])][-1]
        if now != {key: last.get(key) for key in now}:
            write_json(self.path("config.json"), {
                **begun, "resumed": [*begun.get("resumed", []), now]})

    def discard(self):
        """Remove what a run without a checkpoint has written, so that it can start again."""
        for name in ("config.json", "train.csv", "eval.csv"):
            with contextlib.suppress(OSError):
                os.unlink(self.path(name))
        with contextlib.suppress(OSError):              # it holds something else
            os.rmdir(self.folder)

    def path(self, name):
        """Path of a file in the run's folder."""
        return os.path.join(self.folder, name)

    def seconds(self):
        """Seconds that the run has taken, without the time between a stop and its --resume."""
        return self.before + time.perf_counter() - self.start

    def log(self, name, row):
        """Add a row (dict), the counter first, to "train" or "eval"; `save` writes them.

        Kept is what the file will hold, so that a resumed run computes from the same numbers.
        """
        self.logs[name].append({key: cell(x) for key, x in row.items()})

    def drive(self, loop, agent, generators, total, evaluate, every, log_every):
        """Take a training loop to its end: log, evaluate, save and show progress on the way.

        loop: a generator that trains `agent` in place and yields (row, whole) after each update
        or window: row {name: number} of losses and the like; whole is False where the run cannot
        be interrupted (within an episode). agent[counter] counts updates or steps up to `total`.
        evaluate() -> a summary (dict), or None while there is nothing to evaluate; it is called,
        and the run saved, every `every` counts; a row of train.csv is kept every `log_every`.
        -> the last summary, None without one. FloatingPointError: a loss or a parameter is not
        finite. Interrupted: after Ctrl-C or SIGTERM, once the run is saved.
        """
        step, last = int(agent[self.counter]), None
        due = (step // every + 1) * every
        with np.errstate(over="ignore", invalid="ignore"):              # checked below instead
            for row, whole in loop:
                before, step = step, int(agent[self.counter])
                for name, x in row.items():
                    if not np.isfinite(x):
                        raise FloatingPointError(f"the {name.replace('_', ' ')} became {x} at "
                                                 f"{self.counter} {step}")
                if row and step // log_every > before // log_every:
                    self.log("train", {self.counter: step, **{k: float(x) for k, x in row.items()},
                                       "seconds": self.seconds()})
                if whole and (step >= due or step >= total):
                    due = (step // every + 1) * every
                    self.require_finite(agent)
                    if new := evaluate():
                        last = new
                        self.log("eval", {self.counter: step, **last, "seconds": self.seconds()})
                    self.save(agent, generators)
                elif whole and self.stopped:
                    self.save(agent, generators)
                if row and (step < total or whole):
                    losses = " ".join(f"{k} {x:.3g}" for k, x in row.items() if k.endswith("loss"))
                    success = f"{last['success']:.2f}" if last and "success" in last else "-"
                    self.progress(min(step, total), total, f"{losses}  success {success}")
        return last

    def progress(self, done, total, text, every=0.5):
        """One line, on a terminal rewritten every `every` seconds, elsewhere a new one every ten.

        done of total updates or steps; text: losses and success."""
        now, terminal = time.perf_counter(), bool(sys.stdout and sys.stdout.isatty())
        if now - self.shown < (every if terminal else 10) and done < total:
            return
        self.shown = now
        made, seconds = done - self.first, now - self.start
        speed = made / seconds if seconds else 0.0
        left = (total - done) * seconds / max(made, 1)
        line = (f"{done}/{total} {done / total:4.0%}  {text}  {speed:.0f} {self.counter}s/s  "
                f"ETA {int(left // 60)}:{int(left % 60):02d}")
        self.line_is_open = terminal and done < total
        say(f"\r\033[K{line}" if terminal else line, end="" if self.line_is_open else "\n")

    def end_line(self):
        """Begin a new line after a progress line that is still to be rewritten."""
        if self.line_is_open:
            say("")

    def require_finite(self, agent):
        """FloatingPointError if a number of the agent is NaN or infinite.

        HIRO's goal range, and with it the goals in its replay, may be NaN until it is measured.
        """
        if not all(np.isfinite(x).all() for name, x in flatten(agent).items()
                   if x.dtype.kind == "f" and not name.startswith(("goal_range", "replay/"))):
            raise FloatingPointError(f"the agent is no longer finite at {self.counter} "
                                     f"{int(agent[self.counter])}")

    def save(self, agent, generators):
        """Write logs and checkpoint: the agent, a tree of arrays, and the states of generators
        {name: rng}. Raises `Interrupted` if Ctrl-C was pressed or SIGTERM received.

        The checkpoint comes last: what a kill leaves in the logs beyond it, a resumed run drops.
        """
        if not self.folder:
            return
        self.require_finite(agent)
        for name, rows in self.logs.items():
            if rows:
                write_rows(self.path(f"{name}.csv"), rows)
        states = {name: np.array(json.dumps(rng.bit_generator.state))
                  for name, rng in generators.items()}
        save_tree(self.path("checkpoint.npz"),
                  {**agent, "seconds": np.array(self.seconds()), "rng": states})
        if self.stopped:
            raise Interrupted

    def restore(self, agent, generators):
        """Set agent and generators {name: rng}, in place, to the checkpoint, if there is one."""
        if self.checkpoint:
            agent.update({name: x for name, x in self.checkpoint.items()
                          if name not in ("rng", "seconds")})
            for name, rng in generators.items():
                rng.bit_generator.state = json.loads(str(self.checkpoint["rng"][name]))

    def finish(self, summary, draw):
        """Print the main part of the summary (dict), draw() the pictures, write summary.json.

        That file comes last: with it the run is finished, without it --resume does all of this
        again. Without a folder the summary is only printed.
        """
        show(summary)
        if not self.folder:
            return
        draw()
        if resource:
            unit = 2**20 if sys.platform == "darwin" else 2**10
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            summary = {**summary, "peak_mb": round(peak / unit)}        # memory in MiB
        write_json(self.path("summary.json"), summary)
        say(f"files in {self.folder}: {' '.join(sorted(os.listdir(self.folder)))}")


NOT_PRINTED = ("env", "agent", "seed", "updates", "env_steps", "episodes", "peak_mb", "data",
               "success_lowest_late")


def show(summary):
    """Print a summary in about ten lines: no curves, and nothing of NOT_PRINTED."""
    for key, value in summary.items():
        if key in NOT_PRINTED or key.endswith(("_curve", "_by_distance")) or (
                key.startswith("subgoal_error_")):
            continue
        if isinstance(value, float):
            value = round(value, 4)
        say(f"{key}: {value}")


def minutes(seconds):
    """A duration in words: "about 20 seconds", "about 2 minutes"."""
    return (f"about {max(round(seconds, -1), 10):.0f} seconds" if seconds < 100 else
            f"about {seconds / 60:.0f} minutes")


def generators(seed, *names):
    """{name: generator}, independent of one another: the i-th has the i-th child of the seed."""
    return dict(zip(names, map(np.random.default_rng, np.random.SeedSequence(seed).spawn(
        len(names)))))


def check_checkpoint(saved, fresh, names, most, unmeasured=()):
    """ValueError unless a run can go on with a saved tree of arrays.

    It must hold the arrays of a `fresh` agent by name, shape and dtype, the seconds, and the states
    of the generators `names`. most: {array: its largest value}. Floats are finite, except in arrays
    `unmeasured`; integers, seconds and Adam's second moments are at least 0.
    """
    have, want = flatten(saved), flatten({**fresh, "seconds": np.zeros(())})
    states = {f"rng/{name}" for name in names}
    if odd := have.keys() ^ (want.keys() | states):
        raise ValueError("the checkpoint does not fit its config.json: it has "
                         f"{'an unknown' if min(odd) in have else 'no'} {min(odd)}")
    for name, y in want.items():
        x = have[name]
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            raise ValueError(f"the checkpoint does not fit its config.json: {name} is {x.dtype} of "
                             f"shape {x.shape} and not {y.dtype} of shape {y.shape}")
        signed = y.dtype.kind == "f" and name != "seconds" and (
            f"{name.partition('/v/')[0]}/count" not in want)            # no second moment
        if name not in unmeasured and not (np.isfinite(x).all() and (signed or (x >= 0).all())
                                           and (x <= most.get(name, np.inf)).all()):
            raise ValueError(f"the checkpoint is damaged: {name} holds numbers that cannot be")
    for name in states:
        rng = np.random.default_rng()
        try:
            rng.bit_generator.state = state = json.loads(str(have[name]))
            same = rng.bit_generator.state == state
        except Exception:                               # of many kinds
            same = False
        if not same:
            raise ValueError(f"the checkpoint is damaged: {name} is no state of a generator")
