"""The pipeline over Ray: a worker for each device, started, loaded, fed and replaced when it dies.

A step of the model is a chain of actor calls, each given the reference of the one before: hidden states go from worker
to worker, and the driver sees only token ids and logits. Where the head is tied to the embeddings, the last hidden
state returns to the first worker, which has them (a ring).
"""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ray
from ray._private import ray_constants
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor
from transformers import AutoConfig

from .config import Int8Config
from .driver import PipelineCache, PipelineModel
from .errors import BigInt8Error, WorkerDied, WorkerError
from .hardware import Device, DeviceKind
from .loader import LoadReport, read_generation_config
from .planner import Plan
from .progress import LoadProgress
from .worker import CacheKey, Worker, WorkerInfo, pack, unpack

START_SECONDS = 180
"""How long a cluster may take to give us workers."""

POLL_SECONDS = 0.1
"""How often loading workers are asked how far they are."""

OBJECT_STORE_BYTES = 2**30
"""Of a cluster that we start: only hidden states and logits pass through it."""


class Pipeline:
    """The workers in order. Use as a context manager, or `close` it: that ends the workers and a cluster it started."""

    def __init__(self, workers: int | None = None, device: DeviceKind = "auto", address: str | None = None) -> None:
        """Start `workers` actors on the cluster at `address`, or on one of their own that listens on loopback only.

        By default as many as the cluster has GPUs, or one on a CPU. Raises WorkerError if the cluster cannot be
        reached or has too few GPUs or CPUs.
        """
        self._started_ray = False
        self._group: Any = None
        self._workers: list[Any] = []
        self._load: Callable[[int], Any] | None = None
        self._stages = self.generation = 0  # stages loaded, and how many models were loaded so far
        self._ids = itertools.count()
        self._restarting = threading.Lock()  # sequences in several threads may see the same worker die
        self.infos: list[WorkerInfo] = []
        try:
            self._connect(workers, address)
            self.kind, count = self._pick(workers, device)
            self._start_workers(count)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self, workers: int | None, address: str | None) -> None:
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if address is not None:
                ray.init(address=address, **quiet)
            else:
                # The plan has counted the memory: Ray's watchdog would only kill workers where it is nearly full. And
                # the workers are what this machine is to do, so they run at the priority of the driver.
                os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
                os.environ.setdefault("RAY_worker_niceness", "0")
                with _loopback_only():
                    ray.init(
                        address="local",
                        num_cpus=max(workers or 1, os.cpu_count() or 1),
                        object_store_memory=OBJECT_STORE_BYTES,
                        include_dashboard=False,
                        **quiet,
                    )
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            where = f"the Ray cluster at {address}" if address else "a local Ray cluster"
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise WorkerError(f"--address: {where} cannot be reached or started: {reason}") from error
        self._started_ray = True

    def _pick(self, workers: int | None, device: DeviceKind) -> tuple[str, int]:
        """The kind of device and the number of workers."""
        there = ray.cluster_resources()
        gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 0))
        kind = device if device != "auto" else ("cuda" if gpus else "cpu")
        workers = workers or (gpus if kind == "cuda" and gpus else 1)
        if kind == "cuda" and gpus < workers:
            raise WorkerError(f"--gpus {workers}: the cluster has {gpus} GPUs; name at most that many, or --device cpu")
        if kind == "cpu" and cpus < workers:
            raise WorkerError(f"--gpus {workers}: the cluster has {cpus} CPUs for CPU workers; name at most that many")
        return kind, workers

    def _start_workers(self, count: int) -> None:
        bundle = {"CPU": 1, "GPU": 1} if self.kind == "cuda" else {"CPU": 1}
        self._group = placement_group([bundle] * count, strategy="PACK")
        if not self._group.wait(START_SECONDS):
            raise WorkerError(
                f"the cluster gave no place for {count} x {bundle} within {START_SECONDS} s; other jobs may hold it "
                "(ray status shows them)"
            )
        self._workers = [self._new_worker(i) for i in range(count)]
        infos = self._get([worker.describe.remote() for worker in self._workers], START_SECONDS)
        order = sorted(range(count), key=lambda i: (infos[i].node, infos[i].device.name, i))  # neighbours share a box
        self._bundles = order
        self._workers = [self._workers[i] for i in order]
        self.infos = [infos[i] for i in order]

    def _new_worker(self, bundle: int) -> Any:
        actor = ray.remote(concurrency_groups={"control": 1})(Worker).options(
            num_cpus=1,
            num_gpus=1 if self.kind == "cuda" else 0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=bundle
            ),
        )
        return actor.remote(self.kind)

    def devices(self) -> list[Device]:
        """A device for each worker, in order; CPU workers of one box share its memory equally."""
        nodes = [info.node for info in self.infos]
        return [
            info.device
            if info.device.kind == "cuda"
            else replace(info.device, usable_bytes=info.device.usable_bytes // nodes.count(info.node))
            for info in self.infos
        ]

    def load(
        self,
        folder: str | os.PathLike[str],
        plan: Plan,
        config: Int8Config | None = None,
        progress: bool = True,
        trust_remote_code: bool = False,
    ) -> list[LoadReport]:
        """Load every stage of the plan, in parallel, each worker its own byte ranges.

        The folder must be readable on every node. Workers beyond the plan's stages stay idle. Raises what the loader
        raises; then nothing stays loaded.
        """
        if len(plan.stages) > len(self._workers):
            raise WorkerError(f"a plan of {len(plan.stages)} stages for {len(self._workers)} workers")
        settings = config or Int8Config()

        def start(index: int) -> Any:
            stage = plan.stages[index]
            return self._workers[index].load.remote(
                str(Path(folder).absolute()),
                stage.first_block,
                stage.last_block,
                self.infos[index].device.name,
                settings,
                plan.dtype,
                trust_remote_code,
            )

        self._load, self._stages, self.generation = None, 0, self.generation + 1
        for worker in self._workers:
            worker.unload.remote()
        try:
            reports = self._watch([start(i) for i in range(len(plan.stages))], progress)
        except BaseException:
            for worker in self._workers:
                worker.unload.remote()
            raise
        self._load, self._stages = start, len(plan.stages)
        return reports

    def _watch(self, loads: list[Any], progress: bool) -> list[LoadReport]:
        """Show how far the workers are until all are done, or the first has failed."""
        workers = list(zip(self._workers, self.infos, strict=True))[: len(loads)]
        names = [f"worker {i} ({info.host}, {info.device.name})" for i, (_, info) in enumerate(workers)]
        with LoadProgress(names, enabled=progress) as bars:
            waiting = loads
            while waiting:
                ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
                self._get(ready)
                asked = [worker.progress.remote() for worker, _ in workers]
                for i, (done, total) in enumerate(self._get(asked)):
                    if total:
                        bars.update(i, done, total)
        return cast(list[LoadReport], self._get(loads))

    def model(self, folder: str | os.PathLike[str], plan: Plan, trust_remote_code: bool = False) -> PipelineModel:
        """The transformers model that runs on the workers; `load` comes first."""
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model = PipelineModel(hf_config, self, plan, self.generation)
        generation_config = read_generation_config(Path(folder))
        if generation_config is not None:
            model.generation_config = generation_config
        return model

    def step(
        self,
        inputs: Tensor,
        cache: PipelineCache | None,
        mask: Tensor | None,
        positions: Tensor | None,
        keep: int | Tensor,
        tied: bool,
    ) -> Tensor:
        """Token ids (batch, tokens) through all stages: logits (batch, kept tokens, vocabulary)."""
        if not self._stages:
            raise WorkerError("no model is loaded on the workers; Pipeline.load comes first")
        packed_mask, packed_positions = pack(mask), pack(positions)
        kept = pack(keep) if isinstance(keep, Tensor) else keep
        key = None if cache is None else CacheKey(cache.id, cache.started, tuple(cache.edits))
        last = self._stages - 1
        hidden: Any = pack(inputs)
        for i, worker in enumerate(self._workers[: self._stages]):
            hidden = worker.forward.remote(hidden, key, packed_mask, packed_positions, kept if i == last else None)
        if tied and last > 0:
            hidden = self._workers[0].head.remote(hidden)
        return cast(Tensor, unpack(self._get(hidden), "cpu"))

    def new_cache_id(self) -> int:
        """An id under which the workers keep the keys and values of one batch of sequences."""
        return next(self._ids)

    def drop(self, cache_id: int) -> None:
        """Let the workers forget a batch of sequences."""
        if ray.is_initialized():
            for worker in self._workers:
                worker.drop.remote(cache_id)

    def restart_dead(self) -> list[int]:
        """Start each dead worker again and load its stage; returns their indices. Other workers keep theirs."""
        if self._load is None:
            return []
        with self._restarting:
            return self._restart_dead(self._load)

    def _restart_dead(self, load: Callable[[int], Any]) -> list[int]:
        alive = [worker.progress.remote() for worker in self._workers]
        dead = []
        for i, reference in enumerate(alive):
            try:
                ray.get(reference, timeout=START_SECONDS)
            except (RayActorError, GetTimeoutError):
                dead.append(i)
        for i in dead:
            ray.kill(self._workers[i])
            self._workers[i] = self._new_worker(self._bundles[i])
        infos = self._get([self._workers[i].describe.remote() for i in dead], START_SECONDS)
        for i, info in zip(dead, infos, strict=True):
            self.infos[i] = info
        self._get([load(i) for i in dead if i < self._stages])
        return dead

    def _get(self, references: Any, timeout: float | None = None) -> Any:
        """`ray.get` with the errors of the interface: those of bigint8 as they were raised, others as WorkerError."""
        try:
            return ray.get(references, timeout=timeout)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, BigInt8Error):
                raise cause from None
            if isinstance(cause, RayActorError):  # of the worker before this one in a step
                raise WorkerDied(str(cause)) from error
            raise WorkerError(f"a worker failed: {type(cause).__name__}: {cause}") from error
        except GetTimeoutError:
            raise WorkerError(f"a worker did not answer within {timeout:.0f} s; ray status shows the cluster") from None
        except RayError as error:
            raise WorkerDied(f"a worker died, or its box went away: {error}") from error

    def close(self) -> None:
        """End the workers; end the cluster, or the connection to it, that this pipeline began."""
        if ray.is_initialized():
            for worker in self._workers:
                ray.kill(worker)
            if self._group is not None:
                remove_placement_group(self._group)
            if self._started_ray:
                ray.shutdown()
        self._workers, self._group, self._load, self._stages = [], None, None, 0


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """A Ray started in here listens on 127.0.0.1 only.

    Ray does that by itself on Windows and macOS, where this variable turns it off; on Linux it replaces a loopback
    address that it is given by one that others can reach, so the same switch is the only way.
    """
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    environment = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(name)
        if environment is not None:
            os.environ[name] = environment
