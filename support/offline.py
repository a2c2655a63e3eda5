"""A run of offline, goal-conditioned learning: data, training, evaluation, summary.

This file knows mazes and data sets but no algorithm. What is learned comes with the problem, a
namespace of
    config env data rngs      as `prepare` makes them
    sample                    (data, rng, config) -> batch {name: array (B, ...)}
    losses                    {name: loss(params, batch, config)}; where there is a value, "value"
                              is the first name
    actors                    {name: actor(params, config, rng) -> act(s (N,d), g (N,G), t)}; the
                              first is the agent, others are evaluated beside it
    init_params               (config, env, data, rngs) -> tree of arrays
    learn                     (problem, agent, rng) -> generator, see `support.run.Run.drive`
    evaluate, draw, train     those below, or an algorithm's own
    title                     what is trained, in words
"""

import time
import zlib
from functools import partial
from types import SimpleNamespace

import numpy as np

import envs
from nets import adam_init
from support import datasets, plots
from support.flags import text_of
from support.run import Run, check_checkpoint, generators, minutes, say


def prepare(config, checkpoint=None, data=None, evaluate=None, **parts):
    """The problem of a config: environment, data and generators; parts: its further entries.

    checkpoint: a saved agent, to be checked. data: a Dataset in place of the config's. evaluate:
    act -> {name: number} in place of the maze's evaluation, see `evaluate_by`. ValueError: data
    that are not of this environment, are too short for subgoal_steps or lose all actions by
    action_free; a checkpoint that does not fit the config or was trained on other data.
    """
    env = envs.make(config.env)
    rngs = generators(config.seed, "data", "hide", "init", "flat", "batch")
    if not (data is None or isinstance(data, envs.Dataset)):
        raise ValueError("data must be an envs.Dataset(observations, actions, terminals), not "
                         f"{type(data).__name__}")
    if data is None:
        data = datasets.load_dataset(config.dataset) if config.dataset else env.dataset(
            rngs["data"])
    if config.env == "none":
        data = env.describe(data, config.subgoal_steps, config.dataset or "the data set")
        config.discrete = env.discrete
        parts["actors"] = {name: partial(in_the_datas_units, actor, env)
                           for name, actor in parts["actors"].items()}
        if max(config.goal_indices, default=0) >= data.observations.shape[1]:
            raise ValueError(f"--goal-indices {text_of(config.goal_indices)} go beyond the "
                             f"{data.observations.shape[1]} entries of an observation")
        if config.temperature and not env.discrete:
            raise ValueError("--temperature is for discrete actions")
    else:
        datasets.check_dataset(data, env, config.dataset or f"the data of {env.name}")
    if config.subgoal_steps >= data.lengths.max() - 1:
        raise ValueError(f"--subgoal-steps {config.subgoal_steps} must be below the "
                         f"{data.lengths.max() - 1} transitions of the longest trajectory")
    hide_actions(data, config.action_free, rngs["hide"])
    evaluation = evaluate_maze if config.env != "none" and not evaluate else partial(
        evaluate_by, evaluate)
    problem = SimpleNamespace(**{"config": config, "env": env, "data": data, "rngs": rngs,
                                 "evaluate": evaluation, "draw": draw, "train": train, **parts})
    if checkpoint is not None:
        fresh = init_agent(problem, generators(config.seed, "init", "flat"))
        if "data" in checkpoint and not np.array_equal(checkpoint["data"], fresh["data"]):
            raise ValueError("the data are not those of the run; their file, or what collects "
                             "them, has changed")
        check_checkpoint(checkpoint, fresh, rngs,
                         {"update": config.steps + config.policy_steps})
    return problem


def in_the_datas_units(actor, env, params, config, rng):
    """An actor whose act takes states and goals as the data have them, of an `envs.DataAlone`."""
    act = actor(params, config, rng)
    return lambda s, g, t: act(env.standardise(s), env.standardise(g, config.goal_indices), t)


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


def init_agent(problem, rngs):
    """A new agent, one tree of arrays: params, optimiser, update (how many were made), data (their
    checksum)."""
    data, checksum = problem.data, 0
    for x in (data.observations, data.actions, data.terminals):
        checksum = zlib.crc32(x.tobytes(), checksum)
    params = problem.init_params(problem.config, problem.env, data, rngs)
    return {"params": params, "optimiser": init_optimiser(params),
            "update": np.zeros((), np.int64), "data": np.array(checksum)}


def init_optimiser(params):
    """Adam's state for all networks but the target, which no loss changes."""
    return adam_init({name: p for name, p in params.items() if name != "target"})


def train(problem, run=None):
    """Train; every eval_interval updates evaluate and save; at the end draw and summarise.

    run: a `support.run.Run`; without one nothing is written. -> namespace with summary, agent and
    act(s (N,d), g (N,G), t) -> actions, t the step of the episode.
    """
    config, rngs, shown = problem.config, problem.rngs, {}
    run = run or Run(None, config)
    agent, total = init_agent(problem, rngs), config.steps + config.policy_steps
    run.restore(agent, rngs)

    def evaluation():
        if no_policy_yet(problem, agent):
            return None
        summary, episodes = problem.evaluate(problem, agent)
        shown.update(episodes)
        return summary

    if not run.checkpoint:
        say(f"{config.env}, seed {config.seed}: {problem.title}; {total:,} updates of "
            f"{config.batch_size} of {len(problem.data.valid):,} transitions, "
            f"{minutes(estimate(problem, agent))}")
    last = run.drive(problem.learn(problem, agent, rngs["batch"]), agent, rngs, total, evaluation,
                     config.eval_interval, min(100, config.eval_interval))
    last = last or evaluation()                         # resumed after the last update
    summary = summarise(problem, agent, last, run.seconds())
    run.finish(summary, lambda: problem.draw(problem, agent, run, shown))
    return SimpleNamespace(summary=summary, agent=agent, act=agent_actor(problem, agent))


def agent_actor(problem, agent):
    """act(s (N,d), g (N,G), t) of the agent; what it draws at random is drawn from seed 0."""
    actor = next(iter(problem.actors.values()))
    return actor(agent["params"], problem.config, np.random.default_rng(0))


def no_policy_yet(problem, agent):
    """Whether the value comes first (policy_steps > 0) and the policies have not begun to learn."""
    config = problem.config
    return bool("value" in problem.losses and config.policy_steps
                and int(agent["update"]) <= config.steps)


def estimate(problem, agent):
    """Seconds that training will take, from the time of each loss; the agent is not changed."""
    config, seconds = problem.config, {}
    batch = problem.sample(problem.data, np.random.default_rng(0), config)
    for name, loss in problem.losses.items():
        for _ in range(2):                              # the first one warms up
            start = time.perf_counter()
            loss(agent["params"], batch, config)
        seconds[name] = 1.2 * (time.perf_counter() - start)     # sampling and Adam: a fifth more
    policies = sum(seconds.values()) - seconds.get("value", 0)
    together = 0 if config.policy_steps else policies
    return config.steps * (seconds.get("value", 0) + together) + config.policy_steps * policies


def summarise(problem, agent, last, seconds):
    """The content of summary.json: `last`, which is of `evaluate`, and what identifies the run.

    episodes: of all tasks together; train_seconds: `seconds`, rounded; data: their checksum."""
    config, tasks = problem.config, problem.env.tasks
    return {"env": config.env, "agent": next(iter(problem.actors)), "seed": config.seed,
            "updates": int(agent["update"]), **last,
            **({"episodes": config.eval_episodes * len(tasks)} if tasks else {}),
            "train_seconds": round(seconds, 1), "data": f"{int(agent['data']):08x}"}


def evaluate_checkpoint(problem, agent):
    """The summary of a saved agent, with the starts and goals of its evaluation in training.

    ValueError: it has no policy yet, or nothing to be evaluated in."""
    if no_policy_yet(problem, agent):
        raise ValueError(f"the run was stopped after {int(agent['update'])} updates, before its "
                         "policies began; there is nothing to evaluate yet")
    found, _ = problem.evaluate(problem, agent)
    if not found:
        raise ValueError("a run on data alone has no environment to be evaluated in; from Python, "
                         "hiql.load(FOLDER) gives its act")
    return summarise(problem, agent, found, float(agent["seconds"]))


# ----------------------------------------------------------------------------- evaluation


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
        steps[arrived], success = t + 1, success | arrived
        if (success | (t + 1 >= limits)).all():
            break
    return success, steps, np.array(paths)


def evaluate_actor(problem, params, actor, at):
    """Success of one actor on the maze's tasks and on 200 random pairs (see `pair_distance`).

    Starts and goals depend only on the seed and on `at`, the number of updates: evaluation does
    not use the generators of training. -> summary, where mean_steps is of the tasks, failures
    included, and episodes of the tasks: paths (T+1, tasks, N, 2), goals (tasks, N, 2), success
    (tasks, N).
    """
    config, env = problem.config, problem.env
    rng = np.random.default_rng([config.seed, at])
    tasks = np.array(env.tasks).repeat(config.eval_episodes, axis=0)    # (tasks N, 2, 2) cells
    pairs = env.random_pairs(rng, 200, min(env.pair_distance, env.distance.max()))
    starts, goals = (env.place(np.concatenate([tasks[:, i], pairs[i]]), rng) for i in (0, 1))
    success, steps, paths = rollout(env, actor(params, config, rng), starts, goals, rng)
    n = len(tasks)
    by_task = success[:n].reshape(len(env.tasks), -1)
    summary = {"success": float(by_task.mean()), "success_per_task": by_task.mean(1).tolist(),
               "success_worst_task": float(by_task.mean(1).min()),
               "success_random": float(success[n:].mean()), "mean_steps": float(steps[:n].mean())}
    return summary, (paths[:, :n].reshape(len(paths), len(env.tasks), -1, 2),
                     goals[:n].reshape(len(env.tasks), -1, 2), by_task)


def evaluate_by(evaluate, problem, agent):
    """evaluate(act) of the agent and of the flat policy trained beside it, if there is one (its
    keys begin with flat_) -> summary, {}; without a function {}, {}."""
    summary = {}
    for name, actor in problem.actors.items() if evaluate else ():
        found = evaluate(actor(agent["params"], problem.config, np.random.default_rng(0)))
        if not isinstance(found, dict):
            raise ValueError("evaluate(act) must return {name: number}, not "
                             f"{type(found).__name__}")
        summary.update({f"flat_{key}" if summary else key: x for key, x in found.items()})
    return summary, {}


def evaluate_maze(problem, agent):
    """`evaluate_actor` of the agent and of the flat policy trained beside it, if there is one
    (its keys begin with flat_) -> summary, {name: episodes}."""
    summary, shown, at = {}, {}, int(agent["update"])
    for name, actor in problem.actors.items():
        new, shown[name] = evaluate_actor(problem, agent["params"], actor, at)
        summary.update({f"flat_{key}": new[key] for key in (
            "success", "success_random", "success_per_task")} if summary else new)
    return summary, shown


def draw(problem, agent, run, shown):
    """Trajectories of all actors, and the learning curve."""
    if shown:
        plots.draw_trajectories(run.path("trajectories.png"), problem.env, shown)
    plots.draw_curve(run.path("curve.png"), run.logs, run.counter)
