"""Whether a stage is slower than it should be: what its steps took, beside what the time model says of the same steps.

The time model's figures are those of the plan, of data sheets or measured, and all stages may be off by a factor: so a
stage is slow when its factor is far above those of the others. A card that is throttled or on a narrow bus, and a box
that does something else besides, show here.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from statistics import median

from ..model.step import Step
from ..plan.plan import Plan
from ..plan.predict import PlanTimes
from ..plan.time import Rows
from .stages import StageStats

WINDOW_STEPS = 512
"""After so many steps what came before counts half."""

FEWEST_STEPS = 32
"""Fewer tell nothing."""

SLOW = 1.5
"""How many times the others' factor a slow stage has at least."""


@dataclass
class Steps:
    """Sums over steps: how many have tokens that are computed as generated ones are, the rows and places of these
    tokens; the same of tokens of prompts; and the seconds that all took."""

    few_steps: float = 0.0
    few_rows: float = 0.0
    few_places: float = 0.0
    prompt_steps: float = 0.0
    prompt_rows: float = 0.0
    prompt_places: float = 0.0
    seconds: float = 0.0

    @property
    def count(self) -> float:
        """How many steps there are; one with both kinds of tokens counts twice."""
        return self.few_steps + self.prompt_steps

    def add(self, step: Step) -> None:
        """One more step. The older ones are forgotten by and by."""
        if self.count >= WINDOW_STEPS:
            for name, value in vars(self).items():
                setattr(self, name, value / 2)
        places, few = step.places, step.few
        if few:
            self.few_steps += 1
            self.few_rows += few
            self.few_places += int(places[:few].sum())
        if len(places) > few:
            self.prompt_steps += 1
            self.prompt_rows += len(places) - few
            self.prompt_places += int(places[few:].sum())

    def copy(self) -> "Steps":
        return Steps(*astuple(self))


def times_planned(plan: Plan, index: int, steps: Steps) -> float | None:
    """How many times as long as planned a stage's steps took; None for too few of them.

    What the time model says is affine in a step's rows and places, so that of the average step is right for all.
    """
    if steps.count < FEWEST_STEPS:
        return None
    times, stage, planned = PlanTimes(plan), plan.stages[index], 0.0
    if steps.few_steps:
        rows, context = steps.few_rows / steps.few_steps, steps.few_places / steps.few_rows + 1
        planned += steps.few_steps * times.stage_seconds(stage, _rows(decode=rows, context=context))
    if steps.prompt_steps:
        rows, middle = steps.prompt_rows / steps.prompt_steps, steps.prompt_places / steps.prompt_rows
        after = max(0.0, middle - rows / 2)
        planned += steps.prompt_steps * times.stage_seconds(stage, _rows(prompt=rows, prompt_after=after))
    return steps.seconds / planned


def _rows(**numbers: float) -> Rows:
    """Rows of an average step: at least one, in whole numbers."""
    return Rows(**{name: max(1, round(number)) for name, number in numbers.items()})


def slow_stages(stages: Sequence[StageStats]) -> tuple[str, ...]:
    """Which stages are slow beside the others, for people."""
    found = []
    factors = {index: stage.times_planned for index, stage in enumerate(stages) if stage.times_planned is not None}
    for index, factor in factors.items():
        others = [other for i, other in factors.items() if i != index]
        if others and factor > SLOW * median(others):
            named = stages[index].name or f"stage {index}"
            found.append(f"{named} takes {factor:.1f} x what was planned, the others {median(others):.1f} x")
    return tuple(found)
