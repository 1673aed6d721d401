"""IntegerNetwork: a small graph of typed integer nodes, and the proof that nothing in it overflows.

A network is a tuple of frozen nodes in topological order, each with a name and the name(s) of what it reads. Building
one proves it: shapes, ranges, accumulator bounds, thresholds, table sizes and widths are recomputed from the codes, and
a graph for which anything does not hold is a `NetworkError` that names the node. Engines take only networks that were
built, so they need no checks of their own. What each node computes is defined in reference.py; docs/arithmetic.md has
the mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .errors import FormatError, NetworkError
from .formats import (
    EVENT_RANGE,
    IMAGE_RANGE,
    INT32_LIMIT,
    MAX_SHIFT,
    Array,
    Grid,
    accumulator_bounds,
    check_bits,
    delta,
    narrowest,
)

MAX_NODES = 4096
MAX_TIMESTEPS = 256
MAX_CHANNELS = 1 << 20
MAX_SIDE = 4096
MAX_ACTIVATIONS = 1 << 28
"""Largest C*H*W of any node for one sample and one step."""
MAX_ROWS = 1 << 19
"""Most outputs of all Conv, Linear and Readout nodes together. This and the next bound a loader's memory."""
MAX_DENSE_ENTRIES = 1 << 24
"""Most entries of all dense BN tables together: 64 MiB."""
MAX_NAME = 200
LOGITS = "logits"
"""What traces and divergences call the readout's values; no LIF node may have this name."""
_WIDE_LIMIT = 2**62


def _sealed(array: Array) -> bool:
    owner: Any = array
    while type(owner) is np.ndarray:
        if owner.flags.writeable:
            return False
        owner = owner.base
    if type(owner) is memoryview:
        owner = owner.obj
    return owner is None or type(owner) is bytes


def _freeze(array: npt.ArrayLike, dtype: Any) -> Array:
    """A read-only, C-contiguous, native-endian copy of `array`, refused if a value does not survive `dtype`.

    An array that is all this already is shared if it is sealed: read-only, and so is what it is a view of, down to an
    array or `bytes`. Who seals an array keeps no writable view of it.
    """
    try:
        given = np.asarray(array)
    except (ValueError, TypeError) as fault:
        raise NetworkError(f"no array: {fault}") from None
    if given.dtype.kind not in "iu":
        raise NetworkError(f"integers were expected, got {given.dtype}")
    if _sealed(given) and given.dtype == dtype and given.flags.c_contiguous and given.flags.aligned:
        return given
    copy = np.array(given, dtype=dtype, order="C")
    if not np.can_cast(given.dtype, copy.dtype) and not np.array_equal(copy, given):
        raise NetworkError(f"a value in {int(given.min())}..{int(given.max())} does not fit {np.dtype(dtype)}")
    copy.setflags(write=False)
    return copy


@dataclass(frozen=True)
class Node:
    """One operation. `name` is unique in its network; `ARRAYS` lists the array fields and their dtypes."""

    name: str
    ARRAYS: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        for attribute, dtype in self.ARRAYS.items():
            try:
                object.__setattr__(self, attribute, _freeze(getattr(self, attribute), dtype))
            except NetworkError as fault:
                raise NetworkError(f"node {self.name!r}: {attribute}: {fault}") from None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the nodes this one reads, in order."""
        return tuple([getattr(self, name) for name in _SOURCES.get(type(self), ())])


@dataclass(frozen=True)
class InputTable(Node):
    """Pixels or event counts to codes. table (C, 256) int8: row of the channel, column of the uint8 value."""

    table: Array
    ARRAYS: ClassVar[Mapping[str, Any]] = {"table": np.int8}


@dataclass(frozen=True)
class Conv(Node):
    """2-D convolution of codes, zero padding. weight (C_out, C_in/groups, kh, kw) int8 in [-delta, delta]."""

    source: str
    weight: Array
    bits: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    ARRAYS: ClassVar[Mapping[str, Any]] = {"weight": np.int8}


@dataclass(frozen=True)
class Linear(Node):
    """A fully connected layer at every step, (in, 1, 1) to accumulators (out, 1, 1). weight (out, in) int8."""

    source: str
    weight: Array
    bits: int
    ARRAYS: ClassVar[Mapping[str, Any]] = {"weight": np.int8}


@dataclass(frozen=True)
class BnAffine(Node):
    """BN table in affine form: y = clamp((multiplier*acc + offset) >> shift, -C, C) per channel; `>>` floors."""

    source: str
    multiplier: Array
    offset: Array
    shift: Array
    ARRAYS: ClassVar[Mapping[str, Any]] = {"multiplier": np.int32, "offset": np.int64, "shift": np.uint8}


@dataclass(frozen=True)
class BnDense(Node):
    """BN table in dense form: y = row c at acc - lo_c. The rows follow each other, hi_c - lo_c + 1 entries each."""

    source: str
    table: Array
    ARRAYS: ClassVar[Mapping[str, Any]] = {"table": np.int32}


@dataclass(frozen=True)
class Add(Node):
    """Residual add of two streams on the same grid: exact, never clipped."""

    source: str
    other: str


@dataclass(frozen=True)
class Requantize(Node):
    """Stream to shortcut codes: clip((x + 2**(shift-1)) >> shift, -delta(bits), delta(bits))."""

    source: str
    shift: int
    bits: int


@dataclass(frozen=True)
class Lif(Node):
    """Leaky integrate-and-fire on membrane codes q; q = 0 before the first step.

    decode      (2*delta + 1,) int32: leak, decode and scale of a code, entry q + delta
    thresholds  (2*delta,) int32, ascending: requantize(n) = -delta + #{j : thresholds[j] <= n}
    v_th        a spike is h > v_th                      (post_reset)
    v_soft      what a soft reset subtracts; 0 for a hard reset
    q_th        a spike is q > q_th; 0 for post_reset    (pre_fire)
    """

    source: str
    bits: int
    decode: Array
    thresholds: Array
    v_th: int
    reset: str = "hard"
    v_soft: int = 0
    quantize: str = "post_reset"
    q_th: int = 0
    ARRAYS: ClassVar[Mapping[str, Any]] = {"decode": np.int32, "thresholds": np.int32}


@dataclass(frozen=True)
class MaxPool(Node):
    """Max-pool of spikes: OR over the window, padding skipped."""

    source: str
    kernel: int
    stride: int
    padding: int = 0


@dataclass(frozen=True)
class SumPool(Node):
    """Sum-pool of spikes or counts; padding counts as 0. An average's divisor is in the scale of what reads it."""

    source: str
    kernel_height: int
    kernel_width: int
    stride: int = 1
    padding: int = 0


@dataclass(frozen=True)
class Flatten(Node):
    """(C, H, W) to (C*H*W, 1, 1), in C order."""

    source: str


@dataclass(frozen=True)
class Readout(Node):
    """The classifier: logits = weight @ sum over t of x_t + bias. weight (classes, in) int8, bias (classes,) int32."""

    source: str
    weight: Array
    bits: int
    bias: Array
    ARRAYS: ClassVar[Mapping[str, Any]] = {"weight": np.int8, "bias": np.int32}


NODE_TYPES: Mapping[str, type[Node]] = MappingProxyType(
    {
        kind.__name__: kind
        for kind in (
            InputTable,
            Conv,
            Linear,
            BnAffine,
            BnDense,
            Add,
            Requantize,
            Lif,
            MaxPool,
            SumPool,
            Flatten,
            Readout,
        )
    }
)
_SOURCES = {kind: tuple(f.name for f in fields(kind) if f.name in ("source", "other")) for kind in NODE_TYPES.values()}


@dataclass(frozen=True)
class InputSpec:
    """What a network reads: uint8 [N, C, H, W] images, or uint8 [T, N, C, H, W] event counts."""

    channels: int
    height: int
    width: int
    coding: str = "image"


@dataclass(frozen=True)
class Proof:
    """What was proven of every node; keys are node names.

    shapes          (C, H, W) of the value
    kinds           codes | spikes | counts | accumulators | stream | logits
    ranges          (lo, hi) of the value, over all channels and every reachable input
    dtypes          the narrowest dtype for the value: uint8 for spikes, else signed (counts too)
    static          True where the value is the same at every step (no LIF upstream, image coding)
    channel_bounds  Conv, Linear: (lo, hi) per output channel, int64
    product_bits    BnAffine: 32 if |A|*max|acc| + |B| < 2**31 in every channel, else 64
    membranes       Lif: (lo, hi) of h = x + decode
    """

    shapes: Mapping[str, tuple[int, int, int]]
    kinds: Mapping[str, str]
    ranges: Mapping[str, tuple[int, int]]
    dtypes: Mapping[str, np.dtype[Any]]
    static: Mapping[str, bool]
    channel_bounds: Mapping[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
    product_bits: Mapping[str, int]
    membranes: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class IntegerNetwork:
    """A proven integer network.

    nodes      topological order; the first is the InputTable, the last the Readout
    timesteps  T, 1..256
    labels     class names, one a logit, or empty
    notes      short texts about its origin; no engine reads them
    raises     NetworkError  if anything does not hold; the message names the node
    """

    nodes: tuple[Node, ...]
    input: InputSpec
    timesteps: int
    grid: Grid = field(default_factory=Grid)
    labels: tuple[str, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    proof: Proof = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(self.nodes))
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "notes", MappingProxyType(dict(self.notes)))
        object.__setattr__(self, "proof", _Prover(self).prove())

    def __getitem__(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    @property
    def lifs(self) -> tuple[Lif, ...]:
        """The LIF nodes, in order."""
        return tuple(node for node in self.nodes if isinstance(node, Lif))

    @property
    def readout(self) -> Readout:
        """The last node."""
        last = self.nodes[-1]
        assert isinstance(last, Readout)  # proven
        return last

    @property
    def classes(self) -> int:
        """Number of logits."""
        return int(self.readout.bias.shape[0])

    def layer_macs(self, layer: Conv | Linear) -> int:
        """Dense-equivalent multiply-accumulates of one sample in a layer: all steps, or one if all are the same."""
        _, height, width = self.proof.shapes[layer.name]
        steps = 1 if self.proof.static[layer.name] else self.timesteps
        return int(layer.weight.size * height * width * steps)

    @property
    def macs(self) -> int:
        """Those of all convolutions and linear layers."""
        return sum(self.layer_macs(node) for node in self.nodes if isinstance(node, Conv | Linear))


class _Prover:
    """Walks the nodes once and fills the Proof, or raises NetworkError."""

    def __init__(self, network: IntegerNetwork) -> None:
        self.network = network
        self.shapes: dict[str, tuple[int, int, int]] = {}
        self.kinds: dict[str, str] = {}
        self.ranges: dict[str, tuple[int, int]] = {}
        self.dtypes: dict[str, np.dtype[Any]] = {}
        self.static: dict[str, bool] = {}
        self.channel_bounds: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
        self.product_bits: dict[str, int] = {}
        self.membranes: dict[str, tuple[int, int]] = {}
        self.rows = 0
        self.entries = 0

    # -------------------------------------------------------------------------------------------- the walk

    def prove(self) -> Proof:
        net = self.network
        self._check_head()
        used: set[str] = set()
        for place, node in enumerate(net.nodes):
            if type(node) not in NODE_TYPES.values():
                raise NetworkError(f"node {place}: {type(node).__name__} is not a node type")
            self._check_name(node, place)
            if isinstance(node, InputTable) != (place == 0):
                self._fail(node, "the InputTable must be the first node, and the only one")
            if isinstance(node, Readout) != (place == len(net.nodes) - 1):
                self._fail(node, "the Readout must be the last node, and the only one")
            for source in node.inputs:
                if type(source) is not str or source not in self.shapes:
                    self._fail(node, f"reads {source!r}, which is no node before it")
                used.add(source)
            try:
                kind, shape, (lo, hi) = getattr(self, "_" + type(node).__name__.lower())(node)
            except FormatError as fault:
                raise NetworkError(f"node {node.name!r}: {fault}") from None
            if max(shape) > MAX_CHANNELS or shape[0] * shape[1] * shape[2] > MAX_ACTIVATIONS:
                self._fail(node, f"its output {shape} is over {MAX_ACTIVATIONS} values a step")
            self.kinds[node.name], self.shapes[node.name], self.ranges[node.name] = kind, shape, (lo, hi)
            self.dtypes[node.name] = np.dtype(np.uint8) if kind == "spikes" else narrowest(lo, hi)
            if isinstance(node, Lif):
                self.static[node.name] = False
            elif isinstance(node, InputTable):
                self.static[node.name] = net.input.coding == "image"
            else:
                self.static[node.name] = all(self.static[source] for source in node.inputs)
        for node in net.nodes[:-1]:
            if node.name not in used:
                self._fail(node, "nothing reads it")
        return Proof(
            *(
                MappingProxyType(table)  # type: ignore[arg-type]
                for table in (
                    self.shapes,
                    self.kinds,
                    self.ranges,
                    self.dtypes,
                    self.static,
                    self.channel_bounds,
                    self.product_bits,
                    self.membranes,
                )
            )
        )

    def _fail(self, node: Node, what: str) -> None:
        raise NetworkError(f"node {node.name!r} ({type(node).__name__}): {what}")

    def _check_head(self) -> None:
        net, spec = self.network, self.network.input
        if type(spec) is not InputSpec or type(net.grid) is not Grid:
            raise NetworkError(f"input and grid must be InputSpec and Grid, got {type(spec)} and {type(net.grid)}")
        if not 2 <= len(net.nodes) <= MAX_NODES:
            raise NetworkError(f"{len(net.nodes)} nodes are outside 2..{MAX_NODES}")
        if type(net.timesteps) is not int or not 1 <= net.timesteps <= MAX_TIMESTEPS:
            raise NetworkError(f"timesteps = {net.timesteps!r} is outside 1..{MAX_TIMESTEPS}")
        if spec.coding not in ("image", "events"):
            raise NetworkError(f"input coding {spec.coding!r} is none of image, events")
        for what, value, limit in (
            ("channels", spec.channels, MAX_CHANNELS),
            ("height", spec.height, MAX_SIDE),
            ("width", spec.width, MAX_SIDE),
        ):
            if type(value) is not int or not 1 <= value <= limit:
                raise NetworkError(f"input {what} = {value!r} is outside 1..{limit}")
        for text in (*net.labels, *net.notes, *net.notes.values()):
            if type(text) is not str or not text.isprintable():
                raise NetworkError(f"labels and notes must be printable texts, got {text!r:.60}")

    def _check_name(self, node: Node, place: int) -> None:
        name = node.name
        if type(name) is not str or not 0 < len(name) <= MAX_NAME or not name.isprintable() or "/" in name:
            raise NetworkError(f"node {place}: {name!r:.60} is no name (1 to {MAX_NAME} printable characters but '/')")
        if name in self.shapes:
            raise NetworkError(f"node {place}: the name {name!r} is taken")

    def _integer(self, node: Node, attribute: str, lo: int, hi: int) -> int:
        value = getattr(node, attribute)
        if type(value) is not int or not lo <= value <= hi:
            self._fail(node, f"{attribute} = {value!r} is outside {lo}..{hi}")
        return int(value)

    def _source(self, node: Node, *kinds: str) -> tuple[tuple[int, int, int], tuple[int, int]]:
        source = node.inputs[0]
        if self.kinds[source] not in kinds:
            self._fail(node, f"reads {self.kinds[source]} from {source!r}, where {' or '.join(kinds)} are needed")
        return self.shapes[source], self.ranges[source]

    def _shape(self, node: Node, attribute: str, shape: tuple[int, ...]) -> Array:
        array: Array = getattr(node, attribute)
        if array.shape != shape:
            self._fail(node, f"{attribute} has shape {array.shape}, where {shape} is needed")
        return array

    # ----------------------------------------------------------------------------------- one method a node

    def _inputtable(self, node: InputTable) -> tuple[str, tuple[int, int, int], tuple[int, int]]:
        spec = self.network.input
        table = self._shape(node, "table", (spec.channels, 256))
        span = IMAGE_RANGE if spec.coding == "image" else EVENT_RANGE
        if int(table.min()) < span[0] or int(table.max()) > span[1]:
            self._fail(node, f"a table entry is outside {span[0]}..{span[1]}")
        return "codes", (spec.channels, spec.height, spec.width), span

    def _codes(self, node: Conv | Linear | Readout) -> tuple[tuple[int, int, int], tuple[int, int]]:
        """Check a weight tensor's codes and what they multiply; the source's shape and range."""
        check_bits(node.bits)
        top = delta(node.bits)
        if node.weight.size == 0:
            self._fail(node, f"its weight has shape {node.weight.shape}, which is empty")
        if int(node.weight.min()) < -top or int(node.weight.max()) > top:
            self._fail(node, f"a weight code is outside -{top}..{top} ({node.bits} bits)")
        self.rows += node.weight.shape[0]
        if self.rows > MAX_ROWS:
            self._fail(node, f"its outputs bring those of all Conv, Linear and Readout to {self.rows}, over {MAX_ROWS}")
        return self._source(node, "codes", "spikes", "counts")

    def _accumulate(self, node: Conv | Linear, span: tuple[int, int]) -> tuple[int, int]:
        lo, hi = accumulator_bounds(node.weight, *span)
        low, high = int(lo.min()), int(hi.max())
        if max(-low, high) >= INT32_LIMIT:
            self._fail(node, f"its accumulator reaches {low}..{high}, beyond 32 bits")
        lo.setflags(write=False)
        hi.setflags(write=False)
        self.channel_bounds[node.name] = (lo, hi)
        return low, high

    def _window(self, node: Node, size: int, kernel: int, stride: int, padding: int) -> int:
        if kernel > size + 2 * padding:
            self._fail(node, f"its window of {kernel} is larger than its padded input of {size + 2 * padding}")
        return (size + 2 * padding - kernel) // stride + 1

    def _conv(self, node: Conv) -> tuple[str, tuple[int, int, int], tuple[int, int]]:
        if node.weight.ndim != 4:
            self._fail(node, f"weight has shape {node.weight.shape}, where 4 axes are needed")
        (c_in, height, width), span = self._codes(node)
        c_out, per_group, kh, kw = node.weight.shape
        groups = self._integer(node, "groups", 1, c_in)
        stride = self._integer(node, "stride", 1, MAX_SIDE)
        padding = self._integer(node, "padding", 0, min(kh, kw) - 1)
        if c_in % groups or c_out % groups or per_group != c_in // groups:
            self._fail(node, f"weight {node.weight.shape} in {groups} groups does not fit {c_in} input channels")
        low, high = self._accumulate(node, span)
        out = self._window(node, height, kh, stride, padding), self._window(node, width, kw, stride, padding)
        return "accumulators", (c_out, *out), (low, high)

    def _linear(self, node: Linear) -> tuple[str, tuple[int, int, int], tuple[int, int]]:
        shape, span = self._codes(node)
        self._flat(node, shape)
        low, high = self._accumulate(node, span)
        return "accumulators", (node.weight.shape[0], 1, 1), (low, high)

    def _flat(self, node: Linear | Readout, shape: tuple[int, int, int]) -> None:
        if shape[1:] != (1, 1):
            self._fail(node, f"reads {shape}; put a Flatten or a global SumPool before it")
        if node.weight.ndim != 2 or node.weight.shape[1] != shape[0]:
            self._fail(node, f"weight has shape {node.weight.shape}, where (outputs, {shape[0]}) is needed")

    def _bnaffine(self, node: BnAffine) -> tuple[str, tuple[int, int, int], tuple[int, int]]:
        shape, _ = self._source(node, "accumulators")
        multiplier = self._shape(node, "multiplier", shape[:1]).astype(np.int64)
        offset = self._shape(node, "offset", shape[:1])
        shift = self._shape(node, "shift", shape[:1])
        if int(shift.max()) > MAX_SHIFT:
            self._fail(node, f"a shift of {int(shift.max())} is over {MAX_SHIFT}")
        lo, hi = self.channel_bounds[node.source]
        if int(offset.min()) <= -_WIDE_LIMIT or int(offset.max()) >= _WIDE_LIMIT:
            self._fail(node, "an offset is beyond 62 bits")
        # |A| <= 2**31, |acc| < 2**31 and |B| < 2**62: the sum fits int64
        reach = int((np.abs(multiplier) * np.maximum(-lo, hi) + np.abs(offset)).max())
        if reach >= _WIDE_LIMIT:
            self._fail(node, f"multiplier * accumulator + offset reaches {reach}, beyond 62 bits")
        self.product_bits[node.name] = 32 if reach < INT32_LIMIT else 64
        c = self.network.grid.saturation
        return "stream", shape, (-c, c)

    def _bndense(self, node: BnDense) -> tuple[str, tuple[int, int, int], tuple[int, int]]:
        shape, _ = self._source(node, "accumulators")
        lo, hi = self.channel_bounds[node.source]
        sizes = hi - lo + 1
        self.entries += int(sizes.sum())
        if self.entries > MAX_DENSE_ENTRIES:
            self._fail(
                node, f"its table brings dense entries to {self.entries}, over {MAX_DENSE_ENTRIES}; use BnAffine"
            )
        table = self._shape(node, "table", (int(sizes.sum()),))
        c = self.network.grid.saturation
        if int(table.min()) < -c or int(table.max()) > c:
            self._fail(node, f"a table entry is outside -{c}..{c}")
        ends = np.cumsum(sizes)
        for channel, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
            row = table[start:end]
            if np.any(row[1:] > row[:-1]) and np.any(row[1:] < row[:-1]):
                self._fail(node, f"its table is not monotone in channel {channel}")
        return "stream", shape, (-c, c)

    def _add(self, node: Add) -> tuple[str, tuple[int, int, int], tuple[int, int]]:
        shape, (lo, hi) = self._source(node, "stream")
        if self.kinds[node.other] != "stream":
            self._fail(node, f"reads {self.kinds[node.other]} from {node.other!r}, where stream is needed")
        if self.shapes[node.other] != shape:
            self._fail(node, f"adds {shape} and {self.shapes[node.other]}")
        low, high = lo + self.ranges[node.other][0], hi + self.ranges[node.other][1]
        if max(-low, high) >= INT32_LIMIT:
            self._fail(node, f"the stream reaches {low}..{high}, beyond 32 bits")
        return "stream", shape, (low, high)

    def _requantize(self, node: Requantize) -> tuple[str, tuple[int, int, int], tuple[int, int]]:
        shape, (lo, hi) = self._source(node, "stream")
        shift = self._integer(node, "shift", 1, MAX_SHIFT)
        if max(-lo, hi) + (1 << (shift - 1)) >= INT32_LIMIT:
            self._fail(node, f"a stream of {lo}..{hi} plus its half step is beyond 32 bits")
        top = delta(node.bits)
        return "codes", shape, (-top, top)

    def _lif(self, node: Lif) -> tuple[str, tuple[int, int, int], tuple[int, int]]:
        shape, (lo, hi) = self._source(node, "stream")
        if node.name == LOGITS:
            self._fail(node, "a LIF node cannot have this name: traces call the readout's values so")
        top = delta(node.bits)
        decode = self._shape(node, "decode", (2 * top + 1,))
        thresholds = self._shape(node, "thresholds", (2 * top,))
        if (thresholds[1:] < thresholds[:-1]).any():
            self._fail(node, "its thresholds descend")
        if (decode[1:] < decode[:-1]).any():
            self._fail(node, "its decode table descends")
        if node.reset not in ("hard", "soft"):
            self._fail(node, f"reset {node.reset!r} is none of hard, soft")
        if node.quantize not in ("post_reset", "pre_fire"):
            self._fail(node, f"quantize {node.quantize!r} is none of post_reset, pre_fire")
        if node.quantize == "pre_fire" and node.reset == "soft":
            self._fail(node, "pre_fire knows only the hard reset")
        half = INT32_LIMIT // 2
        self._integer(node, "v_th", 0, half - 1)
        if node.reset == "soft":
            self._integer(node, "v_soft", 1, half - 1)
        else:
            self._integer(node, "v_soft", 0, 0)
        self._integer(node, "q_th", 0, top - 1 if node.quantize == "pre_fire" else 0)
        low, high = lo + int(decode.min()), hi + int(decode.max())
        if max(-low, high) >= half:
            self._fail(node, f"its membrane reaches {low}..{high}, beyond 31 bits")
        self.membranes[node.name] = (low, high)
        return "spikes", shape, (0, 1)

    def _maxpool(self, node: MaxPool) -> tuple[str, tuple[int, int, int], tuple[int, int]]:
        (c, height, width), span = self._source(node, "spikes")
        kernel = self._integer(node, "kernel", 1, MAX_SIDE)
        stride = self._integer(node, "stride", 1, MAX_SIDE)
        padding = self._integer(node, "padding", 0, kernel // 2)
        out = (self._window(node, size, kernel, stride, padding) for size in (height, width))
        return "spikes", (c, *out), span  # type: ignore[return-value]

    def _sumpool(self, node: SumPool) -> tuple[str, tuple[int, int, int], tuple[int, int]]:
        (c, height, width), (_, hi) = self._source(node, "spikes", "counts")
        kh = self._integer(node, "kernel_height", 1, MAX_SIDE)
        kw = self._integer(node, "kernel_width", 1, MAX_SIDE)
        stride = self._integer(node, "stride", 1, MAX_SIDE)
        padding = self._integer(node, "padding", 0, min(kh, kw) // 2)
        out = self._window(node, height, kh, stride, padding), self._window(node, width, kw, stride, padding)
        if hi * kh * kw >= INT32_LIMIT:
            self._fail(node, f"its counts reach {hi * kh * kw}, beyond 32 bits")
        return "counts", (c, *out), (0, hi * kh * kw)

    def _flatten(self, node: Flatten) -> tuple[str, tuple[int, int, int], tuple[int, int]]:
        shape, span = self._source(node, "spikes", "counts", "codes")
        return self.kinds[node.source], (shape[0] * shape[1] * shape[2], 1, 1), span

    def _readout(self, node: Readout) -> tuple[str, tuple[int, int, int], tuple[int, int]]:
        shape, span = self._codes(node)
        self._flat(node, shape)
        classes = node.weight.shape[0]
        bias = self._shape(node, "bias", (classes,)).astype(np.int64)
        if self.network.labels and len(self.network.labels) != classes:
            self._fail(node, f"{classes} logits, but {len(self.network.labels)} labels")
        steps = self.network.timesteps
        if max(-span[0], span[1]) * steps >= INT32_LIMIT:
            self._fail(node, f"an input of {span[0]}..{span[1]} over {steps} steps is beyond 32 bits")
        lo, hi = accumulator_bounds(node.weight, span[0] * steps, span[1] * steps)
        # the running sum starts at 0 and the bias comes last: every partial result lies inside both ranges
        low, high = int(min(lo.min(), (lo + bias).min())), int(max(hi.max(), (hi + bias).max()))
        if max(-low, high) >= INT32_LIMIT:
            self._fail(node, f"its logits reach {low}..{high}, beyond 32 bits")
        return "logits", (classes, 1, 1), (low, high)
