"""Tests of lab/hiql_variants.py: its losses; each variant is trained by its parts."""

import nets                             # first: it sets one BLAS thread before numpy loads

import numpy as np
import pytest

import envs
import hiql
from lab import hiql_variants as variants
from lab.conftest import toy
from nets import flatten, mlp
from support.runs import generators


def problem(variant, discrete=False, **changes):
    """Config, maze, parameters, batch."""
    config = variants.resolve({
        "variant": variant, "env": "grid-fourrooms" if discrete else "point-medium",
        "hidden_dims": (4, 3), "batch_size": 8, "train_flat": False, **changes})
    env = envs.make(config.env)
    init = variants.PARTS[variant].get("init_params", hiql.init_params)
    return config, env, *toy(config, env, init)


@pytest.mark.parametrize("variant, names", [("learned-residual", ["value"]), ("paper", ["value"]),
                                            ("learned-std", ["high", "low"])])
def test_gradient_certificate(variant, names):
    """Every loss: analytic derivatives of the networks it changes equal the complex step."""
    config, env, params, batch = problem(variant)
    for name in names:
        loss = variants.PARTS[variant]["losses"][name]
        learned = {"value", "phi"} if name == "value" else {name}
        _, grads = loss(params, batch, config, env)
        errors = nets.derivative_error(lambda tree: loss(tree, batch, config, env)[0], params,
                                       grads)
        assert max(errors.values()) < 1e-11
        assert set(errors) == set(flatten({net: params[net] for net in learned}))


@pytest.mark.parametrize("variant, heads", [("one-head", 1), ("learned-residual", 2),
                                            ("paper", 1)])
def test_value_losses_by_hand(variant, heads):
    """Row by row from the equations; the weight by the target's or the learned value's residual."""
    c, env, params, batch = problem(variant, expectile=0.8, discount=0.9)
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


def test_a_learned_std_by_hand():
    """The weighted log-density; at std 1 losses and gradients are those of hiql.py."""
    rng = np.random.default_rng(0)
    p = nets.init_mlp(rng, (3, 4, 2), dtype=float)
    x, target = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    weight, std = np.arange(5.0), np.array([2, 3])
    z = (target - mlp(p, x)[0]) / std
    density = np.exp(-0.5 * z**2) / std / np.sqrt(2 * np.pi)
    p["std"] = {"log_std": np.log(std)}
    assert variants.awr(p, x, target, weight)[0] == pytest.approx(
        -(weight * np.log(density).sum(1)).mean(), rel=1e-12)
    for discrete, rep_type in ((False, "phi_sg"), (True, "none")):
        c, env, params, batch = problem("learned-std", discrete, rep_type=rep_type, low_alpha=0.7)
        for name in ("high", "low"):
            assert ("std" in params[name]) == (name == "high" or not discrete)
            for log_std in params[name].get("std", {}).values():
                log_std[:] = 0
            (a, grads), (b, expected) = (losses[name](params, batch, c, env) for losses in (
                variants.PARTS["learned-std"]["losses"], hiql.LOSSES))
            assert a == pytest.approx(b, rel=1e-12)
            for path, x in flatten(expected).items():
                np.testing.assert_allclose(flatten(grads)[path], x, atol=1e-12)


def test_goals_that_are_reached_by_state():
    """In another row of the goal's cell too, unlike in hiql.py; all else is the same."""
    config = hiql.resolve({"env": "grid-fourrooms", "batch_size": 500})
    env = envs.make(config.env)
    data = envs.collect(env, np.random.default_rng(0), episodes=3, rows=30)
    plain, batch = (sample(data, data.valid, np.random.default_rng(1), config, env)
                    for sample in (hiql.sample, variants.reached_by_state))
    here = (batch["observations"] == batch["value_goals"]).all(1)
    assert (batch["masks"] == ~here).all() and (batch["rewards"] == -batch["masks"]).all()
    assert (plain["masks"] > batch["masks"]).any()
    for name in plain.keys() - {"masks", "rewards"}:
        assert (batch[name] == plain[name]).all()


def test_the_control_never_sees_hidden_trajectories():
    """No batch of it, nor its first layers, contains a row of a trajectory without actions."""
    config = variants.resolve({"variant": "labelled-only", "action_free": 0.6,
                               "hidden_dims": (40, 5)})
    env, seen, rngs = envs.make(config.env), set(), generators(0, "hide", "init", "flat", "batch")
    env.encode = lambda s: (seen.update(map(tuple, s.reshape(-1, 2))), s)[1]
    data = envs.collect(env, np.random.default_rng(0), episodes=10, rows=30)
    hiql.hide_actions(data, config.action_free, rngs["hide"])
    shown = np.isin(data.last, data.last[data.labelled])
    seen.clear()
    variants.labelled_only(config, env, data, rngs)
    for _ in range(5):
        hiql.sample(data, data.valid, rngs["batch"], config, env)
    seen.discard(tuple(data.observations[0]))           # whose shape alone is read
    assert len(seen) > 30 and seen <= set(map(tuple, data.observations[shown]))
    with pytest.raises(ValueError, match="labelled-only leaves out what --action-free hides"):
        variants.resolve({"variant": "labelled-only"})


def test_what_the_paper_sets():
    """Its order and phi, at published rates; flags go first."""
    c = variants.resolve({"variant": "paper", "steps": 70})
    assert (c.rep_type, c.policy_steps, c.lr, c.tau) == ("phi_g", 70, 3e-4, 0.005)
    c = variants.resolve({"variant": "paper", "policy_steps": 0, "lr": 0.1})
    assert (c.policy_steps, c.lr) == (0, 0.1)
    with pytest.raises(ValueError, match="--variant rbf is for OGBench's mazes"):
        variants.resolve({"variant": "rbf"})


def test_a_variant_is_trained_by_its_parts(monkeypatch):
    """Its maze and functions are given to `hiql.train`; one head's target begins as its copy."""
    monkeypatch.setattr(hiql, "train", lambda data, config, **parts: parts)
    for variant, parts in variants.PARTS.items():
        env = "pointmaze-medium-stitch-v0" if variant in variants.ENCODINGS else "point-medium"
        given = variants.train(variants.Config(variant=variant, env=env))
        assert given.items() >= parts.items() and given["actors"] == {variant: hiql.Actor}
        assert variant not in variants.ENCODINGS or (
            given["env"].encoding == variants.ENCODINGS[variant])
    config, env = variants.resolve({"variant": "paper"}), envs.make("point-medium")
    data = envs.collect(env, np.random.default_rng(0), episodes=3, rows=30)
    params = variants.one_head(config, env, data, generators(0, "init", "flat"))
    for name, x in flatten(params["value"]).items():
        copied = flatten(params["target"]["value"])[name]
        assert len(x) == 1 and (x == copied).all() and not np.shares_memory(x, copied)
