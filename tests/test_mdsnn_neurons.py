"""The LIF step against trajectories worked out by hand, and its integer twin against the NumPy definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdsnn.kernels import reference
from mdsnn.kernels.errors import ConfigError
from mdsnn.kernels.formats import delta
from mdsnn.neurons import LifCodes, check_neuron, lif_step, lif_step_codes
from mdsnn.quantizers import fake_quantize_membrane
from mdsnn.surrogate import Triangle

CURRENT = [0.4, 0.4, 0.4, 0.2, -1.0, 0.95]


def trajectory(current, **options):
    """(s, u, h) of one neuron over the steps, tau 0.5 and v_th 0.5."""
    u, out = torch.zeros(1, 1, 1, 1, dtype=torch.float64), []
    for value in current:
        x = torch.full((1, 1, 1, 1), value, dtype=torch.float64)
        s, u, h = lif_step(x, u, tau=0.5, v_th=0.5, spike=Triangle(), **options)
        out.append((float(s), float(u), float(h)))
    return [list(column) for column in zip(*out, strict=True)]


def test_hard_reset_by_hand():
    s, u, h = trajectory(CURRENT, reset="hard")
    assert s == [0, 1, 0, 0, 0, 1]
    assert h == pytest.approx([0.4, 0.6, 0.4, 0.4, -0.8, 0.55])
    assert u == pytest.approx([0.4, 0.0, 0.4, 0.4, -0.8, 0.0])


def test_soft_reset_by_hand():
    s, u, h = trajectory(CURRENT[:4], reset="soft")
    assert s == [0, 1, 0, 0]
    assert h == pytest.approx([0.4, 0.6, 0.45, 0.425])
    assert u == pytest.approx([0.4, 0.1, 0.45, 0.425])


def test_post_reset_quantization_by_hand():
    """3 bits, alpha 0.6: tanh(0.4)/0.6*3 = 1.90 -> 2 stands for 0.4; tanh(0.2)/0.6*3 = 0.987 -> 1 stands for 0.2."""
    s, u, h = trajectory([0.4, 0.4, 0.2, -2.0], reset="hard", requantize=lambda v: fake_quantize_membrane(v, 3, 0.6))
    assert h == pytest.approx([0.4, 0.6, 0.2, -1.9])  # -1.9 saturates at -3, which stands for -0.6
    assert s == [0, 1, 0, 0]
    assert u == pytest.approx([0.4, 0.0, 0.2, -0.6])


def test_pre_fire_quantization_by_hand():
    """3 bits, alpha 0.8: h = 0.4 -> 1 -> 0.2667; h = 0.4 + 0.1333 -> tanh/0.8*3 = 1.83 -> 2 -> 0.5333 > v_th."""
    s, u, h = trajectory(
        [0.4, 0.4, 0.35], reset="hard", quantize="pre_fire", requantize=lambda v: fake_quantize_membrane(v, 3, 0.8)
    )
    assert h == pytest.approx([0.4, 0.4 + 0.4 / 3, 0.35])
    assert s == [0, 1, 0]
    assert u == pytest.approx([0.8 / 3, 0.0, 0.8 / 3])


def test_a_membrane_at_the_threshold_does_not_fire():
    assert trajectory([0.5], reset="hard")[0] == [0]
    assert trajectory([0.5000001], reset="hard")[0] == [1]


def step_gradients(**options):
    """du_next/dx and du_next/du of one step at h = 0.75."""
    x = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    u = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    _, u_next, _ = lif_step(x, u, tau=0.5, v_th=0.5, spike=Triangle(), **options)
    u_next.sum().backward()
    return float(x.grad), float(u.grad)


def test_gradient_through_the_reset():
    """h = 0.75 fires, where the triangle is 0.75: d(h*(1-s))/dh = 0 - h*0.75 (hard), d(h - v_th*s)/dh = 1 - 0.375."""
    assert step_gradients(reset="hard") == pytest.approx((-0.5625, -0.28125))
    assert step_gradients(reset="soft") == pytest.approx((0.625, 0.3125))
    assert step_gradients(reset="hard", detach_reset=True) == pytest.approx((0.0, 0.0))
    assert step_gradients(reset="soft", detach_reset=True) == pytest.approx((1.0, 0.5))


@pytest.mark.parametrize(
    ("reset", "quantize", "message"),
    [
        ("none", "post_reset", "reset 'none' is not one of hard, soft"),
        ("hard", "never", "quantize 'never' is not one of post_reset, pre_fire"),
        ("soft", "pre_fire", "hard reset only"),
    ],
)
def test_neurons_that_do_not_exist_are_refused(reset, quantize, message):
    with pytest.raises(ConfigError, match=message):
        check_neuron(reset, quantize)


@settings(deadline=None)
@given(data=st.data())
def test_integer_step_is_the_reference_bit_for_bit(data):
    bits = data.draw(st.integers(2, 8))
    top = delta(bits)
    values = st.integers(-600, 600)
    thresholds = sorted(data.draw(st.lists(values, min_size=2 * top, max_size=2 * top)))
    decode = sorted(data.draw(st.lists(values, min_size=2 * top + 1, max_size=2 * top + 1)))
    reset, quantize = data.draw(st.sampled_from([("hard", "post_reset"), ("soft", "post_reset"), ("hard", "pre_fire")]))
    v_th, v_soft = data.draw(st.integers(1, 500)), data.draw(st.integers(1, 500)) if reset == "soft" else 0
    q_th = data.draw(st.integers(0, top - 1)) if quantize == "pre_fire" else 0
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = rng.integers(-700, 701, (1, 40, 1, 1))
    x[0, :10, 0, 0] = rng.choice(thresholds, 10)  # ties
    x[0, 10, 0, 0] = v_th
    q = rng.integers(-top, top + 1, (1, 40, 1, 1))
    q[0, :11] = np.argmin(np.abs(decode)) - top
    codes = LifCodes(
        bits, 1.0, torch.tensor(decode, dtype=torch.int32), torch.tensor(thresholds, dtype=torch.int32),
        v_th, reset, v_soft, quantize, q_th,
    )  # fmt: skip
    s, q_next, h = lif_step_codes(torch.from_numpy(x.astype(np.int32)), torch.from_numpy(q.astype(np.int32)), codes)
    want_h, want_s, want_q = reference.lif_step(
        x, q, np.array(decode), np.array(thresholds), bits, v_th, reset, v_soft, quantize, q_th
    )
    np.testing.assert_array_equal(h.numpy(), want_h)
    np.testing.assert_array_equal(s.numpy(), want_s)
    np.testing.assert_array_equal(q_next.numpy(), want_q)
    assert (h.dtype, s.dtype, q_next.dtype) == (torch.int32, torch.uint8, torch.int32)
