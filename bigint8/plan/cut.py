"""Where a model is cut into stages. Pure functions over plain data.

The cut is exact: of all ways to cut the blocks into one run per device, in the order of the devices, it takes one in
which the fullest device is as empty as possible.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf

from ..errors import PlanError
from ..options import Workload
from ..units import FLOAT_BYTES, readable
from .devices import Device, pick_dtype
from .memory import kv_bytes, pages, workspace_bytes
from .plan import Plan, Stage
from .spec import ModelSpec, check_workload

SPARE = 0.01
"""Share of a device that a plan leaves free where it can: the workspace is an estimate."""

INT8_HEAD_NOTE = (
    "the output head, and embeddings tied to it, are int8: otherwise the model would not fit, or only barely"
)


def make_plan(spec: ModelSpec, devices: Sequence[Device], workload: Workload) -> Plan:
    """The cut over all `devices`, in their order, that leaves the fullest one as empty as possible.

    Where the model does not fit and the settings leave the output head open, it becomes int8. Raises PlanError, with
    the numbers, when it does not fit, when there are more devices than blocks or when the context is longer than the
    model's.
    """
    check_workload(spec, workload)
    blocks = len(spec.known_layout.blocks)
    if not devices:
        raise PlanError("no devices to place the model on")
    if len(devices) > blocks:
        raise PlanError(f"gpus={len(devices)}: {spec.name} has {blocks} blocks; use at most that many devices")

    def cut(candidate: ModelSpec) -> Plan:
        drafted = _Draft(candidate, workload, _dtype(candidate, devices), len(devices))
        return drafted.plan(drafted.best_cut(devices), devices)

    plan = _first_that_fits(spec, cut)
    if not _fits(plan):
        raise PlanError(_does_not_fit(plan, devices))
    return plan


def fewest_devices(spec: ModelSpec, device: Device, workload: Workload) -> int:
    """How many devices like this one the model needs at least, with an int8 head if the settings leave that open.

    Raises PlanError if no number is enough.
    """
    smallest = spec.with_int8_head() or spec
    return len(fill_in_order(smallest, [device] * len(spec.known_layout.blocks), workload).stages)


def fill_in_order(spec: ModelSpec, devices: Sequence[Device], workload: Workload, fast: int | None = None) -> Plan:
    """A plan that fills each device before it turns to the next: for devices of unequal speed, fastest first.

    The first `fast` of them, all by default, decide the dtype. Devices that are left empty are dropped. Raises
    PlanError when the last device is full too, or as `make_plan`.
    """
    check_workload(spec, workload)

    def fill(candidate: ModelSpec) -> Plan:
        draft = _Draft(candidate, workload, _dtype(candidate, devices[:fast] or devices), len(devices))
        stages = draft.fill(devices)
        if stages is not None:
            return Plan(candidate, workload, draft.dtype, tuple(stages), draft.pages)
        some = devices[: len(draft.layout.blocks)]
        return draft.plan(draft.best_cut(some), some)

    plan = _first_that_fits(spec, fill)
    if not _fits(plan):
        raise PlanError(_does_not_fit(plan, [stage.device for stage in plan.stages]))
    return plan


def _dtype(spec: ModelSpec, devices: Sequence[Device]) -> str:
    return pick_dtype(spec.int8.dtype, spec.stored, list(devices))


def _fits(plan: Plan, spare: float = 0.0) -> bool:
    return all(stage.headroom_bytes >= spare * stage.device.usable_bytes for stage in plan.stages)


def _first_that_fits(spec: ModelSpec, cut: Callable[[ModelSpec], Plan]) -> Plan:
    """The plan of the model as it is; if that does not fit, or barely, the one with an int8 head, if that does."""
    plan = cut(spec)
    if _fits(plan, SPARE):
        return plan
    smaller = spec.with_int8_head()
    if smaller is not None:
        second = cut(smaller)
        if _fits(second):
            return replace(second, notes=(*second.notes, INT8_HEAD_NOTE))
    return plan


class _Draft:
    """The sizes of one model in one dtype under one workload, and the ways to cut it."""

    def __init__(self, spec: ModelSpec, workload: Workload, dtype: str, devices: int) -> None:
        self.spec, self.workload, self.dtype = spec, workload, dtype
        self.layout, self._size = spec.known_layout, FLOAT_BYTES[dtype]
        self.pages = pages(self.layout, workload, devices)
        self._kv = [kv_bytes(self.layout, b, self.pages, self._size) for b in range(len(self.layout.blocks))]

    def plan(self, cuts: Sequence[int], devices: Sequence[Device]) -> Plan:
        """The plan with these cuts, whether it fits or not."""
        bounds = zip(devices, cuts[:-1], cuts[1:], strict=True)
        stages = tuple(self.stage(i, device, first, last) for i, (device, first, last) in enumerate(bounds))
        return Plan(self.spec, self.workload, self.dtype, stages, self.pages)

    def workspace(self, device: Device) -> int:
        """Bytes of a stage's workspace: on the CPU activations are float32."""
        return workspace_bytes(self.layout, self.workload, self._size, device.kind in ("cpu", "disk"))

    def stage(self, index: int, device: Device, first: int, last: int) -> Stage:
        return Stage(
            index=index,
            device=device,
            first_block=first,
            last_block=last,
            modules=tuple(module.name for module in self.layout.stage(first, last)),
            weight_bytes=self.layout.part(first, last).weight_bytes(self._size),
            kv_bytes=sum(self._kv[first:last]),
            workspace_bytes=self.workspace(device),
        )

    def best_cut(self, devices: Sequence[Device]) -> list[int]:
        """Block indices where the stages begin, and the end: dynamic programming over (device, blocks placed).

        Minimises the largest share of a device's memory that its stage fills; over CPUs, of what a step reads.
        """
        blocks, count = len(self.layout.blocks), len(devices)
        below = [0]
        for block, kv in zip(self.layout.blocks, self._kv, strict=True):
            below.append(below[-1] + block.part.weight_bytes(self._size) + kv)
        workspaces = [self.workspace(device) for device in devices]
        # what the first and the last stage have besides their blocks; a stage may be both
        front = self.layout.part(0, 0).weight_bytes(self._size)
        back = self.layout.part(blocks, blocks).weight_bytes(self._size)

        reads = self._reads() if all(device.kind == "cpu" for device in devices) else None

        def cost(device: int, first: int, last: int) -> float:
            used = below[last] - below[first] + (front if first == 0 else 0) + (back if last == blocks else 0)
            filled = (used + workspaces[device]) / max(1, devices[device].usable_bytes)
            if reads is None:
                return filled
            return (reads[last] - reads[first]) / reads[-1] if filled <= 1 else 1 + filled

        best = [[inf] * (blocks + 1) for _ in range(count + 1)]
        came_from = [[0] * (blocks + 1) for _ in range(count + 1)]
        best[0][0] = 0.0
        for d in range(1, count + 1):
            for last in range(d, blocks - (count - d) + 1):
                for first in range(d - 1, last):
                    worst = max(best[d - 1][first], cost(d - 1, first, last))
                    if worst < best[d][last]:
                        best[d][last], came_from[d][last] = worst, first
        cuts = [blocks]
        for d in range(count, 0, -1):
            cuts.append(came_from[d][cuts[-1]])
        return cuts[::-1]

    def _reads(self) -> list[int]:
        """Bytes that a step reads before each block, and in all: of blocks, and of the head where it is.

        CPU workers of one box share its memory, so it does not matter which has more of it. The stage that takes
        longest decides how fast all are, and that is the one that reads most.
        """
        layout = self.layout
        reads = [0]
        for block in layout.blocks:
            reads.append(reads[-1] + block.part.weight_bytes(self._size))
        head = (layout.first[0] if layout.tied else layout.head).part.weight_bytes(self._size)
        return [0, *(read + head for read in reads[1:])] if layout.tied else [*reads[:-1], reads[-1] + head]

    def fill(self, devices: Sequence[Device]) -> list[Stage] | None:
        """Stages that fill each device before the next, on the fewest of equal devices. None if it does not fit."""
        blocks, at = len(self.layout.blocks), 0
        stages: list[Stage] = []
        for device in devices:
            best = None
            for last in range(at + 1, blocks + 1):
                stage = self.stage(len(stages), device, at, last)
                if stage.headroom_bytes < 0:
                    break
                best = stage
            if best is not None:
                stages.append(best)
                at = best.last_block
            if at == blocks:
                return stages
        return None


def _does_not_fit(plan: Plan, devices: Sequence[Device]) -> str:
    worst = min(plan.stages, key=lambda stage: stage.headroom_bytes)
    weights, kv = sum(s.weight_bytes for s in plan.stages), sum(s.kv_bytes for s in plan.stages)
    workspace = sum(s.workspace_bytes for s in plan.stages)
    there = sum(device.usable_bytes for device in devices)
    helps = []
    if len({(d.model, d.usable_bytes) for d in devices}) == 1 and devices[0].kind == "cuda":
        alike = [devices[0]] * len(plan.spec.known_layout.blocks)
        stages = _Draft(plan.spec.with_int8_head() or plan.spec, plan.workload, plan.dtype, len(alike)).fill(alike)
        if stages:
            helps.append(f"{len(stages)} such devices")
    if kv + workspace > weights // 20:
        helps.append(f"a shorter context than context={plan.workload.context}")
        if plan.workload.sequences > 1:
            helps.append(f"fewer sequences at once than batch_size={plan.workload.sequences}")
    helps.append("devices with more memory")
    return (
        f"{plan.spec.name} does not fit: it needs {readable(weights + kv + workspace)} ({readable(weights)} of "
        f"weights, {readable(kv)} of KV cache, {readable(workspace)} of workspace) and {len(devices)} x "
        f"{worst.device.model} have {readable(there)}; stage {worst.index} on {worst.device.name} lacks "
        f"{readable(-worst.headroom_bytes)}. What would help: {'; '.join(helps)}"
    )
