"""What tests of the laboratory share: a project to write to, the program of its tables, small data.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import sys

import pytest

import envs
from lab import experiments, tables


@pytest.fixture
def small_data(monkeypatch):
    """Data sets of 20 trajectories."""
    plain = envs.collect
    monkeypatch.setattr(envs, "collect", lambda env, rng, **recipe: plain(
        env, rng, **{**recipe, "episodes": 20}))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of its own, whose results and documents are read and written; also the folder that
    the test runs in."""
    for folder in ("lab", "results", "pictures", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "README.md").write_text("")
    monkeypatch.setattr(experiments, "HERE", str(tmp_path))
    monkeypatch.setattr(tables, "HERE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    experiments.read_experiments.cache_clear()


@pytest.fixture
def write_ini(project):
    """write_ini(text) writes the project's lab/experiments.ini."""
    def write(text):
        experiments.read_experiments.cache_clear()
        (project / "lab" / "experiments.ini").write_text(text)

    return write


@pytest.fixture
def write_results(project):
    """write_results(name, rows) writes results/<name>.csv, without configurations."""
    return lambda name, rows: experiments.record(name, rows, {})


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
