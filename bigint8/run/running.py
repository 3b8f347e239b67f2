"""A stage that is loaded and runs steps: on a worker, or the whole model in this process."""

from math import ceil
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoint.headers import open_checkpoint
from ..errors import CheckpointError
from ..families.layout import Family
from ..families.table import family_of
from ..load.assign import match_tensors
from ..load.device_map import prepare_kernels
from ..load.fill import check_planned_bytes, fill, move_buffers
from ..load.intake import OnProgress
from ..load.offload import offload_of
from ..model.open_stage import open_stage
from ..model.ragged import RaggedStage, Room
from ..model.skeleton import Skeleton, skeleton_of
from ..model.stage import StageModel, owner
from ..model.step import Step
from ..options import PAGE_TOKENS
from ..plan.memory import head_rows
from ..plan.plan import Plan
from ..sources.hub import fetch_shards, make_outline
from .sampling import choose

Values = NDArray[np.int32] | NDArray[np.float32]


class RunningStage:
    """Stage `index` of a plan on one device of this process, loaded. `report` says what that took."""

    def __init__(self, plan: Plan, index: int, device: str, on_progress: OnProgress) -> None:
        """Load it: read its byte ranges only. Raises what `load_sharded_int8` raises."""
        if plan.spec.folder is None:
            raise CheckpointError(f"{plan.spec.name}: the plan names no folder with weights")
        hub, folder = plan.spec.hub, plan.spec.folder
        checkpoint = open_checkpoint(folder if hub is None else make_outline(hub), plan.spec.access)
        skeleton = skeleton_of(checkpoint, plan.spec, plan.dtype)
        family = family_of(skeleton.model.config.model_type)
        _check_all_placed(plan, skeleton, family)
        planned = plan.stages[index]
        stage = StageModel(skeleton, family, planned.modules)
        check_planned_bytes(planned, stage.slots)
        if hub is not None:
            needed = match_tensors(stage.slots, checkpoint, skeleton.tensors)
            fetch_shards(hub, (transfer.tensor.file.relative_to(hub.folder).as_posix() for transfer in needed))
        offload = offload_of([planned], stage.slots, family)
        self.report = fill(checkpoint, skeleton, stage.slots, lambda name: device, on_progress, None, offload)
        if stage.is_first and stage.has_head:
            skeleton.tie()
        move_buffers(stage, lambda name: device)
        prepare_kernels(stage, plan.workload.most_rows)
        kept = None if offload is None else offload.kept
        self._stage = open_stage(stage.eval(), plan.spec, room_of(plan, device), kept)
        self._stage.prepare()

    def run(self, step: Step, hidden: Tensor | None) -> Tensor:
        """As `RaggedStage.run`."""
        return self._stage.run(step, hidden)

    def answer(self, step: Step, hidden_RH: Tensor) -> Values:
        """What a step asks of its kept rows: tokens, with log probabilities or without, or logits: `Result.values`."""
        return answer(self._stage, step, hidden_RH)


def room_of(plan: Plan, device: str) -> Room:
    """What a plan leaves room for on one of its devices."""
    work = plan.workload
    table_pages, dtype = ceil(work.context / PAGE_TOKENS), getattr(torch, plan.dtype)
    return Room(plan.pages, table_pages, work.most_rows, dtype, torch.device(device), head_rows(work))


def answer(stage: RaggedStage, step: Step, hidden_RH: Tensor) -> Values:
    """As `RunningStage.answer`."""
    logits_RV = stage.logits(hidden_RH)
    values = choose(logits_RV, step) if len(step.choices) else logits_RV
    return cast(Values, values.cpu().numpy())


def _check_all_placed(plan: Plan, skeleton: Skeleton, family: Family) -> None:
    """Raise CheckpointError for a model that has tensors beside the modules that its family has."""
    placed = {module for stage in plan.stages for module in stage.modules}
    for name in skeleton.slots:
        if owner(name, family) not in placed:
            raise CheckpointError(
                f"{plan.spec.folder}: tensor {name!r} is in no stage of the plan: the model is not quite a "
                f"{family.name} model, and cannot be cut; load it in one process with load_sharded_int8"
            )
