"""Tests of lab/exact.py, and of HIQL's sampling and value loss against what it solves exactly.

    python -m pytest lab/test_exact.py              20 seconds
    python -m pytest lab/test_exact.py -m slow      the value of the four rooms, three minutes
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import dataclasses
import os
import sys

import numpy as np
import pytest

import envs
import hiql
from lab import exact, hiql_variants
from support import plots
from support.runs import Run, generators, read_run


def chain(*trajectories):
    """A data set on the top corridor of grid-fourrooms: columns visited, as trajectories."""
    obs = np.concatenate([[(1, column) for column in t] for t in trajectories])
    terminals = np.zeros(len(obs), bool)
    terminals[np.cumsum([len(t) for t in trajectories]) - 1] = True
    return envs.Dataset(obs.astype(np.float32), np.zeros(len(obs), int), terminals)


# ------------------------------------------------------------------------------ exact values


def test_expectile_fixed_point():
    """By hand on one pair, and by its definition on all pairs of a real data set."""
    env = envs.make("grid-fourrooms")
    at_goal, go_on = exact.goal_counts(env, chain((1, 2, 3)), 0.5, 0.0, 0.0)
    v = exact.expectile_values(env, at_goal, go_on, 0.5, 0.7)
    one, two = env.index[1, 1], env.index[1, 2]
    # rows 1 -> 2 and 2 -> 3, goals rows 0 and 1. From 1 to 2: always -1 + v(2,2)/2; from 2 to 2:
    # always success, since the goal can only be row 1 itself.
    assert v[two, two] == 0 and v[one, two] == -1 and np.isnan(v[env.index[1, 3], one])
    data = envs.collect(env, np.random.default_rng(0), episodes=50, rows=60)
    for discount, expectile in ((0.97, 0.7), (0.9, 0.97), (0.9, 0.5), (0.9, 0.9)):
        at_goal, go_on = exact.goal_counts(env, data, discount, 0.2, 0.5)
        v = exact.expectile_values(env, at_goal, go_on, discount, expectile)
        y = -1 + discount * v[env.neighbours]
        pull = (go_on * np.where(y < v[:, None], 1 - expectile, expectile)
                * (y - v[:, None])).sum(1)
        pull += at_goal * expectile * (0 - v)
        assert np.abs(pull).max() < 1e-10
        assert (v <= 0).all() and v.min() > -1 / (1 - discount)
    assert (exact.expectile_values(env, at_goal, go_on, 0.9, 0.5) < v + 1e-12).all()


def test_steps_that_are_no_move_of_the_grid_are_refused():
    with pytest.raises(ValueError, match="no move of the grid"):
        exact.goal_counts(envs.make("grid-fourrooms"), chain((1, 2, 4)), 0.5, 0.2, 0.5)


def test_counts_of_the_behaviour_policy_keep_the_marginals():
    env = envs.make("grid-fourrooms")
    data = envs.collect(env, np.random.default_rng(0), episodes=50, rows=60)
    _, go_on = exact.goal_counts(env, data, 0.9, 0.2, 0.5)
    other = exact.behaviour_counts(go_on)
    np.testing.assert_allclose(other.sum(1), go_on.sum(1), atol=1e-15)
    np.testing.assert_allclose(other.sum(2), go_on.sum(2), atol=1e-15)
    assert np.abs(other - go_on).sum() > 0.1


def test_luck_makes_the_action_free_expectile_optimistic():
    sure, slippery = (envs.make("grid-fourrooms", slip=x) for x in (0.0, 0.5))
    sure, slippery = (exact.values_under_chance(env, 0.95, 0.9) for env in (sure, slippery))
    np.testing.assert_allclose(sure["optimal"], exact.optimal_value(
        envs.make("grid-fourrooms").distance, 0.95), atol=1e-6)
    np.testing.assert_allclose(sure["over actions"], sure["action-free"], atol=1e-6)
    far = envs.make("grid-fourrooms").distance >= 5
    assert (slippery["over actions"] < slippery["optimal"])[far].all()  # no policy does better
    assert (slippery["action-free"] > slippery["optimal"])[far].all()   # but it says so
    # by hand: the goal below the corner (1, 1), where two of the five moves go into walls
    env = envs.make("grid-fourrooms", slip=0.5)
    s, g = env.index[1, 1], env.index[2, 1]
    v = slippery["over actions"][:, g]
    y = -1 + 0.95 * v[env.neighbours[s]]
    q = 0.5 * y + 0.5 * y.mean()
    weight = np.where(q >= v[s], 0.9, 0.1)
    assert (weight * (q - v[s])).sum() == pytest.approx(0, abs=1e-6)


# ------------------------------------------------ sampling and value loss against the exact ones


@pytest.mark.parametrize("sample, by_state, discounts", [
    (hiql.sample, False, {"discount": 0.9, "goal_discount": 0.7}),
    (hiql_variants.reached_by_state, True, {"discount": 0.7})])
def test_sampled_goals_have_the_counted_distribution(sample, by_state, discounts):
    """2 million draws of `sample` against `goal_counts`, for every (s, move, g) and success."""
    env, rng = envs.make("grid-fourrooms"), np.random.default_rng(0)
    data = chain((1, 2, 3, 3, 2), (5, 4, 4, 4, 3, 2, 1), (2, 3))
    config = hiql.resolve({"env": env.name, "batch_size": 2_000_000, **discounts})
    at_goal, go_on = exact.goal_counts(env, data, 0.7, 0.2, 0.5, by_state)
    v = exact.expectile_values(env, at_goal, go_on, config.discount, config.expectile)
    assert by_state or exact.exact_value(config, env, data) == pytest.approx(v, nan_ok=True)
    assert at_goal.sum() + go_on.sum() == pytest.approx(1)
    batch = sample(data, data.valid, rng, config, env)
    s, s1, g = (env.number(batch[name]) for name in ("observations", "next_observations",
                                                     "value_goals"))
    move = (env.neighbours[s] == s1[:, None]).argmax(1)
    n, hit = len(env.cells), batch["masks"] == 0
    drawn_at = np.bincount(s[hit] * n + g[hit], minlength=n * n) / len(s)
    drawn_on = np.bincount(((s * 5 + move) * n + g)[~hit], minlength=n * 5 * n) / len(s)
    np.testing.assert_allclose(drawn_at, at_goal.ravel(), atol=2e-3)
    np.testing.assert_allclose(drawn_on, go_on.ravel(), atol=2e-3)


def train_value(env, data, config, loss=hiql.value_loss):
    """Parameters after updates of the value alone, by this loss."""
    rngs = generators(0, "init", "flat", "batch")
    params = hiql.init_params(config, env, data, rngs)
    agent = {"params": params, "optimiser": hiql.init_optimiser(params), "update": 0}
    for _ in range(config.steps):
        hiql.update(agent, data, rngs["batch"], config, env, {"value": loss})
    return params


def value_errors(env, data, config, params):
    """Learned value against the exact fixed point, over all state-goal pairs.

    -> mean absolute error over the value's range, rank correlation, share of pairs s != g whose
    greedy move is one of the exact best moves (within 1 % of the range: nearly equal moves), and
    one of the shortest-path moves.
    """
    truth = exact.exact_value(config, env, data)
    v = exact.value_table(env, lambda s, g: hiql.value_map(params, s, g, config, env))
    best = v[env.neighbours].argmax(1)[:, None]                     # (n, 1, n) moves
    chosen = np.take_along_axis(truth[env.neighbours], best, 1)[:, 0]
    span, apart = np.nanmax(truth) - np.nanmin(truth), ~np.eye(len(v), dtype=bool)
    right = chosen >= truth[env.neighbours].max(1) - 0.01 * span
    nearer = np.take_along_axis(env.distance[env.neighbours], best, 1)[:, 0] < env.distance
    return *exact.compare_values(v, truth), right[apart].mean(), nearer[apart].mean()


def test_value_learns_the_exact_fixed_point():
    """The value of a tiny grid is exact to 5 % of its range; three lesions are not."""
    env = envs.GridWorld("grid-tiny", "umaze")                      # seven cells, bent
    data = envs.collect(env, np.random.default_rng(0), episodes=200, rows=41, noise=1.0)
    config = hiql.resolve({"env": "grid-fourrooms", "discount": 0.9, "hidden_dims": (32, 32),
                           "steps": 300, "lr": 5e-3, "batch_size": 128, "subgoal_steps": 2,
                           "train_flat": False})
    error, rank, _, _ = value_errors(env, data, config, train_value(env, data, config))
    assert error < 0.05 and rank > 0.97

    def no_mask(params, batch, *setting):
        return hiql.value_loss(params, {**batch, "masks": 0 * batch["masks"] + 1}, *setting)

    def no_reward(params, batch, *setting):
        return hiql.value_loss(params, {**batch, "rewards": 0 * batch["rewards"]}, *setting)

    def flipped(params, batch, config, env):
        return hiql.value_loss(params, batch, dataclasses.replace(config, expectile=0.1), env)

    config = dataclasses.replace(config, expectile=0.9)
    for lesion in (no_mask, no_reward, flipped):
        params = train_value(env, data, config, lesion)
        assert value_errors(env, data, config, params)[0] > 0.15


@pytest.mark.slow
def test_exactness_on_four_rooms():
    """Every state-goal pair of grid-fourrooms against the exact fixed point."""
    config = hiql.resolve({"env": "grid-fourrooms", "steps": 8000, "train_flat": False})
    env, data = hiql.load_data(None, config, generators(0, "data", "hide"))
    params = train_value(env, data, config)
    error, rank, best, nearer = value_errors(env, data, config, params)
    print(f"error {error:.3f} of the range, rank {rank:.4f}, best moves {best:.3f}, "
          f"shortest-path moves {nearer:.3f}")
    assert error <= 0.05 and rank >= 0.98 and best >= 0.95


# ---------------------------------------------------------------- the program and its pictures


def test_two_values_are_compared_by_hand():
    truth = np.array([[0.0, -1.0], [np.nan, -4.0]])
    learned = np.array([[-1.0, -1.5], [9.0, -3.5]])             # off by 1, 0.5 and 0.5
    error, rank = exact.compare_values(learned, truth)
    assert error == pytest.approx(2 / 3 / 4) and rank == pytest.approx(1)
    assert exact.compare_values(-learned, truth)[1] == pytest.approx(-1)
    env = envs.make("grid-fourrooms")
    table = exact.value_table(env, lambda s, g: env.distance[env.number(s), env.number(g)])
    assert (table == env.distance).all()                        # rows are states, columns goals


def test_the_pictures_show_the_exact_values(monkeypatch, small_data):
    """Of the four rooms: the optimum, the fixed point of the loss and that of the data's policy."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    env = envs.make("grid-fourrooms")
    fixed_point, behaviour = exact.draw_exact_values("", env, env.dataset(np.random.default_rng(0)))
    maps = [ax.images[0].get_array() for ax in figures[0].axes[:3]]
    g = env.index[tuple(env.tasks[0][1])]
    for drawn, v in zip(maps, (exact.optimal_value(env.distance, 0.95), fixed_point, behaviour)):
        assert (drawn[~env.walls] == v[:, g]).all()
    assert np.nanmean(np.abs(fixed_point - behaviour)) > 0.5


def test_a_run_is_compared_with_the_exact_value(tmp_path, monkeypatch, capsys, small_data):
    """On the data of the run. The exact value as the learned one has no error; runs that are not on
    grids, or whose data have changed, are refused."""
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["exact.py", *map(str, words)])
        exact.main()

    monkeypatch.setattr(hiql, "draw", lambda *_: None)
    folder, figures = tmp_path / "run", []
    config = hiql.resolve({"env": "grid-fourrooms", "quick": True, "steps": 1, "seed": 3})
    hiql.train(None, config, run=Run(hiql.PROGRAM, config, str(folder)))
    _, env, data = exact.run_and_data(folder)
    truth = exact.exact_value(config, env, data)
    monkeypatch.setattr(hiql, "value_map", lambda params, s, g, config, env: truth[
        env.number(s), env.number(g)])
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (
        figures.append(figure), save(figure, path)))
    run("--run", folder)
    assert "error 0.0% of the range, rank correlation 1.0000" in capsys.readouterr().out
    assert os.path.exists(folder / "value_exact.png")
    maps = [ax.images[0].get_array() for ax in figures[0].axes[:10]]
    assert all((maps[i] == maps[5 + i]).all() for i in range(5))
    other = env.dataset(np.random.default_rng(9))
    monkeypatch.setattr(envs, "collect", lambda env, rng, **recipe: other)
    for words, message in ((("a", "--run", "b"), "give FOLDER or --run DIR, not both"),
                           (("--run", folder), "the data are no longer those of the run")):
        with pytest.raises(SystemExit):
            run(*words)
        assert message in capsys.readouterr().err
    monkeypatch.setattr(exact, "run_and_data", lambda folder: (read_run(
        hiql.PROGRAM, folder), envs.make("point-medium"), data))
    with pytest.raises(ValueError, match="exact values are those of grids"):
        exact.compare_run(folder)
