"""Blocks that no device holds: which of a stage are offloaded, where to, and what that takes. Over plain data.

Of an offloaded block the int8 weights are kept in the host's memory, or in a file, and come through two buffers on the
device, ahead of their use. So three blocks offloaded save one, if all are alike; the stage offloads as few as it must.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..sources.gguf import cache_folder
from ..units import readable
from .devices import Box, Device
from .plan import Plan, Stage
from .spec import ModelSpec

BUFFERS = 2


@dataclass(frozen=True)
class Spill:
    """What may hold weights that no device holds, of each box: bytes of its memory and of its disk.

    A box that says itself what they may hold (`Box.host_bytes`, `Box.disk_bytes`) is taken at its word.
    """

    host_bytes: int = 0
    disk_bytes: int = 0

    def of(self, box: Box) -> "Spill":
        """What this box may hold. Its disk has at least what is there without it: an int8 checkpoint."""
        return Spill(box.host_bytes or self.host_bytes, max(box.disk_bytes, self.disk_bytes))


def spill_here(spec: ModelSpec, host_bytes: int, folder: Path | None = None) -> Spill:
    """What there is on this machine: so much of its memory, and what the disk has free where a file would be.

    An int8 checkpoint is that file already, and takes no more.
    """
    if spec.stored_int8:
        return Spill(host_bytes, spec.known_layout.weight_bytes(4))
    return Spill(host_bytes, free_disk_bytes(folder))


def spill_of_boxes(spec: ModelSpec) -> Spill:
    """Where every box says itself what it may hold, as those of a live cluster do: no more than that.

    An int8 checkpoint is on the disk of each already.
    """
    return Spill(0, spec.known_layout.weight_bytes(4) if spec.stored_int8 else 0)


def free_disk_bytes(folder: Path | None = None) -> int:
    """What the disk has free where a file of offloaded weights would be: in `folder`, or beside what is converted."""
    there = (cache_folder() if folder is None else folder).absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def offloaded_blocks(sizes: Sequence[int], missing: int) -> tuple[int, ...] | None:
    """The fewest of a stage's blocks, evenly spread, that must be offloaded to save `missing` bytes; None if all are
    not enough.

    sizes: bytes of each block that can be elsewhere. Spread, so that one comes while those before it are computed.
    """
    if missing <= 0:
        return ()
    able = [block for block, size in enumerate(sizes) if size]
    for count in range(1, len(able) + 1):
        chosen = tuple(able[(2 * i + 1) * len(able) // (2 * count)] for i in range(count))
        if sum(sizes[block] for block in chosen) - buffers(sizes, chosen) >= missing:
            return chosen
    return None


def buffers(sizes: Sequence[int], chosen: Sequence[int]) -> int:
    """Bytes of the buffers for these blocks."""
    return BUFFERS * max((sizes[block] for block in chosen), default=0)


def keep_beside(stage: Stage, sizes: Sequence[int], chosen: Sequence[int], home: str) -> Stage:
    """The stage with these of its blocks, counted from its first, offloaded to "host" or "disk"."""
    blocks, size = tuple(stage.first_block + block for block in chosen), sum(sizes[block] for block in chosen)
    fewer = replace(stage, weight_bytes=stage.weight_bytes - size, buffer_bytes=buffers(sizes, chosen))
    if home == "host":
        return replace(fewer, host_blocks=blocks, host_bytes=size)
    return replace(fewer, disk_blocks=blocks, disk_bytes=size)


def file_bytes_per_s(device: Device, of_box: int, sharing: int = 1) -> float:
    """How fast a device brings in weights from files, once a step.

    of_box: bytes of files that all devices of its box bring in each step: the system's file cache holds all of them or,
        since they are read in turn, none; sharing: how many devices of the box read from its disk
    """
    box = device.box
    rate = box.cached_bytes_per_s if of_box <= box.cached_bytes else box.disk_bytes_per_s / sharing
    return min(rate, device.speed.bus_bytes_per_s) if device.kind == "cuda" else rate


def host_bytes_per_s(device: Device) -> float:
    """How fast a device brings in weights from the host's memory; what the CPU reads is there already."""
    return device.speed.bus_bytes_per_s if device.kind == "cuda" else float("inf")


def step_seconds(device: Device, computing: float, streaming: float) -> float:
    """Of a stage that computes and streams: a GPU does both at once; what a CPU brings in passes through it."""
    return max(computing, streaming) if device.kind == "cuda" else computing + streaming


def offload_note(plan: Plan) -> str:
    """What a person should know of a plan's offloaded blocks."""
    homes = []
    for home, of in (("the host's memory", "host"), ("files", "disk")):
        count = sum(len(getattr(stage, f"{of}_blocks")) for stage in plan.stages)
        if count:
            homes.append(f"{count} in {home} ({readable(sum(getattr(stage, f'{of}_bytes') for stage in plan.stages))})")
    total = len(plan.spec.known_layout.blocks)
    return f"offloaded as int8, of {total} blocks: {' and '.join(homes)}; every step brings them in"


def offload_is_not_enough(plan: Plan, spill: Spill) -> str:
    """Why a plan does not fit with its blocks offloaded either, of its stage that lacks most."""
    stage = min(plan.stages, key=lambda stage: stage.headroom_bytes)
    blocks = plan.spec.known_layout.blocks[stage.first_block : stage.last_block]
    sizes = [module.part.int8_values for module in blocks]
    least = keep_beside(stage, sizes, range(len(sizes)), "disk")
    if least.headroom_bytes >= 0:
        box = stage.device.box
        there = spill.of(box)
        host = f"{readable(there.host_bytes)} of the host's memory and " if stage.device.kind == "cuda" else ""
        return (
            f"Its blocks may be offloaded: that takes up to {readable(sum(sizes))} for stage {stage.index}, and in "
            f"{box.name} there are {host}{readable(there.disk_bytes)} of the disk. What would help: room there, where "
            "offload_folder= says, or BIGINT8_CACHE"
        )
    return (
        f"With all its blocks offloaded, stage {stage.index} still needs {readable(least.needed_bytes)}: "
        f"{readable(least.buffer_bytes)} for two buffers of a block each, {readable(least.weight_bytes)} for what is "
        f"always there, {readable(least.kv_bytes)} of KV cache, {readable(least.workspace_bytes)} of workspace; "
        f"{readable(stage.device.usable_bytes)} may be used"
    )
