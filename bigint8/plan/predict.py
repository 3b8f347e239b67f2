"""What a plan promises in seconds, by the time model: computed, not measured."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import ceil

from ..options import SHORT_PROMPT
from ..units import FLOAT_BYTES
from .offload import file_bytes_per_s, host_bytes_per_s, step_seconds
from .plan import Plan, Stage
from .time import DRIVER_SECONDS, Rows, TimeModel, Work, hop_seconds


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
    decode = (steps.together if groups > 1 else steps).decode(rows, context)
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
    """The time model over the stages of a plan. What a stage's blocks cost is added up once, when this is made."""

    def __init__(self, plan: Plan, together: bool = False) -> None:
        """together: all stages compute at the same time; devices that share memory or clock are slower then."""
        self.plan = plan
        speeds = [stage.device.speed for stage in plan.stages]
        if together:
            speeds = [stage.device.shared_speed or stage.device.speed for stage in plan.stages]
        self.model = TimeModel(plan.spec.known_layout, FLOAT_BYTES[plan.dtype])
        self.blocks = [
            self.model.blocks_cost(stage.first_block, stage.last_block, speed)
            for stage, speed in zip(plan.stages, speeds, strict=True)
        ]
        self.head_stage = 0 if plan.spec.tied else len(plan.stages) - 1
        self.head = self.model.head_cost(speeds[self.head_stage])
        self.streaming = [self._streaming(stage) for stage in plan.stages]
        self.is_ring = plan.spec.tied and len(plan.stages) > 1
        """Whether the rows that the head takes go from the last stage back to the first."""

    @cached_property
    def together(self) -> "PlanTimes":
        """The same while all stages compute."""
        stages = self.plan.stages
        shared = len(stages) > 1 and any(stage.device.shared_speed is not None for stage in stages)
        return PlanTimes(self.plan, together=True) if shared else self

    def decode(self, sequences: int, context: int) -> StepTimes:
        """A token of each of so many sequences."""
        return self.step(Rows(decode=sequences, context=context))

    def prompt(self, tokens: int, after: int) -> StepTimes:
        """A chunk of a prompt of which `after` tokens were before."""
        return self.step(Rows(prompt=tokens, prompt_after=after))

    def step(self, rows: Rows) -> StepTimes:
        """Any step."""
        work = self.model.work(rows)
        stages = tuple(self._stage_seconds(stage.index, work) for stage in self.plan.stages)
        if len(stages) == 1:
            return StepTimes(stages, (0.0,))
        hops = [self.hop_seconds(index, rows.decode + rows.prompt) for index in range(len(stages) - 1)]
        return StepTimes(stages, (*hops, self.hop_seconds(len(stages) - 1, work.kept) + DRIVER_SECONDS))

    def stage_seconds(self, stage: Stage, rows: Rows) -> float:
        """Of one stage: its blocks, those that are brought in too, and the head where it has it."""
        return self._stage_seconds(stage.index, self.model.work(rows))

    def _stage_seconds(self, index: int, work: Work) -> float:
        seconds = self.blocks[index].seconds(work)
        seconds += self.head.seconds(work.head) if index == self.head_stage else 0.0
        return step_seconds(self.plan.stages[index].device, seconds, self.streaming[index])

    def _streaming(self, stage: Stage) -> float:
        """To bring in what is offloaded, once a step; devices of a box share its disk."""
        reading = [other.disk_bytes for other in self.plan.stages if other.device.box == stage.device.box]
        sharing = sum(size > 0 for size in reading)
        from_files = stage.disk_bytes / file_bytes_per_s(stage.device, sum(reading), max(1, sharing))
        return from_files + stage.host_bytes / host_bytes_per_s(stage.device)

    def hop_seconds(self, index: int, rows: int) -> float:
        """Of so many rows from a stage to the next; from the last one to a head in the first, if there is one."""
        stages = self.plan.stages
        if index == len(stages) - 1 and not self.is_ring:
            return 0.0
        return hop_seconds(stages[index].device, stages[(index + 1) % len(stages)].device, self.model.rows_bytes(rows))

    def pieces(self, tokens: int) -> list[StepTimes]:
        """The steps of a prompt alone, cut as the scheduler cuts it: a short one runs as generated tokens do."""
        work, stages = self.plan.workload, len(self.plan.stages)
        if tokens <= SHORT_PROMPT:
            return [self.step(Rows(decode=tokens, context=tokens // 2, kept=1))]
        sizes, sent = list[int](), 0
        while sent < tokens:
            sizes.append(min(work.piece(tokens - sent, stages), tokens - sent))
            sent += sizes[-1]
        times = self.together if len(sizes) > 1 else self
        return [times.prompt(size, before) for size, before in zip(sizes, [0, *accumulate(sizes)], strict=False)]

    def prompt_slots(self, tokens: int) -> tuple[list[tuple[int, int, float, float]], float]:
        """When the pieces of a prompt alone are in the stages, one behind the other: piece, stage, start, seconds. And
        when the last piece is back."""
        free, slots, at = [0.0] * len(self.plan.stages), [], 0.0
        for piece, step in enumerate(self.pieces(tokens)):
            at = 0.0
            for stage, (seconds, hop) in enumerate(zip(step.stages, step.hops, strict=True)):
                start = max(at, free[stage])
                slots.append((piece, stage, start, seconds))
                free[stage] = start + seconds
                at = free[stage] + hop
        return slots, at

    def prompt_seconds(self, tokens: int) -> float:
        """Until the first token of a prompt."""
        return self.prompt_slots(tokens)[1]

    def load_seconds(self, stage: Stage, alone: bool = False) -> float:
        """To read a stage's tensors from its box's disk, which its other stages read too but for one that is loaded
        `alone`, and to copy them."""
        return max(self.load_limits(stage, alone).values())

    def load_limits(self, stage: Stage, alone: bool = False) -> dict[str, float]:
        """The seconds in which the disk and the bus to the device could load a stage: the longer one counts."""
        layout, box = self.plan.spec.known_layout, stage.device.box
        part = layout.part(stage.first_block, stage.last_block)
        size = part.stored_bytes(FLOAT_BYTES[self.plan.spec.stored], self.plan.spec.stored_int8)
        together = 1 if alone else sum(other.device.box == box for other in self.plan.stages)
        return {"disk": size * together / box.disk_bytes_per_s, "bus": size / stage.device.speed.bus_bytes_per_s}
