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
people and never read back. Every file is written under a temporary name and then renamed.
"""

from nets import flatten, unflatten     # first: nets sets one BLAS thread before numpy loads

import contextlib
import csv
import dataclasses
import functools
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
from support.flags import exit_with_error, make_config, seed_range, words_of

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
    finite or a file cannot be written; 130 after Ctrl-C, 143 after SIGTERM; 0 nothing was to do."""
    try:
        yield
    except Stopped as e:
        say(e) if e.code in (0, 130, 143) else print(e, file=sys.stderr)
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


# --------------------------------------------------------------------------------------- files


def write(path, content):
    """Write text, or by content(file), under a temporary name, then rename: never a part of a
    file. If it fails nothing temporary is left, and an OSError names the path."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else content(file)
        os.replace(f"{path}.tmp", path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.tmp")
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

    call: of `support.flags.parse`. ValueError: the folder of a new run holds files. Stopped: the
    run is finished already.
    """
    if not call.resume:
        return Run(program, config, call.out or free_folder(program, config))
    saved = read_run(program, call.resume)
    if os.path.exists(os.path.join(call.resume, "summary.json")):
        raise Stopped(f"{call.resume} is finished; its summary.json stays as it is", 0)
    return Run(program, saved.config, call.resume, saved)


def free_folder(program, config, label=None):
    """runs/<env>_<agent>_<label>; if that exists, the first free one of ..._2, ..._3, ...

    label: without one "seed" and the config's seed."""
    agent = getattr(config, "agent", program.name.split(".")[-1 if " " in program.name else 0])
    base = os.path.join("runs", f"{config.env}_{agent}_{label or f'seed{config.seed}'}")
    names = itertools.chain([base], (f"{base}_{i}" for i in itertools.count(2)))
    return next(name for name in names if not os.path.exists(name))


def require_free(folder):
    """ValueError if the folder holds anything but temporary files."""
    names = os.listdir(folder) if os.path.exists(folder) else []
    held = [name for name in names if not name.endswith(".tmp")]
    if "checkpoint.npz" in held:
        raise ValueError(f"{folder} already holds a run; choose another --out, or --resume "
                         f"{folder}")
    if held:
        raise ValueError(f"{folder} holds files, such as {min(held)}; choose another --out")


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
        self.line_is_open, self.success = False, "-"

    def path(self, name):
        """Path of a file in the run's folder."""
        return os.path.join(self.folder, name)

    def seconds(self):
        """Seconds that the run has taken, without the time between a stop and its --resume."""
        return self.before + time.perf_counter() - self.start

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._stop)
                             for number in (signal.SIGINT, signal.SIGTERM)}
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
        go_on = ""
        if self.begun and self.folder:
            go_on = f"; go on with: python {self.program.name} --resume {shlex.quote(self.folder)}"
        if kind is KeyboardInterrupt:
            raise Stopped(f"interrupted{go_on}", 128 + (self.stopped or signal.SIGINT)) from None
        if self.begun and isinstance(error, (FloatingPointError, OSError)):
            raise Stopped(f"stopped: {error}{go_on}", 1) from None

    def begin(self, agent, rngs, total, warmup=0):
        """Start: a new run saves its first checkpoint; one to go on with is restored, in place.

        agent: tree of arrays, agent[counter] counts updates or steps up to total; rngs {name:
        generator}; warmup: the count from which the time that is left can be told. ValueError: the
        checkpoint does not fit.
        """
        self.total, self.warmup = total, warmup
        if self.saved:
            require_fit(self.saved.agent, agent, self.saved.states, rngs, self.folder)
            agent.update(self.saved.agent)
            for name, rng in rngs.items():
                rng.bit_generator.state = self.saved.states[name]
        elif self.folder:
            os.makedirs(self.folder, exist_ok=True)
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
        line = f"{done}/{self.total}{losses}  success {self.success}  ETA {left}"[:79]
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
            self.success = f"{summary['success']:.2f}"

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
                "maze": envs.saved_entry(self.config.env), "history": self.history,
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
            say(f"files in {self.folder}: {' '.join(sorted(os.listdir(self.folder)))}")


# ------------------------------------------------------------------------------ several seeds


def run_seeds(program, call, given, config):
    """One process for each seed of call.seeds, call.jobs at once; seeds.csv beside their folders.

    given, call: of `support.flags.parse`; config: what `given` makes. Stopped: at the end too.
    """
    seeds = seed_range(call.seeds)
    folder = call.out or free_folder(program, config, f"seeds{seeds[0]}-{seeds[-1]}")
    require_free(folder)
    os.makedirs(folder, exist_ok=True)
    runs, rows = {}, []
    for s in seeds:
        words = [*words_of(given), f"--seed={s}"]
        runs[str(s)] = program.name, words, os.path.join(folder, f"seed{s}")
    try:
        for name, summary in run_processes(runs, call.jobs or 1):
            rows.append(summary)
            write_rows(os.path.join(folder, "seeds.csv"), sorted(rows, key=lambda x: x["seed"]))
            say(f"seed {name}: success {summary['success']:.3f}" if "success" in summary else
                f"seed {name}: done")
    except KeyboardInterrupt as e:
        raise Stopped(f"interrupted; go on with each seed N: python {program.name} --resume "
                      f"{shlex.quote(os.path.join(folder, 'seedN'))}",
                      128 + int(str(e) or signal.SIGINT)) from None
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
    process refuses its input. KeyboardInterrupt: Ctrl-C, or SIGTERM, whose number it then names.
    """
    def interrupt(number, _):
        raise KeyboardInterrupt(str(int(number)))

    waiting, active = list(runs), {}
    paths = os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}           # for python -m
    before = signal.signal(signal.SIGTERM, interrupt)
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
        signal.signal(signal.SIGTERM, before)


def _start(program, words, folder, environment):
    """The process of one run: new, or to be gone on with."""
    first, *more = program.split()
    path = [os.path.join(HERE, first)] if not more else [first, *more]
    if os.path.exists(os.path.join(folder, "checkpoint.npz")):
        words = ["--resume", folder]
    else:
        words = [*words, "--out", folder]
    with open(f"{folder}.log", "w") as log:
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
