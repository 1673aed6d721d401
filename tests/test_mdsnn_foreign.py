"""PyTorch files of other programs: read without running them, and matched to our networks by name alone."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from commands import TINY, assert_one_line, call
from mdsnn import checkpoint, foreign
from mdsnn.kernels.errors import CheckpointError, InputError
from mdsnn.layers import QuantBatchNorm2d
from mdsnn.models import build

SMALL = {"model": "ms_resnet", "blocks": [2, 1], "widths": [4, 6], "in_channels": 1, "size": 8, "timesteps": 2}
VGG = {**SMALL, "model": "vgg", "blocks": [1, 2], "hidden": 5}


def network(seed: int, config: dict = SMALL) -> nn.Module:
    """A network with nothing at its first value."""
    generator = torch.Generator().manual_seed(seed)
    model = build(config)
    for name, value in model.state_dict().items():
        if not name.endswith(("alpha", "alpha_batches")):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
    return model.eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def renamed(model: nn.Module, *changes: tuple[str, str]) -> dict[str, np.ndarray]:
    """A model's tensors under other names, in another order, with PyTorch's counters and without membrane scales."""
    out = {}
    for name, value in sorted(model.state_dict().items()):
        if name.endswith(("alpha", "alpha_batches")):
            continue
        for ours, theirs in changes:
            name = name.replace(ours, theirs)
        out[name] = value.numpy()
        if name.endswith("running_mean"):
            out[name.replace("running_mean", "num_batches_tracked")] = np.array(3)
    return out


TORCHVISION = (
    *(("stem_bn.", "bn1."), ("stem.", "conv1."), ("groups.0.", "layer1."), ("groups.1.", "layer2.")),
    *(("shortcut.1", "downsample.0"), ("shortcut.2", "downsample.1"), ("readout", "fc")),
)
SEQUENTIAL = (  # as MS-ResNet's authors call theirs, each BN within a module of its own
    *(("stem_bn.", "conv1.1.bn."), ("stem.", "conv1.0."), ("groups.0.", "conv2_x."), ("groups.1.", "conv3_x.")),
    *((".conv1.", ".residual_function.1."), (".bn1.", ".residual_function.2.bn."), (".conv1.1.", "conv1.1.")),
    *((".conv2.", ".residual_function.4."), (".bn2.", ".residual_function.5.bn.")),
    *(("shortcut.1", "shortcut.0"), ("shortcut.2", "shortcut.1.bn"), ("readout", "linear")),
)
WRAPPED = (
    *(("stem_bn.", "backbone.stem.bn."), ("stem.", "backbone.stem.conv."), ("groups.", "backbone.stages.")),
    *((".conv1.", ".conv1.layer.module."), (".conv2.", ".conv2.layer.module."), (".bn1.", ".bn1.bn.")),
    *(("backbone.backbone.", "backbone."), ("readout", "head.classifier")),
)


@pytest.mark.parametrize("changes", [(), TORCHVISION, SEQUENTIAL, WRAPPED], ids=["ours", "layers", "lists", "wrapped"])
def test_every_tensor_finds_its_place_by_its_name(changes) -> None:
    theirs, ours = network(1), network(2)
    assert not same(theirs, ours)
    foreign.fit(ours, renamed(theirs, *changes), "x.pth")
    assert same(ours, theirs)


def test_numbers_are_in_natural_order() -> None:
    """Twelve blocks; layer10 is behind layer9."""
    config = {**SMALL, "blocks": [12], "widths": [4]}
    theirs, ours = network(1, config), network(2, config)
    foreign.fit(ours, renamed(theirs, *TORCHVISION), "x.pth")
    assert same(ours, theirs)
    config = {**SMALL, "blocks": [1] * 3, "widths": [4] * 3}
    theirs, ours = network(1, config), network(2, config)
    groups = [(f"groups.{group}.", f"layer{group + 8}.") for group in range(3)]
    foreign.fit(ours, renamed(theirs, *groups, *TORCHVISION), "x.pth")
    assert same(ours, theirs)


def test_a_vgg_of_numbered_features() -> None:
    theirs, ours = network(1, VGG), network(2, VGG)
    order = [("stem.", 0), ("stem_bn.", 1), ("groups.0.0.conv.", 3), ("groups.0.0.bn.", 4), ("groups.1.0.conv.", 7)]
    order += [("groups.1.0.bn.", 8), ("groups.1.1.conv.", 10), ("groups.1.1.bn.", 11)]
    changes = [(name, f"features.{place}.") for name, place in order]
    changes += [("hidden_bn.", "features.99."), ("hidden.", "classifier.0."), ("readout.", "classifier.2.")]
    foreign.fit(ours, renamed(theirs, *changes), "x.pth")
    assert same(ours, theirs)


def test_a_table_says_what_no_rule_knows() -> None:
    theirs, ours = network(1), network(2)
    tensors = renamed(theirs, *TORCHVISION, ("layer1.1.conv2.", "odd.kernel."), ("fc.", "layer2.0.out."))
    tensors["aux.weight"] = np.ones((2, 2), np.float32)
    with pytest.raises(CheckpointError, match=r"x.pth: tensors of another architecture.*--teacher-names"):
        foreign.fit(ours, tensors, "x.pth")
    table = {"odd.kernel": "groups.0.1.conv2", "layer2.0.out": "readout", "aux": None}
    foreign.fit(ours, tensors, "x.pth", table)
    assert same(ours, theirs)
    with pytest.raises(CheckpointError, match=r"table of names has 'none', but no tensor"):
        foreign.fit(ours, tensors, "x.pth", {**table, "none": "stem"})
    with pytest.raises(CheckpointError, match=r"two tensors for stem.weight"):
        foreign.fit(ours, tensors, "x.pth", {**table, "conv1": "stem", "layer1.0.conv1": "stem"})


def test_a_bias_before_bn_goes_into_its_mean() -> None:
    """Checked against PyTorch's own layers: BN(conv(x) + b)."""
    theirs, ours = network(1), network(2)
    tensors = renamed(theirs, *TORCHVISION)
    biases = {"conv1": "stem", "layer1.1.conv2": "groups.0.1.conv2", "layer2.0.downsample.0": "groups.1.0.shortcut.1"}
    for name in biases:
        tensors[f"{name}.bias"] = np.random.default_rng(0).normal(size=len(tensors[f"{name}.weight"])).astype("f4")
    foreign.fit(ours, tensors, "x.pth")
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    got, want = copy.deepcopy(ours), theirs
    bn, kernel = want.state_dict(), torch.from_numpy(tensors["conv1.weight"])
    y = nn.functional.conv2d(x, kernel, torch.from_numpy(tensors["conv1.bias"]), padding=1)
    statistics = [bn[f"stem_bn.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    expected = nn.functional.batch_norm(y, *statistics, eps=got.stem_bn.eps)
    plain = nn.functional.conv2d(x, got.stem.weight, padding=1)
    torch.testing.assert_close(got.stem_bn(plain[None])[0], expected, rtol=1e-5, atol=1e-5)
    moved = {name for name, value in ours.state_dict().items() if not torch.equal(value, bn[name])}
    assert moved == {"stem_bn.running_mean", "groups.0.1.bn2.running_mean", "groups.1.0.shortcut.2.running_mean"}
    assert all(isinstance(got.get_submodule(name.rpartition(".")[0]), QuantBatchNorm2d) for name in moved)


def test_a_classifier_without_bias_gets_none() -> None:
    theirs, ours = network(1), network(2)
    tensors = renamed(theirs, *TORCHVISION)
    del tensors["fc.bias"]
    foreign.fit(ours, tensors, "x.pth")
    assert ours.readout.bias.tolist() == [0.0] * 10
    assert torch.equal(ours.readout.weight, theirs.readout.weight)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: x.pop("layer1.0.conv2.weight"), r"1 missing, such as groups.0.0.conv2.weight"),
        (lambda x: x.update({"layer1.0.conv3.weight": x["conv1.weight"]}), r"1 unknown, such as layer1.0.conv3.weight"),
        (lambda x: x.update({"conv1.weight": x["layer1.0.conv1.weight"]}), r"1 misshapen, such as stem.weight"),
        (lambda x: x.update({"stem.weight": x["conv1.weight"]}), r"unknown, such as conv1.weight"),
        (lambda x: x.update({"layer1.0.a_bn.weight": x.pop("layer1.0.bn1.weight")}), r"unknown, such as layer1.0.a_bn"),
        (lambda x: x.pop("bn1.running_var"), r"1 missing, such as stem_bn.running_var"),
        (lambda x: x.update({"fc.scale": x["fc.bias"]}), r"unknown, such as readout.scale"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(spoil: Callable, words: str) -> None:
    ours, before = network(2), network(2)
    tensors = renamed(network(1), *TORCHVISION)
    spoil(tensors)
    with pytest.raises(CheckpointError, match=words):
        foreign.fit(ours, tensors, "x.pth")
    assert same(ours, before)


@pytest.mark.parametrize(
    ("content", "words"),
    [("[1]", "is a JSON object"), ('{"a": 1}', "is a JSON object"), ("{", "no JSON"), ("[" * 9999, "no JSON")],
)
def test_a_table_that_is_none_is_one_error(tmp_path, content, words) -> None:
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(InputError, match=words):
        foreign.read_names(tmp_path / "names.json")


def test_commands_take_a_foreign_teacher_and_a_table(tmp_path) -> None:
    """One table for training and calibration; its content is part of what a resumed run must find again."""
    config = {**SMALL, "blocks": [1, 1], "widths": [4, 8], "norm": "tdbn"}
    theirs = {name: torch.from_numpy(x) for name, x in renamed(network(1, config), *TORCHVISION).items()}
    theirs["output.weight"], theirs["output.bias"] = theirs.pop("fc.weight"), theirs.pop("fc.bias")
    theirs["layer2.0.lif9.w"] = torch.ones(())
    torch.save({"net": {f"module.{name}": x for name, x in theirs.items()}, "epoch": 7}, tmp_path / "best.pth.tar")
    table = tmp_path / "names.json"
    table.write_text('{"layer2.0.lif9": null}')
    teacher = ("--teacher-path", tmp_path / "best.pth.tar", "--norm", "tdbn", *TINY)
    words = ("train", "--paper-setting", "qamd", *teacher, "--epochs", 1, "--save-path", tmp_path / "run")
    assert_one_line(call(*words), 2, "unknown, such as layer2.0.lif9.w", "--teacher-names")
    outcome = call(*words, "--teacher-names", table, "--max-minutes", 1e-9)
    assert outcome.code == 0, outcome
    table.write_text('{"layer2.0.lif9": null, "output": "readout"}')
    assert_one_line(call(*words, "--teacher-names", table, "--resume"), 2, "teacher_sha256 was")
    shape = ("--blocks", "1,1", "--widths", "4,8", "--time-window", 2, "--norm", "tdbn", "--teacher-names", table)
    outcome = call("quantize", tmp_path / "best.pth.tar", *shape, "--images", 20, "-o", tmp_path / "s.ckpt")
    assert outcome.code == 0, outcome
    assert checkpoint.load(tmp_path / "s.ckpt").config["blocks"] == [1, 1]
    ours = ("--teacher-path", tmp_path / "s.ckpt", "--teacher-names", table)
    outcome = call("train", "--paper-setting", "qamd", *ours, "--save-path", tmp_path / "other")
    assert_one_line(outcome, 2, "is for PyTorch files")


# ------------------------------------------------------------------------------------------------------- the file


def test_a_foreign_state_dictionary_is_read_by_name_in_a_process_without_a_shell(tmp_path, monkeypatch):
    seen = []
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (seen.append((a, k)), real(*a, **k))[1])
    model = network(4)
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "a b;c.pth")
    tensors = foreign.load(tmp_path / "a b;c.pth")
    other = build(model.config)
    checkpoint.apply(other, tensors, "a b;c.pth")
    assert same(other, model)
    (((command,), options),) = seen
    assert isinstance(command, list)
    assert not options.get("shell")


def test_half_precision_widens_and_what_is_no_tensor_is_named(tmp_path):
    torch.save({"a": torch.tensor([1.5], dtype=torch.bfloat16), "b": torch.tensor([True])}, tmp_path / "x.pth")
    tensors = foreign.load(tmp_path / "x.pth")
    assert {name: (x.dtype.name, x.tolist()) for name, x in tensors.items()} == {
        "a": ("float32", [1.5]),
        "b": ("uint8", [1]),
    }
    torch.save({"a": torch.zeros(1), "epoch": 3}, tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match=r"y.pth: not a PyTorch checkpoint .*'epoch' is no plain tensor"):
        foreign.load(tmp_path / "y.pth")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_foreign_file_runs_no_code(tmp_path):
    with open(tmp_path / "x.pth", "wb") as stream:
        pickle.dump({"a": Hostile(tmp_path / "owned")}, stream)
    torch.save({"a": Hostile(tmp_path / "owned")}, tmp_path / "y.pth")
    for name in ("x.pth", "y.pth"):
        with pytest.raises(CheckpointError, match="not a PyTorch checkpoint of plain tensors"):
            foreign.load(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_a_foreign_file_is_bounded_in_time_and_may_be_missing(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no such file"):
        foreign.load(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(b"")
    with pytest.raises(InputError, match="regular file of 1"):
        foreign.load(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="not a PyTorch checkpoint"):
        foreign.load(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"not read within 0.001 s"):
        foreign.load(tmp_path / "x.pth", timeout_s=0.001)


def test_memory_of_the_foreign_reader_is_bounded(tmp_path):
    # a small file that asks for a large tensor: a storage of 4 bytes, expanded to 256 MiB on the way out
    torch.save({"a": torch.zeros(1).expand(1 << 26)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"not a PyTorch checkpoint of plain tensors: .*([Mm]emory|alloc)"):
        foreign.load(tmp_path / "x.pth", megabytes=64)
