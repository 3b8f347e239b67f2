"""Int8 on the CPU: row kernels in numba, products in integer or float GEMMs.

Three ways to multiply, each within rounding of `reference.int8_linear`:

- `multiply_few_rows`: each int8 weight is read once, converted in registers and multiplied by every row of X. For
  decoding, where reading the weights is the whole cost.
- `multiply_int8`: `torch._int_mm`, then one pass that rescales. Where the CPU has int8 dot products (VNNI); elsewhere
  torch runs that product as a plain loop, some 25 times slower than float32.
- `multiply_float`: a slice of the weight at a time becomes float32 and goes through the float GEMM. The activations
  are rounded to their int8 grid first and outlier columns stay as they are, so one product gives both parts.

Dimensions: T tokens, K input features, N output features, R rows of a weight slice.
"""

import threading

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from .cpu_weights import row_scale
from .numba_bits import magnitude, magnitude_to_float32, round_to_int8
from .reference import FEW_ROWS, Activations, resolve_activations

SLICE_FLOATS = 2**18
"""Size of the float32 slice of a weight in `multiply_float`: 1 MiB stays in a core's L2 cache."""

PARALLEL_VALUES = 2**20
"""Kernels over fewer values run on one thread: at some 20 values a nanosecond they take less time than it takes to
wake others, and on a busy machine much less, since numba and torch each wait for their own threads by spinning."""

# numba's fallback threading layer aborts the process when two threads start parallel kernels at once.
_numba_lock = threading.Lock()


# --- activations ---


@njit(nogil=True, cache=True)
def _find_outliers(x_TK, threshold, absmax_T, outliers_K, start, stop):
    """The absmax of each row, and a mark on each column with a value at or above the threshold."""
    for t in range(start, stop):
        row = x_TK[t]
        largest = np.uint32(0)
        for k in range(row.shape[0]):
            m = magnitude(row[k])
            if m > largest:
                largest = m
        absmax_T[t] = magnitude_to_float32(largest, row[0])
        if threshold > 0 and absmax_T[t] >= threshold:
            for k in range(row.shape[0]):
                if abs(row[k]) >= threshold:
                    outliers_K[k] = True


@njit(nogil=True, cache=True)
def _absmax_without(row, outliers_K):
    largest = np.uint32(0)
    for k in range(row.shape[0]):
        m = np.uint32(0) if outliers_K[k] else magnitude(row[k])
        if m > largest:
            largest = m
    return magnitude_to_float32(largest, row[0])


@njit(nogil=True, cache=True)
def _to_int8(x_TK, outliers_K, absmax_T, q_TK, scale_T, start, stop):
    """int8 values with outlier columns zero, and the scales of rows."""
    some = outliers_K.any()
    for t in range(start, stop):
        row = x_TK[t]
        scale_T[t], inverse = row_scale(_absmax_without(row, outliers_K) if some else absmax_T[t])
        for k in range(row.shape[0]):
            q_TK[t, k] = 0 if outliers_K[k] else round_to_int8(row[k] * inverse)


@njit(nogil=True, cache=True)
def _to_int8_grid(x_TK, outliers_K, absmax_T, rounded_TK, start, stop):
    """X with all but the outlier columns rounded to the int8 grid of their row."""
    some = outliers_K.any()
    for t in range(start, stop):
        row = x_TK[t]
        scale, inverse = row_scale(_absmax_without(row, outliers_K) if some else absmax_T[t])
        for k in range(row.shape[0]):
            x = row[k]
            rounded_TK[t, k] = x if outliers_K[k] else np.float32(round_to_int8(x * inverse)) * scale


@njit(parallel=True, nogil=True, cache=True)
def _to_int8_parallel(x_TK, threshold, absmax_T, outliers_K, q_TK, scale_T, parts):
    rows = x_TK.shape[0]
    for part in prange(parts):
        _find_outliers(x_TK, threshold, absmax_T, outliers_K, part * rows // parts, (part + 1) * rows // parts)
    for part in prange(parts):
        _to_int8(x_TK, outliers_K, absmax_T, q_TK, scale_T, part * rows // parts, (part + 1) * rows // parts)


@njit(parallel=True, nogil=True, cache=True)
def _to_int8_grid_parallel(x_TK, threshold, absmax_T, outliers_K, rounded_TK, parts):
    rows = x_TK.shape[0]
    for part in prange(parts):
        _find_outliers(x_TK, threshold, absmax_T, outliers_K, part * rows // parts, (part + 1) * rows // parts)
    for part in prange(parts):
        _to_int8_grid(x_TK, outliers_K, absmax_T, rounded_TK, part * rows // parts, (part + 1) * rows // parts)


def quantize_activations(x_TK: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.quantize_activations` of float32 X: int8 (T, K), float32 scales (T,), outlier mask (K,)."""
    t, k = x_TK.shape
    x, limit, absmax_T, outliers_K = x_TK.numpy(), np.float32(threshold), np.empty(t, np.float32), np.zeros(k, np.bool_)
    q_TK, scale_T = torch.empty(t, k, dtype=torch.int8), torch.empty(t)
    parts = _threads(t * k)
    if parts > 1:
        with _numba_lock:
            _to_int8_parallel(x, limit, absmax_T, outliers_K, q_TK.numpy(), scale_T.numpy(), parts)
    else:
        _find_outliers(x, limit, absmax_T, outliers_K, 0, t)
        _to_int8(x, outliers_K, absmax_T, q_TK.numpy(), scale_T.numpy(), 0, t)
    return q_TK, scale_T, torch.from_numpy(outliers_K)


def round_activations(x_TK: Tensor, threshold: float) -> Tensor:
    """Float32 X with every value outside the outlier columns rounded to its row's int8 grid (T, K)."""
    t, k = x_TK.shape
    x, limit, absmax_T, outliers_K = x_TK.numpy(), np.float32(threshold), np.empty(t, np.float32), np.zeros(k, np.bool_)
    rounded_TK = torch.empty_like(x_TK)
    parts = _threads(t * k)
    if parts > 1:
        with _numba_lock:
            _to_int8_grid_parallel(x, limit, absmax_T, outliers_K, rounded_TK.numpy(), parts)
    else:
        _find_outliers(x, limit, absmax_T, outliers_K, 0, t)
        _to_int8_grid(x, outliers_K, absmax_T, rounded_TK.numpy(), 0, t)
    return rounded_TK


# --- products ----------------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _few_rows(x_TK, weight_NK, scale_N, y_TN, start, stop):
    tokens, features = x_TK.shape
    for n in range(start, stop):
        row = weight_NK[n]
        scale = scale_N[n]
        t = 0
        while t + 4 <= tokens:
            a = np.float32(0.0)
            b = np.float32(0.0)
            c = np.float32(0.0)
            d = np.float32(0.0)
            for k in range(features):
                w = np.float32(row[k])
                a += w * x_TK[t, k]
                b += w * x_TK[t + 1, k]
                c += w * x_TK[t + 2, k]
                d += w * x_TK[t + 3, k]
            y_TN[t, n] = a * scale
            y_TN[t + 1, n] = b * scale
            y_TN[t + 2, n] = c * scale
            y_TN[t + 3, n] = d * scale
            t += 4
        while t < tokens:
            a = np.float32(0.0)
            for k in range(features):
                a += np.float32(row[k]) * x_TK[t, k]
            y_TN[t, n] = a * scale
            t += 1


@njit(parallel=True, nogil=True, cache=True)
def _few_rows_parallel(x_TK, weight_NK, scale_N, y_TN, parts):
    rows = weight_NK.shape[0]
    for part in prange(parts):
        _few_rows(x_TK, weight_NK, scale_N, y_TN, part * rows // parts, (part + 1) * rows // parts)


def multiply_few_rows(x_TK: Tensor, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Float32 X (T, K) times int8 weights converted in registers: float32 (T, N)."""
    y_TN = torch.empty(x_TK.shape[0], weight_NK.shape[0])
    arrays = x_TK.numpy(), weight_NK.numpy(), scale_N.numpy(), y_TN.numpy()
    parts = _threads(weight_NK.numel() * x_TK.shape[0])
    if parts > 1:
        with _numba_lock:
            _few_rows_parallel(*arrays, parts)
    else:
        _few_rows(*arrays, 0, len(weight_NK))
    return y_TN


def multiply_float(x_TK: Tensor, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Float32 X (T, K) times int8 weights, a slice of them at a time in float32: float32 (T, N)."""
    n, k = weight_NK.shape
    y_TN = torch.empty(x_TK.shape[0], n)
    step = max(16, SLICE_FLOATS // max(1, k))
    w_RK = torch.empty(min(step, n), k)
    for start in range(0, n, step):
        stop = min(start + step, n)
        w = w_RK[: stop - start].copy_(weight_NK[start:stop])
        torch.mm(x_TK, w.T, out=y_TN[:, start:stop])
    return y_TN.mul_(scale_N)


@njit(nogil=True, cache=True)
def _rescale(acc_TN, x_scale_T, scale_N, y_TN, start, stop):
    for t in range(start, stop):
        x_scale = x_scale_T[t]
        for n in range(acc_TN.shape[1]):
            y_TN[t, n] = np.float32(acc_TN[t, n]) * (x_scale * scale_N[n])


@njit(parallel=True, nogil=True, cache=True)
def _rescale_parallel(acc_TN, x_scale_T, scale_N, y_TN, parts):
    rows = acc_TN.shape[0]
    for part in prange(parts):
        _rescale(acc_TN, x_scale_T, scale_N, y_TN, part * rows // parts, (part + 1) * rows // parts)


def multiply_int8(x_TK: Tensor, weight_NK: Tensor, scale_N: Tensor, threshold: float) -> Tensor:
    """LLM.int8() of float32 X (T, K) with an integer GEMM and a float one over the outlier columns: float32 (T, N)."""
    q_TK, x_scale_T, outliers_K = quantize_activations(x_TK, threshold)
    acc_TN = torch._int_mm(q_TK, weight_NK.T)
    y_TN = torch.empty(acc_TN.shape)
    arrays = acc_TN.numpy(), x_scale_T.numpy(), scale_N.numpy(), y_TN.numpy()
    parts = _threads(acc_TN.numel())
    if parts > 1:
        with _numba_lock:
            _rescale_parallel(*arrays, parts)
    else:
        _rescale(*arrays, 0, len(acc_TN))
    columns = outliers_K.nonzero().squeeze(1)
    if columns.numel():
        w_NC = weight_NK.index_select(1, columns).float() * scale_N[:, None]
        y_TN.addmm_(x_TK.index_select(1, columns), w_NC.T)
    return y_TN


def has_int8_dot() -> bool:
    """Whether `torch._int_mm` is fast here: the CPU multiplies int8 with VNNI."""
    return bool(torch.cpu._is_vnni_supported())


def int8_linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    threshold: float,
    activations: Activations,
) -> Tensor:
    """`reference.int8_linear` in float32, returned in X's dtype (T, N)."""
    dtype, tokens = x_TK.dtype, x_TK.shape[0]
    x_TK = x_TK.detach().float().contiguous()
    weight_NK, scale_N = weight_NK.detach(), scale_N.detach()
    mode = resolve_activations(activations, tokens)
    few = tokens <= FEW_ROWS
    if mode == "int8" and has_int8_dot():
        y_TN = multiply_int8(x_TK, weight_NK, scale_N, threshold)
    else:
        if mode == "int8":
            x_TK = round_activations(x_TK, threshold)
        y_TN = (multiply_few_rows if few else multiply_float)(x_TK, weight_NK, scale_N)
    if bias_N is not None:
        y_TN += bias_N
    return y_TN.to(dtype)


def _threads(values: int) -> int:
    """How many threads a kernel over so many values is worth, torch's number at most; numba is set to it."""
    threads = min(torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS))
    if values < PARALLEL_VALUES or threads == 1:
        return 1
    numba.set_num_threads(threads)
    return threads
