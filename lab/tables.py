"""Tables, comparisons and pictures of results/, and the program that runs experiments.

An experiment is a section of lab/experiments.ini: a command line for each row of its table, and
seeds.

    python -m lab.tables --list                         every experiment, its cost, what it shows
    python -m lab.tables run NAME [--jobs N]            the runs that results/NAME.csv lacks
    python -m lab.tables run NAME --seed N --out DIR    one seed alone, for a cluster
    python -m lab.tables report [--gather DIR]          renew tables and pictures from results/,
                                                        after adding what --seed --out DIR wrote
    python -m lab.tables compare NAME:ROW NAME:ROW      their difference, with its interval

`run` takes the core-minutes that --list prints. Rows are named NAME:ROW. NAME:ROW:PART is
the agent that was trained beside ROW, in the same runs: default:hiql:flat has the columns flat_...
of default:hiql.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import argparse
import glob
import inspect
import math
import os
import pkgutil
import re
import shlex
import sys

import numpy as np
from scipy.stats import binomtest, bootstrap, fisher_exact, mannwhitneyu, trim_mean

from lab.experiments import (cost, gather, numbers, parts_of, read_experiments, recorded,
                             run_experiment)
from support.flags import Parser, filled
from support.plots import panels, save_figure
from support.runs import HERE, one_line_errors, write

PROGRAM = "python -m lab.tables"
SOLVED = 0.95                           # a seed of HIRO with this success at its end has solved

# --------------------------------------------------------------------------- rows


def runs_of(reference):
    """The runs of NAME:ROW in results/, sorted by seed, as dicts of strings.

    For NAME:ROW:PART: row, seed, train_seconds and the columns PART_..., renamed without PART_.
    """
    name, row, part = parts_of(reference)
    runs = sorted((r for r in recorded(name)[0] if r["row"] == row), key=lambda r: int(r["seed"]))
    if not part:
        return runs
    common = "row", "seed", "train_seconds"
    return [{key.removeprefix(f"{part}_"): x for key, x in run.items()
             if key in common or key.startswith(f"{part}_")} for run in runs]


def shown_rows(name):
    """{label: runs} of the rows of an experiment's table that have runs, those `beside` first."""
    known, found = read_experiments(), {}
    for reference in known[name].beside + [f"{name}:{row}" for row in known[name].rows]:
        if runs := runs_of(reference):
            where, row, part = parts_of(reference)
            label = part or row
            found[label if where == name else f"{label} (`{where}`)"] = runs
    return found


# --------------------------------------------------------------------------- statistics


def interval(*samples):
    """(mean, low, high): interquartile mean over seeds, and its 95 % percentile-bootstrap interval.

    samples: one, a number for each seed; or two, for the difference of their interquartile means.
    Whole seeds are resampled, so that tasks that fail together in a seed stay together.
    """
    def statistic(*drawn, axis=-1):
        means = [trim_mean(x, 0.25, axis=axis) for x in drawn]
        return means[0] - means[1] if len(means) == 2 else means[0]

    samples = [np.repeat(np.asarray(x, float), 1 + (len(x) == 1)) for x in samples]    # scipy: >= 2
    drawn = bootstrap(samples, statistic, n_resamples=2000, vectorized=True, method="percentile",
                      random_state=np.random.default_rng(0)).confidence_interval
    return statistic(*samples), drawn.low, drawn.high


def estimate(x):
    """"mean [low, high]" of `interval` for numbers x of four seeds or more.

    For two or three seeds "mean (lowest to highest)", the plain mean; for one the number.
    """
    numbers = (np.mean(x), min(x), max(x)) if len(x) < 4 else interval(x)
    middle, low, high = (f"{v:.3g}" if v < 1000 else f"{v:.0f}" for v in numbers)
    spread = f" ({low} to {high})" if len(x) < 4 else f" [{low}, {high}]"
    return middle + spread * (len(x) > 1)


def solved(x):
    """"k of n seeds" whose success x (n,) is at least SOLVED."""
    return f"{(np.asarray(x) >= SOLVED).sum()} of {len(x)} seeds"


def compare(one, other):
    """The differences of two rows, NAME:ROW[:PART]: lines of text.

    A line for each column of the first experiment's table that holds one number for each run in
    both: both interquartile means, their difference and its 95 % interval. Where there is a first
    success (HIRO), the p-value of its ranks, and of the success that of the solved seeds.
    ValueError: a row without runs.
    """
    sides, lines = [runs_of(one), runs_of(other)], []
    for reference, side in zip((one, other), sides):
        if not side or not set(side[0]) - {"row", "seed", "train_seconds"}:
            raise ValueError(f"{reference}: no such row in results/; rows are named NAME:ROW, such "
                             "as hiro:hiro, or NAME:ROW:PART, such as default:hiql:flat")
    columns = read_experiments()[parts_of(one)[0]].columns
    for column in columns:
        cells = [[numbers(r, column) for r in side] for side in sides]
        if column == "first_success":
            never_last = [[cell[0] if cell else np.inf for cell in side] for side in cells]
            lines.append(f"first success, by ranks, never last (Mann-Whitney): p = "
                         f"{mannwhitneyu(*never_last).pvalue:.2g}")
            continue
        x, y = ([cell[0] for cell in side if len(cell) == 1] for side in cells)
        if not x or not y:
            continue
        if column == "success" and "first_success" in columns:
            counts = [[(np.array(z) >= SOLVED).sum(), (np.array(z) < SOLVED).sum()] for z in (x, y)]
            lines.append(f"solved: {solved(x)} - {solved(y)} (Fisher, two-sided): p = "
                         f"{fisher_exact(counts).pvalue:.2g}")
            continue
        difference, low, high = interval(x, y)
        spread = f" [{low:+.3f}, {high:+.3f}]"
        if min(len(x), len(y)) == 1:
            spread = ", one seed alone: no interval"
        lines.append(f"{column.replace('_', ' ')}: {trim_mean(x, 0.25):.3f} ({len(x)} seeds) - "
                     f"{trim_mean(y, 0.25):.3f} ({len(y)} seeds) = {difference:+.3f}{spread}")
    return lines


# --------------------------------------------------------------------------- tables


def table(name):
    """The markdown table of an experiment: title, a line for each row, source.

    A long table of one row is transposed.
    """
    experiment, rows, shown = read_experiments()[name], recorded(name)[0], shown_rows(name)
    if not rows:
        return f"{experiment.title}: not run yet."
    heads = ["row", *experiment.columns, *(f"{c}, each seed" for c in experiment.each), "seeds",
             "minutes"]
    if experiment.published:
        heads += ["mean", "published"]
    lines = [[head.replace("_", " ").replace("per task", "per task: mean") for head in heads]]
    for row, runs in shown.items():
        minutes = _array(runs, "train_seconds").mean() / 60
        cells = [row, *(_cell(runs, c, experiment.columns) for c in experiment.columns),
                 *(" ".join(_short(r, c) for r in runs) for c in experiment.each),
                 str(len(runs)), f"{minutes:.1f}"]
        if experiment.published:
            mean = _array(runs, experiment.each[0]).mean()
            cells += [f"{mean:.3f}", experiment.published.get(row, "")]
        lines.append(cells)
    if len(lines) == 2 and len(heads) > 8:
        lines = list(zip(*lines))
    seeds = sorted({int(r["seed"]) for r in rows})
    commits = [f"`{row['commit']}`" for row in rows]
    code = ", ".join(f"{x} ({commits.count(x)} rows)" for x in dict.fromkeys(commits))
    if len(set(commits)) == 1:
        code = commits[0]
    source = (f"Seeds {' '.join(map(str, seeds))}; `results/{name}.csv`, by `{PROGRAM} run {name}`"
              f", code of {code}.")
    return "\n".join([experiment.title, "", *_markdown(lines), "", source])


def _markdown(lines):
    """Lists of cells, the heads first -> lines of a markdown table."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _array(runs, column):
    """The numbers in a column, (seeds that have some, length); ValueError if lengths differ."""
    return np.array([x for r in runs if (x := numbers(r, column))])


def _cell(runs, column, columns):
    """The estimate of a column; of one number for each task their means; of HIRO's success, which
    has a first success beside it, the solved seeds."""
    x = _array(runs, column)
    if not len(x):
        return ""
    if column == "success" and "first_success" in columns:
        return solved(x)
    if x.shape[1] > 1:
        return " ".join(f"{mean:.2f}" for mean in x.mean(0))
    return estimate(x[:, 0]) + f" ({len(x)} of {len(runs)} seeds)" * (len(x) < len(runs))


def _short(run, column):
    """One seed's number in a list of all seeds, "-" if it is missing."""
    return " ".join(f"{x:.2f}" if x < 10 else f"{x:.0f}" for x in numbers(run, column)) or "-"


# README's table, {task: rows}: HIQL's and the flat policy's; HIRO's, TD3's, without the correction
HIQL_TASKS = {
    "point-medium (`python hiql.py`)": ("default:hiql", "default:hiql:flat"),
    "grid-fourrooms": ("agents_grid:hiql", "agents_grid:hiql:flat"),
    "OGBench's large maze": ("ogbench:large-navigate", "ogbench_agents:flat"),
    "OGBench's giant maze": ("ogbench:giant-navigate",)}
HIRO_TASKS = {
    "U-maze (`python hiro.py`)": ("hiro:hiro", "hiro:td3, no hierarchy",
                                  "hiro:hiro, no correction"),
    "grid-fourrooms": ("hiro_grid:hiro", "hiro_grid:td3, no hierarchy",
                       "hiro_grid:hiro, no correction"),
    "Push": ("push:hiro", "push:td3, no hierarchy", "push:hiro, no correction"),
    "Fall": ("fall:hiro", "fall:td3, no hierarchy", "fall:hiro, no correction")}


def headline():
    """README's table: mean success and its range over seeds (HIQL), solved seeds (HIRO)."""
    lines, files = [["", "task", "agent", "without hierarchy", "without correction"]], []
    for algorithm, tasks in (("HIQL", HIQL_TASKS), ("HIRO", HIRO_TASKS)):
        for task, rows in tasks.items():
            cells = []
            for row in rows:
                x = _array(runs_of(row), "success")
                cell = solved(x)
                if algorithm == "HIQL":
                    cell = f"{x.mean():.2f} ({x.min():.2f} to {x.max():.2f}, {len(x)} seeds)"
                cells.append(cell)
                files.append(f"`results/{parts_of(row)[0]}.csv`")
            lines.append([algorithm, task, *cells, *[""] * (3 - len(cells))])
    return "\n".join([*_markdown(lines), "", f"From {', '.join(dict.fromkeys(files))}, by "
                      f"`{PROGRAM} report`."])


# --------------------------------------------------------------------------- report


MARKED = re.compile(r"^(<!-- (table|compare|headline|code)\b *(.*?) *-->\n)"
                    r"(?:(?!<!-- ).*\n)*(?=<!-- end -->$)", re.M)     # between them no other mark


def report(text):
    """The text with everything between its marks renewed from results/.

    Marks are lines of their own: `<!-- table NAME -->`, `<!-- compare NAME:ROW - NAME:ROW -->`,
    `<!-- headline -->` or `<!-- code hiql.update -->`, and `<!-- end -->`. ValueError: a mark
    without its end, an end without its mark, or one that names no experiment or row with runs.
    """
    marks = re.findall(r"^<!-- (?:table|compare|headline|code|end)\b", text, re.M)
    if len(marks) != 2 * len(MARKED.findall(text)):
        raise ValueError("a mark, such as <!-- table NAME -->, has no <!-- end -->, or an end has "
                         "no mark")
    return MARKED.sub(lambda mark: f"{mark[1]}{_renewed(mark[2], mark[3])}\n", text)


def _renewed(kind, what):
    """The text that belongs after a mark `<!-- kind what -->`."""
    if kind == "headline":
        return headline()
    if kind == "code":
        return f"```python\n{inspect.getsource(pkgutil.resolve_name(what))}```"
    if kind == "table":
        if what not in read_experiments():
            raise ValueError(f"there is no experiment {what}")
        return table(what)
    rows = what.split(" - ")
    lines = [f"{PROGRAM} compare {shlex.join(rows)}", *compare(*rows)]
    return "\n".join(f"    {line}" for line in lines)


def renew():
    """Renew README.md, every docs/*.md and the pictures; nothing is written if a mark is wrong. A
    picture is drawn if its file is missing or its table has changed."""
    texts = {}
    for path in ["README.md", *sorted(glob.glob("docs/*.md", root_dir=HERE))]:
        with open(os.path.join(HERE, path)) as file:
            old = file.read()
        texts[path] = old, report(old)
    for name, experiment in read_experiments().items():
        drawn = os.path.exists(os.path.join(HERE, "pictures", f"{name}.png"))
        same = drawn and any(table(name) in old for old, _ in texts.values())
        if experiment.picture and recorded(name)[0] and not same:
            draw_experiment(name)
            print(f"drew pictures/{name}.png")
    for path, (old, new) in texts.items():
        if new != old:
            write(os.path.join(HERE, path), new)
            print(f"renewed the tables of {path}")
    if all(old == new for old, new in texts.values()):
        print("every table is up to date")


# --------------------------------------------------------------------------- pictures


WORDS = {                               # columns on the axes of pictures
    "success": "success on the five tasks", "success_random": "success on random pairs",
    "success_curve": "share of solved seeds", "wrong_flat_by_distance": "wrong first actions: flat",
    "wrong_hierarchy_by_distance": "wrong first actions: hierarchy",
    "relabel_gain_curve": "gain of the score, Eq. (5)",
    "subgoal_error_0_8_curve": "distance to subgoals; goal (0, 8)",
    "subgoal_error_random_curve": "distance to subgoals; random goals"}


def draw_experiment(name):
    """Draw the columns `picture` of an experiment: pictures/<name>.png, a panel for each.

    A column of lists (over training, or over the distance to the goal, from 1) has a line for each
    row; a column of numbers the seeds of each row as dots.
    """
    rows, columns = shown_rows(name), read_experiments()[name].picture
    across, down = min(2, len(columns)), math.ceil(len(columns) / 2)
    high = max(3.4, 0.4 * len(rows))
    figure, axes = panels(down, across, (5 * across, high * down))
    for ax, column in zip(axes.flat, columns):
        found = {row: _array(runs, column) for row, runs in rows.items()}
        found = {row: x for row, x in found.items() if len(x)}
        if next(iter(found.values())).shape[1] == 1:
            _draw_dots(ax, found)
            ax.set_xlabel(WORDS.get(column, column))
            continue
        for i, (row, y) in enumerate(found.items()):
            x = np.arange(1, y.shape[1] + 1)
            if column.endswith("_curve"):
                x = x * _array(rows[row], "env_steps")[0, 0] / y.shape[1] / 1000
            _draw_line(ax, x, y, column == "success_curve", f"C{i}", f"{row} ({len(y)} seeds)")
        ax.set(xlabel="thousand steps" if column.endswith("_curve") else "steps to the goal",
               ylabel=WORDS.get(column, column))
        ax.set_ylim(0, {"success_curve": 1.03, "wrong_flat_by_distance": 0.12,
                        "wrong_hierarchy_by_distance": 0.12}.get(column))
        ax.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
    save_figure(figure, os.path.join(HERE, "pictures", f"{name}.png"))


def _draw_line(ax, x, y, solved, color, label):
    """y (seeds, length): their mean and range; solved: the share of y >= SOLVED, and its 95 %
    interval by Clopper and Pearson."""
    known = ~np.isnan(y).all(0)
    x, y = x[known], y[:, known]
    middle, low, high = np.nanmean(y, 0), np.nanmin(y, 0), np.nanmax(y, 0)
    if solved:
        k, n = (y >= SOLVED).sum(0), len(y)
        middle = k / n
        low, high = np.transpose([binomtest(int(x), n).proportion_ci(method="exact") for x in k])
    ax.plot(x, middle, color, lw=2, label=label)
    ax.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def _draw_dots(ax, runs):
    """runs {row: array (seeds, 1)}: the seeds of each row, the first row on top; below them their
    interquartile mean and its interval."""
    for i, x in enumerate(runs.values()):
        mean, low, high = interval(x[:, 0])
        apart = 0.12 * np.linspace(-1, 1, len(x))               # all are seen
        ax.plot(np.sort(x[:, 0]), apart - i, "C0o", ms=4, alpha=0.5, label="a seed" * (not i))
        ax.errorbar(mean, -i - 0.27, xerr=[[mean - low], [high - mean]], fmt="C1|", capsize=3,
                    label="interquartile mean, 95 %" * (not i))
    names = [f"{row} ({len(x)})".replace("`", "") for row, x in runs.items()]
    ax.set_yticks(-np.arange(len(runs)), names, fontsize=8)
    top = max(1, *(np.nanmax(x) for x in runs.values()))
    ax.set(xlim=(-0.05 * top, 1.05 * top), ylim=(0.4 - len(runs), 0.4))
    ax.legend(fontsize=7)


# --------------------------------------------------------------------------- the program


def list_experiments():
    """Print every experiment with its cost, its runs in results/ and its title."""
    for name, experiment in read_experiments().items():
        minutes, done, planned = cost(name)
        print(f"{name}: {f'{minutes:.0f} core-minutes' if done else 'cost not known yet'}, "
              f"{done} of {planned} runs in results/\n    {experiment.title}")


def main():
    """Run the command in sys.argv. `run` exits with 1 if a run failed; bad input exits with 2."""
    p = Parser(prog=PROGRAM, description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--list", action="store_true", help="every experiment, and what it costs")
    commands = p.add_subparsers(dest="command")
    run = commands.add_parser("run", help="run what is missing of an experiment")
    run.add_argument("name", choices=list(read_experiments()))
    run.add_argument("--jobs", type=int, help="processes at once (default 2, with --seed 1)")
    run.add_argument("--seed", type=int, help="this seed alone; wants --out")
    run.add_argument("--out", metavar="DIR", type=filled, help="where --seed writes NAME_seedN.csv")
    renewal = commands.add_parser("report", help="renew the tables and pictures from results/")
    renewal.add_argument("--gather", metavar="DIR", help="add what `run --seed --out DIR` wrote")
    two = commands.add_parser("compare", help="the difference of two rows, with its interval")
    two.add_argument("one", metavar="NAME:ROW[:PART]")
    two.add_argument("other", metavar="NAME:ROW[:PART]")
    given = p.parse_args()
    with one_line_errors():
        if given.list:
            list_experiments()
        elif given.command == "compare":
            print("\n".join(compare(given.one, given.other)))
        elif given.command == "report":
            if given.gather is not None:
                print(f"{gather(given.gather)} new rows from {given.gather}")
            renew()
        elif given.command == "run":
            if (given.seed is None) != (given.out is None):
                p.error("--seed and --out go together")
            jobs = given.jobs or (2 if given.seed is None else 1)
            if run_experiment(given.name, max(jobs, 1), given.seed, given.out):
                sys.exit(1)
        else:
            p.error("say run NAME, report, compare NAME:ROW NAME:ROW, or --list")


if __name__ == "__main__":
    main()
