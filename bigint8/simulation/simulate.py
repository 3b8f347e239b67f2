"""Pipelines of a plan under load: tokens a second, how long requests wait, and what failures cost."""

from collections import deque
from functools import partial

from ..errors import BigInt8Error
from ..plan.plan import Plan
from ..plan.predict import PlanTimes
from .clock import Clock
from .load import Asked, Failure, Failures, Load
from .pipeline import Record, SimulatedPipeline
from .result import Simulated, Spread


def simulate(plan: Plan, load: Load, pipelines: int = 1, failures: Failures | None = None) -> Simulated:
    """Run a load on so many pipelines of this plan, in simulated time. A request goes to the one with the fewest.

    The same scheduler that runs decides what each step has; the time model says what it takes. The same arguments give
    the same result. Raises PlanError for a load that does not fit the plan, BigInt8Error for what makes no sense.
    """
    return Simulation(plan, load, pipelines, failures).run()


class Simulation:
    """One simulation; `run` once."""

    def __init__(self, plan: Plan, load: Load, pipelines: int, failures: Failures | None) -> None:
        if pipelines < 1:
            raise BigInt8Error(f"pipelines={pipelines}: must be at least 1")
        if not plan.pages:
            raise BigInt8Error(
                f"{plan.spec.name}: this plan has no pages; only pipelines, which have, can be simulated"
            )
        self.plan, self.load, self.asked_failures = plan, load, failures
        self.clock, self.record = Clock(), Record()
        failing = failures or Failures()
        failing.check(pipelines, len(plan.stages))
        times = PlanTimes(plan)
        self.pipelines = [
            SimulatedPipeline(times, self.clock, self.record, self._one_ended, failing.restart_seconds)
            for _ in range(pipelines)
        ]
        self._asked = deque(load.asked(plan.workload.context))
        self._by_chance = failing.by_chance(pipelines, len(plan.stages))
        for failure in failing.at:
            self.clock.at(failure.seconds, partial(self._fail, failure))

    def run(self) -> Simulated:
        """Until every request is done."""
        for _ in range(self.load.sessions or 1):
            self._arrange_next()
        self._arrange_failure()
        while self._go_on():
            pass
        return self._result()

    def _go_on(self) -> bool:
        """The next event; False when no request is left."""
        if len(self.record.whole) + self.record.failed == self.load.requests:
            return False
        found = self.clock.go_on()
        assert found, "a request waits, and nothing will happen"
        return True

    # --- what comes from outside ---------------------------------------------------------------------------------

    def _arrange_next(self) -> None:
        """The next request will arrive: at its time, or now where people wait for answers."""
        if self._asked:
            asked = self._asked.popleft()
            self.clock.at(max(asked.seconds, self.clock.now), partial(self._arrive, asked))

    def _arrive(self, asked: Asked) -> None:
        """A request arrives; where nobody waits for answers, the next one is known then."""
        running = [each for each in self.pipelines if not each.has_ended]
        if self.load.sessions is None:
            self._arrange_next()
        if running:
            min(running, key=lambda each: each.open).submit(asked, self.load.shared_tokens)
        else:
            self.record.failed += 1
            self._one_ended()

    def _one_ended(self) -> None:
        """A request is done, or has failed: who waited for it asks again."""
        if self.load.sessions is not None:
            self._arrange_next()

    def _arrange_failure(self) -> None:
        failure = next(self._by_chance, None)
        if failure is not None:
            self.clock.at(failure.seconds, partial(self._fail_and_go_on, failure))

    def _fail_and_go_on(self, failure: Failure) -> None:
        self._fail(failure)
        self._arrange_failure()

    def _fail(self, failure: Failure) -> None:
        self.pipelines[failure.pipeline].lose(failure.stage)

    # --- what is found -------------------------------------------------------------------------------------------

    def _result(self) -> Simulated:
        record, seconds, all_ = self.record, self.clock.now, self.pipelines
        shares = [
            sum(each.stages.busy_seconds[stage] for each in all_) / len(all_) / max(seconds, 1e-12)
            for stage in range(len(self.plan.stages))
        ]
        return Simulated(
            load=self.load,
            failures_asked=self.asked_failures,
            pipelines=len(all_),
            devices=len(all_) * len(self.plan.stages),
            seconds=seconds,
            done=len(record.whole),
            failed=record.failed,
            prompt_tokens=record.prompt_tokens,
            new_tokens=record.new_tokens,
            tokens_per_s=record.new_tokens / max(seconds, 1e-12),
            all_tokens_per_s=(record.prompt_tokens + record.new_tokens) / max(seconds, 1e-12),
            first_token=Spread.of(record.first_token),
            between_tokens=Spread.of(record.between_tokens),
            queue=Spread.of(record.queue),
            whole=Spread.of(record.whole),
            busy=tuple(shares),
            steps=sum(each.steps for each in all_),
            failures=sum(each.failures for each in all_),
            down_seconds=sum(each.down_seconds for each in all_),
            most_pages=tuple(max(each.most_pages[group] for each in all_) for group in range(len(self.plan.pages))),
            pages=self.plan.pages,
        )
