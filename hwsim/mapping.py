"""From a network to crossbars: workloads, how layers lie on crossbars, and the floor plan of tiles.

A `Workload` is what the cost models need of a network: its weight layers, neurons, tables and streams, with shapes and
widths. It is read off an IntegerNetwork (`from_network`) or described without one (`ms_resnet`). `map_layer` lays one
layer on crossbars of R rows and X columns:

    kernel-split   Px = ceil(C_in/R),       Py = ceil(C_out*columns/X), crossbars = Px*Py*kh*kw
    im2col         Px = ceil(C_in*kh*kw/R), Py as above,                crossbars = Px*Py

per group of a grouped convolution; groups that fit a crossbar together share one, on its diagonal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mdsnn.export.artifact import digest
from mdsnn.kernels.errors import ConfigError, NetworkError
from mdsnn.kernels.formats import EVENT_RANGE, Array
from mdsnn.kernels.network import (
    Add,
    BnAffine,
    BnDense,
    Conv,
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

from .cells import columns_per_weight
from .config import Chip, nearest


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of weights on crossbars: a convolution, a fully connected layer, or the readout.

    size_in, size_out  (H, W); 1 x 1 for linear and readout
    bits        of its weight codes
    planes      bits of an input value, applied one a PE cycle: 1 for spikes, 8 for image codes
    low, high   range of an input value; two's complement planes where low < 0
    steps       times it runs in a sample: T, or 1 where its input is the same at every step, and for the readout, which
                reads the sum over time
    feeders     names of the layers whose results it waits for
    bn          "affine", "dense" or "" (none); bn_bits is the size of its table in bits
    codes       (C_out, C_in/groups, kh, kw) int8, or None for a workload without weights
    """

    name: str
    kind: str
    c_in: int
    c_out: int
    groups: int
    kernel: tuple[int, int]
    stride: int
    padding: int
    size_in: tuple[int, int]
    size_out: tuple[int, int]
    bits: int
    planes: int
    low: int
    high: int
    steps: int
    feeders: tuple[str, ...]
    bn: str
    bn_bits: int
    bn_entry_bits: int
    codes: Array | None

    @property
    def taps(self) -> int:
        """Kernel positions, kh*kw."""
        return self.kernel[0] * self.kernel[1]

    @property
    def sites(self) -> int:
        """Output positions, H_out*W_out."""
        return self.size_out[0] * self.size_out[1]

    @property
    def macs(self) -> int:
        """Dense multiply-accumulates of one run."""
        return self.c_out * self.sites * (self.c_in // self.groups) * self.taps

    @property
    def values_in(self) -> int:
        """Input values of one run, C_in*H_in*W_in."""
        return self.c_in * self.size_in[0] * self.size_in[1]


@dataclass(frozen=True)
class Population:
    """The neurons of one LIF node. shape (C, H, W), membrane bits, size of its tables in bits."""

    name: str
    shape: tuple[int, int, int]
    bits: int
    table_bits: int

    @property
    def neurons(self) -> int:
        """Neurons of one sample."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class StreamOp:
    """A digital unit without weights: add, requantize, max-pool or sum-pool.

    elements     output values of one run       steps  runs a sample
    window       values read an output (pools)
    stored_bits  width of a value held in a buffer until the step is over; 0 where nothing is held
    source       name of the node it reads
    """

    name: str
    kind: str
    elements: int
    steps: int
    window: int
    stored_bits: int
    source: str
    values_in: int


@dataclass(frozen=True, eq=False)
class Workload:
    """What the cost models need of a network.

    digest  the artifact's (export.artifact.digest), which its activity carries too; "" without a network
    """

    name: str
    layers: tuple[Layer, ...]
    populations: tuple[Population, ...]
    stream_ops: tuple[StreamOp, ...]
    timesteps: int
    input_shape: tuple[int, int, int]
    coding: str
    input_table_bits: int
    digest: str

    def __post_init__(self) -> None:
        if not self.layers:
            raise NetworkError(f"workload {self.name}: has no layer with weights")

    @property
    def ops(self) -> int:
        """Dense operations of a sample, 2*MACs, each layer counted as often as it runs."""
        return sum(2 * layer.macs * layer.steps for layer in self.layers)


def input_planes(low: int, high: int) -> int:
    """Bits of a value in low..high: two's complement where low < 0, else unsigned; at least 1."""
    magnitude = max(high, -low - 1).bit_length()
    return max(1, magnitude + (low < 0))


def _entry_bits(array: Array) -> int:
    """Bits of the narrowest signed type among 8, 16, 32 and 64 that holds every value."""
    return next(w for w in (8, 16, 32, 64) if np.all(-(1 << (w - 1)) <= array) and np.all(array < 1 << (w - 1)))


def from_network(network: IntegerNetwork, name: str = "network") -> Workload:
    """The workload of an exported network: every conv, linear, readout, LIF, add, requantize, pool and table."""
    proof = network.proof
    feeders: dict[str, frozenset[str]] = {}  # node -> the weight layers whose results it is made of
    behind: dict[str, frozenset[str]] = {}  # weight layer -> all weight layers before it
    for node in network.nodes:
        made_of: frozenset[str] = frozenset().union(*(feeders[source] for source in node.inputs))
        if isinstance(node, Conv | Linear):
            behind[node.name] = made_of.union(*(behind[name] for name in made_of))
            made_of = frozenset((node.name,))
        else:  # what another one waits for itself need not be waited for
            made_of = made_of.difference(*(behind[name] for name in made_of))
        feeders[node.name] = made_of
    order = {node.name: place for place, node in enumerate(network.nodes)}
    bns: dict[str, Node] = {n.source: n for n in network.nodes if isinstance(n, BnAffine | BnDense)}
    layers: list[Layer] = []
    populations: list[Population] = []
    stream_ops: list[StreamOp] = []
    for node in network.nodes:
        if isinstance(node, Conv | Linear | Readout):
            layers.append(
                _layer(network, node, bns.get(node.name), sorted(feeders[node.source], key=order.__getitem__))
            )
        elif isinstance(node, Lif):
            tables = sum(t.size * _entry_bits(t) for t in (node.decode, node.thresholds))
            populations.append(Population(node.name, proof.shapes[node.name], node.bits, tables))
        elif isinstance(node, Add | Requantize | MaxPool | SumPool):
            window = 1
            if isinstance(node, MaxPool):
                window = node.kernel**2
            elif isinstance(node, SumPool):
                window = node.kernel_height * node.kernel_width
            stream_ops.append(
                StreamOp(
                    node.name,
                    type(node).__name__.lower(),
                    math.prod(proof.shapes[node.name]),
                    1 if proof.static[node.name] else network.timesteps,
                    window,
                    proof.dtypes[node.name].itemsize * 8 if isinstance(node, Add) else 0,
                    node.source,
                    math.prod(proof.shapes[node.source]),
                )
            )
    return Workload(
        name,
        tuple(layers),
        tuple(populations),
        tuple(stream_ops),
        network.timesteps,
        (network.input.channels, network.input.height, network.input.width),
        network.input.coding,
        sum(node.table.size * 8 for node in network.nodes if isinstance(node, InputTable)),
        digest(network),
    )


def _layer(network: IntegerNetwork, node: Conv | Linear | Readout, bn: Node | None, feeders: list[str]) -> Layer:
    proof = network.proof
    shape_in, (low, high) = proof.shapes[node.source], proof.ranges[node.source]
    steps = 1 if proof.static[node.name] else network.timesteps
    if isinstance(bn, BnAffine):
        wide = 16 if int(np.abs(bn.multiplier.astype(np.int64)).max()) < 1 << 15 else 32
        bn_kind, bn_bits, entry_bits = "affine", bn.multiplier.size * (wide + proof.product_bits[bn.name] + 5), 0
    elif isinstance(bn, BnDense):
        entry_bits = proof.dtypes[bn.name].itemsize * 8
        bn_kind, bn_bits = "dense", bn.table.size * entry_bits
    else:  # the readout has none; its bias is held beside it
        bn_kind, bn_bits, entry_bits = "", 32 * network.readout.bias.size, 0
    if isinstance(node, Conv):
        shape_out = proof.shapes[node.name]
        c_out, _, kh, kw = node.weight.shape
        return Layer(
            node.name,
            "conv",
            shape_in[0],
            c_out,
            node.groups,
            (kh, kw),
            node.stride,
            node.padding,
            shape_in[1:],
            shape_out[1:],
            node.bits,
            input_planes(low, high),
            low,
            high,
            steps,
            tuple(feeders),
            bn_kind,
            bn_bits,
            entry_bits,
            node.weight,
        )
    if isinstance(node, Readout):
        low, high, steps = low * network.timesteps, high * network.timesteps, 1  # the sum over time is read once
    kind = "readout" if isinstance(node, Readout) else "linear"
    return Layer(
        node.name,
        kind,
        shape_in[0],
        node.weight.shape[0],
        1,
        (1, 1),
        1,
        0,
        (1, 1),
        (1, 1),
        node.bits,
        input_planes(low, high),
        low,
        high,
        steps,
        tuple(feeders),
        bn_kind,
        bn_bits,
        entry_bits,
        node.weight[:, :, None, None],
    )


RESNET_BLOCKS: Mapping[int, tuple[int, int, int, int]] = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def ms_resnet(
    depth: int,
    input_shape: tuple[int, int, int],
    timesteps: int,
    weight_bits: int = 4,
    membrane_bits: int = 4,
    *,
    classes: int = 100,
    coding: str | None = None,
) -> Workload:
    """An MS-ResNet with the CIFAR stem (3x3, stride 1; widths 64, 128, 256, 512), described without an artifact.

    depth        18 or 34
    input_shape  (C, H, W)
    coding       "image" or "events"; None: events for 2 channels (as DVS cameras give), else image
    The stem and the classifier have 8-bit weights, the shortcuts 8-bit inputs, as the exporter's defaults.
    raises       ConfigError  for a depth, shape, T or bits it does not know
    """
    if depth not in RESNET_BLOCKS:
        raise ConfigError(f"depth = {depth} is none of {', '.join(map(str, RESNET_BLOCKS))}")
    channels, height, width = input_shape
    for what, value, lo, hi in (
        ("input channels", channels, 1, 4096),
        ("input height", height, 8, 4096),
        ("input width", width, 8, 4096),
        ("T", timesteps, 1, 256),
        ("weight bits", weight_bits, 2, 8),
        ("membrane bits", membrane_bits, 2, 8),
        ("classes", classes, 1, 1 << 20),
    ):
        if type(value) is not int or not lo <= value <= hi:
            raise ConfigError(f"workload ms-resnet{depth}: {what} = {value!r} is outside {lo}..{hi}")
    coding = coding or ("events" if channels == 2 else "image")
    if coding not in ("image", "events"):
        raise ConfigError(f"workload ms-resnet{depth}: coding {coding!r} is none of image, events")
    span = (-128, 127) if coding == "image" else EVENT_RANGE
    first_steps = 1 if coding == "image" else timesteps
    delta_u = (1 << (membrane_bits - 1)) - 1
    lif_tables = (2 * delta_u + 1) * 16 + 2 * delta_u * 16
    layers: list[Layer] = []
    populations: list[Population] = []
    stream_ops: list[StreamOp] = []

    def conv(name: str, c_in: int, c_out: int, kernel: int, stride: int, size: tuple[int, int],
             bits: int, span: tuple[int, int], steps: int, feeders: tuple[str, ...]) -> tuple[int, int]:  # fmt: skip
        out = (-(-size[0] // stride), -(-size[1] // stride))
        layers.append(
            Layer(
                name,
                "conv",
                c_in,
                c_out,
                1,
                (kernel, kernel),
                stride,
                (kernel - 1) // 2,
                size,
                out,
                bits,
                input_planes(*span),
                *span,
                steps,
                feeders,
                "affine",
                c_out * (16 + 32 + 5),
                0,
                None,
            )
        )
        return out

    def lif(name: str, c: int, size: tuple[int, int]) -> None:
        populations.append(Population(name, (c, *size), membrane_bits, lif_tables))

    size = conv("stem.conv", channels, 64, 3, 1, (height, width), 8, span, first_steps, ())
    waits: tuple[str, ...] = ("stem.conv",)
    c_in = 64
    for stage, blocks in enumerate(RESNET_BLOCKS[depth]):
        c_out = 64 << stage
        for block in range(blocks):
            where, stride = f"stage{stage + 1}.{block}", 2 if stage and not block else 1
            before = size
            lif(f"{where}.lif1", c_in, size)
            size = conv(f"{where}.conv1", c_in, c_out, 3, stride, before, weight_bits, (0, 1), timesteps, waits)
            lif(f"{where}.lif2", c_out, size)
            conv(f"{where}.conv2", c_out, c_out, 3, 1, size, weight_bits, (0, 1), timesteps, (f"{where}.conv1",))
            results: tuple[str, ...] = (f"{where}.conv2",)
            elements = c_out * size[0] * size[1]
            if stride == 2:
                read = c_in * before[0] * before[1]
                stream_ops.append(
                    StreamOp(f"{where}.requantize", "requantize", read, timesteps, 1, 0, f"{where}.in", read)
                )
                conv(f"{where}.shortcut", c_in, c_out, 1, 2, before, weight_bits, (-127, 127), timesteps, waits)
                results += (f"{where}.shortcut",)
            stream_ops.append(StreamOp(f"{where}.add", "add", elements, timesteps, 1, 16, f"{where}.conv2", elements))
            waits, c_in = results, c_out
    lif("head.lif", c_in, size)
    area = size[0] * size[1]
    span = (0, timesteps * area)
    stream_ops.append(StreamOp("head.pool", "sumpool", c_in, timesteps, area, 0, "head.lif", c_in * area))
    layers.append(
        Layer(
            "head.fc",
            "readout",
            c_in,
            classes,
            1,
            (1, 1),
            1,
            0,
            (1, 1),
            (1, 1),
            8,
            input_planes(*span),
            *span,
            1,
            waits,
            "",
            32 * classes,
            0,
            None,
        )
    )
    return Workload(
        f"ms-resnet{depth} {channels}x{height}x{width}",
        tuple(layers),
        tuple(populations),
        tuple(stream_ops),
        timesteps,
        input_shape,
        coding,
        channels * 256 * 8,
        "",
    )


WORKLOADS = tuple(f"ms-resnet{depth}" for depth in RESNET_BLOCKS)
"""Names of the built-in workloads."""


def named_workload(
    name: str, input_shape: str, timesteps: int, weight_bits: int = 4, membrane_bits: int = 4, *, classes: int = 100
) -> Workload:
    """A built-in workload by name, such as "ms-resnet18", with its input as text, such as "2x48x48".

    raises  ConfigError  for an unknown name (the nearest is suggested) or a shape that is not CxHxW
    """
    if name not in WORKLOADS:
        raise ConfigError(f"workload {name!r:.80} is none of {', '.join(WORKLOADS)}{nearest(name, WORKLOADS)}")
    match = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})x([0-9]{1,4})", input_shape)
    if match is None:
        raise ConfigError(f"input {input_shape!r:.80} is not CxHxW, such as 3x32x32")
    channels, height, width = (int(side) for side in match.groups())
    depth = int(name.removeprefix("ms-resnet"))
    return ms_resnet(depth, (channels, height, width), timesteps, weight_bits, membrane_bits, classes=classes)


# ---------------------------------------------------------------------------------------------------- crossbars


def row_tiles(layer: Layer, rows: int, scheme: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """How the rows of a layer fall into tiles of `rows` crossbar rows.

    returns  tile  (C_in, kh*kw) int64: row tile of an input channel at a kernel position; groups do not share tiles.
                   With kernel-split a tile stands for kh*kw crossbar rows blocks, one a position
             used  (tiles,) int64: rows of a crossbar in use in that tile
    """
    per_group = layer.c_in // layer.groups
    channel = np.arange(layer.c_in)
    group, local = channel // per_group, channel % per_group
    if scheme == "kernel-split":
        per = -(-per_group // rows)
        tile = np.repeat((group * per + local // rows)[:, None], layer.taps, axis=1)
        used = np.bincount(tile[:, 0], minlength=per * layer.groups)
    elif scheme == "im2col":
        per = -(-per_group * layer.taps // rows)
        flat = local[:, None] * layer.taps + np.arange(layer.taps)[None, :]
        tile = group[:, None] * per + flat // rows
        used = np.bincount(tile.ravel(), minlength=per * layer.groups)
    else:
        raise ConfigError(f"mapping scheme {scheme!r} is none of kernel-split, im2col")
    return tile.astype(np.int64), used.astype(np.int64)


@dataclass(frozen=True, eq=False)
class MappedLayer:
    """A layer on crossbars.

    bits           of the weights as mapped (a projection may differ from the layer's own)
    columns        a weight takes (slices, doubled where differential)
    group_columns  columns one group needs, C_out/groups*columns
    shared         groups that share a crossbar, on its diagonal
    crossbars      in all         pes  crossbars/crossbars_per_pe, rounded up
    used_rows      (tiles,) rows in use of each row tile, see `row_tiles`
    utilisation    used cells / cells
    """

    layer: Layer
    bits: int
    columns: int
    group_columns: int
    column_tiles: int
    shared: int
    crossbars: int
    pes: int
    used_rows: npt.NDArray[np.int64]
    utilisation: float


def map_layer(layer: Layer, chip: Chip, bits: int | None = None) -> MappedLayer:
    """Lay `layer` on the crossbars of `chip`, with its own weight bits or `bits`."""
    rows, cols = chip.integer("crossbar.rows"), chip.integer("crossbar.columns")
    scheme = chip.choice("mapping.scheme")
    width = layer.bits if bits is None else bits
    per_weight = columns_per_weight(width, chip.integer("cell.bits"), chip.choice("mapping.coding"))
    per_group = layer.c_in // layer.groups
    group_rows = per_group if scheme == "kernel-split" else per_group * layer.taps
    positions = layer.taps if scheme == "kernel-split" else 1
    group_columns = layer.c_out // layer.groups * per_weight
    px, py = -(-group_rows // rows), -(-group_columns // cols)
    shared = min(rows // group_rows, cols // group_columns, layer.groups) if px == py == 1 else 1
    crossbars = -(-layer.groups // shared) * px * py * positions
    used = layer.c_out * per_group * layer.taps * per_weight
    return MappedLayer(
        layer,
        width,
        per_weight,
        group_columns,
        py,
        shared,
        crossbars,
        -(-crossbars // chip.integer("tile.crossbars_per_pe")),
        row_tiles(layer, rows, scheme)[1],
        used / (crossbars * rows * cols),
    )


@dataclass(frozen=True)
class Floorplan:
    """Tiles on a near-square grid, filled in the order of the layers, rows in alternating direction.

    columns  tiles a grid row
    tiles    for each tile the (layer index, PEs) it holds
    spans    for each layer its first and last tile
    """

    columns: int
    tiles: tuple[tuple[tuple[int, int], ...], ...]
    spans: tuple[tuple[int, int], ...]

    def position(self, tile: int) -> tuple[int, int]:
        """Grid row and column of a tile."""
        row, place = divmod(tile, self.columns)
        return row, place if row % 2 == 0 else self.columns - 1 - place

    def hops(self, layer: int, sources: tuple[int, ...]) -> int:
        """Hops of a spike to all tiles of `layer`: from the nearest tile of its sources, then on along its tiles.

        At least 1: a spike always passes one router. Without sources it enters at the corner of tile 0.
        """
        first, last = self.spans[layer]
        starts = [self.position(self.spans[s][1]) for s in sources] or [(0, -1)]
        here = self.position(first)
        near = min(abs(here[0] - row) + abs(here[1] - column) for row, column in starts)
        return max(1, near) + last - first


def floorplan(mapped: tuple[MappedLayer, ...], chip: Chip) -> Floorplan:
    """Place the PEs of the mapped layers on tiles in order; layers may share a tile.

    raises  ConfigError  if the chip's tile limit is passed; names the layer
    """
    pes, limit = chip.integer("tile.pes"), chip.integer("tile.limit")
    total = 0
    for entry in mapped:
        total += entry.pes
        if -(-total // pes) > limit:
            raise ConfigError(
                f"layer {entry.layer.name!r}: up to it the network needs {-(-total // pes)} tiles, but chip "
                f"{chip.name} allows tile.limit = {limit}. Raise the limit, or take larger crossbars or tiles"
            )
    tiles: list[list[tuple[int, int]]] = [[] for _ in range(-(-total // pes))]
    spans: list[tuple[int, int]] = []
    at = 0
    for index, entry in enumerate(mapped):
        first, left = at // pes, entry.pes
        while left:
            here = min(left, pes - at % pes)
            tiles[at // pes].append((index, here))
            at, left = at + here, left - here
        spans.append((first, (at - 1) // pes))
    return Floorplan(max(1, math.isqrt(len(tiles) - 1) + 1), tuple(map(tuple, tiles)), tuple(spans))
