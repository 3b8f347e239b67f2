"""Products of float32 activations with float weights on the CPU: the output head and other layers that stay floats.

16-bit weights become float32 in registers, exactly, so the product is that of float32 weights at half the bytes. A CPU
without 16-bit arithmetic turns eight of them at once (F16C for float16, a shift for bfloat16).

A tile is one row of X times four rows of W, or four times two. Every sum is made in the same order. So a row of Y is
the same bits with any number of rows of X.

Dimensions: T tokens, K input features, N output features.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from . import generic
from .cpu_threads import Work, kernel, threads_for, tokens_of, work_at
from .numba_bits import float32_at, int16_at, uint16_at
from .numba_floats import WIDTH, load, load_first, multiply_add, prefetch, spread, sum_of

MOST_ROWS = 32
"""Rows of X that `float_linear` serves itself; for more, torch's product with slices of W in float32 is faster."""

SLICE_BYTES = 2**17
"""Size of the slice of W that all tokens are multiplied with before the next: it stays in a core's cache."""

PREFETCH = 512
"""How many values ahead of where it reads a row a tile of four tokens asks for weights. On a Zen 4 core that makes
eight tokens 12 % faster. One token reads at the speed of memory without it."""


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _dots_1x4(x, w, w0, w1, w2, w3, features):
    """The products of a row of X with four rows of W, which begin at w0 to w3."""
    y0 = y1 = y2 = y3 = spread(np.float32(0.0))
    whole = features // WIDTH * WIDTH
    for k in range(0, whole, WIDTH):
        xs = load(x, k)
        y0, y1 = multiply_add(xs, load(w, w0 + k), y0), multiply_add(xs, load(w, w1 + k), y1)
        y2, y3 = multiply_add(xs, load(w, w2 + k), y2), multiply_add(xs, load(w, w3 + k), y3)
    if whole < features:
        k, left = whole, features - whole
        xs = load_first(x, k, left)
        y0 = multiply_add(xs, load_first(w, w0 + k, left), y0)
        y1 = multiply_add(xs, load_first(w, w1 + k, left), y1)
        y2 = multiply_add(xs, load_first(w, w2 + k, left), y2)
        y3 = multiply_add(xs, load_first(w, w3 + k, left), y3)
    return sum_of(y0), sum_of(y1), sum_of(y2), sum_of(y3)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _dots_4x2(x, w, u, v, features):
    """The products of four rows of X with two rows of W, which begin at u and v, as `_dots_1x4` of each: u first."""
    yu0 = yu1 = yu2 = yu3 = yv0 = yv1 = yv2 = yv3 = spread(np.float32(0.0))
    whole = features // WIDTH * WIDTH
    for k in range(0, whole, WIDTH):
        us, vs, xs = load(w, u + k), load(w, v + k), load(x, k)
        prefetch(w, u + k + PREFETCH)
        prefetch(w, v + k + PREFETCH)
        yu0, yv0 = multiply_add(xs, us, yu0), multiply_add(xs, vs, yv0)
        xs = load(x, features + k)
        yu1, yv1 = multiply_add(xs, us, yu1), multiply_add(xs, vs, yv1)
        xs = load(x, 2 * features + k)
        yu2, yv2 = multiply_add(xs, us, yu2), multiply_add(xs, vs, yv2)
        xs = load(x, 3 * features + k)
        yu3, yv3 = multiply_add(xs, us, yu3), multiply_add(xs, vs, yv3)
    if whole < features:
        k, left = whole, features - whole
        us, vs, xs = load_first(w, u + k, left), load_first(w, v + k, left), load_first(x, k, left)
        yu0, yv0 = multiply_add(xs, us, yu0), multiply_add(xs, vs, yv0)
        xs = load_first(x, features + k, left)
        yu1, yv1 = multiply_add(xs, us, yu1), multiply_add(xs, vs, yv1)
        xs = load_first(x, 2 * features + k, left)
        yu2, yv2 = multiply_add(xs, us, yu2), multiply_add(xs, vs, yv2)
        xs = load_first(x, 3 * features + k, left)
        yu3, yv3 = multiply_add(xs, us, yu3), multiply_add(xs, vs, yv3)
    return (sum_of(yu0), sum_of(yu1), sum_of(yu2), sum_of(yu3)), (sum_of(yv0), sum_of(yv1), sum_of(yv2), sum_of(yv3))


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _finish(work, dot, t, n):
    y = float32_at(work.y, t * work.y_stride + n)
    y[0] = dot + float32_at(work.bias, n)[0] if work.bias else dot


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _multiply_one(work, w, t, first, last):
    """A row of X times the rows of W from first to last, four at a time, far apart as in `cpu_product`."""
    features, x = work.features, float32_at(work.x, t * work.features)
    apart = (last - first + 3) // 4
    for i in range(apart):
        n0, n3 = first + i, last - apart + i
        n1, n2 = min(n0 + apart, n3), min(n0 + 2 * apart, n3)
        y0, y1, y2, y3 = _dots_1x4(x, w, n0 * features, n1 * features, n2 * features, n3 * features, features)
        _finish(work, y0, t, n0)
        _finish(work, y1, t, n1)
        _finish(work, y2, t, n2)
        _finish(work, y3, t, n3)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _multiply_four(work, w, t, first, last):
    features, x = work.features, float32_at(work.x, t * work.features)
    apart = (last - first + 1) // 2
    for i in range(apart):
        n0, n1 = first + i, last - apart + i
        of_u, of_v = _dots_4x2(x, w, n0 * features, n1 * features, features)
        for j in range(4):
            _finish(work, of_u[j], t + j, n0)
            _finish(work, of_v[j], t + j, n1)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _multiply(work, w, item_bytes, part, parts):
    """Y = X W^T (+ bias) of a part of the rows of W."""
    tokens = tokens_of(work)
    start, stop = part * work.rows // parts, (part + 1) * work.rows // parts
    once = tokens // 4 + tokens % 4 == 1  # as in `cpu_product.multiply`
    slice_rows = max(1, stop - start) if once else max(8, SLICE_BYTES // max(1, item_bytes * work.features))
    for first in range(start, stop, slice_rows):
        last = min(first + slice_rows, stop)
        for t in range(0, tokens - 3, 4):
            _multiply_four(work, w, t, first, last)
        for t in range(tokens // 4 * 4, tokens):
            _multiply_one(work, w, t, first, last)


@kernel
def multiply_float16(address, part, parts):
    """Y = X W^T of a part of the rows of W, which are float16."""
    work = work_at(address)
    _multiply(work, uint16_at(work.weight, 0), 2, part, parts)


@kernel
def multiply_bfloat16(address, part, parts):
    """Y = X W^T of a part of the rows of W, which are bfloat16."""
    work = work_at(address)
    _multiply(work, int16_at(work.weight, 0), 2, part, parts)


@kernel
def multiply_float32(address, part, parts):
    """Y = X W^T of a part of the rows of W, which are float32."""
    work = work_at(address)
    _multiply(work, float32_at(work.weight, 0), 4, part, parts)


PRODUCTS = {torch.float16: multiply_float16, torch.bfloat16: multiply_bfloat16, torch.float32: multiply_float32}
"""The kernel for each dtype of the weights."""


def float_linear(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """Float32 X (T, K) times float16 or bfloat16 weights (N, K): float32 (T, N). Both are contiguous."""
    (tokens, features), rows = x_TK.shape, weight_NK.shape[0]
    if tokens > MOST_ROWS:
        return generic.float_linear(x_TK, weight_NK)
    y_TN = x_TK.new_empty(tokens, rows)
    work = Work(
        x=x_TK.data_ptr(), weight=weight_NK.data_ptr(), y=y_TN.data_ptr(), tokens=tokens, features=features, rows=rows,
        y_stride=rows,
    )  # fmt: skip
    with threads_for(tokens * weight_NK.numel()) as parts:
        PRODUCTS[weight_NK.dtype](work, parts)
    return y_TN
