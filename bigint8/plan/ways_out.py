"""What would make a model fit that does not: each way is planned before it is offered.

A way changes one thing. Its plan is made by the same planner that found none for what was asked, so what is offered
works. The most that a setting may be is found by bisection: a plan takes milliseconds.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from ..options import PAGE_TOKENS, Workload
from ..units import readable
from .devices import Device
from .draft import Draft
from .plan import Plan, Stage
from .predict import Prediction, predict
from .spec import ModelSpec

SHORTEST_CONTEXT = 64
"""Tokens: a shorter context is no way out."""

SHORTEST_CHUNK = 16
"""Tokens of a prompt that run at once, at least: below, a prompt takes as many steps as its answer."""

Planner = Callable[[ModelSpec, Sequence[Device], Workload], Plan | None]
"""Makes the plan of a model over some devices, None if it does not fit."""

Change = Literal["head", "chunk", "context", "sequences", "devices", "memory", "offload"]


@dataclass(frozen=True)
class Way:
    """One change with which the model fits: in words, its plan, and what that promises by the time model."""

    change: Change
    text: str
    plan: Plan
    prediction: Prediction


@dataclass(frozen=True)
class WaysOut:
    """Why a model does not fit, and what would help.

    workload: what was asked for
    closest: the cut over all devices, in their order, that comes nearest to fitting, with all that the planner changes
        when it must: an int8 head, shorter chunks; at least one of its stages lacks memory
    plans: how many plans were made for this
    """

    workload: Workload
    closest: Plan
    ways: tuple[Way, ...]
    plans: int

    @property
    def needed_bytes(self) -> int:
        """What weights, keys and values, and the workspaces take in the closest cut."""
        return sum(used_bytes(stage) for stage in self.closest.stages)

    @property
    def there_bytes(self) -> int:
        """What the devices have."""
        return sum(stage.device.usable_bytes for stage in self.closest.stages)

    @property
    def short_bytes(self) -> int:
        """What the stages of the closest cut lack, those that lack anything."""
        return sum(max(0, -stage.headroom_bytes) for stage in self.closest.stages)

    def way(self, change: Change) -> Way | None:
        """The first way with this change, None if there is none."""
        return next((way for way in self.ways if way.change == change), None)

    def __str__(self) -> str:
        stages = self.closest.stages
        worst = min(stages, key=lambda stage: stage.headroom_bytes)
        weights, kv = sum(stage.weight_bytes for stage in stages), sum(stage.kv_bytes for stage in stages)
        workspace = sum(stage.workspace_bytes for stage in stages)
        devices = " and ".join(f"{n} x {model}" for model, n in Counter(s.device.model for s in stages).items())
        helps = "; ".join(way.text for way in self.ways) or "devices with more memory"
        return (
            f"{self.closest.spec.name} does not fit: it needs {readable(self.needed_bytes)} ({readable(weights)} of "
            f"weights, {readable(kv)} of KV cache, {readable(workspace)} of workspace) and {devices} have "
            f"{readable(self.there_bytes)}; cut as evenly as can be, stage {worst.index} on {worst.device.name} lacks "
            f"{readable(-worst.headroom_bytes)}. What would help: {helps}"
        )


def used_bytes(stage: Stage) -> int:
    """What a stage takes of its device."""
    return stage.weight_bytes + stage.kv_bytes + stage.workspace_bytes


def ways_out(
    spec: ModelSpec,
    devices: Sequence[Device],
    workload: Workload,
    closest: Plan,
    planner: Planner,
    offloading: Planner | None = None,
) -> WaysOut:
    """Try what would help. `closest` is the plan that does not fit; all else is as it was asked for.

    offloading: makes plans with blocks in the host's memory, None where `planner` does
    """
    tries = _Tries(spec, devices, workload, closest, planner)
    ways = (*tries.ways(), *([] if offloading is None else tries.offload(offloading)))
    return WaysOut(workload, closest, ways, tries.plans)


class _Tries:
    """The plans that are made to find out what helps."""

    def __init__(
        self, spec: ModelSpec, devices: Sequence[Device], workload: Workload, closest: Plan, planner: Planner
    ) -> None:
        self.spec, self.devices, self.work = spec, devices, workload
        self.closest, self._planner = closest, planner
        self.plans = 0

    def ways(self) -> Iterator[Way]:
        """Those that give up least come first."""
        for find in (self._int8_head, self._chunk, self._context, self._sequences, self._devices, self._memory):
            for change, text, plan in find():
                yield Way(change, text, plan, predict(plan))

    def offload(self, offloading: Planner) -> Iterator[Way]:
        """Blocks that no device holds in the host's memory, where the boxes say how much of it they may take."""
        if not any(device.box.host_bytes for device in self.devices):
            return
        self.plans += 1
        plan = offloading(self.spec, self.devices, self.work)
        if plan is not None:
            blocks, size = sum(len(s.host_blocks) for s in plan.stages), sum(s.host_bytes for s in plan.stages)
            text = f"{blocks} blocks ({readable(size)}) in the host's memory, brought in at every step"
            yield Way("offload", text, plan, predict(plan))

    def _plan(self, workload: Workload, devices: Sequence[Device] | None = None) -> Plan | None:
        self.plans += 1
        return self._planner(self.spec, devices or self.devices, workload)

    def _int8_head(self) -> Iterator[tuple[Change, str, Plan]]:
        """Where the settings refuse it: where they leave it open, the planner tried it."""
        settings = self.spec.int8
        if settings.int8_head is not False or settings.skip_modules is not None:
            return
        smaller = replace(self.spec, int8=settings.model_copy(update={"int8_head": None})).with_int8_head()
        if smaller is not None:
            self.plans += 1
            plan = self._planner(smaller, self.devices, self.work)
            if plan is not None:
                yield "head", "int8_head=True, where the settings keep the head in 16-bit", plan

    def _chunk(self) -> Iterator[tuple[Change, str, Plan]]:
        """Shorter ones than the planner takes by itself when it must."""
        chunk = min(self.closest.workload.chunk, self.work.context * self.work.sequences)
        smaller = (2**power for power in range(chunk.bit_length(), 0, -1) if SHORTEST_CHUNK <= 2**power < chunk)
        for tokens in smaller:
            plan = self._plan(replace(self.work, chunk=tokens))
            if plan is not None:
                yield "chunk", f"chunks of {tokens} tokens of a prompt instead of {self.work.chunk}", plan
                return

    def _context(self) -> Iterator[tuple[Change, str, Plan]]:
        """In whole pages."""

        def of_pages(pages: int) -> Plan | None:
            return self._plan(replace(self.work, context=pages * PAGE_TOKENS))

        found = _most(SHORTEST_CONTEXT // PAGE_TOKENS, (self.work.context - 1) // PAGE_TOKENS, of_pages)
        if found is not None:
            yield "context", f"context={found.workload.context}, the longest that fits", found

    def _sequences(self) -> Iterator[tuple[Change, str, Plan]]:
        found = _most(1, self.work.sequences - 1, lambda number: self._plan(replace(self.work, sequences=number)))
        if found is not None:
            yield "sequences", f"batch_size={found.workload.sequences}, the most that fit", found

    def _devices(self) -> Iterator[tuple[Change, str, Plan]]:
        """The fewest more GPUs of each kind that is there."""
        kinds = {(device.model, device.usable_bytes): device for device in self.devices if device.kind == "cuda"}
        alike = len(kinds) == 1 and all(device.kind == "cuda" for device in self.devices)
        for device in kinds.values():
            found = self._fewest_more(device)
            if found is not None:
                more, plan = found
                there = len(self.devices)
                text = f"{there + more} such devices instead of {there}" if alike else f"{more} more {device.model}"
                yield "devices", text, plan

    def _fewest_more(self, device: Device) -> tuple[int, Plan] | None:
        most = len(self.spec.known_layout.blocks) - len(self.devices)
        number = max(1, ceil(self._missing() / max(1, device.usable_bytes)))
        plan, too_few, step = None, number - 1, 1
        while plan is None and too_few < most:
            number = min(number, most)
            plan = self._plan(self.work, more_devices(self.devices, device, number))
            if plan is None:
                too_few, number, step = number, number + step, 2 * step
        if plan is None:
            return None
        while number - too_few > 1:
            middle = (number + too_few) // 2
            fewer = self._plan(self.work, more_devices(self.devices, device, middle))
            if fewer is None:
                too_few = middle
            else:
                number, plan = middle, fewer
        return number, plan

    def _missing(self) -> int:
        """The bytes that all devices lack together, whichever of them are used and wherever the cuts are."""
        spec, dtype = self.closest.spec, self.closest.dtype
        draft = Draft(spec, self.closest.workload, dtype, 1)
        whole = draft.stage(0, self.devices[0], 0, len(spec.known_layout.blocks))
        room = sum(max(0, device.usable_bytes - draft.workspace(device)) for device in self.devices)
        return max(0, whole.weight_bytes + whole.kv_bytes - room)

    def _memory(self) -> Iterator[tuple[Change, str, Plan]]:
        """Devices that hold the closest cut: as large as its largest stage, or all larger by the same factor."""
        stages = self.closest.stages
        if any(device.kind == "disk" for device in self.devices):
            return
        sizes = {device.usable_bytes for device in self.devices}
        largest = max(used_bytes(stage) for stage in stages)
        factor = max(used_bytes(stage) / max(1, stage.device.usable_bytes) for stage in stages)
        alike = len(sizes) == 1
        plan = self._plan(
            self.work,
            [replace(d, usable_bytes=largest if alike else ceil(d.usable_bytes * factor) + 1) for d in self.devices],
        )
        if plan is None:
            return
        there = len(self.devices)
        devices = f"{there} devices" if there > 1 else "a device"
        if alike:
            yield "memory", f"{devices} with {readable(largest)} to use instead of {readable(sizes.pop())}", plan
        else:
            yield "memory", f"{devices} with {factor:.2f} times the memory to use", plan


def _most(least: int, most: int, plan_with: Callable[[int], Plan | None]) -> Plan | None:
    """The plan with the largest number from `least` to `most` that fits, None if none does: less always fits too."""
    if least > most:
        return None
    found = plan_with(least)
    if found is None:
        return None
    fits, too_many = least, most + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        plan = plan_with(middle)
        if plan is None:
            too_many = middle
        else:
            fits, found = middle, plan
    return found


def more_devices(devices: Sequence[Device], device: Device, number: int) -> list[Device]:
    """The devices, and behind the last one like `device` so many more of its kind, in its box."""
    numbers = [int(d.name.partition(":")[2] or 0) for d in devices if d.box == device.box and d.kind == device.kind]
    new = [replace(device, name=f"{device.kind}:{max(numbers) + 1 + i}") for i in range(number)]
    last = max(i for i, d in enumerate(devices) if (d.model, d.usable_bytes) == (device.model, device.usable_bytes))
    return [*devices[: last + 1], *new, *devices[last + 1 :]]
