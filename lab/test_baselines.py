"""Tests of lab/baselines.py: losses of gciql and of cloning, learning, controllers, runs.

    python -m pytest lab/test_baselines.py          half a minute
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import copy
import dataclasses
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

NETWORKS = {"hiql": {"phi", "value", "target", "high", "low", "flat"},
            "flat": {"phi", "value", "target", "flat"}, "gciql": {"v", "q", "target", "flat"},
            "gcbc": {"flat"}, "hgcbc": {"high", "low"}}
TINY = ("--quick", "--steps", 20, "--eval-interval", 10, "--eval-episodes", 1)


@pytest.fixture
def tiny(monkeypatch):
    """Two mazes of seven cells in a bent corridor, with little data: grid-tiny and point-tiny."""
    monkeypatch.setattr(envs, "ENVIRONMENTS", dict(envs.ENVIRONMENTS))
    envs.register("grid-tiny", envs.GridWorld, dict(episodes=200, rows=41, noise=0.5),
                  dict(discount=0.9, subgoal_steps=2), layout="umaze")
    envs.register("point-tiny", recipe=dict(episodes=4, rows=30), layout="umaze", limit=5,
                  settings=dict(subgoal_steps=2))


def toy(agent, discrete=False, seed=0, **changes):
    """A small float64 problem: config, parameters (perturbed, target differs), random batch."""
    config = baselines.resolve({
        "agent": agent, "env": "grid-fourrooms" if discrete else "point-medium",
        "hidden_dims": (6, 5), "batch_size": 7, **changes})
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


@pytest.mark.parametrize("agent, discrete, const_std", [
    (agent, discrete, const_std) for agent in ("flat", "gciql", "gcbc", "hgcbc")
    for discrete in (False, True) for const_std in (True, False)
    if const_std or not discrete or agent == "hgcbc"])      # else there is no Gaussian
def test_gradient_certificate(agent, discrete, const_std):
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


@pytest.mark.parametrize("discrete, actions", [(False, 2), (True, 5)])
def test_networks_as_they_begin(discrete, actions, tiny):
    """Inputs and outputs; twins; norms for values; targets are copies; small steps of policies."""
    values = {"phi": (4, 10), "value": (2, 12, 1), "v": (4, 1), "q": (2, 4 + actions, 1)}
    policies = {"flat": (4, actions), "high": (4, 2), "low": (4, actions)}
    env = "grid-tiny" if discrete else "point-tiny"
    for agent in ("flat", "gciql", "gcbc", "hgcbc"):
        names = NETWORKS[agent]
        config = baselines.resolve({"agent": agent, "env": env, "hidden_dims": (64,)})
        for std in (True, False):
            config.const_std = std
            problem = baselines.prepare(config)
            params = problem.init_params(config, problem.env, problem.data, problem.rngs)
            assert set(params) == names
            for name in names - {"target"}:
                *twin, n_in, n_out = {**values, **policies}[name]
                first, last = params[name]["dense0"]["W"], params[name]["dense1"]["W"]
                assert (first.shape, last.shape) == ((*twin, n_in, 64), (*twin, 64, n_out)), name
                assert ("norm0" in params[name]) == (name in values)
                glorot = np.sqrt(6 / (64 + n_out)) * (1 if name in values else 0.1)
                assert 0.7 * glorot < np.abs(last).max() <= glorot
                gaussian = name == "high" or name in policies and not discrete
                assert ("std" in params[name]) == (gaussian and not std), name
            for name, copied in params.get("target", {}).items():
                for path, x in flatten(copied).items():
                    mine = flatten(params[name])[path]
                    assert (x == mine).all() and x is not mine


def test_actions_as_inputs():
    a = np.array([0, 3])
    assert baselines.vector(a).tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 1, 0]]
    a = np.array([[0.5, -1.0]])
    assert baselines.vector(a) is a


def test_hidden_actions_are_seen_by_nobody(tiny):
    """A quarter of the trajectories keep their actions; value and high level use the others too."""
    policy = {"actions", "low_actor_observations", "low_actor_next_observations",
              "low_actor_goals", "flat_actor_goals"}
    for agent in ("hiql", "flat", "gciql", "gcbc", "hgcbc"):
        given = {"agent": agent, "env": "grid-tiny", "action_free": 0.75, "batch_size": 4000}
        config = baselines.resolve(given if "gcbc" in agent else {
            **given, "value_p_curgoal": 0.0, "value_p_trajgoal": 0.0})
        data = baselines.prepare(config).data
        shown = np.isin(data.last, np.unique(data.last[data.labelled]))
        assert len(np.unique(data.last[data.labelled])) == round(0.25 * len(data.lengths))
        data.observations = np.stack([~shown, shown], 1).astype(np.float32)
        data.actions = 1 * shown
        for name, x in hiql.sample(data, np.random.default_rng(0), config).items():
            if name not in ("rewards", "masks"):
                share = 1 - x.mean() if name == "actions" else x[:, 0].mean()
                uses = agent in ("hiql", "flat", "hgcbc") and name not in policy
                assert abs(share - 0.75 * uses) < 0.05 * uses + 1e-9, (agent, name)


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
    ("gcbc", CLONING, 0.9, [shuffled("flat_actor_goals")]),
    ("hgcbc", CLONING, 0.9, [shuffled("high_actor_goals"), shuffled("low_actor_goals")])])
def test_agents_learn_to_reach_goals(agent, changes, good, lesions, monkeypatch, tiny):
    """From data half random each agent learns; by wrong goals or the advantage negated it fails."""
    config = baselines.resolve({"agent": agent, "env": "grid-tiny", "hidden_dims": (32, 32),
                                "batch_size": 64, "lr": 5e-3, "temperature": 1.0, **changes})

    def score():
        return baselines.train(baselines.prepare(config)).summary["success"]

    assert score() > good
    for lesion in lesions:
        with monkeypatch.context() as patch:
            lesion(patch)
            assert score() < good - 0.3


def test_baselines_need_an_environment():
    for wrong in ({"env": "none"}, {"dataset": "x.npz"}):
        with pytest.raises(ValueError, match="--dataset needs the --env that it is of"):
            baselines.resolve(wrong)
    assert baselines.resolve({"dataset": "x.npz", "env": "point-medium"}).env == "point-medium"


def test_shares_of_wrong_first_actions_are_those_of_the_learned_value(monkeypatch):
    """None by the exact value; by its opposite the flat policy's are all wrong, at any distance."""
    config = baselines.resolve({"env": "grid-fourrooms", "quick": True, "agent": "hiql"})
    env = envs.make(config.env)
    problem = SimpleNamespace(config=config, env=env)
    agent = {"params": {"value": {}}, "update": 0}
    monkeypatch.setattr(offline, "evaluate_maze", lambda problem, agent: ({"success": 0}, {}))
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


def test_controllers_reach_what_they_reach_in_ogbench(monkeypatch):
    """Against MuJoCo with OGBench: collector 0.98 (medium), straight 1.0, 0.5, 0, 0, 0.

    A shorter time limit is long enough for that."""
    env, success = envs.make("pointmaze-medium-navigate-v0"), {}
    monkeypatch.setattr(env, "random_pairs", lambda *_: (env.cells[:1], env.cells[:1]))
    for kind in baselines.CONTROLLERS:
        config = baselines.resolve({"env": env.name, "agent": kind, "eval_episodes": 12})
        monkeypatch.setattr(env, "time_limit", 500 if kind == "collector" else 250)
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
    goals = s + [[0.5, -3.0]]
    assert (baselines.controller(env, "straight", None)(s, goals, 0) == [0.5, -1]).all()
    a = baselines.controller(env, "random", np.random.default_rng(0))(s, goals, 0)
    assert a.shape == s.shape and len(np.unique(a)) == a.size
    np.testing.assert_allclose(np.quantile(a, [0, 0.25, 0.5, 1], axis=0), [
        [-1, -1], [-0.5, -0.5], [0, 0], [1, 1]], atol=0.02)


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
        a = act(starts, goals, 0)
        way = env.follow(starts, env.number(goals), 0.0, np.random.default_rng(0))
        assert a.shape == starts.shape and (a != act(goals, starts, 0)).any()
        assert (a == np.clip(goals - starts, -1, 1)).all() == (kind == "straight")
        assert (np.abs(a - np.clip(way, -1, 1)).mean() < 0.5) == (kind == "collector")
        return np.ones(len(starts), bool), np.ones(len(starts)), np.array([starts, goals])

    monkeypatch.setattr(offline, "rollout", at_once)
    assert run("--eval", out) == 0
    assert "success: 1.0\n" in capsys.readouterr().out


# ------------------------------------------------------------------------- flags and refusals


WRONG = [("--agent sac", "invalid choice"),
         ("--agent flat --subgoal-steps 3", "--subgoal-steps has no effect with --agent flat"),
         ("--agent flat --train-flat", "--train-flat has no effect with --agent flat"),
         ("--agent gcbc --expectile 0.9", "--expectile has no effect with --agent gcbc"),
         ("--agent hgcbc --rep-type phi_g", "--rep-type has no effect with --agent hgcbc"),
         ("--agent flat --env grid-maze --no-const-std", "no effect with --agent flat"),
         ("--agent random --policy-steps 5", "--policy-steps has no effect with --agent random"),
         ("--agent straight --preset paper", "--preset has no effect with --agent straight"),
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


NOTHING = dict(train_flat=False, subgoal_interval=1, steps=1, policy_steps=0)
CLONED = dict(train_flat=False, high_alpha=0, low_alpha=0, flat_alpha=0, policy_steps=0)
CHANGES = {                             # of each agent in hiql's settings
    "hiql": {}, "flat": dict(train_flat=False, subgoal_interval=1),
    "gciql": dict(train_flat=False, subgoal_interval=1), "gcbc": dict(CLONED, subgoal_interval=1),
    "hgcbc": dict(CLONED, rep_type="none", encoding="position"),
    "collector": NOTHING, "straight": NOTHING, "random": NOTHING}


@pytest.mark.parametrize("agent", baselines.AGENTS)
def test_what_an_agent_changes_in_the_defaults(agent):
    """Under every preset; flags go first; a config read back from its run is accepted."""
    large = {"env": "pointmaze-large-stitch-v0"}
    for given in ({}, large, {"quick": True}, {**large, "quick": True}, {"preset": "paper"}):
        changes = dict(CHANGES[agent])
        if "quick" in given and changes.get("policy_steps") != 0:
            changes.update(policy_steps=300 * (given != {"quick": True}))
        plain = given
        if agent in baselines.CONTROLLERS:              # of --quick they take the episodes alone
            if "preset" in given:
                continue
            plain = {name: x for name, x in given.items() if name != "quick"}
            changes.update({"eval_episodes": 4} if "quick" in given else {})
        config = baselines.resolve({"agent": agent, **given})
        expected = {**dataclasses.asdict(hiql.resolve(plain)), **changes, "agent": agent}
        assert dataclasses.asdict(config) == expected, given
        assert baselines.resolve(expected) == config
    assert baselines.resolve({"agent": agent, "eval_episodes": 7}).eval_episodes == 7


def test_the_agent_is_flat_unless_given_and_must_be_known():
    assert baselines.Config.agent == "flat" == baselines.resolve({}).agent
    with pytest.raises(ValueError, match="unknown agent 'sac'; known: hiql, flat, gciql, gcbc"):
        baselines.resolve({"agent": "sac"})


OTHER = dict(                           # than the defaults in the tiny mazes
    seed=1, steps=4, batch_size=7, hidden_dims=(3,), lr=1e-3, lr_decay=False, discount=0.8,
    expectile=0.9, tau=0.5, subgoal_steps=3, high_alpha=1.0, low_alpha=1.0, flat_alpha=1.0,
    rep_dim=5, rep_type="phi_g", const_std=False, subgoal_interval=3, action_free=0.5,
    value_p_curgoal=0.5, value_p_trajgoal=0.2, goal_discount=0.75, actor_p_randomgoal=0.5,
    first_layer_init="glorot", train_flat=True)
OF_GRIDS = dict(temperature=0.5, goal_reached_by="state", const_std=False, subgoal_steps=3)


def fingerprint(config):
    """What a run leaves: its parameters, actions of its agent, on grids its evaluation."""
    problem = baselines.prepare(config)
    agent = offline.init_agent(problem, problem.rngs)
    for _ in problem.learn(problem, agent, problem.rngs["batch"]):
        pass
    env, act = problem.env, offline.agent_actor(problem, agent)
    s = env.place(env.cells[np.random.default_rng(0).integers(len(env.cells), size=(20))])
    seen = [act(np.roll(s, t, 0), s[::-1], t) for t in range(4)]
    assert all(np.isfinite(x).all() for x in flatten(agent["params"]).values())
    return (*(x.tobytes() for x in (*flatten(agent["params"]).values(), *seen)),
            str(problem.evaluate(problem, agent)[0]) if env.discrete else "")


@pytest.mark.parametrize("agent", baselines.AGENTS[1:])
def test_a_field_is_refused_if_it_has_no_effect(agent, tiny, monkeypatch):
    """`unused` holds what changes nothing, whatever its value, and no field that changes a run."""
    controller = agent in baselines.CONTROLLERS
    made = {name: envs.make(name).dataset(np.random.default_rng(0))
            for name in ("point-tiny", "grid-tiny")}
    monkeypatch.setattr(envs.Maze, "dataset", lambda env, rng: copy.copy(made[env.name]))
    for env in ("point-tiny",) if controller else made:
        config = baselines.resolve({"agent": agent, "env": env, "eval_episodes": 1, **(
            {} if controller else dict(hidden_dims=(16,), batch_size=8, steps=3))})
        names, base = set(baselines.unused(config)), fingerprint(config)
        other = {**OTHER, "encoding": "rbf"} if env == "point-tiny" else OF_GRIDS
        if agent == "hgcbc" and env == "point-tiny":
            del other["encoding"], other["rep_type"]    # it has but one
        if controller:
            del other["seed"]                           # of the evaluation alone
        ignored = {name: x for name, x in other.items() if name in names}
        assert fingerprint(dataclasses.replace(config, **ignored)) == base
        for name in set(other) - names:
            changed = dataclasses.replace(config, **{name: other[name]})
            assert fingerprint(changed) != base, (env, name)
    for name in names & set(OTHER):
        with pytest.raises(ValueError, match=f"no effect with --(agent {agent}|rep-type none)"):
            baselines.resolve({"agent": agent, "env": env, name: OTHER[name]})


@pytest.mark.parametrize("name, tags", [
    ("baselines.py", {"D13"}), ("ogbench.py", {"D15", "D16", "D17"}), ("tasks.py", {"E17", "E19"}),
    ("td3.py", {"E18"})])
def test_every_deviation_of_the_lab_is_documented_and_tagged(name, tags):
    """What hiql.py and hiro.py leave to the files that the deviations belong to."""
    with open(os.path.join(HERE, "lab", name)) as file:
        text = file.read()
    code = text.split('"""', 2)[2]
    assert set(re.findall(r"^ *(?:Deviation )?([DE]\d+):? ", text, re.M)) == tags
    assert tags <= set(re.findall(r"\b([DE]\d+)\]", code))


# --------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("agent", list(NETWORKS))
def test_each_agent_learns_all_its_networks_and_acts_by_its_policies(agent, tiny):
    """It has a loss for each of them, and no other; evaluation and `load` ask the same policies."""
    config = baselines.resolve({"agent": agent, "env": "point-tiny", "hidden_dims": (16,),
                                "batch_size": 8, "steps": 3, "eval_episodes": 1})
    problem = baselines.prepare(config)
    state = offline.init_agent(problem, problem.rngs)
    params, before = state["params"], tree_map(np.copy, state["params"])
    assert set(params) == NETWORKS[agent]
    rows = [row for row, _ in problem.learn(problem, state, problem.rngs["batch"])]
    losses = NETWORKS[agent] - {"phi", "target", "v", "q"} | ({"value"} & problem.losses.keys())
    assert len(rows) == 3 and set(rows[0]) == {f"{name}_loss" for name in losses}
    for name, x in flatten(params).items():
        assert name.endswith("log_std") or (x != flatten(before)[name]).any(), name
    s = problem.env.place(problem.env.cells)

    def actions():
        return (problem.actors[agent](params, config, None)(s, s[::-1], 0),
                offline.agent_actor(problem, state)(s, s[::-1], 0))

    plain = actions()
    assert list(problem.actors) == [agent] + ["flat, same value"] * (agent == "hiql")
    policies = {"high", "low"} if agent in ("hiql", "hgcbc") else {"flat"}
    for name in params:
        kept = params[name]
        params[name] = tree_map(lambda w: w + 0.1, kept)
        assert ((actions()[0] != plain[0]).any(), (actions()[1] != plain[1]).any()) == (
            (name in policies,) * 2), name
        params[name] = kept


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
