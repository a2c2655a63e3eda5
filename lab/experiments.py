"""Experiments and their results: what lab/experiments.ini says, and what results/ holds.

results/NAME.csv has a line for each finished run of the experiment NAME, and results/NAME.json the
configuration of each row. `run_experiment` adds the runs that are missing, and `gather` adds those
made elsewhere. The program is lab/tables.py: its `run` and `report --gather` call these two.
"""

import configparser
import os
import re
import shlex
from dataclasses import dataclass

import numpy as np

from support.files import read_json, read_rows, write_json, write_rows
from support.flags import seed_range
from support.run import HERE, run_processes

# --------------------------------------------------------------------------- experiments.ini


@dataclass
class Experiment:
    """A section of experiments.ini."""

    title: str
    columns: list           # columns of results/NAME.csv that tables and comparisons show
    each: list              # columns shown for every seed too; default: the first of `columns`
    picture: list           # columns that `tables.draw_experiment` draws
    beside: list            # rows of other experiments to show first: NAME:ROW[:PART]
    commit: str             # the last commit that recorded runs in results/NAME.csv, or ""
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
    except (configparser.Error, OSError) as e:
        raise ValueError(f"experiments.ini cannot be read: {' '.join(str(e).split())}") from None
    found = {name: _experiment(name, ini[name]) for name in ini.sections()}
    for name, experiment in found.items():
        for reference in experiment.beside:
            if not is_row(reference, found):
                raise ValueError(f"experiments.ini: {name} has {reference!r} beside it, which is "
                                 "no NAME:ROW of this file")
    return found


def _experiment(name, section):
    for key in ("title", "seeds", "columns"):
        if not section.get(key, "").strip():
            raise ValueError(f"experiments.ini: section {name} has no line {key} = ...")
    of_all = ("title", "seeds", "columns", "each", "picture", "beside", "commit")
    of_row = {key: key.rsplit(" ", 1)[0] for key in section if key.endswith((" seeds",
                                                                            " published"))}
    rows = {key: x for key, x in section.items() if key not in of_all and key not in of_row}
    for key, row in of_row.items():
        if row not in rows:
            raise ValueError(f"experiments.ini: section {name} has {key!r}, but no row {row!r}")
    columns = section["columns"].split()
    return Experiment(
        title=section["title"], columns=columns, commit=section.get("commit", ""),
        each=section.get("each", columns[0]).split(), picture=section.get("picture", "").split(),
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

    rows: a dict of strings for each run. ValueError: a file without lines, with a line cut short,
    or with two lines for one row and seed.
    """
    path = os.path.join(folder or os.path.join(HERE, "results"), name)
    rows = read_rows(f"{path}.csv") if os.path.exists(f"{path}.csv") else []
    if os.path.exists(f"{path}.csv") and not rows:
        raise ValueError(f"{path}.csv has no lines of runs; remove it, or restore it")
    for i, row in enumerate(rows):
        if None in row.values() or None in row or not {"row", "seed"} <= set(row):
            raise ValueError(f"{path}.csv: line {i + 2} has not as many cells as the first line")
    runs = [(row["row"], row["seed"]) for row in rows]
    if twice := [run for run in runs if runs.count(run) > 1]:
        raise ValueError(f"{path}.csv: two lines for {twice[0][0]!r}, seed {twice[0][1]}")
    return rows, read_json(f"{path}.json") if os.path.exists(f"{path}.json") else {}


def record(name, rows, configs, folder=None):
    """Write rows and configurations where `recorded` reads them."""
    path = os.path.join(folder or os.path.join(HERE, "results"), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_rows(f"{path}.csv", rows)
    write_json(f"{path}.json", configs)


def run_experiment(name, jobs, seed=None, out=None):
    """Run what results/<name>.csv lacks, `jobs` processes at once -> labels of failed runs.

    As each run ends, its line is added to <name>.csv and its configuration without the seed to
    <name>.json. seed, out: only this seed of every row, into <out>/<name>_seed<seed>.csv.
    ValueError: a seed that is not the experiment's, or a run folder begun by another command.
    """
    experiment, file = read_experiments()[name], f"{name}_seed{seed}" if out else name
    planned = sorted(set().union(*experiment.seeds.values()))
    if seed is not None and seed not in planned:
        raise ValueError(f"seed {seed} is not one of {name}'s: {' '.join(map(str, planned))}")
    runs_folder = os.path.join(out or "", "runs", name)
    os.makedirs(runs_folder, exist_ok=True)
    have, runs = {(row["row"], int(row["seed"])) for row in recorded(file, out)[0]}, {}
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
        config = read_json(os.path.join(folder, "config.json"))["config"]
        _add_configuration(configs, row, config, folder)
        record(file, [*rows, {"row": row, **summary}], configs, out)
        print(label, f"success {summary['success']:.3f}" if "success" in summary else "done",
              flush=True)

    return run_processes(runs, jobs, done)


def _is_begun_by_another(program, words, folder):
    """Whether a folder holds a run of another program, or of this one with other flags."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        return False
    begun = read_json(path)
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
        have = {(row["row"], row["seed"]) for row in rows}
        new = [row for row in theirs if (row["row"], row["seed"]) not in have]
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
        added += len(new)
    return added


def cost(name):
    """(core-minutes of all planned runs of an experiment, runs in results/, runs planned).

    A missing seed is taken to cost the mean of its row, a missing row the mean of all rows; without
    any run the cost is 0.
    """
    experiment, rows, minutes = read_experiments()[name], recorded(name)[0], 0.0
    all_seconds = [float(r["train_seconds"]) for r in rows]
    for row, seeds in experiment.seeds.items():
        seconds = [x for x, r in zip(all_seconds, rows) if r["row"] == row]
        minutes += np.mean(seconds or all_seconds or [0]) * len(seeds) / 60
    return minutes, len(rows), sum(map(len, experiment.seeds.values()))
