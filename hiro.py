"""HIRO: hierarchical reinforcement learning with off-policy correction, online. NumPy only.

Nachum, Gu, Lee, Levine 2018, arXiv 1805.08296. Two policies, both TD3 (Fujimoto et al. 2018):
  mu_hi(s, D)    the high-level policy (others say manager): every c steps a goal g, relative to the
                 position in s; D is the goal of the episode, which the task sets
  mu_lo(s, g)    the low-level policy (others say worker): rewarded for moving the position by g
A window is what happens under one goal: c steps, or fewer where the episode ends. Off-policy
correction: the low-level policy has changed since a window was stored. So whenever the high level
samples it, the goal in that batch is that of ten candidates under which today's low-level policy
would most likely have taken the stored actions; the replay, and with it the low level, keeps the
goal that was given.

    python hiro.py            trains on HIRO's U-maze with a point mass, three to eight minutes on
                              one core; leaves logs, checkpoint, summary and pictures in runs/
    python hiro.py --help     every flag with its meaning and its published value

What happens then, in order:
1. `main` makes the config (`resolve`) and opens the run; `train` makes the task and both levels
   (`init_agent`), and `run.begin` saves them.
2. In a plain loop over windows: `explore_goal`, `explore_window`, `replay_add`; once the warm-up is
   over also, for each step of the window, `sample_steps` and `td3_update` of the low level, then
   high_updates (5) times `sample_windows`, which relabels, and `td3_update` of the high level.
3. At the first episode's end after every eval_interval steps, and after the last episode,
   `evaluate` (not within the warm-up) and a checkpoint.
4. `draw` makes the pictures, `run.finish` prints the summary and writes summary.json.

The default is no reproduction (paper in parentheses): a point, not an ant, 60,000 steps (10
million); networks 64,64 (300,300), policies' Adam 3e-4 (1e-4), all rates falling to 0, low-level
discount 0.95 (0.99); goals within 2 (10); noise, in half-widths, 2 on goals and correlated (0.1),
0.1 on actions (0.033); task rewards times 0.02 (0.1), 5 high-level updates for each window (1).

Symbols: s, s1 state and next state, position first; g, g1 relative goal before and after the
step, by h; D the episode's goal (`desired`); a action in [-1, 1], of the high level g / goal_range;
r reward; m mask, 0 after a true termination, else 1; q critics' values; mu policy; c steps between
goals. In TD3's functions x, x1 are what a level sees, [s; g] or [s; D]. Shapes: batch B, agents N,
state S, position P, episode's goal D, action A, input of a network I, twin critics 2. Equation
numbers are the paper's. Tags [E1] ...: where paper, its authors' code, TD3's, public ports and
successors differ, docs/deviations.md.
"""

if __name__ == "__main__":
    import support
    support.one_line_interrupts()       # also while the modules below load

import nets                             # first: it sets one BLAS thread before numpy loads

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

import envs
from nets import adam, adam_init, ema, init_mlp, mlp, relu, stop_gradient, tanh, tree_map
from support import plots
from support.flags import (BELOW_1, NOT_NEGATIVE, OPEN, POSITIVE, SIZES, UP_TO_1, make_config,
                           option, parse, refuse_unused, require)
from support.runs import (Program, as_run, generators, one_line_errors, open_run, read_run,
                          run_seeds, say, show)


CORRECTIONS = "off_policy", "none"


@dataclass
class Config:
    """Everything that decides a run: default, meaning | the paper's value.

    Noise is in half-widths of the action range, at the high level of the goal range. `resolve` puts
    in what the task changes; the default task changes nothing."""

    env: str = option("point-umaze", "task", tuple(envs.TASKS_ONLINE))
    seed: int = option(0, "seed of everything random", NOT_NEGATIVE)
    steps: int = option(60_000, "environment steps [E28] | 10 million", POSITIVE)
    subgoal_interval: int = option(10, "c: steps between goals | 10", POSITIVE)
    goal_range: float = option(2.0, "half-width of goals; 0: lab.gym's [E7] | 10", NOT_NEGATIVE)
    hidden_dims: tuple = option((64, 64), "hidden layers of every network [E14] | 300,300", SIZES)
    batch_size: int = option(100, "batch size of both levels | 100", POSITIVE)
    actor_lr: float = option(3e-4, "Adam's learning rate of the policies [E21] | 1e-4", POSITIVE)
    critic_lr: float = option(1e-3, "Adam's learning rate of the critics | 1e-3", POSITIVE)
    lr_decay: bool = option(True, "rates fall to 0 over the last third [E21] | constant")
    low_discount: float = option(0.95, "discount of the low level [E9] | 0.99", OPEN)
    high_discount: float = option(0.99, "discount of the high level, for each goal | 0.99", OPEN)
    tau: float = option(0.005, "EMA rate of the target networks | 0.005", UP_TO_1)
    policy_freq: int = option(2, "critic updates between policy updates [E6] | 2", POSITIVE)
    low_noise: float = option(0.1, "std of noise on actions [E10] | 0.033", NOT_NEGATIVE)
    high_noise: float = option(2.0, "std of noise on goals [E10] | 0.1", NOT_NEGATIVE)
    noise_correlation: float = option(0.75, "of successive goals' noise [E10] | 0", BELOW_1)
    target_noise: float = option(0.2, "std of noise on target actions [E4] | 0.2", NOT_NEGATIVE)
    target_clip: float = option(0.5, "bound of that noise | 0.5", NOT_NEGATIVE)
    reward_scale: float = option(0.02, "factor on the task's reward [E11] | 0.1", POSITIVE)
    tanh_penalty: float = option(0.0, "on policies' inputs of tanh [E20] | 0", NOT_NEGATIVE)
    warmup: int = option(2500, "first steps, random and without updates [E26] | 2500", POSITIVE)
    high_updates: int = option(5, "high-level updates for each window [E12] | 1", POSITIVE)
    capacity: int = option(200_000, "of the replay, c to a window [E24] | 200,000", POSITIVE)
    correction: str = option("off_policy", "relabelling of goals, Eq. (5)", CORRECTIONS)
    eval_interval: int = option(2500, "steps between evaluations | 50,000", POSITIVE)
    eval_episodes: int = option(50, "evaluation episodes for each test | 50", POSITIVE)


QUICK = dict(steps=2000, warmup=500, eval_interval=1000, eval_episodes=4)
WORDS = {"quick": "the whole path in seconds, pictures included; success is not promised"}
ACTING = ("low/online/actor", "high/online/actor", "goal_range", "step")    # what acting needs
# settings that no longer exist: a saved run is read only if it had these values
DEPARTED = dict(eval_noise=0.0, critic_loss="huber", candidates=10, goal_at_window_end="h",
                relabel_low_goals=False, pretrain=0, see_position=True)
PROGRAM = Program("hiro.py", Config, "step", ACTING, DEPARTED)


def resolve(given, config_class=Config, changes=None):
    """A whole Config: defaults, changed by `changes` of a variant, task, --quick, flags given.

    ValueError: a value out of its range, one without effect, or values that do not go together.
    """
    given = dict(given)
    values = {**(changes or {}), **envs.make_task(given.get("env", Config.env)).settings}
    if given.pop("quick", False):
        values.update(QUICK)
    config = make_config(config_class, {**values, **given})
    refuse_unused(config, config_class(**values), {
        "noise_correlation": not config.high_noise and "--high-noise 0",
        "target_clip": not config.target_noise and "--target-noise 0"})
    c = config.subgoal_interval
    require(config, lambda x: x >= c, f"at least --subgoal-interval {c}", "warmup", "capacity")
    if config.steps <= config.warmup:
        raise ValueError(f"--steps {config.steps} must be above --warmup {config.warmup}: learning "
                         "begins after it")
    return config


# -------------------------------------------------------------------------------- goals


def goal_transition(s, g, s1):
    """h(s, g, s') = s + g - s' over positions [E25], Eq. (2): the same place, seen from s'.

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
    that maximises, with g_i = g + s_t - s_i over positions (h, applied i - t times),
        -1/2 sum_i ||a_i - mu_lo(s_i, g_i)||^2,     i = t ... t+c-1:
    their log-probability, up to a constant, if actions are Gaussian around mu_lo.
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
    made = (np.arange(c) < length[:, None])[:, None]        # short windows
    score = -0.5 * (((actions[:, None] - mu) ** 2).sum(-1) * made).sum(-1)
    return candidates[rows, score.argmax(1)], score


# ---------------------------------------------------------------------------------- TD3


def td3_init(rng, n_in, n_action, config):
    """One level, a tree of arrays: online and target networks, their Adam, a count of updates.

    Networks: policy (I,) -> (A,), twin critics (I + A,) -> (); A is P at the high level [E22][E23].
    """
    hidden = config.hidden_dims
    learned = {"actor": init_mlp(rng, (n_in, *hidden, n_action), last_scale=0.1),
              "critic": init_mlp(rng, (n_in + n_action, *hidden, 1), ensemble=2)}
    return {"online": learned, "target": tree_map(np.copy, learned),
            "actor_adam": adam_init(learned["actor"]),
            "critic_adam": adam_init(learned["critic"]), "count": np.zeros((), np.int64)}


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
    slope = np.clip(e.real, -1, 1)                      # l'(e); .real: for the derivative check
    loss = np.where(np.abs(e.real) < 1, 0.5 * e * e, slope * e - 0.5)
    return loss, lambda dl: dl * slope


def td3_target(target, batch, noise, gamma):
    """y = r + gamma m min_j Q'_j(x', clip(mu'(x') + noise, -1, 1)) (B,), Eqs. (4), (14).

    The equations are HIRO's for the low and the high level; min and noise are TD3's. x' (B,I);
    r, m (B,); noise (B,A), clipped, in half-widths of the action range [E4]. Constants: everything.
    """
    r, m, x1 = (batch[name] for name in ("rewards", "masks", "next_observations"))
    a1 = np.clip(policy(target["actor"], x1)[0] + noise, -1, 1)
    q1 = critic(target["critic"], x1, a1)[0].min(0)
    return stop_gradient(r + gamma * m * q1)


def critic_loss(params, batch, y):
    """L = sum_j mean huber(Q_j(x, a) - y), the loss of both critics, Eqs. (4), (13) [E5].

    x (B,I), a (B,A), y (B,). -> loss, {network: gradients}, as all losses here. Constants: y.
    """
    x, a = batch["observations"], batch["actions"]
    q, back_q = critic(params["critic"], x, a)
    loss, back_l = huber(q - y)
    grads = back_q(back_l(1 / len(x)))[1]
    return loss.mean(-1).sum(), {"critic": grads}


def actor_loss(params, x, penalty=0.0):
    """Deterministic policy gradient: L = -mean Q_1(x, mu(x)) + penalty mean u^2, mu = tanh(u).

    penalty: [E20]. The gradient comes through the critic's input. Constants: the critic's
    parameters; only the policy learns from this. x (B,I).
    """
    u, back_u = mlp(params["actor"], x, relu)
    a, back_a = tanh({}, u)
    q, back_q = critic(tree_map(lambda w: w[0], params["critic"]), x, a)
    da, _ = back_q(np.full(len(x), -1 / len(x), x.dtype))
    du = back_a(da)[0] + 2 * penalty / u.size * u
    return -q.mean() + penalty * (u * u).mean(), {"actor": back_u(du)[1]}


def td3_update(level, batch, rng, gamma, rate, config, critic_loss=critic_loss):
    """One update of TD3 (Fujimoto et al. 2018, Algorithm 1), in place; -> the critics' loss.

    gamma: the level's discount; rate: factor on the learning rates.
    """
    params, target = level["online"], level["target"]
    noise = config.target_noise * rng.standard_normal(batch["actions"].shape, np.float32)
    noise = np.clip(noise, -config.target_clip, config.target_clip)             # [E4]
    y = td3_target(target, batch, noise, gamma)
    loss, grads = critic_loss(params, batch, y)
    adam(params["critic"], grads["critic"], level["critic_adam"], rate * config.critic_lr)
    level["count"] += 1
    if level["count"] % config.policy_freq == 0:                                # delayed [E6]
        _, grads = actor_loss(params, batch["observations"], config.tanh_penalty)
        adam(params["actor"], grads["actor"], level["actor_adam"], rate * config.actor_lr)
        ema(target, params, config.tau)
    return loss


# ------------------------------------------------------------------------------- replay


def replay_init(windows, c, S, P, D, A):
    """Room for windows of at most c steps under one goal, s_t ... s_{t+c} inclusive [E2][E24].

    mask: 0 if the window ended in a termination; count: windows added so far, of which the last
    `windows` are kept.
    """
    def zeros(*shape):
        return np.zeros((windows, *shape), np.float32)

    return {"states": zeros(c + 1, S), "actions": zeros(c, A), "rewards": zeros(c),
            "goal": zeros(P), "desired_goal": zeros(D), "length": np.zeros(windows, np.int64),
            "mask": zeros(), "count": np.zeros((), np.int64)}


def replay_add(replay, window, terminated):
    """Add a window. Where a time limit ended it, values bootstrap [E13]."""
    i, n = int(replay["count"]) % len(replay["mask"]), len(window["actions"])
    for name in ("states", "actions", "rewards"):
        replay[name][i] = 0
        replay[name][i, :len(window[name])] = window[name]
    replay["goal"][i], replay["desired_goal"][i] = window["goal"], window["desired_goal"]
    replay["length"][i], replay["mask"][i] = n, not terminated
    replay["count"] += 1


def draw_steps(replay, rng, n, c):
    """n steps drawn uniformly -> window (n,), step in it (n,), whether it ends its window (n,)."""
    count = min(int(replay["count"]), len(replay["mask"]))
    w, i = rng.integers(count, size=n), rng.integers(c, size=n)
    while (short := i >= replay["length"][w]).any():        # drawn beyond a short window: again
        w[short] = rng.integers(count, size=short.sum())
        i[short] = rng.integers(c, size=short.sum())
    return w, i, i == replay["length"][w] - 1


def sample_steps(replay, rng, goal_range, config):
    """Low-level batch, steps drawn uniformly: [s; g], a, r, [s'; g'], m.

    g is the window's goal carried on by h; r is the intrinsic reward, not scaled; g' is h(s, g, s')
    also at the window's end, where the value goes on under it; m = 0 only at a termination [E1].
    goal_range: for variants.
    """
    w, i, last = draw_steps(replay, rng, config.batch_size, config.subgoal_interval)
    first, s, s1 = (replay["states"][w, j] for j in (0, i, i + 1))
    g = goal_transition(first, replay["goal"][w], s)
    g1 = goal_transition(s, g, s1)
    return {"observations": np.concatenate([s, g], -1), "actions": replay["actions"][w, i],
            "rewards": intrinsic_reward(s, g, s1),
            "masks": np.where(last, replay["mask"][w], np.float32(1)),
            "next_observations": np.concatenate([s1, g1], -1)}


def sample_windows(replay, rng, low_policy, goal_range, config):
    """High-level batch: [s_t; D], g / goal_range, r, [s_{t+c}; D], m; and what relabelling changed.

    g is the goal that the correction chooses, Eq. (5), and is not written back [E3]; r is the sum
    of the window's task rewards times reward_scale [E11]. A short window ends at s_{t+length}, with
    one whole discount [E13].
    """
    w = rng.integers(min(int(replay["count"]), len(replay["mask"])), size=config.batch_size)
    states, length, desired = (replay[name][w] for name in ("states", "length", "desired_goal"))
    goal, info = replay["goal"][w], {}
    if config.correction == "off_policy":
        new, score = off_policy_correction(low_policy, states, replay["actions"][w], goal, length,
                                           goal_range, rng)
        distance = np.sqrt(((new - goal) ** 2).sum(-1))
        info = {"relabel_fraction": (distance > 0).mean(), "relabel_distance": distance.mean(),
                "relabel_gain": (score.max(1) - score[:, 0]).mean()}
        goal = new
    end = states[np.arange(len(w)), length]
    return {"observations": np.concatenate([states[:, 0], desired], -1),
            "actions": goal / goal_range,
            "rewards": np.float32(config.reward_scale) * replay["rewards"][w].sum(-1),
            "next_observations": np.concatenate([end, desired], -1),
            "masks": replay["mask"][w]}, info


# -------------------------------------------------------------------------------- acting


def read(obs):
    """State s (S,), position first, and the episode's goal D (D,) of an observation, float32."""
    return obs["observation"].astype(np.float32), obs["desired_goal"].astype(np.float32)


class Actor:
    """Both policies: high(s (N,S), D (N,D)) -> goals (N,P), low(s, g (N,P)) -> actions (N,A).

    actor() begins an `Episode`: act(observation) -> action in [-1, 1]^A. One object for exploration
    (high and low), evaluation, `load` and pictures; it can be pickled. It holds the agent's own
    arrays, which `adam` changes in place: it always acts as today's policies.
    """

    hierarchical = True                     # lab/td3.py has an actor of one level

    def __init__(self, agent, config, noise=0.0, rng=None):
        """noise: std of Gaussian noise on the actions of an `Episode`, drawn from rng (without one
        from the config's seed); 0 but for tasks that need some. Exploration has its own."""
        self.high_actor = agent["high"]["online"]["actor"] if "high" in agent else None
        self.low_actor, self.goal_range = agent["low"]["online"]["actor"], agent["goal_range"]
        self.c, self.noise = config.subgoal_interval, noise
        self.rng = rng or np.random.default_rng(config.seed)

    def high(self, s, desired):
        return self.goal_range * policy(self.high_actor, np.concatenate([s, desired], -1))[0]

    def low(self, s, g):
        return policy(self.low_actor, np.concatenate([s, g], -1))[0]

    def transition(self, s, g, s1):
        """How a goal goes on after a step: Eq. (2)."""
        return goal_transition(s, g, s1)

    def __call__(self):
        return Episode(self)


class Episode:
    """One episode of an `Actor`, or N side by side; g: the goals of the last step (N,P), given t
    steps ago."""

    def __init__(self, actor):
        self.actor, self.t, self.desired = actor, 0, None

    def __call__(self, obs):
        s, desired = (x[None] for x in read(obs))
        return self.act(s, desired)[0]

    def act(self, s, desired):
        """Actions (N,A) at states s (N,S) with the episodes' goals (N,D); every c steps, and where
        the task has changed an episode's goal, with new goals of the high-level policy."""
        actor = self.actor
        if self.t % actor.c == 0 or not np.array_equal(desired, self.desired):
            self.g, self.t = actor.high(s, desired), 0
        else:
            self.g = actor.transition(self.s, self.g, s)
        self.s, self.desired, self.t = s, desired, self.t + 1
        a = actor.low(s, self.g)
        if actor.noise:
            a = np.clip(a + actor.noise * actor.rng.normal(size=a.shape), -1, 1)
        return a


def explore_goal(actor, s, desired, noise, warm, rng, config):
    """A goal (P,) of the high-level policy with noise [E10]; in the warm-up a uniform one [E26].

    noise (P,): an autoregressive process over an episode, which begins with N(0, 1) and keeps std
    1; changed in place.
    """
    g, goal_range = actor.high(s[None], desired[None])[0], actor.goal_range
    if warm:
        return (rng.uniform(-1, 1, g.shape) * goal_range).astype(np.float32)
    fresh = math.sqrt(1 - config.noise_correlation**2) * rng.normal(size=g.shape)
    noise[:] = config.noise_correlation * noise + fresh
    g = g + config.high_noise * goal_range * noise
    return np.clip(g, -goal_range, goal_range).astype(np.float32)


def explore_window(env, s, desired, g, actor, warm, rng, config):
    """At most c steps under one goal g (P,), with noise -> window, the episode's goal (D,) after
    it, end of the episode, terminated.

    warm: in place of the policy's actions hold one random one [E26]. Where the task changes the
    episode's goal, the window ends [E30].
    """
    window = {"states": [s], "actions": [], "rewards": [], "goal": g, "desired_goal": desired}
    held = rng.uniform(-1, 1, env.action_size)
    for _ in range(config.subgoal_interval):
        a = held if warm else actor.low(s[None], g[None])[0]
        a = a + config.low_noise * rng.normal(size=env.action_size)
        a = np.clip(a, -1, 1).astype(np.float32)
        obs, reward, terminated, truncated, _ = env.step(a)
        s1, next_desired = read(obs)
        g, s = actor.transition(s, g, s1), s1
        window["states"].append(s)
        window["actions"].append(a)
        window["rewards"].append(reward)
        over = terminated or truncated
        if over or not np.array_equal(next_desired, desired):
            break
    return window, next_desired, over, terminated


# -------------------------------------------------------------------------------- evaluation


def rollout(task, episode, starts, goals):
    """N episodes of a task side by side, to the time limit; episode: of an `Actor`.

    starts (N,2), goals (N,D) -> distances to the goal after each step (T,N), the task's states
    (T+1,N,...), and the subgoals as places, position + goal, (T/c rounded up, N, P).
    """
    s = task.begin(starts)
    distance, paths, asked = [], [s], []
    for t in range(task.limit):
        now = task.observe(s).astype(np.float32)
        a = episode.act(now, goals.astype(np.float32))
        if t % episode.actor.c == 0:
            asked.append(now[:, :episode.g.shape[1]] + episode.g)
        s = task.move(s, a.astype(float))
        paths.append(s)
        distance.append(task.distance(s, goals))
    return np.array(distance), np.array(paths), np.array(asked)


def evaluate(agent, task, config, actor=Actor):
    """Success of the current policies -> summary, {test: (paths, asked, goals, success)}.

    Shapes for N = eval_episodes as in `rollout`; success (N,): reached at any step. The first test
    gives success, success_last_step and final_distance, each other test success_<name>.
    subgoal_error: the mean of `subgoal_errors` over all tests; subgoal_error_<name>: over one.
    Starts, goals and all that is random depend only on the seed and on the steps so far.
    """
    summary, episodes, n = {}, {}, config.eval_episodes
    rng = np.random.default_rng([config.seed, int(agent["step"])])
    task.rng = rng                          # training seeds it anew at its next reset
    tests = task.tests(rng, n)
    starts, goals = (np.concatenate(x) for x in zip(*tests.values()))
    acting = actor(agent, config, task.eval_noise, rng)
    distance, paths, asked = rollout(task, acting(), starts, goals)
    errors = subgoal_errors(task.position(paths), asked, config.subgoal_interval)
    success = task.reached(distance).any(0)
    for i, name in enumerate(tests):
        mine = slice(i * n, (i + 1) * n)
        if i == 0:
            summary = {"success": success[mine].mean(),
                       "success_last_step": task.reached_last(distance[-1, mine]).mean(),
                       "final_distance": distance[-1, mine].mean()}
        else:
            summary[f"success_{name}"] = success[mine].mean()
        episodes[name] = paths[:, mine], asked[:, mine], goals[mine], success[mine]
    if acting.hierarchical and len(errors):
        summary["subgoal_error"] = errors.mean()
        if len(tests) > 1:
            summary.update({f"subgoal_error_{name}": errors[:, i * n:(i + 1) * n].mean()
                            for i, name in enumerate(tests)})
    return {k: float(x) for k, x in summary.items()}, episodes


def subgoal_errors(paths, asked, c):
    """How far from its subgoal the agent is after each whole window of c steps: (T/c, N).

    paths (T+1,N,2), asked (T/c rounded up, N,2). Nothing in HIRO keeps subgoals within reach, so
    that the distance need not become small.
    """
    reached = paths[c::c]
    return np.sqrt(((reached - asked[:len(reached)]) ** 2).sum(-1))


# ------------------------------------------------------------------------------- the program


def init_agent(config, sizes, rng, goal_scale):
    """A new agent, one tree of arrays: both levels, replay, goal range (P,), steps so far.

    sizes: S, P, D, A of state, position, episode's goal and action; goal_scale: factor of the task
    on the goal range of each axis.
    """
    (S, P, D, A), c = sizes, config.subgoal_interval
    return {"low": td3_init(rng, S + P, A, config), "high": td3_init(rng, S + D, P, config),
            "replay": replay_init(config.capacity // c, c, *sizes),
            "goal_range": np.full(P, config.goal_range, np.float32) * np.float32(goal_scale),
            "step": np.zeros((), np.int64)}


def sizes_of(env):
    """S, P, D, A of state, position, episode's goal, action. ValueError: actions are integers."""
    if not env.action_size:
        raise ValueError(f"{name_of(env)} has integer actions; online learning needs actions that "
                         "are vectors")
    obs, _ = env.reset(seed=0)
    names = "observation", "achieved_goal", "desired_goal"
    return *(obs[name].size for name in names), env.action_size


def name_of(env):
    """The task's name, or the class of an environment from elsewhere."""
    return env.name if isinstance(env, envs.GoalEnv) else type(env.unwrapped).__name__


@np.errstate(over="ignore", invalid="ignore")           # run.step refuses what is not finite
def train(env, config, run=None, *, goal_range=None, evaluate=evaluate, actor=Actor,
          sample_steps=sample_steps, td3_update=td3_update, title="hiro"):
    """A whole run: act for c steps, store, update the low level, relabel and update the high level.

    env: a task by the convention of `envs.GoalEnv` (reset, step, action_size, goal_scale,
    eval_noise), None: the config's. run: a folder, or a `support.runs.Run`; without one nothing is
    written.
    goal_range: half-width of goals, a number or (P,), instead of the config's. evaluate(agent, env,
    config, actor) -> summary, episodes; actor, sample_steps, td3_update: what a variant replaces.
    -> namespace: summary, agent (tree of arrays), actor, an `Actor`. ValueError: integer actions,
    or a goal range that is not positive.
    """
    run, task = as_run(run, PROGRAM, config), envs.make_task(config.env)
    env, own = env or task, None
    if type(env) is not type(task):
        own = f"the environment {name_of(env)} from Python"
    say(f"{name_of(env)}, seed {config.seed}: {title}, correction {config.correction}; "
        f"{config.steps:,} environment steps")
    rngs = generators(config.seed, "init", "episodes", "explore", "batch")
    agent = init_agent(config, sizes_of(env), rngs["init"], env.goal_scale)
    if goal_range is not None:
        agent["goal_range"][:] = goal_range
    if not (agent["goal_range"] > 0).all():
        raise ValueError(f"the goal range must be positive, not {agent['goal_range'].tolist()}; "
                         "lab.gym.train measures it, and --variant goal-range-measured of "
                         "lab.hiro_ablations")
    run.begin(agent, rngs, config.steps, config.warmup, own)    # saves; resumed: overwrites both

    low, high, replay, goal_range = (agent[x] for x in ("low", "high", "replay", "goal_range"))
    acting, explore, rng = actor(agent, config), rngs["explore"], rngs["batch"]
    step, every = int(agent["step"]), config.eval_interval
    due = (step // every + 1) * every
    while step < config.steps:
        s, desired = read(env.reset(seed=int(rngs["episodes"].integers(2**31)))[0])
        noise = explore.normal(size=len(goal_range))
        over = False
        while not over:                                     # a window
            warm = step < config.warmup
            row = {}                                        # losses of the last updates, to log
            g = explore_goal(acting, s, desired, noise, warm, explore, config)
            window, desired, over, terminated = explore_window(env, s, desired, g, acting, warm,
                                                               explore, config)
            replay_add(replay, window, terminated)
            s = window["states"][-1]
            step += len(window["actions"])
            agent["step"][...] = step
            if step >= config.warmup:                       # also after the last window of warm-up
                rate = schedule(step, config)               # all updates at a window's end [E12]
                for _ in window["actions"]:
                    batch = sample_steps(replay, rng, goal_range, config)
                    row["low_loss"] = td3_update(low, batch, rng, config.low_discount, rate, config)
                for _ in range(config.high_updates):
                    batch, info = sample_windows(replay, rng, acting.low, goal_range, config)
                    row["high_loss"] = td3_update(high, batch, rng, config.high_discount, rate,
                                                  config)
                    row.update(info)
            run.step(step, row)
        if due <= step < config.steps:
            due = (step // every + 1) * every
            if step >= config.warmup:
                run.evaluated(step, evaluate(agent, env, config, actor)[0])
            run.save(agent, rngs)
        elif run.stopped:
            run.save(agent, rngs)                           # which then ends the run

    found, episodes = evaluate(agent, env, config, actor)
    run.evaluated(step, found)
    run.save(agent, rngs)
    summary = {"env": name_of(env), "agent": title, "seed": config.seed, "env_steps": step, **found,
               **summarise(run.logs, step), "episodes": config.eval_episodes,
               "train_seconds": round(run.seconds(), 1)}
    if run.folder:
        draw(run, env, config, acting, episodes)
    run.finish(summary)
    return SimpleNamespace(summary=summary, agent=agent,
                           actor=actor(agent, config, env.eval_noise))


def schedule(step, config):
    """The factor on the learning rates: 1, then falling linearly to 0 over the last third [E21]."""
    if not config.lr_decay:
        return 1.0
    return min(1.0, max(0.0, 3 * (1 - step / config.steps)))


def summarise(logs, step):
    """What a run's logs say of its course, for summary.json; step: the last one.

    relabel_...: means of the last 20 logged rows. ..._curve: one number for each evaluation, of
    relabel_... the mean since the evaluation before. first_success: the first step with an
    evaluated success of at least 0.95, or None. success_lowest_late: the lowest success of the
    evaluations in the last 10,000 steps.
    """
    tests, logged = logs["eval"], [row for row in logs["train"] if "relabel_fraction" in row]
    known = [row for row in tests if "success" in row]  # an environment may not tell
    solved = [row["step"] for row in known if row["success"] >= 0.95]
    late = [row["success"] for row in known if row["step"] >= step - 10_000]
    curves = {f"{key}_curve": [round(row[key], 3) for row in tests] for key in tests[-1]
              if key == "success" or key.startswith("subgoal_error")}
    means = {}
    if logged:
        part = np.searchsorted([row["step"] for row in tests], [row["step"] for row in logged])
        for key in ("relabel_fraction", "relabel_distance", "relabel_gain"):
            x = np.array([row[key] for row in logged])
            means[key] = float(x[-20:].mean())
            curves[f"{key}_curve"] = [round(float(x[part == i].mean()), 3) if (part == i).any()
                                      else None for i in range(len(tests))]
    return {**means, "first_success": solved[0] if solved else None,
            "success_lowest_late": min(late, default=None), **curves}


def draw(run, env, config, acting, episodes):
    """The pictures of a run: learning curve, relabelling over training, an episode of each test
    until its goal is reached."""
    plots.draw_curve(run.path("curve.png"), run.logs, "step")
    if any("relabel_fraction" in row for row in run.logs["train"]):
        plots.draw_correction(run.path("correction.png"), run.logs)
    if episodes:
        tests = {}
        for name, (paths, asked, goals, _) in episodes.items():
            reached = env.reached(env.distance(paths[:, 0], goals[:1]))
            path = paths[:reached.argmax() + 1 if reached.any() else None, 0]
            asked = asked[:math.ceil(len(path) / config.subgoal_interval), 0]
            tests[name] = {"path": path[:, :2], "goal": goals[0, :2], "asked": asked[:, :2],
                           "blocks": env.blocks(path)}
        plots.draw_episodes(run.path("episodes.png"), env.maze, tests,
                            config.subgoal_interval if acting.hierarchical else None)


def load(folder):
    """A trained run -> `Actor`: each call of it gives one episode's act(observation) -> action."""
    saved = read_run(PROGRAM, folder)
    return Actor(saved.agent, saved.config, envs.make_task(saved.config.env).eval_noise)


def evaluate_saved(folder, program=PROGRAM, actor=Actor):
    """The evaluation of a saved run, with the starts and goals of the one in training. ValueError:
    it is still in its warm-up, or of an environment from Python."""
    saved = read_run(program, folder)
    if saved.meta.get("given"):
        raise ValueError(f"{folder} is a run in {saved.meta['given']}; evaluate it there: "
                         "hiro.load(FOLDER) gives its actor")
    if saved.agent["step"] < saved.config.warmup:
        raise ValueError("the run was stopped in its warm-up; there is nothing to evaluate yet")
    task = envs.make_task(saved.config.env)
    found, _ = evaluate(saved.agent, task, saved.config, actor)
    return {"env_steps": int(saved.agent["step"]), **found}


def main():
    given, call = parse(PROGRAM, __doc__, WORDS)
    with one_line_errors():
        if call.eval:
            return show(evaluate_saved(call.eval))
        config = resolve(given)
        if call.seeds:
            return run_seeds(PROGRAM, call, given, config)
        with open_run(PROGRAM, call, config) as run:
            train(None, run.config, run)


if __name__ == "__main__":
    main()
