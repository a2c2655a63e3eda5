"""Tests of lab/record.py: what it says without OGBench. With it, it compares by itself."""

import nets                             # first: it sets one BLAS thread before numpy loads

import sys

import pytest

from lab import record


@pytest.mark.parametrize("words, told", [
    ((), "the following arguments are required: DIR"), (("a", "b"), "unrecognized arguments: b"),
    (("nowhere",), "data/README.md says what to install and to unpack")])
def test_what_is_missing_is_told(words, told, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax", None)           # as if it were not installed
    monkeypatch.setattr(sys, "argv", ["record.py", *words])
    with pytest.raises(SystemExit) as stop:
        record.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and told in said and said.count("\n") == 1
