"""The workers of a pipeline: one for each device. Ray places, starts, watches and replaces them.

Steps and hidden states do not pass through Ray: they go from process to process over links of our own (`flow`,
`answers`), which are made when a model is loaded, and made anew when a worker was replaced.
"""

import threading
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import ray

from ..errors import CheckpointError, WorkerError
from ..load.bars import Shown
from ..options import Cluster
from ..plan.devices import Device, share_of
from ..plan.plan import Plan
from ..plan.spec import ModelSpec
from .cluster import connect, leave, pick
from .crew import ALIVE_SECONDS, Crew, get
from .doors import HELLO_SECONDS, new_secret
from .loading import Loading
from .nodes import box_with, linked_boxes
from .preflight import check_files
from .recovery import replace_lost
from .watch import Patience, patience_of

if TYPE_CHECKING:
    from ..load.fill import LoadReport
    from ..model.step import Result, Step
    from .answers import Answers
    from .spans import Span, WorkerStats
    from .stages import StageLost
    from .worker import WorkerInfo

STATS_SECONDS = 2
"""How long to wait for what workers say of themselves."""

MAX_RESTORES = 3
"""How often a pipeline is mended before it is given up, where workers go on dying meanwhile."""

UNLOAD_SECONDS = 5.0
"""How long to wait for workers to let their stages go: one that is dead or stuck is not waited for any longer."""


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
        self._crew: Crew | None = None
        self._plan: Plan | None = None
        self._patience: list[Patience] = []
        self.count = 0
        self._restarting = threading.Lock()
        self._secret, self._epoch = new_secret(), 0
        self._answers: Answers | None = None
        self._traced = False
        self._loaded: set[int] = set()  # the stages that are loaded, and those whose pages the caller thinks are filled
        self._emptied: set[int] = set()
        try:
            self._started_ray = connect(workers, cluster.address)
            if beside is None or beside._crew is None:
                self.kind, count = pick(workers, cluster.device)
                self._crew = Crew(self.kind, count, spec)
            else:
                self.kind = beside.kind
                self._crew = Crew(self.kind, len(beside._workers), spec, beside._crew)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def infos(self) -> "list[WorkerInfo]":
        return [] if self._crew is None else self._crew.infos

    @property
    def _workers(self) -> list[Any]:
        return [] if self._crew is None else self._crew.workers

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

        The checkpoint's folder must be readable on every node, with the same files. Workers beyond the plan's stages
        stay idle. Raises what the loader raises, and CheckpointError for nodes with other files; then nothing stays
        loaded.
        """
        if len(plan.stages) > len(self._workers):
            raise WorkerError(f"a plan of {len(plan.stages)} stages for {len(self._workers)} workers")
        if plan.spec.folder is None:
            raise CheckpointError(f"{plan.spec.name}: the plan names no folder with weights")
        plan = replace(plan, spec=replace(plan.spec, folder=plan.spec.folder.absolute()))
        self._plan, self.count = None, 0
        self._unload()
        self._arrange(plan)
        used = range(len(plan.stages))
        check_files(plan.spec, {self.infos[i].node: self._workers[i] for i in used})
        try:
            loading = Loading(self._started(), plan, range(len(plan.stages)), progress)
            reports = loading.finish()
            plan = loading.plan
            self._loaded = set(range(len(plan.stages)))
            self._patience = patience_of(plan)
            plan = self._linked_plan(plan, whole=True)
        except BaseException:
            self._unload()
            raise
        self._emptied.clear()
        self._plan, self.count = plan, len(plan.stages)
        return reports

    def _started(self) -> Crew:
        if self._crew is None:
            raise WorkerError("the pipeline was closed")
        return self._crew

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
        self._started().arrange([*(order[index] for index in range(len(plan.stages))), *free])

    def _unload(self) -> None:
        self._end_links()
        self._loaded, self._emptied = set(), set()
        asked = [worker.unload.remote() for worker in self._workers]
        # a load that begins before a worker has unloaded would show how far the one before it came
        ray.wait(asked, num_returns=len(asked), timeout=UNLOAD_SECONDS)

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

    def quiet(self) -> int | None:
        """A stage that has said nothing for a while, and may be lost."""
        answers = self._answers
        return None if answers is None else answers.quiet()

    def restore(self) -> list[int]:
        """Start lost stages again and make all links anew; the indices of those whose pages are empty now.

        No step is under way afterwards. Raises WorkerError where workers cannot be started or go on dying, PlanError
        where a stage fits on no device that is left.
        """
        if self._plan is None:
            return []
        with self._restarting:
            self._plan = self._linked_plan(self._plan)
            emptied, self._emptied = self._emptied, set()
        return sorted(emptied)

    def _linked_plan(self, plan: Plan, whole: bool = False) -> Plan:
        """Mend what is lost, unless it is `whole` as far as is known, and make all links anew; again if more is lost.

        The plan, where stages have moved.
        """
        hung = {} if self._answers is None else self._answers.hung
        deaths: list[str] = []
        self._end_links()
        for attempt in range(MAX_RESTORES):
            try:
                if attempt or not whole:
                    plan = self._mended(plan, hung, deaths)
                self._connect(plan)
                break
            except WorkerError as error:
                if attempt == MAX_RESTORES - 1:
                    raise WorkerError("; ".join([str(error), *deaths])) from error
        return plan

    def _mended(self, plan: Plan, hung: dict[int, str], deaths: list[str]) -> Plan:
        """Replace dead workers, and those that hang; load what is not loaded. The plan, where stages have moved.

        deaths: gets who was dead, and why
        """
        crew = self._started()
        lost = {**crew.dead(len(plan.stages), hung), **hung}
        deaths += [f"{crew.name(i)} was lost: {why}" for i, why in lost.items()]
        self._loaded -= lost.keys()
        if lost:
            plan = replace_lost(crew, plan, lost)
            hung.clear()
        missing = set(range(len(plan.stages))) - self._loaded
        self._emptied |= missing
        loading = Loading(crew, plan, missing)
        loading.finish()
        self._loaded |= missing
        return loading.plan

    def stats(self) -> "list[WorkerStats]":
        """What each stage has done so far; zeros for one that is not there at the moment."""
        from .spans import WorkerStats

        asked = [worker.stats.remote() for worker in self._workers[: self.count]]
        ready, _ = ray.wait(asked, num_returns=len(asked), timeout=STATS_SECONDS) if asked else ([], [])
        found = []
        for reference in asked:
            try:
                stats = get(reference) if reference in ready else None
            except WorkerError:
                stats = None
            found.append(stats or WorkerStats(0.0, 0, 0))
        return [replace(stats, name=name) for stats, name in zip(found, self._names(self.count), strict=False)]

    def _names(self, count: int) -> list[str]:
        """The stages, for people."""
        return [f"stage {index} on {self._started().name(index)}" for index in range(count)]

    def trace(self, on: bool) -> None:
        """Let the workers begin to keep spans, or end it; those that replace them do too."""
        self._traced = on
        get([worker.trace.remote(on) for worker in self._workers[: self.count]])

    def spans(self) -> "list[list[Span]]":
        """What each stage did since this was asked last, while it was traced."""
        return cast("list[list[Span]]", get([w.spans.remote() for w in self._workers[: self.count]]))

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
        addresses = get(asked, ALIVE_SECONDS)
        nexts = [None if place.goes_out is None else addresses[place.next] for place in places]
        asked = [w.connect.remote(self._epoch, address) for w, address in zip(workers, nexts, strict=True)]
        get(asked, 2 * HELLO_SECONDS + ALIVE_SECONDS)
        get([worker.trace.remote(self._traced) for worker in workers], ALIVE_SECONDS)
        self._answers = Answers(addresses, self._epoch, self._secret, patience=self._patience, names=self._names(count))

    def _end_links(self) -> None:
        answers, self._answers = self._answers, None
        if answers is not None:
            answers.close()

    def close(self) -> None:
        """End the workers; end the cluster, or the connection to it, that this pipeline began."""
        self._end_links()
        crew, started = self._crew, self._started_ray
        self._crew, self._plan, self._started_ray, self.count = None, None, False, 0
        if not ray.is_initialized():
            return
        try:
            if crew is not None:
                crew.close()
        finally:
            if started:
                leave()


def _in_the_same_box(one: Device, other: Device) -> bool:
    return (one.model, one.box.name) == (other.model, other.box.name)
