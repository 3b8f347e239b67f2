"""Weights on the CPU: quantization of rows and of columns, and copies from one float format to another.

Every kernel here runs on one thread and without Python's lock: loading runs several of them at once, each on rows that
its thread has just read, and a parallel kernel would make them wait for each other.

Dimensions: K input features, R rows of the weight (columns of a transposed one).
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .numba_bits import as_bits, from_float32, magnitude, magnitude_to_float32, round_to_int8, to_float32
from .reference import SMALLEST_ABSMAX

TILE = 64
"""Side of the square in which a transposed weight is turned: 4 KiB of int8 stay in a core's L1 cache."""


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def row_scale(absmax):
    """The scale of a row and the factor that quantizes it, in float32; zeros for a row of zeros."""
    if absmax < np.float32(SMALLEST_ABSMAX):
        return np.float32(0.0), np.float32(0.0)
    return absmax / np.float32(127.0), np.float32(127.0) * (np.float32(1.0) / absmax)


@njit(nogil=True, cache=True)
def quantize(source_RK, out_RK, scale_R):
    bad = 0
    for r in range(source_RK.shape[0]):
        row = source_RK[r]
        out = out_RK[r]
        largest = magnitude(row[0])
        for k in range(row.shape[0]):
            m = magnitude(row[k])
            if m > largest:
                largest = m
        absmax = magnitude_to_float32(largest, row[0])
        if not absmax < np.float32(np.inf):
            bad += 1
        scale, inverse = row_scale(absmax)
        scale_R[r] = scale
        for k in range(row.shape[0]):
            out[k] = round_to_int8(to_float32(row[k]) * inverse)
    return bad


@njit(nogil=True, cache=True)
def largest_of_columns(source_KR, largest_R):
    for k in range(source_KR.shape[0]):
        row = source_KR[k]
        for r in range(row.shape[0]):
            m = magnitude(row[r])
            if m > largest_R[r]:
                largest_R[r] = m


@njit(nogil=True, cache=True)
def quantize_columns(source_KR, largest_R, out_RK, scale_R):
    """Quantize and turn a weight that is stored as (in_features, out_features), tile by tile."""
    features, rows = source_KR.shape
    inverse_R = np.empty(rows, np.float32)
    bad = 0
    for r in range(rows):
        absmax = magnitude_to_float32(largest_R[r], source_KR[0, 0])
        if not absmax < np.float32(np.inf):
            bad += 1
        scale_R[r], inverse_R[r] = row_scale(absmax)
    tile = np.empty((TILE, TILE), np.int8)
    for first_r in range(0, rows, TILE):
        height = min(TILE, rows - first_r)
        inverse = inverse_R[first_r : first_r + height]
        for first_k in range(0, features, TILE):
            width = min(TILE, features - first_k)
            for k in range(width):
                source, line = source_KR[first_k + k, first_r : first_r + height], tile[k]
                for r in range(height):
                    line[r] = round_to_int8(to_float32(source[r]) * inverse[r])
            for r in range(height):
                out, column = out_RK[first_r + r, first_k : first_k + width], tile[:, r]
                for k in range(width):
                    out[k] = column[k]
    return bad


def quantize_rows(source_RK: Tensor, out_RK: Tensor, scale_R: Tensor) -> bool:
    """Quantize rows in place. False if a value is NaN or infinite."""
    if source_RK.numel() == 0:
        scale_R.zero_()
        return True
    out, scale = out_RK.numpy(), scale_R.numpy()
    if source_RK.stride(0) == 1 and source_RK.T.is_contiguous():
        source = as_bits(source_RK.T).numpy()
        unsigned = np.uint32 if source_RK.dtype == torch.float32 else np.uint16
        largest = np.zeros(source.shape[1], unsigned)
        largest_of_columns(source, largest)
        return bool(quantize_columns(source, largest, out, scale) == 0)
    return bool(quantize(as_bits(source_RK.contiguous()).numpy(), out, scale) == 0)


@njit(nogil=True, cache=True)
def copy(source, out):
    infinite = 0
    overflowed = 0
    for i in range(source.shape[0]):
        value = to_float32(source[i])
        rounded = from_float32(value, out[i])
        out[i] = rounded
        infinite += not abs(value) < np.float32(np.inf)
        overflowed += not abs(to_float32(rounded)) < np.float32(np.inf)
    return infinite, overflowed


def copy_values(source: Tensor, out: Tensor) -> tuple[bool, bool]:
    """Copy float16, bfloat16 or float32 values into another of these formats, in place.

    Both contiguous, of one shape. Returns whether all values are finite, and whether all still are in their new format.
    """
    infinite, overflowed = copy(as_bits(source).view(-1).numpy(), as_bits(out).view(-1).numpy())
    return infinite == 0, overflowed == 0
