"""SIGKILL at any moment: a resumed run ends bit-equal to one that was never stopped.

    python -m pytest support/test_kills.py -m slow -s       30 kills, about five minutes
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import os
import random
import shutil
import subprocess
import sys

import pytest

from nets import flatten
from support.files import load_tree, read_json, read_rows
from support.run import HERE

# A checkpoint is due every few updates, so that many kills fall into the writing of files.
COMMANDS = {
    "hiql": ("hiql.py", "--env", "grid-fourrooms", "--steps", "400", "--hidden-dims", "64,64",
             "--batch-size", "64", "--eval-interval", "4", "--eval-episodes", "2"),
    "hiro": ("hiro.py", "--env", "point-umaze", "--steps", "6000", "--warmup", "500",
             "--hidden-dims", "64,64", "--batch-size", "32", "--high-updates", "1",
             "--eval-interval", "200", "--eval-episodes", "2")}


def content(folder):
    """What a finished run leaves, but for the time it took: {file: comparable content}."""
    summary = read_json(os.path.join(folder, "summary.json"))
    agent = {name: x.tobytes() for name, x in
             flatten(load_tree(os.path.join(folder, "checkpoint.npz"))).items()
             if name != "seconds"}
    logs = {name: [{k: x for k, x in row.items() if k != "seconds"}
                   for row in read_rows(os.path.join(folder, name))]
            for name in ("train.csv", "eval.csv")}
    pictures = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".png"):
            with open(os.path.join(folder, name), "rb") as file:
                pictures[name] = file.read()
    return {"summary": {k: x for k, x in summary.items() if k not in ("train_seconds", "peak_mb")},
            "agent": agent, "files": sorted(os.listdir(folder)), **logs, **pictures}


@pytest.mark.slow
@pytest.mark.parametrize("program", COMMANDS)
def test_a_killed_run_ends_as_one_never_stopped(program, tmp_path):
    """15 kills, each at a random moment: while starting, training, evaluating, writing."""
    command = [sys.executable, os.path.join(HERE, COMMANDS[program][0])]
    whole, killed, unfinished = tmp_path / "whole", tmp_path / "killed", []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    flags = COMMANDS[program][1:]
    subprocess.run([*command, *flags, "--out", whole], check=True, **quiet)
    expected, kills, moment = content(whole), 0, random.Random(0)
    while kills < 15 or killed.exists():
        begun = (killed / "checkpoint.npz").exists()
        if killed.exists() and not begun:           # killed before its first checkpoint
            shutil.rmtree(killed)
        words = ["--resume", killed] if begun else [*flags, "--out", killed]
        process = subprocess.Popen([*command, *words], **quiet)
        try:
            if kills < 15:
                process.wait(timeout=moment.uniform(0.5, 8))
            said = process.communicate()[1]
            assert process.returncode == 0, said
            result = content(killed)
            assert result.keys() == expected.keys()
            for name, x in expected.items():
                assert result[name] == x, name
            shutil.rmtree(killed)                   # and begin again
        except subprocess.TimeoutExpired:
            process.kill()
            assert b"Traceback" not in process.communicate()[1]
            kills += 1
            unfinished += [f for f in os.listdir(killed) if f.endswith(".tmp")] if (
                killed.exists()) else []
    print(f"{program}: {kills} kills, {len(unfinished)} of them while a file was written")
