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
from support.files import load_tree
from support.run import HERE, Run, generators, load_run

GOLDEN = os.environ.get("GOLDEN_HIQL", os.path.join(HERE, "data", "golden_hiql_f64.npz"))


def close(a, b, tolerance=1e-9):
    """The certificate's error of a against b: max|a - b| / max(max|b|, 1e-3)."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)
    assert error < tolerance, error


# =============================================================================== nets: layers


def test_gradient_certificate():
    """Every layer and every loss: analytic derivatives equal the complex step. A loss has them for
    all arrays of the networks that it changes, a learned std included."""
    found = certificate()
    for name, errors in found.items():
        for array, error in errors.items():
            assert error < 1e-12, (name, array, error)
    config, params, _ = toy(const_std=False)
    networks = {"high level": ["high"], "low level": ["low"], "value": ["value", "phi"]}
    for loss, names in networks.items():
        arrays = {x for x in flatten(params) if x.split("/")[0] in names}
        assert arrays == found[f"loss: {loss}{', learned std' * (loss != 'value')}"].keys()


def test_every_layer_is_certified(monkeypatch):
    """With these shapes: single and in ensembles, which share their input or have their own."""
    def shapes(f, tree, grads):
        assert flatten(grads).keys() == flatten(tree).keys()
        return {name.removeprefix("p/"): x.shape for name, x in flatten(tree).items()}

    monkeypatch.setattr(nets, "derivative_error", shapes)
    net = {"dense0/W": (2, 4, 6), "dense0/b": (2, 6), "norm0/scale": (2, 6), "norm0/shift": (2, 6),
           "dense1/W": (2, 6, 6), "dense1/b": (2, 6), "norm1/scale": (2, 6), "norm1/shift": (2, 6),
           "dense2/W": (2, 6, 3), "dense2/b": (2, 3)}
    plain, twin = {"x": (5, 4)}, {"W": (2, 4, 6), "b": (2, 6)}
    assert nets.layer_errors() == {
        "linear": {**plain, "W": (4, 3), "b": (3,)}, "linear, twin on shared x": {**plain, **twin},
        "linear, twin": {"x": (2, 5, 4), **twin}, "gelu": plain, "relu": plain, "tanh": plain,
        "layer_norm": {**plain, "scale": (4,), "shift": (4,)}, "length_normalize": plain,
        "mlp, twin, gelu, layer_norm": {**plain, **net}, "gaussian, std 1": plain,
        "gaussian, learned std": {**plain, "log_std": (4,)}, "categorical": plain}


def test_the_complex_step_sees_a_wrong_derivative():
    x = np.linspace(-1, 1, 5)
    errors = nets.derivative_error(lambda t: (t["x"] ** 3).sum(), {"x": x}, {"x": 3.001 * x**2})
    assert errors["x"] == pytest.approx(0.001 / 3, rel=1e-6)
    errors = nets.derivative_error(lambda t: 0 * t["x"].sum(), {"x": x}, {"x": 0 * x - 1e-6})
    assert errors["x"] == pytest.approx(1e-3)               # relative to 1e-3 at least


def test_the_complex_step_takes_stopped_gradients_for_constants():
    """d/dx of x stop_gradient(x) is x; without the stop it would be 2 x."""
    x = np.linspace(-1, 1, 5)

    def stopped(tree):
        return (tree["x"] * nets.stop_gradient(tree["x"])).sum()

    assert nets.derivative_error(stopped, {"x": x}, {"x": x})["x"] < 1e-15
    assert nets.derivative_error(stopped, {"x": x}, {"x": 2 * x})["x"] == pytest.approx(1)


def test_activations_and_norms_by_hand():
    x = np.array([[-1.0, 0.0, 2.0]])
    np.testing.assert_allclose(nets.relu({}, x / 4)[0], [[0, 0, 0.5]])
    np.testing.assert_allclose(nets.gelu({}, x)[0], [[-0.15880801, 0, 1.95459769]], atol=1e-8)
    p = {"scale": np.array([1.0, 2.0, 1.0]), "shift": np.array([0.0, 1.0, 0.0])}
    y = nets.layer_norm(p, x)[0]                            # mean 1/3, biased variance 14/9
    np.testing.assert_allclose(y, [[-1.06904497, 1 - 2 * 0.26726124, 1.33630621]], atol=1e-5)
    ones = {"scale": np.ones(2), "shift": np.zeros(2)}      # variance 1e-6, the size of epsilon
    np.testing.assert_allclose(nets.layer_norm(ones, np.array([[1e-3, -1e-3]]))[0],
                               [[0.5**0.5, -0.5**0.5]], atol=1e-12)
    z = nets.length_normalize({}, np.array([[3.0, 4.0]]))[0]
    np.testing.assert_allclose(z, np.sqrt(2) * np.array([[0.6, 0.8]]))
    many, dy = np.random.default_rng(0).normal(size=(2, 2, 5, 3))       # an ensemble of two
    y, back = nets.length_normalize({}, many)
    for i in (0, 1):
        yi, back_i = nets.length_normalize({}, many[i])
        np.testing.assert_array_equal(y[i], yi)
        np.testing.assert_array_equal(back(dy)[0][i], back_i(dy[i])[0])


def test_log_probabilities_by_hand():
    mean, x = np.zeros((1, 2)), np.array([[1.0, -2.0]])
    assert nets.gaussian_log_prob({}, mean, x)[0][0] == pytest.approx(-2.5 - np.log(2 * np.pi))
    p = {"log_std": np.log([2.0, 1.0])}
    assert nets.gaussian_log_prob(p, mean, x)[0][0] == pytest.approx(
        -0.125 - 2 - np.log(2) - np.log(2 * np.pi))
    log_prob = nets.categorical_log_prob({}, np.log([[1.0, 2.0, 5.0]]), np.array([2]))[0]
    assert log_prob[0] == pytest.approx(np.log(5 / 8))
    log_prob = nets.categorical_log_prob({}, np.array([[1000.0, 0.0]]), np.array([1]))[0]
    assert log_prob[0] == -1000                                         # exp(1000) overflows


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
    """First step: lr sign(g), half of it where g is as small as epsilon; second step with g = 1, 3
    from Kingma and Ba's formulas."""
    p = {"w": np.array([1.0, 1.0]), "other": np.array([5.0])}
    state = nets.adam_init(p)
    nets.adam(p, {"w": np.array([1.0, 1e-8])}, state, lr=0.1)
    np.testing.assert_allclose(p["w"], [0.9, 0.95], atol=1e-8)
    nets.adam(p, {"w": np.array([3.0, 1.0])}, state, lr=0.1)
    m, v = (0.9 * 0.1 + 0.1 * 3) / (1 - 0.81), (0.999 * 0.001 + 0.001 * 9) / (1 - 0.999**2)
    assert p["w"][0] == pytest.approx(0.9 - 0.1 * m / np.sqrt(v), abs=1e-8)
    assert state["m"]["w"][0] == pytest.approx(0.39) and state["v"]["w"][0] == pytest.approx(
        0.009999)                                           # kept without bias correction
    assert p["other"][0] == 5 and state["m"]["other"][0] == 0 and state["count"] == 2
    target = {"w": np.array([2.0])}
    nets.ema(target, {"w": np.array([4.0]), "other": np.array([7.0])}, 0.25)
    assert target["w"][0] == 2.5


def test_trees():
    """Flattened by path and back, the arrays themselves; tree_map goes to every array."""
    x, y = np.arange(2.0), np.arange(3.0)
    tree = {"a": {"b": x, "c": {"d": y}}, "e": x}
    flat = flatten(tree)
    assert list(flat) == ["a/b", "a/c/d", "e"] and flat["a/b"] is x and flat["a/c/d"] is y
    assert unflatten(flat) == tree                          # the same arrays: `is` goes first
    assert tree_map(len, tree) == {"a": {"b": 2, "c": {"d": 3}}, "e": 2}


def test_numpy_is_told_to_use_one_thread_and_glibc_to_keep_memory(monkeypatch):
    """The numbers of malloc.h; without glibc nothing happens."""
    assert {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"} <= set(os.environ)
    calls = []
    monkeypatch.setattr(nets.ctypes, "CDLL", lambda name: SimpleNamespace(
        mallopt=lambda *words: calls.append(words)))
    nets._keep_freed_memory()
    assert calls == [(-3, 2**30), (-1, 2**31 - 1), (-2, 2**26)]
    monkeypatch.setattr(nets.ctypes, "CDLL", lambda name: SimpleNamespace())
    nets._keep_freed_memory()


def test_initialisation():
    p = nets.init_mlp(np.random.default_rng(0), (40, 60, 20), norm=True, ensemble=2,
                      last_scale=0.1)
    for name, shape in (("dense0", (2, 40, 60)), ("dense1", (2, 60, 20))):
        w = p[name]["W"]
        assert w.shape == shape and len(np.unique(w)) > 0.99 * w.size and w.dtype == np.float32
        assert p[name]["b"].shape == (2, shape[2]) and not p[name]["b"].any()
    assert (p["norm0"]["scale"] == 1).all() and set(p) == {"dense0", "norm0", "dense1"}
    assert p["norm0"]["shift"].shape == (2, 60) and not p["norm0"]["shift"].any()
    for draw, sign in ((lambda low, high, size: np.full(size, low), -1),    # the bounds of U(-a, a)
                       (lambda low, high, size: np.full(size, high), 1)):
        p = nets.init_mlp(SimpleNamespace(uniform=draw), (4, 2, 10), last_scale=0.1, dtype=float)
        np.testing.assert_allclose(p["dense0"]["W"], np.full((4, 2), sign))     # sqrt(6 / 6)
        np.testing.assert_allclose(p["dense1"]["W"], np.full((2, 10), sign * 0.1 * 0.5**0.5))
        assert set(p) == {"dense0", "dense1"} and p["dense1"]["b"].shape == (10,)
        p = nets.init_mlp(SimpleNamespace(uniform=draw), (4, 2), dtype=float)
        np.testing.assert_allclose(p["dense0"]["W"], np.full((4, 2), sign))


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


LENGTHS = {                             # of each task's shortest path, in cells
    "fourrooms": [20, 20, 12, 14, 9], "maze": [22, 20, 10, 18, 14], "umaze": [6, 2, 4, 6, 4],
    "medium": [10, 10, 6, 10, 8], "large": [15, 19, 12, 14, 15], "giant": [30, 26, 30, 26, 17]}
CELLS = {                               # the tasks: start row, column; goal row, column
    "fourrooms": [(1, 1, 11, 11), (11, 1, 1, 11), (5, 5, 8, 8), (1, 11, 11, 11), (8, 5, 2, 2)],
    "umaze": [(1, 1, 3, 1), (1, 1, 1, 3), (1, 1, 3, 3), (3, 1, 1, 1), (3, 2, 1, 2)],
    "medium": [(1, 1, 6, 6), (6, 1, 1, 6), (5, 3, 4, 2), (6, 5, 6, 1), (2, 6, 1, 1)],   # OGBench's
    "large": [(1, 1, 7, 10), (5, 4, 7, 1), (7, 4, 1, 10), (3, 8, 5, 4), (1, 1, 5, 4)],
    "giant": [(1, 1, 10, 14), (1, 14, 10, 1), (8, 14, 1, 1), (8, 3, 5, 12), (5, 9, 3, 8)]}


@pytest.mark.parametrize("name", MAZES)
def test_layouts_and_tasks(name):
    """OGBench's maps and tasks; the maze is its medium one with each cell doubled, the four rooms
    are those of Sutton, Precup and Singh (1999), the U-maze that of HIRO's code."""
    env, layout = envs.make(name), name.split("-")[1]
    maps = {size: np.array([list(row) for row in rows.split()]) == "1"
            for size, rows in OGBENCH_MAPS.items()}
    maps["maze"] = np.pad(np.kron(maps["medium"][1:-1, 1:-1], np.ones((2, 2), bool)), 1,
                          constant_values=True)
    maps["umaze"], rooms = np.ones((5, 5), bool), np.zeros((13, 13), bool)
    for i, j in ((1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)):
        maps["umaze"][i, j] = False
    rooms[[0, -1]] = rooms[:, [0, -1]] = rooms[:, 6] = rooms[6, :6] = rooms[7, 6:] = True
    for i, j in ((3, 6), (10, 6), (6, 2), (7, 9)):
        rooms[i, j] = False
    maps["fourrooms"] = rooms
    np.testing.assert_array_equal(env.walls, maps[layout])
    assert (env.distance == env.distance.T).all() and (env.distance >= 0).all()
    lengths = [int(env.distance[env.index[a], env.index[b]]) for a, b in env.tasks]
    assert lengths == LENGTHS[layout]
    tasks, medium = np.reshape(env.tasks, (5, 4)), CELLS["medium"]
    assert ((tasks + 1) // 2 == medium).all() if layout == "maze" else (
        tasks == CELLS[layout]).all()


RECIPE = dict(kind="navigate", episodes=1000, rows=201, noise=0.5)
GRID = dict(action_dim=5, side=1, tolerance=0.5, pair_distance=8, time_limit=None, slip=0,
            recipe={**RECIPE, "noise": 0.3})
POINT = dict(action_dim=2, side=4, tolerance=1, pair_distance=6, time_limit=250, speed=0.8,
             radius=0.7, noise=1, contact="slide", recipe=RECIPE)
GRID_SETTINGS = dict(discount=0.95, subgoal_steps=5, steps=8000, temperature=2.0)
UMAZE = dict(time_limit=500, speed=0.2, radius=1e-6, noise=0.1,
             recipe={**RECIPE, "episodes": 500, "rows": 501})


@pytest.mark.parametrize("name, kind, numbers, settings", [
    ("grid-fourrooms", envs.GridWorld, GRID, GRID_SETTINGS),
    ("grid-maze", envs.GridWorld, GRID, GRID_SETTINGS),
    ("point-umaze", envs.PointMaze, {**POINT, **UMAZE}, dict(discount=0.99, subgoal_steps=25)),
    ("point-medium", envs.PointMaze, POINT, {}), ("point-large", envs.PointMaze, POINT, {}),
    ("point-giant", envs.PointMaze, POINT, dict(discount=0.99))])
def test_what_each_environment_brings_along(name, kind, numbers, settings, monkeypatch):
    """Sizes, tolerance, time limits, the recipe that makes its data, and its settings of hiql."""
    env, limit = envs.make(name), numbers["time_limit"]
    assert type(env) is kind and env.name == name and env.discrete == (kind is envs.GridWorld)
    assert {key: getattr(env, key) for key in numbers} == numbers
    starts, goals = (env.place(x) for x in np.swapaxes(env.tasks, 0, 1))
    limits = env.limits(np.append(starts, starts[:1], 0), np.append(goals, starts[:1], 0))
    assert limits.tolist() == ([limit] * 6 if limit else
                               [4 * x for x in LENGTHS[name.split("-")[1]]] + [4])
    task, near = envs.GoalEnv(env), 0.99 * numbers["tolerance"]
    for axis in np.eye(2):
        for far, reached in ((near, True), (near / 0.98, False)):
            assert env.success(goals, goals + far * axis).tolist() == [reached] * 5
            assert task.reached(task.distance(goals, goals + far * axis)).tolist() == [reached] * 5
        assert task.reached(np.array([numbers["tolerance"]])).all()     # on the edge: reached
        assert env.discrete or env.success(goals, goals + numbers["tolerance"] * axis).all()
    assert list(task.reward(np.array([near, near / 0.98]))) == [0, -1]
    for preset in ("fast", "paper"):
        config, default = (dataclasses.asdict(hiql.resolve({"env": x, "preset": preset}))
                           for x in (name, "point-medium"))
        assert config == {**default, "env": name, **settings}
    monkeypatch.setattr(envs, "collect", lambda *words, **recipe: (words, recipe))
    assert env.dataset("generator") == ((env, "generator"), numbers["recipe"])


def test_the_registered_mazes_of_ogbench():
    """Which class, layout and published recipe; the class itself has its tests in lab/."""
    named = {name: entry for name, entry in envs.ENVIRONMENTS.items() if name not in MAZES}
    expected = {}
    for size in ("medium", "large", "giant", "teleport"):
        long = dict(episodes=500, rows=2001) if size == "giant" else dict(episodes=1000, rows=1001)
        for recipe in (dict(kind="navigate", noise=0.5, **long),
                       dict(kind="stitch", noise=0.5, episodes=5000, rows=201)):
            expected[f"pointmaze-{size}-{recipe['kind']}-v0"] = envs.Entry(
                "lab.ogbench:OGBenchMaze", dict(layout=size), recipe, {})
    assert named == expected and len(MAZES) == 6


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
    assert env.index.tolist() == [[-1] * 5, [-1, 0, 1, 2, -1], [-1, -1, -1, 3, -1],
                                  [-1, 4, 5, 6, -1], [-1] * 5]
    everywhere = np.argwhere(np.ones((5, 5), bool))         # the outer walls too
    assert (env.is_free(env.centre(everywhere)) == (env.index.ravel() >= 0)).all()
    assert not env.is_free(np.array([[-99.0, 0], [0, 99.0]])).any()         # far outside
    with pytest.raises(ValueError, match=r"position \[0. 4.\] is inside a wall of point-umaze"):
        env.number(np.array([[0.0, 0.0], [0.0, 4.0]]))
    assert env.cells[env.corridors].tolist() == [[1, 2], [2, 3], [3, 2]]
    assert envs.make("grid-fourrooms").corridors.sum() == 4                 # its doors
    for layout in ("##### #...# #####", "### #.# #.# #.# ###"):
        assert envs.GridWorld("mine", layout).corridors.tolist() == [False, True, False]
    grid = envs.GridWorld("mine", CORRIDOR)
    assert grid.path_length(grid.place([(1, 2)]), grid.place([(1, 7)])).tolist() == [5]


def test_cells_without_a_path():
    """Their distance is -1, the length of their path infinite, not negative."""
    class Islands(envs.PointMaze):
        connected = False

    env = Islands("mine", "###### #..#.# ######")
    assert env.distance.tolist() == [[0, 1, -1], [1, 0, -1], [-1, -1, 0]]
    assert env.next_cell.tolist() == [[0, 1, 0], [0, 1, 1], [2, 2, 2]]
    a, b = np.meshgrid(np.arange(3), np.arange(3), indexing="ij")
    lengths = env.path_length(*(env.place(env.cells[x.ravel()]) for x in (a, b)))
    inf = np.inf
    assert lengths.tolist() == [0, 4, inf, 4, 0, inf, inf, inf, 0]


def test_random_pairs_are_as_far_apart_as_asked():
    """On a corridor of seven cells: all pairs of at least five steps, and only these."""
    env = envs.GridWorld("mine", CORRIDOR)
    starts, goals = env.random_pairs(np.random.default_rng(0), 6000, 5)
    pairs, counts = np.unique(np.stack([starts[:, 1], goals[:, 1]], 1), axis=0, return_counts=True)
    assert pairs.tolist() == [[1, 6], [1, 7], [2, 7], [6, 1], [7, 1], [7, 2]]
    assert counts.min() > 850 and (starts[:, 0] == 1).all() and (goals[:, 0] == 1).all()
    assert len(env.random_pairs(np.random.default_rng(0), 3, 6)[0]) == 3
    with pytest.raises(ValueError, match="mine has no two cells at least 7 steps apart"):
        env.random_pairs(np.random.default_rng(0), 3, 7)


def test_grid_moves_slips_and_success():
    env = envs.make("grid-fourrooms")
    s = np.array([[1.0, 1.0]] * 5)
    moved = env.move(s, np.arange(5))
    assert moved.tolist() == [[1, 1], [1, 1], [2, 1], [1, 1], [1, 2]]
    assert env.success(moved, s).tolist() == [True, True, False, True, False]
    moved = env.move(np.full((5, 2), 3.0), np.arange(5))
    assert moved.tolist() == [[3, 3], [2, 3], [4, 3], [3, 2], [3, 4]]
    slippery = envs.make("grid-fourrooms", slip=0.5)
    drawn = SimpleNamespace(random=lambda n: np.array([0.49, 0.5, 0.1, 0.0, 0.9]),
                            integers=lambda top, size: np.arange(5) % top)
    moved = slippery.move(np.full((5, 2), 3.0), np.full(5, 4), drawn)       # slips: 1, 3 and 4
    assert moved.tolist() == [[3, 3], [3, 4], [4, 3], [3, 2], [3, 4]]
    centre = np.full((20000, 2), 3.0)
    moved = slippery.move(centre, np.full(20000, 4), np.random.default_rng(0))
    assert (moved == [3, 4]).all(1).mean() == pytest.approx(0.5 + 0.5 / 5, abs=0.015)
    for wrong in (np.full(5, 5), np.full(5, -1), np.zeros(5), np.zeros(4, int)):
        with pytest.raises(ValueError, match="integer from 0 to 4"):
            env.move(s, wrong)
    assert envs.make("grid-maze", slip=1.0).slip == 1 and envs.make("grid-maze", slip=0.0).slip == 0


def test_following_shortest_paths_by_hand():
    """Grids: a uniform action with the probability `noise`. Points: a unit vector and normal
    noise, clipped."""
    env = envs.make("grid-fourrooms")
    s = np.array([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0], [2.0, 2.0]])
    goal = env.index[[11, 3, 5, 2], [11, 8, 5, 1]]
    drawn = SimpleNamespace(random=lambda n: np.array([0.31, 0.29, 0.3, 0.9]),
                            integers=lambda top, size: np.full(size, 1) % top)
    assert env.follow(s, goal, 0.3, drawn).tolist() == [2, 1, 0, 3]     # down, drawn, stay, left
    env = envs.make("point-umaze")
    s = np.array([[0.0, 0.0], [6.2, 5.6], [8.0, 4.0], [0.0, 8.0]])
    goal = env.index[[3, 3, 1, 3], [1, 2, 3, 1]]        # to the right, (3, 4) / 5, down, stay
    drawn = SimpleNamespace(normal=lambda size: np.array([[1, 3], [0, -1], [-4, 0], [-1, 0.5]]))
    np.testing.assert_allclose(env.follow(s, goal, 0.2, drawn), [
        [1, 0.6], [0.6, 0.6], [-0.8, -1], [-0.2, 0.1]])


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
    for wrong in ([[0.0, np.nan]], [[0.0]], [[0.0, 0.0]] * 2):
        with pytest.raises(ValueError, match="two finite numbers for each agent"):
            env.move(at, np.array(wrong))


@pytest.mark.parametrize("radius, parts, margin", [(0.7, 2, 0.7), (0.3, 4, 0.3),
                                                   (0.0, 15, 0.8 / 15), (1.9, 1, 1.9)])
def test_a_move_is_made_in_parts_and_looks_for_walls_near_edges(radius, parts, margin):
    """Parts no longer than the radius, or 0.08; only who can touch an edge looks for contacts."""
    env = envs.PointMaze("mine", CORRIDOR, radius=radius)
    calls = recorded(env, "_push_out")["_push_out"]
    inside = 2 - margin
    off = np.array([[0, 0], [inside - 1e-5, 0], [inside, 0], [0, -inside], [0, 1e-5 - inside]])
    env.move(env.centre([(1, 4)]) + off, np.zeros((5, 2)))
    assert [live.tolist() for (_, live), _ in calls] == [[2, 3]] * parts


def test_contacts_by_hand():
    """Depth and way out of a disc at a wall, at a corner, across an edge, inside a wall."""
    env = envs.PointMaze("mine", "##### #...# #.#.# #...# #####", radius=1.0)   # a block at (4, 4)
    s = np.array([[4.0, 0.8], [1.7, 1.6], [4.0, 1.2], [4.0, 2.5], [5.8, 3.0], [-1.5, -1.75],
                  [8, 8]])
    depth, normal = env._deepest_contact(s)
    np.testing.assert_allclose(depth, [-0.2, 0.5, 0.2, 1.5, 1.2, 0.75, -1], atol=1e-6)
    np.testing.assert_allclose(normal[1:6], [[-0.6, -0.8], [0, -1], [0, -1], [1, 0], [0, 1]],
                               atol=1e-6)
    pushed = s.copy()
    env._push_out(pushed, np.array([1, 3, 5]))              # these alone; a corner in two pushes
    np.testing.assert_allclose(pushed, [s[0], [1.4, 1.2], s[2], [4, 1], s[4], [-1, -1], s[6]],
                               atol=1e-6)
    env._deepest_contact = lambda s: (np.ones(len(s)), np.ones((len(s), 2)))
    env._push_out(pushed, np.array([0]))                    # no way out: not more than four pushes
    assert (pushed[0] == s[0] + 4).all()


def test_the_registry_makes_what_it_names():
    assert envs.load("math:pi") == math.pi and envs.load(envs.Maze) is envs.Maze
    assert envs.make("point-umaze", limit=7).limits(np.zeros((2, 2)), None).tolist() == [7, 7]
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
    assert env.recipe == {**GRID["recipe"], "episodes": 20, "rows": 11}
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
    tasks = envs.GridWorld("mine", "####### ###.### #.....# #######").tasks     # first cell: inside
    assert tasks == [((2, 1), (2, 5)), ((2, 5), (2, 1)), ((1, 3), (2, 1)), ((2, 2), (2, 5)),
                     ((2, 3), (2, 1))]
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
    for _ in range(2):                                                  # the time begins again
        short.reset(options={"task": 1})
        assert [short.step(stay)[3] for _ in range(2)] == [False, True]
    obs, _ = short.reset(options={"start": start, "goal": start})
    assert [short.step(stay)[1:4] for _ in range(2)] == [(0, True, False)] * 2  # not truncated too
    assert (obs["observation"] == start).all() and (obs["desired_goal"] == start).all()
    for wrong, message in (({"task": 9}, "task must be 1 to 5, not 9"), ({"task": 0}, "1 to 5"),
                           ({"task": 6}, "1 to 5"),
                           ({"start": np.zeros(2) - 9}, "inside a wall"),
                           ({"start": start, "goal": np.zeros(2) - 9}, "inside a wall"),
                           ({"begin": 1}, "unknown reset options .'begin'.")):
        with pytest.raises(ValueError, match=message):
            env.reset(options=wrong)
    assert env.action_size == (0 if maze.discrete else 2)
    if maze.discrete:
        assert vars(env.action_space) == {"n": 5, "shape": ()}
    else:
        assert env.action_space.shape == (2,) and env.action_space.low.tolist() == [-1, -1]
        assert env.action_space.high.tolist() == [1, 1]


def test_an_own_maze_has_tests_for_online_learning():
    env = envs.GoalEnv(envs.PointMaze("mine", CORRIDOR))
    tests = env.tests(np.random.default_rng(0), 6)
    assert list(tests) == ["task1", "task2", "task3", "task4", "task5", "random"]
    for (starts, goals), task in zip(tests.values(), env.maze.tasks):
        for places, cell in zip((starts, goals), task):
            assert (env.maze.cell(places) == cell).all() and len(np.unique(places, axis=0)) == 6
    for starts, goals in (env.draw(np.random.default_rng(0), 4000),
                          env.tests(np.random.default_rng(0), 4000)["random"]):
        pairs = env.maze.number(starts), env.maze.number(goals)
        counts = np.bincount(7 * pairs[0] + pairs[1], minlength=49).reshape(7, 7)
        assert not counts.diagonal().any() and counts[~np.eye(7, dtype=bool)].min() > 50
        for places, number in zip((starts, goals), pairs):      # U(-1, 1) around the cells' centres
            off = np.abs(places - env.maze.centre(env.maze.cells[number]))
            assert 0.99 < off.max() <= 1 and off.mean() == pytest.approx(0.5, abs=0.02)


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
    for s, g in [task.draw(rng, 500), *task.tests(rng, 500).values()]:
        assert 0.098 < np.abs(s).max() <= 0.1 and g.min() >= -2 and g.max() <= 10
        np.testing.assert_allclose(s.mean(0), 0, atol=0.02)
    s, g = task.draw(rng, 4000)                             # U(-2, 10): also in walls
    assert (g.min(0) < -1.95).all() and (g.max(0) > 9.95).all()
    np.testing.assert_allclose(g.mean(0), 4, atol=0.25)
    np.testing.assert_allclose(s.mean(0), 0, atol=0.01)
    _, g = task.tests(rng, 4000)["random"]                  # uniform in the seven free cells
    assert np.bincount(task.maze.number(g)).min() > 400
    off = g - task.maze.centre(task.maze.cell(g))
    assert (off.min(0) < -1.95).all() and (off.max(0) > 1.95).all()
    np.testing.assert_allclose(off.mean(0), 0, atol=0.1)
    obs, _ = task.reset(options={"start": [0.0, 0.0], "goal": [0.0, 4.0]})  # a goal in a wall
    assert not task.maze.is_free(obs["desired_goal"][None])[0]
    obs, *_, info = task.step(np.array([0.0, 9.0]))
    assert obs["observation"].tolist() == [0, 0.2] and not info["success"]
    task.reset(options={"start": [0.0, 0.0], "goal": [0.0, 1.0]})
    for _ in range(2):                                      # it goes on at the goal
        assert task.step(np.zeros(2))[1:] == (-1, False, False, {"success": True})


def test_tasks_by_hand():
    task = envs.UMazeTask()
    tests = task.tests(np.random.default_rng(0), 4)
    assert list(tests) == ["0_8", "8_0", "8_8", "random"]
    for name, goal in (("0_8", [0, 8]), ("8_0", [8, 0]), ("8_8", [8, 8])):
        assert tests[name][1].tolist() == [goal] * 4
    assert task.distance(np.zeros((1, 2)), np.array([[3.0, 4.0]])).tolist() == [5]
    assert task.reward(np.array([0.0, 2.0, 6.0])).tolist() == [0, -2, -6]
    assert task.maze.contact == "slide" and envs.make_task("point-umaze").maze.contact == "slide"
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


def recorded(env, *names):
    """{name: [(arguments, result)]} of every call of these methods of env from now on."""
    calls = {name: [] for name in names}
    for name in names:
        def call(*words, plain=getattr(env, name), noted=calls[name]):
            words = tuple(np.array(x) if isinstance(x, np.ndarray) else x for x in words)
            noted.append((words, plain(*words)))
            return noted[-1][1]
        setattr(env, name, call)
    return calls


@pytest.mark.parametrize("maze, kind, goals", [
    (envs.PointMaze, "navigate", [{0, 6}] * 7),             # no goal in a straight corridor
    (envs.PointMaze, "stitch", [{4}, {5}, {6}, {0, 6}, {0}, {1}, {2}]),     # 4 away, or farthest
    (envs.GridWorld, "navigate", [set(range(7))] * 7)])
def test_every_step_of_collected_data(maze, kind, goals):
    """Where agents start, act, move, arrive and go next, by all calls that `collect` makes; on a
    corridor of seven cells. Every agent jumps at every step, to the place of another."""
    env, rng, done, n, rows = maze("mine", CORRIDOR), np.random.default_rng(0), [], 1400, 40

    def jump(s, generator):
        assert generator is rng
        return s[::-1].copy()

    env.jump = jump
    calls = recorded(env, "follow", "move", "success")
    data = envs.collect(env, rng, kind, episodes=n, rows=rows, noise=0.2, progress=done.append)
    assert done == list(range(1, rows + 1)) and data.lengths.tolist() == [rows] * n
    obs, actions = data.observations.reshape(n, rows, 2), data.actions.reshape(n, rows, -1)
    start = env.number(obs[:, 0])
    assert np.bincount(start).min() > 120                   # of 200 on average
    position, drawn, changed = obs[:, 0], [], []
    for t in range(rows):
        (at, goal_cell, noise, generator), asked = calls["follow"][t]
        (s, action, slips), moved = calls["move"][t]
        (s1, goal), arrived = calls["success"][t]
        assert noise == 0.2 and generator is rng and slips is (rng if env.discrete else None)
        assert (obs[:, t] == position.astype(np.float32)).all()
        np.testing.assert_allclose(at, position[::-1] if t else position, atol=1e-6)
        assert (s == at).all() and (action.reshape(n, -1) == actions[:, t]).all()
        assert (action == asked.astype(actions.dtype)).all() and (s1 == moved).all()
        assert (env.number(goal) == goal_cell).all()
        if not t:
            assert all(b in goals[a] for a, b in zip(start, goal_cell))
            assert len(set(zip(start, goal_cell))) == sum(map(len, goals))  # every goal occurs
            drawn += goal_cell.tolist()
        else:
            same = ~before[0] if kind == "navigate" else np.ones(n, bool)
            assert (goal[same] == before[2][same]).all()
            assert (goal_cell[same] == before[1][same]).all()
            drawn += goal_cell[~same].tolist()
            changed += (goal_cell != before[1])[~same].tolist()
        before, position = (arrived, goal_cell, goal), moved
    if kind == "navigate":                                  # uniform, also after arrivals
        share = np.bincount(drawn, minlength=7)[sorted(goals[0])] / len(drawn)
        assert len(drawn) > n + 1000
        np.testing.assert_allclose(share, 1 / len(goals[0]), atol=0.03)
        assert np.mean(changed) == pytest.approx(1 - 1 / len(goals[0]), abs=0.05)
    first = calls["success"][0][0][1]                       # goals lie around their cells' centres
    off = np.abs(first - env.place(env.cells[env.number(first)]))
    assert off.max() == 0 if env.discrete else 0.98 < off.max() <= 1


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
    assert envs.collect(env, rng, episodes=1, rows=2, noise=0).lengths.tolist() == [2]
    defaults = {name: x.default for name, x in inspect.signature(envs.collect).parameters.items()}
    assert {name: defaults[name] for name in RECIPE} == RECIPE
    for wrong in (dict(episodes=0), dict(rows=1), dict(noise=-1)):
        with pytest.raises(ValueError, match="collect needs"):
            envs.collect(env, rng, **wrong)


def test_data_sets_are_saved_loaded_and_checked(tmp_path, monkeypatch):
    data = chain((1, 2), (4, 5, 6))                         # two rows are a trajectory
    assert data.lengths.tolist() == [2, 3] and data.last.tolist() == [1, 1, 4, 4, 4]
    assert data.valid.tolist() == data.labelled.tolist() == [0, 2, 3]
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
            ({"terminals": 2 * data.terminals.astype(int)}, "must be 0 or 1"),
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


def test_presets(registry):
    """The published numbers are those of the fact sheets; a flag goes before --quick, that before
    the changes of an agent, these before the preset, that before the environment."""
    envs.register("mine", layout=CORRIDOR, settings=dict(lr=1.0, encoding="rbf", policy_steps=9))
    default = dict(
        env="point-medium", preset="fast", dataset="", seed=0, steps=5000, policy_steps=0,
        batch_size=256, hidden_dims=(128, 128, 128), lr=2e-3, lr_decay=True, discount=0.98,
        expectile=0.7, tau=0.1, subgoal_steps=8, high_alpha=10, low_alpha=10, flat_alpha=10,
        rep_dim=10, rep_type="phi_sg", const_std=True, encoding="position", temperature=0,
        subgoal_interval=1, action_free=0, value_p_curgoal=0.2, value_p_trajgoal=0.5,
        goal_discount=0, actor_p_randomgoal=0, first_layer_init="data", goal_reached_by="index",
        goal_indices=(), train_flat=True, eval_episodes=20, eval_interval=1000)
    paper = dict(lr=3e-4, lr_decay=False, tau=0.005, high_alpha=3, low_alpha=3,
                 first_layer_init="glorot")
    grid = dict(discount=0.95, subgoal_steps=5, steps=8000, temperature=2)
    quick = dict(steps=300, batch_size=128, hidden_dims=(64, 64), eval_interval=150,
                 eval_episodes=4)
    mine = dict(lr=1.0, encoding="rbf", policy_steps=9)
    for given, agent, expected in (
            ({}, {}, {}), ({"preset": "paper"}, {}, paper), ({"env": "grid-maze"}, {}, grid),
            ({"env": "point-umaze"}, {}, dict(discount=0.99, subgoal_steps=25)),
            ({"env": "grid-maze", "preset": "paper"}, {"tau": 0.5},
             {**grid, **paper, "tau": 0.5}),
            ({"env": "grid-maze", "quick": True}, {"steps": 1}, {**grid, **quick}),
            ({"quick": True, "steps": 7, "tau": 0.2}, {"tau": 0.3}, {**quick, "steps": 7}),
            ({"env": "mine"}, {}, mine),
            ({"env": "mine", "preset": "paper"}, {}, {**mine, **paper}),
            ({"env": "mine", "quick": True}, {}, {**mine, **quick, "policy_steps": 300}),
            ({"env": "mine", "quick": True}, {"policy_steps": 0},
             {**mine, **quick, "policy_steps": 0}),
            ({"env": "mine", "rep_type": "none"}, {}, {**mine, "encoding": "position"}),
            ({"env": "mine"}, {"rep_type": "none"},
             {**mine, "encoding": "position", "rep_type": "none"}),
            ({"value_p_curgoal": 0.3, "value_p_trajgoal": 0.7}, {}, {}),
            ({"rep_dim": 5, "flat_alpha": 1.0}, {}, {}),
            ({"train_flat": False, "flat_alpha": 1.0}, {"steps": 3}, {"steps": 3})):
        before = dict(given)
        flags = {name: x for name, x in given.items() if name != "quick"}
        config = hiql.resolve(given, changes=agent)
        assert dataclasses.asdict(config) == {**default, **expected, **flags} and given == before
    for wrong, words in (({"encoding": "rbf", "env": "grid-maze"}, "is for point mazes"),
                         ({"encoding": "rbf", "rep_type": "none"}, "subgoals by phi"),
                         ({"encoding": "bumps"}, "unknown encoding"), ({"tau": 2.0}, "tau"),
                         ({"rep_type": "none", "rep_dim": 5}, "has no effect with --rep-type none"),
                         ({"train_flat": False, "flat_alpha": 1.0}, "with --no-train-flat"),
                         ({"temperature": 1.0}, "--temperature is for"),
                         ({"value_p_curgoal": 0.51}, "must not exceed 1 together"),
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


def test_every_policy_sees_rows_of_its_own():
    """A state is its row's number, as its action is; the actions of rows 0 to 4 are hidden. Value
    and high level draw any row, the others shown ones; goals are of that row's future."""
    data, k = chain(range(5), range(5, 12)), 3
    data.actions, data.labelled = np.arange(12), np.arange(5, 11)
    config = hiql.resolve({"env": "grid-fourrooms", "subgoal_steps": k, "batch_size": 4000})
    random = dataclasses.replace(config, actor_p_randomgoal=0.4)
    for config in (config, random):
        batch = hiql.sample(data, np.random.default_rng(0), config)
        assert batch["masks"].shape == batch["rewards"].shape == (4000,)
        i, s1, g, high_g, high_w, j, low_s1, low_w, flat_g = (batch[x][:, 1].astype(int) for x in (
            "observations", "next_observations", "value_goals", "high_actor_goals",
            "high_actor_targets", "low_actor_observations", "low_actor_next_observations",
            "low_actor_goals", "flat_actor_goals"))
        last = np.where(np.arange(12) < 5, 3, 10)               # last transition of each row's
        rows = {0, 1, 2, 3, 5, 6, 7, 8, 9, 10}
        assert set(i) == set(g) == rows and set(j) == {5, 6, 7, 8, 9, 10}
        assert (s1 == i + 1).all() and (low_s1 == j + 1).all() and (batch["actions"] == j).all()
        assert (batch["masks"] == (g != i)).all() and (batch["rewards"] == -batch["masks"]).all()
        assert (low_w == np.minimum(j + k, last[j])).all()
        for row, goal in ((i, high_g), (j, flat_g)):
            future = (np.minimum(row + 1, last[row]) <= goal) & (goal <= last[row])
            if config is random:        # three quarters of the random ones are not of the future
                assert set(goal[~future]) | {10} == rows
                assert (~future).mean() == pytest.approx(0.3, abs=0.03)
            else:
                assert future.all()
        future = (np.minimum(i + 1, last[i]) <= high_g) & (high_g <= last[i])
        cut = high_w == np.minimum(i + k, high_g)
        assert (cut if config is not random else cut | (high_w == np.minimum(i + k, last[i]))).all()
        assert (high_w == np.minimum(i + k, last[i]))[~future].all()


@pytest.mark.parametrize("reached_by, hit", [("index", 0.25), ("state", 0.375)])
def test_a_goal_counts_as_reached_in_its_row_or_state(reached_by, hit):
    """Rows 0 to 3 at columns 1, 1, 2, 3: four goals of sixteen are the row, six the same state."""
    config = hiql.resolve({"env": "grid-fourrooms", "batch_size": 20_000, "value_p_curgoal": 0.0,
                           "value_p_trajgoal": 0.0, "goal_reached_by": reached_by})
    batch = hiql.sample(chain((1, 1, 2, 3, 3)), np.random.default_rng(0), config)
    assert (batch["masks"] == 0).mean() == pytest.approx(hit, abs=0.02)


@pytest.mark.parametrize("discounts", [{"discount": 0.9, "goal_discount": 0.6},
                                       {"discount": 0.6, "goal_discount": 0.0}])
def test_value_goals_have_the_published_shares(discounts):
    """From row 0 of 0...4: itself 0.2 + random 0.3 / 4; future rows by min(Geometric, 3)."""
    data, rng = chain((1, 2, 3, 4, 5)), np.random.default_rng(0)
    config = hiql.resolve({"env": "grid-fourrooms", "subgoal_steps": 2, "batch_size": 200_000,
                           **discounts})
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
                              "hidden_dims": (6, 5), "batch_size": 7, **changes})
    config.rep_dim = 3                                  # as a flag it is refused without phi
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
    config, params, batch = toy(discount=0.5, goal_discount=0.7, expectile=0.9)
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
    target[:] = -3                      # q = -2.5, A = -2.5 - (-3) > 0; with 0.7 it were -0.1
    assert hiql.value_loss(params, one, config)[0] == pytest.approx(0.9 * (1.5**2 + 0.5**2))
    one["rewards"], one["masks"] = np.array([0.0]), np.array([0.0])     # success: q = 0, A = 3
    assert hiql.value_loss(params, one, config)[0] == pytest.approx(0.9 * (1 + 4))
    target[:] = 1, -5                   # A = 2 by the mask; without it -2.5 - (-2) were negative
    assert hiql.value_loss(params, one, config)[0] == pytest.approx(0.9 * (1 + 4))
    target[:] = 0                                       # A = 0 exactly counts as positive
    assert hiql.value_loss(params, one, config)[0] == pytest.approx(0.9 * (1 + 4))


def distinct(batch):
    """The batch, with different numbers under all names: no loss can take one for another."""
    return {name: x + 0.1 * i for i, (name, x) in enumerate(batch.items())}


def test_value_loss_of_a_batch():
    """The value loss takes states, goals and phi of the batch as Eq. (4) says."""
    config, params, batch = toy(discount=0.8, goal_discount=0.5, expectile=0.6)
    batch = distinct(batch)
    s, s1, g, r, m = (batch[k] for k in ("observations", "next_observations", "value_goals",
                                         "rewards", "masks"))

    def heads(p, x):
        z = mlp(params["phi"], np.concatenate([x, g], 1))[0]
        z *= np.sqrt(3) / np.linalg.norm(z, axis=1, keepdims=True)
        return mlp(p, np.concatenate([x, z], 1))[0][..., 0]

    v, t, t1 = (heads(*x) for x in ((params["value"], s), (params["target"]["value"], s),
                                    (params["target"]["value"], s1)))
    positive = r + 0.8 * m * np.minimum(*t1) >= (t[0] + t[1]) / 2
    assert 0 < positive.sum() < 7
    error = sum((r + 0.8 * m * t1[j] - v[j]) ** 2 for j in (0, 1))
    assert hiql.value_loss(params, batch, config)[0] == pytest.approx(
        np.mean(np.where(positive, 0.6, 0.4) * error), rel=1e-12)


def test_policy_losses_by_hand():
    """Weights exp(alpha A) clipped at 100, A from the right states and the learned heads."""
    np.testing.assert_allclose(hiql.awr_weight(3.0, np.array([0.0, 1.0, 1.6, 1e4, -1e4])),
                               [1, np.exp(3), 100, 100, 0])
    config, params, batch = toy(high_alpha=0.7, low_alpha=1.3, flat_alpha=0.4)
    batch = distinct(batch)

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
    joint = dataclasses.replace(config, policy_steps=0)
    assert [hiql.schedule(losses, joint, u) for u in range(4)] == [
        (losses, 1e-2 * x) for x in (1, 1, 1, 0.5)]
    steady = dataclasses.replace(config, lr_decay=False)
    assert {hiql.schedule(losses, steady, u)[1] for u in range(10)} == {1e-2}


# --------------------------------------------------------------------------- hiql: networks


def test_first_layers_bend_at_states_of_the_data():
    """[D14]: 8 / side times Glorot's weights, and each unit is 0 at a state of the data."""
    config, env = hiql.resolve({"hidden_dims": (40, 5)}), envs.make("point-medium")
    data = envs.collect(env, np.random.default_rng(0), episodes=3, rows=30)

    def init(config):
        return hiql.init_params(config, env, data, generators(0, "init", "flat"))

    p, states = init(config), data.observations[data.valid].astype(float)
    bends = []
    for w, b in (*zip(p["value"]["dense0"]["W"], p["value"]["dense0"]["b"]),
                 (p["low"]["dense0"]["W"], p["low"]["dense0"]["b"])):     # of s and z, z0 = 0
        off = np.abs(states @ w[:2] + b)
        assert (off.min(0) < 1e-5).all() and (b != 0).all()
        bends.append(off.argmin(0))
    assert (bends[0] != bends[1]).mean() > 0.5              # each head at states of its own
    assert {name for name, net in p.items() if "norm0" in net} == {"phi", "value"}      # [D7]
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
    env, times, rngs = envs.GridWorld("mine", CORRIDOR), [], []
    plain, env.move = env.move, lambda s, a, rng: (rngs.append(rng), plain(s, a))[1]
    starts, goals = (np.array([[1.0, x] for x in columns]) for columns in ((2, 5, 5, 3),
                                                                           (4, 6, 6, 2)))

    def act(s, g, t):
        times.append(t)
        return np.where(t < np.array([5, 0, 5, 1]), 0, 4)

    success, steps, paths = offline.rollout(env, act, starts, goals, "noise")
    assert success.tolist() == [True, True, False, False] and steps.tolist() == [7, 1, 4, 4]
    assert paths[..., 1].T.tolist() == [[2, 2, 2, 2, 2, 2, 3, 4], [5, 6, 6, 6, 6, 6, 6, 6],
                                        [5] * 8, [3, 3, 4, 5, 6, 6, 6, 6]]
    assert times == [0, 1, 2, 3, 4, 5, 6] and rngs == ["noise"] * 7


def test_evaluation_by_hand():
    """An actor that solves tasks 1 and 4 alone; starts and goals are those of seed and update,
    from a generator that actor and maze draw on too."""
    config = hiql.resolve({"env": "grid-fourrooms", "eval_episodes": 3, "seed": 8})
    problem = SimpleNamespace(env=envs.make(config.env), config=config)
    env, seen, solved = problem.env, [], []

    def actor(params, config, rng):
        assert rng.bit_generator._seed_seq.entropy == [config.seed, at] and params == {}

        def act(s, g, t):
            if not t:
                seen.append((s, g))
            good = (g == env.place(env.tasks)[[0, 3], 1][:, None]).all(-1).any(0)
            good &= (seen[-1][0] == env.place(env.tasks)[[0, 3], 0][:, None]).all(-1).any(0)
            solved.append(good)
            return np.where(good, env.follow(s, env.number(g), 0.0, np.random.default_rng(0)), 0)
        return act

    at = 7
    summary, (paths, goals, success) = offline.evaluate_actor(problem, {}, actor, at)
    assert summary["success"] == pytest.approx(0.4) and summary["success_worst_task"] == 0
    assert summary["success_per_task"] == [1, 0, 0, 1, 0]
    assert summary["success_random"] == solved[0][15:].mean() < 0.1
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
    problem.config, at = dataclasses.replace(config, seed=9), 7
    offline.evaluate_actor(problem, {}, actor, at)
    assert (seen[1][0] == starts).all()
    assert not (seen[2][0] == starts).all() and not (seen[3][0] == starts).all()


def test_evaluation_draws_places_in_the_cells_of_the_tasks():
    """Four episodes of each task of the U-maze, each at places of its own; the limit is 2 steps."""
    config, env = hiql.resolve({"env": "point-umaze", "eval_episodes": 4}), envs.make(
        "point-umaze", limit=2)
    problem = SimpleNamespace(env=env, config=config)
    summary, (paths, goals, success) = offline.evaluate_actor(
        problem, {}, lambda *_: lambda s, g, t: 0 * s, 0)
    assert len(paths) == 3 and summary["success"] == 0 and summary["mean_steps"] == 2
    for places, i in ((paths[0], 0), (goals, 1)):
        off = places - env.centre(np.array(env.tasks)[:, i])[:, None]
        assert off.shape == (5, 4, 2) and np.abs(off).max() < 0.1 and len(np.unique(off)) == 40


# three cells in a row: tasks 1, 2, 4 and 5 lie to the right, task 3 to the left
LEFT, RIGHT = 3, 4
ROW = dict(kind=envs.GridWorld, layout="##### #...# #####", recipe=dict(episodes=5, rows=20),
           settings=dict(temperature=0.0), tasks=[((1, a), (1, b)) for a, b in (
               (1, 3), (1, 3), (3, 1), (1, 2), (2, 3))])
GOES_LEFT = dict(success=0.2, success_per_task=[0, 0, 1, 0, 0], success_worst_task=0,
                 mean_steps=(8 + 8 + 2 + 4 + 4) / 5)
GOES_RIGHT = dict(success=0.8, success_per_task=[1, 1, 0, 1, 1], success_worst_task=0,
                  mean_steps=(2 + 2 + 8 + 1 + 1) / 5)


@pytest.fixture
def scripted(registry, monkeypatch):
    """A run in the row of three cells: after update u the low-level policy always takes the action
    script(u), and the flat policy the other one. -> prepare(script, **flags); what was drawn."""
    envs.register("row", **ROW)
    drawn = []
    monkeypatch.setattr(hiql, "draw", lambda problem, agent, run, shown: drawn.append(shown))

    def prepare(script, **flags):
        config = hiql.resolve({"env": "row", "seed": 8, "batch_size": 16, "hidden_dims": (6, 5),
                               "eval_episodes": 2, **flags})

        def learn(problem, agent, rng):
            while agent["update"] < config.steps + config.policy_steps:
                agent["update"] += 1
                low = script(int(agent["update"]))
                for name, action in (("low", low), ("flat", LEFT + RIGHT - low)):
                    p = agent["params"][name]
                    p["dense2"]["W"][:], p["dense2"]["b"][:] = 0, np.arange(5) == action
                yield {"value_loss": 1.0}, True

        monkeypatch.setattr(hiql, "learn", learn)
        return hiql.prepare(config)

    return prepare, drawn


def test_the_summary_is_of_the_final_policies(tmp_path, scripted, capsys):
    """The agent is right up to update 6 and wrong at the end, after update 7: logged and reported
    is the end, never the best checkpoint, and the flat policy's success under its own name."""
    prepare, drawn = scripted
    problem = prepare(lambda u: RIGHT if u < 7 else LEFT, steps=7, eval_interval=3)
    run = Run(str(tmp_path), problem.config)
    result = offline.train(problem, run)
    summary, s = result.summary, np.array([[1.0, 2.0]])
    assert capsys.readouterr().out.startswith("row, seed 8: hiql and, to compare, a flat policy on "
                                              "the same value; 7 updates of 16 of 95 transitions, ")
    names = ("update", "success", "flat_success")
    assert [[float(row[x]) for x in names] for row in run.logs["eval"]] == [
        [3, 0.8, 0.2], [6, 0.8, 0.2], [7, 0.2, 0.8]]
    assert [int(row["update"]) for row in run.logs["train"]] == [3, 6]
    expected = dict(env="row", agent="hiql", seed=8, updates=7, episodes=10, flat_success=0.8,
                    flat_success_per_task=GOES_RIGHT["success_per_task"], **GOES_LEFT)
    rest = {name: x for name, x in summary.items() if name not in expected}
    assert {name: summary[name] for name in expected} == expected
    assert set(rest) == {"success_random", "flat_success_random", "train_seconds", "data"}
    assert int(rest["data"], 16) == result.agent["data"]
    assert rest["success_random"] + rest["flat_success_random"] == 1    # left and right, 2 apart
    assert 0.3 < rest["success_random"] < 0.7 and rest["train_seconds"] < 60
    assert list(drawn[0]) == ["hiql", "flat, same value"] and len(drawn) == 1
    assert (drawn[0]["hiql"][2] == np.array(GOES_LEFT["success_per_task"])[:, None]).all()
    # the checkpoint: evaluated, loaded, and resumed after its last update
    problem, agent = load_run(hiql, tmp_path)
    again = hiql.evaluate_checkpoint(problem, {**agent, "seconds": np.array(12.34)})
    assert again == {**summary, "train_seconds": 12.3}
    assert hiql.load(tmp_path)(s, s, 0) == result.act(s, s, 0) == LEFT
    capsys.readouterr()
    resumed = offline.train(problem, Run(str(tmp_path), problem.config, agent))
    assert {**resumed.summary, "train_seconds": 0} == {**summary, "train_seconds": 0}
    assert "transitions" not in capsys.readouterr().out
    offline.train(prepare(lambda u: RIGHT, steps=1))                       # without a folder
    assert len(drawn) == 2


def test_evaluations_begin_with_the_policies(scripted):
    """Value for 110 updates, policies for 100: nothing to evaluate after 110, the whole after 210;
    a row of the log every 100."""
    prepare, _ = scripted
    problem = prepare(lambda u: RIGHT, steps=110, policy_steps=100, eval_interval=110)
    run = Run(None, problem.config)
    result = offline.train(problem, run)
    assert [int(row["update"]) for row in run.logs["eval"]] == [210] == [result.summary["updates"]]
    assert [int(row["update"]) for row in run.logs["train"]] == [100, 200]
    for update, reached in ((0, False), (110, False), (111, True)):
        agent = {**result.agent, "update": np.array(update), "seconds": 1.0}
        assert offline.no_policy_yet(problem, agent) is not reached
        if reached:
            assert hiql.evaluate_checkpoint(problem, agent)["success"] == 0.8
        else:
            with pytest.raises(ValueError, match=f"stopped after {update} updates, before its"):
                hiql.evaluate_checkpoint(problem, agent)
    clone = SimpleNamespace(config=problem.config, losses={"low": hiql.low_loss})
    assert offline.no_policy_yet(clone, {"update": 0}) is False


def test_each_actor_is_evaluated_at_the_agents_update(monkeypatch):
    """The first actor's summary whole, of any other three numbers, as flat_..."""
    problem, calls = SimpleNamespace(actors={"a": "first", "b": "other"}), []

    def evaluate_actor(*arguments):
        calls.append(arguments)
        keys = ("success", "success_random", "success_per_task", "mean_steps")
        return {x: (arguments[2], x) for x in keys}, "episodes of " + arguments[2]

    monkeypatch.setattr(offline, "evaluate_actor", evaluate_actor)
    summary, shown = offline.evaluate_maze(problem, {"params": "params", "update": np.array(6)})
    assert calls == [(problem, "params", actor, 6) for actor in ("first", "other")]
    assert shown == {"a": "episodes of first", "b": "episodes of other"}
    assert summary == {
        **{x: ("first", x) for x in ("success", "success_random", "success_per_task",
                                     "mean_steps")},
        **{f"flat_{x}": ("other", x) for x in ("success", "success_random", "success_per_task")}}


def test_training_takes_as_long_as_its_losses(scripted, monkeypatch):
    """Ten updates, by the second evaluation of each loss, and a fifth more; estimate and
    evaluation change neither the agent nor the generators of training."""
    prepare, _ = scripted
    problem, clock, calls = prepare(lambda u: LEFT, steps=10), [0.0], []
    agent = offline.init_agent(problem, problem.rngs)

    def taking(name, seconds):
        def loss(params, batch, config):
            assert params is agent["params"] and batch["actions"].shape == (16,)
            calls.append(name)
            clock[0] += seconds if calls.count(name) % 2 == 0 else 99
        return loss

    monkeypatch.setattr(offline.time, "perf_counter", lambda: clock[0])
    problem.losses = {name: taking(name, seconds) for name, seconds in (
        ("value", 1), ("high", 2), ("low", 4), ("flat", 8))}

    def state():
        return {name: x.tobytes() for name, x in flatten(agent).items()}, {
            name: str(rng.bit_generator.state) for name, rng in problem.rngs.items()}

    before = state()
    assert offline.estimate(problem, agent) == pytest.approx(10 * 15 * 1.2)
    problem.config = dataclasses.replace(problem.config, policy_steps=3)
    assert offline.estimate(problem, agent) == pytest.approx((10 * 1 + 3 * 14) * 1.2)
    problem.config = dataclasses.replace(problem.config, policy_steps=0)
    del problem.losses["value"]
    assert offline.estimate(problem, agent) == pytest.approx(10 * 14 * 1.2)
    problem.evaluate(problem, agent)
    assert state() == before


def test_drawn_actions_of_the_agent_are_those_of_seed_0(scripted):
    """At a temperature: the agent's actor is the first, with a generator of its own."""
    problem = scripted[0](lambda u: LEFT, temperature=2.0)
    agent = offline.init_agent(problem, problem.rngs)
    act = offline.agent_actor(problem, agent)
    same = hiql.hierarchical_actor(agent["params"], problem.config, np.random.default_rng(0))
    s = np.ones((50, 2))
    for t in (0, 1):
        actions = act(s, s, t)
        assert (actions == same(s, s, t)).all() and len(set(actions)) > 2


def test_data_and_checkpoint_must_fit(tmp_path, scripted):
    """19 transitions in a row, so at most 18 steps to a subgoal; a checkpoint of other networks,
    generators, data or more updates is refused."""
    prepare = scripted[0]
    with pytest.raises(ValueError, match="--subgoal-steps 19 must be below the 19 transitions"):
        prepare(None, subgoal_steps=19)
    problem = prepare(lambda u: LEFT, subgoal_steps=18, steps=2, policy_steps=3)
    offline.train(problem, Run(str(tmp_path), problem.config))
    agent = load_tree(tmp_path / "checkpoint.npz")
    assert hiql.prepare(problem.config, agent).config is problem.config
    few = {name: p for name, p in agent["params"].items() if name != "flat"}
    rng = {name: x for name, x in agent["rng"].items() if name != "hide"}
    for wrong, words in (({"params": few}, "does not fit"), ({"rng": rng}, "does not fit"),
                         ({"update": agent["update"] + 1}, "update"),
                         ({"data": agent["data"] + 1}, "the data are not those of the run")):
        with pytest.raises(ValueError, match=words):
            hiql.prepare(problem.config, {**agent, **wrong})
    for x in (problem.data.observations, problem.data.actions, problem.data.terminals):
        plain = x.copy()
        x[-2] = 1 - x[-2]
        assert offline.init_agent(problem, problem.rngs)["data"] != agent["data"]
        x[:] = plain
    assert offline.init_agent(problem, problem.rngs)["data"] == agent["data"]


def test_a_problem_draws_from_five_generators(scripted):
    """Children of the seed in this order: the data, which actions are hidden, networks, the flat
    policy's, batches. Training and evaluation get those of the problem."""
    problem = scripted[0](None, action_free=0.4)
    rngs = generators(8, "data", "hide", "init", "flat", "batch")
    data = problem.env.dataset(rngs["data"])
    offline.hide_actions(data, 0.4, rngs["hide"])
    assert (data.observations == problem.data.observations).all()
    assert (data.labelled == problem.data.labelled).all() and len(data.labelled) == 3 * 19
    config, seen = dataclasses.replace(problem.config, steps=1), {}

    def init_params(config, env, data, rngs):
        seen.update(rngs)
        return hiql.init_params(config, env, data, rngs)

    def learn(problem, agent, rng):
        seen["learn"] = rng
        agent["update"] += 1
        yield {}, True

    problem.config, problem.init_params, problem.learn = config, init_params, learn
    offline.train(problem)
    assert seen == {**problem.rngs, "learn": problem.rngs["batch"]} and list(problem.rngs) == list(
        rngs)
    for name, rng in problem.rngs.items():
        assert rng.bit_generator._seed_seq.spawn_key == rngs[name].bit_generator._seed_seq.spawn_key


def test_actions_are_hidden_by_whole_trajectories():
    data = chain(range(3), range(4), range(5))                  # rows 0-2, 3-6, 7-11
    rows, hidden = [{0, 1}, {3, 4, 5}, {7, 8, 9, 10}], set()
    for fraction, n in ((0, 0), (0.3, 1), (0.4, 1), (0.6, 2)):
        for seed in range(20):
            offline.hide_actions(data, fraction, np.random.default_rng(seed))
            kept = [x <= set(data.labelled) for x in rows]
            assert sum(kept) == 3 - n
            assert set(data.labelled) == set().union(*(x for x, keep in zip(rows, kept) if keep))
            hidden |= {i for i, keep in enumerate(kept) if not keep}
    assert hidden == {0, 1, 2}
    with pytest.raises(ValueError, match="--action-free 0.9 hides the actions of all"):
        offline.hide_actions(data, 0.9, None)


def test_subgoals_are_shown_where_their_representation_is(monkeypatch):
    """The high-level policy says phi([s0; w4]) everywhere: from s0 that is the point w4."""
    config, params, batch = toy(subgoal_steps=3)
    s, g, points = batch["observations"], batch["value_goals"][:1], batch["high_actor_targets"]
    points = points + np.arange(7)[:, None]                     # seven different ones
    layer = params["high"]["dense2"]
    layer["W"][:], layer["b"][:] = 0, hiql.phi(params, s[:1], points[4:5], config)[0]
    places = hiql.subgoal_places(params, s, g, points, config)
    assert places.shape == s.shape and (places[0] == points[4]).all()
    z = layer["b"]
    for x, place in zip(s, places):
        there = [hiql.phi(params, x[None], w[None], config)[0] for w in points]
        assert (place == points[np.argmin([((y - z) ** 2).sum() for y in there])]).all()
    # the pictures: the agent's episodes, its value, and a subgoal every three steps of a path
    calls, problem = [], SimpleNamespace(config=config, env="env")
    shown, run = {"hiql": "its episodes", "flat": "others"}, Run(None, config)
    run.path = str
    for name in ("draw_trajectories", "draw_curve", "draw_value"):
        monkeypatch.setattr(hiql.plots, name, lambda *arguments: calls.append(arguments))
    hiql.draw(problem, {"params": params}, run, shown)
    assert calls[0] == ("trajectories.png", "env", shown)
    assert calls[1] == ("curve.png", run.logs, "update") and calls[2][3] == "its episodes"
    values, subgoals = calls[2][2], calls[2][4]
    close(values(points, g), hiql.value_map(params, points, g.repeat(7, 0), config))
    starts, ends = subgoals(s, g, points)
    assert (starts == s[[0, 3, 6]]).all() and (ends == places[[0, 3, 6]]).all()
    hiql.draw(problem, {"params": {"value": params["value"]}}, run, shown)
    assert calls[5][4] is None                                  # no high-level policy
    hiql.draw(problem, {"params": {"flat": params["flat"]}}, run, shown)
    assert len(calls) == 8                                      # nor a value to draw


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


# ------------------------------------------------------------ hiql: data without an environment


def wanderers(n=30, rows=25, seed=0, discrete=False):
    """Trajectories of points with velocity: states x, y, vx, vy; the action pushes."""
    rng = np.random.default_rng(seed)
    a = rng.integers(3, size=(n, rows)) if discrete else rng.uniform(-1, 1, (n, rows, 2))
    push = (a[..., None] - 1.0) * [1, 0] if discrete else a
    v = np.cumsum(0.1 * push, 1)
    states = np.concatenate([rng.normal(size=(n, 1, 2)) + np.cumsum(v, 1), v + 1e-3], -1)
    terminals = np.zeros((n, rows), bool)
    terminals[:, -1] = True
    a = a.reshape(-1, *a.shape[2:])
    return envs.Dataset(states.reshape(-1, 4).astype(np.float32),
                        a if discrete else a.astype(np.float32), terminals.ravel())


ALONE = {"env": "none", "quick": True, "steps": 20, "eval_interval": 10, "subgoal_steps": 4}


def test_what_data_alone_tell():
    """Two trajectories of three rows. States less their mean, times 3 over the root mean square of
    their change in k steps, up to the trajectory's end."""
    obs = np.array([[0, 0], [1, 0], [3, 0], [0, 0], [1, 0], [2, 1]], np.float32)
    ends = np.array([0, 0, 1, 0, 0, 1])
    alone = envs.make("none")
    assert alone.name == "none" and not alone.tasks and alone.settings("paper") == {}
    seen = alone.describe(envs.Dataset(obs, np.array([0, 4, 0, 1, 1, 0]), ends), 1)
    assert (alone.discrete, alone.action_dim, alone.side) == (True, 5, 4)
    assert seen.observations.dtype == np.float32 and seen.actions.tolist() == [0, 4, 0, 1, 1, 0]
    scale = 3 / np.sqrt([(1 + 4 + 1 + 1) / 4, 1 / 4])
    np.testing.assert_allclose(seen.observations, (obs - [7 / 6, 1 / 6]) * scale, rtol=1e-6)
    seen = alone.describe(envs.Dataset(obs, np.zeros((6, 3), np.float32), ends), 2)
    assert (alone.discrete, alone.action_dim) == (False, 3)
    assert seen.terminals.tolist() == ends.tolist()
    scale = 3 / np.sqrt([(9 + 4 + 4 + 1) / 4, 2 / 4])
    np.testing.assert_allclose(seen.observations, (obs - [7 / 6, 1 / 6]) * scale, rtol=1e-6)
    np.testing.assert_allclose(alone.standardise([[1, 2]], (1, 0)),
                               ([1, 2] - np.array([1 / 6, 7 / 6])) * scale[[1, 0]][None], rtol=1e-6)
    for x, entries, words in (([[1, 2, 3]], (), "states and goals must have 2 entries, as in the "),
                              ([1, 2], (1,), "goals must have 1 entries")):
        with pytest.raises(ValueError, match=words):
            alone.standardise(x, entries)
    for actions in (np.full((6, 2), 1.1), np.full((6, 2), -1.1), np.full(6, -1), np.full(6, 1000),
                    np.zeros(6), np.zeros((6, 2, 1)), np.zeros((6, 2), int)):
        with pytest.raises(ValueError, match=r"actions must be \(N, a\) numbers in \[-1, 1\]"):
            alone.describe(envs.Dataset(obs, actions, ends), 1)
    obs[:, 1] = 7                                           # it never changes
    seen = alone.describe(envs.Dataset(obs, np.zeros(6, int), ends), 1)
    assert (alone.centre[1], alone.scale[1]) == (7, 1) and (seen.observations[:, 1] == 0).all()


def test_units_and_origin_of_the_data_do_not_matter():
    """With states in other units agent and flat policy act alike, given those units."""
    data, factor, shift = wanderers(), np.array([1e-4, 1e4, 3, 1]), np.array([0, 1e4, 0, -9])
    acted = []
    for states in (data.observations, data.observations.astype(float) * factor + shift):
        def evaluate(act):
            acted.append(act(states[:20], states[:20][::-1, [1, 0]], 0))
            return {"seen": 1}

        hiql.train(envs.Dataset(states, data.actions, data.terminals),
                   hiql.resolve({**ALONE, "goal_indices": (1, 0)}), evaluate)
    assert len(acted) == 8                                  # two evaluations of two policies
    for plain, other in zip(acted[:4], acted[4:]):
        np.testing.assert_allclose(plain, other, atol=2e-3)
    assert np.abs(acted[0]).max() > 0.1


def test_what_is_no_dataset_or_no_evaluation_is_refused():
    config = hiql.resolve({**ALONE, "steps": 1, "eval_interval": 1})
    with pytest.raises(ValueError, match="data must be an envs.Dataset.*, not tuple"):
        hiql.train((np.zeros((3, 2)), np.zeros((3, 2)), np.ones(3)), config)
    with pytest.raises(ValueError, match="must return {name: number}, not float"):
        hiql.train(wanderers(), config, lambda act: 0.5)


def test_first_layers_bend_at_the_data_alone():
    """[D14] with goals that are entries of a state."""
    data, env = wanderers(), SimpleNamespace(discrete=False, action_dim=2, side=2.0)
    plain, p = (hiql.init_params(hiql.resolve({
        "env": "none", "hidden_dims": (40, 5), "goal_indices": (3, 1), "first_layer_init": kind}),
        env, data, generators(0, "init", "flat")) for kind in ("glorot", "data"))
    np.testing.assert_allclose(p["phi"]["dense0"]["W"], plain["phi"]["dense0"]["W"]
                               * 4, rtol=1e-6)
    w, b = p["low"]["dense0"]["W"], p["low"]["dense0"]["b"]
    np.testing.assert_allclose(np.abs(w).max(1), 4 * np.sqrt(6 / 54), rtol=0.2)
    s, g = data.observations.astype(float), data.observations[:, [3, 1]].astype(float)
    assert (np.abs(s @ w[:4] + b).min(0) < 1e-5).all()
    layer = p["phi"]["dense0"]
    both = (s @ layer["W"][:4])[:, None] + g @ layer["W"][4:] + layer["b"]
    assert (np.abs(both).min((0, 1)) < 1e-4).all()


def test_goals_are_the_entries_asked_for():
    """Goals and subgoals as goals have the entries goal_indices; the state k steps ahead, of which
    the value is taken, is whole; reached by state means in these entries."""
    data, goal = wanderers(), (3, 0)
    config = hiql.resolve({"env": "none", "goal_indices": goal, "batch_size": 500})
    whole = hiql.sample(data, np.random.default_rng(0), dataclasses.replace(config,
                                                                            goal_indices=()))
    batch = hiql.sample(data, np.random.default_rng(0), config)
    for name, x in whole.items():
        reduced = name in ("value_goals", "high_actor_goals", "low_actor_goals", "flat_actor_goals")
        assert (batch[name] == (x[:, goal] if reduced else x)).all()
    data.actions, data.labelled = np.arange(len(data.actions)), data.valid[:40]
    hidden = hiql.sample(data, np.random.default_rng(0), config)
    assert hidden["flat_actor_goals"].shape == (500, 2)
    data.observations[:, goal] = 1
    by_state = dataclasses.replace(config, goal_reached_by="state")
    assert not hiql.sample(data, np.random.default_rng(0), by_state)["masks"].any()
    env = SimpleNamespace(discrete=False, action_dim=2, side=1.0)
    params = hiql.init_params(config, env, wanderers(), generators(0, "init", "flat"))
    _, _, info = hiql.high_loss(params, batch, config)
    s, g, w = (batch[x] for x in ("observations", "high_actor_goals", "high_actor_targets"))
    close(info["target"], hiql.phi(params, s, w[:, goal], config)[0], 1e-6)
    close(info["adv"], hiql.mean_value(params, w, g, config)
          - hiql.mean_value(params, s, g, config), 1e-6)


@pytest.mark.parametrize("discrete", [False, True])
def test_training_on_data_alone(discrete):
    """A dozen lines: data, a config, an evaluation of one's own, actions of the trained agent."""
    data, goals, seen = wanderers(discrete=discrete), (0, 1), []

    def evaluate(act):
        seen.append(act(data.observations[:6], data.observations[-6:, goals], 0))
        return {"success": 0.25, "other": 1.0}

    config = hiql.resolve({**ALONE, "goal_indices": goals})
    result = hiql.train(data, config, evaluate)
    assert len(seen) == 4                           # hiql and the flat policy, twice
    assert {k: result.summary[k] for k in ("success", "other", "flat_success", "updates")} == {
        "success": 0.25, "other": 1.0, "flat_success": 0.25, "updates": 20}
    assert (result.act(data.observations[:6], data.observations[-6:, goals], 0) == seen[-2]).all()
    assert (seen[-1] != seen[-2]).any()
    for a in seen:
        assert a.shape == ((6,) if discrete else (6, 2)) and config.discrete == discrete
        assert set(a) <= {0, 1, 2} if discrete else np.abs(a).max() <= 1
    quiet = hiql.train(data, hiql.resolve({**ALONE, "train_flat": False}))
    assert not [name for name in quiet.summary if "success" in name or name == "episodes"]
    for changes, message in (({"goal_indices": (0, 4)}, "--goal-indices 0,4 go beyond the 4"),
                             ({"subgoal_steps": 24}, "--subgoal-steps 24 must be below the 24"),
                             ({} if discrete else {"temperature": 1.0}, "--temperature is for")):
        if changes:
            with pytest.raises(ValueError, match=message):
                hiql.train(data, hiql.resolve({**ALONE, **changes}))


def test_config_of_data_alone():
    """A file without --env is of no environment; what belongs to mazes is refused."""
    assert hiql.resolve({"dataset": "x.npz"}).env == "none"
    assert hiql.resolve({"dataset": "x.npz", "env": "grid-maze"}).env == "grid-maze"
    assert hiql.resolve({}).env == "point-medium"
    for wrong, words in (({"encoding": "rbf"}, "--encoding rbf is for point mazes"),
                         ({"goal_indices": (0, 0)}, "different numbers"),
                         ({"goal_indices": (-1,)}, "different numbers"),
                         ({"goal_indices": (0,), "rep_type": "none"}, "subgoals by phi"),
                         ({"goal_indices": (0,), "env": "point-medium"}, "is for --env none")):
        with pytest.raises(ValueError, match=words):
            hiql.resolve({"env": "none", **wrong})
    with pytest.raises(ValueError, match="--env none needs a --dataset"):
        hiql.prepare(hiql.resolve({"env": "none"}))


@pytest.mark.slow
def test_hiql_finds_far_goals_and_with_a_broken_part_does_not(monkeypatch):
    """Two hundred random far pairs of point-medium, by small networks after 1,500 updates: 0.80 to
    0.92 on seeds 0 to 3. At most 0.08 with all AWR weights 1 (behaviour cloning), with a reward
    for each step, or with value goals drawn anywhere."""
    flags = {"steps": 1500, "batch_size": 128, "hidden_dims": (64, 64), "lr": 3e-3,
             "train_flat": False, "eval_interval": 1500}
    plain = hiql.sample

    def paid_for_steps(data, rng, config):
        batch = plain(data, rng, config)
        return {**batch, "rewards": -batch["rewards"]}

    def success(sample=plain, **changes):
        monkeypatch.setattr(hiql, "sample", sample)
        config = hiql.resolve({**flags, **changes})
        with contextlib.redirect_stdout(io.StringIO()):
            return offline.train(hiql.prepare(config)).summary["success_random"]

    assert success() > 0.6
    assert success(high_alpha=0.0, low_alpha=0.0) < 0.3
    assert success(paid_for_steps) < 0.3
    assert success(value_p_curgoal=0.0, value_p_trajgoal=0.0) < 0.3


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
    result = offline.train(problem, Run(str(tmp_path), config))
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
    result = offline.train(hiql.prepare(config))
    obs, _ = (env := envs.GoalEnv(envs.make("mine"))).reset(options={"task": 1})
    action = result.act(obs["observation"][None], obs["desired_goal"][None], 0)[0]

    assert result.summary["env"] == "mine" and len(result.summary["success_per_task"]) == 5
    assert env.step(action)[1] in (-1, 0)


# ============================================================================== hiro: settings


def test_settings_of_hiro(monkeypatch):
    """The published numbers, but for those that E6 to E14 change; a flag goes before --quick, that
    before the task, that before another program's changes."""
    default = dict(
        env="point-umaze", seed=0, steps=60000, subgoal_interval=10, goal_range=2,
        hidden_dims=(64, 64), batch_size=100, actor_lr=3e-4, critic_lr=1e-3, lr_decay=True,
        low_discount=0.95, high_discount=0.99, tau=0.005, policy_freq=2, low_noise=0.1,
        high_noise=2, noise_correlation=0.75, eval_noise=0, target_noise=0.2, target_clip=0.5,
        tanh_penalty=0, reward_scale=0.02, critic_loss="huber", warmup=2500, high_updates=5,
        capacity=200000, correction="off_policy", candidates=10, goal_at_window_end="h",
        relabel_low_goals=False, pretrain=0, see_position=True, eval_episodes=50,
        eval_interval=2500)
    quick = dict(steps=2000, warmup=500, eval_interval=1000, eval_episodes=4)
    monkeypatch.setitem(envs.TASKS_ONLINE, "mine", lambda: SimpleNamespace(
        settings=dict(steps=7000, low_noise=0.5)))
    for given, changes, expected in (
            ({}, None, {}), ({"quick": True}, None, quick), ({"quick": False}, None, {}),
            ({"quick": True, "steps": 900}, None, {**quick, "steps": 900}),
            ({}, {"low_noise": 0.3}, {"low_noise": 0.3}),
            ({"env": "mine"}, {"low_noise": 0.3, "tau": 0.5}, dict(
                env="mine", steps=7000, low_noise=0.5, tau=0.5)),
            ({"env": "mine", "quick": True, "low_noise": 0.25}, None, dict(
                quick, env="mine", low_noise=0.25))):
        config = dataclasses.asdict(hiro.resolve(given, changes=changes))
        assert config == {**default, **expected}, given
    published = {field.name: float(found[1]) for field in dataclasses.fields(hiro.Config)
                 if (found := re.search(r"published: ([\d.e-]+)", field.metadata["help"]))}
    assert {name for name, x in published.items() if x != default[name]} == {
        "steps", "goal_range", "hidden_dims", "actor_lr", "low_discount", "low_noise", "high_noise",
        "reward_scale", "high_updates"} and len(published) == 22


@pytest.mark.parametrize("edge, beyond, message", [
    (dict(warmup=10), dict(warmup=9), "--warmup must be at least --subgoal-interval 10"),
    (dict(capacity=10), dict(capacity=9), "--capacity must be at least --subgoal-interval 10"),
    (dict(steps=2501), dict(steps=2500), "--steps 2500 must be above --warmup 2500"),
    (dict(pretrain=2501), dict(pretrain=2500), "--pretrain 2500 must lie between --warmup 2500"),
    (dict(pretrain=59999), dict(pretrain=60000), "and --steps 60000, or be 0"),
    (dict(tau=1.0), dict(tau=1.5), "--tau must be"),
    (dict(candidates=5), dict(candidates=5, correction="none"),
     "--candidates has no effect with --correction none"),
    (dict(noise_correlation=0.5), dict(noise_correlation=0.5, high_noise=0.0),
     "--noise-correlation has no effect with --high-noise 0"),
    (dict(target_clip=0.25), dict(target_clip=0.25, target_noise=0.0),
     "--target-clip has no effect with --target-noise 0"),
    (dict(relabel_low_goals=True), dict(relabel_low_goals=True, goal_at_window_end="new"),
     "says nothing of the goals of --relabel-low-goals")])
def test_settings_that_do_not_go_together_are_refused(edge, beyond, message):
    hiro.resolve(edge)
    with pytest.raises(ValueError, match=message):
        hiro.resolve(beyond)


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
    """A generator whose draws are given: normal ones, uniform ones from -1 to 1."""

    def __init__(self, normal, uniform=0.0):
        self.drawn = np.array(normal, float), np.array(uniform, float)

    def normal(self, size):
        return np.broadcast_to(self.drawn[0], size)

    def uniform(self, low, high, size):
        assert (low, high) == (-1, 1)
        return np.broadcast_to(self.drawn[1], size)


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


def test_a_new_replay_is_empty():
    replay = hiro.replay_init(3, 4, 2, 1, 1, 1)
    assert not any(x.any() for x in replay.values()) and replay["states"].shape == (3, 5, 2)


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


def test_what_the_correction_chooses_is_what_is_learned(monkeypatch):
    """The correction gets the windows drawn and today's low-level policy; its choice, in units of
    the range, is the action of the batch, and nothing else of the batch changes."""
    replay, config = toy_replay(), replay_config(batch_size=300, candidates=7)
    rng, goal_range, scores = np.random.default_rng(0), np.array([20.0]), np.array([-2.0, -4, -0.5])

    def low_policy(s, g):
        raise AssertionError("is for the correction to ask")

    def correct(policy, states, actions, goal, length, half_width, generator, n):
        w = np.searchsorted(STARTS, states[:, 0, 0])
        assert policy is low_policy and generator is rng and n == 7 and half_width is goal_range
        for given, name in ((states, "states"), (actions, "actions"), (goal, "goal"),
                            (length, "length")):
            assert (given == replay[name][w]).all()
        return goal + 0.5 * (w == 2)[:, None], np.tile(scores, (300, 1))

    monkeypatch.setattr(hiro, "off_policy_correction", correct)
    batch, info = hiro.sample_windows(replay, rng, low_policy, goal_range, config)
    w = np.searchsorted(STARTS, batch["observations"][:, 0])
    np.testing.assert_allclose(batch["actions"][:, 0], (STARTS[w] + 10 + 0.5 * (w == 2)) / 20)
    assert (batch["next_observations"][:, 0] == ENDS[w]).all()
    assert info == {"relabel_fraction": pytest.approx((w == 2).mean()), "relabel_gain": 1.5,
                    "relabel_distance": pytest.approx(0.5 * (w == 2).mean())}


def test_replay_forgets_the_oldest_windows():
    """Nothing is left of a longer window, nor that another one followed it."""
    replay = toy_replay(capacity=3)
    assert replay["rewards"].tolist() == [[10, 11, 12, 0], [13, 14, 15, 16], [6, 7, 8, 9]]
    assert replay["states"][0, :, 0].tolist() == [10, 11, 12, 13, 0]
    assert replay["joined"].tolist() == [False, False, True] and replay["count"] == 5
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
    """y = r + gamma m min_j Q'_j, whichever is the smaller; Huber beyond 1; the mask."""
    level = constant_level([1.0, 5.0], [2.0, 3.0])

    def loss(kind, m=1.0):
        batch = one_step(0.5, m)
        other = constant_level([1.0, 5.0], [3.0, 2.0])
        y, same = (hiro.td3_target(x["target"], batch, np.zeros((1, 1)), 0.5)
                   for x in (level, other))
        assert y == same
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
    first, last = (level["target"]["critic"][name] for name in ("dense0", "dense1"))
    first["W"][:, 2, 0] = last["W"][:, 0, 0] = 1            # Q'(x, a) = relu(a + 2) - 2
    first["b"][:, 0], last["b"][:, 0] = 2, -2
    for noise, a in ((0.4, 1.0), (-0.4, np.tanh(3) - 0.4), (-2.5, -1.0)):
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


@pytest.mark.parametrize("kind", ["huber", "squared"])
def test_an_update_of_td3_by_hand(kind):
    """Adam's first step is the learning rate in size. Critics 1 and 2 are Q = 6 + a and 9, the
    targets 2 and 3; the policy sees the state, not the next one, and climbs critic 1."""
    config = hiro.resolve({"critic_lr": 0.1, "actor_lr": 0.02, "policy_freq": 1, "tau": 0.25,
                           "critic_loss": kind})
    level = constant_level([1.0, 9.0], [2.0, 3.0])
    critic, actor = level["online"]["critic"], level["online"]["actor"]
    critic["dense0"]["W"][0, 2, 0], critic["dense0"]["b"][0, 0] = 1, 5
    critic["dense1"]["W"][0, 0, 0] = 1
    actor["dense0"]["b"][:], actor["dense1"]["W"][:] = 1, 1e-3
    batch = {**one_step(0.5), "observations": np.array([[1.0, 0]]),
             "next_observations": np.array([[0, 1.0]])}
    loss = hiro.td3_update(level, batch, np.random.default_rng(0), 0.5, 0.5, config)
    errors = np.array([4.5, 7.5])                           # against y = 0.5 + 0.5 min(2, 3)
    assert loss == pytest.approx(((errors**2) / 2 if kind == "squared" else errors - 0.5).sum())
    np.testing.assert_allclose(critic["dense1"]["b"][:, 0], [0.95, 8.95])
    np.testing.assert_allclose(actor["dense1"]["b"], 0.01, rtol=1e-5)
    np.testing.assert_allclose(actor["dense0"]["W"], [[0.01] * 3, [0] * 3], rtol=1e-4)
    np.testing.assert_allclose(level["target"]["critic"]["dense1"]["b"][:, 0],
                               [0.75 * 2 + 0.25 * 0.95, 0.75 * 3 + 0.25 * 8.95])
    assert level["count"] == 1 and level["actor_adam"]["count"] == 1


def test_loss_of_the_policy_by_hand():
    """-mean Q_1(x, mu(x)); the second critic has no part in it."""
    networks = constant_level([1.0, 50.0], [0, 0])["online"]
    networks["critic"]["dense0"]["W"][0, 2, 0] = networks["critic"]["dense1"]["W"][0, 0, 0] = 2
    networks["actor"]["dense1"]["b"][:] = np.arctanh(0.5)
    loss, grads, _ = hiro.actor_loss(networks, np.zeros((3, 2)))
    assert loss == pytest.approx(-(1 + 4 * 0.5))
    assert grads["actor"]["dense1"]["b"] == pytest.approx(-4 * 0.75)    # tanh' is 1 - 0.5^2
    y = networks["actor"]["dense1"]["b"][0]                             # penalised: + 0.3 y^2
    loss, grads, _ = hiro.actor_loss(networks, np.zeros((3, 2)), 0.3)
    assert loss == pytest.approx(-(1 + 4 * 0.5) + 0.3 * y**2)
    assert grads["actor"]["dense1"]["b"] == pytest.approx(-4 * 0.75 + 0.6 * y)


def test_the_penalty_of_a_saturated_tanh_reaches_the_policy(monkeypatch):
    """[E20]: the config's, at every update of a policy; Push and Fall have 0.05."""
    seen, plain = [], hiro.actor_loss
    monkeypatch.setattr(hiro, "actor_loss", lambda *x: seen.append(x[2:]) or plain(*x))
    config = hiro.resolve({"hidden_dims": (3,), "tanh_penalty": 0.25, "policy_freq": 1})
    level = hiro.td3_init(np.random.default_rng(0), 2, 1, config)
    hiro.td3_update(level, one_step(), np.random.default_rng(0), 0.9, 1.0, config)
    assert seen == [(0.25,)]
    configs = [hiro.resolve({"env": name}) for name in ("point-push", "point-fall", "point-umaze")]
    assert [c.tanh_penalty for c in configs] == [0.05, 0.05, 0]
    assert [c.steps for c in configs] == [80_000, 80_000, 60_000]


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


class Calls(list):
    """Records calls of functions of hiro.py, in the order in which they end."""

    def __init__(self, monkeypatch, *names):
        super().__init__()
        self.plain = {name: getattr(hiro, name) for name in names}
        for name in names:
            monkeypatch.setattr(hiro, name, self.recorded(name))

    def recorded(self, name):
        def call(*arguments):
            result = self.plain[name](*arguments)
            words = zip(inspect.signature(self.plain[name]).parameters, arguments, strict=True)
            self.append((name, SimpleNamespace(**dict(words), result=result)))
            return result

        return call

    def take(self, name):
        """Arguments by their names, and result, of the next call, which must be of that name."""
        called, call = self.pop(0)
        assert called == name
        return call


def test_the_loop_hands_on_what_it_should(monkeypatch):
    """Window by window, call by call: on which state, with whose batch, discount, learning rate
    and generator; and which results are used."""
    calls = Calls(monkeypatch, "explore_goal", "explore_window", "replay_add", "end_warmup",
                  "sample_steps", "sample_windows", "td3_update")
    config = hiro.resolve({"subgoal_interval": 5, "steps": 300, "warmup": 120, "batch_size": 8,
                           "candidates": 3, "high_updates": 2, "hidden_dims": (8,),
                           "low_discount": 0.5, "high_discount": 0.7})
    problem = hiro.prepare(config, env=Plane())
    agent, rngs, step, over = hiro.init_agent(problem, problem.rngs), problem.rngs, 0, True
    for row, now_over in hiro.learn(problem.env, agent, config, rngs):
        goal, made, kept = (calls.take(name) for name in (
            "explore_goal", "explore_window", "replay_add"))
        window, ended, terminated = made.result
        if over:                                            # an episode begins
            s, task, noise = np.zeros(3), problem.env.goal.astype(np.float32), goal.noise
            assert 0 < np.abs(noise).max() < 5
        assert (goal.s == s).all() and (goal.task == task).all() and goal.noise is noise
        assert made.env is problem.env and made.s is goal.s and made.task is goal.task
        assert made.g is goal.result and made.warm == (step < 120)
        assert kept.window is window and kept.terminated is terminated and kept.follows != over
        over, s, step = ended, window["states"][-1], step + len(window["actions"])
        assert over is now_over and agent["step"] == step
        explored, learned = [goal, made], [kept]
        if made.warm and step >= 120:
            explored.append(calls.take("end_warmup"))
        expected = {}
        for level, sample, gamma, updates in (("low", "sample_steps", 0.5, len(window["actions"])),
                                              ("high", "sample_windows", 0.7, 2)):
            for _ in range(updates if step >= 120 else 0):
                drawn, update = calls.take(sample), calls.take("td3_update")
                batch, info = drawn.result if level == "high" else (drawn.result, {})
                assert update.level is agent[level] and update.batch is batch
                assert update.gamma == gamma and drawn.goal_range is agent["goal_range"]
                assert update.rate == pytest.approx(np.clip(3 * (1 - step / 300), 0, 1))
                assert update.rng is drawn.rng is rngs["batch"]
                assert update.config is drawn.config is config
                expected.update({f"{level}_loss": update.result, **info})
                learned.append(drawn)
                if level == "high":
                    assert drawn.low_policy is made.acting.low
        assert row == expected and not calls
        assert all(x.rng is rngs["explore"] and x.config is config for x in explored)
        assert all(x.agent is agent for x in explored if x is not made)
        assert all(x.replay is agent["replay"] for x in learned)


def test_a_window_by_hand():
    """The goal goes on by h; noise is added to each action, held or not, and clipped; the end of
    an episode ends the window."""
    config, env, seen = hiro.resolve({"subgoal_interval": 3, "low_noise": 0.5}), Plane(), []
    goal = np.array([2.0, 1.0], np.float32)

    def low(s, g):
        seen.append(np.concatenate([s[0], g[0]]))
        return np.array([[0.25, -0.5]])

    def window(warm, x=0.0, time=0):
        seen.clear()
        env.reset(seed=0)
        env.s, env.time = np.array([x, 0.0]), time
        s, task = online.read(env.observe())
        made = hiro.explore_window(env, s, task, goal, SimpleNamespace(
            low=low, transition=hiro.goal_transition), warm, Draws([1, -2], [0.75, 0.5]), config)
        made[0]["distance"] = [-np.hypot(*(x[:2] - env.goal)) for x in made[0]["states"][1:]]
        assert made[0]["goal"] is goal and made[0]["task"] is task and made[0]["states"][0] is s
        return made

    made, over, terminated = window(False)
    np.testing.assert_allclose(made["actions"], [[0.75, -1]] * 3)       # -1.5 is clipped
    np.testing.assert_allclose(made["states"], [[0, 0, 0], [0.375, -0.5, 1], [0.75, -1, 2],
                                                [1.125, -1.5, 3]])
    np.testing.assert_allclose(seen, [[0, 0, 0, 2, 1], [0.375, -0.5, 1, 1.625, 1.5],
                                      [0.75, -1, 2, 1.25, 2]])
    np.testing.assert_allclose(made["rewards"], made["distance"], rtol=1e-5)
    assert (over, terminated) == (False, False)
    made, over, terminated = window(True)
    np.testing.assert_allclose(made["actions"], [[1, -0.5]] * 3)        # 1.25 is clipped
    assert (over, terminated) == (False, False) and not seen
    for x, time, n, ends in ((5.5, 0, 2, (True, True)), (0.0, 24, 1, (True, False))):
        made, *ended = window(False, x, time)
        assert len(made["actions"]) == len(made["rewards"]) == len(made["states"]) - 1 == n
        assert tuple(ended) == ends                         # beyond 6 and at the time limit


def test_an_episode_begins_with_a_seed_and_noise_of_its_own():
    class Env:
        def reset(self, seed):
            assert seed == 7
            return {"observation": np.arange(3.0), "desired_goal": np.ones(2)}, {}

    rngs = {"episodes": SimpleNamespace(integers=lambda n: {2**31: 7}[n]),
            "explore": Draws([0.5, -1])}
    s, task, noise = online.begin_episode(Env(), rngs, {"goal_range": np.ones(2)})
    assert s.tolist() == [0, 1, 2] and task.tolist() == [1, 1] and noise.tolist() == [0.5, -1]
    assert s.dtype == task.dtype == np.float32


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


def test_a_goal_of_exploration_by_hand():
    """Each axis has its own range; the noise is kept for the next goal, before clipping."""
    config = hiro.resolve({"warmup": 100, "pretrain": 200, "steps": 300, "high_noise": 0.5,
                           "noise_correlation": 0.6})
    agent = {"goal_range": np.array([2.0, 4.0]), "step": np.array(199), "high": hiro.td3_init(
        np.random.default_rng(0), 4, 2, config)}
    actor = agent["high"]["online"]["actor"]["dense2"]
    actor["W"][:], actor["b"][:] = 0, np.arctanh(0.5)                   # its goal is (1, 2)
    noise, rng, at = np.array([0.5, 1]), Draws([1, -1], [-0.5, 0.25]), np.zeros(2)
    assert hiro.explore_goal(agent, at, at, noise, rng, config).tolist() == [-1, 1]
    assert noise.tolist() == [0.5, 1]                                   # not used yet
    agent["step"] += 1
    g = hiro.explore_goal(agent, at, at, noise, rng, config)
    np.testing.assert_allclose(noise, [0.6 * 0.5 + 0.8, 0.6 - 0.8])
    np.testing.assert_allclose(g, [2, 2 - 0.5 * 4 * 0.2], rtol=1e-6)    # 1 + 0.5 * 2 * 1.1 clipped


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
        for level in ("low", "high"):                       # they follow what is learned
            agent[level]["online"] = tree_map(lambda w: 3 * w, agent[level]["online"])
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


def line_problem(**changes):
    """Points on a line, seen as (x, 0), that move by a; five steps; two tests of two episodes.

    The high-level policy asks for the place at (1, D_y) from here, the low level moves along x by
    the goal's sign. `drawn`: what evaluation draws for its starts and goals.
    """
    config, drawn = hiro.resolve({"subgoal_interval": 2, "eval_episodes": 2, "seed": 3,
                                  **changes}), []

    def tests(rng, n):
        drawn.append(rng.random())
        return {name: (np.zeros((n, 2)), np.array(goals, float)) for name, goals in (
            ("near", [(1, 0), (-1, 0)]), ("far", [(6, 4), (3, 4)]))}

    task = SimpleNamespace(limit=5, tests=tests, begin=lambda s: s, position=lambda s: s,
                           observe=lambda s: s, move=lambda s, a: s + a,
                           distance=lambda s, g: np.abs(s - g)[:, 0],
                           reached=lambda d: d < 0.5, reached_last=lambda d: d < 3.5)
    acting = SimpleNamespace(high=lambda s, D: np.stack([np.ones(len(s)), D[:, 1]], 1),
                             low=lambda s, g: np.sign(g) * [1, 0],
                             transition=hiro.goal_transition, hierarchical=True)
    return SimpleNamespace(config=config, env=task, drawn=drawn, acting=acting,
                           policies=lambda agent, config: acting)


def test_evaluation_of_two_levels_by_hand():
    """Each window of two steps makes one step to the right: x = 0, 1, 1, 2, 2, 3."""
    problem = line_problem()
    summary, episodes = online.evaluate(problem, {"step": np.array(7)})
    assert summary == {
        "success": 0.5, "success_far": 0.5,             # at 1 after one step, at 3 after five
        "success_last_step": 0.5, "final_distance": 3,              # 2 and 4 at the end
        "subgoal_error": 2, "subgoal_error_near": 0, "subgoal_error_far": 4}
    assert list(episodes) == ["near", "far"]
    for name, success, y in (("near", [True, False], 0), ("far", [False, True], 4)):
        paths, asked, goals, seen = episodes[name]
        assert (paths[..., 0] == np.array([[0, 1, 1, 2, 2, 3]]).T).all() and not paths[..., 1].any()
        assert asked[:, 0].tolist() == [[1, y], [2, y], [3, y]] and seen.tolist() == success
        assert (goals[:, 1] == y).all()
    online.evaluate(problem, {"step": np.array(7)})
    online.evaluate(problem, {"step": np.array(8)})
    problem.config.seed = 4
    online.evaluate(problem, {"step": np.array(7)})
    assert problem.drawn[0] == problem.drawn[1] and len(set(problem.drawn)) == 3
    problem.acting.hierarchical = False
    assert not [name for name in online.evaluate(problem, {"step": np.array(7)})[0]
                if "subgoal" in name]
    problem.env.tests = lambda rng, n: {"only": (np.zeros((2, 2)), np.ones((2, 2)))}
    problem.acting.hierarchical = True
    first = ["success", "success_last_step", "final_distance"]
    assert list(online.evaluate(problem, {"step": np.array(7)})[0]) == [*first, "subgoal_error"]
    problem.config.subgoal_interval = 6                     # no whole window in five steps
    assert list(online.evaluate(problem, {"step": np.array(7)})[0]) == first


def test_evaluation_has_a_generator_of_its_own():
    """Where moves are random too: what the task drew before does not matter."""
    class Slippery(envs.PointMaze):
        def move(self, s, a, rng=None):
            return super().move(s, a + rng.normal(size=a.shape))

    task = envs.GoalEnv(Slippery("slippery", CORRIDOR, limit=4))
    problem = hiro.prepare(hiro.resolve({"eval_episodes": 2}), env=task)
    agent, seen = hiro.init_agent(problem, problem.rngs), []
    for seed in (0, 1):
        task.reset(seed=seed)
        seen.append(problem.evaluate(problem, agent)[0])
    assert seen[0] == seen[1]


def test_noise_reaches_each_action_of_an_evaluated_episode():
    """a + eval_noise N(0, 1), clipped: 1 + 0.25 at the window's first step, 0 + 0.25 at its end;
    of the acting agent too."""
    problem = line_problem(eval_noise=0.25)
    start, rng = np.zeros((1, 2)), Draws([1.0, 0])
    problem.acting.low = lambda s, g: np.where(g > 0, 1, 0) * [1, 0]
    for noise, path in ((0.25, [0, 1, 1.25, 2.25, 2.5, 3.5]), (0, [0, 1, 1, 2, 2, 3])):
        problem.config.eval_noise = noise
        paths = online.rollout(problem.env, problem.acting, start, start, rng, problem.config)[1]
        assert paths[:, 0, 0].tolist() == path
        act, s = online.actors(problem, None, rng)(), np.zeros(2)
        for x in path[1:]:
            s = s + act({"observation": s, "desired_goal": np.zeros(2)})
            assert s.tolist() == [x, 0]
    noisy = online.evaluation_action(np.array([-0.9, 0.9]), Draws([-1, 1]), problem.config)
    assert noisy.tolist() == [-0.9, 0.9]                                # no noise
    problem.config.eval_noise = 0.25
    noisy = online.evaluation_action(np.array([-0.9, 0.9]), Draws([-1, 1]), problem.config)
    assert noisy.tolist() == [-1, 1]


def test_a_run_reports_its_last_evaluation(capsys):
    """Success that falls at the end is reported as it fell. Evaluated at the first episode's end
    after each eval_interval steps, not in the warm-up; early episodes: one window after it."""
    config = hiro.resolve({"steps": 90, "warmup": 30, "eval_interval": 15})
    scores, seen = [0.5, 1.0, 0.96, 0.9, 0.25], []

    def learn(env, agent, config, rngs):
        while agent["step"] < config.steps:
            agent["step"] += 5
            yield {"low_loss": 1.0}, agent["step"] % 10 == 0

    def evaluate(problem, agent):
        seen.append(int(agent["step"]))
        path = seen[-1] * np.array([1, 0, 0])[None, :, None] * np.ones((2, 3, 2))
        return {"success": scores[len(seen) - 1]}, {"test": (path, path, path[0], None)}

    problem = hiro.prepare(config, learn=learn, evaluate=evaluate)
    result = online.train(problem)
    assert seen == [30, 50, 60, 80, 90] and result.agent["step"] == 90
    for early in result.agent["early"]["test"].values():
        assert early.shape == (2, 2) and (early == 50).all()            # of the first of three
    assert result.summary["success"] == 0.25 and result.summary["first_success"] == 50
    assert result.summary["success_curve"] == scores
    assert result.summary["env_steps"] == 90 and result.summary["agent"] == "hiro"
    assert capsys.readouterr().out.startswith(
        "point-umaze, seed 0: hiro, with off-policy correction; 90 environment steps, about ")
    for wrong in (0.0, -1.0, np.array([1.0, 0.0]), np.nan):
        with pytest.raises(ValueError, match="goal_range must be positive"):
            online.train(problem, goal_range=wrong)


def test_the_estimate_is_of_an_agent_that_is_discarded(monkeypatch):
    """The median of windows 3 to 6, times their number; generators and the run stay as they are."""
    config = hiro.resolve({"goal_range": 0, "hidden_dims": (8,), "batch_size": 8, "candidates": 2})
    problem, fresh = hiro.prepare(config), hiro.prepare(config)
    clock = iter([0, 50, 51, 53.0, 54, 59])
    monkeypatch.setattr(online, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert online.estimate(problem) == ", about 150 minutes"            # 6000 windows of 1.5 s
    for name, rng in problem.rngs.items():
        assert rng.bit_generator.state == fresh.rngs[name].bit_generator.state
    assert problem.config == config and vars(problem).keys() == vars(fresh).keys()
    begun = [online.begin_episode(x.env, x.rngs, {"goal_range": np.ones(2)})
             for x in (problem, fresh)]
    assert all((a == b).all() for a, b in zip(*begun))
    assert online.estimate(hiro.prepare(config, env=Plane())) == ""


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
def test_hiro_solves_the_u_maze():
    """Around the wall to (0, 8) and to the other corners, on a fresh seed."""
    with contextlib.redirect_stdout(io.StringIO()):
        summary = hiro.train(hiro.prepare(hiro.resolve({"seed": 50}))).summary
    assert summary["success"] >= 0.95 and summary["success_8_8"] >= 0.95


@pytest.mark.slow
def test_hiro_solves_a_faster_u_maze_and_with_a_broken_part_does_not(monkeypatch):
    """The point goes 0.5 a step instead of 0.2, an episode has 200 steps, training 16,000. Goal
    (0, 8), around the wall: 1.00 from 12,000 steps on with seeds 0 to 2. Never with a high level
    paid for distance, with old goals replaced by random ones instead of those of the correction,
    or with a low level paid for other steps than its own."""
    task = envs.UMazeTask()
    task.maze, task.limit = envs.make("point-umaze", speed=0.5), 200
    config = hiro.resolve({"steps": 16000, "warmup": 1000, "goal_range": 5.0,
                           "eval_interval": 4000})
    windows, steps, correct = hiro.sample_windows, hiro.sample_steps, hiro.off_policy_correction

    def paid_for_distance(*arguments):
        batch, info = windows(*arguments)
        return {**batch, "rewards": -batch["rewards"]}, info

    def paid_for_others(replay, rng, *arguments):
        batch = steps(replay, rng, *arguments)
        return {**batch, "rewards": rng.permutation(batch["rewards"])}

    def random_goals(low_policy, states, actions, goal, length, goal_range, rng, n):
        score = correct(low_policy, states, actions, goal, length, goal_range, rng, n)[1]
        return rng.uniform(-goal_range, goal_range, goal.shape).astype(goal.dtype), score

    def success(name=None, broken=None):
        with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            if name:
                patch.setattr(hiro, name, broken)
            return hiro.train(hiro.prepare(config, env=task)).summary["success"]

    assert success() >= 0.95
    assert success("sample_windows", paid_for_distance) < 0.5
    assert success("sample_steps", paid_for_others) < 0.5
    assert success("off_policy_correction", random_goals) < 0.5


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
    (hiro, "E", {"E17": "lab/tasks.py", "E18": "lab/td3.py", "E19": "lab/tasks.py"})])
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
        "loss: policy, penalised": (lambda tree: hiro.actor_loss(tree, x, 0.3), networks),
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
