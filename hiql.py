"""HIQL: hierarchical implicit Q-learning, offline and goal-conditioned. NumPy only.

Park, Ghosh, Eysenbach, Levine 2023, arXiv 2307.11949. From a data set without rewards learn
  V(s, phi([s; g]))     how far the goal is: action-free, by expectile regression
  pi_h(z | s, g)        the manager: the representation z = phi([s; w]) of a state w, k steps ahead
  pi_l(a | s, z)        the worker: the action that leads there
both policies by advantage-weighted regression (AWR) from that one value.

    python hiql.py                    trains on point-medium, about two minutes on one core
    python hiql.py --help             every flag with its meaning and source

Symbols: s, s1 state and next state, g goal, w state k steps ahead (subgoal), a action, r reward
in {-1, 0}, m mask, z representation, v value, t target network's value, adv advantage A.
Shapes: batch B, state S = goal, representation R, twin value heads 2: v (2, B), z (B, R).
Equation numbers are the paper's as remembered, but for Eq. (4), which is confirmed.

Where the paper [P], its authors' code [C] (seohongpark/HIQL) and OGBench's [O] (seohongpark/
ogbench, impls/agents/hiql.py) differ, and what is done here:
 D1  Expectile weight: P from the residual of the learned V; C, O from the target network. As C, O.
 D2  Heads: P one V; C, O two. Minimum over target heads in the weight's next value, their mean in
     its current value, each head regresses to its own target, the losses add. As C, O.
 D3  Target network: the EMA of the two value heads alone, from the parameters before the step;
     phi is one, current, shared, trained by the value loss alone. As C, O.
 D4  A = V(w,g) - V(s,g) and V(s1,w) - V(s,w): the n-step advantage without rewards and discount;
     mean of the online heads. As C, O, and P as others report it.
 D5  Success: the goal is the state's own row of the data ("index"), not an equal state. Reward 0
     and mask 0 there, so goals absorb. As C, O; `--success state` is the alternative.
 D6  Subgoals are exactly k steps ahead, cut at the goal or the trajectory's last row but one, the
     last that has a transition; goals are never the last row. As O; C's goals may be any row.
     Policy goals: the trajectory's future (O on navigate data; C takes 30 % random ones, O half on
     stitch data: `--high-random`).
 D7  Policies: Gaussians with std 1 (O) or a learned one, the same in all states (C): `--std`. As
     O; C keeps log std in [-5, 2], which is not done here. GELU without LayerNorm as O (C: ReLU);
     value and phi: Dense, GELU, LayerNorm as C, O.
 D8  phi: P writes phi(g); P's experiments, C and O use phi([s; g]), scaled to length sqrt(R), no
     epsilon. `--subgoal phi_g` is the former, `none` C's variant without phi, in which the
     manager predicts the difference w - s.
 D9  Schedule: P trains the value, then the policies; C, O all in one step. As C, O, but in the fast
     preset on OGBench's mazes as P [D17]: `--schedule sequential`.
 D10 The manager is asked at every step (C, O), not every k (`--requery`, where the worker goes on
     with the z of the state at which it was asked; in the fast preset on OGBench's mazes every 10,
     which keeps it from wavering between two ways); its mean is scaled to length sqrt(R) before
     the worker sees it, actions are the mean, clipped. Discrete actions are drawn, at
     `--temperature` 2: the likeliest may push against a wall for ever.
 D11 AWR weights min(exp(alpha A), 100): as C, O, with the exponent clipped lest float32 overflow.
 D12 Sizes: O trains 512x3 (C too, but actors 256x2) with batches of 1024 for 10^6 steps. Here
     128x3 and 256; gamma and k are smaller (0.98 and 8, O: 0.99 and 25), since the default maze's
     robot is four times as fast, and on grids (0.95 and 5). `--preset fast`: Adam 2e-3 (C, O:
     3e-4) that falls linearly to 0 over the second half (of each phase, if there are two), target
     rate 0.1 (0.005), inverse temperatures 10 (O: 3, C: 1); `--preset paper` has O's numbers.
 D13 `flat` has phi and hiql's expectile (O's GCIVL: no phi, 0.9). `gciql` extracts its policy by
     AWR, from the online Q, at hiql's expectile; IQL (Kostrikov et al. 2021) from the target Q; O's
     published GCIQL by DDPG+BC at expectile 0.9.
 D14 Initialisation of first layers: weights 8 / side times Glorot's (2 on point mazes, 8 on grids)
     and units that bend at data points: see `init`. C, O: Glorot, biases 0, which is
     `--kinks zero`.
 D15 Inputs, in the fast preset on OGBench's own mazes: networks see a bump for each cell beside
     the position (`eyes`), and but for stitch data, of a state and its goal also the way from one
     to the other (`pair`). C, O: the positions.
 D16 Horizon and value goals there: discount 0.997, giant 0.998 (O: 0.99, giant 0.995); 70 % from
     the trajectory's future and 10 % random (O: 50 and 30 %); on stitch data, whose trajectories
     have 200 rows, the future by the discount 0.99 (by 0.997 most goals are the last row).
 D17 Optimisation there: the value before the policies [D9], Adam 1e-3, target rate 0.3; on stitch
     data the manager's inverse temperature is 0.3, lest nearly all its weights be 100.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import math
import zlib
from dataclasses import dataclass
from fnmatch import fnmatch
from types import SimpleNamespace

import numpy as np
from scipy.stats import beta, norm

import envs
import experiment
from experiment import option
from nets import (adam, adam_init, categorical_log_prob, ema, forward, gaussian_log_prob, init_mlp,
                  length_normalize, mlp, stop, tree_map)

CONTROLLERS = ("collector", "straight", "random")           # learn nothing; for comparison
AGENTS = ("hiql", "flat", "gciql", "gcbc", "hgcbc", *CONTROLLERS)


@dataclass
class Config:
    """Everything that decides a run; `resolve` puts in what depends on environment and agent."""

    env: str = option("point-medium", "environment", tuple(envs.ENVIRONMENTS))
    preset: str = option("fast", "fast: tuned here; paper: the published learning rate, target "
                         "rate, temperatures and initialisation [D12]", ("fast", "paper"))
    dataset: str = option("", "npz file in OGBench's layout; without it the data is collected")
    agent: str = option("hiql", "hiql; flat: one policy on the same value; gciql; gcbc, hgcbc: "
                        "behaviour cloning, flat and hierarchical; on point mazes, without "
                        "learning: the data's collector, straight at the goal, random", AGENTS)
    seed: int = option(0, "seed of everything random, the collected data included, but for "
                       "OGBench's mazes, whose data set is one for all seeds")
    steps: int = option(5000, "updates; in the sequential schedule those of the value")
    batch: int = option(256, "batch size (C, O: 1024)")
    hidden: tuple = option((128, 128, 128), "hidden layers of every network (O: 512,512,512)")
    lr: float = option(2e-3, "Adam's learning rate (C, O: 3e-4)")
    decay: bool = option(True, "learning rate falls linearly to 0 over the second half [D12]")
    gamma: float = option(0.98, "discount (C, O: 0.99)")
    expectile: float = option(0.7, "tau of Eq. (4) (C, O: 0.7; O's GCIVL, GCIQL: 0.9)")
    target_rate: float = option(0.1, "EMA rate of the target network (C, O: 0.005)")
    k: int = option(8, "subgoal steps (C: 25 on antmaze-large, O: 25 on point and ant)")
    high_alpha: float = option(10.0, "inverse temperature of the manager's AWR (O: 3, C: 1)")
    low_alpha: float = option(10.0, "inverse temperature of the worker's AWR (O: 3, C: 1)")
    flat_alpha: float = option(10.0, "inverse temperature of the flat policy's AWR (O: 10)")
    rep_dim: int = option(10, "size of phi (C, O: 10)")
    subgoal: str = option("phi_sg", "representation of subgoals [D8]", ("phi_sg", "phi_g", "none"))
    std: str = option("fixed", "std of Gaussian policies [D7]", ("fixed", "learned"))
    schedule: str = option("joint", "value and policies together or one after the other [D9]",
                           ("joint", "sequential"))
    policy_steps: int = option(0, "updates of the policies in the sequential schedule; 0: as many "
                               "as of the value")
    features: str = option("position", "what networks see: positions alone, beside them a bump for "
                           "each cell, the way from state to goal, or both [D15]",
                           ("position", "bumps", "way", "bumps+way"))
    temperature: float = option(0.0, "of discrete actions drawn when acting; 0: the likeliest")
    requery: int = option(1, "the manager is asked every so many steps [D10]")
    action_free: float = option(0.0, "fraction of trajectories whose actions are hidden: value and "
                                "manager use them all the same, gciql and gcbc cannot")
    p_current: float = option(0.2, "value goals: the state itself (C, O)")
    p_future: float = option(0.5, "value goals: geometric future (C, O)")
    goal_gamma: float = option(0.0, "discount of that geometric future; 0: the value's (C, O; "
                                    "[D16])")
    p_random: float = option(0.3, "value goals: random (C, O)")
    high_random: float = option(0.0, "policy goals: fraction of random ones (C: 0.3; O: 0, on "
                                "stitch data 0.5)")
    kinks: str = option("data", "first-layer biases: units bend at data points, or at zero [D14]",
                        ("data", "zero"))
    success: str = option("index", "when a goal counts as reached in the data [D5]",
                          ("index", "state"))
    contrast: bool = option(True, "hiql also trains a flat policy on its value, to compare")
    episodes: int = option(20, "evaluation episodes for each task (O: 50)")
    eval_every: int = option(1000, "updates between evaluations and checkpoints")


DEFAULTS = {                            # what an environment changes, by how its name begins
    "grid": dict(gamma=0.95, k=5, steps=8000, temperature=2.0),
    "point-umaze": dict(gamma=0.99, k=25),
    "point-giant": dict(gamma=0.99),
    "pointmaze": dict(gamma=0.99, k=25, steps=45_000, contrast=False, episodes=50,
                      eval_every=5000),
    "pointmaze-giant": dict(gamma=0.995),
    "pointmaze-*-stitch": dict(high_random=0.5),        # short trajectories
}
FAST = {                                # and what the preset changes there [D15][D16][D17]
    "pointmaze": dict(features="bumps+way", gamma=0.997, p_future=0.7, p_random=0.1,
                      target_rate=0.3, lr=1e-3, schedule="sequential", steps=30_000,
                      policy_steps=15_000, requery=10),
    "pointmaze-giant": dict(gamma=0.998),
    "pointmaze-*-stitch": dict(features="bumps", goal_gamma=0.99, high_alpha=0.3),
}
PAPER = dict(lr=3e-4, decay=False, target_rate=0.005, high_alpha=3.0, low_alpha=3.0, kinks="zero")
QUICK = dict(steps=300, policy_steps=0, batch=128, hidden=(64, 64), eval_every=150, episodes=4)


def resolve(given):
    """A whole Config: defaults of environment, preset, agent and --quick, then the flags given."""
    given, values = dict(given), {}
    env, agent = given.get("env", Config.env), given.get("agent", Config.agent)
    for start, changes in DEFAULTS.items():
        if fnmatch(env, start + "*"):
            values.update(changes)
    if given.get("preset") == "paper":
        values.update(PAPER)
    else:
        for start, changes in FAST.items():
            if fnmatch(env, start + "*"):
                values.update(changes)
    if agent == "hgcbc":
        values["subgoal"] = "none"                      # there is no value to learn phi from
    if agent in ("gcbc", "hgcbc"):                      # nor does anything come before cloning
        values.update(flat_alpha=0.0, high_alpha=0.0, low_alpha=0.0, schedule="joint")
    if agent != "hiql":
        values["contrast"] = False
    if agent not in ("hiql", "hgcbc"):
        values.pop("requery", None)                     # there is no manager to ask
    if agent in CONTROLLERS:
        values.update(steps=1, schedule="joint")        # of nothing
    if given.pop("quick", False):
        values.update(QUICK)
    if given.get("schedule") == "sequential" and "value" not in LOSSES[agent]:
        raise ValueError(f"--schedule sequential needs a value to begin with, and {agent} has none")
    if given.get("schedule", values.get("schedule", "joint")) == "joint":
        values.pop("policy_steps", None)
    if "none" in (given.get("subgoal"), values.get("subgoal")):
        values.pop("features", None)                    # states must be subtracted there
    c = Config(**{**values, **given})
    experiment.demand(c, lambda x: 0 < x < math.inf, "positive", "steps", "batch", "k", "rep_dim",
                      "requery", "episodes", "eval_every", "lr")
    experiment.demand(c, lambda x: len(x) and min(x) > 0, "positive sizes such as 128,128",
                      "hidden")
    experiment.demand(c, lambda x: x > 1, "at least 2: only its direction counts", "rep_dim")
    experiment.demand(c, lambda x: 0 < x < 1, "in (0, 1)", "gamma", "expectile", "target_rate")
    experiment.demand(c, lambda x: 0 <= x < 1, "in [0, 1)", "goal_gamma")
    experiment.demand(c, lambda x: 0 <= x <= 1, "in [0, 1]", "p_current", "p_future", "p_random",
                      "high_random", "action_free")
    experiment.demand(c, lambda x: 0 <= x < math.inf, "at least 0", "high_alpha", "low_alpha",
                      "flat_alpha", "seed", "temperature", "policy_steps")
    total = c.p_current + c.p_future + c.p_random
    if abs(total - 1) > 1e-6:
        raise ValueError(f"p_current + p_future + p_random must be 1, not {total:g}")
    if c.temperature and not env.startswith("grid"):
        raise ValueError(f"--temperature is for the discrete actions of grids, not for {env}")
    if c.policy_steps and c.schedule != "sequential":
        raise ValueError("--policy-steps is for --schedule sequential")
    if c.features != "position" and (env.startswith("grid") or c.subgoal == "none"):
        raise ValueError(f"--features {c.features} is for point mazes and subgoals by phi")
    if c.contrast and c.agent != "hiql":
        raise ValueError("--contrast is for --agent hiql: the flat policy learns from its value")
    if c.agent in ("gcbc", "hgcbc") and (c.high_alpha or c.low_alpha or c.flat_alpha):
        raise ValueError(f"{c.agent} clones behaviour: its temperatures --...-alpha are 0")
    if c.agent in CONTROLLERS and env.startswith("grid"):
        raise ValueError(f"--agent {c.agent} is for point mazes, not {env}")
    if c.agent == "hgcbc" and c.subgoal != "none":
        raise ValueError("hgcbc has no value to learn phi from; it wants --subgoal none")
    return c


# -------------------------------------------------------------------------------------- data


def prepare(c, tree=None):
    """Environment, data set, and what sampling needs of it. ValueError, OSError: bad input.

    tree: a checkpoint; ValueError if its arrays are not those that c makes.
    """
    env = envs.make(c.env)
    rngs = experiment.generators(c.seed, "data", "hide", "init", "flat", "batch")
    if c.dataset or c.env.startswith("pointmaze"):
        data = envs.load_dataset(c.dataset) if c.dataset else envs.ogbench_dataset(env)
        envs.check_dataset(data, env)
    else:
        data = envs.collect(env, rngs["data"], **envs.ENVIRONMENTS[c.env][2])
    if c.k >= data.lengths.max() - 1:
        raise ValueError(f"--k {c.k} must be below the {data.lengths.max() - 1} transitions of the "
                         "longest trajectory")
    trajectories = len(data.lengths)
    hidden = round(c.action_free * trajectories)
    if hidden >= trajectories:
        raise ValueError(f"--action-free {c.action_free} hides the actions of all trajectories")
    shown = np.ones(trajectories, bool)
    shown[rngs["hide"].permutation(trajectories)[:hidden]] = False
    labelled = data.valid[np.repeat(shown, data.lengths)[data.valid]]
    if c.agent in ("gciql", "gcbc"):                    # of no use to them
        data.valid = labelled
    sums = zlib.crc32(data.observations[::97].tobytes(), len(data.observations))
    problem = SimpleNamespace(config=c, env=env, data=data, labelled=labelled, rngs=rngs,
                              see=eyes(c, env),
                              checksum=np.array(zlib.crc32(data.actions[::97].tobytes(), sums)))
    if tree is not None:
        if tree.get("data", problem.checksum) != problem.checksum:
            raise ValueError(f"the data of {c.env} are not those of the run: another file")
        tree.setdefault("params", {})                   # a controller has none to save
        fresh = init(c, env, data, experiment.generators(c.seed, "init", "flat"))
        if shapes(fresh) != shapes(tree["params"]) or set(tree["rng"]) != set(rngs):
            raise ValueError("the checkpoint does not fit its config.json")
    return problem


def shapes(tree):
    return {name: x.shape for name, x in nets.flatten(tree).items()}


def position(x):
    """A state as it is."""
    return x


def eyes(c, env):
    """see(x (..., 2)) -> (..., S): a state as the networks see it, the position first [D15].

    Bumps: beside the position 3 exp(-|x - m|^2 / (2 b^2)), b = 3/4 side, for the centre m of each
    cell, wall or free: places a corridor apart are told apart from the start, and nothing is told
    of walls. Without the way (`pair`) they blur the last steps to a goal; with it, values of stitch
    data, whose trajectories are short, leak through walls.
    """
    if "bumps" not in c.features:
        return position
    rows, columns = env.walls.shape
    up = env.centre([(i, 0) for i in range(rows)])[:, 1].astype(np.float32)
    across = env.centre([(0, j) for j in range(columns)])[:, 0].astype(np.float32)

    def see(x):                                 # exp of a sum: a factor for each axis
        bump_x, bump_y = (np.exp(-0.5 * ((x[..., axis, None] - m) / (0.75 * env.side)) ** 2)
                          for axis, m in enumerate((across, up)))
        bumps = 3 * bump_y[..., :, None] * bump_x[..., None, :]
        bumps[bumps < 1e-30] = 0        # subnormal numbers would make products ten times slower
        return np.concatenate([x, bumps.reshape(*x.shape[:-1], -1)], -1)

    return see


def sample(data, labelled, rng, c, see=position):
    """One batch: indices of rows, then hindsight goals [D5][D6], states by `see`.

    Value goals g: row i itself with p_current, row min(i + Geometric(1 - gamma), fin) with
    p_future (goal_gamma in place of gamma, if given), any row with p_random; fin is the last row
    that has a transition. "Any row" means one with a transition.
    Policy goals: a row uniform between min(i + 1, fin) and fin, or with high_random any row; the
    subgoal w of the manager is k steps ahead or at the goal, that of the worker k steps ahead.
    The worker's rows (s_low, a, ...) are the same rows i unless some actions are hidden.
    """
    obs, valid, last = data.observations, data.valid, data.last
    n = c.batch

    def draw(rows):
        return rows[rng.integers(len(rows), size=n)]

    def policy_goals(i):
        fin, u = last[i] - 1, rng.random(n)
        goal = np.rint(np.minimum(i + 1, fin) * u + fin * (1 - u)).astype(int)
        w = np.minimum(i + c.k, goal)
        if c.high_random:
            other = rng.random(n) < c.high_random
            goal = np.where(other, draw(valid), goal)
            w = np.where(other, np.minimum(i + c.k, fin), w)
        return goal, w

    i = draw(valid)
    future = np.minimum(i + rng.geometric(1 - (c.goal_gamma or c.gamma), n), last[i] - 1)
    u = rng.random(n)
    goal = np.where(u < c.p_current, i, np.where(u < c.p_current + c.p_future, future, draw(valid)))
    success = goal == i if c.success == "index" else (obs[goal] == obs[i]).all(-1)
    goal_high, w_high = policy_goals(i)
    batch = {"s": see(obs[i]), "s1": see(obs[i + 1]), "g": see(obs[goal]),
             "m": (~success).astype(np.float32), "g_high": see(obs[goal_high]),
             "w_high": see(obs[w_high])}
    if len(labelled) < len(valid):
        j = draw(labelled)
        batch.update(s_low=see(obs[j]), s1_low=see(obs[j + 1]), g_low=see(obs[policy_goals(j)[0]]))
    else:
        j = i
        batch.update(s_low=batch["s"], s1_low=batch["s1"], g_low=batch["g_high"])
    batch.update(a=data.actions[j], w=see(obs[np.minimum(j + c.k, last[j] - 1)]))
    batch["r"] = -batch["m"]
    return batch


# ---------------------------------------------------------------------------------- networks


def concat(*arrays):
    """Arrays (B, .) side by side: [s; g]."""
    return np.concatenate(arrays, axis=-1)


def pair(s, g, c):
    """What a network sees of a state and its goal: [s; g], or beside it the way d [D15].

    d = 6 x / sqrt(|x|^2 + 4), x = g - s: near the goal 3 x, far from it 6 x / |x|, and the bend is
    half a cell away. Value and worker see it through phi([s; g]).
    """
    if "way" not in c.features:
        return concat(s, g)
    x = g[..., :2] - s[..., :2]
    return concat(s, g, 6 * x / np.sqrt((x * x).sum(-1, keepdims=True) + 4))


def phi(params, s, g, c):
    """Representation z (B, R) of g as seen from s, of length sqrt(R) [D8]; back(dz) -> grads."""
    if c.subgoal == "none":
        return g, lambda dz: {}
    h, back_mlp = mlp(params["phi"], pair(s, g, c) if c.subgoal == "phi_sg" else g)
    z, back_length = length_normalize({}, h)
    return z, lambda dz: {"phi": back_mlp(back_length(dz)[0])[1]}


def phi_constant(params, s, g, c):
    """phi as a constant, without the work for a derivative."""
    if c.subgoal == "none":
        return g
    h = forward(params["phi"], pair(s, g, c) if c.subgoal == "phi_sg" else g)
    return stop(length_normalize({}, h)[0])


def value(p, *inputs):
    """Both value heads (2, B) at inputs such as s, z; back(dv) -> (d last input, grads)."""
    v, back_mlp = mlp(p, concat(*inputs))

    def back(dv):
        dx, grads = back_mlp(dv[..., None])
        return dx[:, -inputs[-1].shape[-1]:], grads

    return v[..., 0], back


def value_constant(p, *inputs):
    """`value` as a constant, without the work for a derivative."""
    return stop(forward(p, concat(*inputs)))[..., 0]


def advantage(params, s, s2, g, c):
    """A = V(s2, g) - V(s, g), mean of the online heads, constant [D4]; and phi([s; g])."""
    both = np.concatenate([s, s2])              # one evaluation for both states
    z = phi_constant(params, both, np.concatenate([g, g]), c)
    v = value_constant(params["value"], both, z).mean(0)
    return v[len(s):] - v[:len(s)], z[:len(s)]


def awr(name, p, x, target, weight):
    """-mean(weight log pi(target | x)) and its gradient; weight (B,) is constant.

    pi: Gaussian with mean mlp(x) and std 1 or learned [D7]; categorical if target is integers.
    """
    output, back_mlp = mlp(p, x)
    log_density = categorical_log_prob if target.dtype.kind == "i" else gaussian_log_prob
    log_prob, back_density = log_density(p.get("std", {}), output, target)
    d_output, d_std = back_density(-weight / len(x))
    grads = back_mlp(d_output)[1]               # the gradient with respect to x is thrown away
    info = {"weight": weight, "mean": output, "log_prob": log_prob}
    return -(weight * log_prob).mean(), {name: {**grads, **({"std": d_std} if d_std else {})}}, info


def awr_weight(alpha, adv):
    """min(exp(alpha A), 100), by clipping the exponent: nothing overflows [D11]."""
    return np.exp(np.minimum(alpha * adv, math.log(100)))


# ------------------------------------------------------------------------------------- losses


def value_loss(params, batch, c):
    """Expectile regression of the action-free value, Eq. (4) [D1][D2][D3].

    q_j = r + gamma m T_j(s', g),  A = r + gamma m min_j T_j(s', g) - mean_j T_j(s, g)
    L_V = sum_j mean( |tau - 1(A < 0)| (q_j - V_j(s, phi(s, g)))^2 )
    T: target network. s, s', g (B,S); r in {-1, 0} and m = -r (B,).
    """
    s, s1, g, r, m = (batch[name] for name in ("s", "s1", "g", "r", "m"))
    z, back_phi = phi(params, s, g, c)
    z1 = phi_constant(params, s1, g, c)
    v, back_v = value(params["value"], s, z)
    t, t1 = value_constant(params["target"], s, stop(z)), value_constant(params["target"], s1, z1)
    q = r + c.gamma * m * t1
    q_min = r + c.gamma * m * t1.min(0)
    adv = q_min - t.mean(0)
    weight = np.where(adv >= 0, c.expectile, 1 - c.expectile).astype(s.dtype)
    error = q - v
    dz, grads = back_v(-2 / len(s) * weight * error)
    info = {"v": v, "target": t, "target_next": t1, "q": q_min, "adv": adv, "phi": z}
    return (weight * error * error).mean(-1).sum(), {"value": grads, **back_phi(dz)}, info


def high_loss(params, batch, c):
    """Manager by AWR, J_h (Eq. 6): A = V(w, g) - V(s, g), w the state k steps ahead.

    L = -mean( min(exp(alpha A), 100) log pi_h(phi(s, w) | s, g) ), phi constant.
    """
    s, g, w = batch["s"], batch["g_high"], batch["w_high"]
    adv, _ = advantage(params, s, w, g, c) if c.high_alpha else (np.zeros(len(s), s.dtype), None)
    target = phi_constant(params, s, w, c) if c.subgoal != "none" else w - s      # [D8]
    loss, grads, info = awr("high", params["high"], pair(s, g, c), target,
                            awr_weight(c.high_alpha, adv))
    return loss, grads, {**info, "adv": adv, "target": target}


def low_loss(params, batch, c):
    """Worker by AWR, J_l (Eq. 7): A = V(s', w) - V(s, w), w the state k steps ahead.

    L = -mean( min(exp(alpha A), 100) log pi_l(a | s, phi(s, w)) ), phi constant [D3].
    """
    s, s1, a, w = (batch[name] for name in ("s_low", "s1_low", "a", "w"))
    if c.low_alpha:
        adv, z = advantage(params, s, s1, w, c)
    else:
        adv, z = np.zeros(len(s), s.dtype), phi_constant(params, s, w, c)
    loss, grads, info = awr("low", params["low"], concat(s, z), a, awr_weight(c.low_alpha, adv))
    return loss, grads, {**info, "adv": adv, "phi": z}


def flat_loss(params, batch, c):
    """One policy without hierarchy, Eq. (5): A = V(s', g) - V(s, g).

    L = -mean( min(exp(alpha A), 100) log pi(a | s, g) ). alpha = 0 is behaviour cloning.
    """
    s, s1, a, g = (batch[name] for name in ("s_low", "s1_low", "a", "g_low"))
    adv = advantage(params, s, s1, g, c)[0] if c.flat_alpha else np.zeros(len(s), s.dtype)
    return awr("flat", params["flat"], pair(s, g, c), a, awr_weight(c.flat_alpha, adv))


def gciql_loss(params, batch, c):
    """V and Q of goal-conditioned IQL (Kostrikov et al. 2021, Eqs. 5 and 6); no phi.

    L_V = mean( |tau - 1(A < 0)| A^2 ),  A = min_j T_j(s, a, g) - V(s, g)
    L_Q = sum_j mean( (r + gamma m V(s', g) - Q_j(s, a, g))^2 ).   T: target of Q.
    """
    s, s1, g, r, m = (batch[name] for name in ("s", "s1", "g", "r", "m"))
    a = vector(batch["a"])
    sg = pair(s, g, c)
    v, back_v = value(params["v"], sg)
    q, back_q = value(params["q"], sg, a)
    adv = value_constant(params["target"], sg, a).min(0) - v
    weight = np.where(adv.real >= 0, c.expectile, 1 - c.expectile).astype(s.dtype)
    error = stop(r + c.gamma * m * value_constant(params["v"], pair(s1, g, c))) - q
    loss = (weight * adv * adv).mean() + (error * error).mean(-1).sum()
    grads = {"v": back_v(-2 / len(s) * weight * adv)[1], "q": back_q(-2 / len(s) * error)[1]}
    return loss, grads, {"v": v, "adv": adv}


def gciql_policy_loss(params, batch, c):
    """AWR with A = min_j Q_j(s, a, g) - V(s, g) [D13]."""
    s, g, a = batch["s"], batch["g_high"], vector(batch["a"])
    sg = pair(s, g, c)
    adv = value_constant(params["q"], sg, a).min(0) - value_constant(params["v"], sg)
    return awr("flat", params["flat"], sg, batch["a"], awr_weight(c.flat_alpha, adv))


def vector(a):
    """Actions as inputs of a network: grid actions (B,) one-hot (B, 5)."""
    return np.eye(5, dtype=np.float32)[a] if a.ndim == 1 else a


LOSSES = {"hiql": {"value": value_loss, "high": high_loss, "low": low_loss},
          "flat": {"value": value_loss, "flat": flat_loss},
          "gciql": {"value": gciql_loss, "flat": gciql_policy_loss},
          "gcbc": {"flat": flat_loss},
          "hgcbc": {"high": high_loss, "low": low_loss},
          **{name: {} for name in CONTROLLERS}}


# ------------------------------------------------------------------------------------- update


def init(c, env, data, rngs):
    """Parameters of the agent's networks, float32.

    Glorot-uniform; policies' last layers times 0.1 (C, O). First layers [D14]: Glorot times 8
    over the side of a cell, and biases b = -x0 W with a random state of the data for each state
    in x0 and 0 for the rest, a draw for each unit: the units bend inside the maze and about as
    sharply as its corridors do, instead of smoothly and all at its corner (0, 0). The way counts
    as 0 in x0.
    """
    see = eyes(c, env)
    size = see(data.observations[:1]).shape[-1]
    R = size if c.subgoal == "none" else c.rep_dim
    sizes = {"s": size, "g": size, "d": 2, "z": R, "a": env.action_dim}
    sg = "sgd" if "way" in c.features else "sg"                 # what `pair` shows
    states = "sgz" if c.subgoal == "none" else "sg"

    def net(rng, inputs, n_out, **kind):
        p = init_mlp(rng, (sum(sizes[x] for x in inputs), *c.hidden, n_out), **kind)
        w = p["dense0"]["W"]                                    # (I, H) or (2, I, H)
        if c.kinks == "data":
            units = w.shape[:-2] + w.shape[-1:]
            x0 = [see(data.observations[rng.choice(data.valid, units)]) if x in states
                  else np.zeros(units + (sizes[x],), np.float32) for x in inputs]
            w *= 8 / env.side
            p["dense0"]["b"][:] = -np.einsum("...ih,...hi->...h", w, concat(*x0))
        return p

    def policy(rng, inputs, n_out, gaussian):
        std = {"std": {"log_std": np.zeros(n_out, np.float32)}}
        return {**net(rng, inputs, n_out, last_scale=0.1),
                **(std if gaussian and c.std == "learned" else {})}

    rng, params = rngs["init"], {}
    if c.agent in ("hiql", "flat"):
        if c.subgoal != "none":
            params["phi"] = net(rng, sg if c.subgoal == "phi_sg" else "g", R, norm=True)
        params["value"] = net(rng, "sz", 1, norm=True, ensemble=2)
    if c.agent == "gciql":
        params["v"] = net(rng, sg, 1, norm=True)
        params["q"] = net(rng, sg + "a", 1, norm=True, ensemble=2)
    for online in {"value", "q"} & set(params):
        params["target"] = tree_map(np.copy, params[online])
    if c.agent in ("hiql", "hgcbc"):
        params["high"] = policy(rng, sg, R, True)
        params["low"] = policy(rng, "sz", env.action_dim, not env.discrete)
    if c.agent in ("flat", "gciql", "gcbc") or c.contrast:
        params["flat"] = policy(rngs["flat"], sg, env.action_dim, not env.discrete)
    return params


def update(params, optimiser, batch, c, losses, lr, **betas):
    """One joint step on {name: loss function}; params and optimiser in place -> {name: loss}.

    All gradients come before any change; the target moves towards the parameters before the
    Adam step [D3].
    """
    values, grads = {}, {}
    for name, loss in losses.items():
        values[name], g, _ = loss(params, batch, c)
        grads.update(g)
    for online in {"value", "q"} & set(grads):
        ema(params["target"], params[online], c.target_rate)
    adam(params, grads, optimiser, lr, **betas)
    return values


# ------------------------------------------------------------------------------------- acting


def subgoal(params, s, g, c):
    """What the manager asks for: its mean, scaled to length sqrt(R) [D10]; without phi s + mean."""
    z = forward(params["high"], pair(s, g, c))
    return s + z if c.subgoal == "none" else length_normalize({}, z)[0]


def actor(params, c, flat=False, rng=None, see=position):
    """act(s (N,2), g (N,2), t) -> actions of N episodes at step t: the mean, or drawn [D10]."""
    net, memory = params["flat" if flat else "low"], {}
    dtype = net["dense0"]["W"].dtype

    def act(s, g, t):
        s, g = see(s.astype(dtype)), see(g.astype(dtype))
        if not flat and t % c.requery == 0:
            memory["z"] = subgoal(params, s, g, c)
        out = forward(net, pair(s, g, c) if flat else concat(s, memory["z"]))
        if c.env.startswith("grid"):                    # Gumbel noise draws by softmax(out / T)
            return (out + c.temperature * rng.gumbel(size=out.shape)).argmax(-1)
        return np.clip(out, -1, 1)

    return act


def rollout(env, act, starts, goals, rng):
    """N episodes in step, each ended by success or its time limit.

    starts, goals (N,2) -> success (N,), steps (N,), paths (T+1, N, 2), which stand still after
    the end of an episode.
    """
    s, limits = starts, env.limits(starts, goals)
    success, steps, paths = np.zeros(len(s), bool), limits.copy(), [s]
    for t in range(limits.max()):
        moved = env.move(s, act(s, goals, t), rng)
        live = ~success & (t < limits)
        s = np.where(live[:, None], moved, s)
        paths.append(s)
        arrived = live & env.success(s, goals)
        steps[arrived], success = t + 1, success | arrived
        if (success | (t + 1 >= limits)).all():
            break
    return success, steps, np.array(paths)


def evaluate(problem, params, at, flat=False):
    """Success on the fixed tasks and on 200 random pairs far apart: (summary, paths by task).

    Starts and goals depend on the seed and on `at`, the number of updates, alone: evaluation
    takes nothing from the generators of training.
    """
    c, env = problem.config, problem.env
    rng = np.random.default_rng([c.seed, at])
    tasks = np.array(env.tasks).repeat(c.episodes, axis=0)          # (5 episodes, 2, 2) cells
    pairs = env.random_pairs(rng, 200, min(env.far, env.distance.max()))
    starts, goals = (env.place(np.concatenate([tasks[:, i], pairs[i]]), rng) for i in (0, 1))
    act = (env.controller(c.agent, rng) if c.agent in CONTROLLERS else
           actor(params, c, flat, rng, problem.see))
    success, steps, paths = rollout(env, act, starts, goals, rng)
    n = len(tasks)
    by_task = success[:n].reshape(len(env.tasks), -1)
    summary = {"success": float(by_task.mean()), "success_per_task": by_task.mean(1).tolist(),
               "success_worst_task": float(by_task.mean(1).min()),
               "success_random": float(success[n:].mean()), "mean_steps": float(steps[:n].mean())}
    return summary, (paths[:, :n].reshape(len(paths), len(env.tasks), -1, 2),
                     goals[:n].reshape(len(env.tasks), -1, 2), by_task)


def is_flat(c):
    return c.agent in ("flat", "gciql", "gcbc")


def evaluate_all(problem, params, at):
    """`evaluate` of the agent and, if there is one, of the flat policy trained beside it ->
    (summary, {name: episodes}); on grids also the shares of wrong `first_actions` by the learned
    value: for far goals, and at each distance 1, 2, ..."""
    shown, agent = {}, problem.config.agent
    summary, shown[agent] = evaluate(problem, params, at, is_flat(problem.config))
    if problem.config.contrast:
        flat, shown["flat, same value"] = evaluate(problem, params, at, True)
        summary.update({"flat_success": flat["success"], "flat_success_random":
                        flat["success_random"], "flat_success_per_task": flat["success_per_task"]})
    if problem.env.discrete and "value" in params:
        env, c, n = problem.env, problem.config, len(problem.env.cells)
        v = mean_value(params, env.cells.repeat(n, 0), np.tile(env.cells, (n, 1)), c)
        far = env.distance >= env.far
        for name, right in zip(("flat", "hierarchy"), first_actions(env, v.reshape(n, n), c.k)):
            summary[f"wrong_first_{name}"] = float(1 - right[far].mean())
            summary[f"wrong_{name}_by_distance"] = [
                round(float(1 - right[env.distance == d].mean()), 4)
                for d in range(1, env.distance.max() + 1)]
    return summary, shown


# ------------------------------------------------------------------------------------ training


def phases(c):
    """[({name: loss function}, updates)]: joint all, sequential value, then policies [D9]."""
    losses = dict(LOSSES[c.agent], **({"flat": flat_loss} if c.contrast else {}))
    if c.schedule == "joint":
        return [(losses, c.steps)]
    first = {name: loss for name, loss in losses.items() if name == "value"}
    second = {name: loss for name, loss in losses.items() if name != "value"}
    both = (first, c.steps), (second, c.policy_steps or c.steps)
    return [(part, steps) for part, steps in both if part]


def train(problem, run):
    """Train, evaluate and save every c.eval_every updates; at the end summary and pictures."""
    c, rngs, parts = problem.config, problem.rngs, phases(problem.config)
    params = init(c, problem.env, problem.data, rngs)
    optimiser = adam_init({name: p for name, p in params.items() if name != "target"})
    ends = np.cumsum([steps for _, steps in parts])
    start, total = 0, int(ends[-1])
    if run.restored:
        params, optimiser = run.restored["params"], run.restored["optimiser"]
        start = int(run.restored["update"])
        run.restore(rngs)
    else:
        sizes = {name: sum(x.size for x in nets.flatten(p).values()) for name, p in params.items()}
        print(f"{c.env}, {c.agent}, seed {c.seed}: {total} updates of batch {c.batch}; "
              f"{len(problem.data.valid)} transitions; parameters "
              + ", ".join(f"{name} {n}" for name, n in sizes.items()), flush=True)
    last = shown = None
    for u in range(start, total):
        part = int(np.searchsorted(ends, u, side="right"))
        losses, steps = parts[part]
        at = u - (ends[part] - steps)
        if u and not at:                                # a new phase has its own Adam
            optimiser = adam_init({name: p for name, p in params.items() if name != "target"})
        lr = c.lr * min(1, 2 * (1 - at / steps)) if c.decay else c.lr
        batch = sample(problem.data, problem.labelled, rngs["batch"], c, problem.see)
        with np.errstate(over="ignore", invalid="ignore"):      # the next lines look at it
            values = update(params, optimiser, batch, c, losses, lr)
        for name, x in values.items():
            if not np.isfinite(x):
                raise FloatingPointError(f"the {name} loss became {x} at update {u + 1}")
        done = u + 1
        if done % 100 == 0 or at == 0:
            run.log("train", {"update": done, **{f"{k}_loss": float(x) for k, x in values.items()},
                              "seconds": run.seconds()})
        if done % c.eval_every == 0 or done == total:
            if not all(np.isfinite(x).all() for x in nets.flatten(params).values()):
                raise FloatingPointError(f"the parameters are no longer finite at update {done}")
            if set(losses) != {"value"}:                # else there is no policy yet
                last, shown = evaluate_all(problem, params, done)
                run.log("eval", {"update": done, **last, "seconds": run.seconds()})
        if done % c.eval_every == 0 or done == total or run.stop:
            run.save(done, {"params": params, "optimiser": optimiser,
                            "data": problem.checksum}, rngs)
        if done % 20 == 0 or done == total:
            success = f"success {last['success']:.2f}" if last else "success -"
            run.progress(done, total, " ".join(f"{k} {x:.3g}" for k, x in values.items())
                         + f"  {success}")
    if not last:                                        # resumed when only pictures lacked
        last, shown = evaluate_all(problem, params, total)
    draw(problem, params, run, shown)
    run.finish(summarise(problem, last, total, run.seconds()))


def summarise(problem, last, updates, seconds):
    """The keys of summary.json around those of `evaluate_all`."""
    c = problem.config
    return {"env": c.env, "agent": c.agent, "seed": c.seed, "updates": updates, **last,
            "episodes": c.episodes * len(problem.env.tasks), "train_seconds": round(seconds, 1)}


def evaluate_checkpoint(problem, tree):
    """The summary of a saved run: the same starts and goals as after that update."""
    at = int(tree["update"])
    first, steps = phases(problem.config)[0]
    if set(first) == {"value"} and at <= steps:
        raise ValueError(f"the run was stopped after {at} updates, before its policies began; "
                         "there is nothing to evaluate yet")
    last, _ = evaluate_all(problem, tree["params"], at)
    return summarise(problem, last, at, float(tree["seconds"]))


# ------------------------------------------------------------------------------------ pictures


def mean_value(params, s, g, c, see=position):
    """V(s, g), mean of the two heads: s, g (N,2) -> (N,)."""
    s, g = see(s.astype(np.float32)), see(g.astype(np.float32))
    return value_constant(params["value"], s, phi_constant(params, s, g, c)).mean(0)


def draw(problem, params, run, shown):
    """The pictures of a run: trajectories, learning curve; hiql and flat: value; hiql: why."""
    c, env = problem.config, problem.env
    size = 2.2 * len(env.tasks), 2.4 * len(shown)
    figure, axes = envs.plt.subplots(len(shown), len(env.tasks), squeeze=False, figsize=size,
                                     layout="constrained")
    for row, (name, (paths, goals, success)) in zip(axes, shown.items()):
        for i, ax in enumerate(row):
            envs.draw_paths(ax, env, paths[:, i], goals[i], success[i])
            ax.set_title(f"task {i + 1}: {success[i].mean():.0%}", fontsize=9)
        row[0].set_ylabel(name)
    envs.save_figure(figure, run.path("trajectories.png"))
    experiment.draw_curve(run)
    if "value" in params:
        draw_value(problem, params, run, shown[c.agent])
    if c.agent == "hiql":
        draw_signal(problem, params, run)


def exact_value(c, env, data):
    """On grids: the exact V (n, n) that the value loss regresses to on this data set."""
    counts = envs.goal_counts(env, data, c.goal_gamma or c.gamma, c.p_current, c.p_future,
                              c.p_random, c.success)
    return envs.expectile_values(env, *counts, c.gamma, c.expectile)


def draw_value(problem, params, run, shown):
    """V(., g) for each task, one path, and what the manager asks for along it.

    A subgoal is a representation; it is drawn at the point w whose phi([s; w]) is nearest to it.
    On grids the exact value stands below.
    """
    c, env = problem.config, problem.env
    points, free = envs.lattice(env)
    points, rows = points[free], 1 + env.discrete
    exact = exact_value(c, env, problem.data) if env.discrete else None
    size = 3 * len(env.tasks), 2.7 * rows
    figure, axes = envs.plt.subplots(rows, len(env.tasks), squeeze=False, figsize=size,
                                     layout="constrained")
    for i in range(len(env.tasks)):
        path, g = shown[0][:, i, 0], shown[1][i, :1]
        maps = [("V(s, g)", mean_value(params, points, g.repeat(len(points), 0), c,
                                       problem.see))]
        if env.discrete:
            maps.append(("exact", exact[:, env.number(g)[0]]))
        low = min(np.nanmin(v) for _, v in maps)
        high = max(np.nanmax(v) for _, v in maps)
        for ax, (name, v) in zip(axes[:, i], maps):
            image = envs.draw_maze(ax, env, v, cmap="viridis", vmin=low, vmax=high)
            figure.colorbar(image, ax=ax, shrink=0.7)
            ax.plot(*envs.plot_xy(env, g[0]), "r*", ms=10)
            ax.set_title(f"task {i + 1}: {name}", fontsize=9)
        axes[0, i].plot(*envs.plot_xy(env, path), "w-", lw=1)
        for s in path[::c.k] if "high" in params else []:
            seen, aims, places = (problem.see(x.astype(np.float32)) for x in (s[None], g, points))
            z = subgoal(params, seen, aims, c)
            there = phi_constant(params, seen.repeat(len(points), 0), places, c)
            w = points[((there - z) ** 2).sum(-1).argmin()]
            axes[0, i].annotate("", envs.plot_xy(env, w), envs.plot_xy(env, s),
                                arrowprops=dict(arrowstyle="->", color="C1", lw=1))
    envs.save_figure(figure, run.path("value.png"))


def draw_signal(problem, params, run, n=4000):
    """Why a hierarchy helps (the paper's Sec. 4): is the sign of an advantage right?

    Share of data transitions for which A and the exact change of the path length to the goal
    have the same sign, over the distance to the goal: the flat policy's A = V(s1,g) - V(s,g), the
    manager's V(w,g) - V(s,g), the worker's V(s1,w) - V(s,w).
    """
    c, env, data = problem.config, problem.env, problem.data
    rng, obs = np.random.default_rng(c.seed), data.observations
    i = data.valid[data.valid + c.k <= data.last[data.valid] - 1]
    i = i[env.is_free(obs[i]) & env.is_free(obs[i + 1]) & env.is_free(obs[i + c.k])]
    i, g = rng.choice(i, n), obs[rng.choice(i, n)]
    s, s1, w = obs[i], obs[i + 1], obs[i + c.k]
    cell = env.number(s)                        # teleporters lead where no path goes
    joined = np.all([env.distance[cell, env.number(x)] >= 0 for x in (s1, w, g)], 0)
    s, s1, w, g = (x[joined] for x in (s, s1, w, g))
    far = env.path_length(s, g)
    figure, ax = envs.plt.subplots(figsize=(6, 3.6))
    bins = np.quantile(far, np.linspace(0, 1, 11))
    for name, (x, y, goal) in {"flat: one step, to the goal": (s, s1, g),
                               f"manager: {c.k} steps, to the goal": (s, w, g),
                               "worker: one step, to the subgoal": (s, s1, w)}.items():
        nearer = env.path_length(x, goal) - env.path_length(y, goal)
        before, after = (mean_value(params, at, goal, c, problem.see) for at in (x, y))
        adv = after - before
        right, told = nearer * adv > 0, np.abs(nearer) > 1e-6
        share = [right[told & (far >= a) & (far <= b)].mean() for a, b in zip(bins, bins[1:])]
        ax.plot((bins[1:] + bins[:-1]) / 2, share, "o-", label=name)
    ax.set(xlabel="path length to the goal", ylabel="share of advantages\nwith the right sign")
    ax.legend(fontsize=8)
    envs.save_figure(figure, run.path("signal.png"))


# ------------------------------------------------- the paper's theory: Prop. 4.1 and Prop. 5.1


def chain_error(distance, sigma):
    """Probability that one comparison of noisy values errs on the chain: closed form, Prop. 4.1.

    States are integers, actions +-1, V(s, g) = -|s - g| (1 + sigma z) with z ~ N(0, 1) for each
    pair. A policy at `distance` from its goal compares the values one step nearer and one
    farther: it errs with Phi(-sqrt(2) / (sigma sqrt(distance^2 + 1))). The flat policy: T; the
    manager with steps of k: T / k; the worker: k. Their sum bounds the hierarchy's error.
    """
    return norm.cdf(-math.sqrt(2) / (sigma * np.sqrt(np.asarray(distance) ** 2 + 1.0)))


def chain_simulation(T, k, sigma, n, rng):
    """The same by n draws of the noise: shares of {flat: wrong action, either: manager or worker
    errs, first: the hierarchy's first action is wrong (two errors cancel)}."""
    def errs(distance, step):                           # the farther state looks better
        nearer, farther = -np.array([[distance - step], [distance + step]]) * (
            1 + sigma * rng.normal(size=(2, n)))
        return farther > nearer

    flat, manager, worker = errs(T, 1), errs(T, k), errs(k, 1)
    return {"flat": flat.mean(), "either": (manager | worker).mean(),
            "first": (manager ^ worker).mean()}


def first_actions(env, v, k):
    """Is the first action right, by a value v (n, n) of (state, goal) on a grid? Two (n, n) arrays.

    flat: the move to the best v(s', g). Hierarchy: the best v(w, g) among the states w exactly k
    steps away, or the goal itself within k (and where nothing is k away); then the move to the
    best v(s', w). Right: one step nearer to g.
    """
    distance, near = env.distance, env.neighbours
    n, s = len(distance), np.arange(len(distance))[:, None]
    flat = near[s, v[near].argmax(1)]                           # (n, n): where the move leads
    reach = distance == k
    w = np.where(reach[:, :, None], v[None], -np.inf).argmax(1)
    w = np.where((distance <= k) | ~reach.any(1)[:, None], np.arange(n), w)
    hierarchy = flat[s, w]
    return distance[flat, np.arange(n)] < distance, distance[hierarchy, np.arange(n)] < distance


def noisy(env, sigma, rng):
    """V*(s, g) (n, n) with the chain's noise: each pair's own, in proportion to the value."""
    return -env.distance * (1 + sigma * rng.normal(size=env.distance.shape))


def factor(v, rank):
    """The best V(s, g) = psi(s) phi(g) with phi of this size: exact at the rank of v (n, n)."""
    u, size, vt = np.linalg.svd(v)
    return (u[:, :rank] * size[:rank]) @ vt[:rank]


def value_is_not_action(env):
    """Prop. 5.1 asks for phi(g). phi([s; g]) = V*(s, g), one number, keeps the exact value too.

    -> (share of states and goals for which no policy of (s, phi) can be sure of a right move,
    share of wrong moves of the best such policy, which takes the move that serves most goals)
    """
    nearer = env.distance[env.neighbours] < env.distance[:, None]            # (n, 5, n)
    unsure, wrong = np.zeros(env.distance.shape), np.zeros(env.distance.shape)
    for s, row in enumerate(env.distance):
        for d in np.unique(row[row > 0]):
            best = nearer[s][:, row == d].mean(1).max()
            unsure[s, row == d], wrong[s, row == d] = best < 1, 1 - best
    return unsure[env.distance > 0].mean(), wrong[env.distance > 0].mean()


def draw_theory(path, n=20_000):
    """Prop. 4.1 on the chain beside simulation, the same on a maze, and Prop. 5.1."""
    rng = np.random.default_rng(0)
    figure, axes = envs.plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    T = np.unique(np.geomspace(4, 400, 9).astype(int))
    root = np.maximum(np.rint(np.sqrt(T)).astype(int), 1)
    k = np.array([2, 3, 5, 7, 10, 14, 20, 33, 50, 80])
    sigma = np.array([0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.5])
    panels = (("chain: distance T; k = sqrt(T), sigma 0.1", T, T, root, 0.1 + 0 * T),
              ("chain: steps k to the subgoal; T 100, sigma 0.1", k, 100 + 0 * k, k, 0.1 + 0 * k),
              ("chain: noise sigma; T 100, k 10", sigma, 100 + 0 * sigma, 10 + 0 * sigma, sigma))
    for ax, (label, x, T, k, sigma) in zip(axes[0], panels):
        ax.plot(x, chain_error(T, sigma), "C3-", label="flat, formula")
        ax.plot(x, chain_error(T / k, sigma) + chain_error(k, sigma), "C0-",
                label="hierarchy, bound of Prop. 4.1")
        seen = [chain_simulation(*setting, n, rng) for setting in zip(T, k, sigma)]
        for name, style, text in (("flat", "C3o", "flat, simulated"),
                                  ("either", "C0o", "manager or worker errs, simulated"),
                                  ("first", "C2o", "hierarchy's first action, simulated")):
            p = np.array([one[name] for one in seen])
            low, high = beta.ppf([[0.025], [0.975]], n * p + [[0], [1]], n * (1 - p) + [[1], [0]])
            ax.errorbar(x, p, (p - np.nan_to_num(low), high - p), fmt=style, ms=3, label=text)
        ax.set(xscale="log", xlabel=label, ylim=(-0.03, 0.82))
        ax.set_xticks(x, map(str, x), fontsize=7)
        ax.minorticks_off()
    axes[0, 1].axvline(10, color="0.7", ls=":")                 # sqrt(T)
    axes[0, 0].set_ylabel("probability of error")
    axes[0, 0].legend(fontsize=7)

    env = envs.make("grid-maze")
    far = np.arange(1, env.distance.max() + 1)
    for ax, sigma in zip(axes[1], (0.1, 0.3)):
        share = np.mean([first_actions(env, noisy(env, sigma, rng), 5) for _ in range(20)], 0)
        for right, style, text in zip(share, ("C3o-", "C2o-"), ("flat", "hierarchy")):
            ax.plot(far, [1 - right[env.distance == d].mean() for d in far], style, ms=3,
                    label=text)
        ax.set(xlabel=f"{env.name}: distance to the goal; k 5, sigma {sigma}", ylim=(-0.03, 0.82))
    axes[1, 0].set_ylabel("share of wrong first actions")
    axes[1, 0].legend(fontsize=7)

    apart = env.distance > 0
    ranks = np.array([1, 2, 3, 5, 8, 12, 20, 30, 50, 80, len(env.cells)])
    values = [factor(-env.distance.astype(float), rank) for rank in ranks]
    axes[1, 2].plot(ranks, [np.abs(v + env.distance).mean() / env.distance.max() for v in values],
                    "C0o-", ms=3, label="value: mean error / range")
    axes[1, 2].plot(ranks, [1 - first_actions(env, v, 5)[0][apart].mean() for v in values],
                    "C3o-", ms=3, label="action: share of wrong moves")
    for share, style, text in zip(value_is_not_action(env), (":", "--"), ("unsure", "wrong")):
        axes[1, 2].axhline(share, color="C1", ls=style,
                           label=f"phi([s; g]) = V*(s, g): best policy {text}")
    axes[1, 2].set(xscale="log", xlabel=f"{env.name}: rank of V(s, g) = psi(s) phi(g)")
    axes[1, 2].set_xticks(ranks, map(str, ranks), fontsize=7)
    axes[1, 2].minorticks_off()
    axes[1, 2].legend(fontsize=7)
    envs.save_figure(figure, path)


def theory(seed):
    """`python hiql.py --theory`: prints the numbers, and returns those of its table."""
    print("Prop. 4.1 on the chain, error probabilities; simulated with 1,000,000 draws:")
    rng, numbers = np.random.default_rng(seed), {}
    for T, k, sigma in ((10, 3, 0.3), (25, 5, 0.2), (50, 7, 0.2), (100, 10, 0.2)):
        seen = chain_simulation(T, k, sigma, 1_000_000, rng)
        print(f"T {T:3} k {k:2} sigma {sigma}: flat {chain_error(T, sigma):.3f} "
              f"(simulated {seen['flat']:.3f}); hierarchy: bound "
              f"{chain_error(T / k, sigma) + chain_error(k, sigma):.3f}, manager or worker errs "
              f"{seen['either']:.3f}, wrong first action {seen['first']:.3f}")
    numbers["chain_bound"] = chain_error(T / k, sigma) + chain_error(k, sigma)
    numbers.update({f"chain_{name}": share for name, share in seen.items()})
    env, far = envs.make("grid-maze"), 8
    print(f"\nThe same on {env.name}, goals at least {far} steps away, k 5: wrong first actions")
    for sigma in (0.1, 0.2, 0.3):
        right = np.mean([first_actions(env, noisy(env, sigma, rng), 5) for _ in range(20)], 0)
        flat, hierarchy = 1 - right[:, env.distance >= far].mean(1)
        print(f"sigma {sigma}: flat {flat:.3f}, hierarchy {hierarchy:.3f}")
        numbers.update({f"maze_flat_{sigma}": flat, f"maze_hierarchy_{sigma}": hierarchy})
    print(f"\nProp. 5.1 on {env.name}: V(s, g) = psi(s) phi(g)")
    for rank in (1, 3, 8, np.linalg.matrix_rank(env.distance)):
        v = factor(-env.distance.astype(float), rank)
        wrong = 1 - first_actions(env, v, 5)[0][env.distance > 0].mean()
        print(f"rank {rank:3}: value error {np.abs(v + env.distance).mean():.4f} steps, "
              f"wrong moves {wrong:.4f}")
        numbers[f"wrong_at_rank_{rank}"] = wrong
    unsure, wrong = value_is_not_action(env)
    numbers.update({"unsure_with_phi_sg": unsure, "wrong_with_phi_sg": wrong})
    print(f"phi([s; g]) = V*(s, g): value error 0; the best policy of (s, phi) cannot be sure of "
          f"{unsure:.4f} of its moves, and {wrong:.4f} are wrong")
    return numbers


def main():
    experiment.main(Config, __doc__.split("\n\n")[0], resolve, prepare, train,
                    evaluate_checkpoint, theory=(theory, draw_theory))


if __name__ == "__main__":
    main()
