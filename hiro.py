"""HIRO: hierarchical reinforcement learning with off-policy correction, online. NumPy only.

Nachum, Gu, Lee, Levine 2018, arXiv 1805.08296. Two policies, both TD3 (Fujimoto et al. 2018):
  mu_hi(g | s, D)    the high-level policy, also called manager: every c steps a goal g, relative
                     to the position in s
  mu_lo(a | s, g)    the low-level policy, also called worker: rewarded for moving the position by g
Off-policy correction: the low-level policy has changed since a window of c steps was stored. So
whenever the window is sampled, its goal is replaced by the one under which today's low-level policy
would most likely have taken the stored actions.

    python hiro.py            trains on HIRO's U-maze with a point mass, three to eight minutes on
                              one core; leaves logs, checkpoint, summary and pictures in runs/
    python hiro.py --help     every flag with its meaning and its published value

In order, by support/run.py and support/online.py: `resolve` makes the config, `prepare` the task,
`init_agent` both levels and the replay; `learn` trains them window by window: `explore_goal`,
`explore_window`, `replay_add`, once `end_warmup`, then as often as `schedule` says `sample_steps`
and `td3_update` for the low level, `sample_windows`, which relabels, and `td3_update` for the high
level. Every eval_interval steps an episode's end is used to evaluate and to save; pictures
and a summary come last.

Symbols: s, s1 state and next state, position first; g, g1 relative goal before and after the
step; task or D the task's goal; a action in [-1, 1], of the high level g / goal_range; r reward; m
mask, 0 after a true termination, else 1; q critics' values; mu policy; c steps between goals. In
TD3's functions x, x1 are what a level sees, [s; g] or [s; D]. Shapes: batch B, agents N, state S,
position P, task's goal D, action A, input of a network I, twin critics 2. Equation numbers are the
paper's.

Deviations: what is done here where the paper, its authors' code (tensorflow/models,
research/efficient-hrl), TD3's (sfujim/TD3), the public ports hiro_pytorch (watakandai) and
data-efficient-hrl (bhairavmehta95), and the successors HRAC and HIGL that build on the latter
differ, and why. E17 and E19 stand in lab/tasks.py, E18 in lab/td3.py.
 E1  The low level's next goal at a window's end is h(s, g, s') (paper), because its value is
     defined for one goal, carried on by h; the authors' code takes the next goal that was given
     (`--goal-at-window-end new`).
 E2  Windows hold s_t ... s_{t+c} inclusive, from the episode's first step (paper). The authors'
     code begins at step 1 and ends with stale entries; hiro_pytorch keeps s_{t+c-1}, so that its
     candidate is a step short; data-efficient-hrl applies h once too often.
 E3  Correction: all candidates are clipped (authors' code; hiro_pytorch not s_{t+c} - s_t), errors
     of actions are in units of half the action range. The choice is made at each sampling and
     never written back to the replay (authors' code). Ties go to the original, the goal given.
 E4  Target noise is in units of the action's half-width, which is half the action range at the
     low level and goal_range at the high level, and the noisy action is clipped to that range
     (TD3, hiro_pytorch). The authors' code takes the same numbers at both levels and does not clip.
 E5  Huber loss (authors' code) or half the squared error (paper): `--critic-loss`. Huber bounds the
     gradient of early, large errors.
 E6  Policy and targets move at every 2nd update of the critics (TD3, authors' code). Paper: targets
     at each update; data-efficient-hrl: both.
 E7  Goals lie within +-2, what c steps can cover on the U-maze, so that the low-level policy can
     reach them (paper, authors' code: +-10, of an ant).
 E8  The low-level policy sees its position (authors' hiro_xy), by which it can learn where walls
     are; their hiro_orig shows zeros there (`--no-see-position`).
 E9  The low-level discount is 0.95, as in HRAC and HIGL (paper, authors' code: 0.99): a horizon of
     20 steps, near c, though values go on beyond a window's end [E1].
 E10 Exploration, on which success depends on this maze. High level: noise of std 2 in units of
     the goals' half-width, before clipping, correlated by 0.75 from goal to goal, so that it
     leaves the dead end (paper, authors' code: std 1 of +-10, independent). Low level: noise of
     std 0.1 in units of half the action range, at each step (published: 1.0). Warm-up: one uniform
     action is held for a window, with the low level's noise (authors' code: the untrained policy);
     goals of these windows are uniform and drawn when the warm-up ends.
 E11 Task rewards of the high level times 0.02 (paper, authors' code: 0.1), which keeps most errors
     in Huber's square; the low level's reward is not scaled.
 E12 All updates come at a window's end: one of the low level for each of its steps, then 5 of the
     high level (paper, authors' code: 1), because it gets one sample for c steps.
 E13 Time limits are not terminations: a window that one cuts keeps its true length, and both
     levels bootstrap from its last state, the high level with one discount. A true termination
     ends the values of both levels. (Authors' code: no terminations at all; the ports take a time
     limit for one.)
 E14 Networks 64,64 (published: 300,300), Adam 3e-4 and 1e-3 (1e-4 and 1e-3) that falls linearly to
     0 over the last third; last layers of policies 0.1 times Glorot's (U(+-0.003)). The critic
     sees the action at its first layer (TD3; authors' code: there and at the next). One replay of
     capacity / c windows, from which both levels sample (published: 200,000 transitions for each
     level). Small for a laptop.
 E15 The U-maze's point slides along walls; in `--env point-umaze-undo` a move into a wall is not
     made, as for the authors' robot. The state is the position alone (authors' code: heading,
     velocity and time too). `success` is within 2.5 at any step, as in HIGL; `success_last_step`
     within 5 at the end, as the paper and its code.
 E16 `--relabel-low-goals` as the authors' relabel_contexts: each low-level goal is the move to
     another state of the batch plus noise, clipped here to the goal range. `--pretrain`: uniform
     goals (paper: Gaussian).
 E20 `--tanh-penalty` adds the mean square of a policy's outputs before tanh to its loss, as HER
     does (Andrychowicz et al. 2017). Without it a saturated tanh lets no gradient through, and the
     high-level policy of Push may keep a goal that its critic knows to be bad. 0.05 in Push and
     Fall, 0 elsewhere (published).
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

import envs
from nets import adam, adam_init, ema, init_mlp, mlp, relu, stop_gradient, tanh, tree_map
from support import online
from support.flags import (NOT_NEGATIVE, POSITIVE, SIZES, check_ranges, option, refuse_unused,
                           require)
from support.run import load_run, main

COUNTER = "step"                        # what support/run.py counts: environment steps


@dataclass
class Config:
    """Everything that decides a run; `resolve` puts in what the task changes."""

    env: str = option("point-umaze", "task", tuple(envs.TASKS_ONLINE))
    seed: int = option(0, "seed of everything random", NOT_NEGATIVE)
    steps: int = option(60_000, "environment steps (published: 10 million)", POSITIVE)
    subgoal_interval: int = option(10, "c: steps between the high-level policy's goals (published: "
                                   "10)", POSITIVE)
    goal_range: float = option(2.0, "half-width of relative goals on each axis; 0: the 95th "
                               "percentile of the warm-up's moves in c steps (published: 10) [E7]",
                               NOT_NEGATIVE)
    hidden_dims: tuple = option((64, 64), "hidden layers of every network (published: 300,300)",
                                SIZES)
    batch_size: int = option(100, "batch size of both levels (published: 100)", POSITIVE)
    actor_lr: float = option(3e-4, "Adam's learning rate of the policies (published: 1e-4)",
                             POSITIVE)
    critic_lr: float = option(1e-3, "Adam's learning rate of the critics (published: 1e-3)",
                              POSITIVE)
    lr_decay: bool = option(True, "learning rates fall linearly to 0 over the last third [E14]")
    low_discount: float = option(0.95, "discount of the low level (published: 0.99) [E9]",
                                 "in (0, 1)")
    high_discount: float = option(0.99, "discount of the high level for each of its steps "
                                  "(published: 0.99)", "in (0, 1)")
    tau: float = option(0.005, "EMA rate of the target networks (published: 0.005)", "in (0, 1]")
    policy_freq: int = option(2, "critic updates for each update of policy and targets "
                              "(published: 2) [E6]", POSITIVE)
    low_noise: float = option(0.1, "exploration noise of actions, in units of half the action "
                              "range (published: 1.0, not scaled) [E10]", NOT_NEGATIVE)
    high_noise: float = option(2.0, "exploration noise of goals, in units of the goals' half-width "
                               "(published: 0.1) [E10]", NOT_NEGATIVE)
    noise_correlation: float = option(0.75, "correlation of a goal's noise with the last one's "
                                      "[E10]", "in [0, 1)")
    eval_noise: float = option(0.0, "noise of actions in evaluation, in the units of --low-noise",
                               NOT_NEGATIVE)
    target_noise: float = option(0.2, "std of the noise on target actions, in units of their "
                                 "half-width (published: 0.2) [E4]",
                                 NOT_NEGATIVE)
    target_clip: float = option(0.5, "bound of that noise (published: 0.5)", NOT_NEGATIVE)
    reward_scale: float = option(0.02, "factor on the task's reward (published: 0.1) [E11]",
                                 POSITIVE)
    tanh_penalty: float = option(0.0, "weight of the squares of what policies put into their tanh, "
                                 "in their loss (published: 0) [E20]", NOT_NEGATIVE)
    critic_loss: str = option("huber", "loss of the critics' errors [E5]", ("huber", "squared"))
    warmup: int = option(2500, "first steps, by random actions without learning (published: 2500)")
    high_updates: int = option(5, "high-level updates for each of its goals (published: 1) [E12]",
                               POSITIVE)
    capacity: int = option(200_000, "steps kept for replay (published: 200000) [E14]", POSITIVE)
    correction: str = option("off_policy", "relabelling of the high-level goals, Eq. (5)",
                             ("off_policy", "none"))
    candidates: int = option(10, "goals that the correction chooses from (published: 10)",
                             "at least 2")
    goal_at_window_end: str = option("h", "next goal of the low level where a new goal is given: "
                                     "by h, or the new one [E1]", ("h", "new"))
    relabel_low_goals: bool = option(False, "low level learns for goals at other states of the "
                                     "batch [E16]")
    pretrain: int = option(0, "step up to which only the low level learns, on random goals; then "
                           "it is frozen; 0: none [E16]", NOT_NEGATIVE)
    see_position: bool = option(True, "the low level sees its position [E8]")
    eval_episodes: int = option(50, "evaluation episodes for each test (published: 50)", POSITIVE)
    eval_interval: int = option(2500, "steps between evaluations and checkpoints", POSITIVE)


QUICK = dict(steps=2000, warmup=500, eval_interval=1000, eval_episodes=4)


def resolve(given, config_class=Config, changes=None):
    """A whole Config: defaults, changed by `changes` (lab/td3.py's), task, --quick, flags given.

    ValueError: a value out of its range, or values that do not go together.
    """
    given = dict(given)
    values = {**(changes or {}), **envs.make_task(given.get("env", Config.env)).settings}
    if given.pop("quick", False):
        values.update(QUICK)
    config = config_class(**{**values, **given})
    check_ranges(config)
    refuse_unused(config, config_class(**values), {
        "candidates": config.correction == "none" and "--correction none",
        "noise_correlation": not config.high_noise and "--high-noise 0",
        "target_clip": not config.target_noise and "--target-noise 0"})
    steps, warmup, c = config.steps, config.warmup, config.subgoal_interval
    require(config, lambda x: x >= c, f"at least --subgoal-interval {c}", "warmup", "capacity")
    if steps <= warmup:
        raise ValueError(f"--steps {steps} must be above --warmup {warmup}: learning begins after "
                         "it")
    if config.pretrain and not warmup < config.pretrain < steps:
        raise ValueError(f"--pretrain {config.pretrain} must lie between --warmup {warmup} and "
                         f"--steps {steps}, or be 0")
    if config.relabel_low_goals and config.goal_at_window_end == "new":
        raise ValueError("--goal-at-window-end new is the next goal given, which says nothing of "
                         "the goals of --relabel-low-goals")
    return config


# -------------------------------------------------------------------------------- goals


def goal_transition(s, g, s1):
    """h(s, g, s') = s + g - s' over positions, Eq. (2): the same place, seen from s'.

    s, s' (..., S), g (..., P) -> (..., P).
    """
    P = g.shape[-1]
    return s[..., :P] + g - s1[..., :P]


def intrinsic_reward(s, g, s1):
    """-||s + g - s'||_2 over positions, Eq. (3): s, s' (..., S), g (..., P) -> (...)."""
    return -np.sqrt((goal_transition(s, g, s1) ** 2).sum(-1))


def off_policy_correction(low_policy, states, actions, goal, length, goal_range, rng, n=10):
    """Off-policy correction, Eq. (5): goals that best explain the low-level policy's actions.

    There are n candidates: the original, the move s_{t+c} - s_t, and n - 2 draws from
    N(s_{t+c} - s_t, (goal_range / 2)^2). All are clipped to +-goal_range [E3]. The one is chosen
    that maximises, with g_i = g + s_t - s_i over positions (h, i - t times),
        -1/2 sum_i ||a_i - mu_lo(s_i, g_i)||^2,     i = t ... t+c-1.
    Where a window is shorter, its length stands for c. Ties go to the first.
    low_policy: (states (N,S), goals (N,P)) -> actions (N,A). states (B,c+1,S), actions (B,c,A),
    goal (B,P), length (B,), goal_range (P,); -> chosen goals (B,P), scores (B,n).
    """
    (B, c, A), P, rows = actions.shape, goal.shape[-1], np.arange(len(goal))
    position = states[..., :P]
    moved = (position[rows, length] - position[:, 0])[:, None]
    near = moved + (0.5 * goal_range * rng.normal(size=(B, n - 2, P))).astype(moved.dtype)
    candidates = np.clip(np.concatenate([goal[:, None], moved, near], 1), -goal_range, goal_range)
    seen = candidates[:, :, None] + (position[:, :1] - position[:, :-1])[:, None]   # (B,n,c,P)
    s = np.broadcast_to(states[:, None, :-1], (B, n, c, states.shape[-1]))
    mu = low_policy(s.reshape(B * n * c, -1), seen.reshape(B * n * c, P)).reshape(B, n, c, A)
    error = ((actions[:, None] - mu) ** 2).sum(-1) * (np.arange(c) < length[:, None])[:, None]
    score = -0.5 * error.sum(-1)
    return candidates[rows, score.argmax(1)], score


# ---------------------------------------------------------------------------------- TD3


def td3_init(rng, n_in, n_action, config):
    """One level, a tree of arrays: online and target networks, their Adam, a count of updates.

    Networks: policy (I,) -> (A,), twin critics (I + A,) -> (); A is P at the high level.
    """
    hidden = config.hidden_dims
    learned = {"actor": init_mlp(rng, (n_in, *hidden, n_action), last_scale=0.1),
              "critic": init_mlp(rng, (n_in + n_action, *hidden, 1), ensemble=2)}
    return {"online": learned, "target": tree_map(np.copy, learned), "actor_adam":
            adam_init(learned["actor"]), "critic_adam": adam_init(learned["critic"]),
            "count": np.zeros((), np.int64)}


def policy(p, x):
    """mu(x) in [-1,1]^A: x (B,I) -> (B,A); back(da) -> (dx, grads)."""
    y, back_mlp = mlp(p, x, relu)
    a, back_tanh = tanh({}, y)
    return a, lambda da: back_mlp(back_tanh(da)[0])


def critic(p, x, a):
    """Values q (2,B), or (B,) of one critic, at x (B,I), a (B,A); back(dq) -> (da, grads)."""
    q, back_mlp = mlp(p, np.concatenate([x, a], -1), relu)

    def back(dq):
        dx, grads = back_mlp(dq[..., None])
        return dx[..., x.shape[-1]:], grads

    return q[..., 0], back


def huber(e):
    """l(e) = e^2 / 2 where |e| < 1, |e| - 1/2 elsewhere [E5]; back(dl) -> de."""
    slope = np.clip(e.real, -1, 1)                      # l'(e); .real: for the complex step
    loss = np.where(np.abs(e.real) < 1, 0.5 * e * e, slope * e - 0.5)
    return loss, lambda dl: dl * slope


def half_square(e):
    """l(e) = e^2 / 2 [E5]; back(dl) -> de."""
    return 0.5 * e * e, lambda dl: dl * e


def td3_target(target, batch, noise, gamma):
    """y = r + gamma m min_j Q'_j(x', clip(mu'(x') + noise, -1, 1)) (B,), Eqs. (4) and (14).

    The equations are HIRO's for the low and the high level; min and noise are TD3's. x' (B,I);
    r, m (B,); noise (B,A), scaled and clipped [E4]. Constants: everything.
    """
    r, m, x1 = (batch[name] for name in ("rewards", "masks", "next_observations"))
    a1 = np.clip(policy(target["actor"], x1)[0] + noise, -1, 1)
    q1 = critic(target["critic"], x1, a1)[0].min(0)
    return stop_gradient(r + gamma * m * q1)


def critic_loss(params, batch, y, kind):
    """L = sum_j mean l(Q_j(x, a) - y), the loss of both critics, Eqs. (4) and (14).

    l: `huber` or `half_square` [E5]. x (B,I), a (B,A), y (B,). -> loss, grads, info, as all losses
    here. Constants: y.
    """
    x, a = batch["observations"], batch["actions"]
    q, back_q = critic(params["critic"], x, a)
    loss, back_l = (huber if kind == "huber" else half_square)(q - y)
    grads = back_q(back_l(1 / len(x)))[1]
    return loss.mean(-1).sum(), {"critic": grads}, {"q": q, "error": q - y}


def actor_loss(params, x, penalty=0.0):
    """Deterministic policy gradient: L = -mean Q_1(x, mu(x)) + penalty mean y^2, mu = tanh(y).

    penalty: [E20]. The gradient comes through the critic's input. Constants: the critic's
    parameters; only the policy learns from this. x (B,I).
    """
    y, back_y = mlp(params["actor"], x, relu)
    a, back_a = tanh({}, y)
    q, back_q = critic(tree_map(lambda w: w[0], params["critic"]), x, a)
    da, _ = back_q(np.full(len(x), -1 / len(x), x.dtype))
    dy = back_a(da)[0] + 2 * penalty / y.size * y
    return -q.mean() + penalty * (y * y).mean(), {"actor": back_y(dy)[1]}, {"a": a}


def td3_update(level, batch, rng, gamma, rate, config):
    """One update of TD3 (Fujimoto et al. 2018, Algorithm 1), in place; -> the critics' loss.

    gamma: the level's discount; rate: factor on the learning rates.
    """
    params, target = level["online"], level["target"]
    noise = config.target_noise * rng.standard_normal(batch["actions"].shape, np.float32)
    noise = np.clip(noise, -config.target_clip, config.target_clip)             # [E4]
    y = td3_target(target, batch, noise, gamma)
    loss, grads, _ = critic_loss(params, batch, y, config.critic_loss)
    adam(params["critic"], grads["critic"], level["critic_adam"], rate * config.critic_lr)
    level["count"] += 1
    if level["count"] % config.policy_freq == 0:                                # delayed [E6]
        _, grads, _ = actor_loss(params, batch["observations"], config.tanh_penalty)
        adam(params["actor"], grads["actor"], level["actor_adam"], rate * config.actor_lr)
        ema(target, params, config.tau)
    return loss


# ------------------------------------------------------------------------------- replay


def replay_init(windows, c, S, P, D, A):
    """Room for windows of at most c steps under one goal, s_t ... s_{t+c} inclusive [E2].

    mask: 0 if the window ended in a termination; joined: the next window goes on where it ended;
    count: windows added so far, of which the last are kept.
    """
    def zeros(*shape):
        return np.zeros((windows, *shape), np.float32)

    return {"states": zeros(c + 1, S), "actions": zeros(c, A), "rewards": zeros(c),
            "goal": zeros(P), "task": zeros(D), "length": np.zeros(windows, np.int64),
            "mask": zeros(), "joined": np.zeros(windows, bool), "count": np.zeros((), np.int64)}


def replay_add(replay, window, terminated, follows):
    """Add a window; follows: it goes on where the last one ended. Time limits bootstrap [E13]."""
    i, n = int(replay["count"]) % len(replay["mask"]), len(window["actions"])
    for name in ("states", "actions", "rewards"):
        replay[name][i] = 0
        replay[name][i, :len(window[name])] = window[name]
    replay["goal"][i], replay["task"][i] = window["goal"], window["task"]
    replay["length"][i], replay["mask"][i], replay["joined"][i] = n, not terminated, False
    if follows:
        replay["joined"][i - 1] = True
    replay["count"] += 1


def draw_steps(replay, rng, n, c):
    """n steps drawn uniformly -> window (n,), step in it (n,), whether it ends its window (n,)."""
    count = min(int(replay["count"]), len(replay["mask"]))
    w, i = rng.integers(count, size=n), rng.integers(c, size=n)
    while (short := i >= replay["length"][w]).any():        # beyond the end of a short window
        w[short] = rng.integers(count, size=short.sum())
        i[short] = rng.integers(c, size=short.sum())
    return w, i, i == replay["length"][w] - 1


def sample_steps(replay, rng, goal_range, config):
    """Low-level batch, steps drawn uniformly: [s; g], a, r, [s'; g'], m.

    g is the window's goal carried on by h, or a relabelled one [E16]; r is the intrinsic reward,
    not scaled; g' is h(s, g, s'). With goal_at_window_end "new" g' is at a window's end the next
    window's goal, if that window goes on with the episode [E1].
    """
    n = config.batch_size
    w, i, last = draw_steps(replay, rng, n, config.subgoal_interval)
    first, s, s1 = (replay["states"][w, j] for j in (0, i, i + 1))
    g = goal_transition(first, replay["goal"][w], s)
    if config.relabel_low_goals:
        P = g.shape[-1]
        other = s[rng.permutation(n), :P] - s[:, :P]
        g = np.clip(other + 0.1 * goal_range * rng.standard_normal(g.shape, np.float32),
                    -goal_range, goal_range)
    g1 = goal_transition(s, g, s1)
    reward = intrinsic_reward(s, g, s1)
    if config.goal_at_window_end == "new":
        new = last & replay["joined"][w]
        g1[new] = replay["goal"][(w[new] + 1) % len(replay["mask"])]
    return {"observations": low_input(s, g, config), "actions": replay["actions"][w, i],
            "rewards": reward, "masks": np.where(last, replay["mask"][w], np.float32(1)),
            "next_observations": low_input(s1, g1, config)}


def sample_windows(replay, rng, low_policy, goal_range, config):
    """High-level batch: [s_t; D], g / goal_range, r, [s_{t+c}; D], m; and what relabelling changed.

    g is the goal that the correction chooses, Eq. (5), and is not written back [E3]; r is the sum
    of the window's task rewards times reward_scale [E11]; short windows end where they end [E13].
    """
    w = rng.integers(min(int(replay["count"]), len(replay["mask"])), size=config.batch_size)
    states, length, task = replay["states"][w], replay["length"][w], replay["task"][w]
    goal, info = replay["goal"][w], {}
    if config.correction == "off_policy":
        new, score = off_policy_correction(low_policy, states, replay["actions"][w], goal, length,
                                           goal_range, rng, config.candidates)
        distance = np.sqrt(((new - goal) ** 2).sum(-1))
        info = {"relabel_fraction": (distance > 0).mean(), "relabel_distance": distance.mean(),
                "relabel_gain": (score.max(1) - score[:, 0]).mean()}
        goal = new
    end = states[np.arange(len(w)), length]
    return {"observations": np.concatenate([states[:, 0], task], -1), "actions": goal / goal_range,
            "rewards": np.float32(config.reward_scale) * replay["rewards"][w].sum(-1),
            "next_observations": np.concatenate([end, task], -1), "masks": replay["mask"][w]}, info


# -------------------------------------------------------------------------------- acting


def low_input(s, g, config):
    """What policy and critics of the low level see: [s; g], or without the position in s [E8]."""
    return np.concatenate([s if config.see_position else s[..., g.shape[-1]:], g], -1)


def policies(agent, config):
    """A namespace: both policies without noise, and how a goal goes on after a step.

    high(s (N,S), D (N,D)) -> goals (N,P); low(s (N,S), g (N,P)) -> actions (N,A);
    transition(s, g, s1) -> g1, Eq. (2).
    """
    def high(s, task):
        x = np.concatenate([s, task], -1)
        return agent["goal_range"] * policy(agent["high"]["online"]["actor"], x)[0]

    def low(s, g):
        return policy(agent["low"]["online"]["actor"], low_input(s, g, config))[0]

    return SimpleNamespace(high=high, low=low, transition=goal_transition, hierarchical=True)


def explore_goal(agent, s, task, noise, rng, config):
    """A goal (P,) of the high-level policy with noise; uniform in pretraining [E10][E16].

    In the warm-up it is uniform too, but `end_warmup` replaces it. noise (P,): an autoregressive
    process over an episode, which begins with N(0, 1) and keeps std 1; changed in place.
    """
    g, goal_range = policies(agent, config).high(s[None], task[None])[0], agent["goal_range"]
    if agent["step"] < max(config.warmup, config.pretrain):
        g = rng.uniform(-1, 1, g.shape) * goal_range
    else:
        fresh = math.sqrt(1 - config.noise_correlation**2) * rng.normal(size=g.shape)
        noise[:] = config.noise_correlation * noise + fresh
        g = np.clip(g + config.high_noise * goal_range * noise, -goal_range, goal_range)
    return g.astype(np.float32)


def explore_window(env, s, task, g, acting, warm, rng, config):
    """At most c steps under one goal g (P,), with noise -> window, end of the episode, terminated.

    acting: of `policies`. warm: in place of the policy's actions hold one random one [E10].
    """
    window = {"states": [s], "actions": [], "rewards": [], "goal": g, "task": task}
    held = rng.uniform(-1, 1, env.action_size)
    for _ in range(config.subgoal_interval):
        a = held if warm else acting.low(s[None], g[None])[0]
        a = a + config.low_noise * rng.normal(size=env.action_size)
        a = np.clip(a, -1, 1).astype(np.float32)
        obs, reward, terminated, truncated, _ = env.step(a)
        s1, _ = online.read(obs)
        g, s = acting.transition(s, g, s1), s1
        window["states"].append(s)
        window["actions"].append(a)
        window["rewards"].append(reward)
        if terminated or truncated:
            return window, True, terminated
    return window, False, False


def end_warmup(agent, rng, config):
    """Measure the goal range if need be; draw the goals of the windows so far, uniformly.

    Actions of the warm-up do not depend on goals, so that goals can be drawn here, once their
    range is known; those stored before are overwritten.
    """
    replay, goal_range, c = agent["replay"], agent["goal_range"], config.subgoal_interval
    n, P = min(int(replay["count"]), len(replay["mask"])), len(goal_range)
    if np.isnan(goal_range).any():
        whole = np.flatnonzero(replay["length"][:n] == c)
        if not len(whole):
            raise ValueError(f"no {c} steps in a row in the warm-up; give a goal range")
        moved = replay["states"][whole, c, :P] - replay["states"][whole, 0, :P]
        goal_range[:] = np.maximum(np.quantile(np.abs(moved), 0.95, axis=0), 1e-6)
    replay["goal"][:n] = rng.uniform(-1, 1, (n, P)) * goal_range


# ---------------------------------------------------------------------------------- the loop


def learn(env, agent, config, rngs):
    """HIRO: act for c steps, store, update the low level, relabel and update the high level.

    Yields ({last loss of each level and effect of relabelling: value}, whether the episode is
    over) after each window; the last episode is played to its end.
    """
    low, high, replay, rng = agent["low"], agent["high"], agent["replay"], rngs["batch"]
    acting = policies(agent, config)
    while agent["step"] < config.steps:
        s, task, noise = online.begin_episode(env, rngs, agent)
        over = follows = False
        while not over:
            warm, row = bool(agent["step"] < config.warmup), {}
            g = explore_goal(agent, s, task, noise, rngs["explore"], config)
            window, over, terminated = explore_window(env, s, task, g, acting, warm,
                                                      rngs["explore"], config)
            replay_add(replay, window, terminated, follows)
            s, follows = window["states"][-1], True
            agent["step"] += len(window["actions"])
            if warm and agent["step"] >= config.warmup:
                end_warmup(agent, rngs["explore"], config)
            low_updates, high_updates, rate = schedule(agent["step"], window, config)
            for _ in range(low_updates):
                batch = sample_steps(replay, rng, agent["goal_range"], config)
                row["low_loss"] = td3_update(low, batch, rng, config.low_discount, rate, config)
            for _ in range(high_updates):
                batch, info = sample_windows(replay, rng, acting.low, agent["goal_range"], config)
                row["high_loss"] = td3_update(high, batch, rng, config.high_discount, rate, config)
                row.update(info)
            yield row, over


def schedule(step, window, config):
    """Numbers of low-level and high-level updates after a window, and the factor on learning rates.

    0 and 0 in the warm-up; then one low-level update for each step of the window and high_updates
    of the high level [E12]; with `pretrain` the low level alone up to that step, the high level
    alone from then on [E16].
    """
    rate = min(1.0, max(0.0, 3 * (1 - int(step) / config.steps))) if config.lr_decay else 1.0
    if step < config.warmup:
        return 0, 0, rate
    low = 0 if config.pretrain and step > config.pretrain else len(window["actions"])
    high = config.high_updates if step > config.pretrain else 0
    return low, high, rate


# ------------------------------------------------------------------------------------- a run


def init_agent(problem, rngs):
    """A new agent, one tree of arrays: both levels, replay, goal range (NaN: to be measured)."""
    config, (S, P, D, A) = problem.config, problem.sizes
    n_low = S + P if config.see_position else S
    agent = {"low": td3_init(rngs["init"], n_low, A, config),
             "high": td3_init(rngs["init"], S + D, P, config), "step": np.zeros((), np.int64)}
    c = config.subgoal_interval
    agent["replay"] = replay_init(config.capacity // c, c, S, P, D, A)
    agent["goal_range"] = np.full(P, config.goal_range or np.nan, np.float32) * np.float32(
        getattr(problem.env, "goal_scale", 1))
    return agent


def prepare(config, checkpoint=None, env=None, **parts):
    """The problem that `train` solves, see support/online.py; checkpoint: a saved agent.

    env: a task by the convention of `envs.GoalEnv`, instead of config.env. For Gymnasium's
    environments see lab/gym.py.
    """
    limit = getattr(env or envs.make_task(config.env), "limit", None) or math.inf
    if not config.goal_range and config.subgoal_interval > limit:
        raise ValueError(f"--goal-range 0 is measured over --subgoal-interval "
                         f"{config.subgoal_interval} steps, but an episode of {config.env} has "
                         f"{limit}")
    return online.prepare(config, checkpoint, env, **{
        "title": "hiro, " + ("with" if config.correction == "off_policy" else "without")
        + " off-policy correction", "agent": "hiro", "init_agent": init_agent, "learn": learn,
        "policies": policies, **parts})


def load(folder):
    """Load a trained run -> actor(); each call gives one episode's act(observation) -> action."""
    return online.actors(*load_run(sys.modules[__name__], folder))


train, evaluate_checkpoint = online.train, online.evaluate_checkpoint

if __name__ == "__main__":
    main(sys.modules[__name__])         # which takes the names above from this module
