"""The decode step of a stage as CUDA graphs: one for each bucket of batch sizes, captured once, replayed at each step.

A decode step of a small model is many short launches, each of which costs the host more time than the GPU. A graph
starts all of them at once. It reads its inputs from fixed places, so a step's inputs are copied there first.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from bigint8_kernels.step import Batch
from torch import Tensor

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""Rows of the steps that are captured. A step takes the next larger bucket, filled with rows that are no token."""

WARM_UPS = 3
"""Runs before a capture, as PyTorch's notes on CUDA graphs ask for: they compile, and allocate what stays."""

Run = Callable[[Tensor, Batch], Tensor]
"""From the rows that go in (T, H), which it may change, to those that come out."""


@dataclass(frozen=True)
class Shape:
    """What goes into the steps of a stage: the width H of its rows, their dtype, pages of a table for each group, and
    how many values of a head are rotated (0 for none)."""

    hidden: int
    dtype: torch.dtype
    table_widths: tuple[int, ...]
    rotated: int = 0

    def input_bytes(self, rows: int) -> int:
        """Bytes of the fixed inputs of graphs for up to so many rows, before any is allocated."""
        integers = 5 + sum(self.table_widths)  # place and sequence, these of a row that is no token, and its page
        return rows * (self.hidden * self.dtype.itemsize + 4 * integers + 4 * self.rotated)


class _Inputs:
    """The places that all graphs read, for up to `rows` rows; a graph of fewer rows reads the first ones."""

    def __init__(self, shape: Shape, rows: int, device: torch.device) -> None:
        def ints(*size: int, value: int = 0) -> Tensor:
            return torch.full(size, value, dtype=torch.int32, device=device)

        self._x_BH = torch.zeros(rows, shape.hidden, dtype=shape.dtype, device=device)
        self._places_B, self._sequences_B = ints(rows), torch.arange(rows, dtype=torch.int32, device=device)
        self._tables = tuple(ints(rows, width, value=-1) for width in shape.table_widths)
        half = shape.rotated // 2
        self._angles = [torch.zeros(rows, half, device=device) for _ in range(2)] if half else [None, None]
        # what a row that is no token has: place 0 of a sequence of its own, whose page is -1
        self._zeros_B, self._own_B, self._no_page_B1 = ints(rows), self._sequences_B.clone(), ints(rows, 1, value=-1)

    def first(self, rows: int) -> tuple[Tensor, Batch]:
        """What a graph of so many rows is captured with."""
        cos, sin = (None if each is None else each[:rows] for each in self._angles)
        tables = tuple(table[:rows] for table in self._tables)
        return self._x_BH[:rows], Batch(self._places_B[:rows], self._sequences_B[:rows], tables, rows, cos, sin)

    def fill(self, x_TH: Tensor, batch: Batch, bucket: int) -> None:
        """Copy the inputs of a step there, and let the rows after it, up to the bucket, be no tokens."""
        rows, rest = batch.rows, slice(batch.rows, bucket)
        copies = [(self._x_BH[:rows], x_TH), (self._places_B[:rows], batch.places_T)]
        copies.append((self._sequences_B[:rows], batch.sequences_T))
        copies += [(to[:rows, : of.shape[1]], of) for to, of in zip(self._tables, batch.tables, strict=True)]
        for to, of in zip(self._angles, (batch.cos_TR, batch.sin_TR), strict=True):
            if to is not None and of is not None:
                copies.append((to[:rows], of))
        if rows < bucket:
            copies.append((self._places_B[rest], self._zeros_B[rest]))
            copies.append((self._sequences_B[rest], self._own_B[rest]))
            copies += [(table[rest, :1], self._no_page_B1[rest]) for table in self._tables]
        torch._foreach_copy_([to for to, _ in copies], [of for _, of in copies])


@torch.no_grad()
def compile_steps(run: Run, shape: Shape, device: torch.device, most_rows: int) -> None:
    """Compile and tune what steps with rows of prompts launch, up to `most_rows` rows; `Graphs.capture` does the rest.

    Runs such steps, of rows that are no tokens: they write no keys and values. Each number of rows that has kernels of
    its own takes one step, and two more have a generated token or two besides.
    """
    rounded = [2**i for i in range(4, most_rows.bit_length())]
    for rows in sorted({*rounded, most_rows}):
        x_BH, batch = _Inputs(shape, rows, device).first(rows)
        run(x_BH, replace(batch, few=0))
    for few in range(1, min(3, most_rows)):
        x_BH, batch = _Inputs(shape, most_rows, device).first(most_rows)
        run(x_BH, replace(batch, few=few))


class Graphs:
    """`run`, with its steps of generated tokens captured in CUDA graphs. On one device, one step after the other."""

    def __init__(self, run: Run, shape: Shape, device: torch.device, buckets: Sequence[int] = BUCKETS) -> None:
        """Nothing is captured yet: until `capture`, steps run as they are."""
        self._run, self._shape, self._device = run, shape, device
        self._buckets = sorted(buckets)
        self._inputs: _Inputs | None = None
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool_bytes = 0

    @property
    def input_bytes(self) -> int:
        """Bytes of the fixed inputs, whether they are allocated yet or not."""
        return self._shape.input_bytes(self._buckets[-1])

    @torch.no_grad()
    def capture(self) -> None:
        """Run the step of each bucket with rows that are no tokens, then capture it. All graphs share one memory pool.

        What the pool took of the device is `pool_bytes` afterwards. The largest bucket comes first: the others find
        their memory in what it has left.
        """
        self._inputs = _Inputs(self._shape, self._buckets[-1], self._device)
        with torch.cuda.device(self._device):
            side, main = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
            side.wait_stream(main)
            with torch.cuda.stream(side):
                for bucket in reversed(self._buckets):
                    for _ in range(WARM_UPS):
                        self._run(*self._inputs.first(bucket))
            main.wait_stream(side)
            torch.cuda.empty_cache()  # what the runs have left, or else the first capture gives it back meanwhile
            before = torch.cuda.memory_reserved(self._device)
            pool = torch.cuda.graph_pool_handle()
            for bucket in reversed(self._buckets):
                graph = torch.cuda.CUDAGraph()
                with _capturing(graph, pool, side):
                    out_BH = self._run(*self._inputs.first(bucket))
                self._captured[bucket] = graph, out_BH
            self.pool_bytes = torch.cuda.memory_reserved(self._device) - before

    @torch.no_grad()
    def __call__(self, x_TH: Tensor, batch: Batch) -> Tensor:
        """One step. The result is good until the next one. Waits for nothing."""
        bucket = self._bucket_of(batch)
        if bucket is None or self._inputs is None:
            return self._run(x_TH, batch)
        self._inputs.fill(x_TH, batch, bucket)
        graph, out_BH = self._captured[bucket]
        graph.replay()
        return out_BH[: batch.rows]

    def _bucket_of(self, batch: Batch) -> int | None:
        """The smallest bucket that holds a step; None for one with rows of prompts, or several rows of a sequence."""
        if batch.few != batch.rows or any(len(table) != batch.rows for table in batch.tables):
            return None
        widths = zip(batch.tables, self._shape.table_widths, strict=True)
        if any(table.shape[1] > width for table, width in widths):
            return None
        return next((bucket for bucket in self._captured_buckets() if bucket >= batch.rows), None)

    def _captured_buckets(self) -> list[int]:
        return [bucket for bucket in self._buckets if bucket in self._captured]


def _capturing(graph: torch.cuda.CUDAGraph, pool: Any, side: torch.cuda.Stream) -> AbstractContextManager[None]:
    """Other threads may go on to allocate: a stage receives its next step meanwhile."""
    return torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local")
