# mypy: allow-untyped-defs, allow-untyped-decorators
"""The vectors of attention on the CPU: scores of up to four queries with a page of keys, softmax, weighed values.

The keys of a page lie side by side, (D, PAGE), so the scores of a query are one vector of PAGE lanes for each page: a
sum over d of a value of the query times a vector of keys. The values are (PAGE, D), so the output is vectors along D.

A function for one query and that for four do the same operations for a query, in the same order.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from .cpu_pages import MOST_HEAD_DIM
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
    multiply_add,
    prefetch,
    spread,
    store,
    subtract,
    sum_of,
)
from .step import PAGE

CHUNK = 128
"""Places that share a softmax: their keys and values stay in a core's cache while the queries of a tile use them."""

TILE = 4
"""Queries that share the loads of keys and values."""

LOWEST = float("-inf")

SCORES = TILE * CHUNK
"""Values of the scores of a chunk."""

RESULT = MOST_HEAD_DIM + WIDTH
"""Values of a query's result for some places: its outputs, then the largest score and the sum of the weights."""

LARGEST, TOTAL = MOST_HEAD_DIM, MOST_HEAD_DIM + 1

RESULTS = TILE * RESULT
"""Values of the results of a tile."""


class Keys(NamedTuple):
    """Where in the pool a page's keys of a head begin, the keys that are needed next, and the page's values."""

    pool: Any
    keys: int
    ahead: int
    values: int
    width: int


class Values(NamedTuple):
    """The values of a head at the places [first, last) of a chunk: those of a page begin `before` values after it."""

    pool: Any
    pages: Any
    page_stride: int
    before: int
    width: int
    chunk: int
    first: int
    last: int


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def scores_1(q, page, scores, at):
    """The scores of one query with the keys of a page. Even and odd d are added apart: each sum waits for itself.

    Asks for what is needed next, which the CPU does not foresee.
    """
    pool, keys, ahead, values = page.pool, page.keys, page.ahead, page.values
    a = b = spread(np.float32(0.0))
    for d in range(0, page.width - 1, 2):
        prefetch(pool, ahead + d * PAGE)
        prefetch(pool, ahead + (d + 1) * PAGE)
        prefetch(pool, values + d * PAGE)
        prefetch(pool, values + (d + 1) * PAGE)
        a = multiply_add(spread(q[d]), load(pool, keys + d * PAGE), a)
        b = multiply_add(spread(q[d + 1]), load(pool, keys + (d + 1) * PAGE), b)
    if page.width % 2:
        d = page.width - 1
        a = multiply_add(spread(q[d]), load(pool, keys + d * PAGE), a)
    store(scores, at, add(a, b))


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def scores_4(q0, q1, q2, q3, page, scores, at):
    """`scores_1` of four queries."""
    pool, keys, ahead, values = page.pool, page.keys, page.ahead, page.values
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = spread(np.float32(0.0))
    for d in range(0, page.width - 1, 2):
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
    if page.width % 2:
        d = page.width - 1
        k = load(pool, keys + d * PAGE)
        a0, a1 = multiply_add(spread(q0[d]), k, a0), multiply_add(spread(q1[d]), k, a1)
        a2, a3 = multiply_add(spread(q2[d]), k, a2), multiply_add(spread(q3[d]), k, a3)
    store(scores, at, add(a0, b0))
    store(scores, CHUNK + at, add(a1, b1))
    store(scores, 2 * CHUNK + at, add(a2, b2))
    store(scores, 3 * CHUNK + at, add(a3, b3))


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def softmax(scores, base, stop, first, last, slope, distance):
    """Scores of a query to weights, 0 outside [first, last): the largest score, and the sum of the weights.

    Places are counted from the first of the chunk; those from `stop` on are not looked at. The query's is `distance`.
    """
    top = spread(np.float32(LOWEST))
    for at in range(0, stop, PAGE):
        score = load(scores, base + at)
        if slope != np.float32(0.0):
            score = multiply_add(spread(slope), count_from(at - distance), score)
        score = keep(score, first - at, last - at, np.float32(LOWEST))
        store(scores, base + at, score)
        top = larger(score, top)
    largest = largest_of(top)
    total = spread(np.float32(0.0))
    zero = spread(largest if largest > np.float32(LOWEST) else np.float32(0.0))
    for at in range(0, stop, PAGE):
        weight = exp(subtract(load(scores, base + at), zero))
        store(scores, base + at, weight)
        total = add(total, weight)
    return largest, sum_of(total)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _load_part(pool, at, count):
    """A vector of which `count` values are there: as many as fit, or none."""
    if count >= WIDTH:
        return load(pool, at)
    return load_first(pool, at, count)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def values_1(values, d, left, scores, result):
    """The outputs d to d + 31 (`left` of them are there) of one query: the sum of the weighed values."""
    pool, width, base = values.pool, values.width, -values.chunk
    a = b = spread(np.float32(0.0))
    for p in range(values.first // PAGE, (values.last + PAGE - 1) // PAGE):
        page, j = values.pages[p], max(values.first, p * PAGE)
        if page < 0:
            continue
        at = page * values.page_stride + values.before + j % PAGE * width + d
        for place in range(j, min(values.last, (p + 1) * PAGE)):
            weight = spread(scores[base + place])
            a = multiply_add(weight, _load_part(pool, at, left), a)
            b = multiply_add(weight, _load_part(pool, at + WIDTH, left - WIDTH), b)
            at += width
    store(result, d, a)
    store(result, d + WIDTH, b)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def values_4(values, d, left, scores, results):
    """`values_1` of four queries."""
    pool, width, base = values.pool, values.width, -values.chunk
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = spread(np.float32(0.0))
    for p in range(values.first // PAGE, (values.last + PAGE - 1) // PAGE):
        page, j = values.pages[p], max(values.first, p * PAGE)
        if page < 0:
            continue
        at = page * values.page_stride + values.before + j % PAGE * width + d
        for place in range(j, min(values.last, (p + 1) * PAGE)):
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
    store(results, d, a0)
    store(results, d + WIDTH, b0)
    store(results, RESULT + d, a1)
    store(results, RESULT + d + WIDTH, b1)
    store(results, 2 * RESULT + d, a2)
    store(results, 2 * RESULT + d + WIDTH, b2)
    store(results, 3 * RESULT + d, a3)
    store(results, 3 * RESULT + d + WIDTH, b3)
