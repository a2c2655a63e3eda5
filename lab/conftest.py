"""What tests of the laboratory share: a project to write to, small data sets."""

import nets                             # first: it sets one BLAS thread before numpy loads

import sys

import pytest

from lab import experiments, tables
from support.test_run import small_data         # noqa: F401, a fixture


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of its own, which both modules read and write: empty but for its folders."""
    for folder in ("lab", "results", "pictures", "docs"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(experiments, "HERE", str(tmp_path))
    monkeypatch.setattr(tables, "HERE", str(tmp_path))
    return tmp_path


@pytest.fixture
def write_ini(project):
    """write_ini(text) writes the project's lab/experiments.ini."""
    return (project / "lab" / "experiments.ini").write_text


@pytest.fixture
def program(monkeypatch):
    """program(*words): exit code of `python -m lab.tables WORDS`, 0 if it does not exit."""
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tables.py", *words])
        try:
            tables.main()
        except SystemExit as stop:
            return stop.code
        return 0

    return run
