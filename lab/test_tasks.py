"""Tests of lab/tasks.py: the four rooms as an online task.

    python -m pytest lab/test_tasks.py          2 seconds
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import numpy as np
import pytest

import envs
import hiro
from lab.tasks import FourRoomsTask
from nets import tree_map
from support import online


def test_four_rooms_by_gymnasiums_calls():
    """Rewards, success and time limit; starts and goals lie in different rooms."""
    task, again = envs.make_task("grid-fourrooms"), envs.make_task("grid-fourrooms")
    assert isinstance(task, FourRoomsTask) and task.name == "grid-fourrooms" and task.limit == 100
    obs, again = task.reset(seed=3)[0], again.reset(seed=3)[0]
    assert all((obs[k] == again[k]).all() for k in obs)
    for t in range(1, task.limit + 1):
        obs, reward, terminated, truncated, info = task.step(np.zeros(2))
        assert reward == -np.abs(obs["achieved_goal"] - obs["desired_goal"]).sum()
        assert (terminated, truncated) == (False, t == task.limit)
        assert info["success"] == (obs["achieved_goal"] == obs["desired_goal"]).all()
    goal = np.array([3.0, 4.0])
    task.reset(options={"start": goal - [0, 1], "goal": goal})
    obs, reward, terminated, _, info = task.step(np.array([0.0, 1.0]))
    assert (reward, terminated, info["success"]) == (0, False, True)    # it goes on there
    room = {}                           # cells by corners of the rooms; doors belong to none
    for cell in task.maze.cells.tolist():
        i, j = cell
        door = (i, j) in ((3, 6), (10, 6), (6, 2), (7, 9))
        room[i, j] = None if door else (i > (6 if j > 6 else 5), j > 6)
    for s, g in (task.draw(np.random.default_rng(0), 500), task.tests(np.random.default_rng(0),
                                                                      500)["random"]):
        seen = set()
        for a, b in zip(s.astype(int).tolist(), g.astype(int).tolist()):
            a, b = room[tuple(a)], room[tuple(b)]       # KeyError in a wall
            assert a and b and a != b
            seen.add((a, b))
        assert len(seen) == 12                          # all pairs of rooms
    assert list(task.tests(np.random.default_rng(0), 1)) == ["random"]


def test_four_rooms_by_hand():
    rooms = FourRoomsTask()
    moved = rooms.move(np.full((5, 2), 3.0), np.array([[0.4, -0.4], [-0.6, 0.5], [0.7, 0.6],
                                                       [0.5, -0.9], [0.1, 0.5]]))
    assert moved.tolist() == [[3, 3], [2, 3], [4, 3], [3, 2], [3, 4]]
    seen = rooms.observe(rooms.maze.cells[:3].astype(float))
    assert seen.shape == (3, 2 + 104) and (seen[:, :2] == rooms.maze.cells[:3]).all()
    np.testing.assert_array_equal(seen[:, 2:], np.eye(3, 104))
    assert len(rooms.pairs) == 100**2 - 25**2 - 30**2 - 25**2 - 20**2   # of cells, without doors
    for reached in (rooms.reached, rooms.reached_last):
        assert reached(np.array([0.0, 0.5, 0.6])).tolist() == [True, True, False]
    assert rooms.distance(np.array([[1.0, 2.0]]), np.array([[4.0, 1.0]])).tolist() == [4]


def test_settings_reach_the_config():
    config = hiro.resolve({"env": "grid-fourrooms"})
    assert {name: getattr(config, name) for name in FourRoomsTask.settings} == {
        "subgoal_interval": 3, "goal_range": 3.0, "low_noise": 0.5, "eval_noise": 0.5,
        "high_discount": 0.9, "high_noise": 1.0, "noise_correlation": 0.0}
    assert hiro.resolve({"env": "grid-fourrooms", "goal_range": 2.0}).goal_range == 2


def test_episodes_side_by_side_are_episodes_one_by_one():
    """The batched evaluation takes the path of the agent's act() through Gymnasium's calls."""
    config = hiro.resolve({"seed": 1, "env": "grid-fourrooms", "eval_noise": 0.0})
    problem = hiro.prepare(config)
    task, agent = problem.env, problem.init_agent(problem, problem.rngs)
    for level in ("low", "high"):
        agent[level]["online"] = tree_map(lambda w: 3 * w, agent[level]["online"])
    starts, goals = task.draw(np.random.default_rng(0), 3)
    distance, paths, asked = online.rollout(task, problem.policies(agent, config), starts, goals,
                                            None, config)
    assert asked.shape == (34, 3, 2)
    for i in range(3):
        obs, _ = task.reset(options={"start": starts[i], "goal": goals[i]})
        act = online.actors(problem, agent)()
        for t in range(100):
            obs, reward, *_ = task.step(act(obs))
            np.testing.assert_allclose(obs["achieved_goal"], paths[t + 1, i], atol=1e-3)
            assert reward == pytest.approx(-distance[t, i], abs=1e-3)
    assert np.abs(paths[-1] - paths[0]).max() > 0.5


def test_noise_in_evaluation():
    """--eval-noise is the std of what is added to the low-level actions, before clipping."""
    rng, zero = np.random.default_rng(0), np.zeros((20000, 2))
    noisy = online.evaluation_action(zero, rng, hiro.resolve({"env": "grid-fourrooms",
                                                              "eval_noise": 0.25}))
    assert noisy.std() == pytest.approx(0.25, rel=0.02) and abs(noisy.mean()) < 0.01
    noisy = online.evaluation_action(zero + 0.9, rng, hiro.resolve({"env": "grid-fourrooms"}))
    assert noisy.max() == 1 and 0.3 < (noisy == 1).mean() < 0.5
    assert online.evaluation_action(zero, None, hiro.resolve({})) is zero
