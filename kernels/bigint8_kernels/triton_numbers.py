"""Numbers inside Triton kernels: rounding and magnitudes, in steps that give the same bits as the reference.

`round_to_int8` begins with an addition, so kernels that use it must be compiled with EXACT. If the compiler fused that
with the product before it, the result would be rounded once where the reference rounds twice.
"""

import triton
import triton.language as tl

from .reference import SMALLEST_ABSMAX

EXACT = {"enable_fp_fusion": False}
"""Options of a launch: each product is rounded before something is added to it."""

FUSED = {"enable_fp_fusion": True}
"""Options of a launch: a product and the addition after it may become one instruction, which rounds once."""

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


INT8_TO = {
    "fp32": """{
    .reg .b32 bytes;
    xor.b32 bytes, $4, 0x80808080;
    prmt.b32 $0, bytes, 0x4B000000, 0x7440;
    prmt.b32 $1, bytes, 0x4B000000, 0x7441;
    prmt.b32 $2, bytes, 0x4B000000, 0x7442;
    prmt.b32 $3, bytes, 0x4B000000, 0x7443;
    sub.f32 $0, $0, 0f4B000080;
    sub.f32 $1, $1, 0f4B000080;
    sub.f32 $2, $2, 0f4B000080;
    sub.f32 $3, $3, 0f4B000080;
    }""",
    "fp16": """{
    .reg .b32 bytes, offset;
    xor.b32 bytes, $2, 0x80808080;
    mov.b32 offset, 0x64806480;
    prmt.b32 $0, bytes, 0x64646464, 0x4140;
    prmt.b32 $1, bytes, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, offset;
    sub.f16x2 $1, $1, offset;
    }""",
    "bf16": """{
    .reg .b32 bytes, pair, low, sign, one;
    mov.b32 bytes, $2;
    mov.b32 one, 0x3F803F80;
    prmt.b32 pair, bytes, 0, 0x4140;
    lop3.b32 low, pair, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 sign, pair, 0x00800080, 0xC300C300, 0xEA;
    fma.rn.bf16x2 $0, low, one, sign;
    prmt.b32 pair, bytes, 0, 0x4342;
    lop3.b32 low, pair, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 sign, pair, 0x00800080, 0xC300C300, 0xEA;
    fma.rn.bf16x2 $1, low, one, sign;
    }""",
}
"""PTX for a GPU: four int8 numbers in one register become four of a float format, in four registers or two.

A GPU converts integers to floats at an eighth of its speed or less, so the bytes are written into floats instead. In
float32 and float16, w + 128 is written into the last bits of 2**23 or 1024. The float is then 2**23 + 128 + w or
1024 + 128 + w, and a subtraction leaves w. bfloat16 has only seven such bits: the float is 128 + (w & 127), and 128 is
subtracted, or 256 for a negative w. 0xEA is the truth table of (a & b) | c.
"""

BFLOAT16_TO_FLOAT32 = """{
    .reg .b32 pair;
    mov.b32 pair, $2;
    shl.b32 $0, pair, 16;
    and.b32 $1, pair, 0xFFFF0000;
    }"""
"""PTX: two bfloat16 numbers in one register become two float32, which begin with the same bits."""

_FOUR_INT8_TO_FLOAT32 = tl.constexpr(INT8_TO["fp32"])
_FOUR_INT8_TO_FLOAT16 = tl.constexpr(INT8_TO["fp16"])
_FOUR_INT8_TO_BFLOAT16 = tl.constexpr(INT8_TO["bf16"])
_BFLOAT16_TO_FLOAT32 = tl.constexpr(BFLOAT16_TO_FLOAT32)
_PTX = tl.constexpr(not triton.knobs.runtime.interpret)
"""Whether there is a GPU to run PTX on. The interpreter has none: it runs the plain line that says the same."""


@triton.jit
def int8_to(w, dtype: tl.constexpr):
    """int8 numbers in a float format, which holds them exactly."""
    if not _PTX:
        number = w.to(tl.float32).to(dtype)
    elif dtype == tl.float32:
        number = tl.inline_asm_elementwise(_FOUR_INT8_TO_FLOAT32, "=r,=r,=r,=r,r", [w], tl.float32, True, 4)
    elif dtype == tl.float16:
        number = tl.inline_asm_elementwise(_FOUR_INT8_TO_FLOAT16, "=r,=r,r", [w], tl.float16, True, 4)
    else:
        number = tl.inline_asm_elementwise(_FOUR_INT8_TO_BFLOAT16, "=r,=r,r", [w], tl.bfloat16, True, 4)
    return number


@triton.jit
def to_float32(x):
    """float16, bfloat16 or float32 numbers in float32."""
    if _PTX and x.dtype == tl.bfloat16:
        number = tl.inline_asm_elementwise(_BFLOAT16_TO_FLOAT32, "=r,=r,r", [x], tl.float32, True, 2)
    else:
        number = x.to(tl.float32)
    return number


@triton.jit
def part_of_k(features, split, BLOCK_K: tl.constexpr):
    """This program's part of K, of `split` programs along axis 1: where its whole steps begin and end, and whether the
    rest of K comes after them. The rest is less than a step, and the last program takes it."""
    steps, part = features // BLOCK_K, tl.program_id(1)
    first, end = steps * part // split * BLOCK_K, steps * (part + 1) // split * BLOCK_K
    return first, end, (end < features) & (part == split - 1)
