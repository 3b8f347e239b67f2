"""Progress of loading: a bar for each worker on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn

from ..units import decimal, speed

Watch = Callable[[int, int, int], None]
"""Told how far a load is: which one, its bytes done, its bytes in all. Called from any thread."""

Shown = bool | Watch
"""Whether progress is shown, or who is told of it instead."""

LINE_SECONDS = 5.0
"""How often a plain line is printed."""


class LoadProgress:
    """Progress of one or more loads, on standard error or for somebody who watches.

    `names` label the bars; `update` may come from any thread.
    """

    def __init__(self, names: list[str], enabled: Shown = True) -> None:
        self._names, self._enabled = names, enabled is True
        self._watch = enabled if callable(enabled) else None
        self._console = Console(stderr=True)
        self._bars: Progress | None = None
        self._tasks: list[TaskID] = []
        self._started: list[float | None] = [None] * len(names)  # when each began to read
        self._printed = [time.monotonic()] * len(names)
        self._done = [False] * len(names)

    def __enter__(self) -> "LoadProgress":
        if self._enabled and self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=False),
                SpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._tasks = [self._bars.add_task(name, total=None) for name in self._names]
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self, index: int, done_bytes: int, total_bytes: int) -> None:
        """`done_bytes` of `total_bytes` are read and quantized by load number `index`."""
        if self._watch is not None:
            self._watch(index, done_bytes, total_bytes)
        elif self._bars is not None:
            self._bars.update(self._tasks[index], completed=done_bytes, total=total_bytes)
        elif self._enabled:
            self._print_line(index, done_bytes, total_bytes)

    def _print_line(self, index: int, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        started = self._started[index]
        if started is None:
            started = self._started[index] = now
        complete = done_bytes >= total_bytes
        if self._done[index] or not (complete or now - self._printed[index] >= LINE_SECONDS):
            return
        self._printed[index], self._done[index] = now, complete
        line = f"{self._names[index]}: {decimal(done_bytes)} of {decimal(total_bytes)}"
        if done_bytes and now > started and not complete:
            left = (total_bytes - done_bytes) / done_bytes * (now - started)
            line += f", {speed(done_bytes, now - started)}, {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)
