"""What the networks of this folder have in common: the options of quantization and neuron, and the layers they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mdsnn.kernels.errors import ConfigError
from mdsnn.kernels.formats import Grid

from ..layers import (
    LIF,
    Block,
    EventInput,
    PixelInput,
    QuantBatchNorm2d,
    QuantConv2d,
    QuantLinear,
    Readout,
    ShortcutQuant,
    check_quantizer,
    share_scales,
)
from ..quantizers import FULL_PRECISION
from ..surrogate import SURROGATES, surrogate

CODINGS = ("image", "events")
NORMS = ("bn", "tdbn")


@dataclass(frozen=True)
class Settings:
    """Options that every network takes; each is explained at the layer it goes to.

    weight_bits    of convolutions and hidden linear layers; 32 makes stem, classifier and shortcuts full precision too
    stem_bits      of the first convolution and the classifier, where weight_bits is not 32
    shortcut_bits  of the codes a 1x1 shortcut reads, where weight_bits is not 32
    quantizer      of weights and membranes: "tanh" (MD-SNN Eq. 3), or "mint" (uniform, one learned scale for both)
    norm           "bn", or "tdbn": gamma times v_th, and times 1/sqrt(2) on a branch that is added to another
                   (threshold-dependent BN, arXiv 2011.05280; "bn" too takes its statistics over T and N together)
    checkpoint_activations  keep only the inputs of blocks for the backward pass, and compute the rest a second time
    gamma, width   of the surrogate; None takes its default
    mean, std      of the pixels, one a channel; None: 0.5 and 0.25
    grid           of the residual stream; a network in which anything is quantized rounds BN outputs to it
    """

    classes: int = 10
    in_channels: int = 3
    size: tuple[int, int] = (32, 32)
    timesteps: int = 4
    coding: str = "image"
    weight_bits: int = FULL_PRECISION
    membrane_bits: int = FULL_PRECISION
    bn_bits: int = FULL_PRECISION
    stem_bits: int = 8
    shortcut_bits: int = 8
    tau: float = 0.5
    v_th: float = 0.5
    reset: str = "hard"
    surrogate: str = "triangle"
    gamma: float | None = None
    width: float | None = None
    quantize: str = "post_reset"
    alpha: str = "ema"
    detach_reset: bool = False
    bn_grid: str = "eq4"
    statistics_bits: int = FULL_PRECISION
    quantizer: str = "tanh"
    norm: str = "bn"
    checkpoint_activations: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    grid: Grid = field(default_factory=Grid)
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.coding not in CODINGS:
            raise ConfigError(f"coding {self.coding!r} is not one of {', '.join(CODINGS)}")
        if self.norm not in NORMS:
            raise ConfigError(f"norm {self.norm!r} is not one of {', '.join(NORMS)}")
        check_quantizer(self.quantizer)
        if self.classes < 1 or self.in_channels < 1 or min(self.size) < 1:
            raise ConfigError(
                f"classes = {self.classes}, in_channels = {self.in_channels} and size = {self.size} must be above 0"
            )

    @property
    def full(self) -> bool:
        """True for a teacher: nothing is quantized."""
        return self.weight_bits == self.membrane_bits == self.bn_bits == FULL_PRECISION

    @property
    def output_grid(self) -> Grid | None:
        return None if self.full else self.grid

    def input(self) -> PixelInput | EventInput:
        if self.coding == "events":
            return EventInput(self.in_channels)
        return PixelInput(self.mean or (0.5,) * self.in_channels, self.std or (0.25,) * self.in_channels)

    def _outer(self, bits: int) -> int:
        return FULL_PRECISION if self.weight_bits == FULL_PRECISION else bits

    def conv(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, padding: int, *, stem: bool = False
    ) -> QuantConv2d:
        bits = self._outer(self.stem_bits) if stem else self.weight_bits
        return QuantConv2d(
            in_channels,
            out_channels,
            kernel,
            stride,
            padding,
            weight_bits=bits,
            generator=self.generator,
            quantizer=self.quantizer,
        )

    def linear(self, in_features: int, out_features: int) -> QuantLinear:
        return QuantLinear(
            in_features,
            out_features,
            weight_bits=self.weight_bits,
            generator=self.generator,
            quantizer=self.quantizer,
        )

    def bn(self, channels: int, *, added: bool = False) -> QuantBatchNorm2d:
        """`added`: its output is added to another branch's."""
        gain = 1.0 if self.norm == "bn" else self.v_th * (math.sqrt(0.5) if added else 1.0)
        return QuantBatchNorm2d(
            channels, self.bn_bits, self.bn_grid, self.output_grid, statistics_bits=self.statistics_bits, gain=gain
        )

    def lif(self) -> LIF:
        if self.surrogate not in SURROGATES:
            surrogate(self.surrogate)  # raises, and lists the choices
        shape = {k: v for k, v in (("gamma", self.gamma), ("width", self.width)) if v is not None}
        return LIF(
            self.timesteps,
            self.tau,
            self.v_th,
            self.reset,
            SURROGATES[self.surrogate](**shape),
            self.membrane_bits,
            self.quantize,
            self.alpha,
            detach_reset=self.detach_reset,
            quantizer=self.quantizer,
        )

    def shortcut(self) -> ShortcutQuant:
        return ShortcutQuant(self._outer(self.shortcut_bits))

    def readout(self, in_features: int) -> Readout:
        bits = self._outer(self.stem_bits)
        return Readout(in_features, self.classes, bits, generator=self.generator, quantizer=self.quantizer)

    def finish(self, model: nn.Module) -> None:
        """What is done to a whole network, once its layers are there."""
        if self.quantizer == "mint":
            share_scales(model)
        for module in model.modules():
            if isinstance(module, Block):
                module.recompute = self.checkpoint_activations

    def document(self) -> dict[str, Any]:
        """These options as JSON-able values; `from_document` reads them back."""
        skip = ("generator", "grid")
        plain = {k: v for k, v in vars(self).items() if k not in skip}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}
        return {**plain, "grid": {"frac_bits": self.grid.frac_bits, "clip": self.grid.clip}}


def settings(**options: Any) -> Settings:
    """Settings from keyword arguments or from a document: sizes, sequences and the grid may be in JSON's form."""
    if (size := options.get("size")) is not None:
        options["size"] = (size, size) if isinstance(size, int) else tuple(int(side) for side in size)
    for key in ("mean", "std"):
        if options.get(key) is not None:
            options[key] = tuple(float(value) for value in options[key])
    if isinstance(options.get("grid"), dict):
        options["grid"] = Grid(**options["grid"])
    unknown = sorted(set(options) - set(Settings.__dataclass_fields__))
    if unknown:
        raise ConfigError(
            f"unknown model options: {', '.join(unknown)}; known: {', '.join(Settings.__dataclass_fields__)}"
        )
    return Settings(**options)


def lengths(name: str, values: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    """Check that a sequence holds whole numbers above 0, as many as `other` does."""
    if not values or len(values) != len(other) or any(type(v) is not int or v < 1 for v in values):
        raise ConfigError(f"{name} = {list(values)} must be {len(other)} whole numbers above 0")
    return tuple(values)
