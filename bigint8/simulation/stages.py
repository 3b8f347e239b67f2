"""The stages of one pipeline in simulated time: what a step takes there is what the time model says.

As in `run/flow.py`: each stage computes one step at a time, in the order in which they come; where the head is tied to
the embeddings, the rows that it takes come back to the first stage, which takes them before other steps. A step for
which nothing is kept ends with the last block. A link carries one step at a time, while its ends compute.
"""

from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np

from ..model.step import Result, Step
from ..plan.predict import PlanTimes
from ..plan.time import DRIVER_SECONDS, Work
from .clock import Clock


class SimulatedStages:
    """Takes steps, and gives each result to `back` when it is there. `busy_seconds` of each stage, so far."""

    def __init__(self, times: PlanTimes, clock: Clock, back: Callable[[Result], None]) -> None:
        self._times, self._clock, self._back = times, clock, back
        self.count = len(times.plan.stages)
        self._windows = times.model.layout.groups
        self._driver_seconds = DRIVER_SECONDS if self.count > 1 else 0.0
        self._hops: dict[tuple[int, int], float] = {}
        self.busy_seconds = [0.0] * self.count
        self._epoch = 0
        self._forget()

    def _forget(self) -> None:
        """Nothing is under way."""
        now = self._clock.now
        self._epoch += 1
        self._steps: deque[tuple[Step, Work]] = deque()  # for the first stage
        self._rows: deque[tuple[Step, Work]] = deque()  # for the head in the first stage
        self._is_computing = False  # the first stage
        self._under_way: deque[int] = deque()
        self._came: dict[int, Result] = {}
        self._free, self._link_free = [now] * self.count, [now] * self.count
        self._spans: list[deque[tuple[float, float]]] = [deque() for _ in range(self.count)]

    def send(self, step: Step) -> None:
        """A step comes to the first stage."""
        self._under_way.append(step.number)
        self._steps.append((step, self._work(step)))
        self._next()

    def lose_all(self) -> None:
        """A stage is lost: so is everything that is under way, and what was to be computed is not."""
        now = self._clock.now
        for stage, spans in enumerate(self._spans):
            self.busy_seconds[stage] -= sum(end - max(start, now) for start, end in spans if end > now)
        self._forget()

    # --- the way of a step ---------------------------------------------------------------------------------------

    def _next(self) -> None:
        """The first stage takes rows for the head, or else a step, if it is free."""
        if self._is_computing or not (self._rows or self._steps):
            return
        self._is_computing = True
        if self._rows:
            step, work = self._rows.popleft()
            at = self._compute(0, self._clock.now, self._times.head.seconds(work.head))
            self._later(at, partial(self._first_is_done, step, work, True))
        else:
            step, work = self._steps.popleft()
            at = self._compute(0, self._clock.now, self._seconds(0, work))
            self._later(at, partial(self._first_is_done, step, work, False))

    def _first_is_done(self, step: Step, work: Work, is_head: bool) -> None:
        self._is_computing = False
        if is_head:
            self._answer(step, self._clock.now)
        else:
            self._pass_on(step, work)
        self._next()

    def _pass_on(self, step: Step, work: Work) -> None:
        """Through the other stages: they take steps in this order, so it is known when each takes this one."""
        at, last = self._clock.now, (step.stages or self.count) - 1
        for stage in range(1, last + 1):
            at = self._hop(stage - 1, at, work.few + work.prompt)
            at = self._compute(stage, max(at, self._free[stage]), self._seconds(stage, work))
        if self._times.is_ring and work.kept and last == self.count - 1:
            self._later(self._hop(last, at, work.kept), partial(self._to_head, step, work))
        else:
            self._answer(step, at)

    def _to_head(self, step: Step, work: Work) -> None:
        self._rows.append((step, work))
        self._next()

    def _answer(self, step: Step, at: float) -> None:
        result = Result(step.number, np.zeros(len(step.keep), np.int32))
        self._later(at + self._driver_seconds, partial(self._arrived, result))

    def _arrived(self, result: Result) -> None:
        """Results go to the driver in the order of their steps: one that kept no row may have overtaken another."""
        epoch = self._epoch
        self._came[result.number] = result
        while epoch == self._epoch and self._under_way and self._under_way[0] in self._came:
            self._back(self._came.pop(self._under_way.popleft()))

    def _later(self, at: float, call: Callable[[], None]) -> None:
        """Call this then, unless a stage is lost before."""
        epoch = self._epoch
        self._clock.at(at, lambda: call() if epoch == self._epoch else None)

    # --- times ---------------------------------------------------------------------------------------------------

    def _work(self, step: Step) -> Work:
        """What the rows of a step ask for: a generated token sees all up to itself, one of a prompt on average half a
        token less, as in `TimeModel.work`."""
        few, seen = step.few, step.places + 1
        by_few: list[float] = []
        by_prompt: list[float] = []
        for window in self._windows:
            if few:
                by_few.append(int(seen[:few].sum() if window is None else np.minimum(seen[:few], window).sum()))
            else:
                by_few.append(0.0)
            if few < step.rows:
                middles = seen[few:] - 0.5
                by_prompt.append(float(middles.sum() if window is None else np.minimum(middles, window).sum()))
            else:
                by_prompt.append(0.0)
        return Work(few, step.rows - few, tuple(by_few), tuple(by_prompt), len(step.keep))

    def _seconds(self, stage: int, work: Work) -> float:
        """Of a stage's blocks, and of the head where it follows them at once."""
        seconds = self._times.blocks[stage].seconds(work)
        if work.kept and stage == self._times.head_stage and not self._times.is_ring:
            seconds += self._times.head.seconds(work.head)
        return seconds

    def _compute(self, stage: int, start: float, seconds: float) -> float:
        """The stage computes from then on; until when."""
        end = self._free[stage] = start + seconds
        self.busy_seconds[stage] += seconds
        spans = self._spans[stage]
        while spans and spans[0][1] <= self._clock.now:
            spans.popleft()
        spans.append((start, end))
        return end

    def _hop(self, stage: int, at: float, rows: int) -> float:
        """So many rows leave a stage; when they are where they go."""
        seconds = self._hops.get((stage, rows))
        if seconds is None:
            seconds = self._hops[stage, rows] = self._times.hop_seconds(stage, rows)
        arrived = self._link_free[stage] = max(at, self._link_free[stage]) + seconds
        return arrived
