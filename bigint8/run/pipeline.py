"""The workers of a pipeline: one for each device. Ray places, starts, watches and replaces them.

Steps and hidden states do not pass through Ray: they go from process to process over links of our own (`flow`,
`answers`), which are made when a model is loaded, and made anew when a worker was replaced.
"""

import threading
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from ..errors import BigInt8Error, CheckpointError, WorkerDied, WorkerError
from ..load.bars import LoadProgress, Shown
from ..options import Cluster
from ..plan.devices import Device, share_of
from ..plan.plan import Plan
from ..plan.spec import ModelSpec
from .cluster import connect, leave, pick
from .cores import Share
from .doors import HELLO_SECONDS, new_secret
from .nodes import box_with, linked_boxes, measure_links
from .placement import START_SECONDS, Reserved

if TYPE_CHECKING:
    from ..load.fill import LoadReport
    from ..model.step import Result, Step
    from .answers import Answers
    from .spans import Span, WorkerStats
    from .stages import StageLost
    from .worker import WorkerInfo

ALIVE_SECONDS = 20
"""How long a worker may take to say that it is alive."""

STATS_SECONDS = 2
"""How long to wait for what workers say of themselves."""

MAX_RESTORES = 3
"""How often a pipeline is mended before it is given up, where workers go on dying meanwhile."""

UNLOAD_SECONDS = 5.0
"""How long to wait for workers to let their stages go: one that is dead or stuck is not waited for any longer."""

POLL_SECONDS = 0.05
"""How often loading workers are asked how far they are."""


class Pipeline:
    """The workers in order. Use as a context manager, or `close` it: that ends the workers and a cluster it started.

    infos: where each worker runs; count: how many stages the loaded model has, 0 before one is loaded
    """

    def __init__(
        self,
        workers: int | None = None,
        cluster: Cluster = Cluster(),  # noqa: B008  (frozen)
        spec: ModelSpec | None = None,
        beside: "Pipeline | None" = None,
    ) -> None:
        """Start `workers` actors: by default one for each GPU of the cluster, or a CPU of each node if it has none.

        By default the cluster is a new one that listens on loopback only. `spec` is that of the model they will load,
        if it is known: they prepare for it at once. With `beside`, these are as many workers on the devices of
        those, whatever else is asked for. Raises WorkerError if the cluster cannot be reached or has too few GPUs or
        CPUs.
        """
        self._started_ray = False
        self._reserved: Reserved | None = None
        self._beside: list[str | None] = []  # where these are second workers: the GPU of each place
        self._workers: list[Any] = []
        self._plan: Plan | None = None
        self.count = 0
        self._restarting = threading.Lock()
        self._spec = spec
        self._secret, self._epoch = new_secret(), 0
        self._answers: Answers | None = None
        self._traced = False
        self._loaded: set[int] = set()  # the stages that are loaded, and those whose pages the caller thinks are filled
        self._emptied: set[int] = set()
        self.infos: list[WorkerInfo] = []
        try:
            self._started_ray = connect(workers, cluster.address)
            if beside is None or beside._reserved is None:
                self.kind, count = pick(workers, cluster.device)
                self._reserved = Reserved(self.kind, count)
            else:
                self.kind, self._reserved = beside.kind, beside._reserved.share()
                gpus = dict(zip(beside._bundles, (info.gpu_id for info in beside.infos), strict=True))
                self._beside = [gpus[place] for place in range(self._reserved.count)]
            self._start_workers(self._reserved)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_workers(self, reserved: Reserved) -> None:
        count = reserved.count
        # before the workers import what they need, which would be measured with the links
        measure_links(reserved.nodes())
        self._workers = [self._new_worker(i) for i in range(count)]
        infos = self._get([worker.describe.remote() for worker in self._workers], START_SECONDS)
        order = sorted(range(count), key=lambda i: (infos[i].host, infos[i].node, infos[i].gpu, i))
        self._bundles = order  # neighbours share a box
        self._workers = [self._workers[i] for i in order]
        self.infos = [infos[i] for i in order]

    def _new_worker(self, bundle: int) -> Any:
        from .worker import Worker

        assert self._reserved is not None
        options = self._reserved.options(bundle, shared=bool(self._beside))
        actor = ray.remote(concurrency_groups={"control": 1})(Worker).options(**options)
        return actor.remote(self.kind, self._spec, self._beside[bundle] if self._beside else None)

    def devices(self) -> list[Device]:
        """A device for each worker, in order; CPU workers of one box share its memory equally.

        Workers of one node are in one box, with what its own memory and disk may hold of weights that no GPU holds, and
        with its link as measured; GPUs are numbered as Ray does there. Raises WorkerError for nodes that do not reach
        each other.
        """
        workers, on_gpus = Counter(info.node for info in self.infos), self.kind == "cuda"
        boxes = linked_boxes((info.node, info.host) for info in self.infos)
        for info in {info.node: info for info in reversed(self.infos)}.values():
            gpus = workers[info.node] if on_gpus else 0
            boxes[info.node] = box_with(boxes[info.node], info.host_bytes, info.disk_bytes, gpus)
        return [
            replace(info.device, name=f"cuda:{info.gpu}", box=boxes[info.node])
            if on_gpus
            else replace(
                info.device,
                usable_bytes=share_of(info.device.usable_bytes, workers[info.node]),
                box=boxes[info.node],
            )
            for info in self.infos
        ]

    def load(self, plan: Plan, progress: Shown = True) -> "list[LoadReport]":
        """Load every stage of the plan, in parallel, each worker its own byte ranges.

        progress: whether to show it, or who is told of it (`load.bars.Watch`)

        The checkpoint's folder must be readable on every node. Workers beyond the plan's stages stay idle. Raises what
        the loader raises; then nothing stays loaded.
        """
        if len(plan.stages) > len(self._workers):
            raise WorkerError(f"a plan of {len(plan.stages)} stages for {len(self._workers)} workers")
        if plan.spec.folder is None:
            raise CheckpointError(f"{plan.spec.name}: the plan names no folder with weights")
        plan = replace(plan, spec=replace(plan.spec, folder=plan.spec.folder.absolute()))
        self._plan, self.count = None, 0
        self._unload()
        self._arrange(plan)
        try:
            reports = self._watch([self._start_load(plan, i) for i in range(len(plan.stages))], progress)
            self._loaded = set(range(len(plan.stages)))
            self._connect(plan)
        except BaseException:
            self._unload()
            raise
        self._plan, self.count = plan, len(plan.stages)
        return reports

    def _arrange(self, plan: Plan) -> None:
        """Put the workers in the order of the stages: each stage goes to the worker whose device the plan names.

        A device that no worker has, as of a plan that another process made, is one of its model, in a box of that name
        if there is one; or any.
        """
        devices, free = self.devices(), list(range(len(self._workers)))
        order: dict[int, int] = {}
        for alike in (Device.__eq__, _in_the_same_box, lambda a, b: a.model == b.model, lambda a, b: True):
            for index, stage in enumerate(plan.stages):
                found = next((i for i in free if index not in order and alike(devices[i], stage.device)), None)
                if found is not None:
                    order[index] = found
                    free.remove(found)
        arranged = [*(order[index] for index in range(len(plan.stages))), *free]
        self._workers = [self._workers[i] for i in arranged]
        self._bundles = [self._bundles[i] for i in arranged]
        self.infos = [self.infos[i] for i in arranged]

    def _start_load(self, plan: Plan, index: int) -> Any:
        """Let a worker load its stage. CPU workers of one box share its cores."""
        share = Share()
        if self.kind == "cpu":
            nodes = [info.node for info in self.infos[: len(plan.stages)]]
            share = Share(nodes[:index].count(nodes[index]), nodes.count(nodes[index]))
        return self._workers[index].load.remote(plan, index, share)

    def _unload(self) -> None:
        self._end_links()
        self._loaded, self._emptied = set(), set()
        asked = [worker.unload.remote() for worker in self._workers]
        # a load that begins before a worker has unloaded would show how far the one before it came
        ray.wait(asked, num_returns=len(asked), timeout=UNLOAD_SECONDS)

    def _watch(self, loads: list[Any], progress: Shown) -> "list[LoadReport]":
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

    # --- links and steps ---

    def send(self, step: "Step") -> None:
        """Send a step on its way; returns at once. Raises WorkerError, as `Answers.send` does."""
        self._linked().send(step)

    def receive(self, timeout: float) -> "Result":
        """The result of the oldest step under way. Raises StageLost, WorkerError, as `Answers.receive` does."""
        return self._linked().receive(timeout)

    def lost(self) -> "StageLost | None":
        """The stage that was lost first since links were made."""
        answers = self._answers
        return None if answers is None else answers.lost()

    def restore(self) -> list[int]:
        """Start lost stages again and make all links anew; the indices of those whose pages are empty now.

        No step is under way afterwards. Raises WorkerError where workers cannot be started or go on dying.
        """
        if self._plan is None:
            return []
        with self._restarting:
            self._end_links()
            for attempt in range(MAX_RESTORES):
                try:
                    self._replace_dead(self._plan)
                    self._connect(self._plan)
                    break
                except WorkerError:
                    if attempt == MAX_RESTORES - 1:
                        raise
            emptied, self._emptied = self._emptied, set()
        return sorted(emptied)

    def stats(self) -> "list[WorkerStats]":
        """What each stage has done so far; zeros for one that is not there at the moment."""
        from .spans import WorkerStats

        asked = [worker.stats.remote() for worker in self._workers[: self.count]]
        ready, _ = ray.wait(asked, num_returns=len(asked), timeout=STATS_SECONDS) if asked else ([], [])
        found = []
        for reference in asked:
            try:
                stats = self._get(reference) if reference in ready else None
            except WorkerError:
                stats = None
            found.append(stats or WorkerStats(0.0, 0, 0))
        return found

    def trace(self, on: bool) -> None:
        """Let the workers begin to keep spans, or end it; those that replace them do too."""
        self._traced = on
        self._get([worker.trace.remote(on) for worker in self._workers[: self.count]])

    def spans(self) -> "list[list[Span]]":
        """What each stage did since this was asked last, while it was traced."""
        return cast("list[list[Span]]", self._get([w.spans.remote() for w in self._workers[: self.count]]))

    def _linked(self) -> "Answers":
        if self._answers is None:
            raise WorkerError("no model is loaded on the workers; Pipeline.load comes first")
        return self._answers

    def _connect(self, plan: Plan) -> None:
        """Make all links anew, under the next epoch. Raises WorkerError."""
        from .answers import Answers
        from .flow import Place

        self._end_links()
        self._epoch += 1
        count = len(plan.stages)
        workers, ring = self._workers[:count], plan.spec.tied and count > 1
        here = ray.get_runtime_context().get_node_id()
        one_box = all(info.node == here for info in self.infos[:count])
        places = [Place(i, count, ring) for i in range(count)]
        asked = [w.listen.remote(place, one_box, self._secret) for w, place in zip(workers, places, strict=True)]
        addresses = self._get(asked, ALIVE_SECONDS)
        nexts = [None if place.goes_out is None else addresses[place.next] for place in places]
        asked = [w.connect.remote(self._epoch, address) for w, address in zip(workers, nexts, strict=True)]
        self._get(asked, 2 * HELLO_SECONDS + ALIVE_SECONDS)
        self._get([worker.trace.remote(self._traced) for worker in workers], ALIVE_SECONDS)
        self._answers = Answers(addresses, self._epoch, self._secret)

    def _end_links(self) -> None:
        answers, self._answers = self._answers, None
        if answers is not None:
            answers.close()

    def _replace_dead(self, plan: Plan) -> None:
        """Start dead workers again, and load the stages that are not loaded. Raises WorkerError."""
        alive = [worker.progress.remote() for worker in self._workers]
        dead = []
        for i, reference in enumerate(alive):
            try:
                ray.get(reference, timeout=ALIVE_SECONDS)
            except (RayActorError, GetTimeoutError):
                dead.append(i)
        for i in dead:
            ray.kill(self._workers[i])
            self._loaded.discard(i)
            self._workers[i] = self._new_worker(self._bundles[i])
        infos = self._get([self._workers[i].describe.remote() for i in dead], START_SECONDS)
        for i, info in zip(dead, infos, strict=True):
            self.infos[i] = info
        lost = [i for i in range(len(plan.stages)) if i not in self._loaded]
        self._emptied.update(lost)
        self._get([self._start_load(plan, i) for i in lost])
        self._loaded.update(lost)

    def _get(self, references: Any, timeout: float | None = None) -> Any:
        """`ray.get` with the errors of the interface: those of bigint8 as they were raised, others as WorkerError."""
        try:
            return ray.get(references, timeout=timeout)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, BigInt8Error):
                raise cause from None
            raise WorkerError(f"a worker failed: {type(cause).__name__}: {cause}") from error
        except GetTimeoutError:
            raise WorkerError(f"a worker did not answer within {timeout:.0f} s; ray status shows the cluster") from None
        except RayError as error:
            raise WorkerDied(f"a worker died, or its box went away: {error}") from error

    def close(self) -> None:
        """End the workers; end the cluster, or the connection to it, that this pipeline began."""
        self._end_links()
        workers, reserved, started = self._workers, self._reserved, self._started_ray
        self._workers, self._reserved, self._plan, self._started_ray = [], None, None, False
        self.count = 0
        if not ray.is_initialized():
            return
        try:
            for worker in workers:
                ray.kill(worker)
            if reserved is not None:
                reserved.free()
        finally:
            if started:
                leave()


def _in_the_same_box(one: Device, other: Device) -> bool:
    return (one.model, one.box.name) == (other.model, other.box.name)
