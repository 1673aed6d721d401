"""Loops of training over memory, in Numba: one pass where torch would make one an operation.

Each function computes what its definition, a few lines of torch named in its docstring, computes in float32 on the
CPU, bit for bit (tests/test_mdsnn_loops.py); where the two differ, this file is wrong. So no sum is reordered, no
product and sum are fused, and tanh, whose last bit depends on who computes it, is left to torch. Arrays are flat views
of a tensor's memory; the GIL is released inside, and the work is cut for as many threads as torch is set to use.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

try:
    import numba
except ImportError:  # everything here has a definition in torch that runs without
    numba = None  # type: ignore[assignment]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

SMALLEST = 1 << 16
"""Tensors of fewer elements are not worth a loop of their own."""
_CHUNK = 1 << 16
_BLOCK = 2048
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_SIGNLESS = np.int32(0x7FFFFFFF)


def suits(x: Tensor) -> bool:
    """Whether a loop here may stand in for torch: float32 on the CPU, large enough, and Numba there."""
    return (
        numba is not None
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() >= SMALLEST
        and not torch.compiler.is_compiling()
    )


def _njit(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = numba.njit(nogil=True, error_model="numpy")(function)
    return compiled


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process; a forked child makes its own."""
    return ThreadPoolExecutor(os.cpu_count() or 1, "mdsnn-loops")


def _over(length: int, loop: Callable[[int, int], Any]) -> list[Any]:
    """Call loop(begin, end) over pieces of range(length), in as many threads as torch uses; the results, unordered."""
    threads = min(torch.get_num_threads(), -(-length // _CHUNK))
    if threads <= 1:
        return [loop(0, length)]
    size = -(-length // (threads * -(-length // (threads * _CHUNK * 4))))
    begins = itertools.count(0, size)  # next() of it is one step under the GIL: each piece goes to one thread

    def work() -> list[Any]:
        done = []
        while (begin := next(begins)) < length:
            done.append(loop(begin, min(begin + size, length)))
        return done

    others = [_pool(os.getpid()).submit(work) for _ in range(threads - 1)]
    return [*work(), *itertools.chain.from_iterable(other.result() for other in others)]


# ------------------------------------------------------------------------------------------------ memory as rows


def dense(x: Tensor) -> Tensor:
    """`x` [T', N, ...], or a copy, such that each step is one run of memory in an order that all steps share."""
    step = x[0]
    whole = step.is_contiguous() or (step.ndim == 4 and step.is_contiguous(memory_format=torch.channels_last))
    return x if whole and (x.shape[0] == 1 or x.stride(0) == step.numel()) else x.contiguous()


def like(x: Tensor, steps: int) -> Tensor:
    """An empty tensor of `steps` steps, each laid out as those of `x`, which is dense."""
    return torch.empty_strided((steps, *x.shape[1:]), (x[0].numel(), *x.stride()[1:]), dtype=x.dtype, device=x.device)


def _aligned(x: Tensor, other: Tensor) -> Tensor:
    """`x` in the memory order of `other`, which is dense and of its shape."""
    same = x.stride()[1:] == other.stride()[1:] and (x.shape[0] == 1 or x.stride(0) == other.stride(0))
    return x if same else like(other, other.shape[0]).copy_(x)


def rows(x: Tensor) -> Floats:
    """A dense tensor [T', ...] as an array (T', elements of a step), sharing memory."""
    step = x[0].numel()
    array: Floats = x.detach().as_strided((x.shape[0], step), (step, 1)).numpy()
    return array


# ------------------------------------------------------------------------------------------------------- the LIF


class Neuron(NamedTuple):
    """What the loops of a LIF layer compile for (`soft`, `detach`, `rectangle`) and run with (the rest).

    soft       the reset, else hard        detach  no gradient through the reset
    rectangle  the surrogate's shape, else a triangle; gamma and width are its own
    levels     delta(bits) of the membrane's quantizer (after the reset), or 0 for none
    """

    tau: float
    v_th: float
    soft: bool
    detach: bool
    rectangle: bool
    gamma: float
    width: float
    levels: int


@cache
def _full_precision(soft: bool, keep: bool) -> Callable[..., Any]:
    def loop(x: Floats, h: Floats, s: Floats, tau: Any, v_th: Any, begin: int, end: int) -> None:
        u = np.empty(_BLOCK, np.float32)
        for start in range(begin, end, _BLOCK):
            count = min(_BLOCK, end - start)
            u[:] = _ZERO
            for t in range(s.shape[0]):
                stop = start + count
                x_t, h_t, s_t = x[t % x.shape[0]][start:stop], h[t % h.shape[0]][start:stop], s[t][start:stop]
                for i in range(count):
                    membrane = tau * u[i] + x_t[i]
                    fired = _ONE if membrane - v_th > _ZERO else _ZERO
                    if keep:
                        h_t[i] = membrane
                    s_t[i] = fired
                    u[i] = membrane - v_th * fired if soft else membrane * (_ONE - fired)

    return _njit(loop)


@cache
def _quantized_step(soft: bool) -> Callable[..., Any]:
    def loop(
        x: Floats, before: Floats, h: Floats, s: Floats, v: Floats, bits: npt.NDArray[np.int32],
        tau: Any, v_th: Any, alpha: Any, levels: Any, unit: Any, begin: int, end: int,
    ) -> int:  # fmt: skip
        peak = np.int32(0)
        for start in range(begin, end, _BLOCK):
            stop = min(start + _BLOCK, end)
            for i in range(start, stop):
                ratio = before[i] / alpha
                ratio = _ONE if ratio > _ONE else (-_ONE if ratio < -_ONE else ratio)
                membrane = tau * (np.rint(ratio * levels) * unit) + x[i]
                fired = _ONE if membrane - v_th > _ZERO else _ZERO
                h[i] = membrane
                s[i] = fired
                v[i] = membrane - v_th * fired if soft else membrane * (_ONE - fired)
            for i in range(start, stop):  # as integers, magnitudes keep their order, and NaN is the largest
                peak = max(peak, bits[i] & _SIGNLESS)
        return int(peak)

    return _njit(loop)


@cache
def _slope(rectangle: bool) -> Callable[..., Any]:
    """The surrogate's gradient at z = h - v_th."""

    def rectangular(z: Any, gamma: Any, width: Any) -> Any:
        return gamma * (_ONE if abs(z) < width else _ZERO)

    def triangular(z: Any, gamma: Any, width: Any) -> Any:
        slope = _ONE - abs(z) / width
        return gamma * (_ZERO if slope < _ZERO else slope)

    return _njit(rectangular if rectangle else triangular)


@cache
def _backward(soft: bool, detach: bool, rectangle: bool, quantized: bool, tapped: bool) -> Callable[..., Any]:
    slope = _slope(rectangle)

    def loop(
        h: Floats, squashed: Floats, scales: Floats, gs: Floats, gh: Floats, gx: Floats,
        tau: Any, v_th: Any, gamma: Any, width: Any, begin: int, end: int,
    ) -> None:  # fmt: skip
        gu, found = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
        last = gs.shape[0] - 1
        for start in range(begin, end, _BLOCK):
            count = min(_BLOCK, end - start)
            stop = start + count
            for t in range(last, -1, -1):
                h_t, gs_t, gh_t = h[t][start:stop], gs[t][start:stop], gh[t % gh.shape[0]][start:stop]
                q_t, alpha = squashed[t % squashed.shape[0]][start:stop], scales[t]
                gx_t, first = gx[t % gx.shape[0]][start:stop], t == last or gx.shape[0] > 1
                out = gx_t if first else found
                # two loops, each without a branch: LLVM makes vectors of them
                if t == last:  # the state after the last step reaches nothing
                    for i in range(count):
                        g = gs_t[i] * slope(h_t[i] - v_th, gamma, width)
                        g = gh_t[i] + g if tapped else g
                        out[i] = g
                        gu[i] = g * tau
                else:
                    for i in range(count):
                        z = h_t[i] - v_th
                        gv = gu[i]
                        if quantized:
                            q = q_t[i]
                            gv = gv * (_ONE - q * q) * (_ONE if abs(q) <= alpha else _ZERO)
                        if soft:
                            kept = gv
                            g_reset = gv * v_th
                        else:
                            kept = gv * (_ONE - (_ONE if z > _ZERO else _ZERO))
                            g_reset = gv * h_t[i]
                        g_spike = gs_t[i] if detach else gs_t[i] - g_reset
                        g = (gh_t[i] + kept if tapped else kept) + g_spike * slope(z, gamma, width)
                        out[i] = g
                        gu[i] = g * tau
                if not first:
                    for i in range(count):
                        gx_t[i] += found[i]

    return _njit(loop)


def lif_forward(
    x: Tensor, neuron: Neuron, steps: int, keep: bool, scale: Callable[[float], float] | None, peaks: list[float]
) -> tuple[Tensor, Tensor, Tensor | None, list[float]]:
    """All `steps` steps of a LIF layer, as neurons.lif_step from a state of 0.

    x        [T', N, C, H, W], T' = steps or 1 (the same input at every step); dense
    keep     whether h is wanted of every step; else, at full precision, what stands in its place is undefined
    scale    the quantizer's alpha of a step, from the largest |u| of that step; None at full precision
    peaks    gets the largest |u| of every step, where the membrane is quantized
    returns  s, h [T, ...] in the memory order of x; tanh of u before it was rounded (None at full precision); alphas
    """
    s, h = like(x, steps), like(x, steps if keep else 1)
    xs, ss, hs = rows(x), rows(s), rows(h)
    tau, v_th, size = np.float32(neuron.tau), np.float32(neuron.v_th), xs.shape[1]
    if scale is None:
        full = _full_precision(neuron.soft, keep)
        _over(size, partial(full, xs, hs, ss, tau, v_th))
        return s, h, None, []
    squashed = like(x, steps if keep else 1)
    vs, bits = rows(squashed), rows(squashed).view(np.int32)
    step, levels = _quantized_step(neuron.soft), np.float32(neuron.levels)
    before, alpha, unit, alphas = np.zeros(size, np.float32), _ONE, _ZERO, list[float]()
    for t in range(steps):
        x_t, h_t, s_t, v_t, bits_t = xs[t % len(xs)], hs[t % len(hs)], ss[t], vs[t % len(vs)], bits[t % len(vs)]
        constants = (tau, v_th, np.float32(alpha), levels, np.float32(unit))
        found = _over(size, partial(step, x_t, before, h_t, s_t, v_t, bits_t, *constants))
        peaks.append(float(np.array(max(found), np.int32).view(np.float32)))
        alpha = np.float32(scale(peaks[-1]))
        unit = alpha / levels
        alphas.append(float(alpha))
        squashed[t % len(vs)].tanh_()
        before = v_t
    return s, h, squashed, alphas


def lif_backward(
    neuron: Neuron,
    steps_in: int,
    h: Tensor,
    squashed: Tensor | None,
    alphas: list[float],
    gs: Tensor,
    gh: Tensor | None,
) -> Tensor:
    """The gradient of lif_forward's x, as autograd finds it through neurons.lif_step.

    steps_in   T' of x; the gradients of the steps are summed, the last first, where it is 1
    gs, gh     gradients of s, and of h where something read it
    """
    loop = _backward(neuron.soft, neuron.detach, neuron.rectangle, squashed is not None, gh is not None)
    gx = like(h, steps_in)
    hs, gxs, gss = rows(h), rows(gx), rows(_aligned(gs, h))
    ghs = gss if gh is None else rows(_aligned(gh, h))
    qs = hs if squashed is None else rows(squashed)
    scales = np.array(alphas or [1.0] * len(hs), np.float32)
    constants = [np.float32(value) for value in (neuron.tau, neuron.v_th, neuron.gamma, neuron.width)]
    _over(hs.shape[1], partial(loop, hs, qs, scales, gss, ghs, gxs, *constants))
    return gx


# ------------------------------------------------------------------------------------------- rounding to a grid


@cache
def _rounding() -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(
        y: Floats, out: Floats, inside: npt.NDArray[np.bool_], step: Any, low: Any, high: Any, begin: int, end: int
    ) -> None:
        half = np.float32(0.5)
        for i in range(begin, end):
            code = np.floor(y[i] / step + half)
            clipped = low if code < low else (high if code > high else code)
            inside[i] = clipped == code
            out[i] = clipped * step

    def backward(grad: Floats, inside: npt.NDArray[np.bool_], out: Floats, begin: int, end: int) -> None:
        for i in range(begin, end):
            out[i] = grad[i] * (_ONE if inside[i] else _ZERO)

    return _njit(forward), _njit(backward)


def round_forward(y: Tensor, step: float, low: float, high: float) -> tuple[Tensor, Tensor]:
    """clamp(floor(y/step + 1/2), low, high) * step of a dense tensor [1, N, ...], and where the clamp did nothing."""
    out, inside = like(y, 1), torch.empty_strided(y.shape, like(y, 1).stride(), dtype=torch.bool)
    flat = inside.as_strided((y.numel(),), (1,)).numpy()
    constants = [np.float32(value) for value in (step, low, high)]
    _over(y.numel(), partial(_rounding()[0], rows(y)[0], rows(out)[0], flat, *constants))
    return out, inside


def round_backward(grad: Tensor, inside: Tensor) -> Tensor:
    """grad * inside, in the memory order of `inside`."""
    out = torch.empty_strided(inside.shape, inside.stride(), dtype=grad.dtype)
    flat = inside.as_strided((inside.numel(),), (1,)).numpy()
    _over(grad.numel(), partial(_rounding()[1], rows(_aligned(grad, out))[0], flat, rows(out)[0]))
    return out


# ---------------------------------------------------------------------------------------------- weights by Eq. 3


@cache
def _weights() -> tuple[Callable[..., Any], Callable[..., Any]]:
    def peaks(
        w: npt.NDArray[np.int32], squashed: npt.NDArray[np.int64], begin: int, end: int
    ) -> tuple[np.int32, np.int64]:
        largest, widest = np.int32(0), np.int64(0)
        for i in range(begin, end):
            largest = max(largest, w[i] & _SIGNLESS)
            widest = max(widest, squashed[i] & np.int64(0x7FFFFFFFFFFFFFFF))
        return largest, widest

    def values(squashed: Doubles, out: Floats, alpha: float, levels: float, unit: float, begin: int, end: int) -> None:
        for i in range(begin, end):
            out[i] = np.float32(np.rint(squashed[i] / alpha * levels) * unit + 0.0)  # no code is -0

    return _njit(peaks), _njit(values)


def weight_values(w: Tensor, levels: int) -> Tensor | None:
    """alpha * codes / delta of quantizers.quantize_tanh as float32; None if w holds NaN or infinity, or is all 0.

    w       float32 on the CPU, any layout      levels  delta(bits)
    """
    w = dense(w.detach().unsqueeze(0))
    flat, out = rows(w)[0], like(w, 1)
    squashed = np.tanh(flat.astype(np.float64))
    peaks, values = _weights()
    found = _over(len(flat), partial(peaks, flat.view(np.int32), squashed.view(np.int64)))
    largest = np.array(max(one for one, _ in found), np.int32).view(np.float32)
    alpha = float(np.array(max(other for _, other in found), np.int64).view(np.float64))
    if not np.isfinite(largest) or alpha == 0.0:
        return None
    _over(len(flat), partial(values, squashed, rows(out)[0], alpha, float(levels), alpha / levels))
    return out.squeeze(0)
