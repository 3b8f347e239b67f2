"""The time model: what a stage takes for a step, and what a pipeline makes of that. Pure functions over plain data.

A step reads the weights of its stage once. Its first row costs nothing besides; each further one costs its operations,
and every row reads the keys and values that it sees. So

    seconds = blocks * block_seconds + weights / read + (rows - 1) * operations / row_ops + keys and values / cache

and for a prompt's tokens the same with the operations of prompts, and those of attention. What it leaves out: on a GPU
some of the operations hide behind the reading.
"""

from dataclasses import dataclass

from ..families.layout import Layout, Part
from .devices import Device
from .speed import CPU_HOP_SECONDS, GPU_HOP_SECONDS, Speed

DRIVER_SECONDS = 300e-6
"""From the last stage's tokens to the first stage's next step: hop, scheduler, hop. Measured on a CPU."""


@dataclass(frozen=True)
class Rows:
    """The rows of a step: `decode` sequences that each see `context` tokens, and `prompt` tokens of one sequence.

    `prompt_after`: how many tokens of that sequence came before
    """

    decode: int = 0
    context: int = 0
    prompt: int = 0
    prompt_after: int = 0


class TimeModel:
    """What the blocks and the head of one model take, in one dtype."""

    def __init__(self, layout: Layout, dtype_bytes: int) -> None:
        self.layout, self._size = layout, dtype_bytes

    def block_seconds(self, block: int, speed: Speed, rows: Rows) -> float:
        """Of one block of the model."""
        sizes, window = self.layout.sizes, self.layout.sizes.windows[block]
        seconds = speed.block_seconds + self._part_seconds(self.layout.blocks[block].part, speed, rows)
        seen = rows.context if window is None else min(window, rows.context)
        seconds += rows.decode * seen * sizes.kv_values * self._size / speed.cache_bytes_per_s
        if rows.prompt:
            before = rows.prompt_after + rows.prompt / 2
            seen_by_prompt = before if window is None else min(window, before)
            seconds += 4 * sizes.hidden * rows.prompt * seen_by_prompt / speed.attention_ops_per_s
        return seconds

    def head_seconds(self, speed: Speed, rows: Rows) -> float:
        """Of the output head: it takes one row of each sequence."""
        layout = self.layout
        part = (layout.first[0] if layout.tied else layout.head).part
        return self._part_seconds(part, speed, Rows(decode=rows.decode + (rows.prompt > 0)))

    def hop_bytes(self, rows: Rows) -> int:
        """Of the hidden states that go from stage to stage."""
        return (rows.decode + rows.prompt) * self.layout.sizes.hidden * self._size

    def _part_seconds(self, part: Part, speed: Speed, rows: Rows) -> float:
        if not rows.decode + rows.prompt:
            return 0.0
        int8, others = 2 * part.int8_values, 2 * (part.other_values + part.table_values)
        few = int8 / speed.row_ops_per_s + others / speed.float_row_ops_per_s
        many = int8 / speed.prompt_ops_per_s + others / speed.float_row_ops_per_s
        more = rows.decode * few + rows.prompt * many - (few if rows.decode else many)
        return part.weight_bytes(self._size) / speed.read_bytes_per_s + more


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
