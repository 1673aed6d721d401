"""benchmarks/experiments.py: which trainings the tables take, their means and errors, and a whole run in small."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch")
SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "experiments.py"


@pytest.fixture(scope="module")
def experiments() -> ModuleType:
    return script("experiments")


def script(name: str) -> ModuleType:
    """A script of benchmarks/, which finds its neighbours as if it had been started."""
    if str(SCRIPT.parent) not in sys.path:
        sys.path.insert(0, str(SCRIPT.parent))
    return importlib.import_module(name)


def test_the_cells_of_the_tables(experiments: ModuleType) -> None:
    four = experiments.cells(["IV"], 4)
    assert sorted(four) == sorted([(experiments.KL, 4), (experiments.MSE, 4)])
    five = experiments.cells(["V"], 3)
    assert len(five) == len(set(five)) == 3 * 3 + 1
    assert {t for name, t in five if name == "quantized"} == {1, 2, 3}
    assert [t for name, t in five if name == experiments.MSE] == [3]


def test_means_and_errors_are_those_computed_by_hand(experiments: ModuleType) -> None:
    assert experiments.mean_and_error([0.5]) == (0.5, 0.0)
    mean, error = experiments.mean_and_error([0.90, 0.92, 0.97])
    # deviations -0.03, -0.01, 0.04: variance (9 + 1 + 16)e-4 / 2, over 3 seeds
    assert mean == pytest.approx(0.93)
    assert error == pytest.approx((26e-4 / 2 / 3) ** 0.5)


def test_the_tables_take_each_student_where_it_belongs(experiments: ModuleType) -> None:
    tables = experiments.summarize(planted())
    (five, (heads, rows)), (four, (_, pair)) = tables.items()
    assert "V" in five
    assert "W4U4" in five
    assert heads == ["student", "T = 1", "T = 2"]
    assert rows[0] == ["quantized", "11.00 ± 1.00 %", "21.00 ± 1.00 %"]
    assert rows[2] == [experiments.KL, "41.00 ± 1.00 %", "81.00 ± 1.00 %"]
    assert "IV" in four
    assert pair == [
        [experiments.KL, "81.00 ± 1.00 %", "1.000 ± 0.000"],
        [experiments.MSE, "71.00 ± 1.00 %", "2.010 ± 0.010"],
    ]


def planted() -> dict[str, object]:
    """A result of two seeds at T = 2, of which every mean is seen at once."""

    def student(method: str, t: int, frozen: float, spikes: float) -> dict[str, object]:
        return {
            "method": method,
            "t": t,
            "frozen": frozen,
            "torch_frozen": frozen,
            "spikes_per_neuron": spikes,
            "samples": 450,
        }

    seeds = []
    for shift in (0.0, 0.02):
        students = [student("logits + membranes, KL", 2, 0.8 + shift, 1.0)]
        students.append(student("logits + membranes, MSE", 2, 0.7 + shift, 2.0 + shift))
        students += [student(name, t, 0.1 * t + shift, 0.0) for name in ("quantized", "logits") for t in (1, 2)]
        students.append(student("logits + membranes, KL", 1, 0.4 + shift, 0.5))
        seeds.append({"teacher": 0.9 + shift, "students": students})
    return {"schema": "mdsnn.experiments/1", "data": "digits", "seeds": seeds, "timesteps": 2, "bits": 4}


def test_the_readme_gets_the_tables_of_a_result_whose_executors_agree(tmp_path: Path) -> None:
    report = script("report")
    document = planted()
    text = report.experiments_tables(document)
    assert "2 seeds of digits, 450 test images each" in text
    assert "91.00 ± 1.00 %" in text
    assert "| quantized | 11.00 ± 1.00 % | 21.00 ± 1.00 % |" in text
    document["seeds"][0]["students"][0]["torch_frozen"] = 0.5  # type: ignore[index]
    with pytest.raises(report.InputError, match="differ"):
        report.experiments_tables(document)
    with pytest.raises(report.InputError, match="schema"):
        report.experiments_tables({"schema": "other"})


def test_a_whole_run_in_small_and_again_from_what_it_kept(tmp_path: Path) -> None:
    out, result = tmp_path / "runs", tmp_path / "result.json"
    words = ["--table", "IV", "--seeds", "1", "--time-window", "1", "--processes", "1", "--out", str(out)]
    words += ["--set", "epochs=1", "--set", "widths=[2,3]", "--set", "blocks=[1,1]", "--json", str(result)]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(SCRIPT), *words, *more], capture_output=True, text=True)

    first = run()
    assert first.returncode == 0, first.stderr
    document = json.loads(result.read_text())
    assert document["schema"] == "mdsnn.experiments/1"
    students = document["seeds"][0]["students"]
    assert [student["method"] for student in students] == ["logits + membranes, KL", "logits + membranes, MSE"]
    for student in students:
        assert student["frozen"] == student["torch_frozen"]
        assert student["samples"] == 450
        assert 0 < student["spikes_per_neuron"] <= 1
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("last.ckpt")}
    assert len(kept) == 3
    refused = run()
    assert refused.returncode == 3, refused.stderr
    assert str(result) in refused.stderr.splitlines()[-1]
    again = run("--force")
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("last.ckpt")} == kept  # nothing was trained twice
    assert json.loads(result.read_text())["seeds"] == document["seeds"]
