"""Tests of support/plots.py: each picture is drawn from arrays."""

import nets                             # first: it sets one BLAS thread before numpy loads

import sys

import numpy as np
import pytest

import envs
from support import plots


def test_each_picture_is_drawn(tmp_path, monkeypatch):
    """Of a point maze, of a grid, of an online task with a block; and the program's own."""
    for name in ("point-umaze", "grid-fourrooms"):
        env = envs.make(name)
        starts, goals = (env.place(np.array([task[i] for task in env.tasks])) for i in (0, 1))
        paths = np.stack([starts, goals])[:, :, None].repeat(3, 2)          # (2, tasks, 3, 2)
        success = np.ones((5, 3), bool)
        plots.draw_trajectories(tmp_path / f"{name}1.png", env, {
            "a": (paths, goals[:, None].repeat(3, 1), success)})
        maps = [{"values": np.arange(len(plots.free_points(env))), "goal": goal, "starts": path[:1],
                 "path": path, "subgoals": subgoals}
                for goal, path, subgoals in ((goals[0], paths[:, 0, 0], goals[:1]),
                                             (goals[1], paths[:, 1, 0], None))]
        plots.draw_value(tmp_path / f"{name}2.png", env, maps)
        one = {"path": paths[:, 0, 0], "goal": goals[0], "asked": goals[:1],
               "blocks": [(paths[:, 0, 0], 0.5)]}
        plots.draw_episodes(tmp_path / f"{name}3.png", env, {"a": one, "b": one}, 2)
        plots.draw_episodes(tmp_path / f"{name}4.png", env, {"a": {**one, "blocks": []}})
    logs = {"train": [{"step": 5, "relabel_fraction": 0.5, "relabel_distance": 1.0,
                       "relabel_gain": 2.0}], "eval": [{"step": 5, "subgoal_error": 1.0}]}
    plots.draw_correction(tmp_path / "correction.png", logs)
    plots.draw_curve(tmp_path / "curve.png", {"train": [], "eval": []}, "update")
    monkeypatch.setattr(sys, "argv", ["plots.py", str(tmp_path / "mazes")])
    plots.main()
    pictures = [*tmp_path.glob("*.png"), tmp_path / "mazes" / "mazes.png"]
    assert len(pictures) == 11 and all(x.read_bytes()[:4] == b"\x89PNG" for x in pictures)
    monkeypatch.setattr(sys, "argv", ["plots.py", "--folder"])
    with pytest.raises(SystemExit):
        plots.main()


def test_failed_episodes_lie_on_top():
    """Lines drawn later cover earlier ones: failures, in red, come last."""
    figure, axes = plots.panels(1, 1, (2, 2))
    paths = np.zeros((2, 4, 2)) + np.arange(4)[:, None]
    plots.draw_paths(axes[0, 0], envs.make("point-umaze"), paths, np.ones((4, 2)),
                     np.array([False, True, True, False]))
    drawn = [(line.get_color(), line.get_xdata()[0]) for line in axes[0, 0].lines[:4]]
    assert [color for color, _ in drawn] == ["C0", "C0", "C3", "C3"]
    assert sorted(x for _, x in drawn[:2]) == [1, 2] and sorted(x for _, x in drawn[2:]) == [0, 3]


def test_places_of_the_lattice_by_hand():
    """Points on a regular lattice, four along a cell; on grids the cells themselves, and the row
    runs down."""
    wide = envs.PointMaze("wide", layout="#### #..# ####")
    points, free = plots.lattice(wide, 4)
    assert points.shape == (12, 16, 2) and free.sum() == 32 and free[4:8, 4:12].all()
    np.testing.assert_allclose(points[4, 4], wide.centre(np.array([0.625, 0.625])))
    np.testing.assert_allclose(points[11, 15], wide.centre(np.array([2.375, 3.375])))
    grid = envs.make("grid-fourrooms")
    points, free = plots.lattice(grid)
    assert (free == ~grid.walls).all() and (points[3, 5] == (3, 5)).all()
    assert plots.plot_xy(grid, [[3, 5]])[0] == 5 and plots.plot_xy(wide, [[3, 5]])[0] == 3


def test_the_curve_shows_success_and_losses(monkeypatch):
    """Above every success but those of single tasks, below every loss; gaps are left out."""
    kept = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: kept.append(figure))
    logs = {"train": [{"step": 2, "low_loss": 0.5, "seconds": 1},
                      {"step": 4, "high_loss": 3.0, "seconds": 1}],
            "eval": [{"step": 3, "success": 0.25, "success_per_task": [1, 0], "final_distance": 9,
                      "success_random": 0.5}]}
    plots.draw_curve("", logs, "step")
    lines = [{line.get_label(): (*line.get_xdata(), *line.get_ydata(), line.get_linestyle())
              for line in ax.lines} for ax in kept[0].axes]
    assert lines == [{"success": (3, 0.25, "-"), "success_random": (3, 0.5, ":")},
                     {"low_loss": (2, 0.5, "-"), "high_loss": (4, 3.0, "-")}]
