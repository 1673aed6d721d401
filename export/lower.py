"""Lowering: a frozen student becomes an IntegerNetwork.

`mdsnn.freeze.freeze` has already made every integer; this file writes them into nodes, one for each layer, and chooses
the form of each BN table. Node names are the layers' paths in the model (a LIF keeps its name in every executor).
Where a node has no layer of its own, its name says whose it is: 'block.add', 'conv.table', 'readout.pool'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from mdsnn.freeze import Plan, Step, free_name, frozen_trace, plan_of
from mdsnn.kernels import reference
from mdsnn.kernels.engine import LifTrace, Trace
from mdsnn.kernels.errors import LoweringError, NetworkError
from mdsnn.kernels.formats import Array, Grid, dense_table, narrowest
from mdsnn.kernels.network import (
    Add,
    BnAffine,
    BnDense,
    Conv,
    Flatten,
    InputSpec,
    InputTable,
    IntegerNetwork,
    Lif,
    Linear,
    MaxPool,
    Node,
    Readout,
    Requantize,
    SumPool,
)
from mdsnn.layers import (
    LIF,
    AffineCodes,
    EventInput,
    PixelInput,
    QuantBatchNorm2d,
    QuantConv2d,
    QuantLinear,
    ShortcutQuant,
    SpikeMaxPool2d,
    SpikeSumPool2d,
    SumCodes,
)
from mdsnn.layers import Readout as ReadoutLayer

from .verify import Executor

BN_TABLES = ("auto", "affine", "dense")
BN_BUDGET = 65536
"""Bytes a layer's dense BN table may take to be chosen by "auto"."""
DENSE_LIMIT = 1 << 28
"""Bytes a layer's dense BN table may take at all."""


def lower(
    model: nn.Module, *, bn_table: str = "auto", bn_budget: int = BN_BUDGET, labels: Sequence[str] = ()
) -> IntegerNetwork:
    """The IntegerNetwork of a frozen model; it computes the frozen forward's integers.

    bn_table   "affine"  multiplier, offset and shift per channel
               "dense"   every reachable accumulator's value, made from the affine form and checked against it
               "auto"    dense where a layer's table takes at most bn_budget bytes at its narrowest dtype
    labels     class names, one a logit, or none
    returns    a proven network. Its notes, which no engine reads, record the real constants behind the integers, as
               float.hex: each layer's alpha, a code's step, the largest rounding of a BN multiplier in grid steps;
               and the bytes of both forms of each BN table.
    raises     LoweringError  if the model is not frozen, an option is unknown, or the network cannot be proven
    """
    if bn_table not in BN_TABLES:
        raise LoweringError(f"bn_table {bn_table!r} is not one of {', '.join(BN_TABLES)}")
    plan = plan_of(model)
    writer = _Writer(model, plan, bn_table, bn_budget)
    channels, height, width = plan.steps[0].signal.shape
    try:
        for step in plan.steps:
            writer.write(step)
        return IntegerNetwork(
            nodes=tuple(writer.nodes),
            input=InputSpec(channels, height, width, plan.coding),
            timesteps=plan.timesteps,
            grid=plan.grid,
            labels=tuple(labels),
            notes=writer.notes,
        )
    except NetworkError as fault:
        raise LoweringError(f"the frozen model is no valid network: {fault}") from fault


def _array(values: Tensor) -> Array:
    array: Array = values.reshape(-1).numpy()
    return array


def tabulate(node: BnAffine, low: Array, high: Array, grid: Grid) -> BnDense:
    """The dense form of an affine BN table, for accumulators of low..high per channel.

    raises  LoweringError  if the dense form differs from the affine form at any reachable accumulator
    """
    table = dense_table(node.multiplier, node.offset, node.shift, low, high, grid)
    ends = np.cumsum(high - low + 1)
    for c in range(low.size):
        one, row = slice(c, c + 1), table[ends[c] - (high[c] - low[c] + 1) : ends[c]]
        acc = np.arange(low[c], high[c] + 1, dtype=np.int64)[None, None, None]
        want = reference.bn_affine(acc, node.multiplier[one], node.offset[one], node.shift[one], grid.saturation)
        got = reference.bn_dense(acc, row, low[one], high[one])
        if not np.array_equal(got, want):
            at = int(np.flatnonzero(got != want)[0])
            raise LoweringError(
                f"layer '{node.name}': channel {c}: the dense table has {got.flat[at]} at accumulator {acc.flat[at]}, "
                f"the affine form {want.flat[at]}"
            )
    return BnDense(node.name, node.source, table)


def affine_bytes(node: BnAffine) -> int:
    """Bytes of an affine BN table at the narrowest dtypes: multiplier, offset, and one byte of shift a channel."""
    a, b = (narrowest(int(v.min()), int(v.max())).itemsize for v in (node.multiplier, node.offset))
    return int(node.shift.size) * (a + b + 1)


class _Writer:
    """Nodes and notes, a step at a time. `ends` maps a step to the node that carries its value."""

    def __init__(self, model: nn.Module, plan: Plan, bn_table: str, bn_budget: int) -> None:
        self.model, self.plan = model, plan
        self.bn_table, self.bn_budget = bn_table, bn_budget
        self.nodes: list[Node] = []
        self.notes: dict[str, str] = {}
        self.ends: dict[str, str] = {}
        self.shapes = {step.name: step.signal.shape for step in plan.steps}

    def write(self, step: Step) -> None:
        if step.op == "Add":
            source, other = (self.ends[name] for name in step.sources)
            self._put(step, Add(step.name, source, other))
            return
        layer = self.model.get_submodule(step.name)
        how: dict[str, Callable[[Step, Any], None]] = {
            "PixelInput": self._input,
            "EventInput": self._input,
            "QuantConv2d": self._sums,
            "QuantLinear": self._sums,
            "QuantBatchNorm2d": self._bn,
            "ShortcutQuant": self._shortcut,
            "LIF": self._lif,
            "SpikeMaxPool2d": self._max_pool,
            "SpikeSumPool2d": self._sum_pool,
            "GlobalSpikePool": self._global_pool,
            "Flatten": self._flatten,
            "Readout": self._readout,
        }
        how[step.op](step, layer)

    def _put(self, step: Step, node: Node) -> None:
        self.nodes.append(node)
        self.ends[step.name] = node.name

    def _source(self, step: Step) -> str:
        return self.ends[step.sources[0]]

    def _note(self, name: str, **values: float) -> None:
        for key, value in values.items():
            self.notes[f"{name}.{key}"] = float(value).hex()

    # -------------------------------------------------------------------------------------------- the layers

    def _input(self, step: Step, layer: PixelInput | EventInput) -> None:
        self._put(step, InputTable(step.name, layer.table.numpy()))

    def _sums(self, step: Step, layer: QuantConv2d | QuantLinear) -> None:
        codes = layer.constants
        assert codes is not None  # frozen
        weight, source = codes.weight.numpy(), self._source(step)
        self._note(step.name, alpha=codes.alpha, step=codes.step)
        if isinstance(layer, QuantConv2d):
            self._put(step, Conv(step.name, source, weight, codes.bits, layer.stride, layer.padding, layer.groups))
        else:
            self._put(step, Linear(step.name, source, weight, codes.bits))
        if codes.affine is not None:
            self._table(step, free_name(f"{step.name}.table", self.shapes), step.name, codes, codes.affine)

    def _bn(self, step: Step, layer: QuantBatchNorm2d) -> None:
        before = self.model.get_submodule(step.sources[0])
        assert isinstance(before, QuantConv2d | QuantLinear)  # freeze saw to it
        assert layer.constants is not None  # frozen
        assert before.constants is not None
        self._table(step, step.name, self._source(step), before.constants, layer.constants)

    def _table(self, step: Step, name: str, source: str, sums: SumCodes, codes: AffineCodes) -> None:
        low, high = sums.low.numpy(), sums.high.numpy()
        affine = BnAffine(name, source, _array(codes.multiplier), _array(codes.offset), _array(codes.shift))
        dense = int((high - low + 1).sum()) * narrowest(-codes.saturation, codes.saturation).itemsize
        self._note(name, rounding=codes.rounding)
        self.notes[f"{name}.bytes"] = f"affine {affine_bytes(affine)}, dense {dense}"
        if self.bn_table == "affine" or (self.bn_table == "auto" and dense > self.bn_budget):
            self._put(step, affine)
            return
        if dense > DENSE_LIMIT:
            raise LoweringError(
                f"layer '{name}': its dense table takes {dense} bytes, over the limit of {DENSE_LIMIT}; "
                "use bn_table 'auto' or 'affine'"
            )
        self._put(step, tabulate(affine, low, high, self.plan.grid))

    def _shortcut(self, step: Step, layer: ShortcutQuant) -> None:
        codes = layer.constants
        assert codes is not None  # frozen
        self._put(step, Requantize(step.name, self._source(step), codes.shift, codes.bits))

    def _lif(self, step: Step, layer: LIF) -> None:
        codes = layer.constants
        assert codes is not None  # frozen
        self._note(step.name, alpha=codes.alpha, tau=layer.tau, v_th=layer.v_th)
        self._put(
            step,
            Lif(
                step.name,
                self._source(step),
                bits=codes.bits,
                decode=codes.decode.numpy(),
                thresholds=codes.thresholds.numpy(),
                v_th=codes.v_th,
                reset=codes.reset,
                v_soft=codes.v_soft,
                quantize=codes.quantize,
                q_th=codes.q_th,
            ),
        )

    def _max_pool(self, step: Step, layer: SpikeMaxPool2d) -> None:
        self._put(step, MaxPool(step.name, self._source(step), layer.kernel_size, layer.stride, layer.padding))

    def _sum_pool(self, step: Step, layer: SpikeSumPool2d) -> None:
        self._put(step, SumPool(step.name, self._source(step), *layer.kernel_size, layer.stride, layer.padding))

    def _global_pool(self, step: Step, layer: nn.Module) -> None:
        _, height, width = self.shapes[step.sources[0]]
        self._put(step, SumPool(step.name, self._source(step), height, width))

    def _flatten(self, step: Step, layer: nn.Module) -> None:
        self._put(step, Flatten(step.name, self._source(step)))

    def _readout(self, step: Step, layer: ReadoutLayer) -> None:
        codes = layer.constants
        assert codes is not None  # frozen
        _, height, width = self.shapes[step.sources[0]]
        source = self._source(step)
        if (height, width) != (1, 1):
            pool = SumPool(free_name(f"{step.name}.pool", self.shapes), source, height, width)
            self.nodes.append(pool)
            source = pool.name
        self._note(step.name, alpha=codes.alpha, unit=codes.unit)
        self._put(step, Readout(step.name, source, codes.weight.numpy(), codes.bits, codes.bias.numpy()))


def torch_executor(model: nn.Module) -> Executor:
    """Frozen PyTorch as an executor for `verify`; raises LoweringError if `model` is not frozen."""
    plan_of(model)

    def execute(pixels: npt.NDArray[np.uint8]) -> Trace:
        lifs, logits = frozen_trace(model, pixels)
        return Trace({name: LifTrace(*states) for name, states in lifs.items()}, logits)

    return execute
