"""The live layers: what each computes on real values, alpha's three lives, and which LIFs a tap reads."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mdsnn.kernels.errors import ConfigError, FormatError, InputError, LoweringError
from mdsnn.kernels.formats import Grid, event_table, image_table
from mdsnn.layers import (
    LIF,
    Block,
    EventInput,
    Flatten,
    GlobalSpikePool,
    Group,
    PixelInput,
    QuantBatchNorm2d,
    QuantConv2d,
    QuantLinear,
    Readout,
    ShortcutQuant,
    SpikeMaxPool2d,
    SpikeSumPool2d,
    set_timesteps,
    taps,
)
from mdsnn.quantizers import fake_quantize_membrane, fake_quantize_weight, quantize_bn, round_to_grid
from mdsnn.surrogate import Rectangle


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spikes(*shape, seed=0):
    return (draw(*shape, seed=seed) > 0).float()


# ----------------------------------------------------------------------------------------------------- input


def test_pixels_become_codes_on_their_grid():
    mean, std = (0.4, 0.5), (0.2, 0.3)
    x = torch.arange(512, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(1, 2, 16, 16)
    got = PixelInput(mean, std)(x)
    assert got.shape == (1, 1, 2, 16, 16)
    np.testing.assert_array_equal(got.numpy().reshape(2, 256) * 32, image_table(mean, std))


def test_event_counts_saturate():
    x = torch.tensor([0, 1, 126, 127, 128, 255], dtype=torch.uint8).reshape(3, 1, 1, 1, 2)
    got = EventInput(1)(x)
    assert got.flatten().tolist() == [0, 1, 126, 127, 127, 127]
    assert event_table(1)[0, 255] == 127


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (PixelInput([0.5], [0.5]), torch.zeros(2, 1, 4, 4)),
        (PixelInput([0.5], [0.5]), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)),
        (PixelInput([0.5], [0.5]), torch.zeros(1, 2, 1, 4, 4, dtype=torch.uint8)),
        (EventInput(2), torch.zeros(2, 2, 4, 4, dtype=torch.uint8)),
        (EventInput(2), torch.zeros(3, 2, 1, 4, 4, dtype=torch.uint8)),
    ],
)
def test_an_input_of_the_wrong_kind_is_refused(layer, x):
    with pytest.raises(InputError, match=r"where uint8 .* is needed"):
        layer(x)


def test_a_std_of_0_is_refused():
    with pytest.raises(FormatError, match="std above 0"):
        PixelInput([0.5], [0.0])


# --------------------------------------------------------------------------------------------- conv, linear


@pytest.mark.parametrize("bits", [2, 4, 8, 32])
@pytest.mark.parametrize(("stride", "padding", "groups", "bias"), [(1, 1, 1, False), (2, 0, 2, True), (3, 2, 4, True)])
def test_conv_is_a_convolution_of_every_step(bits, stride, padding, groups, bias):
    conv = QuantConv2d(4, 8, 3, stride, padding, groups, bias, bits, generator=torch.Generator().manual_seed(1))
    x = spikes(3, 2, 4, 7, 6)
    weight = fake_quantize_weight(conv.weight, bits)
    for t in range(3):
        want = F.conv2d(x[t], weight, conv.bias, stride, padding, 1, groups)
        torch.testing.assert_close(conv(x)[t], want, rtol=1e-6, atol=1e-6)


def test_linear_is_a_linear_layer_at_every_step():
    linear = QuantLinear(6, 4, True, 5, generator=torch.Generator().manual_seed(1))
    nn.init.normal_(linear.bias, generator=torch.Generator().manual_seed(2))
    x = spikes(3, 2, 6, 1, 1)
    got = linear(x)
    assert got.shape == (3, 2, 4, 1, 1)
    want = x[:, :, :, 0, 0] @ fake_quantize_weight(linear.weight, 5).T + linear.bias
    torch.testing.assert_close(got[:, :, :, 0, 0], want)


def test_without_bn_the_output_is_rounded_to_the_grid():
    grid = Grid(5, 1)
    conv = QuantConv2d(2, 3, 1, weight_bits=4, output_grid=grid)
    plain = QuantConv2d(2, 3, 1, weight_bits=4)
    plain.load_state_dict(conv.state_dict())
    x = spikes(1, 2, 2, 3, 3)
    torch.testing.assert_close(conv(x), round_to_grid(plain(x), grid), rtol=0, atol=0)


def test_the_same_generator_gives_the_same_weights():
    one, two = (QuantConv2d(3, 4, 3, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one.weight, two.weight)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="groups = 3 does not divide"):
        QuantConv2d(4, 6, 3, groups=3)


@pytest.mark.parametrize("bits", [1, 9, 0, 33])
def test_widths_outside_2_to_8_are_refused(bits):
    for make in (
        lambda: QuantConv2d(1, 1, 1, weight_bits=bits),
        lambda: QuantLinear(1, 1, weight_bits=bits),
        lambda: QuantBatchNorm2d(1, bits),
        lambda: LIF(2, bits=bits),
        lambda: ShortcutQuant(bits),
        lambda: Readout(1, 2, bits),
    ):
        with pytest.raises(FormatError, match=rf"= {bits} is outside 2\.\.8"):
            make()


# ------------------------------------------------------------------------------------------- BN, shortcuts


@pytest.mark.parametrize("grid", ["eq4", "wageubn"])
def test_bn_normalizes_with_quantized_gamma_and_beta(grid):
    bn = QuantBatchNorm2d(3, 8, grid, Grid())
    bn.weight.data, bn.bias.data = draw(3, seed=1), draw(3, seed=2)
    bn.running_mean, bn.running_var = draw(3, seed=3), draw(3, seed=4).exp()
    x = draw(2, 4, 3, 5, 5, seed=5)
    gamma, beta = (quantize_bn(p, 8, grid).float()[:, None, None] for p in (bn.weight, bn.bias))
    over = (0, 1, 3, 4)
    mean, var = x.mean(over)[:, None, None], x.var(over, unbiased=False)[:, None, None]
    live = bn(x)
    assert torch.equal(live * 512, (live * 512).round())
    torch.testing.assert_close(live, (x - mean) / (var + bn.eps).sqrt() * gamma + beta, rtol=0, atol=0.51 / 512 + 1e-5)
    torch.testing.assert_close(bn.running_mean, 0.9 * draw(3, seed=3) + 0.1 * mean.flatten(), rtol=1e-5, atol=1e-6)
    bn.eval()
    mean, var = bn.running_mean[:, None, None], bn.running_var[:, None, None]
    want = round_to_grid((x - mean) / (var + bn.eps).sqrt() * gamma + beta, Grid())
    torch.testing.assert_close(bn(x), want, rtol=0, atol=1.01 / 512)


def test_a_teachers_bn_is_torchs():
    bn, plain = QuantBatchNorm2d(3, 32), nn.BatchNorm2d(3)
    bn.weight.data = plain.weight.data = draw(3, seed=1)
    x = draw(2, 4, 3, 5, 5)
    torch.testing.assert_close(bn(x), plain(x.flatten(0, 1)).unflatten(0, (2, 4)), rtol=0, atol=0)


def test_bn_saturates_at_the_clip():
    bn = QuantBatchNorm2d(1, 8, "wageubn", Grid(9, 1)).eval()
    assert bn(torch.tensor([5.0, -5.0]).reshape(1, 2, 1, 1, 1)).flatten().tolist() == [1.0, -1.0]


def test_bn_with_16_bit_statistics():
    bn, plain = (QuantBatchNorm2d(3, 8, "wageubn", statistics_bits=bits) for bits in (16, 32))
    x = draw(2, 4, 3, 5, 5, seed=5) * 1e-4 + 0.3
    x[:, :, 0] = 0.3  # sigma is sqrt(eps), 104 steps of 2**-15
    for module in (bn, plain):
        module(x)
    torch.testing.assert_close(bn.running_mean, plain.running_mean)
    torch.testing.assert_close(bn.running_var, plain.running_var)
    bn.eval()
    mu, sigma = bn.rounded_statistics(bn.running_mean, bn.running_var)
    for value in (mu, sigma):
        assert torch.equal(value * 2**15, (value * 2**15).round())
    want = (x - mu[:, None, None]) / sigma[:, None, None] * (127 / 128)
    torch.testing.assert_close(bn(x), want)
    assert bn.rounded_statistics(torch.zeros(1), torch.full((1,), -bn.eps))[1].tolist() == [2.0**-15]
    with pytest.raises(FormatError, match="statistics_bits = 8 is neither 16 nor 32"):
        QuantBatchNorm2d(3, statistics_bits=8)


def test_16_bit_statistics_pass_their_gradient_on():
    bn, plain = (QuantBatchNorm2d(3, 32, statistics_bits=bits) for bits in (16, 32))
    grads = []
    for module in (bn, plain):
        x = draw(2, 4, 3, 5, 5, seed=5).requires_grad_()
        (module(x) * draw(2, 4, 3, 5, 5, seed=6)).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_another_bn_grid_is_refused():
    with pytest.raises(ConfigError, match="'mint' is not one of eq4, wageubn"):
        QuantBatchNorm2d(1, 8, "mint")


@pytest.mark.parametrize(("bits", "step", "top"), [(8, 1 / 16, 7.9375), (4, 1.0, 7.0), (2, 4.0, 4.0)])
def test_shortcut_codes_span_about_8(bits, step, top):
    layer = ShortcutQuant(bits)
    assert layer.step == step
    x = torch.tensor([0.0, step, 0.49 * step, 0.5 * step, -0.5 * step, 100.0, -100.0])
    assert layer(x).tolist() == [0.0, step, 0.0, step, 0.0, top, -top]


# ---------------------------------------------------------------------------------------------------- LIF


def test_a_static_input_is_unrolled():
    x = draw(1, 2, 3, 4, 4)
    for options in ({}, {"reset": "soft"}, {"bits": 4}, {"bits": 3, "quantize": "pre_fire"}):
        lif = LIF(5, **options).eval()
        got = lif(x)
        assert got.shape == (5, 2, 3, 4, 4)
        assert torch.equal(got, lif(x.expand(5, -1, -1, -1, -1)))
        assert 0 < got.mean() < 1


def test_the_number_of_steps_must_fit():
    with pytest.raises(InputError, match="3 steps does not fit a LIF layer of 4"):
        LIF(4)(draw(3, 1, 1, 2, 2))


def test_state_starts_at_zero_in_every_call():
    lif, x = LIF(3, bits=4).eval(), draw(3, 1, 2, 4, 4)
    assert torch.equal(lif(x), lif(x))


def test_a_tap_keeps_the_membrane_with_its_graph():
    lif, x = LIF(3), draw(3, 1, 2, 4, 4).requires_grad_()
    lif(x)
    assert lif.last_h is None
    lif.tap = True
    s = lif(x)
    assert lif.last_h.shape == (3, 1, 2, 4, 4)
    assert torch.equal((lif.last_h > lif.v_th).float(), s)
    lif.last_h.sum().backward()
    assert x.grad.abs().sum() > 0
    assert copy.deepcopy(lif).last_h is None


def test_a_tap_may_read_the_stored_state():
    lif, x = LIF(3, bits=3).eval(), draw(3, 1, 2, 4, 4)
    lif.tap = True
    lif(x)
    h = lif.last_h
    lif.tap = "state"
    s = lif(x)
    assert torch.equal(lif.last_h, fake_quantize_membrane(h * (1 - s), 3, lif.alpha))


def observed_peak(lif, x):
    """max|tanh(u)| over the steps, worked out beside the layer with alpha held."""
    u, peak = torch.zeros_like(x[0]), 0.0
    for t in range(x.shape[0]):
        h = lif.tau * u + x[t]
        u = h * (h <= lif.v_th)
        peak = max(peak, float(torch.tanh(u.abs().max())))
        alpha = torch.tanh(u.abs().max()) if lif.alpha_mode == "dynamic" else lif.alpha.detach()
        u = fake_quantize_membrane(u, lif.bits, alpha)
    return peak


def test_ema_alpha_starts_at_the_first_batch_and_then_follows():
    lif = LIF(1, bits=4)
    first, second = draw(1, 2, 3, 4, 4, seed=1), 3 * draw(1, 2, 3, 4, 4, seed=2)
    lif(first)
    assert float(lif.alpha) == pytest.approx(observed_peak(lif, first))
    before, peak = float(lif.alpha), observed_peak(lif, second)
    lif(second)
    assert float(lif.alpha) == pytest.approx(0.9 * before + 0.1 * peak)
    assert int(lif.alpha_batches) == 2
    lif.eval()
    lif(first)
    assert int(lif.alpha_batches) == 2


def test_dynamic_alpha_is_the_last_training_batchs():
    lif, x = LIF(4, bits=4, alpha="dynamic"), draw(4, 2, 3, 4, 4, seed=1)
    lif(x)
    assert float(lif.alpha) == pytest.approx(observed_peak(lif, x))
    kept = float(lif.alpha)
    lif.eval()
    lif(2 * x)
    assert float(lif.alpha) == kept


def test_dynamic_alpha_makes_a_prediction_depend_on_its_batch():
    lif, x = LIF(8, tau=1.0, bits=2, alpha="dynamic").eval(), 0.3 * draw(8, 2, 3, 8, 8, seed=1)
    x[:, 1] *= 20
    assert not torch.equal(lif(x)[:, :1], lif(x[:, :1]))
    lif = LIF(8, tau=1.0, bits=2).eval()
    assert torch.equal(lif(x)[:, :1], lif(x[:, :1]))


def test_learned_alpha_is_a_parameter_and_gets_a_gradient():
    lif, x = LIF(3, bits=3, alpha="learned"), draw(3, 2, 3, 4, 4, seed=1)
    lif(x)
    start = lif.alpha.item()
    assert 0 < start <= 1
    lif(x).sum().backward()
    assert float(lif.alpha.grad) != 0
    assert lif.alpha.item() == start
    assert dict(lif.named_parameters()).keys() == {"alpha"}
    assert not dict(LIF(3, alpha="learned").named_parameters())  # a teacher has nothing to learn there


@pytest.mark.parametrize("student", ["ema", "dynamic", "learned"])
def test_a_students_lif_loads_a_teachers_state(student):
    teacher = LIF(3)
    teacher(draw(3, 1, 2, 4, 4))
    lif = LIF(3, bits=4, alpha=student)
    lif.load_state_dict(teacher.state_dict())
    lif(draw(3, 1, 2, 4, 4))
    assert lif.alpha.item() < 1  # taken from the first batch


def test_a_silent_layer_does_not_divide_by_zero():
    lif = LIF(3, bits=4)
    x = torch.zeros(3, 1, 2, 4, 4, requires_grad=True)
    s = lif(x)
    s.sum().backward()
    assert not s.any()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": 0}, "timesteps = 0"),
        ({"timesteps": 2.0}, "timesteps = 2.0"),
        ({"tau": 0.0}, "tau = 0.0"),
        ({"tau": 1.5}, "tau = 1.5"),
        ({"v_th": 0.0}, "v_th = 0.0"),
        ({"alpha": "fixed"}, "'fixed' is not one of ema, dynamic, learned"),
        ({"surrogate": "step"}, "'step' is not one of"),
        ({"reset": "soft", "quantize": "pre_fire"}, "hard reset only"),
    ],
)
def test_neurons_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LIF(**{"timesteps": 4, **options})


def test_surrogate_of_ones_own():
    assert LIF(2, surrogate=Rectangle(1.0, 0.3)).spike == Rectangle(1.0, 0.3)


# ------------------------------------------------------------------------------------------- pools, readout


def test_pools_of_spikes():
    x = spikes(2, 3, 4, 6, 6)
    flat = x.flatten(0, 1)
    for got, want in (
        (SpikeMaxPool2d(2)(x), F.max_pool2d(flat, 2)),
        (SpikeMaxPool2d(3, 2, 1)(x), F.max_pool2d(flat, 3, 2, 1)),
        (SpikeSumPool2d(3, 2, 1)(x), F.avg_pool2d(flat, 3, 2, 1)),
        (SpikeSumPool2d((2, 3), 1)(x), F.avg_pool2d(flat, (2, 3), 1)),
        (GlobalSpikePool()(x), flat.mean((2, 3), keepdim=True)),
        (Flatten()(x), flat.reshape(6, 144, 1, 1)),
    ):
        assert torch.equal(got, want.unflatten(0, (2, 3)))
    with pytest.raises(ConfigError, match="needs its stride"):
        SpikeSumPool2d((2, 3))


def test_readout_is_linear_in_the_mean_spike():
    readout = Readout(5, 3, 4, generator=torch.Generator().manual_seed(1))
    readout.bias.data = draw(3, seed=2)
    x = spikes(2, 4, 5, 3, 3)
    want = x.mean((0, 3, 4)) @ fake_quantize_weight(readout.weight, 4).T + readout.bias
    torch.testing.assert_close(readout(x), want)


# ---------------------------------------------------------------------------------------------------- taps


class Toy(nn.Module):
    """Two groups of blocks; the second group starts by a shortcut convolution."""

    class Unit(Block):
        def __init__(self, wide, down):
            super().__init__()
            self.lif = LIF(2)
            self.conv = QuantConv2d(wide, wide, 3, 2 if down else 1, 1)
            self.bn = QuantBatchNorm2d(wide, 32)
            self.down = (
                nn.Sequential(ShortcutQuant(32), QuantConv2d(wide, wide, 1, 2), QuantBatchNorm2d(wide, 32))
                if down
                else nn.Sequential()
            )

        def forward(self, x):
            return self.bn(self.conv(self.lif(x))) + self.down(x)

    def __init__(self):
        super().__init__()
        self.input = PixelInput([0.5], [0.3])
        self.stem = QuantConv2d(1, 3, 3, padding=1)
        self.stem_bn = QuantBatchNorm2d(3, 32)
        self.one = Group(self.Unit(3, False), self.Unit(3, False))
        self.two = Group(self.Unit(3, True))
        self.lif = LIF(2)
        self.flatten, self.hidden = Flatten(), QuantLinear(48, 6)
        self.hidden_lif = LIF(2)
        self.readout = Readout(6, 2, 32)

    def forward(self, x):
        x = self.two(self.one(self.stem_bn(self.stem(self.input(x)))))
        return self.readout(self.hidden_lif(self.hidden(self.flatten(self.lif(x)))))


@pytest.mark.parametrize(
    ("where", "want"),
    [
        ("conv", ["one.0.lif", "one.1.lif", "two.0.lif", "lif", "hidden_lif"]),
        ("block", ["one.1.lif", "two.0.lif", "lif"]),
        ("group", ["two.0.lif", "lif"]),
    ],
)
def test_a_tap_is_the_lif_that_consumes_the_output(where, want):
    model = Toy()
    names = {module: name for name, module in model.named_modules()}
    assert [names[lif] for lif in taps(model, where)] == want


def test_taps_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match="'layer': not one of conv, block, group"):
        taps(Toy(), "layer")
    plain = nn.Sequential(PixelInput([0.5], [0.3]), QuantConv2d(1, 2, 1), LIF(2), Readout(2, 2))
    assert taps(plain, "conv") == [plain[2]]
    with pytest.raises(ConfigError, match="no such place that a LIF reads"):
        taps(plain, "group")


def test_a_forward_that_depends_on_values_cannot_be_traced():
    class Branching(Toy):
        def forward(self, x):
            x = super().forward(x)
            return x if x.sum() > 0 else -x

    with pytest.raises(LoweringError, match=r"Branching: its forward cannot be traced.*without conditions on values"):
        taps(Branching())


def test_set_timesteps_reaches_every_lif():
    model = Toy()
    set_timesteps(model, 3)
    assert [m.timesteps for m in model.modules() if isinstance(m, LIF)] == [3] * 5
    model(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
