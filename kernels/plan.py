"""Plans: what src/mdsnn.h wants to know of a proven network, once, before it runs.

A plan is a list of operations, where each value lies in one scratch arena, and weights in the order the kernels read
them (packing.py, tables.py). Every number in it comes from the network's proof, so the C code needs no checks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from . import packing, tables
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
from .packing import BLOCK, FILL, PAIR, ROWS, pack_by_parts, up

_CHUNK = 16  # most steps a pass takes: bounds the scratch of a network with many steps
_COMPARED = 32  # MDSNN_MAX_COMPARED of src/kernels.h
_TABLE = 1 << 16  # largest dense table of membrane codes
_I8, _I16, _I32 = range(3)  # enum mdsnn_type
_NARROW, _CLAMPED, _WIDE = range(3)  # enum mdsnn_width
_VECTOR_BYTES = {"base": 16, "avx2": 32, "avx512": 64, "amx": 64}
_LIST_BYTES = 1 << 20  # room for a band's lists of spikes, if every neuron fired
_BAND_BYTES = 1 << 16  # sums of a band of events
_COLUMN_BYTES = 1 << 24  # largest row of 16-bit columns
_INPUT_BYTES = 1 << 28  # largest input copied for tiles, or lists of one row: beyond, another method
_TILE = 16  # outputs a tile holds
_FILLED = 0.25  # tiles of spikes that are no fuller are slower than lists
_PATTERN = 8  # steps whose spikes a byte holds
_BYTES = ("avx2", "avx512")  # levels that multiply bytes, and have no tiles
_PERMUTE = ("avx512", "amx")  # levels that look words up in registers, 64 at a time
_FOURS = 4  # fours that 16 bits must add for products of bytes to be worth it
_FLUSH = 8  # entries that must fit 8 bits for 8-bit sums to be worth it


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
class Group:
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
    width: int = 0  # enum mdsnn_width
    codes: Requantize | None = None  # made with the stream, which nothing else reads but the LIF

    @property
    def result(self) -> str:
        """Name of the stream after bn and add."""
        return (self.add or self.bn).name


def _groups(network: IntegerNetwork, isa: str, chunk: int) -> list[Group]:
    """What can be fused: by the graph, and by the widths the proof gives."""
    proof = network.proof
    place = {node.name: at for at, node in enumerate(network.nodes)}
    readers: dict[str, list[Node]] = {node.name: [] for node in network.nodes}
    for node in network.nodes:
        for source in node.inputs:
            readers[source].append(node)
    groups: dict[str, Group] = {}
    for node in network.nodes:
        if not isinstance(node, Conv | Linear) or len(readers[node.name]) > 1:
            continue
        conv = node if isinstance(node, Conv) else _as_conv(node)
        method = _method(network, conv, isa, chunk)
        if method is not None:
            bn = readers[conv.name][0]
            assert isinstance(bn, BnAffine | BnDense)  # nothing else reads accumulators
            groups[bn.name] = Group(conv, method, bn, place=place[bn.name])
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


def _method(network: IntegerNetwork, conv: Conv, isa: str, chunk: int) -> str | None:
    """How to run a convolution in blocks of 64 channels; None where only the plain kernel fits."""
    proof = network.proof
    _, c_in, kh, kw = conv.weight.shape
    if not -128 <= proof.ranges[conv.source][0] <= proof.ranges[conv.source][1] <= 127:
        return None
    _, height, width = proof.shapes[conv.source]
    steps = 1 if proof.static[conv.name] else chunk
    copied = (height + 2 * conv.padding) * (width + 2 * conv.padding + kw) * steps * up(c_in)
    if packing.whole_windows(conv):
        copied = _windows_bytes(network, conv, steps)
    events = proof.kinds[conv.source] == "spikes" and packing.list_bytes(conv, width, steps) <= _INPUT_BYTES
    events = events and _widen(network, conv) is not None
    if conv.groups > 1:
        grouped = "grouped" if _spread(network, conv, chunk) <= _COLUMN_BYTES else None
        return "events" if events else grouped
    rows = proof.shapes[conv.name][2] * steps  # of tiles, for a row of outputs
    empty = rows <= _FILLED * (-(-rows // _TILE) * _TILE)
    if isa == "amx" and copied <= _INPUT_BYTES and not (events and empty):
        return "tiles"
    if events:
        return "events"
    if 2 * proof.shapes[conv.name][2] * chunk * c_in * kh * kw > _COLUMN_BYTES:
        return None
    return "bytes" if isa in _BYTES and _fours(network, conv) >= _FOURS else "pairs"


def _bias(network: IntegerNetwork, conv: Conv) -> int:
    """What makes no input negative."""
    return 128 if network.proof.ranges[conv.source][0] < 0 else 0


def _fours(network: IntegerNetwork, conv: Conv) -> int:
    """How many times 16 bits can add the products of four inputs by their weights, as two sums of two."""
    largest = network.proof.ranges[conv.source][1] + _bias(network, conv)
    weight = 2 * max(1, int(conv.weight.max()), -int(conv.weight.min()))
    return (2**15 - 1) // max(1, largest * weight)


def _spread(network: IntegerNetwork, conv: Conv, chunk: int) -> int:
    """Bytes of the rows of inputs under a row of windows, laid out for groups; see src/grouped.h."""
    width = network.proof.shapes[conv.source][2] + 2 * conv.padding
    steps = 1 if network.proof.static[conv.name] else chunk
    return int(conv.weight.shape[2] * width * steps * conv.weight.shape[1] * BLOCK)


def _windows_bytes(network: IntegerNetwork, conv: Conv, steps: int) -> int:
    """Bytes of whole windows, laid out for tiles."""
    _, height, width = network.proof.shapes[conv.name]
    return int(height * width * steps * BLOCK)


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
    columns = packing.slab_columns(packing.own_inputs(conv))
    slabs = columns.reshape(len(columns), columns.shape[1] * columns.shape[2], -1)
    up, down = (part(slabs, 0).sum(axis=-1, dtype=np.int32) for part in (np.maximum, np.minimum))
    for many in range(slabs.shape[1], 0, -1):
        first = np.arange(0, slabs.shape[1], many)
        highest, lowest = (np.add.reduceat(part, first, axis=1) for part in (up, down))
        if int(highest.max()) < 2**15 and int(lowest.min()) >= -(2**15):
            return many
    return None


def _within(bounds: tuple[int, int], limit: int = tables.SHORT) -> bool:
    return -limit <= bounds[0] and bounds[1] <= limit


def _long_streams(network: IntegerNetwork, steps: list[Node | Group], limits: dict[str, int | None]) -> set[str]:
    """Streams that are kept in 32 bits. A plain kernel has one type, and a LIF alone has all bits of h or none."""
    proof = network.proof
    long = {name for name, kind in proof.kinds.items() if kind == "stream" and not _within(proof.ranges[name])}
    alone = [step for step in steps if not isinstance(step, Group)]
    for step in alone:
        if isinstance(step, Lif):
            limit = limits[step.name]
            if limit is None or not _within(proof.ranges[step.source], limit):
                long.add(step.source)
    tied = [{step.name, *step.inputs} for step in alone if isinstance(step, Add | Flatten)]
    for _ in tied:
        for names in tied:
            if names & long:
                long |= names
    return long


def _width(network: IntegerNetwork, group: Group, long: set[str], limits: dict[str, int | None]) -> int:
    """How many bits a fused operation's stream takes (enum mdsnn_width)."""
    ranges = network.proof.ranges
    limit = limits[group.fire.name] if group.fire else tables.SHORT
    by_16_bits = isinstance(group.bn, BnDense) or network.proof.product_bits[group.bn.name] == 64  # how bn is stored
    if limit is None or (by_16_bits and not _within(ranges[group.bn.name], limit)):
        return _WIDE
    short = _within(ranges[group.result], limit) and not {group.result, group.other} & long
    return _NARROW if short and _within(ranges[group.bn.name]) else _CLAMPED


class Plan:
    """Builds the C structures of a network. Keeps every array they point into alive."""

    def __init__(self, module: Any, network: IntegerNetwork, isa: str) -> None:
        self.ffi, self.lib, self.network, self.isa = module.ffi, module.lib, network, isa
        self.keep: list[Any] = []
        self.chunk = min(network.timesteps, _CHUNK)
        self.index: dict[str, int] = {}
        self.values: list[_Value] = []
        self.state_bytes = 0
        self.counters: dict[str, int] = {}
        self.weight_bytes: dict[str, int] = {}
        self.affine: dict[str, BnAffine | None] = {}
        proof = network.proof
        groups = {network.nodes[group.place].name: group for group in self._groups()}
        inside = {
            name
            for group in groups.values()
            for name in (group.conv.name, group.bn.name, group.add and group.add.name, group.fire and group.fire.name)
        } - groups.keys()
        self.steps: list[tuple[int, Node | Group]] = [
            (place, groups.get(node.name, node)) for place, node in enumerate(network.nodes) if node.name not in inside
        ]
        self.limits = {lif.name: tables.limit_of(lif, proof.ranges[lif.source]) for lif in network.lifs}
        self.long = _long_streams(network, [step for _, step in self.steps], self.limits)
        for _, step in self.steps:
            if isinstance(step, Group):
                step.width = _width(network, step, self.long, self.limits)
        self.packed: dict[str, int] = {}
        self._codes()
        for place, step in self.steps:
            if isinstance(step, Group):
                if step.stream:
                    self._value(network[step.result], place)
                    if step.other and self.values[-1].type == self.values[self.index[step.other]].type:
                        self.values[-1].over = self.values[self.index[step.other]]
                if step.fire is not None:
                    self._value(step.fire, place)
                if step.codes is not None:
                    self._value(step.codes, place)
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
            if isinstance(step, Group)
        }
        self._place()
        self.lifs = {lif.name: number for number, lif in enumerate(network.lifs)}
        fused = [step for _, step in self.steps if isinstance(step, Group)]
        self.tiles = self._tiles([group.conv for group in fused if group.method == "tiles"])
        ops = [self._fused(step) if isinstance(step, Group) else self._op(step) for _, step in self.steps]
        self.struct = self._struct(ops)

    def _groups(self) -> list[Group]:
        return _groups(self.network, self.isa, self.chunk)

    def _value(self, node: Node, place: int) -> None:
        proof = self.network.proof
        shape, kind = proof.shapes[node.name], proof.kinds[node.name]
        blocks = kind in ("stream", "spikes")
        pitch = -(-shape[0] // BLOCK) * BLOCK if blocks else shape[0]
        self.index[node.name] = len(self.values)
        value = _Value(node.name, shape, self._type(node), pitch, proof.static[node.name], place, place)
        if node.name in self.packed:
            channels, *sides = shape
            height, width = (-(-side // self.packed[node.name]) for side in sides)
            value.shape = channels, height, width
            self._lines(value)
        self.values.append(value)

    def _lines(self, value: _Value) -> None:
        """Have tiles read a value where it is.

        The blocks of a step of a pixel are an odd number then: lines an even number apart share few sets of the cache.
        """
        value.pitch = (-(-value.pitch // BLOCK) | 1) * BLOCK
        value.spare = self._tall(self.chunk) * value.pitch

    def _codes(self) -> None:
        """Codes that only tiles read are packed: those of rows and columns that nobody reads have no place.

        Where a fused operation by tiles makes their stream, and its LIF alone reads that beside them, they are made
        there, and are no operation.
        """
        readers: dict[str, list[Node | Group]] = {}
        made = {step.result: step for _, step in self.steps if isinstance(step, Group)}
        for _, step in self.steps:
            for name in (step.conv.source, step.other or "") if isinstance(step, Group) else step.inputs:
                readers.setdefault(name, []).append(step)
        for at, (_, step) in reversed([*enumerate(self.steps)]):
            if not isinstance(step, Requantize) or self.network.proof.static[step.name]:
                continue
            after = readers.get(step.name, [])
            tiled = [reader for reader in after if isinstance(reader, Group) and reader.method == "tiles"]
            if not tiled or len(tiled) < len(after):
                continue
            strides = {_read_stride(group.conv) for group in tiled}
            self.packed[step.name] = stride = strides.pop() if len(strides) == 1 else 1
            for group in tiled:
                group.conv = replace(group.conv, stride=group.conv.stride // stride)
            maker = made.get(step.source)
            if maker and maker.method == "tiles" and maker.width == _NARROW and maker.add and maker.fire:
                plain = maker.fire.reset == "soft" or maker.fire.quantize == "pre_fire"
                if not plain and len(readers[step.source]) == 1:
                    maker.codes = step
                    del self.steps[at]

    def _in_place(self, group: Group) -> bool:
        """Whether tiles read their input where it is."""
        value, conv = self.values[self.index[group.conv.source]], group.conv
        whole = conv.stride == 1 and not conv.padding and not packing.whole_windows(conv)
        return value.border > 0 or (value.name in self.packed and whole)

    def _type(self, node: Node) -> int:
        proof = self.network.proof
        if proof.kinds[node.name] == "stream":
            return _I32 if node.name in self.long else _I16
        lo, hi = proof.ranges[node.name]
        return _I8 if proof.kinds[node.name] != "accumulators" and lo >= -128 and hi <= 127 else _I32

    def _count(self, name: str) -> None:
        if name not in self.counters:
            self.counters[name] = len(self.counters)
            self.values[self.index[name]].counter = self.counters[name]

    def _borders(self) -> None:
        """Spikes that nothing but tiles of stride 1 read get the padding those want, so that they need no copy."""
        paddings: dict[str, set[int]] = {}
        for _, step in self.steps:
            if isinstance(step, Group):
                tiled = step.method == "tiles" and step.conv.stride == 1 and not packing.whole_windows(step.conv)
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
                self._lines(value)

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
                    item.offset, end = end, end + up(item.bytes)
            self.work_bytes = max(self.work_bytes, end)
        alive: list[tuple[int, int, int]] = []  # offset, end, last
        work = [item for items in self.work.values() for item in items if item.shared]
        items: list[_Value | _Work] = [*self.values, *work]
        for value in sorted(items, key=lambda item: item.first):
            size = up(value.bytes if isinstance(value, _Work) else value.size(self.chunk))
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
        offset, self.state_bytes = self.state_bytes, self.state_bytes + up(size)
        return offset

    def _pointer(self, ctype: str, array: npt.ArrayLike, dtype: Any) -> Any:
        return self._hold(ctype, packing.aligned(np.asarray(array, dtype=dtype)))

    def _hold(self, ctype: str, packed: Array) -> Any:
        """A pointer to an array on a cache line, which is kept."""
        pointer = self.ffi.cast(f"const {ctype} *", self.ffi.from_buffer(packed)) if packed.size else self.ffi.NULL
        self.keep.append(packed)
        return pointer

    def _tiles(self, convs: list[Conv]) -> dict[str, Any]:
        """Weights for the tiles, those of one convolution behind those of the one before; where each begins."""
        for conv in convs:
            c_out, c_in, kh, kw = packing.tiles_weight(conv).shape
            pairs = -(-c_out // PAIR) * up(c_in) * kh * kw * PAIR
            self.weight_bytes[conv.name] = pairs // 2 if packing.four_bits(conv) else pairs
        packed = packing.arena(sum(self.weight_bytes.values())).view(np.int8)
        at = 0
        begins = {}
        for conv in convs:
            begins[conv.name] = at
            for first in range(0, len(conv.weight), PAIR):
                some = packing.tiles_weight(conv)[first : first + PAIR]
                part = packing.pack_tiles(some, packing.four_bits(conv))
                packed[at : at + part.size].reshape(part.shape)[...] = part
                at += part.size
        pointer = self._hold("int8_t", packed)
        return {name: pointer + at for name, at in begins.items()}

    def _events_weights(self, conv: Conv) -> tuple[Any, int]:
        """Weights for lists of spikes, and how many entries 8 bits can add: a multiple of 4."""
        vector, flush = _VECTOR_BYTES[self.isa], ROWS * BLOCK

        def pack(weight: Array) -> Array:
            nonlocal flush
            slabs = packing.event_slabs(weight, conv.stride, vector)
            for slab in slabs:
                if slab.shape[1] > 1:  # no padding
                    flush = packing.safe_entries(slab, flush) if flush >= _FLUSH else 0
            return packing.pack_events(slabs, packing.four_bits(conv))

        packed = pack_by_parts(packing.own_inputs(conv), BLOCK, pack)
        flush = flush // FILL * FILL
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
                    weight=self._pointer("int8_t", packing.by_input(node.weight, node.groups), np.int8),
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
                    multiplier=self._pointer("int32_t", packing.whole_blocks(node.multiplier), np.int32),
                    offset_32=self._pointer("int32_t", packing.whole_blocks(narrow), np.int32),
                    shift_32=self._pointer("int32_t", packing.whole_blocks(node.shift), np.int32),
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
                op.update(stride=strides.pop() if len(strides) == 1 else 1, packed=int(node.name in self.packed))
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

    def _work_sizes(self, group: Group) -> tuple[int, ...]:
        """Bytes of what a group works on, in the order of mdsnn_op's fields work_...: input to y."""
        proof, conv = self.network.proof, group.conv
        c_in, height, width = proof.shapes[conv.source]
        out_width = proof.shapes[conv.name][2]
        kw = conv.weight.shape[3]
        steps, band = self._steps(group), self._band(group)
        row = out_width * steps * BLOCK
        stream = _I16 if group.width == _NARROW else _I32  # a type is its size's power of 2
        after_bn = row << stream
        if group.method == "events":
            lists = packing.list_bytes(conv, width, steps) * band + 2 * packing.ALIGN
            ring = (band - 1) * conv.stride + conv.weight.shape[2]
            spots = (BLOCK + 1) * ring * width * steps * -(-c_in // BLOCK)
            starts = 4 * packing.slabs_of(conv) * band * (steps * width + 1)
            slab = up((ROWS * BLOCK + 1) * kw * BLOCK) + 2 * BLOCK
            return lists, slab, spots, starts, band * self._events(group), after_bn
        if group.method == "bytes":
            return out_width * steps * packing.window_depth(conv, 4), 0, 0, 0, 4 * row, after_bn
        if group.method == "grouped":
            return _spread(self.network, conv, self.chunk), 0, 0, 0, 4 * row, after_bn
        if group.method == "pairs":
            return 2 * out_width * steps * packing.window_depth(conv, 2), 0, 0, 0, 4 * row, after_bn
        columns = min(conv.stride, kw) * (out_width + (kw - 1) // conv.stride)
        copied = (height + 2 * conv.padding) * columns * steps * up(c_in)
        if packing.whole_windows(conv):
            copied = _windows_bytes(self.network, conv, steps)
        tall = self._tall(steps)
        _, c_in, kh, kw = packing.tiles_weight(conv).shape
        return (
            0 if self._in_place(group) else copied + tall * BLOCK,
            2 * up(c_in) * kh * kw * PAIR if packing.four_bits(conv) else 0,
            0,
            (8 * up(c_in) // BLOCK + 1) * kh * kw,
            (8 * PAIR + BLOCK) * tall * 4,
            tall * BLOCK << stream,
        )

    def _steps(self, group: Group) -> int:
        return 1 if self.network.proof.static[group.result] else self.chunk

    def _events(self, group: Group) -> int:
        """Bytes of the sums of an output row by events, with windows to spare at both ends."""
        proof, conv = self.network.proof, group.conv
        last = (proof.shapes[conv.source][2] - 1 + conv.padding) // conv.stride
        across = (conv.weight.shape[3] - 1) // conv.stride + max(proof.shapes[conv.name][2], last + 1)
        return int((2 if _sums_fit(self.network, conv) else 6) * across * self._steps(group) * BLOCK)

    def _band(self, group: Group) -> int:
        """Output rows to work on at a time."""
        height = self.network.proof.shapes[group.conv.name][1]
        if group.method != "events":
            return 1
        lists = packing.list_bytes(group.conv, self.network.proof.shapes[group.conv.source][2], self._steps(group))
        return max(1, min(height, _LIST_BYTES // lists, _BAND_BYTES // self._events(group)))

    def _fused(self, group: Group) -> dict[str, Any]:
        """The fields of mdsnn_op for a group."""
        conv, ffi = group.conv, self.ffi
        bn = ffi.new("mdsnn_op *", self._op(group.bn))
        self.keep.append(bn)
        fire = ffi.NULL
        if group.fire is not None:
            fire = ffi.new("mdsnn_op *", self._op(group.fire))
            self.keep.append(fire)
        codes = ffi.NULL
        if group.codes is not None:
            codes = ffi.new("mdsnn_op *", self._op(group.codes))
            self.keep.append(codes)
        flush, widen, nibbles, span, bias = 0, 0, False, 0, 0
        match group.method:
            case "tiles":
                method, packed, nibbles = self.lib.MDSNN_TILES, self.tiles[conv.name], packing.four_bits(conv)
            case "pairs":
                method, packed = (
                    self.lib.MDSNN_PAIRS,
                    self._hold("int16_t", pack_by_parts(conv.weight, BLOCK, packing.pack_pairs)),
                )
            case "bytes":
                flush, bias = _fours(self.network, conv), _bias(self.network, conv)
                method = self.lib.MDSNN_BYTES
                packed = self._hold(
                    "int8_t", pack_by_parts(conv.weight, BLOCK, lambda some: packing.pack_bytes(some, bias))
                )
            case "grouped":
                method, widen = self.lib.MDSNN_GROUPED, int(not _sums_fit(self.network, conv))
                packed = self._hold("int16_t", pack_by_parts(conv.weight, BLOCK, packing.pack_grouped))
            case _:
                span = -(-packing.own_inputs(conv).shape[1] // BLOCK)
                packed, flush = self._events_weights(conv)
                widen, nibbles = _widen(self.network, conv) or 0, packing.four_bits(conv)
                method = self.lib.MDSNN_EVENTS_8 if flush >= _FLUSH else self.lib.MDSNN_EVENTS_16
        if group.method != "tiles":
            self.weight_bytes[conv.name] = self.keep[-1].nbytes
        depth = packing.window_depth(conv, {"bytes": 4, "tiles": 1}.get(group.method, 2))
        if group.method == "tiles" and not packing.whole_windows(conv):
            depth = 0
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
            "codes": codes,
            "width": group.width,
            **self._clamp(group, fire),
            "method": method,
            "flush": flush,
            "widen": widen,
            "span": span,
            "nibbles": int(nibbles),
            "band": self._band(group),
            "depth": depth,
            "bias": bias,
            "work_input": -1 if group.method == "tiles" and self._in_place(group) else work_input,
            "work_slab": slab,
            "work_spots": spots,
            "work_starts": starts,
            "work_sums": sums,
            "work_y": y,
        }

    def _affine(self, node: BnDense) -> BnAffine | None:
        """The table as an affine form, if it is one; it takes a while to find, and is asked for twice."""
        if node.name not in self.affine:
            bounds = self.network.proof.channel_bounds[node.source]
            self.affine[node.name] = tables.affine_of(node, *bounds, self.network.grid.saturation)
        return self.affine[node.name]

    def _code_decode(self, node: Lif, codes: Array) -> Array:
        """Codes in the lower half, what they decode to in the upper one; zeros where that needs more than 16 bits."""
        if self.limits[node.name] is None:
            return np.zeros(1, np.int64)
        both: Array = node.decode[codes + delta(node.bits)].astype(np.int64) * 65536 + (codes & 0xFFFF)
        return both

    def _short_product(self, node: BnAffine) -> bool:
        lo, hi = self.network.proof.channel_bounds[node.source]
        factors = (node.multiplier, lo, hi)
        narrow = all(int(factor.min()) > -(2**15) and int(factor.max()) < 2**15 for factor in factors)
        return narrow and self.network.proof.product_bits.get(node.name) != 64

    def _clamp(self, group: Group, fire: Any) -> dict[str, int]:
        """How the operation keeps its bn between its ends (enum mdsnn_clamp), and the fields that this takes."""
        if group.method != "tiles":  # others have one way
            return {}
        bn = self._affine(group.bn) if isinstance(group.bn, BnDense) else group.bn
        saturation, ends = self.network.grid.saturation, {"clamp": self.lib.MDSNN_CLAMP_ENDS}
        if bn is None or not self._short_product(bn) or group.width != _NARROW:
            return ends
        bounds = self.network.proof.channel_bounds[bn.source]
        sums = np.stack([bound.astype(np.int64) * bn.multiplier + bn.offset for bound in bounds])
        shift = bn.shift.astype(np.int64)
        if group.fire is not None and group.add is None and not group.stream and fire.buckets == 2:
            most = int(np.abs(group.fire.decode).max())
            fits = int((sums + (saturation << shift)).max()) < 2**31 and saturation + 2 * most + fire.v_th < 2**16
            beyond = -saturation + most < min(fire.threshold[0], fire.v_th + 1) and saturation - most > fire.v_th
            fits = fits and fire.bucket_base + saturation + most >= 0
            none = {"clamp": self.lib.MDSNN_CLAMP_NONE, "clamp_bias": saturation, "decode_bias": most}
            return none if fits and beyond else ends
        bits = 16 - saturation.bit_length()
        fits = int((sums - (1 << np.maximum(shift - 1, 0))).min()) >= -(2**31)
        if saturation & (saturation - 1) or not 0 < bits <= int(shift.min()) or not fits:
            return ends
        return {"clamp": self.lib.MDSNN_CLAMP_ROUNDING, "clamp_bits": bits}

    def _lif(self, node: Lif) -> dict[str, Any]:
        membrane, limit = self.network.proof.membranes[node.name], self.limits[node.name]
        if limit is not None:  # then the 16 bits of h are all there is to it
            membrane = max(membrane[0], -tables.SHORT), min(membrane[1], tables.SHORT - 1)
        reach = tables.Reach.of(node, membrane)
        thresholds = reach.thresholds
        fields: dict[str, Any] = {
            "lif": self.lifs[node.name],
            "search": self.lib.MDSNN_COMPARE,
            "thresholds": len(thresholds),
            "code_first": reach.code_first,
            "threshold": self._pointer("int32_t", thresholds, np.int32),
            "decode": self._pointer("int32_t", node.decode, np.int32),
            "top": delta(node.bits),
            "v_th": node.v_th if limit is None else min(node.v_th, tables.SHORT),
            "x_limit": limit or 0,
            "v_soft": node.v_soft,
            "q_th": node.q_th,
            "pre_fire": int(node.quantize == "pre_fire"),
            "soft": int(node.reset == "soft"),
            "state": self._state(int(np.prod(self.network.proof.shapes[node.name]))),
        }
        buckets = tables.find_buckets(reach, node) if limit is not None else None
        if buckets is not None:
            base, shift, *arrays = buckets
            names = ("bucket_threshold", "bucket_code", "bucket_decode")
            ends = max(fields["v_th"], 0) - base < tables.BUCKETS << shift  # a hard reset keeps no larger u
            fields.update(buckets=2 if ends else 1, bucket_base=base, bucket_shift=shift)
            fields.update(
                {name: self._pointer("int16_t", table, np.int16) for name, table in zip(names, arrays, strict=True)}
            )
        if self.network.proof.static[node.source] and self.network.timesteps <= _PATTERN:
            lo, hi = self.network.proof.ranges[node.source]
            if hi - lo < _TABLE:
                patterns = tables.spike_patterns(node, np.arange(lo, hi + 1), self.network.timesteps)
                fields.update(pattern=self._pointer("uint8_t", patterns, np.uint8), pattern_first=lo)
                change, flip = tables.pattern_changes(patterns[: hi - lo + 1], lo)
                if len(change) <= self.lib.MDSNN_CHANGES and _within((lo, hi)):
                    fields.update(pattern_changes=len(change), pattern_change=change, pattern_flip=flip)
        cells = tables.find_cells(reach, node) if limit is not None else None
        if cells is not None:
            base, span, factor, *arrays = cells
            fields.update(cells=1, cell_base=base, cell_span=span, cell_factor=factor)
            fields.update(
                {
                    name: self._pointer("int16_t", table, np.int16)
                    for name, table in zip(("cell_threshold", "cell_decode"), arrays, strict=True)
                }
            )
        if buckets is None and limit is not None and self.isa in _PERMUTE:
            lines = tables.find_lines(reach, node, membrane)
            if lines is not None:
                fields.update({f"line_{name}": value for name, value in vars(lines).items()}, lines=1)
                for name in ("line_slope", "line_offset"):
                    fields[name] = self._pointer("uint16_t", fields[name], np.uint16)
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
                "chunk": self.chunk,
                "counters": len(self.counters),
                "bits": self._pointer("uint8_t", packing.bit_places(), np.uint8),
                "counted": self._state(8 * len(self.counters)),
                "state_bytes": self.state_bytes,
                "scratch_bytes": self.scratch_bytes,
                "work_bytes": self.work_bytes,
            },
        )
