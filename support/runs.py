"""The folder of a run: checkpoint, logs, progress, signals; and several seeds, each a process.

What an algorithm calls, in this order (nothing here calls back):
    config = resolve(given)                                 the program's own
    with one_line_errors(), open_run(PROGRAM, call, config) as run:
        run.begin(agent, rngs, total)                       new: the first checkpoint; else restored
        run.step(count, row)                                after an update: finite? log, progress
        run.evaluated(count, summary)                       a row of eval.csv
        run.save(agent, rngs)                               raises `Stopped` after a signal
        run.finish(summary)

checkpoint.npz holds `meta` (JSON: program, config, versions, logs, an own maze), acting/... (all
that acting needs) and training/... (optimiser, replay, generators). A file without the last part is
a trained agent to give away. Nothing is unpickled. config.json, train.csv and eval.csv are for
people and never read back. Every file is written under a temporary name and then renamed. A run
holds a lock on its folder, which the system frees when the process ends.
"""

from nets import flatten, unflatten     # first: nets sets one BLAS thread before numpy loads

import contextlib
import csv
import dataclasses
import functools
import glob
import io
import itertools
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import scipy

import envs
from support.flags import exit_with_error, flag_of, make_config, seed_range, text_of, words_of

try:
    import fcntl
except ImportError:                     # Windows has no such locks
    fcntl = None

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))          # the top folder


@dataclasses.dataclass(frozen=True)
class Program:
    """What a program says of itself, once."""

    name: str                           # what follows `python`: "hiql.py" or "-m lab.td3"
    config_class: type
    counter: str                        # what a run counts: "update" or "step"
    acting: tuple                       # entries of an agent that acting needs, as paths
    departed: dict = dataclasses.field(default_factory=dict)    # former fields: their old default


class Stopped(Exception):
    """A run has ended early: the text says why and how to go on; code: the program's exit code."""

    def __init__(self, text, code):
        super().__init__(text)
        self.code = code


# --------------------------------------------------------------------------------------- words


def say(text, end="\n"):
    """Print text. What cannot be printed ends no run: letters that the locale lacks are escaped;
    where stdout is closed, as by `| head -1`, nothing is printed any more."""
    try:
        print(text, end=end, flush=True)
    except UnicodeEncodeError:
        say(text.encode("ascii", "backslashreplace").decode(), end)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def show(summary):
    """Print the numbers of a summary: no curves, and not what the first line says."""
    for key, value in summary.items():
        if key in ("env", "agent", "seed", "data") or key.endswith(("_curve", "_by_distance")):
            continue
        say(f"{key}: {round(value, 4) if isinstance(value, float) else value}")


@contextlib.contextmanager
def one_line_errors():
    """What goes wrong ends the program with one line. Exit codes: 2 wrong input; 1 a number is not
    finite or a file cannot be written; 128 + the number of a signal, such as 130 after Ctrl-C and
    143 after SIGTERM; 0 nothing was to do."""
    try:
        yield
    except Stopped as e:
        say(e) if e.code == 0 or e.code > 128 else print(e, file=sys.stderr)
        sys.exit(e.code)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except (ValueError, OSError) as e:
        exit_with_error(e)
    except (MemoryError, OverflowError) as e:
        exit_with_error(f"these sizes are too large for this machine ({e})")


def generators(seed, *names):
    """{name: generator}, independent of one another: the i-th has the i-th child of the seed."""
    children = np.random.SeedSequence(seed).spawn(len(names))
    return dict(zip(names, map(np.random.default_rng, children)))


@functools.lru_cache
def code_and_versions():
    """{"commit": short hash of HEAD, with "+" if a *.py file is not as committed, "unknown" without
    git; "versions": {name: text} of what computes}."""
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


def versions_of(part):
    """"python 3.11.7 numpy 2.4.6 ...", of a `code_and_versions`."""
    return " ".join(f"{name} {version}" for name, version in part["versions"].items())


# --------------------------------------------------------------------------------------- files


def write(path, content):
    """Write text, or by content(file), under a new temporary name, then rename: never a part of a
    file, and never through a link. If it fails nothing temporary is left, and an OSError names the
    path."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        with open(temporary, "xb") as file:
            file.write(content.encode()) if isinstance(content, str) else content(file)
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(e, OSError):
            raise OSError(f"{path}: {e.strerror or e}") from None
        raise


def write_json(path, value):
    """Write a value as indented JSON."""
    write(path, json.dumps(value, indent=1) + "\n")


def read_json(path):
    """The value in a JSON file; ValueError: it holds something else."""
    with open(path) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path} is not JSON ({e})") from None


def write_rows(path, rows):
    """Write dicts as CSV; the columns are the keys in order of first appearance.

    Floats have six significant digits; None and missing keys are empty cells; lists are joined by
    spaces, with nan for None.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(
        [columns] + [[cell(row.get(key)) for key in columns] for row in rows])
    write(path, buffer.getvalue())


def cell(value):
    """The text of a value in a CSV file, see `write_rows`."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return " ".join(cell(x) or "nan" for x in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def load_arrays(path, wanted=None):
    """{name: array} of an npz file, all or those of `wanted` that it has. ValueError, which names
    it: it is something else, or damaged."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file")       # a pipe would be waited for
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if wanted is None or name in wanted}
    except OSError:
        raise
    except Exception as e:              # damaged files raise about fifteen kinds of exceptions
        raise ValueError(f"{path} is not an npz file of plain arrays ({e})") from None


# ------------------------------------------------------------------------------ saved runs


@dataclasses.dataclass
class Saved:
    """What a checkpoint holds: `read_run`."""

    meta: dict                          # program, config, commit, versions, logs, seconds, ...
    config: object                      # of the program's class
    agent: dict                         # tree of arrays; without the training part only `acting`
    states: dict                        # {name: state of a generator}; {} without that part


def read_run(program, folder):
    """The `Saved` run in a folder. FileNotFoundError: there is none. ValueError: that of another
    program, of a version from before this form, or a damaged file. Both say where."""
    path = os.path.join(folder, "checkpoint.npz")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{folder} holds no run: there is no checkpoint.npz in it")
    arrays = load_arrays(path)
    if "meta" not in arrays:
        raise ValueError(f"{folder} holds a run of an earlier version, which this one cannot read")
    try:
        meta = json.loads(str(arrays.pop("meta")))
        states = json.loads(str(arrays.pop("training/rng", "{}")))
        values = dict(meta["config"])
        name = meta["program"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"{path} is damaged ({e})") from None
    if name != program.name:
        raise ValueError(f"{folder} holds a run of `python {name}`, not of `python "
                         f"{program.name}`")
    for field, default in program.departed.items():
        if field in values and values.pop(field) != default:
            raise ValueError(f"{folder}: its setting {field} is none of today's; see docs/notes.md")
    try:
        config = make_config(program.config_class, values)
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from None
    if meta.get("maze"):
        envs.register_saved(config.env, meta["maze"])
    agent = {name.partition("/")[2]: x for name, x in arrays.items()}
    bad = [name for name, x in agent.items() if x.dtype.kind == "f" and not np.isfinite(x).all()]
    if bad:
        raise ValueError(f"{path} is damaged: {bad[0]} is not finite")
    return Saved(meta, config, unflatten(agent), states)


def require_fit(saved, agent, states, rngs, folder):
    """ValueError unless arrays and generators of a saved run have the names, shapes and dtypes of
    a fresh one."""
    have, want = flatten(saved), flatten(agent)
    if odd := (have.keys() ^ want.keys()) | (states.keys() ^ rngs.keys()):
        raise ValueError(f"{folder}: the checkpoint does not fit its config: {min(odd)}")
    for name, x in want.items():
        if (have[name].shape, have[name].dtype) != (x.shape, x.dtype):
            raise ValueError(f"{folder}: the checkpoint does not fit its config: {name} is "
                             f"{have[name].dtype} of shape {have[name].shape} and not {x.dtype} of "
                             f"shape {x.shape}")


def open_run(program, call, config):
    """The `Run` that flags ask for: a new one, or one to go on with, by its own config.

    call: of `support.flags.parse`. The same command again, with the same --out, goes on with its
    run. ValueError: the folder of a new run holds files, or is in use. Stopped: the run is finished
    already.
    """
    folder = call.resume or call.out or free_folder(program, config)
    if not call.resume and not os.path.exists(os.path.join(folder, "checkpoint.npz")):
        return Run(program, config, folder)
    if os.path.isdir(folder):
        lock_folder(folder)
    try:
        saved = read_run(program, folder) if call.resume else same_run(program, folder, config)
        if os.path.exists(os.path.join(folder, "summary.json")):
            raise Stopped(f"{folder} is finished; its summary.json stays as it is", 0)
    except BaseException:
        unlock_folder(folder)
        raise
    say(f"going on with {folder}")
    return Run(program, saved.config, folder, saved)


def same_run(program, folder, config):
    """The `Saved` run in a folder. ValueError: it is another run than that of config."""
    saved = read_run(program, folder)
    for name, x in dataclasses.asdict(saved.config).items():
        if getattr(config, name) != x:
            raise ValueError(f"{folder} already holds a run, with {flag_of(name)} {text_of(x)}; "
                             f"choose another --out, or --resume {folder}")
    return saved


LOCKED = {}                             # {folder: open file} of the locks that this process holds


def lock_folder(folder):
    """Lock a folder for this process. ValueError: another one has it."""
    path = os.path.realpath(folder)
    if fcntl is None or path in LOCKED:
        return
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ValueError(f"{folder} is in use by another process") from None
    except OSError as e:
        say(f"note: {folder} cannot be locked ({e.strerror}); let no other process use it")
    LOCKED[path] = file


def unlock_folder(folder):
    """Free a folder, if this process has it."""
    file = LOCKED.pop(os.path.realpath(folder), None)
    if file is not None:
        os.close(file)


def free_folder(program, config, label=None):
    """runs/<env>_<agent>_<label>; if that exists, the first free one of ..._2, ..._3, ...

    label: without one "seed" and the config's seed."""
    agent = getattr(config, "agent", program.name.split(".")[-1 if " " in program.name else 0])
    base = os.path.join("runs", f"{config.env}_{agent}_{label or f'seed{config.seed}'}")
    names = itertools.chain([base], (f"{base}_{i}" for i in itertools.count(2)))
    return next(name for name in names if not os.path.exists(name))


def require_free(folder, known=()):
    """ValueError if the folder holds anything but temporary files and those with a known name."""
    names = os.listdir(folder) if os.path.exists(folder) else []
    held = [name for name in names if name not in known and not name.endswith(".tmp")]
    if held:
        raise ValueError(f"{folder} holds files, such as {min(held)}; choose another --out")


def numbers_of(found):
    """What an evaluate(act) has returned, {name: number}, as floats; ValueError: something else."""
    if not isinstance(found, dict):
        raise ValueError(f"evaluate(act) must return {{name: number}}, not {type(found).__name__}")
    for name, x in found.items():
        if not isinstance(name, str) or np.ndim(x) or np.asarray(x).dtype.kind not in "biuf":
            raise ValueError(f"evaluate(act) must return {{name: number}}; its {name!r} is "
                             f"{x!r:.60}")
    return {name: float(x) for name, x in found.items()}


# ----------------------------------------------------------------------------------- one run


class Run:
    """One run: its folder, logs and progress line. Without a folder nothing is written.

    As a context it turns Ctrl-C and SIGTERM into a stop at the next `save`, and what ends training
    early into `Stopped`.
    """

    def __init__(self, program, config, folder=None, saved=None):
        """saved: of `read_run`, to go on with. ValueError: the folder of a new run holds files."""
        self.program, self.config, self.folder, self.saved = program, config, folder, saved
        if folder and not saved:
            require_free(folder)
        self.logs = saved.meta["logs"] if saved else {"train": [], "eval": []}
        self.before = saved.meta["seconds"] if saved else 0.0       # seconds of earlier parts
        self.history = [*saved.meta["history"]] if saved else []    # commit and versions of parts
        if code_and_versions() not in self.history[-1:]:
            self.history.append(code_and_versions())
        self.stopped, self.handlers, self.begun = 0, {}, False
        self.start = self.shown = time.perf_counter()
        self.line_is_open, self.result = False, "success -"

    def path(self, name):
        """Path of a file in the run's folder."""
        return os.path.join(self.folder, name)

    def seconds(self):
        """Seconds that the run has taken, without the time between a stop and its --resume."""
        return self.before + time.perf_counter() - self.start

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
                number = getattr(signal, name, None)    # Windows lacks two
                ignored = name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
                if number and not ignored:              # by nohup
                    self.handlers[number] = signal.signal(number, self._stop)
        return self

    def _stop(self, number, _):
        again, self.stopped = self.stopped and number == signal.SIGINT, number
        if again or not self.begun:
            raise KeyboardInterrupt                     # a second Ctrl-C does not wait

    def __exit__(self, kind, error, trace):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.line_is_open:
            say("")
        if self.folder:
            unlock_folder(self.folder)
        go_on = ""
        if self.begun and self.folder:
            go_on = f"; go on with: python {self.program.name} --resume {shlex.quote(self.folder)}"
        if kind is KeyboardInterrupt:
            raise Stopped(f"interrupted{go_on}", 128 + (self.stopped or signal.SIGINT)) from None
        if self.begun and kind is FloatingPointError:   # going on would end there again
            raise Stopped(f"stopped: {error}", 1) from None
        if self.begun and isinstance(error, OSError):
            raise Stopped(f"stopped: {error}{go_on}", 1) from None

    def begin(self, agent, rngs, total, warmup=0, given=None):
        """Start: a new run saves its first checkpoint; one to go on with is restored, in place.

        agent: tree of arrays, agent[counter] counts updates or steps up to total; rngs {name:
        generator}; warmup: the count from which the time that is left can be told; given: what the
        run has from Python and no flag can say, such as an environment, in words. ValueError: the
        checkpoint does not fit, or the folder is in use.
        """
        self.total, self.warmup, self.given = total, warmup, given
        if self.folder:
            os.makedirs(self.folder, exist_ok=True)
            lock_folder(self.folder)
            for path in glob.glob(os.path.join(glob.escape(self.folder), "*.*.[0-9]*.tmp")):
                os.unlink(path)                         # of a process that was killed
        if self.saved:
            if self.saved.meta.get("given") != given:
                raise ValueError(f"{self.folder} is a run with "
                                 f"{self.saved.meta.get('given') or 'nothing given from Python'}; "
                                 f"it cannot go on with {given or 'what flags can say'}")
            require_fit(self.saved.agent, agent, self.saved.states, rngs, self.folder)
            agent.update(self.saved.agent)
            for name, rng in rngs.items():
                rng.bit_generator.state = self.saved.states[name]
        elif self.folder:
            require_free(self.folder)                   # it was when this run was opened
            self.save(agent, rngs)
        if self.folder:
            write_json(self.path("config.json"), {
                "program": self.program.name, "config": dataclasses.asdict(self.config),
                "argv": sys.argv[1:], "history": self.history})
        self.begun = True
        self.count = self.first = int(agent[self.program.counter])
        self.since = time.perf_counter()                # when `first` was reached

    def step(self, count, row):
        """After an update or window: refuse what is not finite, keep a row of train.csv now and
        then, show progress. count: so far; row: {name: number} of losses and the like."""
        counter, before, self.count = self.program.counter, self.count, count
        for name, x in row.items():
            if not np.isfinite(x):
                raise FloatingPointError(f"the {name.replace('_', ' ')} became {x} at {counter} "
                                         f"{count}")
        every = 500 if counter == "step" else min(100, self.config.eval_interval)
        if row and count // every > before // every:
            self.logs["train"].append({counter: count, **{k: float(x) for k, x in row.items()},
                                       "seconds": self.seconds()})
        if count <= self.warmup:
            self.first, self.since = count, time.perf_counter()
        if before < self.total:                         # an episode may run past the end
            self._progress(min(count, self.total), row)

    def _progress(self, done, row):
        """One line, on a terminal rewritten twice a second, elsewhere a new one every ten."""
        now, terminal = time.perf_counter(), bool(sys.stdout and sys.stdout.isatty())
        if now - self.shown < (0.5 if terminal else 10) and done < self.total:
            return
        self.shown = now
        losses = ""                                     # as many as the line has room for
        for name, x in row.items():
            item = f"  {name.removesuffix('_loss')} {x:.3g}"
            if name.endswith("_loss") and len(losses + item) <= 42:
                losses += item
        left = "-:--"
        if done > self.first:
            seconds = int((self.total - done) * (now - self.since) / (done - self.first))
            left = f"{seconds // 60}:{seconds % 60:02d}"
        line = f"{done}/{self.total}{losses}  {self.result}  ETA {left}"[:79]
        self.line_is_open = terminal and done < self.total
        say(f"\r\033[K{line}" if terminal else line, end="" if self.line_is_open else "\n")

    def evaluated(self, count, summary):
        """Keep an evaluation (dict) as the row of eval.csv for this count."""
        rows = self.logs["eval"]
        if rows and rows[-1][self.program.counter] == count:        # done again after a stop
            rows.pop()
        if summary:
            rows.append({self.program.counter: count, **summary, "seconds": self.seconds()})
        if "success" in summary:
            self.result = f"success {summary['success']:.2f}"
        elif "return" in summary:
            self.result = f"success -  return {summary['return']:.4g}"

    def save(self, agent, rngs):
        """Write checkpoint and logs. FloatingPointError: an array is not finite; KeyboardInterrupt:
        a signal came, and the run is saved."""
        flat = flatten(agent)
        for name, x in flat.items():
            if x.dtype.kind == "f" and not np.isfinite(x).all():
                raise FloatingPointError(f"{name} is no longer finite at {self.program.counter} "
                                         f"{int(agent[self.program.counter])}")
        if not self.folder:
            return
        meta = {"form": 1, "program": self.program.name, "config": dataclasses.asdict(self.config),
                "maze": envs.saved_entry(self.config.env), "given": self.given,
                "history": self.history,
                "logs": self.logs, "seconds": self.seconds()}
        states = {name: rng.bit_generator.state for name, rng in rngs.items()}
        arrays = {"meta": np.array(json.dumps(meta)), "training/rng": np.array(json.dumps(states))}
        for name, x in flat.items():
            acts = any(f"{name}/".startswith(f"{part}/") for part in self.program.acting)
            arrays[f"{'acting' if acts else 'training'}/{name}"] = x
        write(self.path("checkpoint.npz"), lambda file: np.savez(file, **arrays))
        for name, rows in self.logs.items():
            write_rows(self.path(f"{name}.csv"), rows)
        if self.stopped:
            raise KeyboardInterrupt

    def finish(self, summary):
        """Print the summary (dict), write summary.json: with it the run is finished."""
        show(summary)
        if self.folder:
            write_json(self.path("summary.json"), summary)
            unlock_folder(self.folder)
            say(f"files in {self.folder}: {' '.join(sorted(os.listdir(self.folder)))}")


def as_run(run, program, config):
    """What a `train` is given, as a `Run`: one, the folder of a new one, or None: without files."""
    return run if isinstance(run, Run) else Run(program, config, run and os.fspath(run))


# ------------------------------------------------------------------------------ several seeds


def run_seeds(program, call, given, config):
    """One process for each seed of call.seeds, call.jobs at once; seeds.csv beside their folders.

    The same command again, with the same --out, goes on. given, call: of `support.flags.parse`;
    config: what `given` makes. ValueError: the folder holds something else. Stopped: also at the
    end.
    """
    seeds = seed_range(call.seeds)
    folder = call.out or free_folder(program, config, f"seeds{seeds[0]}-{seeds[-1]}")
    runs = {f"seed{s}": (program.name, [*words_of(given), f"--seed={s}"],
                         os.path.join(folder, f"seed{s}")) for s in seeds}
    require_free(folder, ("seeds.csv", *runs, *(f"{name}.log" for name in runs)))
    for s, (_, _, path) in zip(seeds, runs.values()):
        if os.path.exists(os.path.join(path, "checkpoint.npz")):
            same_run(program, path, dataclasses.replace(config, seed=s))
    os.makedirs(folder, exist_ok=True)
    lock_folder(folder)
    rows = []
    try:
        for name, summary in run_processes(runs, call.jobs or 1):
            rows.append(summary)
            write_rows(os.path.join(folder, "seeds.csv"), sorted(rows, key=lambda x: x["seed"]))
            say(f"{name}: success {summary['success']:.3f}" if "success" in summary else
                f"{name}: done")
    except KeyboardInterrupt as e:
        raise Stopped("interrupted; go on by the same command with --out "
                      f"{shlex.quote(folder)}", 128 + int(str(e) or signal.SIGINT)) from None
    finally:
        unlock_folder(folder)
    if rows and "success" in rows[0]:
        scores = [row["success"] for row in rows]
        say(f"mean success {np.mean(scores):.3f}, worst {min(scores):.3f} of {len(rows)} seeds; "
            f"{os.path.join(folder, 'seeds.csv')}")
    if len(rows) < len(seeds):
        raise Stopped(f"{len(seeds) - len(rows)} of {len(seeds)} seeds failed", 1)


def run_processes(runs, jobs):
    """Run {label: (program, words, folder)}, `jobs` at once -> yields (label, summary) as each
    ends; those that fail are told on stderr and left out.

    program: what follows `python`, "hiql.py" or "-m lab.td3"; words: its flags, but for --out. A
    run with a checkpoint is resumed; one with a summary is not run again. Output goes to
    <folder>.log. However this ends, the processes save, stop, and are waited for. ValueError: a
    process refuses its input. KeyboardInterrupt: Ctrl-C, or another signal, whose number it names.
    """
    def interrupt(number, _):
        raise KeyboardInterrupt(str(int(number)))

    waiting, active = list(runs), {}
    paths = os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}           # for python -m
    numbers = [getattr(signal, x) for x in ("SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, x)]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                label = waiting.pop(0)
                summary = os.path.join(runs[label][2], "summary.json")
                if os.path.exists(summary):
                    yield label, read_json(summary)
                    continue
                active[label] = _start(*runs[label], environment)
            if active:
                time.sleep(0.2)
            for label in [x for x, process in active.items() if process.poll() is not None]:
                folder, code = runs[label][2], active.pop(label).returncode
                if code == 2:
                    raise ValueError(_last_line(f"{folder}.log"))
                if code:
                    print(f"{label} failed; see {folder}.log", file=sys.stderr)
                else:
                    yield label, read_json(os.path.join(folder, "summary.json"))
    finally:
        for process in active.values():
            process.terminate()                         # a second Ctrl-C would not let them save
        for process in active.values():
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(program, words, folder, environment):
    """The process of one run: new, or to be gone on with."""
    first, *more = program.split()
    path = [os.path.join(HERE, first)] if not more else [first, *more]
    if os.path.exists(os.path.join(folder, "checkpoint.npz")):
        words = ["--resume", folder]
    else:
        words = [*words, "--out", folder]
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{folder}.log")
    with open(f"{folder}.log", "x") as log:             # never through a link
        return subprocess.Popen([sys.executable, *path, *words], stdout=log,
                                stderr=subprocess.STDOUT, env=environment)


def _last_line(path):
    """The last line of a log, which is then removed, so that the same command can be mended."""
    with open(path) as file:
        line = file.read().strip().rpartition("\n")[2]
    os.unlink(path)
    with contextlib.suppress(OSError):                  # it holds other runs
        os.rmdir(os.path.dirname(path))
    return line.partition("error: ")[2] or line
