"""HIQL: hierarchical implicit Q-learning, offline and goal-conditioned. NumPy only.

Park, Ghosh, Eysenbach, Levine 2023, arXiv 2307.11949. From a data set without rewards learn
  V(s, phi([s; g]))   the value: minus the discounted number of steps to the goal; without
                      actions, by expectile regression
  pi_h(z | s, g)      the high-level policy: the representation z = phi([s; w]) of the state w
                      that lies k steps ahead (others call this policy the manager)
  pi_l(a | s, z)      the low-level policy: the action that leads there (the worker)
Both policies learn by advantage-weighted regression (AWR) from that one value.

    python hiql.py            trains on point-medium, two to six minutes on one core; leaves logs,
                              checkpoint, summary and pictures in runs/
    python hiql.py --help     every flag with its meaning and, where it differs, its published value

In order, by support/run.py and support/offline.py: `resolve` makes the config from the flags,
`prepare` makes the maze and collects its data; then in `train` `init_params` makes the networks,
`learn` trains them (every eval_interval updates it is interrupted to evaluate the actors and to
save a checkpoint), `draw` makes the pictures, and the summary is printed. One update of `learn`: a
batch, all losses with their gradients, target EMA, Adam.

Gradients: `value_loss` changes the value heads and phi, at the current state alone; each policy's
loss changes that policy alone. All else is constant: the target network, phi anywhere else, the
advantages and weights. A layer or net returns (output, back), and back(d output) returns
(d input, d parameters); a constant is `stop_gradient(x)`, and its back is not called.

Symbols inside the losses: s, s1 state and next state, g goal, w state k steps ahead (subgoal),
a action, r reward in {-1, 0}, m mask, z representation, v value, t value by the target network,
adv advantage A. Shapes: batch B, states S (as encoded), goals G (S, or with goal_indices fewer),
representation R (S without phi), actions (B, a), in mazes a = 2, or (B,) integers, two value heads:
v (2, B).
The paper's text was not at hand: what it says is known from code and papers about it, equation
numbers are as remembered, and only Eq. (4) is confirmed.

Deviations: where the paper, its authors' code (seohongpark/HIQL) and OGBench's code
(seohongpark/ogbench, impls/agents/hiql.py) differ, what is done here, and why. "Both codes" are
the latter two. D13 stands in lab/baselines.py, D15 to D17 in lab/ogbench.py.
 D1  The expectile's weight follows the target network's residual (both codes), not that of the
     learned value (paper): it then does not depend on the heads that are being fitted.
 D2  Two value heads (both codes; paper: one). The weight takes the smaller target head at s' and
     the mean of both at s, which guards against over-estimation. Each head regresses to its own
     target head; the losses add.
 D3  The target network is the EMA of the value heads alone, of their parameters before the step.
     phi is one current network, shared by all, and learns from the value loss alone (both codes):
     the policies shall not change the representation that the value relies on.
 D4  A = V(w, g) - V(s, g) and V(s', w) - V(s, w), mean of the learned heads (both codes;
     reportedly the paper too): the n-step advantage without its reward and discount terms, which
     hardly depend on the action.
 D5  A goal counts as reached in the very row of the data that it was taken from ("index", both
     codes), not in every equal state (`--goal-reached-by state`): continuous states are never
     equal. In a row that reaches its goal r = m = 0, so that goals absorb; else r = -1, m = 1.
 D6  A trajectory's very last row has no transition and is never a goal (OGBench; the authors' code
     allows it). Subgoals are the state k steps ahead; those of the high-level policy are cut at its
     goal, those of the low-level policy at the last transition. Policy goals come from the
     trajectory's future (OGBench on navigate data; the authors' code takes 30 % random ones,
     OGBench half on stitch data: `--actor-p-randomgoal`).
 D7  Policies are Gaussians of std 1 (OGBench) or of one learned std (authors' code:
     `--no-const-std`, without its bounds on log std), categorical for discrete actions; with GELU
     and without LayerNorm (OGBench; authors' code: ReLU). Value and phi: Dense, GELU, LayerNorm
     (both codes).
 D8  phi([s; g]) of length sqrt(R), without epsilon (both codes). The paper's text has phi(g)
     (`--rep-type phi_g`), which did worse in its experiments. `none` is the authors' variant
     without phi: the high-level policy predicts the difference w - s.
 D9  All networks learn in one step (both codes), which is simpler; the paper trains the value
     first and then the policies (`--policy-steps`).
 D10 Acting: the high-level policy is asked at every step (both codes) or every few
     (`--subgoal-interval`; the paper: every k). Its mean is scaled to length sqrt(R), the length of
     its targets; without phi the subgoal is s plus the mean. Actions are the mean, clipped.
     Discrete actions are drawn at `--temperature` (2 on grids), because the likeliest one, at 0,
     may push against a wall for ever.
 D11 AWR weights min(exp(alpha A), 100) as both codes. The exponent is clipped instead of the
     weight, since exp overflows float32.
 D12 Sizes and rates of the default run are tuned for minutes instead of days. Published
     (OGBench): 512x3 units, batches of 1024, 10^6 updates, Adam 3e-4, tau 0.005, inverse
     temperatures 3, discount 0.99, k 25. Here: 128x3, 256, 5,000, Adam 2e-3 that falls linearly
     to 0 over the second half (of each phase [D9]), tau 0.1, inverse temperatures 10; discount
     0.98 and k 8, tuned for a robot four times as fast as OGBench's. `--preset paper` takes the
     published rates, inverse temperatures and initialisation, not sizes, discount and k.
 D14 First layers start with weights 8 / (side of a cell) times Glorot's, and with biases that put
     the bend of each unit at randomly drawn states of the data (`init_net`). From Glorot's weights
     and biases 0 (both codes; `--first-layer-init glorot`) a few thousand updates leave the value
     smooth across walls. Data without a maze are brought to the same scale (`envs.DataAlone`).
     Last layers of policies start at 0.1 times Glorot's (both codes).
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import math
import sys
from dataclasses import dataclass
from functools import cached_property

import numpy as np

import envs
from nets import (adam, categorical_log_prob, ema, gaussian_log_prob, init_mlp,
                  length_normalize, mlp, stop_gradient, tree_map)
from support import offline, plots
from support.flags import (INDICES, NOT_NEGATIVE, POSITIVE, SIZES, check_ranges, option,
                           refuse_unused)
from support.run import load_run, main

COUNTER = "update"                      # what support/run.py counts


@dataclass
class Config:
    """Everything that decides a run; `resolve` puts in what the environment changes."""

    env: str = option("point-medium", "environment; none: --dataset without one",
                      (*envs.ENVIRONMENTS, "none"))
    preset: str = option("fast", "fast: tuned here; paper: the published learning rate, tau, "
                         "inverse temperatures and initialisation [D12]", ("fast", "paper"))
    dataset: str = option("", "npz file in OGBench's layout; without it the data is collected")
    seed: int = option(0, "seed of everything random, the collected data included; OGBench's "
                       "mazes have one data set for all seeds", NOT_NEGATIVE)
    steps: int = option(5000, "updates; with --policy-steps those of the value (published: "
                        "1,000,000)", POSITIVE)
    policy_steps: int = option(0, "0: all networks learn in one step; N: the value first, then "
                               "the policies for N updates [D9]", NOT_NEGATIVE)
    batch_size: int = option(256, "transitions in a batch (published: 1024)", POSITIVE)
    hidden_dims: tuple = option((128, 128, 128), "hidden layers of every network (published: "
                                "512,512,512)", SIZES)
    lr: float = option(2e-3, "Adam's learning rate (published: 3e-4)", POSITIVE)
    lr_decay: bool = option(True, "learning rate falls linearly to 0 over the second half "
                             "(published: constant) [D12]")
    discount: float = option(0.98, "discount gamma (published: 0.99)", "in (0, 1)")
    expectile: float = option(0.7, "expectile of Eq. (4), the paper's tau (published: 0.7)",
                              "in (0, 1)")
    tau: float = option(0.1, "EMA rate of the target network (published: 0.005)", "in (0, 1)")
    subgoal_steps: int = option(8, "k: a subgoal is the state so many steps ahead (published: 25)",
                                POSITIVE)
    high_alpha: float = option(10.0, "inverse temperature of the high-level policy's AWR "
                               "(published: 3; authors' code: 1)", NOT_NEGATIVE)
    low_alpha: float = option(10.0, "inverse temperature of the low-level policy's AWR "
                              "(published: 3; authors' code: 1)", NOT_NEGATIVE)
    flat_alpha: float = option(10.0, "inverse temperature of the flat policy's AWR (OGBench: 10)",
                               NOT_NEGATIVE)
    rep_dim: int = option(10, "size R of phi (published: 10)", "at least 2")
    rep_type: str = option("phi_sg", "representation of subgoals: phi([s; g]), phi(g) or none "
                           "[D8]", ("phi_sg", "phi_g", "none"))
    const_std: bool = option(True, "Gaussian policies have std 1, else a learned one [D7]")
    encoding: str = option("position", "what networks see of a state: its position; on point "
                           "mazes also rbf, direction or rbf+direction (lab/ogbench.py [D15])")
    temperature: float = option(0.0, "of the softmax that discrete actions are drawn from; 0: the "
                                "likeliest action",
                                NOT_NEGATIVE)
    subgoal_interval: int = option(1, "steps from one subgoal to the next when acting [D10]",
                                   POSITIVE)
    action_free: float = option(0.0, "fraction of trajectories whose actions are hidden; value "
                                "and high-level policy use them all the same", "in [0, 1]")
    value_p_curgoal: float = option(0.2, "value goals: fraction that is the state itself "
                                    "(published: 0.2)", "in [0, 1]")
    value_p_trajgoal: float = option(0.5, "value goals: fraction from the trajectory's geometric "
                                     "future (published: 0.5); the rest is random", "in [0, 1]")
    goal_discount: float = option(0.0, "discount of the trajectory goals' geometric future; "
                                  "0: the value's (published)", "in [0, 1)")
    actor_p_randomgoal: float = option(0.0, "policy goals: fraction of random ones (published: 0, "
                                       "stitch data 0.5; authors' code: 0.3) [D6]", "in [0, 1]")
    first_layer_init: str = option("data", "first layers: weights and biases such that units "
                                   "bend at data points, or Glorot and 0 (published) [D14]",
                                   ("data", "glorot"))
    goal_indices: tuple = option((), "entries of a state that make a goal, such as 0,1 of a "
                                 "position; none: all", INDICES)
    goal_reached_by: str = option("index", "when a goal counts as reached in the data [D5]",
                                  ("index", "state"))
    train_flat: bool = option(True, "also train a flat policy on the same value, to compare")
    eval_episodes: int = option(20, "evaluation episodes for each task (published: 50)", POSITIVE)
    eval_interval: int = option(1000, "updates between evaluations and checkpoints", POSITIVE)

    @cached_property
    def encode(self):
        """The `envs.Encoding` of this environment: what the networks see."""
        return envs.make(self.env).encoding(self.encoding)

    @cached_property
    def discrete(self):
        """Whether actions are integers."""
        return envs.make(self.env).discrete

    def goal(self, s):
        """What of states (..., S) makes a goal: (..., G), the entries goal_indices, or all."""
        return s[..., self.goal_indices] if self.goal_indices else s


PUBLISHED = dict(lr=3e-4, lr_decay=False, tau=0.005, high_alpha=3.0, low_alpha=3.0,
                 first_layer_init="glorot")                                     # [D12]
QUICK = dict(steps=300, batch_size=128, hidden_dims=(64, 64), eval_interval=150, eval_episodes=4)


def resolve(given, config_class=Config, changes=None):
    """A whole Config: defaults, changed by environment, preset, `changes`, --quick, flags given.

    changes: those of an agent of lab/baselines.py. ValueError: a value out of its range, or values
    that do not go together.
    """
    given = dict(given)
    env = given.setdefault("env", "none" if given.get("dataset") else Config.env)
    preset = given.get("preset", Config.preset)
    values = {**envs.make(env).settings(preset), **(PUBLISHED if preset == "paper" else {}),
              **(changes or {})}
    if given.pop("quick", False):
        values.update(QUICK)
        values["policy_steps"] = values["steps"] if values.get("policy_steps") else 0
    if given.get("rep_type", values.get("rep_type")) == "none":
        values.pop("encoding", None)                    # the subgoal is w - s, of positions
    config = config_class(**{**values, **given})
    check_ranges(config)
    refuse_unused(config, config_class(**values), {
        "rep_dim": config.rep_type == "none" and "--rep-type none",
        "flat_alpha": not (config.train_flat or changes) and "--no-train-flat"})
    if config.value_p_curgoal + config.value_p_trajgoal > 1:
        raise ValueError("--value-p-curgoal and --value-p-trajgoal must not exceed 1 together; the "
                         "rest are random goals")
    if config.temperature and config.discrete is False:
        raise ValueError(f"--temperature is for the discrete actions of grids, not for {env}")
    if config.encoding != "position" and (config.discrete or config.rep_type == "none"):
        raise ValueError(f"--encoding {config.encoding} is for point mazes and subgoals by phi")
    if config.goal_indices and (env != "none" or config.rep_type == "none"):
        raise ValueError("--goal-indices is for --env none, since mazes have positions alone, and "
                         "for subgoals by phi")
    config.encode                                       # refuses an encoding that does not exist
    return config


# -------------------------------------------------------------------------------------- data


def sample(data, rng, config):
    """One batch of transitions with hindsight goals [D5][D6]: {name: array (B, ...)}.

    Row i of the data is drawn uniformly among those that have a transition; last_transition is
    the last such row of its trajectory, k is subgoal_steps.
    value_goals         row i itself with probability value_p_curgoal (0.2); row
                        min(i + G, last_transition) with value_p_trajgoal (0.5), where
                        G ~ Geometric(1 - discount), or goal_discount; else any row (0.3)
    rewards, masks      r = m = 0 where row i reaches its value goal, else r = -1, m = 1
    high_actor_goals    row round(u min(i + 1, last) + (1 - u) last), last = last_transition,
                        u ~ U(0, 1): the two ends have half the weight of a row between them; or
                        with actor_p_randomgoal any row
    high_actor_targets  row min(i + k, goal); if the goal is random, min(i + k, last_transition)
    low_actor_goals     row min(i + k, last_transition)
    flat_actor_goals    as high_actor_goals
    "Any row" is one with a transition. Where some actions are hidden, the low-level and the flat
    policy's rows (low_actor_observations, actions, ...) are drawn among those that are shown.
    """
    obs, valid, k = data.observations, data.valid, config.subgoal_steps
    n = config.batch_size

    def draw(rows):
        return rows[rng.integers(len(rows), size=n)]

    def last_transition(rows):
        return data.last[rows] - 1

    def states(rows):
        return config.encode(obs[rows])

    def goals(rows):
        return config.goal(states(rows))

    def policy_goals(i):
        last, u = last_transition(i), rng.random(n)
        goal = np.rint(np.minimum(i + 1, last) * u + last * (1 - u)).astype(int)
        subgoal = np.minimum(i + k, goal)
        if config.actor_p_randomgoal:
            other = rng.random(n) < config.actor_p_randomgoal
            goal = np.where(other, draw(valid), goal)
            subgoal = np.where(other, np.minimum(i + k, last), subgoal)
        return goal, subgoal

    i = draw(valid)
    ahead = rng.geometric(1 - (config.goal_discount or config.discount), n)
    future = np.minimum(i + ahead, last_transition(i))
    u = rng.random(n)
    goal = np.where(u < config.value_p_curgoal, i, np.where(
        u < config.value_p_curgoal + config.value_p_trajgoal, future, draw(valid)))
    reached = goal == i if config.goal_reached_by == "index" else (
        config.goal(obs[goal]) == config.goal(obs[i])).all(-1)
    high_goal, high_target = policy_goals(i)
    batch = {"observations": states(i), "next_observations": states(i + 1),
             "value_goals": goals(goal), "masks": (~reached).astype(np.float32),
             "high_actor_goals": goals(high_goal), "high_actor_targets": states(high_target)}
    batch["rewards"] = -batch["masks"]
    j, low = i, (batch["observations"], batch["next_observations"], batch["high_actor_goals"])
    if len(data.labelled) < len(valid):
        j = draw(data.labelled)
        low = states(j), states(j + 1), goals(policy_goals(j)[0])
    batch.update(zip(("low_actor_observations", "low_actor_next_observations",
                      "flat_actor_goals"), low))
    batch["actions"] = data.actions[j]
    batch["low_actor_goals"] = goals(np.minimum(j + k, last_transition(j)))
    return batch


# ---------------------------------------------------------------------------------- networks


def concat(*arrays):
    """Arrays (B, .) side by side: [s; z]."""
    return np.concatenate(arrays, axis=-1)


def phi(params, s, g, config):
    """Representation z (B, R) of g as seen from s, of length sqrt(R); back(dz) -> grads.

    With rep_type "none" g itself [D8].
    """
    if config.rep_type == "none":
        return g, lambda dz: {}
    h, back_mlp = mlp(params["phi"], config.encode.pair(s, g) if config.rep_type == "phi_sg" else g)
    z, back_length = length_normalize({}, h)
    return z, lambda dz: {"phi": back_mlp(back_length(dz)[0])[1]}


def value(p, s, z):
    """Both value heads (2, B) at s (B, S) and z (B, R); back(dv) -> (dz, grads)."""
    v, back_mlp = mlp(p, concat(s, z))

    def back(dv):
        dx, grads = back_mlp(dv[..., None])
        return dx[:, s.shape[1]:], grads

    return v[..., 0], back


def mean_value(params, s, g, config):
    """V(s, phi([s; g])) (B,), the mean of the two heads, as advantages take it [D4]."""
    z, _ = phi(params, s, g, config)
    v, _ = value(params["value"], s, z)
    return v.mean(0)


def init_net(rng, config, env, data, inputs, n_out, **kind):
    """Parameters of an `mlp`; kind: of `nets.init_mlp`.

    inputs: a letter for each input: s, g states, z a representation, a an action, d what the
    encoding adds to a pair of states.
    First layer [D14]: weights 8 / (side of a cell) times Glorot's; the bias of unit h is
    -x0_h . W[:, h], where x0_h holds a random state of the data for each state (z is one without
    phi) and 0 for the rest. So each unit bends inside the maze, and about as sharply as its
    corridors do.
    """
    state = config.encode(data.observations[:1]).shape[-1]
    rep = state if config.rep_type == "none" else config.rep_dim
    sizes = {"s": state, "g": len(config.goal(np.zeros(state))), "d": config.encode.extra,
             "z": rep, "a": env.action_dim}
    p = init_mlp(rng, (sum(sizes[x] for x in inputs), *config.hidden_dims, n_out), **kind)
    if config.first_layer_init == "data":
        w = p["dense0"]["W"]                                    # (I, H) or (2, I, H)
        units = w.shape[:-2] + w.shape[-1:]
        states = "sgz" if config.rep_type == "none" else "sg"
        x0 = [config.encode(data.observations[rng.choice(data.valid, units)]) if x in states
              else np.zeros(units + (sizes[x],), np.float32) for x in inputs]
        x0 = [config.goal(x) if name == "g" else x for name, x in zip(inputs, x0)]
        w *= 8 / env.side
        p["dense0"]["b"][:] = -np.einsum("...ih,...hi->...h", w, concat(*x0))
    return p


def init_policy(rng, config, env, data, inputs, n_out, gaussian=True):
    """Parameters of a policy [D7]; its last layer starts at 0.1 times Glorot's [D14]."""
    p = init_net(rng, config, env, data, inputs, n_out, last_scale=0.1)
    if gaussian and not config.const_std:
        p["std"] = {"log_std": np.zeros(n_out, np.float32)}
    return p


def init_value(rng, config, env, data):
    """Parameters of phi, of the two value heads, and of their target [D3]."""
    params, seen = {}, "sgd" if config.rep_type == "phi_sg" else "g"
    if config.rep_type != "none":
        params["phi"] = init_net(rng, config, env, data, seen, config.rep_dim, norm=True)
    params["value"] = init_net(rng, config, env, data, "sz", 1, norm=True, ensemble=2)
    params["target"] = {"value": tree_map(np.copy, params["value"])}
    return params


def init_params(config, env, data, rngs):
    """Parameters of all networks, float32; rngs: generators "init" and "flat"."""
    setting, rng = (config, env, data), rngs["init"]
    rep, gaussian = config.rep_dim, not env.discrete
    if config.rep_type == "none":
        rep = data.observations.shape[-1]
    params = init_value(rng, *setting)
    params["high"] = init_policy(rng, *setting, "sgd", rep)
    params["low"] = init_policy(rng, *setting, "sz", env.action_dim, gaussian)
    if config.train_flat:
        params["flat"] = init_policy(rngs["flat"], *setting, "sgd", env.action_dim, gaussian)
    return params


# ------------------------------------------------------------------------------------- losses


def expectile_weight(expectile, adv):
    """|expectile - 1(A < 0)|, the weight of the squared error in expectile regression; (B,)."""
    return np.where(adv.real >= 0, expectile, 1 - expectile).astype(adv.real.dtype)


def awr_weight(alpha, adv):
    """min(exp(alpha A), 100), by clipping the exponent: nothing overflows [D11]; (B,)."""
    return np.exp(np.minimum(alpha * adv, math.log(100)))


def awr(name, p, x, target, weight):
    """L = -mean(weight log pi(target | x)), pi the policy `name` -> loss, grads, info.

    pi: Gaussian with mean mlp(x) and std 1 or learned [D7], or categorical if target is integers.
    x (B, .); target (B, .), or (B,) integers; weight (B,). Constants: all three.
    """
    output, back_mlp = mlp(p, x)
    log_density = categorical_log_prob if target.dtype.kind == "i" else gaussian_log_prob
    log_prob, back_density = log_density(p.get("std", {}), output, target)
    d_output, d_std = back_density(-weight / len(x))
    grads = back_mlp(d_output)[1]
    info = {"weight": weight, "mean": output, "log_prob": log_prob}
    return -(weight * log_prob).mean(), {name: {**grads, **({"std": d_std} if d_std else {})}}, info


def value_loss(params, batch, config):
    """Expectile regression of the action-free value, Eq. (4) [D1][D2][D3].

    q_j = r + gamma m T_j(s', z'),  A = r + gamma m min_j T_j(s', z') - mean_j T_j(s, z)
    L_V = sum_j mean( |expectile - 1(A < 0)| (q_j - V_j(s, z))^2 ),  z = phi([s; g]), z' at s'
    -> loss, grads, info, as all losses here.
    s, s', g (B,S); r in {-1, 0} and m = -r (B,). T: target network.
    Constants: T, phi at s', phi as T sees it, hence q and the weight. Learned: V and phi at s.
    """
    s, s1, g, r, m = (batch[x] for x in ("observations", "next_observations", "value_goals",
                                         "rewards", "masks"))
    z, back_phi = phi(params, s, g, config)
    z1 = stop_gradient(phi(params, s1, g, config)[0])
    v, back_v = value(params["value"], s, z)
    t = stop_gradient(value(params["target"]["value"], s, stop_gradient(z))[0])
    t1 = stop_gradient(value(params["target"]["value"], s1, z1)[0])
    q = r + config.discount * m * t1
    q_min = r + config.discount * m * t1.min(0)
    adv = q_min - t.mean(0)
    weight = expectile_weight(config.expectile, adv)
    error = q - v
    dz, grads = back_v(-2 / len(s) * weight * error)
    info = {"v": v, "target": t, "target_next": t1, "q": q_min, "adv": adv, "phi": z}
    return (weight * error * error).mean(-1).sum(), {"value": grads, **back_phi(dz)}, info


def high_loss(params, batch, config):
    """High-level policy by AWR, J_h (Eq. 6): A = V(w, g) - V(s, g), w the state k steps ahead.

    L = -mean( min(exp(alpha A), 100) log pi_h(phi([s; w]) | s, g) ).   s, g, w (B,S).
    Constants: A, phi [D3].
    """
    s, g, w = (batch[x] for x in ("observations", "high_actor_goals", "high_actor_targets"))
    adv = stop_gradient(mean_value(params, w, g, config) - mean_value(params, s, g, config))
    z = stop_gradient(phi(params, s, config.goal(w), config)[0])
    target = w - s if config.rep_type == "none" else z                          # [D8]
    loss, grads, info = awr("high", params["high"], config.encode.pair(s, g), target,
                            awr_weight(config.high_alpha, adv))
    return loss, grads, {**info, "adv": adv, "target": target}


def low_loss(params, batch, config):
    """Low-level policy by AWR, J_l (Eq. 7): A = V(s', w) - V(s, w), w the state k steps ahead.

    L = -mean( min(exp(alpha A), 100) log pi_l(a | s, phi([s; w])) ).
    s, s', w (B,S); a (B,2) or (B,).
    Constants: A, phi [D3].
    """
    s, s1, a, w = (batch[x] for x in ("low_actor_observations", "low_actor_next_observations",
                                      "actions", "low_actor_goals"))
    z, z1 = (stop_gradient(phi(params, x, w, config)[0]) for x in (s, s1))
    v, v1 = (value(params["value"], *x)[0].mean(0) for x in ((s, z), (s1, z1)))
    adv = stop_gradient(v1 - v)
    loss, grads, info = awr("low", params["low"], concat(s, z), a,
                            awr_weight(config.low_alpha, adv))
    return loss, grads, {**info, "adv": adv, "phi": z}


def flat_loss(params, batch, config):
    """One policy without hierarchy, to compare, Eq. (5): A = V(s', g) - V(s, g).

    L = -mean( min(exp(alpha A), 100) log pi(a | s, g) ).   s, s', g (B,S); a (B,2) or (B,).
    Constants: A.
    """
    s, s1, a, g = (batch[x] for x in ("low_actor_observations", "low_actor_next_observations",
                                      "actions", "flat_actor_goals"))
    adv = stop_gradient(mean_value(params, s1, g, config) - mean_value(params, s, g, config))
    return awr("flat", params["flat"], config.encode.pair(s, g), a,
               awr_weight(config.flat_alpha, adv))


LOSSES = {"value": value_loss, "high": high_loss, "low": low_loss}


# ---------------------------------------------------------------------------------- the loop


def learn(problem, agent, rng):
    """HIQL: sample, losses, target EMA, Adam. Yields {loss: value} after each update, and True:
    the run may stop there.

    agent: {params, optimiser, update}, changed in place. All gradients come before any change; the
    target, of the value heads alone, follows their values before the step [D3]. A phase [D9] has
    its own Adam.
    """
    config, params = problem.config, agent["params"]
    for u in range(int(agent["update"]), config.steps + config.policy_steps):
        if u in (0, config.steps):
            agent["optimiser"] = offline.init_optimiser(params)
        losses, lr = schedule(problem.losses, config, u)
        batch = sample(problem.data, rng, config)
        values, grads = {}, {}
        for name, loss in losses.items():
            values[f"{name}_loss"], gradient, _ = loss(params, batch, config)
            grads.update(gradient)
        if "value" in losses:
            ema(params["target"], params, config.tau)
        adam(params, grads, agent["optimiser"], lr)
        agent["update"] += 1
        yield values, True


def schedule(losses, config, u):
    """The losses of update u, and its learning rate [D9][D12]."""
    at, steps = u, config.steps
    if config.policy_steps:
        losses = {name: f for name, f in losses.items() if (name == "value") == (u < steps)}
        at, steps = (u, steps) if u < steps else (u - steps, config.policy_steps)
    decay = min(1, 2 * (1 - at / steps)) if config.lr_decay else 1
    return losses, config.lr * decay


# ----------------------------------------------------------------------- acting and evaluation


def subgoal(params, s, g, config):
    """What the high-level policy asks for: its mean, scaled to length sqrt(R); without phi, s plus
    its mean [D10]."""
    z, _ = mlp(params["high"], config.encode.pair(s, g))
    return s + z if config.rep_type == "none" else length_normalize({}, z)[0]


def choose_action(output, config, rng):
    """A policy's output (N, A) as actions: the mean, clipped; on grids (N,) integers, drawn at the
    temperature [D10]."""
    if config.discrete:                                 # Gumbel noise draws by softmax(out / T)
        return (output + config.temperature * rng.gumbel(size=output.shape)).argmax(-1)
    return np.clip(output, -1, 1)


def hierarchical_actor(params, config, rng):
    """act(s (N,d), g (N,G), t) -> actions of N episodes at step t, by both policies."""
    memory, dtype = {}, params["low"]["dense0"]["W"].dtype

    def act(s, g, t):
        s, g = config.encode(s.astype(dtype)), config.encode(g.astype(dtype))
        if t % config.subgoal_interval == 0:
            memory["z"] = subgoal(params, s, g, config)
        output, _ = mlp(params["low"], concat(s, memory["z"]))
        return choose_action(output, config, rng)

    return act


def flat_actor(params, config, rng):
    """act(s, g, t) as `hierarchical_actor`'s, by the flat policy."""
    dtype = params["flat"]["dense0"]["W"].dtype

    def act(s, g, t):
        s, g = config.encode(s.astype(dtype)), config.encode(g.astype(dtype))
        output, _ = mlp(params["flat"], config.encode.pair(s, g))
        return choose_action(output, config, rng)

    return act


def value_map(params, s, g, config):
    """`mean_value` (N,) of observations s, g (N,2), for pictures and measurements."""
    s, g = config.encode(s.astype(np.float32)), config.encode(g.astype(np.float32))
    return mean_value(params, s, g, config)


# ------------------------------------------------------------------------------------- a run


def prepare(config, checkpoint=None, **given):
    """The problem of a config, see support/offline.py, which has the arguments."""
    losses, actors, title = dict(LOSSES), {"hiql": hierarchical_actor}, "hiql"
    if config.train_flat:
        losses["flat"], actors["flat, same value"] = flat_loss, flat_actor
        title += " and, to compare, a flat policy on the same value"
    return offline.prepare(config, checkpoint, losses=losses, actors=actors, title=title,
                           init_params=init_params, sample=sample, learn=learn, draw=draw, **given)


def train(data, config, evaluate=None, run=None):
    """Train on an `envs.Dataset`; config: of `resolve`, with env "none" for data of any other
    environment than those of envs.py.

    evaluate(act) -> {name: number}, such as the success: called now and then and at the end. act(s
    (N,d), g (N,G), t) -> actions; G: see goal_indices. Without it mazes have their own evaluation,
    and other data none. run: a `support.run.Run`; without one nothing is written. -> see
    `offline.train`. ValueError: what `offline.prepare` refuses.
    """
    return offline.train(prepare(config, data=data, evaluate=evaluate), run)


def load(folder):
    """act(s (N,d), g (N,G), t) -> actions of a trained run; s, g observations, t the step."""
    problem, agent = load_run(sys.modules[__name__], folder)
    return offline.agent_actor(problem, agent)


def subgoal_places(params, s, g, points, config):
    """Where the high-level policy sends states s (T,2) with one goal g (1,2): (T,2).

    A subgoal is a representation; it is drawn at that one of the points w (n,2) whose
    phi([s; w]) is nearest to it.
    """
    s, g, w = (config.encode(x.astype(np.float32)) for x in (s, g, points))
    nearest = []
    for x in s[:, None]:
        z = subgoal(params, x, g, config)
        there, _ = phi(params, x.repeat(len(w), 0), w, config)
        nearest.append(((there - z) ** 2).sum(1).argmin())
    return points[nearest]


def draw(problem, agent, run, shown):
    """The pictures of a run; on mazes the last one has the value and the subgoals asked for."""
    config, params = problem.config, agent["params"]

    def values(points, goal):
        return value_map(params, points, goal.repeat(len(points), 0), config)

    def subgoals(path, goal, points):
        starts = path[::config.subgoal_steps]
        return starts, subgoal_places(params, starts, goal, points, config)

    offline.draw(problem, agent, run, shown)
    if "value" in params and shown:
        plots.draw_value(run.path("value.png"), problem.env, values, next(iter(shown.values())),
                         subgoals if "high" in params else None)


evaluate_checkpoint = offline.evaluate_checkpoint

if __name__ == "__main__":
    main(sys.modules[__name__])         # which takes the names above from this module
