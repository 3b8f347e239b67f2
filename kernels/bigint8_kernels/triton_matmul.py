"""LLM.int8() products on the GPU for prompts: int8 x int8 on tensor cores, the outlier columns in 16-bit, one store.

    Y[t, n] = (scale_x[t] * sum_k Xq[t, k] W[n, k]  +  sum_{c outlier} X[t, c] W[n, c]) * scale_w[n] + bias[n]

Xq is zero in the outlier columns, so the first sum runs over all of K without a gap. The second takes the columns that
`quantize_activations` listed, as many as its count says, which the kernel reads itself: nothing waits for the host.
By token, outliers are single values: in the listed columns, X counts as zero where |X[t, c]| < least[t], the bound of
the row that `quantize_by_token` stored, and Xq is zero where it does not.
Where several tiles of rows need these columns of W, a kernel of its own gathers them first, once: in W they are single
bytes, each of which brings 32 from memory. An int8 number is exact in float16, bfloat16 and float32, so the columns of
W are dequantized by a conversion in registers, and the scale of W is multiplied into both sums at once.

Where few programs would run, K is split over several: they add int32 sums, which give the same result in any order,
into a workspace, and a second kernel does the rest.

Dimensions: T tokens, K input features, N output features, C outlier columns.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_tiles import MatmulTile, row_bucket
from .triton_numbers import FUSED, int8_to

FINISH = MatmulTile(16, 128, 0, 4, 1)
"""The tile of the kernel that finishes what was split: few rows, since only then K is."""


@triton.jit
def _tile_of(program, rows, outputs, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The tile of a program: GROUP tiles of rows side by side, so that neighbours in time read the same weights."""
    tiles_t, tiles_n = tl.cdiv(rows, BLOCK_T), tl.cdiv(outputs, BLOCK_N)
    group = program // (GROUP * tiles_n)
    first = group * GROUP
    height = min(tiles_t - first, GROUP)
    within = program % (GROUP * tiles_n)
    return first + within % height, within // height


GATHERED = 256
"""The most columns of W that are gathered. Only the GPU knows how many there are, so there is always room for so many;
further columns are read from W itself. LLM.int8() finds a few dozen."""

GATHER_OUTPUTS, GATHER_COLUMNS = 32, 32
"""The tile of W's columns that a program gathers at a time."""

_GATHERED = tl.constexpr(GATHERED)


@triton.jit
def gather_columns_kernel(
    w, outliers, count, w_outliers, outputs, features, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """`w_outliers` int8 (N, GATHERED) of `w` int8 (N, K): the listed ones, in that order, as far as there is room."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    found = tl.minimum(tl.load(count), _GATHERED)
    for start in range(0, found, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        column = tl.load(outliers + c, mask=c < found, other=0)
        inside = (n < outputs)[:, None] & (c < found)[None, :]
        bytes_NC = tl.load(w + n.to(tl.int64)[:, None] * features + column[None, :], mask=inside, other=0)
        tl.store(w_outliers + n.to(tl.int64)[:, None] * _GATHERED + c[None, :], bytes_NC, mask=inside)


@triton.jit
def _finish(
    acc, x, x_scale, least, w, w_scale, bias, outliers, count, w_outliers, y, t, n, rows, outputs, features, x_stride,
    y_stride, by_token, has_bias, is_gathered, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The outlier part, both scales and the bias, and the store of a tile of Y.

    If `by_token`, values of these columns below `least` float32 (T,) are in the int8 part, and zero here.
    If `is_gathered`, the first columns are in `w_outliers` int8 (N, GATHERED), the others in `w`; else all are in `w`.
    """
    t_safe, n_safe = t % rows, n % outputs  # rows beyond the end read others', and are not stored
    total = acc.to(tl.float32) * tl.load(x_scale + t_safe)[:, None]
    bound = tl.load(least + t_safe, mask=t_safe < rows * by_token, other=0.0)[:, None]
    found = tl.load(count)
    x_rows = x + t_safe.to(tl.int64)[:, None] * x_stride
    w_rows = w + n_safe.to(tl.int64)[:, None] * features
    gathered = tl.minimum(found, is_gathered * _GATHERED)
    column_rows = w_outliers + n_safe.to(tl.int64)[:, None] * _GATHERED
    for start in range(0, gathered, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        column = tl.load(outliers + c, mask=c < found, other=0)
        x_TC = tl.load(x_rows + column[None, :], mask=(c < gathered)[None, :], other=0.0)
        x_TC = tl.where(tl.abs(x_TC.to(tl.float32)) < bound, 0.0, x_TC)
        w_NC = int8_to(tl.load(column_rows + c[None, :]), x_TC.dtype)
        total = tl.dot(x_TC, tl.trans(w_NC), total, input_precision="ieee")
    for start in range(gathered, found, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        column = tl.load(outliers + c, mask=c < found, other=0)
        x_TC = tl.load(x_rows + column[None, :], mask=(c < found)[None, :], other=0.0)
        x_TC = tl.where(tl.abs(x_TC.to(tl.float32)) < bound, 0.0, x_TC)
        w_NC = int8_to(tl.load(w_rows + column[None, :]), x_TC.dtype)
        total = tl.dot(x_TC, tl.trans(w_NC), total, input_precision="ieee")
    total *= tl.load(w_scale + n_safe)[None, :]
    total += tl.load(bias + n, mask=n < outputs * has_bias, other=0.0).to(tl.float32)[None, :]
    inside = (t < rows)[:, None] & (n < outputs)[None, :]
    tl.store(y + t.to(tl.int64)[:, None] * y_stride + n[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "bucket", "by_token", "has_bias", "is_gathered", "split"])
def int8_matmul_kernel(
    q, x, x_scale, least, w, w_scale, bias, outliers, count, w_outliers, y, sums,
    rows, outputs, features, x_stride, y_stride, bucket, by_token, has_bias, is_gathered, split,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile of Y, or with SPLIT its share of the sums, added to `sums` int32 (T, N).

    `q` int8 (T, K) and `x` (T, K) are the activations, `w` int8 (N, K). WHOLE: K is a multiple of BLOCK_K * split.
    `bucket` is only for tuning: what one number of rows was tuned for serves all in its bucket.
    """
    step = BLOCK_K * split if SPLIT else BLOCK_K
    tile_t, tile_n = _tile_of(tl.program_id(0), rows, outputs, BLOCK_T, BLOCK_N, GROUP)
    t, n = tile_t * BLOCK_T + tl.arange(0, BLOCK_T), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    q_at = q + (t % rows).to(tl.int64)[:, None] * features + k[None, :]
    w_at = w + (n % outputs).to(tl.int64)[:, None] * features + k[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.int32)
    for start in range(0, features, step):
        if WHOLE:
            q_TK, w_NK = tl.load(q_at), tl.load(w_at)
        else:
            inside = (start + k < features)[None, :]
            q_TK, w_NK = tl.load(q_at, mask=inside, other=0), tl.load(w_at, mask=inside, other=0)
        acc = tl.dot(q_TK, tl.trans(w_NK), acc, out_dtype=tl.int32)
        q_at += step
        w_at += step
    if SPLIT:
        inside = (t < rows)[:, None] & (n < outputs)[None, :]
        place = t.to(tl.int64)[:, None] * outputs + n[None, :]
        tl.atomic_add(sums + place, acc, mask=inside, sem="relaxed")
    else:
        _finish(
            acc, x, x_scale, least, w, w_scale, bias, outliers, count, w_outliers, y, t, n, rows, outputs, features,
            x_stride, y_stride, by_token, has_bias, is_gathered, BLOCK_C,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "by_token", "has_bias", "is_gathered"])
def finish_matmul_kernel(
    x, x_scale, least, w, w_scale, bias, outliers, count, w_outliers, y, sums,
    rows, outputs, features, x_stride, y_stride, by_token, has_bias, is_gathered,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of Y from `sums` int32 (T, N), where K was split."""
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (t < rows)[:, None] & (n < outputs)[None, :]
    acc = tl.load(sums + t.to(tl.int64)[:, None] * outputs + n[None, :], mask=inside, other=0)
    _finish(
        acc, x, x_scale, least, w, w_scale, bias, outliers, count, w_outliers, y, t, n, rows, outputs, features,
        x_stride, y_stride, by_token, has_bias, is_gathered, BLOCK_C,
    )  # fmt: skip


@functools.cache
def _tuned(tiles: tuple[MatmulTile, ...]):
    """The kernel with the fastest of these tiles, of whose depths K is a multiple. They are tried once for each shape,
    and what was found is kept on disk with Triton's cache."""
    configs = [
        triton.Config(_constants(tile) | {"WHOLE": True}, num_warps=tile.warps, num_stages=tile.stages)
        for tile in tiles
    ]
    return triton.autotune(configs, key=["bucket", "outputs", "features"], cache_results=True)(int8_matmul_kernel)


def _constants(tile: MatmulTile) -> dict[str, int]:
    return {
        "BLOCK_T": tile.rows, "BLOCK_N": tile.outputs, "BLOCK_K": tile.depth, "BLOCK_C": tile.outliers,
        "GROUP": tile.group, "SPLIT": tile.split > 1,
    }  # fmt: skip


_untuned: set[tuple[torch.device, torch.dtype, int, int, int]] = set()
"""What could not be tuned for want of memory, by device, dtype, bucket of rows, outputs and features."""


def int8_matmul(
    q_TK: Tensor,
    x_scale_T: Tensor,
    x_TK: Tensor,
    outliers_C: Tensor,
    count: Tensor,
    weight_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    tiles: tuple[MatmulTile, ...],
    least_T: Tensor | None = None,
    y_TN: Tensor | None = None,
) -> Tensor:
    """Y (T, N) in X's dtype, of what `triton_activations.quantize_activations` gave for X (T, K), rows maybe apart.

    One tile is used as it is; of several, which do not split K and need no masks, the fastest on this GPU. With the
    `least_T` of `quantize_by_token`, outliers are single values, without it whole columns. Y goes to `y_TN`, if given.
    """
    rows, features = q_TK.shape
    outputs = weight_NK.shape[0]
    y_TN = torch.empty(rows, outputs, dtype=x_TK.dtype, device=x_TK.device) if y_TN is None else y_TN
    split, bucket = tiles[0].split, row_bucket(rows)
    sums = torch.zeros(rows, outputs, dtype=torch.int32, device=x_TK.device) if split > 1 else count
    w_outliers, is_gathered = weight_NK, int(rows > (FINISH.rows if split > 1 else tiles[0].rows))
    if is_gathered:
        w_outliers = _gather_columns(weight_NK, outliers_C, count)
    bias, has_bias = y_TN if bias_N is None else bias_N, int(bias_N is not None)
    sizes = rows, outputs, features, x_TK.stride(0), y_TN.stride(0)
    flags = int(least_T is not None), has_bias, is_gathered
    least_T = x_scale_T if least_T is None else least_T
    finishing = x_TK, x_scale_T, least_T, weight_NK, scale_N, bias, outliers_C, count, w_outliers, y_TN, sums

    def grid(chosen: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(rows, chosen["BLOCK_T"]) * triton.cdiv(outputs, chosen["BLOCK_N"]), split

    shape = x_TK.device, x_TK.dtype, bucket, outputs, features
    if len(tiles) > 1 and shape not in _untuned:
        try:
            _tuned(tiles)[grid](q_TK, *finishing, *sizes, bucket, *flags, split, **FUSED)
            return y_TN
        except torch.OutOfMemoryError:  # to time tiles, Triton takes 256 MiB, which a full GPU may not have
            _untuned.add(shape)
    tile = tiles[0]
    int8_matmul_kernel[grid](
        q_TK, *finishing, *sizes, bucket, *flags, split, **_constants(tile),
        WHOLE=features % (tile.depth * split) == 0, num_warps=tile.warps, num_stages=tile.stages, **FUSED,
    )  # fmt: skip
    if split > 1:
        finish_matmul_kernel[triton.cdiv(outputs, FINISH.outputs), triton.cdiv(rows, FINISH.rows)](
            *finishing, *sizes, *flags, BLOCK_T=FINISH.rows, BLOCK_N=FINISH.outputs, BLOCK_C=FINISH.outliers,
            num_warps=FINISH.warps, num_stages=FINISH.stages, **FUSED,
        )  # fmt: skip
    return y_TN


def _gather_columns(weight_NK: Tensor, outliers_C: Tensor, count: Tensor) -> Tensor:
    """int8 (N, GATHERED), of which as many columns are set as are listed, at most all."""
    outputs, features = weight_NK.shape
    w_outliers = torch.empty(outputs, GATHERED, dtype=torch.int8, device=weight_NK.device)
    gather_columns_kernel[(triton.cdiv(outputs, GATHER_OUTPUTS),)](
        weight_NK, outliers_C, count, w_outliers, outputs, features,
        BLOCK_N=GATHER_OUTPUTS, BLOCK_C=GATHER_COLUMNS, num_warps=4, **FUSED,
    )  # fmt: skip
    return w_outliers
