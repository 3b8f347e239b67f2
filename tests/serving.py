"""Services that run in this process, over tiny models, for tests to ask."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch
from fastapi import FastAPI
from folders import save_tokenizer
from tiny import tiny_model
from transformers import AutoTokenizer

from bigint8 import Int8Config
from bigint8.model_pipeline import ModelPipeline
from bigint8.options import Cluster, Workload
from bigint8.service.app import new_app
from bigint8.service.limits import Keys, Limits
from bigint8.service.loads import Loads, Opener
from bigint8.service.server import Server
from bigint8.service.state import Model, State
from bigint8.session import find_model

WORK = Workload(context=2048, sequences=4, chunk=64)
WAIT = 60.0
TEMPLATE = (
    "{% for turn in messages %}{{ raise_exception('no system turns') if turn.role == 'system' }}"
    "w3 {{ turn.content }} {% endfor %}w4"
)
NAME = "tiny"
ADMIN_KEY = "whoever runs it"


def save_model(folder: Path, chats: bool = True, ends: bool = True, seed: int = 0) -> Path:
    """A tiny llama with a long context, whose tokens are words w0 to w127, of which w2 ends a text.

    Without `ends` w2 is never the likeliest. Another seed gives other tokens.
    """
    model = tiny_model("llama", False, torch.float32, max_position_embeddings=WORK.context)
    if seed:
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.lm_head.weight)
    if not ends:
        model.lm_head.weight.data[2] = 0
    model.save_pretrained(folder)
    save_tokenizer(folder)
    if chats:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Service:
    """One that runs. `client` asks it; `state`, `pipeline` and `loads` are its insides."""

    url: str
    state: State
    pipeline: ModelPipeline
    client: httpx.Client
    loads: Loads | None = None

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def complete(self, **body: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"model": NAME, "prompt": "w5 w17 w99", **body})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT)

    def idle(self) -> bool:
        """Whether no sequence runs or waits, and all pages are free."""
        stats = self.pipeline.stats()
        return stats.running == stats.waiting == 0 and stats.free_pages == self.pipeline.plan.pages


def until(condition, seconds: float = WAIT) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.01)


@contextlib.contextmanager
def serving(
    pipeline: ModelPipeline,
    limits: Limits | None = None,
    keys: tuple[str, ...] = (),
    ends: bool = True,
    change: Callable[[FastAPI], None] = lambda app: None,
    opener: Opener | None = None,
) -> Iterator[Service]:
    """A service over a loaded pipeline, on a free port. Without `ends` no token ends an answer.

    `change` may give its application further paths. With an `opener` it loads other models, for who has ADMIN_KEY.
    """
    state, limits = State(NAME), limits or Limits()
    loads = None if opener is None else Loads(state, opener)
    app = new_app(state, limits, Keys(keys), loads, Keys((ADMIN_KEY,)))
    change(app)
    with (
        Server(app, "127.0.0.1", 0, limits) as server,
        httpx.Client(base_url=server.address, timeout=WAIT) as client,
        contextlib.nullcontext() if loads is None else loading(loads, pipeline),
    ):
        model = Model.of(pipeline, NAME)
        state.open(model if ends else replace(model, ends=frozenset()))
        del model  # nothing but the state keeps it
        yield Service(server.address, state, pipeline, client, loads)


@contextlib.contextmanager
def loading(loads: Loads, pipeline: ModelPipeline) -> Iterator[None]:
    """A thread that loads what is asked for, as the main thread of a service does. At the end all models end."""
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            loads.work(0.05)

    loads.begin(pipeline, str(pipeline.found.source.folder))
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        loads.close()


STEP_SECONDS = 0.004


def slow_down(pipeline: ModelPipeline, seconds: float = STEP_SECONDS) -> None:
    """Let each step of a pipeline in this process take so much longer."""
    stages = pipeline.engine._stages
    run = stages._run

    def slowly(step):
        time.sleep(seconds)
        return run(step)

    stages._run = slowly


@contextlib.contextmanager
def loaded(folder: Path, work: Workload = WORK) -> Iterator[ModelPipeline]:
    """A model in this process, in float32 with weights and activations that lose nothing."""
    with ModelPipeline(find_model(folder, Int8Config(dtype="float32")), 1, work, Cluster("cpu")) as pipeline:
        pipeline.load(progress=False)
        yield pipeline
