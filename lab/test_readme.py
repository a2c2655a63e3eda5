"""README.md: its pieces of Python, run with fewer steps, and its commands; names in documents."""

import nets                             # first: it sets one BLAS thread before numpy loads

import glob
import os
import pkgutil
import re

import numpy as np
import pytest

import envs
import hiql
from lab import own_data
from lab.test_experiments import meant, module_of
from support.runs import HERE

TEXTS = {}                              # {path from the top folder: text}
for path in ["README.md", *glob.glob("docs/*.md", root_dir=HERE)]:
    with open(os.path.join(HERE, path)) as file:
        TEXTS[path] = file.read()
README = TEXTS["README.md"]
PIECES = [x for x in re.findall("```python\n(.*?)```", README, re.S) if x.startswith("import")]
FEWER = {'"steps": 2000': '"steps": 20, "eval_episodes": 1, "train_flat": False',
         '"env": "none"': '"env": "none", "steps": 20, "eval_episodes": 5',
         '"subgoal_steps": 25': '"subgoal_steps": 4',
         '"steps": 100_000': '"steps": 120, "warmup": 60, "eval_episodes": 1'}


@pytest.mark.parametrize("piece", PIECES, ids=[" ".join(x.split()[:4]) for x in PIECES])
def test_the_readme_runs(piece, tmp_path, monkeypatch, small_data):
    """Each alone, as it stands but for the numbers of steps, with the data and the environment
    that its text takes for granted."""
    monkeypatch.setattr(envs, "ENVIRONMENTS", dict(envs.ENVIRONMENTS))
    monkeypatch.setattr(hiql, "draw", lambda *x: None)
    monkeypatch.chdir(tmp_path)
    data, env = own_data.collect("point-mass", 5, 30, 0.5, 0), own_data.PointMass()
    env.limit = 20
    names = {"observations": data.observations, "actions": data.actions, "env": env,
             "terminals": data.terminals, "states": data.observations[:7],
             "goals": data.observations[:7, :2], "observation": env.reset(seed=0)[0]}
    (tmp_path / "trained").symlink_to(os.path.join(HERE, "trained"))
    text = piece
    for many, fewer in FEWER.items():
        assert "".join(PIECES).count(many) == 1
        text = text.replace(many, fewer)
    exec(compile(text, "README.md", "exec"), names)
    if "action" in names and "result" in names and "data" in names:
        assert names["action"].shape == (7, 2) and np.abs(names["action"]).max() <= 1
        assert names["result"].summary["success"] <= 1
    elif "action" in names:
        assert names["action"].shape == (2,)


def test_its_commands_are_understood(monkeypatch):
    """Their flags, and what these mean together; of programs without a config, that they exist."""
    commands = re.findall(r"^python ((?:hiql|hiro)\.py.*|-m (?:lab|support)\..*)$", README, re.M)
    assert len(commands) > 15
    for command in commands:
        command = re.split(r"  +|\s+#", command)[0]
        module = module_of(command)
        assert meant(command, monkeypatch) if hasattr(module, "Config") else callable(module.main)


def test_the_names_in_texts_exist():
    """Functions, tests, and the deviations in their register; files, and targets of links."""
    tests = ""
    for path in glob.glob(os.path.join(HERE, "**", "test_*.py"), recursive=True):
        with open(path) as file:
            tests += file.read()
    text = TEXTS["README.md"] + TEXTS["docs/companion.md"]
    for name in re.findall(r"`((?:hiql|hiro|envs|lab)\.[\w.]*\w)`", text):
        assert name.endswith(".py") or pkgutil.resolve_name(name)
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    for tag in re.findall(r"\b[DE]\d+\b", text):
        assert f"\n| {tag} |" in TEXTS["docs/deviations.md"], tag
    for path, text in TEXTS.items():
        for name in re.findall(r"`((?:lab|support|docs|results|pictures|data)/[\w.-]+)`", text):
            assert "NAME" in name or os.path.exists(os.path.join(HERE, name)), (path, name)
        for link in re.findall(r"\]\(([^)#\s]+)", re.sub(r"`[^`\n]*`", "", text)):
            there = os.path.join(HERE, os.path.dirname(path), link)
            assert link.startswith("http") or os.path.exists(there), (path, link)
