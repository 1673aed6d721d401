"""Spiking VGG: plain convolutions, pools of spikes, hidden linear layers. No residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from mdsnn.kernels.errors import ConfigError

from ..layers import Block, Flatten, Group, Layer, SpikeMaxPool2d, SpikeSumPool2d
from .settings import Settings, lengths, settings

POOLS: dict[str, type[SpikeMaxPool2d | SpikeSumPool2d]] = {"max": SpikeMaxPool2d, "sum": SpikeSumPool2d}


class VGGBlock(Block):
    """bn(conv(pool(lif(x)))): the LIF comes first, so that a block's output feeds a membrane, as in MS-ResNet."""

    def __init__(self, in_channels: int, out_channels: int, pool: Layer | None, settings: Settings) -> None:
        super().__init__()
        self.lif = settings.lif()
        self.pool = nn.Identity() if pool is None else pool
        self.conv = settings.conv(in_channels, out_channels, 3, 1, 1)
        self.bn = settings.bn(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(self.pool(self.lif(x))))
        return out


class VGG(nn.Module):
    """See `vgg`. `config` holds the arguments as JSON-able values: `models.build(config)` makes it again."""

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int], hidden: int | Sequence[int], pool: str, settings: Settings
    ) -> None:
        super().__init__()
        blocks, widths = lengths("blocks", blocks, blocks), lengths("widths", widths, blocks)
        wide = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        wide = lengths("hidden", wide, wide)
        if pool not in POOLS:
            raise ConfigError(f"pool {pool!r} is not one of {', '.join(POOLS)}")
        side = [length >> len(widths) for length in settings.size]
        if min(side) < 1:
            raise ConfigError(f"size = {settings.size} cannot be halved {len(widths)} times; use fewer widths")
        self.config: dict[str, Any] = {
            "model": "vgg",
            "blocks": list(blocks),
            "widths": list(widths),
            "hidden": hidden if isinstance(hidden, int) else list(wide),
            "pool": pool,
            **settings.document(),
        }
        self.input = settings.input()
        self.stem = settings.conv(settings.in_channels, widths[0], 3, 1, 1, stem=True)
        self.stem_bn = settings.bn(widths[0])
        groups, channels = [], widths[0]
        for place, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
            sources = [channels, *[width] * (depth - 1)]
            pools = [POOLS[pool](2) if place else None, *[None] * (depth - 1)]
            groups.append(Group(*(VGGBlock(c, width, p, settings) for c, p in zip(sources, pools, strict=True))))
            channels = width
        self.groups = nn.Sequential(*groups)
        self.lif = settings.lif()
        self.pool = POOLS[pool](2)
        self.flatten = Flatten()
        self.hidden = settings.linear(channels * side[0] * side[1], wide[0])
        self.hidden_bn = settings.bn(wide[0])
        self.hidden_lif = settings.lif()
        deeper: list[nn.Module] = []
        for source, width in pairwise(wide):
            deeper += [settings.linear(source, width), settings.bn(width), settings.lif()]
        self.deeper = nn.Sequential(*deeper)
        self.readout = settings.readout(wide[-1])
        settings.finish(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(self.stem_bn(self.stem(self.input(x))))
        x = self.flatten(self.pool(self.lif(x)))
        x = self.deeper(self.hidden_lif(self.hidden_bn(self.hidden(x))))
        logits: Tensor = self.readout(x)
        return logits


def vgg(
    blocks: Sequence[int] = (1, 1),
    widths: Sequence[int] = (32, 64),
    *,
    hidden: int | Sequence[int] = 128,
    pool: str = "max",
    **options: Any,
) -> VGG:
    """A VGG of a stem and blocks[i] 3x3 convolutions of widths[i] channels, its size halved after each i.

    hidden   width of the linear layer before the classifier, or of several
    pool     of spikes: "max" (their logical or) or "sum" (their mean, while training)
    options  see settings.Settings; takes and returns as `ms_resnet`
    raises   ConfigError, FormatError  for an option outside its range
    """
    return VGG(blocks, widths, hidden, pool, settings(**options))


def vgg9(
    blocks: Sequence[int] = (1, 2, 3), widths: Sequence[int] = (64, 128, 256), *, hidden: int = 1024, **options: Any
) -> VGG:
    """VGG-9 of the SNN literature: 7 convolutions (2 of 64, 2 of 128, 3 of 256 channels), a linear layer, a classifier.

    hidden, options   as for `vgg`
    """
    return vgg(blocks, widths, hidden=hidden, **options)


def vgg16(
    blocks: Sequence[int] = (1, 2, 3, 3, 3),
    widths: Sequence[int] = (64, 128, 256, 512, 512),
    *,
    hidden: int | Sequence[int] = (512, 512),
    **options: Any,
) -> VGG:
    """VGG-16 (Simonyan and Zisserman, arXiv 1409.1556, D): 13 convolutions, two linear layers of 512 and a classifier.

    We depart in the linear layers, 512 wide in place of 4096, as is usual for images of 32x32.
    """
    return vgg(blocks, widths, hidden=hidden, **options)
