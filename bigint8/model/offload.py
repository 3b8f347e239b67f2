"""Blocks whose int8 weights do not stay on their device: they come through two buffers there, each ahead of its use.

Of an offloaded block only the int8 weights are elsewhere, in the host's memory or in a file; what is small (scales,
biases, norms) and what is in 16-bit stays on the device. The k-th offloaded block of a stage always comes into buffer
k % 2: so the addresses that a recorded step holds (`program`) stay true, and a block is computed while the next one
comes. Its module keeps the weights where they are kept.
"""

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BigInt8Error
from .fused import FusedBlock

ALIGNMENT = 64
"""Where weights begin in a buffer: a cache line."""


class OpenFile:
    """A file that is read from as long as this lives, also when its name is gone. Raises BigInt8Error."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o600)
        except OSError as error:
            raise BigInt8Error(f"{path}: cannot be opened: {error.strerror}") from None

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, out: memoryview, start: int) -> None:
        """Fill `out` with what is there from byte `start` on. Raises BigInt8Error for a file that ends before."""
        while out:
            try:
                count = os.preadv(self.descriptor, [out], start)
            except OSError as error:
                raise BigInt8Error(f"{self.path}: offloaded weights cannot be read: {error.strerror}") from None
            if not count:
                end = os.fstat(self.descriptor).st_size
                raise BigInt8Error(
                    f"{self.path}: ends at byte {end:,}, where an offloaded block goes on to byte "
                    f"{start + len(out):,}; it was cut short since the model was loaded: load the model again"
                )
            out, start = out[count:], start + count

    def write(self, data: memoryview, start: int) -> None:
        """Write all of `data` from byte `start` on. Raises OSError."""
        while data:
            count = os.pwrite(self.descriptor, data, start)
            data, start = data[count:], start + count


@dataclass(frozen=True)
class Extent:
    """Weights that lie one after the other: `data` is what modules have of them, uint8 (bytes,) in the host's memory.

    file, start: which file's bytes these are, None where only memory has them
    """

    data: Tensor
    file: OpenFile | None = None
    start: int = 0


@dataclass(frozen=True)
class KeptBlock:
    """The int8 weights of an offloaded block, where they are kept."""

    extents: tuple[Extent, ...]

    @property
    def places(self) -> list[int]:
        """Where each extent begins in a buffer."""
        places = [0]
        for extent in self.extents:
            places.append(places[-1] + -(-extent.data.numel() // ALIGNMENT) * ALIGNMENT)
        return places[:-1]

    @property
    def buffer_bytes(self) -> int:
        """What it takes of a buffer."""
        return sum(-(-extent.data.numel() // ALIGNMENT) * ALIGNMENT for extent in self.extents)

    def view(self, weight: Tensor, buffer: Tensor) -> Tensor:
        """Where a weight is while its block is in a buffer; the weight itself if it is not kept here."""
        first = weight.data_ptr()
        for extent, place in zip(self.extents, self.places, strict=True):
            start = first - extent.data.data_ptr()
            if weight.dtype == torch.int8 and start >= 0 and start + weight.numel() <= extent.data.numel():
                at = place + start
                return buffer[at : at + weight.numel()].view(torch.int8).view(weight.shape)
        return weight

    def read(self, out: Tensor) -> None:
        """Bring it into a buffer in the host's memory. Raises BigInt8Error."""
        for extent, place in zip(self.extents, self.places, strict=True):
            part = out[place : place + extent.data.numel()]
            if extent.file is None:
                part.copy_(extent.data)
            else:
                extent.file.read(part.numpy().data, extent.start)


Kept = Mapping[int, KeptBlock]
"""The offloaded blocks of a model, by their number."""


class TwoBuffers:
    """The offloaded blocks of a stage, brought in by a thread. Not for several threads.

    Blocks are taken in their order, again and again: `wait` before one is computed, `release` after it.
    """

    def __init__(self, blocks: Sequence[KeptBlock], device: torch.device | str = "cpu") -> None:
        """Allocate the buffers, and begin to bring in the first two blocks."""
        self._blocks, self._device = blocks, torch.device(device)
        size = max(block.buffer_bytes for block in blocks)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._reader = ThreadPoolExecutor(1, "offload")
        self._prepare()
        self._coming: list[tuple[int, Future[None]]] = [self._begin(k) for k in range(min(2, len(blocks)))]

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def fused(self, k: int, block: FusedBlock) -> FusedBlock:
        """The k-th offloaded block as it computes: with its weights where they are while it is in its buffer."""
        return with_weights(block, lambda weight: self._blocks[k].view(weight, self._buffers[k % 2]))

    def wait(self, k: int) -> None:
        """Until block k is in its buffer. Raises BigInt8Error if it cannot be read."""
        number, coming = self._coming[k % 2]
        if number != k:  # a step before this one failed
            number, coming = self._coming[k % 2] = self._begin(k)
        coming.result()

    def release(self, k: int) -> None:
        """Block k is computed: the next one for its buffer may come."""
        later = k + 2 if k + 2 < len(self._blocks) else k % 2
        if later != k:
            self._coming[k % 2] = self._begin(later)

    def _begin(self, k: int) -> tuple[int, "Future[None]"]:
        """Let the thread bring in block k, whose buffer nobody needs from here on."""
        return k, self._reader.submit(self._bring, k)

    def _prepare(self) -> None:
        """What a device needs besides the buffers."""

    def _bring(self, k: int) -> None:
        """Runs in the thread, one block after the other."""
        self._blocks[k].read(self._buffers[k % 2])


class GpuBuffers(TwoBuffers):
    """The same on a GPU: a copy stream brings the blocks in while others are computed on the current stream.

    The GPU waits, not the host: the current stream for the copy of a block, the copy stream for what computed with the
    block before in the same buffer. Files are read into page-locked memory first; the host's memory is page-locked as
    it is, where CUDA does that. No GPU has run this yet.
    """

    def _prepare(self) -> None:
        self._copies = torch.cuda.Stream(self._device)
        for buffer in self._buffers:
            buffer.record_stream(self._copies)  # its memory is not given away while something may come
        self._arrived = [torch.cuda.Event(blocking=True) for _ in range(2)]
        extents = [extent for block in self._blocks for extent in block.extents]
        self._locked = all(extent.file is None for extent in extents) and page_lock(self, extents)
        size = 0 if self._locked else self._buffers[0].numel()
        self._staging = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._free: dict[int, torch.cuda.Event] = {}

    def wait(self, k: int) -> None:
        """Until the copy of block k is launched; what is launched from here on waits for it. Raises BigInt8Error."""
        super().wait(k)
        torch.cuda.current_stream(self._device).wait_event(self._arrived[k % 2])

    def _begin(self, k: int) -> tuple[int, "Future[None]"]:
        free = torch.cuda.Event()
        free.record(torch.cuda.current_stream(self._device))
        self._free[k] = free
        return super()._begin(k)

    def _bring(self, k: int) -> None:
        block, buffer, staging = self._blocks[k], self._buffers[k % 2], self._staging[k % 2]
        if not self._locked:
            self._arrived[k % 2].synchronize()  # the copy before has left the staging memory
            block.read(staging)
        with torch.cuda.device(self._device), torch.cuda.stream(self._copies):
            self._copies.wait_event(self._free.pop(k))
            if self._locked:
                for extent, place in zip(block.extents, block.places, strict=True):
                    buffer[place : place + extent.data.numel()].copy_(extent.data, non_blocking=True)
            else:
                buffer.copy_(staging, non_blocking=True)
            self._arrived[k % 2].record(self._copies)


def page_lock(owner: object, extents: Sequence[Extent]) -> bool:
    """Page-lock memory that is there for as long as `owner` lives. False where CUDA is not there or does not do it."""
    if not torch.cuda.is_available():
        return False
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for extent in extents:
        address = extent.data.data_ptr()
        if int(cudart.cudaHostRegister(address, extent.data.numel(), 0)):
            return False
        weakref.finalize(owner, cudart.cudaHostUnregister, address)
    return True


def buffers_of(blocks: Sequence[KeptBlock], device: torch.device) -> TwoBuffers | None:
    """What brings these blocks to a device; None for none."""
    if not blocks:
        return None
    return GpuBuffers(blocks, device) if device.type == "cuda" else TwoBuffers(blocks, device)


def with_weights(block: FusedBlock, place: Callable[[Tensor], Tensor]) -> FusedBlock:
    """The same block with each weight where `place` says."""
    qkv, up = ([replace(layer, weight=place(layer.weight)) for layer in layers] for layers in (block.qkv, block.up))
    out, down = (replace(layer, weight=place(layer.weight)) for layer in (block.out, block.down))
    return replace(block, qkv=tuple(qkv), up=tuple(up), out=out, down=down)
