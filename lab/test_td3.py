"""Tests of lab/td3.py: batches by hand, learning, settings without effect, runs and resume.

    python -m pytest lab/test_td3.py            15 seconds
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import dataclasses
import json
import os
import signal
import sys

import numpy as np
import pytest

import envs
import hiro
from lab import td3
from nets import flatten, mlp, relu, tree_map
from support.runs import Run, load_arrays, read_run


class Line:
    """A point on a line by the calls of `envs.GoalEnv`: pushes of a / 2, reward -distance, eight
    steps to an episode."""

    action_size = 1
    unwrapped = property(lambda self: self)

    def observe(self):
        x, goal = np.array([self.x]), np.array([self.goal])
        return {"observation": x, "achieved_goal": x, "desired_goal": goal}

    def reset(self, seed=None, options=None):
        self.x, self.goal = np.random.default_rng(seed).uniform(-1, 1, 2)
        self.time = 0
        return self.observe(), {}

    def step(self, a):
        self.x, self.time = self.x + 0.5 * float(a[0]), self.time + 1
        return self.observe(), -abs(self.x - self.goal), False, self.time >= 8, {}


class Recorded(Run):
    """A run without a folder that keeps [(step, row)] of its windows."""

    def __init__(self, config):
        super().__init__(td3.PROGRAM, config)
        self.windows = []

    def step(self, count, row):
        self.windows.append((count, row))


def line_config(**changes):
    return td3.resolve({"subgoal_interval": 4, "steps": 400, "warmup": 100, "batch_size": 32,
                        "hidden_dims": (32,), "actor_lr": 5e-3, "critic_lr": 1e-2, "tau": 0.05,
                        "reward_scale": 1.0, "low_discount": 0.5, "low_noise": 0.6, **changes})


def learn(config, env=None):
    """A run to its end, not evaluated -> agent, [(step, row)] of its windows."""
    run = Recorded(config)
    result = td3.train(env or Line(), config, run, evaluate=lambda *_: ({"success": 0.0}, {}))
    return result.agent, run.windows


def toy_replay():
    """Windows of a walk on a line of integers, x = 0, 1, 2, ...; action and reward tell the step.

    Lengths 4, 2 (cut by the time limit), 4, 3 (terminated), 4: STARTS and ENDS.
    """
    replay, x = hiro.replay_init(8, 4, 2, 1, 1, 1), 0.0
    for n, terminated in ((4, 0), (2, 0), (4, 0), (3, 1), (4, 0)):
        at = x + np.arange(n + 1)
        hiro.replay_add(replay, {"states": np.stack([at, -at], 1), "actions": at[:n, None] / 100,
                                 "rewards": at[:n], "goal": [x + 10], "desired_goal": [-x]},
                        terminated)
        x += n
    return replay


STARTS, ENDS = np.array([0, 4, 6, 10, 13]), np.array([4, 6, 10, 13, 17])


# ----------------------------------------------------------------------- batches and learning


def test_batches_are_the_steps_that_were_made():
    """[s; D], the task's reward in its unit; bootstrap after time limits, not after the end."""
    config = td3.resolve({"subgoal_interval": 4, "batch_size": 20000, "reward_scale": 0.5})
    b = td3.sample(toy_replay(), np.random.default_rng(0), config)
    x, x1 = b["observations"], b["next_observations"]
    at = x[:, 0]
    w = np.searchsorted(ENDS, at, side="right")
    np.testing.assert_array_equal(x, np.stack([at, -at, -STARTS[w]], 1))
    np.testing.assert_array_equal(x1, np.stack([at + 1, -at - 1, -STARTS[w]], 1))
    np.testing.assert_allclose(b["actions"][:, 0], at / 100, rtol=1e-6)
    np.testing.assert_allclose(b["rewards"], 0.5 * at)
    assert (b["masks"] == np.where(at == 12, 0, 1)).all()       # terminated there alone
    shares = np.bincount(at.astype(int), minlength=17) / config.batch_size
    np.testing.assert_allclose(shares, 1 / 17, atol=0.006)      # uniform over steps
    assert {x.dtype for x in b.values()} == {np.dtype(np.float32)}


def test_the_policy_sees_the_goal_and_nothing_moves_it():
    config, rng = td3.resolve({"hidden_dims": (6,)}), np.random.default_rng(0)
    agent = td3.init_agent(config, (2, 2, 2, 2), rng)
    agent["low"]["target"] = tree_map(lambda w: w + 1, agent["low"]["target"])
    acting = td3.Actor(agent, config)
    s, s1, desired = (rng.normal(size=(5, 2)).astype(np.float32) for _ in range(3))
    assert acting.high(s, desired) is desired and acting.transition(s, desired, s1) is desired
    assert not acting.hierarchical
    x = np.concatenate([s, desired], 1)
    np.testing.assert_allclose(acting.low(s, desired), np.tanh(mlp(
        agent["low"]["online"]["actor"], x, relu)[0]), rtol=1e-5)


def test_the_policy_learns_to_go_to_the_goal(monkeypatch):
    """On a line, to the action clip(2 (g - s), -1, 1); three lesions do not."""
    def error():
        config = line_config()
        agent, _ = learn(config)
        s, goal = (x.reshape(-1, 1) for x in np.meshgrid(*[np.linspace(-1, 1, 9, dtype="f")] * 2))
        a = td3.Actor(agent, config).low(s, goal)
        return np.abs(a - np.clip(2 * (goal - s), -1, 1)).mean()

    assert error() < 0.2
    plain, unseen = td3.sample, np.array([1, 0], np.float32)
    for lesion in (lambda b: {"rewards": -b["rewards"]},
                   lambda b: {"observations": unseen * b["observations"],
                              "next_observations": unseen * b["next_observations"]},
                   lambda b: {"actions": b["actions"][::-1]}):
        monkeypatch.setattr(td3, "sample", lambda *x: (b := plain(*x), {**b, **lesion(b)})[1])
        assert error() > 0.4


def test_exploration_is_the_policys_action_with_noise_after_the_warm_up(monkeypatch):
    """Its std is low_noise; each episode has its own goal. An agent that does not learn keeps one
    policy."""
    monkeypatch.setattr(td3, "td3_update", lambda *_: 0.0)
    config = line_config(low_noise=0.1, steps=1200, warmup=400)
    agent, windows = learn(config)
    replay, n = agent["replay"], len(windows)
    s, desired = replay["states"][:n, :4], replay["desired_goal"][:n, None].repeat(4, 1)
    assert len(np.unique(desired)) == n // 2 == 150 and (desired[::2] == desired[1::2]).all()
    np.testing.assert_allclose(replay["rewards"][:n], -np.abs(
        replay["states"][:n, 1:] - desired)[..., 0], atol=1e-6)
    mu = td3.Actor(agent, config).low(s.reshape(-1, 1), desired.reshape(-1, 1)).reshape(n, 4)
    off = (replay["actions"][:n, :, 0] - mu)[100:]
    assert np.abs(off.mean()) < 0.02 and off.std() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("ends", [False, True])
def test_only_true_terminations_end_the_value(ends, monkeypatch):
    """Six steps to an episode, windows of four: of four and two steps."""
    plain = Line.step
    monkeypatch.setattr(Line, "step", lambda env, a: (
        *plain(env, a)[:2], ends and env.time >= 6, env.time >= 6, {}))
    agent, windows = learn(line_config(steps=24, warmup=20))
    assert agent["replay"]["length"][:8].tolist() == [4, 2] * 4 and len(windows) == 8
    assert agent["replay"]["mask"][:8].tolist() == [1, not ends] * 4


def test_one_update_for_each_step_after_the_warm_up(monkeypatch):
    """In the warm-up an action is held for c steps; the replay has each step once."""
    config = td3.resolve({"env": "grid-fourrooms", "steps": 160, "warmup": 60, "low_noise": 0.0,
                          "subgoal_interval": 8, "batch_size": 8, "hidden_dims": (6,)})
    calls, plain = [], hiro.td3_update

    def td3_update(level, batch, rng, discount, rate, settings):
        calls.append((discount, rate, batch["observations"].shape))
        assert settings is config
        return plain(level, batch, rng, discount, rate, settings)

    monkeypatch.setattr(td3, "td3_update", td3_update)
    agent, windows = learn(config, envs.make_task("grid-fourrooms"))
    assert windows[-1][0] == agent["step"] == 200               # whole episodes
    assert [bool(row) for _, row in windows] == [step >= 60 for step, _ in windows]
    begun = next(step for step, _ in windows if step >= 60)
    assert begun == 64                                          # its window is included
    assert len(calls) == 200 - 64 + 8 == agent["low"]["count"]
    assert {(discount, shape) for discount, _, shape in calls} == {(0.99, (8, 106 + 2))}
    rates = [rate for _, rate, _ in calls]
    assert rates[0] == 1 and rates[-1] == 0 and (np.diff(rates) <= 0).all()
    replay, n = agent["replay"], len(windows)
    length = replay["length"][:n]
    assert len(replay["mask"]) == 25_000                        # --capacity in windows
    assert replay["count"] == n and (np.cumsum(length) == [step for step, _ in windows]).all()
    assert (replay["actions"][:7] == replay["actions"][:7, :1]).all()
    assert len(np.unique(replay["actions"][:7, 0], axis=0)) == 7
    assert (replay["states"][1:13, 0] == replay["states"][np.arange(12), length[:12]]).all()


# ------------------------------------------------------------------------------------- settings


OTHER = dict(                           # than the settings on the line
    seed=1, steps=36, subgoal_interval=3, goal_range=1.0, hidden_dims=(5,), batch_size=7,
    actor_lr=1e-4, critic_lr=1e-4, lr_decay=False, low_discount=0.6, high_discount=0.6, tau=0.5,
    policy_freq=1, low_noise=0.1, high_noise=0.5, noise_correlation=0.5, target_noise=0.5,
    target_clip=0.1, reward_scale=0.5, warmup=12, high_updates=2, capacity=12, correction="none",
    tanh_penalty=0.5)


def test_settings_of_the_hierarchy_and_no_others_have_no_effect():
    """On parameters and replay, once some steps were made; of the others each is changed alone."""
    small = dict(steps=32, warmup=8, hidden_dims=(6,), batch_size=8)

    def left(config):
        return {name: x.tobytes() for name, x in flatten(learn(config)[0]).items()}

    config = line_config(**small)
    base, refused = left(config), {name: OTHER[name] for name in td3.OF_THE_HIERARCHY}
    assert left(dataclasses.replace(config, **refused)) == base
    for name, x in refused.items():
        with pytest.raises(ValueError, match=name.replace("_", "-")):
            line_config(**small, **{name: x})
    for name in set(OTHER) - set(refused):
        assert left(line_config(**{**small, name: OTHER[name]})) != base, name
    assert {field.name for field in dataclasses.fields(td3.Config)} - set(OTHER) == {
        "env", "eval_episodes", "eval_interval"}


def test_what_the_task_changes_goes_before_e18():
    config = td3.resolve({"env": "grid-fourrooms"})
    assert (td3.resolve({}).low_noise, config.low_noise, config.low_discount) == (0.3, 0.5, 0.99)
    assert td3.resolve({"low_discount": 0.9}).low_discount == 0.9


# --------------------------------------------------------------------------------------- runs


TINY = ("--steps", 600, "--warmup", 300, "--eval-interval", 200, "--eval-episodes", 2,
        "--batch-size", 8, "--hidden-dims", "16,16")


@pytest.fixture
def program(monkeypatch):
    """program(*words): exit code of `python -m lab.td3 WORDS`; episodes of 100 steps."""
    task = envs.make_task("point-umaze")
    task.limit = 100
    monkeypatch.setitem(envs.TASKS_ONLINE, "point-umaze", lambda: task)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["td3.py", *map(str, words)])
        try:
            td3.main()
        except SystemExit as stop:
            return stop.code
        return 0

    return run


def test_a_run_leaves_its_files_and_evaluates_again(program, tmp_path, capsys):
    out = tmp_path / "run"
    assert program(*TINY, "--out", out, "--seed", 4) == 0
    assert set(os.listdir(out)) == {"config.json", "train.csv", "eval.csv", "checkpoint.npz",
                                    "summary.json", "episodes.png", "curve.png"}
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["agent"], summary["seed"], summary["env_steps"]) == ("td3", 4, 600)
    assert not [name for name in summary if "subgoal" in name or "relabel" in name]
    capsys.readouterr()
    assert program("--eval", out) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    for name in ("success", "success_random", "final_distance"):
        assert float(printed[name]) == pytest.approx(summary[name], abs=1e-4)
    assert program(*TINY, "--correction", "none") == 2
    assert "--correction" in capsys.readouterr().err


def test_resume_equals_never_having_stopped(program, tmp_path, monkeypatch):
    """Ctrl-C in the middle of an episode, then --resume: the same bits, replay included."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = (*TINY, "--eval-interval", 300)
    assert program(*words, "--out", whole) == 0
    plain, calls = td3.explore_window, []

    def explore_window(*arguments):
        calls.append(0)
        if len(calls) == 35:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(td3, "explore_window", explore_window)
        assert program(*words, "--out", parts) == 130
    assert read_run(td3.PROGRAM, parts).agent["step"] == 400    # at the episode's end
    assert program("--resume", parts) == 0
    one, two = (load_arrays(folder / "checkpoint.npz") for folder in (whole, parts))
    assert set(one) == set(two)
    assert [name for name in one if name != "meta" and (one[name] != two[name]).any()] == []
    for folder in (whole, parts):
        tests = read_run(td3.PROGRAM, folder).meta["logs"]["eval"]
        assert [row["step"] for row in tests] == [300, 600]


def test_several_seeds_are_processes_of_their_own(program, tmp_path, monkeypatch):
    """`python -m lab.td3` is found from any folder."""
    monkeypatch.chdir(tmp_path)
    words = ("--env", "grid-fourrooms", "--steps", 150, "--warmup", 100, "--eval-interval", 200,
             "--eval-episodes", 1, "--batch-size", 8, "--hidden-dims", "8")
    assert program(*words, "--seeds", "1-2", "--out", "seeds") == 0
    for seed in (1, 2):
        summary = json.loads((tmp_path / f"seeds/seed{seed}/summary.json").read_text())
        assert (summary["agent"], summary["seed"], summary["env_steps"]) == ("td3", seed, 200)
