"""Into memory: everything is checked, then allocated, then streamed, so that a user hears of trouble early."""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.headers import Checkpoint
from ..errors import PlanError
from ..model.skeleton import Skeleton, Slot
from ..plan.plan import Stage
from .assign import Step, Transfer, side_by_side
from .convert import store
from .gpu import GpuWriter
from .host_memory import HostMemory, MappedFiles, aligned, peak_host_bytes
from .intake import Intake, OnProgress
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
) -> LoadReport:
    """Load the slots, those of the skeleton or of a stage that was cut from it, each onto its device.

    Raises CheckpointError for a checkpoint that is wrong, PlanError, with the numbers, for too little memory.
    """
    started = time.perf_counter()
    intake = Intake(checkpoint, skeleton, slots)
    devices = {name: device_of(name) for name in slots}
    mapped = _map(intake.transfers, devices) if checkpoint.is_int8 else set()
    device_bytes: dict[str, int] = {}
    for name, slot in slots.items():
        device_bytes[devices[name]] = device_bytes.get(devices[name], 0) + slot.nbytes
    unmapped = {name: slot for name, slot in slots.items() if name not in mapped}
    pieces = _pieces(unmapped, devices, side_by_side(unmapped, checkpoint.config))
    _allocate(pieces, device_bytes, offload_folder)
    read = [t for t in intake.transfers if not (t.slot.name in mapped and t.step in (Step.INT8, Step.COPY))]
    gpus = [device for device in device_bytes if device.startswith("cuda")]
    reading = intake.run(MemorySink(devices), read, on_progress, device_bytes.get("cpu", 0), len(gpus))
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
    size = sum(slot.nbytes for slot in slots.values())
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


@dataclass(frozen=True)
class _Piece:
    """Slots that get one tensor: one slot, or several whose rows lie one after the other."""

    device: str
    slots: tuple[Slot, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.slots[0].data_shape
        return first if len(self.slots) == 1 else (sum(slot.data_shape[0] for slot in self.slots), *first[1:])

    @property
    def nbytes(self) -> int:
        return sum(slot.data_bytes for slot in self.slots)

    def fill(self, data: Tensor, scale: Tensor | None) -> None:
        """Give each slot its rows of a tensor of this shape, and of the scales of an int8 one."""
        if len(self.slots) == 1:
            self.slots[0].fill(data, scale)
            return
        rows = [slot.data_shape[0] for slot in self.slots]
        scales = [None] * len(rows) if scale is None else scale.split(rows)
        for slot, own, own_scale in zip(self.slots, data.split(rows), scales, strict=True):
            slot.fill(own, own_scale)


def _pieces(slots: Mapping[str, Slot], devices: Mapping[str, str], together: Sequence[tuple[str, ...]]) -> list[_Piece]:
    """The slots as they are allocated: those of `together` as one, where they are on one device that is no file."""
    first = {}
    for names in together:
        there = {devices[name] for name in names}
        if len(there) == 1 and "disk" not in there:
            first[names[0]] = names
    later = {name for names in first.values() for name in names[1:]}
    groups = [first.get(name, (name,)) for name in slots if name not in later]
    return [_Piece(devices[names[0]], tuple(slots[name] for name in names)) for names in groups]


def _allocate(pieces: Sequence[_Piece], device_bytes: Mapping[str, int], offload_folder: Path | None) -> None:
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


def _allocate_piece(piece: _Piece, memory: HostMemory | None, file: Path | None) -> None:
    """Give its slots their memory: on the device, out of a block of the host's, or in a file that is mapped."""
    device, dtype, shape = where(piece.device), piece.slots[0].dtype, piece.shape
    count = torch.Size(shape).numel()
    if file is not None and count:
        data = torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape)
    elif memory is not None:
        data = memory.take(dtype, count).view(shape)
    else:
        data = torch.empty(shape, dtype=dtype, device=device)
    is_int8 = piece.slots[0].is_int8
    piece.fill(data, torch.empty(shape[0], dtype=torch.float32, device=device) if is_int8 else None)
