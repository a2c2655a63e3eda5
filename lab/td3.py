"""TD3 without hierarchy on HIRO's tasks, to compare: one policy of [s; D] on the task's reward.

    python -m lab.td3               on point-umaze; takes the flags of hiro.py, see `Config`
    python -m lab.td3 --env grid-fourrooms

s is the state, D the task's goal. A run takes about a minute on point-umaze; it leaves logs,
checkpoint, summary and pictures in runs/.

Deviation E18: discount 0.99, exploration noise 0.3 (on the grid 0.5), the rest as HIRO's low level;
not tuned. Episodes, replay and the number of updates are those of HIRO's low level. In the warm-up
one action is held for c steps, as in hiro.py.
"""

import hiro                             # first: it sets one BLAS thread before numpy loads

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from support import online
from support.flags import flag_of
from support.run import main

COUNTER = "step"
OF_THE_HIERARCHY = ("correction", "candidates", "goal_at_window_end", "relabel_low_goals",
                    "pretrain", "see_position", "goal_range", "high_discount", "high_noise",
                    "noise_correlation", "high_updates")


@dataclass
class Config(hiro.Config):
    """hiro's config; `low_...` are the settings of the only level.

    Settings OF_THE_HIERARCHY have no meaning here and must keep hiro's defaults.
    """


def resolve(given):
    """A whole Config, as `hiro.resolve`. ValueError also: changed settings OF_THE_HIERARCHY."""
    changes = {"low_discount": Config.high_discount, "low_noise": 0.3}          # [E18]
    config = hiro.resolve(given, Config, changes)
    meant = hiro.resolve({"env": config.env}, Config, changes)
    for name in OF_THE_HIERARCHY:
        if getattr(config, name) != getattr(meant, name):
            raise ValueError(f"{flag_of(name)} is for hiro.py; td3 has no hierarchy")
    return config


def sample(replay, rng, config):
    """Steps drawn uniformly: [s; D], a, r, [s'; D], m; r is the task's reward times reward_scale.

    Shapes as in `hiro.td3_target`; m is 0 after a true termination, else 1.
    """
    w, i, last = hiro.draw_steps(replay, rng, config.batch_size, config.subgoal_interval)
    s, s1, task = replay["states"][w, i], replay["states"][w, i + 1], replay["task"][w]
    return {"observations": np.concatenate([s, task], -1), "actions": replay["actions"][w, i],
            "rewards": np.float32(config.reward_scale) * replay["rewards"][w, i],
            "masks": np.where(last, replay["mask"][w], np.float32(1)),
            "next_observations": np.concatenate([s1, task], -1)}


def policies(agent, config):
    """The policy as the low level of `hiro.policies`: its goal is the task's and stays the same."""
    def low(s, task):
        x = np.concatenate([s, task], -1)
        return hiro.policy(agent["low"]["online"]["actor"], x)[0]

    return SimpleNamespace(high=lambda s, task: task, low=low, transition=lambda s, g, s1: g,
                           hierarchical=False)


def learn(env, agent, config, rngs):
    """TD3: act for c steps, store, update once for each step.

    Yields ({"low_loss": value}, whether the episode is over) every c steps.
    """
    acting, rng = policies(agent, config), rngs["batch"]
    while agent["step"] < config.steps:
        s, task, _, over = *online.begin_episode(env, rngs, agent), False
        while not over:
            warm, row = bool(agent["step"] < config.warmup), {}
            window, over, terminated = hiro.explore_window(env, s, task, task, acting, warm,
                                                           rngs["explore"], config)
            hiro.replay_add(agent["replay"], window, terminated, False)
            s = window["states"][-1]
            agent["step"] += len(window["actions"])
            updates, _, rate = hiro.schedule(agent["step"], window, config)
            for _ in range(updates):
                batch = sample(agent["replay"], rng, config)
                row["low_loss"] = hiro.td3_update(agent["low"], batch, rng, config.low_discount,
                                                  rate, config)
            yield row, over


def init_agent(problem, rngs):
    """A new agent, one tree of arrays: the networks and the replay; goal_range has no effect."""
    config, (S, _, D, A), c = problem.config, problem.sizes, problem.config.subgoal_interval
    return {"low": hiro.td3_init(rngs["init"], S + D, A, config), "step": np.zeros((), np.int64),
            "replay": hiro.replay_init(config.capacity // c, c, S, D, D, A),
            "goal_range": np.ones(D, np.float32)}


def prepare(config, checkpoint=None, env=None, **parts):
    """The problem that `train` solves, as `hiro.prepare`."""
    return online.prepare(config, checkpoint, env, **{
        "title": "td3, one policy without hierarchy", "agent": "td3", "init_agent": init_agent,
        "learn": learn, "policies": policies, **parts})


train, evaluate_checkpoint = online.train, online.evaluate_checkpoint

if __name__ == "__main__":
    main(sys.modules[__name__])
