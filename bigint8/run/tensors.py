"""Hidden states between a device's memory and a message.

Consumer GPUs cannot read each other's memory, so hidden states cross the host's, page-locked, where a GPU copies while
it computes: the sender's copies them there, a thread sends them once that is over, and the receiver's copies them out
of the buffer that they were received in.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .buffers import Buffers, Ready
from .links import MOST_UNDER_WAY, Link
from .wire import Array, Message

Make = Callable[[Array, str], Message]
"""A message, of a payload and its dtype's name."""


class Carrier:
    """Brings hidden states to a device, and from it onto a link. Used by the one thread that computes there."""

    def __init__(self, device: str) -> None:
        """`device`: as torch names it."""
        self._device = torch.device(device)
        self.page_locked = self._device.type == "cuda"
        self._out = Buffers(MOST_UNDER_WAY + 2, self.page_locked)

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """What the thread that computes runs in."""
        return torch.cuda.device(self._device) if self.page_locked else contextlib.nullcontext()

    def arrived(self, message: Message) -> tuple[Tensor | None, Ready | None]:
        """The payload on the device, and what must be over before its buffer is written to again.

        On the CPU the tensor lies in that buffer.
        """
        if message.dtype == "none":
            return None, None
        tensor = torch.from_numpy(message.payload).view(getattr(torch, message.dtype))
        if not self.page_locked:
            return tensor, None
        there = tensor.to(self._device, non_blocking=True)
        return there, self._recorded()

    def send(self, link: Link, output: Tensor, make: Make) -> None:
        """Send a tensor of two dimensions. Raises what `Link.send` raises."""
        dtype = str(output.dtype).removeprefix("torch.")
        if not self.page_locked:
            link.send(make(_bits(output.contiguous()), dtype))
            return
        buffer = self._out.take(output.nbytes)
        assert buffer is not None, "never closed"
        staged = torch.from_numpy(buffer.data[: output.nbytes]).view(output.dtype).view(output.shape)
        staged.copy_(output, non_blocking=True)
        copied = buffer.free = self._recorded()
        try:
            link.send_when(copied, make(_bits(staged), dtype), lambda: self._out.give(buffer))
        except BaseException:
            self._out.give(buffer)
            raise

    def _recorded(self) -> Ready:
        """What is over when all is that was launched so far. Who waits for it leaves its CPU to others."""
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _bits(tensor: Tensor) -> Array:
    """A numpy array that shares the tensor's memory; of bfloat16, the int16 of its bits."""
    array: Array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
