"""Further online tasks for HIRO, by the conventions of envs.GoalEnv: four rooms, Push and Fall.

There is nothing to run here: `python hiro.py --env grid-fourrooms`, `--env point-push`,
`--env point-fall`. Layouts of Push and Fall are the authors' (maze_env_utils.construct_maze), at
half their scale [E19].
"""

import nets                             # first: it sets one BLAS thread before numpy loads

from types import SimpleNamespace

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

import envs


class FourRoomsTask(envs.GoalEnv):
    """grid-fourrooms with actions in [-1, 1]^2: one cell along the axis of the larger component.

    The agent stays where that component is below 0.5 in size; of two equal ones the row's counts.
    Start and goal are cells of different rooms (doors belong to no room). The reward is minus the
    Manhattan distance in cells. The goal is reached in its cell; nothing terminates an episode,
    which has 100 steps. The agent sees its cell one-hot beside row and column: a network then needs
    no steep function of two numbers at a wall. The low-level policy's noise stays on in evaluation:
    without it a wrong action is repeated for ever [E17].
    """

    settings = dict(subgoal_interval=3, goal_range=3.0, low_noise=0.5, high_discount=0.9,
                    high_noise=1.0, noise_correlation=0.0)                              # [E17]
    eval_noise = 0.5                                                                    # [E17]
    goal_terminates = False

    def __init__(self):
        super().__init__(envs.make("grid-fourrooms"), 100)
        self.action_space = SimpleNamespace(low=-np.ones(2), high=np.ones(2), shape=(2,))
        inside = np.flatnonzero(~self.maze.corridors)           # rooms: parts without the doors
        near = self.maze.distance[np.ix_(inside, inside)] == 1
        room = connected_components(csr_matrix(near))[1]
        self.pairs = inside[np.argwhere(room[:, None] != room)]

    def draw(self, rng, n):
        pairs = self.maze.cells[self.pairs[rng.integers(len(self.pairs), size=n)]].astype(float)
        return pairs[:, 0], pairs[:, 1]

    def tests(self, rng, n):
        return {"random": self.draw(rng, n)}

    def move(self, s, a):
        """s (N, 2) as (row, column), a (N, 2) -> s' (N, 2)."""
        if not np.isfinite(a).all():
            raise ValueError("an action is two finite numbers for each agent")
        axis = np.abs(a).argmax(-1)
        along = a[np.arange(len(a)), axis]
        return self.maze.move(s, np.where(np.abs(along) < 0.5, 0, 1 + 2 * axis + (along > 0)))

    def observe(self, s):
        """(row, column) (N, 2) -> row, column and the cell one-hot (N, 2 + free cells)."""
        return np.concatenate([s, np.eye(len(self.maze.cells))[self.maze.number(s)]], -1)

    def distance(self, s, g):
        return np.abs(s - g).sum(-1)

    def reward(self, distance):
        return -distance


# ------------------------------------------------------------------------------ blocks to push


class BlockMaze(envs.PointMaze):
    """A maze with c for a chasm, moved so that cell `first` has its centre at (0, 0)."""

    symbols = "#.c"

    def __init__(self, name, layout, first):
        self.origin = self.side * (np.array(first[::-1]) - 1)           # x, y
        super().__init__(name, layout, speed=0.2, limit=500, tasks=())

    def cell(self, obs):
        return super().cell(np.asarray(obs) + self.origin)

    def centre(self, cells):
        return super().centre(cells) - self.origin


class BlockTask(envs.GoalEnv):
    """HIRO's tasks with a movable block, for N square agents at once [E19].

    State (N, 6): agent x, y, z, block x, y, z. Agent and block are squares of half-width 0.5 and
    1.95, parallel to the axes, in cells of side 4. A step is 0.2 times the action, clipped to
    [-1, 1]^2: first along x, then along y. Along each axis the agent goes as far as the walls let
    it. Where it would overlap the block, the block moves ahead of it as far as the walls let the
    block, and the agent stops behind it. There is no inertia, no friction and no pulling.
    The block falls once its edge of smaller y is over the chasm; it then fills that column of the
    chasm. The agent falls once its whole square is over the chasm and no part of it is over the
    block. What has fallen stays down: a fallen agent still moves, between the chasm's sides and a
    fallen block, and below one that has not fallen.
    Start (0, 0) + U(-0.1, 0.1)^2, one goal, also in training; 500 steps, which the goal does not
    end. Reward: minus the Euclidean distance. Reached: within 2.5, both for success at any step and
    at the last one; in front of a jammed block the agent is 3.9 away.
    The block is observed: a policy without memory cannot know otherwise whether the way is free.
    `block_seen` shows the 0.05 by which a block that is jammed for good differs from a free one.
    The agent is a square of a quarter of a corridor's width: a point slips past the block.
    """

    settings = dict(steps=80_000, tanh_penalty=0.05)                                    # [E20]
    goal_terminates = False
    goals_in_walls = True
    agent_half, block_half = 0.5, 1.95                                  # half-widths
    high, low = 2.25, 0.25                                              # z

    def __init__(self, name, layout, first, block, pushed_along, goal):
        super().__init__(BlockMaze(name, layout, first))
        self.pushed_along = pushed_along
        self.block_start = self.maze.centre(block)
        self.test_goal = np.array([goal])
        self.chasm = self.maze.layout == "c"
        self.closed = np.stack([~self.chasm, self.maze.walls])  # [0]: to what is low, else [1]

    def draw(self, rng, n):
        return rng.uniform(-0.1, 0.1, (n, 2)), self.test_goal.repeat(n, 0)

    def tests(self, rng, n):
        return {"_".join(f"{x:g}" for x in self.test_goal[0]): self.draw(rng, n)}

    def blocks(self, s):
        return [(s[..., 3:5], self.block_half)]

    def reached(self, distance):
        return distance <= 2.5

    def reward(self, distance):
        return -distance

    def begin(self, starts):
        blocks = np.tile(self.block_start, (len(starts), 1))
        agent = np.insert(starts, 2, self.high, axis=1)
        block = np.insert(blocks, 2, self.high, axis=1)
        row, column = np.moveaxis(self._cells(agent, self.agent_half), -1, 0)
        fits = ~(self.closed[1, row, column].any(1) | self._overlap(agent, block)
                 | self.chasm[row, column].all(1))
        if not fits.all():
            raise ValueError(f"{self.name}: at {starts[~fits][0]} the agent is in a wall, in the "
                             "block or over the chasm")
        return np.concatenate([agent, block], 1)

    def position(self, s):
        return s[..., :self.test_goal.shape[1]]

    def move(self, s, a):
        step = self.maze._step(s, a)
        s = np.array(s, float)
        agent, block = s[:, :3], s[:, 3:]               # views: they are changed in place
        touch = self.agent_half + self.block_half
        for k in (0, 1):
            ahead = np.sign(step[:, k])
            agent[:, k] = self._slide(agent, k, step[:, k], self.agent_half)
            met = self._overlap(agent, block) & (agent[:, 2] == block[:, 2])
            if k in self.pushed_along:
                push = np.where(met, agent[:, k] + ahead * touch - block[:, k], 0)
                block[:, k] = self._slide(block, k, push, self.block_half)
            agent[:, k] = np.where(met, block[:, k] - ahead * touch, agent[:, k])
        self._fall(agent, block)
        return s

    def _overlap(self, agent, block):
        touch = self.agent_half + self.block_half
        return (np.abs(agent - block)[:, :2] < touch - 1e-9).all(1)

    def _cells(self, s, half):
        """Cells (N, 4, 2) of the corners of squares with their centres at s (N, 3)."""
        corners = np.array([(x, y) for x in (-1, 1) for y in (-1, 1)])
        return self.maze.cell(s[:, None, :2] + (half - 1e-9) * corners)

    def _slide(self, s, k, step, half):
        """Coordinates k (N,) of squares at s (N, 3) after steps (N,) along k, up to the walls."""
        ahead = np.sign(step)
        moved = s.copy()
        moved[:, k] += step
        cells = self._cells(moved, half)
        hit = self.closed[(s[:, 2] == self.high).astype(int)[:, None], cells[..., 0],
                          cells[..., 1]]
        centre = self.maze.centre(cells[np.arange(len(s)), hit.argmax(1)])[:, k]
        edge = centre - ahead * self.maze.side / 2              # of the wall that was hit
        return np.where(hit.any(1), edge - ahead * half, moved[:, k])

    def _fall(self, agent, block):
        """Let agents and blocks (N, 3) fall that have nothing below them, in place."""
        rear = self.maze.cell(block[:, :2] - [0, self.block_half - 1e-9])
        falls = self.chasm[rear[:, 0], rear[:, 1]]
        block[falls, 2] = self.low
        slack = self.maze.side / 2 - self.block_half
        middle = self.maze.centre(rear[falls])
        block[falls, :2] = np.clip(block[falls, :2], middle - slack, middle + slack)
        cells = self._cells(agent, self.agent_half)
        over = self.chasm[cells[..., 0], cells[..., 1]].all(1)
        agent[over & ~self._overlap(agent, block), 2] = self.low


class PushTask(BlockTask):
    """A block in the way, to be pushed aside: straight on, it jams in the goal's corridor.

    It fills its corridors but for 0.05 on each side: once in one, it cannot leave it sideways.
    """

    def __init__(self):
        super().__init__("point-push", "##### #..## #...# ##.## #####", (1, 2), (2, 2), (0, 1),
                         (0.0, 9.5))

    def observe(self, s):
        """x, y, and by `block_seen` the block's displacement from its start (N, 4)."""
        return np.concatenate([s[:, :2], block_seen(s[:, 3:5] - self.block_start)], 1)


class FallTask(BlockTask):
    """A chasm, and a block to be pushed into it as a bridge; positions and goals are x, y, z.

    From the block's other side the agent can push it back along y, after which no bridge is left.
    """

    goal_scale = np.array([1, 1, 0.25])

    def __init__(self):
        super().__init__("point-fall", "#### #..# #..# #cc# #..# ####", (1, 1), (2, 2), (1,),
                         (0.0, 13.5, 2.25))

    def observe(self, s):
        """x, y, z, by `block_seen` the block's displacement along y, and whether it has fallen
        (N, 5)."""
        fallen = 1.0 * (s[:, 5:] < self.high)
        moved = block_seen(s[:, 4:5] - self.block_start[1])
        return np.concatenate([s[:, :3], moved, fallen], 1)


def block_seen(d):
    """2 sign(d) sqrt(|d|) of displacements d (...): 0.06 and 0 differ by 0.5 [E19]."""
    return 2 * np.sign(d) * np.sqrt(np.abs(d))
