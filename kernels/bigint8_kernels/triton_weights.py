"""Vector-wise absmax quantization of a weight's rows on the GPU: what loading does with every byte.

    scale[r] = max_k |w[r, k]| / 127        q[r, k] = round(w[r, k] * (127 / max_k |w[r, k]|))

A program takes one row. Up to the largest of BLOCKS values stay in registers between the two steps, so the source is
read once; a wider row is read a second time, which the L2 cache serves. Traffic per value: the source's 2 or 4 bytes
and 1 written.

Dimensions: R rows, K columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_numbers import EXACT, infinity_bits, magnitude, magnitude_to_float32, round_to_int8, row_scale

BLOCKS = {4096: 8, 16384: 32}
"""Values of a row that a program holds, and its warps: 16 values a thread, of the 64 registers that each of the
1024 threads of the largest may have (65536 an SM)."""


@triton.jit
def quantize_rows_kernel(
    source, out, scale, bad, columns, source_stride, out_stride, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """`source` float (R, K) to `out` int8 and `scale` float32 (R,); adds the number of NaN and infinities to `bad`.

    WIDE: rows may have more than BLOCK values.
    """
    row = tl.program_id(0).to(tl.int64)  # rows times columns pass 2**31 in the layers of a 175B model
    source += row * source_stride
    out += row * out_stride
    k = tl.arange(0, BLOCK)
    dtype: tl.constexpr = source.dtype.element_ty
    infinity: tl.constexpr = infinity_bits(dtype)
    x = tl.load(source + k, mask=k < columns, other=0.0)
    bits = magnitude(x)
    largest = tl.max(bits)
    count = tl.sum((bits >= infinity).to(tl.int32))
    if WIDE:
        for start in range(BLOCK, columns, BLOCK):
            bits = magnitude(tl.load(source + start + k, mask=start + k < columns, other=0.0))
            largest = tl.maximum(largest, tl.max(bits))
            count += tl.sum((bits >= infinity).to(tl.int32))
    if count > 0:
        tl.atomic_add(bad, count, sem="relaxed")
    absmax = tl.where(count > 0, 0.0, magnitude_to_float32(largest, dtype))
    row_absmax_scale, inverse = row_scale(absmax)
    tl.store(scale + row, row_absmax_scale)
    x = tl.where(count > 0, 0.0, x.to(tl.float32))
    tl.store(out + k, round_to_int8(x * inverse), mask=k < columns)
    if WIDE:
        for start in range(BLOCK, columns, BLOCK):
            x = tl.load(source + start + k, mask=start + k < columns, other=0.0).to(tl.float32)
            x = tl.where(count > 0, 0.0, x)
            tl.store(out + start + k, round_to_int8(x * inverse), mask=start + k < columns)


def block_of(columns: int) -> tuple[int, int, bool]:
    """The block for rows of this width, its number of warps, and whether a row may have more values than that."""
    largest = max(BLOCKS)
    block = next((block for block in BLOCKS if columns <= block), largest)
    return block, BLOCKS[block], block == largest


def quantize_rows_into(source_RK: Tensor, out_RK: Tensor, scale_R: Tensor, bad: Tensor) -> None:
    """Quantize rows in place; `bad` int32 (1,) counts NaN and infinite values, on the device: nothing waits for it.

    The last dimension of `out_RK` is contiguous. A row with such a value gets scale and values 0.
    """
    rows, columns = source_RK.shape
    if not rows or not columns:
        scale_R.zero_()
        return
    source_RK = source_RK if source_RK.stride(1) == 1 else source_RK.contiguous()  # a transposed weight
    block, warps, wide = block_of(columns)
    quantize_rows_kernel[(rows,)](
        source_RK, out_RK, scale_R, bad, columns, source_RK.stride(0), out_RK.stride(0),
        BLOCK=block, WIDE=wide, num_warps=warps, **EXACT,
    )  # fmt: skip


def quantize_rows(source_RK: Tensor, out_RK: Tensor, scale_R: Tensor) -> bool:
    """`reference.quantize_rows` bit for bit, in place. False if a value is NaN or infinite, which waits for the GPU."""
    bad = torch.zeros(1, dtype=torch.int32, device=source_RK.device)
    quantize_rows_into(source_RK, out_RK, scale_R, bad)
    return not int(bad)
