"""Grid and point-mass mazes, offline data sets, exact answers, drawing.

Environments (`make(name)`; every one steps N agents at once and one agent by Gymnasium's calls):
  grid-fourrooms, grid-maze               integer actions, observation (row, column) as floats
  point-{umaze,medium,large,giant}        a disc; actions in [-1,1]^2; observation (x, y)
  pointmaze-{medium,large,giant,teleport}-{navigate,stitch}-v0     OGBench's own
point-medium, -large and -giant are OGBench's mazes with a robot four times as fast.

Coordinates of point mazes are OGBench's: cells are squares of side 4, cell (i, j) (row, column)
has its centre at x = 4j - 4, y = 4i - 4. Layouts, tasks and the recipe of the data sets are those
of OGBench (Park et al. 2024, arXiv 2410.20092; locomaze/maze.py and its data script); the U-maze
is that of the HIRO code. Data files have OGBench's layout, so that its own files load unchanged.

    python envs.py [FOLDER]      draws every maze with its tasks, and exact values (default: runs)
"""

import os
import sys
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import matplotlib
import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, shortest_path

matplotlib.use("Agg")                   # pictures go to files; no screen is needed
import matplotlib.pyplot as plt

LAYOUTS = {
    "fourrooms": """
        #############
        #.....#.....#
        #.....#.....#
        #...........#
        #.....#.....#
        #.....#.....#
        ##.####.....#
        #.....###.###
        #.....#.....#
        #.....#.....#
        #...........#
        #.....#.....#
        #############""",
    "maze": """
        ##############
        #....####....#
        #....####....#
        #....##......#
        #....##......#
        ###......#####
        ###......#####
        #....##......#
        #....##......#
        #..##....##..#
        #..##....##..#
        #......##....#
        #......##....#
        ##############""",
    "umaze": """
        #####
        #...#
        ###.#
        #...#
        #####""",
    "medium": """
        ########
        #..##..#
        #..#...#
        ##...###
        #..#...#
        #.#..#.#
        #...#..#
        ########""",
    "large": """
        ############
        #....#.....#
        #.##.#.#.#.#
        #......#...#
        #.####.###.#
        #..#.#.....#
        ##.#.#.#.###
        #..#...#...#
        ############""",
    "giant": """
        ################
        #.#......##....#
        #.#.##.#.#..##.#
        #...#..#...#...#
        #.###.######.#.#
        #...#...#....#.#
        ###.#.#..#.#.###
        #...#..#...#...#
        #.#.#.######.#.#
        #.###...#...##.#
        #.....#...#....#
        ################""",
    "teleport": """
        ############
        #.....#o#..#
        ##.#...#..##
        ##.###.....#
        #....#i#.#.#
        #i##.#.#.#.#
        #o##.#.#.#o#
        #....#...#.#
        ############""",
}

# (start cell, goal cell), cells as (row, column). The maze is the medium one, two cells for one.
TASKS = {
    "fourrooms": [((1, 1), (11, 11)), ((11, 1), (1, 11)), ((5, 5), (8, 8)), ((1, 11), (11, 11)),
                  ((8, 5), (2, 2))],
    "maze": [((1, 1), (12, 12)), ((11, 1), (2, 12)), ((9, 5), (8, 4)), ((11, 9), (12, 2)),
             ((3, 11), (2, 2))],
    "umaze": [((1, 1), (3, 1)), ((1, 1), (1, 3)), ((1, 1), (3, 3)), ((3, 1), (1, 1)),
              ((3, 2), (1, 2))],
    "medium": [((1, 1), (6, 6)), ((6, 1), (1, 6)), ((5, 3), (4, 2)), ((6, 5), (6, 1)),
               ((2, 6), (1, 1))],
    "large": [((1, 1), (7, 10)), ((5, 4), (7, 1)), ((7, 4), (1, 10)), ((3, 8), (5, 4)),
              ((1, 1), (5, 4))],
    "giant": [((1, 1), (10, 14)), ((1, 14), (10, 1)), ((8, 14), (1, 1)), ((8, 3), (5, 12)),
              ((5, 9), (3, 8))],
    "teleport": [((1, 10), (7, 1)), ((1, 1), (7, 10)), ((5, 6), (7, 10)), ((7, 1), (7, 10)),
                 ((5, 6), (7, 1))],
}

# ------------------------------------------------------------------------------- environments


class Maze:
    """A layout, its exact cell distances, and the single-agent calls of Gymnasium.

    A subclass gives observations for cells (`place`), cells for observations (`cell`), the move
    of N agents (`move`), success (`success`) and time limits (`limits`).
    """

    def __init__(self, name, layout):
        rows = LAYOUTS[layout].split()
        self.name, self.tasks = name, TASKS[layout]
        self.layout = np.array([list(row) for row in rows])     # for i and o see OGBenchMaze
        self.walls = self.layout == "#"
        self.cells = np.argwhere(~self.walls)                           # (n, 2) row, column
        self.index = np.full(self.walls.shape, -1)                      # cell -> number, wall -1
        self.index[tuple(self.cells.T)] = np.arange(len(self.cells))
        self.state = None

    @cached_property
    def distance(self):
        """Length of the shortest path between any two free cells, -1 without one: (n, n) ints."""
        return np.where(np.isfinite(self._paths[0]), self._paths[0], -1).astype(int)

    @cached_property
    def next_cell(self):
        """next_cell[i, j]: number of the cell after i on a shortest path from i to j; (n, n)."""
        step = self._paths[1].T.copy()          # the predecessor of i on the path from j to i
        np.fill_diagonal(step, np.arange(len(step)))
        return step

    @cached_property
    def _paths(self):
        gap = np.abs(self.cells[:, None] - self.cells[None]).sum(-1)
        return shortest_path(csr_matrix(gap == 1), unweighted=True, return_predecessors=True)

    @cached_property
    def corridors(self):
        """Which cells (n,) are straight corridors: two open sides, opposite each other."""
        i, j = self.cells.T
        rows, columns = ~self.walls[[i - 1, i + 1], j], ~self.walls[i, [j - 1, j + 1]]
        return (rows.all(0) & ~columns.any(0)) | (columns.all(0) & ~rows.any(0))

    def number(self, obs):
        """Numbers (N,) of the cells that observations (N, 2) lie in; ValueError in a wall."""
        i, j = np.clip(self.cell(obs), 0, np.array(self.walls.shape) - 1).T
        number = self.index[i, j]                       # walls enclose the maze: outside is wall
        if (number < 0).any():
            raise ValueError(f"position {np.asarray(obs)[np.argmin(number)]} is inside a wall "
                             f"of {self.name}")
        return number

    def is_free(self, obs):
        """Whether observations (N, 2) lie in free cells: (N,) bool."""
        i, j = np.clip(self.cell(obs), 0, np.array(self.walls.shape) - 1).T
        return ~self.walls[i, j]

    def random_pairs(self, rng, n, at_least):
        """n pairs of cells, shortest path >= at_least cells: starts (n, 2), goals (n, 2)."""
        pairs = np.argwhere(self.distance >= at_least)
        if not len(pairs):
            raise ValueError(f"{self.name} has no two cells {at_least} steps apart")
        pairs = pairs[rng.integers(len(pairs), size=n)]
        return self.cells[pairs[:, 0]], self.cells[pairs[:, 1]]

    def reset(self, seed=None, options=None):
        """Gymnasium's reset for one agent -> (observation (2,), info with the goal).

        options: {"task": 1...5} for a fixed task, {"start": obs, "goal": obs} for given
        positions; otherwise a random start and goal.
        """
        options = dict(options or {})
        if seed is not None or self.state is None:
            self.rng = np.random.default_rng(seed)
        if unknown := set(options) - {"task", "start", "goal"}:
            raise ValueError(f"unknown reset options {sorted(unknown)}; known: task, start, goal")
        cells = self.random_pairs(self.rng, 1, 1)
        if "task" in options:
            if options["task"] not in range(1, len(self.tasks) + 1):
                raise ValueError(f"task must be 1 to {len(self.tasks)}, not {options['task']}")
            cells = np.array(self.tasks[options["task"] - 1])[:, None]
        start, goal = (self.place(c, self.rng) for c in cells)
        self.state = np.array(options.get("start", start[0]), float).reshape(1, 2)
        self.goal = np.array(options.get("goal", goal[0]), float).reshape(1, 2)
        self.number(np.concatenate([self.state, self.goal]))            # refuses walls
        self.time, self.limit = 0, int(self.limits(self.state, self.goal)[0])
        return self.state[0].copy(), {"goal": self.goal[0].copy(), "success": False}

    def jump(self, s, rng):
        """Where agents shown at s (N,2) start their next step from: here all at s."""
        return s

    def step(self, action):
        """One agent's step -> (obs, reward, terminated, truncated, info).

        Reward 0 at the goal, which terminates the episode, else -1; the time limit truncates.
        """
        if self.state is None:
            raise RuntimeError("call reset before step")
        self.state = self.move(self.state, np.asarray(action)[None], self.rng)
        self.time += 1
        success = bool(self.success(self.state, self.goal)[0])
        return (self.state[0].copy(), float(success) - 1, success,
                self.time >= self.limit and not success,
                {"goal": self.goal[0].copy(), "success": success})


def unit(x):
    """Vectors x (N,2) at length 1; a zero vector stays."""
    return x / np.maximum(np.sqrt((x ** 2).sum(-1, keepdims=True)), 1e-9)


class GridWorld(Maze):
    """Cells; actions 0 stay, 1 up, 2 down, 3 left, 4 right; a move into a wall stays.

    With probability `slip` the action is replaced by a uniformly drawn one. Time limit: four
    times the shortest path.
    """

    discrete, action_dim, side = True, 5, 1.0
    far = 8                                 # random pairs are at least so many cells apart
    moves = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])

    def __init__(self, name, layout, slip=0.0):
        super().__init__(name, layout)
        if not 0 <= slip <= 1:
            raise ValueError(f"slip must be a probability, not {slip}")
        self.slip = slip
        to = self.cells[:, None] + self.moves                           # (n, 5, 2)
        to = np.where(self.walls[to[..., 0], to[..., 1]][..., None], self.cells[:, None], to)
        self.neighbours = self.index[to[..., 0], to[..., 1]]            # (n, 5) cell numbers

    def cell(self, obs):
        return np.rint(np.asarray(obs)).astype(int)

    def place(self, cells, rng=None):
        return np.array(cells, float)

    def move(self, s, a, rng=None):
        """s (N,2), a (N,) integers in 0...4 -> s' (N,2). rng is needed for slips only."""
        a = np.asarray(a)
        if a.dtype.kind not in "iu" or a.shape != (len(s),) or ((a < 0) | (a > 4)).any():
            raise ValueError("a grid action is an integer from 0 to 4, one for each agent")
        if self.slip:
            slips = rng.random(len(a)) < self.slip
            a = np.where(slips, rng.integers(5, size=len(a)), a)
        return self.cells[self.neighbours[self.number(s), a]].astype(float)

    def success(self, s, g):
        return (np.rint(s) == np.rint(g)).all(-1)

    def limits(self, s, g):
        return 4 * np.maximum(self.path_length(s, g), 1)

    def path_length(self, s, g):
        """Length (N,) of the shortest path from s to g, in steps."""
        return self.distance[self.number(s), self.number(g)]


class PointMaze(Maze):
    """A disc of radius `radius` among square walls: pos += speed * clip(a, -1, 1).

    Contact: the disc is pushed out of the wall along the normal of its deepest contact until
    none is left, so that it slides along walls without friction. Moves longer than the radius
    (or 0.02 cells) are made in equal parts, so that nothing passes through a wall or a corner.
    contact="undo" is the contact of HIRO's robot instead: a move whose end lies in a wall is not
    made at all. Success: within 1.0 of the goal. Starts and goals: cell centre +
    U(-noise, noise)^2.
    """

    discrete, action_dim, far, tolerance, side = False, 2, 6, 1.0, 4.0

    def __init__(self, name, layout, speed, limit, radius=0.7, noise=1.0, contact="slide"):
        super().__init__(name, layout)
        if not 0 <= radius < 0.5 * self.side or not speed > 0:
            raise ValueError(f"radius {radius} must be in [0, 2) and speed {speed} positive")
        if contact not in ("slide", "undo"):
            raise ValueError(f"contact must be slide or undo, not {contact!r}")
        self.contact = contact
        self.radius = max(radius, 1e-6)         # a point keeps off the walls by a hair
        self.speed, self.time_limit, self.noise = speed, limit, noise

    def cell(self, obs):
        return np.floor(np.asarray(obs)[..., ::-1] / self.side + 1.5).astype(int)

    def centre(self, cells):
        """(x, y) of the centres of cells (..., 2) given as (row, column)."""
        return self.side * (np.asarray(cells, float)[..., ::-1] - 1)

    def place(self, cells, rng=None):
        centre = self.centre(cells)
        return centre if rng is None else centre + rng.uniform(-self.noise, self.noise,
                                                               centre.shape)

    def move(self, s, a, rng=None):
        """s (N,2), a (N,2), clipped to [-1,1] -> s' (N,2)."""
        s, step = np.array(s, float), self._step(s, a)
        if self.contact == "undo":
            return np.where(self.is_free(s + step)[:, None], s + step, s)
        parts = int(np.ceil(self.speed * np.sqrt(2) / max(self.radius, 0.02 * self.side)))
        half = self.side / 2
        margin = max(self.radius, self.speed / parts) + 1e-6            # of possible contact
        for _ in range(parts):
            s += step / parts
            off = np.abs(np.remainder(s + half, self.side) - half)      # from the cell's centre
            near = off.max(-1) > half - margin
            if near.any():
                self._push_out(s, np.flatnonzero(near))
        return s

    def _step(self, s, a):
        """The displacement (N,2) that actions a ask for."""
        a = np.asarray(a, float)
        if a.shape != (len(s), 2) or not np.isfinite(a).all():
            raise ValueError("a point-maze action is two finite numbers for each agent")
        return self.speed * np.clip(a, -1, 1)

    def _push_out(self, s, live):
        """Push the discs `live` among those at s (N,2) out of the walls, in place."""
        for _ in range(4):                      # a concave corner takes two pushes, rarely more
            depth, normal = self._deepest_contact(s[live])
            live, depth, normal = live[depth > 1e-9], depth[depth > 1e-9], normal[depth > 1e-9]
            if not len(live):
                return
            s[live] += depth[:, None] * normal

    def _contacts(self, s):
        """The nine squares around discs at s (N,2): depth (N,9) in a wall's square (-inf: none, or
        the centre is in it), normals (N,9,2), which are walls (N,9), their centres (N,9,2)."""
        near = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)])
        cells = np.clip(self.cell(s)[:, None] + near, 0, np.array(self.walls.shape) - 1)
        centre, half = self.centre(cells), self.side / 2
        gap = s[:, None] - centre
        gap -= np.clip(gap, -half, half)        # from the nearest point of the square to s
        length = np.sqrt((gap ** 2).sum(-1))
        wall = self.walls[cells[..., 0], cells[..., 1]]
        depth = np.where(wall & (length > 0), self.radius - length, -np.inf)
        return depth, gap / np.maximum(length, 1e-12)[..., None], wall, centre

    def _deepest_contact(self, s):
        """Depth (N,) of the deepest contact with one of the nine squares around, and its normal.

        The contact is at the nearest point of a wall square; where the centre itself is in a
        wall, at the nearest point of a free square.
        """
        depth, normal, wall, centre = self._contacts(s)
        rows, deepest = np.arange(len(s)), depth.argmax(-1)
        depth, normal, inside = depth[rows, deepest], normal[rows, deepest], wall[:, 4]
        if inside.any():
            inner = self.side / 2 - 1e-9        # so that a centre on the edge has a way out too
            gap = (s[:, None] - centre)[inside]
            gap -= np.clip(gap, -inner, inner)
            away = np.where(wall[inside], np.inf, np.sqrt((gap ** 2).sum(-1)))
            out = np.arange(len(away)), away.argmin(-1)
            depth[inside] = self.radius + away[out]
            normal[inside] = -gap[out] / away[out][:, None]
        return depth, normal

    def controller(self, kind, rng):
        """act(s (N,2), g (N,2), t) -> actions (N,2) of a policy that learns nothing.

        collector: that of the data sets, to the centre of the next cell + N(0, 0.5^2), clipped;
        straight: clip(g - s, -1, 1), at the goal, walls or not; random: uniform.
        """
        def act(s, g, t):
            if kind == "random":
                return rng.uniform(-1, 1, s.shape)
            if kind == "straight":
                return np.clip(g - s, -1, 1)
            return self.follow(s, self.number(g), 0.5, rng)

        return act

    def follow(self, s, goal_cell, noise, rng):
        """Actions (N,2): unit vector to the centre of the next cell on the way + noise, clipped."""
        aim = self.centre(self.cells[self.next_cell[self.number(s), goal_cell]])
        return np.clip(unit(aim - s) + noise * rng.normal(size=s.shape), -1, 1)

    def success(self, s, g):
        return np.sqrt(((s - g) ** 2).sum(-1)) <= self.tolerance

    def limits(self, s, g):
        return np.full(len(s), self.time_limit)

    def path_length(self, s, g):
        """Length (N,) of the path from s to g through the centres of cells.

        It goes to the goal itself from the goal's and adjacent cells, else to its cell's centre.
        """
        i, j = self.number(s), self.number(g)
        step = self.next_cell[i, j]
        aim = np.where((step == j)[:, None], g, self.centre(self.cells[step]))
        return np.sqrt(((s - aim) ** 2).sum(-1)) + self.side * self.distance[step, j]


class OGBenchMaze(PointMaze):
    """OGBench's pointmaze without MuJoCo: pos += 0.2 clip(a, -1, 1), then its soft contact.

    Measured on the simulator: a penetration p of one wall becomes 0.1772152 p along the normal;
    with several contacts MuJoCo's convex problem, in one static step of the plane (see _soften).
    Inlets (`i` in the layout): from within 1.5 of one the agent starts its next step at one of
    the outlets (`o`), drawn uniformly; as in OGBench the observation shows the jump then. Where
    it was placed in an inlet, OGBench's first step would not begin with a jump.
    `reset` and `step` are those of `Maze`: a reward of -1 or 0, OGBench's is 0 or 1.
    """

    left, stiffness, friction = 0.1772152, 3.0, 0.5

    def __init__(self, name, layout):
        super().__init__(name, layout, speed=0.2, limit=1000)
        self.inlets, self.outlets = (self.centre(np.argwhere(self.layout == x)) for x in "io")

    @cached_property
    def next_cell(self):
        """As in Maze, ties in OGBench's order: stay, up, left, down, right; stays if no path."""
        to = self.cells[:, None] + np.array([(0, 0), (-1, 0), (0, -1), (1, 0), (0, 1)])
        to = self.index[to[..., 0], to[..., 1]]                         # (n, 5), wall -1
        ahead = np.where(to[..., None] < 0, len(to), self.distance[to])
        return np.take_along_axis(to, ahead.argmin(1), 1)

    def jump(self, s, rng):
        """Where agents shown at s (N,2) start their next step from: those in an inlet elsewhere."""
        s = np.array(s, float)
        for inlet in self.inlets:
            inside = np.flatnonzero(((s - inlet) ** 2).sum(-1) <= 1.5**2)
            if len(inside):
                s[inside] = self.outlets[rng.integers(len(self.outlets), size=len(inside))]
        return s

    def move(self, s, a, rng=None):
        """s (N,2), a (N,2), clipped to [-1,1] -> s' (N,2). rng draws the outlets; without it
        nobody jumps."""
        step = self._step(s, a)
        s = (np.array(s, float) if rng is None else self.jump(s, rng)) + step
        depth, normal = self._contacts(s)[:2]
        touch = np.flatnonzero((depth > 0).any(-1))
        s[touch] += self._soften(np.maximum(depth[touch], 0), normal[touch])
        return s

    def _soften(self, depth, normal):
        """Displacement u (N,2) that contacts of these depths (N,9) and normals (N,9,2) cause.

        MuJoCo's contact problem with pyramidal friction cones (Todorov et al. 2012), in one step:
            min_u |u|^2 + stiffness sum_f max(0, push depth_f - J_f u)^2
        over the facets f of every contact, J = n, n, n + friction t and n - friction t, by
        Newton's method; push is such that a single contact leaves `left` of its depth. The two
        numbers were fitted to the simulator's steps, those with several contacts included.
        """
        tangent = self.friction * np.stack([-normal[..., 1], normal[..., 0]], -1)
        J = np.concatenate([normal, normal, normal + tangent, normal - tangent], 1)
        aim = np.tile(depth, 4) * (1 - self.left) * (1 + 1 / (4 * self.stiffness))
        u = np.zeros((len(depth), 2))
        for _ in range(8):
            pull = self.stiffness * (aim > np.einsum("nfk,nk->nf", J, u)) * (aim > 0)
            H = np.eye(2) + np.einsum("nf,nfk,nfl->nkl", pull, J, J)
            u = np.linalg.solve(H, np.einsum("nf,nfk->nk", pull * aim, J)[..., None])[..., 0]
        return u


# Name -> (class, its arguments, the recipe of its data set). The recipes of the pointmaze-* sets
# are those OGBench published; a trajectory of T rows holds T - 1 transitions.
ENVIRONMENTS = {
    "grid-fourrooms": (GridWorld, dict(layout="fourrooms"),
                       dict(kind="navigate", episodes=1000, rows=201, noise=0.3)),
    "grid-maze": (GridWorld, dict(layout="maze"),
                  dict(kind="navigate", episodes=1000, rows=201, noise=0.3)),
    "point-umaze": (PointMaze, dict(layout="umaze", speed=0.2, limit=500, radius=0.0, noise=0.1),
                    dict(kind="navigate", episodes=500, rows=501, noise=0.5)),
}
for _size in ("medium", "large", "giant", "teleport"):
    if _size != "teleport":
        ENVIRONMENTS[f"point-{_size}"] = (
            PointMaze, dict(layout=_size, speed=0.8, limit=250),
            dict(kind="navigate", episodes=1000, rows=201, noise=0.5))
    _long = _size == "giant"
    for _kind, _episodes, _rows in (("navigate", 500 if _long else 1000, 2001 if _long else 1001),
                                    ("stitch", 5000, 201)):
        ENVIRONMENTS[f"pointmaze-{_size}-{_kind}-v0"] = (
            OGBenchMaze, dict(layout=_size),
            dict(kind=_kind, episodes=_episodes, rows=_rows, noise=0.5))


def make(name, **changes):
    """The environment of that name; changes replace arguments of its class (slip=0.1, ...)."""
    if name not in ENVIRONMENTS:
        raise ValueError(f"unknown environment {name!r}; known: {', '.join(ENVIRONMENTS)}")
    kind, arguments, _ = ENVIRONMENTS[name]
    return kind(name, **{**arguments, **changes})


# --------------------------------------------------------------- tasks of online learning


class GoalTask:
    """A maze by the convention of Gymnasium-Robotics, for online learning: HIRO's tasks.

    Observations are dicts: achieved_goal is the position and desired_goal the goal, (2,) each;
    observation (S,) begins with the position. Actions lie in [-1,1]^2. The reward is minus the
    distance to the goal after the step; nothing terminates, the time limit truncates;
    info["success"] tells of this step. A subclass draws starts and goals (`draw`, `tests`), moves
    N agents (`move`) and says what they see (`observe`), how far they are (`distance`) and what
    counts as reached, at any step and at the last.
    """

    def __init__(self, maze, limit):
        self.maze, self.limit, self.rng = maze, limit, np.random.default_rng()
        self.action_space = SimpleNamespace(low=-np.ones(2), high=np.ones(2), shape=(2,))

    def reset(self, seed=None, options=None):
        """Gymnasium's reset; options: start and goal, (2,) each, instead of drawn ones."""
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        options = options or {}
        start, goal = self.draw(self.rng, 1)
        self.s = np.array(options.get("start", start[0]), float).reshape(1, 2)
        self.goal = np.array(options.get("goal", goal[0]), float).reshape(1, 2)
        self.time = 0
        return self._observation(), {}

    def step(self, action):
        """Gymnasium's step -> (observation, reward, terminated, truncated, info)."""
        self.s, self.time = self.move(self.s, np.asarray(action, float)[None]), self.time + 1
        far = self.distance(self.s, self.goal)
        return (self._observation(), -float(far[0]), False, self.time >= self.limit,
                {"success": bool(self.reached(far)[0])})

    def observe(self, s):
        """Observations (N,S) at positions s (N,2); here the position alone."""
        return s

    def _observation(self):
        return {"observation": self.observe(self.s)[0].copy(), "achieved_goal": self.s[0].copy(),
                "desired_goal": self.goal[0].copy()}


class UMazeTask(GoalTask):
    """HIRO's U-maze (official code: create_maze_env.py, point_maze.gin) for a point mass.

    Start (0, 0) + U(-0.1, 0.1)^2; training goals U(-2, 10)^2, some of them in walls; test goals
    (0, 8), (8, 0), (8, 8) and random free positions; Euclidean distance, 500 steps. Reached:
    within 2.5 (HIGL's evaluation), at the last step within 5 (the paper's).
    """

    def __init__(self, contact="slide"):
        super().__init__(make("point-umaze", contact=contact), 500)

    def draw(self, rng, n):
        return rng.uniform(-0.1, 0.1, (n, 2)), rng.uniform(-2, 10, (n, 2))

    def tests(self, rng, n):
        """{name: (starts (n,2), goals (n,2))}; the first is the paper's."""
        maze = self.maze
        goals = {f"{x}_{y}": np.tile([float(x), float(y)], (n, 1))
                 for x, y in ((0, 8), (8, 0), (8, 8))}
        cells = maze.cells[rng.integers(len(maze.cells), size=n)]
        goals["random"] = maze.centre(cells) + rng.uniform(-2, 2, (n, 2))
        return {name: (self.draw(rng, n)[0], g) for name, g in goals.items()}

    def move(self, s, a):
        return self.maze.move(s, a)

    def distance(self, s, g):
        return np.sqrt(((s - g) ** 2).sum(-1))

    def reached(self, far):
        return far <= 2.5

    def reached_last(self, far):
        return far <= 5


class FourRoomsTask(GoalTask):
    """grid-fourrooms by a vector action: the axis of its largest component moves the agent.

    A largest component below 0.5 stays. The agent sees its row and column and, one-hot, which of
    the free cells it is in: a wall then needs no steep function of two numbers. Start and goal
    are cells of different rooms (doors belong to none); Manhattan distance, 100 steps; reached:
    the goal's cell.
    """

    def __init__(self):
        super().__init__(make("grid-fourrooms"), 100)
        inside = np.flatnonzero(~self.maze.corridors)           # rooms: parts without the doors
        near = self.maze.distance[np.ix_(inside, inside)] == 1
        room = connected_components(csr_matrix(near))[1]
        self.pairs = inside[np.argwhere(room[:, None] != room)]

    def draw(self, rng, n):
        pairs = self.maze.cells[self.pairs[rng.integers(len(self.pairs), size=n)]].astype(float)
        return pairs[:, 0], pairs[:, 1]

    def tests(self, rng, n):
        """{name: (starts (n,2), goals (n,2))}."""
        return {"random": self.draw(rng, n)}

    def move(self, s, a):
        axis = np.abs(a).argmax(-1)
        along = a[np.arange(len(a)), axis]
        return self.maze.move(s, np.where(np.abs(along) < 0.5, 0, 1 + 2 * axis + (along > 0)))

    def observe(self, s):
        return np.concatenate([s, np.eye(len(self.maze.cells))[self.maze.number(s)]], -1)

    def distance(self, s, g):
        return np.abs(s - g).sum(-1)

    def reached(self, far):
        return far < 0.5

    reached_last = reached


GOAL_TASKS = {"point-umaze": UMazeTask, "grid-fourrooms": FourRoomsTask}

# -------------------------------------------------------------------------------- data sets


@dataclass
class Dataset:
    """Trajectories, concatenated, in OGBench's layout.

    observations (N,2) float32; actions (N,2) float32, or (N,) integers on grids; terminals (N,)
    bool, True on the last row of each trajectory. Row i's transition is (row i, action i, row
    i + 1); the last row of a trajectory has none.
    """

    observations: np.ndarray
    actions: np.ndarray
    terminals: np.ndarray

    def __post_init__(self):
        n = len(self.observations)
        if self.observations.ndim != 2 or self.terminals.shape != (n,) or len(self.actions) != n:
            raise ValueError(
                "observations (N,d), actions (N,...) and terminals (N,) do not fit together: "
                f"{self.observations.shape}, {self.actions.shape}, {self.terminals.shape}")
        for key in ("observations", "actions"):
            if not np.isfinite(getattr(self, key)).all():
                raise ValueError(f"{key} contain NaN or infinity")
        if not np.isin(self.terminals, (0, 1)).all():
            raise ValueError("terminals must be 0 or 1")
        self.terminals = self.terminals.astype(bool)
        if not n or not self.terminals[-1]:
            raise ValueError("the last row must end a trajectory (terminals[-1] is not 1)")
        ends = np.flatnonzero(self.terminals)
        lengths = np.diff(ends, prepend=-1)
        if lengths.min() < 2:
            raise ValueError(f"the trajectory that ends in row {ends[lengths.argmin()]} has one "
                             "row only, so no transition")
        self.lengths = lengths                                      # rows of each trajectory
        self.last = np.repeat(ends, lengths).astype(np.int32)       # last row of i's trajectory
        self.valid = np.flatnonzero(~self.terminals).astype(np.int32)   # rows with a transition


def save_dataset(path, data):
    """Write OGBench's npz layout; under a temporary name first, then renamed."""
    with open(f"{path}.{os.getpid()}.tmp", "wb") as file:       # two processes may do the same
        try:
            np.savez_compressed(file, observations=data.observations, actions=data.actions,
                                terminals=data.terminals)
        except BaseException:                                   # a full disk, Ctrl-C
            os.unlink(file.name)
            raise
    os.replace(file.name, path)


def load_dataset(path):
    """Read a data set in OGBench's npz layout (other keys are ignored; nothing is unpickled).

    ValueError names what is wrong with a file; OSError if it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("observations", "actions", "terminals")
                      if key in file.files}
    except (ValueError, TypeError, AttributeError, EOFError, zlib.error, zipfile.BadZipFile,
            MemoryError, RuntimeError) as e:            # the latter: encrypted, unknown compression
        raise ValueError(f"{path} is not an npz file of plain arrays ({e})") from None
    if missing := {"observations", "actions", "terminals"} - set(arrays):
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}; a data set has "
                         "observations, actions, terminals")
    try:
        if any(not isinstance(x, np.ndarray) or x.dtype.kind not in "fiub" or not x.ndim
               for x in arrays.values()):
            raise ValueError("observations, actions and terminals must be arrays of numbers")
        discrete = arrays["actions"].dtype.kind in "iu" and arrays["actions"].ndim == 1
        arrays["actions"] = arrays["actions"].astype(np.int64 if discrete else np.float32,
                                                     copy=False)
        arrays["observations"] = arrays["observations"].astype(np.float32, copy=False)
        return Dataset(**arrays)
    except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: {e}") from None


def check_dataset(data, env):
    """ValueError unless data can have come from env.

    Point mazes: at most 1 % of the rows in walls, and at least 99 % of the transitions within a
    tenth of a full step of the environment's own. Grids: all rows and transitions (with slip, any
    move of one step).
    """
    obs, shape = data.observations, (2,) if not env.discrete else ()
    if obs.shape[1:] != (2,) or data.actions.shape[1:] != shape:
        raise ValueError(f"{env.name} has observations (N, 2) and actions (N{', 2' * len(shape)})"
                         f"; the data set has {obs.shape} and {data.actions.shape}")
    if env.discrete and (data.actions.dtype.kind not in "iu" or data.actions.min() < 0
                         or data.actions.max() > 4):
        raise ValueError(f"actions of {env.name} are integers from 0 to 4")
    known = env.is_free(obs)
    if known.mean() < (1 if env.discrete else 0.99):
        raise ValueError(f"{1 - known.mean():.0%} of the positions lie outside the free cells of "
                         f"{env.name}; the data set is of another maze")
    i = data.valid[:: max(1, len(data.valid) // 100_000)]
    i = i[known[i] & known[i + 1]]
    if env.discrete:
        if env.slip:
            fits = (env.neighbours[env.number(obs[i])] == env.number(obs[i + 1])[:, None]).any(1)
        else:
            fits = env.success(env.move(obs[i], data.actions[i]), obs[i + 1])
    else:
        fits = np.abs(env.move(obs[i], data.actions[i]) - obs[i + 1]).max(-1) < 0.1 * env.speed
    if fits.mean() < (1 if env.discrete else 0.99):
        step = "the move" if env.discrete else f"{env.speed} x action, as far as walls let it"
        raise ValueError(f"{1 - fits.mean():.0%} of the steps are not {step}, in {env.name}; the "
                         "data set is of another environment")


def ogbench_dataset(env, folder="datasets"):
    """The data set of an OGBench name, the same for every seed, kept in `folder`.

    Made by OGBench's recipe, so that it agrees with the published file in distribution, not row
    by row. A file of that name, such as the published one, is used as it is.
    """
    path = os.path.join(folder, f"{env.name}.npz")
    if not os.path.exists(path):
        recipe = ENVIRONMENTS[env.name][2]
        size, rows = f"{recipe['episodes']} x {recipe['rows']} rows", recipe["rows"]

        def tell(done):
            if sys.stdout.isatty() and (done % 20 == 0 or done == rows):
                print(f"\r\033[K{env.name}: {size}, {done / rows:.0%}", end="", flush=True)

        print(f"collecting {env.name}: {size} ...", flush=True)
        os.makedirs(folder, exist_ok=True)
        save_dataset(path, collect(env, np.random.default_rng(0), **recipe, tell=tell))
        print(f"{chr(10) * sys.stdout.isatty()}kept in {path}", flush=True)
    try:
        return load_dataset(path)
    except ValueError as e:
        raise ValueError(f"{e}; remove {path}, and it is made again") from None


def collect(env, rng, kind="navigate", episodes=1000, rows=201, noise=0.5, tell=None):
    """Offline data by OGBench's recipe, all episodes in step: a Dataset of episodes x rows.
    tell(n) is called after each n rows of every episode.

    navigate  follows a shortest path to a random goal, a new goal on arrival. Point: unit vector
              to the next cell's centre + N(0, noise^2), clipped; goals are cells that are not
              straight corridors. Grid: a uniform action with probability noise.
    stitch    point only: as navigate, one goal, 4 cells away (short trajectories).
    explore   point: a new uniform heading every ten steps + N(0, noise^2); grid: uniform actions.
    """
    if kind not in ("navigate", "stitch", "explore") or (env.discrete and kind == "stitch"):
        raise ValueError(f"{env.name} has no data of kind {kind!r}")
    if episodes < 1 or rows < 2 or noise < 0:
        raise ValueError("collect needs episodes >= 1, rows >= 2 and noise >= 0")
    goals = np.flatnonzero(~env.corridors | env.discrete)

    def draw_goal(start):
        if kind != "stitch":
            return rng.choice(goals, size=len(start))
        there = env.distance[start]                                 # (n, cells)
        there = there == np.minimum(4, there.max(-1, keepdims=True))
        return np.argmax(rng.random(there.shape) * there, axis=-1)

    start = rng.integers(len(env.cells), size=episodes)
    s = env.place(env.cells[start], rng)
    goal_cell = draw_goal(start)
    goal = env.place(env.cells[goal_cell], rng)
    observations = np.empty((rows, episodes, 2), np.float32)
    actions = np.empty((rows, episodes) + (() if env.discrete else (2,)),
                       np.int64 if env.discrete else np.float32)
    for t in range(rows):
        at = env.jump(s, rng) if t else s               # nobody jumps before the first step
        if env.discrete:
            a = rng.integers(5, size=episodes)
            if kind == "navigate":
                ahead = env.distance[env.neighbours[env.number(s)], goal_cell[:, None]]
                a = np.where(rng.random(episodes) < noise, a, ahead.argmin(-1))
        elif kind == "explore":
            if t % 10 == 0:
                angle = rng.uniform(0, 2 * np.pi, episodes)
                heading = np.stack([np.cos(angle), np.sin(angle)], -1)
            a = np.clip(heading + noise * rng.normal(size=s.shape), -1, 1).astype(np.float32)
        else:
            a = env.follow(at, goal_cell, noise, rng).astype(np.float32)
        observations[t], actions[t] = s, a
        s = env.move(at, a, rng if env.discrete else None)
        arrived = np.flatnonzero(env.success(s, goal))
        if len(arrived) and kind == "navigate":
            goal_cell[arrived] = draw_goal(arrived)
            goal[arrived] = env.place(env.cells[goal_cell[arrived]], rng)
        if tell:
            tell(t + 1)
    terminals = np.zeros((episodes, rows), bool)
    terminals[:, -1] = True
    return Dataset(observations.swapaxes(0, 1).reshape(-1, 2),
                   actions.swapaxes(0, 1).reshape((-1,) + actions.shape[2:]), terminals.ravel())


# ------------------------------------------------------------------------------ exact answers


def optimal_value(steps, gamma):
    """V* of a goal that many steps away: reward -1 a step, 0 at the goal, which absorbs."""
    return -(1 - gamma ** np.asarray(steps, float)) / (1 - gamma)


def goal_counts(env, data, gamma, p_current, p_future, p_random, success="index"):
    """The joint distribution of (s, s', g, success) that HIQL's value loss draws, counted.

    A row i with a transition is drawn uniformly; its goal is row i itself with p_current, row
    min(i + Geometric(1 - gamma), fin) with p_future, where fin is the last row but one of the
    trajectory, or any row with a transition with p_random. Success: the goal is row i ("index")
    or lies in row i's cell ("state").
    -> at_goal (n, n): probability of (s, g) and success; go_on (n, 5, n): of (s, move, g) and no
    success. s' is env.neighbours[s, move], n the number of cells. They sum to 1.
    """
    n, valid = len(env.cells), data.valid
    cell = env.number(data.observations)
    moved = env.neighbours[cell[valid]] == cell[valid + 1, None]
    if not moved.any(-1).all():
        raise ValueError("the data set has steps that are no move of the grid")
    s, slot, fin = cell[valid], moved.argmax(-1), data.last[valid] - 1
    at_goal, go_on = np.zeros(n * n), np.zeros(n * 5 * n)

    def add(rows, goal, weight, same):
        hit = (goal == s[rows]) if success == "state" else np.full(len(rows), same)
        at, on = s[rows] * n + goal, (s[rows] * 5 + slot[rows]) * n + goal
        weight = np.broadcast_to(weight, len(rows))
        at_goal[:] += np.bincount(at[hit], weight[hit], minlength=n * n)
        go_on[:] += np.bincount(on[~hit], weight[~hit], minlength=n * 5 * n)

    everyone = np.arange(len(valid))
    add(everyone, s, p_current, True)
    add(everyone[valid == fin], s[valid == fin], p_future, True)
    for ahead in range(1, data.lengths.max() - 1):
        rows = everyone[valid + ahead <= fin]
        ends = valid[rows] + ahead == fin[rows]                 # the truncation's whole tail
        weight = p_future * gamma ** (ahead - 1) * np.where(ends, 1, 1 - gamma)
        add(rows, cell[valid[rows] + ahead], weight, False)
    frequency = np.bincount(s, minlength=n) / len(valid)
    for g in np.flatnonzero(frequency):
        add(everyone, np.full(len(s), g), p_random * frequency[g], False)
    if success == "index":                                      # a random goal that is row i
        self_weight = p_random / len(valid)
        add(everyone, s, self_weight, True)
        go_on -= np.bincount((s * 5 + slot) * n + s, minlength=n * 5 * n) * self_weight
    shape = (n, 5, n)
    return at_goal.reshape(n, n) / len(valid), go_on.reshape(shape) / len(valid)


def expectile_values(env, at_goal, go_on, gamma, expectile):
    """The exact fixed point V (n, n) that HIQL's value loss regresses to, from `goal_counts`.

    V(s,g) is the expectile of y = 0 at success and y = -1 + gamma V(s',g) otherwise: the root of
    sum_y p(y) |expectile - 1(y < V)| (y - V) = 0. Pairs that the data never holds are NaN.
    """
    seen = at_goal + go_on.sum(1) > 1e-15
    at_goal, v = np.where(seen, at_goal, 1), np.zeros(at_goal.shape)        # V is 0 if not seen
    while True:
        new = _expectile(-1 + gamma * v[env.neighbours], v, go_on, expectile, at_goal)
        change, v = np.abs(new - v).max(), new
        if change < 1e-12:
            return np.where(seen, v, np.nan)


def _expectile(y, v, p, expectile, zero=0):
    """The expectile (n, n) over the second axis of y (n, m, n) of weight p, and of 0 with `zero`.

    Newton's method from v, exact once no value changes sides; a single step of it inside value
    iteration would be no contraction and might cycle.
    """
    for _ in range(50):
        weight = p * np.where(y >= v[:, None], expectile, 1 - expectile)
        new = (weight * y).sum(1) / (weight.sum(1) + expectile * zero)
        change, v = np.abs(new - v).max(), new
        if change < 1e-13:
            break
    return v


def values_under_chance(env, gamma, expectile):
    """Why an action-free expectile is optimistic on a slippery grid: three exact values (n, n).

    Behaviour: uniform actions; goals absorb. Q(s,a,g) = E[-1 + gamma V(s',g)] over the slips.
    -> optimal          V = max_a Q
       over actions     V = the expectile of Q over a (IQL): luck is averaged before it
       action-free      V = the expectile of -1 + gamma V(s',g) over s' (HIQL): a lucky slip
                        counts like a good action
    """
    def solve(backup):
        v, goal = np.zeros((len(env.cells),) * 2), np.eye(len(env.cells), dtype=bool)
        while True:
            y = -1 + gamma * v[env.neighbours]                  # (n, 5, n) after each move
            new = np.where(goal, 0, backup(y, v))
            change, v = np.abs(new - v).max(), new
            if change < 1e-9:
                return v

    def q(y):
        return (1 - env.slip) * y + env.slip * y.mean(1, keepdims=True)

    return {"optimal": solve(lambda y, v: q(y).max(1)),
            "over actions": solve(lambda y, v: _expectile(q(y), v, 1, expectile)),
            "action-free": solve(lambda y, v: _expectile(y, v, 1, expectile))}


def behaviour_counts(go_on):
    """`goal_counts` with s' made independent of g: the same p(s), p(g | s) and p(s' | s).

    Its fixed point is that of the policy which collected the data. Hindsight goals lie where a
    trajectory went, so that given g the recorded s' is a better step than that policy's average.
    """
    pair, move = go_on.sum(1, keepdims=True), go_on.sum(2, keepdims=True)
    return pair * move / np.maximum(move.sum(1, keepdims=True), 1e-300)


# ------------------------------------------------------------------------------------ drawing


def draw_maze(ax, env, values=None, **style):
    """Walls, and a map of values if given: one for each free point of `lattice`.

    Axes as the observations: x to the right and y up, or on grids row 0 on top. Returns the
    image of the values.
    """
    h, w = env.walls.shape
    free = lattice(env)[1]
    image = np.full(free.shape, np.nan)
    image[free] = 0 if values is None else values
    low, high = (-0.5, h - 0.5), (-0.5, w - 0.5)                # row and column edges
    if not env.discrete:
        low, high = env.centre(list(zip(low, high))).T[::-1]
    style = {"cmap": "Greys", "vmin": 0, "vmax": 1} if values is None else style
    ax.set_facecolor("0.35")
    image = ax.imshow(image, origin="lower", extent=(*high, *low), **style)
    if env.discrete:
        ax.invert_yaxis()
    ax.set_xticks([])
    ax.set_yticks([])
    return image


def plot_xy(env, obs):
    """Observations (..., 2) as horizontal and vertical coordinates of `draw_maze`."""
    x, y = np.moveaxis(np.asarray(obs, float), -1, 0)
    return (y, x) if env.discrete else (x, y)


def lattice(env, per_cell=8):
    """Observations (h, w, 2) on a regular lattice over the maze, and which lie in free cells."""
    per_cell = 1 if env.discrete else per_cell
    h, w = env.walls.shape
    i, j = (np.arange(per_cell * n) / per_cell - 0.5 + 0.5 / per_cell for n in (h, w))
    cells = np.stack(np.meshgrid(i, j, indexing="ij"), -1)
    free = ~env.walls.repeat(per_cell, 0).repeat(per_cell, 1)
    return (cells if env.discrete else env.centre(cells)), free


def draw_tasks(ax, env):
    """The fixed tasks of a maze: an arrow from start to goal, numbered at the start."""
    draw_maze(ax, env)
    for number, (start, goal) in enumerate(env.tasks):
        (x, u), (y, v) = plot_xy(env, env.place(np.array([start, goal])))
        ax.annotate("", (u, v), (x, y), zorder=3, arrowprops=dict(
            arrowstyle="->", color=f"C{number}", lw=1.5, connectionstyle="arc3,rad=0.15"))
        ax.plot(u, v, "*", color=f"C{number}", ms=9, zorder=4)
        ax.text(x, y, str(number + 1), color=f"C{number}", weight="bold", ha="center",
                va="center", zorder=4)
    ax.set_title(f"{env.name}\n{len(env.cells)} free cells", fontsize=9)


def draw_paths(ax, env, paths, goals, success):
    """Episodes from above: paths (T, N, 2), goals (N, 2), success (N,); failures in red."""
    draw_maze(ax, env)
    for i in np.argsort(~success)[::-1]:                        # failures on top
        ax.plot(*plot_xy(env, paths[:, i]), lw=0.8, alpha=0.7, color="C0" if success[i] else "C3")
    ax.plot(*plot_xy(env, paths[0]), "k.", ms=3)
    ax.plot(*plot_xy(env, goals), "*", color="C1", ms=6)
    ax.set_title(f"{success.mean():.0%}", fontsize=9)


def save_figure(figure, path):
    """Write a figure as png; under a temporary name first, then renamed."""
    figure.savefig(f"{path}.tmp", format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    os.replace(f"{path}.tmp", path)


def draw_chance(path, gamma=0.95, expectile=0.9):
    """Mean exact values over the distance to the goal, without and with slips of the actions."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    for ax, slip in zip(axes, (0.0, 0.5)):
        env = make("grid-fourrooms", slip=slip)
        far = np.arange(1, env.distance.max() + 1)
        for (name, v), line in zip(values_under_chance(env, gamma, expectile).items(),
                                   ("k-", "C0--", "C1:")):
            ax.plot(far, [v[env.distance == d].mean() for d in far], line, lw=2, label=name)
        ax.set(title=f"slip {slip:g}, expectile {expectile:g}", xlabel="distance to the goal")
    axes[0].set_ylabel("exact value, mean")
    axes[0].legend(fontsize=8)
    save_figure(figure, path)


def main(folder="runs"):
    """Draw the mazes with their tasks, and on the four rooms exact values of several kinds."""
    os.makedirs(folder, exist_ok=True)
    names = [name for name in ENVIRONMENTS if not name.startswith("pointmaze")]
    figure, axes = plt.subplots(2, 3, figsize=(11, 8))
    for ax, name in zip(axes.flat, names):
        draw_tasks(ax, make(name))
    save_figure(figure, os.path.join(folder, "mazes.png"))

    env, gamma = make("grid-fourrooms"), 0.95
    data = collect(env, np.random.default_rng(0), **ENVIRONMENTS[env.name][2])
    at_goal, go_on = goal_counts(env, data, gamma, 0.2, 0.5, 0.3)
    g = env.number([env.tasks[0][1]])[0]
    maps = {"optimal value": optimal_value(env.distance, gamma),
            "fixed point of HIQL's loss\n(expectile 0.7, hindsight goals)":
                expectile_values(env, at_goal, go_on, gamma, 0.7),
            "the same if s' did not depend on g\n(the data's own policy)":
                expectile_values(env, at_goal, behaviour_counts(go_on), gamma, 0.7)}
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    for ax, (title, v) in zip(axes, maps.items()):
        image = draw_maze(ax, env, v[:, g], vmin=-1 / (1 - gamma), vmax=0)
        ax.plot(*plot_xy(env, env.tasks[0][1]), "r*", ms=12, zorder=3)
        ax.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8)
    save_figure(figure, os.path.join(folder, "exact_values.png"))
    _, hiql, behaviour = maps.values()
    print(f"mean distance of the two fixed points: {np.nanmean(np.abs(hiql - behaviour)):.3f}, "
          f"{np.nanmean(np.abs(hiql - behaviour)) / np.ptp(hiql):.1%} of the range")
    draw_chance(os.path.join(folder, "chance.png"))
    print(f"wrote mazes.png, exact_values.png and chance.png to {os.path.abspath(folder)}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
