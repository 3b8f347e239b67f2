"""LLM.int8() activations on the GPU: outlier columns, row scales and int8 values, without a word to the host.

    outlier[k] = any_t |x[t, k]| >= threshold
    scale[t] = max over k not an outlier of |x[t, k]| / 127
    q[t, k] = 0 if outlier[k] else round(x[t, k] / scale[t])

By token, the outliers are single values instead, measured by their own row:

    least[t] = threshold * sqrt(sum_k x[t, k]^2 / K), infinite where that is 0
    outlier[t, k] = |x[t, k]| >= least[t]

Their columns are marked and listed all the same; a value of such a column that is no outlier itself stays in the int8
part. `least` is computed once, summed in float32, and stored: all kernels compare with the same bits, so they find the
same outliers.

Whether a column is an outlier is known only when all rows were seen, so there are two launches: one marks columns (by
token, it computes `least` before), one quantizes rows and, in a program of its own, lists the marked columns in
ascending order. X is read twice, the second time from the L2 cache where it fits there (2048 tokens of 1024 features in
4 MB of float16). Traffic of the second launch per value: 2 bytes read (4 for float32), 1 written.

Dimensions: T tokens, K features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_numbers import EXACT, FUSED, magnitude, magnitude_to_float32, round_to_int8, row_scale
from .triton_weights import block_of

MARK_ROWS, MARK_COLUMNS = 32, 128
"""The tile of X in which one program of the first launch looks for outliers: 32 values for each of 128 threads."""

LIST_BLOCK = 1024
"""Columns that are listed at once."""


@triton.jit(do_not_specialize=["rows", "threshold"])
def mark_outliers_kernel(
    x, marks, rows, columns, stride, threshold, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Sets `marks` int8 (K,) to 1 where a column of `x` (T, K) has an outlier. All that write there write the same."""
    t = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (t < rows)[:, None] & (k < columns)[None, :]
    values = tl.load(x + t.to(tl.int64)[:, None] * stride + k[None, :], mask=inside, other=0.0)
    largest = tl.max(tl.abs(values.to(tl.float32)), axis=0)
    tl.store(marks + k, tl.full((BLOCK_COLUMNS,), 1, tl.int8), mask=(largest >= threshold) & (k < columns))


@triton.jit(do_not_specialize=["threshold"])
def mark_by_token_kernel(x, marks, least, columns, stride, threshold, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """`least` float32 (T,) of the rows of `x` (T, K), a program each, and 1 in `marks` int8 (K,) for each of a row's
    outliers. WIDE: rows may have more than BLOCK values."""
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    k = tl.arange(0, BLOCK)
    values = tl.load(x + k, mask=k < columns, other=0.0).to(tl.float32)
    squares = values * values
    if WIDE:
        for start in range(BLOCK, columns, BLOCK):
            more = tl.load(x + start + k, mask=start + k < columns, other=0.0).to(tl.float32)
            squares += more * more
    bound = threshold * tl.sqrt_rn(tl.div_rn(tl.sum(squares), tl.cast(columns, tl.float32)))
    bound = tl.where(bound > 0, bound, float("inf"))  # a row of zeros has no outliers
    tl.store(least + row, bound)
    ones = tl.full((BLOCK,), 1, tl.int8)
    tl.store(marks + k, ones, mask=(tl.abs(values) >= bound) & (k < columns))
    if WIDE:
        for start in range(BLOCK, columns, BLOCK):
            more = tl.load(x + start + k, mask=start + k < columns, other=0.0).to(tl.float32)
            tl.store(marks + start + k, ones, mask=(tl.abs(more) >= bound) & (start + k < columns))


@triton.jit
def _others(values, marked, bound):
    """The values that are not in the outlier part, 0 for those that are: |x| >= `bound` in a marked column."""
    return tl.where((marked > 0) & (tl.abs(values.to(tl.float32)) >= bound), 0.0, values)


@triton.jit(do_not_specialize=["rows", "by_token"])
def quantize_activations_kernel(
    x, marks, least, out, scale, outliers, count, rows, columns, stride, by_token,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """`out` int8 (T, K) and `scale` float32 (T,) of `x`; the first program lists the marked columns: `outliers` int32
    (K,), of which the first `count` int32 (1,) are set. WIDE: rows may have more than BLOCK values. If `by_token`, a
    row's outliers have |x| >= `least` float32 (T,), else all of a marked column are outliers, and `least` is not read.

    That program takes longest, so it is the first: the others run beside it.
    """
    program = tl.program_id(0)
    if program == 0:
        found = 0
        for start in range(0, columns, LIST):
            k = start + tl.arange(0, LIST)
            marked = tl.load(marks + k, mask=k < columns, other=0).to(tl.int32)
            place = found + tl.cumsum(marked) - marked
            tl.store(outliers + place, k, mask=marked > 0)
            found += tl.sum(marked)
        tl.store(count, found)
    else:
        row = program.to(tl.int64) - 1
        x += row * stride
        out += row * columns
        dtype: tl.constexpr = x.dtype.element_ty
        bound = tl.load(least + row, mask=by_token > 0, other=0.0)
        k = tl.arange(0, BLOCK)
        values = tl.load(x + k, mask=k < columns, other=0.0)
        marked = tl.load(marks + k, mask=k < columns, other=0)
        values = _others(values, marked, bound)
        largest = tl.max(magnitude(values))
        if WIDE:
            for start in range(BLOCK, columns, BLOCK):
                more = tl.load(x + start + k, mask=start + k < columns, other=0.0)
                marked = tl.load(marks + start + k, mask=start + k < columns, other=0)
                largest = tl.maximum(largest, tl.max(magnitude(_others(more, marked, bound))))
        row_absmax_scale, inverse = row_scale(magnitude_to_float32(largest, dtype))
        tl.store(scale + row, row_absmax_scale)
        tl.store(out + k, round_to_int8(values.to(tl.float32) * inverse), mask=k < columns)
        if WIDE:
            for start in range(BLOCK, columns, BLOCK):
                more = tl.load(x + start + k, mask=start + k < columns, other=0.0)
                marked = tl.load(marks + start + k, mask=start + k < columns, other=0)
                more = _others(more, marked, bound).to(tl.float32)
                tl.store(out + start + k, round_to_int8(more * inverse), mask=start + k < columns)


def quantize_activations(x_TK: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.quantize_activations` bit for bit: int8 (T, K), float32 scales (T,), and the outlier columns.

    These are int32 (K,), ascending, of which as many are set as the last result, int32 (1,), says. All stay on the
    device. X's rows may be apart, its last dimension is contiguous. A threshold of 0 means no outliers.
    """
    rows, columns = x_TK.shape
    marks_K = torch.zeros(columns, dtype=torch.int8, device=x_TK.device)
    if threshold > 0:
        grid = triton.cdiv(columns, MARK_COLUMNS), triton.cdiv(rows, MARK_ROWS)
        mark_outliers_kernel[grid](
            x_TK, marks_K, rows, columns, x_TK.stride(0), threshold,
            BLOCK_ROWS=MARK_ROWS, BLOCK_COLUMNS=MARK_COLUMNS, num_warps=4, **FUSED,
        )  # fmt: skip
    return _quantize(x_TK, marks_K, None)


def quantize_by_token(x_TK: Tensor, threshold: float) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None]:
    """The activations of `reference.int8_linear_by_token`: what `quantize_activations` gives, and `least` float32 (T,).

    A row's outliers are its values of at least `least`; the columns are those in which any row has one. Without a
    threshold there are none, and `least` is None.
    """
    rows, columns = x_TK.shape
    marks_K = torch.zeros(columns, dtype=torch.int8, device=x_TK.device)
    if threshold <= 0:
        return _quantize(x_TK, marks_K, None), None
    least_T = torch.empty(rows, dtype=torch.float32, device=x_TK.device)
    block, warps, wide = block_of(columns)
    mark_by_token_kernel[(rows,)](
        x_TK, marks_K, least_T, columns, x_TK.stride(0), threshold, BLOCK=block, WIDE=wide, num_warps=warps, **FUSED,
    )  # fmt: skip
    return _quantize(x_TK, marks_K, least_T), least_T


def _quantize(x_TK: Tensor, marks_K: Tensor, least_T: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (rows, columns), device = x_TK.shape, x_TK.device
    q_TK = torch.empty(rows, columns, dtype=torch.int8, device=device)
    scale_T = torch.empty(rows, dtype=torch.float32, device=device)
    outliers_K = torch.empty(columns, dtype=torch.int32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    block, warps, wide = block_of(columns)
    quantize_activations_kernel[(rows + 1,)](
        x_TK, marks_K, scale_T if least_T is None else least_T, q_TK, scale_T, outliers_K, count, rows, columns,
        x_TK.stride(0), int(least_T is not None), BLOCK=block, WIDE=wide, LIST=LIST_BLOCK, num_warps=warps, **EXACT,
    )  # fmt: skip
    return q_TK, scale_T, outliers_K, count
