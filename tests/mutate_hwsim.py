"""Score the tests of the hardware model by mutants of its formulas: python tests/mutate_hwsim.py [--write]

A mutant is one of hwsim's seven files of formulas with one small change: `+` for `-`, a constant off by one, `<` for
`<=`, a condition negated, the arms of a choice exchanged, `max` for `min`. Every possible one is made. Each runs, in a
process of its own, the tests of test_hwsim_formulas.py, test_hwsim_counting.py, test_hwsim_network.py,
test_hwsim_spikesim.py and test_hwsim_config.py that reach the changed line, the quickest first, until one fails: then
it is killed. One that nobody notices is a case the tests lack, or is equivalent: the same function in other words.
Those examined by hand stand, each with its reason, in tests/mutation/equivalent_hwsim.json.

Writes docs/mutation-hwsim.md and tests/mutation/hwsim.json with --write. Exit status 1 if the score is under --min. Not
a test file; needs os.fork.

Scope: code that runs. Error messages, texts, type annotations, `strict=` and what only a type checker sees stay as
they are; so does what reads and writes files in activity.py. Tests are left out that start processes of their own,
which would see the unchanged files, or need torch.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import copy
import io
import json
import marshal
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "hwsim"
FILES = ("cost.py", "converters.py", "cells.py", "wires.py", "mapping.py", "activity.py", "crossbar.py")
PARTS = {"activity.py": ("count_windows", "_planes", "_Values", "measure", "_count", "load_of", "uniform", "_inside")}
"""Of these files only these functions and classes: the rest of activity.py reads and writes files."""
SUITES = tuple(f"tests/test_hwsim_{name}.py" for name in ("formulas", "counting", "network", "spikesim", "config"))
LEFT_OUT = (
    "test_an_analog_grid_is_the_same_in_any_number_of_processes",
    "test_events_agree_with_spikingjelly",
    "test_the_whole_function_of_spikingjelly_is_the_oracle",
    "test_a_resnet18_report_needs_no_torch_and_little_time",
    "test_damaged_activity_files_are_read_the_same_or_refused",
    "test_counts_out_of_range_are_refused",
    "test_a_bomb_and_a_pickle_are_refused_unread",
)
DOCUMENT = HERE.parent / "docs" / "mutation-hwsim.md"
RECORD = HERE / "mutation" / "hwsim.json"
EQUIVALENT = HERE / "mutation" / "equivalent_hwsim.json"
CPU_SECONDS = 120

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
CALLS = {"max": "min", "min": "max", "any": "all", "all": "any", "maximum": "minimum", "minimum": "maximum"}


@dataclass(frozen=True)
class Mutant:
    """One change: where it is, what it looks like, and the line of code that has to run for it to be felt."""

    file: str
    line: int
    function: str
    kind: str
    before: str
    after: str
    text: str
    nth: int
    code: CodeType

    @property
    def key(self) -> tuple[str, str, str, str, str, int]:
        """What names it in the list of equivalent mutants: lines may move, so it is the line's text, and which of the
        equal changes on that line, from 1 on."""
        return self.file, self.function, self.text, self.before, self.after, self.nth


# ------------------------------------------------------------------------------------------------------ changes


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Every small change of one node, as (kind, the new node)."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in OPERATORS:
        yield "operator", _with(node, op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.Compare):
        for place, op in enumerate(node.ops):
            ops: list[Any] = list(node.ops)
            ops[place] = OPERATORS[type(op)]()
            yield "comparison", _with(node, ops=ops)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield "operator", node.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        far = isinstance(node.value, float) or abs(node.value) >= 1000
        yield "constant", ast.Constant((2 * node.value or 1.0) if far else node.value + 1)
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node, ast.IfExp):
        yield "arms exchanged", _with(node, body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.If | ast.While):
        yield "condition negated", _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield "condition left out", _with(node, ifs=node.ifs[1:])
    elif isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in CALLS:
            new = CALLS[name]
            is_name = isinstance(node.func, ast.Name)
            func = ast.Name(new, ast.Load()) if is_name else _with(node.func, attr=new)
            yield "call", _with(node, func=func)


def _with(node: ast.AST, **fields: Any) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _skipped(parent: ast.AST, field: str, child: ast.AST) -> bool:
    """Whether a child is no formula: an annotation, a message, a decorator, `strict=`."""
    if field in ("annotation", "returns", "decorator_list"):
        return True
    if isinstance(parent, ast.keyword) and parent.arg == "strict":
        return True
    return isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom)


def mutants_of(file: str, text: str) -> list[Mutant]:
    """Every mutant of a file's text that is another program, in the order of the text."""
    tree = ast.parse(text)
    found: list[Mutant] = []
    lines = text.splitlines()
    twins: collections.Counter[tuple[int, str, str]] = collections.Counter()
    original = compile(tree, file, "exec")
    path = str(SOURCE / file)

    def visit(node: ast.AST, function: str, line: int) -> None:
        for field, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            for place, child in enumerate(children):
                if not isinstance(child, ast.AST) or _skipped(node, field, child):
                    continue
                where, at = function, getattr(child, "lineno", line)
                if isinstance(child, ast.FunctionDef | ast.ClassDef):
                    where = f"{function}.{child.name}".lstrip(".")
                for kind, changed in changes(child):
                    _put(node, field, place, value, changed)
                    code = compile(ast.fix_missing_locations(tree), path, "exec")
                    _put(node, field, place, value, child)
                    if code.co_code != original.co_code or code.co_consts != original.co_consts:
                        shown = _shown(child, changed)
                        twins[at, *shown] += 1
                        found.append(
                            Mutant(file, at, where, kind, *shown, lines[at - 1].strip(), twins[at, *shown], code)
                        )
                visit(child, where, at)

    visit(tree, "", 1)
    parts = PARTS.get(file)
    return found if parts is None else [each for each in found if each.function.split(".")[0] in parts]


def _put(node: ast.AST, field: str, place: int, value: Any, new: ast.AST) -> None:
    if isinstance(value, list):
        value[place] = new
    else:
        setattr(node, field, new)


def _shown(before: ast.AST, after: ast.AST) -> tuple[str, str]:
    """Both as text; of a statement with a body, its head only."""
    texts = []
    for node in (before, after):
        if isinstance(node, ast.If | ast.While):
            texts.append(f"{type(node).__name__.lower()} {ast.unparse(node.test)}")
        elif isinstance(node, ast.comprehension):
            texts.append(
                f"for {ast.unparse(node.target)} in {ast.unparse(node.iter)}"
                + "".join(f" if {ast.unparse(test)}" for test in node.ifs)
            )
        else:
            texts.append(ast.unparse(node))
    return texts[0], texts[1]


# -------------------------------------------------------------------------------------------------------- running


def scopes(code: CodeType, other: CodeType, inside: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """Where two programs of one text differ: () is the module, ("f",) its function f, ("C", "m") a method."""

    def own(each: CodeType) -> list[Any]:
        consts = [(type(c), c) for c in each.co_consts if not isinstance(c, CodeType)]
        return [each.co_code, consts, each.co_names, each.co_varnames]

    found = {inside} if own(code) != own(other) else set()
    pairs = [[c for c in each.co_consts if isinstance(c, CodeType)] for each in (code, other)]
    for one, two in zip(*pairs, strict=False):
        found |= scopes(one, two, (*inside, one.co_name))
    return found


def function_at(module: Any, path: tuple[str, ...]) -> Any:
    """The function of a module at the head of `path`, or None: what only an import runs cannot be exchanged."""
    place = module
    for name in path:
        place = vars(place).get(name)
        place = getattr(place, "fget", None) or getattr(place, "__wrapped__", None) or place
        if hasattr(place, "__code__"):
            return place
        if not isinstance(place, type):
            return None
    return None


def code_at(code: CodeType, qualified: str) -> CodeType:
    """The code of the function with this qualified name, inside a module's code."""
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    for each in inner:
        if each.co_qualname == qualified:
            return each
        if qualified.startswith(f"{each.co_qualname}."):
            return code_at(each, qualified)
    raise LookupError(qualified)


class Bench:
    """A pytest plugin that collects the tests once and then runs some of them on mutants, each in a fork.

    A mutant inside a function is put in the place of the function's code; one that only an import runs (a default, a
    constant of the module) is judged by a fresh interpreter.
    """

    def __init__(self, judging: Any) -> None:
        self.judging = judging
        self.failed = False
        self.seconds: dict[str, float] = {}
        self.reached: dict[tuple[str, int], list[str]] = {}
        self.originals = {file: compile((SOURCE / file).read_text(), str(SOURCE / file), "exec") for file in FILES}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A report of a set-up, a test or a tear-down."""
        self.failed |= report.failed

    def pytest_runtestloop(self, session: Any) -> bool:
        """Instead of running the tests: measure them, then judge mutants."""
        self.items = {item.nodeid: item for item in session.items}
        self._survey()
        self.judging(self)
        return True

    def _run(self, tests: list[str], each: Any = None) -> bool:
        """Whether all of `tests` pass, up to the first that does not."""
        items = [self.items[name] for name in tests]
        for place, item in enumerate(items):
            if each is not None:
                each(item.nodeid)
            item.config.hook.pytest_runtest_protocol(
                item=item, nextitem=items[place + 1] if place + 1 < len(items) else None
            )
            if self.failed:
                return False
        return True

    def _survey(self) -> None:
        """Seconds of every test, and the tests that reach a line of the unchanged files."""

        def work() -> bytes:
            lines: dict[tuple[str, int], set[str]] = collections.defaultdict(set)
            names = {str(SOURCE / file): file for file in FILES}
            began: dict[str, float] = {}
            test = ""

            def trace(frame: FrameType, event: str, _argument: Any) -> Any:
                file = names.get(frame.f_code.co_filename)
                if file is None:
                    return None
                if event in ("call", "line"):
                    lines[file, frame.f_lineno].add(test)
                return trace

            def start(name: str) -> None:
                nonlocal test
                test = name
                began[name] = time.process_time()

            sys.settrace(trace)
            passed = self._run(list(self.items), start)
            sys.settrace(None)
            if not passed:
                raise SystemExit(f"{test} fails on the unchanged files")
            ends = [*list(began.values())[1:], time.process_time()]
            seconds = {name: end - at for (name, at), end in zip(began.items(), ends, strict=True)}
            return json.dumps([seconds, [[*key, sorted(tests)] for key, tests in lines.items()]]).encode()

        _, content = in_a_child(work)
        if not content:
            raise SystemExit("the tests fail on the unchanged files")
        self.seconds, lines = json.loads(content)
        self.reached = {(file, line): tests for file, line, tests in lines}

    def judge(self, mutant: Mutant) -> str:
        """ "killed" or "survived"."""
        where = scopes(self.originals[mutant.file], mutant.code)
        module = sys.modules[f"mdsnn.hwsim.{mutant.file.removesuffix('.py')}"]
        functions = [function_at(module, path) for path in where]
        if None in functions:
            return judge_by_import(mutant, self.seconds)
        lines = range(mutant.line, mutant.line - 40, -1)  # parts of a long statement have lines that are never reported
        reaching = next((self.reached[mutant.file, at] for at in lines if (mutant.file, at) in self.reached), [])
        tests = sorted(reaching, key=lambda name: self.seconds[name])
        if not tests:
            return "survived"

        def work() -> bytes:
            for function in functions:
                function.__code__ = code_at(mutant.code, function.__code__.co_qualname)
            return b"survived" if self._run(tests) else b"killed"

        status, content = in_a_child(work)
        return content.decode() if status == 0 else "killed"


def in_a_child(work: Any) -> tuple[int, bytes]:
    """Run `work()`, which returns bytes, in a fork; its exit status (negative: a signal) and what it returned."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 70
        try:
            os.close(reading)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
            content = work()
            with os.fdopen(writing, "wb") as stream:
                stream.write(content)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        content = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), content


def judge_by_import(mutant: Mutant, seconds: dict[str, float]) -> str:
    """ "killed" or "survived", by a fresh interpreter that imports the mutant; all tests, the quickest first."""
    program = (
        "import importlib.machinery as m, marshal, os, sys, pytest\n"
        "path, blob, *tests = sys.argv[1:]\n"
        "code, get_code = marshal.loads(bytes.fromhex(blob)), m.SourceFileLoader.get_code\n"
        "m.SourceFileLoader.get_code = lambda self, name: code if os.path.realpath(self.path) == path else "
        "get_code(self, name)\n"
        "sys.exit(pytest.main(['-x', '-q', '-p', 'no:cacheprovider', *tests]))\n"
    )
    blob = marshal.dumps(mutant.code).hex()
    tests = sorted(seconds, key=lambda name: seconds[name])
    command = [sys.executable, "-c", program, str(SOURCE / mutant.file), blob, *tests]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, check=False)
    return "survived" if done.returncode == 0 else "killed"


def with_tests(judging: Any) -> int:
    """Collect the tests and call `judging(bench)`; pytest's exit status."""
    sys.path.insert(0, str(HERE))
    os.chdir(HERE.parent)
    import pytest
    from hypothesis import Phase, settings

    settings.register_profile(
        "mutation", derandomize=True, database=None, phases=(Phase.explicit, Phase.generate), print_blob=False
    )
    settings.load_profile("mutation")
    ignored = [f"--deselect={suite}::{name}" for suite in SUITES for name in LEFT_OUT]
    with contextlib.redirect_stdout(io.StringIO()):
        words = [
            "-q",
            "--assert=plain",
            "--tb=no",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:faulthandler",
            *ignored,
            *SUITES,
        ]
        return int(pytest.main(words, plugins=[Bench(judging)]))


# -------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Row:
    """A mutant and its fate: killed, survived or equivalent (with its reason)."""

    file: str
    line: int
    function: str
    kind: str
    before: str
    after: str
    status: str
    reason: str = ""


def score(rows: list[Row]) -> float:
    """Killed in percent of killed and survived."""
    killed, survived = (sum(row.status == status for row in rows) for status in ("killed", "survived"))
    return 100.0 * killed / max(1, killed + survived)


def table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A Markdown table."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells))


def document(rows: list[Row], tests: int) -> str:
    """docs/mutation-hwsim.md."""
    counts = collections.Counter(row.status for row in rows)

    def tally(field: str) -> str:
        lines: list[tuple[object, ...]] = []
        for name in sorted({getattr(row, field) for row in rows}):
            mine = [row for row in rows if getattr(row, field) == name]
            of = [sum(row.status == status for row in mine) for status in ("killed", "survived", "equivalent")]
            lines.append((name, *of, f"{score(mine):.1f} %"))
        return table(("", "killed", "survived", "equivalent", "score"), lines)

    def change(row: Row) -> tuple[str, str, str]:
        return f"{row.file}:{row.line} {row.function}", f"`{row.before}`", f"`{row.after}`"

    survivors: list[tuple[object, ...]] = [(*change(row), "open") for row in rows if row.status == "survived"]
    equivalents: list[tuple[object, ...]] = [(*change(row), row.reason) for row in rows if row.status == "equivalent"]
    about, judged = (__doc__ or "").split("\n\n"), dict.fromkeys(row.file for row in rows)
    head = ("where", "original", "mutant")
    parts = [
        "# Mutation score of the hardware model\n",
        "Written by `python tests/mutate_hwsim.py --write`; do not edit. " + " ".join(about[1].split()),
        f"**Score: {score(rows):.1f} %** of {counts['killed'] + counts['survived']} mutants ("
        f"{counts['killed']} killed, {counts['survived']} survived), judged by {tests} tests; "
        f"{counts['equivalent']} more are equivalent. Judged: {', '.join(judged)}"
        + ("." if set(judged) == set(FILES) else f", of {', '.join(FILES)}."),
        " ".join(about[3].split()),
        "## By file\n\n" + tally("file"),
        "## By kind of change\n\n" + tally("kind"),
        "## Survivors\n\n" + (table((*head, "verdict"), survivors) if survivors else "None."),
        "## Equivalent, by hand\n\n" + (table((*head, "reason"), equivalents) if equivalents else "None."),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", nargs="*", default=FILES, choices=FILES, help="only mutants of these")
    parser.add_argument("--functions", nargs="*", help="only mutants in these functions, for trials")
    parser.add_argument("--share", default="1/1", metavar="K/N", help="every N-th mutant from the K-th on, for trials")
    parser.add_argument("--again", action="store_true", help="judge only those that the record does not call killed")
    parser.add_argument("--min", type=float, default=95.0, help="exit status 1 below this score, in percent")
    parser.add_argument("--write", action="store_true", help="write docs/mutation-hwsim.md and its record")
    options = parser.parse_args(arguments)
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MDSNN_THREADS="1")
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr, flush=True)

    known = {tuple(entry[:6]): entry[6] for entry in json.loads(EQUIVALENT.read_text())} if EQUIVALENT.exists() else {}
    first, every = (int(part) for part in options.share.split("/"))
    mutants = [mutant for file in options.files for mutant in mutants_of(file, (SOURCE / file).read_text())]
    for lost in sorted({key for key in known if key[0] in options.files} - {mutant.key for mutant in mutants}):
        say(f"{EQUIVALENT.name} names no mutant: {lost}")
    if options.functions:
        mutants = [mutant for mutant in mutants if mutant.function in options.functions]
    mutants = mutants[first - 1 :: every]
    rows: list[Row] = []
    tests = 0
    spared: set[tuple[object, ...]] | None = None
    if options.again:
        record = json.loads(RECORD.read_text())
        if sum(record["counts"].values()) != len(mutants):
            raise SystemExit("the files have changed since the record was written; run it whole")
        names = ("file", "line", "kind", "before", "after")
        spared = {tuple(row[name] for name in names) for row in record["mutants"]}

    def judging(bench: Bench) -> None:
        nonlocal tests
        tests = len(bench.seconds)
        say(f"{tests} tests take {sum(bench.seconds.values()):.0f} s; {len(mutants)} mutants")
        for mutant in mutants:
            name = (mutant.file, mutant.line, mutant.kind, mutant.before, mutant.after)
            fate, reason = ("killed" if spared is not None and name not in spared else bench.judge(mutant)), ""
            if fate == "survived" and mutant.key in known:
                fate, reason = "equivalent", known[mutant.key]
            fields = {name: value for name, value in vars(mutant).items() if name not in ("text", "nth", "code")}
            rows.append(Row(**fields, status=fate, reason=reason))
            if fate == "survived":
                say(f"survived: {mutant.file}:{mutant.line} {mutant.function}: {mutant.before}  ->  {mutant.after}")
            if len(rows) % 50 == 0:
                say(f"{len(rows)} mutants, score {score(rows):.1f} %")

    with_tests(judging)
    say(f"score {score(rows):.1f} % of {len(rows)}")
    if options.write:
        DOCUMENT.write_text(document(rows, tests))
        counts = dict(collections.Counter(row.status for row in rows))
        left = [asdict(row) for row in rows if row.status != "killed"]
        facts = {"schema": "mdsnn.mutation-hwsim/1", "score": round(score(rows), 2), "counts": counts, "mutants": left}
        RECORD.write_text(json.dumps(facts, indent=1) + "\n")
    return 0 if score(rows) >= options.min else 1


if __name__ == "__main__":
    sys.exit(main())
