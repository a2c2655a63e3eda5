"""What guarantees the goal? An experiment with HIRO's low level, beside each evaluation.

    python -m lab.goals --seed 0        HIRO on its U-maze as `python hiro.py` trains it, with the
                                        measures below in its summary and at each evaluation

Nothing in the high level makes its goals places that can be reached. So the low level is given
other goals: uniform ones in the goal range, from random free places, for c steps each.
"""

import hiro                             # first: it sets one BLAS thread before numpy loads

import numpy as np

from support.flags import parse
from support.runs import Program, one_line_errors, open_run, run_seeds

PROGRAM = Program("-m lab.goals", hiro.Config, "step", hiro.ACTING)
AGENTS, FIRST = 4000, 12


def goal_errors(acting, maze, rng):
    """How far from goals that nobody chose the agent is after c steps: {name: mean distance}.

    acting: a `hiro.Actor`. Places: uniform in free cells, s (N,2); goals g uniform in the range.
    goal_error_free, goal_error_wall: from s + g, where that is free, and where it is in a wall;
    goal_error_permuted: from s + another agent's goal; goal_error_still: of an agent that stays.
    goals_in_walls: the share of s + g in walls.
    """
    cells = maze.cells[rng.integers(len(maze.cells), size=AGENTS)]
    start = maze.centre(cells) + rng.uniform(-maze.side / 2, maze.side / 2, (AGENTS, 2))
    goal = (acting.goal_range * rng.uniform(-1, 1, (AGENTS, 2))).astype(np.float32)
    s, g = start, goal
    for _ in range(acting.c):
        now = s.astype(np.float32)
        s = maze.move(s, acting.low(now, g).astype(float))
        g = acting.transition(now, g, s.astype(np.float32))

    def distance(place):
        return np.sqrt(((place - s) ** 2).sum(-1))

    free = maze.is_free(start + goal)
    error = distance(start + goal)
    return {"goal_error_free": error[free].mean(), "goal_error_wall": error[~free].mean(),
            "goal_error_permuted": distance(start + np.roll(goal, 1, 0)).mean(),
            "goal_error_still": np.sqrt((goal ** 2).sum(-1)).mean(),
            "goals_in_walls": (~free).mean()}


def asked_in_walls(maze, asked):
    """The share of the high level's goals, as places (windows, N, 2), that lie in walls."""
    return (~maze.is_free(asked.reshape(-1, 2))).mean()


def evaluate(agent, task, config, actor):
    """`hiro.evaluate`, and beside it `goal_errors`, and the shares of the high level's own goals
    that lie in walls: asked_in_walls of all tests; asked_in_walls_first of the first test, in its
    first windows, on the way."""
    found, episodes = hiro.evaluate(agent, task, config, actor)
    rng = np.random.default_rng([config.seed, int(agent["step"]), 1])
    asked = [windows for _, windows, *_ in episodes.values()]
    measured = goal_errors(actor(agent, config), task.maze, rng)
    measured["asked_in_walls"] = asked_in_walls(task.maze, np.concatenate(asked, 1))
    measured["asked_in_walls_first"] = asked_in_walls(task.maze, asked[0][:FIRST])
    return {**found, **{name: float(x) for name, x in measured.items()}}, episodes


def main():
    given, call = parse(PROGRAM, __doc__, hiro.WORDS)
    with one_line_errors():
        if call.eval:
            raise ValueError("--eval is for `python hiro.py`; here each evaluation is in eval.csv")
        config = hiro.resolve(given)
        if config.env != "point-umaze":
            raise ValueError("--env: the walls of point-umaze alone are known here")
        if call.seeds:
            return run_seeds(PROGRAM, call, given, config)
        with open_run(PROGRAM, call, config) as run:
            hiro.train(None, run.config, run, evaluate=evaluate)


if __name__ == "__main__":
    main()
