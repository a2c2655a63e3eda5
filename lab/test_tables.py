"""Tests of lab/tables.py, and of what it has written into README.md and docs/."""

import nets                             # first: it sets one BLAS thread before numpy loads

import re

import pytest

from lab import tables
from lab.experiments import read_experiments, record
from lab.test_readme import TEXTS


def test_a_report_on_what_is_committed_changes_nothing():
    for path, text in TEXTS.items():
        assert tables.report(text) == text, f"{path}: run python -m lab.tables report"
    shown = re.findall(r"^<!-- table (.+?) -->$", "\n".join(TEXTS.values()), re.M)
    assert set(shown) == set(read_experiments())


def test_interquartile_mean_and_interval():
    """Of eight seeds the two lowest and highest do not count. Of eleven two failed: a resample
    has five failed ones or more with probability 0.035, six with 0.007. So the 95 % interval begins
    where five of eleven fail, of whom two are cut, and 4 of 7 are left at 1. Of four, one failed,
    three fail or more with probability 0.05."""
    mean, low, high = tables.interval([9, 1, 0, 1, 5, 1, 1, 0])
    assert mean == 1 and low < 1 < high
    assert tables.interval([0, 0, *[1] * 9]) == (1, pytest.approx(4 / 7), 1)
    assert tables.interval([1, 1, 1, 1], [0, 1, 1, 1]) == (0, 0, 1)     # one less other
    assert tables.estimate([0, 1, 1, 1]) == "1 [0, 1]"
    assert tables.estimate([0.2, 0, 1]) == "0.4 (0 to 1)"               # of few: mean and range
    assert tables.estimate([0.12345]) == "0.123"


def test_tables_comparisons_and_pictures_are_renewed(project, program):
    """An agent that was trained beside a row is in both; then nothing is left to renew."""
    (project / "lab" / "experiments.ini").write_text(
        "[a]\ntitle = T\nseeds = 0-1\ncolumns = success tasks_per_task\nbeside = a:x:flat\n"
        "picture = success x_curve\nx = hiql.py\n")
    record("a", [{"row": "x", "seed": seed, "train_seconds": 60, "success": 1 - seed,
                  "flat_success": seed, "tasks_per_task": [1, seed], "env_steps": 40,
                  "x_curve": [seed, 1], "commit": "c"} for seed in (1, 0)], {})
    page = project / "docs" / "page.md"
    page.write_text("a\n<!-- table a -->\nold\n<!-- end -->\nb `<!-- end -->`\n"
                    "<!-- compare a:x - a:x:flat -->\nold\nold\n<!-- end -->\nc\n")
    assert program("report") == 0 and (project / "pictures" / "a.png").exists()
    new = page.read_text()
    assert new.startswith(f"a\n<!-- table a -->\n{tables.table('a')}\n<!-- end -->\nb `<!-- end")
    assert "| row | success | tasks per task: mean | success, each seed | seeds | minutes |" in new
    assert "| flat | 0.5 (0 to 1) |  | 0.00 1.00 | 2 | 1.0 |" in new
    assert "| x | 0.5 (0 to 1) | 1.00 0.50 | 1.00 0.00 | 2 | 1.0 |" in new
    assert "0.500 (2 seeds) - 0.500 (2 seeds) = +0.000 [-1.000, +1.000]\n<!-- end -->\nc\n" in new
    assert program("report") == program("--list") == 0 and page.read_text() == new


def test_hiro_is_judged_by_solved_seeds(write_ini, write_results):
    """Where there is a first success: their number; Fisher's p, of 3 of 6 against 6 of 6 twice
    C(6, 3) / C(12, 9) = 2 / 11; and of ranks (nine share 5, the three that never had one 11): U is
    27, z = (27 - 18 - 0.5) / sqrt(22.1)."""
    write_ini("[h]\ntitle = T\nseeds = 0-5\ncolumns = success first_success\nx = a\ny = b\n")
    write_results("h", [{"row": row, "seed": seed, "train_seconds": 60, "commit": "c",
                         "success": 0.95 if seed < solved else 0.94,
                         "first_success": 10 if seed < solved else ""}
                        for row, solved in (("x", 3), ("y", 6)) for seed in range(6)])
    assert "| x | 3 of 6 seeds | 10 (10 to 10) (3 of 6 seeds) |" in tables.table("h")
    solved, first = tables.compare("h:x", "h:y")
    assert solved == "solved: 3 of 6 seeds - 6 of 6 seeds (Fisher, two-sided): p = 0.18"
    assert first == "first success, by ranks, never last (Mann-Whitney): p = 0.071"
