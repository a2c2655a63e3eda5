"""Tests of lab/goals.py."""

import nets                             # first: it sets one BLAS thread before numpy loads

import sys

import numpy as np
import pytest

import envs
import hiro
from lab import goals
from support.runs import read_json


class Acting:
    """A low level that goes half of the way that is left at each step, or stays."""

    goal_range, c = np.array([2.0, 1.0]), 10
    transition = staticmethod(hiro.goal_transition)

    def __init__(self, goes):
        self.goes = goes

    def low(self, s, g):
        return self.goes * 0.5 * g / 0.2                # a step is 0.2 times the action


def test_errors_by_hand():
    """Who stays errs by the goal's length everywhere; who goes to it errs by little where the
    target is free, and beside a wall by the way into it; with another's goal by much."""
    maze = envs.make("point-umaze", speed=0.2)
    stays, goes = (goals.goal_errors(Acting(x), maze, np.random.default_rng(0)) for x in (0, 1))
    x = np.random.default_rng(1).uniform(-1, 1, (100_000, 2)) * [2, 1]
    still = np.sqrt((x ** 2).sum(1)).mean()
    assert stays["goal_error_still"] == pytest.approx(still, rel=0.03) == goes["goal_error_still"]
    mixed = (1 - stays["goals_in_walls"]) * stays["goal_error_free"]
    mixed += stays["goals_in_walls"] * stays["goal_error_wall"]
    assert mixed == pytest.approx(stays["goal_error_still"], rel=1e-4)
    assert 0.1 < goes["goals_in_walls"] < 0.3 and goes["goal_error_free"] < 0.25
    assert goes["goal_error_wall"] > 2 * goes["goal_error_free"]
    assert goes["goal_error_permuted"] > stays["goal_error_still"]
    places = np.array([[[0.0, 0.0], [0.0, 4.0]], [[8.0, 8.0], [99.0, 0.0]]])
    assert goals.asked_in_walls(maze, places) == 0.5


def test_a_run_has_the_measures_and_is_hiros_own(tmp_path, monkeypatch):
    """To the last bit: what is measured disturbs nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hiro, "draw", lambda *_: None)
    words = ["--steps", "700", "--warmup", "200", "--eval-interval", "500", "--eval-episodes", "2",
             "--hidden-dims", "8", "--batch-size", "8", "--high-updates", "1"]
    for program, folder in ((hiro, "plain"), (goals, "measured")):
        monkeypatch.setattr(sys, "argv", ["x", *words, "--out", folder])
        program.main()
    plain, measured = (read_json(f"{x}/summary.json") for x in ("plain", "measured"))
    more = measured.keys() - plain.keys()
    assert {"goal_error_free", "asked_in_walls", "asked_in_walls_first"} <= more
    for name in plain.keys() - {"train_seconds"}:
        assert plain[name] == measured[name]
