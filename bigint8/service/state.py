"""What the service is doing: loading, ready, or ending; the models that it has; which requests run on which."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import BigInt8Error
from ..model_pipeline import ModelPipeline
from ..plan.plan import Plan
from ..run.engine import Engine
from ..run.text import Text
from .errors import ApiError

POLL_SECONDS = 0.05
"""How often a service that drains looks whether requests still run."""


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model. `name`: as clients ask for it; `created`: when it was loaded, in seconds since 1970.

    ends: the tokens that end an answer; vocabulary: how many tokens it knows
    """

    name: str
    engine: Engine
    text: Text
    plan: Plan
    ends: frozenset[int]
    vocabulary: int
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer together."""
        return self.plan.workload.context

    @classmethod
    def of(cls, pipeline: ModelPipeline, name: str) -> "Model":
        """The model of a loaded pipeline. Raises BigInt8Error where it takes no requests, or has no tokenizer."""
        if pipeline.engine is None:
            raise BigInt8Error(
                f"{pipeline.found.spec.name} cannot be served: its blocks run through transformers' own modules, one "
                "batch at a time; give it devices that hold all of it, or a family that bigint8 knows"
            )
        text, config = pipeline.text, pipeline.model.config.get_text_config()
        ends = frozenset(text.ends(pipeline.model.generation_config))
        return cls(name, pipeline.engine, text, pipeline.plan, ends, config.vocab_size)


class Hold:
    """A request's hold on the model that answers it, which is not unloaded meanwhile; None until it asks for one."""

    model: Model | None = None


@dataclass(frozen=True)
class Counted:
    """What a service's numbers add up from: the models that it has, the newest first, and what those did that are gone.

    tokens, restarts: of the engines of models that were unloaded
    """

    models: tuple[Model, ...]
    tokens: int
    restarts: int


class State:
    """The service's own state. Every method may be called from any thread.

    loads: how often a model was asked for while another one was served, by how that ended
    """

    def __init__(self, name: str) -> None:
        """name: of the first model, as clients ask for it."""
        self.phase: Literal["loading", "ready", "draining"] = "loading"
        self.running = 0
        self.loads: Counter[str] = Counter()
        self._first_name, self._began = name, int(time.time())
        self._models: list[Model] = []  # the one that new requests go to, then those that only end theirs
        self._holds: Counter[Model] = Counter()
        self._tokens = self._restarts = 0
        self._lock = threading.Lock()

    # --- models ---

    def open(self, model: Model) -> None:
        """The first model is loaded: take requests."""
        self.switch(model)
        with self._lock:
            if self.phase == "loading":
                self.phase = "ready"

    def switch(self, model: Model) -> None:
        """From now on new requests go to this model. Those under way stay with theirs."""
        with self._lock:
            self._models.insert(0, model)

    def holds(self, model: Model) -> int:
        """How many requests a model still has."""
        with self._lock:
            return self._holds[model]

    def retire(self, model: Model) -> None:
        """A model that no request holds is gone. What it did is still counted."""
        stats = model.engine.stats()
        with self._lock:
            self._models.remove(model)
            self._holds.pop(model, None)
            self._tokens += stats.tokens
            self._restarts += stats.restarts

    @property
    def model(self) -> Model | None:
        """The model that new requests go to."""
        models = self._models
        return models[0] if models else None

    @property
    def name(self) -> str:
        """Of the model that new requests go to, or of the first one while that is loading."""
        model = self.model
        return self._first_name if model is None else model.name

    @property
    def created(self) -> int:
        """When that model was loaded, or the service began."""
        model = self.model
        return self._began if model is None else model.created

    def counted(self) -> Counted:
        """The models that there are, and what those did that are gone."""
        with self._lock:
            return Counted(tuple(self._models), self._tokens, self._restarts)

    # --- requests ---

    def drain(self, seconds: float) -> bool:
        """Take no more requests; wait until none runs, at most so many seconds. Whether none runs."""
        with self._lock:
            self.phase = "draining"
        until = time.monotonic() + seconds
        while self.running and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        return not self.running

    def health(self) -> tuple[int, dict[str, Any]]:
        """A status of HTTP, 200 if a request would be worked on now, and what to say."""
        model = self.model
        if self.phase != "ready" or model is None:
            return 503, {"status": self.phase}
        health = model.engine.health()
        if health.state == "running":
            return 200, {"status": "ok"}
        if health.state == "restoring":
            return 503, {"status": "restoring", "stage": health.stage}
        return 503, {"status": "failed", "error": health.error}

    @contextlib.contextmanager
    def request(self) -> Iterator[Hold]:
        """A request that is worked on. Raises ApiError where none are."""
        hold = Hold()
        with self._lock:
            self.check_ready()
            self.running += 1
        try:
            yield hold
        finally:
            with self._lock:
                self.running -= 1
                if hold.model is not None:
                    self._holds[hold.model] -= 1
                    hold.model = None  # a connection that stays open keeps its last request

    def check_ready(self) -> None:
        """Raise ApiError where no requests are taken now."""
        if self.phase != "ready":
            why = "is still loading its model" if self.phase == "loading" else "is about to end"
            raise ApiError(503, f"the service {why}", code=self.phase)

    def take(self, hold: Hold, name: str) -> Model:
        """The model that a request asks for by its name, kept while it runs. Raises ApiError for another name."""
        with self._lock:
            self.check_name(name)
            hold.model = self._models[0]
            self._holds[hold.model] += 1
            return hold.model

    def check_name(self, name: str) -> None:
        """Raise ApiError for a name that is not that of the model which new requests go to."""
        if name != self.name:
            message = f"there is no model {name!r} here: this service has {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")
