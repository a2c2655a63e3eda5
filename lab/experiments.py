"""Experiments and their results: what lab/experiments.ini says, and what results/ holds.

results/NAME.csv has a line for each finished run of the experiment NAME, and results/NAME.json the
configuration of each row. `run_experiment` adds the runs that are missing, and `gather` adds those
made elsewhere. The program is lab/tables.py: its `run` and `report --gather` call these two.

The columns of a line are those of the run's summary.json, and what it was made with:
    commit      the code: hash of HEAD when the run began, "+" behind it if a *.py file differed;
                "<=": recorded by that commit, so that the code is that commit's or an earlier one's
    versions    "python 3.11.7 numpy 2.4.6 ..."; "unknown" in lines that were written without
    data        checksum of the data set (`support.offline.init_agent`), "-" if there is none
A run that was resumed with other code or versions has both, joined by " then ".
"""

import configparser
import os
import re
import shlex
from dataclasses import dataclass

import numpy as np

from support.files import read_json, read_rows, write_json, write_rows
from support.flags import seed_range
from support.run import HERE, code_and_versions, run_processes

# --------------------------------------------------------------------------- experiments.ini


@dataclass
class Experiment:
    """A section of experiments.ini."""

    title: str
    columns: list           # columns of results/NAME.csv that tables and comparisons show
    each: list              # columns shown for every seed too; default: the first of `columns`
    picture: list           # columns that `tables.draw_experiment` draws
    beside: list            # rows of other experiments to show first: NAME:ROW[:PART]
    rows: dict              # {row: command line, without "python"}
    seeds: dict             # {row: seeds}; a line "ROW seeds = A-B" is for one row alone
    published: dict         # {row: what others report}, from lines "ROW published = TEXT"


def read_experiments():
    """{name: Experiment} of experiments.ini. ValueError names the section with a wrong line."""
    ini = configparser.ConfigParser(interpolation=None, delimiters="=")
    ini.optionxform = str
    try:
        with open(os.path.join(HERE, "lab", "experiments.ini")) as file:
            ini.read_file(file)
    except (configparser.Error, OSError, UnicodeDecodeError) as e:
        raise ValueError(f"experiments.ini cannot be read: {' '.join(str(e).split())}") from None
    found = {}
    for name in ini.sections():
        try:
            found[name] = _experiment(ini[name])
        except ValueError as e:
            raise ValueError(f"experiments.ini, section {name}: {e}") from None
    for name, experiment in found.items():
        for reference in experiment.beside:
            if not is_row(reference, found):
                raise ValueError(f"experiments.ini, section {name}: {reference!r} is beside it, "
                                 "which is no NAME:ROW of this file")
    return found


def _experiment(section):
    for key in ("title", "seeds", "columns"):
        if not section.get(key, "").strip():
            raise ValueError(f"there is no line {key} = ...")
    of_all = ("title", "seeds", "columns", "each", "picture", "beside")
    of_row = {key: key.rsplit(" ", 1)[0] for key in section if key.endswith((" seeds",
                                                                            " published"))}
    rows = {key: x for key, x in section.items() if key not in of_all and key not in of_row}
    for key, row in of_row.items():
        if row not in rows:
            raise ValueError(f"there is a line {key!r}, but no row {row!r}")
    for row, command in rows.items():
        if not re.match(r"[\w/]+\.py( |$)|-m [\w.]+( |$)", command):
            raise ValueError(f"{row} = {command} is no command line, PROGRAM.py or -m MODULE and "
                             "flags")
        shlex.split(command)                            # ValueError: a quote without its end
    columns = section["columns"].split()
    return Experiment(
        title=section["title"], columns=columns,
        each=(section.get("each") or columns[0]).split(),
        picture=section.get("picture", "").split(),
        beside=shlex.split(section.get("beside", "")), rows=rows,
        seeds={row: seed_range(section.get(f"{row} seeds", section["seeds"])) for row in rows},
        published={row: section[key] for key, row in of_row.items() if key.endswith("published")})


def parts_of(reference):
    """"NAME:ROW:PART" -> (NAME, ROW, PART); a missing part is ""."""
    return (reference.split(":", 2) + ["", ""])[:3]


def is_row(reference, known):
    """Whether NAME:ROW or NAME:ROW:PART names a row of known, {name: Experiment}."""
    name, row, _ = parts_of(reference)
    return name in known and row in known[name].rows


def command_line(command):
    """A row's command -> (program, words): "hiql.py --steps 9" -> ([".../hiql.py"], ["--steps",
    "9"]), "-m lab.td3" -> (["-m", "lab.td3"], [])."""
    first, *words = shlex.split(command)
    if first == "-m":
        return [first, words[0]], words[1:]
    return [os.path.join(HERE, first)], words


# --------------------------------------------------------------------------- results


def recorded(name, folder=None):
    """(rows, {row: configuration}) of results/<name> or <folder>/<name>; both empty if not run.

    rows: a dict of strings for each run. ValueError: a file without lines, one with two lines for
    one row and seed, or one that `record` cannot have written.
    """
    path = os.path.join(folder or os.path.join(HERE, "results"), name)
    rows = read_rows(f"{path}.csv") if os.path.exists(f"{path}.csv") else []
    if os.path.exists(f"{path}.csv") and not rows:
        raise ValueError(f"{path}.csv has no lines of runs; remove it, or restore it")
    for i, row in enumerate(rows, 1):
        if not row.get("row") or not re.fullmatch(r"\d+", row.get("seed", "")):
            raise ValueError(f"{path}.csv: row {i} has no name or no seed")
    runs = [(row["row"], int(row["seed"])) for row in rows]
    if twice := [run for run in runs if runs.count(run) > 1]:
        raise ValueError(f"{path}.csv: two lines for {twice[0][0]!r}, seed {twice[0][1]}")
    configs = read_json(f"{path}.json") if os.path.exists(f"{path}.json") else {}
    if not isinstance(configs, dict) or not all(isinstance(x, dict) for x in configs.values()):
        raise ValueError(f"{path}.json does not hold a configuration for each row")
    return rows, configs


def numbers(run, column):
    """The numbers in a cell of a run: a list, empty without that column or with an empty cell.

    ValueError names the run if the cell holds anything else."""
    try:
        return [float(x) for x in run.get(column, "").split()]
    except ValueError:
        raise ValueError(f"{run.get('row', 'a row')}, seed {run['seed']}: {column} holds "
                         f"{run[column]!r:.60}, which is no number") from None


def commits_of(rows):
    """{commit: how many of the rows are by its code}, in order of first appearance."""
    found = [row.get("commit") or "unknown" for row in rows]
    return {commit: found.count(commit) for commit in dict.fromkeys(found)}


def say_if_mixed(name, rows):
    """Print a note if rows of an experiment are by the code of several commits."""
    found = commits_of(rows)
    if len(found) > 1:
        print(f"note: the rows of {name} are by the code of several commits: "
              + ", ".join(f"{commit} ({n})" for commit, n in found.items()), flush=True)


def record(name, rows, configs, folder=None):
    """Write rows and configurations where `recorded` reads them."""
    path = os.path.join(folder or os.path.join(HERE, "results"), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_rows(f"{path}.csv", rows)
    write_json(f"{path}.json", configs)


def run_experiment(name, jobs, seed=None, out=None):
    """Run what results/<name>.csv lacks, `jobs` processes at once -> labels of failed runs.

    As each run ends, its line is added to <name>.csv and its configuration without the seed to
    <name>.json. seed, out: only this seed of every row, into <out>/<name>_seed<seed>.csv. A note is
    printed if the lines are not all by the same commit's code. ValueError: a seed that is not the
    experiment's, or a run folder begun by another command or damaged.
    """
    experiment, file = read_experiments()[name], f"{name}_seed{seed}" if out else name
    planned = sorted(set().union(*experiment.seeds.values()))
    if seed is not None and seed not in planned:
        raise ValueError(f"seed {seed} is not one of {name}'s: {' '.join(map(str, planned))}")
    runs_folder = os.path.join(out or "", "runs", name)
    os.makedirs(runs_folder, exist_ok=True)
    rows, runs = recorded(file, out)[0], {}
    have = {(row["row"], int(row["seed"])) for row in rows}
    for s in planned if seed is None else [seed]:
        for row, command in experiment.rows.items():
            if s not in experiment.seeds[row] or (row, s) in have:
                continue
            program, words = command_line(f"{command} --seed={s}")
            folder = os.path.join(runs_folder, re.sub(r"\W+", "_", row) + f"_seed{s}")
            runs[f"{row} seed {s}"] = program, words, folder
            if _is_begun_by_another(program, words, folder):
                raise ValueError(f"{folder} holds a run of another command than {command!r}; "
                                 "remove it")

    def done(label, summary):
        row, folder = label.rsplit(" seed ", 1)[0], runs[label][2]
        rows, configs = recorded(file, out)             # another process may have added to them
        begun = _begun(folder)
        _add_configuration(configs, row, begun["config"], folder)
        record(file, [*rows, {"row": row, **summary, **_made_with(begun, summary)}], configs, out)
        print(label, f"success {summary['success']:.3f}" if "success" in summary else "done",
              flush=True)

    say_if_mixed(name, rows + [code_and_versions()] * len(runs))
    return run_processes(runs, jobs, done)


def _begun(folder):
    """What config.json of a run's folder holds; ValueError if it is not that of a run."""
    path = os.path.join(folder, "config.json")
    begun = read_json(path)
    if not isinstance(begun, dict) or not isinstance(begun.get("config"), dict):
        raise ValueError(f"{path} is not that of a run; remove {folder}")
    return begun


def _made_with(begun, summary):
    """The columns commit, versions and data of a run, from its config.json and summary.json."""
    parts = [begun, *begun.get("resumed", [])]
    texts = {"commit": [part.get("commit", "unknown") for part in parts],
             "versions": [" ".join(f"{name} {x}" for name, x in part.get("versions", {}).items())
                          or "unknown" for part in parts]}
    return {**{key: " then ".join(dict.fromkeys(x)) for key, x in texts.items()},
            "data": summary.get("data", "-")}


def _is_begun_by_another(program, words, folder):
    """Whether a folder holds a run of another program, or of this one with other flags."""
    if not os.path.exists(os.path.join(folder, "config.json")):
        return False
    begun = _begun(folder)
    name = " ".join(program) if program[0] == "-m" else os.path.relpath(program[0], HERE)
    return (begun.get("program", name) != name                  # older runs lack it
            or begun.get("argv", [])[:len(words)] != words)


def _add_configuration(configs, row, config, where):
    """Add a row's configuration to configs; ValueError if it differs from its other seeds'."""
    config = {name: x for name, x in config.items() if name != "seed"}
    known = configs.setdefault(row, config)
    other = [f"{name} {config[name]} instead of {known[name]}" for name in known
             if name in config and config[name] != known[name]]
    if other:
        raise ValueError(f"{where}: a run of {row!r} with {', '.join(other)}; remove it, or the "
                         "rows made before")


def gather(folder):
    """Add to results/ the runs it lacks of `run NAME --seed N --out folder` -> their number.

    ValueError: files or rows that are not of lab/experiments.ini, or another configuration.
    """
    added, known = 0, read_experiments()
    found = sorted(f for f in os.listdir(folder) if re.fullmatch(r".+_seed\d+\.csv", f))
    if not found:
        raise ValueError(f"{folder} holds no NAME_seedN.csv, which `run NAME --seed N --out "
                         f"{folder}` writes")
    for file in found:
        name = file.rsplit("_seed", 1)[0]
        if name not in known:
            raise ValueError(f"{file}: there is no experiment {name}; known: {', '.join(known)}")
        (rows, configs), (theirs, their_configs) = recorded(name), recorded(file[:-4], folder)
        have = {(row["row"], int(row["seed"])) for row in rows}
        new = [row for row in theirs if (row["row"], int(row["seed"])) not in have]
        for row in new:
            if int(row["seed"]) not in known[name].seeds.get(row["row"], []):
                raise ValueError(f"{file}: row {row['row']!r} with seed {row['seed']} is not of "
                                 f"experiment {name}")
            if row["row"] not in their_configs:
                raise ValueError(f"{file[:-4]}.json lacks the configuration of {row['row']!r}")
            _add_configuration(configs, row["row"], their_configs[row["row"]],
                               os.path.join(folder, file))
        if new:
            record(name, rows + new, configs)
            say_if_mixed(name, rows + new)
        added += len(new)
    return added


def cost(name):
    """(core-minutes of all planned runs of an experiment, runs in results/, runs planned).

    A missing seed is taken to cost the mean of its row, a missing row the mean of all rows; without
    any run the cost is 0.
    """
    experiment, rows, minutes = read_experiments()[name], recorded(name)[0], 0.0
    all_seconds = [x for r in rows for x in numbers(r, "train_seconds")]
    for row, seeds in experiment.seeds.items():
        seconds = [x for r in rows if r["row"] == row for x in numbers(r, "train_seconds")]
        minutes += np.mean(seconds or all_seconds or [0]) * len(seeds) / 60
    return minutes, len(rows), sum(map(len, experiment.seeds.values()))
