"""The leaky integrate-and-fire neuron as a pure step: state in, state out (MD-SNN Eqs. 1 and 2).

`lif_step` is what training differentiates; `lif_step_codes` is the same step on integers, what a frozen network runs.
Their definition in NumPy is mdsnn.kernels.reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mdsnn.kernels.errors import ConfigError

from . import loops

RESETS = ("hard", "soft")
QUANTIZE = ("post_reset", "pre_fire")


def check_neuron(reset: str, quantize: str) -> None:
    """Raise ConfigError unless `reset` and `quantize` are known and go together."""
    if reset not in RESETS:
        raise ConfigError(f"reset {reset!r} is not one of {', '.join(RESETS)}")
    if quantize not in QUANTIZE:
        raise ConfigError(f"quantize {quantize!r} is not one of {', '.join(QUANTIZE)}")
    if quantize == "pre_fire" and reset == "soft":
        raise ConfigError("quantize 'pre_fire' goes with a hard reset only; use post_reset, or reset 'hard'")


def _identity(u: Tensor) -> Tensor:
    return u


def lif_step(
    x: Tensor,
    u: Tensor,
    *,
    tau: float,
    v_th: float,
    reset: str,
    spike: Callable[[Tensor], Tensor],
    requantize: Callable[[Tensor], Tensor] = _identity,
    quantize: str = "post_reset",
    detach_reset: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One timestep of a layer of LIF neurons.

    x           input current, [N, C, H, W]          u   state left by the step before, same shape (0 at t = 0)
    spike       1 where its argument is above 0; a Surrogate gives it a gradient
    requantize  what storing the state does to it; the identity in full precision
    quantize    "post_reset": the state is requantized after the reset, the spike sees h itself
                "pre_fire":   h is requantized first, spike and state both come from that (hard reset only)
    detach_reset  True: no gradient through the reset's use of the spike
    returns     s  spikes 0/1      u_next  the stored state      h = tau*u + x  the membrane before the spike
    """
    h = tau * u + x
    if quantize == "pre_fire":
        seen = requantize(h)
        s = spike(seen - v_th)
        return s, seen * (1.0 - (s.detach() if detach_reset else s)), h
    s = spike(h - v_th)
    gate = s.detach() if detach_reset else s
    u_next = h * (1.0 - gate) if reset == "hard" else h - v_th * gate
    return s, requantize(u_next), h


class _Lif(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        neuron: loops.Neuron,
        steps: int,
        tap: bool,
        scale: Callable[[float], float] | None,
        peaks: list[float],
    ) -> tuple[Tensor, Tensor | None]:
        learns = ctx.needs_input_grad[0]
        x = loops.dense(x)
        s, h, squashed, ctx.alphas = loops.lif_forward(x, neuron, steps, learns or tap, scale, peaks)
        if learns:
            ctx.save_for_backward(h, *(() if squashed is None else (squashed,)))
        ctx.neuron, ctx.steps_in = neuron, x.shape[0]
        ctx.set_materialize_grads(False)
        return s, h if tap else None

    @staticmethod
    def backward(ctx: Any, gs: Tensor | None, gh: Tensor | None) -> tuple[Tensor | None, None, None, None, None, None]:
        h, *rest = ctx.saved_tensors
        if gs is None:
            gs = torch.zeros_like(h)
        gx = loops.lif_backward(ctx.neuron, ctx.steps_in, h, rest[0] if rest else None, ctx.alphas, gs, gh)
        return gx, None, None, None, None, None


def lif(
    x: Tensor,
    neuron: loops.Neuron,
    steps: int,
    *,
    tap: bool = False,
    scale: Callable[[float], float] | None = None,
) -> tuple[Tensor, Tensor | None, list[float]]:
    """`steps` steps of `lif_step` from a state of 0, forward and backward each one pass over memory (mdsnn.loops).

    x        [T', N, C, H, W] float32 on the CPU, T' = steps or 1 (the same input at every step)
    tap      whether h is returned
    scale    the membrane quantizer's alpha for a step whose largest |u| is its argument; None at full precision
    returns  spikes [T, N, C, H, W]; h, the same shape, or None; the largest |u| of every step (empty without `scale`)
    Values and gradients are those of `lif_step` bit for bit, the membrane quantized after the reset.
    """
    peaks: list[float] = []
    s, h = cast(
        "tuple[Tensor, Tensor | None]",
        _Lif.apply(x, neuron, steps, tap, scale, peaks),  # type: ignore[no-untyped-call]
    )
    return s, h, peaks


@dataclass(frozen=True, eq=False)
class LifCodes:
    """The integers of a frozen LIF layer; fields as in the `Lif` node of mdsnn.kernels.network.

    alpha       the real scale behind the tables, kept for information
    decode      (2*delta + 1,) int32      thresholds  (2*delta,) int32, ascending
    v_th, v_soft, q_th   integers; v_soft is 0 with a hard reset, q_th is 0 with post_reset
    """

    bits: int
    alpha: float
    decode: Tensor
    thresholds: Tensor
    v_th: int
    reset: str
    v_soft: int
    quantize: str
    q_th: int

    @property
    def delta(self) -> int:
        return int(self.thresholds.numel()) // 2

    def requantize(self, u: Tensor) -> Tensor:
        """q = -delta + #{j : threshold_j <= u}, int32."""
        return torch.bucketize(u, self.thresholds, out_int32=True, right=True) - self.delta


def lif_step_codes(x: Tensor, q: Tensor, codes: LifCodes) -> tuple[Tensor, Tensor, Tensor]:
    """One timestep on integers: x [N, C, H, W] int32 on the residual grid, q the code of the state, int32.

    returns  s  spikes, uint8      q_next  the stored code, int32      h = x + decode[q + delta], int32
    """
    h = x + codes.decode[q + codes.delta]
    if codes.quantize == "pre_fire":
        seen = codes.requantize(h)
        fired = seen > codes.q_th
        return fired.to(torch.uint8), seen.masked_fill(fired, 0), h
    fired = h > codes.v_th
    u = h.masked_fill(fired, 0) if codes.reset == "hard" else h - codes.v_soft * fired.to(h.dtype)
    return fired.to(torch.uint8), codes.requantize(u), h
