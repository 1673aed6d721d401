"""The portable C engine on ARM: known answers replayed under qemu, and the driver that replays them (tests/arm).

Skipped where there is no C compiler, cross compiler or qemu, unless MDSNN_TEST_ARM=required. tests/replay_arm.py does
the same outside of pytest.
"""

from __future__ import annotations

import functools
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import replay_arm
from replay_arm import COMPILER, DIFFERENT, EQUAL, UNUSABLE, KnownCase, image, known_cases, replay

from mdsnn.kernels import native

TARGETS = ("host", "arm -O2", "arm -O3")


def need(reason: str | None) -> None:
    """Skip where there is a reason to, or fail if ARM is required."""
    if reason is not None and os.environ.get("MDSNN_TEST_ARM") == "required":
        pytest.fail(f"MDSNN_TEST_ARM=required, but {reason}")
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cases() -> list[KnownCase]:
    need(native.missing())
    return known_cases(planted=40)


@pytest.fixture(scope="module")
def known(cases: list[KnownCase], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("known") / "answers"
    path.write_bytes(image(cases))
    yield path
    path.unlink()  # pytest keeps the folders of several runs, and this is some 60 MB


@pytest.fixture(scope="module")
def command_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """How to run the driver as compiled for a target, compiled once."""
    folder = tmp_path_factory.mktemp("driver")

    @functools.cache
    def command_for(target: str) -> list[str]:
        program = folder / target.replace(" ", "")
        if target == "host":
            need(None if shutil.which("gcc") else "gcc is not installed")
            return [str(replay_arm.compile_driver("gcc", program, 1))]
        need(replay_arm.missing())
        return [str(replay_arm.emulator()), str(replay_arm.compile_driver(COMPILER, program, int(target[-1])))]

    return command_for


@pytest.fixture(params=TARGETS)
def command(request: pytest.FixtureRequest, command_for: Callable[[str], list[str]]) -> list[str]:
    """How to run the driver, on every target in turn."""
    return command_for(request.param)


def test_every_integer_is_the_reference_s(command: list[str], cases: list[KnownCase], known: Path) -> None:
    assert len(cases) > 500
    assert replay(command, known) == (EQUAL, f"{len(cases)} networks equal")


def test_the_networks_reach_every_kernel(cases: list[KnownCase]) -> None:
    """Every operation, method of a convolution, search and width of the stream that the base build has."""
    ops = []
    for case in cases:
        plan = case.plan.struct
        ops += [plan.ops[i] for i in range(plan.op_count)]
    parts = [part[0] for op in ops for part in (op.bn, op.fire) if part != native._module().ffi.NULL]
    lib = native._module().lib
    assert {op.kind for op in ops} == set(range(lib.MDSNN_FUSED + 1))
    methods = {lib.MDSNN_EVENTS_8, lib.MDSNN_EVENTS_16, lib.MDSNN_PAIRS, lib.MDSNN_GROUPED}
    assert {op.method for op in ops if op.kind == lib.MDSNN_FUSED} == methods
    lifs = [op for op in ops + parts if op.kind == lib.MDSNN_LIF]
    assert {op.search for op in lifs} == {lib.MDSNN_COMPARE, lib.MDSNN_TABLE, lib.MDSNN_BISECT}
    assert {(op.pre_fire, op.soft) for op in lifs} == {(0, 0), (0, 1), (1, 0)}
    assert {op.wide for op in ops + parts if op.kind == lib.MDSNN_BN_AFFINE} == {0, 1}
    types = {value.type for case in cases for value in case.plan.values}
    assert types == {lib.MDSNN_I8, lib.MDSNN_I16, lib.MDSNN_I32}
    widths = {op.width for op in ops if op.kind == lib.MDSNN_FUSED}
    assert widths == {lib.MDSNN_NARROW, lib.MDSNN_CLAMPED, lib.MDSNN_WIDE}
    assert {case.engine.network.input.coding for case in cases} == {"image", "events"}


@pytest.mark.parametrize("what", ["h", "s", "q", "logits", "counts"])
def test_one_wrong_integer_is_found_and_named(
    command: list[str], cases: list[KnownCase], what: str, tmp_path: Path
) -> None:
    """The last integer of each kind is changed in the file: the driver must name it and its place."""
    case = next(case for case in cases if len(case.engine.network.lifs) > 1)
    network, trace = case.engine.network, case.answer.trace
    lif = network.lifs[-1].name
    if what == "logits":
        array = trace.logits
        place = f"sample {array.shape[0] - 1}, class {array.shape[1] - 1}"
    elif what == "counts":
        array = case.answer.activity.spikes_out[lif]
        place = f"count {case.plan.counters[lif]} of step {len(array) - 1}"
    else:
        array = getattr(trace.lifs[lif], what)
        last = zip(("step", "sample", "channel", "y", "x"), array.shape, strict=True)
        place = f"{what} of '{lif}' at " + ", ".join(f"{axis} {size - 1}" for axis, size in last)
    right = array.reshape(-1)[-1].item()
    wrong = 1 - right if what == "s" else right - 1 if right == 127 else right + 1
    array.reshape(-1)[-1] = wrong
    try:
        (tmp_path / "answers").write_bytes(image([case]))
    finally:
        array.reshape(-1)[-1] = right
    status, said = replay(command, tmp_path / "answers")
    assert status == DIFFERENT
    assert said.startswith(f"{case.name}, with a trace: ")
    assert said.endswith(f"{place}: got {right}, want {wrong}")


def test_a_file_of_another_build_or_cut_short_is_refused(
    command: list[str], cases: list[KnownCase], tmp_path: Path
) -> None:
    content, other = image(cases[:1]), tmp_path / "other"
    for at, message in ((0, "not a file of known answers"), (16, "another mdsnn.h"), (32, "another mdsnn.h")):
        changed = bytearray(content)
        struct.pack_into("<q", changed, at, struct.unpack_from("<q", changed, at)[0] + 1)
        other.write_bytes(changed)
        status, said = replay(command, other)
        assert (status, message in said) == (UNUSABLE, True), said
    for cut in (content[:-1], content[:100], content + b"\0"):
        other.write_bytes(cut)
        status, said = replay(command, other)
        assert (status, "not whole" in said) == (UNUSABLE, True), said


def test_the_file_keeps_every_constant(cases: list[KnownCase]) -> None:
    """A plan in the file points to the bytes that the plan in memory points to."""
    plan = cases[0].plan
    content = image(cases[:1])
    pointers, count = struct.unpack_from("<2q", content, 64)
    places = struct.unpack_from(f"<{count}q", content, pointers)
    starts = {struct.unpack_from("<q", content, place)[0] for place in places}
    arrays = [kept for kept in plan.keep if isinstance(kept, np.ndarray) and kept.size]
    assert len(starts) == len(plan.keep) - sum(isinstance(kept, np.ndarray) and not kept.size for kept in plan.keep)
    assert all(start % 64 == 0 for start in starts)
    assert all(any(content.startswith(array.tobytes(), start) for start in starts) for array in arrays)


@pytest.mark.parametrize("target", TARGETS[1:])
def test_arm_s_kernels_are_vectors(target: str, command_for: Callable[[str], list[str]]) -> None:
    """The 128-bit vectors of the source become NEON, not loops over scalars."""
    assert replay_arm.vector_instructions(Path(command_for(target)[1])) > 100


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if "aarch64" in name else name)
    reason = replay_arm.missing()
    assert reason is not None
    assert reason.startswith("aarch64-linux-gnu-gcc and qemu-aarch64 not installed: apt-get install ")
    monkeypatch.setenv("MDSNN_TEST_ARM", "required")
    with pytest.raises(pytest.fail.Exception, match="required, but aarch64-linux-gnu-gcc"):
        need(reason)
    monkeypatch.delenv("MDSNN_TEST_ARM")
    with pytest.raises(pytest.skip.Exception, match="apt-get install"):
        need(reason)
