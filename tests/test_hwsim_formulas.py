"""The hardware model's formulas, worked out a second time from docs/hardware-model.md, on planted networks.

Nothing here calls what it checks: every entry of the ledgers is a count of this file times a unit of this file. The
mutation score (docs/mutation-hwsim.md) says how much of the formulas these and the other tests hold.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mdsnn.hwsim import converters
from mdsnn.hwsim.activity import LayerLoad, Load, load_of, measure, uniform
from mdsnn.hwsim.config import Chip, load_chip
from mdsnn.hwsim.cost import (
    BITS4,
    BITS8,
    FP32_BITS32,
    FP32_SIGNIFICAND24,
    OWN,
    OWN_AVERAGE,
    PAPER_FIG3,
    PRECISIONS,
    PRESET_CELL_BITS,
    Precision,
    Sensitivity,
    SpikeSimLayer,
    ann_workload,
    physical_cost,
    prepare,
    presets,
    sensitivity,
    spikesim_cost,
    spikesim_events,
    spikesim_layers,
    three_energies,
)
from mdsnn.hwsim.mapping import (
    Floorplan,
    Layer,
    Workload,
    _entry_bits,
    floorplan,
    from_network,
    input_planes,
    map_layer,
    ms_resnet,
    row_tiles,
)
from mdsnn.kernels.errors import ConfigError
from mdsnn.kernels.formats import Grid, decode_table, image_table, requantize_thresholds, threshold_code
from mdsnn.kernels.network import (
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
    Readout,
    Requantize,
)
from planted import covering

CHIP = load_chip("fefet32")
SPIKESIM = load_chip("spikesim65")
CHIPS: list[dict[str, Any]] = [
    {},
    {"mapping.coding": "differential", "noc.mode": "dense", "adc.bits": 9},
    {"mapping.scheme": "im2col", "noc.distance": "fixed", "noc.fixed_hops": 2.5, "crossbar.rows": 16},
    {"crossbar.rows": 5, "cell.bits": 2, "noc.mode": "dense", "noc.distance": "fixed", "tile.crossbars_per_pe": 4},
    {"crossbar.columns": 128, "cell.bits": 1, "adc.bits": 11, "adc.share": 4, "tile.pes": 3},
]
NINE = Precision("nine", 9, 9, True)
OURS = {"OWN": OWN, "NINE": NINE, "BITS4": BITS4, "BITS8": BITS8, "FP24": FP32_SIGNIFICAND24, "FP32": FP32_BITS32}


WANTED = {"Add", "Requantize", "SumPool", "MaxPool", "Linear", "BnDense", "BnAffine", "groups", "events"}
CASES = covering(WANTED, 300, max_channels=31, max_timesteps=3)
"""Networks that have, between them, groups, both BN forms, adds, shortcuts, pools, linear layers and events."""


def load_for(network: IntegerNetwork, pixels: np.ndarray, chip: Chip) -> tuple[Workload, Load]:
    rows, scheme = chip.integer("crossbar.rows"), chip.choice("mapping.scheme")
    workload = from_network(network)
    return workload, load_of(measure(network, pixels, kernels="reference", rows=rows, scheme=scheme), workload)


# ----------------------------------------------------------------------------------------------- the model by hand


def columns(bits: int, chip: Chip) -> int:
    """Columns of a weight."""
    cell = chip.integer("cell.bits")
    if chip.choice("mapping.coding") == "offset":
        return math.ceil(bits / cell)
    return 2 * math.ceil((bits - 1) / cell)


def level_of(code: int, bits: int, chip: Chip) -> int:
    """Sum of the levels of the cells of one weight."""
    cell = chip.integer("cell.bits")
    value = code + (1 << (bits - 1)) - 1 if chip.choice("mapping.coding") == "offset" else abs(code)
    total = 0
    while value:
        total, value = total + value % (1 << cell), value >> cell
    return total


def geometry(layer: Layer, bits: int, chip: Chip) -> tuple[int, int, int]:
    """(columns of a group, groups that share a crossbar, crossbars)."""
    rows, cols = chip.integer("crossbar.rows"), chip.integer("crossbar.columns")
    split = chip.choice("mapping.scheme") == "kernel-split"
    high = layer.c_in // layer.groups * (1 if split else layer.taps)
    wide = layer.c_out // layer.groups * columns(bits, chip)
    shared = 1
    while high <= rows and wide <= cols and shared < layer.groups and (shared + 1) * max(high / rows, wide / cols) <= 1:
        shared += 1
    tiles = math.ceil(high / rows) * math.ceil(wide / cols) * (layer.taps if split else 1)
    return wide, shared, math.ceil(layer.groups / shared) * tiles


def energy_by_hand(
    workload: Workload, load: Load, chip: Chip, precision: Precision, hops: dict[str, float], area: float, tiles: int
) -> dict[tuple[str, str, str], float]:
    """J by (layer, component, what) without leakage."""
    c, out = chip, dict[tuple[str, str, str], float]()
    read = c["cell.v_read"] ** 2 * c["cell.t_read"]
    cell_bits = c.integer("cell.bits")
    step = (c["cell.g_max"] - c["cell.g_min"]) / (2**cell_bits - 1)
    adc = c.integer("adc.bits")
    conversion = c[f"adc.energy_{min(8, adc)}"] * c["adc.growth"] ** max(0, adc - 8)
    bit = c["memory.bit_energy"]
    for layer in workload.layers:
        counts, bits = load.layers[layer.name], precision.weight_bits or layer.bits
        wide, shared, _ = geometry(layer, bits, chip)
        driven, visits = counts.rows.sum(), counts.visits.sum()
        if layer.codes is None or precision.projected:
            level = driven * wide * (2**cell_bits - 1) / 2
        else:
            level, per = 0.0, layer.c_out // layer.groups
            for channel in range(layer.c_in):
                group, local = divmod(channel, layer.c_in // layer.groups)
                mine = layer.codes[group * per : (group + 1) * per, local]
                for (_, ky, kx), code in np.ndenumerate(mine):
                    level += counts.rows[channel, ky, kx] * level_of(int(code), bits, chip)
        used = row_tiles(layer, c.integer("crossbar.rows"), c.choice("mapping.scheme"))[1]
        dense = layer.bn == "dense" and not precision.projected
        sites = counts.sites.sum() * layer.c_out
        sent = counts.inputs.sum() * layer.planes
        bitmap = layer.values_in * layer.planes * layer.steps
        far = c["noc.fixed_hops"] if c.choice("noc.distance") == "fixed" else hops[layer.name]
        if c.choice("noc.mode") == "dense":
            transport = bitmap * far * c["noc.bit_mm_energy"] * math.sqrt(area / tiles)
        else:
            transport = sent * far * c["noc.hop_energy"]
        parts = {
            ("array", "cell"): driven * wide * shared * read * c["cell.g_min"],
            ("array", "level"): level * read * step,
            ("ADC", ""): visits * wide * conversion,
            ("MUX", ""): visits * wide * c["mux.energy"],
            ("shift-add", ""): visits * wide * c["digital.shift_add_energy"],
            ("offset removal", ""): visits * layer.c_out / layer.groups * c["diff.energy"],
            ("spike memory", ""): sum(v @ used for v in counts.visits) * bit,
            ("BN", ""): sites * (layer.bn_entry_bits * bit if dense else c["digital.bn_energy"]) if layer.bn else 0.0,
            ("transport", ""): transport,
        }
        out |= {(layer.name, *what): float(value) for what, value in parts.items()}
    if workload.input_table_bits:
        out["", "input table", ""] = float(load.layers[workload.layers[0].name].inputs.sum()) * 8 * bit
    for p in workload.populations:
        width, updates = precision.membrane_bits or p.bits, workload.timesteps * p.neurons
        update = c["neuron.leak_energy"] + c["neuron.add_energy"] + c["neuron.compare_energy"]
        out[p.name, "neuron", ""] = updates * width / 8 * update + load.spikes[p.name].sum() * c["neuron.reset_energy"]
        out[p.name, "membrane memory", ""] = 2 * updates * width * bit
    for op in workload.stream_ops:
        runs = op.elements * op.steps
        if op.kind in ("add", "requantize"):
            out[op.name, "neuron", ""] = runs * c["digital.add_energy"]
        else:
            share = op.window * op.elements / op.values_in
            out[op.name, "pool", ""] = load.pools[op.name] * share * c["digital.add_energy"]
        out[op.name, "membrane memory", ""] = 2 * runs * op.stored_bits * bit
    return {key: value for key, value in out.items() if value}


def table_bits_by_hand(workload: Workload, precision: Precision) -> float:
    """Bits of all tables under a precision."""
    total = float(workload.input_table_bits)
    for layer in workload.layers:
        full = (precision.weight_bits or 0) > 8
        if layer.bn and precision.projected:
            total += layer.c_out * (64 if full else 53)  # two words of 32; multiplier 16, offset 32, shift 5
        else:
            total += layer.bn_bits
    for p in workload.populations:
        bits = precision.membrane_bits
        if bits in (None, p.bits):
            total += p.table_bits
        elif bits is not None and bits <= 8:
            total += 16 * (2**bits - 1 + 2**bits - 2)  # decode and thresholds
    return total


def area_by_hand(workload: Workload, chip: Chip, precision: Precision, tiles: int) -> dict[str, float]:
    """m2 by component."""
    c = chip
    crossbars = tiles * c.integer("tile.pes") * c.integer("tile.crossbars_per_pe")
    adcs = crossbars * c.integer("crossbar.columns") / c.integer("adc.share")
    bits = c.integer("adc.bits")
    bit = c["memory.bit_area"]
    cells = crossbars * c.integer("crossbar.rows") * c.integer("crossbar.columns")
    neurons = sum(p.neurons for p in workload.populations)
    return {
        "crossbars": cells * c["cell.area_f2"] * c["cell.feature"] ** 2,
        "ADC": adcs * c[f"adc.area_{min(8, bits)}"] * c["adc.growth"] ** max(0, bits - 8),
        "MUX": adcs * c["mux.area"],
        "subtractors": tiles * c.integer("crossbar.columns") / c.integer("adc.share") * c["diff.area"],
        "buffers": tiles * (c["tile.buffer_area"] + c["tile.temp_area"]),
        "interconnect": tiles * c["tile.htree_area"],
        "membrane memory": sum(p.neurons * (precision.membrane_bits or p.bits) for p in workload.populations) * bit,
        "spike memory": neurons * bit,
        "stream memory": sum(op.elements * op.stored_bits for op in workload.stream_ops) * bit,
        "tables": table_bits_by_hand(workload, precision) * bit,
    }


def grid_place(tile: int, wide: int) -> tuple[int, int]:
    row = tile // wide
    return row, tile % wide if row % 2 == 0 else wide - 1 - tile % wide


def hops_by_hand(workload: Workload, chip: Chip, bits: int | None) -> tuple[dict[str, float], int]:
    """Hops of a spike to each layer, and tiles: PEs in order, tiles on a snake."""
    place: dict[str, tuple[int, int]] = {}
    at, per = 0, chip.integer("tile.pes")
    for layer in workload.layers:
        pes = math.ceil(geometry(layer, bits or layer.bits, chip)[2] / chip.integer("tile.crossbars_per_pe"))
        place[layer.name] = (at // per, (at + pes - 1) // per)
        at += pes
    tiles = math.ceil(at / per)
    wide = math.ceil(math.sqrt(tiles))
    hops = {}
    for layer in workload.layers:
        first, last = place[layer.name]
        row, column = grid_place(first, wide)
        starts = [grid_place(place[f][1], wide) for f in layer.feeders] or [(0, -1)]
        near = min(abs(row - r) + abs(column - s) for r, s in starts)
        hops[layer.name] = float(max(1, near) + last - first)
    return hops, tiles


def assert_ledgers(workload: Workload, load: Load, chip: Chip, precision: Precision) -> None:
    """Every sum of the ledgers by layer and component, delays and totals, against this file's."""
    cost = physical_cost(prepare(workload, load, chip, precision), chip)
    hops, tiles = hops_by_hand(workload, chip, precision.weight_bits)
    area = area_by_hand(workload, chip, precision, tiles)
    got: dict[str, float] = {}
    for entry in cost.area:
        got[entry.component] = got.get(entry.component, 0.0) + entry.value
    assert got == pytest.approx(area, rel=1e-12)
    total = sum(area.values())
    by_hand = energy_by_hand(workload, load, chip, precision, hops, total, tiles)
    want: dict[tuple[str, str], float] = {}
    for (layer, component, _), value in by_hand.items():
        want[layer, component] = want.get((layer, component), 0.0) + value
    mine: dict[tuple[str, str], float] = {}
    for entry in cost.energy:
        mine[entry.layer, entry.component] = mine.get((entry.layer, entry.component), 0.0) + entry.value
    assert mine == pytest.approx(want, rel=1e-9)
    cycle = 26 / 250e6
    delays = {layer.name: layer.steps * layer.sites * layer.planes * cycle for layer in workload.layers}
    assert cost.delays == pytest.approx(delays)
    begin: dict[str, float] = {}
    end: dict[str, float] = {}
    for layer in workload.layers:
        begin[layer.name] = max([0.0, *(begin[f] + 0.75 * delays[f] for f in layer.feeders)])
        end[layer.name] = max([begin[layer.name] + delays[layer.name], *(end[f] for f in layer.feeders)])
    slowest = max(workload.layers, key=lambda layer: delays[layer.name])
    steps = [delays[layer.name] / layer.steps for layer in workload.layers if layer is not slowest]
    times = {"sequential": sum(delays.values()), "overlapped": max(end.values())}
    times["pipelined"] = delays[slowest.name] + sum(steps)
    leak = chip["leakage.density"] * total
    for schedule, totals in cost.schedules.items():
        assert totals.delay == pytest.approx(times[schedule])
        assert totals.energy == pytest.approx(sum(want.values()) + leak * times[schedule], rel=1e-9)
        assert totals.area == pytest.approx(total)
    synops = 0.0
    for layer in workload.layers:
        synops += float(load.layers[layer.name].rows.sum()) * layer.c_out / layer.groups
    assert cost.prepared.synops == pytest.approx(synops)
    for work in cost.prepared.layers:
        layer, mapped = work.mapped.layer, work.mapped
        width = precision.weight_bits or layer.bits
        assert (mapped.group_columns, mapped.shared, mapped.crossbars) == geometry(layer, width, chip)
        assert mapped.column_tiles == math.ceil(mapped.group_columns / chip.integer("crossbar.columns"))
        assert (mapped.bits, mapped.columns) == (width, columns(width, chip))
        cells = mapped.crossbars * chip.integer("crossbar.rows") * chip.integer("crossbar.columns")
        weights = layer.c_out * layer.c_in // layer.groups * layer.taps
        assert mapped.utilisation == pytest.approx(weights * columns(width, chip) / cells)


@pytest.mark.parametrize("over", CHIPS, ids=range(len(CHIPS)))
@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_entry_of_the_ledgers_of_a_planted_network(case: int, over: dict[str, Any]) -> None:
    chip = CHIP.replaced(over)
    workload, load = load_for(*CASES[case], chip)
    assert_ledgers(workload, load, chip, OWN)


@pytest.mark.parametrize("over", [CHIPS[0], CHIPS[1], CHIPS[3]], ids=range(3))
@pytest.mark.parametrize("name", OURS)
def test_every_entry_of_the_ledgers_of_a_projection(name: str, over: dict[str, Any]) -> None:
    chip = CHIP.replaced(over)
    workload, load = load_for(*CASES[0], chip)
    assert_ledgers(workload, load, chip, OURS[name])
    described = ms_resnet(18, (2, 16, 16), 2, weight_bits=3, membrane_bits=5)
    rows, scheme = chip.integer("crossbar.rows"), chip.choice("mapping.scheme")
    assert_ledgers(described, uniform(described, 0.2, rows=rows, scheme=scheme), chip, OURS[name])


@pytest.mark.parametrize("over", CHIPS, ids=range(len(CHIPS)))
def test_every_entry_where_groups_share_a_crossbar(over: dict[str, Any]) -> None:
    chip = CHIP.replaced(over)
    layer = Layer("g", "conv", 12, 8, 4, (1, 2), 1, 0, (6, 6), (6, 5), 4, 1, 0, 1, 3, (), "affine", 424, 0, None)
    workload = Workload("shared", (layer,), (), (), 3, (12, 6, 6), "events", 0, "")
    rows, scheme = chip.integer("crossbar.rows"), chip.choice("mapping.scheme")
    assert geometry(layer, 4, CHIP) == (2, 4, 2)
    wide = replace(layer, c_out=96)  # 24 columns a group: two of four share 64 columns
    assert (map_layer(wide, CHIP).shared, map_layer(wide, CHIP).crossbars) == (2, 2 * 2)
    for precision in (OWN, BITS8):
        assert_ledgers(workload, uniform(workload, 0.3, rows=rows, scheme=scheme), chip, precision)


def test_the_precisions_are_what_their_names_say() -> None:
    assert (OWN.weight_bits, OWN.membrane_bits, OWN.projected) == (None, None, False)
    assert (OWN_AVERAGE.weight_bits, OWN_AVERAGE.membrane_bits, OWN_AVERAGE.projected) == (None, None, True)
    found = [(p.weight_bits, p.membrane_bits, p.projected) for p in PRECISIONS]
    assert found == [(24, 32, True), (32, 32, True), (8, 8, True), (4, 4, True)]
    assert PRESET_CELL_BITS == 4
    assert PAPER_FIG3 == {"tops_per_w": 2.64, "tops_per_mm2": 6.19, "edap": 14.85}


# ------------------------------------------------------------------------------------------------ what a network has


@pytest.mark.parametrize("case", range(len(CASES)))
def test_what_a_workload_says_of_a_network(case: int) -> None:
    """Widths, tables, ranges and windows of every node, from the nodes themselves."""
    network, _ = CASES[case]
    workload, proof = from_network(network), network.proof
    by_name = {node.name: node for node in network.nodes}
    readers = {node.source: node for node in network.nodes if isinstance(node, BnAffine | BnDense)}

    def width(array: np.ndarray) -> int:
        return min(
            w for w in (8, 16, 32, 64) if array.size == 0 or np.abs(array.astype(object) + 0.5).max() < 2 ** (w - 1)
        )

    for layer in workload.layers:
        node = by_name[layer.name]
        assert isinstance(node, Conv | Linear | Readout)
        low, high = proof.ranges[node.source]
        summed = isinstance(node, Readout)
        assert layer.macs == node.weight.size * math.prod(layer.size_out)
        assert layer.values_in == math.prod(proof.shapes[node.source])
        factor = network.timesteps if summed else 1
        assert (layer.low, layer.high) == (low * factor, high * factor)
        assert layer.steps == (1 if summed or proof.static[node.name] else network.timesteps)
        fits = [p for p in range(1, 64) if (-(2 ** (p - 1)) if layer.low < 0 else 0) <= layer.low]
        assert layer.planes == next(p for p in fits if layer.high < 2 ** (p - (layer.low < 0)))
        bn = readers.get(layer.name)
        if isinstance(bn, BnAffine):
            wide = 16 if all(-(2**15) < int(m) < 2**15 for m in bn.multiplier) else 32
            assert (layer.bn, layer.bn_entry_bits) == ("affine", 0)
            assert layer.bn_bits == len(bn.multiplier) * (wide + proof.product_bits[bn.name] + 5)
        elif isinstance(bn, BnDense):
            assert (layer.bn, layer.bn_entry_bits) == ("dense", 8 * proof.dtypes[bn.name].itemsize)
            assert layer.bn_bits == bn.table.size * layer.bn_entry_bits
        else:
            assert (layer.bn, layer.bn_entry_bits) == ("", 0)
            assert layer.bn_bits == (32 * len(node.bias) if isinstance(node, Readout) else 0)
        if isinstance(node, Conv):
            assert (layer.kernel, layer.stride, layer.padding) == (node.weight.shape[2:], node.stride, node.padding)
        else:
            assert (layer.kernel, layer.stride, layer.padding, layer.groups) == ((1, 1), 1, 0, 1)
            assert (layer.size_in, layer.size_out) == ((1, 1), (1, 1))
    for population in workload.populations:
        node = by_name[population.name]
        assert isinstance(node, Lif)
        tables = sum(t.size * width(t) for t in (node.decode, node.thresholds))
        assert (population.bits, population.table_bits) == (node.bits, tables)
        assert population.neurons == math.prod(proof.shapes[node.name])
    for op in workload.stream_ops:
        node = by_name[op.name]
        steps = 1 if proof.static[op.name] else network.timesteps
        window = getattr(node, "kernel", 1) ** 2 * getattr(node, "kernel_height", 1) * getattr(node, "kernel_width", 1)
        stored = 8 * proof.dtypes[op.name].itemsize if op.kind == "add" else 0
        assert (op.kind, op.steps, op.window, op.stored_bits) == (type(node).__name__.lower(), steps, window, stored)
        assert op.elements == math.prod(proof.shapes[op.name])
        assert op.values_in == math.prod(proof.shapes[op.source])
    tables = [node for node in network.nodes if isinstance(node, InputTable)]
    assert workload.input_table_bits == 8 * tables[0].table.size
    assert workload.ops == sum(2 * layer.macs * layer.steps for layer in workload.layers)


def test_a_network_worked_out_by_hand() -> None:
    """What the planted networks lack: wide multipliers, a sum before all neurons, a 3x3 pool, a readout of codes."""
    grid, one, timesteps = Grid(), np.ones((2, 1, 1, 1), np.int8), 3
    lif_tables = decode_table(1.0, 0.5, 4, grid), requantize_thresholds(1.0, 4, grid)

    def bn(name: str, source: str, *multiplier: int) -> BnAffine:
        return BnAffine(name, source, np.array(multiplier), np.zeros(2, np.int64), np.full(2, 20))

    nodes = (
        InputTable("input", image_table([0.5], [0.25])),
        Conv("a", "input", one, 4),
        bn("a.bn", "a", 32767, -32767),
        Conv("b", "input", one, 4),
        bn("b.bn", "b", 1, -32768),
        Add("sum", "a.bn", "b.bn"),
        Lif("lif", "sum", 4, *lif_tables, threshold_code(0.5, grid)),
        MaxPool("pool", "lif", 3, 1, 1),
        Conv("c", "pool", np.ones((2, 2, 1, 1), np.int8), 4),
        bn("c.bn", "c", 1, 65536),
        Requantize("codes", "c.bn", 4, 5),
        Flatten("flat", "codes"),
        Readout("out", "flat", np.ones((3, 2 * 4 * 5), np.int8), 8, np.zeros(3, np.int64)),
    )
    workload = from_network(IntegerNetwork(nodes, InputSpec(1, 4, 5), timesteps, grid))
    a, b, c, out = workload.layers
    assert [layer.feeders for layer in workload.layers] == [(), (), ("a", "b"), ("c",)]
    assert [layer.steps for layer in workload.layers] == [1, 1, 3, 1]
    # per channel: a multiplier of 16 or 32 bits, an offset as wide as the product (32 here), a shift of 5
    assert [layer.bn_bits for layer in (a, b, c)] == [2 * (16 + 32 + 5), 2 * (32 + 32 + 5), 2 * (32 + 32 + 5)]
    assert (out.bn, out.bn_bits, out.bn_entry_bits) == ("", 3 * 32, 0)
    assert (out.low, out.high, out.planes) == (-15 * timesteps, 15 * timesteps, 7)
    assert [(op.kind, op.steps, op.window) for op in workload.stream_ops] == [
        ("add", 1, 1),
        ("maxpool", 3, 9),
        ("requantize", 3, 1),
    ]
    assert workload.input_table_bits == 256 * 8


@pytest.mark.parametrize(
    ("low", "high", "planes"),
    [
        *((0, 0, 1), (0, 1, 1), (0, 2, 2), (0, 127, 7), (0, 128, 8), (-1, 0, 1), (-1, 1, 2), (-128, 127, 8)),
        *((-127, 127, 8), (-129, 0, 9), (-2, 1, 2), (-2, 2, 3)),
    ],
)
def test_input_planes(low: int, high: int, planes: int) -> None:
    assert input_planes(low, high) == planes


@pytest.mark.parametrize(
    ("values", "bits"),
    [
        ([], 8),
        ([-128, 127], 8),
        ([128], 16),
        ([-129, 5], 16),
        ([-32768], 16),
        ([5, 32768], 32),
        ([-(2**31)], 32),
        ([2**31], 64),
        ([-(2**63), 2**63 - 1], 64),
    ],
)
def test_the_width_of_a_table(values: list[int], bits: int) -> None:
    assert _entry_bits(np.array(values, np.int64)) == bits


def test_places_and_hops_on_a_small_grid() -> None:
    plan = Floorplan(3, tuple(((0, 1),) for _ in range(7)), ((0, 0), (1, 3), (6, 6)))
    assert [plan.position(tile) for tile in range(7)] == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 0), (2, 0)]
    assert plan.hops(0, ()) == 1
    assert plan.hops(1, (0,)) == 1 + 2
    assert plan.hops(2, (1,)) == 3  # (1, 2) to (2, 0)
    assert plan.hops(2, (0, 1)) == 2  # the nearer of both
    assert plan.hops(0, (0,)) == 1
    assert plan.hops(1, ()) == 2 + 2  # in at the left of tile 0
    mapped = tuple(map_layer(layer, CHIP) for layer in ms_resnet(18, (2, 8, 8), 1).layers)
    needed = len(floorplan(mapped, CHIP).tiles)
    assert len(floorplan(mapped, CHIP.replaced({"tile.limit": needed})).tiles) == needed
    with pytest.raises(ConfigError, match=f"needs {needed} tiles, .* tile.limit = {needed - 1}"):
        floorplan(mapped, CHIP.replaced({"tile.limit": needed - 1}))
    one = floorplan((map_layer(ms_resnet(18, (2, 8, 8), 1).layers[0], CHIP),), CHIP)
    assert (one.columns, one.tiles, one.spans) == (1, (((0, 2),),), ((0, 0),))  # 8-bit weights: 128 columns


# --------------------------------------------------------------------------------------------- ADCs, spikesim, the ANN


@pytest.mark.parametrize("bits", range(1, 13))
@pytest.mark.parametrize("reach", [0, 1, 14, 15, 16, 30, 255, 960, 4095, 5000])
@pytest.mark.parametrize("stored", [True, False])
def test_the_errors_of_one_conversion(bits: int, reach: int, stored: bool) -> None:
    """Against the largest error over every sum that can occur."""
    check = converters.check_adc(reach + 3, 2, reach, bits) if stored else converters.check_adc(reach, 1, None, bits)
    full = 2 * (reach + 3) if stored else reach
    assert (check.full_scale, check.reach, check.bits) == (full, reach, bits)
    assert check.needed_bits == max(1, math.ceil(math.log2(full + 1)))
    assert check.stored_bits == (max(1, math.ceil(math.log2(reach + 1))) if stored else None)
    assert check.enough_bits == max(1, math.ceil(math.log2(reach + 1)))
    assert check.lossless == (reach <= 2**bits - 1)
    sums = np.arange(reach + 1.0)
    clipped = np.abs(converters.convert(sums, reach, bits, "clip") - sums).max()
    assert check.clip_error == clipped == max(0, reach - 2**bits + 1)
    step = reach / (2**bits - 1)
    assert converters.adc_step(reach, bits, "scale") == (step if step > 1 else 1.0)
    assert converters.adc_step(reach, bits, "clip") == 1.0
    want = sums if step <= 1 else step * np.rint(sums / step)
    np.testing.assert_allclose(converters.convert(sums, reach, bits, "scale"), want)
    assert check.round_error == (0.0 if step <= 1 else pytest.approx(step / 2))
    assert converters.adc_keys(bits, "area") == (
        f"adc.area_{min(max(bits, 4), 8)}",
        *(["adc.growth"] if bits > 8 else []),
    )


def test_spikesim_by_hand_on_layers_of_two_kernels() -> None:
    layers = [SpikeSimLayer("a", 3, 65, 100, 90, 25), SpikeSimLayer("b", 65, 7, 90, 50, 9)]
    cost = spikesim_cost(layers, 2, SPIKESIM, slices=3)
    assert [c.crossbars for c in cost.layers] == [2 * 25 * 3, 2 * 9 * 3]
    assert cost.tiles == math.ceil(4 * 3 / 8)
    n = 8
    a_pe = 25 * SPIKESIM["crossbar.area"] + n * (SPIKESIM["adc.area"] + SPIKESIM["mux.area"])
    tile = n * SPIKESIM["diff.area"] + SPIKESIM["tile.temp_area"] + SPIKESIM["tile.buffer_area"]
    assert cost.tile_area == pytest.approx(tile + 8 * a_pe + SPIKESIM["tile.htree_area"], rel=1e-12)
    assert spikesim_cost(layers, 2, SPIKESIM, tile_taps=9).tile_area < cost.tile_area


def grouped(**over: Any) -> Layer:
    base = Layer("g", "conv", 140, 70, 2, (2, 3), 1, 0, (5, 7), (4, 5), 4, 1, 0, 1, 3, (), "affine", 424, 0, None)
    return replace(base, **over)


def test_spikesim_sees_one_group_and_only_kernels_above_1x1() -> None:
    layers = (grouped(), grouped(name="p", kernel=(1, 1)), grouped(name="t", kernel=(2, 1)), grouped(kind="linear"))
    workload = Workload("w", layers, (), (), 3, (140, 5, 7), "events", 0, "")
    seen = spikesim_layers(workload)
    assert [(s.name, s.c_in, s.c_out, s.sites_in, s.sites_out, s.taps) for s in seen] == [
        ("g", 70, 70, 35, 20, 6),
        ("t", 70, 70, 35, 20, 2),
    ]
    none = LayerLoad(*(np.zeros(shape) for shape in (3, (140, 2, 3), (3, 4), (3, 4), 3)))
    events = spikesim_events(grouped(), none, SPIKESIM)
    assert (events.c_in, events.dense_pe_cycles) == (70, 60 * 2 * 2)
    assert (events.active_patch_tiles, events.active_output_tile_sites) == (60 * 2, 60 * 2)
    assert events.active_rows_by_tile == (60 * 64 * 6, 60 * 6 * 6)
    many = spikesim_events(grouped(groups=1, planes=2), none, SPIKESIM)
    assert many.active_rows_by_tile == (60 * 64 * 6, 60 * 64 * 6, 60 * 12 * 6)


@pytest.mark.parametrize("stored", [False, True])
def test_presets_are_ratios_of_two_reports(stored: bool) -> None:
    described = ms_resnet(18, (2, 16, 16), 2)
    workload, load = load_for(*CASES[0], CHIP) if stored else (described, uniform(described, 0.1))
    base = physical_cost(prepare(workload, load, CHIP, Precision("", 5, 5, True)), CHIP).totals
    for name, bits in (("significand24", 24), ("bits32", 32)):
        full = physical_cost(prepare(workload, load, CHIP, Precision("", bits, 32, True)), CHIP).totals
        got = presets(workload, CHIP, load, 5)[name]
        assert got["tops_per_w"] == pytest.approx(full.energy / base.energy)
        assert got["tops_per_mm2"] == pytest.approx(full.area * full.delay / base.area / base.delay)
        assert got["edap"] == pytest.approx(full.edap / base.edap)


def test_sensitivity_by_hand() -> None:
    workload = ms_resnet(18, (2, 16, 16), 2)
    prepared = prepare(workload, uniform(workload, 0.1), CHIP)
    base = physical_cost(prepared, CHIP).totals
    for row in sensitivity(prepared, CHIP):
        for place, factor in enumerate((0.5, 2.0)):
            other = physical_cost(prepared, CHIP.scaled(row.key, factor)).totals
            for name in ("energy", "delay", "area", "edap"):
                assert getattr(row, name)[place] == pytest.approx(getattr(other, name) / getattr(base, name))
        assert row.reach == pytest.approx(max(abs(math.log(ratio)) for ratio in row.edap))


def test_without_spikes_no_energy_is_synaptic() -> None:
    workload = ms_resnet(18, (2, 8, 8), 2)
    dark = physical_cost(prepare(workload, uniform(workload, 0.0), CHIP), CHIP)
    lit = physical_cost(prepare(workload, uniform(workload, 0.1), CHIP), CHIP)
    assert three_energies(dark, CHIP).synaptic == 0.0
    path = ("array", "ADC", "MUX", "shift-add", "offset removal")
    synaptic = sum(entry.value for entry in lit.energy if entry.component in path)
    assert three_energies(lit, CHIP).synaptic == pytest.approx(synaptic)


def test_a_metric_that_vanishes_has_no_end_of_reach() -> None:
    ones = (1.0, 1.0)
    assert Sensitivity("k", ones, ones, ones, (0.0, 1.0)).reach == math.inf
    assert Sensitivity("k", ones, ones, ones, (0.5, 4.0)).reach == math.log(4)


def test_the_ann_beside_it_layer_by_layer() -> None:
    workload = ms_resnet(18, (2, 16, 16), 4, weight_bits=3, membrane_bits=5)
    ann = ann_workload(workload, 3)
    assert ann.timesteps == 1
    for mine, theirs in zip(ann.layers, workload.layers, strict=True):
        many = theirs.planes == 1 or theirs.kind == "readout"
        want = replace(theirs, steps=1, **({"planes": 3, "low": 0, "high": 7} if many else {}))
        assert all(getattr(mine, name) == getattr(want, name) for name in vars(want)), mine.name
    assert {p.bits for p in ann.populations} == {3}
    assert {op.steps for op in ann.stream_ops} == {1}
    three = three_energies(physical_cost(prepare(workload, uniform(workload, 0.1), CHIP), CHIP), CHIP)
    average = Precision("", None, None, True)
    price = physical_cost(prepare(ann, uniform(ann, 0.5), CHIP, average), CHIP).totals.energy
    assert (three.ann, three.ann_bits, three.ann_density) == (pytest.approx(price), 3, 0.5)
    for bits, planes, want in (((2, 5, 3), 1, 5), ((6, 4, 3), 2, 3)):  # the widest that reads spikes, or else the last
        layers = tuple(grouped(name=f"l{n}", bits=b, planes=planes, groups=1) for n, b in enumerate(bits))
        plain = Workload("w", layers, (), (), 3, (140, 5, 7), "events", 0, "")
        cost = physical_cost(prepare(plain, uniform(plain, 0.1), CHIP), CHIP)
        assert three_energies(cost, CHIP).ann_bits == want
