"""Score the tests of the C engine by mutants of its sources: python tests/mutate_c.py [--mutants 300] [--seed 1]

A mutant is the C engine with one small change: `<` for `<=`, a constant off by one, a statement left out, `x` for `y`.
Each is compiled at -O1 for the base instruction set and run through the networks of test_kernels_bit_exact.py and
test_kernels_corners.py (every test there that calls `check`), comparing whole traces, logits and counts, of a run and
of a stream, in memory with watched bytes around every value. A mutant that differs, writes elsewhere, crashes or hangs
is killed. Those that survive run once more compiled with UBSan, as tests/sanitize.py does with the original. One that
nobody notices is a case the tests lack, or is equivalent: the same function in other words. Those whose machine code is
that of the original are left out before they are counted; others that were examined by hand stand in
tests/mutation/equivalent.json, each with its reason.

Writes docs/mutation.md with --write. Exit status 1 if the score is under --min. Not a test file; needs gcc.

Scope: code compiled without x86's instruction sets above SSE2. Two builds cover it: `base` is what an x86-64 machine
runs as MDSNN_ISA=base, `portable` what a machine that is no x86 compiles; a mutant is built in the first that holds its
line. run.c is compiled as on such a machine, so the choice of instruction sets in it is out of scope, as are mdsnn.h
(declarations only), isa_avx2.c, isa_avx512.c and isa_amx.c.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import importlib
import importlib.util
import inspect
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from c_mutants import Mutation, blank_comments, directives, mutations_of

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "mutation.md"
EQUIVALENT = HERE / "mutation" / "equivalent.json"
FLAGS = ("-std=c11", "-O1", "-fPIC", "-w")
CHECKED = ("-fsanitize=undefined,bounds-strict", "-fsanitize-undefined-trap-on-error")
"""More flags for a mutant that survives: it runs once more where undefined behaviour and wrong indices trap."""
BUILDS: dict[str, dict[str, tuple[str, ...]]] = {
    "base": {"run.c": ("MDSNN_X86", "MDSNN_X86_AMX")},
    "portable": {"": ("__x86_64__", "__SSE2__")},
}
"""Build -> file ("" for all) -> macros of the compiler that it must not see."""
MODULE = "mdsnn_mutated"
SUITES = ("test_kernels_bit_exact", "test_kernels_corners")
SKIPPED = ("mdsnn.h",)
CPU_SECONDS, CPU_FACTOR, WALL_SECONDS = 2.0, 20.0, 300.0
KILLED, TOUCHED, RAISED, SURVIVED = 41, 42, 43, 77  # exit statuses of a mutant's process

# ------------------------------------------------------------------------------------------------------ building


def hidden(build: str, file: str, text: str) -> str:
    """`text` as `build` compiles it: the macros that it must not see have another name. Lines stay where they are."""
    for name, macros in BUILDS[build].items():
        for macro in macros if name in ("", file) else ():
            text = re.sub(rf"\b{macro}\b", f"HIDDEN{macro}", text)
    return text


def units_of() -> list[str]:
    """What is compiled: run.c and the like, and of the instruction sets only the base."""
    from mdsnn.kernels import build_native

    return [name for name in build_native.SOURCES if not name.startswith("isa_") or name == "isa_base.c"]


def write_sources(folder: Path, sources: dict[str, str], build: str) -> None:
    """The sources as `build` compiles them, as files of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in sources.items():
        (folder / name).write_text(hidden(build, name, text))


def compile_unit(folder: Path, unit: str, flags: tuple[str, ...] = FLAGS) -> bytes | None:
    """The object code of a file in `folder`, also left beside it; None if it does not compile."""
    target = Path(unit).with_suffix(".o").name
    command = ["gcc", *flags, "-c", unit, "-o", target]
    done = subprocess.run(command, cwd=folder, capture_output=True)
    return (folder / target).read_bytes() if done.returncode == 0 else None


def active_lines(folder: Path, sources: dict[str, str], build: str) -> tuple[dict[str, set[int]], dict[str, list[str]]]:
    """Lines of each file that `build` compiles, and each file's units.

    A mark is put after every conditional of the preprocessor; the marks that it lets through say which lines live.
    """
    marks: list[tuple[str, int, int]] = []
    for name, text in sources.items():
        text = hidden(build, name, text)
        conditionals = [
            (start, end)
            for start, end in directives(blank_comments(text))
            if re.match(r"[ \t]*#[ \t]*(if|el|endif)", text[start:end])
        ]
        cuts = [0, *(end + 1 for _, end in conditionals)]
        ends = [*(start for start, _ in conditionals), len(text)]
        parts = []
        for i, (cut, end) in enumerate(zip(cuts, ends, strict=True)):
            first, last = text.count("\n", 0, cut) + 1, text.count("\n", 0, end)
            parts.append(f"#pragma mutation {len(marks)}\n" + text[cut : cuts[i + 1] if i + 1 < len(cuts) else None])
            marks.append((name, first, last))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(parts))
    lines: dict[str, set[int]] = {name: set() for name in sources}
    units: dict[str, list[str]] = {name: [] for name in sources}
    for unit in units_of():
        command = ["gcc", "-std=c11", "-E", unit]
        output = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
        for mark in sorted({int(number) for number in re.findall(r"#pragma mutation (\d+)", output)}):
            name, first, last = marks[mark]
            lines[name].update(range(first, last + 1))
            if unit not in units[name]:
                units[name].append(unit)
    return lines, units


def released_flags() -> tuple[str, ...]:
    """Flags that the extension itself is built with."""
    from mdsnn.kernels import build_native

    return (*build_native.FLAGS, "-fPIC", "-w")


@dataclass(frozen=True)
class Original:
    """The unchanged engine: its sources, and for each build what is compiled and the object code."""

    folder: Path
    sources: dict[str, str]
    lines: dict[str, dict[str, set[int]]]
    units: dict[str, dict[str, list[str]]]
    objects: dict[tuple[str, str], bytes]
    released: dict[tuple[str, str], bytes | None]

    @classmethod
    def build(cls, folder: Path, sources: dict[str, str], builds: Iterable[str]) -> Original:
        lines, units, objects, released = {}, {}, {}, {}
        for build in builds:
            lines[build], units[build] = active_lines(folder / f"marked-{build}", sources, build)
            write_sources(folder / build, sources, build)
            for unit in units_of():
                released[build, unit] = compile_unit(folder / build, unit, released_flags())
                code = compile_unit(folder / build, unit)
                if code is None:
                    raise SystemExit(f"{unit} does not compile for {build}")
                objects[build, unit] = code
            link(folder / build, units_of())
        return cls(folder, sources, lines, units, objects, released)

    def mutations(self) -> list[tuple[str, Mutation]]:
        """Every mutation of a line that a build holds, with the first such build."""
        found = []
        for name, text in self.sources.items():
            if name in SKIPPED or not any(units[name] for units in self.units.values()):
                continue
            for mutation in mutations_of(name, text):
                line = text.count("\n", 0, mutation.start) + 1
                for build, lines in self.lines.items():
                    if line in lines[name]:
                        found.append((build, mutation))
                        break
        return found


def link(folder: Path, units: Iterable[str]) -> Path:
    """The objects of `units` as one library."""
    target = folder / "engine.so"
    objects = [Path(unit).with_suffix(".o").name for unit in units]
    subprocess.run(["gcc", "-shared", "-Wl,-Bsymbolic", *objects, "-o", str(target)], cwd=folder, check=True)
    return target


def wrapper(folder: Path, header: str, source: Path) -> Any:
    """A module like the engine's extension whose functions call whatever library was chosen last with `use`."""
    import cffi

    from mdsnn.kernels import build_native

    ffi = cffi.FFI()
    ffi.cdef(build_native.contract(header) + "\nvoid mutant_use(void *run, void *supported, void *help);")
    ffi.set_source(
        MODULE,
        """#include "mdsnn.h"
        static void (*chosen_run)(const mdsnn_plan *, int, const mdsnn_call *);
        static int (*chosen_supported)(int);
        static void (*chosen_help)(mdsnn_team *);
        static void mutant_use(void *run, void *supported, void *help)
        {
            chosen_run = run;
            chosen_supported = supported;
            chosen_help = help;
        }
        int mdsnn_supported(int isa) { return chosen_supported(isa); }
        void mdsnn_run(const mdsnn_plan *plan, int isa, const mdsnn_call *call) { chosen_run(plan, isa, call); }
        void mdsnn_help(mdsnn_team *team) { chosen_help(team); }
        int64_t mdsnn_ticks(void) { return 0; } /* what only measures is not asked for here */
        int64_t mdsnn_strain(int isa, int what, const uint8_t *bytes, int64_t size, int64_t rounds)
        {
            (void)isa, (void)what, (void)bytes, (void)size, (void)rounds;
            return 0;
        }""",
        include_dirs=[str(source)],
    )
    path = ffi.compile(tmpdir=str(folder))
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} does not import")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use(module: Any, library: Path) -> None:
    """Make `module` call the engine in `library`."""
    loaded = ctypes.CDLL(str(library))
    names = ("mdsnn_run", "mdsnn_supported", "mdsnn_help")
    addresses = [ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value for name in names]
    module.lib.mutant_use(*(module.ffi.cast("void *", address) for address in addresses))


# -------------------------------------------------------------------------------------------------- the networks


@dataclass
class Case:
    """A network ready in the engine, as it is and with its values apart, and the reference's answers for it."""

    name: str
    engine: Any
    apart: Any
    pixels: Any
    run: Any
    steps: list[Any]
    cpu_seconds: float = 0.0
    kills: int = 0


class Different(Exception):
    """The engine's answer is not the reference's."""


def _compare(got: Any, want: Any, trace: bool = True) -> None:
    """Raise Different unless two Results hold the same integers."""
    pairs = [(got.logits, want.logits)]
    for what in ("spikes_in", "spikes_out"):
        counts, right = getattr(got.activity, what), getattr(want.activity, what)
        pairs += [(counts[name], right[name]) for name in right]
    if trace:
        for name, lif in want.trace.lifs.items():
            pairs += [(getattr(got.trace.lifs[name], what), getattr(lif, what)) for what in ("h", "s", "q")]
    if not all(np.array_equal(one, other) for one, other in pairs):
        raise Different("differs")


def replay(case: Case, watched: Any) -> None:
    """Run a case with a trace, in parts, without a trace, and as a stream.

    raises  Different  for other integers, or a byte written elsewhere
    """
    from red_zones import strayed

    network, pixels, engine = case.engine.network, case.pixels, case.engine
    _compare(engine.run(pixels, trace=True), case.run)
    engine._backend._scratch.clear()
    engine._backend._parts = 3
    _compare(engine._backend.run(pixels, trace=True, threads=3), case.run)
    engine._backend._scratch.clear()
    _compare(case.apart.run(pixels), case.run, trace=False)
    if strayed(case.apart):
        raise Different("writes elsewhere")
    images = network.input.coding == "image"
    stream = engine.stream(pixels) if images else engine.stream(samples=pixels.shape[1])
    for t in range(network.timesteps):
        _compare(stream.step(*(() if images else (pixels[t],))), case.steps[t])
    engine._backend._scratch.clear()
    if watched.touched():
        raise Different("writes elsewhere")


def make_case(name: str, network: Any, pixels: Any) -> Case:
    """A case with the reference's answers, ready in the engine under the patches now in force."""
    from red_zones import values_apart

    from mdsnn.kernels import Engine

    reference = Engine(network, "reference", 1)
    images = network.input.coding == "image"
    stream = reference.stream(pixels) if images else reference.stream(samples=pixels.shape[1])
    steps = [stream.step(*(() if images else (pixels[t],))) for t in range(network.timesteps)]
    with values_apart():
        apart = Engine(network, "native", 1)
    return Case(name, Engine(network, "native", 1), apart, pixels, reference.run(pixels, trace=True), steps)


def suite_cases(limit: int | None) -> list[Case]:
    """The networks of every test of the suites that calls `check` for an engine by name.

    limit  at most so many of each test; None: all
    """
    import pytest

    cases: list[Case] = []

    class Enough(Exception):
        pass

    for suite in map(importlib.import_module, SUITES):
        for test, function in sorted(vars(suite).items()):
            is_test = test.startswith("test_") and inspect.isfunction(function)
            if not is_test or "check" not in function.__code__.co_names:
                continue
            if not {"name", "monkeypatch"} <= set(inspect.signature(function).parameters):
                continue
            taken = 0

            def collect(network: Any, pixels: Any, name: str, monkeypatch: Any, test: str = test) -> None:
                nonlocal taken
                if taken == limit:
                    raise Enough
                taken += 1
                cases.append(make_case(f"{test} {taken}", network, pixels))

            axes: list[list[dict[str, Any]]] = [[{"name": "native-base"}]]
            for mark in getattr(function, "pytestmark", []):
                if mark.name != "parametrize" or mark.args[0] == "name":
                    continue
                keys = (
                    [key.strip() for key in mark.args[0].split(",")] if isinstance(mark.args[0], str) else mark.args[0]
                )
                axes.append(
                    [dict(zip(keys, value if len(keys) > 1 else [value], strict=True)) for value in mark.args[1]]
                )
            with pytest.MonkeyPatch.context() as outer:
                outer.setattr(suite, "check", collect)
                for values in itertools.product(*axes):
                    arguments = {key: value for part in values for key, value in part.items()}
                    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.suppress(Enough):
                        function(**arguments, monkeypatch=monkeypatch)
    return cases


# -------------------------------------------------------------------------------------------------- one mutant


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: "invalid" (does not compile), "same" (machine code), "killed" or "survived"."""

    status: str
    how: str = ""
    case: str = ""


@dataclass
class _Bench:
    """What a worker needs; set once, before the workers are forked."""

    module: Any
    original: Original
    cases: list[Case]
    watched: Any


_bench: _Bench | None = None


def _child(library: Path, cases: list[Case], write: int) -> int:
    """Run the cases against a mutant, in a process of its own; its exit status."""
    bench = _bench
    if bench is None:
        raise RuntimeError("no cases")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    use(bench.module, library)
    if [bench.module.lib.mdsnn_supported(level) for level in range(4)] != [1, 0, 0, 0]:
        return KILLED
    for place, case in enumerate(cases):
        os.pwrite(write, place.to_bytes(4, "little"), 0)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS + CPU_FACTOR * case.cpu_seconds)
        try:
            replay(case, bench.watched)
        except Different as fault:
            return KILLED if str(fault) == "differs" else TOUCHED
        except Exception:
            return RAISED
    return SURVIVED


def run_mutant(library: Path) -> Verdict:
    """Whether the cases notice the engine in `library`. Cases that killed before come first."""
    bench = _bench
    if bench is None:
        raise RuntimeError("no cases")
    cases = sorted(bench.cases, key=lambda case: -case.kills / (0.01 + case.cpu_seconds))
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            status = RAISED
            with contextlib.suppress(BaseException):
                status = _child(library, cases, file.fileno())
            os._exit(status)
        stop = time.monotonic() + WALL_SECONDS
        done, code = 0, 0
        while not done:
            done, code = os.waitpid(child, os.WNOHANG)
            if not done and time.monotonic() > stop:
                os.kill(child, signal.SIGKILL)
                done, code = os.waitpid(child, 0)
            if not done:
                time.sleep(0.005)
        reached = os.pread(file.fileno(), 4, 0)
    case = cases[int.from_bytes(reached, "little")]
    status = os.waitstatus_to_exitcode(code)
    if status == SURVIVED:
        return Verdict("survived")
    if reached:
        case.kills += 1
    reasons = {KILLED: "differs", TOUCHED: "writes elsewhere", RAISED: "raises", -signal.SIGPROF: "hangs"}
    how = reasons.get(status, "hangs" if status == -signal.SIGKILL else f"crashes ({status})")
    return Verdict("killed", how, case.name if reached else "")


def judge(job: tuple[str, Mutation]) -> Verdict:
    """Build one mutant and run it."""
    bench = _bench
    if bench is None:
        raise RuntimeError("no cases")
    build, mutation = job
    original = bench.original
    sources = {**original.sources, mutation.file: mutation.apply(original.sources[mutation.file])}
    with tempfile.TemporaryDirectory(dir=original.folder) as name:
        folder = Path(name)
        write_sources(folder, sources, build)
        same = True
        for unit in units_of():
            if unit not in original.units[build][mutation.file]:
                target = Path(unit).with_suffix(".o").name
                shutil.copyfile(original.folder / build / target, folder / target)
                continue
            code = compile_unit(folder, unit)
            if code is None:
                return Verdict("invalid")
            same &= code == original.objects[build, unit]
        if same:
            return Verdict("same", "-O1")
        verdict = run_mutant(link(folder, units_of()))
        if verdict.status != "survived":
            return verdict
        changed = original.units[build][mutation.file]
        if all(compile_unit(folder, unit, released_flags()) == original.released[build, unit] for unit in changed):
            return Verdict("same", " ".join(released_flags()))
        for unit in units_of():
            compile_unit(folder, unit, (*FLAGS, *CHECKED))
        checked = run_mutant(link(folder, units_of()))
        return dataclasses.replace(checked, how=f"{checked.how} with UBSan") if checked.status == "killed" else checked


# ------------------------------------------------------------------------------------------------------ the score


@dataclass(frozen=True)
class Row:
    """A mutant and what became of it."""

    file: str
    line: int
    function: str
    kind: str
    build: str
    before: str
    after: str
    status: str
    how: str
    case: str
    reason: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.file, self.function, self.before, self.after


def known_equivalents(path: Path) -> dict[tuple[str, str, str, str], str]:
    """Mutants found equivalent by hand: (file, function, line before, line after) -> reason."""
    if not path.exists():
        return {}
    entries = json.loads(path.read_text())
    return {(e["file"], e["function"], e["before"], e["after"]): e["reason"] for e in entries}


def score(rows: list[Row], *, equivalents: bool) -> float:
    """Killed mutants in percent of those that count; `equivalents` says whether equivalent ones do."""
    counted = [
        row for row in rows if row.status in ("killed", "survived") or (equivalents and row.status == "equivalent")
    ]
    return 100.0 * sum(row.status == "killed" for row in counted) / len(counted) if counted else 100.0


def summary(rows: list[Row], options: argparse.Namespace, sites: int, cases: int) -> dict[str, Any]:
    """The figures and every row, as JSON's types."""
    counts = {
        status: sum(row.status == status for row in rows)
        for status in ("killed", "survived", "equivalent", "same", "invalid")
    }
    return {
        "schema": "mdsnn.mutation/1",
        "seed": options.seed,
        "flags": list(FLAGS),
        "sites": sites,
        "cases": cases,
        "counts": counts,
        "score": round(score(rows, equivalents=False), 2),
        "score_with_equivalents": round(score(rows, equivalents=True), 2),
        "mutants": [dataclasses.asdict(row) for row in rows if row.status != "invalid"],
    }


def _table(head: tuple[str, ...], lines: Iterable[tuple[Any, ...]]) -> str:
    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|")

    rows = ["| " + " | ".join(map(cell, line)) + " |" for line in (head, ["---"] * len(head), *lines)]
    return "\n".join(rows)


def document(facts: dict[str, Any]) -> str:
    """docs/mutation.md."""
    rows = [Row(**row) for row in facts["mutants"]]
    counts = facts["counts"]

    def tally(key: Callable[[Row], str]) -> str:
        lines = []
        for name in sorted({key(row) for row in rows}):
            mine = [row for row in rows if key(row) == name]
            states = [sum(row.status == status for row in mine) for status in ("killed", "survived", "equivalent")]
            if sum(states):
                lines.append((name, *states, f"{score(mine, equivalents=False):.1f} %"))
        return _table(("", "killed", "survived", "equivalent", "score"), lines)

    def change(row: Row) -> tuple[str, str, str]:
        return f"{row.file}:{row.line} {row.function}", f"`{row.before}`", f"`{row.after}`"

    survivors = [(*change(row), "open") for row in rows if row.status == "survived"]
    equivalents = [(*change(row), row.reason) for row in rows if row.status == "equivalent"]
    ways = sorted({row.how for row in rows if row.status == "killed"})
    killed_by = ", ".join(f"{way} {sum(row.how == way for row in rows if row.status == 'killed')}" for way in ways)
    head = ("where", "original", "mutant")
    parts = [
        "# Mutation score of the C engine\n",
        "The formulas of the hardware model have a score of their own: [mutation-hwsim.md](mutation-hwsim.md).",
        "Written by `python tests/mutate_c.py --write`; do not edit. " + " ".join(__doc__.split("\n\n")[1].split()),
        f"**Score: {facts['score']:.1f} %** of {counts['killed'] + counts['survived']} mutants "
        f"({counts['killed']} killed, {counts['survived']} survived); {facts['score_with_equivalents']:.1f} % if the "
        f"{counts['equivalent']} found equivalent by hand count as survivors.",
        f"Drawn with seed {facts['seed']} from {facts['sites']:,} possible changes, each as likely as another, and run "
        f"through {facts['cases']} networks. {counts['invalid']} more did not compile and {counts['same']} gave the "
        f"machine code of the original (at -O1, or at the flags that the extension is built with); these do not count. "
        f"Killed because the mutant: {killed_by}.",
        " ".join(__doc__.split("\n\n")[3].split()),
        "## By file\n\n" + tally(lambda row: row.file),
        "## By kind of change\n\n" + tally(lambda row: row.kind),
        "## Survivors\n\n" + (_table((*head, "verdict"), survivors) if survivors else "None."),
        "## Equivalent, by hand\n\n" + (_table((*head, "reason"), equivalents) if equivalents else "None."),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutants", type=int, default=300, help="how many that compile to other machine code")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--min", type=float, default=90.0, help="exit status 1 below this score, in percent")
    parser.add_argument("--cases", type=int, help="at most so many networks of each test (for trials)")
    parser.add_argument("--files", nargs="*", help="only mutants of these files, for trials")
    parser.add_argument(
        "--replace", nargs=3, action="append", metavar=("FILE", "OLD", "NEW"), help="a mutant made by hand instead"
    )
    parser.add_argument("--build", choices=sorted(BUILDS), default="base", help="of --replace")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every mutant and its fate to FILE")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.relative_to(HERE.parent)}")
    return parser.parse_args(arguments)


def by_hand(text: str, file: str, old: str, new: str) -> Mutation:
    """The first `old` of a text becomes `new`."""
    start = text.find(old)
    if start < 0:
        raise SystemExit(f"{file} has no text {old!r}")
    return Mutation(file, start, start + len(old), new, "by hand", "")


def _jobs(original: Original, options: argparse.Namespace) -> list[tuple[str, Mutation]]:
    if options.replace:
        return [(options.build, by_hand(original.sources[file], file, old, new)) for file, old, new in options.replace]
    jobs = [job for job in original.mutations() if not options.files or job[1].file in options.files]
    random.Random(options.seed).shuffle(jobs)
    return jobs


def main(arguments: list[str] | None = None) -> int:
    global _bench
    options = parse(arguments)
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MDSNN_ISA="base", MDSNN_THREADS="1")
    sys.path.insert(0, str(HERE))
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr, flush=True)

    from mdsnn.kernels import build_native

    source = Path(build_native.__file__).resolve().parent / "src"
    sources = {path.name: path.read_text() for path in sorted(source.iterdir()) if path.suffix in (".c", ".h")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        builds = (options.build,) if options.replace else tuple(BUILDS)
        original = Original.build(folder, sources, builds)
        (folder / "wrapper").mkdir()
        module = wrapper(folder / "wrapper", sources["mdsnn.h"], folder / builds[0])
        use(module, folder / builds[0] / "engine.so")
        sys.modules["mdsnn.kernels._native"] = module
        from mdsnn.kernels import native

        reason = native.missing()
        if reason is not None:
            raise SystemExit(reason)
        from red_zones import Watched

        watched = Watched()
        vars(native).update(np=watched, arena=watched.arena)
        cases = suite_cases(options.cases)
        for build in builds:
            shutil.copytree(folder / build, folder / f"{build}-checked")
            for unit in units_of():
                compile_unit(folder / f"{build}-checked", unit, (*FLAGS, *CHECKED))
            link(folder / f"{build}-checked", units_of())
        for build in (*builds, *(f"{build}-checked" for build in builds)):
            use(module, folder / build / "engine.so")
            for case in cases:
                watched.touched()
                start = time.process_time()
                try:
                    replay(case, watched)
                except Different as fault:
                    raise SystemExit(f"{case.name}: the unchanged engine, built as {build}, {fault}") from None
                case.cpu_seconds = max(case.cpu_seconds, time.process_time() - start)
        seconds = sum(case.cpu_seconds for case in cases)
        say(f"{len(cases)} networks; the unchanged engine takes {seconds:.1f} s for them")
        _bench = _Bench(module, original, cases, watched)
        jobs = _jobs(original, options)
        say(f"{len(jobs)} possible mutants")
        gc.collect()
        gc.freeze()
        rows: list[Row] = []
        equivalents = known_equivalents(EQUIVALENT)
        for key in sorted(equivalents.keys() - {(m.file, m.function, *m.shown(sources[m.file])[1:]) for _, m in jobs}):
            if not options.replace and not options.files:
                say(f"{EQUIVALENT.name} names a mutant that is there no more: {' | '.join(key)}")
        counted = 0
        with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("fork")) as pool:
            queue = iter(jobs)
            pending = [(job, pool.submit(judge, job)) for job in itertools.islice(queue, 4 * options.workers)]
            while pending and counted < options.mutants:
                (build, mutation), future = pending.pop(0)
                verdict = future.result()
                line, before, after = mutation.shown(sources[mutation.file])
                row = Row(mutation.file, line, mutation.function, mutation.kind, build, before, after, **vars(verdict))
                if row.status == "survived" and row.key in equivalents:
                    row = dataclasses.replace(row, status="equivalent", reason=equivalents[row.key])
                rows.append(row)
                if row.status in ("killed", "survived"):
                    counted += 1
                    if counted % 25 == 0:
                        say(f"{counted} mutants, score {score(rows, equivalents=False):.1f} %")
                if row.status == "survived":
                    say(f"survived: {row.file}:{row.line} {row.function} ({row.build}): {row.before}  ->  {row.after}")
                pending += [(job, pool.submit(judge, job)) for job in itertools.islice(queue, 1)]
            for _, future in pending:
                future.cancel()
    facts = summary(rows, options, len(jobs), len(cases))
    counts, worth = facts["counts"], score(rows, equivalents=False)
    say(f"{', '.join(f'{count} {status}' for status, count in counts.items())}: score {worth:.1f} %")
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    if options.write:
        DOCUMENT.write_text(document(facts))
    return 0 if worth >= options.min else 1


if __name__ == "__main__":
    sys.exit(main())
