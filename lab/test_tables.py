"""Tests of lab/tables.py, and of what it has written into README.md and docs/."""

import nets                             # first: it sets one BLAS thread before numpy loads

import glob
import os
import re

import pytest

from lab import tables
from lab.experiments import read_experiments
from support.runs import HERE, write_json, write_rows


def documents():
    """{path from the top folder: text} of README.md and docs/*.md."""
    paths = [os.path.join(HERE, "README.md"), *glob.glob(os.path.join(HERE, "docs", "*.md"))]
    found = {}
    for path in paths:
        with open(path) as file:
            found[os.path.relpath(path, HERE)] = file.read()
    return found


def test_a_report_on_what_is_committed_changes_nothing():
    texts = documents()
    for path, text in texts.items():
        assert tables.report(text, path) == text, f"{path}: run python -m lab.tables report"
    shown = re.findall(r"^<!-- table (.+?) -->$", "\n".join(texts.values()), re.M)
    assert set(shown) == set(read_experiments())
    headline = tables.headline().split("\n")
    assert "\n".join(headline) in texts["README.md"]
    assert len(headline) == 2 + len(tables.HEADLINE) + 2


def test_the_documents_name_files_that_exist():
    for path, text in documents().items():
        for name in re.findall(r"`((?:lab|support|docs|results|pictures|data)/[\w.-]+)`", text):
            assert "NAME" in name or os.path.exists(os.path.join(HERE, name)), (path, name)
        for link in re.findall(r"\]\(([^)#\s]+)", re.sub(r"`[^`\n]*`", "", text)):
            there = os.path.join(HERE, os.path.dirname(path), link)
            assert link.startswith("http") or os.path.exists(there), (path, link)


# ------------------------------------------------------------------------- statistics


def test_interquartile_mean_and_interval():
    """Of eight seeds the two lowest and highest do not count. Of eleven two failed: a resample
    has five failed ones or more with probability 0.035, six with 0.007. So the 95 % interval begins
    where five of eleven fail, of whom two are cut, and 4 of 7 are left at 1."""
    mean, low, high = tables.interval([9, 1, 0, 1, 5, 1, 1, 0])
    assert mean == 1 and low < 1 < high
    assert tables.interval([0.5]) == (0.5, 0.5, 0.5)
    assert tables.interval([0, 0, *[1] * 9]) == (1, pytest.approx(4 / 7), 1)


def test_estimate_of_few_and_of_many_seeds():
    """From four seeds on the interquartile mean; of four, one failed, three fail or more with
    probability 0.05, so that the interval begins at 0."""
    assert tables.estimate([0, 1, 1, 1]) == "1 [0, 1]"
    assert tables.estimate([0.2, 0, 1]) == "0.4 (0 to 1)"
    assert tables.estimate([1000.4, 20.04]) == "510 (20 to 1000)"
    assert tables.estimate([0.12345]) == "0.123"


def test_difference_of_two_rows(write_ini, write_results):
    """One less other, each its interquartile mean; the first one's columns with one number for
    each seed; an agent trained beside a row."""
    write_ini("".join(f"[{name}]\ntitle = T\nseeds = 0-3\ncolumns = {columns}\nx = hiql.py\n"
                      for name, columns in (("a", "success_rate per_task peak_mb steps"),
                                            ("b", "peak_mb success_rate"))))
    for name, scores in (("a", (1, 1, 1, 1)), ("b", (0, 1, 1, 1))):
        write_results(name, [
            {"row": "x", "seed": i, "success_rate": x, "per_task": [x, x], "peak_mb": 250 + i,
             "flat_success_rate": x / 2, "steps": 5, "train_seconds": 60}
            for i, x in enumerate(scores)])
    assert tables.compare("a:x", "b:x") == [
        "success rate: 1.000 (4 seeds) - 1.000 (4 seeds) = +0.000 [+0.000, +1.000]",
        "steps: 5.000 (4 seeds) - 5.000 (4 seeds) = +0.000 [+0.000, +0.000]"]
    assert tables.compare("b:x", "a:x:flat") == [
        "success rate: 1.000 (4 seeds) - 0.500 (4 seeds) = +0.500 [-0.500, +0.500]"]
    write_results("b", [{"row": "x", "seed": 0, "success_rate": ""},
                        {"row": "x", "seed": 1, "success_rate": 0.5}])
    assert tables.compare("a:x", "b:x") == [
        "success rate: 1.000 (4 seeds) - 0.500 (1 seeds) = +0.500, one seed alone: no interval"]


# ------------------------------------------------------------------------- tables and pictures


def test_table_by_hand(write_ini, write_results):
    """Interquartile mean, missing seeds, a mean for each task, plain mean and published value, a
    row of an earlier form, a row beside; one row alone is transposed."""
    write_ini("[a]\ntitle = T\nseeds = 0-3\ncolumns = success success_per_task first\n"
              "x = hiql.py\nx published = 0.79\ny = recorded: half the square\ny seeds = 0-2\n"
              "none = hiql.py\n"
              "[b]\ntitle = U\nseeds = 5\ncolumns = success\nbeside = a:y b:x:flat\nx = hiql.py\n"
              "[c]\ntitle = V\nseeds = 5\ncolumns = a b c d e\nx = hiql.py\n")
    rows = [("x", 1, 60, 1, [1, 0], "", "1234567"), ("x", 0, 60, 0, [0.5, 0], 30, "1234567"),
            ("x", 2, 60, 1, [1, 0.5], "", "<=abcdef0"), ("x", 3, 180, 1, [0.9, 0.9], 10, ""),
            ("y", 0, 6, 0.5, [1, 1], "", "1234567"), ("y", 1, 6, 1, "", "", "1234567")]
    names = "row", "seed", "train_seconds", "success", "success_per_task", "first", "commit"
    write_results("a", [dict(zip(names, row)) for row in rows])
    assert tables.table("a").split("\n") == [
        "T", "", "| row | success | success per task: mean | first | success, each seed | seeds "
        "| minutes | mean | published |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| x | 1 [0, 1] | 0.85 0.35 | 20 (10 to 30) (2 of 4 seeds) | 0.00 1.00 1.00 1.00 | 4 "
        "| 1.5 | 0.750 | 0.79 |",
        "| y (earlier form) | 0.75 (0.5 to 1) | 1.00 1.00 (1 of 2 seeds) |  | 0.50 1.00 | 2 of 3 "
        "| 0.1 | 0.750 |  |", "",
        "Seeds 0 1 2 3; `results/a.csv`, by `python -m lab.tables run a`, code of `1234567` "
        "(4 rows), `<=abcdef0` (1 rows), `unknown` (1 rows).",
        "Rows of an earlier form of the code are kept and not run any more. *y*: half the square."]
    write_results("b", [{"row": "x", "seed": 5, "train_seconds": 0, "success": 0,
                         "flat_success": 0.5, "commit": "1234567+"}])
    assert tables.table("b").split("\n")[4:] == [
        "| y (`a`) | 0.75 (0.5 to 1) | 0.50 1.00 | 2 of 3 | 0.1 |",
        "| flat | 0.5 | 0.50 | 1 | 0.0 |", "| x | 0 | 0.00 | 1 | 0.0 |", "",
        "Seeds 5; `results/b.csv`, by `python -m lab.tables run b`, code of `1234567+`."]
    assert tables.table("c") == "V: not run yet."
    write_results("c", [
        {"row": "x", "seed": 5, "train_seconds": 60, **dict(zip("abcde", "01234"))}])
    assert tables.table("c").split("\n")[2:-2] == [
        "| row | x |", "| --- | --- |", *(f"| {c} | {i} |" for i, c in enumerate("abcde")),
        "| a, each seed | 0.00 |", "| seeds | 1 |", "| minutes | 1.0 |"]


def test_headline_by_hand(write_ini, write_results, monkeypatch):
    """Published numbers from experiments.ini, all others from results/."""
    write_ini("[a]\ntitle = T\nseeds = 0-2\ncolumns = success\np = hiql.py\nq = hiql.py\n"
              "none = hiql.py\np published = GCBC 9, HIQL 79\nq published = QRL 5\n")
    write_results("a", [
        {"row": row, "seed": seed, "train_seconds": 90, "success": x, "flat_success": x / 2}
        for row, seed, x in (("p", 0, 1), ("p", 1, 0.25), ("p", 2, 0.4), ("q", 0, 0.75))])
    monkeypatch.setattr(tables, "HEADLINE", {
        "P": "a:p", "flat": "a:p:flat", "none": "a:none", "Q": "a:q"})
    monkeypatch.setattr(tables, "PUBLISHED_SETTINGS", {"a:p": "a:q"})
    assert tables.headline().split("\n")[2:-2] == [
        "| P | 0.55 (0.25 to 1) | 0.25 to 1.00 (3 seeds) | 0.79 | 0.75 | 1.5 |",
        "| flat | 0.275 (0.125 to 0.5) | 0.12 to 0.50 (3 seeds) | 0.79 | - | 1.5 |",
        "| Q | 0.75 | 0.75 to 0.75 (1 of 3 seeds) | - | - | 1.5 |"]


def test_report_renews_what_stands_between_its_marks(project, write_ini, program, capsys):
    """Tables, comparisons, pictures; once more, and nothing is left to renew; lines that were made
    elsewhere are added first."""
    write_ini("[x]\ntitle = T\nseeds = 0\ncolumns = success\npicture = success\np, q = hiql.py\n"
              "r = hiql.py\n")
    (project / "spread").mkdir()
    write_rows(project / "spread" / "x_seed0.csv", [
        {"row": "p, q", "seed": 0, "train_seconds": 60, "success": 1}])
    write_json(project / "spread" / "x_seed0.json", {"p, q": {}})
    page = project / "docs" / "page.md"
    page.write_text("a\n<!-- table x -->\nold\n<!-- end -->\nb `<!-- end -->`\n"
                    "<!-- compare x:p, q - x:p, q -->\nold\nold\n<!-- end -->\n"
                    "<!-- compare x:p, q - x:r -->\n<!-- end -->\nc\n")
    assert program("report", "--gather", "spread") == 0
    new = page.read_text()
    one, x = "1.000 (1 seeds)", "'x:p, q'"
    assert new == (
        f"a\n<!-- table x -->\n{tables.table('x')}\n<!-- end -->\nb `<!-- end -->`\n"
        f"<!-- compare x:p, q - x:p, q -->\n    python -m lab.tables compare {x} {x}\n"
        f"    success: {one} - {one} = +0.000, one seed alone: no interval\n<!-- end -->\n"
        "<!-- compare x:p, q - x:r -->\n    x:r: no such row in results/; rows are named NAME:ROW, "
        "such as hiro:hiro, or NAME:ROW:PART, such as default:hiql:flat\n<!-- end -->\nc\n")
    assert "| p, q | 1 | 1.00 | 1 | 1.0 |" in new and os.listdir("pictures") == ["x.png"]
    drawn = (project / "pictures" / "x.png").stat().st_mtime_ns
    capsys.readouterr()
    assert program("report") == 0
    assert capsys.readouterr().out == "every table is up to date\n" and page.read_text() == new
    assert (project / "pictures" / "x.png").stat().st_mtime_ns == drawn
    assert program("--list") == 0
    assert capsys.readouterr().out.startswith("x: 2 core-minutes, 1 of 2 runs in results/\n    T\n")


def test_picture_of_an_experiment(write_ini, write_results, monkeypatch):
    """A panel for each list that a row has, each seed a line under the mean, over its steps; one
    for a number, with the seeds of all rows, those beside it first, and their interval."""
    write_ini("[a]\ntitle = T\nseeds = 0-1\ncolumns = success\npicture = success x_curve\n"
              "beside = b:r\np = hiro.py\n"
              "[b]\ntitle = T\nseeds = 0\ncolumns = success\nr = hiro.py\n")
    write_results("b", [{"row": "r", "seed": 0, "success": 0.5}])
    write_results("a", [
        {"row": "p", "seed": 1, "success": 1, "env_steps": 40, "x_curve": [1, 1]},
        {"row": "p", "seed": 0, "success": 0, "env_steps": 40, "x_curve": [0, 1]}])
    drawn = {}
    monkeypatch.setattr(tables, "save_figure", lambda figure, path: drawn.update({path: figure}))
    tables.draw_experiment("a")
    ((path, figure),) = drawn.items()
    assert path.endswith(os.path.join("pictures", "a.png"))
    left, right = figure.axes
    dots = [line.get_xydata().tolist() for line in left.lines if line.get_linestyle() == "None"]
    assert [[0.5, 0]] in dots and [[0, -1], [1, -1]] in dots
    assert [x.get_text() for x in left.get_yticklabels()] == ["r (b) (1)", "p (2)"]
    bars = [bar.get_segments()[0].tolist() for bar in left.collections]
    assert bars[1] == [[0, -1.25], [1, -1.25]]
    assert [line.get_xydata().T.tolist() for line in right.lines] == [
        [[20, 40], [0, 1]], [[20, 40], [1, 1]], [[20, 40], [0.5, 1]]]
