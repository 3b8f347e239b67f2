"""The Ray actor that owns one device: it loads its stage and runs it.

This module imports neither torch nor transformers, so that a driver starts workers before it has imported them itself;
a worker imports them in the background, while others start.
"""

import os
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from ..errors import WorkerError
from ..load.warm_up import compile_kernels, import_model, importing
from ..plan.devices import Device, available_memory, cpu_device, cuda_devices
from ..plan.offload import free_disk_bytes
from ..plan.plan import Plan
from ..plan.spec import ModelSpec
from .cores import Cores, Share
from .doors import LOOPBACK, Address
from .preflight import FileMark, marks

if TYPE_CHECKING:
    from ..load.fill import LoadReport
    from .flow import Flow, Place
    from .spans import Span, WorkerStats


SWITCH_SECONDS = 0.0005
"""How long a thread of a worker may go on in Python while another waits, such as the one that receives. Python's own
5 ms are as long as a small stage computes."""


@dataclass(frozen=True)
class WorkerInfo:
    """Where a worker runs and what it has: `device` as the worker itself names it; `gpu` its number on the box.

    host_bytes: of the box's memory that could be had when the worker was asked
    disk_bytes: what its disk had free for offloaded weights
    gpu_id: the GPU as CUDA_VISIBLE_DEVICES names it, None on a CPU
    """

    node: str
    host: str
    pid: int
    device: Device
    gpu: int
    host_bytes: int
    disk_bytes: int
    gpu_id: str | None = None


class Worker:
    """The actor that owns one device."""

    def __init__(self, kind: str, spec: ModelSpec | None = None, gpu_id: str | None = None) -> None:
        """`spec`: the model that it will load. It begins at once to import the model's code and to compile kernels.

        gpu_id: the GPU, where Ray gives none because another worker has it, beside which this one stands
        """
        sys.setswitchinterval(SWITCH_SECONDS)
        self._kind, self._gpu_id = kind, gpu_id
        if gpu_id is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu_id  # torch is not imported yet
        self._device = "cuda:0" if kind == "cuda" else "cpu"
        self._progress = (0, 0)
        self._stage: Any = None
        self._flow: Flow | None = None
        self._planned: tuple[Plan, int] | tuple[()] = ()
        self._cores = Cores()
        self._imports = threading.Thread(target=_import, args=(kind, spec), daemon=True)
        self._imports.start()

    def describe(self) -> WorkerInfo:
        """Where this worker runs, and its device with the memory that is free now."""
        context = ray.get_runtime_context()
        gpus = [self._gpu_id] if self._gpu_id is not None else context.get_accelerator_ids().get("GPU", [])
        found = cuda_devices() if self._kind == "cuda" else [cpu_device()]
        if not found:
            raise WorkerError(f"{socket.gethostname()}: Ray gave GPU {', '.join(gpus)} to a worker, which finds none")
        number = int(gpus[0]) if gpus and gpus[0].isdigit() else 0
        room = available_memory(), free_disk_bytes()
        return WorkerInfo(context.get_node_id(), socket.gethostname(), os.getpid(), found[0], number, *room, *gpus[:1])

    def marks(self, files: list[Path]) -> list[FileMark]:
        """What tells these files from others of their names, as they are on this node."""
        return marks(files)

    def load(self, plan: Plan, index: int, share: Share = Share()) -> "LoadReport":  # noqa: B008  (frozen)
        """Load stage `index` of the plan. Raises what `load_sharded_int8` raises; then nothing stays loaded.

        share: which of the box's cores to compute on
        """
        self._imports.join()
        import torch

        from .running import RunningStage

        self.unload()
        torch.set_num_threads(self._cores.take(share))

        def on_progress(done: int, total: int) -> None:
            self._progress = (done, total)

        stage = RunningStage(plan, index, self._device, on_progress)
        self._stage, self._planned = stage, (plan, index)
        return stage.report

    def unload(self) -> None:
        """End the links and give the stage's memory back."""
        flow, self._flow = self._flow, None
        if flow is not None:
            flow.close()
        self._stage, self._planned, self._progress = None, (), (0, 0)

    def listen(self, place: "Place", one_box: bool, secret: bytes) -> Address:
        """Listen for the driver and the stage before, on loopback if all are on one box: where. A stage is loaded."""
        from .flow import Flow

        if self._flow is None:
            self._flow = Flow(self._loaded(), place, self._device)
        return self._flow.listen(LOOPBACK if one_box else ray.util.get_node_ip_address(), secret)

    def connect(self, epoch: int, next_address: Address | None) -> None:
        """Make the stage's links under an epoch, as the other workers do at the same time. Raises WorkerError."""
        if self._flow is None:
            raise WorkerError(f"the worker in process {os.getpid()} does not listen yet")
        self._flow.connect(epoch, next_address)

    @ray.method(concurrency_group="control")
    def stats(self) -> "WorkerStats | None":
        """What the stage has done so far; None before it has links."""
        return None if self._flow is None else self._flow.tally.stats(*self._planned)

    @ray.method(concurrency_group="control")
    def trace(self, on: bool) -> None:
        """Begin to keep spans, or end it."""
        if self._flow is not None:
            self._flow.spans.on = on

    @ray.method(concurrency_group="control")
    def spans(self) -> "list[Span]":
        """The spans kept since they were asked for last."""
        return [] if self._flow is None else self._flow.spans.take()

    @ray.method(concurrency_group="control")
    def progress(self) -> tuple[int, int]:
        """Bytes read so far and in all; (0, 0) before reading begins."""
        return self._progress

    def _loaded(self) -> Any:
        if self._stage is None:
            raise WorkerError(f"the worker in process {os.getpid()} has not loaded its stage yet")
        return self._stage


def _import(kind: str, spec: ModelSpec | None) -> None:
    """What loading and running need: torch, the model's code, and on a CPU compiled kernels."""
    with importing():
        from . import running  # noqa: F401

        if spec is not None:
            if kind == "cpu":
                compile_kernels(spec)
            import_model(spec)
