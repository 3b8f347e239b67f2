"""The driver's loop: requests become steps, steps go through the stages, tokens go to those who wait for them."""

import threading
import time
from collections import deque
from collections.abc import Sequence as Several
from functools import partial

from numpy.typing import ArrayLike

from ..errors import BigInt8Error, WorkerError, in_one_line
from ..model.step import Result, Step
from ..options import Workload
from ..plan.plan import Plan
from .feed import Fed
from .flights import Logits
from .pace import slow_stages
from .pages import PageGroup
from .requests import Completion
from .scheduler import Scheduler
from .sequence import Request, Sequence
from .settings import Detokenize, Settings
from .stages import EngineStats, Health, StageLost, Stages
from .tables import Tables
from .trace import StepSpans, Trace

MAX_RESTARTS = 3
"""How often in a row stages are started again: then something is wrong that a start does not mend."""

STEADY_SECONDS = 60.0
"""Stages that were there for so long since the last start begin a new row, with or without a result."""

MOST_NAMED = 8
"""How many of the requests that are lost an error names."""

ANSWER_SECONDS = 600.0
"""How long a step may take through all stages, with the steps before it."""

CLOSE_SECONDS = 5.0
"""How long closing waits for the thread, which may be in the middle of a step."""

IDLE_SECONDS = 0.5
"""How often an engine without work looks whether all stages are there, so that they are when work comes."""

DROPS_SECONDS = 0.2
"""How often requests that wait while nothing runs look whether sequences that held their pages were dropped."""


class Engine:
    """Runs requests on the stages until it is closed. One thread of its own sends, receives and hands out.

    Every method may be called from any thread. When the engine ends, for whatever reason, all requests end.
    """

    def __init__(
        self,
        stages: Stages,
        groups: Several[PageGroup],
        workload: Workload,
        trace: Trace | None = None,
        slots: int | None = None,
    ) -> None:
        """`groups` are the pages of each stage. `slots`: how many steps are under way at most, by default one, or one
        more than there are stages. Close it, or use it in a `with`."""
        self._stages = stages
        self._spans = None if trace is None else StepSpans(trace)
        self._scheduler = Scheduler(Tables(groups, workload.context), stages.count, workload, slots)
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._ended: BigInt8Error | None = None
        self._not_sent: BigInt8Error | None = None
        self._dropped: deque[Sequence] = deque()
        self._sends_alone = False  # while stages are restored, nobody else sends
        self._restarts = self._restarts_in_a_row = self._tokens = 0
        self._restoring: int | None = None
        self._restored = -STEADY_SECONDS
        self._started = time.monotonic()
        self._measured = self._started, 0
        self._thread = threading.Thread(target=self._run, name="bigint8 engine", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, plan: Plan, stages: Stages, trace: Trace | None = None, slots: int | None = None) -> "Engine":
        """The engine of a plan's stages, with the pages that they have."""
        windows = plan.spec.known_layout.groups
        groups = [PageGroup(window, pages) for window, pages in zip(windows, plan.pages, strict=True)]
        return cls(stages, groups, plan.workload, trace, slots)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- requests ------------------------------------------------------------------------------------------------

    def submit(self, prompt_ids: ArrayLike, settings: Settings, detokenize: Detokenize | None = None) -> Completion:
        """Ask for a continuation of the prompt, or several: they are the completion's `sequences`.

        `detokenize` is for stop strings. Raises PlanError for a request that could never fit, WorkerError if the engine
        has ended.
        """
        if settings.stop and detokenize is None:
            raise BigInt8Error("stop strings need a tokenizer (detokenize=): they are looked for in the text")
        made = tuple(Completion(settings, detokenize) for _ in range(settings.sequences))
        with self._lock:
            self._check_open()
            request = self._scheduler.add(prompt_ids, made)
            for completion in made:
                completion.sequences, completion.on_cancel = made, partial(self._cancel, completion, request)
            self._wake()
        return made[0]

    def _cancel(self, completion: Completion, request: Request) -> None:
        with self._lock:
            if not completion.done:
                completion.end("cancelled")
                self._scheduler.cancel(request)
                self._wake()

    def _wake(self) -> None:
        """There is something to send: it goes at once if there is a slot, also while the thread waits for a result."""
        self._drop_all()
        if self._scheduler.flights and not self._sends_alone:
            self._send_all()
        else:
            self._work.notify()

    def _drop_all(self) -> None:
        while self._dropped:
            sequence = self._dropped.popleft()
            if self._ended is None and not sequence.dropped:
                self._scheduler.feeds.drop(sequence)

    # --- sequences that are fed from outside, as transformers' generate() does it ---------------------------------

    def open_sequence(self) -> Sequence:
        """A sequence without tokens, to be fed by `forward`. Drop it when it is not needed any more."""
        with self._lock:
            self._check_open()
            return self._scheduler.feeds.open()

    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same tokens. Whole pages are shared, the last one is copied when one goes on."""
        with self._lock:
            self._check_open()
            return self._scheduler.feeds.fork(sequence)

    def crop(self, sequence: Sequence, tokens: int) -> None:
        """Only the first `tokens` stay. Raises PlanError where a window has moved on by more than the last call."""
        with self._lock:
            self._check_open()
            self._scheduler.feeds.crop(sequence, tokens)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence; also one that is computing, and also when the engine has ended.

        Never waits, so that a finalizer may call it, whichever thread the garbage collector runs it in.
        """
        self._dropped.append(sequence)
        if self._lock.acquire(blocking=False):
            try:
                self._wake()
            finally:
                self._lock.release()

    def forward(self, fed: Several[Fed], keep: ArrayLike) -> Logits:
        """Feed sequences, and wait for logits: float32 (kept rows, vocabulary), in the order of `keep`.

        fed: (sequence, new token ids, their positions, few), each sequence once. few: the tokens are computed as
        generated ones are, as those of a prompt of at most SHORT_PROMPT tokens should be. keep: rows, counted over all.
        Raises PlanError if there is no room for them, WorkerError if the engine ends.
        """
        with self._lock:
            self._check_open()
            self._drop_all()
            feed = self._scheduler.feeds.call(fed, keep)
            self._wake()
        return feed.result.result()

    # --- what it does --------------------------------------------------------------------------------------------

    def health(self) -> Health:
        """Whether it can run a step now. Never waits."""
        ended, restoring, lost = self._ended, self._restoring, self._stages.lost()
        if ended is not None:
            return Health("ended", error=str(ended))
        if restoring is None:
            restoring = lost.index if lost is not None else self._stages.quiet()
        return Health("running") if restoring is None else Health("restoring", restoring)

    @property
    def queue(self) -> tuple[int, int]:
        """How many requests wait in line, and how many sequences run. Never waits."""
        return len(self._scheduler.waiting), self._scheduler.admitted

    def stats(self) -> EngineStats:
        """What it does now, and has done since the statistics before."""
        stages = tuple(self._stages.stats())
        with self._lock:
            now, scheduler = time.monotonic(), self._scheduler
            seconds, (then, before) = now - self._started, self._measured
            self._measured = now, self._tokens
            return EngineStats(
                seconds=seconds,
                tokens=self._tokens,
                tokens_per_s=(self._tokens - before) / max(now - then, 1e-9),
                waiting=len(scheduler.waiting),
                running=scheduler.admitted,
                free_pages=tuple(pool.available for pool in scheduler.tables.pools),
                restarts=self._restarts,
                stages=stages,
                slow=slow_stages(stages),
                busy=tuple(min(1.0, stage.busy_seconds / max(seconds, 1e-9)) for stage in stages),
            )

    def close(self) -> None:
        """End it. Requests that are not done fail."""
        self._end(WorkerError("the engine was closed before the request was done"))
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_SECONDS)

    def _check_open(self) -> None:
        if self._ended is not None:
            raise WorkerError(f"the engine has ended: {self._ended}") from self._ended

    def _end(self, error: BaseException) -> None:
        """All requests end with this error, unless the engine has ended before."""
        with self._lock:
            if self._ended is None:
                wrapped = WorkerError(f"the engine failed: {in_one_line(error)}")
                wrapped.__cause__ = error
                self._ended = error if isinstance(error, BigInt8Error) else wrapped
                self._scheduler.end_all(self._ended)
            self._work.notify_all()

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                try:
                    if not self._send_or_wait():
                        return
                    result = self._receive()
                except StageLost as error:
                    self._recover(error)
                else:
                    self._settle(result)
        except BaseException as error:
            self._end(error)

    def _send_or_wait(self) -> bool:
        """Send what there is; whether a result is to be waited for. False when the engine has ended.

        Raises StageLost where a stage is gone while nothing is under way.
        """
        with self._lock:
            while self._ended is None:
                self._drop_all()
                self._send_all()
                if self._scheduler.flights:
                    return True
                lost = self._stages.lost()
                if lost is not None:
                    raise lost
                self._work.wait(DROPS_SECONDS if self._scheduler.waiting else IDLE_SECONDS)
            return False

    def _send_all(self) -> None:
        start_ns = time.time_ns()
        while (step := self._scheduler.next()) is not None:
            self._send(step, start_ns)
            start_ns = time.time_ns()

    def _send(self, step: Step, start_ns: int) -> None:
        """Errors show when the thread waits for the result, whoever sends."""
        try:
            self._stages.send(step)
        except BigInt8Error as error:
            self._not_sent = error
        if self._spans is not None:
            self._spans.sent(step.number, start_ns, {"rows": step.rows, "generated": step.few})

    def _receive(self) -> Result:
        """The next result that is waited for. Without the lock: others may send meanwhile."""
        error, self._not_sent = self._not_sent, None
        if error is not None:
            raise error
        return self._stages.receive(ANSWER_SECONDS)

    def _settle(self, result: Result) -> None:
        start_ns = time.time_ns()
        with self._lock:
            if self._ended is not None:
                return
            expected = self._scheduler.flights[0].step.number
            if result.number > expected:
                raise WorkerError(f"the result of step {result.number} came before that of step {expected}")
            if result.number == expected:  # others are of before a restart
                self._tokens += self._scheduler.settle(result)
                self._restarts_in_a_row = 0
                if self._spans is not None:
                    self._spans.back(result.number, start_ns)

    # --- stages that are lost ------------------------------------------------------------------------------------

    def _recover(self, error: StageLost) -> None:
        """Start the lost stages again, fill their pages, send the steps that were under way once more."""
        start_ns = time.time_ns()
        # a step that is under way may be what a stage hangs at, each time for longer than that
        if time.monotonic() - self._restored > STEADY_SECONDS and not self._scheduler.flights:
            self._restarts_in_a_row = 0
        with self._lock:
            self._sends_alone = True
            if self._spans is not None:
                self._spans.lost()
        empty: set[int] = set()
        while True:
            self._restoring = error.index
            self._restarts += 1
            self._restarts_in_a_row += 1
            if self._restarts_in_a_row > MAX_RESTARTS:
                times = f"stages died {self._restarts_in_a_row} times in a row, at last: {error}"
                raise WorkerError(f"{times}; {self._served()}") from error
            try:
                self._not_sent = None
                empty.update(self._restored_stages(error))  # also those that were not filled before the next one died
                self._refill(empty)
                empty.clear()
                with self._lock:
                    if self._spans is not None:
                        self._spans.restored(start_ns, f"restore after stage {error.index} was lost")
                    for step in self._scheduler.send_again():
                        self._send(step, time.time_ns())
                    self._sends_alone = False
                self._restored, self._restoring = time.monotonic(), None
                return
            except StageLost as another:
                error = another

    def _restored_stages(self, lost: StageLost) -> list[int]:
        try:
            return self._stages.restore()
        except StageLost:
            raise
        except BigInt8Error as error:
            raise WorkerError(f"{lost}, and cannot be started again: {error}; {self._served()}") from error

    def _served(self) -> str:
        """What is lost with the engine, for people."""
        with self._lock:
            waiting, live = len(self._scheduler.waiting), list(self._scheduler.live.items())
            count = len(live) + len(self._scheduler.feeds.live)
        texts = [f"{request.tokens} + {sequence.count - request.tokens}" for sequence, request in live[:MOST_NAMED]]
        named = f" (tokens of the prompt + of the answer so far: {', '.join(texts)})" if texts else ""
        return f"{count} sequences were being written{named}, and {waiting} requests waited"

    def _refill(self, empty: set[int]) -> None:
        """Fill the pages of these stages from the tokens of the sequences that go on."""
        if not empty:
            return
        with self._lock:
            refill = self._scheduler.refill(max(empty) + 1)
        numbers: deque[int] = deque()
        try:
            while self._ended is None:
                with self._lock:
                    step = next(refill.steps, None)
                    if step is not None:
                        self._send(step, time.time_ns())
                        numbers.append(step.number)
                if step is None and not numbers:
                    break
                if step is None or len(numbers) > self._stages.count:
                    while self._receive().number < numbers[0]:
                        pass
                    if self._spans is not None:
                        self._spans.back(numbers[0], time.time_ns())
                    numbers.popleft()
        finally:
            with self._lock:
                refill.steps.close()
        with self._lock:
            self._scheduler.tables.forget_idle()  # only what somebody holds was filled again
            for sequence in refill.lost:
                sequence.lost = True
                self._scheduler.feeds.drop(sequence)
