"""Memory cells: how signed weight codes become levels, and levels conductances.

Offset coding stores u = code + delta, in 0..2*delta, as slices of `cell_bits` each, least significant first; the sum of
the inputs times delta is taken off after conversion. Differential coding stores the magnitude, sliced, in a column of
its sign; the two columns are subtracted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mdsnn.kernels.errors import ConfigError
from mdsnn.kernels.formats import Array, delta

CODINGS = ("offset", "differential")


def slice_count(bits: int, cell_bits: int, coding: str) -> int:
    """Slices of a weight of `bits`: ceil(bits/cell_bits) with offset coding, ceil((bits-1)/cell_bits) differential.

    bits  2..8 for codes; larger for projections (24: the significand of FP32; 32)
    """
    if coding not in CODINGS:
        raise ConfigError(f"coding {coding!r} is none of {', '.join(CODINGS)}")
    return -(-(bits if coding == "offset" else bits - 1) // cell_bits)


def columns_per_weight(bits: int, cell_bits: int, coding: str) -> int:
    """Columns a weight takes: its slices, doubled where differential."""
    return slice_count(bits, cell_bits, coding) * (2 if coding == "differential" else 1)


def levels(codes: Array, bits: int, cell_bits: int, coding: str) -> npt.NDArray[np.uint8]:
    """Levels of the cells that store `codes`.

    codes    any shape, integers in -delta(bits)..delta(bits)
    returns  (columns_per_weight, *codes.shape) uint8 in 0..2**cell_bits - 1; offset: slices, least significant first;
             differential: the slices of the positive part, then those of the negative part
    """
    wide = codes.astype(np.int16)
    parts = [wide + delta(bits)] if coding == "offset" else [np.maximum(wide, 0), np.maximum(-wide, 0)]
    count, mask = slice_count(bits, cell_bits, coding), (1 << cell_bits) - 1
    planes = [((part >> (s * cell_bits)) & mask).astype(np.uint8) for part in parts for s in range(count)]
    return np.stack(planes)


def slice_factors(bits: int, cell_bits: int, coding: str) -> npt.NDArray[np.int64]:
    """What each column of a weight counts in the digital sum: +-2**(s*cell_bits), in the order of `levels`."""
    powers = np.array([1 << (s * cell_bits) for s in range(slice_count(bits, cell_bits, coding))], np.int64)
    return powers if coding == "offset" else np.concatenate([powers, -powers])


def row_level_sums(weight: Array, bits: int, cell_bits: int, coding: str) -> npt.NDArray[np.int64]:
    """Sum of the levels along each row of the crossbars of a layer.

    weight   (C_out, ...) codes
    returns  (...) int64: the sum over outputs and columns of a weight
    """
    if coding == "offset" and slice_count(bits, cell_bits, coding) == 1:  # the level is the code plus delta
        sums: npt.NDArray[np.int64] = weight.sum(axis=0, dtype=np.int64) + delta(bits) * weight.shape[0]
        return sums
    total: npt.NDArray[np.int64] = levels(weight, bits, cell_bits, coding).sum(axis=(0, 1), dtype=np.int64)
    return total


def conductance(level: npt.ArrayLike, g_min: float, g_max: float, cell_bits: int) -> npt.NDArray[np.float64]:
    """Conductance of a level in the unit of g_min and g_max: evenly spaced, level 0 at g_min, the top one at g_max."""
    step = (g_max - g_min) / ((1 << cell_bits) - 1)
    return g_min + step * np.asarray(level, np.float64)


def vary(g: npt.NDArray[np.float64], sigma: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Device variation, drawn once a programming: g times N(1, sigma), cut off at 0."""
    varied: npt.NDArray[np.float64] = g * np.maximum(rng.normal(1.0, sigma, g.shape), 0.0)
    return varied
