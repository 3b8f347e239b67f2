"""The stages of one pipeline in simulated time: what a step takes there is what the time model says.

As in `run/flow.py`: each stage computes one step at a time, in the order in which they come; where the head is tied to
the embeddings, the rows that it takes come back to the first stage, which takes them before other steps. A step for
which nothing is kept ends with the last block. A link carries one step at a time, while its ends compute.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ..model.step import Result, Step
from ..plan.offload import step_seconds
from ..plan.predict import PlanTimes
from ..plan.time import DRIVER_SECONDS, Work
from .clock import Clock


@dataclass(eq=False)
class _Way:
    """A step on its way: what it asks for, the seconds of each kind of stage, and when which stage computes it.

    times: alone, or while other steps are under way
    """

    step: Step
    work: Work
    times: PlanTimes
    kind_seconds: list[float]
    spans: list[tuple[int, float, float]] = field(default_factory=list)


class SimulatedStages:
    """Takes steps, and gives each result to `back` when it is there. `busy_seconds` of each stage, so far."""

    def __init__(self, times: PlanTimes, clock: Clock, back: Callable[[Result], None]) -> None:
        self._times, self._clock, self._back = times, clock, back
        self.count = len(times.plan.stages)
        self._windows = times.model.layout.groups
        self._driver_seconds = DRIVER_SECONDS if self.count > 1 else 0.0
        self._hops: dict[tuple[int, int], float] = {}
        kinds = list(dict.fromkeys(times.blocks))  # most stages cost the same: each kind is computed once a step
        self._kind_of = [kinds.index(cost) for cost in times.blocks]
        self._examples = [times.blocks.index(cost) for cost in kinds]
        self.busy_seconds = [0.0] * self.count
        self._epoch = 0
        self._forget()

    def _forget(self) -> None:
        """Nothing is under way."""
        now = self._clock.now
        self._epoch += 1
        self._steps: deque[_Way] = deque()  # for the first stage
        self._rows: deque[_Way] = deque()  # for the head in the first stage
        self._is_computing = False  # the first stage
        self._under_way: dict[int, _Way] = {}  # by the steps' numbers, in their order
        self._came: dict[int, Result] = {}
        self._free, self._link_free = [now] * self.count, [now] * self.count

    def send(self, step: Step) -> None:
        """A step comes to the first stage."""
        work = self._work(step)
        times = self._times.together if self._under_way else self._times
        seconds = [times.blocks[stage].seconds(work) for stage in self._examples]
        way = self._under_way[step.number] = _Way(step, work, times, seconds)
        self._steps.append(way)
        self._next()

    def lose_all(self) -> None:
        """A stage is lost: so is everything that is under way, and what was to be computed is not."""
        now = self._clock.now
        for way in self._under_way.values():
            for stage, start, end in way.spans:
                if end > now:
                    self.busy_seconds[stage] -= end - max(start, now)
        self._forget()

    # --- the way of a step ---------------------------------------------------------------------------------------

    def _next(self) -> None:
        """The first stage takes rows for the head, or else a step, if it is free."""
        if self._is_computing or not (self._rows or self._steps):
            return
        self._is_computing = True
        if self._rows:
            way = self._rows.popleft()
            at = self._compute(way, 0, self._clock.now, way.times.head.seconds(way.work.head))
            self._later(at, partial(self._first_is_done, way, True))
        else:
            way = self._steps.popleft()
            at = self._compute(way, 0, self._clock.now, self._seconds(way, 0))
            self._later(at, partial(self._first_is_done, way, False))

    def _first_is_done(self, way: _Way, is_head: bool) -> None:
        self._is_computing = False
        if is_head:
            self._answer(way, self._clock.now)
        else:
            self._pass_on(way)
        self._next()

    def _pass_on(self, way: _Way) -> None:
        """Through the other stages: they take steps in this order, so it is known when each takes this one."""
        at, work, last = self._clock.now, way.work, (way.step.stages or self.count) - 1
        for stage in range(1, last + 1):
            at = self._hop(stage - 1, at, work.few + work.prompt)
            at = self._compute(way, stage, max(at, self._free[stage]), self._seconds(way, stage))
        if self._times.is_ring and work.kept and last == self.count - 1:
            self._later(self._hop(last, at, work.kept), partial(self._to_head, way))
        else:
            self._answer(way, at)

    def _to_head(self, way: _Way) -> None:
        self._rows.append(way)
        self._next()

    def _answer(self, way: _Way, at: float) -> None:
        result = Result(way.step.number, np.zeros(way.work.kept, np.int32))
        self._later(at + self._driver_seconds, partial(self._arrived, result))

    def _arrived(self, result: Result) -> None:
        """Results go to the driver in the order of their steps: one that kept no row may have overtaken another."""
        epoch = self._epoch
        self._came[result.number] = result
        while epoch == self._epoch and self._came and (number := next(iter(self._under_way))) in self._came:
            del self._under_way[number]
            self._back(self._came.pop(number))

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

    def _seconds(self, way: _Way, stage: int) -> float:
        """Of a stage's blocks, and of the head where it follows them at once."""
        seconds = way.kind_seconds[self._kind_of[stage]]
        if way.work.kept and stage == self._times.head_stage and not self._times.is_ring:
            seconds += way.times.head.seconds(way.work.head)
        return step_seconds(self._times.plan.stages[stage].device, seconds, self._times.streaming[stage])

    def _compute(self, way: _Way, stage: int, start: float, seconds: float) -> float:
        """The stage computes from then on; until when."""
        end = self._free[stage] = start + seconds
        self.busy_seconds[stage] += seconds
        way.spans.append((stage, start, end))
        return end

    def _hop(self, stage: int, at: float, rows: int) -> float:
        """So many rows leave a stage; when they are where they go."""
        seconds = self._hops.get((stage, rows))
        if seconds is None:
            seconds = self._hops[stage, rows] = self._times.hop_seconds(stage, rows)
        arrived = self._link_free[stage] = max(at, self._link_free[stage]) + seconds
        return arrived
