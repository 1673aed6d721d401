"""Vectors of integers inside Numba functions, for the loops that LLVM does not vectorize by itself.

A `Vector` is LLVM's own <lanes x iN>: it lives in registers, and LLVM cuts it to whatever width the processor has, so
the same code serves SSE2, AVX-512 and NEON. Every function below is one LLVM instruction or two. Lanes and bits are
literals; indices count elements and are not checked. Results wrap as the machine's do.
"""

from __future__ import annotations

from typing import Any

from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

_cgutils: Any = cgutils
ir = _cgutils.ir  # llvmlite's, on which numba is built


class Vector(types.Type):
    """Numba's type of a vector: `lanes` signed integers of `bits` bits; 1 bit for the result of a comparison."""

    def __init__(self, bits: int, lanes: int) -> None:
        self.bits, self.lanes = bits, lanes
        super().__init__(f"Vector({bits}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.IntType(kind.bits), kind.lanes))  # type: ignore[no-untyped-call]


def _intrinsic(function: Any) -> Any:
    return intrinsic(prefer_literal=True)(function)


def _spread(builder: Any, scalar: Any, kind: Any) -> Any:
    """An int64 in every lane."""
    first = builder.insert_element(kind(ir.Undefined), builder.trunc(scalar, kind.element), ir.IntType(32)(0))
    return builder.shuffle_vector(first, kind(ir.Undefined), ir.VectorType(ir.IntType(32), kind.count)(None))


def _element(context: Any, builder: Any, array: Any, value: Any, index: Any) -> Any:
    return builder.gep(_cgutils.create_struct_proxy(array)(context, builder, value).data, [index])


def _address(context: Any, builder: Any, array: Any, value: Any, index: Any, vector: Any) -> Any:
    return builder.bitcast(_element(context, builder, array, value, index), vector.as_pointer())


@_intrinsic
def load(_: Any, array: Any, index: Any, lanes: Any) -> Any:
    """`lanes` elements of a flat array from `index` on."""
    kind = Vector(array.dtype.bitwidth, lanes.literal_value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _address(context, builder, array, args[0], args[1], context.get_value_type(kind))
        return builder.load(place, align=kind.bits // 8)

    return kind(array, types.intp, lanes), generate


@_intrinsic
def scaled(_: Any, array: Any, index: Any, lanes: Any, factor: Any) -> Any:
    """`lanes` elements of a flat array from `index` on, times the integer `factor`."""
    kind = Vector(array.dtype.bitwidth, lanes.literal_value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = context.get_value_type(kind)
        place = _address(context, builder, array, args[0], args[1], vector)
        factors = _spread(builder, args[3], vector)
        return builder.mul(builder.load(place, align=kind.bits // 8), factors)

    return kind(array, types.intp, lanes, types.int64), generate


@_intrinsic
def sum_rows(_: Any, array: Any, first: Any, rows: Any, index: Any, count: Any, lanes: Any) -> Any:
    """The sum of `count` rows of `lanes` elements: row first + rows[index] of a flat array, and those after `index`."""
    kind = Vector(array.dtype.bitwidth, lanes.literal_value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector, total = context.get_value_type(kind), None
        for k in range(count.literal_value):
            at = _element(context, builder, rows, args[2], builder.add(args[3], ir.IntType(64)(k)))
            row = builder.add(args[1], builder.sext(builder.load(at), ir.IntType(64)))
            place = builder.mul(row, ir.IntType(64)(kind.lanes))
            part = builder.load(_address(context, builder, array, args[0], place, vector), align=kind.bits // 8)
            total = part if total is None else builder.add(total, part)
        return total

    return kind(array, types.int64, rows, types.int64, count, lanes), generate


@_intrinsic
def store(_: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write a vector, each lane cut or sign-extended to the array's dtype, from `index` on."""
    to = Vector(array.dtype.bitwidth, vector.lanes)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_value_type(to)
        place = _address(context, builder, array, args[0], args[1], kind)
        builder.store(_resize(builder, args[2], vector.bits, to.bits, kind), place, align=to.bits // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


def _resize(builder: Any, value: Any, bits: int, to: int, kind: Any) -> Any:
    if bits == to:
        return value
    if bits == 1:
        return builder.zext(value, kind)
    return builder.sext(value, kind) if bits < to else builder.trunc(value, kind)


@_intrinsic
def zeros(_: Any, array: Any, lanes: Any) -> Any:
    """0 in every lane, of the dtype of `array`."""
    kind = Vector(array.dtype.bitwidth, lanes.literal_value)
    return kind(array, lanes), lambda context, builder, signature, args: context.get_value_type(kind)(None)


@_intrinsic
def accumulate(_: Any, total: Any, part: Any) -> Any:
    """total + part, in the lanes of `total`; those of `part` are as wide or narrower."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.add(args[0], _resize(builder, args[1], part.bits, total.bits, context.get_value_type(total)))

    return total(total, part), generate


def _operand(context: Any, builder: Any, vector: Any, kind: Any, value: Any) -> Any:
    """A vector as it is; an integer in every lane of a vector as wide as `vector`."""
    return value if isinstance(kind, Vector) else _spread(builder, value, context.get_value_type(vector))


def _lanewise(emit: Any) -> Any:
    def typed(_: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, args[0], _operand(context, builder, a, b, args[1]))

        return a(a, b if isinstance(b, Vector) else types.int64), generate

    return _intrinsic(typed)


add = _lanewise(lambda builder, a, b: builder.add(a, b))
"""a + b; here and below b is a vector, or an integer for all lanes."""
multiply = _lanewise(lambda builder, a, b: builder.mul(a, b))
shift_right = _lanewise(lambda builder, a, b: builder.ashr(a, b))


@_intrinsic
def clamp(_: Any, a: Any, low: Any, high: Any) -> Any:
    """Each lane brought into low..high, two integers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, low, high = args[0], *(_spread(builder, arg, args[0].type) for arg in args[1:])
        value = builder.select(builder.icmp_signed("<", value, low), low, value)
        return builder.select(builder.icmp_signed(">", value, high), high, value)

    return a(a, types.int64, types.int64), generate


def _comparison(operator: str) -> Any:
    def typed(_: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.icmp_signed(operator, args[0], _operand(context, builder, a, b, args[1]))

        return Vector(1, a.lanes)(a, b if isinstance(b, Vector) else types.int64), generate

    return _intrinsic(typed)


greater = _comparison(">")
"""Lanes of one bit: a > b."""
differs = _comparison("!=")


@_intrinsic
def choose(_: Any, where: Any, a: Any, b: Any) -> Any:
    """The integer `a` where the bit is 1, else the lane of `b`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(args[0], _spread(builder, args[1], args[2].type), args[2])

    return b(where, types.int64, b), generate


@_intrinsic
def bits(_: Any, where: Any) -> Any:
    """The bits of a comparison as one integer, lane 0 lowest."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], ir.IntType(where.lanes)), ir.IntType(64))

    return types.int64(where), generate


@_intrinsic
def count_ones(_: Any, word: Any) -> Any:
    """How many bits of an int64 are 1."""
    return types.int64(types.int64), lambda context, builder, signature, args: builder.ctpop(args[0])
