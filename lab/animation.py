"""The animation of README's first screen: an episode of HIQL and one of HIRO, side by side.

    python -m lab.animation [HIQL_RUN HIRO_RUN [FILE]]      (default: those of trained/, into
                                                            pictures/agents.gif)

HIQL_RUN is a run of hiql.py on point-medium, HIRO_RUN one of hiro.py on point-umaze. It takes under
a minute. Left: the agent and the current subgoal on a map of the value. Right: the
agent and the place that the current goal names; a new goal comes every c steps.
"""

import hiql                             # first: it sets one BLAS thread before numpy loads

import os

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter

import envs
import hiro
from support import plots
from support.flags import Parser
from support.runs import HERE, one_line_errors, read_run

TASK, FRAMES = 3, 60                    # task 4: its goal lies behind a wall


def hiql_episode(folder):
    """An episode of one task -> maze, path (T+1,2), goal (2,), subgoals (T+1,2), values (n,).

    A subgoal is the point whose representation is nearest to the one asked for, at each step; the
    values are those of the n free points of `plots.lattice`.
    """
    saved, env = hiql.restored(folder)
    config, params = saved.config, saved.agent["params"]
    start, goal = (env.place(np.array([cell]), np.random.default_rng(0))
                   for cell in env.tasks[TASK])
    act = hiql.Actor(params, config, env)
    _, steps, paths = hiql.rollout(env, act, start, goal, np.random.default_rng(0))
    path, points = paths[:steps[0] + 1, 0], plots.free_points(env)
    values = hiql.value_map(params, points, goal.repeat(len(points), 0), config, env)
    return env, path, goal[0], hiql.subgoal_places(params, path, goal, points, config, env), values


def hiro_episode(folder):
    """An episode with the task's first test goal, (0, 8), to ten steps after it is reached.

    -> maze, path (T+1,2), goal (2,), and (>= T, 2): for each step the place of the current goal.
    """
    saved = read_run(hiro.PROGRAM, folder)
    task, acting = envs.make_task(saved.config.env), hiro.Actor(saved.agent, saved.config)
    starts, goals = (x[:1] for x in next(iter(task.tests(np.random.default_rng(0), 1).values())))
    distance, paths, asked = hiro.rollout(task, acting(), starts, goals)
    reached = task.reached(distance[:, 0])
    end = min(reached.argmax() + 10 if reached.any() else len(distance), len(distance))
    return task.maze, paths[:end + 1, 0], goals[0], asked[:, 0].repeat(acting.c, 0)


def animate(file, left, right):
    """Write two episodes as a gif, each stretched over FRAMES frames.

    left: of `hiql_episode`; right: of `hiro_episode`.
    """
    figure, axes = plots.panels(1, 2, (6.4, 3.3))
    movers = []
    for ax, title, (maze, path, goal, aims, *values) in zip(
            axes[0], ("HIQL: value and subgoals", "HIRO: relative goals"), (left, right)):
        style = dict(cmap="viridis") if values else {}
        plots.draw_maze(ax, maze, *values, **style)
        ax.plot(*plots.plot_xy(maze, goal), "r*", ms=14, zorder=3)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("dot: agent   arrow: subgoal   star: goal", fontsize=8)
        trail, = ax.plot([], [], "w-" if values else "C0-", lw=1)
        arrow = ax.annotate("", (0, 0), (0, 0), zorder=4,
                            arrowprops=dict(arrowstyle="-|>", color="C1", lw=2, mutation_scale=14))
        agent, = ax.plot([], [], "ko", mec="w", ms=8, zorder=5)
        movers.append((maze, path, aims, trail, arrow, agent))

    def draw(frame):
        for maze, path, aims, trail, arrow, agent in movers:
            t = round(frame / (FRAMES - 1) * (len(path) - 1))
            place = aims[min(t, len(aims) - 1)]
            trail.set_data(*plots.plot_xy(maze, path[:t + 1]))
            arrow.xy, start = plots.plot_xy(maze, place), plots.plot_xy(maze, path[t])
            arrow.set_position(start)
            agent.set_data(*plots.plot_xy(maze, path[t:t + 1]))

    FuncAnimation(figure, draw, FRAMES).save(file, PillowWriter(fps=10), dpi=100)


def trained(name):
    return os.path.join(HERE, "trained", name)


def main():
    p = Parser(prog="python -m lab.animation", description="An animation of two runs.")
    p.add_argument("hiql_run", metavar="HIQL_RUN", nargs="?", default=trained("hiql"))
    p.add_argument("hiro_run", metavar="HIRO_RUN", nargs="?", default=trained("hiro"))
    p.add_argument("file", nargs="?", default=os.path.join(HERE, "pictures", "agents.gif"))
    given = p.parse_args()
    with one_line_errors():
        animate(given.file, hiql_episode(given.hiql_run), hiro_episode(given.hiro_run))


if __name__ == "__main__":
    main()
