"""Programs: operations over rows, written once, that run at every step."""

from collections.abc import Callable

import torch
from bigint8_kernels.reference_step import ReferenceOperations
from bigint8_kernels.step import Batch, Operations
from torch import Tensor

Program = Callable[[Operations, Tensor], Tensor]
"""From the rows that go in, which it may change, to those that come out."""


class Rows:
    """A program for rows of one width, at most `most_rows` at once."""

    def __init__(self, program: Program, width: int, most_rows: int, device: torch.device) -> None:
        self._program, self.most_rows = program, most_rows

    def run(self, batch: Batch, x_TK: Tensor) -> Tensor:
        """What comes out for X (T, K), which it may change. The result is good until the next run."""
        return self._program(ReferenceOperations(batch), x_TK)
