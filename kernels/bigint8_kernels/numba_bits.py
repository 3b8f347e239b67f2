"""Numbers from their bits and back, for numba kernels on the CPU.

float16 arrives viewed as uint16 and bfloat16 as int16, since numpy knows no bfloat16 and numba no float16 on the CPU.
"""

from pathlib import Path

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from .numba_cache import drop_stale_kernels

drop_stale_kernels(Path(__file__).parent)  # all modules with kernels import this one, before any is compiled

BITS = {torch.float16: torch.uint16, torch.bfloat16: torch.int16, torch.float32: torch.float32}
"""The dtype that each float dtype is viewed as."""


def as_bits(tensor: Tensor) -> Tensor:
    """A view of a float tensor that numba can read."""
    return tensor.view(BITS[tensor.dtype])


@intrinsic
def to_float32(typingctx, x):
    """float16 bits (uint16), bfloat16 bits (int16) or a float32, as float32."""

    def codegen(context, builder, signature, args):
        (value,) = args
        if x == types.uint16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        if x == types.int16:
            wide = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(wide, ir.FloatType())
        return value

    return types.float32(x), codegen


@intrinsic
def magnitude(typingctx, x):
    """The bits of x without its sign: unsigned integers that order as |x| does, NaN and infinity above all else."""

    def codegen(context, builder, signature, args):
        (value,) = args
        if x == types.float32:
            return builder.and_(builder.bitcast(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 0x7FFFFFFF))
        return builder.and_(value, ir.Constant(ir.IntType(16), 0x7FFF))

    return (types.uint32 if x == types.float32 else types.uint16)(x), codegen


@intrinsic
def to_bits(typingctx, x):
    """The bits of a float32, as an int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def magnitude_to_float32(typingctx, bits, like):
    """The float32 whose magnitude in the format of `like` has these bits."""

    def codegen(context, builder, signature, args):
        value = args[0]
        if like == types.uint16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        if like == types.int16:
            wide = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(wide, ir.FloatType())
        return builder.bitcast(value, ir.FloatType())

    return types.float32(bits, like), codegen


def _rounding(bits: int, result: types.Integer):
    @intrinsic
    def round_to(typingctx, x):
        def codegen(context, builder, signature, args):
            rint = builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()])
            wide = builder.fptosi(builder.call(rint, args), ir.IntType(32))
            return builder.trunc(wide, ir.IntType(bits))

        return result(x), codegen

    return round_to


round_to_int8 = _rounding(8, types.int8)
"""float32 to the nearest int8, ties to even."""

round_to_int16 = _rounding(16, types.int16)
"""float32 to the nearest int16, ties to even."""


@intrinsic
def from_float32(typingctx, x, like):
    """A float32 rounded to the format of `like`, ties to even: the bits of a float16 or bfloat16, or itself."""

    def codegen(context, builder, signature, args):
        value = args[0]
        if like == types.uint16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        if like == types.int16:  # add half of what is cut off, and a bit more where that makes it even; finite x only
            wide = ir.IntType(32)
            bits = builder.bitcast(value, wide)
            odd = builder.and_(builder.lshr(bits, wide(16)), wide(1))
            rounded = builder.add(bits, builder.add(odd, wide(0x7FFF)))
            return builder.trunc(builder.lshr(rounded, wide(16)), ir.IntType(16))
        return value

    return like(x, like), codegen


def _values(kind: types.Type):
    @intrinsic
    def values_at(typingctx, address, index):
        def codegen(context, builder, signature, args):
            pointer = builder.inttoptr(args[0], context.get_value_type(signature.return_type))
            return builder.gep(pointer, [args[1]])

        return types.CPointer(kind)(types.intp, types.intp), codegen

    return values_at


float32_at, int8_at, int16_at = _values(types.float32), _values(types.int8), _values(types.int16)
"""A pointer to the value with an index, of the contiguous values at an address; a kernel uses it as `pointer[k]`."""

uint8_at, uint16_at, int32_at = _values(types.uint8), _values(types.uint16), _values(types.int32)
"""The same for bool, for the bits of float16, and for sums of products."""

intp_at = _values(types.intp)
"""The same for numbers of rows."""
