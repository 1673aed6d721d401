"""Calibration: codes, statistics and scales against their definitions, and what it does to a trained network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import assert_one_line, call
from mdsnn import calibrate as calibration
from mdsnn import checkpoint, data
from mdsnn.calibrate import Moments, best_alpha, best_codes, calibrate, convert
from mdsnn.export import artifact
from mdsnn.freeze import freeze
from mdsnn.kernels.errors import CheckpointError, ConfigError, FormatError, InputError
from mdsnn.kernels.formats import delta, weight_codes
from mdsnn.layers import LIF, QuantBatchNorm2d, QuantConv2d, Readout
from mdsnn.models import build, ms_resnet, vgg
from mdsnn.train import accuracy, digits_recipe, train

SMALL: dict[str, Any] = {"classes": 10, "in_channels": 1, "size": (8, 8), "timesteps": 3}


def pixels(count: int, seed: int = 0, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, channels, 8, 8)).astype(np.uint8)


def teacher(**over: Any) -> torch.nn.Module:
    """A full-precision network with random weights and BN parameters of either sign."""
    generator = torch.Generator().manual_seed(5)
    model = ms_resnet((1, 1), (8, 12), **{**SMALL, **over}, generator=generator).eval()
    for module in model.modules():
        if isinstance(module, QuantBatchNorm2d):
            for tensor, spread in ((module.weight, 1.0), (module.bias, 0.5), (module.running_mean, 0.3)):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * spread)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.3)
    return model


# ----------------------------------------------------------------------------------------------------------- weights


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), bits=st.integers(2, 8))
def test_codes_of_a_row_have_the_least_error_of_all_clips(seed: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(0.0, rng.lognormal(0.0, 1.0, (3, 1)), (3, 18))
    weight[2] = 0.0
    codes, peaks = best_codes(weight, bits)
    top = delta(bits)
    assert np.abs(codes).max() == top
    assert not codes[2].any()
    for row, code, peak in zip(weight, codes, peaks, strict=True):
        mine = ((code * peak / top - row) ** 2).sum()
        for share in np.linspace(0.3, 1.0, 36):
            clip = np.abs(row).max() * share or 1.0
            other = np.rint(np.clip(row / clip, -1.0, 1.0) * top) * clip / top
            assert mine <= ((other - row) ** 2).sum() + 1e-12


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_frozen_student_holds_the_codes_that_were_chosen(bits: int) -> None:
    """Eq. 3, applied to what is stored, gives the codes back: atanh undoes its tanh."""
    model = teacher()
    student = calibrate(model, pixels(16), weight_bits=bits)
    for name, layer in student.named_modules():
        if isinstance(layer, QuantConv2d):
            real = model.get_submodule(name).weight.detach().double().numpy()
            want, _ = best_codes(real.reshape(len(real), -1), layer.weight_bits)
            got, _ = weight_codes(layer.weight.detach().numpy(), layer.weight_bits)
            np.testing.assert_array_equal(got.reshape(want.shape), want)


def test_the_classifier_keeps_its_classes_order() -> None:
    """Its weights may be larger than Eq. 3 holds: they and the bias shrink by one factor."""
    model = teacher()
    readout = next(m for m in model.modules() if isinstance(m, Readout))
    readout.weight.data.mul_(9.0)
    readout.bias.data.normal_(generator=torch.Generator().manual_seed(1))
    student = calibrate(model, pixels(8))
    mine = next(m for m in student.modules() if isinstance(m, Readout))
    codes, alpha = weight_codes(mine.weight.detach().numpy(), 8)
    factor = float(mine.bias[0].detach() / readout.bias[0].detach())
    assert 0.0 < factor < 0.5
    np.testing.assert_allclose(mine.bias.detach(), readout.bias.detach() * factor, rtol=1e-5)
    error = codes * alpha / 127 - readout.weight.detach().numpy() * factor
    assert np.abs(error).max() <= alpha / 127


# ----------------------------------------------------------------------------------------------- statistics and alpha


@pytest.mark.parametrize("over", [{}, {"bn_bits": 2}, {"membrane_bits": 8}])
@pytest.mark.parametrize("grid", ["eq4", "wageubn"])
def test_every_channel_has_the_teachers_moments(grid: str, over: dict[str, int]) -> None:
    """Mean and deviation of every BN layer's outputs, in one batch, whatever gamma's and beta's grid."""
    model, x = teacher(bn_grid=grid), pixels(40, 3)
    student = calibrate(model, x, batch_size=40, weight_bits=8, **over)
    seen: list[dict[str, Moments]] = []
    for network in (model, student):
        found = {name: Moments() for name, m in network.named_modules() if isinstance(m, QuantBatchNorm2d)}
        for name, moments in found.items():
            network.get_submodule(name).register_forward_hook(lambda _m, _x, y, moments=moments: moments.add(y))
        with torch.no_grad():
            network(torch.from_numpy(x))
        seen.append(found)
    for name, want in seen[0].items():
        got = seen[1][name]
        inside = (want.mean.abs() + 4 * want.deviation < 8) & (want.deviation > 0.01)
        assert int(inside.sum()) > 4
        np.testing.assert_allclose(got.mean[inside], want.mean[inside], atol=0.01, err_msg=name)
        np.testing.assert_allclose(got.deviation[inside], want.deviation[inside], rtol=0.03, err_msg=name)


def test_moments_are_those_of_numpy_over_all_calls() -> None:
    x = np.random.default_rng(2).normal(3.0, 2.0, (2, 5, 4, 3, 3))
    moments = Moments()
    for part in (x[:, :2], x[:, 2:]):
        moments.add(torch.from_numpy(part))
    np.testing.assert_allclose(moments.mean, x.mean((0, 1, 3, 4)))
    np.testing.assert_allclose(moments.deviation, x.std((0, 1, 3, 4)))


def test_constant_and_dead_channels_stay_finite_and_where_they_are() -> None:
    model = teacher()
    bn = model.groups[0][0].bn1
    bn.weight.data[0], bn.bias.data[0] = 0.0, 0.25
    model.groups[0][0].conv1.weight.data[1] = 0.0
    student = calibrate(model, pixels(16))
    assert all(bool(v.isfinite().all()) for v in student.state_dict().values())
    outputs: list[torch.Tensor] = []
    student.groups[0][0].bn1.register_forward_hook(lambda _m, _x, y: outputs.append(y))
    with torch.no_grad():
        student(torch.from_numpy(pixels(16)))
    assert float((outputs[0][:, :, 0] - 0.25).abs().max()) <= 2.0**-9
    freeze(student)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("floor", [-8.0, -1.0])
def test_alpha_has_the_least_error(bits: int, floor: float) -> None:
    u = np.random.default_rng(bits).normal(-0.4, 0.5, 4000).clip(-7.9, 0.5)
    edges = np.linspace(-8.0, 8.0, 4097)
    counts = np.histogram(u, edges)[0].astype(np.float64)

    def error(alpha: float) -> float:
        stored = np.rint(np.clip(np.tanh(u) / alpha, -1.0, 1.0) * delta(bits)) * alpha / delta(bits)
        return float(((np.maximum(stored, floor) - np.maximum(u, floor)) ** 2).mean())

    mine = best_alpha(counts, bits, floor=floor)
    assert error(mine) <= min(error(a) for a in np.linspace(0.02, 1.0, 50)) * 1.02 + 1e-6
    assert best_alpha(counts, bits, floor=floor, above=0.97) > 0.97


def test_alpha_of_pre_fire_is_above_the_threshold() -> None:
    student = calibrate(teacher(quantize="pre_fire"), pixels(8))
    alphas = [float(m.alpha) for m in student.modules() if isinstance(m, LIF)]
    assert all(0.5 < alpha <= 1.0 for alpha in alphas)
    freeze(student)


# ------------------------------------------------------------------------------------------------ networks, refusals


def test_a_teacher_is_not_changed_and_the_result_is_the_same_again() -> None:
    model, x = teacher(), pixels(20)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, two = (calibrate(model, x).state_dict() for _ in range(2))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("coding", ["image", "events"])
def test_a_vgg_with_events_or_images_calibrates_and_freezes(coding: str) -> None:
    model = vgg((1, 1), (6, 8), hidden=12, **{**SMALL, "in_channels": 2, "coding": coding}).eval()
    x = pixels(12, 1, 2)
    frames = x if coding == "image" else np.stack([x % 3, x % 5, x % 2])
    ticks: list[tuple[int, int]] = []
    student = calibrate(model, frames, batch_size=5, progress=lambda done, of: ticks.append((done, of)))
    assert ticks == [(n, 6) for n in range(1, 7)]
    with torch.no_grad():
        assert freeze(student)(torch.from_numpy(frames)).shape == (12, 10)


def test_refusals() -> None:
    model = teacher()
    with pytest.raises(ConfigError, match="unknown bits width"):
        convert(model, width=4)
    with pytest.raises(FormatError, match="weight_bits"):
        convert(model, weight_bits=9)
    with pytest.raises(CheckpointError, match="quantized already"):
        calibrate(convert(model), pixels(8))
    with pytest.raises(CheckpointError, match="no `config`"):
        convert(torch.nn.Linear(2, 2))
    for bad in (pixels(8).astype(np.float32), pixels(8)[0], pixels(0)):
        with pytest.raises(InputError, match="pixels to calibrate on"):
            calibrate(model, bad)


def test_a_heavy_layer_without_bn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    student = convert(teacher())
    kinds = [(n, layer, False) for n, layer, _ in calibration._weighted(student)]
    kinds[0][1].weight.data.mul_(50.0)
    monkeypatch.setattr(calibration, "_weighted", lambda _model: iter(kinds))
    with torch.no_grad(), pytest.raises(ConfigError, match=r"layer 'stem': its weights reach .* no BN follows"):
        calibration._store_codes(student)


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits teacher, six epochs old."""
    folder = tmp_path_factory.mktemp("teacher")
    return train(digits_recipe(save_path=folder / "t", epochs=6, blocks=(1, 1), widths=(16, 32), threads=1)).checkpoint


def test_accuracy_survives_eight_bits_and_mostly_four(trained: Path, tmp_path: Path) -> None:
    """W8U8 within 1 point of its teacher, W4U4 within 3; as they stand, both lose far more."""
    for bits, most in ((8, 0.01), (4, 0.03)):
        output = tmp_path / f"{bits}.ckpt"
        words = ("--weight-bits", bits, "--membrane-bits", bits, "-o", output, "--json", tmp_path / f"{bits}.json")
        shown = call("quantize", trained, *words, "--images", 256)
        assert shown.code == 0, shown
        lines = [line.split("  ")[0] for line in shown.out.splitlines()]
        assert lines[-4:-1] == [
            "teacher, full precision",
            f"W{bits}U{bits}, quantized as it stands",
            f"W{bits}U{bits}, calibrated",
        ]
        found = json.loads((tmp_path / f"{bits}.json").read_text())
        assert (found["schema"], found["images"], found["test_images"]) == ("mdsnn.quantize/1", 256, 450)
        was, before, after = (found["accuracy"][key] for key in ("teacher", "before", "after"))
        assert was > 0.5
        assert after >= was - most
        assert before < after
        digits = data.digits()
        assert accuracy(freeze(checkpoint.load_model(output)), digits.test_x, digits.test_y) == after
        made = tmp_path / f"{bits}.mdsnn"
        assert call("export", output, "-o", made).code == 0
        assert artifact.load(made).labels == digits.labels


def test_a_pytorch_file_is_taken_with_its_shape(trained: Path, tmp_path: Path) -> None:
    model = checkpoint.load_model(trained)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "t.pth")
    words = ("--images", 32, "--limit", 20, "--json")
    shape = ("--blocks", "1,1", "--widths", "16,32")
    ours = call("quantize", trained, "-o", tmp_path / "a.ckpt", *words)
    theirs = call("quantize", tmp_path / "t.pth", "-o", tmp_path / "b.ckpt", *words, *shape)
    assert (ours.code, theirs.code) == (0, 0), theirs
    states = [checkpoint.load_model(tmp_path / f"{n}.ckpt").state_dict() for n in "ab"]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert_one_line(call("quantize", trained, "-o", tmp_path / "c.ckpt", *shape), 2, "for .pth files")
    assert_one_line(call("quantize", tmp_path / "t.pth", "-o", tmp_path / "c.ckpt"), 2, "t.pth")


def test_bad_input_of_the_command_is_one_line(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "s.ckpt"
    student = convert(checkpoint.load_model(trained))
    checkpoint.save(tmp_path / "w4.ckpt", student)
    other = build({**student.config, "classes": 7, "weight_bits": 32, "membrane_bits": 32, "bn_bits": 32})
    checkpoint.save(tmp_path / "seven.ckpt", other)
    assert_one_line(call("quantize", tmp_path / "w4.ckpt", "-o", output), 2, "w4.ckpt", "quantized already")
    assert_one_line(call("quantize", tmp_path / "seven.ckpt", "-o", output), 2, "seven.ckpt", "classes 7 against 10")
    assert_one_line(call("quantize", tmp_path / "none.ckpt", "-o", output), 2, "none.ckpt")
    assert_one_line(call("quantize", trained, "-o", output, "--data", "digit"), 2, "Did you mean 'digits'")
    assert_one_line(call("quantize", trained, "-o", output, "--weight-bits", "9"), 2, "--weight-bits")
    assert_one_line(call("quantize", trained, "-o", trained, "--force"), 2, "is read as an input")
    assert not output.exists()
    output.write_text("mine")
    assert_one_line(call("quantize", trained, "-o", output), 3, "exists and is kept")
