"""The arithmetic contract: grids, widths, rounding and saturation, and the integer constants built once from real ones.

One rule: a value is an integer on a declared grid. Whatever is irrational (tanh, 1/sigma, alpha, 1/255) is consumed
here, in float64, when a student is frozen, and leaves only integers and tables behind. Nothing in this file runs at
inference time: engines see what it returned. docs/arithmetic.md gives the derivations.

Notation: `bits` b >= 2, `delta(b)` = 2**(b-1) - 1, residual grid step 2**-f with f = `Grid.frac_bits`, saturation
C = `Grid.saturation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import FormatError

Array = npt.NDArray[Any]

MIN_BITS, MAX_BITS = 2, 8
"""Code widths of weights and membranes."""
MAX_SHIFT = 24
"""Largest right shift g of a BN multiplier."""
IMAGE_RANGE = (-128, 127)
"""Range of image codes, on a grid of step 2**-IMAGE_FRAC_BITS."""
IMAGE_FRAC_BITS = 5
EVENT_RANGE = (0, 127)
"""Range of event counts; larger counts saturate."""
SHORTCUT_RANGE_LOG2 = 3
"""A shortcut's codes span about +-2**3 of the real residual stream, whatever their width."""
INT32_LIMIT = 2**31
"""An intermediate value x is proven to fit 32 bits when |x| < INT32_LIMIT."""
_BLOCK = 1 << 18
"""Codes worked on at a time: temporaries stay in the cache, and the sum of so many codes of 8 bits in 32 bits."""
FLOAT32_EXACT = 2**24
"""Sums of integers below this magnitude are exact in float32, in any order."""


def check_bits(bits: int, what: str = "bits") -> int:
    """Return `bits` if it is an integer in 2..8; raises FormatError otherwise."""
    if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
        raise FormatError(f"{what} = {bits!r} is outside {MIN_BITS}..{MAX_BITS}")
    return bits


def delta(bits: int) -> int:
    """Largest code of a symmetric `bits`-wide quantizer: 2**(bits-1) - 1 (MD-SNN, below Eq. 3)."""
    return (1 << (check_bits(bits) - 1)) - 1


@dataclass(frozen=True)
class Grid:
    """The residual grid: real value = integer * 2**-frac_bits, saturating at +-clip.

    frac_bits  5..12   (default 9; below 5 a shortcut's shift would vanish)
    clip       1..64   (default 8)
    """

    frac_bits: int = 9
    clip: int = 8

    def __post_init__(self) -> None:
        if type(self.frac_bits) is not int or not 5 <= self.frac_bits <= 12:
            raise FormatError(f"frac_bits = {self.frac_bits!r} is outside 5..12")
        if type(self.clip) is not int or not 1 <= self.clip <= 64:
            raise FormatError(f"clip = {self.clip!r} is outside 1..64")

    @property
    def one(self) -> int:
        """The integer that stands for 1.0."""
        return 1 << self.frac_bits

    @property
    def saturation(self) -> int:
        """C: largest magnitude a BN table returns."""
        return self.clip << self.frac_bits


def _finite(values: npt.ArrayLike, what: str) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise FormatError(f"{what} holds {bad.size} NaN or infinite values, the first at flat index {int(bad[0])}")
    return array


_SIGNED = [(np.dtype(f"i{size}"), -(2 ** (8 * size - 1)), 2 ** (8 * size - 1) - 1) for size in (1, 2, 4, 8)]


def narrowest(lo: int, hi: int) -> np.dtype[Any]:
    """The narrowest signed dtype among int8, int16, int32, int64 that holds lo..hi."""
    for dtype, least, most in _SIGNED:
        if least <= lo and hi <= most:
            return dtype
    raise FormatError(f"values in {lo}..{hi} need more than 64 bits")


# --------------------------------------------------------------------------------------------------- weights


def weight_codes(weight: npt.ArrayLike, bits: int) -> tuple[npt.NDArray[np.int8], float]:
    """Codes of MD-SNN Eq. 3 for a weight tensor, in float64.

    weight   any shape, real
    returns  codes  same shape int8, rint(clip(tanh(w)/alpha, -1, 1) * delta), ties to even
             alpha  max|tanh(w)|; the real weight is alpha * codes / delta. All zeros: codes 0, alpha 1.
    raises   FormatError  for NaN or infinity, or bits outside 2..8
    """
    top = delta(bits)
    squashed = np.tanh(_finite(weight, "a weight tensor"))
    alpha = float(np.max(np.abs(squashed), initial=0.0))
    if alpha == 0.0:
        return np.zeros(squashed.shape, np.int8), 1.0
    return np.rint(np.clip(squashed / alpha, -1.0, 1.0) * top).astype(np.int8), alpha


def pack_nibbles(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Pack codes in -8..7 two a byte, in C order: the even index in the low nibble, two's complement.

    returns  uint8, ceil(codes.size / 2); an odd count leaves the last high nibble 0
    """
    flat: npt.NDArray[np.uint8] = codes.reshape(-1).astype(np.uint8) & np.uint8(15)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    packed: npt.NDArray[np.uint8] = flat[0::2] | (flat[1::2] << np.uint8(4))
    return packed


def unpack_nibbles(packed: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.int8]:
    """Inverse of `pack_nibbles`: the first `count` codes, int8, flat.

    raises  FormatError  if the byte count is not ceil(count / 2) or a padding nibble is not 0
    """
    if packed.size != (count + 1) // 2:
        raise FormatError(f"{packed.size} bytes cannot hold exactly {count} 4-bit codes")
    if count % 2 and packed[-1] >> 4:
        raise FormatError("the padding nibble behind an odd count of 4-bit codes is not 0")
    codes = np.empty(2 * packed.size, np.int8)
    pairs = codes.view("<u2")  # a byte's two codes
    for first in range(0, packed.size, _BLOCK):
        pair = pairs[first : first + _BLOCK]
        pair[...] = packed[first : first + _BLOCK]
        pair |= pair << np.uint16(4)
        pair &= np.uint16(0x0F0F)
        pair ^= np.uint16(0x0808)  # a code + 8
    np.subtract(codes, np.int8(8), out=codes)
    return codes if codes.size == count else codes[:count]


# ----------------------------------------------------------------------------------------------------- input


def image_table(mean: npt.ArrayLike, std: npt.ArrayLike) -> npt.NDArray[np.int8]:
    """Pixel -> code, clip(floor((p/255 - mean)/std * 2**5 + .5), -128, 127), a row of 256 per channel.

    mean, std  (C,) real, std > 0
    returns    (C, 256) int8; the code's grid step is 2**-5. Padding comes after the table, so it is integer 0.
    """
    m, s = np.atleast_1d(_finite(mean, "mean")), np.atleast_1d(_finite(std, "std"))
    if m.ndim != 1 or m.shape != s.shape or np.any(s <= 0):
        raise FormatError(f"mean {m.shape} and std {s.shape} must be one value a channel, std above 0")
    pixels = np.arange(256, dtype=np.float64) / 255.0
    codes = np.floor((pixels[None] - m[:, None]) / s[:, None] * 2.0**IMAGE_FRAC_BITS + 0.5)
    return np.clip(codes, *IMAGE_RANGE).astype(np.int8)


def event_table(channels: int) -> npt.NDArray[np.int8]:
    """Event count -> code: min(count, 127), the same row for every channel; (channels, 256) int8."""
    row = np.minimum(np.arange(256), EVENT_RANGE[1]).astype(np.int8)
    return np.tile(row, (channels, 1))


# ------------------------------------------------------------------------------------------ accumulators, BN


def accumulator_bounds(weight: Array, lo: int, hi: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Exact range of each output channel's accumulator for inputs in lo..hi, where lo <= 0 <= hi.

    weight   (C_out, ...) integer codes
    returns  (lo, hi), each (C_out,) int64: hi = hi*S+ + lo*S-, lo = hi*S- + lo*S+ with S+ and S- the sums of the
             channel's positive and negative codes. Every partial sum, in any order, stays inside.
    """
    flat = weight.reshape(weight.shape[0], -1)
    total, size = (np.zeros(flat.shape[0], np.int64) for _ in range(2))  # S+ + S- and S+ - S-
    codes = flat.dtype == np.int8
    rows = max(1, _BLOCK // max(1, flat.shape[1]))
    for row in range(0, flat.shape[0], rows):
        for column in range(0, flat.shape[1], _BLOCK):
            block = flat[row : row + rows, column : column + _BLOCK]
            sizes = np.abs(block).view(np.uint8) if codes else np.abs(block.astype(np.int64))  # |-128| is 128, unsigned
            total[row : row + rows] += block.sum(axis=1, dtype=np.int32 if codes else np.int64)
            size[row : row + rows] += sizes.sum(axis=1, dtype=np.int32 if codes else np.int64)
    positive, negative = (size + total) >> 1, (total - size) >> 1
    return hi * negative + lo * positive, hi * positive + lo * negative


@dataclass(frozen=True)
class Affine:
    """A BN table in affine form: y = clamp((multiplier*acc + offset) >> shift, -C, C), one row per channel.

    multiplier, offset  (C,) int64      shift  (C,) int64 in 0..24
    rounding            largest |rounding of the multiplier's effect| in grid steps: (C + |t|*2**f) / (2*|A|)
    """

    multiplier: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    shift: npt.NDArray[np.int64]
    rounding: float


def affine_constants(
    scale: npt.ArrayLike, bias: npt.ArrayLike, acc_lo: npt.ArrayLike, acc_hi: npt.ArrayLike, grid: Grid
) -> Affine:
    """Integer constants of y = scale*acc + bias per channel, rounded half up, once, on `grid`.

    scale, bias     (C,) real, float64: gamma*(a_w/delta * s_in)/sigma and beta - gamma*mu/sigma
    acc_lo, acc_hi  (C,) integer bounds of the accumulator
    The shift g of a channel is the largest <= 24 with |A| < 2**15 and |A|*max|acc| + |B| < 2**31. Where not even
    g = 0 meets these, g = 0 and the layer's proof widens its multiplier or its product (see network.py).
    raises  FormatError  for NaN, infinity, or constants beyond 32-bit multipliers / 62-bit products
    """
    s, t = _finite(scale, "a BN scale"), _finite(bias, "a BN bias")
    reach = np.maximum(np.abs(np.asarray(acc_lo, np.int64)), np.abs(np.asarray(acc_hi, np.int64)))
    if s.ndim != 1 or s.shape != t.shape or s.shape != reach.shape:
        raise FormatError(f"a BN scale {s.shape}, bias {t.shape} and bounds {reach.shape} must be one value a channel")
    multiplier, offset, shift = (np.zeros(s.shape, np.int64) for _ in range(3))
    rounding = 0.0
    for c in range(s.size):
        for g in range(MAX_SHIFT, -1, -1):
            with np.errstate(over="ignore"):  # infinity is refused below
                real_a, real_b = np.rint(np.array([s[c], t[c]]) * 2.0 ** (grid.frac_bits + g))
            if g and abs(real_a) >= 2.0**15:
                continue
            if abs(real_a) >= 2.0**31 or abs(real_b) >= 2.0**61 or abs(real_a) * float(reach[c]) >= 2.0**61:
                if g:
                    continue
                raise FormatError(
                    f"channel {c}: a BN scale of {s[c]:.6g} and bias of {t[c]:.6g} are beyond a 32-bit multiplier"
                    f" and a 62-bit product on a grid of 2**-{grid.frac_bits}"
                )
            a = int(real_a)
            b = int(real_b) + ((1 << (g - 1)) if g else 0)
            if g == 0 or abs(a) * int(reach[c]) + abs(b) < INT32_LIMIT:
                multiplier[c], offset[c], shift[c] = a, b, g
                if a:
                    rounding = max(rounding, (grid.saturation + abs(t[c]) * grid.one) / (2.0 * abs(a)))
                break
    return Affine(multiplier, offset, shift, rounding)


def dense_table(
    multiplier: Array, offset: Array, shift: Array, acc_lo: Array, acc_hi: Array, grid: Grid
) -> npt.NDArray[np.int32]:
    """The affine form tabulated over every reachable accumulator: rows of hi - lo + 1 entries, channels in order."""
    rows = []
    for a, b, g, lo, hi in zip(
        *(np.asarray(x, np.int64) for x in (multiplier, offset, shift, acc_lo, acc_hi)), strict=True
    ):
        rows.append(np.clip((a * np.arange(lo, hi + 1) + b) >> g, -grid.saturation, grid.saturation))
    return np.concatenate(rows).astype(np.int32)


# ------------------------------------------------------------------------------------------------- membranes


def clamp_alpha(alpha: float, grid: Grid) -> float:
    """The membrane quantizer's alpha, clamped to 2**-f..1; raises FormatError for NaN or infinity."""
    value = float(_finite(alpha, "a membrane's alpha"))
    return min(max(value, 2.0**-grid.frac_bits), 1.0)


def decode_table(alpha: float, tau: float, bits: int, grid: Grid) -> npt.NDArray[np.int32]:
    """Leak, decode and scale of a membrane code in one table: floor(tau*alpha*q/delta * 2**f + .5).

    tau      0 < tau <= 1 (MD-SNN Eq. 1)
    returns  (2*delta + 1,) int32, entry q + delta
    """
    if not 0.0 < float(tau) <= 1.0:
        raise FormatError(f"tau = {tau!r} is outside (0, 1]")
    top = delta(bits)
    q = np.arange(-top, top + 1, dtype=np.float64)
    return np.floor(float(tau) * clamp_alpha(alpha, grid) * q / top * grid.one + 0.5).astype(np.int32)


def requantize_thresholds(alpha: float, bits: int, grid: Grid) -> npt.NDArray[np.int32]:
    """Thresholds of the membrane quantizer (MD-SNN Eq. 3 on the grid): q(n) = -delta + #{j : theta_j <= n}.

    returns  (2*delta,) int32, ascending; theta_j is the least n with
             rint(clip(tanh(n * 2**-f)/alpha, -1, 1) * delta) >= j for j = -delta+1 .. delta.
             Equal thresholds are allowed: the code between them is skipped.
    """
    top = delta(bits)
    reach = 8 * grid.one  # tanh(8) = 1 - 2.3e-7: every code is reached well inside
    n = np.arange(-reach, reach + 1)
    real = np.tanh(n / grid.one) / clamp_alpha(alpha, grid)
    codes = np.rint(np.clip(real, -1.0, 1.0) * top).astype(np.int64)
    return n[np.searchsorted(codes, np.arange(-top + 1, top + 1), side="left")].astype(np.int32)


def threshold_code(v_th: float, grid: Grid, *, inclusive: bool = False) -> int:
    """The integer V with (h > V) exactly (h * 2**-f > v_th), or >= v_th if `inclusive` (SpikingJelly's rule)."""
    scaled = float(_finite(v_th, "v_th")) * grid.one
    if not 0.0 < scaled < INT32_LIMIT / 2:
        raise FormatError(f"v_th = {v_th!r} is not above 0, or too large for the grid")
    return int(np.ceil(scaled)) - 1 if inclusive else int(np.floor(scaled))


def soft_reset_code(v_th: float, grid: Grid) -> int:
    """What a soft reset subtracts: rint(v_th * 2**f); raises FormatError if that is not in 1..2**30 - 1."""
    code = float(np.rint(float(_finite(v_th, "v_th")) * grid.one))
    if not 1.0 <= code < INT32_LIMIT / 2:
        raise FormatError(f"v_th = {v_th!r} subtracts {code:.6g} steps of the grid, outside 1..{INT32_LIMIT // 2 - 1}")
    return int(code)


def pre_fire_code(v_th: float, alpha: float, bits: int, grid: Grid) -> int:
    """q_th of a neuron that quantizes before it fires: a spike is q > q_th = floor(v_th * delta / alpha).

    raises  FormatError  if alpha <= v_th: such a neuron can never fire; or v_th is not above 0
    """
    scale = clamp_alpha(alpha, grid)
    if not float(_finite(v_th, "v_th")) > 0.0:
        raise FormatError(f"v_th = {v_th!r} is not above 0")
    if scale <= v_th:
        raise FormatError(
            f"alpha = {scale:.6g} is not above v_th = {v_th:.6g}: a pre_fire neuron could never fire. "
            "Train longer, lower v_th, or use post_reset"
        )
    return int(np.floor(v_th * delta(bits) / scale))


def shortcut_shift(bits: int, grid: Grid) -> int:
    """Right shift of the requantization before a 1x1 shortcut: f + 4 - bits, so that codes span about +-8.

    8 bits: f - 4, a real step of 2**-4. raises FormatError if the shift is below 1.
    """
    shift = grid.frac_bits + SHORTCUT_RANGE_LOG2 + 1 - check_bits(bits)
    if shift < 1:
        raise FormatError(f"a {bits}-bit shortcut needs frac_bits >= {bits - 3}, got {grid.frac_bits}")
    return shift


def classifier_bias(bias: npt.ArrayLike, alpha: float, bits: int, summed: int) -> npt.NDArray[np.int64]:
    """Bias of the readout in units of its codes: rint(bias * summed * delta / alpha), summed = T*H*W.

    raises  FormatError  for NaN or infinity, or a bias that 32 bits do not hold
    """
    with np.errstate(over="ignore"):
        codes = np.rint(_finite(bias, "a classifier's bias") * summed * delta(bits) / float(alpha))
    if np.any(np.abs(codes) >= INT32_LIMIT):
        raise FormatError(
            f"a classifier's bias of up to {np.abs(codes).max():.6g} units of its codes is beyond 32 bits"
        )
    return codes.astype(np.int64)
