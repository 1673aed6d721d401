"""Quantizers of MD-SNN (arXiv 2512.04443), Eqs. 3 and 4, each with the gradient it trains by.

Forward returns the exact hard value: no soft rounding, no annealing. Backward is straight-through: the rounding counts
as the identity, everything around it is differentiated as written, and each docstring gives the resulting formula.
`bits = 32` means full precision and returns the input itself. MINT's uniform quantizers, the paper's baseline, stand at
the end of each section. The integer constants of a frozen network come from
mdsnn.kernels.formats; the weight codes here are computed in float64 so that they are the same codes.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mdsnn.kernels.errors import FormatError
from mdsnn.kernels.formats import Grid, check_bits, clamp_alpha, delta, weight_codes

from . import loops

FULL_PRECISION = 32
"""The `bits` of a layer that is not quantized (a teacher's)."""
QUANTIZERS = ("tanh", "mint")
"""Of weights and membranes: MD-SNN Eq. 3, or MINT's uniform levels with one learned scale for both."""
BN_GRIDS = ("eq4", "wageubn")
STATISTICS_BITS = 16
"""The `statistics_bits` of a BN layer whose mu and sigma are quantized."""
ALPHA_FLOOR = 2.0**-12
"""Smallest alpha while training: the step of the finest residual grid. A frozen alpha is clamped to its own grid."""


def check_width(bits: int, what: str = "bits") -> int:
    """Return `bits` if it is 2..8, or 32 for full precision; raises FormatError otherwise."""
    return FULL_PRECISION if bits == FULL_PRECISION else check_bits(bits, what)


def check_finite(values: Tensor, name: str) -> None:
    """Raise FormatError, naming the tensor, if it holds NaN or infinity."""
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise FormatError(f"tensor '{name}' holds {bad} NaN or infinite values; restore an earlier checkpoint")


# --------------------------------------------------------------------------------------------------- weights


def quantize_tanh(
    w: Tensor, bits: int, alpha: Tensor | float | None = None, *, name: str | None = None
) -> tuple[Tensor, Tensor]:
    """Round `tanh(w)` to 2*delta + 1 symmetric levels (MD-SNN Eq. 3; MINT's quantizer), in float64.

    On the CPU the codes come from `formats.weight_codes` itself, so that live and frozen codes cannot differ; float64
    tanh of another device may be an ulp off NumPy's, which moves a code only within that ulp of a tie.

    w       any shape, real
    bits    2..8
    alpha   the scale; default max|tanh(w)|, or 1 where that is 0
    name    the tensor's name; given, NaN and infinity are looked for, on the CPU
    returns codes  same shape, float64, whole numbers in [-delta, delta], delta = 2**(bits-1) - 1; ties to even
            alpha  scalar float64; the quantized weight is alpha * codes / delta
    raises  FormatError  for bits outside 2..8, or (with `name`) if w holds NaN or infinity
    """
    top = delta(bits)
    at_hand = w.device.type == "cpu" and not torch.compiler.is_compiling()  # to look at values costs nothing
    if name is not None and at_hand:
        check_finite(w, name)
    if alpha is None and at_hand and bool(torch.isfinite(w).all()):
        codes, peak = weight_codes(w.detach().double().numpy(), bits)
        return torch.from_numpy(codes).double(), torch.tensor(peak, dtype=torch.float64)
    squashed = torch.tanh(w.detach().double())
    if alpha is None:
        scale = squashed.abs().amax() if squashed.numel() else squashed.new_zeros(())
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    else:
        scale = torch.as_tensor(alpha, dtype=torch.float64, device=w.device)
    return torch.round(torch.clamp(squashed / scale, -1.0, 1.0) * top), scale


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, bits: int, name: str | None) -> Tensor:
        ctx.save_for_backward(w)
        if loops.suits(w) and (values := loops.weight_values(w, delta(bits))) is not None:
            return values
        codes, alpha = quantize_tanh(w, bits, name=name)
        return (codes * (alpha / delta(bits))).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (w,) = ctx.saved_tensors
        return grad * (1.0 - torch.tanh(w) ** 2), None, None


def fake_quantize_weight(w: Tensor, bits: int, *, name: str | None = None) -> Tensor:
    """The quantized weight alpha * codes / delta of Eq. 3, as a real tensor.

    w        any shape, float32
    returns  same shape and dtype; for bits = 32 `w` itself
    gradient dL/dw = dL/dq * (1 - tanh(w)**2). The rounding is the identity and alpha a constant; since
             |tanh(w)| <= alpha everywhere, the clamp never cuts.
    raises   FormatError  for bits other than 2..8 and 32, or (with `name`) if w holds NaN or infinity
    """
    if check_width(bits, "weight bits") == FULL_PRECISION:
        return w
    return cast(Tensor, _Weight.apply(w, bits, name))  # type: ignore[no-untyped-call]


def uniform_codes(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Weight codes of quantizer "mint": rint(w / max|w| * delta), in float64, the same on every machine.

    returns  codes  same shape, float64, whole numbers in [-delta, delta]; ties to even      peak  max|w|, or 1 where 0
    """
    wide = w.detach().double()
    peak = wide.abs().amax() if wide.numel() else wide.new_zeros(())
    peak = torch.where(peak == 0, torch.ones_like(peak), peak)
    return torch.round(wide / peak * delta(bits)), peak


def _lsq(count: int, top: int) -> float:
    """LSQ's factor on the gradient of a scale that `count` values share: 1 / sqrt(count * delta)."""
    return 1.0 / math.sqrt(count * top)


class _SharedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, alpha: Tensor | None, bits: int) -> Tensor:
        codes, peak = uniform_codes(w, bits)
        ctx.top = delta(bits)
        if alpha is None:
            ctx.ratio = None
            return cast(Tensor, (codes * (peak / ctx.top)).to(w.dtype))
        codes = codes.to(w.dtype)
        ctx.ratio = alpha / peak.to(w.dtype)
        ctx.save_for_backward(codes)
        return cast(Tensor, codes * (alpha / ctx.top))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if ctx.ratio is None:
            return grad, None, None
        (codes,) = ctx.saved_tensors
        grad_alpha = (grad * codes).sum() * (_lsq(codes.numel(), ctx.top) / ctx.top)
        return grad * ctx.ratio, grad_alpha, None


def fake_quantize_shared(w: Tensor, bits: int, alpha: Tensor | None = None) -> Tensor:
    """Uniform weights in the scale of the membranes they feed: alpha * code / delta (MINT, arXiv 2305.09850).

    MINT gives the weights and the membrane of a layer one scale, so that U = tau*U + W*S holds for the codes alone and
    no multiplier runs. We depart in two things. Behind a BN layer the size of weights is free, so the codes are
    taken relative to max|w| and stand for multiples of alpha/delta whatever max|w| is. And the BN stays, as an integer
    affine.

    alpha    the shared scale, scalar above 0, trained; None (no membrane follows): max|w|, a constant
    gradient dL/dw = dL/dq * alpha/max|w|
             dL/dalpha = sum(dL/dq * code/delta) / sqrt(count * delta), LSQ's factor (Esser et al., arXiv 1902.08153)
    raises   FormatError  for bits other than 2..8 and 32
    """
    if check_width(bits, "weight bits") == FULL_PRECISION:
        return w
    return cast(Tensor, _SharedWeight.apply(w, alpha, bits))  # type: ignore[no-untyped-call]


# ------------------------------------------------------------------------------------------------- membranes


class _Membrane(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, alpha: Tensor, bits: int) -> Tensor:
        top = delta(bits)
        squashed = torch.tanh(u)
        ratio = squashed / alpha
        codes = torch.round(torch.clamp(ratio, -1.0, 1.0) * top)
        ctx.top = top
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(squashed, alpha, ratio, codes)
        else:
            ctx.save_for_backward(squashed, alpha)
        return codes * (alpha / top)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        squashed, alpha, *rest = ctx.saved_tensors
        grad_u = grad * (1.0 - squashed**2) * (squashed.abs() <= alpha)
        grad_alpha = None
        if rest:
            ratio, codes = rest
            inside = torch.where(squashed.abs() <= alpha, ratio, torch.zeros_like(ratio))
            grad_alpha = (grad * (codes / ctx.top - inside)).sum().reshape(alpha.shape)
        return grad_u, grad_alpha, None


def fake_quantize_membrane(u: Tensor, bits: int, alpha: Tensor | float) -> Tensor:
    """The membrane as its code stands for it: alpha * rint(clamp(tanh(u)/alpha, -1, 1) * delta) / delta (Eq. 3).

    u        any shape, float32
    alpha    scalar above 0; a tensor that requires grad is trained
    returns  same shape and dtype; for bits = 32 `u` itself. Like the paper's, the value approximates tanh(u), not u.
    gradient dL/du = dL/dq * (1 - tanh(u)**2) where |tanh(u)| <= alpha, else 0
             dL/dalpha = sum of dL/dq * (code/delta - tanh(u)/alpha), the second term 0 where |tanh(u)| > alpha
    raises   FormatError  for bits other than 2..8 and 32
    """
    if check_width(bits, "membrane bits") == FULL_PRECISION:
        return u
    scale = torch.as_tensor(alpha, dtype=u.dtype, device=u.device)
    return cast(Tensor, _Membrane.apply(u, scale, bits))  # type: ignore[no-untyped-call]


class _UniformMembrane(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, alpha: Tensor, bits: int) -> Tensor:
        ctx.top = delta(bits)
        ratio = u / alpha
        codes = torch.round(torch.clamp(ratio, -1.0, 1.0) * ctx.top)
        ctx.save_for_backward(ratio, codes)
        return cast(Tensor, codes * (alpha / ctx.top))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        ratio, codes = ctx.saved_tensors
        inside = ratio.abs() <= 1.0
        slope = codes / ctx.top - torch.where(inside, ratio, torch.zeros_like(ratio))
        return grad * inside, (grad * slope).sum() * _lsq(codes.numel(), ctx.top), None


def fake_quantize_uniform(u: Tensor, bits: int, alpha: Tensor) -> Tensor:
    """MINT's membrane: alpha * rint(clamp(u/alpha, -1, 1) * delta) / delta, in the scale that its weights share.

    u        any shape, float32      alpha  scalar above 0
    returns  same shape and dtype; for bits = 32 `u` itself. Unlike Eq. 3's, the value approximates u, not tanh(u)
    gradient dL/du = dL/dq where |u| <= alpha, else 0
             dL/dalpha = sum(dL/dq * (code/delta - u/alpha)) / sqrt(count * delta), u/alpha left out where |u| > alpha
             (LSQ, arXiv 1902.08153, Eqs. 3 and 5)
    raises   FormatError  for bits other than 2..8 and 32
    """
    if check_width(bits, "membrane bits") == FULL_PRECISION:
        return u
    return cast(Tensor, _UniformMembrane.apply(u, alpha, bits))  # type: ignore[no-untyped-call]


def uniform_thresholds(alpha: float, bits: int, grid: Grid) -> npt.NDArray[np.int32]:
    """`formats.requantize_thresholds` for quantizer "mint": q(n) = -delta + #{j : theta_j <= n}.

    returns  (2*delta,) int32, ascending; theta_j is the least n with rint(clip(n * 2**-f / alpha, -1, 1) * delta) >= j
    """
    top = delta(bits)
    n = np.arange(-grid.one - 1, grid.one + 2)  # alpha is at most 1: every code is reached
    codes = np.rint(np.clip(n / grid.one / clamp_alpha(alpha, grid), -1.0, 1.0) * top).astype(np.int64)
    return n[np.searchsorted(codes, np.arange(-top + 1, top + 1), side="left")].astype(np.int32)


# ---------------------------------------------------------------------------------------- batch normalization


def quantize_bn(w: Tensor, bits: int, grid: str = "eq4") -> Tensor:
    """BN's gamma or beta on its 8-bit grid, in float64: what `freeze` folds into the integer affine.

    grid "eq4"      MD-SNN Eq. 4: clamp(rint(tanh(w) * delta) / delta, -+(1 - 1/(delta + 1))). The bound, 127/128 at
                    8 bits, is off the grid j/127 that the rounding uses, so the two outermost levels move inwards.
         "wageubn"  clip(rint(w * 2**(b-1)) / 2**(b-1), -+(1 - 2**(1-b))): one grid for levels and bound, no tanh
    returns  same shape, float64
    raises   FormatError  for bits outside 2..8 or another grid
    """
    top = delta(bits)
    bound = 1.0 - 1.0 / (top + 1)
    wide = w.detach().double()
    if grid == "eq4":
        return torch.clamp(torch.round(torch.tanh(wide) * top) / top, -bound, bound)
    if grid == "wageubn":
        return torch.clamp(torch.round(wide * (top + 1)) / (top + 1), -bound, bound)
    raise FormatError(f"BN grid {grid!r} is not one of {', '.join(BN_GRIDS)}")


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, bits: int, grid: str) -> Tensor:
        ctx.grid = grid
        ctx.save_for_backward(w)
        return quantize_bn(w, bits, grid).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (w,) = ctx.saved_tensors
        return (grad * (1.0 - torch.tanh(w) ** 2) if ctx.grid == "eq4" else grad), None, None


def fake_quantize_bn(w: Tensor, bits: int, grid: str = "eq4") -> Tensor:
    """Quantized gamma or beta of a BN layer (MD-SNN Eq. 4, or WAGEUBN's grid; see `quantize_bn`).

    returns  same shape and dtype; for bits = 32 `w` itself
    gradient eq4:     dL/dw = dL/dq * (1 - tanh(w)**2), also for the two levels that the outer clamp moves
             wageubn: dL/dw = dL/dq. No cut at the bound: gamma starts at 1, which lies beyond it, and would never move
    raises   FormatError  for bits other than 2..8 and 32, or another grid
    """
    if check_width(bits, "BN bits") == FULL_PRECISION:
        return w
    return cast(Tensor, _BatchNorm.apply(w, bits, grid))  # type: ignore[no-untyped-call]


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, steps: float) -> Tensor:
        return torch.round(values * steps) / steps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def round_statistics(values: Tensor, bits: int) -> Tensor:
    """BN's mu or sigma on WAGEUBN's 16-bit grid: rint(v * 2**15) / 2**15, not clipped; 32 bits: `values` itself.

    gradient  the identity
    raises    FormatError  for bits other than 16 and 32
    """
    if bits == FULL_PRECISION:
        return values
    if bits != STATISTICS_BITS:
        raise FormatError(f"statistics_bits = {bits!r} is neither {STATISTICS_BITS} nor {FULL_PRECISION}")
    return cast(Tensor, _Whole.apply(values, 2.0 ** (bits - 1)))  # type: ignore[no-untyped-call]


# ----------------------------------------------------------------------------------------- the residual stream


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, step: float, low: float, high: float) -> Tensor:
        ctx.fused = loops.suits(y)
        if ctx.fused:
            out, inside = loops.round_forward(loops.dense(y.unsqueeze(0)), step, low, high)
            ctx.save_for_backward(inside)
            return out.squeeze(0)
        codes = y.div(step).add_(0.5).floor_()
        rounded = codes.clamp(low, high)
        ctx.save_for_backward(rounded == codes)
        return rounded.mul_(step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        if ctx.fused:
            return loops.round_backward(grad.unsqueeze(0), inside).squeeze(0), None, None, None
        return grad * inside, None, None, None


def round_to_grid(y: Tensor, grid: Grid) -> Tensor:
    """Round half up to the residual grid and saturate at +-clip, as a BN table does.

    gradient  the identity where the rounded value is within +-clip, 0 where it saturates
    """
    limit = float(grid.saturation)
    return cast(Tensor, _Round.apply(y, 1.0 / grid.one, -limit, limit))  # type: ignore[no-untyped-call]


def round_to_codes(x: Tensor, bits: int, step: float) -> Tensor:
    """Round half up to multiples of `step` and saturate at +-delta(bits) of them, as a requantization does.

    returns   same shape; for bits = 32 `x` itself
    gradient  the identity inside the range, 0 where it saturates
    """
    if check_width(bits, "shortcut bits") == FULL_PRECISION:
        return x
    limit = float(delta(bits))
    return cast(Tensor, _Round.apply(x, step, -limit, limit))  # type: ignore[no-untyped-call]
