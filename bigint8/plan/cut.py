"""Where a model is cut into stages. Pure functions over plain data.

The cut is exact (`search`): of all ways to cut the blocks into runs over some of the devices, in any order that keeps
the devices of a box together, it takes the one whose slowest stage is fastest, or whose stages and hops take least
time together, by the time model. Of cuts that are equally fast, it takes one in which the fullest device is as empty
as possible.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import PlanError
from ..options import Workload
from ..units import readable
from .devices import Device, pick_dtype
from .draft import Draft, Objective
from .offload import Spill, offload_is_not_enough, offload_note
from .plan import Plan
from .spec import ModelSpec, check_workload

SPARE = 0.01
"""Share of a device that a plan leaves free where it can: the workspace is an estimate."""

INT8_HEAD_NOTE = (
    "the output head, and embeddings tied to it, are int8: otherwise the model would not fit, or only barely"
)


def make_plan(
    spec: ModelSpec,
    devices: Sequence[Device],
    workload: Workload,
    objective: Objective = "throughput",
    spill: Spill | None = None,
) -> Plan:
    """The best plan over some of the devices, or all.

    A device is left out if no stage gets faster with it; a note says so. Where the model does not fit and the settings
    leave the output head open, it becomes int8. Raises PlanError, with the numbers, when it does not fit, when there
    are more devices than blocks or when the context is longer than the model's.

    spill: what may hold blocks that no device holds. They are offloaded only if nothing else makes the model fit; a
        note says how many. By default nothing may.
    """
    check_workload(spec, workload)
    blocks = len(spec.known_layout.blocks)
    if not devices:
        raise PlanError("no devices to place the model on")
    if len(devices) > blocks:
        raise PlanError(f"gpus={len(devices)}: {spec.name} has {blocks} blocks; use at most that many devices")
    dtype = _dtype(spec, devices)
    smaller = spec.with_int8_head()
    tries = [(spec, SPARE), (smaller, SPARE), (smaller, 0.0), (spec, 0.0)]
    for candidate, spare in tries:
        if candidate is None:
            continue
        plan = Draft(candidate, workload, dtype, len(devices)).best_plan(devices, objective, spare)
        if plan is not None:
            notes = () if candidate is spec else (INT8_HEAD_NOTE,)
            return replace(plan, notes=(*notes, *_left_out(devices, plan)))
    # the same tokens as without: the head becomes int8 only where it has no room
    tries = [(spec, SPARE), (spec, 0.0), (smaller, SPARE), (smaller, 0.0)] if spill is not None else []
    for candidate, spare in tries:
        if candidate is None:
            continue
        plan = Draft(candidate, workload, dtype, len(devices), spill).best_plan(devices, objective, spare)
        if plan is not None:
            notes = () if candidate is spec else (INT8_HEAD_NOTE,)
            return replace(plan, notes=(*notes, offload_note(plan), *_left_out(devices, plan)))
    draft = Draft(spec, workload, dtype, len(devices))
    failed = draft.plan(draft.emptiest_cut(devices), devices)
    message = _does_not_fit(failed, devices)
    raise PlanError(message if spill is None else f"{message}. {offload_is_not_enough(failed, spill)}")


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
        draft = Draft(candidate, workload, _dtype(candidate, devices[:fast] or devices), len(devices))
        stages = draft.fill(devices)
        if stages is not None:
            return Plan(candidate, workload, draft.dtype, tuple(stages), draft.pages)
        some = devices[: len(draft.layout.blocks)]
        return draft.plan(draft.emptiest_cut(some), some)

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


def _left_out(devices: Sequence[Device], plan: Plan) -> tuple[str, ...]:
    """A note that names the devices which the plan does not use, if there are any."""
    left = list(devices)
    for stage in plan.stages:
        left.remove(stage.device)
    names = ", ".join(f"{device.name} ({device.model})" for device in left)
    return (f"left out, since no stage would be faster with it: {names}",) if left else ()


def _does_not_fit(plan: Plan, devices: Sequence[Device]) -> str:
    worst = min(plan.stages, key=lambda stage: stage.headroom_bytes)
    weights, kv = sum(s.weight_bytes for s in plan.stages), sum(s.kv_bytes for s in plan.stages)
    workspace = sum(s.workspace_bytes for s in plan.stages)
    there = sum(device.usable_bytes for device in devices)
    helps = []
    if len({(d.model, d.usable_bytes) for d in devices}) == 1 and devices[0].kind == "cuda":
        alike = [devices[0]] * len(plan.spec.known_layout.blocks)
        stages = Draft(plan.spec.with_int8_head() or plan.spec, plan.workload, plan.dtype, len(alike)).fill(alike)
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
