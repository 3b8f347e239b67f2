"""Loading: stream the checkpoint, quantize on the device, write into memory that was allocated once, up front."""

import functools
import os
import resource
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import Checkpoint, open_checkpoint
from .config import Int8Config
from .errors import BigInt8Error, CheckpointError, PlanError
from .families import family_of
from .gpu_writer import GpuWriter
from .hardware import available_memory
from .memory import HostMemory, MappedFiles, aligned
from .placement import new_offload_folder, resolve_device_map
from .progress import LoadProgress
from .save import save_int8
from .sources import find_source
from .stage import Skeleton, Slot, StageModel, build_skeleton, keep_16bit_tables
from .stored_int8 import stored_threshold
from .stream import BUFFER_BYTES, PINNED_BUFFER_BYTES, TORCH_DTYPES, Chunk, RowStream
from .transfer import Step, Transfer, match_tensors, name_tensors, store, stored_dtype, unused_tensors

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoadReport:
    """What a load did. `device_bytes` counts weights and scales on each device; peaks are of the whole process.

    `bytes_mapped` are those of an int8 checkpoint that were mapped into memory, to be read when they are used;
    `byte_ranges` are the (file name, start, stop) that were read; `unused` the tensors that no module wants.
    """

    seconds: float
    bytes_read: int
    bytes_mapped: int
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

    An int8 checkpoint (of `save_int8`, `python -m bigint8.quantize` or bitsandbytes) is recognised; on the CPU its
    weights are mapped files. The model has `hf_device_map`, `load_report` and `save_int8(folder)`. Raises
    CheckpointError for a checkpoint that is missing or wrong, PlanError when it does not fit or the device map does not
    cover the model. Nothing half-loaded is returned.
    """
    wanted_dtype = str(dtype).removeprefix("torch.") if dtype != "auto" else (config or Int8Config()).dtype
    if wanted_dtype not in ("auto", "float16", "bfloat16", "float32"):
        raise BigInt8Error(f"dtype={wanted_dtype}: must be auto, float16, bfloat16 or float32")
    source = find_source(os.fspath(path), revision=revision)
    if source.folder is None:
        raise source.not_found()
    checkpoint = open_checkpoint(source.folder, trust_remote_code)
    settings = _settings_for(checkpoint, config)
    hf_config = read_hf_config(checkpoint, trust_remote_code)
    limit = getattr(hf_config, "max_position_embeddings", None)
    context = context if context is not None else min(2048, limit or 2048)

    stored = stored_dtype(checkpoint)

    def skeleton_for(name: str) -> Skeleton:
        return checkpoint_skeleton(checkpoint, hf_config, settings, name, trust_remote_code)

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
            skeleton,
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
    model.__class__ = _with_save_int8(type(model))  # type: ignore[arg-type]
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
    hf_config = read_hf_config(checkpoint, trust_remote_code)
    family = family_of(hf_config.model_type)
    skeleton = checkpoint_skeleton(checkpoint, hf_config, _settings_for(checkpoint, config), dtype, trust_remote_code)
    stage = StageModel(skeleton, family, first_block, last_block)
    report = _fill(stage.slots, checkpoint, skeleton, lambda name: device, on_progress)
    if stage.has_head:
        skeleton.tie()
    move_buffers(stage, lambda name: device)
    return stage.eval(), report


def _settings_for(checkpoint: Checkpoint, config: Int8Config | None) -> Int8Config:
    """The settings, with the threshold that an int8 checkpoint was saved with unless another one is asked for."""
    settings = config or Int8Config()
    threshold = stored_threshold(checkpoint.config) if checkpoint.is_int8 else None
    if threshold is None or "threshold" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"threshold": threshold})


def read_hf_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """The checkpoint's config as transformers has it, without what it says of int8: that is for bigint8 to read.

    Raises CheckpointError for one that transformers refuses.
    """
    from transformers import AutoConfig

    try:
        hf_config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        # transformers checks a config's values with many kinds of exceptions; none names the file
        raise _refused(checkpoint, error) from error
    if hasattr(hf_config, "quantization_config"):
        del hf_config.quantization_config
    return hf_config


def checkpoint_skeleton(
    checkpoint: Checkpoint, hf_config: Any, int8: Int8Config, dtype: str, trust_remote_code: bool
) -> Skeleton:
    """The model that the checkpoint's tensors go into. Raises CheckpointError for a config that makes none."""
    int8_names = list(checkpoint.tensors) if checkpoint.is_int8 else None
    try:
        skeleton = build_skeleton(hf_config, int8, getattr(torch, dtype), trust_remote_code, int8_names)
    except BigInt8Error:
        raise
    except Exception as error:  # the model's own code meets a config's values here, with as many kinds
        raise _refused(checkpoint, error) from error
    skeleton.tensors = name_tensors(checkpoint, skeleton)
    keep_16bit_tables(skeleton, {name: tensor.dtype for name, tensor in skeleton.tensors.items()})
    return skeleton


def _refused(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return CheckpointError(f"{checkpoint.folder / 'config.json'}: transformers refuses it: {reason[:400]}")


def _fill(
    slots: dict[str, Slot],
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    device_of: Callable[[str], str],
    on_progress: OnProgress | None = None,
    offloaded: Path | None = None,
) -> LoadReport:
    """Check everything, allocate everything, then stream: the order in which a user wants to hear of trouble.

    `slots` are the skeleton's, or those of a stage that was cut from it.
    """
    started = time.perf_counter()
    transfers = match_tensors(slots, checkpoint, skeleton.tensors)
    devices = {name: device_of(name) for name in slots}
    mapped = _map(transfers, devices) if checkpoint.is_int8 else set()
    device_bytes: dict[str, int] = {}
    for name, slot in slots.items():
        device_bytes[devices[name]] = device_bytes.get(devices[name], 0) + slot.nbytes
    _allocate({n: s for n, s in slots.items() if n not in mapped}, devices, device_bytes, offloaded)
    copied = [t for t in transfers if not (t.slot.name in mapped and t.step in (Step.INT8, Step.COPY))]
    on_gpu = any(device.startswith("cuda") for device in devices.values())
    stream = transfer_stream(copied, device_bytes.get("cpu", 0), on_gpu)
    total = sum(transfer.tensor.nbytes for transfer in copied)
    by_tensor = {transfer.tensor.name: transfer for transfer in copied}
    writers = {device: GpuWriter(device) for device in device_bytes if device.startswith("cuda")}

    def write(chunk: Chunk) -> None:
        transfer = by_tensor[chunk.tensor.name]
        writer = writers.get(devices[transfer.slot.name])
        (store if writer is None else writer.store)(transfer, chunk)

    try:
        stream.run(write, None if on_progress is None else lambda done: on_progress(done, total))
    finally:
        for writer in writers.values():
            writer.wait()
    for writer in writers.values():
        writer.finish()
    return LoadReport(
        seconds=time.perf_counter() - started,
        bytes_read=stream.bytes_read,
        bytes_mapped=sum(transfer.tensor.nbytes for transfer in transfers) - total,
        dtype=str(_plain_dtype(slots.values())).removeprefix("torch."),
        device_bytes=device_bytes,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=sum(torch.cuda.max_memory_allocated(d) for d in device_bytes if d.startswith("cuda")),
        byte_ranges=[(read.file.name, read.start, read.stop) for read in stream.reads],
        unused=unused_tensors(skeleton),
    )


def transfer_stream(transfers: Sequence[Transfer], host_bytes: int, on_gpu: bool = False) -> RowStream:
    """The stream that reads these tensors, with buffers that suit the devices they go to.

    Where what is read and the `host_bytes` that are made of it take more than half of the host's free memory, it is
    read past the file cache, which would push out what else it holds and, in the end, its own beginning.
    """
    whole = {transfer.tensor.name for transfer in transfers if transfer.whole}
    tensors = [transfer.tensor for transfer in transfers]
    direct = 2 * (sum(tensor.nbytes for tensor in tensors) + host_bytes) > available_memory()
    return RowStream(tensors, whole, PINNED_BUFFER_BYTES if on_gpu else BUFFER_BYTES, pin=on_gpu, direct=direct)


def peak_host_bytes() -> int:
    """The most memory that this process ever held in RAM."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _plain_dtype(slots: Iterable[Slot]) -> torch.dtype:
    return next((slot.dtype for slot in slots if not slot.is_int8), torch.float32)


def _map(transfers: Sequence[Transfer], devices: Mapping[str, str]) -> set[str]:
    """Let slots on the CPU be the bytes of an int8 checkpoint's files, where they need no change; returns their names.

    Scales are not mapped: they are read, and checked.
    """
    files, mapped = MappedFiles(), set()
    for transfer in transfers:
        slot, tensor = transfer.slot, transfer.tensor
        same = transfer.step is Step.INT8 or (transfer.step is Step.COPY and TORCH_DTYPES[tensor.dtype] == slot.dtype)
        data = files.tensor(tensor) if same and devices[slot.name] == "cpu" else None
        if data is not None:
            slot.fill(data, torch.empty(slot.out_features) if slot.is_int8 else None)
            mapped.add(slot.name)
    return mapped


def _allocate(
    slots: dict[str, Slot], devices: dict[str, str], device_bytes: dict[str, int], offloaded: Path | None
) -> None:
    """All memory at once. Raises PlanError with the numbers if a device or the offload folder has too little."""
    if offloaded is not None:
        free = shutil.disk_usage(offloaded).free
        if free < device_bytes["disk"]:
            raise PlanError(f"{offloaded}: {device_bytes['disk']:,} bytes to offload, but {free:,} are free there")
    on_host = [slot for name, slot in slots.items() if devices[name] == "cpu"]
    device = "cpu"
    try:
        memory = HostMemory(sum(aligned(slot.data_bytes) for slot in on_host))
        for name, slot in slots.items():
            device = devices[name]
            if device == "disk" and offloaded is not None and torch.Size(slot.shape).numel():
                slot.allocate("cpu", None, str(offloaded / f"{name}.dat"))
            else:
                slot.allocate("cpu" if device == "disk" else device, memory if device == "cpu" else None)
    except (torch.OutOfMemoryError, OSError) as error:
        raise PlanError(
            f"{device}: the weights placed there take {device_bytes[device]:,} bytes, which it does not have free: "
            f"{str(error).splitlines()[0]}. What would help: another device map, a smaller max_memory for it, "
            "more devices"
        ) from None


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


@functools.cache
def _with_save_int8(kind: Any) -> Any:
    """The model's class with the method `save_int8`. An attribute would not do: one that refers to the model keeps its
    memory until a garbage collection, and one that does not loses it in `load_sharded_int8(path).save_int8(folder)`."""
    members = {"save_int8": save_int8, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), members)


def _context_check(context: int) -> Callable[..., None]:
    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
        inputs = args[0] if args and args[0] is not None else inputs
        if inputs is not None:
            cache = kwargs.get("past_key_values")
            check_context((cache.get_seq_length() if cache is not None else 0) + inputs.shape[1], context)

    return check
