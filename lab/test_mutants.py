"""Tests of lab/mutants.py and of lab/wiring.json."""

import nets                             # first: it sets one BLAS thread before numpy loads

import ast
import json
import os
import re
import shutil
import subprocess

import pytest

from lab import mutants
from support.files import read_rows
from support.run import HERE

SOURCE = '''"""Doc."""
TOP = 1 + 1


def f(x, flag=True):
    """Of 3."""
    if x < 2 and not flag:
        raise ValueError(f"{x + 1}")
    x += 1
    print(x)
    return min(x, 0.5) if flag else (x ** 2).mean()


def draw(x):
    return x + 1
'''


def test_every_kind_of_change_by_hand():
    text, found = SOURCE.encode(), mutants.mutants(SOURCE)
    assert {inside for *_, inside in found} == {"f"}
    assert sorted((text[first:last].decode(), new) for first, last, new, _ in found) == sorted([
        ("True", "False"), ("x < 2 and not flag", "(not (x < 2 and (not flag)))"),
        ("x < 2 and not flag", "((x < 2) or (not flag))"), ("x < 2", "(x <= 2)"), ("2", "3"),
        ("not flag", "(flag)"), ("x += 1", "pass"), ("1", "2"), ("print(x)", "pass"),
        ("min(x, 0.5) if flag else (x ** 2).mean()",
         "((x ** 2).mean() if flag else min(x, 0.5))"), ("min", "max"), ("0.5", "0.6"),
        ("(x ** 2).mean", "(x ** 2).sum"), ("x ** 2", "((x) * (2))"), ("2", "3")])
    for first, last, new, _ in found:
        ast.parse(text[:first] + new.encode() + text[last:])


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository of one file and its test."""
    if not shutil.which("git"):
        pytest.skip("needs git")
    (tmp_path / "code.py").write_text("def f(x):\n    return x < 2\n")
    (tmp_path / "test_code.py").write_text(
        "from code import f\n\n\ndef test_f():\n    assert f(1)\n\n\ndef test_ends():\n"
        "    while not f(0):\n        pass\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.setattr(mutants, "HERE", str(tmp_path))
    return tmp_path


def test_broken_lines_are_seen_in_a_copy(tree, monkeypatch):
    copy = mutants.Copy()
    try:
        at = (tree / "code.py").read_text().index("<")
        change = "code.py", at, at + 1, ">="
        assert copy.broken("code.py", at, at, "", ["test_code.py"]) == ""
        assert copy.broken(*change, ["test_code.py"]) == "test_code.py::test_f"
        monkeypatch.setattr(mutants, "TIMEOUT", 3)
        assert copy.broken(*change, [], ["test_code.py::test_ends"]) == "timeout"
        assert copy.failed(["test_code.py"]) == ""              # mended again
    finally:
        shutil.rmtree(copy.folder)
    assert "x < 2" in (tree / "code.py").read_text()


def test_the_lines_of_the_list_are_there_and_so_are_their_tests():
    """That each test turns red is seen by `python -m lab.mutants wiring`."""
    with open(mutants.WIRING) as file:
        entries = json.load(file)
    assert len(entries) > 100
    for entry in entries:
        with open(os.path.join(HERE, entry["file"])) as file:
            source = file.read()
        assert source.count(entry["old"]) == 1, entry["guards"]
        ast.parse(source.replace(entry["old"], entry["new"]))
        path, name = re.fullmatch(r"(\S+\.py)::(\w+)(?:\[.*\])?", entry["test"]).groups()
        with open(os.path.join(HERE, path)) as file:
            assert f"def {name}(" in file.read(), entry["test"]


def test_each_survivor_has_a_reason():
    """docs/tests.md lists every random change that no test saw, and why that does no harm."""
    with open(os.path.join(HERE, "docs", "tests.md")) as file:
        text = file.read()
    killed = [bool(row["killed_by"]) for row in read_rows(mutants.ROWS)]
    assert f"of {len(killed)} the tests saw {sum(killed)}," in text
    listed = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    reasons = {tuple(cells[:3]): cells[3].strip(" |\n") for cells in listed}
    assert {(f"| `{file}` `{function}`", f"`{old}`", f"`{new}`")
            for file, function, old, new in mutants.survivors()} == reasons.keys()
    assert all(len(reason) > 10 for reason in reasons.values())
