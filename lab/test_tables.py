"""Tests of lab/tables.py, and of what it has written into README.md and docs/."""

import nets                             # first: it sets one BLAS thread before numpy loads

import glob
import os
import pkgutil
import re

import pytest

from lab import tables
from lab.experiments import read_experiments
from support.files import write_rows
from support.flags import seed_range
from support.run import HERE


def documents():
    """{path from the top folder: text} of README.md and docs/*.md."""
    paths = [os.path.join(HERE, "README.md"), *glob.glob(os.path.join(HERE, "docs", "*.md"))]
    found = {}
    for path in paths:
        with open(path) as file:
            found[os.path.relpath(path, HERE)] = file.read()
    return found


# ------------------------------------------------------------------------- what is committed


def test_tables_of_the_documents_are_those_of_the_results():
    texts = documents()
    for path, text in texts.items():
        assert tables.report(text, path) == text, f"{path}: run python -m lab.tables report"
    shown = re.findall(r"^<!-- table (.+?) -->$", "\n".join(texts.values()), re.M)
    assert set(shown) == set(read_experiments())
    assert "\n<!-- headline -->\n" in texts["README.md"]


def test_the_documents_name_what_exists():
    """Functions, tests, deviations, files and pictures."""
    code = {}
    for pattern in ("*.py", "lab/*.py", "support/*.py"):
        for path in glob.glob(os.path.join(HERE, pattern)):
            with open(path) as file:
                code[os.path.relpath(path, HERE)] = file.read()
    tests = {name for path, text in code.items() if os.path.basename(path).startswith("test_")
             for name in [*re.findall(r"^def (test_\w+)", text, re.M),
                          os.path.basename(path).removesuffix(".py")]}
    for path, text in documents().items():
        for name in re.findall(r"`((?:hiql|hiro|envs|nets|lab|support)\.[\w.]*\w)[`(]", text):
            assert name in code or pkgutil.resolve_name(name), (path, name)
        for name in re.findall(r"`(test_\w+)`", text):
            assert name in tests, (path, name)
        for tag in re.findall(r"\b[DE]\d+\b", text):
            assert any(re.search(rf"^[ #]*{tag} ", x, re.M) for x in code.values()), (path, tag)
        for name in re.findall(r"`((?:lab|support|docs|results|pictures|data)/[\w.-]+)`", text):
            assert "NAME" in name or os.path.exists(os.path.join(HERE, name)), (path, name)
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
        for link in re.findall(r"\]\(([^)#\s]+)", prose):
            assert re.match(r"https?:", link) or os.path.exists(
                os.path.join(HERE, os.path.dirname(path), link)), (path, link)


def test_headline_has_ten_lines_of_committed_rows():
    lines = tables.headline().split("\n")
    assert len(lines[2:-2]) == 10 and "not run yet" not in "\n".join(lines)
    assert [re.match(r"\| (default|OGBench [\w-]+|U-maze, goal \(0, 8\): \w+)", line)[1]
            for line in lines[2:-2]] == [
        "default", "default", "OGBench medium-navigate", "OGBench large-navigate",
        "OGBench giant-navigate", "OGBench medium-stitch", "OGBench large-stitch",
        "U-maze, goal (0, 8): hiro", "U-maze, goal (0, 8): no", "U-maze, goal (0, 8): TD3"]
    large = next(line for line in lines if "large-navigate" in line).split(" | ")
    assert large[3] == "0.58" and large[4] == tables.estimate(
        [float(r["success"]) for r in tables.runs_of("ogbench_agents:hiql, published settings")])


# ------------------------------------------------------------------------- statistics


def test_interquartile_mean_and_interval():
    mean, low, high = tables.interval([0, 1, 1, 1, 1, 1, 1, 9])
    assert mean == 1 and 0 < low < 1 and 1 < high < 4
    assert tables.interval([0.5] * 6) == (0.5, 0.5, 0.5)
    mean, low, high = tables.interval([0, 0, *[1] * 8])             # two of ten seeds failed
    assert mean == high == 1 and 0.4 < low < 0.7
    assert seed_range("3") == [3] and seed_range("0-2,7") == [0, 1, 2, 7]


def test_difference_of_two_experiments(project, write_ini):
    write_ini("".join(
        f"[{name}]\ntitle = T\nseeds = 0-3\ncolumns = success per_task peak_mb\n"
        f"x = hiql.py\n{more}" for name, more in (("a", "only = hiql.py\n"), ("b", ""))))
    for name, scores in (("a", (0.9, 0.7, 0.8, 1.0)), ("b", (0.5, 0.6, 0.6, 0.7))):
        write_rows(project / "results" / f"{name}.csv", [
            {"row": "x", "seed": i, "success": x, "per_task": [x, x], "flat_success": x / 2,
             "peak_mb": 250 + i, "train_seconds": 60} for i, x in enumerate(scores)])
    (line,) = tables.compare("a:x", "b:x")
    assert line.startswith("success: 0.850 (4 seeds) - 0.600 (4 seeds) = +0.250 [+0.1")
    low, high = map(float, re.search(r"\[(.*), (.*)\]", line).groups())
    assert 0.1 <= low < 0.2 and 0.3 < high <= 0.45
    assert "= +0.000 [-" in tables.compare("a:x", "a:x")[0]
    (line,) = tables.compare("a:x", "a:x:flat")
    assert "0.850 (4 seeds) - 0.425 (4 seeds) = +0.425 [" in line
    write_rows(project / "results" / "b.csv", [
        {"row": "x", "seed": 0, "success": 0.5, "train_seconds": 60}])
    assert tables.compare("a:x", "b:x") == [
        "success: 0.850 (4 seeds) - 0.500 (1 seeds) = +0.350, one seed alone: no interval"]
    for wrong in ("a:x:flatter", "a:only", "a", "c:x"):
        with pytest.raises(ValueError, match=f"{wrong}: no such row in results/"):
            tables.compare(wrong, "a:x")
        with pytest.raises(ValueError, match=f"{wrong}: no such row in results/"):
            tables.compare("a:x", wrong)


# ------------------------------------------------------------------------- tables and pictures


def test_table_by_hand(project, write_ini):
    """Interquartile mean, missing seeds, a mean for each task, plain mean and published value."""
    write_ini("[a]\ntitle = T\nseeds = 0-3\ncolumns = success success_per_task first\n"
              "x = hiql.py\ny = hiql.py --env z\ny seeds = 0-2\nx published = 0.79\n"
              "no: ne = hiql.py\ncommit = 0123abc\n")
    assert read_experiments()["a"].rows == {
        "x": "hiql.py", "y": "hiql.py --env z", "no: ne": "hiql.py"}
    rows = [("x", 1, 60, 0.5, [1, 0], ""), ("x", 0, 60, 0.25, [0.5, 0], 30),
            ("x", 2, 60, 0.75, [1, 0.5], ""), ("x", 3, 180, 0.9, [0.9, 0.9], 10),
            ("y", 0, 6, 0.5, [1, 1], ""), ("y", 1, 6, 1, [1, 1], "")]
    write_rows(project / "results" / "a.csv", [
        dict(zip(("row", "seed", "train_seconds", "success", "success_per_task", "first"), r))
        for r in rows])
    lines = tables.table("a").split("\n")
    assert lines[2] == ("| row | success | success per task: mean | first | success, each seed "
                        "| seeds | minutes | mean | published |")
    low, high = tables.interval([0.25, 0.5, 0.75, 0.9])[1:]
    assert 0.25 <= low < 0.5 and 0.75 < high <= 0.9
    assert lines[4] == (f"| x | 0.625 [{low:.3g}, {high:.3g}] | 0.85 0.35 | 20 (10 to 30) (2 of "
                        "4 seeds) | 0.25 0.50 0.75 0.90 | 4 | 1.5 | 0.600 | 0.79 |")
    assert lines[5] == ("| y | 0.75 (0.5 to 1) | 1.00 1.00 |  | 0.50 1.00 | 2 of 3 | 0.1 | 0.750 "
                        "|  |")
    assert lines[6:] == ["", "Seeds 0 1 2 3; `results/a.csv`, by `python -m lab.tables run a`, "
                         "rows recorded by commit 0123abc."]
    with open(project / "lab" / "experiments.ini", "a") as file:
        file.write("[b]\ntitle = T\nseeds = 5\ncolumns = success\nbeside = a:y b:x:flat\n"
                   "x = hiql.py\n")
    write_rows(project / "results" / "b.csv", [
        {"row": "x", "seed": 5, "train_seconds": 0, "success": 0, "flat_success": 0.5}])
    assert tables.table("b").split("\n")[4:] == [
        "| y (`a`) | 0.75 (0.5 to 1) | 0.50 1.00 | 2 of 3 | 0.1 |",
        "| flat | 0.5 | 0.50 | 1 | 0.0 |", "| x | 0 | 0.00 | 1 | 0.0 |", "",
        "Seeds 5; `results/b.csv`, by `python -m lab.tables run b`."]
    with open(project / "lab" / "experiments.ini", "a") as file:        # one row: a line for each
        file.write("[c]\ntitle = T\nseeds = 5\ncolumns = a b c d e\nx = hiql.py\n")     # column
    assert tables.table("c") == "T: not run yet."
    write_rows(project / "results" / "c.csv", [
        {"row": "x", "seed": 5, "train_seconds": 60, **dict(zip("abcde", range(5)))}])
    assert tables.table("c").split("\n")[2:-2] == [
        "| row | x |", "| --- | --- |", *(f"| {c} | {i} |" for i, c in enumerate(
            "abcde")), "| a, each seed | 0.00 |", "| seeds | 1 |", "| minutes | 1.0 |"]
    (project / "results" / "c.csv").write_text("row,seed,a\nx,5\n")
    with pytest.raises(ValueError, match="line 2 has not as many cells"):
        tables.table("c")


def test_headline_by_hand(project, write_ini, monkeypatch):
    """Published numbers from experiments.ini, all others from results/."""
    write_ini("[a]\ntitle = T\nseeds = 0-2\ncolumns = success\np = hiql.py\nq = hiql.py\n"
              "no = hiql.py\np published = GCBC 9, HIQL 79, QRL 82\nq published = QRL 5\n"
              "[b]\ntitle = T\nseeds = 0\ncolumns = success\nr = hiql.py\n")
    write_rows(project / "results" / "a.csv", [
        {"row": row, "seed": seed, "train_seconds": 90, "success": x, "flat_success": x / 2}
        for row, seed, x in (("p", 0, 1), ("p", 1, 0.25), ("p", 2, 0.4), ("q", 0, 0))])
    write_rows(project / "results" / "b.csv", [
        {"row": "r", "seed": 0, "train_seconds": 600, "success": 0.75}])
    monkeypatch.setattr(tables, "HEADLINE", {
        "P": "a:p", "flat": "a:p:flat", "none": "a:no", "Q": "a:q", "R": "b:r"})
    monkeypatch.setattr(tables, "PUBLISHED_SETTINGS", {"a:p": "b:r"})
    assert tables.headline().split("\n") == [
        "| task | success | lowest to highest seed | published | published settings here "
        "| minutes |", "| --- | --- | --- | --- | --- | --- |",
        "| P | 0.55 (0.25 to 1) | 0.25 to 1.00 (3 seeds) | 0.79 | 0.75 | 1.5 |",
        "| flat | 0.275 (0.125 to 0.5) | 0.12 to 0.50 (3 seeds) | 0.79 | - | 1.5 |",
        "| none | not run yet | - | - | - | - |",
        "| Q | 0 | 0.00 to 0.00 (1 of 3 seeds) | - | - | 1.5 |",
        "| R | 0.75 | 0.75 to 0.75 (1 seeds) | - | - | 10.0 |", "",
        "Success: interquartile mean over seeds [95 % interval]; from `results/a.csv`, "
        "`results/b.csv`, by `python -m lab.tables report`."]


def test_report_renews_what_stands_between_its_marks(project, write_ini, monkeypatch):
    write_ini("[x]\ntitle = T\nseeds = 0\ncolumns = c\np, q = hiql.py\n"
              "[y]\ntitle = T\nseeds = 0\ncolumns = c\np = hiql.py\n")
    monkeypatch.setattr(tables, "table", lambda name: f"the table of {name}")
    monkeypatch.setattr(tables, "headline", lambda: "the first table")
    monkeypatch.setattr(tables, "compare", lambda one, other: [f"{one} less {other}"])
    old = ("a\n<!-- table x -->\nold\n<!-- end -->\nb `<!-- end -->`\n<!-- headline -->\n"
           "<!-- end -->\n<!-- compare x:p, q - y:p:flat -->\nold\nold\n<!-- end -->\nc\n")
    assert tables.report(old) == (
        "a\n<!-- table x -->\nthe table of x\n<!-- end -->\nb `<!-- end -->`\n<!-- headline -->\n"
        "the first table\n<!-- end -->\n<!-- compare x:p, q - y:p:flat -->\n"
        "    python -m lab.tables compare 'x:p, q' y:p:flat\n"
        "    x:p, q less y:p:flat\n<!-- end -->\nc\n")
    for wrong in ("x:p, q", "x:p - y:p", "x:p, q - y:p - y:p", "x:p, q - z:p"):
        with pytest.raises(ValueError, match=f"README.md wants a comparison of {wrong}, which is"):
            tables.report(f"<!-- compare {wrong} -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="README.md wants a table of z, which is no experiment"):
        tables.report("<!-- table z -->\n<!-- end -->")


def test_a_comparison_that_lacks_its_runs_says_so(project, write_ini):
    write_ini("[x]\ntitle = T\nseeds = 0\ncolumns = c\np = hiql.py\nq = hiql.py\n")
    lines = tables.report("<!-- compare x:p - x:q -->\n<!-- end -->").split("\n")
    assert len(lines) == 3 and lines[1].startswith("    x:p: no such row in results/;")


@pytest.mark.parametrize("text, words", [
    ("<!-- table x -->\nold\n", "<!-- table x --> has no <!-- end --> before the end of the file"),
    ("<!-- table x -->\nold\n<!-- headline -->\nold\n<!-- end -->\n",
     "<!-- table x --> has no <!-- end --> before <!-- headline -->"),
    ("<!-- headline -->\n  <!-- end -->\n", "<!-- headline --> has no <!-- end -->"),
    ("old\n<!-- end -->\n", "an <!-- end --> has no mark before it (line 2)"),
    ("<!-- table z -->\n<!-- end -->\n", "wants a table of z")])
def test_a_wrong_mark_is_refused_and_nothing_is_written(text, words, project, write_ini, program,
                                                        monkeypatch, capsys):
    write_ini("[x]\ntitle = T\nseeds = 0\ncolumns = success\npicture = success\n"
              "p = hiql.py\n")
    write_rows(project / "results" / "x.csv", [
        {"row": "p", "seed": 0, "train_seconds": 60, "success": 1}])
    monkeypatch.setattr(tables, "headline", lambda: "the first table")
    readme, page = project / "README.md", project / "docs" / "page.md"
    readme.write_text("<!-- headline -->\nold\n<!-- end -->\n")
    page.write_text(text)
    assert program("report") == 2
    said = capsys.readouterr().err
    assert os.path.join("docs", "page.md") in said and words in said and said.count("\n") == 1
    assert page.read_text() == text and "old" in readme.read_text()
    assert not os.listdir(project / "pictures")

    page.write_text("<!-- table x -->\nold\n<!-- end -->\n")
    assert program("report") == 0
    assert readme.read_text() == "<!-- headline -->\nthe first table\n<!-- end -->\n"
    assert page.read_text() == f"<!-- table x -->\n{tables.table('x')}\n<!-- end -->\n"
    assert os.listdir(project / "pictures") == ["x.png"]
    capsys.readouterr()
    assert program("report") == 0
    assert capsys.readouterr().out == "every table is up to date\n"


def test_picture_of_an_experiment(project, write_ini, monkeypatch):
    """A panel for each list that a row has, each seed a line under the mean, over its steps; one
    for a number, with the seeds of all rows, those beside it first, and their interval."""
    write_ini("[a]\ntitle = T\nseeds = 0-1\ncolumns = success\npicture = success x_curve y\n"
              "beside = 'b:r s'\np = hiro.py\nq = hiro.py\n"
              "[b]\ntitle = T\nseeds = 0\ncolumns = success\nr s = hiro.py\nt = hiro.py\n")
    write_rows(project / "results" / "b.csv", [
        {"row": "r s", "seed": 0, "success": 0.5}, {"row": "t", "seed": 0, "success": 1}])
    write_rows(project / "results" / "a.csv", [
        {"row": "p", "seed": 1, "success": 1, "env_steps": 40, "x_curve": [1, 1], "y": [5, 4, 3]},
        {"row": "p", "seed": 0, "success": 0, "env_steps": 40, "x_curve": [0, 1], "y": [3, 2, 1]},
        {"row": "q", "seed": 0, "env_steps": 40, "y": [1, 1, 1]}])
    drawn = {}
    monkeypatch.setattr(tables, "save_figure", lambda f, path: drawn.update({path: f}))
    tables.draw_experiment("a")
    ((path, figure),) = drawn.items()
    assert path == str(project / "pictures" / "a.png")
    lines = [[line.get_xydata().T.tolist() for line in ax.lines] for ax in figure.axes]
    dots = [line[:2] for line in lines.pop(0) if len(set(line[1])) == 1 and line[1][0] % 1 == 0]
    assert dots == [[[0.5], [0]], [[0, 1], [-1, -1]]]
    assert [x.get_text() for x in figure.axes[0].get_yticklabels()] == ["r s (b) (1)", "p (2)"]
    (_, high), (_, both) = (bar.get_segments()[0] for bar in figure.axes[0].collections)
    assert tuple(high) == (0.5, -0.25) and tuple(both) == (1, -1.25)
    assert lines == [[[[20, 40], [0, 1]], [[20, 40], [1, 1]], [[20, 40], [0.5, 1]]],
                     [[[1, 2, 3], [3, 2, 1]], [[1, 2, 3], [5, 4, 3]], [[1, 2, 3], [4, 3, 2]]],
                     [[[1, 2, 3], [1, 1, 1]]] * 2]
