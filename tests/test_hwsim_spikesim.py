"""Model spikesim: the released estimator's figures, SpikingJelly's event mode, the precision presets, invariants."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdsnn.hwsim.activity import LayerLoad, count_windows, uniform
from mdsnn.hwsim.config import Chip, load_chip
from mdsnn.hwsim.cost import (
    SpikeSimEvents,
    SpikeSimLayer,
    presets,
    spikesim_cost,
    spikesim_cycle,
    spikesim_event_energy,
    spikesim_events,
    spikesim_layers,
)
from mdsnn.hwsim.mapping import Layer, ms_resnet
from mdsnn.kernels.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"
DENSE = json.loads((GOLDEN / "hwsim_dense.json").read_text())
EVENTS = list(csv.DictReader((GOLDEN / "hwsim_events.csv").open()))
RELATIVE = 1e-9
CHIP = load_chip("spikesim65")


def close(want: float) -> Any:
    return pytest.approx(want, rel=RELATIVE, abs=0.0)


def layers_of(case: dict[str, Any]) -> list[SpikeSimLayer]:
    return [
        SpikeSimLayer(row["layer"], row["in_ch"], row["out_ch"], row["in_dim"] ** 2, row["out_dim"] ** 2, row["k"] ** 2)
        for row in case["layers"]
    ]


@pytest.mark.parametrize("name", DENSE)
def test_the_released_estimators_figures(name: str) -> None:
    case = DENSE[name]
    chip = load_chip("spikesim65-sram" if case["device"] == "sram" else "spikesim65")
    cost = spikesim_cost(layers_of(case), case["T"], chip)
    assert cost.pes == case["num_pe"]
    assert cost.tiles == case["num_tiles"]
    assert cost.crossbars == case["num_crossbars"]
    assert cost.totals.ops == case["ops"]
    assert cost.totals.energy * 1e12 == close(case["energy_pJ"])
    assert cost.totals.area * 1e12 == close(case["area_total_um2"])
    assert cost.neuron_memory_area * 1e12 == close(case["area_neuron_mem_um2"])
    assert cost.pe_area * 1e12 == close(case["area_pe_plus_diff_um2"])
    assert cost.digital_area * 1e12 == close(case["area_digital_um2"])
    assert cost.totals.delay * 1e9 == close(case["latency_ns"])
    assert cost.totals.tops == close(case["TOPS"])
    assert cost.totals.tops_per_w == close(case["TOPS_per_W"])
    assert cost.totals.tops_per_mm2 == close(case["TOPS_per_mm2"])
    assert cost.totals.edap == close(case["EDAP_mJ_ms_mm2"])
    for got, want in zip(cost.layers, case["layers"], strict=True):
        assert got.layer.name == want["layer"]
        assert (got.pes, got.crossbars, got.macs) == (want["pe"], want["crossbars"], want["macs"])
        assert got.energy * 1e12 == close(want["energy_pJ"])
        assert got.pes * got.layer.sites_out == want["pe_cycles_per_step"]
        assert got.delay == close(want["halt_cycles_alone"] * 104e-9)


def test_the_pe_cycle_and_the_tile_of_the_design() -> None:
    cycle = spikesim_cycle(CHIP, 9)
    total = sum(cycle.values())
    assert total * 1e12 == close(828.4861472)
    assert cycle["tile buffer"] / total == pytest.approx(0.479, abs=5e-4)
    cost = spikesim_cost([SpikeSimLayer("a", 64, 64, 1, 1)], 1, CHIP)
    assert cost.tile_area * 1e12 == close(596708.21984)


@pytest.mark.parametrize("rows", [16, 32, 100, 128])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_other_crossbars_kernels_tiles_and_clocks_follow_the_formulas(rows: int, kernel: int) -> None:
    chip = CHIP.replaced(
        {"crossbar.rows": rows, "crossbar.columns": rows, "tile.pes": 3, "clock.frequency": 400, "clock.pe_cycles": 30}
    )
    c = {key: float(value.given) for key, value in CHIP.constants.items() if not isinstance(value.given, str)}
    x8, k2 = rows / 8, kernel**2
    layers = [SpikeSimLayer("a", 3, 130, 100, 81, k2), SpikeSimLayer("b", 130, 65, 81, 49, k2)]
    cost = spikesim_cost(layers, 7, chip)
    cycle = (
        157.12 + 4.64 + 5.096 + x8 * (k2 * 1.76423 + x8 * (2.03084 + 0.094245)) + x8 * 16 * 1.15e-6 + x8 * 0.2 + 397.0
    )
    pes = [-(-3 // rows) * -(-130 // rows), -(-130 // rows) * -(-65 // rows)]
    assert [entry.pes for entry in cost.layers] == pes
    assert cost.totals.energy * 1e12 == close(7 * cycle * (pes[0] * 81 + pes[1] * 49))
    assert cost.totals.delay * 1e9 == close(30 / 0.4 * 7 * (int(0.75 * 81 * 130) + 49 * 65))
    a_pe = k2 * c["crossbar.area"] + x8 * (c["adc.area"] + c["mux.area"])
    a_tile = x8 * c["diff.area"] + c["tile.temp_area"] + c["tile.buffer_area"] + 3 * a_pe + c["tile.htree_area"]
    memory = 0.7391 * 22 * (3 * 100 + 130 * 81 + 130 * 81 + 65 * 49)
    assert cost.totals.area * 1e12 == close(-(-sum(pes) // 3) * a_tile + memory)


# -------------------------------------------------------------------------------------------------------- event mode


def window_layer(c_in: int, c_out: int, k: int, stride: int, pad: int, height: int, width: int) -> Layer:
    size = ((height + 2 * pad - k) // stride + 1, (width + 2 * pad - k) // stride + 1)
    return Layer(
        "l", "conv", c_in, c_out, 1, (k, k), stride, pad, (height, width), size, 4, 1, 0, 1, 1, (), "", 0, 0, None
    )  # fmt: skip


def events_of(x: np.ndarray, layer: Layer, xbar: int) -> tuple[SpikeSimEvents, int]:
    rows, _, patches, sites = count_windows(x.astype(bool), layer, xbar, "kernel-split")
    by_tile = [int(rows[at : at + xbar].sum()) for at in range(0, layer.c_in, xbar)]
    p_in, p_out = -(-layer.c_in // xbar), -(-layer.c_out // xbar)
    cycles = len(x) * layer.sites * p_in * p_out
    events = SpikeSimEvents(
        layer.c_in, layer.c_out, layer.taps, cycles, int(patches.sum()), tuple(by_tile), p_out * sites
    )
    return events, cycles


@pytest.mark.parametrize("case", EVENTS, ids=lambda case: case["case"])
def test_golden_event_counts_and_energies(case: dict[str, str]) -> None:
    value = {
        key: int(case[key]) for key in ("in_ch", "out_ch", "k", "stride", "pad", "H", "W", "N", "pattern_mod", "xbar")
    }
    n, c, i, j = np.ogrid[: value["N"], : value["in_ch"], : value["H"], : value["W"]]
    x = (7 * i + 3 * j + 5 * c + 2 * n) % value["pattern_mod"] == 0
    layer = window_layer(*(value[key] for key in ("in_ch", "out_ch", "k", "stride", "pad", "H", "W")))
    chip = CHIP.replaced({"crossbar.rows": value["xbar"], "crossbar.columns": value["xbar"]})
    events, cycles = events_of(x, layer, value["xbar"])
    assert cycles == int(case["dense_pe_cycles"])
    assert events.active_patch_tiles == int(case["active_patch_tiles"])
    assert sum(events.active_rows_by_tile) == int(case["active_rows"])
    assert events.active_output_tile_sites == int(case["active_output_tile_sites"])
    parts = {part: energy * 1e12 for part, energy in spikesim_event_energy(events, chip).items()}
    assert parts["patch control"] == close(float(case["event_patch_control_pj"]))
    assert parts["crossbar"] == close(float(case["event_xbar_pj"]))
    assert parts["neuron"] == close(float(case["event_neuron_pj"]))
    assert sum(parts.values()) == close(float(case["event_pJ"]))
    dense = cycles * sum(spikesim_cycle(chip, layer.taps).values()) * 1e12
    assert dense == close(float(case["dense_pJ"]))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_events_agree_with_spikingjelly(data: st.DataObject) -> None:
    torch = pytest.importorskip("torch")
    counter = pytest.importorskip("spikingjelly.activation_based.op_counter.spikesim")
    c_in, c_out = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    k, stride, pad = data.draw(st.sampled_from([(1, 1, 0), (3, 1, 1), (3, 2, 1), (3, 1, 0), (5, 2, 2)]))
    height, width = data.draw(st.integers(5, 9)), data.draw(st.integers(5, 9))
    xbar, density = data.draw(st.sampled_from([4, 8, 64])), data.draw(st.sampled_from([0.02, 0.3, 1.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = rng.random((3, c_in, height, width)) < density
    convolution = torch.nn.Conv2d(c_in, c_out, k, stride, pad, bias=False).eval()
    config = counter.SpikeSimEnergyConfig(xbar_size=xbar, activity_mode="event")
    with torch.no_grad(), counter.SpikeSimEnergyProfiler(config=config) as profiler:
        convolution(torch.from_numpy(x.astype(np.float32)))
    report = profiler.get_report()
    (stats,) = report.event_stats_by_stage.values()
    layer = window_layer(c_in, c_out, k, stride, pad, height, width)
    chip = CHIP.replaced({"crossbar.rows": xbar, "crossbar.columns": xbar})
    events, cycles = events_of(x, layer, xbar)
    assert cycles == stats["dense_pe_cycle_count"]
    assert events.active_patch_tiles == stats["active_patch_tile_count"]
    assert list(events.active_rows_by_tile) == stats["active_row_count_by_tile"]
    assert events.active_output_tile_sites == stats["active_output_tile_site_count"]
    assert sum(spikesim_event_energy(events, chip).values()) * 1e12 == close(report.energy_total_pj)


def test_the_whole_function_of_spikingjelly_is_the_oracle() -> None:
    torch = pytest.importorskip("torch")
    estimate = pytest.importorskip("spikingjelly.activation_based.op_counter.spikesim").estimate_spikesim_energy
    config = pytest.importorskip("spikingjelly.activation_based.op_counter.spikesim").SpikeSimEnergyConfig
    x = np.random.default_rng(5).random((4, 70, 6, 6)) < 0.1
    model = torch.nn.Sequential(torch.nn.Conv2d(70, 30, 3, 1, 1, bias=False)).eval()
    inputs = torch.from_numpy(x.astype(np.float32))
    layer = window_layer(70, 30, 3, 1, 1, 6, 6)
    events, cycles = events_of(x, layer, 64)
    with torch.no_grad():
        event = estimate(model, inputs, config=config(activity_mode="event")).energy_total_pj
        dense = estimate(model, inputs, config=config(activity_mode="dense")).energy_total_pj
    assert sum(spikesim_event_energy(events, CHIP).values()) * 1e12 == close(event)
    assert cycles * sum(spikesim_cycle(CHIP, 9).values()) * 1e12 == close(dense)


@pytest.mark.parametrize("shape", [(64, 64, 3), (70, 130, 3), (5, 3, 5)])
def test_all_ones_without_padding_event_equals_dense(shape: tuple[int, int, int]) -> None:
    c_in, c_out, k = shape
    layer = window_layer(c_in, c_out, k, 1, 0, 8, 8)
    events, cycles = events_of(np.ones((2, c_in, 8, 8), bool), layer, 64)
    dense = cycles * sum(spikesim_cycle(CHIP, k * k).values())
    assert sum(spikesim_event_energy(events, CHIP).values()) == close(dense)


def test_layers_that_do_not_read_spikes_count_as_dense() -> None:
    workload = ms_resnet(18, (3, 16, 16), 2)
    stem, load = workload.layers[0], uniform(workload, 0.1)
    events = spikesim_events(stem, load.layers[stem.name], CHIP)
    assert (events.active_patch_tiles, events.active_rows_by_tile) == (256, (256 * 3 * 9,))
    assert (events.dense_pe_cycles, events.active_output_tile_sites) == (256, 256)


def test_events_of_a_load_are_those_of_its_spikes() -> None:
    layer = window_layer(70, 130, 3, 2, 1, 7, 7)
    x = np.random.default_rng(8).random((1, 70, 7, 7)) < 0.02
    rows, visits, patches, sites = count_windows(x, layer, 64, "kernel-split")
    counts = (np.array([x.sum()]), rows, visits[None], patches[None], np.array([sites]))
    load = LayerLoad(*(part.astype(np.float64) for part in counts))
    want, cycles = events_of(x, layer, 64)
    assert spikesim_events(layer, load, CHIP) == want
    assert cycles == want.dense_pe_cycles == 16 * 2 * 3


# ------------------------------------------------------------------------------------------ presets and invariants


@pytest.mark.parametrize(
    ("preset", "per_w", "per_mm2", "edap"), [("significand24", 2.587, 5.921, 15.32), ("bits32", 3.222, 7.868, 25.36)]
)
def test_precision_presets_on_resnet18(preset: str, per_w: float, per_mm2: float, edap: float) -> None:
    workload = ms_resnet(18, (2, 48, 48), 10)
    assert len(spikesim_layers(workload)) == 17
    got = presets(workload, CHIP)[preset]
    assert got["tops_per_w"] == pytest.approx(per_w, abs=1e-3)
    assert got["tops_per_mm2"] == pytest.approx(per_mm2, abs=1e-3)
    assert got["edap"] == pytest.approx(edap, rel=5e-4)
    assert got["edap"] == close(got["tops_per_w"] * got["tops_per_mm2"])


@pytest.mark.parametrize("name", ["resnet18_cifar_T4", "resnet18_ncaltech48_T10"])
def test_the_built_in_workload_is_the_golden_network(name: str) -> None:
    case = DENSE[name]
    first = case["layers"][0]
    workload = ms_resnet(18, (first["in_ch"], first["in_dim"], first["in_dim"]), case["T"])
    cost = spikesim_cost(spikesim_layers(workload), case["T"], CHIP)
    assert cost.totals.energy * 1e12 == close(case["energy_pJ"])
    assert cost.totals.area * 1e12 == close(case["area_total_um2"])
    assert cost.totals.delay * 1e9 == close(case["latency_ns"])


def test_energy_is_linear_in_steps_and_metrics_are_consistent() -> None:
    layers = layers_of(DENSE["vgg9_cifar10_T5_default"])
    one, many = spikesim_cost(layers, 1, CHIP).totals, spikesim_cost(layers, 13, CHIP).totals
    assert many.energy == close(13 * one.energy)
    assert many.edap == close(many.energy * 1e3 * many.delay * 1e3 * many.area * 1e6)
    assert many.tops_per_w * many.energy * 1e12 == close(many.ops)
    assert many.tops_per_mm2 * many.delay * many.area * 1e18 == close(many.ops)


def scaled(key: str) -> Chip:
    return CHIP.scaled(key, 2.0)


@pytest.mark.parametrize("key", CHIP.scalable("spikesim"))
def test_every_constant_counts(key: str) -> None:
    layers = layers_of(DENSE["vgg9_cifar10_T5_default"])
    base, other = spikesim_cost(layers, 5, CHIP).totals, spikesim_cost(layers, 5, scaled(key)).totals
    assert replace(base) != other


def test_a_network_without_convolutions_is_refused() -> None:
    with pytest.raises(ConfigError, match="no convolution"):
        spikesim_cost([], 4, CHIP)
