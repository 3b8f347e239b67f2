"""The Ray actor that owns one device: it loads its stage and runs it.

This module imports neither torch nor transformers, so that a driver starts workers before it has imported them itself;
a worker imports them in the background, while others start.
"""

import os
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from ..errors import WorkerError
from ..load.warm_up import compile_kernels, import_model, importing
from ..plan.devices import Device, cpu_device, cuda_devices
from ..plan.plan import Plan
from ..plan.spec import ModelSpec

if TYPE_CHECKING:
    from ..load.fill import LoadReport
    from .wire import CacheKey, Packed


@dataclass(frozen=True)
class WorkerInfo:
    """Where a worker runs and what it has: `device` as the worker itself names it; `gpu` its number on the box."""

    node: str
    host: str
    pid: int
    device: Device
    gpu: int


class Worker:
    """The actor that owns one device."""

    def __init__(self, kind: str, spec: ModelSpec | None = None) -> None:
        """`spec`: the model that it will load. It begins at once to import the model's code and to compile kernels."""
        self._kind = kind
        self._progress = (0, 0)
        self._stage: Any = None
        self._imports = threading.Thread(target=_import, args=(kind, spec), daemon=True)
        self._imports.start()

    def describe(self) -> WorkerInfo:
        """Where this worker runs, and its device with the memory that is free now."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        found = cuda_devices() if self._kind == "cuda" else [cpu_device()]
        if not found:
            raise WorkerError(f"{socket.gethostname()}: Ray gave GPU {', '.join(gpus)} to a worker, which finds none")
        number = int(gpus[0]) if gpus and gpus[0].isdigit() else 0
        return WorkerInfo(context.get_node_id(), socket.gethostname(), os.getpid(), found[0], number)

    def load(self, plan: Plan, index: int) -> "LoadReport":
        """Load stage `index` of the plan. Raises what `load_sharded_int8` raises; then nothing stays loaded."""
        self._imports.join()
        from .running import RunningStage

        self.unload()

        def on_progress(done: int, total: int) -> None:
            self._progress = (done, total)

        stage = RunningStage(plan, index, "cuda:0" if self._kind == "cuda" else "cpu", on_progress)
        self._stage = stage
        return stage.report

    def unload(self) -> None:
        """Give the stage's memory back."""
        self._stage, self._progress = None, (0, 0)

    @ray.method(concurrency_group="control")
    def progress(self) -> tuple[int, int]:
        """Bytes read so far and in all; (0, 0) before reading begins."""
        return self._progress

    def forward(
        self,
        inputs: "Packed",
        key: "CacheKey | None",
        mask: "Packed | None",
        positions: "Packed | None",
        keep: "int | Packed | None",
    ) -> "Packed":
        """One step of this stage."""
        packed: Packed = self._loaded().step(inputs, key, mask, positions, keep)
        return packed

    def head(self, hidden: "Packed") -> "Packed":
        """Logits of the last stage's hidden states, where the head lives with the embeddings."""
        packed: Packed = self._loaded().head(hidden)
        return packed

    def drop(self, cache_id: int) -> None:
        """Forget a batch of sequences."""
        if self._stage is not None:
            self._stage.drop(cache_id)

    def _loaded(self) -> Any:
        if self._stage is None:  # a step came between this worker's start and its load
            from .wire import SequenceLost

            raise SequenceLost(f"the worker in process {os.getpid()} has not loaded its stage yet")
        return self._stage


def _import(kind: str, spec: ModelSpec | None) -> None:
    """What loading and running need: torch, the model's code, and on a CPU compiled kernels."""
    with importing():
        from . import running  # noqa: F401

        if spec is not None:
            if kind == "cpu":
                compile_kernels(spec)
            import_model(spec)
