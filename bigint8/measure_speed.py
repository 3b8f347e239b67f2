"""The speed of this machine's devices, as the time model takes it: measured with the steps of a small model.

Each rate is what two steps differ in: weights from one row of large blocks and of small ones, operations from more
rows, keys and values from more tokens before. So it is the rate of the whole step, with all that kernels lose.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from bigint8_kernels import float_linear
from bigint8_kernels.step import PAGE

from .examine_steps import LlamaStack, seconds_of
from .model.graphs import Graphs, Shape
from .model.offload import OpenFile
from .model.program import Rows
from .plan.devices import Device, usable_cpus
from .plan.speed import UNKNOWN_DISK, DiskSpeed, Speed

HIDDEN, BLOCKS = 2048, 6
"""Of the large blocks: 50 MB each in int8, so that no cache holds them."""

SMALL_HIDDEN, SMALL_BLOCKS = 512, 8
"""Of the small blocks, whose weights stay in the cache."""

FEW_ROWS, SHORT_ROWS, PROMPT_ROWS, CONTEXT = 8, 64, 320, 4096

TURNS, REPEATS = 3, 3
"""How often all steps are timed in turn, and each of them in its turn."""

HEAD_ROWS = 32768
"""Rows of a 16-bit output head."""

COPY_BYTES = 2**28

READ_BYTES, READS = 2**25, 5
"""Read of a file at once, as a large block is; how often all of it is read from the file cache."""

LEAST_SECONDS = 1e-6
"""Differences are no less: noise can make them zero or negative."""


@dataclass(frozen=True)
class _Steps:
    """A stack of blocks on a device that is ready to run steps."""

    stack: LlamaStack
    device: torch.device

    def seconds(self, rows: int, before: int, kind: Literal["decode", "prompt"]) -> float:
        """Of a step of so many sequences, or of a prompt's tokens, after `before` others."""
        counts = [(before, 1)] * rows if kind == "decode" else [(before, rows)]
        x, batch = self.stack.given(counts, rows if kind == "decode" else 0)
        if self.device.type == "cpu":
            recorded = Rows(self.stack.program, self.stack.hidden, rows, self.device)
            return _seconds(lambda: recorded.run(batch, x), self.device)
        if kind == "prompt":
            return _seconds(lambda: self.stack.run(x, batch), self.device)
        tables = tuple(table.shape[1] for table in batch.tables)
        graphs = Graphs(
            self.stack.run, Shape(self.stack.hidden, x.dtype, tables, self.stack.width), self.device, (rows,)
        )
        graphs.capture()
        return _seconds(lambda: graphs(x, batch), self.device)


def measure_device(device: Device) -> Iterator[tuple[int, Speed]]:
    """The speed of a device by the number of cores: of a CPU with one and with all, of a GPU once."""
    if device.kind != "cpu":
        yield 1, measure(torch.device(device.name), f"measured on {device.model}")
        return
    threads = torch.get_num_threads()
    try:
        for cores in sorted({1, usable_cpus()}):
            torch.set_num_threads(cores)
            yield cores, measure(torch.device("cpu"), f"measured on {device.model}, {cores} of them used")
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def measure(device: torch.device, source: str) -> Speed:
    """The speed of a device with torch's present number of threads. Takes a minute or two, and 0.5 GB of its memory."""
    small = _Steps(LlamaStack(SMALL_BLOCKS, SMALL_HIDDEN, PROMPT_ROWS // PAGE + 2, device), device)
    large = _Steps(LlamaStack(BLOCKS, HIDDEN, FEW_ROWS * 2 + CONTEXT // PAGE + 32, device), device)
    small_block, large_block = small.stack.weight_values(0), large.stack.weight_values(0)
    weights = BLOCKS * large_block

    head = _head(device)
    times = _in_turns(
        {
            "one": lambda: large.seconds(1, 0, "decode"),
            "few": lambda: large.seconds(FEW_ROWS, 0, "decode"),
            "far": lambda: large.seconds(1, CONTEXT, "decode"),
            "short": lambda: large.seconds(SHORT_ROWS, 0, "prompt"),
            "prompt": lambda: large.seconds(PROMPT_ROWS, 0, "prompt"),
            "far prompt": lambda: large.seconds(PROMPT_ROWS, CONTEXT - PROMPT_ROWS, "prompt"),
            "small one": lambda: small.seconds(1, 0, "decode"),
            "small short": lambda: small.seconds(SHORT_ROWS, 0, "prompt"),
            "small prompt": lambda: small.seconds(PROMPT_ROWS, 0, "prompt"),
            "one of the head": lambda: head(1),
            "few of the head": lambda: head(FEW_ROWS),
            "bus": lambda: _bus_seconds(device),
        }
    )

    def rate(amount: float, seconds: float) -> float:
        return amount / max(seconds, LEAST_SECONDS)

    attention = rate(4 * BLOCKS * HIDDEN * PROMPT_ROWS * (CONTEXT - PROMPT_ROWS), times["far prompt"] - times["prompt"])

    def row_seconds(what: str, hidden: int, blocks: int) -> float:
        """Of a row of a prompt, in one block, without attention: there a row sees half of the others."""
        seen = 4 * hidden * (PROMPT_ROWS**2 - SHORT_ROWS**2) / 2 / attention
        seconds = (times[f"{what}prompt"] - times[f"{what}short"]) / blocks - seen
        return max(seconds, LEAST_SECONDS) / (PROMPT_ROWS - SHORT_ROWS)

    # a block's seconds are block_seconds + its weights / read: two sizes of blocks give both; so it is with the
    # operations and the values of a prompt's rows
    read = rate(large_block - small_block, times["one"] / BLOCKS - times["small one"] / SMALL_BLOCKS)
    row, small_row = row_seconds("", HIDDEN, BLOCKS), row_seconds("small ", SMALL_HIDDEN, SMALL_BLOCKS)
    ops, small_ops, values, small_values = (
        2 * large_block, 2 * small_block, large.stack.values_a_row, small.stack.values_a_row
    )  # fmt: skip
    value_seconds = max(0.0, small_row * ops - row * small_ops) / (small_values * ops - values * small_ops)
    first = times["short"] - BLOCKS * (SHORT_ROWS * row + 4 * HIDDEN * SHORT_ROWS**2 / 2 / attention)
    return Speed(
        read_bytes_per_s=read,
        cache_bytes_per_s=rate(BLOCKS * CONTEXT * large.stack.kv_bytes, times["far"] - times["one"]),
        row_ops_per_s=rate(2 * (FEW_ROWS - 1) * weights, times["few"] - times["one"]),
        float_row_ops_per_s=rate(
            2 * (FEW_ROWS - 1) * HEAD_ROWS * HIDDEN, times["few of the head"] - times["one of the head"]
        ),
        prompt_ops_per_s=ops / max(row - values * value_seconds, row / 10),
        prompt_read_bytes_per_s=min(read, rate(weights, first)),
        prompt_values_per_s=1 / max(value_seconds, 1e-15),
        attention_ops_per_s=attention,
        block_seconds=max(times["small one"] / SMALL_BLOCKS - small_block / read, LEAST_SECONDS),
        bus_bytes_per_s=COPY_BYTES / times["bus"],
        source=source,
    )


def _in_turns(steps: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """The seconds of each step: all are timed in turn, again and again, so that what else the machine does for a while
    spoils few turns of each."""
    turns = [{name: step() for name, step in steps.items()} for _ in range(TURNS)]
    return {name: median(turn[name] for turn in turns) for name in steps}


def measure_disk(folder: Path) -> DiskSpeed:
    """The disk below a folder, as blocks are brought in from files: by one thread, past the file cache and from it.

    Writes a file of 256 MB there, which is gone afterwards. Raises OSError.
    """
    block = torch.empty(READ_BYTES, dtype=torch.uint8).random_(generator=torch.Generator().manual_seed(0)).numpy().data
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="bigint8-doctor-") as written:
        for _ in range(COPY_BYTES // READ_BYTES):
            written.write(block)
        written.flush()
        os.fsync(written.fileno())
        file = OpenFile(Path(written.name))

        def read() -> float:
            started = time.perf_counter()
            for start in range(0, COPY_BYTES, READ_BYTES):
                file.read(block, start)
            return COPY_BYTES / (time.perf_counter() - started)

        def read_past_the_cache() -> float:
            os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            return read()

        first = read_past_the_cache() if hasattr(os, "posix_fadvise") else UNKNOWN_DISK.bytes_per_s
        return DiskSpeed(first, max(read() for _ in range(READS)), f"measured in {folder}")


def _head(device: torch.device) -> Callable[[int], float]:
    """Seconds of a 16-bit output head by the number of rows."""
    weight = torch.randn(HEAD_ROWS, HIDDEN, device=device).to(torch.bfloat16)

    def seconds(rows: int) -> float:
        x = torch.randn(rows, HIDDEN, device=device)
        if device.type == "cuda":
            narrow = x.to(torch.bfloat16)
            return _seconds(lambda: narrow @ weight.T, device)
        return _seconds(lambda: float_linear(x, weight), device)

    return seconds


def _bus_seconds(device: torch.device) -> float:
    """To copy COPY_BYTES from page-locked host memory to a GPU; for the CPU, from memory to memory."""
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return _seconds(lambda: target.copy_(source, non_blocking=True), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median seconds of a few calls, after one that does not count."""
    return seconds_of(work, device, REPEATS)
