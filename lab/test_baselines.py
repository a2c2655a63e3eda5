"""Tests of lab/baselines.py: losses of gciql and of cloning, learning, controllers, runs."""

import nets                             # first: it sets one BLAS thread before numpy loads

import copy
import dataclasses
import sys

import numpy as np
import pytest

import envs
import hiql
from lab import baselines, theory
from nets import flatten, mlp, tree_map
from support.runs import generators, read_json


@pytest.fixture
def tiny(monkeypatch):
    """Two mazes of seven cells in a bent corridor, with little data: grid-tiny and point-tiny."""
    monkeypatch.setattr(envs, "ENVIRONMENTS", dict(envs.ENVIRONMENTS))
    envs.register("grid-tiny", envs.GridWorld, dict(episodes=200, rows=41, noise=0.5),
                  dict(discount=0.9, subgoal_steps=2), layout="umaze")
    envs.register("point-tiny", recipe=dict(episodes=4, rows=30), layout="umaze", limit=5,
                  settings=dict(subgoal_steps=2))


def toy(agent, discrete=False, **changes):
    """A small float64 problem: config, maze, parameters (perturbed, target differs), a batch. Where
    actions are continuous `env.pair` adds the direction to the goal."""
    config = baselines.resolve({
        "agent": agent, "env": "grid-fourrooms" if discrete else "pointmaze-medium-navigate-v0",
        "hidden_dims": (6, 5), "batch_size": 7, **changes})
    config.subgoal_steps = 5                            # of all agents: data have 30 rows
    env = envs.make(config.env, **({} if discrete else {"encoding": "direction"}))
    rng = np.random.default_rng(0)
    data = envs.collect(env, rng, episodes=3, rows=30)
    params = baselines.init_params(config, env, data, generators(0, "init", "flat"))
    params = tree_map(lambda w: w + 0.2 * rng.normal(size=w.shape), params)
    batch = hiql.sample(data, data.valid, rng, config, env)
    batch = {k: x.astype(float) if x.dtype == np.float32 else x for k, x in batch.items()}
    batch["masks"][0] = batch["rewards"][0] = 0         # one success at least
    return config, env, params, batch


def test_gradient_certificate():
    """Analytic derivatives of the networks that a loss changes equal the complex step."""
    for agent, name, learned in (("gciql", "value", ("v", "q")), ("gciql", "flat", ("flat",)),
                                 ("gcbc", "flat", ("flat",)), ("hgcbc", "high", ("high",))):
        config, env, params, batch = toy(agent)
        loss = baselines.LOSSES[agent][name]
        _, grads = loss(params, batch, config, env)
        errors = nets.derivative_error(lambda tree: loss(tree, batch, config, env)[0], params,
                                       grads)
        assert max(errors.values()) < 1e-12
        assert set(errors) == set(flatten({net: params[net] for net in learned}))


def log_density(output, target):
    """log N(target; output, I), or the log of a softmax where targets are integers: (B,)."""
    if target.ndim == 1:
        p = np.exp(output) / np.exp(output).sum(1, keepdims=True)
        return np.log(p[np.arange(len(p)), target])
    d = output.shape[1]
    return -0.5 * ((target - output) ** 2).sum(1) - 0.5 * d * np.log(2 * np.pi)


@pytest.mark.parametrize("discrete", [False, True])
def test_gciql_losses_by_hand(discrete):
    """From the formulas, row by row: min of the target's heads in L_V, the mask in L_Q, A of Q."""
    c, env, params, batch = toy("gciql", discrete, discount=0.9, expectile=0.8, flat_alpha=1.7)
    s, s1, g, a = (batch[k] for k in ("observations", "next_observations", "value_goals",
                                      "actions"))
    act = np.eye(5)[a] if discrete else a

    def v(s, g):
        return mlp(params["v"], env.pair(s, g))[0][:, 0]

    def q(p, g):
        return mlp(p, np.concatenate([env.pair(s, g), act], 1))[0][..., 0]

    params["v"]["dense2"]["b"] += np.median(q(params["target"]["q"], g).min(0) - v(s, g))
    adv, loss = q(params["target"]["q"], g).min(0) - v(s, g), 0
    assert (adv < -1e-3).sum() == 3 == (adv > 1e-3).sum()           # and one is 0
    for i in range(7):
        loss += (0.8 if adv[i] >= 0 else 0.2) * adv[i] ** 2 / 7
        y = batch["rewards"][i] + 0.9 * batch["masks"][i] * v(s1, g)[i]
        loss += sum((y - q(params["q"], g)[j, i]) ** 2 for j in (0, 1)) / 7
    assert baselines.gciql_loss(params, batch, c, env)[0] == pytest.approx(loss, rel=1e-12)
    g = batch["high_actor_goals"]
    weight = np.minimum(np.exp(1.7 * (q(params["q"], g).min(0) - v(s, g))), 100)
    log_prob = log_density(mlp(params["flat"], env.pair(s, g))[0], a)
    assert baselines.gciql_policy_loss(params, batch, c, env)[0] == pytest.approx(
        -(weight * log_prob).mean(), rel=1e-12)


def test_cloning_losses_by_hand():
    """-mean log pi of the data's own action, and of the way to the state k steps ahead."""
    for agent, discrete, name in (("gcbc", False, "flat"), ("gcbc", True, "flat"),
                                  ("hgcbc", True, "low"), ("hgcbc", False, "high")):
        c, env, params, batch = toy(agent, discrete)
        s, target = batch["observations"], batch["actions"]
        seen = env.pair(s, batch["high_actor_goals"])
        if name == "low":
            seen = np.concatenate([s, batch["low_actor_goals"]], 1)
        if name == "high":
            target = batch["high_actor_targets"] - s
        loss, _ = baselines.LOSSES[agent][name](params, batch, c, env)
        log_prob = log_density(mlp(params[name], seen)[0], target)
        assert loss == pytest.approx(-log_prob.mean(), rel=1e-12)


def test_gciql_and_gcbc_learn_from_rows_with_actions_alone(tiny):
    """A quarter of the trajectories keep their actions: no other row is drawn, also as a goal, nor
    do first layers bend there. The target of Q begins as a copy of it."""
    for agent in ("gciql", "gcbc"):
        config = baselines.resolve({"agent": agent, "env": "grid-tiny", "action_free": 0.75})
        env, data = hiql.load_data(None, config, generators(0, "data", "hide"))
        shown = np.isin(data.last, np.unique(data.last[data.labelled]))
        data.observations = np.stack([~shown, shown], 1).astype(np.float32)
        params = baselines.init_params(config, env, data, generators(0, "init", "flat"))
        assert (data.valid == data.labelled).all() and shown.mean() == 0.25
        first = params["flat"]["dense0"]
        assert np.allclose(first["b"], -first["W"][1] - first["W"][3])          # all at (0, 1)
        for name, x in flatten(params.get("target", {})).items():
            mine = flatten(params)[name]
            assert (x == mine).all() and x is not mine


@pytest.mark.parametrize("agent, changes, good, wrong", [
    ("gciql", dict(steps=300, flat_alpha=30.0, tau=0.3, temperature=1.0, lr=5e-3), 0.6, None),
    ("hgcbc", dict(steps=200, lr=2e-3, temperature=0.0, batch_size=128), 0.9, "low_actor_goals")])
def test_agents_learn_to_reach_goals(agent, changes, good, wrong, monkeypatch, tiny):
    """From data half random; with the goals of other rows, or the advantage negated, they fail."""
    config = baselines.resolve({"agent": agent, "env": "grid-tiny", "hidden_dims": (32, 32),
                                "batch_size": 64, **changes})
    assert baselines.train(config).summary["success"] > good
    weight, low = hiql.awr_weight, baselines.hgcbc_low_loss
    monkeypatch.setattr(hiql, "awr_weight", lambda alpha, adv: weight(alpha, -adv))
    monkeypatch.setitem(baselines.LOSSES["hgcbc"], "low", lambda params, batch, *setting: low(
        params, {**batch, wrong: np.roll(batch[wrong], 1, 0)}, *setting))
    assert baselines.train(config).summary["success"] < good - 0.3


def test_controllers_reach_what_they_reach_in_ogbench(monkeypatch):
    """Against MuJoCo with OGBench: collector 0.98 (medium), straight 1.0, 0.5, 0, 0, 0.

    A shorter time limit is long enough for that."""
    env, success = envs.make("pointmaze-medium-navigate-v0"), {}
    monkeypatch.setattr(env, "random_pairs", lambda *_: (env.cells[:1], env.cells[:1]))
    for kind in baselines.CONTROLLERS:
        config = baselines.resolve({"env": env.name, "agent": kind, "eval_episodes": 12})
        monkeypatch.setattr(env, "time_limit", 500 if kind == "collector" else 250)
        success[kind] = hiql.evaluate_maze(baselines.Controller, {}, config, env, 1)[0][
            "success_per_task"]
    assert np.mean(success["collector"]) > 0.94 and np.mean(success["random"]) == 0
    assert success["straight"][0] > 0.95 and success["straight"][2:] == [0, 0, 0]
    assert 0.2 < success["straight"][1] < 0.8


OTHER = dict(                           # than the defaults in the tiny mazes
    seed=1, steps=4, batch_size=7, hidden_dims=(3,), lr=1e-3, lr_decay=False, discount=0.8,
    expectile=0.9, tau=0.5, subgoal_steps=3, high_alpha=1.0, low_alpha=1.0, flat_alpha=1.0,
    rep_dim=5, rep_type="phi_g", subgoal_interval=3, action_free=0.5, value_p_curgoal=0.5,
    value_p_trajgoal=0.2, goal_discount=0.75, actor_p_randomgoal=0.5, first_layer_init="glorot",
    train_flat=True)
OF_GRIDS = dict(temperature=0.5, subgoal_steps=3)


def fingerprint(config):
    """What a run leaves: its parameters, actions of its agent, on grids its evaluation."""
    result, env = baselines.train(config), envs.make(config.env)
    s = env.place(env.cells[np.random.default_rng(0).integers(len(env.cells), size=20)])
    seen = [result.act(np.roll(s, t, 0), s[::-1], t) for t in range(4)]
    found = {name: x for name, x in result.summary.items() if "success" in name or "wrong" in name}
    arrays = [*flatten(result.agent["params"]).values(), *seen]
    return [x.tobytes() for x in arrays], str(found) if env.discrete else ""


@pytest.mark.parametrize("agent", baselines.AGENTS[1:])
def test_a_field_is_refused_if_it_has_no_effect(agent, tiny, monkeypatch):
    """What is refused changes nothing, whatever its value; what is not changes a run."""
    controller = agent in baselines.CONTROLLERS
    made = {name: envs.make(name).dataset(np.random.default_rng(0))
            for name in ("point-tiny", "grid-tiny")}
    monkeypatch.setattr(envs.Maze, "dataset", lambda env, rng: copy.copy(made[env.name]))
    for env in ("point-tiny",) if controller else made:
        given = {"agent": agent, "env": env, "eval_episodes": 1}
        if not controller:
            given.update(hidden_dims=(16,), batch_size=8, steps=3)
        config = baselines.resolve(given)
        base = fingerprint(config)
        for name, x in (OTHER if env == "point-tiny" else OF_GRIDS).items():
            if (controller and name == "seed") or (agent == "hgcbc" and name in ("rep_type",
                                                                                 "train_flat")):
                continue                                # of the evaluation alone; it has no phi
            try:
                baselines.resolve({**given, name: x})
                refused = False
            except ValueError as e:
                assert "has no effect with --" in str(e)
                refused = True
            if name != "train_flat":                    # which would add a policy beside it
                changed = fingerprint(dataclasses.replace(config, **{name: x}))
                assert (changed == base) == refused, (env, name)


def test_what_an_agent_cannot_have_is_refused():
    for given, message in (
            ({"env": "none"}, "--dataset needs the --env"), ({"agent": "sac"}, "--agent must be"),
            ({"agent": "straight", "published_rates": True}, "--published-rates has no effect"),
            ({"agent": "collector", "env": "grid-maze"}, "is for point mazes")):
        with pytest.raises(ValueError, match=message):
            baselines.resolve(given)


@pytest.mark.parametrize("agent, env", [("hiql", "grid-fourrooms"), ("straight", "point-medium")])
def test_a_run_is_stopped_goes_on_and_is_evaluated_again(agent, env, tmp_path, monkeypatch, capsys,
                                                         small_data):
    """On grids with the shares of wrong first actions by the value, states and goals in place."""
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["baselines.py", *map(str, words)])
        baselines.main()

    def interrupt(*_):
        raise KeyboardInterrupt

    words, updates = (("--quick", "--steps", 2), 2) if agent == "hiql" else (("--quick",), 1)
    maze, value = envs.make(env), np.random.default_rng(0).normal(size=(104, 104))
    monkeypatch.setattr(type(maze), "limits", lambda env, s, g: np.full(len(s), 10))
    monkeypatch.setattr(hiql, "draw", lambda *_: None)
    monkeypatch.setattr(hiql, "value_map", lambda params, s, g, config, env: value[
        env.number(s), env.number(g)])
    with monkeypatch.context() as patch:
        patch.setattr(hiql, "update", interrupt)
        with pytest.raises(SystemExit):
            run("--agent", agent, "--env", env, *words, "--out", tmp_path / "a")
    run("--resume", tmp_path / "a")
    summary = read_json(tmp_path / "a" / "summary.json")
    assert summary["agent"] == agent and summary["updates"] == updates
    if agent == "hiql":
        assert summary.items() >= theory.wrong_first_actions(maze, value, 5).items()
    capsys.readouterr()
    run("--eval", tmp_path / "a")
    assert f"success_random: {round(summary['success_random'], 4)}\n" in capsys.readouterr().out
