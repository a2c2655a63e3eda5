"""Tests of lab/hiro_ablations.py: what each variant changes, by hand, and that it gets there.

    python -m pytest lab/test_hiro_ablations.py         6 seconds
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import numpy as np
import pytest

import envs
import hiro
from lab import hiro_ablations as ablations
from lab.test_td3 import ENDS, stop, toy_replay
from nets import flatten, tree_map
from support.runs import Run

SMALL = {"subgoal_interval": 5, "steps": 150, "warmup": 100, "batch_size": 16, "hidden_dims": (8,),
         "high_updates": 1, "eval_episodes": 1}


def small_config(variant, **changes):
    return ablations.resolve({"variant": variant, **SMALL, **changes})


def small_task():
    """The U-maze with episodes of 50 steps."""
    task = envs.make_task("point-umaze")
    task.limit = 50
    return task


def toy_batch(sample_steps, goal_range):
    config = hiro.resolve({"subgoal_interval": 4, "batch_size": 20000})
    return sample_steps(toy_replay(), np.random.default_rng(0), np.array([goal_range]), config)


# ------------------------------------------------------------------------------ parts, by hand


def test_low_level_goals_at_other_states_of_the_batch():
    """Noise of a tenth of the range, no clipping; the goal stays the same."""
    batch = toy_batch(ablations.relabelled_steps, 20.0)
    s, g = batch["observations"][:, 0], batch["observations"][:, 2]
    assert abs(np.corrcoef(s, s + g)[0, 1]) < 0.05              # the place has nothing of s
    assert (s + g).mean() == pytest.approx(s.mean(), abs=0.15)
    assert (s + g).var() == pytest.approx(s.var() + 4, rel=0.05)
    np.testing.assert_allclose(batch["rewards"], -np.abs(g - 1), rtol=1e-5)
    np.testing.assert_array_equal(batch["next_observations"], np.stack([s + 1, -s - 1, g], 1))
    assert np.abs(toy_batch(ablations.relabelled_steps, 2.0)["observations"][:, 2]).max() > 15


def test_the_next_goal_at_a_windows_end_is_the_one_given():
    """If the next window begins there, as 1 and 4 do: 2 begins elsewhere, and 3 where 2 was before
    its end."""
    replay = toy_replay()
    replay["states"][2, 0, 1] += 0.5
    replay["states"][3, 0] = replay["states"][2, 2]
    config = hiro.resolve({"subgoal_interval": 4, "batch_size": 20000})
    sample = [np.random.default_rng(0), np.array([2.0]), config]
    batch = ablations.steps_with_next_goal(replay, *sample)
    plain = hiro.sample_steps(replay, np.random.default_rng(0), *sample[1:])
    x1, g1 = batch["next_observations"][:, 0], batch["next_observations"][:, 2]
    given = np.isin(x1, ENDS[[0, 3]])
    assert (g1 == np.where(given, x1 + 10, plain["next_observations"][:, 2])).all()
    for name in ("observations", "actions", "rewards", "masks"):
        assert (batch[name] == plain[name]).all()
    replay["count"][...] = 1                                    # no window follows the newest
    batch = ablations.steps_with_next_goal(replay, *sample)
    assert (batch["next_observations"][:, 2] == 10 - batch["next_observations"][:, 0]).all()


def test_a_blind_low_level_sees_neither_x_nor_y():
    batch, plain = (toy_batch(f, 2.0) for f in (ablations.blind_steps, hiro.sample_steps))
    for name, x in plain.items():
        shown = [0, 0, 1] if "observations" in name else 1
        np.testing.assert_array_equal(batch[name], x * np.float32(shown))
    config, rng = small_config("blind"), np.random.default_rng(0)
    agent = hiro.init_agent(config, (3, 2, 2, 2), rng, 1.0)          # x, y and a third number
    acting = ablations.actor(agent, config)
    s, g = (rng.normal(size=(5, n)).astype(np.float32) for n in (3, 2))
    for k, sees in ((0, False), (1, False), (2, True)):
        other = s.copy()
        other[:, k] += 1
        assert (acting.low(other, g) != acting.low(s, g)).any() == sees
        assert (acting.high(other, g) != acting.high(s, g)).any()       # the high level sees all
    assert (acting.low(s, g + 1) != acting.low(s, g)).any()


def test_squared_loss():
    rng = np.random.default_rng(0)
    networks = tree_map(lambda w: w + 0.2 * rng.normal(size=w.shape), hiro.td3_init(
        rng, 3, 2, hiro.resolve({"hidden_dims": (6, 5)}))["online"])
    batch = {"observations": rng.normal(size=(7, 3)), "actions": rng.normal(size=(7, 2))}
    y = 5 * rng.normal(size=7)
    loss, grads = ablations.squared_loss(networks, batch, y)
    q, _ = hiro.critic(networks["critic"], *batch.values())
    assert loss == pytest.approx(((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean())
    errors = nets.derivative_error(lambda p: ablations.squared_loss(p, batch, y)[0], networks,
                                   grads)
    assert max(errors.values()) < 1e-9 and set(grads) == {"critic"}


def test_walls_that_undo_a_move():
    task = envs.make_task("point-umaze-undo")
    at, a = np.array([[1.0, 1.95]]), np.array([[1.0, 1.0]])
    np.testing.assert_array_equal(task.move(at, a), at)
    np.testing.assert_allclose(task.move(at, -2 * a), at - 0.2)


def test_settings():
    """The published ones go before those of the task, flags before both; what has no effect or does
    not fit is refused."""
    config = ablations.resolve({"variant": "published", "env": "point-push", "tau": 0.1})
    assert (config.tanh_penalty, config.hidden_dims, config.tau) == (0, (300, 300), 0.1)
    for given, culprit in (
            ({}, "--variant"), ({"variant": "blind", "pretrain_steps": 9000}, "--pretrain-steps"),
            ({"variant": "pretrain", "correction": "off_policy"}, "--correction"),
            ({"variant": "pretrain", "pretrain_steps": 57_500}, "--pretrain-steps 57500"),
            ({"variant": "goal-range-measured", "goal_range": 3.0}, "--goal-range")):
        with pytest.raises(ValueError, match=culprit):
            ablations.resolve(given)


# ------------------------------------------------------------------------------------- runs


def test_each_variant_changes_the_low_level():
    """Of one seed, after 50 steps with updates; `published` with hiro's settings does not."""
    def left(agent):
        return b"".join(x.tobytes() for x in flatten(agent["low"]["online"]).values())

    plain = left(hiro.train(small_task(), hiro.resolve(SMALL)).agent)
    settings = {name: getattr(hiro.resolve(SMALL), name) for name in ablations.PUBLISHED}
    for variant in set(ablations.VARIANTS) - {"pretrain"}:
        config = small_config(variant, **(settings if variant == "published" else {}))
        result = ablations.train(small_task(), config)
        assert (left(result.agent) == plain) == (variant == "published"), variant
        assert isinstance(result.actor, ablations.BlindActor) == (variant == "blind")


def test_pretraining_is_of_one_level_then_of_the_other(tmp_path, monkeypatch):
    """Of the low level from step 100 to 400, of the high level, after another warm-up with an empty
    replay, from 500 to 800. Stopped in both parts the run ends as if it had never been."""
    monkeypatch.setattr(hiro, "draw", lambda *x: None)
    config, folder = small_config("pretrain", steps=800, pretrain_steps=400), str(tmp_path / "run")
    whole = ablations.train(small_task(), config).agent
    first = stop(ablations.train, small_task(), config, ablations.PROGRAM, folder, 350)
    half = tree_map(np.copy, first.agent)
    second = stop(ablations.train, small_task(), config, ablations.PROGRAM, folder, 450, first)
    frozen = tree_map(np.copy, second.agent["low"])
    run = Run(ablations.PROGRAM, config, folder, second)
    end = ablations.train(small_task(), config, run).agent
    assert {name: x.tobytes() for name, x in flatten(end).items()} == {
        name: x.tobytes() for name, x in flatten(whole).items()}
    assert (half["low"]["count"], half["high"]["count"], half["replay"]["count"]) == (250, 0, 70)
    assert (end["low"]["count"], end["high"]["count"], end["replay"]["count"]) == (300, 60, 80)
    assert half["replay"]["goal"][:70].std() == pytest.approx(1, rel=0.15)      # half the range
    for name, x in flatten(frozen).items():
        assert (x == flatten(end["low"])[name]).all()
    s, a, g = (end["replay"][name][:80] for name in ("states", "actions", "goal"))
    acting = ablations.actor(end, config)
    np.testing.assert_allclose(a[:, 0], acting.low(s[:, 0], g), atol=1e-6)          # no noise
    assert np.abs(g[:20]).max() < 2 == np.abs(g).max()              # uniform in the warm-up
