"""Which implementation serves which device. The functions here are all that a caller needs.

| device | rows of X | activations | kernel |
| --- | --- | --- | --- |
| CPU | any | 16-bit | `cpu.linear_16bit`, from one row to many |
| CPU | up to FEW_ROWS; without VNNI, any | int8 | `cpu.linear_int8` |
| CPU with VNNI | more than FEW_ROWS | int8 | `cpu.linear_vnni` |
| GPU 8.0 and newer | up to `gpu.MOST_GEMV_ROWS` | 16-bit | `triton_gemv`; one row by itself, more on tensor cores |
| GPU 8.0 and newer | any | int8 | `triton_activations`, then `triton_matmul` with the tiles of `gpu_tiles` |
| any other, and what is left | any | any | `generic` |
"""

import functools
import importlib.util
import os
import shutil
import sysconfig
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .gpu_tiles import OLDEST
from .reference import Activations
from .reference_step import ReferenceOperations
from .step import Batch, Operations

if TYPE_CHECKING:
    from .cpu_step import CpuStep

SOURCE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Triton prepares and tunes a kernel when it is first launched, which two threads must not do at once.
_launching = threading.Lock()


@functools.cache
def backend_of(device: torch.device) -> Literal["cpu", "triton", "torch"]:
    """What serves a device. Says once for a GPU that Triton's kernels do not run on why they do not."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda" or torch.version.hip is not None:
        return "torch"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < OLDEST:
        reason = f"it has compute capability {major}.{minor}, and int8 dot products in Triton need {OLDEST / 10:.1f}"
    elif importlib.util.find_spec("triton") is None:
        reason = "triton is not installed (pip install triton)"
    elif missing := missing_to_launch():
        reason = f"Triton compiles what starts its kernels, and there is no {missing}"
    else:
        return "triton"
    name = torch.cuda.get_device_name(device)
    warnings.warn(f"{device} ({name}) runs int8 layers in plain torch, which is slower: {reason}", stacklevel=2)
    return "torch"


def compile_cpu_kernels(dtypes: Iterable[torch.dtype], pools: Iterable[torch.dtype] | None = None) -> float:
    """Compile the CPU's kernels, or load them from numba's cache, before they are needed: seconds it took.

    `dtypes` are those in which weights are stored, `pools` those of keys and values, by default the same. See
    `cpu_ahead`, which takes as long to import as numba does.
    """
    from . import cpu_ahead

    return cpu_ahead.compile_cpu_kernels(dtypes, pools)


def recorder(device: torch.device, most_rows: int) -> "CpuStep | None":
    """What records the operations of a step on a device for up to `most_rows` rows, and runs them; None for none."""
    if device.type != "cpu":
        return None
    from .cpu_step import CpuStep

    return CpuStep(most_rows)


def operations(batch: Batch) -> Operations:
    """The operations of a step that compute at once, on the device of the batch: Triton's, or the reference."""
    if backend_of(batch.places_T.device) == "triton":
        from .ops import GpuOperations

        return GpuOperations(batch)
    return ReferenceOperations(batch)


def missing_to_launch() -> str | None:
    """What Triton lacks to build its launcher in C at the first launch, and how to get it; None if it lacks nothing."""
    from triton import knobs

    if knobs.build.impl is not None:
        return None
    named = os.environ.get("CC")
    if named is not None and shutil.which(named) is None:
        return f"C compiler {named}, which CC names (install it, or unset CC and install gcc or clang)"
    if named is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "C compiler (install gcc or clang, or name one in CC)"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does
    header = Path(sysconfig.get_paths(scheme=scheme)["include"], "Python.h")
    return None if header.exists() else f"{header} (install Python's headers: python3-dev or python3-devel)"


def prepare_layers(
    weights_NK: Iterable[Tensor], dtype: torch.dtype, most_rows: int, activations: Activations = "auto"
) -> None:
    """Compile and tune now what `int8_linear` would at the first token and the first prompts with these int8 weights.

    `dtype` is that of X, `most_rows` the most tokens that a prompt brings at once. Call it when the weights are loaded:
    it multiplies with them. Besides, it takes memory for X and Y and, to tune, 256 MiB for a moment. It takes long when
    nothing was compiled before. Does nothing for devices that Triton does not serve. Raises TypeError for a dtype that
    `int8_linear` does not take.
    """
    if dtype not in SOURCE_DTYPES:
        raise TypeError(f"prepare_layers prepares for float16, bfloat16 and float32 activations, not {dtype}")
    by_device: dict[torch.device, list[Tensor]] = {}
    for weight_NK in weights_NK:
        by_device.setdefault(weight_NK.device, []).append(weight_NK)
    for device, there in by_device.items():
        if backend_of(device) == "triton":
            from . import gpu

            with torch.cuda.device(device), _launching:
                gpu.prepare(there, dtype, most_rows, activations, gpu.gpu_of(device))
                torch.cuda.empty_cache()


def quantize_rows(source_RK: Tensor, out_RK: Tensor, scale_R: Tensor) -> bool:
    """Quantize rows of float16, bfloat16 or float32 into `out_RK` int8 and `scale_R` float32, in place.

    `source_RK` (rows, K) needs its last dimension contiguous or its first one (a transposed weight); all three are on
    one device. Returns False if a value is NaN or infinite, in which case the results mean nothing.
    Bit for bit the values of `reference.quantize_rows`. Raises TypeError and ValueError for wrong dtypes and shapes.
    """
    _check_rows(source_RK, out_RK, scale_R)
    backend = backend_of(source_RK.device)
    if backend == "cpu":
        from . import cpu_weights

        return cpu_weights.quantize_rows(source_RK, out_RK, scale_R)
    if backend == "triton":
        from . import triton_weights

        with torch.cuda.device(source_RK.device), _launching:
            return triton_weights.quantize_rows(source_RK, out_RK, scale_R)
    from . import generic

    return generic.quantize_rows(source_RK, out_RK, scale_R)


def _check_rows(source_RK: Tensor, out_RK: Tensor, scale_R: Tensor) -> None:
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


def quantize_rows_counting(source_RK: Tensor, out_RK: Tensor, scale_R: Tensor, bad: Tensor) -> None:
    """`quantize_rows` that makes `bad` int32 (1,) larger if a value is NaN or infinite.

    Triton's kernel adds the number of such values, any other adds 1. `bad` is on the same device, so that nothing has
    to wait for a GPU. Takes and raises what `quantize_rows` does.
    """
    if backend_of(source_RK.device) == "triton":
        from . import triton_weights

        _check_rows(source_RK, out_RK, scale_R)
        with torch.cuda.device(source_RK.device), _launching:
            triton_weights.quantize_rows_into(source_RK, out_RK, scale_R, bad)
    else:
        bad += not quantize_rows(source_RK, out_RK, scale_R)


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


def float_linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`Y = X W^T + b` in float32, with weights (N, K) that stay float16 or bfloat16: X (..., K) of any float dtype.

    Returns Y (..., N) in X's dtype: what X gives with the same weights in float32. Raises TypeError and ValueError for
    dtypes, shapes and devices that do not belong together.
    """
    if x.dtype not in SOURCE_DTYPES or weight_NK.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"float_linear multiplies floats with 16-bit weights, not {x.dtype} with {weight_NK.dtype}")
    if not x.ndim or weight_NK.ndim != 2 or weight_NK.size(1) != x.size(-1) or x.device != weight_NK.device:
        raise ValueError(
            f"float_linear: X {tuple(x.shape)} on {x.device} and weight {tuple(weight_NK.shape)} on "
            f"{weight_NK.device} do not belong together"
        )
    x_TK = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1]).float().contiguous()
    if x.device.type == "cpu":
        from . import cpu_float

        y_TN = cpu_float.float_linear(x_TK, weight_NK.contiguous())
    else:
        from . import generic

        y_TN = generic.float_linear(x_TK, weight_NK)
    if bias_N is not None:
        y_TN += bias_N
    return y_TN.to(x.dtype).view(*x.shape[:-1], weight_NK.shape[0])


def int8_linear(
    x: Tensor,
    weight_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None = None,
    threshold: float = 6.0,
    activations: Activations = "auto",
) -> Tensor:
    """`Y = X W^T + b` with `W ~ weight * scale[:, None]`: X (..., K) float, weight int8 (N, K).

    Returns Y (..., N) in X's dtype. See `reference.int8_linear` for the definition. Raises TypeError and ValueError
    for dtypes, shapes and devices that do not belong together.
    """
    device = weight_NK.device
    if x.dtype not in SOURCE_DTYPES or weight_NK.dtype != torch.int8 or scale_N.dtype != torch.float32:
        raise TypeError(
            f"int8_linear multiplies float16, bfloat16 or float32 activations with int8 weights and float32 scales, "
            f"not {x.dtype} with {weight_NK.dtype} and {scale_N.dtype}"
        )
    if not x.ndim or weight_NK.ndim != 2 or weight_NK.size(1) != x.size(-1) or scale_N.shape != weight_NK.shape[:1]:
        raise ValueError(
            f"int8_linear: X {tuple(x.shape)}, weight {tuple(weight_NK.shape)} and scale {tuple(scale_N.shape)} "
            "do not belong together"
        )
    if bias_N is not None and (bias_N.shape != scale_N.shape or bias_N.device != device):
        raise ValueError(f"int8_linear: bias {tuple(bias_N.shape)} on {bias_N.device} for {len(scale_N)} on {device}")
    if x.device != device or scale_N.device != device:
        raise ValueError(f"int8_linear: X on {x.device}, weight on {device}, scale on {scale_N.device}")
    if not x.numel() or not scale_N.numel():
        y = x.new_zeros(*x.shape[:-1], len(scale_N))
        return y if bias_N is None else y + bias_N.to(x.dtype)
    backend = backend_of(device)
    if backend == "cpu":
        from . import cpu

        return cpu.int8_linear(x, weight_NK, scale_N, bias_N, threshold, activations)
    x_TK = x.detach().reshape(-1, x.shape[-1])
    if backend == "triton":
        from . import gpu

        with torch.cuda.device(device), _launching:
            y_TN = gpu.int8_linear(x_TK, weight_NK, scale_N, bias_N, threshold, activations, gpu.gpu_of(device))
    else:
        from . import generic

        y_TN = generic.int8_linear(x_TK, weight_NK, scale_N, bias_N, threshold, activations)
    return y_TN.view(*x.shape[:-1], len(scale_N))
