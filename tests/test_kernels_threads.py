"""Threads that share a sample: the same integers for any number of them, whoever comes late or never."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from mdsnn.kernels import Engine, engine, native
from mdsnn.kernels.formats import Grid
from mdsnn.kernels.network import (
    Add,
    BnAffine,
    Conv,
    Flatten,
    InputSpec,
    InputTable,
    IntegerNetwork,
    Lif,
    Node,
    Readout,
    Requantize,
)
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
        ready._backend._parts = 64  # a small sample is one thread's otherwise
        for threads in (2, 3, 64):
            got = ready.run(pixels, trace=True, threads=threads)
            assert_same_trace(got.trace, want.trace)
            assert_same_counts(got, want)
            got = ready.run(pixels, threads=threads)  # the LIFs' short ways; parts of tiles by outputs
            assert_same_bits(got.logits, want.logits, "logits")
            assert_same_counts(got, want)


def _layers(bits: int, height: int, width: int) -> tuple[IntegerNetwork, np.ndarray]:
    """Convolutions with more input than weights, then fewer; a shortcut of codes, a stride of 2, an odd number of
    channels and a last plane of three groups of tiles."""
    rng = np.random.default_rng([bits, height, width])
    top = 2 ** (bits - 1) - 1
    nodes: list[Node] = [InputTable("input", rng.integers(-128, 128, (2, 256)))]

    def conv(source: str, c_out: int, c_in: int, kernel: int, stride: int) -> str:
        name, reads = f"conv{len(nodes)}", 70 if source == "input" else 4 if source.startswith("codes") else 0.6
        weight = rng.integers(-top, top + 1, (c_out, c_in, kernel, kernel))
        nodes.append(Conv(name, source, weight, bits, stride, kernel // 2))
        deviation = 0.6 * top * reads * kernel * c_in**0.5  # of the sums, about; 250 behind bn
        factor = np.maximum(1, rng.uniform(0.5, 1.5, c_out) * 250 * 4096 / deviation).astype(int)
        nodes.append(BnAffine(f"bn{name}", name, factor, rng.integers(-(2**19), 2**19, c_out), np.full(c_out, 12)))
        return f"bn{name}"

    def lif(source: str) -> str:
        name, codes = f"lif{len(nodes)}", 2 ** (bits - 1) - 1
        thresholds = np.sort(rng.integers(-600, 600, 2 * codes))
        nodes.append(Lif(name, source, bits, np.arange(-codes, codes + 1) * 600 // codes, thresholds, 200))
        return name

    def add(source: str, other: str) -> str:
        nodes.append(Add(f"add{len(nodes)}", source, other))
        return nodes[-1].name

    x = conv("input", 64, 2, 3, 1)
    x = add(conv(lif(conv(lif(x), 64, 64, 3, 1)), 64, 64, 3, 1), x)
    codes = f"codes{len(nodes)}"
    nodes.append(Requantize(codes, x, 6, 4))
    x = add(conv(lif(conv(lif(x), 150, 64, 3, 2)), 150, 150, 3, 1), conv(codes, 150, 64, 1, 2))
    x = lif(conv(lif(x), 160, 150, 3, 1))
    nodes.append(Flatten("flat", x))
    features = 160 * ((height + 1) // 2) * ((width + 1) // 2)
    nodes.append(Readout("readout", "flat", rng.integers(-7, 8, (3, features)), 4, np.zeros(3, int)))
    network = IntegerNetwork(tuple(nodes), InputSpec(2, height, width), 4, Grid())
    return network, rng.integers(0, 256, (1, 2, height, width), np.uint8)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("height", "width"), [(24, 8), (6, 6), (5, 17), (2, 30)])
def test_parts_of_many_shapes(level: str, bits: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDSNN_ISA", level)
    network, pixels = _layers(bits, height, width)
    want = Engine(network, "reference", 1).run(pixels)
    assert all(0.02 < want.activity.density(lif.name) < 0.98 for lif in network.lifs)
    ready = Engine(network, "native", 1)
    ready._backend._parts = 64
    for threads in (1, 2, 3, 5, 64):
        got = ready.run(pixels, threads=threads)
        assert_same_bits(got.logits, want.logits, f"logits by {threads}")
        assert_same_counts(got, want)


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
