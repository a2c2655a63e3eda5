"""What HIQL is compared with: flat, gciql, gcbc, hgcbc, and controllers that learn nothing.

    python -m lab.baselines --agent gciql            also takes those flags of hiql.py that
                                                     have an effect on the agent
    python -m lab.baselines --agent hiql --env grid-fourrooms       hiql itself; on grids the
                                                     summary has its shares of wrong first actions

flat    one policy by AWR on HIQL's own value (Eq. 5)
gciql   goal-conditioned IQL (Kostrikov et al. 2021): V and Q of positions, no phi
gcbc    behaviour cloning, given hindsight goals; hgcbc: the same with HIQL's two policies
collector, straight, random         on point mazes: the controller that collected the data,
                                    straight at the goal, uniform actions

Deviation D13: `flat` has phi and hiql's expectile (OGBench's GCIVL: no phi, 0.9). `gciql` extracts
its policy by AWR from the learned Q and has hiql's expectile, so that it differs from flat in the
value alone (IQL: from the target Q; OGBench's published GCIQL: by DDPG+BC at expectile 0.9).
"""

import hiql                             # first: it sets one BLAS thread before numpy loads

import sys
from dataclasses import dataclass, fields

import numpy as np

from lab.theory import wrong_first_actions
from nets import mlp, stop_gradient, tree_map
from support import offline
from support.flags import option, refuse_unused
from support.run import main

COUNTER = "update"
CONTROLLERS = ("collector", "straight", "random")
CLONES = ("gcbc", "hgcbc")
AGENTS = ("hiql", "flat", "gciql", *CLONES, *CONTROLLERS)


@dataclass
class Config(hiql.Config):
    """hiql's config and the agent that takes its place."""

    agent: str = option("flat", "hiql; flat: one policy on the same value; gciql; gcbc, hgcbc: "
                        "behaviour cloning, flat and hierarchical; on point mazes, without "
                        "learning: the data's collector, straight at the goal, random", AGENTS)


ALPHAS = {"high_alpha", "low_alpha"}
HIERARCHY = {*ALPHAS, "subgoal_steps", "subgoal_interval"}
PHI = {"rep_type", "rep_dim"}
VALUE = {"discount", "expectile", "tau", "value_p_curgoal", "value_p_trajgoal", "goal_discount",
         "goal_reached_by", "policy_steps", "flat_alpha"}
UNUSED = {                              # fields of Config without effect on an agent
    "hiql": set(), "flat": {"train_flat", *HIERARCHY}, "gciql": {"train_flat", *HIERARCHY, *PHI},
    "gcbc": {"train_flat", *HIERARCHY, *PHI, *VALUE},
    "hgcbc": {"train_flat", *ALPHAS, *PHI, *VALUE},
    **dict.fromkeys(CONTROLLERS, {field.name for field in fields(Config)} - {
        "agent", "env", "seed", "eval_episodes"})}


def unused(config):
    """The UNUSED fields of a config's agent in its environment, in the order of Config."""
    names = set(UNUSED[config.agent])
    if config.discrete and config.agent == "flat":
        names.remove("subgoal_steps")                   # `wrong_first_actions` takes them
    if config.discrete and config.agent in ("flat", "gciql", "gcbc"):
        names.add("const_std")                          # no Gaussian policy
    return [field.name for field in fields(config) if field.name in names]


def resolve(given):
    """A whole Config, as `hiql.resolve`. ValueError also: flags without effect on the agent."""
    agent, changes, given = given.get("agent", Config.agent), {}, dict(given)
    if agent not in AGENTS:
        raise ValueError(f"unknown agent {agent!r}; known: {', '.join(AGENTS)}")
    if "none" in (given.get("env"), given.get("dataset") and given.get("env", "none")):
        raise ValueError("--dataset needs the --env that it is of; hiql.py takes data of any other")
    if agent != "hiql":
        changes["train_flat"] = False
    if agent not in ("hiql", "hgcbc"):
        changes["subgoal_interval"] = 1                 # no high-level policy to ask
    if agent in CLONES:                                 # no advantage, no value phase
        changes.update(flat_alpha=0.0, high_alpha=0.0, low_alpha=0.0, policy_steps=0)
    if agent == "hgcbc":
        changes["rep_type"] = "none"                    # there is no value to learn phi from
    if agent in CONTROLLERS:
        changes.update(steps=1, policy_steps=0)         # an update without any loss
        if given.pop("quick", False):
            changes["eval_episodes"] = hiql.QUICK["eval_episodes"]
    config = hiql.resolve(given, Config, changes)
    if agent in CONTROLLERS and config.discrete:
        raise ValueError(f"--agent {agent} is for point mazes, not {config.env}")
    names = unused(config)
    plain = {name: given[name] for name in ("agent", "env", "preset", "quick")
             if name in given and name not in names}
    refuse_unused(config, hiql.resolve(plain, Config, changes),
                  dict.fromkeys(names, f"--agent {agent}"))
    return config


# ------------------------------------------------------------------------------------- losses


def heads(p, *inputs):
    """Values (B,), of an ensemble (2, B), at inputs (B, .) side by side; back(dv) -> grads."""
    v, back = mlp(p, hiql.concat(*inputs))
    return v[..., 0], lambda dv: back(dv[..., None])[1]


def vector(a):
    """Actions as inputs of a network: grid actions (B,) one-hot (B, 5)."""
    return np.eye(5, dtype=np.float32)[a] if a.ndim == 1 else a


def gciql_loss(params, batch, config):
    """V and Q of goal-conditioned IQL (Kostrikov et al. 2021, Eqs. 5 and 6); no phi [D13].

    L_V = mean( |expectile - 1(A < 0)| A^2 ),  A = min_j T_j(s, a, g) - V(s, g)
    L_Q = sum_j mean( (r + gamma m V(s', g) - Q_j(s, a, g))^2 ).   T: target of Q.
    Constants: T and the weight in L_V, V(s', g) in L_Q. s, s', g (B,S); a (B,2) or (B,); r, m (B,).
    """
    s, s1, g, r, m = (batch[x] for x in ("observations", "next_observations", "value_goals",
                                         "rewards", "masks"))
    a, sg = vector(batch["actions"]), config.encode.pair(s, g)
    v, back_v = heads(params["v"], sg)
    q, back_q = heads(params["q"], sg, a)
    adv = stop_gradient(heads(params["target"]["q"], sg, a)[0]).min(0) - v
    weight = hiql.expectile_weight(config.expectile, adv)
    v1 = stop_gradient(heads(params["v"], config.encode.pair(s1, g))[0])
    error = r + config.discount * m * v1 - q
    loss = (weight * adv * adv).mean() + (error * error).mean(-1).sum()
    grads = {"v": back_v(-2 / len(s) * weight * adv), "q": back_q(-2 / len(s) * error)}
    return loss, grads, {"v": v, "adv": adv}


def gciql_policy_loss(params, batch, config):
    """AWR with A = min_j Q_j(s, a, g) - V(s, g), g of `high_actor_goals` [D13]. Constants: A."""
    s, g, a = (batch[x] for x in ("observations", "high_actor_goals", "actions"))
    sg = config.encode.pair(s, g)
    adv = heads(params["q"], sg, vector(a))[0].min(0) - heads(params["v"], sg)[0]
    adv = stop_gradient(adv)
    return hiql.awr("flat", params["flat"], sg, a, hiql.awr_weight(config.flat_alpha, adv))


def clone(name, params, x, target):
    """Behaviour cloning of target by the policy `name` at x: `hiql.awr` with all weights 1."""
    return hiql.awr(name, params[name], x, target, np.ones(len(x), x.dtype))


def gcbc_loss(params, batch, config):
    """L = -mean log pi(a | s, g), g from the trajectory's future."""
    x = config.encode.pair(batch["low_actor_observations"], batch["flat_actor_goals"])
    return clone("flat", params, x, batch["actions"])


def hgcbc_high_loss(params, batch, config):
    """L = -mean log pi_h(w - s | s, g), w the state k steps ahead, but not beyond g."""
    s = batch["observations"]
    x = config.encode.pair(s, batch["high_actor_goals"])
    return clone("high", params, x, batch["high_actor_targets"] - s)


def hgcbc_low_loss(params, batch, config):
    """L = -mean log pi_l(a | s, w), w the state k steps ahead."""
    x = hiql.concat(batch["low_actor_observations"], batch["low_actor_goals"])
    return clone("low", params, x, batch["actions"])


LOSSES = {"flat": {"value": hiql.value_loss, "flat": hiql.flat_loss},
          "gciql": {"value": gciql_loss, "flat": gciql_policy_loss},
          "gcbc": {"flat": gcbc_loss},
          "hgcbc": {"high": hgcbc_high_loss, "low": hgcbc_low_loss},
          **{name: {} for name in CONTROLLERS}}


# --------------------------------------------------------------------------- networks and actors


def init_params(config, env, data, rngs):
    """Parameters of the agent's networks, as `hiql.init_params`."""
    setting, rng, params = (config, env, data), rngs["init"], {}
    gaussian = not env.discrete
    if config.agent == "flat":
        params = hiql.init_value(rng, *setting)
    if config.agent == "gciql":
        params["v"] = hiql.init_net(rng, *setting, "sgd", 1, norm=True)
        params["q"] = hiql.init_net(rng, *setting, "sgda", 1, norm=True, ensemble=2)
        params["target"] = {"q": tree_map(np.copy, params["q"])}
    if config.agent == "hgcbc":
        size = data.observations.shape[-1]
        params["high"] = hiql.init_policy(rng, *setting, "sgd", size)
        params["low"] = hiql.init_policy(rng, *setting, "sz", env.action_dim, gaussian)
    if config.agent in ("flat", "gciql", "gcbc"):
        params["flat"] = hiql.init_policy(rngs["flat"], *setting, "sgd", env.action_dim, gaussian)
    return params


def controller(env, kind, rng):
    """act(s (N,2), g (N,2), t) -> actions (N,2) of a policy that learns nothing, on a point maze.

    kind collector: `env.follow` with noise 0.5, as for the data sets; straight: clip(g - s, -1, 1),
    whatever walls lie between; random: uniform in [-1, 1]^2.
    """
    def act(s, g, t):
        if kind == "random":
            return rng.uniform(-1, 1, s.shape)
        if kind == "straight":
            return np.clip(g - s, -1, 1)
        return env.follow(s, env.number(g), 0.5, rng)

    return act


# ------------------------------------------------------------------------------------- a run


def prepare(config, checkpoint=None):
    """The problem that `train` solves, as `hiql.prepare`."""
    agent = config.agent
    if agent == "hiql":
        problem = hiql.prepare(config, checkpoint)
    else:
        if checkpoint is not None:
            checkpoint.setdefault("params", {})         # a controller saved none
        actor = hiql.hierarchical_actor if agent == "hgcbc" else hiql.flat_actor
        problem = offline.prepare(config, checkpoint, losses=LOSSES[agent], title=agent,
                                  init_params=init_params, sample=hiql.sample, learn=hiql.learn,
                                  actors={agent: actor}, draw=hiql.draw)
    if agent in CONTROLLERS:
        problem.actors = {agent: lambda params, config, rng: controller(problem.env, agent, rng)}
    if agent in ("gciql", "gcbc"):                      # each row needs its action
        problem.data.valid = problem.data.labelled
    problem.evaluate = evaluate
    return problem


def evaluate(problem, agent):
    """As `offline.evaluate_maze`; with HIQL's value on a grid also `wrong_first_actions` by it."""
    summary, shown = offline.evaluate_maze(problem, agent)
    env, config, params = problem.env, problem.config, agent["params"]
    if env.discrete and "value" in params:
        n = len(env.cells)
        v = hiql.value_map(params, env.cells.repeat(n, 0), np.tile(env.cells, (n, 1)), config)
        summary.update(wrong_first_actions(env, v.reshape(n, n), config.subgoal_steps))
    return summary, shown


train, evaluate_checkpoint = offline.train, offline.evaluate_checkpoint

if __name__ == "__main__":
    main(sys.modules[__name__])
