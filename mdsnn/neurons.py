"""The leaky integrate-and-fire neuron as a pure step: state in, state out (MD-SNN Eqs. 1 and 2).

`lif_step` is what training differentiates; `lif_step_codes` is the same step on integers, what a frozen network runs.
Their definition in NumPy is mdsnn.kernels.reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mdsnn.kernels.errors import ConfigError

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
