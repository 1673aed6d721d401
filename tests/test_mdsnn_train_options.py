"""What a recipe can ask for beyond the defaults: ablations, frozen last epochs, bf16, other models, TensorBoard."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commands import TINY, call, files
from mdsnn import checkpoint, train
from mdsnn.data import Dataset, digits
from mdsnn.kernels.errors import ConfigError, MissingError
from mdsnn.layers import LIF, QuantBatchNorm2d, QuantConv2d
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


def student(folder: Path, **changes: Any) -> TrainConfig:
    return recipe("digits", "student", save_path=folder, **{**SMALL, **changes})


# -------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize(
    ("changes", "integers"),
    [
        ({"weight_bits": 32}, False),
        ({"membrane_bits": 32}, False),
        ({"bn_bits": 32}, False),
        ({"weight_bits": 2, "membrane_bits": 8, "bn_bits": 4}, True),
    ],
)
def test_only_a_student_without_integers_has_no_frozen_accuracy(tmp_path, data, changes, integers) -> None:
    result = train.train(student(tmp_path, **{"epochs": 1, **changes}), data=data)
    assert (result.frozen_accuracy is not None) == integers
    assert 0.0 <= result.live_accuracy <= 1.0
    built = checkpoint.load(result.checkpoint).config
    assert {name: built[name] for name in changes} == changes
    assert set(result.spike_rates) == {
        name for name, m in checkpoint.load_model(result.checkpoint).named_modules() if isinstance(m, LIF)
    }


def test_the_command_says_why_an_ablation_has_the_live_accuracy_alone(tmp_path: Path) -> None:
    words = ("train", "--paper-setting", "student", *TINY, "--epochs", 1, "--membrane-bits", 32)
    outcome = call(*words, "--save-path", tmp_path)
    assert outcome.code == 0, outcome
    assert "live; what stays at 32 bits has no integers" in outcome.out


# ------------------------------------------------------------------------------------------------ last epochs


def test_frozen_last_epochs_move_weights_but_no_statistic(tmp_path, data) -> None:
    """The same recipe stopped where freezing begins, and at its end."""
    config = student(tmp_path, epochs=4, freeze_epochs=2, alpha="ema")
    at: dict[int, dict[str, np.ndarray]] = {}

    def keep(event: train.Progress) -> None:
        if event.metrics:
            at[event.epoch] = checkpoint.load(tmp_path / "last.ckpt").group("model")

    train.train(config, data=data, progress=keep)

    def moved(begin: int, end: int) -> set[str]:
        names = {name for name in at[1] if not np.array_equal(at[begin][name], at[end][name])}
        return {name.rsplit(".", 1)[-1] for name in names}

    statistics = {"running_mean", "running_var", "alpha", "alpha_batches"}
    assert moved(1, 2) >= statistics
    assert not moved(2, 4) & statistics
    assert "weight" in moved(2, 4)


# ------------------------------------------------------------------------------------------------------- bf16


def test_bf16_stays_within_products_and_out_of_what_is_measured(tmp_path, data, monkeypatch) -> None:
    kinds: dict[str, set[torch.dtype]] = {}
    make = train._network

    def watched(*arguments: Any) -> torch.nn.Module:
        model = make(*arguments)
        for module in model.modules():
            kind = type(module).__name__
            if isinstance(module, QuantConv2d | QuantBatchNorm2d | LIF):
                module.register_forward_hook(
                    lambda _m, _i, out, kind=kind: kinds.setdefault(kind, set()).add(out.dtype)
                )
        sums = type(model.stem).sums
        monkeypatch.setattr(
            type(model.stem),
            "sums",
            lambda self, *rest: (lambda y: kinds.setdefault("sums", set()).add(y.dtype) or y)(sums(self, *rest)),
        )
        return model

    monkeypatch.setattr(train, "_network", watched)
    stopped = train.train(student(tmp_path / "a", precision="bf16"), data=data, max_minutes=1e-9)
    assert not stopped.finished
    assert kinds.pop("sums") == {torch.bfloat16}
    assert set(kinds) == {"QuantConv2d", "QuantBatchNorm2d", "LIF"}
    assert set().union(*kinds.values()) == {torch.float32}
    monkeypatch.undo()
    result = train.train(student(tmp_path / "a", precision="bf16"), data=data, resume=True)
    model = checkpoint.load_model(result.checkpoint)
    assert train.accuracy(model, data.test_x, data.test_y) == result.live_accuracy
    plain = train.train(student(tmp_path / "b"), data=data)
    losses = [[row["loss"] for row in run.history] for run in (result, plain)]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.1)


def test_compile_is_asked_for_the_network_and_its_teacher(tmp_path, data, monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    shape = {**SMALL, "blocks": None, "widths": None, "epochs": 1}
    teacher = files().teacher
    config = recipe("digits", "qamd", save_path=tmp_path / "a", teacher_path=teacher, compile=True, **shape)
    same = train.train(config, data=data).checkpoint
    assert len(compiled) == 2
    config = recipe("digits", "qamd", save_path=tmp_path / "b", teacher_path=teacher, **shape)
    plain = train.train(config, data=data).checkpoint
    assert len(compiled) == 2
    groups = [checkpoint.load(path).group("model") for path in (same, plain)]
    assert all(np.array_equal(groups[0][name], groups[1][name]) for name in groups[0])


# ------------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("model", ["vgg", "ms_resnet"])
def test_a_student_takes_its_teachers_network(tmp_path, data, model) -> None:
    """Also what no recipe names, such as the hidden layer of a VGG."""
    config = recipe(save_path=tmp_path / "t", model=model, **{**SMALL, "epochs": 1})
    teacher = train.train(config, data=data).checkpoint
    shape = {**SMALL, "blocks": None, "widths": None, "epochs": 1}
    config = recipe("digits", "qamd", save_path=tmp_path / "s", teacher_path=teacher, **shape)
    result = train.train(config, data=data)
    theirs, ours = (checkpoint.load(path).config for path in (teacher, result.checkpoint))
    assert ours["model"] == model
    assert {name for name in ours if ours[name] != theirs[name]} == {"weight_bits", "membrane_bits", "bn_bits"}
    document = json.loads((tmp_path / "s" / "recipe.json").read_text())["recipe"]
    assert (document["blocks"], document["widths"], document["model"]) == ([1, 1], [4, 6], model)


OTHER = {"stem": "imagenet", "norm": "tdbn", "tau": 0.25, "v_th": 1.0, "reset": "soft", "surrogate": "rectangle"}


def test_a_student_has_its_teachers_stem_norm_and_neurons_unless_told_otherwise(tmp_path, data) -> None:
    teacher = train.train(recipe(save_path=tmp_path / "t", **{**SMALL, "epochs": 1, **OTHER}), data=data).checkpoint
    shape = {**SMALL, "blocks": None, "widths": None, "epochs": 1}
    run = {"save_path": tmp_path / "s", "teacher_path": teacher}
    result = train.train(recipe("digits", "qamd", **run, **{**shape, "tau": 0.75}), data=data)
    found = checkpoint.load(result.checkpoint)
    assert {name: found.config[name] for name in OTHER} == {**OTHER, "tau": 0.75}
    assert {name: found.document["recipe"][name] for name in OTHER} == {**OTHER, "tau": 0.75}
    assert result.frozen_accuracy is not None


def test_without_a_teacher_they_are_the_usual_ones(tmp_path, data) -> None:
    found = checkpoint.load(train.train(student(tmp_path, epochs=1), data=data, max_minutes=1e-9).checkpoint)
    usual = {"stem": "cifar", "norm": "bn", "tau": 0.5, "v_th": 0.5, "reset": "hard", "surrogate": "triangle"}
    assert {name: found.config[name] for name in usual} == usual


@pytest.mark.parametrize(
    ("name", "flip"), [("CIFAR10", True), ("ncaltech101", True), ("imagefolder", False), ("digits", False)]
)
def test_the_papers_sets_are_mirrored_and_unknown_images_are_not(name: str, flip: bool) -> None:
    assert recipe(name, data_path="x").flip == flip
    assert not recipe(name, data_path="x", flip=False).flip


@pytest.mark.parametrize(
    ("model", "depth", "blocks"),
    [(None, 18, [2, 2, 2, 2]), ("ms_resnet", 34, [3, 4, 6, 3]), ("vgg", 9, None), ("vgg", 16, None)],
)
def test_a_depth_names_a_network(model, depth, blocks) -> None:
    config = train._resolve(recipe("CIFAR10", model=model, depth=depth, data_path="x"), None)
    x, y = np.zeros((2, 3, 32, 32), np.uint8), np.zeros(2, np.int64)
    data = Dataset(x, y, x, y, (0.5,) * 3, (0.2,) * 3, ("a", "b"), "image", "none")
    with torch.device("meta"):
        built = train._network(config, data, torch.Generator())
    assert built.config["model"] == (model or "ms_resnet")
    if blocks:
        assert built.config["blocks"] == blocks
    convolutions = sum(isinstance(m, QuantConv2d) and m.kernel_size == (3, 3) for m in built.modules())
    assert convolutions == {18: 17, 34: 33, 9: 7, 16: 13}[depth]


def test_a_depth_of_another_family_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"depth = 18 is none of 9, 16 \(vgg\)"):
        TrainConfig(model="vgg", depth=18)


@pytest.mark.parametrize("changes", [{"quantizer": "mint"}, {"norm": "tdbn"}, {"checkpoint_activations": True}])
def test_what_the_models_offer_reaches_them(tmp_path, data, changes) -> None:
    result = train.train(student(tmp_path, **{"epochs": 1, **changes}), data=data)
    built = checkpoint.load(result.checkpoint).config
    assert {name: built[name] for name in changes} == changes
    assert result.frozen_accuracy is not None


# ------------------------------------------------------------------------------------------------- the command


def test_every_option_reaches_the_recipe(tmp_path: Path) -> None:
    """Written as the reference writes them, with underscores."""
    words = {
        "--kl_direction": ("literal", "direction", "literal"),
        "--loss_weights": ("1,2,0.5", "loss_weights", [1.0, 2.0, 0.5]),
        "--temperature": ("2.5", "temperature", 2.5),
        "--freeze_last_epochs": ("1", "freeze_epochs", 1),
        "--grad_clip": ("0.5", "grad_clip", 0.5),
        "--warmup_epochs": ("0", "warmup_epochs", 0.0),
        "--weight_bits": ("3", "weight_bits", 3),
        "--bn_bits": ("6", "bn_bits", 6),
        "--start": ("scratch", "start", "scratch"),
        "--stem": ("cifar", "stem", "cifar"),
        "--norm": ("tdbn", "norm", "tdbn"),
    }
    options = [part for option, (text, _, _) in words.items() for part in (option, text)]
    guided = ("--paper_setting", "qamd", "--teacher_path", files().teacher, "--time_window", 2, "--threads", 1)
    outcome = call("train", *guided, *options, "--amp", "--epochs", 1, "--save_path", tmp_path, "--json")
    assert outcome.code == 0, outcome
    found = json.loads(outcome.out)["recipe"]
    assert {name: found[name] for _, name, _ in words.values()} == {name: value for _, name, value in words.values()}
    assert found["precision"] == "bf16"


def test_a_limit_of_time_is_no_failure_of_the_command(tmp_path: Path) -> None:
    words = ("train", *TINY, "--epochs", 1, "--save-path", tmp_path)
    outcome = call(*words, "--max_minutes", 1e-9)
    assert outcome.code == 0, outcome
    assert "0 of 1 epochs" in outcome.err
    assert "--resume" in outcome.err
    assert not outcome.out
    outcome = call(*words, "--resume")
    assert outcome.code == 0, outcome
    assert "test accuracy" in outcome.out


# --------------------------------------------------------------------------------------------------- TensorBoard


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_event_files_hold_every_row_once_also_after_a_resume(tmp_path, data) -> None:
    config = student(tmp_path, epochs=3)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, data=data, tensorboard=True, progress=_stop_in_epoch_2)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [1, 2]
    result = train.train(config, data=data, tensorboard=True, resume=True)
    found = scalars(tmp_path)
    for name in ("loss", "train_accuracy", "lr"):
        assert [step for step, _ in found[name]] == [1, 2, 3]
        np.testing.assert_allclose([value for _, value in found[name]], [row[name] for row in result.history], 1e-6)
    assert [step for step, _ in found["frozen_accuracy"]] == [3]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def _stop_in_epoch_2(event: train.Progress) -> None:
    if (event.epoch, event.step) == (2, 1):
        raise KeyboardInterrupt


def test_without_tensorboard_one_line_says_so_before_any_training(tmp_path, data, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingError, match=r"pip install tensorboard"):
        train.train(student(tmp_path), data=data, tensorboard=True)
    assert not (tmp_path / "last.ckpt").exists()
