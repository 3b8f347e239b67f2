"""The GPUs of this machine, as a stand-in for the driver's library tells of them: the right ones, in CUDA's order.

The stand-in has the interface of nvidia-ml-py; no GPU was asked.
"""

import ctypes
import sys
import types
from pathlib import Path

import pytest
import torch

from bigint8.plan import nvidia
from bigint8.plan.devices import CONTEXT_BYTES, SLACK_BYTES, cuda_devices
from bigint8.units import GIB

IDS = ["GPU-aa00", "GPU-ab11", "GPU-cc22"]
NAMES = ["RTX 3060", "RTX 3090", "RTX 4090"]
FREE = [11 * GIB, 23 * GIB, 22 * GIB]
RESERVED = GIB // 4


class NVMLError(Exception):
    pass


def refuse(*args, **kwargs):
    raise NVMLError("Not Supported")


def library(**changes):
    """A pynvml for three GPUs; handles are their numbers. None takes a function away."""

    def memory(handle, version=None):
        return types.SimpleNamespace(free=FREE[handle] + (0 if version == 0x02000028 else RESERVED))

    functions = {
        "NVMLError": NVMLError,
        "nvmlMemory_v2": 0x02000028,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda handle: IDS[handle],
        "nvmlDeviceGetName": lambda handle: NAMES[handle],
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (8, 6 if handle < 2 else 9),
        "nvmlDeviceGetMigMode": refuse,
    } | changes
    module = types.ModuleType("pynvml")
    vars(module).update({name: function for name, function in functions.items() if function is not None})
    return module


class Asked(Exception):
    """torch's CUDA was asked, which creates contexts."""


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with the driver, in a process where CUDA has not started, and must not."""

    def asked(*args, **kwargs):
        raise Asked

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")  # so that what is set here is taken back
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(nvidia, "_cuda_has_started", lambda: False)
    monkeypatch.setitem(sys.modules, "pynvml", library())
    for name in ("_lazy_init", "mem_get_info", "device_count", "get_device_properties", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, asked)


def names():
    return [gpu.name for gpu in nvidia.find_gpus()]


def test_planning_asks_the_driver_and_starts_no_cuda():
    """What the driver keeps for itself does not count as free."""
    found = nvidia.find_gpus()
    assert [(gpu.name, gpu.free_bytes, gpu.capability) for gpu in found] == [
        ("RTX 3060", FREE[0], (8, 6)),
        ("RTX 3090", FREE[1], (8, 6)),
        ("RTX 4090", FREE[2], (8, 9)),
    ]
    devices = cuda_devices()
    assert [device.name for device in devices] == ["cuda:0", "cuda:1", "cuda:2"]
    assert [device.usable_bytes for device in devices] == [free - CONTEXT_BYTES - SLACK_BYTES for free in FREE]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0", [0]),
        ("2", [2]),  # as Ray sets it for a worker
        ("2,0", [2, 0]),
        (" 1 , 2", [1, 2]),
        ("", []),
        ("-1", []),
        ("1,-1,0", [1]),
        ("1,7,0", [1]),
        ("1,1", []),
        ("GPU-cc22", [2]),
        ("GPU-cc,GPU-aa00", [2, 0]),
        ("GPU-a", []),  # the beginning of two ids
        ("GPU-ab11,GPU-ff,GPU-aa00", [1]),
        ("GPU-ab,GPU-ab", []),
    ],
)
def test_cuda_visible_devices_is_heeded(monkeypatch, visible, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert names() == [NAMES[i] for i in expected]


@pytest.mark.parametrize("visible", ["MIG-9f33", "0,GPU-cc22", "all"])
def test_what_only_cuda_understands_is_left_to_it(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(Asked):
        nvidia.find_gpus()


def test_cuda_is_told_to_count_as_the_driver_does(monkeypatch):
    """By default it begins with the fastest: then its 0 would be another GPU than that of the driver."""
    nvidia.find_gpus()
    assert nvidia.os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setattr(nvidia, "_cuda_has_started", lambda: True)
    assert names() == NAMES  # it started with that order


@pytest.mark.parametrize("order", ["FASTEST_FIRST", None])
def test_where_cuda_counts_otherwise_it_is_asked(monkeypatch, order):
    """Also where it has started already: then it no longer listens."""
    if order is None:
        monkeypatch.setattr(nvidia, "_cuda_has_started", lambda: True)
    else:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    with pytest.raises(Asked):
        nvidia.find_gpus()
    assert nvidia.os.environ.get("CUDA_DEVICE_ORDER") == order


@pytest.mark.parametrize(("answer", "started"), [(3, False), (0, True), (100, True)])
def test_whether_cuda_has_started_is_seen_without_starting_it(monkeypatch, answer, started):
    monkeypatch.undo()
    driver = types.SimpleNamespace(cuDeviceGetCount=lambda count: answer)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert nvidia._cuda_has_started() is started


def test_without_a_driver_cuda_has_not_started(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.undo()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert nvidia._cuda_has_started() is False


def test_without_a_driver_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda self: False)
    monkeypatch.setattr(nvidia.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "pynvml", library(nvmlInit=refuse))
    assert nvidia.find_gpus() == []


BROKEN = {
    "not installed": None,
    "no driver": library(nvmlInit=refuse),
    "no count": library(nvmlDeviceGetCount=refuse),
    "a lost GPU": library(nvmlDeviceGetHandleByIndex=refuse),
    "no memory told": library(nvmlDeviceGetMemoryInfo=refuse),
    "no capability told": library(nvmlDeviceGetCudaComputeCapability=refuse),
    "no such function": library(nvmlDeviceGetCudaComputeCapability=None),
    "a GPU cut into instances": library(nvmlDeviceGetMigMode=lambda handle: (1, 1)),
}


@pytest.mark.parametrize("pynvml", BROKEN.values(), ids=BROKEN)
def test_what_the_driver_cannot_say_is_asked_of_torch(monkeypatch, pynvml):
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: NAMES[i])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (FREE[i], 24 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (8, 6))
    assert nvidia.find_gpus() == [nvidia.Gpu(NAMES[i], FREE[i], (8, 6)) for i in range(2)]


OLD = {
    "no second version": library(nvmlMemory_v2=None),
    "no version": library(
        nvmlMemory_v2=None, nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(free=FREE[handle] + RESERVED)
    ),
    "an old driver": library(
        nvmlDeviceGetMemoryInfo=lambda handle, version=None: (
            refuse() if version else types.SimpleNamespace(free=FREE[handle] + RESERVED)
        )
    ),
}


@pytest.mark.parametrize("pynvml", OLD.values(), ids=OLD)
def test_old_drivers_and_libraries_tell_the_memory_in_their_way(monkeypatch, pynvml):
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    assert [gpu.free_bytes for gpu in nvidia.find_gpus()] == [free + RESERVED for free in FREE]


def test_names_and_ids_may_be_bytes(monkeypatch):
    pynvml = library(
        nvmlDeviceGetName=lambda handle: NAMES[handle].encode(), nvmlDeviceGetUUID=lambda handle: IDS[handle].encode()
    )
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-cc")
    assert names() == ["RTX 4090"]


def test_where_torch_uses_the_gpus_its_unused_memory_is_given_back_first(monkeypatch):
    """And they are known by their ids, in its order."""
    given_back = []

    def memory(handle, version=None):
        return types.SimpleNamespace(free=FREE[handle] if given_back else 0)

    monkeypatch.setitem(sys.modules, "pynvml", library(nvmlDeviceGetMemoryInfo=memory))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    properties = [types.SimpleNamespace(uuid=IDS[i].removeprefix("GPU-")) for i in (2, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties[i])
    assert [(gpu.name, gpu.free_bytes) for gpu in nvidia.find_gpus()] == [("RTX 4090", FREE[2]), ("RTX 3060", FREE[0])]


def test_the_installed_library_has_what_is_asked_of_it(monkeypatch):
    monkeypatch.undo()
    pynvml = pytest.importorskip("pynvml")
    assert isinstance(pynvml.nvmlMemory_v2, int)
    assert pynvml.__file__ and issubclass(pynvml.NVMLError, Exception)
    assert all(callable(getattr(pynvml, name)) for name in vars(library()) if name.startswith(("nvmlD", "nvmlI")))
