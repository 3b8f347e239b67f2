"""Reused memory that messages are received into and, from a GPU, sent from.

New memory costs a page fault each 4 KiB, and page-locking it costs far more. So a link keeps a few buffers, each as
large as the largest message that it has held.
"""

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from .wire import ALIGN

if TYPE_CHECKING:
    from torch import Tensor

Bytes = NDArray[Any]

MOST_SPARE = 4
"""How many buffers are kept that nobody uses; of page-locked ones, all."""


class Ready(Protocol):
    """What ends the work of a GPU on a buffer: a `torch.cuda.Event`."""

    def synchronize(self) -> None: ...


@dataclass(eq=False)
class Buffer:
    """Some memory (uint8), which numpy and torch share. `free`: what must be over before it is written to again."""

    tensor: "Tensor"
    free: Ready | None = None
    data: Bytes = field(init=False)

    def __post_init__(self) -> None:
        self.data = self.tensor.numpy()


@dataclass
class Buffers:
    """At most `count` buffers at once; who wants one more waits until one is given back.

    page_locked: a GPU copies from them and to them.
    """

    count: int
    page_locked: bool = False
    _spare: deque[Buffer] = field(default_factory=deque)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _lent: int = 0
    _closed: bool = False

    def take(self, nbytes: int) -> Buffer | None:
        """A buffer of at least so many bytes; None once this is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._lent < self.count or self._closed)
            if self._closed:
                return None
            self._lent += 1
            buffer = self._spared(nbytes)
        if buffer is not None and buffer.free is not None:
            buffer.free.synchronize()
            buffer.free = None
        if buffer is None or buffer.data.size < nbytes:
            buffer = Buffer(self._new(nbytes))
        return buffer

    def _spared(self, nbytes: int) -> Buffer | None:
        """The one that was given back first of those that are large enough, or else of all."""
        if not self._spare:
            return None
        found = next((buffer for buffer in self._spare if buffer.data.size >= nbytes), self._spare[0])
        self._spare.remove(found)
        return found

    def give(self, buffer: Buffer) -> None:
        """Take it back."""
        with self._changed:
            self._lent -= 1
            if not self._closed and (self.page_locked or len(self._spare) < MOST_SPARE):
                self._spare.append(buffer)
            self._changed.notify()

    def close(self) -> None:
        """Let go of the memory; nobody waits for a buffer any more."""
        with self._changed:
            self._closed = True
            self._spare.clear()
            self._changed.notify_all()

    def _new(self, nbytes: int) -> "Tensor":
        import torch  # begins at a cache line, or is page-locked; the driver may not have imported it before

        grain = max(ALIGN, 1 << nbytes.bit_length() >> 3)  # a little more, so that the next one fits too
        return torch.empty(max(grain, -(-nbytes // grain) * grain), dtype=torch.uint8, pin_memory=self.page_locked)
