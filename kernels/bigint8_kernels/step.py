"""What a step of a transformer is made of: the data that its operations take, and the operations themselves.

A step is ragged: one row for each token, of many sequences, prompt chunks and single tokens together, no padding.
Keys and values are in a pool of pages of PAGE tokens each. A sequence's table has the page of each run of PAGE places.

Dimensions: T rows (tokens), S sequences, H the residual stream, K inputs and N outputs of a linear layer, D values of a
head, R values of a head that are rotated, P pages of a table, F the feed-forward part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from .reference import Activations

PAGE = 16
"""Tokens of a page: as many keys as one tensor core product or one 512-bit register of float32 takes."""

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]
"""gelu is the exact one (erf), gelu_tanh its approximation, which checkpoints also call gelu_new and gelu_fast."""


@dataclass(frozen=True)
class Norm:
    """RMS norm, or layer norm where `centered`: weight (H,), bias (H,) or None; either may be None."""

    weight: Tensor | None
    bias: Tensor | None
    epsilon: float
    centered: bool


@dataclass(frozen=True)
class Linear:
    """`Y = X W^T + b`: weight (N, K), int8 with `scale` float32 (N,), or float without; bias (N,) or None."""

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    threshold: float = 0.0
    activations: Activations = "auto"


@dataclass(frozen=True)
class Attention:
    """The attention of one block, over rows that hold queries, keys and values.

    heads, kv_heads: query heads, and key heads; a key head serves `heads // kv_heads` queries. head_dim: D
    q, k, v: (offset, stride) in values: head i of a row's queries begins at offset + i * stride
    scale: of the scores; rotated: the first R values of a head are rotated, in halves (i with i + R/2); 0 for none
    q_norm, k_norm: over the D values of each head, before the rotation
    slopes: float32 (heads,), of alibi: slope * (place of the key - place of the query) is added to a score
    window: how many places a query sees at most, its own included; None for all. group: which table of a Batch
    """

    heads: int
    kv_heads: int
    head_dim: int
    q: tuple[int, int]
    k: tuple[int, int]
    v: tuple[int, int]
    scale: float
    rotated: int = 0
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    slopes: Tensor | None = None
    window: int | None = None
    group: int = 0


@dataclass(frozen=True)
class Batch:
    """Which rows a step has, and where their keys and values are. All tensors are on the device of the step.

    places_T: int32, where a row's key and value are kept in its sequence, counted from 0
    sequences_T: int32, which of the S sequences a row belongs to; a sequence's rows are in order
    tables: int32 (S, P) for each group: the page of the places [PAGE * p, PAGE * (p + 1)) of a sequence. A row whose
        own page is -1 is no token: it writes nothing, and what comes out of it means nothing
    few: rows [0, few) are generated tokens: with `activations="auto"` they stay 16-bit. The others are int8
    cos_TR, sin_TR: float32 (T, R/2) of each row's position, where heads are rotated
    """

    places_T: Tensor
    sequences_T: Tensor
    tables: tuple[Tensor, ...]
    few: int
    cos_TR: Tensor | None = None
    sin_TR: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.places_T.shape[0]


def pool_shape(pages: int, attention: Attention) -> tuple[int, ...]:
    """The shape of a block's pool of keys and values: (pages, 2, kv_heads, D * PAGE).

    [page, 0, head] is the keys as (D, PAGE), so that the keys of a page lie side by side; [page, 1, head] is the values
    as (PAGE, D).
    """
    return pages, 2, attention.kv_heads, attention.head_dim * PAGE


class Operations(Protocol):
    """The operations of a step. Each returns a tensor that is good until the operation of the same name and `out`.

    An implementation either computes at once, or records what is to be computed each time the step runs. Activations
    (rows) are float32 on the CPU, elsewhere in the dtype of the model.
    """

    def add_norm(self, x_TH: Tensor, delta_TH: Tensor | None, norm: Norm | None, out: str = "normed") -> Tensor:
        """`x += delta` in place, if there is a delta; returns norm(x), or x itself without a norm."""

    def linear(self, x_TK: Tensor, layers: Sequence[Linear], out: str) -> Tensor:
        """The outputs of several layers of the same X, side by side: (T, sum of N)."""

    def attend(self, qkv_TN: Tensor, attention: Attention, pool: Tensor) -> Tensor:
        """Write the rows' keys and values to the pool, then attend: (T, heads * D)."""

    def activate(self, x_TN: Tensor, activation: Activation, gated: bool) -> Tensor:
        """activation(x); where gated, activation(first half of a row) * second half: (T, F)."""

    def call(self, function: Callable[[], None]) -> None:
        """Call a function of the host each time the step comes to this point: between what stands before and after.

        On a GPU that is when the operations before are launched, not when they are done.
        """
