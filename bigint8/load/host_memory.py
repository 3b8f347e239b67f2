"""Memory for the weights on the CPU, a block in large pages or the checkpoint's own files; and how much there was."""

import mmap
import os
import resource
import sys
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.headers import TensorInfo
from ..errors import CheckpointError
from .stream import TORCH_DTYPES

ALIGNMENT = 64
"""Where tensors begin in a block: a cache line."""


def aligned(nbytes: int) -> int:
    """What a tensor of this size takes of a block."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class HostMemory:
    """One anonymous mapping that is handed out in pieces; it goes when the last tensor in it does.

    Fresh memory is mapped in page by page, when it is first written: for 6.7 GB that is 1.6 million faults of 4 KiB, or
    3,200 of 2 MiB. So the kernel is asked for huge pages, where it gives them on request (Linux, "madvise"), and all
    tensors lie in one mapping, since pieces of their own would leave small pages at both ends of each.
    """

    def __init__(self, nbytes: int) -> None:
        """Reserve address space; pages come when they are written. Raises OSError if there is not enough."""
        if sys.platform == "win32":
            self._block = mmap.mmap(-1, max(1, nbytes))
        else:
            self._block = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._block.madvise(mmap.MADV_HUGEPAGE)
        self._at = 0

    def take(self, dtype: torch.dtype, count: int) -> Tensor:
        """The next piece, as a tensor of `count` values that are not set."""
        start, self._at = self._at, self._at + aligned(count * dtype.itemsize)
        if not count:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._block, dtype=dtype, count=count, offset=start)


class MappedFiles:
    """Tensors that are the bytes of safetensors files, mapped into memory: there at once, and read when they are used.

    Changes stay in this process. Several processes that map one file share its pages.
    """

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def tensor(self, info: TensorInfo) -> Tensor | None:
        """The tensor in its stored dtype, or None where it does not begin at a multiple of that dtype's size."""
        dtype, count = TORCH_DTYPES[info.dtype], prod(info.shape)
        if info.start % dtype.itemsize or sys.platform == "win32":
            return None
        if not count:
            return torch.empty(info.shape, dtype=dtype)
        if info.file not in self._maps:
            self._maps[info.file] = map_file(info.file)
        data = torch.frombuffer(self._maps[info.file], dtype=dtype, count=count, offset=info.start)
        return data.view(info.shape)


def map_file(file: Path) -> mmap.mmap:
    """A whole file in memory. Changes stay in this process. Raises CheckpointError."""
    # Private: nothing is written back to the file. No swap is reserved, since hardly anything is written at all.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be mapped into memory: {error.strerror}") from None


def peak_host_bytes() -> int:
    """The most memory that this process ever held in RAM."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
