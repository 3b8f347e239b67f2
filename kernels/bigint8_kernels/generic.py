"""Int8 on any torch device, in plain torch operations: where no kernel runs, and for many rows of 16-bit activations.

The linear layer multiplies in X's own dtype with a slice of the weight's rows at a time in that dtype, so no 16-bit
copy of the whole weight ever exists. An int8 number is exact in each of them, and the scale of W is applied to Y: the
slice takes 2 bytes a weight (4 for float32) and nothing of its size besides. LLM.int8() activations are rounded to
their int8 grid first; with the outlier columns left as they are, one product gives both parts of the decomposition.
"""

import torch
from torch import Tensor

from . import reference
from .reference import Activations, resolve_activations

SLICE_BYTES = 64 * 2**20
"""Size of the slice of the weight in X's dtype that one product reads."""


FLOAT_SLICE_VALUES = 2**20
"""Size of the slice of 16-bit weights that becomes float32: it stays in a CPU's cache."""


def quantize_rows(source_RK: Tensor, out_RK: Tensor, scale_R: Tensor) -> bool:
    """Quantize rows into `out_RK` int8 and `scale_R` float32, in place. False if a value is NaN or infinite."""
    q_RK, s_R = reference.quantize_rows(source_RK)
    out_RK.copy_(q_RK)
    scale_R.copy_(s_R)
    return bool(torch.isfinite(s_R).all())


def round_activations(x_TK: Tensor, threshold: float) -> Tensor:
    """X with every value outside the outlier columns rounded to its row's int8 grid, in X's dtype (T, K)."""
    outliers_K = reference.outlier_columns(x_TK, threshold)
    rounded_TK = torch.empty_like(x_TK)
    step = max(1, SLICE_BYTES // (4 * max(1, x_TK.shape[1])))
    for start in range(0, len(x_TK), step):  # the float32 copies are of a slice only
        x_SK = x_TK[start : start + step]
        q_SK, scale_S = reference.quantize_rows(torch.where(outliers_K, 0.0, x_SK.float()))
        rounded_TK[start : start + step] = torch.where(outliers_K, x_SK, (q_SK * scale_S[:, None]).to(x_TK.dtype))
    return rounded_TK


def float_linear(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """X (T, K) times weights (N, K) of another float format, in X's dtype (T, N), a slice of the weight at a time."""
    n, k = weight_NK.shape
    y_TN = x_TK.new_empty(x_TK.shape[0], n)
    step = max(1, FLOAT_SLICE_VALUES // max(1, k))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        y_TN[:, rows] = x_TK @ weight_NK[rows].to(x_TK.dtype).T
    return y_TN


def int8_linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    threshold: float,
    activations: Activations,
) -> Tensor:
    """`reference.int8_linear` in X's dtype (T, N)."""
    if resolve_activations(activations, x_TK.shape[0]) == "int8":
        x_TK = round_activations(x_TK, threshold)
    else:
        x_TK = reference.round_to_16bit(x_TK)
    x_TK, factor_T1 = _without_overflow(x_TK)
    n, k = weight_NK.shape
    y_TN = x_TK.new_empty(x_TK.shape[0], n)
    step = max(1, SLICE_BYTES // max(1, k * x_TK.element_size()))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        y_TS = x_TK @ weight_NK[rows].to(x_TK.dtype).T
        y_TN[:, rows] = y_TS * (scale_N[rows] * factor_T1)  # in float32, which the factors are in
    if bias_N is not None:
        y_TN += bias_N  # in place, so that Y keeps X's dtype
    return y_TN


def _without_overflow(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """X scaled so that its sums with int8 weights fit its dtype, and float32 factors (T, 1) or (1, 1) that undo it.

    float16 ends at 65504. Each row is divided by a power of two that brings 127 sum |x| below 2**15, which bounds every
    partial sum. This changes exponents only, except for values that end below 2**-14. These lose what is smaller than
    2**-24, which is less than 2**-14 of the row's mean for up to 60,000 features. The other dtypes end at 3e38 and stay
    as they are.
    """
    if x_TK.dtype != torch.float16:
        return x_TK, torch.ones(1, 1, device=x_TK.device)
    _, exponent_T1 = torch.frexp(127 * x_TK.abs().sum(dim=1, keepdim=True, dtype=torch.float32))
    factor_T1 = torch.exp2((exponent_T1 - 15).clamp(0, 24).float())  # float16 has 2**-24, not 2**-25
    return x_TK * factor_T1.reciprocal().half(), factor_T1
