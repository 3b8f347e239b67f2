"""The definition of the operations of a step, in plain torch: what every fast implementation is tested against.

It also serves devices that have nothing faster. Dimensions as in `step`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from . import reference
from .step import PAGE, Activation, Attention, Batch, Linear, Norm


def norm(x_TH: Tensor, norm: Norm) -> Tensor:
    """RMS norm (Zhang and Sennrich 2019) or layer norm (Ba et al. 2016) of each row, computed in float32."""
    x = x_TH.float()
    if norm.centered:
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.epsilon)
    if norm.weight is not None:
        x = x * norm.weight.float()
    if norm.bias is not None:
        x = x + norm.bias.float()
    return x.to(x_TH.dtype)


def linear(x_TK: Tensor, layer: Linear, few: int) -> Tensor:
    """The layer's output for each row. Rows [0, few) keep 16-bit activations where the layer says "auto".

    A row's result does not depend on other rows: outliers are single values (`reference.int8_linear_by_token`).
    """
    if layer.scale is None:
        y_TN = x_TK.float() @ layer.weight.float().T
        return (y_TN if layer.bias is None else y_TN + layer.bias.float()).to(x_TK.dtype)
    few = {"auto": few, "16bit": len(x_TK), "int8": 0}[layer.activations]
    weight = layer.weight, layer.scale, layer.bias, layer.threshold
    kept = reference.int8_linear(x_TK[:few], *weight, activations="16bit")
    return torch.cat([kept, reference.int8_linear_by_token(x_TK[few:], *weight)])


def rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) of the first 2 * R values of each head, halves paired: i with i + R."""
    half = cos_TR.shape[1]
    a, b, rest = x_THD[..., :half].float(), x_THD[..., half : 2 * half].float(), x_THD[..., 2 * half :]
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned.to(x_THD.dtype), rest], dim=-1)


def heads_of(qkv_TN: Tensor, attention: Attention, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (T, heads, D), keys and values (T, kv_heads, D) of the rows, normed and rotated."""
    width = attention.head_dim

    def heads(place: tuple[int, int], count: int) -> Tensor:
        offset, stride = place
        return torch.stack([qkv_TN[:, offset + i * stride : offset + i * stride + width] for i in range(count)], dim=1)

    q, k = heads(attention.q, attention.heads), heads(attention.k, attention.kv_heads)
    if attention.q_norm is not None:
        q = norm(q, attention.q_norm)
    if attention.k_norm is not None:
        k = norm(k, attention.k_norm)
    if attention.rotated:
        assert batch.cos_TR is not None and batch.sin_TR is not None
        q, k = rotate(q, batch.cos_TR, batch.sin_TR), rotate(k, batch.cos_TR, batch.sin_TR)
    return q, k, heads(attention.v, attention.kv_heads)


def write(k_THD: Tensor, v_THD: Tensor, attention: Attention, pool: Tensor, batch: Batch) -> None:
    """Keys and values (T, kv_heads, D) into the pages of their places."""
    places, sequences = batch.places_T.long(), batch.sequences_T.long()
    pages = batch.tables[attention.group].long()[sequences, places // PAGE]
    tokens = pages >= 0
    pages, places, k_THD, v_THD = pages[tokens], places[tokens], k_THD[tokens], v_THD[tokens]
    keys = pool[:, 0].view(-1, attention.kv_heads, attention.head_dim, PAGE)
    values = pool[:, 1].view(-1, attention.kv_heads, PAGE, attention.head_dim)
    keys[pages, :, :, places % PAGE] = k_THD.to(pool.dtype)
    values[pages, :, places % PAGE] = v_THD.to(pool.dtype)


def read(attention: Attention, pool: Tensor, table_P: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """The keys and values (kv_heads, places, D) of a sequence's places [first, last)."""
    places = torch.arange(first, last, device=pool.device)
    pages = table_P.long()[places // PAGE]
    keys = pool[:, 0].view(-1, attention.kv_heads, attention.head_dim, PAGE)
    values = pool[:, 1].view(-1, attention.kv_heads, PAGE, attention.head_dim)
    return keys[pages, :, :, places % PAGE].transpose(0, 1), values[pages, :, places % PAGE].transpose(0, 1)


def attend(q_THD: Tensor, attention: Attention, pool: Tensor, batch: Batch) -> Tensor:
    """Softmax attention of each row over its sequence's places up to its own: (T, heads * D), computed in float32."""
    out = q_THD.new_zeros(q_THD.shape[0], attention.heads * attention.head_dim)
    for t, (place, sequence) in enumerate(zip(batch.places_T.tolist(), batch.sequences_T.tolist(), strict=True)):
        if batch.tables[attention.group][sequence, place // PAGE] < 0:
            continue
        first = 0 if attention.window is None else max(0, place + 1 - attention.window)
        k, v = read(attention, pool, batch.tables[attention.group][sequence], first, place + 1)
        shared = attention.heads // attention.kv_heads
        k, v = k.float().repeat_interleave(shared, dim=0), v.float().repeat_interleave(shared, dim=0)
        scores = (k @ q_THD[t].float()[:, :, None]).squeeze(-1) * attention.scale
        if attention.slopes is not None:
            distance = torch.arange(first - place, 1, device=pool.device)
            scores = scores + attention.slopes.float()[:, None] * distance
        out[t] = (scores.softmax(-1)[:, None] @ v).flatten().to(out.dtype)
    return out


def activate(x_TN: Tensor, activation: Activation, gated: bool) -> Tensor:
    """The activation of each value in float32, times the second half of the row where gated."""
    x = x_TN.float()
    gate, up = x.chunk(2, dim=-1) if gated else (x, None)
    if activation in ("gelu", "gelu_tanh"):
        y = functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    else:
        y = functional.silu(gate) if activation == "silu" else functional.relu(gate)
    return (y if up is None else y * up).to(x_TN.dtype)


class ReferenceOperations:
    """`step.Operations` computed at once, one after the other."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def add_norm(self, x_TH: Tensor, delta_TH: Tensor | None, norm_: Norm | None, out: str = "normed") -> Tensor:
        if delta_TH is not None:
            x_TH += delta_TH
        return x_TH if norm_ is None else norm(x_TH, norm_)

    def linear(self, x_TK: Tensor, layers: Sequence[Linear], out: str) -> Tensor:
        return torch.cat([linear(x_TK, layer, self.batch.few) for layer in layers], dim=-1)

    def attend(self, qkv_TN: Tensor, attention: Attention, pool: Tensor) -> Tensor:
        q, k, v = heads_of(qkv_TN, attention, self.batch)
        write(k, v, attention, pool, self.batch)
        return attend(q, attention, pool, self.batch)

    def activate(self, x_TN: Tensor, activation: Activation, gated: bool) -> Tensor:
        return activate(x_TN, activation, gated)

    def call(self, function: Callable[[], None]) -> None:
        function()
