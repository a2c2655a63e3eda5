"""A run of online, goal-reaching learning in a task: training, evaluation, summary, pictures.

Knows tasks (`envs.GoalEnv`), no algorithm: what is learned comes with the problem, a namespace of
    config env rngs sizes     as `prepare` makes them; sizes: S, P, D, A of state, position, task's
                              goal and action
    agent title               its name, and what is trained in words
    init_agent                (problem, rngs) -> tree of arrays; "step" counts
    learn                     (env, agent, config, rngs) -> generator, see `support.run.Run.drive`
    policies                  (agent, config) -> namespace of high(s, D) -> g, low(s, g) -> a,
                              transition(s, g, s1) -> g1 and hierarchical, a bool
    evaluate                  as below, or what another kind of environment puts in its place
"""

import dataclasses
import time
from types import SimpleNamespace

import numpy as np

import envs
from support import plots
from support.run import Run, generators, minutes, same_shapes

NAMES = "init", "episodes", "explore", "batch"
RELABELLING = "relabel_fraction", "relabel_distance", "relabel_gain"


def prepare(config, checkpoint=None, env=None, **parts):
    """The problem of a config with the parts given; env: a task instead of config.env.

    ValueError: a checkpoint (a saved agent) that does not fit.
    """
    env = env or envs.make_task(config.env)
    if not env.action_size:
        raise ValueError(f"{name_of(env)} has integer actions; online learning needs vectors")
    obs, _ = env.reset(seed=0)
    sizes = (*(obs[k].size for k in ("observation", "achieved_goal", "desired_goal")),
             env.action_size)
    problem = SimpleNamespace(**{"config": config, "env": env, "evaluate": evaluate, "sizes": sizes,
                                 "rngs": generators(config.seed, *NAMES), **parts})
    if checkpoint is not None:
        fresh = problem.init_agent(problem, generators(0, *NAMES))
        if not same_shapes(checkpoint, fresh):
            raise ValueError("the checkpoint does not fit its config.json")
    return problem


def read(obs):
    """State s (S,), position first, and the task's goal D (D,) of an observation, float32."""
    return obs["observation"].astype(np.float32), obs["desired_goal"].astype(np.float32)


def begin_episode(env, rngs, agent):
    """Reset -> state (S,), the task's goal (D,), the first noise of goals (P,)."""
    obs, _ = env.reset(seed=int(rngs["episodes"].integers(2**31)))
    return *read(obs), rngs["explore"].normal(size=len(agent["goal_range"]))


def train(problem, run=None, goal_range=None):
    """Train; evaluate and save after the episodes that pass eval_interval steps; at the end
    summary and pictures.

    run: a `support.run.Run`; without one nothing is written. goal_range: half-width of the
    high-level policy's goals, a number or (P,), instead of config.goal_range. -> namespace with
    summary, agent and actor(), which returns a new episode's act(observation) -> action.
    """
    config, env, rngs, shown = problem.config, problem.env, problem.rngs, {}
    run = run or Run(None, config, counter="step")
    agent = problem.init_agent(problem, rngs)
    if goal_range is not None:
        agent["goal_range"][:] = goal_range
        if not (agent["goal_range"] > 0).all():
            raise ValueError(f"goal_range must be positive, not {goal_range}")
    run.restore(agent, rngs)

    def evaluation():
        step = int(agent["step"])
        if step < config.warmup:                        # goals may have no range yet
            return None
        summary, episodes = problem.evaluate(problem, agent)
        if episodes and "early" not in agent and step > config.warmup + config.subgoal_interval:
            agent["early"] = first_episodes(episodes)
        shown.update(episodes)
        return summary

    if not run.checkpoint:
        print(f"{name_of(env)}, seed {config.seed}: {problem.title}; {config.steps:,} "
              f"environment steps{estimate(problem)}", flush=True)
    last = run.drive(problem.learn(env, agent, config, rngs), agent, rngs, config.steps,
                     evaluation, config.eval_interval, 500)
    last = last or evaluation()                         # resumed when only pictures lacked
    if run.folder:
        draw(problem, agent, run, shown)
    summary = summarise(problem, run, last, int(agent["step"]))
    run.finish(summary)
    return SimpleNamespace(summary=summary, agent=agent, actor=actors(problem, agent))


def name_of(env):
    """The task's name, or the class of an environment from elsewhere."""
    return env.name if isinstance(env, envs.GoalEnv) else type(env.unwrapped).__name__


def estimate(problem):
    """", about 3 minutes", from a few windows of a throw-away agent; "" for other environments."""
    c = problem.config.subgoal_interval
    if not isinstance(problem.env, envs.GoalEnv):
        return ""
    config = dataclasses.replace(problem.config, warmup=c, pretrain=0, steps=6 * c, actor_lr=1e-6,
                                 critic_lr=1e-6, capacity=100 * c, goal_range=1.0)
    trial = SimpleNamespace(**{**vars(problem), "config": config})
    rngs, times = generators(0, *NAMES), []
    agent = problem.init_agent(trial, rngs)
    for _ in problem.learn(problem.env, agent, config, rngs):
        times.append(time.perf_counter())
        if len(times) == 6:
            break
    return f", {minutes(problem.config.steps / c * np.median(np.diff(times[1:])))}"


def summarise(problem, run, last, step):
    """The keys of summary.json around those of `evaluate`: what relabelling did at the end, and
    curves over training, a number for each evaluation (relabelling's: the mean before it)."""
    tests, config = run.logs["eval"], problem.config
    logged = [r for r in run.logs["train"] if r.get("relabel_fraction", "") != ""]
    solved = [int(row["step"]) for row in tests if float(row["success"]) >= 0.95]
    curves = {f"{key}_curve": [round(float(row[key]), 3) for row in tests]
              for key in last if key == "success" or key.startswith("subgoal_error")}
    means = {}
    if logged:
        ends, steps = ([int(row["step"]) for row in rows] for rows in (tests, logged))
        part = np.searchsorted(ends, steps)                     # before which evaluation
        for key in RELABELLING:
            x = np.array([float(row[key]) for row in logged])
            means[key] = float(x[-20:].mean())
            curves[f"{key}_curve"] = [round(float(x[part == i].mean()), 3) if (part == i).any()
                                      else None for i in range(len(tests))]
    return {"env": name_of(problem.env), "agent": problem.agent, "seed": config.seed,
            "env_steps": step, **last, **means, "first_success": solved[0] if solved else None,
            **curves, "episodes": config.eval_episodes,
            "train_seconds": round(run.seconds(), 1)}


def evaluate_checkpoint(problem, agent):
    """The success of a saved run, starts and goals drawn for the step of its checkpoint."""
    config, step = problem.config, int(agent["step"])
    if step < config.warmup:
        raise ValueError("the run was stopped in its warm-up; there is nothing to evaluate yet")
    return {"env": config.env, "agent": problem.agent, "seed": config.seed, "env_steps": step,
            **problem.evaluate(problem, agent)[0]}


# -------------------------------------------------------------------------------- evaluation


def evaluation_action(a, rng, config):
    """The action taken in evaluation: the policy's own, or with noise of eval_noise, clipped."""
    if not config.eval_noise:
        return a
    return np.clip(a + config.eval_noise * rng.normal(size=a.shape), -1, 1)


def rollout(task, acting, starts, goals, rng, config):
    """N episodes of a task side by side, to the time limit.

    starts, goals (N,2) -> distances to the goal (T,N), positions (T+1,N,2), and the places that
    the high-level policy asked for (T/c,N,2).
    """
    s, distance, paths, asked = starts, [], [starts], []
    for t in range(task.limit):
        now = task.observe(s).astype(np.float32)
        if t % config.subgoal_interval == 0:
            g = acting.high(now, goals.astype(np.float32))
            asked.append(now[:, :2] + g)
        s = task.move(s, evaluation_action(acting.low(now, g).astype(float), rng, config))
        g = acting.transition(now, g, s.astype(np.float32))
        paths.append(s)
        distance.append(task.distance(s, goals))
    return np.array(distance), np.array(paths), np.array(asked)


def evaluate(problem, agent):
    """Success of the current policies -> summary, {test: (paths, asked, goals, success)}.

    The first test gives success, success_last_step and final_distance, each other one its own
    success_<name>; subgoal_error is the mean of `subgoal_errors`, of all tests and of each. Starts
    and goals depend on the seed and on the steps so far alone.
    """
    config, task, summary, episodes = problem.config, problem.env, {}, {}
    n, errors = config.eval_episodes, {}
    rng = np.random.default_rng([config.seed, int(agent["step"])])
    tests = task.tests(rng, n)
    starts, goals = (np.concatenate(x) for x in zip(*tests.values()))
    acting = problem.policies(agent, config)
    distance, paths, asked = rollout(task, acting, starts, goals, rng, config)
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
        errors[f"subgoal_error_{name}"] = subgoal_errors(
            paths[:, mine], asked[:, mine], config.subgoal_interval).mean()
    if acting.hierarchical:
        summary["subgoal_error"] = subgoal_errors(paths, asked, config.subgoal_interval).mean()
        summary.update(errors if len(tests) > 1 else {})
    return {k: float(x) for k, x in summary.items()}, episodes


def subgoal_errors(paths, asked, c):
    """How far the agent ends from the place it was sent to: (T/c, N), whole windows of c steps.

    paths (T+1,N,2), asked (T/c,N,2). Nothing in HIRO makes goals places within reach.
    """
    reached = paths[c::c]
    return np.sqrt(((reached - asked[:len(reached)]) ** 2).sum(-1))


def actors(problem, agent, rng=None):
    """actor() -> act(observation) -> action in [-1, 1]^A, for one episode, as in evaluation.

    rng: of the noise of actions in all episodes; without it one of the config's seed.
    """
    config, acting = problem.config, problem.policies(agent, problem.config)
    rng = rng or np.random.default_rng(config.seed)

    def actor():
        memory = {"t": 0}

        def act(obs):
            s, task = (x[None] for x in read(obs))
            g = (acting.high(s, task) if memory["t"] % config.subgoal_interval == 0 else
                 acting.transition(memory["s"], memory["g"], s))
            memory.update(t=memory["t"] + 1, s=s, g=g)
            return evaluation_action(acting.low(s, g)[0], rng, config)

        return act

    return actor


# ---------------------------------------------------------------------------------- pictures


def first_episodes(episodes):
    """{test: paths and places asked for} of the first episode of each test."""
    return {name: {"paths": e[0][:, 0], "asked": e[1][:, 0]} for name, e in episodes.items()}


def draw(problem, agent, run, episodes):
    """The pictures of a run: learning curve, relabelling over training, episodes early and late."""
    config = problem.config
    plots.draw_curve(run.path("curve.png"), run.logs, run.counter)
    if any(row.get("relabel_fraction", "") != "" for row in run.logs["train"]):
        plots.draw_correction(run.path("correction.png"), run.logs)
    if episodes:
        rows = {"early in training": agent["early"]} if "early" in agent else {}
        rows["end of training"] = first_episodes(episodes)
        arrows = problem.policies(agent, config).hierarchical
        plots.draw_episodes(run.path("episodes.png"), problem.env, rows,
                            {name: e[2] for name, e in episodes.items()},
                            config.subgoal_interval if arrows else None)
