"""HIRO's ablations, each true to the source that it comes from; and all published settings at once.

    python -m lab.hiro_ablations --variant NAME [flags of hiro.py]

  low-level-relabelling   authors' relabel_contexts (paper, 5.2): the low level learns for goals at
                          other states of its batch [E16]
  pretrain                paper, 5.2: the low level learns alone, for random goals; then it is
                          frozen, and the high level learns alone, without correction [E27]
  next-goal-given         authors' code: where the low level's goal ends, its next one is the goal
                          that was given then [E1]
  squared-loss            paper, Eqs. (1), (4): the square of the critics' errors [E5]
  blind                   authors' hiro_orig: the low level sees zeros in place of x and y [E8]
  goal-range-measured     half-width of the goals: what random actions cover, by lab.gym [E7]
  published               all published settings (`PUBLISHED`)

Authors' code: research/efficient-hrl in tensorflow/models. The other two of the paper's ablations
are `python hiro.py --correction none` and `python -m lab.td3`. `published` is no reproduction: what
is no setting, such as robot, mazes, target noise and warm-up, remains this project's. A task of
hiro.py, point-umaze-undo, is here too: walls that undo a move.
"""

import hiro                             # first: it sets one BLAS thread before numpy loads

import dataclasses
from dataclasses import dataclass
from functools import partial

import numpy as np

import envs
from hiro import (draw_steps, explore_goal, explore_window, goal_transition, intrinsic_reward,
                  name_of, read, replay_add, sample_steps, sample_windows, schedule, td3_update)
from lab.gym import measure_goal_range
from lab.td3 import finish
from support.flags import POSITIVE, option, parse, refuse_unused
from support.runs import (Program, as_run, generators, one_line_errors, open_run, run_seeds, say,
                          show)

VARIANTS = ("low-level-relabelling", "pretrain", "next-goal-given", "squared-loss", "blind",
            "goal-range-measured", "published")
PUBLISHED = dict(
    hidden_dims=(300, 300), actor_lr=1e-4, critic_lr=1e-3, lr_decay=False, batch_size=100,
    low_discount=0.99, high_discount=0.99, tau=0.005, policy_freq=2, subgoal_interval=10,
    goal_range=10.0, low_noise=1 / 30, high_noise=0.1, noise_correlation=0.0, target_noise=0.2,
    target_clip=0.5, reward_scale=0.1, tanh_penalty=0.0, high_updates=1, capacity=200_000)


@dataclass
class Config(hiro.Config):
    """hiro's config, the variant, and what only one of them has."""

    variant: str = option("none", "what is changed; has to be given", VARIANTS)
    pretrain_steps: int = option(10_000, "steps of the low level alone, of --variant pretrain | "
                                 "2 million", POSITIVE)

    @property
    def agent(self):
        return f"hiro_{self.variant}"                       # names the folder of a run


PROGRAM = Program("-m lab.hiro_ablations", Config, "step", hiro.ACTING, hiro.DEPARTED)


def resolve(given):
    """A whole Config, as `hiro.resolve`. ValueError also: no variant, or a flag that has no effect
    with it."""
    changes, variant = {}, given.get("variant")
    if variant == "published":
        given = {**PUBLISHED, **given}
    if variant == "pretrain":
        changes["correction"] = "none"
        if given.get("quick"):
            changes["pretrain_steps"] = 1000
    config = hiro.resolve(given, Config, changes)
    plain = hiro.resolve({"env": config.env, "variant": variant}, Config, changes)
    refuse_unused(config, plain, {
        "correction": variant == "pretrain" and "--variant pretrain",
        "goal_range": variant == "goal-range-measured" and "--variant goal-range-measured",
        "pretrain_steps": variant != "pretrain" and f"--variant {variant}"})
    first, warmup = config.pretrain_steps, config.warmup
    if variant == "pretrain" and not warmup < first < config.steps - warmup:
        raise ValueError(f"--pretrain-steps {first} must be above --warmup {warmup}, and below "
                         f"--steps {config.steps} by more than that")
    return config


# ----------------------------------------------------------------------- the low level's batches


def relabelled_steps(replay, rng, goal_range, config):
    """A batch as of `hiro.sample_steps` with other goals [E16]: g is the move to the state of
    another row plus noise of std 0.1 goal_range, not clipped, and g' is g."""
    batch = sample_steps(replay, rng, goal_range, config)
    S, P = replay["states"].shape[-1], len(goal_range)
    s, s1 = (batch[name][:, :S] for name in ("observations", "next_observations"))
    noise = 0.1 * goal_range * rng.standard_normal((len(s), P), np.float32)
    g = noise + s[rng.permutation(len(s)), :P] - s[:, :P]
    return {**batch, "rewards": intrinsic_reward(s, g, s1),
            "observations": np.concatenate([s, g], -1),
            "next_observations": np.concatenate([s1, g], -1)}


def steps_with_next_goal(replay, rng, goal_range, config):
    """A batch as of `hiro.sample_steps`; but in the last step of a window g' is the next window's
    goal [E1], if that goes on with the episode: if it begins in the very state where this one ends.
    """
    w, i, last = draw_steps(replay, rng, config.batch_size, config.subgoal_interval)
    first, s, s1 = (replay["states"][w, j] for j in (0, i, i + 1))
    g = goal_transition(first, replay["goal"][w], s)
    g1 = goal_transition(s, g, s1)

    windows, count = len(replay["mask"]), int(replay["count"])
    after = (w + 1) % windows
    newest = w == (count - 1) % windows
    goes_on = last & ~newest & (replay["states"][after, 0] == s1).all(-1)
    g1[goes_on] = replay["goal"][after[goes_on]]
    return {"observations": np.concatenate([s, g], -1), "actions": replay["actions"][w, i],
            "rewards": intrinsic_reward(s, g, s1),
            "masks": np.where(last, replay["mask"][w], np.float32(1)),
            "next_observations": np.concatenate([s1, g1], -1)}


def hide(x):
    """x (..., I), which begins with a state, with 0 in place of x and y."""
    hidden = x.copy()
    hidden[..., :2] = 0
    return hidden


def blind_steps(replay, rng, goal_range, config):
    """A batch as of `hiro.sample_steps` without x and y; rewards and goals are as ever [E8]."""
    batch = sample_steps(replay, rng, goal_range, config)
    return {**batch, "observations": hide(batch["observations"]),
            "next_observations": hide(batch["next_observations"])}


class BlindActor(hiro.Actor):
    """Both policies, of which the low level does not see x and y [E8]."""

    def low(self, s, g):
        return super().low(hide(s), g)


def squared_loss(params, batch, y):
    """L = sum_j mean (Q_j(x, a) - y)^2 in place of `hiro.critic_loss` [E5]."""
    x, a = batch["observations"], batch["actions"]
    q, back_q = hiro.critic(params["critic"], x, a)
    e = q - y
    grads = back_q(2 * e / len(x))[1]
    return (e * e).mean(-1).sum(), {"critic": grads}


# ------------------------------------------------------------------------------------- runs


PARTS = {                               # arguments of `hiro.train` in place of its defaults
    "low-level-relabelling": {"sample_steps": relabelled_steps},
    "next-goal-given": {"sample_steps": steps_with_next_goal},
    "squared-loss": {"td3_update": partial(td3_update, critic_loss=squared_loss)},
    "blind": {"sample_steps": blind_steps}}


def actor(agent, config, *more):
    """The `hiro.Actor` of the config's variant."""
    kind = BlindActor if config.variant == "blind" else hiro.Actor
    return kind(agent, config, *more)


def train(env, config, run=None):
    """A whole run of the config's variant. Arguments, result and errors as of `hiro.train`."""
    run, env = as_run(run, PROGRAM, config), env or envs.make_task(config.env)
    if config.variant == "pretrain":
        return pretrain(env, config, run)
    goal_range = None
    if config.variant == "goal-range-measured":
        goal_range = measure_goal_range(env, config)
    return hiro.train(env, config, run, goal_range=goal_range, actor=actor,
                      title=f"hiro, {config.variant}", **PARTS.get(config.variant, {}))


@np.errstate(over="ignore", invalid="ignore")           # run.step refuses what is not finite
def pretrain(env, config, run):
    """The low level alone for pretrain_steps, for goals of a Gaussian; then the high level alone.

    The second part begins with an empty replay and a warm-up of uniform goals: without a correction
    the high level must not learn from windows of an unfinished low level. The frozen one acts
    without noise [E27]. Result as of `hiro.train`.
    """
    say(f"{name_of(env)}, seed {config.seed}: hiro, low level alone for {config.pretrain_steps:,} "
        f"steps, then frozen; {config.steps:,} environment steps")
    rngs = generators(config.seed, "init", "episodes", "explore", "batch")
    agent = hiro.init_agent(config, hiro.sizes_of(env), rngs["init"], env.goal_scale)
    run.begin(agent, rngs, config.steps, config.warmup)     # one to go on with gets its agent

    low, high, replay, half = (agent[x] for x in ("low", "high", "replay", "goal_range"))
    acting, explore, rng = hiro.Actor(agent, config), rngs["explore"], rngs["batch"]
    without_noise = dataclasses.replace(config, low_noise=0.0)
    step, every, first = int(agent["step"]), config.eval_interval, config.pretrain_steps
    while step < config.steps:
        s, desired = read(env.reset(seed=int(rngs["episodes"].integers(2**31)))[0])
        noise = explore.normal(size=len(half))
        begun, over = step, False
        while not over:                                     # a window
            row, rate = {}, schedule(step, config)
            alone = step < first
            warm = step < config.warmup if alone else step < first + config.warmup
            if alone:
                g = np.clip(0.5 * half * explore.normal(size=len(half)), -half, half)
                window, desired, over, terminated = explore_window(
                    env, s, desired, g.astype(np.float32), acting, warm, explore, config)
            else:
                g = explore_goal(acting, s, desired, noise, warm, explore, config)
                window, desired, over, terminated = explore_window(
                    env, s, desired, g, acting, False, explore, without_noise)
            replay_add(replay, window, terminated)
            if alone and not warm:
                for _ in window["actions"]:
                    batch = sample_steps(replay, rng, half, config)
                    row["low_loss"] = td3_update(low, batch, rng, config.low_discount, rate, config)
            elif not warm:
                for _ in range(config.high_updates):
                    batch, _ = sample_windows(replay, rng, acting.low, half, config)
                    row["high_loss"] = td3_update(high, batch, rng, config.high_discount, rate,
                                                  config)
            s = window["states"][-1]
            step += len(window["actions"])
            agent["step"][...] = step
            if alone and step >= first:
                replay["count"][...] = 0
            run.step(step, row)
        due = begun // every < step // every and step < config.steps
        if due and step >= config.warmup:
            run.evaluated(step, hiro.evaluate(agent, env, config)[0])
        if due or run.stopped:
            run.save(agent, rngs)
    return finish(run, agent, rngs, env, config, hiro.Actor, "hiro, pretrain")


def main():
    given, call = parse(PROGRAM, __doc__, hiro.WORDS)
    with one_line_errors():
        if call.eval:
            return show(hiro.evaluate_saved(call.eval, PROGRAM, actor))
        config = resolve(given)
        if call.seeds:
            return run_seeds(PROGRAM, call, given, config)
        with open_run(PROGRAM, call, config) as run:
            train(None, run.config, run)


# --------------------------------------------------------------------------- walls that undo a move


class UndoMaze(envs.PointMaze):
    """A point that does not slide: a move that would end in a wall is not made at all, as of the
    authors' point robot (manual_collision). The radius has no effect."""

    def move(self, s, a, rng=None):
        s = np.array(s, float)
        moved = s + self._step(s, a)
        return np.where(self.is_free(moved)[:, None], moved, s)


class UndoTask(envs.UMazeTask):
    """HIRO's U-maze with the walls of `UndoMaze` [E15]."""

    def __init__(self):
        super().__init__(UndoMaze("point-umaze", **envs.ENVIRONMENTS["point-umaze"].arguments))


if __name__ == "__main__":
    main()
