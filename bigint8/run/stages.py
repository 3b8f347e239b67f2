"""The pipeline as the driver sees it: steps go in, results come out, in the same order."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ..errors import WorkerDied, WorkerError
from ..model.step import Result, Step


class StageLost(WorkerDied):
    """A stage died, and the steps that were under way are lost. `index`: which one, counted from 0."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index

    def __reduce__(self) -> tuple[type["StageLost"], tuple[int, str]]:
        return StageLost, (self.index, str(self))


@dataclass(frozen=True)
class StageStats:
    """What one stage has done since it was loaded: `busy_seconds` is the time that it computed.

    times_planned: how many times as long as planned its last steps took, where that is known
    name: which stage it is, and where, for people
    """

    busy_seconds: float
    steps: int
    rows: int
    memory_bytes: int = 0
    times_planned: float | None = None
    name: str = ""


@dataclass(frozen=True)
class EngineStats:
    """What the engine does. Times are in seconds since it was started; `busy`: each stage's share of them.

    tokens: generated so far; tokens_per_s: since the statistics before these
    free_pages: of each group, those that nobody holds; restarts: of stages
    slow: stages that are slow beside the others, for people: which, where, and how slow
    """

    seconds: float
    tokens: int
    tokens_per_s: float
    waiting: int
    running: int
    free_pages: tuple[int, ...]
    restarts: int
    stages: tuple[StageStats, ...]
    busy: tuple[float, ...]
    slow: tuple[str, ...] = ()


@dataclass(frozen=True)
class Health:
    """Whether the engine can run a step now.

    state: "running"; "restoring" while a stage that was lost comes back, or one says nothing; "ended" for good
    stage: which one was lost; error: what ended the engine
    """

    state: Literal["running", "restoring", "ended"]
    stage: int | None = None
    error: str | None = None


class Stages(Protocol):
    """The stages in order. Every step gives one result, also one that keeps no row, or ends at an earlier stage.

    A stage executes the steps in the order in which they were sent. A thread may send while another one waits in
    `receive`; the other methods are called by one thread at a time.
    """

    @property
    def count(self) -> int:
        """How many stages there are."""

    def send(self, step: Step) -> None:
        """Put a step on its way; returns at once. A stage that is lost may show here or in `receive`."""

    def receive(self, timeout: float) -> Result:
        """The next result, in the order of sending.

        Raises StageLost when a stage died, WorkerError when it failed or nothing came within `timeout` seconds.
        """

    def restore(self) -> list[int]:
        """Start lost stages again and connect; the indices of those whose pages are empty now.

        Results of steps that were sent before are not received any more. Raises WorkerError if it cannot be done.
        """

    def lost(self) -> StageLost | None:
        """What `receive` would raise now because a stage is gone, None if all are there. Never waits."""

    def quiet(self) -> int | None:
        """A stage that has said nothing for a while, and may be lost. Never waits."""

    def stats(self) -> Sequence[StageStats]:
        """One for each stage. May be called while another thread waits in `receive`."""


class LocalStages:
    """One stage, the whole model, in this process: `receive` runs the oldest step that was sent."""

    count = 1

    def __init__(self, run: Callable[[Step], Result], memory_bytes: int = 0) -> None:
        self._run, self._memory_bytes = run, memory_bytes
        self._sent: deque[Step] = deque()
        self._arrived = threading.Semaphore(0)
        self._stats = StageStats(0.0, 0, 0, memory_bytes)

    def send(self, step: Step) -> None:
        self._sent.append(step)
        self._arrived.release()

    def receive(self, timeout: float) -> Result:
        if not self._arrived.acquire(timeout=timeout):
            raise WorkerError(f"no step was sent within {timeout:.0f} s")
        step = self._sent.popleft()
        start = time.perf_counter()
        result = self._run(step)
        busy = time.perf_counter() - start
        before = self._stats
        self._stats = StageStats(
            before.busy_seconds + busy, before.steps + 1, before.rows + step.rows, self._memory_bytes
        )
        return result

    def restore(self) -> list[int]:
        """Nothing is ever lost here but the steps that were not run."""
        while self._arrived.acquire(blocking=False):
            self._sent.popleft()
        return []

    def lost(self) -> None:
        """It is this process."""

    def quiet(self) -> None:
        """It is this process."""

    def stats(self) -> list[StageStats]:
        return [self._stats]
