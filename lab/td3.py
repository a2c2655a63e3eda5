"""TD3 without hierarchy on HIRO's tasks, to compare: one policy of [s; D] on the task's reward.

    python -m lab.td3               on point-umaze; takes the flags of hiro.py, of which
                                    `low_...` are the settings of the only level
    python -m lab.td3 --env grid-fourrooms

s is the state, D the episode's goal. A run takes about a minute on point-umaze; it leaves logs,
checkpoint, summary and pictures in runs/. Episodes, replay and the number of updates are those of
HIRO's low level [E18].
"""

import hiro                             # first: it sets one BLAS thread before numpy loads

from types import SimpleNamespace

import numpy as np

import envs
from hiro import (Config, draw_steps, explore_window, name_of, read, replay_add, schedule,
                  td3_update)
from support.flags import parse, refuse_unused
from support.runs import (Program, as_run, generators, one_line_errors, open_run, run_seeds, say,
                          show)

OF_THE_HIERARCHY = ("correction", "goal_range", "high_discount", "high_noise", "noise_correlation",
                    "high_updates")
PROGRAM = Program("-m lab.td3", Config, "step", ("low/online/actor", "goal_range", "step"),
                  hiro.DEPARTED)


def resolve(given):
    """A whole Config, as `hiro.resolve`. ValueError also: changed settings OF_THE_HIERARCHY."""
    changes = {"low_discount": Config.high_discount, "low_noise": 0.3}                  # [E18]
    config = hiro.resolve(given, changes=changes)
    plain = hiro.resolve({"env": config.env}, changes=changes)
    refuse_unused(config, plain, dict.fromkeys(OF_THE_HIERARCHY, "lab.td3, it has no hierarchy"))
    return config


def sample(replay, rng, config):
    """Steps drawn uniformly: [s; D], a, r, [s'; D], m; r is the task's reward times reward_scale.

    Shapes as in `hiro.td3_target`; m is 0 after a true termination, else 1.
    """
    w, i, last = draw_steps(replay, rng, config.batch_size, config.subgoal_interval)
    s, s1 = replay["states"][w, i], replay["states"][w, i + 1]
    desired = replay["desired_goal"][w]
    return {"observations": np.concatenate([s, desired], -1), "actions": replay["actions"][w, i],
            "rewards": np.float32(config.reward_scale) * replay["rewards"][w, i],
            "masks": np.where(last, replay["mask"][w], np.float32(1)),
            "next_observations": np.concatenate([s1, desired], -1)}


class Actor(hiro.Actor):
    """The policy as a low level: its goal is the episode's and stays the same."""

    hierarchical = False

    def high(self, s, desired):
        return desired

    def transition(self, s, g, s1):
        return g


@np.errstate(over="ignore", invalid="ignore")           # run.step refuses what is not finite
def train(env, config, run=None, *, evaluate=hiro.evaluate):
    """A whole run: act for c steps, store, update once for each step. Arguments, result and errors
    as of `hiro.train`."""
    run, env = as_run(run, PROGRAM, config), env or envs.make_task(config.env)
    say(f"{name_of(env)}, seed {config.seed}: td3, one policy without hierarchy; "
        f"{config.steps:,} environment steps")
    rngs = generators(config.seed, "init", "episodes", "explore", "batch")
    (S, _, D, A), c = hiro.sizes_of(env), config.subgoal_interval
    agent = {"low": hiro.td3_init(rngs["init"], S + D, A, config),
             "replay": hiro.replay_init(config.capacity // c, c, S, D, D, A),
             "goal_range": np.ones(D, np.float32),              # of hiro.Actor; no effect here
             "step": np.zeros((), np.int64)}
    run.begin(agent, rngs, config.steps, config.warmup)     # one to go on with gets its agent

    level, replay, acting = agent["low"], agent["replay"], Actor(agent, config)
    explore, rng, every = rngs["explore"], rngs["batch"], config.eval_interval
    step = int(agent["step"])
    while step < config.steps:
        s, desired = read(env.reset(seed=int(rngs["episodes"].integers(2**31)))[0])
        explore.normal(size=len(desired))       # hiro's goal noise: keeps the numbers of old runs
        begun, over = step, False
        while not over:                                     # a window
            warm, row = step < config.warmup, {}
            window, desired, over, terminated = explore_window(env, s, desired, desired, acting,
                                                               warm, explore, config)
            replay_add(replay, window, terminated)
            s = window["states"][-1]
            step += len(window["actions"])
            agent["step"][...] = step
            if step >= config.warmup:
                rate = schedule(step, config)
                for _ in window["actions"]:
                    batch = sample(replay, rng, config)
                    row["low_loss"] = td3_update(level, batch, rng, config.low_discount, rate,
                                                 config)
            run.step(step, row)
        due = begun // every < step // every and step < config.steps
        if due and step >= config.warmup:
            run.evaluated(step, evaluate(agent, env, config, Actor)[0])
        if due or run.stopped:
            run.save(agent, rngs)
    return finish(run, agent, rngs, env, config, Actor, "td3", evaluate)


def finish(run, agent, rngs, env, config, actor, title, evaluate=hiro.evaluate):
    """The end of a run: evaluation, checkpoint, pictures, summary -> result as of `hiro.train`."""
    step = int(agent["step"])
    found, episodes = evaluate(agent, env, config, actor)
    run.evaluated(step, found)
    run.save(agent, rngs)
    if run.folder:
        hiro.draw(run, env, config, actor(agent, config), episodes)
    summary = {"env": name_of(env), "agent": title, "seed": config.seed, "env_steps": step, **found,
               **hiro.summarise(run.logs, step), "episodes": config.eval_episodes,
               "train_seconds": round(run.seconds(), 1)}
    run.finish(summary)
    return SimpleNamespace(summary=summary, agent=agent,
                           actor=actor(agent, config, env.eval_noise))


def main():
    given, call = parse(PROGRAM, __doc__, hiro.WORDS)
    with one_line_errors():
        if call.eval:
            return show(hiro.evaluate_saved(call.eval, PROGRAM, Actor))
        config = resolve(given)
        if call.seeds:
            return run_seeds(PROGRAM, call, given, config)
        with open_run(PROGRAM, call, config) as run:
            train(None, run.config, run)


if __name__ == "__main__":
    main()
