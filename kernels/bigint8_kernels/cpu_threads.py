# mypy: allow-untyped-defs, allow-untyped-decorators
"""Kernels that do a part of their work each time they are called, on one thread or on several.

numba compiles its own parallel loops once for each function that has one, a second or two each. Here is one such loop
for all kernels. It gets the address of a compiled function and calls it, once for each part.
"""

import ctypes
import threading
from collections.abc import Callable
from ctypes import addressof
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, njit, prange, types
from numba.extending import intrinsic

from .numba_bits import intp_at
from .reference import BLOCK

PARALLEL_VALUES = 2**20
"""Kernels over fewer values run on one thread: at some 20 values a nanosecond they end before other threads wake up.
On a busy machine waking takes longer still, since the threads of numba and those of torch spin while they wait."""

# numba's fallback threading layer aborts the process when two threads start parallel kernels at once.
_numba_lock = threading.Lock()

# What numba was set to in this thread: setting it takes as long as a small kernel.
_numba_threads = threading.local()


class Work(ctypes.Structure):
    """What a kernel of a linear layer reads and writes: addresses, sizes, and the threshold of outliers.

    X is x float32 (T, K). Its integers are q, int16 (T, K) or int8 if `narrow`, with the scales x_scale float32 (T, B).
    The others: outliers bool (K,); weight (N, K); scale float32 (N,); bias float32 (N,), or 0 for none; sums int32
    (T, N); y float32 (T, N), its rows y_stride values apart. All others are contiguous. An address that no called
    kernel reads may be 0. Where tokens_at is not 0, T is the integer at that address, not `tokens`. Addresses take less
    time to pass than arrays.
    """

    _fields_ = [
        *((name, ctypes.c_ssize_t) for name in ("x", "q", "x_scale", "outliers", "weight", "scale", "bias", "sums")),
        *((name, ctypes.c_ssize_t) for name in ("y", "tokens", "features", "rows", "narrow")),
        *((name, ctypes.c_ssize_t) for name in ("y_stride", "tokens_at", "columns")),
        ("threshold", ctypes.c_float),
    ]


def record_at(structure: type[ctypes.Structure]) -> Any:
    """The function of an address, for kernels, that returns the structure there."""
    kind = numba.from_dtype(np.dtype(structure))

    @intrinsic
    def structure_at(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return kind(types.intp), codegen

    return structure_at


work_at = record_at(Work)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def tokens_of(work):
    """T of a Work."""
    if work.tokens_at:
        return intp_at(work.tokens_at, 0)[0]
    return work.tokens


@intrinsic
def _call(typingctx, function, work, part, parts):
    """Call the machine code at an address."""
    signature = types.void(types.intp, types.intp, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in args[1:]])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return signature, codegen


@njit(nogil=True, cache=True)
def _call_once(function, work):
    _call(function, work, 0, 1)


@njit(parallel=True, nogil=True, cache=True)
def _call_parts(function, work, parts):
    for part in prange(parts):
        _call(function, work, part, parts)


def compile_calls() -> None:
    """Compile what calls a Kernel."""
    _call_once.compile((types.intp, types.intp))
    _call_parts.compile((types.intp, types.intp, types.intp))


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def blocks_of(features):
    return (features + BLOCK - 1) // BLOCK


class Kernel:
    """A function of the address of a Work, the number of a part and how many parts there are.

    It is compiled, or loaded from numba's cache, when it is first called or by `compile`.
    """

    def __init__(self, function: Callable[[int, int, int], None], **options: Any) -> None:
        self.name = function.__name__
        self._function, self._options = function, options
        self._compiled: Any = None
        self._compiling = threading.Lock()

    def compile(self) -> Any:
        """What numba compiled; its `address` is that of the machine code."""
        with self._compiling:
            if self._compiled is None:
                signature = types.void(types.intp, types.intp, types.intp)
                compiler = cfunc(signature, nopython=True, cache=True, error_model="numpy", **self._options)
                self._compiled = compiler(self._function)
            return self._compiled

    @property
    def address(self) -> int:
        """Where its machine code is."""
        return int((self._compiled or self.compile()).address)

    def __call__(self, work: ctypes.Structure, parts: int) -> None:
        """Do all parts, each on its own thread. More than one part is allowed only within `threads_for`."""
        address = self.address
        if parts == 1:
            _call_once(address, addressof(work))
        else:
            _call_parts(address, addressof(work), parts)


def kernel(function: Callable[..., None] | None = None, **options: Any) -> Any:
    """Decorates a function as a Kernel, with options of numba's."""
    return Kernel(function, **options) if function else partial(Kernel, **options)


def most_threads() -> int:
    """How many threads a kernel may use."""
    return min(torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS))


class threads_for:
    """`with threads_for(values) as parts`: the number of threads for a kernel over so many values, at most torch's.

    If there are several, numba is set to that number, and no other thread starts a parallel kernel meanwhile.
    With `parts`, that is the number, whatever the values are; of more than numba has, some do their share later.
    """

    def __init__(self, values: int, parts: int | None = None) -> None:
        self._parts = parts or (most_threads() if values >= PARALLEL_VALUES else 1)

    def __enter__(self) -> int:
        if self._parts > 1:
            _numba_lock.acquire()
            count = min(self._parts, int(numba.config.NUMBA_NUM_THREADS))
            if getattr(_numba_threads, "count", None) != count:
                numba.set_num_threads(count)
                _numba_threads.count = count
        return self._parts

    def __exit__(self, *_: object) -> None:
        if self._parts > 1:
            _numba_lock.release()
