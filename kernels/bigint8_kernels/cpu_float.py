"""Products of float32 activations with 16-bit float weights on the CPU: the output head, which stays as it is stored.

The weights become float32 in registers, exactly, so the product is that of float32 weights at half the bytes. A CPU
without 16-bit arithmetic turns eight of them at once (F16C for float16, a shift for bfloat16).

Dimensions: T tokens, K input features, N output features.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from . import generic
from .cpu_threads import Work, kernel, threads_for, work_at
from .numba_bits import float32_at, int16_at, to_float32, uint16_at

MOST_ROWS = 32
"""Rows of X that this serves; for more, torch's product with slices of the weight in float32 is faster."""


@njit(fastmath={"reassoc", "contract"}, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _multiply(work, w, part, parts):
    """Four rows of W at once, a quarter of them all apart: long streams, as in `cpu_product.multiply`."""
    features, rows = work.features, work.rows
    start, stop = part * rows // parts, (part + 1) * rows // parts
    apart = (stop - start + 3) // 4
    for i in range(apart):
        n0, n3 = start + i, stop - apart + i
        n1, n2 = min(n0 + apart, n3), min(n0 + 2 * apart, n3)
        w0, w1, w2, w3 = n0 * features, n1 * features, n2 * features, n3 * features
        for t in range(work.tokens):
            x_K, y_N = float32_at(work.x, t * features), float32_at(work.y, t * rows)
            y0 = y1 = y2 = y3 = np.float32(0.0)
            for k in range(features):
                x = x_K[k]
                y0 += x * to_float32(w[w0 + k])
                y1 += x * to_float32(w[w1 + k])
                y2 += x * to_float32(w[w2 + k])
                y3 += x * to_float32(w[w3 + k])
            y_N[n0], y_N[n1], y_N[n2], y_N[n3] = y0, y1, y2, y3


@kernel
def multiply_float16(address, part, parts):
    """Y = X W^T of a part of the rows of W, which are float16."""
    work = work_at(address)
    _multiply(work, uint16_at(work.weight, 0), part, parts)


@kernel
def multiply_bfloat16(address, part, parts):
    """Y = X W^T of a part of the rows of W, which are bfloat16."""
    work = work_at(address)
    _multiply(work, int16_at(work.weight, 0), part, parts)


PRODUCTS = {torch.float16: multiply_float16, torch.bfloat16: multiply_bfloat16}
"""The kernel for each dtype of the weights."""


def float_linear(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """Float32 X (T, K) times float16 or bfloat16 weights (N, K): float32 (T, N). Both are contiguous."""
    (tokens, features), rows = x_TK.shape, weight_NK.shape[0]
    if tokens > MOST_ROWS:
        return generic.float_linear(x_TK, weight_NK)
    y_TN = x_TK.new_empty(tokens, rows)
    work = Work(
        x=x_TK.data_ptr(), weight=weight_NK.data_ptr(), y=y_TN.data_ptr(), tokens=tokens, features=features, rows=rows
    )
    with threads_for(tokens * weight_NK.numel()) as parts:
        PRODUCTS[weight_NK.dtype](work, parts)
    return y_TN
