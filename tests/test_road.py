"""The whole road on real digits, for both published precisions: train, export, and every integer in five executors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mdsnn.cli import main


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_trained_student_has_no_mismatch_in_any_executor(bits: int, tmp_path: Path) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    short = ["--set", "warmup_epochs=0", "--threads", "1"]
    assert main(["train", "--save-path", str(teacher), "--epochs", "4", *short]) == 0
    teaching = ["--paper-setting", "qamd", "--bits", str(bits), "--teacher-path", str(teacher / "model.ckpt")]
    assert main(["train", *teaching, "--save-path", str(student), "--epochs", "3", *short]) == 0
    artifact, onnx, checkpoint = tmp_path / "s.mdsnn", tmp_path / "s.onnx", student / "model.ckpt"
    assert main(["export", str(checkpoint), "-o", str(artifact), "--onnx", str(onnx), "--onnx-form", "scan"]) == 0
    result = tmp_path / "verify.json"
    wanted = ["--checkpoint", str(checkpoint), "--onnx", str(onnx), "--json", str(result)]
    assert main(["verify", str(artifact), *wanted]) == 0
    document = json.loads(result.read_text())
    assert document["samples"] == 450
    assert sorted(document["executors"]) == ["native", "numba", "onnx", "reference", "torch"]
    assert document["compared"] > 90_000_000
    assert document["differing"] == 0
    assert document["constants"] == []
    assert len(set(document["accuracy"].values())) == 1
    assert document["accuracy"]["native"] > 0.8
