"""HIRO and HIQL at environments with Gymnasium's reset and step.

    import hiro, lab.gym
    config = hiro.resolve({"steps": 100_000, "goal_range": 0})      # 0: measured before training
    result = lab.gym.train(env, config)                             # arrays: goal=..., position=...
    act = result.actor()                                            # one episode's policy
    action = act(observation)

Observations are dicts of observation, achieved_goal and desired_goal (Gymnasium-Robotics), or
arrays; the goal of arrays is one that is given, or reset's info["goal"], a whole observation, as in
OGBench. Success is info["success"] or info["is_success"]; without these there is no success, and
the return is told instead. What an environment gives is checked, by two steps before training and
then all along (`Border`).
"""

import hiro                             # first: it sets one BLAS thread before numpy loads

from types import SimpleNamespace

import numpy as np

from support.runs import generators

ENDLESS = 10_000                        # so long an episode is taken to have no time limit
NAMES = "observation", "achieved_goal", "desired_goal"


class Border:
    """A user's environment; observations become dicts of `NAMES`, flat arrays, and are checked.

    Dicts stay as they are. Of arrays the position, achieved_goal, is obs[position] (a slice or
    indices); desired_goal is the goal (D,) given, or of reset's info["goal"] the position.
    first: the observations of a reset and of two steps. state_goal: info["goal"], or None.
    ValueError, at once and later: what does not fit Gymnasium's reset and step, a goal that is
    missing, numbers that are not finite, an episode without end.
    """

    def __init__(self, env, goal=None, position=slice(0, 2)):
        self.env, self.position, self.state_goal, self.time = env, position, None, 0
        self.unwrapped = getattr(env, "unwrapped", env)         # names the run
        self.goal = None if goal is None else self._array("the goal", goal)
        obs, _ = self.reset(seed=0)
        self.first, over = [obs], False
        for _ in range(2):
            if over:
                self.reset(seed=0)
            obs, _, terminated, truncated, _ = self.step(self.some_action())
            over = terminated or truncated
            self.first.append(obs)

    def some_action(self):
        """An action that should move the agent: the upper end of a Box, else 0."""
        space = getattr(self.env, "action_space", None)
        high = np.asarray(getattr(space, "high", 0), getattr(space, "dtype", None))
        return np.where(np.isfinite(high), high, 1).astype(high.dtype)

    def reset(self, seed=None, **more):
        """Gymnasium's reset."""
        self.time = 0
        try:
            made = self.env.reset(seed=seed, **more)
        except TypeError as e:
            raise ValueError(f"reset(seed=...) is wanted, as Gymnasium has it ({e})") from e
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], dict):
            raise ValueError("reset must return (observation, info), info a dict, as Gymnasium's "
                             "does; that of old Gym returns the observation alone")
        obs, info = made
        if not isinstance(obs, dict) and self.goal is None:
            if "goal" not in info:
                raise ValueError("the observations are arrays: give a goal=..., or let reset's "
                                 'info have a "goal"')
            self.state_goal = self._array("the info's goal", info["goal"])
        return self.read(obs), info

    def step(self, action):
        """Gymnasium's step; the reward is a float."""
        made = self.env.step(action)
        if not isinstance(made, tuple) or len(made) != 5 or not isinstance(made[4], dict):
            raise ValueError("step must return (observation, reward, terminated, truncated, info), "
                             "info a dict, as Gymnasium's does")
        obs, reward, terminated, truncated, info = made
        self.time += 1
        number = not np.ndim(reward) and np.asarray(reward).dtype.kind in "biuf"
        if not number or not np.isfinite(reward):
            raise ValueError(f"a reward must be a finite number; that of step {self.time} is "
                             f"{reward!r:.60}")
        over = bool(terminated), bool(truncated)
        if self.time >= ENDLESS and not any(over):
            raise ValueError(f"an episode did not end in {self.time} steps; the environment needs "
                             "a time limit")
        return self.read(obs), float(reward), *over, info

    def read(self, obs):
        """An observation of the environment as a dict of `NAMES`."""
        if isinstance(obs, dict):
            if self.goal is not None:
                raise ValueError("give a goal=... if observations are arrays, and only then")
            if missing := [name for name in NAMES if name not in obs]:
                raise ValueError(f"an observation that is a dict needs {', '.join(missing)}; this "
                                 f"one has {', '.join(map(str, obs))}")
            return {name: self._array(name, obs[name]) for name in NAMES}
        o = self._array("an observation", obs)
        if self.goal is not None and self.goal.shape != self._at(o).shape:
            raise ValueError(f"the goal has {len(self.goal)} entries and the position "
                             f"{len(self._at(o))}; they must be as many")
        desired = self._at(self.state_goal) if self.goal is None else self.goal
        return {"observation": o, "achieved_goal": self._at(o), "desired_goal": desired}

    def _at(self, o):
        """The position in an observation (S,)."""
        try:
            p = o[self.position]
        except (IndexError, TypeError):
            p = o[:0]
        if p.ndim != 1 or not p.size:
            raise ValueError(f"position={self.position} must be a slice or indices of the {len(o)} "
                             "entries of an observation")
        return p

    def _array(self, name, x):
        """x as a flat array of finite numbers."""
        try:
            x = np.ravel(x)
        except ValueError:                              # parts of several lengths
            x = np.array([None])
        if x.dtype.kind not in "biuf" or not x.size:
            raise ValueError(f"{name} must be an array of numbers")
        if not np.isfinite(x).all():
            raise ValueError(f"{name} has NaN or infinity, at step {self.time} of an episode")
        return x


class GymAdapter(Border):
    """A Gymnasium environment with the observations of `envs.GoalEnv` and actions in [-1, 1]^A.

    The position is put before the entry observation of a dict unless that already begins with it;
    in an array it is moved to the front. ValueError also: no Box of actions; positions whose steps
    single precision cannot tell.
    """

    goal_scale, eval_noise = 1.0, 0.0       # as of `envs.GoalEnv`
    begins = True                           # whether the observation of a dict begins with it

    def __init__(self, env, goal=None, position=slice(0, 2)):
        space = getattr(env, "action_space", None)
        low, high = (np.asarray(getattr(space, k, np.nan), float) for k in ("low", "high"))
        whole = np.dtype(getattr(space, "dtype", None) or float).kind in "biu"
        if low.ndim != 1 or low.shape != high.shape or whole or (
                not np.isfinite([low, high]).all() or (low >= high).any()):
            raise ValueError("the environment needs an action_space with finite vectors low < high "
                             "of floats (a Gymnasium Box)")
        self.centre, self.half_width = (high + low) / 2, (high - low) / 2
        self.action_size = len(low)
        super().__init__(env, goal, position)
        self.begins = all(self._begins(obs) for obs in self.first)  # one alone may be chance
        p = np.array([obs["achieved_goal"] for obs in self.first], float)
        moved = np.diff(p, axis=0)
        lost = np.abs(np.diff(p.astype(np.float32).astype(float), axis=0) - moved)
        if lost.max() > 0.05 * np.abs(moved).max():
            raise ValueError(f"positions such as {p[-1].tolist()} are too far from 0 for single "
                             "precision to tell one step from another; let the environment "
                             "subtract an origin")

    @staticmethod
    def _begins(obs):
        o, p = obs["observation"], obs["achieved_goal"]
        return np.array_equal(o[:len(p)], p)

    def some_action(self):
        return np.ones(self.action_size)

    def action(self, a):
        """a (A,) in [-1, 1] scaled to the environment's range, in the dtype of its actions."""
        space = self.env.action_space
        return np.clip(self.centre + self.half_width * a, space.low, space.high).astype(
            getattr(space, "dtype", float))

    def step(self, a):
        """Gymnasium's step with a (A,) in [-1, 1]."""
        return super().step(self.action(a))

    def read(self, obs):
        """An observation of the environment as a dict of `NAMES`, position first."""
        found = super().read(obs)
        s, p = found["observation"], found["achieved_goal"]
        if not isinstance(obs, dict):
            s = np.concatenate([p, np.delete(s, self.position)])
        elif not self.begins:
            s = np.concatenate([p, s])
        return {**found, "observation": s}


def _success(info):
    """Whether an info says success; None: it does not tell."""
    found = info.get("success", info.get("is_success"))
    return None if found is None else bool(found)


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
        window, desired, over, _ = hiro.explore_window(env, s, desired, desired, acting, True, rng,
                                                       config)
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
    `measure_goal_range`. run: a folder, or a `support.runs.Run`; without one nothing is written.
    -> namespace with summary (dict), agent, and actor(), which returns a new episode's
    act(observation) -> action, both as the environment has them.
    ValueError: what `GymAdapter`, `measure_goal_range` or `hiro.train` refuses; a goal range of
    another size than the position.
    """
    adapter = GymAdapter(env, goal, position)
    sizes = (), adapter.first[0]["achieved_goal"].shape
    if goal_range is not None and np.shape(goal_range) not in sizes:
        raise ValueError(f"goal_range must be a number or {sizes[1]} numbers, not {goal_range!r}")
    if goal_range is None and not config.goal_range:
        goal_range = measure_goal_range(adapter, config)
    result = hiro.train(adapter, config, run, goal_range=goal_range, evaluate=evaluate)
    actor = result.actor

    def of_the_environment():
        act = actor()
        return lambda obs: adapter.action(act(adapter.read(obs)))

    result.actor = of_the_environment
    return result


def evaluate(agent, env, config, actor):
    """Means over eval_episodes episodes, played one after the other -> summary, {}.

    success: at any step; success_last_step; neither if the environment does not tell;
    final_distance: from achieved_goal to desired_goal, NaN if their sizes differ; return: the sum
    of the environment's rewards.
    """
    rng = np.random.default_rng([config.seed, int(agent["step"])])
    acting, results = actor(agent, config), []
    for _ in range(config.eval_episodes):
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        act, over, ever, total = acting(), False, None, 0.0
        while not over:
            obs, reward, terminated, truncated, info = env.step(act(obs))
            total += reward
            success = _success(info)
            if success is not None:
                ever = bool(ever or success)
            over = terminated or truncated
        p, desired = (obs[k].astype(float) for k in ("achieved_goal", "desired_goal"))
        distance = np.linalg.norm(p - desired) if len(desired) == len(p) else np.nan
        results.append({"success": ever, "success_last_step": success, "final_distance": distance,
                        "return": total})
    return {key: float(np.mean([float(x[key]) for x in results])) for key in results[0]
            if all(x[key] is not None for x in results)}, {}


def evaluator(env, config, seed=0):
    """evaluate(act) for `hiql.train` -> {"success"}: the share of config.eval_episodes episodes in
    which info["success"] (or "is_success") was ever true; {"return"} if the environment does not
    tell success: the mean sum of rewards.

    Observations are as in `Border`; act gets the environment's own. The goal of a dict is
    desired_goal, a position (P,): with config.goal_indices it is HIQL's goal; without them that is
    a whole state (d,), the position first, all else, such as velocities, 0. The goal of arrays is
    info["goal"], a whole state; HIQL's is that, or its entries goal_indices. Where the environment
    has numbered tasks (OGBench), they are played in turn. Every evaluation has the same seeds.
    ValueError: what `Border` refuses; an observation that does not hold the position at
    goal_indices, or without them at its beginning; actions in another range than [-1, 1].
    """
    border = Border(env)
    space, tasks = getattr(env, "action_space", None), getattr(border.unwrapped, "task_infos", ())
    for end, high in ((-1, getattr(space, "low", -1)), (1, getattr(space, "high", 1))):
        if not np.allclose(high, end):
            raise ValueError("the environment's actions must be in [-1, 1], as HIQL's are; wrap "
                             "it, such as with gymnasium.wrappers.RescaleAction(env, -1, 1)")
    whole = border.state_goal is not None
    for obs in border.first:
        s, p = obs["observation"], obs["achieved_goal"]
        indices = list(config.goal_indices or range(len(p)))
        if max(indices) >= len(s) or not whole and (
                len(indices) != len(p) or not np.allclose(s[indices], p)):
            raise ValueError(
                f"the entries {', '.join(map(str, indices))} of an observation must be the "
                "position, achieved_goal; choose --goal-indices so that they are, or wrap the "
                "environment so that its observation holds the position, as the data do")

    def evaluate(act):
        results = []
        for episode in range(config.eval_episodes):
            task = {"options": {"task_id": 1 + episode % len(tasks)}} if len(tasks) else {}
            obs, _ = border.reset(seed=seed + 1000 * episode, **task)
            over, ever, total = False, None, 0.0
            while not over:
                s, goal = obs["observation"], obs["desired_goal"]
                if whole:
                    goal = border.state_goal[list(config.goal_indices) or slice(None)]
                elif not config.goal_indices:
                    goal = np.pad(goal, (0, len(s) - len(goal)))
                action = act(s[None], goal[None], border.time)[0]
                obs, reward, terminated, truncated, info = border.step(action)
                total += reward
                success = _success(info)
                if success is not None:
                    ever = bool(ever or success)
                over = terminated or truncated or bool(ever)
            results.append((ever, total))
        success, returns = zip(*results)
        if None in success:
            return {"return": float(np.mean(returns))}
        return {"success": float(np.mean(success))}

    return evaluate
