"""Every drawing: mazes, episodes, curves, values, from arrays and mazes.

    python -m support.plots [FOLDER]     draws the mazes of envs.py with their tasks: mazes.png in
                                         FOLDER (without it runs), in a few seconds

Pictures are png files, drawn without a screen and without matplotlib's global state. ax: a
matplotlib Axes.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import os

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import envs
from support.flags import Parser, exit_with_error
from support.runs import write


def panels(rows, columns, size, **more):
    """A figure of that size in inches, and its axes (rows, columns)."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def save_figure(figure, path):
    """Write a figure as png."""
    write(path, lambda file: figure.savefig(file, format="png", dpi=110, bbox_inches="tight"))


# ------------------------------------------------------------------------------------- mazes


def draw_maze(ax, env, values=None, **style):
    """Walls, and a map of values if given: (n,), one for each free point of `lattice`. Without it a
    chasm, c in the layout, is grey.

    x to the right and y up; on grids columns to the right and row 0 on top. style: of imshow, for
    the values. -> the image, for a colour bar.
    """
    h, w = env.walls.shape
    free = lattice(env)[1]
    image = np.full(free.shape, np.nan)
    chasm = (env.layout == "c").repeat(len(free) // h, 0).repeat(len(free) // h, 1)
    image[free] = 0.4 * chasm[free] if values is None else values
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
    """Observations (h, w, 2) on a regular lattice over the whole maze, and which of them lie in
    free cells: (h, w) bool. per_cell: points along the side of a cell; on grids 1."""
    per_cell = 1 if env.discrete else per_cell
    h, w = env.walls.shape
    i, j = (np.arange(per_cell * n) / per_cell - 0.5 + 0.5 / per_cell for n in (h, w))
    cells = np.stack(np.meshgrid(i, j, indexing="ij"), -1)
    free = ~env.walls.repeat(per_cell, 0).repeat(per_cell, 1)
    return (cells if env.discrete else env.centre(cells)), free


def free_points(env):
    """The points (n, 2) of `lattice` in free cells."""
    points, free = lattice(env)
    return points[free]


def draw_tasks(ax, env):
    """The evaluation tasks of a maze: shortest paths, numbered at the start, a star at the goal.
    Inlets i and outlets o of teleporters are marked."""
    draw_maze(ax, env)
    for cell in np.argwhere(np.isin(env.layout, ("i", "o"))):
        ax.text(*plot_xy(env, env.place(cell)), env.layout[tuple(cell)] + "  ", color="0.5",
                ha="right", va="center")
    for i, (start, goal) in enumerate(env.tasks):
        cells = [env.number(env.place(np.array([start])))[0]]
        end = env.number(env.place(np.array([goal])))[0]
        while cells[-1] != end:
            cells.append(env.next_cell[cells[-1], end])
        aside = 0.09 * (i - 2) * (1 if env.discrete else env.side)     # paths side by side
        path = env.place(env.cells[cells]) + aside
        ax.plot(*plot_xy(env, path), color=f"C{i}", lw=1.2)
        ax.plot(*plot_xy(env, path[-1]), "*", color=f"C{i}", ms=10)
        ax.plot(*plot_xy(env, path[0]), "o", color=f"C{i}", ms=9)
        ax.text(*plot_xy(env, path[0]), i + 1, color="w", fontsize=7, ha="center", va="center")
    ax.set_title(f"{env.name}, {len(env.cells)} free cells", fontsize=9)


def draw_start(ax, task):
    """The task that an online environment is tested on: start, goal, blocks."""
    draw_maze(ax, task.maze)
    (name, (starts, goals)), = list(task.tests(np.random.default_rng(0), 1).items())[:1]
    for centres, half in task.blocks(task.begin(starts)[None, 0]):
        draw_block(ax, centres, half)
    ax.plot(*plot_xy(task.maze, starts[0, :2]), "C0o", ms=9)
    ax.plot(*plot_xy(task.maze, goals[0, :2]), "C0*", ms=10)
    ax.set_title(f"{task.name}, goal {name.replace('_', ', ')}", fontsize=9)


def draw_arrows(ax, env, starts, ends, lw):
    """Arrows from starts (m, 2), where the agent is, to ends (m, 2), its subgoals; lw: width."""
    for start, end in zip(starts, ends):
        ax.annotate("", plot_xy(env, end), plot_xy(env, start),
                    arrowprops=dict(arrowstyle="->", color="C1", lw=lw))


def draw_paths(ax, env, paths, goals, success):
    """Episodes from above: paths (T, N, 2), goals (N, 2), success (N,); failures in red."""
    draw_maze(ax, env)
    for i in np.argsort(~success, kind="stable"):                        # failures on top
        ax.plot(*plot_xy(env, paths[:, i]), lw=0.8, alpha=0.7, color="C0" if success[i] else "C3")
    ax.plot(*plot_xy(env, paths[0]), "k.", ms=3)
    ax.plot(*plot_xy(env, goals), "*", color="C1", ms=6)
    ax.set_title(f"{success.mean():.0%}", fontsize=9)


def draw_mazes(folder):
    """mazes.png in a folder: every layout with its tasks, and Push and Fall."""
    names = [name for name in envs.ENVIRONMENTS if not name.startswith("pointmaze")]
    figure, axes = panels(3, 3, (11, 10.5))
    for ax, name in zip(axes.flat, [*names, "pointmaze-teleport-navigate-v0"]):
        draw_tasks(ax, envs.make(name))
    for ax, name in zip(axes[2, 1:], ("point-push", "point-fall")):
        draw_start(ax, envs.make_task(name))
    save_figure(figure, os.path.join(folder, "mazes.png"))


# -------------------------------------------------------------------------------------- runs


def draw_trajectories(path, env, shown):
    """Evaluation episodes: a row of panels for each policy, a panel for each task.

    shown: {name: (paths (T+1, tasks, N, 2), goals (tasks, N, 2), success (tasks, N))}
    """
    figure, axes = panels(len(shown), len(env.tasks), (2.2 * len(env.tasks), 2.4 * len(shown)))
    for row, (name, (paths, goals, success)) in zip(axes, shown.items()):
        for i, ax in enumerate(row):
            draw_paths(ax, env, paths[:, i], goals[i], success[i])
            ax.set_title(f"task {i + 1}: {success[i].mean():.0%}", fontsize=9)
        row[0].set_ylabel(name)
    save_figure(figure, path)


def draw_curve(path, logs, counter):
    """Success over training, and the losses below.

    logs: {"train": rows, "eval": rows} of `support.runs.Run`; counter: "update" or "step".
    """
    figure, axes = panels(2, 1, (6, 5), sharex=True)
    top, bottom = axes[:, 0]
    for ax, log in ((top, logs["eval"]), (bottom, logs["train"])):
        for key in dict.fromkeys(key for row in log for key in row):
            if ("success" in key and "task" not in key) if ax is top else key.endswith("_loss"):
                points = [(row[counter], row[key]) for row in log if key in row]
                ax.plot(*zip(*points), label=key, ls=":" if "random" in key else "-")
        if ax.lines:
            ax.legend(fontsize=8)
    top.set_ylim(-0.03, 1.03)
    bottom.set(yscale="symlog", xlabel=f"{counter}s")
    save_figure(figure, path)


def draw_value(path, env, maps):
    """For each task a panel: V(., g), one episode and the subgoals along it.

    maps: a dict for each task: values (n,) at `free_points`, goal (2,), path (T+1, 2), success,
    starts (m, 2) and subgoals (m, 2), None without a hierarchy.
    """
    rows, (height, width) = -(-len(maps) // 3), env.walls.shape
    figure, axes = panels(rows, 3, (11, rows * (0.3 + 2.9 * height / width)))
    for i, (ax, one) in enumerate(zip(axes.flat, maps)):
        image = draw_maze(ax, env, one["values"], cmap="viridis")
        figure.colorbar(image, ax=ax, shrink=0.7)
        ax.plot(*plot_xy(env, one["goal"]), "r*", ms=10, label="goal")
        ax.set_title(f"task {i + 1}: V(s, g)" + ", not reached" * (not one["success"]), fontsize=9)
        ax.plot(*plot_xy(env, one["path"]), "w-", lw=1.5, label="an episode")
        if one["subgoals"] is not None:
            draw_arrows(ax, env, one["starts"], one["subgoals"], lw=1.2)
            ax.plot([], [], "C1-", label="to its subgoals")
    for ax in axes.flat[len(maps):]:
        ax.set_axis_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower right", facecolor="0.35",
                  labelcolor="w")
    save_figure(figure, path)


def draw_correction(path, logs):
    """HIRO's correction over training: how often it changes a goal, how far, and by how much the
    score rises; and how far from its subgoals the agent ends. logs as in `draw_curve`."""
    titles = {"relabel_fraction": "share of goals relabelled",
              "relabel_distance": "mean change of a goal",
              "relabel_gain": "mean gain of the score, Eq. (5)",
              "subgoal_error": "mean distance from the subgoal"}
    figure, axes = panels(1, len(titles), (14, 2.8))
    for ax, (key, title) in zip(axes[0], titles.items()):
        rows = [row for row in logs["eval" if key == "subgoal_error" else "train"] if key in row]
        ax.plot([row["step"] for row in rows], [row[key] for row in rows], lw=1)
        ax.set(title=title, xlabel="steps", ylim=(0, None))
    save_figure(figure, path)


def draw_block(ax, centres, half):
    """A square block of that half-width, at its first and last place, and its way (T+1, 2)."""
    for centre, style in ((centres[0], dict(ls=":", fill=False)), (centres[-1], dict(alpha=0.5))):
        ax.add_patch(Rectangle(centre - half, 2 * half, 2 * half, color="C2", **style))
    ax.plot(*centres.T, "C2", lw=1)


def draw_episodes(path, env, tests, subgoal_interval=None):
    """One episode of each test of an online task, and its subgoals.

    env: the task's maze; tests: {name: {"path": (T+1, 2), "goal": (2,), "asked": (subgoals, 2),
    "blocks": [(centres (T+1, 2), half-width)]}}; subgoal_interval: steps between subgoals, without
    a hierarchy None.
    """
    figure, axes = panels(1, len(tests), (2.6 * len(tests), 3.1))
    for ax, (name, one) in zip(axes[0], tests.items()):
        draw_maze(ax, env)
        for centres, half in one["blocks"]:
            draw_block(ax, centres, half)
        ax.plot(*plot_xy(env, one["path"]), "C0", lw=1, label="the agent's way")
        if subgoal_interval:
            draw_arrows(ax, env, one["path"][::subgoal_interval], one["asked"], lw=0.8)
            ax.plot([], [], "C1", label="to its subgoals")
        ax.plot(*plot_xy(env, one["goal"]), "r*", ms=9, label="goal")
        ax.set_title(f"goal {name.replace('_', ', ')}", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  fontsize=8)
    save_figure(figure, path)


def main():
    p = Parser(prog="python -m support.plots", description="Draws every maze with its tasks.")
    p.add_argument("folder", nargs="?", default="runs", help="where mazes.png goes (default: runs)")
    folder = p.parse_args().folder
    try:
        os.makedirs(folder, exist_ok=True)
        draw_mazes(folder)
    except OSError as e:
        exit_with_error(e, p.prog)
    print(f"wrote mazes.png to {os.path.abspath(folder)}")


if __name__ == "__main__":
    main()
