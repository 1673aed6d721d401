"""What freezing makes of real constants, layer by layer, and every student it refuses.

The integers are compared with the formulas of docs/arithmetic.md written out again here, and each frozen layer with
its live self on the same input.
"""

from __future__ import annotations

import copy
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from mdsnn.freeze import freeze, frozen_trace, plan_of, predictions, shortcut_saturation
from mdsnn.kernels.errors import InputError, LoweringError
from mdsnn.kernels.formats import Grid, delta
from mdsnn.layers import (
    LIF,
    EventInput,
    Flatten,
    GlobalSpikePool,
    Layer,
    PixelInput,
    QuantBatchNorm2d,
    QuantConv2d,
    QuantLinear,
    Readout,
    ShortcutQuant,
    SpikeMaxPool2d,
    SpikeSumPool2d,
)
from mdsnn.models import ms_resnet
from mdsnn.quantizers import quantize_bn
from planted import SeededChoices
from students import Residual, plant, random_student, seeded_student

STUDENT = {"weight_bits": 4, "membrane_bits": 4, "bn_bits": 8}
SIZE = (8, 8)


def student(**options):
    generator = torch.Generator().manual_seed(3)
    return ms_resnet((1, 1), (4, 6), in_channels=1, size=SIZE, generator=generator, **{**STUDENT, **options})


def pixels(n=2, c=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, c, *SIZE), dtype=np.uint8)


def stem(c=4, bits=4):
    return [PixelInput([0.5], [0.25]), QuantConv2d(1, c, 3, padding=1, weight_bits=bits), QuantBatchNorm2d(c)]


# --------------------------------------------------------------------------------------------- the constants


def test_bn_and_weights_by_the_formula():
    conv, bn = QuantConv2d(2, 3, 3, bias=True, weight_bits=5), QuantBatchNorm2d(3, 8, "eq4", Grid())
    rng = np.random.default_rng(0)
    for tensor in (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean):
        tensor.data.copy_(torch.from_numpy(rng.normal(size=tensor.shape)))
    bn.running_var.copy_(torch.from_numpy(rng.lognormal(size=3)))
    events = nn.Sequential(EventInput(2), conv, bn, LIF(2, bits=4), Readout(3, 2))
    frozen = freeze(events, input_size=(5, 5))

    w = conv.weight.detach().numpy().astype(np.float64)
    alpha = np.abs(np.tanh(w)).max()
    codes = np.rint(np.tanh(w) / alpha * 15)
    np.testing.assert_array_equal(frozen[1].constants.weight.numpy(), codes)
    gamma, beta = quantize_bn(bn.weight, 8).numpy(), quantize_bn(bn.bias, 8).numpy()
    sigma = np.sqrt(bn.running_var.double().numpy() + 1e-5)
    s = gamma * alpha / 15 / sigma
    t = beta + gamma * (conv.bias.detach().double().numpy() - bn.running_mean.double().numpy()) / sigma
    high = 127 * np.maximum(codes, 0).reshape(3, -1).sum(1)
    low = 127 * np.minimum(codes, 0).reshape(3, -1).sum(1)
    table = frozen[2].constants
    for c in range(3):
        g = int(table.shift[c])
        assert int(table.multiplier[c]) == np.rint(s[c] * 2.0 ** (9 + g))
        assert int(table.offset[c]) == np.rint(t[c] * 2.0 ** (9 + g)) + (2 ** (g - 1) if g else 0)
        next_a, next_b = np.rint(s[c] * 2.0 ** (10 + g)), np.rint(t[c] * 2.0 ** (10 + g)) + 2**g
        reach = abs(next_a) * max(high[c], -low[c]) + abs(next_b)
        assert g == 24 or abs(next_a) >= 2**15 or reach >= 2**31  # the largest g that fits
    np.testing.assert_array_equal(frozen[1].constants.low.numpy(), low)
    np.testing.assert_array_equal(frozen[1].constants.high.numpy(), high)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_membrane_tables_by_the_formula(bits):
    model = nn.Sequential(*stem(), LIF(3, tau=0.7, v_th=0.3, reset="soft", bits=bits), Readout(4, 2)).eval()
    model[3].alpha.fill_(0.83)
    codes = freeze(model, input_size=SIZE)[3].constants
    alpha, top = float(model[3].alpha), delta(bits)
    q = np.arange(-top, top + 1)
    np.testing.assert_array_equal(codes.decode.numpy(), np.floor(0.7 * alpha * q / top * 512 + 0.5))
    n = np.arange(-3000, 3001)
    dense = np.rint(np.clip(np.tanh(n / 512) / alpha, -1, 1) * top)
    np.testing.assert_array_equal(codes.requantize(torch.from_numpy(n)).numpy(), dense)
    assert (codes.v_th, codes.v_soft, codes.q_th) == (153, 154, 0)  # floor and rint of 0.3 * 512 = 153.6
    assert codes.alpha == alpha


def test_pre_fire_threshold():
    model = nn.Sequential(*stem(), LIF(3, v_th=0.3, bits=4, quantize="pre_fire"), Readout(4, 2)).eval()
    model[3].alpha.fill_(0.8)
    assert freeze(model, input_size=SIZE)[3].constants.q_th == 2  # floor(0.3*7/0.8) = floor(2.625)


def test_readout_bias_is_in_units_of_a_code():
    model = nn.Sequential(*stem(), LIF(3, bits=4), SpikeSumPool2d(2), Readout(4, 2)).eval()
    model[5].bias.data = torch.tensor([0.7, -0.2])
    codes = freeze(model, input_size=SIZE)[5].constants
    summed = 3 * 4 * 4 * 4  # T * H * W of the pooled map, and 4 places a window
    np.testing.assert_array_equal(
        codes.bias.numpy(), np.rint(model[5].bias.detach().double().numpy() * summed * 127 / codes.alpha)
    )
    assert codes.unit == pytest.approx(codes.alpha / 127 / summed)


def test_alpha_is_clamped_to_the_grid():
    model = nn.Sequential(*stem(), LIF(3, bits=4), Readout(4, 2)).eval()
    for given, want in ((0.0, 2.0**-9), (5.0, 1.0)):
        model[3].alpha.fill_(given)
        assert freeze(model, input_size=SIZE)[3].constants.alpha == want


def plain(value):
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


def constants(model):
    """Every frozen constant, as plain values by layer."""
    layers = [(name, layer.constants) for name, layer in model.named_modules() if isinstance(layer, Layer)]
    return {name: plain(asdict(codes)) for name, codes in layers if codes != ()}


def test_two_freezes_give_the_same_constants_and_leave_the_student_alone():
    model = student()
    model(torch.from_numpy(pixels(8)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    one, two = freeze(model), freeze(model)
    assert constants(one) == constants(two)
    assert len(constants(one)) == 20
    assert plan_of(one) == plan_of(two)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert not any(m.is_frozen for m in model.modules() if isinstance(m, Layer))
    assert model(torch.from_numpy(pixels())).dtype == torch.float32


def test_a_frozen_model_stays_in_evaluation_and_does_not_learn():
    model = student()
    x = torch.from_numpy(pixels(8))
    model(x)
    frozen = freeze(model)
    want = frozen(x)
    assert want.dtype == torch.int32
    frozen.train()
    assert torch.equal(frozen(x), want)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_frozen_model_may_be_copied():
    frozen = freeze(student())
    x = torch.from_numpy(pixels())
    assert torch.equal(copy.deepcopy(frozen)(x), frozen(x))


def test_a_batch_and_its_samples_one_by_one_give_the_same_logits():
    frozen, x = freeze(student()), torch.from_numpy(pixels(9))
    whole = frozen(x)
    assert torch.equal(torch.cat([frozen(x[i : i + 1]) for i in range(9)]), whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(frozen(x), whole)


def test_lower_float_precision_does_not_reach_a_frozen_sum():
    model = nn.Sequential(*stem(8, bits=8), LIF(3, bits=4), Readout(8, 2)).eval()
    frozen = freeze(model, input_size=SIZE)
    x = torch.from_numpy(pixels(4))
    acc = frozen[1](frozen[0](x))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert frozen[1].constants.carrier() == torch.float64
        assert torch.equal(frozen[1](frozen[0](x)), acc)
    finally:
        torch.set_float32_matmul_precision(before)


def test_sums_beyond_2_24_are_carried_in_float64():
    """132,104 weights of 127 on spikes sum to 2**24 - 8 at most; one more goes beyond."""
    for features, carrier in ((132104, torch.float32), (132105, torch.float64)):
        linear = QuantLinear(features, 1, weight_bits=8, output_grid=Grid())
        linear.weight.data.fill_(1.0)
        model = nn.Sequential(
            EventInput(1), QuantConv2d(1, 1, 1, weight_bits=2, output_grid=Grid()), LIF(1, bits=2), Flatten(), linear,
            LIF(1, bits=2), Readout(1, 2),
        )  # fmt: skip
        frozen = freeze(model, input_size=(1, features))
        assert frozen[4].constants.reach == 127 * features
        assert frozen[4].constants.carrier() == carrier


# ----------------------------------------------------------------------------- each layer beside its live self


@pytest.mark.parametrize("seed", range(60))
def test_every_frozen_layer_means_what_its_live_self_computes(seed):
    """The same input through both: pools, codes and first spikes equal, BN tables within a step of the grid."""
    model, x, size = seeded_student(seed)
    frozen = freeze(model, input_size=size)
    plan, seen = plan_of(frozen), {}
    for step in plan.steps:
        if step.op != "Add":
            frozen.get_submodule(step.name).register_forward_hook(
                lambda _, given, out, name=step.name: seen.__setitem__(name, (given[0], out))
            )
    frozen(torch.from_numpy(x))
    scales = {step.name: float(step.signal.scale) for step in plan.steps}
    for step in plan.steps:
        if step.op == "Add":
            continue
        live, (given, got) = model.get_submodule(step.name), seen[step.name]
        real = got.double() * scales[step.name]
        if step.op in ("PixelInput", "EventInput"):
            assert torch.equal(live(given).double(), real), step.name
            continue
        real_input = given.double() * scales[step.sources[0]]
        if step.op in ("ShortcutQuant", "SpikeMaxPool2d", "Flatten"):
            assert torch.equal(live(real_input), real), step.name
        elif step.op in ("SpikeSumPool2d", "GlobalSpikePool"):
            torch.testing.assert_close(live(real_input), real, rtol=1e-12, atol=1e-12)
        elif step.op == "LIF":
            first = live(real_input[:1])[0] if live.quantize == "post_reset" else None
            if first is not None:  # h is the input itself at the first step: exact
                assert torch.equal(first, got[0].double()), step.name
        elif step.op == "Readout":
            want = live.double()(real_input)
            unit = frozen.get_submodule(step.name).constants.unit
            torch.testing.assert_close(got.double() * unit, want, rtol=1e-5, atol=0.51 * unit + 1e-6)
        elif step.op in ("QuantConv2d", "QuantLinear"):
            if step.signal.kind == "stream":
                slack = 1.0 + frozen.get_submodule(step.name).constants.affine.rounding
                want = live.double()(real_input)
                torch.testing.assert_close(real, want, rtol=0, atol=slack * 2.0**-plan.grid.frac_bits)
        elif step.op == "QuantBatchNorm2d":
            before = next(s for s in plan.steps if s.name == step.sources[0])
            sums, codes = model.get_submodule(before.name), frozen.get_submodule(step.name).constants
            real_input = seen[before.name][0].double() * scales[before.sources[0]]
            want = live.double()(sums.double()(real_input))
            slack = (1.0 + codes.rounding) * 2.0**-plan.grid.frac_bits
            torch.testing.assert_close(real, want, rtol=0, atol=slack)
        else:
            raise AssertionError(f"{step.op} is not compared")


def test_the_frozen_forward_follows_the_live_one():
    """One LIF from the input on: live and frozen spikes differ only where rounding moved a membrane over v_th."""
    model = student(membrane_bits=8)
    x = torch.from_numpy(pixels(32))
    for _ in range(20):
        model(x)
    model.eval()
    rates = []
    model.groups[0][0].lif1.register_forward_hook(lambda _, given, out: rates.append(out.detach().clone()))
    live = model(x)
    trace, logits = frozen_trace(freeze(model), x.numpy())
    spikes = torch.from_numpy(trace["groups.0.0.lif1"][1])
    assert 0.05 < rates[0].mean() < 0.6
    assert (spikes != rates[0]).double().mean() < 0.01
    frozen = torch.from_numpy(logits) * freeze(model).readout.constants.unit
    assert np.corrcoef(frozen.flatten(), live.detach().flatten())[0, 1] > 0.97


# ------------------------------------------------------------------------------------------- traces and such


@pytest.mark.parametrize("coding", ["image", "events"])
def test_trace_has_every_lif_and_equals_the_forward(coding):
    model = student(coding=coding, timesteps=3)
    x = pixels(4)
    x = np.stack([x, x[::-1], x]) if coding == "events" else x
    frozen = freeze(model)
    trace, logits = frozen_trace(frozen, x[..., ::-1])
    assert list(trace) == list(plan_of(frozen).lifs)
    assert len(trace) == 5
    assert np.array_equal(frozen(torch.from_numpy(x[..., ::-1].copy())).numpy(), logits)
    for name, (h, s, q) in trace.items():
        assert (h.dtype, s.dtype, q.dtype) == (np.int32, np.uint8, np.int8)
        assert h.shape == s.shape == q.shape
        assert h.shape[:2] == (3, 4)
        codes = frozen.get_submodule(name).constants
        assert np.array_equal(s, h > codes.v_th)
        assert np.array_equal(q, codes.requantize(torch.from_numpy(np.where(s, 0, h))).numpy())
        assert frozen.get_submodule(name).last_record is None


def test_predictions_take_the_lowest_index_of_a_tie():
    logits = torch.tensor([[1, 3, 3], [0, 0, 0], [-5, -9, -5], [1, 2, 3]], dtype=torch.int32)
    assert predictions(logits).tolist() == [1, 0, 0, 2]


def test_shortcut_saturation_is_the_share_of_codes_at_the_ends():
    model = student(shortcut_bits=2)
    model(torch.from_numpy(pixels(8)))
    frozen, x = freeze(model), pixels(8)
    codes = []
    frozen.groups[1][0].shortcut[0].register_forward_hook(lambda _, given, out: codes.append(out))
    got = shortcut_saturation(frozen, x)
    assert got == {"groups.1.0.shortcut.0": pytest.approx(float((codes[0].abs() == 1).double().mean()))}
    assert 0 < got["groups.1.0.shortcut.0"] < 1


@pytest.mark.parametrize("shape", [(2, 1, 8, 7), (2, 1, 9, 8), (2, 2, 8, 8), (1, 8, 8), (2, 1, 16, 16)])
def test_an_image_of_another_size_is_refused(shape):
    with pytest.raises(InputError, match="the input"):
        frozen_trace(freeze(student()), np.zeros(shape, np.uint8))


def test_events_of_another_length_are_refused():
    frozen = freeze(student(coding="events", timesteps=3))
    for steps in (1, 2, 4):
        with pytest.raises(InputError, match=rf"\[T, C, H, W\] = \[{steps}, 1, 8, 8\], the network \[3, 1, 8, 8\]"):
            frozen_trace(frozen, np.zeros((steps, 2, 1, 8, 8), np.uint8))


def test_dropout_and_identity_vanish():
    model = nn.Sequential(*stem(), LIF(3, bits=4), nn.Dropout(0.5), nn.Identity(), Readout(4, 2))
    frozen, x = freeze(model, input_size=SIZE).train(), torch.from_numpy(pixels())
    assert torch.equal(frozen(x), frozen(x))
    assert [step.name for step in plan_of(frozen).steps] == ["0", "1", "2", "3", "6"]


def test_what_nothing_reads_is_left_out():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(*stem(), LIF(2, bits=4)), Readout(4, 2)
            self.spare = nn.Sequential(QuantConv2d(4, 4, 1, weight_bits=4), QuantBatchNorm2d(4), LIF(2, bits=4))

        def forward(self, x):
            s = self.body(x)
            self.spare(s)
            return self.head(s)

    assert plan_of(freeze(Spare(), input_size=SIZE)).lifs == ("body.3",)


def test_planting_changes_what_the_network_does():
    """The ties of the lowering tests are real: membranes lie exactly on a planted threshold."""
    hits = 0
    for seed in range(20):
        model, x, size = random_student(SeededChoices(seed))
        frozen = freeze(model, input_size=size)
        plant(frozen, x, np.random.default_rng(seed))
        for name, (h, _, _) in frozen_trace(frozen, x)[0].items():
            codes = frozen.get_submodule(name).constants
            hits += int(np.isin(h, codes.thresholds.numpy()).any()) + int((h == codes.v_th).any())
    assert hits > 20


# ------------------------------------------------------------------------------------------------- refusals


def spoil(tensor, value=float("nan")):
    tensor.data.reshape(-1)[0] = value
    return tensor


def sequence(*layers):
    """PixelInput, conv, BN, then `layers`; a Readout unless they end in one."""
    tail = [] if layers and isinstance(layers[-1], Readout) else [Readout(4, 2)]
    return nn.Sequential(*stem(), *layers, *tail)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(*stem()), Readout(4, 2)
        self.lif, self.conv, self.bn = LIF(2, bits=4), QuantConv2d(4, 4, 1, weight_bits=4), QuantBatchNorm2d(4)

    def forward(self, x):
        x = self.body(x)
        x = x + self.bn(self.conv(self.lif(x)))
        return self.head(self.lif(x))


class Louder(LIF):
    """A layer that computes something else."""

    def live(self, x):
        return super().live(2 * x)


class Forward(nn.Module):
    """`stem` and a LIF, then what `how` does with the module, its stream x and its spikes s."""

    def __init__(self, how):
        super().__init__()
        self.body, self.lif, self.head = nn.Sequential(*stem()), LIF(2, bits=4), Readout(4, 2)
        self.conv, self.bn = QuantConv2d(4, 4, 1, weight_bits=4), QuantBatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(1))
        self.how = how

    def forward(self, pixels):
        x = self.body(pixels)
        return self.how(self, x, self.lif(x))


def mixed(m, x, s):
    y = m.conv(s)
    return m.head(m.lif2(m.bn(y) + y))


def test_a_convolution_read_by_bn_and_something_else_is_refused():
    model = Forward(mixed)
    model.lif2 = LIF(2, bits=4)
    with pytest.raises(LoweringError, match="layer 'conv': a BN layer and something else read it"):
        freeze(model, input_size=SIZE)


REFUSED = {
    "frozen already": (lambda: freeze(student()), r"layer 'input': the model is frozen already"),
    "NaN in a weight": (lambda: spoilt("stem.weight"), r"layer 'stem': its weight holds 1 NaN"),
    "infinity in BN": (
        lambda: spoilt("stem_bn.running_var", float("inf")),
        r"layer 'stem_bn': its running_var holds 1",
    ),
    "NaN in alpha": (lambda: spoilt("lif.alpha"), r"layer 'lif': its alpha holds 1 NaN"),
    "negative variance": (lambda: spoilt("stem_bn.running_var", -1.0), r"layer 'stem_bn': its running_var is negative"),
    "a teacher": (lambda: ms_resnet((1,), (4,), size=8), r"layer 'stem': weight_bits = 32 is full precision"),
    "full membranes": (lambda: student(membrane_bits=32), r"layer 'groups.0.0.lif1': bits = 32 is full precision"),
    "full BN": (lambda: student(bn_bits=32), r"layer 'stem_bn': bits = 32 is full precision"),
    "a layer called twice": (Twice, r"layer 'lif': called twice in one forward.*make a second layer"),
    "torch's ReLU": (lambda: sequence(nn.ReLU()), r"layer '3' \(ReLU\) has no integer form; use LIF"),
    "torch's conv": (lambda: sequence(LIF(2, bits=4), nn.Conv2d(4, 4, 1)), r"\(Conv2d\) .* use QuantConv2d"),
    "a subclass": (lambda: sequence(Louder(2, bits=4)), r"layer '3' \(Louder\) has no integer form; compose"),
    "a function": (
        lambda: Forward(lambda m, x, s: m.head(torch.relu(s))),
        r"'relu' in 'Forward' has no integer form; use LIF",
    ),
    "a method": (lambda: Forward(lambda m, x, s: m.head(s.flatten(2))), r"'flatten' in 'Forward' .* use mdsnn.layers"),
    "a product": (lambda: Forward(lambda m, x, s: m.head(s * 2)), r"'mul' in 'Forward' has no integer form"),
    "a bare parameter": (lambda: Forward(lambda m, x, s: m.head(s + m.scale)), r"'scale' in 'Forward' has no integer"),
    "a constant added": (lambda: Forward(lambda m, x, s: m.head(m.lif(x + 1))), r"an addition takes two values"),
    "a scaled addition": (
        lambda: Forward(lambda m, x, s: m.head(m.lif(torch.add(x, x, alpha=2)))),
        r"layer 'add': an addition takes two values",
    ),
    "spikes added": (lambda: Forward(lambda m, x, s: m.head(s + s)), r"layer 'add': adds spikes of 'lif'"),
    "shapes that differ": (
        lambda: Residual_of(QuantConv2d(4, 4, 3, 2, 1, weight_bits=4)),
        r"layer '3.add': adds \(4, 4, 4\) and \(4, 8, 8\)",
    ),
    "conv on the stream": (
        lambda: sequence(QuantConv2d(4, 4, 1, weight_bits=4), QuantBatchNorm2d(4), LIF(2, bits=4)),
        r"layer '3': QuantConv2d reads stream.*put a LIF before it, or a ShortcutQuant",
    ),
    "average of the stream": (
        lambda: sequence(SpikeSumPool2d(2), LIF(2, bits=4)),
        r"layer '3': SpikeSumPool2d reads stream.*pool the spikes behind a LIF",
    ),
    "global average of the stream": (
        lambda: sequence(GlobalSpikePool(), LIF(2, bits=4)),
        r"GlobalSpikePool reads stream",
    ),
    "maximum of the stream": (lambda: sequence(SpikeMaxPool2d(2), LIF(2, bits=4)), r"SpikeMaxPool2d reads stream"),
    "maximum of counts": (
        lambda: sequence(LIF(2, bits=4), SpikeSumPool2d(2), SpikeMaxPool2d(2)),
        r"layer '5': SpikeMaxPool2d reads counts, where spikes are needed",
    ),
    "BN without conv": (
        lambda: sequence(LIF(2, bits=4), QuantBatchNorm2d(4), LIF(2, bits=4)),
        r"layer '4': QuantBatchNorm2d reads spikes, where accumulators.*must follow a QuantConv2d",
    ),
    "LIF on spikes": (lambda: sequence(LIF(2, bits=4), LIF(2, bits=4)), r"layer '4': LIF reads spikes, where stream"),
    "readout of the stream": (
        lambda: sequence(LIF(2, bits=4), *bare(), Readout(4, 2)),
        r"layer '5': Readout reads stream",
    ),
    "shortcut of spikes": (lambda: sequence(LIF(2, bits=4), ShortcutQuant(8)), r"ShortcutQuant reads spikes"),
    "flattened stream": (lambda: sequence(Flatten(), LIF(2, bits=4)), r"layer '3': Flatten reads stream"),
    "no LIF": (
        lambda: nn.Sequential(*stem(), Readout(4, 2)),
        r"layer '3': Readout reads stream, where spikes or counts are needed; put a LIF",
    ),
    "two lengths": (
        lambda: sequence(LIF(2, bits=4), *bare(), LIF(3, bits=4)),
        r"layer '5': timesteps = 3, but '3' has 2; use layers.set_timesteps",
    ),
    "two grids": (
        lambda: sequence(LIF(2, bits=4), *bare(Grid(9)), LIF(2, bits=4), *bare(Grid(8)), LIF(2, bits=4)),
        r"layer '6': its output_grid Grid\(frac_bits=8.*that of '4'",
    ),
    "no readout": (
        lambda: nn.Sequential(*stem(), LIF(2, bits=4)),
        r"its forward must return what a Readout layer returns",
    ),
    "two outputs": (
        lambda: Forward(lambda m, x, s: (m.head(s), s)),
        r"its forward must return what a Readout layer returns",
    ),
    "no input layer": (
        lambda: nn.Sequential(QuantConv2d(1, 4, 1, weight_bits=4), QuantBatchNorm2d(4), LIF(2, bits=4), Readout(4, 2)),
        r"layer '0': takes one value, and only an input layer reads the network's input",
    ),
    "an input layer inside": (
        lambda: sequence(PixelInput([0.5] * 4, [0.5] * 4), LIF(2, bits=4)),
        r"layer '3': one input layer, and nothing else, reads",
    ),
    "channels that differ": (
        lambda: sequence(LIF(2, bits=4), QuantConv2d(5, 4, 1, weight_bits=4)),
        r"layer '4': has 5 input channels, but reads 4",
    ),
    "BN channels that differ": (
        lambda: sequence(LIF(2, bits=4), QuantConv2d(4, 4, 1, weight_bits=4), QuantBatchNorm2d(3), LIF(2, bits=4)),
        r"layer '5': has 3 channels, but reads 4",
    ),
    "readout features that differ": (lambda: sequence(LIF(2, bits=4), Readout(5, 2)), r"layer '4': has 5 inputs, but"),
    "linear without flatten": (
        lambda: sequence(LIF(2, bits=4), QuantLinear(4, 4, weight_bits=4), LIF(2, bits=4)),
        r"layer '4': reads \(4, 1, 1\), but gets \(4, 8, 8\); put a Flatten before it",
    ),
    "a window too large": (lambda: sequence(LIF(2, bits=4), SpikeMaxPool2d(9)), r"layer '4': a window of \(9, 9\)"),
    "padding too wide": (lambda: sequence(LIF(2, bits=4), SpikeSumPool2d(2, 2, 2)), r"padding = 2 is outside 0\.\.1"),
    "conv padding too wide": (
        lambda: sequence(LIF(2, bits=4), QuantConv2d(4, 4, 1, 1, 1, weight_bits=4)),
        r"layer '4': padding = 1 must be below its kernel",
    ),
    "a pre_fire neuron that cannot fire": (
        lambda: alpha(sequence(LIF(2, v_th=0.5, bits=4, quantize="pre_fire")), 0.5),
        r"layer '3': alpha = 0.5 is not above v_th = 0.5",
    ),
    "a soft reset of nothing": (
        lambda: sequence(LIF(2, v_th=0.0005, bits=4, reset="soft")),
        r"layer '3': v_th = 0.0005 subtracts 0 steps of the grid",
    ),
    "an accumulator beyond 32 bits": (
        lambda: wide_sum(),
        r"layer '5': its accumulator reaches \d+, beyond 32 bits",
    ),
    "a logit beyond 32 bits": (lambda: huge_bias(), r"layer '4': .*bias .* is beyond 32 bits"),
}


def bare(grid=None):
    return [QuantConv2d(4, 4, 1, weight_bits=4, output_grid=grid or Grid())]


def spoilt(name, value=float("nan")):
    model = student()
    spoil(model.state_dict()[name], value)
    return model


def Residual_of(conv):  # noqa: N802 - reads as the class it makes
    return sequence(Residual(nn.Sequential(LIF(2, bits=4), conv, QuantBatchNorm2d(4)), nn.Sequential()), LIF(2, bits=4))


def alpha(model, value):
    model[3].alpha.fill_(value)
    return model


def wide_sum():
    """266,400 weights of 127 on counts of up to 64 spikes."""
    linear = QuantLinear(266_400, 1, weight_bits=8, output_grid=Grid())
    linear.weight.data.fill_(1.0)
    conv = QuantConv2d(1, 1, 1, weight_bits=2, output_grid=Grid())
    layers = [EventInput(1), conv, LIF(2, bits=4), SpikeSumPool2d(8), Flatten(), linear, LIF(2, bits=4), Readout(1, 2)]
    return nn.Sequential(*layers), (8, 266_400 * 8)


def huge_bias():
    model = sequence(LIF(2, bits=4))
    model[4].bias.data[0] = 1e9
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, message = REFUSED[case]
    model, size = made if isinstance(made := make(), tuple) else (made, SIZE)
    with pytest.raises(LoweringError, match=message):
        freeze(model, input_size=size)


def test_an_unknown_input_size_is_refused():
    with pytest.raises(LoweringError, match=r"its input size is not known; pass input_size=\(height, width\)"):
        freeze(sequence(LIF(2, bits=4)))


def test_a_live_model_has_no_plan():
    with pytest.raises(LoweringError, match="MSResNet is not frozen"):
        frozen_trace(student(), pixels())
