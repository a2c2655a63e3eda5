"""Tests of support/run.py and support/flags.py by a program of a few lines that takes milliseconds.

    python -m pytest support/test_main.py           a few seconds

Kills and full disks at every file that is written, signals, foreign files, odd terminals, the
schedule of evaluations. hiql.py and hiro.py themselves are run in test_run.py.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import contextlib
import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from support import run as harness
from support.files import load_tree, read_json, read_rows, write_json, write_text
from support.flags import (NOT_NEGATIVE, POSITIVE, SIZES, check_ranges, exit_with_error, option,
                           refuse_unused, seed_range, sizes, text_of)
from support.run import HERE, Run, generators, minutes, run_processes, show
from support.test_run import run


@dataclass
class Config:
    env: str = option("walk", "environment", ("walk", "run"))
    seed: int = option(0, "seed", NOT_NEGATIVE)
    steps: int = option(23, "steps", POSITIVE)
    size: int = option(3, "numbers in the agent", POSITIVE)
    hidden_dims: tuple = option((2,), "sizes", SIZES)
    fast: bool = option(False, "a flag")
    file: str = option("", "a text")


def make_program(**changes):
    """A program whose agent takes random steps; episodes of three steps, evaluation every five;
    no losses at the first two."""
    def resolve(given):
        config = Config(**{name: x for name, x in given.items() if name != "quick"})
        check_ranges(config)
        return config

    def prepare(config, checkpoint=None):
        return SimpleNamespace(config=config, rngs=generators(config.seed, "walk"),
                               train=lambda *words: program.train(*words))

    def learn(agent, config, rng):
        while agent["step"] < config.steps:
            for _ in range(3):
                agent["x"] += rng.normal(size=agent["x"].shape)
                agent["step"] += 1
                row = {"x_loss": agent["x"][0], "extra": 1} if agent["step"] > 2 else {}
                yield row, agent["step"] % 3 == 0

    def draw(problem, agent, run):
        write_text(run.path("curve.png"), f"{agent['x'].tolist()} {run.logs['train']}")

    def train(problem, run):
        config = problem.config
        agent = {"x": np.zeros(config.size), "step": np.zeros((), np.int64)}
        run.restore(agent, problem.rngs)

        def evaluation():
            return {"success": float(agent["x"].mean())} if agent["step"] > 3 else None

        last = run.drive(program.learn(agent, config, problem.rngs["walk"]), agent, problem.rngs,
                         config.steps, evaluation, 5, 2)
        run.finish({"seed": config.seed, **(last or evaluation())},
                   lambda: program.draw(problem, agent, run))

    program = SimpleNamespace(
        Config=Config, COUNTER="step", resolve=resolve, prepare=prepare, train=train, learn=learn,
        draw=draw, __name__="walk", __file__=os.path.join(HERE, "walk.py"), __doc__="Walks.\n\n",
        evaluate_checkpoint=lambda problem, agent: {"success": float(agent["x"].mean())})
    vars(program).update(changes)
    return program


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test in a folder of its own; runs take no time, so that their files are the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: 0.0,
                                                         sleep=time.sleep))
    monkeypatch.setattr(harness, "resource", None)
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell's "&" ignores it
    yield tmp_path
    for number, handler in old.items():
        signal.signal(number, handler)


def content(folder):
    return {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}


def interrupted_at(step, *numbers):
    """The program, which receives these signals at that step."""
    def learn(agent, *arguments):
        for result in program.plain(agent, *arguments):
            if agent["step"] == step:
                for number in numbers:
                    os.kill(os.getpid(), number)
            yield result

    program = make_program(learn=learn)
    program.plain = make_program().learn
    return program


# --------------------------------------------------------------------- kills, full disks, signals


class Killed(BaseException):
    """What nothing catches."""


def replace_fails_at(monkeypatch, n, error):
    """os.replace raises the error at the n-th call; at a kill nobody removes what is left."""
    plain, calls = os.replace, []

    def replace(old, new):
        calls.append(new)
        if len(calls) == n:
            raise error
        plain(old, new)

    monkeypatch.setattr(os, "replace", replace)
    if isinstance(error, Killed):
        monkeypatch.setattr(os, "unlink", lambda path: None)
    return calls


WRITES = ["config.json", *["train.csv", "eval.csv", "checkpoint.npz"] * 5, "curve.png",
          "summary.json"]


def test_the_order_of_writes(monkeypatch):
    """Logs before the checkpoint that goes on after them; the summary, which ends a run, last."""
    calls = replace_fails_at(monkeypatch, 0, None)
    assert run(make_program(), "--out", "r") == 0
    assert calls == [os.path.join("r", name) for name in WRITES]


@pytest.mark.parametrize("n", range(1, len(WRITES) + 1))
def test_a_kill_between_any_two_writes_loses_nothing(n, monkeypatch):
    assert run(make_program(), "--out", "r") == 0
    whole = content("r")
    shutil.move("r", "whole")
    with monkeypatch.context() as killing:
        replace_fails_at(killing, n, Killed())
        with pytest.raises(Killed):
            run(make_program(), "--out", "r")
    assert f"{WRITES[n - 1]}.tmp" in os.listdir("r")
    begun = "checkpoint.npz" in os.listdir("r")
    assert begun == (n > 4)
    assert run(make_program(), *(("--resume", "r") if begun else ("--out", "r"))) == 0
    assert content("r") == whole


@pytest.mark.parametrize("n", range(1, len(WRITES) + 1))
def test_a_full_disk_at_any_write_ends_in_one_line(n, monkeypatch, capsys):
    assert run(make_program(), "--out", "r") == 0
    whole = content("r")
    shutil.move("r", "whole")
    with monkeypatch.context() as full:
        replace_fails_at(full, n, OSError(errno.ENOSPC, "No space left on device"))
        assert run(make_program(), "--out", "r") == (2 if n == 1 else 1)
    said = capsys.readouterr().err
    file = os.path.join("r", WRITES[n - 1])
    assert said == (f"walk.py: error: {file}: No space left on device\n" if n == 1 else
                    f"walk.py: stopped: {file}: No space left on device; "
                    + ("go on with: python walk.py --resume r\n" if n > 4 else
                       "there is no checkpoint yet\n"))
    if n <= 4:                                          # nothing is left behind
        assert not os.path.exists("r")
        assert run(make_program(), "--out", "r") == 0
    else:
        assert not [name for name in os.listdir("r") if name.endswith(".tmp")]
        assert run(make_program(), "--resume", "r") == 0
    assert content("r") == whole


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limits of file sizes")
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_full_half_way_leaves_the_old_checkpoint(capsys):
    import resource

    def learn(agent, *arguments):
        for result in make_program().learn(agent, *arguments):
            if agent["step"] == 13:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
            yield result

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        assert run(make_program(learn=learn), "--out", "r", "--size", 10_000) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert capsys.readouterr().err == (f"walk.py: stopped: {os.path.join('r', 'checkpoint.npz')}: "
                                       "File too large; go on with: python walk.py --resume r\n")
    assert load_tree("r/checkpoint.npz")["step"] == 12 and not [
        name for name in os.listdir("r") if name.endswith(".tmp")]


@pytest.mark.parametrize("numbers, code", [
    ([signal.SIGINT], 130), ([signal.SIGTERM], 143), ([signal.SIGTERM, signal.SIGTERM], 143),
    ([signal.SIGINT, signal.SIGTERM], 143)])
def test_signals_save_at_the_end_of_the_episode(numbers, code, capsys):
    assert run(make_program(), "--out", "whole run") == 0
    assert run(interrupted_at(7, *numbers), "--out", "my run") == code
    assert capsys.readouterr().out.endswith(
        "interrupted; go on with: python walk.py --resume 'my run'\n")
    assert load_tree("my run/checkpoint.npz")["step"] == 9              # no evaluation is due
    assert not os.path.exists("my run/summary.json")
    assert run(make_program(), "--resume", "my run") == 0
    whole, resumed = content("whole run"), content("my run")
    whole.pop("config.json"), resumed.pop("config.json")            # --out differs
    assert resumed == whole


def test_a_second_ctrl_c_does_not_wait(capsys):
    assert run(interrupted_at(13, signal.SIGINT, signal.SIGINT), "--out", "r") == 130
    assert load_tree("r/checkpoint.npz")["step"] == 12
    assert capsys.readouterr().out.endswith("interrupted; go on with: python walk.py --resume r\n")
    assert run(interrupted_at(2, signal.SIGINT, signal.SIGINT), "--out", "s") == 130
    assert capsys.readouterr().out.endswith("interrupted; there is no checkpoint yet\n")
    assert not os.path.exists("s")


def test_ctrl_c_while_modules_are_imported_is_one_line():
    done = subprocess.run([sys.executable, "-c", "import support; raise KeyboardInterrupt"],
                          cwd=HERE, capture_output=True, text=True)
    assert done.stderr == "interrupted\n" and done.returncode in (-signal.SIGINT, 130)
    done = subprocess.run([sys.executable, "-c", "import support; 1 / 0"], cwd=HERE,
                          capture_output=True, text=True)
    assert done.stderr.startswith("Traceback") and "ZeroDivisionError" in done.stderr


# ---------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("name", ["config.json", "train.csv", "eval.csv", "curve.png", "notes",
                                  "summary.json", "checkpoint.npz"])
@pytest.mark.parametrize("words", [(), ("--seeds", "0-1")])
def test_a_folder_with_files_is_left_as_it_is(name, words, capsys):
    os.mkdir("r")
    write_text(os.path.join("r", name), "mine")
    assert run(make_program(), "--out", "r", *words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "choose another --out" in said
    assert ("already holds a run" if name[0] in "s" or name[1] == "h" else name) in said
    assert content("r") == {name: b"mine"}


def test_a_run_begins_again_only_where_the_same_one_was_killed(capsys):
    """Before its first checkpoint: by config.json, and no other files beside it."""
    os.makedirs("r")
    assert run(make_program(), "--out", "r") == 0                       # an empty folder is free
    whole = content("r")
    for name in ("checkpoint.npz", "summary.json", "curve.png"):
        os.unlink(os.path.join("r", name))
    left = content("r")
    for flag in ("--resume", "--eval"):
        assert run(make_program(), flag, "r") == 2
        assert "r has no checkpoint.npz" in capsys.readouterr().err
    assert run(make_program(), "--out", "r", "--steps", 24) == 2        # another run's
    assert content("r") == left
    write_text("r/notes", "mine")
    assert run(make_program(), "--out", "r") == 2
    os.unlink("r/notes")
    write_text("r/config.json.tmp", "half")                             # harmless
    assert run(make_program(), "--out", "r") == 0 and content("r") == whole
    for text in ("{", "[]", "{}", "null"):
        shutil.rmtree("r")
        os.makedirs("r")
        write_text("r/config.json", text)
        assert run(make_program(), "--out", "r") == 2
        assert content("r") == {"config.json": text.encode()}


def test_a_file_is_no_folder(capsys):
    write_text("r", "mine")
    assert run(make_program(), "--out", "r") == 2
    assert capsys.readouterr().err == "walk.py: error: [Errno 20] Not a directory: 'r'\n"
    assert content(".") == {"r": b"mine"}


def test_names_of_folders(monkeypatch):
    """Those of several seeds have numbers of their own."""
    monkeypatch.setattr(Config, "__module__", "some.walk")
    asked = []
    monkeypatch.setattr(harness, "run_processes", lambda runs, jobs, done: asked.append(
        (runs, jobs)) or [])
    for name in ("walk_walk_seed0", "walk_walk_seed0_2", "walk_walk_seed0_3"):
        assert run(make_program(), "--seed", 0) == 0
        assert os.path.exists(os.path.join("runs", name, "summary.json"))
    words = ("--seeds", "3,5", "--fast", "--hidden-dims", "4,5", "--no-fast", "--file=-z",
             "--jobs", 4)
    for name in ("runs/walk_walk_seeds3-5", "runs/walk_walk_seeds3-5_2"):
        assert run(make_program(), *words) == 0
        runs, jobs = asked.pop()
        assert jobs == 4 and list(runs) == ["3", "5"]
        program, words5, folder = runs["5"]
        assert program == [os.path.join(HERE, "walk.py")]
        assert words5 == ["--no-fast", "--hidden-dims=4,5", "--file=-z", "--seed=5"]
        assert folder == os.path.join(name, "seed5") and os.path.isdir(name)
    assert run(make_program(), "--seeds", "1", "--quick", "--fast") == 0
    runs, jobs = asked.pop()
    assert jobs == 1 and runs["1"][1] == ["--quick", "--fast", "--seed=1"]


# ----------------------------------------------------------------------------------- the flags


@pytest.mark.parametrize("words, message", [
    *(([f"--{name}="], f"argument --{name}: is empty") for name in (
        "out", "resume", "eval", "seeds", "file")),
    ("--env wlak", "argument --env: invalid choice 'wlak' (did you mean walk?); choose from walk, "
     "run"),
    ("--hidden-dims a", "argument --hidden-dims: must be integers as in 128,128, not 'a'"),
    ("--hidden-dims 1000001", "--hidden-dims must be positive sizes such as 128,128, not "
     "(1000001,)"), ("--hidden-dims 4,0", "--hidden-dims must be positive sizes"),
    ("--steps 1000000001", "--steps must be at most 1000000000, not 1000000001"),
    ("--steps 1" + 400 * "0", "--steps must be at most 1000000000, not 1" + 59 * "0" + "\n"),
    ("--seed 1000000001", "--seed must be at most 1000000000"),
    ("--stepz 1 --sead 2", "unrecognized arguments: --stepz 1 --sead 2 (did you mean --steps?)\n"),
    ("--xyz=1 --steps 2", "unrecognized arguments: --xyz=1\n"),
    ("--stepz=1", "unrecognized arguments: --stepz=1 (did you mean --steps?)\n"),
    ("word", "unrecognized arguments: word\n"),
    ("--jobs 2", "--jobs is for --seeds\n"), ("--resume r --jobs 2", "--jobs is for --seeds\n"),
    ("--seeds 0-1 --jobs 0", "--jobs must be at least 1, not 0"),
    ("--seeds 0-1 --seed 0", "give --seed or --seeds, not both"),
    *((f"--{a} r --{b}", "--resume and --eval take the flags of the run itself; give no other\n")
      for a in ("resume", "eval") for b in ("steps 5", "out s", "seeds 0-1")),
    ("--resume r --eval r", "--resume and --eval take the flags of the run itself")])
def test_refusals(words, message, capsys):
    assert run(make_program(), *(words.split() if isinstance(words, str) else words)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"walk.py: error: {message}") and said.count("\n") == 1
    assert os.listdir(".") == []


def test_errors_name_their_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [os.path.join("some", "walk.py")])
    for prog, said in ((None, "walk.py"), ("python -m walk", "python -m walk")):
        with pytest.raises(SystemExit) as stop:
            exit_with_error("one\n  line", prog)
        assert stop.value.code == 2 and capsys.readouterr().err == f"{said}: error: one line\n"


def test_a_long_list_of_choices_is_not_printed(capsys):
    @dataclass
    class Many(Config):
        env: str = option("maze0", "environment", tuple(f"maze{i}" for i in range(30)))

    assert run(make_program(Config=Many), "--env", "mazes") == 2
    assert capsys.readouterr().err == ("walk.py: error: argument --env: invalid choice 'mazes' "
                                       "(did you mean maze9?); --help lists all\n")
    assert run(make_program(Config=Many), "--help") == 0
    said = capsys.readouterr().out
    assert "maze29" in said and "usage: walk.py [flags]" in said and "Walks." in said
    assert re.search(r"--hidden-dims N,N,...\s+sizes \(default 2\)", said)
    assert re.search(r"--file STR\s+a text \(default none\)", said)


def test_seeds_in_words():
    for text, seeds in (("3", [3]), ("0-2,7", [0, 1, 2, 7]), ("5, 1", [5, 1]), ("4-4", [4])):
        assert seed_range(text) == seeds
    assert len(seed_range("0-9999")) == 10_000
    for text in ("", "1-", "-1", "5-3", "1,5-3", "1,", "1--2", "1-2-3", "a", "1.5", "1_0", "²",
                 "1000000000", "0-99999999999"):
        with pytest.raises(ValueError, match="^seeds are A-B or A,B,C, not "):
            seed_range(text)
    for text in ("1,1", "0-3,2", "0-10000", "0-5000,6000-999999999"):
        with pytest.raises(ValueError, match="^seeds are each once and at most 10,000, not "):
            seed_range(text)


def test_fields_without_effect_are_refused_where_they_differ():
    plain = Config(steps=5)
    for unused in ({}, {"steps": False}, {"steps": ""}, {"seed": "--fast"}):
        refuse_unused(Config(steps=6), plain, unused)
    refuse_unused(Config(steps=5), plain, {"steps": "--fast"})
    with pytest.raises(ValueError, match="^--hidden-dims has no effect with --fast$"):
        refuse_unused(Config(hidden_dims=(3,)), plain, {"steps": False, "hidden_dims": "--fast"})


@pytest.mark.parametrize("error, code, message", [
    (MemoryError("Unable to allocate 8 TiB"), 2, "error: these sizes are too large for this "
     "machine (Unable to allocate 8 TiB)"),
    (OverflowError("int too large"), 2, "error: these sizes are too large for this machine (int"),
    (FloatingPointError("the loss became nan"), 1, "stopped: the loss became nan; there is no "
     "checkpoint yet")])
def test_what_ends_a_run_leaves_no_folder_without_checkpoint(error, code, message, capsys):
    def learn(*arguments):
        raise error
        yield

    assert run(make_program(learn=learn), "--out", "r") == code
    said = capsys.readouterr().err
    assert said.startswith(f"walk.py: {message}") and said.count("\n") == 1
    assert os.listdir(".") == []
    if code == 2:                                       # before there is a run
        def prepare(*arguments):
            raise error

        assert run(make_program(prepare=prepare), "--out", "r") == 2
        assert capsys.readouterr().err.startswith(f"walk.py: {message}")


def test_no_warnings_of_numpy_before_the_one_line(capsys):
    """What overflows is infinite, or NaN, and refused in words."""
    def prepare(config, checkpoint=None):
        big = np.full(2, 1e300) * 1e300
        raise ValueError(f"there are {(big - big)[0]}")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(make_program(prepare=prepare)) == 2
    assert capsys.readouterr().err == "walk.py: error: there are nan\n"


# ---------------------------------------------------------------------------------- what is said


def test_a_closed_stdout_does_not_end_the_run(monkeypatch, capsys):
    """As by `| head -1`, or by `>&-`."""
    read, write = os.pipe()
    os.close(read)
    with monkeypatch.context() as closed, contextlib.suppress(BrokenPipeError):
        with open(write, "w") as pipe:
            closed.setattr(sys, "stdout", pipe)
            assert run(make_program(), "--out", "r") == 0
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", None)
        assert run(make_program(), "--out", "s") == 0
    assert read_json("r/summary.json") == read_json("s/summary.json")
    assert capsys.readouterr().err == ""


def test_tuples_in_words():
    """As they are typed, for --help and for the processes of --seeds."""
    for value, text in (((64, 32), "64,32"), ((7,), "7"), ((), "none")):
        assert text_of(value) == text and sizes(text) == value
    assert text_of("") == "none" and text_of("a") == "a"


def test_a_run_notes_its_command(monkeypatch):
    assert run(make_program(), "--out", "r", "--seed", 3) == 0
    begun = read_json("r/config.json")
    assert begun["argv"] == ["--out", "r", "--seed", "3"] and begun["config"]["seed"] == 3


def test_lines_are_written_at_once(monkeypatch):
    """So that a log can be followed."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    harness.say("done")
    assert out.buffer.getvalue() == b"done\n"


def test_letters_that_the_locale_lacks_are_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    assert run(make_program(), "--out", "r\u00fc") == 0
    assert out.buffer.getvalue().decode().endswith(
        "files in r\\xfc: checkpoint.npz config.json curve.png eval.csv summary.json train.csv\n")


def test_a_summary_in_ten_lines(capsys):
    show({"env": "e", "agent": "a", "seed": 1, "updates": 2, "env_steps": 3, "episodes": 4,
          "peak_mb": 5, "x_curve": [1], "x_by_distance": [2], "success_lowest_late": 6,
          "subgoal_error_8_0": 3.0,
          "subgoal_error": 1.23456789, "mean_steps": None, "count": 7})
    assert capsys.readouterr().out == "subgoal_error: 1.2346\nmean_steps: None\ncount: 7\n"


def test_durations_in_words():
    assert [minutes(x) for x in (0, 14, 26, 99, 100, 149, 151, 3600)] == [
        f"about {x}" for x in ("10 seconds", "10 seconds", "30 seconds", "100 seconds",
                               "2 minutes", "2 minutes", "3 minutes", "60 minutes")]


def test_progress_is_a_line_every_ten_seconds_or_on_a_terminal_one_line(monkeypatch):
    """On a terminal it is rewritten twice a second."""
    for terminal, expected in (
            (False, ["20/100  20%  a  2 steps/s  ETA 0:40\n", "95/100  95%  e  5 steps/s  ETA 0:01"
                     "\n", "100/100 100%  f  5 steps/s  ETA 0:00\n"]),
            (True, ["\r\033[K20/100  20%  a  2 steps/s  ETA 0:40",
                    "\r\033[K22/100  22%  c  2 steps/s  ETA 0:37",
                    "\r\033[K90/100  90%  d  5 steps/s  ETA 0:02",
                    "\r\033[K95/100  95%  e  5 steps/s  ETA 0:01",
                    "\r\033[K100/100 100%  f  5 steps/s  ETA 0:00\n"])):
        said, now = [], [0.0]
        monkeypatch.setattr(harness, "say", lambda text, end="\n", said=said: said.append(
            text + end))
        monkeypatch.setattr(harness.time, "perf_counter", lambda now=now: now[0])
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: terminal))
        progress = Run(None, None, counter="step")
        for now[0], done, text in ((10, 20, "a"), (10.4, 21, "b"), (10.5, 22, "c"),
                                   (19.9, 90, "d"), (21, 95, "e"), (21.1, 100, "f")):
            progress.progress(done, 100, text)
        assert said == expected
        del said[:]
        progress.end_line()                             # the last line was ended
        for now[0], done in ((30, 99), (40, 99)):
            progress.progress(done, 100, "x")
        progress.end_line()
        assert [text[-1] for text in said] == (["0", "0", "\n"] if terminal else ["\n"])


def test_speed_and_seconds_of_a_resumed_run(monkeypatch):
    """The speed is that since --resume; the seconds leave out the time between."""
    said, now = [], [100.0]
    monkeypatch.setattr(harness, "say", lambda text, end: said.append(text))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    Run("r", Config(), None, "step")
    resumed = Run("r", Config(), {"step": 20, "seconds": 5.0}, "step")
    now[0] = 110.0
    resumed.progress(40, 100, "a")
    assert said == ["40/100  40%  a  2 steps/s  ETA 0:30"] and resumed.seconds() == 15
    now[0] = 210.0
    resumed.progress(42, 300, "a")
    assert said[1].endswith("  0 steps/s  ETA 21:30")
    now[0] = 103.0
    resumed.progress(21, 21, "a")
    resumed.shown = 0
    resumed.progress(21, 30, "a")
    assert said[3].endswith("  0 steps/s  ETA 0:27")


# ---------------------------------------------------------------------------------- the schedule


def test_evaluations_logs_and_checkpoints_by_hand():
    """Episodes of 3, evaluation due every 5 and at the end, a row every 2; the last episode is
    played to its end; nothing to evaluate yet at 3."""
    saved, shown = [], []
    program = make_program()

    class Watched(Run):
        def save(self, agent, generators):
            saved.append(int(agent["step"]))
            super().save(agent, generators)

        def progress(self, *what):
            shown.append(what)

    config = Config(steps=22, seed=7)
    program.train(program.prepare(config), Watched("r", config, None, "step"))
    assert saved == [6, 12, 15, 21, 24]
    rows = read_rows("r/eval.csv")
    assert [row["step"] for row in rows] == ["6", "12", "15", "21", "24"]
    assert list(rows[0]) == ["step", "success", "seconds"]
    train = read_rows("r/train.csv")
    assert [int(row["step"]) for row in train] == list(range(4, 25, 2))
    assert list(train[0]) == ["step", "x_loss", "extra", "seconds"]
    steps = np.random.default_rng(np.random.SeedSequence(7).spawn(1)[0]).normal(size=(24, 3))
    np.testing.assert_allclose([float(row["x_loss"]) for row in train],
                               steps.cumsum(0)[3::2, 0], rtol=1e-5)
    losses, success = steps.cumsum(0)[:, 0], steps.cumsum(0)[20].mean()
    assert shown[0] == (3, 22, f"x_loss {losses[2]:.3g}  success -")
    assert shown[18] == (21, 22, f"x_loss {losses[20]:.3g}  success {success:.2f}")
    assert [what[0] for what in shown] == list(range(3, 23))            # 22 once, at step 24
    assert float(rows[-1]["success"]) == pytest.approx(steps.sum(0).mean(), rel=1e-5)
    np.testing.assert_array_equal(load_tree("r/checkpoint.npz")["x"], steps.cumsum(0)[-1])
    assert read_json("r/summary.json")["success"] == pytest.approx(steps.sum(0).mean())


def test_eval_and_a_finished_run(capsys):
    assert run(make_program(), "--out", "r") == 0
    whole, said = content("r"), capsys.readouterr().out
    assert run(make_program(), "--eval", "r") == 0
    assert capsys.readouterr().out == said.splitlines()[-2] + "\n"
    assert run(make_program(), "--resume", "r") == 0
    assert capsys.readouterr().out == "r is finished; its summary.json stays as it is\n"
    assert content("r") == whole


# ------------------------------------------------------------------------------- several seeds


def test_processes_are_begun_resumed_or_left(tmp_path, capsys):
    """At most `jobs` at once; what has a summary is not run again; failures are told."""
    (tmp_path / "p.py").write_text(
        "import os, sys, time\nout = sys.argv[-1]\n"
        "open('order', 'a').write(os.path.basename(out) + ' ')\n"
        "print('said', *sys.argv[1:])\ntime.sleep(0.3)\n"
        "sys.exit(3) if out.endswith('bad') else open(out + '/summary.json', 'w').write('{}')\n"
        "open('order', 'a').write('end ')\n")
    for name in ("new", "old", "bad", "done"):
        (tmp_path / name).mkdir()
    (tmp_path / "old" / "checkpoint.npz").write_text("")
    write_json(tmp_path / "done" / "summary.json", {"success": 1})
    ended = []
    failed = run_processes({name: ([str(tmp_path / "p.py")], ["--a"], str(tmp_path / name))
                            for name in ("new", "bad", "done", "old")}, 1,
                           lambda *x: ended.append(x))
    assert failed == ["bad"] and ended == [("new", {}), ("done", {"success": 1}), ("old", {})]
    assert (tmp_path / "order").read_text() == "new end bad old end "
    assert (tmp_path / "new.log").read_text() == f"said --a --out {tmp_path / 'new'}\n"
    assert (tmp_path / "old.log").read_text() == f"said --resume {tmp_path / 'old'}\n"
    assert capsys.readouterr().err == f"bad failed; see {tmp_path / 'bad'}.log\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_seeds_say_how_to_go_on(number, tmp_path, monkeypatch, capsys):
    """SIGTERM, or Ctrl-C, once the first seed has begun: it is stopped, and waited for."""
    (tmp_path / "walk.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), open('saved', 'w'), "
        f"sys.exit(143)))\nos.kill(os.getppid(), {int(number)})\ntime.sleep(60)\n")
    monkeypatch.setattr(harness, "HERE", str(tmp_path))
    program = make_program(__file__=str(tmp_path / "walk.py"))
    assert run(program, "--seeds", "0-1", "--out", "my seeds") == 128 + number
    assert os.path.exists("saved") and os.listdir("my seeds") == ["seed0.log"]
    assert capsys.readouterr().out == ("interrupted; go on with each seed N: python walk.py "
                                       "--resume 'my seeds/seedN'\n")


def test_bad_input_of_several_seeds_begins_no_process(monkeypatch, capsys):
    def prepare(config):
        raise ValueError("these are no data")

    monkeypatch.setattr(harness, "run_processes", None)
    for program, words, message in ((make_program(), ("--steps", 0), "--steps must be positive"),
                                    (make_program(prepare=prepare), (), "these are no data")):
        assert run(program, "--seeds", "0-1", *words) == 2
        assert message in capsys.readouterr().err and os.listdir(".") == []


def test_seeds_are_summarised(monkeypatch, capsys):
    def processes(runs, jobs, done):
        for seed, success in (("2", 0.5), ("1", 1.0)):
            done(seed, {"seed": int(seed), "success": success})
        return failed

    monkeypatch.setattr(harness, "run_processes", processes)
    for failed, code, folder in (([], 0, "a"), (["3"], 1, "b")):
        assert run(make_program(), "--seeds", "1-3", "--out", folder) == code
        assert capsys.readouterr().out == (
            "seed 2: success 0.500\nseed 1: success 1.000\nmean success 0.750, worst 0.500 of 2 "
            f"seeds; {os.path.join(folder, 'seeds.csv')}\n")
        assert [row["seed"] for row in read_rows(os.path.join(folder, "seeds.csv"))] == ["1", "2"]
