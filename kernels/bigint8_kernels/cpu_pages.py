# mypy: allow-untyped-defs, allow-untyped-decorators
"""What attention on the CPU begins with: the queries of a step's rows, and their keys and values in pages.

Queries and keys are normed and rotated in float32. Queries are scaled too, so that scores need not be.
"""

import ctypes

import torch
from numba import njit

from .cpu_rows import Rows, Table, norm_row
from .cpu_threads import kernel, record_at
from .numba_bits import float32_at, from_float32, int16_at, int32_at, uint16_at
from .numba_floats import stack_floats
from .step import PAGE

MOST_HEAD_DIM = 512


class AttentionWork(ctypes.Structure):
    """A `step.Attention` with the addresses of its tensors, 0 for none.

    qkv: float32 (T, qkv_stride). q: float32 (T, heads * D), where queries are kept, rotated and scaled. out: float32
    (T, heads * D). pool: that of `step.pool_shape`, pages `page_stride` values apart. state: a Rows. table: a Table
    most_split: so many tiles are given to threads in chunks
    """

    _fields_ = [
        *((name, ctypes.c_ssize_t) for name in ("qkv", "q", "out", "pool", "state", "table", "slopes")),
        *((name, ctypes.c_ssize_t) for name in ("qkv_stride", "page_stride", "heads", "kv_heads", "head_dim")),
        *(
            (name, ctypes.c_ssize_t)
            for name in ("q_offset", "q_stride", "k_offset", "k_stride", "v_offset", "v_stride")
        ),
        *((name, ctypes.c_ssize_t) for name in ("rotated", "window", "most_split")),
        *((name, ctypes.c_ssize_t) for name in ("q_norm", "q_weight", "q_bias", "q_centered")),
        *((name, ctypes.c_ssize_t) for name in ("k_norm", "k_weight", "k_bias", "k_centered")),
        *((name, ctypes.c_float) for name in ("scale", "q_epsilon", "k_epsilon")),
    ]


attention_at, state_at, table_at = record_at(AttentionWork), record_at(Rows), record_at(Table)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def pages_of(work, t):
    """The table of a row's sequence: a pointer to its pages."""
    table, state = table_at(work.table), state_at(work.state)
    return int32_at(table.pages, int32_at(state.sequences, t)[0] * table.width)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def own_page(work, t):
    return pages_of(work, t)[int32_at(state_at(work.state).places, t)[0] // PAGE]


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _rotate(work, x, t):
    """Rotary positions of the first values of a head, in place."""
    half = work.rotated // 2
    state = state_at(work.state)
    cos, sin = float32_at(state.cos, t * half), float32_at(state.sin, t * half)
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i], x[i + half] = a * cos[i] - b * sin[i], b * cos[i] + a * sin[i]


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _query(work, t, head):
    """A head's query, normed, rotated and scaled."""
    width = work.head_dim
    source = float32_at(work.qkv, t * work.qkv_stride + work.q_offset + head * work.q_stride)
    q = float32_at(work.q, (t * work.heads + head) * width)
    if work.q_norm:
        norm_row(source, q, width, work.q_weight, work.q_bias, work.q_epsilon, work.q_centered)
    else:
        for d in range(width):
            q[d] = source[d]
    if work.rotated:
        _rotate(work, q, t)
    for d in range(width):
        q[d] *= work.scale


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _key_value(work, pool, t, head, page):
    """A head's key, normed and rotated, and its value, to the pool."""
    width, place = work.head_dim, int32_at(state_at(work.state).places, t)[0] % PAGE
    row = t * work.qkv_stride
    source = float32_at(work.qkv, row + work.k_offset + head * work.k_stride)
    v = float32_at(work.qkv, row + work.v_offset + head * work.v_stride)
    k = stack_floats(MOST_HEAD_DIM)
    if work.k_norm:
        norm_row(source, k, width, work.k_weight, work.k_bias, work.k_epsilon, work.k_centered)
    else:
        for d in range(width):
            k[d] = source[d]
    if work.rotated:
        _rotate(work, k, t)
    keys = page * work.page_stride + head * width * PAGE
    values = keys + work.kv_heads * width * PAGE + place * width
    for d in range(width):
        pool[keys + d * PAGE + place] = from_float32(k[d], pool[0])
    for d in range(width):
        pool[values + d] = from_float32(v[d], pool[0])


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _prepare(work, pool, part, parts):
    heads, kv_heads, rows = work.heads, work.kv_heads, state_at(work.state).rows
    tasks = rows * kv_heads
    for task in range(part * tasks // parts, (part + 1) * tasks // parts):
        t, kv_head = task // kv_heads, task % kv_heads
        page = own_page(work, t)
        if page >= 0:
            _key_value(work, pool, t, kv_head, page)
            shared = heads // kv_heads
            for head in range(kv_head * shared, (kv_head + 1) * shared):
                _query(work, t, head)


@kernel
def prepare_float32(address, part, parts):
    """Queries, normed, rotated and scaled; keys and values to a pool of float32."""
    work = attention_at(address)
    _prepare(work, float32_at(work.pool, 0), part, parts)


@kernel
def prepare_float16(address, part, parts):
    """`prepare_float32` with a pool of float16."""
    work = attention_at(address)
    _prepare(work, uint16_at(work.pool, 0), part, parts)


@kernel
def prepare_bfloat16(address, part, parts):
    """`prepare_float32` with a pool of bfloat16."""
    work = attention_at(address)
    _prepare(work, int16_at(work.pool, 0), part, parts)


PREPARE = {torch.float32: prepare_float32, torch.float16: prepare_float16, torch.bfloat16: prepare_bfloat16}
"""The kernel for each dtype of the pool."""
