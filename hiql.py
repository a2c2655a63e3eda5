"""HIQL: hierarchical implicit Q-learning, offline and goal-conditioned. NumPy only.

Park, Ghosh, Eysenbach, Levine 2023, arXiv 2307.11949. From a data set without rewards learn
  V(s, phi([s; g]))   the value: minus the discounted number of steps to the goal; without
                      actions, by expectile regression
  pi_h(z | s, g)      the high-level policy (others say manager): chooses the representation
                      z = phi([s; w]) of the state w that lies k steps ahead
  pi_l(a | s, z)      the low-level policy (others say worker): the action that leads there
Both policies learn by advantage-weighted regression (AWR) from that one value.

    python hiql.py            trains on point-medium, two to six minutes on one core; leaves logs,
                              checkpoint, summary and pictures in runs/
    python hiql.py --help     every flag with its meaning and, where it differs, its published value

What `python hiql.py` does, in order:
1. `main` makes the config (`resolve`) and opens the run; `train` makes the maze, collects its data
   (`load_data`) and makes the networks (`init_params`); `run.begin` saves them.
2. `update`, in a plain loop: a batch (`sample`), all losses with their gradients, target EMA, Adam.
   Every eval_interval updates, and after the last one, `evaluate_all` and a checkpoint.
3. `draw` makes the pictures, `run.finish` prints the summary and writes summary.json.

The default is no reproduction [D12]. "Published" is OGBench's code: 512x3 units, batches of 1024,
1,000,000 updates, Adam 3e-4, EMA rate 0.005, inverse temperatures of both levels 3 (authors: 1),
discount 0.99, k 25; here 128x3, 256, 5,000, 2e-3 falling to 0 over the second half, 0.1, 10, 0.98,
8. And first layers bend at states of the data [D14]; theirs do not.

A layer is y, back = layer(params, x) with back(dy) -> dx, gradients (nets.py); no gradient flows
where `back` is not called, and `stop_gradient` only says so to the derivative check. `value_loss`
changes the value heads, and phi through V(s, z) alone; each policy's loss changes that policy
alone. All else is constant: the target network and what it sees, phi anywhere else, advantages and
weights.

Symbols inside the losses:
    s, s1 state and next state    g goal    a action
    w subgoal: the state k steps ahead, or where the trajectory or the goal comes first, that
    r reward in {-1, 0}    m mask    z representation
    adv, A: of policies the advantage; in value_loss the residual whose sign decides the weight
    v value, (2, B) of two heads    t value by the target network T
Shapes: batch B, states S (as `env.encode` shows them to the networks: positions, on OGBench's mazes
more), goals G (S, or with goal_indices fewer), representation R (G without phi), actions (B, a),
in mazes a = 2, or (B,) integers.
Tags [D1] ...: docs/deviations.md has what paper, authors' code and OGBench do, and why it is done
so here. Equation numbers are the paper's; (4), (6), (7) are confirmed by other texts, (5) is not.
"""

if __name__ == "__main__":
    import support
    support.one_line_interrupts()       # also while the modules below load

import nets                             # first: it sets one BLAS thread before numpy loads

import math
import zlib
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

import envs
from nets import (adam, adam_init, categorical_log_prob, ema, gaussian_log_prob, init_mlp,
                  length_normalize, mlp, stop_gradient, tree_map)
from support import plots
from support.datasets import DataAlone, check_dataset, jumps, load_dataset
from support.flags import (AT_LEAST_2, BELOW_1, INDICES, NOT_NEGATIVE, OPEN, POSITIVE, SHARE,
                           SIZES, make_config, option, parse, refuse_unused)
from support.runs import (Program, as_run, generators, numbers_of, one_line_errors, open_run,
                          read_run, run_seeds, say, show, versions_of)


ENVIRONMENTS, REPS = (*envs.ENVIRONMENTS, "none"), ("phi_sg", "phi_g", "none")
INITS = "data", "glorot"


@dataclass
class Config:
    """Everything that decides a run: default, meaning | OGBench's value.

    `resolve` puts in what the environment changes; the default one changes nothing."""

    env: str = option("point-medium", "environment [D21]; none: --dataset alone", ENVIRONMENTS)
    dataset: str = option("", "npz file in OGBench's layout; else data is collected")
    goal_indices: tuple = option((), "entries that make a goal [D20]; none: all", INDICES)
    seed: int = option(0, "seed of everything random, collected data included", NOT_NEGATIVE)
    steps: int = option(5000, "updates (of the value, with --policy-steps) | 1,000,000", POSITIVE)
    policy_steps: int = option(0, "the policies' updates after the value's [D9] | 0", NOT_NEGATIVE)
    batch_size: int = option(256, "transitions in a batch | 1024", POSITIVE)
    hidden_dims: tuple = option((128, 128, 128), "hidden layers | 512,512,512", SIZES)
    lr: float = option(2e-3, "Adam's learning rate | 3e-4", POSITIVE)
    lr_decay: bool = option(True, "it falls to 0 over the second half [D12] | constant")
    discount: float = option(0.98, "discount gamma | 0.99", OPEN)
    expectile: float = option(0.7, "expectile of Eq. (4) | 0.7", OPEN)
    tau: float = option(0.1, "EMA rate of the target network | 0.005", OPEN)
    subgoal_steps: int = option(8, "k: a subgoal is the state so many steps ahead | 25", POSITIVE)
    high_alpha: float = option(10.0, "AWR's inverse temperature, high level | 3", NOT_NEGATIVE)
    low_alpha: float = option(10.0, "AWR's inverse temperature, low level | 3", NOT_NEGATIVE)
    flat_alpha: float = option(10.0, "AWR's inverse temperature, flat [D18] | 10", NOT_NEGATIVE)
    rep_dim: int = option(10, "size R of phi | 10", AT_LEAST_2)
    rep_type: str = option("phi_sg", "subgoals: phi([s; g]), phi(g), or no phi [D8] | phi_sg", REPS)
    value_p_curgoal: float = option(0.2, "value goals: share of the state itself | 0.2", SHARE)
    value_p_trajgoal: float = option(0.5, "value goals: share of the geometric future | 0.5", SHARE)
    goal_discount: float = option(0.0, "discount of that future; 0: the value's | 0", BELOW_1)
    actor_p_randomgoal: float = option(0.0, "policy goals: share of random ones [D6] | 0", SHARE)
    first_layer_init: str = option("data", "units bend at data, or Glorot [D14] | glorot", INITS)
    action_free: float = option(0.0, "share of trajectories whose actions are hidden | 0", SHARE)
    train_flat: bool = option(True, "also train a flat policy on the same value, to compare | no")
    subgoal_interval: int = option(1, "steps between subgoals, acting [D10] | 1", POSITIVE)
    temperature: float = option(0.0, "integer actions: 0 likeliest, else drawn [D10]", NOT_NEGATIVE)
    eval_interval: int = option(1000, "updates between evaluations | 100,000", POSITIVE)
    eval_episodes: int = option(20, "evaluation episodes for each task | 50", POSITIVE)


PUBLISHED_RATES = dict(lr=3e-4, lr_decay=False, tau=0.005, high_alpha=3.0, low_alpha=3.0,
                       first_layer_init="glorot")                               # [D12]
QUICK = dict(steps=300, batch_size=128, hidden_dims=(64, 64), eval_interval=150, eval_episodes=4)
WORDS = {"quick": "the whole path in seconds, pictures included; success is not promised",
         "published_rates": "OGBench's rates, inverse temperatures and initialisation, not its "
                            "sizes, encoding, discount and k [D12]"}
ACTING = ("params", "update", "units")          # what acting and --eval need of an agent
# settings that no longer exist: a saved run is read only if it had these values
DEPARTED = dict(const_std=True, goal_reached_by="index", preset="fast", encoding="position")
PROGRAM = Program("hiql.py", Config, "update", ACTING, DEPARTED)


def resolve(given, config_class=Config, changes=None):
    """A whole Config: defaults, changed by environment, --published-rates, `changes`, --quick, and
    the flags given.

    given: {field: value}, and quick or published_rates: True. changes: those of a program of lab/.
    ValueError: a value out of its range, one without effect, or values that do not go together.
    """
    given = dict(given)
    name = given.setdefault("env", "none" if given.get("dataset") else Config.env)
    published, values = given.pop("published_rates", False), {}
    if name != "none":
        values.update(envs.make(name).settings(published))
    if published:
        values.update(PUBLISHED_RATES)
    values.update(changes or {})
    if given.pop("quick", False):
        values.update(QUICK)
        values["policy_steps"] = values["steps"] if values.get("policy_steps") else 0
    config = make_config(config_class, {**values, **given})
    refuse_unused(config, config_class(**values), {
        "rep_dim": config.rep_type == "none" and "--rep-type none",
        "flat_alpha": not (config.train_flat or changes) and "--no-train-flat"})
    if config.value_p_curgoal + config.value_p_trajgoal > 1:
        raise ValueError("--value-p-curgoal and --value-p-trajgoal must not exceed 1 together; the "
                         "rest are random goals")
    if config.temperature and name != "none" and not envs.make(name).discrete:
        raise ValueError(f"--temperature is for the discrete actions of grids, not for {name}")
    if config.goal_indices and name != "none":
        raise ValueError("--goal-indices is for --env none: a maze's state is a position")
    return config


# -------------------------------------------------------------------------------------- data


def goal_of(s, config):
    """What of states (..., S) makes a goal: (..., G), the entries goal_indices, or all."""
    return s[..., config.goal_indices] if config.goal_indices else s


def sample(data, rows, rng, config, env):
    """A batch of transitions with hindsight goals [D5][D6]: {name: array (B, ...)}.

    Row i is drawn uniformly from rows; "any row" is one with a transition, last the last such row
    of i's trajectory, k is subgoal_steps.
    value_goals         row i itself with probability value_p_curgoal (0.2); row min(i + j, last)
                        with value_p_trajgoal (0.5), j = 1, 2, ... from Geometric(1 - discount), or
                        with goal_discount in its place; else (0.3) any row
    rewards, masks      r = m = 0 where row i is its own value goal, else r = -1, m = 1
    high_actor_goals    uniform over rows i + 1 to last (i where i is last), but the two ends have
                        half the weight of a row between them; with probability
                        actor_p_randomgoal any row
    high_actor_targets  row min(i + k, that goal); if that goal is random, min(i + k, last)
    low_actor_goals     row min(i + k, last)
    """
    obs, valid, n = data.observations, data.valid, config.batch_size
    i = rows[rng.integers(len(rows), size=n)]
    last = data.last[i] - 1                             # data.last: a trajectory's last row
    ahead = np.minimum(i + config.subgoal_steps, last)

    future = np.minimum(i + rng.geometric(1 - (config.goal_discount or config.discount), n), last)
    draw = rng.random(n)
    value_goal = valid[rng.integers(len(valid), size=n)]
    near = draw < config.value_p_curgoal + config.value_p_trajgoal
    value_goal = np.where(near, future, value_goal)
    value_goal = np.where(draw < config.value_p_curgoal, i, value_goal)
    mask = (value_goal != i).astype(np.float32)

    share = rng.random(n)
    goal = np.rint(np.minimum(i + 1, last) * share + last * (1 - share)).astype(int)
    target = np.minimum(ahead, goal)
    if config.actor_p_randomgoal:
        other = rng.random(n) < config.actor_p_randomgoal
        goal = np.where(other, valid[rng.integers(len(valid), size=n)], goal)
        target = np.where(other, ahead, target)

    def goals(at):
        return goal_of(env.encode(obs[at]), config)

    return {"observations": env.encode(obs[i]), "next_observations": env.encode(obs[i + 1]),
            "actions": data.actions[i], "value_goals": goals(value_goal), "rewards": -mask,
            "masks": mask, "high_actor_goals": goals(goal),
            "high_actor_targets": env.encode(obs[target]), "low_actor_goals": goals(ahead)}


def hide_actions(data, fraction, rng):
    """Hide the actions of that fraction of trajectories, drawn at random: `data.labelled` keeps
    the rows of the others alone. ValueError if none are left.
    """
    trajectories = len(data.lengths)
    hidden = round(fraction * trajectories)
    if hidden >= trajectories:
        raise ValueError(f"--action-free {fraction} hides the actions of all trajectories")
    shown = np.ones(trajectories, bool)
    shown[rng.permutation(trajectories)[:hidden]] = False
    data.labelled = data.valid[np.repeat(shown, data.lengths)[data.valid]]


# ---------------------------------------------------------------------------------- networks


def concat(*arrays):
    """Arrays (B, .) side by side: [s; z]."""
    return np.concatenate(arrays, axis=-1)


def phi(params, s, g, config, env):
    """Representation z (B, R) of g as seen from s, of length sqrt(R); back(dz) -> grads.

    With rep_type "none" g itself [D8]. env.pair(s, g) is [s; g], on OGBench's mazes also the
    direction from s to g.
    """
    if config.rep_type == "none":
        return g, lambda dz: {}
    h, back_mlp = mlp(params["phi"], env.pair(s, g) if config.rep_type == "phi_sg" else g)
    z, back_length = length_normalize({}, h)
    return z, lambda dz: {"phi": back_mlp(back_length(dz)[0])[1]}


def value(p, s, z):
    """Both value heads (2, B) at s (B, S) and z (B, R); back(dv) -> (dz, grads)."""
    v, back_mlp = mlp(p, concat(s, z))

    def back(dv):
        dx, grads = back_mlp(dv[..., None])
        return dx[:, s.shape[1]:], grads

    return v[..., 0], back


def mean_value(params, s, g, config, env):
    """V(s, phi([s; g])) (B,), the mean of the two heads, as advantages take it [D4]."""
    z, _ = phi(params, s, g, config, env)
    v, _ = value(params["value"], s, z)
    return v.mean(0)


def init_net(rng, config, env, data, inputs, n_out, **kind):
    """Parameters of an `mlp`, by Glorot; kind: of `nets.init_mlp`.

    inputs: words for what the network sees side by side: state, goal, pair (what env.pair adds to
    these two), subgoal (a representation), action. By default the first layer is then bent [D14].
    """
    state = env.encode(data.observations[:1]).shape[-1]
    goal = len(goal_of(np.zeros(state), config))
    rep = goal if config.rep_type == "none" else config.rep_dim
    sizes = {"state": state, "goal": goal, "pair": env.extra, "subgoal": rep,
             "action": env.action_dim}
    n_in = sum(sizes[x] for x in inputs)
    p = init_mlp(rng, (n_in, *config.hidden_dims, n_out), **kind)
    if config.first_layer_init == "data":
        units = p["dense0"]["b"].shape                          # (H,) or (2, H)
        drawn = ("state", "goal") + ("subgoal",) * (config.rep_type == "none")
        points = []                                             # one input for each unit
        for x in inputs:
            point = np.zeros(units + (sizes[x],), np.float32)
            if x in drawn:
                s = env.encode(data.observations[rng.choice(data.valid, units)])
                point = s if x == "state" else goal_of(s, config)
            points.append(point)
        bend_first_layer(p, concat(*points), env.side)
    return p


def bend_first_layer(p, points, side):
    """First layers that bend at states of the data, in place [D14].

    Weights become 8 / side (of a cell) times Glorot's; the bias of unit h is -points_h . W[:, h],
    points (H, I) or (2, H, I). So each unit is 0 inside the maze, and turns about as sharply as its
    corridors do.
    """
    w = p["dense0"]["W"]                                        # (I, H) or (2, I, H)
    w *= 8 / side
    p["dense0"]["b"][:] = -np.einsum("...ih,...hi->...h", w, points)


def init_policy(rng, config, env, data, inputs, n_out):
    """Parameters of a policy [D7]; its last layer starts at 0.1 times Glorot's [D14]."""
    return init_net(rng, config, env, data, inputs, n_out, last_scale=0.1)


def init_value(rng, config, env, data):
    """Parameters of phi, of the two value heads, and of their target [D3]."""
    params = {}
    seen = ("state", "goal", "pair") if config.rep_type == "phi_sg" else ("goal",)
    if config.rep_type != "none":
        params["phi"] = init_net(rng, config, env, data, seen, config.rep_dim, norm=True)
    params["value"] = init_net(rng, config, env, data, ("state", "subgoal"), 1, norm=True,
                               ensemble=2)
    params["target"] = {"value": tree_map(np.copy, params["value"])}
    return params


def init_params(config, env, data, rngs):
    """Parameters of all networks, float32; rngs: generators "init" and "flat"."""
    setting, rng = (config, env, data), rngs["init"]
    rep = config.rep_dim
    if config.rep_type == "none":
        rep = goal_of(env.encode(data.observations[:1]), config).shape[-1]
    params = init_value(rng, *setting)
    params["high"] = init_policy(rng, *setting, ("state", "goal", "pair"), rep)
    params["low"] = init_policy(rng, *setting, ("state", "subgoal"), env.action_dim)
    if config.train_flat:
        params["flat"] = init_policy(rngs["flat"], *setting, ("state", "goal", "pair"),
                                     env.action_dim)
    return params


def init_optimiser(params):
    """Adam's state for all networks but the target, which no loss changes."""
    return adam_init({name: p for name, p in params.items() if name != "target"})


# ------------------------------------------------------------------------------------- losses


def expectile_weight(expectile, adv):
    """|expectile - 1(A < 0)|, the weight of the squared error in expectile regression; (B,).

    .real: for the derivative check, here and in nets.py."""
    return np.where(adv.real >= 0, expectile, 1 - expectile).astype(adv.real.dtype)


def awr_weight(alpha, adv):
    """min(exp(alpha A), 100), by clipping the exponent: nothing overflows [D11]; (B,).

    Weights below 1e-20 are 0: they change nothing, but what they multiply would become subnormal
    numbers, which are slow.
    """
    weight = np.exp(np.minimum(alpha * adv, math.log(100)))
    return weight * (weight > 1e-20)


def awr(p, x, target, weight):
    """L = -mean(weight log pi(target | x)) -> loss, gradients of the policy p.

    pi: Gaussian with mean mlp(x) and std 1 [D7], or categorical if target is integers.
    x (B, .); target (B, .), or (B,) integers; weight (B,). Constants: all three.
    """
    output, back_mlp = mlp(p, x)
    log_density = categorical_log_prob if target.dtype.kind == "i" else gaussian_log_prob
    log_prob, back_density = log_density({}, output, target)
    d_output, _ = back_density(-weight / len(x))
    return -(weight * log_prob).mean(), back_mlp(d_output)[1]


def value_loss(params, batch, config, env):
    """Expectile regression of the action-free value, Eq. (4) [D1][D2][D3].

    q_j = r + gamma m T_j(s', z'),  A = r + gamma m min_j T_j(s', z') - mean_j T_j(s, z)
    L_V = sum_j mean( |expectile - 1(A < 0)| (q_j - V_j(s, z))^2 ),  z = phi([s; g]), z' at s'
    -> loss, {network: gradients}, as all losses here.
    s, s' (B,S), g (B,G); r in {-1, 0} and m = -r (B,). T: target network.
    Constants: T, phi at s', phi as T sees it, hence q and the weight. Learned: V and phi at s.
    """
    s, s1, g, r, m = (batch[x] for x in ("observations", "next_observations", "value_goals",
                                         "rewards", "masks"))
    z, back_phi = phi(params, s, g, config, env)
    z1 = stop_gradient(phi(params, s1, g, config, env)[0])
    v, back_v = value(params["value"], s, z)
    t = stop_gradient(value(params["target"]["value"], s, stop_gradient(z))[0])
    t1 = stop_gradient(value(params["target"]["value"], s1, z1)[0])
    q = r + config.discount * m * t1
    adv = r + config.discount * m * t1.min(0) - t.mean(0)
    weight = expectile_weight(config.expectile, adv)
    error = q - v
    dz, grads = back_v(-2 / len(s) * weight * error)
    return (weight * error * error).mean(-1).sum(), {"value": grads, **back_phi(dz)}


def high_loss(params, batch, config, env):
    """High-level policy by AWR, J_h (Eq. 6): A = V(w, g) - V(s, g), w the state k steps ahead.

    L = -mean( min(exp(alpha A), 100) log pi_h(phi([s; w]) | s, g) ).   s, w (B,S), g (B,G).
    w is a whole state, because V is evaluated at it; in phi it is a goal. Without phi the target is
    w - s, of the entries that make a goal [D8]. Constants: A, phi [D3].
    """
    s, g, w = (batch[x] for x in ("observations", "high_actor_goals", "high_actor_targets"))
    adv = mean_value(params, w, g, config, env) - mean_value(params, s, g, config, env)
    if config.rep_type == "none":
        target = goal_of(w, config) - goal_of(s, config)                        # [D8]
    else:
        target, _ = phi(params, s, goal_of(w, config), config, env)
    weight = awr_weight(config.high_alpha, stop_gradient(adv))
    loss, grads = awr(params["high"], env.pair(s, g), stop_gradient(target), weight)
    return loss, {"high": grads}


def low_loss(params, batch, config, env):
    """Low-level policy by AWR, J_l (Eq. 7): A = V(s', w) - V(s, w), w the state k steps ahead.

    L = -mean( min(exp(alpha A), 100) log pi_l(a | s, phi([s; w])) ).
    s, s' (B,S), w (B,G); a (B,a) or (B,). Constants: A, phi [D3].
    """
    s, s1, a, w = (batch[x] for x in ("observations", "next_observations", "actions",
                                      "low_actor_goals"))
    adv = mean_value(params, s1, w, config, env) - mean_value(params, s, w, config, env)
    z = stop_gradient(phi(params, s, w, config, env)[0])
    weight = awr_weight(config.low_alpha, stop_gradient(adv))
    loss, grads = awr(params["low"], concat(s, z), a, weight)
    return loss, {"low": grads}


def flat_loss(params, batch, config, env):
    """One policy without hierarchy, to compare, Eq. (5): A = V(s', g) - V(s, g).

    L = -mean( min(exp(alpha A), 100) log pi(a | s, g) ).   s, s' (B,S), g (B,G); a (B,a) or (B,).
    Constants: A.
    """
    s, s1, a, g = (batch[x] for x in ("observations", "next_observations", "actions",
                                      "high_actor_goals"))
    adv = mean_value(params, s1, g, config, env) - mean_value(params, s, g, config, env)
    weight = awr_weight(config.flat_alpha, stop_gradient(adv))
    loss, grads = awr(params["flat"], env.pair(s, g), a, weight)
    return loss, {"flat": grads}


LOSSES = {"value": value_loss, "high": high_loss, "low": low_loss}


# --------------------------------------------------------------------------------- one update


def update(agent, data, rng, config, env, losses=LOSSES, sample=sample):
    """One update of HIQL in place: a batch, all losses, target EMA, Adam -> {loss: value}.

    agent: params, optimiser, update (how many were made). All gradients come before any change;
    the target, of the value heads alone, follows their values before the step [D3]. Networks
    without a gradient stay as they are.
    """
    params, u = agent["params"], int(agent["update"])
    if u == config.steps:                               # the policies' phase has its own Adam [D9]
        agent["optimiser"] = init_optimiser(params)
    losses, lr = schedule(u, losses, config)
    batch = labelled = sample(data, data.valid, rng, config, env)
    if len(data.labelled) < len(data.valid):            # some actions are hidden
        labelled = sample(data, data.labelled, rng, config, env)
    values, grads = {}, {}
    for name, loss in losses.items():
        seen = labelled if name in ("low", "flat") else batch
        values[f"{name}_loss"], gradient = loss(params, seen, config, env)
        grads.update(gradient)
    if "value" in losses:
        ema(params["target"], params, config.tau)
    adam(params, grads, agent["optimiser"], lr)
    agent["update"] += 1
    return values


def schedule(u, losses, config):
    """The losses of update u, and its learning rate: constant, then falling linearly to 0 over the
    second half; with policy_steps two phases have each this course, the value's first [D9][D12]."""
    begin, length = 0, config.steps
    if u >= config.steps:
        begin, length = config.steps, config.policy_steps
    if config.policy_steps:
        value_first = u < config.steps
        losses = {name: f for name, f in losses.items() if (name == "value") == value_first}
    if not config.lr_decay:
        return losses, config.lr
    return losses, config.lr * min(1, 2 * (1 - (u - begin) / length))


# ------------------------------------------------------------------------------------- acting


def subgoal(params, s, g, config, env):
    """What the high-level policy asks for: its mean, scaled to length sqrt(R); without phi its
    mean added to s, to the entries that make a goal [D10]."""
    mean, _ = mlp(params["high"], env.pair(s, g))
    if config.rep_type == "none":
        return goal_of(s, config) + mean
    return length_normalize({}, mean)[0]


class Actor:
    """Both policies, acting in N episodes: actor(s (N,d), g (N,G), t) -> actions (N, a) or (N,).

    s, g as they are observed; t: the step of the episode, which begins with 0. One class for
    evaluation, `load` and pictures; its objects can be pickled. ValueError: t is not 0 at first.
    """

    z = None                                            # the subgoal

    def __init__(self, params, config, env, rng=None):
        """rng: integer actions are drawn from it; without one from seed 0."""
        self.params, self.config, self.env = params, config, env
        self.rng = rng or np.random.default_rng(0)
        self.dtype = next(iter(nets.flatten(params).values()), np.zeros(0, np.float32)).dtype

    def __call__(self, s, g, t):
        s, g = self.env.encode(s, self.dtype), self.env.encode_goal(g, self.dtype)
        if t % self.config.subgoal_interval == 0:
            self.z = subgoal(self.params, s, g, self.config, self.env)
        if self.z is None:
            raise ValueError(f"an episode begins with t = 0, and not with {t}")
        output, _ = mlp(self.params["low"], concat(s, self.z))
        return self.choose(output)

    def choose(self, output):
        """A policy's output (N, .) as actions: the mean, clipped; or integers (N,), the likeliest,
        with a temperature drawn [D10]."""
        if self.env.discrete:                           # Gumbel noise draws by softmax(out / T)
            noise = self.rng.gumbel(size=output.shape)
            return (output + self.config.temperature * noise).argmax(-1)
        return np.clip(output, -1, 1)


class FlatActor(Actor):
    """The flat policy, acting as `Actor` does."""

    def __call__(self, s, g, t):
        s, g = self.env.encode(s, self.dtype), self.env.encode_goal(g, self.dtype)
        output, _ = mlp(self.params["flat"], self.env.pair(s, g))
        return self.choose(output)


ACTORS = {"hiql": Actor}


# --------------------------------------------------------------------------------- evaluation


def rollout(env, act, starts, goals, rng):
    """N episodes side by side, each ended by success or its time limit.

    act(s (N,2), goals, t) -> actions; starts, goals (N,2) -> success (N,), steps (N,) of each
    episode, paths (T+1, N, 2), where an episode that has ended stays at its last position.
    """
    s, limits = starts, env.limits(starts, goals)
    success, steps, paths = np.zeros(len(s), bool), limits.copy(), [s]
    for t in range(limits.max()):
        moved = env.move(s, act(s, goals, t), rng)
        live = ~success & (t < limits)
        s = np.where(live[:, None], moved, s)
        paths.append(s)
        arrived = live & env.success(s, goals)
        steps[arrived] = t + 1
        success = success | arrived
        if (success | (t + 1 >= limits)).all():
            break
    return success, steps, np.array(paths)


def evaluate_maze(actor, params, config, env, u):
    """Success of one actor on the maze's tasks and on 200 random pairs (see `pair_distance`).

    Starts and goals depend only on the seed and on u, the number of updates: evaluation does not
    use the generators of training. -> summary, where mean_steps is of the tasks, failures included,
    and episodes of the tasks: paths (T+1, tasks, N, 2), goals (tasks, N, 2), success (tasks, N).
    """
    rng = np.random.default_rng([config.seed, u])
    tasks = np.array(env.tasks).repeat(config.eval_episodes, axis=0)    # (tasks N, 2, 2) cells
    pairs = env.random_pairs(rng, 200, min(env.pair_distance, env.distance.max()))
    starts, goals = (env.place(np.concatenate([tasks[:, i], pairs[i]]), rng) for i in (0, 1))
    success, steps, paths = rollout(env, actor(params, config, env, rng), starts, goals, rng)
    n, k = len(tasks), len(env.tasks)
    by_task = success[:n].reshape(k, -1)
    summary = {"success": float(by_task.mean()), "success_per_task": by_task.mean(1).tolist(),
               "success_worst_task": float(by_task.mean(1).min()),
               "success_random": float(success[n:].mean()), "mean_steps": float(steps[:n].mean())}
    return summary, (paths[:, :n].reshape(len(paths), k, -1, 2), goals[:n].reshape(k, -1, 2),
                     by_task)


def evaluate_all(agent, config, env, actors, evaluate=None):
    """All actors: the first is the agent; keys of the others, trained beside it, begin with flat_.

    evaluate(act) -> {name: number}: instead of the maze's evaluation; data alone have none.
    -> summary, {name of an actor: episodes of `evaluate_maze`}. {}, {} before there is a policy.
    """
    summary, episodes, u = {}, {}, int(agent["update"])
    if (config.policy_steps and u <= config.steps) or (config.env == "none" and not evaluate):
        return summary, episodes
    for name, actor in actors.items():
        if evaluate:
            found = numbers_of(evaluate(actor(agent["params"], config, env)))
        else:
            found, episodes[name] = evaluate_maze(actor, agent["params"], config, env, u)
        if summary and not evaluate:
            found = {key: found[key] for key in ("success", "success_random", "success_per_task")}
        summary.update({f"flat_{key}" if summary else key: x for key, x in found.items()})
    return summary, episodes


def value_map(params, s, g, config, env):
    """`mean_value` (N,) of observations s, g (N,2), for pictures and measurements."""
    return mean_value(params, env.encode(s), env.encode_goal(g), config, env)


def subgoal_places(params, s, g, points, config, env):
    """Where the high-level policy sends states s (T,2) with one goal g (1,2): (T,2).

    A subgoal is a representation; it is drawn at that one of the points w (n,2) whose
    phi([s; w]) is nearest to it.
    """
    s, g, w = env.encode(s), env.encode_goal(g), env.encode_goal(points)
    nearest = []
    for x in s[:, None]:
        z = subgoal(params, x, g, config, env)
        there, _ = phi(params, x.repeat(len(w), 0), w, config, env)
        nearest.append(((there - z) ** 2).sum(1).argmin())
    return points[nearest]


# -------------------------------------------------------------------------------- the program


def load_data(data, config, rngs, env=None):
    """Environment and Dataset of a run; see `train` for data, env and errors. rngs: generators
    "data" and "hide"."""
    if not (data is None or isinstance(data, envs.Dataset)):
        raise ValueError("data must be an envs.Dataset(observations, actions, terminals), not "
                         f"{type(data).__name__}")
    if data is None and config.dataset:
        data = load_dataset(config.dataset)
    if config.env == "none":
        if data is None:
            raise ValueError("--env none needs a --dataset")
        env = DataAlone(data, config.subgoal_steps, config.goal_indices,
                        config.dataset or "the data set")
        if config.temperature and not env.discrete:
            raise ValueError("--temperature is for discrete actions")
        if env.still:
            say(f"note: entries {env.still} of the states hardly move, and are hardly seen")
        if far := jumps(data):
            say(f"note: {far:,} transitions are far beyond the usual step; is the last row of each "
                "trajectory marked?")
    else:
        env = env or make_maze(config)
        data = env.dataset(rngs["data"]) if data is None else data
        check_dataset(data, env, config.dataset or f"the data of {env.name}")
        if not env.tasks:
            raise ValueError(f"{env.name} has no tasks to be evaluated on; without tasks=... it "
                             "has five far ones")
    if config.subgoal_steps >= data.lengths.max() - 1:
        raise ValueError(f"--subgoal-steps {config.subgoal_steps} must be below the "
                         f"{data.lengths.max() - 1} transitions of the longest trajectory")
    hide_actions(data, config.action_free, rngs["hide"])
    return env, data


def make_maze(config):
    """The maze of a config; without phi its networks see positions alone, since a subgoal is a
    place then."""
    env = envs.make(config.env)
    if config.rep_type == "none":
        env.see_positions()
    return env


@np.errstate(over="ignore", invalid="ignore")           # run.step refuses what is not finite
def train(data, config, evaluate=None, run=None, *, env=None, losses=LOSSES, actors=ACTORS,
          sample=sample, init_params=init_params):
    """A whole run: data, networks, updates, evaluations, pictures, summary.

    data: an `envs.Dataset`, or None: the config's file, or else collected. evaluate(act) -> {name:
    number}, such as the success, called now and then and at the end instead of the maze's own
    evaluation; act(s (N,d), g (N,G), t) -> actions. run: a folder, or a `support.runs.Run`; without
    one nothing is written. env: the maze, if it is not as the config makes it; losses, actors,
    sample, init_params: what a variant replaces; with train_flat the flat policy is trained beside.
    -> namespace: summary, agent (tree of arrays), act. ValueError: data that are not of the
    environment, are too short for subgoal_steps, or lose all actions by action_free.
    """
    run, total = as_run(run, PROGRAM, config), config.steps + config.policy_steps
    name = next(iter(actors))
    if config.train_flat:
        losses = {**losses, "flat": losses.get("flat", flat_loss)}
        actors = {**actors, "flat, same value": FlatActor}
    say(f"{config.env}, seed {config.seed}: {' and '.join(actors)}; {total:,} updates of "
        f"{config.batch_size}")

    rngs = generators(config.seed, "data", "hide", "init", "flat", "batch")
    env, data = load_data(data, config, rngs, env)
    params, mine = init_params(config, env, data, rngs), checksum(data)
    agent = {"params": params, "optimiser": init_optimiser(params), "units": env.units,
             "data": mine, "update": np.zeros((), np.int64)}
    own = "an evaluate(act) from Python" if evaluate else None
    run.begin(agent, rngs, total, given=own)            # saves; resumed: overwrites agent and rngs
    if agent["data"] != mine:
        raise ValueError("the data are not those of the run: their file has changed, or what "
                         f"collects them; the run was made with {versions_of(run.history[0])}, "
                         f"now there is {versions_of(run.history[-1])}")

    for u in range(int(agent["update"]) + 1, total + 1):
        row = update(agent, data, rngs["batch"], config, env, losses, sample)
        run.step(u, row)
        due = u % config.eval_interval == 0 and u < total
        if due:
            run.evaluated(u, evaluate_all(agent, config, env, actors, evaluate)[0])
        if due or run.stopped:
            run.save(agent, rngs)                       # a stopped run ends here

    found, episodes = evaluate_all(agent, config, env, actors, evaluate)
    run.evaluated(total, found)
    run.save(agent, rngs)
    summary = {"env": config.env, "agent": name, "seed": config.seed, "updates": total, **found,
               "episodes": config.eval_episodes * len(env.tasks),
               "train_seconds": round(run.seconds(), 1), "data": f"{int(mine):08x}"}
    if run.folder:
        draw(run, agent["params"], config, env, episodes)
    run.finish(summary)
    return SimpleNamespace(summary=summary, agent=agent,
                           act=actors[name](agent["params"], config, env))


def checksum(data):
    """CRC-32 of a data set's arrays."""
    found = 0
    for x in (data.observations, data.actions, data.terminals):
        found = zlib.crc32(x.tobytes(), found)
    return np.array(found)


def draw(run, params, config, env, episodes):
    """The pictures of a run; on mazes with the value and the subgoals asked for."""
    plots.draw_curve(run.path("curve.png"), run.logs, "update")
    if not episodes:
        return
    plots.draw_trajectories(run.path("trajectories.png"), env, episodes)
    if "value" not in params:
        return
    points, maps = plots.free_points(env), []
    paths, goals, success = next(iter(episodes.values()))
    for i in range(len(env.tasks)):
        path, goal = paths[:, i, 0], goals[i, :1]
        v = value_map(params, points, goal.repeat(len(points), 0), config, env)
        starts, subgoals = path[::config.subgoal_steps], None
        if "high" in params:
            subgoals = subgoal_places(params, starts, goal, points, config, env)
        maps.append({"values": v, "path": path, "goal": goal[0], "success": success[i, 0],
                     "starts": starts, "subgoals": subgoals})
    plots.draw_value(run.path("value.png"), env, maps)


def restored(folder):
    """A saved run -> `support.runs.Saved`, its environment. What `read_run` refuses."""
    saved = read_run(PROGRAM, folder)
    if saved.config.env == "none":
        return saved, DataAlone.restored(saved.agent["units"], saved.config.goal_indices)
    return saved, make_maze(saved.config)


def load(folder):
    """act(s (N,d), g (N,G), t) -> actions of a trained run; s, g observations, t the step."""
    saved, env = restored(folder)
    return Actor(saved.agent["params"], saved.config, env)


def evaluate_saved(saved, env, actors=ACTORS, evaluate=None):
    """The evaluation of a saved run (see `restored`), with the starts and goals of the one in
    training. ValueError: it has no policy yet, or nothing to be evaluated in."""
    config = saved.config
    if config.env == "none" and not evaluate:
        raise ValueError("a run on data alone has no environment to be evaluated in; from Python, "
                         "hiql.load(FOLDER) gives its act")
    if config.train_flat:
        actors = {**actors, "flat, same value": FlatActor}
    found, _ = evaluate_all(saved.agent, config, env, actors, evaluate)
    if not found:
        raise ValueError(f"the run was stopped after {int(saved.agent['update'])} updates, before "
                         "its policies began; there is nothing to evaluate yet")
    return {"updates": int(saved.agent["update"]), **found}


def main():
    given, call = parse(PROGRAM, __doc__, WORDS)
    with one_line_errors():
        if call.eval:
            return show(evaluate_saved(*restored(call.eval)))
        config = resolve(given)
        if call.seeds:
            return run_seeds(PROGRAM, call, given, config)
        with open_run(PROGRAM, call, config) as run:
            train(None, run.config, run=run)


if __name__ == "__main__":
    main()
