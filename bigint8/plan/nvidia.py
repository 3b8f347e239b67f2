"""The NVIDIA GPUs of this machine, as the driver's management library (NVML) tells of them.

CUDA itself would be asked through a context on each GPU, 300 to 500 MiB that a process keeps until it ends.
"""

import contextlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, the bytes that are free on it, its compute capability."""

    name: str
    free_bytes: int
    capability: tuple[int, int]


def find_gpus() -> list[Gpu]:
    """The GPUs that this process may use, in CUDA's order.

    What torch's allocator keeps in this process without using it is given back first, so that it counts as free. Where
    NVML cannot answer, torch is asked, which creates contexts.
    """
    if not (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists() or sys.platform == "win32"):
        return []
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        wanted: list[str] | list[int] | None = [
            f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())
        ]
    else:
        # CUDA sorts by speed unless told otherwise; NVML always sorts by place on the bus
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        wanted = None if os.environ["CUDA_DEVICE_ORDER"] != "PCI_BUS_ID" else _visible()
    found = _from_nvml(wanted) if wanted != [] else []
    return _from_torch() if found is None else found


def _visible() -> list[str] | list[int] | None:
    """What CUDA_VISIBLE_DEVICES names: GPUs by number or by the beginning of their id; [-1] where it does not say.

    CUDA leaves out what follows the first number that is no GPU's. None: something that only CUDA understands (MIG).
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [-1]
    entries = [entry.strip() for entry in named.split(",") if entry.strip()]
    if all(entry.startswith("GPU-") for entry in entries):
        return entries
    try:
        numbers = [int(entry) for entry in entries]
    except ValueError:
        return None
    return numbers[: next((i for i, number in enumerate(numbers) if number < 0), None)]


def _from_nvml(wanted: list[str] | list[int] | None) -> list[Gpu] | None:
    """These GPUs, by number, by id, or all for [-1]. None where NVML is not there or does not know."""
    if wanted is None:
        return None
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception:  # not installed, no driver, no permission: each raises another kind
        return None
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        ids = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        if wanted != [-1]:
            chosen = []
            for entry in wanted:
                fits = [
                    i for i, uuid in enumerate(ids) if entry == i or (isinstance(entry, str) and uuid.startswith(entry))
                ]
                if len(fits) != 1:
                    break
                chosen.append(handles[fits[0]])
            handles = chosen
        return [_gpu(nvml, handle) for handle in handles]
    except nvml.NVMLError:
        return None
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _gpu(nvml: Any, handle: Any) -> Gpu:
    # the second version of the question tells apart what the driver keeps for itself, which CUDA does not offer
    memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    capability = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(_text(nvml.nvmlDeviceGetName(handle)), int(memory.free), (int(capability[0]), int(capability[1])))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _from_torch() -> list[Gpu]:
    import torch

    return [
        Gpu(torch.cuda.get_device_name(i), torch.cuda.mem_get_info(i)[0], torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]
