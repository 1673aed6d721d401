"""A small spiking VGG: plain convolutions, max-pools of spikes, a hidden linear layer. No residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mdsnn.kernels.errors import ConfigError

from ..layers import Block, Flatten, Group, SpikeMaxPool2d
from .settings import Settings, lengths, settings


class VGGBlock(Block):
    """bn(conv(pool(lif(x)))): the LIF comes first, so that a block's output feeds a membrane, as in MS-ResNet."""

    def __init__(self, in_channels: int, out_channels: int, pool: bool, settings: Settings) -> None:
        super().__init__()
        self.lif = settings.lif()
        self.pool = SpikeMaxPool2d(2) if pool else nn.Identity()
        self.conv = settings.conv(in_channels, out_channels, 3, 1, 1)
        self.bn = settings.bn(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(self.pool(self.lif(x))))
        return out


class VGG(nn.Module):
    """See `vgg`. `config` holds the arguments as JSON-able values: `models.build(config)` makes it again."""

    def __init__(self, blocks: Sequence[int], widths: Sequence[int], hidden: int, settings: Settings) -> None:
        super().__init__()
        blocks, widths = lengths("blocks", blocks, blocks), lengths("widths", widths, blocks)
        side = [length >> len(widths) for length in settings.size]
        if min(side) < 1:
            raise ConfigError(f"size = {settings.size} cannot be halved {len(widths)} times; use fewer widths")
        self.config: dict[str, Any] = {
            "model": "vgg",
            "blocks": list(blocks),
            "widths": list(widths),
            "hidden": hidden,
            **settings.document(),
        }
        self.input = settings.input()
        self.stem = settings.conv(settings.in_channels, widths[0], 3, 1, 1, stem=True)
        self.stem_bn = settings.bn(widths[0])
        groups, channels = [], widths[0]
        for place, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
            sources = [channels, *[width] * (depth - 1)]
            pooled = [place > 0, *[False] * (depth - 1)]
            groups.append(Group(*(VGGBlock(c, width, p, settings) for c, p in zip(sources, pooled, strict=True))))
            channels = width
        self.groups = nn.Sequential(*groups)
        self.lif = settings.lif()
        self.pool = SpikeMaxPool2d(2)
        self.flatten = Flatten()
        self.hidden = settings.linear(channels * side[0] * side[1], hidden)
        self.hidden_bn = settings.bn(hidden)
        self.hidden_lif = settings.lif()
        self.readout = settings.readout(hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(self.stem_bn(self.stem(self.input(x))))
        x = self.flatten(self.pool(self.lif(x)))
        logits: Tensor = self.readout(self.hidden_lif(self.hidden_bn(self.hidden(x))))
        return logits


def vgg(blocks: Sequence[int] = (1, 1), widths: Sequence[int] = (32, 64), *, hidden: int = 128, **options: Any) -> VGG:
    """A VGG of blocks[i] 3x3 convolutions of widths[i] channels, halving the size after each i by a max-pool of spikes.

    hidden   width of the linear layer before the classifier
    options  see settings.Settings; takes and returns as `ms_resnet`
    raises   ConfigError, FormatError  for an option outside its range
    """
    return VGG(blocks, widths, hidden, settings(**options))
