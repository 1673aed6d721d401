"""The spike is hard and strict; each surrogate's gradient has the shape its class names."""

from __future__ import annotations

import pytest
import torch

from mdsnn.kernels.errors import ConfigError
from mdsnn.surrogate import SURROGATES, Rectangle, Triangle, surrogate


@pytest.mark.parametrize("spike", [Triangle(), Rectangle(), Triangle(2.0, 0.1)])
def test_forward_is_a_strict_step(spike):
    x = torch.tensor([-1.0, -1e-45, 0.0, 1e-45, 1.0])
    got = spike(x)
    assert got.dtype == torch.float32
    assert got.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("spike", "want"),
    [
        (Triangle(), [0.0, 0.0, 0.5, 1.0, 0.75, 0.0]),
        (Triangle(gamma=2.0, width=2.0), [0.0, 1.0, 1.5, 2.0, 1.75, 0.0]),
        (Rectangle(), [0.0, 0.0, 0.0, 1.0, 1.0, 0.0]),
        (Rectangle(gamma=3.0, width=0.75), [0.0, 0.0, 3.0, 3.0, 3.0, 0.0]),
    ],
)
def test_gradient(spike, want):
    x = torch.tensor([-2.5, -1.0, -0.5, 0.0, 0.25, 2.0], requires_grad=True)
    spike(x).backward(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 7.0]))
    assert x.grad.tolist() == want


def test_by_name():
    assert surrogate("triangle") == Triangle()
    assert surrogate("rectangle") == Rectangle()
    own = Rectangle(1.0, 0.25)
    assert surrogate(own) is own
    assert set(SURROGATES) == {"triangle", "rectangle"}
    with pytest.raises(ConfigError, match="'arctan' is not one of triangle, rectangle"):
        surrogate("arctan")


@pytest.mark.parametrize("shape", [{"gamma": 0.0}, {"width": 0.0}, {"width": -1.0}, {"gamma": float("nan")}])
def test_a_flat_or_upside_down_shape_is_refused(shape):
    with pytest.raises(ConfigError, match="above 0"):
        Triangle(**shape)
