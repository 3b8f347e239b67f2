# mypy: allow-untyped-defs, allow-untyped-decorators
"""Rows of a prompt through int8 layers on the CPU, each token by itself: `reference.int8_linear_by_token`.

A token's outliers are single values of its own row. They are zero among its integers, and are added afterwards in the
order of k (`cpu_outliers`). So no token's result depends on the others, to the last bit.
"""

import itertools

import numpy as np
import torch
from torch import Tensor

from . import cpu_product
from .cpu import has_int8_dot
from .cpu_outliers import Outliers, least_outlier
from .cpu_threads import Work, blocks_of, kernel, threads_for, work_at
from .cpu_weights import row_scale
from .numba_bits import (
    float32_at,
    int8_at,
    int16_at,
    int32_at,
    magnitude,
    magnitude_to_float32,
    round_to_int8,
    to_bits,
)
from .step import Linear


@kernel
def to_int8_by_token(address, part, parts):
    """int8 values and scales of rows, each row's outliers left out; marks their columns, and counts them (`sums`)."""
    work = work_at(address)
    features, blocks = work.features, blocks_of(work.features)
    outliers_K = int8_at(work.outliers, 0)
    for t in range(part * work.tokens // parts, (part + 1) * work.tokens // parts):
        x_K, q_K = float32_at(work.x, t * features), int16_at(work.q, t * features)
        most = least_outlier(x_K, features, work.threshold)
        largest = np.uint32(0)
        for k in range(features):
            m = magnitude(x_K[k]) if abs(x_K[k]) < most else np.uint32(0)
            largest = max(largest, m)
        scale, inverse = row_scale(magnitude_to_float32(largest, x_K[0]))
        x_scale_B = float32_at(work.x_scale, t * blocks)
        for b in range(blocks):
            x_scale_B[b] = scale
        count = 0
        for k in range(features):
            if abs(x_K[k]) >= most:
                outliers_K[k] = 1
                count += 1
        int32_at(work.sums, t)[0] = count
        if work.narrow:
            narrow_K = int8_at(work.q, t * features)
            for k in range(features):
                narrow_K[k] = round_to_int8(x_K[k] * inverse if abs(x_K[k]) < most else np.float32(0.0))
        else:
            for k in range(features):
                q_K[k] = round_to_int8(x_K[k] * inverse if abs(x_K[k]) < most else np.float32(0.0))


@kernel
def rescale_in_place(address, part, parts):
    """`cpu.rescale` of sums that lie where Y goes, each in the place of its result. Compilers see one array only."""
    work = work_at(address)
    scale_N, bias_N = float32_at(work.scale, 0), float32_at(work.bias, 0)
    for t in range(part * work.tokens // parts, (part + 1) * work.tokens // parts):
        x_scale, y_N = float32_at(work.x_scale, t)[0], float32_at(work.y, t * work.y_stride)
        for n in range(work.rows):
            y = np.float32(to_bits(y_N[n])) * (x_scale * scale_N[n])
            y_N[n] = y + bias_N[n] if work.bias else y


class Prompt:
    """Several layers of the same X, for the rows of prompts: what a `CpuStep` runs between native calls.

    Its memory is the step's: what is allocated anew for each layer leaves holes between what stays.
    """

    def __init__(self, x_TK: Tensor, q_TK: Tensor, x_scale_TB: Tensor, listed: Tensor) -> None:
        """q_TK int16, x_scale_TB float32: of as many rows as X; memory for the integers of X and their scales.
        listed int32 (2, MOST_LISTED): memory for a list of outliers.
        """
        self._x, self._q, self._x_scale, self._listed = x_TK, q_TK, x_scale_TB, listed
        self._layers = list[tuple[Linear, Tensor]]()

    def __len__(self) -> int:
        return len(self._layers)

    def add(self, layer: Linear, y_TN: Tensor) -> None:
        """A layer whose bias is float32, and where its outputs go: a slice of wider rows."""
        self._layers.append((layer, y_TN))

    def __call__(self, first: int, last: int) -> None:
        """Compute the rows from first to last."""
        x_TK, memory_TK, x_scale_TB = self._x[first:last], self._q[first:last], self._x_scale[first:last]
        for threshold, alike in itertools.groupby(self._layers, key=lambda layer: layer[0].threshold):
            layers = [(layer, y_TN[first:last]) for layer, y_TN in alike]
            q_TK, marked_K, counts_T = quantize_by_token(x_TK, threshold, memory_TK, x_scale_TB)
            for layer, y_TN in layers:
                _multiply(q_TK, x_scale_TB, layer, y_TN)
            Outliers(x_TK, threshold, marked_K, counts_T, self._listed).add(layers)


def quantize_by_token(
    x_TK: Tensor, threshold: float, memory_TK: Tensor, x_scale_TB: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """X (T, K) as integers in memory of int16 (T, K): int8 with VNNI, else int16; which columns have outliers, bool
    (K,); and how many each token has, int32 (T,).

    Writes the scales (T, B), all of a row alike.
    """
    tokens, features = x_TK.shape
    narrow = has_int8_dot() and features > 1  # torch mistakes a single column for a row and multiplies wrongly
    q_TK = memory_TK.view(-1).view(torch.int8)[: x_TK.numel()].view(tokens, features) if narrow else memory_TK
    outliers_K, counts_T = torch.zeros(features, dtype=torch.bool), torch.empty(tokens, dtype=torch.int32)
    work = Work(
        x=x_TK.data_ptr(), q=q_TK.data_ptr(), x_scale=x_scale_TB.data_ptr(), outliers=outliers_K.data_ptr(),
        sums=counts_T.data_ptr(), tokens=tokens, features=features, narrow=int(narrow), threshold=threshold,
    )  # fmt: skip
    with threads_for(x_TK.numel()) as parts:
        to_int8_by_token(work, parts)
    return q_TK, outliers_K, counts_T


def _multiply(q_TK: Tensor, x_scale_TB: Tensor, layer: Linear, y_TN: Tensor) -> None:
    """Y, a slice of wider rows, from the integers of X."""
    assert layer.scale is not None
    (tokens, features), rows = q_TK.shape, layer.weight.shape[0]
    work = Work(
        q=q_TK.data_ptr(), weight=layer.weight.data_ptr(), scale=layer.scale.data_ptr(),
        bias=0 if layer.bias is None else layer.bias.data_ptr(), y=y_TN.data_ptr(), y_stride=y_TN.stride(0),
        tokens=tokens, features=features, rows=rows,
    )  # fmt: skip
    if q_TK.dtype == torch.int8:
        x_scale_T = x_scale_TB[:, 0].contiguous()
        work.x_scale = x_scale_T.data_ptr()
        if y_TN.is_contiguous():
            torch._int_mm(q_TK, layer.weight.T, out=y_TN.view(torch.int32))
        else:
            y_TN.view(torch.int32).copy_(torch._int_mm(q_TK, layer.weight.T))
        with threads_for(y_TN.numel()) as parts:
            rescale_in_place(work, parts)
    else:
        work.x_scale = x_scale_TB.data_ptr()
        with threads_for(rows * features * tokens) as parts:
            cpu_product.multiply(work, parts)
