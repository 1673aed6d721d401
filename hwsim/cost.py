"""Energy, latency and area: the models `spikesim` and `physical`.

`spikesim` reproduces SpikeSim's released estimator (commit c2627bc), faults included, for comparison with published
figures. `physical` prices what an exported network does, cell by cell, conversion by conversion and bit by bit, and
keeps a ledger: every entry is a count times a unit cost, with the names of the constants behind it. Formulas and their
reasons: docs/hardware-model.md. Everything is in SI units; metrics are printed in pJ, um2, ns by report.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mdsnn.kernels.errors import ConfigError
from mdsnn.kernels.formats import Array

from .activity import LayerLoad, Load, uniform
from .cells import row_level_sums
from .config import Chip
from .converters import adc_area, adc_energy, adc_keys
from .mapping import Floorplan, Layer, MappedLayer, Workload, floorplan, map_layer

SCHEDULES = ("sequential", "overlapped", "pipelined")


@dataclass(frozen=True)
class Totals:
    """Metrics of one sample.

    energy J, delay s, area m2; ops: dense operations (2*MACs) a sample
    """

    energy: float
    delay: float
    area: float
    ops: float

    @property
    def tops(self) -> float:
        """Dense operations a second, in 1e12."""
        return self.ops / self.delay / 1e12

    @property
    def tops_per_w(self) -> float:
        """Dense operations a joule, in 1e12."""
        return self.ops / self.energy / 1e12

    @property
    def tops_per_mm2(self) -> float:
        """Dense operations a second and mm2, in 1e12."""
        return self.tops / (self.area * 1e6)

    @property
    def edap(self) -> float:
        """Energy*delay*area in mJ*ms*mm2."""
        return self.energy * 1e3 * self.delay * 1e3 * self.area * 1e6


# ------------------------------------------------------------------------------------------------ model: spikesim


@dataclass(frozen=True)
class SpikeSimLayer:
    """A convolution as SpikeSim sees it: channels, input and output positions (H*W), kernel positions (k*k)."""

    name: str
    c_in: int
    c_out: int
    sites_in: int
    sites_out: int
    taps: int = 9


@dataclass(frozen=True)
class SpikeSimLayerCost:
    """PEs, crossbars, energy J, delay s if alone, MACs of one step."""

    layer: SpikeSimLayer
    pes: int
    crossbars: int
    energy: float
    delay: float
    macs: int


@dataclass(frozen=True)
class SpikeSimCost:
    """What the estimator prints, areas m2. pe_area: PEs and subtractors; digital_area: buffers, PEs, input memory."""

    layers: tuple[SpikeSimLayerCost, ...]
    totals: Totals
    pes: int
    crossbars: int
    tiles: int
    tile_area: float
    neuron_memory_area: float
    input_memory_area: float
    pe_area: float
    digital_area: float
    cycle_energy: Mapping[str, float]


def _eighths(chip: Chip) -> float:
    return chip["crossbar.rows"] / 8.0


def spikesim_cycle(chip: Chip, taps: int, slices: int = 1) -> dict[str, float]:
    """Energy of one PE cycle by part, J; e_cycle is the sum.

    e_cycle = Htree + mem_fetch + neuron + (X/8)*(k*k*E_xbar + (X/8)*(E_ADC + E_MUX)) + (X/8)*16*E_Sub + (X/8)*E_Temp
              + E_Tile
    slices multiplies crossbar, ADC and MUX (the precision preset; the estimator knows none).
    Known faults kept: ADC energy grows with X squared; dense, no spikes; the SRAM crossbar's energy is its area.
    """
    n = _eighths(chip)
    return {
        "htree": chip["tile.htree_energy"],
        "fetch": chip["fetch.energy"],
        "neuron": chip["neuron.energy"],
        "crossbar": slices * n * taps * chip["crossbar.energy"],
        "adc": slices * n * n * chip["adc.energy"],
        "mux": slices * n * n * chip["mux.energy"],
        "subtractor": n * 16 * chip["diff.energy"],
        "temp": n * chip["tile.temp_energy"],
        "tile buffer": chip["tile.buffer_energy"],
    }


def spikesim_cost(
    layers: Iterable[SpikeSimLayer], timesteps: int, chip: Chip, *, slices: int = 1, tile_taps: int | None = None
) -> SpikeSimCost:
    """SpikeSim's dense estimate (Moitra et al., TCAD 2023; commit c2627bc). One crossbar size X = crossbar.rows.

        PE_l = ceil(i/X)*ceil(o/X); tiles = ceil(sum PE_l/pe_per_tile); E_l = PE_l*d^2*e_cycle*T
        A_total = tiles*A_tile + sum_l i*d_in^2*bit*22 + sum over the first five layers of o*d^2*bit*22
        latency = t_PE*(T*sum_{l<n} int(0.75*d_l^2*o_l) + T*int(d_n^2*o_n))

    slices     crossbars a weight takes (precision preset): multiplies crossbar, ADC and MUX energy, and PEs before the
               ceil to tiles; the estimator itself has no precision
    tile_taps  k*k of a PE's crossbars in the tile's area; None: the largest of the layers
    Known faults kept: pooled layers use sizes after the pool if the caller gives them so; 1x1, FC and residual adders
    are absent; latency charges a PE cycle for every output neuron, energy one for 64; neuron memory for five layers
    only, 22 bits even for spikes.
    """
    chip.require("spikesim")
    given = tuple(layers)
    if not given:
        raise ConfigError("model spikesim: there is no convolution with a kernel above 1x1 to estimate")
    x, t_pe = chip.integer("crossbar.rows"), chip["clock.pe_cycles"] / chip["clock.frequency"]
    taps = max(layer.taps for layer in given) if tile_taps is None else tile_taps
    costs: list[SpikeSimLayerCost] = []
    cycles = 0
    for place, layer in enumerate(given):
        pes = math.ceil(layer.c_in / x) * math.ceil(layer.c_out / x)
        cycle = sum(spikesim_cycle(chip, layer.taps, slices).values())
        alone = layer.sites_out * layer.c_out
        last = place == len(given) - 1
        cycles += timesteps * (alone if last else int(chip["latency.overlap"] * alone))
        costs.append(
            SpikeSimLayerCost(
                layer,
                pes,
                pes * layer.taps * slices,
                pes * layer.sites_out * cycle * timesteps,
                timesteps * alone * t_pe,
                layer.c_in * layer.c_out * layer.taps * layer.sites_out,
            )
        )
    n = _eighths(chip)
    pes = sum(cost.pes for cost in costs)
    tiles = math.ceil(pes * slices / chip.integer("tile.pes"))
    a_pe = taps * chip["crossbar.area"] + n * (chip["adc.area"] + chip["mux.area"])
    a_pes, a_sub = chip["tile.pes"] * a_pe, n * chip["diff.area"]
    a_buffers = chip["tile.temp_area"] + chip["tile.buffer_area"]
    a_tile = a_sub + a_buffers + a_pes + chip["tile.htree_area"]
    element = chip["memory.bit_area"] * chip["memory.element_bits"]
    a_in = sum(layer.c_in * layer.sites_in for layer in given) * element
    a_neuron = sum(layer.c_out * layer.sites_out for layer in given[:5]) * element
    totals = Totals(
        sum(cost.energy for cost in costs),
        cycles * t_pe,
        tiles * a_tile + a_in + a_neuron,
        float(sum(2 * cost.macs for cost in costs) * timesteps),
    )
    return SpikeSimCost(
        tuple(costs),
        totals,
        pes,
        sum(cost.crossbars for cost in costs),
        tiles,
        a_tile,
        a_neuron,
        a_in,
        tiles * (a_pes + a_sub),
        tiles * (a_buffers + a_pes) + a_in,
        spikesim_cycle(chip, taps, slices),
    )


@dataclass(frozen=True)
class SpikeSimEvents:
    """Event counts of one convolution, as SpikingJelly 2.0.0's `estimate_spikesim_energy` counts them.

    active_patch_tiles         windows x input tiles with a spike
    active_rows_by_tile        driven rows, per input tile
    active_output_tile_sites   output tiles x positions with a spike in the window
    """

    c_in: int
    c_out: int
    taps: int
    dense_pe_cycles: int
    active_patch_tiles: float
    active_rows_by_tile: tuple[float, ...]
    active_output_tile_sites: float


def spikesim_event_energy(events: SpikeSimEvents, chip: Chip) -> dict[str, float]:
    """Event-mode energy of one convolution, J, by part, as SpikingJelly 2.0.0 defines it.

    patch control = Po*patches*(e_cycle without crossbar and neuron)
    crossbar      = Po*sum over input tiles rows*(E_xbar/8)*(padded channels/channels)
    neuron        = Pi*output tile sites*E_neuron                            Pi, Po = input, output tiles
    """
    x = chip.integer("crossbar.rows")
    p_in, p_out = math.ceil(events.c_in / x), math.ceil(events.c_out / x)
    cycle = spikesim_cycle(chip, events.taps)
    control = sum(value for part, value in cycle.items() if part not in ("crossbar", "neuron"))
    crossbar = 0.0
    for place, rows in enumerate(events.active_rows_by_tile):
        channels = min(x, events.c_in - place * x)
        padded = math.ceil(channels / x) * x / channels
        crossbar += rows * (chip["crossbar.energy"] / 8.0) * padded
    return {
        "patch control": p_out * events.active_patch_tiles * control,
        "crossbar": p_out * crossbar,
        "neuron": p_in * events.active_output_tile_sites * chip["neuron.energy"],
    }


def spikesim_events(layer: Layer, counts: LayerLoad, chip: Chip) -> SpikeSimEvents:
    """Event counts of one convolution and sample, from its load; every step counts, also where the exported network
    runs a layer once. Inputs that are no spikes count as dense, as SpikingJelly counts them, and so do
    grouped layers, which it does not know; both of its models see one group's input channels.
    """
    x, per_group = chip.integer("crossbar.rows"), layer.c_in // layer.groups
    tiles = [min(x, per_group - start) for start in range(0, per_group, x)]
    p_in, p_out = len(tiles), math.ceil(layer.c_out / x)
    runs = float(layer.steps * layer.sites)
    if layer.planes > 1 or layer.groups > 1:
        patches, rows = runs * p_in, [runs * channels * layer.taps for channels in tiles]
        sites = runs * p_out
    else:
        driven = counts.rows.sum(axis=(1, 2))
        patches = float(counts.patches.sum())
        rows = [float(driven[start : start + x].sum()) for start in range(0, per_group, x)]
        sites = p_out * float(counts.sites.sum())
    return SpikeSimEvents(per_group, layer.c_out, layer.taps, int(runs) * p_in * p_out, patches, tuple(rows), sites)


def spikesim_layers(workload: Workload) -> tuple[SpikeSimLayer, ...]:
    """The layers SpikeSim would count: convolutions with a kernel above 1x1. 1x1, linear and readout are dropped.

    It knows no groups: a grouped layer counts with the input channels of one group.
    """
    return tuple(
        SpikeSimLayer(
            layer.name,
            layer.c_in // layer.groups,
            layer.c_out,
            layer.size_in[0] * layer.size_in[1],
            layer.sites,
            layer.taps,
        )
        for layer in workload.layers
        if layer.kind == "conv" and layer.taps > 1
    )


# ------------------------------------------------------------------------------------------------ model: physical


@dataclass(frozen=True)
class Precision:
    """Weight and membrane bits to price; None keeps the network's own. `projected`: from shapes and activity only."""

    name: str
    weight_bits: int | None
    membrane_bits: int | None
    projected: bool


OWN = Precision("own", None, None, False)
FP32_SIGNIFICAND24 = Precision("FP32 significand24", 24, 32, True)
FP32_BITS32 = Precision("FP32 bits32", 32, 32, True)
BITS8 = Precision("8 bit", 8, 8, True)
BITS4 = Precision("4 bit", 4, 4, True)
OWN_AVERAGE = Precision("own, mid-range cells", None, None, True)
PRECISIONS = (FP32_SIGNIFICAND24, FP32_BITS32, BITS8, BITS4)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger: `count` times `unit` (J or m2), and the constants it rests on. layer "" is the chip."""

    layer: str
    component: str
    count: float
    unit: float
    keys: tuple[str, ...]

    @property
    def value(self) -> float:
        """count*unit."""
        return self.count * self.unit


@dataclass(frozen=True, eq=False)
class _LayerWork:
    """Counts of one layer that no real-valued constant changes."""

    mapped: MappedLayer
    cell_reads: float
    level_reads: float
    conversions: float
    visit_outputs: float
    read_bits: float
    bn_outputs: float
    bn_read_bits: float
    transfers: float
    transfer_bits: float
    hops: float
    synops: float
    cycles: float


@dataclass(frozen=True, eq=False)
class Prepared:
    """A workload under one precision on one chip's mapping, with everything counted; `physical_cost` prices it."""

    workload: Workload
    precision: Precision
    plan: Floorplan
    layers: tuple[_LayerWork, ...]
    membrane_bits: Mapping[str, int]
    spikes: Mapping[str, float]
    pools: Mapping[str, float]
    table_bits: float
    input_reads: float

    @property
    def mapped(self) -> tuple[MappedLayer, ...]:
        """The layers on their crossbars."""
        return tuple(work.mapped for work in self.layers)

    @property
    def synops(self) -> float:
        """Synaptic operations of a sample: driven rows times fan-out (bit planes counted apart)."""
        return sum(work.synops for work in self.layers)


def prepare(workload: Workload, load: Load, chip: Chip, precision: Precision = OWN) -> Prepared:
    """Map a workload and count what its load makes it do.

    raises  ConfigError  if the load was counted for other crossbar rows or another mapping, or a chip limit is passed
    """
    chip.require("physical")
    rows, scheme = chip.integer("crossbar.rows"), chip.choice("mapping.scheme")
    if (load.rows, load.scheme) != (rows, scheme):
        raise ConfigError(
            f"activity was counted for {load.rows} rows and {load.scheme}, but chip {chip.name} has {rows} rows and "
            f"{scheme}; measure it for this chip"
        )
    mapped = tuple(map_layer(layer, chip, precision.weight_bits) for layer in workload.layers)
    plan = floorplan(mapped, chip)
    places = {layer.name: place for place, layer in enumerate(workload.layers)}
    cell_bits, coding = chip.integer("cell.bits"), chip.choice("mapping.coding")
    middle = ((1 << cell_bits) - 1) / 2
    works: list[_LayerWork] = []
    for place, entry in enumerate(mapped):
        layer, counts = entry.layer, load.layers[entry.layer.name]
        driven, visits = float(counts.rows.sum()), float(counts.visits.sum())
        if layer.codes is not None and not precision.projected:
            sums = row_level_sums_of(layer.codes, layer.groups, entry.bits, cell_bits, coding)
            level_reads = float((counts.rows * sums).sum())
        else:
            level_reads = driven * entry.group_columns * middle
        outputs = layer.c_out // layer.groups
        sites = float(counts.sites.sum()) * layer.c_out
        dense = layer.bn == "dense" and not precision.projected
        works.append(
            _LayerWork(
                entry,
                driven * entry.group_columns * entry.shared,
                level_reads,
                visits * entry.group_columns,
                visits * outputs,
                float((counts.visits * entry.used_rows).sum()),
                0.0 if dense or not layer.bn else sites,
                sites * layer.bn_entry_bits if dense else 0.0,
                float(counts.inputs.sum()) * layer.planes,
                float(layer.values_in * layer.planes * layer.steps),
                float(plan.hops(place, tuple(places[name] for name in layer.feeders))),
                driven * outputs,
                float(layer.steps * layer.sites * layer.planes),
            )
        )
    membranes = {p.name: precision.membrane_bits or p.bits for p in workload.populations}
    first = workload.layers[0]
    return Prepared(
        workload,
        precision,
        plan,
        tuple(works),
        membranes,
        {name: float(counts.sum()) for name, counts in load.spikes.items()},
        load.pools,
        _table_bits(workload, precision),
        float(load.layers[first.name].inputs.sum()) * 8 if workload.input_table_bits else 0.0,
    )


def row_level_sums_of(codes: Array, groups: int, bits: int, cell_bits: int, coding: str) -> Array:
    """`cells.row_level_sums` for grouped weights: (C_out, C_in/groups, kh, kw) to (C_in, kh, kw)."""
    parts = np.split(codes, groups) if groups > 1 else [codes]
    return np.concatenate([row_level_sums(part, bits, cell_bits, coding) for part in parts])


def _table_bits(workload: Workload, precision: Precision) -> float:
    """Bits of all tables: BN, LIF, input, readout bias. FP32: two 32-bit BN constants a channel and no LIF table."""
    total = workload.input_table_bits
    for layer in workload.layers:
        if precision.weight_bits is not None and precision.weight_bits > 8 and layer.bn:
            total += layer.c_out * 64
        elif precision.projected and layer.bn:
            total += layer.c_out * (16 + 32 + 5)
        else:
            total += layer.bn_bits
    for population in workload.populations:
        bits = precision.membrane_bits
        if bits is None or bits == population.bits:
            total += population.table_bits
        elif bits <= 8:
            total += ((1 << bits) - 1) * 16 + ((1 << bits) - 2) * 16
    return float(total)


@dataclass(frozen=True, eq=False)
class PhysicalCost:
    """Energy (without leakage) and area ledgers, per-layer delays, and the totals of each schedule.

    leakage  J, by schedule         delays  s, by layer, each as if alone
    """

    chip: Chip
    prepared: Prepared
    energy: tuple[Entry, ...]
    area: tuple[Entry, ...]
    delays: Mapping[str, float]
    leakage: Mapping[str, Entry]
    schedules: Mapping[str, Totals]

    @property
    def schedule(self) -> str:
        """The schedule behind the headline figures, the chip's latency.schedule."""
        return self.chip.choice("latency.schedule")

    @property
    def totals(self) -> Totals:
        """The headline figures."""
        return self.schedules[self.schedule]

    def energy_entries(self, schedule: str | None = None) -> tuple[Entry, ...]:
        """The energy ledger with the leakage of a schedule (None: the headline one)."""
        return (*self.energy, self.leakage[schedule or self.schedule])


def by_component(entries: Iterable[Entry]) -> dict[str, float]:
    """Sum of a ledger by component, in the order of first appearance."""
    sums: dict[str, float] = {}
    for entry in entries:
        sums[entry.component] = sums.get(entry.component, 0.0) + entry.value
    return sums


def by_layer(entries: Iterable[Entry]) -> dict[str, float]:
    """Sum of a ledger by layer; "" is what belongs to no layer."""
    sums: dict[str, float] = {}
    for entry in entries:
        sums[entry.layer] = sums.get(entry.layer, 0.0) + entry.value
    return sums


def weak_share(entries: Iterable[Entry], chip: Chip, *, unsourced_only: bool = False) -> float:
    """Share of a ledger's value, 0..1, in entries that rest on a low-confidence or unsourced constant."""
    total = weak = 0.0
    for entry in entries:
        total += entry.value
        constants = [chip.constants[key] for key in entry.keys]
        if any(c.unsourced if unsourced_only else c.weak for c in constants):
            weak += entry.value
    return weak / total if total else 0.0


def physical_cost(prepared: Prepared, chip: Chip) -> PhysicalCost:
    """Price a prepared workload. `chip` may differ from the one it was prepared for in real-valued constants only."""
    area = _area_ledger(prepared, chip)
    total_area = sum(entry.value for entry in area)
    energy = _energy_ledger(prepared, chip, total_area)
    spent = sum(entry.value for entry in energy)
    delays = {work.mapped.layer.name: work.cycles * _t_pe(chip) for work in prepared.layers}
    leakage: dict[str, Entry] = {}
    schedules: dict[str, Totals] = {}
    for schedule in SCHEDULES:
        delay = _delay(prepared, delays, schedule, chip["latency.overlap"])
        entry = Entry("", "leakage", delay, chip["leakage.density"] * total_area, ("leakage.density",))
        leakage[schedule] = entry
        schedules[schedule] = Totals(spent + entry.value, delay, total_area, float(prepared.workload.ops))
    return PhysicalCost(chip, prepared, energy, area, delays, leakage, schedules)


def _t_pe(chip: Chip) -> float:
    return chip["clock.pe_cycles"] / chip["clock.frequency"]


def _unit_energies(prepared: Prepared, chip: Chip, area: float) -> dict[str, tuple[str, float, tuple[str, ...]]]:
    """Every unit cost of the energy ledger: what is counted -> (component, J each, the constants it rests on)."""
    read = chip["cell.v_read"] ** 2 * chip["cell.t_read"]
    step = (chip["cell.g_max"] - chip["cell.g_min"]) / ((1 << chip.integer("cell.bits")) - 1)
    adc_bits, bit = chip.integer("adc.bits"), chip["memory.bit_energy"]
    memory = ("memory.bit_energy",)
    update = ("neuron.leak_energy", "neuron.add_energy", "neuron.compare_energy")
    hops = ("noc.fixed_hops",) if chip.choice("noc.distance") == "fixed" else ()
    if chip.choice("noc.mode") == "dense":  # a hop is as long as a tile is wide
        pitch = math.sqrt(area / len(prepared.plan.tiles))
        transport = ("transport", chip["noc.bit_mm_energy"] * pitch, ("noc.bit_mm_energy", *hops))
    else:
        transport = ("transport", chip["noc.hop_energy"], ("noc.hop_energy", *hops))
    return {
        "cell": ("array", read * chip["cell.g_min"], ("cell.v_read", "cell.t_read", "cell.g_min")),
        "level": ("array", read * step, ("cell.v_read", "cell.t_read", "cell.g_min", "cell.g_max")),
        "conversion": ("ADC", adc_energy(chip, adc_bits), adc_keys(adc_bits, "energy")),
        "mux": ("MUX", chip["mux.energy"], ("mux.energy",)),
        "shift-add": ("shift-add", chip["digital.shift_add_energy"], ("digital.shift_add_energy",)),
        "offset": ("offset removal", chip["diff.energy"], ("diff.energy",)),
        "spike bit": ("spike memory", bit, memory),
        "bn": ("BN", chip["digital.bn_energy"], ("digital.bn_energy",)),
        "bn bit": ("BN", bit, memory),
        "hop": transport,
        "input bit": ("input table", bit, memory),
        "update": ("neuron", sum(chip[key] for key in update), update),
        "reset": ("neuron", chip["neuron.reset_energy"], ("neuron.reset_energy",)),
        "add": ("neuron", chip["digital.add_energy"], ("digital.add_energy",)),
        "pool": ("pool", chip["digital.add_energy"], ("digital.add_energy",)),
        "state bit": ("membrane memory", bit, memory),
    }


def _energy_ledger(prepared: Prepared, chip: Chip, area: float) -> tuple[Entry, ...]:
    units = _unit_energies(prepared, chip, area)
    fixed = chip["noc.fixed_hops"] if chip.choice("noc.distance") == "fixed" else None
    dense = chip.choice("noc.mode") == "dense"
    entries: list[Entry] = []

    def add(layer: str, what: str, count: float) -> None:
        if count:
            component, unit, keys = units[what]
            entries.append(Entry(layer, component, count, unit, keys))

    for work in prepared.layers:
        name = work.mapped.layer.name
        add(name, "cell", work.cell_reads)
        add(name, "level", work.level_reads)
        for what in ("conversion", "mux", "shift-add"):
            add(name, what, work.conversions)
        add(name, "offset", work.visit_outputs)
        add(name, "spike bit", work.read_bits)
        add(name, "bn", work.bn_outputs)
        add(name, "bn bit", work.bn_read_bits)
        sent = work.transfer_bits if dense else work.transfers
        add(name, "hop", sent * (work.hops if fixed is None else fixed))
    workload = prepared.workload
    add("", "input bit", prepared.input_reads)
    for population in workload.populations:
        name, bits = population.name, prepared.membrane_bits[population.name]
        updates = float(workload.timesteps * population.neurons)
        add(name, "update", updates * bits / 8)
        add(name, "reset", prepared.spikes[name])
        add(name, "state bit", 2 * updates * bits)
    for op in workload.stream_ops:
        runs = float(op.elements * op.steps)
        if op.kind in ("add", "requantize"):
            add(op.name, "add", runs)
        else:  # every spike is counted into each window that holds it
            add(op.name, "pool", prepared.pools[op.name] * op.window * op.elements / op.values_in)
        add(op.name, "state bit", 2 * runs * op.stored_bits)
    return tuple(entries)


def _area_ledger(prepared: Prepared, chip: Chip) -> tuple[Entry, ...]:
    tiles = float(len(prepared.plan.tiles))
    crossbars = tiles * chip["tile.pes"] * chip["tile.crossbars_per_pe"]
    cells = crossbars * chip["crossbar.rows"] * chip["crossbar.columns"]
    converters = crossbars * chip["crossbar.columns"] / chip["adc.share"]
    adc_bits = chip.integer("adc.bits")
    bit, bit_key = chip["memory.bit_area"], ("memory.bit_area",)
    workload = prepared.workload
    membranes = float(sum(p.neurons * prepared.membrane_bits[p.name] for p in workload.populations))
    spikes = float(sum(p.neurons for p in workload.populations))
    streams = float(sum(op.elements * op.stored_bits for op in workload.stream_ops))
    f2 = chip["cell.feature"] ** 2
    return tuple(
        Entry("", component, count, unit, keys)
        for component, count, unit, keys in (
            ("crossbars", cells, chip["cell.area_f2"] * f2, ("cell.area_f2", "cell.feature")),
            ("ADC", converters, adc_area(chip, adc_bits), adc_keys(adc_bits, "area")),
            ("MUX", converters, chip["mux.area"], ("mux.area",)),
            ("subtractors", tiles * chip["crossbar.columns"] / chip["adc.share"], chip["diff.area"], ("diff.area",)),
            ("buffers", tiles, chip["tile.buffer_area"], ("tile.buffer_area",)),
            ("buffers", tiles, chip["tile.temp_area"], ("tile.temp_area",)),
            ("interconnect", tiles, chip["tile.htree_area"], ("tile.htree_area",)),
            ("membrane memory", membranes, bit, bit_key),
            ("spike memory", spikes, bit, bit_key),
            ("stream memory", streams, bit, bit_key),
            ("tables", prepared.table_bits, bit, bit_key),
        )
    )


def _delay(prepared: Prepared, delays: Mapping[str, float], schedule: str, overlap: float) -> float:
    """Time of one sample, s.

    sequential   the sum of the layers
    overlapped   a layer starts when its feeders are `overlap` done, and ends no sooner than they do
    pipelined    layers hand on step by step: the slowest layer, and one step of every other on the way to its end
    """
    if schedule == "sequential":
        return sum(delays.values())
    if schedule == "overlapped":
        starts: dict[str, float] = {}
        ends: dict[str, float] = {}
        for work in prepared.layers:
            layer = work.mapped.layer
            begin = max((starts[f] + overlap * delays[f] for f in layer.feeders), default=0.0)
            starts[layer.name] = begin
            ends[layer.name] = max([begin + delays[layer.name], *(ends[f] for f in layer.feeders)])
        return max(ends.values())
    fill = {
        work.mapped.layer.name: delays[work.mapped.layer.name] / work.mapped.layer.steps for work in prepared.layers
    }
    slowest = max(delays, key=lambda name: delays[name])
    return delays[slowest] + sum(fill.values()) - fill[slowest]


PRESET_CELL_BITS = 4
"""Bits of a cell in the spikesim recipe of `presets`; the estimator itself knows no bits."""


def presets(
    workload: Workload, chip: Chip, load: Load | None = None, base_bits: int = 4
) -> dict[str, dict[str, float]]:
    """Ratios FP32 to `base_bits` under both presets: TOPS/W, TOPS/mm2 and EDAP, higher is better for the low precision.

    With `load` None the spikesim recipe on the chip's constants: slices multiply crossbar, ADC and MUX inside the PE
    cycle; area is tiles*A_tile only, with PEs multiplied before the ceil; delay unchanged. With a load the physical
    model.
    """
    result: dict[str, dict[str, float]] = {}
    for name, bits in (("significand24", 24), ("bits32", 32)):
        if load is None:
            chip.require("spikesim")
            layers = spikesim_layers(workload)
            low, high = (
                spikesim_cost(layers, workload.timesteps, chip, slices=-(-b // PRESET_CELL_BITS))
                for b in (base_bits, bits)
            )
            energy = high.totals.energy / low.totals.energy
            area = high.tiles / low.tiles
            delay = 1.0
        else:
            base = Precision(f"{base_bits} bit", base_bits, base_bits, True)
            full = FP32_SIGNIFICAND24 if bits == 24 else FP32_BITS32
            small, big = (physical_cost(prepare(workload, load, chip, p), chip).totals for p in (base, full))
            energy, area, delay = big.energy / small.energy, big.area / small.area, big.delay / small.delay
        result[name] = {"tops_per_w": energy, "tops_per_mm2": area * delay, "edap": energy * area * delay}
    return result


PAPER_FIG3 = {"tops_per_w": 2.64, "tops_per_mm2": 6.19, "edap": 14.85}
"""MD-SNN Fig. 3, 4 bit against FP32 on N-Caltech101. 2.64*6.19 = 16.34, not 14.85: the three do not agree."""


# ----------------------------------------------------------------------------------- sensitivity, and the ANN beside it


@dataclass(frozen=True)
class Sensitivity:
    """What doubling and halving one constant does: ratios to the headline figures, (halved, doubled)."""

    key: str
    energy: tuple[float, float]
    delay: tuple[float, float]
    area: tuple[float, float]
    edap: tuple[float, float]

    @property
    def reach(self) -> float:
        """Largest |log| of the EDAP ratio."""
        return max(abs(math.log(ratio)) if ratio > 0 else math.inf for ratio in self.edap)


def sensitivity(prepared: Prepared, chip: Chip) -> tuple[Sensitivity, ...]:
    """Every real-valued constant halved and doubled alone, ordered by its reach on EDAP, less those without effect."""
    base = physical_cost(prepared, chip).totals
    results: list[Sensitivity] = []
    for key in chip.scalable("physical"):
        low, high = (physical_cost(prepared, chip.scaled(key, factor)).totals for factor in (0.5, 2.0))
        entry = Sensitivity(
            key,
            (low.energy / base.energy, high.energy / base.energy),
            (low.delay / base.delay, high.delay / base.delay),
            (low.area / base.area, high.area / base.area),
            (low.edap / base.edap, high.edap / base.edap),
        )
        if entry.reach > 1e-12:
            results.append(entry)
    return tuple(sorted(results, key=lambda entry: (-entry.reach, entry.key)))


CROSSBAR_PATH = ("array", "ADC", "MUX", "shift-add", "offset removal")
"""Components of a synaptic operation."""


def ann_workload(workload: Workload, bits: int) -> Workload:
    """The same layers as an ANN: one step, unsigned activations of `bits`, applied bit by bit and held in memory."""
    layers = tuple(
        replace(layer, steps=1, planes=bits, low=0, high=(1 << bits) - 1)
        if layer.planes == 1 or layer.kind == "readout"
        else replace(layer, steps=1)
        for layer in workload.layers
    )
    populations = tuple(replace(p, bits=bits) for p in workload.populations)
    ops = tuple(replace(op, steps=1) for op in workload.stream_ops)
    return replace(
        workload, name=f"{workload.name} as ANN", layers=layers, populations=populations, stream_ops=ops, timesteps=1
    )


@dataclass(frozen=True)
class ThreeEnergies:
    """J a sample: synaptic operations only; everything; the same network as an ANN of the same bits on the same chip.

    ann_density   share of the ANN's activations that are not 0 (assumed)
    break_even    spike density at which the SNN, under independent spikes, costs what the ANN costs; None if there is
                  none in 0..1, and then `cheaper` says which of the two, "SNN" or "ANN", costs less at every density
    """

    synaptic: float
    full: float
    ann: float
    ann_bits: int
    ann_density: float
    break_even: float | None
    cheaper: str | None


def three_energies(cost: PhysicalCost, chip: Chip, ann_density: float = 0.5) -> ThreeEnergies:
    """Three energies side by side, and where they meet; see ThreeEnergies."""
    workload = cost.prepared.workload
    parts = by_component(cost.energy)
    bits = max((layer.bits for layer in workload.layers if layer.planes == 1), default=workload.layers[-1].bits)
    rows, scheme = chip.integer("crossbar.rows"), chip.choice("mapping.scheme")

    def energy(subject: Workload, density: float) -> float:
        load = uniform(subject, density, rows=rows, scheme=scheme)
        return physical_cost(prepare(subject, load, chip, OWN_AVERAGE), chip).totals.energy

    ann = energy(ann_workload(workload, bits), ann_density)
    low, high = 1e-6, 1.0  # not 0: at density 0 even the image would be dark
    found: float | None = None
    cheaper: str | None = None
    if energy(workload, high) < ann:
        cheaper = "SNN"
    elif energy(workload, low) > ann:
        cheaper = "ANN"
    else:
        for _ in range(14):
            middle = (low + high) / 2
            low, high = (middle, high) if energy(workload, middle) < ann else (low, middle)
        found = (low + high) / 2
    return ThreeEnergies(
        sum(parts.get(part, 0.0) for part in CROSSBAR_PATH), cost.totals.energy, ann, bits, ann_density, found, cheaper
    )
