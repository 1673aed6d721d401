"""The layers of a quantized spiking network.

Every layer takes and returns values [T', N, C, H, W]. T' is the number of timesteps, or 1 for a value that is the same
at every step, such as all that comes before the first LIF in direct coding: it is computed once a sample, and adding
it to a value of T steps broadcasts.

A layer lives twice. While training it is *live*: real numbers, quantized by the straight-through functions of
mdsnn.quantizers, or not at all where its bits are 32 (a teacher is the same network with 32 everywhere).
`mdsnn.freeze.freeze` gives it integer `constants`; from then on the same module computes on integers, exactly, on the
CPU, and its weights are not looked at again. Section numbers below are those of docs/arithmetic.md.

    kind of value       live                    frozen
    codes               code * step             int8, int32       images, event counts, shortcut codes
    spikes              0.0, 1.0                uint8
    counts              mean of spikes          int32 sums        pools of spikes; the divisor moves into the next layer
    accumulators        weight * input          int32
    stream              real, on the grid       int32             BN's output and sums of it

A network of your own is any module whose forward composes these layers and `+`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from mdsnn.kernels.errors import ConfigError, InputError, LoweringError, MdsnnError
from mdsnn.kernels.formats import (
    EVENT_RANGE,
    FLOAT32_EXACT,
    IMAGE_FRAC_BITS,
    SHORTCUT_RANGE_LOG2,
    Grid,
    delta,
    event_table,
    image_table,
)

from . import loops
from . import surrogate as surrogates
from .neurons import LifCodes, check_neuron, lif, lif_step, lif_step_codes
from .quantizers import (
    ALPHA_FLOOR,
    BN_GRIDS,
    FULL_PRECISION,
    QUANTIZERS,
    STATISTICS_BITS,
    check_width,
    fake_quantize_bn,
    fake_quantize_membrane,
    fake_quantize_shared,
    fake_quantize_uniform,
    fake_quantize_weight,
    round_statistics,
    round_to_codes,
    round_to_grid,
)
from .surrogate import Rectangle, Triangle

ALPHAS = ("ema", "dynamic", "learned")


def check_quantizer(quantizer: str) -> str:
    """Return a quantizer's name; raises ConfigError if there is none of that name."""
    if quantizer not in QUANTIZERS:
        raise ConfigError(f"quantizer {quantizer!r} is not one of {', '.join(QUANTIZERS)}")
    return quantizer


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return int(first), int(second)


def fold(x: Tensor) -> Tensor:
    """[T', N, ...] to [T'*N, ...]: what has no state runs on all steps at once."""
    return x.flatten(0, 1)


def unfold(x: Tensor, like: Tensor) -> Tensor:
    """[T'*N, ...] back to [T', N, ...], with T' and N of `like`."""
    return x.reshape(like.shape[0], like.shape[1], *x.shape[1:])


class Layer(nn.Module):
    """Base of every layer here: `live` computes on real values, `integer` on the constants that `freeze` put in."""

    constants: Any = None

    @property
    def is_frozen(self) -> bool:
        return self.constants is not None

    def forward(self, x: Tensor) -> Tensor:
        return self.live(x) if self.constants is None else self.integer(x)

    def live(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def integer(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Block(nn.Module):
    """Marks a module as one block: `taps(model, "block")` reads what comes out of it.

    recompute  True: while training, its inner values are not kept for the backward pass but computed a second time
    """

    recompute = False

    def __call__(self, x: Tensor) -> Any:
        run = super().__call__
        if not (self.recompute and self.training and torch.is_grad_enabled()) or isinstance(x, fx.Proxy):
            return run(x)
        first, second = _Twice(again=False, seen={}), _Twice(again=True, seen={})
        second.seen = first.seen
        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (first, second))


class _Twice:
    """A block's forward while it is recorded (`again` False) or repeated in the backward pass (True).

    seen   what each layer quantized by the first time: whether its scale was starting, and the scale
    The second time no layer may move its statistics again, nor take those that the first time left behind.
    """

    def __init__(self, again: bool, seen: dict[nn.Module, tuple[bool, Tensor]]) -> None:
        self.again, self.seen = again, seen

    def __enter__(self) -> None:
        self._token = _twice.set(self)

    def __exit__(self, *_: object) -> None:
        _twice.reset(self._token)


_twice: ContextVar[_Twice | None] = ContextVar("mdsnn_twice", default=None)


def _recorded() -> _Twice | None:
    """The block's forward that is going on, if it is recomputed; none under torch.compile, which keeps what it will."""
    return None if torch.compiler.is_compiling() else _twice.get()


def _repeats() -> bool:
    twice = _recorded()
    return twice is not None and twice.again


class Group(nn.Sequential):
    """Marks a sequence of blocks as one group: `taps(model, "group")` reads what comes out of it."""


# ----------------------------------------------------------------------------------------------------- input


@dataclass(frozen=True, eq=False)
class InputCodes:
    """A frozen input: the shape it takes behind N, (C, H, W) for images or (T, C, H, W) for events."""

    shape: tuple[int, ...]


class _Input(Layer):
    """A table from uint8 to codes, a row per channel."""

    table: Tensor
    axes: str
    constants: InputCodes | None = None

    def codes(self, x: Tensor) -> Tensor:
        channels = self.table.shape[0]
        if x.dtype != torch.uint8 or x.ndim != len(self.axes) or x.shape[-3] != channels:
            raise InputError(
                f"the input is {x.dtype} {tuple(x.shape)}, where uint8 [{', '.join(self.axes)}] with C = {channels} "
                "is needed"
            )
        return self.table[torch.arange(channels, device=x.device)[:, None, None], x.long()]

    def integer(self, x: Tensor) -> Tensor:
        assert self.constants is not None  # forward chose
        codes = self.codes(x)
        found = tuple(length for axis, length in zip(self.axes, x.shape, strict=True) if axis != "N")
        if found != self.constants.shape:
            axes = ", ".join(axis for axis in self.axes if axis != "N")
            raise InputError(f"the input has [{axes}] = {list(found)}, the network {list(self.constants.shape)}")
        return codes if codes.ndim == 5 else codes.unsqueeze(0)


class PixelInput(_Input):
    """Direct coding (section 2, Input): pixels to codes on a grid of 2**-5, the same at every step.

    mean, std   one value a channel, of pixels in 0..1
    takes       uint8 [N, C, H, W]      returns  [1, N, C, H, W] in -4..3.97 (frozen: int8 codes)
    Augment before it, on uint8. A teacher reads the same codes.
    """

    axes = "NCHW"

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = tuple(float(m) for m in mean), tuple(float(s) for s in std)
        self.register_buffer("table", torch.from_numpy(image_table(self.mean, self.std)), persistent=False)

    def live(self, x: Tensor) -> Tensor:
        return self.codes(x).float().mul(2.0**-IMAGE_FRAC_BITS).unsqueeze(0)

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"


class EventInput(_Input):
    """Event frames: counts, saturating at 127, one frame a step.

    takes   uint8 [T, N, C, H, W]      returns  the same shape, 0..127 (frozen: int8 codes)
    """

    axes = "TNCHW"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("table", torch.from_numpy(event_table(channels)), persistent=False)

    def live(self, x: Tensor) -> Tensor:
        return self.codes(x).float()

    def extra_repr(self) -> str:
        return f"{self.channels}, saturates at {EVENT_RANGE[1]}"


# ------------------------------------------------------------------------------------- weights: conv, linear


@dataclass(frozen=True, eq=False)
class SumCodes:
    """A frozen convolution or linear layer.

    weight     (C_out, ...) int8      alpha  real weight = alpha * weight / delta(bits)
    low, high  (C_out,) int64, what an accumulator can reach        step  real value of one input code
    affine     the BN table, where no BN layer follows this one
    """

    weight: Tensor
    bits: int
    alpha: float
    low: Tensor
    high: Tensor
    step: float
    affine: AffineCodes | None

    @property
    def reach(self) -> int:
        return max(-int(self.low.min()), int(self.high.max()))

    def carrier(self) -> torch.dtype:
        """float32 where sums stay below 2**24, so that every order of summation is exact; else float64."""
        full = torch.get_float32_matmul_precision() == "highest"
        return torch.float32 if full and self.reach < FLOAT32_EXACT else torch.float64


@contextlib.contextmanager
def _plain_arithmetic() -> Iterator[None]:
    """No Winograd (NNPACK) and no bfloat16 (autocast) in a sum that has to be exact."""
    with torch.backends.nnpack.flags(enabled=False), torch.autocast("cpu", enabled=False):
        yield


class _Weighted(Layer):
    """What QuantConv2d and QuantLinear share: parameters, their quantizer, the frozen sums."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    constants: SumCodes | None = None

    def __init__(
        self,
        shape: tuple[int, ...],
        bias: bool,
        weight_bits: int,
        output_grid: Grid | None,
        generator: torch.Generator | None,
        quantizer: str,
    ) -> None:
        super().__init__()
        self.weight_bits = check_width(weight_bits, "weight_bits")
        self.output_grid, self.quantizer = output_grid, check_quantizer(quantizer)
        self.alpha: nn.Parameter | None = None
        self.weight = nn.Parameter(torch.empty(shape))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None

    def quantized_weight(self) -> Tensor:
        """The weight the live forward multiplies by: alpha * codes / delta, or the weight itself at 32 bits."""
        if self.quantizer == "tanh":
            return fake_quantize_weight(self.weight, self.weight_bits)
        if self.alpha is None:
            return fake_quantize_shared(self.weight, self.weight_bits)
        scale, twice = self.alpha.clone(), _recorded()  # a copy: the LIF that starts it comes later
        if twice is not None and twice.again:
            scale = twice.seen[self][1].clone()
        elif twice is not None:
            twice.seen[self] = False, scale.detach().requires_grad_()
        return fake_quantize_shared(self.weight, self.weight_bits, scale.clamp(ALPHA_FLOOR, 1.0))

    def sums(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def live(self, x: Tensor) -> Tensor:
        y = unfold(self.sums(fold(x), self.quantized_weight(), self.bias), x)
        y = y.to(self.weight.dtype)  # under autocast products are bf16; the stream and the membranes stay as they are
        return y if self.output_grid is None else round_to_grid(y, self.output_grid)

    def integer(self, x: Tensor) -> Tensor:
        codes = self.constants
        assert codes is not None  # forward chose
        carrier = codes.carrier()
        with _plain_arithmetic():
            acc = self.sums(fold(x).to(carrier), codes.weight.to(carrier), None).to(torch.int32)
        return unfold(acc if codes.affine is None else codes.affine(acc), x)


class QuantConv2d(_Weighted):
    """A convolution of codes, spikes or counts with zero padding; weights by Eq. 3.

    weight_bits  2..8, or 32 for full precision
    bias         folded into the BN table when frozen
    output_grid  give the residual grid where no BN layer follows: the output is then rounded and saturated as BN's is
    generator    draws the initial weights (Kaiming normal, fan out)
    quantizer    "tanh" (Eq. 3), or "mint": uniform, in the scale of the LIF that `share_scales` gave it
    returns      accumulators [T', N, C_out, H', W'] (frozen: int32), or the stream where no BN follows
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = False,
        weight_bits: int = FULL_PRECISION,
        *,
        output_grid: Grid | None = None,
        generator: torch.Generator | None = None,
        quantizer: str = "tanh",
    ) -> None:
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ConfigError(f"groups = {groups} does not divide {in_channels} and {out_channels} channels")
        self.kernel_size = _pair(kernel_size)
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        super().__init__(shape, bias, weight_bits, output_grid, generator, quantizer)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.stride, self.padding, self.groups = stride, padding, groups

    def sums(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, 1, self.groups)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, groups={self.groups}, weight_bits={self.weight_bits}"
        )


class QuantLinear(_Weighted):
    """A fully connected layer inside the network, [T', N, in, 1, 1] to [T', N, out, 1, 1]; else as QuantConv2d."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        weight_bits: int = FULL_PRECISION,
        *,
        output_grid: Grid | None = None,
        generator: torch.Generator | None = None,
        quantizer: str = "tanh",
    ) -> None:
        super().__init__((out_features, in_features), bias, weight_bits, output_grid, generator, quantizer)
        self.in_features, self.out_features = in_features, out_features

    def sums(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x[:, :, 0, 0], weight, bias)[:, :, None, None]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, weight_bits={self.weight_bits}"


# ------------------------------------------------------------------------------------------------------- BN


@dataclass(frozen=True, eq=False)
class AffineCodes:
    """A BN table in affine form: y = clamp((multiplier*acc + offset) >> shift, -C, C), `>>` floors.

    multiplier, offset, shift  (C, 1, 1), int32 where the product is proven to fit 32 bits, else int64
    scale, bias                (C,) float64, the real constants behind them; rounding: see formats.Affine
    """

    multiplier: Tensor
    offset: Tensor
    shift: Tensor
    saturation: int
    scale: Tensor
    bias: Tensor
    rounding: float

    def __call__(self, acc: Tensor) -> Tensor:
        """acc [..., C, H, W] int32 to the stream, int32."""
        y = (self.multiplier * acc + self.offset) >> self.shift
        return y.clamp(-self.saturation, self.saturation).to(torch.int32)


class QuantBatchNorm2d(Layer):
    """Batch normalization over T', N, H and W, gamma and beta by Eq. 4 (or on WAGEUBN's grid).

    bits         of gamma and beta: 2..8, or 32 for full precision
    grid         "eq4" or "wageubn"; see quantizers.quantize_bn
    output_grid  the residual grid: a student's output is rounded to it half up, and saturates at +-clip, as the frozen
                 table's does. None: not rounded (a teacher).
    statistics_bits  32: mu and sigma stay real and vanish in the frozen table; 16: on WAGEUBN's grid of 2**-15
    gain         what gamma is multiplied by: 1, or alpha * v_th for threshold-dependent BN (tdBN, arXiv 2011.05280)
    Must follow a QuantConv2d or QuantLinear: the pair freezes into one integer affine per channel (section 2).
    """

    running_mean: Tensor
    running_var: Tensor
    constants: AffineCodes | None = None

    def __init__(
        self,
        channels: int,
        bits: int = 8,
        grid: str = "eq4",
        output_grid: Grid | None = None,
        *,
        statistics_bits: int = FULL_PRECISION,
        eps: float = 1e-5,
        momentum: float = 0.1,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0.0 < gain < float("inf"):
            raise ConfigError(f"BN gain = {gain} must be above 0 and finite")
        round_statistics(torch.zeros(1), statistics_bits)  # raises for another width
        if grid not in BN_GRIDS:
            raise ConfigError(f"BN grid {grid!r} is not one of {', '.join(BN_GRIDS)}")
        self.channels, self.bits, self.grid, self.output_grid = (
            channels,
            check_width(bits, "BN bits"),
            grid,
            output_grid,
        )
        self.statistics_bits, self.eps, self.momentum, self.gain = statistics_bits, eps, momentum, gain
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def live(self, x: Tensor) -> Tensor:
        gamma = fake_quantize_bn(self.weight, self.bits, self.grid)
        beta = fake_quantize_bn(self.bias, self.bits, self.grid)
        if self.gain != 1.0:
            gamma = gamma * self.gain
        means, variances = self.running_mean, self.running_var
        if self.training and _repeats():
            means, variances = means.clone(), variances.clone()
        if self.statistics_bits == FULL_PRECISION:
            y = F.batch_norm(fold(x), means, variances, gamma, beta, self.training, self.momentum, self.eps)
        else:
            y = self._with_rounded_statistics(fold(x), gamma, beta)
        return unfold(y if self.output_grid is None else round_to_grid(y, self.output_grid), x)

    def _with_rounded_statistics(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        if self.training:
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            with torch.no_grad():
                momentum = 0.0 if _repeats() else self.momentum
                count = x.numel() // self.channels
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * count / max(count - 1, 1), momentum)
        else:
            variance, mean = self.running_var, self.running_mean
        mu, sigma = self.rounded_statistics(mean, variance)
        return (x - mu[:, None, None]) / sigma[:, None, None] * gamma[:, None, None] + beta[:, None, None]

    def rounded_statistics(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """mu and sigma = sqrt(variance + eps) as they are used; a rounded sigma is at least one step, 2**-15."""
        mu = round_statistics(mean, self.statistics_bits)
        sigma = round_statistics(torch.sqrt(variance + self.eps), self.statistics_bits)
        return mu, sigma if self.statistics_bits == FULL_PRECISION else sigma.clamp(min=2.0 ** (1 - STATISTICS_BITS))

    def integer(self, x: Tensor) -> Tensor:
        assert self.constants is not None  # forward chose
        return self.constants(x)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, bits={self.bits}, grid={self.grid!r}, output_grid={self.output_grid}, gain={self.gain}"
        )


@dataclass(frozen=True, eq=False)
class ShiftCodes:
    """A frozen shortcut quantizer: clip((x + 2**(shift-1)) >> shift, -delta(bits), delta(bits))."""

    shift: int
    bits: int


class ShortcutQuant(Layer):
    """The stream as codes, for the 1x1 convolution of a shortcut to read.

    bits   2..8: codes on a step of 2**(4 - bits), so that they span about +-8 (8 bits: step 2**-4, saturating at
           7.94); 32: passes the stream through
    """

    constants: ShiftCodes | None = None

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        self.bits = check_width(bits, "shortcut bits")

    @property
    def step(self) -> float:
        """Real value of one code."""
        return 2.0 ** (SHORTCUT_RANGE_LOG2 + 1 - self.bits)

    def live(self, x: Tensor) -> Tensor:
        return x if self.bits == FULL_PRECISION else round_to_codes(x, self.bits, self.step)

    def integer(self, x: Tensor) -> Tensor:
        assert self.constants is not None  # forward chose
        shift, top = self.constants.shift, delta(self.constants.bits)
        return ((x + (1 << (shift - 1))) >> shift).clamp(-top, top)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


# -------------------------------------------------------------------------------------------------- neurons


@dataclass(frozen=True, eq=False)
class LifRecord:
    """What a frozen LIF layer did, each [T, N, C, H, W]: h int32, s uint8, q int8 (the code it kept)."""

    h: Tensor
    s: Tensor
    q: Tensor


class LIF(Layer):
    """Leaky integrate-and-fire neurons; the stream in, spikes out. The step is neurons.lif_step.

    timesteps  T; an input that is the same at every step is unrolled to T
    tau        leak, 0 < tau <= 1      v_th  a spike is h > v_th      reset  "hard" (to 0) or "soft" (subtracts v_th)
    surrogate  "triangle", "rectangle", or a surrogate.Surrogate with parameters of your own
    bits       of the stored membrane (Eq. 3): 2..8, or 32 for full precision
    quantize   "post_reset" (what is stored is quantized) or "pre_fire" (what is compared is; hard reset only)
    alpha      of the membrane quantizer, frozen by `freeze`:
               "ema"      running mean over training batches of max|tanh(u)|; what evaluation uses
               "dynamic"  max|tanh(u)| of the step at hand, the paper's words: a prediction then depends on its batch;
                          freezing takes the largest of the last training batch
               "learned"  a parameter, started from the first training batch
    tap        True: the live forward keeps its membrane h, with its graph, in `last_h`  [T, N, C, H, W];
               "state": it keeps there what the step stores, the quantized membrane after the reset
    record     True: the frozen forward keeps h, s and q in `last_record`
    """

    alpha: Tensor
    alpha_batches: Tensor
    constants: LifCodes | None = None

    def __init__(
        self,
        timesteps: int,
        tau: float = 0.5,
        v_th: float = 0.5,
        reset: str = "hard",
        surrogate: str | surrogates.Surrogate = "triangle",
        bits: int = FULL_PRECISION,
        quantize: str = "post_reset",
        alpha: str = "ema",
        *,
        alpha_momentum: float = 0.1,
        detach_reset: bool = False,
        quantizer: str = "tanh",
    ) -> None:
        super().__init__()
        check_neuron(reset, quantize)
        self.quantizer = check_quantizer(quantizer)
        alpha = "learned" if quantizer == "mint" else alpha
        if alpha not in ALPHAS:
            raise ConfigError(f"alpha {alpha!r} is not one of {', '.join(ALPHAS)}")
        if type(timesteps) is not int or timesteps < 1:
            raise ConfigError(f"timesteps = {timesteps!r} is not a whole number above 0")
        if not 0.0 < tau <= 1.0 or not v_th > 0.0:
            raise ConfigError(f"tau = {tau} must be in (0, 1] and v_th = {v_th} above 0")
        self.timesteps, self.tau, self.v_th = timesteps, float(tau), float(v_th)
        self.reset, self.quantize, self.alpha_mode = reset, quantize, alpha
        self.bits, self.alpha_momentum, self.detach_reset = (
            check_width(bits, "membrane bits"),
            alpha_momentum,
            detach_reset,
        )
        self.spike = surrogates.surrogate(surrogate)
        if alpha == "learned" and self.bits != FULL_PRECISION:
            self.alpha = nn.Parameter(torch.ones(()))
        else:
            self.register_buffer("alpha", torch.ones(()))
        self.register_buffer("alpha_batches", torch.zeros((), dtype=torch.int64))
        self._has_begun = False
        self.tap: bool | str = False
        self.record = False
        self.last_h: Tensor | None = None
        self.last_record: LifRecord | None = None

    def _check_steps(self, x: Tensor) -> None:
        if x.shape[0] not in (1, self.timesteps):
            raise InputError(f"an input of {x.shape[0]} steps does not fit a LIF layer of {self.timesteps} timesteps")

    def steps(self, x: Tensor) -> list[Tensor]:
        """The input of each of the T steps."""
        self._check_steps(x)
        return list(x.unbind(0)) if x.shape[0] == self.timesteps else [x[0]] * self.timesteps

    def live(self, x: Tensor) -> Tensor:
        if self.training and isinstance(self.alpha, nn.Parameter) and not _repeats():
            with torch.no_grad():  # a step beyond the bounds would leave it there, where it has no gradient
                self.alpha.clamp_(ALPHA_FLOOR, 1.0)
        starting, alpha = self.training and not self._begun(), self.alpha
        twice = _recorded()
        if twice is not None and twice.again:
            starting, alpha = twice.seen[self]
        elif twice is not None:
            twice.seen[self] = starting, alpha if isinstance(alpha, nn.Parameter) else alpha.clone()
        neuron = self._neuron(x)
        run = self._stepwise(x, starting, alpha) if neuron is None else self._fused(x, neuron, starting, alpha)
        s, membranes, peaks = run
        if not _repeats():
            self.last_h = membranes
            if self.training and len(peaks):
                self._observe(peaks.amax(), starting)
        return s

    def _begun(self) -> bool:
        """Whether a training batch has set the scale: as `alpha_batches`, which is not looked at once it has.

        A GPU would have to wait for that, and a graph of torch.compile would end there.
        """
        if not self._has_begun and self.bits != FULL_PRECISION and not torch.compiler.is_compiling():
            self._has_begun = bool(self.alpha_batches)
        return self._has_begun

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._has_begun = bool(self.alpha_batches)

    def _neuron(self, x: Tensor) -> loops.Neuron | None:
        """What runs this layer's steps in one pass; None where only `lif_step` will do."""
        quantized = self.bits != FULL_PRECISION
        plain = self.quantize == "post_reset" and not (quantized and self.alpha_mode == "learned")
        if not plain or self.tap == "state" or type(self.spike) not in (Triangle, Rectangle) or not loops.suits(x):
            return None
        return loops.Neuron(
            self.tau,
            self.v_th,
            self.reset == "soft",
            self.detach_reset,
            isinstance(self.spike, Rectangle),
            self.spike.gamma,
            self.spike.width,
            delta(self.bits) if quantized else 0,
        )

    def _fused(
        self, x: Tensor, neuron: loops.Neuron, starting: bool, alpha: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Spikes, what a tap reads, and tanh of the largest |u| of each step."""
        self._check_steps(x)
        fixed = float(alpha.clamp(ALPHA_FLOOR, 1.0))
        by_step = self.alpha_mode == "dynamic" or starting

        def scale(peak: float) -> float:
            return float(torch.tanh(torch.tensor(peak)).clamp(ALPHA_FLOOR, 1.0)) if by_step else fixed

        s, h, peaks = lif(x, neuron, self.timesteps, tap=bool(self.tap), scale=scale if neuron.levels else None)
        return s, h, torch.tanh(torch.tensor(peaks))

    def _stepwise(self, x: Tensor, starting: bool, alpha: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `_fused`, by `lif_step`; no peaks where none were asked for."""
        peaks: list[Tensor] = []
        by_step = self.alpha_mode == "dynamic" or starting
        mint = self.quantizer == "mint"

        def requantize(u: Tensor) -> Tensor:
            if self.bits == FULL_PRECISION:
                return u
            if self.training or by_step:
                peak = u.detach().abs().amax()
                peaks.append(peak.clamp(max=1.0) if mint else torch.tanh(peak))
            scale = (peaks[-1] if by_step else alpha).clamp(ALPHA_FLOOR, 1.0)
            return (fake_quantize_uniform if mint else fake_quantize_membrane)(u, self.bits, scale)

        u = torch.zeros_like(x[0])
        spikes, membranes = [], []
        for current in self.steps(x):
            s, u, h = lif_step(
                current,
                u,
                tau=self.tau,
                v_th=self.v_th,
                reset=self.reset,
                spike=self.spike,
                requantize=requantize,
                quantize=self.quantize,
                detach_reset=self.detach_reset,
            )
            spikes.append(s)
            membranes.append(u if self.tap == "state" else h)
        tapped = torch.stack(membranes) if self.tap else None
        return torch.stack(spikes), tapped, torch.stack(peaks) if peaks else x.new_zeros(0)

    @torch.no_grad()
    def _observe(self, peak: Tensor, starting: bool) -> None:
        if starting or self.alpha_mode == "dynamic":
            self.alpha.copy_(peak)
        elif self.alpha_mode == "ema":
            self.alpha.lerp_(peak.to(self.alpha.dtype), self.alpha_momentum)
        self.alpha_batches += 1
        self._has_begun = True

    def integer(self, x: Tensor) -> Tensor:
        codes = self.constants
        assert codes is not None  # forward chose
        q = torch.zeros_like(x[0])
        h_all, s_all, q_all = [], [], []
        for current in self.steps(x):
            s, q, h = lif_step_codes(current, q, codes)
            s_all.append(s)
            if self.record:
                h_all.append(h)
                q_all.append(q.to(torch.int8))
        spikes = torch.stack(s_all)
        self.last_record = LifRecord(torch.stack(h_all), spikes, torch.stack(q_all)) if self.record else None
        return spikes

    def __getstate__(self) -> dict[str, Any]:
        """A copy takes neither a tap's graph nor a record along."""
        return {**self.__dict__, "last_h": None, "last_record": None}

    def extra_repr(self) -> str:
        return (
            f"timesteps={self.timesteps}, tau={self.tau}, v_th={self.v_th}, reset={self.reset!r}, "
            f"surrogate={self.spike}, bits={self.bits}, quantize={self.quantize!r}, alpha={self.alpha_mode!r}"
        )


# ---------------------------------------------------------------------------------------------------- pools


class SpikeMaxPool2d(Layer):
    """Max-pool of spikes: a logical or over each window, padding skipped."""

    def __init__(self, kernel_size: int, stride: int | None = None, padding: int = 0) -> None:
        super().__init__()
        self.kernel_size, self.padding = kernel_size, padding
        self.stride = kernel_size if stride is None else stride

    def live(self, x: Tensor) -> Tensor:
        return unfold(F.max_pool2d(fold(x), self.kernel_size, self.stride, self.padding), x)

    def integer(self, x: Tensor) -> Tensor:
        return self.live(x.float()).to(torch.uint8)

    def extra_repr(self) -> str:
        return f"{self.kernel_size}, stride={self.stride}, padding={self.padding}"


class SpikeSumPool2d(Layer):
    """Average pool of spikes (or of counts), padding counted as 0.

    Live it is the mean; frozen it is the sum, and 1/(kernel area) moves into the scale of the layer that reads it.
    """

    def __init__(self, kernel_size: int | Sequence[int], stride: int | None = None, padding: int = 0) -> None:
        super().__init__()
        self.kernel_size, self.padding = _pair(kernel_size), padding
        if stride is None and self.kernel_size[0] != self.kernel_size[1]:
            raise ConfigError(f"a window of {self.kernel_size} needs its stride given")
        self.stride = self.kernel_size[0] if stride is None else stride

    def live(self, x: Tensor) -> Tensor:
        return unfold(F.avg_pool2d(fold(x), self.kernel_size, self.stride, self.padding), x)

    def integer(self, x: Tensor) -> Tensor:
        sums = F.avg_pool2d(fold(x).double(), self.kernel_size, self.stride, self.padding, divisor_override=1)
        return unfold(sums.to(torch.int32), x)

    def extra_repr(self) -> str:
        return f"{self.kernel_size}, stride={self.stride}, padding={self.padding}"


class GlobalSpikePool(Layer):
    """Mean of spikes (or counts) over H and W, to [T', N, C, 1, 1]; frozen: the sum, as SpikeSumPool2d."""

    def live(self, x: Tensor) -> Tensor:
        return x.mean(dim=(3, 4), keepdim=True)

    def integer(self, x: Tensor) -> Tensor:
        return x.sum(dim=(3, 4), keepdim=True, dtype=torch.int32)


class Flatten(Layer):
    """[T', N, C, H, W] to [T', N, C*H*W, 1, 1], in C order."""

    def live(self, x: Tensor) -> Tensor:
        return x.flatten(2)[..., None, None]

    def integer(self, x: Tensor) -> Tensor:
        return self.live(x)


# --------------------------------------------------------------------------------------------------- readout


@dataclass(frozen=True, eq=False)
class ReadoutCodes:
    """A frozen classifier: logits = weight @ (sum over t, y, x of the input) + bias, int32.

    weight (classes, in) int8      bias (classes,) int32      unit  real value of one step of a logit
    """

    weight: Tensor
    bits: int
    alpha: float
    bias: Tensor
    unit: float


class Readout(Layer):
    """The classifier, last in the network: mean of the spikes over T, H and W, then a linear layer.

    in_features  channels of its input      weight_bits  2..8 (one scale for the tensor), or 32
    returns      logits [N, classes], float32; frozen: int32, the same up to one positive factor (`constants.unit`)
    """

    constants: ReadoutCodes | None = None

    def __init__(
        self,
        in_features: int,
        classes: int,
        weight_bits: int = 8,
        *,
        generator: torch.Generator | None = None,
        quantizer: str = "tanh",
    ) -> None:
        super().__init__()
        self.quantizer = check_quantizer(quantizer)
        self.in_features, self.classes, self.weight_bits = in_features, classes, check_width(weight_bits, "weight_bits")
        self.weight = nn.Parameter(torch.empty(classes, in_features))
        nn.init.normal_(self.weight, std=float(in_features) ** -0.5, generator=generator)
        self.bias = nn.Parameter(torch.zeros(classes))

    def live(self, x: Tensor) -> Tensor:
        quantize = fake_quantize_weight if self.quantizer == "tanh" else fake_quantize_shared
        return F.linear(x.mean(dim=(0, 3, 4)), quantize(self.weight, self.weight_bits), self.bias)

    def integer(self, x: Tensor) -> Tensor:
        codes = self.constants
        assert codes is not None  # forward chose
        total = x.sum(dim=(0, 3, 4), dtype=torch.int64)
        return (total @ codes.weight.long().T + codes.bias).to(torch.int32)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.classes}, weight_bits={self.weight_bits}"


# ------------------------------------------------------------------------------------------- graph and taps


class _LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Layer) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of a model by torch.fx, with the layers of this file as leaves; unread values are left out.

    raises  LoweringError  if its forward cannot be traced (its path must not depend on values)
    """
    try:
        graph = _LeafTracer().trace(model)
    except MdsnnError:
        raise
    except Exception as fault:
        raise LoweringError(
            f"{type(model).__name__}: its forward cannot be traced: {fault}. Compose it of layers of mdsnn.layers and "
            "'+', without conditions on values, loops over a tensor or functions of torch"
        ) from fault
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    return graph


def set_timesteps(model: nn.Module, timesteps: int) -> None:
    """Set T in every LIF of a live model (a student may run fewer steps than its teacher)."""
    for module in model.modules():
        if isinstance(module, LIF):
            module.timesteps = timesteps


def share_scales(model: nn.Module) -> None:
    """Give every "mint" layer of weights the alpha of the LIF that reads its output first, as MINT shares them.

    Several layers may feed one LIF (a block's last convolution and its shortcut's); one that feeds none, or a LIF of
    full precision, keeps max|w| as its scale. Call it once, when the model is built.
    """
    modules, nodes = dict(model.named_modules()), list(trace(model).nodes)
    for node in nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, _Weighted) and layer.quantizer == "mint" and layer.weight_bits != FULL_PRECISION:
            reader = _reader(node, nodes, modules)
            lif = modules[str(reader.target)] if reader is not None else None
            if isinstance(lif, LIF) and lif.quantizer == "mint" and isinstance(lif.alpha, nn.Parameter):
                layer.alpha = lif.alpha


def taps(model: nn.Module, where: str = "group") -> list[LIF]:
    """The LIFs whose membrane h distillation reads: those that consume the output of each conv, block or group.

    where    "conv"   every QuantConv2d and QuantLinear (the stem's too)
             "block"  every module that is a `Block`      "group"  every module that is a `Group`
    returns  LIF layers in the order of execution, none twice; the same places in a teacher and its student
    raises   ConfigError  for another `where`, or if the model marks no block or group
    """
    if where not in ("conv", "block", "group"):
        raise ConfigError(f"taps at {where!r}: not one of conv, block, group")
    modules = dict(model.named_modules())
    nodes = list(trace(model).nodes)
    if where == "conv":
        starts = [n for n in nodes if n.op == "call_module" and isinstance(modules[str(n.target)], _Weighted)]
    else:
        kind = Block if where == "block" else Group
        inside: dict[str, set[fx.Node]] = {path: set() for path, m in modules.items() if isinstance(m, kind)}
        for node in nodes:
            for path in node.meta.get("nn_module_stack", {}):
                if path in inside:
                    inside[path].add(node)
        starts = [n for group in inside.values() for n in nodes if n in group and not set(n.users) <= group]
    found = {lif for start in starts if (lif := _reader(start, nodes, modules)) is not None}
    if not found:
        raise ConfigError(f"taps at {where!r}: {type(model).__name__} has no such place that a LIF reads")
    lifs = (modules[str(n.target)] for n in nodes if n in found)
    return [lif for lif in lifs if isinstance(lif, LIF)]


def _reader(start: fx.Node, nodes: list[fx.Node], modules: dict[str, nn.Module]) -> fx.Node | None:
    """The first LIF, in order of execution, that `start`'s value reaches before any other LIF."""
    reached = {start}
    for node in nodes:
        if node not in reached and not reached.isdisjoint(node.all_input_nodes):
            if node.op == "call_module" and isinstance(modules[str(node.target)], LIF):
                return node
            reached.add(node)
    return None
