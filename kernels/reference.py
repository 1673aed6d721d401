"""Every kernel in NumPy: THE definition. Where an engine differs from this file, the engine is wrong.

One function a node type, plain and slow. Values are [N, C, H, W] at one timestep, in int64, so that nothing here can
overflow (kernels/network.py proves that narrower widths cannot either). docs/arithmetic.md has the mathematics.
"""

from __future__ import annotations

import numpy as np

from .formats import Array, delta


def input_table(pixels: Array, table: Array) -> Array:
    """Pixels (N, C, H, W) uint8 to codes by a row of `table` (C, 256) per channel."""
    channels = np.arange(table.shape[0])[None, :, None, None]
    return table[channels, pixels].astype(np.int64)


def _pad(x: Array, padding: int) -> Array:
    return np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))


def _windows(x: Array, height: int, width: int, stride: int, padding: int) -> Array:
    """Views of every window: (N, C, H_out, W_out, height, width). Padding is integer 0."""
    windows = np.lib.stride_tricks.sliding_window_view(_pad(x, padding), (height, width), axis=(2, 3))
    return windows[:, :, ::stride, ::stride]


def conv2d(x: Array, weight: Array, stride: int, padding: int, groups: int) -> Array:
    """Accumulators of a convolution: the sum of weight[o,c,i,j] * x[n,c,y*stride+i,x*stride+j] at (n,o,y,x)."""
    c_out, per_group, kh, kw = weight.shape
    windows = _windows(x, kh, kw, stride, padding)
    n, _, height, width = windows.shape[:4]
    columns = windows.transpose(0, 2, 3, 1, 4, 5).reshape(n, height, width, groups, per_group * kh * kw)
    rows = weight.astype(np.int64).reshape(groups, c_out // groups, per_group * kh * kw)
    acc = np.empty((n, height, width, groups, c_out // groups), np.int64)
    for group in range(groups):
        acc[:, :, :, group] = columns[:, :, :, group] @ rows[group].T
    return acc.reshape(n, height, width, c_out).transpose(0, 3, 1, 2)


def linear(x: Array, weight: Array) -> Array:
    """Accumulators of a fully connected layer: (N, in, 1, 1) to (N, out, 1, 1)."""
    acc: Array = x[:, :, 0, 0] @ weight.astype(np.int64).T
    return acc[:, :, None, None]


def bn_affine(acc: Array, multiplier: Array, offset: Array, shift: Array, saturation: int) -> Array:
    """y = clamp((multiplier*acc + offset) >> shift, -C, C) per channel; >> floors."""
    a, b, g = (constant.astype(np.int64)[None, :, None, None] for constant in (multiplier, offset, shift))
    y: Array = np.clip((a * acc + b) >> g, -saturation, saturation)
    return y


def bn_dense(acc: Array, table: Array, lo: Array, hi: Array) -> Array:
    """y = table entry acc - lo of its channel's row; rows of hi - lo + 1 entries follow each other."""
    sizes = hi - lo + 1
    start = np.cumsum(sizes) - sizes - lo
    y: Array = table.astype(np.int64)[acc + start[None, :, None, None]]
    return y


def residual_add(a: Array, b: Array) -> Array:
    """a + b on the same grid, exact."""
    total: Array = a + b
    return total


def requantize(x: Array, shift: int, bits: int) -> Array:
    """Stream to shortcut codes: clip((x + 2**(shift-1)) >> shift, -delta, delta)."""
    codes: Array = np.clip((x + (1 << (shift - 1))) >> shift, -delta(bits), delta(bits))
    return codes


def membrane_code(u: Array, thresholds: Array, bits: int) -> Array:
    """The membrane quantizer: q(u) = -delta + #{j : thresholds[j] <= u}."""
    return np.searchsorted(thresholds.astype(np.int64), u, side="right") - delta(bits)


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
    """One step of leaky integrate-and-fire on membrane codes.

    x        input current on the residual grid     q  codes of the step before, in [-delta, delta]
    returns  h  membrane after input, x + decode[q + delta]
             s  spikes, 0 or 1
             q  codes to keep
    post_reset: s = h > v_th; u = 0 (hard) or h - v_soft (soft) where s, else h; q = membrane_code(u).
    pre_fire:   q = membrane_code(h); s = q > q_th; q = 0 where s.
    """
    h = x + decode.astype(np.int64)[q + delta(bits)]
    if quantize == "pre_fire":
        code = membrane_code(h, thresholds, bits)
        s = code > q_th
        return h, s.astype(np.int64), np.where(s, 0, code)
    s = h > v_th
    u = np.where(s, 0 if reset == "hard" else h - v_soft, h)
    return h, s.astype(np.int64), membrane_code(u, thresholds, bits)


def max_pool(x: Array, kernel: int, stride: int, padding: int) -> Array:
    """OR of the spikes in each window; padding adds none."""
    spikes: Array = _windows(x, kernel, kernel, stride, padding).max(axis=(4, 5))
    return spikes


def sum_pool(x: Array, kernel_height: int, kernel_width: int, stride: int, padding: int) -> Array:
    """Sum of each window; padding counts as 0."""
    counts: Array = _windows(x, kernel_height, kernel_width, stride, padding).sum(axis=(4, 5))
    return counts


def readout(total: Array, weight: Array, bias: Array) -> Array:
    """Logits (N, classes) of the sum over time `total` (N, in, 1, 1): weight @ total + bias."""
    logits: Array = total[:, :, 0, 0] @ weight.astype(np.int64).T + bias.astype(np.int64)
    return logits
