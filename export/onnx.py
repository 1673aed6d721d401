"""The ONNX target: a network as integer tensors that stock ONNX Runtime executes, bit for bit.

What each node computes is defined in kernels/reference.py; this file only says it in ONNX operators (opset 17):

    input table, decode, dense BN     Gather
    affine BN, requantize             the floor shift p >> g as (p - Mod(p, 2**g)) / 2**g, g per channel (BitShift is
                                      unsigned only); int64 where the proof's product needs more than 32 bits
    membrane quantizer                Gather from a table over [theta_first - 1, theta_last] with a clamped index, or,
                                      where that table is too large, a binary search over the thresholds
    Conv, Linear                      see the carriers below
    max-pool, sum-pool, readout       MaxPool on uint8; ReduceSum or a convolution with ones; int32 MatMul

Forms. "unrolled" writes the T steps one after the other; "scan" writes the step once, in one Scan whose state is the
decoded membrane codes and the readout's sum. Nodes that are the same at every step stand once, before it, in both.

Carriers. How the products of convolutions and linear layers are summed:

    int    ConvInteger and MatMulInteger, always uint8 x uint8 with one scalar zero point each. On x86 processors
           without VNNI the kernels for uint8 x int8 add pairs of products in saturating 16 bits; those for
           uint8 x uint8 widen to 16 bits first, so they are exact on every CPU. int8 codes are shifted by a zero point
           of 128. Counts beyond 255 are split into base-256 digits, one convolution each, which are scaled and added.
           Kernels may apply zero points after the products, with saturating 32-bit adds, so a layer whose shifted sums
           could reach 2**31 takes int32 MatMul (Linear) or is refused (Conv; more than 14,000 multi-bit inputs).
    float  Conv and MatMul in float32 on integer values, cast back to int32, where the proof bounds the accumulator
           below 2**24: then every partial sum is exact in any order. A layer beyond that falls back to `int` by itself.
           Which one is faster depends on the processor's 8-bit instructions. It relies on float32 sums: an execution
           provider that computes float convolutions in TF32, bf16, or by Winograd or FFT is not exact.

Both carriers give the same integers. A network this file cannot say exactly is a LoweringError that names the node.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mdsnn.kernels.engine import LifTrace, Trace
from mdsnn.kernels.errors import ArtifactError, ConfigError, InputError, LoweringError, MissingError
from mdsnn.kernels.files import read_bounded, write_bytes
from mdsnn.kernels.formats import FLOAT32_EXACT, INT32_LIMIT, Array, accumulator_bounds, delta
from mdsnn.kernels.network import (
    Add,
    BnAffine,
    BnDense,
    Conv,
    Flatten,
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

Form = Literal["unrolled", "scan"]
Carrier = Literal["int", "float"]

FORMS = ("unrolled", "scan")
CARRIERS = ("int", "float")
OPSET = 17
IR_VERSION = 8
"""Opset 17 and IR version 8 are of 2022: older runtimes read them too."""
PRODUCER = "mdsnn"
INPUT, LOGITS = "pixels", "logits"
"""Names of the model's input and of its first output."""
MAX_MODEL = 2**31 - 1
"""A protobuf message must stay below 2 GiB."""
MAX_CONSTANTS = 2**31 - 2**28
"""Most bytes of a model's constants: the operators and their names need the rest."""
MAX_OPERATORS = 200_000
"""Most operators an export writes and `check_model` accepts."""
MAX_DENSE_CODES = 1 << 16
"""Largest dense table of a membrane quantizer; beyond it the thresholds are searched."""
_BYTE = 256
_ZERO = 128
"""Zero point of weights and of signed codes."""

_ATTRIBUTES: Mapping[str, frozenset[str]] = {
    "Add": frozenset(),
    "Cast": frozenset({"to"}),
    "Clip": frozenset(),
    "Concat": frozenset({"axis"}),
    "ConstantOfShape": frozenset({"value"}),
    "Conv": frozenset({"strides", "pads", "group", "kernel_shape"}),
    "ConvInteger": frozenset({"strides", "pads", "group", "kernel_shape"}),
    "Div": frozenset(),
    "Gather": frozenset({"axis"}),
    "Greater": frozenset(),
    "LessOrEqual": frozenset(),
    "MatMul": frozenset(),
    "MatMulInteger": frozenset(),
    "MaxPool": frozenset({"strides", "pads", "kernel_shape"}),
    "Mod": frozenset(),
    "Mul": frozenset(),
    "ReduceSum": frozenset({"keepdims"}),
    "Reshape": frozenset(),
    "Scan": frozenset({"body", "num_scan_inputs"}),
    "Shape": frozenset(),
    "Sub": frozenset(),
    "Unsqueeze": frozenset(),
    "Where": frozenset(),
}
"""Every operator this file emits, with the attributes it sets."""


def _onnx() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper
        import onnx.shape_inference
    except ImportError as fault:
        raise MissingError(
            f"onnx does not import ({fault}): pip install 'mdsnn[train]' (or: pip install onnx)"
        ) from None
    return onnx


# --------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class _Fired:
    """What a LIF node left behind: h (int32), s (bool), the next step's leak (int32), and for a trace q + delta."""

    h: str
    s: str
    leak: str
    code: str


class _Writer:
    """Writes one model. Values are known by their ONNX names; every name ends in # and a number of its own.

    Spikes are bool until something reads them as numbers; codes, counts, accumulators and streams are int32. Between
    steps a LIF node keeps decode[q + delta], looked up from the membrane at once: one table instead of two.
    """

    def __init__(self, network: IntegerNetwork, form: str, carrier: str, trace: bool) -> None:
        self.onnx = _onnx()
        self.network, self.form, self.carrier, self.trace = network, form, carrier, trace
        self.proof = network.proof
        self.out: list[Any] = []
        """The operators of the graph being written: the main graph's, or the Scan body's."""
        self.constants: dict[tuple[Any, ...], str] = {}
        self.initializers: list[Any] = []
        self.casts: dict[tuple[str, str], str] = {}
        self.static: dict[str, str] = {}
        self.count = 0
        self.bytes = 0
        self.scope = ""

    # ------------------------------------------------------------------------------------------ small pieces

    def op(self, kind: str, inputs: Sequence[str], label: str, output: str | None = None, **attributes: Any) -> str:
        """Append one operator; returns the name of its output."""
        if self.count >= MAX_OPERATORS:
            remedy = "Use form='scan'" if self.form == "unrolled" else "Split the network"
            raise LoweringError(f"{label!r}: the model needs more than {MAX_OPERATORS} operators. {remedy}")
        self.count += 1
        name = output or f"{label}{self.scope}#{self.count}"
        self.out.append(self.onnx.helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, label: str, value: npt.ArrayLike, dtype: Any) -> str:
        """The initializer that holds `value`, stored once.

        A label with a slash, "<node>/<what>", stands for one value; what nodes share is known by its content.
        """
        key: tuple[Any, ...] = (label, np.dtype(dtype).str)
        if "/" in label and key in self.constants:
            return self.constants[key]
        array = np.array(value, dtype=dtype, order="C")  # keeps a scalar a scalar
        if "/" not in label:
            key = (*key, array.shape, array.tobytes())
        if key not in self.constants:
            self.bytes += array.nbytes
            if self.bytes > MAX_CONSTANTS:
                raise LoweringError(
                    f"{label!r}: the constants take over {MAX_CONSTANTS} bytes, and an ONNX file holds less than 2 GiB."
                    " Export with --bn-table affine, or a smaller network"
                )
            name = f"{label}#c{len(self.constants)}"
            self.initializers.append(self.onnx.numpy_helper.from_array(array, name))
            self.constants[key] = name
        return self.constants[key]

    def int32(self, value: int | Array) -> str:
        """A shared int32 constant."""
        return self.constant("int32", value, np.int32)

    def cast(self, x: str, to: str, label: str) -> str:
        """`x` as another type; each pair is cast once. `x` must have been written to the graph being written."""
        if (x, to) not in self.casts:
            self.casts[x, to] = self.op("Cast", [x], f"{label}/{to}", to=getattr(self.onnx.TensorProto, to.upper()))
        return self.casts[x, to]

    def number(self, name: str, x: str) -> str:
        """The value of node `name` in int32: spikes are cast, all else is int32 already."""
        return self.cast(x, "int32", name) if self.proof.kinds[name] == "spikes" else x

    def floor_shift(self, p: str, divisor: str, label: str) -> str:
        """floor(p / divisor) for a signed p: Div truncates, but p - Mod(p, divisor) is a multiple of the divisor."""
        rest = self.op("Mod", [p, divisor], f"{label}/rest")
        return self.op("Div", [self.op("Sub", [p, rest], f"{label}/multiple"), divisor], f"{label}/shifted")

    # -------------------------------------------------------------------------------- convolutions and products

    def digits(self, name: str, x: str) -> Iterator[tuple[str, int, int, int]]:
        """The value of node `name` as uint8 digits: (tensor, zero point, largest byte, factor), low digit first."""
        lo, hi = self.proof.ranges[name]
        if lo < 0:  # int8 codes
            shifted = self.op("Add", [x, self.int32(_ZERO)], f"{name}/shifted")
            yield self.cast(shifted, "uint8", name), _ZERO, _BYTE - 1, 1
            return
        factor = 1
        while hi >= _BYTE:
            low = self.op("Mod", [x, self.int32(_BYTE)], f"{name}/digit")
            yield self.cast(low, "uint8", name), 0, _BYTE - 1, factor
            x = self.op("Div", [x, self.int32(_BYTE)], f"{name}/digits")
            hi, factor = hi // _BYTE, factor * _BYTE
        yield self.cast(x, "uint8", name), 0, hi, factor

    def fits_int(self, name: str, fan_in: int) -> bool:
        """Whether uint8 sums over `fan_in` inputs and their zero-point corrections stay below 2**31 together."""
        lo, hi = self.proof.ranges[name]
        largest, zero = (_BYTE - 1, _ZERO) if lo < 0 else (min(hi, _BYTE - 1), 0)
        return (largest + zero) * (_BYTE - 1 + _ZERO) * fan_in < INT32_LIMIT

    def is_float(self, reach: int) -> bool:
        """Whether the float carrier is chosen, and exact for accumulators of at most `reach`."""
        return self.carrier == "float" and reach < FLOAT32_EXACT

    def reach(self, node: Conv | Linear) -> int:
        lo, hi = self.proof.channel_bounds[node.name]
        return max(-int(lo.min()), int(hi.max()))

    def sum_digits(self, node: Node, parts: list[tuple[str, int]]) -> str:
        """The sum of partial accumulators, each times its digit's factor."""
        total = ""
        for part, factor in parts:
            scaled = part if factor == 1 else self.op("Mul", [part, self.int32(factor)], f"{node.name}/scaled")
            total = self.op("Add", [total, scaled], f"{node.name}/sum") if total else scaled
        return total

    def zero_points(self, x_zero: int, weight_zero: int) -> list[str]:
        return [self.constant("zero_point", zero, np.uint8) for zero in (x_zero, weight_zero)]

    def conv(self, node: Conv, x: str) -> str:
        weight = node.weight
        window: dict[str, Any] = {
            "strides": [node.stride] * 2,
            "pads": [node.padding] * 4,
            "group": node.groups,
            "kernel_shape": list(weight.shape[2:]),
        }
        if self.is_float(self.reach(node)):
            kernel = self.constant(f"{node.name}/weight", weight, np.float32)
            acc = self.op("Conv", [self.cast(x, "float", node.source), kernel], f"{node.name}/acc", **window)
            return self.cast(acc, "int32", node.name)
        fan_in = int(np.prod(weight.shape[1:]))
        if not self.fits_int(node.source, fan_in):
            remedy = "use carrier='float', or more groups" if self.reach(node) < FLOAT32_EXACT else "use more groups"
            raise LoweringError(
                f"node {node.name!r}: {fan_in} inputs of {self.proof.ranges[node.source]} a channel are too many for"
                f" ConvInteger: its sums with zero points could reach 2**31 and saturate. To cure it, {remedy}"
            )
        kernel = self.constant(f"{node.name}/weight", weight.astype(np.int16) + _ZERO, np.uint8)
        parts = []
        for digit, zero, _, factor in self.digits(node.source, x):
            inputs = [digit, kernel, *self.zero_points(zero, _ZERO)]
            parts.append((self.op("ConvInteger", inputs, f"{node.name}/acc", **window), factor))
        return self.sum_digits(node, parts)

    def linear(self, node: Linear, x: str) -> str:
        out, features = node.weight.shape
        if self.is_float(self.reach(node)):
            acc = self.matmul(node, x, True)
        elif not self.fits_int(node.source, features):
            acc = self.matmul(node, self.number(node.source, x), False)
        else:
            weight = self.constant(f"{node.name}/weight", node.weight.T.astype(np.int16) + _ZERO, np.uint8)
            parts = []
            for digit, zero, _, factor in self.digits(node.source, x):
                flat = self.op("Reshape", [digit, self.shape(0, features)], f"{node.name}/flat")
                inputs = [flat, weight, *self.zero_points(zero, _ZERO)]
                parts.append((self.op("MatMulInteger", inputs, f"{node.name}/acc"), factor))
            acc = self.sum_digits(node, parts)
        return self.op("Reshape", [acc, self.shape(0, out, 1, 1)], f"{node.name}/value")

    def matmul(self, node: Linear | Readout, x: str, exact_float: bool) -> str:
        """x [N, in, 1, 1] times the weight: [N, out] int32. `x` is int32; if `exact_float` it may be spikes too."""
        if exact_float:
            x = self.cast(x, "float", node.name)
        flat = self.op("Reshape", [x, self.shape(0, node.weight.shape[1])], f"{node.name}/flat")
        weight = self.constant(f"{node.name}/weight", node.weight.T, np.float32 if exact_float else np.int32)
        acc = self.op("MatMul", [flat, weight], f"{node.name}/acc")
        return self.cast(acc, "int32", node.name) if exact_float else acc

    def shape(self, *sizes: int) -> str:
        """A shape for Reshape: 0 keeps the axis, -1 is what remains."""
        return self.constant("shape", sizes, np.int64)

    # -------------------------------------------------------------------------------------- one method a node

    def input_table(self, node: InputTable, pixels: str) -> str:
        channels = len(node.table)
        rows = np.arange(channels, dtype=np.int32).reshape(channels, 1, 1) * _BYTE
        index = self.op("Add", [self.cast(pixels, "int32", INPUT), self.int32(rows)], f"{node.name}/index")
        table = self.constant(f"{node.name}/table", node.table.reshape(-1), np.int32)
        return self.op("Gather", [table, index], f"{node.name}/value", axis=0)

    def per_channel(self, node: Node, what: str, values: npt.ArrayLike, dtype: Any) -> str:
        return self.constant(f"{node.name}/{what}", np.asarray(values).reshape(-1, 1, 1), dtype)

    def bn_affine(self, node: BnAffine, acc: str) -> str:
        c = self.network.grid.saturation
        wide = self.proof.product_bits[node.name] == 64
        dtype = np.int64 if wide else np.int32
        if wide:
            acc = self.cast(acc, "int64", node.name)
        product = self.op(
            "Mul", [acc, self.per_channel(node, "multiplier", node.multiplier, dtype)], f"{node.name}/product"
        )
        p = self.op("Add", [product, self.per_channel(node, "offset", node.offset, dtype)], f"{node.name}/sum")
        if node.shift.any():
            p = self.floor_shift(
                p, self.per_channel(node, "divisor", 1 << node.shift.astype(np.int64), dtype), node.name
            )
        if wide:
            return self.saturate_wide(p, c, node.name)
        return self.op("Clip", [p, self.int32(-c), self.int32(c)], f"{node.name}/value")

    def saturate_wide(self, p: str, c: int, label: str) -> str:
        """clamp(p, -c, c) in int32 of an int64 p, |p| < 2**62, by its halves: p = high * 2**31 + low.

        Clip, Min and Max of int64 compare wrongly on x86 in ONNX Runtime up to 1.31.1 at least
        (https://github.com/microsoft/onnxruntime/pull/32475), so int64 tensors are only added, multiplied and divided.
        """
        half = self.constant("half", INT32_LIMIT, np.int64)
        rest = self.op("Mod", [p, half], f"{label}/rest")
        multiple = self.op("Sub", [p, rest], f"{label}/multiple")
        high = self.cast(self.op("Div", [multiple, half], f"{label}/high"), "int32", label)
        low = self.cast(rest, "int32", label)
        zero = self.int32(0)
        negative = self.op("Greater", [zero, high], f"{label}/negative")
        base = self.op("Where", [negative, self.int32(-INT32_LIMIT), zero], f"{label}/base")
        near = self.op("Add", [low, base], f"{label}/near")  # p itself, if high is 0 or -1
        y = self.op("Clip", [near, self.int32(-c), self.int32(c)], f"{label}/clipped")
        above = self.op("Greater", [high, zero], f"{label}/above")
        y = self.op("Where", [above, self.int32(c), y], f"{label}/capped")
        below = self.op("Greater", [self.int32(-1), high], f"{label}/below")
        return self.op("Where", [below, self.int32(-c), y], f"{label}/value")

    def bn_dense(self, node: BnDense, acc: str) -> str:
        lo, hi = self.proof.channel_bounds[node.source]
        sizes = hi - lo + 1
        start = np.cumsum(sizes) - sizes - lo
        table = self.constant(f"{node.name}/table", node.table, np.int32)
        index = self.op("Add", [acc, self.per_channel(node, "start", start, np.int32)], f"{node.name}/index")
        return self.op("Gather", [table, index], f"{node.name}/value", axis=0)

    def requantize(self, node: Requantize, x: str) -> str:
        raised = self.op("Add", [x, self.int32(1 << (node.shift - 1))], f"{node.name}/raised")
        shifted = self.floor_shift(raised, self.int32(1 << node.shift), node.name)
        top = delta(node.bits)
        return self.op("Clip", [shifted, self.int32(-top), self.int32(top)], f"{node.name}/value")

    def membrane_index(self, node: Lif, u: str) -> tuple[str, Array]:
        """An int32 tensor of indices, and the codes they index: codes[index] = q(u) + delta = #{thresholds <= u}."""
        low, high = self.proof.membranes[node.name]
        low, high = min(low, -node.v_soft), max(high, 0)
        # thresholds outside the reachable range of u only need to stay on their side of it
        theta = np.clip(node.thresholds.astype(np.int64), low, high + 1)
        first, last = int(theta[0]) - 1, int(theta[-1])
        if last - first < MAX_DENSE_CODES:
            clamped = self.op("Clip", [u, self.int32(first), self.int32(last)], f"{node.name}/clamped")
            index = self.op("Sub", [clamped, self.int32(first)], f"{node.name}/index")
            return index, np.searchsorted(theta, np.arange(first, last + 1), side="right")
        rounds = len(theta).bit_length()
        padded = np.full((1 << rounds) - 1, INT32_LIMIT - 1, np.int64)  # never <= u
        padded[: len(theta)] = theta
        table = self.constant(f"{node.name}/thresholds", padded, np.int32)
        position = self.int32(0)
        for step in (1 << r for r in reversed(range(rounds))):
            probe = self.op("Add", [position, self.int32(step - 1)], f"{node.name}/probe")
            threshold = self.op("Gather", [table, probe], f"{node.name}/threshold", axis=0)
            passed = self.op("LessOrEqual", [threshold, u], f"{node.name}/passed")
            further = self.op("Where", [passed, self.int32(step), self.int32(0)], f"{node.name}/further")
            position = self.op("Add", [position, further], f"{node.name}/position")
        return position, np.arange(len(theta) + 1)

    def look_up(self, node: Lif, what: str, table: Array, index: str) -> str:
        """table[index], int32."""
        stored = self.constant(f"{node.name}/{what}", table, np.int32)
        return self.op("Gather", [stored, index], f"{node.name}/{what}", axis=0)

    def lif(self, node: Lif, x: str, leak: str) -> _Fired:
        """One step from the leak decode[q + delta]. The code itself is only looked up where something reads it."""
        top = delta(node.bits)
        h = self.op("Add", [x, leak], f"{node.name}/membrane")
        if node.quantize == "pre_fire":
            index, codes = self.membrane_index(node, h)
            code = self.look_up(node, "code", codes, index)
            s = self.op("Greater", [code, self.int32(node.q_th + top)], f"{node.name}/spikes")
            code = self.op("Where", [s, self.int32(top), code], f"{node.name}/kept")
            return _Fired(h, s, self.look_up(node, "leak", node.decode, code), code)
        s = self.op("Greater", [h, self.int32(node.v_th)], f"{node.name}/spikes")
        low = self.int32(0)
        if node.reset == "soft":
            low = self.op("Sub", [h, self.int32(node.v_soft)], f"{node.name}/lowered")
        u = self.op("Where", [s, low, h], f"{node.name}/reset")
        index, codes = self.membrane_index(node, u)
        code = self.look_up(node, "code", codes, index) if self.trace else ""
        return _Fired(h, s, self.look_up(node, "leak", node.decode[codes], index), code)

    def max_pool(self, node: MaxPool, x: str) -> str:
        window: dict[str, Any] = {
            "kernel_shape": [node.kernel] * 2,
            "strides": [node.stride] * 2,
            "pads": [node.padding] * 4,
        }
        pooled = self.op("MaxPool", [self.cast(x, "uint8", node.source)], f"{node.name}/pooled", **window)
        return self.cast(pooled, "bool", node.name)

    def sum_pool(self, node: SumPool, x: str) -> str:
        hi = self.proof.ranges[node.name][1]
        _, height, width = self.proof.shapes[node.source]
        kh, kw = node.kernel_height, node.kernel_width
        if (kh, kw, node.padding) == (height, width, 0):
            axes = self.constant("axes", [2, 3], np.int64)
            return self.op("ReduceSum", [self.number(node.source, x), axes], f"{node.name}/value", keepdims=1)
        window: dict[str, Any] = {"kernel_shape": [kh, kw], "strides": [node.stride] * 2, "pads": [node.padding] * 4}
        planes = self.shape(-1, 1, height, width)
        if self.is_float(hi):
            flat = self.op("Reshape", [self.cast(x, "float", node.source), planes], f"{node.name}/planes")
            ones = self.constant(f"{node.name}/ones", np.ones((1, 1, kh, kw)), np.float32)
            total = self.cast(self.op("Conv", [flat, ones], f"{node.name}/sums", **window), "int32", node.name)
        else:
            ones = self.constant(f"{node.name}/ones", np.ones((1, 1, kh, kw)), np.uint8)
            parts = []
            for digit, _, _, factor in self.digits(node.source, x):
                flat = self.op("Reshape", [digit, planes], f"{node.name}/planes")
                inputs = [flat, ones, *self.zero_points(0, 0)]
                parts.append((self.op("ConvInteger", inputs, f"{node.name}/sums", **window), factor))
            total = self.sum_digits(node, parts)
        return self.op("Reshape", [total, self.shape(-1, *self.proof.shapes[node.name])], f"{node.name}/value")

    def value(self, node: Node, values: Mapping[str, str], frame: str) -> str:
        """Write a node that keeps no state; returns the name of its value."""
        x = values[node.inputs[0]] if node.inputs else frame
        match node:
            case InputTable():
                return self.input_table(node, x)
            case Conv():
                return self.conv(node, x)
            case Linear():
                return self.linear(node, x)
            case BnAffine():
                return self.bn_affine(node, x)
            case BnDense():
                return self.bn_dense(node, x)
            case Add():
                return self.op("Add", [x, values[node.other]], f"{node.name}/value")
            case Requantize():
                return self.requantize(node, x)
            case MaxPool():
                return self.max_pool(node, x)
            case SumPool():
                return self.sum_pool(node, x)
            case Flatten():
                shape = self.shape(0, *self.proof.shapes[node.name])
                return self.op("Reshape", [x, shape], f"{node.name}/value")
        raise LoweringError(f"node {node.name!r}: the ONNX target does not know {type(node).__name__}")

    # -------------------------------------------------------------------------------------------- the T steps

    def step(self, frame: str, leaks: Mapping[str, str], total: str) -> tuple[dict[str, _Fired], str]:
        """Write one timestep.

        leaks    LIF node -> decode[q + delta] of the step before    total  the readout's sum, "" before the first step
        returns  what each LIF node left behind, and the readout's sum
        """
        values = dict(self.static)
        fired: dict[str, _Fired] = {}
        for node in self.network.nodes[:-1]:
            if isinstance(node, Lif):
                fired[node.name] = self.lif(node, values[node.source], leaks[node.name])
                values[node.name] = fired[node.name].s
            elif not self.proof.static[node.name]:
                values[node.name] = self.value(node, values, frame)
        readout = self.network.readout
        x = self.number(readout.source, values[readout.source])
        return fired, self.op("Add", [total, x], f"{readout.name}/total") if total else x

    def traced(self, fired: Mapping[str, _Fired]) -> dict[str, str]:
        """Output name -> tensor of one step: h int32, s uint8, q int8 of every LIF node."""
        tensors = {}
        for node in self.network.lifs:
            state = fired[node.name]
            tensors[f"{node.name}.h"] = state.h
            tensors[f"{node.name}.s"] = self.cast(state.s, "uint8", node.name)
            q = self.op("Sub", [state.code, self.int32(delta(node.bits))], f"{node.name}/q")
            tensors[f"{node.name}.q"] = self.cast(q, "int8", node.name)
        return tensors

    def first_leaks(self) -> dict[str, int]:
        """The leak of q = 0."""
        return {node.name: int(node.decode[delta(node.bits)]) for node in self.network.lifs}

    def unrolled(self) -> str:
        """T copies of the step; returns the readout's sum."""
        leaks = {name: self.int32(leak) for name, leak in self.first_leaks().items()}
        steps: dict[str, list[str]] = {}
        total = ""
        for t in range(self.network.timesteps):
            self.scope = f"@{t}"
            frame = INPUT
            if self.network.input.coding == "events":
                frame = self.op("Gather", [INPUT, self.constant("step", t, np.int64)], f"{INPUT}/frame", axis=0)
            fired, total = self.step(frame, leaks, total)
            leaks = {name: state.leak for name, state in fired.items()}
            if self.trace:
                axis = self.constant("axes", [0], np.int64)
                for name, tensor in self.traced(fired).items():
                    stacked = self.op("Unsqueeze", [tensor, axis], f"{name}/step")
                    steps.setdefault(name, []).append(stacked)
        self.scope = ""
        for name, parts in steps.items():
            self.op("Concat", parts, name, output=name, axis=0)
        return total

    def scan(self) -> str:
        """One Scan over the T steps; returns the readout's sum."""
        make = self.onnx.helper
        proto = self.onnx.TensorProto
        network, readout = self.network, self.network.readout
        events = network.input.coding == "events"
        shapes = [self.proof.shapes[name] for name in (*(node.name for node in network.lifs), readout.source)]
        sizes = self.op("Shape", [INPUT], f"{INPUT}/shape")
        samples = self.op("Gather", [sizes, self.constant("axis", [int(events)], np.int64)], "samples", axis=0)
        starts = []
        for shape, start in zip(shapes, [*self.first_leaks().values(), 0], strict=True):
            full = self.op("Concat", [samples, self.shape(*shape)], "state/shape", axis=0)
            value = self.onnx.numpy_helper.from_array(np.array([start], np.int32), "")
            starts.append(self.op("ConstantOfShape", [full], "state/start", value=value))
        outer, outer_casts = self.out, self.casts
        self.out, self.casts, self.scope = [], {}, "@t"
        leaks = {node.name: f"{node.name}/before@t#0" for node in network.lifs}
        total, frame = f"{readout.name}/before@t#0", f"{INPUT}/frame@t#0"
        fired, summed = self.step(frame if events else INPUT, leaks, total)
        traced = self.traced(fired) if self.trace else {}
        body_nodes, self.out, self.casts, self.scope = self.out, outer, outer_casts, ""

        def info(name: str, element: int, shape: Sequence[int]) -> Any:
            return make.make_tensor_value_info(name, element, ["N", *shape])

        before = [*leaks.values(), total]
        after = [*(state.leak for state in fired.values()), summed]
        inputs = [info(name, proto.INT32, shape) for name, shape in zip(before, shapes, strict=True)]
        if events:
            inputs.append(info(frame, proto.UINT8, self.proof.shapes[network.nodes[0].name]))
            sequence = INPUT
        else:  # a Scan runs as long as what it reads: the image is the same at every step, so it reads their numbers
            inputs.append(make.make_tensor_value_info(frame, proto.INT32, []))
            sequence = self.constant("steps", np.arange(network.timesteps), np.int32)
        outputs = [info(name, proto.INT32, shape) for name, shape in zip(after, shapes, strict=True)]
        for name, tensor in traced.items():
            outputs.append(info(tensor, _trace_type(proto, name), self.proof.shapes[name[:-2]]))
        body = make.make_graph(body_nodes, "step", inputs, outputs)
        last = [f"{name}/after" for name in before]
        node = make.make_node("Scan", [*starts, sequence], [*last, *traced], name="steps", body=body, num_scan_inputs=1)
        self.out.append(node)
        return last[-1]

    def logits(self, total: str) -> None:
        """The classifier, once a sample: int32 or float MatMul, then the bias."""
        readout, steps = self.network.readout, self.network.timesteps
        lo, hi = accumulator_bounds(readout.weight, *(steps * end for end in self.proof.ranges[readout.source]))
        reach = max(-int(lo.min()), int(hi.max()))
        acc = self.matmul(readout, total, self.is_float(reach))
        self.op("Add", [acc, self.constant(f"{readout.name}/bias", readout.bias, np.int32)], LOGITS, output=LOGITS)

    def model(self, digest: str | None) -> Any:
        make, proto, network = self.onnx.helper, self.onnx.TensorProto, self.network
        steps, readout = network.timesteps, network.readout
        for node in network.nodes[:-1]:
            if self.proof.static[node.name]:
                self.static[node.name] = self.value(node, self.static, INPUT)
        if self.proof.static[readout.source]:  # no LIF: the same sum at every step
            x = self.static[readout.source]
            total = self.op("Mul", [x, self.int32(steps)], f"{readout.name}/total")
        else:
            total = self.unrolled() if self.form == "unrolled" else self.scan()
        self.logits(total)
        spec = network.input
        lead: list[str | int] = ["N"] if spec.coding == "image" else [steps, "N"]
        pixels = make.make_tensor_value_info(INPUT, proto.UINT8, [*lead, spec.channels, spec.height, spec.width])
        outputs = [make.make_tensor_value_info(LOGITS, proto.INT32, ["N", network.classes])]
        if self.trace:
            for lif in network.lifs:
                for name in (f"{lif.name}.{what}" for what in "hsq"):
                    shape = [steps, "N", *self.proof.shapes[lif.name]]
                    outputs.append(make.make_tensor_value_info(name, _trace_type(proto, name), shape))
        graph = make.make_graph(self.out, PRODUCER, [pixels], outputs, self.initializers)
        model = make.make_model(
            graph, ir_version=IR_VERSION, opset_imports=[make.make_opsetid("", OPSET)], producer_name=PRODUCER
        )
        notes = {"carrier": self.carrier, "form": self.form, "timesteps": str(steps)}
        if digest is not None:
            notes["digest"] = digest
        if network.labels:
            notes["labels"] = json.dumps(list(network.labels), ensure_ascii=True)
        for key in sorted(notes):
            entry = model.metadata_props.add()
            entry.key, entry.value = f"{PRODUCER}.{key}", notes[key]
        return model


def _trace_type(proto: Any, name: str) -> int:
    return int({"h": proto.INT32, "s": proto.UINT8, "q": proto.INT8}[name[-1]])


def to_onnx(
    network: IntegerNetwork,
    *,
    form: Form | str = "unrolled",
    carrier: Carrier | str = "int",
    trace: bool = False,
    digest: str | None = None,
) -> bytes:
    """A proven network as an ONNX model of integer tensors, without external data. See the head of this file.

    form     "unrolled": T copies of the step; "scan": one Scan over T
    carrier  "int": ConvInteger and MatMulInteger; "float": float32 on integer values where that is proven exact
    trace    also return h, s and q of every LIF node and step
    digest   the artifact's sha256 in hex, kept as the model's metadata "mdsnn.digest"
    returns  the model's bytes; the same arguments give the same bytes in every process (of one onnx version)
             input   "pixels" uint8 [N, C, H, W] for image coding, [T, N, C, H, W] for events; N is free, at least 1
             outputs "logits" int32 [N, classes]; with `trace` also, for every LIF node in order, "<name>.h" int32,
                     "<name>.s" uint8 and "<name>.q" int8, each [T, N, C, H, W]. The class is the lowest index of the
                     largest logit.
    raises   LoweringError  for a network that cannot be said exactly: more multi-bit inputs than ConvInteger sums
                            safely, constants of about 2 GiB, more than 200,000 operators
             ConfigError    for an unknown form or carrier
             MissingError   where onnx is not installed
    """
    for what, value, known in (("form", form, FORMS), ("carrier", carrier, CARRIERS)):
        if value not in known:
            raise ConfigError(f"to_onnx: {what} = {value!r} is none of {', '.join(known)}")
    model = _Writer(network, form, carrier, trace).model(digest)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def save_onnx(path: str | os.PathLike[str], model: bytes, *, force: bool = False) -> int:
    """Write a model whole or not at all; returns its size in bytes. Raises StorageError as `atomic_write` does."""
    write_bytes(path, model, force=force)
    return len(model)


def load_onnx(path: str | os.PathLike[str], *, limit: int = MAX_MODEL) -> bytes:
    """Read a model of at most `limit` bytes and check it; raises InputError, or ArtifactError as `check_model` does."""
    content = read_bounded(path, limit, what="model (.onnx)")
    check_model(content, where=os.fspath(path), limit=limit)
    return content


# -------------------------------------------------------------------------------------------------- checking


def check_model(model: bytes, *, where: str = "ONNX model", limit: int = MAX_MODEL) -> None:
    """Refuse what is not a model of the kind `to_onnx` writes, before a runtime sees it.

    Checked: the size; opset and IR version; only operators and attributes this file emits, at most one Scan and nothing
    nested in it; no function, no external or sparse data; the input and outputs' names and types; onnx.checker with
    shape inference. That the model computes a given network is not checked here: `verify` runs it.

    where   the model's name in messages
    raises  ArtifactError  naming the fault
            MissingError   where onnx is not installed
    """
    onnx = _onnx()

    def refuse(what: str) -> ArtifactError:
        return ArtifactError(f"{where}: {what}")

    if not 0 < len(model) <= limit:
        raise refuse(f"{len(model)} bytes are outside 1..{limit}")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(model)
    except Exception as fault:  # protobuf's DecodeError has a home that changed between its versions
        raise refuse(f"not an ONNX file ({fault})") from None
    if proto.ir_version != IR_VERSION or [(o.domain, o.version) for o in proto.opset_import] != [("", OPSET)]:
        raise refuse(f"not opset {OPSET} of IR version {IR_VERSION}, which mdsnn writes. Export it again")
    if proto.functions or proto.training_info:
        raise refuse("it holds functions or training steps, which mdsnn never writes")
    _check_graph(onnx, proto.graph, refuse)
    _check_signature(onnx, proto.graph, refuse)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as fault:  # ValidationError, InferenceError and whatever the C++ side raises
        raise refuse(
            f"onnx.checker refuses it: {str(fault).splitlines()[0] if str(fault) else type(fault).__name__}"
        ) from None


def _check_tensor(onnx: Any, tensor: Any, refuse: Any) -> None:
    if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise refuse(f"tensor {tensor.name!r:.200} points to an external file, which mdsnn never reads")


def _check_graph(onnx: Any, graph: Any, refuse: Any, inner: bool = False) -> None:
    """Operators, attributes and tensors of a graph and of its Scan's body, which is `inner`."""
    if graph.sparse_initializer:
        raise refuse("it holds sparse tensors, which mdsnn never writes")
    bodies: list[Any] = []
    for tensor in graph.initializer:
        _check_tensor(onnx, tensor, refuse)
    for node in graph.node:
        if node.domain or node.op_type not in _ATTRIBUTES:
            raise refuse(f"node {node.name!r:.200}: operator {node.op_type!r:.60} is not one mdsnn emits")
        for attribute in node.attribute:
            several = (attribute.graphs, attribute.tensors, attribute.sparse_tensors, attribute.type_protos)
            foreign = any(several) or attribute.HasField("sparse_tensor") or attribute.ref_attr_name
            if foreign or attribute.name not in _ATTRIBUTES[node.op_type]:
                raise refuse(f"node {node.name!r:.200}: attribute {attribute.name!r:.60} is not one mdsnn sets")
            if attribute.HasField("t"):
                _check_tensor(onnx, attribute.t, refuse)
            if attribute.HasField("g"):
                bodies.append(attribute.g)
    if len(graph.node) + sum(len(body.node) for body in bodies) > MAX_OPERATORS:
        raise refuse(f"its operators are more than {MAX_OPERATORS}")
    if len(bodies) > 1 or (inner and bodies):
        raise refuse("it holds more than one Scan, which mdsnn never writes")
    for body in bodies:
        _check_graph(onnx, body, refuse, inner=True)


def _check_signature(onnx: Any, graph: Any, refuse: Any) -> None:
    """One uint8 input "pixels"; output "logits" int32, then h, s and q of each LIF node."""
    proto = onnx.TensorProto
    inputs = [(value.name, value.type.tensor_type.elem_type) for value in graph.input]
    if inputs != [(INPUT, proto.UINT8)]:
        raise refuse(f"its inputs are {[name for name, _ in inputs]!r:.200}, where {INPUT!r} uint8 is due")
    shape = graph.input[0].type.tensor_type.shape.dim
    free = [place for place, size in enumerate(shape) if not size.HasField("dim_value")]
    if len(shape) not in (4, 5) or free != [len(shape) - 4]:
        raise refuse(f"input {INPUT!r} is not [N, C, H, W] or [T, N, C, H, W] with only N free")
    names = [value.name for value in graph.output]
    types = [value.type.tensor_type.elem_type for value in graph.output]
    due = [proto.INT32, *(proto.INT32, proto.UINT8, proto.INT8) * ((len(names) - 1) // 3)]
    lifs = [name[:-2] for name in names[1::3]]
    if names != [LOGITS, *(f"{lif}.{what}" for lif in lifs for what in "hsq")] or types != due:
        raise refuse(f"its outputs are {names!r:.200}, where {LOGITS!r} int32 and h, s and q of each layer are due")


# --------------------------------------------------------------------------------------------------- running


class OnnxExecutor:
    """A model in ONNX Runtime on the CPU: a callable from pixels to a Trace, as `verify` wants it.

    model    a network, which is exported with its trace; or the bytes of a model, which are checked first. A model
             without trace outputs returns a Trace with no LIF nodes.
    threads  how many processors an operator may use
    form, carrier  as in `to_onnx`, for a network
    raises   MissingError   where onnx or onnxruntime is not installed
             ArtifactError  for bytes that are not a model of our kind, or that ONNX Runtime refuses
    """

    def __init__(
        self,
        model: IntegerNetwork | bytes,
        *,
        threads: int = 1,
        form: Form | str = "unrolled",
        carrier: Carrier | str = "int",
    ) -> None:
        try:
            import onnxruntime
        except ImportError as fault:
            raise MissingError(
                f"onnxruntime does not import ({fault}): pip install 'mdsnn[train]' (or: pip install onnxruntime)"
            ) from None
        if type(threads) is not int or not 1 <= threads <= 1024:
            raise ConfigError(f"threads = {threads!r} is outside 1..1024")
        if isinstance(model, IntegerNetwork):
            content = to_onnx(model, form=form, carrier=carrier, trace=True)
        else:
            content = model
            check_model(content)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong is raised, not printed
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as fault:  # its exceptions share no base but Exception
            raise ArtifactError(f"ONNX Runtime {onnxruntime.__version__} refuses the model: {fault}") from fault
        self.version: str = onnxruntime.__version__
        """ONNX Runtime's version."""
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        """What the exporter noted: mdsnn.form, mdsnn.carrier, mdsnn.timesteps, mdsnn.digest, mdsnn.labels."""
        self._shape = [size if type(size) is int else None for size in self._session.get_inputs()[0].shape]
        self._outputs = [output.name for output in self._session.get_outputs()]

    def _check(self, pixels: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        array = np.asarray(pixels)
        due = "[" + ", ".join("N" if size is None else str(size) for size in self._shape) + "]"
        if array.dtype != np.uint8 or array.ndim != len(self._shape):
            raise InputError(f"the pixels are {array.dtype} {list(array.shape)}; uint8 {due} was expected")
        fits = all(size in (None, have) for size, have in zip(self._shape, array.shape, strict=True))
        if not fits or array.size == 0:
            raise InputError(f"the pixels have shape {list(array.shape)}; uint8 {due} was expected, N at least 1")
        return np.ascontiguousarray(array)

    def run(self, pixels: npt.ArrayLike) -> Trace:
        """Run whole samples.

        pixels   uint8 [N, C, H, W] for image coding, [T, N, C, H, W] for events
        returns  logits (N, classes) int32, and h, s, q of the LIF nodes if the model has these outputs
        raises   InputError     for pixels that do not fit
                 ArtifactError  where ONNX Runtime fails on the model
        """
        values = dict(zip(self._outputs, self._execute(None, pixels), strict=True))
        lifs = {
            name[:-2]: LifTrace(values[name], values[name[:-2] + ".s"], values[name[:-2] + ".q"])
            for name in self._outputs[1:]
            if name.endswith(".h")
        }
        return Trace(lifs, values[LOGITS])

    def logits(self, pixels: npt.ArrayLike) -> npt.NDArray[np.int32]:
        """Only the logits (N, classes) int32: ONNX Runtime then returns nothing else."""
        logits: npt.NDArray[np.int32] = self._execute([LOGITS], pixels)[0]
        return logits

    def _execute(self, outputs: list[str] | None, pixels: npt.ArrayLike) -> list[Array]:
        array = self._check(pixels)
        try:
            values: list[Array] = self._session.run(outputs, {INPUT: array})
        except Exception as fault:  # as above; our own models only fail where memory ends
            raise ArtifactError(f"ONNX Runtime {self.version} fails on {array.size} pixels: {fault}") from fault
        return values

    __call__ = run


__all__ = [
    "CARRIERS",
    "FORMS",
    "OnnxExecutor",
    "check_model",
    "load_onnx",
    "save_onnx",
    "to_onnx",
]
