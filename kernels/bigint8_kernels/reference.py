"""The definition of int8 quantization and of the int8 linear layer, in plain torch.

Every fast path in this package is tested against this module; nothing here is meant to be fast.

Dimensions: T tokens (rows of X), K input features, N output features. A name ends in its shape:
`x_TK`, `weight_NK`, `scale_N`.

Sources: Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", section 3
(vector-wise quantization and mixed-precision decomposition).
"""

from typing import Literal

import torch
from torch import Tensor

Activations = Literal["auto", "int8", "16bit"]

FEW_ROWS = 16
"""With at most this many rows, `activations="auto"` leaves X in 16 bits: the weights' bytes are the whole cost there,
so int8 activations would save nothing."""

BLOCK = 512
"""Values of a row of float32 X that share a scale where X is rounded to 16 bits."""

LARGEST_INT16 = 32767

SMALLEST_ABSMAX = 2.0**-120
"""A row whose absmax is smaller counts as zeros: 127 / absmax would overflow float32."""

SMALLEST_BLOCK_ABSMAX = 2.0**-112
"""The same of a block that is rounded to int16, for 32767 / absmax."""


def quantize_rows(w_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Vector-wise absmax quantization of each row of `w_RK` (rows, K), any float dtype.

    `scale = absmax(row) / 127` and `q = round(w * (127 * (1 / absmax)))`, ties to even, each step in float32.
    Returns int8 (rows, K) and float32 scales (rows,). A row of zeros gets scale 0 and values 0.
    Values must be finite.
    """
    w_RK = w_RK.float()
    absmax_R = w_RK.abs().amax(dim=1) if w_RK.shape[1] else w_RK.new_zeros(w_RK.shape[0])
    absmax_R = torch.where(absmax_R < SMALLEST_ABSMAX, 0.0, absmax_R)
    inverse_R = torch.where(absmax_R > 0, 127.0 * absmax_R.reciprocal(), 0.0)
    q_RK = torch.round(w_RK * inverse_R[:, None]).to(torch.int8)
    return q_RK, absmax_R / 127.0


def outlier_columns(x_TK: Tensor, threshold: float) -> Tensor:
    """Boolean (K,): the columns of X with any |x| >= threshold. A threshold of 0 means no outliers."""
    if threshold <= 0:
        return torch.zeros(x_TK.shape[1], dtype=torch.bool, device=x_TK.device)
    return x_TK.abs().amax(dim=0).float() >= threshold


def quantize_activations(x_TK: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """LLM.int8() activations: int8 (T, K) with outlier columns zero, float32 scales (T,), outlier mask (K,).

    One scale per token, its absmax taken over the columns that are not outliers.
    """
    outliers_K = outlier_columns(x_TK, threshold)
    q_TK, scale_T = quantize_rows(torch.where(outliers_K, 0.0, x_TK.float()))
    return q_TK, scale_T, outliers_K


def round_to_16bit(x_TK: Tensor) -> Tensor:
    """Float32 X rounded to 16 bits: in each block of a row, to int16 multiples of absmax / 32767; float32 (T, K).

    A value gets a sign and 15 bits, relative to the largest of the block's 512 values. For all but the smallest values
    that is more than float16 and bfloat16 have. X in one of these formats is returned as it is.
    """
    if x_TK.dtype != torch.float32 or not x_TK.numel():
        return x_TK
    return torch.cat([_round_block(block) for block in x_TK.split(BLOCK, dim=1)], dim=1)


def _round_block(x_TB: Tensor) -> Tensor:
    absmax_T = x_TB.abs().amax(dim=1, keepdim=True)
    inverse_T = torch.where(absmax_T < SMALLEST_BLOCK_ABSMAX, 0.0, LARGEST_INT16 / absmax_T)
    return torch.round(x_TB * inverse_T) * (absmax_T / LARGEST_INT16)


def resolve_activations(activations: Activations, rows: int) -> Literal["int8", "16bit"]:
    """What `"auto"` means for this many rows of X."""
    if activations == "auto":
        return "16bit" if rows <= FEW_ROWS else "int8"
    return activations


def int8_linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None = None,
    threshold: float = 6.0,
    activations: Activations = "auto",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`Y = X W^T + b` with `W ~ weight * scale[:, None]`; returns (T, N) in `out_dtype`, X's dtype by default.

    `activations="int8"` is LLM.int8(): the columns of X with an outlier are multiplied as they are, the rest in int8
    with integer accumulation, rescaled by the outer product of the scales of tokens and of rows of W, and the two
    parts are added. `"16bit"` multiplies X as it is in 16 bits (`round_to_16bit`), which needs no decomposition.
    Everything after the quantization is float64.
    """
    w_NK = weight_NK.double()
    if resolve_activations(activations, x_TK.shape[0]) == "16bit":
        y_TN = round_to_16bit(x_TK).double() @ w_NK.T * scale_N.double()
    else:
        q_TK, x_scale_T, outliers_K = quantize_activations(x_TK, threshold)
        y_TN = (q_TK.double() @ w_NK.T) * x_scale_T.double()[:, None] * scale_N.double()
        y_TN += x_TK.double()[:, outliers_K] @ w_NK[:, outliers_K].T * scale_N.double()
    if bias_N is not None:
        y_TN += bias_N.double()
    return y_TN.to(out_dtype or x_TK.dtype)


def int8_linear_by_token(
    x_TK: Tensor,
    weight_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None = None,
    threshold: float = 6.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LLM.int8() decided for each token by itself: its outliers are single values of its own row, not whole columns.

    So a token's result does not depend on which others run with it. Each value of X with |x| >= threshold * RMS of its
    row is multiplied as it is, the rest of the row in int8 with a scale of its own. Without other tokens to show which
    columns are large, an absolute threshold would leave values just below it in int8; relative to the row it does not.
    Returns (T, N) as `int8_linear`.
    """
    w_NK = weight_NK.double()
    outliers_TK = torch.zeros_like(x_TK, dtype=torch.bool)
    if threshold > 0:
        least_T1 = threshold * x_TK.float().square().mean(1, keepdim=True).sqrt()
        outliers_TK = (x_TK.abs().float() >= least_T1) & (least_T1 > 0)
    q_TK, x_scale_T = quantize_rows(torch.where(outliers_TK, 0.0, x_TK.float()))
    y_TN = (q_TK.double() @ w_NK.T) * x_scale_T.double()[:, None] * scale_N.double()
    y_TN += torch.where(outliers_TK, x_TK.double(), 0.0) @ w_NK.T * scale_N.double()
    if bias_N is not None:
        y_TN += bias_N.double()
    return y_TN.to(out_dtype or x_TK.dtype)
