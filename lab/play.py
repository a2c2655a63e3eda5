"""Play with a trained run: give it goals, and see value, subgoals and agent.

    python -m lab.play trained/hiql         a window: click anywhere in the maze, and the agent goes
    python -m lab.play trained/hiro         there from where it is; the same for HIRO's U-maze
    python -m lab.play RUN --goal 8,8 --goal 20,0 --out FILE.png
                                            a picture of these goals, also without a screen
    python -m lab.play RUN --give DIR       the agent alone, without what training needs

RUN is a run of hiql.py in a maze of envs.py, or of hiro.py on point-umaze. Colours are the value of
each place for the goal (HIQL), the arrow is the current subgoal: HIQL's at the point whose
representation is nearest to it, HIRO's at the place that its goal names. On grids a goal is column,
row.
"""

import hiql                             # first: it sets one BLAS thread before numpy loads

import json
import os

import numpy as np

import envs
import hiro
from support import plots
from support.flags import Parser, filled
from support.runs import load_arrays, one_line_errors, read_run, require_free, say, write

STEPS = 400                             # at most, to one goal


class HiqlAgent:
    """An agent of hiql.py in its maze: `aim` at a goal, then `step`; s (1,2): where it is."""

    def __init__(self, folder):
        saved, self.maze = hiql.restored(folder)
        if not isinstance(self.maze, envs.Maze):
            raise ValueError(f"{folder} is a run on data alone; there is no maze to play in")
        self.setting, self.params = (saved.config, self.maze), saved.agent["params"]
        self.points, self.rng = plots.free_points(self.maze), np.random.default_rng(0)
        self.s = self.maze.place([self.maze.tasks[0][0]])

    def aim(self, goal):
        """Go to a goal (1,2) from now on; -> its value (n,) at `plots.free_points`."""
        self.goal, self.t = goal, 0
        self.act = hiql.Actor(self.params, *self.setting, self.rng)
        n = len(self.points)
        return hiql.value_map(self.params, self.points, goal.repeat(n, 0), *self.setting)

    def step(self):
        """One step -> the place of the subgoal (2,), whether the goal is reached."""
        subgoal = hiql.subgoal_places(self.params, self.s, self.goal, self.points, *self.setting)
        a = self.act(self.s, self.goal, self.t)
        self.s, self.t = self.maze.move(self.s, a, self.rng), self.t + 1
        return subgoal[0], bool(self.maze.success(self.s, self.goal)[0])


class HiroAgent:
    """The same of hiro.py, on point-umaze: no map of values."""

    def __init__(self, folder):
        saved = read_run(hiro.PROGRAM, folder)
        if saved.config.env != "point-umaze":
            raise ValueError(f"{folder} is a run in {saved.config.env}; what can be played in is "
                             "point-umaze")
        self.task, self.actor = envs.make_task("point-umaze"), hiro.Actor(saved.agent, saved.config)
        self.maze, self.s = self.task.maze, np.zeros((1, 2))

    def aim(self, goal):
        """Go to a goal (1,2) from now on."""
        self.goal, self.episode = goal, self.actor()

    def step(self):
        """One step -> the place of the subgoal (2,), whether the goal is reached."""
        now = self.s.astype(np.float32)
        a = self.episode.act(now, self.goal.astype(np.float32))
        self.s = self.task.move(self.s, a.astype(float))
        distance = self.task.distance(self.s, self.goal)
        return (now + self.episode.g)[0], bool((distance <= self.maze.tolerance)[0])


def read_agent(folder):
    """The agent of a run's folder. ValueError: it is of another program."""
    meta = load_arrays(os.path.join(folder, "checkpoint.npz"), {"meta"}).get("meta", "{}")
    agents = {"hiql.py": HiqlAgent, "hiro.py": HiroAgent}
    program = json.loads(str(meta)).get("program")
    if program not in agents:
        raise ValueError(f"{folder} holds no run of hiql.py or hiro.py")
    return agents[program](folder)


class Board:
    """A maze on an Axes, the agent in it; `click` gives a goal, `tick` makes a step."""

    def __init__(self, ax, agent):
        self.ax, self.agent, self.going = ax, agent, False
        self.trail, self.asked, self.image = [], [], None       # places; subgoals; the values
        plots.draw_maze(ax, agent.maze)
        self.line, = ax.plot([], [], "C3-", lw=1.5, zorder=3)
        self.arrow, = ax.plot([], [], "C1-o", lw=2, ms=5, zorder=4)
        self.star, = ax.plot([], [], "r*", ms=14, zorder=4)
        self.dot, = ax.plot([], [], "ko", mec="w", ms=8, zorder=5)
        self.dot.set_data(*plots.plot_xy(agent.maze, agent.s))
        ax.set_title("click a goal", fontsize=10)

    def click(self, event):
        """Of a window's button_press_event."""
        if event.inaxes is self.ax:
            self.aim(event.xdata, event.ydata)

    def aim(self, x, y):
        """A new goal, unless it is in a wall; -> whether it is one."""
        maze = self.agent.maze
        goal = np.array([[np.rint(y), np.rint(x)] if maze.discrete else [x, y]], float)
        if not maze.is_free(goal)[0]:
            self.ax.set_title("that is a wall", fontsize=10)
            return False
        values = self.agent.aim(goal)
        if values is not None:
            if self.image:
                self.image.remove()
            self.image = plots.draw_maze(self.ax, maze, values, cmap="viridis")
        self.star.set_data(*plots.plot_xy(maze, goal))
        self.going, self.trail, self.asked = True, [self.agent.s[0]], []
        return True

    def tick(self):
        """One step of an agent that has a goal."""
        if not self.going:
            return
        subgoal, reached = self.agent.step()
        self.trail.append(self.agent.s[0])
        self.asked.append(subgoal)
        for line, points in ((self.line, self.trail), (self.dot, self.trail[-1:]),
                             (self.arrow, [self.trail[-1], subgoal])):
            line.set_data(*plots.plot_xy(self.agent.maze, np.array(points)))
        self.going = not reached and len(self.asked) < STEPS
        how = "reached" if reached else "on the way"
        if not reached and not self.going:
            how = "not reached"
        self.ax.set_title(f"{how}, {len(self.asked)} steps", fontsize=10)


def draw_goals(path, agent, goals):
    """A picture: a panel for each goal (x, y), gone to one after the other. ValueError: a wall."""
    figure, axes = plots.panels(1, len(goals), (4 * len(goals), 4.2))
    for ax, goal in zip(axes[0], goals):
        board = Board(ax, agent)
        if not board.aim(*goal):
            raise ValueError(f"--goal {goal[0]:g},{goal[1]:g} is in a wall of {agent.maze.name}")
        while board.going:
            board.tick()
        plots.draw_arrows(ax, agent.maze, board.trail[:-1:10], board.asked[::10], lw=1.2)
    plots.save_figure(figure, path)


def open_window(agent):
    """Show the board until it is closed -> False if there is no screen."""
    import matplotlib.pyplot as plt             # here alone: it chooses a backend for all
    if plt.get_backend().lower() == "agg":
        return False
    figure, ax = plt.subplots(figsize=(6, 6))
    board = Board(ax, agent)

    def tick():
        board.tick()
        figure.canvas.draw_idle()

    figure.canvas.mpl_connect("button_press_event", board.click)
    timer = figure.canvas.new_timer(interval=50)
    timer.add_callback(tick)
    timer.start()
    plt.show()
    return True


def give(folder, out):
    """Write the agent of a run alone: checkpoint.npz without what training needs, compressed."""
    require_free(out)
    arrays = load_arrays(os.path.join(folder, "checkpoint.npz"))
    kept = {name: x for name, x in arrays.items() if not name.startswith("training/")}
    os.makedirs(out, exist_ok=True)
    write(os.path.join(out, "checkpoint.npz"), lambda file: np.savez_compressed(file, **kept))


def pair(text):
    """"8,0" -> (8.0, 0.0)."""
    x, y = map(float, text.split(","))
    return x, y


def main():
    p = Parser(prog="python -m lab.play", description="Give a trained run goals.")
    p.add_argument("run", metavar="RUN", type=filled)
    p.add_argument("--goal", metavar="X,Y", type=pair, action="append", help="in a picture")
    p.add_argument("--out", metavar="FILE", type=filled, help="of the picture (default: in runs)")
    p.add_argument("--give", metavar="DIR", type=filled, help="where the agent alone is written")
    given = p.parse_args()
    with one_line_errors():
        agent = read_agent(given.run)
        if given.give:
            return give(given.run, given.give)
        if not given.goal and open_window(agent):
            return
        goals = given.goal
        if not goals:
            say("there is no screen; these are the goals of the maze's tasks")
            goals = [plots.plot_xy(agent.maze, place) for place in
                     agent.maze.place([goal for _, goal in agent.maze.tasks[:3]])]
        name = os.path.basename(os.path.abspath(given.run))
        out = given.out or os.path.join("runs", f"play_{name}.png")
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        draw_goals(out, agent, goals)
        say(f"wrote {out}")


if __name__ == "__main__":
    main()
