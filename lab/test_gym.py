"""Tests of lab/gym.py: HIRO on environments that know nothing of this project.

    python -m pytest lab/test_gym.py            3 seconds
"""

import nets                             # first: it sets one BLAS thread before numpy loads

from types import SimpleNamespace

import numpy as np
import pytest

import hiql
import hiro
import lab.gym
from lab.gym import GymAdapter


class Field:
    """A point on a plane by Gymnasium's convention, foreign to this project: Box [0, 4]^2, pushes
    of (a - 2) / 4, success within 0.5 of the goal, the end beyond 6 or after 25 steps."""

    end, always = 6, None

    def __init__(self, seen=lambda s, time: [*s, time], keys=True):
        """seen: what of position and time is seen; keys: as a dict beside the goal."""
        self.seen, self.keys, self.seeds, self.actions = seen, keys, [], []
        self.action_space = type("Box", (), {"low": np.zeros(2), "high": np.full(2, 4.0),
                                             "dtype": np.dtype(np.float32)})()

    def observe(self):
        o = np.array(self.seen(self.s, self.time), float)
        if not self.keys:
            return o
        return {"observation": o, "achieved_goal": self.s.copy(), "desired_goal": self.goal.copy()}

    def reset(self, seed=None):
        self.s, self.time = np.zeros(2), 0
        self.goal = np.random.default_rng(seed).uniform(-3, 3, 2)
        if self.always:
            self.goal = np.array(self.always)
        self.seeds.append(seed)
        return self.observe(), {}

    def step(self, action):
        assert (action >= 0).all() and (action <= 4).all() and action.dtype == np.float32
        self.actions.append(action)
        self.s, self.time = self.s + (action - 2) / 4, self.time + 1
        distance = np.linalg.norm(self.s - self.goal)
        return (self.observe(), -distance, bool(np.abs(self.s).max() > self.end),
                self.time >= 25, {"is_success": distance < 0.5})


def array_field():
    return Field(lambda s, time: [time, *s], keys=False)


def field_config(**changes):
    return hiro.resolve({"goal_range": 0, "high_updates": 1, "subgoal_interval": 5, "steps": 250,
                         "warmup": 200, "eval_episodes": 2, "batch_size": 32, **changes})


def test_any_environment_is_trained_on():
    """Its states are its own, and the agent acts in its units; the range of goals is that which was
    measured before, or the config's."""
    env, config = Field(), field_config()
    result = lab.gym.train(env, config)
    replay, n = result.agent["replay"], int(result.agent["replay"]["count"])
    a = replay["actions"][:n, 0]                            # in [-1, 1]; the plane moves by half
    np.testing.assert_allclose(replay["states"][:n, 1, :2] - replay["states"][:n, 0, :2], a / 2,
                               atol=1e-5)
    measured = lab.gym.measure_goal_range(GymAdapter(Field()), config)
    np.testing.assert_array_equal(result.agent["goal_range"], np.float32(measured))
    obs, acting = env.reset(seed=1)[0], hiro.Actor(result.agent, config)()
    np.testing.assert_allclose(result.actor()(obs), 2 + 2 * acting(GymAdapter(env).read(obs)),
                               rtol=1e-6)
    assert result.summary["env"] == "Field" and "return" in result.summary
    agent = lab.gym.train(array_field(), field_config(goal_range=3.0), goal=[1.0, 2.0],
                          position=slice(1, 3)).agent
    assert agent["goal_range"].tolist() == [3, 3]
    assert (agent["replay"]["desired_goal"][0] == [1, 2]).all()
    np.testing.assert_array_equal(agent["replay"]["states"][0, :6, 2], np.arange(6))    # the time


def test_the_range_of_goals_is_measured():
    """Of whole windows: a uniform action is held for 10 steps, of up to 1/2 along x, and along y
    not at all; episodes of 25 steps end with a window of 5."""
    env = Field()
    env.end, plain = 100, env.step
    env.step = lambda a: plain(np.float32([a[0], 2]))
    config = field_config(subgoal_interval=10, warmup=5000, steps=6000, low_noise=0.0)
    found = lab.gym.measure_goal_range(GymAdapter(env), config)
    pushes = np.array(env.actions[2:])[:, 0].reshape(200, 25)  # without the adapter's own steps
    held = pushes[:, [0, 10]].reshape(400, 1)
    assert (pushes[:, :20].reshape(400, 10) == held).all() and len(np.unique(held)) == 400
    assert found[0] == pytest.approx(np.quantile(10 / 4 * np.abs(held - 2), 0.95))
    assert found[0] == pytest.approx(0.95 * 5, rel=0.05) and found[1] == 1e-6       # never 0


def test_observations_begin_with_the_position():
    """It is put first where it is not there already; actions of [-1, 1] fill the Box."""
    env = Field()
    adapter = GymAdapter(env)
    assert env.seeds == [0]                             # it looks at one state and the next
    adapter.reset(seed=2)
    obs, reward, terminated, truncated, info = adapter.step(np.array([1.0, -0.5]))
    assert obs["observation"].tolist() == [0.5, -0.25, 1]
    assert obs["achieved_goal"].tolist() == [0.5, -0.25] and (obs["desired_goal"] == env.goal).all()
    assert reward == -np.linalg.norm(env.s - env.goal) and not (terminated or truncated)
    assert adapter.action(np.array([-1.0, 1.0])).tolist() == [0, 4]
    at_rest = Field(lambda s, time: [0, 0, *s])         # begins with the position at the start
    for adapter, seen in ((GymAdapter(Field(lambda s, time: [time])), [0.5, 0, 1]),
                          (GymAdapter(at_rest), [0.5, 0, 0, 0, 0.5, 0]),
                          (GymAdapter(array_field(), [1, 2], slice(1, 3)), [0.5, 0, 1])):
        adapter.reset(seed=2)
        obs = adapter.step(np.array([1.0, 0.0]))[0]
        assert obs["observation"].tolist() == seen
    assert obs["desired_goal"].tolist() == [1, 2]


def test_evaluation_by_hand():
    """Success ever and at the last step, final distance and return, of an agent that reaches the
    goal and runs away from it; starts are new for each step, seed and episode."""
    env = Field()
    env.always = [1.0, 0.0]
    adapter = GymAdapter(env)

    def evaluate(action, step=0, seed=0):
        env.seeds.clear()
        return lab.gym.evaluate({"step": np.array(step)}, adapter, field_config(seed=seed),
                                lambda agent, config: lambda: lambda obs: np.array(action))

    x = np.arange(0.5, 6.51, 0.5)                       # the end is beyond 6, after 13 steps
    assert evaluate([1.0, 0.0]) == ({
        "success": 1.0, "success_last_step": 0.0, "final_distance": 5.5,
        "return": pytest.approx(-np.abs(x - 1).sum())}, {})
    first = env.seeds[:]
    assert evaluate([-1.0, 0.0])[0] == {
        "success": 0.0, "success_last_step": 0.0, "final_distance": 7.5,
        "return": pytest.approx(-np.abs(x + 1).sum())}
    assert env.seeds == first and len(set(first)) == 2
    for other in ({"step": 6}, {"seed": 1}):
        evaluate([-1.0, 0.0], **other)
        assert not set(first) & set(env.seeds)


class Odd(Field):
    """A Field of which one thing is as `changes` say: methods and attributes."""

    def __init__(self, **changes):
        super().__init__()
        self.action_space.low, self.action_space.high = -np.ones(2), np.ones(2)
        self.__dict__.update(changes)

    def reset(self, seed=None):
        obs, info = super().reset(seed)
        return self.change_reset(obs, info)

    def step(self, action):
        self.s, self.time = self.s + action / 4, self.time + 1
        return self.change_step(self.observe(), -1.0, False, self.time >= 25, {})

    def change_reset(self, obs, info):
        return obs, info

    def change_step(self, *made):
        return made


def rewarded(reward, at=1):
    """A change_step: another reward from that step on."""
    time = iter(range(1, 10**6))
    return lambda obs, plain, *more: (obs, reward if next(time) >= at else plain, *more)


def box(low, high, dtype=float):
    return {"action_space": SimpleNamespace(low=np.array(low, dtype), high=np.array(high, dtype),
                                            dtype=np.dtype(dtype))}


SEEN = {"observation": np.zeros(3), "achieved_goal": np.zeros(2), "desired_goal": np.ones(2)}


@pytest.mark.parametrize("changes, words, more", [
    (dict(change_reset=lambda obs, info: obs), "reset must return", {}),        # old Gym
    (dict(change_reset=lambda obs, info: (obs, None)), "info a dict", {}),
    (dict(reset=lambda: None), "reset.seed=...", {}),
    (dict(change_step=lambda *made: made[:4]), "step must return", {}),
    (dict(change_step=lambda *made: (*made[:4], None)), "info a dict", {}),
    (dict(change_step=rewarded(np.array([-1.0]))), "a reward must be a finite number", {}),
    (dict(change_step=rewarded(None)), "a reward must be a finite number", {}),
    (dict(change_step=rewarded(np.nan, at=30)), "that of step .* is nan", {}),
    (dict(observe=lambda: {"state": np.zeros(3)}), "needs observation, achieved_goal, desired", {}),
    (dict(observe=lambda: (np.zeros(2), 3)), "must be an array of numbers", {"goal": (1, 1)}),
    (dict(observe=lambda: np.zeros(3)), "give a goal=", {}),
    (dict(observe=lambda: np.zeros(3)), "the goal must be", {"goal": ()}),
    (dict(observe=lambda: np.zeros(3)), "3 entries and the position 2", {"goal": (1, 1, 1)}),
    (dict(observe=lambda: np.zeros(3)), "the goal has NaN", {"goal": (1, np.nan)}),
    (dict(observe=lambda: SEEN), "give a goal=", {"goal": (1, 1)}),
    (dict(observe=lambda: {**SEEN, "observation": np.array([1, np.nan])}), "has NaN", {}),
    *[(dict(observe=lambda: np.zeros(3)), "position=", {"goal": (1, 1), "position": position})
      for position in ([0, 9], 0, slice(4, 6))],
    *[(space, "action_space", {}) for space in (
        {"action_space": None}, {"action_space": SimpleNamespace(n=4)}, box(-1, 1),
        box([-np.inf] * 2, [np.inf] * 2), box([[-1, -1]], [[1, 1]]), box([-1, 0], [1, 0]),
        box([0, 0], [4, 4], int))],
    ({}, "goal_range must be a number or", {"goal_range": (1, 1, 1)}),
    ({}, "goal range must be positive", {"goal_range": -1}),
    (dict(s0=5e6), "too far from 0", {})])
def test_what_is_no_environment_is_refused_at_once(changes, words, more):
    """Before training, or at the step at which it happens."""
    env = Odd(**changes)
    if "s0" in changes:
        plain = env.observe
        env.observe = lambda: {k: x + changes["s0"] for k, x in plain().items()}
    with pytest.raises(ValueError, match=words):
        lab.gym.train(env, field_config(goal_range=1.0), **more)
    assert len(env.seeds) <= 2 or "is nan" in words or "range" in words


def test_environments_that_cannot_be_trained_in_say_why(monkeypatch):
    with pytest.raises(ValueError, match="no 26 steps in a row"):
        lab.gym.train(Field(), field_config(subgoal_interval=26))
    monkeypatch.setattr(lab.gym, "ENDLESS", 20)
    with pytest.raises(ValueError, match="did not end in 20 steps"):
        lab.gym.train(Field(), field_config())


def test_without_a_word_of_success_there_is_a_return(capsys):
    result = lab.gym.train(Odd(), field_config(goal_range=1.0))
    assert "success" not in result.summary and result.summary["return"] == -25
    assert result.summary["first_success"] is None and "success -" in capsys.readouterr().out


def test_a_goal_that_moves_ends_a_window(monkeypatch):
    """Each window is stored with the goal under which its rewards were given."""
    env = Field()
    plain = env.step

    def step(action):
        made = plain(action)
        if env.time in (3, 12):
            env.goal = -env.goal
        return env.observe(), *made[1:]

    env.step = step
    replay = lab.gym.train(env, field_config(goal_range=1.0)).agent["replay"]
    n = int(replay["count"])
    assert (replay["length"][:7] == [3, 5, 4, 5, 5, 3, 3]).all()
    last = replay["states"][np.arange(n), replay["length"][:n], :2]
    reward = replay["rewards"][np.arange(n), replay["length"][:n] - 1]
    np.testing.assert_allclose(reward, -np.linalg.norm(last - replay["desired_goal"][:n], axis=1),
                               rtol=1e-4)


def test_arrays_with_the_goal_in_info():
    """As OGBench's: HIRO's goal is its position, HIQL's the whole state or entries of it."""
    env = Odd(keys=False, seen=lambda s, time: [*s, time],
              change_reset=lambda obs, info: (obs, {"goal": np.array([2.0, 1.0, 9.0])}))
    env.unwrapped = SimpleNamespace(task_infos=[None] * 3)
    given, plain = [], env.reset
    env.reset = lambda seed=None, options=None: given.append(options) or plain(seed)
    assert GymAdapter(env).first[2]["desired_goal"].tolist() == [2, 1]
    for indices, goal in (((), [2, 1, 9]), ((2, 0), [9, 2])):
        config = hiql.resolve({"env": "none", "goal_indices": indices, "eval_episodes": 4})
        seen = []
        evaluate = lab.gym.evaluator(env, config)
        given.clear()
        found = evaluate(lambda s, g, t: seen.append((g.tolist(), t)) or np.zeros((1, 2)))
        assert found == {"return": -25} and seen[:2] == [([goal], 0), ([goal], 1)]
        assert given == [{"task_id": task} for task in (1, 2, 3, 1)]
    with pytest.raises(ValueError, match="must be in .-1, 1."):
        lab.gym.evaluator(Field(), config)
