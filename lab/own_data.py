"""HIQL on data that are not of envs.py: collected and evaluated by Gymnasium's reset and step.

    python -m lab.own_data                  a point mass with inertia: states x, y and velocity,
                                            the action a force; five minutes on one core
    python -m lab.own_data --world PointMaze_UMaze-v3
                                            the same by gymnasium-robotics, to be installed with
                                            pip install gymnasium-robotics

A simple controller that goes from one random place to another collects the data. The goal is a
position (`--goal-indices 0,1`, the default here) or a whole state, the position with zero velocity
(`--goal-indices none`).
"""

import hiql                             # first: it sets one BLAS thread before numpy loads

from dataclasses import dataclass

import numpy as np

import envs
import lab.gym
from support.datasets import DataAlone
from support.flags import INDICES, NOT_NEGATIVE, POSITIVE, option, parse, refuse_unused
from support.runs import Program, one_line_errors, open_run, read_run, run_seeds, show


class PointMass(envs.GoalEnv):
    """A disc with inertia in a maze of envs.py, by Gymnasium's reset and step.

    State (4,): x, y and the last step's displacement. A force a, clipped to [-1, 1]^2, changes the
    displacement v to 0.8 v + 0.16 a, which walls may stop or turn aside as in `envs.PointMaze`: the
    displacement that was made is the new v. Start, at rest, and goal in random cells at least six
    steps apart; reached within 1.0, which ends the episode; 300 steps.
    """

    def __init__(self, layout="medium"):
        super().__init__(envs.PointMaze("point-mass", layout), 300)

    def draw(self, rng, n):
        starts, goals = self.maze.random_pairs(rng, n, self.maze.pair_distance)
        return self.maze.place(starts, rng), self.maze.place(goals, rng)

    def begin(self, starts):
        return np.concatenate([starts, 0 * starts], -1)

    def move(self, s, a):
        v = 0.8 * s[:, 2:] + 0.16 * np.clip(a, -1, 1)
        to = self.maze.move(s[:, :2], v / self.maze.speed)
        return np.concatenate([to, to - s[:, :2]], -1)

    def position(self, s):
        return s[..., :2]


def make(world):
    """(environment, its maze as an `envs.PointMaze`, (x, y) -> cell, cells -> places drawn in them,
    the distance at which a place is reached, the controller's gains) of a world's name."""
    if world == "point-mass":
        env = PointMass()
        return env, env.maze, env.maze.cell, env.maze.place, env.maze.tolerance, (0.5, 2.0)
    try:
        import gymnasium
        import gymnasium_robotics
    except ImportError as e:
        raise ValueError(f"--world {world} needs `pip install gymnasium-robotics` ({e})") from None
    gymnasium.register_envs(gymnasium_robotics)
    env = gymnasium.make(world, continuing_task=False)
    there = env.unwrapped.maze
    rows = ["".join("#" if x == 1 else "." for x in row) for row in there.maze_map]
    side = there.maze_size_scaling

    def place(cells, rng):
        centres = np.array([there.cell_rowcol_to_xy(cell) for cell in cells])
        return centres + side / 4 * rng.uniform(-1, 1, centres.shape)

    return (env, envs.PointMaze(world, " ".join(rows)), there.cell_xy_to_rowcol, place, side / 4,
            (10.0, 1.0))


def collect(world, episodes, rows, noise, seed):
    """A Dataset of episodes x rows: in each an agent goes to one random goal after another.

    With each goal a place is drawn in every cell. The goal is that of its cell; on the way the
    agent heads for those of the next cells of a shortest path. Its force is clip(p (place -
    position) - d velocity + N(0, noise^2), -1, 1), with the world's gains p, d.
    """
    env, maze, cell, place, reached, (p, d) = make(world)
    rng, observations, actions = np.random.default_rng(seed), [], []
    for _ in range(episodes):
        s = env.reset(seed=int(rng.integers(2**31)))[0]["observation"]
        goal = None
        for _ in range(rows):
            if goal is None or np.linalg.norm(places[goal] - s[:2]) < reached:
                goal, places = rng.integers(len(maze.cells)), place(maze.cells, rng)
            at = maze.index[tuple(cell(s[:2]))]
            aim = places[maze.next_cell[at, goal]]
            a = np.clip(p * (aim - s[:2]) - d * s[2:] + noise * rng.normal(size=2), -1, 1)
            observations.append(s)
            actions.append(a)
            s = env.step(a.astype(np.float32))[0]["observation"]
    terminals = np.zeros((episodes, rows), bool)
    terminals[:, -1] = True
    return envs.Dataset(np.array(observations, np.float32), np.array(actions, np.float32),
                        terminals.ravel())


@dataclass
class Config(hiql.Config):
    """hiql's config for data without an environment of envs.py, and how they are collected."""

    env: str = option("none", "always none: the environment is the --world", ("none",))
    goal_indices: tuple = option((0, 1), "entries of a state that make a goal: the position; none: "
                                 "the whole state", INDICES)
    world: str = option("point-mass", "point-mass, or the name of a PointMaze of "
                        "gymnasium-robotics")
    eval_episodes: int = option(50, "episodes of an evaluation", POSITIVE)
    episodes: int = option(1000, "trajectories collected", POSITIVE)
    rows: int = option(201, "states of each", POSITIVE)
    noise: float = option(0.5, "std of the controller's noise", NOT_NEGATIVE)


PROGRAM = Program("-m lab.own_data", Config, "update", hiql.ACTING)


def resolve(given):
    """A whole Config, as `hiql.resolve`; --quick collects less, too. ValueError also: a dataset."""
    less = {"episodes": 50} if given.get("quick") else {}
    config = hiql.resolve({"env": "none", **less, **given}, Config)
    refuse_unused(config, Config(), {"dataset": "a --world, whose data are collected"})
    return config


def evaluator(config):
    """evaluate(act) in the world of a config."""
    return lab.gym.evaluator(make(config.world)[0], config, seed=config.seed + 1)


def train(config, run=None):
    """A whole run, as `hiql.train`, on data of the world and with episodes there."""
    data = collect(config.world, config.episodes, config.rows, config.noise, config.seed)
    return hiql.train(data, config, evaluator(config), run)


def main():
    given, call = parse(PROGRAM, __doc__, hiql.WORDS)
    with one_line_errors():
        if call.eval:
            saved = read_run(PROGRAM, call.eval)
            env = DataAlone.restored(saved.agent["units"], saved.config.goal_indices)
            return show(hiql.evaluate_saved(saved, env, evaluate=evaluator(saved.config)))
        config = resolve(given)
        if call.seeds:
            return run_seeds(PROGRAM, call, given, config)
        with open_run(PROGRAM, call, config) as run:
            train(run.config, run)


if __name__ == "__main__":
    main()
