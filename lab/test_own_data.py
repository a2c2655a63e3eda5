"""Tests of lab/own_data.py and of `lab.gym.evaluator`."""

import nets                             # first: it sets one BLAS thread before numpy loads

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import hiql
import lab.gym
from lab import own_data
from support.runs import read_json, read_run


def test_a_point_mass_by_hand():
    """v' = 0.8 v + 0.16 a, as far as walls let it; the new v is what was moved."""
    env = own_data.PointMass()
    starts, goals = env.draw(np.random.default_rng(0), 500)
    lengths = env.maze.distance[env.maze.number(starts), env.maze.number(goals)]
    assert lengths.min() == 6 and lengths.max() == env.maze.distance.max()
    assert env.reset(seed=0)[0]["observation"][2:].tolist() == [0, 0] and env.time_limit == 300
    env.state, env.desired_goal = np.zeros((1, 4)), np.array([[4.0, 0.0]])
    for action, state in (([0.5, 0], [0.08, 0, 0.08, 0]), ([-9, 0], [-0.016, 0, -0.096, 0]),
                          ([0.6, 1], [0.0032, 0.16, 0.0192, 0.16])):
        obs, *rest = env.step(np.array(action))
        np.testing.assert_allclose(obs["observation"], state, atol=1e-12)
        assert rest == [-1, False, False, {"success": False}]
    env.state = np.array([[-1.2, 0, -0.5, 0.5]])            # the disc touches the wall at -1.3
    np.testing.assert_allclose(env.step([0, 0])[0]["observation"], [-1.3, 0.4, -0.1, 0.4])
    env.state = np.array([[2.5, 0, 0.625, 0]])
    obs, *rest = env.step([0, 0])
    assert rest == [0, True, False, {"success": True}]      # exactly 1 away
    assert obs["achieved_goal"].tolist() == obs["observation"][:2].tolist()


def test_collected_data_are_steps_of_the_environment():
    """Trajectories begin at rest, each elsewhere, and go everywhere; walls never hold them."""
    data = own_data.collect("point-mass", episodes=6, rows=150, noise=0.0, seed=1)
    env, i = own_data.PointMass(), data.valid
    assert data.observations.shape == (900, 4) and data.lengths.tolist() == [150] * 6
    assert not data.observations[::150, 2:].any()
    assert len(np.unique(data.observations[::150], axis=0)) == 6
    moved = env.move(data.observations[i].astype(float), data.actions[i])
    np.testing.assert_allclose(moved, data.observations[i + 1], atol=1e-5)
    assert len(set(env.maze.number(data.observations[:, :2]))) > 15
    assert (np.abs(data.observations[:, 2:]).max(1) < 0.02).mean() < 0.05
    noisy = own_data.collect("point-mass", episodes=2, rows=50, noise=0.5, seed=1)
    assert np.abs(noisy.actions - data.actions[:100]).mean() > 0.1
    assert np.abs(noisy.actions).max() <= 1


class Script:
    """Episodes of four steps; success is true at the second step of every other episode."""

    def __init__(self, key):
        self.key, self.seeds = key, []
        self.seen = {"observation": np.arange(4.0), "achieved_goal": np.arange(2.0),
                     "desired_goal": np.array([5.0, 6.0])}

    def reset(self, seed):
        self.seeds.append(seed)
        self.time = 0
        return self.seen, {}

    def step(self, action):
        self.time += 1
        success = len(self.seeds) % 2 == 0 and self.time == 2
        return self.seen, 0.0, False, self.time == 4, {self.key: success}


@pytest.mark.parametrize("indices, goal, key", [((0, 1), [5, 6], "success"),
                                                ((), [5, 6, 0, 0], "is_success")])
def test_evaluation_by_gymnasiums_calls(indices, goal, key):
    """The goal is the position, or the position at rest; success at any step, which ends it."""
    env, steps = Script(key), []

    def act(s, g, t):
        assert s.tolist() == [[0, 1, 2, 3]] and g.tolist() == [goal]
        steps.append(t)
        return np.array([t])

    config = SimpleNamespace(goal_indices=indices, eval_episodes=4)
    evaluate = lab.gym.evaluator(env, config, seed=7)
    del env.seeds[:]
    assert evaluate(act) == {"success": 0.5} and steps == [*range(4), 0, 1] * 2
    assert evaluate(act) == {"success": 0.5} and env.seeds[:4] == env.seeds[4:]
    assert len(set(env.seeds)) == 4


def test_a_run_learns_from_its_world_and_is_evaluated_again(tmp_path, monkeypatch, capsys):
    """The config's numbers reach the data."""
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["own_data.py", *map(str, words)])
        own_data.main()

    monkeypatch.setattr(hiql, "draw", lambda *_: None)
    run("--seed", 3, "--quick", "--steps", 2, "--episodes", 5, "--rows", 30, "--noise", 0.25,
        "--eval-episodes", 1, "--out", tmp_path / "a")
    saved = read_run(own_data.PROGRAM, tmp_path / "a")
    assert saved.config.goal_indices == (0, 1) and saved.config.env == "none"
    assert saved.agent["data"] == hiql.checksum(own_data.collect("point-mass", 5, 30, 0.25, 3))
    capsys.readouterr()
    run("--eval", tmp_path / "a")
    success = read_json(tmp_path / "a" / "summary.json")["success"]
    assert f"success: {success}\n" in capsys.readouterr().out
