"""What devices this machine, or a preset of one, has: kind, memory and the 16-bit format it is fast at."""

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict, Field

from ..errors import BigInt8Error, nearest
from ..options import DeviceKind
from ..sources.presets import read_yaml
from ..units import GIB, MIB
from . import nvidia
from .speed import (
    BUS_SHARE,
    UNKNOWN_DISK,
    UNKNOWN_GPU,
    Speed,
    cpu_speed,
    gpu_speed,
    measured_gpu,
    plain_torch_speed,
    saved_disk,
    shared_cpu_speed,
)

CONTEXT_BYTES = 500 * MIB
"""Held back on each GPU for the CUDA context: 300 to 500 MiB have been seen."""

SLACK_BYTES = 256 * MIB
"""Held back on each GPU for cuBLAS workspaces and for what torch's allocator cannot hand out."""

HOST_RESERVE_BYTES = GIB
"""Held back of the host's memory, for each process: for Python, its libraries and the rest of the machine."""


SPINS = "2000"
"""How often a thread of GNU's OpenMP looks whether there is work before it sleeps: some microseconds."""


@dataclass(frozen=True)
class Box:
    """A machine that holds devices.

    network_bytes_per_s, network_seconds: its link to other boxes, and half of what a message takes besides its bytes
    host_bytes: of its memory that weights may take which no device holds; disk_bytes: of its disk, likewise
    disk_bytes_per_s: of where checkpoints are
    cached_bytes, cached_bytes_per_s: of its memory that is left for files that are read again and again, and how fast
        one thread reads them there; more of them than that come from the disk each time
    nvlink_bytes_per_s: between its GPUs, one way; 0 where copies go through the host's memory
    """

    name: str = "this machine"
    network_bytes_per_s: float = 117e6
    network_seconds: float = 50e-6
    host_bytes: int = 0
    disk_bytes: int = 0
    disk_bytes_per_s: float = UNKNOWN_DISK.bytes_per_s
    cached_bytes: int = 0
    cached_bytes_per_s: float = UNKNOWN_DISK.cached_bytes_per_s
    nvlink_bytes_per_s: float = 0.0


THIS_BOX = Box()


def this_box() -> Box:
    """This machine, its disk as measured or assumed."""
    disk = saved_disk()
    return Box(disk_bytes_per_s=disk.bytes_per_s, cached_bytes_per_s=disk.cached_bytes_per_s)


@dataclass(frozen=True)
class Device:
    """One device: `name` as torch spells it ("cuda:0", "cpu"), `usable_bytes` for weights, cache and workspace.

    `fast_16bit` is the 16-bit format it multiplies fast, None where float32 is faster than either. `shared_speed` is
    its speed while the others of its box compute too, None where that is the same.
    """

    name: str
    model: str
    usable_bytes: int
    fast_16bit: str | None
    speed: Speed = UNKNOWN_GPU
    box: Box = THIS_BOX
    shared_speed: Speed | None = None

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]


class GpuPreset(BaseModel):
    """One entry of configs/gpus.yaml, which says what each field counts. `source`: where all of them are from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    cuda_gib: float = Field(gt=0)
    fast_16bit: Literal["float16", "bfloat16"]
    bandwidth_gb_per_s: float = Field(gt=0)
    int8_tops: float = Field(gt=0)
    float16_tflops: float = Field(gt=0)
    pcie_gb_per_s: float = Field(gt=0)
    nvlink_gb_per_s: float = Field(default=0, ge=0)
    source: str = Field(min_length=1)

    @property
    def speed(self) -> Speed:
        """As measured here, or computed from the data sheet."""
        computed = gpu_speed(
            1e9 * self.bandwidth_gb_per_s, 1e12 * self.int8_tops, 1e12 * self.float16_tflops, 1e9 * self.pcie_gb_per_s
        )
        if self.fast_16bit == "float16":
            computed = plain_torch_speed(computed, 1e12 * self.float16_tflops)
        return measured_gpu(self.model) or computed

    @property
    def usable_bytes(self) -> int:
        """What weights, cache and workspace may take."""
        return int(self.cuda_gib * GIB) - CONTEXT_BYTES - SLACK_BYTES

    def device(self, name: str, box: Box = THIS_BOX, slot_gb_per_s: float | None = None) -> Device:
        """One of these GPUs in a box, in a slot that gives its link so much: it takes no more than its own."""
        speed = self.speed
        if slot_gb_per_s is not None:
            link = 1e9 * min(self.pcie_gb_per_s, slot_gb_per_s)
            speed = replace(speed, bus_bytes_per_s=BUS_SHARE * link)
        return Device(name, self.model, self.usable_bytes, self.fast_16bit, speed, box)


@cache
def gpu_presets() -> dict[str, GpuPreset]:
    """The GPUs that one can plan for without owning them, by name."""
    return {name: GpuPreset.model_validate(entry) for name, entry in read_yaml("gpus.yaml").items()}


def preset_gpus(name: str, count: int) -> list[Device]:
    """`count` GPUs of a preset. Raises BigInt8Error for a name that is not in configs/gpus.yaml."""
    presets = gpu_presets()
    if name not in presets:
        raise BigInt8Error(f"gpu_type={name}: no such GPU preset; {nearest(name, presets)}")
    return [presets[name].device(f"cuda:{i}") for i in range(count)]


def plain_torch_note(devices: Iterable[Device]) -> str | None:
    """What to tell a person whose GPUs are too old for our kernels, None if none of them is."""
    old = dict.fromkeys(device.model for device in devices if device.kind == "cuda" and device.fast_16bit == "float16")
    if not old:
        return None
    return f"int8 products run in plain torch on {', '.join(old)}, and slower: kernels need compute capability 8.0"


def cuda_devices() -> list[Device]:
    """The CUDA GPUs of this machine, with the memory that is free now. No CUDA context is created for the question."""
    return [
        Device(
            f"cuda:{i}",
            gpu.name,
            max(0, gpu.free_bytes - CONTEXT_BYTES - SLACK_BYTES),
            "bfloat16" if gpu.capability >= (8, 0) else "float16",
            _speed_of(gpu.name),
            this_box(),
        )
        for i, gpu in enumerate(nvidia.find_gpus())
    ]


def _speed_of(model: str) -> Speed:
    """A GPU's speed: measured here, of its data sheet, or assumed."""
    alike = (preset.speed for preset in gpu_presets().values() if preset.model == model)
    return measured_gpu(model) or next(alike, UNKNOWN_GPU)


def cpu_device(share: int = 1) -> Device:
    """The CPU, or one of `share` equal shares of its memory; each is for a process of its own, with its libraries."""
    usable = share_of(max(0, available_memory() - HOST_RESERVE_BYTES), share)
    model = _cpu_model()
    cores = max(1, usable_cpus() // share)
    shared = None if share == 1 else shared_cpu_speed(model, cores, share)
    dtype = "bfloat16" if _cpu_has_bf16() else None
    return Device("cpu", model, usable, dtype, cpu_speed(model, cores), this_box(), shared)


def share_of(usable_bytes: int, share: int) -> int:
    """What one of `share` processes may use of what a single one might: each needs memory for itself."""
    return max(0, (usable_bytes + HOST_RESERVE_BYTES) // share - HOST_RESERVE_BYTES)


def usable_cpus() -> int:
    """How many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wait_without_spinning() -> None:
    """Let waiting OpenMP threads sleep soon: in processes that this one starts, and here if torch is not imported yet.

    By default they spin for milliseconds. If somebody else needs that CPU, such as the next worker of a pipeline, the
    spinning costs more than the work: on two busy CPUs, SmolLM2 in one process made 2 to 5 tokens/s with it and 18 to
    30 without. A setting that is there already is kept.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def available_memory() -> int:
    """Bytes of host memory that can be had without swapping, within this process's control group."""
    available = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        reclaimable = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        if limit != "max":
            available = min(available, int(limit) - used + int(reclaimable.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # no control group, or one that sets no limit
    return available


def find_devices(kind: DeviceKind = "auto", count: int | None = None) -> tuple[list[Device], str | None]:
    """`count` devices of this machine (all GPUs, or one CPU worker, by default) and a note for the user, or None.

    "auto" is the GPUs if there are any, else CPU workers that share the machine's memory, which the note says.
    Raises BigInt8Error when `kind` is "cuda" and there is no GPU, or fewer GPUs than asked for.
    """
    gpus = [] if kind == "cpu" else cuda_devices()
    if gpus:
        if count is not None and count > len(gpus):
            there = f"{len(gpus)} GPU{'s' * (len(gpus) > 1)}"
            raise BigInt8Error(f"gpus={count}: this machine has {there}; ask for at most that many")
        return gpus[:count], None
    if kind == "cuda":
        raise BigInt8Error("device=cuda: no CUDA GPU was found on this machine; device=cpu runs on the CPU")
    count = count or 1
    note = None if kind == "cpu" else f"no GPU was found: {count} CPU worker{'s' if count > 1 else ''} instead"
    return [cpu_device(share=count)] * count, note


def pick_dtype(requested: str, stored: str, devices: list[Device]) -> str:
    """The dtype of everything that is not int8, by name.

    "auto" is the dtype that the checkpoint stores, unless a device is slow at it: then the 16-bit format that every
    device is fast at, or float32.
    """
    if requested != "auto":
        return requested
    if stored == "float32" or all(device.fast_16bit == stored for device in devices):
        return stored
    if all(device.kind == "cuda" for device in devices) and stored == "float16":
        return stored  # every GPU is fast at float16
    fast = {device.fast_16bit for device in devices}
    if None in fast:
        return "float32"
    return str(fast.pop()) if len(fast) == 1 else "float16"  # a GPU that is slow at bfloat16 among others


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def _cpu_has_bf16() -> bool:
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
