"""The proofs of the reference, in the order of its files: nets, envs, hiql, hiro; then its form.

    python -m pytest test_all.py              the fast tests, in under a minute
    python -m pytest test_all.py -m slow      the learning tests that take minutes
    python -m pytest                          these, and those of support/ and lab/
    python test_all.py                        prints the gradient certificate and the speed table,
                                              in about two minutes

Nothing here imports lab/. GOLDEN_HIQL=FILE.npz checks HIQL's update against another golden file of
the same layout.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import ast
import contextlib
import dataclasses
import glob
import graphlib
import inspect
import io
import math
import os
import re
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest

import envs
import hiql
import hiro
from nets import flatten, mlp, tree_map, unflatten
from support import offline, online
from support.datasets import check_dataset, load_dataset, save_dataset
from support.run import HERE, Run, generators

GOLDEN = os.environ.get("GOLDEN_HIQL", os.path.join(HERE, "data", "golden_hiql_f64.npz"))


def close(a, b, tolerance=1e-9):
    """The certificate's error of a against b: max|a - b| / max(max|b|, 1e-3)."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)
    assert error < tolerance, error


# =============================================================================== nets: layers


def test_gradient_certificate():
    """Every layer and every loss: analytic derivatives equal the complex step."""
    for name, errors in certificate().items():
        for array, error in errors.items():
            assert error < 1e-12, (name, array, error)


def test_the_complex_step_sees_a_wrong_derivative():
    x = np.linspace(-1, 1, 5)
    errors = nets.derivative_error(lambda t: (t["x"] ** 3).sum(), {"x": x}, {"x": 3.001 * x**2})
    assert 1e-4 < errors["x"] < 1e-2


def test_the_complex_step_takes_stopped_gradients_for_constants():
    """d/dx of x stop_gradient(x) is x; without the stop it would be 2 x."""
    x = np.linspace(-1, 1, 5)

    def stopped(tree):
        return (tree["x"] * nets.stop_gradient(tree["x"])).sum()

    assert nets.derivative_error(stopped, {"x": x}, {"x": x})["x"] < 1e-15
    assert nets.derivative_error(stopped, {"x": x}, {"x": 2 * x})["x"] == pytest.approx(1)


def test_activations_and_norms_by_hand():
    x = np.array([[-1.0, 0.0, 2.0]])
    np.testing.assert_allclose(nets.relu({}, x)[0], [[0, 0, 2]])
    np.testing.assert_allclose(nets.gelu({}, x)[0], [[-0.15880801, 0, 1.95459769]], atol=1e-8)
    p = {"scale": np.array([1.0, 2.0, 1.0]), "shift": np.array([0.0, 1.0, 0.0])}
    y = nets.layer_norm(p, x)[0]                            # mean 1/3, biased variance 14/9
    np.testing.assert_allclose(y, [[-1.06904497, 1 - 2 * 0.26726124, 1.33630621]], atol=1e-5)
    z = nets.length_normalize({}, np.array([[3.0, 4.0]]))[0]
    np.testing.assert_allclose(z, np.sqrt(2) * np.array([[0.6, 0.8]]))


def test_log_probabilities_by_hand():
    mean, x = np.zeros((1, 2)), np.array([[1.0, -2.0]])
    assert nets.gaussian_log_prob({}, mean, x)[0][0] == pytest.approx(-2.5 - np.log(2 * np.pi))
    p = {"log_std": np.log([2.0, 1.0])}
    assert nets.gaussian_log_prob(p, mean, x)[0][0] == pytest.approx(
        -0.125 - 2 - np.log(2) - np.log(2 * np.pi))
    log_prob = nets.categorical_log_prob({}, np.log([[1.0, 2.0, 5.0]]), np.array([2]))[0]
    assert log_prob[0] == pytest.approx(np.log(5 / 8))


def twin_net(dtype=float, seed=0):
    """Parameters of an ensemble of two networks, 3 -> 8 -> 8 -> 2, with LayerNorm."""
    rng = np.random.default_rng(seed)
    p = nets.init_mlp(rng, (3, 8, 8, 2), norm=True, ensemble=2)
    return tree_map(lambda w: (w + 0.3 * rng.normal(size=w.shape)).astype(dtype), p)


def test_an_mlp_is_dense_activation_norm():
    """Layer by layer, with both activations, with norms and without."""
    p, x = twin_net(), np.random.default_rng(1).normal(size=(5, 3))
    for activation in (nets.gelu, nets.relu):
        for norms in (True, False):
            q = {name: layer for name, layer in p.items() if norms or "norm" not in name}
            h = x
            for i in (0, 1, 2):
                h = h @ q[f"dense{i}"]["W"] + q[f"dense{i}"]["b"][:, None]
                if i < 2:
                    h = activation({}, h)[0]
                    h = nets.layer_norm(q[f"norm{i}"], h)[0] if norms else h
            close(mlp(q, x, activation)[0], h, 1e-14)


def test_ensemble_is_two_separate_nets():
    p, x = twin_net(), np.random.default_rng(1).normal(size=(5, 3))
    y, back = mlp(p, x)
    dy = np.random.default_rng(2).normal(size=y.shape)
    dx, grads = back(dy)
    parts = [mlp(tree_map(lambda w: w[i], p), x) for i in (0, 1)]
    for i, (yi, back_i) in enumerate(parts):
        close(y[i], yi, 1e-14)
        for name, g in flatten(back_i(dy[i])[1]).items():
            close(flatten(grads)[name][i], g, 1e-13)
    close(dx, sum(back_i(dy[i])[0] for i, (_, back_i) in enumerate(parts)), 1e-13)


def test_evaluations_do_not_disturb_each_other():
    """A second forward pass, other backs and a repeated back leave a derivative as it was."""
    p, rng = twin_net(), np.random.default_rng(1)
    x, dy = rng.normal(size=(5, 3)), rng.normal(size=(2, 5, 2))
    x0, dy0 = x.copy(), dy.copy()
    y, back = mlp(p, x)
    first = flatten(back(dy)[1])
    mlp(p, x + 1)[1](2 * dy)
    for name, g in flatten(back(dy)[1]).items():
        assert (g == first[name]).all()
    assert (x == x0).all() and (dy == dy0).all() and (y == mlp(p, x)[0]).all()


def test_float32_stays_float32():
    """Layers, HIQL's losses, TD3's: nothing widens numbers to float64 on the way."""
    p, x = twin_net(np.float32), np.ones((4, 3), np.float32)
    y, back = mlp(p, x)
    dx, grads = back(y)
    assert y.dtype == dx.dtype == np.float32
    assert all(g.dtype == np.float32 for g in flatten(grads).values())
    for layer, out in ((nets.length_normalize({}, x), x), (nets.relu({}, x), x),
                       (nets.tanh({}, x), x), (nets.gaussian_log_prob({}, x, x), x[:, 0]),
                       (nets.categorical_log_prob({}, x, np.zeros(4, int)), x[:, 0])):
        assert layer[0].dtype == layer[1](out)[0].dtype == np.float32

    def narrow(tree):
        return tree_map(lambda x: x.astype(np.float32) if x.dtype == float else x, tree)

    config, params, batch = toy()
    for loss in (*hiql.LOSSES.values(), hiql.flat_loss):
        grads = loss(narrow(params), narrow(batch), config)[1]
        assert all(g.dtype == np.float32 for g in flatten(grads).values()), loss
    networks, target, batch, noise = (narrow({"x": x})["x"] for x in toy_td3())
    y = hiro.td3_target(target, batch, noise, 0.9)
    grads = [hiro.actor_loss(networks, batch["observations"])[1]]
    grads += [hiro.critic_loss(networks, batch, y, kind)[1] for kind in ("huber", "squared")]
    assert all(g.dtype == np.float32 for tree in grads for g in flatten(tree).values())
    assert y.dtype == np.float32


def test_adam_and_ema_by_hand():
    """First step: lr sign(g); second step with g = 1, 3 from Kingma and Ba's formulas."""
    p = {"w": np.array([1.0]), "other": np.array([5.0])}
    state = nets.adam_init(p)
    nets.adam(p, {"w": np.array([1.0])}, state, lr=0.1)
    assert p["w"][0] == pytest.approx(0.9, abs=1e-8)
    nets.adam(p, {"w": np.array([3.0])}, state, lr=0.1)
    m, v = (0.9 * 0.1 + 0.1 * 3) / (1 - 0.81), (0.999 * 0.001 + 0.001 * 9) / (1 - 0.999**2)
    assert p["w"][0] == pytest.approx(0.9 - 0.1 * m / np.sqrt(v), abs=1e-7)
    assert p["other"][0] == 5 and state["m"]["other"][0] == 0 and state["count"] == 2
    target = {"w": np.array([2.0])}
    nets.ema(target, {"w": np.array([4.0])}, 0.25)
    assert target["w"][0] == 2.5


def test_initialisation():
    p = nets.init_mlp(np.random.default_rng(0), (40, 60, 20), norm=True, ensemble=2,
                      last_scale=0.1)
    for name, limit in (("dense0", np.sqrt(6 / 100)), ("dense1", 0.1 * np.sqrt(6 / 80))):
        w = np.abs(p[name]["W"])
        assert 0.98 * limit < w.max() <= limit and w.mean() == pytest.approx(limit / 2, rel=0.05)
        assert not p[name]["b"].any()
    assert not (p["dense0"]["W"][0] == p["dense0"]["W"][1]).any()
    assert (p["norm0"]["scale"] == 1).all() and set(p) == {"dense0", "norm0", "dense1"}


# ================================================================================ envs: mazes

OGBENCH_MAPS = {                        # locomaze/maze.py's arrays: 1 is a wall
    "medium": "11111111 10011001 10010001 11000111 10010001 10100101 10001001 11111111",
    "large": "111111111111 100001000001 101101010101 100000010001 101111011101 100101000001 "
             "110101010111 100100010001 111111111111",
    "giant": "1111111111111111 1010000001100001 1010110101001101 1000100100010001 "
             "1011101111110101 1000100010000101 1110101001010111 1000100100010001 "
             "1010101111110101 1011100010001101 1000001000100001 1111111111111111"}
MAZES = [name for name in envs.ENVIRONMENTS if not name.startswith("pointmaze")]
CORRIDOR = "######### #.......# #########"


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry, for tests that add to it."""
    monkeypatch.setattr(envs, "ENVIRONMENTS", dict(envs.ENVIRONMENTS))


@pytest.mark.parametrize("name", MAZES)
def test_layouts_and_tasks(name):
    """Closed walls, one connected part, tasks in free cells; OGBench's maps and path lengths."""
    env = envs.make(name)
    for size, rows in OGBENCH_MAPS.items():
        if size in name:
            assert ["".join(map(str, row)) for row in env.walls.astype(int)] == rows.split()
    walls = env.walls
    assert walls[0].all() and walls[-1].all() and walls[:, 0].all() and walls[:, -1].all()
    assert (env.distance == env.distance.T).all() and (env.distance >= 0).all()
    lengths = [int(env.distance[env.index[a], env.index[b]]) for a, b in env.tasks]
    published = {"medium": (26, [10, 10, 6, 10, 8]), "large": (46, [15, 19, 12, 14, 15]),
                 "giant": (86, [30, 26, 30, 26, 17])}
    for layout, (cells, tasks) in published.items():
        if layout in name:
            assert len(env.cells) == cells and lengths == tasks
    assert len(env.tasks) == 5 and min(lengths) > 1


def test_shortest_paths_by_hand():
    env = envs.make("point-umaze")                          # seven cells in a row, bent
    order = [env.index[c] for c in ((1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1))]
    for i, a in enumerate(order):
        for j, b in enumerate(order):
            assert env.distance[a, b] == abs(i - j)
            assert env.next_cell[a, b] == order[i + np.sign(j - i)]
    s, g = np.array([[1.0, 0.0]]), np.array([[0.0, 7.0]])
    assert env.path_length(s, g)[0] == pytest.approx(3 + 5 * 4)
    assert env.path_length(s, np.array([[4.5, 0.0]]))[0] == pytest.approx(3.5)


def test_grid_moves_slips_and_success():
    env = envs.make("grid-fourrooms")
    s = np.array([[1.0, 1.0]] * 5)
    moved = env.move(s, np.arange(5))
    assert moved.tolist() == [[1, 1], [1, 1], [2, 1], [1, 1], [1, 2]]
    assert env.success(moved, s).tolist() == [True, True, False, True, False]
    slippery = envs.make("grid-fourrooms", slip=0.5)
    centre = np.full((20000, 2), 3.0)
    moved = slippery.move(centre, np.full(20000, 4), np.random.default_rng(0))
    assert (moved == [3, 4]).all(1).mean() == pytest.approx(0.5 + 0.5 / 5, abs=0.015)
    with pytest.raises(ValueError, match="integer from 0 to 4"):
        env.move(s, np.full(5, 5))


@pytest.mark.parametrize("name", ["point-umaze", "point-medium", "point-giant"])
def test_nothing_tunnels_or_overlaps_walls(name):
    """Random and wall-hugging actions: discs stay out of walls, and a step crosses no wall."""
    env, rng = envs.make(name), np.random.default_rng(0)
    s = env.place(env.cells[rng.integers(len(env.cells), size=1000)], rng)
    a = rng.uniform(-1, 1, s.shape)
    for _ in range(60):
        new = rng.random(1000) < 0.2
        a[new] = rng.choice([-2.0, -1, 0, 1, 2], size=(new.sum(), 2))
        moved = env.move(s, a)
        # two cells apart is a step around a corner; cells that touch by a corner only are 4 or
        # more steps apart
        assert env.distance[env.number(s), env.number(moved)].max() <= 2
        assert ((moved - s) ** 2).sum(1).max() < 3.4 * env.speed**2
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7),
                       (-0.7, -0.7)):
            env.number(moved + (env.radius - 1e-6) * np.array([dx, dy]))    # raises in a wall
        s = moved


def test_discs_move_freely_stop_at_walls_and_slide():
    env = envs.make("point-medium")
    at = env.centre([(1, 1)])                               # walls to the left and below
    np.testing.assert_allclose(env.move(at, np.array([[0.5, 9.0]])), at + [[0.4, 0.8]])
    down = at
    for _ in range(5):
        down = env.move(down, np.array([[0.25, -1.0]]))
    np.testing.assert_allclose(down, at + [[1.0, -1.3]])    # 2 - radius below, 5 x 0.2 along
    corner = at
    for _ in range(9):
        corner = env.move(corner, np.array([[-1.0, -1.0]]))
    np.testing.assert_allclose(corner, at - 1.3)
    many = env.move(np.concatenate([at, down, corner]), np.tile([[-1.0, -0.3]], (3, 1)))
    for s, moved in zip((at, down, corner), many):          # N agents are N single agents
        np.testing.assert_array_equal(env.move(s, np.array([[-1.0, -0.3]]))[0], moved)


def test_the_registry_makes_what_it_names():
    assert envs.load("math:pi") == math.pi and envs.load(envs.Maze) is envs.Maze
    assert envs.make("grid-maze").settings("fast") == dict(
        discount=0.95, subgoal_steps=5, steps=8000, temperature=2.0)
    assert envs.make("point-umaze").settings("paper") == dict(discount=0.99, subgoal_steps=25)
    assert envs.make("point-medium").settings("fast") == {}
    recipe = dict(kind="navigate", episodes=1000, rows=201)
    assert envs.make("point-large").recipe == {**recipe, "noise": 0.5}
    assert envs.make("grid-fourrooms").recipe == {**recipe, "noise": 0.3}
    assert envs.make("point-giant", limit=7).limits(np.zeros((2, 2)), None).tolist() == [7, 7]
    for wrong in (envs.make, envs.make_task):
        with pytest.raises(ValueError, match="unknown .* 'point-tiny'; known: .*point-umaze"):
            wrong("point-tiny")
    x = np.arange(6).reshape(3, 2)
    encode = envs.make("point-medium").encoding("position")
    assert encode(x) is x and encode.extra == 0
    assert encode.pair(x, x + 7).tolist() == [[0, 1, 7, 8], [2, 3, 9, 10], [4, 5, 11, 12]]


def test_own_layouts_are_registered(registry):
    """A string is enough; class, recipe, settings and arguments go to what `make` returns."""
    envs.register("mine", layout=CORRIDOR)
    env = envs.make("mine")
    assert type(env) is envs.PointMaze and len(env.cells) == 7 and env.name == "mine"
    envs.register("grid-mine", kind=envs.GridWorld, layout=CORRIDOR, slip=0.5,
                  tasks=[((1, 2), (1, 5))], recipe=dict(episodes=20, rows=11),
                  settings=dict(discount=0.5))
    env = envs.make("grid-mine")
    assert env.slip == 0.5 and env.tasks == [((1, 2), (1, 5))]
    data = env.dataset(np.random.default_rng(0))
    check_dataset(data, env)
    assert data.lengths.tolist() == [11] * 20
    config = hiql.resolve({"env": "grid-mine"})
    assert (config.discount, config.subgoal_steps) == (0.5, 5)      # its own, those of grids
    envs.register("later", kind="nowhere:Nothing")      # an entry point: imported when made
    with pytest.raises(ModuleNotFoundError):
        envs.make("later")


@pytest.mark.parametrize("layout, message", [
    ("#### #..# ###", "rows of the layout have 3 to 4 cells"),
    ("#### #.x# ####", "this one has 'x'"), ("mediun", "a layout is one of fourrooms, maze"),
    ("#### #... ####", "border of the layout must be closed"),
    ("#### #..# #.##", "border of the layout must be closed"),
    ("##### #.#.# #####", "have no path"), ("### #.# ###", "at least two free cells"),
    ("", "at least two free cells")])
def test_wrong_layouts_are_refused(layout, message, registry):
    for kind in (envs.PointMaze, envs.GridWorld):
        with pytest.raises(ValueError, match=message):
            envs.register("mine", kind, layout=layout)
    assert "mine" not in envs.ENVIRONMENTS


@pytest.mark.parametrize("arguments, message", [
    (dict(tasks=[((1, 1), (0, 1))]), r"tasks have \(0, 1\), which is no free cell"),
    (dict(tasks=[((1, 1), (9, 9))]), "which is no free cell"),
    (dict(tasks=[(1, 1)]), "a task is a start and a goal cell"), (dict(radius=2.0), "radius"),
    (dict(speed=0.0), "speed"), (dict(contact="bounce"), "contact must be")])
def test_wrong_arguments_of_a_maze_are_refused(arguments, message, registry):
    with pytest.raises(ValueError, match=message):
        envs.register("mine", layout=CORRIDOR, **arguments)
    with pytest.raises(ValueError, match="there is an environment 'point-medium' already"):
        envs.register("point-medium", layout=CORRIDOR)
    with pytest.raises(ValueError, match="slip must be a probability"):
        envs.register("mine", envs.GridWorld, layout=CORRIDOR, slip=1.5)


def test_five_far_tasks():
    """By hand on a corridor of seven cells; the farthest two, then spread over the maze."""
    tasks = envs.GridWorld("mine", CORRIDOR).tasks
    assert tasks == [((1, a), (1, b)) for a, b in ((1, 7), (7, 1), (4, 1), (2, 7), (3, 7))]
    env = envs.PointMaze("mine", envs.LAYOUTS["giant"])
    assert env.tasks == envs.PointMaze("again", envs.LAYOUTS["giant"]).tasks != envs.TASKS["giant"]
    pairs = [(env.index[a], env.index[b]) for a, b in env.tasks]
    assert len(pairs) == 5 and env.distance[pairs[0]] == env.distance.max()
    for i, (start, goal) in enumerate(pairs):
        assert env.distance[start, goal] == env.distance[start].max()
        if i:
            before = env.distance[[a for a, _ in pairs[:i]]].min(0)
            assert before[start] == before.max() > 0


# --------------------------------------------------------------------- envs: by Gymnasium's calls


@pytest.mark.parametrize("name", ["grid-fourrooms", "point-medium"])
def test_gymnasium_convention(name):
    env, maze = envs.GoalEnv(envs.make(name)), envs.make(name)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(0)
    obs, info = env.reset(seed=5)
    again, _ = envs.GoalEnv(envs.make(name)).reset(seed=5)
    assert set(obs) == {"observation", "achieved_goal", "desired_goal"} and info == {}
    for key, x in obs.items():
        assert x.dtype == float and x.shape == (2,) and (x == again[key]).all()
    for task, cells in enumerate(maze.tasks, 1):
        obs, _ = env.reset(options={"task": task})
        assert tuple(tuple(maze.cell(obs[k]).tolist()) for k in (
            "observation", "desired_goal")) == cells
    stay = 0 if maze.discrete else np.zeros(2)
    assert env.time_limit == maze.limits(env.state, env.goal)[0]
    for t in range(1, env.time_limit + 1):
        obs, reward, terminated, truncated, info = env.step(stay)
        assert (reward, terminated, truncated) == (-1, False, t == env.time_limit)
        assert info == {"success": False}
    start = np.array(maze.place(np.array([[1, 1]]))[0])
    goal = start + ([0, 1] if maze.discrete else [1.7, 0])
    obs, _ = env.reset(options={"start": start, "goal": goal})
    assert (obs["observation"] == start).all() and (obs["desired_goal"] == goal).all()
    obs, reward, terminated, truncated, info = env.step(4 if maze.discrete else [1.0, 0.0])
    assert (reward, terminated, truncated, info["success"]) == (0, True, False, True)
    assert (obs["achieved_goal"] == obs["observation"]).all() and (obs["observation"] - start).any()
    short = envs.GoalEnv(maze, limit=2)
    short.reset(options={"task": 1})
    assert [short.step(stay)[3] for _ in range(2)] == [False, True]
    for wrong, message in (({"task": 9}, "task must be 1 to 5, not 9"), ({"task": 0}, "1 to 5"),
                           ({"start": np.zeros(2) - 9}, "inside a wall"),
                           ({"start": start, "goal": np.zeros(2) - 9}, "inside a wall"),
                           ({"begin": 1}, "unknown reset options .'begin'.")):
        with pytest.raises(ValueError, match=message):
            env.reset(options=wrong)
    assert env.action_size == (0 if maze.discrete else 2)
    assert env.action_space.n == 5 if maze.discrete else (env.action_space.high == 1).all()


def test_an_own_maze_has_tests_for_online_learning():
    env = envs.GoalEnv(envs.PointMaze("mine", CORRIDOR))
    tests = env.tests(np.random.default_rng(0), 6)
    assert list(tests) == ["task1", "task2", "task3", "task4", "task5", "random"]
    for (starts, goals), task in zip(tests.values(), env.maze.tasks):
        for places, cell in zip((starts, goals), task):
            assert (env.maze.cell(places) == cell).all() and len(np.unique(places, axis=0)) == 6
    starts, goals = tests["random"]
    assert (env.maze.number(starts) != env.maze.number(goals)).all()
    assert env.reached(np.array([1.0, 1.1])).tolist() == [True, False]


@pytest.mark.parametrize("name", ["point-umaze", "point-umaze-undo"])
def test_goal_tasks(name):
    """Rewards, success and time limit by Gymnasium's calls; starts and goals as the task says."""
    task = envs.make_task(name)
    assert task.name == name and task.limit == 500 and task.settings == {}
    obs, _ = task.reset(seed=3)
    again, _ = envs.make_task(name).reset(seed=3)
    assert all((obs[k] == again[k]).all() for k in obs)
    for t in range(1, task.limit + 1):
        obs, reward, terminated, truncated, info = task.step(np.zeros(2))
        distance = np.hypot(*(obs["achieved_goal"] - obs["desired_goal"]))
        assert reward == pytest.approx(-distance) and info["success"] == (distance <= 2.5)
        assert (terminated, truncated) == (False, t == task.limit)
    rng = np.random.default_rng(0)
    for s, g in [task.draw(rng, 500), *task.tests(rng, 50).values()]:
        assert np.abs(s).max() <= 0.1 and g.min() >= -2 and g.max() <= 10
    obs, _ = task.reset(options={"start": [0.0, 0.0], "goal": [0.0, 4.0]})  # a goal in a wall
    assert not task.maze.is_free(obs["desired_goal"][None])[0]
    obs, *_, info = task.step(np.array([0.0, 9.0]))
    assert obs["observation"].tolist() == [0, 0.2] and not info["success"]


def test_tasks_by_hand():
    task = envs.UMazeTask()
    tests = task.tests(np.random.default_rng(0), 4)
    assert [tests[k][1][0].tolist() for k in ("0_8", "8_0", "8_8")] == [[0, 8], [8, 0], [8, 8]]
    task.maze.number(tests["random"][1])                    # raises in a wall
    assert task.reached(np.array([2.5, 2.6])).tolist() == [True, False]
    assert task.reached_last(np.array([5.0, 5.1])).tolist() == [True, False]
    at = np.array([[1.0, 1.95]])
    a = np.array([[1.0, 1.0]])
    np.testing.assert_allclose(task.move(at, a), [[1.2, 2.0]], atol=1e-5)       # slides
    undo = envs.make_task("point-umaze-undo")
    np.testing.assert_array_equal(undo.move(at, a), at)
    np.testing.assert_allclose(undo.move(at, -a), at - 0.2)


# ---------------------------------------------------------------------------- envs: data sets


def chain(*trajectories):
    """A data set on the top corridor of grid-fourrooms: columns visited, as trajectories."""
    obs = np.concatenate([[(1, column) for column in t] for t in trajectories])
    ends = np.cumsum([len(t) for t in trajectories]) - 1
    terminals = np.zeros(len(obs), bool)
    terminals[ends] = True
    return envs.Dataset(obs.astype(np.float32), np.zeros(len(obs), int), terminals)


def test_collected_data_follow_the_recipe():
    rng = np.random.default_rng(0)
    for name, kind, noise in (("point-medium", "navigate", 0.5), ("point-medium", "stitch", 0.5),
                              ("point-umaze", "navigate", 3.0), ("grid-maze", "navigate", 0.5),
                              ("grid-maze", "navigate", 1.0)):
        env = envs.make(name)
        data = envs.collect(env, rng, kind, episodes=200, rows=101, noise=noise)
        check_dataset(data, env)
        assert len(data.observations) == 20200 and (data.lengths == 101).all()
        assert (data.labelled == data.valid).all() and len(data.valid) == 20000
        visits = np.bincount(env.number(data.observations), minlength=len(env.cells))
        assert visits.min() > 0
        if kind == "navigate" and noise == 0.5:     # half of the grid's moves shorten the path
            i = data.valid
            ahead = env.path_length(data.observations[i].astype(float),
                                    data.observations[i + 8 * (i + 8 < len(i))].astype(float))
            assert ahead.mean() > (2.5 if env.discrete else 3.5)
    shares = np.bincount(data.actions[data.valid], minlength=5) / len(data.valid)
    np.testing.assert_allclose(shares, 0.2, atol=0.01)      # grid-maze, noise 1: uniform actions
    goals = envs.collect(envs.make("point-medium"), rng, "stitch", episodes=500, rows=60)
    ends = goals.observations[np.flatnonzero(goals.terminals)].astype(float)
    starts = goals.observations[np.flatnonzero(goals.terminals) - 59].astype(float)
    env = envs.make("point-medium")
    apart = env.distance[env.number(starts), env.number(ends)]
    assert (apart == 4).mean() > 0.8                        # arrived, four cells away
    for name, kind in (("grid-maze", "stitch"), ("point-medium", "explore")):
        with pytest.raises(ValueError, match="no data of kind"):
            envs.collect(envs.make(name), rng, kind)
    for wrong in (dict(episodes=0), dict(rows=1), dict(noise=-1)):
        with pytest.raises(ValueError, match="collect needs"):
            envs.collect(env, rng, **wrong)


def test_data_sets_are_saved_loaded_and_checked(tmp_path, monkeypatch):
    env = envs.make("point-medium")
    data = envs.collect(env, np.random.default_rng(0), episodes=4, rows=30)
    save_dataset(tmp_path / "d.npz", data)
    back = load_dataset(tmp_path / "d.npz")
    for key in ("observations", "actions", "terminals", "last", "valid", "labelled"):
        assert (getattr(back, key) == getattr(data, key)).all()
    assert os.listdir(tmp_path) == ["d.npz"]
    good = dict(observations=data.observations, actions=data.actions, terminals=data.terminals)
    nan = data.observations.copy()
    nan[5, 1] = np.nan
    single = data.terminals.copy()
    single[30] = True
    open_end = data.terminals.copy()
    open_end[-1] = False
    for changes, message in (
            ({"actions": None}, "has no actions"), ({"observations": nan}, "NaN"),
            ({"terminals": single}, "one row only"), ({"terminals": open_end}, "last row"),
            ({"actions": data.actions[:-1]}, "do not fit"),
            ({"terminals": data.terminals[:, None]}, "do not fit"),
            ({"observations": np.array([{}], object)}, "plain arrays"),
            ({"observations": np.array(["x"] * 120)}, "numbers"),
            ({"terminals": np.array(1)}, "must be arrays of numbers")):
        arrays = {k: x for k, x in {**good, **changes}.items() if x is not None}
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            load_dataset(tmp_path / "bad.npz")
    np.save(tmp_path / "array.npy", nan)
    (tmp_path / "text.npz").write_text("not an archive")
    archive = bytearray((tmp_path / "d.npz").read_bytes())
    for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):          # the flag of encryption
        for found in re.finditer(mark, bytes(archive)):
            archive[found.start() + at] |= 1
    (tmp_path / "closed.npz").write_bytes(archive)
    for name in ("array.npy", "text.npz", "closed.npz"):
        with pytest.raises(ValueError, match="not an npz file"):
            load_dataset(tmp_path / name)
    before = os.listdir(tmp_path)

    def interrupted(*args, **kw):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez_compressed", interrupted)
        save_dataset(tmp_path / "e.npz", data)
    assert os.listdir(tmp_path) == before               # nothing half written stays
    for other, message in ((envs.make("point-medium", speed=0.2), "steps are not 0.2 x action"),
                           (envs.make("point-large"), "another maze"),
                           (envs.make("grid-maze"), "has observations")):
        with pytest.raises(ValueError, match=message):
            check_dataset(data, other)


# ============================================================================= hiql: settings


def test_presets():
    """--preset paper: the published numbers of the fact sheets, but for sizes; flags go first."""
    published = dict(
        lr=3e-4, lr_decay=False, tau=0.005, expectile=0.7, goal_discount=0, high_alpha=3,
        low_alpha=3, rep_dim=10, rep_type="phi_sg", const_std=True, policy_steps=0,
        encoding="position", value_p_curgoal=0.2, value_p_trajgoal=0.5, actor_p_randomgoal=0,
        first_layer_init="glorot", goal_reached_by="index", subgoal_interval=1, temperature=0)
    config = hiql.resolve({"preset": "paper"})
    assert {x: getattr(config, x) for x in published} == published
    assert hiql.resolve({"preset": "paper", "env": "point-umaze"}).discount == 0.99
    assert hiql.resolve({"preset": "paper", "low_alpha": 7.0}).low_alpha == 7
    assert hiql.resolve({"preset": "fast"}) == hiql.resolve({}) == hiql.Config()
    grid = hiql.resolve({"env": "grid-maze", "subgoal_steps": 3})
    assert (grid.discount, grid.subgoal_steps, grid.temperature) == (0.95, 3, 2)
    quick = hiql.resolve({"quick": True, "steps": 7})
    assert (quick.steps, quick.batch_size, quick.policy_steps) == (7, 128, 0)
    for wrong, words in (({"encoding": "rbf", "env": "grid-maze"}, "is for point mazes"),
                         ({"encoding": "rbf", "rep_type": "none"}, "subgoals by phi"),
                         ({"env": "nowhere"}, "unknown environment 'nowhere'")):
        with pytest.raises(ValueError, match=words):
            hiql.resolve(wrong)


# ----------------------------------------------------------------------------- hiql: sampling


def test_sampling_of_a_single_trajectory():
    """Rows 0...4 of one trajectory: the last row is never drawn and never a goal; the last
    transition is row 3's."""
    data, rng = chain((1, 2, 3, 4, 5)), np.random.default_rng(0)
    config = hiql.resolve({"env": "grid-fourrooms", "subgoal_steps": 2, "batch_size": 4000,
                           "value_p_curgoal": 0.0, "value_p_trajgoal": 1.0})
    batch = {k: x[..., 1] if x.ndim == 2 else x for k, x in hiql.sample(data, rng, config).items()}
    s, s1, g, m, r, w, high_g, high_w = (batch[k] for k in (
        "observations", "next_observations", "value_goals", "masks", "rewards", "low_actor_goals",
        "high_actor_goals", "high_actor_targets"))
    assert set(s) == {1, 2, 3, 4} and (s1 == s + 1).all()
    assert (g >= np.minimum(s + 1, 4)).all() and g.max() == 4
    assert (m == (s < 4)).all() and (r == -m).all()
    assert (w == np.minimum(s + 2, 4)).all() and (high_w == np.minimum(s + 2, high_g)).all()
    start = high_g[s == 1]                  # the two ends, 2 and 4, have half the weight of 3
    np.testing.assert_allclose([(start == g).mean() for g in (2, 3, 4)], [0.25, 0.5, 0.25],
                               atol=0.04)
    for same, other in (("low_actor_observations", s), ("low_actor_next_observations", s1),
                        ("flat_actor_goals", high_g)):
        assert (batch[same] == other).all()                 # all actions are known
    random = dataclasses.replace(config, actor_p_randomgoal=1.0)
    batch = hiql.sample(data, np.random.default_rng(0), random)
    assert set(batch["high_actor_goals"][:, 1]) == {1, 2, 3, 4}
    assert (batch["high_actor_targets"][:, 1] == np.minimum(batch["observations"][:, 1] + 2,
                                                            4)).all()


def test_value_goals_have_the_published_shares():
    """From row 0 of 0...4: itself 0.2 + random 0.3 / 4; future rows by min(Geometric, 3)."""
    data, rng = chain((1, 2, 3, 4, 5)), np.random.default_rng(0)
    config = hiql.resolve({"env": "grid-fourrooms", "subgoal_steps": 2, "batch_size": 200_000,
                           "discount": 0.9, "goal_discount": 0.6})
    batch = hiql.sample(data, rng, config)
    goals = batch["value_goals"][batch["observations"][:, 1] == 1, 1]
    shares = [0.2, 0.5 * 0.4, 0.5 * 0.6 * 0.4, 0.5 * 0.6**2]
    np.testing.assert_allclose([(goals == column).mean() for column in (1, 2, 3, 4)],
                               np.array(shares) + 0.3 / 4, atol=0.008)


def test_hidden_actions_are_seen_by_nobody():
    """A quarter of the trajectories keep their actions; value and high-level policy use the
    others too."""
    config = hiql.resolve({"quick": True, "action_free": 0.75, "batch_size": 4000,
                           "value_p_curgoal": 0.0, "value_p_trajgoal": 0.0})
    data = hiql.prepare(config).data
    shown = np.isin(data.last, np.unique(data.last[data.labelled]))
    assert len(np.unique(data.last[data.labelled])) == round(0.25 * len(data.lengths))
    hidden = {tuple(x) for x in data.observations[~shown]}
    data.actions[~shown] = np.nan
    batch = hiql.sample(data, np.random.default_rng(0), config)
    assert np.isfinite(batch["actions"]).all()
    uses = {"observations": True, "next_observations": True, "value_goals": True,
            "high_actor_goals": True, "high_actor_targets": True, "low_actor_observations": False,
            "low_actor_next_observations": False, "low_actor_goals": False,
            "flat_actor_goals": False}
    assert set(uses) == set(batch) - {"actions", "rewards", "masks"}
    for name, use in uses.items():
        share = np.mean([tuple(x) in hidden for x in batch[name]])
        assert abs(share - 0.75 * use) < 0.05, name


# ------------------------------------------------------------------- hiql: golden update

NETWORKS = {"goal_rep": "phi", "value": "value", "target_value": "target/value",
            "low_actor": "low", "high_actor": "high"}


def golden():
    """The golden file, its config and batch as ours, and tree(prefix): arrays by our names."""
    with np.load(GOLDEN, allow_pickle=False) as file:
        z = {name: file[name] for name in file.files}

    def tree(prefix):
        flat = {}
        for path, x in z.items():
            if path.startswith(prefix + "/"):
                net, *_, layer, leaf = path[len(prefix) + 1:].split("/")
                if layer == "mean_net":             # OGBench's name for an actor's last Dense
                    body = f"{prefix}/{net}/actor_net/Dense_"
                    layer = f"Dense_{sum(p.startswith(body) and 'kernel' in p for p in z)}"
                norm = layer.startswith("LayerNorm")
                leaf = {"kernel": "W", "bias": "shift" if norm else "b", "scale": "scale"}[leaf]
                layer = ("norm" if norm else "dense") + layer.split("_")[1]
                flat[f"{NETWORKS[net]}/{layer}/{leaf}"] = x.copy()
        return unflatten(flat)

    given = {name: float(z[f"config/{name}"]) for name in (
        "lr", "discount", "expectile", "tau", "high_alpha", "low_alpha")}
    config = dataclasses.replace(hiql.resolve({}), steps=10, lr_decay=False, **given)
    batch = {name: z[f"batch/{name}"] for name in (
        "observations", "next_observations", "actions", "value_goals", "rewards", "masks",
        "low_actor_goals", "high_actor_goals", "high_actor_targets")}
    batch["low_actor_observations"] = batch["observations"]
    batch["low_actor_next_observations"] = batch["next_observations"]
    return z, config, batch, tree


def test_golden_losses_gradients_and_intermediate_values():
    z, config, batch, tree = golden()
    params, theirs = tree("init"), flatten(tree("grad"))
    forms = {"value": {"v": "v", "target": "v_target", "target_next": "next_v_target",
                       "adv": "adv", "phi": "phi_value_goals", "q": "q"},
             "low_actor": {"phi": "phi_low_goals", "adv": "low_adv", "weight": "low_weight",
                           "mean": "low_mean", "log_prob": "low_log_prob"},
             "high_actor": {"target": "phi_high_targets", "adv": "high_adv",
                            "weight": "high_weight", "mean": "high_mean",
                            "log_prob": "high_log_prob"}}
    seen = set()
    for name, loss in zip(forms, (hiql.value_loss, hiql.low_loss, hiql.high_loss)):
        value, grads, info = loss(params, batch, config)
        close(value, z[f"loss/{name}"])
        for ours, other in forms[name].items():
            close(info[ours], z[f"fwd/{other}"])
        for path, g in flatten(grads).items():
            close(g, theirs[path])
            seen.add(path)
    assert seen == {path for path in theirs if not path.startswith("target")}
    pairs = {"low": ("observations", "next_observations", "low_actor_goals"),
             "high": ("observations", "high_actor_targets", "high_actor_goals")}
    for name, (s, s2, g) in pairs.items():
        for key, x in (("v", s), ("nv", s2)):
            rep = hiql.phi(params, batch[x], batch[g], config)[0]
            v = hiql.value(params["value"], batch[x], rep)[0].mean(0)
            close(v, z[f"fwd/{name}_{key}"])


def test_golden_evaluation_action():
    z, config, batch, tree = golden()
    act = hiql.hierarchical_actor(tree("init"), config, None)
    close(act(batch["observations"], batch["high_actor_goals"], 0), z["fwd/eval_action"])


def test_golden_parameters_after_ten_updates(monkeypatch):
    z, config, batch, tree = golden()
    betas = [inspect.signature(nets.adam).parameters[x].default for x in ("b1", "b2", "eps")]
    assert betas == z["config/adam_b1_b2_eps"].tolist()
    monkeypatch.setattr(hiql, "sample", lambda data, rng, config: batch)
    problem = SimpleNamespace(config=config, data=None, losses=hiql.LOSSES)
    agent = {"params": tree("init"), "update": np.zeros((), int)}
    for i, (losses, whole) in enumerate(hiql.learn(problem, agent, None)):
        assert whole and agent["update"] == i + 1
        for name, theirs in (("value", "value"), ("low", "low_actor"), ("high", "high_actor")):
            close(losses[f"{name}_loss"], z[f"loss_curve/{theirs}"][i])
        if i + 1 in (1, 10):
            ours = flatten(agent["params"])
            for path, x in flatten(tree(f"params{i + 1}")).items():
                assert np.abs(ours[path] - x).max() < 1e-8, (i + 1, path)
            for moment in ("m", "v"):
                ours = flatten(agent["optimiser"][moment])
                for path, x in flatten(tree(f"adam{i + 1}_{moment}")).items():
                    if not path.startswith("target"):
                        close(ours[path], x, 1e-8)
    assert i == 9


# ------------------------------------------------------------------------------- hiql: losses


def toy(program=hiql, discrete=False, seed=0, **changes):
    """A small float64 problem of hiql or lab.baselines: config, parameters (perturbed, so that
    target and value differ), random batch with one success at least."""
    config = program.resolve({"env": "grid-fourrooms" if discrete else "point-medium",
                              "hidden_dims": (6, 5), "rep_dim": 3, "batch_size": 7, **changes})
    rng = np.random.default_rng(seed)
    env = envs.make(config.env)
    data = envs.collect(env, rng, episodes=3, rows=30)
    params = program.init_params(config, env, data, generators(seed, "init", "flat"))
    params = tree_map(lambda w: w + 0.2 * rng.normal(size=w.shape), params)
    batch = hiql.sample(data, rng, config)
    batch = {k: x.astype(float) if x.dtype == np.float32 else x for k, x in batch.items()}
    batch["masks"][0], batch["rewards"][0] = 0, 0
    return config, params, batch


def test_value_loss_by_hand():
    """One state, numbers chosen: per-head targets, minimum in the weight only, both signs of A."""
    config, params, batch = toy(discount=0.5, expectile=0.9)
    one = {k: x[:1] for k, x in batch.items()}
    for tree, x in ((params, [-1.0, -2.0]), (params["target"], [-1.0, -3.0])):  # constant heads
        tree["value"] = tree_map(np.zeros_like, tree["value"])
        tree["value"]["dense2"]["b"][:, 0] = x
    target = params["target"]["value"]["dense2"]["b"][:, 0]
    one["rewards"], one["masks"] = np.array([-1.0]), np.array([1.0])
    # q = -1 + 0.5 T = (-1.5, -2.5); A = -1 + 0.5 (-3) - (-2) < 0 (with the mean it would be 0)
    loss, grads, _ = hiql.value_loss(params, one, config)
    assert loss == pytest.approx(0.1 * (0.5**2 + 0.5**2))
    np.testing.assert_allclose(grads["value"]["dense2"]["b"][:, 0], [0.1, 0.1])
    target[:] = -4                                      # q = -3, A = -3 - (-4) > 0
    assert hiql.value_loss(params, one, config)[0] == pytest.approx(0.9 * (2**2 + 1**2))
    one["rewards"], one["masks"] = np.array([0.0]), np.array([0.0])     # success: q = 0, A = 4
    assert hiql.value_loss(params, one, config)[0] == pytest.approx(0.9 * (1 + 4))
    target[:] = 0                                       # A = 0 exactly counts as positive
    assert hiql.value_loss(params, one, config)[0] == pytest.approx(0.9 * (1 + 4))


def test_policy_losses_by_hand():
    """Weights exp(alpha A) clipped at 100, A from the right states and the learned heads."""
    np.testing.assert_allclose(hiql.awr_weight(3.0, np.array([0.0, 1.0, 1.6, 1e4, -1e4])),
                               [1, np.exp(3), 100, 100, 0])
    config, params, batch = toy(high_alpha=0.7, low_alpha=1.3, flat_alpha=0.4)

    def mean_value(s, g):
        z = hiql.phi(params, s, g, config)[0]
        return hiql.value(params["value"], s, z)[0].mean(0)

    def awr(alpha, adv, log_prob):
        return pytest.approx(-(np.minimum(np.exp(alpha * adv), 100) * log_prob).mean(), rel=1e-12)

    s, s1, w, a = (batch[k] for k in ("low_actor_observations", "low_actor_next_observations",
                                      "low_actor_goals", "actions"))
    adv = mean_value(s1, w) - mean_value(s, w)
    mean = mlp(params["low"], np.concatenate([s, hiql.phi(params, s, w, config)[0]], 1))[0]
    log_prob = -0.5 * ((a - mean) ** 2).sum(1) - np.log(2 * np.pi)
    assert hiql.low_loss(params, batch, config)[0] == awr(1.3, adv, log_prob)
    g = batch["flat_actor_goals"]
    adv = mean_value(s1, g) - mean_value(s, g)
    mean = mlp(params["flat"], np.concatenate([s, g], 1))[0]
    log_prob = -0.5 * ((a - mean) ** 2).sum(1) - np.log(2 * np.pi)
    assert hiql.flat_loss(params, batch, config)[0] == awr(0.4, adv, log_prob)
    s, w, g = (batch[k] for k in ("observations", "high_actor_targets", "high_actor_goals"))
    adv = mean_value(w, g) - mean_value(s, g)
    mean = mlp(params["high"], np.concatenate([s, g], 1))[0]
    z = hiql.phi(params, s, w, config)[0]
    log_prob = -0.5 * ((z - mean) ** 2).sum(1) - 1.5 * np.log(2 * np.pi)
    assert hiql.high_loss(params, batch, config)[0] == awr(0.7, adv, log_prob)


@pytest.mark.parametrize("loss, learned", [
    (hiql.value_loss, {"value", "phi"}), (hiql.high_loss, {"high"}), (hiql.low_loss, {"low"}),
    (hiql.flat_loss, {"flat"})])
def test_constants_have_no_derivative(loss, learned):
    """Policies send no gradient to value and phi, no loss to the target: the losses' lines
    "Constants"; and the complex step sees none either."""
    config, params, batch = toy()
    assert set(loss(params, batch, config)[1]) == learned
    constants = {name: tree_map(np.zeros_like, p) for name, p in params.items()
                 if name not in learned}
    assert {"target"} <= set(constants) and len(constants) + len(learned) == 6
    errors = nets.derivative_error(lambda tree: loss(tree, batch, config)[0], params, constants)
    assert len(errors) > 10 and set(errors.values()) == {0}


# ----------------------------------------------------------------------------- hiql: the loop


def train(config, data, losses, params, rng=None):
    """Take `hiql.learn` to its end -> agent, what it yielded."""
    problem = SimpleNamespace(config=config, data=data, losses=losses)
    agent = {"params": params, "update": np.zeros((), int)}
    return agent, list(hiql.learn(problem, agent, rng))


def test_target_moves_towards_the_value_before_the_step(monkeypatch):
    config, params, batch = toy(tau=0.25, steps=1, lr=1e-2)
    before = tree_map(np.copy, params)
    monkeypatch.setattr(hiql, "sample", lambda data, rng, config: batch)
    train(config, None, hiql.LOSSES, params)
    value = flatten(before["value"])
    for path, x in flatten(params["target"]["value"]).items():
        close(x, 0.75 * flatten(before["target"]["value"])[path] + 0.25 * value[path], 1e-14)
    assert not np.allclose(params["value"]["dense0"]["W"], before["value"]["dense0"]["W"])


def test_all_gradients_come_before_any_change(monkeypatch):
    """Each loss of an update sees the parameters and the target from before it."""
    config, params, batch = toy(steps=3, lr=1e-2)
    seen = []
    monkeypatch.setattr(hiql, "sample", lambda data, rng, config: batch)

    def watched(loss):
        def f(params, batch, config):
            seen.append({name: x.copy() for name, x in flatten(params).items()})
            return loss(params, batch, config)
        return f

    train(config, None, {name: watched(f) for name, f in hiql.LOSSES.items()}, params)
    assert len(seen) == 9
    for u in (0, 3, 6):
        for other in seen[u + 1:u + 3]:
            assert all((other[name] == x).all() for name, x in seen[u].items())
    assert any((seen[3][name] != x).any() for name, x in seen[0].items())


def test_the_flat_policy_leaves_hiql_as_it_is():
    """Training a flat policy beside hiql changes no bit of hiql."""
    trees = []
    for train_flat in (True, False):
        config = hiql.resolve({"env": "grid-fourrooms", "quick": True, "seed": 3, "steps": 5,
                               "train_flat": train_flat})
        problem = hiql.prepare(config)
        params = hiql.init_params(config, problem.env, problem.data, problem.rngs)
        train(config, problem.data, problem.losses, params, problem.rngs["batch"])
        trees.append(params)
    with_flat, without = trees
    assert "flat" in with_flat and "flat" not in without
    for path, x in flatten(without).items():
        assert (flatten(with_flat)[path] == x).all(), path


def test_policy_steps_train_the_value_first(monkeypatch):
    """The value alone, then the policies alone, each with its own Adam and falling rate."""
    config, params, batch = toy(steps=4, policy_steps=6, lr=1e-2)
    monkeypatch.setattr(hiql, "sample", lambda data, rng, config: batch)
    losses = {**hiql.LOSSES, "flat": hiql.flat_loss}
    problem = SimpleNamespace(config=config, data=None, losses=losses)
    agent = {"params": params, "update": np.zeros((), int)}
    before, counts = {name: x.copy() for name, x in flatten(params).items()}, []
    for u, (row, _) in enumerate(hiql.learn(problem, agent, None)):
        assert set(row) == ({"value_loss"} if u < 4 else {"high_loss", "low_loss", "flat_loss"})
        changed = {name.split("/")[0] for name, x in flatten(params).items()
                   if (x != before[name]).any()}
        assert changed == ({"value", "phi", "target"} if u < 4 else {"high", "low", "flat"})
        before = {name: x.copy() for name, x in flatten(params).items()}
        counts.append(int(agent["optimiser"]["count"]))
    assert counts == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6]
    assert "target" not in agent["optimiser"]["m"]
    rates = [hiql.schedule(losses, config, u)[1] / config.lr for u in range(10)]
    np.testing.assert_allclose(rates, [1, 1, 1, 0.5, 1, 1, 1, 1, 2 / 3, 1 / 3])
    joint = dataclasses.replace(config, policy_steps=0, lr_decay=False)
    assert [hiql.schedule(losses, joint, u) for u in (0, 3)] == [(losses, config.lr)] * 2


# --------------------------------------------------------------------------- hiql: networks


def test_first_layers_bend_at_states_of_the_data():
    """[D14]: 8 / side times Glorot's weights, and each unit is 0 at a state of the data."""
    config, env = hiql.resolve({"hidden_dims": (40, 5)}), envs.make("point-medium")
    data = envs.collect(env, np.random.default_rng(0), episodes=3, rows=30)

    def init(config):
        return hiql.init_params(config, env, data, generators(0, "init", "flat"))

    p, states = init(config), data.observations[data.valid].astype(float)
    for w, b in ((p["value"]["dense0"]["W"][0], p["value"]["dense0"]["b"][0]),
                 (p["low"]["dense0"]["W"], p["low"]["dense0"]["b"])):     # of s and z, z0 = 0
        assert (np.abs(states @ w[:2] + b).min(0) < 1e-5).all() and (b != 0).all()
    layer = p["high"]["dense0"]                             # of s and g, both of the data
    both = (states @ layer["W"][:2])[:, None] + states @ layer["W"][2:] + layer["b"]
    assert (np.abs(both).min((0, 1)) < 1e-4).all()
    plain = init(dataclasses.replace(config, first_layer_init="glorot"))
    assert not plain["high"]["dense0"]["b"].any()
    assert np.abs(plain["phi"]["dense0"]["W"]).max() <= np.sqrt(6 / 44)
    np.testing.assert_allclose(init(config)["phi"]["dense0"]["W"], 8 / env.side
                               * plain["phi"]["dense0"]["W"], rtol=1e-6)
    assert np.abs(p["high"]["dense2"]["W"]).max() <= 0.1 * np.sqrt(6 / 15)
    for path, x in flatten(p["target"]["value"]).items():   # a copy, not the same arrays
        assert (x == flatten(p["value"])[path]).all() and x is not flatten(p["value"])[path]
    assert set(init(dataclasses.replace(config, const_std=False))["low"]) == {*p["low"], "std"}


def test_representations_have_length_sqrt_of_their_size():
    for rep_type in ("phi_sg", "phi_g"):
        config, params, batch = toy(rep_type=rep_type)
        s, g = batch["observations"], batch["value_goals"]
        z = hiql.phi(params, s, g, config)[0]
        np.testing.assert_allclose((z ** 2).sum(1), config.rep_dim)
        other = hiql.phi(params, s + 1, g, config)[0]
        assert (other == z).all() == (rep_type == "phi_g")
    config, params, batch = toy(rep_type="none")
    assert hiql.phi(params, s, g, config)[0] is g and "phi" not in params


# ------------------------------------------------------------- hiql: acting and evaluation


def test_discrete_actions_are_drawn_at_a_temperature():
    """Logits (0, 2, 0, 0, 0): shares of softmax(logits / T); T = 0 takes the likeliest."""
    config, params, batch = toy(discrete=True, temperature=2.0)
    params["low"] = tree_map(np.zeros_like, params["low"])
    params["low"]["dense2"]["b"][1] = 2
    s, g = (np.repeat(batch[k][:1], 20000, 0) for k in ("observations", "value_goals"))
    a = hiql.hierarchical_actor(params, config, np.random.default_rng(0))(s, g, 0)
    assert (a == 1).mean() == pytest.approx(np.e / (np.e + 4), abs=0.01)
    cold = dataclasses.replace(config, temperature=0)
    assert (hiql.hierarchical_actor(params, cold, np.random.default_rng(0))(s, g, 0) == 1).all()


def test_actions_are_the_policies_means():
    """The low-level policy at the subgoal, or the flat policy at the goal; clipped to [-1, 1]."""
    config, params, batch = toy()
    s, g = batch["observations"], batch["value_goals"]
    z = mlp(params["high"], np.concatenate([s, g], 1))[0]
    z *= np.sqrt(config.rep_dim) / np.linalg.norm(z, axis=1, keepdims=True)
    for actor, p, x in ((hiql.hierarchical_actor, params["low"], np.concatenate([s, z], 1)),
                        (hiql.flat_actor, params["flat"], np.concatenate([s, g], 1))):
        size = np.median(np.abs(mlp(p, x)[0]))          # so that half of them are clipped
        for w in p["dense2"].values():
            w /= size
        mean = mlp(p, x)[0]
        assert np.abs(mean).max() > 1.1 and np.abs(mean).min() < 0.9
        close(actor(params, config, None)(s, g, 0), np.clip(mean, -1, 1))
    v = hiql.value(params["value"], s, hiql.phi(params, s, g, config)[0])[0].mean(0)
    close(hiql.mean_value(params, s, g, config), v)
    close(hiql.value_map(params, s, g, config), v, 1e-5)            # takes float32


def test_subgoals_are_normalised_and_asked_for_at_intervals():
    config, params, batch = toy(subgoal_interval=3)
    s, g = batch["observations"], batch["value_goals"]
    z = hiql.subgoal(params, s, g, config)
    np.testing.assert_allclose((z ** 2).sum(1), config.rep_dim)
    act = hiql.hierarchical_actor(params, config, None)
    first = act(s, g, 0)
    assert (act(s, g + 5, 1) == first).all() and (act(s, g + 5, 2) == first).all()
    assert not np.allclose(act(s, g + 5, 3), first)
    config, params, batch = toy(rep_type="none")        # then it is a difference of states
    delta = mlp(params["high"], np.concatenate([s, g], 1))[0]
    np.testing.assert_allclose(hiql.subgoal(params, s, g, config), s + delta)


def test_episodes_end_at_the_goal_or_the_time_limit():
    """Agents in a corridor wait and then go right: one arrives in time, one at once, one too late
    and one never. The limit is four times the shortest path."""
    env, times = envs.GridWorld("mine", CORRIDOR), []
    starts, goals = (np.array([[1.0, x] for x in columns]) for columns in ((2, 5, 5, 3),
                                                                           (4, 6, 6, 2)))

    def act(s, g, t):
        times.append(t)
        return np.where(t < np.array([5, 0, 5, 1]), 0, 4)

    success, steps, paths = offline.rollout(env, act, starts, goals, None)
    assert success.tolist() == [True, True, False, False] and steps.tolist() == [7, 1, 4, 4]
    assert paths[..., 1].T.tolist() == [[2, 2, 2, 2, 2, 2, 3, 4], [5, 6, 6, 6, 6, 6, 6, 6],
                                        [5] * 8, [3, 3, 4, 5, 6, 6, 6, 6]]
    assert times == [0, 1, 2, 3, 4, 5, 6]


def test_evaluation_by_hand():
    """An actor that solves tasks 1 and 4 alone; starts and goals are those of seed and update."""
    config = hiql.resolve({"env": "grid-fourrooms", "eval_episodes": 3, "seed": 8})
    problem = SimpleNamespace(env=envs.make(config.env), config=config)
    env, seen = problem.env, []

    def actor(params, config, rng):
        def act(s, g, t):
            if not t:
                seen.append((s, g))
            good = (g == env.place(env.tasks)[[0, 3], 1][:, None]).all(-1).any(0)
            good &= (seen[-1][0] == env.place(env.tasks)[[0, 3], 0][:, None]).all(-1).any(0)
            return np.where(good, env.follow(s, env.number(g), 0.0, np.random.default_rng(0)), 0)
        return act

    summary, (paths, goals, success) = offline.evaluate_actor(problem, {}, actor, 7)
    assert summary["success"] == pytest.approx(0.4) and summary["success_worst_task"] == 0
    assert summary["success_per_task"] == [1, 0, 0, 1, 0] and summary["success_random"] < 0.1
    lengths = [env.distance[env.index[a], env.index[b]] for a, b in env.tasks]
    assert summary["mean_steps"] == np.mean([x * (1 if i in (0, 3) else 4)
                                             for i, x in enumerate(lengths)])
    assert success.shape == (5, 3) and goals.shape == (5, 3, 2) and paths.shape[1:] == (5, 3, 2)
    assert (paths[0, :, 0] == env.place(env.tasks)[:, 0]).all()
    starts, ends = seen[0]
    assert len(starts) == 15 + 200
    assert env.distance[env.number(starts), env.number(ends)][15:].min() == 8
    for at in (7, 9):
        offline.evaluate_actor(problem, {}, actor, at)
    assert (seen[1][0] == starts).all() and not (seen[2][0] == starts).all()


# ---------------------------------------------------------------------------- hiql: learning


def test_value_learns_the_discounted_distance():
    """On a one-way line V(s, g) = -(1 - discount^d) / (1 - discount): exact to 5 % of its range.

    lab/test_exact.py has the exact value of any data set and of all three lesions.
    """
    data = chain(*[range(12)] * 20)
    config = hiql.resolve({"env": "grid-fourrooms", "discount": 0.9, "hidden_dims": (32, 32),
                           "steps": 600, "batch_size": 128, "subgoal_steps": 2,
                           "goal_reached_by": "state", "value_p_trajgoal": 0.8})
    s, g = np.array([(i, j) for i in range(11) for j in range(i, 11)]).T
    exact = -(1 - 0.9 ** (g - s)) / (1 - 0.9)

    def error(loss):
        rngs = generators(0, "init", "flat", "batch")
        params = hiql.init_params(config, envs.make(config.env), data, rngs)
        train(config, data, {"value": loss}, params, rngs["batch"])
        v = hiql.value_map(params, *(np.stack([0 * x + 1, x], 1) for x in (s, g)), config)
        return np.abs(v - exact).mean() / np.ptp(exact)

    def no_mask(params, batch, config):
        return hiql.value_loss(params, {**batch, "masks": np.ones_like(batch["masks"])}, config)

    assert error(hiql.value_loss) < 0.05
    assert error(no_mask) > 0.05


@pytest.mark.parametrize("losses, actor", [
    (hiql.LOSSES, hiql.hierarchical_actor),
    ({"value": hiql.value_loss, "flat": hiql.flat_loss}, hiql.flat_actor)])
def test_policies_follow_the_advantage(losses, actor, monkeypatch):
    """From random walks each policy learns to reach goals; with the advantage negated it fails."""
    env = envs.GridWorld("grid-tiny", "umaze")          # seven cells in a bent corridor
    data = envs.collect(env, np.random.default_rng(0), episodes=200, rows=41, noise=1.0)
    config = hiql.resolve({"env": "grid-fourrooms", "discount": 0.9, "hidden_dims": (32, 32),
                           "steps": 400, "batch_size": 128, "subgoal_steps": 2})

    def score():
        rngs = generators(0, "init", "flat", "batch")
        params = hiql.init_params(config, env, data, rngs)
        train(config, data, losses, params, rngs["batch"])
        starts, goals = (env.place(x) for x in env.random_pairs(np.random.default_rng(0), 100, 3))
        act = actor(params, config, np.random.default_rng(0))
        return offline.rollout(env, act, starts, goals, None)[0].mean()

    assert score() > 0.9
    plain = hiql.awr_weight
    monkeypatch.setattr(hiql, "awr_weight", lambda alpha, adv: plain(alpha, -adv))
    assert score() < 0.6


# ------------------------------------------------------------------------------- hiql: using it


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw nothing, and the test's Ctrl-C is Python's own again afterwards."""
    monkeypatch.setattr(hiql, "draw", lambda *_: None)
    monkeypatch.setattr(online, "draw", lambda *_: None)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_loaded_hiql_agent_acts_as_in_evaluation(tmp_path, no_pictures, registry):
    """The path of the evaluation's first episode of each task, by `load` and Gymnasium's calls."""
    envs.register("mine", layout="umaze", limit=60, recipe=dict(episodes=50, rows=51))
    config = hiql.resolve({"env": "mine", "quick": True, "steps": 60, "eval_interval": 60,
                           "subgoal_interval": 7, "eval_episodes": 1})
    problem = hiql.prepare(config)
    result = hiql.train(problem, Run(str(tmp_path), config))
    paths, goals, _ = problem.evaluate(problem, result.agent)[1]["hiql"]
    # five lines: load a run and act with it
    act, env = hiql.load(tmp_path), envs.GoalEnv(envs.make("mine"))
    for task in range(5):
        obs, _ = env.reset(options={"start": paths[0, task, 0], "goal": goals[task, 0]})
        for t in range(len(paths) - 1):
            action = act(obs["observation"][None], obs["desired_goal"][None], t)[0]
            assert (action == result.act(obs["observation"][None], obs["desired_goal"][None],
                                         t)[0]).all()
            obs, reward, terminated, truncated, info = env.step(action)
            np.testing.assert_allclose(obs["observation"], paths[t + 1, task, 0], atol=1e-3)
            if terminated or truncated:
                break
    assert np.abs(paths[-1] - paths[0]).max() > 0.5
    with pytest.raises(OSError, match="config.json"):
        hiql.load(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", [envs.PointMaze, envs.GridWorld])
def test_training_on_an_own_layout(kind, registry):
    """Five lines: a layout, a config, training, an episode by the trained agent."""
    envs.register("mine", kind, layout=CORRIDOR, recipe=dict(episodes=30, rows=41))
    config = hiql.resolve({"env": "mine", "quick": True, "steps": 20, "eval_interval": 20})
    result = hiql.train(hiql.prepare(config))
    obs, _ = (env := envs.GoalEnv(envs.make("mine"))).reset(options={"task": 1})
    action = result.act(obs["observation"][None], obs["desired_goal"][None], 0)[0]

    assert result.summary["env"] == "mine" and len(result.summary["success_per_task"]) == 5
    assert env.step(action)[1] in (-1, 0)


# ========================================================================= hiro: goals, Eq. (2)


def straight(s, g):
    """A hand-made low-level policy: full speed along each axis until the goal is nearer than a
    step."""
    return np.clip(g / 0.2, -1, 1)


def walk(goal, act, start=(0.0, 0.0), c=10, move=lambda s, a: s + 0.2 * a):
    """States (1,c+1,2) and actions (1,c,2) of a window under a goal."""
    states, actions, g = [np.array([start])], [], np.array([goal])
    for _ in range(c):
        actions.append(act(states[-1], g))
        states.append(move(states[-1], actions[-1]))
        g = hiro.goal_transition(states[-2], g, states[-1])
    return np.stack(states, 1), np.stack(actions, 1)


class Draws:
    """A generator whose normal draws are given."""

    def __init__(self, x):
        self.x = np.array(x, float)

    def normal(self, size):
        return np.broadcast_to(self.x, size)


def test_goal_transition_keeps_the_place_and_gives_the_reward():
    """h conserves s + g over positions; the reward is minus the norm of the next goal."""
    rng = np.random.default_rng(0)
    s, s1, g = rng.normal(size=(9, 5)), rng.normal(size=(9, 5)), rng.normal(size=(9, 2))
    g1 = hiro.goal_transition(s, g, s1)
    np.testing.assert_allclose(s1[:, :2] + g1, s[:, :2] + g, atol=1e-15)
    np.testing.assert_allclose(hiro.intrinsic_reward(s, g, s1), -np.hypot(*g1.T), atol=1e-15)
    assert hiro.intrinsic_reward(np.zeros(2), np.array([3.0, 4.0]), np.zeros(2)) == -5


# ------------------------------------------------------------- hiro: off-policy correction


@pytest.mark.parametrize("wall", [False, True])
def test_correction_keeps_goals_that_the_low_level_policy_still_follows(wall):
    """Unchanged policy, no noise: the original scores 0, the maximum, and wins all ties.

    In front of a wall, s_{t+c} - s_t explains nothing: the window did not get where it went.
    """
    maze = envs.make("point-umaze")
    move = (lambda s, a: maze.move(s, a)) if wall else (lambda s, a: s + 0.2 * a)
    goal = np.array([[0.3, 1.9]])
    states, actions = walk(goal[0], straight, start=(0.0, 1.0), move=move)
    new, score = hiro.off_policy_correction(straight, states, actions, goal, np.array([10]),
                                            np.full(2, 2.0), np.random.default_rng(0))
    assert score.shape == (1, 10) and score[0, 0] == 0 == score.max()
    assert (new == goal).all()
    if wall:
        assert (states[0, -1] - states[0, 0])[1] == pytest.approx(1, abs=1e-5)
        assert score[0, 1] < -1
    else:
        assert score[0, 1] == pytest.approx(0)


def test_correction_finds_the_goal_that_explains_a_changed_policy():
    """A policy that has come to aim 0.5 too far right: the old goal less 0.5 explains its past."""
    goal, shift = np.array([[1.1, -0.7]]), np.array([0.5, 0.0])
    states, actions = walk(goal[0], straight)

    def changed(s, g):
        return straight(s, g + shift)

    moved = states[:, 10] - states[:, 0]
    draws = np.zeros((1, 8, 2))
    draws[0, 4] = goal[0] - shift - moved[0]        # goal_range / 2 = 1: the draws themselves
    new, score = hiro.off_policy_correction(changed, states, actions, goal, np.array([10]),
                                            np.full(2, 2.0), Draws(draws))
    assert score[0].argmax() == 6 and score[0, 6] == pytest.approx(0, abs=1e-20)
    assert score[0, 0] < -0.5 and score[0, 1] < -0.5
    np.testing.assert_allclose(new, goal - shift, atol=1e-15)


def test_correction_by_hand():
    """Candidates, clipping, the score's half and its sum over the window's true length."""
    states = np.array([[[0.0, 0.0], [1.0, 0.0], [3.0, 0.0], [9.0, 9.0]]])
    actions, goal = np.array([[[1.0, 0.0], [0.5, 0.0], [7.0, 7.0]]]), np.array([[-1.0, 0.0]])
    seen = []

    def act(s, g):
        seen.append((s.copy(), g.copy()))
        return np.zeros_like(g)

    def correct(low_policy):
        return hiro.off_policy_correction(low_policy, states, actions, goal, np.array([2]),
                                          np.array([2.0, 4.0]), Draws([0.5, 1.0]), n=3)

    new, score = correct(act)
    s, g = (x.reshape(3, 3, 2) for x in seen[0])
    np.testing.assert_array_equal(g[:, 0], [[-1, 0], [2, 0], [2, 2]])   # 3 and 3 + 0.5 clipped
    np.testing.assert_array_equal(g[1], [[2, 0], [1, 0], [-1, 0]])      # h along the window
    np.testing.assert_array_equal(s, np.tile(states[:, :3], (3, 1, 1)))
    np.testing.assert_allclose(score, -0.5 * (1 + 0.25))                # step 3 does not count
    assert (new == goal).all()
    score = correct(lambda s, g: 0.5 * g)[1]
    np.testing.assert_allclose(score, [[-0.5 * (1.5**2 + 1.5**2), 0, -0.5 * (1 + 1)]])


# ------------------------------------------------------------------------------ hiro: replay


def toy_replay(c=4, capacity=8):
    """Windows of a walk on a line of integers, x = 0, 1, 2, ...; action and reward tell the step.

    Lengths 4, 2 (cut by the time limit), 4, 3 (terminated), 4.
    """
    replay, x = hiro.replay_init(capacity, c, 2, 1, 1, 1), 0.0
    for n, terminated, follows in ((4, 0, 0), (2, 0, 1), (4, 0, 0), (3, 1, 1), (4, 0, 0)):
        at = x + np.arange(n + 1)
        hiro.replay_add(replay, {"states": np.stack([at, -at], 1), "actions": at[:n, None] / 100,
                                 "rewards": at[:n], "goal": [x + 10], "task": [-x]},
                        terminated, follows)
        x += n
    return replay


STARTS, ENDS = np.array([0, 4, 6, 10, 13]), np.array([4, 6, 10, 13, 17])   # of those windows


def replay_config(**changes):
    return hiro.resolve({"subgoal_interval": 4, "batch_size": 20000, **changes})


@pytest.mark.parametrize("at_end", ["h", "new"])
def test_low_level_batches_are_the_steps_that_were_made(at_end):
    replay, config = toy_replay(), replay_config(goal_at_window_end=at_end)
    batch = hiro.sample_steps(replay, np.random.default_rng(0), np.array([2.0]), config)
    s, s1 = batch["observations"], batch["next_observations"]
    x, g, x1, g1 = s[:, 0], s[:, 2], s1[:, 0], s1[:, 2]
    w = np.searchsorted(ENDS, x, side="right")
    np.testing.assert_allclose(batch["actions"][:, 0], x / 100, rtol=1e-6)
    assert (x1 == x + 1).all() and (s[:, 1] == -x).all()
    assert (g == STARTS[w] + 10 + STARTS[w] - x).all()          # h since the window's start
    end, h = x1 == ENDS[w], g - 1
    joined = end & np.isin(w, (0, 2)) & (at_end == "new")
    assert (g1 == np.where(joined, ENDS[w] + 10, h)).all()
    assert (batch["rewards"] == -np.abs(h)).all()
    assert (batch["masks"] == np.where(end & (w == 3), 0, 1)).all()     # terminated there alone
    shares = np.bincount(x.astype(int), minlength=17) / config.batch_size
    np.testing.assert_allclose(shares, 1 / 17, atol=0.006)      # uniform over steps


def test_low_level_relabelled_and_without_its_position():
    """--relabel-low-goals: goals at other states of the batch plus noise, within the range."""
    replay, rng = toy_replay(), np.random.default_rng(0)
    config = replay_config(relabel_low_goals=True)
    batch = hiro.sample_steps(replay, rng, np.array([20.0]), config)    # noise of 2; no clipping
    s, g = batch["observations"][:, 0], batch["observations"][:, 2]
    assert abs(np.corrcoef(s, s + g)[0, 1]) < 0.05              # the place has nothing of s
    assert (s + g).mean() == pytest.approx(s.mean(), abs=0.15)
    assert (s + g).var() == pytest.approx(s.var() + 4, rel=0.05)
    np.testing.assert_allclose(batch["rewards"], -np.abs(g - 1), rtol=1e-5)
    batch = hiro.sample_steps(replay, rng, np.array([2.0]), config)
    assert np.abs(batch["observations"][:, 2]).max() == 2
    batch = hiro.sample_steps(replay, rng, np.array([2.0]), replay_config(see_position=False))
    x = batch["observations"]
    assert x.shape[1] == 2 and set(x[:, 0]) == set(range(-16, 1))       # -x and the goal


def test_high_level_batches_are_whole_windows():
    """(s_t, g, sum of rewards, s_{t+n}): true lengths; no bootstrap after termination alone."""
    replay, config = toy_replay(), replay_config(correction="none", reward_scale=0.5)
    batch, info = hiro.sample_windows(replay, np.random.default_rng(0), None, np.array([20.0]),
                                      config)
    s, s1 = batch["observations"], batch["next_observations"]
    w = np.searchsorted(STARTS, s[:, 0])
    assert (s1[:, 0] == ENDS[w]).all() and (s[:, 2] == -STARTS[w]).all()
    assert (s1[:, 2] == -STARTS[w]).all() and info == {}
    np.testing.assert_allclose(batch["actions"][:, 0], (STARTS[w] + 10) / 20)
    sums = np.array([sum(range(a, e)) for a, e in zip(STARTS, ENDS)])
    np.testing.assert_allclose(batch["rewards"], 0.5 * sums[w])
    assert (batch["masks"] == (w != 3)).all() and set(w) == {0, 1, 2, 3, 4}


def test_relabelled_goals_reach_the_high_level_and_are_not_kept():
    """The batch has the corrected goals, the replay the old ones; and what that changed."""
    replay, config = toy_replay(), replay_config(batch_size=500)
    kept, goal_range = replay["goal"].copy(), np.array([20.0])

    def low_policy(s, g):                   # from 6 on the old goals ask for more than was done
        return np.where(s[:, :1] < 6, 0, g / 50)

    batch, info = hiro.sample_windows(replay, np.random.default_rng(0), low_policy, goal_range,
                                      config)
    w = np.searchsorted(STARTS, batch["observations"][:, 0])
    moved = np.abs(batch["actions"][:, 0] * 20 - (STARTS[w] + 10))
    assert ((moved > 1e-4) == (w >= 2)).all()               # ties go to the original
    assert info["relabel_fraction"] == pytest.approx((w >= 2).mean())
    assert info["relabel_distance"] == pytest.approx(moved.mean(), rel=1e-5)
    assert info["relabel_gain"] > 0 and (replay["goal"] == kept).all()
    assert np.abs(batch["actions"]).max() <= 1


def test_replay_forgets_the_oldest_windows():
    replay = toy_replay(capacity=3)
    batch = hiro.sample_steps(replay, np.random.default_rng(0), np.array([2.0]), replay_config())
    x = batch["observations"][:, 0]
    assert x.min() == 6 and x.max() == 16


# ---------------------------------------------------------------------------------- hiro: TD3


def toy_td3(seed=0):
    """Small float64 networks of TD3 and their targets, which differ; batch; noise (7,2)."""
    rng = np.random.default_rng(seed)
    config = hiro.resolve({"hidden_dims": (6, 5)})
    networks = [tree_map(lambda w: w + 0.2 * rng.normal(size=w.shape),
                         hiro.td3_init(rng, 3, 2, config)["online"]) for _ in range(2)]
    shapes = {"observations": (7, 3), "next_observations": (7, 3), "actions": (7, 2),
              "rewards": 7, "masks": 7}
    batch = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    batch["rewards"][:3] += 5                               # errors beyond 1 as well
    return *networks, batch, 0.2 * rng.normal(size=(7, 2))


def constant_level(q, target, a=0.0):
    """TD3 whose critics are constant (2,), targets too, and whose target policy is tanh(a)."""
    level = hiro.td3_init(np.random.default_rng(0), 2, 1, hiro.resolve({"hidden_dims": (3,)}))
    level = {**level, **{k: tree_map(lambda w: np.zeros(w.shape), level[k])
                         for k in ("online", "target")}}
    level["online"]["critic"]["dense1"]["b"][:, 0] = q
    level["target"]["critic"]["dense1"]["b"][:, 0] = target
    level["target"]["actor"]["dense1"]["b"][:] = a
    return level


def one_step(r=0.0, m=1.0):
    """A batch of one transition from 0 to 0 with action 0: states (1,2), action (1,1)."""
    return {"observations": np.zeros((1, 2)), "next_observations": np.zeros((1, 2)),
            "actions": np.zeros((1, 1)), "rewards": np.array([r]), "masks": np.array([m])}


def test_losses_of_the_critics_errors_by_hand():
    """Huber: half the square within 1, linear beyond; the slope is cut at 1."""
    e = np.array([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
    for loss, values, slopes in ((hiro.huber, [2.5, 0.5, 0.125, 0, 0.125, 0.5, 2.5], e.clip(-1, 1)),
                                 (hiro.half_square, e * e / 2, e)):
        loss_of_e, back = loss(e)
        np.testing.assert_allclose(loss_of_e, values)
        np.testing.assert_allclose(back(2.0), 2 * slopes)


def test_critic_loss_by_hand():
    """y = r + gamma m min_j Q'_j; Huber beyond 1; the mask."""
    level = constant_level([1.0, 5.0], [2.0, 3.0])

    def loss(kind, m=1.0):
        batch = one_step(0.5, m)
        y = hiro.td3_target(level["target"], batch, np.zeros((1, 1)), 0.5)
        assert y == [1.5 if m else 0.5]                     # 0.5 + 0.5 m min(2, 3)
        return hiro.critic_loss(level["online"], batch, y, kind)

    assert loss("squared")[0] == pytest.approx(0.5 * (0.25 + 12.25))    # errors -0.5 and 3.5
    assert loss("huber")[0] == pytest.approx(0.125 + 3)
    for kind, slopes in (("squared", [-0.5, 3.5]), ("huber", [-0.5, 1])):
        np.testing.assert_allclose(loss(kind)[1]["critic"]["dense1"]["b"][:, 0], slopes)
    assert loss("squared", m=0)[0] == pytest.approx(0.5 * (0.25 + 20.25))


def test_target_actions_stay_in_the_action_range():
    """The noisy target action is clipped to [-1, 1] before the target critics see it."""
    level = constant_level([0.0, 0.0], [0.0, 0.0], a=3.0)
    for j in (0, 1):                                        # Q'(x, a) = a for a > 0
        level["target"]["critic"]["dense0"]["W"][j, 2, 0] = 1
        level["target"]["critic"]["dense1"]["W"][j, 0, 0] = 1
    for noise, a in ((0.4, 1.0), (-0.4, np.tanh(3) - 0.4)):
        y = hiro.td3_target(level["target"], one_step(), np.array([[noise]]), 1.0)
        np.testing.assert_allclose(y, [a])
        loss, grads, info = hiro.critic_loss(level["online"], one_step(), y, "huber")
        np.testing.assert_allclose(info["error"], -a)
        assert loss == pytest.approx(2 * 0.5 * a**2)        # both critics, Q = 0 against y = a


def test_targets_of_the_critics_are_constants():
    """No network of the target is learned; only the policy learns from the policy's loss."""
    networks, target, batch, noise = toy_td3()

    def loss(target, kind):
        y = hiro.td3_target(target, batch, noise, 0.9)
        return hiro.critic_loss(networks, batch, y, kind)

    for kind in ("huber", "squared"):
        assert set(loss(target, kind)[1]) == {"critic"}
        errors = nets.derivative_error(lambda tree: loss(tree, kind)[0], target,
                                       tree_map(np.zeros_like, target))
        assert set(errors.values()) == {0}
    assert set(hiro.actor_loss(networks, batch["observations"])[1]) == {"actor"}


def test_target_noise_is_clipped_and_drawn_for_each_action(monkeypatch):
    """std 0.2, cut at 0.5 [E4]."""
    config, rng, seen = hiro.resolve({"hidden_dims": (3,)}), np.random.default_rng(0), []
    level, batch = hiro.td3_init(rng, 2, 1, config), one_step()
    batch = {k: np.repeat(x, 20000, 0).astype(np.float32) for k, x in batch.items()}
    plain = hiro.td3_target

    def td3_target(target, batch, noise, gamma):
        seen.append((noise, gamma))
        return plain(target, batch, noise, gamma)

    monkeypatch.setattr(hiro, "td3_target", td3_target)
    for changes, std, bound in (({}, 0.197, 0.5), ({"target_noise": 2.0}, 0.464, 0.5),
                                ({"target_noise": 0.0}, 0, 0)):
        hiro.td3_update(level, batch, rng, 0.9, 1.0, dataclasses.replace(config, **changes))
        noise, gamma = seen.pop()
        assert noise.shape == (20000, 1) and np.abs(noise).max() == pytest.approx(bound, rel=1e-6)
        assert noise.std() == pytest.approx(std, rel=0.02) and gamma == 0.9


def test_policy_and_targets_are_delayed():
    config = hiro.resolve({"hidden_dims": (4,), "policy_freq": 3, "tau": 0.25})
    rng = np.random.default_rng(0)
    level = hiro.td3_init(rng, 2, 1, config)
    shapes = {"observations": (5, 2), "next_observations": (5, 2), "actions": (5, 1),
              "rewards": (5,), "masks": (5,)}
    batch = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    for u in range(1, 7):
        before = tree_map(np.copy, {k: level[k] for k in ("online", "target")})
        hiro.td3_update(level, batch, rng, 0.9, 1.0, config)
        changed = {(k, net): not all((x == flatten(before[k][net])[n]).all()
                                     for n, x in flatten(level[k][net]).items())
                   for k in ("online", "target") for net in ("actor", "critic")}
        assert changed == {("online", "critic"): True, ("online", "actor"): u % 3 == 0,
                           ("target", "critic"): u % 3 == 0, ("target", "actor"): u % 3 == 0}
    for name, x in flatten(level["target"]).items():
        close(x, 0.75 * flatten(before["target"])[name] + 0.25 * flatten(level["online"])[name],
              1e-5)


def low_level_on_a_line(seed=0, goal_transition=hiro.goal_transition, updates=2500):
    """TD3 as low level on an empty line against its optimum: errors of Q (of its range) and mu.

    Steps of 0.2 a, goals up to 2 away: Q*(g, a*) = -sum_i gamma^i max(|g| - 0.2 (i + 1), 0).
    """
    config = hiro.resolve({"target_noise": 0.0, "actor_lr": 1e-3, "seed": seed})
    rng, gamma = np.random.default_rng(seed), config.low_discount
    level = hiro.td3_init(rng, 2, 1, config)
    for u in range(updates):
        s, g, a = (rng.uniform(-r, r, (config.batch_size, 1)).astype(np.float32)
                   for r in (3, 2, 1))
        s1 = s + np.float32(0.2) * a
        g1 = goal_transition(s, g, s1)
        batch = {"observations": np.concatenate([s, g], 1), "actions": a,
                 "next_observations": np.concatenate([s1, g1], 1),
                 "rewards": hiro.intrinsic_reward(s, g, s1), "masks": np.ones(len(s), np.float32)}
        hiro.td3_update(level, batch, rng, gamma, min(1, 3 * (1 - u / updates)), config)
    g = np.linspace(-2, 2, 81, dtype=np.float32)[:, None]
    x, best, distance = np.concatenate([0 * g, g], 1), np.clip(g / 0.2, -1, 1), np.abs(g[:, 0])
    exact = -sum(gamma**i * np.maximum(distance - 0.2 * (i + 1), 0) for i in range(10))
    q = hiro.critic(level["online"]["critic"], x, best)[0].mean(0)
    mu = hiro.policy(level["online"]["actor"], x)[0]
    return np.abs(q - exact).mean() / np.ptp(exact), np.abs(mu - best).mean()


def test_low_level_learns_the_optimum_on_a_line(monkeypatch):
    """Q within 5 % of its range and the action within 0.05; both lesions fail."""
    q_error, mu_error = low_level_on_a_line()
    assert q_error < 0.05 and mu_error < 0.05, (q_error, mu_error)
    q_error, mu_error = low_level_on_a_line(goal_transition=lambda s, g, s1: g)     # g' = g
    assert q_error > 0.05, q_error
    plain = hiro.actor_loss
    monkeypatch.setattr(hiro, "actor_loss", lambda *x: (
        0, {"actor": tree_map(np.negative, plain(*x)[1]["actor"])}, {}))
    q_error, mu_error = low_level_on_a_line()                           # sign flipped
    assert q_error > 0.05 and mu_error > 0.05, (q_error, mu_error)


# ----------------------------------------------------------------------------- hiro: the loop


class Plane:
    """A point on a plane by the calls of `envs.GoalEnv`: pushes of a / 2, the time seen behind
    the position, the end beyond 6 (true) or after 25 steps (time limit)."""

    action_size = 2

    def __init__(self):
        self.lengths = []

    def observe(self):
        return {"observation": np.array([*self.s, self.time]), "achieved_goal": self.s.copy(),
                "desired_goal": self.goal.copy()}

    def reset(self, seed=None, options=None):
        self.s, self.time = np.zeros(2), 0
        self.goal = np.random.default_rng(seed).uniform(-3, 3, 2)
        self.lengths.append(0)
        return self.observe(), {}

    def step(self, action):
        assert action.dtype == np.float32 and (np.abs(action) <= 1).all()
        self.s, self.time = self.s + action / 2, self.time + 1
        self.lengths[-1] += 1
        distance = np.linalg.norm(self.s - self.goal)
        return (self.observe(), -distance, bool(np.abs(self.s).max() > 6), self.time >= 25,
                {"success": distance < 0.5})


def learn_on_a_plane(**changes):
    """`hiro.learn` to its end -> environment, agent, [(step, row, over)]."""
    config = hiro.resolve({"subgoal_interval": 5, "steps": 600, "warmup": 200, "goal_range": 0,
                           "batch_size": 32, "high_updates": 1, "hidden_dims": (16, 16),
                           **changes})
    problem = hiro.prepare(config, env=Plane())
    agent = hiro.init_agent(problem, problem.rngs)
    problem.env.lengths.clear()
    rows = [(int(agent["step"]), row, over)
            for row, over in hiro.learn(problem.env, agent, config, problem.rngs)]
    return problem.env, agent, rows


def test_windows_are_those_of_the_episodes():
    """Cut by truncation (bootstrap) or termination (none), joined within an episode."""
    env, agent, rows = learn_on_a_plane(low_noise=0.0)
    replay, n = agent["replay"], int(agent["replay"]["count"])
    length, states = replay["length"][:n], replay["states"][:n]
    assert n == len(rows) and [step for step, *_ in rows] == np.cumsum(length).tolist()
    assert 600 <= agent["step"] == length.sum() < 625 and length.max() == 5
    ends = states[np.arange(n), length]
    out = np.abs(ends[:, :2]).max(1) > 6
    over = np.array([over for *_, over in rows])
    assert (replay["mask"][:n] == ~out).all() and 0 < out.sum() < n
    assert (over == out | (ends[:, 2] == 25)).all() and over[-1]
    assert env.lengths == ends[over, 2].tolist() and set(env.lengths) - {25}
    assert sorted(length[length < 5]) == sorted(k % 5 for k in ends[out, 2].astype(int) if k % 5)
    assert (states[0, :6, 2] == np.arange(6)).all()
    first = np.concatenate([[True], over[:-1]])
    assert ((states[:, 0, 2] == 0) == first).all()
    assert (states[1:, 0][~first[1:]] == ends[:-1][~first[1:]]).all()
    assert (replay["joined"][:n] == ~over).all()
    a = replay["actions"][:n]
    np.testing.assert_allclose(states[:, 1, :2] - states[:, 0, :2], a[:, 0] / 2, atol=1e-5)
    warm = np.cumsum(length) - length < 200             # in the warm-up one action is held
    steady = np.array([(x[:k] == x[0]).all() for x, k in zip(a, length)])
    assert steady[warm].all() and not steady[~warm & (length > 1)].any()
    assert np.abs(a[warm, 0]).mean() == pytest.approx(0.5, abs=0.1)


def test_the_range_of_goals_is_measured_in_the_warm_up():
    """The 95th percentile of moves in c steps; goals of the warm-up are drawn within it."""
    _, agent, _ = learn_on_a_plane()
    replay, n = agent["replay"], int(agent["replay"]["count"])
    states, length, goal_range = replay["states"], replay["length"][:n], agent["goal_range"]
    begun = np.cumsum(length) - length
    whole = np.flatnonzero((begun < 200) & (length == 5))
    moved = np.abs(states[whole, 5, :2] - states[whole, 0, :2])
    np.testing.assert_allclose(goal_range, np.quantile(moved, 0.95, axis=0), rtol=1e-5)
    assert (np.abs(replay["goal"][:n]) <= goal_range + 1e-6).all()
    drawn = replay["goal"][:n][begun < 200] / goal_range
    assert np.abs(drawn).max() > 0.8 and np.abs(drawn.mean()) < 0.3 and np.isfinite(drawn).all()
    _, agent, _ = learn_on_a_plane(steps=210, goal_range=1.5)
    assert agent["goal_range"].tolist() == [1.5, 1.5]       # given: nothing is measured
    with pytest.raises(ValueError, match="no 30 steps in a row in the warm-up"):
        learn_on_a_plane(subgoal_interval=30)
    with pytest.raises(ValueError, match="over --subgoal-interval 501 steps.* has 500"):
        hiro.prepare(hiro.resolve({"subgoal_interval": 501, "goal_range": 0}))


def test_learning_rates_fall_to_zero_and_stay_there(monkeypatch):
    """The last episode runs past --steps: its rates are 0, not below; replay may be short."""
    rates, plain = [], hiro.td3_update

    def td3_update(*arguments):
        rates.append(arguments[4])
        return plain(*arguments)

    monkeypatch.setattr(hiro, "td3_update", td3_update)
    _, agent, rows = learn_on_a_plane(steps=560, capacity=100)
    assert agent["step"] > 565 and len(agent["replay"]["mask"]) == 20
    assert rates[0] == 1 and min(rates) == 0 == rates[-1] and (np.diff(rates) <= 0).all()
    losses = {step for step, row, _ in rows if "low_loss" in row}
    assert losses == {step for step, row, _ in rows if "high_loss" in row} == {
        step for step, *_ in rows if step >= 200}           # no update in the warm-up


def test_updates_of_a_window_by_hand():
    """One of the low level for each step and high_updates of the high level, after the warm-up;
    with pretrain one after the other."""
    config = hiro.resolve({"steps": 9000, "warmup": 1000})
    window = {"actions": [0, 0, 0]}
    assert hiro.schedule(999, window, config) == (0, 0, 1)
    assert hiro.schedule(1000, window, config) == (3, 5, 1)
    assert hiro.schedule(7500, window, config) == (3, 5, pytest.approx(0.5))
    assert hiro.schedule(9001, window, config) == (3, 5, 0)
    assert hiro.schedule(8000, window, dataclasses.replace(config, lr_decay=False))[2] == 1
    config = dataclasses.replace(config, pretrain=2000)
    assert [hiro.schedule(step, window, config)[:2] for step in (999, 1000, 2000, 2001)] == [
        (0, 0), (3, 0), (3, 0), (0, 5)]


def test_pretraining_is_of_the_low_level_alone_then_of_the_high_level_alone():
    config = hiro.resolve({"subgoal_interval": 5, "steps": 400, "warmup": 100, "pretrain": 200,
                           "batch_size": 8, "candidates": 3, "hidden_dims": (8,),
                           "lr_decay": False})
    problem = hiro.prepare(config, env=Plane())
    agent, learned = hiro.init_agent(problem, problem.rngs), set()

    def levels():
        return {name: tree_map(np.copy, agent[name]["online"]) for name in ("low", "high")}

    before = levels()
    for row, _ in hiro.learn(problem.env, agent, config, problem.rngs):
        now, step = levels(), int(agent["step"])
        for name in ("low", "high"):
            same = [(x == y).all() for x, y in zip(flatten(before[name]).values(),
                                                   flatten(now[name]).values())]
            learns = step >= 100 and (name == "low") == (step <= 200)
            assert all(same) != learns and (f"{name}_loss" in row) == learns, (step, name)
            learned |= {name} if learns else set()
        goals = np.abs(agent["replay"]["goal"][:int(agent["replay"]["count"])])
        assert goals.max() <= 2
        before = now
    assert learned == {"low", "high"}


def test_exploration_of_goals():
    """Uniform until the high level learns; then its goal and correlated noise, clipped [E10]."""
    config = hiro.resolve({"warmup": 100, "high_noise": 0.1, "noise_correlation": 0.6})
    problem, rng = hiro.prepare(config), np.random.default_rng(0)
    agent = hiro.init_agent(problem, problem.rngs)
    s, task, noise = np.zeros(2, np.float32), np.ones(2, np.float32), np.zeros(2)

    def goals(n):
        return np.array([hiro.explore_goal(agent, s, task, noise, rng, config)
                         for _ in range(n)])

    g = goals(2000)
    assert g.dtype == np.float32 and np.abs(g).max() <= 2 and not noise.any()
    assert g.std() == pytest.approx(2 / np.sqrt(3), rel=0.03)
    agent["step"][...] = 100
    mean = hiro.policies(agent, config).high(s[None], task[None])[0]
    g = goals(8000) - mean
    assert g.std() == pytest.approx(0.1 * 2, rel=0.05) and np.abs(g.mean(0)).max() < 0.02
    assert np.corrcoef(g[1:, 0], g[:-1, 0])[0, 1] == pytest.approx(0.6, abs=0.04)
    assert abs(np.corrcoef(g[:, 0], g[:, 1])[0, 1]) < 0.08
    config = dataclasses.replace(config, high_noise=2.0)
    assert np.abs(goals(2000)).max() == 2 and (np.abs(goals(2000)) == 2).mean() > 0.3


# ------------------------------------------------------------- hiro: acting and evaluation


def test_policies_see_what_they_are_told():
    """Low level: [s; g], or without its position; high level: [s; D], its goals in units of the
    range."""
    for see_position, n in ((True, 5), (False, 3)):
        config = hiro.resolve({"see_position": see_position})
        agent = {"goal_range": np.array([2.0, 3.0], np.float32)}
        rng = np.random.default_rng(0)
        agent["low"] = hiro.td3_init(rng, n, 2, config)
        agent["high"] = hiro.td3_init(rng, 5, 2, config)
        acting = hiro.policies(agent, config)
        s, g = (rng.normal(size=(4, k)).astype(np.float32) for k in (3, 2))
        x = np.concatenate([s if see_position else s[:, 2:], g], 1)
        close(acting.low(s, g), hiro.policy(agent["low"]["online"]["actor"], x)[0])
        x = np.concatenate([s, g], 1)
        close(acting.high(s, g), [2, 3] * hiro.policy(agent["high"]["online"]["actor"], x)[0], 1e-6)
        assert acting.transition is hiro.goal_transition and acting.hierarchical


def strong_agent(config, problem):
    """An agent at its start, its networks scaled up so that it moves."""
    agent = hiro.init_agent(problem, generators(1, "init"))
    for level in ("low", "high"):
        agent[level]["online"] = tree_map(lambda w: 3 * w, agent[level]["online"])
    return agent


@pytest.mark.parametrize("name", ["point-umaze", "point-umaze-undo"])
def test_episodes_side_by_side_are_episodes_one_by_one(name):
    """The batched evaluation takes the path of the agent's act() through Gymnasium's calls."""
    config = hiro.resolve({"seed": 1, "env": name, "eval_noise": 0.0})
    problem = hiro.prepare(config)
    agent, task = strong_agent(config, problem), problem.env
    starts, goals = task.draw(np.random.default_rng(0), 3)
    distance, paths, asked = online.rollout(task, hiro.policies(agent, config), starts, goals,
                                            None, config)
    assert distance.shape == (500, 3) and paths.shape == (501, 3, 2) and asked.shape == (50, 3, 2)
    actor = online.actors(problem, agent)
    for i in range(3):
        obs, _ = task.reset(options={"start": starts[i], "goal": goals[i]})
        act = actor()
        for t in range(100):
            obs, reward, *_ = task.step(act(obs))
            np.testing.assert_allclose(obs["achieved_goal"], paths[t + 1, i], atol=1e-3)
            assert reward == pytest.approx(-distance[t, i], abs=1e-3)
    assert np.abs(paths[-1] - paths[0]).max() > 0.5


def test_noise_in_evaluation():
    """--eval-noise is the std of what is added to the low level's actions, before clipping."""
    rng, zero = np.random.default_rng(0), np.zeros((20000, 2))
    noisy = online.evaluation_action(zero, rng, hiro.resolve({"eval_noise": 0.25}))
    assert noisy.std() == pytest.approx(0.25, rel=0.02) and abs(noisy.mean()) < 0.01
    noisy = online.evaluation_action(zero + 0.9, rng, hiro.resolve({"eval_noise": 0.5}))
    assert noisy.max() == 1 and 0.3 < (noisy == 1).mean() < 0.5
    assert online.evaluation_action(zero, None, hiro.resolve({})) is zero


def test_evaluation_of_hiro_by_hand():
    """A low level that goes to its goal, a high level that sends it on: success of each test."""
    config = hiro.resolve({"eval_episodes": 4, "seed": 3})
    task = envs.make_task(config.env)

    def high(s, D):                                     # right, up, left: around the wall
        x, y = s.T
        place = np.where(y < 7.9, np.where(x < 7.9, [8 + 0 * x, y], [x, 8 + 0 * y]), [0 * x, y])
        return np.clip(place.T - s, -2, 2)

    acting = SimpleNamespace(high=high, low=straight, transition=hiro.goal_transition,
                             hierarchical=True)
    problem = SimpleNamespace(config=config, env=task, policies=lambda agent, config: acting)
    summary, episodes = online.evaluate(problem, {"step": np.array(7)})
    assert (summary["success"], summary["success_8_0"], summary["success_8_8"]) == (1, 1, 1)
    assert summary["success_last_step"] == 1 and summary["final_distance"] < 0.5
    assert list(episodes) == ["0_8", "8_0", "8_8", "random"]
    errors = [summary[f"subgoal_error_{name}"] for name in episodes]
    assert summary["subgoal_error"] == pytest.approx(np.mean(errors)) and max(errors) < 0.1
    acting.high = lambda s, D: np.zeros((len(s), 2), np.float32)    # stays at (0, 0)
    summary, again = online.evaluate(problem, {"step": np.array(7)})
    assert summary["success"] == summary["success_8_8"] == 0 == summary["success_last_step"]
    assert summary["final_distance"] == pytest.approx(8, abs=0.1)
    for name in episodes:
        assert (again[name][2] == episodes[name][2]).all()          # the same goals and starts
        assert (again[name][0][0] == episodes[name][0][0]).all()


# ------------------------------------------------------------------------------ hiro: using it


def test_a_loaded_hiro_agent_acts_as_in_evaluation(tmp_path, no_pictures):
    """The path of the evaluation's first episode of each test, by `load` and Gymnasium's calls."""
    config = hiro.resolve({"steps": 600, "warmup": 500, "eval_interval": 600, "batch_size": 32,
                           "eval_episodes": 1, "high_updates": 1, "hidden_dims": (16, 16)})
    problem = hiro.prepare(config)
    result = hiro.train(problem, Run(str(tmp_path), config, counter="step"))
    episodes = problem.evaluate(problem, result.agent)[1]
    # five lines: load a run and act with it
    actor, env = hiro.load(tmp_path), envs.make_task("point-umaze")
    for paths, asked, goals, success in episodes.values():
        obs, _ = env.reset(options={"start": paths[0, 0], "goal": goals[0]})
        act, ours = actor(), result.actor()
        for t in range(60):
            action = act(obs)
            assert (action == ours(obs)).all()
            obs, reward, terminated, truncated, info = env.step(action)
            np.testing.assert_allclose(obs["observation"], paths[t + 1, 0], atol=1e-3)
    assert np.abs(paths[60] - paths[0]).max() > 0.1


def test_hiro_trains_on_an_own_layout():
    """Five lines: a layout, a task, a config, training, an episode by the trained agent."""
    task = envs.GoalEnv(envs.PointMaze("mine", CORRIDOR, limit=60))
    config = hiro.resolve({"quick": True, "steps": 300, "warmup": 200, "eval_interval": 300})
    result = hiro.train(hiro.prepare(config, env=task))
    act, (obs, _) = result.actor(), task.reset(seed=0)
    obs, reward, terminated, truncated, info = task.step(act(obs))

    assert result.summary["env"] == "mine" and reward in (-1, 0)
    assert set(result.summary) > {f"success_task{i}" for i in range(2, 6)} | {"success_random"}


@pytest.mark.slow
def test_hiro_solves_the_u_maze(monkeypatch):
    """Around the wall to (0, 8) on a fresh seed; a high level paid for distance does not get
    there."""
    config = hiro.resolve({"seed": 50})
    with contextlib.redirect_stdout(io.StringIO()):
        summary = hiro.train(hiro.prepare(config)).summary
    assert summary["success"] >= 0.95 and summary["success_8_8"] >= 0.95
    plain = hiro.sample_windows

    def paid_for_distance(*arguments):
        batch, info = plain(*arguments)
        return {**batch, "rewards": -batch["rewards"]}, info

    monkeypatch.setattr(hiro, "sample_windows", paid_for_distance)
    config = dataclasses.replace(config, steps=10000)
    with contextlib.redirect_stdout(io.StringIO()):
        summary = hiro.train(hiro.prepare(config)).summary
    assert summary["success"] < 0.5 and summary["success_8_8"] < 0.5


# ================================================================= the form of the reference

FLOORS = {"nets": 0, "envs": 0, "support": 1, "hiql": 2, "hiro": 2, "lab": 3}   # tests: 4


def imports():
    """{module: modules of this project that it imports, anywhere in its code}, by dotted names."""
    paths = [path for folder in ("", "support", "lab")
             for path in glob.glob(os.path.join(HERE, folder, "*.py"))]
    names = {os.path.relpath(path, HERE)[:-3].replace(os.sep, ".").removesuffix(".__init__"): path
             for path in paths}
    found = {}
    for name, path in names.items():
        with open(path) as file:
            nodes = list(ast.walk(ast.parse(file.read())))
        words = {alias.name for node in nodes if isinstance(node, ast.Import)
                 for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name} has a relative import"
                words |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        found[name] = words & set(names) - {"support", "lab"}
    return found


def test_imports_go_downwards_only():
    """nets, envs <- support <- hiql, hiro <- lab <- tests; within a folder there is no circle."""
    graph = imports()
    assert {"nets", "envs", "hiql", "hiro", "support.run", "lab.ogbench"} <= set(graph)

    def floor(name):
        test = name.split(".")[-1].startswith(("test_", "conftest"))
        return 4 if test else FLOORS.get(name.split(".")[0], 4)

    for name, below in graph.items():
        for other in below:
            beside = floor(other) == floor(name) and name.split(".")[0] == other.split(".")[0]
            assert floor(name) == 4 or floor(other) < floor(name) or beside, f"{name}: {other}"
    assert graph["nets"] == graph["envs"] == set()
    for name in ("hiql", "hiro"):
        assert all(other in ("nets", "envs") or other.startswith("support.")
                   for other in graph[name]), name
    assert not any(name.startswith("lab") for name in graph["test_all"])
    list(graphlib.TopologicalSorter(graph).static_order())              # CycleError: a circle


@pytest.mark.parametrize("program", [hiql, hiro])
def test_the_loop_fits_on_a_page(program):
    """At most 25 lines of code in `learn`, the paper's algorithm box, its docstring left out."""
    with open(program.__file__) as file:
        source = file.read()
    (learn,) = [node for node in ast.parse(source).body if getattr(node, "name", "") == "learn"]
    docstring, lines = learn.body[0], source.splitlines()
    assert isinstance(docstring.value, ast.Constant)
    lines = lines[learn.lineno - 1:docstring.lineno - 1] + lines[docstring.end_lineno:
                                                                 learn.end_lineno]
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    assert code[0].startswith("def learn(") and 10 < len(code) <= 25


@pytest.mark.parametrize("program, letter, elsewhere", [
    (hiql, "D", {"D13": "lab/baselines.py", "D15": "lab/ogbench.py", "D16": "lab/ogbench.py",
                 "D17": "lab/ogbench.py"}),
    (hiro, "E", {"E17": "lab/tasks.py", "E18": "lab/td3.py"})])
def test_every_deviation_is_documented_and_tagged(program, letter, elsewhere):
    """Each one stands at the top of the file it belongs to and at the code that it is about."""
    with open(program.__file__) as file, open(envs.__file__) as mazes:
        doc, code = file.read().split('"""', 2)[1:]
        code += mazes.read()
    listed = re.findall(rf"^ ({letter}\d+) ", doc, re.M)
    numbers = range(1, len(listed) + len(elsewhere) + 1)
    assert len(set(listed)) == len(listed)
    assert set(listed) | set(elsewhere) == {f"{letter}{i}" for i in numbers}
    assert set(re.findall(rf"\[({letter}\d+)\]", code)) - set(elsewhere) == set(listed)
    for tag, path in elsewhere.items():
        with open(os.path.join(HERE, path)) as file:
            assert tag in file.read() and path in doc, tag


# -------------------------------------------------------------------- certificate and speed table


def loss_errors(cases):
    """{name: {array: error}} of losses against the complex step.

    cases: {name: (loss, tree)}, loss(tree) -> value, analytic gradients of some of its arrays,
    and what else it returns. Tests of other losses use it too.
    """
    return {name: nets.derivative_error(lambda tree: loss(tree)[0], tree, loss(tree)[1])
            for name, (loss, tree) in cases.items()}


def toy_case(loss, **changes):
    """A case of `loss_errors` from a loss(params, batch, config) and the arguments of `toy`."""
    config, params, batch = toy(**changes)
    return lambda tree: loss(tree, batch, config), params


def certificate():
    """{layer or loss: {array: error}}: analytic derivative against the complex step."""
    networks, target, batch, noise = toy_td3()
    rng, x, a = np.random.default_rng(0), batch["observations"], batch["actions"]
    y, dq = hiro.td3_target(target, batch, noise, 0.9), rng.normal(size=(2, 7))

    def critics(tree):
        q, back = hiro.critic(tree["p"], x, tree["a"])
        da, grads = back(dq)
        return (dq * q).sum(), {"p": grads, "a": da}

    config, params, toy_batch = toy()
    s, dv = toy_batch["observations"], rng.normal(size=(2, 7))
    z = hiql.phi(params, s, toy_batch["value_goals"], config)[0]

    def values(tree):
        v, back = hiql.value(tree["p"], s, tree["z"])
        dz, grads = back(dv)
        return (dv * v).sum(), {"p": grads, "z": dz}

    cases = {
        "loss: value": toy_case(hiql.value_loss),
        "loss: value, phi(g)": toy_case(hiql.value_loss, rep_type="phi_g"),
        "loss: value, no phi": toy_case(hiql.value_loss, rep_type="none"),
        "loss: high level": toy_case(hiql.high_loss),
        "loss: high level, no phi": toy_case(hiql.high_loss, rep_type="none"),
        "loss: high level, learned std": toy_case(hiql.high_loss, const_std=False),
        "loss: low level": toy_case(hiql.low_loss),
        "loss: low level, learned std": toy_case(hiql.low_loss, const_std=False),
        "loss: low level, discrete": toy_case(hiql.low_loss, discrete=True),
        "loss: flat policy": toy_case(hiql.flat_loss),
        "loss: critics, huber": (lambda tree: hiro.critic_loss(tree, batch, y, "huber"), networks),
        "loss: critics, squared": (lambda tree: hiro.critic_loss(tree, batch, y, "squared"),
                                   networks),
        "loss: policy, through the critic": (lambda tree: hiro.actor_loss(tree, x), networks),
        "critics, and their input a": (critics, {"p": networks["critic"], "a": a}),
        "value heads, and their input z": (values, {"p": params["value"], "z": z})}
    layers = {f"layer: {name}": errors for name, errors in nets.layer_errors().items()}
    return {**layers, **loss_errors(cases)}


def matrix_products(params, batch_size):
    """The bare products of one HIQL update, heads batched, in its own shapes and dtype.

    V: one forward and two backward at (s, g), two target forwards, four advantage forwards; phi:
    one and two, six forwards; each policy one and two.
    """
    rng, jobs = np.random.default_rng(0), []
    for name, forwards in (("value", 7), ("phi", 7), ("low", 1), ("high", 1)):
        for layer, p in params[name].items():
            if layer.startswith("dense"):
                w = p["W"]
                x, y = (rng.normal(size=w.shape[:-2] + (batch_size, n)).astype(w.dtype)
                        for n in w.shape[-2:])
                jobs += [(x, w)] * forwards
                jobs += [(x.swapaxes(-1, -2), y), (y, w.swapaxes(-1, -2))]
    return lambda: [a @ b for a, b in jobs]


def td3_products(params, batch_size, updates):
    """The bare products of TD3 updates, policy and targets at every second one.

    Critics: one forward and two backward, one target forward; target policy: one forward; policy:
    one forward and two backward through it, and one forward and one backward of one critic.
    """
    rng, jobs = np.random.default_rng(0), []
    for net, layers in params.items():
        for p in layers.values():
            w = p["W"]
            x, y = (rng.normal(size=w.shape[:-2] + (batch_size, n)).astype(w.dtype)
                    for n in w.shape[-2:])
            backward = [(x.swapaxes(-1, -2), y), (y, w.swapaxes(-1, -2))]
            if net == "critic":
                jobs += ([(x, w)] * 2 + backward) * updates
                jobs += [(x[0], w[0]), (y[0], w[0].T)] * (updates // 2)
            else:
                jobs += [(x, w)] * updates + ([(x, w)] + backward) * (updates // 2)
    return jobs


def timed(f):
    """Milliseconds that f() takes."""
    start = time.perf_counter()
    f()
    return 1e3 * (time.perf_counter() - start)


def hiql_speed(hidden_dims, updates=400):
    """Medians in ms of an update, sampling included, in float32 with batch 256, and of its bare
    matrix products, timed in turn; the last tenth of updates over the first."""
    config = hiql.resolve({"hidden_dims": hidden_dims, "train_flat": False, "lr_decay": False,
                           "steps": updates + 10})
    problem = hiql.prepare(config)
    agent = offline.init_agent(problem, problem.rngs)
    loop = hiql.learn(problem, agent, problem.rngs["batch"])
    floor = matrix_products(agent["params"], config.batch_size)
    for _ in range(10):
        next(loop), floor()
    pairs = np.array([(timed(lambda: next(loop)), timed(floor)) for _ in range(updates)])
    tenth = updates // 10
    drift = np.median(pairs[-tenth:, 0]) / np.median(pairs[:tenth, 0])
    return *np.median(pairs, axis=0), drift


def hiro_speed(windows=40):
    """ms for each environment step of HIRO: {part: median}, products among them.

    updates: a window's updates of both levels (sampling and relabelling left out), products:
    their bare matrix products, each divided by c; relabelling; environment and acting.
    """
    config = hiro.resolve({"steps": 5000, "seed": 0, "eval_interval": 5000, "eval_episodes": 1})
    with contextlib.redirect_stdout(io.StringIO()):
        agent = hiro.train(hiro.prepare(config)).agent
    env, rng, c = envs.make_task(config.env), np.random.default_rng(0), config.subgoal_interval
    low, high, replay, goal_range = (agent[x] for x in ("low", "high", "replay", "goal_range"))
    jobs = [job for level, n in ((low, c), (high, config.high_updates))
            for job in td3_products(level["online"], config.batch_size, n)]
    acting, s = hiro.policies(agent, config), np.zeros(2, np.float32)
    task = online.read(env.reset(seed=0)[0])[1]

    def explore():
        g = hiro.explore_goal(agent, s, task, np.zeros(2), rng, config)
        hiro.explore_window(env, s, task, g, acting, False, rng, config)

    def update(level, batch, gamma):
        return timed(lambda: hiro.td3_update(level, batch, rng, gamma, 1.0, config))

    parts = {name: [] for name in ("updates", "products", "relabelling", "environment")}
    for _ in range(windows):
        steps = [hiro.sample_steps(replay, rng, goal_range, config) for _ in range(c)]
        begin = time.perf_counter()
        relabelled = [hiro.sample_windows(replay, rng, acting.low, goal_range, config)[0]
                      for _ in range(config.high_updates)]
        parts["relabelling"].append(1e3 * (time.perf_counter() - begin))
        parts["updates"].append(sum(update(low, batch, config.low_discount) for batch in steps)
                                + sum(update(high, batch, config.high_discount)
                                      for batch in relabelled))
        parts["products"].append(timed(lambda: [a @ b for a, b in jobs]))
        env.reset(seed=0)
        parts["environment"].append(timed(explore))
    return {name: np.median(x) / c for name, x in parts.items()}


@pytest.mark.slow
def test_speed_relative_to_matrix_products():
    """A guard against a much slower update, generous since machines are noisy."""
    update, floor, drift = hiql_speed((256, 256), 200)
    assert update / floor < 4 and drift < 1.5


def main():
    print("gradient certificate: largest relative error of the analytic derivative against the "
          "complex step, float64")
    worst = 0
    for name, errors in certificate().items():
        array = max(errors, key=errors.get)
        worst = max(worst, errors[array])
        print(f"  {name:40s} {errors[array]:.1e}   of {len(errors):2d} arrays, worst {array}")
    print(f"  worst of all {worst:.1e}\n")
    print("speed, float32, batch 256, one BLAS thread: one HIQL update (sampling, losses, Adam, "
          "EMA)\n  hidden            update ms   products ms   ratio   last tenth / first")
    for hidden_dims in ((256, 256), (128, 128, 128)):
        update, floor, drift = hiql_speed(hidden_dims)
        print(f"  {str(hidden_dims):16s} {update:10.2f} {floor:13.2f} {update / floor:7.2f} "
              f"{drift:12.2f}")
    parts = hiro_speed()
    print("\nHIRO, float32, hidden 64,64, batch 100: ms for each environment step\n"
          "  one update of the low level and a window's updates of the high level / c "
          f"{parts['updates']:.2f}, their products {parts['products']:.2f}: ratio "
          f"{parts['updates'] / parts['products']:.2f}\n"
          "  relabelling and sampling of the high level's batches "
          f"{parts['relabelling']:.2f}\n"
          f"  environment and acting {parts['environment']:.2f}: "
          f"{1e3 / parts['environment']:.0f} steps per second without learning")
    try:
        import resource                                 # not on Windows
    except ImportError:
        return
    print("  peak memory of this process "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
