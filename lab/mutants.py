"""Break the code on purpose, and see a test turn red.

    python -m lab.mutants wiring --jobs 2   every broken line of lab/wiring.json, with the test that
                                            guards it: 25 minutes on two cores
    python -m lab.mutants random --n 400 --seed 1 --jobs 2
                                            random changes of the reference and of support/, one row
                                            each in results/mutants.csv: an hour or two; once
                                            more after new tests: the survivors alone
    python -m lab.mutants report            score and survivors; docs/tests.md says why they survive

For development: both need git and pytest, `random` also needs `pip install coverage`. All runs are
made in copies of the working tree. A random mutant changes one node of the syntax tree; it first
meets the tests that run its line, the quickest first, and if it survives them all tests of its
file: test_all.py for the reference, that and support/ for support/. It is killed if a test fails
or does not end. What is drawn, raised or printed is left alone.
"""

import argparse
import ast
import contextlib
import functools
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed

from support.files import read_rows, write_rows
from support.run import HERE

REFERENCE = "hiql.py", "hiro.py", "nets.py", "envs.py"
SUPPORT = tuple(f"support/{name}.py" for name in
                ("run", "flags", "files", "datasets", "offline", "online"))
LEFT_ALONE = "draw", "show"                     # functions that draw or print
ROWS, WIRING = (os.path.join(HERE, *path) for path in
                (("results", "mutants.csv"), ("lab", "wiring.json")))
TIMEOUT = 60                                    # seconds for one test; the slowest takes about 5
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
          "-o", "faulthandler_exit_on_timeout=true", "-o"]      # since pytest 9

COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=",
               ast.NotEq: "==", ast.In: "not in", ast.NotIn: "in", ast.Is: "is not",
               ast.IsNot: "is"}
OPERATORS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "/",
             ast.Mod: "+", ast.Pow: "*", ast.MatMult: "*", ast.BitAnd: "|", ast.BitOr: "&"}
PAIRS = ("min", "max"), ("minimum", "maximum"), ("argmin", "argmax"), ("mean", "sum"), (
    "any", "all"), ("floor", "ceil"), ("zeros", "ones")
TWINS = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}


def changes(node):
    """The texts that a mutant may have in place of a node: a list, mostly of one or none."""
    text = ast.unparse
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        other = COMPARISONS[type(node.ops[0])]
        return [f"({text(node.left)} {other} {text(node.comparators[0])})"]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return [f"(({text(node.left)}) {OPERATORS[type(node.op)]} ({text(node.right)}))"]
    if isinstance(node, ast.BoolOp):
        word = " or " if isinstance(node.op, ast.And) else " and "
        return ["(" + word.join(f"({text(x)})" for x in node.values) + ")"]
    if isinstance(node, ast.UnaryOp):
        return [f"({text(node.operand)})"]
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return [str(not node.value)]
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return [repr(node.value + 1 if isinstance(node.value, int) else 1.2 * node.value or 0.5)]
    if isinstance(node, ast.Attribute) and node.attr in TWINS:
        return [f"({text(node.value)}).{TWINS[node.attr]}"]
    if isinstance(node, ast.Name) and node.id in ("min", "max", "any", "all"):
        return [TWINS[node.id]]
    if isinstance(node, ast.IfExp):
        return [f"({text(node.orelse)} if {text(node.test)} else {text(node.body)})"]
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr)
                                           and isinstance(node.value, ast.Call)):
        return ["pass"]                                         # a statement left out
    return []


def mutants(source):
    """[(first byte, last byte + 1, new text, function)] of all changes of a file's source (str)."""
    lines = [0]
    for line in source.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    found = []

    def visit(node, inside):
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)):
            return
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if node.name.startswith(LEFT_ALONE):
                return
            inside = f"{inside}.{node.name}".lstrip(".")
        if inside:
            def add(node, new):
                found.append((lines[node.lineno - 1] + node.col_offset,
                              lines[node.end_lineno - 1] + node.end_col_offset, new, inside))
            for new in changes(node):
                add(node, new)
            if isinstance(node, (ast.If, ast.While)):
                add(node.test, f"(not ({ast.unparse(node.test)}))")
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), "")
    return found


class Copy:
    """A copy of the working tree, in which lines are broken and tests run."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="mutants")
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=HERE,
                                capture_output=True, text=True, check=True).stdout.splitlines()
        for name in listed:
            os.makedirs(os.path.join(self.folder, os.path.dirname(name)), exist_ok=True)
            if os.path.isfile(os.path.join(HERE, name)):        # else deleted, not yet committed
                shutil.copy(os.path.join(HERE, name), os.path.join(self.folder, name))

    def failed(self, tests):
        """"" if the tests pass, else the first that fails or "timeout"."""
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"}
        with tempfile.TemporaryFile("w+") as file:
            process = subprocess.Popen(
                [*PYTEST, f"faulthandler_timeout={TIMEOUT}", *tests], cwd=self.folder,
                env=environment, stdout=file, stderr=file, start_new_session=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10 * TIMEOUT)              # also if nothing is collected
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)          # and what the tests have started
            file.seek(0)
            output = file.read()
        if process.wait() < 0 or re.search(r"^Timeout \(", output, re.M):
            return "timeout"
        names = [line.split()[1] for line in output.splitlines()
                 if line.startswith(("FAILED", "ERROR")) and len(line.split()) > 1]
        return "" if process.returncode == 0 else (names or ["not collected"])[0]

    def broken(self, file, first, last, new, *tests):
        """`failed` of each of the lists of tests in turn, with bytes [first, last) replaced."""
        path = os.path.join(self.folder, file)
        with open(path, "rb") as f:
            source = f.read()
        try:
            with open(path, "wb") as f:
                f.write(source[:first] + new.encode() + source[last:])
            return next(filter(None, (self.failed(ids) for ids in tests if ids)), "")
        finally:
            with open(path, "wb") as f:
                f.write(source)

    def tests_of_lines(self, tests):
        """{file: {line: [test]}} of a run of tests that must pass, the quickest test first."""
        import coverage                                         # which nothing else here needs
        data, report = (os.path.join(self.folder, name) for name in (".coverage", "report.xml"))
        settings = os.path.join(self.folder, "coverage.ini")
        with open(settings, "w") as f:
            f.write("[run]\ndynamic_context = test_function\nsource = .\nomit = */test_*\n")
        subprocess.run([sys.executable, "-m", "coverage", "run", f"--rcfile={settings}",
                        f"--data-file={data}", *PYTEST[1:-1], f"--junitxml={report}", *tests],
                       cwd=self.folder, check=True)
        seconds = {}
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname')}.{case.get('name').split('[')[0]}"
            seconds[name] = seconds.get(name, 0) + float(case.get("time"))
        recorded = coverage.CoverageData(data)
        recorded.read()

        def quickest(contexts):
            known = sorted({c for c in contexts if c in seconds}, key=seconds.get)
            return ["{}.py::{}".format(*c.rsplit(".", 1)).replace(".", "/", c.count(".") - 1)
                    for c in known]

        return {os.path.relpath(file, self.folder): {
            line: quickest(contexts) for line, contexts in
            recorded.contexts_by_lineno(file).items()} for file in recorded.measured_files()}


def commit():
    """The short hash of HEAD, with "+" if Python files differ from it."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout
    return git("rev-parse", "--short", "HEAD").strip() + (
        "+" if git("status", "--porcelain", "*.py") else "")


@functools.lru_cache
def same_sources(commit, files):
    """Whether files are as they were at a commit: then what was killed there is not run again."""
    return subprocess.run(["git", "diff", "--quiet", commit.rstrip("+"), "--", *files], cwd=HERE,
                          capture_output=True).returncode == 0


def in_copies(items, test, jobs):
    """Yield test(copy, item) of every item as they end, `jobs` at once, each in a Copy alone."""
    copies, free = [Copy() for _ in range(jobs)], queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def run(item):
        copy = free.get()
        try:
            return test(copy, item)
        finally:
            free.put(copy)

    pool = ThreadPoolExecutor(jobs)
    try:
        for future in as_completed([pool.submit(run, item) for item in items]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        for copy in copies:
            shutil.rmtree(copy.folder)


def run_random(n, seed, jobs, files):
    """Run the first n of all mutants of `files` in an order drawn from the seed; one row each."""
    sources = {}
    for file in files:
        with open(os.path.join(HERE, file), newline="") as f:
            sources[file] = f.read()
    plan = [(file, *mutant) for file in files for mutant in mutants(sources[file])]
    random.Random(seed).shuffle(plan)
    at = commit()
    rows = [row for row in (read_rows(ROWS) if os.path.exists(ROWS) else [])
            if row["seed"] == str(seed) and (row["commit"] == at or (
                row["killed_by"] and same_sources(row["commit"], files)))]
    done = {(row["file"], row["byte"], row["new"]) for row in rows}
    todo = [m for m in plan[:n] if (m[0], str(m[1]), m[3]) not in done]
    print(f"{len(plan)} mutants, {len(rows)} done, {len(todo)} to run", flush=True)
    groups = {file: ["test_all.py"] if file in REFERENCE else ["test_all.py", "support"]
              for file in files}
    whole = Copy()
    try:
        lines = whole.tests_of_lines(["test_all.py", "support"])
    finally:
        shutil.rmtree(whole.folder)

    def test(copy, mutant):
        file, first, last, new, function = mutant
        text = sources[file].encode()
        line = text[:first].count(b"\n") + 1
        quick = [t for t in lines.get(file, {}).get(line, []) if t.startswith(tuple(groups[file]))]
        return {"file": file, "line": line, "byte": first, "function": function,
                "old": text[first:last].decode(), "new": new,
                "killed_by": copy.broken(file, first, last, new, quick, groups[file]),
                "seed": seed, "commit": at}

    for row in in_copies(todo, test, jobs):
        rows.append(row)
        write_rows(ROWS, rows)
        print(f"{len(rows)}/{n} {row['killed_by'] or 'SURVIVED'}: {row['file']}:{row['line']} "
              f"{row['function']}: {row['old']} -> {row['new']}", flush=True)


def run_wiring(jobs):
    """Break each line of lab/wiring.json in turn and run its test -> entries whose test passes."""
    with open(WIRING) as f:
        entries = json.load(f)

    def test(copy, entry):
        with open(os.path.join(copy.folder, entry["file"]), "rb") as f:
            first = f.read().index(entry["old"].encode())
        return entry, copy.broken(entry["file"], first, first + len(entry["old"].encode()),
                                  entry["new"], ["-m", "slow or not slow", entry["test"]])

    green = []
    for entry, by in in_copies(entries, test, jobs):
        if not by:
            green.append(entry)
        print(f"{'red  ' if by else 'GREEN'} {entry['file']}: {entry['guards']}", flush=True)
    print(f"{len(entries) - len(green)} of {len(entries)} broken lines turn their test red")
    return green


def survivors():
    """[(file, function, old, new)] of the changes in results/mutants.csv that no test saw."""
    return [(row["file"], row["function"], *(" ".join(row[key].split()) for key in ("old", "new")))
            for row in read_rows(ROWS) if not row["killed_by"]]


def report():
    """Print the score and, as rows of docs/tests.md, the survivors of results/mutants.csv."""
    rows = read_rows(ROWS)
    for file, function, old, new in survivors():
        print(f"| `{file}` `{function}` | `{old}` | `{new}` |")
    for name, files in (("reference", REFERENCE), ("support", SUPPORT), ("all", REFERENCE +
                                                                         SUPPORT)):
        mine = [row["killed_by"] for row in rows if row["file"] in files]
        print(f"{name}: {sum(map(bool, mine))} of {len(mine)} killed, of these "
              f"{mine.count('timeout')} by a timeout")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("wiring", "random", "report"))
    p.add_argument("--n", type=int, default=400, help="random mutants")
    p.add_argument("--seed", type=int, default=1, help="of their order")
    p.add_argument("--jobs", type=int, default=1, help="copies tested at once")
    p.add_argument("--files", nargs="+", default=[*REFERENCE, *SUPPORT])
    a = p.parse_args()
    if a.what == "report":
        report()
    elif a.what == "random":
        run_random(a.n, a.seed, a.jobs, tuple(a.files))
    else:
        sys.exit(1 if run_wiring(a.jobs) else 0)
