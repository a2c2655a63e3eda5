"""Tests of lab/ogbench.py: the simulator, data files, tuned settings and input encodings.

    python -m pytest lab/test_ogbench.py        20 seconds
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import dataclasses
import os

import numpy as np
import pytest
from scipy.optimize import minimize

import envs
import hiql
from lab import baselines, hiql_variants, ogbench
from nets import length_normalize, mlp
from support import datasets
from support.runs import HERE, generators, load_arrays

MAPS = {                                # locomaze/maze.py's arrays: 1 is a wall
    "medium": "11111111 10011001 10010001 11000111 10010001 10100101 10001001 11111111",
    "large": "111111111111 100001000001 101101010101 100000010001 101111011101 100101000001 "
             "110101010111 100100010001 111111111111",
    "giant": "1111111111111111 1010000001100001 1010110101001101 1000100100010001 "
             "1011101111110101 1000100010000101 1110101001010111 1000100100010001 "
             "1010101111110101 1011100010001101 1000001000100001 1111111111111111",
    "teleport": "111111111111 100000101001 110100010011 110111000001 100001010101 "
                "101101010101 101101010101 100001000101 111111111111"}

TASKS = {                               # of OGBench: start row, column; goal row, column
    "medium": [[1, 1, 6, 6], [6, 1, 1, 6], [5, 3, 4, 2], [6, 5, 6, 1], [2, 6, 1, 1]],
    "large": [[1, 1, 7, 10], [5, 4, 7, 1], [7, 4, 1, 10], [3, 8, 5, 4], [1, 1, 5, 4]],
    "giant": [[1, 1, 10, 14], [1, 14, 10, 1], [8, 14, 1, 1], [8, 3, 5, 12], [5, 9, 3, 8]],
    "teleport": [[1, 10, 7, 1], [1, 1, 7, 10], [5, 6, 7, 10], [7, 1, 7, 10], [5, 6, 7, 1]]}
MEANS = {                               # of all positions: episodes, rows, x and y
    ("medium", "navigate"): (5, 150, [7.7235708, 10.7649162]),
    ("teleport", "stitch"): (30, 60, [16.8684268, 9.1955018])}


# ---------------------------------------------------------------------------------- simulator


@pytest.mark.parametrize("kind", ["navigate", "stitch"])
@pytest.mark.parametrize("size, cells, lengths", [
    ("medium", 26, [10, 10, 6, 10, 8]), ("large", 46, [15, 19, 12, 14, 15]),
    ("giant", 86, [30, 26, 30, 26, 17]), ("teleport", 45, [19, 15, 10, 21, 15])])
def test_layouts_and_tasks(size, cells, lengths, kind):
    """OGBench's maps, tasks and path lengths; an outlet of the teleport maze stands alone."""
    env = envs.make(f"pointmaze-{size}-{kind}-v0")
    assert ["".join(map(str, row)) for row in env.walls.astype(int)] == MAPS[size].split()
    assert len(env.cells) == cells
    assert [int(env.distance[env.index[a], env.index[b]]) for a, b in env.tasks] == lengths
    assert (env.distance == env.distance.T).all()
    alone = (env.distance == -1).sum(1) == len(env.cells) - 1
    assert alone.sum() == (size == "teleport") and (env.distance[~alone][:, ~alone] >= 0).all()
    assert (len(env.inlets), len(env.outlets)) == ((2, 3) if size == "teleport" else (0, 0))
    assert np.reshape(env.tasks, (5, 4)).tolist() == TASKS[size]
    assert (env.noise, env.radius, env.speed, env.side, env.pair_distance, env.discrete) == (
        1, 0.7, 0.2, 4, 6, False)
    goals = env.place(np.array(env.tasks)[:, 1])
    for axis in np.eye(2):
        assert env.success(goals, goals + 0.99 * axis).all()
        assert not env.success(goals, goals + 1.01 * axis).any()
    assert env.limits(goals, goals).tolist() == [1000] * 5 and env.time_limit == 1000
    long = (500, 2001) if size == "giant" else (1000, 1001)
    episodes, rows = long if kind == "navigate" else (5000, 201)
    assert env.recipe == dict(kind=kind, episodes=episodes, rows=rows, noise=0.5)


def test_nothing_tunnels_or_overlaps_walls():
    """Random and wall-hugging actions: discs stay out of walls, but for the soft contact."""
    env, rng = envs.make("pointmaze-large-navigate-v0"), np.random.default_rng(0)
    s = env.place(env.cells[rng.integers(len(env.cells), size=1000)], rng)
    a = rng.uniform(-1, 1, s.shape)
    for _ in range(60):
        new = rng.random(1000) < 0.2
        a[new] = rng.choice([-2.0, -1, 0, 1, 2], size=(new.sum(), 2))
        moved = env.move(s, a)
        assert env.distance[env.number(s), env.number(moved)].max() <= 2    # around a corner
        assert ((moved - s) ** 2).sum(1).max() < 3.4 * env.speed**2
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7),
                       (-0.7, -0.7)):
            env.number(moved + (env.radius - 0.1) * np.array([dx, dy]))     # raises in a wall
        s = moved


def steps_of_the_simulator():
    """Steps of OGBench 1.2.1 under MuJoCo 3.2.4 in its four mazes; see data/README.md."""
    return load_arrays(os.path.join(HERE, "data", "ogbench_steps.npz"))


@pytest.mark.parametrize("size", ["medium", "large", "giant", "teleport"])
def test_ogbench_mazes_step_as_the_simulator_does(size):
    recorded, env = steps_of_the_simulator(), envs.make(f"pointmaze-{size}-navigate-v0")
    s, a, s1, contacts = (recorded[f"{size}_{x}"] for x in ("s", "a", "s1", "contacts"))
    error = np.abs(env.move(s, a) - s1).max(-1)
    assert error[contacts <= 1].max() < 1e-4 and (contacts == 1).sum() > 50
    assert error[contacts > 1].mean() < 0.02 and error[contacts > 1].max() < 0.07
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


def test_several_contacts_by_brute_force():
    """The energy of `_soften` at its least, found by scipy: friction 0.5, stiffness 3; a single
    contact keeps 0.1772152 of its depth."""
    env, rng = envs.make("pointmaze-medium-navigate-v0"), np.random.default_rng(0)
    angle, depth = rng.uniform(0, 2, (5, 9)), np.zeros((5, 9))
    depth[:, :3] = rng.uniform(0, 0.1, (5, 3))
    depth[0, 1:] = 0                                    # one contact, else three
    normal = np.stack([np.cos(angle), np.sin(angle)], -1)
    found = env._soften(depth, normal)
    np.testing.assert_allclose(found[0], 0.8227848 * depth[0, 0] * normal[0, 0], rtol=1e-6)
    for u, depths, normals in zip(found, depth, normal):
        def energy(u):
            total = u @ u
            for d, n in zip(depths[depths > 0], normals):
                t = 0.5 * np.array([-n[1], n[0]])
                for facet in (n, n, n + t, n - t):
                    total += 3 * max(0, 0.8227848 * 13 / 12 * d - facet @ u) ** 2
            return total

        least = minimize(energy, u + 0.01, method="Nelder-Mead", options={"xatol": 1e-8,
                                                                          "fatol": 1e-14}).x
        np.testing.assert_allclose(u, least, atol=1e-6)


def test_ogbench_ties_between_shortest_paths():
    """Of two best neighbours OGBench takes up before left before down before right."""
    env = envs.make("pointmaze-medium-navigate-v0")
    toward = {goal: tuple(env.cells[env.next_cell[env.index[4, 4], env.index[goal]]])
              for goal in ((1, 5), (6, 3), (4, 4), (3, 2))}
    assert toward == {(1, 5): (3, 4), (6, 3): (5, 4), (4, 4): (4, 4), (3, 2): (3, 4)}
    ahead = env.distance[env.next_cell, np.arange(len(env.cells))]
    np.testing.assert_array_equal(ahead, np.maximum(env.distance - 1, 0))
    both = 0
    for s, cell in enumerate(env.cells):
        near = [env.index[tuple(cell + move)] for move in ((-1, 0), (0, -1), (1, 0), (0, 1))]
        for g in range(len(env.cells)):
            best = [i for i in near if i >= 0 and env.distance[i, g] < env.distance[s, g]]
            assert env.next_cell[s, g] == (best[0] if best else s)
            both += near[0] in best and near[2] in best
    assert both > 0                                         # up and down as good


# --------------------------------------------------------------------------------------- data


@pytest.fixture
def small_recipe(monkeypatch, tmp_path):
    """small_recipe(name, **changes) changes what makes an environment's data; in a new folder."""
    def change(name, **changes):
        entry = envs.ENVIRONMENTS[name]
        monkeypatch.setitem(envs.ENVIRONMENTS, name, dataclasses.replace(
            entry, recipe={**entry.recipe, **changes}))
        return envs.make(name)

    monkeypatch.chdir(tmp_path)
    return change


def test_data_sets_are_made_once(small_recipe, capsys):
    """By the recipe, from seed 0 in every run."""
    name = "pointmaze-teleport-stitch-v0"
    env = small_recipe(name, episodes=50)
    first = env.dataset()
    assert os.listdir("datasets") == [f"{name}.npz"]
    assert f"kept in datasets/{name}.npz\n" in capsys.readouterr().out
    datasets.check_dataset(first, env)
    again = env.dataset(np.random.default_rng(1))           # the same for every seed
    assert capsys.readouterr().out == "" and (again.observations == first.observations).all()
    made = envs.collect(env, np.random.default_rng(0), "stitch", episodes=50, rows=201, noise=0.5)
    assert (made.observations == first.observations).all() and (made.actions == first.actions).all()
    jumps = np.abs(np.diff(first.observations, axis=0)).max(1)[first.valid] > 1
    assert 0 < jumps.mean() < 0.02 and not jumps.reshape(50, 200)[:, 0].any()


def test_stale_data_sets_are_made_again(small_recipe, monkeypatch):
    """Whatever decides the data and differs from the file's recipe, and a file without one; what
    was there is kept under another name."""
    name = "pointmaze-medium-navigate-v0"
    path = f"datasets/{name}.npz"
    env = small_recipe(name, episodes=2, rows=3)
    env.dataset()

    def made_again():
        before = open(path, "rb").read()
        env.dataset()
        assert ogbench.recipe_of(path) == env.made_by()
        aside = [x for x in os.listdir("datasets") if x != f"{name}.npz"]
        for old in aside:
            assert open(f"datasets/{old}", "rb").read() == before
            os.unlink(f"datasets/{old}")
        return len(aside) == 1

    assert not made_again()
    for changes in (dict(noise=0.4), dict(kind="stitch"), dict(episodes=3), dict(rows=4)):
        env = small_recipe(name, **changes)
        assert made_again() and not made_again(), changes
    for key in ("speed", "radius", "noise", "tolerance", "left", "stiffness", "friction"):
        with monkeypatch.context() as patch:
            patch.setattr(env, key, 0.9 * getattr(env, key))
            assert made_again(), key
        assert made_again()
    env.layout[1, 1] = "#"
    assert made_again()
    monkeypatch.setattr(ogbench, "RECIPE_VERSION", ogbench.RECIPE_VERSION + 1)
    assert made_again()
    datasets.save_dataset(path, env.dataset())              # one without a recipe, as OGBench's
    assert made_again()
    np.savez(path, recipe=env.made_by())                    # of this recipe, but damaged
    with pytest.raises(ValueError, match="has no .*; remove datasets/.+npz, and it is made again"):
        env.dataset()


def test_the_version_of_the_recipe_stands_for_these_data():
    """Numbers that version 1 made from draws which numpy has frozen. Where they have changed on
    purpose, raise RECIPE_VERSION: users then get new data instead of stale ones."""
    class Frozen(np.random.RandomState):
        integers = np.random.RandomState.randint

    assert ogbench.RECIPE_VERSION == 1
    for (size, kind), (episodes, rows, mean) in MEANS.items():
        env = envs.make(f"pointmaze-{size}-{kind}-v0")
        data = envs.collect(env, Frozen(0), kind, episodes, rows, noise=1.0)
        np.testing.assert_allclose(data.observations.astype(float).mean(0), mean, atol=1e-6)
        i = data.valid
        off = np.abs(data.observations[i] + 0.2 * data.actions[i] - data.observations[i + 1])
        assert (off > 1e-4).any(1).sum() > 5                # at walls; jumps where there are any
        assert (off > 1).any() == (size == "teleport")


def test_a_run_on_ogbench_makes_its_data(small_recipe, monkeypatch):
    """No file given: made once, kept; a file given: no cache, and the same run."""
    name = "pointmaze-medium-navigate-v0"
    small_recipe(name, episodes=30, rows=101)
    monkeypatch.setattr(envs.PointMaze, "limits", lambda env, s, g: np.full(len(s), 20))
    given = {"env": name, "quick": True, "steps": 4, "policy_steps": 2}
    first = hiql.train(None, hiql.resolve(given)).summary
    os.rename("datasets", "elsewhere")
    again = hiql.train(None, hiql.resolve({**given, "dataset": f"elsewhere/{name}.npz"})).summary
    assert not os.path.exists("datasets")
    assert {**first, "train_seconds": 0} == {**again, "train_seconds": 0}


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


# ------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("size", ["medium", "large", "giant", "teleport"])
@pytest.mark.parametrize("kind", ["navigate", "stitch"])
def test_what_the_environments_change_in_the_settings(size, kind):
    """Tuned ones; with --published-rates OGBench's, but for sizes and the number of updates."""
    name, giant, stitch = f"pointmaze-{size}-{kind}-v0", size == "giant", kind == "stitch"
    published = dict(
        lr=3e-4, lr_decay=False, tau=0.005, expectile=0.7, discount=0.995 if giant else 0.99,
        goal_discount=0, subgoal_steps=25, high_alpha=3, low_alpha=3, rep_dim=10,
        rep_type="phi_sg", policy_steps=0, value_p_curgoal=0.2, value_p_trajgoal=0.5,
        actor_p_randomgoal=0.5 * stitch, first_layer_init="glorot", eval_episodes=50,
        subgoal_interval=1, temperature=0)
    c = hiql.resolve({"env": name, "published_rates": True})
    assert {x: getattr(c, x) for x in published} == published
    tuned = dict(
        discount=0.998 if giant else 0.997, value_p_trajgoal=0.7, tau=0.3, lr=1e-3, low_alpha=10,
        high_alpha=0.3 if stitch else 10, goal_discount=0.99 * stitch, steps=30_000,
        policy_steps=15_000, subgoal_interval=10)
    c = hiql.resolve({"env": name})
    assert {x: getattr(c, x) for x in tuned} == tuned
    assert envs.make(name).encoding == ("rbf" if stitch else "rbf+direction")
    assert hiql.resolve({"env": name, "tau": 0.2}).tau == 0.2           # flags go first


# ---------------------------------------------------------------------------------- encodings


def test_radial_basis_functions_by_hand():
    """3 exp(-d^2 / (2 (3/4 side)^2)) about each cell's centre, wall or free, beside x."""
    env = envs.make("pointmaze-giant-navigate-v0", encoding="rbf")
    x = np.array([[0, 0], [13.5, 37.25]], np.float32)
    seen = env.encode(x)
    assert seen.shape == (2, 2 + 12 * 16) and seen.dtype == np.float32
    assert (seen[:, :2] == x).all() and env.encode(x, float).dtype == float
    rbf = seen[:, 2:].reshape(2, 12, 16)
    assert rbf[0, 1, 1] == 3 and np.argmax(rbf[0]) == 17            # cell (1, 1) lies at (0, 0)
    np.testing.assert_allclose(rbf[0, 1, 2], 3 * np.exp(-8 / 9), rtol=1e-6)
    np.testing.assert_allclose(rbf[0, 2, 2], 3 * np.exp(-16 / 9), rtol=1e-6)
    d = ((env.centre([(10, 4)])[0] - x[1]) ** 2).sum()
    np.testing.assert_allclose(rbf[1, 10, 4], 3 * np.exp(-d / 18), rtol=1e-5)
    far = 3 * np.exp(-8 / 9 * np.add.outer((np.arange(12) - 1) ** 2, (np.arange(16) - 1) ** 2))
    assert ((rbf[0] > 0) == (far > 1e-30)).all() and (rbf[0] == 0).any()    # none subnormal
    assert (envs.make(env.name, encoding="position").encode(x) == x).all()
    env.see_positions()
    assert (env.encode(x) == x).all() and not env.extra
    with pytest.raises(ValueError, match="unknown encoding 'way'"):
        envs.make(env.name, encoding="way")


@pytest.mark.parametrize("encoding", ogbench.ENCODINGS)
def test_goal_direction_by_hand(encoding):
    """Three times the displacement near the goal, six long far from it; only when asked for."""
    env = envs.make("pointmaze-medium-navigate-v0", encoding=encoding)
    s, g = np.array([[1, 2, 7], [1, 2, 7]], np.float32), np.array([[4, 6, 8], [1.01, 2, 8]])
    seen, direction = env.pair(s, g), "direction" in encoding
    assert env.extra == 2 * direction and seen.shape == (2, 6 + 2 * direction)
    assert (seen[:, :6] == np.concatenate([s, g], 1)).all()
    if direction:
        np.testing.assert_allclose(seen[:, 6:], [[18 / 29**0.5, 24 / 29**0.5], [0.03, 0]],
                                   atol=1e-4)


@pytest.mark.parametrize("program, agent", [(hiql_variants, "direction"), (hiql_variants, "rbf"),
                                            (baselines, "gciql"), (baselines, "gcbc")])
def test_networks_see_the_encoding_in_training_and_in_acting(program, agent, small_data, tmp_path,
                                                             monkeypatch):
    """Which networks have inputs for it, where first layers bend, and what actions depend on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(envs.PointMaze, "limits", lambda env, s, g: np.full(len(s), 2))
    name = "agent" if program is baselines else "variant"
    c = program.resolve({"env": "pointmaze-medium-navigate-v0", name: agent, "quick": True,
                         "steps": 2, "policy_steps": 0, "first_layer_init": "data"})
    env = envs.make(c.env, **({"encoding": agent} if name == "variant" else {}))
    result = program.train(c)
    params, S, d = result.agent["params"], 2 if agent == "direction" else 66, env.extra
    sizes = {"gciql": {"v": 2 * S + d, "q": 2 * S + d + 2, "target": 2 * S + d + 2,
                       "flat": 2 * S + d}, "gcbc": {"flat": 2 * S + d}}.get(agent, {
        "phi": 2 * S + d, "value": S + 10, "target": S + 10, "high": 2 * S + d, "low": S + 10})
    first = {name: (p if "dense0" in p else next(iter(p.values())))["dense0"]["W"]
             for name, p in params.items()}
    assert {name: w.shape[-2] for name, w in first.items()} == sizes
    s, g = env.place(env.cells), env.place(env.cells[::-1])
    seen = env.pair(env.encode(s), env.encode(g))
    if "low" in params:
        z = length_normalize({}, mlp(params["high"], seen)[0])[0]
        mean = mlp(params["low"], np.concatenate([env.encode(s), z], -1))[0]
        assert (hiql.value_map(params, s, g, c, env) == hiql.mean_value(
            params, env.encode(s), env.encode(g), c, env)).all()
    else:
        mean = mlp(params["flat"], seen)[0]
    np.testing.assert_allclose(result.act(s, g, 0), np.clip(mean, -1, 1), atol=1e-5)
    if agent == "rbf":              # units bend at states of the data
        data = env.dataset()
        low = hiql.init_params(c, env, data, generators(0, "init", "flat"))["low"]["dense0"]
        at = low["W"][:S].T @ env.encode(data.observations[data.valid]).T + low["b"][:, None]
        assert (np.abs(at).min(1) < 1e-3).all()
