"""Programs: operations over rows, written once, that run at every step."""

from collections.abc import Callable

import torch
from bigint8_kernels import dispatch
from bigint8_kernels.step import Batch, Operations
from torch import Tensor

Program = Callable[[Operations, Tensor], Tensor]
"""From the rows that go in, which it may change, to those that come out."""


class Rows:
    """A program for rows of one width, at most `most_rows` at once, on one device.

    Where the device records (the CPU), it is recorded once and run by one call. Elsewhere its operations are computed
    at once, one after the other.
    """

    def __init__(self, program: Program, width: int, most_rows: int, device: torch.device) -> None:
        self.most_rows, self._program = most_rows, program
        self._recorder = dispatch.recorder(device, most_rows)
        if self._recorder is not None:
            self._x = self._recorder.rows("x", width)
            self._y = program(self._recorder, self._x)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that it keeps for rows."""
        return 0 if self._recorder is None else self._recorder.nbytes

    def run(self, batch: Batch, x_TK: Tensor) -> Tensor:
        """What comes out for X (T, K), which it may change. The result is good until the next run."""
        if self._recorder is None:
            return self._program(dispatch.operations(batch), x_TK)
        self._x[: batch.rows] = x_TK
        self._recorder.run(batch)
        return self._y[: batch.rows]
