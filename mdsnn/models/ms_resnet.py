"""MS-ResNet (Hu et al., arXiv 2112.08954), the network of MD-SNN: a LIF before every convolution, a real-valued
residual stream that no nonlinearity cuts, and an identity shortcut wherever the shape allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mdsnn.kernels.errors import ConfigError

from ..layers import Block, Group
from .settings import Settings, lengths, settings

STEMS = ("cifar", "imagenet")


class MSBlock(Block):
    """out = bn2(conv2(lif2(bn1(conv1(lif1(x)))))) + shortcut(x).

    Where the shape changes, the shortcut is a 1x1 convolution of the stream's 8-bit codes and a BN; else the identity.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, settings: Settings) -> None:
        super().__init__()
        self.lif1 = settings.lif()
        self.conv1 = settings.conv(in_channels, out_channels, 3, stride, 1)
        self.bn1 = settings.bn(out_channels)
        self.lif2 = settings.lif()
        self.conv2 = settings.conv(out_channels, out_channels, 3, 1, 1)
        self.bn2 = settings.bn(out_channels, added=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                settings.shortcut(),
                settings.conv(in_channels, out_channels, 1, stride, 0),
                settings.bn(out_channels, added=True),
            )

    def forward(self, x: Tensor) -> Tensor:
        r = self.bn1(self.conv1(self.lif1(x)))
        r = self.bn2(self.conv2(self.lif2(r)))
        out: Tensor = r + self.shortcut(x)
        return out


class MSResNet(nn.Module):
    """See `ms_resnet`. `config` holds the arguments as JSON-able values: `models.build(config)` makes it again."""

    def __init__(self, blocks: Sequence[int], widths: Sequence[int], stem: str, settings: Settings) -> None:
        super().__init__()
        if stem not in STEMS:
            raise ConfigError(f"stem {stem!r} is not one of {', '.join(STEMS)}")
        blocks, widths = lengths("blocks", blocks, blocks), lengths("widths", widths, blocks)
        self.config: dict[str, Any] = {
            "model": "ms_resnet",
            "blocks": list(blocks),
            "widths": list(widths),
            "stem": stem,
            **settings.document(),
        }
        large = stem == "imagenet"
        self.input = settings.input()
        self.stem = settings.conv(settings.in_channels, widths[0], *((7, 2, 3) if large else (3, 1, 1)), stem=True)
        self.stem_bn = settings.bn(widths[0])
        groups, channels = [], widths[0]
        for place, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
            first = 2 if place or large else 1
            strides = [first, *[1] * (depth - 1)]
            sources = [channels, *[width] * (depth - 1)]
            groups.append(Group(*(MSBlock(c, width, s, settings) for c, s in zip(sources, strides, strict=True))))
            channels = width
        self.groups = nn.Sequential(*groups)
        self.lif = settings.lif()
        self.readout = settings.readout(channels)
        settings.finish(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(self.stem_bn(self.stem(self.input(x))))
        logits: Tensor = self.readout(self.lif(x))
        return logits


def ms_resnet(
    blocks: Sequence[int] = (2, 2, 2, 2),
    widths: Sequence[int] = (64, 128, 256, 512),
    *,
    stem: str = "cifar",
    **options: Any,
) -> MSResNet:
    """An MS-ResNet of basic blocks: one group of blocks[i] blocks of widths[i] channels for each i.

    stem "cifar"     3x3, stride 1; the first group keeps the size
         "imagenet"  7x7, stride 2; the first group's first block halves the size, where other networks have a max-pool:
                     only spikes can be max-pooled (section 3), and here the residual stream is real
    options  see settings.Settings: classes, in_channels, size, timesteps, coding, weight_bits, membrane_bits, bn_bits,
             stem_bits, shortcut_bits, tau, v_th, reset, surrogate, quantize, alpha, mean, std, grid, generator, ...
    takes    uint8 [N, C, H, W], or [T, N, C, H, W] with coding "events"      returns  logits [N, classes]
    raises   ConfigError, FormatError  for an option outside its range
    """
    return MSResNet(blocks, widths, stem, settings(**options))


def ms_resnet18(**options: Any) -> MSResNet:
    """MS-ResNet-18."""
    return ms_resnet((2, 2, 2, 2), **options)


def ms_resnet34(**options: Any) -> MSResNet:
    """MS-ResNet-34."""
    return ms_resnet((3, 4, 6, 3), **options)
