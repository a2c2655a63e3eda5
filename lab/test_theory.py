"""Tests of lab/theory.py, formula against simulation and cases by hand; and of lab/animation.py."""

import nets                             # first: it sets one BLAS thread before numpy loads

import os
import sys

import numpy as np
import pytest

import envs
import hiql
from lab import animation, play, theory
from support.runs import HERE, read_json


def test_chain_of_proposition_4_1():
    """The closed form against known numbers, and against simulated noise in each of its parts."""
    for (T, k, sigma), flat, bound in zip(theory.CHAINS, (0.320, 0.389, 0.444, 0.472),
                                          (0.156, 0.166, 0.322, 0.482)):
        formula = [theory.chain_error(d, sigma) for d in (T, T / k, k)]
        assert abs(formula[0] - flat) < 6e-4 and abs(formula[1] + formula[2] - bound) < 6e-4
        seen = theory.chain_simulation(T, k, sigma, 200_000, np.random.default_rng(T))
        high, low = formula[1:]
        for name, p in (("flat", formula[0]), ("either", high + low - high * low),
                        ("first", high + low - 2 * high * low)):
            assert abs(seen[name] - p) < 5 * np.sqrt(p * (1 - p) / 200_000), (T, name)
    k = np.arange(1, 101)                       # the best k is the square root of T
    for T, sigma in ((25, 0.1), (100, 0.1), (100, 0.3)):
        high, low = theory.chain_error(T / k, sigma), theory.chain_error(k, sigma)
        assert k[(high + low - 2 * high * low).argmin()] == np.sqrt(T)
        assert (k[(high + low).argmin()] == np.sqrt(T)) == (sigma < 0.2)    # the bound's is not


def test_first_actions_by_hand():
    """A corridor of seven cells: noise of one value misleads only the policy that compares it."""
    env = envs.GridWorld("grid-tiny", "umaze")
    order = np.argsort(env.distance[np.flatnonzero((env.distance == 6).any(1))[0]])
    a, b, c, d, e, f, g = order                         # along the corridor
    v = -env.distance.astype(float)
    assert all((right == (env.distance > 0)).all() for right in theory.first_actions(env, v, 2))
    v[c, g] = -9                                        # seen from b and d on the way to g
    flat, hierarchy = theory.first_actions(env, v, 2)
    wrong = np.argwhere((flat != (env.distance > 0)))
    assert wrong.tolist() == [[b, g]]                   # d has nothing better behind it
    assert hierarchy[b, g] and hierarchy[a, g]          # only d, only c is two steps away
    v = -env.distance.astype(float)
    v[f, g] = v[e, g] = -9                              # the high-level policy at c sees a and e
    flat, hierarchy = theory.first_actions(env, v, 2)
    assert flat[c, g] and not hierarchy[c, g]
    v = -env.distance.astype(float)
    v[d, e] = -9                                        # the low-level policy at c, on the way to e
    flat, hierarchy = theory.first_actions(env, v, 2)
    assert flat[c, g] and not hierarchy[c, g]


def test_shares_of_wrong_first_actions():
    """By a short-sighted value those at pairs far apart are wrong; the shares are of far pairs, in
    a small maze of the farthest."""
    for env, k in ((envs.make("grid-fourrooms"), 5), (envs.GridWorld("grid-tiny", "umaze"), 2)):
        seen = theory.wrong_first_actions(env, np.where(env.distance <= 3, -1, 1) * env.distance, k)
        far = env.distance.max() - 4
        assert seen["wrong_first_flat"] == 1 and seen["wrong_flat_by_distance"][:2] == [0, 0]
        assert seen["wrong_flat_by_distance"][4:] == [1] * far
        seen = theory.wrong_first_actions(env, -env.distance, k)
        assert seen["wrong_first_hierarchy"] == 0 == max(seen["wrong_hierarchy_by_distance"])


def test_value_and_action_sufficiency():
    env = envs.GridWorld("grid-tiny", "umaze")
    errors, wrong = zip(*[theory.low_rank_errors(env, rank) for rank in (1, 2, 4, 7)])
    assert list(errors) == sorted(errors, reverse=True) and errors[0] > 0.1 > 1e-9 > errors[-1]
    _, size, _ = np.linalg.svd(env.distance)            # no value of rank 1 is nearer, by squares
    assert errors[0] <= np.sqrt((size[1:] ** 2).sum()) / 7 and wrong[0] > 0 == wrong[-1]
    # from place p of 0..6, goals at p - d and p + d have one value and need two moves
    unsure, wrong = theory.action_insufficiency(env)
    assert unsure == pytest.approx(2 * (1 + 2 + 3 + 2 + 1) / 42) and wrong == unsure / 2


def test_signs_of_advantages():
    """All right by the exact value, all wrong by its opposite; by a value that is right only near
    the goal the low-level policy's stay right, and those of the others far away are wrong."""
    env = envs.make("point-medium")
    data = envs.collect(env, np.random.default_rng(0), episodes=50, rows=60)

    def shares(value):
        return theory.right_signs(env, data, value, 4, np.random.default_rng(0), n=500)

    for sign, right in ((-1, 1), (1, 0), (0, 0)):
        length, seen = shares(lambda s, g: sign * env.path_length(s, g))
        assert list(seen) == ["flat", "high", "low"] and (np.diff(length) > 0).all()
        assert all((x == right).all() and len(x) == len(length) for x in seen.values())
    reach = 6 * env.side                                # farther than any subgoal
    _, seen = shares(lambda s, g: np.where(env.path_length(s, g) < reach, -1, 1)
                     * (env.path_length(s, g) - reach))
    assert (seen["low"] == 1).all()
    for policy in ("flat", "high"):
        assert seen[policy][0] == 1 and seen[policy][-1] == 0


def test_the_program_keeps_its_numbers_and_draws(tmp_path):
    theory.show_theory(7, str(tmp_path / "a"))
    seen = read_json(tmp_path / "a" / "summary.json")
    assert seen["seed"] == 7 and seen["chain_bound"] == pytest.approx(0.482, abs=5e-4)
    for name, share in (("chain_flat", 0.472), ("chain_either", 0.424), ("chain_first", 0.366)):
        assert abs(seen[name] - share) < 2e-3               # the known shares, T 100
    assert seen["maze_hierarchy_0.1"] < 0.06 < 0.2 < seen["maze_flat_0.1"] < 0.28
    assert seen["wrong_at_rank_48"] == 0 < seen["wrong_at_rank_8"] < seen["wrong_at_rank_3"]
    theory.draw_theory(str(tmp_path / "theory.png"), n=100)
    assert os.path.exists(tmp_path / "theory.png")


def test_signs_are_drawn(tmp_path, monkeypatch, small_data):
    monkeypatch.setattr(hiql, "draw", lambda *_: None)
    monkeypatch.setattr(envs.PointMaze, "limits", lambda env, s, g: np.full(len(s), 10))
    config = hiql.resolve({"quick": True, "steps": 2, "eval_episodes": 1})
    hiql.train(None, config, run=str(tmp_path / "a"))
    theory.show_signal(str(tmp_path / "a"))
    assert os.path.exists(tmp_path / "a" / "signal.png")


def test_episodes_are_animated(tmp_path, monkeypatch):
    """They end ten steps after the goal is reached; HIRO's aims are kept for a window."""
    agent = play.read_agent(f"{HERE}/trained/hiro")
    _, path, goal, aims, _ = animation.episode(agent, np.array([[0.0, 8.0]]))
    near = np.linalg.norm(path[1:] - goal, axis=1) <= 1
    assert near.argmax() + 11 == len(aims) == len(path) - 1
    np.testing.assert_allclose(aims[:10], aims[[0] * 10], atol=1e-5)
    monkeypatch.setattr(animation, "FRAMES", 3)
    monkeypatch.setattr(play, "STEPS", 5)
    monkeypatch.setattr(sys, "argv", ["x", *(f"{HERE}/trained/{name}" for name in (
        "hiql", "hiro")), str(tmp_path / "a.gif")])
    animation.main()
    assert (tmp_path / "a.gif").read_bytes()[:6] == b"GIF89a"
