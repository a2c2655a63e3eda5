"""Tests of lab/baselines.py: losses of gciql and of cloning, learning, controllers, runs.

    python -m pytest lab/test_baselines.py          half a minute
"""

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
from support.runs import generators, read_json, read_run

LEARNERS = ("flat", "gciql", "gcbc", "hgcbc")


def run(*words):
    """`python -m lab.baselines WORDS` in this process; returns the exit code."""
    old, sys.argv = sys.argv, ["baselines.py", *map(str, words)]
    try:
        baselines.main()
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = old
    return 0


@pytest.fixture
def tiny(monkeypatch):
    """Two mazes of seven cells in a bent corridor, with little data: grid-tiny and point-tiny."""
    monkeypatch.setattr(envs, "ENVIRONMENTS", dict(envs.ENVIRONMENTS))
    envs.register("grid-tiny", envs.GridWorld, dict(episodes=200, rows=41, noise=0.5),
                  dict(discount=0.9, subgoal_steps=2), layout="umaze")
    envs.register("point-tiny", recipe=dict(episodes=4, rows=30), layout="umaze", limit=5,
                  settings=dict(subgoal_steps=2))


def toy(agent, discrete=False, **changes):
    """A small float64 problem: config, maze, parameters (perturbed, target differs), a batch."""
    config = baselines.resolve({
        "agent": agent, "env": "grid-fourrooms" if discrete else "point-medium",
        "hidden_dims": (6, 5), "batch_size": 7, **changes})
    env, rng = hiql.make_maze(config), np.random.default_rng(0)
    data = envs.collect(env, rng, episodes=3, rows=30)
    params = baselines.init_params(config, env, data, generators(0, "init", "flat"))
    params = tree_map(lambda w: w + 0.2 * rng.normal(size=w.shape), params)
    batch = baselines.sample(data, data.valid, rng, config, env)
    batch = {k: x.astype(float) if x.dtype == np.float32 else x for k, x in batch.items()}
    batch["masks"][0] = batch["rewards"][0] = 0         # one success at least
    return config, env, params, batch


# ------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("agent", LEARNERS)
def test_gradient_certificate(agent, discrete):
    """Every loss: analytic derivatives of the networks it changes equal the complex step."""
    config, env, params, batch = toy(agent, discrete)
    for name, loss in baselines.LOSSES[agent].items():
        learned = {"value": {"v", "q"} if agent == "gciql" else {"value", "phi"}}.get(name, {name})
        value, grads = loss(params, batch, config, env)
        errors = nets.derivative_error(lambda tree: loss(tree, batch, config, env)[0], params,
                                       grads)
        assert np.isfinite(value) and max(errors.values()) < 1e-12
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
        return mlp(params["v"], np.concatenate([s, g], 1))[0][:, 0]

    def q(p, g):
        return mlp(p, np.concatenate([s, g, act], 1))[0][..., 0]

    params["v"]["dense2"]["b"] += np.median(q(params["target"]["q"], g).min(0) - v(s, g))
    adv, loss = q(params["target"]["q"], g).min(0) - v(s, g), 0
    assert (adv < -1e-3).sum() == 3 == (adv > 1e-3).sum()           # and one is 0
    for i in range(7):
        loss += (0.8 if adv[i] >= 0 else 0.2) * adv[i] ** 2 / 7
        y = batch["rewards"][i] + 0.9 * batch["masks"][i] * v(s1, g)[i]
        loss += sum((y - q(params["q"], g)[j, i]) ** 2 for j in (0, 1)) / 7
    assert baselines.gciql_loss(params, batch, c, env)[0] == pytest.approx(loss, rel=1e-12)
    g = batch["high_actor_goals"]
    adv = q(params["q"], g).min(0) - v(s, g)
    mean = mlp(params["flat"], np.concatenate([s, g], 1))[0]
    weight = np.minimum(np.exp(1.7 * adv), 100)
    assert baselines.gciql_policy_loss(params, batch, c, env)[0] == pytest.approx(
        -(weight * log_density(mean, a)).mean(), rel=1e-12)


@pytest.mark.parametrize("discrete", [False, True])
def test_cloning_losses_by_hand(discrete):
    """-mean log pi of the data's own action, and of the way to the state k steps ahead."""
    for agent, name, seen, target in (
            ("gcbc", "flat", ("observations", "high_actor_goals"), None),
            ("hgcbc", "low", ("observations", "low_actor_goals"), None),
            ("hgcbc", "high", ("observations", "high_actor_goals"), "high_actor_targets")):
        c, env, params, batch = toy(agent, discrete)
        s, g = (batch[x] for x in seen)
        goal = batch["actions"] if target is None else batch[target] - s
        output = mlp(params[name], np.concatenate([s, g], 1))[0]
        loss, _ = baselines.LOSSES[agent][name](params, batch, c, env)
        assert loss == pytest.approx(-log_density(output, goal).mean(), rel=1e-12)


def test_networks_of_gciql_and_of_the_clones():
    """Inputs and outputs; V and Q with norms, Q a twin, its target a copy of its own."""
    for discrete, actions in ((False, 2), (True, 5)):
        shapes = {"v": (4, 1), "q": (2, 4 + actions, 1), "flat": (4, actions), "high": (4, 2),
                  "low": (4, actions)}
        for agent in ("gciql", "hgcbc"):
            _, _, params, _ = toy(agent, discrete)
            for name in params.keys() - {"target"}:
                *twin, n_in, n_out = shapes[name]
                assert params[name]["dense0"]["W"].shape == (*twin, n_in, 6)
                assert params[name]["dense2"]["W"].shape == (*twin, 5, n_out)
                assert ("norm0" in params[name]) == (name in ("v", "q"))
    config, env = baselines.resolve({"agent": "gciql"}), envs.make("point-medium")
    data = envs.collect(env, np.random.default_rng(0), episodes=3, rows=30)
    params = flatten(baselines.init_params(config, env, data, generators(0, "init", "flat")))
    for path, x in params.items():
        if path.startswith("target/"):
            mine = params[path.removeprefix("target/")]
            assert (x == mine).all() and x is not mine


def test_gciql_and_gcbc_see_rows_with_actions_alone(tiny):
    """A quarter of the trajectories keep their actions: gciql and gcbc draw no other row or goal,
    nor bend their first layers there."""
    for agent in ("gciql", "gcbc"):
        config = baselines.resolve({"agent": agent, "env": "grid-tiny", "action_free": 0.75})
        env, data = hiql.load_data(None, config, generators(0, "data", "hide"))
        shown = np.isin(data.last, np.unique(data.last[data.labelled]))
        assert len(np.unique(data.last[data.labelled])) == round(0.25 * len(data.lengths))
        data.observations = np.stack([~shown, shown], 1).astype(np.float32)
        data.actions = 1 * shown
        batch = baselines.sample(data, data.valid, np.random.default_rng(0), config, env)
        assert (batch["actions"] == 1).all()
        for name in batch.keys() - {"rewards", "masks", "actions"}:
            assert (batch[name] == [0, 1]).all(), (agent, name)
        first = baselines.init_params(config, env, data, generators(0, "init", "flat"))[
            "flat"]["dense0"]
        assert np.allclose(first["b"], -first["W"][1] - first["W"][3])          # all at (0, 1)


# ----------------------------------------------------------------------------------- learning


def negated_advantage(patch):
    plain = hiql.awr_weight
    patch.setattr(hiql, "awr_weight", lambda alpha, adv: plain(alpha, -adv))


def shuffled(name):
    """A lesion: each row of a batch has this array of the row before."""
    def lesion(patch):
        plain = hiql.sample
        patch.setattr(hiql, "sample", lambda *x: (
            batch := plain(*x), batch.update({name: np.roll(batch[name], 1, 0)}))[0])

    return lesion


CLONING = dict(steps=200, lr=2e-3, batch_size=128, temperature=0.0)


@pytest.mark.parametrize("agent, changes, good, lesions", [
    ("flat", dict(steps=150, flat_alpha=10.0), 0.9, [negated_advantage]),
    ("gciql", dict(steps=300, flat_alpha=30.0, tau=0.3), 0.6, [negated_advantage]),
    ("gcbc", CLONING, 0.9, [shuffled("high_actor_goals")]),
    ("hgcbc", CLONING, 0.9, [shuffled("high_actor_goals"), shuffled("low_actor_goals")])])
def test_agents_learn_to_reach_goals(agent, changes, good, lesions, monkeypatch, tiny):
    """From data half random each agent learns; by wrong goals or the advantage negated it fails."""
    config = baselines.resolve({"agent": agent, "env": "grid-tiny", "hidden_dims": (32, 32),
                                "batch_size": 64, "lr": 5e-3, "temperature": 1.0, **changes})
    assert baselines.train(config).summary["success"] > good
    for lesion in lesions:
        with monkeypatch.context() as patch:
            lesion(patch)
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
    s = np.tile(env.centre([(1, 1)]), (20000, 1))           # the next cell is to the right

    def act(kind, goals):
        return baselines.Controller({}, baselines.Config(agent=kind), env)(s, goals, 0)

    a = act("collector", s + [4.0, 0.0])
    assert (np.abs(a[:, 1]) == 1).mean() == pytest.approx(0.0455, abs=0.005)   # noise 0.5
    assert (a[:, 0] == 1).mean() == pytest.approx(0.5, abs=0.01)
    assert (act("straight", s + [[0.5, -3.0]]) == [0.5, -1]).all()
    np.testing.assert_allclose(np.quantile(act("random", s), [0, 0.25, 0.5, 1], axis=0), [
        [-1, -1], [-0.5, -0.5], [0, 0], [1, 1]], atol=0.02)


# ------------------------------------------------------------------------------ flags and runs


@pytest.mark.parametrize("words, message", [
    ("--agent sac", "invalid choice"), ("--env none", "--dataset needs the --env that it is of"),
    ("--dataset x.npz", "--dataset needs the --env that it is of"),
    ("--agent gcbc --expectile 0.9", "--expectile has no effect with --agent gcbc"),
    ("--agent straight --published-rates", "--published-rates has no effect with --agent straight"),
    ("--agent collector --env grid-maze", "--agent collector is for point mazes, not grid-maze")])
def test_wrong_input_gets_one_line_and_exit_code_2(words, message, capsys):
    assert run(*words.split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


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


@pytest.mark.parametrize("agent, env", [
    ("hiql", "grid-fourrooms"), ("gciql", "grid-fourrooms"), ("hgcbc", "point-medium"),
    ("straight", "point-medium")])
def test_a_run_leaves_its_files_and_is_evaluated_again(agent, env, tmp_path, monkeypatch, capsys,
                                                       small_data):
    """On grids with the shares of wrong first actions by the value, states and goals in place."""
    monkeypatch.setattr(envs.PointMaze, "limits", lambda env, s, g: np.full(len(s), 10))
    monkeypatch.setattr(hiql, "draw", lambda *_: None)
    words = () if agent == "straight" else ("--quick", "--steps", 20, "--eval-interval", 10)
    out = tmp_path / "run"
    assert run(*words, "--eval-episodes", 1, "--agent", agent, "--env", env, "--out", out) == 0
    summary = read_json(out / "summary.json")
    assert (summary["agent"], "flat_success" in summary) == (agent, agent == "hiql")
    assert ("wrong_first_flat" in summary) == (agent == "hiql")
    capsys.readouterr()
    assert run("--eval", out) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    for name in printed.keys() - {"updates", "success_per_task", "flat_success_per_task"}:
        assert float(printed[name]) == round(summary[name], 4)
    if agent == "hiql":
        config, maze = read_run(baselines.PROGRAM, out).config, envs.make(env)
        v = np.random.default_rng(0).normal(size=maze.distance.shape)
        monkeypatch.setattr(hiql, "value_map", lambda params, s, g, config, env: v[
            env.number(s), env.number(g)])
        assert baselines.first_actions({"value": {}}, config, maze) == theory.wrong_first_actions(
            maze, v, config.subgoal_steps)


def test_a_controllers_run_that_was_stopped_at_once_goes_on(tmp_path, monkeypatch, small_data):
    """Its checkpoint has neither parameters nor moments."""
    monkeypatch.setattr(envs.PointMaze, "limits", lambda env, s, g: np.full(len(s), 10))
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(hiql, "update", lambda *_: exec("raise KeyboardInterrupt"))
        assert run("--agent", "straight", "--eval-episodes", 1, "--out", out) == 130
    assert run("--resume", out) == 0 and read_json(out / "summary.json")["updates"] == 1
