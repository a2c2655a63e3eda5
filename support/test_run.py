"""Tests of the harness: flags, refusals, runs and their files, resume, seeds, evaluation.

    python -m pytest support/test_run.py            a minute
    python -m pytest support/test_run.py -m slow    resume in the four rooms, ten seconds

hiql.py and hiro.py are the programs that are run; those of lab/ have their own tests.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import envs
import hiql
import hiro
import support.run
from lab import baselines, ogbench, td3
from nets import flatten
from support import offline, online
from support.files import load_tree, read_json, read_rows, write_json
from support.flags import parser
from support.run import HERE, Run, generators, main, run_processes

TINY = ("--quick", "--steps", 20, "--eval-interval", 10, "--eval-episodes", 1, "--env",
        "grid-fourrooms")
TINY_HIRO = ("--steps", 1100, "--warmup", 500, "--eval-interval", 500, "--eval-episodes", 2,
             "--batch-size", 32, "--high-updates", 1, "--hidden-dims", "16,16")


def run(program, *words):
    """`python hiql.py WORDS` (or hiro.py) in this process; returns the exit code."""
    old = sys.argv, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    sys.argv = [f"{program.__name__}.py", *map(str, words)]
    try:
        main(program)
    except SystemExit as e:
        return e.code or 0
    finally:
        sys.argv = old[0]
        signal.signal(signal.SIGINT, old[1])
        signal.signal(signal.SIGTERM, old[2])
    return 0


def without_seconds(rows):
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]


def shorten_episodes(monkeypatch, env):
    """Episodes of 100 steps in an online task."""
    task = envs.make_task(env)
    task.limit = 100
    monkeypatch.setitem(envs.TASKS_ONLINE, env, lambda: task)


def interrupt_at(monkeypatch, program, n):
    """Ctrl-C at the n-th update (or window) of the program's loop; -> the plain loop."""
    plain = program.learn

    def learn(*arguments):
        for i, result in enumerate(plain(*arguments), 1):
            if i == n:
                os.kill(os.getpid(), signal.SIGINT)
            yield result

    monkeypatch.setattr(program, "learn", learn)
    return plain


# -------------------------------------------------------------------------- flags and refusals


@pytest.mark.parametrize("config", [hiql.Config, hiro.Config, baselines.Config, td3.Config])
def test_every_flag_reaches_the_config(config):
    p = parser(config, "")
    for field in dataclasses.fields(config):
        choices, default = field.metadata["choices"], field.default
        value = choices[-1] if choices else (not default) if isinstance(default, bool) else (
            (7, 5)) if isinstance(default, tuple) else type(default)(3)
        flag = "--" + field.name.replace("_", "-")
        words = [flag if value else "--no-" + flag[2:]] if isinstance(value, bool) else [
            flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
        assert vars(p.parse_args(words)) == {**vars(p.parse_args([])), field.name: value}


@pytest.mark.parametrize("program", [hiql, hiro, baselines, td3])
def test_help_names_every_flag_and_no_unknown_deviation(program, capsys):
    assert run(program, "--help") == 0
    said = capsys.readouterr().out
    for field in dataclasses.fields(program.Config):
        assert f"--{field.name.replace('_', '-')} " in said.replace("\n", " ").replace(",", " ")
    known = re.findall(r"^ ([DE]\d+) ", "".join(x.__doc__ for x in (hiql, hiro, ogbench)), re.M)
    tags = set(re.findall(r"\[([DE]\d+)\]", said))
    assert tags and tags <= set(known)


WRONG = [("--env point-tiny", "invalid choice"),
         ("--agent flat", "unrecognized arguments: --agent flat"),
         ("--stepz 5", "did you mean --steps"), ("--steps 0", "--steps must be positive"),
         ("--steps many", "invalid int"), ("--batch-size -4", "--batch-size must be positive"),
         ("--hidden-dims 64,0", "--hidden-dims"), ("--hidden-dims a", "must be integers"),
         ("--lr -1", "--lr"), ("--lr nan", "--lr"), ("--discount 1", "--discount"),
         ("--discount 1.5", "--discount"), ("--expectile 0", "--expectile"), ("--tau 2", "--tau"),
         ("--goal-discount 1", "--goal-discount"),
         ("--value-p-curgoal 0.6", "must not exceed 1 together"),
         ("--value-p-trajgoal -0.1", "--value-p-trajgoal"),
         ("--value-p-curgoal 1.1", "--value-p-curgoal must be in [0, 1]"),
         ("--actor-p-randomgoal 2", "--actor-p-randomgoal"),
         ("--subgoal-steps 201", "--subgoal-steps 201 must be below the 200 transitions"),
         ("--subgoal-steps 0", "--subgoal-steps must be positive"),
         ("--action-free 1", "hides the actions of all"), ("--seed -1", "--seed"),
         ("--policy-steps -1", "--policy-steps"), ("--encoding bumps", "unknown encoding 'bumps'"),
         ("--encoding rbf --env grid-maze", "--encoding rbf is for point mazes"),
         ("--encoding rbf --rep-type none", "subgoals by phi"),
         ("--dataset nowhere.npz", "nowhere.npz"), ("--dataset nets.py", "not an npz file"),
         ("--resume nowhere", "nowhere"), ("--eval .", "config.json"), ("--jobs 0", "--jobs"),
         ("--seeds 3-1", "seeds are A-B"), ("--seeds 0-1 --seed 2", "not both"),
         ("--resume x --steps 5", "give no other"), ("--eval x --resume y", "give no other"),
         ("--subgoal-interval 0", "--subgoal-interval"), ("--out /dev/null/x", "/dev/null"),
         ("--rep-dim 1", "--rep-dim"), ("--temperature 1", "--temperature is for"),
         ("--no-train-flat --flat-alpha 3", "--flat-alpha has no effect with --no-train-flat"),
         ("--rep-type none --rep-dim 4", "--rep-dim has no effect with --rep-type none"),
         ("--high-alpha -1", "--high-alpha"), ("--eval-episodes 0", "--eval-episodes")]

WRONG_HIRO = [("--env point-medium", "invalid choice"),
              ("--agent td3", "unrecognized arguments: --agent td3"),
              ("--subgoal-interval 0", "--subgoal-interval must be positive"),
              ("--steps -1", "--steps must be positive"),
              ("--steps 2500", "--steps 2500 must be above --warmup 2500"),
              ("--pretrain 100", "--pretrain 100 must lie between --warmup 2500"),
              ("--relabel-low-goals --goal-at-window-end new",
               "--goal-at-window-end new is the next goal given"),
              ("--batch-size 0", "--batch-size"), ("--hidden-dims 0", "--hidden-dims"),
              ("--low-discount 1", "--low-discount"), ("--high-discount 0", "--high-discount"),
              ("--tau 0", "--tau"), ("--candidates 1", "--candidates must be at least 2"),
              ("--seed -2", "--seed"),
              ("--warmup 5", "--warmup must be at least --subgoal-interval 10"),
              ("--policy-freq 0", "--policy-freq"), ("--low-noise -1", "--low-noise"),
              ("--high-noise nan", "--high-noise"),
              ("--noise-correlation 1", "--noise-correlation"),
              ("--correction some", "invalid choice"), ("--goal-range -2", "--goal-range"),
              ("--capacity 3", "--capacity"),
              ("--env grid-fourrooms --subgoal-interval 101 --goal-range 0",
               "of grid-fourrooms has 100"),
              ("--correction none --candidates 3", "--candidates has no effect with --correction"),
              ("--high-noise 0 --noise-correlation 0", "no effect with --high-noise 0"),
              ("--target-noise 0 --target-clip 1", "no effect with --target-noise 0"),
              ("--critic-loss l1", "invalid choice"), ("--correctoin none", "did you mean"),
              ("--resume nowhere", "nowhere"), ("--eval .", "config.json"),
              ("--seeds 3-1", "seeds are A-B"), ("--out /dev/null/x", "/dev/null")]


@pytest.mark.parametrize("program, words, message", [
    *((hiql, *wrong) for wrong in WRONG), *((hiro, *wrong) for wrong in WRONG_HIRO)])
def test_wrong_input_gets_one_line_and_exit_code_2(program, words, message, tmp_path, monkeypatch,
                                                   capsys):
    monkeypatch.chdir(tmp_path)
    assert run(program, *words.replace("nets.py", os.path.join(HERE, "nets.py")).split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert err.startswith(f"{program.__name__}.py: error: ")
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_of_the_warm_up_has_goals_without_a_range(tmp_path, monkeypatch):
    """--goal-range 0 is measured at the warm-up's end; a run is saved, and resumed, before it."""
    shorten_episodes(monkeypatch, "point-umaze")
    monkeypatch.setattr(online, "draw", lambda *_: None)
    words = (*TINY_HIRO, "--goal-range", 0, "--eval-interval", 200, "--steps", 700)
    assert run(hiro, *words, "--out", tmp_path / "whole") == 0
    plain, steps = Run.save, []

    def save(self, agent, generators):
        steps.append(int(agent["step"]))
        assert np.isnan(agent["goal_range"]).all() == (steps[-1] < 500)
        self.stopped = signal.SIGINT if steps[-1] < 500 else 0
        plain(self, agent, generators)

    monkeypatch.setattr(Run, "save", save)
    assert run(hiro, *words, "--out", tmp_path / "parts") == 130 and steps == [200]
    monkeypatch.setattr(Run, "save", plain)
    assert run(hiro, "--resume", tmp_path / "parts") == 0
    whole, parts = (flatten(load_tree(tmp_path / x / "checkpoint.npz")) for x in ("whole", "parts"))
    assert all((x == parts[name]).all() for name, x in whole.items() if name != "seconds")


@pytest.mark.parametrize("program, name, value, choices", [
    (hiql, "rep_type", "phi", "phi_sg, phi_g, none"), (hiro, "critic_loss", "l1", "huber, squared"),
    (hiro, "correction", "of_policy", "off_policy, none")])
def test_unknown_words_are_refused_from_python_too(program, name, value, choices):
    with pytest.raises(ValueError, match=f"must be one of {choices}, not {value}"):
        program.resolve({name: value})


# --------------------------------------------------------------------------------------- runs


def test_a_run_leaves_its_files_and_evaluates_again(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(hiql, *TINY, "--out", out, "--seed", 4) == 0
    assert set(os.listdir(out)) == {"config.json", "train.csv", "eval.csv", "checkpoint.npz",
                                    "summary.json", "trajectories.png", "value.png", "curve.png"}
    summary = read_json(out / "summary.json")
    assert summary["seed"] == 4 and summary["updates"] == 20 and summary["episodes"] == 5
    assert summary["success"] == pytest.approx(np.mean(summary["success_per_task"]))
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"grid-fourrooms, seed 4: hiql and, to compare, a flat policy on the same "
                        r"value; 20 updates of 128 of 200,000 transitions, about \d+ seconds",
                        said[0])
    assert said[-1].startswith(f"files in {out}: checkpoint.npz config.json ")
    told = [line for line in said if re.match(r"\w+: ", line)]
    assert 5 <= len(told) <= 12 and not [line for line in told if "curve" in line], told
    assert run(hiql, "--eval", out) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    for name in ("success", "success_random", "flat_success_random", "success_per_task"):
        x = summary[name]
        assert printed[name] == str(round(x, 4) if isinstance(x, float) else x)
    assert run(hiql, *TINY, "--out", out) == 2              # nothing is overwritten
    assert "already holds a run" in capsys.readouterr().err
    assert read_json(out / "summary.json") == summary
    act = hiql.load(out)                                    # the trained agent, for a program
    s = np.array([[1.0, 1.0], [3.0, 3.0]])
    assert act(s, s[::-1], 0).shape == (2,) and act(s, s[::-1], 1).dtype.kind == "i"


def test_a_hiro_run_leaves_its_files_and_evaluates_again(tmp_path, monkeypatch, capsys):
    shorten_episodes(monkeypatch, "point-umaze")
    out = tmp_path / "run"
    assert run(hiro, *TINY_HIRO, "--out", out, "--seed", 4) == 0
    assert set(os.listdir(out)) == {"config.json", "train.csv", "eval.csv", "checkpoint.npz",
                                    "summary.json", "episodes.png", "curve.png", "correction.png"}
    summary = read_json(out / "summary.json")
    assert summary["seed"] == 4 and summary["env_steps"] == 1100
    assert len(summary["success_curve"]) == 3
    rows = [row for row in read_rows(out / "train.csv") if row["relabel_fraction"]]
    for name in ("relabel_fraction", "relabel_distance", "relabel_gain"):
        assert summary[name] == pytest.approx(              # fewer than the last 20: all of them
            np.mean([float(row[name]) for row in rows]), rel=1e-4)
    assert summary["subgoal_error"] > 0
    assert summary["subgoal_error_curve"][-1] == round(summary["subgoal_error"], 3)
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"point-umaze, seed 4: hiro, with off-policy correction; 1,100 environment "
                        r"steps, about \d+ seconds", said[0])
    told = [line for line in said if re.match(r"\w+: ", line)]
    assert 5 <= len(told) <= 12, told
    assert run(hiro, "--eval", out) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    for name in ("success", "success_random", "final_distance"):
        assert float(printed[name]) == pytest.approx(summary[name], abs=1e-4)
    assert run(hiro, *TINY_HIRO, "--out", out) == 2         # nothing is overwritten
    assert "already holds a run" in capsys.readouterr().err
    act = hiro.load(out)()                                  # the trained agent, for a program
    obs, _ = envs.make_task("point-umaze").reset(seed=0)
    assert act(obs).shape == (2,) and np.abs(act(obs)).max() <= 1


@pytest.mark.parametrize("program, changes, words", [
    (hiql, {}, "hiql and, to compare, a flat policy on the same value"),
    (hiql, {"train_flat": False}, "hiql"),
    (hiro, {}, "hiro, with off-policy correction"),
    (hiro, {"correction": "none"}, "hiro, without off-policy correction"),
    (td3, {}, "td3, one policy without hierarchy"),
    (baselines, {"agent": "gciql"}, "gciql"),
    (baselines, {"agent": "straight"}, "straight")])
def test_the_title_says_what_is_trained(program, changes, words, small_data):
    assert program.prepare(program.resolve(changes)).title == words


@pytest.fixture
def small_data(monkeypatch):
    """Data sets of 20 trajectories."""
    plain = envs.collect
    monkeypatch.setattr(envs, "collect", lambda env, rng, **recipe: plain(
        env, rng, **{**recipe, "episodes": 20}))


def test_a_run_without_a_name_gets_a_free_folder(tmp_path, monkeypatch, small_data):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hiql, "draw", lambda *_: None)
    for name in ("grid-fourrooms_hiql_seed0", "grid-fourrooms_hiql_seed0_2"):
        assert run(hiql, *TINY, "--no-train-flat") == 0
        assert os.path.exists(tmp_path / "runs" / name / "summary.json")


def test_resume_equals_never_having_stopped(tmp_path, monkeypatch, capsys):
    """Stopped after update 13 and resumed: same bits, same logs; same seed, same bits."""
    monkeypatch.setattr(hiql, "draw", lambda *_: None)
    whole, parts, other = tmp_path / "whole", tmp_path / "parts", tmp_path / "other"
    assert run(hiql, *TINY, "--out", whole) == 0
    assert run(hiql, *TINY, "--out", other, "--eval-interval", 7) == 0
    plain = interrupt_at(monkeypatch, hiql, 13)
    assert run(hiql, *TINY, "--out", parts) == 130
    assert load_tree(parts / "checkpoint.npz")["update"] == 13
    assert not (parts / "summary.json").exists()
    assert f"go on with: python hiql.py --resume {parts}" in capsys.readouterr().out
    monkeypatch.setattr(hiql, "learn", plain)
    assert run(hiql, "--resume", parts) == 0
    trees = [flatten(load_tree(f / "checkpoint.npz")) for f in (whole, parts, other)]
    assert set(trees[0]) == set(trees[1]) == set(trees[2])
    for path, x in trees[0].items():
        if path != "seconds":
            assert (trees[1][path] == x).all(), path
            assert (trees[2][path] == x).all(), path    # more evaluations disturb nothing
    for name in ("train.csv", "eval.csv"):
        rows = [without_seconds(read_rows(f / name)) for f in (whole, parts)]
        assert rows[0] == rows[1] and rows[0]
    summary = (parts / "summary.json").read_text()
    assert run(hiql, "--resume", parts) == 0                # finished: left as it is
    assert (parts / "summary.json").read_text() == summary
    assert "is finished" in capsys.readouterr().out


def data_file(path, **changes):
    """A file of 12 random trajectories of 25 rows: states of four numbers, two of an action."""
    rng = np.random.default_rng(0)
    arrays = {"observations": np.cumsum(rng.normal(size=(300, 4)), 0).astype(np.float32),
              "actions": rng.uniform(-1, 1, (300, 2)).astype(np.float32),
              "terminals": np.arange(1, 301) % 25 == 0}
    np.savez(path, **{**arrays, **{name: change(arrays[name]) for name, change in changes.items()}})
    return path


def test_data_of_no_environment(tmp_path, monkeypatch, capsys):
    """`hiql.py --dataset FILE`: trained without success, stopped and resumed to the same bits,
    loaded; a file that has changed is refused."""
    file = data_file(tmp_path / "data.npz")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = ("--dataset", file, "--quick", "--steps", 20, "--eval-interval", 8, "--goal-indices",
             "2,0")
    assert run(hiql, *words, "--out", whole) == 0
    out = capsys.readouterr().out
    assert out.startswith("none, seed 0: hiql and, to compare, a flat policy") and (
        "success -" in out and "success:" not in out)
    assert set(os.listdir(whole)) == {"config.json", "train.csv", "checkpoint.npz", "summary.json",
                                      "curve.png"}
    plain = interrupt_at(monkeypatch, hiql, 13)
    assert run(hiql, *words, "--out", parts) == 130
    monkeypatch.setattr(hiql, "learn", plain)
    assert run(hiql, "--resume", parts) == 0
    trees = [flatten(load_tree(f / "checkpoint.npz")) for f in (whole, parts)]
    assert all((x == trees[1][path]).all() for path, x in trees[0].items() if path != "seconds")
    act, states = hiql.load(whole), np.zeros((3, 4), np.float32)
    assert act(states, states[:, :2] + 1, 0).shape == (3, 2)
    capsys.readouterr()
    assert run(hiql, "--eval", whole) == 2
    assert "data alone has no environment to be evaluated in; from" in capsys.readouterr().err
    for changes in ({"actions": lambda a: a / 2}, {"observations": lambda s: s[:, :3]}):
        data_file(file, **changes)
        assert run(hiql, "--eval", whole) == 2
        assert "the data are not those of the run" in capsys.readouterr().err


@pytest.mark.parametrize("changes, message", [
    ({"observations": lambda x: x[:, 0]}, "observations (N,d), actions (N,...)"),
    ({"observations": lambda x: x[:-1]}, "do not fit together"),
    ({"actions": lambda a: a[:-1]}, "do not fit together"),
    ({"actions": lambda a: 3 * a}, "actions must be (N, a) numbers in [-1, 1] or (N,) integers"),
    ({"actions": lambda a: a[:, 0]}, "here they are float32 of shape (300,)"),
    ({"actions": lambda a: a[:, :, None]}, "here they are float32 of shape (300, 2, 1)"),
    ({"actions": lambda a: a[:, 0].round().astype(int) - 1}, "from -2 to 0"),
    ({"terminals": lambda x: 0 * x}, "the last row must end a trajectory")])
def test_wrong_data_of_no_environment_are_refused_in_one_line(changes, message, tmp_path, capsys):
    file = data_file(tmp_path / "data.npz", **changes)
    assert run(hiql, "--dataset", file, "--quick", "--out", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
    assert str(file) in said.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("env, window", [("point-umaze", 45), pytest.param(
    "grid-fourrooms", 150, marks=pytest.mark.slow)])
def test_hiro_resumes_as_if_never_stopped(env, window, tmp_path, monkeypatch):
    """Ctrl-C in the middle of an episode, then --resume: the same bits, replay, summary and
    pictures included; and once more without its summary, as if killed before its end."""
    shorten_episodes(monkeypatch, env)
    whole, parts, other = tmp_path / "whole", tmp_path / "parts", tmp_path / "other"
    words = (*TINY_HIRO, "--env", env, "--noise-correlation", 0.5, "--steps", 600, "--warmup", 300,
             "--eval-interval", 200)
    assert run(hiro, *words, "--out", whole) == 0
    with monkeypatch.context() as quick:
        quick.setattr(online, "draw", lambda *_: None)
        assert run(hiro, *words, "--out", other, "--eval-interval", 150) == 0
    plain = interrupt_at(monkeypatch, hiro, window)
    assert run(hiro, *words, "--out", parts) == 130
    assert load_tree(parts / "checkpoint.npz")["step"] == 500           # at the episode's end
    assert not (parts / "summary.json").exists()
    monkeypatch.setattr(hiro, "learn", plain)
    assert run(hiro, "--resume", parts) == 0
    trees = [flatten(load_tree(f / "checkpoint.npz")) for f in (whole, parts, other)]
    assert set(trees[0]) == set(trees[1])
    for path, x in trees[0].items():
        if path != "seconds":
            assert (trees[1][path] == x).all(), path
            assert (trees[2][path] == x).all() or "early" in path, path
    for name in ("train.csv", "eval.csv"):
        rows = [without_seconds(read_rows(f / name)) for f in (whole, parts)]
        assert rows[0] == rows[1] and rows[0]
    pictures = [{path.name: path.read_bytes() for path in f.glob("*.png")} for f in (whole, parts)]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 3
    summary = summary_of(whole)
    assert summary_of(parts) == summary
    (parts / "summary.json").unlink()
    monkeypatch.setattr(online, "draw", lambda *_: None)
    assert run(hiro, "--resume", parts) == 0 and summary_of(parts) == summary


def summary_of(folder):
    """summary.json without time and memory."""
    return {name: x for name, x in read_json(folder / "summary.json").items()
            if name not in ("train_seconds", "peak_mb")}


def test_sequential_schedule_trains_the_value_first(tmp_path):
    """As many updates of the policies as asked for, with their own Adam, evaluated alone."""
    out = tmp_path / "run"
    assert run(hiql, *TINY, "--policy-steps", 30, "--out", out) == 0
    assert read_json(out / "summary.json")["updates"] == 50
    assert [row["update"] for row in read_rows(out / "eval.csv")] == ["30", "40", "50"]
    rows = read_rows(out / "train.csv")
    assert {bool(row["value_loss"]) for row in rows if int(row["update"]) <= 20} == {True}
    assert {bool(row["value_loss"]) for row in rows if int(row["update"]) > 20} == {False}
    assert [bool(row["low_loss"]) for row in rows] == [not row["value_loss"] for row in rows]
    agent = load_tree(out / "checkpoint.npz")
    assert agent["optimiser"]["count"] == 30
    config = hiql.resolve({**read_json(out / "config.json")["config"], "steps": 300,
                           "hidden_dims": (64, 64)})
    for at in (20, 300):                                # 300: the value is done, no policy begun
        with pytest.raises(ValueError, match=f"after {at} updates, before its policies began"):
            hiql.evaluate_checkpoint(hiql.prepare(config), {**agent, "update": np.array(at)})
    losses = {**hiql.LOSSES, "flat": hiql.flat_loss}
    config = hiql.resolve({"quick": True, "policy_steps": 200})
    for u, names in ((0, ["value"]), (299, ["value"]), (300, ["flat", "high", "low"]),
                     (499, ["flat", "high", "low"])):
        assert sorted(hiql.schedule(losses, config, u)[0]) == names
    rates = [hiql.schedule(losses, config, u)[1] / config.lr for u in (0, 150, 225, 300, 400, 450)]
    np.testing.assert_allclose(rates, [1, 1, 0.5, 1, 1, 0.5])           # falls in each phase
    joint = hiql.resolve({"quick": True})
    assert all(set(hiql.schedule(losses, joint, u)[0]) == set(losses) for u in (0, 299))
    problem = SimpleNamespace(config=joint, losses=losses)
    assert not offline.no_policy_yet(problem, {"update": 0})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("program, words, message", [
    (hiql, (*TINY, "--lr", 1e30), r"the (value|high|low|flat) loss became nan at update \d"),
    (hiro, (*TINY_HIRO, "--critic-lr", 1e30), r"the (low|high) loss became (nan|inf) at step \d")])
def test_nan_stops_the_run_and_names_the_loss(program, words, message, tmp_path, capsys):
    assert run(program, *words, "--out", tmp_path / "r") == 1
    assert re.search(message, capsys.readouterr().err)


def test_an_agent_that_is_not_finite_is_not_saved(tmp_path):
    """But for the goal range of HIRO, which is NaN until it is measured."""
    old = signal.getsignal(signal.SIGINT)
    try:
        saved = Run(str(tmp_path / "r"), hiql.resolve({}))
        agent = {"params": {"w": np.ones(3)}, "goal_range": np.full(2, np.nan),
                 "update": np.array(7)}
        saved.save(agent, generators(0, "batch"))
        agent["params"]["w"][1] = np.inf
        agent["update"] += 1
        with pytest.raises(FloatingPointError, match="no longer finite at update 8"):
            saved.save(agent, generators(0, "batch"))
    finally:
        signal.signal(signal.SIGINT, old)
    assert load_tree(tmp_path / "r" / "checkpoint.npz")["update"] == 7


def test_a_broken_checkpoint_of_hiro_is_refused(tmp_path, monkeypatch, capsys):
    """One of other networks, and that of another program; in the warm-up there is no policy."""
    monkeypatch.setattr(online, "draw", lambda *_: None)
    out = tmp_path / "run"
    interrupt_at(monkeypatch, hiro, 20)
    assert run(hiro, *TINY_HIRO, "--warmup", 600, "--out", out) == 130
    assert run(hiro, "--eval", out) == 2
    assert "stopped in its warm-up; there is nothing to evaluate yet" in capsys.readouterr().err
    config = read_json(out / "config.json")
    for name, x in (("hidden_dims", [16, 8]), ("subgoal_interval", 5), ("see_position", False)):
        write_json(out / "config.json", {"config": {**config["config"], name: x}})
        for flag in ("--eval", "--resume"):
            assert run(hiro, flag, out) == 2
            assert "the checkpoint does not fit its config.json" in capsys.readouterr().err
    assert run(hiql, "--eval", out) == 2
    assert capsys.readouterr().err.startswith("hiql.py: error: ")


# ------------------------------------------------------------------------------ several seeds


def test_several_seeds_are_processes_of_their_own(tmp_path):
    out = tmp_path / "seeds"
    words = [sys.executable, os.path.join(HERE, "hiql.py"), *map(str, TINY), "--no-train-flat",
             "--seeds", "1-2", "--jobs", "2", "--out", str(out)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_rows(out / "seeds.csv")
    assert [row["seed"] for row in rows] == ["1", "2"] and "mean success" in done.stdout
    one = read_json(out / "seed1" / "summary.json")
    assert float(rows[0]["success_random"]) == pytest.approx(one["success_random"])
    assert read_json(out / "seed1" / "config.json")["config"]["train_flat"] is False


def test_processes_end_with_the_one_that_began_them(tmp_path):
    """A failure while others run: they are interrupted, and waited for."""
    code = ("import signal, sys, time\n"
            "signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[2] + '/saved', 'w'), "
            "sys.exit(143)))\nopen(sys.argv[2] + '/begun', 'w')\ntime.sleep(60)\n")
    (tmp_path / "long.py").write_text(code)
    (tmp_path / "short.py").write_text(
        "import os, sys, time\nwhile not os.path.exists(sys.argv[2] + '/../long/begun'):\n"
        "    time.sleep(0.05)\nopen(sys.argv[2] + '/summary.json', 'w').write('{}')\n")
    for name in ("long", "short"):
        (tmp_path / name).mkdir()

    def done(name, summary):
        raise ValueError("it does not fit")

    old = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(ValueError, match="it does not fit"):
            run_processes({name: ([str(tmp_path / f"{name}.py")], [], str(tmp_path / name))
                           for name in ("long", "short")}, 2, done)
    finally:
        signal.signal(signal.SIGTERM, old)
    assert os.path.exists(tmp_path / "long" / "saved")


# ------------------------------------------------------------------- evaluation of online runs


def test_subgoal_errors_by_hand():
    """c 2, five steps, two episodes: two whole windows, the third is cut short."""
    paths = np.zeros((6, 2, 2))
    paths[2, 0], paths[4, 0], paths[5] = (1, 1), (2, 2), 9
    asked = np.array([[[1, 1], [3, 4]], [[2, 5], [0, 1]], [[7, 7], [7, 7]]], float)
    assert online.subgoal_errors(paths, asked, 2).tolist() == [[0, 5], [3, 1]]


def test_the_peak_of_memory_is_in_mib(tmp_path, monkeypatch):
    """getrusage counts KiB on Linux and bytes on a Mac; Windows has none."""
    for platform, unit in (("linux", 2**10), ("darwin", 2**20)):
        monkeypatch.setattr(support.run.sys, "platform", platform)
        monkeypatch.setattr(support.run, "resource", SimpleNamespace(
            RUSAGE_SELF="self", getrusage={"self": SimpleNamespace(
                ru_maxrss=int(7.6 * unit))}.__getitem__))
        Run(str(tmp_path / platform), hiql.resolve({})).finish({"success": 1.0}, lambda: None)
        assert read_json(tmp_path / platform / "summary.json") == {"success": 1.0, "peak_mb": 8}
    monkeypatch.setattr(support.run, "resource", None)
    Run(str(tmp_path / "windows"), hiql.resolve({})).finish({"success": 1.0}, lambda: None)
    assert read_json(tmp_path / "windows" / "summary.json") == {"success": 1.0}


def test_summary_of_a_hiro_run_by_hand():
    """Means of the last 20 rows; curves: what the correction did up to each evaluation."""
    logs = {"train": [{"step": 100, "relabel_fraction": ""}] + [
        {"step": step, "relabel_fraction": x, "relabel_distance": 2 * x, "relabel_gain": -x}
        for step, x in ((1000, 0.25), (1500, 0.75), (2000, 1.0), (2001, 0.5), *(
            (step, 0.0) for step in range(2500, 4001, 80)))],
        "eval": [{"step": 500, "success": 0.5, "subgoal_error": 3},
                 {"step": 2000, "success": 0.95, "subgoal_error": 2},
                 {"step": 4000, "success": 0.0, "subgoal_error": 1}]}
    problem = SimpleNamespace(config=hiro.resolve({}), env=envs.make_task("point-umaze"),
                              agent="hiro")
    seen = online.summarise(problem, SimpleNamespace(logs=logs, seconds=lambda: 7.04),
                            logs["eval"][-1], 4000)
    assert (seen["relabel_fraction"], seen["relabel_distance"], seen["relabel_gain"]) == (
        0.025, 0.05, -0.025)
    assert seen["relabel_fraction_curve"] == [None, 0.667, 0.025]   # nothing before the first
    assert seen["relabel_gain_curve"] == [None, -0.667, -0.025]
    assert seen["subgoal_error_curve"] == [3, 2, 1] and seen["success_curve"] == [0.5, 0.95, 0]
    assert seen["first_success"] == 2000 and seen["train_seconds"] == 7.0
    assert (seen["env"], seen["env_steps"], seen["episodes"]) == ("point-umaze", 4000, 50)
    assert seen["success_lowest_late"] == 0
    late = {"train": [], "eval": [{"step": step, "success": x} for step, x in (
        (19_999, 0.1), (20_000, 0.9), (25_000, 0.6), (30_000, 1.0))]}
    seen = online.summarise(problem, SimpleNamespace(logs=late, seconds=lambda: 1.0),
                            late["eval"][-1], 30_000)
    assert seen["success_lowest_late"] == 0.6               # of 20,000 to 30,000


def test_a_run_notes_the_code_that_made_each_part(tmp_path, monkeypatch):
    """In config.json: commit and versions when it began, and those of a resumption that differ."""
    codes = [{"commit": str(i), "versions": {"numpy": "2.0"}} for i in range(3)]
    config, checkpoint = hiql.resolve({}), {"seconds": np.array(0.0), "update": np.array(0)}
    for code, more, parts in ((0, None, []), (0, checkpoint, []), (1, checkpoint, [1]),
                              (1, checkpoint, [1]), (2, checkpoint, [1, 2]),
                              (1, checkpoint, [1, 2, 1])):
        monkeypatch.setattr("support.run.code_and_versions", lambda: codes[code])
        Run(str(tmp_path / "run"), config, more)
        told = read_json(tmp_path / "run" / "config.json")
        assert {"commit": "0", "versions": {"numpy": "2.0"}}.items() <= told.items()
        assert told.get("resumed", []) == [codes[i] for i in parts]
        assert told["config"]["steps"] == config.steps


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_of_the_code(tmp_path, monkeypatch):
    """HEAD, with "+" if Python files are not as committed; "unknown" without a repository."""
    def git(*words):
        return subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a",
                               *words], check=True, capture_output=True, text=True).stdout

    def commit():
        return support.run.code_and_versions.__wrapped__()["commit"]

    monkeypatch.setattr(support.run, "HERE", str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() == "unknown"
    git("init")
    (tmp_path / "a.py").write_text("")
    git("add", "a.py")
    git("commit", "--message", "a")
    head = git("rev-parse", "HEAD")[:7]
    assert commit() == head
    (tmp_path / "notes.txt").write_text("")
    assert commit() == head
    (tmp_path / "a.py").write_text("changed")
    assert commit() == f"{head}+"
    monkeypatch.setenv("PATH", "")
    assert commit() == "unknown"
