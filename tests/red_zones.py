"""Memory for the C engine with watched bytes around every array and every value of a plan.

`Watched` stands in for NumPy in kernels/native.py: what it gives out is filled with a pattern, so that a value nobody
wrote is not right by luck, and lies between guards. `values_apart` makes plans whose values do not share bytes and lie
apart from each other, so that a kernel that leaves its own value is seen, even where it would do no harm; and whose
weights and tables end where a page begins that cannot be read, so that a read beyond them ends the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np

from mdsnn.kernels.packing import up
from mdsnn.kernels.plan import Plan

PATTERN = 0xA5
ZONE = 1024
"""Bytes of a guard."""


class Watched:
    """Gives out arrays between guards; everything else is NumPy's."""

    def __init__(self) -> None:
        self._blocks: list[tuple[Any, int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def _take(self, shape: Any, dtype: Any, fill: int) -> Any:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        block = np.full(size + 2 * ZONE + 64, PATTERN, np.uint8)
        start = ZONE + -(block.ctypes.data + ZONE) % 64
        block[start : start + size] = fill
        self._blocks.append((block, start, start + size))
        return block[start : start + size].view(dtype).reshape(shape)

    def empty(self, shape: Any, dtype: Any) -> Any:
        return self._take(shape, dtype, PATTERN)

    def zeros(self, shape: Any, dtype: Any) -> Any:
        return self._take(shape, dtype, 0)

    def arena(self, size: int) -> Any:
        """For native.arena: bytes that start on a cache line."""
        return self._take(size, np.uint8, PATTERN)

    def touched(self) -> bool:
        """Whether a guard was written; forgets the arrays given out so far."""
        blocks, self._blocks = self._blocks, []
        return any((block[:at] != PATTERN).any() or (block[end:] != PATTERN).any() for block, at, end in blocks)


def fenced(array: Any) -> Any:
    """A read-only copy of `array` that ends where an unreadable page begins."""
    pages = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    block = np.frombuffer(memory, np.uint8)
    copy = block[pages - array.nbytes : pages].view(array.dtype).reshape(array.shape)
    copy[...] = array
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if protect(block.ctypes.data + pages, mmap.PAGESIZE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    copy.setflags(write=False)
    return copy


@contextlib.contextmanager
def values_apart() -> Iterator[None]:
    """Plans made inside have `owned`: (offset, bytes) of each value in an arena, with a guard after each."""
    plan: Any = Plan

    def put(self: Any, end: int, size: int, base: str) -> tuple[int, int]:
        offset = up(end + ZONE)
        vars(self).setdefault("owned", []).append((base, offset, size))
        return offset, up(offset + size + ZONE)

    def state(self: Any, size: int) -> int:
        offset, self.state_bytes = put(self, self.state_bytes, size, "state")
        return int(offset)

    def place(self: Any) -> None:
        self.scratch_bytes = self.work_bytes = 0
        for value in self.values:
            if value.keep:
                value.offset = self._state(value.size(self.chunk))
            else:
                value.offset, self.scratch_bytes = put(self, self.scratch_bytes, value.size(self.chunk), "scratch")
        for work in (item for items in self.work.values() for item in items):
            base = "scratch" if work.shared else "work"
            work.offset, end = put(self, vars(self)[f"{base}_bytes"], work.bytes, base)
            vars(self)[f"{base}_bytes"] = end

    def hold(self: Any, ctype: str, packed: Any) -> Any:
        return kept[2](self, ctype, fenced(packed) if packed.size else packed)

    kept = plan._state, plan._place, plan._hold
    plan._state, plan._place, plan._hold = state, place, hold
    try:
        yield
    finally:
        plan._state, plan._place, plan._hold = kept


def strayed(engine: Any) -> bool:
    """Whether the last run of an engine made inside `values_apart` wrote a byte of its arena that is no value's.

    Arenas must come from Watched.arena, and be taken anew for each run: the one looked at is given back here.
    """
    plan, arena = engine._backend._plan, engine._backend._scratch.pop().arena
    free = np.ones(len(arena), bool)
    areas = {"scratch": 0, "state": plan.scratch_bytes, "work": plan.scratch_bytes + plan.state_bytes}
    for base, offset, size in plan.owned:
        begin = offset + areas[base]
        free[begin : begin + size] = False
    return bool((arena[free] != PATTERN).any())
