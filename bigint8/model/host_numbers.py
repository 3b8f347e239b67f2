"""The plain numbers of a step as tensors on a device."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def on_device(numbers: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of the numbers on a device; they may be memory that is only to be read."""
    return torch.tensor(numbers).to(device)
