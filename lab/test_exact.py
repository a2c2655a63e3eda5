"""Tests of lab/exact.py, and of HIQL's sampling and value loss against what it solves exactly.

    python -m pytest lab/test_exact.py -m slow      the value of the four rooms, three minutes
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import numpy as np
import pytest
from scipy.stats import spearmanr

import envs
import hiql
from lab import exact
from support.runs import generators

FOURROOMS = envs.make("grid-fourrooms")


def chain(*trajectories):
    """A data set on the top corridor of grid-fourrooms: columns visited, as trajectories."""
    obs = np.concatenate([[(1, column) for column in t] for t in trajectories])
    terminals = np.zeros(len(obs), bool)
    terminals[np.cumsum([len(t) for t in trajectories]) - 1] = True
    return envs.Dataset(obs.astype(np.float32), np.zeros(len(obs), int), terminals)


def test_expectile_fixed_point():
    """By hand on one pair, and by its definition on all pairs of a real data set."""
    at_goal, go_on = exact.goal_counts(FOURROOMS, chain((1, 2, 3)), 0.5, 0.0, 0.0)
    v = exact.expectile_values(FOURROOMS, at_goal, go_on, 0.5, 0.7)
    one, two = FOURROOMS.index[1, 1], FOURROOMS.index[1, 2]
    # rows 1 -> 2 and 2 -> 3, goals rows 0 and 1. From 1 to 2: always -1 + v(2,2)/2; from 2 to 2:
    # always success, since the goal can only be row 1 itself.
    assert v[two, two] == 0 and v[one, two] == -1 and np.isnan(v[FOURROOMS.index[1, 3], one])
    data = envs.collect(FOURROOMS, np.random.default_rng(0), episodes=50, rows=60)
    for discount, expectile in ((0.97, 0.7), (0.9, 0.97)):
        at_goal, go_on = exact.goal_counts(FOURROOMS, data, discount, 0.2, 0.5)
        v = exact.expectile_values(FOURROOMS, at_goal, go_on, discount, expectile)
        y = -1 + discount * v[FOURROOMS.neighbours]
        pull = (go_on * np.where(y < v[:, None], 1 - expectile, expectile)
                * (y - v[:, None])).sum(1)
        pull += at_goal * expectile * (0 - v)
        assert np.abs(pull).max() < 1e-10
        assert (v <= 0).all() and v.min() > -1 / (1 - discount)
    other = exact.behaviour_counts(go_on)                       # the same marginals
    np.testing.assert_allclose(other.sum(1), go_on.sum(1), atol=1e-15)
    np.testing.assert_allclose(other.sum(2), go_on.sum(2), atol=1e-15)
    assert np.abs(other - go_on).sum() > 0.1


def test_luck_makes_the_action_free_expectile_optimistic():
    env = envs.make("grid-fourrooms", slip=0.5)
    sure, slippery = (exact.values_under_chance(x, 0.95, 0.9) for x in (FOURROOMS, env))
    np.testing.assert_allclose(sure["optimal"], exact.optimal_value(FOURROOMS.distance, 0.95),
                               atol=1e-6)
    np.testing.assert_allclose(sure["over actions"], sure["action-free"], atol=1e-6)
    np.testing.assert_allclose(sure["over actions"], sure["one expectile"], atol=1e-6)
    far = env.distance >= 5
    assert (slippery["over actions"] < slippery["optimal"])[far].all()  # no policy does better
    assert (slippery["action-free"] > slippery["optimal"])[far].all()   # but it says so
    assert (slippery["one expectile"] > slippery["over actions"])[far].all()    # luck counts
    nearly = exact.values_under_chance(envs.GridWorld("tiny", "umaze"), 0.95, 1 - 1e-6)
    for v in nearly.values():                               # without chance all go to the optimum
        np.testing.assert_allclose(v, nearly["optimal"], atol=1e-3)
    # by hand: the goal below the corner (1, 1), where two of the five moves go into walls
    s, g = env.index[1, 1], env.index[2, 1]
    v = slippery["over actions"][:, g]
    y = -1 + 0.95 * v[env.neighbours[s]]
    q = 0.5 * y + 0.5 * y.mean()
    weight = np.where(q >= v[s], 0.9, 0.1)
    assert (weight * (q - v[s])).sum() == pytest.approx(0, abs=1e-6)


def test_sampled_goals_have_the_counted_distribution():
    """A million draws of `hiql.sample` against `goal_counts`, for every (s, move, g) and success.
    """
    env = FOURROOMS
    data = chain((1, 2, 3, 3, 2), (5, 4, 4, 4, 3, 2, 1), (2, 3))
    config = hiql.resolve({"env": env.name, "batch_size": 1_000_000, "discount": 0.9,
                           "goal_discount": 0.7})
    at_goal, go_on = exact.goal_counts(env, data, 0.7, 0.2, 0.5)
    assert at_goal.sum() + go_on.sum() == pytest.approx(1)
    batch = hiql.sample(data, data.valid, np.random.default_rng(0), config, env)
    s, s1, g = (env.number(batch[name]) for name in ("observations", "next_observations",
                                                     "value_goals"))
    assert (batch["rewards"] == -batch["masks"]).all() and batch["masks"].dtype == np.float32
    move = (env.neighbours[s] == s1[:, None]).argmax(1)
    n, hit = len(env.cells), batch["masks"] == 0
    drawn_at = np.bincount(s[hit] * n + g[hit], minlength=n * n) / len(s)
    drawn_on = np.bincount(((s * 5 + move) * n + g)[~hit], minlength=n * 5 * n) / len(s)
    np.testing.assert_allclose(drawn_at, at_goal.ravel(), atol=2e-3)
    np.testing.assert_allclose(drawn_on, go_on.ravel(), atol=2e-3)


def value_errors(env, data, config):
    """The value after updates by its loss alone, against the exact fixed point: mean absolute error
    over the value's range, rank correlation."""
    rngs = generators(0, "init", "flat", "batch")
    params = hiql.init_params(config, env, data, rngs)
    agent = {"params": params, "optimiser": hiql.init_optimiser(params), "update": 0}
    for _ in range(config.steps):
        hiql.update(agent, data, rngs["batch"], config, env, {"value": hiql.value_loss})
    counts = exact.goal_counts(env, data, config.discount, config.value_p_curgoal,
                               config.value_p_trajgoal)
    truth = exact.expectile_values(env, *counts, config.discount, config.expectile)
    n = len(env.cells)
    v = hiql.value_map(params, env.cells.repeat(n, 0), np.tile(env.cells, (n, 1)), config, env)
    v = v.reshape(n, n)
    return np.abs(v - truth).mean() / np.ptp(truth), spearmanr(v.ravel(), truth.ravel())[0]


def test_value_learns_the_exact_fixed_point():
    """The value of a tiny grid is exact to 5 % of its range."""
    env = envs.GridWorld("grid-tiny", "umaze")                      # seven cells, bent
    data = envs.collect(env, np.random.default_rng(0), episodes=200, rows=41, noise=1.0)
    config = hiql.resolve({"env": "grid-fourrooms", "discount": 0.9, "hidden_dims": (32, 32),
                           "steps": 300, "lr": 5e-3, "batch_size": 128, "subgoal_steps": 2,
                           "train_flat": False})
    error, rank = value_errors(env, data, config)
    assert error < 0.05 and rank > 0.97


@pytest.mark.slow
def test_exactness_on_four_rooms():
    """Every state-goal pair of grid-fourrooms against the exact fixed point."""
    config = hiql.resolve({"env": "grid-fourrooms", "steps": 8000, "train_flat": False})
    env, data = hiql.load_data(None, config, generators(0, "data", "hide"))
    error, rank = value_errors(env, data, config)
    assert error <= 0.05 and rank >= 0.98


def test_the_exact_values_are_drawn(tmp_path, small_data):
    exact.show_exact_values(str(tmp_path))
    assert {x.name for x in tmp_path.iterdir()} == {"exact_values.png", "chance.png"}
