"""Freezing: a trained student becomes integers, once (docs/arithmetic.md, section 2).

`freeze` copies a model, walks its graph with torch.fx, and carries two things along every edge: the real value of one
integer and the range the integers can take. With them each layer's real constants become integers by the functions of
mdsnn.kernels.formats. The frozen model has the same modules and the same forward; it computes on integers, exactly,
and mdsnn.export.lower writes the same constants into an IntegerNetwork.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from mdsnn.kernels import formats
from mdsnn.kernels.errors import FormatError, LoweringError
from mdsnn.kernels.formats import EVENT_RANGE, IMAGE_FRAC_BITS, IMAGE_RANGE, INT32_LIMIT, Grid

from .layers import (
    LIF,
    AffineCodes,
    EventInput,
    Flatten,
    GlobalSpikePool,
    InputCodes,
    Layer,
    PixelInput,
    QuantBatchNorm2d,
    QuantConv2d,
    QuantLinear,
    Readout,
    ReadoutCodes,
    ShiftCodes,
    ShortcutQuant,
    SpikeMaxPool2d,
    SpikeSumPool2d,
    SumCodes,
    trace,
)
from .neurons import LifCodes
from .quantizers import FULL_PRECISION, quantize_bn, uniform_codes, uniform_thresholds

M = TypeVar("M", bound=nn.Module)
Shape = tuple[int, int, int]

PLAN = "mdsnn_plan"
"""Attribute of a frozen model that holds its Plan."""
_LAYERS = (
    PixelInput,
    EventInput,
    QuantConv2d,
    QuantLinear,
    QuantBatchNorm2d,
    ShortcutQuant,
    LIF,
    SpikeMaxPool2d,
    SpikeSumPool2d,
    GlobalSpikePool,
    Flatten,
    Readout,
)
_ADDS = (operator.add, operator.iadd, torch.add)
_INSTEAD = {
    "Conv2d": "use QuantConv2d",
    "Linear": "use QuantLinear, or Readout for the classifier",
    "BatchNorm2d": "use QuantBatchNorm2d",
    "MaxPool2d": "use SpikeMaxPool2d, on spikes",
    "max_pool2d": "use SpikeMaxPool2d, on spikes",
    "AvgPool2d": "use SpikeSumPool2d, on spikes",
    "avg_pool2d": "use SpikeSumPool2d, on spikes",
    "AdaptiveAvgPool2d": "use GlobalSpikePool, on spikes",
    "adaptive_avg_pool2d": "use GlobalSpikePool, on spikes",
    "mean": "use GlobalSpikePool on spikes; Readout takes the mean itself",
    "Flatten": "use mdsnn.layers.Flatten",
    "flatten": "use mdsnn.layers.Flatten",
    "ReLU": "use LIF",
    "relu": "use LIF",
}


@dataclass(frozen=True)
class Signal:
    """What an edge carries.

    kind       codes | spikes | counts | accumulators | stream | logits
    shape      (C, H, W)
    scale      real value of one integer; of one input code for accumulators
    low, high  range of the integers; for accumulators over all channels
    """

    kind: str
    shape: Shape
    scale: Fraction
    low: int
    high: int


@dataclass(frozen=True)
class Step:
    """One operation of a frozen model, in order of execution: the layer called `name`, or op "Add"."""

    name: str
    op: str
    sources: tuple[str, ...]
    signal: Signal


@dataclass(frozen=True)
class Plan:
    """The frozen model's graph: what lower translates and frozen_trace reads."""

    steps: tuple[Step, ...]
    coding: str
    timesteps: int
    grid: Grid

    @property
    def lifs(self) -> tuple[str, ...]:
        """Names of the LIF layers, in order of execution."""
        return tuple(step.name for step in self.steps if step.op == "LIF")


def freeze(model: M, *, input_size: tuple[int, int] | None = None, grid: Grid | None = None) -> M:
    """A copy of `model` in its frozen state: evaluation mode, on the CPU, computing on integers.

    model       a module whose forward composes layers of mdsnn.layers and `+`; it is not changed
    input_size  (H, W); default: model.config["size"]
    grid        of the residual stream; default: the one its BN layers name, or Grid()
    The frozen forward takes the same uint8 input and returns int32 logits; use it under torch.no_grad().
    raises      LoweringError  naming the layer: frozen already; NaN or infinity; bits = 32; a layer called twice; an
                operation that has no integer form; a value of the wrong kind, shape or range
    """
    for name, module in model.named_modules():
        if isinstance(module, Layer) and module.is_frozen:
            raise LoweringError(f"layer '{name}': the model is frozen already; freeze the live student")
    frozen = copy.deepcopy(model).cpu().eval()
    frozen.requires_grad_(False)
    _drop_dropout(frozen)
    size = input_size if input_size is not None else getattr(model, "config", {}).get("size")
    if size is None:
        raise LoweringError(f"{type(model).__name__}: its input size is not known; pass input_size=(height, width)")
    with torch.no_grad():
        plan = _Freezer(frozen, (int(size[0]), int(size[1])), grid).run()
    setattr(frozen, PLAN, plan)
    return frozen


def plan_of(model: nn.Module) -> Plan:
    """The Plan that `freeze` left in a frozen model; raises LoweringError if there is none."""
    plan = getattr(model, PLAN, None)
    if not isinstance(plan, Plan):
        raise LoweringError(f"{type(model).__name__} is not frozen; pass it through mdsnn.freeze.freeze first")
    return plan


def frozen_trace(
    model: nn.Module, pixels: npt.NDArray[np.uint8]
) -> tuple[dict[str, tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], npt.NDArray[np.int8]]], npt.NDArray[np.int32]]:
    """Run a frozen model and keep what every LIF did.

    pixels   uint8 [N, C, H, W], or [T, N, C, H, W] for events
    returns  LIF name -> (h int32, s uint8, q int8), each [T, N, C, H, W]; and logits int32 [N, classes]
    """
    modules = dict(model.named_modules())
    lifs = {name: module for name in plan_of(model).lifs if isinstance(module := modules[name], LIF)}
    for lif in lifs.values():
        lif.record = True
    try:
        with torch.no_grad():
            logits = model(torch.from_numpy(np.array(pixels, order="C")))
        records = {name: lif.last_record for name, lif in lifs.items()}
    finally:
        for lif in lifs.values():
            lif.record, lif.last_record = False, None
    return (
        {name: (r.h.numpy(), r.s.numpy(), r.q.numpy()) for name, r in records.items() if r is not None},
        logits.numpy(),
    )


def predictions(logits: Tensor) -> Tensor:
    """The class of each sample, int64 [N]: the lowest index of the largest logit, ties included."""
    top = logits == logits.amax(dim=1, keepdim=True)
    places = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(top, places, logits.shape[1]).amin(dim=1)


def shortcut_saturation(model: nn.Module, pixels: npt.NDArray[np.uint8]) -> dict[str, float]:
    """Fraction of each shortcut's codes that lie at an end of their range, on `pixels` (a frozen model)."""
    plan, rates, handles = plan_of(model), dict[str, float](), []
    for name in (step.name for step in plan.steps if step.op == "ShortcutQuant"):
        layer = model.get_submodule(name)

        def measure(module: nn.Module, _: Any, codes: Tensor, name: str = name) -> None:
            assert isinstance(module, ShortcutQuant)
            assert module.constants is not None
            rates[name] = float((codes.abs() == formats.delta(module.constants.bits)).double().mean())

        handles.append(layer.register_forward_hook(measure))
    try:
        with torch.no_grad():
            model(torch.from_numpy(np.array(pixels, order="C")))
    finally:
        for handle in handles:
            handle.remove()
    return rates


def _drop_dropout(model: nn.Module) -> None:
    """Dropout is the identity in evaluation; in the frozen copy it is so in every mode."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.modules.dropout._DropoutNd):
                setattr(module, name, nn.Identity())


def _place(node: fx.Node) -> str:
    """The path of the module in which `node` is called; empty at the top."""
    paths = [path for path in node.meta.get("nn_module_stack", {}) if path]
    return paths[-1] if paths else ""


def free_name(name: str, taken: Collection[str]) -> str:
    """`name`, or the first of name2, name3, ... that is not taken."""
    free, count = name, 1
    while free in taken:
        count += 1
        free = f"{name}{count}"
    return free


def _window(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


class _Freezer:
    """Walks the graph once; `signals` and `names` are by fx node."""

    def __init__(self, model: nn.Module, size: tuple[int, int], grid: Grid | None) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.size = size
        self.nodes = self._graph()
        self.grid = grid if grid is not None else self._grid()
        self.timesteps = self._timesteps()
        self.signals: dict[fx.Node, Signal] = {}
        self.names: dict[fx.Node, str] = {}
        self.coding = ""

    def run(self) -> Plan:
        steps = []
        for node in self.nodes:
            if node.op in ("placeholder", "output"):
                continue
            name = self.names[node] = self._name(node)
            try:
                self.signals[node] = self._visit(node, name)
            except FormatError as fault:
                raise LoweringError(f"layer '{name}': {fault}") from fault
            layer = self._layer(node)
            op = type(layer).__name__ if layer is not None else "Add"
            sources = tuple(self.names[source] for source in self._sources(node))
            steps.append(Step(name, op, sources, self.signals[node]))
        self._check_output()
        return Plan(tuple(steps), self.coding, self.timesteps, self.grid)

    # -------------------------------------------------------------------------------------------- the graph

    def _graph(self) -> list[fx.Node]:
        graph = trace(self.model)
        for node in list(graph.nodes):
            if node.op == "call_module" and isinstance(self.modules[str(node.target)], nn.Identity):
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.erase_node(node)
        return list(graph.nodes)

    def _layer(self, node: fx.Node) -> Layer | None:
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        return module if isinstance(module, Layer) else None

    def _layers(self, kind: type[Layer]) -> list[tuple[str, Any]]:
        found = ((str(node.target), self._layer(node)) for node in self.nodes)
        return [(name, layer) for name, layer in found if isinstance(layer, kind)]

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        return [a for a in node.args if isinstance(a, fx.Node) and a.op != "placeholder"]

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            name = str(node.target)
            if name in self.names.values():
                raise LoweringError(
                    f"layer '{name}': called twice in one forward, but a frozen layer has one set of constants and one "
                    "state; make a second layer"
                )
            return name
        place = _place(node)
        return free_name(f"{place}.add" if place else "add", {*self.names.values(), *self.modules})

    def _grid(self) -> Grid:
        named = [(n, layer.output_grid) for n, layer in self._layers(Layer) if getattr(layer, "output_grid", None)]
        for name, grid in named:
            if grid != named[0][1]:
                raise LoweringError(
                    f"layer '{name}': its output_grid {grid} is not {named[0][1]}, that of '{named[0][0]}'; a network "
                    "has one residual grid"
                )
        return named[0][1] if named else Grid()

    def _timesteps(self) -> int:
        lifs = self._layers(LIF)
        for name, lif in lifs:
            if lif.timesteps != lifs[0][1].timesteps:
                raise LoweringError(
                    f"layer '{name}': timesteps = {lif.timesteps}, but '{lifs[0][0]}' has {lifs[0][1].timesteps}; "
                    "use layers.set_timesteps"
                )
        return int(lifs[0][1].timesteps) if lifs else 1  # without a LIF nothing spikes, and the Readout says so

    def _check_output(self) -> None:
        (output,) = (node for node in self.nodes if node.op == "output")
        last = output.args[0]
        if not isinstance(last, fx.Node) or not isinstance(self._layer(last), Readout):
            raise LoweringError(f"{type(self.model).__name__}: its forward must return what a Readout layer returns")
        if len(self._layers(Readout)) != 1 or len(last.users) != 1:
            raise LoweringError(f"layer '{last.target}': one Readout ends a network, and nothing else reads it")

    def _fail(self, name: str, what: str) -> NoReturn:
        raise LoweringError(f"layer '{name}': {what}")

    # ------------------------------------------------------------------------------------------- the layers

    def _visit(self, node: fx.Node, name: str) -> Signal:
        layer = self._layer(node)
        if layer is None:
            if node.op == "call_function" and node.target in _ADDS:
                return self._add(node, name)
            if node.op == "call_method" and node.target in ("add", "add_"):
                return self._add(node, name)
            self._unknown(node)
        if type(layer) not in _LAYERS:  # a subclass may compute something else
            self._unknown(node)
        self._check_values(layer, name)
        if isinstance(layer, PixelInput | EventInput):
            return self._input(node, layer, name)
        if len(node.args) != 1 or node.kwargs or not self._sources(node):
            self._fail(name, "takes one value, and only an input layer reads the network's input")
        source = self.signals[self._sources(node)[0]]
        if isinstance(layer, QuantConv2d):
            return self._conv(node, layer, name, source)
        if isinstance(layer, QuantLinear):
            return self._linear(node, layer, name, source)
        if isinstance(layer, QuantBatchNorm2d):
            return self._bn(node, layer, name, source)
        if isinstance(layer, ShortcutQuant):
            return self._shortcut(layer, name, source)
        if isinstance(layer, LIF):
            return self._lif(layer, name, source)
        if isinstance(layer, SpikeMaxPool2d):
            return self._max_pool(layer, name, source)
        if isinstance(layer, SpikeSumPool2d):
            return self._sum_pool(layer, name, source)
        if isinstance(layer, GlobalSpikePool):
            self._need(name, layer, source, "spikes", "counts")
            layer.constants = ()
            return self._pooled(source, source.shape[1:], (1, 1))
        if isinstance(layer, Flatten):
            self._need(name, layer, source, "spikes", "counts", "codes")
            layer.constants = ()
            c, height, width = source.shape
            return Signal(source.kind, (c * height * width, 1, 1), source.scale, source.low, source.high)
        assert isinstance(layer, Readout)  # the last of _LAYERS
        return self._readout(layer, name, source)

    def _unknown(self, node: fx.Node) -> NoReturn:
        if node.op == "call_module":
            what = type(self.modules[str(node.target)]).__name__
            where = f"layer '{node.target}' ({what})"
        else:
            what = getattr(node.target, "__name__", str(node.target))
            where = f"'{what}' in '{_place(node) or type(self.model).__name__}'"
        instead = _INSTEAD.get(what, "compose the forward of layers of mdsnn.layers and '+'")
        raise LoweringError(f"{where} has no integer form; {instead}")

    def _check_values(self, layer: Layer, name: str) -> None:
        for key, values in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            bad = int((~torch.isfinite(values)).sum())
            if bad:
                self._fail(name, f"its {key} holds {bad} NaN or infinite values; restore an earlier checkpoint")
        if isinstance(layer, QuantBatchNorm2d) and bool((layer.running_var < 0).any()):
            self._fail(name, "its running_var is negative; restore an earlier checkpoint")
        for key in ("weight_bits", "bits"):
            if getattr(layer, key, None) == FULL_PRECISION:
                self._fail(
                    name, f"{key} = {FULL_PRECISION} is full precision (a teacher's); freeze a quantized student"
                )

    def _need(self, name: str, layer: Layer, source: Signal, *kinds: str) -> None:
        if source.kind in kinds:
            return
        what, kind = type(layer).__name__, source.kind
        if isinstance(layer, QuantConv2d | QuantLinear):
            remedy = "put a LIF before it, or a ShortcutQuant before a shortcut's convolution"
        elif isinstance(layer, SpikeMaxPool2d | SpikeSumPool2d | GlobalSpikePool):
            remedy = "a mean or maximum of real values is no integer sum; pool the spikes behind a LIF"
        elif isinstance(layer, QuantBatchNorm2d):
            remedy = "a BN layer must follow a QuantConv2d or QuantLinear, whose scale it folds"
        elif isinstance(layer, Readout):
            remedy = "put a LIF before it"
        else:
            remedy = "see the table of kinds in mdsnn.layers"
        self._fail(name, f"{what} reads {kind}, where {' or '.join(kinds)} are needed; {remedy}")

    def _input(self, node: fx.Node, layer: PixelInput | EventInput, name: str) -> Signal:
        given = node.args[0] if node.args else None
        if self.coding or not isinstance(given, fx.Node) or given.op != "placeholder" or len(given.users) != 1:
            self._fail(name, "one input layer, and nothing else, reads the network's one input")
        shape = (int(layer.table.shape[0]), *self.size)
        if isinstance(layer, PixelInput):
            self.coding = "image"
            layer.constants = InputCodes(shape)
            return Signal("codes", shape, Fraction(1, 1 << IMAGE_FRAC_BITS), *IMAGE_RANGE)
        self.coding = "events"
        layer.constants = InputCodes((self.timesteps, *shape))
        return Signal("codes", shape, Fraction(1), *EVENT_RANGE)

    def _conv(self, node: fx.Node, layer: QuantConv2d, name: str, source: Signal) -> Signal:
        self._need(name, layer, source, "codes", "spikes", "counts")
        if source.shape[0] != layer.in_channels:
            self._fail(name, f"has {layer.in_channels} input channels, but reads {source.shape[0]}")
        if not 0 <= layer.padding < min(layer.kernel_size):
            self._fail(name, f"padding = {layer.padding} must be below its kernel of {layer.kernel_size}")
        shape = (layer.out_channels, *self._windows(name, source, layer.kernel_size, layer.stride, layer.padding))
        return self._sums(node, layer, name, source, shape)

    def _linear(self, node: fx.Node, layer: QuantLinear, name: str, source: Signal) -> Signal:
        self._need(name, layer, source, "codes", "spikes", "counts")
        if source.shape != (layer.in_features, 1, 1):
            self._fail(name, f"reads ({layer.in_features}, 1, 1), but gets {source.shape}; put a Flatten before it")
        return self._sums(node, layer, name, source, (layer.out_features, 1, 1))

    def _windows(
        self, name: str, source: Signal, kernel: tuple[int, int], stride: int, padding: int
    ) -> tuple[int, int]:
        out = [_window(n, k, stride, padding) for n, k in zip(source.shape[1:], kernel, strict=True)]
        if min(out) < 1:
            self._fail(name, f"a window of {kernel} is larger than its input of {source.shape[1:]}")
        return out[0], out[1]

    def _sums(self, node: fx.Node, layer: QuantConv2d | QuantLinear, name: str, source: Signal, shape: Shape) -> Signal:
        codes, alpha = self._weights(layer)
        low, high = formats.accumulator_bounds(codes, source.low, source.high)
        reach = max(-int(low.min()), int(high.max()))
        if reach >= INT32_LIMIT:
            self._fail(
                name,
                f"its accumulator reaches {reach}, beyond 32 bits ({codes[0].size} {layer.weight_bits}-bit weights, "
                f"inputs in {source.low}..{source.high}); use fewer inputs or more groups",
            )
        weight, step = torch.from_numpy(codes), float(source.scale)
        layer.constants = SumCodes(
            weight, layer.weight_bits, alpha, torch.from_numpy(low), torch.from_numpy(high), step, None
        )
        readers = {isinstance(self._layer(user), QuantBatchNorm2d) for user in node.users}
        if readers == {True}:
            return Signal("accumulators", shape, source.scale, int(low.min()), int(high.max()))
        if True in readers:
            self._fail(name, "a BN layer and something else read it; give each its own layer")
        affine = self._affine(layer, None)
        layer.constants = SumCodes(
            weight, layer.weight_bits, alpha, torch.from_numpy(low), torch.from_numpy(high), step, affine
        )
        return self._stream(shape)

    def _weights(self, layer: QuantConv2d | QuantLinear | Readout) -> tuple[npt.NDArray[np.int8], float]:
        """A layer's codes and alpha; quantizer "mint" takes alpha from the LIF that shares it, if one does."""
        if layer.quantizer == "tanh":
            return formats.weight_codes(layer.weight.numpy(), layer.weight_bits)
        codes, peak = uniform_codes(layer.weight, layer.weight_bits)
        shared = None if isinstance(layer, Readout) else layer.alpha
        alpha = float(peak) if shared is None else formats.clamp_alpha(float(shared), self.grid)
        return codes.numpy().astype(np.int8), alpha

    def _stream(self, shape: Shape) -> Signal:
        c = self.grid.saturation
        return Signal("stream", shape, Fraction(1, self.grid.one), -c, c)

    def _affine(self, layer: QuantConv2d | QuantLinear, bn: QuantBatchNorm2d | None) -> AffineCodes:
        """y = gamma*(acc*unit + bias - mu)/sigma + beta, as integers per channel."""
        sums = layer.constants
        assert sums is not None
        channels = sums.weight.shape[0]
        unit = sums.alpha / formats.delta(sums.bits) * sums.step
        bias = np.zeros(channels) if layer.bias is None else layer.bias.double().numpy()
        gamma, beta, mu, sigma = np.ones(channels), np.zeros(channels), np.zeros(channels), np.ones(channels)
        if bn is not None:
            gamma = quantize_bn(bn.weight, bn.bits, bn.grid).numpy() * bn.gain
            beta = quantize_bn(bn.bias, bn.bits, bn.grid).numpy()
            statistics = bn.rounded_statistics(bn.running_mean.double(), bn.running_var.double())
            mu, sigma = (value.numpy() for value in statistics)
        scale, offset = gamma * unit / sigma, beta + gamma * (bias - mu) / sigma
        low, high = sums.low.numpy(), sums.high.numpy()
        table = formats.affine_constants(scale, offset, low, high, self.grid)
        reach = np.abs(table.multiplier) * np.maximum(-low, high) + np.abs(table.offset)
        dtype = torch.int32 if int(reach.max()) < INT32_LIMIT else torch.int64

        def column(values: npt.NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(values.reshape(-1, 1, 1)).to(dtype)

        return AffineCodes(
            column(table.multiplier),
            column(table.offset),
            column(table.shift),
            self.grid.saturation,
            torch.from_numpy(scale),
            torch.from_numpy(offset),
            table.rounding,
        )

    def _bn(self, node: fx.Node, layer: QuantBatchNorm2d, name: str, source: Signal) -> Signal:
        self._need(name, layer, source, "accumulators")
        sums = self._layer(self._sources(node)[0])
        assert isinstance(sums, QuantConv2d | QuantLinear)  # only these give accumulators
        if layer.channels != source.shape[0]:
            self._fail(name, f"has {layer.channels} channels, but reads {source.shape[0]}")
        layer.constants = self._affine(sums, layer)
        return self._stream(source.shape)

    def _add(self, node: fx.Node, name: str) -> Signal:
        sources = self._sources(node)
        if len(node.args) != 2 or len(sources) != 2 or node.kwargs:
            self._fail(name, "an addition takes two values of the residual stream, and nothing else")
        a, b = (self.signals[source] for source in sources)
        for signal, source in zip((a, b), sources, strict=True):
            if signal.kind != "stream":
                self._fail(
                    name,
                    f"adds {signal.kind} of '{self.names[source]}', where the residual stream is needed (a BN's output "
                    "or a sum of such)",
                )
        if a.shape != b.shape:
            self._fail(name, f"adds {a.shape} and {b.shape}")
        return Signal("stream", a.shape, a.scale, a.low + b.low, a.high + b.high)

    def _shortcut(self, layer: ShortcutQuant, name: str, source: Signal) -> Signal:
        self._need(name, layer, source, "stream")
        shift, top = formats.shortcut_shift(layer.bits, self.grid), formats.delta(layer.bits)
        layer.constants = ShiftCodes(shift, layer.bits)
        return Signal("codes", source.shape, Fraction(1 << shift, self.grid.one), -top, top)

    def _lif(self, layer: LIF, name: str, source: Signal) -> Signal:
        self._need(name, layer, source, "stream")
        alpha, bits, grid = float(layer.alpha), layer.bits, self.grid
        pre_fire = layer.quantize == "pre_fire"
        thresholds = uniform_thresholds if layer.quantizer == "mint" else formats.requantize_thresholds
        decode = formats.decode_table(alpha, layer.tau, bits, grid)
        if max(-source.low, source.high) + int(decode.max()) >= INT32_LIMIT // 2:
            self._fail(name, f"its membrane reaches {source.high + int(decode.max())}, beyond 31 bits")
        layer.constants = LifCodes(
            bits=bits,
            alpha=formats.clamp_alpha(alpha, grid),
            decode=torch.from_numpy(decode),
            thresholds=torch.from_numpy(thresholds(alpha, bits, grid)),
            v_th=formats.threshold_code(layer.v_th, grid),
            reset=layer.reset,
            v_soft=formats.soft_reset_code(layer.v_th, grid) if layer.reset == "soft" else 0,
            quantize=layer.quantize,
            q_th=formats.pre_fire_code(layer.v_th, alpha, bits, grid) if pre_fire else 0,
        )
        return Signal("spikes", source.shape, Fraction(1), 0, 1)

    def _max_pool(self, layer: SpikeMaxPool2d, name: str, source: Signal) -> Signal:
        self._need(name, layer, source, "spikes")
        kernel = (layer.kernel_size, layer.kernel_size)
        self._padding(name, layer.padding, layer.kernel_size)
        shape = (source.shape[0], *self._windows(name, source, kernel, layer.stride, layer.padding))
        layer.constants = ()
        return Signal("spikes", shape, source.scale, source.low, source.high)

    def _sum_pool(self, layer: SpikeSumPool2d, name: str, source: Signal) -> Signal:
        self._need(name, layer, source, "spikes", "counts")
        self._padding(name, layer.padding, min(layer.kernel_size))
        layer.constants = ()
        out = self._windows(name, source, layer.kernel_size, layer.stride, layer.padding)
        return self._pooled(source, layer.kernel_size, out)

    def _padding(self, name: str, padding: int, kernel: int) -> None:
        if not 0 <= padding <= kernel // 2:
            self._fail(name, f"padding = {padding} is outside 0..{kernel // 2}, half its window")

    def _pooled(self, source: Signal, kernel: Sequence[int], out: tuple[int, int]) -> Signal:
        area = kernel[0] * kernel[1]
        return Signal("counts", (source.shape[0], *out), source.scale / area, 0, source.high * area)

    def _readout(self, layer: Readout, name: str, source: Signal) -> Signal:
        self._need(name, layer, source, "spikes", "counts")
        c, height, width = source.shape
        if c != layer.in_features:
            self._fail(name, f"has {layer.in_features} inputs, but reads {c} channels")
        codes, alpha = self._weights(layer)
        places = self.timesteps * height * width
        summed = places / source.scale  # whole: the scale of spikes and counts is 1/(kernel areas)
        bias = formats.classifier_bias(layer.bias.numpy(), alpha, layer.weight_bits, int(summed))
        low, high = formats.accumulator_bounds(codes, source.low * places, source.high * places)
        reach = int(max((np.abs(bias) - low).max(), (np.abs(bias) + high).max()))
        if reach >= INT32_LIMIT:
            self._fail(name, f"its logits reach {reach}, beyond 32 bits; use fewer steps or a smaller bias")
        unit = alpha / formats.delta(layer.weight_bits) / float(summed)
        layer.constants = ReadoutCodes(
            torch.from_numpy(codes), layer.weight_bits, alpha, torch.from_numpy(bias.astype(np.int32)), unit
        )
        return Signal("logits", (layer.classes, 1, 1), Fraction(1), -reach, reach)
