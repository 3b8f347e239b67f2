# mypy: allow-untyped-defs, allow-untyped-decorators
"""Attention over pages on the CPU, for generated tokens and for prompts, in float32.

The keys of a page lie side by side, (D, PAGE), so the scores of a query are one vector of PAGE lanes for each page: a
sum over d of a value of the query times a vector of keys. The values are (PAGE, D), so the output is vectors along D.

Up to four queries share each load. For a generated token they are heads of a key head, for a prompt rows of a head.

Places are taken in chunks of CHUNK, counted from place 0. Each chunk has a softmax of its own. A query's chunks are
added in order, weighed by their largest scores (online softmax: Milakov and Gimelshein 2018). Places that a query does
not see have the weight 0, which adds nothing. So a query's result is the same bits whichever queries share its tile.
"""

import ctypes

import numpy as np
import torch
from numba import njit

from .cpu_rows import Rows, Table, norm_row
from .cpu_threads import kernel, record_at
from .numba_bits import float32_at, from_float32, int16_at, int32_at, uint16_at
from .numba_floats import (
    WIDTH,
    add,
    count_from,
    exp,
    keep,
    larger,
    largest_of,
    load,
    load_first,
    multiply,
    multiply_add,
    prefetch,
    spread,
    stack_floats,
    store,
    subtract,
    sum_of,
)
from .step import PAGE

CHUNK = 128
"""Places that share a softmax: their keys and values stay in a core's cache while the queries of a tile use them."""

TILE = 4
"""Queries that share the loads of keys and values."""

MOST_HEAD_DIM = 512

LOWEST = float("-inf")

# What a tile keeps on the stack: the scores of a chunk, the outputs so far, and four numbers of each query.
SCORES, OUTPUTS, NUMBERS = TILE * CHUNK, TILE * MOST_HEAD_DIM + 2 * WIDTH, 4 * TILE


class AttentionWork(ctypes.Structure):
    """A `step.Attention` with the addresses of its tensors, 0 for none.

    qkv: float32 (T, qkv_stride). q: float32 (T, heads * D), where queries are kept, rotated and scaled. out: float32
    (T, heads * D). pool: that of `step.pool_shape`, pages `page_stride` values apart. state: a Rows. table: a Table
    """

    _fields_ = [
        *((name, ctypes.c_ssize_t) for name in ("qkv", "q", "out", "pool", "state", "table", "slopes")),
        *((name, ctypes.c_ssize_t) for name in ("qkv_stride", "page_stride", "heads", "kv_heads", "head_dim")),
        *(
            (name, ctypes.c_ssize_t)
            for name in ("q_offset", "q_stride", "k_offset", "k_stride", "v_offset", "v_stride")
        ),
        *((name, ctypes.c_ssize_t) for name in ("rotated", "window")),
        *((name, ctypes.c_ssize_t) for name in ("q_norm", "q_weight", "q_bias", "q_centered")),
        *((name, ctypes.c_ssize_t) for name in ("k_norm", "k_weight", "k_bias", "k_centered")),
        *((name, ctypes.c_float) for name in ("scale", "q_epsilon", "k_epsilon")),
    ]


attention_at, state_at, table_at = record_at(AttentionWork), record_at(Rows), record_at(Table)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _pages_of(work, t):
    """The table of a row's sequence: a pointer to its pages."""
    table, state = table_at(work.table), state_at(work.state)
    return int32_at(table.pages, int32_at(state.sequences, t)[0] * table.width)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _own_page(work, t):
    return _pages_of(work, t)[int32_at(state_at(work.state).places, t)[0] // PAGE]


# --- queries, keys and values of the rows ---


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
        page = _own_page(work, t)
        if page >= 0:
            _key_value(work, pool, t, kv_head, page)
            shared = heads // kv_heads
            for head in range(kv_head * shared, (kv_head + 1) * shared):
                _query(work, t, head)


# --- scores and outputs of a tile ---


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _scores_1(q, width, pool, keys, ahead, values, scores, at):
    """The scores of one query with the keys of a page. Even and odd d are added apart: each sum waits for itself.

    Asks for what is needed next, which the CPU does not foresee: the keys that lie `ahead`, and the page's values.
    """
    a = b = spread(np.float32(0.0))
    for d in range(0, width - 1, 2):
        prefetch(pool, ahead + d * PAGE)
        prefetch(pool, ahead + (d + 1) * PAGE)
        prefetch(pool, values + d * PAGE)
        prefetch(pool, values + (d + 1) * PAGE)
        a = multiply_add(spread(q[d]), load(pool, keys + d * PAGE), a)
        b = multiply_add(spread(q[d + 1]), load(pool, keys + (d + 1) * PAGE), b)
    if width % 2:
        a = multiply_add(spread(q[width - 1]), load(pool, keys + (width - 1) * PAGE), a)
    store(scores, at, add(a, b))


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _scores_4(q0, q1, q2, q3, width, pool, keys, ahead, values, scores, at):
    """`_scores_1` of four queries."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = spread(np.float32(0.0))
    for d in range(0, width - 1, 2):
        prefetch(pool, ahead + d * PAGE)
        prefetch(pool, ahead + (d + 1) * PAGE)
        prefetch(pool, values + d * PAGE)
        prefetch(pool, values + (d + 1) * PAGE)
        k = load(pool, keys + d * PAGE)
        a0, a1 = multiply_add(spread(q0[d]), k, a0), multiply_add(spread(q1[d]), k, a1)
        a2, a3 = multiply_add(spread(q2[d]), k, a2), multiply_add(spread(q3[d]), k, a3)
        k = load(pool, keys + (d + 1) * PAGE)
        b0, b1 = multiply_add(spread(q0[d + 1]), k, b0), multiply_add(spread(q1[d + 1]), k, b1)
        b2, b3 = multiply_add(spread(q2[d + 1]), k, b2), multiply_add(spread(q3[d + 1]), k, b3)
    if width % 2:
        d = width - 1
        k = load(pool, keys + d * PAGE)
        a0, a1 = multiply_add(spread(q0[d]), k, a0), multiply_add(spread(q1[d]), k, a1)
        a2, a3 = multiply_add(spread(q2[d]), k, a2), multiply_add(spread(q3[d]), k, a3)
    store(scores, at, add(a0, b0))
    store(scores, CHUNK + at, add(a1, b1))
    store(scores, 2 * CHUNK + at, add(a2, b2))
    store(scores, 3 * CHUNK + at, add(a3, b3))


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _softmax(scores, base, pages, first, last, slope, distance):
    """Scores of a query to weights, 0 outside [first, last): the largest score, and the sum of the weights.

    All places are counted from the first of the chunk. `pages` of it are looked at. `distance`: of the query.
    """
    top = spread(np.float32(LOWEST))
    for at in range(0, pages * PAGE, PAGE):
        score = load(scores, base + at)
        if slope != np.float32(0.0):
            score = multiply_add(spread(slope), count_from(at - distance), score)
        score = keep(score, first - at, last - at, np.float32(LOWEST))
        store(scores, base + at, score)
        top = larger(score, top)
    largest = largest_of(top)
    total = spread(np.float32(0.0))
    zero = spread(largest if largest > np.float32(LOWEST) else np.float32(0.0))
    for at in range(0, pages * PAGE, PAGE):
        weight = exp(subtract(load(scores, base + at), zero))
        store(scores, base + at, weight)
        total = add(total, weight)
    return largest, sum_of(total)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _mix(outputs, at, old, new, value):
    """outputs * old + value * new, of a vector of the outputs."""
    store(outputs, at, multiply_add(load(outputs, at), spread(old), multiply(value, spread(new))))


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _load_part(pool, at, count):
    """A vector of which `count` values are there: as many as fit, or none."""
    if count >= WIDTH:
        return load(pool, at)
    return load_first(pool, at, count)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _values_1(pool, pages, page_stride, before, width, first, last, d, left, scores, base, outputs, numbers):
    """The values d to d + 31 (`left` of them are there) of places, weighed, added to the output of one query.

    The places are [first, last). The weight of a place is scores[base + place].
    """
    a = b = spread(np.float32(0.0))
    for p in range(first // PAGE, (last + PAGE - 1) // PAGE):
        page, j = pages[p], max(first, p * PAGE)
        if page < 0:
            continue
        at = page * page_stride + before + j % PAGE * width + d
        for place in range(j, min(last, (p + 1) * PAGE)):
            weight = spread(scores[base + place])
            a = multiply_add(weight, _load_part(pool, at, left), a)
            b = multiply_add(weight, _load_part(pool, at + WIDTH, left - WIDTH), b)
            at += width
    _mix(outputs, d, numbers[0], numbers[TILE], a)
    _mix(outputs, d + WIDTH, numbers[0], numbers[TILE], b)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _values_4(pool, pages, page_stride, before, width, first, last, d, left, scores, base, outputs, numbers):
    """`_values_1` of four queries."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = spread(np.float32(0.0))
    for p in range(first // PAGE, (last + PAGE - 1) // PAGE):
        page, j = pages[p], max(first, p * PAGE)
        if page < 0:
            continue
        at = page * page_stride + before + j % PAGE * width + d
        for place in range(j, min(last, (p + 1) * PAGE)):
            a, b = _load_part(pool, at, left), _load_part(pool, at + WIDTH, left - WIDTH)
            weight = spread(scores[base + place])
            a0, b0 = multiply_add(weight, a, a0), multiply_add(weight, b, b0)
            weight = spread(scores[base + CHUNK + place])
            a1, b1 = multiply_add(weight, a, a1), multiply_add(weight, b, b1)
            weight = spread(scores[base + 2 * CHUNK + place])
            a2, b2 = multiply_add(weight, a, a2), multiply_add(weight, b, b2)
            weight = spread(scores[base + 3 * CHUNK + place])
            a3, b3 = multiply_add(weight, a, a3), multiply_add(weight, b, b3)
            at += width
    _mix(outputs, d, numbers[0], numbers[TILE], a0)
    _mix(outputs, d + WIDTH, numbers[0], numbers[TILE], b0)
    _mix(outputs, MOST_HEAD_DIM + d, numbers[1], numbers[TILE + 1], a1)
    _mix(outputs, MOST_HEAD_DIM + d + WIDTH, numbers[1], numbers[TILE + 1], b1)
    _mix(outputs, 2 * MOST_HEAD_DIM + d, numbers[2], numbers[TILE + 2], a2)
    _mix(outputs, 2 * MOST_HEAD_DIM + d + WIDTH, numbers[2], numbers[TILE + 2], b2)
    _mix(outputs, 3 * MOST_HEAD_DIM + d, numbers[3], numbers[TILE + 3], a3)
    _mix(outputs, 3 * MOST_HEAD_DIM + d + WIDTH, numbers[3], numbers[TILE + 3], b3)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _row_and_head(t, head, query, count, rows):
    """The row and the head of a tile's query; where a tile has fewer than four, those of its last one."""
    i = min(query, count - 1)
    return (t + i, head) if rows else (t, head + i)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _tile(work, pool, t, head, count, rows):
    """The outputs of up to four queries that have their sequence and their key head in common.

    They are the heads from `head` on of row t, or, if `rows`, that head of the rows from t on.
    """
    width, pages = work.head_dim, _pages_of(work, t)
    kv_head = head // (work.heads // work.kv_heads)
    places = int32_at(state_at(work.state).places, t)
    scores, outputs, numbers = stack_floats(SCORES), stack_floats(OUTPUTS), stack_floats(NUMBERS)
    for i in range(TILE):  # of each query: weights of what is there and of what is added, largest score, sum of weights
        numbers[i] = numbers[TILE + i] = numbers[3 * TILE + i] = np.float32(0.0)
        numbers[2 * TILE + i] = np.float32(LOWEST)
        for d in range(width + 2 * WIDTH):
            outputs[i * MOST_HEAD_DIM + d] = np.float32(0.0)
    t0, h0 = _row_and_head(t, head, 0, count, rows)
    t1, h1 = _row_and_head(t, head, 1, count, rows)
    t2, h2 = _row_and_head(t, head, 2, count, rows)
    t3, h3 = _row_and_head(t, head, 3, count, rows)
    q0, q1 = float32_at(work.q, (t0 * work.heads + h0) * width), float32_at(work.q, (t1 * work.heads + h1) * width)
    q2, q3 = float32_at(work.q, (t2 * work.heads + h2) * width), float32_at(work.q, (t3 * work.heads + h3) * width)
    start, stop = places[0] + 1, 0
    for i in range(count if rows else 1):
        stop = max(stop, places[i] + 1)
        start = min(start, max(0, places[i] + 1 - work.window) if work.window else 0)
    page_stride, keys, values = work.page_stride, kv_head * width * PAGE, (work.kv_heads + kv_head) * width * PAGE
    for chunk in range(start // CHUNK * CHUNK, stop, CHUNK):
        first, last = max(start, chunk), min(stop, chunk + CHUNK)
        last_page = (last + PAGE - 1) // PAGE
        for p in range(chunk // PAGE, last_page):
            page, at = pages[p], p * PAGE - chunk
            if page < 0 or (p + 1) * PAGE <= first:
                for i in range(TILE):
                    store(scores, i * CHUNK + at, spread(np.float32(LOWEST)))
                continue
            page *= page_stride
            ahead = pages[p + 1] * page_stride if (p + 1) * PAGE < stop else page
            if count == 1:
                _scores_1(q0, width, pool, page + keys, ahead + keys, page + values, scores, at)
            else:
                _scores_4(q0, q1, q2, q3, width, pool, page + keys, ahead + keys, page + values, scores, at)
        for i in range(count):
            ti, hi = _row_and_head(t, head, i, count, rows)
            place = places[ti - t]
            slope = float32_at(work.slopes, hi)[0] if work.slopes else np.float32(0.0)
            begin = max(0, place + 1 - work.window) if work.window else 0
            largest, total = _softmax(
                scores, i * CHUNK, last_page - chunk // PAGE, begin - chunk, place + 1 - chunk, slope, place - chunk
            )
            before = numbers[2 * TILE + i]
            top = max(before, largest)
            old = exp(before - top) if before > np.float32(LOWEST) else np.float32(0.0)
            new = exp(largest - top) if largest > np.float32(LOWEST) else np.float32(0.0)
            numbers[i], numbers[TILE + i], numbers[2 * TILE + i] = old, new, top
            numbers[3 * TILE + i] = numbers[3 * TILE + i] * old + total * new
        for d in range(0, width, 2 * WIDTH):
            left = width - d
            if count == 1 and left >= 2 * WIDTH:
                _values_1(
                    pool, pages, page_stride, values, width, first, last, d, 2 * WIDTH, scores, -chunk, outputs, numbers
                )
            elif count == 1:
                _values_1(
                    pool, pages, page_stride, values, width, first, last, d, left, scores, -chunk, outputs, numbers
                )
            elif left >= 2 * WIDTH:
                _values_4(
                    pool, pages, page_stride, values, width, first, last, d, 2 * WIDTH, scores, -chunk, outputs, numbers
                )
            else:
                _values_4(
                    pool, pages, page_stride, values, width, first, last, d, left, scores, -chunk, outputs, numbers
                )
    for i in range(count):
        ti, hi = _row_and_head(t, head, i, count, rows)
        out = float32_at(work.out, (ti * work.heads + hi) * width)
        for d in range(width):
            out[d] = outputs[i * MOST_HEAD_DIM + d] / numbers[3 * TILE + i]


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _attend(work, pool, part, parts):
    """Tiles, each part every so many: tiles late in a prompt take longer."""
    state = state_at(work.state)
    few, rows, shared = state.few, state.rows, work.heads // work.kv_heads
    tiles_a_head = (shared + TILE - 1) // TILE
    tiles_a_row = work.kv_heads * tiles_a_head
    tiles = few * tiles_a_row + (rows - few + TILE - 1) // TILE * work.heads
    for tile in range(part, tiles, parts):
        if tile < few * tiles_a_row:
            t, head = tile // tiles_a_row, tile % tiles_a_row
            first = head % tiles_a_head * TILE
            if _own_page(work, t) >= 0:
                _tile(work, pool, t, head // tiles_a_head * shared + first, min(TILE, shared - first), False)
        else:
            tile -= few * tiles_a_row
            t, head = few + tile // work.heads * TILE, tile % work.heads
            last = min(t + TILE, rows)
            while t < last:
                count = 1
                if _own_page(work, t) >= 0:
                    sequences = int32_at(state.sequences, t)
                    while t + count < last and sequences[count] == sequences[0] and _own_page(work, t + count) >= 0:
                        count += 1
                    _tile(work, pool, t, head, count, True)
                t += count


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


@kernel
def attend_float32(address, part, parts):
    """The outputs of all heads from a pool of float32."""
    work = attention_at(address)
    _attend(work, float32_at(work.pool, 0), part, parts)


@kernel
def attend_float16(address, part, parts):
    """The outputs of all heads from a pool of float16."""
    work = attention_at(address)
    _attend(work, uint16_at(work.pool, 0), part, parts)


@kernel
def attend_bfloat16(address, part, parts):
    """The outputs of all heads from a pool of bfloat16."""
    work = attention_at(address)
    _attend(work, int16_at(work.pool, 0), part, parts)


KERNELS = {
    torch.float32: (prepare_float32, attend_float32),
    torch.float16: (prepare_float16, attend_float16),
    torch.bfloat16: (prepare_bfloat16, attend_bfloat16),
}
"""What prepares and what attends, for each dtype of the pool."""
