"""Where the modules of a model in one process live: a device for each, from `device_map` and `max_memory`."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import PlanError
from .families import FAMILIES, Layout, layout_of
from .hardware import DTYPE_BYTES, Device, cpu_device, cuda_devices, pick_dtype
from .linear import Int8Linear
from .planner import Plan, check_request, fill_in_order, make_plan, readable
from .stage import Skeleton

DeviceMap = str | int | torch.device | Mapping[str, Any]


@dataclass(frozen=True)
class Placement:
    """A device map that covers every tensor of the skeleton."""

    skeleton: Skeleton
    device_map: dict[str, str]

    def device_of(self, name: str) -> str:
        """The device of a tensor or module: that of the longest name in the map that it lies under."""
        while name not in self.device_map:
            if not name:
                raise KeyError(name)
            name = name.rpartition(".")[0]
        return self.device_map[name]

    def finish(self, model: Any) -> None:
        """Move what was not loaded to its device; where there are several, let inputs follow their modules."""
        from .loader import move_buffers

        def buffer_device(name: str) -> str:
            try:
                return self.device_of(name)
            except KeyError:  # a buffer beside the mapped modules goes where the first of them is
                return next(iter(self.device_map.values()))

        move_buffers(model, buffer_device)
        model.hf_device_map = {name: _short(device) for name, device in self.device_map.items()}
        devices = {_where(device) for device in self.device_map.values()}
        if len(devices) > 1:
            follow_devices(model, lambda name: _where(buffer_device(name)))


def follow_devices(model: nn.Module, device_of: Callable[[str], str]) -> None:
    """Send each module's inputs to the device of its weights, and the model's output to the device of its input.

    `device_of` gives the device of a module by name. Only modules that hold tensors of their own need it; what they
    return stays where it was computed.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for name, module in list(model.named_modules()):
        if name and (module._parameters or module._buffers):
            add_hook_to_module(module, AlignDevicesHook(execution_device=device_of(name)))
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True))


def _where(device: str) -> str:
    """Where a module on this device computes: what is kept in mapped files computes on the CPU."""
    return "cpu" if device == "disk" else device


def _short(device: str) -> int | str:
    """GPUs by their number, as hf_device_map has them."""
    return int(device.partition(":")[2]) if device.startswith("cuda:") else device


def resolve_device_map(
    device_map: DeviceMap,
    skeleton_for: Callable[[str], Skeleton],
    hf_config: Any,
    stored_dtype: str,
    wanted_dtype: str,
    max_memory: Mapping[int | str, int | str] | None,
    context: int,
    batch_size: int,
    offload_folder: str | os.PathLike[str] | None,
) -> Placement:
    """Pick the dtype, build the skeleton in it and give each module a device.

    Raises PlanError when the model does not fit, or a device map misses or invents modules or devices.
    """
    check_request(hf_config.model_type, getattr(hf_config, "max_position_embeddings", None), context, batch_size)
    if isinstance(device_map, Mapping):
        named = {name: _device_name(device) for name, device in device_map.items()}
        dtype = pick_dtype(wanted_dtype, stored_dtype, [_device(d, max_memory) for d in set(named.values())])
        placement = Placement(skeleton_for(dtype), named)
        _check_map(placement)
        _check_room(placement, max_memory, hf_config, context, batch_size, dtype)
        return placement
    if device_map in ("auto", "balanced"):
        devices = _usable(max_memory)
    else:
        devices = [_device(_device_name(device_map), max_memory)]
    fast = [device for device in devices if device.kind == "cuda"] or devices  # the CPU may get what they cannot hold
    dtype = pick_dtype(wanted_dtype, stored_dtype, fast)
    skeleton = skeleton_for(dtype)
    if all(hf_config.model_type not in family.model_types for family in FAMILIES):
        return _place_unknown(skeleton, devices)
    layout = layout_of(hf_config.to_dict(), _has_int8_head(skeleton), stored_dtype)
    placement = Placement(skeleton, _plan_map(skeleton, layout, devices, dtype, context, batch_size, offload_folder))
    _check_room(placement, max_memory, hf_config, context, batch_size, dtype)  # skipped modules are not in the plan
    return placement


def _plan_map(
    skeleton: Skeleton,
    layout: Layout,
    devices: Sequence[Device],
    dtype: str,
    context: int,
    batch_size: int,
    offload_folder: str | os.PathLike[str] | None,
) -> dict[str, str]:
    name = skeleton.model.config.model_type
    gpus = [device for device in devices if device.kind == "cuda"][: len(layout.blocks)]
    try:
        return _by_module(skeleton, make_plan(name, layout, gpus or devices, dtype, context, batch_size))
    except PlanError:
        spill = list(devices)
        if offload_folder is not None:
            folder = make_offload_folder(offload_folder)
            spill.append(Device("disk", f"files in {folder}", shutil.disk_usage(folder).free, None))
        if len(spill) == len(gpus or devices):
            raise
        return _by_module(skeleton, fill_in_order(name, layout, spill, dtype, context, batch_size))


def _by_module(skeleton: Skeleton, plan: Plan) -> dict[str, str]:
    """The plan as a device map of modules."""
    stages = plan.stages
    if len(stages) == 1:
        return {"": stages[0].device.name}
    family = next(f for f in FAMILIES if skeleton.model.config.model_type in f.model_types)
    first, last = stages[0].device.name, stages[-1].device.name
    present = {name for name, _ in skeleton.model.named_modules()}
    result = {name: first for name in family.first_stage if name in present}
    for stage in stages:
        result |= {f"{family.blocks}.{b}": stage.device.name for b in range(stage.first_block, stage.last_block)}
    result |= {name: last for name in family.last_stage if name in present}
    return result | {family.head: first if skeleton.tied else last}


def _has_int8_head(skeleton: Skeleton) -> bool:
    return skeleton.head is not None and isinstance(skeleton.model.get_submodule(skeleton.head), Int8Linear)


def _place_unknown(skeleton: Skeleton, devices: Sequence[Device]) -> Placement:
    """A family that is not in the table: one device, or accelerate's map by the model's own blocks."""
    needed = sum(slot.nbytes for slot in skeleton.slots.values())
    if len(devices) == 1:
        device = devices[0]
        if needed > device.usable_bytes:
            raise _too_small(device.name, needed, device.usable_bytes)
        return Placement(skeleton, {"": device.name})
    from accelerate import infer_auto_device_map

    mapping = infer_auto_device_map(
        skeleton.model,
        max_memory={_short(device.name): device.usable_bytes for device in devices},
        no_split_module_classes=list(skeleton.model._no_split_modules or []),
    )
    placement = Placement(skeleton, {name: _device_name(device) for name, device in mapping.items()})
    _check_map(placement)
    return placement


def _check_map(placement: Placement) -> None:
    """Every tensor has a device, every name is a module's, and what is tied lies together."""
    skeleton = placement.skeleton
    modules = {name for name, _ in skeleton.model.named_modules()}
    for name in placement.device_map:
        if name not in modules:
            raise PlanError(f"device_map names {name!r}, which is no module of this model")
    missing = []
    for name in skeleton.slots:
        try:
            placement.device_of(name)
        except KeyError:
            missing.append(name.rpartition(".")[0])
    if missing:
        names = list(dict.fromkeys(missing))
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise PlanError(f'device_map gives no device to {", ".join(names[:10])}{more}; add them, or "" for the rest')
    for target, origin in skeleton.tied.items():
        try:
            apart = placement.device_of(target) != placement.device_of(origin)
        except KeyError:
            continue  # the head is not named: it goes with what it is tied to
        if apart:
            raise PlanError(
                f"device_map places {target} on {placement.device_of(target)} and {origin} on "
                f"{placement.device_of(origin)}, but they are one tensor; place both on one device"
            )


def _check_room(
    placement: Placement,
    max_memory: Mapping[int | str, int | str] | None,
    hf_config: Any,
    context: int,
    batch_size: int,
    dtype: str,
) -> None:
    """Raise PlanError if an explicit map puts more on a device than it has, or than max_memory allows."""
    needed: dict[str, int] = {}
    for name, slot in placement.skeleton.slots.items():
        device = placement.device_of(name)
        needed[device] = needed.get(device, 0) + slot.nbytes
    if len(needed) == 1 and any(hf_config.model_type in family.model_types for family in FAMILIES):
        layout = layout_of(hf_config.to_dict())
        caches = (layout.kv_bytes(b, context, batch_size, DTYPE_BYTES[dtype]) for b in range(len(layout.blocks)))
        needed = {device: size + sum(caches) for device, size in needed.items()}
    for name, size in needed.items():
        usable = _device(name, max_memory).usable_bytes
        if name != "disk" and size > usable:
            raise _too_small(name, size, usable)


def _too_small(device: str, needed: int, there: int) -> PlanError:
    return PlanError(
        f"{device}: the model needs {readable(needed)} there and {readable(there)} may be used. What would help: "
        "a device map over more devices, a larger max_memory, a shorter context, offload_folder= with device_map='auto'"
    )


def _usable(max_memory: Mapping[int | str, int | str] | None) -> list[Device]:
    """The GPUs, then the CPU, within `max_memory`."""
    devices = [*cuda_devices(), cpu_device()]
    if max_memory is None:
        return devices
    limits = _limits(max_memory)
    return [
        replace(device, usable_bytes=min(device.usable_bytes, limits[device.name]))
        for device in devices
        if limits.get(device.name)
    ]


def _limits(max_memory: Mapping[int | str, int | str]) -> dict[str, int]:
    """Bytes by device name. Raises PlanError for a size that does not parse or a device that is not there."""
    from accelerate.utils import convert_file_size_to_int

    try:
        limits = {_device_name(name): convert_file_size_to_int(size) for name, size in max_memory.items()}
    except (ValueError, AttributeError, TypeError):
        raise PlanError(
            f'max_memory: {dict(max_memory)!r} has a size that is not a number of bytes or like "20GiB"'
        ) from None
    there = [device.name for device in (*cuda_devices(), cpu_device())]
    if unknown := sorted(limits.keys() - set(there)):
        raise PlanError(
            f"max_memory names {unknown[0]}, which this machine does not have; there are {', '.join(there)}"
        )
    return limits


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


def _device(name: str, max_memory: Mapping[int | str, int | str] | None) -> Device:
    """One device of this machine by name, within `max_memory`."""
    if name == "disk":
        return replace(cpu_device(), name="disk")
    for device in [*cuda_devices(), cpu_device()]:
        if device.name == name:
            limit = _limits(max_memory).get(name) if max_memory is not None else None
            return device if limit is None else replace(device, usable_bytes=min(device.usable_bytes, limit))
    raise PlanError(f"device_map names {name}, which this machine does not have")


def _device_name(device: Any) -> str:
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
