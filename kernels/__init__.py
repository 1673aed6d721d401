"""Integer kernels: the network, its NumPy definition, and the engines that run it bit for bit."""

from .engine import Activity, Engine, LifTrace, Result, Stream, Trace, run
from .errors import MdsnnError
from .formats import Grid
from .network import InputSpec, IntegerNetwork

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
