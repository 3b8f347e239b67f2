"""What becomes of a stage whose worker is lost: another worker, which has room for it, loads it."""

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

from ..errors import PlanError, WorkerError
from ..plan.devices import share_of
from ..plan.plan import Plan, Stage
from ..units import decimal
from .crew import Crew
from .preflight import check_files


def replace_lost(crew: Crew, plan: Plan, lost: Collection[int]) -> Plan:
    """Start other workers instead of those that are lost. The plan, with the devices that its stages are on now.

    A worker stays on its node if that is there; otherwise it goes to one where its stage fits. Raises WorkerError where
    no place is left, PlanError where none of those that are left has room.
    """
    moved, avoid, reasons = crew.replace(lost, len(plan.stages)), set[str](), list[str]()
    while moved:
        workers = Counter(crew.infos[i].node for i in moved)
        stages = list(plan.stages)
        misfits = []
        for i in moved:
            stages[i] = _on_another(stages[i], crew, i, workers[crew.infos[i].node])
            reason = _misfit(stages[i], crew, i)
            if reason is not None:
                misfits.append(i)
                avoid.add(crew.infos[i].node)
                reasons.append(reason)
        plan = replace(plan, stages=tuple(stages))
        if not misfits:
            break
        try:
            moved = crew.replace(misfits, len(plan.stages), avoid)
        except WorkerError as error:
            raise PlanError(f"{'; '.join(reasons)}: {error}") from None
    check_files(plan.spec, {crew.infos[i].node: crew.workers[i] for i in lost if i < len(plan.stages)})
    return plan


def _on_another(stage: Stage, crew: Crew, index: int, workers: int) -> Stage:
    """The stage on the device of a worker that came with so many to its node. What the others have there is taken."""
    device = crew.infos[index].device
    if crew.kind == "cpu":
        return replace(stage, device=replace(device, usable_bytes=share_of(device.usable_bytes, workers)))
    return replace(stage, device=replace(device, name=f"cuda:{crew.infos[index].gpu}"))


def _misfit(stage: Stage, crew: Crew, index: int) -> str | None:
    """Why a stage does not fit where its worker is now."""
    info = crew.infos[index]
    if stage.headroom_bytes < 0:
        return (
            f"stage {stage.index} takes {decimal(stage.needed_bytes)}, and {crew.name(index)}, where it would go, has "
            f"{decimal(stage.device.usable_bytes)}"
        )
    if stage.host_bytes > info.host_bytes or stage.disk_bytes > info.disk_bytes:
        return f"stage {stage.index} keeps blocks beside its device, for which {info.host} has no room"
    return None
