"""The operations of a step on GPUs of compute capability 8.0 and newer: which kernels serve which rows.

What a step launches, besides products with weights that stayed float, which torch does:

| operation | generated tokens | rows of prompts |
| --- | --- | --- |
| norm, with the sum before it | 1 | 1 |
| linear, up to three layers | 1 | 2 to quantize X; 1 to 3 a layer |
| attention | 1 | 1 to write keys and values, 1 to attend |
| activation, with the product after it | 1 | 1 |

A block of Llama is two norms, four linear layers, attention and an activation: 8 launches for generated tokens. A step
of both kinds of rows launches what each needs.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import generic
from .gpu import ALIGNMENT, MOST_GEMV_ROWS, Gpu, matmul_tiles_of
from .gpu_tiles import whole_gemv_tile
from .reference import round_to_16bit
from .step import Attention, Batch, Linear
from .triton_activations import quantize_by_token
from .triton_attention import MOST_COUNTERS, attend_rows, attend_tokens
from .triton_gemv import MOST_LAYERS, int8_gemv_side_by_side
from .triton_heads import rotate_write
from .triton_matmul import int8_matmul

_tile = functools.cache(whole_gemv_tile)


def int8_linears(x_TK: Tensor, layers: Sequence[Linear], few: int, gpu: Gpu) -> Tensor:
    """`reference_step.linear` of int8 layers, side by side, in X's dtype (T, sum of N)."""
    if x_TK.stride(1) != 1 or x_TK.data_ptr() % ALIGNMENT:
        x_TK = x_TK.clone(memory_format=torch.contiguous_format)
    rows = x_TK.shape[0]
    y_TN = torch.empty(rows, sum(len(layer.weight) for layer in layers), dtype=x_TK.dtype, device=x_TK.device)
    start, at = 0, 0
    while start < len(layers):  # neighbours that keep the same rows in 16 bits run together
        kept = kept_rows(layers[start], few, rows)
        end = start + 1
        while end < len(layers) and kept_rows(layers[end], few, rows) == kept:
            end += 1
        together = layers[start:end]
        y_TM = y_TN[:, at : at + sum(len(layer.weight) for layer in together)]
        if kept:
            _linear_16bit(x_TK[:kept], together, y_TM[:kept], gpu)
        if kept < rows:
            _linear_int8(x_TK[kept:], together, y_TM[kept:], gpu)
        start, at = end, at + y_TM.shape[1]
    return y_TN


def kept_rows(layer: Linear, few: int, rows: int) -> int:
    """How many rows, the first ones, keep 16-bit activations."""
    return {"auto": few, "16bit": rows, "int8": 0}[layer.activations]


def _columns(layers: Sequence[Linear], y_TN: Tensor) -> list[tuple[Linear, Tensor]]:
    """Each layer and its outputs, a view of `y_TN`."""
    views = y_TN.split([len(layer.weight) for layer in layers], dim=1)
    return list(zip(layers, views, strict=True))


def _linear_16bit(x_TK: Tensor, layers: Sequence[Linear], y_TN: Tensor, gpu: Gpu) -> None:
    rows, features = x_TK.shape
    if rows > MOST_GEMV_ROWS:
        for layer, y in _columns(layers, y_TN):
            assert layer.scale is not None
            y.copy_(generic.int8_linear(x_TK, layer.weight, layer.scale, layer.bias, layer.threshold, "16bit"))
        return
    x_TK, columns = round_to_16bit(x_TK), _columns(layers, y_TN)
    together = 1 if rows > 1 and x_TK.dtype == torch.float32 else MOST_LAYERS  # its kernel has no register to spare
    for start in range(0, len(columns), together):
        some = columns[start : start + together]
        outputs = sum(len(layer.weight) for layer, _ in some)
        tile = _tile(rows, outputs, features, x_TK.dtype == torch.float32, gpu.processors)
        int8_gemv_side_by_side(
            x_TK, [(layer.weight, scale_of(layer), layer.bias) for layer, _ in some], tile, some[0][1]
        )


def _linear_int8(x_TK: Tensor, layers: Sequence[Linear], y_TN: Tensor, gpu: Gpu) -> None:
    """Outliers are single values of a token. X is quantized once for all layers of one threshold."""
    quantized: dict[float, tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None]] = {}
    for layer, y in _columns(layers, y_TN):
        threshold = float(layer.threshold)
        if threshold not in quantized:
            quantized[threshold] = quantize_by_token(x_TK, threshold)
        (q_TK, x_scale_T, outliers_C, count), least_T = quantized[threshold]
        tiles = matmul_tiles_of(x_TK, len(layer.weight), gpu)
        int8_matmul(
            q_TK, x_scale_T, x_TK, outliers_C, count, layer.weight, scale_of(layer), layer.bias, tiles, least_T, y
        )


def scale_of(layer: Linear) -> Tensor:
    """The scales of an int8 layer."""
    assert layer.scale is not None
    return layer.scale


# One for each stream: what runs on one stream runs one after the other, and leaves zeros.
_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters_of(device: torch.device) -> Tensor:
    """int32 zeros for the kernel that attends in parts, on the current stream of the device."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (device, stream) not in _counters:
        _counters[device, stream] = torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)
    return _counters[device, stream]


def attend(qkv_TN: Tensor, attention: Attention, pool: Tensor, batch: Batch, tiles: Tensor | None, gpu: Gpu) -> Tensor:
    """`reference_step` of the attention of a step: writes keys and values to the pool; (T, heads * D) in X's dtype.

    `tiles` are those of the rows of prompts (`triton_attention.row_tiles`), None without such rows. A step of
    as many sequences as rows, all of generated tokens, has one row of each: one launch does it all.
    """
    rows, few = batch.rows, batch.few
    out_TN = torch.empty(rows, attention.heads * attention.head_dim, dtype=qkv_TN.dtype, device=qkv_TN.device)
    if not rows:
        return out_TN
    table = batch.tables[attention.group]
    where = batch.places_T, batch.sequences_T, table
    counters = counters_of(qkv_TN.device)
    if few == rows == table.shape[0]:
        angles = (batch.cos_TR, batch.sin_TR)
        attend_tokens(qkv_TN, attention, pool, *where, *angles, counters, True, gpu.processors, out_TN)
        return out_TN
    q_TN = rotate_write(qkv_TN, attention, pool, *where, batch.cos_TR, batch.sin_TR)
    if few:
        plain = replace(attention, rotated=0, q_norm=None, k_norm=None, q=(0, attention.head_dim))
        attend_tokens(q_TN[:few], plain, pool, *where, None, None, counters, False, gpu.processors, out_TN)
    if tiles is not None:
        attend_rows(q_TN, attention, pool, *where, tiles, out_TN)
    return out_TN
