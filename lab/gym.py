"""HIRO on any environment with Gymnasium's reset and step and a Box of actions.

    import hiro, lab.gym
    config = hiro.resolve({"steps": 100_000, "goal_range": 0})      # 0: measured before training
    result = lab.gym.train(env, config)                             # arrays: goal=..., position=...
    act = result.actor()                                            # one episode's policy
    action = act(observation)

Observations are dicts of observation, achieved_goal and desired_goal (Gymnasium-Robotics), or
arrays with one goal given. Success is info["success"] or info["is_success"].
"""

import hiro                             # first: it sets one BLAS thread before numpy loads

from types import SimpleNamespace

import numpy as np

from support.runs import generators

ENDLESS = 10_000                        # a longer episode is taken to have no time limit


class GymAdapter:
    """A Gymnasium environment with the observations of `envs.GoalEnv` and actions in [-1, 1]^A.

    Dict observations: the position is achieved_goal (P,); it is put before the entry observation
    unless that already begins with it. Arrays: the position is obs[position] (a slice or indices),
    which is moved to the front, and goal (D,) is that of all episodes.
    ValueError: the environment lacks a Box of actions or a goal.
    """

    goal_scale, eval_noise = 1.0, 0.0       # as of `envs.GoalEnv`

    def __init__(self, env, goal=None, position=slice(0, 2)):
        self.env, self.position = env, position
        self.unwrapped = getattr(env, "unwrapped", env)         # names the run
        self.goal = None if goal is None else np.asarray(goal, np.float32).ravel()
        space = getattr(env, "action_space", None)
        low, high = (np.asarray(getattr(space, k, np.nan), float) for k in ("low", "high"))
        if low.ndim != 1 or not np.isfinite(low + high).all():
            raise ValueError("the environment needs an action_space with finite vectors low, high "
                             "(a Gymnasium Box)")
        self.centre, self.half_width = (high + low) / 2, (high - low) / 2
        self.action_size = len(low)
        obs = env.reset(seed=0)[0]
        if isinstance(obs, dict) == (goal is not None):
            raise ValueError("give a goal=... if observations are arrays, and only then")
        if isinstance(obs, dict):                       # compared twice: a match may be chance
            moved = env.step(self.action(np.ones(len(low))))[0]
            self.begins = self._begins(obs) and self._begins(moved)

    @staticmethod
    def _begins(obs):
        o, p = (np.ravel(obs[k]) for k in ("observation", "achieved_goal"))
        return np.array_equal(o[:len(p)], p)

    def observe(self, obs):
        """A dict of observation (S,), position first, achieved_goal (P,), desired_goal (D,)."""
        if isinstance(obs, dict):
            s, p, desired = (np.ravel(obs[k]) for k in ("observation", "achieved_goal",
                                                        "desired_goal"))
            if not self.begins:
                s = np.concatenate([p, s])
        else:
            o, desired = np.ravel(obs), self.goal
            p = o[self.position]
            s = np.concatenate([p, np.delete(o, self.position)])
        return {"observation": s, "achieved_goal": p, "desired_goal": desired}

    def action(self, a):
        """a (A,) in [-1, 1] scaled to the environment's range, in the dtype of its actions."""
        space = self.env.action_space
        return np.clip(self.centre + self.half_width * a, space.low, space.high).astype(
            getattr(space, "dtype", float))

    def reset(self, seed=None):
        self.time = 0
        obs, info = self.env.reset(seed=seed)
        return self.observe(obs), info

    def step(self, a):
        """Gymnasium's step with a (A,) in [-1, 1]. ValueError: an episode without end."""
        self.time += 1
        _refuse_endless(self.time)
        obs, reward, terminated, truncated, info = self.env.step(self.action(a))
        return self.observe(obs), reward, terminated, truncated, info


def _success(info):
    return bool(info.get("success", info.get("is_success", False)))


def _refuse_endless(time):
    if time > ENDLESS:
        raise ValueError(f"an episode did not end in {time} steps; the environment needs a time "
                         "limit")


def measure_goal_range(env, config):
    """The 95th percentile of |move in c steps| on each axis of the position: (P,), at least 1e-6.

    env: by the convention of `envs.GoalEnv`. It is played for config.warmup steps, which count
    nowhere else, as in hiro's warm-up: one uniform action is held for c = config.subgoal_interval
    steps. ValueError: no c steps in a row.
    """
    names = "init", "episodes", "explore", "batch", "measure"       # of hiro.train, and one more
    rng, c = generators(config.seed, *names)["measure"], config.subgoal_interval
    acting = SimpleNamespace(transition=lambda s, g, s1: g)         # of goals, which play no part
    moves, step, over = [], 0, True
    while step < config.warmup:
        if over:
            obs, _ = env.reset(seed=int(rng.integers(2**31)))
            s, desired = hiro.read(obs)
        window, over, _ = hiro.explore_window(env, s, desired, desired, acting, True, rng, config)
        s = window["states"][-1]
        step += len(window["actions"])
        if len(window["actions"]) == c:
            moves.append(np.abs(s - window["states"][0])[:len(obs["achieved_goal"])])
    if not moves:
        raise ValueError(f"the goal range cannot be measured: no {c} steps in a row (subgoal_"
                         f"interval) in {config.warmup} (warmup); give a goal_range")
    return np.maximum(np.quantile(moves, 0.95, axis=0), 1e-6)


def train(env, config, *, goal=None, position=slice(0, 2), goal_range=None, run=None):
    """Train HIRO on an environment; config: of `hiro.resolve`, its env is ignored.

    goal, position: of `GymAdapter`. goal_range: half-width of the high level's goals in units of
    the position, a number or (P,), instead of config.goal_range, of which 0 stands for
    `measure_goal_range`. run: a `support.runs.Run`; without one nothing is written.
    -> namespace with summary (dict), agent, and actor(), which returns a new episode's
    act(observation) -> action, both as the environment has them.
    ValueError: what `GymAdapter`, `measure_goal_range` or `hiro.train` refuses.
    """
    adapter = GymAdapter(env, goal, position)
    if goal_range is None and not config.goal_range:
        goal_range = measure_goal_range(adapter, config)
    result = hiro.train(adapter, config, run, goal_range=goal_range, evaluate=evaluate)
    actor = result.actor

    def of_the_environment():
        act = actor()
        return lambda obs: adapter.action(act(adapter.observe(obs)))

    result.actor = of_the_environment
    return result


def evaluate(agent, env, config, actor):
    """Means over eval_episodes episodes, played one after the other -> summary, {}.

    success: at any step; success_last_step; final_distance: from achieved_goal to desired_goal, NaN
    if their sizes differ; return: the sum of the environment's rewards.
    """
    rng = np.random.default_rng([config.seed, int(agent["step"])])
    acting, results = actor(agent, config), []
    for _ in range(config.eval_episodes):
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        act, over, ever, total = acting(), False, False, 0.0
        while not over:
            obs, reward, terminated, truncated, info = env.step(act(obs))
            total += float(reward)
            success = _success(info)
            ever = ever or success
            over = terminated or truncated
        p, desired = (obs[k].astype(np.float32) for k in ("achieved_goal", "desired_goal"))
        distance = np.linalg.norm(p - desired) if len(desired) == len(p) else np.nan
        results.append((ever, success, distance, total))
    names = "success", "success_last_step", "final_distance", "return"
    return dict(zip(names, np.mean(np.array(results, float), axis=0).tolist())), {}


def evaluator(env, config, seed=0):
    """evaluate(act) -> {"success"} for `hiql.train`: the share of config.eval_episodes episodes in
    which info["success"] (or "is_success") was ever true. Observations are dicts.

    desired_goal (P,) is a position. With config.goal_indices it is the goal that HIQL is given;
    without them the goal is a whole state (d,): the position first, all else, such as velocities,
    0. Every evaluation has the same starts and goals.
    ValueError: other observations; one that does not hold achieved_goal at goal_indices, or without
    them at its beginning; an info without success; an episode without end.
    """
    obs = env.reset(seed=seed)[0]
    names = "observation", "achieved_goal", "desired_goal"
    if not isinstance(obs, dict) or not obs.keys() >= set(names):
        raise ValueError(f"the environment's observations must be dicts of {', '.join(names)}")
    s, position = obs["observation"], obs["achieved_goal"]
    indices = list(config.goal_indices or range(len(position)))
    if len(indices) != len(position) or max(indices) >= len(s) or (
            not np.allclose(s[indices], position)):
        raise ValueError(f"the entries {', '.join(map(str, indices))} of an observation must be "
                         "the position, achieved_goal; choose --goal-indices so that they are")

    def evaluate(act):
        results, told = [], False
        for episode in range(config.eval_episodes):
            (obs, _), over, ever, t = env.reset(seed=seed + 1000 * episode), False, False, 0
            while not over:
                s, goal = obs["observation"][None], obs["desired_goal"][None]
                if not config.goal_indices:
                    goal = np.pad(goal, ((0, 0), (0, s.shape[1] - goal.shape[1])))
                obs, _, terminated, truncated, info = env.step(act(s, goal, t)[0])
                told = told or "success" in info or "is_success" in info
                ever = ever or _success(info)
                over = terminated or truncated or ever
                t += 1
                _refuse_endless(t)
            results.append(ever)
        if not told:
            raise ValueError("the environment's info has no success and no is_success; write an "
                             "evaluate(act) of your own")
        return {"success": float(np.mean(results))}

    return evaluate
