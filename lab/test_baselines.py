"""Tests of lab/baselines.py: losses of gciql and of cloning, learning, controllers, runs.

    python -m pytest lab/test_baselines.py          half a minute
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import os
import re
from types import SimpleNamespace
from functools import partial

import numpy as np
import pytest

import envs
import hiql
from lab import baselines, theory
from nets import flatten, mlp, tree_map
from support import offline
from support.files import load_tree, read_json
from support.run import HERE, generators, load_run
from support.test_run import run as run_program

run = partial(run_program, baselines)            # (*words) -> exit code

TINY = ("--quick", "--steps", 20, "--eval-interval", 10, "--eval-episodes", 1)


def toy(agent, discrete=False, seed=0, **changes):
    """A small float64 problem: config, parameters (perturbed, target differs), random batch."""
    config = baselines.resolve({
        "agent": agent, "env": "grid-fourrooms" if discrete else "point-medium",
        "hidden_dims": (6, 5), "rep_dim": 3, "batch_size": 7, **changes})
    rng = np.random.default_rng(seed)
    env = envs.make(config.env)
    data = envs.collect(env, rng, episodes=3, rows=30)
    params = baselines.init_params(config, env, data, generators(seed, "init", "flat"))
    params = tree_map(lambda w: w + 0.2 * rng.normal(size=w.shape), params)
    batch = hiql.sample(data, rng, config)
    batch = {k: x.astype(float) if x.dtype == np.float32 else x for k, x in batch.items()}
    batch["masks"][0], batch["rewards"][0] = 0, 0       # one success at least
    return config, params, batch


# ------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("agent, const_std", [
    ("flat", True), ("gciql", True), ("gciql", False), ("gcbc", True), ("gcbc", False),
    ("hgcbc", True), ("hgcbc", False)])
def test_gradient_certificate(agent, const_std, discrete):
    """Every loss: analytic derivatives equal the complex step."""
    config, params, batch = toy(agent, discrete, const_std=const_std)
    for name, loss in baselines.LOSSES[agent].items():
        value, grads, _ = loss(params, batch, config)
        errors = nets.derivative_error(lambda tree: loss(tree, batch, config)[0], params, grads)
        for array, error in errors.items():
            assert error < 1e-12, (name, array, error)
        learned = {"value": {"v", "q"} if agent == "gciql" else {"value", "phi"}}.get(name, {name})
        assert set(grads) == learned and np.isfinite(value)
        assert set(flatten(grads)) == set(flatten({net: params[net] for net in learned}))


@pytest.mark.parametrize("discrete", [False, True])
def test_gciql_losses_by_hand(discrete):
    """From the formulas, row by row: min of the target's heads in L_V, the mask in L_Q, A of Q."""
    c, params, batch = toy("gciql", discrete, discount=0.9, expectile=0.8, flat_alpha=1.7)
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
    assert baselines.gciql_loss(params, batch, c)[0] == pytest.approx(loss, rel=1e-12)
    g = batch["high_actor_goals"]
    adv = q(params["q"], g).min(0) - v(s, g)
    mean = mlp(params["flat"], np.concatenate([s, g], 1))[0]
    weight = np.minimum(np.exp(1.7 * adv), 100)
    assert baselines.gciql_policy_loss(params, batch, c)[0] == pytest.approx(
        -(weight * log_density(mean, a)).mean(), rel=1e-12)


def log_density(output, target):
    """log N(target; output, I), or the log of a softmax where targets are integers: (B,)."""
    if target.ndim == 1:
        p = np.exp(output) / np.exp(output).sum(1, keepdims=True)
        return np.log(p[np.arange(len(p)), target])
    d = output.shape[1]
    return -0.5 * ((target - output) ** 2).sum(1) - 0.5 * d * np.log(2 * np.pi)


@pytest.mark.parametrize("discrete", [False, True])
def test_cloning_losses_by_hand(discrete):
    """-mean log pi of the data's own action, and of the way to the state k steps ahead."""
    c, params, batch = toy("gcbc", discrete)
    s, g, a = (batch[k] for k in ("low_actor_observations", "flat_actor_goals", "actions"))
    output = mlp(params["flat"], np.concatenate([s, g], 1))[0]
    loss, grads, _ = baselines.gcbc_loss(params, batch, c)
    assert loss == pytest.approx(-log_density(output, a).mean(), rel=1e-12)
    assert set(grads) == {"flat"}
    c, params, batch = toy("hgcbc", discrete)
    s, w = batch["low_actor_observations"], batch["low_actor_goals"]
    output = mlp(params["low"], np.concatenate([s, w], 1))[0]
    loss, grads, _ = baselines.hgcbc_low_loss(params, batch, c)
    assert loss == pytest.approx(-log_density(output, batch["actions"]).mean(), rel=1e-12)
    assert set(grads) == {"low"}
    s, g, w = (batch[k] for k in ("observations", "high_actor_goals", "high_actor_targets"))
    output = mlp(params["high"], np.concatenate([s, g], 1))[0]
    loss, grads, _ = baselines.hgcbc_high_loss(params, batch, c)
    assert loss == pytest.approx(-log_density(output, w - s).mean(), rel=1e-12)
    assert set(grads) == {"high"}


def test_actions_as_inputs():
    a = np.array([0, 3])
    assert baselines.vector(a).tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 1, 0]]
    a = np.array([[0.5, -1.0]])
    assert baselines.vector(a) is a


def test_hidden_actions_are_seen_by_nobody():
    """A quarter of the trajectories keep their actions; value and high level use the others too."""
    for agent in ("hiql", "flat", "gciql", "gcbc"):
        config = baselines.resolve({"quick": True, "agent": agent, "action_free": 0.75,
                                    "batch_size": 4000, "value_p_curgoal": 0.0,
                                    "value_p_trajgoal": 0.0})
        data = baselines.prepare(config).data
        shown = np.isin(data.last, np.unique(data.last[data.labelled]))
        assert len(np.unique(data.last[data.labelled])) == round(0.25 * len(data.lengths))
        hidden = {tuple(x) for x in data.observations[~shown]}
        data.actions[~shown] = np.nan
        b = hiql.sample(data, np.random.default_rng(0), config)
        assert np.isfinite(b["actions"]).all()
        for name in ("observations", "value_goals", "next_observations", "high_actor_goals",
                     "high_actor_targets", "low_actor_observations",
                     "low_actor_next_observations", "low_actor_goals", "flat_actor_goals"):
            share = np.mean([tuple(x) in hidden for x in b[name]])
            uses = agent in ("hiql", "flat") and name in (
                "observations", "value_goals", "next_observations", "high_actor_goals",
                "high_actor_targets")
            assert abs(share - 0.75 * uses) < 0.05, (agent, name)


# ----------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("agent, steps, good", [("flat", 400, 0.9), ("gciql", 800, 0.6)])
def test_policies_follow_the_advantage(agent, steps, good, monkeypatch):
    """From random walks each agent learns to reach goals; with the advantage negated it fails."""
    env = envs.GridWorld("grid-tiny", "umaze")                      # seven cells, bent
    data = envs.collect(env, np.random.default_rng(0), episodes=200, rows=41, noise=1.0)
    config = baselines.resolve({
        "agent": agent, "env": "grid-fourrooms", "discount": 0.9, "hidden_dims": (32, 32),
        "steps": steps, "batch_size": 128, "subgoal_steps": 2, "flat_alpha": 10.0})
    starts, goals = (env.place(x) for x in env.random_pairs(np.random.default_rng(0), 100, 3))

    def score():
        rngs = generators(0, "init", "flat", "batch")
        problem = SimpleNamespace(config=config, env=env, data=data,
                                  losses=baselines.LOSSES[agent])
        agent_state = {"params": baselines.init_params(config, env, data, rngs), "update": 0}
        for _ in hiql.learn(problem, agent_state, rngs["batch"]):
            pass
        act = hiql.flat_actor(agent_state["params"], config, np.random.default_rng(0))
        return offline.rollout(env, act, starts, goals, None)[0].mean()

    assert score() > good
    plain = hiql.awr_weight
    monkeypatch.setattr(hiql, "awr_weight", lambda alpha, adv: plain(alpha, -adv))
    assert score() < good - 0.3


def test_shares_of_wrong_first_actions_are_those_of_the_learned_value(monkeypatch):
    """None by the exact value; by its opposite the flat policy's are all wrong, at any distance."""
    config = baselines.resolve({"env": "grid-fourrooms", "quick": True, "agent": "hiql"})
    env = envs.make(config.env)
    problem = SimpleNamespace(config=config, env=env)
    agent = {"params": {"value": {}}, "update": 0}
    monkeypatch.setattr(offline, "evaluate", lambda problem, agent: ({"success": 0}, {}))
    for sign, flat in ((-1, 0), (1, 1)):
        monkeypatch.setattr(hiql, "value_map", lambda params, s, g, config: sign * env.distance[
            env.number(s), env.number(g)])
        seen, _ = baselines.evaluate(problem, agent)
        assert seen["wrong_first_flat"] == flat and seen["success"] == 0
        assert seen["wrong_flat_by_distance"] == [flat] * env.distance.max()
        if sign == -1:
            assert seen["wrong_first_hierarchy"] == 0 == max(seen["wrong_hierarchy_by_distance"])

    def short_sighted(params, s, g, config):            # right up to three steps away
        d = env.distance[env.number(s), env.number(g)]
        return np.where(d <= 3, -d, d)

    monkeypatch.setattr(hiql, "value_map", short_sighted)
    seen, _ = baselines.evaluate(problem, agent)
    wrong = seen["wrong_flat_by_distance"]
    assert wrong[:2] == [0, 0] and wrong[4:] == [1] * (env.distance.max() - 4)
    assert seen["wrong_first_flat"] == 1                # of the far pairs alone
    v = np.random.default_rng(0).normal(size=env.distance.shape)        # states and goals in place
    monkeypatch.setattr(hiql, "value_map", lambda params, s, g, config: v[
        env.number(s), env.number(g)])
    assert baselines.evaluate(problem, agent)[0] == {
        "success": 0, **theory.wrong_first_actions(env, v, config.subgoal_steps)}
    assert set(baselines.evaluate(problem, {"params": {"flat": {}}, "update": 0})[0]) == {"success"}
    problem.env = envs.make("point-medium")             # cells are no states there
    assert set(baselines.evaluate(problem, agent)[0]) == {"success"}


# -------------------------------------------------------------------------------- controllers


def test_controllers_reach_what_they_reach_in_ogbench():
    """Against MuJoCo with OGBench: collector 0.98 (medium), straight 1.0, 0.5, 0, 0, 0."""
    env, success = envs.make("pointmaze-medium-navigate-v0"), {}
    for kind in baselines.CONTROLLERS:
        config = baselines.resolve({"env": env.name, "agent": kind, "eval_episodes": 12})
        success[kind] = offline.evaluate_actor(
            SimpleNamespace(config=config, env=env), None,
            lambda params, config, rng: baselines.controller(env, config.agent, rng),
            1)[0]["success_per_task"]
    assert np.mean(success["collector"]) > 0.94 and np.mean(success["random"]) == 0
    assert success["straight"][0] > 0.95 and success["straight"][2:] == [0, 0, 0]
    assert 0.2 < success["straight"][1] < 0.8
    s = np.tile(env.centre([(1, 1)]), (20000, 1))           # the next cell is to the right
    a = baselines.controller(env, "collector", np.random.default_rng(0))(s, s + [4.0, 0.0], 0)
    assert (np.abs(a[:, 1]) == 1).mean() == pytest.approx(0.0455, abs=0.005)   # noise 0.5
    assert (a[:, 0] == 1).mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("kind", baselines.CONTROLLERS)
def test_a_controllers_run_is_evaluated_again(kind, tmp_path, monkeypatch, capsys, small_data):
    """It has no parameters to save or to load."""
    out = tmp_path / "run"
    monkeypatch.setattr(envs.PointMaze, "limits", lambda env, s, g: np.full(len(s), 5))
    assert run("--env", "point-umaze", "--agent", kind, "--eval-episodes", 1, "--out", out) == 0
    assert "params" not in load_tree(out / "checkpoint.npz")
    summary = read_json(out / "summary.json")
    assert summary["agent"] == kind and summary["updates"] == 1
    assert f"point-umaze, seed 0: {kind}; 1 updates" in capsys.readouterr().out

    def at_once(env, act, starts, goals, rng):
        assert act(starts, goals, 0).shape == starts.shape
        return np.ones(len(starts), bool), np.ones(len(starts)), np.array([starts, goals])

    monkeypatch.setattr(offline, "rollout", at_once)
    assert run("--eval", out) == 0
    assert "success: 1.0\n" in capsys.readouterr().out


# ------------------------------------------------------------------------- flags and refusals


WRONG = [("--agent sac", "invalid choice"),
         ("--agent flat --train-flat", "--train-flat is for --agent hiql"),
         ("--agent gcbc --flat-alpha 1", "clones behaviour"),
         ("--agent hgcbc --high-alpha 1", "clones behaviour"),
         ("--agent hgcbc --low-alpha 1", "clones behaviour"),
         ("--agent hgcbc --rep-type phi_g", "wants --rep-type none"),
         ("--agent gcbc --policy-steps 5", "gcbc has none"),
         ("--agent random --policy-steps 5", "random has none"),
         *((f"--agent {kind} --env grid-maze", f"--agent {kind} is for point mazes, not grid-maze")
           for kind in baselines.CONTROLLERS),
         ("--agnet flat", "did you mean --agent"), ("--steps 0", "--steps must be positive"),
         ("--resume nowhere", "nowhere"), ("--seeds 3-1", "seeds are A-B")]


@pytest.mark.parametrize("words, message", WRONG)
def test_wrong_input_gets_one_line_and_exit_code_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*words.split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("baselines.py: error: ")
    assert os.listdir(tmp_path) == []


def test_what_an_agent_changes_in_the_defaults():
    with pytest.raises(ValueError, match="unknown agent 'sac'; known: hiql, flat, gciql, gcbc"):
        baselines.resolve({"agent": "sac"})
    same = baselines.resolve({"agent": "hiql"})
    assert {k: x for k, x in vars(same).items() if k not in ("agent", "encode")} == {
        k: x for k, x in vars(hiql.resolve({})).items() if k != "encode"}
    config = baselines.resolve({"agent": "hgcbc"})
    assert (config.rep_type, config.train_flat, config.high_alpha, config.low_alpha) == (
        "none", False, 0, 0)
    for agent in ("gcbc", "gciql", "flat"):
        config = baselines.resolve({"agent": agent, "env": "pointmaze-medium-navigate-v0"})
        assert not config.train_flat and config.subgoal_interval == 1
        assert config.flat_alpha == (0 if agent == "gcbc" else 10)
    assert baselines.resolve({"agent": "straight"}).steps == 1
    assert baselines.Config.agent == "flat" == baselines.resolve({}).agent


@pytest.mark.parametrize("name, tags", [
    ("baselines.py", {"D13"}), ("ogbench.py", {"D15", "D16", "D17"}), ("tasks.py", {"E17"}),
    ("td3.py", {"E18"})])
def test_every_deviation_of_the_lab_is_documented_and_tagged(name, tags):
    """What hiql.py and hiro.py leave to the files that the deviations belong to."""
    with open(os.path.join(HERE, "lab", name)) as file:
        text = file.read()
    code = text.split('"""', 2)[2]
    assert set(re.findall(r"^ *(?:Deviation )?([DE]\d+):? ", text, re.M)) == tags
    assert tags <= set(re.findall(r"\b([DE]\d+)\]", code))


# --------------------------------------------------------------------------------------- runs


NETWORKS = {"hiql": {"phi", "value", "target", "high", "low", "flat"},
            "flat": {"phi", "value", "target", "flat"}, "gciql": {"v", "q", "target", "flat"},
            "gcbc": {"flat"}, "hgcbc": {"high", "low"}}


@pytest.mark.parametrize("env", ["grid-fourrooms", "point-medium"])
@pytest.mark.parametrize("agent", list(NETWORKS))
def test_a_run_leaves_its_files_and_evaluates_again(agent, env, tmp_path, monkeypatch, capsys,
                                                    small_data):
    if env.startswith("point"):
        monkeypatch.setattr(envs.PointMaze, "limits", lambda env, s, g: np.full(len(s), 10))
    monkeypatch.setattr(offline, "draw", lambda *_: None)
    out = tmp_path / "run"
    assert run(*TINY, "--agent", agent, "--env", env, "--out", out) == 0
    assert set(load_tree(out / "checkpoint.npz")["params"]) == NETWORKS[agent]
    files = {"config.json", "train.csv", "eval.csv", "checkpoint.npz", "summary.json"}
    assert set(os.listdir(out)) == files | ({"value.png"} if "value" in NETWORKS[agent] else set())
    summary = read_json(out / "summary.json")
    assert (summary["agent"], summary["updates"]) == (agent, 20)
    assert ("wrong_first_flat" in summary) == (
        env == "grid-fourrooms" and "value" in NETWORKS[agent])
    assert ("flat_success" in summary) == (agent == "hiql")
    first = capsys.readouterr().out.splitlines()[0]
    title = "hiql and, to compare, a flat policy on the same value" if agent == "hiql" else agent
    assert re.match(rf"{env}, seed 0: {title}; 20 updates of 128 of 4,000 transitions", first)
    assert run("--eval", out) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    for name in ("success", "success_random", "success_worst_task", "mean_steps"):
        assert float(printed[name]) == round(summary[name], 4)
    problem, agent_state = load_run(baselines, str(out))
    s = envs.make(env).place(np.array([[1, 1], [1, 2]]))
    act = offline.agent_actor(problem, agent_state)
    assert act(s, s[::-1], 0).shape == ((2,) if env.startswith("grid") else (2, 2))
