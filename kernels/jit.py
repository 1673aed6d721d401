"""The network in Numba: what runs where there is no C compiler.

Definition: reference.py. h, s and q of every neuron and step, the logits and the counts agree with it bit for bit
(tests/test_kernels_bit_exact.py); where the two differ, this file is wrong.

A value is [N, S, H, W, C]: S is T in a run and 1 in a stream or for what is the same at every step; channels come last,
padded to a multiple of 16 with lanes that nobody reads. Two kernels take nearly all the time. `_conv` is event-driven:
it lists the inputs of a line of windows that are not 0 and adds, for each window, the rows of 64 weights that its
events name, in the narrowest lanes that the proof allows. `_neurons` is everything between two convolutions: BN,
residual add, and LIF with its T steps, a neuron's leak looked up by its membrane. Both release the GIL.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from . import reference
from .engine import Activity, LifTrace, Result, State, Trace, _over_samples, _over_time
from .formats import Array, delta
from .network import (
    Add,
    BnAffine,
    BnDense,
    Conv,
    Flatten,
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
from .vectors import (
    accumulate,
    add,
    bits,
    choose,
    clamp,
    count_ones,
    differs,
    greater,
    load,
    multiply,
    scaled,
    shift_right,
    store,
    sum_rows,
    zeros,
)

_LANES = 16
"""Channels are padded to a multiple of this: what `_neurons` takes at a time."""
_ROW = 64
"""Outputs whose weights lie together: what `_conv` adds at a time."""
_TABLE = 1 << 20  # longest table of leaks
_LIST = 1 << 16  # events of a band of lines: 256 KiB
_VALUES = 1 << 20  # values of the largest node that a call may hold: it takes fewer steps, if need be
_GROUP = 1 << 17  # ... for which samples run together
_EMPTY = np.zeros(0, np.int32)
_NOTHING = np.zeros((0, 0, 0, 0), np.int32)
_NO_SPIKES = np.zeros((0, 0, 0, 0), np.int8)
_NO_STATE = np.zeros((0, 0, 0), np.int32)


def _njit(function: Callable[..., Any]) -> Any:
    return numba.njit(nogil=True, cache=False, error_model="numpy")(function)


# ------------------------------------------------------------------------------------------------ convolutions


@_njit
def _list_events(
    x: Array, at: int, pixels: int, pitch: int, ins: int, places: Array, events: Array, starts: Array
) -> None:
    """The channels that are not 0 of each pixel, one pixel's after the other."""
    k = 0
    for pixel in range(pixels):
        starts[pixel] = k
        here, c = at + pixel * pitch, 0
        while c + 8 <= ins:
            word = bits(differs(load(x, here + c, 8), 0))
            store(events, k, add(load(places, 8 * word, 8), c))
            k += count_ones(word)
            c += 8
        while c < ins:
            events[k] = c
            k += x[here + c] != 0
            c += 1
    starts[pixels] = k


@_njit
def _list_lines(
    x: Array,
    at: int,
    pitch: int,
    geometry: Any,
    line: int,
    events: Array,
    starts: Array,
    rows: Array,
    factors: Any,
    columns: Array,
) -> int:
    """The events of as many lines as there is room for, from `line` on; returns the line after them.

    A line is an output row at a step. Its events lie by input column, so that those of a window follow each other:
    columns[line, column] is where a column's begin. An event is the row of weights it names, if its column is the
    first of the window; factors are the inputs themselves, where they are not spikes.
    """
    steps, height, width, out_height, _, ins, kh, kw, stride, padding = geometry
    k, to = 0, 0
    while line < out_height * steps and k + width * kh * ins + _LANES <= rows.size:
        top, t = line // steps * stride - padding, line % steps
        for column in range(width):
            columns[to] = k
            to += 1
            if (column + padding) % stride >= kw:
                continue
            for ky in range(max(0, -top), min(kh, height - top)):
                pixel = (t * height + top + ky) * width + column
                first, count = starts[pixel], starts[pixel + 1] - starts[pixel]
                for i in range(0, count, _LANES):
                    store(rows, k + i, add(load(events, first + i, _LANES), (column * kh + ky) * ins))
                if factors is not None:
                    for i in range(count):
                        factors[k + i] = x[at + pixel * pitch + events[first + i]]
                k += count
        columns[to] = k
        to += 1
        line += 1
    return line


@_njit
def _conv(
    x: Array,
    weight: Array,
    groups: int,
    outs: int,
    geometry: Any,
    terms: int,
    out: Array,
    counts: Array,
    places: Array,
    events: Array,
    starts: Array,
    rows: Array,
    factors: Any,
    columns: Array,
) -> None:
    """weight [group][block of 64 outputs][kx][ky][in][64], flat; out [N, S, H, W, C]; counts [S] of inputs not 0.

    terms  so many products fit the lanes of the weights; of spikes, eight rows do
    """
    steps, height, width, out_height, out_width, ins, kh, kw, stride, padding = geometry
    pitch, out_pitch = x.shape[4], out.shape[4]
    pixels, blocks, depth = steps * height * width, (outs + _ROW - 1) // _ROW, kh * ins
    flat, into, tail = x.reshape(-1), out.reshape(-1), np.empty(_ROW, out.dtype)
    for n in range(x.shape[0]):
        for group in range(groups):
            at = n * pixels * pitch + group * ins
            _list_events(flat, at, pixels, pitch, ins, places, events, starts)
            for t in range(steps):
                counts[t] += starts[(t + 1) * height * width] - starts[t * height * width]
            line = np.int64(0)  # not the literal 0, for which another _list_lines would be compiled
            while line < out_height * steps:
                end = _list_lines(flat, at, pitch, geometry, line, events, starts, rows, factors, columns)
                for block in range(blocks):
                    first = (group * blocks + block) * kw * depth
                    wanted = min(outs - block * _ROW, _ROW)
                    for done in range(line, end):
                        place = (done - line) * (width + 1)
                        to = ((n * steps + done % steps) * out_height + done // steps) * out_width * out_pitch
                        to += group * outs + block * _ROW
                        for left in range(-padding, out_width * stride - padding, stride):
                            i = columns[place + max(left, 0)]
                            last = columns[place + min(left + kw, width)]
                            w = first - left * depth
                            total = zeros(out, _ROW)
                            if factors is None:
                                while i + 8 <= last:
                                    total = accumulate(total, sum_rows(weight, w, rows, i, 8, _ROW))
                                    i += 8
                                part = zeros(weight, _ROW)
                                while i < last:
                                    part = add(part, sum_rows(weight, w, rows, i, 1, _ROW))
                                    i += 1
                                total = accumulate(total, part)
                            else:
                                while i < last:
                                    stop, part = min(i + terms, last), zeros(weight, _ROW)
                                    while i < stop:
                                        part = add(part, scaled(weight, (w + rows[i]) * _ROW, _ROW, factors[i]))
                                        i += 1
                                    total = accumulate(total, part)
                            if wanted == _ROW:
                                store(into, to, total)
                            else:
                                store(tail, 0, total)
                                for o in range(wanted):
                                    into[to + o] = tail[o]
                            to += out_pitch
                line = end


# --------------------------------------------------------------------------------------------- BN, add and LIF


@_njit
def _neurons(
    x: Array,
    other: Array,
    steps: int,
    channels: int,
    affine: bool,
    multiplier: Array,
    offset: Array,
    shift: Array,
    saturation: int,
    plus: bool,
    stream: Array,
    fires: bool,
    table: Array,
    lowest: int,
    v_th: int,
    v_soft: int,
    hard: bool,
    rest: int,
    state: Array,
    spikes: Array,
    h: Array,
    counts: Array,
) -> None:
    """[BN table,] [+ other,] [stream kept,] [LIF]. x and other [N, S, P, C], S 1 or `steps`; the rest [N, steps, P, C].

    table  the leak that the next step adds, by u - lowest, clamped; then the leak after a hard reset
    state  the leaks between two calls of a stream, [N, P, C]; empty for whole samples, whose first leak is `rest`
    """
    samples, own, plane, pitch = x.shape
    others = other.shape[1]
    flat_x, flat_other, leaks = x.reshape(-1), other.reshape(-1), state.reshape(-1)
    flat_stream, flat_spikes, flat_h = stream.reshape(-1), spikes.reshape(-1), h.reshape(-1)
    leak, index = np.empty(pitch, np.int32), np.empty(pitch, np.uint32)
    top = table.size - 2
    for n in range(samples):
        for pixel in range(plane):
            if fires:
                for c in range(pitch):
                    leak[c] = leaks[(n * plane + pixel) * pitch + c] if state.size else rest
            for t in range(steps):
                at_x = ((n * own + (t if own > 1 else 0)) * plane + pixel) * pitch
                at_other = ((n * others + (t if others > 1 else 0)) * plane + pixel) * pitch
                at = ((n * steps + t) * plane + pixel) * pitch
                fired = 0
                for c in range(0, pitch, _LANES):
                    v = accumulate(zeros(leak, _LANES), load(flat_x, at_x + c, _LANES))
                    if affine:
                        v = add(multiply(load(multiplier, c, _LANES), v), load(offset, c, _LANES))
                        v = shift_right(v, load(shift, c, _LANES))
                        v = clamp(v, -saturation, saturation)
                    if plus:
                        v = add(v, load(flat_other, at_other + c, _LANES))
                    if stream.size:
                        store(flat_stream, at + c, v)
                    if fires:
                        v = add(v, load(leak, c, _LANES))
                        if h.size:
                            store(flat_h, at + c, v)
                        s = greater(v, v_th)
                        store(flat_spikes, at + c, s)
                        fired += count_ones(bits(s) & ((1 << min(channels - c, _LANES)) - 1))
                        u = add(clamp(add(v, choose(s, -v_soft, zeros(leak, _LANES))), lowest, lowest + top), -lowest)
                        if hard:
                            u = choose(s, top + 1, u)
                        store(index, c, u)
                if fires:
                    counts[t] += fired
                    for c in range(pitch):
                        leak[c] = table[index[c]]
            if fires and state.size:
                for c in range(pitch):
                    leaks[(n * plane + pixel) * pitch + c] = leak[c]


@_njit
def _bn_dense(acc: Array, channels: int, table: Array, start: Array, stream: Array) -> None:
    """acc and stream [pixels, C]."""
    for pixel in range(len(acc)):
        for c in range(channels):
            stream[pixel, c] = table[start[c] + acc[pixel, c]]


@_njit
def _bn_wide(
    acc: Array, channels: int, multiplier: Array, offset: Array, shift: Array, saturation: int, stream: Array
) -> None:
    """The affine form with products of 64 bits. acc and stream [pixels, C]."""
    for pixel in range(len(acc)):
        for c in range(channels):
            v = (multiplier[c] * acc[pixel, c] + offset[c]) >> shift[c]
            stream[pixel, c] = min(max(v, -saturation), saturation)


@_njit
def _requantize(x: Array, shift: int, top: int, codes: Array) -> None:
    half = np.int32(1 << (shift - 1))
    for i in range(x.size):
        codes[i] = min(max((x[i] + half) >> np.int32(shift), np.int32(-top)), np.int32(top))


# ----------------------------------------------------------------------------------------------------- the plan


def _padded(channels: int) -> int:
    return -(-channels // _LANES) * _LANES


def _lanes(constant: Array, dtype: Any) -> Array:
    """A channel's constants, padded with zeros."""
    array = np.zeros(_padded(len(constant)), dtype)
    array[: len(constant)] = constant
    return array


def _aligned(array: Array) -> Array:
    """A flat copy on a cache line: numpy aligns to 16 bytes only, and a row across two lines is two loads."""
    buffer = np.empty(array.nbytes + 64, np.uint8)
    at = -buffer.ctypes.data % 64
    copy = buffer[at : at + array.nbytes].view(array.dtype)
    copy[:] = array.reshape(-1)
    return copy


def _places() -> Array:
    """Row b: the places of the bits that are 1 in byte b; the rest of its 8 entries is never read."""
    table = np.zeros((256, 8), np.int32)
    for byte in range(256):
        ones = [bit for bit in range(8) if byte >> bit & 1]
        table[byte, : len(ones)] = ones
    return table.reshape(-1)


_BITS = _places()


@dataclass
class _Call:
    """Some samples in flight: a whole run, or one step of a stream."""

    frames: npt.NDArray[np.uint8]  # [S, N, C, H, W]
    steps: int
    traced: bool
    scratch: dict[str, Array]
    values: dict[str, Array]
    spikes_in: dict[str, Array]
    states: dict[str, Array] | None  # of a stream: leaks by LIF, and the readout's sum
    spikes_out: dict[str, Array] = field(default_factory=dict)
    h: dict[str, Array] = field(default_factory=dict)
    s: dict[str, Array] = field(default_factory=dict)
    logits: Array = field(default_factory=lambda: _NOTHING)


_Operation = Callable[[_Call], None]


@dataclass(frozen=True)
class _Leak:
    """A LIF for `_neurons`: see there. pre_fire too is a spike where h > v_th, and a hard reset."""

    table: Array
    lowest: int
    v_th: int
    v_soft: int
    hard: bool
    rest: int

    @classmethod
    def of(cls, lif: Lif) -> _Leak | None:
        """None if the thresholds lie too far apart for a table."""
        top, thresholds = delta(lif.bits), lif.thresholds.astype(np.int64)
        lowest, highest = int(thresholds[0]) - 1, int(thresholds[-1])
        if highest - lowest >= _TABLE or lowest < -(2**31):
            return None
        pre_fire = lif.quantize == "pre_fire"
        v_th = max(int(thresholds[lif.q_th + top]) - 1, -(2**31)) if pre_fire else lif.v_th
        after = 0 if pre_fire else int(np.searchsorted(thresholds, 0, side="right")) - top
        passed = np.searchsorted(thresholds, np.arange(lowest, highest + 1), side="right")
        table = np.append(lif.decode[passed], lif.decode[after + top])
        return cls(table, lowest, v_th, lif.v_soft, lif.reset == "hard", int(lif.decode[top]))


class JitBackend:
    """A network ready to run in Numba. Immutable: calls may run side by side.

    The nodes become a list of operations, each of which reads and writes the values of a call: a BN table, the add
    behind it and a LIF that reads the sum are one operation, and every other node is one of its own.
    """

    name = "numba"

    def __init__(self, network: IntegerNetwork) -> None:
        self.network = network
        self.neurons = {lif.name: int(np.prod(network.proof.shapes[lif.name])) for lif in network.lifs}
        self._readers: dict[str, list[Node]] = {node.name: [] for node in network.nodes}
        for node in network.nodes:
            for source in dict.fromkeys(node.inputs):
                self._readers[source].append(node)
        largest = max(int(np.prod(shape)) for shape in network.proof.shapes.values())
        self._steps = min(network.timesteps, max(1, _VALUES // largest))
        self._group = max(1, _GROUP // (largest * self._steps))
        self._sizes = {"events": _LANES, "starts": 1, "rows": _LIST, "columns": 1}
        self._fused: dict[str, str] = {}  # node -> the node whose operation computes it too
        for node in network.nodes:
            self._fuse(node)
        self._operations = [(node, self._operation(node)) for node in network.nodes if node.name not in self._fused]
        self._sizes["factors"] = self._sizes["rows"]
        self._last = self._last_uses()
        # scratch is kept between calls, for a fresh one costs a page fault every 4 KiB; a deque's ends are thread-safe
        self._scratch: deque[dict[str, Array]] = deque(maxlen=64)

    def run(self, pixels: npt.NDArray[np.uint8], trace: bool, threads: int = 1) -> Result:
        """All timesteps of checked pixels [N, C, H, W] or [T, N, C, H, W]."""
        frames = pixels if pixels.ndim == 5 else pixels[None]
        groups = range(0, frames.shape[1], self._group)
        return _over_samples([self._whole(frames[:, at : at + self._group], trace) for at in groups])

    def _whole(self, frames: npt.NDArray[np.uint8], trace: bool) -> Result:
        """A run of some samples, as many steps at a time as `_VALUES` allows."""
        timesteps, steps = self.network.timesteps, self._steps
        if steps == timesteps:
            return self._call(frames, steps, trace, {}, {}, None)
        state = _JitState(self, frames.shape[1])
        return _over_time(
            [
                state.steps(frames if len(frames) == 1 else frames[t : t + steps], min(steps, timesteps - t), trace)
                for t in range(0, timesteps, steps)
            ]
        )

    def start(self, samples: int) -> State:
        """A fresh state, q = 0 everywhere, for `samples` samples."""
        return _JitState(self, samples)

    def _call(
        self,
        frames: npt.NDArray[np.uint8],
        steps: int,
        trace: bool,
        values: dict[str, Array],
        spikes_in: dict[str, Array],
        states: dict[str, Array] | None,
    ) -> Result:
        try:
            scratch = self._scratch.pop()
        except IndexError:
            scratch = {name: np.empty(size, np.int32) for name, size in self._sizes.items()}
        call = _Call(frames, steps, trace, scratch, values, spikes_in, states)
        static = self.network.proof.static
        try:
            for place, (node, operation) in enumerate(self._operations):
                if node.name not in values:  # a stream keeps what is the same at every step
                    operation(call)
                for name in self._last[place]:
                    if states is None or not static[name]:
                        values.pop(name, None)
        finally:
            self._scratch.append(scratch)
        network = self.network
        nodes = (node.name for node in network.nodes if isinstance(node, Conv | Linear | Readout))
        spikes = {name: np.broadcast_to(spikes_in[name], steps).copy() for name in nodes}
        fired = {lif.name: call.spikes_out[lif.name] for lif in network.lifs}
        activity = Activity(frames.shape[1], self.neurons, fired, spikes)
        if not trace:
            return Result(call.logits, activity)
        traces = {lif.name: _trace(lif, network.proof.shapes[lif.name][0], call) for lif in network.lifs}
        return Result(call.logits, activity, Trace(traces, call.logits))

    # ------------------------------------------------------------------------------------------------ planning

    def _fuse(self, node: Node) -> None:
        """A BN table into the add that alone reads it; then a LIF into the stream it reads."""
        static = self.network.proof.static
        if isinstance(node, Add) and node.source != node.other:
            for source in (node.other, node.source):
                short = self.network.proof.product_bits.get(source) == 32
                if short and len(self._readers[source]) == 1 and static[source] == static[node.name]:
                    self._fused[source] = node.name
                    break
        if isinstance(node, Lif) and not static[node.source] and _Leak.of(node) is not None:
            stream = self.network[node.source]
            first = next(reader for reader in self._readers[node.source] if isinstance(reader, Lif))
            if first is node and isinstance(stream, Add | BnAffine) and self._short(stream):
                self._fused[node.name] = node.source

    def _short(self, node: Node) -> bool:
        return isinstance(node, Add) or self.network.proof.product_bits[node.name] == 32

    def _last_uses(self) -> list[list[str]]:
        """The values that each operation is the last to read."""
        place = {node.name: at for at, (node, _) in enumerate(self._operations)}

        def computed(name: str) -> int:
            while name in self._fused:
                name = self._fused[name]
            return place[name]

        last: list[list[str]] = [[] for _ in self._operations]
        for name, readers in self._readers.items():
            if readers:
                last[max(computed(reader.name) for reader in readers)].append(name)
        return last

    def _empty(self, name: str, like: Array, dtype: Any, steps: int | None = None) -> Array:
        """An uninitialized value of the node `name` for the samples (and steps) of `like`."""
        channels, height, width = self.network.proof.shapes[name]
        return np.empty((len(like), steps or like.shape[1], height, width, _padded(channels)), dtype)

    def _width(self, name: str) -> Any:
        """Of codes, spikes and counts: int8 if that holds them, else int32."""
        return np.int8 if self.network.proof.ranges[name][1] < 128 else np.int32

    def _operation(self, node: Node) -> _Operation:
        match node:
            case InputTable():
                return self._input(node)
            case Conv():
                return self._conv(node, node.weight, node.stride, node.padding, node.groups)
            case Linear():
                return self._conv(node, node.weight[:, :, None, None], 1, 0, 1)
            case BnAffine() if self._short(node):
                return self._stream(node, node, None)
            case BnAffine() | BnDense():
                return self._bn(node)
            case Add():
                inner = [name for name in node.inputs if self._fused.get(name) == node.name]
                if not inner:
                    return self._stream(node, None, node.other)
                bn = self.network[inner[0]]
                assert isinstance(bn, BnAffine)
                return self._stream(node, bn, node.other if bn.name == node.source else node.source)
            case Lif():
                return self._stream(node, None, None) if _Leak.of(node) is not None else self._lif(node)
            case Requantize():
                return self._requantize(node)
            case MaxPool():
                return self._pool(node, node.kernel, node.kernel, np.maximum)
            case SumPool():
                return self._pool(node, node.kernel_height, node.kernel_width, np.add)
            case Flatten():
                return self._flatten(node)
            case Readout():
                return self._readout(node)
        raise NotImplementedError(type(node).__name__)

    def _input(self, node: InputTable) -> _Operation:
        def operation(call: _Call) -> None:
            frames = call.frames
            call.values[node.name] = codes = self._empty(node.name, frames.swapaxes(0, 1), np.int8)
            for c, table in enumerate(node.table):
                codes[..., c] = table[frames[:, :, c]].swapaxes(0, 1)

        return operation

    def _conv(self, node: Conv | Linear, weight: Array, stride: int, padding: int, groups: int) -> _Operation:
        proof, source = self.network.proof, node.source
        spikes = proof.kinds[source] == "spikes"
        outs, ins, kh, kw = weight.shape[0] // groups, *weight.shape[1:]
        lo, hi = proof.ranges[node.name]
        dtype: Any
        sums: Any = np.int32
        if not spikes:
            dtype = np.int16 if self._width(source) is np.int8 else np.int32
        elif 8 * delta(node.bits) < 128:
            dtype, sums = np.int8, np.int16 if lo >= -(2**15) and hi < 2**15 else np.int32
        else:
            dtype = np.int16
        terms = 0x7FFF // (128 * delta(node.bits))
        blocks = -(-outs // _ROW)
        packed = np.zeros((groups, blocks * _ROW, ins, kh, kw), dtype)
        packed[:, :outs] = weight.reshape(groups, outs, ins, kh, kw)
        packed = packed.reshape(groups, blocks, _ROW, ins, kh, kw).transpose(0, 1, 5, 4, 3, 2)
        rows = _aligned(packed)
        _, height, width = proof.shapes[source]
        steps = 1 if proof.static[node.name] else self._steps
        pixels, lines = steps * height * width, steps * proof.shapes[node.name][1]
        for name, size in (
            ("events", pixels * ins + _LANES),
            ("starts", pixels + 1),
            ("rows", width * kh * ins + _LANES),
            ("columns", lines * (width + 1)),
        ):
            self._sizes[name] = max(self._sizes[name], size)

        def operation(call: _Call) -> None:
            x, scratch = call.values[source], call.scratch
            call.values[node.name] = out = self._empty(node.name, x, sums)
            call.spikes_in[node.name] = counts = np.zeros(x.shape[1], np.int64)
            factors = None if spikes else scratch["factors"]
            events, starts, lists, columns = (scratch[name] for name in ("events", "starts", "rows", "columns"))
            geometry = *x.shape[1:4], *out.shape[2:4], ins, kh, kw, stride, padding
            _conv(x, rows, groups, outs, geometry, terms, out, counts, _BITS, events, starts, lists, factors, columns)

        return operation

    def _stream(self, node: BnAffine | Add | Lif, bn: BnAffine | None, other: str | None) -> _Operation:
        """[bn of an accumulator,] [+ other,] [LIF]: what `_neurons` does."""
        proof = self.network.proof
        lif = node if isinstance(node, Lif) else None
        for reader in self._readers[node.name]:
            if self._fused.get(reader.name) == node.name and isinstance(reader, Lif):
                lif = reader
        keep = not isinstance(node, Lif) and any(reader is not lif for reader in self._readers[node.name])
        source = bn.source if bn is not None else node.source
        constants: Any = tuple(
            _EMPTY if bn is None else _lanes(getattr(bn, name), np.int32) for name in ("multiplier", "offset", "shift")
        )
        leak = None if lif is None else _Leak.of(lif)
        saturation, channels = self.network.grid.saturation, proof.shapes[node.name][0]

        def operation(call: _Call) -> None:
            x = _planes(call.values[source])
            y = _NOTHING if other is None else _planes(call.values[other])
            steps = 1 if proof.static[node.name] else call.steps
            stream, spikes, h = _NOTHING, _NO_SPIKES, _NOTHING
            state, counts = _NO_STATE, np.zeros(steps, np.int64)
            if keep:
                stream = call.values[node.name] = self._empty(node.name, x, np.int32, steps)
            if lif is not None and leak is not None:
                spikes = call.values[lif.name] = self._empty(lif.name, x, np.int8, steps)
                call.spikes_out[lif.name] = counts
                if call.traced:
                    h = call.h[lif.name] = self._empty(lif.name, x, np.int32, steps)
                    call.s[lif.name] = spikes
                if call.states is not None:
                    state = self._state(call.states, lif, x)
            numbers: Any = (0, 0, 0, False, 0) if leak is None else _numbers(leak)
            _neurons(
                x,
                y,
                steps,
                channels,
                bn is not None,
                *constants,
                saturation,
                other is not None,
                _planes(stream),
                leak is not None,
                _EMPTY if leak is None else leak.table,
                *numbers,
                state,
                _planes(spikes),
                _planes(h),
                counts,
            )

        return operation

    def _state(self, states: dict[str, Array], lif: Lif, like: Array) -> Array:
        """The leaks of a stream, [N, P, C]."""
        if lif.name not in states:
            rest = lif.decode[delta(lif.bits)]
            states[lif.name] = _planes(np.full_like(self._empty(lif.name, like, np.int32, 1), rest))[:, 0]
        return states[lif.name]

    def _lif(self, node: Lif) -> _Operation:
        """By bisection, for thresholds too far apart for a table."""

        def operation(call: _Call) -> None:
            x = call.values[node.source]
            spikes = call.values[node.name] = self._empty(node.name, x, np.int8, call.steps)
            h = np.empty(spikes.shape, np.int32)
            states = {} if call.states is None else call.states
            leak = self._state(states, node, x).reshape(h[:, 0].shape)
            top, channels = delta(node.bits), self.network.proof.shapes[node.name][0]
            for t in range(call.steps):
                np.add(x[:, t if x.shape[1] > 1 else 0], leak, out=h[:, t])
                fired, code = _after(node, h[:, t])
                spikes[:, t], leak[:] = fired, node.decode[code + top]
            call.spikes_out[node.name] = np.count_nonzero(spikes[..., :channels], axis=(0, 2, 3, 4))
            call.h[node.name], call.s[node.name] = h, spikes

        return operation

    def _bn(self, node: BnAffine | BnDense) -> _Operation:
        """BN tables that are dense, or whose products need 64 bits."""
        proof, source = self.network.proof, node.source
        channels, saturation = proof.shapes[node.name][0], self.network.grid.saturation
        if isinstance(node, BnDense):
            lo, hi = proof.channel_bounds[source]
            sizes = hi - lo + 1
            constants: Any = (np.array(node.table), np.cumsum(sizes) - sizes - lo)
        else:
            constants = tuple(np.array(c, np.int64) for c in (node.multiplier, node.offset, node.shift))

        def operation(call: _Call) -> None:
            acc = call.values[source]
            stream = call.values[node.name] = self._empty(node.name, acc, np.int32)
            flat, into = acc.reshape(-1, acc.shape[-1]), stream.reshape(-1, acc.shape[-1])
            if isinstance(node, BnDense):
                _bn_dense(flat, channels, *constants, into)
            else:
                _bn_wide(flat, channels, *constants, saturation, into)

        return operation

    def _requantize(self, node: Requantize) -> _Operation:
        def operation(call: _Call) -> None:
            x = call.values[node.source]
            call.values[node.name] = codes = np.empty(x.shape, np.int8)
            _requantize(x.reshape(-1), node.shift, delta(node.bits), codes.reshape(-1))

        return operation

    def _pool(self, node: MaxPool | SumPool, kh: int, kw: int, fold: np.ufunc) -> _Operation:
        stride, p = node.stride, node.padding

        def operation(call: _Call) -> None:
            x = call.values[node.source]
            out = np.zeros_like(self._empty(node.name, x, self._width(node.name)))
            padded = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p), (0, 0))) if p else x
            height, width = (stride * (size - 1) + 1 for size in out.shape[2:4])
            for ky in range(kh):
                for kx in range(kw):
                    fold(out, padded[:, :, ky : ky + height : stride, kx : kx + width : stride], out=out)
            call.values[node.name] = out

        return operation

    def _flatten(self, node: Flatten) -> _Operation:
        channels = self.network.proof.shapes[node.source][0]

        def operation(call: _Call) -> None:
            x = call.values[node.source][..., :channels].transpose(0, 1, 4, 2, 3)
            call.values[node.name] = out = self._empty(node.name, x, x.dtype)
            out[:, :, 0, 0, : self.network.proof.shapes[node.name][0]] = x.reshape(*x.shape[:2], -1)

        return operation

    def _readout(self, node: Readout) -> _Operation:
        weight = node.weight.T.astype(np.float64)  # every sum is below 2**33, so doubles are exact in any order
        ins = len(weight)

        def operation(call: _Call) -> None:
            x = call.values[node.source][:, :, 0, 0, :ins]
            call.spikes_in[node.name] = np.count_nonzero(x, axis=(0, 2)).astype(np.int64)
            total = np.broadcast_to(x, (len(x), call.steps, ins)).sum(axis=1, dtype=np.int64)
            if call.states is not None:
                total += call.states.get(node.name, 0)
                call.states[node.name] = total
            call.logits = (total.astype(np.float64) @ weight + node.bias).astype(np.int32)

        return operation


class _JitState:
    def __init__(self, backend: JitBackend, samples: int) -> None:
        self._backend, self._samples = backend, samples
        self._values: dict[str, Array] = {}
        self._spikes_in: dict[str, Array] = {}
        self._states: dict[str, Array] = {}

    def step(self, frame: npt.NDArray[np.uint8]) -> Result:
        """Run one timestep on `frame` [N, C, H, W]."""
        return self.steps(frame[None], 1, True)

    def steps(self, frames: npt.NDArray[np.uint8], steps: int, trace: bool) -> Result:
        """Some timesteps on `frames` [S, N, C, H, W], S 1 or `steps`."""
        return self._backend._call(frames, steps, trace, self._values, self._spikes_in, self._states)


def _planes(value: Array) -> Array:
    """[N, S, H, W, C] as [N, S, P, C]."""
    return value if value.ndim == 4 else value.reshape(*value.shape[:2], -1, value.shape[-1])


def _numbers(leak: _Leak) -> tuple[int, int, int, bool, int]:
    return leak.lowest, leak.v_th, leak.v_soft, leak.hard, leak.rest


def _after(lif: Lif, h: Array) -> tuple[Array, Array]:
    """Spikes and the codes kept, from the membrane: the second half of reference.lif_step."""
    if lif.quantize == "pre_fire":
        code = reference.membrane_code(h, lif.thresholds, lif.bits)
        fired: Array = code > lif.q_th
        return fired, np.where(fired, 0, code)
    fired = h > lif.v_th
    u = np.where(fired, 0 if lif.reset == "hard" else h - lif.v_soft, h)
    return fired, reference.membrane_code(u, lif.thresholds, lif.bits)


def _trace(lif: Lif, channels: int, call: _Call) -> LifTrace:
    def cut(value: Array) -> Array:
        return np.ascontiguousarray(value[..., :channels].transpose(1, 0, 4, 2, 3))

    h, s = cut(call.h[lif.name]), cut(call.s[lif.name]).astype(np.uint8)
    return LifTrace(h, s, _after(lif, h)[1].astype(np.int8))
