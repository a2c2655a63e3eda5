"""Tests of lab/play.py, with events that nobody made."""

import nets                             # first: it sets one BLAS thread before numpy loads

import os
import sys

import numpy as np
import pytest
from matplotlib.backend_bases import MouseEvent
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import hiro
from lab import play
from support.runs import HERE

TRAINED = os.path.join(HERE, "trained")


def click(canvas, ax, x, y):
    """A click at data coordinates."""
    px, py = ax.transData.transform((x, y))
    canvas.callbacks.process("button_press_event",
                             MouseEvent("button_press_event", canvas, px, py, button=1))


@pytest.mark.parametrize("name, goal, wall", [("hiql", (4, 4), (12, 0)), ("hiro", (8, 0), (0, 4))])
def test_a_click_is_a_goal_and_the_agent_goes_there(name, goal, wall):
    """From where it is; a click at a wall changes nothing."""
    agent = play.read_agent(os.path.join(TRAINED, name))
    figure = Figure(figsize=(4, 4))
    canvas, ax = FigureCanvasAgg(figure), figure.subplots()
    board = play.Board(ax, agent)
    canvas.mpl_connect("button_press_event", board.click)
    canvas.draw()
    click(canvas, ax, *wall)
    board.tick()
    assert not board.going and not board.trail
    click(canvas, ax, *goal)
    start = agent.s.copy()
    assert board.going and (board.image is not None) == (name == "hiql")
    while board.going:
        board.tick()
    np.testing.assert_array_equal(board.trail[0], start[0])
    assert np.linalg.norm(agent.s[0] - goal) <= 1 and "reached" in ax.get_title()
    assert np.linalg.norm(np.diff(board.trail, axis=0), axis=1).max() < 1.2     # step by step


def test_the_program(tmp_path, monkeypatch, capsys):
    """A picture of goals, also without a screen; an agent to give away; what is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    run = os.path.join(TRAINED, "hiro")

    def main(*words):
        monkeypatch.setattr(sys, "argv", ["play", *words])
        play.main()

    main(run, "--goal", "8,0", "--out", "a.png")
    main(run, "--out", "b.png")
    assert "no screen" in capsys.readouterr().out and set(os.listdir()) == {"a.png", "b.png"}
    main(run, "--give", "mine")
    assert os.listdir("mine") == ["checkpoint.npz"] and hiro.load("mine")
    for words, culprit in ((("nowhere",), "nowhere"), ((run, "--goal", "0,4"), "--goal 0,4"),
                           ((run, "--give", "mine"), "mine")):
        with pytest.raises(SystemExit):
            main(*words)
        assert culprit in capsys.readouterr().err
