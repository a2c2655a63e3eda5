"""Tests of support/plots.py (a second)."""

import nets                             # first: it sets one BLAS thread before numpy loads

import errno
import os
import re
import sys

import numpy as np
import pytest

import envs
from support import plots


def test_failed_episodes_lie_on_top():
    """Lines drawn later cover earlier ones: failures, in red, come last."""
    env = envs.make("point-umaze")
    figure, ax = plots.plt.subplots()
    paths = np.zeros((2, 4, 2)) + np.arange(4)[:, None]
    plots.draw_paths(ax, env, paths, np.ones((4, 2)), np.array([False, True, True, False]))
    drawn = [(line.get_color(), line.get_xdata()[0]) for line in ax.lines[:4]]
    assert [color for color, _ in drawn] == ["C0", "C0", "C3", "C3"]
    assert sorted(x for _, x in drawn[:2]) == [1, 2] and sorted(x for _, x in drawn[2:]) == [0, 3]
    plots.plt.close(figure)


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    plots.save_figure(plots.plt.figure(), path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG") and plots.plt.get_fignums() == []

    def full_disk(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match=f"^{re.escape(str(path))}: No space left on device$"):
        plots.save_figure(plots.plt.figure(), path)
    plots.plt.close("all")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_places_of_the_lattice_by_hand():
    """Points on a regular lattice, four along a cell; on grids the cells themselves, and the row
    runs down."""
    wide = envs.PointMaze("wide", layout="#### #..# ####")
    points, free = plots.lattice(wide, 4)
    assert points.shape == (12, 16, 2) and free.sum() == 32 and free[4:8, 4:12].all()
    np.testing.assert_allclose(points[4, 4], wide.centre(np.array([0.625, 0.625])))
    np.testing.assert_allclose(points[11, 15], wide.centre(np.array([2.375, 3.375])))
    assert plots.lattice(wide)[1].shape == (24, 32)
    grid = envs.make("grid-fourrooms")
    points, free = plots.lattice(grid)
    assert (free == ~grid.walls).all() and (points[3, 5] == (3, 5)).all()
    assert plots.plot_xy(grid, [[3, 5]])[0] == 5 and plots.plot_xy(grid, [[3, 5]])[1] == 3
    assert plots.plot_xy(wide, [[3, 5]])[0] == 3 and plots.plot_xy(wide, [[3, 5]])[1] == 5


def test_a_chasm_is_grey():
    """Walls are empty, free cells white; row 0 of the picture is the lowest y."""
    image = plots.draw_maze(plots.plt.figure().add_subplot(),
                            envs.make_task("point-fall").maze).get_array().filled(np.nan)
    plots.plt.close("all")
    assert image.shape == (48, 32) and np.isnan(image[20, 4])
    assert image[20, 12] == 0 and image[28, 12] == 0.4 and image[36, 12] == 0


def test_the_curve_shows_success_and_losses(tmp_path, monkeypatch):
    """Above every success but those of single tasks, below every loss; empty cells are left out."""
    kept = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: kept.append(figure))
    logs = {"train": [{"step": "2", "low_loss": "0.5", "seconds": "1"},
                      {"step": "4", "low_loss": "", "high_loss": 3.0, "seconds": "1"}],
            "eval": [{"step": "3", "success": "0.25", "success_per_task": "1 0", "final_distance":
                      "9", "success_random": "0.5"}]}
    plots.draw_curve("", logs, "step")
    lines = [{line.get_label(): (list(line.get_xdata()), list(line.get_ydata()),
                                 line.get_linestyle()) for line in ax.lines}
             for ax in kept[0].axes]
    plots.plt.close("all")
    assert lines == [{"success": ([3], [0.25], "-"), "success_random": ([3], [0.5], ":")},
                     {"low_loss": ([2], [0.5], "-"), "high_loss": ([4], [3.0], "-")}]


def test_the_program_draws_the_mazes_and_takes_no_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plots.py", "--folder"])
    with pytest.raises(SystemExit) as stop:
        plots.main()
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert "unrecognized arguments: --folder" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["plots.py", "here"])
    plots.main()
    assert [x.name for x in (tmp_path / "here").iterdir()] == ["mazes.png"]
