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
from lab import experiments
from support.flags import parse
from support.runs import code_and_versions, read_json, write_json

SECTION = "[a]\ntitle = T\nseeds = 0-1\ncolumns = success\n"


def test_a_section_is_read(write_ini):
    write_ini("[a]\ntitle = T = 1\nseeds = 0-2\ncolumns = success x\npicture = x y\n"
              "beside = 'a:p q' a:r:flat\np q = hiql.py --env 'a b'\nr = recorded: once\n"
              "r seeds = 5,7\nr published = 0.5 = high\n"
              "[b]\ntitle = U\nseeds = 4\ncolumns = z\neach = u v\n")
    assert experiments.read_experiments() == {
        "a": experiments.Experiment(
            title="T = 1", columns=["success", "x"], each=["success"], picture=["x", "y"],
            beside=["a:p q", "a:r:flat"], rows={"p q": "hiql.py --env 'a b'",
                                                "r": "recorded: once"},
            seeds={"p q": [0, 1, 2], "r": [5, 7]}, published={"r": "0.5 = high"}),
        "b": experiments.Experiment(title="U", columns=["z"], each=["u", "v"], picture=[],
                                    beside=[], rows={}, seeds={}, published={})}
    assert experiments.command_line("hiql.py --env 'a b'") == ("hiql.py", ["--env", "a b"])
    assert experiments.command_line("-m lab.td3 --steps 9") == ("-m lab.td3", ["--steps", "9"])


def meant(command, monkeypatch):
    """The configuration that a command line means today, as a JSON file would have it."""
    program, words = experiments.command_line(command)
    module = importlib.import_module(program.split()[-1].removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [program, *words])
    flags = hiql.WORDS if issubclass(module.Config, hiql.Config) else hiro.WORDS
    given, _ = parse(module.PROGRAM, "", flags)
    return json.loads(json.dumps(dataclasses.asdict(module.resolve(given))))


@pytest.mark.parametrize("name", experiments.read_experiments())
def test_results_are_those_of_the_command_lines(name, monkeypatch):
    """Each committed line is of a row of experiments.ini and one of its seeds, says what it was
    made with, and has the configuration that its command line means today."""
    known = experiments.read_experiments()
    rows, configs = experiments.recorded(name)
    for reference in known[name].beside:
        assert experiments.is_row(reference, known)
    for row in rows:
        assert int(row["seed"]) in known[name].seeds[row["row"]]
        assert re.fullmatch(r"(<=)?[0-9a-f]{7}\+?( then [0-9a-f]{7}\+?)*", row["commit"])
        assert re.fullmatch("unknown|python .+ numpy .+ scipy .+ machine .+", row["versions"])
        assert re.fullmatch("-|unknown|[0-9a-f]{8}", row["data"])
    assert {row["row"] for row in rows} == set(configs)
    for row, config in configs.items():
        command = known[name].rows[row]
        if command.startswith(experiments.EARLIER) or command == "-m lab.theory":
            continue
        today = meant(command, monkeypatch)
        shared = (config.keys() & today.keys()) - {"seed"}
        assert {x: config[x] for x in shared} == {x: today[x] for x in shared}, row


def test_an_experiment_spread_over_processes_is_gathered(project, write_ini, program):
    """A process for each seed, each with a run of its own; a run that has ended is not made
    again."""
    write_ini(f"{SECTION}x = hiql.py --quick --env grid-fourrooms --no-train-flat --steps 20 "
              "--eval-interval 20 --eval-episodes 1\nold = recorded: once\n")
    for seed in "01":
        assert program("run", "a", "--seed", seed, "--out", "o") == 0
    assert set(os.listdir("o")) == {
        "a_seed0.csv", "a_seed0.json", "a_seed1.csv", "a_seed1.json", "runs"}
    assert experiments.gather("o") == 2 and experiments.gather("o") == 0
    rows, configs = experiments.recorded("a")
    assert [(row["row"], row["seed"], row["agent"]) for row in rows] == [
        ("x", "0", "hiql"), ("x", "1", "hiql")]
    assert configs.keys() == {"x"} and configs["x"]["steps"] == 20 and "seed" not in configs["x"]
    (folder,) = project.glob("o/runs/a/x_*_seed1")
    code, summary = code_and_versions(), read_json(folder / "summary.json")
    assert rows[1]["commit"] == code["commit"] and rows[1]["data"] == summary["data"]
    assert rows[1]["versions"] == " ".join(f"{k} {x}" for k, x in code["versions"].items())
    assert rows[0]["data"] != rows[1]["data"]
    os.unlink(project / "o" / "a_seed0.csv")            # ended, but not recorded: not run again
    assert program("run", "a", "--seed", "0", "--out", "o") == 0
    assert experiments.recorded("a_seed0", "o")[0] == rows[:1]


def test_run_makes_what_the_results_lack(project, write_ini, write_results, program, monkeypatch):
    """Seed by seed, so that a run that is stopped leaves whole seeds; 1 if a run has failed; lines
    that another process has added meanwhile stay."""
    write_ini(f"{SECTION}x = hiql.py\ny = -m lab.td3 --steps 9\ny seeds = 1-2\n")
    write_results("a", [{"row": "x", "seed": 0}])
    asked = {}

    def processes(runs, jobs):
        asked.update(runs, jobs=jobs)
        write_results("a", [{"row": "x", "seed": 0}, {"row": "y", "seed": 2}])
        folder = runs["y seed 1"][2]
        os.makedirs(folder)
        write_json(os.path.join(folder, "config.json"), {
            "config": {"steps": 9, "seed": 1}, "commit": "1234567", "versions": {"python": "3.11"}})
        yield "y seed 1", {"seed": 1, "success": 0.5, "curve": [None, 0.5]}

    monkeypatch.setattr(experiments, "run_processes", processes)
    assert program("run", "a", "--jobs", "3") == 1
    assert list(asked) == ["x seed 1", "y seed 1", "y seed 2", "jobs"] and asked["jobs"] == 3
    assert asked["y seed 1"][:2] == ("-m lab.td3", ["--steps", "9", "--seed=1"])
    assert experiments.recorded("a") == (
        [{"row": "x", "seed": "0", "success": "", "curve": "", "commit": "", "versions": "",
          "data": ""}, {"row": "y", "seed": "2", "success": "", "curve": "", "commit": "",
                        "versions": "", "data": ""},
         {"row": "y", "seed": "1", "success": "0.5", "curve": "nan 0.5", "commit": "1234567",
          "versions": "python 3.11", "data": "-"}], {"y": {"steps": 9}})
    assert experiments.numbers({"curve": "nan 0.5"}, "curve") == [
        pytest.approx(np.nan, nan_ok=True), 0.5]
    before = asked["y seed 1"][2]
    write_ini(f"{SECTION}x = hiql.py\ny = -m lab.td3 --steps 8\ny seeds = 1-2\n")
    write_results("a", [])
    asked.clear()
    program("run", "a")
    assert asked["y seed 1"][2] != before               # another command, another folder


def test_cost_of_an_experiment(write_ini, write_results):
    """Missing seeds cost what their row's others did, rows without any what all rows did."""
    write_ini("[a]\ntitle = T\nseeds = 0-3\ncolumns = success\np = hiql.py\nq = hiql.py\n"
              "q seeds = 0-2\nr = hiql.py\n")
    assert experiments.cost("a") == (0, 0, 11)
    write_results("a", [
        {"row": row, "seed": seed, "train_seconds": seconds}
        for row, seed, seconds in (("p", 0, 60), ("p", 1, 120), ("q", 0, 240))])
    minutes, done, planned = experiments.cost("a")
    assert (done, planned) == (3, 11) and minutes == pytest.approx(4 * 1.5 + 3 * 4 + 4 * 7 / 3)


ROW = f"{SECTION}x = hiql.py\n"
DONE = {"results/a.csv": "row,seed\nx,0\n", "results/a.json": '{"x": {"k": 5}}'}


def spread(text, name="a_seed1", configs='{"x": {}}'):
    """Files of `run --out` beside results that have seed 0."""
    return {**DONE, f"o/{name}.csv": text, f"o/{name}.json": configs}


@pytest.mark.parametrize("ini, files, words, told", [
    ("[a]\ntitle = T\nseeds = 0\n", {}, "--list", "section a: there is no line columns"),
    ("[a]\n[a]\n", {}, "--list", "experiments.ini cannot be read"),
    (SECTION.replace("0-1", "3-1") + "x = hiql.py\n", {}, "--list", "section a: seeds are A-B"),
    (f"{SECTION}y seeds = 3\n", {}, "--list", "there is a line 'y seeds', but no row 'y'"),
    (f"{SECTION}x = python hiql.py\n", {}, "--list", "x = python hiql.py is no command line"),
    (ROW, {}, "", "say run NAME"),
    (ROW, {}, "run z", "invalid choice 'z'"),
    (ROW, {}, "run a --seed 0", "--seed and --out go together"),
    (ROW, {}, "run a --out o", "--seed and --out go together"),
    (ROW, {}, "run a --seed 5 --out o", "seed 5 is not one of a's: 0 1"),
    (ROW, {}, "run a --jobs 0", "--jobs must be at least 1, not 0"),
    (ROW, {}, "compare a:x b:x", "a:x: no such row in results/"),
    (ROW, DONE, "compare a:x a:x:flat", "a:x: no such row in results/"),
    (ROW, {"results/a.csv": "row,seed\nx,0\nx,00\n"}, "report", "two lines for 'x', seed 0"),
    (ROW, {"results/a.csv": "row,seed\nx\n"}, "report", "row 1 of"),
    (ROW, DONE, "report --gather nowhere", "nowhere"),
    (ROW, spread("row,seed\nx,7\n"), "report --gather o", "row 'x' with seed 7 is not of"),
    (ROW, spread("row,seed\nz,1\n"), "report --gather o", "row 'z' with seed 1 is not of"),
    (ROW, spread("row,seed\nx,1\n", "b_seed1"), "report --gather o", "there is no experiment b"),
    (ROW, spread("row,seed\nx,1\n", "a_1"), "report --gather o", "holds no NAME_seedN.csv"),
    (ROW, spread("row,seed\nx,1\n", configs='{"x": {"k": 2}}'), "report --gather o",
     "a run of 'x' with k 2 instead of 5"),
    (ROW, {"docs/p.md": "<!-- table a -->\nold\n"}, "report", "has no <!-- end --> before the end"),
    (ROW, {"docs/p.md": "<!-- table a -->\n<!-- headline -->\n"}, "report", "before <!-- headline"),
    (ROW, {"docs/p.md": "<!-- end -->\n"}, "report", "has no mark before it (line 1)"),
    (ROW, {"docs/p.md": "<!-- table z -->\n<!-- end -->\n"}, "report", "wants a table of z"),
    (ROW, {"docs/p.md": "<!-- compare a:x - a:z -->\n<!-- end -->\n"}, "report",
     "wants a comparison of a:x - a:z")])
def test_what_is_refused(ini, files, words, told, project, write_ini, program, capsys):
    """In one line, and no file has changed."""
    write_ini(ini)
    (project / "README.md").write_text("<!-- table a -->\nold\n<!-- end -->\n")
    for path, text in files.items():
        (project / path).parent.mkdir(exist_ok=True)
        (project / path).write_text(text)
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    assert program(*words.split()) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
    assert before == {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
