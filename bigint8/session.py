"""The public path from a model's name to a model that runs: find, open, spec, plan, load."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .checkpoint.folder import absolute, check_target
from .checkpoint.headers import Checkpoint, open_checkpoint
from .errors import CheckpointError
from .options import SHARD_BYTES, Access, Int8Config, dtype_name
from .plan.devices import cuda_devices
from .plan.spec import ModelSpec, spec_of
from .sources.find import Source, find_source

if TYPE_CHECKING:
    import torch

    from .load.bars import Shown
    from .load.intake import CheckReport
    from .load.save import QuantizeReport
    from .run.trace import Trace


@dataclass(frozen=True)
class FoundModel:
    """A model that was found: its source, its spec, and its opened checkpoint if the weights are at hand."""

    source: Source
    spec: ModelSpec
    checkpoint: Checkpoint | None

    def opened(self) -> Checkpoint:
        """The checkpoint. Raises CheckpointError, with the places that were searched, where there is none."""
        if self.checkpoint is None:
            raise self.source.not_found()
        return self.checkpoint


def find_model(
    model: str | os.PathLike[str],
    config: Int8Config | None = None,
    access: Access = Access(),  # noqa: B008  (frozen)
    checkpoint: str | os.PathLike[str] | None = None,
    weights: bool = True,
    elsewhere: bool = False,
) -> FoundModel:
    """Find a preset, a folder or a hub id, and read its config and its shards' headers.

    checkpoint: where a preset's weights are, a folder or a hub id
    weights: fetch them if they are on the hub; without, a checkpoint that is not whole is known by its config alone
    elsewhere: machines of a cluster will read the weights, and fetch those on the hub themselves: here only the headers

    Raises CheckpointError for a name that is none of these, a config that lacks sizes and a checkpoint that is wrong.
    """
    source = find_source(model, checkpoint, access, fetch=weights, elsewhere=elsewhere)
    opened = None
    if source.folder is not None:
        try:
            opened = open_checkpoint(source.folder, access)
        except CheckpointError:
            if weights:
                raise
    return FoundModel(source, spec_of(source, config, access, opened), opened)


# --- one process ---


def load_sharded_int8(
    path: str | os.PathLike[str],
    device_map: "str | int | torch.device | Mapping[str, Any]" = "auto",
    *,
    config: Int8Config | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    dtype: "str | torch.dtype" = "auto",
    context: int | None = None,
    batch_size: int = 1,
    offload_folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Any:
    """Load a causal language model with int8 weights in one process; returns the transformers model, ready to use.

    path: a checkpoint folder, a hub id or a preset's name
    device_map: "auto" plans over the GPUs; blocks that have no room there come from the host's memory or from files
        when they are needed, or the CPU computes them, whichever is faster; a device has all of the model; a mapping
        of module names to devices ("cpu", 0, "cuda:1", "disk") is taken as it is
    config: threshold, skipped modules and activations of the int8 layers; `dtype` here overrides the config's
    max_memory: the most to use on each device, in bytes or as "20GiB", by GPU index or "cpu"; others are not used
    context, batch_size: tokens of each sequence and sequences at once to leave room for (2048, or the model's length
        if that is shorter; one). A longer sequence is refused, and more of them than have room there
    offload_folder: where weights that fit nowhere else are kept in files, which go when the model does; by default
        beside what is converted (BIGINT8_CACHE)

    An int8 checkpoint (of `save_int8`, `python -m bigint8.quantize` or bitsandbytes) is recognised; on the CPU its
    weights are mapped files. The model has `plan`, `hf_device_map`, `load_report` and `save_int8(folder)`. Raises
    CheckpointError for a checkpoint that is missing or wrong, PlanError when it does not fit or the device map does not
    cover the model. Nothing half-loaded is returned.
    """
    settings = config or Int8Config()
    if (wanted := dtype_name(dtype)) != "auto":
        settings = settings.model_copy(update={"dtype": wanted})
    found = find_model(path, settings, Access(revision, trust_remote_code))
    workload = found.spec.workload(context, batch_size)

    checkpoint = found.opened()
    warm_up(found.spec, (device.kind for device in cuda_devices()))

    from .load.device_map import place

    placement = place(found.spec, checkpoint, workload, device_map, max_memory, offload_folder)
    return load_here(placement, checkpoint, progress)


def warm_up(spec: ModelSpec, kinds: Iterable[str]) -> None:
    """Import what a load in this process needs; if it is onto the CPU, begin to compile kernels meanwhile."""
    from .load.warm_up import compile_kernels, import_model, importing

    with importing():
        if "cuda" not in kinds:
            compile_kernels(spec)
        import_model(spec)


def load_here(placement: Any, checkpoint: Checkpoint, progress: "Shown", trace: "Trace | None" = None) -> Any:
    """The transformers model of a placement, loaded in this process."""
    from .load.bars import LoadProgress
    from .load.loaded import as_loaded
    from .model.config import read_generation_config
    from .run.local import with_pages

    generation_config = read_generation_config(checkpoint.folder)
    with LoadProgress([placement.plan.spec.name], enabled=progress) as bars:
        model, report = placement.load(checkpoint, lambda done, total: bars.update(0, done, total))
    if generation_config is not None:
        model.generation_config = generation_config
    return with_pages(as_loaded(model, placement.plan, report), trace)


# --- checkpoints ---


def quantize(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    config: Int8Config | None = None,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
    access: Access = Access(),  # noqa: B008  (frozen)
) -> "QuantizeReport":
    """Write the int8 checkpoint of a 16-bit one: a folder, a preset's name or a hub id.

    The int8 values are those of `load_sharded_int8(source).save_int8(folder)`; what is not int8 keeps the dtype that it
    is stored in. Needs the memory of the staging buffers, whatever the model's size; a transposed layer (GPT-2) is held
    whole. Raises CheckpointError for a source that is wrong or int8 already, a folder that is taken, a full disk.
    """
    check_target(absolute(folder), overwrite)
    found = find_model(source, config, access)

    from .load.bars import LoadProgress
    from .load.save import check_apart, rewrite
    from .model.skeleton import skeleton_of

    checkpoint = found.opened()
    check_apart(checkpoint, absolute(folder))
    skeleton = skeleton_of(checkpoint, found.spec, found.spec.stored)
    with LoadProgress([found.source.name], enabled=progress) as bars:
        return rewrite(
            checkpoint,
            skeleton,
            folder,
            found.spec.int8.threshold,
            overwrite,
            shard_bytes,
            lambda done, total: bars.update(0, done, total),
        )


def check(found: FoundModel, dtype: str = "auto", progress: bool = True) -> "CheckReport":
    """Read and quantize a whole checkpoint, keeping nothing. Raises what `load_sharded_int8` raises."""
    from .load.bars import LoadProgress
    from .load.intake import check_all
    from .model.skeleton import skeleton_of

    checkpoint = found.opened()
    skeleton = skeleton_of(checkpoint, found.spec, found.spec.stored if dtype == "auto" else dtype)
    with LoadProgress([found.source.name], enabled=progress) as bars:
        return check_all(checkpoint, skeleton, lambda done, total: bars.update(0, done, total))
