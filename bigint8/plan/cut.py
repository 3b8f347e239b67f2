"""Where a model is cut into stages. Pure functions over plain data.

The cut is exact (`search`): of all ways to cut the blocks into runs over some of the devices, in any order that keeps
the devices of a box together, it takes the one whose slowest stage is fastest, or whose stages and hops take least
time together, by the time model. Of cuts that are equally fast, it takes one in which the fullest device is as empty
as possible.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from ..errors import PlanError
from ..options import Workload
from .devices import Device, pick_dtype
from .draft import Draft, Objective
from .offload import Spill, offload_is_not_enough, offload_note
from .plan import Plan
from .spec import ModelSpec, check_workload
from .ways_out import Planner, ways_out

SPARE = 0.01
"""Share of a device that a plan leaves free where it can: the workspace is an estimate."""

SHORTER_CHUNKS = (256, 128, 64)
"""Tokens of a prompt that run at once, where the workspace of more would not fit."""

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

    A device is left out if no stage gets faster with it; a note says so. Where the model does not fit, the output head
    becomes int8 if the settings leave it open, and then prompts run in shorter chunks. Raises PlanError, with the
    numbers, when it does not fit, when there are more devices than blocks or when the context is longer than the
    model's.

    spill: what may hold blocks that no device holds. They are offloaded only if nothing else makes the model fit; a
        note says how many. By default nothing may.
    """
    check_workload(spec, workload)
    blocks = len(spec.known_layout.blocks)
    if not devices:
        raise PlanError("no devices to place the model on")
    if len(devices) > blocks:
        raise PlanError(f"gpus={len(devices)}: {spec.name} has {blocks} blocks; use at most that many devices")

    planner = partial(_best_plan, objective=objective, spill=spill)
    plan = planner(spec, devices, workload)
    if plan is not None:
        return plan
    shortest = replace(workload, chunk=min(workload.chunk, *SHORTER_CHUNKS))
    closest = _closest(spec, devices, shortest, _dtype(spec, devices))
    offloading = partial(_best_plan, objective=objective, spill=Spill()) if spill is None else None
    found = ways_out(spec, devices, workload, closest, planner, offloading)
    not_enough = "" if spill is None else f". {offload_is_not_enough(closest, spill)}"
    raise PlanError(f"{found}{not_enough}", ways_out=found)


def _best_plan(
    spec: ModelSpec, devices: Sequence[Device], workload: Workload, objective: Objective, spill: Spill | None
) -> Plan | None:
    """As `make_plan`, but None where the model does not fit."""
    dtype = _dtype(spec, devices)
    for home in dict.fromkeys((None, spill)):  # blocks are offloaded only where nothing else helps
        for candidate, work, spare, notes in _settings(spec, workload, home is not None):
            plan = Draft(candidate, work, dtype, len(devices), home).best_plan(devices, objective, spare)
            if plan is not None:
                offloaded = (offload_note(plan),) if plan.is_offloaded else ()
                return replace(plan, notes=(*notes, *plan.notes, *offloaded, *_left_out(devices, plan)))
    return None


def _settings(
    spec: ModelSpec, workload: Workload, offloads: bool = False
) -> Iterator[tuple[ModelSpec, Workload, float, tuple[str, ...]]]:
    """What to plan with, best first: model, work, the share of a device to leave free, and what to say of it.

    An int8 head costs next to nothing: rather that than a device without room to spare. Where blocks are offloaded it
    is the other way round, since a stage that offloads has what room it wants, and gives the tokens that it gave with
    all its blocks. A shorter chunk makes prompts slower, so it comes after both.
    """
    smaller = spec.with_int8_head()
    as_it_is: list[tuple[ModelSpec, float, tuple[str, ...]]] = [(spec, SPARE, ()), (spec, 0.0, ())]
    heads = [(smaller, spare, (INT8_HEAD_NOTE,)) for spare in (SPARE, 0.0)] if smaller is not None else []
    tries = [*as_it_is, *heads] if offloads else [as_it_is[0], *heads, as_it_is[1]]
    yield from ((candidate, workload, spare, notes) for candidate, spare, notes in tries)
    for chunk in (size for size in SHORTER_CHUNKS if size < workload.chunk):
        notes = (INT8_HEAD_NOTE,) if smaller is not None else ()
        note = f"prompts run in chunks of {chunk} tokens, not {workload.chunk}: otherwise the model would not fit"
        yield smaller or spec, replace(workload, chunk=chunk), 0.0, (*notes, note)


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

    def dtype(devices: Sequence[Device]) -> str:
        return _dtype(spec, devices[:fast] or devices)

    def planner(spec: ModelSpec, devices: Sequence[Device], workload: Workload) -> Plan | None:
        return _filled_in_order(spec, devices, workload, dtype(devices))

    plan = planner(spec, devices, workload)
    if plan is None:
        some = devices[: len(spec.known_layout.blocks)]
        raise _does_not_fit(spec, some, workload, _closest(spec, some, workload, dtype(devices)), planner)
    return plan


def _filled_in_order(spec: ModelSpec, devices: Sequence[Device], workload: Workload, dtype: str) -> Plan | None:
    """With the settings of `_settings` that keep the chunk: shorter ones are a way out here."""
    for candidate, work, spare, notes in _settings(spec, workload):
        draft = Draft(candidate, work, dtype, len(devices))
        stages = draft.fill(devices) if work == workload else None
        if stages is not None and all(s.headroom_bytes >= spare * s.device.usable_bytes for s in stages):
            return Plan(candidate, work, dtype, tuple(stages), draft.pages, notes)
    return None


def _dtype(spec: ModelSpec, devices: Sequence[Device]) -> str:
    return pick_dtype(spec.int8.dtype, spec.stored, list(devices))


def _left_out(devices: Sequence[Device], plan: Plan) -> tuple[str, ...]:
    """A note that names the devices which the plan does not use, if there are any."""
    left = list(devices)
    for stage in plan.stages:
        left.remove(stage.device)
    names = ", ".join(f"{device.name} ({device.model})" for device in left)
    return (f"left out, since no stage would be faster with it: {names}",) if left else ()


def _closest(spec: ModelSpec, devices: Sequence[Device], workload: Workload, dtype: str) -> Plan:
    """The plan that comes nearest to fitting, over all devices in their order."""
    draft = Draft(spec.with_int8_head() or spec, workload, dtype, len(devices))
    return draft.plan(draft.emptiest_cut(devices), devices)


def _does_not_fit(
    spec: ModelSpec, devices: Sequence[Device], workload: Workload, closest: Plan, planner: Planner
) -> PlanError:
    found = ways_out(spec, devices, workload, closest, planner)
    return PlanError(str(found), ways_out=found)
