"""The engine in C: plans made from proven networks, run by one C call for a batch.

`NativeBackend` packs a network once into what src/mdsnn.h calls a plan: a list of operations, where each value lies in
one scratch arena, and weights in the order the kernels read them. Every number in it comes from the network's proof, so
the C code needs no checks. A plan is immutable; a call takes its scratch and state from Python, so calls may run side
by side (the GIL is released).

`MDSNN_ISA=base|avx2|avx512|amx` forces an instruction set; all give the same integers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import math
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .engine import Activity, Counts, LifTrace, Result, State, Trace, workers
from .errors import ConfigError, MissingError
from .formats import INT32_LIMIT, MAX_SHIFT, Array, delta
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
from .reference import lif_step

log = logging.getLogger(__name__)

ISA_LEVELS = ("base", "avx2", "avx512", "amx")
"""Instruction sets the C sources are compiled for, each a superset of those before it; entry i is enum value i."""

STAGES = ("gather", "sums", "epilogue", "whole")
"""Where an operation's time goes, as in mdsnn.h: its input laid out, sums of products, bn to LIF; and all of it."""
METHODS = ("events, 8 bits", "events, 16 bits", "pairs", "bytes", "grouped", "tiles")
"""How a fused convolution is computed, in the order of mdsnn.h."""
_CONTRACT = 17  # MDSNN_CONTRACT of src/mdsnn.h
_CHUNK = 16  # most steps a pass takes: bounds the scratch of a network with many steps
_ALIGN = 64
_PARTS = 64  # most threads that share a sample
_SHARED = 10**8  # dense products of a sample from which on threads share it: 0.2 ms and more
_COMPARED = 32  # MDSNN_MAX_COMPARED of src/kernels.h
_LINE = 1 << 18  # entries of a channel's dense table beyond which it is not looked at
_MULTIPLIER = 2**15 - 1  # largest of a bn that takes the place of a dense table
_TABLE = 1 << 16  # largest dense table of membrane codes
_I8, _I16, _I32 = range(3)  # enum mdsnn_type
_BLOCK = 64  # channels a fused convolution takes at a time
_VECTOR_BYTES = {"base": 16, "avx2": 32, "avx512": 64, "amx": 64}
_LIST_BYTES = 1 << 20  # room for a band's lists of spikes, if every neuron fired
_BAND_BYTES = 1 << 16  # sums of a band of events
_COLUMN_BYTES = 1 << 24  # largest row of 16-bit columns
_INPUT_BYTES = 1 << 28  # largest input copied for tiles, or lists of one row: beyond, another method
_TILE = 16  # outputs a tile holds
_FILLED = 0.25  # tiles of spikes that are no fuller are slower than lists
_PAIR = 32  # channels that tiles work on at a time
_BUCKETS = 31  # MDSNN_BUCKETS of src/mdsnn.h
_TAPS, _ROWS, _FILL = 3, 3, 4  # windows at a time, rows of a slab and what lists are filled up to, of src/events.h
_CELLS = 15  # MDSNN_CELLS of src/mdsnn.h
_PATTERN = 8  # steps whose spikes a byte holds
_BYTES = ("avx2", "avx512")  # levels that multiply bytes, and have no tiles
_FOURS = 4  # fours that 16 bits must add for products of bytes to be worth it
_FLUSH = 8  # entries that must fit 8 bits for 8-bit sums to be worth it
_REPORT = "please report it with the output of `mdsnn doctor`"
_CURE = "install a C compiler (gcc or clang), then reinstall: pip install --force-reinstall --no-deps mdsnn"


@functools.cache
def _load() -> tuple[Any, str | None]:
    """The compiled module, or why it is not there."""
    try:
        module = importlib.import_module("._native", __package__)
    except ImportError as fault:
        return None, f"the compiled extension does not import ({fault}): {_CURE}"
    if getattr(module.lib, "MDSNN_CONTRACT", 0) != _CONTRACT:
        return None, f"the compiled extension is of another version: {_CURE}"
    return module, None


def unloaded() -> str | None:
    """Why the compiled extension is not there, with the line that cures it; None if it is. Tries nothing."""
    return _load()[1]


def missing() -> str | None:
    """Why the compiled engine cannot run here, with the line that cures it; None if it can.

    Without MDSNN_ISA, the first call also tries the instruction sets, best first, until one passes its self-test.
    """
    reason = unloaded()
    if reason is None and not os.environ.get("MDSNN_ISA"):
        levels = isa_levels()
        if all(fault(level) is not None for level in reversed(levels)):
            reason = f"no instruction set passes its self-test ({levels[0]}: {fault(levels[0])}); {_REPORT}"
    return reason


def _module() -> Any:
    module, reason = _load()
    if reason is not None:
        raise MissingError(f"engine 'native': {reason}")
    return module


def isa_levels() -> tuple[str, ...]:
    """The instruction sets this machine can run, slowest first; raises MissingError if the extension is not there."""
    lib = _module().lib
    return tuple(name for level, name in enumerate(ISA_LEVELS) if lib.mdsnn_supported(level))


@functools.cache
def fault(level: str) -> str | None:
    """What the self-test of an instruction set finds wrong on this machine; None if nothing. Runs once a process."""
    from . import selftest

    if level not in isa_levels():  # asking is also what has AMX granted
        return "this machine cannot run it"
    return selftest.first_fault(lambda network, pixels: NativeBackend(network, level).run(pixels, True))


@functools.cache
def _fallback(level: str, reason: str, below: str) -> None:
    log.warning("instruction set %r fails its self-test (%s): %r takes over; %s", level, reason, below, _REPORT)


def isa() -> str:
    """The instruction set in use: MDSNN_ISA if set, else the best this machine can run that passes its self-test.

    Warns once of one that does not pass.

    raises  ConfigError   if MDSNN_ISA names no instruction set
            MissingError  if this machine cannot run the one it names, if that or every one fails its self-test, or if
                          the extension is not there
    """
    levels = isa_levels()
    chosen = os.environ.get("MDSNN_ISA")
    if chosen and chosen not in ISA_LEVELS:
        raise ConfigError(f"MDSNN_ISA={chosen!r} is none of {', '.join(ISA_LEVELS)}")
    if chosen and chosen not in levels:
        raise MissingError(f"MDSNN_ISA={chosen}: this machine runs {', '.join(levels)}; choose one of these")
    if chosen:
        reason = fault(chosen)
        if reason is not None:
            raise MissingError(f"MDSNN_ISA={chosen}: it fails its self-test ({reason}); unset it, and {_REPORT}")
        return chosen
    for place in reversed(range(len(levels))):
        reason = fault(levels[place])
        if reason is None:
            return levels[place]
        if place:
            _fallback(levels[place], reason, levels[place - 1])
    raise MissingError(f"engine 'native': {missing()}")


# ----------------------------------------------------------------------------------------------------- the plan


@dataclass
class _Value:
    """Where a value will lie; `first` and `last` are the operations that write it and read it last."""

    name: str
    shape: tuple[int, int, int]
    type: int
    pitch: int
    fixed: bool
    first: int
    last: int
    keep: bool = False
    counter: int = -1
    offset: int = 0
    border: int = 0  # pixels of 0 around it
    spare: int = 0  # elements behind it that may be read
    over: _Value | None = None  # what its operation reads last, element by element: it may lie in its place

    def size(self, chunk: int) -> int:
        """Bytes, for at most `chunk` steps."""
        _, height, width = self.shape
        pixels = (height + 2 * self.border) * (width + 2 * self.border)
        return pixels * (1 if self.fixed else chunk) * self.pitch + self.spare << self.type


@dataclass
class _Work:
    """Bytes that one operation needs while it runs: `shared` by all its parts, in scratch, or each part's own."""

    bytes: int
    first: int
    last: int
    shared: bool = False
    offset: int = 0


@dataclass
class _Group:
    """A convolution to run in one operation with its bn, a residual add and a LIF, at the place of `nodes[place]`.

    A linear layer is a 1x1 convolution here.
    """

    conv: Conv
    method: str  # events, pairs, bytes, grouped or tiles
    bn: BnAffine | BnDense
    add: Add | None = None
    other: str | None = None
    fire: Lif | None = None
    stream: bool = False  # whether anything else reads the stream
    place: int = 0

    @property
    def result(self) -> str:
        """Name of the stream after bn and add."""
        return (self.add or self.bn).name


def _groups(network: IntegerNetwork, isa_level: str, chunk: int) -> list[_Group]:
    """What can be fused: by the graph, and by the widths the proof gives."""
    proof = network.proof
    place = {node.name: at for at, node in enumerate(network.nodes)}
    readers: dict[str, list[Node]] = {node.name: [] for node in network.nodes}
    for node in network.nodes:
        for source in node.inputs:
            readers[source].append(node)
    groups: dict[str, _Group] = {}
    for node in network.nodes:
        if not isinstance(node, Conv | Linear) or len(readers[node.name]) > 1:
            continue
        conv = node if isinstance(node, Conv) else _as_conv(node)
        method = _method(network, conv, isa_level, chunk)
        if method is not None:
            bn = readers[conv.name][0]
            assert isinstance(bn, BnAffine | BnDense)  # nothing else reads accumulators
            groups[bn.name] = _Group(conv, method, bn, place=place[bn.name])
    for add in network.nodes:
        if not isinstance(add, Add):
            continue
        for name, other in sorted([(add.source, add.other), (add.other, add.source)], key=lambda pair: -place[pair[0]]):
            alone = name in groups and len(readers[name]) == 1
            if alone and groups[name].add is None and proof.static[name] == proof.static[add.name]:
                groups[name].add, groups[name].other, groups[name].place = add, other, place[add.name]
                break
    for group in groups.values():
        after = readers[group.result]
        fire = [node for node in after if isinstance(node, Lif)]
        if fire and not proof.static[group.result]:
            group.fire = fire[0]
        group.stream = len(after) > (group.fire is not None)
    return list(groups.values())


def _read_stride(reader: Node) -> int:
    """Every so many rows and columns of what a node reads are all that it reads."""
    return reader.stride if isinstance(reader, Conv) and reader.weight.shape[2:] == (1, 1) and not reader.padding else 1


def _as_conv(linear: Linear) -> Conv:
    return Conv(linear.name, linear.source, linear.weight[:, :, None, None], linear.bits)


def _method(network: IntegerNetwork, conv: Conv, isa_level: str, chunk: int) -> str | None:
    """How to run a convolution in blocks of 64 channels; None where only the plain kernel fits."""
    proof = network.proof
    _, c_in, kh, kw = conv.weight.shape
    if not -128 <= proof.ranges[conv.source][0] <= proof.ranges[conv.source][1] <= 127:
        return None
    _, height, width = proof.shapes[conv.source]
    steps = 1 if proof.static[conv.name] else chunk
    copied = (height + 2 * conv.padding) * (width + 2 * conv.padding + kw) * steps * _up(c_in)
    events = proof.kinds[conv.source] == "spikes" and _list_bytes(conv, width, steps) <= _INPUT_BYTES
    events = events and _widen(network, conv) is not None
    if conv.groups > 1:
        grouped = "grouped" if _spread(network, conv, chunk) <= _COLUMN_BYTES else None
        return "events" if events else grouped
    rows = proof.shapes[conv.name][2] * steps  # of tiles, for a row of outputs
    empty = rows <= _FILLED * (-(-rows // _TILE) * _TILE)
    if isa_level == "amx" and copied <= _INPUT_BYTES and not (events and empty):
        return "tiles"
    if events:
        return "events"
    if 2 * proof.shapes[conv.name][2] * chunk * c_in * kh * kw > _COLUMN_BYTES:
        return None
    return "bytes" if isa_level in _BYTES and _fours(network, conv) >= _FOURS else "pairs"


def _bias(network: IntegerNetwork, conv: Conv) -> int:
    """What makes no input negative."""
    return 128 if network.proof.ranges[conv.source][0] < 0 else 0


def _fours(network: IntegerNetwork, conv: Conv) -> int:
    """How many times 16 bits can add the products of four inputs by their weights, as two sums of two."""
    largest = network.proof.ranges[conv.source][1] + _bias(network, conv)
    weight = 2 * max(1, int(conv.weight.max()), -int(conv.weight.min()))
    return (2**15 - 1) // max(1, largest * weight)


def _list_bytes(conv: Conv, width: int, steps: int) -> int:
    """What the lists of an output row take if every input fires: a byte an entry, each list filled up."""
    _, c_in, kh, _ = conv.weight.shape
    return int(width * steps * (c_in * conv.groups * kh + (_FILL - 1) * _slabs(conv)))


def _slabs(conv: Conv) -> int:
    """Slabs of the whole input, of which a block of outputs reads those that its groups lie in."""
    return int(-(-conv.weight.shape[1] * conv.groups // _BLOCK) * -(-conv.weight.shape[2] // _ROWS))


def _own_inputs(conv: Conv) -> Array:
    """(C_out, C_in/groups, kh, kw) to (C_out, ins, kh, kw): weights of the inputs from the first block of 64 on that an
    output's block of 64 reads, as events.h finds it; 0 for those of other groups."""
    if conv.groups == 1:
        return conv.weight
    c_out, c_in, kh, kw = conv.weight.shape
    each, first_out = c_out // conv.groups, np.arange(0, c_out, _BLOCK)
    first = first_out // each * c_in // _BLOCK
    last = (np.minimum(first_out + _BLOCK, c_out) - 1) // each * c_in + c_in - 1
    blocks = int((last // _BLOCK - first).max()) + 1
    first = np.minimum(first, -(-c_in * conv.groups // _BLOCK) - blocks)
    own = np.zeros((c_out, blocks * _BLOCK, kh, kw), np.int8)
    for out in range(c_out):
        at = out // each * c_in - int(first[out // _BLOCK]) * _BLOCK
        own[out, at : at + c_in] = conv.weight[out]
    return own


def _spread(network: IntegerNetwork, conv: Conv, chunk: int) -> int:
    """Bytes of the rows of inputs under a row of windows, laid out for groups; see src/grouped.h."""
    width = network.proof.shapes[conv.source][2] + 2 * conv.padding
    steps = 1 if network.proof.static[conv.name] else chunk
    return int(conv.weight.shape[2] * width * steps * conv.weight.shape[1] * _BLOCK)


def _sums_fit(network: IntegerNetwork, conv: Conv) -> bool:
    """Whether the convolution's accumulators fit 16 bits."""
    lo, hi = network.proof.channel_bounds[conv.name]
    return int(lo.min()) >= -(2**15) and int(hi.max()) < 2**15


def _widen(network: IntegerNetwork, conv: Conv) -> int | None:
    """Slabs of events whose sums fit 16 bits together, whichever inputs fire; 0 if the sums of all do.

    None if a single slab's may not.
    """
    if _sums_fit(network, conv):
        return 0
    columns = _slab_columns(_own_inputs(conv))
    slabs = columns.reshape(len(columns), columns.shape[1] * columns.shape[2], -1)
    up, down = (part(slabs, 0).sum(axis=-1, dtype=np.int32) for part in (np.maximum, np.minimum))
    for many in range(slabs.shape[1], 0, -1):
        first = np.arange(0, slabs.shape[1], many)
        highest, lowest = (np.add.reduceat(part, first, axis=1) for part in (up, down))
        if int(highest.max()) < 2**15 and int(lowest.min()) >= -(2**15):
            return many
    return None


def _up(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


@dataclass(frozen=True)
class _Reach:
    """Which u a LIF quantizes, from its proof, and the thresholds that lie between them."""

    lo: int
    hi: int
    code_first: int
    thresholds: Array

    @classmethod
    def of(cls, lif: Lif, membrane: tuple[int, int]) -> _Reach:
        lo, hi = membrane
        if lif.quantize == "post_reset":
            fired = (0, 0) if lif.reset == "hard" else (lif.v_th + 1 - lif.v_soft, hi - lif.v_soft)
            lo, hi = min(lo, *fired), max(min(hi, lif.v_th), *fired)
        thresholds = lif.thresholds.astype(np.int64)
        below = int((thresholds <= lo).sum())
        return cls(lo, hi, below - delta(lif.bits), thresholds[below : int((thresholds <= hi).sum())])


def _buckets(reach: _Reach, lif: Lif) -> tuple[int, int, Array, Array, Array] | None:
    """Buckets of u that hold one threshold each (see mdsnn.h): base, shift, thresholds, codes, decoded codes.

    None where that takes more than 31, or u - base could leave 16 bits.
    """
    thresholds = reach.thresholds
    different = int(np.count_nonzero(np.diff(thresholds))) + 1
    if not len(thresholds) or different > _BUCKETS:
        return None
    for shift in range(15, -1, -1):
        base = (int(thresholds[0]) - 1) >> shift << shift  # below every threshold
        places = (thresholds - base) >> shift
        apart = int(np.count_nonzero(np.diff(places))) + 1 == different
        if not apart or int(places[-1]) >= _BUCKETS or reach.lo - base < -(2**15) or reach.hi - base >= 2**15:
            continue
        at = np.full(_BUCKETS + 1, 32767)
        at[places] = thresholds
        counts = np.searchsorted(places, np.arange(_BUCKETS + 1), side="left")
        codes = reach.code_first + counts
        return base, shift, at, codes, lif.decode[codes + delta(lif.bits)]
    return None


def _cells(reach: _Reach, lif: Lif) -> tuple[int, int, int, Array, Array] | None:
    """At most 15 cells of u, all of one width, that hold one threshold each (see mdsnn.h): base, span, factor,
    thresholds, decoded codes.

    None where there are no such, or the thresholds lie more than 16 bits apart.
    """
    thresholds = _different(reach.thresholds)
    if not 0 < len(thresholds) <= _CELLS or thresholds[-1] - thresholds[0] >= 2**15:
        return None
    base, span = int(thresholds[0]), int(thresholds[-1] - thresholds[0])
    for last in range(len(thresholds) - 1, _CELLS):
        factor = min(2**15 - 1, ((last + 1) * 2**16 - 1) // max(span, 1))
        places = (thresholds - base) * factor >> 16
        if len(_different(places)) < len(thresholds):
            continue
        at = np.full(_CELLS + 1, 32767)
        at[places] = thresholds
        below = np.searchsorted(places, np.arange(_CELLS + 1))  # different thresholds before each cell
        counts = np.append(np.searchsorted(reach.thresholds, thresholds), len(reach.thresholds))[below]
        return base, span, factor, at, lif.decode[reach.code_first + counts + delta(lif.bits)]
    return None


def _different(ascending: Array) -> Array:
    """Each value once (np.unique would import numpy.ma, which takes as long as a plan)."""
    different: Array = ascending[np.append(np.diff(ascending) != 0, np.ones(min(len(ascending), 1), bool))]
    return different


def _patterns(lif: Lif, x: Array, steps: int) -> Array:
    """Bit t: whether a LIF that gets x at every step fires at step t. Three more entries, for reads of four bytes."""
    patterns, q = np.zeros(len(x) + 3, np.int64), np.zeros(len(x), np.int64)
    options = (lif.bits, lif.v_th, lif.reset, lif.v_soft, lif.quantize, lif.q_th)
    for t in range(steps):
        _, s, q = lif_step(x, q, lif.decode, lif.thresholds, *options)
        patterns[: len(x)] |= s << t
    return patterns


def _affine(node: BnDense, lo: Array, hi: Array, saturation: int) -> BnAffine | None:
    """The table as multiply, add and shift, 16-bit multipliers and 32-bit sums; None if that cannot give all entries.

    lo, hi  the accumulators of each channel, as the proof has them
    Vectors add and shift, where they would read a table one entry at a time.
    """
    ends = np.cumsum(hi - lo + 1)
    found = np.zeros((3, len(lo)), np.int64)
    for c in range(len(lo)):
        line = _line(node.table[ends[c] - (hi[c] - lo[c] + 1) : ends[c]].astype(np.int64), int(lo[c]), saturation)
        if line is None:
            return None
        found[:, c] = line
    return BnAffine(node.name, node.source, *found)


def _line(y: Array, first: int, saturation: int) -> tuple[int, int, int] | None:
    """Multiplier, offset and shift that give y for the accumulators from `first` on; None if there are no such.

    For a multiplier m the offset must lie between two bounds, each a maximum or minimum over accumulators, and how far
    these lie apart is concave in m: m is found by bisection.
    """
    if y[0] == y[-1]:  # tables are monotone
        return 0, int(y[0]), 0
    if len(y) > _LINE:
        return None
    acc = np.arange(first, first + len(y))
    reached, kept = np.flatnonzero(y > -saturation), np.flatnonzero(y < saturation)  # one bound where y is saturated
    straight = np.flatnonzero(abs(y) < saturation)
    run = int(straight[-1] - straight[0]) if len(straight) else 0
    rise = int(y[straight[-1]] - y[straight[0]]) if run else 0
    steep = max(abs(rise) - 1, 1) if run else 2 * saturation
    shift = min(MAX_SHIFT, (_MULTIPLIER * max(run, 1) // steep).bit_length() - 1)
    while shift >= 0:
        low, high = (((rise - 1) << shift) // run, ((rise + 1) << shift) // run + 1) if run else (-(2**62), 2**62)
        cut = low < -_MULTIPLIER or high > _MULTIPLIER
        low, high = max(low, -_MULTIPLIER), min(high, _MULTIPLIER)
        at_least, at_most = y[reached] << shift, (y[kept] + 1 << shift) - 1  # of m*acc + offset
        while low <= high:
            m = (low + high) >> 1
            bottom, top = at_least - m * acc[reached], at_most - m * acc[kept]
            i, j = int(bottom.argmax()), int(top.argmin())
            if bottom[i] <= top[j]:
                if abs(m) * max(-first, first + len(y) - 1) + abs(int(bottom[i])) < INT32_LIMIT:
                    return m, int(bottom[i]), shift
                cut = True
                break
            wider = int(acc[reached[i]] - acc[kept[j]])  # by how much if m grows by 1
            if wider == 0:
                break
            low, high = (m + 1, high) if wider > 0 else (low, m - 1)
        if not cut:  # no line at all
            return None
        shift -= 1
    return None


def _narrow_stream(network: IntegerNetwork) -> bool:
    """Whether every stream value, membrane and membrane constant fits 16 bits."""
    proof = network.proof
    for node in network.nodes:
        lo, hi = proof.ranges[node.name]
        if proof.kinds[node.name] == "stream" and not -32767 <= lo <= hi <= 32767:
            return False
        if isinstance(node, Lif):
            reach = _Reach.of(node, proof.membranes[node.name])
            lo, hi = proof.membranes[node.name]
            if min(lo, reach.lo, int(node.decode.min())) < -32767 or max(hi, reach.hi, int(node.decode.max())) > 32766:
                return False
            if node.v_soft > 32767:
                return False
    return True


class _Plan:
    """Builds the C structures of a network. Keeps every array they point into alive."""

    def __init__(self, network: IntegerNetwork, level: int) -> None:
        module = _module()
        self.ffi, self.lib, self.network, self.level = module.ffi, module.lib, network, level
        self.keep: list[Any] = []
        self.chunk = min(network.timesteps, _CHUNK)
        self.stream_type = _I16 if _narrow_stream(network) else _I32
        self.index: dict[str, int] = {}
        self.values: list[_Value] = []
        self.state_bytes = 0
        self.counters: dict[str, int] = {}
        self.weight_bytes: dict[str, int] = {}
        proof = network.proof
        groups = {network.nodes[group.place].name: group for group in self._groups()}
        inside = {
            name
            for group in groups.values()
            for name in (group.conv.name, group.bn.name, group.add and group.add.name, group.fire and group.fire.name)
        } - groups.keys()
        self.steps: list[tuple[int, Node | _Group]] = [
            (place, groups.get(node.name, node)) for place, node in enumerate(network.nodes) if node.name not in inside
        ]
        for place, step in self.steps:
            if isinstance(step, _Group):
                if step.stream:
                    self._value(network[step.result], place)
                    if step.other:
                        self.values[-1].over = self.values[self.index[step.other]]
                if step.fire is not None:
                    self._value(step.fire, place)
                reads = [step.conv.source, *([step.other] if step.other else [])]
                dynamic = not proof.static[step.result]
            else:
                if not isinstance(step, Readout):
                    self._value(step, place)
                reads = list(step.inputs)
                dynamic = not proof.static[step.name] or isinstance(step, Readout)
            for name in reads:
                value = self.values[self.index[name]]
                value.last = place
                value.keep |= value.fixed and dynamic
        for node in network.nodes:
            if isinstance(node, Conv | Linear | Readout):
                self._count(node.source)
            elif isinstance(node, Lif):
                self._count(node.name)
        self._borders()
        self.work = {
            step.conv.name: [
                _Work(size, place, place, shared=step.method == "tiles" and number == 0)
                for number, size in enumerate(self._work_sizes(step))
            ]
            for place, step in self.steps
            if isinstance(step, _Group)
        }
        self._place()
        self.lifs = {lif.name: number for number, lif in enumerate(network.lifs)}
        fused = [step for _, step in self.steps if isinstance(step, _Group)]
        self.tiles = self._tiles([group.conv for group in fused if group.method == "tiles"])
        ops = [self._fused(step) if isinstance(step, _Group) else self._op(step) for _, step in self.steps]
        self.struct = self._struct(ops)

    def _groups(self) -> list[_Group]:
        return _groups(self.network, ISA_LEVELS[self.level], self.chunk)

    def _value(self, node: Node, place: int) -> None:
        proof = self.network.proof
        shape, kind = proof.shapes[node.name], proof.kinds[node.name]
        blocks = kind in ("stream", "spikes")
        pitch = -(-shape[0] // _BLOCK) * _BLOCK if blocks else shape[0]
        self.index[node.name] = len(self.values)
        self.values.append(_Value(node.name, shape, self._type(node), pitch, proof.static[node.name], place, place))

    def _type(self, node: Node) -> int:
        proof = self.network.proof
        if proof.kinds[node.name] == "stream":
            return self.stream_type
        lo, hi = proof.ranges[node.name]
        return _I8 if proof.kinds[node.name] != "accumulators" and lo >= -128 and hi <= 127 else _I32

    def _count(self, name: str) -> None:
        if name not in self.counters:
            self.counters[name] = len(self.counters)
            self.values[self.index[name]].counter = self.counters[name]

    def _borders(self) -> None:
        """Spikes that nothing but tiles of stride 1 read get the padding those want, so that they need no copy.

        The blocks of a step of a pixel are an odd number then: lines an even number apart share few sets of the cache.
        """
        paddings: dict[str, set[int]] = {}
        for _, step in self.steps:
            if isinstance(step, _Group):
                tiled = step.method == "tiles" and step.conv.stride == 1
                paddings.setdefault(step.conv.source, set()).add(step.conv.padding if tiled else 0)
                if step.other:
                    paddings.setdefault(step.other, set()).add(0)
            else:
                for name in step.inputs:
                    paddings.setdefault(name, set()).add(0)
        for name, found in paddings.items():
            value, border = self.values[self.index[name]], max(found)
            if len(found) == 1 and border and not value.fixed and self.network.proof.kinds[name] == "spikes":
                value.border = border
                value.pitch = (value.pitch // _BLOCK | 1) * _BLOCK
                value.spare = self._tall(self.chunk) * value.pitch

    def _tall(self, steps: int) -> int:
        """Rows of the largest group of tiles, with as many steps, what the last pass takes, or one."""
        return max(math.lcm(many, _TILE) for many in (steps, self.network.timesteps % self.chunk or steps, 1))

    def _place(self) -> None:
        """Give every value its offset: kept ones in the state, others in scratch, first fit among those alive.

        What a part of an operation needs to itself lies from 0 on, in an area that operations use one after the other.
        """
        self.scratch_bytes = self.work_bytes = 0
        for parts in self.work.values():
            end = 0
            for item in parts:
                if not item.shared:
                    item.offset, end = end, end + _up(item.bytes)
            self.work_bytes = max(self.work_bytes, end)
        alive: list[tuple[int, int, int]] = []  # offset, end, last
        work = [item for items in self.work.values() for item in items if item.shared]
        items: list[_Value | _Work] = [*self.values, *work]
        for value in sorted(items, key=lambda item: item.first):
            size = _up(value.bytes if isinstance(value, _Work) else value.size(self.chunk))
            if isinstance(value, _Value) and value.keep:
                value.offset = self._state(size)
                continue
            alive = [entry for entry in alive if entry[2] >= value.first]
            over = value.over if isinstance(value, _Value) and value.over and value.over.fixed == value.fixed else None
            if over and over.last == value.first and not over.keep:
                value.offset = over.offset
                alive = [entry for entry in alive if entry[0] != over.offset]
                alive.append((over.offset, over.offset + size, value.last))
                continue
            at = 0
            for offset, end, _ in sorted(alive):
                if offset - at >= size:
                    break
                at = max(at, end)
            value.offset = at
            alive.append((at, at + size, value.last))
            self.scratch_bytes = max(self.scratch_bytes, at + size)

    def _state(self, size: int) -> int:
        offset, self.state_bytes = self.state_bytes, self.state_bytes + _up(size)
        return offset

    def _pointer(self, ctype: str, array: npt.ArrayLike, dtype: Any) -> Any:
        return self._hold(ctype, _aligned(np.asarray(array, dtype=dtype)))

    def _hold(self, ctype: str, packed: Array) -> Any:
        """A pointer to an array on a cache line, which is kept."""
        pointer = self.ffi.cast(f"const {ctype} *", self.ffi.from_buffer(packed)) if packed.size else self.ffi.NULL
        self.keep.append(packed)
        return pointer

    def _tiles(self, convs: list[Conv]) -> dict[str, Any]:
        """Weights for the tiles, those of one convolution behind those of the one before; where each begins."""
        for conv in convs:
            c_out, c_in, kh, kw = conv.weight.shape
            pairs = -(-c_out // _PAIR) * _up(c_in) * kh * kw * _PAIR
            self.weight_bytes[conv.name] = pairs // 2 if _four_bits(conv) else pairs
        packed = _arena(sum(self.weight_bytes.values())).view(np.int8)
        at = 0
        begins = {}
        for conv in convs:
            begins[conv.name] = at
            for first in range(0, len(conv.weight), _PAIR):
                part = _pack_tiles(conv.weight[first : first + _PAIR], _four_bits(conv))
                packed[at : at + part.size].reshape(part.shape)[...] = part
                at += part.size
        pointer = self._hold("int8_t", packed)
        return {name: pointer + at for name, at in begins.items()}

    def _events_weights(self, conv: Conv) -> tuple[Any, int]:
        """Weights for lists of spikes, and how many entries 8 bits can add: a multiple of 4."""
        vector, flush = _VECTOR_BYTES[ISA_LEVELS[self.level]], _ROWS * _BLOCK

        def pack(weight: Array) -> Array:
            nonlocal flush
            slabs = _event_slabs(weight, conv.stride, vector)
            for slab in slabs:
                if slab.shape[1] > 1:  # no padding
                    flush = _flush(slab, flush) if flush >= _FLUSH else 0
            return _pack_events(slabs, _four_bits(conv))

        packed = _packed(_own_inputs(conv), _BLOCK, pack)
        flush = flush // _FILL * _FILL
        if flush < _FLUSH:
            packed[..., ::2] ^= -128  # even bytes are unsigned: the weight + 128
        return self._hold("int8_t", packed), flush

    def _op(self, node: Node) -> dict[str, Any]:
        """The fields of mdsnn_op for a node."""
        proof, index = self.network.proof, self.index
        inputs = [index.get(source, -1) for source in node.inputs]
        op: dict[str, Any] = {
            "source": inputs[0] if inputs else -1,
            "other": inputs[1] if len(inputs) > 1 else -1,
            "out": index.get(node.name, -1),
            "fixed": int(proof.static[node.name] and not isinstance(node, Readout)),
            "lif": -1,
        }
        match node:
            case InputTable():
                op.update(kind=self.lib.MDSNN_INPUT, weight=self._pointer("int8_t", node.table, np.int8))
            case Conv():
                op.update(
                    kind=self.lib.MDSNN_CONV,
                    kernel_height=node.weight.shape[2],
                    kernel_width=node.weight.shape[3],
                    stride=node.stride,
                    padding=node.padding,
                    groups=node.groups,
                    weight=self._pointer("int8_t", _by_input(node.weight, node.groups), np.int8),
                )
            case Linear():
                op.update(
                    kind=self.lib.MDSNN_CONV,
                    kernel_height=1,
                    kernel_width=1,
                    stride=1,
                    groups=1,
                    weight=self._pointer("int8_t", node.weight.T, np.int8),
                )
            case BnDense() if (affine := self._affine(node)) is not None:
                op.update(self._op(affine))
            case BnAffine():
                narrow = np.where(np.abs(node.offset) < 2**31, node.offset, 0)  # not read where 64 bits are needed
                op.update(
                    kind=self.lib.MDSNN_BN_AFFINE,
                    multiplier=self._pointer("int32_t", _blocks(node.multiplier), np.int32),
                    offset_32=self._pointer("int32_t", _blocks(narrow), np.int32),
                    shift_32=self._pointer("int32_t", _blocks(node.shift), np.int32),
                    offset=self._pointer("int64_t", node.offset, np.int64),
                    shift=self._pointer("uint8_t", node.shift, np.uint8),
                    wide=int(proof.product_bits.get(node.name) == 64),
                    short_product=int(self._short_product(node)),
                    saturation=self.network.grid.saturation,
                )
            case BnDense():
                lo, hi = proof.channel_bounds[node.source]
                sizes = hi - lo + 1
                op.update(
                    kind=self.lib.MDSNN_BN_DENSE,
                    table=self._pointer("int32_t", node.table, np.int32),
                    start=self._pointer("int64_t", np.cumsum(sizes) - sizes - lo, np.int64),
                )
            case Add():
                op.update(kind=self.lib.MDSNN_ADD)
            case Requantize():
                strides = {_read_stride(reader) for reader in self.network.nodes if node.name in reader.inputs}
                op.update(kind=self.lib.MDSNN_REQUANTIZE, bits_shift=node.shift, top=delta(node.bits))
                op.update(stride=strides.pop() if len(strides) == 1 else 1)
            case Lif():
                op.update(kind=self.lib.MDSNN_LIF, **self._lif(node))
            case MaxPool():
                op.update(
                    kind=self.lib.MDSNN_MAX_POOL,
                    kernel_height=node.kernel,
                    kernel_width=node.kernel,
                    stride=node.stride,
                    padding=node.padding,
                )
            case SumPool():
                op.update(
                    kind=self.lib.MDSNN_SUM_POOL,
                    kernel_height=node.kernel_height,
                    kernel_width=node.kernel_width,
                    stride=node.stride,
                    padding=node.padding,
                )
            case Flatten():
                op.update(kind=self.lib.MDSNN_FLATTEN)
            case Readout():
                op.update(
                    kind=self.lib.MDSNN_READOUT,
                    weight=self._pointer("int8_t", node.weight, np.int8),
                    table=self._pointer("int32_t", node.bias, np.int32),
                    state=self._state(4 * node.weight.shape[1]),
                )
            case _:
                raise NotImplementedError(type(node).__name__)
        return op

    def _work_sizes(self, group: _Group) -> tuple[int, ...]:
        """Bytes of what a group works on, in the order of mdsnn_op's fields work_...: input to y."""
        proof, conv = self.network.proof, group.conv
        c_in, height, width = proof.shapes[conv.source]
        out_width = proof.shapes[conv.name][2]
        kw = conv.weight.shape[3]
        steps, band = self._steps(group), self._band(group)
        row = out_width * steps * _BLOCK
        after_bn = row << self.stream_type
        if group.method == "events":
            lists = _list_bytes(conv, width, steps) * band + 2 * _ALIGN
            ring = (band - 1) * conv.stride + conv.weight.shape[2]
            spots = (_BLOCK + 1) * ring * width * steps * -(-c_in // _BLOCK)
            starts = 4 * _slabs(conv) * band * (steps * width + 1)
            slab = _up((_ROWS * _BLOCK + 1) * kw * _BLOCK) + 2 * _BLOCK
            return lists, slab, spots, starts, band * self._events(group), after_bn
        if group.method == "bytes":
            return out_width * steps * _depth(conv, 4), 0, 0, 0, 4 * row, after_bn
        if group.method == "grouped":
            return _spread(self.network, conv, self.chunk), 0, 0, 0, 4 * row, after_bn
        if group.method == "pairs":
            return 2 * out_width * steps * _depth(conv, 2), 0, 0, 0, 4 * row, after_bn
        columns = min(conv.stride, kw) * (out_width + (kw - 1) // conv.stride)
        tall = self._tall(steps)
        copied = (height + 2 * conv.padding) * columns * steps * _up(c_in) + tall * _BLOCK
        return (
            0 if self.values[self.index[conv.source]].border else copied,
            2 * _up(c_in) * conv.weight.shape[2] * kw * _PAIR if _four_bits(conv) else 0,
            0,
            8 * _up(c_in) // _BLOCK * conv.weight.shape[2] * kw,
            (8 * _PAIR + _BLOCK) * tall * 4,
            tall * _BLOCK << self.stream_type,
        )

    def _steps(self, group: _Group) -> int:
        return 1 if self.network.proof.static[group.result] else self.chunk

    def _events(self, group: _Group) -> int:
        """Bytes of the sums of an output row by events, with windows to spare at both ends."""
        proof, conv = self.network.proof, group.conv
        last = (proof.shapes[conv.source][2] - 1 + conv.padding) // conv.stride
        across = (conv.weight.shape[3] - 1) // conv.stride + max(proof.shapes[conv.name][2], last + 1)
        return int((2 if _sums_fit(self.network, conv) else 6) * across * self._steps(group) * _BLOCK)

    def _band(self, group: _Group) -> int:
        """Output rows to work on at a time."""
        height = self.network.proof.shapes[group.conv.name][1]
        if group.method != "events":
            return 1
        lists = _list_bytes(group.conv, self.network.proof.shapes[group.conv.source][2], self._steps(group))
        return max(1, min(height, _LIST_BYTES // lists, _BAND_BYTES // self._events(group)))

    def _fused(self, group: _Group) -> dict[str, Any]:
        """The fields of mdsnn_op for a group."""
        conv, ffi = group.conv, self.ffi
        bn = ffi.new("mdsnn_op *", self._op(group.bn))
        self.keep.append(bn)
        fire = ffi.NULL
        if group.fire is not None:
            fire = ffi.new("mdsnn_op *", self._op(group.fire))
            self.keep.append(fire)
        flush, widen, nibbles, span, bias = 0, 0, False, 0, 0
        match group.method:
            case "tiles":
                method, packed, nibbles = self.lib.MDSNN_TILES, self.tiles[conv.name], _four_bits(conv)
            case "pairs":
                method, packed = self.lib.MDSNN_PAIRS, self._hold("int16_t", _packed(conv.weight, _BLOCK, _pack_pairs))
            case "bytes":
                flush, bias = _fours(self.network, conv), _bias(self.network, conv)
                method = self.lib.MDSNN_BYTES
                packed = self._hold("int8_t", _packed(conv.weight, _BLOCK, lambda some: _pack_bytes(some, bias)))
            case "grouped":
                method, widen = self.lib.MDSNN_GROUPED, int(not _sums_fit(self.network, conv))
                packed = self._hold("int16_t", _packed(conv.weight, _BLOCK, _pack_grouped))
            case _:
                span = -(-_own_inputs(conv).shape[1] // _BLOCK)
                packed, flush = self._events_weights(conv)
                widen, nibbles = _widen(self.network, conv) or 0, _four_bits(conv)
                method = self.lib.MDSNN_EVENTS_8 if flush >= _FLUSH else self.lib.MDSNN_EVENTS_16
        if group.method != "tiles":
            self.weight_bytes[conv.name] = self.keep[-1].nbytes
        work_input, slab, spots, starts, sums, y = (item.offset for item in self.work[conv.name])
        return {
            "kind": self.lib.MDSNN_FUSED,
            "source": self.index[conv.source],
            "other": self.index[group.other] if group.other else -1,
            "out": self.index[group.result] if group.stream else -1,
            "fixed": int(self.network.proof.static[group.result]),
            "lif": -1,
            "kernel_height": conv.weight.shape[2],
            "kernel_width": conv.weight.shape[3],
            "stride": conv.stride,
            "padding": conv.padding,
            "groups": conv.groups,
            "weight": self.ffi.cast("const int8_t *", packed),
            "bn": bn,
            "fire": fire,
            "method": method,
            "flush": flush,
            "widen": widen,
            "span": span,
            "nibbles": int(nibbles),
            "band": self._band(group),
            "depth": _depth(conv, 4 if group.method == "bytes" else 2),
            "bias": bias,
            "work_input": work_input,
            "work_slab": slab,
            "work_spots": spots,
            "work_starts": starts,
            "work_sums": sums,
            "work_y": y,
        }

    def _affine(self, node: BnDense) -> BnAffine | None:
        return _affine(node, *self.network.proof.channel_bounds[node.source], self.network.grid.saturation)

    def _code_decode(self, node: Lif, codes: Array) -> Array:
        """Codes in the lower half, what they decode to in the upper one; zeros where that needs more than 16 bits."""
        if self.stream_type == _I32:
            return np.zeros(1, np.int64)
        both: Array = node.decode[codes + delta(node.bits)].astype(np.int64) * 65536 + (codes & 0xFFFF)
        return both

    def _short_product(self, node: BnAffine) -> bool:
        lo, hi = self.network.proof.channel_bounds[node.source]
        factors = (node.multiplier, lo, hi)
        narrow = all(int(factor.min()) > -(2**15) and int(factor.max()) < 2**15 for factor in factors)
        return narrow and self.network.proof.product_bits.get(node.name) != 64

    def _lif(self, node: Lif) -> dict[str, Any]:
        reach = _Reach.of(node, self.network.proof.membranes[node.name])
        thresholds = reach.thresholds
        fields: dict[str, Any] = {
            "lif": self.lifs[node.name],
            "search": self.lib.MDSNN_COMPARE,
            "thresholds": len(thresholds),
            "code_first": reach.code_first,
            "threshold": self._pointer("int32_t", thresholds, np.int32),
            "decode": self._pointer("int32_t", node.decode, np.int32),
            "top": delta(node.bits),
            "v_th": node.v_th if self.stream_type == _I32 else min(node.v_th, 32767),
            "v_soft": node.v_soft,
            "q_th": node.q_th,
            "pre_fire": int(node.quantize == "pre_fire"),
            "soft": int(node.reset == "soft"),
            "state": self._state(int(np.prod(self.network.proof.shapes[node.name]))),
        }
        buckets = _buckets(reach, node) if self.stream_type == _I16 else None
        if buckets is not None:
            base, shift, *tables = buckets
            names = ("bucket_threshold", "bucket_code", "bucket_decode")
            fields.update(buckets=1, bucket_base=base, bucket_shift=shift)
            fields.update(
                {name: self._pointer("int16_t", table, np.int16) for name, table in zip(names, tables, strict=True)}
            )
        if self.network.proof.static[node.source] and self.network.timesteps <= _PATTERN:
            lo, hi = self.network.proof.ranges[node.source]
            if hi - lo < _TABLE:
                patterns = _patterns(node, np.arange(lo, hi + 1), self.network.timesteps)
                fields.update(pattern=self._pointer("uint8_t", patterns, np.uint8), pattern_first=lo)
        cells = _cells(reach, node) if self.stream_type == _I16 else None
        if cells is not None:
            base, span, factor, *tables = cells
            fields.update(cells=1, cell_base=base, cell_span=span, cell_factor=factor)
            fields.update(
                {
                    name: self._pointer("int16_t", table, np.int16)
                    for name, table in zip(("cell_threshold", "cell_decode"), tables, strict=True)
                }
            )
        if len(thresholds) > _COMPARED:
            fields["search"] = self.lib.MDSNN_BISECT
            base = int(thresholds[0]) - 1
            if int(thresholds[-1]) - base < _TABLE:
                u = np.arange(base, int(thresholds[-1]) + 1)
                codes = reach.code_first + np.searchsorted(thresholds, u, side="right")
                fields.update(
                    search=self.lib.MDSNN_TABLE,
                    code=self._pointer("int8_t", codes, np.int8),
                    code_decode=self._pointer("int32_t", self._code_decode(node, codes), np.int32),
                    code_base=base,
                    code_count=len(codes),
                )
        return fields

    def _struct(self, ops: list[dict[str, Any]]) -> Any:
        ffi = self.ffi
        c_ops = ffi.new("mdsnn_op[]", ops)
        c_values = ffi.new(
            "mdsnn_value[]",
            [
                {
                    "offset": value.offset,
                    "place": self.lib.MDSNN_STATE if value.keep else self.lib.MDSNN_SCRATCH,
                    "type": value.type,
                    "height": value.shape[1],
                    "width": value.shape[2],
                    "channels": value.shape[0],
                    "pitch": value.pitch,
                    "fixed": int(value.fixed),
                    "counter": value.counter,
                    "border": value.border,
                }
                for value in self.values
            ],
        )
        self.keep += [c_ops, c_values]
        spec = self.network.input
        return ffi.new(
            "mdsnn_plan *",
            {
                "ops": c_ops,
                "values": c_values,
                "op_count": len(ops),
                "value_count": len(self.values),
                "channels": spec.channels,
                "height": spec.height,
                "width": spec.width,
                "classes": self.network.classes,
                "stream_type": self.stream_type,
                "chunk": self.chunk,
                "counters": len(self.counters),
                "bits": self._pointer("uint8_t", _bit_places(), np.uint8),
                "counted": self._state(8 * len(self.counters)),
                "state_bytes": self.state_bytes,
                "scratch_bytes": self.scratch_bytes,
                "work_bytes": self.work_bytes,
            },
        )


def _by_input(weight: Array, groups: int) -> Array:
    """(C_out, C_in/groups, kh, kw) to [group][ky][kx][in][out]: an input's weights for all outputs lie together."""
    c_out, per_group, kh, kw = weight.shape
    return weight.reshape(groups, c_out // groups, per_group, kh, kw).transpose(0, 3, 4, 2, 1)


def _blocks(constants: Array) -> Array:
    """Constants of channels, with 0 for those up to the next block."""
    padded = np.zeros(-(-len(constants) // _BLOCK) * _BLOCK, constants.dtype)
    padded[: len(constants)] = constants
    return padded


def _depth(conv: Conv, together: int) -> int:
    """Inputs under a window, rounded up to a pair or four."""
    inputs = int(np.prod(conv.weight.shape[1:]))
    return inputs + -inputs % together


def _pack_pairs(weight: Array) -> Array:
    """(C_out, C_in, kh, kw) to [outs/64][pair][out 64][2], the inputs of a window in the order (ky, kx, in)."""
    rows = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
    padded = np.zeros((-(-len(rows) // _BLOCK) * _BLOCK, rows.shape[1] + rows.shape[1] % 2), np.int16)
    padded[: len(rows), : rows.shape[1]] = rows
    return padded.reshape(-1, _BLOCK, padded.shape[1] // 2, 2).transpose(0, 2, 1, 3)


def _pack_bytes(weight: Array, bias: int) -> Array:
    """At most 64 outputs, (C_out, C_in, kh, kw), to [four][out 64][4], inputs of a window in the order (ky, kx, in),
    then [out 64], int32: what takes the bias out of an output's sum."""
    rows = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
    padded = np.zeros((_BLOCK, rows.shape[1] + -rows.shape[1] % 4), np.int8)
    padded[: len(rows), : rows.shape[1]] = rows
    fours = padded.reshape(_BLOCK, -1, 4).transpose(1, 0, 2).reshape(-1)
    return np.concatenate([fours, (-bias * padded.sum(axis=1, dtype=np.int32)).view(np.int8)])


def _pack_grouped(weight: Array) -> Array:
    """At most 64 outputs, (C_out, C_in/groups, kh, kw), to [ky][kx][in of a group][out 64]."""
    padded = np.zeros((_BLOCK, *weight.shape[1:]), np.int16)
    padded[: len(weight)] = weight
    return padded.transpose(2, 3, 1, 0)


def _four_bits(conv: Conv) -> bool:
    """Whether the weights fit four bits."""
    return conv.bits <= 4


def _pack_tiles(weight: Array, nibbles: bool) -> Array:
    """(C_out, C_in, kh, kw) to [outs/32][ins/64][ky][kx][half][ins/4 16][out 16][in 4], zeros as padding.

    Of 32 outputs the first half holds those of even number when counted in fours (see src/tiles.h). Weights of four
    bits lie two a byte, 16 times the second half's and the first half's: no axis of halves then.
    """
    c_out, c_in, kh, kw = weight.shape
    padded = np.zeros((-(-c_out // _PAIR) * _PAIR, _up(c_in), kh, kw), np.int8)
    padded[:c_out, :c_in] = weight
    split = padded.reshape(-1, 4, 2, 4, -(-c_in // _BLOCK), 16, 4, kh, kw)  # out/32, fours/2, half, out of four, ...
    packed: Array = split.transpose(0, 4, 7, 8, 2, 5, 1, 3, 6)
    if nibbles:
        packed = packed[:, :, :, :, 0] + 16 * packed[:, :, :, :, 1]
    return packed


def _slab_columns(weight: Array) -> Array:
    """(C_out, C_in, kh, kw) to (C_out, ins/64, kh/3, kw, 192): what one output may add of a slab, for each tap."""
    c_out, c_in, kh, kw = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -c_in % _BLOCK), (0, -kh % _ROWS), (0, 0)))
    parts = padded.reshape(c_out, -1, _BLOCK, -(-kh // _ROWS), _ROWS, kw).transpose(0, 1, 3, 5, 4, 2)
    return parts.reshape(*parts.shape[:4], -1)


def _flush(slabs: Array, most: int) -> int:
    """Entries of a list that 8 bits can add, whichever they are, if those are fewer than `most`.

    slabs  (slabs, entries, sums): what each entry adds to each sum
    The k largest of some codes sum to the sum, over levels, of how many reach the level, at most k. Of wide codes some
    levels stand for those above them: a little too large a sum, so too few entries, never too many.
    """
    top = max(int(slabs.max()), -int(slabs.min()), 1)
    step = -(-top // 16)
    for sign, limit in ((1, 127), (-1, 128)):
        levels = (sign * np.arange(1, top + 1, step)).astype(np.int8)[:, None, None]
        for slab in slabs:
            reached = slab >= levels if sign > 0 else slab <= levels
            many = reached.view(np.uint8).sum(axis=1, dtype=np.uint8).astype(np.int16)
            fewest = 0
            while most > fewest:  # fewest fit; more than most do not
                middle = most if fewest == 0 else (most + fewest + 1) // 2
                fits = int(np.minimum(many, middle).sum(axis=0).max()) * step <= limit
                fewest, most = (middle, most) if fits else (fewest, middle - 1)
    return most


def _event_slabs(weight: Array, stride: int, vector: int) -> list[Array]:
    """At most 64 outputs as events.h wants them: for each kh/3 and taps read together, (ins/64, entries, tap * out 64).

    Entries are [row of 3][in 64] and one of zeros, which fills lists. After each kh/3 zeros to a line of 128, if any.
    vector  bytes of one: the first half of its channels lies in even bytes, the second in odd ones
    """
    c_out, c_in, kh, kw = weight.shape
    order = np.arange(_BLOCK).reshape(-1, 2, vector // 2).transpose(0, 2, 1).reshape(-1)
    padded = np.zeros((_BLOCK, _up(c_in), kh, kw), np.int8)
    padded[:c_out, :c_in] = weight
    rows = padded[order].reshape(_BLOCK, -1, _BLOCK, kh, kw).transpose(1, 3, 2, 4, 0)
    ins = len(rows)
    slabs = []
    for first_row in range(0, kh, _ROWS):
        entries = rows[:, first_row : first_row + _ROWS].reshape(ins, -1, kw, _BLOCK)
        for residue in range(min(stride, kw)):
            taps = range(residue, kw, stride)
            for first in range(0, len(taps), _TAPS):
                some = entries[:, :, taps[first : first + _TAPS]].reshape(ins, entries.shape[1], -1)
                slabs.append(np.concatenate([some, np.zeros_like(some[:, :1])], axis=1))
        size = (entries.shape[1] + 1) * kw * _BLOCK
        slabs.append(np.zeros((ins, 1, -size % (2 * _BLOCK)), np.int8))
    return slabs


def _pack_events(slabs: list[Array], nibbles: bool) -> Array:
    """[ins/64][kh/3][taps][row of 3][in 64][tap][out 64]; two codes a byte: see _pack_nibbles."""
    codes = np.concatenate([slab.reshape(len(slab), -1) for slab in slabs], axis=1)
    return _pack_nibbles(codes) if nibbles else codes


def _pack_nibbles(codes: Array) -> Array:
    """Codes within -8..7 as two a byte, plus 8: of each 128, the first 64 in the lower halves."""
    halves = codes.reshape(-1, 2, _BLOCK) + np.int8(8)
    return halves[:, 0] | halves[:, 1] << np.int8(4)


def _packed(weight: Array, outs: int, pack: Callable[[Array], Array]) -> Array:
    """`pack` of so many outputs at a time, one after the other: little is held twice."""
    parts = (pack(weight[first : first + outs]) for first in range(0, len(weight), outs))
    part = next(parts)
    packed = _arena(part.nbytes * -(-len(weight) // outs)).view(part.dtype).reshape(-1, *part.shape)
    packed[0] = part
    for place, part in enumerate(parts, 1):
        packed[place] = part
    return packed


@functools.cache
def _bit_places() -> Array:
    """256 * 8 entries: the place of each bit that is set in a byte, lowest first, then 0; 256 more: how many."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    places = np.argsort(1 - bits, axis=1, kind="stable") * (np.arange(8) < bits.sum(axis=1)[:, None])
    return np.concatenate([places.reshape(-1), bits.sum(axis=1)])


def _aligned(array: Array) -> Array:
    """A C-ordered copy that starts on a cache line: a row of weights across two lines would cost two loads."""
    copy = _arena(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _arena(size: int) -> npt.NDArray[np.uint8]:
    """Uninitialized bytes that start on a cache line."""
    block = np.empty(size + _ALIGN, np.uint8)
    start = -block.__array_interface__["data"][0] % _ALIGN
    return block[start : start + size]


# ------------------------------------------------------------------------------------------------- the backend


@dataclass(frozen=True)
class Operation:
    """A step of a run: a node, or a convolution with what is fused to it.

    method  of METHODS, or the node's type      conv  its convolution, if it is fused
    weight_bytes  of that, as they are stored for the kernels
    """

    name: str
    method: str
    conv: str | None
    weight_bytes: int


def ticks() -> int:
    """The counter in which `NativeBackend.timed` counts; its rate is unknown, and constant."""
    return int(_module().lib.mdsnn_ticks())


def strain(isa_level: str, work: str, size: int, rounds: int) -> int:
    """Do `rounds` rounds of one kind of work and nothing else: 0 units where the level has no such instruction.

    work     "byte_adds", "pair_products", "tile_products", or "reads" of a buffer of `size` bytes
    returns  the units of work done: bytes added, products, bytes read
    """
    module = _module()
    buffer = np.zeros(size + _ALIGN, np.uint8)[_ALIGN - 1 :]
    start = module.ffi.cast("const uint8_t *", buffer.ctypes.data + -buffer.ctypes.data % _ALIGN)
    kind = getattr(module.lib, f"MDSNN_{work.upper()}")
    return int(module.lib.mdsnn_strain(ISA_LEVELS.index(isa_level), kind, start, size, rounds))


def _products(network: IntegerNetwork) -> int:
    """Dense products of one sample."""
    total = 0
    for node in network.nodes:
        if isinstance(node, Conv | Linear):
            _, height, width = network.proof.shapes[node.name]
            steps = 1 if network.proof.static[node.name] else network.timesteps
            total += node.weight.size * height * width * steps
    return total


class _Room:
    """What a call writes to, and the call that points to it: scratch, one sample's state, the work of its parts."""

    def __init__(self, plan: _Plan, parts: int) -> None:
        self.parts = parts
        self.arena = _arena(plan.scratch_bytes + plan.state_bytes + parts * plan.work_bytes)
        scratch = plan.ffi.from_buffer("uint8_t[]", self.arena)
        state = scratch + plan.scratch_bytes
        fields = {"scratch": scratch, "state": state, "work": state + plan.state_bytes, "fresh": 1}
        self.call = plan.ffi.new("mdsnn_call *", fields)


class NativeBackend:
    """A network ready to run in C. Immutable: calls may run side by side.

    network  any IntegerNetwork (building one proved it)
    level    an instruction set this machine can run; None: `isa()`, the one in use
    raises   MissingError  if the extension is not there, or cannot run what MDSNN_ISA names
             ConfigError   if MDSNN_ISA names no instruction set
    """

    name = "native"

    def __init__(self, network: IntegerNetwork, level: str | None = None) -> None:
        self.network = network
        self.isa = isa() if level is None else level
        """The instruction set in use."""
        self._plan = _Plan(network, ISA_LEVELS.index(self.isa))
        self._neurons = {lif.name: int(np.prod(network.proof.shapes[lif.name])) for lif in network.lifs}
        rows = self._plan.counters
        self._spikes_out = {lif.name: rows[lif.name] for lif in network.lifs}
        readers = (node for node in network.nodes if isinstance(node, Conv | Linear | Readout))
        self._spikes_in = {node.name: rows[node.source] for node in readers}
        # products of tiles are one thread's, and so are small samples: to call others costs more than they take over
        methods = {METHODS[self._plan.struct.ops[at].method] for at in range(len(self._plan.steps))}
        self._parts = 1 if "tiles" in methods or _products(network) < _SHARED else _PARTS
        # scratch is kept between calls, for a fresh one costs a page fault every 4 KiB; a deque's ends are thread-safe
        self._scratch: deque[_Room] = deque(maxlen=64)
        self._classes = network.classes

    def run(self, pixels: npt.NDArray[np.uint8], trace: bool, threads: int = 1) -> Result:
        """All timesteps of checked pixels [N, C, H, W] or [T, N, C, H, W], each sample by up to `threads` threads."""
        parts = min(threads, self._parts)
        room = self._take(parts)
        try:
            return self._call(pixels, self.network.timesteps, room, trace, parts)
        finally:
            self._scratch.append(room)

    def timed(self, pixels: npt.NDArray[np.uint8]) -> tuple[Result, npt.NDArray[np.int64]]:
        """A run on one thread, and where its time went: ticks of each of `operations` in each stage of STAGES."""
        times = np.zeros((len(self._plan.steps), len(STAGES)), np.int64)
        room = self._take()
        try:
            return self._call(pixels, self.network.timesteps, room, False, times=times), times
        finally:
            self._scratch.append(room)

    def operations(self) -> list[Operation]:
        """What a run consists of, in order."""
        found = []
        for at, (_, step) in enumerate(self._plan.steps):
            if isinstance(step, _Group):
                method = METHODS[self._plan.struct.ops[at].method]
                stored = self._plan.weight_bytes[step.conv.name]
                found.append(Operation(step.conv.name, method, step.conv.name, stored))
            else:
                found.append(Operation(step.name, type(step).__name__, None, 0))
        return found

    def start(self, samples: int) -> State:
        """A fresh state, q = 0 everywhere, for `samples` samples."""
        return _NativeState(self, samples)

    def _take(self, parts: int = 1) -> _Room:
        """Room for one call at a time, by so many parts."""
        with contextlib.suppress(IndexError):
            room = self._scratch.pop()
            if room.parts >= parts:
                return room
        return _Room(self._plan, parts)

    def _call(
        self,
        pixels: npt.NDArray[np.uint8],
        steps: int,
        room: _Room,
        trace: bool,
        parts: int = 1,
        times: npt.NDArray[np.int64] | None = None,
        state: tuple[npt.NDArray[np.uint8], bool] | None = None,
    ) -> Result:
        """Run `steps` timesteps. `state`: what earlier steps left of every sample, and whether it is fresh; None: the
        room's own, fresh for every sample."""
        # Little Python: between two calls the weights push it out of the caches, and each line of it is read anew.
        plan, call = self._plan, room.call
        pointer = plan.ffi.from_buffer
        samples = pixels.shape[-4]
        logits = np.empty((samples, self._classes), np.int32)
        counts = np.zeros((len(plan.counters), steps), np.int64)
        lifs: dict[str, LifTrace] = {}
        helpers: list[Future[None]] = []
        if trace or parts > 1 or times is not None or state is not None:
            call = plan.ffi.new("mdsnn_call *", call[0])  # the room's never points to what is gone
            if state is not None:
                call.state, call.fresh = pointer("uint8_t[]", state[0]), int(state[1])
                call.state_pitch = plan.state_bytes
            if times is not None:
                call.times = pointer("int64_t[]", times)
            if trace:
                lifs, *pointers = self._lifs(steps, samples)
                call.trace_h, call.trace_s, call.trace_q = pointers
        call.pixels = pointer("uint8_t[]", pixels)
        call.pixel_step = pixels.strides[0] if pixels.ndim == 5 else 0
        call.samples, call.steps = samples, steps
        call.logits, call.counts = pointer("int32_t[]", logits), pointer("int64_t[]", counts)
        if parts > 1:
            helpers = self._help(call, parts)
        plan.lib.mdsnn_run(plan.struct, plan.level, call)
        for helper in helpers:
            helper.cancel()  # one that runs finds that the call has ended
        spikes_out, spikes_in = Counts(counts, self._spikes_out), Counts(counts, self._spikes_in)
        activity = Activity(samples, self._neurons, spikes_out, spikes_in)
        return Result(logits, activity, Trace(lifs, logits) if trace else None)

    def _lifs(self, steps: int, samples: int) -> tuple[dict[str, LifTrace], Any, Any, Any]:
        """Arrays for a trace, and pointers to those of h, s and q."""
        network, ffi = self.network, self._plan.ffi
        lifs: dict[str, LifTrace] = {}
        for lif in network.lifs:
            shape = (steps, samples, *network.proof.shapes[lif.name])
            lifs[lif.name] = LifTrace(np.empty(shape, np.int32), np.empty(shape, np.uint8), np.empty(shape, np.int8))
        h = ffi.new("int32_t *[]", [ffi.from_buffer("int32_t[]", lif.h) for lif in lifs.values()])
        s = ffi.new("uint8_t *[]", [ffi.from_buffer("uint8_t[]", lif.s) for lif in lifs.values()])
        q = ffi.new("int8_t *[]", [ffi.from_buffer("int8_t[]", lif.q) for lif in lifs.values()])
        return lifs, h, s, q

    def _help(self, call: Any, parts: int) -> list[Future[None]]:
        """Send for parts - 1 threads. The call waits for none of them: work that nobody has taken it does itself."""
        ffi, lib = self._plan.ffi, self._plan.lib
        team = ffi.new("mdsnn_team *", {"size": parts})
        call.team = team
        return [workers().submit(lib.mdsnn_help, team) for _ in range(parts - 1)]


class _NativeState:
    def __init__(self, backend: NativeBackend, samples: int) -> None:
        self._backend = backend
        self._state = _arena(samples * backend._plan.state_bytes)
        self._fresh = True

    def step(self, frame: npt.NDArray[np.uint8]) -> Result:
        """Run one timestep on `frame` [N, C, H, W]."""
        backend = self._backend
        room = backend._take()
        try:
            result = backend._call(frame, 1, room, True, state=(self._state, self._fresh))
        finally:
            backend._scratch.append(room)
        self._fresh = False
        return result
