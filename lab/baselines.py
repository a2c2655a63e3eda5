"""What HIQL is compared with: flat, gciql, gcbc, hgcbc, and controllers that learn nothing.

    python -m lab.baselines --agent gciql            also takes those flags of hiql.py
                                                     that have an effect on the agent
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

from dataclasses import dataclass, fields

import numpy as np

import envs
from lab.theory import wrong_first_actions
from nets import mlp, stop_gradient, tree_map
from support.flags import option, parse, refuse_unused
from support.runs import (Program, one_line_errors, open_run, read_run, run_seeds, show,
                          write_json)

CONTROLLERS = ("collector", "straight", "random")
CLONES = ("gcbc", "hgcbc")
AGENTS = ("hiql", "flat", "gciql", *CLONES, *CONTROLLERS)


@dataclass
class Config(hiql.Config):
    """hiql's config and the agent that takes its place."""

    agent: str = option("flat", "hiql; flat: one policy on the same value; gciql; gcbc, hgcbc: "
                        "behaviour cloning, flat and hierarchical; on point mazes, without "
                        "learning: the data's collector, straight at the goal, random", AGENTS)


PROGRAM = Program("-m lab.baselines", Config, "update", hiql.ACTING)

ALPHAS = {"high_alpha", "low_alpha"}
HIERARCHY = {*ALPHAS, "subgoal_steps", "subgoal_interval"}
PHI = {"rep_type", "rep_dim"}
VALUE = {"discount", "expectile", "tau", "value_p_curgoal", "value_p_trajgoal", "goal_discount",
         "policy_steps", "flat_alpha"}
UNUSED = {                              # fields of Config without effect on an agent
    "hiql": set(), "flat": {"train_flat", *HIERARCHY}, "gciql": {"train_flat", *HIERARCHY, *PHI},
    "gcbc": {"train_flat", *HIERARCHY, *PHI, *VALUE},
    "hgcbc": {"train_flat", *ALPHAS, *PHI, *VALUE},
    **dict.fromkeys(CONTROLLERS, {field.name for field in fields(Config)} - {
        "agent", "env", "seed", "eval_episodes"})}


def resolve(given):
    """A whole Config, as `hiql.resolve`. ValueError also: flags without effect on the agent."""
    given, changes = dict(given), {}
    agent = given.get("agent", Config.agent)
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
        if given.pop("published_rates", False):
            raise ValueError(f"--published-rates has no effect with --agent {agent}")
        if given.pop("quick", False):
            changes["eval_episodes"] = hiql.QUICK["eval_episodes"]
    config = hiql.resolve(given, Config, changes)
    names, discrete = set(UNUSED.get(agent, ())), envs.make(config.env).discrete
    if agent in CONTROLLERS and discrete:
        raise ValueError(f"--agent {agent} is for point mazes, not {config.env}")
    if agent == "flat" and discrete:
        names.remove("subgoal_steps")                   # `wrong_first_actions` takes them
    plain = {name: given[name] for name in ("agent", "env", "published_rates", "quick")
             if name in given}
    refuse_unused(config, hiql.resolve(plain, Config, changes),
                  dict.fromkeys(sorted(names), f"--agent {agent}"))
    return config


# ------------------------------------------------------------------------------------- losses


def heads(p, *inputs):
    """Values (B,), of an ensemble (2, B), at inputs (B, .) side by side; back(dv) -> grads."""
    v, back = mlp(p, hiql.concat(*inputs))
    return v[..., 0], lambda dv: back(dv[..., None])[1]


def vector(a):
    """Actions as inputs of a network: grid actions (B,) one-hot (B, 5)."""
    return np.eye(5, dtype=np.float32)[a] if a.ndim == 1 else a


def gciql_loss(params, batch, config, env):
    """V and Q of goal-conditioned IQL (Kostrikov et al. 2021, Eqs. 5 and 6); no phi [D13].

    L_V = mean( |expectile - 1(A < 0)| A^2 ),  A = min_j T_j(s, a, g) - V(s, g)
    L_Q = sum_j mean( (r + gamma m V(s', g) - Q_j(s, a, g))^2 ).   T: target of Q.
    Constants: T and the weight in L_V, V(s', g) in L_Q. s, s', g (B,S); a (B,2) or (B,); r, m (B,).
    """
    s, s1, g, r, m = (batch[x] for x in ("observations", "next_observations", "value_goals",
                                         "rewards", "masks"))
    a, sg = vector(batch["actions"]), env.pair(s, g)
    v, back_v = heads(params["v"], sg)
    q, back_q = heads(params["q"], sg, a)
    adv = stop_gradient(heads(params["target"]["q"], sg, a)[0]).min(0) - v
    weight = hiql.expectile_weight(config.expectile, adv)
    v1 = stop_gradient(heads(params["v"], env.pair(s1, g))[0])
    error = r + config.discount * m * v1 - q
    loss = (weight * adv * adv).mean() + (error * error).mean(-1).sum()
    return loss, {"v": back_v(-2 / len(s) * weight * adv), "q": back_q(-2 / len(s) * error)}


def gciql_policy_loss(params, batch, config, env):
    """AWR with A = min_j Q_j(s, a, g) - V(s, g), g of `high_actor_goals` [D13]. Constants: A."""
    s, g, a = (batch[x] for x in ("observations", "high_actor_goals", "actions"))
    sg = env.pair(s, g)
    adv = heads(params["q"], sg, vector(a))[0].min(0) - heads(params["v"], sg)[0]
    weight = hiql.awr_weight(config.flat_alpha, stop_gradient(adv))
    loss, grads = hiql.awr(params["flat"], sg, a, weight)
    return loss, {"flat": grads}


def clone(name, params, x, target):
    """Behaviour cloning of target by the policy `name` at x: `hiql.awr` with all weights 1."""
    loss, grads = hiql.awr(params[name], x, target, np.ones(len(x), x.dtype))
    return loss, {name: grads}


def gcbc_loss(params, batch, config, env):
    """L = -mean log pi(a | s, g), g from the trajectory's future."""
    x = env.pair(batch["observations"], batch["high_actor_goals"])
    return clone("flat", params, x, batch["actions"])


def hgcbc_high_loss(params, batch, config, env):
    """L = -mean log pi_h(w - s | s, g), w the state k steps ahead, but not beyond g."""
    s = batch["observations"]
    x = env.pair(s, batch["high_actor_goals"])
    return clone("high", params, x, batch["high_actor_targets"] - s)


def hgcbc_low_loss(params, batch, config, env):
    """L = -mean log pi_l(a | s, w), w the state k steps ahead."""
    x = hiql.concat(batch["observations"], batch["low_actor_goals"])
    return clone("low", params, x, batch["actions"])


LOSSES = {"hiql": hiql.LOSSES,
          "flat": {"value": hiql.value_loss, "flat": hiql.flat_loss},
          "gciql": {"value": gciql_loss, "flat": gciql_policy_loss},
          "gcbc": {"flat": gcbc_loss},
          "hgcbc": {"high": hgcbc_high_loss, "low": hgcbc_low_loss},
          **{name: {} for name in CONTROLLERS}}


# --------------------------------------------------------------------- networks and actors


def init_params(config, env, data, rngs):
    """Parameters of the agent's networks, as `hiql.init_params`.

    gciql and gcbc need each row's action: rows whose action is hidden lose their transition, so
    that they are no goals either.
    """
    if config.agent == "hiql":
        return hiql.init_params(config, env, data, rngs)
    if config.agent in ("gciql", "gcbc"):
        data.valid = data.labelled
    setting, rng, params = (config, env, data), rngs["init"], {}
    sees_goal = "state", "goal", "pair"
    if config.agent == "flat":
        params = hiql.init_value(rng, *setting)
    if config.agent == "gciql":
        params["v"] = hiql.init_net(rng, *setting, sees_goal, 1, norm=True)
        params["q"] = hiql.init_net(rng, *setting, (*sees_goal, "action"), 1, norm=True, ensemble=2)
        params["target"] = {"q": tree_map(np.copy, params["q"])}
    if config.agent == "hgcbc":
        size = data.observations.shape[-1]
        params["high"] = hiql.init_policy(rng, *setting, sees_goal, size)
        params["low"] = hiql.init_policy(rng, *setting, ("state", "subgoal"), env.action_dim)
    if config.agent in ("flat", "gciql", "gcbc"):
        params["flat"] = hiql.init_policy(rngs["flat"], *setting, sees_goal, env.action_dim)
    return params


class Controller:
    """A policy on a point maze that learns nothing, acting as `hiql.Actor` does.

    collector: `env.follow` with noise 0.5, as for the data sets; straight: clip(g - s, -1, 1),
    whatever walls lie between; random: uniform in [-1, 1]^2.
    """

    def __init__(self, params, config, env, rng=None):
        self.kind, self.env, self.rng = config.agent, env, rng or np.random.default_rng(0)

    def __call__(self, s, g, t):
        if self.kind == "random":
            return self.rng.uniform(-1, 1, s.shape)
        if self.kind == "straight":
            return np.clip(g - s, -1, 1)
        return self.env.follow(s, self.env.number(g), 0.5, self.rng)


ACTORS = {**dict.fromkeys(("hiql", "hgcbc"), hiql.Actor),
          **dict.fromkeys(("flat", "gciql", "gcbc"), hiql.FlatActor),
          **dict.fromkeys(CONTROLLERS, Controller)}


# ------------------------------------------------------------------------------- the program


def train(config, run=None):
    """A whole run of the agent, as `hiql.train`; on grids its summary has `first_actions` too."""
    agent = config.agent
    if run and run.saved and agent in CONTROLLERS:
        run.saved.agent["optimiser"].update(m={}, v={})         # a file keeps no empty trees
    result = hiql.train(None, config, run=run, losses=LOSSES[agent],
                        actors={agent: ACTORS[agent]}, init_params=init_params)
    more = first_actions(result.agent["params"], config, hiql.make_maze(config))
    result.summary.update(more)
    if run and run.folder and more:
        show(more)
        write_json(run.path("summary.json"), result.summary)
    return result


def first_actions(params, config, env):
    """`wrong_first_actions` by HIQL's value on a grid; {} elsewhere, and for agents without it."""
    if not env.discrete or "value" not in params:
        return {}
    n = len(env.cells)
    v = hiql.value_map(params, env.cells.repeat(n, 0), np.tile(env.cells, (n, 1)), config, env)
    return wrong_first_actions(env, v.reshape(n, n), config.subgoal_steps)


def evaluate_saved(folder):
    """The evaluation of a saved run, as `hiql.evaluate_saved`."""
    saved = read_run(PROGRAM, folder)
    saved.agent.setdefault("params", {})                        # a controller has none
    agent = saved.config.agent
    return hiql.evaluate_saved(saved, hiql.make_maze(saved.config), {agent: ACTORS[agent]})


def main():
    given, call = parse(PROGRAM, __doc__, hiql.WORDS)
    with one_line_errors():
        if call.eval:
            return show(evaluate_saved(call.eval))
        config = resolve(given)
        if call.seeds:
            return run_seeds(PROGRAM, call, given, config)
        with open_run(PROGRAM, call, config) as run:
            train(run.config, run)


if __name__ == "__main__":
    main()
