"""The engine in C: plans made from proven networks, run by one C call for a batch.

`NativeBackend` makes a network's plan once (plan.py). A plan is immutable; a call takes its scratch and state from
Python, so calls may run side by side (the GIL is released).

`MDSNN_ISA=base|avx2|avx512|amx` forces an instruction set; all give the same integers.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .engine import Activity, Counts, LifTrace, Result, State, Trace, workers
from .errors import ConfigError, MissingError
from .network import Conv, IntegerNetwork, Linear, Readout
from .packing import arena
from .plan import Group, Plan

log = logging.getLogger(__name__)

ISA_LEVELS = ("base", "avx2", "avx512", "amx")
"""Instruction sets the C sources are compiled for, each a superset of those before it; entry i is enum value i."""

STAGES = ("gather", "sums", "epilogue", "whole")
"""Where an operation's time goes, as in mdsnn.h: its input laid out, sums of products, bn to LIF; and all of it."""
METHODS = ("events, 8 bits", "events, 16 bits", "pairs", "bytes", "grouped", "tiles")
"""How a fused convolution is computed, in the order of mdsnn.h."""
_CONTRACT = 23  # MDSNN_CONTRACT of src/mdsnn.h
_PARTS = 64  # most threads that share a sample
_SHARED = 10**8  # dense products of a sample from which on threads share it: 0.2 ms and more
_REPORT = "please report it with the output of `mdsnn doctor`"
_CURE = (
    "install gcc or clang if neither is there, then, in the folder of mdsnn's sources,"
    " pip install --force-reinstall --no-deps . (-e . if it was installed so)"
)


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


def unloaded() -> str | None:
    """Why the compiled extension is not there, with the line that cures it; None if it is. Tries nothing."""
    return _load()[1]


def missing() -> str | None:
    """Why the compiled engine cannot run here, with the line that cures it; None if it can.

    Without MDSNN_ISA, the first call also tries the instruction sets, best first, until one passes its self-test.
    """
    reason = unloaded()
    if reason is None and not os.environ.get("MDSNN_ISA"):
        levels = isa_levels()
        if all(fault(level) is not None for level in reversed(levels)):
            reason = f"no instruction set passes its self-test ({levels[0]}: {fault(levels[0])}); {_REPORT}"
    return reason


def _module() -> Any:
    module, reason = _load()
    if reason is not None:
        raise MissingError(f"engine 'native': {reason}")
    return module


def isa_levels() -> tuple[str, ...]:
    """The instruction sets this machine can run, slowest first; raises MissingError if the extension is not there."""
    lib = _module().lib
    return tuple(name for level, name in enumerate(ISA_LEVELS) if lib.mdsnn_supported(level))


@functools.cache
def fault(level: str) -> str | None:
    """What the self-test of an instruction set finds wrong on this machine; None if nothing. Runs once a process."""
    from . import selftest

    if level not in isa_levels():  # asking is also what has AMX granted
        return "this machine cannot run it"
    return selftest.first_fault(lambda network: NativeBackend(network, level))


@functools.cache
def _fallback(level: str, reason: str, below: str) -> None:
    log.warning("instruction set %r fails its self-test (%s): %r takes over; %s", level, reason, below, _REPORT)


def isa() -> str:
    """The instruction set in use: MDSNN_ISA if set, else the best this machine can run that passes its self-test.

    Warns once of one that does not pass.

    raises  ConfigError   if MDSNN_ISA names no instruction set
            MissingError  if this machine cannot run the one it names, if that or every one fails its self-test, or if
                          the extension is not there
    """
    levels = isa_levels()
    chosen = os.environ.get("MDSNN_ISA")
    if chosen and chosen not in ISA_LEVELS:
        raise ConfigError(f"MDSNN_ISA={chosen!r} is none of {', '.join(ISA_LEVELS)}")
    if chosen and chosen not in levels:
        raise MissingError(f"MDSNN_ISA={chosen}: this machine runs {', '.join(levels)}; choose one of these")
    if chosen:
        reason = fault(chosen)
        if reason is not None:
            raise MissingError(f"MDSNN_ISA={chosen}: it fails its self-test ({reason}); unset it, and {_REPORT}")
        return chosen
    for place in reversed(range(len(levels))):
        reason = fault(levels[place])
        if reason is None:
            return levels[place]
        if place:
            _fallback(levels[place], reason, levels[place - 1])
    raise MissingError(f"engine 'native': {missing()}")


# ------------------------------------------------------------------------------------------------- the backend


@dataclass(frozen=True)
class Operation:
    """A step of a run: a node, or a convolution with what is fused to it.

    method  of METHODS, or the node's type      conv  its convolution, if it is fused
    weight_bytes  of that, as they are stored for the kernels
    """

    name: str
    method: str
    conv: str | None
    weight_bytes: int


def ticks() -> int:
    """The counter in which `NativeBackend.timed` counts; its rate is unknown, and constant."""
    return int(_module().lib.mdsnn_ticks())


def strain(isa_level: str, work: str, size: int, rounds: int) -> int:
    """Do `rounds` rounds of one kind of work and nothing else: 0 units where the level has no such instruction.

    work     "byte_adds", "pair_products", "tile_products", or "reads" of a buffer of `size` bytes
    returns  the units of work done: bytes added, products, bytes read
    """
    module = _module()
    buffer = arena(size)
    buffer.fill(0)
    start = module.ffi.from_buffer("uint8_t[]", buffer)
    kind = getattr(module.lib, f"MDSNN_{work.upper()}")
    return int(module.lib.mdsnn_strain(ISA_LEVELS.index(isa_level), kind, start, size, rounds))


class _Room:
    """What a call writes to, and the call that points to it: scratch, one sample's state, the work of its parts."""

    def __init__(self, plan: Plan, parts: int) -> None:
        self.parts = parts
        self.arena = arena(plan.scratch_bytes + plan.state_bytes + parts * plan.work_bytes)
        scratch = plan.ffi.from_buffer("uint8_t[]", self.arena)
        state = scratch + plan.scratch_bytes
        fields = {"scratch": scratch, "state": state, "work": state + plan.state_bytes, "fresh": 1}
        self.call = plan.ffi.new("mdsnn_call *", fields)


class NativeBackend:
    """A network ready to run in C. Immutable: calls may run side by side.

    network  any IntegerNetwork (building one proved it)
    level    an instruction set this machine can run; None: `isa()`, the one in use
    raises   MissingError  if the extension is not there, or this machine cannot run `level` or what MDSNN_ISA names
             ConfigError   if MDSNN_ISA names no instruction set
    """

    name = "native"

    def __init__(self, network: IntegerNetwork, level: str | None = None) -> None:
        self.network = network
        if level is not None and level not in isa_levels():  # asking is also what has AMX granted
            raise MissingError(f"engine 'native': this machine runs {', '.join(isa_levels())}, not {level}")
        self.isa = isa() if level is None else level
        """The instruction set in use."""
        self._level = ISA_LEVELS.index(self.isa)
        self._plan = Plan(_module(), network, self.isa)
        self._neurons = {lif.name: int(np.prod(network.proof.shapes[lif.name])) for lif in network.lifs}
        rows = self._plan.counters
        self._spikes_out = {lif.name: rows[lif.name] for lif in network.lifs}
        readers = (node for node in network.nodes if isinstance(node, Conv | Linear | Readout))
        self._spikes_in = {node.name: rows[node.source] for node in readers}
        # small samples are one thread's: to call others costs more than they take over
        self._parts = 1 if network.macs < _SHARED else _PARTS
        # scratch is kept between calls, for a fresh one costs a page fault every 4 KiB; a deque's ends are thread-safe
        self._scratch: deque[_Room] = deque(maxlen=64)
        self._classes = network.classes

    def run(self, pixels: npt.NDArray[np.uint8], trace: bool, threads: int = 1) -> Result:
        """All timesteps of checked pixels [N, C, H, W] or [T, N, C, H, W], each sample by up to `threads` threads."""
        parts = min(threads, self._parts)
        room = self._take(parts)
        try:
            return self._call(pixels, self.network.timesteps, room, trace, parts)
        finally:
            self._scratch.append(room)

    def timed(self, pixels: npt.NDArray[np.uint8]) -> tuple[Result, npt.NDArray[np.int64]]:
        """A run on one thread, and where its time went: ticks of each of `operations` in each stage of STAGES."""
        times = np.zeros((len(self._plan.steps), len(STAGES)), np.int64)
        room = self._take()
        try:
            return self._call(pixels, self.network.timesteps, room, False, times=times), times
        finally:
            self._scratch.append(room)

    def operations(self) -> list[Operation]:
        """What a run consists of, in order."""
        found = []
        for at, (_, step) in enumerate(self._plan.steps):
            if isinstance(step, Group):
                method = METHODS[self._plan.struct.ops[at].method]
                stored = self._plan.weight_bytes[step.conv.name]
                found.append(Operation(step.conv.name, method, step.conv.name, stored))
            else:
                found.append(Operation(step.name, type(step).__name__, None, 0))
        return found

    def start(self, samples: int) -> State:
        """A fresh state, q = 0 everywhere, for `samples` samples."""
        return _NativeState(self, samples)

    def _take(self, parts: int = 1) -> _Room:
        """Room for one call at a time, by so many parts."""
        try:
            room = self._scratch.pop()
        except IndexError:
            return _Room(self._plan, parts)
        return room if room.parts >= parts else _Room(self._plan, parts)

    def _call(
        self,
        pixels: npt.NDArray[np.uint8],
        steps: int,
        room: _Room,
        trace: bool,
        parts: int = 1,
        times: npt.NDArray[np.int64] | None = None,
        state: tuple[npt.NDArray[np.uint8], bool] | None = None,
    ) -> Result:
        """Run `steps` timesteps. `state`: what earlier steps left of every sample, and whether it is fresh; None: the
        room's own, fresh for every sample."""
        # Little Python: between two calls the weights push it out of the caches, and each line of it is read anew.
        plan, call = self._plan, room.call
        pointer = plan.ffi.from_buffer
        samples = pixels.shape[-4]
        logits = np.empty((samples, self._classes), np.int32)
        counts = np.zeros((len(plan.counters), steps), np.int64)
        lifs: dict[str, LifTrace] = {}
        helpers: list[Future[None]] = []
        if trace or parts > 1 or times is not None or state is not None:
            call = plan.ffi.new("mdsnn_call *", call[0])  # the room's never points to what is gone
            if state is not None:
                call.state, call.fresh = pointer("uint8_t[]", state[0]), int(state[1])
                call.state_pitch = plan.state_bytes
            if times is not None:
                call.times = pointer("int64_t[]", times)
            if trace:
                lifs, *pointers = self._lifs(steps, samples)
                call.trace_h, call.trace_s, call.trace_q = pointers
        call.pixels = pointer("uint8_t[]", pixels)
        call.pixel_step = pixels.strides[0] if pixels.ndim == 5 else 0
        call.samples, call.steps = samples, steps
        call.logits, call.counts = pointer("int32_t[]", logits), pointer("int64_t[]", counts)
        if parts > 1:
            helpers = self._help(call, parts)
        plan.lib.mdsnn_run(plan.struct, self._level, call)
        for helper in helpers:
            helper.cancel()  # one that runs finds that the call has ended
        spikes_out, spikes_in = Counts(counts, self._spikes_out), Counts(counts, self._spikes_in)
        activity = Activity(samples, self._neurons, spikes_out, spikes_in)
        return Result(logits, activity, Trace(lifs, logits) if trace else None)

    def _lifs(self, steps: int, samples: int) -> tuple[dict[str, LifTrace], Any, Any, Any]:
        """Arrays for a trace, and pointers to those of h, s and q."""
        network, ffi = self.network, self._plan.ffi
        lifs: dict[str, LifTrace] = {}
        for lif in network.lifs:
            shape = (steps, samples, *network.proof.shapes[lif.name])
            lifs[lif.name] = LifTrace(np.empty(shape, np.int32), np.empty(shape, np.uint8), np.empty(shape, np.int8))
        h = ffi.new("int32_t *[]", [ffi.from_buffer("int32_t[]", lif.h) for lif in lifs.values()])
        s = ffi.new("uint8_t *[]", [ffi.from_buffer("uint8_t[]", lif.s) for lif in lifs.values()])
        q = ffi.new("int8_t *[]", [ffi.from_buffer("int8_t[]", lif.q) for lif in lifs.values()])
        return lifs, h, s, q

    def _help(self, call: Any, parts: int) -> list[Future[None]]:
        """Send for parts - 1 threads. The call waits for none of them: work that nobody has taken it does itself."""
        ffi, lib = self._plan.ffi, self._plan.lib
        team = ffi.new("mdsnn_team *", {"size": parts})
        call.team = team
        return [workers().submit(lib.mdsnn_help, team) for _ in range(parts - 1)]


class _NativeState:
    def __init__(self, backend: NativeBackend, samples: int) -> None:
        self._backend = backend
        self._state = arena(samples * backend._plan.state_bytes)
        self._fresh = True

    def step(self, frame: npt.NDArray[np.uint8]) -> Result:
        """Run one timestep on `frame` [N, C, H, W]."""
        backend = self._backend
        room = backend._take()
        try:
            result = backend._call(frame, 1, room, True, state=(self._state, self._fresh))
        finally:
            backend._scratch.append(room)
        self._fresh = False
        return result
