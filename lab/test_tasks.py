"""Tests of lab/tasks.py: the four rooms, and blocks that are pushed.

    python -m pytest lab/test_tasks.py          10 seconds
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import numpy as np
import pytest

import envs
import hiro
from lab.tasks import FourRoomsTask
from nets import tree_map


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


def strong_agent(task, config):
    """A new agent whose policies are three times as steep."""
    agent = hiro.init_agent(config, hiro.sizes_of(task), np.random.default_rng(0))
    for level in ("low", "high"):
        agent[level]["online"] = tree_map(lambda w: 3 * w, agent[level]["online"])
    return agent


def test_episodes_side_by_side_are_episodes_one_by_one():
    """The batched evaluation takes the path of the agent's act() through Gymnasium's calls."""
    task, config = envs.make_task("grid-fourrooms"), hiro.resolve({"env": "grid-fourrooms"})
    acting = hiro.Actor(strong_agent(task, config), config)
    starts, goals = task.draw(np.random.default_rng(0), 3)
    distance, paths, asked = hiro.rollout(task, acting(), starts, goals)
    assert asked.shape == (34, 3, 2)                    # a goal every 3 of 100 steps
    for i in range(3):
        obs, _ = task.reset(options={"start": starts[i], "goal": goals[i]})
        act = acting()
        for t in range(100):
            obs, reward, *_ = task.step(act(obs))
            np.testing.assert_allclose(obs["achieved_goal"], paths[t + 1, i], atol=1e-3)
            assert reward == pytest.approx(-distance[t, i], abs=1e-3)
    assert np.abs(paths[-1] - paths[0]).max() > 0.5


def test_evaluation_keeps_the_noise_of_exploration():
    """[E17]: std 0.5, which is low_noise too; other tasks have none."""
    for name, noise in (("grid-fourrooms", 0.5), ("point-push", 0.0)):
        task, config = envs.make_task(name), hiro.resolve({"env": name, "eval_episodes": 1})
        task.limit, seen = 5, []

        def actor(agent, config, noise, rng):
            seen.append(noise)
            return hiro.Actor(agent, config, noise, rng)

        hiro.evaluate(strong_agent(task, config), task, config, actor)
        assert seen == [noise] and (config.low_noise == noise or not noise)


# ------------------------------------------------------------------------------ blocks to push


def states(task, *agents, block=None):
    """States of agents at (x, y) or (x, y, z), with the block at its start or at (x, y, z)."""
    s = task.begin(np.zeros((len(agents), 2)))
    for row, agent in zip(s, agents):
        row[:len(agent)] = agent
    if block is not None:
        s[:, 3:3 + len(block)] = block
    return s


def walk(task, s, *places, steps=400):
    """States of one agent that goes straight to each of the places, as fast as it can."""
    path = [s]
    for place in places:
        while np.abs(path[-1][0, :2] - place).max() > 1e-9 and len(path) <= steps:
            path.append(task.move(path[-1], (np.array(place) - path[-1][:, :2]) / 0.2))
    return np.array(path)[:, 0]


@pytest.mark.parametrize("agent, block, action, moved, pushed", [
    ((0, 0), (0, 4), (0.5, 1), (0.1, 0.2), (0, 4)),             # free
    ((0, 0), (0, 4), (-3, -0.5), (-0.2, -0.1), (0, 4)),         # the action is clipped
    ((-5.4, 0), (0, 4), (-1, 0), (-5.5, 0), (0, 4)),            # a wall
    ((-5.5, -1.4), (0, 4), (-1, -1), (-5.5, -1.5), (0, 4)),     # a corner
    ((0, 1.5), (0, 4), (0, 1), (0, 1.7), (0, 4.15)),            # pushed along +y
    ((-2.5, 4), (0, 4), (1, 0), (-2.3, 4), (0.15, 4)),          # pushed along +x
    ((-2.5, 4), (0, 4), (-1, 0), (-2.7, 4), (0, 4)),            # not pulled
    ((-2.5, 1.5), (0, 4), (1, 1), (-2.3, 1.7), (0, 4.15)),      # along x first, where it is free
    ((1.5, 4), (4, 4), (1, 0), (1.6, 4), (4.05, 4)),            # up to the wall behind it
    ((1.6, 4), (4.05, 4), (1, 1), (1.6, 4.2), (4.05, 4)),       # which holds it; y is free
    ((-2.4, 4.2), (0.04, 4.2), (1, 0), (-2.4, 4.2), (0.05, 4.2)),       # jammed in the corridor
    ((0, 1.5), (0.05, 4), (0, 1), (0, 1.7), (0.05, 4.15)),      # there is a slack of 0.05
    ((0, 1.5), (0.06, 4), (0, 1), (0, 1.6), (0.06, 4.05))])     # and no more
def test_a_block_is_pushed(agent, block, action, moved, pushed):
    task = envs.make_task("point-push")
    s = states(task, agent, block=block)
    before = s.copy()
    after = task.move(s, np.array([action], float))[0]
    np.testing.assert_allclose(after, [*moved, 2.25, *pushed, 2.25], atol=1e-8)
    assert (s == before).all()


def test_a_jammed_block_stays_jammed():
    """The diagonal from the start clips its corner; nobody gets past it, and nothing pulls it."""
    task, rng = envs.make_task("point-push"), np.random.default_rng(0)
    s = walk(task, states(task, (0, 0)), (-2, 2))[-1]
    assert s[4] == pytest.approx(4.45)
    s = np.tile(s, (300, 1))
    for t in range(500):
        if t % 10 == 0:
            a = rng.uniform(-1.5, 1.5, (300, 2))
        s, before = task.move(s, a), s
        assert (s[:, 4] > before[:, 4] - 1e-9).all() and np.abs(s[:, 3]).max() <= 0.05 + 1e-9
    assert not task.reached(task.distance(s, task.test_goal)).any()
    assert task.distance(s, task.test_goal).min() > 3.8     # a tolerance of 5 would be too wide


def test_scripted_solutions():
    push, fall = envs.make_task("point-push"), envs.make_task("point-fall")
    path = walk(push, states(push, (0, 0)), (-3, 0), (-3, 4), (-1.1, 4), (-1.1, 9.5), (0, 9.5))
    assert len(path) == 80 and path[-1].tolist() == pytest.approx([0, 9.5, 2.25, 1.35, 4, 2.25])
    path = walk(fall, states(fall, (0, 0)), (4, 0), (4, 13.5), (0, 13.5))
    assert len(path) == 109 and path[-1].tolist() == pytest.approx([0, 13.5, 2.25, 4, 8.05, 0.25])
    for task, end in ((push, path[:0]), (fall, path)):
        assert task.limit == 500 and task.name.startswith("point-")
        s, g = task.draw(np.random.default_rng(0), 500)
        assert 0.098 < np.abs(s).max() <= 0.1 and (g == task.test_goal).all()
        tests = task.tests(np.random.default_rng(0), 3)
        assert list(tests) == ["0_9.5" if task is push else "0_13.5_2.25"]
        assert [g.tolist() for _, g in tests.values()] == [task.test_goal.tolist() * 3]
    assert push.test_goal.tolist() == [[0, 9.5]] and fall.test_goal.tolist() == [[0, 13.5, 2.25]]


@pytest.mark.parametrize("agent, block, action, moved, pushed", [
    ((4, 5.4), (4, 7.85, 2.25), (0, 1), (4, 5.6, 2.25), (4, 8.05, 0.25)),       # a bridge
    ((4, 5.3), (4, 7.75, 2.25), (0, 0.9), (4, 5.48, 2.25), (4, 7.93, 2.25)),    # not yet
    ((4, 5.4), (4, 7.85, 2.25), (0, 0.6), (4, 5.52, 2.25), (4, 7.97, 0.25)),    # where it fits
    ((5, 7.5, 0.25), (4, 7, 2.25), (0, -1), (5, 7.3, 0.25), (4, 7, 2.25)),      # below the block
    ((1.5, 4), (4, 4, 2.25), (1, 0), (1.55, 4, 2.25), (4, 4, 2.25)),    # not pushed along x
    ((0, 6.4), (4, 4, 2.25), (0, 1), (0, 6.6, 0.25), (4, 4, 2.25)),     # fallen
    ((0, 6.2), (4, 4, 2.25), (0, 1), (0, 6.4, 2.25), (4, 4, 2.25)),     # a part is above ground
    ((0, 9.8), (4, 4, 2.25), (0, -1), (0, 9.6, 2.25), (4, 4, 2.25)),
    ((4, 6.4), (4, 7.95, 0.25), (0, 1), (4, 6.6, 2.25), (4, 7.95, 0.25)),       # on the bridge
    ((1.7, 8), (4, 7.95, 0.25), (-1, 0), (1.5, 8, 0.25), (4, 7.95, 0.25)),      # off it
    ((0, 9.4, 0.25), (4, 4, 2.25), (0, 1), (0, 9.5, 0.25), (4, 4, 2.25)),       # no way back
    ((0, 6.6, 0.25), (4, 4, 2.25), (-1, -1), (-0.2, 6.5, 0.25), (4, 4, 2.25)),
    ((1.5, 8, 0.25), (4, 7.95, 0.25), (1, 0), (1.55, 8, 0.25), (4, 7.95, 0.25))])   # held by it
def test_agents_and_blocks_fall(agent, block, action, moved, pushed):
    task = envs.make_task("point-fall")
    after = task.move(states(task, agent, block=block), np.array([action], float))[0]
    np.testing.assert_allclose(after, [*moved, *pushed], atol=1e-8)


@pytest.mark.parametrize("name", ["point-push", "point-fall"])
def test_nothing_overlaps(name):
    """In 2,000 random episodes; what has fallen stays down; N agents move as N single ones."""
    task, rng, n, reached = envs.make_task(name), np.random.default_rng(0), 2000, False
    s, side = task.begin(np.zeros((n, 2))), task.maze.side
    first = {"point-push": (1, 2), "point-fall": (1, 1)}[name]         # the cell of (0, 0)
    for t in range(300):
        if t % 10 == 0:
            a = rng.uniform(-1.5, 1.5, (n, 2))
        s, before = task.move(s, a), s
        if t % 50 == 7:
            one = np.concatenate([task.move(before[i:i + 1], a[i:i + 1]) for i in range(5)])
            assert (one == s[:5]).all()
        assert (np.abs(s - before)[:, :2] <= 0.2 + 1e-9).all()
        assert (s[:, [2, 5]] <= before[:, [2, 5]]).all()
        together = s[:, 2] == s[:, 5]
        assert (np.abs(s[:, :2] - s[:, 3:5])[together].max(1) >= 2.45 - 1e-8).all()
        for centre, z, half in ((s[:, :2], s[:, 2], 0.5), (s[:, 3:5], s[:, 5], 1.95)):
            for corner in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
                x, y = (centre + (half - 1e-6) * np.array(corner)).T
                cell = np.floor(np.stack([y, x], 1) / side + 0.5).astype(int) + first
                kind = task.maze.layout[tuple(cell.T)]
                assert (kind != "#").all() and (kind == "c")[z < 1].all()
        reached |= task.reached(task.distance(s, task.test_goal)).any()
    assert reached


def test_what_is_seen_of_a_block():
    """2 sign(d) sqrt(|d|) of its displacement; and whether it has fallen."""
    push, fall = envs.make_task("point-push"), envs.make_task("point-fall")
    seen = push.observe(states(push, (1, 2), block=(-0.25, 4.04)))
    np.testing.assert_allclose(seen, [[1, 2, -1, 0.4]])
    seen = fall.observe(states(fall, (1, 2), (1, 8, 0.25), block=(4, 8, 0.25)))
    np.testing.assert_allclose(seen, [[1, 2, 2.25, 4, 1], [1, 8, 0.25, 4, 1]])
    assert fall.observe(states(fall, (1, 2))).tolist() == [[1, 2, 2.25, 0, 0]]
    for task, s in ((push, states(push, (1, 2))), (fall, states(fall, (1, 2)))):
        (centres, half), = task.blocks(s[None])
        assert centres.shape == (1, 1, 2) and half == 1.95
        assert (centres == task.block_start).all() and task.position(s).tolist() == [
            [1, 2] if task is push else [1, 2, 2.25]]


def test_starts_and_actions_that_do_not_fit_are_refused():
    push, fall = envs.make_task("point-push"), envs.make_task("point-fall")
    for task, start, fits in ((push, (1.5, 0), True), (push, (1.6, 0), False),      # a wall
                              (push, (0, 1.55), True), (push, (0, 1.6), False),     # the block
                              (fall, (0, 6.4), True), (fall, (0, 6.6), False)):     # the chasm
        if fits:
            task.reset(options={"start": start})
        else:
            with pytest.raises(ValueError, match="the agent is in a wall"):
                task.reset(options={"start": start})
    rooms = FourRoomsTask()
    rooms.reset(seed=0)
    with pytest.raises(ValueError, match="an action is two finite numbers"):
        rooms.step(np.array([np.nan, 0]))


def test_blocks_by_gymnasiums_calls():
    """What is seen and rewarded; the range of goals on each axis."""
    task = envs.make_task("point-fall")
    obs, _ = task.reset(options={"start": [4.0, 1.5]})
    obs, reward, terminated, truncated, info = task.step(np.array([0.0, 1.0]))
    assert obs["achieved_goal"].tolist() == pytest.approx([4, 1.7, 2.25])
    assert obs["desired_goal"].tolist() == [0, 13.5, 2.25]
    assert reward == pytest.approx(-np.hypot(4, 11.8)) and not terminated and not info["success"]
    assert task.reached(np.array([2.5, 2.6])).tolist() == [True, False]
    assert task.reached_last(np.array([2.5, 2.6])).tolist() == [True, False]
    config, rng = hiro.resolve({"env": "point-fall"}), np.random.default_rng(0)
    agent = hiro.init_agent(config, hiro.sizes_of(task), rng, task.goal_scale)
    assert agent["goal_range"].tolist() == [2, 2, 0.5] and agent["replay"]["goal"].shape[1] == 3
