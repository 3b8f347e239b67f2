"""Numbers inside Triton kernels: rounding and magnitudes, in steps that give the same bits as the reference.

Kernels that use `round_to_int8` must be compiled with EXACT: fused with the product before it, the sum would be rounded
once where the reference rounds twice.
"""

import triton
import triton.language as tl

from .reference import SMALLEST_ABSMAX

EXACT = {"enable_fp_fusion": False}
"""Options of a launch whose products are rounded before they are added to."""

FUSED = {"enable_fp_fusion": True}
"""Options of a launch whose products need not be."""

_SMALLEST_ABSMAX = tl.constexpr(SMALLEST_ABSMAX)
_ROUNDER = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def round_to_int8(x):
    """float32 to the nearest int8, ties to even: beyond 2**23 float32 has no fraction, and the sum is rounded to it."""
    return ((x + _ROUNDER) - _ROUNDER).to(tl.int8)


@triton.jit
def magnitude(x):
    """The bits of x without its sign, as an integer: these order as |x| does, with infinity and NaN above all else."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        bits = (x.to(tl.int16, bitcast=True) & 0x7FFF).to(tl.int32)
    return bits


@triton.jit
def infinity_bits(dtype: tl.constexpr):
    """The magnitude of infinity in this format."""
    bits: tl.constexpr = 0x7F800000 if dtype == tl.float32 else 0x7F80 if dtype == tl.bfloat16 else 0x7C00
    return bits


@triton.jit
def magnitude_to_float32(bits, dtype: tl.constexpr):
    """The float32 whose magnitude in this format has these bits."""
    if dtype == tl.float32:
        number = bits.to(tl.float32, bitcast=True)
    else:
        number = bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return number


@triton.jit
def row_scale(absmax):
    """The scale of a row, and what its values are multiplied with: 127 / absmax, or 0 where the row counts as zeros."""
    tiny = absmax < _SMALLEST_ABSMAX
    divisor = tl.where(tiny, 1.0, absmax)
    scale = tl.where(tiny, 0.0, tl.div_rn(absmax, 127.0))
    return scale, tl.where(tiny, 0.0, 127.0 * tl.div_rn(1.0, divisor))


@triton.jit
def int8_to(w, dtype: tl.constexpr):
    """int8 numbers in a float format, which holds them exactly.

    A GPU turns integers into floats at an eighth of its speed or less. Written into the last bits of 1024 (float16)
    or 2**23 (float32), a byte is that much more, and a subtraction is left.
    """
    byte = w.to(tl.uint8, bitcast=True) ^ 0x80  # w + 128
    if dtype == tl.float16:
        number = (byte.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    else:
        number = ((byte.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0).to(dtype)
    return number
