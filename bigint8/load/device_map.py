"""A model in one process: a plan from `device_map` and `max_memory`, and the loading of it."""

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bigint8_kernels import prepare_layers
from torch import nn

from ..checkpoint.headers import Checkpoint
from ..errors import PlanError
from ..families.table import find_family
from ..model.layers import Int8Linear
from ..model.skeleton import Skeleton, skeleton_of
from ..options import Workload
from ..plan.cut import fill_in_order, make_plan
from ..plan.devices import Device, cpu_device, cuda_devices, pick_dtype
from ..plan.memory import kv_bytes, pages
from ..plan.offload import Spill, spill_here
from ..plan.plan import DeviceMap, Plan, Stage
from ..plan.predict import PlanTimes
from ..plan.spec import ModelSpec, check_workload
from ..plan.time import Rows
from ..units import FLOAT_BYTES, parse_bytes, readable
from .fill import LoadReport, fill, move_buffers, where
from .follow import follow_devices
from .intake import OnProgress
from .offload import offload_of

Limits = Mapping[int | str, int | str]
"""`max_memory`: bytes, or text such as "20GiB", by GPU number or device name."""


@dataclass(frozen=True)
class Placement:
    """A plan that covers every tensor of the skeleton, and the folder for what it puts on "disk"."""

    plan: Plan
    skeleton: Skeleton
    offload_folder: str | os.PathLike[str] | None = None

    def load(self, checkpoint: Checkpoint, on_progress: OnProgress | None = None) -> tuple[Any, LoadReport]:
        """The transformers model, loaded. Raises CheckpointError and PlanError; then nothing stays loaded."""
        skeleton, model, devices = self.skeleton, self.skeleton.model, DeviceMap(self.plan.device_map())
        offloaded = None
        if "disk" in devices.values():
            offloaded = new_offload_folder(self.offload_folder)
            weakref.finalize(model, shutil.rmtree, offloaded, ignore_errors=True)
        family = find_family(model.config.model_type)
        offload = None if family is None else offload_of(self.plan.stages, skeleton.slots, family, self.offload_folder)
        report = fill(checkpoint, skeleton, skeleton.slots, devices.__getitem__, on_progress, offloaded, offload)
        skeleton.tie()

        def device_of(name: str) -> str:
            try:
                return devices[name]
            except KeyError:  # a module that the map does not cover goes to the first device in it
                return next(iter(devices.values()))

        move_buffers(model, device_of)
        model.hf_device_map = {name: _short(device) for name, device in devices.items()}
        model.kept = {} if offload is None else offload.kept
        for stage in self.plan.stages:
            for home, blocks in (("cpu", stage.host_blocks), ("disk", stage.disk_blocks)):
                model.hf_device_map |= {family.block(block): home for block in blocks if family is not None}
        if len({where(device) for device in devices.values()}) > 1:
            follow_devices(model, devices, lambda name: where(device_of(name)))
        prepare_kernels(model, self.plan.workload.most_rows)
        return model, report


def prepare_kernels(model: nn.Module, most_rows: int) -> None:
    """Let GPUs compile and tune their kernels for the model's int8 layers now, and not in the first prompt."""
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    if layers:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float16)
        prepare_layers([layer.weight for layer in layers], dtype, most_rows, layers[0].activations)


def _short(device: str) -> int | str:
    """GPUs by their number, as hf_device_map has them."""
    return int(device.partition(":")[2]) if device.startswith("cuda:") else device


# --- from a device map to a plan ---


def place(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    workload: Workload,
    device_map: str | int | torch.device | Mapping[str, Any],
    max_memory: Limits | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> Placement:
    """Pick the dtype, build the skeleton in it and give each module a device.

    Raises PlanError when the model does not fit, or a device map misses or invents modules or devices.
    """
    check_workload(spec, workload)
    if isinstance(device_map, Mapping):
        return _place_as_told(spec, checkpoint, workload, device_map, max_memory, offload_folder)
    devices = _usable(max_memory) if device_map in ("auto", "balanced") else [_device(_name(device_map), max_memory)]
    if spec.layout is None:
        return _place_unknown(spec, checkpoint, workload, devices, offload_folder)
    spec = replace(spec, one_process=True)
    spill = _spill(spec, devices, max_memory, offload_folder)
    return place_plan(_plan(spec, workload, devices, spill), checkpoint, offload_folder)


def place_plan(plan: Plan, checkpoint: Checkpoint, offload_folder: str | os.PathLike[str] | None = None) -> Placement:
    """All stages of a plan in this process."""
    skeleton = skeleton_of(checkpoint, plan.spec, plan.dtype)
    present = {name for name, _ in skeleton.model.named_modules()}
    stages = tuple(replace(s, modules=tuple(m for m in s.modules if m in present)) for s in plan.stages)
    if len(stages) == 1:
        stages = (replace(stages[0], modules=("",)),)
    return Placement(replace(plan, stages=stages), skeleton, offload_folder)


def _plan(spec: ModelSpec, workload: Workload, devices: Sequence[Device], spill: Spill) -> Plan:
    """Over the GPUs if the model fits there. If not, blocks that fit on none are brought in for every step, or computed
    on the CPU, whichever is faster by the time model."""
    gpus = [device for device in devices if device.kind == "cuda"][: len(spec.known_layout.blocks)]
    plans, refusal = [], None
    try:
        plans.append(make_plan(spec, gpus or devices, workload, spill=spill))
    except PlanError as error:
        refusal = error
    if gpus and len(gpus) < len(devices) and not (plans and not plans[0].is_offloaded):
        with contextlib.suppress(PlanError):
            plans.append(fill_in_order(spec, devices, workload, fast=len(gpus)))
    if not plans:
        assert refusal is not None
        raise refusal
    rows = Rows(decode=workload.sequences, context=workload.context)
    return min(plans, key=lambda plan: PlanTimes(plan).step(rows).seconds)


def _spill(
    spec: ModelSpec,
    devices: Sequence[Device],
    max_memory: Limits | None,
    offload_folder: str | os.PathLike[str] | None,
) -> Spill:
    """What may hold the blocks that no GPU holds: within `max_memory`, which leaves out what it does not name."""
    hosts = [device for device in devices if device.kind == "cpu"]
    if not hosts and max_memory is None:
        hosts = [cpu_device()]
    folder = None if offload_folder is None else make_offload_folder(offload_folder)
    return spill_here(spec, sum(device.usable_bytes for device in hosts), folder)


def _place_as_told(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    workload: Workload,
    device_map: Mapping[str, Any],
    max_memory: Limits | None,
    offload_folder: str | os.PathLike[str] | None,
) -> Placement:
    named = {name: _name(device) for name, device in device_map.items()}
    devices = {name: _device(name, max_memory) for name in dict.fromkeys(named.values())}
    dtype = pick_dtype(spec.int8.dtype, spec.stored, list(devices.values()))
    skeleton = skeleton_of(checkpoint, spec, dtype)
    _check_map(skeleton, DeviceMap(named))
    placement = Placement(_as_plan(spec, workload, dtype, skeleton, named, devices), skeleton, offload_folder)
    for stage in placement.plan.stages:
        if stage.device.kind != "disk" and stage.headroom_bytes < 0:
            raise _too_small(stage.device, stage.weight_bytes + stage.kv_bytes)
    return placement


def _place_unknown(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    workload: Workload,
    devices: Sequence[Device],
    offload_folder: str | os.PathLike[str] | None,
) -> Placement:
    """A family that is not in the table: one device, or accelerate's map by the model's own blocks."""
    fast = [device for device in devices if device.kind == "cuda"] or devices  # the CPU may get what they cannot hold
    dtype = pick_dtype(spec.int8.dtype, spec.stored, list(fast))
    skeleton = skeleton_of(checkpoint, spec, dtype)
    by_name = {device.name: device for device in devices}
    if len(devices) == 1:
        needed = sum(slot.nbytes for slot in skeleton.slots.values())
        if needed > devices[0].usable_bytes:
            raise _too_small(devices[0], needed)
        named = {"": devices[0].name}
    else:
        from accelerate import infer_auto_device_map

        mapping = infer_auto_device_map(
            skeleton.model,
            max_memory={_short(device.name): device.usable_bytes for device in devices},
            no_split_module_classes=list(skeleton.model._no_split_modules or []),
        )
        named = {name: _name(device) for name, device in mapping.items()}
        for target, origin in skeleton.tied.items():  # accelerate sees which parameters are tied, but not which buffers
            named[target.rpartition(".")[0]] = DeviceMap(named)[origin]
        by_name["disk"] = _device("disk", None)
        _check_map(skeleton, DeviceMap(named))
    return Placement(_as_plan(spec, workload, dtype, skeleton, named, by_name), skeleton, offload_folder)


def _as_plan(
    spec: ModelSpec,
    workload: Workload,
    dtype: str,
    skeleton: Skeleton,
    named: Mapping[str, str],
    devices: Mapping[str, Device],
) -> Plan:
    """A map of modules as a plan: a stage for each device, its bytes counted from the skeleton.

    Where all blocks are on one device, its caches are counted too.
    """
    all_of_them, weight_bytes = DeviceMap(named), dict.fromkeys(named.values(), 0)
    for name, slot in skeleton.slots.items():
        weight_bytes[all_of_them[name]] += slot.nbytes
    cache: int = 0
    held: tuple[int, ...] = ()
    if spec.layout is not None and len(weight_bytes) == 1:
        held = pages(spec.layout, workload, 1)
        blocks = range(len(spec.layout.blocks))
        cache = sum(kv_bytes(spec.layout, block, held, FLOAT_BYTES[dtype]) for block in blocks)
    stages = [
        Stage(
            index=i,
            device=devices[device],
            first_block=0,
            last_block=0,
            modules=tuple(name for name, there in named.items() if there == device),
            weight_bytes=size,
            kv_bytes=cache,
            workspace_bytes=0,
        )
        for i, (device, size) in enumerate(weight_bytes.items())
    ]
    return Plan(spec, workload, dtype, tuple(stages), held)


def _check_map(skeleton: Skeleton, devices: DeviceMap) -> None:
    """Every tensor has a device, every name is a module's, and what is tied lies together."""
    modules = {name for name, _ in skeleton.model.named_modules()}
    for name in devices:
        if name not in modules:
            raise PlanError(f"device_map names {name!r}, which is no module of this model")
    missing = list(dict.fromkeys(name.rpartition(".")[0] for name in skeleton.slots if devices.get(name) is None))
    if missing:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise PlanError(f'device_map gives no device to {", ".join(missing[:10])}{more}; add them, or "" for the rest')
    for target, origin in skeleton.tied.items():
        there = devices.get(target)  # a head that is not named goes with what it is tied to
        if there is not None and there != devices[origin]:
            raise PlanError(
                f"device_map places {target} on {there} and {origin} on {devices[origin]}, but they are one tensor; "
                "place both on one device"
            )


def _too_small(device: Device, needed: int) -> PlanError:
    return PlanError(
        f"{device.name}: the model needs {readable(needed)} there and {readable(device.usable_bytes)} may be used. "
        "What would help: a device map over more devices, a larger max_memory, a shorter context, offload_folder= with "
        "device_map='auto'"
    )


def _usable(max_memory: Limits | None) -> list[Device]:
    """The GPUs, then the CPU, within `max_memory`."""
    devices = [*cuda_devices(), cpu_device()]
    if max_memory is None:
        return devices
    limits = _limits(max_memory, devices)
    return [_within(device, limits, devices[-1]) for device in devices if limits.get(device.name)]


def _within(device: Device, limits: Mapping[str, int], host: Device) -> Device:
    """The device within its limit, if it has one; what the host's leaves of its memory, the file cache may have."""
    left = max(0, host.usable_bytes - limits.get(host.name, 0))
    usable = min(device.usable_bytes, limits.get(device.name, device.usable_bytes))
    return replace(device, usable_bytes=usable, box=replace(device.box, cached_bytes=left))


def _limits(max_memory: Limits, devices: Sequence[Device]) -> dict[str, int]:
    """Bytes by device name. Raises PlanError for a size that does not parse or a device that is not there."""
    try:
        limits = {_name(name): parse_bytes(size) for name, size in max_memory.items()}
    except ValueError:
        raise PlanError(
            f'max_memory: {dict(max_memory)!r} has a size that is not a number of bytes or like "20GiB"'
        ) from None
    there = [device.name for device in devices]
    if unknown := sorted(limits.keys() - set(there)):
        raise PlanError(
            f"max_memory names {unknown[0]}, which this machine does not have; there are {', '.join(there)}"
        )
    return limits


def _device(name: str, max_memory: Limits | None) -> Device:
    """One device of this machine by name, within `max_memory`."""
    if name == "disk":
        return replace(cpu_device(), name="disk")
    devices = [*cuda_devices(), cpu_device()]
    for device in devices:
        if device.name == name:
            return device if max_memory is None else _within(device, _limits(max_memory, devices), devices[-1])
    raise PlanError(f"device_map names {name}, which this machine does not have")


def _name(device: Any) -> str:
    """ "cpu", "disk" or "cuda:N", from whatever people write in device maps."""
    if isinstance(device, int) and not isinstance(device, bool):
        return f"cuda:{device}"
    name = str(device)
    if name.isdigit():
        return f"cuda:{name}"
    if name == "cuda":
        return "cuda:0"
    if name in ("cpu", "disk") or (name.startswith("cuda:") and name[5:].isdigit()):
        return name
    raise PlanError(f'device {name!r}: must be "cpu", "disk", a GPU as 0 or "cuda:0", or "auto" for a whole device_map')


def new_offload_folder(folder: str | os.PathLike[str] | None) -> Path:
    """A folder for one model's files below the named one. Raises PlanError if none is named or it cannot be used."""
    if folder is None:
        raise PlanError('the device map places modules on "disk"; say where with offload_folder=')
    path = make_offload_folder(folder)
    try:
        return Path(tempfile.mkdtemp(prefix="bigint8-", dir=path))
    except OSError as error:
        raise PlanError(f"offload_folder {folder}: cannot be made or used: {error.strerror}") from None


def make_offload_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder, made if it is not there. Raises PlanError if it cannot be."""
    try:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"offload_folder {folder}: cannot be made or used: {error.strerror}") from None
    return path
