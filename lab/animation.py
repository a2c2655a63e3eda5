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

from lab import play
from support import plots
from support.flags import Parser
from support.runs import HERE, one_line_errors

TASK, FRAMES = 3, 60                    # task 4: its goal lies behind a wall


def episode(agent, goal):
    """An agent of lab.play goes to a goal (1,2), and ten steps more -> maze, path (T+1,2), goal
    (2,), the place of the subgoal at each step (T,2), and the value's map, None for HIRO."""
    values, path, aims = agent.aim(goal), [agent.s[0]], []
    end = play.STEPS
    while len(aims) < end:
        subgoal, reached = agent.step()
        aims.append(subgoal)
        path.append(agent.s[0])
        if reached:
            end = min(end, len(aims) + 10)
    return agent.maze, np.array(path), goal[0], np.array(aims), values


def animate(file, left, right):
    """Write two of `episode`, of HIQL and of HIRO, as a gif, each stretched over FRAMES frames."""
    figure, axes = plots.panels(1, 2, (6.4, 3.3))
    movers = []
    for ax, title, (maze, path, goal, aims, values) in zip(
            axes[0], ("HIQL: value and subgoals", "HIRO: relative goals"), (left, right)):
        style = {} if values is None else {"cmap": "viridis"}
        plots.draw_maze(ax, maze, values, **style)
        ax.plot(*plots.plot_xy(maze, goal), "r*", ms=14, zorder=3)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("dot: agent   arrow: subgoal   star: goal", fontsize=8)
        trail, = ax.plot([], [], "C0-" if values is None else "w-", lw=1)
        arrow = ax.annotate("", (0, 0), (0, 0), zorder=4,
                            arrowprops=dict(arrowstyle="-|>", color="C1", lw=2, mutation_scale=14))
        agent, = ax.plot([], [], "ko", mec="w", ms=8, zorder=5)
        movers.append((maze, path, aims, trail, arrow, agent))

    def draw(frame):
        for maze, path, aims, trail, arrow, agent in movers:
            t = round(frame / (FRAMES - 1) * (len(path) - 1))
            trail.set_data(*plots.plot_xy(maze, path[:t + 1]))
            arrow.xy = plots.plot_xy(maze, aims[min(t, len(aims) - 1)])
            arrow.set_position(plots.plot_xy(maze, path[t]))
            agent.set_data(*plots.plot_xy(maze, path[t:t + 1]))

    FuncAnimation(figure, draw, FRAMES).save(file, PillowWriter(fps=10), dpi=100)


def main():
    p = Parser(prog="python -m lab.animation", description="An animation of two runs.")
    p.add_argument("hiql_run", metavar="HIQL_RUN", nargs="?", default=f"{HERE}/trained/hiql")
    p.add_argument("hiro_run", metavar="HIRO_RUN", nargs="?", default=f"{HERE}/trained/hiro")
    p.add_argument("file", nargs="?", default=os.path.join(HERE, "pictures", "agents.gif"))
    given = p.parse_args()
    with one_line_errors():
        left, right = play.read_agent(given.hiql_run), play.read_agent(given.hiro_run)
        start, goal = left.maze.place(left.maze.tasks[TASK])
        left.s = start[None]
        animate(given.file, episode(left, goal[None]), episode(right, np.array([[0.0, 8.0]])))


if __name__ == "__main__":
    main()
