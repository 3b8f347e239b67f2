"""Bounded-memory reading: byte ranges of tensors through a fixed ring of staging buffers, rows handed out in order.

Neighbouring tensors are read with one call; a tensor larger than a buffer is read in chunks of whole rows. Several
threads take the next range in file order, read it into a buffer of their own and work on its rows while they are still
in the cache. Only wanted bytes are read.
"""

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.headers import TensorInfo
from ..errors import CheckpointError
from ..plan.devices import usable_cpus
from ..plan.memory import FEWEST_READERS, GPU_BUFFER_BYTES, GPU_READERS, HOST_BUFFER_BYTES, MOST_READERS
from ..units import SAFETENSORS_BITS, TORCH_NAMES

FEWEST_DIRECT_READERS = 4
"""Reads past the file cache wait longer for the disk: with more readers, some work while others wait."""

DIRECT_ALIGNMENT = 4096
"""Places in the file, sizes and addresses of reads past the file cache are multiples of this."""

PROGRESS_SECONDS = 0.1

TORCH_DTYPES: dict[str, torch.dtype] = {stored: getattr(torch, name) for stored, name in TORCH_NAMES.items()}


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
    tensors: Iterable[TensorInfo], whole: Collection[str] = (), buffer_bytes: int = HOST_BUFFER_BYTES
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
                and (at - start) % (SAFETENSORS_BITS[tensor.dtype] // 8) == 0
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
    """Hand the rows of tensors, in chunks and in file order, to a function that several threads call.

    tensors: what to read; dtypes float16, bfloat16, float32, int8 or uint8
    whole: names of tensors that come as one chunk
    readers: threads, each of which reads a chunk into its own buffer and then works on it there; that way a chunk is
        still in the cache when it is worked on, and reading and working overlap
    gpus: how many GPUs the rows go to; for them the staging buffers are larger, and in page-locked memory
    direct: read past the system's file cache what is not in it yet, if the file system can; for files that are too
        large to stay in the cache

    Memory: one buffer for each reader, of the largest read that came its way. `bytes_read` counts what was read and
    worked on so far.
    """

    def __init__(
        self,
        tensors: Iterable[TensorInfo],
        whole: Collection[str] = (),
        buffer_bytes: int | None = None,
        readers: int | None = None,
        gpus: int = 0,
        direct: bool = False,
    ) -> None:
        self.reads = plan_reads(tensors, whole, buffer_bytes or (GPU_BUFFER_BYTES if gpus else HOST_BUFFER_BYTES))
        self.bytes_read = 0
        self._readers = min(readers or default_readers(direct, gpus), max(1, len(self.reads)))
        self._pin, self._direct = gpus > 0, direct and hasattr(os, "O_DIRECT")
        self._files: dict[Path, _File] = {}
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, work: Callable[[Chunk], object], on_progress: Callable[[int], None] | None = None) -> None:
        """Read everything; call `work` with each chunk and, from this thread, `on_progress` with `bytes_read`.

        Raises what `work` raised first, in file order, and CheckpointError if a file ends early or cannot be read.
        """
        upcoming = enumerate(self.reads)
        failures: list[tuple[int, BaseException]] = []
        pool = ThreadPoolExecutor(self._readers, thread_name_prefix="bigint8-read")
        try:
            for file in {read.file for read in self.reads}:
                self._files[file] = _File(file, self._direct)
            waiting = {pool.submit(self._read_on, upcoming, work, failures) for _ in range(self._readers)}
            while waiting:
                done, waiting = wait(waiting, timeout=PROGRESS_SECONDS)
                for future in done:
                    future.result()
                if on_progress is not None:
                    on_progress(self.bytes_read)
        finally:
            self._stopped = True
            pool.shutdown(wait=True)
            for opened in self._files.values():
                opened.close()
            self._files.clear()
            if self._pin:
                give_back_pinned_memory()
        if failures:
            raise min(failures, key=lambda failure: failure[0])[1]

    def _read_on(
        self, upcoming: Iterator[tuple[int, Read]], work: Callable[[Chunk], object], failures: list[Any]
    ) -> None:
        """One reader: the next read, its chunks, and so on. Reads begin in order: a failure stops only later ones."""
        buffer = data = torch.empty(0, dtype=torch.uint8)
        while True:
            with self._lock:
                index, read = (-1, None) if self._stopped else next(upcoming, (-1, None))
            if read is None:
                return
            try:
                if len(buffer) < read.stop - read.start + 2 * DIRECT_ALIGNMENT:
                    buffer = _aligned(read.stop - read.start + 2 * DIRECT_ALIGNMENT, self._pin)
                data = self._files[read.file].read(read, buffer)
                for piece in read.pieces:
                    work(Chunk(piece.tensor, piece.row_start, piece.row_stop, _view(piece, data)))
            except BaseException as error:
                with self._lock:
                    self._stopped = True
                failures.append((index, error))
                traceback.clear_frames(error.__traceback__)  # they hold the buffer: it would stay page-locked
                buffer = data = buffer[:0].clone()
                return
            with self._lock:
                self.bytes_read += read.stop - read.start


class _File:
    """An open file that is read through the system's cache or, what that does not have, past it."""

    def __init__(self, path: Path, direct: bool) -> None:
        self._cached = _open(path)
        self._direct: int | None = None
        self._pages = None
        if direct:
            with contextlib.suppress(CheckpointError, OSError, ValueError):
                self._direct = _open(path, os.O_DIRECT)
                self._pages = mmap.mmap(self._cached, 0, prot=mmap.PROT_READ)

    def close(self) -> None:
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)
        if self._pages is not None:
            self._pages.close()

    def read(self, read: Read, buffer: Tensor) -> Tensor:
        """The bytes of a read, as a view of the buffer. They have the same offset
        within a page in memory as in the file: reads past the cache need that.

        Raises CheckpointError if the file ends before them or cannot be read.
        """
        lead = read.start % DIRECT_ALIGNMENT
        memory, at = buffer.numpy().data, read.start
        try:
            if self._pages is not None and not _is_cached(self._pages, read.start, read.stop):
                at = self._read_direct(memory, at, read)
            while at < read.stop:
                count = os.preadv(self._cached, [memory[lead + at - read.start : lead + read.stop - read.start]], at)
                if count == 0:
                    raise _ends_early(read, at)
                at += count
        except OSError as error:
            raise CheckpointError(f"{read.file}: reading bytes {at:,} to {read.stop:,}: {error.strerror}") from None
        return buffer[lead : lead + read.stop - read.start]

    def _read_direct(self, memory: memoryview, at: int, read: Read) -> int:
        """Read past the cache, from `at` on. Returns the position it reached, `at` if the system cannot."""
        origin = read.start - read.start % DIRECT_ALIGNMENT
        while at < read.stop and self._direct is not None:
            start = at - at % DIRECT_ALIGNMENT
            size = read.stop - start + -(read.stop - start) % DIRECT_ALIGNMENT
            try:
                count = os.preadv(self._direct, [memory[start - origin : start - origin + size]], start)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return at  # another alignment than this one
            if start + count <= at:
                return at
            at = min(start + count, read.stop)
        return at


def _is_cached(pages: mmap.mmap, start: int, stop: int) -> bool:
    """Whether the system has all pages of a byte range in memory, as far as it tells us."""
    start -= start % mmap.PAGESIZE
    stop = min(stop, len(pages))
    present = (ctypes.c_ubyte * max(1, -(-(stop - start) // mmap.PAGESIZE)))()
    address = np.frombuffer(pages, np.uint8, 1, start).ctypes.data if start < stop else 0
    found = _libc().mincore(ctypes.c_void_p(address), ctypes.c_size_t(stop - start), present)
    return found == 0 and all(page & 1 for page in present)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _ends_early(read: Read, at: int) -> CheckpointError:
    cut = next(piece.tensor for piece in read.pieces if piece.tensor.stop > at)
    return CheckpointError(
        f"{read.file}: ends at byte {at:,} while reading tensor {cut.name!r}, which goes on to byte {cut.stop:,}; the "
        "file was cut short while it was being read"
    )


def _open(file: Path, flags: int = 0) -> int:
    try:
        return os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | flags)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None


def _aligned(size: int, pin: bool) -> Tensor:
    """A buffer that begins at a page.

    One that is not page-locked is a mapping of its own: the system has it back at once, where the allocator would keep
    it beside the weights.
    """
    if not pin:
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    buffer = torch.empty(size + DIRECT_ALIGNMENT, dtype=torch.uint8, pin_memory=True)
    return buffer[-buffer.data_ptr() % DIRECT_ALIGNMENT :]


def default_readers(direct: bool = False, gpus: int = 0) -> int:
    """One for each CPU that this process may use, and at least so many that the disk has enough to do.

    For GPUs a few: each keeps page-locked memory, and the processes of a box may serve many GPUs together.
    """
    most = min(MOST_READERS, GPU_READERS * gpus) if gpus else MOST_READERS
    return min(most, max(FEWEST_DIRECT_READERS if direct else FEWEST_READERS, usable_cpus()))


def give_back_pinned_memory() -> None:
    """Let torch unlock the staging buffers' memory, which it would keep for the next ones."""
    empty = getattr(torch.accelerator, "empty_host_cache", None)  # torch 2.8 has none
    if empty is not None:
        empty()


def _view(piece: Piece, data: Tensor) -> Tensor:
    dtype = TORCH_DTYPES[piece.tensor.dtype]
    rows = piece.row_stop - piece.row_start
    values = data[piece.offset : piece.offset + piece.nbytes]
    if values.data_ptr() % dtype.itemsize:  # tensors that do not begin at a multiple of their item size
        values = values.clone()
    values = values.view(dtype)
    return values.view(rows, *piece.tensor.shape[1:]) if piece.tensor.shape else values.view(())
