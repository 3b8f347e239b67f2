"""The Ray actor that owns one device: it loads its stage and runs it. And how tensors travel between processes."""

import os
import socket
from dataclasses import dataclass
from typing import Any, cast

import ray
import torch
from torch import Tensor

from .checkpoint import open_checkpoint
from .config import Int8Config
from .errors import BigInt8Error
from .hardware import Device, cpu_device, cuda_devices, usable_cpus
from .loader import LoadReport, load_stage

CacheEdit = tuple[str, Any]
"""A method of a transformers cache and its argument, to be applied on every worker before the next step."""


class SequenceLost(BigInt8Error):
    """A worker that was started again is asked to go on with a sequence that its predecessor kept."""


@dataclass(frozen=True)
class CacheKey:
    """Which sequences a step continues: an id, whether workers keep them already, and edits to make first."""

    id: int
    started: bool
    edits: tuple[CacheEdit, ...]


@dataclass(frozen=True)
class Packed:
    """A tensor as Ray moves it: a numpy array, bfloat16 as the int16 of its bits."""

    array: Any
    dtype: str


def pack(tensor: Tensor | None) -> Packed | None:
    """A tensor ready to leave this process."""
    if tensor is None:
        return None
    tensor = tensor.detach().cpu().contiguous()
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return Packed(bits.numpy(), str(tensor.dtype).removeprefix("torch."))


def unpack(packed: Packed | None, device: str) -> Tensor | None:
    """The tensor on this process's device."""
    if packed is None:
        return None
    tensor = torch.from_numpy(packed.array.copy())  # what Ray hands out is read-only
    return tensor.view(getattr(torch, packed.dtype)).to(device)


@dataclass(frozen=True)
class WorkerInfo:
    """Where a worker runs and what it has: `device` as the worker itself names it."""

    node: str
    host: str
    pid: int
    device: Device


class Worker:
    """The actor that owns one device: it loads its stage and runs it."""

    def __init__(self, kind: str) -> None:
        torch.set_num_threads(usable_cpus())
        self._kind = kind
        self._progress = (0, 0)
        self._stage: Any = None
        self._device = "cpu"
        self._caches: dict[int, Any] = {}

    def describe(self) -> WorkerInfo:
        device = cuda_devices()[0] if self._kind == "cuda" else cpu_device()
        return WorkerInfo(ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid(), device)

    def load(
        self, folder: str, first: int, last: int, device: str, config: Int8Config, dtype: str, trust_remote_code: bool
    ) -> LoadReport:
        self.unload()
        self._device = device

        def on_progress(done: int, total: int) -> None:
            self._progress = (done, total)

        checkpoint = open_checkpoint(folder, trust_remote_code)
        self._stage, report = load_stage(checkpoint, first, last, device, config, dtype, on_progress, trust_remote_code)
        return report

    def unload(self) -> None:
        """Give the stage's memory back."""
        self._stage, self._caches, self._progress = None, {}, (0, 0)

    @ray.method(concurrency_group="control")
    def progress(self) -> tuple[int, int]:
        """Bytes read so far and in all; (0, 0) before reading begins."""
        return self._progress

    @torch.inference_mode()
    def forward(
        self,
        inputs: Packed,
        key: CacheKey | None,
        mask: Packed | None,
        positions: Packed | None,
        keep: int | Packed | None,
    ) -> Packed:
        """One step of this stage. `keep`: on the last stage, which tokens' hidden states (and logits) to return."""
        self._check_loaded()
        hidden = self._stage(
            unpack(inputs, self._device),
            unpack(mask, self._device),
            unpack(positions, self._device),
            None if key is None else self._cache(key),
        )
        if keep is not None:
            index = unpack(keep, self._device) if isinstance(keep, Packed) else slice(-keep if keep else None, None)
            hidden = hidden[:, index]
            if self._stage.has_head:
                hidden = self._stage.head(hidden)
        return cast(Packed, pack(hidden))

    def _check_loaded(self) -> None:
        if self._stage is None:  # a step came between this worker's start and its load
            raise SequenceLost(f"the worker in process {os.getpid()} has not loaded its stage yet")

    def _cache(self, key: CacheKey) -> Any:
        if key.id not in self._caches:
            if key.started:
                raise SequenceLost(f"the worker in process {os.getpid()} does not know sequence {key.id}")
            self._caches[key.id] = self._stage.new_cache()
        cache = self._caches[key.id]
        for method, argument in key.edits:
            getattr(cache, method)(torch.tensor(argument) if isinstance(argument, list) else argument)
        return cache

    @torch.inference_mode()
    def head(self, hidden: Packed) -> Packed:
        """Logits of the last stage's hidden states, where the head lives with the embeddings."""
        self._check_loaded()
        return cast(Packed, pack(self._stage.head(unpack(hidden, self._device))))

    def drop(self, cache_id: int) -> None:
        """Forget a sequence."""
        self._caches.pop(cache_id, None)
