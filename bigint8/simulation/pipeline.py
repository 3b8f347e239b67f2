"""One pipeline in simulated time: the engine's scheduler over simulated stages, driven as `run/engine.py` drives it."""

from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ..errors import WorkerError
from ..model.step import Logprobs, Result, Step
from ..plan.predict import PlanTimes
from ..run.engine import MAX_RESTARTS
from ..run.pages import PageGroup
from ..run.refill import Refill
from ..run.requests import Completion, Reason
from ..run.scheduler import Scheduler
from ..run.sequence import Request
from ..run.settings import Settings
from ..run.tables import Tables
from .clock import Clock
from .load import Asked
from .stages import SimulatedStages


@dataclass
class Record:
    """What was seen of all requests, in seconds: until the first token, between two tokens, in the queue, until the
    last token. And what was counted."""

    first_token: "array[float]" = field(default_factory=lambda: array("d"))
    between_tokens: "array[float]" = field(default_factory=lambda: array("d"))
    queue: "array[float]" = field(default_factory=lambda: array("d"))
    whole: "array[float]" = field(default_factory=lambda: array("d"))
    prompt_tokens: int = 0
    new_tokens: int = 0
    failed: int = 0


class TimedCompletion(Completion):
    """The tokens of a request, with the times at which they come."""

    def __init__(self, asked: Asked, clock: Clock, record: Record) -> None:
        super().__init__(Settings(asked.new_tokens))
        self._clock, self._record = clock, record
        self.asked, self.arrived = asked, clock.now
        self._last: float | None = None

    def put(self, token: int, logprobs: Logprobs | None = None) -> Reason | None:
        now, record = self._clock.now, self._record
        if self._last is None:
            record.first_token.append(now - self.arrived)
        else:
            record.between_tokens.append(now - self._last)
        self._last = now
        record.new_tokens += 1
        return super().put(token, logprobs)


class SimulatedPipeline:
    """Takes requests at the clock's time. `open`: those that are not done. `at_end` is called for each that ends."""

    def __init__(
        self, times: PlanTimes, clock: Clock, record: Record, at_end: Callable[[], None], restart_seconds: float
    ) -> None:
        plan = times.plan
        windows = plan.spec.known_layout.groups
        groups = [PageGroup(window, pages) for window, pages in zip(windows, plan.pages, strict=True)]
        self._times, self._clock, self._record = times, clock, record
        self.scheduler = Scheduler(Tables(groups, plan.workload.context), len(plan.stages), plan.workload)
        self.stages = SimulatedStages(times, clock, self._back)
        self._at_end, self._restart_seconds = at_end, restart_seconds
        self._waiting: deque[tuple[Request, float]] = deque()  # with their arrival
        self.open = self.steps = self.failures = self._restarts_in_a_row = 0
        self.down_seconds = 0.0
        self.most_pages = [0] * len(groups)
        self.has_ended = False
        self._lost: set[int] = set()  # and nobody has noticed
        self._empty: set[int] = set()  # loaded again, or about to be
        self._ready = 0.0  # when all of these are loaded
        self._down_since: float | None = None
        self._recovery = 0
        self._refill: Refill | None = None
        self._refills: deque[int] = deque()

    # --- requests ------------------------------------------------------------------------------------------------

    def submit(self, asked: Asked, shared_tokens: int) -> None:
        """A request arrives. Raises PlanError for one that could never fit."""
        completion = TimedCompletion(asked, self._clock, self._record)
        request = self.scheduler.add(asked.prompt(shared_tokens), (completion,))
        self._waiting.append((request, self._clock.now))
        self.open += 1
        self._send_all()

    def _send_all(self) -> None:
        """All that there are slots for, unless stages are restored meanwhile."""
        if self._down_since is not None or self.has_ended:
            return
        sent = False
        while (step := self.scheduler.next()) is not None:
            self._send(step)
            sent = True
        if sent:
            self._look()
        if sent and self._lost:
            self._recover()

    def _send(self, step: Step) -> None:
        self.steps += 1
        if not self._lost:
            self.stages.send(step)

    def _look(self) -> None:
        """Who left the queue, and how many pages are held."""
        while self._waiting and self._waiting[0][0].sequences:
            self._record.queue.append(self._clock.now - self._waiting.popleft()[1])
        for index, pool in enumerate(self.scheduler.tables.pools):
            self.most_pages[index] = max(self.most_pages[index], pool.group.pages - pool.available)

    def _back(self, result: Result) -> None:
        """A step is back."""
        if self._refill is not None:
            self._refills.popleft()
            self._go_on_filling(self._refill)
            return
        flight = self.scheduler.flights[0]
        assert flight.step.number == result.number
        self.scheduler.settle(result)
        self._restarts_in_a_row = 0
        for sequence in flight.takers:
            completion = sequence.completion
            if isinstance(completion, TimedCompletion) and completion.done:
                self._is_done(completion)
        self._send_all()

    def _is_done(self, completion: TimedCompletion) -> None:
        self.open -= 1
        self._record.whole.append(self._clock.now - completion.arrived)
        self._record.prompt_tokens += completion.asked.prompt_tokens
        self._at_end()

    # --- stages that are lost ------------------------------------------------------------------------------------

    def lose(self, stage: int) -> None:
        """A device dies. Where no step is under way, the driver notices when it sends the next."""
        if self.has_ended:
            return
        self.failures += 1
        self._lost.add(stage)
        self.stages.lose_all()
        if self.scheduler.flights:
            self._recover()

    def _recover(self) -> None:
        """Start again what is lost. When all is loaded, its pages are filled; also those that were not when it died."""
        now, load_seconds, stages = self._clock.now, self._times.load_seconds, self._times.plan.stages
        self._end_refill()
        self._restarts_in_a_row += 1
        if self._restarts_in_a_row > MAX_RESTARTS:
            self._end()
            return
        if self._down_since is None:
            self._down_since = now
        loads = [now + self._restart_seconds + load_seconds(stages[stage], alone=True) for stage in self._lost]
        self._ready = max(self._ready, *loads)
        self._empty |= self._lost
        self._lost.clear()
        self._recovery += 1
        self._clock.at(self._ready, partial(self._is_loaded, self._recovery))

    def _is_loaded(self, recovery: int) -> None:
        if recovery == self._recovery and not self.has_ended:
            self._refill = self.scheduler.refill(max(self._empty) + 1)
            self._go_on_filling(self._refill)

    def _go_on_filling(self, refill: Refill) -> None:
        """Some steps are under way at once. When all are back, those that were lost are sent again."""
        while len(self._refills) <= self.stages.count and (step := next(refill.steps, None)) is not None:
            self._send(step)
            self._refills.append(step.number)
        if self._refills:
            return
        self._end_refill()
        self.scheduler.tables.forget_idle()
        self._empty.clear()
        assert self._down_since is not None
        self.down_seconds += self._clock.now - self._down_since
        self._down_since = None
        for step in self.scheduler.send_again():
            self._send(step)
        self._send_all()

    def _end_refill(self) -> None:
        if self._refill is not None:
            self._refill.steps.close()
        self._refill = None
        self._refills.clear()

    def _end(self) -> None:
        """Stages died too often in a row: as the engine, it ends, and its requests fail."""
        self.has_ended = True
        if self._down_since is not None:
            self.down_seconds += self._clock.now - self._down_since
        self.scheduler.end_all(WorkerError(f"stages died {self._restarts_in_a_row} times in a row"))
        failed, self.open = self.open, 0
        self._record.failed += failed
        for _ in range(failed):
            self._at_end()
