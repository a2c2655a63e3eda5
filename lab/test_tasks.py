"""Tests of lab/tasks.py: the four rooms, and blocks that are pushed.

    python -m pytest lab/test_tasks.py          3 seconds
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import numpy as np
import pytest

import envs

def test_four_rooms_by_hand():
    """Moves, what is seen, distance and reward; starts and goals lie in different rooms."""
    task = envs.make_task("grid-fourrooms")
    moved = task.move(np.full((5, 2), 3.0), np.array([[0.4, -0.4], [-0.6, 0.5], [0.7, 0.6],
                                                      [0.5, -0.9], [0.1, 0.5]]))
    assert moved.tolist() == [[3, 3], [2, 3], [4, 3], [3, 2], [3, 4]]
    seen = task.observe(task.maze.cells[:3].astype(float))
    assert seen.shape == (3, 2 + 104) and (seen[:, :2] == task.maze.cells[:3]).all()
    np.testing.assert_array_equal(seen[:, 2:], np.eye(3, 104))
    assert task.distance(np.array([[1.0, 2.0]]), np.array([[4.0, 1.0]])).tolist() == [4]
    for reached in (task.reached, task.reached_last):
        assert reached(np.array([0.0, 0.5, 0.6])).tolist() == [True, True, False]
    task.reset(options={"start": [3.0, 2.0], "goal": [3.0, 4.0]})
    for reward in (-1, 0):
        *_, found, terminated, _, info = task.step(np.array([0.0, 1.0]))
        assert (found, terminated, info["success"]) == (reward, False, reward == 0)
    room = {}                           # cells by corners of the rooms; doors belong to none
    for i, j in task.maze.cells.tolist():
        door = (i, j) in ((3, 6), (10, 6), (6, 2), (7, 9))
        room[i, j] = None if door else (i > (6 if j > 6 else 5), j > 6)
    pairs = set()
    for s, g in zip(*task.tests(np.random.default_rng(0), 500)["random"]):
        a, b = room[tuple(s)], room[tuple(g)]           # KeyError in a wall
        assert a and b and a != b
        pairs.add((a, b))
    assert len(pairs) == 12                             # all pairs of rooms


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


def test_scripted_solutions():
    """Push: around the block, and aside with it; the diagonal clips its corner and jams it. Fall:
    the block becomes a bridge."""
    push, fall = envs.make_task("point-push"), envs.make_task("point-fall")
    path = walk(push, states(push, (0, 0)), (-3, 0), (-3, 4), (-1.1, 4), (-1.1, 9.5), (0, 9.5))
    assert len(path) == 80 and path[-1].tolist() == pytest.approx([0, 9.5, 2.25, 1.35, 4, 2.25])
    assert push.test_goal.tolist() == [[0, 9.5]]
    assert walk(push, states(push, (0, 0)), (-2, 2))[-1][4] == pytest.approx(4.45)
    path = walk(fall, states(fall, (0, 0)), (4, 0), (4, 13.5), (0, 13.5))
    assert len(path) == 109 and path[-1].tolist() == pytest.approx([0, 13.5, 2.25, 4, 8.05, 0.25])
    assert fall.test_goal.tolist() == [[0, 13.5, 2.25]]
    for task in (push, fall):
        assert task.limit == 500
        s, g = task.draw(np.random.default_rng(0), 500)
        assert 0.098 < np.abs(s).max() <= 0.1 and (g == task.test_goal).all()


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


@pytest.mark.parametrize("name, first", [("point-push", (1, 2)), ("point-fall", (1, 1))])
def test_nothing_overlaps(name, first):
    """In 500 random episodes; what has fallen stays down; N agents move as N single ones. first:
    the cell of (0, 0)."""
    task, rng, n = envs.make_task(name), np.random.default_rng(0), 500
    s, side, reached = task.begin(np.zeros((n, 2))), task.maze.side, False
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


def test_what_is_seen_and_rewarded():
    """2 sign(d) sqrt(|d|) of the block's displacement; and whether it has fallen."""
    push, fall = envs.make_task("point-push"), envs.make_task("point-fall")
    seen = push.observe(states(push, (1, 2), block=(-0.25, 4.04)))
    np.testing.assert_allclose(seen, [[1, 2, -1, 0.4]])
    seen = fall.observe(states(fall, (1, 2), (1, 8, 0.25), block=(4, 8, 0.25)))
    np.testing.assert_allclose(seen, [[1, 2, 2.25, 4, 1], [1, 8, 0.25, 4, 1]])
    assert fall.observe(states(fall, (1, 2))).tolist() == [[1, 2, 2.25, 0, 0]]
    for task, place in ((push, [1, 2]), (fall, [1, 2, 2.25])):
        s = states(task, (1, 2))
        (centres, half), = task.blocks(s[None])
        assert (centres == task.block_start).all() and half == 1.95
        assert task.position(s).tolist() == [place]
        for reached in (task.reached, task.reached_last):
            assert reached(np.array([2.5, 2.6])).tolist() == [True, False]
    fall.reset(options={"start": [4.0, 1.5]})
    obs, reward, terminated, truncated, info = fall.step(np.array([0.0, 1.0]))
    assert obs["achieved_goal"].tolist() == pytest.approx([4, 1.7, 2.25])
    assert reward == pytest.approx(-np.hypot(4, 11.8)) and not terminated and not info["success"]
    assert (2 * fall.goal_scale).tolist() == [2, 2, 0.5]


def test_starts_that_do_not_fit_are_refused():
    push, fall = envs.make_task("point-push"), envs.make_task("point-fall")
    for task, fits, start in ((push, (1.5, 0), (1.6, 0)),           # a wall
                              (push, (0, 1.55), (0, 1.6)),          # the block
                              (fall, (0, 6.4), (0, 6.6))):          # the chasm
        task.reset(options={"start": fits})
        with pytest.raises(ValueError, match="the agent is in a wall"):
            task.reset(options={"start": start})
