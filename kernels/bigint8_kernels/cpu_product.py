"""Products of int16 activations with int8 weights: the linear layer on the CPU, for one row of X and for many.

Both operands lie along K, so nothing is packed or turned: a step widens 16 weights of each row to int16 in registers,
multiplies them by 16 activations of each token and adds neighbouring products into 32-bit lanes. On x86 that is one
instruction (`pmaddwd`, AVX2; with VNNI the addition too), twice the products of a float32 one.

A block is BLOCK values along K. Even the sum of all its products stays below 2**31. After each block the lanes become
float32, times the token's scale in this block, and start at zero again.

A tile is as many of these sums as the registers hold: four tokens times two rows of the weight, or one token times four
rows. Its sums have a variable each, since numba keeps variables in registers and arrays in memory.

Dimensions: T tokens, K input features, N output features, B blocks of K.
"""

import numpy as np
from numba import njit

from .cpu_threads import blocks_of, kernel, tokens_of, work_at
from .numba_bits import float32_at, int8_at, int16_at
from .numba_vectors import (
    STEP,
    add_floats,
    add_products,
    add_scaled,
    halves,
    lane,
    load_int8,
    load_int16,
    multiply_floats,
    prefetch,
    sum_of,
    sums_of,
    zero_floats,
    zero_ints,
)
from .reference import BLOCK

SLICE_BYTES = 2**17
"""Size of the slice of the weight that all tokens are multiplied with before the next: it stays in a core's cache."""

PREFETCH_BYTES, PREFETCH_BYTES_OF_FOUR = 512, 2048
"""How far ahead of where it reads a row a tile asks for weights: one of one token, which reads four rows, and one of
four tokens, which reads two rows slowly. (On a Zen 4 core 2048 makes eight tokens 6 % faster than 512.)"""

STEPS_A_BLOCK = BLOCK // STEP


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _dots_1x4(x, x_scale, w0, w1, w2, w3, steps):
    """The products of one token with four rows: sum over k of x[k] * x_scale[k // BLOCK] * w[k], whole steps only."""
    y0 = y1 = y2 = y3 = zero_floats()
    for first in range(0, steps, STEPS_A_BLOCK):
        s0 = s1 = s2 = s3 = zero_ints()
        for step in range(first, min(first + STEPS_A_BLOCK, steps)):
            k = step * STEP
            xs = load_int16(x, k)
            s0 = add_products(s0, xs, load_int8(w0, k))
            prefetch(w0, k + PREFETCH_BYTES)
            s1 = add_products(s1, xs, load_int8(w1, k))
            prefetch(w1, k + PREFETCH_BYTES)
            s2 = add_products(s2, xs, load_int8(w2, k))
            prefetch(w2, k + PREFETCH_BYTES)
            s3 = add_products(s3, xs, load_int8(w3, k))
            prefetch(w3, k + PREFETCH_BYTES)
        scale = x_scale[first // STEPS_A_BLOCK]
        y0, y1 = add_scaled(y0, s0, scale), add_scaled(y1, s1, scale)
        y2, y3 = add_scaled(y2, s2, scale), add_scaled(y3, s3, scale)
    return sum_of(y0), sum_of(y1), sum_of(y2), sum_of(y3)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _dots_4x2(x, features, x_scale, blocks, u, v, steps):
    """The products of four tokens in a row with the rows u and v of the weight, as `_dots_1x4` of each.

    A vector of eight: those with u, then those with v.
    """
    yu0 = yu1 = yu2 = yu3 = yv0 = yv1 = yv2 = yv3 = zero_floats()
    for first in range(0, steps, STEPS_A_BLOCK):
        su0 = su1 = su2 = su3 = sv0 = sv1 = sv2 = sv3 = zero_ints()
        for step in range(first, min(first + STEPS_A_BLOCK, steps)):
            k = step * STEP
            us, vs = load_int8(u, k), load_int8(v, k)
            prefetch(u, k + PREFETCH_BYTES_OF_FOUR)
            prefetch(v, k + PREFETCH_BYTES_OF_FOUR)
            xs = load_int16(x, k)
            su0, sv0 = add_products(su0, xs, us), add_products(sv0, xs, vs)
            xs = load_int16(x, features + k)
            su1, sv1 = add_products(su1, xs, us), add_products(sv1, xs, vs)
            xs = load_int16(x, 2 * features + k)
            su2, sv2 = add_products(su2, xs, us), add_products(sv2, xs, vs)
            xs = load_int16(x, 3 * features + k)
            su3, sv3 = add_products(su3, xs, us), add_products(sv3, xs, vs)
        b = first // STEPS_A_BLOCK
        scale = x_scale[b]
        yu0, yv0 = add_scaled(yu0, su0, scale), add_scaled(yv0, sv0, scale)
        scale = x_scale[blocks + b]
        yu1, yv1 = add_scaled(yu1, su1, scale), add_scaled(yv1, sv1, scale)
        scale = x_scale[2 * blocks + b]
        yu2, yv2 = add_scaled(yu2, su2, scale), add_scaled(yv2, sv2, scale)
        scale = x_scale[3 * blocks + b]
        yu3, yv3 = add_scaled(yu3, su3, scale), add_scaled(yv3, sv3, scale)
    return sums_of(yu0, yu1, yu2, yu3, yv0, yv1, yv2, yv3)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _finish(work, dot, t, n):
    """A sum of a tile into Y: what no step took of K, the scale and the bias."""
    features = work.features
    x_K, w_K = int16_at(work.q, t * features), int8_at(work.weight, n * features)
    x_scale_B = float32_at(work.x_scale, t * blocks_of(features))
    y = dot
    for k in range(features // STEP * STEP, features):
        y += np.float32(x_K[k]) * np.float32(w_K[k]) * x_scale_B[k // BLOCK]
    y *= float32_at(work.scale, n)[0]
    if work.bias:
        y += float32_at(work.bias, n)[0]
    float32_at(work.y, t * work.y_stride + n)[0] = y


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _finish_8(work, dots, t, n0, n1):
    """`_finish` of a tile of four tokens and two rows whose steps took all of K."""
    scale_N, bias_N = float32_at(work.scale, 0), float32_at(work.bias, 0)
    y = multiply_floats(dots, halves(scale_N[n0], scale_N[n1]))
    if work.bias:
        y = add_floats(y, halves(bias_N[n0], bias_N[n1]))
    stride = work.y_stride
    y_TN = float32_at(work.y, t * stride)
    y_TN[n0], y_TN[n1] = lane(y, 0), lane(y, 4)
    y_TN[stride + n0], y_TN[stride + n1] = lane(y, 1), lane(y, 5)
    y_TN[2 * stride + n0], y_TN[2 * stride + n1] = lane(y, 2), lane(y, 6)
    y_TN[3 * stride + n0], y_TN[3 * stride + n1] = lane(y, 3), lane(y, 7)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _multiply_one(work, t, first, last):
    """One token times the rows from first to last, four rows that lie far apart at a time."""
    features = work.features
    x, x_scale = int16_at(work.q, t * features), float32_at(work.x_scale, t * blocks_of(features))
    apart = (last - first + 3) // 4
    for i in range(apart):
        n0 = first + i
        n1, n2, n3 = min(n0 + apart, last - apart + i), min(n0 + 2 * apart, last - apart + i), last - apart + i
        w0, w1 = int8_at(work.weight, n0 * features), int8_at(work.weight, n1 * features)
        w2, w3 = int8_at(work.weight, n2 * features), int8_at(work.weight, n3 * features)
        y0, y1, y2, y3 = _dots_1x4(x, x_scale, w0, w1, w2, w3, features // STEP)
        _finish(work, y0, t, n0)
        _finish(work, y1, t, n1)
        _finish(work, y2, t, n2)
        _finish(work, y3, t, n3)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _multiply_four(work, t, first, last):
    """The tokens from t to t + 3 times the rows from first to last, two rows that lie far apart at a time."""
    features, blocks = work.features, blocks_of(work.features)
    x, x_scale = int16_at(work.q, t * features), float32_at(work.x_scale, t * blocks)
    apart = (last - first + 1) // 2
    for i in range(apart):
        n0, n1 = first + i, last - apart + i
        u, v = int8_at(work.weight, n0 * features), int8_at(work.weight, n1 * features)
        dots = _dots_4x2(x, features, x_scale, blocks, u, v, features // STEP)
        if features % STEP == 0:
            _finish_8(work, dots, t, n0, n1)
        else:
            for j in range(4):
                _finish(work, lane(dots, j), t + j, n0)
                _finish(work, lane(dots, 4 + j), t + j, n1)


@kernel
def multiply(address, part, parts):
    """Y = X W^T * scale (+ bias) of a part of the rows of W, X being `work.q` and `work.x_scale`.

    The rows of a tile lie far apart, and the next tile takes the row after each of them. So W is read as a few long
    streams, which the CPU fetches ahead by itself. Tiles of neighbouring rows would be many short streams, which it
    does not fetch ahead. If the tiles do not divide the rows evenly, a few rows are multiplied twice.
    """
    work = work_at(address)
    tokens = tokens_of(work)
    start, stop = part * work.rows // parts, (part + 1) * work.rows // parts
    once = tokens // 4 + tokens % 4 == 1  # one tile takes all tokens: W is read through only once, without slices
    slice_rows = max(1, stop - start) if once else max(8, SLICE_BYTES // max(1, work.features))
    for first in range(start, stop, slice_rows):
        last = min(first + slice_rows, stop)
        for t in range(0, tokens - 3, 4):
            _multiply_four(work, t, first, last)
        for t in range(tokens // 4 * 4, tokens):
            _multiply_one(work, t, first, last)
