"""Threads that share a sample: the same integers for any number of them, whoever comes late or never."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from mdsnn.kernels import Engine, engine, native
from planted import assert_same_bits, assert_same_trace, seeded_case

LEVELS = [] if native.missing() else list(native.isa_levels())
WIDE = {"max_channels": 200, "max_timesteps": 20, "samples": 1}


def assert_same_counts(got: Any, want: Any) -> None:
    for which in ("spikes_in", "spikes_out"):
        for name, counts in getattr(want.activity, which).items():
            assert_same_bits(getattr(got.activity, which)[name], counts, f"{which} of {name}")


@pytest.mark.parametrize("level", LEVELS)
def test_parts_of_a_sample_are_the_sample(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation cut into 2, 3 and 64 parts: rows of planes and, where there are few, blocks of outputs."""
    monkeypatch.setenv("MDSNN_ISA", level)
    for seed in range(7000, 7012):
        network, pixels = seeded_case(seed, **({} if seed % 3 else WIDE))
        pixels = pixels[..., :1, :, :, :]
        want = Engine(network, "reference", 1).run(pixels, trace=True)
        ready = Engine(network, "native", 1)
        ready._backend._parts = 64  # where tiles would leave it to one thread, too
        for threads in (2, 3, 64):
            got = ready.run(pixels, trace=True, threads=threads)
            assert_same_trace(got.trace, want.trace)
            assert_same_counts(got, want)
            assert_same_bits(ready.run(pixels, threads=threads).logits, want.logits, "logits")


@pytest.mark.parametrize("level", LEVELS)
def test_a_call_waits_for_no_helper(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers that never come leave all the work to the call; those that come after it find nothing to do."""
    monkeypatch.setenv("MDSNN_ISA", level)
    late: list[tuple[Any, ...]] = []

    class Never:
        def submit(self, *task: Any) -> Any:
            late.append(task)
            return self

        def cancel(self) -> bool:
            return False

    network, pixels = seeded_case(7001, samples=1)
    want = Engine(network, "reference", 1).run(pixels, trace=True)
    monkeypatch.setattr(native, "workers", Never)
    ready = Engine(network, "native", 3)
    assert_same_trace(ready.run(pixels, trace=True).trace, want.trace)
    assert not late  # a small sample is one thread's; let it be shared all the same
    ready._backend._parts = 3
    got = ready.run(pixels, trace=True)
    assert_same_trace(got.trace, want.trace)
    assert len(late) == 2
    before = [array.copy() for array in (got.logits, *got.activity.spikes_in.values())]
    for task, *arguments in late:
        task(*arguments)
    for array, kept in zip((got.logits, *got.activity.spikes_in.values()), before, strict=True):
        assert_same_bits(array, kept, "a result after a late helper")


def test_many_calls_share_the_helpers() -> None:
    network, pixels = seeded_case(7003, samples=5)
    ready = Engine(network, None, 3)
    want = Engine(network, "reference", 1).run(pixels).logits
    with ThreadPoolExecutor(6) as pool:
        tasks = [(n, pool.submit(ready.run, pixels[..., : n + 1, :, :, :])) for n in (0, 1, 2, 4) for _ in range(5)]
        for n, task in tasks:
            assert_same_bits(task.result().logits, want[: n + 1], f"logits of {n + 1} samples")


def test_a_fault_in_one_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    network, pixels = seeded_case(7003, samples=5)
    ready = Engine(network, "reference", 3)
    run = ready._backend.run

    def fail(part: Any, *rest: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("no room")
        return run(part, *rest)

    monkeypatch.setattr(ready._backend, "run", fail)
    waiting = threading.Event()
    monkeypatch.setattr(engine, "workers", lambda: _Hasty(waiting))
    with pytest.raises(MemoryError, match="no room"):
        ready.run(pixels)


class _Hasty:
    """Runs each task at once, in a thread of its own, before the caller does anything."""

    def __init__(self, _: threading.Event) -> None:
        self.pool = ThreadPoolExecutor(1)

    def submit(self, task: Any) -> Any:
        future = self.pool.submit(task)
        future.exception()
        return future


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_workers_of_its_own() -> None:
    network, pixels = seeded_case(7003, samples=5)
    want = Engine(network, None, 2).run(pixels).logits  # starts the parent's
    child = os.fork()
    if child == 0:
        same = np.array_equal(Engine(network, None, 2).run(pixels).logits, want)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
