"""The engine in C: plans made from proven networks, run by one C call for a batch.

`NativeBackend` packs a network once into what src/mdsnn.h calls a plan: a list of operations, where each value lies in
one scratch arena, and weights in the order the kernels read them. Every number in it comes from the network's proof, so
the C code needs no checks. A plan is immutable; a call takes its scratch and state from Python, so calls may run side
by side (the GIL is released).

`MDSNN_ISA=base|avx2|avx512|amx` forces an instruction set; all give the same integers.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .engine import Activity, LifTrace, Result, State, Trace
from .errors import ConfigError, MissingError
from .formats import Array, delta
from .network import (
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

ISA_LEVELS = ("base", "avx2", "avx512", "amx")
"""Instruction sets the C sources are compiled for, each a superset of those before it; entry i is enum value i."""

_CONTRACT = 1  # MDSNN_CONTRACT of src/mdsnn.h
_CHUNK = 16  # most steps a pass takes: bounds the scratch of a network with many steps
_ALIGN = 64
_COMPARED = 32  # MDSNN_MAX_COMPARED of src/kernels.h
_TABLE = 1 << 16  # largest dense table of membrane codes
_I8, _I16, _I32 = range(3)  # enum mdsnn_type
_CURE = "install a C compiler (gcc or clang), then reinstall: pip install --force-reinstall --no-deps mdsnn"


@functools.cache
def _load() -> tuple[Any, str | None]:
    """The compiled module, or why it is not there."""
    try:
        module = importlib.import_module("._native", __package__)
    except ImportError as fault:
        return None, f"the compiled extension does not import ({fault}): {_CURE}"
    if getattr(module.lib, "MDSNN_CONTRACT", 0) != _CONTRACT:
        return None, f"the compiled extension is of another version: {_CURE}"
    return module, None


def missing() -> str | None:
    """Why the compiled engine cannot run here, with the line that cures it; None if it can."""
    return _load()[1]


def _module() -> Any:
    module, reason = _load()
    if reason is not None:
        raise MissingError(f"engine 'native': {reason}")
    return module


def isa_levels() -> tuple[str, ...]:
    """The instruction sets this machine can run, slowest first; raises MissingError if the extension is not there."""
    lib = _module().lib
    return tuple(name for level, name in enumerate(ISA_LEVELS) if lib.mdsnn_supported(level))


def isa() -> str:
    """The instruction set in use: MDSNN_ISA if set, else the best this machine can run.

    raises  ConfigError   if MDSNN_ISA names no instruction set
            MissingError  if this machine cannot run the one it names, or the extension is not there
    """
    levels = isa_levels()
    chosen = os.environ.get("MDSNN_ISA")
    if not chosen:
        return levels[-1]
    if chosen not in ISA_LEVELS:
        raise ConfigError(f"MDSNN_ISA={chosen!r} is none of {', '.join(ISA_LEVELS)}")
    if chosen not in levels:
        raise MissingError(f"MDSNN_ISA={chosen}: this machine runs {', '.join(levels)}; choose one of these")
    return chosen


# ----------------------------------------------------------------------------------------------------- the plan


@dataclass
class _Value:
    """Where a value will lie; `first` and `last` are the operations that write it and read it last."""

    name: str
    shape: tuple[int, int, int]
    type: int
    pitch: int
    fixed: bool
    first: int
    last: int
    keep: bool = False
    counter: int = -1
    offset: int = 0

    def size(self, chunk: int) -> int:
        _, height, width = self.shape
        return height * width * (1 if self.fixed else chunk) * self.pitch << self.type


def _up(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


@dataclass(frozen=True)
class _Reach:
    """Which u a LIF quantizes, from its proof, and the thresholds that lie between them."""

    lo: int
    hi: int
    code_first: int
    thresholds: Array

    @classmethod
    def of(cls, lif: Lif, membrane: tuple[int, int]) -> _Reach:
        lo, hi = membrane
        if lif.quantize == "post_reset":
            fired = (0, 0) if lif.reset == "hard" else (lif.v_th + 1 - lif.v_soft, hi - lif.v_soft)
            lo, hi = min(lo, *fired), max(min(hi, lif.v_th), *fired)
        thresholds = lif.thresholds.astype(np.int64)
        below = int((thresholds <= lo).sum())
        return cls(lo, hi, below - delta(lif.bits), thresholds[below : int((thresholds <= hi).sum())])


def _narrow_stream(network: IntegerNetwork) -> bool:
    """Whether every stream value, membrane and membrane constant fits 16 bits."""
    proof = network.proof
    for node in network.nodes:
        lo, hi = proof.ranges[node.name]
        if proof.kinds[node.name] == "stream" and not -32767 <= lo <= hi <= 32767:
            return False
        if isinstance(node, Lif):
            reach = _Reach.of(node, proof.membranes[node.name])
            lo, hi = proof.membranes[node.name]
            if min(lo, reach.lo, int(node.decode.min())) < -32767 or max(hi, reach.hi, int(node.decode.max())) > 32766:
                return False
            if node.v_soft > 32767:
                return False
    return True


class _Plan:
    """Builds the C structures of a network. Keeps every array they point into alive."""

    def __init__(self, network: IntegerNetwork, level: int) -> None:
        module = _module()
        self.ffi, self.lib, self.network, self.level = module.ffi, module.lib, network, level
        self.keep: list[Any] = []
        self.chunk = min(network.timesteps, _CHUNK)
        self.stream_type = _I16 if _narrow_stream(network) else _I32
        self.index: dict[str, int] = {}
        self.values: list[_Value] = []
        self.state_bytes = 0
        self.counters: dict[str, int] = {}
        proof = network.proof
        for place, node in enumerate(network.nodes[:-1]):
            self.index[node.name] = place
            shape = proof.shapes[node.name]
            self.values.append(
                _Value(node.name, shape, self._type(node), shape[0], proof.static[node.name], place, place)
            )
        for place, node in enumerate(network.nodes):
            for source in node.inputs:
                value = self.values[self.index[source]]
                value.last = place
                value.keep |= value.fixed and (not proof.static[node.name] or isinstance(node, Readout))
            if isinstance(node, Conv | Linear | Readout):
                self._count(node.source)
            elif isinstance(node, Lif):
                self._count(node.name)
        self._place()
        self.lifs = {lif.name: number for number, lif in enumerate(network.lifs)}
        ops = [self._op(node) for node in network.nodes]
        self.struct = self._struct(ops)

    def _type(self, node: Node) -> int:
        proof = self.network.proof
        if proof.kinds[node.name] == "stream":
            return self.stream_type
        lo, hi = proof.ranges[node.name]
        return _I8 if proof.kinds[node.name] != "accumulators" and lo >= -128 and hi <= 127 else _I32

    def _count(self, name: str) -> None:
        if name not in self.counters:
            self.counters[name] = len(self.counters)
            self.values[self.index[name]].counter = self.counters[name]

    def _place(self) -> None:
        """Give every value its offset: kept ones in the state, others in scratch, first fit among those alive."""
        self.scratch_bytes = 0
        alive: list[tuple[int, int, int]] = []  # offset, end, last
        for value in self.values:
            size = _up(value.size(self.chunk))
            if value.keep:
                value.offset = self._state(size)
                continue
            alive = [entry for entry in alive if entry[2] >= value.first]
            at = 0
            for offset, end, _ in sorted(alive):
                if offset - at >= size:
                    break
                at = max(at, end)
            value.offset = at
            alive.append((at, at + size, value.last))
            self.scratch_bytes = max(self.scratch_bytes, at + size)

    def _state(self, size: int) -> int:
        offset, self.state_bytes = self.state_bytes, self.state_bytes + _up(size)
        return offset

    def _pointer(self, ctype: str, array: npt.ArrayLike, dtype: Any) -> Any:
        packed = np.ascontiguousarray(array, dtype=dtype)
        pointer = self.ffi.cast(f"const {ctype} *", self.ffi.from_buffer(packed)) if packed.size else self.ffi.NULL
        self.keep.append(packed)
        return pointer

    def _op(self, node: Node) -> dict[str, Any]:
        """The fields of mdsnn_op for a node."""
        proof, index = self.network.proof, self.index
        inputs = [index[source] for source in node.inputs]
        op: dict[str, Any] = {
            "source": inputs[0] if inputs else -1,
            "other": inputs[1] if len(inputs) > 1 else -1,
            "out": index.get(node.name, -1),
            "fixed": int(proof.static[node.name] and not isinstance(node, Readout)),
            "lif": -1,
        }
        match node:
            case InputTable():
                op.update(kind=self.lib.MDSNN_INPUT, weight=self._pointer("int8_t", node.table, np.int8))
            case Conv():
                op.update(
                    kind=self.lib.MDSNN_CONV,
                    kernel_height=node.weight.shape[2],
                    kernel_width=node.weight.shape[3],
                    stride=node.stride,
                    padding=node.padding,
                    groups=node.groups,
                    weight=self._pointer("int8_t", _by_input(node.weight, node.groups), np.int8),
                )
            case Linear():
                op.update(
                    kind=self.lib.MDSNN_CONV,
                    kernel_height=1,
                    kernel_width=1,
                    stride=1,
                    groups=1,
                    weight=self._pointer("int8_t", node.weight.T, np.int8),
                )
            case BnAffine():
                op.update(
                    kind=self.lib.MDSNN_BN_AFFINE,
                    multiplier=self._pointer("int32_t", node.multiplier, np.int32),
                    offset=self._pointer("int64_t", node.offset, np.int64),
                    shift=self._pointer("uint8_t", node.shift, np.uint8),
                    wide=int(proof.product_bits[node.name] == 64),
                    saturation=self.network.grid.saturation,
                )
            case BnDense():
                lo, hi = proof.channel_bounds[node.source]
                sizes = hi - lo + 1
                op.update(
                    kind=self.lib.MDSNN_BN_DENSE,
                    table=self._pointer("int32_t", node.table, np.int32),
                    start=self._pointer("int64_t", np.cumsum(sizes) - sizes - lo, np.int64),
                )
            case Add():
                op.update(kind=self.lib.MDSNN_ADD)
            case Requantize():
                op.update(kind=self.lib.MDSNN_REQUANTIZE, bits_shift=node.shift, top=delta(node.bits))
            case Lif():
                op.update(kind=self.lib.MDSNN_LIF, **self._lif(node))
            case MaxPool():
                op.update(
                    kind=self.lib.MDSNN_MAX_POOL,
                    kernel_height=node.kernel,
                    kernel_width=node.kernel,
                    stride=node.stride,
                    padding=node.padding,
                )
            case SumPool():
                op.update(
                    kind=self.lib.MDSNN_SUM_POOL,
                    kernel_height=node.kernel_height,
                    kernel_width=node.kernel_width,
                    stride=node.stride,
                    padding=node.padding,
                )
            case Flatten():
                op.update(kind=self.lib.MDSNN_FLATTEN)
            case Readout():
                op.update(
                    kind=self.lib.MDSNN_READOUT,
                    weight=self._pointer("int8_t", node.weight, np.int8),
                    table=self._pointer("int32_t", node.bias, np.int32),
                    state=self._state(4 * node.weight.shape[1]),
                )
            case _:
                raise NotImplementedError(type(node).__name__)
        return op

    def _lif(self, node: Lif) -> dict[str, Any]:
        reach = _Reach.of(node, self.network.proof.membranes[node.name])
        thresholds = reach.thresholds
        fields: dict[str, Any] = {
            "lif": self.lifs[node.name],
            "search": self.lib.MDSNN_COMPARE,
            "thresholds": len(thresholds),
            "code_first": reach.code_first,
            "threshold": self._pointer("int32_t", thresholds, np.int32),
            "decode": self._pointer("int32_t", node.decode, np.int32),
            "top": delta(node.bits),
            "v_th": node.v_th if self.stream_type == _I32 else min(node.v_th, 32767),
            "v_soft": node.v_soft,
            "q_th": node.q_th,
            "pre_fire": int(node.quantize == "pre_fire"),
            "soft": int(node.reset == "soft"),
            "state": self._state(int(np.prod(self.network.proof.shapes[node.name]))),
        }
        if len(thresholds) > _COMPARED:
            fields["search"] = self.lib.MDSNN_BISECT
            base = int(thresholds[0]) - 1
            if int(thresholds[-1]) - base < _TABLE:
                u = np.arange(base, int(thresholds[-1]) + 1)
                codes = reach.code_first + np.searchsorted(thresholds, u, side="right")
                fields.update(
                    search=self.lib.MDSNN_TABLE,
                    code=self._pointer("int8_t", codes, np.int8),
                    code_base=base,
                    code_count=len(codes),
                )
        return fields

    def _struct(self, ops: list[dict[str, Any]]) -> Any:
        ffi = self.ffi
        c_ops = ffi.new("mdsnn_op[]", ops)
        c_values = ffi.new(
            "mdsnn_value[]",
            [
                {
                    "offset": value.offset,
                    "place": self.lib.MDSNN_STATE if value.keep else self.lib.MDSNN_SCRATCH,
                    "type": value.type,
                    "height": value.shape[1],
                    "width": value.shape[2],
                    "channels": value.shape[0],
                    "pitch": value.pitch,
                    "fixed": int(value.fixed),
                    "counter": value.counter,
                }
                for value in self.values
            ],
        )
        self.keep += [c_ops, c_values]
        spec = self.network.input
        return ffi.new(
            "mdsnn_plan *",
            {
                "ops": c_ops,
                "values": c_values,
                "op_count": len(ops),
                "value_count": len(self.values),
                "channels": spec.channels,
                "height": spec.height,
                "width": spec.width,
                "classes": self.network.classes,
                "stream_type": self.stream_type,
                "chunk": self.chunk,
                "counters": len(self.counters),
                "counted": self._state(8 * len(self.counters)),
                "state_bytes": self.state_bytes,
                "scratch_bytes": self.scratch_bytes,
            },
        )


def _by_input(weight: Array, groups: int) -> Array:
    """(C_out, C_in/groups, kh, kw) to [group][ky][kx][in][out]: an input's weights for all outputs lie together."""
    c_out, per_group, kh, kw = weight.shape
    return weight.reshape(groups, c_out // groups, per_group, kh, kw).transpose(0, 3, 4, 2, 1)


def _arena(size: int) -> npt.NDArray[np.uint8]:
    """Uninitialized bytes that start on a cache line."""
    block = np.empty(size + _ALIGN, np.uint8)
    start = -block.ctypes.data % _ALIGN
    return block[start : start + size]


# ------------------------------------------------------------------------------------------------- the backend


class NativeBackend:
    """A network ready to run in C. Immutable: calls may run side by side.

    network  any IntegerNetwork (building one proved it)
    raises   MissingError  if the extension is not there, or cannot run what MDSNN_ISA names
             ConfigError   if MDSNN_ISA names no instruction set
    """

    name = "native"

    def __init__(self, network: IntegerNetwork) -> None:
        self.network = network
        self.isa = isa()
        """The instruction set in use."""
        self._plan = _Plan(network, ISA_LEVELS.index(self.isa))
        self._neurons = {lif.name: int(np.prod(network.proof.shapes[lif.name])) for lif in network.lifs}
        self._readers = {node.name: node.source for node in network.nodes if isinstance(node, Conv | Linear | Readout)}
        # scratch is kept between calls, for a fresh one costs a page fault every 4 KiB; a deque's ends are thread-safe
        self._scratch: deque[npt.NDArray[np.uint8]] = deque(maxlen=64)

    def run(self, pixels: npt.NDArray[np.uint8], trace: bool) -> Result:
        """All timesteps of checked pixels [N, C, H, W] or [T, N, C, H, W]."""
        plan = self._plan
        arena = self._take()
        try:
            return self._call(pixels, self.network.timesteps, True, arena[plan.scratch_bytes :], 0, arena, trace)
        finally:
            self._scratch.append(arena)

    def start(self, samples: int) -> State:
        """A fresh state, q = 0 everywhere, for `samples` samples."""
        return _NativeState(self, samples)

    def _take(self) -> npt.NDArray[np.uint8]:
        try:
            return self._scratch.pop()
        except IndexError:
            return _arena(self._plan.scratch_bytes + self._plan.state_bytes)

    def _call(
        self,
        pixels: npt.NDArray[np.uint8],
        steps: int,
        fresh: bool,
        state: npt.NDArray[np.uint8],
        state_pitch: int,
        scratch: npt.NDArray[np.uint8],
        trace: bool,
    ) -> Result:
        plan, ffi, network = self._plan, self._plan.ffi, self.network
        samples = pixels.shape[-4]
        logits = np.empty((samples, network.classes), np.int32)
        counts = np.zeros((len(plan.counters), steps), np.int64)
        call = ffi.new("mdsnn_call *")
        call.pixels = ffi.cast("const uint8_t *", pixels.ctypes.data)
        call.pixel_step = pixels.strides[0] if pixels.ndim == 5 else 0
        call.samples, call.steps, call.fresh, call.state_pitch = samples, steps, int(fresh), state_pitch
        call.state = ffi.cast("uint8_t *", state.ctypes.data)
        call.scratch = ffi.cast("uint8_t *", scratch.ctypes.data)
        call.logits = ffi.cast("int32_t *", logits.ctypes.data)
        call.counts = ffi.cast("int64_t *", counts.ctypes.data)
        lifs: dict[str, LifTrace] = {}
        if trace:
            for lif in network.lifs:
                shape = (steps, samples, *network.proof.shapes[lif.name])
                lifs[lif.name] = LifTrace(
                    np.empty(shape, np.int32), np.empty(shape, np.uint8), np.empty(shape, np.int8)
                )
            traced = lifs.values()
            h = ffi.new("int32_t *[]", [ffi.cast("int32_t *", lif.h.ctypes.data) for lif in traced])
            s = ffi.new("uint8_t *[]", [ffi.cast("uint8_t *", lif.s.ctypes.data) for lif in traced])
            q = ffi.new("int8_t *[]", [ffi.cast("int8_t *", lif.q.ctypes.data) for lif in traced])
            call.trace_h, call.trace_s, call.trace_q = h, s, q
        plan.lib.mdsnn_run(plan.struct, plan.level, call)
        spikes_in = {name: counts[plan.counters[source]] for name, source in self._readers.items()}
        spikes_out = {lif.name: counts[plan.counters[lif.name]] for lif in network.lifs}
        activity = Activity(samples, self._neurons, spikes_out, spikes_in)
        return Result(logits, activity, Trace(lifs, logits) if trace else None)


class _NativeState:
    def __init__(self, backend: NativeBackend, samples: int) -> None:
        self._backend = backend
        self._pitch = backend._plan.state_bytes
        self._state = _arena(samples * self._pitch)
        self._fresh = True

    def step(self, frame: npt.NDArray[np.uint8]) -> Result:
        """Run one timestep on `frame` [N, C, H, W]."""
        backend = self._backend
        arena = backend._take()
        try:
            result = backend._call(frame, 1, self._fresh, self._state, self._pitch, arena, True)
        finally:
            backend._scratch.append(arena)
        self._fresh = False
        return result
