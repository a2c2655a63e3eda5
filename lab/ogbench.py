"""OGBench's pointmazes: simulator, data files, input encodings and tuned settings.

Park et al. 2024, arXiv 2410.20092. The registry of envs.py names `OGBenchMaze` for its
environments pointmaze-{medium,large,giant,teleport}-{navigate,stitch}-v0. The simulator's steps
were fitted to those of OGBench 1.2.1 under MuJoCo 3.2.4; data/ogbench_steps.npz holds some of them.
A data set of a million rows is made when it is first asked for, and kept in datasets/NAME.npz with
the recipe that made it; a file there by another recipe, or by none, is set aside and not used.
There is nothing to run here: `python hiql.py --env pointmaze-large-navigate-v0`.

SETTINGS and FAST hold what the environments change in hiql.Config's defaults. The preset "paper"
has OGBench's numbers, but a shorter training, smaller batches and networks [D12]. The preset "fast"
differs further:
 D15 Encoding: beside the position the networks see a radial basis function (RBF) for each cell,
     because RBFs separate neighbouring corridors from the first update on. Beside a state and its
     goal they see the direction from one to the other, because RBFs alone blur the last steps to a
     goal. On stitch data there is no direction: with it, the value learned from their short
     trajectories leaks through walls. The authors' code and OGBench: positions alone.
 D16 Horizon and value goals, for paths of 200 to 600 steps: discount 0.997, on giant 0.998
     (OGBench: 0.99, on giant 0.995); 70 % of the value goals from the trajectory's future and 10 %
     random (OGBench: 50 and 30 %). On stitch data that future is drawn with the discount 0.99:
     with 0.997 most goals would be the last of a trajectory's 200 rows.
 D17 Optimisation, for a shorter training: the value before the policies [D9] and tau 0.3 [D12];
     Adam 1e-3, because with 2e-3 and RBFs half of the runs died early: their units never responded
     again. The high-level policy is asked every 10 steps [D10], because asked at every step it
     wavers between two paths of equal length. On stitch data its inverse temperature is 0.3: with
     10, nearly all of its AWR weights would be at their bound of 100.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import json
import os
import sys
import time
from fnmatch import fnmatch
from functools import cached_property

import numpy as np

import envs
from support import datasets
from support.files import load_arrays

RECIPE_VERSION = 1      # raised when `envs.collect` or the simulator makes other data than before

TELEPORT = """
    ############
    #.....#o#..#
    ##.#...#..##
    ##.###.....#
    #....#i#.#.#
    #i##.#.#.#.#
    #o##.#.#.#o#
    #....#...#.#
    ############"""
TELEPORT_TASKS = [((1, 10), (7, 1)), ((1, 1), (7, 10)), ((5, 6), (7, 10)), ((7, 1), (7, 10)),
                  ((5, 6), (7, 1))]

# Keyed by patterns of environment names, of which later ones win. SETTINGS: with every preset.
SETTINGS = {
    "*": dict(discount=0.99, subgoal_steps=25, steps=45_000, train_flat=False, eval_episodes=50,
              eval_interval=5000),
    "*-giant-*": dict(discount=0.995),
    "*-stitch-*": dict(actor_p_randomgoal=0.5),       # short trajectories
}
FAST = {                                # with the preset "fast", after SETTINGS [D15][D16][D17]
    "*": dict(encoding="rbf+direction", discount=0.997, value_p_trajgoal=0.7, tau=0.3, lr=1e-3,
              steps=30_000, policy_steps=15_000, subgoal_interval=10),
    "*-giant-*": dict(discount=0.998),
    "*-stitch-*": dict(encoding="rbf", goal_discount=0.99, high_alpha=0.3),
}


class OGBenchMaze(envs.PointMaze):
    """OGBench's pointmaze without MuJoCo: pos += 0.2 clip(a, -1, 1), then its soft contact.

    Measured on the simulator: a penetration p of one wall becomes 0.1772152 p along the normal.
    Several contacts are MuJoCo's convex problem, in one static step in the plane (`_soften`).
    Inlets (`i` in the layout): an agent within 1.5 of one starts its next step at one of the
    outlets (`o`), drawn uniformly; the observation after that step is the first to show the jump,
    as in OGBench. An agent placed in an inlet jumps at its first step; OGBench's does not.
    The reward of `envs.GoalEnv` is -1 or 0; OGBench's is 0 or 1.
    """

    symbols, connected = "#.io", False
    left, stiffness, friction = 0.1772152, 3.0, 0.5

    def __init__(self, name, layout, tasks=None):
        if layout == "teleport":
            layout, tasks = TELEPORT, TELEPORT_TASKS if tasks is None else tasks
        super().__init__(name, layout, speed=0.2, limit=1000, tasks=tasks)
        self.inlets, self.outlets = (self.centre(np.argwhere(self.layout == x)) for x in "io")

    def settings(self, preset):
        """SETTINGS of this name, with the preset "fast" also FAST, then those of the registry."""
        changes = {}
        for table in (SETTINGS, FAST) if preset == "fast" else (SETTINGS,):
            for pattern, more in table.items():
                if fnmatch(self.name, pattern):
                    changes.update(more)
        return {**changes, **self.defaults}

    def dataset(self, rng=None, folder="datasets"):
        """The data set, the same for every seed (rng is not used), kept in `folder`.

        Made by OGBench's recipe, so that it agrees with the published file in distribution, not
        row by row. A file NAME.npz there that records another recipe or none, such as the published
        one, gets a name with its date, and a new one is made. ValueError: the file is damaged.
        """
        path, made_by = os.path.join(folder, f"{self.name}.npz"), self.made_by()
        if os.path.exists(path) and recipe_of(path) != made_by:
            date = time.localtime(os.path.getmtime(path))
            aside = f"{path}.{time.strftime('%Y%m%d-%H%M%S', date)}"
            os.replace(path, aside)
            print(f"{path} was not made by today's recipe: it is now {aside}, and --dataset reads "
                  "it there", flush=True)
        if not os.path.exists(path):
            size, rows = "{episodes} x {rows} rows".format(**self.recipe), self.recipe["rows"]

            def progress(done):
                if sys.stdout.isatty() and (done % 20 == 0 or done == rows):
                    print(f"\r\033[K{self.name}: {size}, {done / rows:.0%}", end="", flush=True)

            print(f"collecting {self.name}: {size} ...", flush=True)
            os.makedirs(folder, exist_ok=True)
            data = envs.collect(self, np.random.default_rng(0), **self.recipe, progress=progress)
            datasets.save_dataset(path, data, recipe=made_by)
            print(f"{chr(10) * sys.stdout.isatty()}kept in {path}", flush=True)
        try:
            return datasets.load_dataset(path)
        except ValueError as e:
            raise ValueError(f"{e}; remove {path}, and it is made again") from None

    def made_by(self):
        """All that decides the data set, as JSON: its file records it."""
        return json.dumps({
            "version": RECIPE_VERSION, "seed": 0, "layout": list(map("".join, self.layout)),
            "speed": self.speed, "radius": self.radius, "start_noise": self.noise,
            "tolerance": self.tolerance, "left": self.left, "stiffness": self.stiffness,
            "friction": self.friction, **self.recipe})

    @cached_property
    def next_cell(self):
        """As in Maze; ties in OGBench's order: stay, up, left, down, right; i if no path."""
        to = self.cells[:, None] + np.array([(0, 0), (-1, 0), (0, -1), (1, 0), (0, 1)])
        to = self.index[to[..., 0], to[..., 1]]                         # (n, 5), wall -1
        ahead = np.where(to[..., None] < 0, len(to), self.distance[to])
        return np.take_along_axis(to, ahead.argmin(1), 1)

    def jump(self, s, rng):
        """Where agents observed at s (N, 2) start their next step: from an inlet, at an outlet."""
        s = np.array(s, float)
        for inlet in self.inlets:
            inside = np.flatnonzero(((s - inlet) ** 2).sum(-1) <= 1.5**2)
            if len(inside):
                s[inside] = self.outlets[rng.integers(len(self.outlets), size=len(inside))]
        return s

    def move(self, s, a, rng=None):
        """s (N, 2), a (N, 2), clipped to [-1, 1] -> s' (N, 2).

        rng draws the outlets; without it no agent jumps.
        """
        step = self._step(s, a)
        s = (np.array(s, float) if rng is None else self.jump(s, rng)) + step
        depth, normal = self._contacts(s)[:2]
        touch = np.flatnonzero((depth > 0).any(1))
        s[touch] += self._soften(np.maximum(depth[touch], 0), normal[touch])
        return s

    def _soften(self, depth, normal):
        """Displacement u (N, 2) that contacts of these depths (N, 9) and normals (N, 9, 2) cause.

        MuJoCo's contact problem with pyramidal friction cones (Todorov et al. 2012), in one step:
            min_u |u|^2 + stiffness sum_f max(0, push depth_f - J_f u)^2
        over the facets f of every contact, J = n, n, n + friction t and n - friction t, by
        Newton's method; t is the tangent, and push is such that a single contact keeps the share
        `left` of its depth. stiffness and friction were fitted to the simulator's steps, including
        those with several contacts.
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


class RadialBasis(envs.Encoding):
    """Beside the position 3 exp(-|x - m|^2 / (2 b^2)), b = 3/4 side, for the centre m of each cell.

    Wall cells have RBFs too, so that the encoding does not reveal where walls are [D15].
    """

    def __init__(self, env):
        rows, columns = env.walls.shape
        y = env.centre([(i, 0) for i in range(rows)])[:, 1].astype(np.float32)
        x = env.centre([(0, j) for j in range(columns)])[:, 0].astype(np.float32)
        self.centres, self.width = (x, y), 0.75 * env.side

    def __call__(self, x):
        """Positions (..., 2) -> (..., 2 + cells, walls included)."""
        along_x, along_y = (np.exp(-0.5 * ((x[..., axis, None] - m) / self.width) ** 2)
                            for axis, m in enumerate(self.centres))     # factors by axis
        rbf = 3 * along_y[..., :, None] * along_x[..., None, :]
        rbf[rbf < 1e-30] = 0            # subnormal numbers would make products ten times slower
        return np.concatenate([x, rbf.reshape(*x.shape[:-1], -1)], -1)


class GoalDirection(envs.Encoding):
    """Beside a state and its goal the direction d = 6 x / sqrt(|x|^2 + 4), x = g - s.

    Near the goal d is 3 x, far from it 6 x / |x|; it turns from one to the other around |x| = 2,
    half a cell [D15].
    """

    extra = 2

    def pair(self, s, g):
        x = g[..., :2] - s[..., :2]
        return np.concatenate([s, g, 6 * x / np.sqrt((x * x).sum(-1, keepdims=True) + 4)], -1)


class RadialBasisAndDirection(GoalDirection, RadialBasis):
    """RBFs beside the position, and the direction beside a state and its goal."""


def recipe_of(path):
    """The recipe that a data set's file records; None if it has none or cannot be read."""
    try:
        return str(load_arrays(path, {"recipe"})["recipe"])
    except (KeyError, ValueError):
        return None


def make_encoding(name, env):
    """The envs.Encoding of that name for a point maze; ValueError if there is none."""
    if env.discrete:
        raise ValueError(f"the encoding {name} is for point mazes, not {env.name}")
    if name == "rbf":
        return RadialBasis(env)
    if name == "direction":
        return GoalDirection()
    if name == "rbf+direction":
        return RadialBasisAndDirection(env)
    raise ValueError(f"unknown encoding {name!r}; known: position, rbf, direction, rbf+direction")
