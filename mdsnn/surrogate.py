"""Spike functions: a hard step forward, one class per shape of the gradient that stands in for its derivative.

Each is called with x = h - v_th and returns 1 where x > 0, else 0, in x's dtype (MD-SNN Eq. 2: strictly above).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mdsnn.kernels.errors import ConfigError


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.surrogate = surrogate
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * ctx.surrogate.gradient(x), None


@dataclass(frozen=True)
class Surrogate:
    """Heaviside forward; `gradient(x)` backward. Subclasses give the shape.

    gamma  height at x = 0      width  half the base of the shape, in units of the membrane
    """

    gamma: float = 1.0
    width: float = 1.0

    def __post_init__(self) -> None:
        if not self.gamma > 0 or not self.width > 0:
            raise ConfigError(f"a surrogate's gamma = {self.gamma} and width = {self.width} must be above 0")

    def __call__(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Step.apply(x, self))  # type: ignore[no-untyped-call]

    def gradient(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Triangle(Surrogate):
    """gamma * max(0, 1 - |x|/width)."""

    def gradient(self, x: Tensor) -> Tensor:
        return self.gamma * torch.clamp(1.0 - x.abs() / self.width, min=0.0)


@dataclass(frozen=True)
class Rectangle(Surrogate):
    """gamma where |x| < width, else 0; the defaults are the window of STBP and MS-ResNet (|x| < 0.5, height 1)."""

    width: float = 0.5

    def gradient(self, x: Tensor) -> Tensor:
        return self.gamma * (x.abs() < self.width).to(x.dtype)


SURROGATES: dict[str, type[Surrogate]] = {"triangle": Triangle, "rectangle": Rectangle}


def surrogate(choice: str | Surrogate) -> Surrogate:
    """A surrogate by name ("triangle", "rectangle") with its defaults, or the one given; raises ConfigError."""
    if isinstance(choice, Surrogate):
        return choice
    if choice not in SURROGATES:
        raise ConfigError(f"surrogate {choice!r} is not one of {', '.join(SURROGATES)}")
    return SURROGATES[choice]()
