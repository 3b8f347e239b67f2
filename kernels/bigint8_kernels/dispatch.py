"""Which implementation serves which device. The functions here are all that a caller needs."""

import torch
from torch import Tensor

from .reference import Activations

SOURCE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def quantize_rows(source_RK: Tensor, out_RK: Tensor, scale_R: Tensor) -> bool:
    """Quantize rows of float16, bfloat16 or float32 into `out_RK` int8 and `scale_R` float32, in place.

    `source_RK` (rows, K) needs its last dimension contiguous or its first one (a transposed weight); all three are on
    one device. Returns False if a value is NaN or infinite, in which case the results mean nothing.
    Bit for bit the values of `reference.quantize_rows`. Raises TypeError and ValueError for wrong dtypes and shapes.
    """
    if source_RK.dtype not in SOURCE_DTYPES:
        raise TypeError(f"quantize_rows reads float16, bfloat16 and float32, not {source_RK.dtype}")
    if out_RK.dtype != torch.int8 or scale_R.dtype != torch.float32:
        raise TypeError(f"quantize_rows writes int8 and float32 scales, not {out_RK.dtype} and {scale_R.dtype}")
    if source_RK.shape != out_RK.shape or source_RK.ndim != 2 or scale_R.shape != out_RK.shape[:1]:
        raise ValueError(
            f"quantize_rows: source {tuple(source_RK.shape)}, out {tuple(out_RK.shape)} and "
            f"scale {tuple(scale_R.shape)} do not belong together"
        )
    if source_RK.device != out_RK.device or source_RK.device != scale_R.device:
        raise ValueError(
            f"quantize_rows: source on {source_RK.device}, out on {out_RK.device}, scale on {scale_R.device}"
        )
    if source_RK.device.type == "cpu":
        from . import cpu_weights

        return cpu_weights.quantize_rows(source_RK, out_RK, scale_R)
    from . import generic

    return generic.quantize_rows(source_RK, out_RK, scale_R)


def copy_values(source: Tensor, out: Tensor) -> tuple[bool, bool]:
    """Copy float16, bfloat16 or float32 values into another of these formats, in place, both contiguous on one device.

    Returns whether all values are finite, and whether all still are in their new format. Raises TypeError and
    ValueError for other dtypes and for shapes that differ.
    """
    if source.dtype not in SOURCE_DTYPES or out.dtype not in SOURCE_DTYPES:
        raise TypeError(f"copy_values copies float16, bfloat16 and float32, not {source.dtype} to {out.dtype}")
    if source.shape != out.shape or source.device != out.device:
        raise ValueError(
            f"copy_values: source {tuple(source.shape)} on {source.device} and out {tuple(out.shape)} on {out.device} "
            "do not belong together"
        )
    if source.device.type == "cpu":
        from . import cpu_weights

        return cpu_weights.copy_values(source, out)
    out.copy_(source)
    return bool(torch.isfinite(source).all()), bool(torch.isfinite(out).all())


def int8_linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None = None,
    threshold: float = 6.0,
    activations: Activations = "auto",
) -> Tensor:
    """`Y = X W^T + b` with `W ~ weight * scale[:, None]`: X (T, K) float, weight int8 (N, K), Y (T, N) in X's dtype.

    See `reference.int8_linear` for the definition. Raises TypeError and ValueError for dtypes, shapes and devices
    that do not belong together.
    """
    if x_TK.dtype not in SOURCE_DTYPES:
        raise TypeError(f"int8_linear multiplies float16, bfloat16 and float32 activations, not {x_TK.dtype}")
    if weight_NK.dtype != torch.int8 or scale_N.dtype != torch.float32:
        raise TypeError(f"int8_linear needs int8 weights and float32 scales, not {weight_NK.dtype} and {scale_N.dtype}")
    if x_TK.ndim != 2 or x_TK.shape[1] != weight_NK.shape[1] or scale_N.shape != weight_NK.shape[:1]:
        raise ValueError(
            f"int8_linear: X {tuple(x_TK.shape)}, weight {tuple(weight_NK.shape)} and scale {tuple(scale_N.shape)} "
            "do not belong together"
        )
    if x_TK.device != weight_NK.device or scale_N.device != weight_NK.device:
        raise ValueError(f"int8_linear: X on {x_TK.device}, weight on {weight_NK.device}, scale on {scale_N.device}")
    if x_TK.shape[0] == 0:
        return x_TK.new_empty(0, weight_NK.shape[0])
    if x_TK.device.type == "cpu":
        from . import cpu

        return cpu.int8_linear(x_TK, weight_NK, scale_N, bias_N, threshold, activations)
    from . import generic

    return generic.int8_linear(x_TK, weight_NK, scale_N, bias_N, threshold, activations)
