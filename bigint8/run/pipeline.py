"""The workers of a pipeline over Ray: one for each device, started, loaded, fed and replaced when it dies.

A step of the model is a chain of actor calls, each given the reference of the one before: hidden states go from worker
to worker, and the driver sees only token ids and logits. Where the head is tied to the embeddings, the last hidden
state returns to the first worker, which has them (a ring).
"""

import itertools
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..errors import BigInt8Error, CheckpointError, WorkerDied, WorkerError
from ..load.bars import LoadProgress
from ..options import Cluster
from ..plan.devices import Device, share_of
from ..plan.plan import Plan
from ..plan.spec import ModelSpec
from .cluster import connect, pick

if TYPE_CHECKING:
    from torch import Tensor

    from ..load.fill import LoadReport
    from .wire import CacheKey
    from .worker import WorkerInfo

START_SECONDS = 180
"""How long a cluster may take to give us workers."""

POLL_SECONDS = 0.05
"""How often loading workers are asked how far they are."""


class Pipeline:
    """The workers in order. Use as a context manager, or `close` it: that ends the workers and a cluster it started."""

    def __init__(
        self,
        workers: int | None = None,
        cluster: Cluster = Cluster(),  # noqa: B008  (frozen)
        spec: ModelSpec | None = None,
    ) -> None:
        """Start `workers` actors: by default one for each GPU of the cluster, or one on a CPU if it has none.

        By default the cluster is a new one that listens on loopback only. `spec` is that of the model they will load,
        if it is known: they prepare for it at once. Raises WorkerError if the cluster cannot be reached or has too few
        GPUs or CPUs.
        """
        self._started_ray = False
        self._group: Any = None
        self._workers: list[Any] = []
        self._plan: Plan | None = None
        self.loads = 0
        self._ids = itertools.count()
        self._restarting = threading.Lock()  # sequences in several threads may see the same worker die
        self._spec = spec
        self.infos: list[WorkerInfo] = []
        try:
            self._started_ray = connect(workers, cluster.address)
            self.kind, count = pick(workers, cluster.device)
            self._start_workers(count)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        order = sorted(range(count), key=lambda i: (infos[i].node, infos[i].gpu, i))  # neighbours share a box
        self._bundles = order
        self._workers = [self._workers[i] for i in order]
        self.infos = [infos[i] for i in order]

    def _new_worker(self, bundle: int) -> Any:
        from .worker import Worker

        actor = ray.remote(concurrency_groups={"control": 1})(Worker).options(
            num_cpus=1,
            num_gpus=1 if self.kind == "cuda" else 0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=bundle
            ),
        )
        return actor.remote(self.kind, self._spec)

    def devices(self) -> list[Device]:
        """A device for each worker, in order; CPU workers of one box share its memory equally."""
        nodes = [info.node for info in self.infos]
        return [
            info.device
            if info.device.kind == "cuda"
            else replace(info.device, usable_bytes=share_of(info.device.usable_bytes, nodes.count(info.node)))
            for info in self.infos
        ]

    def load(self, plan: Plan, progress: bool = True) -> "list[LoadReport]":
        """Load every stage of the plan, in parallel, each worker its own byte ranges.

        The checkpoint's folder must be readable on every node. Workers beyond the plan's stages stay idle. Raises what
        the loader raises; then nothing stays loaded.
        """
        if len(plan.stages) > len(self._workers):
            raise WorkerError(f"a plan of {len(plan.stages)} stages for {len(self._workers)} workers")
        if plan.spec.folder is None:
            raise CheckpointError(f"{plan.spec.name}: the plan names no folder with weights")
        plan = replace(plan, spec=replace(plan.spec, folder=plan.spec.folder.absolute()))
        self._plan, self.loads = None, self.loads + 1
        self._unload()
        try:
            reports = self._watch([self._workers[i].load.remote(plan, i) for i in range(len(plan.stages))], progress)
        except BaseException:
            self._unload()
            raise
        self._plan = plan
        return reports

    def _unload(self) -> None:
        for worker in self._workers:
            worker.unload.remote()

    def _watch(self, loads: list[Any], progress: bool) -> "list[LoadReport]":
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
        return cast("list[LoadReport]", self._get(loads))

    def step(
        self,
        inputs: "Tensor",
        key: "CacheKey | None",
        mask: "Tensor | None",
        positions: "Tensor | None",
        keep: "int | Tensor",
    ) -> "Tensor":
        """Token ids (batch, tokens) through all stages: logits (batch, kept tokens, vocabulary)."""
        from .wire import pack, unpack  # needs torch, which nothing before a step needs

        if self._plan is None:
            raise WorkerError("no model is loaded on the workers; Pipeline.load comes first")
        packed_mask, packed_positions = pack(mask), pack(positions)
        kept = keep if isinstance(keep, int) else pack(keep)
        last = len(self._plan.stages) - 1
        hidden: Any = pack(inputs)
        for i, worker in enumerate(self._workers[: last + 1]):
            hidden = worker.forward.remote(hidden, key, packed_mask, packed_positions, kept if i == last else None)
        if self._plan.spec.tied and last > 0:
            hidden = self._workers[0].head.remote(hidden)
        return cast("Tensor", unpack(self._get(hidden), "cpu"))

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
        if self._plan is None:
            return []
        with self._restarting:
            return self._restart_dead(self._plan)

    def _restart_dead(self, plan: Plan) -> list[int]:
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
        self._get([self._workers[i].load.remote(plan, i) for i in dead if i < len(plan.stages)])
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
        workers, group, started = self._workers, self._group, self._started_ray
        self._workers, self._group, self._plan, self._started_ray = [], None, None, False
        if not ray.is_initialized():
            return
        try:
            for worker in workers:
                ray.kill(worker)
            if group is not None:
                remove_placement_group(group)
        finally:
            if started:
                ray.shutdown()
