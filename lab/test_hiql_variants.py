"""Tests of lab/hiql_variants.py: its losses, its goals, and that each variant is trained by them.

    python -m pytest lab/test_hiql_variants.py          10 seconds
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import sys

import numpy as np
import pytest

import envs
import hiql
from lab import hiql_variants as variants
from nets import flatten, mlp, tree_map
from support.runs import generators, read_json, read_run


def run(*words):
    """`python -m lab.hiql_variants WORDS` in this process; returns the exit code."""
    old, sys.argv = sys.argv, ["hiql_variants.py", *map(str, words)]
    try:
        variants.main()
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = old
    return 0


def toy(variant, discrete=False, **changes):
    """A small float64 problem: config, maze, parameters (perturbed, target differs), a batch."""
    config = variants.resolve({
        "variant": variant, "env": "grid-fourrooms" if discrete else "point-medium",
        "hidden_dims": (6, 5), "batch_size": 8, **changes})
    env, rng = envs.make(config.env), np.random.default_rng(0)
    data = envs.collect(env, rng, episodes=3, rows=30)
    init = variants.PARTS[variant].get("init_params", hiql.init_params)
    params = init(config, env, data, generators(0, "init", "flat"))
    params = tree_map(lambda w: w + 0.2 * rng.normal(size=w.shape), params)
    batch = hiql.sample(data, data.valid, rng, config, env)
    batch = {k: x.astype(float) if x.dtype == np.float32 else x for k, x in batch.items()}
    batch["masks"][0] = batch["rewards"][0] = 0         # one success at least
    return config, env, params, batch


@pytest.mark.parametrize("variant, discrete", [
    ("one-head", False), ("learned-residual", False), ("paper", False), ("learned-std", False),
    ("learned-std", True)])
def test_gradient_certificate(variant, discrete):
    """Every loss: analytic derivatives of the networks it changes equal the complex step."""
    config, env, params, batch = toy(variant, discrete)
    losses = {**variants.PARTS[variant].get("losses", hiql.LOSSES), "flat": variants.flat_loss}
    for name, loss in losses.items():
        learned = {"value", "phi"} if name == "value" else {name}
        value, grads = loss(params, batch, config, env)
        errors = nets.derivative_error(lambda tree: loss(tree, batch, config, env)[0], params,
                                       grads)
        assert np.isfinite(value) and max(errors.values()) < 1e-12
        assert set(errors) == set(flatten({net: params[net] for net in learned}))


@pytest.mark.parametrize("variant, heads", [("one-head", 1), ("learned-residual", 2),
                                            ("paper", 1)])
def test_value_losses_by_hand(variant, heads):
    """Row by row from the equations; the weight by the target's or the learned value's residual."""
    c, env, params, batch = toy(variant, expectile=0.8, discount=0.9)
    s, s1, g = (batch[k] for k in ("observations", "next_observations", "value_goals"))

    def v(p, s):
        z = mlp(params["phi"], g if variant == "paper" else np.concatenate([s, g], 1))[0]
        z *= np.sqrt(10) / np.linalg.norm(z, axis=1, keepdims=True)
        return mlp(p, np.concatenate([s, z], 1))[0][..., 0]

    def residual():                                     # (B,), which decides on the weight
        now = v(params["target"]["value"] if variant == "one-head" else params["value"], s)
        next_best = v(params["target"]["value"], s1).min(0)
        return batch["rewards"] + 0.9 * batch["masks"] * next_best - now.mean(0)

    last = params["target"] if variant == "one-head" else params
    last["value"]["dense2"]["b"] += np.median(residual())
    adv, q = residual(), batch["rewards"] + 0.9 * batch["masks"] * v(params["target"]["value"], s1)
    assert (adv < 0).any() and (adv > 0).any() and len(q) == heads
    loss = sum((0.8 if adv[i] >= 0 else 0.2) * (q[j, i] - v(params["value"], s)[j, i]) ** 2 / 8
               for i in range(8) for j in range(heads))
    losses = variants.PARTS[variant].get("losses", hiql.LOSSES)
    assert losses["value"](params, batch, c, env)[0] == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("rep_type", ["phi_sg", "none"])
@pytest.mark.parametrize("discrete", [False, True])
def test_policy_losses_at_std_1_are_those_of_hiql(discrete, rep_type):
    """Which policies have a learned std; at std 1 loss and gradients are those of hiql.py."""
    c, env, params, batch = toy("learned-std", discrete, rep_type=rep_type)
    mine = {**variants.PARTS["learned-std"]["losses"], "flat": variants.flat_loss}
    for name, plain in {"high": hiql.high_loss, "low": hiql.low_loss,
                        "flat": hiql.flat_loss}.items():
        gaussian = name == "high" or not discrete
        assert ("std" in params[name]) == gaussian
        if gaussian:
            params[name]["std"]["log_std"][:] = 0
        (a, grads), (b, expected) = (f(params, batch, c, env) for f in (mine[name], plain))
        assert a == pytest.approx(b, rel=1e-12)
        for path, x in flatten(expected).items():
            np.testing.assert_allclose(flatten(grads)[path], x, atol=1e-12)


def test_weighted_regression_with_a_learned_std_by_hand():
    rng = np.random.default_rng(0)
    p = nets.init_mlp(rng, (3, 4, 2), dtype=float)
    x, target = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    weight, std = np.arange(5.0), np.array([2, 3])
    z = (target - mlp(p, x)[0]) / std
    density = np.exp(-0.5 * z**2) / std / np.sqrt(2 * np.pi)
    p["std"] = {"log_std": np.log(std)}
    assert variants.awr(p, x, target, weight)[0] == pytest.approx(
        -(weight * np.log(density).sum(1)).mean(), rel=1e-12)


@pytest.mark.parametrize("indices", [(), (1,)])
def test_goals_are_reached_in_equal_states(indices):
    """Masks and rewards from the goal's entries; all else is the batch of `hiql.sample`."""
    env = envs.make("grid-fourrooms")
    config = variants.Config(env=env.name, batch_size=500, subgoal_steps=2, goal_indices=indices)
    data = envs.collect(env, np.random.default_rng(0), episodes=3, rows=30)
    batch, plain = (f(data, data.valid, np.random.default_rng(1), config, env)
                    for f in (variants.reached_by_state, hiql.sample))
    s, g = batch["observations"], batch["value_goals"]
    reached = np.array([all(s[i, list(indices or (0, 1))] == g[i]) for i in range(500)])
    assert (batch["masks"] == 1 - reached).all() and (batch["rewards"] == reached - 1.0).all()
    assert batch["masks"].dtype == np.float32 and reached.sum() > (plain["masks"] == 0).sum()
    for name in plain.keys() - {"masks", "rewards"}:
        assert (batch[name] == plain[name]).all(), name


def test_the_target_begins_as_a_copy_of_the_one_head():
    env, config = envs.make("point-medium"), variants.resolve({"variant": "one-head"})
    data = envs.collect(env, np.random.default_rng(0), episodes=3, rows=30)
    params = variants.one_head(config, env, data, generators(0, "init", "flat"))
    for name, x in flatten(params["value"]).items():
        copied = flatten(params["target"]["value"])[name]
        assert len(x) == 1 and (x == copied).all() and not np.shares_memory(x, copied)


def test_what_the_variants_set():
    """The paper's order and phi, at published rates; flags go first."""
    c = variants.resolve({"variant": "paper", "steps": 70})
    assert (c.rep_type, c.policy_steps, c.lr, c.tau) == ("phi_g", 70, 3e-4, 0.005)
    c = variants.resolve({"variant": "paper", "policy_steps": 0, "lr": 0.1})
    assert (c.policy_steps, c.lr) == (0, 0.1)
    assert variants.resolve({"variant": "one-head"}).policy_steps == 0
    name = "pointmaze-medium-stitch-v0"
    for variant, encoding in variants.ENCODINGS.items():
        env = variants.make_maze(variants.resolve({"variant": variant, "env": name}))
        assert env.encoding == encoding
        for wrong in ({"env": "point-medium"}, {"env": "none"}, {"env": name, "rep_type": "none"}):
            with pytest.raises(ValueError, match="is for OGBench's mazes and subgoals by phi"):
                variants.resolve({"variant": variant, **wrong})


@pytest.mark.parametrize("variant", ["one-head", "learned-residual", "learned-std",
                                     "reached-by-state", "paper"])
def test_each_variant_is_trained_by_its_parts(variant, tmp_path, monkeypatch, capsys, small_data):
    """Its own functions make networks, batches and losses, of the flat policy too; its run can be
    evaluated again."""
    monkeypatch.setattr(envs.PointMaze, "limits", lambda env, s, g: np.full(len(s), 10))
    monkeypatch.setattr(hiql, "draw", lambda *_: None)
    called = set()

    def noted(name, f):
        return lambda *x: (called.add(name), f(*x))[1]

    for part, f in variants.PARTS[variant].items():
        f = {k: noted(k, x) for k, x in f.items()} if part == "losses" else noted(part, f)
        monkeypatch.setitem(variants.PARTS[variant], part, f)
    out = tmp_path / "run"
    words = "--variant", variant, "--quick", "--steps", 3, "--eval-episodes", 1
    assert run(*words, "--out", out) == 0
    losses = {"value", "high", "low"} if "losses" in variants.PARTS[variant] else set()
    assert called == losses | variants.PARTS[variant].keys() - {"losses"}
    summary, params = read_json(out / "summary.json"), read_run(
        variants.PROGRAM, out).agent["params"]
    assert summary["agent"] == variant and summary["flat_success"] >= 0
    assert len(params["value"]["dense0"]["W"]) == (1 if variant in ("one-head", "paper") else 2)
    for name in ("high", "low", "flat"):
        assert ("std" in params[name]) == (variant == "learned-std")
        assert variant != "learned-std" or params[name]["std"]["log_std"].all()     # has learned
    capsys.readouterr()
    assert run("--eval", out) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert float(printed["success_random"]) == round(summary["success_random"], 4)
