"""Random live students, composed of every layer in every variant, for tests of freezing and lowering.

What a network looks like comes from `planted.Choices`, so hypothesis can shrink it and a seed can repeat it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdsnn.freeze import frozen_trace, plan_of
from mdsnn.kernels.formats import Grid
from mdsnn.layers import (
    LIF,
    EventInput,
    Flatten,
    GlobalSpikePool,
    PixelInput,
    QuantBatchNorm2d,
    QuantConv2d,
    QuantLinear,
    Readout,
    ShortcutQuant,
    SpikeMaxPool2d,
    SpikeSumPool2d,
)
from planted import Choices, DrawnChoices, SeededChoices


class Residual(nn.Module):
    """main(x) + side(x); an empty side is the identity."""

    def __init__(self, main: nn.Module, side: nn.Module) -> None:
        super().__init__()
        self.main, self.side = main, side

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.side(x)


class _Builder:
    def __init__(self, choices: Choices) -> None:
        self.choices, self.rng = choices, choices.rng()
        self.grid = Grid(choices.pick([9, 5, 8, 12]), choices.pick([8, 1, 3]))
        self.timesteps = choices.pick([2, 1, 3, 4, 8])
        self.events = choices.pick([False, False, True])
        self.side = [choices.integer(4, 8), choices.integer(4, 8)]

    def bits(self) -> int:
        return self.choices.integer(2, 8)

    def lif(self) -> LIF:
        pick = self.choices.pick
        reset, quantize = pick([("hard", "post_reset"), ("soft", "post_reset"), ("hard", "pre_fire")])
        tau, v_th = pick([0.5, 0.25, 1.0, 0.9, 1 / 3]), pick([0.5, 0.3, 0.05, 0.7])
        lif = LIF(self.timesteps, tau, v_th, reset, bits=self.bits(), quantize=quantize, alpha=pick(["ema", "learned"]))
        low = v_th + 0.02 if quantize == "pre_fire" else 0.001
        lif.alpha.data.fill_(self.rng.uniform(low, 1.0))
        return lif

    def randomize(self, tensor: Tensor, spread: float) -> None:
        tensor.data.copy_(torch.from_numpy(self.rng.normal(0.0, spread, tensor.shape)))

    def bn(self, channels: int) -> QuantBatchNorm2d:
        grid, statistics = self.choices.pick(["eq4", "wageubn"]), self.choices.pick([32, 32, 16])
        bn = QuantBatchNorm2d(channels, self.bits(), grid, self.grid, statistics_bits=statistics)
        self.randomize(bn.weight, 1.5)
        self.randomize(bn.bias, 0.7)
        self.randomize(bn.running_mean, 1.0)
        bn.running_var.copy_(torch.from_numpy(self.rng.lognormal(0.0, 1.5, channels)))
        if self.choices.pick([False, False, True]):
            bn.running_var[0] = 0.0  # a dead channel: sigma is sqrt(eps)
        return bn

    def weighted(self, layer: QuantConv2d | QuantLinear) -> nn.Sequential:
        """The layer, and a BN or (one time in four) none."""
        self.randomize(layer.weight, self.choices.pick([0.3, 1.0, 3.0]))
        if layer.bias is not None:
            self.randomize(layer.bias, 0.5)
        if layer.output_grid is not None:
            return nn.Sequential(layer)
        return nn.Sequential(layer, self.bn(layer.weight.shape[0]))

    def conv(self, c_in: int, c_out: int, kernel: Any, stride: int, padding: int) -> nn.Sequential:
        groups = self.choices.pick([g for g in (1, 2, 3, c_in) if c_in % g == 0 and c_out % g == 0])
        bare = self.choices.pick([False, False, False, True])
        bias = self.choices.pick([False, True])
        grid = self.grid if bare else None
        conv = QuantConv2d(c_in, c_out, kernel, stride, padding, groups, bias, self.bits(), output_grid=grid)
        return self.weighted(conv)

    def build(self) -> nn.Module:
        pick, integer = self.choices.pick, self.choices.integer
        channels, width = integer(1, 3), pick([4, 1, 6, 12])
        if self.events:
            first: nn.Module = EventInput(channels)
        else:
            first = PixelInput(self.rng.uniform(0.2, 0.8, channels), self.rng.uniform(0.1, 0.5, channels))
        kernel, stride, padding = pick([(3, 1, 1), (1, 1, 0), ((3, 2), 1, 1)])
        stages: list[nn.Module] = [first, self.conv(channels, width, kernel, stride, padding)]
        side = [self.side[0], self.side[1] + (kernel == (3, 2))]
        for _ in range(integer(0, 3)):
            kind = pick(["identity", "down", "max", "sum", "plain"])
            smaller = min(side) >= 4
            if kind == "identity":
                stages.append(Residual(nn.Sequential(self.lif(), self.conv(width, width, 3, 1, 1)), nn.Sequential()))
            elif kind == "down" and smaller:
                wider = pick([width, 2 * width])
                main = nn.Sequential(self.lif(), self.conv(width, wider, 3, 2, 1))
                side = [(n + 1) // 2 for n in side]
                stages.append(
                    Residual(main, nn.Sequential(ShortcutQuant(self.bits()), self.conv(width, wider, 1, 2, 0)))
                )
                width = wider
            elif kind == "max" and smaller:
                stages += [self.lif(), SpikeMaxPool2d(*pick([(2, 2, 0), (3, 2, 1)])), self.conv(width, width, 3, 1, 1)]
                side = [n // 2 if stages[-2].kernel_size == 2 else (n + 1) // 2 for n in side]
            elif kind == "sum" and smaller:
                stages += [self.lif(), SpikeSumPool2d(*pick([(2, 2, 0), (3, 2, 1)])), self.conv(width, width, 1, 1, 0)]
                side = [n // 2 if stages[-2].kernel_size == (2, 2) else (n + 1) // 2 for n in side]
            else:
                stages += [self.lif(), self.conv(width, width, 3, 1, 1)]
        stages.append(self.lif())
        features = width
        head = pick(["readout", "global", "flatten", "hidden", "pooled hidden"])
        if head == "global":
            stages.append(GlobalSpikePool())
        elif head == "pooled hidden":
            stages += [GlobalSpikePool(), Flatten()]
        elif head != "readout":
            stages.append(Flatten())
            features *= side[0] * side[1]
        if "hidden" in head:
            grid = pick([None, self.grid])
            linear = QuantLinear(features, 5, pick([False, True]), self.bits(), output_grid=grid)
            stages += [self.weighted(linear), self.lif()]
            features = 5
        readout = Readout(features, pick([3, 1, 10]), self.bits())
        self.randomize(readout.bias, 0.3)
        if readout.classes > 1 and pick([False, True]):
            readout.weight.data[1] = readout.weight.data[0]  # equal logits: the lowest index must win
            readout.bias.data[1] = readout.bias.data[0]
        return nn.Sequential(*stages, readout).eval()

    def pixels(self, channels: int, samples: int) -> np.ndarray:
        shape: tuple[int, ...] = (samples, channels, *self.side)
        if self.events:
            shape = (self.timesteps, *shape)
        kind = self.choices.pick(["random", "random", "ones", "zeros"])
        if kind == "random":
            return self.rng.integers(0, 256, shape, dtype=np.uint8)
        return np.full(shape, 255 if kind == "ones" else 0, np.uint8)


Student = tuple[nn.Module, np.ndarray, tuple[int, int]]


def random_student(choices: Choices, samples: int = 2) -> Student:
    """A live student in evaluation mode, pixels that fit it, and its input size (H, W)."""
    builder = _Builder(choices)
    model = builder.build()
    table: Tensor = model[0].table  # type: ignore[index, union-attr, assignment]
    return model, builder.pixels(int(table.shape[0]), samples), (builder.side[0], builder.side[1])


def seeded_student(seed: int) -> Student:
    """Student number `seed` of a plain loop."""
    return random_student(SeededChoices(seed))


def drawn_student(draw: Any) -> Student:
    """A student that hypothesis draws."""
    return random_student(DrawnChoices(draw))


def plant(frozen: nn.Module, pixels: np.ndarray, rng: np.random.Generator) -> None:
    """Move v_th and a quarter of the thresholds of every frozen LIF onto membranes it reaches, or one beside."""
    trace, _ = frozen_trace(frozen, pixels)
    for name in plan_of(frozen).lifs:
        lif = frozen.get_submodule(name)
        assert isinstance(lif, LIF)
        codes = lif.constants
        assert codes is not None
        reached = np.unique(trace[name][0])
        reached = reached[np.abs(reached) < 1 << 14]
        positive = reached[reached > 0]
        thresholds = codes.thresholds.numpy().astype(np.int64)
        places = rng.random(thresholds.size) < 0.25
        if reached.size:
            thresholds[places] = rng.choice(reached, places.sum()) + rng.integers(-1, 2, places.sum())
        v_th = int(rng.choice(positive)) - int(rng.integers(0, 2)) if positive.size else codes.v_th
        planted = torch.from_numpy(np.sort(thresholds).astype(np.int32))
        lif.constants = replace(codes, thresholds=planted, v_th=v_th)
