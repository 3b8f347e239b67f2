"""The int8 linear layer on GPUs of compute capability 8.0 and newer: which kernel and tile for how many rows."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from . import generic
from .gpu_tiles import (
    FEW_ROW_TILES,
    Architecture,
    GemvTile,
    MatmulTile,
    architecture_of,
    gemv_tile,
    matmul_tiles,
    row_bucket,
    split_of,
)
from .reference import Activations, resolve_activations, round_to_16bit
from .triton_activations import quantize_activations
from .triton_gemv import int8_gemv
from .triton_matmul import int8_matmul

MOST_GEMV_ROWS = 64
"""More rows of 16-bit X than this are multiplied by torch with slices of W in 16-bit: that moves 5 bytes a weight (1
read, 2 written, 2 read), `int8_gemv` 1 for each 16 rows."""


ALIGNMENT = 16
"""If an address (in bytes) or a stride (in values) is no multiple of this, Triton compiles a slower kernel without wide
loads. X is small, so it is copied to an aligned place instead. If the width K itself is no multiple, a copy would not
help, and the slower kernel runs."""


@dataclass(frozen=True)
class Gpu:
    """What the choice of a tile needs to know: the architecture and the number of SMs."""

    architecture: Architecture
    processors: int


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU of a CUDA device. Raises ValueError for one older than 8.0.

    The CPU, where Triton's interpreter runs kernels, is as good as any GPU: an RTX 3090.
    """
    if device.type == "cpu":
        return Gpu(architecture_of(8, 6), 82)
    properties = torch.cuda.get_device_properties(device)
    return Gpu(architecture_of(properties.major, properties.minor), properties.multi_processor_count)


def int8_linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    threshold: float,
    activations: Activations,
    gpu: Gpu,
) -> Tensor:
    """`reference.int8_linear` of X (T, K), in X's dtype (T, N)."""
    strays = x_TK.stride(0) % ALIGNMENT and not x_TK.shape[1] % ALIGNMENT
    if x_TK.stride(1) != 1 or strays or x_TK.data_ptr() % ALIGNMENT:
        x_TK = x_TK.clone(memory_format=torch.contiguous_format)
    weight_NK, scale_N = weight_NK.contiguous(), scale_N.contiguous()
    bias_N = None if bias_N is None else bias_N.contiguous()
    is_float32 = x_TK.dtype == torch.float32
    rows, features = x_TK.shape
    outputs = weight_NK.shape[0]
    if resolve_activations(activations, rows) == "16bit":
        if rows > MOST_GEMV_ROWS:
            return generic.int8_linear(x_TK, weight_NK, scale_N, bias_N, threshold, "16bit")
        vector = gemv_tile(rows, is_float32)
        vector = replace(vector, split=_split(vector, rows, outputs, features, gpu))
        return int8_gemv(round_to_16bit(x_TK), weight_NK, scale_N, bias_N, vector)
    tiles = matmul_tiles_of(x_TK, outputs, gpu)
    q_TK, x_scale_T, outliers_C, count = quantize_activations(x_TK, threshold)
    return int8_matmul(q_TK, x_scale_T, x_TK, outliers_C, count, weight_NK, scale_N, bias_N, tiles)


def matmul_tiles_of(x_TK: Tensor, outputs: int, gpu: Gpu) -> tuple[MatmulTile, ...]:
    """The tiles that `int8_matmul` of X (T, K) and so many outputs chooses from: several are timed, one may split K."""
    is_float32, (rows, features) = x_TK.dtype == torch.float32, x_TK.shape
    tiles = matmul_tiles(gpu.architecture, rows, is_float32, features)
    if triton.knobs.runtime.interpret:  # there is nothing to time
        tiles = tiles[:1]
    if is_float32 or rows <= max(FEW_ROW_TILES):
        tiles = (replace(tiles[0], split=_split(tiles[0], rows, outputs, features, gpu)),)
    return tiles


def _split(tile: MatmulTile | GemvTile, rows: int, outputs: int, features: int, gpu: Gpu) -> int:
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs)
    return split_of(programs, tile.warps, gpu.processors, features // tile.depth)


def prepare(
    weights_NK: Iterable[Tensor], dtype: torch.dtype, most_rows: int, activations: Activations, gpu: Gpu
) -> None:
    """Launch what `int8_linear` does for up to `most_rows` rows of X in `dtype`, with one of the weights of each shape.

    That compiles these kernels, and tunes those that have several tiles. The weights are on one device.
    """
    buckets = (1, 2, *(2**i for i in range(5, row_bucket(most_rows).bit_length())), most_rows)
    for weight_NK in {weight_NK.shape: weight_NK for weight_NK in weights_NK}.values():
        outputs, features = weight_NK.shape
        scale_N = torch.ones(outputs, dtype=torch.float32, device=weight_NK.device)
        for rows in dict.fromkeys(min(rows, most_rows) for rows in buckets):
            x_TK = torch.zeros(rows, features, dtype=dtype, device=weight_NK.device)
            int8_linear(x_TK, weight_NK, scale_N, None, 6.0, activations, gpu)
