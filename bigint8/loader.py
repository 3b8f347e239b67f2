"""Loading: stream the checkpoint, quantize on the device, write into memory that was allocated once, up front."""

import os
import resource
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bigint8_kernels import quantize_rows
from torch import Tensor, nn

from .checkpoint import Checkpoint, TensorInfo, check_weight_dtypes, open_checkpoint
from .config import Int8Config
from .errors import BigInt8Error, CheckpointError, PlanError
from .families import family_of
from .placement import new_offload_folder, resolve_device_map
from .progress import LoadProgress
from .sources import find_source
from .stage import Skeleton, Slot, StageModel, build_skeleton
from .stream import TORCH_DTYPES, RowStream

OnProgress = Callable[[int, int], None]

SHOWN_NAMES = 10
"""How many names an error lists."""


@dataclass(frozen=True)
class LoadReport:
    """What a load did. `device_bytes` counts weights and scales on each device; peaks are of the whole process.

    `byte_ranges` are the (file name, start, stop) that were read; `unused` the tensors that no module wants.
    """

    seconds: float
    bytes_read: int
    dtype: str
    device_bytes: dict[str, int]
    peak_host_bytes: int
    peak_device_bytes: int
    byte_ranges: list[tuple[str, int, int]] = field(repr=False)
    unused: list[str]


def load_sharded_int8(
    path: str | os.PathLike[str],
    device_map: str | int | torch.device | Mapping[str, Any] = "auto",
    *,
    config: Int8Config | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    dtype: str | torch.dtype = "auto",
    context: int | None = None,
    batch_size: int = 1,
    offload_folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Any:
    """Load a causal language model with int8 weights in one process; returns the transformers model, ready to use.

    path: a checkpoint folder, a hub id or a preset's name
    device_map: "auto" plans over the GPUs, then the CPU (and `offload_folder`); a device puts all of it there; a
        mapping of module names to devices ("cpu", 0, "cuda:1", "disk") is taken as it is
    config: threshold, skipped modules and activations of the int8 layers; `dtype` here overrides the config's
    max_memory: the most to use on each device, in bytes or as "20GiB", by GPU index or "cpu"; others are not used
    context, batch_size: tokens of each sequence and sequences at once to leave room for (2048, or the model's length
        if that is shorter); a longer prompt is refused
    offload_folder: where weights that fit nowhere else are kept in files that are mapped into memory, in a folder of
        their own that goes when the model does

    The model has `hf_device_map` and `load_report`. Raises CheckpointError for a checkpoint that is missing or wrong,
    PlanError when it does not fit or the device map does not cover the model. Nothing half-loaded is returned.
    """
    from transformers import AutoConfig

    settings = config or Int8Config()
    wanted_dtype = str(dtype).removeprefix("torch.") if dtype != "auto" else settings.dtype
    if wanted_dtype not in ("auto", "float16", "bfloat16", "float32"):
        raise BigInt8Error(f"dtype={wanted_dtype}: must be auto, float16, bfloat16 or float32")
    source = find_source(os.fspath(path), revision=revision)
    if source.folder is None:
        raise source.not_found()
    checkpoint = open_checkpoint(source.folder, trust_remote_code)
    hf_config = _transformers_config(AutoConfig, checkpoint, trust_remote_code)
    limit = getattr(hf_config, "max_position_embeddings", None)
    context = context if context is not None else min(2048, limit or 2048)

    stored = stored_dtype(checkpoint)

    def skeleton_for(name: str) -> Skeleton:
        return _skeleton(checkpoint, hf_config, settings, name, trust_remote_code)

    generation_config = read_generation_config(checkpoint.folder)
    placement = resolve_device_map(
        device_map, skeleton_for, hf_config, stored, wanted_dtype, max_memory, context, batch_size, offload_folder
    )
    skeleton, model = placement.skeleton, placement.skeleton.model
    offloaded = None
    if "disk" in placement.device_map.values():
        offloaded = new_offload_folder(offload_folder)
        weakref.finalize(model, shutil.rmtree, offloaded, ignore_errors=True)
    with LoadProgress([source.name], enabled=progress) as bars:
        report = _fill(
            skeleton.slots,
            checkpoint,
            name_tensors(checkpoint, skeleton),
            skeleton.slots,
            placement.device_of,
            lambda done, total: bars.update(0, done, total),
            offloaded,
        )
    skeleton.tie()
    placement.finish(model)
    if generation_config is not None:
        model.generation_config = generation_config
    model.config.name_or_path = model.name_or_path = str(checkpoint.folder)
    model.load_report = report
    model.register_forward_pre_hook(_context_check(context), with_kwargs=True)
    return model


def load_stage(
    checkpoint: Checkpoint,
    first_block: int,
    last_block: int,
    device: str,
    config: Int8Config,
    dtype: str,
    on_progress: OnProgress | None = None,
    trust_remote_code: bool = False,
) -> tuple[StageModel, LoadReport]:
    """Load blocks [first_block, last_block) of a model, with the embeddings or the head if they belong there.

    Reads only the byte ranges of this stage. Raises what `load_sharded_int8` raises.
    """
    from transformers import AutoConfig

    hf_config = _transformers_config(AutoConfig, checkpoint, trust_remote_code)
    family = family_of(hf_config.model_type)
    skeleton = _skeleton(checkpoint, hf_config, config, dtype, trust_remote_code)
    named = name_tensors(checkpoint, skeleton)
    stage = StageModel(skeleton, family, first_block, last_block)
    report = _fill(stage.slots, checkpoint, named, skeleton.slots, lambda name: device, on_progress)
    if stage.has_head:
        skeleton.tie()
    move_buffers(stage, lambda name: device)
    return stage.eval(), report


def _transformers_config(auto_config: Any, checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    try:
        return auto_config.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        # transformers checks a config's values with many kinds of exceptions; none names the file
        raise _refused(checkpoint, error) from error


def _skeleton(
    checkpoint: Checkpoint, hf_config: Any, int8: Int8Config, dtype: str, trust_remote_code: bool
) -> Skeleton:
    try:
        return build_skeleton(hf_config, int8, getattr(torch, dtype), trust_remote_code)
    except Exception as error:  # the model's own code meets a config's values here, with as many kinds
        raise _refused(checkpoint, error) from error


def _refused(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return CheckpointError(f"{checkpoint.folder / 'config.json'}: transformers refuses it: {reason[:400]}")


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that most of the checkpoint's bytes are stored in, as torch names it."""
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in TORCH_DTYPES:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    if not sizes:
        check_weight_dtypes(checkpoint.tensors.values())
        raise CheckpointError(f"{checkpoint.folder}: the checkpoint holds no tensors")
    return str(TORCH_DTYPES[max(sizes, key=lambda dtype: sizes[dtype])]).removeprefix("torch.")


def name_tensors(checkpoint: Checkpoint, skeleton: Skeleton) -> dict[str, TensorInfo]:
    """The checkpoint's tensors by the names that the model has for them; those it does not want keep their own.

    Handles what transformers renamed since (GPT-NeoX's `embed_out`), checkpoints saved from the base model, whose
    names lack its prefix (BLOOM, GPT-2, OPT), and a tied pair of which only the other name was saved.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    model, wanted = skeleton.model, dict.fromkeys([*skeleton.slots, *skeleton.tied], True)
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    named: dict[str, TensorInfo] = {}
    for name, tensor in checkpoint.tensors.items():
        ours = name
        if name not in wanted:
            ours, _ = rename_source_key(name, renamings, [], model.base_model_prefix, wanted)
        if ours in named:
            raise CheckpointError(f"{tensor.file}: tensor {name!r} and {named[ours].name!r} are both {ours!r}")
        named[ours] = tensor
    for target, origin in skeleton.tied.items():
        if origin not in named and target in named:
            named[origin] = named.pop(target)
    return named


def _fill(
    slots: dict[str, Slot],
    checkpoint: Checkpoint,
    named: dict[str, TensorInfo],
    wanted: Collection[str],
    device_of: Callable[[str], str],
    on_progress: OnProgress | None = None,
    offloaded: Path | None = None,
) -> LoadReport:
    """Check everything, allocate everything, then stream: the order in which a user wants to hear of trouble.

    `named` are the checkpoint's tensors by the model's names, `wanted` the names of the whole model, of which `slots`
    may be a stage.
    """
    started = time.perf_counter()
    tensors = _match(slots, checkpoint, named)
    devices = {name: device_of(name) for name in slots}
    device_bytes: dict[str, int] = {}
    for name, slot in slots.items():
        device_bytes[devices[name]] = device_bytes.get(devices[name], 0) + slot.nbytes
    _allocate(slots, devices, device_bytes, offloaded)
    slot_of = {tensor.name: slots[name] for name, tensor in tensors.items()}
    whole = {tensor.name for name, tensor in tensors.items() if slots[name].transposed}
    on_gpu = any(device.startswith("cuda") for device in devices.values())
    stream = RowStream(tensors.values(), whole, pin=on_gpu)
    total = sum(tensor.nbytes for tensor in tensors.values())
    for chunk in stream:
        _write(slot_of[chunk.tensor.name], chunk.tensor, chunk.row_start, chunk.row_stop, chunk.data)
        if on_progress is not None:
            on_progress(stream.bytes_read, total)
    if on_progress is not None:
        on_progress(total, total)
    return LoadReport(
        seconds=time.perf_counter() - started,
        bytes_read=stream.bytes_read,
        dtype=str(_plain_dtype(slots.values())).removeprefix("torch."),
        device_bytes=device_bytes,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=sum(torch.cuda.max_memory_allocated(d) for d in device_bytes if d.startswith("cuda")),
        byte_ranges=[(read.file.name, read.start, read.stop) for read in stream.reads],
        unused=sorted(tensor.name for name, tensor in named.items() if name not in wanted),
    )


def peak_host_bytes() -> int:
    """The most memory that this process ever held in RAM."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _plain_dtype(slots: Iterable[Slot]) -> torch.dtype:
    return next((slot.dtype for slot in slots if not slot.is_int8), torch.float32)


def _match(slots: dict[str, Slot], checkpoint: Checkpoint, named: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensor of each slot. Raises CheckpointError for missing ones, wrong shapes and dtypes."""
    missing = sorted(slots.keys() - named.keys())
    if missing:
        more = f" and {len(missing) - SHOWN_NAMES} more" if len(missing) > SHOWN_NAMES else ""
        raise CheckpointError(
            f"{checkpoint.folder}: {len(missing)} tensor{'s are' if len(missing) > 1 else ' is'} missing: "
            f"{', '.join(missing[:SHOWN_NAMES])}{more}; it is incomplete or not this config's"
        )
    tensors = {name: named[name] for name in slots}
    for name, tensor in tensors.items():
        if tensor.shape != slots[name].shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}, but the config asks for "
                f"{list(slots[name].shape)}"
            )
    check_weight_dtypes(tensors.values())
    return tensors


def _allocate(
    slots: dict[str, Slot], devices: dict[str, str], device_bytes: dict[str, int], offloaded: Path | None
) -> None:
    """All memory at once. Raises PlanError with the numbers if a device or the offload folder has too little."""
    if offloaded is not None:
        free = shutil.disk_usage(offloaded).free
        if free < device_bytes["disk"]:
            raise PlanError(f"{offloaded}: {device_bytes['disk']:,} bytes to offload, but {free:,} are free there")
    for name, slot in slots.items():
        device = devices[name]
        try:
            if device == "disk" and offloaded is not None and torch.Size(slot.shape).numel():
                slot.allocate("cpu", str(offloaded / f"{name}.dat"))
            else:
                slot.allocate("cpu" if device == "disk" else device)
        except torch.OutOfMemoryError as error:
            raise PlanError(
                f"{device}: the weights placed there take {device_bytes[device]:,} bytes, which it does not have free: "
                f"{str(error).splitlines()[0]}. What would help: another device map, a smaller max_memory for it, "
                "more devices"
            ) from None


def _write(slot: Slot, tensor: TensorInfo, row_start: int, row_stop: int, data: Tensor) -> None:
    """Quantize or copy one chunk of rows into its slice of the slot."""
    target: Tensor = getattr(slot.module, slot.attribute).data
    data = data.to(target.device)
    if slot.is_int8:
        rows = slice(None) if slot.transposed else slice(row_start, row_stop)
        source = data.T if slot.transposed else data
        finite = quantize_rows(source, target[rows], slot.module.scale[rows])  # type: ignore[index]
    else:
        part = target.view(()) if not target.ndim else target[row_start:row_stop]
        part.copy_(data)
        finite = bool(torch.isfinite(part).all())
        if not finite and bool(torch.isfinite(data).all()):
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} holds values too large for {part.dtype}; load with "
                "dtype='float32' or 'bfloat16'"
            )
    if not finite:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} holds NaN or infinity in rows {row_start} to {row_stop - 1}; "
            "the checkpoint is damaged, download it again"
        )


def move_buffers(model: nn.Module, device_of: Callable[[str], str]) -> None:
    """Put the buffers that no checkpoint holds (rotary frequencies) on their module's device."""
    for prefix, module in model.named_modules():
        for attribute, buffer in module._buffers.items():
            if buffer is not None and attribute in module._non_persistent_buffers_set:
                device = device_of(f"{prefix}.{attribute}" if prefix else attribute)
                module._buffers[attribute] = buffer.to("cpu" if device == "disk" else device)


def read_generation_config(folder: Path) -> Any:
    """The folder's generation_config.json as transformers reads it, None where there is none.

    Raises CheckpointError for one that transformers refuses.
    """
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # as many kinds as there are ways to garble it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{file}: transformers refuses it: {reason[:400]}; remove it to use defaults") from error


def check_context(tokens: int, context: int) -> None:
    """Raise BigInt8Error if a sequence outgrows what memory was planned for."""
    if tokens > context:
        raise BigInt8Error(
            f"{tokens} tokens in one sequence, but the model was loaded for a context of {context}; shorten the "
            "prompt, ask for fewer new tokens, or load with a larger context (--context)"
        )


def _context_check(context: int) -> Callable[..., None]:
    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
        inputs = args[0] if args and args[0] is not None else inputs
        if inputs is not None:
            cache = kwargs.get("past_key_values")
            check_context((cache.get_seq_length() if cache is not None else 0) + inputs.shape[1], context)

    return check
