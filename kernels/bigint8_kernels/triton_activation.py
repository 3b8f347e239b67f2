# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The activation of the feed-forward part on the GPU, with the product of a gated one, in one launch.

    y[f] = activation(x[f])        gated: y[f] = activation(x[f]) * x[F + f]

gelu_tanh is x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3): that is x (1 + tanh(u)) / 2, without the
difference of numbers that are nearly equal. Traffic of a result: its one or two inputs read once, itself written once.

Dimensions: T rows, F results of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .step import Activation
from .triton_numbers import FUSED

BLOCK = 1024
"""Results of a program: 8 for each of 128 threads."""


@triton.jit
def activation_of(x, KIND: tl.constexpr):
    """The activation of float32 numbers."""
    if KIND == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif KIND == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return y


@triton.jit
def activate_kernel(x, y, columns, x_stride, BLOCK: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr):
    """Part of a row of `y` (T, F), of `x` (T, F), or (T, 2 F) where GATED; `columns` is F."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x += row * x_stride
    value = activation_of(tl.load(x + f, mask=f < columns, other=0.0).to(tl.float32), KIND)
    if GATED:
        value *= tl.load(x + columns + f, mask=f < columns, other=0.0).to(tl.float32)
    tl.store(y + row * columns + f, value.to(y.dtype.element_ty), mask=f < columns)


def activate(x_TN: Tensor, activation: Activation, gated: bool) -> Tensor:
    """`reference_step.activate` in X's dtype (T, F). Rows are contiguous, maybe apart."""
    rows, columns = x_TN.shape[0], x_TN.shape[1] // (2 if gated else 1)
    y_TF = torch.empty(rows, columns, dtype=x_TN.dtype, device=x_TN.device)
    if rows:
        activate_kernel[rows, triton.cdiv(columns, BLOCK)](
            x_TN, y_TF, columns, x_TN.stride(0), BLOCK=BLOCK, KIND=activation, GATED=gated, num_warps=4, **FUSED,
        )  # fmt: skip
    return y_TF
