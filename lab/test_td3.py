"""Tests of lab/td3.py: batches by hand, learning, settings without effect, resume.

    python -m pytest lab/test_td3.py            5 seconds
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import sys

import numpy as np
import pytest

import envs
import hiro
from lab import td3
from nets import flatten
from support.runs import Run, read_json, read_run


class Line:
    """A point on a line by the calls of `envs.GoalEnv`: pushes of a / 2, reward -distance, eight
    steps to an episode."""

    action_size, goal_scale, eval_noise = 1, 1.0, 0.0
    unwrapped = property(lambda self: self)

    def observe(self):
        x, goal = np.array([self.x]), np.array([self.goal])
        return {"observation": x, "achieved_goal": x, "desired_goal": goal}

    def reset(self, seed=None):
        self.x, self.goal = np.random.default_rng(seed).uniform(-1, 1, 2)
        self.time = 0
        return self.observe(), {}

    def step(self, a):
        self.x, self.time = self.x + 0.5 * float(a[0]), self.time + 1
        return self.observe(), -abs(self.x - self.goal), False, self.time >= 8, {}


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


def test_the_policy_learns_to_go_to_the_goal(monkeypatch):
    """On a line, to the action clip(2 (g - s), -1, 1), by one update for each step from step 104
    on; three lesions do not."""
    config = td3.resolve({"subgoal_interval": 4, "steps": 400, "warmup": 102, "batch_size": 32,
                          "hidden_dims": (32,), "actor_lr": 5e-3, "critic_lr": 1e-2, "tau": 0.05,
                          "reward_scale": 1.0, "low_discount": 0.5, "low_noise": 0.6})

    def error():
        agent = td3.train(Line(), config, evaluate=lambda *_: ({"success": 0.0}, {})).agent
        assert agent["low"]["count"] == 300
        s, goal = (x.reshape(-1, 1) for x in np.meshgrid(*[np.linspace(-1, 1, 9, dtype="f")] * 2))
        actor = td3.Actor(agent, config)
        assert actor.high(s, goal) is goal is actor.transition(s, goal, s)
        return np.abs(actor.low(s, goal) - np.clip(2 * (goal - s), -1, 1)).mean()

    assert error() < 0.2
    plain, unseen = td3.sample, np.array([1, 0], np.float32)
    for lesion in (lambda b: {"rewards": -b["rewards"]},
                   lambda b: {"observations": unseen * b["observations"],
                              "next_observations": unseen * b["next_observations"]},
                   lambda b: {"actions": b["actions"][::-1]}):
        monkeypatch.setattr(td3, "sample", lambda *x: (b := plain(*x), {**b, **lesion(b)})[1])
        assert error() > 0.4


def test_settings():
    """The task's go before E18's; those of the hierarchy must not be changed."""
    config = td3.resolve({"env": "grid-fourrooms", "low_discount": 0.9})
    assert (td3.resolve({}).low_noise, config.low_noise, config.low_discount) == (0.3, 0.5, 0.9)
    with pytest.raises(ValueError, match="--high-updates has no effect"):
        td3.resolve({"high_updates": 2})


def stop(train, env, config, program, folder, until, saved=None):
    """A run in a folder that ends as by Ctrl-C after `until` steps -> what it has saved."""
    run = Run(program, config, folder, saved)
    run.step = lambda count, row: setattr(run, "stopped", 2 * (count >= until))
    with pytest.raises(KeyboardInterrupt):
        train(env, config, run)
    return read_run(program, folder)


def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path, monkeypatch):
    """By the program: the same bits, replay included. It is evaluated again."""
    task, folder = envs.make_task("point-umaze"), str(tmp_path / "run")
    task.limit = 100
    monkeypatch.setitem(envs.TASKS_ONLINE, "point-umaze", lambda: task)
    config = td3.resolve({"steps": 600, "warmup": 250, "eval_interval": 300, "eval_episodes": 1,
                          "batch_size": 8, "hidden_dims": (16,)})
    whole = td3.train(None, config)
    saved = stop(td3.train, None, config, td3.PROGRAM, folder, 350)
    assert saved.agent["step"] == 400                   # at the episode's end
    monkeypatch.setattr(sys, "argv", ["td3.py", "--resume", folder])
    td3.main()
    found, summary = read_run(td3.PROGRAM, folder), read_json(f"{folder}/summary.json")
    assert {name: x.tobytes() for name, x in flatten(found.agent).items()} == {
        name: x.tobytes() for name, x in flatten(whole.agent).items()}
    assert {**summary, "train_seconds": 0} == {**whole.summary, "train_seconds": 0}
    again = hiro.evaluate_saved(folder, td3.PROGRAM, td3.Actor)
    assert again.items() <= summary.items() and not [x for x in summary if "subgoal" in x]
