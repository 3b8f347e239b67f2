"""The operations of a step on GPUs as operators of torch (`torch.ops.bigint8`), so that a step can be traced.

Each declares what it changes, and says from shapes alone what comes out: `torch.compile(fullgraph=True)` and fake
tensors see one node for each operation. An operator waits for nothing on the GPU and takes no lock: what it launches
can be captured in a CUDA graph, once it ran before (`prepare`).
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from . import gpu_step, triton_activation, triton_norm
from .generic import float_linear
from .gpu import gpu_of
from .step import Activation, Attention, Batch, Linear, Norm
from .triton_attention import is_wide, row_tiles, rows_of_a_tile

_library = torch.library.Library("bigint8", "FRAGMENT")


def _define(schema: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bigint8::{name}", fake, lib=_library)


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# --- norms ---


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, centered: bool) -> Tensor:
    with _on(x):
        return triton_norm.add_norm(x, None, weight, bias, epsilon, centered)


def _add_norm(
    x: Tensor, delta: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, centered: bool
) -> Tensor:
    with _on(x):
        return triton_norm.add_norm(x, delta, weight, bias, epsilon, centered)


_define(
    "norm(Tensor x, Tensor? weight, Tensor? bias, float epsilon, bool centered) -> Tensor",
    _norm,
    lambda x, *_: x.new_empty(x.shape),
)
_define(
    "add_norm(Tensor(a!) x, Tensor delta, Tensor? weight, Tensor? bias, float epsilon, bool centered) -> Tensor",
    _add_norm,
    lambda x, *_: x.new_empty(x.shape),
)


# --- linear layers ---


def _int8_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[float],
    activations: Sequence[str],
    few: int,
) -> Tensor:
    layers = [Linear(*each) for each in zip(weights, scales, biases, thresholds, activations, strict=True)]  # type: ignore[arg-type]
    with _on(x):
        return gpu_step.int8_linears(x, layers, few, gpu_of(x.device))


_define(
    "int8_linears(Tensor x, Tensor[] weights, Tensor[] scales, Tensor?[] biases, float[] thresholds, "
    "str[] activations, int few) -> Tensor",
    _int8_linears,
    lambda x, weights, *_: x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights)),
)


# --- attention ---


def _attend(
    qkv: Tensor,
    pool: Tensor,
    places: Tensor,
    sequences: Tensor,
    table: Tensor,
    angles: Sequence[Tensor | None],
    norms: Sequence[Tensor | None],
    slopes: Tensor | None,
    tiles: Tensor | None,
    numbers: Sequence[int],
    reals: Sequence[float],
    few: int,
) -> Tensor:
    batch = Batch(places, sequences, (table,), few, *angles)
    with _on(qkv):
        return gpu_step.attend(qkv, _unpacked(norms, slopes, numbers, reals), pool, batch, tiles, gpu_of(qkv.device))


def _packed(attention: Attention) -> tuple[list[Tensor | None], Tensor | None, list[int], list[float]]:
    """An attention as an operator takes it."""
    norms = attention.q_norm, attention.k_norm
    tensors = [each for norm in norms for each in ((norm.weight, norm.bias) if norm else (None, None))]
    kinds = [0 if norm is None else 2 if norm.centered else 1 for norm in norms]
    places = (*attention.q, *attention.k, *attention.v)
    sizes = (attention.heads, attention.kv_heads, attention.head_dim, attention.rotated, attention.window or 0)
    reals = [attention.scale, *(norm.epsilon if norm else 0.0 for norm in norms)]
    return tensors, attention.slopes, [*sizes, *places, *kinds], reals


def _unpacked(
    tensors: Sequence[Tensor | None], slopes: Tensor | None, numbers: Sequence[int], reals: Sequence[float]
) -> Attention:
    heads, kv_heads, head_dim, rotated, window, q, q_by, k, k_by, v, v_by, *kinds = numbers
    scale, *epsilons = reals
    weights = zip(tensors[::2], tensors[1::2], epsilons, kinds, strict=True)
    q_norm, k_norm = (Norm(weight, bias, each, kind == 2) if kind else None for weight, bias, each, kind in weights)
    places = ((q, q_by), (k, k_by), (v, v_by))
    return Attention(heads, kv_heads, head_dim, *places, scale, rotated, q_norm, k_norm, slopes, window or None)


_define(
    "attend(Tensor qkv, Tensor(a!) pool, Tensor places, Tensor sequences, Tensor table, Tensor?[] angles, "
    "Tensor?[] norms, Tensor? slopes, Tensor? tiles, int[] numbers, float[] reals, int few) -> Tensor",
    _attend,
    lambda qkv, *given: qkv.new_empty(qkv.shape[0], given[8][0] * given[8][2]),
)


# --- activations ---


def _activate(x: Tensor, activation: Activation, gated: bool) -> Tensor:
    with _on(x):
        return triton_activation.activate(x, activation, gated)


_define(
    "activate(Tensor x, str activation, bool gated) -> Tensor",
    _activate,
    lambda x, activation, gated: x.new_empty(x.shape[0], x.shape[1] // (2 if gated else 1)),
)


class GpuOperations:
    """`step.Operations` on a GPU, each launched at once. Rows and weights are on one device."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._tiles: dict[int, Tensor] = {}

    def add_norm(self, x_TH: Tensor, delta_TH: Tensor | None, norm: Norm | None, out: str = "normed") -> Tensor:
        if norm is None:
            return x_TH if delta_TH is None else x_TH.add_(delta_TH)
        how = norm.weight, norm.bias, norm.epsilon, norm.centered
        if delta_TH is None:
            return cast(Tensor, torch.ops.bigint8.norm(x_TH, *how))
        return cast(Tensor, torch.ops.bigint8.add_norm(x_TH, delta_TH, *how))

    def linear(self, x_TK: Tensor, layers: Sequence[Linear], out: str) -> Tensor:
        int8 = [layer for layer in layers if layer.scale is not None]
        if len(int8) == len(layers):
            return self._int8(x_TK, layers)
        parts = [_float_linear(x_TK, each) if each.scale is None else self._int8(x_TK, [each]) for each in layers]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _int8(self, x_TK: Tensor, layers: Sequence[Linear]) -> Tensor:
        return cast(
            Tensor,
            torch.ops.bigint8.int8_linears(
                x_TK,
                [layer.weight for layer in layers],
                [layer.scale for layer in layers],
                [layer.bias for layer in layers],
                [float(layer.threshold) for layer in layers],
                [layer.activations for layer in layers],
                self.batch.few,
            ),
        )

    def attend(self, qkv_TN: Tensor, attention: Attention, pool: Tensor) -> Tensor:
        batch = self.batch
        where = batch.places_T, batch.sequences_T, batch.tables[attention.group]
        tensors, slopes, numbers, reals = _packed(attention)
        angles = [batch.cos_TR, batch.sin_TR]
        tiles = self._tiles_of(rows_of_a_tile(is_wide(qkv_TN, pool)))
        given = (angles, tensors, slopes, tiles, numbers, reals, batch.few)
        return cast(Tensor, torch.ops.bigint8.attend(qkv_TN, pool, *where, *given))

    def _tiles_of(self, rows: int) -> Tensor | None:
        """The tiles of the rows of prompts, which are the same in all blocks."""
        batch = self.batch
        if batch.few == batch.rows:
            return None
        if rows not in self._tiles:
            self._tiles[rows] = row_tiles(batch.sequences_T, batch.few, batch.tables[0].shape[0], rows)
        return self._tiles[rows]

    def activate(self, x_TN: Tensor, activation: Activation, gated: bool) -> Tensor:
        return cast(Tensor, torch.ops.bigint8.activate(x_TN, activation, gated))

    def call(self, function: Callable[[], None]) -> None:
        function()


def _float_linear(x_TK: Tensor, layer: Linear) -> Tensor:
    """torch's product; where X and W are of different dtypes, in float32."""
    if layer.weight.dtype == x_TK.dtype:
        return functional.linear(x_TK, layer.weight, layer.bias if layer.bias is None else layer.bias.to(x_TK.dtype))
    y_TN = float_linear(x_TK.float(), layer.weight)
    return (y_TN if layer.bias is None else y_TN + layer.bias).to(x_TK.dtype)
