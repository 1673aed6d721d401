"""Where the time of a run goes, operation by operation, beside what the processor could do at most.

A roofline: an operation cannot be faster than its additions or products at the rate of a loop of the one instruction
that does them, nor than its weights at the rate at which this machine reads a buffer as large as all weights. Both
rates are measured here and now. Everything is of one thread of the C engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import native
from .errors import ConfigError
from .network import Conv, IntegerNetwork, Linear

STAGES = ("gather", "sums", "epilogue", "other")
"""Lists of spikes or the input laid out; sums of products; bn, add and LIF; the rest."""
_WORK = {
    "events": "byte_adds",
    "pairs": "pair_products",
    "bytes": "pair_products",
    "grouped": "pair_products",
    "tiles": "tile_products",
}


@dataclass(frozen=True)
class Ceilings:
    """Units a second of each kind of work (see native.strain); 0 where there is no such instruction."""

    byte_adds: float
    pair_products: float
    tile_products: float
    weight_reads: float


@dataclass(frozen=True)
class LayerProfile:
    """One operation, per sample.

    ms          by stage, in the order of STAGES
    work        byte additions or products that it needs: of the spikes there were, or dense
    ceiling_ms  the least time for that work, or for reading its weights, whichever is more; 0 where neither is known
    bound       "work" or "weights": which of the two
    """

    name: str
    method: str
    ms: tuple[float, float, float, float]
    work: float
    weight_bytes: int
    ceiling_ms: float
    bound: str

    @property
    def total_ms(self) -> float:
        return sum(self.ms)


@dataclass(frozen=True)
class Profile:
    """All operations of a run, its milliseconds a sample, and the ceilings they stand against.

    run_ms  the whole call, with Python's share
    """

    isa: str
    samples: int
    run_ms: float
    ceilings: Ceilings
    layers: tuple[LayerProfile, ...]

    @property
    def ceiling_ms(self) -> float:
        """Sum of the layers' ceilings."""
        return sum(layer.ceiling_ms for layer in self.layers)


def profile(network: IntegerNetwork, pixels: npt.NDArray[np.uint8], *, seconds: float = 1.0) -> Profile:
    """Run `network` again and again for about `seconds`, and tell the least time of every stage of every operation.

    pixels  uint8 [N, C, H, W] or [T, N, C, H, W], as Engine.run takes them
    raises  MissingError  if the C extension is not there      ConfigError  for a time that is not above 0
    """
    if not seconds > 0.0:
        raise ConfigError(f"seconds = {seconds} is not above 0")
    backend = native.NativeBackend(network)
    samples = int(pixels.shape[-4])
    clock, counter = time.perf_counter(), native.ticks()
    calls: list[float] = []
    least: npt.NDArray[np.int64] | None = None
    while not calls or len(calls) < 3 or time.perf_counter() - clock < seconds:
        start = time.perf_counter()
        result, ticks = backend.timed(pixels)
        calls.append(time.perf_counter() - start)
        least = ticks if least is None else np.minimum(least, ticks)
    assert least is not None
    ms = 1e3 * (time.perf_counter() - clock) / (native.ticks() - counter) / samples  # of a tick, per sample
    operations = backend.operations()
    ceilings = measure_ceilings(backend.isa, sum(operation.weight_bytes for operation in operations))
    layers = []
    for operation, stages in zip(operations, least * ms, strict=True):
        work, peak = 0.0, 0.0
        if operation.conv is not None:
            spikes = int(result.activity.spikes_in[operation.conv].sum()) / samples
            work = _work(network, operation.conv, operation.method, spikes)
            peak = float(getattr(ceilings, _WORK[operation.method.partition(",")[0]]))
        by_work = 1e3 * work / peak if peak else 0.0
        by_weights = 1e3 * operation.weight_bytes / ceilings.weight_reads
        gather, sums, epilogue, whole = map(float, stages)
        layers.append(
            LayerProfile(
                operation.name,
                operation.method,
                (gather, sums, epilogue, max(0.0, whole - gather - sums - epilogue)),
                work,
                operation.weight_bytes,
                max(by_work, by_weights),
                "weights" if by_weights > by_work else "work",
            )
        )
    return Profile(backend.isa, samples, 1e3 * min(calls) / samples, ceilings, tuple(layers))


def _work(network: IntegerNetwork, name: str, method: str, spikes: float) -> float:
    """Byte additions of a sample's spikes, or its dense products; a 16-bit one takes the place of two of 8."""
    node = network[name]
    assert isinstance(node, Conv | Linear)
    if method.startswith("events"):
        window = node.weight[0, 0].size / (node.stride**2 if isinstance(node, Conv) else 1)
        return float(spikes * len(node.weight) * window * (1 if "8 bits" in method else 2))
    return network.layer_macs(node) / (2 if method == "bytes" else 1)


def measure_ceilings(isa: str, weight_bytes: int) -> Ceilings:
    """What one thread can do at most at a level of the C engine; reads of a buffer as large as all weights."""
    return Ceilings(
        _rate(lambda rounds: native.strain(isa, "byte_adds", 0, rounds)),
        _rate(lambda rounds: native.strain(isa, "pair_products", 0, rounds)),
        _rate(lambda rounds: native.strain(isa, "tile_products", 0, rounds)),
        _rate(lambda rounds: native.strain(isa, "reads", max(weight_bytes, 1 << 12), rounds)),
    )


def _rate(work: Callable[[int], int]) -> float:
    """Units a second: the best of ten goes of at least 2 ms."""
    rounds, best = 1, 0.0
    for _ in range(10):
        while True:
            start = time.thread_time()  # of this thread alone, should others want its core
            done = work(rounds)
            elapsed = time.thread_time() - start
            if elapsed >= 2e-3 or not done:
                break
            rounds *= 2
        best = max(best, done / elapsed)
    return best
