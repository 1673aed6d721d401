"""Sweeps: axes, the grid, the Pareto front, resuming, processes."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdsnn.hwsim.activity import load_of, measure, uniform
from mdsnn.hwsim.config import load_chip
from mdsnn.hwsim.cost import physical_cost, prepare
from mdsnn.hwsim.mapping import from_network, ms_resnet
from mdsnn.hwsim.sweep import (
    METRICS,
    measured_loads,
    pareto,
    parse_axis,
    sweep,
    sweep_csv,
    to_json_lines,
    uniform_loads,
)
from mdsnn.kernels.errors import ConfigError
from planted import seeded_case

CHIP = load_chip("fefet32")
WORKLOAD = ms_resnet(18, (2, 16, 16), 2)
AXES: dict[str, Any] = {"rows": (32, 64), "adc-bits": (4, 8), "scheme": ("kernel-split", "im2col")}


def test_axes_from_text() -> None:
    assert parse_axis("rows", "32, 64,128,64") == (32, 64, 128)
    assert parse_axis("adc-bits", "4..6,9") == (4, 5, 6, 9)
    assert parse_axis("scheme", "im2col") == ("im2col",)
    for name, text in (("row", "1"), ("rows", ""), ("rows", "1.5"), ("rows", "-4"), ("adc-bits", "4..13"),
                       ("adc-bits", "9..4"), ("scheme", "zigzag"), ("rows", "0"), ("rows", "1..9999999")):  # fmt: skip
        with pytest.raises(ConfigError, match="sweep axis"):
            parse_axis(name, text)


def test_every_point_is_what_the_model_says() -> None:
    rows = sweep(WORKLOAD, CHIP, AXES, uniform_loads(WORKLOAD, 0.1))
    assert len(rows) == 8
    for row in rows:
        n = row["rows"]
        chip = CHIP.replaced(
            {"crossbar.rows": n, "crossbar.columns": n, "adc.bits": row["adc-bits"], "mapping.scheme": row["scheme"]}
        )
        load = uniform(WORKLOAD, 0.1, rows=n, scheme=row["scheme"])
        totals = physical_cost(prepare(WORKLOAD, load, chip), chip).totals
        assert (row["energy_uJ"], row["EDAP_mJ_ms_mm2"]) == (totals.energy * 1e6, totals.edap)
    assert any(row["pareto"] for row in rows)


def test_columns_apart_from_rows_and_impossible_points() -> None:
    rows = sweep(WORKLOAD, CHIP, {"rows": (32,), "columns": (64, 12)}, uniform_loads(WORKLOAD, 0.1))
    assert rows[0]["error"] is None
    assert "does not divide the 12 columns" in rows[1]["error"]
    assert rows[1]["energy_uJ"] is None
    assert rows[1]["pareto"] is False
    tiny = CHIP.replaced({"tile.limit": 1})
    assert "tile.limit" in sweep(WORKLOAD, tiny, {"rows": (64,)}, uniform_loads(WORKLOAD, 0.1))[0]["error"]


def test_a_sweep_resumes_and_processes_change_nothing() -> None:
    loads = uniform_loads(WORKLOAD, 0.1)
    whole = sweep(WORKLOAD, CHIP, AXES, loads)
    done = [json.loads(line) for line in to_json_lines(whole[:5]).splitlines()]
    done[0]["energy_uJ"] = -1.0  # kept as it is, so it was not computed again
    seen: list[tuple[int, int]] = []
    rest = sweep(WORKLOAD, CHIP, AXES, loads, done=done, progress=lambda at, of: seen.append((at, of)))
    assert seen == [(5, 8), (7, 8), (8, 8)]  # a task for each crossbar
    assert rest[0]["energy_uJ"] == -1.0
    assert [{**row, "pareto": None} for row in rest[1:]] == [{**row, "pareto": None} for row in whole[1:]]
    assert sweep(WORKLOAD, CHIP, AXES, loads, jobs=2) == whole


def test_a_measured_sweep_counts_for_each_crossbar() -> None:
    network, pixels = seeded_case(3, max_channels=16, max_timesteps=3)
    workload = from_network(network)
    rows = sweep(workload, CHIP, {"rows": (8, 64)}, measured_loads(network, workload, pixels, "planted"))
    chip = CHIP.replaced({"crossbar.rows": 8, "crossbar.columns": 8})
    load = load_of(measure(network, pixels, rows=8), workload)
    assert rows[0]["energy_uJ"] == physical_cost(prepare(workload, load, chip), chip).totals.energy * 1e6


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=25))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int, int]]) -> None:
    rows = [{**dict(zip(METRICS, point, strict=True)), "error": None} for point in points]
    array = np.array(points).reshape(-1, 3)
    want = [at for at, p in enumerate(array) if not ((array <= p).all(axis=1) & (array < p).any(axis=1)).any()]
    assert pareto(rows) == want


def test_refusals_and_tables() -> None:
    loads = uniform_loads(WORKLOAD, 0.1)
    for axes in ({}, {"rows": ()}):
        with pytest.raises(ConfigError, match="empty"):
            sweep(WORKLOAD, CHIP, axes, loads)
    with pytest.raises(ConfigError, match="none of"):
        sweep(WORKLOAD, CHIP, {"colour": (1,)}, loads)
    with pytest.raises(ConfigError, match="over the limit"):
        sweep(WORKLOAD, CHIP, {"rows": range(1, 400), "columns": range(1, 400)}, loads)
    with pytest.raises(ConfigError, match="density"):
        uniform_loads(WORKLOAD, 2.0)
    rows = sweep(WORKLOAD, CHIP, {"adc-bits": (4, 5)}, loads)
    read = list(csv.DictReader(io.StringIO(sweep_csv(rows))))
    assert [float(row["energy_uJ"]) for row in read] == [row["energy_uJ"] for row in rows]
