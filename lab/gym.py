"""HIRO on any environment with Gymnasium's reset and step and a Box of actions.

    import hiro, lab.gym
    config = hiro.resolve({"steps": 100_000, "goal_range": 0})      # 0: measured in the warm-up
    result = lab.gym.train(env, config)                             # arrays: goal=..., position=...
    act = result.actor()                                            # one episode's policy
    action = act(observation)

Observations are dicts of observation, achieved_goal and desired_goal (Gymnasium-Robotics), or
arrays with one goal given. Success is info["success"] or info["is_success"].
"""

import hiro                             # first: it sets one BLAS thread before numpy loads

import numpy as np

from support import online

ENDLESS = 10_000                        # an episode of more steps has no time limit


class GymAdapter:
    """An environment by Gymnasium's calls, seen by the convention of `envs.GoalEnv`.

    Dict observations: the position is achieved_goal, put before observation unless that begins
    with it. Arrays: the position is obs[position] (a slice or indices), put first, and the task's
    goal (D,) is given. Actions are in [-1, 1]^A. ValueError: what the environment lacks.
    """

    def __init__(self, env, goal=None, position=slice(0, 2), endless=ENDLESS):
        self.env, self.position, self.endless, self.time = env, position, endless, 0
        self.goal = None if goal is None else np.asarray(goal, np.float32).ravel()
        space = getattr(env, "action_space", None)
        low, high = (np.asarray(getattr(space, k, np.nan), float) for k in ("low", "high"))
        if low.ndim != 1 or not np.isfinite(low + high).all():
            raise ValueError("the environment needs an action_space with finite vectors low, high "
                             "(a Gymnasium Box)")
        self.centre, self.half_width = (high + low) / 2, (high - low) / 2
        self.action_size = len(low)
        obs = env.reset(seed=0)[0]
        if isinstance(obs, dict) and goal is not None:
            raise ValueError("observations hold a desired_goal; give no goal beside it")
        if not isinstance(obs, dict) and goal is None:
            raise ValueError("observations are arrays without a goal: train(..., goal=...)")
        if isinstance(obs, dict):                       # at rest they might be equal by chance
            moved = env.step(self.action(np.ones(len(low))))[0]
            self.begins = self._begins(obs) and self._begins(moved)

    @staticmethod
    def _begins(obs):
        o, p = (np.ravel(obs[k]) for k in ("observation", "achieved_goal"))
        return len(o) >= len(p) and np.array_equal(o[:len(p)], p)

    def observe(self, obs):
        """An observation as a dict of observation (S,), position first, and both goals."""
        if isinstance(obs, dict):
            s, p, task = (np.ravel(obs[k]) for k in ("observation", "achieved_goal",
                                                     "desired_goal"))
            s = s if self.begins else np.concatenate([p, s])
        else:
            o, task = np.ravel(obs), self.goal
            p = o[self.position]
            s = np.concatenate([p, np.delete(o, self.position)])
        return {"observation": s, "achieved_goal": p, "desired_goal": task}

    def action(self, a):
        """a in [-1,1]^A as an action of the environment, in its dtype."""
        space = self.env.action_space
        return np.clip(self.centre + self.half_width * a, space.low, space.high).astype(
            getattr(space, "dtype", float))

    def reset(self, seed=None, options=None):
        """Gymnasium's reset."""
        self.time = 0
        obs, info = self.env.reset(seed=seed)
        return self.observe(obs), info

    def step(self, a):
        """Gymnasium's step with an action in [-1,1]^A. ValueError: an episode without end."""
        self.time += 1
        if self.time > self.endless:
            raise ValueError(f"an episode did not end in {self.time} steps; the environment needs "
                             "a time limit")
        obs, reward, terminated, truncated, info = self.env.step(self.action(a))
        return self.observe(obs), reward, terminated, truncated, info

    @property
    def unwrapped(self):
        """The environment itself, without wrappers of its own."""
        return getattr(self.env, "unwrapped", self.env)


def train(env, config, *, goal=None, position=slice(0, 2), goal_range=None, run=None,
          program=hiro):
    """Train HIRO on an environment; config: of `hiro.resolve`, its env is ignored.

    goal, position: of `GymAdapter`. goal_range: half-width of the high-level policy's goals, a
    number or (P,); without it and config.goal_range 0 the 95th percentile of the moves in c steps
    of the warm-up. program: hiro or lab.td3. -> namespace with summary (dict), agent, and actor(),
    which returns a new episode's act(observation) -> action of the environment.
    """
    adapter = GymAdapter(env, goal, position, max(config.steps, ENDLESS))
    problem = program.prepare(config, env=adapter, evaluate=evaluate)
    result = program.train(problem, run, goal_range)
    actor = result.actor

    def of_the_environment():
        act = actor()
        return lambda obs: adapter.action(act(adapter.observe(obs)))

    result.actor = of_the_environment
    return result


def evaluate(problem, agent):
    """Success, final distance and return, episode by episode -> summary, {}."""
    config, env, results = problem.config, problem.env, []
    rng = np.random.default_rng([config.seed, int(agent["step"])])
    actor = online.actors(problem, agent, rng)
    for _ in range(config.eval_episodes):
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        act, over, ever, total = actor(), False, False, 0.0
        while not over:
            obs, reward, terminated, truncated, info = env.step(act(obs))
            over, total = terminated or truncated, total + float(reward)
            success = bool(info.get("success", info.get("is_success", False)))
            ever = ever or success
        p, task = (obs[k].astype(np.float32) for k in ("achieved_goal", "desired_goal"))
        distance = np.linalg.norm(p - task) if len(task) == len(p) else np.nan
        results.append((ever, success, distance, total))
    names = "success", "success_last_step", "final_distance", "return"
    return dict(zip(names, np.mean(np.array(results, float), axis=0).tolist())), {}
