"""Fused blocks: a loaded transformers block as the data of `bigint8_kernels.step`, and what runs it.

A block is written once, against `Operations`: the same lines run the reference, the CPU's kernels and a GPU's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from bigint8_kernels.step import Activation, Attention, Linear, Norm, Operations
from torch import Tensor, nn

from ..families.layout import Recipe
from .layers import Int8Linear, is_transposed


@dataclass(frozen=True)
class FusedBlock:
    """What a block computes, on its own module's tensors: nothing is copied.

    Fields as in `Recipe`. `qkv` and `up` are fewer layers than there if their weights lie one after the other.
    """

    attention_norm: Norm
    mlp_norm: Norm | None
    qkv: tuple[Linear, ...]
    attention: Attention
    out: Linear
    up: tuple[Linear, ...]
    down: Linear
    activation: Activation
    gated: bool
    parallel: bool
    norm_last: bool


def fuse(block: nn.Module, recipe: Recipe, window: int | None, group: int) -> FusedBlock:
    """Make a fused block of a loaded one. `window` and `group` of its attention are as in `step.Attention`."""

    def linears(names: Sequence[str]) -> tuple[Linear, ...]:
        return tuple(join([linear_of(block.get_submodule(name)) for name in names]))

    def norm(name: str | None) -> Norm | None:
        return None if name is None else norm_of(block.get_submodule(name))

    out = linear_of(block.get_submodule(recipe.out))
    there = (out.weight if out.scale is None else out.scale).device  # an offloaded weight is elsewhere
    return FusedBlock(
        attention_norm=norm_of(block.get_submodule(recipe.attention_norm)),
        mlp_norm=norm(recipe.mlp_norm),
        qkv=linears(recipe.qkv),
        attention=attention_of(recipe, window, group, norm(recipe.q_norm), norm(recipe.k_norm), there),
        out=out,
        up=linears(recipe.up),
        down=linear_of(block.get_submodule(recipe.down)),
        activation=recipe.activation,
        gated=recipe.gated,
        parallel=recipe.parallel,
        norm_last=recipe.norm_last,
    )


def run_block(
    ops: Operations, block: FusedBlock, x_TH: Tensor, delta_TH: Tensor | None, pool: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Run a block on the residual stream `x + delta`; returns x and delta after it.

    What a block adds last is added by the first norm of the next one. So is `delta` here, in place.
    """
    if block.norm_last:
        return _run_norm_last(ops, block, x_TH, delta_TH, pool), None
    normed = ops.add_norm(x_TH, delta_TH, block.attention_norm)
    if not block.parallel:
        attended = _attend(ops, block, normed, pool)
        return x_TH, _feed_forward(ops, block, ops.add_norm(x_TH, attended, block.mlp_norm))
    normed_too = normed if block.mlp_norm is None else ops.add_norm(x_TH, None, block.mlp_norm, out="normed_too")
    attended = _attend(ops, block, normed, pool)
    fed = _feed_forward(ops, block, normed_too)
    return ops.add_norm(x_TH, attended, None), fed


def _run_norm_last(ops: Operations, block: FusedBlock, x_TH: Tensor, delta_TH: Tensor | None, pool: Tensor) -> Tensor:
    """Here each norm's result is the residual stream from there on."""
    if delta_TH is not None:
        x_TH = ops.add_norm(x_TH, delta_TH, None)
    x_TH = ops.add_norm(x_TH, _attend(ops, block, x_TH, pool), block.attention_norm, out="stream")
    return ops.add_norm(x_TH, _feed_forward(ops, block, x_TH), block.mlp_norm, out="next_stream")


def _attend(ops: Operations, block: FusedBlock, normed_TH: Tensor, pool: Tensor) -> Tensor:
    qkv_TN = ops.linear(normed_TH, block.qkv, "qkv")
    return ops.linear(ops.attend(qkv_TN, block.attention, pool), [block.out], "out")


def _feed_forward(ops: Operations, block: FusedBlock, normed_TH: Tensor) -> Tensor:
    up_TN = ops.linear(normed_TH, block.up, "up")
    return ops.linear(ops.activate(up_TN, block.activation, block.gated), [block.down], "down")


# --- from modules to data ----------------------------------------------------------------------------------------


def norm_of(module: nn.Module) -> Norm:
    """The norm that a module computes: transformers' RMS norms, or a layer norm."""
    weight = cast(Tensor | None, module.weight)
    if isinstance(module, nn.LayerNorm):
        return Norm(weight, module.bias, module.eps, centered=True)
    return Norm(weight, None, cast(float, module.variance_epsilon), centered=False)


def linear_of(module: nn.Module) -> Linear:
    """The linear layer of a module: int8, in 16 bits, `nn.Linear` or transformers' `Conv1D`."""
    weight, bias = cast(Tensor, module.weight), cast(Tensor | None, module.bias)
    if isinstance(module, Int8Linear):
        return Linear(weight, module.scale, bias, module.threshold, module.activations)
    return Linear(weight.T if is_transposed(module) else weight, None, bias)


def join(layers: Sequence[Linear]) -> list[Linear]:
    """One layer for all if their weights, scales and biases each lie one after the other in memory, else these."""
    first = layers[0]
    weight, scale, bias = (_joined([getattr(layer, part) for layer in layers]) for part in ("weight", "scale", "bias"))
    lacks = {(layer.scale is None, layer.bias is None) for layer in layers}
    settings = {(layer.threshold, layer.activations) for layer in layers}
    if weight is None or lacks != {(scale is None, bias is None)} or len(settings) > 1:
        return list(layers)
    return [Linear(weight, scale, bias, first.threshold, first.activations)]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """A view over tensors that lie one after the other in the same memory, None where they do not."""
    tensors = [part for part in parts if part is not None and part.is_contiguous()]
    if len(tensors) < len(parts):
        return None
    first = tensors[0]
    memory, end = first.untyped_storage()._cdata, first.storage_offset()
    for tensor in tensors:
        if (tensor.dtype, tensor.shape[1:]) != (first.dtype, first.shape[1:]):
            return None
        if tensor.untyped_storage()._cdata != memory or tensor.storage_offset() != end:
            return None
        end += tensor.numel()
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def attention_of(
    recipe: Recipe, window: int | None, group: int, q_norm: Norm | None, k_norm: Norm | None, device: torch.device
) -> Attention:
    """The attention of a block over the rows that its q, k and v layers give."""
    heads, kv_heads, d = recipe.heads, recipe.kv_heads, recipe.head_dim
    if recipe.order == "heads":
        q, k, v = (0, 3 * d), (d, 3 * d), (2 * d, 3 * d)
    else:
        q, k, v = (0, d), (heads * d, d), ((heads + kv_heads) * d, d)
    return Attention(
        heads,
        kv_heads,
        d,
        q,
        k,
        v,
        scale=d**-0.5,
        rotated=recipe.rotated,
        q_norm=q_norm,
        k_norm=k_norm,
        slopes=alibi_slopes(heads).to(device) if recipe.alibi else None,
        window=window,
        group=group,
    )


def alibi_slopes(heads: int) -> Tensor:
    """The slopes of alibi (Press et al. 2022), float32 (heads,), on the CPU.

    For a power of two: 2 ** (-8 / heads) to the powers 1, 2, ... Other numbers take those of the next smaller power of
    two, and the rest from every second one of the next larger.
    """
    power = 2 ** math.floor(math.log2(heads))
    exponents = [8 * (i + 1) / power for i in range(power)] + [4 * (2 * i + 1) / power for i in range(heads - power)]
    return torch.tensor([2.0**-exponent for exponent in exponents])
