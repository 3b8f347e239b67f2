"""Another model, or the same one anew, loaded beside the one that is served, and served in its place.

A request asks for it; one thread does it (`Loads.work`). The plan comes first: what the devices have left beside the
running model. Until the new model is loaded whole, nothing else changes; a load that fails leaves all as it was. Then
new requests go to the new model at once; those under way end on the old one, whose memory is given back after the last.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import BigInt8Error, CheckpointError, PlanError, in_one_line
from ..model_pipeline import ModelPipeline, give_memory_back
from ..plan.plan import Plan
from ..plan.ways_out import WaysOut
from .errors import ApiError, of_bigint8
from .schemas import LoadRequest
from .state import POLL_SECONDS, Model, State

Opener = Callable[[LoadRequest, ModelPipeline], ModelPipeline]
"""Plans the model that is asked for beside the one that runs. Raises BigInt8Error."""


class NoRoom(ApiError):
    """A model that does not fit beside the running one: with the numbers, and what would make it fit."""

    def __init__(self, message: str, found: WaysOut) -> None:
        super().__init__(409, message, "model", "no_room")
        self._found = found

    def body(self) -> dict[str, Any]:
        """The error, and beside it the plan that comes nearest to fitting."""
        found = self._found
        names = ("needed_bytes", "there_bytes", "short_bytes")
        numbers = {name: getattr(found, name) for name in names}
        ways = [{"change": way.change, "text": way.text} for way in found.ways]
        return {**super().body(), "plan": {**numbers, "stages": stages_of(found.closest), "ways_out": ways}}


def stages_of(plan: Plan) -> list[dict[str, Any]]:
    """The stages of a plan, as they are told."""
    return [
        {
            "device": stage.device.name, "box": stage.device.box.name, "first_block": stage.first_block,
            "last_block": stage.last_block, "needed_bytes": stage.needed_bytes,
            "usable_bytes": stage.device.usable_bytes,
        }
        for stage in plan.stages
    ]  # fmt: skip


@dataclass(eq=False)
class Load:
    """One load. `planned`: done when it is known whether the model fits.

    status: how far it is; "draining": the new model is served, and requests still end on the old one
    read: bytes read and in all, of each stage
    """

    request: LoadRequest
    name: str
    status: Literal["planning", "loading", "draining", "done", "failed"] = "planning"
    error: str | None = None
    plan: Plan | None = None
    read: dict[int, tuple[int, int]] = field(default_factory=dict)
    old: Model | None = None
    began: float = field(default_factory=time.monotonic)
    seconds: float | None = None
    planned: "Future[None]" = field(default_factory=Future)

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is left to do."""
        return self.status in ("done", "failed")

    def watch(self, stage: int, done_bytes: int, total_bytes: int) -> None:
        """A stage has read so much."""
        self.read[stage] = done_bytes, total_bytes

    def end(self, status: Literal["done", "failed"], error: str | None = None) -> None:
        """It is over."""
        self.status, self.error, self.seconds = status, error, time.monotonic() - self.began


class Loads:
    """The model that is served, as a pipeline, and what is loaded beside it. `close` ends whatever is there.

    say: is told, in a line, what happens
    """

    def __init__(self, state: State, opener: Opener, say: Callable[[str], None] = lambda line: None) -> None:
        self._state, self._opener, self._say = state, opener, say
        self._asked = threading.Condition()
        self._load: Load | None = None
        self._source = ""
        self._pipelines: list[ModelPipeline] = []  # the one that is served last, and one that comes or goes

    def begin(self, pipeline: ModelPipeline, source: str) -> None:
        """The first model is loaded. `source`: what it was found by."""
        self._source = source
        self._pipelines = [pipeline]

    # --- for those who ask ---

    def ask(self, request: LoadRequest) -> Load:
        """Ask for a model. Its `planned` fails with what is wrong. Raises ApiError while another load is not over."""
        self._state.check_ready()
        with self._asked:
            if self._load is not None and not self._load.is_over:
                message = f"{self._load.name} is under way ({self._load.status}); GET /admin/load says how far it is"
                raise ApiError(409, message, "model", "load_under_way")
            name = request.name or (self._state.name if request.model == self._source else request.model)
            self._load = load = Load(request, name)
            self._asked.notify()
        return load

    @property
    def coming(self) -> str | None:
        """The name of a model that is loaded now and not served yet."""
        load = self._load
        return load.name if load is not None and load.status in ("planning", "loading") else None

    def glance(self) -> dict[str, Any]:
        """What anyone may know of the load that was asked for last: nothing of where it is loaded from."""
        load = self._load
        if load is None:
            return {"status": "none"}
        read, total = (sum(each[i] for each in load.read.values()) for i in (0, 1))
        return {"status": load.status, "name": load.name, "read_bytes": read, "total_bytes": total}

    def told(self) -> dict[str, Any]:
        """How far the load is that was asked for last."""
        load = self._load
        if load is None:
            return {"status": "none"}
        said: dict[str, Any] = {"status": load.status, "model": load.request.model, "name": load.name}
        if load.plan is not None:
            stages = stages_of(load.plan)
            for index, stage in enumerate(stages):
                stage["read_bytes"], stage["total_bytes"] = load.read.get(index, (0, 0))
            said |= {"context": load.plan.workload.context, "dtype": load.plan.dtype, "stages": stages}
        if load.old is not None and load.status == "draining":
            said |= {"old": load.old.name, "old_requests": self._state.holds(load.old)}
        if load.error is not None:
            said["error"] = load.error
        seconds = load.seconds if load.seconds is not None else time.monotonic() - load.began
        return {**said, "seconds": round(seconds, 3)}

    # --- for the thread that does it ---

    def work(self, seconds: float) -> None:
        """Do the load that is asked for, if one is within so many seconds. Whatever fails is told, not raised."""
        with self._asked:
            if not self._asked.wait_for(lambda: self._load is not None and not self._load.is_over, seconds):
                return
            load = self._load
        assert load is not None
        try:
            self._do(load)
        except BaseException as error:
            self._fail(load, error)
            if not isinstance(error, Exception):
                raise

    def _do(self, load: Load) -> None:
        running = self._pipelines[-1]
        new = self._opener(load.request, running)
        self._pipelines.insert(0, new)
        new.read_text()  # what is wrong with a tokenizer is told before the load
        load.plan, load.status = new.plan, "loading"
        load.planned.set_result(None)
        self._say(f"loading {load.name} beside {self._state.name}")
        new.load(load.watch)
        self._switch(load, running, new)
        del running
        give_memory_back()
        load.end("done")
        self._state.loads["done"] += 1

    def _switch(self, load: Load, running: ModelPipeline, new: ModelPipeline) -> None:
        """Serve the new model; unload the old one when its last request is through."""
        model, old = Model.of(new, load.name), self._state.model
        assert old is not None
        load.old, load.status = old, "draining"
        self._pipelines = [running, new]
        self._source = load.request.model
        self._state.switch(model)
        self._say(f"serving {load.name}; {self._state.holds(old)} requests end on the model before it")
        while self._state.holds(old):
            time.sleep(POLL_SECONDS)
        self._state.retire(old)
        load.old = None
        running.close()
        self._pipelines.remove(running)

    def _fail(self, load: Load, error: BaseException) -> None:
        """Leave all as it was. What is already served stays so."""
        if load.status != "draining":
            for unfinished in self._pipelines[:-1]:
                self._pipelines.remove(unfinished)
                unfinished.close()
            give_memory_back()
        refused = load.plan is None
        load.end("failed", in_one_line(error))
        self._state.loads["refused" if refused else "failed"] += 1
        self._say(f"{load.name} was not loaded: {in_one_line(error)}")
        if not load.planned.done():  # last, so that who hears of it finds all as it was
            load.planned.set_exception(_told(error, self._state.name))

    def close(self) -> None:
        """End all models. Requests that run fail."""
        pipelines, self._pipelines = self._pipelines, []
        for pipeline in pipelines:
            pipeline.close()


def _told(error: BaseException, running: str) -> ApiError:
    """What whoever asked is told of a model that cannot be loaded, before anything was."""
    if isinstance(error, PlanError) and isinstance(error.ways_out, WaysOut):
        return NoRoom(f"beside {running}, which goes on meanwhile: {error}", error.ways_out)
    if isinstance(error, CheckpointError):
        return ApiError(400, str(error), "model", "no_such_checkpoint")
    if isinstance(error, BigInt8Error):
        return of_bigint8(error)
    if isinstance(error, Exception):
        return ApiError(500, f"the model cannot be loaded: {in_one_line(error)}")
    return ApiError(503, "the service is about to end", code="draining")
