"""The time model: what a stage takes for a step, and what a pipeline makes of that. Pure functions over plain data.

A step with generated tokens reads the weights of its stage once. Its first row costs nothing besides; each further one
costs its operations, and every row reads the keys and values that it sees. So

    seconds = blocks * block_seconds + weights / read + (rows - 1) * operations / row_ops + keys and values / cache

For a prompt's tokens the weights are read by products of their own, which on a CPU rearrange them first; each row costs
its operations, what passes through its layers besides (int8 inputs, sums, activations), and those of attention:

    seconds = weights / prompt_read + rows * (operations / prompt_ops + values / prompt_values) + seen / attention

What it leaves out: on a GPU some of the operations hide behind the reading.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

from ..families.layout import Layout, Part
from .devices import Device
from .speed import CPU_HOP_SECONDS, GPU_HOP_SECONDS, Speed

DRIVER_SECONDS = 300e-6
"""From the last stage's tokens to the first stage's next step: hop, scheduler, hop. Measured on a CPU."""


@dataclass(frozen=True)
class Rows:
    """The rows of a step: `decode` sequences that each see `context` tokens, and `prompt` tokens of one sequence.

    `prompt_after`: how many tokens of that sequence came before; `kept`: rows that the head takes, by default those of
    all sequences that decode and one of the prompt
    """

    decode: int = 0
    context: int = 0
    prompt: int = 0
    prompt_after: int = 0
    kept: int | None = None


@dataclass(frozen=True)
class Work:
    """What a step asks for, summed over its rows.

    few, prompt: rows that are computed as generated tokens are, and as those of prompts
    few_seen, prompt_seen: tokens that these see, for each group of blocks with the same window (`Layout.groups`)
    kept: rows that the head takes
    """

    few: int
    prompt: int
    few_seen: tuple[float, ...]
    prompt_seen: tuple[float, ...]
    kept: int

    @property
    def head(self) -> "Work":
        """What it asks of the head, which sees no other tokens."""
        return Work(self.kept, 0, (), (), self.kept)


@dataclass(frozen=True)
class Cost:
    """Seconds of one block, of some blocks or of the head, which are affine in a step's work: so costs can be added.

    weights_seconds, prompt_weights_seconds: to read the weights for rows that are computed as generated tokens are, and
        for those of prompts; other_seconds: besides, whatever the rows are
    few_seconds, prompt_seconds: of each row of that kind, but for the first few row of the step
    few_seen_seconds, prompt_seen_seconds: of each token that these see, for each group of blocks
    """

    weights_seconds: float
    prompt_weights_seconds: float
    other_seconds: float
    few_seconds: float
    prompt_seconds: float
    few_seen_seconds: tuple[float, ...] = ()
    prompt_seen_seconds: tuple[float, ...] = ()

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.weights_seconds + other.weights_seconds,
            self.prompt_weights_seconds + other.prompt_weights_seconds,
            self.other_seconds + other.other_seconds,
            self.few_seconds + other.few_seconds,
            self.prompt_seconds + other.prompt_seconds,
            _summed(self.few_seen_seconds, other.few_seen_seconds),
            _summed(self.prompt_seen_seconds, other.prompt_seen_seconds),
        )

    def seconds(self, work: Work) -> float:
        """Of a step; of one without rows, as where no row of it is kept for the head, what does not depend on them."""
        seconds, few, prompt = self.other_seconds, work.few, work.prompt
        if few:
            seconds += self.weights_seconds + (few - 1) * self.few_seconds
        if prompt:
            seconds += self.prompt_weights_seconds + prompt * self.prompt_seconds
        for each, seen in zip(self.few_seen_seconds, work.few_seen, strict=True):
            seconds += each * seen
        if prompt:
            for each, seen in zip(self.prompt_seen_seconds, work.prompt_seen, strict=True):
                seconds += each * seen
        return seconds


def _summed(some: Sequence[float], others: Sequence[float]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(some, others, strict=True))


class TimeModel:
    """What the blocks and the head of one model take, in one dtype."""

    def __init__(self, layout: Layout, dtype_bytes: int) -> None:
        self.layout, self._size = layout, dtype_bytes

    def work(self, rows: Rows) -> Work:
        """The rows as the costs take them: the prompt's see as much as the one in their middle, the head takes one."""
        middle = rows.prompt_after + rows.prompt / 2
        return Work(
            few=rows.decode,
            prompt=rows.prompt,
            few_seen=tuple(rows.decode * _seen(rows.context, window) for window in self.layout.groups),
            prompt_seen=tuple(rows.prompt * _seen(middle, window) for window in self.layout.groups),
            kept=rows.decode + (rows.prompt > 0) if rows.kept is None else rows.kept,
        )

    def block_cost(self, block: int, speed: Speed) -> Cost:
        """Of one block of the model."""
        sizes, group = self.layout.sizes, self.layout.group_of(block)
        here = [float(other == group) for other in range(len(self.layout.groups))]
        return replace(
            self._part_cost(self.layout.blocks[block].part, speed, self.layout.values_a_row),
            other_seconds=speed.block_seconds,
            few_seen_seconds=tuple(is_it * sizes.kv_values * self._size / speed.cache_bytes_per_s for is_it in here),
            prompt_seen_seconds=tuple(is_it * 4 * sizes.hidden / speed.attention_ops_per_s for is_it in here),
        )

    def blocks_cost(self, first: int, last: int, speed: Speed) -> Cost:
        """Of the blocks [first, last), at least one, together."""
        alike = self.layout.alike[first:last]
        costs = {block: self.block_cost(block, speed) for block in set(alike)}
        return reduce(operator.add, (costs[block] for block in alike))

    def head_cost(self, speed: Speed) -> Cost:
        """Of the output head, for the work that is `Work.head`."""
        layout = self.layout
        return self._part_cost((layout.first[0] if layout.tied else layout.head).part, speed)

    def block_seconds(self, block: int, speed: Speed, rows: Rows) -> float:
        """Of one block of the model."""
        return self.block_cost(block, speed).seconds(self.work(rows))

    def blocks_seconds(self, speed: Speed, rows: Rows) -> tuple[float, ...]:
        """Of each block of the model."""
        work, alike = self.work(rows), self.layout.alike
        seconds = {block: self.block_cost(block, speed).seconds(work) for block in set(alike)}
        return tuple(seconds[block] for block in alike)

    def head_seconds(self, speed: Speed, rows: Rows) -> float:
        """Of the output head: it takes one row of each sequence."""
        return self.head_cost(speed).seconds(self.work(rows).head)

    def hop_bytes(self, rows: Rows) -> int:
        """Of the hidden states that go from stage to stage."""
        return self.rows_bytes(rows.decode + rows.prompt)

    def rows_bytes(self, rows: int) -> int:
        """Of the hidden states of so many rows."""
        return rows * self.layout.sizes.hidden * self._size

    def _part_cost(self, part: Part, speed: Speed, values: int = 0) -> Cost:
        """`values`: what passes through its layers, of each row of a prompt."""
        int8, others = 2 * part.int8_values, 2 * (part.other_values + part.table_values)
        size, of_others = part.weight_bytes(self._size), others / speed.float_row_ops_per_s
        return Cost(
            weights_seconds=size / speed.read_bytes_per_s,
            prompt_weights_seconds=size / speed.prompt_read_bytes_per_s,
            other_seconds=0.0,
            few_seconds=int8 / speed.row_ops_per_s + of_others,
            prompt_seconds=int8 / speed.prompt_ops_per_s + values / speed.prompt_values_per_s + of_others,
        )


def _seen(tokens: float, window: int | None) -> float:
    return tokens if window is None else min(window, tokens)


def enter_seconds(device: Device, size: int) -> float:
    """Into a device from its box's memory."""
    return 0.0 if device.kind != "cuda" else size / device.speed.bus_bytes_per_s


def inside_seconds(device: Device) -> float:
    """Between two devices of a box, besides what goes into one and out of the other."""
    return GPU_HOP_SECONDS if device.kind == "cuda" else CPU_HOP_SECONDS


def network_seconds(device: Device, size: int) -> float:
    """This box's half of a hop to or from another one."""
    return inside_seconds(device) / 2 + device.box.network_seconds + size / device.box.network_bytes_per_s / 2


def hop_seconds(before: Device, after: Device, size: int) -> float:
    """From one device to the next."""
    seconds = enter_seconds(before, size) + enter_seconds(after, size)
    if before.box == after.box:
        if before.box.nvlink_bytes_per_s and before.kind == after.kind == "cuda":
            seconds = size / before.box.nvlink_bytes_per_s
        return seconds + inside_seconds(after)
    return seconds + network_seconds(before, size) + network_seconds(after, size)
