"""Tests of lab/theory.py: formula against simulation, cases by hand, and what the program leaves.
And of lab/animation.py: both agents on their mazes, a gif of several frames.

    python -m pytest lab/test_theory.py         15 seconds
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import os
import sys

import numpy as np
import pytest

import envs
import hiql
import hiro
from lab import animation, theory
from support import plots
from support.runs import Run, read_json


def run(*words):
    """`python -m lab.theory` in this process; returns the exit code."""
    old, sys.argv = sys.argv, ["theory.py", *map(str, words)]
    try:
        return theory.main()
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = old


def test_chain_of_proposition_4_1():
    """The closed form against known numbers, and against simulated noise in each of its parts."""
    for T, k, sigma, flat, bound in ((10, 3, 0.3, 0.320, 0.156), (25, 5, 0.2, 0.389, 0.166),
                                     (50, 7, 0.2, 0.444, 0.322), (100, 10, 0.2, 0.472, 0.482)):
        formula = [theory.chain_error(d, sigma) for d in (T, T / k, k)]
        assert abs(formula[0] - flat) < 6e-4 and abs(formula[1] + formula[2] - bound) < 6e-4
        seen = theory.chain_simulation(T, k, sigma, 200_000, np.random.default_rng(T))
        high, low = formula[1:]
        for name, p in (("flat", formula[0]), ("either", high + low - high * low),
                        ("first", high + low - 2 * high * low)):
            assert abs(seen[name] - p) < 5 * np.sqrt(p * (1 - p) / 200_000), (T, name)
    k = np.arange(1, 101)                       # the best k is the square root of T
    for T, sigma in ((25, 0.1), (100, 0.1), (100, 0.3)):
        high, low = theory.chain_error(T / k, sigma), theory.chain_error(k, sigma)
        assert k[(high + low - 2 * high * low).argmin()] == np.sqrt(T)
        assert (k[(high + low).argmin()] == np.sqrt(T)) == (sigma < 0.2)    # the bound's is not
    for sigma, k, useful in ((0.2, 30, True), (0.35, 86, False)):            # the bound's best k
        bound = [theory.chain_error(100 / x, sigma) + theory.chain_error(x, sigma)
                 for x in range(1, 101)]
        assert np.argmin(bound) + 1 == k
        assert (min(bound) < theory.chain_error(100, sigma)) == useful


def test_first_actions_by_hand():
    """A corridor of seven cells: noise of one value misleads only the policy that compares it."""
    env = envs.GridWorld("grid-tiny", "umaze")
    order = np.argsort(env.distance[np.flatnonzero((env.distance == 6).any(1))[0]])
    a, b, c, d, e, f, g = order                         # along the corridor
    v = -env.distance.astype(float)
    assert all((right == (env.distance > 0)).all() for right in theory.first_actions(env, v, 2))
    v[c, g] = -9                                        # seen from b and d on the way to g
    flat, hierarchy = theory.first_actions(env, v, 2)
    wrong = np.argwhere((flat != (env.distance > 0)))
    assert wrong.tolist() == [[b, g]]                   # d has nothing better behind it
    assert hierarchy[b, g] and hierarchy[a, g]          # only d, only c is two steps away
    v = -env.distance.astype(float)
    v[f, g] = v[e, g] = -9                              # the high-level policy at c sees a and e
    flat, hierarchy = theory.first_actions(env, v, 2)
    assert flat[c, g] and not hierarchy[c, g]
    v = -env.distance.astype(float)
    v[d, e] = -9                                        # the low-level policy at c, on the way to e
    flat, hierarchy = theory.first_actions(env, v, 2)
    assert flat[c, g] and not hierarchy[c, g]


def test_shares_of_wrong_first_actions():
    """None by the exact value; by its opposite the flat policy's are all wrong, at any distance."""
    env, k = envs.make("grid-fourrooms"), 5
    for sign, flat in ((-1, 0), (1, 1)):
        seen = theory.wrong_first_actions(env, sign * env.distance.astype(float), k)
        assert seen["wrong_first_flat"] == flat
        assert seen["wrong_flat_by_distance"] == [flat] * env.distance.max()
        if sign == -1:
            assert seen["wrong_first_hierarchy"] == 0 == max(seen["wrong_hierarchy_by_distance"])
    short_sighted = np.where(env.distance <= 3, -env.distance, env.distance)
    seen = theory.wrong_first_actions(env, short_sighted, k)
    wrong = seen["wrong_flat_by_distance"]
    assert wrong[:2] == [0, 0] and wrong[4:] == [1] * (env.distance.max() - 4)
    assert seen["wrong_first_flat"] == 1                # of the far pairs alone
    env = envs.GridWorld("grid-tiny", "umaze")          # no pair is 8 steps apart: the ends alone
    v = np.where(env.distance == 6, 1.0, -env.distance)
    assert theory.wrong_first_actions(env, v, 2)["wrong_first_flat"] == 1
    assert theory.wrong_first_actions(env, -env.distance, 2)["wrong_first_flat"] == 0


def test_value_and_action_sufficiency():
    env = envs.GridWorld("grid-tiny", "umaze")
    v = -env.distance.astype(float)
    errors = [np.abs(theory.low_rank_value(v, r) - v).mean() for r in (1, 2, 4, 7)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 > 1e-9 > errors[-1]
    assert np.linalg.matrix_rank(theory.low_rank_value(v, 2)) == 2
    # from place p of 0..6, goals at p - d and p + d have one value and need two moves
    unsure, wrong = theory.action_insufficiency(env)
    assert unsure == pytest.approx(2 * (1 + 2 + 3 + 2 + 1) / 42) and wrong == unsure / 2


@pytest.mark.parametrize("name", ["grid-fourrooms", "point-medium"])
def test_signs_of_advantages(name):
    """All right by the exact value, all wrong by its opposite; by a value that is right only near
    the goal the low-level policy's stay right, and those of the others far away are wrong."""
    env = envs.make(name)
    data = envs.collect(env, np.random.default_rng(0), episodes=50, rows=60)

    def shares(value):
        return theory.right_signs(env, data, value, 4, np.random.default_rng(0), n=500)

    for sign, right in ((-1, 1), (1, 0)):
        length, seen = shares(lambda s, g: sign * env.path_length(s, g))
        assert list(seen) == ["flat", "high", "low"] and (np.diff(length) > 0).all()
        assert all((x == right).all() and len(x) == len(length) for x in seen.values())
    reach = 6 * env.side                                # farther than any subgoal
    _, seen = shares(lambda s, g: np.where(env.path_length(s, g) < reach, -1, 1)
                     * (env.path_length(s, g) - reach))
    assert (seen["low"] == 1).all()
    for policy in ("flat", "high"):
        assert seen[policy][0] == 1 and seen[policy][-1] == 0


def test_program_prints_and_keeps_its_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for wrong, words in ((("--seed", -1), "--seed must be at least 0, not -1"),
                         (("--run", "a", "--seed", 0), "--run takes no other flag"),
                         (("--run", "a"), "a holds no run")):
        assert run(*wrong) == 2
        assert words in capsys.readouterr().err
    assert not run("--seed", 7, "--out", "a")
    assert "bound 0.482, high-level or low-level policy errs 0.42" in capsys.readouterr().out
    assert sorted(os.listdir("a")) == ["config.json", "summary.json"]
    assert read_json("a/config.json")["config"] == {"theory": True, "seed": 7}
    seen = read_json("a/summary.json")
    assert seen["seed"] == 7 and seen["chain_bound"] == pytest.approx(0.482, abs=5e-4)
    for name, share in (("chain_flat", 0.472), ("chain_either", 0.424), ("chain_first", 0.366)):
        assert abs(seen[name] - share) < 2e-3               # the known shares, T 100
    assert seen["maze_hierarchy_0.1"] < 0.06 < 0.2 < seen["maze_flat_0.1"] < 0.28
    assert seen["wrong_at_rank_48"] == 0 < seen["wrong_at_rank_8"] < seen["wrong_at_rank_3"]
    assert run("--out", "a") == 2 and "a holds files" in capsys.readouterr().err


def test_theory_is_drawn(monkeypatch):
    """Formula and simulation over the distance, and the errors over the rank of the value."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    theory.draw_theory("", n=4000)
    axes = figures[0].axes
    formula, bound, flat, either = (line.get_ydata() for line in axes[2].lines[:4])
    assert np.abs(flat - formula).max() < 0.04 and (either <= bound + 0.04).all()
    value, action, unsure, wrong = (line.get_ydata() for line in axes[5].lines)
    assert value[-1] < 1e-6 and action[-1] == 0 and unsure[0] > 0.4 > 0.2 > wrong[0] > 0.1


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of two tiny runs, of hiql and of hiro."""
    folder = tmp_path_factory.mktemp("runs")
    tiny = {"quick": True, "steps": 10, "eval_interval": 10, "eval_episodes": 1}
    with pytest.MonkeyPatch.context() as patch:         # no pictures, and short episodes
        patch.setattr(hiql, "draw", lambda *_: None)
        patch.setattr(hiro, "draw", lambda *_: None)
        patch.setattr(envs.PointMaze, "limits", lambda env, s, g: np.full(len(s), 10))
        config = hiql.resolve(tiny)
        hiql.train(None, config, run=Run(hiql.PROGRAM, config, str(folder / "hiql")))
        config = hiro.resolve({**tiny, "steps": 250, "warmup": 200, "eval_interval": 300})
        hiro.train(None, config, Run(hiro.PROGRAM, config, str(folder / "hiro")))
    return str(folder / "hiql"), str(folder / "hiro")


def test_signs_of_a_run_are_drawn(runs, monkeypatch, capsys):
    """`--run` asks the value of the run itself; here one that is right everywhere."""
    lines, asked = [], []

    def exact(params, s, g, config, env):
        asked.append(set(params))
        return -env.path_length(s, g)

    monkeypatch.setattr(hiql, "value_map", exact)
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: lines.extend(
        figure.axes[0].lines))
    assert not run("--run", runs[0])
    assert os.path.join(runs[0], "signal.png") in capsys.readouterr().out and "value" in asked[0]
    assert [line.get_label().split(":")[0] for line in lines] == ["flat", "high-level", "low-level"]
    assert all((line.get_ydata() == 1).all() for line in lines)


def test_animated_episodes_are_those_of_the_agents(runs, tmp_path, monkeypatch, capsys):
    """HIQL starts in task 4's cell, its aims are free places; HIRO's are kept for a window. The gif
    is written whole."""
    env, path, goal, aims, values = animation.hiql_episode(runs[0])
    start, end = env.centre(env.tasks[3])
    assert np.abs(path[0] - start).max() <= 1 and np.abs(goal - end).max() <= 1
    assert len(aims) == len(path) and env.is_free(aims).all() and (values < 0).any()
    _, path, goal, aims = animation.hiro_episode(runs[1])
    assert goal.tolist() == [0, 8] and (aims[:10] == aims[0]).all() and len(aims) >= len(path) - 1
    assert (np.abs(aims[0] - path[0]) <= 2 + 1e-5).all()
    monkeypatch.setattr(animation, "FRAMES", 3)
    monkeypatch.setattr(sys, "argv", ["animation.py", *runs, str(tmp_path / "a.gif")])
    animation.main()
    assert [x.name for x in tmp_path.iterdir()] == ["a.gif"]
    assert (tmp_path / "a.gif").read_bytes()[:6] == b"GIF89a"
    for words, message in (([], "give two runs"), (runs[::-1], "not of `python hiql.py`")):
        monkeypatch.setattr(sys, "argv", ["animation.py", *words])
        with pytest.raises(SystemExit):
            animation.main()
        assert message in capsys.readouterr().err
