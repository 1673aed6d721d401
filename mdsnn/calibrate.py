"""Calibration: a full-precision network becomes a quantized student without training.

The student runs on a few training images beside its teacher, and three things are chosen by what is seen:

    codes        each output channel's weights are clipped where their squared rounding error is least. Eq. 3 has one
                 scale a tensor; but a BN layer rescales every channel, so the channels' own scales move into it
    statistics   BN's mu and sigma are set, layer by layer and with all layers before it quantized, so that each
                 channel's output has the mean and deviation it has in the teacher. They are real numbers that vanish
                 in the frozen table, and make up for gamma and beta on their grid as well
    alpha        of each membrane: the one whose squared error on the teacher's membranes is least. Far below 0 a
                 membrane will not fire soon, whatever it is; below -2*v_th no error is counted

Eq. 3 rounds tanh(w), but a teacher's w is what its network multiplies by: the student's parameter is atanh(alpha *
code/delta), so that its quantized weight is alpha * code/delta. What comes out is a live student like any other:
training may go on from it, and `mdsnn.freeze.freeze` makes it integer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mdsnn.kernels.errors import CheckpointError, ConfigError, InputError
from mdsnn.kernels.formats import check_bits, delta

from . import data as datasets
from .layers import LIF, QuantBatchNorm2d, QuantConv2d, QuantLinear, Readout, fold, trace, unfold
from .models import build
from .quantizers import FULL_PRECISION, quantize_bn, round_to_grid

BITS = {"weight_bits": 4, "membrane_bits": 4, "bn_bits": 8, "stem_bits": 8, "shortcut_bits": 8}
"""Widths of a student, and their defaults."""
_CLIPS = np.linspace(1.0, 0.3, 36)  # of the largest magnitude
_ALPHAS = np.linspace(1.0, 0.02, 99)
_MEMBRANES = np.linspace(-8.0, 8.0, 4097)  # edges of the bins that membranes are counted in
_LARGEST = 4.0  # of a stored weight: tanh is still told from 1
_STILL = 1e-6  # a deviation below which a channel is constant
_SAMPLES = 1 << 20  # membranes of a layer that are counted in a batch, at most

Pixels = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]


def convert(teacher: nn.Module, **bits: int) -> nn.Module:
    """A live student of `teacher`'s shape and parameters, quantized as they stand: what calibration starts from.

    teacher  a network of mdsnn.models at full precision
    bits     weight_bits, membrane_bits, bn_bits, stem_bits, shortcut_bits, each 2..8; see BITS
    returns  in evaluation mode, on the CPU; every alpha is 1
    raises   ConfigError, FormatError  for other bits
             CheckpointError  if the teacher is none of mdsnn.models, or quantized already
    """
    unknown = sorted(set(bits) - set(BITS))
    if unknown:
        raise ConfigError(f"unknown bits {', '.join(unknown)}; known: {', '.join(BITS)}")
    widths = {name: check_bits(bits.get(name, usual), name) for name, usual in BITS.items()}
    config = getattr(teacher, "config", None)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{type(teacher).__name__}: has no `config`, so that no student of its shape can be built"
        )
    held = [f"{name} = {config[name]}" for name in ("weight_bits", "membrane_bits") if config[name] != FULL_PRECISION]
    if held:
        raise CheckpointError(f"the network is quantized already ({', '.join(held)}); calibrate a full-precision one")
    plain = {name: value for name, value in config.items() if name not in ("quantizer", "norm")}
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn and then overwritten
        student = build({**plain, **widths}).eval()
    state = student.state_dict()
    state |= {name: value.cpu() for name, value in teacher.state_dict().items() if name in state}
    student.load_state_dict(state)
    return student


def calibrate(
    teacher: nn.Module, pixels: Pixels, *, batch_size: int = 64, progress: Progress | None = None, **bits: int
) -> nn.Module:
    """The student of `convert`, calibrated on `pixels`.

    pixels      uint8 [N, C, H, W] of the teacher's task, or [T, N, C, H, W] for events; no labels are needed
    batch_size  images at once, at most; while they are seen, a BN layer's statistics are those of so many
    progress    called with (batches done, batches in all)
    returns     a live student in evaluation mode; the teacher is not changed
    raises      as `convert`; InputError  for pixels that do not fit; ConfigError  if a layer without BN has weights
                that Eq. 3 cannot hold
    """
    student = convert(teacher, **bits)
    coding: Literal["image", "events"] = "events" if student.config["coding"] == "events" else "image"  # type: ignore
    if pixels.dtype != np.uint8 or pixels.ndim != (4 if coding == "image" else 5) or not pixels.size:
        raise InputError(
            f"pixels to calibrate on are {pixels.dtype} {list(pixels.shape)}; uint8 {coding} were expected"
        )
    count = pixels.shape[0 if coding == "image" else 1]
    parts = np.array_split(np.arange(count), -(-count // batch_size))
    batches = [torch.from_numpy(np.ascontiguousarray(datasets.take(pixels, part, coding))) for part in parts]
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, 2 * len(batches))

    reference = copy.deepcopy(teacher).cpu().eval()
    with torch.no_grad():
        _store_codes(student)
        with _watched(reference) as seen:
            for batch in batches:
                reference(batch)
                advance()
        for name, lif in student.named_modules():
            if isinstance(lif, LIF):
                above = lif.v_th if lif.quantize == "pre_fire" else 0.0
                lif.alpha.fill_(best_alpha(seen.membranes[name], lif.bits, floor=-2.0 * lif.v_th, above=above))
                lif.alpha_batches.fill_(1)
        with _matched(student, seen.outputs) as inputs:
            for batch in batches:
                student(batch)
                advance()
        for name, bn in student.named_modules():
            if isinstance(bn, QuantBatchNorm2d):
                _set_statistics(bn, inputs[name], seen.outputs[name])
    return student


# ---------------------------------------------------------------------------------------------------------- weights


def best_codes(weight: npt.NDArray[np.float64], bits: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Codes of the rows of a matrix and the value of each row's largest code, with the least squared error a row.

    weight   (rows, columns)
    returns  codes (rows, columns), whole numbers in -delta..delta     peak (rows,): weight is about peak*code/delta
    """
    top = delta(bits)
    largest = np.abs(weight).max(axis=1)
    largest[largest == 0.0] = 1.0
    best = np.full(len(weight), np.inf)
    codes, peaks = np.zeros_like(weight), largest.copy()
    for share in _CLIPS:
        peak = largest * share
        tried = np.rint(np.clip(weight / peak[:, None], -1.0, 1.0) * top)
        error = ((tried * (peak / top)[:, None] - weight) ** 2).sum(axis=1)
        better = error < best
        best[better], peaks[better], codes[better] = error[better], peak[better], tried[better]
    return codes, peaks


def _store_codes(student: nn.Module) -> None:
    """Put atanh(alpha*code/delta) in the place of every weight."""
    for name, layer, normalized in _weighted(student):
        weight = layer.weight.detach().double().numpy()
        if not weight.any():
            continue
        top = delta(layer.weight_bits)
        rows = weight.reshape(len(weight), -1) if normalized else weight.reshape(1, -1)
        codes, peaks = best_codes(rows, layer.weight_bits)
        alpha = float(np.tanh(min(np.abs(weight).max(), _LARGEST)))
        if not normalized:
            peak = float(peaks[0])
            if isinstance(layer, Readout):  # logits may carry a factor
                alpha = min(peak, alpha)
                layer.bias.mul_(alpha / peak)
            elif peak >= 1.0:
                raise ConfigError(
                    f"layer '{name}': its weights reach {peak:.3g}, but no BN follows, and Eq. 3 holds weights below 1 "
                    "only; put a BN layer behind it, or train the student"
                )
            else:
                alpha = peak
        layer.weight.copy_(torch.from_numpy(np.arctanh(codes * (alpha / top)).reshape(weight.shape)))


def _weighted(model: nn.Module) -> Iterator[tuple[str, QuantConv2d | QuantLinear | Readout, bool]]:
    """Every layer with weights: its name, itself, and whether a BN layer alone reads it."""
    modules = dict(model.named_modules())
    for node in trace(model).nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, QuantConv2d | QuantLinear | Readout):
            readers = [modules.get(str(user.target)) for user in node.users]
            yield str(node.target), layer, all(isinstance(reader, QuantBatchNorm2d) for reader in readers)


# --------------------------------------------------------------------------------------------------- what is seen


class Moments:
    """Mean and deviation of each channel of values [T', N, C, H, W], over all calls of `add`."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Any = 0.0
        self.squares: Any = 0.0

    def add(self, x: Tensor) -> None:
        """Count the values of one batch."""
        wide = x.double()
        self.count += x.numel() // x.shape[2]
        self.sums = self.sums + wide.sum((0, 1, 3, 4))
        self.squares = self.squares + (wide * wide).sum((0, 1, 3, 4))

    @property
    def mean(self) -> Tensor:
        """(C,) float64."""
        return torch.as_tensor(self.sums) / self.count

    @property
    def deviation(self) -> Tensor:
        """(C,) float64, at least 0."""
        return (torch.as_tensor(self.squares) / self.count - self.mean**2).clamp(min=0.0).sqrt()


@dataclass(frozen=True)
class Seen:
    """Of a network that ran: how many membranes each LIF stored in each bin, and the outputs of each BN layer."""

    membranes: dict[str, npt.NDArray[np.float64]]
    outputs: dict[str, Moments]


@contextmanager
def _watched(model: nn.Module) -> Iterator[Seen]:
    """While open, count the membranes that a model's LIFs store and the outputs of its BN layers."""
    seen = Seen({}, {})

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, _inputs: Any, y: Tensor) -> None:
            if isinstance(module, LIF):
                assert module.last_h is not None  # tap is set
                u = module.last_h.numpy().reshape(-1)
                u, module.last_h = u[:: u.size // _SAMPLES + 1], None
                seen.membranes[name] += np.histogram(u.clip(_MEMBRANES[0], _MEMBRANES[-1]), _MEMBRANES)[0]
            else:
                seen.outputs[name].add(y)

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, LIF):
            module.tap = "state"
            seen.membranes[name] = np.zeros(len(_MEMBRANES) - 1)
        elif isinstance(module, QuantBatchNorm2d):
            seen.outputs[name] = Moments()
        else:
            continue
        handles.append(module.register_forward_hook(watch(name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------- membranes and BN layers


def best_alpha(counts: npt.NDArray[np.float64], bits: int, *, floor: float = -np.inf, above: float = 0.0) -> float:
    """The alpha, at most 1, whose membrane quantizer has the least squared error.

    counts  how many membranes lay in each of 4,096 bins of equal width from -8 to 8
    floor   membranes and what is stored for them count as this where they are below it
    above   alphas up to here never fire (quantize = "pre_fire")
    """
    top = delta(bits)
    used = np.flatnonzero(counts)
    u, weight = ((_MEMBRANES[1:] + _MEMBRANES[:-1]) / 2)[used], counts[used]
    squashed, wanted = np.tanh(u), np.maximum(u, floor)

    def error(alpha: float) -> float:
        stored = np.rint(np.clip(squashed / alpha, -1.0, 1.0) * top) * (alpha / top)
        return float((weight * (np.maximum(stored, floor) - wanted) ** 2).sum())

    return float(min((alpha for alpha in _ALPHAS if alpha > above or alpha == 1.0), key=error))


def _affine(x: Moments, target: Moments, sign: Tensor) -> tuple[Tensor, Tensor]:
    """(slope, offset) (C,) that give x the target's mean and deviation; a channel that is constant keeps its mean."""
    alive = (x.deviation > _STILL) & (target.deviation > _STILL)
    slope = torch.where(alive, target.deviation / x.deviation.clamp(min=_STILL), _STILL) * sign
    return slope, target.mean - slope * x.mean


def _gamma(bn: QuantBatchNorm2d) -> Tensor:
    """gamma on its grid, float64; where that is 0, the parameter moves to the first level."""
    if bool((quantize_bn(bn.weight, bn.bits, bn.grid) == 0).any()):
        small = quantize_bn(bn.weight, bn.bits, bn.grid) == 0
        sign = torch.where(bn.weight < 0, -1.0, 1.0)
        bn.weight.copy_(torch.where(small, sign / delta(bn.bits), bn.weight))
    return quantize_bn(bn.weight, bn.bits, bn.grid)


@contextmanager
def _matched(student: nn.Module, targets: dict[str, Moments]) -> Iterator[dict[str, Moments]]:
    """While open, every BN layer gives its output the teacher's moments, batch by batch; yields its inputs' moments."""
    inputs: dict[str, Moments] = {}
    handles = []
    for name, module in student.named_modules():
        if isinstance(module, QuantBatchNorm2d):
            inputs[name] = Moments()
            sign = _gamma(module).sign()

            def hook(
                bn: QuantBatchNorm2d, given: tuple[Tensor], _y: Tensor, name: str = name, sign: Tensor = sign
            ) -> Tensor:
                batch = Moments()
                batch.add(given[0])
                inputs[name].add(given[0])
                slope, offset = (v.float()[:, None, None] for v in _affine(batch, targets[name], sign))
                y = fold(given[0]) * slope + offset
                return unfold(y if bn.output_grid is None else round_to_grid(y, bn.output_grid), given[0])

            handles.append(module.register_forward_hook(hook))
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _set_statistics(bn: QuantBatchNorm2d, x: Moments, target: Moments) -> None:
    """mu and sigma with which gamma*(x - mu)/sigma + beta, gamma and beta on their grid, has the target's moments."""
    gamma, beta = _gamma(bn), quantize_bn(bn.bias, bn.bits, bn.grid)
    slope, offset = _affine(x, target, gamma.sign())
    bn.running_mean.copy_((beta - offset) / slope)
    bn.running_var.copy_(((gamma / slope) ** 2 - bn.eps).clamp(min=0.0))
