"""Chunks of rows into a GPU's memory while others are being read: the part of loading that only a GPU can run.

A reader hands over a chunk in page-locked memory. The GPU's copy stream copies it. Then the GPU's work stream quantizes
or converts it, into its slice of the memory that was allocated up front. The reader waits for the copy only, because it
reads into that buffer again. The GPU counts NaN and infinite values of each chunk; the counts are read at the end.

In one process all readers may bring chunks to the same GPU. A GPU works on as many at once as a plan leaves room for.
One more waits until the oldest is done.
"""

import threading
from collections import deque
from dataclasses import dataclass, replace

import torch
from bigint8_kernels import quantize_rows_counting
from torch import Tensor

from ..plan.memory import GPU_CHUNKS
from .assign import Step, Transfer
from .convert import damaged, place_of, store, too_large
from .stream import Chunk


@dataclass(frozen=True)
class _Count:
    """How many values of a chunk are not finite, as read and as stored: `counts` (2,)."""

    transfer: Transfer
    chunk: Chunk
    counts: Tensor


class GpuWriter:
    """Writes chunks into the memory of one GPU. `store` may be called by several threads; `finish` ends it.

    When something else fails, `wait` is called before the memory goes.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._copies, self._work = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)
        # the memory that is written to may still be read or filled by what was launched before
        self._work.wait_stream(torch.cuda.current_stream(self._device))
        self._counts: list[_Count] = []
        self._lock = threading.Lock()
        self._under_way: deque[torch.cuda.Event] = deque()  # what ends the work on each chunk, oldest first

    def store(self, transfer: Transfer, chunk: Chunk) -> None:
        """Begin to bring a chunk into its slot's memory. When this returns, its staging buffer may be read into."""
        if transfer.step in (Step.SCALES, Step.FORMAT):  # a few bytes, which are looked at on the way
            with torch.cuda.stream(self._work):
                store(transfer, chunk)
            return
        with self._lock, torch.cuda.device(self._device):
            if len(self._under_way) == GPU_CHUNKS:
                self._under_way.popleft().synchronize()
            copied = self._launch(transfer, chunk)
            self._under_way.append(_recorded(self._work))
        copied.synchronize()

    def _launch(self, transfer: Transfer, chunk: Chunk) -> torch.cuda.Event:
        """Launch what brings the chunk into its slot's memory; returns what ends the copy to the GPU."""
        out, scale_R = place_of(transfer, chunk)
        with torch.cuda.stream(self._copies):
            staged = chunk.data.to(self._device, non_blocking=True)
            copied = _recorded(self._copies)
        self._work.wait_event(copied)
        with torch.cuda.stream(self._work):
            counts = torch.zeros(2, dtype=torch.int32, device=self._device)
            if transfer.step is Step.QUANTIZE:
                assert scale_R is not None
                source = staged.T if transfer.slot.transposed else staged
                quantize_rows_counting(source, out, scale_R, counts[:1])
            else:
                out.copy_(staged)
            if transfer.step is Step.COPY:
                counts.copy_(torch.stack([(~torch.isfinite(values)).sum() for values in (staged, out)]))
        staged.record_stream(self._work)  # its memory is not given away before the work is done
        without_data = replace(chunk, data=torch.empty(0))  # the buffer is not ours to keep
        self._counts.append(_Count(transfer, without_data, counts))
        return copied

    def wait(self) -> None:
        """Wait for everything: what was written to may be given back."""
        self._work.synchronize()

    def finish(self) -> None:
        """Wait for everything. Raises CheckpointError for the first chunk with values that no weight has."""
        self.wait()
        if not self._counts:
            return
        found = torch.stack([count.counts for count in self._counts]).cpu()
        for count, (as_read, as_stored) in zip(self._counts, found.tolist(), strict=True):
            if as_read:
                raise damaged(count.chunk, "NaN or infinity")
            if as_stored:
                raise too_large(count.transfer)


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event that is over when all that is on the stream now is. Who waits for it leaves its CPU to others."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event
