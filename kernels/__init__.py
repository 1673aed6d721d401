"""Integer kernels: the network, its NumPy definition, and the engines that run it bit for bit.

The names below are imported when they are first used, so that importing an error class costs no NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Activity, Engine, LifTrace, Result, Stream, Trace, run
    from .errors import MdsnnError
    from .formats import Grid
    from .network import InputSpec, IntegerNetwork

_HOME = {
    **dict.fromkeys(("Activity", "Engine", "LifTrace", "Result", "Stream", "Trace", "run"), "engine"),
    "Grid": "formats",
    "InputSpec": "network",
    "IntegerNetwork": "network",
    "MdsnnError": "errors",
}

__all__ = [
    "Activity",
    "Engine",
    "Grid",
    "InputSpec",
    "IntegerNetwork",
    "LifTrace",
    "MdsnnError",
    "Result",
    "Stream",
    "Trace",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
