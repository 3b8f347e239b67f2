"""A loaded stage and the sequences whose keys and values it keeps."""

import os
from typing import Any, cast

import torch

from ..checkpoint.headers import open_checkpoint
from ..errors import CheckpointError
from ..families.layout import Family
from ..families.table import family_of
from ..load.device_map import prepare_kernels
from ..load.fill import check_planned_bytes, fill, move_buffers
from ..load.intake import OnProgress
from ..model.skeleton import Skeleton, skeleton_of
from ..model.stage import StageModel, owner
from ..plan.plan import Plan
from .packed import CacheKey, Packed, SequenceLost, pack, unpack


class RunningStage:
    """Stage `index` of a plan on one device of this process, loaded. `report` says what that took."""

    def __init__(self, plan: Plan, index: int, device: str, on_progress: OnProgress) -> None:
        """Load it: read its byte ranges only. Raises what `load_sharded_int8` raises."""
        self._device = device
        self._caches: dict[int, Any] = {}
        if plan.spec.folder is None:
            raise CheckpointError(f"{plan.spec.name}: the plan names no folder with weights")
        checkpoint = open_checkpoint(plan.spec.folder, plan.spec.access)
        skeleton = skeleton_of(checkpoint, plan.spec, plan.dtype)
        family = family_of(skeleton.model.config.model_type)
        _check_all_placed(plan, skeleton, family)
        stage = plan.stages[index]
        self._stage = StageModel(skeleton, family, stage.modules)
        check_planned_bytes(stage, self._stage.slots)
        self.report = fill(checkpoint, skeleton, self._stage.slots, lambda name: device, on_progress)
        if self._stage.has_head:
            skeleton.tie()
        move_buffers(self._stage, lambda name: device)
        prepare_kernels(self._stage, plan.workload.most_rows)
        self._stage.eval()

    @torch.inference_mode()
    def step(
        self,
        inputs: Packed,
        key: CacheKey | None,
        mask: Packed | None,
        positions: Packed | None,
        keep: int | Packed | None,
    ) -> Packed:
        """One step of this stage. `keep`, on the last stage: the tokens to return hidden states or logits of."""
        hidden = self._stage(
            unpack(inputs, self._device),
            unpack(mask, self._device),
            unpack(positions, self._device),
            None if key is None else self._cache(key),
        )
        if keep is not None:
            index = unpack(keep, self._device) if isinstance(keep, Packed) else slice(-keep if keep else None, None)
            hidden = hidden[:, index]
            if self._stage.has_head:
                hidden = self._stage.head(hidden)
        return cast(Packed, pack(hidden))

    def _cache(self, key: CacheKey) -> Any:
        if key.id not in self._caches:
            if key.started:
                raise SequenceLost(f"the worker in process {os.getpid()} does not know sequence {key.id}")
            self._caches[key.id] = self._stage.new_cache()
        cache = self._caches[key.id]
        for method, argument in key.edits:
            getattr(cache, method)(torch.tensor(argument) if isinstance(argument, list) else argument)
        return cache

    @torch.inference_mode()
    def head(self, hidden: Packed) -> Packed:
        """Logits of the last stage's hidden states, where the head lives with the embeddings."""
        return cast(Packed, pack(self._stage.head(cast(torch.Tensor, unpack(hidden, self._device)))))

    def drop(self, cache_id: int) -> None:
        """Forget a batch of sequences."""
        self._caches.pop(cache_id, None)

    def kept(self) -> int:
        """How many batches of sequences are kept."""
        return len(self._caches)


def _check_all_placed(plan: Plan, skeleton: Skeleton, family: Family) -> None:
    """Raise CheckpointError for a model that has tensors beside the modules that its family has."""
    placed = {module for stage in plan.stages for module in stage.modules}
    for name in skeleton.slots:
        if owner(name, family) not in placed:
            raise CheckpointError(
                f"{plan.spec.folder}: tensor {name!r} is in no stage of the plan: the model is not quite a "
                f"{family.name} model, and cannot be cut; load it in one process with load_sharded_int8"
            )
