"""The errors mdsnn raises on purpose: one family, so that a caller catches `MdsnnError` and nothing else.

A message says where, what was found, what the limit is and why, and what to do. `exit_code` is what the command line
returns: 2 for bad input or usage, 3 for the environment (disk, permission, memory, a missing extra or executor).
"""

from __future__ import annotations


class MdsnnError(Exception):
    """Base of every error mdsnn raises on purpose."""

    exit_code = 2


class FormatError(MdsnnError):
    """A value lies outside its declared grid, width or range."""


class NetworkError(MdsnnError):
    """A graph is not a network: a node, a shape, a range or a bound does not hold. Names the node."""


class ArtifactError(MdsnnError):
    """A file is not an artifact this version can trust. Names the file, the place and the fault."""


class InputError(MdsnnError):
    """Images, events or arrays that do not fit the network. Names the file or array and what was expected."""


class ConfigError(MdsnnError):
    """A setting (option, recipe, chip file) is unknown, out of range or of the wrong unit."""


class CheckpointError(MdsnnError):
    """A checkpoint cannot be read, or belongs to another architecture."""


class LoweringError(MdsnnError):
    """A student cannot be lowered to integers. Names the layer, the value, the limit and the remedy."""


class TrainingError(MdsnnError):
    """Training cannot go on, such as a loss that became NaN. Names the layer where it can."""


class EnvironmentFault(MdsnnError):
    """The machine, not the input, is at fault."""

    exit_code = 3


class MissingError(EnvironmentFault):
    """An optional part (an extra, an executor, a compiler) is not there. Says which line installs it."""


class StorageError(EnvironmentFault):
    """A file cannot be written or read: disk full, permission, not a folder."""
