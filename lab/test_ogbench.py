"""Tests of lab/ogbench.py: the simulator, data files and input encodings."""

import nets                             # first: it sets one BLAS thread before numpy loads

import os

import numpy as np
import pytest

import envs
from support import datasets
from support.runs import HERE, load_arrays

SIZES = "medium", "large", "giant", "teleport"
@pytest.mark.parametrize("size", SIZES)
def test_layouts_and_tasks(size):
    """Those of point-medium and larger, which test_all.py has; of the teleport maze two inlets,
    three outlets, of which one stands alone."""
    for kind in ("navigate", "stitch"):
        env = envs.make(f"pointmaze-{size}-{kind}-v0")
        alone = (env.distance == -1).sum(1) == len(env.cells) - 1
        assert (env.distance[~alone][:, ~alone] >= 0).all()
        if size == "teleport":
            assert (len(env.inlets), len(env.outlets), alone.sum()) == (2, 3, 1)
        else:
            same = envs.make(f"point-{size}")
            assert (env.layout == same.layout).all() and env.tasks == same.tasks
        assert env.recipe["kind"] == kind
        assert env.recipe["episodes"] * (env.recipe["rows"] - 1) == 1_000_000


def steps_of_the_simulator():
    """Steps of OGBench 1.2.1 under MuJoCo 3.2.4 in its four mazes; see data/README.md."""
    return load_arrays(os.path.join(HERE, "data", "ogbench_steps.npz"))


@pytest.mark.parametrize("size", SIZES)
def test_ogbench_mazes_step_as_the_simulator_does(size):
    """To 1e-4 with one contact. With several the bounds are just above today's errors: with
    stiffness or friction changed by a tenth one of the mazes is beyond them."""
    recorded, env = steps_of_the_simulator(), envs.make(f"pointmaze-{size}-navigate-v0")
    s, a, s1, contacts = (recorded[f"{size}_{x}"] for x in ("s", "a", "s1", "contacts"))
    error = np.abs(env.move(s, a) - s1).max(-1)
    assert error[contacts <= 1].max() < 1e-4 and (contacts == 1).sum() > 50
    assert error[contacts > 1].mean() < 0.012 and error[contacts > 1].max() < 0.0385
    assert (contacts > 1).sum() > 100
    pressed = env.centre(np.array([env.tasks[0][0]]))       # a = 1 against a wall settles at
    into = np.array([[-1.0, 0.0]]) if size in ("medium", "large") else np.array([[0.0, -1.0]])
    for _ in range(20):                                     # p = left (p + 0.2)
        pressed = env.move(pressed, into)
    assert env._deepest_contact(pressed)[0][0] == pytest.approx(0.0431, abs=1e-4)


def test_teleporters_jump_one_step_later_to_a_random_outlet():
    recorded, env = steps_of_the_simulator(), envs.make("pointmaze-teleport-navigate-v0")
    s, a, s1 = (recorded[f"jump_{x}"] for x in ("s", "a", "s1"))
    inside = (np.sqrt(((s[:, None] - env.inlets) ** 2).sum(-1)) <= 1.5).any(1)
    assert 20 < inside.sum() < 50
    moved = env.move(s, a, np.random.default_rng(0))
    np.testing.assert_allclose(moved[~inside], s1[~inside], atol=1e-4)
    for end in (s1, moved):
        gap = np.abs(end[inside] - 0.2 * a[inside] - env.outlets[:, None]).max(-1)
        assert (gap.min(0) < 1e-9).all() and len(set(gap.argmin(0))) == 3
    many = env.move(np.tile(env.inlets[:1], (9000, 1)), np.zeros((9000, 2)),
                    np.random.default_rng(1))
    share = [(many == outlet).all(1).mean() for outlet in env.outlets]
    np.testing.assert_allclose(share, 1 / 3, atol=0.02)


def test_ogbench_ties_between_shortest_paths():
    """Of the best neighbours OGBench takes up before left before down before right."""
    env, both = envs.make("pointmaze-medium-navigate-v0"), 0
    for s, cell in enumerate(env.cells):
        near = [env.index[tuple(cell + move)] for move in ((-1, 0), (0, -1), (1, 0), (0, 1))]
        for g in range(len(env.cells)):
            best = [i for i in near if i >= 0 and env.distance[i, g] < env.distance[s, g]]
            assert env.next_cell[s, g] == (best[0] if best else s)
            both += near[0] in best and near[2] in best
    assert both > 0                                         # up and down as good


def test_data_sets_are_made_once(monkeypatch, tmp_path):
    """By the recipe, from seed 0 in every run; a file of another recipe is refused."""
    monkeypatch.chdir(tmp_path)
    env = envs.make("pointmaze-teleport-stitch-v0")
    env.recipe = dict(env.recipe, episodes=20)
    env.dataset()
    made = envs.collect(env, np.random.default_rng(0), "stitch", episodes=20, rows=201, noise=0.5)
    monkeypatch.setattr(envs, "collect", None)              # it is read
    data = env.dataset(np.random.default_rng(1))
    datasets.check_dataset(data, env)
    assert (data.observations == made.observations).all() and (data.actions == made.actions).all()
    jumps = np.abs(np.diff(data.observations, axis=0)).max(1)[data.valid] > 1
    assert 0 < jumps.mean() < 0.02 and not jumps.reshape(20, 200)[:, 0].any()
    env.friction = 0.4
    with pytest.raises(ValueError, match="was not made by today's recipe"):
        env.dataset()


def test_own_data_agree_with_the_generator_of_ogbench():
    """Mean length and turning of steps, share of steps at walls, and shares of the cells (in row
    order, 1/10,000) in 1000 trajectories by OGBench's own script; here 200, with their deviation.
    """
    env = envs.make("pointmaze-medium-navigate-v0")
    published = np.array([
        159, 170, 218, 120, 195, 599, 582, 558, 132, 808, 954, 1040, 263, 330, 839, 588, 335, 216,
        280, 366, 414, 165, 146, 203, 115, 206]) / 1e4
    data = envs.collect(env, np.random.default_rng(0), **{**env.recipe, "episodes": 200})
    s = data.observations.reshape(200, -1, 2).astype(float)
    a, step = data.actions.reshape(s.shape)[:, :-1], np.diff(s, axis=1)
    angle = np.diff(np.arctan2(step[..., 1], step[..., 0]), axis=1)
    turn = np.abs(np.remainder(angle + np.pi, 2 * np.pi) - np.pi)
    touched = np.abs(s[:, :-1] + 0.2 * a - s[:, 1:]).max(-1) > 1e-4
    cells = np.bincount(env.number(data.observations), minlength=26) / len(data.observations)
    assert np.sqrt((step ** 2).sum(-1)).mean() == pytest.approx(0.19098, rel=0.003)
    assert turn.mean() == pytest.approx(0.8881, rel=0.1)
    assert touched.mean() == pytest.approx(0.005626, rel=0.3)
    assert 0.5 * np.abs(cells - published).sum() < 0.07


def test_radial_basis_functions_by_hand():
    """3 exp(-d^2 / (2 (3/4 side)^2)) about each cell's centre, wall or free, beside x."""
    env = envs.make("pointmaze-giant-navigate-v0", encoding="rbf")
    x = np.array([[0, 0], [13.5, 37.25]], np.float32)
    seen = env.encode(x)
    assert seen.shape == (2, 2 + 12 * 16) and seen.dtype == np.float32
    assert (seen[:, :2] == x).all() and env.encode(x, float).dtype == float
    cells = [(row, column) for row in range(12) for column in range(16)]
    for at, rbf in zip(x, seen[:, 2:]):
        by_hand = 3 * np.exp(-((env.centre(cells) - at) ** 2).sum(1) / 18)
        by_hand[by_hand < 1e-30] = 0                    # none subnormal
        np.testing.assert_allclose(rbf, by_hand, rtol=1e-4)
    env.see_positions()
    assert (env.encode(x) == x).all() and not env.extra


def test_goal_direction_by_hand():
    """Three times the displacement near the goal, six long far from it; only when asked for."""
    s, g = np.array([[1, 2, 7], [1, 2, 7]], np.float32), np.array([[4, 6, 8], [1.01, 2, 8]])
    plain, more = (envs.make("pointmaze-medium-navigate-v0", encoding=x) for x in (
        "rbf", "direction"))
    assert (plain.pair(s, g) == np.concatenate([s, g], 1)).all()
    assert (plain.extra, more.extra) == (0, 2)
    np.testing.assert_allclose(more.pair(s, g)[:, 6:], [[18 / 29**0.5, 24 / 29**0.5], [0.03, 0]],
                               atol=1e-4)
    assert (more.pair(s, g)[:, :6] == plain.pair(s, g)).all()
    with pytest.raises(ValueError, match="unknown encoding 'way'"):
        envs.make("pointmaze-medium-navigate-v0", encoding="way")
