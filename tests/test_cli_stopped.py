"""Ctrl-C and kill -9 in real processes: whole files only, one line, and a training that goes on to the same bits."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from commands import ENVIRONMENT, TINY, Outcome, call, command, files, names
from mdsnn import checkpoint as checkpoints
from mdsnn.export import artifact
from mdsnn.kernels.container import unpack

EPOCHS = 8
LEFTOVER = "mdsnn-tmp"


def stop(words: list[str], when: Callable[[], bool], how: signal.Signals) -> Outcome:
    """Start `words` in a process, send it the signal as soon as `when()` holds, and return what came of it."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    try:
        limit = time.monotonic() + 60
        while process.poll() is None and not when():
            assert time.monotonic() < limit, "it never came so far"
            time.sleep(0.002)
        process.send_signal(how)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return Outcome(process.returncode, out.decode(), err.decode())


def interrupt(words: list[str], when: Callable[[], bool], again: Callable[[], None] = lambda: None) -> Outcome:
    """`stop` by Ctrl-C; if the command was faster than the signal, `again` clears up for another try."""
    for _ in range(5):
        outcome = stop(words, when, signal.SIGINT)
        if outcome.code != 0:
            break
        again()
    assert outcome.code == 130, outcome
    assert len(outcome.errors) == 1, outcome
    assert "Traceback" not in outcome.err, outcome
    return outcome


def after(seconds: float) -> Callable[[], bool]:
    start = time.monotonic()
    return lambda: time.monotonic() - start > seconds


def rows(run: Path) -> int:
    """Epochs that metrics.csv tells of; it is written whole after each."""
    try:
        with open(run / "metrics.csv", encoding="utf-8", newline="") as stream:
            return len(list(csv.reader(stream))) - 1
    except FileNotFoundError:
        return 0


def training(run: Path) -> tuple[object, ...]:
    setting = ("--paper-setting", "qamd", "--teacher-path", files().teacher, "--batch-size", "128")
    return ("train", *setting, *TINY, "--epochs", EPOCHS, "--save-path", run)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert call(*training(run)).code == 0
    return run


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_training_goes_on_to_the_same_bits(how: signal.Signals, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = stop(command(*training(run)), lambda: rows(run) >= 2, how)
    if how == signal.SIGINT:
        assert outcome.code == 130, outcome
        assert len(outcome.errors) == 1, outcome
        assert "--resume" in outcome.errors[0]
        assert outcome.err.count("interrupted") == 1
        assert not any(LEFTOVER in name for name in names(run))
    else:
        assert outcome.code == -signal.SIGKILL
    finished = checkpoints.load(run / "last.ckpt").epoch
    assert 2 <= finished < EPOCHS, "the signal came too late to show anything"
    assert not (run / "model.ckpt").exists()
    assert json.loads((run / "recipe.json").read_text())["schema"] == "mdsnn.recipe/1"

    resumed = call(*training(run), "--resume")
    assert resumed.code == 0, resumed
    for name in ("model.ckpt", "last.ckpt"):
        want, got = (unpack((place / name).read_bytes(), "mdsnn.checkpoint", name) for place in (uninterrupted, run))
        assert sorted(want[1]) == sorted(got[1])
        for tensor in want[1]:
            assert want[1][tensor].dtype == got[1][tensor].dtype
            assert np.array_equal(want[1][tensor], got[1][tensor]), f"{name}: {tensor}"
        assert want[0]["epoch"] == got[0]["epoch"] == EPOCHS
    assert (uninterrupted / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()
    assert names(run) == names(uninterrupted)  # what the killed process left half-written is swept


def test_export_stopped_while_it_writes_vectors(tmp_path: Path) -> None:
    made, vectors = tmp_path / "a.mdsnn", tmp_path / "vectors"

    def clear() -> None:
        for path in sorted(tmp_path.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()

    words = command("export", files().student, "-o", made, "--vectors", vectors, "--vector-samples", "64")
    interrupt(words, lambda: (vectors / "constants").exists(), clear)
    assert made.read_bytes() == files().artifact.read_bytes()
    assert not (vectors / "manifest.json").exists()  # a folder without one is incomplete
    for name in names(tmp_path):
        assert LEFTOVER not in name
        if name.endswith(".npy"):
            np.load(tmp_path / name, allow_pickle=False)


def test_verify_and_bench_stopped_leave_nothing(tmp_path: Path) -> None:
    pixels = tmp_path / "many.npy"
    np.save(pixels, np.tile(np.load(files().npy), (400, 1, 1, 1)))
    left = tmp_path / "left"
    left.mkdir()
    verify = ("verify", files().artifact, "--data", pixels, "--executors", "reference,native", "--save-dir", left)
    bench = ("bench", files().artifact, "--data", files().npy, "--executors", "reference,native", "--repeats", "9999")
    for words in (verify, bench):
        for seconds in (0.6, 2.0):
            outcome = interrupt(command(*words, "--json", left / "x.json"), after(seconds))
            assert outcome.errors == ["stopped by Ctrl-C; every file that was written is whole"]
            assert names(left) == []


def test_a_killed_export_leaves_a_whole_artifact_or_none(tmp_path: Path) -> None:
    """kill -9 between two writes of the same name: the old content or the new one, never a part."""
    made = tmp_path / "a.mdsnn"
    made.write_bytes(files().affine.read_bytes())
    before = made.stat().st_ino
    words = command("export", files().student, "-o", made, "--force")
    outcome = stop(words, lambda: len(names(tmp_path)) > 1 or made.stat().st_ino != before, signal.SIGKILL)
    assert outcome.code in (0, -signal.SIGKILL)
    artifact.load(made)
    assert made.read_bytes() in (files().artifact.read_bytes(), files().affine.read_bytes())
    assert call("export", files().student, "-o", made, "--force").code == 0
    assert names(tmp_path) == ["a.mdsnn"]
