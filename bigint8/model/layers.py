"""Linear layers and embeddings with int8 or 16-bit weights, and the conversion of one layer by hand."""

from collections.abc import Callable

import torch
from bigint8_kernels import float_linear, int8_linear, quantize_rows
from bigint8_kernels.reference import Activations
from torch import Tensor, nn
from torch.nn import functional

from ..options import DEFAULT_THRESHOLD


class KeepsItsDtype(nn.Module):
    """A module of which one buffer, named by `kept`, stays in its dtype under `.half()`, `.float()` and the like.

    Its `dtype`, if it has one, is that of its results, and follows them.
    """

    kept: str
    dtype: torch.dtype | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeepsItsDtype":
        before: Tensor = getattr(self, self.kept)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after: Tensor = getattr(self, self.kept)
        if after.dtype != before.dtype:
            setattr(self, self.kept, before.to(after.device))
        if self.dtype is not None:
            self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


class Int8Linear(KeepsItsDtype):
    """`Y = X W^T + b` with W in int8: `W ~ weight * scale[:, None]`. For inference only.

    weight: int8 (out_features, in_features); scale: float32 (out_features,); bias: (out_features,) or None.
    X is (..., in_features) in float16, bfloat16 or float32, Y is (..., out_features) in X's dtype.
    See `bigint8_kernels.reference` for the arithmetic (LLM.int8(), Dettmers et al. 2022).
    """

    kept = "scale"
    weight: nn.Parameter
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        threshold: float = DEFAULT_THRESHOLD,
        activations: Activations = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.threshold, self.activations = threshold, activations
        weight = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.float32, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("Int8Linear is for inference: it has no gradient; run it under torch.no_grad()")
        weight = self.weight.to(self.scale.device)  # an offloaded one is in the host's memory
        return int8_linear(x, weight, self.scale, self.bias, self.threshold, self.activations)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"threshold={self.threshold}, activations={self.activations!r}"
        )


class Int8Embedding(KeepsItsDtype):
    """Token embeddings in int8, row by row: `E ~ weight * scale[:, None]`. For inference only.

    weight: int8 (num_embeddings, embedding_dim); scale: float32 (num_embeddings,). Token ids (...) become
    (..., embedding_dim) in `dtype`. Shares weight and scale with an Int8Linear where the output head is tied to it.
    """

    kept = "scale"
    weight: nn.Parameter
    scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        weight = torch.empty(num_embeddings, embedding_dim, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", torch.empty(num_embeddings, dtype=torch.float32, device=device))
        self.dtype = dtype or torch.get_default_dtype()

    def forward(self, ids: Tensor) -> Tensor:
        return (self.weight[ids] * self.scale[ids].unsqueeze(-1)).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class Embedding16bit(KeepsItsDtype):
    """Token embeddings that stay 16-bit, as they are stored, in a model that computes in float32. For inference only.

    Ids (...) become (..., embedding_dim) in `dtype`.

    weight: float16 or bfloat16 (num_embeddings, embedding_dim): a buffer, not a parameter, so that transformers still
    takes the model's dtype to be float32. The results are those of float32 weights at half the bytes.
    """

    kept = "weight"
    weight: Tensor

    def __init__(self, embedding: nn.Embedding, stored: torch.dtype) -> None:
        """Of an embedding's shape and dtype, values not set; `stored` is the weight's dtype."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.register_buffer("weight", torch.empty_like(embedding.weight, dtype=stored, requires_grad=False))
        self.dtype = embedding.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.weight).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.weight.dtype}"


class Linear16bit(KeepsItsDtype):
    """`Y = X W^T + b` with a 16-bit weight, computed in float32: the output head beside `Embedding16bit`.

    weight: float16 or bfloat16 (out_features, in_features); bias: (out_features,) or None; Y has X's dtype.
    """

    kept = "weight"
    weight: Tensor

    def __init__(self, linear: nn.Linear, stored: torch.dtype) -> None:
        """Of a linear layer's shape, with its bias, values not set; `stored` is the weight's dtype."""
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.register_buffer("weight", torch.empty_like(linear.weight, dtype=stored, requires_grad=False))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return float_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.weight.dtype}"


def is_linear(module: nn.Module) -> bool:
    """Whether the module is one that becomes an Int8Linear: `nn.Linear` or the `Conv1D` of transformers (GPT-2)."""
    return type(module) is nn.Linear or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight as (in_features, out_features), as `Conv1D` does."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def empty_like(
    linear: nn.Module, threshold: float, activations: Activations, device: torch.device | str | None = None
) -> Int8Linear:
    """An Int8Linear of the linear layer's shape, its values not set."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    out_features, in_features = weight.shape[::-1] if is_transposed(linear) else weight.shape
    return Int8Linear(
        in_features,
        out_features,
        linear.bias is not None,
        threshold,
        activations,
        device or weight.device,
        weight.dtype,
    )


def make_int8_linear(
    linear: nn.Module, threshold: float = DEFAULT_THRESHOLD, activations: Activations = "auto"
) -> Int8Linear:
    """Quantize one layer, an `nn.Linear` or a transformers `Conv1D`, on the device where it is.

    Raises TypeError for another kind of module or dtype, ValueError for NaN or infinite weights.
    """
    if not is_linear(linear):
        raise TypeError(f"make_int8_linear takes nn.Linear or Conv1D, not {type(linear).__name__}")
    int8 = empty_like(linear, threshold, activations)
    weight: Tensor = linear.weight.detach()  # type: ignore[operator, union-attr]
    if not quantize_rows(weight.T if is_transposed(linear) else weight, int8.weight.data, int8.scale):
        raise ValueError("the layer has NaN or infinite weights")
    if isinstance(linear.bias, Tensor):
        int8.bias.data.copy_(linear.bias.detach())
    return int8.eval()
