"""Slots as they are allocated: those that lie side by side as one tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.skeleton import Slot


@dataclass(frozen=True)
class Piece:
    """Slots that get one tensor: one slot, or several whose rows lie one after the other."""

    device: str
    slots: tuple[Slot, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.slots[0].data_shape
        return first if len(self.slots) == 1 else (sum(slot.data_shape[0] for slot in self.slots), *first[1:])

    @property
    def nbytes(self) -> int:
        return sum(slot.data_bytes for slot in self.slots)

    def fill(self, data: Tensor, scale: Tensor | None) -> None:
        """Give each slot its rows of a tensor of this shape, and of the scales of an int8 one."""
        if len(self.slots) == 1:
            self.slots[0].fill(data, scale)
            return
        rows = [slot.data_shape[0] for slot in self.slots]
        scales = [None] * len(rows) if scale is None else scale.split(rows)
        for slot, own, own_scale in zip(self.slots, data.split(rows), scales, strict=True):
            slot.fill(own, own_scale)

    def scales(self, device: str) -> Tensor | None:
        """Memory for its scales, None where it is not int8."""
        return torch.empty(self.shape[0], dtype=torch.float32, device=device) if self.slots[0].is_int8 else None


def pieces_of(
    slots: Mapping[str, Slot], devices: Mapping[str, str], together: Sequence[tuple[str, ...]]
) -> list[Piece]:
    """The slots as they are allocated: those of `together` as one, where they are on one device that is no file."""
    first = {}
    for names in together:
        there = {devices[name] for name in names if name in slots}
        if all(name in slots for name in names) and len(there) == 1 and "disk" not in there:
            first[names[0]] = names
    later = {name for names in first.values() for name in names[1:]}
    groups = [first.get(name, (name,)) for name in slots if name not in later]
    return [Piece(devices[names[0]], tuple(slots[name] for name in names)) for names in groups]
