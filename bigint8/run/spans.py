"""What a worker did when: spans of time for a picture of a pipeline, and sums for its statistics."""

import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

from ..model.step import Step
from ..plan.plan import Plan
from .pace import Steps, times_planned
from .stages import StageStats
from .trace import DRIVER, Trace

MOST_SPANS = 100_000
"""How many spans a worker keeps; older ones go."""


@dataclass(frozen=True)
class Span:
    """What a worker did with a step, in nanoseconds of its own box's `time.time_ns()`.

    name: what it is
    - "hop": from the sender's start of sending, by the sender's clock, until the message was whole
    - "ring": the same, of rows that came back for the head
    - "wait": from then on, until its turn came
    - "compute": the stage; on a GPU, until it was told all of it
    - "head": logits, and the choice of tokens
    - "send": until the computing thread was free again
    """

    name: str
    number: int
    start_ns: int
    end_ns: int


@dataclass
class Spans:
    """The last spans of a worker, kept while `on`."""

    on: bool = False
    _kept: deque[Span] = field(default_factory=lambda: deque(maxlen=MOST_SPANS))

    def add(self, name: str, number: int, start_ns: int, end_ns: int) -> None:
        if self.on:
            self._kept.append(Span(name, number, start_ns, end_ns))

    def take(self) -> list[Span]:
        """Those kept so far, oldest first; they are kept no longer."""
        taken = []
        while self._kept:
            taken.append(self._kept.popleft())
        return taken


@dataclass(frozen=True)
class WorkerStats(StageStats):
    """What a stage has done since its worker's links were first made, `seconds` ago.

    memory_bytes, peak_bytes: of its process on the host, now and at most
    """

    peak_bytes: int = 0
    seconds: float = 0.0


@dataclass
class Tally:
    """Counts what a stage does."""

    _started: float = field(default_factory=time.monotonic)
    _busy_ns: int = 0
    _steps: int = 0
    _rows: int = 0
    _last: Steps = field(default_factory=Steps)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, busy_ns: int, step: Step | None = None) -> None:
        """Time of computing. `step`: if it was all of a step but for what the head does."""
        with self._lock:
            self._busy_ns += busy_ns
            if step is not None:
                self._steps += 1
                self._rows += step.rows
                self._last.add(step)
            self._last.seconds += busy_ns / 1e9

    def stats(self, plan: Plan | None = None, index: int = 0) -> WorkerStats:
        """What was counted. `plan`, `index`: of the stage, whose last steps are held against the time model."""
        with self._lock:
            busy, steps, rows, last = self._busy_ns / 1e9, self._steps, self._rows, self._last.copy()
        resident, peak = _memory()
        factor = None if plan is None else times_planned(plan, index, last)
        seconds = time.monotonic() - self._started
        return WorkerStats(busy, steps, rows, resident, factor, peak_bytes=peak, seconds=seconds)


def _memory() -> tuple[int, int]:
    """Resident and peak bytes of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    resident = psutil.Process().memory_info().rss
    return resident, max(resident, peak)


def draw(trace: Trace, stages: Sequence[Sequence[Span]]) -> None:
    """Add what the stages did to a record, a row for each stage, with an arrow for each hop."""
    rows = [f"stage {index}" for index in range(len(stages))]
    for row in rows:
        trace.row(row)
    for index, (row, spans) in enumerate(zip(rows, stages, strict=True)):
        hop: Span | None = None
        for span in spans:
            if span.name in ("hop", "ring"):
                hop = span
            elif span.name != "wait":
                args = None if hop is None else {"hop ms": (hop.end_ns - hop.start_ns) / 1e6}
                trace.span(row, f"{span.name} {span.number}", span.start_ns, span.end_ns, args)
                if hop is not None:
                    sender = rows[-1] if hop.name == "ring" else rows[index - 1] if index else DRIVER
                    trace.arrow(f"step {hop.number}", sender, hop.start_ns, row, span.start_ns)
                hop = None
