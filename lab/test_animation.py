"""The animation of README: both agents on their mazes, a gif of several frames (5 seconds)."""

import nets                             # first: it sets one BLAS thread before numpy loads

import sys

import numpy as np
import pytest

import envs
import hiql
import hiro
from lab import animation
from support import offline, online
from support.run import Run, load_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of two tiny runs, of hiql and of hiro."""
    folder = tmp_path_factory.mktemp("runs")
    tiny = {"quick": True, "steps": 10, "eval_interval": 10, "eval_episodes": 1}
    with pytest.MonkeyPatch.context() as patch:         # no pictures, and short episodes
        patch.setattr(hiql, "draw", lambda *_: None)
        patch.setattr(online, "draw", lambda *_: None)
        patch.setattr(envs.PointMaze, "limits", lambda env, s, g: np.full(len(s), 10))
        config = hiql.resolve(tiny)
        offline.train(hiql.prepare(config), Run(str(folder / "hiql"), config))
        config = hiro.resolve({**tiny, "steps": 250, "warmup": 200, "eval_interval": 300})
        hiro.train(hiro.prepare(config), Run(str(folder / "hiro"), config, counter="step"))
    return str(folder / "hiql"), str(folder / "hiro")


def test_episodes_are_those_of_the_agents(runs):
    """HIQL starts in task 4's cell, its aims are free places; HIRO's are kept for a window."""
    problem, agent = load_run(hiql, runs[0])
    path, goal, aims, values = animation.hiql_episode(problem, agent)
    start, end = problem.env.centre(problem.env.tasks[3])
    assert np.abs(path[0] - start).max() <= 1 and np.abs(goal - end).max() <= 1
    assert len(aims) == len(path) and problem.env.is_free(aims).all() and (values < 0).any()
    problem, agent = load_run(hiro, runs[1])
    path, goal, aims = animation.hiro_episode(problem, agent)
    assert goal.tolist() == [0, 8] and (aims[:10] == aims[0]).all() and len(aims) >= len(path) - 1
    assert (np.abs(aims[0] - path[0]) <= 2 + 1e-5).all()


def test_the_gif_is_written_whole(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(animation, "FRAMES", 3)
    file = tmp_path / "a.gif"
    monkeypatch.setattr(sys, "argv", ["animation.py", *runs, str(file)])
    animation.main()
    assert [x.name for x in tmp_path.iterdir()] == ["a.gif"]
    assert file.read_bytes()[:6] == b"GIF89a" and "a.gif: 0.0" in capsys.readouterr().out
    for words, message in (([], "give two runs"), ([runs[1], runs[0]], "config.json: no field")):
        monkeypatch.setattr(sys, "argv", ["animation.py", *words])
        with pytest.raises(SystemExit) as stop:
            animation.main()
        assert stop.value.code == 2 and message in capsys.readouterr().err
