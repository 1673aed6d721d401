"""The report: everything an engineer needs to audit a figure, as a dict, HTML, CSV or 25 lines of text.

`build_report` computes, the rest only prints. Output is a function of its arguments: no clock, no paths, no randomness.
The dict's layout is `mdsnn.report/1`, described in docs/hardware-model.md.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Final

from mdsnn.kernels.errors import ConfigError, MissingError
from mdsnn.kernels.network import IntegerNetwork

from .activity import Activity, Load, load_of
from .config import KEYS, Chip, load_chip
from .converters import AdcCheck, lossless_bits
from .cost import (
    OWN,
    PAPER_FIG3,
    PRECISIONS,
    PRESET_CELL_BITS,
    SCHEDULES,
    PhysicalCost,
    Precision,
    Totals,
    by_component,
    by_layer,
    physical_cost,
    prepare,
    presets,
    sensitivity,
    spikesim_cost,
    spikesim_event_energy,
    spikesim_events,
    spikesim_layers,
    three_energies,
    weak_share,
)
from .crossbar import AdcAccuracy, lossless_check
from .mapping import Floorplan, MappedLayer, Workload, from_network, ms_resnet

SCHEMA: Final = "mdsnn.report/1"

INCONSISTENCY: Final = (
    "The paper's three ratios do not agree with each other: 2.64 x 6.19 = 16.34, not 14.85. Its setting is "
    "unpublished; the presets are one plausible reading among several, and no more is claimed."
)
NOT_MODELLED: Final = (
    "row drivers, decoders and write circuits; programming energy and endurance",
    "off-chip memory and the sensor interface",
    "routers between tiles in area (their energy is in transport)",
    "noise and drift; IR drop, variation and stuck cells reach accuracy (analog_accuracy), not energy or latency",
    "power gating: all silicon leaks for as long as a sample takes",
)
PROJECTED: Final = (
    "Projected precisions take the shapes and the activity of this network and hold every cell at mid-range; no "
    "network of that precision was run."
)


@dataclass(frozen=True)
class Report:
    """A finished report; every field is plain data (dict, list, str, number, bool, None). Energies uJ, ms, mm2."""

    title: str
    network: dict[str, Any]
    chip: dict[str, Any]
    activity: dict[str, Any]
    totals: dict[str, Any]
    schedules: list[dict[str, Any]]
    energy: list[dict[str, Any]]
    area: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    populations: list[dict[str, Any]]
    floorplan: dict[str, Any] | None
    precisions: list[dict[str, Any]]
    paper: dict[str, Any]
    adc: dict[str, Any]
    energies: dict[str, Any] | None
    shares: list[dict[str, Any]]
    sensitivity: list[dict[str, Any]]
    ledger: list[dict[str, Any]]
    constants: list[dict[str, Any]]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict of layout `mdsnn.report/1`."""
        return {"schema": SCHEMA, **asdict(self)}

    def to_json(self) -> str:
        """The dict as JSON, keys in the order of the layout, a newline at the end."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def build_report(
    subject: IntegerNetwork | Workload,
    activity: Activity | Load,
    chip: Chip | str = "fefet32",
    *,
    model: str | None = None,
    title: str | None = None,
    precisions: Sequence[Precision] = PRECISIONS,
    compare: Sequence[tuple[str, IntegerNetwork, Activity]] = (),
    adc: Sequence[AdcAccuracy] = (),
) -> Report:
    """Compute the report of one network on one chip.

    subject     an exported network, or a built-in workload (mapping.ms_resnet)
    activity    measured on that network (activity.measure, load_activity), or activity.uniform(workload, density)
    chip        a Chip, or a name or path for config.load_chip
    model       "spikesim" or "physical"; None: the one the chip names
    precisions  projections to set beside the network's own
    compare     real networks of other precisions, as (label, network, its activity)
    adc         accuracies under ADCs, from crossbar.adc_accuracy
    raises      ConfigError  for activity of another network or another mapping, or a chip without the model's constants
    """
    the_chip = load_chip(chip) if isinstance(chip, str) else chip
    chosen = model or the_chip.model
    the_chip.require(chosen)
    workload = subject if isinstance(subject, Workload) else from_network(subject)
    load = activity if isinstance(activity, Load) else load_of(activity, workload)
    if set(load.layers) != {layer.name for layer in workload.layers}:
        raise ConfigError(f"the load's layers are not those of workload {workload.name}; make it for this workload")
    if chosen == "spikesim":
        return _spikesim_report(workload, load, the_chip, title)
    return _physical_report(workload, load, the_chip, title, precisions, compare, adc)


# ------------------------------------------------------------------------------------------------ parts of a report


def _totals(totals: Totals) -> dict[str, Any]:
    return {
        "energy_uJ": totals.energy * 1e6,
        "latency_ms": totals.delay * 1e3,
        "area_mm2": totals.area * 1e6,
        "TOPS": totals.tops,
        "TOPS_per_W": totals.tops_per_w,
        "TOPS_per_mm2": totals.tops_per_mm2,
        "EDAP_mJ_ms_mm2": totals.edap,
        "ops": totals.ops,
    }


def _network(workload: Workload) -> dict[str, Any]:
    return {
        "name": workload.name,
        "digest": workload.digest,
        "timesteps": workload.timesteps,
        "input": list(workload.input_shape),
        "coding": workload.coding,
        "layers": len(workload.layers),
        "neurons": sum(p.neurons for p in workload.populations),
        "weights": sum(x.c_out * (x.c_in // x.groups) * x.taps for x in workload.layers),
        "weight_bits": sorted({layer.bits for layer in workload.layers}),
        "membrane_bits": sorted({p.bits for p in workload.populations}),
    }


def _populations(workload: Workload, load: Load) -> list[dict[str, Any]]:
    return [
        {
            "name": p.name,
            "neurons": p.neurons,
            "bits": p.bits,
            "density": float(load.spikes[p.name].mean()) / p.neurons,
            "spikes_by_step": [float(v) for v in load.spikes[p.name]],
        }
        for p in workload.populations
    ]


def _activity(workload: Workload, load: Load) -> dict[str, Any]:
    neuron_steps = sum(p.neurons for p in workload.populations) * workload.timesteps
    spikes = sum(float(counts.sum()) for counts in load.spikes.values())
    return {
        "source": load.source,
        "measured": load.measured,
        "samples": load.samples,
        "spikes": spikes,
        "density": spikes / neuron_steps if neuron_steps else 0.0,
    }


def _constants(chip: Chip, model: str) -> list[dict[str, Any]]:
    return [
        {
            "key": key,
            "meaning": KEYS[key].meaning,
            "value": c.given,
            "unit": c.unit,
            "source": c.source,
            "confidence": c.confidence,
            "chip": c.chip,
            "unsourced": c.unsourced,
        }
        for key, c in sorted(chip.constants.items())
        if model in KEYS[key].models
    ]


def _breakdown(parts: Mapping[str, float], name: str, scale: float) -> list[dict[str, Any]]:
    total = sum(parts.values())
    rows = [
        {"component": part, name: value * scale, "share": value / total if total else 0.0}
        for part, value in parts.items()
    ]
    return sorted(rows, key=lambda row: (-float(str(row[name])), str(row["component"])))


@functools.cache
def _paper_workload() -> Workload:
    return ms_resnet(18, (2, 48, 48), 10)


@functools.cache
def _paper_rows_spikesim65() -> tuple[tuple[str, dict[str, float]], ...]:
    return tuple(presets(_paper_workload(), load_chip("spikesim65")).items())


def _paper(chip: Chip, model: str) -> dict[str, Any]:
    """The paper's Fig. 3 beside both presets, on ResNet-18, 2x48x48, T = 10."""
    from .activity import uniform

    rows = [{"model": "MD-SNN Fig. 3", "chip": "unpublished setting", "preset": "", **PAPER_FIG3}]
    rows += [
        {"model": "spikesim", "chip": "spikesim65", "preset": name, **ratios}
        for name, ratios in _paper_rows_spikesim65()
    ]
    if chip.name != "spikesim65" and not [
        k for k, e in KEYS.items() if "spikesim" in e.models and k not in chip.constants
    ]:
        rows += [
            {"model": "spikesim", "chip": chip.name, "preset": name, **ratios}
            for name, ratios in presets(_paper_workload(), chip).items()
        ]
    if model == "physical":
        workload = _paper_workload()
        load = uniform(workload, 0.1, rows=chip.integer("crossbar.rows"), scheme=chip.choice("mapping.scheme"))
        rows += [
            {"model": "physical, density 0.1", "chip": chip.name, "preset": name, **ratios}
            for name, ratios in presets(workload, chip, load).items()
        ]
    return {
        "workload": "ResNet-18, 2x48x48, T = 10, FP32 against 4 bit",
        "rows": rows,
        "product": PAPER_FIG3["tops_per_w"] * PAPER_FIG3["tops_per_mm2"],
        "inconsistency": INCONSISTENCY,
    }


def _floorplan(plan: Floorplan, mapped: Sequence[MappedLayer], chip: Chip) -> dict[str, Any]:
    pes, per_pe = chip.integer("tile.pes"), chip.integer("tile.crossbars_per_pe")
    tiles = []
    for number, held in enumerate(plan.tiles):
        used = 0.0
        for index, count in held:
            entry = mapped[index]
            used += count / entry.pes * entry.crossbars / (pes * per_pe) * entry.utilisation
        row, column = plan.position(number)
        tiles.append(
            {
                "row": row,
                "column": column,
                "layers": [[mapped[index].layer.name, count] for index, count in held],
                "utilisation": used,
            }
        )
    return {"columns": plan.columns, "tiles": tiles}


def _physical_report(
    workload: Workload,
    load: Load,
    chip: Chip,
    title: str | None,
    precisions: Sequence[Precision],
    compare: Sequence[tuple[str, IntegerNetwork, Activity]],
    adc: Sequence[AdcAccuracy],
) -> Report:
    prepared = prepare(workload, load, chip, OWN)
    cost = physical_cost(prepared, chip)
    entries = cost.energy_entries()
    per_layer = by_layer(entries)
    checks = lossless_check(workload, chip)
    total = cost.totals.energy
    layers = []
    for work in prepared.layers:
        mapped, layer = work.mapped, work.mapped.layer
        counts, check = load.layers[layer.name], checks[layer.name]
        layers.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "shape": f"{layer.c_in}x{layer.size_in[0]}x{layer.size_in[1]} > "
                f"{layer.c_out}x{layer.size_out[0]}x{layer.size_out[1]}",
                "kernel": f"{layer.kernel[0]}x{layer.kernel[1]}/{layer.stride}"
                + (f" g{layer.groups}" if layer.groups > 1 else ""),
                "bits": mapped.bits,
                "planes": layer.planes,
                "steps": layer.steps,
                "crossbars": mapped.crossbars,
                "pes": mapped.pes,
                "utilisation": mapped.utilisation,
                "input_density": float(counts.inputs.sum()) / (layer.values_in * layer.steps),
                "macs": layer.macs * layer.steps,
                "synops": work.synops,
                "energy_uJ": per_layer.get(layer.name, 0.0) * 1e6,
                "share": per_layer.get(layer.name, 0.0) / total,
                "latency_ms": cost.delays[layer.name] * 1e3,
                "adc_bits_needed": check.needed_bits,
                "adc_bits_stored": check.stored_bits,
            }
        )
    energies = three_energies(cost, chip)
    beside = _precisions(workload, load, chip, cost, checks, precisions, compare)
    return Report(
        title or f"{workload.name} on {chip.name}",
        _network(workload),
        {"name": chip.name, "model": "physical", "description": chip.description},
        _activity(workload, load),
        {
            **_totals(cost.totals),
            "schedule": cost.schedule,
            "synops": prepared.synops,
            "tiles": len(prepared.plan.tiles),
            "crossbars": sum(m.crossbars for m in prepared.mapped),
            "utilisation": _mean_utilisation(prepared.mapped),
        },
        [{"schedule": name, **_totals(cost.schedules[name])} for name in SCHEDULES],
        _breakdown(by_component(entries), "energy_uJ", 1e6),
        _breakdown(by_component(cost.area), "area_mm2", 1e6),
        layers,
        _populations(workload, load),
        _floorplan(prepared.plan, prepared.mapped, chip),
        beside,
        _paper(chip, "physical"),
        _adc(checks, chip, "physical", adc),
        {
            "synaptic_uJ": energies.synaptic * 1e6,
            "full_uJ": energies.full * 1e6,
            "ann_uJ": energies.ann * 1e6,
            "ann_bits": energies.ann_bits,
            "ann_density": energies.ann_density,
            "break_even_density": energies.break_even,
            "cheaper_at_every_density": energies.cheaper,
            "density": _activity(workload, load)["density"],
        },
        _shares(cost, chip),
        [asdict(entry) | {"reach": entry.reach} for entry in sensitivity(prepared, chip)],
        [
            {
                "metric": metric,
                "layer": e.layer,
                "component": e.component,
                "count": e.count,
                f"unit_{unit}": e.unit * scale,
                "constants": list(e.keys),
            }
            for metric, unit, scale, ledger in (("energy", "pJ", 1e12, entries), ("area", "um2", 1e12, cost.area))
            for e in ledger
        ],
        _constants(chip, "physical"),
        [PROJECTED, *unlike_activity(beside), *(f"not modelled: {what}" for what in NOT_MODELLED)],
    )


def _mean_utilisation(mapped: Sequence[MappedLayer]) -> float:
    crossbars = sum(m.crossbars for m in mapped)
    return sum(m.utilisation * m.crossbars for m in mapped) / crossbars


def _precisions(
    workload: Workload,
    load: Load,
    chip: Chip,
    own: PhysicalCost,
    checks: Mapping[str, AdcCheck],
    precisions: Sequence[Precision],
    compare: Sequence[tuple[str, IntegerNetwork, Activity]],
) -> list[dict[str, Any]]:
    weights = "/".join(f"W{bits}" for bits in sorted({layer.bits for layer in workload.layers}))
    membranes = "/".join(f"U{bits}" for bits in sorted({p.bits for p in workload.populations}))
    rows = [(f"this network ({weights} {membranes})", "own", load.source, own)]
    needed = max(c.enough_bits for c in checks.values())
    if chip.integer("adc.bits") < needed <= 12:
        lossless = chip.replaced({"adc.bits": needed})
        cost = physical_cost(own.prepared, lossless)
        rows.append((f"this network, lossless {needed}-bit ADC", "own", load.source, cost))
    for label, network, activity in compare:
        other = from_network(network, label)
        theirs = load_of(activity, other)
        rows.append((label, "measured", theirs.source, physical_cost(prepare(other, theirs, chip, OWN), chip)))
    for precision in precisions:
        cost = physical_cost(prepare(workload, load, chip, precision), chip)
        rows.append((precision.name, "projected", load.source, cost))
    base = own.totals
    return [
        {
            "name": name,
            "basis": basis,
            "activity": source,
            "tiles": len(cost.prepared.plan.tiles),
            **_totals(cost.totals),
            "energy_ratio": cost.totals.energy / base.energy,
            "area_ratio": cost.totals.area / base.area,
            "EDAP_ratio": cost.totals.edap / base.edap,
        }
        for name, basis, source, cost in rows
    ]


def unlike_activity(precisions: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note for every compared network whose spikes are of other samples than this network's."""
    own = precisions[0]["activity"] if precisions else ""
    return [
        f"{row['name']} was measured on {row['activity']}, this network on {own}: the two do not compare like for like"
        for row in precisions
        if row["activity"] != own
    ]


def _adc(checks: Mapping[str, AdcCheck], chip: Chip, model: str, measured: Sequence[AdcAccuracy]) -> dict[str, Any]:
    rows, top = chip.integer("crossbar.rows"), (1 << chip.integer("cell.bits")) - 1
    worst = max(checks.values(), key=lambda c: c.reach)
    layers = [{"name": name, "lossless": c.lossless, **asdict(c)} for name, c in checks.items()]
    bits, full = worst.bits, rows * top
    lossless = None if bits is None else all(c.lossless for c in checks.values())
    reached = (
        f"a column of this network reaches {worst.reach} levels, which needs {worst.enough_bits} bits (any codes: "
        f"{rows} rows x {top} levels = {full}, {lossless_bits(full)} bits)"
    )
    if lossless is None:
        verdict = f"A lossless ADC needs {worst.enough_bits} bits, but chip {chip.name} states none: {reached}."
    elif lossless:
        verdict = f"The {bits}-bit ADC is lossless for every column of this network."
    else:
        verdict = f"The {bits}-bit ADC is NOT lossless: {reached}. The integer engine's accuracy does not hold on it."
    return {
        "bits": bits,
        "lossless": lossless,
        "verdict": verdict,
        "assumed": None if model == "physical" else _ADC_ASSUMED,
        "full_crossbar_bits": lossless_bits(full),
        "layers": layers,
        "accuracy": [asdict(entry) for entry in measured],
    }


def _shares(cost: PhysicalCost, chip: Chip) -> list[dict[str, Any]]:
    """Share of each metric resting on weak constants; products combine as 1 - product of the sound parts."""
    entries = cost.energy_entries()
    clock = [chip.constants[key] for key in ("clock.frequency", "clock.pe_cycles")]
    rows = []
    for unsourced in (False, True):
        e = weak_share(entries, chip, unsourced_only=unsourced)
        a = weak_share(cost.area, chip, unsourced_only=unsourced)
        d = 1.0 if any(c.unsourced if unsourced else c.weak for c in clock) else 0.0
        rows.append([e, d, a, d, e, 1 - (1 - d) * (1 - a), 1 - (1 - e) * (1 - d) * (1 - a)])
    names = ("energy", "latency", "area", "TOPS", "TOPS_per_W", "TOPS_per_mm2", "EDAP")
    return [
        {"metric": name, "low_confidence_or_unsourced": weak, "unsourced": bare}
        for name, weak, bare in zip(names, *rows, strict=True)
    ]


_ADC_ASSUMED: Final = (
    "Model spikesim itself knows no bits and ignores this check: cells are 4 bits wide, coding is offset and every "
    "crossbar has ADCs of its own unless the chip says otherwise, as in the precision presets."
)


def _spikesim_checks(workload: Workload, chip: Chip) -> tuple[dict[str, AdcCheck], Chip]:
    """The lossless check on cells that the model does not know, and the chip with what is assumed about them."""
    assumed: dict[str, int | str] = {
        "cell.bits": PRESET_CELL_BITS,
        "mapping.coding": "offset",
        "mapping.scheme": "kernel-split",
    }
    filled = chip.replaced({key: value for key, value in assumed.items() if key not in chip.constants})
    return lossless_check(workload, filled), filled


def _spikesim_report(workload: Workload, load: Load, chip: Chip, title: str | None) -> Report:
    cost = spikesim_cost(spikesim_layers(workload), workload.timesteps, chip)
    counted = {c.layer.name: c for c in cost.layers}
    by_name = {layer.name: layer for layer in workload.layers}
    cycles = {name: c.pes * c.layer.sites_out * workload.timesteps for name, c in counted.items()}
    energy: dict[str, float] = {}
    rows = []
    fits = (load.rows, load.scheme) == (chip.integer("crossbar.rows"), "kernel-split")
    checks, filled = _spikesim_checks(workload, chip)
    for name, entry in counted.items():
        cycle = _cycle(chip, entry.layer.taps)
        for part, value in cycle.items():
            energy[part] = energy.get(part, 0.0) + value * cycles[name]
        layer, counts = by_name[name], load.layers[name]
        event = sum(spikesim_event_energy(spikesim_events(layer, counts, chip), chip).values()) if fits else None
        rows.append(
            {
                "name": name,
                "kind": "conv",
                "shape": f"{layer.c_in}x{layer.size_in[0]}x{layer.size_in[1]} > "
                f"{layer.c_out}x{layer.size_out[0]}x{layer.size_out[1]}",
                "kernel": f"{layer.kernel[0]}x{layer.kernel[1]}/{layer.stride}",
                "crossbars": entry.crossbars,
                "pes": entry.pes,
                "input_density": float(counts.inputs.sum()) / (layer.values_in * layer.steps),
                "macs": entry.macs * workload.timesteps,
                "energy_uJ": entry.energy * 1e6,
                "share": entry.energy / cost.totals.energy,
                "event_energy_uJ": None if event is None else event * 1e6,
                "latency_ms": entry.delay * 1e3,
                "adc_bits_needed": checks[name].needed_bits,
                "adc_bits_stored": checks[name].stored_bits,
            }
        )
    tiles = cost.tiles
    area = {
        "input memory": cost.input_memory_area,
        "neuron memory": cost.neuron_memory_area,
        "interconnect": tiles * chip["tile.htree_area"],
        "PEs and subtractors": cost.pe_area,
        "buffers": tiles * (chip["tile.buffer_area"] + chip["tile.temp_area"]),
    }
    events = [row["event_energy_uJ"] for row in rows]
    return Report(
        title or f"{workload.name} on {chip.name}, model spikesim",
        _network(workload),
        {"name": chip.name, "model": "spikesim", "description": chip.description},
        _activity(workload, load),
        {
            **_totals(cost.totals),
            "schedule": "overlapped",
            "event_energy_uJ": sum(e for e in events if e is not None) if fits else None,
            "tiles": tiles,
            "pes": cost.pes,
            "crossbars": cost.crossbars,
        },
        [{"schedule": "overlapped", **_totals(cost.totals)}],
        _breakdown(energy, "energy_uJ", 1e6),
        _breakdown(area, "area_mm2", 1e6),
        rows,
        _populations(workload, load),
        None,
        [],
        _paper(chip, "spikesim"),
        _adc(checks, filled, "spikesim", ()),
        None,
        [],
        [],
        [],
        _constants(chip, "spikesim"),
        [
            "Model spikesim reproduces the released estimator, faults included: no precision; 1x1, FC and residual "
            "adders absent; latency charges a PE cycle an output neuron; neuron memory of the first five layers only; "
            "dense (event energy beside it).",
        ],
    )


def _cycle(chip: Chip, taps: int) -> dict[str, float]:
    from .cost import spikesim_cycle

    return spikesim_cycle(chip, taps)


# ---------------------------------------------------------------------------------------------------------- printing


def number(value: float, digits: int = 3) -> str:
    """A number for people: `digits` significant digits, thousands grouped, powers of ten where it is tiny or huge."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    size = math.floor(math.log10(abs(value)))
    if -4 <= size < 9:
        rounded = round(value, digits - 1 - size)
        return f"{rounded:,.{max(0, digits - 1 - size)}f}"
    return f"{value:.{digits - 1}e}"


def summary(report: Report) -> str:
    """The report in at most 25 lines of plain text, at most 110 columns, no newline at the end."""
    t, a = report.totals, report.activity
    lines = [
        f"{report.title}"[:100],
        f"chip {report.chip['name']}, model {report.chip['model']}; activity {a['source']}; density {a['density']:.1%}"[
            :100
        ],
        f"energy {number(t['energy_uJ'])} uJ | latency {number(t['latency_ms'])} ms ({t['schedule']}) | "
        f"area {number(t['area_mm2'])} mm2 | {t['tiles']} tile{'s' * (t['tiles'] > 1)}, {t['crossbars']} crossbars",
        f"{number(t['TOPS_per_W'])} TOPS/W | {number(t['TOPS_per_mm2'])} TOPS/mm2 | "
        f"EDAP {number(t['EDAP_mJ_ms_mm2'])} mJ ms mm2 | {number(t['ops'])} dense ops",
    ]
    for what, rows in (("energy", report.energy), ("area", report.area)):
        lines.append(f"{what}: " + ", ".join(f"{r['component']} {r['share']:.0%}" for r in rows[:6]))
    largest = sorted(report.layers, key=lambda row: -row["share"])[:4]
    lines.append(
        f"energy of {len(report.layers)} layers: " + ", ".join(f"{r['name']} {r['share']:.0%}" for r in largest)
    )
    if report.energies is not None:
        e = report.energies
        at = e["break_even_density"]
        even = (
            f"break-even density {at:.1%}"
            if at is not None
            else f"{e['cheaper_at_every_density']} cheaper at any density"
        )
        lines.append(
            f"synaptic only {number(e['synaptic_uJ'])} uJ, all {number(e['full_uJ'])} uJ, {e['ann_bits']}-bit ANN "
            f"{number(e['ann_uJ'])} uJ, {even}"
        )
    if report.precisions:
        lines.append(f"{'precision':<34} {'basis':<10} {'uJ':>9} {'ms':>8} {'mm2':>8} {'TOPS/W':>8} {'EDAP':>10}")
        lines += [
            f"{p['name'][:34]:<34} {p['basis']:<10} {number(p['energy_uJ']):>9} {number(p['latency_ms']):>8} "
            f"{number(p['area_mm2']):>8} {number(p['TOPS_per_W']):>8} {number(p['EDAP_mJ_ms_mm2']):>10}"
            for p in report.precisions[:7]
        ]
    lines += _paper_lines(report.paper["rows"])
    ignored = "" if report.adc["assumed"] is None else "; model spikesim ignores it"
    lines.append(report.adc["verdict"].split(":")[0].rstrip(".") + ignored)
    measured = report.adc["accuracy"][:4]
    if measured:
        found = ", ".join(f"{m['bits']} bit {m['transfer']} {m['accuracy']:.1%}" for m in measured)
        lines.append(f"accuracy by ADC, ideal devices: {found} of {measured[0]['samples']}")
    if report.sensitivity:
        felt = ", ".join(f"{row['key']} {max(row['edap']):.2f}" for row in report.sensitivity[:3])
        lines.append(f"EDAP x if a constant is halved or doubled: {felt}")
    if report.shares:
        by = {row["metric"]: row for row in report.shares}
        lines.append(
            "resting on low-confidence or unsourced constants: "
            + ", ".join(
                f"{m} {by[m]['low_confidence_or_unsourced']:.0%}" for m in ("energy", "latency", "area", "EDAP")
            )
        )
    return "\n".join(line[:110] for line in lines[:25])


def _paper_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The paper's ratios and ours, a line a model and chip."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        ratios = f"{row['preset']} {row['tops_per_w']:.2f} {row['tops_per_mm2']:.2f} {row['edap']:.2f}"
        groups.setdefault(f"  {row['model']} on {row['chip']}", []).append(ratios.strip())
    paper, *ours = groups.items()
    return [
        f"FP32 / 4 bit, TOPS/W TOPS/mm2 EDAP: paper {paper[1][0]}, which disagree (2.64 x 6.19 = 16.34)",
        *(f"{name}: {'; '.join(ratios)}" for name, ratios in ours),
    ]


def to_csv(report: Report) -> str:
    """The per-layer table as CSV (RFC 4180, header first). A text that a spreadsheet would run is quoted by '."""
    buffer = io.StringIO()
    if report.layers:
        writer = csv.DictWriter(buffer, list(report.layers[0]))
        writer.writeheader()
        for row in report.layers:
            writer.writerow({key: _cell(value) for key, value in row.items()})
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


@functools.cache
def _template() -> Any:
    try:
        import jinja2
    except ImportError as fault:
        raise MissingError("the HTML report needs jinja2: pip install 'mdsnn[report]'") from fault
    from . import pictures

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    environment.filters["percent"] = lambda value: f"{value:.1%}"
    environment.globals["pictures"] = pictures
    source = (resources.files("mdsnn.hwsim") / "templates" / "report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)


def render_html(report: Report) -> str:
    """The report as one self-contained HTML page: no network, no fonts, inline pictures and a small script for tables.

    raises  MissingError  if jinja2 is not installed
    """
    page: str = _template().render(r=report)
    return page
