"""Into memory: everything is checked, then allocated, then streamed, so that a user hears of trouble early."""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.headers import Checkpoint
from ..errors import PlanError
from ..model.skeleton import Skeleton, Slot
from ..plan.plan import Stage
from .assign import Step, Transfer, side_by_side
from .convert import store
from .gpu import GpuWriter
from .host_memory import HostMemory, MappedFiles, aligned, peak_host_bytes
from .intake import Intake, OnProgress, Sink
from .offload import Offload
from .pieces import Piece, pieces_of
from .stream import TORCH_DTYPES, Chunk


@dataclass(frozen=True)
class LoadReport:
    """What a load did. `device_bytes` counts weights and scales on each device; peaks are of the whole process.

    `seconds` are of the whole load, `read_seconds` of reading and quantizing alone. `bytes_mapped` are those of an int8
    checkpoint that were mapped into memory, to be read when they are used; `byte_ranges` are the (file name, start,
    stop) that were read; `unused` the tensors that no module wants.
    """

    seconds: float
    read_seconds: float
    bytes_read: int
    bytes_mapped: int
    dtype: str
    device_bytes: dict[str, int]
    peak_host_bytes: int
    peak_device_bytes: int
    byte_ranges: list[tuple[str, int, int]] = field(repr=False)
    unused: list[str]


def fill(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    slots: Mapping[str, Slot],
    device_of: Callable[[str], str],
    on_progress: OnProgress | None = None,
    offload_folder: Path | None = None,
    offload: Offload | None = None,
) -> LoadReport:
    """Load the slots, those of the skeleton or of a stage that was cut from it, each onto its device.

    offload_folder: of the files for slots on "disk"; offload: the weights that are kept beside their devices
    Raises CheckpointError for a checkpoint that is wrong, PlanError, with the numbers, for too little memory.
    """
    started = time.perf_counter()
    intake = Intake(checkpoint, skeleton, slots)
    devices = {name: device_of(name) for name in slots}
    here = slots if offload is None else {name: slot for name, slot in slots.items() if name not in offload.names}
    transfers = [transfer for transfer in intake.transfers if transfer.slot.name in here]
    mapped = _map(transfers, devices) if checkpoint.is_int8 else set()
    device_bytes: dict[str, int] = {}
    for name, slot in slots.items():
        size = slot.nbytes if name in here else slot.nbytes - slot.data_bytes
        device_bytes[devices[name]] = device_bytes.get(devices[name], 0) + size
    unmapped = {name: slot for name, slot in here.items() if name not in mapped}
    together = side_by_side(slots, checkpoint.config)
    _allocate(pieces_of(unmapped, devices, together), device_bytes, offload_folder)
    gpus = [device for device in device_bytes if device.startswith("cuda")]
    there = [t for t in transfers if t.slot.name in mapped and t.step in (Step.INT8, Step.COPY)]
    sink: Sink = MemorySink(devices)
    if offload is not None:
        there += offload.allocate(intake.transfers, devices, together)
        sink, device_bytes = offload.sink(sink), device_bytes | offload.device_bytes
    known = {id(transfer) for transfer in there}
    read = [transfer for transfer in intake.transfers if id(transfer) not in known]
    reading = intake.run(sink, read, on_progress, device_bytes.get("cpu", 0), len(gpus))
    return LoadReport(
        seconds=time.perf_counter() - started,
        read_seconds=reading.seconds,
        bytes_read=reading.bytes_read,
        bytes_mapped=sum(t.tensor.nbytes for t in intake.transfers) - sum(t.tensor.nbytes for t in read),
        dtype=str(_plain_dtype(slots.values())).removeprefix("torch."),
        device_bytes=device_bytes,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=sum(torch.cuda.max_memory_allocated(device) for device in gpus),
        byte_ranges=reading.byte_ranges,
        unused=intake.unused,
    )


def check_planned_bytes(stage: Stage, slots: Mapping[str, Slot]) -> None:
    """Raise PlanError if the slots of a stage take other bytes than were planned: a bug here, told before it hurts."""
    size = sum(slot.nbytes for slot in slots.values()) - stage.host_bytes - stage.disk_bytes
    if size != stage.weight_bytes:
        raise PlanError(
            f"stage {stage.index} was planned with {stage.weight_bytes:,} bytes of weights, but its modules take "
            f"{size:,}; please report this with the model's config.json"
        )


class MemorySink:
    """Rows into the memory of the slots; `devices` has the device of each, by the slot's name."""

    def __init__(self, devices: Mapping[str, str]) -> None:
        self._devices = devices
        self._writers = {device: GpuWriter(device) for device in set(devices.values()) if device.startswith("cuda")}

    def take(self, transfer: Transfer, chunk: Chunk) -> None:
        writer = self._writers.get(self._devices[transfer.slot.name])
        (store if writer is None else writer.store)(transfer, chunk)

    def finish(self) -> None:
        """Wait for the GPUs. Raises CheckpointError for values that no weight has."""
        self.abort()
        for writer in self._writers.values():
            writer.finish()

    def abort(self) -> None:
        """Wait for the GPUs, which may still write into memory that is about to go."""
        for writer in self._writers.values():
            writer.wait()


def where(device: str) -> str:
    """Where a module on this device computes: what is kept in mapped files computes on the CPU."""
    return "cpu" if device == "disk" else device


def move_buffers(model: nn.Module, device_of: Callable[[str], str]) -> None:
    """Put the buffers that no checkpoint holds (rotary frequencies) on their module's device."""
    for prefix, module in model.named_modules():
        for attribute, buffer in module._buffers.items():
            if buffer is not None and attribute in module._non_persistent_buffers_set:
                device = device_of(f"{prefix}.{attribute}" if prefix else attribute)
                module._buffers[attribute] = buffer.to(where(device))


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


def _allocate(pieces: Sequence[Piece], device_bytes: Mapping[str, int], offload_folder: Path | None) -> None:
    """All memory at once. Raises PlanError with the numbers if a device or the offload folder has too little."""
    if offload_folder is not None:
        free = shutil.disk_usage(offload_folder).free
        if free < device_bytes["disk"]:
            raise PlanError(f"{offload_folder}: {device_bytes['disk']:,} bytes to offload, but {free:,} are free there")
    device = "cpu"
    try:
        memory = HostMemory(sum(aligned(piece.nbytes) for piece in pieces if piece.device == "cpu"))
        for piece in pieces:
            device = piece.device
            name = piece.slots[0].name
            file = None if offload_folder is None or device != "disk" else offload_folder / f"{name}.dat"
            _allocate_piece(piece, memory if device == "cpu" else None, file)
    except (torch.OutOfMemoryError, OSError) as error:
        raise PlanError(
            f"{device}: the weights placed there take {device_bytes[device]:,} bytes, which it does not have free: "
            f"{str(error).splitlines()[0]}. What would help: another device map, a smaller max_memory for it, "
            "more devices"
        ) from None


def _allocate_piece(piece: Piece, memory: HostMemory | None, file: Path | None) -> None:
    """Give its slots their memory: on the device, out of a block of the host's, or in a file that is mapped."""
    device, dtype, shape = where(piece.device), piece.slots[0].dtype, piece.shape
    count = torch.Size(shape).numel()
    if file is not None and count:
        data = torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape)
    elif memory is not None:
        data = memory.take(dtype, count).view(shape)
    else:
        data = torch.empty(shape, dtype=dtype, device=device)
    piece.fill(data, piece.scales(device))
