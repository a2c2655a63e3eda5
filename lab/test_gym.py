"""Tests of lab/gym.py: HIRO on environments that know nothing of this project.

    python -m pytest lab/test_gym.py            15 seconds
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import numpy as np
import pytest

import hiro
import lab.gym
from lab import td3


class Field:
    """A point on a plane by Gymnasium's convention, foreign to this project: Box [0, 4]^2, pushes
    of (a - 2) / 4, success within 0.5 of the goal, the end beyond 6."""

    def __init__(self, keys=True, apart=False):
        self.keys, self.apart, self.seeds = keys, apart, []
        self.action_space = type("Box", (), {"low": np.zeros(2), "high": np.full(2, 4.0)})()

    def observe(self):
        if not self.keys:
            return np.array([self.time, *self.s], np.float64)
        o = np.array([self.time]) if self.apart else np.array([*self.s, self.time])
        return {"observation": o, "achieved_goal": self.s.copy(), "desired_goal": self.goal.copy()}

    def reset(self, seed=None, options=None):
        rng = np.random.default_rng(seed)
        self.s, self.goal, self.time = np.zeros(2), rng.uniform(-3, 3, 2), 0
        self.seeds.append(seed)
        return self.observe(), {}

    def step(self, action):
        assert (action >= 0).all() and (action <= 4).all()
        self.s, self.time = self.s + (action - 2) / 4, self.time + 1
        distance = np.linalg.norm(self.s - self.goal)
        return (self.observe(), -distance, bool(np.abs(self.s).max() > 6), self.time >= 25,
                {"is_success": distance < 0.5})


class Bounded(Field):
    """A plane without an end: episodes have 25 steps."""

    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, False, truncated, info


def field_config(program=hiro, **changes):
    hierarchy = {} if program is td3 else {"goal_range": 0, "high_updates": 1}
    return program.resolve({"subgoal_interval": 5, "steps": 600, "warmup": 200,
                            "eval_interval": 300, "eval_episodes": 3, "batch_size": 32,
                            **hierarchy, **changes})


@pytest.mark.parametrize("apart", [False, True])
def test_any_environment_with_dict_observations(apart):
    """Windows are the episodes' own: cut by truncation (bootstrap) or termination (none)."""
    env = Field(apart=apart)
    result = lab.gym.train(env, field_config())
    replay, n = result.agent["replay"], int(result.agent["replay"]["count"])
    assert replay["states"].shape[2] == 3                   # position, time: the position once
    length = replay["length"][:n]
    assert 600 <= length.sum() < 625 and length.max() == 5      # those of the measurement are not
    s = replay["states"][np.arange(n), length]
    out = np.abs(s[:, :2]).max(1) > 6
    assert (replay["mask"][:n] == ~out).all() and 0 < out.sum() < n
    assert sorted(length[length < 5]) == sorted(k % 5 for k in s[:, 2][out].astype(int) if k % 5)
    a = replay["actions"][:n, 0]                            # in [-1, 1]; the plane moves by half
    np.testing.assert_allclose(replay["states"][:n, 1, :2] - replay["states"][:n, 0, :2], a / 2,
                               atol=1e-5)
    obs, acting = env.reset(seed=1)[0], hiro.Actor(result.agent, field_config())
    seen = lab.gym.GymAdapter(env).observe(obs)
    np.testing.assert_allclose(result.actor()(obs), 2 + 2 * acting()(seen))    # in its own units


def test_an_environment_of_its_own_kind(monkeypatch):
    """Actions in the space's dtype; a position that is not first, though it seems so at rest; an
    episode that never ends is refused."""
    class Other(Field):
        def __init__(self, limit):
            super().__init__()
            self.action_space.dtype, self.limit = np.dtype(np.float32), limit

        def observe(self):                              # velocity first, and at rest it is 0, 0
            o = super().observe()
            return {**o, "observation": np.concatenate([0 * self.s, self.s])}

        def step(self, action):
            assert action.dtype == np.float32
            obs, reward, _, _, info = super().step(action)
            self.s = np.clip(self.s, -5, 5)
            return obs, reward, False, self.time >= self.limit, info

    result = lab.gym.train(Other(25), field_config(steps=250))
    assert result.agent["replay"]["states"].shape[2] == 6       # position, velocity, position
    assert result.actor()(Other(25).reset(seed=1)[0]).dtype == np.float32
    monkeypatch.setattr(lab.gym, "ENDLESS", 300)
    with pytest.raises(ValueError, match="did not end in 30. steps; the environment needs a time"):
        lab.gym.train(Other(10**6), field_config(steps=250, warmup=249))


def test_any_environment_with_array_observations():
    """The position anywhere in the array, one goal given."""
    result = lab.gym.train(Field(keys=False), field_config(), goal=[1.0, 2.0],
                           position=slice(1, 3))
    replay, n = result.agent["replay"], int(result.agent["replay"]["count"])
    assert (replay["desired_goal"][:n] == [1, 2]).all()
    np.testing.assert_array_equal(replay["states"][0, :6, 2], np.arange(6))    # time comes last


def test_the_range_of_goals_is_measured_before_training():
    """Of whole windows: a uniform action is held for 10 steps, of up to 1/2 along x and 1/4 along
    y; episodes of 25 steps end with a window of 5."""
    class Slow(Bounded):
        def step(self, action):
            self.pushes.append(action)
            return super().step((action - 2) * [1, 0.5] + 2)

    env = Slow()
    env.pushes = []
    config = field_config(subgoal_interval=10, warmup=5000, steps=6000, low_noise=0.0)
    found = lab.gym.measure_goal_range(lab.gym.GymAdapter(env), config)
    pushes = np.array(env.pushes[1:]).reshape(200, 25, 2)       # without the adapter's own step
    held = pushes[:, [0, 10]].reshape(400, 2)
    assert (pushes[:, :20].reshape(400, 10, 2) == held[:, None]).all()
    assert len(np.unique(held, axis=0)) == 400
    moved = 10 / 4 * np.abs(held - 2) * [1, 0.5]
    np.testing.assert_allclose(found, np.quantile(moved, 0.95, axis=0), rtol=1e-5)
    np.testing.assert_allclose(found, [0.95 * 5, 0.95 * 2.5], rtol=0.05)


def test_goals_have_the_range_that_was_measured_or_given():
    config = field_config(steps=250)
    agent = lab.gym.train(Field(), config).agent
    measured = lab.gym.measure_goal_range(lab.gym.GymAdapter(Field()), config)
    np.testing.assert_array_equal(agent["goal_range"], np.float32(measured))
    agent = lab.gym.train(Field(), config, goal_range=[1.0, 0.5]).agent
    assert agent["goal_range"].tolist() == [1.0, 0.5]
    assert lab.gym.train(Field(), field_config(steps=250, goal_range=3.0)).agent[
        "goal_range"].tolist() == [3, 3]


def test_a_range_that_cannot_be_measured():
    class Along(Bounded):                               # moves along x alone
        def step(self, action):
            return super().step(np.array([action[0], 2]))

    found = lab.gym.measure_goal_range(lab.gym.GymAdapter(Along()), field_config())
    assert found[0] > 1 and found[1] == 1e-6            # never 0
    with pytest.raises(ValueError, match="no 26 steps in a row"):
        lab.gym.train(Bounded(), field_config(subgoal_interval=26))


def test_td3_on_any_environment():
    result = lab.gym.train(Field(), field_config(td3, steps=250), program=td3)
    assert result.summary["agent"] == "td3" and result.summary["env"] == "Field"
    a = result.actor()(Field().reset(seed=1)[0])
    assert a.shape == (2,) and (0 <= a).all() and (a <= 4).all()


def test_observations_begin_with_the_position():
    """Put first where it is not there already; actions of [-1, 1] fill the Box."""
    env = Field()
    adapter = lab.gym.GymAdapter(env)
    assert env.seeds == [0]                             # it looks at one state and the next
    obs, _ = adapter.reset(seed=2)
    assert obs["observation"].tolist() == [0, 0, 0] and (obs["desired_goal"] == env.goal).all()
    obs, reward, terminated, truncated, info = adapter.step(np.array([1.0, -0.5]))
    assert obs["observation"].tolist() == [0.5, -0.25, 1]
    assert obs["achieved_goal"].tolist() == [0.5, -0.25]
    assert reward == -np.linalg.norm(env.s - env.goal) and not (terminated or truncated)
    assert adapter.action(np.array([-1.0, 1.0])).tolist() == [0, 4]
    assert adapter.unwrapped is env and adapter.action_size == 2
    adapter = lab.gym.GymAdapter(Field(apart=True))
    adapter.reset(seed=2)
    assert adapter.step(np.array([1.0, 0.0]))[0]["observation"].tolist() == [0.5, 0, 1]
    adapter = lab.gym.GymAdapter(Field(keys=False), [1, 2], slice(1, 3))
    adapter.reset(seed=2)
    obs = adapter.step(np.array([1.0, 0.0]))[0]
    assert obs["observation"].tolist() == [0.5, 0, 1] and obs["desired_goal"].tolist() == [1, 2]
    adapter = lab.gym.GymAdapter(Field(keys=False), [1, 2])     # the first two, if not told
    assert adapter.observe(np.array([7, 8, 9]))["achieved_goal"].tolist() == [7, 8]
    result = lab.gym.train(Field(keys=False), field_config(td3, steps=201), goal=[1.0, 2.0],
                           program=td3)
    assert result.agent["replay"]["states"][0, 1, 0] == 1               # the time


def test_evaluation_by_hand():
    """Success ever and at the last step, final distance and return, episode by episode."""
    class Given(Field):                                 # reaches the goal, and runs away from it
        def reset(self, seed=None, options=None):
            super().reset(seed)
            self.goal = np.array([1.0, 0.0])
            return self.observe(), {}

    adapter, config = lab.gym.GymAdapter(Given()), field_config(eval_episodes=2)
    right = np.array([1.0, 0.0])

    def evaluate():
        return lab.gym.evaluate({"step": np.array(0)}, adapter, config,
                                lambda agent, config: lambda: lambda obs: right)

    seen, episodes = evaluate()
    x = np.arange(0.5, 6.51, 0.5)                       # the end is beyond 6, after 13 steps
    assert episodes == {} and seen == {
        "success": 1.0, "success_last_step": 0.0, "final_distance": 5.5,
        "return": pytest.approx(-np.abs(x - 1).sum())}
    right[:] = [-1.0, 0.0]                              # away from the goal
    assert evaluate()[0] == {"success": 0.0, "success_last_step": 0.0, "final_distance": 7.5,
                             "return": pytest.approx(-np.abs(x + 1).sum())}
    right[:], plain = [1.0, 0.0], adapter.env.step      # an environment that tells no success
    adapter.env.step = lambda a: (*plain(a)[:4], {})
    assert evaluate()[0]["success"] == 0


def test_evaluation_draws_from_the_seed_and_the_step_alone():
    """Starts are new for each evaluation and episode, the same in the same one."""
    env = Bounded()
    adapter = lab.gym.GymAdapter(env)

    def seeds(step, seed=0):
        env.seeds.clear()
        lab.gym.evaluate({"step": np.array(step)}, adapter, field_config(seed=seed),
                         lambda agent, config: lambda: lambda obs: np.zeros(2))
        return env.seeds[:]

    assert len(set(seeds(5))) == 3 and seeds(5) == seeds(5)
    assert not set(seeds(5)) & {*seeds(6), *seeds(5, seed=1)}


def test_environments_that_cannot_be_used_say_why():
    box = Field()
    box.action_space = None
    for env, goal, message in ((Field(), [0, 0], "give no goal"), (box, None, "action_space"),
                               (Field(keys=False), None, "goal=")):
        with pytest.raises(ValueError, match=message):
            lab.gym.train(env, field_config(), goal=goal)
    with pytest.raises(ValueError, match="goal range must be positive"):
        lab.gym.train(Field(), field_config(), goal_range=[1.0, 0.0])
