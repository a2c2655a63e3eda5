"""Tests of a run: what is refused, its files, signals, progress, seeds.

Most of it by a program of a few lines that takes milliseconds; hiql.py and hiro.py where it is
about them.
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
from support import flags, runs
from support.runs import HERE, Program, Run, generators, open_run, read_json, read_run

# ------------------------------------------------------------------- a program of a few lines


@dataclasses.dataclass
class Config:
    env: str = flags.option("walk", "environment", ("walk", "run"))
    seed: int = flags.option(0, "seed", flags.NOT_NEGATIVE)
    steps: int = flags.option(23, "steps", flags.POSITIVE)
    hidden_dims: tuple = flags.option((2,), "sizes", flags.SIZES)
    fast: bool = flags.option(False, "a flag")
    file: str = flags.option("", "a text")


PROGRAM = Program("walk.py", Config, "step", ("x", "step"), {"old": 3})


class Walk:
    """A random walk, evaluated and saved every five steps; hook(step, run, agent): called before
    the first one and at each."""

    __name__ = "walk"

    def __init__(self, hook=lambda *_: None):
        self.hook = hook

    def train(self, run):
        rngs = generators(run.config.seed, "walk")
        agent = {"x": np.zeros(3), "seen": np.zeros(2), "step": np.zeros((), np.int64)}
        self.hook(0, run, agent)
        run.begin(agent, rngs, run.config.steps)
        for step in range(int(agent["step"]) + 1, run.config.steps + 1):
            agent["x"] += rngs["walk"].normal(size=3)
            agent["step"] += 1
            self.hook(step, run, agent)
            run.step(step, {"x_loss": agent["x"][0]})
            if step % 5 == 0:
                run.evaluated(step, {"success": float(agent["x"].mean())})
            if step % 5 == 0 or run.stopped:
                run.save(agent, rngs)
        run.save(agent, rngs)
        run.finish({"seed": run.config.seed, "success": float(agent["x"].mean())})

    def main(self):
        given, call = flags.parse(PROGRAM, "Walks.", {"quick": "in no time"})
        with runs.one_line_errors():
            config = flags.make_config(Config, {k: x for k, x in given.items() if k != "quick"})
            if call.seeds:
                return runs.run_seeds(PROGRAM, call, given, config)
            with open_run(PROGRAM, call, config) as run:
                self.train(run)


def signals(at, *numbers):
    """A hook that sends this process signals at a step."""
    def hook(step, run, agent):
        for number in numbers if step == at else ():
            signal.raise_signal(number)

    return hook


def main(program, *words):
    """`python walk.py WORDS` (or hiql.py, hiro.py) in this process; the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, words)])
        try:
            program.main()
        except SystemExit as e:
            return e.code or 0
    return 0


def content(folder):
    """{path: bytes} of all files below a folder."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test in a folder of its own; runs take no time, so that their files are the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: 0.0, sleep=time.sleep))
    for program in (hiql, hiro):
        monkeypatch.setattr(program, "draw", lambda *_: None)
    monkeypatch.setattr(envs.UMazeTask, "__init__", lambda task: envs.GoalEnv.__init__(
        task, envs.make("point-umaze"), 50))
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
    hiql: {"--stepz 5": "--steps", "--env point-tiny": "--env", "word": "word", "--out=": "--out",
           "--steps many": "--steps", "--steps 0": "--steps", "--steps 1000000001": "--steps",
           "--lr nan": "--lr", "--lr 0": "--lr", "--seed -1": "--seed", "--tau 2": "--tau",
           "--discount 1": "--discount", "--action-free 1": "--action-free",
           "--hidden-dims a": "--hidden-dims", "--hidden-dims 64,0": "--hidden-dims",
           "--goal-indices 1,1": "--goal-indices", "--rep-type phi": "--rep-type",
           "--subgoal-steps 201": "--subgoal-steps", "--env none": "--dataset",
           "--dataset nowhere.npz": "nowhere.npz", "--dataset note": "note",
           "--dataset /dev/null": "/dev/null", "--dataset pickled.npz": "pickled.npz",
           "--dataset good.npz --goal-indices 2": "--goal-indices",
           "--env grid-maze --dataset good.npz": "good.npz"},
    hiro: {"--correctoin none": "--correction", "--noise-correlation 1": "--noise-correlation",
           "--warmup 5": "--warmup", "--goal-range 0": "lab.gym"}}
BOTH = {"--jobs 2": "--jobs", "--seeds 0-1 --jobs 0": "--jobs", "--seeds 3-1": "3-1",
        "--seeds 0-1 --seed 0": "--seed", "--seeds 0-1 --steps 0": "--steps",
        "--seeds 0-1 --out full": "full", "--resume run --steps 5": "--resume",
        "--eval run --out new": "--eval", "--eval run --resume run": "--resume",
        "--resume nowhere": "nowhere", "--eval note": "note", "--resume full": "full",
        "--eval run": "walk.py", "--resume run": "walk.py", "--resume early": "early",
        "--eval early": "early", "--out note": "note", "--out full": "full", "--out run": "run"}


@pytest.mark.parametrize("program", [hiql, hiro])
def test_wrong_commands_are_refused(program, here, capsys):
    """Exit code 2, one line on stderr that names the culprit, nothing written or overwritten.

    note: a file; full: a folder with a file; run: one of walk.py; early: of an earlier version.
    """
    (here / "note").write_text("mine")
    (here / "full").mkdir()
    (here / "full" / "thing").write_text("mine")
    assert main(Walk(), "--out", "run") == 0
    (here / "early").mkdir()
    np.savez("early/checkpoint.npz", **{"params/w": np.ones(2)})
    data_file("good.npz")
    data_file("pickled.npz", actions=np.array([{}], object))
    before = content(here)
    capsys.readouterr()
    for words, culprit in {**COMMANDS[program], **BOTH}.items():
        assert main(program, *words.split()) == 2, words
        said = capsys.readouterr().err
        assert said.startswith(f"{program.__name__}.py: error: ") and said.count("\n") == 1, said
        assert culprit in said and content(here) == before, (words, said)


@pytest.mark.parametrize("program", [hiql, hiro])
def test_every_flag_reaches_the_config(program, monkeypatch, capsys):
    """As a typed word, also as a process of --seeds gets it; --help has each of them."""
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


def test_seeds_are_a_range_or_a_list():
    for text, seeds in (("3", [3]), ("0-2,7", [0, 1, 2, 7]), ("5, 1", [5, 1]), ("4-4", [4])):
        assert flags.seed_range(text) == seeds
    for text in ("", "1-", "-1", "1-2-3", "1.5", "1000000000", "0-3,2", "0-10000", "0-999999999"):
        with pytest.raises(ValueError, match="^seeds are "):
            flags.seed_range(text)


def test_a_run_says_what_code_it_was_made_with(here, monkeypatch):
    """The commit, with + where Python files differ from it; no other file matters."""
    def git(*words):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words], check=True,
                       capture_output=True)

    monkeypatch.setattr(runs, "HERE", str(here))
    made_with = runs.code_and_versions.__wrapped__
    assert made_with()["commit"] == "unknown" and made_with()["versions"]["numpy"] == np.__version__
    (here / "a.py").write_text("1")
    for words in (("init",), ("add", "a.py"), ("commit", "-m", "x")):
        git(*words)
    assert re.fullmatch("[0-9a-f]{7}", commit := made_with()["commit"])
    (here / "a.txt").write_text("1")
    assert made_with()["commit"] == commit
    (here / "b.py").write_text("1")
    assert made_with()["commit"] == f"{commit}+"


def test_tables_have_a_column_for_each_key(here):
    runs.write_rows("r.csv", [{"a": 1, "b": 1 / 3}, {"a": None, "c": [None, 0.5], "b": "x"}])
    assert (here / "r.csv").read_text() == "a,b,c\n1,0.333333,\n,x,nan 0.5\n"


def test_a_full_disk_at_any_write_loses_nothing(here, monkeypatch, capsys):
    """No file is written in part, the error names the path, and --resume leaves the same bytes as
    a run that was never stopped; before the first checkpoint there is nothing to go on with."""
    save = ["checkpoint.npz", "train.csv", "eval.csv"]
    files = [*save, "config.json", *save * 5, "summary.json"]
    plain, calls, fails = os.replace, [], None

    def replace(old, new):
        calls.append(os.path.basename(new))
        if len(calls) == fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(old, new)

    monkeypatch.setattr(os, "replace", replace)
    assert main(Walk(), "--out", "r") == 0 and calls == files
    (here / "r" / "config.json").unlink()                               # has the flags
    whole = content(here)
    for fails in range(1, len(files) + 1):
        shutil.rmtree("r")
        calls.clear()
        capsys.readouterr()
        assert main(Walk(), "--out", "r") == (2 if fails <= 4 else 1)
        said = capsys.readouterr().err
        assert os.path.join("r", files[fails - 1]) in said and said.count("\n") == 1
        assert not list(here.rglob("*.tmp")) and ("--resume r" in said) == (fails > 4)
        assert main(Walk(), "--resume", "r") == (2 if fails == 1 else 0)
        (here / "r" / "config.json").unlink(missing_ok=True)
        assert fails == 1 or content(here) == whole, fails


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
    (dict(training__rng=np.array("{")), "checkpoint.npz"),
    (dict(training__rng=np.array("{}")), "walk"),
    (dict(acting__x=np.array([{}], object)), "checkpoint.npz"),
    (dict(meta=lambda x: {**x, "program": "hiql.py"}), "hiql.py"),
    (dict(meta=lambda x: {"program": "walk.py"}), "checkpoint.npz"),
    (dict(meta=lambda x: {**x, "config": {**x["config"], "steps": "5"}}), "--steps"),
    (dict(meta=lambda x: {**x, "config": {**x["config"], "old": 4}}), "old"),
    (dict(meta=lambda x: {**x, "config": {**x["config"], "unknown": 4}}), "unknown"), ({}, None)])
def test_what_does_not_fit_is_not_gone_on_with(changes, culprit, here, capsys):
    """Names, shapes, dtypes, finite numbers, generators, the program, its settings; nothing is
    unpickled. None: a file that is no archive."""
    assert main(Walk(signals(7, signal.SIGTERM)), "--out", "r") == 143
    edited("r", **changes)
    if culprit is None:
        culprit = "checkpoint.npz"
        (here / "r" / culprit).write_bytes(b"PK\3\4 no archive")
    before = content(here)
    capsys.readouterr()
    assert main(Walk(), "--resume", "r") == 2
    said = capsys.readouterr().err
    assert culprit in said and said.count("\n") == 1 and content(here) == before


def test_settings_of_other_versions():
    """One that is missing has its default; a former one is ignored at its old default."""
    def change(meta):
        meta["config"].pop("hidden_dims")
        return {**meta, "config": {**meta["config"], "old": 3}}

    assert main(Walk(), "--out", "r", "--steps", 9) == 0
    edited("r", change)
    assert read_run(PROGRAM, "r").config == Config(steps=9)


@pytest.mark.parametrize("program", [hiql, hiro])
def test_a_run_of_each_program(program, here, capsys, monkeypatch):
    """Its files; --eval and --resume of it; an agent to give away, without what training needs.
    Pictures are drawn once, before the summary says that the run is finished."""
    drawn = []
    monkeypatch.setattr(program, "draw", lambda run, *_: drawn.append(os.listdir(run.folder)))
    assert main(program, *TINY[program], "--out", "r", "--seed", 4) == 0
    assert len(drawn) == 1 and "summary.json" not in drawn[0]
    assert set(os.listdir("r")) == {"config.json", "train.csv", "eval.csv", "checkpoint.npz",
                                    "summary.json"}
    summary, begun = read_json("r/summary.json"), read_json("r/config.json")
    assert summary["seed"] == 4 == begun["config"]["seed"] and begun["argv"][-1] == "4"
    whole = content(here)
    capsys.readouterr()
    assert main(program, "--eval", "r") == 0
    printed = capsys.readouterr().out
    assert f"success: {round(summary['success'], 4)}\n" in printed
    assert main(program, "--resume", "r") == 0 and "finished" in capsys.readouterr().out
    assert content(here) == whole
    os.unlink("r/summary.json")
    arrays = runs.load_arrays("r/checkpoint.npz")
    np.savez("r/checkpoint.npz", **{name: x for name, x in arrays.items()
                                    if name == "meta" or name.startswith("acting/")})
    assert program.load("r") and main(program, "--eval", "r") == 0
    assert capsys.readouterr().out == printed
    assert main(program, "--resume", "r") == 2 and "r: " in capsys.readouterr().err


def test_what_there_is_not_yet_or_no_more(monkeypatch, capsys):
    """No evaluation in HIRO's warm-up or before HIQL's policies; no going on with other data."""
    plain = Run.step

    def step(run, now, row):
        plain(run, now, row)
        if now >= 13:
            signal.raise_signal(signal.SIGINT)

    data_file("data.npz")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", step)
        assert main(hiro, *TINY[hiro], "--warmup", 80, "--out", "early") == 130
        assert main(hiql, *TINY[hiql], "--policy-steps", 5, "--out", "value") == 130
        assert main(hiql, *TINY[hiql][:5], "--dataset", "data.npz", "--out", "alone") == 130
    data_file("data.npz", actions=np.tile(np.float32([0.11, 0]), (101, 1)))
    for program, words, culprit in ((hiro, "--eval early", "warm-up"),
                                    (hiql, "--eval value", "13 updates"),
                                    (hiql, "--eval alone", "data alone"),
                                    (hiql, "--resume alone", "data")):
        capsys.readouterr()
        assert main(program, *words.split()) == 2 and culprit in capsys.readouterr().err
    assert hiql.load("alone")(np.zeros((1, 2)), np.ones((1, 2)), 0).shape == (1, 2)


# --------------------------------------------------------------------------------- what ends it


@pytest.mark.parametrize("numbers, code, step", [
    ([signal.SIGINT], 130, 7), ([signal.SIGTERM], 143, 7), ([signal.SIGTERM] * 2, 143, 7),
    ([signal.SIGINT] * 2, 130, 5)])
def test_signals_save_and_say_how_to_go_on(numbers, code, step, here, capsys):
    """At the next save; a second Ctrl-C does not wait for it. The handlers are given back."""
    before = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    assert main(Walk(), "--out", "whole run") == 0
    assert main(Walk(signals(7, *numbers)), "--out", "my run") == code
    assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)] == before
    assert capsys.readouterr().out.endswith("go on with: python walk.py --resume 'my run'\n")
    assert read_run(PROGRAM, "my run").agent["step"] == step
    assert main(Walk(), "--resume", "my run") == 0
    for name in ("checkpoint.npz", "train.csv", "eval.csv", "summary.json"):
        assert (here / "my run" / name).read_bytes() == (here / "whole run" / name).read_bytes()


def test_signals_before_there_is_a_run_and_runs_in_another_thread(here, capsys):
    assert main(Walk(signals(0, signal.SIGINT)), "--out", "r") == 130
    assert capsys.readouterr().out == "interrupted\n" and not os.listdir(".")
    words = "import support; support.one_line_interrupts(); raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", words], cwd=HERE, capture_output=True, text=True)
    assert done.stderr == "interrupted\n" and done.returncode in (-signal.SIGINT, 130)
    assert sys.excepthook is sys.__excepthook__ or "support" not in sys.excepthook.__module__

    def train():
        with Run(PROGRAM, Config(), "r") as run:
            Walk().train(run)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert os.path.exists("r/summary.json")


def test_the_same_command_goes_on(here, capsys):
    """As a job does that is queued again; one with other flags is refused; two processes never
    share a folder."""
    assert main(Walk(), "--out", "whole") == 0
    assert main(Walk(signals(7, signal.SIGUSR1)), "--out", "r") == 128 + signal.SIGUSR1
    before = content(here)
    assert main(Walk(), "--out", "r", "--steps", 9) == 2 and content(here) == before
    assert "r already holds a run, with --steps 23" in capsys.readouterr().err
    held = subprocess.Popen([sys.executable, "-c", "import fcntl, os, sys, time\n"
                             "fcntl.flock(os.open('r', os.O_RDONLY), fcntl.LOCK_EX)\n"
                             "print('locked', flush=True); time.sleep(60)"],
                            stdout=subprocess.PIPE, text=True)
    assert held.stdout.readline() == "locked\n"
    for words in (("--out", "r"), ("--resume", "r")):
        assert main(Walk(), *words) == 2 and content(here) == before
        assert "r is in use by another process" in capsys.readouterr().err
    held.kill()                                             # the system frees the lock
    held.wait()
    assert main(Walk(), "--out", "r") == 0 and "going on with r" in capsys.readouterr().out
    assert read_run(PROGRAM, "r").meta["history"] == [runs.code_and_versions()]     # no other code
    for name in ("checkpoint.npz", "train.csv", "eval.csv", "summary.json"):
        assert (here / "r" / name).read_bytes() == (here / "whole" / name).read_bytes()
    before = content(here)
    assert main(Walk(), "--out", "r") == 0 and "r is finished" in capsys.readouterr().out
    assert content(here) == before and os.path.realpath("r") not in runs.LOCKED


def test_two_processes_that_begin_in_one_folder(here, monkeypatch):
    """The folder is free when both look, and one of them gets it."""
    def hook(step, run, agent):
        if step == 0:
            (here / "r").mkdir()
            (here / "r" / "checkpoint.npz").write_text("of the other")

    assert main(Walk(hook), "--out", "r") == 2
    assert (here / "r" / "checkpoint.npz").read_text() == "of the other"


def test_no_link_is_followed_and_nothing_temporary_stays(here):
    """What a killed process left is removed."""
    (here / "mine").write_text("mine")
    (here / "r").mkdir()
    for name in ("config.json", "checkpoint.npz", "summary.json"):
        for number in (os.getpid(), 12345):
            (here / "r" / f"{name}.{number}.tmp").symlink_to(here / "mine")
    assert main(Walk(), "--out", "r") == 0
    assert (here / "mine").read_text() == "mine" and not list((here / "r").glob("*.tmp"))


def test_handlers_are_given_back_and_what_is_ignored_stays_so(here):
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
    before = [signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else
                            signal.default_int_handler) for number in numbers]
    seen = []
    try:
        assert main(Walk(lambda *_: seen.append(list(map(signal.getsignal, numbers)))), "--out",
                    "r") == 0
        assert seen[0][3] == signal.SIG_IGN                 # nohup
        assert signal.default_int_handler not in seen[0]
        assert list(map(signal.getsignal, numbers)) == [signal.default_int_handler] * 3 + [
            signal.SIG_IGN]
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def test_what_flags_cannot_say_is_not_gone_on_without(here, capsys):
    """A run in an environment from Python neither is evaluated nor goes on in its config's."""
    class Own(envs.UMazeTask):
        """Another task than the U-maze, with the same sizes."""

    config = hiro.resolve({"steps": 90, "warmup": 20, "eval_interval": 50, "eval_episodes": 1,
                           "batch_size": 8, "high_updates": 1, "hidden_dims": (8,)})
    hiro.train(Own(), config, Run(hiro.PROGRAM, config, "r"))
    os.unlink("r/summary.json")
    before = content(here)
    for flag in ("--eval", "--resume"):
        assert main(hiro, flag, "r") == 2 and content(here) == before
        assert "the environment point-umaze from Python" in capsys.readouterr().err
    hiro.train(Own(), config, Run(hiro.PROGRAM, config, "r", read_run(hiro.PROGRAM, "r")))


@pytest.mark.parametrize("first, name, culprit, kept", [
    (1, "x", "x loss .* nan at step 1", 0), (8, "seen", "seen .* at step 10", 5)])
def test_what_is_not_finite_stops_the_run_and_is_named(first, name, culprit, kept, capsys):
    """A loss at its step, an array when it is to be saved; the last checkpoint stays, and nobody
    is told to go on from it."""
    def hook(step, run, agent):
        if step >= first:
            agent[name][:] = np.nan

    assert main(Walk(hook), "--out", "r") == 1
    said = capsys.readouterr().err
    assert re.search(culprit, said) and "--resume" not in said and said.count("\n") == 1
    assert read_run(PROGRAM, "r").agent["step"] == kept


def test_a_closed_stdout_ends_no_run(monkeypatch):
    """As by `| head -1`."""
    read, write = os.pipe()
    os.close(read)
    with monkeypatch.context() as closed, contextlib.suppress(BrokenPipeError):
        with open(write, "w") as pipe:
            closed.setattr(sys, "stdout", pipe)
            assert main(Walk(), "--out", "r") == 0
    assert os.path.exists("r/summary.json")


def test_other_stdouts_end_no_run(here, monkeypatch, capfd):
    """None, as under pythonw; one whose locale lacks a letter."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(Walk(), "--out", "r") == 0
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(Walk(), "--out", "r\u00e9sultat") == 0
    sys.stdout.flush()
    assert b"files in r\\xe9sultat" in sys.stdout.buffer.getvalue()


def test_sizes_beyond_the_machine_are_one_line(here, capsys):
    def hook(step, run, agent):
        raise MemoryError("no room")

    assert main(Walk(hook), "--out", "r") == 2
    assert "too large for this machine (no room)" in capsys.readouterr().err


def test_generators_are_of_their_seed_and_their_own():
    def draws(seed):
        return [rng.random() for rng in generators(seed, "a", "b").values()]

    assert draws(1) == draws(1) and len({*draws(1), *draws(2)}) == 4


def test_rows_of_training_are_kept_now_and_then():
    """Every 500 steps, every 100 updates."""
    for counter, kept in (("step", [500, 1000]), ("update", [100, 200, 300])):
        run = Run(Program("x.py", Config, counter, ()), SimpleNamespace(eval_interval=1000, seed=0))
        run.begin({counter: np.array(0)}, {}, 10_000)
        for count in range(1, kept[-1] + 1):
            run.step(count, {"x_loss": 1.0})
        assert [row[counter] for row in run.logs["train"]] == kept


@pytest.mark.parametrize("terminal, shown", [(False, [30, 100]), (True, [20, 30, 40, 100])])
def test_progress_leaves_the_warm_up_out_and_fits_a_terminal(terminal, shown, monkeypatch):
    """A line every ten seconds, on a terminal one that is rewritten twice a second."""
    now, out = [0.0], io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
    run, row = Run(PROGRAM, Config()), {"low_loss": -1.2345e-5, "gain": 1.0}
    run.begin({"step": np.array(0)}, {}, 100, warmup=20)
    run.evaluated(10, {"return": -2.5})
    assert run.result == "success -  return -2.5"
    run.evaluated(10, {"success": 0.25})
    for now[0], step in ((9.0, 20), (29.0, 30), (29.1, 31), (29.6, 40), (35, 104)):
        run.step(step, row)
    said = re.findall(r"[^\r\n]+", out.getvalue().replace("\033[K", ""))
    assert [int(line.split("/")[0]) for line in said] == shown
    assert "ETA 2:20" in said[shown.index(30)]              # 70 steps, 10 took 20 seconds
    assert said[-1].endswith("low -1.23e-05  success 0.25  ETA 0:00")
    assert out.getvalue().count("\r") == (4 if terminal else 0)
    run.total = 10**9
    run.step(10**9, {f"{name}_loss": -1.23e-100 for name in ("value", "high", "low")})
    assert max(map(len, re.findall(r"[^\r\n]+", out.getvalue().replace("\033[K", "")))) < 80


# ------------------------------------------------------------------------------- several seeds


def seed_program(here, monkeypatch):
    """A walk.py to be run as processes: seed 7 fails, seed 8 refuses its input."""
    monkeypatch.setattr(runs, "HERE", str(here))
    (here / "walk.py").write_text("""
import json, os, sys, time
print("said", *sys.argv[1:])
folder = sys.argv[-1]
name = os.path.basename(folder)
with open("order", "a") as order:
    order.write(f"{name} ")
    order.flush()
    time.sleep(0.3)
    order.write("end ")
if name == "seed7":
    sys.exit(3)
if name == "seed8":
    print("walk.py: error: it does not fit")
    sys.exit(2)
os.makedirs(folder, exist_ok=True)
with open(os.path.join(folder, "summary.json"), "w") as file:
    json.dump({"seed": int(name[4:]), "success": 1 / int(name[4:])}, file)
""")


def test_several_seeds_are_processes_of_their_own(here, monkeypatch, capsys):
    """With the flags that were given; seeds.csv has the summaries; a failure is told by the exit
    code; a refusal is the last word."""
    seed_program(here, monkeypatch)
    words = ("--no-fast", "--hidden-dims", "4,5", "--quick", "--file=-z", "--jobs", 2)
    for name in ("runs/walk_walk_seeds5-4", "runs/walk_walk_seeds5-4_2"):
        assert main(Walk(), "--seeds", "5,4", *words) == 0
        assert "mean success 0.225, worst 0.200 of 2 seeds" in capsys.readouterr().out
        assert (here / name / "seeds.csv").read_text() == "seed,success\n4,0.25\n5,0.2\n"
        said = (here / name / "seed5.log").read_text().split()
        assert sorted(said[1:-2]) == ["--file=-z", "--hidden-dims=4,5", "--no-fast", "--quick",
                                      "--seed=5"]
    assert main(Walk(), "--seeds", "6-7", "--out", "some") == 1
    assert capsys.readouterr().err.startswith("seed7 failed; see some/seed7.log\n")
    assert main(Walk(), "--seeds", "8", "--out", "none") == 2
    assert capsys.readouterr().err == "walk.py: error: it does not fit\n"
    assert not os.path.exists("none")


def test_so_many_seeds_at_once_as_are_asked_for(here, monkeypatch):
    """And they find the user's own modules."""
    seed_program(here, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(here / "mine"))
    (here / "mine").mkdir()
    (here / "mine" / "own.py").write_text("")
    with open("walk.py", "a") as file:
        file.write("import own\n")
    for jobs, order in ((1, ["seed1", "end", "seed2", "end"]), (2, ["end", "end"])):
        (here / "order").unlink(missing_ok=True)
        assert main(Walk(), "--seeds", "1-2", "--out", f"jobs{jobs}", "--jobs", jobs) == 0
        assert (here / "order").read_text().split()[-len(order):] == order


def test_the_same_seeds_go_on(here, capsys, monkeypatch):
    """Those that are stopped or missing; other flags, other seeds and foreign files are refused."""
    seed_program(here, monkeypatch)
    assert main(Walk(signals(7, signal.SIGTERM)), "--seed", 4, "--out", "s/seed4") == 143
    before = content(here)
    for words, culprit in (("--seeds 4-5 --steps 9", "with --steps 23"), ("--seeds 5-6", "seed4")):
        assert main(Walk(), *words.split(), "--out", "s") == 2 and content(here) == before
        assert culprit in capsys.readouterr().err
    for order in ("seed4 end seed5 end ", ""):
        assert main(Walk(), "--seeds", "4-5", "--out", "s") == 0
        assert (here / "s" / "seeds.csv").read_text() == "seed,success\n4,0.25\n5,0.2\n"
        assert (here / "order").read_text() == order or not order
    assert (here / "s" / "seed4.log").read_text() == "said --resume s/seed4\n"


def test_processes_are_begun_resumed_or_left(here, monkeypatch):
    """At most `jobs` at once; a finished one is left."""
    seed_program(here, monkeypatch)
    for name, file in (("seed2", "checkpoint.npz"), ("seed3", "summary.json")):
        (here / name).mkdir()
        (here / name / file).write_text("3")
    found = {seed: ("walk.py", ["--a"], f"seed{seed}") for seed in "123"}
    ended = dict(runs.run_processes(found, 1))
    assert ended == {"1": {"seed": 1, "success": 1}, "2": {"seed": 2, "success": 0.5}, "3": 3}
    assert (here / "order").read_text() == "seed1 end seed2 end "
    assert (here / "seed1.log").read_text() == "said --a --out seed1\n"
    assert (here / "seed2.log").read_text() == "said --resume seed2\n"


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
    assert "the same command with --out 'my seeds'" in capsys.readouterr().out
