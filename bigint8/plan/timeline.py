"""Which stage runs which step when, in a decode round and in a prompt's prefill: computed from a plan, not measured."""

from dataclasses import dataclass
from itertools import accumulate

from .plan import Plan
from .predict import PlanTimes, Prediction


@dataclass(frozen=True)
class Slot:
    """The time that one stage spends on one step; a step is a group of sequences, or a piece of a prompt."""

    stage: int
    step: int
    start_seconds: float
    seconds: float

    @property
    def end_seconds(self) -> float:
        return self.start_seconds + self.seconds


@dataclass(frozen=True)
class Timeline:
    """What all stages do in so many seconds, stage by stage in order of time; `steps` is how many steps there are."""

    slots: tuple[Slot, ...]
    steps: int
    seconds: float

    def of(self, stage: int) -> list[Slot]:
        """The slots of one stage."""
        return [slot for slot in self.slots if slot.stage == stage]

    def busy_share(self, stage: int) -> float:
        """How much of the time a stage works."""
        return sum(slot.seconds for slot in self.of(stage)) / self.seconds

    def bubbles(self, stage: int) -> list[tuple[float, float]]:
        """When a stage waits: the start and the length of each gap, in seconds."""
        slots = self.of(stage)
        starts = [0.0, *(slot.end_seconds for slot in slots)]
        ends = [*(slot.start_seconds for slot in slots), self.seconds]
        least = 1e-9 * self.seconds
        return [(start, end - start) for start, end in zip(starts, ends, strict=True) if end - start > least]


def decode_round(prediction: Prediction) -> Timeline:
    """A decode round of a pipeline that has run for a while: each sequence gets one token.

    Groups follow each other at the distance of the slowest stage, which is where they queue. A round is periodic: a
    slot that goes beyond its end is cut in two, and the rest stands at its beginning.
    """
    stages = prediction.stages
    period = prediction.token_seconds
    behind = max(stage.decode_seconds for stage in stages)
    arrivals = [0.0, *accumulate(stage.decode_seconds + stage.hop_seconds for stage in stages[:-1])]
    slots = []
    for index, (stage, arrival) in enumerate(zip(stages, arrivals, strict=True)):
        for group in range(prediction.groups):
            start = (arrival + group * behind) % period
            inside = min(stage.decode_seconds, period - start)
            slots.append(Slot(index, group, start, inside))
            if stage.decode_seconds - inside > 1e-9 * period:
                slots.append(Slot(index, group, 0.0, stage.decode_seconds - inside))
    slots.sort(key=_in_order)
    return Timeline(tuple(slots), prediction.groups, period)


def prefill(plan: Plan, tokens: int) -> Timeline:
    """A prompt of so many tokens: its pieces go through the stages one behind the other, until the first token."""
    taken, end = PlanTimes(plan).prompt_slots(tokens)
    slots = sorted((Slot(stage, piece, start, seconds) for piece, stage, start, seconds in taken), key=_in_order)
    return Timeline(tuple(slots), taken[-1][0] + 1, end)


def _in_order(slot: Slot) -> tuple[int, float]:
    return slot.stage, slot.start_seconds
