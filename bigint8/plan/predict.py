"""What a plan promises in seconds, by the time model: computed, not measured."""

from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from ..units import FLOAT_BYTES
from .offload import step_seconds, streamed_seconds
from .plan import Plan, Stage
from .time import DRIVER_SECONDS, Rows, TimeModel, hop_seconds


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one stage: a decode step, a chunk of a prompt, the hop after it in a decode step, the load."""

    decode_seconds: float
    prefill_seconds: float
    hop_seconds: float
    load_seconds: float


@dataclass(frozen=True)
class Prediction:
    """A plan in seconds, for sequences that each see `context` tokens.

    rows: sequences in a step; groups: steps under way at once
    token_seconds: between two tokens of a sequence; tokens_per_s: of all sequences together
    prompt_seconds: until the first token of a prompt of `prompt` tokens, alone
    """

    context: int
    rows: int
    groups: int
    stages: tuple[StageTimes, ...]
    token_seconds: float
    tokens_per_s: float
    prompt: int
    prompt_seconds: float
    load_seconds: float


def predict(
    plan: Plan, context: int | None = None, sequences: int | None = None, prompt: int | None = None
) -> Prediction:
    """The times of a plan with a layout.

    context: tokens that each sequence sees, the plan's whole context by default
    sequences: at once, as many as planned by default; prompt: tokens of a prompt, a chunk by default
    """
    work = plan.workload
    context = work.context if context is None else context
    sequences = work.sequences if sequences is None else sequences
    prompt = min(work.chunk, work.context) if prompt is None else prompt
    groups = min(sequences, len(plan.stages))
    rows = ceil(sequences / groups)
    steps = PlanTimes(plan)
    decode = steps.decode(rows, context)
    chunk = steps.prompt(min(prompt, work.chunk), 0)
    stages = tuple(
        StageTimes(seconds, prefill, hop, steps.load_seconds(stage))
        for stage, seconds, prefill, hop in zip(plan.stages, decode.stages, chunk.stages, decode.hops, strict=True)
    )
    token_seconds = max(decode.seconds, groups * max(decode.stages))
    return Prediction(
        context=context,
        rows=rows,
        groups=groups,
        stages=stages,
        token_seconds=token_seconds,
        tokens_per_s=sequences / token_seconds,
        prompt=prompt,
        prompt_seconds=steps.prompt_seconds(prompt),
        load_seconds=max(stage.load_seconds for stage in stages),
    )


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step in each stage, and of the hop after each; the last one's goes back to the driver or a ring."""

    stages: tuple[float, ...]
    hops: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """From the driver through all stages and back."""
        return sum(self.stages) + sum(self.hops)


class PlanTimes:
    """The time model over the stages of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._model = TimeModel(plan.spec.known_layout, FLOAT_BYTES[plan.dtype])

    def decode(self, sequences: int, context: int) -> StepTimes:
        """A token of each of so many sequences."""
        return self.step(Rows(decode=sequences, context=context))

    def prompt(self, tokens: int, after: int) -> StepTimes:
        """A chunk of a prompt of which `after` tokens were before."""
        return self.step(Rows(prompt=tokens, prompt_after=after))

    def step(self, rows: Rows) -> StepTimes:
        """Any step."""
        stages = tuple(self.stage_seconds(stage, rows) for stage in self.plan.stages)
        devices, size = [stage.device for stage in self.plan.stages], self._model.hop_bytes(rows)
        if len(devices) == 1:
            return StepTimes(stages, (0.0,))
        hops = [hop_seconds(a, b, size) for a, b in pairwise(devices)]
        back = hop_seconds(devices[-1], devices[0], size) if self.plan.spec.tied else 0.0
        return StepTimes(stages, (*hops, back + DRIVER_SECONDS))

    def stage_seconds(self, stage: Stage, rows: Rows) -> float:
        """Of one stage: its blocks, those that are brought in too, and the head where it has it."""
        blocks = range(stage.first_block, stage.last_block)
        seconds = sum(self._model.block_seconds(block, stage.device.speed, rows) for block in blocks)
        is_head = stage.index == 0 if self.plan.spec.tied else stage.index == len(self.plan.stages) - 1
        seconds += self._model.head_seconds(stage.device.speed, rows) if is_head else 0.0
        sharing = sum(other.device.box == stage.device.box and other.disk_bytes > 0 for other in self.plan.stages)
        streaming = streamed_seconds(stage.device, stage.host_bytes, stage.disk_bytes, max(1, sharing))
        return step_seconds(stage.device, seconds, streaming)

    def prompt_seconds(self, tokens: int) -> float:
        """Until the first token of a prompt: its chunks go through the stages one behind the other."""
        chunk = self.plan.workload.chunk
        steps = [self.prompt(min(chunk, tokens - first), first) for first in range(0, tokens, chunk)]
        return steps[0].seconds + sum(max(step.stages) for step in steps[1:])

    def load_seconds(self, stage: Stage) -> float:
        """To read a stage's tensors from its box's disk, which its other stages read too, and to copy them."""
        layout, box = self.plan.spec.known_layout, stage.device.box
        part = layout.part(stage.first_block, stage.last_block)
        size = part.stored_bytes(FLOAT_BYTES[self.plan.spec.stored], self.plan.spec.stored_int8)
        together = sum(other.device.box == box for other in self.plan.stages)
        return max(size * together / box.disk_bytes_per_s, size / stage.device.speed.bus_bytes_per_s)
