# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Queries, keys and values of a step's rows on the GPU: head norms, rotary positions, and the write to the pool.

    normed[d] = h[d] / sqrt(mean(h^2) + epsilon) * weight[d] + bias[d]          (centered: of h - mean(h))
    rotated[i] = h[i] cos - h[i + R/2] sin        rotated[i + R/2] = h[i + R/2] cos + h[i] sin

A value is rounded to the format of the rows after each of the two, as the reference does.

Dimensions: T rows, D values of a head, R of them rotated, G query heads of a key head.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .step import PAGE, Attention, Norm
from .triton_numbers import FUSED

NORMED, CENTERED, WEIGHTED, BIASED = 1, 2, 4, 8
"""The bits of what a head norm does; 0 for none."""

_NORMED, _CENTERED = tl.constexpr(NORMED), tl.constexpr(CENTERED)
_WEIGHTED, _BIASED = tl.constexpr(WEIGHTED), tl.constexpr(BIASED)
_PAGE = tl.constexpr(PAGE)


@triton.jit
def _weighed(value_GD, weight, bias, d, inside, NORM: tl.constexpr):
    if _WEIGHTED & NORM:
        value_GD *= tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    if _BIASED & NORM:
        value_GD += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    return value_GD


@triton.jit
def load_heads(
    at_G, inside_G, weight, bias, epsilon, cos, sin,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The heads (G, D) that begin at the addresses `at_G`, normed and rotated, in their own format.

    `cos` and `sin` are those of the row, HALF numbers each.
    """
    dtype: tl.constexpr = at_G.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    inside = inside_G[:, None] & (d < D)[None, :]
    value = tl.load(at_G[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    mean, factor = tl.zeros_like(value), tl.zeros_like(value)
    if NORM:
        if _CENTERED & NORM:
            mean += (tl.sum(value, axis=1) / D)[:, None]
        centered = tl.where(inside, value - mean, 0.0)
        factor += tl.rsqrt(tl.sum(centered * centered, axis=1) / D + epsilon)[:, None]
        value = _weighed(centered * factor, weight, bias, d, d < D, NORM).to(dtype).to(tl.float32)
    if HALF:
        turns = d < 2 * HALF
        partner = tl.where(d < HALF, d + HALF, d - HALF)
        other = tl.load(at_G[:, None] + partner[None, :], mask=inside & turns[None, :], other=0.0).to(tl.float32)
        if NORM:
            other = _weighed((other - mean) * factor, weight, bias, partner, turns, NORM).to(dtype).to(tl.float32)
        c = tl.load(cos + d % HALF, mask=turns, other=1.0)[None, :]
        s = tl.load(sin + d % HALF, mask=turns, other=0.0)[None, :]
        value = value * c + tl.where((d < HALF)[None, :], -other, other) * s
    return value.to(dtype)


@triton.jit
def write_token(
    key_D, value_D, pool, page, place, kv_head, page_values, kv_values, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A key and a value (D) into their page, whose values are `kv_values` behind the keys."""
    d = tl.arange(0, BLOCK_D)
    slot = place % _PAGE
    keys = pool + page * page_values + kv_head * D * _PAGE
    dtype: tl.constexpr = pool.dtype.element_ty
    tl.store(keys + d * _PAGE + slot, key_D.to(dtype), mask=d < D)
    tl.store(keys + kv_values + slot * D + d, value_D.to(dtype), mask=d < D)


@triton.jit(do_not_specialize=["q_epsilon", "k_epsilon"])
def rotate_write_kernel(
    qkv, pool, q_out, places, sequences, table, cos, sin, q_weight, q_bias, k_weight, k_bias,
    row_stride, table_stride, page_values, kv_values, q_offset, q_stride, k_offset, k_stride, v_offset, v_stride,
    q_epsilon, k_epsilon,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, HALF: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
):  # fmt: skip
    """A row's queries of one key head, to `q_out` (T, heads * D), and its key and value, to the pool."""
    t, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.load(places + t)
    page = tl.load(table + tl.load(sequences + t).to(tl.int64) * table_stride + place // _PAGE).to(tl.int64)
    d, g = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
    row = qkv + t * row_stride
    cos += t * HALF
    sin += t * HALF
    head = kv_head * GROUP + g
    q = load_heads(row + q_offset + head * q_stride, g < GROUP, q_weight, q_bias, q_epsilon, cos, sin, D, BLOCK_D,
                   HALF, Q_NORM)  # fmt: skip
    at = q_out + (t * tl.num_programs(1) * GROUP + head)[:, None] * D + d[None, :]
    tl.store(at, q, mask=(g < GROUP)[:, None] & (d < D)[None, :])
    if page >= 0:
        key, value = own_token(row, kv_head, k_weight, k_bias, k_epsilon, cos, sin, k_offset, k_stride, v_offset,
                               v_stride, D, BLOCK_D, HALF, K_NORM)  # fmt: skip
        write_token(key, value, pool, page, place, kv_head, page_values, kv_values, D, BLOCK_D)


@triton.jit
def own_token(
    row, kv_head, k_weight, k_bias, k_epsilon, cos, sin, k_offset, k_stride, v_offset, v_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, K_NORM: tl.constexpr,
):  # fmt: skip
    """The key and the value (D) of a row itself."""
    d, one = tl.arange(0, BLOCK_D), tl.arange(0, 1)
    key = load_heads(row + k_offset + (kv_head + one) * k_stride, one < 1, k_weight, k_bias, k_epsilon, cos, sin, D,
                     BLOCK_D, HALF, K_NORM)  # fmt: skip
    value = tl.load(row + v_offset + kv_head * v_stride + d, mask=d < D, other=0.0)
    return tl.reshape(key, (BLOCK_D,)), value


def norm_bits(norm: Norm | None) -> int:
    """What a head norm does, as the kernels take it."""
    if norm is None:
        return 0
    has = (norm.weight is not None) * WEIGHTED | (norm.bias is not None) * BIASED
    return NORMED | norm.centered * CENTERED | has


def head_blocks(attention: Attention) -> dict[str, int]:
    """What is compiled into the kernels of this attention."""
    group = attention.heads // attention.kv_heads
    return {
        "D": attention.head_dim, "BLOCK_D": max(16, triton.next_power_of_2(attention.head_dim)), "GROUP": group,
        "BLOCK_G": max(16, triton.next_power_of_2(group)), "HALF": attention.rotated // 2,
        "Q_NORM": norm_bits(attention.q_norm), "K_NORM": norm_bits(attention.k_norm),
    }  # fmt: skip


def head_tensors(attention: Attention, cos: Tensor | None, sin: Tensor | None, instead: Tensor) -> list[Tensor]:
    """cos, sin, and the weights and biases of the head norms; `instead` where there is none."""
    norms = (attention.q_norm, attention.k_norm)
    given = [cos, sin, *(each for norm in norms for each in ((norm.weight, norm.bias) if norm else (None, None)))]
    return [instead if each is None else each for each in given]


def head_numbers(qkv_TN: Tensor, pool: Tensor, table: Tensor, attention: Attention) -> list[Any]:
    """The strides and offsets, and the epsilons of the head norms."""
    epsilons = [norm.epsilon if norm else 0.0 for norm in (attention.q_norm, attention.k_norm)]
    strides = qkv_TN.stride(0), table.stride(0), pool.stride(0), pool.stride(1)
    return [*strides, *attention.q, *attention.k, *attention.v, *epsilons]


def rotate_write(
    qkv_TN: Tensor, attention: Attention, pool: Tensor, places_T: Tensor, sequences_T: Tensor, table: Tensor,
    cos_TR: Tensor | None, sin_TR: Tensor | None,
) -> Tensor:  # fmt: skip
    """Queries (T, heads * D) of the rows in their own dtype; their keys and values go to the pool."""
    rows = qkv_TN.shape[0]
    q_TN = torch.empty(rows, attention.heads * attention.head_dim, dtype=qkv_TN.dtype, device=qkv_TN.device)
    if rows:
        rotate_write_kernel[rows, attention.kv_heads](
            qkv_TN, pool, q_TN, places_T, sequences_T, table, *head_tensors(attention, cos_TR, sin_TR, qkv_TN),
            *head_numbers(qkv_TN, pool, table, attention), **head_blocks(attention), num_warps=1, **FUSED,
        )  # fmt: skip
    return q_TN
