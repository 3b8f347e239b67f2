"""Hidden states between a device's memory and a message.

Consumer GPUs cannot read each other's memory, so hidden states cross the host's, page-locked, where a GPU copies while
it computes: the sender's copies them there, a thread sends them once that is over, and the receiver's copies them out
of the buffer that they were received in.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .buffers import Buffers, Ready
from .links import MOST_UNDER_WAY, Link, Received
from .wire import Array, Message

Make = Callable[[Array, str], Message]
"""A message, of a payload and its dtype's name."""


@dataclass(frozen=True)
class Mark:
    """A moment: by the clock (`time.time_ns()`) and, on a GPU, in its stream of work."""

    ns: int
    event: Any


class Carrier:
    """Brings hidden states to a device, and from it onto a link. Used by the one thread that computes there."""

    def __init__(self, device: str) -> None:
        """`device`: as torch names it."""
        self._device = torch.device(device)
        self.page_locked = self._device.type == "cuda"
        self._unknown: deque[tuple[Mark, Mark]] = deque()
        self._out = Buffers(MOST_UNDER_WAY + 2, self.page_locked)

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """What the thread that computes runs in."""
        return torch.cuda.device(self._device) if self.page_locked else contextlib.nullcontext()

    def arrived(self, received: Received) -> Tensor | None:
        """The payload on the device; on the CPU it lies in the buffer that it was received in."""
        payload, dtype = received.message.payload, received.message.dtype
        if dtype == "none":
            return None
        start = payload.ctypes.data - received.buffer.data.ctypes.data if payload.size else 0
        tensor = _shaped(received.buffer.tensor[start : start + payload.nbytes], getattr(torch, dtype), payload.shape)
        return tensor.to(self._device, non_blocking=True) if self.page_locked else tensor

    def read(self) -> Ready | None:
        """What is over when all messages that were worked on so far have been read: a GPU may still copy from them."""
        return self._recorded() if self.page_locked else None

    def send(self, link: Link, output: Tensor, make: Make) -> None:
        """Send a tensor of two dimensions. Raises what `Link.send` raises."""
        dtype = str(output.dtype).removeprefix("torch.")
        if not self.page_locked:
            link.send(make(_bits(output.contiguous()), dtype))
            return
        buffer = self._out.take(output.nbytes)
        assert buffer is not None, "never closed"
        staged = _shaped(buffer.tensor[: output.nbytes], output.dtype, output.shape)
        staged.copy_(output, non_blocking=True)
        copied = buffer.free = self._recorded()
        try:
            link.send_when(copied, make(_bits(staged), dtype), lambda: self._out.give(buffer))
        except BaseException:
            self._out.give(buffer)
            raise

    def mark(self) -> Mark:
        """This moment, for the thread that computes and for its device."""
        event = None
        if self.page_locked:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
        return Mark(time.time_ns(), event)

    def computed(self, start: Mark, end: Mark) -> int:
        """Nanoseconds that the device computed between marks, as far as that is known by now.

        A GPU computes later than it is told to. Then this is what earlier calls asked for, and is over since.
        """
        if not self.page_locked:
            return end.ns - start.ns
        self._unknown.append((start, end))
        known = 0
        while self._unknown and self._unknown[0][1].event.query():
            first, last = self._unknown.popleft()
            known += int(first.event.elapsed_time(last.event) * 1e6)
        return known

    def _recorded(self) -> Ready:
        """What is over when all is that was launched so far. Who waits for it leaves its CPU to others."""
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _shaped(memory: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Bytes as a tensor."""
    return memory.view(dtype).view(*shape)


def _bits(tensor: Tensor) -> Array:
    """A numpy array that shares the tensor's memory; of bfloat16, the int16 of its bits."""
    array: Array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
