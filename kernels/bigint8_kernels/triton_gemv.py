"""Few rows of 16-bit activations times int8 weights on the GPU: a token, or a few.

    Y[t, n] = sum_k X[t, k] W[n, k] * scale[n] + bias[n]

The weights' bytes are the whole cost, so they are read once, 16 at a time, and become X's format in registers, exactly.
The kernel takes X as it is, without an outlier step; `gpu` has rounded float32 X to 16 bits before.
One row is multiplied by ordinary arithmetic in float32; several go through the tensor cores, whose smallest tile of 16
rows they share.

Up to three layers of the same X, as those of queries, keys and values, are one launch: their programs run side by
side, and so do their outputs.

Where the outputs alone would not fill the GPU, `int8_gemv` may split K over several programs: each writes its float32
sums to a place of its own, and a second kernel adds them in a fixed order, so that a result does not change from run to
run. `int8_gemv_side_by_side` gives a program more warps instead, and stays one launch.

Dimensions: T tokens, K input features, N output features.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_tiles import MOST_SPLITS, GemvTile
from .triton_numbers import FUSED, int8_to, part_of_k, to_float32


@triton.jit
def _one_row_products(w_at, x_at, products, inside):
    """Add the products of a step of W with a single row of X to `products` (N, K). `x_at` (N, K) points to the row N
    times: each thread loads the values that it multiplies, and no thread waits for another."""
    if inside is None:
        w_NK, x_NK = tl.load(w_at), tl.load(x_at)
    else:
        w_NK, x_NK = tl.load(w_at, mask=inside, other=0), tl.load(x_at, mask=inside, other=0.0)
    return tl.fma(int8_to(w_NK, tl.float32), to_float32(x_NK), products)


@triton.jit
def _row_sums(w_at, x_at, sums, inside):
    """`sums` (N, T) and those of a step of W with several rows of X (K, T)."""
    if inside is None:
        w_NK, x_KT = tl.load(w_at), tl.load(x_at)
    else:
        w_NK, x_KT = tl.load(w_at, mask=inside[None, :], other=0), tl.load(x_at, mask=inside[:, None], other=0.0)
    return tl.dot(int8_to(w_NK, x_KT.dtype), x_KT, sums, input_precision="ieee")


@triton.jit(do_not_specialize=["rows", "has_bias", "has_bias_2", "has_bias_3", "split"])
def int8_gemv_kernel(
    x, w, w_scale, bias, w_2, w_scale_2, bias_2, w_3, w_scale_3, bias_3, y, parts,
    rows, outputs, outputs_2, outputs_3, features, x_stride, y_stride, has_bias, has_bias_2, has_bias_3, split,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """A tile of Y, or where `split` > 1 its share of the sums, to `parts` float32 (split, T, N).

    `x` (T, K), `w` int8 (N, K); `y` (T, N) has the outputs of up to three layers side by side. BLOCK_T is 1 for one
    row. What is left of K when it is no multiple of BLOCK_K is a step of its own.
    """
    tile = tl.program_id(0)
    if LAYERS > 1:
        tiles = tl.cdiv(outputs, BLOCK_N)
        if tile >= tiles:
            tile -= tiles
            y += outputs
            w, w_scale, bias, outputs, has_bias = w_2, w_scale_2, bias_2, outputs_2, has_bias_2
            if LAYERS > 2:
                tiles = tl.cdiv(outputs_2, BLOCK_N)
                if tile >= tiles:
                    tile -= tiles
                    y += outputs_2
                    w, w_scale, bias, outputs, has_bias = w_3, w_scale_3, bias_3, outputs_3, has_bias_3
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    w_at = w + (n % outputs).to(tl.int64)[:, None] * features + k[None, :]
    first, end, has_rest = part_of_k(features, split, BLOCK_K)
    if BLOCK_T == 1:
        x_at = tl.broadcast_to((x + tl.program_id(2).to(tl.int64) * x_stride + k)[None, :], w_at.shape)
        products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in tl.range(first, end, BLOCK_K):
            products = _one_row_products(w_at + start, x_at + start, products, None)
        if has_rest:
            inside = tl.broadcast_to((end + k < features)[None, :], w_at.shape)
            products = _one_row_products(w_at + end, x_at + end, products, inside)
        sums = tl.sum(products, axis=1)[:, None]
    else:
        x_at = x + (t % rows).to(tl.int64)[None, :] * x_stride + k[:, None]
        sums = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for start in tl.range(first, end, BLOCK_K):
            sums = _row_sums(w_at + start, x_at + start, sums, None)
        if has_rest:
            sums = _row_sums(w_at + end, x_at + end, sums, end + k < features)
    inside_NT = (n < outputs)[:, None] & (t < rows)[None, :]
    if split > 1:
        place = (tl.program_id(1).to(tl.int64) * rows + t[None, :]) * outputs + n[:, None]
        tl.store(parts + place, sums, mask=inside_NT)
    else:
        sums *= tl.load(w_scale + n % outputs)[:, None]
        sums += tl.load(bias + n, mask=n < outputs * has_bias, other=0.0).to(tl.float32)[:, None]
        place = t.to(tl.int64)[None, :] * y_stride + n[:, None]
        tl.store(y + place, sums.to(y.dtype.element_ty), mask=inside_NT)


@triton.jit(do_not_specialize=["rows", "has_bias", "split"])
def add_parts_kernel(
    parts, w_scale, bias, y, rows, outputs, has_bias, split, BLOCK_N: tl.constexpr, MOST: tl.constexpr
):
    """Part of a row of Y from `parts` float32 (split, T, N), at most MOST of them, added in ascending order."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.program_id(1).to(tl.int64) * outputs + n
    total = tl.zeros((BLOCK_N,), tl.float32)
    for part in tl.static_range(MOST):  # unrolled, so that all are on their way at once
        at = parts + tl.cast(part, tl.int64) * rows * outputs + place
        total += tl.load(at, mask=n < tl.where(part < split, outputs, 0), other=0.0)
    total *= tl.load(w_scale + n, mask=n < outputs, other=0.0)
    total += tl.load(bias + n, mask=n < outputs * has_bias, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=n < outputs)


ADD_BLOCK = 512
"""Outputs that one program of the second kernel adds up: 4 for each of 128 threads."""


def int8_gemv(x_TK: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None, tile: GemvTile) -> Tensor:
    """Y (T, N) in X's dtype, of X (T, K), rows maybe apart, in 16-bit or float32."""
    rows, features = x_TK.shape
    outputs = weight_NK.shape[0]
    y_TN = torch.empty(rows, outputs, dtype=x_TK.dtype, device=x_TK.device)
    split = tile.split
    parts = torch.empty(split, rows, outputs, dtype=torch.float32, device=x_TK.device) if split > 1 else scale_N
    bias, has_bias = y_TN if bias_N is None else bias_N, int(bias_N is not None)
    layer = weight_NK, scale_N, bias
    grid = triton.cdiv(outputs, tile.outputs), split, triton.cdiv(rows, tile.rows)
    int8_gemv_kernel[grid](
        x_TK, *layer, *layer, *layer, y_TN, parts, rows, outputs, outputs, outputs, features, x_TK.stride(0), outputs,
        has_bias, has_bias, has_bias, split, BLOCK_T=tile.rows, BLOCK_N=tile.outputs, BLOCK_K=tile.depth, LAYERS=1,
        num_warps=tile.warps, num_stages=tile.stages, **FUSED,
    )  # fmt: skip
    if split > 1:
        add_parts_kernel[(triton.cdiv(outputs, ADD_BLOCK), rows)](
            parts, scale_N, bias, y_TN, rows, outputs, has_bias, split,
            BLOCK_N=ADD_BLOCK, MOST=MOST_SPLITS, num_warps=4, **FUSED,
        )  # fmt: skip
    return y_TN


MOST_LAYERS = 3

WeightScaleBias = tuple[Tensor, Tensor, Tensor | None]


def int8_gemv_side_by_side(x_TK: Tensor, layers: Sequence[WeightScaleBias], tile: GemvTile, y_TN: Tensor) -> None:
    """The outputs of up to MOST_LAYERS layers (weight, scale, bias) of X, side by side in `y_TN`: one launch.

    Rows of X and Y may be apart. The biases are of one dtype.
    """
    some_bias = next((bias_N for _, _, bias_N in layers if bias_N is not None), y_TN)
    given = [*layers, *[layers[0]] * (MOST_LAYERS - len(layers))]
    pointers = [each for w, scale, bias in given for each in (w, scale, some_bias if bias is None else bias)]
    outputs = [len(weight_NK) for weight_NK, _, _ in given]
    tiles = sum(triton.cdiv(count, tile.outputs) for count in outputs[: len(layers)])
    rows, features = x_TK.shape
    int8_gemv_kernel[tiles, 1, triton.cdiv(rows, tile.rows)](
        x_TK, *pointers, y_TN, layers[0][1], rows, *outputs, features, x_TK.stride(0), y_TN.stride(0),
        *(int(bias is not None) for _, _, bias in given), 1, BLOCK_T=tile.rows, BLOCK_N=tile.outputs,
        BLOCK_K=tile.depth, LAYERS=len(layers), num_warps=tile.warps, num_stages=tile.stages, **FUSED,
    )  # fmt: skip
