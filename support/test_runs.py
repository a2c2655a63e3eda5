"""Tests of a run: what is refused, its files, signals, seeds, evaluation, progress.

Most of it by a program of a few lines, `walk.py`, that takes milliseconds; hiql.py and hiro.py
where it is about them.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import envs
import hiql
import hiro
from nets import flatten
from support import flags, runs
from support.runs import HERE, Program, Run, generators, open_run, read_json, read_run

# ------------------------------------------------------------------- a program of a few lines


@dataclasses.dataclass
class Config:
    env: str = flags.option("walk", "environment", ("walk", "run"))
    seed: int = flags.option(0, "seed", flags.NOT_NEGATIVE)
    steps: int = flags.option(23, "steps", flags.POSITIVE)
    size: int = flags.option(3, "numbers in the agent", flags.POSITIVE)
    hidden_dims: tuple = flags.option((2,), "sizes", flags.SIZES)
    fast: bool = flags.option(False, "a flag")
    file: str = flags.option("", "a text")


PROGRAM = Program("walk.py", Config, "step", ("x", "step"), {"old": 3})


def walk(run, hook=lambda step, run, agent: None):
    """A random walk, which is evaluated and saved every five steps; hook: called at each step."""
    rngs = generators(run.config.seed, "walk")
    agent = {"x": np.zeros(run.config.size), "seen": np.zeros(2), "step": np.zeros((), np.int64)}
    hook(0, run, agent)
    run.begin(agent, rngs, run.config.steps)
    for step in range(int(agent["step"]) + 1, run.config.steps + 1):
        agent["x"] += rngs["walk"].normal(size=run.config.size)
        agent["step"] += 1
        hook(step, run, agent)
        run.step(step, {"x_loss": agent["x"][0]})
        if step % 5 == 0:
            run.evaluated(step, {"success": float(agent["x"].mean())})
        if step % 5 == 0 or run.stopped:
            run.save(agent, rngs)
    run.save(agent, rngs)
    run.finish({"seed": run.config.seed, "success": float(agent["x"].mean()), "x_curve": [1]})


class Walk:
    """The program's main, as a module has it."""

    def __init__(self, hook=lambda *_: None):
        self.hook = hook

    def main(self):
        given, call = flags.parse(PROGRAM, "Walks.\n\nAt random.", {"quick": "in no time"})
        with runs.one_line_errors():
            if call.eval:
                return runs.show({"success": float(read_run(PROGRAM, call.eval).agent["x"].mean())})
            config = flags.make_config(Config, {k: x for k, x in given.items() if k != "quick"})
            if call.seeds:
                return runs.run_seeds(PROGRAM, call, given, config)
            with open_run(PROGRAM, call, config) as run:
                walk(run, self.hook)


def main(program, *words):
    """`python walk.py WORDS` (or hiql.py, hiro.py) in this process; the exit code."""
    name = PROGRAM.name if isinstance(program, Walk) else f"{program.__name__}.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, words)])
        try:
            program.main()
        except SystemExit as e:
            return e.code or 0
    return 0


def content(folder):
    """{path: bytes} of all files below a folder."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class ShortTask(envs.UMazeTask):
    """HIRO's U-maze with episodes of 50 steps."""

    def __init__(self):
        super().__init__()
        self.limit = 50


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test in a folder of its own; runs take no time, so that their files are the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: 0.0, sleep=time.sleep))
    for program in (hiql, hiro):
        monkeypatch.setattr(program, "draw", lambda *_: None)
    monkeypatch.setitem(envs.TASKS_ONLINE, "point-umaze", ShortTask)
    signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell's "&" ignores it
    return tmp_path


TINY = {hiql: ("--quick", "--steps", 20, "--eval-interval", 10, "--eval-episodes", 1, "--env",
               "grid-fourrooms"),
        hiro: ("--steps", 90, "--warmup", 20, "--eval-interval", 50, "--eval-episodes", 1,
               "--batch-size", 8, "--high-updates", 1, "--hidden-dims", "8")}


# ------------------------------------------------------------------------------------ refusals


def data_file(path, **changes):
    """A data set of one trajectory along a corridor of the U-maze, with other arrays."""
    line = np.stack([0.02 * np.arange(101), np.zeros(101)], 1).astype(np.float32)
    np.savez(path, **{"observations": line, "actions": np.tile(np.float32([0.1, 0]), (101, 1)),
                      "terminals": np.arange(101) == 100, **changes})


COMMANDS = {
    hiql: {"--stepz 5": "--steps", "--env point-tiny": "--env", "word": "word",
           "--steps many": "--steps", "--hidden-dims a": "--hidden-dims", "--out=": "--out",
           "--lr nan": "--lr", "--steps 1000000001": "--steps", "--seed 1000000001": "--seed",
           "--hidden-dims 1000001": "--hidden-dims",
           "--value-p-curgoal 0.6": "--value-p-curgoal", "--action-free 1": "--action-free",
           "--subgoal-steps 201": "--subgoal-steps", "--temperature 1": "--temperature",
           "--goal-indices 0": "--goal-indices", "--env none": "--dataset",
           "--no-train-flat --flat-alpha 3": "--flat-alpha",
           "--rep-type none --rep-dim 4": "--rep-dim",
           "--dataset nowhere.npz": "nowhere.npz", "--dataset note": "note",
           "--dataset /dev/null": "/dev/null", "--dataset pickled.npz": "pickled.npz",
           "--dataset good.npz --temperature 1": "--temperature",
           "--dataset good.npz --goal-indices 2": "--goal-indices",
           "--env grid-maze --dataset good.npz": "good.npz"},
    hiro: {"--env point-medium": "--env", "--correctoin none": "--correction",
           "--warmup 5": "--warmup", "--capacity 3": "--capacity", "--steps 2500": "--steps",
           "--high-noise 0 --noise-correlation 0": "--noise-correlation",
           "--target-noise 0 --target-clip 1": "--target-clip", "--goal-range 0": "lab.gym",
           "--pretrain 5": "--pretrain"}}
BOTH = {"--jobs 2": "--jobs", "--seeds 0-1 --jobs 0": "--jobs", "--seeds 3-1": "3-1",
        "--seeds 0-1 --seed 0": "--seed", "--seeds 0-1 --steps 0": "--steps",
        "--seeds 0-1 --out full": "full", "--resume run --steps 5": "--resume",
        "--eval run --out new": "--eval", "--eval run --resume run": "--resume",
        "--resume nowhere": "nowhere", "--eval note": "note", "--resume full": "full",
        "--eval other": "other", "--resume other": "other", "--resume early": "early",
        "--eval early": "early", "--out note": "note", "--out full": "full", "--out run": "run"}


@pytest.mark.parametrize("program", [hiql, hiro])
def test_wrong_commands_are_refused(program, here, capsys):
    """Exit code 2, one line on stderr that names the culprit, nothing written or overwritten.

    note: a file; full: a folder with a file; run: one of walk.py; other: that of the other program;
    early: a run of an earlier version.
    """
    (here / "note").write_text("mine")
    (here / "full").mkdir()
    (here / "full" / "thing").write_text("mine")
    assert main(Walk(), "--out", "run") == 0
    other = hiro if program is hiql else hiql
    config = other.resolve({})
    run = Run(other.PROGRAM, config, "other")
    run.begin({"params": {"w": np.ones(2)}, other.PROGRAM.counter: np.array(0)}, {}, 10)
    (here / "early").mkdir()
    runs.write_json("early/config.json", {"config": dataclasses.asdict(program.resolve({}))})
    np.savez("early/checkpoint.npz", **{"params/w": np.ones(2)})
    commands = {**COMMANDS[program], **BOTH}
    data_file("good.npz")
    data_file("pickled.npz", actions=np.array([{}], object))
    for field in dataclasses.fields(program.Config):        # each at a value beyond its range
        beyond = {flags.POSITIVE: 0, flags.NOT_NEGATIVE: -1, flags.AT_LEAST_2: 1, flags.OPEN: 1,
                  flags.UP_TO_1: 0, flags.BELOW_1: 1, flags.SHARE: 2, flags.SIZES: "64,0",
                  flags.INDICES: "0,0"}.get(field.metadata["range"])
        flag = flags.flag_of(field.name)
        if beyond is not None or field.metadata["choices"]:
            commands[f"{flag} {'nothing' if beyond is None else beyond}"] = flag
    before = content(here)
    capsys.readouterr()
    for words, culprit in commands.items():
        assert main(program, *words.split()) == 2, words
        said = capsys.readouterr().err
        assert said.startswith(f"{program.__name__}.py: error: ") and said.count("\n") == 1, said
        assert culprit in said and content(here) == before, (words, said)


def test_edges_of_ranges():
    for name, good, bad in (
            (flags.POSITIVE, 1, 0), (flags.NOT_NEGATIVE, 0, -1), (flags.AT_LEAST_2, 2, 1),
            (flags.OPEN, 0.5, 0), (flags.OPEN, 0.5, 1), (flags.UP_TO_1, 1, 0),
            (flags.UP_TO_1, 1, 2), (flags.BELOW_1, 0, 1), (flags.BELOW_1, 0, -1),
            (flags.SHARE, 0, -1), (flags.SHARE, 1, 2),
            (flags.POSITIVE, 9, np.inf), (flags.NOT_NEGATIVE, 9, np.inf), (flags.SIZES, (1,), ()),
            (flags.SIZES, (10**6,), (10**6 + 1,)), (flags.INDICES, (), (-1,)),
            (flags.INDICES, (1, 0), (1, 1))):
        assert flags.RANGES[name](good) and not flags.RANGES[name](bad), (name, good, bad)


def test_types_of_a_configuration():
    """From Python a float may be an integer, a tuple a list; a word must be one of the choices."""
    config = hiql.resolve({"lr": 1, "hidden_dims": [3]})
    assert config.lr == 1 and config.hidden_dims == (3,)
    for name, value in (("steps", 5.0), ("steps", True), ("steps", np.int64(3)), ("lr", "fast"),
                        ("lr", float("nan")), ("lr_decay", 1), ("hidden_dims", [3.5]),
                        ("hidden_dims", "33"), ("dataset", None), ("rep_type", "phi")):
        with pytest.raises(ValueError, match=f"{flags.flag_of(name)} must be"):
            hiql.resolve({name: value})
    with pytest.raises(ValueError, match="stepz.*steps"):
        hiql.resolve({"stepz": 5})


# --------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("program", [hiql, hiro])
def test_every_flag_reaches_the_config(program, monkeypatch, capsys):
    """As a typed word, also as a process of --seeds gets it; --help has each of them, and no tag
    that is not in the register."""
    given = {}
    for field in dataclasses.fields(program.Config):
        kind, choices = type(field.default), field.metadata["choices"]
        given[field.name] = choices[-1] if choices else {
            bool: not field.default, tuple: (7, 5), str: "text", int: 3, float: 3.0}[kind]
    monkeypatch.setattr(sys, "argv", ["x.py", *flags.words_of(given), "--quick", "--out", "here"])
    found, call = flags.parse(program.PROGRAM, program.__doc__, program.WORDS)
    assert found == {**given, "quick": True} and (call.out, call.resume) == ("here", None)
    assert main(program, "--help") == 0
    said = capsys.readouterr().out
    assert all(f"{flags.flag_of(name)} " in re.sub(r"[\n,]", " ", said) for name in given)
    with open(os.path.join(HERE, "docs", "deviations.md")) as register:
        assert set(re.findall(r"\[([DE]\d+)\]", said)) <= set(re.findall(r"[DE]\d+",
                                                                         register.read()))


def test_words_and_seeds():
    assert flags.words_of({"fast": False, "quick": True, "hidden_dims": (4, 5), "file": "-z"}) == [
        "--no-fast", "--quick", "--hidden-dims=4,5", "--file=-z"]
    assert flags.text_of(()) == flags.text_of("") == "none" and flags.sizes("none") == ()
    for text, seeds in (("3", [3]), ("0-2,7", [0, 1, 2, 7]), ("5, 1", [5, 1]), ("4-4", [4])):
        assert flags.seed_range(text) == seeds
    assert len(flags.seed_range("0-9999")) == 10_000
    for text in ("", "1-", "-1", "5-3", "1,", "1--2", "1-2-3", "a", "1.5", "1_0", "1000000000",
                 "1,1", "0-3,2", "0-10000", "0-999999999"):
        with pytest.raises(ValueError, match="^seeds are "):
            flags.seed_range(text)


# --------------------------------------------------------------------------------------- files


def test_files_are_written_whole(here, monkeypatch):
    """What fails half way leaves the old file, nothing temporary, and an error with the path."""
    runs.write_rows("r.csv", [{"a": 1, "b": 1 / 3}, {"a": None, "c": [None, 0.5], "b": "x"}])
    assert (here / "r.csv").read_text() == "a,b,c\n1,0.333333,\n,x,nan 0.5\n"
    runs.write_json("j.json", {"a": [1, None]})
    assert read_json("j.json") == {"a": [1, None]}
    (here / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json"):
        read_json("broken.json")
    before = content(here)

    def half(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="^j.json: No space left on device$"):
        runs.write("j.json", half)
    with pytest.raises(KeyboardInterrupt):
        runs.write("j.json", lambda file: signal.raise_signal(signal.SIGINT))
    assert content(here) == before


SAVE = ["train.csv", "eval.csv", "checkpoint.npz"]
WRITES = [*SAVE, "config.json", *SAVE * 5, "summary.json"]


class Killed(BaseException):
    """What nothing catches."""


def fail_at(patch, n, error):
    """os.replace raises the error at the n-th call; at a kill nobody removes what is left."""
    plain, calls = os.replace, []

    def replace(old, new):
        calls.append(os.path.basename(new))
        if len(calls) == n:
            raise error
        plain(old, new)

    patch.setattr(os, "replace", replace)
    if isinstance(error, Killed):
        patch.setattr(os, "unlink", lambda path: None)
    return calls


def test_a_kill_or_a_full_disk_at_any_write_loses_nothing(here, monkeypatch, capsys):
    """--resume goes on, and leaves the same bytes as a run that was never stopped; before the first
    checkpoint there is nothing to go on with."""
    with monkeypatch.context() as patch:
        calls = fail_at(patch, 0, None)
        assert main(Walk(), "--out", "r") == 0 and calls == WRITES
    (here / "r" / "config.json").unlink()
    whole = content(here)
    for n in range(1, len(WRITES) + 1):
        for error in (Killed(), OSError(errno.ENOSPC, "No space left on device")):
            shutil.rmtree("r")
            capsys.readouterr()
            with monkeypatch.context() as patch, contextlib.suppress(Killed):
                fail_at(patch, n, error)
                assert main(Walk(), "--out", "r") == (2 if n <= 4 else 1)
                said = capsys.readouterr().err
                assert os.path.join("r", WRITES[n - 1]) in said and said.count("\n") == 1
                assert not list(here.rglob("*.tmp")) and ("--resume r" in said) == (n > 4)
            assert main(Walk(), "--resume", "r") == (2 if n <= 3 else 0)
            (here / "r" / "config.json").unlink(missing_ok=True)        # has the flags
            assert n <= 3 or content(here) == whole, n


# ------------------------------------------------------------------------------- the checkpoint


def edited(folder, meta=lambda meta: meta, **arrays):
    """Change the checkpoint in a folder: meta(dict) -> dict; arrays by name, None removes one."""
    path = os.path.join(folder, "checkpoint.npz")
    found = runs.load_arrays(path)
    found["meta"] = np.array(json.dumps(meta(json.loads(str(found["meta"])))))
    found.update({name.replace("__", "/"): x for name, x in arrays.items()})
    np.savez(path, **{name: x for name, x in found.items() if x is not None})


@pytest.mark.parametrize("changes, culprit", [
    (dict(acting__x=np.ones(4)), "x is float64 of shape (4,)"),
    (dict(acting__x=np.ones(3, np.float32)), "x is float32"), (dict(acting__x=None), "x"),
    (dict(training__more=np.ones(1)), "more"), (dict(acting__x=np.array([1, np.nan, 1])), "x"),
    (dict(training__seen=np.array([np.inf, 0])), "seen"),
    (dict(training__rng=np.array("{")), "checkpoint.npz"),
    (dict(training__rng=np.array("{}")), "walk"),
    (dict(acting__x=np.array([{}], object)), "checkpoint.npz"),
    (dict(meta=lambda x: {**x, "program": "hiql.py"}), "hiql.py"),
    (dict(meta=lambda x: {"program": "walk.py"}), "checkpoint.npz"), (dict(meta=lambda x: 3), "r"),
    (dict(meta=lambda x: {**x, "config": {**x["config"], "steps": "5"}}), "--steps"),
    (dict(meta=lambda x: {**x, "config": {**x["config"], "old": 4}}), "old"),
    (dict(meta=lambda x: {**x, "config": {**x["config"], "unknown": 4}}), "unknown")])
def test_what_does_not_fit_is_not_gone_on_with(changes, culprit, here, capsys):
    """Names, shapes, dtypes, finite numbers, generators, the program, its settings; nothing is
    unpickled."""
    assert main(Walk(lambda step, run, agent: step == 7 and signal.raise_signal(signal.SIGTERM)),
                "--out", "r") == 143
    edited("r", **changes)
    before = content(here)
    capsys.readouterr()
    assert main(Walk(), "--resume", "r") == 2
    said = capsys.readouterr().err
    assert culprit in said and said.count("\n") == 1
    assert content(here) == before
    (here / "r" / "checkpoint.npz").write_bytes(b"PK\3\4 no archive")
    assert main(Walk(), "--resume", "r") == 2 and "checkpoint.npz" in capsys.readouterr().err


def test_settings_of_other_versions(here):
    """One that is missing has its default; a former one is ignored at its old default."""
    assert main(Walk(), "--out", "r", "--steps", 9) == 0

    def change(meta):
        meta["config"].pop("hidden_dims")
        return {**meta, "config": {**meta["config"], "old": 3}}

    edited("r", change)
    assert read_run(PROGRAM, "r").config == Config(steps=9)


@pytest.mark.parametrize("program", [hiql, hiro])
def test_a_run_of_each_program(program, here, capsys):
    """Its files; --eval and --resume of it; an agent without what training needs."""
    assert main(program, *TINY[program], "--out", "r", "--seed", 4) == 0
    assert set(os.listdir("r")) == {"config.json", "train.csv", "eval.csv", "checkpoint.npz",
                                    "summary.json"}
    summary, begun = read_json("r/summary.json"), read_json("r/config.json")
    assert summary["seed"] == 4 == begun["config"]["seed"] and begun["argv"][-1] == "4"
    told = capsys.readouterr().out
    assert "curve" not in told and told.splitlines()[-1].startswith("files in r: checkpoint.npz ")
    whole = content(here)
    assert main(program, "--eval", "r") == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert float(printed["success"]) == round(summary["success"], 4) and len(printed) > 3
    for name in printed.keys() & summary.keys():
        x = summary[name]
        assert printed[name] == str(round(x, 4) if isinstance(x, float) else x)
    assert main(program, "--resume", "r") == 0 and "finished" in capsys.readouterr().out
    assert content(here) == whole
    arrays, saved = runs.load_arrays("r/checkpoint.npz"), read_run(program.PROGRAM, "r")
    acting = {name for name in arrays if name.startswith("acting/")}
    assert {name.split("/", 1)[1] for name in acting} == {
        name for name in flatten(saved.agent) if f"{name}/".startswith(
            tuple(f"{part}/" for part in program.PROGRAM.acting))}
    os.unlink("r/summary.json")
    np.savez("r/checkpoint.npz", **{name: arrays[name] for name in acting | {"meta"}})
    assert program.load("r") and main(program, "--eval", "r") == 0
    assert f"success: {printed['success']}\n" in capsys.readouterr().out
    assert main(program, "--resume", "r") == 2 and "r: " in capsys.readouterr().err


def stop_at(program, count, patch):
    """A signal at that update or step of a program."""
    plain = Run.step

    def step(run, now, row):
        plain(run, now, row)
        if now >= count:
            signal.raise_signal(signal.SIGINT)

    patch.setattr(Run, "step", step)


def test_what_there_is_not_yet_or_no_more(here, monkeypatch, capsys):
    """No evaluation in HIRO's warm-up or before HIQL's policies; no going on with other data."""
    with monkeypatch.context() as patch:
        stop_at(hiro, 10, patch)
        assert main(hiro, *TINY[hiro], "--warmup", 80, "--out", "early") == 130
    with monkeypatch.context() as patch:
        stop_at(hiql, 13, patch)
        assert main(hiql, *TINY[hiql], "--policy-steps", 5, "--out", "value") == 130
        data_file("data.npz")
        assert main(hiql, *TINY[hiql][:5], "--dataset", "data.npz", "--out", "alone") == 130
    data_file("data.npz", actions=np.tile(np.float32([0.11, 0]), (101, 1)))
    capsys.readouterr()
    for program, words, culprit in ((hiro, "--eval early", "warm-up"),
                                    (hiql, "--eval value", "13 updates"),
                                    (hiql, "--eval alone", "data alone"),
                                    (hiql, "--resume alone", "data")):
        assert main(program, *words.split()) == 2 and culprit in capsys.readouterr().err
    assert hiql.load("alone")(np.zeros((1, 2)), np.ones((1, 2)), 0).shape == (1, 2)


# --------------------------------------------------------------------------------- what ends it


@pytest.mark.parametrize("numbers, code", [
    ([signal.SIGINT], 130), ([signal.SIGTERM], 143), ([signal.SIGTERM] * 2, 143),
    ([signal.SIGINT] * 2, 130)])
def test_signals_save_and_say_how_to_go_on(numbers, code, here, capsys):
    """At the next save; a second Ctrl-C does not wait for it. The handlers are given back."""
    def hook(step, run, agent):
        for number in numbers if step == 7 else ():
            os.kill(os.getpid(), number)

    before = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    assert main(Walk(), "--out", "whole run") == 0
    assert main(Walk(hook), "--out", "my run") == code
    assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)] == before
    assert capsys.readouterr().out.endswith("go on with: python walk.py --resume 'my run'\n")
    waited = numbers != [signal.SIGINT] * 2
    assert read_run(PROGRAM, "my run").agent["step"] == (7 if waited else 5)
    assert not os.path.exists("my run/summary.json")
    assert main(Walk(), "--resume", "my run") == 0
    for name in ("checkpoint.npz", "train.csv", "eval.csv", "summary.json"):
        assert (here / "my run" / name).read_bytes() == (here / "whole run" / name).read_bytes()


def test_signals_before_there_is_a_run_and_in_another_thread(here, capsys):
    code = main(Walk(lambda *_: os.kill(os.getpid(), signal.SIGINT)), "--out", "r")
    assert code == 130 and capsys.readouterr().out == "interrupted\n" and not os.listdir(".")

    def train():
        with Run(PROGRAM, Config(), "r") as run:
            walk(run)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert os.path.exists("r/summary.json")


@pytest.mark.parametrize("hook, culprit", [
    (lambda step, run, agent: agent["x"].fill(np.nan), "x loss became nan at step 1"),
    (lambda step, run, agent: agent["seen"].fill(np.inf if step > 7 else 0), "seen .* at step 10")])
def test_what_is_not_finite_stops_the_run_and_is_named(hook, culprit, capsys):
    """A loss at its step, an array when it is to be saved; the last checkpoint stays."""
    assert main(Walk(lambda step, *x: step and hook(step, *x)), "--out", "r") == 1
    said = capsys.readouterr().err
    assert re.search(culprit, said) and "--resume r" in said and said.count("\n") == 1
    assert read_run(PROGRAM, "r").agent["step"] == (0 if "loss" in culprit else 5)


@pytest.mark.parametrize("error", [MemoryError("8 TiB"), OverflowError("int too large")])
def test_sizes_that_are_too_large(error, here, capsys):
    def hook(*_):
        raise error

    assert main(Walk(hook), "--out", "r") == 2 and not os.listdir(".")
    said = capsys.readouterr().err
    assert said.startswith("walk.py: error: ") and str(error) in said and said.count("\n") == 1


def test_ctrl_c_while_modules_are_imported_is_one_line():
    done = subprocess.run([sys.executable, "-c", "import support; raise KeyboardInterrupt"],
                          cwd=HERE, capture_output=True, text=True)
    assert done.stderr == "interrupted\n" and done.returncode in (-signal.SIGINT, 130)


# -------------------------------------------------------------------------------- what is said


def test_stdout_that_takes_nothing_ends_no_run(monkeypatch, capsys):
    """Closed, as by `| head -1` or `>&-`; letters that the locale lacks are escaped."""
    read, write = os.pipe()
    os.close(read)
    with monkeypatch.context() as closed, contextlib.suppress(BrokenPipeError):
        with open(write, "w") as pipe:
            closed.setattr(sys, "stdout", pipe)
            assert main(Walk(), "--out", "r") == 0
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", None)
        assert main(Walk(), "--out", "s") == 0
    assert read_json("r/summary.json") == read_json("s/summary.json")
    assert capsys.readouterr().err == ""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    runs.say("r\u00fc")
    assert out.buffer.getvalue() == b"r\\xfc\n"             # at once, so that a log can be followed


def test_progress_leaves_the_warm_up_out_and_fits_a_terminal(monkeypatch):
    """A line every ten seconds, on a terminal one that is rewritten twice a second."""
    now = [0.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
    row = {"value_loss": -1.2345e-5, "high_loss": -1.2345e-5, "low_loss": -1.2345e-5, "gain": 1.0}
    for terminal, shown in ((False, [30, 100]), (True, [20, 30, 40, 100])):
        out = io.StringIO()
        out.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stdout", out)
        now[0] = 0.0
        run = Run(PROGRAM, Config())
        run.begin({"step": np.array(0)}, {}, 100, warmup=20)
        run.success = "0.25"
        for now[0], step in ((9.0, 20), (29.0, 30), (29.1, 31), (29.6, 40), (35, 104)):
            run.step(step, row)
        assert run.line_is_open is False
        said = re.findall(r"[^\r\n]+", out.getvalue().replace("\033[K", ""))
        assert [int(line.split("/")[0]) for line in said] == shown
        assert "ETA 2:20" in said[shown.index(30)]          # 70 steps, 10 took 20 seconds
        assert said[-1].endswith("success 0.25  ETA 0:00") and "value -1.2e-05" in said[-1]
        assert not terminal or "ETA -:--" in said[0]
        assert out.getvalue().count("\r") == (4 if terminal else 0)
        run.total = 10**9
        run._progress(10**9, {f"{name}_loss": -1.23e-100 for name in ("value", "high", "low")})
        assert max(map(len, re.findall(r"[^\r\n]+", out.getvalue().replace("\033[K", "")))) < 80


def test_seconds_speed_and_code_of_a_resumed_run(monkeypatch, capsys):
    """The time between is left out; the speed is that since --resume; code that has changed is
    noted."""
    now, codes = [0.0], [{"commit": "a", "versions": {}}, {"commit": "b", "versions": {}}]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])

    def hook(step, run, agent):
        now[0] += 4
        if step == 7:
            signal.raise_signal(signal.SIGTERM)

    assert re.fullmatch(r"[0-9a-f]{7}\+?|unknown", runs.code_and_versions()["commit"])
    monkeypatch.setattr(runs, "code_and_versions", lambda: codes[0])
    assert main(Walk(hook), "--out", "r") == 143
    now[0], saved = 1000.0, read_run(PROGRAM, "r")
    assert Run(PROGRAM, Config(), "r", saved).history == codes[:1] == saved.meta["history"]
    monkeypatch.setattr(runs, "code_and_versions", lambda: codes[1])
    run = Run(PROGRAM, Config(), "r", saved)
    assert run.seconds() == 32 and run.history == codes
    now[0] = 1010.0
    agent = {"x": np.zeros(3), "seen": np.zeros(2), "step": np.zeros((), np.int64)}
    run.begin(agent, generators(0, "walk"), 23)
    now[0] = 1020.0
    run.step(9, {})
    assert "ETA 1:10" in capsys.readouterr().out            # 14 steps, two took ten seconds


# ------------------------------------------------------------------------------- several seeds


def test_several_seeds_are_processes_of_their_own(here):
    """At once, with the flags that were given; seeds.csv has the summaries."""
    words = [sys.executable, os.path.join(HERE, "hiql.py"), *map(str, TINY[hiql][:-2]), "--env",
             "none", "--dataset", "data.npz", "--no-train-flat", "--seeds", "1-2", "--jobs", "2"]
    data_file("data.npz")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2
    folder = here / "runs" / "none_hiql_seeds1-2"
    rows = (folder / "seeds.csv").read_text().splitlines()
    assert len(rows) == 3 and [row.split(",")[2] for row in rows] == ["seed", "1", "2"]
    config = read_json(folder / "seed2" / "config.json")["config"]
    assert config["seed"] == 2 and config["train_flat"] is False


def test_names_and_flags_of_seeds(monkeypatch, capsys):
    """Folders are numbered; success is averaged; a failure is told by the exit code."""
    asked = []

    def run_processes(found, jobs):
        asked.append((found, jobs))
        for seed, success in (("5", 0.5), ("3", 1.0)):
            yield seed, {"seed": int(seed), "success": success}

    monkeypatch.setattr(runs, "run_processes", run_processes)
    words = ("--fast", "--hidden-dims", "4,5", "--quick", "--file=-z", "--jobs", 4)
    for name in ("runs/walk_walk_seeds3-5", "runs/walk_walk_seeds3-5_2"):
        assert main(Walk(), "--seeds", "3,5", *words) == 0
        found, jobs = asked.pop()
        assert jobs == 4 and list(found) == ["3", "5"]
        program, flags5, folder = found["5"]
        assert program == "walk.py" and folder == os.path.join(name, "seed5")
        assert sorted(flags5) == ["--fast", "--file=-z", "--hidden-dims=4,5", "--quick", "--seed=5"]
        assert "mean success 0.750, worst 0.500 of 2 seeds" in capsys.readouterr().out
        with open(os.path.join(name, "seeds.csv")) as file:
            assert file.read() == "seed,success\n3,1\n5,0.5\n"
    assert main(Walk(), "--seeds", "3-5", "--out", "r") == 1
    assert main(Walk(), "--seed", 0) == 0 and os.path.exists("runs/walk_walk_seed0")


def test_processes_are_begun_resumed_or_left(here, capsys):
    """At most `jobs` at once; a finished one is left; failures are told, a refusal is the last."""
    (here / "p.py").write_text(
        "import os, sys, time\nout = sys.argv[-1]\n"
        "open('order', 'a').write(os.path.basename(out) + ' ')\nprint('said', *sys.argv[1:])\n"
        "time.sleep(0.3)\nopen('order', 'a').write('end ')\n"
        "if 'wrong' in out: print('p.py: error: it does not fit'), sys.exit(2)\n"
        "sys.exit(3) if 'bad' in out else open(out + '/summary.json', 'w').write('{}')\n")
    found = {}
    for name in ("new", "bad", "done", "old", "wrong"):
        (here / name).mkdir()
        found[name] = str(here / "p.py"), ["--a"], str(here / name)
    (here / "old" / "checkpoint.npz").write_text("")
    (here / "done" / "summary.json").write_text('{"a": 1}')
    ended = []
    with pytest.raises(ValueError, match="^it does not fit$"):
        for x in runs.run_processes(found, 1):
            ended.append(x)
    assert ended == [("new", {}), ("done", {"a": 1}), ("old", {})]
    assert (here / "order").read_text() == "new end bad end old end wrong end "
    assert (here / "new.log").read_text() == f"said --a --out {here / 'new'}\n"
    assert (here / "old.log").read_text() == f"said --resume {here / 'old'}\n"
    assert capsys.readouterr().err == f"bad failed; see {here / 'bad'}.log\n"
    assert not (here / "wrong.log").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_seeds_say_how_to_go_on(number, here, monkeypatch, capsys):
    """Once the first seed has begun: it is stopped, and waited for."""
    (here / "walk.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), open('saved', 'w'), "
        f"sys.exit(143)))\nos.kill(os.getppid(), {int(number)})\ntime.sleep(60)\n")
    monkeypatch.setattr(runs, "HERE", str(here))
    assert main(Walk(), "--seeds", "0-1", "--out", "my seeds") == 128 + number
    assert os.path.exists("saved") and os.listdir("my seeds") == ["seed0.log"]
    assert "python walk.py --resume 'my seeds/seedN'" in capsys.readouterr().out
