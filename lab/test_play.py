"""Tests of lab/play.py, with events that nobody made."""

import nets                             # first: it sets one BLAS thread before numpy loads

import os
import sys

import numpy as np
import pytest
from matplotlib.backend_bases import MouseEvent
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import hiql
import hiro
from lab import play
from support.runs import HERE, Run, generators

TRAINED = os.path.join(HERE, "trained")


def click(canvas, ax, x, y):
    """A click at data coordinates."""
    px, py = ax.transData.transform((x, y))
    canvas.callbacks.process("button_press_event",
                             MouseEvent("button_press_event", canvas, px, py, button=1))


@pytest.mark.parametrize("name, goal, wall", [("hiql", (4, 4), (12, 0)), ("hiro", (8, 0), (0, 4))])
def test_a_click_is_a_goal_and_the_agent_goes_there(name, goal, wall):
    """From where it is; a click at a wall, or beside the maze, changes nothing."""
    agent = play.read_agent(os.path.join(TRAINED, name))
    figure = Figure(figsize=(4, 4))
    canvas, ax = FigureCanvasAgg(figure), figure.subplots()
    board = play.Board(ax, agent)
    canvas.mpl_connect("button_press_event", board.click)
    canvas.draw()
    click(canvas, ax, *wall)
    click(canvas, ax, 999, 999)
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
    here = agent.s.copy()
    click(canvas, ax, *start[0])
    board.tick()
    assert board.going and (board.trail[0] == here[0]).all()


def test_grids_are_played_in_too(tmp_path, monkeypatch):
    """By clicks at column, row; an untrained agent does not arrive."""
    config = hiql.resolve({"env": "grid-fourrooms", "steps": 1, "hidden_dims": (8,)})
    env, data = hiql.load_data(None, config, generators(0, "data", "hide"))
    params = hiql.init_params(config, env, data, generators(0, "init", "flat"))
    agent = {"params": params, "units": {}, "update": np.zeros((), np.int64)}
    Run(hiql.PROGRAM, config, str(tmp_path / "r")).begin(agent, {}, 1)
    agent = play.read_agent(str(tmp_path / "r"))
    assert play.goal_at(agent.maze, 3.2, 1.7).tolist() == [[2, 3]]
    monkeypatch.setattr(play, "STEPS", 12)
    play.draw_goals(str(tmp_path / "p.png"), agent, [(3, 2), (1, 1)])
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_the_program(tmp_path, monkeypatch, capsys):
    """A picture of goals, also without a screen; an agent to give away; what is refused."""
    monkeypatch.chdir(tmp_path)
    run = os.path.join(TRAINED, "hiro")

    def main(*words):
        monkeypatch.setattr(sys, "argv", ["play", *words])
        try:
            play.main()
        except SystemExit as e:
            return e.code

    assert main(run, "--goal", "8,0", "--out", "a.png") is None
    monkeypatch.setenv("MPLBACKEND", "agg")
    assert main(run, "--out", "b.png") is None and "no screen" in capsys.readouterr().out
    assert {"a.png", "b.png"} == set(os.listdir())
    assert main(run, "--give", "mine") is None and os.listdir("mine") == ["checkpoint.npz"]
    assert main("mine", "--goal", "8,8") is None and hiro.load("mine")
    for words, culprit in ((("nowhere",), "nowhere"), ((run, "--goal", "0,4"), "--goal 0,4"),
                           ((run, "--goal", "8"), "--goal"), ((run, "--give", "mine"), "mine")):
        assert main(*words) == 2 and culprit in capsys.readouterr().err
