"""Mazes, tasks and offline data: what the two algorithms learn on. NumPy and SciPy only.

    make(name)          a maze that moves N agents at once; HIQL learns from its data (`dataset`)
    make_task(name)     an online task by Gymnasium's reset and step, in which HIRO learns
    register(name, layout="...")     adds a maze of your own

  grid-fourrooms, grid-maze            integer actions; observation (row, column) as floats
  point-{umaze,medium,large,giant}     a disc, actions in [-1, 1]^2; observation (x, y)
  pointmaze-{medium,large,giant,teleport}-{navigate,stitch}-v0     OGBench's (lab/ogbench.py)

Cells are named by (row, column). In point mazes they are squares of side 4, and cell (i, j) has
its centre at x = 4j - 4, y = 4i - 4, as in OGBench (Park et al. 2024, arXiv 2410.20092). Medium,
large and giant have OGBench's layouts, tasks and way of collecting data; in point-* their agent is
four times as fast as OGBench's and their data are fewer. The U-maze is that of HIRO's code.
To see the mazes: `python -m support.plots`.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import importlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import shortest_path

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
}

# The maze is the medium one, each cell inside the border doubled in both directions.
_inside = np.array([list(row) for row in LAYOUTS["medium"].split()])[1:-1, 1:-1]
_doubled = np.pad(_inside.repeat(2, 0).repeat(2, 1), 1, constant_values="#")
LAYOUTS["maze"] = "\n".join("".join(row) for row in _doubled)

# (start, goal) cells of the five evaluation tasks
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
}


# ------------------------------------------------------------------------------------- mazes


class Maze:
    """A layout with its shortest paths, its evaluation tasks and its data set.

    layout: a name in LAYOUTS, or rows of # (wall) and . (free) in one string. tasks: pairs of a
    start and a goal cell; without them those of TASKS, for an own layout five by `far_tasks`.
    ValueError: a layout or tasks that are wrong.
    A subclass has, for N agents at observations s (N, 2) with goals g (N, 2):
        cell(s) -> cells (N, 2)     place(cells, rng=None) -> observations; rng: of noise, if any
        move(s, a, rng) -> s'       success(s, g) -> (N,) bool      limits(s, g) -> (N,) steps
        path_length(s, g) -> (N,)   follow(s, goal_cell (N,), noise, rng) -> actions, for `collect`
    and discrete (actions are integers), action_dim, side (of a cell), tolerance (the distance that
    counts as reached), pair_distance (cells between random evaluation pairs, at least), time_limit
    (steps; None: `limits` depend on s and g).
    """

    symbols = "#."
    connected = True                        # a path joins any two free cells
    extra = 0                               # entries of `pair` beyond those of s and g
    units = {}                              # what acting needs beside the maze's name: nothing
    recipe = dict(kind="navigate", episodes=1000, rows=201, noise=0.5)      # for `collect`
    defaults = {}                           # what the maze changes in hiql.Config's defaults

    def __init__(self, name, layout, tasks=None):
        rows = LAYOUTS.get(layout, layout).split()
        if unknown := set("".join(rows)) - set(self.symbols):
            raise ValueError(f"{name}: a layout is one of {', '.join(LAYOUTS)}, or rows of "
                             f"{' '.join(self.symbols)} (# is a wall); this one has "
                             f"{min(unknown)!r}")
        sizes = {len(row) for row in rows}
        if len(sizes) > 1:
            raise ValueError(f"{name}: the rows of the layout have {min(sizes)} to {max(sizes)} "
                             "cells; all must have the same number")
        self.name = name
        self.layout = np.array([list(row) for row in rows])
        self.walls = self.layout == "#"
        self.cells = np.argwhere(~self.walls)                           # (n, 2) row, column
        if len(self.cells) < 2:
            raise ValueError(f"{name}: the layout needs at least two free cells")
        if not (self.walls[[0, -1]].all() and self.walls[:, [0, -1]].all()):
            raise ValueError(f"{name}: the border of the layout must be closed by walls")
        self.index = np.full(self.walls.shape, -1)                      # cell -> number, wall -1
        self.index[tuple(self.cells.T)] = np.arange(len(self.cells))
        if self.connected and (self.distance < 0).any():
            raise ValueError(f"{name}: some free cells have no path to the others")
        if tasks is None:
            tasks = TASKS.get(layout) or self.far_tasks()
        if len(tasks) and np.shape(tasks)[1:] != (2, 2):
            raise ValueError(f"{name}: a task is a start and a goal cell, ((row, column), (row, "
                             "column))")
        self.tasks = [(tuple(start), tuple(goal)) for start, goal in tasks]
        free = set(map(tuple, self.cells.tolist()))
        if wrong := {cell for task in self.tasks for cell in task} - free:
            raise ValueError(f"{name}: the tasks have {min(wrong)}, which is no free cell")

    def far_tasks(self):
        """Five (start, goal) pairs: first the two cells farthest apart; each further start is the
        cell farthest from all earlier starts, and its goal is the cell farthest from it."""
        starts = [self.distance.max(1).argmax()]
        while len(starts) < 5:
            starts.append(self.distance[starts].min(0).argmax())
        goals = self.distance[starts].argmax(1)
        return self.cells[np.stack([starts, goals], 1)].tolist()

    def settings(self, published=False):
        """What the maze changes in hiql.Config's defaults; published: if the rates are those."""
        return dict(self.defaults)

    def dataset(self, rng):
        """The offline data set, collected by the maze's recipe: a Dataset."""
        return collect(self, rng, **self.recipe)

    def see_positions(self):
        """Let networks see positions alone; here they do."""

    def encode(self, obs, dtype=np.float32):
        """What the networks see of observations (..., 2): here the same, in that dtype."""
        return np.asarray(obs, dtype)

    def encode_goal(self, goal, dtype=np.float32):
        """What the networks see of goals (..., 2), which are observations."""
        return self.encode(goal, dtype)

    def pair(self, s, g):
        """Encoded states s (..., S) and goals g (..., G), one input: (..., S + G + extra)."""
        return np.concatenate([s, g], -1)

    @cached_property
    def distance(self):
        """Steps of the shortest path between any two free cells, -1 without one: (n, n) ints."""
        gap = np.abs(self.cells[:, None] - self.cells[None]).sum(-1)
        steps = shortest_path(csr_matrix(gap == 1), unweighted=True)
        return np.where(np.isfinite(steps), steps, -1).astype(int)

    @cached_property
    def next_cell(self):
        """next_cell[i, j]: number of the cell after i on a shortest path to j; i if i is j or no
        path exists; (n, n). Of several the one with the largest number, on every machine."""
        beside = self.cells[:, None] + [(-1, 0), (0, -1), (0, 1), (1, 0)]
        beside = self.index[beside[..., 0], beside[..., 1]]             # (n, 4), wall -1
        nearer = self.distance[beside] == self.distance[:, None] - 1    # (n, 4, n)
        nearer &= (beside >= 0)[..., None]
        after = np.where(nearer, beside[..., None], -1).max(1)
        return np.where(after < 0, np.arange(len(after))[:, None], after)

    @cached_property
    def corridors(self):
        """Which cells (n,) are straight corridors: two open sides, opposite each other."""
        i, j = self.cells.T
        rows = ~self.walls[[i - 1, i + 1], j]
        columns = ~self.walls[i, [j - 1, j + 1]]
        return (rows.all(0) & ~columns.any(0)) | (columns.all(0) & ~rows.any(0))

    def number(self, obs):
        """Numbers (N,) of the cells that observations (N, 2) lie in; ValueError if one is wall."""
        number = self._number(obs)
        if (number < 0).any():
            raise ValueError(f"position {np.asarray(obs)[np.argmin(number)]} is inside a wall "
                             f"of {self.name}")
        return number

    def is_free(self, obs):
        """Whether observations (N, 2) lie in free cells: (N,) bool."""
        return self._number(obs) >= 0

    def _number(self, obs):
        i, j = np.clip(self.cell(obs), 0, np.array(self.walls.shape) - 1).T
        return self.index[i, j]                         # walls enclose the maze: outside is wall

    def random_pairs(self, rng, n, at_least):
        """n pairs of cells with a path of at_least steps or more: starts (n, 2), goals (n, 2);
        ValueError if the maze has none."""
        pairs = np.argwhere(self.distance >= at_least)
        if not len(pairs):
            raise ValueError(f"{self.name} has no two cells at least {at_least} steps apart")
        pairs = pairs[rng.integers(len(pairs), size=n)]
        return self.cells[pairs[:, 0]], self.cells[pairs[:, 1]]

    def jump(self, s, rng):
        """Where agents observed at s (N, 2) start their next step from: here at s."""
        return s


class GridWorld(Maze):
    """An agent in a cell; actions 0 stay, 1 up, 2 down, 3 left, 4 right; no move into a wall.

    With probability `slip` a uniformly drawn action replaces the one given. Time limit: four
    times the length of the shortest path, at least 4.
    """

    discrete = True
    action_dim = 5
    side = 1.0
    tolerance = 0.5
    pair_distance = 8
    time_limit = None                       # depends on start and goal
    moves = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])
    recipe = {**Maze.recipe, "noise": 0.3}
    defaults = dict(discount=0.95, subgoal_steps=5, steps=8000, temperature=2.0)

    def __init__(self, name, layout, slip=0.0, tasks=None):
        super().__init__(name, layout, tasks)
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
        """s (N, 2), a (N,) integers in 0...4 -> s' (N, 2). rng is needed only if slip > 0."""
        a = np.asarray(a)
        if a.dtype.kind not in "iu" or a.shape != (len(s),) or ((a < 0) | (a > 4)).any():
            raise ValueError("a grid action is an integer from 0 to 4, one for each agent")
        if self.slip:
            slips = rng.random(len(a)) < self.slip
            a = np.where(slips, rng.integers(5, size=len(a)), a)
        return self.cells[self.neighbours[self.number(s), a]].astype(float)

    def follow(self, s, goal_cell, noise, rng):
        """Actions (N,) along a shortest path; with probability noise uniform ones instead."""
        uniform = rng.integers(5, size=len(s))
        ahead = self.distance[self.neighbours[self.number(s)], goal_cell[:, None]]
        return np.where(rng.random(len(s)) < noise, uniform, ahead.argmin(1))

    def success(self, s, g):
        return (np.rint(s) == np.rint(g)).all(1)

    def limits(self, s, g):
        return 4 * np.maximum(self.path_length(s, g), 1)

    def path_length(self, s, g):
        """Length (N,) of the shortest path from s to g, in steps."""
        return self.distance[self.number(s), self.number(g)]


NEAR = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)])      # a cell and those around


class PointMaze(Maze):
    """A disc of radius `radius` among square walls: pos += speed * clip(a, -1, 1).

    The disc is pushed out of walls along the normal of its deepest contact until no contact is
    left, so that it slides along walls without friction. A move is made in equal parts that are no
    longer than the radius (or 0.02 of a cell's side, if that is more), so that nothing passes
    through a wall or a corner.
    Success: within 1.0 of the goal. `place`: cell centre + U(-noise, noise)^2. limit: steps of an
    episode. ValueError: a radius or speed out of range.
    """

    discrete = False
    action_dim = 2
    side = 4.0
    tolerance = 1.0
    pair_distance = 6

    def __init__(self, name, layout, speed=0.8, limit=250, radius=0.7, noise=1.0, tasks=None):
        super().__init__(name, layout, tasks)
        if not 0 <= radius < 0.5 * self.side or not speed > 0 or not limit > 0:
            raise ValueError(f"radius {radius} must be in [0, 2), speed {speed} and limit {limit} "
                             "positive")
        self.radius = max(radius, 1e-6)         # radius 0: a point stays just off the walls
        self.speed = speed
        self.time_limit = limit
        self.noise = noise

    def cell(self, obs):
        return np.floor(np.asarray(obs)[..., ::-1] / self.side + 1.5).astype(int)

    def centre(self, cells):
        """(x, y) of the centres of cells (..., 2) given as (row, column)."""
        return self.side * (np.asarray(cells, float)[..., ::-1] - 1)

    def place(self, cells, rng=None):
        centre = self.centre(cells)
        if rng is None:
            return centre
        return centre + rng.uniform(-self.noise, self.noise, centre.shape)

    def move(self, s, a, rng=None):
        """s (N, 2), a (N, 2), clipped to [-1, 1] -> s' (N, 2)."""
        step = self._step(s, a)
        s = np.array(s, float)
        parts = int(np.ceil(self.speed * np.sqrt(2) / max(self.radius, 0.02 * self.side)))
        half = self.side / 2
        margin = max(self.radius, self.speed / parts) + 1e-6    # farther from all edges: no contact
        for _ in range(parts):
            s += step / parts
            off = np.abs(np.remainder(s + half, self.side) - half)      # from the cell's centre
            near = off.max(1) > half - margin
            if near.any():
                self._push_out(s, np.flatnonzero(near))
        return s

    def _step(self, s, a):
        """The displacement (N, 2) that actions a ask for."""
        a = np.asarray(a, float)
        if a.shape != (len(s), 2) or not np.isfinite(a).all():
            raise ValueError("a point-maze action is two finite numbers for each agent")
        return self.speed * np.clip(a, -1, 1)

    def _push_out(self, s, live):
        """Push the discs `live` among those at s (N, 2) out of the walls, in place."""
        for _ in range(4):                      # a concave corner takes two pushes, rarely more
            depth, normal = self._deepest_contact(s[live])
            touch = depth > 1e-9
            live, depth, normal = live[touch], depth[touch], normal[touch]
            if not len(live):
                return
            s[live] += depth[:, None] * normal

    def _around(self, s, half):
        """The 3 x 3 cells around positions s (N, 2), as squares of that half-width: s less the
        nearest point of each square (N, 9, 2), its length (N, 9), and whether a cell is a wall."""
        cells = np.clip(self.cell(s)[:, None] + NEAR, 0, np.array(self.walls.shape) - 1)
        gap = s[:, None] - self.centre(cells)
        gap -= np.clip(gap, -half, half)
        return gap, np.sqrt((gap ** 2).sum(-1)), self.walls[cells[..., 0], cells[..., 1]]

    def _contacts(self, s):
        """Of discs at s (N, 2) with the 3 x 3 cells around: depths (N, 9), negative without contact
        (-inf: the cell is free, or has the disc's centre in it); normals out of the cells
        (N, 9, 2); whether the centre is in a wall (N,)."""
        gap, length, wall = self._around(s, self.side / 2)
        depth = np.where(wall & (length > 0), self.radius - length, -np.inf)
        return depth, gap / np.maximum(length, 1e-12)[..., None], wall[:, 4]

    def _deepest_contact(self, s):
        """Depth (N,) of the deepest contact with the 3 x 3 cells around, and its normal (N, 2).

        The contact is at the nearest point of a wall cell. Where the disc's centre itself is in a
        wall, the way out is to the nearest point of a free cell.
        """
        depth, normal, inside = self._contacts(s)
        deepest = np.arange(len(s)), depth.argmax(1)
        depth, normal = depth[deepest], normal[deepest]
        if inside.any():                        # away > 0 even if the disc's centre is on an edge
            gap, away, wall = self._around(s[inside], self.side / 2 - 1e-9)
            away = np.where(wall, np.inf, away)
            nearest = np.arange(len(away)), away.argmin(1)
            depth[inside] = self.radius + away[nearest]
            normal[inside] = -gap[nearest] / away[nearest][:, None]
        return depth, normal

    def follow(self, s, goal_cell, noise, rng):
        """Actions (N, 2) along a shortest path: the unit vector to the centre of the next cell +
        N(0, noise^2), clipped to [-1, 1]."""
        aim = self.centre(self.cells[self.next_cell[self.number(s), goal_cell]]) - s
        length = np.maximum(np.sqrt((aim ** 2).sum(1, keepdims=True)), 1e-9)
        return np.clip(aim / length + noise * rng.normal(size=s.shape), -1, 1)

    def success(self, s, g):
        return np.sqrt(((s - g) ** 2).sum(1)) <= self.tolerance

    def limits(self, s, g):
        return np.full(len(s), self.time_limit)

    def path_length(self, s, g):
        """Length (N,) of the path from s to g through the centres of cells; inf without a path.

        From g's cell and the cells next to it this is the distance from s to g itself; from
        elsewhere the path ends at the centre of g's cell.
        """
        i, j = self.number(s), self.number(g)
        step = self.next_cell[i, j]
        aim = np.where((step == j)[:, None], g, self.centre(self.cells[step]))
        length = np.sqrt(((s - aim) ** 2).sum(1)) + self.side * self.distance[step, j]
        return np.where(self.distance[i, j] < 0, np.inf, length)


@dataclass
class Entry:
    """How `make` builds an environment."""

    kind: object                                    # a subclass of Maze, or "module:name" of one
    arguments: dict                                 # of the class, without the maze's name
    recipe: dict = field(default_factory=dict)      # changes of the class's own `recipe`
    settings: dict = field(default_factory=dict)    # changes of the class's own `defaults`


# Classes of the laboratory stand here as strings, which `make` imports only when it is asked for
# one: no other line of this file depends on lab/.
ENVIRONMENTS = {
    "grid-fourrooms": Entry(GridWorld, dict(layout="fourrooms")),
    "grid-maze": Entry(GridWorld, dict(layout="maze")),
    "point-umaze": Entry(
        PointMaze, dict(layout="umaze", speed=0.2, limit=500, radius=0.0, noise=0.1),
        dict(kind="navigate", episodes=500, rows=501, noise=0.5),
        dict(discount=0.99, subgoal_steps=25)),
    "point-medium": Entry(PointMaze, dict(layout="medium")),
    "point-large": Entry(PointMaze, dict(layout="large")),
    "point-giant": Entry(PointMaze, dict(layout="giant"), settings=dict(discount=0.99)),
}
for _size in ("medium", "large", "giant", "teleport"):
    for _kind in ("navigate", "stitch"):
        ENVIRONMENTS[f"pointmaze-{_size}-{_kind}-v0"] = Entry("lab.ogbench:OGBenchMaze",
                                                              dict(layout=_size))
BUILT_IN = tuple(ENVIRONMENTS)
SAVED_KINDS = {"GridWorld": GridWorld, "PointMaze": PointMaze}      # of mazes in a checkpoint


def imported(entry):
    """The object that "module:name" names, imported when asked for; anything else as it is."""
    if not isinstance(entry, str):
        return entry
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def make(name, **changes):
    """The maze of that name; `changes` replace arguments of its class (slip=0.1, ...).

    ValueError: an unknown name, or arguments that the class refuses.
    """
    if name == "none":
        raise ValueError("'none' stands for data alone and is no maze")
    if name not in ENVIRONMENTS:
        raise ValueError(f"unknown environment {name!r}; known: {', '.join(ENVIRONMENTS)}")
    entry = ENVIRONMENTS[name]
    env = imported(entry.kind)(name, **{**entry.arguments, **changes})
    env.recipe = {**env.recipe, **entry.recipe}
    env.defaults = {**env.defaults, **entry.settings}
    return env


def register(name, kind=PointMaze, recipe=None, settings=None, **arguments):
    """Give `make` a new environment; a layout is enough: register("mine", layout=ROWS).

    kind: a subclass of Maze, or "module:name" of one, imported by `make`. arguments: of that
    class. recipe: arguments of `collect` for its data; settings: its defaults of hiql.Config; both
    change single entries of the class's. ValueError: a name that exists, or (unless kind is a
    string: then by `make`) arguments that the class refuses.
    """
    if name in ENVIRONMENTS or name == "none":
        raise ValueError(f"there is an environment {name!r} already")
    if isinstance(kind, type):
        kind(name, **arguments)                 # a wrong layout is refused here and not later
    ENVIRONMENTS[name] = Entry(kind, arguments, recipe or {}, settings or {})


def saved_entry(name):
    """What `register_saved` takes to register an own maze again, as JSON has it: a dict. None for
    the mazes above, classes of other files, and arguments that JSON has no form for."""
    entry = ENVIRONMENTS.get(name)
    if name in BUILT_IN or entry is None or entry.kind not in SAVED_KINDS.values():
        return None
    try:
        return json.loads(json.dumps({**vars(entry), "kind": entry.kind.__name__}))
    except TypeError:
        return None


def register_saved(name, entry):
    """Register an own maze by its `saved_entry`, unless the name is known. ValueError: no such
    entry, or arguments that the class refuses."""
    if name not in ENVIRONMENTS:
        if entry["kind"] not in SAVED_KINDS:
            raise ValueError(f"{name}: a saved maze is one of {', '.join(SAVED_KINDS)}")
        register(name, SAVED_KINDS[entry["kind"]], entry["recipe"], entry["settings"],
                 **entry["arguments"])


# ---------------------------------------------------------------------------- online tasks


class GoalEnv:
    """A maze by Gymnasium's reset and step, with the dict observations of Gymnasium-Robotics.

    observation (S,) begins with the position; achieved_goal (P,) is the position and desired_goal
    (P,) the goal; float64. Starts and goals: in random cells (`draw`), or of the maze's tasks.
    Reward 0 at the goal, which terminates the episode, else -1. The time limit truncates it (limit:
    steps, None: the maze's own). info["success"]: whether this step's end counts as reached.
    A subclass may change starts and goals (`draw`, `tests`), the states of N agents (`begin`: here
    their positions) and how they move (`move`), what they see (`observe`), their `position` and its
    distance to the goal (`distance`), when it counts as reached (`reached`, `reached_last`), the
    reward, and the attributes below.
    """

    settings = {}                           # what the task changes in hiro.Config's defaults
    eval_noise = 0.0                        # std of the noise on actions in evaluation
    goal_scale = 1.0                        # factor on goal_range for each axis of the position
    goal_terminates = True
    goals_in_walls = False                  # whether `reset` allows them

    def __init__(self, maze, limit=None):
        self.name = maze.name
        self.maze = maze
        if limit is not None and not limit > 0:
            raise ValueError(f"limit must be positive, not {limit}")
        self.limit = limit or maze.time_limit
        self.rng = np.random.default_rng()
        self.state = None
        if maze.discrete:
            self.action_space = SimpleNamespace(n=maze.action_dim, shape=())
        else:
            self.action_space = SimpleNamespace(low=-np.ones(2), high=np.ones(2), shape=(2,))

    @property
    def action_size(self):
        """Entries of an action; 0 if actions are integers."""
        return sum(self.action_space.shape)

    def reset(self, seed=None, options=None):
        """Start an episode -> (observation, info).

        options: "task": the number of one of the maze's tasks, from 1; "start" (2,) and "goal"
        (P,): positions in place of the task's or of drawn ones. ValueError: an unknown option or
        task, or a position in a wall or of a wrong size.
        """
        options = dict(options or {})
        if unknown := set(options) - {"task", "start", "goal"}:
            raise ValueError(f"unknown reset options {sorted(unknown)}; known: task, start, goal")
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        start, goal = self.draw(self.rng, 1)
        if "task" in options:
            number, tasks = options["task"], self.maze.tasks
            if not len(tasks):
                raise ValueError(f"{self.name} has no numbered tasks; give start and goal")
            if number not in range(1, len(tasks) + 1):
                raise ValueError(f"task must be 1 to {len(tasks)}, not {number}")
            start, goal = self.maze.place(tasks[number - 1], self.rng)[:, None]
        given = {"start": start[0], "goal": goal[0], **options}
        for name, drawn in (("start", start), ("goal", goal)):
            if np.shape(given[name]) != drawn[0].shape or not np.isfinite(given[name]).all():
                raise ValueError(f"{name} must be {drawn.shape[1]} finite numbers, not "
                                 f"{given[name]}")
        start = np.array([given["start"]], float)
        goal = np.array([given["goal"]], float)
        self.maze.number(start)                                         # refuses walls
        if not self.goals_in_walls:
            self.maze.number(goal)
        self.state = self.begin(start)
        self.desired_goal = goal
        self.time = 0
        self.time_limit = self.limit or int(self.maze.limits(start, goal)[0])
        return self._observation(), {}

    def step(self, action):
        """One step -> (observation, reward, terminated, truncated, info)."""
        if self.state is None:
            raise RuntimeError("call reset before step")
        self.state = self.move(self.state, np.asarray(action)[None])
        self.time += 1
        distance = self.distance(self.state, self.desired_goal)
        reward = float(self.reward(distance)[0])
        success = bool(self.reached(distance)[0])
        terminated = success and self.goal_terminates
        truncated = self.time >= self.time_limit and not terminated
        return self._observation(), reward, terminated, truncated, {"success": success}

    def _observation(self):
        return {"observation": self.observe(self.state)[0].copy(),
                "achieved_goal": self.position(self.state)[0].copy(),
                "desired_goal": self.desired_goal[0].copy()}

    def draw(self, rng, n):
        """Starts (n, 2) and goals (n, 2) of training."""
        starts, goals = self.maze.random_pairs(rng, n, 1)
        return self.maze.place(starts, rng), self.maze.place(goals, rng)

    def tests(self, rng, n):
        """{name: (starts (n, 2), goals (n, 2))} of evaluation: the maze's tasks, and by `draw`."""
        tests = {}
        for number, (start, goal) in enumerate(self.maze.tasks, 1):
            starts = self.maze.place([start] * n, rng)
            tests[f"task{number}"] = starts, self.maze.place([goal] * n, rng)
        return {**tests, "random": self.draw(rng, n)}

    def begin(self, starts):
        """States of agents that start at positions (N, 2): (N, ...), x and y first. ValueError: an
        agent cannot stand there."""
        return starts

    def move(self, s, a):
        """States after actions a in states s, of N agents."""
        return self.maze.move(s, a, self.rng)

    def position(self, s):
        """Positions (..., P) in states s."""
        return s

    def observe(self, s):
        """Observations (N, S) in states s, position first; here the position alone."""
        return s

    def blocks(self, s):
        """[(centres (..., 2), half-width)] of squares that can be moved, in states s: to draw."""
        return []

    def distance(self, s, g):
        """Distances (N,) of the positions in states s to goals g (N, P); here Euclidean."""
        return np.sqrt(((self.position(s) - g) ** 2).sum(1))

    def reached(self, distance):
        """Whether goals at these distances (N,) count as reached."""
        return distance <= self.maze.tolerance

    def reached_last(self, distance):
        """Whether goals at these distances (N,) at the last step count as reached by its end."""
        return self.reached(distance)

    def reward(self, distance):
        """Rewards (N,) of steps that end at these distances (N,)."""
        return self.reached(distance) - 1.0


class UMazeTask(GoalEnv):
    """HIRO's U-maze (authors' code: create_maze_env.py, point_maze.gin) for a point mass.

    Start (0, 0) + U(-0.1, 0.1)^2; training goals U(-2, 10)^2, some of them in walls; test goals
    (0, 8), (8, 0), (8, 8) and random free positions. Reward: minus the Euclidean distance. An
    episode has 500 steps; the goal does not end it. Reached: within 2.5 at any step (HIGL's
    evaluation); at the last step also by the paper's measure, within 5 [E15]. maze: in place of
    point-umaze.
    """

    goal_terminates = False
    goals_in_walls = True

    def __init__(self, maze=None):
        super().__init__(maze or make("point-umaze"), 500)

    def draw(self, rng, n):
        return rng.uniform(-0.1, 0.1, (n, 2)), rng.uniform(-2, 10, (n, 2))

    def tests(self, rng, n):
        """{name: (starts (n, 2), goals (n, 2))}; the first is the paper's."""
        goals = {f"{x}_{y}": np.tile([float(x), float(y)], (n, 1))
                 for x, y in ((0, 8), (8, 0), (8, 8))}
        cells = self.maze.cells[rng.integers(len(self.maze.cells), size=n)]
        goals["random"] = self.maze.centre(cells) + rng.uniform(-2, 2, (n, 2))
        return {name: (self.draw(rng, n)[0], g) for name, g in goals.items()}

    def reached(self, distance):
        return distance <= 2.5

    def reached_last(self, distance):
        return distance <= 5

    def reward(self, distance):
        return -distance


TASKS_ONLINE = {
    "point-umaze": UMazeTask,
    "point-umaze-undo": "lab.hiro_ablations:UndoTask",
    "point-push": "lab.tasks:PushTask",
    "point-fall": "lab.tasks:FallTask",
    "grid-fourrooms": "lab.tasks:FourRoomsTask",
}


def make_task(name):
    """The online task of that name: a GoalEnv; ValueError if there is none."""
    if name not in TASKS_ONLINE:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS_ONLINE)}")
    task = imported(TASKS_ONLINE[name])()
    task.name = name
    return task


# -------------------------------------------------------------------------------- data sets


@dataclass
class Dataset:
    """Trajectories, concatenated, in OGBench's layout.

    observations (N, d): float32, float64 where they are given with more digits. actions (N, a)
    float32 in [-1, 1], what rounding put beyond is clipped; or (N,) int64 from 0, given as integers
    (N,) or (N, 1), or as whole numbers (N,). terminals (N,) bool, True on the last row of each
    trajectory. Row i's transition is (row i, action i, row i + 1); the last row of a trajectory has
    none, and its action, which may be NaN, is never used. ValueError: other kinds of numbers,
    shapes that do not fit together, numbers that are not finite, actions out of range, a trajectory
    of one row or without an end.
    """

    observations: np.ndarray
    actions: np.ndarray
    terminals: np.ndarray

    def __post_init__(self):
        observations, actions, terminals = map(np.asarray, vars(self).values())
        n = len(observations) if observations.ndim else 0
        if observations.ndim != 2 or terminals.shape not in ((n,), (n, 1)) or (
                actions.shape[:1] != (n,)):
            raise ValueError(
                "observations (N,d), actions (N,...) and terminals (N,) do not fit together: "
                f"{observations.shape}, {actions.shape}, {terminals.shape}. Each row has an action:"
                " where trajectories have one more observation, add a last action, such as 0")
        for name, x in (("observations", observations), ("actions", actions),
                        ("terminals", terminals)):
            if x.dtype.kind not in "fiub":
                raise ValueError(f"{name} must be numbers, not {x.dtype}")
        if not np.isin(terminals, (0, 1)).all():
            raise ValueError("terminals must be 0 or 1")
        self.terminals = terminals.reshape(n).astype(bool)
        if not n or not self.terminals[-1]:
            raise ValueError("the last row must end a trajectory (terminals[-1] is not 1); "
                             "terminals are 1 on the last row of each trajectory and on no other")
        if not np.isfinite(observations).all():
            raise ValueError("observations contain NaN or infinity")
        digits = np.float32 if observations.dtype.itemsize <= 4 else np.float64
        self.observations = observations.astype(digits)
        self.actions = self._normal(actions)
        ends = np.flatnonzero(self.terminals)
        lengths = np.diff(ends, prepend=-1)
        if lengths.min() < 2:
            raise ValueError(f"the trajectory that ends in row {ends[lengths.argmin()]} has one "
                             "row only, so no transition")
        self.lengths = lengths                                      # rows of each trajectory
        self.last = np.repeat(ends, lengths).astype(np.int32)       # (N,) its trajectory's last row
        self.valid = np.flatnonzero(~self.terminals).astype(np.int32)   # rows with a transition
        self.labelled = self.valid              # those of `valid` whose action is known: here all

    def _normal(self, actions):
        """Actions as the class has them; see there."""
        unused = self.terminals & ~np.isfinite(actions).reshape(len(actions), -1).all(1)
        if unused.any():
            actions = np.where(unused.reshape(-1, *[1] * (actions.ndim - 1)), 0, actions)
        if not np.isfinite(actions).all():
            raise ValueError("actions contain NaN or infinity")
        whole = actions.dtype.kind in "iub"
        if whole and actions.ndim == 2 and actions.shape[1] == 1:
            actions = actions[:, 0]
        if actions.ndim == 1 and (whole or (actions == np.rint(actions)).all()):
            if actions.min() < 0 or actions.max() > 999:
                raise ValueError("integer actions must be from 0 to 999; here they are from "
                                 f"{actions.min()} to {actions.max()}")
            return actions.astype(np.int64)
        if whole or actions.ndim != 2:
            raise ValueError("actions must be (N, a) numbers in [-1, 1] or (N,) integers from 0; "
                             f"here they are {actions.dtype} of shape {actions.shape}. Several "
                             "integers a step (MultiDiscrete) are to be numbered as one; numbers "
                             "(N,) are to be reshaped to (N, 1)")
        beyond = np.abs(actions).max()
        if beyond > 1 + 1e-5:
            raise ValueError(f"actions must be in [-1, 1]; here they reach {beyond:.7g}: divide by "
                             "their range, or clip them")
        return np.clip(actions, -1, 1).astype(np.float32)


def collect(env, rng, kind="navigate", episodes=1000, rows=201, noise=0.5, progress=None):
    """Offline data by OGBench's recipe, all episodes side by side: a Dataset of episodes x rows.

    In each episode an agent goes from a random cell to random goals, its actions by `env.follow`
    with that noise (points: std; grids: probability of a uniform action).
    navigate  a new goal on arrival; in point mazes no goal lies in a straight corridor
    stitch    one goal, 4 cells away (or the farthest), so that paths are short; point mazes only
    progress(n) is called when n rows of every episode are made. ValueError: a wrong argument.
    """
    if kind not in ("navigate", "stitch") or (env.discrete and kind == "stitch"):
        raise ValueError(f"{env.name} has no data of kind {kind!r}")
    if episodes < 1 or rows < 2 or noise < 0:
        raise ValueError("collect needs episodes >= 1, rows >= 2 and noise >= 0")
    goals = np.flatnonzero(~env.corridors | env.discrete)

    def draw_goal(start):
        if kind == "navigate":
            return rng.choice(goals, size=len(start))
        there = env.distance[start]                                 # (n, cells)
        there = there == np.minimum(4, there.max(1, keepdims=True))
        return np.argmax(rng.random(there.shape) * there, axis=1)

    start = rng.integers(len(env.cells), size=episodes)
    s = env.place(env.cells[start], rng)
    goal_cell = draw_goal(start)
    goal = env.place(env.cells[goal_cell], rng)
    observations, actions = [], []
    for t in range(rows):
        at = env.jump(s, rng) if t else s               # nobody jumps before the first step
        a = env.follow(at, goal_cell, noise, rng).astype(np.int64 if env.discrete else np.float32)
        observations.append(s.astype(np.float32))
        actions.append(a)
        s = env.move(at, a, rng if env.discrete else None)      # jumped already
        arrived = np.flatnonzero(env.success(s, goal))
        if len(arrived) and kind == "navigate":
            goal_cell[arrived] = draw_goal(arrived)
            goal[arrived] = env.place(env.cells[goal_cell[arrived]], rng)
        if progress:
            progress(t + 1)
    terminals = np.zeros((episodes, rows), bool)
    terminals[:, -1] = True
    observations = np.stack(observations, 1)                    # (episodes, rows, 2)
    actions = np.stack(actions, 1)
    return Dataset(observations.reshape(-1, 2), actions.reshape(-1, *actions.shape[2:]),
                   terminals.ravel())
