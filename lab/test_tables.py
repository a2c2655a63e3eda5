"""Tests of lab/tables.py, and of what it has written into README.md and docs/."""

import nets                             # first: it sets one BLAS thread before numpy loads

import glob
import itertools
import os
import pkgutil
import re

import numpy as np
import pytest

from lab import tables
from lab.experiments import read_experiments
from support.files import read_rows, write_json, write_rows
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


def expanded(name):
    """Every name that one with {a,b} stands for, as in a shell."""
    parts = re.split(r"\{(.*?)\}", name)
    return ["".join(x) for x in itertools.product(*(
        part.split(",") if i % 2 else [part] for i, part in enumerate(parts)))]


def test_recorded_files_are_described():
    """data/README.md names every file there, and under it each key with its shape and dtype."""
    with open(os.path.join(HERE, "data", "README.md")) as file:
        sections = re.split(r"^## (\S+\.npz)$", file.read(), flags=re.M)
    told = dict(zip(sections[1::2], sections[2::2]))
    assert {*told, "README.md"} == set(os.listdir(os.path.join(HERE, "data")))
    for name, text in told.items():
        lines = re.findall(r"^\| `(\S+)` \| (\(.*?\)) \| (\w+) \|", text, re.M)
        described = [(key, shape, dtype) for keys, shape, dtype in lines for key in expanded(keys)]
        with np.load(os.path.join(HERE, "data", name)) as file:
            held = [(key, str(file[key].shape), str(file[key].dtype)) for key in file.files]
        assert sorted(described) == sorted(held)


def test_the_promised_python_is_that_of_the_requirements():
    with open(os.path.join(HERE, "requirements.txt")) as file:
        first, *packages = file.read().splitlines()
    oldest = re.fullmatch(r"# Python >= (\d+\.\d+)", first)[1]
    assert all(re.fullmatch(r"\w+>=[\d.]+", line) for line in packages)     # .ci/run reads both
    names = [re.match(r"\w+", line)[0] for line in packages]
    assert f"# {', '.join(names)}; Python {oldest} or later\n" in documents()["README.md"]


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
    """Of eight seeds the two lowest and highest do not count. Of eleven two failed: a resample
    has five failed ones or more with probability 0.035, six with 0.007. So the 95 % interval begins
    where five of eleven fail, of whom two are cut, and 4 of 7 are left at 1."""
    mean, low, high = tables.interval([9, 1, 0, 1, 5, 1, 1, 0])
    assert mean == 1 and low < 1 < high
    assert tables.interval([0.5] * 6) == (0.5, 0.5, 0.5)
    assert tables.interval([0.5]) == (0.5, 0.5, 0.5)
    assert tables.interval([0, 0, *[1] * 9]) == (1, pytest.approx(4 / 7), 1)


def test_estimate_of_few_and_of_many_seeds():
    """From four seeds on the interquartile mean; of four, one failed, three fail or more with
    probability 0.05, so that the interval begins at 0."""
    assert tables.estimate([0, 1, 1, 1]) == "1 [0, 1]"
    assert tables.estimate([0.2, 0, 1]) == "0.4 (0 to 1)"
    assert tables.estimate([1000.4, 20.04]) == "510 (20 to 1000)"
    assert tables.estimate([0.12345]) == "0.123" and tables.estimate([]) == ""


def test_difference_of_two_rows(project, write_ini):
    """One less other, each its interquartile mean; columns with one number for each seed alone."""
    write_ini("".join(
        f"[{name}]\ntitle = T\nseeds = 0-3\ncolumns = {columns}\nx = hiql.py\n{more}"
        for name, columns, more in (
            ("a", "success_rate per_task peak_mb steps", "only = hiql.py\n"),
            ("b", "peak_mb success_rate", ""))))
    for name, row, scores in (("a", "other", (9, 9, 9, 9)), ("a", "x", (1, 1, 1, 1)),
                              ("b", "x", (0, 1, 1, 1))):
        path = project / "results" / f"{name}.csv"
        write_rows(path, (read_rows(path) if path.exists() else []) + [
            {"row": row, "seed": i, "success_rate": x, "per_task": [x, x], "peak_mb": 250 + i,
             "flat_success_rate": x / 2, "steps": 5, "train_seconds": 60}
            for i, x in enumerate(scores)])
    assert tables.compare("a:x", "b:x") == [
        "success rate: 1.000 (4 seeds) - 1.000 (4 seeds) = +0.000 [+0.000, +1.000]",
        "steps: 5.000 (4 seeds) - 5.000 (4 seeds) = +0.000 [+0.000, +0.000]"]
    assert tables.compare("a:x", "a:x:flat") == [
        "success rate: 1.000 (4 seeds) - 0.500 (4 seeds) = +0.500 [+0.500, +0.500]"]
    assert tables.compare("b:x", "a:x") == [            # the first one's columns
        "success rate: 1.000 (4 seeds) - 1.000 (4 seeds) = +0.000 [-1.000, +0.000]"]
    write_rows(project / "results" / "b.csv", [
        {"row": "x", "seed": 0, "success_rate": "", "train_seconds": 60},
        {"row": "x", "seed": 1, "success_rate": 0.5, "train_seconds": 60}])
    assert tables.compare("a:x", "b:x") == [
        "success rate: 1.000 (4 seeds) - 0.500 (1 seeds) = +0.500, one seed alone: no interval"]
    for wrong in ("a:x:flatter", "a:x:flat:x", "a:only", "a", "c:x"):
        with pytest.raises(ValueError, match=f"{wrong}: no such row in results/"):
            tables.compare(wrong, "a:x")
        with pytest.raises(ValueError, match=f"{wrong}: no such row in results/"):
            tables.compare("a:x", wrong)


# ------------------------------------------------------------------------- tables and pictures


def test_table_by_hand(project, write_ini):
    """Interquartile mean, missing seeds, a mean for each task, plain mean and published value."""
    write_ini("[a]\ntitle = T\nseeds = 0-3\ncolumns = success success_per_task first\n"
              "x = hiql.py\ny = hiql.py --env z\ny seeds = 0-2\nx published = 0.79\n"
              "no: ne = hiql.py\n")
    rows = [("x", 1, 60, 1, [1, 0], "", "1234567"), ("x", 0, 60, 0, [0.5, 0], 30, "1234567"),
            ("x", 2, 60, 1, [1, 0.5], "", "<=abcdef0"), ("x", 3, 180, 1, [0.9, 0.9], 10, ""),
            ("y", 0, 6, 0.5, [1, 1], "", "1234567"), ("y", 1, 6, 1, "", "", "1234567")]
    write_rows(project / "results" / "a.csv", [
        dict(zip(("row", "seed", "train_seconds", "success", "success_per_task", "first",
                  "commit"), r)) for r in rows])
    lines = tables.table("a").split("\n")
    assert lines[2] == ("| row | success | success per task: mean | first | success, each seed "
                        "| seeds | minutes | mean | published |")
    assert lines[4] == ("| x | 1 [0, 1] | 0.85 0.35 | 20 (10 to 30) (2 of 4 seeds) | "
                        "0.00 1.00 1.00 1.00 | 4 | 1.5 | 0.750 | 0.79 |")
    assert lines[5] == ("| y | 0.75 (0.5 to 1) | 1.00 1.00 (1 of 2 seeds) |  | 0.50 1.00 | 2 of 3 "
                        "| 0.1 | 0.750 |  |")
    assert lines[6:] == ["", "Seeds 0 1 2 3; `results/a.csv`, by `python -m lab.tables run a`, "
                         "code of `1234567` (4 rows), `<=abcdef0` (1 rows), `unknown` (1 rows)."]
    with open(project / "lab" / "experiments.ini", "a") as file:        # one commit; rows beside
        file.write("[b]\ntitle = T\nseeds = 5\ncolumns = success\nbeside = a:y b:x:flat\n"
                   "x = hiql.py\n")
    write_rows(project / "results" / "b.csv", [
        {"row": "x", "seed": 5, "train_seconds": 0, "success": 0, "flat_success": 0.5,
         "commit": "1234567+"}])
    assert tables.table("b").split("\n")[4:] == [
        "| y (`a`) | 0.75 (0.5 to 1) | 0.50 1.00 | 2 of 3 | 0.1 |",
        "| flat | 0.5 | 0.50 | 1 | 0.0 |", "| x | 0 | 0.00 | 1 | 0.0 |", "",
        "Seeds 5; `results/b.csv`, by `python -m lab.tables run b`, code of `1234567+`."]
    with open(project / "lab" / "experiments.ini", "a") as file:        # one row: a line for each
        file.write("[c]\ntitle = T\nseeds = 5\ncolumns = a b c d e\nx = hiql.py\n")     # column
    assert tables.table("c") == "T: not run yet."
    write_rows(project / "results" / "c.csv", [
        {"row": "x", "seed": 5, "train_seconds": 60, **dict(zip("abcde", range(5)))}])
    assert tables.table("c").split("\n")[2:-2] == [
        "| row | x |", "| --- | --- |", *(f"| {c} | {i} |" for i, c in enumerate(
            "abcde")), "| a, each seed | 0.00 |", "| seeds | 1 |", "| minutes | 1.0 |"]
    assert tables.table("c").endswith("by `python -m lab.tables run c`.")


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
    assert figure.axes[0].get_xlim() == (-0.05, 1.05)
    assert lines == [[[[20, 40], [0, 1]], [[20, 40], [1, 1]], [[20, 40], [0.5, 1]]],
                     [[[1, 2, 3], [3, 2, 1]], [[1, 2, 3], [5, 4, 3]], [[1, 2, 3], [4, 3, 2]]],
                     [[[1, 2, 3], [1, 1, 1]]] * 2]


# ------------------------------------------------------------------------- the program


@pytest.mark.parametrize("rows, words", [
    ([("0", "60", "abc", "1")], "x, seed 0: success holds 'abc', which is no number"),
    ([("0", "60", "1", "1 1"), ("1", "60", "1", "1 1 1")],
     "x: per_task has not as many numbers in each seed"),
    ([("0", "60", "1", "1"), ("1", "", "1", "1")], "x: train_seconds is not one number in each"),
    ([("0", "60 60", "1", "1")], "x: train_seconds is not one number in each seed")])
def test_cells_that_cannot_be_shown_are_told(rows, words, project, write_ini, program, capsys):
    write_ini("[a]\ntitle = T\nseeds = 0-1\ncolumns = success per_task\nx = hiql.py\n")
    write_rows(project / "results" / "a.csv", [
        {"row": "x", **dict(zip(("seed", "train_seconds", "success", "per_task"), row))}
        for row in rows])
    (project / "README.md").write_text("<!-- table a -->\n<!-- end -->\n")
    assert program("report") == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_commands_of_the_program(project, write_ini, program, monkeypatch, capsys):
    write_ini("[a]\ntitle = T\nseeds = 0-1\ncolumns = success\nx = hiql.py\ny = hiql.py\n"
              "[ogbench_b]\ntitle = U\nseeds = 0\ncolumns = success\nx = hiql.py\n"
              "[c]\ntitle = V\nseeds = 0\ncolumns = success\nx = hiql.py\n")
    for name, row, seconds in (("a", "x", 3600), ("ogbench_b", "x", 7200)):
        write_rows(project / "results" / f"{name}.csv", [
            {"row": row, "seed": 0, "success": 1, "train_seconds": seconds}])
    assert program("--list") == 0
    assert capsys.readouterr().out == (
        "a: 240 core-minutes, 1 of 4 runs in results/\n    T\n"
        "ogbench_b: 120 core-minutes, 1 of 1 runs in results/\n    U\n"
        "c: cost not known yet, 0 of 1 runs in results/\n    V\n"
        "All but OGBench's, as far as known: 4.0 core-hours\n")
    assert program("compare", "a:x", "ogbench_b:x") == 0
    assert capsys.readouterr().out == ("success: 1.000 (1 seeds) - 1.000 (1 seeds) = +0.000, "
                                       "one seed alone: no interval\n")
    (project / "README.md").write_text("<!-- compare a:x - c:x -->\n<!-- end -->\n")
    spread = project / "spread"
    spread.mkdir()
    write_rows(spread / "c_seed0.csv", [{"row": "x", "seed": 0, "success": 0.5}])
    write_json(spread / "c_seed0.json", {"x": {}})
    assert program("report", "--gather", str(spread)) == 0
    assert capsys.readouterr().out == (f"1 new rows from {spread}\n"
                                       "renewed the tables of README.md\n")
    assert "1.000 (1 seeds) - 0.500 (1 seeds)" in (project / "README.md").read_text()
    for words, told in (((), "say run NAME, report, compare NAME:ROW NAME:ROW, or --list"),
                        (("run", "z"), "invalid choice 'z'"),
                        (("compare", "a:x", "z:x"), "z:x: no such row in results/"),
                        (("report", "--gather", "nowhere"), "nowhere")):
        assert program(*words) == 2
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1

    def no_memory():
        raise MemoryError

    monkeypatch.setattr(tables, "list_experiments", no_memory)
    assert program("--list") == 2
    assert capsys.readouterr().err.endswith("error: there is not enough memory\n")
