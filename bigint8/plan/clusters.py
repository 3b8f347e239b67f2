"""Clusters that one can plan for without owning them: boxes with their GPUs and links, from a YAML file.

The least that a person writes is a name for a box and what is in it:

    boxes:
      desk: 2 x rtx-3090

Several boxes need a network: `ethernet_gbit_per_s`, for all of them or for each. `BoxFile` and `GpusFile` say more.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ..errors import BigInt8Error
from ..units import GIB
from .cluster_file import read_text, validated
from .devices import HOST_RESERVE_BYTES, Box, Device, GpuPreset, gpu_presets, nearest, plain_torch_note

PCIE_GB_PER_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
"""Of a lane, one way, by generation: 2.5 and 5 GT/s of which 8/10 are data, 8, 16 and 32 GT/s of which 128/130 are, and
64 GT/s of which 242/256 are (PCI Express base specification)."""

ETHERNET_SHARE = 1448 / 1538
"""What a TCP connection carries of what an Ethernet does: 1448 bytes of 1538 on the wire, in frames of 1500."""

MOST = 1024
"""Of boxes or GPUs in one line. More is a slip of the keyboard."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=MOST)]

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)
_GPUS = re.compile(r"(?:(-?\d+)\s*x\s+|(-?\d+)x(?=[a-z]))?(\S+)")
_PCIE = re.compile(r"([1-6])(?:\.0)? x(1|2|4|8|16)")


def _gpus(written: Any) -> Any:
    """`rtx-3090` and `8 x rtx-3090` are short for a mapping."""
    if isinstance(written, str) and (found := _GPUS.fullmatch(written.strip())):
        return {"preset": found[3], "count": int(found[1] or found[2] or 1)}
    return written


class GpusFile(BaseModel):
    """GPUs of a box that are alike; `4 x rtx-3090` is short for a preset and a count.

    preset: a name of configs/gpus.yaml
    pcie: the link as it runs, such as "3.0 x4", where the slot is slower than the card
    """

    model_config = _STRICT

    preset: str
    count: Count = 1
    pcie: str | None = None

    @field_validator("preset")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in gpu_presets():
            raise ValueError(f"no such GPU preset; {nearest(name, gpu_presets())}")
        return name

    @field_validator("pcie", mode="before")
    @classmethod
    def _link(cls, link: Any) -> Any:
        if not isinstance(link, str) or not _PCIE.fullmatch(link):
            raise ValueError('write generation and lanes, as "3.0 x4" or "4.0 x16"')
        return link

    @property
    def slot_gb_per_s(self) -> float | None:
        """What the slot gives, one way; None where that is what the card takes."""
        found = _PCIE.fullmatch(self.pcie or "")
        return PCIE_GB_PER_S[int(found[1])] * int(found[2]) if found else None

    @property
    def gpu(self) -> GpuPreset:
        return gpu_presets()[self.preset]


def _box(written: Any) -> Any:
    """A box that is only its GPUs may be written so."""
    if isinstance(written, str | list):
        written = {"gpus": written}
    if isinstance(written, dict) and isinstance(written.get("gpus"), str | dict):
        written = {**written, "gpus": [written["gpus"]]}
    return written


class BoxFile(BaseModel):
    """A machine, or `count` machines that are alike.

    gpus: what is in it, in the order of the bus
    nvlink: whether its GPUs are joined by NVLink; all are taken as joined, though bridges join pairs
    memory_gib: of the host; without it nothing is planned to stay there. disk_gb_per_s: where checkpoints are read from
    ethernet_gbit_per_s, ethernet_latency_us: to other boxes, where not that of the whole cluster
    """

    model_config = _STRICT

    gpus: Annotated[list[Annotated[GpusFile, BeforeValidator(_gpus)]], Field(min_length=1)]
    count: Count = 1
    nvlink: bool = False
    memory_gib: Positive | None = None
    disk_gb_per_s: Positive = 3.0
    ethernet_gbit_per_s: Positive | None = None
    ethernet_latency_us: Positive | None = None

    @field_validator("nvlink")
    @classmethod
    def _has_nvlink(cls, nvlink: bool, info: Any) -> bool:
        without = [gpus.preset for gpus in info.data.get("gpus", ()) if not gpus.gpu.nvlink_gb_per_s]
        if nvlink and without:
            raise ValueError(f"{without[0]} has no NVLink (configs/gpus.yaml); leave this line out")
        return nvlink

    def names(self, name: str) -> list[str]:
        """What the machines are called: by the box's name, numbered where they are several."""
        return [name] if self.count == 1 else [f"{name}-{i + 1}" for i in range(self.count)]


class ClusterFile(BaseModel):
    """One file of configs/clusters, or of a person's own.

    ethernet_gbit_per_s: of each box's link, unless the box says otherwise; needed where there are several
    ethernet_latency_us: from one process to one in another box, assumed unless it is given
    """

    model_config = _STRICT

    boxes: Annotated[dict[str, Annotated[BoxFile, BeforeValidator(_box)]], Field(min_length=1)]
    ethernet_gbit_per_s: Positive | None = None
    ethernet_latency_us: Positive = 100.0

    @model_validator(mode="after")
    def _names_differ(self) -> "ClusterFile":
        seen: dict[str, str] = {}
        for written, box in self.boxes.items():
            for name in box.names(written):
                if name in seen:
                    raise ValueError(f"two boxes are called {name}: {seen[name]} and {written}; rename one")
                seen[name] = written
        return self

    @model_validator(mode="after")
    def _boxes_are_linked(self) -> "ClusterFile":
        if len(self.boxes) == 1 and all(box.count == 1 for box in self.boxes.values()):
            return self
        for name, box in self.boxes.items():
            if (box.ethernet_gbit_per_s or self.ethernet_gbit_per_s) is None:
                raise ValueError(
                    f"box {name} has no link to the other boxes; give ethernet_gbit_per_s there or at the file's top"
                )
        return self


@dataclass(frozen=True)
class Machines:
    """Boxes and the devices in them, as a plan takes them. `name`: what a person called the cluster."""

    name: str
    boxes: tuple[Box, ...]
    devices: tuple[Device, ...]

    @property
    def note(self) -> str | None:
        """What a person should know before they plan for these, None if nothing."""
        return plain_torch_note(self.devices)


@cache
def cluster_names() -> tuple[str, ...]:
    """The clusters that ship with bigint8."""
    names = (entry.name for entry in files("bigint8.configs").joinpath("clusters").iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def load_cluster(name_or_path: str | Path) -> Machines:
    """The cluster of a name in configs/clusters, or of a YAML file. Raises BigInt8Error, with the file's line.

    Devices are named cuda:0 and on over all boxes, in the order of the file.
    """
    name = str(name_or_path)
    if name.lower() in cluster_names():
        where = f"configs/clusters/{name.lower()}.yaml"
        text = files("bigint8.configs").joinpath(f"clusters/{name.lower()}.yaml").read_text(encoding="utf-8")
        return _machines(name.lower(), validated(ClusterFile, text, where))
    path = Path(name_or_path)
    looks_like_a_file = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    if not looks_like_a_file and not path.exists():
        raise BigInt8Error(f"cluster={name}: no such cluster and no such file; {nearest(name, cluster_names())}")
    return _machines(path.stem, validated(ClusterFile, read_text(path), str(path)))


def _machines(name: str, cluster: ClusterFile) -> Machines:
    boxes, devices, numbers = [], [], count()
    for written, file in cluster.boxes.items():
        for box_name in file.names(written):
            box = replace(_described(file, cluster), name=box_name)
            boxes.append(box)
            devices += [gpus.gpu.device(f"cuda:{next(numbers)}", box, gpus.slot_gb_per_s) for gpus in _each(file)]
    return Machines(name, tuple(boxes), tuple(devices))


def _each(box: BoxFile) -> Iterator[GpusFile]:
    """The GPUs of a box, one by one."""
    for gpus in box.gpus:
        for _ in range(gpus.count):
            yield gpus


def _described(file: BoxFile, cluster: ClusterFile) -> Box:
    """A box as the time model takes it: each GPU has a process of its own, which takes host memory."""
    gbit = file.ethernet_gbit_per_s or cluster.ethernet_gbit_per_s
    latency_us = file.ethernet_latency_us or cluster.ethernet_latency_us
    processes = sum(gpus.count for gpus in file.gpus)
    host = int((file.memory_gib or 0) * GIB) - processes * HOST_RESERVE_BYTES
    box = Box(
        network_seconds=latency_us * 1e-6 / 2,
        host_bytes=max(0, host),
        disk_bytes_per_s=1e9 * file.disk_gb_per_s,
        nvlink_bytes_per_s=1e9 * min(gpus.gpu.nvlink_gb_per_s for gpus in file.gpus) if file.nvlink else 0.0,
    )
    return box if gbit is None else replace(box, network_bytes_per_s=ETHERNET_SHARE * gbit * 1e9 / 8)
