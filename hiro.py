"""HIRO: hierarchical reinforcement learning with off-policy correction, online. NumPy only.

Nachum, Gu, Lee, Levine 2018, arXiv 1805.08296. Two policies, both TD3 (Fujimoto et al. 2018):
  mu_hi(g | s, D)    the manager: every c steps a goal g, relative to the position in s
  mu_lo(a | s, g)    the worker: rewarded for moving by g
Old goals of the manager are replaced, whenever they are sampled, by goals that explain what the
worker did (off-policy correction), since the worker of today would act otherwise on them.

    python hiro.py                    trains on HIRO's U-maze with a point mass
    python hiro.py --help             every flag with its meaning and source

Symbols: s, s1 state and next state, position first; g, g1 relative goal before and after the
step; D the task's goal; a action in [-1, 1], which `World` scales to the action space; r reward;
m mask; q critics' values; mu policy. Shapes: batch B, state S, position P, action A, twin
critics 2.

Where the paper [P], its authors' code [O] (tensorflow/models, research/efficient-hrl), TD3's and
public ports [W] (watakandai/hiro_pytorch), [B] (bhairavmehta95/data-efficient-hrl) differ, what
is done here, and why:
 E1  Worker's g' at a window's end: P h(s,g,s'); O the manager's next goal. `--boundary`; as P.
 E2  Windows hold s_t ... s_{t+c} inclusive, from the episode's first step (P). O begins at step
     1 and ends with stale entries; W keeps s_{t+c-1}, so that its candidate is a step short; B
     applies h once too often.
 E3  Correction: all candidates are clipped (O; W not s_{t+c} - s_t); errors of actions are
     divided by half the action range (O); done at each sampling, never written back (O). Ties
     go to the original.
 E4  Target noise is in units of half the action range, so that the manager's is wider than O's,
     and the noisy action is clipped to that range (TD3, W); O takes the same numbers at both
     levels and does not clip.
 E5  Huber loss (O) or half the squared error (P: squared): `--critic-loss`.
 E6  Policy and targets move at every 2nd update (TD3, O); P: targets at each; B: both at each.
 E7  Goals lie within what c steps can cover: +-2 on the U-maze (P, O: +-10).
 E8  The worker sees its position (O's hiro_xy), not zeros in its place (O's hiro_orig):
     `--see-position`.
 E9  Worker's discount 0.95, as in HRAC and HIGL (P, O: 0.99).
 E10 Exploration decides on this maze. The manager's noise has std 2 in units of the goals'
     half-width, before clipping, and is correlated by 0.75 from goal to goal (P, O: std 1 of
     +-10, independent). The warm-up holds a random action for a window (O: the untrained
     policy) and draws its goals afterwards. Worker's noise 0.1, as O's point_maze.gin advises.
 E11 Task rewards times 0.02 (P, O: 0.1), which keeps most errors in Huber's square.
 E12 The manager learns 5 times for each of its goals (P, O: once); updates come at a window's
     end, the worker's one for each step.
 E13 Time limits are not terminations: the last window keeps its true length and bootstraps with
     one gamma_high (O: no terminations at all; W, B: a time limit is one). A true termination
     ends the values of both levels.
 E14 Networks 64,64 (P, O: 300,300), Adam 3e-4 and 1e-3 (P, O: 1e-4 and 1e-3), falling linearly
     to 0 over the last third; last layers of policies 0.1 x Glorot (O: U(+-0.003)). The critic
     sees the action at its first layer (TD3; O: twice). Replay holds capacity / c windows, from
     which both levels sample (P, O: 200,000 transitions for each).
 E15 U-maze: the point slides along walls; `--contact undo` as O, whose robot does not move into
     them at all. Its state is the position alone (O: heading, velocity and time too). `success`
     is within 2.5 at any step, as in HIGL; `success_last_step` within 5 at the end, as P, O.
 E16 `--low-relabel` as O's relabel_contexts: each worker's goal is the way to another state of the
     batch plus noise, clipped here to the goal range. `--pretrain`: uniform goals (P: Gaussian).
 E17 grid-fourrooms (P, O: no grid): the cell is seen one-hot too; the manager is asked every 3
     steps for goals within +-3, its noise is of their size and independent, its discount 0.9;
     the worker's noise of 0.5 stays on in evaluation, since without it a wrong action is
     repeated for ever.
 E18 `--agent td3`, one policy on the task's reward: discount 0.99, noise 0.3 (on the grid 0.5), the
     rest as the worker's; not tuned.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

import envs
import experiment
from experiment import option
from nets import adam, adam_init, ema, forward, init_mlp, mlp, relu, stop, tanh, tree_map

AGENTS = ("hiro", "td3")
ENDLESS = 10_000                        # an episode of more steps has no time limit


@dataclass
class Config:
    """Everything that decides a run; `resolve` puts in what depends on the environment."""

    env: str = option("point-umaze", "task", tuple(envs.GOAL_TASKS))
    agent: str = option("hiro", "hiro; td3: no hierarchy, on the task's reward", AGENTS)
    seed: int = option(0, "seed of everything random")
    steps: int = option(60_000, "environment steps (P: 10 million)")
    c: int = option(10, "steps between the manager's goals (O: 10)")
    goal_range: float = option(2.0, "half-width of relative goals; 0: the 95th percentile of "
                               "moves in c steps of the warm-up (P, O: 10) [E7]")
    hidden: tuple = option((64, 64), "hidden layers of every network (P, O: 300,300)")
    batch: int = option(100, "batch size of both levels (O: 100)")
    actor_lr: float = option(3e-4, "Adam's learning rate of the policies (P, O: 1e-4)")
    critic_lr: float = option(1e-3, "Adam's learning rate of the critics (P, O: 1e-3)")
    decay: bool = option(True, "learning rates fall linearly to 0 over the last third [E14]")
    low_gamma: float = option(0.95, "worker's discount (P, O: 0.99) [E9]")
    high_gamma: float = option(0.99, "manager's discount for each of its steps (P, O: 0.99)")
    target_rate: float = option(0.005, "EMA rate of the target networks (P, O: 0.005)")
    delay: int = option(2, "critic updates for each update of policy and targets (O: 2) [E6]")
    low_noise: float = option(0.1, "worker's exploration noise, in units of half the action range "
                             "(P, O: 1.0, not scaled)")
    eval_noise: float = option(0.0, "worker's noise in evaluation, in the same units [E17]")
    high_noise: float = option(2.0, "manager's exploration noise, in units of the goals' "
                              "half-width (P, O: 0.1) [E10]")
    noise_keep: float = option(0.75, "correlation of the manager's noise with its last one [E10]")
    target_noise: float = option(0.2, "std of the noise on target actions (O: 0.2)")
    target_clip: float = option(0.5, "bound of that noise (O: 0.5)")
    reward_scale: float = option(0.02, "factor on the task's reward (P, O: 0.1) [E11]")
    critic_loss: str = option("huber", "loss of the critics' errors [E5]", ("huber", "squared"))
    warmup: int = option(2500, "first steps, by random actions without learning (O: 2500)")
    high_updates: int = option(5, "manager updates for each of its goals (P, O: 1) [E12]")
    capacity: int = option(200_000, "steps kept for replay (P, O: 200000) [E14]")
    correction: str = option("off_policy", "relabelling of the manager's goals, Eq. (5)",
                             ("off_policy", "none"))
    candidates: int = option(10, "goals that the correction chooses from (P, O: 10)")
    boundary: str = option("h", "worker's next goal where the manager gives a new one [E1]",
                           ("h", "new"))
    low_relabel: bool = option(False, "worker learns for goals at other states of the batch [E16]")
    pretrain: int = option(0, "steps of training the worker alone on random goals; then it is "
                           "frozen [E16]")
    see_position: bool = option(True, "the worker sees its position [E8]")
    contact: str = option("slide", "walls of the U-maze: slide along or undo the move [E15]",
                          ("slide", "undo"))
    episodes: int = option(50, "evaluation episodes for each test (O: 50)")
    eval_every: int = option(2500, "steps between evaluations and checkpoints")


DEFAULTS = {"grid": dict(c=3, goal_range=3.0, low_noise=0.5, eval_noise=0.5, high_gamma=0.9,
                         high_noise=1.0, noise_keep=0.0)}                   # [E17]
QUICK = dict(steps=2000, warmup=500, eval_every=1000, episodes=4)


def resolve(given):
    """A whole Config from the flags given: defaults of the environment, then the flags."""
    given, values = dict(given), {}
    for start, changes in DEFAULTS.items():
        if given.get("env", Config.env).startswith(start):
            values.update(changes)
    if given.get("agent") == "td3":
        values = {"low_gamma": Config.high_gamma, "low_noise": 0.3, **values}       # [E18]
    if given.pop("quick", False):
        values.update(QUICK)
    c = Config(**{**values, **given})
    experiment.demand(c, lambda x: 0 < x < math.inf, "positive", "steps", "c", "batch", "actor_lr",
                      "critic_lr", "delay", "reward_scale", "high_updates", "capacity", "episodes",
                      "eval_every")
    experiment.demand(c, lambda x: len(x) and min(x) > 0, "positive sizes such as 64,64", "hidden")
    experiment.demand(c, lambda x: 0 < x < 1, "in (0, 1)", "low_gamma", "high_gamma")
    experiment.demand(c, lambda x: 0 < x <= 1, "in (0, 1]", "target_rate")
    experiment.demand(c, lambda x: 0 <= x < 1, "in [0, 1)", "noise_keep")
    experiment.demand(c, lambda x: 0 <= x < math.inf, "at least 0", "seed", "goal_range",
                      "low_noise", "eval_noise", "high_noise", "target_noise", "target_clip",
                      "pretrain")
    experiment.demand(c, lambda x: x >= 2, "at least 2: the old goal and the move made",
                      "candidates")
    experiment.demand(c, lambda x: x >= c.c, f"at least --c {c.c}", "warmup", "capacity")
    if c.steps <= c.warmup:
        raise ValueError(f"--steps {c.steps} must be above --warmup {c.warmup}: learning begins "
                         "after it")
    if c.pretrain and not c.warmup < c.pretrain < c.steps:
        raise ValueError(f"--pretrain {c.pretrain} must lie between --warmup {c.warmup} and "
                         f"--steps {c.steps}, or be 0")
    if c.low_relabel and c.boundary == "new":
        raise ValueError("--boundary new is the manager's next goal, which says nothing of the "
                         "goals of --low-relabel")
    if c.agent == "td3":
        for name in ("correction", "boundary", "low_relabel", "pretrain", "see_position"):
            if getattr(c, name) != getattr(Config, name):
                raise ValueError(f"--{name.replace('_', '-')} is for --agent hiro; td3 has no "
                                 "hierarchy")
    if c.contact != "slide" and c.env != "point-umaze":
        raise ValueError(f"--contact is for point-umaze, not {c.env}")
    return c


# -------------------------------------------------------------------------------- goals


def next_goal(s, g, s1):
    """h(s, g, s') = s + g - s' over positions, Eq. (2): the same place, seen from s'."""
    P = g.shape[-1]
    return s[..., :P] + g - s1[..., :P]


def intrinsic_reward(s, g, s1):
    """-||s + g - s'||_2 over positions, Eq. (3): (..., P) -> (...)."""
    return -np.sqrt((next_goal(s, g, s1) ** 2).sum(-1))


def correct(act, states, actions, goal, length, half, rng, n=10):
    """Off-policy correction, Eq. (5): goals that best explain the worker's actions.

    Of n candidates, all clipped to +-half [E3]: the original, s_{t+c} - s_t, and n - 2 draws from
    N(s_{t+c} - s_t, (half / 2)^2), the one with the largest
        -1/2 sum_i ||a_i - mu_lo(s_i, g_i)||^2,     g_i = g + s_t - s_i (h, i - t times).
    act: the worker, (states (N,S), goals (N,P)) -> actions (N,A). states (B,c+1,S), actions
    (B,c,A), goal (B,P), length (B,) of windows; -> chosen goals (B,P), scores (B,n). Ties go to
    the first.
    """
    (B, c, A), P, rows = actions.shape, goal.shape[-1], np.arange(len(goal))
    position = states[..., :P]
    moved = (position[rows, length] - position[:, 0])[:, None]
    near = moved + (0.5 * half * rng.normal(size=(B, n - 2, P))).astype(moved.dtype)
    candidates = np.clip(np.concatenate([goal[:, None], moved, near], 1), -half, half)
    seen = candidates[:, :, None] + (position[:, :1] - position[:, :-1])[:, None]   # (B,n,c,P)
    s = np.broadcast_to(states[:, None, :-1], (B, n, c, states.shape[-1]))
    mu = act(s.reshape(B * n * c, -1), seen.reshape(B * n * c, P)).reshape(B, n, c, A)
    error = ((actions[:, None] - mu) ** 2).sum(-1) * (np.arange(c) < length[:, None])[:, None]
    score = -0.5 * error.sum(-1)
    return candidates[rows, score.argmax(1)], score


# ---------------------------------------------------------------------------------- TD3


def td3_init(rng, n_in, n_action, c):
    """Networks of TD3 and their targets: policy (I,) -> (A,), twin critics (I + A,) -> ()."""
    online = {"actor": init_mlp(rng, (n_in, *c.hidden, n_action), last_scale=0.1),
              "critic": init_mlp(rng, (n_in + n_action, *c.hidden, 1), ensemble=2)}
    return {"online": online, "target": tree_map(np.copy, online),
            "actor_adam": adam_init(online["actor"]), "critic_adam": adam_init(online["critic"]),
            "count": np.zeros((), np.int64)}


def policy(p, x):
    """mu(x) in [-1,1]^A: x (B,I) -> (B,A); back(da) -> (dx, grads)."""
    y, back_mlp = mlp(p, x, relu)
    a, back_tanh = tanh({}, y)
    return a, lambda da: back_mlp(back_tanh(da)[0])


def policy_constant(p, x):
    """`policy` as a constant, without the work for a derivative."""
    return stop(np.tanh(forward(p, x, relu)))


def critic(p, x, a):
    """Values q (2,B), or (B,) of one critic, at x (B,I), a (B,A); back(dq) -> (da, grads)."""
    q, back_mlp = mlp(p, np.concatenate([x, a], -1), relu)

    def back(dq):
        dx, grads = back_mlp(dq[..., None])
        return dx[:, x.shape[-1]:], grads

    return q[..., 0], back


def critic_loss(params, target, batch, noise, gamma, kind):
    """Clipped double Q-learning (TD3), Eqs. (4) and (14): the loss of both critics.

    y = r + gamma m min_j Q'_j(x', clip(mu'(x') + noise, -1, 1)),  L = sum_j mean l(Q_j(x, a) - y)
    l: e^2 / 2 where |e| < 1 and |e| - 1/2 elsewhere (huber), or e^2 / 2 (squared).
    x, x1 (B,I); a (B,A); r, m (B,); noise (B,A), already clipped [E4].
    """
    x, a, r, m, x1 = (batch[name] for name in ("x", "a", "r", "m", "x1"))
    a1 = np.clip(policy_constant(target["actor"], x1) + noise, -1, 1)
    q1 = stop(forward(target["critic"], np.concatenate([x1, a1], -1), relu))[..., 0]
    q, back = critic(params["critic"], x, a)
    error = q - (r + gamma * m * q1.min(0))
    slope = np.clip(error.real, -1, 1) if kind == "huber" else error
    grads = back(slope / len(x))[1]
    loss = (slope * error - 0.5 * slope * slope).mean(-1).sum()
    return loss, {"critic": grads}, {"q": q, "error": error}


def actor_loss(params, x):
    """Deterministic policy gradient: L = -mean Q_1(x, mu(x)), through the critic's input.

    The critic's own gradient is thrown away: only the policy learns from this.
    """
    a, back_a = policy(params["actor"], x)
    q, back_q = critic(tree_map(lambda w: w[0], params["critic"]), x, a)
    da, _ = back_q(np.full(len(x), -1 / len(x), x.dtype))
    return -q.mean(), {"actor": back_a(da)[1]}, {"a": a}


def td3_update(level, batch, rng, gamma, rate, c):
    """One update of the critics and, every c.delay-th time, of policy and targets; in place."""
    shape = batch["a"].shape
    noise = np.clip(c.target_noise * rng.standard_normal(shape, np.float32), -c.target_clip,
                    c.target_clip)
    params, target = level["online"], level["target"]
    loss, grads, _ = critic_loss(params, target, batch, noise, gamma, c.critic_loss)
    adam(params["critic"], grads["critic"], level["critic_adam"], rate * c.critic_lr)
    level["count"] += 1
    if level["count"] % c.delay == 0:
        grads = actor_loss(params, batch["x"])[1]
        adam(params["actor"], grads["actor"], level["actor_adam"], rate * c.actor_lr)
        ema(target, params, c.target_rate)
    return loss


# ------------------------------------------------------------------------------- replay


def replay_init(capacity, c, S, P, D, A):
    """Windows of at most c steps under one goal, s_t ... s_{t+c} inclusive [E2], as arrays."""
    def zeros(*shape):
        return np.zeros((capacity, *shape), np.float32)

    return {"states": zeros(c + 1, S), "actions": zeros(c, A), "rewards": zeros(c),
            "goal": zeros(P), "task": zeros(D), "length": np.zeros(capacity, np.int64),
            "mask": zeros(), "joined": np.zeros(capacity, bool), "count": np.zeros((), np.int64)}


def replay_add(replay, window, terminated, follows):
    """Add a window; follows: it goes on where the last one ended. Time limits bootstrap [E13]."""
    capacity, count = len(replay["mask"]), int(replay["count"])
    i, n = count % capacity, len(window["actions"])
    for name in ("states", "actions", "rewards"):
        replay[name][i] = 0
        replay[name][i, :len(window[name])] = window[name]
    replay["goal"][i], replay["task"][i] = window["goal"], window["task"]
    replay["length"][i], replay["mask"][i], replay["joined"][i] = n, not terminated, False
    if follows:
        replay["joined"][i - 1] = True
    replay["count"] += 1


def sample_steps(replay, rng, half, c):
    """Worker's batch: (s, g, a, r, s', g') of steps drawn uniformly."""
    count = min(int(replay["count"]), len(replay["mask"]))
    w, i = rng.integers(count, size=c.batch), rng.integers(c.c, size=c.batch)
    while (short := i >= replay["length"][w]).any():        # beyond a window cut short: again
        w[short] = rng.integers(count, size=short.sum())
        i[short] = rng.integers(c.c, size=short.sum())
    first, s, s1 = (replay["states"][w, j] for j in (0, i, i + 1))
    batch = {"a": replay["actions"][w, i]}
    last = i == replay["length"][w] - 1
    batch["m"] = np.where(last, replay["mask"][w], np.float32(1))
    if c.agent == "td3":
        task = replay["task"][w]
        batch["r"] = np.float32(c.reward_scale) * replay["rewards"][w, i]
        batch["x"], batch["x1"] = np.concatenate([s, task], -1), np.concatenate([s1, task], -1)
        return batch
    g = next_goal(first, replay["goal"][w], s)
    if c.low_relabel:
        P = g.shape[-1]
        other = s[rng.permutation(c.batch), :P] - s[:, :P]
        g = np.clip(other + 0.1 * half * rng.standard_normal(g.shape, np.float32), -half, half)
    g1 = next_goal(s, g, s1)
    batch["r"] = intrinsic_reward(s, g, s1)
    if c.boundary == "new":
        new = last & replay["joined"][w]
        g1[new] = replay["goal"][(w[new] + 1) % len(replay["mask"])]
    batch["x"], batch["x1"] = worker_input(s, g, c), worker_input(s1, g1, c)
    return batch


def sample_windows(replay, rng, worker, half, c):
    """Manager's batch: (s_t, g, sum of rewards, s_{t+n}), g corrected; and what that changed."""
    count = min(int(replay["count"]), len(replay["mask"]))
    w = rng.integers(count, size=c.batch)
    states, length, task = replay["states"][w], replay["length"][w], replay["task"][w]
    goal, info = replay["goal"][w], {}
    if c.correction == "off_policy":
        new, score = correct(worker, states, replay["actions"][w], goal, length, half, rng,
                             c.candidates)
        far = np.sqrt(((new - goal) ** 2).sum(-1))
        info = {"changed": (far > 0).mean(), "moved": far.mean(),
                "gain": (score.max(1) - score[:, 0]).mean()}
        goal = new
    end = states[np.arange(len(w)), length]
    return {"x": np.concatenate([states[:, 0], task], -1), "a": goal / half,
            "r": np.float32(c.reward_scale) * replay["rewards"][w].sum(-1),
            "x1": np.concatenate([end, task], -1), "m": replay["mask"][w]}, info


# -------------------------------------------------------------------------------- acting


def worker_input(s, g, c):
    """What the worker sees: [s; g], or g and the state without its position."""
    return np.concatenate([s if c.see_position else s[..., g.shape[-1]:], g], -1)


def policies(params, half, c):
    """(ask, act): goals (N,P) = ask(s (N,S), D (N,D)), actions (N,A) = act(s, g); without noise.

    TD3 without hierarchy is a worker whose goal is the task's.
    """
    def act(s, g):
        x = np.concatenate([s, g], -1) if c.agent == "td3" else worker_input(s, g, c)
        return policy_constant(params["low"]["online"]["actor"], x)

    def ask(s, task):
        x = np.concatenate([s, task], -1)
        return half * policy_constant(params["high"]["online"]["actor"], x)

    return (lambda s, task: task) if c.agent == "td3" else ask, act


def carry(s, g, s1, c):
    """The worker's goal after a step inside a window: h, but without hierarchy the task's own."""
    return g if c.agent == "td3" else next_goal(s, g, s1)


class World:
    """An environment by Gymnasium's calls, read as state s (S,), position first, and goal (D,).

    Dict observations (Gymnasium-Robotics): the position is achieved_goal, put before observation
    unless that begins with it. Arrays: the position is obs[position], and the goal is given.
    """

    def __init__(self, env, goal, position):
        self.env, self.position = env, position
        self.goal = None if goal is None else np.asarray(goal, np.float32).ravel()
        space = getattr(env, "action_space", None)
        low, high = (np.asarray(getattr(space, k, np.nan), float) for k in ("low", "high"))
        if low.ndim != 1 or not np.isfinite(low + high).all():
            raise ValueError("the environment needs an action_space with finite vectors low, high "
                             "(a Gymnasium Box)")
        self.centre, self.half = (high + low) / 2, (high - low) / 2
        obs = env.reset(seed=0)[0]
        if isinstance(obs, dict) and goal is not None:
            raise ValueError("observations hold a desired_goal; give no goal beside it")
        if not isinstance(obs, dict) and goal is None:
            raise ValueError("observations are arrays without a goal: train(..., goal=...)")
        if isinstance(obs, dict):
            o, p = (np.ravel(obs[k]) for k in ("observation", "achieved_goal"))
            moved = env.step(self.scale(np.ones(len(low))))[0]       # by chance equal at rest?
            self.begins = len(o) >= len(p) and np.array_equal(o[:len(p)], p) and np.array_equal(
                np.ravel(moved["observation"])[:len(p)], np.ravel(moved["achieved_goal"]))
            self.P = len(p)
        else:
            self.P = np.ravel(obs)[position].size
        s, task = self.read(obs)
        self.S, self.D, self.A = len(s), len(task), len(low)

    def read(self, obs):
        """(s (S,), goal (D,)) of an observation, float32."""
        if isinstance(obs, dict):
            s, task = np.ravel(obs["observation"]), np.ravel(obs["desired_goal"])
            if not self.begins:
                s = np.concatenate([np.ravel(obs["achieved_goal"]), s])
        else:
            o, task = np.ravel(obs), self.goal
            s = np.concatenate([o[self.position], np.delete(o, self.position)])
        return s.astype(np.float32), task.astype(np.float32)

    def step(self, a):
        """Action a in [-1,1]^A -> s', reward, terminated, truncated."""
        obs, reward, terminated, truncated, _ = self.env.step(self.scale(a))
        return self.read(obs)[0], reward, terminated, truncated

    def scale(self, a):
        """a in [-1,1]^A as an action of the environment, in its dtype."""
        space = self.env.action_space
        return np.clip(self.centre + self.half * a, space.low, space.high).astype(
            getattr(space, "dtype", float))


# ---------------------------------------------------------------------------------- training


def start(c, world, rngs):
    """The tree of a new run: both levels, replay, goal range (NaN: to be measured)."""
    S, P, D, A = world.S, world.P, world.D, world.A
    if c.agent == "td3":
        tree, P = {"low": td3_init(rngs["init"], S + D, A, c)}, D
    else:
        n_low = S + P if c.see_position else S
        tree = {"low": td3_init(rngs["init"], n_low, A, c),
                "high": td3_init(rngs["init"], S + D, P, c)}
    tree["replay"] = replay_init(c.capacity // c.c, c.c, S, P, D, A)
    tree["half"] = np.full(P, c.goal_range or (np.nan if c.agent == "hiro" else 1), np.float32)
    return tree


def explore_window(world, s, task, tree, noise, rng, step, c):
    """At most c steps under one goal, with noise -> window, end of the episode, terminated.

    noise (P,): the manager's, of std 1, in place: an autoregressive process over an episode.
    """
    warm = step < c.warmup
    ask, act = policies(tree, tree["half"], c)
    g = ask(s[None], task[None])[0]
    if c.agent == "hiro":
        if warm or step < c.pretrain:
            g = rng.uniform(-1, 1, g.shape) * tree["half"]
        else:
            fresh = math.sqrt(1 - c.noise_keep**2) * rng.normal(size=g.shape)
            noise[:] = c.noise_keep * noise + fresh
            g = np.clip(g + c.high_noise * tree["half"] * noise, -tree["half"], tree["half"])
        g = g.astype(np.float32)
    window = {"states": [s], "actions": [], "rewards": [], "goal": g, "task": task}
    held = rng.uniform(-1, 1, world.A)
    for _ in range(c.c):
        a = held if warm else act(s[None], g[None])[0]
        a = np.clip(a + c.low_noise * rng.normal(size=world.A), -1, 1).astype(np.float32)
        s1, reward, terminated, truncated = world.step(a)
        g, s = carry(s, g, s1, c), s1
        window["states"].append(s)
        window["actions"].append(a)
        window["rewards"].append(reward)
        if terminated or truncated:
            return window, True, terminated
    return window, False, False


def end_warmup(tree, rng, c):
    """Measure the goal range if need be; random goals for the windows so far.

    The actions of the warm-up do not depend on goals, so that they can as well be drawn now.
    """
    replay, P = tree["replay"], len(tree["half"])
    n = min(int(replay["count"]), len(replay["mask"]))
    if np.isnan(tree["half"]).any():
        length = replay["length"][:n]
        whole = np.flatnonzero(length == c.c)
        if not len(whole):
            raise ValueError(f"no {c.c} steps in a row in the warm-up; give a goal range")
        moved = replay["states"][whole, c.c, :P] - replay["states"][whole, 0, :P]
        tree["half"][:] = np.maximum(np.quantile(np.abs(moved), 0.95, axis=0), 1e-6)
    replay["goal"][:n] = rng.uniform(-1, 1, (n, P)) * tree["half"]


def learn(tree, steps, step, rng, c):
    """After a window of so many steps: worker updates, one for each, and the manager's."""
    half, replay, row = tree["half"], tree["replay"], {}
    rate = min(1.0, max(0.0, 3 * (1 - step / c.steps))) if c.decay else 1.0
    if not (c.pretrain and step > c.pretrain):
        for _ in range(steps):
            batch = sample_steps(replay, rng, half, c)
            row["low_loss"] = td3_update(tree["low"], batch, rng, c.low_gamma, rate, c)
    if c.agent == "hiro" and step > c.pretrain:
        act = policies(tree, half, c)[1]
        for _ in range(c.high_updates):
            batch, info = sample_windows(replay, rng, act, half, c)
            row["high_loss"] = td3_update(tree["high"], batch, rng, c.high_gamma, rate, c)
            row.update(info)
    return row


def train(env, config, *, goal=None, position=slice(0, 2), goal_range=None, run=None):
    """Train on any environment with Gymnasium's reset and step and a Box of actions.

    env: observations are dicts of observation, achieved_goal and desired_goal, or arrays whose
    entries `position` (a slice or indices) are the position, with one `goal` (D,) given here.
    Success is info["success"] or info["is_success"]. config: of `resolve`; its env is ignored.
    goal_range: half-width of the manager's relative goals, a number or (P,); without it and
    config.goal_range 0 the 95th percentile of the moves in c steps of the warm-up.
    run: an experiment.Run; without it nothing is written.
    -> namespace with summary (dict), goal_range (P,), params, and actor(), which returns a new
    episode's act(observation) -> action. ValueError: what the environment lacks.
    """
    c, world = config, World(env, goal, position)
    run = run or experiment.Run(None, c, counter="step")
    rngs = experiment.generators(c.seed, "init", "episodes", "explore", "batch")
    tree, step, due = start(c, world, rngs), 0, c.eval_every
    if goal_range is not None:
        tree["half"][:] = goal_range
        if not (tree["half"] > 0).all():
            raise ValueError(f"goal_range must be positive, not {goal_range}")
    if run.restored:
        step = int(run.restored["step"])
        tree = {name: run.restored[name] for name in [*tree, "early"] if name in run.restored}
        run.restore(rngs)
        due = (step // c.eval_every + 1) * c.eval_every
    last, episodes = (evaluate(world, tree, c, step) if step >= c.steps else (None, None))
    while step < c.steps:
        obs, _ = env.reset(seed=int(rngs["episodes"].integers(2**31)))
        s, task = world.read(obs)
        follows, over, noise = False, False, rngs["explore"].normal(size=len(tree["half"]))
        began = step
        while not over:
            if step - began > max(c.steps, ENDLESS):
                raise ValueError(f"an episode did not end in {step - began} steps; the environment "
                                 "needs a time limit")
            window, over, terminated = explore_window(world, s, task, tree, noise,
                                                      rngs["explore"], step, c)
            replay_add(tree["replay"], window, terminated, follows)
            s, follows, before = window["states"][-1], not over, step
            step += len(window["actions"])
            if step < c.warmup:
                continue
            if before < c.warmup:
                end_warmup(tree, rngs["explore"], c)
            row = learn(tree, len(window["actions"]), step, rngs["batch"], c)
            for name, x in row.items():
                if not np.isfinite(x):
                    raise FloatingPointError(f"{name} became {x} at step {step}")
            if step // 500 > before // 500:
                run.log("train", {"step": step, **row, "seconds": run.seconds()})
            success = f"success {last['success']:.2f}" if last else "success -"
            if step < c.steps or over:                      # the last episode runs to its end
                run.progress(min(step, c.steps), c.steps, " ".join(
                    f"{k} {x:.3g}" for k, x in row.items() if "loss" in k) + f"  {success}")
        if step >= due or step >= c.steps:
            due = (step // c.eval_every + 1) * c.eval_every
            if step >= c.warmup:                            # before, goals may have no range yet
                last, episodes = evaluate(world, tree, c, step)
                run.log("eval", {"step": step, **last, "seconds": run.seconds()})
            if episodes and "early" not in tree and step > c.warmup + c.c:
                tree["early"] = {name: {"paths": e[0][:, 0], "asked": e[1][:, 0]}
                                 for name, e in episodes.items()}
            run.save(step, tree, rngs)
        elif run.stop:
            run.save(step, tree, rngs)
    if run.folder:
        draw(world, tree, episodes, run, c)
    name = c.env
    if not isinstance(env, envs.GoalTask):
        name = type(getattr(env, "unwrapped", env)).__name__
    summary = summarise(c, name, run, last, step)
    run.finish(summary)
    rng = np.random.default_rng(c.seed)                 # of the noise in all episodes [E17]
    return SimpleNamespace(summary=summary, goal_range=tree["half"], params=tree,
                           actor=lambda: single_actor(world, tree, c, rng))


def summarise(c, name, run, last, step):
    """The keys of summary.json around those of `evaluate`: what the correction did at the end, and
    curves over training, a number for each evaluation (the correction's: the mean before it)."""
    tests, logged = run.logs["eval"], [r for r in run.logs["train"] if r.get("changed", "") != ""]
    solved = [int(row["step"]) for row in tests if float(row["success"]) >= 0.95]
    curves = {f"{key}_curve": [round(float(row[key]), 3) for row in tests]
              for key in ("success", "missed") if key in last}
    means = {}
    if logged:
        ends, steps = ([int(row["step"]) for row in rows] for rows in (tests, logged))
        part = np.searchsorted(ends, steps)                     # before which evaluation
        for key in ("changed", "moved", "gain"):
            x = np.array([float(row[key]) for row in logged])
            means[key] = float(x[-20:].mean())
            curves[f"{key}_curve"] = [round(float(x[part == i].mean()), 3) if (part == i).any()
                                      else None for i in range(len(tests))]
    return {"env": name, "agent": c.agent, "seed": c.seed, "env_steps": step, **last, **means,
            "first_success": solved[0] if solved else None, **curves, "episodes": c.episodes,
            "train_seconds": round(run.seconds(), 1)}


# -------------------------------------------------------------------------------- evaluation


def acting(a, rng, c):
    """The action taken in evaluation: the worker's own, or with noise, clipped [E17]."""
    return np.clip(a + c.eval_noise * rng.normal(size=a.shape), -1, 1) if c.eval_noise else a


def rollout(task, tree, starts, goals, rng, c):
    """N episodes of one of our tasks side by side, to the time limit.

    starts, goals (N,2) -> distances to the goal (T,N), positions (T+1,N,2), and the places the
    manager asked for (T/c,N,2).
    """
    ask, act = policies(tree, tree["half"], c)
    s, far, paths, asked = starts, [], [starts], []
    for t in range(task.limit):
        now = task.observe(s).astype(np.float32)
        if t % c.c == 0:
            g = ask(now, goals.astype(np.float32))
            asked.append(now[:, :2] + g)
        s = task.move(s, acting(act(now, g).astype(float), rng, c))
        g = carry(now, g, s.astype(np.float32), c)
        paths.append(s)
        far.append(task.distance(s, goals))
    return np.array(far), np.array(paths), np.array(asked)


def evaluate(world, tree, c, at):
    """Success of the current policies -> (summary, {test: (paths, asked, goals, success)}).

    The first test gives success, success_last_step and final_distance, each other one its own
    success_<name>; missed is the mean of `missed`. Starts and goals depend on the seed and on `at`,
    the steps so far, alone.
    """
    rng, summary, episodes = np.random.default_rng([c.seed, at]), {}, {}
    if not isinstance(world.env, envs.GoalTask):
        return evaluate_calls(world, tree, c, rng), {}
    task, tests = world.env, world.env.tests(rng, c.episodes)
    starts, goals = (np.concatenate(x) for x in zip(*tests.values()))
    far, paths, asked = rollout(task, tree, starts, goals, rng, c)
    success = task.reached(far).any(0)
    for i, name in enumerate(tests):
        mine = slice(i * c.episodes, (i + 1) * c.episodes)
        if i == 0:
            summary = {"success": success[mine].mean(),
                       "success_last_step": task.reached_last(far[-1, mine]).mean(),
                       "final_distance": far[-1, mine].mean()}
        else:
            summary[f"success_{name}"] = success[mine].mean()
        episodes[name] = paths[:, mine], asked[:, mine], goals[mine], success[mine]
    if c.agent == "hiro":
        summary["missed"] = missed(paths, asked, c.c).mean()
    return {k: float(x) for k, x in summary.items()}, episodes


def missed(paths, asked, c):
    """How far the worker ends from the place the manager asked for: (T/c, N), whole windows.

    paths (T+1,N,2), asked (T/c,N,2). Nothing in the algorithm makes goals places in reach.
    """
    reached = paths[c::c]
    return np.sqrt(((reached - asked[:len(reached)]) ** 2).sum(-1))


def single_actor(world, tree, c, rng):
    """act(observation) -> action of the environment, for one episode, as in evaluation."""
    ask, act = policies(tree, tree["half"], c)
    memory = {"t": 0}

    def step(obs):
        s, task = (x[None] for x in world.read(obs))
        g = ask(s, task) if memory["t"] % c.c == 0 else carry(memory["s"], memory["g"], s, c)
        memory.update(t=memory["t"] + 1, s=s, g=g)
        return world.scale(acting(act(s, g)[0], rng, c))

    return step


def evaluate_calls(world, tree, c, rng):
    """`evaluate` of any environment, episode by episode through its own calls."""
    results = []
    for _ in range(c.episodes):
        obs, _ = world.env.reset(seed=int(rng.integers(2**31)))
        act, over, ever, total = single_actor(world, tree, c, rng), False, False, 0.0
        while not over:
            obs, reward, terminated, truncated, info = world.env.step(act(obs))
            over, total = terminated or truncated, total + float(reward)
            success = bool(info.get("success", info.get("is_success", False)))
            ever = ever or success
        s, task = world.read(obs)
        near = np.linalg.norm(s[:world.P] - task) if len(task) == world.P else np.nan
        results.append((ever, success, near, total))
    names = "success", "success_last_step", "final_distance", "return"
    return dict(zip(names, np.mean(np.array(results, float), axis=0).tolist()))


# ---------------------------------------------------------------------------------- pictures


def draw(world, tree, episodes, run, c):
    """The pictures of a run: learning curve, correction over training, episodes."""
    experiment.draw_curve(run)
    if c.agent == "hiro" and c.correction == "off_policy":
        draw_correction(run)
    if episodes:
        draw_episodes(world.env, tree, episodes, run, c)


def draw_correction(run):
    """Over training: how often the correction changes a goal, by how much, what it gains; and how
    far from its goals the worker ends."""
    figure, axes = envs.plt.subplots(1, 4, figsize=(14, 2.8), layout="constrained")
    for ax, key, title in zip(axes, ("changed", "moved", "gain", "missed"), (
            "share of goals changed", "mean distance moved", "mean gain of the score, Eq. (5)",
            "from the goal, after c steps")):
        rows = [row for row in run.logs["eval" if key == "missed" else "train"]
                if row.get(key, "") != ""]
        ax.plot([int(row["step"]) for row in rows], [float(row[key]) for row in rows], lw=1)
        ax.set(title=title, xlabel="steps", ylim=(0, None))
    envs.save_figure(figure, run.path("correction.png"))


def draw_episodes(task, tree, episodes, run, c):
    """One episode of each test, early in training and at its end, and the goals asked for."""
    late = {name: {"paths": e[0][:, 0], "asked": e[1][:, 0]} for name, e in episodes.items()}
    rows = {"end of training": late}
    if "early" in tree:
        rows = {"early in training": tree["early"], **rows}
    size = 2.6 * len(episodes), 2.7 * len(rows)
    figure, axes = envs.plt.subplots(len(rows), len(episodes), squeeze=False, figsize=size,
                                     layout="constrained")
    for row, (title, shown) in zip(axes, rows.items()):
        for ax, name in zip(row, episodes):
            envs.draw_maze(ax, task.maze)
            path, asked = shown[name]["paths"], shown[name]["asked"]
            ax.plot(*envs.plot_xy(task.maze, path), "C0", lw=1)
            for s, place in zip(path[::c.c] if c.agent == "hiro" else [], asked):
                ax.annotate("", envs.plot_xy(task.maze, place), envs.plot_xy(task.maze, s),
                            arrowprops=dict(arrowstyle="->", color="C1", lw=0.8))
            if title.startswith("end") or name != "random":     # random goals are drawn anew
                ax.plot(*envs.plot_xy(task.maze, episodes[name][2][0]), "r*", ms=9)
            ax.set_title(f"goal {name.replace('_', ', ')}", fontsize=9)
        row[0].set_ylabel(title)
    envs.save_figure(figure, run.path("episodes.png"))


# --------------------------------------------------------------------------------- the program


def prepare(c, tree=None):
    """The task, and a check that a checkpoint's tree fits it (ValueError)."""
    env = envs.UMazeTask(c.contact) if c.env == "point-umaze" else envs.GOAL_TASKS[c.env]()
    if c.agent == "hiro" and not c.goal_range and c.c > env.limit:
        raise ValueError(f"--goal-range 0 is measured over --c {c.c} steps, but an episode of "
                         f"{c.env} has {env.limit}")
    if tree is not None:
        fresh = start(c, World(env, None, None), experiment.generators(0, "init"))
        shapes = {name: x.shape for name, x in nets.flatten(fresh).items()}
        if shapes != {name: x.shape for name, x in nets.flatten(
                {name: tree[name] for name in fresh}).items()}:
            raise ValueError("the checkpoint does not fit its config.json")
    return SimpleNamespace(config=c, env=env)


def evaluate_checkpoint(problem, tree):
    """The success of a saved run, starts and goals drawn for the step of its checkpoint."""
    c, at = problem.config, int(tree["step"])
    if at < c.warmup:
        raise ValueError("the run was stopped in its warm-up; there is nothing to evaluate yet")
    summary, _ = evaluate(World(problem.env, None, None), tree, c, at)
    return {"env": c.env, "agent": c.agent, "seed": c.seed, "env_steps": at, **summary}


def main():
    experiment.main(Config, __doc__.split("\n\n")[0], resolve, prepare,
                    lambda problem, run: train(problem.env, problem.config, run=run),
                    evaluate_checkpoint, counter="step")


if __name__ == "__main__":
    main()
