"""Replay known answers on ARM: python tests/replay_arm.py [--planted 40] [--each 3] [--optimize 2 3] [--file FILE]

Packs networks with kernels/plan.py for the base instruction set, and writes plans, pixels and the answers of
kernels/reference.py as one file: planted networks, and those of test_kernels_bit_exact.py and test_kernels_corners.py.
tests/arm/replay.c is compiled with the C engine for this machine and for 64-bit ARM, under strict warnings, and replays
the file here and under qemu: h, s and q of every neuron and step, logits and counts, whole and step by step.

To look for undefined behaviour on ARM: --flag=-fsanitize=undefined --flag=-fsanitize-undefined-trap-on-error.
Exit status 1 if anything differs. Not a test file; needs gcc, gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and
qemu-user (Debian's names).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from mdsnn.kernels import Engine, build_native, native

DRIVER = Path(__file__).resolve().parent / "arm" / "replay.c"
SOURCE = Path(build_native.__file__).resolve().parent / "src"
FLAGS = ("-std=c11", "-static", "-Wall", "-Wextra", "-Wconversion", "-Werror")
COMPILER = "aarch64-linux-gnu-gcc"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
EQUAL, DIFFERENT, UNUSABLE = 0, 1, 2
"""Exit statuses of the driver."""
_ALIGN = 64

# ------------------------------------------------------------------------------------------------- the networks


@dataclass(frozen=True)
class KnownCase:
    """A network packed for the base instruction set, pixels for it, and the reference's answer with its trace."""

    name: str
    engine: Any
    pixels: Any
    answer: Any

    @property
    def plan(self) -> Any:
        return self.engine._backend._plan


def known_cases(planted: int, each: int | None = None) -> list[KnownCase]:
    """`planted` seeded networks of up to 130 channels, and `each` (None: all) of every test of the suites."""
    from mutate_c import suite_cases

    from planted import seeded_case

    cases = []
    with mock.patch.dict(os.environ, MDSNN_ISA="base"):
        for seed in range(planted):
            network, pixels = seeded_case(1000 + seed, max_channels=130, max_timesteps=32)
            answer = Engine(network, "reference", 1).run(pixels, trace=True)
            cases.append(KnownCase(f"planted {seed}", Engine(network, "native", 1), pixels, answer))
        cases += [KnownCase(case.name, case.engine, case.pixels, case.run) for case in suite_cases(each)]
    return cases


# ------------------------------------------------------------------------------------------------------ the file


@dataclass
class _Image:
    """A file in the making. `pointers` are the places that hold an offset where the C structure has a pointer."""

    data: bytearray = field(default_factory=bytearray)
    pointers: list[int] = field(default_factory=list)

    def add(self, content: Any) -> int:
        """Append bytes, or an array in C order; returns their offset."""
        self.data += bytes(-len(self.data) % _ALIGN)
        offset = len(self.data)
        self.data += content if isinstance(content, bytes) else np.ascontiguousarray(content).tobytes()
        return offset

    def name(self, text: str) -> int:
        return self.add(text.encode() + b"\0")

    def table(self, rows: Iterable[tuple[int, ...]]) -> int:
        """Append rows of 64-bit integers."""
        return self.add(b"".join(struct.pack(f"<{len(row)}q", *row) for row in rows))

    def plan(self, plan: Any) -> int:
        """Append a plan with everything it points to; returns the plan's own offset."""
        ffi, targets, placed = plan.ffi, {}, {}
        for kept in plan.keep:
            address = kept.ctypes.data if isinstance(kept, np.ndarray) else int(ffi.cast("uintptr_t", kept))
            targets[address] = kept

        def place(address: int) -> int:
            if address not in placed:
                kept = targets[address]
                placed[address] = self.add(kept) if isinstance(kept, np.ndarray) else structures(kept)
            return int(placed[address])

        def structures(kept: Any) -> int:
            content = bytearray(ffi.buffer(kept))
            element = ffi.typeof(kept).item
            size = ffi.sizeof(element)
            places = []
            for start in range(0, len(content), size):
                for _, member in element.fields:
                    at = start + member.offset
                    if member.type.kind == "pointer" and any(content[at : at + 8]):
                        (address,) = struct.unpack_from("<Q", content, at)
                        struct.pack_into("<Q", content, at, place(address))
                        places.append(at)
            offset = self.add(bytes(content))
            self.pointers += [offset + at for at in places]
            return offset

        return structures(plan.struct)

    def case(self, case: KnownCase) -> tuple[int, ...]:
        """Append a case; returns its row, a known_case of replay.c."""
        backend, plan, network = case.engine._backend, case.plan, case.engine.network
        pixels = np.ascontiguousarray(case.pixels)
        activity, lifs = case.answer.activity, case.answer.trace.lifs
        counts = np.zeros((len(plan.counters), network.timesteps), np.int64)
        for rows, known in ((backend._spikes_in, activity.spikes_in), (backend._spikes_out, activity.spikes_out)):
            for name, row in rows.items():
                counts[row] = known[name]
        traces = self.table(
            (
                self.name(lif.name),
                *network.proof.shapes[lif.name],
                *(self.add(getattr(lifs[lif.name], x)) for x in "hsq"),
            )
            for lif in network.lifs
        )
        return (
            self.name(case.name),
            self.plan(plan),
            self.add(pixels),
            pixels.strides[0] if pixels.ndim == 5 else 0,
            pixels.shape[-4],
            network.timesteps,
            self.add(case.answer.logits),
            self.add(counts),
            traces,
            len(network.lifs),
        )


def image(cases: list[KnownCase]) -> bytes:
    """The file of known answers: what replay.c says of it, and tables in the order they were needed."""
    file, header = _Image(), struct.Struct("<8s9q")
    file.add(bytes(header.size))
    table = file.table([file.case(case) for case in cases])
    pointers = file.table([(place,) for place in file.pointers])
    module = native._module()
    sizes = (module.ffi.sizeof(name) for name in ("mdsnn_plan", "mdsnn_op", "mdsnn_value"))
    whole = len(file.data), module.lib.MDSNN_CONTRACT, *sizes, table, len(cases), pointers, len(file.pointers)
    header.pack_into(file.data, 0, b"mdsnnKAT", *whole)
    return bytes(file.data)


# ----------------------------------------------------------------------------------------------- the two machines


def missing() -> str | None:
    """Why ARM cannot be tried here, with the line that cures it; None if it can."""
    absent = [] if shutil.which(COMPILER) else [COMPILER]
    absent += [] if emulator() else [EMULATORS[0]]
    if not absent:
        return None
    cure = "apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
    return f"{' and '.join(absent)} not installed: {cure}"


def emulator() -> str | None:
    """Path of what runs programs of 64-bit ARM here."""
    return next((path for name in EMULATORS if (path := shutil.which(name))), None)


def compile_driver(compiler: str, target: Path, optimize: int, flags: Sequence[str] = ()) -> Path:
    """The driver with the C engine, as one static program at `target`; `flags` are further ones of the compiler."""
    units = [str(SOURCE / name) for name in build_native.SOURCES]
    command = [compiler, *FLAGS, f"-O{optimize}", *flags, f"-I{SOURCE}", str(DRIVER), *units, "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def replay(command: list[str], file: Path) -> tuple[int, str]:
    """Exit status of the driver on a file of known answers, and what it said."""
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=600)
    return done.returncode, (done.stdout + done.stderr).strip()


def vector_instructions(program: Path) -> int:
    """How many instructions of an ARM program add, compare or multiply vectors of 8, 16 or 32-bit integers (NEON)."""
    tool = COMPILER.replace("gcc", "objdump")
    listing = subprocess.run([tool, "-d", str(program)], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\n\n[0-9a-f]+ <", listing)
    ours = "\n".join(text for text in functions if re.match(r"mdsnn_|\w+_base[.>]", text))
    return len(re.findall(r"\t(?:add|sub|cmgt|mul|mla)\tv\d+\.(?:16b|8h|4s),", ours))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--planted", type=int, default=40, help="planted networks")
    parser.add_argument("--each", type=int, help="networks of every test of the suites; all if left out")
    parser.add_argument("--optimize", type=int, nargs="+", default=[2, 3], help="optimization levels of the compiler")
    parser.add_argument("--flag", action="append", default=[], help="a further flag of the compiler: --flag=-march=...")
    parser.add_argument("--file", type=Path, help="also leave the known answers here")
    options = parser.parse_args()
    reason = native.missing() or missing()
    if reason is not None:
        raise SystemExit(reason)
    runner = emulator()
    worst = EQUAL
    with tempfile.TemporaryDirectory() as folder:
        file = options.file or Path(folder, "known")
        file.write_bytes(image(known_cases(options.planted, options.each)))
        print(f"{file.stat().st_size} bytes of known answers", flush=True)
        for compiler, command in (("gcc", []), (COMPILER, [str(runner)])):
            for optimize in options.optimize:
                program = compile_driver(compiler, Path(folder, f"{compiler}-{optimize}"), optimize, options.flag)
                begun = time.perf_counter()
                status, said = replay([*command, str(program)], file)
                print(f"{compiler} -O{optimize}: {said} ({time.perf_counter() - begun:.1f} s)", flush=True)
                worst = max(worst, status if status >= 0 else UNUSABLE)
    return min(worst, 1)


if __name__ == "__main__":
    sys.exit(main())
