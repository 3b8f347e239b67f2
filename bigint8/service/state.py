"""What the service is doing: loading, ready, or ending; the model that it serves; how many requests run."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import BigInt8Error
from ..model_pipeline import ModelPipeline
from ..plan.plan import Plan
from ..run.engine import Engine
from ..run.text import Text
from .errors import ApiError

POLL_SECONDS = 0.05
"""How often a service that drains looks whether requests still run."""


@dataclass(frozen=True)
class Model:
    """A loaded model. `ends`: the tokens that end an answer; `vocabulary`: how many tokens it knows."""

    engine: Engine
    text: Text
    plan: Plan
    ends: frozenset[int]
    vocabulary: int

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer together."""
        return self.plan.workload.context

    @classmethod
    def of(cls, pipeline: ModelPipeline) -> "Model":
        """The model of a pipeline. Raises BigInt8Error where it takes no requests, or has no tokenizer."""
        if pipeline.engine is None:
            raise BigInt8Error(
                f"{pipeline.found.spec.name} cannot be served: its blocks run through transformers' own modules, one "
                "batch at a time; give it devices that hold all of it, or a family that bigint8 knows"
            )
        text, config = pipeline.text, pipeline.model.config.get_text_config()
        ends = frozenset(text.ends(pipeline.model.generation_config))
        return cls(pipeline.engine, text, pipeline.plan, ends, config.vocab_size)


class State:
    """The service's own state. Every method may be called from any thread."""

    def __init__(self, name: str) -> None:
        """name: of the model, as clients ask for it."""
        self.name, self.created = name, int(time.time())
        self.phase: Literal["loading", "ready", "draining"] = "loading"
        self.running = 0
        self._model: Model | None = None
        self._lock = threading.Lock()

    def open(self, model: Model) -> None:
        """The model is loaded: take requests."""
        with self._lock:
            self._model, self.phase = model, "ready"

    def drain(self, seconds: float) -> bool:
        """Take no more requests; wait until none runs, at most so many seconds. Whether none runs."""
        with self._lock:
            self.phase = "draining"
        until = time.monotonic() + seconds
        while self.running and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        return not self.running

    @property
    def model(self) -> Model | None:
        """The model, while requests may ask for it."""
        return self._model

    def health(self) -> tuple[int, dict[str, Any]]:
        """A status of HTTP, 200 if a request would be worked on now, and what to say."""
        if self.phase != "ready" or self._model is None:
            return 503, {"status": self.phase}
        health = self._model.engine.health()
        if health.state == "running":
            return 200, {"status": "ok"}
        if health.state == "restoring":
            return 503, {"status": "restoring", "stage": health.stage}
        return 503, {"status": "failed", "error": health.error}

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """A request that is worked on. Raises ApiError where none are."""
        with self._lock:
            if self.phase != "ready":
                why = "is still loading its model" if self.phase == "loading" else "is about to end"
                raise ApiError(503, f"the service {why}", code=self.phase)
            self.running += 1
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1
