"""Which stages say nothing any more, or stay at one step for good: what no connection that ends would tell.

A process that is stopped, and a box that is cut off, leave their connections open. So each stage sends the driver a
pulse (`flow`), and the driver counts, in ticks of its own, how long it has heard nothing. It counts ticks and does not
read a clock: while a machine is paused, or the driver is, no tick passes, and nobody is late when it goes on.

Two deadlines, because to end a worker that only takes long costs more than to wait for one that hangs:

- silence. The thread that sends pulses needs nothing but Python, and neither products nor reading hold that. A call
  that might would still be a part of a step. So a stage is given up that has been silent for SILENT_SECONDS, or for as
  long as its longest step should take, if that is more.
- a step without end, in a process that is alive. The first step may compile kernels, or read weights that are mapped
  files. So it may take STEP_SECONDS, or MANY times what the time model says of the longest step and of the load.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from ..plan.plan import Plan
from ..plan.predict import PlanTimes
from ..plan.time import Rows

TICK_SECONDS = 0.25
"""How often the driver looks."""

QUIET_SECONDS = 1.25
"""A stage that was not heard for so long is not well, as far as anybody outside is told. It may still come back."""

SILENT_SECONDS = 8.0
"""A stage that was not heard for so long is lost: its worker is ended and started again."""

STEP_SECONDS = 60.0
"""How long a step may take at least, in a process that is alive."""

MANY = 20
"""How many times what the time model says a step may take."""


@dataclass(frozen=True)
class Patience:
    """How long a stage may say nothing, and be at one step."""

    silent_seconds: float = SILENT_SECONDS
    step_seconds: float = STEP_SECONDS


def patience_of(plan: Plan) -> list[Patience]:
    """For each stage of a plan, by the time model's longest step: a whole chunk at the end of the longest sequence,
    with a token of each sequence."""
    times, work = PlanTimes(plan).together, plan.workload
    chunk = min(work.chunk, work.context)
    rows = Rows(work.sequences, work.context, chunk, work.context - chunk)
    found = []
    for stage in plan.stages:
        longest, load = times.stage_seconds(stage, rows), times.load_seconds(stage)
        found.append(Patience(max(SILENT_SECONDS, longest), max(STEP_SECONDS, MANY * (longest + load))))
    return found


@dataclass
class _Heard:
    """What was heard of a stage. Ticks since: anything was heard; it has been at one message."""

    came: int = 0
    handled: int = -1
    busy: bool = False
    quiet: int = 0
    at_one: int = 0


class Watch:
    """Counts how long each stage was not heard, and was at one step. `heard` and `tick` may be called by any thread."""

    def __init__(self, patience: Sequence[Patience]) -> None:
        self._patience = patience
        self._stages = [_Heard() for _ in patience]
        self._lock = threading.Lock()

    def heard(self, index: int, handled: int, busy: bool) -> None:
        """A stage's pulse: how many messages it has worked on, and whether it is at one."""
        with self._lock:
            stage = self._stages[index]
            if handled != stage.handled or not busy:
                stage.at_one = 0
            stage.handled, stage.busy = handled, busy

    def tick(self, came: Sequence[int]) -> dict[int, str]:
        """TICK_SECONDS have passed. `came`: how often anything has come from each stage. Who is lost now, and why."""
        lost = {}
        with self._lock:
            for index, (stage, patience, count) in enumerate(zip(self._stages, self._patience, came, strict=True)):
                stage.quiet = 0 if count != stage.came else stage.quiet + 1
                stage.at_one = stage.at_one + 1 if stage.busy else 0
                stage.came = count
                if stage.quiet * TICK_SECONDS >= patience.silent_seconds:
                    lost[index] = f"nothing was heard of it for {patience.silent_seconds:.0f} s"
                elif stage.at_one * TICK_SECONDS >= patience.step_seconds:
                    lost[index] = f"it has been at one step for {patience.step_seconds:.0f} s"
        return lost

    def quiet(self) -> int | None:
        """The first stage that was not heard for QUIET_SECONDS."""
        with self._lock:
            late = (i for i, stage in enumerate(self._stages) if stage.quiet * TICK_SECONDS >= QUIET_SECONDS)
            return next(late, None)
