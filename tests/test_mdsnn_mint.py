"""MINT's quantizers against their formulas in NumPy, the scale that weights and membranes share, and its integers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mdsnn.export.lower import lower
from mdsnn.freeze import freeze, frozen_trace
from mdsnn.kernels import engine
from mdsnn.kernels.errors import ConfigError, FormatError, LoweringError
from mdsnn.kernels.formats import Grid, delta
from mdsnn.layers import LIF, QuantConv2d, Readout
from mdsnn.models import ms_resnet, vgg
from mdsnn.quantizers import fake_quantize_shared, fake_quantize_uniform, uniform_codes, uniform_thresholds
from planted import assert_same_bits

STUDENT = {"weight_bits": 4, "membrane_bits": 4, "bn_bits": 8, "quantizer": "mint"}
reals = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=st.floats(-2, 2, width=32))
widths = st.integers(2, 8)


def small(**options):
    generator = torch.Generator().manual_seed(1)
    return ms_resnet((1, 1), (4, 6), in_channels=1, size=8, generator=generator, **{**STUDENT, **options})


def pixels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)


@settings(deadline=None)
@given(u=reals, bits=widths, alpha=st.floats(0.0078125, 1.0, width=32))
def test_membrane_value_and_gradients(u, bits, alpha):
    top, upstream = delta(bits), np.arange(1, u.size + 1, dtype=np.float32).reshape(u.shape)
    x, scale = torch.tensor(u, requires_grad=True), torch.tensor(alpha, requires_grad=True)
    y = fake_quantize_uniform(x, bits, scale)
    (y * torch.from_numpy(upstream)).sum().backward()
    a = np.float32(alpha)
    ratio = u / a
    codes = np.rint(np.clip(ratio, -1, 1) * np.float32(top))
    np.testing.assert_array_equal(y.detach().numpy(), codes * (a / np.float32(top)))
    inside = np.abs(ratio) <= 1
    np.testing.assert_array_equal(x.grad.numpy(), upstream * inside)
    want = (upstream * (codes / top - np.where(inside, ratio, 0)).astype(np.float64)).sum() / np.sqrt(u.size * top)
    assert float(scale.grad) == pytest.approx(want, rel=1e-4, abs=1e-3)


@settings(deadline=None)
@given(w=reals, bits=widths, alpha=st.floats(0.0078125, 1.0, width=32))
def test_weight_value_and_gradients(w, bits, alpha):
    top, upstream = delta(bits), np.arange(1, w.size + 1, dtype=np.float32).reshape(w.shape)
    x, scale = torch.tensor(w, requires_grad=True), torch.tensor(alpha, requires_grad=True)
    y = fake_quantize_shared(x, bits, scale)
    (y * torch.from_numpy(upstream)).sum().backward()
    peak = np.abs(w).max() or np.float32(1)
    codes = np.rint(w.astype(np.float64) / np.float64(peak) * top)
    np.testing.assert_array_equal(uniform_codes(torch.from_numpy(w), bits)[0].numpy(), codes)
    np.testing.assert_array_equal(y.detach().numpy(), codes.astype(np.float32) * (np.float32(alpha) / np.float32(top)))
    np.testing.assert_allclose(x.grad.numpy(), upstream * (np.float32(alpha) / peak), rtol=1e-6)
    want = (upstream * codes / top).sum() / np.sqrt(w.size * top)
    assert float(scale.grad) == pytest.approx(want, rel=1e-4, abs=1e-3)


def test_ties_zeros_and_ends():
    one = torch.ones(())
    u = torch.tensor([0.0, 0.5, 1.5, -1.5, 2.5, 3.0, 9.0, -9.0]) / 3  # 3 bits: delta 3
    assert (fake_quantize_uniform(u, 3, one) * 3).round().tolist() == [0, 0, 2, -2, 2, 3, 3, -3]
    codes, peak = uniform_codes(torch.tensor([0.0, 1.0, 3.0, -6.0, 5.0]), 3)
    assert codes.tolist() == [0, 0, 2, -3, 2]  # 0.5 -> 0, 1.5 -> 2, 2.5 -> 2
    assert float(peak) == 6.0
    assert [value.item() for value in uniform_codes(torch.zeros(1), 4)] == [0.0, 1.0]


def test_weights_that_feed_no_membrane_keep_their_own_scale():
    w = torch.tensor([0.1, -0.4], requires_grad=True)
    y = fake_quantize_shared(w, 3)
    y.sum().backward()
    assert y.tolist() == pytest.approx([0.4 / 3, -0.4])
    assert w.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_other_widths_are_refused(bits):
    for quantize in (fake_quantize_shared, fake_quantize_uniform):
        with pytest.raises(FormatError, match=r"outside 2\.\.8"):
            quantize(torch.zeros(2), bits, torch.ones(()))
        assert torch.equal(quantize(torch.full((2,), 0.3), 32, torch.ones(())), torch.full((2,), 0.3))


@settings(deadline=None, max_examples=40)
@given(bits=widths, alpha=st.floats(0.001, 1.5), frac=st.integers(5, 12))
def test_thresholds_are_the_quantizer_on_the_grid(bits, alpha, frac):
    grid, top = Grid(frac, 8), delta(bits)
    n = np.arange(-2 * grid.one, 2 * grid.one + 1)
    a = min(max(alpha, 2.0**-frac), 1.0)
    want = np.rint(np.clip(n * 2.0**-frac / a, -1, 1) * top)
    thresholds = uniform_thresholds(alpha, bits, grid)
    assert thresholds.dtype == np.int32
    np.testing.assert_array_equal(np.searchsorted(thresholds, n, side="right") - top, want)


def test_weights_share_the_scale_of_the_membrane_they_feed():
    model = small()
    shared = {n: m.alpha for n, m in model.named_modules() if isinstance(m, QuantConv2d)}
    lifs = {n: m.alpha for n, m in model.named_modules() if isinstance(m, LIF)}
    reads = {
        "stem": "groups.0.0.lif1",
        "groups.0.0.conv1": "groups.0.0.lif2",
        "groups.0.0.conv2": "groups.1.0.lif1",
        "groups.1.0.conv1": "groups.1.0.lif2",
        "groups.1.0.conv2": "lif",
        "groups.1.0.shortcut.1": "lif",
    }
    assert shared.keys() == reads.keys()
    for conv, lif in reads.items():
        assert shared[conv] is lifs[lif]
    alphas = [p for p in model.parameters() if p.ndim == 0]
    assert len(alphas) == len(lifs)  # each is one parameter to the optimizer
    assert all(m.alpha is None for m in small(membrane_bits=32).modules() if isinstance(m, QuantConv2d))


def trained(model, steps=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        loss = torch.nn.functional.cross_entropy(model(torch.from_numpy(pixels(8, step))), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_bits": 2, "membrane_bits": 8},
        {"reset": "soft", "stem_bits": 4},
        {"quantize": "pre_fire", "v_th": 0.2},
        {"norm": "tdbn", "grid": Grid(7, 4)},
    ],
)
def test_it_trains_and_its_integers_agree_in_every_executor(options):
    model = small(**options)
    before = [p.item() for p in model.parameters() if p.ndim == 0]
    trained(model)
    assert [p.item() for p in model.parameters() if p.ndim == 0] != before
    if "quantize" in options:
        for lif in (m for m in model.modules() if isinstance(m, LIF)):
            lif.alpha.data.clamp_(min=0.3)  # above v_th, or it could never fire
    frozen, x, grid = freeze(model), pixels(3, 9), options.get("grid", Grid()).frac_bits
    for name, module in frozen.named_modules():
        if isinstance(module, LIF):
            assert module.constants.alpha == min(max(float(module.alpha), 2.0**-grid), 1.0), name
        if isinstance(module, QuantConv2d):
            assert module.constants.alpha == min(max(float(module.alpha), 2.0**-grid), 1.0), name
    trace, logits = frozen_trace(frozen, x)
    network = lower(frozen)
    assert any(s.any() for _, s, _ in trace.values())
    for kernels in ("reference", "native", *(["numba"] if not options else [])):
        result = engine.run(network, x, kernels=kernels, trace=True)
        assert_same_bits(logits, result.logits, f"{kernels}: logits")
        for name, states in trace.items():
            for what, got in zip("hsq", states, strict=True):
                assert_same_bits(got, getattr(result.trace.lifs[name], what), f"{kernels}: {what} of {name!r}")


def test_frozen_and_live_predictions_are_close():
    model = trained(small()).eval()
    live, codes = model(torch.from_numpy(pixels(32, 5))), freeze(model)(torch.from_numpy(pixels(32, 5)))
    readout = next(m for m in freeze(model).modules() if isinstance(m, Readout))
    assert float((codes * readout.constants.unit - live).abs().mean()) < 0.1 * float(live.std())


def test_a_vgg_of_mint_freezes():
    model = vgg((1, 1), (4, 6), hidden=(7, 5), in_channels=1, size=8, **STUDENT)
    model(torch.from_numpy(pixels(8)))
    x = pixels(2, 3)
    assert_same_bits(engine.run(lower(freeze(model)), x).logits, frozen_trace(freeze(model), x)[1], "logits")


def test_a_scale_beyond_its_bounds_comes_back():
    """A clamp passes no gradient outside, so a step past 1 must not be the end of learning."""
    lif = LIF(1, bits=4, quantizer="mint")
    x = torch.linspace(-0.4, 0.4, 9).reshape(1, 1, 1, 3, 3)
    lif(x)
    lif.alpha.data.fill_(1.5)
    lif.timesteps = 2
    lif(x).sum().backward()
    assert float(lif.alpha) == 1.0
    assert float(lif.alpha.grad) != 0.0


@pytest.mark.parametrize("part", ["weight_bits", "membrane_bits", "bn_bits"])
@pytest.mark.parametrize("quantizer", ["tanh", "mint"])
def test_a_part_at_full_precision_trains_but_has_no_integers(part, quantizer):
    model = small(**{part: 32, "quantizer": quantizer})
    trained(model, 2)
    with pytest.raises(LoweringError, match="= 32 is full precision"):
        freeze(model)


def test_a_copy_shares_among_itself_alone():
    model = small()
    again = copy.deepcopy(model)
    assert again.stem.alpha is again.groups[0][0].lif1.alpha
    assert again.stem.alpha is not model.stem.alpha


def test_a_quantizer_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="'lsq' is not one of tanh, mint"):
        small(quantizer="lsq")
