"""Tests of lab/experiments.py, and of what is committed in lab/experiments.ini and results/."""

import nets                             # first: it sets one BLAS thread before numpy loads

import dataclasses
import glob
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy

import hiql
from lab import experiments
from support import offline
from support.files import read_json, read_rows, write_json, write_rows
from support.flags import parser
from support.run import HERE, generators

# ------------------------------------------------------------------------- experiments.ini


def test_a_row_names_its_program():
    assert experiments.command_line("hiql.py --env 'a b' --steps 9") == (
        [os.path.join(HERE, "hiql.py")], ["--env", "a b", "--steps", "9"])
    assert experiments.command_line("-m lab.td3 --steps 9") == (["-m", "lab.td3"], ["--steps", "9"])


def test_a_section_is_read(write_ini):
    write_ini("[a]\ntitle = T = 1\nseeds = 0-2\ncolumns = success x\npicture = x y\n"
              "beside = 'a:p q' a:r:flat\np q = hiql.py --env 'a b'\nr = -m lab.td3\n"
              "r seeds = 5,7\nr published = 0.5 = high\n[b]\ntitle = U\nseeds = 4\ncolumns = z\n"
              "each = u v\ns = hiro.py\n[c]\ntitle = V\nseeds = 4\ncolumns = z y\neach =\n")
    assert experiments.read_experiments() == {
        "a": experiments.Experiment(
            title="T = 1", columns=["success", "x"], each=["success"], picture=["x", "y"],
            beside=["a:p q", "a:r:flat"], rows={"p q": "hiql.py --env 'a b'", "r": "-m lab.td3"},
            seeds={"p q": [0, 1, 2], "r": [5, 7]}, published={"r": "0.5 = high"}),
        "b": experiments.Experiment(
            title="U", columns=["z"], each=["u", "v"], picture=[], beside=[],
            rows={"s": "hiro.py"}, seeds={"s": [4]}, published={}),
        "c": experiments.Experiment(title="V", columns=["z", "y"], each=["z"], picture=[],
                                    beside=[], rows={}, seeds={}, published={})}


SECTION = "[a]\ntitle = T\nseeds = 0\ncolumns = x\n"


@pytest.mark.parametrize("text, words", [
    ("[a]\ntitle = T\nseeds = 0\n", "section a: there is no line columns = ..."),
    ("[a]\ntitle = T\nseeds = 0\ncolumns =\n", "section a: there is no line columns = ..."),
    ("[a]\ntitle =\nseeds = 0\ncolumns = x\n", "section a: there is no line title = ..."),
    ("[a]\ntitle = T\ncolumns = x\n", "section a: there is no line seeds = ..."),
    ("title = T\n", "experiments.ini cannot be read: File contains no section headers"),
    ("[a]\n[a]\n", "'a' already exists"),
    ("[a]\ntitle = T\nseeds = 3-1\ncolumns = x\nx = hiql.py\n", "section a: seeds are A-B"),
    (f"{SECTION}beside = a:y\nx = hiql.py\n", "section a: 'a:y' is beside it"),
    (f"{SECTION}beside = a\nx = hiql.py\n", "section a: 'a' is beside it"),
    (f"{SECTION}beside = 'a:x\nx = hiql.py\n", "section a: No closing quotation"),
    (f"{SECTION}y seeds = 3\nx = hiql.py\n", "section a: there is a line 'y seeds', but no row"),
    (f"{SECTION}y published = 3\n", "section a: there is a line 'y published', but no row 'y'"),
    (f"{SECTION}x =\n", "section a: x = is no command line"),
    (f"{SECTION}x = -m\n", "section a: x = -m is no command line"),
    (f"{SECTION}x = python hiql.py\n", "section a: x = python hiql.py is no command line"),
    (f"{SECTION}commit = 0123abc\n", "section a: commit = 0123abc is no command line"),
    (f"{SECTION}x = hiql.py --env 'a\n", "section a: No closing quotation")])
def test_a_wrong_line_of_experiments_is_told(text, words, write_ini, program, capsys):
    write_ini(text)
    assert program("--list") == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_results_are_those_of_the_command_lines():
    """Each committed row belongs to a row of experiments.ini, to one of its seeds, and to the
    configuration its command line means today; options it does not know are at their defaults."""
    for name, experiment in experiments.read_experiments().items():
        rows, configs = experiments.recorded(name)
        if not rows:
            continue
        assert {row["row"] for row in rows} == set(configs)
        for row in rows:
            assert int(row["seed"]) in experiment.seeds[row["row"]], (name, row["row"])
        for row, config in configs.items():
            program, words = experiments.command_line(experiment.rows[row])
            module = importlib.import_module(
                program[-1] if program[0] == "-m" else os.path.basename(program[0])[:-len(".py")])
            if module.__name__ == "lab.theory":
                assert config == {"theory": True} and not words
                continue
            given = parser(module.Config, "").parse_args(words)
            meant = json.loads(json.dumps(dataclasses.asdict(module.resolve(vars(given)))))
            meant.pop("seed")
            later = {x: meant.pop(x) for x in set(meant) - set(config)}     # options new since
            assert config == meant, (name, row)
            assert all(x == json.loads(json.dumps(getattr(module.Config, option)))
                       for option, x in later.items())


# Rows whose data set is not known, and why; docs/notes.md says what was done for the others.
KEPT = "a file in datasets/ was used, perhaps one made before the teleporters were changed"
UNKNOWN_DATA = {
    ("ogbench", "medium-navigate, file of the generator"): "the file is not in the repository",
    ("ogbench", "teleport-navigate"): KEPT,
    **{("ogbench_controllers", f"teleport, {agent}"): KEPT
       for agent in ("collector", "straight", "random")}}


def test_every_row_says_what_it_was_made_with():
    """Commit, versions and data. The versions are unknown only in rows from before they were kept,
    which name the commit that recorded them; the data only where UNKNOWN_DATA says why."""
    commit, versions = "[0-9a-f]{7}[+]?", "python [0-9.]+ numpy [0-9.]+ scipy [0-9.]+ machine .+"
    known, seen = experiments.read_experiments(), {}
    for name, experiment in known.items():
        for row in experiments.recorded(name)[0]:
            where = name, row["row"]
            if row["commit"].startswith("<="):
                assert re.fullmatch(commit, row["commit"][2:]) and row["versions"] == "unknown"
            else:
                assert all(re.fullmatch(commit, x) for x in row["commit"].split(" then ")), where
                assert all(re.fullmatch(versions, x) for x in row["versions"].split(" then "))
            online = re.match("hiro.py|-m lab.(td3|theory)", experiment.rows[row["row"]])
            if where in UNKNOWN_DATA or online:
                assert row["data"] == ("-" if online else "unknown"), where
                continue
            assert re.fullmatch("[0-9a-f]{8}", row["data"]), where
            one = row["env"].startswith("pointmaze")        # these have one data set for all seeds
            assert seen.setdefault((row["env"], one or row["seed"]), row["data"]) == row["data"]
    assert all(row in known[name].rows for name, row in UNKNOWN_DATA)
    problem = hiql.prepare(hiql.resolve({"env": "grid-fourrooms", "seed": 3}))
    agent = offline.init_agent(problem, generators(3, "init", "flat"))
    assert f"{int(agent['data']):08x}" == seen["grid-fourrooms", "3"]


# ------------------------------------------------------------------------- results

CODE = {"commit": "1234567+", "versions": {"python": "3.11.7", "numpy": "2.4.6"}}
COLUMNS = "[a]\ntitle = T\nseeds = 0-1\ncolumns = success\n"


@pytest.fixture
def spread(project, write_ini):
    """Experiment a with a row x and seeds 0 and 1; spread(file, rows, configs) writes what a
    process of `run --out` does, into the folder that spread.folder names."""
    write_ini(f"{COLUMNS}x = hiql.py\n")

    def write(file, rows, configs):
        write_rows(write.folder / f"{file}.csv", rows)
        write_json(write.folder / f"{file}.json", configs)

    write.folder = project / "spread"
    write.folder.mkdir()
    return write


def test_an_experiment_spread_over_processes_is_gathered(project, write_ini, monkeypatch):
    """A process for each seed, each with a run of its own; a run that has ended is not made
    again."""
    for path in (*glob.glob("*.py", root_dir=HERE), *glob.glob("lab/*.py", root_dir=HERE)):
        shutil.copy(os.path.join(HERE, path), project / path)
    shutil.copytree(os.path.join(HERE, "support"), project / "support")
    words = ("--quick --env grid-fourrooms --no-train-flat --steps 20 --eval-interval 20 "
             "--eval-episodes 1")
    write_ini(f"{COLUMNS}x = hiql.py {words}\n")
    processes = [subprocess.Popen(
        [sys.executable, "-m", "lab.tables", "run", "a", "--seed", str(seed), "--out", "o"],
        cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in (0, 1)]
    for process in processes:
        said = process.communicate()
        assert process.returncode == 0, said
    assert {f for f in os.listdir(project / "o")} == {
        "a_seed0.csv", "a_seed0.json", "a_seed1.csv", "a_seed1.json", "runs"}
    assert experiments.gather(project / "o") == 2 and experiments.gather(project / "o") == 0
    rows = read_rows(project / "results" / "a.csv")
    assert [(row["row"], row["seed"]) for row in rows] == [("x", "0"), ("x", "1")]
    config = read_json(project / "results" / "a.json")["x"]
    assert config["steps"] == 20 and config["subgoal_steps"] == 5 and "seed" not in config
    folder = project / "o" / "runs" / "a" / "x_seed1"
    begun, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    assert rows[1]["commit"] == begun["commit"] and rows[1]["data"] == summary["data"]
    assert rows[0]["data"] != rows[1]["data"]
    assert rows[1]["versions"] == (
        f"python {platform.python_version()} numpy {np.__version__} scipy {scipy.__version__} "
        f"machine {platform.machine()}")
    (project / "o" / "a_seed0.csv").unlink()            # ended, but not recorded: not run again
    with monkeypatch.context() as patch:
        patch.setattr(experiments, "code_and_versions", lambda: CODE)
        patch.setattr(subprocess, "Popen", None)
        assert experiments.run_experiment("a", 1, 0, str(project / "o")) == []
    assert read_rows(project / "o" / "a_seed0.csv") == rows[:1]


def test_gathering_adds_what_is_missing(project, spread, capsys):
    """Once; a seed that is there stays as it is; a note if the code was not the same."""
    write_rows(project / "results" / "a.csv", [
        {"row": "x", "seed": 0, "success": 1, "commit": "<=abcdef0"}])
    write_json(project / "results" / "a.json", {"x": {"steps": 9}})
    for seed in (0, 1):
        spread(f"a_seed{seed}", [{"row": "x", "seed": seed, "success": 0.5, "commit": "1234567"}],
               {"x": {"steps": 9}})
    (spread.folder / "notes.csv").write_text("not of an experiment")
    assert experiments.gather(spread.folder) == 1
    assert capsys.readouterr().out == ("note: the rows of a are by the code of several commits: "
                                       "<=abcdef0 (1), 1234567 (1)\n")
    assert (project / "results" / "a.csv").read_text() == (
        "row,seed,success,commit\nx,0,1,<=abcdef0\nx,1,0.5,1234567\n")
    assert experiments.gather(spread.folder) == 0 and capsys.readouterr().out == ""
    (project / "results" / "a.csv").unlink()
    assert experiments.gather(spread.folder) == 2 and capsys.readouterr().out == ""


@pytest.mark.parametrize("file, row, seed, configs, words", [
    ("a_seed1", "x", 7, {"x": {}}, "a_seed1.csv: row 'x' with seed 7 is not of experiment a"),
    ("a_seed1", "z", 1, {"z": {}}, "a_seed1.csv: row 'z' with seed 1 is not of experiment a"),
    ("a_seed1", "x", 1, {}, "a_seed1.json lacks the configuration of 'x'"),
    ("a_seed1", "x", 1, {"x": {"k": 2, "steps": 9}}, "a run of 'x' with k 2 instead of 5; remove"),
    ("b_seed1", "x", 1, {"x": {}}, "b_seed1.csv: there is no experiment b; known: a"),
    ("a_seed0_seed1", "x", 1, {"x": {}}, "there is no experiment a_seed0; known: a"),
    ("a_1", "x", 1, {"x": {}}, "holds no NAME_seedN.csv, which `run NAME --seed N --out")])
def test_foreign_rows_are_not_gathered(file, row, seed, configs, words, project, spread):
    write_rows(project / "results" / "a.csv", [{"row": "x", "seed": 0}])
    write_json(project / "results" / "a.json", {"x": {"k": 5}})
    spread(file, [{"row": row, "seed": seed}], configs)
    with pytest.raises(ValueError, match=words):
        experiments.gather(spread.folder)
    assert (project / "results" / "a.csv").read_text() == "row,seed\nx,0\n"


def test_cost_of_an_experiment(project, write_ini):
    """Missing seeds cost what their row's others did, rows without any what all rows did."""
    write_ini("[a]\ntitle = T\nseeds = 0-3\ncolumns = success\np = hiql.py\nq = hiql.py\n"
              "q seeds = 0-2\nr = hiql.py\n[b]\ntitle = T\nseeds = 0\ncolumns = success\n"
              "p = hiql.py\n")
    write_rows(project / "results" / "a.csv", [
        {"row": row, "seed": seed, "train_seconds": seconds}
        for row, seed, seconds in (("p", 0, 60), ("p", 1, 120), ("q", 0, 240))])
    minutes, done, total = experiments.cost("a")
    assert (done, total) == (3, 11) and minutes == pytest.approx(4 * 1.5 + 3 * 4 + 4 * 7 / 3)
    assert experiments.cost("b") == (0, 0, 1)


def test_run_makes_what_the_results_lack(project, write_ini, program, monkeypatch):
    """Seed by seed, so that a run that is stopped leaves whole seeds; 1 if a run has failed."""
    write_ini("[a]\ntitle = T\nseeds = 0-2\ncolumns = success\nx = hiql.py\n"
              "y = -m lab.td3 --steps 9\ny seeds = 1\nz: z = hiro.py\nz: z seeds = 1-2\n")
    write_rows(project / "results" / "a.csv", [{"row": "x", "seed": 0}, {"row": "y", "seed": 1}])
    monkeypatch.chdir(project)
    asked, failed = [], ["x seed 1"]
    monkeypatch.setattr(experiments, "run_processes",
                        lambda runs, jobs, done: asked.append((runs, jobs)) or failed)
    for words in ((), ("--jobs", "3"), ("--seed", "1", "--out", "o")):
        assert program("run", "a", *words) == 1
    hiql_, hiro_ = [str(project / "hiql.py")], [str(project / "hiro.py")]
    runs = os.path.join("runs", "a", "")
    missing = {"x seed 1": (hiql_, ["--seed=1"], f"{runs}x_seed1"),
               "z: z seed 1": (hiro_, ["--seed=1"], f"{runs}z_z_seed1"),
               "x seed 2": (hiql_, ["--seed=2"], f"{runs}x_seed2"),
               "z: z seed 2": (hiro_, ["--seed=2"], f"{runs}z_z_seed2")}
    assert asked[:2] == [(missing, 2), (missing, 3)] and list(asked[0][0]) == list(missing)
    runs = os.path.join("o", "runs", "a", "")
    assert asked[2] == ({
        "x seed 1": (hiql_, ["--seed=1"], f"{runs}x_seed1"),
        "y seed 1": (["-m", "lab.td3"], ["--steps", "9", "--seed=1"], f"{runs}y_seed1"),
        "z: z seed 1": (hiro_, ["--seed=1"], f"{runs}z_z_seed1")}, 1)
    failed.clear()
    assert program("run", "a") == 0


def test_wrong_words_to_run_are_refused(project, write_ini, program, capsys):
    write_ini(f"{COLUMNS}x = hiql.py\n")
    for words, told in (
            (("--seed", "0", "--out", ""), "--seed and --out DIR go together"),
            (("--seed", "0"), "--seed and --out DIR go together"),
            (("--out", "o"), "--seed and --out DIR go together"),
            (("--out", ""), "--seed and --out DIR go together"),
            (("--seed", "0", "--out", "o", "--jobs", "1"), "--seed and --out DIR go together"),
            (("--seed", "5", "--out", "o"), "seed 5 is not one of a's: 0 1"),
            (("--jobs", "0"), "--jobs must be at least 1, not 0")):
        assert program("run", "a", *words) == 2
        assert told in capsys.readouterr().err
    assert not os.path.exists("o")


def test_a_finished_run_is_recorded_with_what_made_it(project, write_ini, monkeypatch, capsys):
    """Its summary, and the code of when it began; beside a row that another process added."""
    write_ini(f"{COLUMNS}x = hiql.py\ny = -m lab.td3\n")
    write_rows(project / "results" / "a.csv", [{"row": "x", "seed": 0, "commit": "abcdef0"}])
    monkeypatch.chdir(project)
    monkeypatch.setattr(experiments, "code_and_versions", lambda: CODE)
    other = {"commit": "7654321", "versions": {"python": "3.12.1"}}
    folder = os.path.join("runs", "a", "")
    for run, begun in (("x_seed1", CODE), ("y_seed0", {**CODE, "resumed": [other, other]}),
                       ("y_seed1", {})):
        os.makedirs(folder + run)
        write_json(os.path.join(folder + run, "config.json"), {
            "argv": [f"--seed={run[-1]}", "--out", "o"],
            "config": {"steps": 9, "seed": int(run[-1])}, **begun})

    def processes(runs, jobs, done):
        assert list(runs) == ["y seed 0", "x seed 1", "y seed 1"]
        experiments.record("a", [{"row": "x", "seed": 0, "commit": "abcdef0"},
                                 {"row": "z", "seed": 0}], {"x": {"steps": 9}})
        done("x seed 1", {"seed": 1, "success": 0.5, "curve": [None, 0.5], "data": "0a1b2c3d"})
        done("y seed 0", {"seed": 0})
        done("y seed 1", {"seed": 1})
        return []

    monkeypatch.setattr(experiments, "run_processes", processes)
    assert experiments.run_experiment("a", 1) == []
    versions = "python 3.11.7 numpy 2.4.6"
    assert (project / "results" / "a.csv").read_text() == (
        "row,seed,commit,success,curve,data,versions\nx,0,abcdef0,,,,\nz,0,,,,,\n"
        f"x,1,1234567+,0.5,nan 0.5,0a1b2c3d,{versions}\n"
        f"y,0,1234567+ then 7654321,,,-,{versions} then python 3.12.1\n"
        "y,1,unknown,,,-,unknown\n")
    assert read_json(project / "results" / "a.json") == {"x": {"steps": 9}, "y": {"steps": 9}}
    assert capsys.readouterr().out == (
        "note: the rows of a are by the code of several commits: abcdef0 (1), 1234567+ (3)\n"
        "x seed 1 success 0.500\ny seed 0 done\ny seed 1 done\n")


def test_one_commit_needs_no_note(project, write_ini, monkeypatch, capsys):
    write_ini(f"{COLUMNS}x = hiql.py\n")
    write_rows(project / "results" / "a.csv", [{"row": "x", "seed": 0, "commit": "1234567+"}])
    monkeypatch.chdir(project)
    monkeypatch.setattr(experiments, "code_and_versions", lambda: CODE)
    monkeypatch.setattr(experiments, "run_processes", lambda runs, jobs, done: [])
    experiments.run_experiment("a", 1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("run, command, begun", [
    ("x_seed1", "hiql.py", {"argv": ["--k=3", "--seed=1"]}),
    ("x_seed1", "hiql.py", {"argv": ["--k=3", "--seed=1"], "program": "hiql.py"}),
    ("x_seed1", "hiql.py", {"argv": ["--seed=1"], "program": "hiro.py"}),
    ("y_seed0", "-m lab.td3 --steps 9", {"argv": ["--steps", "9", "--seed=0"],
                                         "program": "-m lab.baselines"})])
def test_a_folder_of_another_command_is_not_used(run, command, begun, project, write_ini,
                                                 monkeypatch):
    write_ini(f"{COLUMNS}x = hiql.py\ny = -m lab.td3 --steps 9\n")
    monkeypatch.chdir(project)
    folder = os.path.join("runs", "a", run)
    os.makedirs(folder)
    write_json(os.path.join(folder, "config.json"), {"config": {}, **begun})
    with pytest.raises(ValueError, match=f"{run} holds a run of another command than {command!r}"):
        experiments.run_experiment("a", 1)
    for damaged in ([], {}, {"config": 3}):
        write_json(os.path.join(folder, "config.json"), damaged)
        with pytest.raises(ValueError, match=f"is not that of a run; remove .*{run}"):
            experiments.run_experiment("a", 1)


@pytest.mark.parametrize("text, words", [
    ("row,seed,success\nx,0\n", "row 1 of .*a.csv has more or fewer cells"),
    ("row,seed\nx,0\nx,1\nx,01\n", "a.csv: two lines for 'x', seed 1"),
    ("", "a.csv has no lines of runs"), ("row,seed\n", "a.csv has no lines of runs"),
    ("x,0,1\nx,1,1\n", "a.csv: row 1 has no name or no seed"),
    ("row,seed\nx,0\nx,1.5\n", "a.csv: row 2 has no name or no seed"),
    ("row,seed\n,0\n", "a.csv: row 1 has no name or no seed")])
def test_damaged_results_are_refused(text, words, project):
    (project / "results" / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        experiments.recorded("a")


def test_damaged_configurations_are_refused(project):
    write_rows(project / "results" / "a.csv", [{"row": "x", "seed": 0}])
    for damaged in ([], {"x": 3}):
        write_json(project / "results" / "a.json", damaged)
        with pytest.raises(ValueError, match="a.json does not hold a configuration for each row"):
            experiments.recorded("a")


def test_numbers_of_a_cell():
    run = {"row": "x", "seed": "3", "one": "0.5", "two": "1 nan", "none": "", "text": "a 1"}
    assert experiments.numbers(run, "one") == [0.5]
    assert experiments.numbers(run, "two") == [1, pytest.approx(np.nan, nan_ok=True)]
    assert experiments.numbers(run, "none") == experiments.numbers(run, "missing") == []
    with pytest.raises(ValueError, match="^x, seed 3: text holds 'a 1', which is no number$"):
        experiments.numbers(run, "text")
