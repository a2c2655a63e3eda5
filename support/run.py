"""Everything around a training loop: flags, run folder, seeds, resume, signals, progress, schedule.

A program (hiql.py, hiro.py, lab/baselines.py, lab/td3.py) is a module with a dataclass `Config` and
    resolve(given) -> config               a whole config from the flags given (a dict)
    prepare(config, checkpoint) -> problem a namespace, with config; ValueError for bad input
    train(problem, run)                    trains by `Run.drive` and ends with `Run.finish`
    evaluate_checkpoint(problem, agent) -> summary
    COUNTER                                what a run counts: "update" or "step"
and calls `main(sys.modules[__name__])`. Its command line then takes
    [flags]                  one run: a folder with config.json, train.csv, eval.csv,
                             checkpoint.npz, summary.json and pictures
    --seeds A-B [--jobs N]   one process for each seed, N at once; seeds.csv beside them
    --resume DIR             go on as if the run had never stopped
    --eval DIR               evaluate the checkpoint of a run
"""

import dataclasses
import json
import os
import platform
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
from support.files import load_tree, read_json, read_rows, save_tree, write_json, write_rows
from support.flags import exit_with_error, flag_of, parser, seed_range, text_of

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))          # the top folder

# ----------------------------------------------------------------------------- the program


def main(program):
    """Run the program of a module (see the top of this file) with the flags in sys.argv.

    Exit codes: 2 wrong input, 1 a loss or parameter not finite or a seed failed, 130 interrupted.
    """
    path = os.path.relpath(os.path.realpath(program.__file__), os.path.realpath(HERE))
    command = path if os.sep not in path else "-m " + path[:-3].replace(os.sep, ".")
    p = parser(program.Config, program.__doc__.split("\n\n")[0] +
               "\n\nTags: [D1] ... at the top of hiql.py, [E1] ... of hiro.py, or in lab/.",
               os.path.basename(path))
    given = vars(p.parse_args())
    folder, seeds = given.pop("out", None), given.pop("seeds", None)
    jobs, resume, old = given.pop("jobs", 1), given.pop("resume", None), given.pop("eval", None)
    try:
        if (resume or old) and (given or folder or seeds or (resume and old)):
            raise ValueError("--resume and --eval take the flags of the run itself; give no other")
        if jobs < 1:
            raise ValueError(f"--jobs must be at least 1, not {jobs}")
        if seeds is not None:
            return _run_seeds(program, command.split(), given, seeds, folder, jobs)
        if resume or old:
            problem, agent = load_run(program, resume or old)
        else:
            problem, agent = program.prepare(program.resolve(given)), None
        if old:
            return show(program.evaluate_checkpoint(problem, agent))
        if resume and os.path.exists(os.path.join(resume, "summary.json")):
            return print(f"{resume} is finished; its summary.json stays as it is")
        run = Run(resume or folder or free_folder(problem.config), problem.config, agent,
                  program.COUNTER, command)
    except (ValueError, OSError) as e:
        exit_with_error(e, p.prog)
    try:
        program.train(problem, run)
    except FloatingPointError as e:
        saved = os.path.exists(run.path("checkpoint.npz"))
        print(f"\n{p.prog}: stopped: {e}; " + (f"the last checkpoint is in {run.folder}" if saved
              else "there is no checkpoint yet"), file=sys.stderr)
        sys.exit(1)
    except Interrupted:
        print(f"\ninterrupted; go on with: python {command} --resume {run.folder}")
        sys.exit(130)


def load_run(program, folder):
    """(problem, agent) of a program's run in a folder; ValueError or OSError without such a run."""
    try:
        given = read_json(os.path.join(folder, "config.json"))["config"]
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        agent = load_tree(os.path.join(folder, "checkpoint.npz"))
        return program.prepare(program.resolve(given), agent), agent
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{folder} does not hold a run of this program ({e!r})") from None


def require_free_folder(folder):
    """ValueError if the folder holds a run."""
    if any(os.path.exists(os.path.join(folder, f)) for f in ("checkpoint.npz", "summary.json")):
        raise ValueError(f"{folder} already holds a run; choose another --out, or --resume "
                         f"{folder}")


def free_folder(config):
    """runs/<env>_<agent>_seed<seed>; if that exists, the first free one of ..._2, ..._3, ..."""
    agent = getattr(config, "agent", type(config).__module__.split(".")[-1])
    if agent == "__main__":
        agent = os.path.basename(sys.argv[0]).removesuffix(".py")
    base = os.path.join("runs", f"{config.env}_{agent}_seed{config.seed}")
    numbers = (f"{base}_{i}" for i in range(2, 10**6))
    return base if not os.path.exists(base) else next(f for f in numbers if not os.path.exists(f))


def _run_seeds(program, command, given, seeds, folder, jobs):
    if "seed" in given:
        raise ValueError("give --seed or --seeds, not both")
    seeds = seed_range(seeds)
    config = program.resolve(given)
    program.prepare(config)                             # refuse bad input once, not for each seed
    folder = folder or free_folder(config).replace(f"seed{config.seed}", f"seeds{seeds[0]}-"
                                                   f"{seeds[-1]}")
    if os.path.exists(folder):
        raise ValueError(f"{folder} exists; choose another --out")
    os.makedirs(folder)
    words = []
    for name, value in given.items():
        flag = flag_of(name)
        words += [flag] if value is True else [f"--no-{flag[2:]}"] if value is False \
            else [f"{flag}={text_of(value) if isinstance(value, tuple) else value}"]
    command = [os.path.join(HERE, command[0])] if len(command) == 1 else command
    runs = {str(s): (command, [*words, f"--seed={s}"], os.path.join(folder, f"seed{s}"))
            for s in seeds}
    rows = []

    def done(name, summary):
        rows.append(summary)
        print(f"seed {name}: success {summary['success']:.3f}", flush=True)
        write_rows(os.path.join(folder, "seeds.csv"), sorted(rows, key=lambda row: row["seed"]))

    failed = run_processes(runs, jobs, done)
    if rows:
        scores = [row["success"] for row in rows]
        print(f"mean success {np.mean(scores):.3f}, worst {min(scores):.3f} of {len(rows)} seeds; "
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
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException:
        for process in active.values():
            process.send_signal(signal.SIGINT)
        raise
    finally:
        for process in active.values():
            process.wait()
    return failed


# ----------------------------------------------------------------------------- one run


class Interrupted(Exception):
    """Ctrl-C was pressed; the run has been saved."""


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
        if folder and not checkpoint:
            require_free_folder(folder)
            os.makedirs(folder, exist_ok=True)
            write_json(self.path("config.json"), {
                "program": program, "config": dataclasses.asdict(config), "argv": sys.argv[1:],
                "versions": {
                    "python": platform.python_version(), "numpy": np.__version__,
                    "scipy": scipy.__version__, "machine": platform.machine()}})
        self.logs = {name: [] for name in ("train", "eval")}
        for name, rows in self.logs.items():
            if checkpoint and os.path.exists(self.path(f"{name}.csv")):
                rows += [row for row in read_rows(self.path(f"{name}.csv"))
                         if int(row[counter]) <= int(checkpoint[counter])]
        self.stopped, self.start = False, time.perf_counter()
        self.shown = self.start
        self.first = int(checkpoint[counter]) if checkpoint else 0
        if folder:                                      # without one, Ctrl-C has nothing to save
            signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_):
        if self.stopped:
            raise KeyboardInterrupt                     # a second Ctrl-C does not wait
        self.stopped = True

    def path(self, name):
        """Path of a file in the run's folder."""
        return os.path.join(self.folder, name)

    def seconds(self):
        """Seconds that the run has taken, without the time between a stop and its --resume."""
        return self.before + time.perf_counter() - self.start

    def log(self, name, row):
        """Add a row (dict), the counter first, to "train" or "eval"; `save` writes them."""
        self.logs[name].append(row)

    def drive(self, loop, agent, generators, total, evaluate, every, log_every):
        """Take a training loop to its end: log, evaluate, save and show progress on the way.

        loop: a generator that trains `agent` in place and yields (row, whole) after each update
        or window: row {name: number} of losses and the like; whole is False where the run cannot
        be interrupted (within an episode). agent[counter] counts updates or steps up to `total`.
        evaluate() -> a summary (dict), or None while there is nothing to evaluate; it is called,
        and the run saved, every `every` counts; a row of train.csv is kept every `log_every`.
        -> the last summary, None without one. FloatingPointError: a loss or a parameter is not
        finite. Interrupted: after Ctrl-C, once the run is saved.
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
                    success = f"{last['success']:.2f}" if last else "-"
                    self.progress(min(step, total), total, f"{losses}  success {success}")
        return last

    def progress(self, done, total, text, every=0.5):
        """One line, on a terminal rewritten every `every` seconds, elsewhere a new one every ten.

        done of total updates or steps; text: losses and success."""
        now, terminal = time.perf_counter(), sys.stdout.isatty()
        if now - self.shown < (every if terminal else 10) and done < total:
            return
        self.shown = now
        speed = (done - self.first) / max(now - self.start, 1e-9)
        left = (total - done) / max(speed, 1e-9)
        line = (f"{done}/{total} {done / total:4.0%}  {text}  {speed:.0f} {self.counter}s/s  "
                f"ETA {int(left // 60)}:{int(left % 60):02d}")
        print(f"\r\033[K{line}" if terminal else line, flush=True,
              end="\n" if not terminal or done == total else "")

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
        {name: rng}. Raises `Interrupted` if Ctrl-C was pressed."""
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

    def finish(self, summary):
        """Write the summary (dict) to summary.json; print the main part and where the files are."""
        if resource:
            unit = 2**20 if sys.platform == "darwin" else 2**10
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            summary = {**summary, "peak_mb": round(peak / unit)}        # memory in MiB
        if not self.folder:
            return show(summary)
        write_json(self.path("summary.json"), summary)
        show(summary)
        print(f"files in {self.folder}: {' '.join(sorted(os.listdir(self.folder)))}")


NOT_PRINTED = ("env", "agent", "seed", "updates", "env_steps", "episodes", "peak_mb")


def show(summary):
    """Print a summary in about ten lines: no curves, and nothing of NOT_PRINTED."""
    for key, value in summary.items():
        if key in NOT_PRINTED or key.endswith(("_curve", "_by_distance")) or (
                key.startswith("subgoal_error_")):
            continue
        if isinstance(value, float):
            value = round(value, 4)
        print(f"{key}: {value}")


def minutes(seconds):
    """A duration in words: "about 20 seconds", "about 2 minutes"."""
    return (f"about {max(round(seconds, -1), 10):.0f} seconds" if seconds < 100 else
            f"about {seconds / 60:.0f} minutes")


def generators(seed, *names):
    """{name: generator}, independent of one another: the i-th has the i-th child of the seed."""
    return dict(zip(names, map(np.random.default_rng, np.random.SeedSequence(seed).spawn(
        len(names)))))


def same_shapes(agent, fresh):
    """Whether a checkpoint has, under the top-level names of `fresh`, the same arrays by name and
    shape. It may have further top-level names."""
    shapes = {name: x.shape for name, x in flatten(fresh).items()}
    try:
        return shapes == {name: x.shape for name, x in flatten(
            {name: agent[name] for name in fresh}).items()}
    except KeyError:
        return False
