"""A known-answer test of the C engine at one instruction set: 64 small networks and what the reference says of them.

A compiler at fault, an emulator, or a processor that does not do what it says would give other integers in silence.
So a level is tried before its first use (native.py), and left alone where it fails. The networks are made here by a
fixed rule, so that they are the same on every machine; their thresholds lie among the values that membranes reach,
their channels stand about the width of a vector. `ANSWERS` holds a CRC-32 of h, s, q and logits of each, from the NumPy
reference: `python -m mdsnn.kernels.selftest` prints them, and a test compares.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from . import reference
from .engine import NodeBackend, Result, Trace
from .errors import NetworkError
from .formats import Array, Grid, accumulator_bounds
from .network import (
    Add,
    BnAffine,
    BnDense,
    Conv,
    Flatten,
    InputSpec,
    InputTable,
    IntegerNetwork,
    Lif,
    Linear,
    MaxPool,
    Node,
    Readout,
    Requantize,
    SumPool,
)

NETWORKS = 64
"""How many there are."""
_CHANNELS = (17, 64, 3, 33, 65, 16, 48, 1)
_STEPS = (2, 4, 1, 3, 5, 4)
_BITS = (4, 2, 8, 5, 4, 3, 6, 7)

Pixels = npt.NDArray[np.uint8]


class _Draws:
    """Integers by splitmix64 over a counter: the same everywhere, which no generator of NumPy promises for good."""

    def __init__(self, seed: int) -> None:
        self._at, self._pool = seed << 32, np.zeros(0, np.uint64)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Array:
        """int64 in low..high."""
        count = math.prod(shape)
        if count > len(self._pool):
            self._refill(max(count, 4096))
        drawn, self._pool = self._pool[:count], self._pool[count:]
        return (drawn % np.uint64(high - low + 1)).astype(np.int64).reshape(shape) + low

    def _refill(self, count: int) -> None:
        z = np.arange(self._at, self._at + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # wraps
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        self._at, self._pool = self._at + count, z ^ (z >> np.uint64(31))


class _Builder:
    """Network `number`. Each of its features comes with a period of its own, so that they meet in many ways."""

    def __init__(self, number: int) -> None:
        self.number, self.draws, self.nodes = number, _Draws(number + 1), list[Node]()
        self.bits = _BITS[number % 8]
        self.span: dict[str, tuple[int, int]] = {}

    def add(self, node: Node, lo: int, hi: int) -> str:
        self.nodes.append(node)
        self.span[node.name] = (lo, hi)
        return node.name

    def weight(self, *shape: int) -> Array:
        """Codes of the layer; of a large one the same 4,093 again and again, a prime, so that no two rows are alike."""
        top = 2 ** (self.bits - 1) - 1
        count = math.prod(shape)
        drawn = self.draws.integers(-top, top, (min(count, 4093),)).astype(np.int8)
        return np.resize(drawn, shape)

    def conv(self, source: str, outs: int, ins: int, kernel: int, stride: int = 1, groups: int = 1) -> str:
        """A convolution with half its kernel as padding, and its bn."""
        name = f"conv{len(self.nodes)}"
        weight = self.weight(outs, ins // groups, kernel, kernel)
        self.add(Conv(name, source, weight, self.bits, stride, kernel // 2, groups), 0, 0)
        return self.bn(name, weight, self.span[source])

    def bn(self, source: str, weight: Array, span: tuple[int, int]) -> str:
        """To a stream of some hundreds; every third network's by table if it is small, every ninth's beyond 32 bits."""
        name, outs, draws = f"bn_{source}", len(weight), self.draws
        lo, hi = accumulator_bounds(weight, *span)
        spread = np.maximum(hi - lo, 1) // 6 + 1
        if self.number % 3 == 0 and int((hi - lo + 1).sum()) < 1 << 16:
            sizes = hi - lo + 1
            acc = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes - lo, sizes)
            table = np.clip(acc * 700 // np.repeat(spread, sizes) + 60, -4096, 4096)
            return self.add(BnDense(name, source, table), 0, 0)
        shift = 20 if self.number % 9 == 4 else 8
        multiplier = (draws.integers(200, 700, (outs,)) << shift) // spread * (1 - 2 * draws.integers(0, 1, (outs,)))
        offset = draws.integers(-200, 300, (outs,)) << shift
        return self.add(BnAffine(name, source, multiplier, offset, np.full(outs, shift)), 0, 0)

    def lif(self, source: str, reach: int = 1) -> str:
        """Thresholds and v_th inside the stream's common values, times `reach`."""
        top, draws = 2 ** (self.bits - 1) - 1, self.draws
        decode = np.sort(draws.integers(-250, 250, (2 * top + 1,)))
        thresholds = np.sort(draws.integers(-300, 300, (2 * top,))) * reach
        name, v_th = f"lif{len(self.nodes)}", int(draws.integers(20, 200, (1,))[0]) * reach
        if self.number % 7 == 3:
            node = Lif(name, source, self.bits, decode, thresholds, v_th, "soft", v_th // 2 + 1)
        elif self.number % 7 == 5:
            node = Lif(name, source, self.bits, decode, thresholds, v_th, quantize="pre_fire", q_th=top // 2)
        else:
            node = Lif(name, source, self.bits, decode, thresholds, v_th)
        return self.add(node, 0, 1)

    def build(self) -> tuple[IntegerNetwork, Pixels]:
        number, draws = self.number, self.draws
        wide, steps = _CHANNELS[number % 8], _STEPS[number % 6]
        height, width, colours = 4 + number % 3, 5 + number % 2, 1 + number % 3
        events = number % 4 == 1
        lo, hi = (0, 127) if events else (-128, 127)
        x = self.add(InputTable("input", draws.integers(lo, hi, (colours, 256))), lo, hi)
        stem = self.conv(x, wide, colours, (3, 1)[number % 2])
        spikes, stream, shape = self.lif(stem), stem, (height, width)
        match number % 5:
            case 0:  # a block with its residual add
                inner = self.lif(self.conv(spikes, wide, wide, 3))
                stream = self.add(Add("out", self.conv(inner, wide, wide, 3), stem), 0, 0)
            case 1:  # one that halves the size
                codes = self.add(Requantize("codes", stem, 5, 8), -127, 127)
                skip, shape = self.conv(codes, wide + 3, wide, 1, 2), ((height + 1) // 2, (width + 1) // 2)
                stream = self.add(Add("out", self.conv(spikes, wide + 3, wide, 3, 2), skip), 0, 0)
                wide += 3
            case 2:  # pools
                pool = SumPool("pool", spikes, 2, 2, 2) if number % 2 else MaxPool("pool", spikes, 2, 2)
                pooled, shape = self.add(pool, 0, 4 if number % 2 else 1), (height // 2, width // 2)
                stream, wide = self.conv(pooled, wide + 1, wide, 1), wide + 1
            case 3:  # groups
                stream = self.conv(spikes, wide, wide, 3, groups=wide if number % 2 else 1)
            case _:  # a stream beyond 16 bits
                stream = self.conv(spikes, wide, wide, 3)
                for _ in range(5):
                    stream = self.add(Add(f"sum{len(self.nodes)}", stream, stream), 0, 0)
        x, features = self.lif(stream, 32 if number % 5 == 4 else 1), wide
        if number % 3:
            x = self.add(SumPool("head", x, *shape), 0, shape[0] * shape[1])
        else:
            x, features = self.add(Flatten("flat", x), 0, 1), wide * shape[0] * shape[1]
            weight = self.weight(20, features)
            x, features = self.lif(self.bn(self.add(Linear("fc", x, weight, self.bits), 0, 0), weight, (0, 1))), 20
        self.add(Readout("readout", x, self.weight(5, features), self.bits, draws.integers(-99, 99, (5,))), 0, 0)
        coding = "events" if events else "image"
        network = IntegerNetwork(tuple(self.nodes), InputSpec(colours, height, width, coding), steps, Grid())
        frames = (steps, 1) if events else (1,)
        return network, draws.integers(0, 255, (*frames, colours, height, width)).astype(np.uint8)


def network(number: int) -> tuple[IntegerNetwork, Pixels]:
    """Network `number`, 0..NETWORKS - 1, and one sample for it."""
    return _Builder(number).build()


def _trace(result: Result) -> Trace:
    if result.trace is None:
        raise NetworkError("the self-test's run returned no trace")
    return result.trace


def checksum(result: Result) -> int:
    """CRC-32 of logits, and of h, s and q of every LIF, as little-endian bytes in C order."""
    trace = _trace(result)
    code = zlib.crc32(trace.logits.astype("<i4").tobytes())
    for lif in trace.lifs.values():
        code = zlib.crc32(lif.h.astype("<i4").tobytes(), code)
        code = zlib.crc32(lif.q.tobytes(), zlib.crc32(lif.s.tobytes(), code))
    return code


def reference_answers() -> tuple[int, ...]:
    """The checksums of all networks by the NumPy reference."""
    answers = []
    for number in range(NETWORKS):
        made, pixels = network(number)
        answers.append(checksum(NodeBackend(made, reference, "reference").run(pixels, True)))
    return tuple(answers)


def first_fault(run: Callable[[IntegerNetwork, Pixels], Result]) -> str | None:
    """What `run` gets wrong first: network, layer, step and index; None if every answer is right."""
    for number, answer in enumerate(ANSWERS):
        made, pixels = network(number)
        got = run(made, pixels)
        if checksum(got) != answer:
            return f"network {number} of {NETWORKS}: {_difference(made, pixels, _trace(got))}"
    return None


def _difference(made: IntegerNetwork, pixels: Pixels, got: Trace) -> str:
    want = _trace(NodeBackend(made, reference, "reference").run(pixels, True))
    for name, lif in want.lifs.items():
        for part in "hsq":
            found, right = getattr(got.lifs[name], part), getattr(lif, part)
            places = np.argwhere(found != right)
            if len(places):
                at = tuple(int(i) for i in places[0])
                return f"{part} of {name!r} at {at} [t, n, c, y, x] is {found[at]}, not {right[at]}"
    return f"the logits are {got.logits.tolist()}, not {want.logits.tolist()}"


ANSWERS: tuple[int, ...] = struct.unpack(
    f">{NETWORKS}I",
    bytes.fromhex(
        """
        9af42b5f 4bf9b127 0ec7a470 75c0fa02 d275c020 9f1754be d7aec4d8 d7917cb3 e6404ef9 75c8b479 288dd881 1e4192ee
        31a9e19e c63945c4 f7a74f3f 56888261 789822d1 e769cd06 ecf8422b 7371d7ed 78ac1a3f c03bc1cf 5e0e806e a823723d
        1b6ebda5 2ec2f2ed 5bff017f e66f992d cbea5864 17f4e782 a226dc99 21f4e821 4cd111b6 febbeb28 60bc4c0c b94f1f62
        15808103 6b593b8c b3627a0b 44160c6d 2f5bc06c 33050953 b9f411b5 2add28d8 00369f53 5568791b 4cc1041a 2fb5932d
        f53715a2 fbb7da43 e605ee80 c2ff9d4b f940c5f8 dca8474e aa85ef7f 37c389a6 1c2a6880 cb04fe6c bfde07af 6ffe8b30
        88835fd4 a992c00b 1cc34fa7 d9b24fca
        """
    ),
)
"""The checksums."""

if __name__ == "__main__":
    for at, code in enumerate(reference_answers()):
        print(f"{code:08x}", end="\n" if at % 12 == 11 else " ")
