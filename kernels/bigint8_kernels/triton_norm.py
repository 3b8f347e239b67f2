# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The residual stream and its norm on the GPU, in one launch: `x += delta`, then RMS norm or layer norm of x.

    RMS norm:    y[h] = x[h] / sqrt(mean(x^2) + epsilon) * weight[h] + bias[h]
    layer norm:  the same of x - mean(x)

A program takes one row. A row of up to LARGEST values stays in registers between the steps; a wider one is read again
for each. Traffic of a value: x and delta read once, x and y written once.

Dimensions: T rows, H values of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_numbers import FUSED

LARGEST = 16384
"""Values of a row that a program holds: 16 for each of 1024 threads."""


@triton.jit
def _added(x, delta, h, inside, HAS_DELTA: tl.constexpr):
    """x + delta as the format of x holds it, in float32."""
    value = tl.load(x + h, mask=inside, other=0.0)
    if HAS_DELTA:
        more = tl.load(delta + h, mask=inside, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(value.dtype)
    return value.to(tl.float32)


@triton.jit
def _weighed(value, weight, bias, h, inside, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    if HAS_WEIGHT:
        value *= tl.load(weight + h, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + h, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["epsilon"])
def add_norm_kernel(
    x, delta, weight, bias, y, columns, x_stride, delta_stride, epsilon,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    CENTERED: tl.constexpr,
):  # fmt: skip
    """`x` (T, H) += `delta`, where there is one; `y` (T, H) the norm of the sum. WIDE: H is more than BLOCK.

    A wide row is written in the last of its three passes only: no pass reads what another thread has written.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    delta += row * delta_stride
    y += row * columns
    h = tl.arange(0, BLOCK)
    dtype: tl.constexpr = x.dtype.element_ty
    if not WIDE:
        inside = h < columns
        value = _added(x, delta, h, inside, HAS_DELTA)
        if HAS_DELTA:
            tl.store(x + h, value.to(dtype), mask=inside)
        if CENTERED:
            value = tl.where(inside, value - tl.sum(value) / columns, 0.0)
        value *= tl.rsqrt(tl.sum(value * value) / columns + epsilon)
        value = _weighed(value, weight, bias, h, inside, HAS_WEIGHT, HAS_BIAS)
        tl.store(y + h, value.to(y.dtype.element_ty), mask=inside)
    else:
        mean, squares = 0.0, 0.0
        if CENTERED:
            for start in range(0, columns, BLOCK):
                mean += tl.sum(_added(x, delta, start + h, start + h < columns, HAS_DELTA))
            mean /= columns
        for start in range(0, columns, BLOCK):
            inside = start + h < columns
            value = tl.where(inside, _added(x, delta, start + h, inside, HAS_DELTA) - mean, 0.0)
            squares += tl.sum(value * value)
        factor = tl.rsqrt(squares / columns + epsilon)
        for start in range(0, columns, BLOCK):
            at = start + h
            value = _added(x, delta, at, at < columns, HAS_DELTA)
            if HAS_DELTA:
                tl.store(x + at, value.to(dtype), mask=at < columns)
            value = _weighed((value - mean) * factor, weight, bias, at, at < columns, HAS_WEIGHT, HAS_BIAS)
            tl.store(y + at, value.to(y.dtype.element_ty), mask=at < columns)


def norm_block(columns: int) -> tuple[int, int, bool]:
    """The block for rows of this width, its number of warps, and whether a row has more values than that."""
    block = min(LARGEST, max(512, triton.next_power_of_2(columns)))
    return block, min(32, block // 512), columns > block


def add_norm(
    x_TH: Tensor, delta_TH: Tensor | None, weight: Tensor | None, bias: Tensor | None, epsilon: float, centered: bool
) -> Tensor:
    """`reference_step.norm` of x + delta, in x's dtype; x becomes that sum. Rows are contiguous, maybe apart."""
    rows, columns = x_TH.shape
    y_TH = torch.empty(rows, columns, dtype=x_TH.dtype, device=x_TH.device)
    if rows:
        block, warps, wide = norm_block(columns)
        delta = x_TH if delta_TH is None else delta_TH
        add_norm_kernel[(rows,)](
            x_TH, delta, x_TH if weight is None else weight, x_TH if bias is None else bias, y_TH, columns,
            x_TH.stride(0), delta.stride(0), epsilon, BLOCK=block, WIDE=wide, HAS_DELTA=delta_TH is not None,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, CENTERED=centered, num_warps=warps, **FUSED,
        )  # fmt: skip
    return y_TH
