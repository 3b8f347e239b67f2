# mypy: allow-untyped-defs, allow-untyped-decorators
"""Attention over pages on the CPU, for generated tokens and for prompts, in float32.

A tile is up to four queries that share each load. For a generated token they are heads of a key head, for a prompt rows
of a head.

Places are taken in chunks of CHUNK, counted from place 0. Each chunk has a softmax of its own. A query's chunks are
added in order, weighed by their largest scores (online softmax: Milakov and Gimelshein 2018). Places that a query does
not see have the weight 0, which adds nothing. So a query's result is the same bits whichever queries share its tile.
Where there are few tiles, threads take chunks instead, and what they found is added by a kernel that comes after.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

from .cpu_pages import attention_at, own_page, pages_of, state_at, table_at
from .cpu_scores import (
    CHUNK,
    LARGEST,
    LOWEST,
    RESULT,
    RESULTS,
    SCORES,
    TILE,
    TOTAL,
    Keys,
    Values,
    scores_1,
    scores_4,
    softmax,
    values_1,
    values_4,
)
from .cpu_threads import kernel
from .numba_bits import float32_at, int16_at, int32_at, uint16_at
from .numba_floats import WIDTH, exp, load, multiply, multiply_add, spread, stack_floats, store
from .step import PAGE


class Tile(NamedTuple):
    """Up to four `queries`: heads from `head` on of row t, or, if `down`, that head of the rows from t on.

    They have their sequence, whose pages these are, and their key head in common. Places before `start` and from `stop`
    on are seen by none of them.
    """

    t: int
    head: int
    queries: int
    down: bool
    pages: Any
    start: int
    stop: int


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _row_and_head(tile, query):
    """The row and the head of a tile's query; where a tile has fewer than four, those of its last one."""
    i = min(query, tile.queries - 1)
    return (tile.t + i, tile.head) if tile.down else (tile.t, tile.head + i)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _query(work, tile, query):
    t, head = _row_and_head(tile, query)
    return float32_at(work.q, (t * work.heads + head) * work.head_dim)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _score(work, pool, tile, chunk, scores):
    """The scores of a tile with the places of a chunk."""
    width, stride = work.head_dim, work.page_stride
    kv_head = tile.head // (work.heads // work.kv_heads)
    keys, values = kv_head * width * PAGE, (work.kv_heads + kv_head) * width * PAGE
    q0, q1, q2, q3 = _query(work, tile, 0), _query(work, tile, 1), _query(work, tile, 2), _query(work, tile, 3)
    for p in range(chunk // PAGE, (min(tile.stop, chunk + CHUNK) + PAGE - 1) // PAGE):
        page, at = tile.pages[p], p * PAGE - chunk
        if page < 0 or (p + 1) * PAGE <= tile.start:
            for i in range(TILE):
                store(scores, i * CHUNK + at, spread(np.float32(LOWEST)))
            continue
        ahead = tile.pages[p + 1] if (p + 1) * PAGE < tile.stop else page
        there = Keys(pool, page * stride + keys, ahead * stride + keys, page * stride + values, width)
        if tile.queries == 1:
            scores_1(q0, there, scores, at)
        else:
            scores_4(q0, q1, q2, q3, there, scores, at)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _first_seen(work, place):
    return max(0, place + 1 - work.window) if work.window else 0


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _chunk(work, pool, tile, chunk, results):
    """The results of a tile for the places of a chunk."""
    scores, width = stack_floats(SCORES), work.head_dim
    _score(work, pool, tile, chunk, scores)
    first, last = max(tile.start, chunk), min(tile.stop, chunk + CHUNK)
    for i in range(tile.queries):
        t, head = _row_and_head(tile, i)
        place = int32_at(state_at(work.state).places, t)[0]
        slope = float32_at(work.slopes, head)[0] if work.slopes else np.float32(0.0)
        seen = _first_seen(work, place)
        largest, total = softmax(scores, i * CHUNK, last - chunk, seen - chunk, place + 1 - chunk, slope, place - chunk)
        results[i * RESULT + LARGEST], results[i * RESULT + TOTAL] = largest, total
    before = (work.kv_heads + tile.head // (work.heads // work.kv_heads)) * width * PAGE
    values = Values(pool, tile.pages, work.page_stride, before, width, chunk, first, last)
    for d in range(0, width, 2 * WIDTH):  # a constant `left` saves the question whether all values are there
        left = width - d
        if tile.queries == 1 and left >= 2 * WIDTH:
            values_1(values, d, 2 * WIDTH, scores, results)
        elif tile.queries == 1:
            values_1(values, d, left, scores, results)
        elif left >= 2 * WIDTH:
            values_4(values, d, 2 * WIDTH, scores, results)
        else:
            values_4(values, d, left, scores, results)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _clear(tile, width, results):
    """Results for no place at all."""
    for i in range(tile.queries):
        results[i * RESULT + LARGEST], results[i * RESULT + TOTAL] = np.float32(LOWEST), np.float32(0.0)
        for d in range(0, width, WIDTH):
            store(results, i * RESULT + d, spread(np.float32(0.0)))


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _add_results(tile, width, results, more):
    """Results for some places and for more of them become those for both."""
    for i in range(tile.queries):
        at = i * RESULT
        before, largest = results[at + LARGEST], more[at + LARGEST]
        top = max(before, largest)
        old = exp(before - top) if before > np.float32(LOWEST) else np.float32(0.0)
        new = exp(largest - top) if largest > np.float32(LOWEST) else np.float32(0.0)
        results[at + LARGEST] = top
        results[at + TOTAL] = results[at + TOTAL] * old + more[at + TOTAL] * new
        for d in range(at, at + width, WIDTH):
            added = multiply(load(more, d), spread(new))
            store(results, d, multiply_add(load(results, d), spread(old), added))


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _write(work, tile, results):
    """The outputs of a tile: its results for all places, over the sums of their weights."""
    for i in range(tile.queries):
        t, head = _row_and_head(tile, i)
        out = float32_at(work.out, (t * work.heads + head) * work.head_dim)
        total = results[i * RESULT + TOTAL]
        for d in range(work.head_dim):
            out[d] = results[i * RESULT + d] / total


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _whole_tile(work, pool, tile):
    """The outputs of a tile, one chunk after the other."""
    results, more = stack_floats(RESULTS), stack_floats(RESULTS)
    _clear(tile, work.head_dim, results)
    for chunk in range(tile.start // CHUNK * CHUNK, tile.stop, CHUNK):
        _chunk(work, pool, tile, chunk, more)
        _add_results(tile, work.head_dim, results, more)
    _write(work, tile, results)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _tiles_a_row(work):
    """Tiles of a generated token: the heads of each key head, four at a time."""
    return work.kv_heads * ((work.heads // work.kv_heads + TILE - 1) // TILE)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _tile_across(work, number):
    """A tile of a generated token, by its number. It is empty if its row is no token."""
    shared, tiles = work.heads // work.kv_heads, _tiles_a_row(work)
    t, tiles_a_head = number // tiles, tiles // work.kv_heads
    kv_head, first = number % tiles // tiles_a_head, number % tiles % tiles_a_head * TILE
    place = int32_at(state_at(work.state).places, t)[0]
    stop = place + 1 if own_page(work, t) >= 0 else 0
    count = min(TILE, shared - first)
    return Tile(t, kv_head * shared + first, count, False, pages_of(work, t), _first_seen(work, place), stop)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _tile_down(work, t, head, last):
    """A tile of a prompt: row t and those after it, before `last`, that are tokens of its sequence."""
    state, count = state_at(work.state), 1
    places, sequences = int32_at(state.places, t), int32_at(state.sequences, t)
    start, stop = _first_seen(work, places[0]), places[0] + 1 if own_page(work, t) >= 0 else 0
    while t + count < last and sequences[count] == sequences[0] and own_page(work, t + count) >= 0 and stop:
        start, stop = min(start, _first_seen(work, places[count])), max(stop, places[count] + 1)
        count += 1
    return Tile(t, head, count, True, pages_of(work, t), start, stop)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _chunks_of(work):
    """How many chunks the longest sequence may have."""
    return (table_at(work.table).width * PAGE + CHUNK - 1) // CHUNK


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _in_chunks(work):
    """Whether threads take chunks of tiles: there are few tiles, and all are of generated tokens."""
    state = state_at(work.state)
    return state.rows == state.few and state.few * _tiles_a_row(work) <= work.most_split


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _attend(work, pool, part, parts):
    """Tiles, or chunks of them; each part takes every so many, as tiles late in a prompt take longer."""
    state = state_at(work.state)
    few, rows, across = state.few, state.rows, state.few * _tiles_a_row(work)
    if _in_chunks(work):
        chunks = _chunks_of(work)
        for task in range(part, across * chunks, parts):
            tile, chunk = _tile_across(work, task // chunks), task % chunks * CHUNK
            if chunk < tile.stop and chunk + CHUNK > tile.start:
                _chunk(work, pool, tile, chunk, float32_at(state.results, task * RESULTS))
        return
    for task in range(part, across + (rows - few + TILE - 1) // TILE * work.heads, parts):
        if task < across:
            tile = _tile_across(work, task)
            if tile.stop:
                _whole_tile(work, pool, tile)
        else:
            t, head = few + (task - across) // work.heads * TILE, (task - across) % work.heads
            last = min(t + TILE, rows)
            while t < last:
                tile = _tile_down(work, t, head, last)
                if tile.stop:
                    _whole_tile(work, pool, tile)
                t += tile.queries


@kernel
def add_chunks(address, part, parts):
    """The outputs of tiles whose chunks several threads took."""
    work = attention_at(address)
    state, results = state_at(work.state), stack_floats(RESULTS)
    if _in_chunks(work):
        chunks = _chunks_of(work)
        for number in range(part, state.few * _tiles_a_row(work), parts):
            tile = _tile_across(work, number)
            if tile.stop:
                _clear(tile, work.head_dim, results)
                for chunk in range(tile.start // CHUNK, (tile.stop + CHUNK - 1) // CHUNK):
                    more = float32_at(state.results, (number * chunks + chunk) * RESULTS)
                    _add_results(tile, work.head_dim, results, more)
                _write(work, tile, results)


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


ATTEND = {torch.float32: attend_float32, torch.float16: attend_float16, torch.bfloat16: attend_bfloat16}
"""The kernel for each dtype of the pool. `add_chunks` comes after it."""
