"""The demo with a network that takes seconds: every step runs, it goes on where it was stopped, it tells the truth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from commands import assert_one_line, call, names
from mdsnn import data, recipe
from mdsnn.cli import bench, demo, verify

pytest.importorskip("jinja2")
FIVE = {"reference", "numba", "native", "torch", "onnx"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's steps on few images, with a network of one group, without waiting for clocks."""
    whole = data.digits()
    few = replace(
        whole,
        train_x=whole.train_x[:64],
        train_y=whole.train_y[:64],
        test_x=whole.test_x[:12],
        test_y=whole.test_y[:12],
    )
    monkeypatch.setitem(data.DATASETS, "digits", lambda _path: few)
    small = {"blocks": (1, 1), "widths": (4, 8), "epochs": 1, "batch_size": 32}
    monkeypatch.setattr(recipe, "DIGITS", {**recipe.DIGITS, **small})
    monkeypatch.setattr(recipe, "DIGITS_TAUGHT", {**recipe.DIGITS_TAUGHT, "epochs": 1})
    monkeypatch.setattr(bench, "_time", lambda _run, batch: 1e-3 * len(batch))


@pytest.mark.usefixtures("tiny")
def test_the_demo_goes_the_whole_road_and_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    whole = verify.check

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "check", stop)
    outcome = call("demo", "--out", out)
    assert outcome.code == 130, outcome
    assert outcome.errors == [f"interrupted; the same command goes on with what {out} holds"]
    kept = {name: (out / name).read_bytes() for name in names(out) if name.endswith("model.ckpt")}
    assert len(kept) == 3
    assert not (out / "summary.json").exists()

    monkeypatch.setattr(verify, "check", whole)
    outcome = call("demo", "--out", out)
    assert outcome.code == 0, outcome
    assert {name: (out / name).read_bytes() for name in kept} == kept
    for step in range(1, 7):
        assert f"[{step}/6]" in outcome.err
    for command in ("train", "export", "verify", "bench", "report"):
        assert f"[mdsnn {command}" in outcome.err
    found = json.loads((out / "summary.json").read_text())
    assert found["schema"] == "mdsnn.demo/1"
    assert found["agrees"] is True
    assert found["peak_memory_MB"] is None or found["peak_memory_MB"] > 20
    assert found["verify"]["differing"] == 0
    assert found["verify"]["samples"] == 12
    assert set(found["accuracy"]["executors"]) == FIVE
    assert found["bytes"]["student.mdsnn"] == (out / "student.mdsnn").stat().st_size
    assert found["bytes"]["student.onnx"] == (out / "student.onnx").stat().st_size
    for row in found["table"]["rows"]:
        assert row[2] in outcome.out
    assert {"report.html", "report.json", "report.csv"} <= set(names(out))

    again = call("demo", "--out", out)
    assert_one_line(again, 3, "summary.json", "a finished demo is kept", "--force")


@pytest.mark.usefixtures("tiny")
def test_force_starts_over_and_touches_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "demo"
    (out / "teacher").mkdir(parents=True)
    (out / "teacher" / "notes.txt").write_text("mine")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "check", stop)
    assert call("demo", "--out", out).code == 130
    other = call("demo", "--out", out, "--seed", "1")
    assert other.code == 2
    assert "seed was 0, is 1" in other.errors[0]
    before = (out / "teacher" / "model.ckpt").read_bytes()
    assert call("demo", "--out", out, "--seed", "1", "--force").code == 130
    assert (out / "teacher" / "model.ckpt").read_bytes() != before
    assert (out / "teacher" / "notes.txt").read_text() == "mine"


def test_a_demo_that_finds_a_difference_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document = {"agrees": False, "table": {"headers": ["what", "of", "value"], "rows": [["a", "b", "c"]]}}
    monkeypatch.setattr(demo, "_fill", lambda *_: document)
    assert call("demo", "--out", tmp_path / "demo").code == 1
