"""The benchmark of a training step: its contenders are one network, and its document says what was measured."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mdsnn.kernels.errors import ConfigError
from mdsnn.layers import LIF

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
if str(FOLDER) not in sys.path:
    sys.path.insert(0, str(FOLDER))
bench = importlib.import_module("bench_training")


@pytest.fixture(scope="module")
def work():
    return bench.Workload(True, 3)


def test_spikingjellys_modules_compute_our_teacher(work):
    assert bench.check(work) < 1e-3


def test_another_network_is_no_comparison(work, monkeypatch):
    def other():
        net = bench.Workload.spikingjelly(work)
        torch.nn.init.normal_(net.stem.weight)
        return net

    monkeypatch.setattr(work, "spikingjelly", other)
    with pytest.raises(ConfigError, match="differ from ours"):
        bench.check(work)


@pytest.mark.parametrize("name", bench.CONTENDERS)
def test_every_contender_has_a_gradient_for_every_weight(work, name):
    model, step = bench.CONTENDERS[name][1](work)
    model.train()
    assert torch.isfinite(step())
    lost = [path for path, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert lost == []
    if name == "ceiling":
        assert not any(isinstance(module, LIF) for module in model.modules())


def test_recomputing_is_the_student(work):
    losses = [bench.CONTENDERS[name][1](work)[1]().item() for name in ("student", "recompute")]
    assert losses[0] == losses[1]


def test_the_document(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "peak_memory", lambda name, quick, batch: 1000)
    path = tmp_path / "training.json"
    words = ["--quick", "--batch", "3", "--only", "teacher,spikingjelly", "--json", str(path)]
    done = CliRunner().invoke(bench.main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    document = json.loads(path.read_text())
    assert document["schema"] == "mdsnn.bench-training/1"
    assert document["quick"] is True
    assert document["batch"] == 3
    (row,) = document["quotients"]
    assert (row["of"], row["to"], row["limit"]) == ("spikingjelly", "teacher", "at least 1.15, target 1.3")
    turns = document["turns"]
    assert row["wall_s"] == turns["spikingjelly"][0]["wall_s"] / turns["teacher"][0]["wall_s"]
    assert document["peak_bytes"] == {"teacher": 1000, "spikingjelly": 1000}
    again = CliRunner().invoke(bench.main, words)
    assert again.exit_code != 0  # a result is not overwritten unasked


def test_a_contender_that_is_not_there_is_named():
    done = CliRunner().invoke(bench.main, ["--quick", "--only", "teacher,snntorch"])
    assert done.exit_code == 2
    assert "no contender snntorch" in done.output


def test_peak_memory_is_of_a_process_of_its_own():
    assert bench.peak_memory("teacher", True, 2) >= 0
