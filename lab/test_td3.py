"""Tests of lab/td3.py: batches by hand, learning, refusals, runs and resume.

    python -m pytest lab/test_td3.py            15 seconds
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import os
import re
import signal
from functools import partial

import numpy as np
import pytest

import envs
import hiro
from lab import td3
from nets import flatten, mlp, relu
from support import online
from support.files import load_tree, read_json, read_rows
from support.run import load_run
from support.test_run import run as run_program
from test_all import toy_replay

run = partial(run_program, td3)            # (*words) -> exit code

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
    acting, rng = problem.policies(agent, problem.config), np.random.default_rng(0)
    s, s1, task = (rng.normal(size=(5, 2)).astype(np.float32) for _ in range(3))
    assert acting.high(s, task) is task and acting.transition(s, task, s1) is task
    assert not acting.hierarchical
    x = np.concatenate([s, task], 1)
    np.testing.assert_allclose(acting.low(s, task), np.tanh(mlp(
        agent["low"]["online"]["actor"], x, relu)[0]), rtol=1e-5)
    assert set(agent) == {"low", "step", "replay", "goal_range"}


def test_one_update_for_each_step_after_the_warm_up(monkeypatch):
    """In the warm-up an action is held for c steps; the replay has each step once."""
    config = td3.resolve({"env": "grid-fourrooms", "steps": 160, "warmup": 60, "low_noise": 0.0,
                          "subgoal_interval": 8, "batch_size": 8, "hidden_dims": (6,)})
    problem, calls, plain = td3.prepare(config), [], hiro.td3_update

    def td3_update(level, batch, rng, discount, rate, config):
        calls.append((discount, rate, batch["observations"].shape))
        return plain(level, batch, rng, discount, rate, config)

    monkeypatch.setattr(hiro, "td3_update", td3_update)
    agent, done = problem.init_agent(problem, problem.rngs), []
    for row, over in td3.learn(problem.env, agent, config, problem.rngs):
        done.append((int(agent["step"]), len(calls), over))
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
    length = replay["length"][:n]
    assert replay["count"] == n and length.sum() == 200
    assert (np.cumsum(length) == [step for step, _, _ in done]).all()
    for w in range(7):
        a = replay["actions"][w, :length[w]]
        assert (a == a[0]).all()
    assert len(np.unique(replay["actions"][:7, 0], axis=0)) == 7
    assert (replay["states"][1:13, 0] == replay["states"][np.arange(12), length[:12]]).all()


# ------------------------------------------------------------------------ flags and refusals


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


def test_a_run_leaves_its_files_and_evaluates_again(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(*TINY, "--out", out, "--seed", 4) == 0
    assert set(os.listdir(out)) == {"config.json", "train.csv", "eval.csv", "checkpoint.npz",
                                    "summary.json", "episodes.png", "curve.png"}
    summary = read_json(out / "summary.json")
    assert (summary["agent"], summary["seed"], summary["env_steps"]) == ("td3", 4, 1000)
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
    task = envs.make_task(env)
    task.limit = 100                                    # six episodes
    monkeypatch.setitem(envs.TASKS_ONLINE, env, lambda: task)
    monkeypatch.setattr(online, "draw", lambda *_: None)
    whole, parts, other = tmp_path / "whole", tmp_path / "parts", tmp_path / "other"
    words = (*TINY, "--env", env, "--subgoal-interval", 10)
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
