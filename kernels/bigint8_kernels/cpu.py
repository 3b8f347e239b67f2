"""The int8 linear layer on the CPU.

The activations are made integers first: int8 with one scale a token for LLM.int8(), with the outlier columns zero and
multiplied apart; int16 with a scale for each block of a token where they are to stay 16-bit, which is finer than either
16-bit float. Then one kernel multiplies them with the weights (`cpu_product`), reading each weight once. Where the CPU
has int8 dot products (VNNI), many rows of int8 go through `torch._int_mm` instead.

Each function here is within rounding of its definition in `reference`. Dimensions: T tokens, K input features,
N output features, B blocks of K.
"""

import threading

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from .cpu_product import multiply, multiply_parallel
from .cpu_weights import row_scale
from .numba_bits import float32_at, int8_at, magnitude, magnitude_to_float32, round_to_int8, round_to_int16
from .reference import BLOCK, FEW_ROWS, LARGEST_INT16, SMALLEST_BLOCK_ABSMAX, Activations, resolve_activations

PARALLEL_VALUES = 2**20
"""Kernels over fewer values run on one thread: at some 20 values a nanosecond they take less time than it takes to
wake others, and on a busy machine much less, since numba and torch each wait for their own threads by spinning."""

# numba's fallback threading layer aborts the process when two threads start parallel kernels at once.
_numba_lock = threading.Lock()

# What numba was set to in this thread: setting it takes as long as a small kernel.
_numba_threads = threading.local()

_NO_BIAS = np.empty(0, np.float32)


# --- activations to integers ---


@njit(nogil=True, cache=True)
def _to_int8(x_TK, threshold, q_TK, scale_T, outliers_K, start, stop):
    """int8 values and scales of rows in one pass, as long as no row has an outlier; marks outlier columns."""
    for t in range(start, stop):
        row = x_TK[t]
        largest = np.uint32(0)
        for k in range(row.shape[0]):
            m = magnitude(row[k])
            if m > largest:
                largest = m
        absmax = magnitude_to_float32(largest, row[0])
        if threshold > 0 and absmax >= threshold:
            for k in range(row.shape[0]):
                if abs(row[k]) >= threshold:
                    outliers_K[k] = True
        scale_T[t], inverse = row_scale(absmax)
        out = q_TK[t]
        for k in range(row.shape[0]):
            out[k] = round_to_int8(row[k] * inverse)


@njit(nogil=True, cache=True)
def _to_int8_without(x_TK, outliers_K, q_TK, scale_T, start, stop):
    """int8 values and scales of rows, outlier columns left out: their values are zero."""
    for t in range(start, stop):
        row, out = x_TK[t], q_TK[t]
        largest = np.uint32(0)
        for k in range(row.shape[0]):
            m = np.uint32(0) if outliers_K[k] else magnitude(row[k])
            if m > largest:
                largest = m
        scale_T[t], inverse = row_scale(magnitude_to_float32(largest, row[0]))
        for k in range(row.shape[0]):
            out[k] = round_to_int8(np.float32(0.0) if outliers_K[k] else row[k] * inverse)


@njit(parallel=True, nogil=True, cache=True)
def _to_int8_parallel(x_TK, threshold, q_TK, scale_T, outliers_K, parts):
    rows = x_TK.shape[0]
    for part in prange(parts):
        start, stop = part * rows // parts, (part + 1) * rows // parts
        _to_int8(x_TK, threshold, q_TK, scale_T, outliers_K, start, stop)
    if outliers_K.any():
        for part in prange(parts):
            start, stop = part * rows // parts, (part + 1) * rows // parts
            _to_int8_without(x_TK, outliers_K, q_TK, scale_T, start, stop)


@njit(nogil=True, cache=True)
def _quantize(x_TK, threshold, q_TK, scale_T, outliers_K, parts):
    if parts > 1:
        _to_int8_parallel(x_TK, threshold, q_TK, scale_T, outliers_K, parts)
    else:
        _to_int8(x_TK, threshold, q_TK, scale_T, outliers_K, 0, x_TK.shape[0])
        if outliers_K.any():
            _to_int8_without(x_TK, outliers_K, q_TK, scale_T, 0, x_TK.shape[0])


@njit(nogil=True, cache=True)
def _to_int16(x_TK, q_TK, scale_TB, start, stop):
    """int16 values, and a scale for each block of a row."""
    features = x_TK.shape[1]
    for t in range(start, stop):
        for b in range(scale_TB.shape[1]):
            first, last = b * BLOCK, min((b + 1) * BLOCK, features)
            x, out = x_TK[t, first:last], q_TK[t, first:last]
            largest = np.uint32(0)
            for k in range(x.shape[0]):
                m = magnitude(x[k])
                if m > largest:
                    largest = m
            absmax = magnitude_to_float32(largest, x_TK[t, 0])
            tiny = absmax < np.float32(SMALLEST_BLOCK_ABSMAX)
            inverse = np.float32(0.0) if tiny else np.float32(LARGEST_INT16) / absmax
            scale_TB[t, b] = np.float32(0.0) if tiny else absmax / np.float32(LARGEST_INT16)
            for k in range(x.shape[0]):
                out[k] = round_to_int16(x[k] * inverse)


@njit(parallel=True, nogil=True, cache=True)
def _to_int16_parallel(x_TK, q_TK, scale_TB, parts):
    rows = x_TK.shape[0]
    for part in prange(parts):
        _to_int16(x_TK, q_TK, scale_TB, part * rows // parts, (part + 1) * rows // parts)


def quantize_activations(x_TK: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.quantize_activations` of float32 X: int8 (T, K), float32 scales (T,), outlier mask (K,)."""
    t, k = x_TK.shape
    q_TK, scale_T, outliers_K = torch.empty(t, k, dtype=torch.int8), torch.empty(t), np.zeros(k, np.bool_)
    with threads_for(t * k) as parts:
        _quantize(x_TK.numpy(), np.float32(threshold), q_TK.numpy(), scale_T.numpy(), outliers_K, parts)
    return q_TK, scale_T, torch.from_numpy(outliers_K)


# --- products ---


@njit(nogil=True, cache=True)
def _linear_16bit(x, weight, scale, bias, y, tokens, features, rows, parts):
    """Arrays come as addresses (`bias` 0 for none), since turning tensors into arrays takes longer than a small one."""
    x_TK = float32_at(x, (tokens, features))
    q_TK = np.empty((tokens, features), np.int16)
    x_scale_TB = np.empty((tokens, (features + BLOCK - 1) // BLOCK), np.float32)
    if parts > 1 and tokens > FEW_ROWS:
        _to_int16_parallel(x_TK, q_TK, x_scale_TB, parts)
    else:
        _to_int16(x_TK, q_TK, x_scale_TB, 0, tokens)
    _multiply(q_TK, x_scale_TB, weight, scale, bias, y, rows, parts)


@njit(nogil=True, cache=True)
def _linear_int8(x, threshold, outliers_K, weight, scale, bias, y, tokens, features, rows, parts):
    x_TK = float32_at(x, (tokens, features))
    q_TK, x_scale_T = np.empty((tokens, features), np.int16), np.empty(tokens, np.float32)
    _quantize(x_TK, threshold, q_TK, x_scale_T, outliers_K, parts if tokens > FEW_ROWS else 1)
    x_scale_TB = np.empty((tokens, (features + BLOCK - 1) // BLOCK), np.float32)
    for t in range(tokens):
        x_scale_TB[t] = x_scale_T[t]
    _multiply(q_TK, x_scale_TB, weight, scale, bias, y, rows, parts)


@njit(nogil=True, cache=True)
def _multiply(q_TK, x_scale_TB, weight, scale, bias, y, rows, parts):
    tokens, features = q_TK.shape
    w_NK, scale_N = int8_at(weight, (rows, features)), float32_at(scale, (rows,))
    bias_N, y_TN = float32_at(bias, (rows if bias else 0,)), float32_at(y, (tokens, rows))
    if parts > 1:
        multiply_parallel(q_TK, x_scale_TB, w_NK, scale_N, bias_N, y_TN, parts)
    else:
        multiply(q_TK, x_scale_TB, w_NK, scale_N, bias_N, y_TN, 0, rows)


def linear_16bit(x_TK: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None) -> Tensor:
    """Float32 X (..., K) in 16 bits times int8 weights, plus the bias: float32 (..., N). All are contiguous."""
    rows, features = weight_NK.shape
    tokens = x_TK.numel() // features
    y_TN = x_TK.new_empty(*x_TK.shape[:-1], rows)
    bias = 0 if bias_N is None else bias_N.data_ptr()
    addresses = x_TK.data_ptr(), weight_NK.data_ptr(), scale_N.data_ptr(), bias, y_TN.data_ptr()
    with threads_for(rows * features * tokens) as parts:
        _linear_16bit(*addresses, tokens, features, rows, parts)
    return y_TN


def linear_int8(x_TK: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None, threshold: float) -> Tensor:
    """LLM.int8() of float32 X (T, K), plus the bias: float32 (T, N). All are contiguous."""
    (tokens, features), rows = x_TK.shape, weight_NK.shape[0]
    y_TN = torch.empty(tokens, rows)
    outliers_K = np.zeros(features, np.bool_)
    bias = 0 if bias_N is None else bias_N.data_ptr()
    addresses = weight_NK.data_ptr(), scale_N.data_ptr(), bias, y_TN.data_ptr()
    with threads_for(rows * features * tokens) as parts:
        limit = np.float32(threshold)
        _linear_int8(x_TK.data_ptr(), limit, outliers_K, *addresses, tokens, features, rows, parts)
    _add_outliers(y_TN, x_TK, weight_NK, scale_N, torch.from_numpy(outliers_K))
    return y_TN


@njit(nogil=True, cache=True)
def _rescale(acc_TN, x_scale_T, scale_N, bias_N, y_TN, start, stop):
    for t in range(start, stop):
        x_scale = x_scale_T[t]
        for n in range(acc_TN.shape[1]):
            y = np.float32(acc_TN[t, n]) * (x_scale * scale_N[n])
            y_TN[t, n] = y + bias_N[n] if bias_N.shape[0] else y


@njit(parallel=True, nogil=True, cache=True)
def _rescale_parallel(acc_TN, x_scale_T, scale_N, bias_N, y_TN, parts):
    rows = acc_TN.shape[0]
    for part in prange(parts):
        _rescale(acc_TN, x_scale_T, scale_N, bias_N, y_TN, part * rows // parts, (part + 1) * rows // parts)


def linear_vnni(x_TK: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None, threshold: float) -> Tensor:
    """`linear_int8` through torch's integer GEMM, which reads the weights once whatever the number of tokens."""
    q_TK, x_scale_T, outliers_K = quantize_activations(x_TK, threshold)
    acc_TN = torch._int_mm(q_TK, weight_NK.T)
    y_TN = torch.empty(acc_TN.shape)
    bias = _NO_BIAS if bias_N is None else bias_N.numpy()
    with threads_for(acc_TN.numel()) as parts:
        arrays = acc_TN.numpy(), x_scale_T.numpy(), scale_N.numpy(), bias, y_TN.numpy()
        if parts > 1:
            _rescale_parallel(*arrays, parts)
        else:
            _rescale(*arrays, 0, len(acc_TN))
    _add_outliers(y_TN, x_TK, weight_NK, scale_N, outliers_K)
    return y_TN


def _add_outliers(y_TN: Tensor, x_TK: Tensor, weight_NK: Tensor, scale_N: Tensor, outliers_K: Tensor) -> None:
    """The outlier columns of float32 X times theirs of the weight, gathered, added to Y."""
    columns = outliers_K.nonzero().squeeze(1)
    if columns.numel():
        w_NC = weight_NK.index_select(1, columns).float() * scale_N[:, None]
        y_TN.addmm_(x_TK.index_select(1, columns), w_NC.T)


def has_int8_dot() -> bool:
    """Whether `torch._int_mm` is fast here: elsewhere torch runs it as a plain loop, 25 times slower than float32."""
    return bool(torch.cpu._is_vnni_supported())


def int8_linear(
    x: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None, threshold: float, activations: Activations
) -> Tensor:
    """`reference.int8_linear` of X (..., K) in float32, returned in X's dtype (..., N)."""
    dtype, features = x.dtype, weight_NK.shape[1]
    tokens = x.numel() // features
    x, weight_NK, scale_N = x.float().contiguous(), weight_NK.contiguous(), scale_N.contiguous()
    bias_N = None if bias_N is None else bias_N.float().contiguous()
    if resolve_activations(activations, tokens) == "16bit":
        y = linear_16bit(x, weight_NK, scale_N, bias_N)
        return y if dtype == torch.float32 else y.to(dtype)
    x_TK = x.detach().view(tokens, features)
    many = linear_vnni if tokens > FEW_ROWS and has_int8_dot() else None
    y_TN = (many or linear_int8)(x_TK, weight_NK.detach(), scale_N, bias_N, threshold)
    return y_TN.view(*x.shape[:-1], -1).to(dtype)


class threads_for:
    """`with threads_for(values) as parts`: how many threads a kernel over so many values is worth, torch's at most.

    Where there are several, numba is set to them, and no other thread starts a parallel kernel meanwhile.
    """

    def __init__(self, values: int) -> None:
        threads = min(torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS))
        self._parts = 1 if values < PARALLEL_VALUES else threads

    def __enter__(self) -> int:
        if self._parts > 1:
            _numba_lock.acquire()
            if getattr(_numba_threads, "count", None) != self._parts:
                numba.set_num_threads(self._parts)
                _numba_threads.count = self._parts
        return self._parts

    def __exit__(self, *_: object) -> None:
        if self._parts > 1:
            _numba_lock.release()
