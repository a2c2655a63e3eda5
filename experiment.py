"""Everything around an algorithm and nothing of it: flags, seeds, logs, checkpoints, tables.

An algorithm hands `main` a config dataclass and a few functions; its program then has
    [flags]                  one run: a folder with config.json, train.csv, eval.csv,
                             checkpoint.npz, summary.json and pictures
    --seeds A-B [--jobs N]   one process for each seed, N at once; seeds.csv beside them
    --resume DIR             go on as if the run had never stopped
    --eval DIR               evaluate the checkpoint of a run

An experiment is a section of experiments.ini: named command lines and their seeds.
    python experiment.py --list                  every experiment, its cost and what it shows
    python experiment.py run NAME [--jobs 2]     the runs that results/NAME.csv lacks
    python experiment.py run NAME --seed N --out DIR     one seed, for a cluster; and then
    python experiment.py report [--gather DIR]   what README.md takes from results/
    python experiment.py compare NAME:ROW NAME:ROW       their difference, with its interval
"""

import argparse
import configparser
import csv
import dataclasses
import difflib
import io
import json
import os
import platform
import re
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
from scipy.stats import bootstrap, trim_mean

import nets
from envs import plt, save_figure

HERE = os.path.dirname(os.path.abspath(__file__))

# ----------------------------------------------------------------------------- flags


def option(default, help, choices=None):
    """A field of a config dataclass and its flag: meaning and source for --help."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def sizes(text):
    return tuple(int(x) for x in text.split(","))


def seed_range(text):
    """"3" -> [3]; "0-4" -> [0, 1, 2, 3, 4]; "1,5" -> [1, 5]."""
    seeds = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            seeds += range(int(first), int(last or first) + 1)
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are A-B or A,B,C, not {text!r}")
    return seeds


class _Parser(argparse.ArgumentParser):
    def error(self, message):                   # one line, and the flag that was perhaps meant
        for word in message.replace("unrecognized arguments:", "").split():
            known = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(word.split("=")[0], known, 1)
            if "unrecognized" in message and word.startswith("-") and near:
                message += f" (did you mean {near[0]}?)"
                break
        refuse(message, self.prog)


def demand(config, test, what, *names):
    """ValueError unless test(value) of each named field of config; what: "positive", ..."""
    for name in names:
        if not test(getattr(config, name)):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} must be {what}, not {getattr(config, name)}")


def refuse(message, prog=None):
    """One line on what was wrong, exit code 2."""
    prog = prog or os.path.basename(sys.argv[0])
    print(f"{prog}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def parser(config_class, description):
    """Flags from the fields of a config dataclass; one that is not given is not in the result."""
    p = _Parser(prog=os.path.basename(sys.argv[0]), usage="%(prog)s [flags]",
                description=description, allow_abbrev=False,
                argument_default=argparse.SUPPRESS,
                formatter_class=argparse.RawDescriptionHelpFormatter)
    group = p.add_argument_group("this run")
    group.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/...)")
    group.add_argument("--quick", action="store_true", help="the whole path in seconds, pictures "
                       "included; success is not promised")
    group.add_argument("--seeds", metavar="A-B", help="several seeds, each a process of its own")
    group.add_argument("--jobs", type=int, metavar="N", help="processes at once (default 1)")
    group.add_argument("--resume", metavar="DIR", help="go on with an interrupted run")
    group.add_argument("--eval", metavar="DIR", help="evaluate the checkpoint of a run")
    group = p.add_argument_group("the algorithm and its task (environments and agents change some "
                                 "defaults; config.json has what a run used)")
    for field in dataclasses.fields(config_class):
        kind, flag = type(field.default), "--" + field.name.replace("_", "-")
        text = f"{field.metadata['help']} (default {_text(field.default)})".replace("%", "%%")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(flag, help=text, choices=field.metadata["choices"],
                               metavar=None if field.metadata["choices"] else kind.__name__.upper()
                               if kind is not tuple else "N,N,...",
                               type=sizes if kind is tuple else kind)
    return p


def _text(value):
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value) or "none"


def main(config_class, description, resolve, prepare, train, evaluate, counter="update",
         theory=None):
    """The program of an algorithm.

    resolve(given) -> config      flags given (a dict, "quick" among them) -> a whole config
    prepare(config[, tree]) -> problem    environment, data, ...; ValueError or OSError refuses the
                                  input, or a checkpoint's tree that does not fit
    train(problem, run) -> None   train and write to run, a `Run`
    evaluate(problem, tree) -> dict    summary of a checkpoint's tree
    counter                       what a run counts: "update" or "step"
    theory                        for --theory: (numbers(seed) -> dict, draw(path)); needs no run
    """
    p = parser(config_class, description)
    if theory:
        p.add_argument("--theory", action="store_true", help="the paper's propositions in "
                       "numbers, and a picture of them (theory.png); takes --seed and --out alone")
    given = vars(p.parse_args())
    if given.pop("theory", False):
        try:
            return _theory(*theory, **given)
        except (ValueError, OSError) as e:
            refuse(e)
    folder, seeds = given.pop("out", None), given.pop("seeds", None)
    jobs, resume, old = given.pop("jobs", 1), given.pop("resume", None), given.pop("eval", None)
    try:
        if (resume or old) and (given or folder or seeds or (resume and old)):
            raise ValueError("--resume and --eval take the flags of the run itself; give no other")
        if jobs < 1:
            raise ValueError(f"--jobs must be at least 1, not {jobs}")
        if seeds is not None:
            return _run_seeds(given, seeds, folder, jobs, resolve, prepare)
        if resume or old:
            given = read_json(os.path.join(resume or old, "config.json"))["config"]
            given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        config = resolve(given)
        if old or resume:
            tree = nets.load_tree(os.path.join(resume or old, "checkpoint.npz"))
            problem = prepare(config, tree)
        else:
            problem = prepare(config)
        if old:
            return show(evaluate(problem, tree))
        if resume and os.path.exists(os.path.join(resume, "summary.json")):
            return print(f"{resume} is finished; its summary.json stays as it is")
        run = Run(resume or folder or free_folder(config), config, tree if resume else None,
                  counter)
    except (ValueError, OSError) as e:
        refuse(e)
    except (KeyError, TypeError, AttributeError) as e:
        if not (resume or old):
            raise
        refuse(f"{resume or old} does not hold a run of this program ({e!r})")
    try:
        train(problem, run)
    except FloatingPointError as e:
        print(f"\n{p.prog}: stopped: {e}; the last checkpoint is in {run.folder}", file=sys.stderr)
        sys.exit(1)
    except Interrupted:
        print(f"\ninterrupted; go on with: python {p.prog} --resume {run.folder}")
        sys.exit(130)


def _theory(numbers, draw, seed=0, out=None, **others):
    """`--theory`: print the numbers and draw them, or with --out keep them as a run does."""
    if others:
        raise ValueError(f"--theory takes --seed and --out alone, not --{next(iter(others))}")
    if seed < 0:
        raise ValueError(f"--seed must be at least 0, not {seed}")
    if not out:
        numbers(seed)
        draw("theory.png")
        return print("drawn: theory.png")
    _demand_free(out)
    os.makedirs(out, exist_ok=True)
    start = time.perf_counter()
    summary = {"seed": seed, **numbers(seed)}
    write_json(os.path.join(out, "config.json"), {
        "config": {"theory": True, "seed": seed}, "argv": sys.argv[1:]})
    write_json(os.path.join(out, "summary.json"), {
        **summary, "train_seconds": round(time.perf_counter() - start, 1)})


def _demand_free(folder):
    """ValueError if the folder holds a run."""
    if any(os.path.exists(os.path.join(folder, f)) for f in ("checkpoint.npz", "summary.json")):
        raise ValueError(f"{folder} already holds a run; choose another --out, or --resume "
                         f"{folder}")


def free_folder(config):
    """runs/<env>_<agent>_seed<seed>, with a number behind it if that exists."""
    base = os.path.join("runs", f"{config.env}_{config.agent}_seed{config.seed}")
    numbers = (f"{base}_{i}" for i in range(2, 10**6))
    return base if not os.path.exists(base) else next(f for f in numbers if not os.path.exists(f))


def _run_seeds(given, seeds, folder, jobs, resolve, prepare):
    if "seed" in given:
        raise ValueError("give --seed or --seeds, not both")
    seeds = seed_range(seeds)
    config = resolve(given)
    prepare(config)                                     # refuse bad input once, not for each seed
    folder = folder or free_folder(config).replace(f"seed{config.seed}", f"seeds{seeds[0]}-"
                                                   f"{seeds[-1]}")
    if os.path.exists(folder):
        raise ValueError(f"{folder} exists; choose another --out")
    os.makedirs(folder)
    words = []
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [f"--no-{flag[2:]}"] if value is False \
            else [f"{flag}={_text(value) if isinstance(value, tuple) else value}"]
    runs = {str(s): ([sys.argv[0], *words, f"--seed={s}"], os.path.join(folder, f"seed{s}"))
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
    """Run {name: (arguments, folder)}, `jobs` at once; done(name, summary) as each one ends.

    Output goes to <folder>.log. Ctrl-C reaches the processes too, which save and stop; so they do
    when this one is terminated or fails. Returns the names of the runs that failed.
    """
    waiting, active, failed = list(runs), {}, []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                name = waiting.pop(0)
                arguments, folder = runs[name]
                if os.path.exists(os.path.join(folder, "summary.json")):    # ended, not recorded
                    done(name, read_json(os.path.join(folder, "summary.json")))
                    continue
                begun = os.path.exists(os.path.join(folder, "checkpoint.npz"))
                arguments = [arguments[0], "--resume", folder] if begun else \
                    [*arguments, "--out", folder]
                with open(f"{folder}.log", "w") as log:
                    active[name] = subprocess.Popen([sys.executable, *arguments], stdout=log,
                                                    stderr=subprocess.STDOUT)
            time.sleep(0.2)
            for name in [name for name, process in active.items() if process.poll() is not None]:
                if active.pop(name).returncode:
                    failed.append(name)
                    print(f"{name} failed; see {runs[name][1]}.log", file=sys.stderr)
                else:
                    done(name, read_json(os.path.join(runs[name][1], "summary.json")))
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

    def __init__(self, folder, config, restored=None, counter="update"):
        """restored: the tree of a checkpoint to go on from, else None for a new folder.

        folder None: nothing is written. counter: what the run counts, updates or steps.
        """
        self.folder, self.restored, self.config = folder, restored, config
        self.counter = counter
        self.before = float(restored["seconds"]) if restored else 0.0
        if folder and not restored:
            _demand_free(folder)
            os.makedirs(folder, exist_ok=True)
            write_json(self.path("config.json"), {
                "config": dataclasses.asdict(config), "argv": sys.argv[1:], "versions": {
                    "python": platform.python_version(), "numpy": np.__version__,
                    "scipy": scipy.__version__, "machine": platform.machine()}})
        self.logs = {name: [] for name in ("train", "eval")}
        for name, rows in self.logs.items():
            if restored and os.path.exists(self.path(f"{name}.csv")):
                rows += [row for row in read_rows(self.path(f"{name}.csv"))
                         if int(row[counter]) <= int(restored[counter])]
        self.stop, self.start, self.shown = False, time.perf_counter(), 0.0
        self.first = int(restored[counter]) if restored else 0
        if folder:                                      # without one, Ctrl-C has nothing to save
            signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_):
        if self.stop:
            raise KeyboardInterrupt                     # a second Ctrl-C does not wait
        self.stop = True

    def path(self, name):
        return os.path.join(self.folder, name)

    def seconds(self):
        """Seconds since the run began, stops left out."""
        return self.before + time.perf_counter() - self.start

    def log(self, name, row):
        """Add a row to train.csv or eval.csv; the counter comes first."""
        self.logs[name].append(row)

    def progress(self, done, total, text, every=0.5):
        """One refreshing line on a terminal; elsewhere a plain line every ten seconds."""
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

    def save(self, done, tree, rngs):
        """Write logs and checkpoint: a tree of arrays and the states of generators {name: rng}."""
        if not self.folder:
            return
        for name, rows in self.logs.items():
            if rows:
                write_rows(self.path(f"{name}.csv"), rows)
        states = {name: np.array(json.dumps(rng.bit_generator.state)) for name, rng in rngs.items()}
        nets.save_tree(self.path("checkpoint.npz"),
                       {**tree, self.counter: np.array(done), "seconds": np.array(self.seconds()),
                        "rng": states})
        if self.stop:
            raise Interrupted

    def restore(self, rngs):
        """Set generators {name: rng} to the states of the checkpoint."""
        for name, rng in rngs.items():
            rng.bit_generator.state = json.loads(str(self.restored["rng"][name]))

    def finish(self, summary):
        """Write summary.json and print it with the files of the run."""
        if resource:
            unit = 2**20 if sys.platform == "darwin" else 2**10
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            summary = {**summary, "peak_mb": round(peak / unit)}        # memory
        if not self.folder:
            return show(summary)
        write_json(self.path("summary.json"), summary)
        show(summary)
        print(f"files in {self.folder}: {' '.join(sorted(os.listdir(self.folder)))}")


def show(summary):
    for key, value in summary.items():
        if isinstance(value, float):
            value = round(value, 4)
        print(f"{key}: {value}")


def draw_curve(run):
    """Success over training (curve.png), and the losses below."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6, 5), sharex=True)
    for ax, log in ((top, run.logs["eval"]), (bottom, run.logs["train"])):
        for key in dict.fromkeys(key for row in log for key in row):
            if ("success" in key and "task" not in key) if ax is top else key.endswith("_loss"):
                points = [(int(row[run.counter]), float(row[key])) for row in log
                          if row.get(key, "") != ""]
                ax.plot(*zip(*points), label=key, ls=":" if "random" in key else "-")
        if ax.lines:
            ax.legend(fontsize=8)
    top.set_ylim(-0.03, 1.03)
    bottom.set(yscale="symlog", xlabel=f"{run.counter}s")
    save_figure(figure, run.path("curve.png"))


def generators(seed, *names):
    """One independent generator for each purpose, all spawned from one seed."""
    return dict(zip(names, map(np.random.default_rng, np.random.SeedSequence(seed).spawn(
        len(names)))))


def write_json(path, value):
    _write(path, json.dumps(value, indent=1) + "\n")


def read_json(path):
    with open(path) as file:
        try:
            return json.load(file)
        except ValueError as e:
            raise ValueError(f"{path} is not JSON ({e})") from None


def write_rows(path, rows):
    """Dicts as csv; the columns are the keys in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(
        [columns] + [[_cell(row.get(key, "")) for key in columns] for row in rows])
    _write(path, buffer.getvalue())


def _cell(value):
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return " ".join(_cell(x) or "nan" for x in value)
    return f"{value:.6g}" if isinstance(value, (float, np.floating)) else str(value)


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _write(path, text):
    with open(f"{path}.tmp", "w", newline="") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)


# ------------------------------------------------------------------ experiments and tables


def experiments():
    """Sections of experiments.ini: title, seeds, columns, and one command line for each row.

    seeds of a single row: NAME seeds = A-B. each: the columns shown for every seed (default: the
    first). NAME published = TEXT: what others report for that row. beside = NAME:ROW ...: other
    rows to show (`_runs`). picture = COLUMNS: what `report` draws (`draw_experiment`).
    """
    ini = configparser.ConfigParser(interpolation=None, delimiters="=")
    ini.optionxform = str
    try:
        with open(os.path.join(HERE, "experiments.ini")) as file:
            ini.read_file(file)
    except (configparser.Error, OSError) as e:
        raise ValueError(f"experiments.ini cannot be read: {' '.join(str(e).split())}") from None
    known = ("title", "seeds", "columns", "each", "picture", "beside")
    for name, section in ini.items():
        if missing := [x for x in known[:3] if name != "DEFAULT" and x not in section]:
            raise ValueError(f"experiments.ini: section {name} has no line {missing[0]} = ...")
        for which in shlex.split(section.get("beside", "")):
            where, row = (which.split(":") + [""])[:2]
            if where not in ini or row not in ini[where]:
                raise ValueError(f"experiments.ini: {name} has {which!r} beside it, which is no "
                                 "NAME:ROW of this file")
    return {name: {"title": section["title"], "columns": section["columns"].split(),
                   "each": section.get("each", section["columns"].split()[0]).split(),
                   "picture": section.get("picture", "").split(),
                   "beside": shlex.split(section.get("beside", "")),
                   "rows": {k: v for k, v in section.items()
                            if k not in known and not k.endswith((" seeds", " published"))},
                   "published": {k.removesuffix(" published"): v for k, v in section.items()
                                 if k.endswith(" published")},
                   "seeds": {k: seed_range(section.get(f"{k} seeds", section["seeds"]))
                             for k in section}}
            for name, section in ini.items() if name != "DEFAULT"}


def recorded(name, folder=None):
    """(rows, {row: configuration}) of results/<name>, or of another folder; empty if not run.
    ValueError if they are damaged: lines cut short, or two for the same seed."""
    path = os.path.join(folder or os.path.join(HERE, "results"), name)
    rows = read_rows(f"{path}.csv") if os.path.exists(f"{path}.csv") else []
    for i, row in enumerate(rows):
        if None in row.values() or None in row or not {"row", "seed"} <= set(row):
            raise ValueError(f"{path}.csv: line {i + 2} has not as many cells as the first line")
    runs = [(row["row"], row["seed"]) for row in rows]
    if twice := [run for run in runs if runs.count(run) > 1]:
        raise ValueError(f"{path}.csv: two lines for {twice[0][0]!r}, seed {twice[0][1]}")
    return rows, read_json(f"{path}.json") if os.path.exists(f"{path}.json") else {}


def record(name, rows, configs, folder=None):
    """Write what `recorded` reads."""
    path = os.path.join(folder or os.path.join(HERE, "results"), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_rows(f"{path}.csv", rows)
    write_json(f"{path}.json", configs)


def run_experiment(name, jobs, seed=None, out=None):
    """Run what results/<name>.csv lacks; a row is written as each run ends, and beside it, in
    <name>.json, the whole configuration of each row (but for the seed).

    seed, out: this seed of every row alone, one after the other, into <out>/<name>_seed<seed>.csv.
    """
    experiment, file = experiments()[name], f"{name}_seed{seed}" if out else name
    planned = sorted(set().union(*experiment["seeds"].values()))
    if seed is not None and seed not in planned:
        raise ValueError(f"seed {seed} is not one of {name}'s: {' '.join(map(str, planned))}")
    runs_folder = os.path.join(out or "", "runs", name)
    os.makedirs(runs_folder, exist_ok=True)
    have, runs = {(row["row"], int(row["seed"])) for row in recorded(file, out)[0]}, {}
    for s in planned if seed is None else [seed]:
        for row, command in experiment["rows"].items():
            run = os.path.join(runs_folder, re.sub(r"\W+", "_", row) + f"_seed{s}")
            if s in experiment["seeds"][row] and (row, s) not in have:
                program, *words = shlex.split(f"{command} --seed={s}")
                runs[f"{row} seed {s}"] = [os.path.join(HERE, program), *words], run
                config = os.path.join(run, "config.json")
                if os.path.exists(config) and read_json(config).get(
                        "argv", [])[:len(words)] != words:
                    raise ValueError(f"{run} holds a run of another command than {command!r}; "
                                     "remove it")

    def done(label, summary):
        row, run = label.rsplit(" seed ", 1)[0], runs[label][1]
        rows, configs = recorded(file, out)             # another process may have added to them
        _same_config(configs, row, read_json(os.path.join(run, "config.json"))["config"], run)
        record(file, [*rows, {"row": row, **summary}], configs, out)
        print(label, f"success {summary['success']:.3f}" if "success" in summary else "done",
              flush=True)

    return run_processes(runs, jobs, done)


def _same_config(configs, row, config, where):
    """Note a row's configuration, or refuse one that differs from that of its other seeds."""
    config = {name: x for name, x in config.items() if name != "seed"}
    known = configs.setdefault(row, config)
    other = [f"{name} {config[name]} instead of {known[name]}" for name in known
             if name in config and config[name] != known[name]]
    if other:
        raise ValueError(f"{where}: a run of {row!r} with {', '.join(other)}; remove it, or the "
                         "rows made before")


def gather(folder):
    """Add to results/ the rows that `run NAME --seed N --out folder` wrote; -> their number."""
    added, names = 0, experiments()
    found = sorted(f for f in os.listdir(folder) if re.fullmatch(r".+_seed\d+\.csv", f))
    if not found:
        raise ValueError(f"{folder} holds no NAME_seedN.csv, which `run NAME --seed N --out "
                         f"{folder}` writes")
    for file in found:
        name = file.rsplit("_seed", 1)[0]
        if name not in names:
            raise ValueError(f"{file}: there is no experiment {name}; known: {', '.join(names)}")
        (rows, configs), (theirs, their_configs) = recorded(name), recorded(file[:-4], folder)
        have = {(row["row"], row["seed"]) for row in rows}
        new = [row for row in theirs if (row["row"], row["seed"]) not in have]
        for row in new:
            if int(row["seed"]) not in names[name]["seeds"].get(row["row"], []):
                raise ValueError(f"{file}: row {row['row']!r} with seed {row['seed']} is not of "
                                 f"experiment {name}")
            if row["row"] not in their_configs:
                raise ValueError(f"{file[:-4]}.json lacks the configuration of {row['row']!r}")
            _same_config(configs, row["row"], their_configs[row["row"]],
                         os.path.join(folder, file))
        if new:
            record(name, rows + new, configs)
        added += len(new)
    return added


def cost(name):
    """(core-minutes of an experiment by the runs in results/, their number, the number of all).

    Missing seeds are taken to cost what their row's others did, missing rows what all rows did;
    0 without any run.
    """
    experiment, (rows, _), minutes = experiments()[name], recorded(name), 0.0
    all_rows = [float(r["train_seconds"]) for r in rows]
    for row in experiment["rows"]:
        seconds = [x for x, r in zip(all_rows, rows) if r["row"] == row]
        minutes += np.mean(seconds or all_rows or [0]) * len(experiment["seeds"][row]) / 60
    return minutes, len(rows), sum(len(experiment["seeds"][row]) for row in experiment["rows"])


def interval(*samples):
    """Interquartile mean over seeds of one sample, or the difference of those of two, and its 95 %
    percentile-bootstrap interval: (mean, low, high).

    Whole seeds are drawn anew: every draw has all tasks, and those that fail together stay so.
    """
    def statistic(*drawn, axis=-1):
        means = [trim_mean(x, 0.25, axis=axis) for x in drawn]
        return means[0] - means[1] if len(means) == 2 else means[0]

    samples = [np.repeat(np.asarray(x, float), 1 + (len(x) == 1)) for x in samples]    # scipy: >= 2
    drawn = bootstrap(samples, statistic, n_resamples=2000, vectorized=True, method="percentile",
                      random_state=np.random.default_rng(0)).confidence_interval
    return statistic(*samples), drawn.low, drawn.high


def _runs(which):
    """The runs of a row NAME:ROW by seed; of NAME:ROW:PART the columns PART_... without that
    prefix, such as default:hiql:flat, the flat policy trained in hiql's runs."""
    name, row, part = (which.split(":", 2) + ["", ""])[:3]
    runs = sorted((r for r in recorded(name)[0] if r["row"] == row), key=lambda r: int(r["seed"]))
    if not part:
        return runs
    return [{"seed": r["seed"], "train_seconds": r["train_seconds"],
             **{column.removeprefix(f"{part}_"): x for column, x in r.items()
                if column.startswith(f"{part}_")}} for r in runs]


def compare(one, other):
    """Two rows, each NAME:ROW or NAME:ROW:PART -> a line for each column of the first experiment
    that both have, but for the memory: the difference of the interquartile means, and its 95 %
    interval."""
    sides, lines = [_runs(one), _runs(other)], []
    for which, side in zip((one, other), sides):
        if not side or not set(side[0]) - {"seed", "train_seconds"}:
            raise ValueError(f"{which}: no such row in results/; rows are named NAME:ROW, such as "
                             "hiro:hiro, or NAME:ROW:PART, such as default:hiql:flat")
    for column in experiments()[one.partition(":")[0]]["columns"]:
        x, y = (np.array([float(r[column]) for r in side if r.get(column)
                          and " " not in r[column]]) for side in sides)
        if len(x) and len(y) and column != "peak_mb":
            less, low, high = interval(x, y)
            lines.append(f"{column.replace('_', ' ')}: {trim_mean(x, 0.25):.3f} ({len(x)} seeds) - "
                         f"{trim_mean(y, 0.25):.3f} ({len(y)} seeds) = {less:+.3f} "
                         f"[{low:+.3f}, {high:+.3f}]")
    return lines


def _shown(name):
    """{row: (its runs, number of seeds planned)} of what is in results/: rows named `beside`, then
    the own ones."""
    known, found = experiments(), {}
    for which in known[name]["beside"] + [f"{name}:{row}" for row in known[name]["rows"]]:
        if runs := _runs(which):
            where, *row = which.split(":")
            found[row[-1] if where == name else f"{row[-1]} (`{where}`)"] = (
                runs, len(known[where]["seeds"][row[0]]))
    return found


def table(name):
    """The markdown table of an experiment, from results/<name>.csv: a line for each row, or if
    there is one row alone and much of it, for each column."""
    experiment, rows = experiments()[name], recorded(name)[0]
    if not rows:
        return f"{experiment['title']}: not run yet."
    columns, published = experiment["columns"], experiment["published"]
    lists = {c for r in rows for c in columns if " " in r.get(c, "")}      # a number for each task
    heads = ["row", *(f"{c.replace('_', ' ')}{': mean' * (c in lists)}" for c in columns),
             *(f"{c.replace('_', ' ')}, each seed" for c in experiment["each"])]
    heads += ["seeds", "minutes"] + ["mean", "published"] * bool(published)
    lines = [heads]
    for row, (mine, planned) in _shown(name).items():
        cells = [row]
        for c in columns:
            values = [r[c] for r in mine if r.get(c)]
            if c in lists:
                tasks = np.array([x.split() for x in values], float).mean(0)
                cells.append(" ".join(f"{x:.2f}" for x in tasks))
                continue
            cells.append(_estimate([float(x) for x in values]))
            if 0 < len(values) < len(mine):
                cells[-1] += f" ({len(values)} of {len(mine)} seeds)"
        cells += [" ".join(_short(r.get(c)) for r in mine) for c in experiment["each"]]
        cells += [f"{len(mine)}" + f" of {planned}" * (len(mine) < planned),
                  f"{np.mean([float(r['train_seconds']) for r in mine]) / 60:.1f}"]
        if published:
            values = [float(r[experiment["each"][0]]) for r in mine]
            cells += [f"{np.mean(values):.3f}", published.get(row, "")]
        lines.append(cells)
    if len(lines) == 2 and len(heads) > 8:
        lines = list(zip(*lines))
    lines.insert(1, ["---"] * len(lines[0]))
    seeds = sorted({int(r["seed"]) for r in rows})
    return "\n".join([experiment["title"], "", *(f"| {' | '.join(cells)} |" for cells in lines), "",
                      f"Seeds {' '.join(map(str, seeds))}; `results/{name}.csv`, by "
                      f"`python experiment.py run {name}`."])


def _estimate(x):
    """Interquartile mean [95 % interval]; of three seeds or two the mean (lowest to highest)."""
    if not x:
        return ""
    numbers = (np.mean(x), min(x), max(x)) if len(x) < 4 else interval(x)
    middle, low, high = (f"{v:.3g}" if v < 1000 else f"{v:.0f}" for v in numbers)
    spread = f" ({low} to {high})" if len(x) < 4 else f" [{low}, {high}]"
    return middle + spread * (len(x) > 1)


def _short(text):
    """A number for a list of all seeds: 0.95, 27500, or - where there is none."""
    return "-" if not text else f"{float(text):.2f}" if float(text) < 10 else f"{float(text):.0f}"


def draw_experiment(name):
    """pictures/<name>.png: the columns `picture`, every seed.

    A column of lists (over training, or over the distance): a panel for each row, each seed a thin
    line under the mean. A column of numbers: one panel, for each row the seeds as dots above their
    interquartile mean and its interval.
    """
    rows, panels = _shown(name), []
    for column in experiments()[name]["picture"]:
        runs = {row: [r[column].split() for r in seeds if r.get(column)]
                for row, (seeds, _) in rows.items()}
        runs = {row: np.array(x, float) for row, x in runs.items() if x}
        single = all(x.shape[1] == 1 for x in runs.values())
        panels += [(column, runs)] * bool(runs) if single else [
            (column, {row: x}) for row, x in runs.items()]
    if not panels:
        return
    size = 3.2 * len(panels), max(2.8, 0.35 * max(len(runs) for _, runs in panels))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    tops = [max(np.nanmax(x) for x in runs.values()) for _, runs in panels]
    curves = [top for top, (_, runs) in zip(tops, panels) if list(runs.values())[0].shape[1] > 1]
    for ax, top, (column, runs) in zip(axes[0], tops, panels):
        (row, y), label = list(runs.items())[0], column.removesuffix("_curve").replace("_", " ")
        if y.shape[1] == 1:
            for i, x in enumerate(runs.values()):
                mean, low, high = interval(x[:, 0])
                ax.plot(x[:, 0], np.full(len(x), -i), "C0o", ms=4, alpha=0.4)
                ax.errorbar(mean, -i - 0.25, xerr=[[mean - low], [high - mean]], fmt="C1|",
                            capsize=3)
            names = [f"{row} ({len(x)})".replace("`", "") for row, x in runs.items()]
            ax.set_yticks(-np.arange(len(runs)), names, fontsize=7)
            top = max(top, 1)
            ax.set(xlabel=label, xlim=(-0.05 * top, 1.05 * top), ylim=(0.4 - len(runs), 0.4))
            continue
        x, over = np.arange(1, y.shape[1] + 1), "distance to the goal"
        if column.endswith("_curve"):
            x, over = x * int(rows[row][0][0]["env_steps"]) / len(x), "steps"
        ax.plot(x, y.T, "C0", lw=0.6, alpha=0.5)
        ax.plot(x, y.mean(0), "C1", lw=2)
        ax.set(xlabel=over, ylabel=label)
        ax.set_title(f"{row} ({len(y)} seeds)", fontsize=9)
        if max(curves) <= 1:                            # shares: all on one scale
            ax.set_ylim(-0.05 * max(curves), 1.05 * max(curves))
    save_figure(figure, os.path.join(HERE, "pictures", f"{name}.png"))


def report(text):
    """README's text with what stands between `<!-- table NAME -->`, or `<!-- compare NAME:ROW
    - NAME:ROW -->`, and `<!-- end -->` renewed."""
    def renewed(match):
        kind, what = match.groups()
        if kind == "table" and what not in experiments():
            raise ValueError(f"README.md wants a table of {what}, which is no experiment")
        new = table(what) if kind == "table" else "\n".join(
            f"    {line}" for line in _compared(*what.split(" - ")))
        return f"<!-- {kind} {what} -->\n{new}\n<!-- end -->"

    return re.sub(r"<!-- (table|compare) (.+?) -->\n.*?<!-- end -->", renewed, text, flags=re.S)


def _compared(one, other):
    """The lines of `compare`, or one that says what is still to be run."""
    try:
        return [f"python experiment.py compare {shlex.quote(one)} {shlex.quote(other)}",
                *compare(one, other)]
    except ValueError as e:
        return [str(e)]


def _program():
    p = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--list", action="store_true", help="every experiment, and what it costs")
    commands = p.add_subparsers(dest="command")
    run = commands.add_parser("run", help="run what is missing of an experiment")
    try:
        names = list(experiments())
    except ValueError as e:
        refuse(e)
    run.add_argument("name", choices=names)
    run.add_argument("--jobs", type=int, help="processes at once (default 2)")
    run.add_argument("--seed", type=int, help="this seed alone, in one process; wants --out")
    run.add_argument("--out", metavar="DIR", help="where --seed writes NAME_seedN.csv")
    renew = commands.add_parser("report", help="renew what README.md takes from results/")
    renew.add_argument("--gather", metavar="DIR", help="add what `run --seed --out DIR` wrote")
    two = commands.add_parser("compare", help="the difference of two rows, with its interval")
    for which in ("one", "other"):
        two.add_argument(which, metavar="NAME:ROW[:PART]")
    given = p.parse_args()
    try:
        if given.list:
            return _list()
        if given.command == "run":
            if bool(given.out) != (given.seed is not None) or (given.out and given.jobs):
                raise ValueError("--seed and --out DIR go together, without --jobs")
            if given.jobs is not None and given.jobs < 1:
                raise ValueError(f"--jobs must be at least 1, not {given.jobs}")
            jobs = 1 if given.out else given.jobs or 2
            sys.exit(1 if run_experiment(given.name, jobs, given.seed, given.out) else 0)
        if given.command is None:
            raise ValueError("say run NAME, report, compare NAME:ROW NAME:ROW, or --list")
        if given.command == "compare":
            return print("\n".join(compare(given.one, given.other)))
        if given.gather:
            print(f"{gather(given.gather)} new rows from {given.gather}")
        _renew()
    except (ValueError, OSError) as e:
        refuse(e)


def _list():
    hours = 0.0
    for name, one in experiments().items():
        minutes, done, total = cost(name)
        hours += 0 if name.startswith("ogbench") else minutes / 60
        print(f"{name}: {f'{minutes:.0f} core-minutes' if done else 'cost not known yet'}, "
              f"{done} of {total} runs in results/\n    {one['title']}")
    print(f"All but OGBench's, as far as known: {hours:.1f} core-hours")


def _renew():
    for name, one in experiments().items():
        if one["picture"] and recorded(name)[0]:
            draw_experiment(name)
    readme = os.path.join(HERE, "README.md")
    with open(readme) as file:
        old = file.read()
    _write(readme, report(old))
    print("README.md is up to date" if report(old) == old else "renewed the tables of README.md")


if __name__ == "__main__":
    _program()
