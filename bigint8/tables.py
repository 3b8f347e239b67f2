"""Token embeddings and output heads that stay in the 16-bit format they are stored in, in a model that computes in
float32: the same results at half the bytes, which can be those of a mapped file.

The weight is a buffer, not a parameter, so that transformers still takes the model's dtype to be float32.
"""

import torch
from bigint8_kernels import float_linear
from torch import Tensor, nn
from torch.nn import functional

from .linear import KeepsItsDtype


class Embedding16bit(KeepsItsDtype):
    """Token embeddings: ids (...) become (..., embedding_dim) in `dtype`. For inference only.

    weight: float16 or bfloat16 (num_embeddings, embedding_dim).
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
    """`Y = X W^T + b`, computed in float32. For inference only.

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
