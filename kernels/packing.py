"""Weights in the order in which the C kernels read them (src/events.h, pairs.h, grouped.h, tiles.h).

Everything here is NumPy on weight codes, int8 (C_out, C_in/groups, kh, kw); plan.py decides what is packed how.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .formats import Array
from .network import Conv

ALIGN = 64
"""Bytes of a cache line."""
BLOCK = 64
"""Channels a fused convolution takes at a time."""
PAIR = 32
"""Channels that tiles work on at a time."""
TAPS, ROWS, FILL = 3, 3, 4
"""Windows at a time, rows of a slab and what lists are filled up to, of src/events.h."""


def up(size: int) -> int:
    """The next multiple of a cache line."""
    return -(-size // ALIGN) * ALIGN


def arena(size: int) -> npt.NDArray[np.uint8]:
    """Uninitialized bytes that start on a cache line."""
    block = np.empty(size + ALIGN, np.uint8)
    start = -block.__array_interface__["data"][0] % ALIGN
    return block[start : start + size]


def aligned(array: Array) -> Array:
    """A C-ordered copy that starts on a cache line: a row of weights across two lines would cost two loads."""
    copy = arena(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@functools.cache
def bit_places() -> Array:
    """256 * 8 entries: the place of each bit that is set in a byte, lowest first, then 0; 256 more: how many."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    places = np.argsort(1 - bits, axis=1, kind="stable") * (np.arange(8) < bits.sum(axis=1)[:, None])
    return np.concatenate([places.reshape(-1), bits.sum(axis=1)])


def pack_by_parts(weight: Array, outs: int, pack: Callable[[Array], Array]) -> Array:
    """`pack` of so many outputs at a time, one after the other: little is held twice."""
    parts = (pack(weight[first : first + outs]) for first in range(0, len(weight), outs))
    part = next(parts)
    packed = arena(part.nbytes * -(-len(weight) // outs)).view(part.dtype).reshape(-1, *part.shape)
    packed[0] = part
    for place, part in enumerate(parts, 1):
        packed[place] = part
    return packed


def whole_blocks(constants: Array) -> Array:
    """Constants of channels, with 0 for those up to the next block."""
    padded = np.zeros(-(-len(constants) // BLOCK) * BLOCK, constants.dtype)
    padded[: len(constants)] = constants
    return padded


def by_input(weight: Array, groups: int) -> Array:
    """(C_out, C_in/groups, kh, kw) to [group][ky][kx][in][out]: an input's weights for all outputs lie together."""
    c_out, per_group, kh, kw = weight.shape
    return weight.reshape(groups, c_out // groups, per_group, kh, kw).transpose(0, 3, 4, 2, 1)


def window_depth(conv: Conv, together: int) -> int:
    """Inputs under a window, rounded up to a pair or four."""
    inputs = int(np.prod(conv.weight.shape[1:]))
    return inputs + -inputs % together


def pack_pairs(weight: Array) -> Array:
    """(C_out, C_in, kh, kw) to [outs/64][pair][out 64][2], the inputs of a window in the order (ky, kx, in)."""
    rows = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
    padded = np.zeros((-(-len(rows) // BLOCK) * BLOCK, rows.shape[1] + rows.shape[1] % 2), np.int16)
    padded[: len(rows), : rows.shape[1]] = rows
    return padded.reshape(-1, BLOCK, padded.shape[1] // 2, 2).transpose(0, 2, 1, 3)


def pack_bytes(weight: Array, bias: int) -> Array:
    """At most 64 outputs, (C_out, C_in, kh, kw), to [four][out 64][4], inputs of a window in the order (ky, kx, in),
    then [out 64], int32: what takes the bias out of an output's sum."""
    rows = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
    padded = np.zeros((BLOCK, rows.shape[1] + -rows.shape[1] % 4), np.int8)
    padded[: len(rows), : rows.shape[1]] = rows
    fours = padded.reshape(BLOCK, -1, 4).transpose(1, 0, 2).reshape(-1)
    return np.concatenate([fours, (-bias * padded.sum(axis=1, dtype=np.int32)).view(np.int8)])


def pack_grouped(weight: Array) -> Array:
    """At most 64 outputs, (C_out, C_in/groups, kh, kw), to [ky][kx][in of a group][out 64]."""
    padded = np.zeros((BLOCK, *weight.shape[1:]), np.int16)
    padded[: len(weight)] = weight
    return padded.transpose(2, 3, 1, 0)


def whole_windows(conv: Conv) -> bool:
    """Whether tiles take all inputs under a window side by side: several taps, whose inputs one block holds."""
    taps = int(np.prod(conv.weight.shape[2:]))
    return conv.groups == 1 and taps > 1 and conv.weight.shape[1] * taps <= BLOCK


def tiles_weight(conv: Conv) -> Array:
    """The weights as tiles see them: of whole windows (C_out, kh * kw * C_in, 1, 1), in the order (ky, kx, in)."""
    weight = conv.weight
    return weight.transpose(0, 2, 3, 1).reshape(len(weight), -1, 1, 1) if whole_windows(conv) else weight


def four_bits(conv: Conv) -> bool:
    """Whether the weights fit four bits."""
    return conv.bits <= 4


def pack_tiles(weight: Array, nibbles: bool) -> Array:
    """(C_out, C_in, kh, kw) to [outs/32][ins/64][ky][kx][half][ins/4 16][out 16][in 4], zeros as padding.

    Of 32 outputs the first half holds those of even number when counted in fours (see src/tiles.h). Weights of four
    bits lie two a byte, 16 times the second half's and the first half's: no axis of halves then.
    """
    c_out, c_in, kh, kw = weight.shape
    padded = np.zeros((-(-c_out // PAIR) * PAIR, up(c_in), kh, kw), np.int8)
    padded[:c_out, :c_in] = weight
    split = padded.reshape(-1, 4, 2, 4, -(-c_in // BLOCK), 16, 4, kh, kw)  # out/32, fours/2, half, out of four, ...
    packed: Array = split.transpose(0, 4, 7, 8, 2, 5, 1, 3, 6)
    if nibbles:
        packed = packed[:, :, :, :, 0] + 16 * packed[:, :, :, :, 1]
    return packed


def slabs_of(conv: Conv) -> int:
    """Slabs of the whole input, of which a block of outputs reads those that its groups lie in."""
    return int(-(-conv.weight.shape[1] * conv.groups // BLOCK) * -(-conv.weight.shape[2] // ROWS))


def list_bytes(conv: Conv, width: int, steps: int) -> int:
    """What the lists of an output row take if every input fires: a byte an entry, each list filled up."""
    _, c_in, kh, _ = conv.weight.shape
    return int(width * steps * (c_in * conv.groups * kh + (FILL - 1) * slabs_of(conv)))


def own_inputs(conv: Conv) -> Array:
    """(C_out, C_in/groups, kh, kw) to (C_out, ins, kh, kw): weights of the inputs from the first block of 64 on that an
    output's block of 64 reads, as events.h finds it; 0 for those of other groups."""
    if conv.groups == 1:
        return conv.weight
    c_out, c_in, kh, kw = conv.weight.shape
    each, first_out = c_out // conv.groups, np.arange(0, c_out, BLOCK)
    first = first_out // each * c_in // BLOCK
    last = (np.minimum(first_out + BLOCK, c_out) - 1) // each * c_in + c_in - 1
    blocks = int((last // BLOCK - first).max()) + 1
    first = np.minimum(first, -(-c_in * conv.groups // BLOCK) - blocks)
    own = np.zeros((c_out, blocks * BLOCK, kh, kw), np.int8)
    for out in range(c_out):
        at = out // each * c_in - int(first[out // BLOCK]) * BLOCK
        own[out, at : at + c_in] = conv.weight[out]
    return own


def slab_columns(weight: Array) -> Array:
    """(C_out, C_in, kh, kw) to (C_out, ins/64, kh/3, kw, 192): what one output may add of a slab, for each tap."""
    c_out, c_in, kh, kw = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -c_in % BLOCK), (0, -kh % ROWS), (0, 0)))
    parts = padded.reshape(c_out, -1, BLOCK, -(-kh // ROWS), ROWS, kw).transpose(0, 1, 3, 5, 4, 2)
    return parts.reshape(*parts.shape[:4], -1)


def safe_entries(slabs: Array, most: int) -> int:
    """Entries of a list that 8 bits can add, whichever they are, if those are fewer than `most`.

    slabs  (slabs, entries, sums): what each entry adds to each sum
    The k largest of some codes sum to the sum, over levels, of how many reach the level, at most k. Of wide codes some
    levels stand for those above them: a little too large a sum, so too few entries, never too many.
    """
    top = max(int(slabs.max()), -int(slabs.min()), 1)
    step = -(-top // 16)
    for sign, limit in ((1, 127), (-1, 128)):
        levels = (sign * np.arange(1, top + 1, step)).astype(np.int8)[:, None, None]
        for slab in slabs:
            reached = slab >= levels if sign > 0 else slab <= levels
            many = reached.view(np.uint8).sum(axis=1, dtype=np.uint8).astype(np.int16)
            fewest, middle = 0, most
            while most > fewest:  # fewest fit; more than most do not
                fits = int(np.minimum(many, middle).sum(axis=0, dtype=np.int16).max()) * step <= limit
                fewest, most = (middle, most) if fits else (fewest, middle - 1)
                middle = (most + fewest + 1) // 2
    return most


def event_slabs(weight: Array, stride: int, vector: int) -> list[Array]:
    """At most 64 outputs as events.h wants them: for each kh/3 and taps read together, (ins/64, entries, tap * out 64).

    Entries are [row of 3][in 64] and one of zeros, which fills lists. After each kh/3 zeros to a line of 128, if any.
    vector  bytes of one: the first half of its channels lies in even bytes, the second in odd ones
    """
    c_out, c_in, kh, kw = weight.shape
    order = np.arange(BLOCK).reshape(-1, 2, vector // 2).transpose(0, 2, 1).reshape(-1)
    padded = np.zeros((BLOCK, up(c_in), kh, kw), np.int8)
    padded[:c_out, :c_in] = weight
    rows = padded[order].reshape(BLOCK, -1, BLOCK, kh, kw).transpose(1, 3, 2, 4, 0)
    ins = len(rows)
    slabs = []
    for first_row in range(0, kh, ROWS):
        entries = rows[:, first_row : first_row + ROWS].reshape(ins, -1, kw, BLOCK)
        for residue in range(min(stride, kw)):
            taps = range(residue, kw, stride)
            for first in range(0, len(taps), TAPS):
                some = entries[:, :, taps[first : first + TAPS]].reshape(ins, entries.shape[1], -1)
                slabs.append(np.concatenate([some, np.zeros_like(some[:, :1])], axis=1))
        size = (entries.shape[1] + 1) * kw * BLOCK
        slabs.append(np.zeros((ins, 1, -size % (2 * BLOCK)), np.int8))
    return slabs


def pack_events(slabs: list[Array], nibbles: bool) -> Array:
    """[ins/64][kh/3][taps][row of 3][in 64][tap][out 64]; two codes a byte: see pack_nibbles."""
    codes = np.concatenate([slab.reshape(len(slab), -1) for slab in slabs], axis=1)
    return pack_nibbles(codes) if nibbles else codes


def pack_nibbles(codes: Array) -> Array:
    """Codes within -8..7 as two a byte, plus 8: of each 128, the first 64 in the lower halves."""
    halves = codes.reshape(-1, 2, BLOCK) + np.int8(8)
    return halves[:, 0] | halves[:, 1] << np.int8(4)
