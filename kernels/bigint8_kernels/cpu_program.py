# mypy: allow-untyped-defs, allow-untyped-decorators, disable-error-code="call-arg"
"""A program: kernels one after the other, recorded once and run by one native call, on one thread or on several.

All threads walk the list of steps together. They take the parts of a step one by one from a counter. A thread that
finds none left waits until all parts are done, then goes on. So no step depends on how many threads really run: one
that comes late, or whose core another process has taken, costs time only. Between two steps nothing sleeps, which is
why a step of a microsecond may be shared.
"""

import ctypes
import sys
from collections.abc import Sequence
from ctypes import addressof
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_default_triple
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from .cpu_threads import Kernel, _call, most_threads, record_at, threads_for
from .numba_bits import intp_at

CACHE_LINE = 64

SPINS = 1000
"""Turns of waiting, of about 40 cycles each, after which a thread leaves its core to others between two turns."""


class Step(ctypes.Structure):
    """A kernel to call, in one cache line: the addresses of its machine code and of its work, the number of its parts.

    `taken` counts the parts that threads took. Steps that may run at the same time are a group: all count what is done
    at `done`, and the last one has the number of all their parts in `group_parts`, which is 0 in the others.
    """

    _fields_ = [
        *((name, ctypes.c_ssize_t) for name in ("function", "work", "parts", "done", "group_parts", "taken", "count")),
        ("unused", ctypes.c_ssize_t),
    ]


STEP_BYTES = ctypes.sizeof(Step)
TAKEN, COUNT = Step.taken.offset, Step.count.offset

_step_at = record_at(Step)


@intrinsic
def _add_atomically(typingctx, address, value):
    """Add to the integer at an address; returns what it was before. What was written before is seen by who sees it."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], args[1].type.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")

    return types.intp(types.intp, types.intp), codegen


@intrinsic
def _load_atomically(typingctx, address):
    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], args[0].type.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.intp(types.intp), codegen


@intrinsic
def _pause(typingctx):
    """Tell the CPU that this is a loop which waits."""
    architecture = get_default_triple().split("-")[0]

    def codegen(context, builder, signature, args):
        if architecture in ("x86_64", "i686"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        elif architecture in ("aarch64", "arm64"):
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.aarch64.hint")
            builder.call(hint, [ir.IntType(32)(1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _call_plain(typingctx, function):
    """Call the C function at an address with the argument 1."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32)])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [ir.IntType(32)(1)])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


def _give_way() -> int:
    """The address of the function that leaves the core to others for a moment.

    It sleeps, where it can: to an idle core the system moves the thread that is waited for, if that has none.
    """
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).usleep
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_GIVE_WAY = _give_way()


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _walk(steps, first, last, give_way):
    """What one thread does: parts of each step, until all are taken, then wait for those that others took."""
    for i in range(first, last):
        step = _step_at(steps + i * STEP_BYTES)
        function, work, parts, done, group_parts = step.function, step.work, step.parts, step.done, step.group_parts
        taken = steps + i * STEP_BYTES + TAKEN
        while True:
            part = _add_atomically(taken, 1)
            if part >= parts:
                break
            _call(function, work, part, parts)
            _add_atomically(done, 1)
        if group_parts:
            turns = 0
            while _load_atomically(done) < group_parts:
                _pause()
                turns += 1
                if turns > SPINS:
                    _call_plain(give_way)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _reset(steps, first, last):
    for i in range(first, last):
        intp_at(steps + i * STEP_BYTES + TAKEN, 0)[0] = 0
        intp_at(steps + i * STEP_BYTES + COUNT, 0)[0] = 0


@njit(nogil=True, cache=True)
def _run_alone(steps, first, last):
    for i in range(first, last):
        step = _step_at(steps + i * STEP_BYTES)
        for part in range(step.parts):
            _call(step.function, step.work, part, step.parts)


@njit(parallel=True, nogil=True, cache=True)
def _run_together(steps, first, last, threads, give_way):
    _reset(steps, first, last)
    for _ in prange(threads):
        _walk(steps, first, last, give_way)


def compile_runs() -> None:
    """Compile what runs a Program."""
    _run_alone.compile((types.intp,) * 3)
    _run_together.compile((types.intp,) * 5)


class Program:
    """Kernels with their works, run in the order in which they were added. Works stay where they are until it ends."""

    def __init__(self, threads: int | None = None) -> None:
        """`threads`: at most so many run it, by default as many as torch uses."""
        self.threads = most_threads() if threads is None else threads
        self._groups: list[list[tuple[Kernel, ctypes.Structure, int]]] = []
        self._memory: np.ndarray[Any, Any] | None = None
        self._steps = 0

    def __len__(self) -> int:
        """How many groups were added."""
        return len(self._groups)

    def add(self, works: Sequence[tuple[Kernel, ctypes.Structure, int]]) -> None:
        """Add a kernel, its work and the number of its parts; or several that do not depend on each other."""
        self._groups.append(list(works))
        self._memory = None

    def _build(self) -> None:
        """Write the steps to memory, in cache lines of their own."""
        flat = [step for group in self._groups for step in group]
        self._memory = np.zeros(STEP_BYTES * len(flat) + CACHE_LINE, np.uint8)
        self._steps = -(-self._memory.ctypes.data // CACHE_LINE) * CACHE_LINE
        self._firsts, address = [0], self._steps
        for group in self._groups:
            done = address + COUNT
            for i, (kernel, work, parts) in enumerate(group):
                step = Step.from_address(address)
                step.function, step.work, step.parts, step.done = kernel.address, addressof(work), parts, done
                step.group_parts = sum(parts for *_, parts in group) if i == len(group) - 1 else 0
                address += STEP_BYTES
            self._firsts.append((address - self._steps) // STEP_BYTES)

    def run(self, first: int = 0, last: int | None = None, alone: bool = False) -> None:
        """Run the groups from `first` to `last - 1`, by default all; `alone`, on this thread only.

        Not from two threads at once.
        """
        if self._memory is None:
            self._build()
        start, stop = self._firsts[first], self._firsts[len(self) if last is None else last]
        if alone or self.threads == 1:
            _run_alone(self._steps, start, stop)
        else:
            with threads_for(0, self.threads):
                _run_together(self._steps, start, stop, self.threads, _GIVE_WAY)
