"""Rotary positions of a ragged step: one row of cosines and sines for each token, the same for all blocks."""

from collections.abc import Iterable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..errors import BigInt8Error
from .host_numbers import on_device
from .step import Ints

POSITIONS = 1024
"""Positions whose cosines are always computed together, so that their bits do not depend on what a step asks for."""


class Rotary:
    """The cosines and sines of a model's rotary module (Su et al. 2021), looked up by position."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        frequencies, scaling = cast(Tensor, module.inv_freq), cast(float, module.attention_scaling)
        self._frequencies_R, self._scaling = frequencies.float().to(device), scaling
        self._tables_2PR = frequencies.new_empty(2, 0, len(frequencies), device=device)

    @property
    def rotated(self) -> int:
        """How many values of a head are rotated."""
        return 2 * len(self._frequencies_R)

    def of(self, positions: Ints) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 (T, R/2) each, of T positions."""
        while self._tables_2PR.shape[1] <= positions.max(initial=0):
            self._tables_2PR = torch.cat([self._tables_2PR, self._next_positions()], dim=1)
        cos_TR, sin_TR = self._tables_2PR[:, on_device(positions, self._tables_2PR.device)]
        return cos_TR, sin_TR

    def _next_positions(self) -> Tensor:
        """The cosines and sines (2, POSITIONS, R/2) of the positions after those of the table."""
        first = self._tables_2PR.shape[1]
        positions_P = torch.arange(first, first + POSITIONS, device=self._frequencies_R.device)
        angles_PR = positions_P[:, None].float() * self._frequencies_R
        return torch.stack([angles_PR.cos(), angles_PR.sin()]) * self._scaling


class HasModules(Protocol):
    """A model, or a part of one."""

    def named_modules(self) -> Iterable[tuple[str, nn.Module]]: ...


def refuse_changing_frequencies(model: HasModules) -> None:
    """Raise BigInt8Error for rotary positions whose frequencies depend on the longest sequence of a step.

    A token would depend on which other sequences run with it.
    """
    for name, module in model.named_modules():
        for kind in _rope_types(getattr(module, "rope_type", None)):
            if "dynamic" in kind or kind == "longrope":
                raise BigInt8Error(
                    f"{name}: rope_type {kind!r} changes all frequencies with the longest sequence that runs, so that "
                    "sequences cannot run together; load_sharded_int8 runs the model in one process with "
                    "transformers' own cache"
                )


def _rope_types(rope_type: Any) -> list[str]:
    """The kinds of a rotary module: one, or one for each kind of block."""
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return [kind for kind in kinds if isinstance(kind, str)]
