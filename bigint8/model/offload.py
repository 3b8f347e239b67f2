"""Blocks whose int8 weights do not stay on their device: they come through two buffers there, each ahead of its use.

Of an offloaded block only the int8 weights are elsewhere, in the host's memory or in a file; what is small (scales,
biases, norms) and what is in 16-bit stays on the device. The k-th offloaded block of a stage always comes into buffer
k % 2: so the addresses that a recorded step holds (`program`) stay true, and a block is computed while the next one
comes. Its module keeps the weights where they are kept.
"""

import os
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
    """The offloaded blocks of a stage on a CPU, brought in by a thread. Not for several threads.

    Blocks are taken in their order, again and again: `wait` before one is computed, `release` after it.
    """

    def __init__(self, blocks: Sequence[KeptBlock]) -> None:
        """Allocate the buffers, and begin to bring in the first two blocks."""
        self._blocks = blocks
        size = max(block.buffer_bytes for block in blocks)
        self._buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(2)]
        self._reader = ThreadPoolExecutor(1, "offload")
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
        if number != k or (coming.done() and coming.exception() is not None):  # a step before this one failed
            number, coming = self._coming[k % 2] = self._begin(k)
        coming.result()

    def release(self, k: int) -> None:
        """Block k is computed: the next one for its buffer may come."""
        later = k + 2 if k + 2 < len(self._blocks) else k % 2
        if later != k:
            self._coming[k % 2] = self._begin(later)

    def _begin(self, k: int) -> tuple[int, Future[None]]:
        return k, self._reader.submit(self._blocks[k].read, self._buffers[k % 2])


def with_weights(block: FusedBlock, place: Callable[[Tensor], Tensor]) -> FusedBlock:
    """The same block with each weight where `place` says."""
    qkv, up = ([replace(layer, weight=place(layer.weight)) for layer in layers] for layers in (block.qkv, block.up))
    out, down = (replace(layer, weight=place(layer.weight)) for layer in (block.out, block.down))
    return replace(block, qkv=tuple(qkv), up=tuple(up), out=out, down=down)
