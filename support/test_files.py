"""Tests of what is read from files: nothing damaged or foreign is believed, nothing ends in a
traceback, and each refusal is one line that names the file.

    python -m pytest support/test_files.py          a few seconds
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import os
import re
import shutil
import struct
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

import envs
import hiql
import hiro
from lab import td3
from nets import flatten, unflatten
from support import offline
from support.datasets import check_dataset, load_dataset
from support.files import (load_arrays, load_tree, read_json, read_log, read_rows, save_tree,
                           write_json, write_rows, write_text)
from support.run import Run, load_run
from support.test_run import run


def refusal(path, read, *arguments, kind=ValueError):
    """The message of read(*arguments), which must be refused in words that name the path, without
    a warning."""
    with warnings.catch_warnings(), pytest.raises(kind) as error:
        warnings.simplefilter("error")
        read(*arguments)
    assert str(path) in str(error.value)
    return str(error.value)


# -------------------------------------------------------------------------------------- files


def test_trees_are_saved_and_never_unpickled(tmp_path):
    tree = {"a": {"b": np.arange(3.0)}, "c": np.array("text")}
    save_tree(tmp_path / "t.npz", tree)
    back = load_tree(tmp_path / "t.npz")
    assert (back["a"]["b"] == tree["a"]["b"]).all() and str(back["c"]) == "text"
    assert os.listdir(tmp_path) == ["t.npz"]
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], object))
    (tmp_path / "text.npz").write_text("no npz")
    for name in ("pickled.npz", "text.npz"):
        with pytest.raises(ValueError, match="not an npz file of plain arrays"):
            load_tree(tmp_path / name)


def test_text_json_and_rows_are_written_whole(tmp_path, monkeypatch):
    """Under a temporary name first: what fails half way leaves the old file."""
    write_rows(tmp_path / "r.csv", [{"a": 1, "b": 1 / 3}, {"a": None, "c": [None, 0.5], "b": "x"}])
    assert (tmp_path / "r.csv").read_text() == "a,b,c\n1,0.333333,\n,x,nan 0.5\n"
    assert read_rows(tmp_path / "r.csv")[0] == {"a": "1", "b": "0.333333", "c": ""}
    write_json(tmp_path / "j.json", {"a": [1, None]})
    assert read_json(tmp_path / "j.json") == {"a": [1, None]}
    write_text(tmp_path / "t.txt", "one\r\ntwo\n")
    assert (tmp_path / "t.txt").read_bytes() == b"one\r\ntwo\n"
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json is not JSON"):
        read_json(tmp_path / "broken.json")
    assert sorted(os.listdir(tmp_path)) == ["broken.json", "j.json", "r.csv", "t.txt"]

    def full_disk(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    for write, name, new in ((write_rows, "r.csv", [{"z": 1}]), (write_json, "j.json", 0),
                             (write_text, "t.txt", ""), (save_tree, "j.json", {"z": np.ones(1)})):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(OSError, match="no space left"):
            write(tmp_path / name, new)
        assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("read", [read_json, read_rows, load_tree, load_arrays, load_dataset])
def test_pipes_and_devices_are_not_read(read, tmp_path):
    for path in (tmp_path, "/dev/null"):                # a pipe would be waited for
        assert "is not a regular file" in refusal(path, read, path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------- arrays

TREE = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.array("text")},
        "f": np.asfortranarray(np.arange(6).reshape(2, 3)), "empty": np.zeros((0, 2)),
        "n": np.array(-7), "yes": np.array([True, False])}


def same(a, b):
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(
        x.dtype == b[k].dtype and x.shape == b[k].shape and (x == b[k]).all() for k, x in a.items())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_archives_are_refused_or_read_as_they_were(save, tmp_path):
    """Cut at every third length; 200 times one to three random bytes changed."""
    path, rng = tmp_path / "t.npz", np.random.default_rng(0)
    save(path, **flatten(TREE))
    whole = path.read_bytes()
    assert same(load_tree(path), TREE)
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        assert "is not an npz file of plain arrays" in refusal(path, load_tree, path)
    refused = 0
    for _ in range(200):
        content = bytearray(whole)
        for i in rng.integers(len(whole), size=rng.integers(1, 4)):
            content[i] ^= rng.integers(1, 256)
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                back = flatten(load_tree(path))         # a date is damaged, or a name is lost
            assert back and same(back, {k: x for k, x in flatten(TREE).items() if k in back})
        except ValueError as e:
            refused += str(path) in str(e)
    assert refused > 100


def npy(header, data=bytes(12), version=(1, 0)):
    """A file of numpy's format: what a damaged header says need not fit its data."""
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(header)) + header + data


GOOD = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}\n"


@pytest.mark.parametrize("entry", [
    npy(GOOD.replace(b"3", b"4")), npy(GOOD.replace(b"3", b"1000000000000")),
    npy(GOOD.replace(b"3", b"1" + 30 * b"0")), npy(GOOD.replace(b"3", b"'x'")),
    npy(GOOD.replace(b"<f4", b"|O"), bytes(24)), npy(GOOD.replace(b"<f4", b"spam")),
    npy(GOOD[:-4]), npy(GOOD + b"("), npy(GOOD.replace(b"'", b"\xff")), npy(b"{}"), npy(b""),
    npy(b"(" * 5000), npy(b"1" * 9000), npy(GOOD.replace(b"descr", b"\\x")),
    npy(GOOD.replace(b"(3,)", b"3if 1else 2")), npy(GOOD, version=(2, 0)),
    npy(GOOD, version=(9, 9)), npy(GOOD)[:9], b"", b"text"])
def test_headers_that_lie_are_refused(entry, tmp_path):
    path = tmp_path / "t.npz"
    for content in (npy(GOOD, np.arange(3, dtype="<f4").tobytes()), entry):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)
        if content is not entry:
            assert load_tree(path)["x"].tolist() == [0, 1, 2]
    assert "is not an npz file of plain arrays" in refusal(path, load_tree, path)


def test_other_archives(tmp_path):
    """Compressed by LZMA, encrypted, pickled, no archive, other entries, names that collide."""
    path, lzma = tmp_path / "t.npz", tmp_path / "l.npz"
    np.savez(path, **flatten(TREE))
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(lzma, "w", zipfile.ZIP_LZMA) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert same(load_tree(lzma), TREE)
    content = bytearray(lzma.read_bytes())
    content[60:90] = 30 * b"\xff"
    lzma.write_bytes(content)
    closed = bytearray(path.read_bytes())
    for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):   # the flag of encryption
        i = closed.find(mark)
        while i >= 0:
            closed[i + at] |= 1
            i = closed.find(mark, i + 1)
    (tmp_path / "closed.npz").write_bytes(closed)
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], object))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no npz")
    (tmp_path / "empty.npz").write_text("")
    shutil.copy(path, tmp_path / "more.npz")
    with zipfile.ZipFile(tmp_path / "more.npz", "a") as archive:
        archive.writestr("readme.txt", "text")
    for name in ("l.npz", "closed.npz", "pickled.npz", "array.npy", "text.npz", "empty.npz",
                 "more.npz"):
        assert "is not an npz file of plain arrays" in refusal(name, load_tree, tmp_path / name)
    assert load_arrays(tmp_path / "more.npz", ["n", "z"]) == {"n": -7}      # reads no other entry
    for names in (("a", "a/b"), ("a", "a/b/c"), ("a/b/c", "a/b")):
        np.savez(path, **{name: np.zeros(2) for name in names})
        assert "of the same name" in refusal(path, load_tree, path)


# ---------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("text, message", [
    (b"step,x\n500,1\n1000\n", "row 2 of .* has more or fewer cells"),
    (b"step,x\n500,1,2\n", "row 1 of .* has more or fewer cells"),
    (b"step,x\n500,\"1\n", "is not CSV"), (b"step,x\n500,\xff\n", "is not CSV"),
    (b"step,x\n500," + b"1" * 200_000 + b"\n", "is not CSV"),
    (b"", "needs rows"), (b"step,x\n", "needs rows"), (b"500,1\n1000,1\n", "a column 'step'"),
    (b"update,x\n500,1\n", "a column 'step'"), (b"step,x\n5e2,1\n", "a column 'step'"),
    (b"step,x\n,1\n", "a column 'step'"), (b"step,x\n500,one\n", "numbers alone"),
    (b"step,x\n500,1 0.5 -\n", "numbers alone"), (b"step,x\n1000,1\n500,1\n", "'step' rises"),
    (b"step,x\n500,1\n500,2\n", "'step' rises"), (b"step,x\n-500,1\n", "'step' rises")])
def test_damaged_logs_are_refused(text, message, tmp_path):
    """By `read_log`, and so where a run is resumed."""
    path = tmp_path / "eval.csv"
    write_json(tmp_path / "config.json", {})
    path.write_bytes(text)
    before = (tmp_path / "config.json").read_bytes()
    said = refusal(path, read_log, path, "step")
    assert re.search(message, said)
    agent = {"step": np.array(500), "seconds": np.array(1.0)}
    assert said == refusal(path, Run, str(tmp_path), None, agent, "step")
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_log_is_read_up_to_the_checkpoint(tmp_path):
    row = {"x": 1 / 3, "by_task": [0.5, None], "gap": None}
    write_rows(tmp_path / "train.csv", [{"step": step, **row} for step in (5, 10, 15)])
    row = {"x": "0.333333", "by_task": "0.5 nan", "gap": ""}
    assert read_log(tmp_path / "train.csv", "step") == [
        {"step": step, **row} for step in ("5", "10", "15")]
    write_json(tmp_path / "config.json", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("signal.signal", lambda *_: None)
        resumed = Run(str(tmp_path), None, {"step": np.array(10), "seconds": np.array(1.0)}, "step")
    assert [row["step"] for row in resumed.logs["train"]] == ["5", "10"]
    assert resumed.logs["eval"] == []


# ----------------------------------------------------------------------------------- data sets


def corridor(rows=101):
    """A point maze of one corridor, and a trajectory along it: 0.08 to the right at each step."""
    env = envs.PointMaze("corridor", "####### #.....# #######")         # speed 0.8, side 4
    line = np.stack([0.08 * np.arange(rows), np.zeros(rows)], 1).astype(np.float32)
    return env, SimpleNamespace(observations=line, actions=np.tile(np.float32([0.1, 0]), (rows, 1)),
                                terminals=np.arange(rows) == rows - 1)


def grid():
    """A grid of one corridor, and a trajectory along it: four steps to the right."""
    env = envs.GridWorld("grid", "####### #.....# #######")
    line = np.stack([np.ones(5), np.arange(1, 6)], 1).astype(np.float32)
    return env, SimpleNamespace(observations=line, actions=np.array([4, 4, 4, 4, 0]),
                                terminals=np.arange(5) == 4)


def changed(arrays, name, rows, value):
    """A copy with other rows of one array, whose dtype follows the value's."""
    x = getattr(arrays, name)
    value = np.asarray(value)
    x = x.astype(np.result_type(x.dtype, value.dtype) if x.dtype != bool else value.dtype)
    x[rows] = value
    return SimpleNamespace(**{**vars(arrays), name: x})


@pytest.mark.parametrize("make, name, rows, value, message", [
    (corridor, "observations", 5, np.nan, "observations contain NaN or infinity"),
    (corridor, "observations", 5, -np.inf, "observations contain NaN or infinity"),
    (corridor, "observations", 5, 1e300, "observations contain NaN or infinity"),
    (corridor, "actions", 5, 1e300, "actions contain NaN or infinity"),
    (corridor, "actions", 100, np.nan, "actions contain NaN or infinity"),
    (corridor, "observations", 5, 1e25, "the position in row 5, [9.99"),
    (corridor, "observations", 7, (20.1, 0), "the position in row 7, [20.1"),
    (corridor, "observations", 7, (0, -4.1), "lies beyond the outer walls of corridor"),
    (corridor, "actions", 9, (0.5, 1.01), "are numbers from -1 to 1; here they are float"),
    (corridor, "actions", 9, (-1.5, 0), "from -1.5 to 0.1"),
    (corridor, "observations", [3, 4], (4, 3.9), "2 of 101 positions lie outside the free cells"),
    (corridor, "actions", [3, 4], (-0.1, 0), "2 of 100 steps are not 0.8 x action, up to walls"),
    (corridor, "actions", slice(100), (0.1, 0.11), "100 of 100 steps are not 0.8 x action"),
    (corridor, "terminals", 100, 0, "terminals[-1] is not 1"),
    (corridor, "terminals", slice(None), 1, "ends in row 0 has one row only"),
    (corridor, "terminals", 99, 1, "ends in row 100 has one row only"),
    (corridor, "terminals", 3, np.nan, "terminals must be 0 or 1"),
    (corridor, "terminals", 3, 2, "terminals must be 0 or 1"),
    (grid, "actions", 2, 5, "are integers from 0 to 4; here they are int64 from 0 to 5"),
    (grid, "actions", 2, -1, "from -1 to 4"),
    (grid, "actions", 2, 0.5, "here they are float32 from 0.0 to 4.0"),
    (grid, "observations", 4, (0, 5), "1 of 5 positions lie outside the free cells of grid"),
    (grid, "observations", 4, (3, 5), "the position in row 4, [3.0, 5.0], lies beyond"),
    (grid, "actions", 2, 3, "1 of 4 steps are not the move of an action")])
def test_data_sets_that_cannot_be_of_the_environment(make, name, rows, value, message, tmp_path):
    env, data = make()
    path = tmp_path / "d.npz"

    def read():
        check_dataset(load_dataset(path), env, path)

    np.savez(path, **vars(data))
    read()
    np.savez(path, **vars(changed(data, name, rows, value)))
    assert message in refusal(path, read)


def test_data_sets_that_can_be_of_the_environment(tmp_path):
    """Up to one per cent of a point maze's rows and steps; a grid with slip; other dtypes."""
    (env, data), (cells, walk), path = corridor(), grid(), tmp_path / "d.npz"
    slippery = envs.GridWorld("slippery", "####### #.....# #######", slip=0.1)
    for env, data in ((env, changed(data, "observations", 3, (20, 4))),
                      (env, changed(data, "actions", 3, (-1, 1))),
                      (env, changed(data, "actions", slice(100), (0.1, 0.09))),
                      (slippery, changed(walk, "actions", 2, 3)), (cells, walk)):
        for kinds in ("fif", "dlb", "fqd", "gBf"):
            np.savez(path, observations=data.observations.astype(kinds[0]), more=np.array("text"),
                     actions=data.actions.astype(kinds[1] if env.discrete else kinds[0]),
                     terminals=data.terminals.astype(kinds[2]))
            back = load_dataset(path)
            check_dataset(back, env)
            assert back.observations.dtype == np.float32 and back.terminals.dtype == bool
            assert back.actions.dtype == (np.int64 if env.discrete else np.float32)
            assert (back.actions == data.actions.astype(back.actions.dtype)).all()
            assert (back.observations == data.observations.astype(np.float32)).all()
    with pytest.raises(ValueError, match="the data set is of another environment: 1 of 4 steps"):
        check_dataset(envs.Dataset(**vars(changed(walk, "observations", 4, (1, 1)))), slippery)


@pytest.mark.parametrize("name, value, message", [
    ("observations", np.array([{}], object), "plain arrays"),
    ("observations", np.array(["x"] * 101), "observations is <U1 of shape (101,)"),
    ("observations", np.zeros((101, 2), bool), "observations is bool"),
    ("actions", np.zeros((101, 2), bool), "actions is bool"),
    ("actions", np.zeros((101, 2), complex), "actions is complex128"),
    ("actions", np.zeros(101, "M8[s]"), "actions is datetime64"),
    ("terminals", np.array(1), "must be arrays of numbers; terminals is int64 of shape ()"),
    ("terminals", np.zeros((101, 1), bool), "do not fit together"),
    ("observations", np.zeros((0, 2)), "do not fit together"), ("actions", None, "has no actions"),
    ("observations", None, "has no observations; a data set has observations, actions, terminals")])
def test_files_that_are_no_data_sets(name, value, message, tmp_path):
    path, arrays = tmp_path / "d.npz", {**vars(corridor()[1]), name: value}
    np.savez(path, **{k: x for k, x in arrays.items() if x is not None})
    assert message in refusal(path, load_dataset, path)


# --------------------------------------------------------------------------------------- runs


@pytest.fixture
def small_maze(monkeypatch):
    """The environment "small", a grid with a data set of three trajectories."""
    monkeypatch.setitem(envs.ENVIRONMENTS, "small", envs.Entry(
        envs.GridWorld, dict(layout="umaze"), dict(episodes=3, rows=20)))


def begun(folder, program):
    """A run as it is saved before it learns -> config.json's content, checkpoint {name: array}.

    HIQL: 4 + 6 updates. HIRO: room for 4 windows of at most 10 steps; 25 steps in 3 windows, its
    goals measured after 20 of 90 steps.
    """
    given = {hiql: {"env": "small", "steps": 4, "policy_steps": 6, "rep_dim": 2},
             hiro: {"steps": 90, "warmup": 20, "goal_range": 0, "capacity": 40}}[program]
    problem = program.prepare(program.resolve({**given, "hidden_dims": (3,)}))
    if program is hiql:
        agent = offline.init_agent(problem, problem.rngs)
    else:
        agent = hiro.init_agent(problem, problem.rngs)
        for steps in (10, 10, 5):
            window = {"states": np.ones((steps + 1, 2)), "actions": np.zeros((steps, 2)),
                      "rewards": np.zeros(steps), "goal": np.ones(2), "task": np.zeros(2)}
            hiro.replay_add(agent["replay"], window, False, False)
        agent["step"] += 25
        agent["goal_range"][:] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("signal.signal", lambda *_: None)
        Run(str(folder), problem.config, None, program.COUNTER, f"{program.__name__}.py").save(
            agent, problem.rngs)
    return read_json(folder / "config.json"), flatten(load_tree(folder / "checkpoint.npz"))


@pytest.mark.parametrize("program", [hiql, hiro])
def test_a_run_as_it_was_saved_is_loaded(program, small_maze, tmp_path):
    saved, arrays = begun(tmp_path, program)
    problem, agent = load_run(program, tmp_path)
    assert same(agent, unflatten(arrays)) and problem.config.hidden_dims == (3,)
    for other in ("", None):                            # made from Python, or by an older version
        write_json(tmp_path / "config.json", {**saved, "program": other})
        assert load_run(program, tmp_path)[0].config == problem.config


CONFIGS = [("steps", 5.0), ("steps", True), ("steps", "5"), ("steps", None), ("steps", [5]),
           ("steps", -5), ("steps", 10**400), ("lr", "fast"), ("lr", float("nan")),
           ("lr", float("inf")), ("lr", 10**400), ("lr", True), ("lr_decay", "false"),
           ("lr_decay", 1), ("hidden_dims", 3), ("hidden_dims", [3.5]), ("hidden_dims", [True]),
           ("hidden_dims", "33"), ("hidden_dims", {}), ("hidden_dims", []), ("hidden_dims", [0]),
           ("env", {}), ("env", []), ("env", "nowhere"), ("env", 3), ("dataset", None),
           ("dataset", "no\0file"), ("rep_type", "phi"), ("rep_type", ["phi_sg"]),
           ("expectile", 1.5), ("encoding", "bumps"), ("wrong", 1), ("", 1)]


def test_damaged_configurations_are_refused(small_maze, tmp_path):
    saved, _ = begun(tmp_path, hiql)
    path, config = tmp_path / "config.json", saved["config"]
    for name, value in CONFIGS:
        write_json(path, {**saved, "config": {**config, name: value}})
        said = refusal(tmp_path, load_run, hiql, tmp_path)
        flag = f"--{name.replace('_', '-')}"
        assert flag in said or repr(name) in said or name in ("env", "dataset"), said
        assert len(said) < 500 + len(str(path))
    for name in config:
        write_json(path, {**saved, "config": {k: x for k, x in config.items() if k != name}})
        assert f"no field {name!r}" in refusal(path, load_run, hiql, tmp_path)
    for text, message in (("", "is not JSON"), ("{", "is not JSON"), ("\x00", "is not JSON"),
                          ("[" * 100_000, "is not JSON"), ("[]", "holds no configuration"),
                          ("3", "holds no configuration"), ("{}", "holds no configuration"),
                          ('{"config": []}', "holds no configuration"),
                          ('{"config": {}, "resumed": 3}', "holds no configuration"),
                          ('{"config": {}, "resumed": [3]}', "holds no configuration"),
                          ('{"config": {}}', "no field 'action_free'")):
        path.write_text(text)
        assert message in refusal(path, load_run, hiql, tmp_path)
    path.write_bytes(b"\xff")
    assert "is not JSON" in refusal(path, load_run, hiql, tmp_path)


def test_types_of_a_configuration():
    """From Python a float may be an integer, a tuple a list; numpy's own numbers are no JSON."""
    config = vars(hiql.resolve({"lr": 1, "hidden_dims": [3]}))
    assert config["lr"] == 1
    for name, value in (("steps", np.int64(3)), ("seed", 1.0), ("lr_decay", np.True_)):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be"):
            hiql.resolve({name: value})


DAMAGED = "the checkpoint is damaged: "
MISFIT = "the checkpoint does not fit its config.json: "
W, V = "params/low/dense0/W", "optimiser/v/value/dense0/W"
CHECKPOINTS = [
    (hiql, W, complex, MISFIT + f"{W} is complex128 of shape (4, 3) and not float32"),
    (hiql, W, float, MISFIT), (hiql, W, int, MISFIT), (hiql, W, ">f4", MISFIT),
    (hiql, W, lambda x: x.T, MISFIT), (hiql, W, None, f"{MISFIT}it has no {W}"),
    (hiql, "params/other", np.zeros(2), f"{MISFIT}it has an unknown params/other"),
    (hiql, "early", np.zeros(2), f"{MISFIT}it has an unknown early"),
    (hiql, W, (1, np.nan), DAMAGED + W), (hiql, W, (-1, np.inf), DAMAGED + W),
    (hiql, "optimiser/m/low/dense0/W", (1, -np.inf), DAMAGED + "optimiser/m"),
    (hiql, V, (1, -1e-9), DAMAGED + V), (hiql, V, (1, np.nan), DAMAGED + V),
    (hiql, "optimiser/count", np.array(-1), DAMAGED + "optimiser/count"),
    (hiql, "update", np.array(-5), DAMAGED + "update"),
    (hiql, "update", np.array(11), DAMAGED + "update"),
    (hiql, "update", np.array(10**12), DAMAGED + "update"),
    (hiql, "update", np.array(5.0), MISFIT + "update is float64"),
    (hiql, "update", np.array([5]), MISFIT + "update is int64 of shape (1,)"),
    (hiql, "data", np.array(5), "the data are not those of the run"),
    (hiql, "seconds", np.array(-1.0), DAMAGED + "seconds"),
    (hiql, "seconds", np.array(np.nan), DAMAGED + "seconds"),
    (hiql, "seconds", None, MISFIT + "it has no seconds"),
    (hiql, "rng/batch", None, MISFIT + "it has no rng/batch"),
    (hiql, "rng/more", np.array("{}"), MISFIT + "it has an unknown rng/more"),
    (hiql, "rng/hide", np.array("{}"), DAMAGED + "rng/hide is no state of a generator"),
    (hiql, "rng/hide", np.array("[" * 100_000), DAMAGED + "rng/hide"),
    (hiql, "rng/hide", np.array(3), DAMAGED + "rng/hide"),
    (hiql, "rng/hide", lambda x: np.array(str(x).replace("PCG64", "MT19937")), DAMAGED),
    (hiql, "rng/hide", lambda x: np.array(str(x).replace('32": 0', '32": 0.5')), DAMAGED),
    (hiro, "step", np.array(-1), DAMAGED + "step"),
    (hiro, "step", np.array(590), DAMAGED + "step"),        # an episode of 500 begins by step 89
    (hiro, "low/count", np.array(-1), DAMAGED + "low/count"),
    (hiro, "high/critic_adam/v/dense0/b", (0, -1), DAMAGED + "high/critic_adam/v"),
    (hiro, "goal_range", (0, 0), DAMAGED + "goal_range"),
    (hiro, "goal_range", (1, -1), DAMAGED + "goal_range"),
    (hiro, "goal_range", (1, np.nan), DAMAGED + "goal_range"),
    (hiro, "goal_range", (slice(None), np.nan), DAMAGED + "goal_range"),
    (hiro, "goal_range", (slice(None), np.inf), DAMAGED + "goal_range"),
    (hiro, "replay/goal", (0, np.nan), DAMAGED),
    (hiro, "replay/states", (0, np.nan), DAMAGED + "replay/states"),
    (hiro, "replay/count", np.array(-1), DAMAGED + "replay/count"),
    (hiro, "replay/count", np.array(2), DAMAGED + "its replay"),
    (hiro, "replay/count", np.array(4), DAMAGED + "its replay"),
    (hiro, "replay/length", (1, 0), DAMAGED + "its replay"),
    (hiro, "replay/length", (3, 1), DAMAGED + "its replay"),
    (hiro, "replay/length", (1, 11), DAMAGED + "replay/length"),
    (hiro, "replay/length", (1, -1), DAMAGED + "replay/length"),
    (hiro, "step", np.array(2), DAMAGED + "its replay")]


@pytest.mark.parametrize("program", [hiql, hiro])
def test_damaged_checkpoints_are_refused(program, small_maze, tmp_path):
    _, arrays = begun(tmp_path, program)
    for _, name, change, message in (case for case in CHECKPOINTS if case[0] is program):
        x = arrays.get(name)
        if isinstance(change, tuple):
            x = x.copy()
            x[change[0]] = change[1]
        elif isinstance(change, (type, str)):
            x = x.astype(change)
        else:
            x = change(x) if callable(change) else change
        save_tree(tmp_path / "checkpoint.npz", {k: y for k, y in {**arrays, name: x}.items()
                                                if y is not None})
        assert message in refusal(tmp_path, load_run, program, tmp_path), (name, change)


@pytest.mark.parametrize("program, changes", [
    (hiql, {"update": 10}), (hiql, {"optimiser/m/low/dense0/W": -1, "seconds": 0}),
    (hiro, {"step": 589}), (hiro, {"replay/length": 1, "replay/count": 25}),
    (hiro, {"step": 25, "replay/length": [10, 10, 4, 1], "replay/count": 4}),
    (hiro, {"early/0_8/paths": np.ones((501, 2)), "early/0_8/asked": np.ones((50, 2), "f")})])
def test_what_a_checkpoint_may_hold(program, changes, small_maze, tmp_path):
    _, arrays = begun(tmp_path, program)
    for name, value in changes.items():
        if name in arrays:
            arrays[name][...] = value
        else:
            for test in ("0_8", "8_0", "8_8", "random"):
                arrays[name.replace("0_8", test)] = value
    save_tree(tmp_path / "checkpoint.npz", arrays)
    assert same(load_run(program, tmp_path)[1], unflatten(arrays))
    for name in changes:
        if name.startswith("early"):
            for x in (arrays[name][:-1], np.full_like(arrays[name], np.nan), None):
                save_tree(tmp_path / "checkpoint.npz",
                          {k: y for k, y in {**arrays, name: x}.items() if y is not None})
                assert name in refusal(tmp_path, load_run, program, tmp_path)


def test_goals_are_not_measured_before_the_warm_up_ends(small_maze, tmp_path):
    """With --goal-range 0 alone, and all or none of the range."""
    saved, arrays = begun(tmp_path, hiro)
    arrays["goal_range"][:], arrays["replay/goal"][:3] = np.nan, np.nan
    save_tree(tmp_path / "checkpoint.npz", arrays)
    for changes, damaged in (({"warmup": 26}, None), ({"warmup": 25}, "goal_range"),
                             ({"warmup": 26, "goal_range": 2.0}, "replay/goal")):
        write_json(tmp_path / "config.json", {**saved, "config": {**saved["config"], **changes}})
        if damaged:
            assert DAMAGED + damaged in refusal(tmp_path, load_run, hiro, tmp_path)
        else:
            load_run(hiro, tmp_path)
    del arrays["goal_range"]
    save_tree(tmp_path / "checkpoint.npz", arrays)
    assert "no goal_range" in refusal(tmp_path, load_run, hiro, tmp_path)
    arrays["goal_range"] = np.array([1, np.nan], np.float32)
    save_tree(tmp_path / "checkpoint.npz", arrays)
    changes = {"warmup": 26}
    write_json(tmp_path / "config.json", {**saved, "config": {**saved["config"], **changes}})
    assert DAMAGED + "goal_range" in refusal(tmp_path, load_run, hiro, tmp_path)


def test_a_folder_without_a_run_is_refused_in_one_line(small_maze, tmp_path, capsys):
    """Nowhere, a file, the run of another program, one killed before its first checkpoint, one
    that is damaged: exit code 2, one line that names the folder, nothing changed."""
    _, arrays = begun(tmp_path / "run", hiql)
    begun(tmp_path / "other", hiro)
    (tmp_path / "file").write_text("")
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    os.remove(tmp_path / "killed" / "checkpoint.npz")
    shutil.copytree(tmp_path / "run", tmp_path / "damaged")
    save_tree(tmp_path / "damaged" / "checkpoint.npz", {**arrays, W: arrays[W] * np.float32("nan")})
    before = sorted(tmp_path.rglob("*"))
    for folder, message in (("nowhere", "holds no run: there is no config.json in it"),
                            ("file", "holds no run"), ("other", "holds a run of `python hiro.py`"),
                            ("killed", "start again with its flags and --out"),
                            ("damaged", DAMAGED + W)):
        for flag in ("--eval", "--resume"):
            assert run(hiql, flag, tmp_path / folder) == 2
            out, err = capsys.readouterr()
            assert out == "" and err.startswith("hiql.py: error: ") and err.count("\n") == 1
            assert f"{tmp_path / folder}" in err and message in err
    for program in (td3, hiql):
        assert "`python hiro.py`" in refusal(tmp_path, load_run, program, tmp_path / "other")
    assert "not of `python -m lab.td3`" in refusal(tmp_path, load_run, td3, tmp_path / "other")
    for data, changes in (("wild", ("observations", 5, 1e25)), ("odd", ("terminals", 3, np.nan))):
        np.savez(tmp_path / f"{data}.npz", **vars(changed(corridor()[1], *changes)))
        assert run(hiql, "--env", "point-umaze", "--dataset", tmp_path / f"{data}.npz", "--out",
                   tmp_path / "out") == 2
        err = capsys.readouterr().err
        assert f"{data}.npz: " in err and err.count("\n") == 1
        os.remove(tmp_path / f"{data}.npz")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(FileNotFoundError):
        load_run(hiql, tmp_path / "killed")
