"""Products of float32 activations with 16-bit float weights on the CPU: the output head, which stays as it is stored.

The weights become float32 in registers, exactly, so the product is that of float32 weights at half the bytes. A CPU
without 16-bit arithmetic turns eight of them at once (F16C for float16, a shift for bfloat16).

Dimensions: T tokens, K input features, N output features.
"""

import numpy as np
from numba import njit, prange
from torch import Tensor

from . import generic
from .cpu import threads_for
from .numba_bits import as_bits, to_float32

MOST_ROWS = 32
"""Rows of X that this serves; for more, torch's product with slices of the weight in float32 is faster."""


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _dot(x_K, w_K):
    total = np.float32(0.0)
    for k in range(x_K.shape[0]):
        total += x_K[k] * to_float32(w_K[k])
    return total


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _four_dots(x_K, w0_K, w1_K, w2_K, w3_K):
    y0 = y1 = y2 = y3 = np.float32(0.0)
    for k in range(x_K.shape[0]):
        x = x_K[k]
        y0 += x * to_float32(w0_K[k])
        y1 += x * to_float32(w1_K[k])
        y2 += x * to_float32(w2_K[k])
        y3 += x * to_float32(w3_K[k])
    return y0, y1, y2, y3


@njit(nogil=True, cache=True)
def _multiply(x_TK, w_NK, y_TN, start, stop):
    """Four rows at once, a quarter of them all apart: long streams, as in `cpu_product.multiply`."""
    apart = (stop - start) // 4
    for n in range(start, start + apart):
        n1, n2, n3 = n + apart, n + 2 * apart, n + 3 * apart
        for t in range(x_TK.shape[0]):
            y0, y1, y2, y3 = _four_dots(x_TK[t], w_NK[n], w_NK[n1], w_NK[n2], w_NK[n3])
            y_TN[t, n], y_TN[t, n1], y_TN[t, n2], y_TN[t, n3] = y0, y1, y2, y3
    for n in range(start + 4 * apart, stop):
        for t in range(x_TK.shape[0]):
            y_TN[t, n] = _dot(x_TK[t], w_NK[n])


@njit(parallel=True, nogil=True, cache=True)
def _multiply_parallel(x_TK, w_NK, y_TN, parts):
    rows = w_NK.shape[0]
    for part in prange(parts):
        _multiply(x_TK, w_NK, y_TN, part * rows // parts, (part + 1) * rows // parts)


def float_linear(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """Float32 X (T, K) times float16 or bfloat16 weights (N, K): float32 (T, N). Both are contiguous."""
    if x_TK.shape[0] > MOST_ROWS:
        return generic.float_linear(x_TK, weight_NK)
    y_TN = x_TK.new_empty(x_TK.shape[0], weight_NK.shape[0])
    arrays = x_TK.detach().numpy(), as_bits(weight_NK.detach()).numpy(), y_TN.numpy()
    with threads_for(x_TK.shape[0] * weight_NK.numel()) as parts:
        if parts > 1:
            _multiply_parallel(*arrays, parts)
        else:
            _multiply(*arrays, 0, weight_NK.shape[0])
    return y_TN
