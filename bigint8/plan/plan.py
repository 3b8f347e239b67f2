"""The plan: which stage lives on which device, with the bytes of each. What it says is what the loader does."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from ..errors import BigInt8Error, PlanError
from ..families.table import find_family
from ..options import PAGE_TOKENS, Workload
from ..units import FLOAT_BYTES
from .devices import Device
from .spec import ModelSpec


@dataclass(frozen=True)
class Stage:
    """One stage: what lives on a device, by module, and what it takes there, in bytes.

    It has blocks [first_block, last_block). `workspace_bytes` is what running takes besides, or loading if that
    is more: on the CPU measured (`benchmarks/memory.py --families`), on a GPU computed. The rest is exact.

    Blocks of `host_blocks` and `disk_blocks` are offloaded: their int8 weights, `host_bytes` and `disk_bytes`, are in
    the host's memory or in a file, and come through two buffers, together `buffer_bytes`. `weight_bytes` are the rest.
    """

    index: int
    device: Device
    first_block: int
    last_block: int
    modules: tuple[str, ...]
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    host_blocks: tuple[int, ...] = ()
    disk_blocks: tuple[int, ...] = ()
    host_bytes: int = 0
    disk_bytes: int = 0
    buffer_bytes: int = 0

    @property
    def needed_bytes(self) -> int:
        """What it takes of its device."""
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes + self.buffer_bytes

    @property
    def headroom_bytes(self) -> int:
        """What stays free; negative when the stage does not fit."""
        return self.device.usable_bytes - self.needed_bytes


@dataclass(frozen=True)
class Plan:
    """Where a model's stages live. `dtype` is that of everything that is not int8, keys and values included.

    `pages` is how many pages of keys and values each group of blocks has (`Layout.groups`); none where the model has no
    layout, or its blocks are spread in no order. `notes` are what a person should know of it: what was changed so that
    it fits.
    """

    spec: ModelSpec
    workload: Workload
    dtype: str
    stages: tuple[Stage, ...]
    pages: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_offloaded(self) -> bool:
        """Whether some of its blocks live beside their device."""
        return any(stage.buffer_bytes for stage in self.stages)

    @property
    def copied_head_bytes(self) -> int:
        """What the last stage takes for a copy of the embeddings that is the output head; 0 where there is none."""
        layout = self.spec.layout
        if layout is None or not layout.copied_head:
            return 0
        return layout.first[0].part.weight_bytes(FLOAT_BYTES[self.dtype])

    def device_map(self) -> dict[str, str]:
        """The device of each module, as transformers takes it for `device_map=`.

        Modules without weights beside the blocks, such as rotary frequencies, go with the embeddings. Raises PlanError
        for a plan over several boxes: one process has no names for their devices; and for one with a copy of the
        embeddings, of which a process has one.
        """
        if len({stage.device.box.name for stage in self.stages}) > 1:
            raise PlanError("a device map is for one process, and this plan has stages in several boxes")
        if self.copied_head_bytes:
            raise PlanError(
                "a device map is for one process, where the output head is the embeddings' own matrix, and this plan "
                "has a copy of it in the last stage; plan with replace(spec, one_process=True)"
            )
        devices = {module: stage.device.name for stage in self.stages for module in stage.modules}
        family, covered = find_family(str(self.spec.config.get("model_type"))), DeviceMap(devices)
        for name in family.weightless if family is not None else ():
            if covered.get(name) is None:
                devices[name] = self.stages[0].device.name
        return devices

    def check_room(self, sequences: int, tokens: int) -> None:
        """Raise BigInt8Error unless the caches have room for so many sequences of so many tokens, new ones included.

        More sequences than planned are fine while they are short enough to take no more room.
        """
        context = self.workload.context
        if tokens > context:
            raise BigInt8Error(
                f"{tokens} tokens in one sequence, but the model was loaded for a context of {context}; shorten the "
                "prompt, ask for fewer new tokens, or load with a larger context="
            )
        planned = self.workload.sequences * ceil(context / PAGE_TOKENS)
        if sequences > self.workload.sequences and sequences * ceil(tokens / PAGE_TOKENS) > planned:
            raise BigInt8Error(
                f"{sequences} sequences of {tokens} tokens at once, but the model was loaded for "
                f"{self.workload.sequences} of {context}; run fewer at a time, or load with a larger batch_size="
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, head room included."""
        return {
            "model": self.spec.name,
            "dtype": self.dtype,
            "context": self.workload.context,
            "batch_size": self.workload.sequences,
            "chunk": self.workload.chunk,
            "pages": self.pages,
            "copied_head_bytes": self.copied_head_bytes,
            "int8": self.spec.int8.to_dict(),
            "notes": list(self.notes),
            "stages": [asdict(stage) | {"headroom_bytes": stage.headroom_bytes} for stage in self.stages],
        }


class DeviceMap(Mapping[str, str]):
    """Devices by module name; a name below a mapped module has that module's device."""

    def __init__(self, devices: Mapping[str, str]) -> None:
        self._devices = dict(devices)

    def __getitem__(self, name: str) -> str:
        """The device of the longest mapped name that `name` is or lies under. Raises KeyError if there is none."""
        above = name
        while above not in self._devices:
            if not above:
                raise KeyError(name)
            above = above.rpartition(".")[0]
        return self._devices[above]

    def __iter__(self) -> Iterator[str]:
        return iter(self._devices)

    def __len__(self) -> int:
        return len(self._devices)
