"""Tests of lab/experiments.py, and of what is committed in lab/experiments.ini and results/."""

import nets                             # first: it sets one BLAS thread before numpy loads

import dataclasses
import glob
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from lab import experiments
from support.files import read_json, read_rows, write_json, write_rows
from support.flags import parser
from support.run import HERE

# ------------------------------------------------------------------------- experiments.ini


def test_a_row_names_its_program():
    assert experiments.command_line("hiql.py --env 'a b' --steps 9") == (
        [os.path.join(HERE, "hiql.py")], ["--env", "a b", "--steps", "9"])
    assert experiments.command_line("-m lab.td3 --steps 9") == (["-m", "lab.td3"], ["--steps", "9"])


def test_a_wrong_line_of_experiments_is_told(write_ini, program, capsys):
    section = "[a]\ntitle = T\nseeds = 0\ncolumns = x\n"
    for text, words in (("[a]\ntitle = T\nseeds = 0\n", "section a has no line columns = ..."),
                        ("[a]\ntitle = T\nseeds = 0\ncolumns =\n", "a has no line columns = ..."),
                        ("title = T\n", "cannot be read"), ("[a]\n[a]\n", "'a' already exists"),
                        ("[a]\ntitle = T\nseeds = 3-1\ncolumns = x\nx = hiql.py\n", "not '3-1'"),
                        (f"{section}beside = a:y\nx = hiql.py\n", "a has 'a:y' beside it"),
                        (f"{section}y seeds = 3\nx = hiql.py\n", "'y seeds', but no row 'y'"),
                        (f"{section}y published = 3\n", "'y published', but no row 'y'")):
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
        assert re.fullmatch("[0-9a-f]{7}", experiment.commit), name
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
            assert all(x == getattr(module.Config, option) for option, x in later.items())


# ------------------------------------------------------------------------- results


def test_an_experiment_spread_over_processes_is_gathered(project, write_ini, monkeypatch):
    """A process for each seed; gathering adds what is missing, and nothing twice."""
    for path in (*glob.glob("*.py", root_dir=HERE), *glob.glob("lab/*.py", root_dir=HERE)):
        shutil.copy(os.path.join(HERE, path), project / path)
    shutil.copytree(os.path.join(HERE, "support"), project / "support")
    words = ("--quick --env grid-fourrooms --no-train-flat --steps 20 --eval-interval 20 "
             "--eval-episodes 1")
    write_ini(f"[a]\ntitle = T\nseeds = 0-1\ncolumns = success\nx = hiql.py {words}\n[b]\ntitle = "
              f"T\nseeds = 0-1\ncolumns = success\nx = hiql.py {words} --subgoal-steps 2\n")
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
    minutes, done, total = experiments.cost("a")
    seconds = [float(row["train_seconds"]) for row in rows]
    assert minutes == pytest.approx(sum(seconds) / 60) and (done, total) == (2, 2)
    assert experiments.cost("b") == (0, 0, 2)
    (project / "o" / "a_seed0.csv").unlink()            # ended, but not recorded: not run again
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", None)
        assert experiments.run_experiment("a", 1, 0, str(project / "o")) == []
    assert read_rows(project / "o" / "a_seed0.csv")[0] == rows[0]
    other = project / "other"
    other.mkdir()
    write_rows(project / "results" / "a.csv", rows[:1])
    write_rows(other / "a_seed1.csv", rows[1:])
    write_json(other / "a_seed1.json", {"x": {**config, "subgoal_steps": 2}})
    with pytest.raises(ValueError, match="a run of 'x' with subgoal_steps 2 instead of 5; remove"):
        experiments.gather(other)
    with pytest.raises(ValueError, match="seed 5 is not one of a's: 0 1"):
        experiments.run_experiment("a", 1, 5, str(project / "o"))
    with pytest.raises(ValueError, match="holds no NAME_seedN.csv"):
        experiments.gather(project)
    (project / "o" / "z_seed0.csv").write_text("row,seed\n")
    with pytest.raises(ValueError, match="no experiment z; known: a, b"):
        experiments.gather(project / "o")


def test_cost_of_an_experiment(project, write_ini):
    """Missing seeds cost what their row's others did, rows without any what all rows did."""
    write_ini("[a]\ntitle = T\nseeds = 0-3\ncolumns = success\np = hiql.py\nq = hiql.py\n"
              "q seeds = 0-1\nr = hiql.py\n")
    write_rows(project / "results" / "a.csv", [
        {"row": row, "seed": seed, "train_seconds": seconds}
        for row, seed, seconds in (("p", 0, 60), ("p", 1, 120), ("q", 0, 240))])
    minutes, done, total = experiments.cost("a")
    assert (done, total) == (3, 10) and minutes == pytest.approx(4 * 1.5 + 2 * 4 + 4 * 7 / 3)


def test_run_makes_what_the_results_lack(project, write_ini, program, monkeypatch):
    write_ini("[a]\ntitle = T\nseeds = 0-2\ncolumns = success\nx = hiql.py\n"
              "y = hiro.py\ny seeds = 1\n")
    write_rows(project / "results" / "a.csv", [{"row": "x", "seed": 0}, {"row": "y", "seed": 1}])
    monkeypatch.chdir(project)
    asked = []
    monkeypatch.setattr(experiments, "run_processes", lambda runs, jobs, done: asked.append(
        (list(runs), jobs)) or list(runs)[:1])
    for words in ((), ("--jobs", "3"), ("--seed", "1", "--out", "o")):
        assert program("run", "a", *words) == 1                            # one has failed
    assert asked == [(["x seed 1", "x seed 2"], 2), (["x seed 1", "x seed 2"], 3),
                     (["x seed 1", "y seed 1"], 1)]
    monkeypatch.setattr(experiments, "run_processes", lambda runs, jobs, done: [])
    assert program("run", "a") == 0


def test_damaged_results_are_refused(project, write_ini, program, monkeypatch, capsys):
    write_ini("[a]\ntitle = T\nseeds = 0-1\ncolumns = success\nx = hiql.py\n"
              "y = -m lab.td3 --steps 9\ny seeds = 0\n")
    csv = project / "results" / "a.csv"
    for text, words in (("row,seed,success\nx,0\n", "line 2 has not as many cells"),
                        ("row,seed,success\nx,0,1\nx,1,1,7\n", "line 3 has not as many cells"),
                        ("row,seed,success\nx,0,1\nx,1,1\nx,1,0\n", "two lines for 'x', seed 1"),
                        ("", "has no lines of runs"), ("x,0,1\n", "has no lines of runs"),
                        ("x,0,1\nx,1,1\n", "line 2 has not as many cells")):
        csv.write_text(text)
        with pytest.raises(ValueError, match=words):
            experiments.recorded("a")
    csv.unlink()

    monkeypatch.chdir(project)
    folder = os.path.join("runs", "a", "")
    for run in ("x_seed1", "y_seed0"):
        os.makedirs(folder + run)
    for run, command, begun in (                        # left there by another command
            ("x_seed1", "hiql.py", {"argv": ["--subgoal-steps=3", "--seed=1"]}),
            ("x_seed1", "hiql.py", {"argv": ["--subgoal-steps=3", "--seed=1"],
                                    "program": "hiql.py"}),
            ("x_seed1", "hiql.py", {"argv": ["--seed=1"], "program": "hiro.py"}),
            ("y_seed0", "-m lab.td3 --steps 9", {"argv": ["--steps", "9", "--seed=0"],
                                                 "program": "-m lab.baselines"})):
        config = os.path.join(folder + run, "config.json")
        write_json(config, {"config": {}, **begun})
        with pytest.raises(ValueError, match=f"{run} holds a run of another command than "
                                             f"{command!r}"):
            experiments.run_experiment("a", 1)
        os.remove(config)
    write_json(os.path.join(f"{folder}y_seed0", "config.json"), {                   # by its own
        "config": {}, "argv": ["--steps", "9", "--seed=0", "--out", "o"], "program": "-m lab.td3"})
    write_json(os.path.join(f"{folder}x_seed1", "config.json"), {
        "config": {}, "argv": ["--seed=1", "--out", "o"], "program": "hiql.py"})

    def processes(runs, jobs, done):                    # while another adds a row
        assert jobs == 3 and runs == {
            "x seed 0": ([str(project / "hiql.py")], ["--seed=0"], f"{folder}x_seed0"),
            "y seed 0": (["-m", "lab.td3"], ["--steps", "9", "--seed=0"], f"{folder}y_seed0"),
            "x seed 1": ([str(project / "hiql.py")], ["--seed=1"], f"{folder}x_seed1")}
        experiments.record("a", [{"row": "x", "seed": 0}], {"x": {}})
        done("x seed 1", {"seed": 1, "curve": [None, 0.5]})

    monkeypatch.setattr(experiments, "run_processes", processes)
    experiments.run_experiment("a", 3)
    assert csv.read_text() == "row,seed,curve\nx,0,\nx,1,nan 0.5\n"
    csv.unlink()
    for words in (("--seed", "0", "--out", ""), ("--seed", "0"), ("--out", "o"), ("--out", ""),
                  ("--seed", "0", "--out", "o", "--jobs", "1")):
        assert program("run", "a", *words) == 2
        assert "--seed and --out DIR go together" in capsys.readouterr().err
    spread = project / "spread"
    spread.mkdir()
    for text, words in (("row,seed\nx,7\n", "row 'x' with seed 7 is not of experiment a"),
                        ("row,seed\nz,1\n", "row 'z' with seed 1 is not of experiment a"),
                        ("row,seed\nx,1\n", "a_seed1.json lacks the configuration of 'x'")):
        (spread / "a_seed1.csv").write_text(text)
        with pytest.raises(ValueError, match=words):
            experiments.gather(spread)
