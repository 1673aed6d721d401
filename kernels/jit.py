"""The kernels in Numba: what runs where there is no C compiler. The same names and arguments as reference.py.

Definition: reference.py. Every function here agrees with it bit for bit (tests/test_kernels_bit_exact.py); where the
two differ, this file is wrong. Values are int32, which network.py proves to be wide enough. Each compiled function
meets one signature only, for the wrappers bring every argument to one dtype and layout; so nothing compiles twice. The
GIL is released inside.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

from . import reference
from .formats import Array, delta

_Function = TypeVar("_Function", bound=Callable[..., Any])
_TABLE = 1 << 20  # largest dense table of membrane codes
_made: dict[tuple[str, int], tuple[weakref.ref[Array], Any]] = {}


def _njit(function: _Function) -> _Function:
    compiled: Any = numba.njit(nogil=True, cache=False, error_model="numpy")(function)
    return cast(_Function, compiled)


def _int32(x: Array) -> Array:
    return np.ascontiguousarray(x, np.int32)


def _once(what: str, constant: Array, make: Callable[[Array], Any]) -> Any:
    """`make(constant)`, remembered for as long as a read-only `constant` (a node's array) lives."""
    if constant.flags.writeable:
        return make(constant)
    key = what, id(constant)
    entry = _made.get(key)
    if entry is None or entry[0]() is not constant:
        entry = weakref.ref(constant, lambda _: _made.pop(key, None)), make(constant)
        _made[key] = entry
    return entry[1]


@_njit
def _input_table(pixels: Array, table: Array) -> Array:
    samples, channels, height, width = pixels.shape
    codes = np.empty((samples, channels, height, width), np.int32)
    for n in range(samples):
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    codes[n, c, y, x] = table[c, pixels[n, c, y, x]]
    return codes


def input_table(pixels: Array, table: Array) -> Array:
    """Pixels (N, C, H, W) uint8 to codes by a row of `table` (C, 256) per channel."""
    return _input_table(np.array(pixels, np.uint8, order="C"), np.array(table, np.int8, order="C"))


@_njit
def _conv2d(
    x: Array, weight: Array, kh: int, kw: int, groups: int, stride: int, padding: int, out_height: int, out_width: int
) -> Array:
    """weight [group][in][ky * kw + kx][out]: each input that is not 0 adds its rows to the outputs it reaches."""
    samples, _, height, width = x.shape
    ins, outs = weight.shape[1], weight.shape[3]
    acc = np.empty((samples, groups * outs, out_height, out_width), np.int32)
    total = np.empty((out_height, out_width, outs), np.int32)
    for n in range(samples):
        for g in range(groups):
            total[:] = 0
            for i in range(ins):
                for y in range(height):
                    for xx in range(width):
                        value = x[n, g * ins + i, y, xx]
                        if value == 0:
                            continue
                        for ky in range(kh):
                            reach_y = y + padding - ky
                            if reach_y < 0 or reach_y % stride != 0 or reach_y // stride >= out_height:
                                continue
                            for kx in range(kw):
                                reach_x = xx + padding - kx
                                if reach_x < 0 or reach_x % stride != 0 or reach_x // stride >= out_width:
                                    continue
                                row = weight[g, i, ky * kw + kx]
                                into = total[reach_y // stride, reach_x // stride]
                                for o in range(outs):
                                    into[o] += value * row[o]
            for o in range(outs):
                for y in range(out_height):
                    for xx in range(out_width):
                        acc[n, g * outs + o, y, xx] = total[y, xx, o]
    return acc


def conv2d(x: Array, weight: Array, stride: int, padding: int, groups: int) -> Array:
    """Accumulators of a convolution: the sum of weight[o,c,i,j] * x[n,c,y*stride+i,x*stride+j] at (n,o,y,x)."""
    c_out, per_group, kh, kw = weight.shape

    def by_input(w: Array) -> Array:
        rows = w.reshape(groups, c_out // groups, per_group, kh * kw).transpose(0, 2, 3, 1)
        return np.array(rows, np.int32, order="C")

    height = (x.shape[2] + 2 * padding - kh) // stride + 1
    width = (x.shape[3] + 2 * padding - kw) // stride + 1
    rows = _once(f"rows {groups}", weight, by_input)
    return _conv2d(_int32(x), rows, kh, kw, groups, stride, padding, height, width)


@_njit
def _linear(x: Array, weight: Array) -> Array:
    """weight [in][out]."""
    samples, outs = x.shape[0], weight.shape[1]
    acc = np.zeros((samples, outs), np.int32)
    for n in range(samples):
        for i in range(weight.shape[0]):
            value = x[n, i]
            if value != 0:
                for o in range(outs):
                    acc[n, o] += value * weight[i, o]
    return acc


def linear(x: Array, weight: Array) -> Array:
    """Accumulators of a fully connected layer: (N, in, 1, 1) to (N, out, 1, 1)."""
    by_input = _once("linear", weight, lambda w: np.array(w.T, np.int32, order="C"))
    return _linear(_int32(x).reshape(len(x), -1), by_input)[:, :, None, None]


@_njit
def _bn_affine(acc: Array, multiplier: Array, offset: Array, shift: Array, saturation: int) -> Array:
    samples, channels, plane = acc.shape
    y = np.empty((samples, channels, plane), np.int32)
    for n in range(samples):
        for c in range(channels):
            a, b, g = multiplier[c], offset[c], shift[c]
            for i in range(plane):
                v = (a * acc[n, c, i] + b) >> g
                y[n, c, i] = min(max(v, -saturation), saturation)
    return y


def _constant64(constant: Array) -> Array:
    return np.array(constant, np.int64, order="C")


def bn_affine(acc: Array, multiplier: Array, offset: Array, shift: Array, saturation: int) -> Array:
    """y = clamp((multiplier*acc + offset) >> shift, -C, C) per channel; >> floors. Products take 64 bits."""
    a, b, g = (_once("int64", constant, _constant64) for constant in (multiplier, offset, shift))
    return _bn_affine(_int32(acc).reshape(*acc.shape[:2], -1), a, b, g, saturation).reshape(acc.shape)


@_njit
def _bn_dense(acc: Array, table: Array, start: Array) -> Array:
    samples, channels, plane = acc.shape
    y = np.empty((samples, channels, plane), np.int32)
    for n in range(samples):
        for c in range(channels):
            for i in range(plane):
                y[n, c, i] = table[start[c] + acc[n, c, i]]
    return y


def bn_dense(acc: Array, table: Array, lo: Array, hi: Array) -> Array:
    """y = table entry acc - lo of its channel's row; rows of hi - lo + 1 entries follow each other."""
    sizes = hi - lo + 1
    start = np.array(np.cumsum(sizes) - sizes - lo, np.int64)
    rows = _once("int32", table, lambda t: np.array(t, np.int32, order="C"))
    return _bn_dense(_int32(acc).reshape(*acc.shape[:2], -1), rows, start).reshape(acc.shape)


def residual_add(a: Array, b: Array) -> Array:
    """a + b on the same grid, exact."""
    total: Array = _int32(a) + _int32(b)
    return total


def requantize(x: Array, shift: int, bits: int) -> Array:
    """Stream to shortcut codes: clip((x + 2**(shift-1)) >> shift, -delta, delta)."""
    codes: Array = np.clip((_int32(x) + np.int32(1 << (shift - 1))) >> np.int32(shift), -delta(bits), delta(bits))
    return codes


def _code_table(thresholds: Array) -> Array | None:
    """How many thresholds are <= u, for u from thresholds[0] - 1 to thresholds[-1]; None if that is too long."""
    first, last = int(thresholds[0]) - 1, int(thresholds[-1])
    if last - first >= _TABLE:
        return None
    return np.searchsorted(thresholds, np.arange(first, last + 1), side="right").astype(np.int32)


@_njit
def _codes(u: Array, counts: Array, first: int, bits_top: int) -> Array:
    q = np.empty(u.size, np.int32)
    last = counts.size - 1
    for i in range(u.size):
        q[i] = counts[min(max(u[i] - first, 0), last)] - bits_top
    return q


def membrane_code(u: Array, thresholds: Array, bits: int) -> Array:
    """The membrane quantizer: q(u) = -delta + #{j : thresholds[j] <= u}."""
    counts = _once("codes", thresholds, _code_table)
    if counts is None:
        return reference.membrane_code(u, thresholds, bits).astype(np.int32)
    return _codes(_int32(u).reshape(-1), counts, int(thresholds[0]) - 1, delta(bits)).reshape(u.shape)


@_njit
def _integrate(
    x: Array, q: Array, decode: Array, top: int, v_th: int, soft: bool, v_soft: int
) -> tuple[Array, Array, Array]:
    """h, the spikes of a post_reset neuron, and what it then quantizes."""
    h, s, u = np.empty(x.size, np.int32), np.empty(x.size, np.int32), np.empty(x.size, np.int32)
    for i in range(x.size):
        v = x[i] + decode[q[i] + top]
        fired = v > v_th
        h[i] = v
        s[i] = fired
        u[i] = (v - v_soft if soft else 0) if fired else v
    return h, s, u


def lif_step(
    x: Array,
    q: Array,
    decode: Array,
    thresholds: Array,
    bits: int,
    v_th: int,
    reset: str,
    v_soft: int,
    quantize: str,
    q_th: int,
) -> tuple[Array, Array, Array]:
    """One step of leaky integrate-and-fire on membrane codes; arguments and results as in reference.py."""
    shape = x.shape
    flat_x, flat_q = _int32(x).reshape(-1), _int32(q).reshape(-1)
    leak = _once("int32", decode, lambda d: np.array(d, np.int32, order="C"))
    h, s, u = _integrate(flat_x, flat_q, leak, delta(bits), v_th, reset == "soft", v_soft)
    if quantize == "pre_fire":
        code = membrane_code(h, thresholds, bits)
        s = (code > q_th).astype(np.int32)
        code[s != 0] = 0
    else:
        code = membrane_code(u, thresholds, bits)
    return h.reshape(shape), s.reshape(shape), code.reshape(shape)


@_njit
def _pool(
    x: Array, kh: int, kw: int, stride: int, padding: int, out_height: int, out_width: int, largest: bool
) -> Array:
    samples, channels, height, width = x.shape
    out = np.empty((samples, channels, out_height, out_width), np.int32)
    for n in range(samples):
        for c in range(channels):
            for oy in range(out_height):
                for ox in range(out_width):
                    value = 0
                    for y in range(max(oy * stride - padding, 0), min(oy * stride - padding + kh, height)):
                        for xx in range(max(ox * stride - padding, 0), min(ox * stride - padding + kw, width)):
                            value = max(value, x[n, c, y, xx]) if largest else value + x[n, c, y, xx]
                    out[n, c, oy, ox] = value
    return out


def _pooled(x: Array, kh: int, kw: int, stride: int, padding: int, largest: bool) -> Array:
    height = (x.shape[2] + 2 * padding - kh) // stride + 1
    width = (x.shape[3] + 2 * padding - kw) // stride + 1
    return _pool(_int32(x), kh, kw, stride, padding, height, width, largest)


def max_pool(x: Array, kernel: int, stride: int, padding: int) -> Array:
    """OR of the spikes in each window; padding adds none."""
    return _pooled(x, kernel, kernel, stride, padding, True)


def sum_pool(x: Array, kernel_height: int, kernel_width: int, stride: int, padding: int) -> Array:
    """Sum of each window; padding counts as 0."""
    return _pooled(x, kernel_height, kernel_width, stride, padding, False)


def readout(total: Array, weight: Array, bias: Array) -> Array:
    """Logits (N, classes) of the sum over time `total` (N, in, 1, 1): weight @ total + bias."""
    logits: Array = linear(total, weight)[:, :, 0, 0] + bias
    return logits
