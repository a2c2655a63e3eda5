"""Tests of lab/experiments.py, and of what is committed in lab/experiments.ini and results/."""

import nets                             # first: it sets one BLAS thread before numpy loads

import dataclasses
import importlib
import json
import os
import re
import sys

import numpy as np
import pytest

import hiql
import hiro
from lab import experiments, td3
from support.flags import parse
from support.runs import Run, code_and_versions

SECTION = "[a]\ntitle = T\nseeds = 0-1\ncolumns = success\n"


def module_of(command):
    """The program of a command line: "-m lab.td3 --steps 9" -> lab.td3."""
    program, _ = experiments.command_line(command)
    return importlib.import_module(program.split()[-1].removesuffix(".py"))


def meant(command, monkeypatch):
    """The configuration that a command line means today, as a JSON file would have it."""
    module, (program, words) = module_of(command), experiments.command_line(command)
    monkeypatch.setattr(sys, "argv", [program, *words])
    resolve = getattr(module, "resolve", hiro.resolve)
    flags = hiql.WORDS if issubclass(module.PROGRAM.config_class, hiql.Config) else hiro.WORDS
    given, _ = parse(module.PROGRAM, "", flags)
    return json.loads(json.dumps(dataclasses.asdict(resolve(given))))


def test_results_are_those_of_the_command_lines(monkeypatch):
    """Each committed line is of a row of experiments.ini and one of its seeds, says what it was
    made with, and has the configuration that its command line means today."""
    known = experiments.read_experiments()
    for name, experiment in known.items():
        rows, configs = experiments.recorded(name)
        for other, beside, _ in map(experiments.parts_of, experiment.beside):
            assert beside in known[other].rows
        for row in rows:
            assert int(row["seed"]) in experiment.seeds[row["row"]]
            assert re.fullmatch(r"(<=)?[0-9a-f]{7}\+?( then [0-9a-f]{7}\+?)*", row["commit"])
            assert re.fullmatch("unknown|python .+ numpy .+ scipy .+ machine .+", row["versions"])
            assert re.fullmatch("-|unknown|[0-9a-f]{8}", row["data"])
        assert {row["row"] for row in rows} == set(configs)
        for row, config in configs.items():
            command = experiment.rows[row]
            if command == "-m lab.theory":
                continue
            today = meant(command, monkeypatch)
            shared = (config.keys() & today.keys()) - {"seed"}
            assert {x: config[x] for x in shared} == {x: today[x] for x in shared}, (name, row)


def test_runs_are_made_recorded_and_gathered(project, write_ini, program, monkeypatch):
    """Those that are missing, seed by seed; 1 if a run has failed; lines that another process has
    added meanwhile stay."""
    write_ini(f"{SECTION}x = -m lab.td3 --steps 9000\ny = hiro.py\ny seeds = 1-2\n")
    asked = {}

    def processes(runs, jobs):
        """The first run leaves a real folder, the others fail; with 3 jobs "y seed 2" is recorded
        by somebody else."""
        asked.clear()
        asked.update(runs, jobs=jobs)
        label = next(iter(runs))
        seed, folder = int(label[-1]), runs[label][2]
        config = td3.resolve({"seed": seed, "steps": 9000})
        Run(td3.PROGRAM, config, folder).begin({"step": np.array(0)}, {}, 9000)
        if jobs == 3:
            rows, configs = experiments.recorded("a")
            experiments.record("a", [*rows, {"row": "y", "seed": 2}], configs)
        yield label, {"seed": seed, "success": 0.5, "curve": [None, 0.5], "data": "12345678"}

    monkeypatch.setattr(experiments, "run_processes", processes)
    assert program("run", "a", "--seed", "0", "--out", "o") == 0
    first = asked["x seed 0"]
    assert first[:2] == ("-m lab.td3", ["--steps", "9000", "--seed=0"]) and asked["jobs"] == 1
    assert set(os.listdir("o")) == {"a_seed0.csv", "a_seed0.json", "runs"}
    assert experiments.gather("o") == 1 and experiments.gather("o") == 0

    assert program("run", "a", "--jobs", "3") == 1
    assert list(asked) == ["x seed 1", "y seed 1", "y seed 2", "jobs"]
    code = code_and_versions()
    versions = " ".join(f"{name} {x}" for name, x in code["versions"].items())
    line = {"row": "x", "success": "0.5", "curve": "nan 0.5", "data": "12345678",
            "commit": code["commit"], "versions": versions}
    rows, configs = experiments.recorded("a")
    assert rows == [{**line, "seed": "0"}, {**dict.fromkeys(line, ""), "row": "y", "seed": "2"},
                    {**line, "seed": "1"}]
    assert configs.keys() == {"x"} and configs["x"]["steps"] == 9000 and "seed" not in configs["x"]
    assert experiments.numbers(rows[0], "curve") == [pytest.approx(np.nan, nan_ok=True), 0.5]

    write_ini(f"{SECTION}x = -m lab.td3 --steps 9000 --tau 0.005\n")
    assert program("run", "a", "--seed", "0", "--out", "p") == 0
    assert os.path.basename(asked["x seed 0"][2]) != os.path.basename(first[2])     # a new folder


DONE = {"results/a.csv": "row,seed,success\nx,0,1\n", "results/a.json": '{"x": {"k": 5}}'}


def spread(row, name="a_seed1", k=5):
    """Files of `run --out` beside results that have seed 0."""
    return {**DONE, f"o/{name}.csv": f"row,seed\n{row}\n",
            f"o/{name}.json": '{"x": {"k": %s}}' % k}


@pytest.mark.parametrize("files, words, told", [
    ({}, "run a --seed 5 --out o", "seed 5 is not one of a's: 0 1"),
    (DONE, "compare a:x a:z", "a:z: no such row in results/"),
    (spread("x,7"), "report --gather o", "row 'x' with seed 7 is not of"),
    (spread("x,1", "b_seed1"), "report --gather o", "row 'x' with seed 1 is not of"),
    (spread("x,1", "a_1"), "report --gather o", "holds no NAME_seedN.csv"),
    (spread("x,1", k=2), "report --gather o", "a run of 'x' with k 2 instead of 5"),
    ({"docs/p.md": "<!-- table a -->\n<!-- headline -->\n<!-- end -->\n"}, "report", "has no <!--"),
    ({"docs/p.md": "<!-- table z -->\n<!-- end -->\n"}, "report", "there is no experiment z")])
def test_what_is_refused(files, words, told, project, write_ini, program, capsys):
    """In one line, and no file has changed."""
    write_ini(f"{SECTION}x = hiql.py\n")
    (project / "README.md").write_text("<!-- table a -->\nold\n<!-- end -->\n")
    (project / "o").mkdir()
    for path, text in files.items():
        (project / path).write_text(text)
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    assert program(*words.split()) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
    assert before == {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
