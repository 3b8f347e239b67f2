"""Large pages for the weights on the CPU: most of the time of a load would else go into page faults."""

import ctypes
import mmap
import sys

from torch import Tensor

SMALLEST_BYTES = 2**21
"""The size of a huge page on x86-64, and on most others."""


def prefer_huge_pages(tensor: Tensor) -> None:
    """Ask the kernel for huge pages under a CPU tensor that nobody has written to yet.

    Fresh memory is mapped in page by page, when it is first written: for 6.7 GB that is 1.6 million faults of 4 KiB, or
    3,200 of 2 MiB. Only a hint, where the system gives huge pages on request (Linux, "madvise"); elsewhere it does
    nothing.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.nbytes < SMALLEST_BYTES:
        return
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - first), mmap.MADV_HUGEPAGE)
