"""Tables, comparisons and pictures of results/, and the program that runs experiments.

An experiment is a section of lab/experiments.ini: a command line for each row of its table, and
seeds. lab/experiments.py reads it and writes results/; this module renews README.md, docs/ and
pictures/ from results/.

    python -m lab.tables --list                         every experiment, its cost, what it shows
    python -m lab.tables run NAME [--jobs N]            the runs that results/NAME.csv lacks
    python -m lab.tables run NAME --seed N --out DIR    one seed alone, for a cluster
    python -m lab.tables report [--gather DIR]          renew tables and pictures from results/,
                                                        after adding what --seed --out DIR wrote
    python -m lab.tables compare NAME:ROW NAME:ROW      their difference, with its interval

`run` takes the core-minutes that --list prints. It writes results/NAME.csv, a line for each
finished run, and results/NAME.json, the configuration of each row. The others take seconds.

Rows are named NAME:ROW. NAME:ROW:PART is the agent that was trained beside ROW, in the same runs:
default:hiql:flat has the columns flat_... of default:hiql.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import argparse
import glob
import os
import re
import shlex
import sys

import numpy as np
from scipy.stats import bootstrap, trim_mean

from lab.experiments import (EARLIER, cost, gather, is_row, numbers, parts_of, read_experiments,
                             recorded, run_experiment)
from support.flags import Parser, filled
from support.plots import panels, save_figure
from support.runs import HERE, one_line_errors, write

PROGRAM = "python -m lab.tables"

# --------------------------------------------------------------------------- rows


def runs_of(reference):
    """The runs of NAME:ROW in results/, sorted by seed, as dicts of strings.

    For NAME:ROW:PART: row, seed, train_seconds and the columns PART_..., renamed without PART_.
    """
    name, row, part = parts_of(reference)
    runs = sorted((r for r in recorded(name)[0] if r["row"] == row), key=lambda r: int(r["seed"]))
    if not part:
        return runs
    return [{**{key: x for key, x in r.items() if key in ("row", "seed", "train_seconds")},
             **{key.removeprefix(f"{part}_"): x for key, x in r.items()
                if key.startswith(f"{part}_")}} for r in runs]


def shown_rows(name):
    """{label: (runs, number of seeds planned)} of the rows of an experiment's table that have runs:
    those named `beside` first, then its own."""
    known, found = read_experiments(), {}
    for reference in known[name].beside + [f"{name}:{row}" for row in known[name].rows]:
        if runs := runs_of(reference):
            where, row, part = parts_of(reference)
            label = part or row
            found[label if where == name else f"{label} (`{where}`)"] = (
                runs, len(known[where].seeds[row]))
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


def compare(one, other):
    """The differences of two rows, NAME:ROW[:PART]: lines of text.

    A line for each column of the first experiment's table that holds one number for each run in
    both, except peak_mb: both interquartile means, their difference and its 95 % interval.
    ValueError: a row without runs.
    """
    sides, lines = [runs_of(one), runs_of(other)], []
    for reference, side in zip((one, other), sides):
        if not side or not set(side[0]) - {"row", "seed", "train_seconds"}:
            raise ValueError(f"{reference}: no such row in results/; rows are named NAME:ROW, such "
                             "as hiro:hiro, or NAME:ROW:PART, such as default:hiql:flat")
    for column in read_experiments()[parts_of(one)[0]].columns:
        cells = [[numbers(r, column) for r in side] for side in sides]
        x, y = ([v for cell in side if len(cell) == 1 for v in cell] for side in cells)
        if x and y and column != "peak_mb":
            difference, low, high = interval(x, y)
            spread = (f" [{low:+.3f}, {high:+.3f}]" if min(len(x), len(y)) > 1 else
                      ", one seed alone: no interval")
            lines.append(f"{column.replace('_', ' ')}: {trim_mean(x, 0.25):.3f} ({len(x)} seeds) - "
                         f"{trim_mean(y, 0.25):.3f} ({len(y)} seeds) = {difference:+.3f}{spread}")
    return lines


# --------------------------------------------------------------------------- tables


def table(name):
    """The markdown table of an experiment: title, a line for each row, source.

    A table of one row and more than eight columns is transposed. Rows without a command (EARLIER)
    are marked, and explained below.
    """
    experiment, rows, shown = read_experiments()[name], recorded(name)[0], shown_rows(name)
    if not rows:
        return f"{experiment.title}: not run yet."
    lists = {c for runs, _ in shown.values() for r in runs for c in experiment.columns
             if " " in r.get(c, "")}                    # one number for each task
    heads = ["row", *(c.replace("_", " ") + ": mean" * (c in lists) for c in experiment.columns),
             *(f"{c.replace('_', ' ')}, each seed" for c in experiment.each), "seeds", "minutes"]
    heads += ["mean", "published"] * bool(experiment.published)
    lines = [heads]
    earlier = {row: text.removeprefix(EARLIER) for row, text in experiment.rows.items()
               if text.startswith(EARLIER)}
    for row, (runs, planned) in shown.items():
        cells = [row + " (earlier form)" * (row in earlier),
                 *(_cell(runs, c, c in lists) for c in experiment.columns),
                 *(" ".join(_short(r, c) for r in runs) for c in experiment.each),
                 _seeds(runs, planned), _minutes(runs)]
        if experiment.published:
            mean = _array(runs, experiment.each[0]).mean()
            cells += [f"{mean:.3f}", experiment.published.get(row, "")]
        lines.append(cells)
    if len(lines) == 2 and len(heads) > 8:
        lines = list(zip(*lines))
    seeds = sorted({int(r["seed"]) for r in rows})
    source = (f"Seeds {' '.join(map(str, seeds))}; `results/{name}.csv`, by `{PROGRAM} run {name}`"
              f", code of {_commits(rows)}.")
    if earlier:
        source += "\nRows of an earlier form of the code are kept and not run any more."
    for row, text in earlier.items():
        source += f" *{row}*: {text}."
    return "\n".join([experiment.title, "", *_markdown(lines), "", source])


def _commits(rows):
    """The commits whose code made the rows, and how many rows each has made."""
    found = [row.get("commit") or "unknown" for row in rows]
    names = list(dict.fromkeys(found))
    if len(names) == 1:
        return f"`{names[0]}`"
    return ", ".join(f"`{name}` ({found.count(name)} rows)" for name in names)


def _markdown(lines):
    """Lists of cells, the heads first -> lines of a markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in [lines[0], ["---"] * len(lines[0]),
                                                     *lines[1:]]]


def _array(runs, column):
    """The numbers in a column, (seeds that have some, length); ValueError if lengths differ."""
    return np.array([x for r in runs if (x := numbers(r, column))])


def _cell(runs, column, is_list):
    x = _array(runs, column)
    if not len(x):
        return ""
    text = " ".join(f"{mean:.2f}" for mean in x.mean(0)) if is_list else estimate(x[:, 0])
    return text + f" ({len(x)} of {len(runs)} seeds)" * (len(x) < len(runs))


def _short(run, column):
    """One seed's number in a list of all seeds: "0.95", "27500", or "-" if it is missing."""
    return ",".join(f"{x:.2f}" if x < 10 else f"{x:.0f}" for x in numbers(run, column)) or "-"


def _seeds(runs, planned):
    return f"{len(runs)}" + f" of {planned}" * (len(runs) < planned)


def _minutes(runs):
    return f"{_array(runs, 'train_seconds').mean() / 60:.1f}"


# README's first table, {line: the row it shows}; and {such a row: the row with the published
# settings on the same task}.
HEADLINE = {
    "default maze, HIQL": "default:hiql",
    "default maze, flat policy on HIQL's value": "default:hiql:flat",
    **{f"OGBench {maze}, HIQL": f"ogbench:{maze}" for maze in (
        "medium-navigate", "large-navigate", "giant-navigate", "medium-stitch", "large-stitch")},
    "U-maze, goal (0, 8): hiro": "hiro:hiro",
    "U-maze, goal (0, 8): no correction": "hiro:hiro, no correction",
    "U-maze, goal (0, 8): TD3 alone": "hiro:td3, no hierarchy"}
PUBLISHED_SETTINGS = {"ogbench:large-navigate": "ogbench_agents:hiql, published settings"}


def headline():
    """The table of HEADLINE: success, its range over seeds, the success published by OGBench, the
    success of the published settings here, minutes. Rows without runs are left out."""
    lines = [["task", "success", "lowest to highest seed", "published", "published settings here",
              "minutes"]]
    lines += [[task, *_headline_cells(reference)] for task, reference in HEADLINE.items()
              if runs_of(reference)]
    shown = [*HEADLINE.values(), *PUBLISHED_SETTINGS.values()]
    files = ", ".join(dict.fromkeys(f"`results/{parts_of(x)[0]}.csv`" for x in shown))
    return "\n".join([*_markdown(lines), "", "Success: interquartile mean over seeds [95 % "
                      f"interval]; from {files}, by `{PROGRAM} report`."])


def _headline_cells(reference):
    name, row, _ = parts_of(reference)
    experiment, runs = read_experiments()[name], runs_of(reference)
    published = re.search(r"\bHIQL (\d+)", experiment.published.get(row, ""))       # in %
    published = f"{int(published[1]) / 100:.2f}" if published else "-"
    settings = runs_of(PUBLISHED_SETTINGS.get(reference, "none"))
    settings = estimate(_array(settings, "success")[:, 0]) if settings else "-"
    x, seeds = _array(runs, "success")[:, 0], _seeds(runs, len(experiment.seeds[row]))
    return (estimate(x), f"{min(x):.2f} to {max(x):.2f} ({seeds} seeds)", published, settings,
            _minutes(runs))


# --------------------------------------------------------------------------- report


def report(text, file="README.md"):
    """The text with everything between its marks renewed from results/.

    Marks are lines of their own: `<!-- table NAME -->`, `<!-- compare NAME:ROW - NAME:ROW -->` or
    `<!-- headline -->`, and `<!-- end -->`. ValueError, with the name of the file: a mark without
    its end or an end without its mark, or one that names no experiment or row.
    """
    new, done, begun = [], 0, None
    for mark in re.finditer(r"^<!-- (table|compare|headline|end)\b *(.*?) *-->$", text, re.M):
        if begun and mark[1] != "end":
            raise ValueError(f"{file}: {begun[0]} has no <!-- end --> before {mark[0]}")
        if not begun and mark[1] == "end":
            raise ValueError(f"{file}: an <!-- end --> has no mark before it"
                             f" (line {text.count(chr(10), 0, mark.start()) + 1})")
        if begun:
            new += [text[done:begun.end()], "\n", _renewed(*begun.groups(), file), "\n"]
            done = mark.start()
        begun = None if begun else mark
    if begun:
        raise ValueError(f"{file}: {begun[0]} has no <!-- end --> before the end of the file")
    return "".join(new) + text[done:]


def _renewed(kind, what, file):
    """The text that belongs after a mark `<!-- kind what -->`."""
    if kind == "headline":
        return headline()
    if kind == "table":
        if what not in read_experiments():
            raise ValueError(f"{file} wants a table of {what}, which is no experiment")
        return table(what)
    references, known = what.split(" - "), read_experiments()
    if len(references) != 2 or not all(is_row(x, known) for x in references):
        raise ValueError(f"{file} wants a comparison of {what}, which is no NAME:ROW - NAME:ROW of "
                         "experiments.ini")
    try:
        lines = [f"{PROGRAM} compare {shlex.join(references)}", *compare(*references)]
    except ValueError as e:
        lines = [str(e)]                                # a row without runs
    return "\n".join(f"    {line}" for line in lines)


def renew():
    """Renew README.md, every docs/*.md and the pictures; nothing is written if a mark is wrong.

    A picture is drawn if its file is missing or its table has changed, since another version of
    matplotlib would draw every file a little differently."""
    texts = {}
    for path in [os.path.join(HERE, "README.md"),
                 *sorted(glob.glob(os.path.join(glob.escape(HERE), "docs", "*.md")))]:
        with open(path) as file:
            old = file.read()
        texts[path] = old, report(old, os.path.relpath(path, HERE))
    for name, experiment in read_experiments().items():
        drawn = os.path.exists(os.path.join(HERE, "pictures", f"{name}.png"))
        same = drawn and any(table(name) in old for old, _ in texts.values())
        if experiment.picture and recorded(name)[0] and not same:
            draw_experiment(name)
            print(f"drew pictures/{name}.png")
    for path, (old, new) in texts.items():
        if new != old:
            write(path, new)
            print(f"renewed the tables of {os.path.relpath(path, HERE)}")
    if all(old == new for old, new in texts.values()):
        print("every table is up to date")


# --------------------------------------------------------------------------- pictures


def draw_experiment(name):
    """Draw the columns `picture` of an experiment, every seed: pictures/<name>.png.

    A column of lists (over training, or over the distance to the goal) has a panel for each row: a
    thin line for each seed under their mean. A column of numbers has one panel: for each row the
    seeds as dots, and below them their interquartile mean and its interval.
    """
    rows, shown = shown_rows(name), []                  # a panel: (column, {row: (seeds, length)})
    for column in read_experiments()[name].picture:
        runs = {row: _array(seeds, column) for row, (seeds, _) in rows.items()}
        runs = {row: x for row, x in runs.items() if len(x)}
        single = all(x.shape[1] == 1 for x in runs.values())
        if single and runs:
            shown.append((column, runs))
        else:
            shown += [(column, {row: x}) for row, x in runs.items()]
    size = 3.2 * len(shown), max(2.8, 0.35 * max(len(runs) for _, runs in shown))
    figure, axes = panels(1, len(shown), size)
    curves = [x for _, runs in shown for x in runs.values() if x.shape[1] > 1]
    top = max((np.nanmax(x) for x in curves), default=0)
    for ax, (column, runs) in zip(axes[0], shown):
        label = column.removesuffix("_curve").replace("_", " ")
        (row, x), *_ = runs.items()
        if x.shape[1] == 1:
            _draw_dots(ax, runs, label)
            continue
        steps = _array(rows[row][0], "env_steps")[0, 0] if column.endswith("_curve") else None
        _draw_curves(ax, x, steps)
        ax.set_title(f"{row} ({len(x)} seeds)", fontsize=9)
        ax.set_ylabel(label)
        if top <= 1:                                    # shares: all on one scale
            ax.set_ylim(-0.05 * top, 1.05 * top)
    save_figure(figure, os.path.join(HERE, "pictures", f"{name}.png"))


def _draw_dots(ax, runs, label):
    """runs {row: array (seeds, 1)}: a line of dots for each row, the first one on top."""
    for i, x in enumerate(runs.values()):
        mean, low, high = interval(x[:, 0])
        ax.plot(x[:, 0], np.full(len(x), -i), "C0o", ms=4, alpha=0.4)
        ax.errorbar(mean, -i - 0.25, xerr=[[mean - low], [high - mean]], fmt="C1|", capsize=3)
    names = [f"{row} ({len(x)})".replace("`", "") for row, x in runs.items()]
    ax.set_yticks(-np.arange(len(runs)), names, fontsize=7)
    top = max(1, *(np.nanmax(x) for x in runs.values()))
    ax.set(xlabel=label, xlim=(-0.05 * top, 1.05 * top), ylim=(0.4 - len(runs), 0.4))


def _draw_curves(ax, y, steps):
    """y (seeds, length): a thin line for each seed under their mean.

    The horizontal axis is a training of so many steps, or, if steps is None, the distance to the
    goal, from 1.
    """
    x = np.arange(1, y.shape[1] + 1) * (steps / y.shape[1] if steps else 1)
    ax.plot(x, y.T, "C0", lw=0.6, alpha=0.5)
    ax.plot(x, y.mean(0), "C1", lw=2)
    ax.set_xlabel("steps" if steps else "distance to the goal")


# --------------------------------------------------------------------------- the program


def list_experiments():
    """Print every experiment with its cost, its runs in results/ and its title."""
    hours = 0.0
    for name, experiment in read_experiments().items():
        minutes, done, planned = cost(name)
        hours += 0 if name.startswith("ogbench") else minutes / 60
        print(f"{name}: {f'{minutes:.0f} core-minutes' if done else 'cost not known yet'}, "
              f"{done} of {planned} runs in results/\n    {experiment.title}")
    print(f"All but OGBench's, as far as known: {hours:.1f} core-hours")


def _parser(names):
    p = Parser(prog=PROGRAM, description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--list", action="store_true", help="every experiment, and what it costs")
    commands = p.add_subparsers(dest="command")
    run = commands.add_parser("run", help="run what is missing of an experiment")
    run.add_argument("name", choices=names)
    run.add_argument("--jobs", type=int, help="processes at once (default 2, with --seed 1)")
    run.add_argument("--seed", type=int, help="this seed alone; wants --out")
    run.add_argument("--out", metavar="DIR", type=filled, help="where --seed writes NAME_seedN.csv")
    renewal = commands.add_parser("report", help="renew the tables and pictures from results/")
    renewal.add_argument("--gather", metavar="DIR", help="add what `run --seed --out DIR` wrote")
    two = commands.add_parser("compare", help="the difference of two rows, with its interval")
    for which in ("one", "other"):
        two.add_argument(which, metavar="NAME:ROW[:PART]")
    return p


def main():
    """Run the command in sys.argv. `run` exits with 1 if a run failed; bad input exits with 2."""
    with one_line_errors():
        p = _parser(list(read_experiments()))
        given = p.parse_args()
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
            jobs = given.jobs
            if jobs is None:
                jobs = 2 if given.seed is None else 1
            if jobs < 1:
                p.error(f"--jobs must be at least 1, not {jobs}")
            if run_experiment(given.name, jobs, given.seed, given.out):
                sys.exit(1)
        else:
            p.error("say run NAME, report, compare NAME:ROW NAME:ROW, or --list")


if __name__ == "__main__":
    main()
