"""A known-answer test of the C engine at one instruction set: 16 small networks and what the reference says of them.

A compiler at fault, an emulator, or a processor that does not do what it says would give other integers in silence.
So a level is tried before its first use (native.py), and left alone where it fails. The networks are made here by a
fixed rule, so that they are the same on every machine; their channels stand about the width of a vector. Of each LIF
`PLANTED` holds a v_th and a threshold that its membranes meet, `ANSWERS` holds a CRC-32 of h, s, q and logits of each
network, both from the NumPy reference: `python -m mdsnn.kernels.selftest` prints them, and a test compares.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from . import reference
from .engine import Backend, NodeBackend, Result, Trace
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

NETWORKS = 16
"""How many there are."""
SAMPLES = 2
"""How many each runs."""
# The periods below are chosen so that most pairs of features meet; tests/test_kernels_selftest.py looks for them.
_CHANNELS = (48, 64, 3, 17, 33, 65, 1, 16)
_STEPS = (2, 4, 1, 3, 5, 18, 4)
_BITS = (5, 4, 6, 2, 3, 8, 7, 4)

Pixels = npt.NDArray[np.uint8]
_Size = tuple[int, int]


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
    """Network `number`: a stem, two blocks, a head. What varies has a period of its own, by the network or by its
    layers, so that features meet in many ways."""

    def __init__(self, number: int, planted: tuple[int, ...]) -> None:
        self.number, self.draws, self.nodes = number, _Draws(number + 1), list[Node]()
        self.planted = planted
        self.span: dict[str, tuple[int, int]] = {}
        self.layers = self.lifs = 0

    def add(self, node: Node, lo: int, hi: int) -> str:
        self.nodes.append(node)
        self.span[node.name] = (lo, hi)
        return node.name

    def weight(self, *shape: int) -> tuple[Array, int]:
        """Codes of the next layer, and their bits; of a large one the same 4,093 codes again and again, a prime, so
        that no two rows are alike."""
        bits = _BITS[(5 * self.number + 5 * self.layers + 1) % 8]
        top, self.layers = 2 ** (bits - 1) - 1, self.layers + 1
        lowest = 0 if (self.number + 3 * self.layers) % 5 == 2 else -top  # of one sign: sums beyond 16 bits
        drawn = self.draws.integers(lowest, top, (min(math.prod(shape), 4093),)).astype(np.int8)
        return np.resize(drawn, shape), bits

    def conv(self, source: str, outs: int, ins: int, kernel: int, stride: int = 1, groups: int = 1) -> str:
        """A convolution with half its kernel as padding, and its bn; after every 11th two, whose streams are added."""
        name = f"conv{len(self.nodes)}"
        weight, bits = self.weight(outs, ins // groups, kernel, kernel)
        self.add(Conv(name, source, weight, bits, stride, kernel // 2, groups), 0, 0)
        stream = self.bn(name, weight, self.span[source])
        if (self.number + self.layers) % 11:
            return stream
        return self.add(Add(f"two{len(self.nodes)}", stream, self.bn(name, weight, self.span[source])), 0, 0)

    def bn(self, source: str, weight: Array, span: tuple[int, int]) -> str:
        """To a stream of some hundreds. Every third layer's is a table, if it is small, every other one of these with a
        step that no line has; every seventh goes beyond 32 bits."""
        name, outs, draws, turn = f"bn{len(self.nodes)}", len(weight), self.draws, 2 * self.number + self.layers
        lo, hi = accumulator_bounds(weight, *span)
        spread = np.maximum(hi - lo, 1) // 6 + 1
        if turn % 3 == 2 and int((hi - lo + 1).sum()) < 1 << 14:
            sizes = hi - lo + 1
            acc = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes - lo, sizes)
            table = acc * 700 // np.repeat(spread, sizes) + np.where(acc > 2, 60 + 41 * (turn % 2), 60)
            return self.add(BnDense(name, source, np.clip(table, -4096, 4096)), 0, 0)
        shift = 20 if turn % 7 == 2 else 8
        multiplier = (draws.integers(200, 700, (outs,)) << shift) // spread * (1 - 2 * draws.integers(0, 1, (outs,)))
        offset = (draws.integers(-200, 300, (outs,)) << shift) - multiplier * ((lo + hi) // 4)
        return self.add(BnAffine(name, source, multiplier, offset, np.full(outs, shift)), 0, 0)

    def lif(self, source: str, reach: int = 1) -> str:
        """Thresholds inside the stream's common values, times `reach`; one of them, and v_th, as they are planted."""
        turn, draws = self.number + 3 * self.lifs, self.draws
        bits = 7 if reach > 1 and self.number % 2 else _BITS[(self.number + self.lifs) % 8]
        top = 2 ** (bits - 1) - 1
        decode = np.sort(draws.integers(-250, 250, (2 * top + 1,)))
        thresholds = draws.integers(-300, 300, (2 * top,)) * reach
        if bits == 7 and reach > 1:  # so far apart that no table of codes serves
            thresholds[0] = -100_000
        name, v_th = f"lif{len(self.nodes)}", 100 * reach
        if 2 * self.lifs < len(self.planted):
            v_th, thresholds[-1] = self.planted[2 * self.lifs : 2 * self.lifs + 2]
        thresholds, self.lifs = np.sort(thresholds), self.lifs + 1
        if turn % 7 == 3:
            node = Lif(name, source, bits, decode, thresholds, v_th, "soft", v_th // 2 + 1)
        elif turn % 7 == 5:
            node = Lif(name, source, bits, decode, thresholds, v_th, quantize="pre_fire", q_th=top // 2)
        else:
            node = Lif(name, source, bits, decode, thresholds, v_th)
        return self.add(node, 0, 1)

    def block(self, kind: int, spikes: str, stream: str, wide: int, size: _Size) -> tuple[str, int, _Size]:
        """Some layers behind `spikes`, which `stream` gave: their stream, its channels and size."""
        halved = size[0] // 2, size[1] // 2
        match kind:
            case 0:  # a residual add
                inside = _CHANNELS[(3 * self.number + 6) % 8]
                inner = self.conv(self.lif(self.conv(spikes, inside, wide, 3)), wide, inside, 3)
                return self.add(Add(f"out{len(self.nodes)}", inner, stream), 0, 0), wide, size
            case 1:  # half the size
                codes = self.add(Requantize(f"codes{len(self.nodes)}", stream, 5, 8), -127, 127)
                skip, more = self.conv(codes, wide + 3, wide, 1, 2), self.conv(spikes, wide + 3, wide, 3, 2)
                rounded_up = (size[0] + 1) // 2, (size[1] + 1) // 2
                return self.add(Add(f"out{len(self.nodes)}", more, skip), 0, 0), wide + 3, rounded_up
            case 2 if self.number % 4:  # counts
                counts = self.add(SumPool(f"pool{len(self.nodes)}", spikes, 2, 2, 2), 0, 4)
                return self.conv(counts, wide, wide, 3, groups=wide if self.number % 2 else 1), wide, halved
            case 2:
                pooled = self.add(MaxPool(f"pool{len(self.nodes)}", spikes, 2, 2), 0, 1)
                return self.conv(pooled, wide + 1, wide, 1), wide + 1, halved
            case _:  # groups
                return self.conv(spikes, wide, wide, 3, groups=math.gcd(wide, (wide, 12)[self.number % 2])), wide, size

    def build(self) -> tuple[IntegerNetwork, Pixels]:
        number, draws = self.number, self.draws
        kinds = number % 4, number // 4 % 4
        wide, steps = _CHANNELS[(number + number // 4) % 8], _STEPS[(number + 1) % 7]
        size, colours, events = (4 + number % 3, 5 + number % 2), 1 + number % 3, number % 5 == 1
        lo, hi = (0, 127) if events else (-128, 127)
        x = self.add(InputTable("input", draws.integers(lo, hi, (colours, 256))), lo, hi)
        spec = InputSpec(colours, *size, "events" if events else "image")
        frames = (steps, SAMPLES) if events else (SAMPLES,)
        pixels = draws.integers(0, 255, (*frames, colours, *size)).astype(np.uint8)
        stream = self.conv(x, wide, colours, (3, 1)[number % 2])
        x = self.lif(stream)
        for place, kind in enumerate(kinds):
            stream, wide, size = self.block(kind, x, stream, wide, size)
            if place and kinds[0] == kind:  # a stream beyond 16 bits
                for _ in range(5):
                    stream = self.add(Add(f"sum{len(self.nodes)}", stream, stream), 0, 0)
            x = self.lif(stream, 32 if place and kinds[0] == kind else 1)
        if number % 3:
            x = self.add(SumPool("head", x, *size), 0, size[0] * size[1])
        else:
            x, wide = self.add(Flatten("flat", x), 0, 1), wide * size[0] * size[1]
            weight, bits = self.weight(20, wide)
            x, wide = self.lif(self.bn(self.add(Linear("fc", x, weight, bits), 0, 0), weight, (0, 1))), 20
        self.add(Readout("readout", x, *self.weight(5, wide), draws.integers(-99, 99, (5,))), 0, 0)
        return IntegerNetwork(tuple(self.nodes), spec, steps, Grid()), pixels


def network(number: int, planted: tuple[int, ...] | None = None) -> tuple[IntegerNetwork, Pixels]:
    """Network `number`, 0..NETWORKS - 1, and samples for it. `planted`: v_th and a threshold of its first LIFs."""
    return _Builder(number, PLANTED[number] if planted is None else planted).build()


def plant(number: int) -> tuple[int, ...]:
    """v_th and a threshold for every LIF of network `number`: values that its membranes meet, by the reference.

    Both are met at the first step, where a membrane depends on no v_th but those of LIFs before it; and so is
    v_th + 1, if there are such two.
    """
    planted: tuple[int, ...] = ()
    while True:
        made, pixels = network(number, planted)
        if 2 * len(made.lifs) == len(planted):
            return planted
        name = made.lifs[len(planted) // 2].name
        met = np.unique(_trace(NodeBackend(made, reference, "reference").run(pixels, True)).lifs[name].h[0])
        fires = met[met > 0]
        both = fires[np.isin(fires + 1, fires)]
        fires = both if len(both) else fires
        v_th = int(fires[len(fires) // 2]) if len(fires) else 0
        kept = met[met <= v_th]
        planted += v_th, int(kept[len(kept) // 2]) if len(kept) else 0


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


def first_fault(ready: Callable[[IntegerNetwork], Backend]) -> str | None:
    """What the backends that `ready` makes get wrong first: network, layer, step and index; None if nothing.

    Each runs with a trace and without one, for kernels that need not write h take shorter ways.
    """
    for number, answer in enumerate(ANSWERS):
        made, pixels = network(number)
        backend = ready(made)
        got = backend.run(pixels, True)
        if checksum(got) != answer:
            return f"network {number} of {NETWORKS}: {_difference(made, pixels, _trace(got))}"
        fault = _without_trace(backend.run(pixels, False), _trace(got))
        if fault is not None:
            return f"network {number} of {NETWORKS}, without a trace: {fault}"
    return None


def _without_trace(got: Result, right: Trace) -> str | None:
    """Where spikes of a LIF and step, counted, or logits differ from a trace that is right."""
    for name, lif in right.lifs.items():
        found, spikes = got.activity.spikes_out[name].tolist(), lif.s.sum(axis=(1, 2, 3, 4)).tolist()
        if found != spikes:
            return f"{name!r} fires {found} times in its steps, not {spikes}"
    if np.array_equal(got.logits, right.logits):
        return None
    return f"the logits are {got.logits.tolist()}, not {right.logits.tolist()}"


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


PLANTED: tuple[tuple[int, ...], ...] = tuple(
    tuple(map(int, line.split()))
    for line in """
    207 -162 135 33 322 -178 31 -279 16212 -3436 108 -53
    589 -367 221 -17 239 97 225 -39
    236 -22 201 73 234 -21 348 133
    475 -136 139 -26 184 -107 174 -65 148 35
    298 -7 118 45 493 -164 142 -87
    416 -309 92 -143 6707 -3277
    208 -126 551 519 212 -3 809 -241
    355 -277 200 -143 232 18
    151 15 153 -16 413 108 1817 767
    570 -337 149 -35 248 62 563 -198
    260 -57 170 43 5312 -160
    616 -154 229 -130 174 -124
    104 -123 306 81 217 -119 423 -66 15 -119
    468 -283 212 -35 126 -75
    211 -104 99 -93 393 90
    133 -331 904 279 16100 -572 314 32
""".strip().splitlines()
)
"""v_th and a threshold of each LIF, a line a network."""
ANSWERS: tuple[int, ...] = struct.unpack(
    f">{NETWORKS}I",
    bytes.fromhex(
        """
        0ed45c1d 4a80de9c 7a0c905f f61a57f4 2815cb0e 448ef16d a54aa400 c1a2a68e 7d4cd426 6b69af9a 8ecc6b1c 5d2ebef5
        a165b17e a0794db4 3620d61e ac3b153c
        """
    ),
)
"""The checksums."""

if __name__ == "__main__":
    PLANTED = tuple(plant(number) for number in range(NETWORKS))
    print("\n".join(" ".join(map(str, planted)) for planted in PLANTED))
    for at, code in enumerate(reference_answers()):
        print(f"{code:08x}", end="\n" if at % 12 == 11 else " ")
