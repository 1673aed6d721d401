"""Running a network: one call for whole samples, a stream by timestep, traces, and counts of activity.

`Engine(network)` picks the fastest kernels there are: `native` (C), else `numba`, else `reference` (NumPy), all with
the same integers. `MDSNN_ENGINE` chooses by name, and a chosen engine that is not there is an error. `run(x)` is whole
samples: no state is left behind between calls. `stream()` keeps the state between steps.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from . import reference
from .errors import ConfigError, InputError, MissingError, NetworkError
from .formats import Array
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

log = logging.getLogger(__name__)

KERNELS = ("native", "numba", "reference")
"""Engines by name, fastest first."""
_CHUNK = 32
"""Images a thread takes at a time."""
_UINT8 = np.dtype(np.uint8)


@dataclass(frozen=True)
class LifTrace:
    """What a LIF node did, [T, N, C, H, W]: h (membrane after input) int32, s (spikes) uint8, q (codes kept) int8."""

    h: npt.NDArray[np.int32]
    s: npt.NDArray[np.uint8]
    q: npt.NDArray[np.int8]


@dataclass(frozen=True)
class Trace:
    """Every LIF node's states at every step, by node name, and the logits (N, classes) int32."""

    lifs: Mapping[str, LifTrace]
    logits: npt.NDArray[np.int32]


class Counts(Mapping[str, npt.NDArray[np.int64]]):
    """Counters by name: rows of one array, looked up when they are asked for.

    counts  (counters, T) int64      rows  name -> row
    """

    __slots__ = ("counts", "rows")

    def __init__(self, counts: npt.NDArray[np.int64], rows: Mapping[str, int]) -> None:
        self.counts, self.rows = counts, rows

    def __getitem__(self, name: str) -> npt.NDArray[np.int64]:
        row: npt.NDArray[np.int64] = self.counts[self.rows[name]]
        return row

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Activity:
    """Spike counts summed over the samples of a run.

    samples     N
    neurons     Lif name -> neurons of one sample
    spikes_out  Lif name -> (T,) int64, spikes a step
    spikes_in   Conv, Linear and Readout name -> (T,) int64, inputs that are not 0, a step
    """

    samples: int
    neurons: Mapping[str, int]
    spikes_out: Mapping[str, npt.NDArray[np.int64]]
    spikes_in: Mapping[str, npt.NDArray[np.int64]]

    def density(self, lif: str) -> float:
        """Share of the neuron-steps of `lif` that fired, 0..1."""
        counts = self.spikes_out[lif]
        return float(counts.sum()) / (self.samples * self.neurons[lif] * len(counts))


@dataclass(frozen=True)
class Result:
    """Logits (N, classes) int32, the activity, and the trace if one was asked for."""

    logits: npt.NDArray[np.int32]
    activity: Activity
    trace: Trace | None = None

    @property
    def predictions(self) -> npt.NDArray[np.int64]:
        """Class of each sample, (N,): the lowest index of the largest logit."""
        classes: npt.NDArray[np.int64] = np.argmax(self.logits, axis=1)
        return classes


class State(Protocol):
    """A batch in flight: `step` takes it one timestep on."""

    def step(self, frame: npt.NDArray[np.uint8]) -> Result:
        """Run one timestep on `frame` [N, C, H, W] (the same image every time for image coding).

        returns  a Result of this step: logits of the sum so far, counts with T = 1, a trace with T = 1
        """
        ...


class Backend(Protocol):
    """A network made ready to run by one kind of kernels. Immutable: calls may run side by side."""

    name: str

    def run(self, pixels: npt.NDArray[np.uint8], trace: bool, threads: int = 1) -> Result:
        """All timesteps of checked pixels [N, C, H, W] or [T, N, C, H, W].

        threads  how many may share the work of a sample; a backend may use fewer
        """
        ...

    def start(self, samples: int) -> State:
        """A fresh state, q = 0 everywhere, for `samples` samples."""
        ...


# --------------------------------------------------------------------------------- kernels called node by node


class _NodeState:
    def __init__(self, backend: NodeBackend, samples: int) -> None:
        self.backend, self.samples = backend, samples
        proof = backend.network.proof
        self.q = {lif.name: np.zeros((samples, *proof.shapes[lif.name]), np.int64) for lif in backend.network.lifs}
        self.total: Array | None = None
        self.values: dict[str, Array] = {}

    def step(self, frame: npt.NDArray[np.uint8]) -> Result:
        network, kernels, proof = self.backend.network, self.backend.kernels, self.backend.network.proof
        lifs: dict[str, LifTrace] = {}
        spikes_in: dict[str, Array] = {}
        first = self.total is None
        logits: Array = np.zeros((0, 0), np.int64)
        for node in network.nodes:
            if isinstance(node, Conv | Linear | Readout):
                spikes_in[node.name] = np.array([np.count_nonzero(self.values[node.source])], np.int64)
            if isinstance(node, Readout):
                x = self.values[node.source]
                self.total = x if self.total is None else self.total + x
                logits = kernels.readout(self.total, node.weight, node.bias)
            elif isinstance(node, Lif):
                h, s, q = self.backend.lif(node, self.values[node.source], self.q[node.name])
                self.q[node.name], self.values[node.name] = q, s
                lifs[node.name] = LifTrace(h.astype(np.int32)[None], s.astype(np.uint8)[None], q.astype(np.int8)[None])
            elif first or not proof.static[node.name]:
                self.values[node.name] = self.backend.value(node, self.values, frame)
        counts = {name: np.array([np.count_nonzero(lif.s)], np.int64) for name, lif in lifs.items()}
        activity = Activity(self.samples, self.backend.neurons, counts, spikes_in)
        out = logits.astype(np.int32)
        return Result(out, activity, Trace(lifs, out))


class NodeBackend:
    """Runs a network by calling a module of kernels (reference.py) once a node and step."""

    def __init__(self, network: IntegerNetwork, kernels: ModuleType, name: str) -> None:
        self.network, self.kernels, self.name = network, kernels, name
        self.neurons = {lif.name: int(np.prod(network.proof.shapes[lif.name])) for lif in network.lifs}

    def start(self, samples: int) -> State:
        return _NodeState(self, samples)

    def run(self, pixels: npt.NDArray[np.uint8], trace: bool, threads: int = 1) -> Result:
        samples = pixels.shape[-4]
        state = self.start(samples)
        steps: list[Result] = []
        for t in range(self.network.timesteps):
            step = state.step(pixels if pixels.ndim == 4 else pixels[t])
            steps.append(step if trace else Result(step.logits, step.activity))
        return _over_time(steps)

    def lif(self, node: Lif, x: Array, q: Array) -> tuple[Array, Array, Array]:
        step: tuple[Array, Array, Array] = self.kernels.lif_step(
            x,
            q,
            node.decode,
            node.thresholds,
            node.bits,
            node.v_th,
            node.reset,
            node.v_soft,
            node.quantize,
            node.q_th,
        )
        return step

    def value(self, node: Node, values: Mapping[str, Array], frame: npt.NDArray[np.uint8]) -> Array:
        """The value of a node that keeps no state, from those before it."""
        kernels = self.kernels
        x = values[node.inputs[0]] if node.inputs else frame
        match node:
            case InputTable():
                value = kernels.input_table(frame, node.table)
            case Conv():
                value = kernels.conv2d(x, node.weight, node.stride, node.padding, node.groups)
            case Linear():
                value = kernels.linear(x, node.weight)
            case BnAffine():
                c = self.network.grid.saturation
                value = kernels.bn_affine(x, node.multiplier, node.offset, node.shift, c)
            case BnDense():
                value = kernels.bn_dense(x, node.table, *self.network.proof.channel_bounds[node.source])
            case Add():
                value = kernels.residual_add(x, values[node.other])
            case Requantize():
                value = kernels.requantize(x, node.shift, node.bits)
            case MaxPool():
                value = kernels.max_pool(x, node.kernel, node.stride, node.padding)
            case SumPool():
                value = kernels.sum_pool(x, node.kernel_height, node.kernel_width, node.stride, node.padding)
            case Flatten():
                value = x.reshape(len(x), -1, 1, 1)
            case _:
                raise NotImplementedError(type(node).__name__)
        array: Array = value
        return array


def _over_time(steps: list[Result]) -> Result:
    """Join the results of consecutive steps of the same samples."""
    last = steps[-1]

    def join(counts: list[Mapping[str, npt.NDArray[np.int64]]]) -> dict[str, npt.NDArray[np.int64]]:
        return {name: np.concatenate([count[name] for count in counts]) for name in counts[0]}

    activity = Activity(
        last.activity.samples,
        last.activity.neurons,
        join([step.activity.spikes_out for step in steps]),
        join([step.activity.spikes_in for step in steps]),
    )
    return Result(last.logits, activity, _join_traces([step.trace for step in steps], last.logits, axis=0))


def _over_samples(parts: list[Result]) -> Result:
    """Join the results of chunks of samples."""
    if len(parts) == 1:
        return parts[0]
    logits = np.concatenate([part.logits for part in parts])

    sums: dict[int, npt.NDArray[np.int64]] = {}  # of arrays that several counts share

    def total(counts: list[Mapping[str, npt.NDArray[np.int64]]]) -> Mapping[str, npt.NDArray[np.int64]]:
        first, arrays = counts[0], [count.counts for count in counts if isinstance(count, Counts)]
        if isinstance(first, Counts) and len(arrays) == len(counts):
            if id(first.counts) not in sums:
                sums[id(first.counts)] = np.sum(arrays, axis=0)
            return Counts(sums[id(first.counts)], first.rows)
        return {name: np.sum([count[name] for count in counts], axis=0) for name in first}

    activity = Activity(
        sum(part.activity.samples for part in parts),
        parts[0].activity.neurons,
        total([part.activity.spikes_out for part in parts]),
        total([part.activity.spikes_in for part in parts]),
    )
    return Result(logits, activity, _join_traces([part.trace for part in parts], logits, axis=1))


def _join_traces(traces: list[Trace | None], logits: npt.NDArray[np.int32], axis: int) -> Trace | None:
    there = [trace for trace in traces if trace is not None]
    if not there:
        return None
    lifs = {
        name: LifTrace(
            np.concatenate([trace.lifs[name].h for trace in there], axis=axis),
            np.concatenate([trace.lifs[name].s for trace in there], axis=axis),
            np.concatenate([trace.lifs[name].q for trace in there], axis=axis),
        )
        for name in there[0].lifs
    }
    return Trace(lifs, logits)


def node_values(network: IntegerNetwork, pixels: npt.ArrayLike) -> tuple[Trace, dict[str, Array]]:
    """The trace and every node's value at every step, by the reference: name -> int64 [T, N, C, H, W].

    The Readout has none: its logits are in the trace.
    """
    array = check_pixels(network, pixels)
    state = _NodeState(NodeBackend(network, reference, "reference"), array.shape[array.ndim - 4])
    steps: list[Result] = []
    values: dict[str, list[Array]] = {node.name: [] for node in network.nodes[:-1]}
    for t in range(network.timesteps):
        steps.append(state.step(array if array.ndim == 4 else array[t]))
        for name, history in values.items():
            history.append(state.values[name])
    trace = _over_time(steps).trace
    if trace is None:
        raise NetworkError("the reference returned no trace")
    return trace, {name: np.stack(history) for name, history in values.items()}


# ------------------------------------------------------------------------------------------ choosing an engine


def missing(name: str) -> str | None:
    """Why the engine `name` cannot run here, with the line that cures it; None if it can."""
    if name == "numba":
        try:
            import numba  # noqa: F401
        except Exception as fault:
            return f"numba does not import ({fault}): pip install numba"
    elif name == "native":
        from . import native

        return native.missing()
    elif name != "reference":
        return f"unknown: the engines are {', '.join(KERNELS)}"
    return None


def backend(network: IntegerNetwork, name: str) -> Backend:
    """Make `network` ready for the engine `name`; raises MissingError if it cannot run here."""
    reason = missing(name)
    if reason is not None:
        raise MissingError(f"engine {name!r}: {reason}")
    if name == "native":
        from . import native

        return native.NativeBackend(network)
    if name == "numba":
        from . import jit

        return jit.JitBackend(network)
    return NodeBackend(network, reference, name)


@functools.cache
def _fallback(name: str, reason: str) -> None:
    log.warning("engine 'native' is not there (%s); %r takes over with the same integers", reason, name)


def choose() -> str:
    """The engine to use: MDSNN_ENGINE if set, else the fastest that is there, with one warning if that is not C.

    raises  ConfigError   if MDSNN_ENGINE names no engine
            MissingError  if the engine it names is not there
    """
    chosen = os.environ.get("MDSNN_ENGINE")
    if chosen:
        if chosen not in KERNELS:
            raise ConfigError(f"MDSNN_ENGINE={chosen!r} is none of {', '.join(KERNELS)}")
        reason = missing(chosen)
        if reason is not None:
            raise MissingError(f"MDSNN_ENGINE={chosen}: {reason}")
        return chosen
    reason = missing("native")
    if reason is None:
        return "native"
    name = "numba" if missing("numba") is None else "reference"
    _fallback(name, reason)
    return name


@functools.cache
def workers() -> ThreadPoolExecutor:
    """The threads of this process that take samples, and parts of samples, beside those that call `Engine.run`.

    They are started as they are needed and kept. None of them ever waits for another one's turn.
    """
    return ThreadPoolExecutor(1024, thread_name_prefix="mdsnn")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=workers.cache_clear)  # a child has none of its parent's threads


def thread_count(threads: int | None = None) -> int:
    """Threads to use: the argument, else MDSNN_THREADS, else the processors this process may use; 1..1024."""
    if threads is None:
        text = os.environ.get("MDSNN_THREADS")
        if not text:
            return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        if len(text) > 9 or not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1024:
            raise ConfigError(f"MDSNN_THREADS={text!r:.40} is no number in 1..1024")
        threads = int(text)
    if type(threads) is not int or not 1 <= threads <= 1024:
        raise ConfigError(f"threads = {threads!r} is outside 1..1024")
    return threads


def _as_array(pixels: npt.ArrayLike | None) -> Array:
    try:
        return np.asarray(pixels)
    except (ValueError, TypeError) as fault:
        raise InputError(f"the pixels are no array: {fault}") from None


def check_pixels(network: IntegerNetwork, pixels: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """`pixels` as a C-contiguous uint8 array if they fit `network`; raises InputError saying what was expected."""
    spec = network.input
    array = _as_array(pixels)
    shape = array.shape
    steps = () if spec.coding == "image" else (network.timesteps,)
    fits = len(shape) == 4 + len(steps) and shape[:-4] == steps
    fits = fits and shape[-3:] == (spec.channels, spec.height, spec.width) and shape[-4] > 0
    if array.dtype == _UINT8 and fits:
        return np.ascontiguousarray(array)
    expected = f"uint8 [{', '.join(map(str, (*steps, 'N', spec.channels, spec.height, spec.width)))}]"
    if array.dtype != _UINT8:
        raise InputError(f"the pixels are {array.dtype}; {expected} was expected (0..255, not scaled)")
    raise InputError(f"the pixels have shape {list(shape)}; {expected} was expected, N at least 1")


class Engine:
    """A network ready to run. Immutable after construction; calls from several threads are safe.

    kernels  "native", "numba" or "reference"; None chooses (see `choose`)
    threads  how many work on a run (see `run`); None: MDSNN_THREADS, else all processors
    raises   MissingError  if the chosen kernels are not there
    """

    def __init__(self, network: IntegerNetwork, kernels: str | None = None, threads: int | None = None) -> None:
        self.network = network
        self.threads = thread_count(threads)
        self._backend = backend(network, choose() if kernels is None else kernels)

    @property
    def kernels(self) -> str:
        """Name of the kernels that run."""
        return self._backend.name

    def run(self, pixels: npt.ArrayLike, *, trace: bool = False, threads: int | None = None) -> Result:
        """Run whole samples from a fresh state. Safe to call from several threads at once.

        pixels   uint8 [N, C, H, W] for image coding, [T, N, C, H, W] for events; any memory layout
        trace    also return h, s and q of every LIF node and step (see Trace)
        threads  for this run, 1..1024; None: the engine's. Never changes a result. Each takes images of its own; where
                 there are fewer images than threads, several share an image ("native" only)
        raises   InputError   if the pixels do not fit the network
                 ConfigError  if `threads` is outside its range
        """
        threads = self.threads if threads is None else thread_count(threads)
        array = check_pixels(self.network, pixels)
        axis = array.ndim - 4
        samples = array.shape[axis]
        chunk = min(_CHUNK, -(-samples // threads))
        if chunk == samples:
            return self._backend.run(array, trace, threads if samples == 1 else 1)
        todo = deque(
            (number, array[(slice(None),) * axis + (slice(at, at + chunk),)])
            for number, at in enumerate(range(0, samples, chunk))
        )
        done: list[Result | None] = [None] * len(todo)
        side_by_side = min(threads, len(todo))

        def work() -> None:
            while todo:
                try:
                    number, part = todo.popleft()
                except IndexError:  # another thread was faster
                    return
                done[number] = self._backend.run(np.ascontiguousarray(part), trace, threads // side_by_side)

        others = [workers().submit(work) for _ in range(side_by_side - 1)]
        try:
            work()
        finally:
            todo.clear()  # after a fault, nothing more is begun
            for other in others:
                if not other.cancel():
                    other.result()
        return _over_samples([result for result in done if result is not None])

    def stream(self, pixels: npt.ArrayLike | None = None, *, samples: int = 1) -> Stream:
        """Start a run that goes on step by step.

        pixels   image coding: the images, [N, C, H, W], given once; events: leave it out
        samples  events: N
        """
        return Stream(self, pixels, samples)


class Stream:
    """Samples in flight. `step()` takes one timestep; after T steps the logits equal those of `Engine.run`."""

    def __init__(self, engine: Engine, pixels: npt.ArrayLike | None, samples: int) -> None:
        self._network = engine.network
        self._images: npt.NDArray[np.uint8] | None = None
        if engine.network.input.coding == "image":
            if pixels is None:
                raise InputError("stream(): image coding needs the images at the start: stream(pixels)")
            self._images = check_pixels(engine.network, pixels)
            samples = len(self._images)
        elif pixels is not None:
            raise InputError("stream(): event coding takes its frames one by one: stream(samples=N), step(frame)")
        if type(samples) is not int or samples < 1:
            raise InputError(f"samples = {samples!r} is below 1")
        self._samples = samples
        self._state = engine._backend.start(samples)
        self.t = 0
        """Steps taken so far."""

    def step(self, frame: npt.ArrayLike | None = None) -> Result:
        """Take one timestep.

        frame    events only: uint8 [N, C, H, W], this step's counts
        returns  Result of this step: logits of the sum so far (the bias, scaled for T steps, included), counts and
                 trace with a time axis of 1
        raises   InputError  for a frame that does not fit, or a step beyond T (the bounds are proven for T steps)
        """
        if self.t == self._network.timesteps:
            raise InputError(f"step {self.t + 1} is beyond the network's {self._network.timesteps} timesteps")
        spec = self._network.input
        if self._images is not None:
            if frame is not None:
                raise InputError("step(): image coding repeats the images given to stream(); leave the frame out")
            array = self._images
        else:
            array = _as_array(frame)
            expected = (self._samples, spec.channels, spec.height, spec.width)
            if array.dtype != np.uint8 or array.shape != expected:
                raise InputError(f"the frame is {array.dtype} {array.shape}; uint8 {expected} was expected")
            array = np.ascontiguousarray(array)
        self.t += 1
        return self._state.step(array)


def run(
    network: IntegerNetwork,
    pixels: npt.ArrayLike,
    *,
    kernels: str | None = None,
    trace: bool = False,
    threads: int | None = None,
) -> Result:
    """Run whole samples once: `Engine(network, kernels, threads).run(pixels, trace=trace)`."""
    return Engine(network, kernels, threads).run(pixels, trace=trace)
