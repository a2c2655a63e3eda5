"""What tests of the laboratory share: small problems, small data, a project to write to."""

import nets                             # first: it sets one BLAS thread before numpy loads

import sys

import numpy as np
import pytest

import envs
import hiql
from lab import experiments, tables
from nets import tree_map
from support.runs import generators


def toy(config, env, init_params):
    """A small float64 problem: parameters (perturbed, target differs), a batch with a success."""
    rng = np.random.default_rng(0)
    data = envs.collect(env, rng, episodes=3, rows=30)
    params = init_params(config, env, data, generators(0, "init", "flat"))
    params = tree_map(lambda w: w + 0.2 * rng.normal(size=w.shape), params)
    batch = hiql.sample(data, data.valid, rng, config, env)
    batch = {k: x.astype(float) if x.dtype == np.float32 else x for k, x in batch.items()}
    batch["masks"][0] = batch["rewards"][0] = 0
    return params, batch


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
    experiments.read_experiments.cache_clear()          # the test writes lab/experiments.ini first
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
