"""Tests of lab/td3.py: batches by hand, learning, refusals, runs and resume.

    python -m pytest lab/test_td3.py            15 seconds
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import dataclasses
import os
import re
import signal
from functools import partial

import numpy as np
import pytest

import envs
import hiro
from lab import td3
from nets import flatten, mlp, relu, tree_map
from support import online
from support.files import load_tree, read_json, read_rows
from support.run import load_run
from support.test_run import run as run_program, shorten_episodes
from test_all import toy_replay

run = partial(run_program, td3)            # (*words) -> exit code



class Line:
    """A point on a line by the calls of `envs.GoalEnv`: pushes of a / 2, reward -distance, eight
    steps to an episode."""

    action_size = 1

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


def line_config(**changes):
    return td3.resolve({"subgoal_interval": 4, "steps": 400, "warmup": 100, "batch_size": 32,
                        "hidden_dims": (32,), "actor_lr": 5e-3, "critic_lr": 1e-2, "tau": 0.05,
                        "reward_scale": 1.0, "low_discount": 0.5, "low_noise": 0.6, **changes})


def learn_on_a_line(config):
    """`td3.learn` to its end -> problem, agent, number of windows."""
    problem = td3.prepare(config, env=Line())
    agent = problem.init_agent(problem, problem.rngs)
    return problem, agent, sum(1 for _ in td3.learn(problem.env, agent, config, problem.rngs))


TINY = ("--steps", 600, "--warmup", 300, "--eval-interval", 200, "--eval-episodes", 2,
        "--batch-size", 32, "--hidden-dims", "16,16")


# ----------------------------------------------------------------------- batches and learning


def test_batches_are_the_steps_that_were_made():
    """[s; D], the task's reward in its unit; bootstrap after time limits, not after the end."""
    config = td3.resolve({"subgoal_interval": 4, "batch_size": 20000, "reward_scale": 0.5})
    b = td3.sample(toy_replay(), np.random.default_rng(0), config)
    starts, ends = np.array([0, 4, 6, 10, 13]), np.array([4, 6, 10, 13, 17])
    x, x1 = b["observations"], b["next_observations"]
    at = x[:, 0]
    w = np.searchsorted(ends, at, side="right")
    np.testing.assert_array_equal(x, np.stack([at, -at, -starts[w]], 1))
    np.testing.assert_array_equal(x1, np.stack([at + 1, -at - 1, -starts[w]], 1))
    np.testing.assert_allclose(b["actions"][:, 0], at / 100, rtol=1e-6)
    np.testing.assert_allclose(b["rewards"], 0.5 * at)
    assert (b["masks"] == np.where(at == 12, 0, 1)).all()       # terminated there alone
    shares = np.bincount(at.astype(int), minlength=17) / config.batch_size
    np.testing.assert_allclose(shares, 1 / 17, atol=0.006)      # uniform over steps
    assert {x.dtype for x in b.values()} == {np.dtype(np.float32)}


def test_the_policy_sees_the_task_and_nothing_moves_its_goal():
    problem = td3.prepare(td3.resolve({"hidden_dims": (6,)}))
    agent = problem.init_agent(problem, problem.rngs)
    agent["low"]["target"] = tree_map(lambda w: w + 1, agent["low"]["target"])
    acting, rng = problem.policies(agent, problem.config), np.random.default_rng(0)
    s, s1, task = (rng.normal(size=(5, 2)).astype(np.float32) for _ in range(3))
    assert acting.high(s, task) is task and acting.transition(s, task, s1) is task
    assert not acting.hierarchical
    x = np.concatenate([s, task], 1)
    np.testing.assert_allclose(acting.low(s, task), np.tanh(mlp(
        agent["low"]["online"]["actor"], x, relu)[0]), rtol=1e-5)
    assert set(agent) == {"low", "step", "replay", "goal_range"}


def test_the_policy_learns_to_go_to_the_goal(monkeypatch):
    """On a line, to the action clip(2 (g - s), -1, 1); three lesions do not."""
    def error():
        problem, agent, _ = learn_on_a_line(line_config())
        s, goal = (x.reshape(-1, 1) for x in np.meshgrid(*[np.linspace(-1, 1, 9, dtype="f")] * 2))
        a = problem.policies(agent, problem.config).low(s, goal)
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
    """Its std is low_noise; in the warm-up a uniform action is held, also for each episode's own
    task. The agent that does not learn keeps one policy."""
    monkeypatch.setattr(hiro, "td3_update", lambda *_: 0.0)
    for noise in (0.0, 0.1):
        problem, agent, n = learn_on_a_line(line_config(low_noise=noise, steps=1200, warmup=400))
        replay, low = agent["replay"], problem.policies(agent, problem.config).low
        assert replay["count"] == n == 300 and (replay["length"][:n] == 4).all()
        s, task = replay["states"][:n, :4], replay["task"][:n, None].repeat(4, 1)
        assert len(np.unique(task)) == n // 2 and (task[::2] == task[1::2]).all()
        np.testing.assert_allclose(replay["rewards"][:n], -np.abs(
            replay["states"][:n, 1:] - task)[..., 0], atol=1e-6)
        a = replay["actions"][:n, :, 0]
        off = (a - low(s.reshape(-1, 1), task.reshape(-1, 1)).reshape(n, 4))[100:]
        held = a[:100] - a[:100].mean(1, keepdims=True)
        assert np.abs(off.mean()) < 0.02 * (noise > 0) + 1e-6
        assert off.std() == pytest.approx(noise, rel=0.1, abs=1e-6)
        assert np.abs(held).max() < 5 * noise + 1e-6
        assert a[:100].mean(1).std() == pytest.approx(1 / np.sqrt(3), abs=0.08)


@pytest.mark.parametrize("ends", [False, True])
def test_only_true_terminations_end_the_value(ends, monkeypatch):
    """Six steps to an episode, windows of four: of four and two steps."""
    plain = Line.step
    monkeypatch.setattr(Line, "step", lambda env, a: (
        *plain(env, a)[:2], ends and env.time >= 6, env.time >= 6, {}))
    _, agent, n = learn_on_a_line(line_config(steps=24, warmup=20))
    replay = agent["replay"]
    assert replay["length"][:n].tolist() == [4, 2] * 4
    assert replay["mask"][:n].tolist() == [1, not ends] * 4


def test_one_update_for_each_step_after_the_warm_up(monkeypatch):
    """In the warm-up an action is held for c steps; the replay has each step once."""
    config = td3.resolve({"env": "grid-fourrooms", "steps": 160, "warmup": 60, "low_noise": 0.0,
                          "subgoal_interval": 8, "batch_size": 8, "hidden_dims": (6,)})
    problem, calls, plain = td3.prepare(config), [], hiro.td3_update

    def td3_update(level, batch, rng, discount, rate, settings):
        calls.append((discount, rate, batch["observations"].shape))
        assert level is agent["low"] and settings is config and rng is problem.rngs["batch"]
        return plain(level, batch, rng, discount, rate, settings)

    monkeypatch.setattr(hiro, "td3_update", td3_update)
    agent, done = problem.init_agent(problem, problem.rngs), []
    for row, over in td3.learn(problem.env, agent, config, problem.rngs):
        done.append((int(agent["step"]), len(calls), over))
        assert agent["low"]["count"] == len(calls)
        assert bool(row) == (agent["step"] >= config.warmup)
    assert [step for step, _, over in done if over] == [100, 200]       # whole episodes
    begun = next(step for step, _, _ in done if step >= 60)
    assert begun == 64 and done[-1][1] == 200 - 64 + 8          # the window that ends it included
    sizes = problem.sizes
    assert {(discount, shape) for discount, _, shape in calls} == {
        (0.99, (8, sizes[0] + sizes[2]))}
    rates = [rate for _, rate, _ in calls]
    assert rates[0] == 1 and rates[-1] == 0 and (np.diff(rates) <= 0).all()
    replay, n = agent["replay"], len(done)
    assert len(replay["mask"]) == 25_000                        # --capacity in windows
    assert not replay["joined"].any()                           # no goal goes on
    length = replay["length"][:n]
    assert replay["count"] == n and length.sum() == 200
    assert (np.cumsum(length) == [step for step, _, _ in done]).all()
    for w in range(7):
        a = replay["actions"][w, :length[w]]
        assert (a == a[0]).all()
    assert len(np.unique(replay["actions"][:7, 0], axis=0)) == 7
    assert (replay["states"][1:13, 0] == replay["states"][np.arange(12), length[:12]]).all()


# ------------------------------------------------------------------------ flags and refusals


OTHER = dict(                           # than the settings on the line
    seed=1, steps=36, subgoal_interval=3, goal_range=1.0, hidden_dims=(5,), batch_size=7,
    actor_lr=1e-4, critic_lr=1e-4, lr_decay=False, low_discount=0.6, high_discount=0.6, tau=0.5,
    policy_freq=1, low_noise=0.1, high_noise=0.5, noise_correlation=0.5, target_noise=0.5,
    target_clip=0.1, reward_scale=0.5, critic_loss="squared", warmup=12, high_updates=2,
    capacity=12, correction="none", candidates=3, goal_at_window_end="new",
    relabel_low_goals=True, pretrain=20, see_position=False, tanh_penalty=0.5)


def test_settings_of_the_hierarchy_and_no_others_have_no_effect():
    """Parameters and replay, once some steps were made: of the others each is changed alone.
    (A pretraining would end the learning of the only level.)"""
    small = dict(steps=32, warmup=8, hidden_dims=(6,), batch_size=8)

    def left(config):
        return {name: x.tobytes() for name, x in flatten(learn_on_a_line(config)[1]).items()}

    config = line_config(**small)
    base, refused = left(config), {name: OTHER[name] for name in td3.OF_THE_HIERARCHY}
    assert left(dataclasses.replace(config, **{**refused, "pretrain": 0})) == base
    for name, x in refused.items():
        with pytest.raises(ValueError, match="is for hiro.py; td3 has no hierarchy"):
            line_config(**small, **{name: x})
    for name in set(OTHER) - set(refused):
        assert left(line_config(**{**small, name: OTHER[name]})) != base, name
    assert {field.name for field in dataclasses.fields(td3.Config)} - set(OTHER) == {
        "env", "eval_noise", "eval_episodes", "eval_interval"}


def test_defaults():
    """[E18]"""
    config = td3.resolve({})
    assert (config.low_discount, config.low_noise) == (0.99, 0.3)
    config = td3.resolve({"env": "grid-fourrooms"})
    assert (config.low_discount, config.low_noise) == (0.99, 0.5)
    assert td3.resolve({"low_discount": 0.9}).low_discount == 0.9


@pytest.mark.parametrize("words, message", [
    ("--correction none", "--correction is for hiro.py; td3 has no hierarchy"),
    ("--goal-at-window-end new", "--goal-at-window-end is for hiro.py"),
    ("--relabel-low-goals", "--relabel-low-goals is for hiro.py"),
    ("--pretrain 5000", "--pretrain is for hiro.py"),
    ("--no-see-position", "--see-position is for hiro.py"),
    ("--candidates 3", "--candidates is for hiro.py"), ("--high-noise 1", "--high-noise is for"),
    ("--env grid-fourrooms --goal-range 2", "--goal-range is for hiro.py"),
    ("--env point-medium", "invalid choice"), ("--steps -1", "--steps must be positive"),
    ("--correctoin none", "did you mean"), ("--resume nowhere", "nowhere"),
    ("--seeds 3-1", "seeds are A-B")])
def test_wrong_input_gets_one_line_and_exit_code_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*words.split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("td3.py: error: ")
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------- runs


def test_a_run_leaves_its_files_and_evaluates_again(tmp_path, monkeypatch, capsys):
    shorten_episodes(monkeypatch, "point-umaze")
    out = tmp_path / "run"
    assert run(*TINY, "--out", out, "--seed", 4) == 0
    assert set(os.listdir(out)) == {"config.json", "train.csv", "eval.csv", "checkpoint.npz",
                                    "summary.json", "episodes.png", "curve.png"}
    summary = read_json(out / "summary.json")
    assert (summary["agent"], summary["seed"], summary["env_steps"]) == ("td3", 4, 600)
    assert not [name for name in summary if "subgoal" in name or "relabel" in name]
    assert not load_tree(out / "checkpoint.npz").keys() & {"high"}
    said = capsys.readouterr().out
    assert re.match(r"point-umaze, seed 4: td3, one policy without hierarchy; 600 environment "
                    r"steps, about \d+ seconds\n", said)
    assert run("--eval", out) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    for name in ("success", "success_random", "final_distance"):
        assert float(printed[name]) == pytest.approx(summary[name], abs=1e-4)
    assert run(*TINY, "--out", out) == 2                # nothing is overwritten
    assert "already holds a run" in capsys.readouterr().err
    act = online.actors(*load_run(td3, str(out)))()
    assert act(envs.make_task("point-umaze").reset(seed=0)[0]).shape == (2,)


@pytest.mark.parametrize("env", ["point-umaze", "grid-fourrooms"])
def test_resume_equals_never_having_stopped(env, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the middle of an episode, then --resume: the same bits, replay included."""
    shorten_episodes(monkeypatch, env)                  # six episodes
    monkeypatch.setattr(online, "draw", lambda *_: None)
    whole, parts, other = tmp_path / "whole", tmp_path / "parts", tmp_path / "other"
    words = (*TINY, "--env", env, "--subgoal-interval", 10, "--batch-size", 8)
    assert run(*words, "--out", whole) == 0
    assert run(*words, "--out", other, "--eval-interval", 150) == 0
    plain = td3.learn

    def learn(*arguments):
        for i, result in enumerate(plain(*arguments), 1):
            if i == 45:
                os.kill(os.getpid(), signal.SIGINT)
            yield result

    monkeypatch.setattr(td3, "learn", learn)
    assert run(*words, "--out", parts) == 130
    assert load_tree(parts / "checkpoint.npz")["step"] == 500           # at the episode's end
    assert f"go on with: python -m lab.td3 --resume {parts}" in capsys.readouterr().out
    monkeypatch.setattr(td3, "learn", plain)
    assert run("--resume", parts) == 0
    trees = [flatten(load_tree(f / "checkpoint.npz")) for f in (whole, parts, other)]
    assert set(trees[0]) == set(trees[1])
    for path, x in trees[0].items():
        if path != "seconds":
            assert (trees[1][path] == x).all(), path
            assert (trees[2][path] == x).all() or "early" in path, path
    rows = [[{name: x for name, x in row.items() if name != "seconds"}
             for row in read_rows(f / "eval.csv")] for f in (whole, parts)]
    assert rows[0] == rows[1] and rows[0]


def test_several_seeds_are_processes_of_their_own(tmp_path, monkeypatch, capsys):
    """`python -m lab.td3` is found from any folder."""
    monkeypatch.chdir(tmp_path)
    words = ("--env", "grid-fourrooms", "--steps", 150, "--warmup", 100, "--eval-interval", 200,
             "--eval-episodes", 1, "--batch-size", 8, "--hidden-dims", "8")
    assert run(*words, "--seeds", "1-2", "--jobs", 2, "--out", "seeds") == 0
    rows = read_rows(tmp_path / "seeds" / "seeds.csv")
    assert [(row["seed"], row["agent"], row["env_steps"]) for row in rows] == [
        ("1", "td3", "200"), ("2", "td3", "200")]
    assert "mean success" in capsys.readouterr().out
    config = read_json(tmp_path / "seeds" / "seed2" / "config.json")["config"]
    assert (config["hidden_dims"], config["seed"], config["low_noise"]) == ([8], 2, 0.5)
