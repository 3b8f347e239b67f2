"""Memory model and plan: which blocks live on which device, with the bytes of each. Pure functions over plain data.

The cut is exact: of all ways to cut the blocks into one run per device, in the order of the devices, it takes one in
which the fullest device is as empty as possible.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from .errors import PlanError
from .families import Layout, Part
from .hardware import DTYPE_BYTES, Device

GIB = 2**30
STAGING_BYTES = 2**26


@dataclass(frozen=True)
class Stage:
    """One stage: blocks [first_block, last_block) on a device, and what they take there, in bytes.

    `workspace_bytes` is an estimate of what one forward pass over a full context needs besides; the rest is exact.
    """

    index: int
    device: Device
    first_block: int
    last_block: int
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int

    @property
    def headroom_bytes(self) -> int:
        """What stays free; negative when the stage does not fit."""
        return self.device.usable_bytes - self.weight_bytes - self.kv_bytes - self.workspace_bytes


@dataclass(frozen=True)
class Plan:
    """Where a model's stages live. `dtype` is that of everything that is not int8."""

    model: str
    dtype: str
    context: int
    batch_size: int
    stages: tuple[Stage, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, head room included."""
        plain = asdict(self)
        for stage, entry in zip(self.stages, plain["stages"], strict=True):
            entry["headroom_bytes"] = stage.headroom_bytes
        return plain


def workspace_bytes(layout: Layout, context: int, batch_size: int, dtype_bytes: int) -> int:
    """An estimate of a forward pass's memory when a prompt fills the context: computed, not measured.

    Per token: the residual stream, its norm, and q, k and v (five hidden vectors), two of the widest layer's outputs.
    Besides: the cache of one block twice (a growing cache is copied to grow), the logits, slices of a weight and of
    activations in float32, the staging ring; and where attention is not fused (BLOOM), its scores in the model's dtype
    and their softmax in float32.
    """
    tokens = context * batch_size
    activations = tokens * (5 * layout.hidden + 2 * layout.widest) * dtype_bytes
    growing = max(layout.kv_bytes(b, context, batch_size, dtype_bytes) for b in range(len(layout.blocks)))
    scores = batch_size * layout.eager_heads * context**2 * (2 * dtype_bytes + 4)
    return activations + growing + scores + batch_size * layout.vocab * 4 + 3 * STAGING_BYTES


def stage_part(layout: Layout, first_block: int, last_block: int) -> Part:
    """The sizes of a stage's weights. A tied head lives with the embeddings, in the first stage."""
    part = sum(layout.blocks[first_block:last_block], Part())
    if first_block == 0:
        part += _first_part(layout)
    if last_block == len(layout.blocks):
        part += _last_part(layout)
    return part


def _first_part(layout: Layout) -> Part:
    return layout.embeddings + layout.head if layout.tied else layout.embeddings


def _last_part(layout: Layout) -> Part:
    return layout.final if layout.tied else layout.final + layout.head


def make_plan(
    model: str, layout: Layout, devices: Sequence[Device], dtype: str, context: int = 2048, batch_size: int = 1
) -> Plan:
    """The cut over all `devices`, in their order, that leaves the fullest one as empty as possible.

    Raises PlanError, with the numbers, when it does not fit, when there are more devices than blocks or when the
    context is longer than the model's.
    """
    blocks, size = len(layout.blocks), DTYPE_BYTES[dtype]
    check_request(model, layout.max_context, context, batch_size)
    if not devices:
        raise PlanError("no devices to place the model on")
    if len(devices) > blocks:
        raise PlanError(f"{len(devices)} devices for the {blocks} blocks of {model}; use at most {blocks}")
    plan = Plan(model, dtype, context, batch_size, _stages(layout, devices, context, batch_size, size))
    if any(stage.headroom_bytes < 0 for stage in plan.stages):
        raise PlanError(_does_not_fit(plan, layout, devices))
    return plan


def check_request(model: str, max_context: int | None, context: int, batch_size: int) -> None:
    """Raise PlanError for a context or batch size that no device could serve."""
    if context < 1 or batch_size < 1:
        raise PlanError(f"context {context} and batch size {batch_size} must be at least 1")
    if max_context is not None and context > max_context:
        raise PlanError(f"context {context} is longer than the {max_context} tokens that {model} was made for")


def readable(size: int) -> str:
    """A number of bytes for people: 1.50 GiB, 3.00 KiB."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"


def _stages(
    layout: Layout, devices: Sequence[Device], context: int, batch_size: int, dtype_bytes: int
) -> tuple[Stage, ...]:
    """The stages of the best cut, whether they fit or not."""
    cuts = _cut(layout, devices, context, batch_size, dtype_bytes)
    return tuple(
        _stage(layout, i, device, first, last, context, batch_size, dtype_bytes)
        for i, (device, first, last) in enumerate(zip(devices, cuts[:-1], cuts[1:], strict=True))
    )


def _stage(
    layout: Layout, index: int, device: Device, first: int, last: int, context: int, batch_size: int, dtype_bytes: int
) -> Stage:
    return Stage(
        index=index,
        device=device,
        first_block=first,
        last_block=last,
        weight_bytes=stage_part(layout, first, last).weight_bytes(dtype_bytes),
        kv_bytes=sum(layout.kv_bytes(b, context, batch_size, dtype_bytes) for b in range(first, last)),
        workspace_bytes=workspace_bytes(layout, context, batch_size, dtype_bytes),
    )


def _cut(layout: Layout, devices: Sequence[Device], context: int, batch_size: int, dtype_bytes: int) -> list[int]:
    """Block indices where the stages begin, and the end: dynamic programming over (device, blocks placed).

    Minimises the largest share of a device's memory that its stage fills.
    """
    blocks, count = len(layout.blocks), len(devices)
    below = [0]
    for b, part in enumerate(layout.blocks):
        kv = layout.kv_bytes(b, context, batch_size, dtype_bytes)
        below.append(below[-1] + part.weight_bytes(dtype_bytes) + kv)
    head, tail = _first_part(layout).weight_bytes(dtype_bytes), _last_part(layout).weight_bytes(dtype_bytes)
    workspace = workspace_bytes(layout, context, batch_size, dtype_bytes)

    def share(device: int, first: int, last: int) -> float:
        used = below[last] - below[first] + (head if first == 0 else 0) + (tail if last == blocks else 0) + workspace
        return used / max(1, devices[device].usable_bytes)

    best = [[inf] * (blocks + 1) for _ in range(count + 1)]
    came_from = [[0] * (blocks + 1) for _ in range(count + 1)]
    best[0][0] = 0.0
    for d in range(1, count + 1):
        for last in range(d, blocks - (count - d) + 1):
            for first in range(d - 1, last):
                fullest = max(best[d - 1][first], share(d - 1, first, last))
                if fullest < best[d][last]:
                    best[d][last], came_from[d][last] = fullest, first
    cuts = [blocks]
    for d in range(count, 0, -1):
        cuts.append(came_from[d][cuts[-1]])
    return cuts[::-1]


def _does_not_fit(plan: Plan, layout: Layout, devices: Sequence[Device]) -> str:
    worst = min(plan.stages, key=lambda stage: stage.headroom_bytes)
    weights, kv = sum(s.weight_bytes for s in plan.stages), sum(s.kv_bytes for s in plan.stages)
    workspace = sum(s.workspace_bytes for s in plan.stages)
    there = sum(device.usable_bytes for device in devices)
    helps = []
    if len({(d.model, d.usable_bytes) for d in devices}) == 1 and devices[0].kind == "cuda":
        count = _enough(plan, layout, devices[0])
        if count:
            helps.append(f"{count} such devices")
    if kv + workspace > weights // 20:
        helps.append(f"a shorter context than {plan.context} (--context)")
        if plan.batch_size > 1:
            helps.append(f"a batch smaller than {plan.batch_size} (--batch-size)")
    helps.append("devices with more memory")
    return (
        f"{plan.model} does not fit: it needs {readable(weights + kv + workspace)} ({readable(weights)} of weights, "
        f"{readable(kv)} of KV cache, {readable(workspace)} of workspace) and {len(devices)} x {worst.device.model} "
        f"have {readable(there)}; stage {worst.index} on {worst.device.name} lacks {readable(-worst.headroom_bytes)}. "
        f"What would help: {'; '.join(helps)}"
    )


def _enough(plan: Plan, layout: Layout, device: Device) -> int | None:
    """How many devices like this one would do, None if no number does."""
    size = DTYPE_BYTES[plan.dtype]
    stages = _fill(layout, [device] * len(layout.blocks), plan.context, plan.batch_size, size)
    return len(stages) if stages else None


def _fill(
    layout: Layout, devices: Sequence[Device], context: int, batch_size: int, dtype_bytes: int
) -> list[Stage] | None:
    """Stages that fill each device before the next, None if the blocks do not fit. Of equal devices it takes fewest."""
    blocks, at = len(layout.blocks), 0
    stages: list[Stage] = []
    for device in devices:
        best = None
        for last in range(at + 1, blocks + 1):
            stage = _stage(layout, len(stages), device, at, last, context, batch_size, dtype_bytes)
            if stage.headroom_bytes < 0:
                break
            best = stage
        if best is not None:
            stages.append(best)
            at = best.last_block
        if at == blocks:
            return stages
    return None


def fewest_devices(
    model: str, layout: Layout, device: Device, dtype: str, context: int = 2048, batch_size: int = 1
) -> int:
    """How many devices like this one the model needs at least. Raises PlanError if no number is enough."""
    return len(fill_in_order(model, layout, [device] * len(layout.blocks), dtype, context, batch_size).stages)


def fill_in_order(
    model: str, layout: Layout, devices: Sequence[Device], dtype: str, context: int = 2048, batch_size: int = 1
) -> Plan:
    """A plan that fills each device before it turns to the next: for devices of unequal speed, fastest first.

    Devices that are left empty are dropped. Raises PlanError when the last device is full too, or as `make_plan`.
    """
    size = DTYPE_BYTES[dtype]
    check_request(model, layout.max_context, context, batch_size)
    stages = _fill(layout, devices, context, batch_size, size)
    if stages is None:
        devices = devices[: len(layout.blocks)]
        best = Plan(model, dtype, context, batch_size, _stages(layout, devices, context, batch_size, size))
        raise PlanError(_does_not_fit(best, layout, devices))
    return Plan(model, dtype, context, batch_size, tuple(stages))
