"""What all stages that run ragged steps have in common: the pools of keys and values, the batch of a step.

A ragged step has one row for each token, of many sequences, without padding. See `bigint8_kernels.step`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from bigint8_kernels.step import Attention, Batch, pool_shape
from torch import Tensor

from ..errors import BigInt8Error
from .host_numbers import on_device
from .rotary import Rotary
from .step import Ints, Step


@dataclass(frozen=True)
class Room:
    """What a stage has room for, and where.

    pages: of each group of `Layout.groups`; table_pages: of the longest sequence; most_rows: of a step
    dtype: the model's, which its keys and values have, and its rows where the device is no CPU
    head_rows: that the head takes at once: its results are as wide as the vocabulary
    """

    pages: tuple[int, ...]
    table_pages: int
    most_rows: int
    dtype: torch.dtype
    device: torch.device
    head_rows: int = 64

    def check(self, step: Step) -> None:
        """Raise BigInt8Error for a step that has more rows than there is room for."""
        if step.rows > self.most_rows:
            raise BigInt8Error(
                f"step {step.number} has {step.rows} rows, but there is room for {self.most_rows} at once; cut the "
                "prompts into smaller chunks, or plan with a larger chunk"
            )


class RaggedStage(Protocol):
    """A stage of a pipeline that runs ragged steps, and keeps the keys and values of its blocks."""

    def prepare(self) -> None:
        """Do what is done once on its device, so that no token waits for it. Called when the stage is loaded."""

    def run(self, step: Step, hidden: Tensor | None) -> Tensor:
        """One step: T rows of `step.ids` on the first stage, later ones are given hidden states (T, H).

        Returns hidden states (T, H) for the next stage; on the last one (R, W): the kept rows, ready for the head. They
        are float32 on the CPU, elsewhere in the model's dtype. Raises BigInt8Error for more rows than it has room for.
        """

    def logits(self, hidden_RW: Tensor) -> Tensor:
        """Logits, float32 (R, vocabulary), of what the last stage returned, where the head lives."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that it has room for."""


class Pools:
    """The keys and values of a stage's blocks: one tensor for the blocks of each group, allocated once."""

    def __init__(self, attentions: Sequence[Attention], room: Room) -> None:
        """Zeros: what is read beside a token's own keys must be finite."""
        self._pages, self._places = room.pages, list[tuple[int, int]]()
        count = [0] * len(room.pages)
        for attention in attentions:
            self._places.append((attention.group, count[attention.group]))
            count[attention.group] += 1
        shape = pool_shape(0, attentions[0])[1:]
        self._groups = [
            torch.zeros(blocks, pages if blocks else 0, *shape, dtype=room.dtype, device=room.device)
            for blocks, pages in zip(count, room.pages, strict=True)
        ]

    def of(self, block: int) -> Tensor:
        """The pool of one block, as `pool_shape` says."""
        group, index = self._places[block]
        return self._groups[group][index]

    def together(self, block: int) -> tuple[Tensor, int]:
        """One pool of all blocks of this block's group, and how many of its pages come before this block's."""
        group, index = self._places[block]
        return self._groups[group].flatten(0, 1), index * self._pages[group]

    def copy(self, copies: Ints) -> None:
        """Copy pages, (C, 3): group, from, to. All are read before any is written."""
        for group, pool in enumerate(self._groups):
            here = copies[copies[:, 0] == group]
            if len(here) and len(pool):  # in most steps nothing is copied, and nothing is sent to the device
                pages = on_device(here[:, 1:], pool.device).long()
                pool[:, pages[:, 1]] = pool[:, pages[:, 0]]

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self._groups)


def batch_of(step: Step, rotary: Rotary | None, device: torch.device) -> Batch:
    """The rows of a step as the operations take them, on a device."""
    cos_TR, sin_TR = (None, None) if rotary is None else rotary.of(step.positions)
    return Batch(
        places_T=on_device(step.places, device),
        sequences_T=on_device(step.sequences, device),
        tables=tuple(on_device(table, device) for table in step.tables),
        few=step.few,
        cos_TR=cos_TR,
        sin_TR=sin_TR,
    )


def batch_without_attention(rows: int, few: int, device: torch.device) -> Batch:
    """Rows for operations that look at each row alone."""
    nothing = torch.zeros(rows, dtype=torch.int32, device=device)
    return Batch(places_T=nothing, sequences_T=nothing, tables=(), few=few)
