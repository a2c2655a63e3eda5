"""Tests of lab/own_data.py and of `lab.gym.evaluator`.

    python -m pytest lab/test_own_data.py           ten seconds
"""

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
    obs, _ = env.reset(seed=0)
    again, _ = own_data.PointMass().reset(seed=0)
    assert all((obs[k] == again[k]).all() for k in obs) and not obs["observation"][2:].any()
    assert (obs["achieved_goal"] == obs["observation"][:2]).all()
    env.state, env.goal = np.zeros(4), np.array([4.0, 0.0])
    for action, state in (([0.5, 0], [0.08, 0, 0.08, 0]), ([-9, 0], [-0.016, 0, -0.096, 0]),
                          ([0.6, 1], [0.0032, 0.16, 0.0192, 0.16])):
        obs, reward, terminated, truncated, info = env.step(np.array(action))
        np.testing.assert_allclose(obs["observation"], state, atol=1e-12)
        assert (reward, terminated, truncated, info) == (0, False, False, {"success": False})
    env.state = np.array([-1.2, 0, -0.5, 0.5])              # the disc touches the wall at -1.3
    np.testing.assert_allclose(env.step([0, 0])[0]["observation"], [-1.3, 0.4, -0.1, 0.4])
    env.state = np.array([2.5, 0, 0.625, 0])
    assert env.step([0, 0])[1:] == (1, True, False, {"success": True})          # exactly 1 away
    env.state, env.time = np.zeros(4), 298
    assert [env.step([0, 0])[3] for _ in range(2)] == [False, True]
    env.state, env.time = np.array([2.5, 0, 0.625, 0]), 299
    assert env.step([0, 0])[2:4] == (True, False)           # the goal, not the time, ends it
    pairs = []
    for seed in range(50):
        obs, _ = env.reset(seed=seed)
        pairs.append([env.maze.number(obs[key][None, :2])[0] for key in ("observation",
                                                                         "desired_goal")])
    lengths = env.maze.distance[tuple(np.transpose(pairs))]
    assert lengths.min() == 6 and lengths.max() > 9


def test_collected_data_obey_the_dynamics():
    data = own_data.collect("point-mass", episodes=6, rows=150, noise=0.0, seed=1)
    env = own_data.PointMass()
    assert data.observations.shape == (900, 4) and data.lengths.tolist() == [150] * 6
    assert (data.observations[::150, 2:] == 0).all()        # each begins at rest, elsewhere
    assert len({tuple(s) for s in data.observations[::150].tolist()}) == 6
    for j in data.valid[::50]:
        env.state, env.goal, env.time = data.observations[j].astype(float), np.zeros(2), 0
        np.testing.assert_allclose(env.step(data.actions[j])[0]["observation"],
                                   data.observations[j + 1], atol=1e-5)
    assert len(set(env.maze.number(data.observations[:, :2]))) > 15
    noisy = own_data.collect("point-mass", episodes=2, rows=50, noise=0.5, seed=1)
    assert np.abs(noisy.actions - data.actions[:100]).mean() > 0.1
    assert np.abs(noisy.actions).max() <= 1


def test_the_controller_reaches_a_goal_before_new_places_are_drawn(monkeypatch):
    """On the way it heads for a place in the next cell; goal: the place reached when new ones are
    drawn."""
    env, drawn = own_data.PointMass("##### #...# #.#.# #.#.# #####"), []
    made = own_data.make("point-mass")

    def place(cells, rng):
        drawn.append((env.time, env.maze.place(cells, rng)))
        return drawn[-1][1]

    monkeypatch.setattr(own_data, "make", lambda world: (env, env.maze, env.maze.cell, place,
                                                         *made[4:]))
    data = own_data.collect("mine", episodes=1, rows=300, noise=0.0, seed=2)
    assert len(drawn) > 10 and made[4] == 1
    for (start, places), (end, _) in zip(drawn, drawn[1:]):
        away = np.linalg.norm(data.observations[start:end + 1, None, :2] - places, axis=-1)
        goal, = np.flatnonzero((away[-1] < 1) & (away[1:-1] >= 1).all(0))
        for s, a in zip(data.observations[start:end], data.actions[start:end]):
            aim = places[env.maze.next_cell[env.maze.number(s[None, :2])[0], goal]]
            np.testing.assert_allclose(a, np.clip(0.5 * (aim - s[:2]) - 2 * s[2:], -1, 1),
                                       atol=1e-4)


class Script:
    """Episodes of four steps; success is true at the second step of every other episode."""

    def __init__(self, key):
        self.key, self.seeds = key, []

    def reset(self, seed):
        self.seeds.append(seed)
        self.time = 0
        return self._observation(), {}

    def step(self, action):
        assert action == self.time
        self.time += 1
        success = len(self.seeds) % 2 == 0 and self.time == 2
        return self._observation(), 0.0, False, self.time == 4, {self.key: success}

    def _observation(self):
        return {"observation": np.arange(4.0), "achieved_goal": np.arange(2.0),
                "desired_goal": np.array([5.0, 6.0])}


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


def test_evaluation_refuses_what_it_cannot_measure(monkeypatch):
    config = SimpleNamespace(goal_indices=(), eval_episodes=50)
    for indices in ((1, 0), (0,), (0, 9)):
        with pytest.raises(ValueError, match="of an observation must be"):
            lab.gym.evaluator(Script("success"), SimpleNamespace(goal_indices=indices))
    with pytest.raises(ValueError, match="has no success and no is_success"):
        lab.gym.evaluator(Script("solved"), config)(lambda s, g, t: np.array([t]))
    env = Script("success")
    evaluate = lab.gym.evaluator(env, config)
    env.step = lambda a: (env._observation(), 0.0, False, False, {})
    monkeypatch.setattr(lab.gym, "ENDLESS", 30)
    with pytest.raises(ValueError, match="an episode did not end in 31 steps"):
        evaluate(lambda s, g, t: np.zeros((1, 2)))
    env.reset = lambda seed: (np.zeros(4), {})
    with pytest.raises(ValueError, match="must be dicts of observation, achieved_goal"):
        lab.gym.evaluator(env, config)


def test_a_run_learns_from_its_world(tmp_path, monkeypatch, capsys):
    """The config's numbers reach the data; starts and goals of evaluation are the seed's; the run
    is evaluated again."""
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["own_data.py", *map(str, words)])
        own_data.main()

    collected, seeds = [], []
    collect, evaluator = own_data.collect, lab.gym.evaluator
    monkeypatch.setattr(own_data, "collect", lambda *x: collected.append(x) or collect(*x))
    monkeypatch.setattr(lab.gym, "evaluator", lambda env, config, seed: (
        seeds.append(seed), evaluator(env, config, seed))[1])
    run("--seed", 3, "--quick", "--steps", 4, "--eval-interval", 4, "--episodes", 5, "--rows", 30,
        "--noise", 0.25, "--eval-episodes", 1, "--out", tmp_path / "a")
    assert collected == [("point-mass", 5, 30, 0.25, 3)] and seeds == [4]
    saved = read_run(own_data.PROGRAM, tmp_path / "a")
    assert saved.config.goal_indices == (0, 1) and saved.config.env == "none"
    made = collect(*collected[0])
    assert saved.agent["data"] == hiql.checksum(made)
    capsys.readouterr()
    run("--eval", tmp_path / "a")
    success = read_json(tmp_path / "a" / "summary.json")["success"]
    assert f"success: {success}\n" in capsys.readouterr().out and seeds == [4, 4]
    assert own_data.resolve({"quick": True}).episodes == 50     # 1,000 take a minute
    assert own_data.resolve({"goal_indices": ()}).goal_indices == ()
    for wrong, message in (({"dataset": "x.npz"}, "--dataset has no effect with a --world"),
                           ({"env": "point-medium"}, "--env")):
        with pytest.raises(ValueError, match=message):
            own_data.resolve(wrong)
    with pytest.raises(ValueError, match="--world PointMaze_X needs `pip install gymnasium-rob"):
        own_data.make("PointMaze_X")
