"""OGBench's pointmazes: simulator, data files, input encodings and tuned settings.

Park et al. 2024, arXiv 2410.20092. The registry of envs.py names `OGBenchMaze` for its
environments pointmaze-{medium,large,giant,teleport}-{navigate,stitch}-v0. The simulator's steps
were fitted to those of OGBench 1.2.1 under MuJoCo 3.2.4; data/ogbench_steps.npz holds some of them.
A data set of a million rows is made when it is first asked for, and kept in datasets/NAME.npz with
the recipe that made it.
There is nothing to run here: `python hiql.py --env pointmaze-large-navigate-v0`.

How the environments differ from OGBench: [D15] encoding, [D16] horizon and value goals, [D17]
optimisation, in docs/deviations.md.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import json
import os
from functools import cached_property

import numpy as np

import envs
from support import datasets
from support.runs import load_arrays

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

ENCODINGS = "position", "rbf", "direction", "rbf+direction"


class OGBenchMaze(envs.PointMaze):
    """OGBench's pointmaze without MuJoCo: pos += 0.2 clip(a, -1, 1), then its soft contact.

    Measured on the simulator: a penetration p of one wall becomes 0.1772152 p along the normal.
    Several contacts are MuJoCo's convex problem, in one static step in the plane (`_soften`).
    Inlets (`i` in the layout): an agent within 1.5 of one starts its next step at one of the
    outlets (`o`), drawn uniformly; the observation after that step is the first to show the jump,
    as in OGBench. An agent placed in an inlet jumps at its first step; OGBench's does not.
    The reward of `envs.GoalEnv` is -1 or 0; OGBench's is 0 or 1.
    encoding: what networks see [D15], one of ENCODINGS; None: rbf on stitch names, else
    rbf+direction. ValueError: there is no such encoding.
    """

    symbols = "#.io"
    connected = False
    left = 0.1772152
    stiffness = 3.0
    friction = 0.5

    def __init__(self, name, layout, tasks=None, encoding=None):
        if layout == "teleport":
            layout = TELEPORT
            tasks = TELEPORT_TASKS if tasks is None else tasks
        super().__init__(name, layout, speed=0.2, limit=1000, tasks=tasks)
        self.inlets = self.centre(np.argwhere(self.layout == "i"))
        self.outlets = self.centre(np.argwhere(self.layout == "o"))
        self.giant = "-giant-" in name
        self.stitch = "-stitch-" in name
        if encoding is None:            # on stitch data the direction leaks values through walls
            encoding = "rbf" if self.stitch else "rbf+direction"
        if encoding not in ENCODINGS:
            raise ValueError(f"unknown encoding {encoding!r}; known: {', '.join(ENCODINGS)}")
        self.encoding = encoding
        self.extra = 2 if "direction" in encoding else 0
        # the published recipes; a trajectory of T rows holds T - 1 transitions
        self.recipe = dict(kind="navigate", episodes=1000, rows=1001, noise=0.5)
        if self.stitch:
            self.recipe.update(kind="stitch", episodes=5000, rows=201)
        elif self.giant:
            self.recipe.update(episodes=500, rows=2001)

    def settings(self, published=False):
        """OGBench's settings, but a shorter training [D12]; unless published, tuned ones
        [D16][D17]; then those of the registry."""
        changes = dict(subgoal_steps=25, train_flat=False, eval_episodes=50, eval_interval=5000)
        if self.stitch:
            changes.update(actor_p_randomgoal=0.5)
        if published:
            changes.update(discount=0.995 if self.giant else 0.99, steps=45_000)
        else:
            changes.update(discount=0.998 if self.giant else 0.997, value_p_trajgoal=0.7, tau=0.3,
                           lr=1e-3, steps=30_000, policy_steps=15_000, subgoal_interval=10)
            if self.stitch:
                changes.update(goal_discount=0.99, high_alpha=0.3)
        return {**changes, **self.defaults}

    def see_positions(self):
        self.encoding, self.extra = "position", 0

    def encode(self, obs, dtype=np.float32):
        """Positions (..., 2), with rbf followed by 3 exp(-|x - m|^2 / (2 b^2)), b = 3/4 side, for
        the centre m of each cell: (..., 2 + cells), the RBFs in float32 [D15].

        Wall cells have RBFs too, so that the encoding does not reveal where walls are.
        """
        x = super().encode(obs, dtype)
        if "rbf" not in self.encoding:
            return x
        at = x.astype(np.float32)               # factors by axis are those of float32
        centres_x, centres_y = self._centres
        width = 0.75 * self.side
        along_x = np.exp(-0.5 * ((at[..., :1] - centres_x) / width) ** 2)
        along_y = np.exp(-0.5 * ((at[..., 1:] - centres_y) / width) ** 2)
        rbf = 3 * along_y[..., :, None] * along_x[..., None, :]         # factors by axis
        rbf[rbf < 1e-30] = 0            # subnormal numbers would make products ten times slower
        return np.concatenate([x, rbf.reshape(*x.shape[:-1], -1)], -1)

    @cached_property
    def _centres(self):
        """x of each column's cells and y of each row's, float32."""
        rows, columns = self.walls.shape
        x = self.centre([(0, column) for column in range(columns)])[:, 0]
        y = self.centre([(row, 0) for row in range(rows)])[:, 1]
        return x.astype(np.float32), y.astype(np.float32)

    def pair(self, s, g):
        """[s; g], with direction also 6 x / sqrt(|x|^2 + 4), where x = g - s in positions: near the
        goal 3 x, far from it 6 x / |x|; it turns from one to the other around |x| = 2, half a cell
        [D15]."""
        if not self.extra:
            return super().pair(s, g)
        x = g[..., :2] - s[..., :2]
        direction = 6 * x / np.sqrt((x * x).sum(-1, keepdims=True) + 4)
        return np.concatenate([s, g, direction], -1)

    def dataset(self, rng=None, folder="datasets"):
        """The data set, the same for every seed (rng is not used), kept in `folder`.

        Made by OGBench's recipe, so that it agrees with the published file in distribution, not
        row by row. ValueError: a file NAME.npz there records another recipe or none, such as the
        published one, or is damaged.
        """
        path = os.path.join(folder, f"{self.name}.npz")
        if not os.path.exists(path):
            episodes, rows = self.recipe["episodes"], self.recipe["rows"]
            print(f"collecting {self.name}: {episodes} x {rows} rows ...", flush=True)

            def progress(done):
                if done % (rows // 5) == 0:
                    print(f"collected {done / rows:.0%}", flush=True)

            os.makedirs(folder, exist_ok=True)
            data = envs.collect(self, np.random.default_rng(0), **self.recipe, progress=progress)
            datasets.save_dataset(path, data, recipe=self.made_by())
            print(f"kept in {path}", flush=True)
        if load_arrays(path, {"recipe"}).get("recipe") != self.made_by():
            raise ValueError(f"{path} was not made by today's recipe; rename it, and a new one is "
                             "made, or use it by --dataset")
        return datasets.load_dataset(path)

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
        depth, normal, _ = self._contacts(s)
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
