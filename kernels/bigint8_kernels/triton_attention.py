# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Attention over the pages of a pool on the GPU: generated tokens, one row of a sequence each, and rows of prompts.

    score[p] = scale * q . k[p] + slope * (p - place)      out = sum_p softmax(score)[p] v[p]

over the places p of a sequence up to the row's own, with the online softmax of FlashAttention (Dao et al. 2022).

A token: a program for each row, key head and part of the context takes all queries that share the head, so a key is
read once. The same launch norms and rotates the heads and writes the new key and value, which the program takes from
its registers, never from the pool. A long context is in several parts; the program of a row that ends last adds up
what the others left, in the order of the parts, as "Stream-K" does (Osama et al. 2023). So it stays one launch, and a
result does not depend on which one was last.

Rows of prompts: a program for each tile of rows and query head, after a launch that wrote all keys and values.

Traffic: keys and values once for a token, once for each tile of rows and query head of a prompt, from L2 where heads
share them.

Dimensions: T rows, G query heads of a key head, D values of a head, N keys of a step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .step import PAGE, Attention
from .triton_heads import head_blocks, head_numbers, head_tensors, load_heads, own_token, write_token
from .triton_numbers import FUSED

_PAGE = tl.constexpr(PAGE)
_LOWEST = tl.constexpr(-1.0e30)
"""Less than any score, and finite: the difference of two is not NaN."""

PART_PAGES = 16
"""The fewest pages of a part of the context: 256 keys, a few steps."""

_PART_PAGES = tl.constexpr(PART_PAGES)

MOST_PARTS = 64
MOST_COUNTERS = 4096
"""Rows times key heads whose context may be in parts: more of them fill any GPU as they are."""


@triton.jit
def _attend_pages(
    q_GD, slope_G, place_G, first_G, end_G, highest_G, total_G, acc_GD, keys, table, begin, stop, most, score_scale,
    page_values, kv_values, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGES: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """The online softmax over the pages [begin, stop) of a table, of which row g sees the places [first, end).

    `keys` points to the head's keys of page 0; from the place `most` on, the pool holds anything.
    """
    n, d = tl.arange(0, PAGES * _PAGE), tl.arange(0, BLOCK_D)
    for page in range(begin, stop, PAGES):
        ids = tl.load(table + page + n // _PAGE, mask=page + n // _PAGE < stop, other=0).to(tl.int64)
        place_N = page * _PAGE + n
        pages_N = keys + ids * page_values
        k_at = pages_N[None, :] + (d[:, None] * _PAGE + (n % _PAGE)[None, :])
        k_at = tl.multiple_of(tl.max_contiguous(k_at, (1, _PAGE)), (1, _PAGE))
        v_at = pages_N[:, None] + (kv_values + (n % _PAGE)[:, None] * D + d[None, :])
        if D == BLOCK_D:
            k_DN = tl.load(k_at)
            v_ND = tl.load(v_at, mask=(place_N < most)[:, None], other=0.0)
        else:
            k_DN = tl.load(k_at, mask=(d < D)[:, None], other=0.0)
            v_ND = tl.load(v_at, mask=(place_N < most)[:, None] & (d < D)[None, :], other=0.0)
        if k_DN.dtype != q_GD.dtype:
            k_DN, v_ND = k_DN.to(q_GD.dtype), v_ND.to(q_GD.dtype)
        s_GN = tl.dot(q_GD, k_DN, input_precision="ieee") * score_scale
        if ALIBI:
            s_GN += slope_G[:, None] * (place_N[None, :] - place_G[:, None]).to(tl.float32)
        seen = (place_N[None, :] >= first_G[:, None]) & (place_N[None, :] < end_G[:, None])
        s_GN = tl.where(seen, s_GN, float("-inf"))
        above_G = tl.maximum(highest_G, tl.max(s_GN, axis=1))
        p_GN = tl.exp(s_GN - above_G[:, None])
        fade_G = tl.exp(highest_G - above_G)
        total_G = total_G * fade_G + tl.sum(p_GN, axis=1)
        acc_GD = tl.dot(p_GN.to(v_ND.dtype), v_ND, acc_GD * fade_G[:, None], input_precision="ieee")
        highest_G = above_G
    return highest_G, total_G, acc_GD


@triton.jit
def _no_keys(BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """The online softmax before the first key: the highest score, the sum, the weighted values."""
    highest_G = tl.full((BLOCK_G,), _LOWEST, tl.float32)
    return highest_G, tl.zeros((BLOCK_G,), tl.float32), tl.zeros((BLOCK_G, BLOCK_D), tl.float32)


@triton.jit
def _one_key(q_GD, key_D, value_D, acc_GD, score_scale):
    """The online softmax after the first key, the row's own: its distance is 0, so alibi adds nothing."""
    score_G = tl.sum(q_GD.to(tl.float32) * key_D.to(tl.float32)[None, :], axis=1) * score_scale
    return score_G, tl.zeros_like(score_G) + 1.0, acc_GD + value_D.to(tl.float32)[None, :]


@triton.jit
def _part_of(first, end, part, most_parts, PAGES: tl.constexpr):
    """The pages [begin, stop) of a part of the places [first, end), and how many parts these are in: at least one."""
    first_page, last_page = first // _PAGE, tl.cdiv(end, _PAGE)
    length = tl.maximum(tl.cdiv(last_page - first_page, most_parts), _PART_PAGES)
    length = tl.cdiv(length, PAGES) * PAGES
    begin = first_page + part * length
    used = tl.maximum(1, tl.cdiv(last_page - first_page, length))
    return begin, tl.minimum(begin + length, last_page), used


@triton.jit
def _leave_part(part_values, part_sums, part, g, highest_G, total_G, acc_GD, D: tl.constexpr, GROUP: tl.constexpr,
                BLOCK_D: tl.constexpr):  # fmt: skip
    """What a part of the context gives, to `part_values` float32 (..., G, D) and `part_sums` (..., 2, G)."""
    d = tl.arange(0, BLOCK_D)
    inside = (g < GROUP)[:, None] & (d < D)[None, :]
    tl.store(part_values + (part * GROUP + g)[:, None] * D + d[None, :], acc_GD, mask=inside)
    tl.store(part_sums + part * 2 * GROUP + g, highest_G, mask=g < GROUP)
    tl.store(part_sums + part * 2 * GROUP + GROUP + g, total_G, mask=g < GROUP)


@triton.jit
def _add_parts(part_values, part_sums, first, used, g, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
               BLOCK_D: tl.constexpr):  # fmt: skip
    """The sum and the weighted values of so many parts, in their order. Another SM wrote them: past the L1 cache."""
    d = tl.arange(0, BLOCK_D)
    inside = (g < GROUP)[:, None] & (d < D)[None, :]
    highest_G, total_G, acc_GD = _no_keys(BLOCK_G, BLOCK_D)
    for part in range(first, first + used):
        at = part_sums + part * 2 * GROUP + g
        theirs_G = tl.load(at, mask=g < GROUP, other=_LOWEST, cache_modifier=".cg")
        their_total_G = tl.load(at + GROUP, mask=g < GROUP, other=0.0, cache_modifier=".cg")
        at = part_values + (part * GROUP + g)[:, None] * D + d[None, :]
        their_acc_GD = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
        above_G = tl.maximum(highest_G, theirs_G)
        fade_G, their_fade_G = tl.exp(highest_G - above_G), tl.exp(theirs_G - above_G)
        total_G = total_G * fade_G + their_total_G * their_fade_G
        acc_GD = acc_GD * fade_G[:, None] + their_acc_GD * their_fade_G[:, None]
        highest_G = above_G
    return total_G, acc_GD


@triton.jit(do_not_specialize=["score_scale", "q_epsilon", "k_epsilon", "window", "most_parts"])
def attend_tokens_kernel(
    qkv, pool, y, places, sequences, table, cos, sin, q_weight, q_bias, k_weight, k_bias, slopes, part_values,
    part_sums, counters, row_stride, table_stride, page_values, kv_values, q_offset, q_stride, k_offset, k_stride,
    v_offset, v_stride, q_epsilon, k_epsilon, score_scale, window, most_parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, HALF: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, ALIBI: tl.constexpr, WRITE: tl.constexpr, PAGES: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """`y` (T, heads * D) of one row and key head, or its share, where the context is in parts (SPLIT).

    WRITE: `qkv` has queries, keys and values as the layer gave them, and the own key and value go to the pool;
    otherwise it has the finished queries, and the pool all keys. `counters` int32 (T, key heads) are 0 before and
    after.
    """
    t, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    d, g = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
    place = tl.load(places + t)
    table += tl.load(sequences + t).to(tl.int64) * table_stride
    own_page = tl.load(table + place // _PAGE).to(tl.int64)
    head_G = kv_head * GROUP + g
    inside = (g < GROUP)[:, None] & (d < D)[None, :]
    y_at = y + (t * tl.num_programs(1) * GROUP + head_G)[:, None] * D + d[None, :]
    first, end = tl.maximum(0, place + 1 - window), place if WRITE else place + 1
    begin, stop, used = _part_of(first, end, part, most_parts, PAGES)
    if part >= used:
        return
    if own_page < 0:
        tl.store(y_at, tl.zeros((BLOCK_G, BLOCK_D), y.dtype.element_ty), mask=inside)
        return
    row, cos, sin = qkv + t * row_stride, cos + t * HALF, sin + t * HALF
    same: tl.constexpr = qkv.dtype.element_ty == pool.dtype.element_ty
    dtype: tl.constexpr = qkv.dtype.element_ty if same else tl.float32
    q_GD = load_heads(row + q_offset + head_G * q_stride, g < GROUP, q_weight, q_bias, q_epsilon, cos, sin, D, BLOCK_D,
                      HALF, Q_NORM).to(dtype)  # fmt: skip
    highest_G, total_G, acc_GD = _no_keys(BLOCK_G, BLOCK_D)
    if WRITE:  # noqa: SIM102  (known when the kernel is compiled, the next one when it runs)
        if part == 0:
            key, value = own_token(row, kv_head, k_weight, k_bias, k_epsilon, cos, sin, k_offset, k_stride, v_offset,
                                   v_stride, D, BLOCK_D, HALF, K_NORM)  # fmt: skip
            key, value = key.to(pool.dtype.element_ty), value.to(pool.dtype.element_ty)
            write_token(key, value, pool, own_page, place, kv_head, page_values, kv_values, D, BLOCK_D)
            highest_G, total_G, acc_GD = _one_key(q_GD, key, value, acc_GD, score_scale)
    slope_G = tl.load(slopes + head_G, mask=g < GROUP, other=0.0) if ALIBI else highest_G
    place_G = tl.zeros((BLOCK_G,), tl.int32) + place
    highest_G, total_G, acc_GD = _attend_pages(
        q_GD, slope_G, place_G, place_G - place + first, place_G - place + end, highest_G, total_G, acc_GD,
        pool + kv_head * D * _PAGE, table, begin, stop, end, score_scale, page_values, kv_values,
        D, BLOCK_D, PAGES, ALIBI,
    )  # fmt: skip
    if SPLIT:  # noqa: SIM102
        if used > 1:
            counter = counters + t * tl.num_programs(1) + kv_head
            base = (t * tl.num_programs(1) + kv_head) * most_parts
            _leave_part(part_values, part_sums, base + part, g, highest_G, total_G, acc_GD, D, GROUP, BLOCK_D)
            tl.debug_barrier()  # all threads have written before one says so
            if tl.atomic_add(counter, 1, sem="acq_rel") < used - 1:
                return
            total_G, acc_GD = _add_parts(part_values, part_sums, base, used, g, D, GROUP, BLOCK_G, BLOCK_D)
            tl.store(counter, 0)
    tl.store(y_at, (acc_GD / total_G[:, None]).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["score_scale", "window"])
def attend_rows_kernel(
    queries, pool, y, places, sequences, table, tiles, slopes, table_stride, page_values, kv_values, score_scale,
    window, D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, PAGES: tl.constexpr,
    ALIBI: tl.constexpr,
):  # fmt: skip
    """`y` (T, heads * D) of a tile of rows and one query head, of finished `queries`.

    The rows of tile i, all of one sequence, are [tiles[i], tiles[i + 1]), `tiles` int32; there may be none.
    """
    begin, end = tl.load(tiles + tl.program_id(0)), tl.load(tiles + tl.program_id(0) + 1)
    if begin >= end:
        return
    head, heads = tl.program_id(1), tl.num_programs(1)
    t, d = begin + tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    table += tl.load(sequences + begin).to(tl.int64) * table_stride
    place_G = tl.load(places + t, mask=t < end, other=0)
    token_G = tl.load(table + place_G // _PAGE, mask=t < end, other=-1) >= 0
    at = (t.to(tl.int64) * heads + head)[:, None] * D + d[None, :]
    inside = (t < end)[:, None] & (d < D)[None, :]
    same: tl.constexpr = queries.dtype.element_ty == pool.dtype.element_ty
    dtype: tl.constexpr = queries.dtype.element_ty if same else tl.float32
    q_GD = tl.load(queries + at, mask=inside, other=0.0).to(dtype)
    highest_G, total_G, acc_GD = _no_keys(BLOCK_G, BLOCK_D)
    slope_G = tl.load(slopes + head) + total_G if ALIBI else total_G
    first_G, end_G = tl.maximum(0, place_G + 1 - window), tl.where(token_G, place_G + 1, 0)
    first, last = tl.min(tl.where(token_G, first_G, 2147483647)), tl.max(end_G)
    highest_G, total_G, acc_GD = _attend_pages(
        q_GD, slope_G, place_G, first_G, end_G, highest_G, total_G, acc_GD, pool + (head // GROUP) * D * _PAGE,
        table, first // _PAGE, tl.cdiv(last, _PAGE), last, score_scale, page_values, kv_values, D, BLOCK_D, PAGES,
        ALIBI,
    )  # fmt: skip
    total_G = tl.where(token_G, total_G, 1.0)
    tl.store(y + at, (acc_GD / total_G[:, None]).to(y.dtype.element_ty), mask=inside)


ALL_PLACES = 2**30
"""The window of an attention that has none."""


def parts_of(rows: int, attention: Attention, table_pages: int, processors: int) -> int:
    """Into how many parts at most a context is cut, so that each SM has two programs."""
    programs = rows * attention.kv_heads
    if programs > MOST_COUNTERS:
        return 1
    return max(1, min(MOST_PARTS, table_pages // PART_PAGES, -(-2 * processors // programs)))


def is_wide(rows: Tensor, pool: Tensor) -> bool:
    """Whether the dot products are of float32: where the pool's format is not that of the rows, or both are float32."""
    return rows.dtype != pool.dtype or rows.dtype == torch.float32


def tile_of(head_dim: int, wide: bool, of_rows: bool) -> dict[str, int]:
    """Pages of a step, warps and stages of a program that attends: as many as registers and shared memory hold."""
    large = head_dim > (64 if of_rows or wide else 128)
    pages = (1 if large else 2) if wide else (2 if large else 4)
    return {"PAGES": pages, "num_warps": 4 if head_dim <= 128 else 8, "num_stages": 2}


def attend_tokens(
    qkv_TN: Tensor, attention: Attention, pool: Tensor, places_T: Tensor, sequences_T: Tensor, table: Tensor,
    cos_TR: Tensor | None, sin_TR: Tensor | None, counters: Tensor, write: bool, processors: int, out_TN: Tensor,
) -> None:  # fmt: skip
    """The attention of rows whose keys are all in the pool, or with `write` of one row of each sequence."""
    rows, heads = qkv_TN.shape[0], attention.heads
    parts = parts_of(rows, attention, table.shape[1], processors)
    room = parts if parts > 1 else 0
    part_values = torch.empty(rows, room, heads, attention.head_dim, dtype=torch.float32, device=qkv_TN.device)
    part_sums = torch.empty(rows, room, heads, 2, dtype=torch.float32, device=qkv_TN.device)
    slopes = qkv_TN if attention.slopes is None else attention.slopes
    wide = is_wide(qkv_TN, pool)
    attend_tokens_kernel[rows, attention.kv_heads, parts](
        qkv_TN, pool, out_TN, places_T, sequences_T, table, *head_tensors(attention, cos_TR, sin_TR, qkv_TN), slopes,
        part_values, part_sums, counters, *head_numbers(qkv_TN, pool, table, attention), attention.scale,
        attention.window or ALL_PLACES, parts, **head_blocks(attention), ALIBI=attention.slopes is not None,
        WRITE=write, SPLIT=parts > 1, **tile_of(attention.head_dim, wide, False), **FUSED,
    )  # fmt: skip


def rows_of_a_tile(wide: bool) -> int:
    """Rows of a prompt that a program takes, `wide` for float32, which no tensor core multiplies exactly."""
    return 16 if wide else 64


def row_tiles(sequences_T: Tensor, start: int, sequences: int, most_rows: int) -> Tensor:
    """int32: where the tiles of the rows from `start` on begin, and where the last ends; some at the end are empty.

    A tile has at most so many rows, all of one sequence; rows of a sequence lie together. In plain torch, once a step.
    """
    rows = sequences_T.shape[0]
    t = torch.arange(start, rows, dtype=torch.int32, device=sequences_T.device)
    of = sequences_T.narrow(0, start, rows - start)  # an index would ask for the GPU of a fake tensor
    begins = (of != of.roll(1)) | ((t - start) % most_rows == 0)
    tiles = torch.full(
        (triton.cdiv(rows - start, most_rows) + sequences + 1,), rows, dtype=torch.int32, device=t.device
    )
    return tiles.scatter_reduce_(0, begins.cumsum(0) - 1, t, "amin")


def attend_rows(
    q_TN: Tensor, attention: Attention, pool: Tensor, places_T: Tensor, sequences_T: Tensor, table: Tensor,
    tiles: Tensor, out_TN: Tensor,
) -> None:  # fmt: skip
    """The attention of the rows of these tiles, whose keys are all in the pool."""
    wide = is_wide(q_TN, pool)
    blocks = head_blocks(attention)
    attend_rows_kernel[tiles.shape[0] - 1, attention.heads](
        q_TN, pool, out_TN, places_T, sequences_T, table, tiles, q_TN if attention.slopes is None else attention.slopes,
        table.stride(0), pool.stride(0), pool.stride(1), attention.scale, attention.window or ALL_PLACES,
        D=blocks["D"], BLOCK_D=blocks["BLOCK_D"], GROUP=blocks["GROUP"], BLOCK_G=rows_of_a_tile(wide),
        ALIBI=attention.slopes is not None, **tile_of(attention.head_dim, wide, True), **FUSED,
    )  # fmt: skip
