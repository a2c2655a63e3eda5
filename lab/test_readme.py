"""The pieces of Python in README.md, run with fewer steps.

    python -m pytest lab/test_readme.py             five seconds
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import os
import re

import numpy as np
import pytest

import envs
import hiql
from lab import own_data
from support import offline
from support.run import HERE, Run

with open(os.path.join(HERE, "README.md")) as file:
    PIECES = re.findall("```python\n(.*?)```", file.read(), re.S)
FEWER = {'"steps": 2000': '"steps": 20', '"env": "none"': '"env": "none", "steps": 20',
         '"subgoal_steps": 25': '"subgoal_steps": 4',
         '"steps": 100_000': '"steps": 120, "warmup": 60, "eval_episodes": 1'}


@pytest.mark.parametrize("piece", PIECES, ids=[" ".join(x.split()[:4]) for x in PIECES])
def test_the_readme_runs(piece, tmp_path, monkeypatch):
    """Each alone, as it stands but for the numbers of steps, with the data and the environment
    that its text takes for granted."""
    monkeypatch.setattr(envs, "ENVIRONMENTS", dict(envs.ENVIRONMENTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hiql, "QUICK", {**hiql.QUICK, "steps": 4, "eval_interval": 4})
    data, env = own_data.collect("point-mass", 5, 30, 0.5, 0), own_data.PointMass()
    env.limit = 20
    names = {"observations": data.observations, "actions": data.actions, "env": env,
             "terminals": data.terminals, "states": data.observations[:7],
             "goals": data.observations[:7, :2], "observation": env.reset(seed=0)[0]}
    if "hiql.load" in piece:
        config = hiql.resolve({"quick": True})
        offline.train(hiql.prepare(config), Run("runs/point-medium_hiql_seed0", config))
    text = piece
    for many, fewer in FEWER.items():
        text = text.replace(many, fewer)
    exec(compile(text, "README.md", "exec"), names)
    if "action" in names and "result" in names and "data" in names:
        assert names["action"].shape == (7, 2) and np.abs(names["action"]).max() <= 1
        assert names["result"].summary["success"] <= 1
    elif "action" in names:
        assert names["action"].shape == (2,)


def test_every_use_has_its_lines():
    """A maze of one's own in five lines, HIRO on a Gymnasium environment in five, data of one's
    own in ten: the lines of code."""
    lengths = {name: len([line for line in piece.splitlines() if line.strip()])
               for piece in PIECES for name in ("envs.register", "envs.Dataset", "hiro.resolve")
               if name in piece}
    assert lengths["envs.register"] <= 5 and lengths["hiro.resolve"] <= 5
    assert lengths["envs.Dataset"] <= 10


def test_what_is_replaced_is_there():
    assert all("".join(PIECES).count(many) == 1 for many in FEWER)
