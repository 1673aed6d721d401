"""Analog-to-digital converters: cost by resolution, transfer function, and the lossless check.

A column of R rows of cells with levels 0..L sums to at most R*L levels; an ADC that tells all of them apart needs
ceil(log2(R*L + 1)) bits: 10 for 64 rows of 4-bit cells. With fewer bits the ADC either keeps a step of one level and
clips ("clip"), or spreads its steps over the whole range and rounds ("scale").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mdsnn.kernels.errors import ConfigError

from .config import Chip

TRANSFERS = ("clip", "scale")


def lossless_bits(full_scale: int) -> int:
    """Bits that tell the sums 0..full_scale apart: ceil(log2(full_scale + 1))."""
    return max(1, int(full_scale).bit_length())


def adc_energy_key(bits: int) -> tuple[str, int]:
    """The chip's key that prices a conversion at `bits`, and how many doublings (adc.growth) lie above it."""
    if not 1 <= bits <= 12:
        raise ConfigError(f"adc.bits = {bits} is outside 1..12")
    return f"adc.energy_{min(max(bits, 4), 8)}", max(0, bits - 8)


def adc_energy(chip: Chip, bits: int) -> float:
    """Energy of one conversion, J. Below 4 bits as 4 bits; above 8 times adc.growth a bit."""
    key, doublings = adc_energy_key(bits)
    return float(chip[key] * chip["adc.growth"] ** doublings)


def adc_area(chip: Chip, bits: int) -> float:
    """Area of one ADC, m2, by the same rule as its energy."""
    key, doublings = adc_energy_key(bits)
    return float(chip[key.replace("energy", "area")] * chip["adc.growth"] ** doublings)


def adc_keys(bits: int, what: str) -> tuple[str, ...]:
    """Keys of the constants behind `adc_energy` (what = "energy") or `adc_area` ("area")."""
    key, doublings = adc_energy_key(bits)
    return (key.replace("energy", what), *(("adc.growth",) if doublings else ()))


def adc_step(full_scale: int, bits: int, transfer: str) -> float:
    """Levels a step of the ADC stands for: 1 where it clips or is lossless, else full_scale/(2**bits - 1)."""
    if transfer not in TRANSFERS:
        raise ConfigError(f"ADC transfer {transfer!r} is none of {', '.join(TRANSFERS)}")
    top = (1 << bits) - 1
    return 1.0 if transfer == "clip" or top >= full_scale else full_scale / top


def convert(sums: npt.NDArray[Any], full_scale: int, bits: int, transfer: str) -> npt.NDArray[Any]:
    """What the digital side reads of analog column sums, in levels.

    sums     in levels, any shape, float32 or float64
    returns  same shape and dtype: step * clip(rint(sum/step), 0, 2**bits - 1); exact for integer sums where the ADC is
             lossless
    """
    step = adc_step(full_scale, bits, transfer)
    out = np.rint(sums if step == 1.0 else sums / step)
    np.clip(out, 0, (1 << bits) - 1, out=out)
    if step != 1.0:
        out *= step
    return out


@dataclass(frozen=True)
class AdcCheck:
    """Whether an ADC is lossless for a layer.

    rows           rows of a crossbar that the layer uses, at most
    full_scale     rows * top level: what any codes could reach, in levels
    stored_scale   largest column sum the stored codes can reach with all rows active; None without codes
    needed_bits    for full_scale         stored_bits   for stored_scale
    bits           what the chip has; None where it states no resolution, and then there are no errors either
    clip_error     largest error of one conversion if it clips, in levels (of the stored scale where known)
    round_error    largest error of one conversion if it scales, in levels
    """

    rows: int
    full_scale: int
    stored_scale: int | None
    needed_bits: int
    stored_bits: int | None
    bits: int | None
    clip_error: int | None
    round_error: float | None

    @property
    def reach(self) -> int:
        """Largest sum that occurs, in levels: the stored scale where it is known."""
        return self.full_scale if self.stored_scale is None else self.stored_scale

    @property
    def enough_bits(self) -> int:
        """Bits of the smallest lossless ADC: for `reach`."""
        return lossless_bits(self.reach)

    @property
    def lossless(self) -> bool | None:
        """Whether every reachable sum converts exactly; None without a resolution."""
        return None if self.bits is None else self.enough_bits <= self.bits


def check_adc(rows: int, top_level: int, stored_scale: int | None, bits: int | None) -> AdcCheck:
    """The lossless check of one layer; see AdcCheck."""
    full = rows * top_level
    reach = full if stored_scale is None else stored_scale
    if bits is None:
        clip_error, round_error = None, None
    else:
        clip_error = max(0, reach - ((1 << bits) - 1))
        round_error = 0.0 if reach < (1 << bits) else adc_step(reach, bits, "scale") / 2
    return AdcCheck(
        rows,
        full,
        stored_scale,
        lossless_bits(full),
        None if stored_scale is None else lossless_bits(stored_scale),
        bits,
        clip_error,
        round_error,
    )
