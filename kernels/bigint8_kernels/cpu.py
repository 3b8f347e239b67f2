"""The int8 linear layer on the CPU.

First the activations become integers. For LLM.int8() these are int8, with one scale a token; the outlier columns
become zero and are multiplied apart. Activations that are to stay 16-bit become int16, with a scale for each block of
a token: that is finer than either 16-bit float. Then one kernel multiplies the integers with the weights
(`cpu_product`). If the CPU has int8 dot products (VNNI), many rows of int8 go through `torch._int_mm` instead.

Each function here is within rounding of its definition in `reference`. Dimensions: T tokens, K input features,
N output features, B blocks of K.
"""

from ctypes import addressof, c_byte
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .cpu_product import multiply
from .cpu_threads import Work, blocks_of, kernel, threads_for, tokens_of, work_at
from .cpu_weights import row_scale
from .numba_bits import (
    float32_at,
    int8_at,
    int16_at,
    int32_at,
    magnitude,
    magnitude_to_float32,
    round_to_int8,
    round_to_int16,
    uint8_at,
)
from .reference import BLOCK, FEW_ROWS, LARGEST_INT16, SMALLEST_BLOCK_ABSMAX, Activations, resolve_activations

CACHE_LINE = 64

# --- activations to integers ---


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _largest(x_K, features):
    """The bits of the largest |x|."""
    largest = np.uint32(0)
    for k in range(features):
        m = magnitude(x_K[k])
        if m > largest:
            largest = m
    return largest


@kernel
def to_int8(address, part, parts):
    """int8 values and scales of rows in one pass, as long as none has an outlier; marks outlier columns."""
    work = work_at(address)
    features, blocks = work.features, blocks_of(work.features)
    outliers_K = uint8_at(work.outliers, 0)
    for t in range(part * work.tokens // parts, (part + 1) * work.tokens // parts):
        x_K, q_K = float32_at(work.x, t * features), int16_at(work.q, t * features)
        absmax = magnitude_to_float32(_largest(x_K, features), x_K[0])
        if work.threshold > 0 and absmax >= work.threshold:
            for k in range(features):
                if abs(x_K[k]) >= work.threshold:
                    outliers_K[k] = 1
        scale, inverse = row_scale(absmax)
        x_scale_B = float32_at(work.x_scale, t * blocks)
        for b in range(blocks):
            x_scale_B[b] = scale
        if work.narrow:
            narrow_K = int8_at(work.q, t * features)
            for k in range(features):
                narrow_K[k] = round_to_int8(x_K[k] * inverse)
        else:
            for k in range(features):
                q_K[k] = round_to_int8(x_K[k] * inverse)


@kernel
def to_int8_without(address, part, parts):
    """int8 values and scales of rows, outlier columns left out: their values are zero."""
    work = work_at(address)
    features, blocks = work.features, blocks_of(work.features)
    outliers_K = uint8_at(work.outliers, 0)
    for t in range(part * work.tokens // parts, (part + 1) * work.tokens // parts):
        x_K, q_K = float32_at(work.x, t * features), int16_at(work.q, t * features)
        largest = np.uint32(0)
        for k in range(features):
            m = np.uint32(0) if outliers_K[k] else magnitude(x_K[k])
            if m > largest:
                largest = m
        scale, inverse = row_scale(magnitude_to_float32(largest, x_K[0]))
        x_scale_B = float32_at(work.x_scale, t * blocks)
        for b in range(blocks):
            x_scale_B[b] = scale
        if work.narrow:
            narrow_K = int8_at(work.q, t * features)
            for k in range(features):
                narrow_K[k] = round_to_int8(np.float32(0.0) if outliers_K[k] else x_K[k] * inverse)
        else:
            for k in range(features):
                q_K[k] = round_to_int8(np.float32(0.0) if outliers_K[k] else x_K[k] * inverse)


@kernel
def to_int16(address, part, parts):
    """int16 values, and a scale for each block of a row."""
    work = work_at(address)
    tokens, features, blocks = tokens_of(work), work.features, blocks_of(work.features)
    for t in range(part * tokens // parts, (part + 1) * tokens // parts):
        for b in range(blocks):
            first, count = t * features + b * BLOCK, min(BLOCK, features - b * BLOCK)
            x, q, scale = float32_at(work.x, first), int16_at(work.q, first), float32_at(work.x_scale, t * blocks + b)
            absmax = magnitude_to_float32(_largest(x, count), x[0])
            tiny = absmax < np.float32(SMALLEST_BLOCK_ABSMAX)
            inverse = np.float32(0.0) if tiny else np.float32(LARGEST_INT16) / absmax
            scale[0] = np.float32(0.0) if tiny else absmax / np.float32(LARGEST_INT16)
            for k in range(count):
                q[k] = round_to_int16(x[k] * inverse)


def _quantize(work: Work, outliers_K: Tensor, parts: int) -> None:
    """X to int8, its outlier columns marked and left out."""
    to_int8(work, parts)
    if outliers_K.any():
        to_int8_without(work, parts)


class _Integers:
    """Memory for X as integers, which lives as long as this: the addresses of int16 (T, K) and float32 scales (T, B).

    The integers begin with a cache line, so that no vector lies in two where K is a multiple of 32.
    """

    def __init__(self, tokens: int, features: int) -> None:
        q_bytes = -(-2 * tokens * features // CACHE_LINE) * CACHE_LINE
        memory: Any = np.empty(CACHE_LINE + q_bytes + 4 * tokens * -(-features // BLOCK), np.uint8)
        self._first = c_byte.from_buffer(memory)
        self.q = -(-addressof(self._first) // CACHE_LINE) * CACHE_LINE
        self.x_scale = self.q + q_bytes


def quantize_activations(x_TK: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.quantize_activations` of float32 X: int8 (T, K), float32 scales (T,), outlier mask (K,)."""
    tokens, features = x_TK.shape
    q_TK, x_scale_TB = torch.empty(tokens, features, dtype=torch.int8), torch.empty(tokens, -(-features // BLOCK))
    outliers_K = torch.zeros(features, dtype=torch.bool)
    work = Work(
        x=x_TK.data_ptr(), q=q_TK.data_ptr(), x_scale=x_scale_TB.data_ptr(), outliers=outliers_K.data_ptr(),
        tokens=tokens, features=features, narrow=1, threshold=threshold,
    )  # fmt: skip
    with threads_for(x_TK.numel()) as parts:
        _quantize(work, outliers_K, parts)
    return q_TK, x_scale_TB[:, 0], outliers_K


# --- products ---


def linear_16bit(x_TK: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None) -> Tensor:
    """Float32 X (..., K) in 16 bits times int8 weights, plus the bias: float32 (..., N). All are contiguous."""
    rows, features = weight_NK.shape
    tokens = x_TK.numel() // features
    integers = _Integers(tokens, features)
    y_TN = x_TK.new_empty(*x_TK.shape[:-1], rows)
    work = Work(
        x=x_TK.data_ptr(), q=integers.q, x_scale=integers.x_scale, weight=weight_NK.data_ptr(),
        scale=scale_N.data_ptr(), bias=0 if bias_N is None else bias_N.data_ptr(), y=y_TN.data_ptr(),
        tokens=tokens, features=features, rows=rows, y_stride=rows,
    )  # fmt: skip
    with threads_for(rows * features * tokens) as parts:
        to_int16(work, parts if tokens > FEW_ROWS else 1)
        multiply(work, parts)
    return y_TN


def linear_int8(x_TK: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None, threshold: float) -> Tensor:
    """LLM.int8() of float32 X (T, K), plus the bias: float32 (T, N). All are contiguous."""
    (tokens, features), rows = x_TK.shape, weight_NK.shape[0]
    integers = _Integers(tokens, features)
    outliers_K, y_TN = torch.zeros(features, dtype=torch.bool), torch.empty(tokens, rows)
    work = Work(
        x=x_TK.data_ptr(), q=integers.q, x_scale=integers.x_scale, outliers=outliers_K.data_ptr(),
        weight=weight_NK.data_ptr(), scale=scale_N.data_ptr(), bias=0 if bias_N is None else bias_N.data_ptr(),
        y=y_TN.data_ptr(), tokens=tokens, features=features, rows=rows, y_stride=rows, threshold=threshold,
    )  # fmt: skip
    with threads_for(rows * features * tokens) as parts:
        _quantize(work, outliers_K, parts if tokens > FEW_ROWS else 1)
        multiply(work, parts)
    _add_outliers(y_TN, x_TK, weight_NK, scale_N, outliers_K)
    return y_TN


@kernel
def rescale(address, part, parts):
    """Y from the integer sums of its products, the scales of X (one a token) and of W, and the bias."""
    work = work_at(address)
    scale_N, bias_N = float32_at(work.scale, 0), float32_at(work.bias, 0)
    for t in range(part * work.tokens // parts, (part + 1) * work.tokens // parts):
        x_scale = float32_at(work.x_scale, t)[0]
        sums_N, y_N = int32_at(work.sums, t * work.rows), float32_at(work.y, t * work.y_stride)
        for n in range(work.rows):
            y = np.float32(sums_N[n]) * (x_scale * scale_N[n])
            y_N[n] = y + bias_N[n] if work.bias else y


def linear_vnni(x_TK: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None, threshold: float) -> Tensor:
    """`linear_int8` through torch's integer GEMM, which reads the weights once whatever the number of tokens."""
    if weight_NK.shape[1] == 1:  # torch mistakes a single column for a row and multiplies wrongly
        return linear_int8(x_TK, weight_NK, scale_N, bias_N, threshold)
    q_TK, x_scale_T, outliers_K = quantize_activations(x_TK, threshold)
    sums_TN, x_scale_T = torch._int_mm(q_TK, weight_NK.T).contiguous(), x_scale_T.contiguous()
    y_TN = torch.empty(sums_TN.shape)
    work = Work(
        x_scale=x_scale_T.data_ptr(), scale=scale_N.data_ptr(), bias=0 if bias_N is None else bias_N.data_ptr(),
        sums=sums_TN.data_ptr(), y=y_TN.data_ptr(), tokens=y_TN.shape[0], rows=y_TN.shape[1],
        y_stride=y_TN.shape[1],
    )  # fmt: skip
    with threads_for(sums_TN.numel()) as parts:
        rescale(work, parts)
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
