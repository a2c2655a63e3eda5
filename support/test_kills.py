"""SIGKILL at any moment: a resumed run ends bit-equal to one that was never stopped."""

import nets                             # first: it sets one BLAS thread before numpy loads

import random
import signal
import subprocess
import sys

import pytest

from support.runs import HERE, load_arrays, read_json

# A checkpoint is due every few updates, so that many kills fall into the writing of files.
FLAGS = {
    "hiql": ("--env", "grid-fourrooms", "--steps", "60", "--hidden-dims", "32,32",
             "--batch-size", "64", "--eval-interval", "6", "--eval-episodes", "1"),
    "hiro": ("--steps", "400", "--warmup", "100", "--hidden-dims", "16,16", "--batch-size", "16",
             "--high-updates", "1", "--eval-interval", "30", "--eval-episodes", "1")}

CODE = """
import os, signal, sys, threading
import envs, PROGRAM
envs.UMazeTask.__init__ = lambda task: envs.GoalEnv.__init__(task, envs.make("point-umaze"), 40)
PROGRAM.draw = lambda *_: None
timer = threading.Timer(float(sys.argv.pop(1)), os.kill, (os.getpid(), signal.SIGKILL))
timer.daemon = True
timer.start()
PROGRAM.main()
"""


def content(folder):
    """What a finished run leaves, but for the time it took and for its logs."""
    arrays, summary = load_arrays(folder / "checkpoint.npz"), read_json(folder / "summary.json")
    del arrays["meta"], summary["train_seconds"]
    return {name: x.tobytes() for name, x in arrays.items()}, summary


@pytest.mark.parametrize("program", FLAGS)
def test_a_killed_run_ends_as_one_never_stopped(program, tmp_path):
    def run(moment, *words):
        command = [sys.executable, "-c", CODE.replace("PROGRAM", program), str(moment), *words]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode != 0

    whole, killed, kills, moment = tmp_path / "whole", tmp_path / "killed", 0, random.Random(0)
    run(1e6, *FLAGS[program], "--out", whole)
    seconds = read_json(whole / "summary.json")["train_seconds"]
    while not (killed / "summary.json").exists():           # the same command goes on
        moment_of_kill = moment.uniform(0, seconds / 2) if kills < 2 else 1e6
        kills += run(moment_of_kill, *FLAGS[program], "--out", killed)
    assert kills and content(killed) == content(whole)
