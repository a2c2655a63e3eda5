"""Tests of support/plots.py: each picture is drawn from arrays."""

import nets                             # first: it sets one BLAS thread before numpy loads

import sys

import numpy as np
import pytest

import envs
from support import plots


@pytest.mark.parametrize("name", ["point-umaze", "grid-fourrooms"])
def test_each_picture_of_a_maze_is_drawn(name, tmp_path):
    """Trajectories; values with and without subgoals; episodes with and without blocks."""
    env = envs.make(name)
    starts, goals = (env.place(np.array([task[i] for task in env.tasks])) for i in (0, 1))
    paths = np.stack([starts, goals])[:, :, None].repeat(3, 2)              # (2, tasks, 3, 2)
    plots.draw_trajectories(tmp_path / "1.png", env, {
        "a": (paths, goals[:, None].repeat(3, 1), np.ones((5, 3), bool))})
    maps = [{"values": np.arange(len(plots.free_points(env))), "goal": goals[0],
             "starts": starts[:1], "path": paths[:, 0, 0], "subgoals": subgoals, "success": False}
            for subgoals in (goals[:1], None)]
    plots.draw_value(tmp_path / "2.png", env, maps)
    one = {"path": paths[:, 0, 0], "goal": goals[0], "asked": goals[:1],
           "blocks": [(paths[:, 0, 0], 0.5)]}
    plots.draw_episodes(tmp_path / "3.png", env, {"a": one, "b": one}, 2)
    plots.draw_episodes(tmp_path / "4.png", env, {"a": {**one, "blocks": []}})
    pictures = list(tmp_path.glob("*.png"))
    assert len(pictures) == 4 and all(x.read_bytes()[:4] == b"\x89PNG" for x in pictures)


def test_curves_and_mazes_are_drawn(tmp_path, monkeypatch):
    logs = {"train": [{"step": 5, "low_loss": 1.0, "relabel_fraction": 0.5,
                       "relabel_distance": 1.0, "relabel_gain": 2.0}],
            "eval": [{"step": 5, "success": 0.5, "subgoal_error": 1.0}]}
    plots.draw_correction(tmp_path / "correction.png", logs)
    plots.draw_curve(tmp_path / "curve.png", logs, "step")
    plots.draw_curve(tmp_path / "empty.png", {"train": [], "eval": []}, "update")
    monkeypatch.setattr(sys, "argv", ["plots.py", str(tmp_path)])
    plots.main()
    pictures = list(tmp_path.glob("*.png"))
    assert len(pictures) == 4 and all(x.read_bytes()[:4] == b"\x89PNG" for x in pictures)


def test_places_of_the_lattice_by_hand():
    """Points four along a cell; on grids the cells; rows run down."""
    wide, grid = envs.PointMaze("wide", layout="#### #..# ####"), envs.make("grid-fourrooms")
    points, free = plots.lattice(wide, 4)
    assert points.shape == (12, 16, 2) and free.sum() == 32 and free[4:8, 4:12].all()
    np.testing.assert_allclose(points[11, 15], wide.centre(np.array([2.375, 3.375])))
    points, free = plots.lattice(grid)
    assert (free == ~grid.walls).all() and (points[3, 5] == (3, 5)).all()
    assert plots.plot_xy(grid, [[3, 5]])[0] == 5 and plots.plot_xy(wide, [[3, 5]])[0] == 3
