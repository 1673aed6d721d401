"""`mdsnn report`, `chips`, `analog` and `sweep`: what they say, their bad input, and stopping them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import ENVIRONMENT, Outcome, assert_one_line, call, command, files, names
from mdsnn.cli import sweep as sweep_command
from mdsnn.export import artifact
from mdsnn.hwsim.sweep import AXES, parse_axis, read_points
from mdsnn.kernels import Engine

WORKLOAD = ("--workload", "ms-resnet18", "--input", "2x48x48", "--T", "10")
DIGITS = "builtin:digits"


def document(outcome: Outcome, schema: str) -> Any:
    assert outcome.code == 0, outcome
    found = json.loads(outcome.out)
    assert found["schema"] == schema
    return found


# ------------------------------------------------------------------------------------------------------------ report


def test_the_report_of_a_built_in_workload(tmp_path: Path) -> None:
    bits = ("--weight-bits", "4", "--membrane-bits", "4", "--density", "0.1")
    page = tmp_path / "r.html"
    outcome = call("report", *WORKLOAD, *bits, "-o", page)
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert len(lines) <= 25
    for text in (
        "activity assumed: uniform density 0.1",
        "paper 2.64 6.19 14.85, which disagree (2.64 x 6.19 = 16.34)",
        "spikesim on spikesim65: significand24 2.59 5.92 15.32; bits32 3.22 7.87 25.36",
        "physical, density 0.1 on fefet32: significand24",
        "NOT lossless",
    ):
        assert sum(text in line for line in lines) == 1, text
    assert "ms-resnet18 2x48x48" in page.read_text()
    base = document(call("report", *WORKLOAD, *bits, "--json"), "mdsnn.report/1")
    assert (base["network"]["timesteps"], base["network"]["input"]) == (10, [2, 48, 48])
    assert base["network"]["weight_bits"] == [4, 8]
    ratios = {(row["model"], row["chip"], row["preset"]): row["edap"] for row in base["paper"]["rows"]}
    assert ratios["spikesim", "spikesim65", "significand24"] == pytest.approx(15.32, rel=1e-3)
    more = document(call("report", *WORKLOAD, "--density", "0.2", "--membrane-bits", "8", "--json"), "mdsnn.report/1")
    assert more["network"]["membrane_bits"] == [8]
    assert more["totals"]["energy_uJ"] > base["totals"]["energy_uJ"]
    assert more["activity"]["density"] == pytest.approx(0.2)
    other = document(call("report", *WORKLOAD, "--chip", "spikesim65", "--json"), "mdsnn.report/1")
    assert other["chip"]["model"] == "spikesim"


def test_a_real_network_of_another_precision_beside(tmp_path: Path) -> None:
    made, kept = files(), tmp_path / "a.npz"
    words = ("report", made.artifact, "--data", made.npy)
    outcome = call(*words, "--activity", "data", "--compare", DIGITS, "--compare", made.affine, "--save-activity", kept)
    assert outcome.code == 0, outcome
    rows = document(call(*words, "--compare", DIGITS, "--compare", made.affine, "--json"), "mdsnn.report/1")
    measured = {row["name"]: row for row in rows["precisions"] if row["basis"] == "measured"}
    assert list(measured) == [DIGITS, str(made.affine)]
    own = document(call("report", DIGITS, "--data", made.npy, "--json"), "mdsnn.report/1")["totals"]
    assert measured[DIGITS]["energy_uJ"] == own["energy_uJ"]
    again = document(call(*words, "--activity", kept, "--json"), "mdsnn.report/1")
    assert again["totals"] == rows["totals"]
    unlike = call(*words, "--activity", kept, "--compare", DIGITS, "--limit", "1")
    assert f"{DIGITS} was measured on {made.npy}, 1 samples, this network on" in unlike.err
    assert_one_line(call("report", DIGITS, "--activity", kept), 2, str(kept), "not on this one", "measure it again")
    assert_one_line(call(*words, "--chip", "spikesim65", "--compare", DIGITS), 2, "--compare needs model physical")
    assert_one_line(call(*words, "--compare", tmp_path / "none.mdsnn"), 2, "none.mdsnn", "no such file")


def test_what_a_report_is_about_is_said_once() -> None:
    made = files()
    for name in ("report", "sweep"):
        assert_one_line(call(name), 2, "name either an ARTIFACT or a --workload")
        assert_one_line(call(name, made.artifact, *WORKLOAD), 2, "name either an ARTIFACT or a --workload")
        assert_one_line(call(name, made.artifact, "--density", "0.1"), 2, "--density is for a --workload")
        assert_one_line(call(name, *WORKLOAD, "--data", "digits"), 2, "--data is for an ARTIFACT")
        assert_one_line(call(name, "--workload", "ms-resnet18"), 2, "--workload needs --input and --T")
    assert_one_line(call("report", *WORKLOAD, "--activity", "a.npz"), 2, "--activity is for an ARTIFACT")
    assert_one_line(call("report", *WORKLOAD, "--compare", made.artifact), 2, "--compare is for an ARTIFACT")
    assert_one_line(call("sweep", *WORKLOAD, "--rows", "64", "--analog", "2"), 2, "--analog is for an ARTIFACT")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"--density": "1.5"}, ("density = 1.5 is outside 0..1",)),
        ({"--density": "-0.1"}, ("density = -0.1 is outside 0..1",)),
        ({"--density": "nan"}, ("density = nan is outside 0..1",)),
        ({"--workload": "ms-resnet81"}, ("did you mean 'ms-resnet18'",)),
        ({"--input": "2x48"}, ("'2x48' is not CxHxW",)),
        ({"--input": "2x4x48"}, ("input height = 4 is outside 8..4096",)),
        ({"--T": "0"}, ("T = 0 is outside 1..256",)),
        ({"--weight-bits": "9"}, ("weight bits = 9 is outside 2..8",)),
        ({"--membrane-bits": "1"}, ("membrane bits = 1 is outside 2..8",)),
        ({"--classes": "0"}, ("classes = 0 is outside",)),
    ],
)
def test_a_bad_workload_is_one_line(change: dict[str, str], parts: tuple[str, ...]) -> None:
    options = {"--workload": "ms-resnet18", "--input": "2x48x48", "--T": "10", **change}
    words = [word for pair in options.items() for word in pair]
    assert_one_line(call("report", *words), 2, *parts)
    assert_one_line(call("sweep", *words, "--rows", "64"), 2, *parts)


def leaf(value: object, unit: str) -> str:
    return f'{{ value = {value}, unit = "{unit}", source = "a test", confidence = "low" }}'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (f"[adc]\nenergy_4 = {leaf(0.0, 'pJ')}", ("[adc] energy_4 = 0.0 is zero; it must be positive",)),
        (f"[adc]\nenergy_4 = {leaf(-1.0, 'pJ')}", ("[adc] energy_4 = -1.0 is outside 0..1e+06 pJ",)),
        (f"[adc]\nenergy_4 = {leaf(1.0, 'mW')}", ("[adc] energy_4 has unit 'mW'", "fJ or pJ or nJ")),
        (f"[adc]\nbits = {leaf(14, 'bit')}", ("[adc] bits = 14 is outside 1..12",)),
        (f"[adc]\nbitz = {leaf(4, 'bit')}", ("[adc] unknown key 'bitz'; did you mean 'bits'?",)),
        ("[adc]\nbits = { value = 4, unit = 'bit', confidence = 'low' }", ("[adc] bits: 'source' is missing",)),
        (f"[tile]\nlimit = {leaf(3, '1')}", ("layer 'stage3.0.conv1'", "tile.limit = 3")),
    ],
)
def test_a_bad_chip_is_one_line_wherever_it_is_read(text: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    chip = tmp_path / "mine.toml"
    chip.write_text(f'inherits = "fefet32"\n{text}\n')
    where = () if "limit" in text else (str(chip),)
    assert_one_line(call("report", *WORKLOAD, "--chip", chip), 2, *where, *parts)
    assert_one_line(call("sweep", *WORKLOAD, "--chip", chip, "--rows", "64"), 2, *where, *parts)
    if where:
        assert_one_line(call("analog", DIGITS, "--chip", chip, "--trials", "1"), 2, *where, *parts)
        assert_one_line(call("chips", "show", chip), 2, *where, *parts)


def test_a_chip_of_ones_own() -> None:
    shown = document(call("chips", "show", "fefet32", "--json"), "mdsnn.chip/1")
    keys = {constant["key"] for constant in shown["constants"]}
    assert {"cell.sigma", "adc.bits", "wire.row_resistance"} <= keys
    assert all(set(c) == {"key", "value", "unit", "source", "confidence", "chip"} for c in shown["constants"])
    listed = document(call("chips", "--json"), "mdsnn.chips/1")
    assert [chip["name"] for chip in listed["chips"]] == ["fefet32", "spikesim65", "spikesim65-sram"]


# ------------------------------------------------------------------------------------------------------------ analog


def test_analog_accuracy_against_sigma_and_adc_bits(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    words = ("analog", DIGITS, "--trials", "3", "--limit", "20", "--seed", "5")
    shown = call(*words, "--sigma", "0,0.1", "--adc-bits", "4,10", "--json", target)
    assert shown.code == 0, shown
    assert "programming [" in shown.err
    lines = shown.out.splitlines()
    assert lines[0].split() == ["sigma", "trials", "4-bit", "ADC", "10-bit", "ADC"]
    assert "20 samples of builtin:digits; the integer engine:" in lines[-1]
    found = json.loads(target.read_text())
    assert found["schema"] == "mdsnn.analog/1"
    assert [(p["sigma"], p["adc_bits"], len(p["accuracies"])) for p in found["points"]] == [
        (0.0, 4, 1),
        (0.0, 10, 1),
        (0.1, 4, 3),
        (0.1, 10, 3),
    ]
    assert found["points"][1]["accuracy"] == found["engine_accuracy"]
    for point in found["points"]:
        assert 0 <= point["low"] <= point["accuracy"] <= point["high"] <= 1
        assert point["accuracy"] == pytest.approx(np.mean(point["accuracies"]))
    one = document(call(*words, "--sigma", "0.1", "--adc-bits", "10", "--jobs", "1", "--json"), "mdsnn.analog/1")
    two = document(call(*words, "--sigma", "0.1", "--adc-bits", "10", "--jobs", "2", "--json"), "mdsnn.analog/1")
    assert one == two
    assert one["points"] == [found["points"][3]]
    other = document(call(*words[:-1], "6", "--sigma", "0.3", "--adc-bits", "10", "--json"), "mdsnn.analog/1")
    assert other["points"][0]["accuracies"] != found["points"][3]["accuracies"]


def test_analog_defaults_reach_a_lossless_adc() -> None:
    found = document(call("analog", DIGITS, "--trials", "1", "--limit", "4", "--json"), "mdsnn.analog/1")
    assert {p["sigma"] for p in found["points"]} == {0.0, 0.2}
    assert [p["adc_bits"] for p in found["points"] if p["sigma"] == 0] == [4, 6, 8, 10]
    ends = [p for p in found["points"] if p["adc_bits"] == 10 and p["sigma"] == 0]
    assert ends[0]["accuracy"] == found["engine_accuracy"]


def test_stuck_cells_and_ir_drop_are_felt() -> None:
    words = ("analog", DIGITS, "--trials", "1", "--limit", "20", "--sigma", "0", "--adc-bits", "10", "--jobs", "1")
    exact = document(call(*words, "--json"), "mdsnn.analog/1")["engine_accuracy"]
    stuck = document(call(*words, "--stuck", "0.5,0.5", "--json"), "mdsnn.analog/1")["points"][0]
    assert (stuck["stuck_low"], stuck["stuck_high"]) == (0.5, 0.5)
    assert stuck["accuracy"] < exact
    dropped = call(*words, "--ir-drop", "--stuck", "0.01")
    assert "stuck cells 0.01 low, 0 high, IR drop" in dropped.out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--adc-bits", "13"), ("13 is outside 1..12",)),
        (("--adc-bits", "10..4"), ("has no value",)),
        (("--adc-bits", ""), ("neither a whole number nor a range",)),
        (("--sigma", "3"), ("sigma = 3.0 is outside 0..2",)),
        (("--sigma", "a"), ("--sigma 'a' is no list of numbers",)),
        (("--sigma", "nan"), ("--sigma 'nan' is no list of numbers",)),
        (("--stuck", "0.6,0.6"), ("above 1",)),
        (("--stuck", "0,0,0"), ("--stuck takes",)),
        (("--stuck", "1.5"), ("stuck_low = 1.5 is outside 0..1",)),
        (("--trials", "0"), ("--trials",)),
        (("--chip", "spikesim65"), ("model physical needs",)),
    ],
)
def test_bad_analog_settings_are_one_line(words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert_one_line(call("analog", DIGITS, *words), 2, *parts)


def test_samples_without_labels_have_no_accuracy() -> None:
    made = files()
    for words in (("analog",), ("sweep", "--adc-bits", "4", "--analog", "2")):
        assert_one_line(call(words[0], made.artifact, *words[1:], "--data", made.npy), 2, str(made.npy), "no labels")


# ------------------------------------------------------------------------------------------------------------- sweep


def test_the_commands_axes_are_the_sweeps() -> None:
    assert list(sweep_command.AXES) == list(AXES)


GRID = ("--rows", "32,64,128", "--adc-bits", "4..10", "--cell-bits", "1,2,4")


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_sweep_of_a_workload(ending: str, tmp_path: Path) -> None:
    output, shown = tmp_path / f"points{ending}", tmp_path / "s.json"
    outcome = call("sweep", *WORKLOAD, *GRID, "-o", output, "--json", shown)
    assert outcome.code == 0, outcome
    assert "63/63" in outcome.err
    found = json.loads(shown.read_text())
    assert (found["schema"], len(found["points"]), found["possible"]) == ("mdsnn.sweep/1", 63, 63)
    axes = {"rows": (32, 64, 128), "adc-bits": tuple(range(4, 11)), "cell-bits": (1, 2, 4)}
    assert {name: list(values) for name, values in axes.items()} == found["axes"]
    assert read_points(output, axes) == found["points"]
    front = [p for p in found["points"] if p["pareto"]]
    assert front
    assert f"63 points, {len(front)} on the front, 0 impossible" in outcome.out
    report = document(call("report", *WORKLOAD, "--json"), "mdsnn.report/1")["totals"]
    own = next(p for p in found["points"] if (p["rows"], p["adc-bits"], p["cell-bits"]) == (64, 4, 4))
    for metric in ("energy_uJ", "latency_ms", "area_mm2", "EDAP_mJ_ms_mm2"):
        assert own[metric] == report[metric]
    assert own["adc_bits_needed"] == 10
    assert_one_line(call("sweep", *WORKLOAD, *GRID, "-o", output), 3, str(output), "exists and is kept")
    before = output.read_bytes()
    assert call("sweep", *WORKLOAD, *GRID, "-o", output, "--resume").code == 0
    assert output.read_bytes() == before
    again = ("sweep", *WORKLOAD, "-o", output, "--resume")
    assert_one_line(call(*again, "--rows", "32"), 2, str(output), "this sweep")
    assert_one_line(call(*again, *GRID, "--density", "0.3"), 2, "another network, chip, activity")
    assert output.read_bytes() == before
    assert call("sweep", *WORKLOAD, "--rows", "32", "-o", output, "--force").code == 0
    assert len(output.read_text().splitlines()) == 1 + (ending == ".csv")


def test_a_sweep_of_an_artifact_with_analog_accuracy(tmp_path: Path) -> None:
    output = tmp_path / "points.csv"
    words = ("sweep", DIGITS, "--limit", "12", "--analog", "2", "--rows", "7,64", "--adc-bits", "6,10", "-o", output)
    outcome = call(*words)
    assert outcome.code == 0, outcome
    assert "accuracy %" in outcome.out
    assert "2 impossible" in outcome.out
    assert "share = 8 does not divide the 7 columns" in outcome.out
    rows = list(csv.DictReader(output.open(newline="")))
    assert [row["accuracy"] != "" for row in rows] == [False, False, True, True]
    assert 0 <= float(rows[3]["accuracy_low"]) <= float(rows[3]["accuracy"]) <= float(rows[3]["accuracy_high"]) <= 1
    assert {row["error"][:8] for row in rows[:2]} == {"override"}


def test_bad_sweeps_are_one_line(tmp_path: Path) -> None:
    words = ("sweep", *WORKLOAD)
    assert_one_line(call(*words), 2, "the sweep is empty", "--rows 32,64,128")
    assert_one_line(call(*words, "--rows", ""), 2, "sweep axis rows")
    assert_one_line(call(*words, "--adc-bits", "4..13"), 2, "sweep axis adc-bits: 13 is outside 1..12")
    assert_one_line(call(*words, "--scheme", "zigzag"), 2, "'zigzag' is outside kernel-split, im2col")
    assert_one_line(call(*words, "--rows", "1..400", "--columns", "1..400"), 2, "160000 points, over the limit")
    assert_one_line(call(*words, "--rows", "7"), 2, "none of the 1 points is possible", "does not divide")
    assert_one_line(call(*words, "--rows", "8", "--resume"), 2, "-o FILE")
    assert_one_line(call(*words, "--rows", "8", "-o", tmp_path / "x.xls"), 2, "x.xls", ".csv or .jsonl")
    assert_one_line(call(*words, "--rows", "8", "--chip", "spikesim65"), 2, "model physical needs")
    assert_one_line(call(*words, "--rows", "8", "--scheduler", "here:1"), 2, "'here:1' is no address such as tcp://")
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"rows": 8,')
    assert_one_line(call(*words, "--rows", "8", "-o", torn, "--resume"), 2, str(torn), "line 1", "torn?")
    assert names(tmp_path) == ["torn.jsonl"]


def test_a_scheduler_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("mdsnn.hwsim.processes.CONNECT_SECONDS", 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    words = ("sweep", *WORKLOAD, "--rows", "32,64", "-o", tmp_path / "x.csv", "--scheduler", address)
    assert_one_line(call(*words), 3, address, "no Dask scheduler answered")
    assert names(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------- stopping


def stop(words: list[str], when: Callable[[], bool], how: signal.Signals) -> Outcome:
    """Start `words` as the leader of a group, as a terminal does, and send the whole group the signal."""
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, start_new_session=True
    )
    try:
        limit = time.monotonic() + 90
        while process.poll() is None and not when():
            assert time.monotonic() < limit, "it never came so far"
            time.sleep(0.01)
        os.killpg(process.pid, how)
        out, err = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return Outcome(process.returncode, out.decode(), err.decode())


SLOW = ("sweep", DIGITS, "--rows", "16,32,64", "--adc-bits", "4..8", "--analog", "3", "--limit", "48")
"""15 points; enough that the first two seconds, after which points are written, do not see the last."""


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "points.jsonl"
    axes: dict[str, Any] = {
        name: parse_axis(name, text) for name, text in (("rows", "16,32,64"), ("adc-bits", "4..10"))
    }
    outcome = stop(command(*SLOW, "--jobs", "2", "-o", output), output.exists, signal.SIGINT)
    assert outcome.code == 130, outcome
    done = read_points(output, axes, analog=True)
    assert 1 <= len(done) < 15
    assert outcome.errors == [f"interrupted; {output} holds {len(done)} of 15 points, and --resume goes on"]
    assert "Traceback" not in outcome.err
    assert "Warning" not in outcome.err
    assert names(tmp_path) == ["points.jsonl"]
    stamp = output.stat().st_mtime_ns
    killed = stop(
        command(*SLOW, "--jobs", "1", "-o", output, "--resume"),
        lambda: output.stat().st_mtime_ns != stamp,
        signal.SIGKILL,
    )
    assert killed.code == -signal.SIGKILL
    more = read_points(output, axes, analog=True)
    assert len(done) < len(more) <= 15
    for point in (*done, *more):
        point.pop("pareto")  # it is filled in, and points are put in order, when the last one is there
    assert [point for point in done if point not in more] == []
    assert call(*SLOW, "-o", output, "--resume").code == 0
    assert call(*SLOW, "-o", whole).code == 0
    assert output.read_bytes() == whole.read_bytes()


def test_analog_stopped_by_ctrl_c() -> None:
    start = time.monotonic()
    outcome = stop(
        command("analog", DIGITS, "--trials", "500", "--jobs", "2"), lambda: time.monotonic() - start > 4, signal.SIGINT
    )
    assert outcome.code == 130, outcome
    assert len(outcome.errors) == 1, outcome
    assert "Traceback" not in outcome.err, outcome
    assert outcome.out == ""


def test_analog_of_a_lossless_adc_is_the_engine_sample_by_sample() -> None:
    """`mdsnn analog` at sigma 0 and 10 bits counts exactly the samples that the engine gets right."""
    found = document(call("analog", DIGITS, "--sigma", "0", "--adc-bits", "10", "--json"), "mdsnn.analog/1")
    network = artifact.load(DIGITS)
    pixels, labels = (np.load(io.BytesIO(artifact.builtin("digits", f"_{what}.npy"))) for what in ("pixels", "labels"))
    right = float(np.mean(Engine(network, "reference", 1).run(pixels).predictions == labels))
    assert found["points"][0]["accuracy"] == found["engine_accuracy"] == right


def test_the_benchmark_runs(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "bench_hwsim.py"
    words = [sys.executable, str(script), "--quick", "--jobs", "1", "--json", str(tmp_path / "b.json")]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "b.json").read_text())
    assert (found["schema"], found["quick"]) == ("mdsnn.bench-hwsim/1", True)
    assert {name: result["limit_s"] for name, result in found["results"].items()} == {
        "report": 1.0,
        "sweep": 60.0,
        "analog": 60.0,
    }
    assert all(result["median_s"] > 0 for result in found["results"].values())
