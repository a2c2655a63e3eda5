"""Tests of support/plots.py (a second)."""

import nets                             # first: it sets one BLAS thread before numpy loads

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
