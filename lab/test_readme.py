"""README.md: its pieces of Python, run with fewer steps; its commands; the names in its tables."""

import nets                             # first: it sets one BLAS thread before numpy loads

import glob
import importlib
import os
import pkgutil
import re
import shlex
import sys

import numpy as np
import pytest

import envs
import hiql
import hiro
from lab import own_data
from support.flags import parse
from support.runs import HERE, Run

with open(os.path.join(HERE, "README.md")) as file:
    README = file.read()
PIECES = re.findall("```python\n(.*?)```", README, re.S)
FEWER = {'"steps": 2000': '"steps": 20', '"env": "none"': '"env": "none", "steps": 20',
         '"subgoal_steps": 25': '"subgoal_steps": 4',
         '"steps": 100_000': '"steps": 120, "warmup": 60, "eval_episodes": 1'}


@pytest.mark.parametrize("piece", PIECES, ids=[" ".join(x.split()[:4]) for x in PIECES])
def test_the_readme_runs(piece, tmp_path, monkeypatch):
    """Each alone, as it stands but for the numbers of steps, with the data and the environment
    that its text takes for granted."""
    monkeypatch.setattr(envs, "ENVIRONMENTS", dict(envs.ENVIRONMENTS))
    monkeypatch.chdir(tmp_path)
    data, env = own_data.collect("point-mass", 5, 30, 0.5, 0), own_data.PointMass()
    env.limit = 20
    names = {"observations": data.observations, "actions": data.actions, "env": env,
             "terminals": data.terminals, "states": data.observations[:7],
             "goals": data.observations[:7, :2], "observation": env.reset(seed=0)[0]}
    if "hiql.load" in piece:
        config = hiql.resolve({"quick": True, "steps": 4, "eval_interval": 4})
        hiql.train(None, config, run=Run(hiql.PROGRAM, config, "runs/point-medium_hiql_seed0"))
    text = piece
    for many, fewer in FEWER.items():
        text = text.replace(many, fewer)
    exec(compile(text, "README.md", "exec"), names)
    if "action" in names and "result" in names and "data" in names:
        assert names["action"].shape == (7, 2) and np.abs(names["action"]).max() <= 1
        assert names["result"].summary["success"] <= 1
    elif "action" in names:
        assert names["action"].shape == (2,)


def test_what_is_replaced_is_there():
    assert all("".join(PIECES).count(many) == 1 for many in FEWER)


COMMANDS = [re.split(r"  +|\s+#", line)[0] for line in re.findall(
    r"^python ((?:hiql|hiro)\.py.*|-m (?:lab|support)\..*)$", README, re.M)]


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_are_understood(command, monkeypatch):
    """Their flags, and what these mean together; of programs without a config, that they exist."""
    first, *words = shlex.split(command)
    if first == "-m":
        first = words.pop(0)
    module = importlib.import_module(first.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [first, *words])
    if hasattr(module, "PROGRAM") and hasattr(module, "Config"):
        flags = hiql.WORDS if issubclass(module.Config, hiql.Config) else hiro.WORDS
        given, call = parse(module.PROGRAM, "", flags)
        assert call.eval or call.resume or module.resolve(given)
    else:
        assert callable(module.main)


def test_the_names_in_its_tables_exist():
    """Functions, tests, and the deviations in their register."""
    tests = ""
    for path in glob.glob(os.path.join(HERE, "**", "test_*.py"), recursive=True):
        with open(path) as file:
            tests += file.read()
    with open(os.path.join(HERE, "docs", "deviations.md")) as file:
        register = file.read()
    for name in re.findall(r"`((?:hiql|hiro|envs|lab)\.[\w.]*\w)`", README):
        if not name.endswith(".py"):
            assert pkgutil.resolve_name(name)
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name
    for tag in re.findall(r"\b[DE]\d+\b", README):
        assert f"\n| {tag} |" in register, tag
