"""The NVIDIA GPUs of this machine, as the driver's management library (NVML) tells of them.

CUDA itself would be asked through a context on each GPU, 300 to 500 MiB that a process keeps until it ends.
"""

import contextlib
import ctypes
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
        wanted = _visible() if _cuda_counts_as_nvml() else None
    found = _from_nvml(wanted) if wanted != [] else []
    return _from_torch() if found is None else found


def _cuda_counts_as_nvml() -> bool:
    """Whether CUDA numbers the GPUs by their place on the bus, as NVML does. If nobody chose an order, this chooses it.

    By default CUDA begins with the fastest GPU. It reads the setting when it starts, for example in
    `torch.cuda.is_available()`; after that the setting changes nothing.
    """
    if "CUDA_DEVICE_ORDER" not in os.environ:
        if _cuda_has_started():
            return False
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    return os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def _cuda_has_started() -> bool:
    """Whether this process has called cuInit, without calling it."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    not_initialized = 3  # CUDA_ERROR_NOT_INITIALIZED
    return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != not_initialized)


def _visible() -> list[str] | list[int] | None:
    """What CUDA_VISIBLE_DEVICES names: GPUs by number or by the beginning of their id; [-1] where it does not say.

    CUDA leaves out what follows the first number that is no GPU's, and shows none where one is named twice. None:
    something that only CUDA understands (MIG).
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [-1]
    entries = [entry.strip() for entry in named.split(",") if entry.strip()]
    if all(entry.startswith("GPU-") for entry in entries):
        return entries if len(set(entries)) == len(entries) else []
    try:
        numbers = [int(entry) for entry in entries]
    except ValueError:
        return None
    numbers = numbers[: next((i for i, number in enumerate(numbers) if number < 0), None)]
    return numbers if len(set(numbers)) == len(numbers) else []


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
        if wanted != [-1]:
            handles = _chosen(nvml, handles, wanted)
        if any(_is_cut(nvml, handle) for handle in handles):
            return None
        return [_gpu(nvml, handle) for handle in handles]
    except Exception:  # a GPU that is lost or does not answer, an older pynvml without a function
        return None
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _chosen(nvml: Any, handles: list[Any], wanted: list[str] | list[int]) -> list[Any]:
    """The GPUs by number or by the beginning of their id, up to the first that is not there."""
    ids = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    chosen = []
    for entry in wanted:
        fits = [i for i, uuid in enumerate(ids) if (uuid.startswith(entry) if isinstance(entry, str) else i == entry)]
        if len(fits) != 1:
            break
        chosen.append(handles[fits[0]])
    return chosen


def _is_cut(nvml: Any, handle: Any) -> bool:
    """Whether the GPU is cut into instances (MIG), of which CUDA shows one."""
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except (nvml.NVMLError, AttributeError):  # most GPUs cannot be, and say so
        return False


def _gpu(nvml: Any, handle: Any) -> Gpu:
    capability = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    free = _free_bytes(nvml, handle)
    return Gpu(_text(nvml.nvmlDeviceGetName(handle)), free, (int(capability[0]), int(capability[1])))


def _free_bytes(nvml: Any, handle: Any) -> int:
    """What is free, without what the driver keeps for itself and CUDA does not offer: NVML's second way to count."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except (nvml.NVMLError, AttributeError, TypeError):  # a driver or a pynvml of before 2021
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return int(memory.free)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _from_torch() -> list[Gpu]:
    import torch

    return [
        Gpu(torch.cuda.get_device_name(i), torch.cuda.mem_get_info(i)[0], torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]
