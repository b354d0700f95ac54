"""Numbers below the smallest normal one (1.2e-38 in float32) taken as 0 in this thread.

State probabilities underflow all the time. Some processors handle numbers down there in microcode, a hundred cycles each: an
Intel Xeon walks a panel three times as fast without them, an AMD EPYC at the same speed. What is so small beside states
of sum 1 reaches no result at the room's tolerance.
"""

# mypy: disable-error-code="no-untyped-def"
# Functions compiled by Numba carry no annotations: their types are those of their arguments.

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_X86 = platform.machine().lower() in ("x86_64", "amd64")
_FLUSH, _AS_ZERO = 1 << 15, 1 << 6  # of MXCSR: results, operands


def _control(builder: Any, name: str, place: Any) -> None:
    byte = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [byte]), name)
    builder.call(function, [builder.bitcast(place, byte)])


@intrinsic
def _mode(typingctx):
    """The control register of this thread's vector arithmetic; 0 on other processors than x86."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = cgutils.alloca_once_value(builder, ir.Constant(ir.IntType(32), 0))
        if _X86:
            _control(builder, "llvm.x86.sse.stmxcsr", place)
        return builder.zext(builder.load(place), ir.IntType(64))

    return types.int64(), code


@intrinsic
def _set_mode(typingctx, mode):
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _X86:
            _control(
                builder,
                "llvm.x86.sse.ldmxcsr",
                cgutils.alloca_once_value(builder, builder.trunc(arguments[0], ir.IntType(32))),
            )
        return context.get_dummy_value()

    return types.void(types.int64), code


@njit(cache=True)
def flush():
    """Take denormal numbers as 0 from now on; what `restore` wants."""
    before = _mode()
    _set_mode(before | _FLUSH | _AS_ZERO)
    return before


@njit(cache=True)
def restore(before):
    """As it was."""
    _set_mode(before)
