"""Experiments and their results: what lab/experiments.ini says, and what results/ holds.

results/NAME.csv has a line for each finished run of the experiment NAME, and results/NAME.json the
configuration of each row. The program is lab/tables.py.

The columns of a line are those of the run's summary.json, and what it was made with:
    commit      the code: hash of HEAD when the run began, "+" behind it if a *.py file differed;
                "<=": recorded by that commit, so that the code is that commit's or an earlier one's
    versions    "python 3.11.7 numpy 2.4.6 ..."; "unknown" in lines that were written without
    data        checksum of the data set (`hiql.checksum`), "-" if there is none
A run that was resumed with other code or versions has both, joined by " then ".
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import configparser
import csv
import functools
import json
import os
import re
import shlex
import zlib
from dataclasses import dataclass

import numpy as np

from support.flags import seed_range
from support.runs import HERE, load_arrays, read_json, run_processes, write_json, write_rows

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


@functools.cache
def read_experiments():
    """{name: Experiment} of experiments.ini."""
    ini = configparser.ConfigParser(interpolation=None, delimiters="=")
    ini.optionxform = str
    ini.read(os.path.join(HERE, "lab", "experiments.ini"))
    return {name: _experiment(ini[name]) for name in ini.sections()}


def _experiment(section):
    of_all = ("title", "seeds", "columns", "each", "picture", "beside")
    of_row = {key: key.rsplit(" ", 1)[0] for key in section
              if key.endswith((" seeds", " published"))}
    rows = {key: x for key, x in section.items() if key not in of_all and key not in of_row}
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


def command_line(command):
    """A row's command -> (program, words): "-m lab.td3 --steps 9" -> ("-m lab.td3",
    ["--steps", "9"])."""
    program, *words = shlex.split(command)
    if program == "-m":
        program = f"-m {words.pop(0)}"
    return program, words


# --------------------------------------------------------------------------- results


def run_of(row):
    """What a row of results/ is the line of: (name of the row, seed)."""
    return row["row"], int(row["seed"])


def recorded(name, folder=None):
    """(rows, {row: configuration}) of results/<name> or <folder>/<name>; both empty if not run.

    rows: a dict of strings for each run; empty cells are "". ValueError: two lines for one run.
    """
    path = os.path.join(folder or os.path.join(HERE, "results"), name)
    if not os.path.exists(f"{path}.csv"):
        return [], {}
    with open(f"{path}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    if len({run_of(row) for row in rows}) < len(rows):
        raise ValueError(f"{path}.csv has two lines for one row and seed")
    return rows, read_json(f"{path}.json")


def numbers(run, column):
    """The numbers in a cell of a run: a list, empty if there are none."""
    return [float(x) for x in run.get(column, "").split()]


def record(name, rows, configs, folder=None):
    """Write rows and configurations where `recorded` reads them."""
    path = os.path.join(folder or os.path.join(HERE, "results"), name)
    write_rows(f"{path}.csv", rows)
    write_json(f"{path}.json", configs)


def run_experiment(name, jobs, seed=None, out=None):
    """Run what results/<name>.csv lacks, `jobs` processes at once -> labels of failed runs.

    As each run ends, its line is added to <name>.csv and its configuration without the seed to
    <name>.json. seed, out: only this seed of every row, into <out>/<name>_seed<seed>.csv.
    ValueError: a seed that is not the experiment's.
    """
    experiment, file = read_experiments()[name], f"{name}_seed{seed}" if out else name
    planned = sorted(set().union(*experiment.seeds.values()))
    if seed is not None and seed not in planned:
        raise ValueError(f"seed {seed} is not one of {name}'s: {' '.join(map(str, planned))}")
    rows, runs = recorded(file, out)[0], {}
    have = {run_of(row) for row in rows}
    for s in planned if seed is None else [seed]:
        for row, command in experiment.rows.items():
            if s in experiment.seeds[row] and (row, s) not in have:
                runs[f"{row} seed {s}"] = _run(name, row, command, s, out)
    if not runs:
        return []
    os.makedirs(os.path.join(out or "", "runs", name), exist_ok=True)

    failed = list(runs)
    for label, summary in run_processes(runs, jobs):
        row, folder = label.rsplit(" seed ", 1)[0], runs[label][2]
        rows, configs = recorded(file, out)             # another process may have added to them
        config, made_with = _made_with(folder)
        _add_configuration(configs, row, config, folder)
        line = {"row": row, **summary, **made_with, "data": summary.get("data", "-")}
        record(file, [*rows, line], configs, out)
        failed.remove(label)
        print(label, f"success {summary['success']:.3f}" if "success" in summary else "done",
              flush=True)
    return failed


def _run(name, row, command, seed, out):
    """(program, words, folder) of one run, for `run_processes`."""
    program, words = command_line(command)
    mark = f"{zlib.crc32(command.encode()):08x}"        # another command's run is not gone on with
    folder = re.sub(r"\W+", "_", f"{row} {mark} seed{seed}")
    return program, [*words, f"--seed={seed}"], os.path.join(out or "", "runs", name, folder)


def _made_with(folder):
    """What a run's folder says: its configuration, and its columns commit and versions."""
    path = os.path.join(folder, "checkpoint.npz")
    if os.path.exists(path):
        meta = json.loads(str(load_arrays(path, {"meta"})["meta"]))
        parts = meta["history"]
    else:                                               # lab.theory leaves no checkpoint
        meta = read_json(os.path.join(folder, "config.json"))
        parts = [meta]
    commits = [part["commit"] for part in parts]
    versions = [" ".join(f"{name} {x}" for name, x in part["versions"].items()) for part in parts]
    return meta["config"], {"commit": " then ".join(dict.fromkeys(commits)),
                            "versions": " then ".join(dict.fromkeys(versions))}


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
        raise ValueError(f"{folder} holds no NAME_seedN.csv of `run NAME --seed N --out {folder}`")
    for file in found:
        name = file.rsplit("_seed", 1)[0]
        seeds = known[name].seeds if name in known else {}
        (rows, configs), (theirs, their_configs) = recorded(name), recorded(file[:-4], folder)
        have = {run_of(row) for row in rows}
        new = [row for row in theirs if run_of(row) not in have]
        for row in new:
            if int(row["seed"]) not in seeds.get(row["row"], []):
                raise ValueError(f"{file}: row {row['row']!r} with seed {row['seed']} is not of "
                                 "experiments.ini")
            _add_configuration(configs, row["row"], their_configs[row["row"]],
                               os.path.join(folder, file))
        if new:
            record(name, rows + new, configs)
        added += len(new)
    return added


def cost(name):
    """(core-minutes of all planned runs of an experiment, runs in results/, runs planned). A
    missing seed costs the mean of its row, a missing row the mean of all rows, or 0 without any."""
    experiment, rows, minutes = read_experiments()[name], recorded(name)[0], 0.0
    all_seconds = [x for r in rows for x in numbers(r, "train_seconds")]
    for row, seeds in experiment.seeds.items():
        seconds = [x for r in rows if r["row"] == row for x in numbers(r, "train_seconds")]
        minutes += np.mean(seconds or all_seconds or [0]) * len(seeds) / 60
    return minutes, len(rows), sum(map(len, experiment.seeds.values()))
