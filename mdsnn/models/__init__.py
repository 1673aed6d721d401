"""Spiking network architectures: functions that return modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mdsnn.kernels.errors import ConfigError

from .ms_resnet import ms_resnet, ms_resnet18, ms_resnet34
from .vgg import vgg, vgg9, vgg16

MODELS: dict[str, Callable[..., nn.Module]] = {
    "ms_resnet": ms_resnet,
    "ms_resnet18": ms_resnet18,
    "ms_resnet34": ms_resnet34,
    "vgg": vgg,
    "vgg9": vgg9,
    "vgg16": vgg16,
}


def build(config: Mapping[str, Any]) -> nn.Module:
    """The network that `config` (a model's `config`, or one read from JSON) describes, with fresh weights.

    raises  ConfigError  for an unknown model or option; FormatError for a width or grid outside its range
    """
    options = dict(config)
    name = options.pop("model", None)
    if name not in MODELS:
        raise ConfigError(f"model {name!r} is not one of {', '.join(MODELS)}")
    return MODELS[name](**options)


__all__ = ["MODELS", "build", "ms_resnet", "ms_resnet18", "ms_resnet34", "vgg", "vgg9", "vgg16"]
