"""One 512-bit vector as a Numba value: loops are written in Python and keep their vectors in registers.

A vector is sixteen float32 or eight float64 lanes, after the arrays it is loaded from; positions count vectors from the
start of a one-dimensional array. Where a machine has narrower registers, LLVM splits each operation. Plain Numba loops
over a short inner axis do not come to this: between two arrays that may overlap LLVM keeps nothing in registers.
"""

# mypy: disable-error-code="no-untyped-def"
# Functions compiled by Numba carry no annotations: their types are those of their arguments.

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

BYTES = 64


class Lanes(types.Type):
    """Numba type of one vector of `scalar`."""

    def __init__(self, scalar: Any) -> None:
        self.scalar = scalar
        self.count = BYTES * 8 // scalar.bitwidth
        super().__init__(name=f"Lanes({scalar}, {self.count})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        element = ir.FloatType() if fe_type.scalar == types.float32 else ir.DoubleType()
        super().__init__(dmm, fe_type, ir.VectorType(element, fe_type.count))


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, at: Any, vector: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    lanes = BYTES * 8 // array_type.dtype.bitwidth
    element = builder.gep(data, [builder.mul(at, ir.Constant(at.type, lanes))])
    return builder.bitcast(element, vector.as_pointer())


def _splat(builder: Any, value: Any, vector: Any) -> Any:
    undefined, zero = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
    first = builder.insert_element(undefined, value, zero)
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None))


@intrinsic
def load(typingctx, array, at):
    """Vector `at` of a one-dimensional array."""
    lanes = Lanes(array.dtype)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = context.get_value_type(lanes)
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], vector)
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return lanes(array, types.intp), code


@intrinsic
def store(typingctx, array, at, value):
    """Write vector `at` of a one-dimensional array."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = context.get_value_type(value)
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], vector)
        builder.store(arguments[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), code


@intrinsic
def item(typingctx, array, at):
    """One value of a one-dimensional array; `at` is not looked at for being negative, which costs registers."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load(builder.gep(data, [arguments[1]]))

    return array.dtype(array, types.intp), code


@intrinsic
def splat(typingctx, array, value):
    """Vector of one number, of the dtype of `array` (which is not read)."""
    lanes = Lanes(array.dtype)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _splat(builder, arguments[1], context.get_value_type(lanes))

    return lanes(array, array.dtype), code


@intrinsic
def muladd(typingctx, a, b, c):
    """a * b + c, fused where the machine can."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = context.get_value_type(a)
        name = f"llvm.fmuladd.v{a.count}f{a.scalar.bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
        return builder.call(function, arguments)

    return a(a, a, a), code


@intrinsic
def mul(typingctx, a, b):
    """a * b."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fmul(*arguments)

    return a(a, a), code


@intrinsic
def add(typingctx, a, b):
    """a + b."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments)

    return a(a, a), code


@intrinsic
def div(typingctx, a, b):
    """a / b."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fdiv(*arguments)

    return a(a, a), code


@intrinsic
def larger(typingctx, a, b):
    """The larger of each pair of lanes; b where a is not a number."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return a(a, a), code


@intrinsic
def smaller(typingctx, a, b):
    """The smaller of each pair of lanes; b where a is not a number."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *arguments), *arguments)

    return a(a, a), code


@intrinsic
def any_above(typingctx, a, b):
    """Whether a > b in any lane."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        mask = builder.bitcast(builder.fcmp_ordered(">", *arguments), ir.IntType(a.count))
        return builder.zext(builder.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0)), ir.IntType(8))

    return types.uint8(a, a), code


def _mask(builder: Any, word: Any, count: int) -> Any:
    return builder.bitcast(builder.trunc(word, ir.IntType(count)), ir.VectorType(ir.IntType(1), count))


@intrinsic
def choose(typingctx, word, a, b):
    """a in the lanes whose bit of `word` is set, b in the others."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(_mask(builder, arguments[0], a.count), *arguments[1:])

    return a(types.uint64, a, a), code


@intrinsic
def mul_where(typingctx, word, shift, a, b):
    """a * b in the lanes whose bit word >> shift is set, a in the others."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        mask = _mask(builder, builder.lshr(arguments[0], arguments[1]), a.count)
        return builder.select(mask, builder.fmul(arguments[2], arguments[3]), arguments[2])

    return a(types.uint64, types.uint64, a, a), code


@intrinsic
def total(typingctx, a):
    """Sum of all lanes, by halves, in float64."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, count = arguments[0], a.count
        wide = ir.VectorType(ir.DoubleType(), count)
        if a.scalar == types.float32:
            value = builder.fpext(value, wide)
        index = ir.IntType(32)
        while count > 1:
            count //= 2
            undefined = ir.Constant(value.type, ir.Undefined)
            low, high = (
                builder.shuffle_vector(
                    value, undefined, ir.Constant(ir.VectorType(index, count), list(range(start, start + count)))
                )
                for start in (0, count)
            )
            value = builder.fadd(low, high)
        return builder.extract_element(value, ir.Constant(index, 0))

    return types.float64(a), code


@njit(cache=True, nogil=True)
def zeros(like, vectors):
    """Zeroed array of `vectors` vectors of the dtype of `like`, its first value on a 64-byte boundary."""
    step = BYTES // like.itemsize
    buffer = np.zeros((vectors + 1) * step, like.dtype)
    start = ((BYTES - buffer.ctypes.data % BYTES) % BYTES) // like.itemsize
    return buffer[start : start + vectors * step]
