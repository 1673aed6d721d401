"""The training loop on 64 digits: its files, exact resume, what it refuses, and what it measures."""

import csv
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from mdsnn import checkpoint, train
from mdsnn.data import Dataset, digits
from mdsnn.freeze import freeze
from mdsnn.kernels.container import pack
from mdsnn.kernels.errors import CheckpointError, ConfigError, MissingError, StorageError, TrainingError
from mdsnn.layers import LIF, taps
from mdsnn.models import build
from mdsnn.recipe import TrainConfig, recipe

SMALL = {"blocks": (1, 1), "widths": (4, 6), "epochs": 2, "batch_size": 24, "warmup_epochs": 0.5, "timesteps": 2}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> Dataset:
    whole = digits()
    few = {"train_x": whole.train_x[:64], "train_y": whole.train_y[:64]}
    return dataclasses.replace(whole, test_x=whole.test_x[:30], test_y=whole.test_y[:30], **few)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("teacher")
    return train.train(recipe(save_path=folder, **{**SMALL, "timesteps": 3}), data=data).checkpoint


def student(teacher, folder, **changes) -> TrainConfig:
    fields = {**SMALL, "setting": "qamd", "teacher_path": teacher, "blocks": None, "widths": None, **changes}
    return recipe(save_path=folder, **fields)


# -------------------------------------------------------------------------------------------------- recipes


def test_all_faults_of_a_recipe_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(setting="qamd", bits=9, loss="KLC", lr=-1.0, epochs=0, taps="layer", tau=math.nan, data="digitz")
    lines = str(caught.value).splitlines()
    assert all(line.startswith("recipe: ") for line in lines)
    for words in (
        "bits = 9 is no whole number in 2..8",
        "loss = 'KLC' is none of CLK, CLM, CL",
        "lr = -1.0",
        "epochs = 0",
    ):
        assert sum(words in line for line in lines) == 1
    for words in ("taps = 'layer'", "tau = nan", "Did you mean 'digits'", "needs teacher_path"):
        assert sum(words in line for line in lines) == 1
    assert len(lines) == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 1}, "bits = 1"),
        ({"bits": True}, "bits = True"),
        ({"weight_bits": 16}, r"weight_bits = 16 is no whole number in 2\.\.8, or 32"),
        ({"bits": 32}, r"bits = 32 is no whole number in 2\.\.8"),
        ({"quantizer": "lsq"}, "quantizer = 'lsq' is none of tanh, mint"),
        ({"norm": "none"}, "norm = 'none' is none of bn, tdbn"),
        ({"precision": "fp8"}, "precision = 'fp8' is none of float32, bf16"),
        ({"freeze_epochs": -1}, "freeze_epochs = -1"),
        ({"compile": 1}, "compile = 1 is neither"),
        ({"compile": True, "checkpoint_activations": True}, "exclude each other"),
        ({"checkpoint_activations": "yes"}, "checkpoint_activations = 'yes'"),
        ({"depth": 50}, "depth = 50 is none of 18, 34"),
        ({"depth": 18, "blocks": (1,), "widths": (4,)}, "say the same thing"),
        ({"blocks": (1, 1), "widths": (4,)}, "2 groups of blocks and 1 of widths"),
        ({"blocks": 3}, "blocks = 3"),
        ({"widths": (4, 0)}, "widths"),
        ({"loss_weights": (1.0, 3.0)}, "three numbers"),
        ({"loss_weights": None}, "three numbers"),
        ({"quantize": "pre_fire", "reset": "soft"}, "pre_fire"),
        ({"frac_bits": 4}, "frac_bits = 4 is outside 5..12"),
        ({"start": "teacher"}, "needs teacher_path"),
        ({"teacher_path": "x"}, "takes no teacher_path"),
        ({"teacher_path": 3, "setting": "student"}, "teacher_path = 3 is no path"),
        ({"flip": 1}, "flip = 1"),
        ({"data": 3}, "unknown data '3'"),
        ({"lr": "0.1"}, "lr = '0.1'"),
        ({"temperature": 0}, "temperature = 0"),
    ],
)
def test_each_fault_has_its_line(changes, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**changes)


def test_recipe_gives_the_defaults_of_a_data_set_and_names_the_nearest_field():
    assert recipe().blocks == (1, 1, 1)
    assert recipe().resolved_bits == (32, 32, 32)
    assert recipe("digits", "student").blocks == (1, 1, 1)
    assert recipe("digits", "student", teacher_path="t").blocks is None
    assert recipe("digits", "student", bits=8, membrane_bits=4).resolved_bits == (8, 4, 8)
    assert recipe(depth=18).blocks is None
    assert (recipe("imagefolder", data_path="x").epochs, recipe("imagefolder").batch_size) == (200, 256)
    with pytest.raises(ConfigError, match=r"unknown recipe field 'epoch'.*Did you mean 'epochs'"):
        recipe(epoch=3)


def test_the_rate_rises_linearly_and_falls_as_a_cosine():
    config = recipe(epochs=10, warmup_epochs=2.0, lr=1.0)
    rates = [train.learning_rate(config, step, 5) for step in range(50)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 11)
    np.testing.assert_allclose(rates[10:], 0.5 * (1 + np.cos(np.pi * np.arange(40) / 40)))
    flat = recipe(epochs=10, warmup_epochs=0, lr=0.5, schedule="constant")
    assert {train.learning_rate(flat, step, 5) for step in range(50)} == {0.5}


# ---------------------------------------------------------------------------------------------------- a run


def test_a_run_leaves_its_folder_whole_and_readable(tmp_path, data):
    seen = []
    config = recipe(save_path=tmp_path / "run", seed=3, **SMALL)
    result = train.train(config, data=data, progress=seen.append)
    assert sorted(os.listdir(tmp_path / "run")) == [
        "last.ckpt",
        "metrics.csv",
        "metrics.jsonl",
        "model.ckpt",
        "recipe.json",
    ]
    assert result.checkpoint == tmp_path / "run" / "model.ckpt"
    assert [(e.epoch, e.step) for e in seen] == [(0, 1), (0, 2), (1, 3), (1, 1), (1, 2), (2, 3)]
    assert [e.steps for e in seen] == [3] * 6
    assert [bool(e.metrics) for e in seen] == [False, False, True] * 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [dict(row) for row in result.history]
    with open(tmp_path / "run" / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in lines]
    document = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert document["recipe"]["seed"] == document["seed"] == 3
    assert document["versions"]["torch"] == torch.__version__
    assert document["steps_timed"] == 6
    assert document["seconds_per_step"] > 0
    assert document["machine"]["cores"] == os.cpu_count()
    assert result.frozen_accuracy is None
    model = checkpoint.build_model(checkpoint.load(result.checkpoint))
    assert train.accuracy(model, data.test_x, data.test_y) == result.live_accuracy
    assert str(tmp_path) not in (tmp_path / "run" / "model.ckpt").read_bytes().decode("latin1")


def test_every_update_follows_the_schedule_and_the_limit_of_the_gradient(tmp_path, data):
    quiet = {**SMALL, "optimizer": "sgd", "weight_decay": 0.0, "momentum": 0.0}
    still = train.train(recipe(save_path=tmp_path / "still", **{**quiet, "lr": 1e-9}), data=data).checkpoint
    config = recipe(save_path=tmp_path / "run", **{**quiet, "lr": 0.5, "grad_clip": 1e-8})
    result = train.train(config, data=data)
    assert [row["lr"] for row in result.history] == [train.learning_rate(config, step, 3) for step in (2, 5)]
    before, after = (checkpoint.load(path).group("model")["stem.weight"] for path in (still, result.checkpoint))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-6)


def test_weight_decay_falls_on_kernels_and_matrices_only():
    model = train._network(train._resolve(recipe(**SMALL), None), digits(), torch.Generator().manual_seed(0))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {
        names[id(parameter)]: group["weight_decay"]
        for group in train._optimizer(model, recipe(weight_decay=0.25)).param_groups
        for parameter in group["params"]
    }
    kernels = [n for n in names.values() if n.endswith(".weight") and "bn" not in n and "shortcut.2" not in n]
    assert decay == {name: 0.25 if name in kernels else 0.0 for name in names.values()}


def test_training_learns(tmp_path, data):
    longer = {**SMALL, "widths": (16, 16), "epochs": 15, "batch_size": 16, "lr": 2e-2}
    result = train.train(recipe(save_path=tmp_path, **longer), data=data)
    assert result.history[-1]["loss"] < 0.8 * result.history[0]["loss"]
    assert result.history[-1]["train_accuracy"] > 0.3


@pytest.mark.parametrize(("loss", "where"), [("CLK", "group"), ("CLM", "block"), ("CL", "group"), ("CLK", "conv")])
def test_a_student_is_guided_and_its_accuracy_is_the_frozen_networks(tmp_path, data, teacher, loss, where):
    # versatile: two timesteps from a teacher of three
    result = train.train(student(teacher, tmp_path, loss=loss, taps=where), data=data)
    row = result.history[-1]
    assert row["logit"] > 0.0
    assert (row["membrane"] > 0.0) == (loss != "CL")
    expected = row["cross_entropy"] + 3.0 * row["logit"] + row["membrane"]
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    frozen = freeze(checkpoint.build_model(checkpoint.load(result.checkpoint)))
    logits = frozen(torch.from_numpy(data.test_x)).numpy()
    assert result.frozen_accuracy == float(np.mean(np.argmax(logits, axis=1) == data.test_y))
    assert row["frozen_accuracy"] == result.frozen_accuracy
    assert set(result.spike_rates) == {name for name, m in frozen.named_modules() if isinstance(m, LIF)}


@pytest.fixture(scope="module")
def versatile(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("versatile")
    longer = {"timesteps": 4, "epochs": 8, "widths": (8, 8), "lr": 2e-2}
    return train.train(recipe(save_path=folder, **{**SMALL, **longer}), data=data).checkpoint


def membranes(model: nn.Module, pixels: np.ndarray) -> list[torch.Tensor]:
    lifs = taps(model, "group")
    for lif in lifs:
        lif.tap = True
    with torch.no_grad():
        model.eval()(torch.from_numpy(pixels))
    return [lif.last_h for lif in lifs]


@pytest.mark.parametrize("t", [1, 2, 3, 4])
def test_one_teacher_of_four_steps_guides_students_of_one_to_four(tmp_path, data, versatile, t) -> None:
    """By shape: its first t membranes are those it would have if it ran t steps. By result: students come nearer."""
    whole = checkpoint.load_model(versatile)
    cut = build({**whole.config, "timesteps": t})
    cut.load_state_dict(whole.state_dict())
    for long, short in zip(membranes(whole, data.test_x), membranes(cut, data.test_x), strict=True):
        assert (long.shape[0], short.shape[0]) == (4, t)
        assert torch.equal(long[:t], short)
    guided = {"timesteps": t, "start": "scratch", "epochs": 12, "batch_size": 16, "lr": 5e-3}
    result = train.train(student(versatile, tmp_path / "guided", **guided), data=data)
    alone = train.train(student(versatile, tmp_path / "alone", **guided, loss_weights=(1.0, 0.0, 0.0)), data=data)
    assert result.history[-1]["membrane"] < 0.9 * result.history[0]["membrane"]
    assert result.history[-1]["membrane"] < 0.9 * alone.history[-1]["membrane"]
    trained = checkpoint.load_model(result.checkpoint)
    assert all(h.shape[0] == t for h in membranes(trained, data.test_x))
    assert result.frozen_accuracy is not None


def test_the_accuracy_is_measured_on_what_freeze_returns(tmp_path, data, teacher, monkeypatch):
    class Threes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(torch.full((x.shape[0],), 3), 10)

    monkeypatch.setattr("mdsnn.freeze.freeze", lambda model: Threes())
    result = train.train(student(teacher, tmp_path, epochs=1), data=data)
    assert result.frozen_accuracy == float(np.mean(data.test_y == 3))
    assert result.frozen_accuracy != result.live_accuracy


def test_a_student_starts_from_its_teachers_weights_unless_told(teacher, tmp_path, data):
    source = checkpoint.build_model(checkpoint.load(teacher)).state_dict()
    tiny = {"epochs": 1, "lr": 1e-12, "weight_decay": 0.0}
    close = {}
    for setting, start in (("qamd", None), ("student", None), ("qamd", "scratch")):
        config = student(teacher, tmp_path / f"{setting}-{start}", setting=setting, start=start, **tiny)
        model = checkpoint.build_model(checkpoint.load(train.train(config, data=data).checkpoint))
        close[setting, start] = torch.allclose(model.state_dict()["stem.weight"], source["stem.weight"], atol=1e-6)
        assert model.config["weight_bits"] == 4
    assert close == {("qamd", None): True, ("student", None): True, ("qamd", "scratch"): False}


def test_taps_are_off_and_the_teacher_unchanged_after_a_run(teacher, tmp_path, data):
    before = teacher.read_bytes()
    train.train(student(teacher, tmp_path), data=data)
    assert teacher.read_bytes() == before
    assert len(taps(checkpoint.build_model(checkpoint.load(teacher)), "group")) == 2


def test_the_seed_decides_everything_and_no_global_state_is_touched(tmp_path, data):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    content = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = recipe(save_path=tmp_path / name, **{**SMALL, "seed": seed})
        content[name] = train.train(config, data=data).checkpoint.read_bytes()
    assert content["a"] == content["b"]
    assert content["a"] != content["c"]
    assert torch.equal(torch.get_rng_state(), state)


def test_threads_are_given_back(tmp_path, data):
    seen = []
    config = recipe(save_path=tmp_path, **{**SMALL, "epochs": 1, "threads": 2})
    train.train(config, data=data, progress=lambda _: seen.append(torch.get_num_threads()))
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1


def test_event_frames_train_each_model_on_its_own_window(tmp_path, data):
    rng = np.random.default_rng(0)
    frames = {name: rng.integers(0, 3, (3, 30, 2, 8, 8), np.uint8) for name in ("train_x", "test_x")}
    labels = {name: rng.integers(0, 3, 30) for name in ("train_y", "test_y")}
    events = Dataset(
        **frames, **labels, mean=(0.0, 0.0), std=(1.0, 1.0), labels=("a", "b", "c"), coding="events", name="e"
    )
    config = recipe(save_path=tmp_path / "t", **{**SMALL, "epochs": 1, "timesteps": 3})
    teacher = train.train(config, data=events).checkpoint
    result = train.train(student(teacher, tmp_path / "s", epochs=1, timesteps=2), data=events)
    assert 0.0 <= result.frozen_accuracy <= 1.0
    assert json.loads((tmp_path / "s" / "recipe.json").read_text())["recipe"]["data"] == "e"


# ---------------------------------------------------------------------------------------- stopping, going on


class Stop:
    """A progress callback that is Ctrl-C at one moment."""

    def __init__(self, epoch: int, step: int) -> None:
        self.moment = (epoch, step)

    def __call__(self, event: train.Progress) -> None:
        if (event.epoch, event.step) == self.moment:
            raise KeyboardInterrupt


@pytest.mark.parametrize("setting", ["original", "student", "qamd"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, data, teacher, setting, optimizer):
    def config(name: str) -> TrainConfig:
        changes = {"epochs": 3, "shift": 1, "cutout": 2, "optimizer": optimizer, "lr": 1e-2}
        if setting == "original":
            return recipe(save_path=tmp_path / name, **{**SMALL, **changes})
        return student(teacher, tmp_path / name, setting=setting, alpha="ema", **changes)

    whole = train.train(config("whole"), data=data)
    for moment in ((0, 2), (1, 3), (1, 1), (2, 2)):  # in the first epoch, just after it, in the second, in the third
        with pytest.raises(KeyboardInterrupt, match=r"interrupted; . of 3 epochs are saved .*--resume"):
            train.train(config("cut"), data=data, progress=Stop(*moment), resume=True)
        assert not [name for name in os.listdir(tmp_path / "cut") if name.startswith(".")]
        assert not (tmp_path / "cut" / "model.ckpt").exists()
    resumed = train.train(config("cut"), data=data, resume=True)
    assert resumed.checkpoint.read_bytes() == whole.checkpoint.read_bytes()
    for name in ("metrics.csv", "metrics.jsonl", "last.ckpt"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    again = train.train(config("cut"), data=data, resume=True)  # nothing left to do: measures again, the same
    assert again.checkpoint.read_bytes() == whole.checkpoint.read_bytes()
    assert (again.seconds_per_step, again.live_accuracy) == (0.0, whole.live_accuracy)


@pytest.mark.parametrize("setting", ["original", "qamd"])
def test_a_run_in_slices_of_time_ends_with_the_same_bits(tmp_path, data, teacher, setting, monkeypatch):
    def config(name: str) -> TrainConfig:
        changes = {"epochs": 2, "shift": 1, "cutout": 2, "lr": 1e-2}
        if setting == "original":
            return recipe(save_path=tmp_path / name, **{**SMALL, **changes})
        return student(teacher, tmp_path / name, **changes)

    whole = train.train(config("whole"), data=data)
    seen = []
    for finished in (False,) * 5 + (True,):  # six steps, a process for each: three within each epoch
        monkeypatch.setattr(torch, "randperm", _once(torch.randperm))
        result = train.train(
            config("cut"), data=data, max_minutes=1e-9, resume=True, progress=lambda e: seen.append((e.epoch, e.step))
        )
        monkeypatch.undo()
        assert result.finished == finished
        assert (tmp_path / "cut" / "model.ckpt").exists() == finished
        if not finished:
            assert (result.live_accuracy, result.checkpoint.name) == (None, "last.ckpt")
            assert checkpoint.build_model(checkpoint.load(result.checkpoint)) is not None
    assert seen == [(0, 1), (0, 2), (1, 3), (1, 1), (1, 2), (2, 3)]
    assert result.checkpoint.read_bytes() == whole.checkpoint.read_bytes()
    for name in ("metrics.csv", "metrics.jsonl", "last.ckpt"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def _once(function):
    """`function`, which may be called one time: a process draws the order of one epoch."""
    calls = []

    def limited(*args, **keywords):
        calls.append(args)
        assert len(calls) == 1
        return function(*args, **keywords)

    return limited


def test_a_limit_of_time_that_is_none_is_refused_and_a_long_one_changes_nothing(tmp_path, data):
    for minutes in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="max_minutes"):
            train.train(recipe(save_path=tmp_path / "no", **SMALL), data=data, max_minutes=minutes)
    assert not (tmp_path / "no").exists()
    free = train.train(recipe(save_path=tmp_path / "free", **SMALL), data=data)
    held = train.train(recipe(save_path=tmp_path / "held", **SMALL), data=data, max_minutes=60)
    assert held.finished
    assert held.checkpoint.read_bytes() == free.checkpoint.read_bytes()


def test_a_row_within_an_epoch_that_does_not_fit_is_refused(tmp_path, data):
    config = recipe(save_path=tmp_path, **SMALL)
    last = train.train(config, data=data, max_minutes=1e-9).checkpoint
    good = checkpoint.load(last)
    for change in ({"step": 3}, {"step": 0}, {"step": 0.5}, {"loss": "x"}, {"epoch": 2, "again": True}):
        row = {**good.document["history"][0], **change}
        rows = [row, row] if "again" in change else [row]
        document = {**good.document, "history": rows}
        last.write_bytes(pack(dict(good.tensors), document, checkpoint.KEY))
        with pytest.raises(CheckpointError, match="does not fit its history"):
            train.train(config, data=data, resume=True)


RUN = """
import json, sys, torch
torch.set_num_threads(1)
from mdsnn.train import recipe, train
train(recipe(**json.loads(sys.argv[1])), resume=True, progress=lambda e: print(e.epoch, e.step, flush=True))
"""


def test_a_killed_process_leaves_whole_files_and_resumes_to_the_same_bits(tmp_path):
    def changes(name: str) -> dict[str, object]:
        shape = {"blocks": [1], "widths": [4], "timesteps": 2, "epochs": 6, "batch_size": 256}
        return {"save_path": str(tmp_path / name), **shape}

    def stopped(by: signal.Signals, epoch: int) -> subprocess.Popen:
        command = [sys.executable, "-c", RUN, json.dumps(changes("cut"))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.stdout.readline().split() != [str(epoch), "1"]:
            assert process.poll() is None
        process.send_signal(by)
        process.talk = process.communicate()[1]
        return process

    assert stopped(signal.SIGKILL, 2).returncode == -signal.SIGKILL
    assert checkpoint.load(tmp_path / "cut" / "last.ckpt").epoch >= 2
    interrupted = stopped(signal.SIGINT, 4)
    assert interrupted.returncode != 0
    assert re.search(r"interrupted; [45] of 6 epochs are saved in .* Go on with resume", interrupted.talk)
    runs = [train.train(recipe(**changes(name)), resume=True) for name in ("cut", "whole")]
    assert runs[0].checkpoint.read_bytes() == runs[1].checkpoint.read_bytes()


def test_an_earlier_run_is_kept_unless_forced_or_resumed(tmp_path, data):
    config = recipe(save_path=tmp_path, **{**SMALL, "epochs": 1})
    first = train.train(config, data=data).checkpoint.read_bytes()
    with pytest.raises(StorageError, match="exists and is kept"):
        train.train(config, data=data)
    other = dataclasses.replace(config, seed=1, lr=0.01)
    with pytest.raises(ConfigError, match=r"not the same recipe: lr was 0.004, is 0.01, seed was 0, is 1"):
        train.train(other, data=data, resume=True)
    shorter = dataclasses.replace(data, train_x=data.train_x[1:], train_y=data.train_y[1:])
    with pytest.raises(ConfigError, match="data_sha256 was"):
        train.train(config, data=shorter, resume=True)
    assert (tmp_path / "model.ckpt").read_bytes() == first
    with pytest.raises(KeyboardInterrupt, match="0 of 1 epochs are saved"):
        train.train(other, data=data, force=True, progress=Stop(0, 1))
    assert not (tmp_path / "last.ckpt").exists()  # the old run's files do not outlive its recipe


def test_resuming_replaces_no_model_that_this_run_did_not_make(tmp_path, data, teacher):
    (tmp_path / "model.ckpt").write_bytes(teacher.read_bytes())
    with pytest.raises(StorageError, match=r"model.ckpt: exists and is kept"):
        train.train(recipe(save_path=tmp_path, **SMALL), data=data, resume=True)
    with pytest.raises(ConfigError, match=r"the teacher lies in save_path"):
        train.train(student(tmp_path / "model.ckpt", tmp_path), data=data, force=True)
    assert (tmp_path / "model.ckpt").read_bytes() == teacher.read_bytes()


def test_a_damaged_last_checkpoint_is_an_error_not_a_fresh_start(tmp_path, data):
    config = recipe(save_path=tmp_path, **{**SMALL, "epochs": 1})
    train.train(config, data=data)
    content = bytearray((tmp_path / "last.ckpt").read_bytes())
    content[-1] ^= 1
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match="sha256"):
        train.train(config, data=data, resume=True)


def test_a_folder_that_cannot_be_is_an_error_before_any_training(tmp_path, data):
    (tmp_path / "file").write_text("x")
    started = time.monotonic()
    with pytest.raises(StorageError):
        train.train(recipe(save_path=tmp_path / "file" / "run"), data=data)
    assert time.monotonic() - started < 5


# ------------------------------------------------------------------------------------------------- teachers


def test_a_teacher_that_does_not_fit_is_refused(tmp_path, data, teacher):
    with pytest.raises(ConfigError, match=r"a teacher of 3 timesteps cannot guide a student of 4"):
        train.train(student(teacher, tmp_path / "a", timesteps=4), data=data)
    with pytest.raises(CheckpointError, match=r"another shape than its student, first at .*--start scratch"):
        train.train(student(teacher, tmp_path / "b", widths=(4, 8)), data=data)
    with pytest.raises(ConfigError, match="2 groups of blocks and 1 of widths"):
        train.train(student(teacher, tmp_path / "c", widths=(4,)), data=data)
    fewer = dataclasses.replace(data, train_y=data.train_y % 5, test_y=data.test_y % 5, labels=tuple("abcde"))
    with pytest.raises(CheckpointError, match="another task than its student: classes 10 against 5"):
        train.train(student(teacher, tmp_path / "d", start="scratch"), data=fewer)
    config = student(teacher, tmp_path / "e", start="scratch", blocks=(1, 1, 1), widths=(4, 6, 8))
    with pytest.raises(TrainingError, match="teacher taps against"):
        train.train(config, data=data)


def test_a_teacher_in_a_pytorch_file_is_read_by_the_recipes_shape(tmp_path, data, teacher):
    model = checkpoint.build_model(checkpoint.load(teacher))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "t.pth")
    shape = {"blocks": SMALL["blocks"], "widths": SMALL["widths"]}
    result = train.train(student(tmp_path / "t.pth", tmp_path / "s", epochs=1, **shape), data=data)
    assert result.history[0]["logit"] > 0.0
    with pytest.raises(CheckpointError, match="another architecture"):
        train.train(student(tmp_path / "t.pth", tmp_path / "w", blocks=(1, 1), widths=(4, 8)), data=data)


def test_a_gpu_that_is_not_there_is_said(tmp_path, data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingError, match="sees no GPU"):
        train.train(recipe(save_path=tmp_path, device="cuda"), data=data)


# ---------------------------------------------------------------------------------------------- NaN and rates


@pytest.mark.parametrize(
    ("setting", "poison", "words"),
    [
        ("original", lambda m: m.groups[1][0].bn1.weight.data.fill_(math.nan), r"'groups.1.0.bn1.weight'"),
        ("student", lambda m: m.groups[1][0].bn1.weight.data.fill_(math.nan), r"'groups.1.0.bn1.weight'"),
        ("original", lambda m: m.groups[0][0].conv2.weight.data.fill_(3e38), r"the output of layer 'groups.0.0.conv2'"),
        ("original", lambda m: m.readout.bias.data.fill_(math.inf), r"the loss is nan; .* parameter 'readout.bias'"),
        ("student", lambda m: m.readout.bias.data.fill_(math.nan), r"epoch 1: the loss is nan; .*'readout.bias'"),
    ],
)
def test_a_nan_stops_with_the_name_of_its_layer(tmp_path, data, monkeypatch, setting, poison, words):
    make = train._network

    def poisoned(*args: object) -> nn.Module:
        model = make(*args)
        poison(model)
        return model

    monkeypatch.setattr(train, "_network", poisoned)
    with pytest.raises(TrainingError, match=words):
        train.train(recipe("digits", setting, save_path=tmp_path, **SMALL), data=data)
    assert not (tmp_path / "last.ckpt").exists()


def test_a_gradient_that_is_not_finite_is_named_before_it_spoils_a_weight(tmp_path, data, monkeypatch):
    make = train._network

    class Burst(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf

    def poisoned(*args: object) -> nn.Module:
        model = make(*args)
        model.stem_bn.register_forward_hook(lambda _m, _i, out: Burst.apply(out))
        return model

    monkeypatch.setattr(train, "_network", poisoned)
    with pytest.raises(
        TrainingError, match=r"the gradient is not finite; this begins in the gradient of 'stem_bn.bias'"
    ):
        train.train(recipe(save_path=tmp_path, **SMALL), data=data)


def test_spike_rates_count_the_neuron_steps_that_fire():
    class Constant(nn.Module):
        """Currents 1.0 (fires at each of 4 steps) and 0.3 (h = .3, .45, .525: fires at the third), half and half."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = LIF(4), LIF(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            current = torch.where(x > 127, 1.0, 0.3).unsqueeze(0)
            spikes = self.first(current)
            self.second(torch.zeros_like(current))
            return spikes.mean(dim=(0, 3, 4))

    x = np.zeros((6, 1, 2, 2), np.uint8)
    x[..., 0] = 255
    rates = train.spike_rates(Constant().train(), x, batch_size=4)
    assert rates == {"first": (1.0 + 0.25) / 2, "second": 0.0}


def test_predict_keeps_the_mode_and_takes_the_first_of_equal_logits():
    class Ties(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return torch.tensor([[1, 5, 5]]).repeat(x.shape[0], 1)

    model = Ties().train()
    x = np.zeros((5, 1, 2, 2), np.uint8)
    assert train.accuracy(model, x, np.array([1, 1, 2, 0, 1])) == 0.6
    assert model.training
