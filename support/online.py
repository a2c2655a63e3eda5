"""A run of online, goal-reaching learning in a task: training, evaluation, summary, pictures.

This file knows tasks (`envs.GoalEnv`) but no algorithm. What is learned comes with the problem, a
namespace of
    config env rngs sizes     as `prepare` makes them; sizes: S, P, D, A of state, position, task's
                              goal and action
    agent title               the algorithm's name, and what is trained in words
    init_agent                (problem, rngs) -> tree of arrays; its "step" counts steps
    learn                     (env, agent, config, rngs) -> generator, see `support.run.Run.drive`
    policies                  (agent, config) -> namespace of high(s, D) -> g, low(s, g) -> a,
                              transition(s, g, s1) -> g1 and hierarchical, a bool
    evaluate                  that below, or one for another kind of environment (lab/gym.py)
"""

import dataclasses
import time
from types import SimpleNamespace

import numpy as np

import envs
from support import plots
from support.run import Run, check_checkpoint, generators, minutes, say

NAMES = "init", "episodes", "explore", "batch"
RELABELLING = "relabel_fraction", "relabel_distance", "relabel_gain"


def prepare(config, checkpoint=None, env=None, **parts):
    """The problem of a config: task, sizes and generators; parts: its further entries.

    env: an environment instead of config.env: a GoalEnv, or one with its reset, step, action_size
    and `unwrapped`. checkpoint: a saved agent, to be checked. ValueError: actions are integers, or
    the checkpoint does not fit the config.
    """
    env = env or envs.make_task(config.env)
    if not env.action_size:
        raise ValueError(f"{name_of(env)} has integer actions; online learning needs actions that "
                         "are vectors")
    obs, _ = env.reset(seed=0)
    sizes = (*(obs[k].size for k in ("observation", "achieved_goal", "desired_goal")),
             env.action_size)
    problem = SimpleNamespace(**{"config": config, "env": env, "evaluate": evaluate, "sizes": sizes,
                                 "rngs": generators(config.seed, *NAMES), "train": train, **parts})
    if checkpoint is not None:
        fresh = problem.init_agent(problem, generators(0, *NAMES))
        check_agent(checkpoint, fresh, problem)
    return problem


def check_agent(agent, fresh, problem):
    """ValueError unless a run can go on with a saved agent; see `support.run.check_checkpoint`.

    The goal range, and with it stored goals, are NaN until the warm-up ends, if they are measured.
    """
    config, task, c = problem.config, problem.env, problem.config.subgoal_interval
    limit = getattr(task, "limit", None) or np.inf
    if "early" in agent:                                # see `first_episodes`
        shapes = {"paths": np.zeros((limit + 1, task.begin(np.zeros((1, 2))).shape[1])),
                  "asked": np.zeros((-(-limit // c), len(fresh["goal_range"])), np.float32)}
        fresh["early"] = {name: shapes for name in task.tests(np.random.default_rng(0), 1)}
    check_checkpoint(agent, fresh, NAMES, {"step": config.steps + limit - 1, "replay/length": c},
                     () if config.goal_range else ("goal_range", "replay/goal"))
    replay, goal_range = agent["replay"], agent["goal_range"]
    unmeasured = np.isnan(goal_range).all() and agent["step"] < config.warmup
    if not unmeasured and not ((goal_range > 0).all() and np.isfinite(goal_range).all()
                               and np.isfinite(replay["goal"]).all()):
        raise ValueError("the checkpoint is damaged: goal_range holds numbers that cannot be")
    stored = np.arange(len(replay["length"])) < replay["count"]
    if replay["count"] > agent["step"] or ((replay["length"] > 0) != stored).any():
        raise ValueError("the checkpoint is damaged: its replay does not hold as many windows as "
                         "it counts")


def read(obs):
    """State s (S,), position first, and the task's goal D (D,) of an observation, float32."""
    return obs["observation"].astype(np.float32), obs["desired_goal"].astype(np.float32)


def begin_episode(env, rngs, agent):
    """Reset -> state (S,), the task's goal (D,), the goals' noise to begin with, N(0, 1) (P,)."""
    obs, _ = env.reset(seed=int(rngs["episodes"].integers(2**31)))
    return *read(obs), rngs["explore"].normal(size=len(agent["goal_range"]))


def train(problem, run=None, goal_range=None):
    """Train; evaluate and save at the first episode's end after each eval_interval steps; at the
    end draw and summarise.

    run: a `support.run.Run`; without one nothing is written. goal_range: half-width of the
    high-level policy's goals, a number or (P,), instead of config.goal_range; ValueError unless it
    is positive. -> namespace with summary, agent and actor(), which returns a new episode's
    act(observation) -> action.
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
        if step < config.warmup:                        # the goal range may not be measured yet
            return None
        summary, episodes = problem.evaluate(problem, agent)
        if episodes and "early" not in agent and step > config.warmup + config.subgoal_interval:
            agent["early"] = first_episodes(episodes)
        shown.update(episodes)
        return summary

    if not run.checkpoint:
        say(f"{name_of(env)}, seed {config.seed}: {problem.title}; {config.steps:,} "
            f"environment steps{estimate(problem)}")
    last = run.drive(problem.learn(env, agent, config, rngs), agent, rngs, config.steps,
                     evaluation, config.eval_interval, 500)
    last = last or evaluation()                         # resumed after the last step
    summary = summarise(problem, run, last, int(agent["step"]))
    run.finish(summary, lambda: draw(problem, agent, run, shown))
    return SimpleNamespace(summary=summary, agent=agent, actor=actors(problem, agent))


def name_of(env):
    """The task's name, or the class of an environment from elsewhere."""
    return env.name if isinstance(env, envs.GoalEnv) else type(env.unwrapped).__name__


def estimate(problem):
    """How long training takes, such as ", about 3 minutes", from six windows of an agent that is
    then discarded; "" for environments other than GoalEnv."""
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
    """The content of summary.json: `last`, which is of `evaluate`, and what identifies the run.

    relabel_...: means of the last 20 logged rows. ..._curve: one number for each evaluation, of
    relabel_... the mean since the evaluation before. first_success: the first step with an
    evaluated success of at least 0.95, or None. success_lowest_late: the lowest success of the
    evaluations in the last 10,000 steps. episodes: of each test."""
    tests, config = run.logs["eval"], problem.config
    logged = [r for r in run.logs["train"] if r.get("relabel_fraction", "") != ""]
    solved = [int(row["step"]) for row in tests if float(row["success"]) >= 0.95]
    late = [float(row["success"]) for row in tests if int(row["step"]) >= step - 10_000]
    curves = {f"{key}_curve": [round(float(row[key]), 3) for row in tests]
              for key in last if key == "success" or key.startswith("subgoal_error")}
    means = {}
    if logged:
        ends, steps = ([int(row["step"]) for row in rows] for rows in (tests, logged))
        part = np.searchsorted(ends, steps)         # of each row the next evaluation's index
        for key in RELABELLING:
            x = np.array([float(row[key]) for row in logged])
            means[key] = float(x[-20:].mean())
            curves[f"{key}_curve"] = [round(float(x[part == i].mean()), 3) if (part == i).any()
                                      else None for i in range(len(tests))]
    return {"env": name_of(problem.env), "agent": problem.agent, "seed": config.seed,
            "env_steps": step, **last, **means, "first_success": solved[0] if solved else None,
            "success_lowest_late": min(late), **curves, "episodes": config.eval_episodes,
            "train_seconds": round(run.seconds(), 1)}


def evaluate_checkpoint(problem, agent):
    """The evaluation of a saved agent, with the starts and goals of its step in training.

    ValueError: it is still in its warm-up."""
    config, step = problem.config, int(agent["step"])
    if step < config.warmup:
        raise ValueError("the run was stopped in its warm-up; there is nothing to evaluate yet")
    return {"env": config.env, "agent": problem.agent, "seed": config.seed, "env_steps": step,
            **problem.evaluate(problem, agent)[0]}


# -------------------------------------------------------------------------------- evaluation


def evaluation_action(a, rng, config):
    """The action taken in evaluation: the policy's a; with eval_noise > 0 plus Gaussian noise of
    that std, clipped to [-1, 1]."""
    if not config.eval_noise:
        return a
    return np.clip(a + config.eval_noise * rng.normal(size=a.shape), -1, 1)


def rollout(task, acting, starts, goals, rng, config):
    """N episodes of a task side by side, to the time limit; acting: the problem's `policies`.

    starts (N,2), goals (N,D) -> distances to the goal after each step (T,N), the task's states
    (T+1,N,...), and the subgoals as places, position + goal, (T/c rounded up, N, P), c =
    subgoal_interval.
    """
    s = task.begin(starts)
    distance, paths, asked = [], [s], []
    for t in range(task.limit):
        now = task.observe(s).astype(np.float32)
        if t % config.subgoal_interval == 0:
            g = acting.high(now, goals.astype(np.float32))
            asked.append(now[:, :g.shape[1]] + g)
        s = task.move(s, evaluation_action(acting.low(now, g).astype(float), rng, config))
        g = acting.transition(now, g, s.astype(np.float32))
        paths.append(s)
        distance.append(task.distance(s, goals))
    return np.array(distance), np.array(paths), np.array(asked)


def evaluate(problem, agent):
    """Success of the current policies -> summary, {test: (paths, asked, goals, success)}.

    Shapes for N = eval_episodes as in `rollout`; success (N,): reached at any step. The first test
    gives success, success_last_step and final_distance, each other test success_<name>.
    subgoal_error: the mean of `subgoal_errors` over all tests; subgoal_error_<name>: over one.
    Starts, goals and all that is random depend only on the seed and on the steps so far.
    """
    config, task, summary, episodes = problem.config, problem.env, {}, {}
    n, rng = config.eval_episodes, np.random.default_rng([config.seed, int(agent["step"])])
    task.rng = rng                                      # of moves, where they are random
    tests = task.tests(rng, n)
    starts, goals = (np.concatenate(x) for x in zip(*tests.values()))
    acting = problem.policies(agent, config)
    distance, paths, asked = rollout(task, acting, starts, goals, rng, config)
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


def actors(problem, agent, rng=None):
    """actor(): each call gives an act(observation) -> action in [-1, 1]^A for one episode, which
    acts as in evaluation. rng: of the noise of actions (eval_noise), shared by all episodes;
    without it one from the config's seed.
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
    """{test: {"paths" (T+1,2), "asked" (subgoals,2)}} of the first episode of each test."""
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
