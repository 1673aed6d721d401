"""The benchmark of shapes: it checks before it times, and its ratios are what they say; speed itself is not tested."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mdsnn.kernels import native
from mdsnn.kernels.errors import EnvironmentFault

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
if str(FOLDER) not in sys.path:
    sys.path.insert(0, str(FOLDER))
shapes = importlib.import_module("bench_shapes")
needs_native = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


@needs_native
def test_quick_runs_and_writes_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    arguments = ["--quick", "--levels", "base", "--repeats", "2", "--seconds", "0.1", "--json", str(path)]
    outcome = CliRunner().invoke(shapes.main, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0
    document = json.loads(path.read_text())
    assert document["schema"] == shapes.SCHEMA
    assert [case["name"] for case in document["cases"]] == [case.name for case in shapes.QUICK]
    assert {case["checked_against"] for case in document["cases"]} == {"reference"}
    best = min(case["levels"]["base"]["ps_per_mac"] for case in document["cases"])
    for case in document["cases"]:
        figures = case["levels"]["base"]
        assert figures["ps_per_mac"] == pytest.approx(1e9 * figures["ms"] / (case["macs"] * case["batch"]))
        assert figures["ratio"] == pytest.approx(figures["ps_per_mac"] / best)


def test_ratios_are_to_the_best_of_the_same_bits_and_level() -> None:
    def case(bits: int, base: float, avx2: float) -> dict[str, Any]:
        return {"bits": bits, "levels": {"base": {"ps_per_mac": base}, "avx2": {"ps_per_mac": avx2}}}

    cases = [case(4, 2.0, 9.0), case(4, 6.0, 3.0), case(8, 5.0, 4.0)]
    shapes.ratios(cases)
    assert [[level["ratio"] for level in case["levels"].values()] for case in cases] == [[1, 3], [3, 1], [1, 1]]


@needs_native
def test_other_integers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    network, pixels = shapes.QUICK[0].build(0.2, 0)
    run = native.NativeBackend.run

    def wrong(*arguments: Any) -> Any:
        result = run(*arguments)
        result.logits[0, -1] ^= 1
        return result

    assert shapes.check(network, pixels, native.isa()) == "reference"
    monkeypatch.setattr(native.NativeBackend, "run", wrong)
    with pytest.raises(EnvironmentFault, match="other integers than reference"):
        shapes.check(network, pixels, native.isa())


def test_names_are_told_apart_and_the_shapes_asked_for_are_there() -> None:
    names = [case.name for case in shapes.CASES]
    assert len(set(names)) == len(names)
    steps = {case.options.get("timesteps", 4) for case in shapes.CASES}
    sizes = {case.options.get("size", (32, 32))[0] for case in shapes.CASES}
    assert {1, 4, 10, 32} <= steps
    assert {8, 16, 32, 48, 64, 128} <= sizes
    assert {1, 16, 1024} <= {case.batch for case in shapes.CASES}
    assert np.mean([case.held for case in shapes.CASES]) > 0.7
