"""What the driver and the workers send to each other: tensors, and which sequences a step continues."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BigInt8Error

CacheEdit = tuple[str, Any]
"""A method of a transformers cache and its argument, to be applied on every worker before the next step."""


class SequenceLost(BigInt8Error):
    """A step continues a sequence that the worker does not have, because it was started again."""


@dataclass(frozen=True)
class CacheKey:
    """Which sequences a step continues: an id, whether workers keep them already, and edits to make first."""

    id: int
    started: bool
    edits: tuple[CacheEdit, ...]


@dataclass(frozen=True)
class Packed:
    """A tensor as Ray moves it: a numpy array, bfloat16 as the int16 of its bits."""

    array: Any
    dtype: str


def pack(tensor: Tensor | None) -> Packed | None:
    """A tensor ready to leave this process."""
    if tensor is None:
        return None
    tensor = tensor.detach().cpu().contiguous()
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return Packed(bits.numpy(), str(tensor.dtype).removeprefix("torch."))


def unpack(packed: Packed | None, device: str) -> Tensor | None:
    """The tensor on this process's device."""
    if packed is None:
        return None
    tensor = torch.from_numpy(packed.array.copy())  # what Ray hands out is read-only
    return tensor.view(getattr(torch, packed.dtype)).to(device)
