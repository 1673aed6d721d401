"""Membrane-aware distillation: MD-SNN Eqs. 5-9 (arXiv 2512.04443).

A full-precision teacher guides a quantized student by its logits and by the membranes of a few of its neurons, the
taps. What a tap reads is h, the membrane after its input and before the reset, of the same LIF in both networks
(`mdsnn.layers.taps`). Nothing here knows a model: the functions take tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional

from mdsnn.kernels.errors import ConfigError, TrainingError

Direction = Literal["forward", "literal"]
Kind = Literal["kl", "mse"]
Loss = Literal["CLK", "CLM", "CL"]

MEMBRANE: dict[str, Kind | None] = {"CLK": "kl", "CLM": "mse", "CL": None}
"""What each loss name of the reference compares in membranes; all three have cross-entropy and logits."""


def _choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{what} = {value!r} is none of {', '.join(choices)}")


def _temperature(tau: float | tuple[float, float]) -> tuple[float, float]:
    tau_a, tau_b = tau if isinstance(tau, tuple) else (tau, tau)
    if not all(math.isfinite(value) and value > 0.0 for value in (tau_a, tau_b)):
        raise ConfigError(f"temperature = {tau!r} must be finite and above 0")
    return tau_a, tau_b


def kl_distance(
    teacher: Tensor, student: Tensor, tau: float | tuple[float, float] = 4.0, direction: Direction = "forward"
) -> Tensor:
    """The distance D of MD-SNN Eq. 6 between two batches, softened by temperature.

    teacher, student  [N, ...] float, equal shapes; the softmax runs over all axes but N (C*H*W of a sample)
    tau               the temperature of both, or (tau_a, tau_b) for teacher and student
    direction         "forward"  KL(teacher || student), the usual direction of distillation
                      "literal"  the order in which Eq. 6 prints its arguments, read as PyTorch's kl_div(input, target):
                                 the log-softmax is the teacher's and the target the student's, KL(student || teacher)
    returns           scalar in nats, tau_a * tau_b * KL, mean over N
    raises            ConfigError for a direction or temperature that is none; TrainingError for unequal shapes
    We depart from the source in the default direction: as printed, Eq. 6 weighs each log-ratio by the student's own
    probability, so a student may ignore whatever it already holds improbable.
    """
    _choice("direction", direction, get_args(Direction))
    tau_a, tau_b = _temperature(tau)
    if teacher.shape != student.shape:
        raise TrainingError(f"distillation compares equal shapes: teacher {_s(teacher)}, student {_s(student)}")
    log_a = functional.log_softmax(teacher.flatten(1) / tau_a, dim=1)
    log_b = functional.log_softmax(student.flatten(1) / tau_b, dim=1)
    model, target = (log_b, log_a) if direction == "forward" else (log_a, log_b)
    return tau_a * tau_b * functional.kl_div(model, target, reduction="batchmean", log_target=True)


def membrane_loss(
    teacher_h: Sequence[Tensor],
    student_h: Sequence[Tensor],
    kind: Kind = "kl",
    *,
    tau: float | tuple[float, float] = 4.0,
    direction: Direction = "forward",
) -> Tensor:
    """L_mem of MD-SNN Eq. 5: the distance of two networks' membranes, summed over taps and timesteps.

    teacher_h  one [T, N, ...] tensor a tap; no gradient flows into it
    student_h  one [t, N, ...] tensor a tap, t <= T. Step j of the student is held against step j of the teacher, so one
               teacher serves students of every shorter time window (section IV-C, the versatile teacher)
    kind       "kl" Eq. 6;  "mse" mean square over all axes but T, the baseline of Table IV
    returns    scalar
    raises     TrainingError  if the taps differ in number or shape, or the student takes more steps than its teacher
    """
    _choice("membrane loss", kind, get_args(Kind))
    if not student_h or len(teacher_h) != len(student_h):
        raise TrainingError(
            f"{len(teacher_h)} teacher taps against {len(student_h)} student taps; they must be equal, not 0"
        )
    total = student_h[0].new_zeros(())
    for tap, (whole, h) in enumerate(zip(teacher_h, student_h, strict=True)):
        if h.shape[0] > whole.shape[0]:
            raise TrainingError(
                f"tap {tap}: a student of {h.shape[0]} timesteps cannot learn from a teacher of {whole.shape[0]}."
                " Train the teacher with as many, or shorten the student's time window"
            )
        steps = h.shape[0]
        target = whole[:steps].detach()
        if target.shape != h.shape:
            raise TrainingError(f"tap {tap}: teacher {_s(target)}, student {_s(h)}; taps must read the same layer")
        # Steps are folded into the batch: the mean over [t*N], times t, is the sum over steps of the mean over N.
        if kind == "kl":
            total = total + steps * kl_distance(target.flatten(0, 1), h.flatten(0, 1), tau, direction)
        else:
            total = total + steps * functional.mse_loss(h, target)
    return total


def logit_loss(
    teacher_z: Tensor,
    student_z: Tensor,
    *,
    tau: float | tuple[float, float] = 4.0,
    direction: Direction = "forward",
) -> Tensor:
    """L_logit of MD-SNN Eq. 9: Eq. 6 between the logits [N, classes]; no gradient flows into the teacher's."""
    return kl_distance(teacher_z.detach(), student_z, tau, direction)


@dataclass(frozen=True)
class Losses:
    """The parts of Eq. 7, each a scalar tensor; `logit` and `membrane` are 0 where they were not asked for."""

    total: Tensor
    cross_entropy: Tensor
    logit: Tensor
    membrane: Tensor


def total_loss(
    name: Loss,
    student_z: Tensor,
    labels: Tensor,
    teacher_z: Tensor,
    teacher_h: Sequence[Tensor] = (),
    student_h: Sequence[Tensor] = (),
    *,
    weights: tuple[float, float, float] = (1.0, 3.0, 1.0),
    tau: float | tuple[float, float] = 4.0,
    logit_tau: float | tuple[float, float] | None = None,
    direction: Direction = "forward",
    label_smoothing: float = 0.0,
) -> Losses:
    """L of MD-SNN Eq. 7: weights[0] * L_CE + weights[1] * L_logit + weights[2] * L_mem.

    name       "CLK" cross-entropy + logits + membrane KL;  "CLM" the same with membrane MSE;  "CL" no membranes
    student_z, teacher_z  [N, classes] logits      labels  [N] int64
    weights    (alpha, beta, gamma) of Eq. 7; 1, 3, 1 in section V
    tau        temperature of the membranes (and of the logits, unless logit_tau says otherwise)
    raises     ConfigError for an unknown name; TrainingError where tensors do not fit each other
    """
    _choice("loss", name, tuple(MEMBRANE))
    kind = MEMBRANE[name]
    cross_entropy = functional.cross_entropy(student_z, labels, label_smoothing=label_smoothing)
    logit = logit_loss(teacher_z, student_z, tau=tau if logit_tau is None else logit_tau, direction=direction)
    if kind is None:
        membrane = student_z.new_zeros(())
    else:
        membrane = membrane_loss(teacher_h, student_h, kind, tau=tau, direction=direction)
    alpha, beta, gamma = weights
    return Losses(alpha * cross_entropy + beta * logit + gamma * membrane, cross_entropy, logit, membrane)


def _s(tensor: Tensor) -> str:
    return str(list(tensor.shape))
