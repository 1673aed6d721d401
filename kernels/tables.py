"""Tables by which the C kernels quantize membranes and apply BN, found from a network's proof.

Every one is exact for each value that the proof allows, or is not made at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from .formats import INT32_LIMIT, MAX_SHIFT, Array, delta
from .network import BnAffine, BnDense, Lif
from .reference import lif_step

BUCKETS = 31
"""MDSNN_BUCKETS of src/mdsnn.h."""
CELLS = 15
"""MDSNN_CELLS of src/mdsnn.h."""
LINES = 64
"""MDSNN_LINES of src/mdsnn.h."""
_WORD = 1 << 16
_TRIES = 16  # cuts into cells, each with lines of its own, before a LIF is left without
_HOPELESS = 4  # cells without a line; the next cut leaves about as many
_CROWDED = 24  # thresholds of a cell beyond which no line is sought
_LINE = 1 << 18  # entries of a channel's dense table beyond which it is not looked at
_MULTIPLIER = 2**15 - 1  # largest of a bn that takes the place of a dense table


@dataclass(frozen=True)
class Reach:
    """Which u a LIF quantizes, from its proof, and the thresholds that lie between them."""

    lo: int
    hi: int
    code_first: int
    thresholds: Array

    @classmethod
    def of(cls, lif: Lif, membrane: tuple[int, int]) -> Reach:
        lo, hi = membrane
        if lif.quantize == "post_reset":
            fired = (0, 0) if lif.reset == "hard" else (lif.v_th + 1 - lif.v_soft, hi - lif.v_soft)
            lo, hi = min(lo, *fired), max(min(hi, lif.v_th), *fired)
        thresholds = lif.thresholds.astype(np.int64)
        below = int((thresholds <= lo).sum())
        return cls(lo, hi, below - delta(lif.bits), thresholds[below : int((thresholds <= hi).sum())])


SHORT = 2**15 - 1
"""Largest value of a stream of 16 bits, which reaches as far below 0."""


def limit_of(lif: Lif, stream: tuple[int, int]) -> int | None:
    """What the stream may be clamped to on both sides, so that h fits 16 bits and no spike or code changes.

    stream  what the proof gives for what the LIF reads
    None where there is no such limit. u fits 16 bits, too.
    """
    low, high = min(int(lif.decode[0]), 0), max(int(lif.decode[-1]), 0)  # it ascends
    limit = SHORT - 1 - max(high, -low)
    first, last = int(lif.thresholds[0]), int(lif.thresholds[-1])
    if limit < 0 or lif.v_soft > SHORT:
        return None
    by_h = lif.quantize == "post_reset"  # what fires
    if stream[0] < -limit and (high - limit >= first or (by_h and high - limit > lif.v_th)):
        return None  # the lowest code, and no spike, however h came about
    if stream[1] > limit:
        if by_h and limit + low <= lif.v_th:
            return None
        if (not by_h or lif.reset == "soft") and limit + low - lif.v_soft < last:
            return None
    return limit


def find_buckets(reach: Reach, lif: Lif) -> tuple[int, int, Array, Array, Array] | None:
    """Buckets of u that hold one threshold each (see mdsnn.h): base, shift, thresholds, codes, decoded codes.

    None where that takes more than 31, or u - base could leave 16 bits. The smallest that also hold v_th, if they can.
    """
    thresholds = reach.thresholds
    different = int(np.count_nonzero(np.diff(thresholds))) + 1
    if not len(thresholds) or different > BUCKETS:
        return None
    found = None
    for shift in range(16):
        base = (int(thresholds[0]) - 1) >> shift << shift  # below every threshold
        places = (thresholds - base) >> shift
        apart = int(np.count_nonzero(np.diff(places))) + 1 == different
        if not apart or int(places[-1]) >= BUCKETS or reach.lo - base < -(2**15) or reach.hi - base >= 2**15:
            continue
        at = np.full(BUCKETS + 1, 32767)
        at[places] = thresholds
        counts = np.searchsorted(places, np.arange(BUCKETS + 1), side="left")
        codes = reach.code_first + counts
        found = base, shift, at, codes, lif.decode[codes + delta(lif.bits)]
        if max(lif.v_th, 0) - base < BUCKETS << shift:
            break
    return found


def find_cells(reach: Reach, lif: Lif) -> tuple[int, int, int, Array, Array] | None:
    """At most 15 cells of u, all of one width, that hold one threshold each (see mdsnn.h): base, span, factor,
    thresholds, decoded codes.

    None where there are no such, or the thresholds lie more than 16 bits apart.
    """
    thresholds = _different(reach.thresholds)
    if not 0 < len(thresholds) <= CELLS or thresholds[-1] - thresholds[0] >= 2**15:
        return None
    base, span = int(thresholds[0]), int(thresholds[-1] - thresholds[0])
    for last in range(len(thresholds) - 1, CELLS):
        factor = min(2**15 - 1, ((last + 1) * 2**16 - 1) // max(span, 1))
        places = (thresholds - base) * factor >> 16
        if len(_different(places)) < len(thresholds):
            continue
        at = np.full(CELLS + 1, 32767)
        at[places] = thresholds
        below = np.searchsorted(places, np.arange(CELLS + 1))  # different thresholds before each cell
        counts = np.append(np.searchsorted(reach.thresholds, thresholds), len(reach.thresholds))[below]
        return base, span, factor, at, lif.decode[reach.code_first + counts + delta(lif.bits)]
    return None


@dataclass(frozen=True)
class Lines:
    """64 lines that give what membranes decode to (see mdsnn.h). Fields as in mdsnn_op, without `line_`."""

    base: int
    bias: int
    each: int
    shift: int
    fraction: int
    mask: int
    rest: int
    factor: int
    slope: Array
    offset: Array

    def decoded(self, u: Array) -> Array:
        x = np.maximum(u, self.base) + self.bias
        cell = (x * self.each >> 16) % LINES
        y = ((x << self.shift) % _WORD * self.slope[cell] >> 16) + self.offset[cell]
        result: Array = ((y % _WORD >> self.fraction & self.mask | self.rest) * self.factor >> 16) - self.bias
        return result


def find_lines(reach: Reach, lif: Lif, membrane: tuple[int, int]) -> Lines | None:
    """Lines whose steps are the thresholds, each checked at every u in reach.

    membrane  bounds of h: with the bias it must stay a word without sign
    None where 64 cells of one width are too few, where the decoded codes are no line of the codes, and for a LIF that
    has no use for them.
    """
    thresholds, codes = reach.thresholds, len(reach.thresholds) + 1
    if lif.reset != "hard" or lif.quantize != "post_reset" or codes == 1 or lif.v_th < 0:
        return None
    first = reach.code_first + delta(lif.bits)
    decoded = lif.decode[first : first + codes].astype(np.int64)
    base, span = int(thresholds[0]) - 1, reach.hi - int(thresholds[0]) + 2
    for shift in range(16 - (span - 1).bit_length(), -1, -1):
        biases = _factor(decoded, (max(-membrane[0], -base, 0), _WORD - 1 - membrane[1]), (base, reach.hi), shift)
        if biases is None:
            return None
        power, factor, starts, found = biases
        if len(found):
            break
    else:
        return None
    each, u = min(LINES * _WORD // span + 1, _WORD - 1), np.arange(base, reach.hi + 1)
    for i in range(_TRIES):
        start, bias = int(starts[i % len(found)]), int(found[i % len(found)])
        mask, step = 255 << power, -(-each // 400)
        each -= step
        while ((reach.hi + bias) * each >> 16) - ((base + bias) * each >> 16) >= LINES:
            each -= 1
        lines = _lines(thresholds + bias, (base + bias, reach.hi + bias), shift, each, (start & mask) >> power)
        if lines.without > _HOPELESS or lines.fraction < power:
            return None
        if lines.without:
            continue
        fraction = lines.fraction - power
        result = Lines(base, bias, each, shift, fraction, mask, start & ~mask, factor, lines.slope, lines.offset)
        if np.array_equal(result.decoded(u), decoded[np.searchsorted(thresholds, u, side="right")]):
            return result
    return None


def _factor(
    decoded: Array, bias: tuple[int, int], u: tuple[int, int], shift: int
) -> tuple[int, int, Array, Array] | None:
    """Power, factor, starts and biases: ((code << power) + start) * factor >> 16 is decoded[code] + bias.

    The bias lies between two bounds, and no u with it passes a multiple of 2**(16 - shift); a start has room for all
    codes in the 8 bits that begin at `power`. None where there is no such factor, whatever the bias.
    """
    last = len(decoded) - 1
    rise = int(decoded[-1] - decoded[0])
    power = max(rise // last, 0).bit_length()
    if rise <= 0 or power > 8:
        return None
    about, off = (rise << 16) // last >> power, (_WORD >> power) // last + 2
    factors = np.arange(max(about - off, 1), min(about + off, _WORD - 1) + 1)
    products = (np.arange(last + 1) << power)[:, None] * factors
    least = ((decoded << 16)[:, None] - products).max(0)  # of start * factor, with a bias of 0
    room = ((decoded + 1 << 16) - 1)[:, None] - products
    room = room.min(0) - least
    best = int(room.argmax())
    if room[best] < 0:
        return None
    factor = int(factors[best])
    starts = np.arange(0, _WORD, 256 << power)[:, None] + np.arange(255 - last + 1 << power)
    rest = starts * factor - least[best]
    starts, rest = starts[rest % _WORD <= room[best]], rest[rest % _WORD <= room[best]]
    biases = rest >> 16
    fit = (biases >= bias[0]) & (biases <= bias[1])
    fit &= (u[0] + biases) >> (16 - shift) == (u[1] + biases) >> (16 - shift)
    return power, factor, starts[fit], biases[fit]


@dataclass(frozen=True)
class _Found:
    """Lines as far as they were found: how many cells are without, bits of a code's fraction, slopes, offsets."""

    without: int
    fraction: int = 0
    slope: Array = field(default_factory=lambda: np.zeros(LINES, np.int64))
    offset: Array = field(default_factory=lambda: np.zeros(LINES, np.int64))


def _lines(thresholds: Array, x: tuple[int, int], shift: int, each: int, code: int) -> _Found:
    """Lines of the cells of x that are 2**16/each wide.

    thresholds, x  with their bias
    code           what is below the first threshold
    A line passes between two bounds at every threshold: it has reached the code at the threshold, but not one before
    it. These bounds of two thresholds bound the slope. Of slopes between these some are tried; the offset follows.
    """
    low, high = x[0] * each >> 16, x[1] * each >> 16
    edges = -((-np.arange(low, high + 2) << 16) // each)
    edges[0], edges[-1] = x[0], x[1] + 1
    begin, end = edges[:-1, None], edges[1:, None]
    before = np.searchsorted(thresholds, begin, side="right")
    many = np.searchsorted(thresholds, end) - before
    if many.max() > _CROWDED:
        return _Found(LINES)
    number = np.arange(int(many.max()))
    there = number < many
    at = thresholds[np.minimum(before + number, len(thresholds) - 1)]
    reached = np.where(there, before + number + 1, before) + code
    x_0, code_0 = np.hstack([begin, np.where(there, at, begin)]), np.hstack([before + code, reached])
    reached = np.where(there, reached, before + many + code + 1)
    x_1, code_1 = np.hstack([end, np.where(there, at, end)]) - 1, np.hstack([before + many + code + 1, reached])
    ahead = x_1[:, None, :] - x_0[:, :, None]
    rise = (code_1[:, None, :] - code_0[:, :, None]) / np.where(ahead == 0, 1, ahead)
    bottom, top = np.where(ahead < 0, rise, 0).max((1, 2)), np.where(ahead > 0, rise, _WORD).min((1, 2))
    steep = float(np.where(bottom > 0, (bottom + top) / 2, 0).max()) / (1 << shift)
    without = int(np.count_nonzero(bottom > top))
    if without or steep >= 1:
        return _Found(without or LINES)
    fraction = min(int(np.log2(1 / steep)), 8) if steep else 8
    result = _Found(0, fraction)
    scale, block = 1 << 16 + fraction, x[0] >> 16 - shift << 16 - shift
    bottom, top = bottom * (scale >> shift), np.minimum(top * (scale >> shift), _WORD - 1)
    x_0, x_1 = x_0 - block << shift, x_1 - block << shift
    cells, left = np.arange(low, high + 1) % LINES, np.arange(high + 1 - low)
    for tries in (16, 256):
        slopes = (bottom[left, None] + (top - bottom)[left, None] * ((np.arange(tries) + 0.5) / tries)).astype(np.int64)
        least = scale * code_0[left, None, :] - slopes[:, :, None] * x_0[left, None, :]
        most = scale * code_1[left, None, :] - 1 - slopes[:, :, None] * x_1[left, None, :]
        offsets = -(-least.max(2) >> 16)
        spare = most.min(2) - (offsets << 16)
        best = spare.argmax(1)[:, None]
        result.slope[cells[left]] = np.take_along_axis(slopes, best, 1)[:, 0]
        result.offset[cells[left]] = np.take_along_axis(offsets, best, 1)[:, 0] % _WORD
        left = left[np.take_along_axis(spare, best, 1)[:, 0] < 0]
        if not 0 < len(left) <= _HOPELESS:
            break
    return replace(result, without=len(left))


def _different(ascending: Array) -> Array:
    """Each value once (np.unique would import numpy.ma, which takes as long as a plan)."""
    different: Array = ascending[np.append(np.diff(ascending) != 0, np.ones(min(len(ascending), 1), bool))]
    return different


def spike_patterns(lif: Lif, x: Array, steps: int) -> Array:
    """Bit t: whether a LIF that gets x at every step fires at step t. Three more entries, for reads of four bytes."""
    patterns, q = np.zeros(len(x) + 3, np.int64), np.zeros(len(x), np.int64)
    options = (lif.bits, lif.v_th, lif.reset, lif.v_soft, lif.quantize, lif.q_th)
    for t in range(steps):
        _, s, q = lif_step(x, q, lif.decode, lif.thresholds, *options)
        patterns[: len(x)] |= s << t
    return patterns


def pattern_changes(patterns: Array, first: int) -> tuple[list[int], list[int]]:
    """Each x, of which `first` is the first, whose pattern is not that of x - 1, and the bits in which they differ."""
    flips = patterns[1:] ^ patterns[:-1]
    places = np.flatnonzero(flips)
    return (places + first + 1).tolist(), flips[places].tolist()


def affine_of(node: BnDense, lo: Array, hi: Array, saturation: int) -> BnAffine | None:
    """The table as multiply, add and shift, 16-bit multipliers and 32-bit sums; None if that cannot give all entries.

    lo, hi  the accumulators of each channel, as the proof has them
    Vectors add and shift, where they would read a table one entry at a time.
    """
    ends = np.cumsum(hi - lo + 1)
    found = np.zeros((3, len(lo)), np.int64)
    for c in range(len(lo)):
        line = _line(node.table[ends[c] - (hi[c] - lo[c] + 1) : ends[c]].astype(np.int64), int(lo[c]), saturation)
        if line is None:
            return None
        found[:, c] = line
    return BnAffine(node.name, node.source, *found)


def _line(y: Array, first: int, saturation: int) -> tuple[int, int, int] | None:
    """Multiplier, offset and shift that give y for the accumulators from `first` on; None if there are no such.

    For a multiplier m the offset must lie between two bounds, each a maximum or minimum over accumulators, and how far
    these lie apart is concave in m: m is found by bisection.
    """
    if y[0] == y[-1]:  # tables are monotone
        return 0, int(y[0]), 0
    if len(y) > _LINE:
        return None
    acc = np.arange(first, first + len(y))
    reached, kept = np.flatnonzero(y > -saturation), np.flatnonzero(y < saturation)  # one bound where y is saturated
    straight = np.flatnonzero(abs(y) < saturation)
    run = int(straight[-1] - straight[0]) if len(straight) else 0
    rise = int(y[straight[-1]] - y[straight[0]]) if run else 0
    steep = max(abs(rise) - 1, 1) if run else 2 * saturation
    shift = min(MAX_SHIFT, (_MULTIPLIER * max(run, 1) // steep).bit_length() - 1)
    while shift >= 0:
        low, high = (((rise - 1) << shift) // run, ((rise + 1) << shift) // run + 1) if run else (-(2**62), 2**62)
        cut = low < -_MULTIPLIER or high > _MULTIPLIER
        low, high = max(low, -_MULTIPLIER), min(high, _MULTIPLIER)
        at_least, at_most = y[reached] << shift, (y[kept] + 1 << shift) - 1  # of m*acc + offset
        while low <= high:
            m = (low + high) >> 1
            bottom, top = at_least - m * acc[reached], at_most - m * acc[kept]
            i, j = int(bottom.argmax()), int(top.argmin())
            if bottom[i] <= top[j]:
                if abs(m) * max(-first, first + len(y) - 1) + abs(int(bottom[i])) < INT32_LIMIT:
                    return m, int(bottom[i]), shift
                cut = True
                break
            wider = int(acc[reached[i]] - acc[kept[j]])  # by how much if m grows by 1
            if wider == 0:
                break
            low, high = (m + 1, high) if wider > 0 else (low, m - 1)
        if not cut:  # no line at all
            return None
        shift -= 1
    return None
