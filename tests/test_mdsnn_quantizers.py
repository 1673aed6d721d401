"""Eqs. 3 and 4 against their formulas in NumPy: values at ties and zeros, gradients, and equality with frozen codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mdsnn.kernels.errors import FormatError
from mdsnn.kernels.formats import Grid, delta, weight_codes
from mdsnn.quantizers import (
    check_finite,
    fake_quantize_bn,
    fake_quantize_membrane,
    fake_quantize_weight,
    quantize_bn,
    quantize_tanh,
    round_to_codes,
    round_to_grid,
)

weights = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=st.floats(-4, 4, width=32))
bits_2_to_8 = st.integers(2, 8)


def grad_of(function, values):
    """Gradient of sum(c * function(x)) with c = 1, 2, 3, ..., so that a permuted gradient shows."""
    x = torch.tensor(values, requires_grad=True)
    y = function(x)
    upstream = torch.arange(1, y.numel() + 1, dtype=y.dtype).reshape(y.shape)
    (y * upstream).sum().backward()
    return x.grad.numpy(), upstream.numpy()


@settings(deadline=None)
@given(w=weights, bits=bits_2_to_8)
def test_live_weight_codes_are_the_frozen_codes(w, bits):
    codes, alpha = quantize_tanh(torch.from_numpy(w), bits)
    frozen, frozen_alpha = weight_codes(w, bits)
    np.testing.assert_array_equal(codes.numpy(), frozen)
    assert float(alpha) == frozen_alpha


@settings(deadline=None)
@given(w=weights, bits=bits_2_to_8)
def test_fake_quantized_weight_is_alpha_times_code_over_delta(w, bits):
    codes, alpha = weight_codes(w, bits)
    got = fake_quantize_weight(torch.from_numpy(w), bits)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), alpha * codes.astype(np.float64) / delta(bits), rtol=1e-6, atol=0)


def test_ties_go_to_the_even_code():
    w = torch.tensor([0.3, -0.3], dtype=torch.float64)
    double = 2.0 * torch.tanh(w[0])  # tanh(w)/alpha is exactly 1/2
    assert quantize_tanh(w, 2, double)[0].tolist() == [0.0, -0.0]  # 0.5 -> 0
    assert quantize_tanh(w, 3, double)[0].tolist() == [2.0, -2.0]  # 1.5 -> 2
    assert quantize_tanh(w, 4, double)[0].tolist() == [4.0, -4.0]  # 3.5 -> 4


def test_a_given_alpha_clamps():
    codes, alpha = quantize_tanh(torch.tensor([3.0, -3.0, 0.1]), 4, 0.5)
    assert codes.tolist() == [7.0, -7.0, 1.0]  # tanh(0.1)/0.5*7 = 1.395
    assert float(alpha) == 0.5


def test_codes_are_computed_in_float64():
    """A scale that puts each weight 1e-10 below the tie at 1.5 levels: float32 tanh would cross it for half of them."""
    for w in np.linspace(0.1, 2.0, 40, dtype=np.float32):
        alpha = np.tanh(np.float64(w)) * 7 / (1.5 - 1e-10)
        assert quantize_tanh(torch.tensor([w]), 4, float(alpha))[0].item() == 1.0


@pytest.mark.parametrize("bits", range(2, 9))
def test_an_all_zero_tensor_has_codes_0_and_alpha_1(bits):
    codes, alpha = quantize_tanh(torch.zeros(3, 2), bits)
    assert not codes.any()
    assert float(alpha) == 1.0
    assert not fake_quantize_weight(torch.zeros(3, 2), bits).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused_by_name(bad):
    w = torch.tensor([0.0, bad])
    with pytest.raises(FormatError, match=r"'stem.weight' holds 1 NaN or infinite"):
        quantize_tanh(w, 4, name="stem.weight")
    with pytest.raises(FormatError, match=r"'stem.weight'"):
        fake_quantize_weight(w, 4, name="stem.weight")
    with pytest.raises(FormatError, match="'x'"):
        check_finite(w, "x")


@pytest.mark.parametrize("bits", [0, 1, 9, 16, 31, 33, -4])
def test_other_widths_are_refused(bits):
    w = torch.ones(2)
    for quantizer in (
        lambda: quantize_tanh(w, bits),
        lambda: fake_quantize_weight(w, bits),
        lambda: fake_quantize_membrane(w, bits, 1.0),
        lambda: fake_quantize_bn(w, bits),
        lambda: round_to_codes(w, bits, 0.5),
    ):
        with pytest.raises(FormatError, match=r"outside 2\.\.8"):
            quantizer()


def test_32_bits_is_the_identity():
    x = torch.randn(5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert fake_quantize_weight(x, 32) is x
    assert fake_quantize_membrane(x, 32, 0.5) is x
    assert fake_quantize_bn(x, 32) is x
    assert round_to_codes(x, 32, 0.5) is x


@settings(deadline=None)
@given(w=hnp.arrays(np.float64, 7, elements=st.floats(-3, 3)), bits=bits_2_to_8)
def test_weight_gradient(w, bits):
    grad, upstream = grad_of(lambda x: fake_quantize_weight(x, bits), w)
    np.testing.assert_allclose(grad, upstream * (1 - np.tanh(w) ** 2), rtol=1e-12)


@settings(deadline=None)
@given(u=hnp.arrays(np.float64, 7, elements=st.floats(-3, 3)), bits=bits_2_to_8, alpha=st.floats(0.01, 1.0))
def test_membrane_value_and_gradients(u, bits, alpha):
    top = delta(bits)
    ratio = np.tanh(u) / alpha
    if np.any(np.abs(np.abs(ratio) - 1) < 1e-9) or np.any(np.abs(ratio * top % 1 - 0.5) < 1e-9):
        return  # within an ulp of a tie or of the clamp NumPy and torch may differ
    code = np.rint(np.clip(ratio, -1, 1) * top)
    scale = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    x = torch.tensor(u, requires_grad=True)
    y = fake_quantize_membrane(x, bits, scale)
    np.testing.assert_allclose(y.detach().numpy(), alpha * code / top, rtol=1e-12)
    upstream = np.arange(1.0, 8.0)
    y.backward(torch.from_numpy(upstream))
    inside = np.abs(ratio) <= 1
    np.testing.assert_allclose(x.grad.numpy(), upstream * (1 - np.tanh(u) ** 2) * inside, rtol=1e-12)
    want = np.sum(upstream * (code / top - np.where(inside, ratio, 0)))
    np.testing.assert_allclose(scale.grad.numpy(), want, rtol=1e-9, atol=1e-12)


def test_eq4_moves_its_outermost_levels_off_the_grid():
    got = quantize_bn(torch.tensor([10.0, -10.0, 1.0, 0.0]), 8)
    # tanh(1)*127 = 96.72; the outermost levels 127/127 are clamped to 127/128, which is no j/127
    assert got.tolist() == [127 / 128, -127 / 128, 97 / 127, 0.0]


def test_wageubn_levels():
    got = quantize_bn(torch.tensor([1.0, -7.0, 0.5, 1.6 / 128, 2.5 / 128]), 8, "wageubn")
    assert got.tolist() == [127 / 128, -127 / 128, 64 / 128, 2 / 128, 2 / 128]


def test_another_bn_grid_is_refused():
    with pytest.raises(FormatError, match="'mint' is not one of eq4, wageubn"):
        quantize_bn(torch.ones(1), 8, "mint")


@settings(deadline=None)
@given(w=hnp.arrays(np.float64, 7, elements=st.floats(-5, 5)), bits=bits_2_to_8)
def test_bn_gradient(w, bits):
    grad, upstream = grad_of(lambda x: fake_quantize_bn(x, bits), w)
    np.testing.assert_allclose(grad, upstream * (1 - np.tanh(w) ** 2), rtol=1e-9)
    grad, upstream = grad_of(lambda x: fake_quantize_bn(x, bits, "wageubn"), w)
    np.testing.assert_array_equal(grad, upstream)


def test_grid_rounding_is_half_up_and_saturates():
    grid = Grid(5, 1)
    y = np.array([0.5, 1.5, -0.5, -1.5, 0.49, 31.4, 31.5, 32.4, 40, -32.6, -40]) / 32
    grad, upstream = grad_of(lambda x: round_to_grid(x, grid), y)
    got = round_to_grid(torch.from_numpy(y), grid).numpy() * 32
    assert got.tolist() == [1, 2, 0, -1, 0, 31, 32, 32, 32, -32, -32]
    np.testing.assert_array_equal(grad, upstream * np.array([1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]))


def test_shortcut_codes_are_half_up_and_saturate():
    x = np.array([0.5, -0.5, 6.4, 7.4, 9, -7.4, -9]) / 4
    grad, upstream = grad_of(lambda v: round_to_codes(v, 4, 0.25), x)
    assert (round_to_codes(torch.from_numpy(x), 4, 0.25).numpy() * 4).tolist() == [1, 0, 6, 7, 7, -7, -7]
    np.testing.assert_array_equal(grad, upstream * np.array([1, 1, 1, 1, 0, 1, 0]))


@settings(max_examples=20, deadline=None)
@given(grid=st.builds(Grid, st.integers(5, 12), st.sampled_from([1, 8, 64])), seed=st.integers(0, 99))
def test_grid_rounding_is_a_bn_tables(grid, seed):
    """The live rounding and clamp((y * 2**f + half) floored, -C, C) are one function."""
    y = np.random.default_rng(seed).normal(0, grid.clip, 50).astype(np.float32)
    want = np.clip(np.floor(y.astype(np.float64) * grid.one + 0.5), -grid.saturation, grid.saturation)
    np.testing.assert_array_equal(round_to_grid(torch.from_numpy(y), grid).numpy() * grid.one, want)
