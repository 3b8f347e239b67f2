# mypy: allow-untyped-defs, allow-untyped-decorators
"""Outliers of single tokens times int8 weights on the CPU, added to what the rest of the row gave.

Each token has its own outliers, a few values of thousands; together the rows of a prompt may have some in most
columns. They are listed once for all layers of the same X. Then each thread takes tiles of the weight: it turns the
columns that any token needs, so that a column's weights of a tile lie side by side, and adds each outlier times its
own. The outliers of a token are added one after the other in the order of k: its result does not depend on others.
"""

import ctypes
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .cpu_threads import kernel, record_at, threads_for
from .numba_bits import float32_at, int8_at, int32_at, intp_at, uint8_at
from .numba_floats import WIDTH, load, load_first, multiply, multiply_add, spread, stack_bytes, store, sum_of
from .step import Linear

MOST_LISTED = 2**17
"""Outliers that are listed at once; a prompt may have any number."""

TILE = 64
"""Rows of a weight whose columns are turned together: 8 x 8, as a word holds 8 int8 values."""

RUN = 1024
"""Columns of a tile that are turned at once: they fill 64 KiB, which a core's own cache holds."""

_TILE_BYTES = RUN * TILE

STRETCH = 128
"""Columns that are turned for 8 rows before the next 8 rows: what is written meanwhile stays in the fastest cache."""


class OutlierWork(ctypes.Structure):
    """Addresses and sizes. x float32 (T, K), of which `columns` intp (C,) have outliers.

    The list: offsets intp (T,), where that of each token begins; starts int32 (T, runs + 1), where that of each token
    begins in each run of columns; places int32, the column's index in `columns`, and values float32. What is computed:
    weight int8 (N, K), scale float32 (N,), y float32 (T, N), its rows y_stride values apart.
    """

    _fields_ = [
        *((name, ctypes.c_ssize_t) for name in ("x", "columns", "offsets", "starts", "places", "values")),
        *((name, ctypes.c_ssize_t) for name in ("weight", "scale", "y", "y_stride")),
        *((name, ctypes.c_ssize_t) for name in ("tokens", "features", "count", "rows")),
        ("threshold", ctypes.c_float),
    ]


_outliers_at = record_at(OutlierWork)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _sum_of_squares(x_K, features):
    """With an order of its own, not the compiler's: all kernels must find the same outliers."""
    total = spread(np.float32(0.0))
    for k in range(0, features, WIDTH):
        x = load(x_K, k) if k + WIDTH <= features else load_first(x_K, k, features - k)
        total = multiply_add(x, x, total)
    return sum_of(total)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def least_outlier(x_K, features, threshold):
    """From which |x| on a value of this row is an outlier: the threshold times the row's root mean square."""
    least = threshold * np.sqrt(_sum_of_squares(x_K, features) / np.float32(features))
    return least if least > 0 else np.float32(np.inf)


@kernel
def list_outliers(address, part, parts):
    """Each token's outliers, in the order of k, from its offset on."""
    work = _outliers_at(address)
    columns_C, runs = intp_at(work.columns, 0), (work.count + RUN - 1) // RUN
    for t in range(part * work.tokens // parts, (part + 1) * work.tokens // parts):
        x_K, starts = float32_at(work.x, t * work.features), int32_at(work.starts, t * (runs + 1))
        least = least_outlier(x_K, work.features, work.threshold)
        at = intp_at(work.offsets, t)[0]
        for run in range(runs):
            starts[run] = at
            for c in range(run * RUN, min((run + 1) * RUN, work.count)):
                x = x_K[columns_C[c]]
                if abs(x) >= least:
                    int32_at(work.places, at)[0] = c
                    float32_at(work.values, at)[0] = x
                    at += 1
        starts[runs] = at


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _row(work, n):
    return uint8_at(work.weight, min(n, work.rows - 1) * work.features)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _turn(work, row, first, last, tile):
    """Write the columns from first to last of the weight's TILE rows from `row` on: each column's values together.

    Behind the last row that row is read again.
    """
    columns_C = intp_at(work.columns, 0)
    for begin in range(first, last, STRETCH):
        end = min(begin + STRETCH, last)
        for eight in range(TILE // 8):
            n = row + 8 * eight
            w0, w1, w2, w3 = _row(work, n), _row(work, n + 1), _row(work, n + 2), _row(work, n + 3)
            w4, w5, w6, w7 = _row(work, n + 4), _row(work, n + 5), _row(work, n + 6), _row(work, n + 7)
            for c in range(begin, end):
                k = columns_C[c]
                low = np.intp(w0[k]) | np.intp(w1[k]) << 8 | np.intp(w2[k]) << 16 | np.intp(w3[k]) << 24
                high = np.intp(w4[k]) | np.intp(w5[k]) << 8 | np.intp(w6[k]) << 16 | np.intp(w7[k]) << 24
                intp_at(tile, (c - first) * (TILE // 8) + eight)[0] = low | high << 32
    return int8_at(tile, 0)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _add_few(work, start, end, first, w_CN, y_N, scale_N, rows):
    """One token's outliers from start to end to the `rows` outputs of the last tile."""
    for i in range(start, end):
        x, c = float32_at(work.values, i)[0], int32_at(work.places, i)[0] - first
        for n in range(rows):
            y_N[n] = multiply_add(x, np.float32(w_CN[c * TILE + n]) * scale_N[n], y_N[n])


@kernel
def add_outliers(address, part, parts):
    """Y plus each token's outliers times their columns of the weight."""
    work = _outliers_at(address)
    memory = stack_bytes(_TILE_BYTES)
    tiles, runs = (work.rows + TILE - 1) // TILE, (work.count + RUN - 1) // RUN
    for n in range(part * tiles // parts * TILE, (part + 1) * tiles // parts * TILE, TILE):
        scale_N, whole = float32_at(work.scale, n), n + TILE <= work.rows
        for run in range(runs):
            first = run * RUN
            w_CN = _turn(work, n, first, min(first + RUN, work.count), memory)
            for t in range(work.tokens):
                starts = int32_at(work.starts, t * (runs + 1) + run)
                start, end = starts[0], starts[1]
                if start == end:
                    continue
                y_N = float32_at(work.y, t * work.y_stride + n)
                if not whole:
                    _add_few(work, start, end, first, w_CN, y_N, scale_N, work.rows - n)
                    continue
                scale0, scale1 = load(scale_N, 0), load(scale_N, WIDTH)
                scale2, scale3 = load(scale_N, 2 * WIDTH), load(scale_N, 3 * WIDTH)
                y0, y1, y2, y3 = load(y_N, 0), load(y_N, WIDTH), load(y_N, 2 * WIDTH), load(y_N, 3 * WIDTH)
                for i in range(start, end):
                    x = spread(float32_at(work.values, i)[0])
                    at = (int32_at(work.places, i)[0] - first) * TILE
                    y0 = multiply_add(x, multiply(load(w_CN, at), scale0), y0)
                    y1 = multiply_add(x, multiply(load(w_CN, at + WIDTH), scale1), y1)
                    y2 = multiply_add(x, multiply(load(w_CN, at + 2 * WIDTH), scale2), y2)
                    y3 = multiply_add(x, multiply(load(w_CN, at + 3 * WIDTH), scale3), y3)
                store(y_N, 0, y0)
                store(y_N, WIDTH, y1)
                store(y_N, 2 * WIDTH, y2)
                store(y_N, 3 * WIDTH, y3)


class Outliers:
    """The outliers of rows of X, as `to_int8_by_token` found them: to be added to each layer of X."""

    def __init__(self, x_TK: Tensor, threshold: float, marked_K: Tensor, counts_T: Tensor, memory: Tensor) -> None:
        """X float32; marked_K bool (K,): columns with outliers; counts_T int32 (T,): outliers of each token.

        memory: int32 (2, MOST_LISTED), for the list.
        """
        self._x, self._threshold, self._counts, self._memory = x_TK, threshold, counts_T, memory
        self._columns = marked_K.nonzero().squeeze(1)
        runs = -(-len(self._columns) // RUN)
        self._starts = torch.empty(len(x_TK) if runs else 0, runs + 1, dtype=torch.int32)

    def add(self, layers: Iterable[tuple[Linear, Tensor]]) -> None:
        """Add them to Y (T, N) float32, a slice of wider rows, of layers whose weights are int8."""
        if not len(self._columns):
            return
        layers = list(layers)
        for first, last in self._batches():
            work = self._list(first, last)
            for layer, y_TN in layers:
                assert layer.scale is not None
                work.weight, work.scale, work.rows = layer.weight.data_ptr(), layer.scale.data_ptr(), len(layer.weight)
                work.y, work.y_stride = y_TN[first:last].data_ptr(), y_TN.stride(0)
                with threads_for(layer.weight.shape[0] * (len(self._columns) + last - first)) as parts:
                    add_outliers(work, parts)

    def _batches(self) -> Iterator[tuple[int, int]]:
        """Ranges of tokens whose outliers the list holds."""
        tokens = len(self._x)
        if int(self._counts.sum()) <= MOST_LISTED:
            yield 0, tokens
            return
        first = listed = 0
        for token, count in enumerate(self._counts.tolist()):
            if listed + count > MOST_LISTED:
                yield first, token
                first, listed = token, 0
            listed += count
        yield first, tokens

    def _list(self, first: int, last: int) -> OutlierWork:
        x_TK, counts_T = self._x[first:last], self._counts[first:last]
        self._offsets = counts_T.cumsum(0) - counts_T  # int64; kept as long as kernels read it
        places, values = self._memory
        work = OutlierWork(
            x=x_TK.data_ptr(), columns=self._columns.data_ptr(), offsets=self._offsets.data_ptr(),
            starts=self._starts.data_ptr(), places=places.data_ptr(), values=values.data_ptr(),
            tokens=last - first, features=x_TK.shape[1], count=len(self._columns), threshold=self._threshold,
        )  # fmt: skip
        with threads_for((last - first) * len(self._columns)) as parts:
            list_outliers(work, parts)
        return work
