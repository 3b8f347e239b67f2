"""Bounded-memory reading: byte ranges of tensors through a fixed ring of staging buffers, rows handed out in order.

Neighbouring tensors are read with one call; a tensor larger than a buffer is read in chunks of whole rows. Several
reader threads fill the buffers ahead of the consumer. Only wanted bytes are read.
"""

import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import DTYPE_BITS, TensorInfo
from .errors import CheckpointError

BUFFER_BYTES = 16 * 2**20
BUFFERS = 4
READERS = 2

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Piece:
    """Rows [row_start, row_stop) of a tensor, at `offset` bytes from the start of the read that brings them."""

    tensor: TensorInfo
    row_start: int
    row_stop: int
    offset: int

    @property
    def nbytes(self) -> int:
        return (self.row_stop - self.row_start) * (self.tensor.nbytes // self.tensor.rows)


@dataclass(frozen=True)
class Read:
    """One contiguous byte range [start, stop) of a file and the rows in it."""

    file: Path
    start: int
    stop: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Chunk:
    """Rows [row_start, row_stop) of a tensor; `data` is a view of a staging buffer, valid until the next chunk."""

    tensor: TensorInfo
    row_start: int
    row_stop: int
    data: Tensor


def plan_reads(
    tensors: Iterable[TensorInfo], whole: Collection[str] = (), buffer_bytes: int = BUFFER_BYTES
) -> list[Read]:
    """Cut the tensors into reads of at most `buffer_bytes`, in file order.

    A tensor named in `whole`, and a row, is never cut, even when it is larger than that. Two pieces share a read when
    the second begins where the first ends, and is aligned to its item size there.
    """
    reads: list[Read] = []
    pieces: list[Piece] = []
    start = stop = 0

    def flush() -> None:
        if pieces:
            reads.append(Read(pieces[0].tensor.file, start, stop, tuple(pieces)))
            pieces.clear()

    for tensor in sorted(tensors, key=lambda t: (t.file, t.start)):
        if tensor.nbytes == 0:
            continue
        row_bytes = tensor.nbytes // tensor.rows
        step = tensor.rows if tensor.name in whole else max(1, buffer_bytes // row_bytes)
        row = 0
        while row < tensor.rows:
            at = tensor.start + row * row_bytes
            joins = (
                pieces
                and tensor.file == pieces[0].tensor.file
                and at == stop
                and (at - start) % (DTYPE_BITS[tensor.dtype] // 8) == 0
            )
            room = max(0, buffer_bytes - (stop - start)) // row_bytes if joins else 0
            if not joins or room == 0 or (tensor.name in whole and room < tensor.rows):
                flush()
                start = stop = at
                room = step
            row_stop = min(row + room, tensor.rows)
            pieces.append(Piece(tensor, row, row_stop, at - start))
            stop = tensor.start + row_stop * row_bytes
            row = row_stop
    flush()
    return reads


class RowStream:
    """Iterate over the rows of tensors as chunks, in file order.

    tensors: what to read; dtypes float16, bfloat16 or float32
    whole: names of tensors that come as one chunk
    pin: staging buffers in page-locked memory, for asynchronous copies to a GPU

    Memory: `buffers` buffers of the largest read. `bytes_read` counts what was read so far. Raises CheckpointError if
    a file ends early or cannot be read.
    """

    def __init__(
        self,
        tensors: Iterable[TensorInfo],
        whole: Collection[str] = (),
        buffer_bytes: int = BUFFER_BYTES,
        buffers: int = BUFFERS,
        readers: int = READERS,
        pin: bool = False,
    ) -> None:
        self.reads = plan_reads(tensors, whole, buffer_bytes)
        self.bytes_read = 0
        self._buffers, self._readers, self._pin = buffers, readers, pin
        self._files: dict[Path, int] = {}

    def __iter__(self) -> Iterator[Chunk]:
        largest = max((read.stop - read.start for read in self.reads), default=0)
        pool = ThreadPoolExecutor(self._readers, thread_name_prefix="bigint8-read")
        pending: deque[tuple[Read, Tensor, Future[None]]] = deque()
        upcoming = iter(self.reads)

        def submit(buffer: Tensor) -> None:
            read = next(upcoming, None)
            if read is not None:
                pending.append((read, buffer, pool.submit(self._fill, read, buffer)))

        try:
            for _ in range(min(self._buffers, len(self.reads))):
                submit(torch.empty(largest, dtype=torch.uint8, pin_memory=self._pin))
            while pending:
                read, buffer, filled = pending.popleft()
                filled.result()
                self.bytes_read += read.stop - read.start
                for piece in read.pieces:
                    yield Chunk(piece.tensor, piece.row_start, piece.row_stop, _view(piece, buffer))
                submit(buffer)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def _fill(self, read: Read, buffer: Tensor) -> None:
        view = buffer.numpy().data[: read.stop - read.start]
        at = read.start
        try:
            # Two readers may open the same file at once; setdefault keeps one descriptor, the other is closed.
            descriptor = self._files.get(read.file)
            if descriptor is None:
                opened = os.open(read.file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                descriptor = self._files.setdefault(read.file, opened)
                if descriptor != opened:
                    os.close(opened)
            while view:
                count = os.preadv(descriptor, [view], at)
                if count == 0:
                    cut = next(piece.tensor for piece in read.pieces if piece.tensor.stop > at)
                    raise CheckpointError(
                        f"{read.file}: ends at byte {at:,} while reading tensor {cut.name!r}, which goes on to byte "
                        f"{cut.stop:,}; the file was cut short while it was being read"
                    )
                view, at = view[count:], at + count
        except OSError as error:
            raise CheckpointError(f"{read.file}: reading bytes {at:,} to {read.stop:,}: {error.strerror}") from None


def _view(piece: Piece, buffer: Tensor) -> Tensor:
    dtype = TORCH_DTYPES[piece.tensor.dtype]
    rows = piece.row_stop - piece.row_start
    data = buffer[piece.offset : piece.offset + piece.nbytes].view(dtype)
    return data.view(rows, *piece.tensor.shape[1:]) if piece.tensor.shape else data.view(())
