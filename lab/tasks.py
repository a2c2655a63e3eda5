"""Further online tasks for HIRO, by the conventions of envs.GoalEnv: the four rooms.

The registry `envs.TASKS_ONLINE` names them; there is nothing to run here:
`python hiro.py --env grid-fourrooms`.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

from types import SimpleNamespace

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

import envs


class FourRoomsTask(envs.GoalEnv):
    """grid-fourrooms with actions in [-1, 1]^2: one cell along the axis of the larger component.

    The agent stays where that component is below 0.5 in size. Start and goal are cells of different
    rooms (doors belong to no room). The reward is minus the Manhattan distance in cells. The goal
    is reached in its cell; nothing terminates an episode, which has 100 steps.
    E17 Neither the paper nor its code has a grid. The agent sees its cell one-hot beside row and
        column: a network then needs no steep function of two numbers at a wall. The high-level
        policy gives a goal every 3 steps, within +-3, which is what 3 steps can cover. Its noise
        has the size of the goals and is independent; its discount is 0.9. The low-level policy's
        noise of 0.5 stays on in evaluation: without it a wrong action is repeated for ever.
    """

    settings = dict(subgoal_interval=3, goal_range=3.0, low_noise=0.5, eval_noise=0.5,
                    high_discount=0.9, high_noise=1.0, noise_correlation=0.0)           # [E17]
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
