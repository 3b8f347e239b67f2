"""The HTTP interface: which path does what."""

import asyncio
import time
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from . import errors
from .errors import JsonResponse
from .formats import ChatFormat, CompletionFormat
from .gate import CLIENT_GONE, HOLD, ClientGone, Gate
from .limits import Keys, Limits
from .loads import Loads
from .metrics import Metrics
from .schemas import ChatRequest, CompletionRequest, Generation, LoadRequest
from .state import Model, State
from .work import Asked, answer, check_queue, conversation_of, prompts_of

PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
"""What the page may load: itself, and answers of this service."""


def new_app(
    state: State,
    limits: Limits = Limits(),  # noqa: B008  (constants)
    keys: Keys = Keys(),  # noqa: B008
    loads: Loads | None = None,
    admin_keys: Keys = Keys(),  # noqa: B008
) -> FastAPI:
    """The ASGI application over a service's state. It answers /health with 503 until the state has a model.

    loads: does what /admin asks for. Without it, or without admin keys, there is no /admin
    """
    metrics = Metrics(state)
    api = _Api(state, limits, metrics, loads)
    # FastAPI's own pages of documentation load scripts from elsewhere
    app = FastAPI(title="bigint8", version="1", docs_url=None, redoc_url=None)
    errors.install(app)
    app.add_middleware(Gate, state=state, limits=limits, keys=keys, metrics=metrics, admin_keys=admin_keys)
    admin = (("GET", "/admin/load", api.load_told), ("POST", "/admin/load", api.load))
    for method, path, call in (
        *(admin if loads is not None and admin_keys else ()),
        ("GET", "/", api.page),
        ("GET", "/health", api.health),
        ("GET", "/metrics", api.metrics),
        ("GET", "/stats", api.stats),
        ("GET", "/v1/models", api.models),
        ("GET", "/v1/models/{name:path}", api.model),
        ("POST", "/v1/completions", api.complete),
        ("POST", "/v1/chat/completions", api.chat),
    ):
        app.add_api_route(path, call, methods=[method], response_model=None)
    return app


class _Api:
    """What the paths do."""

    def __init__(self, state: State, limits: Limits, metrics: Metrics, loads: Loads | None) -> None:
        self._state, self._limits, self._metrics, self._loads = state, limits, metrics, loads

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        """Continue one or several prompts."""
        began, model = time.monotonic(), self._checked(request, body)
        prompts = await prompts_of(model, body)
        echoes = [model.text.decode(ids) for ids in prompts for _ in range(body.n or 1)] if body.echo else ()
        form = CompletionFormat(model.name, body.logprobs is not None, echoes=echoes)
        return await self._answer(request, body, model, prompts, form, began)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        began, model = time.monotonic(), self._checked(request, body)
        prompts = [await conversation_of(model, body)]
        form = ChatFormat(model.name, bool(body.logprobs))
        return await self._answer(request, body, model, prompts, form, began)

    async def _answer(
        self, request: Request, body: Generation, model: Model, prompts: list[list[int]], form: Any, began: float
    ) -> Response:
        check_queue(model, len(prompts), self._limits)
        asked = Asked(model, body, self._metrics, began)
        try:
            for ids in prompts:
                asked.submit(ids)
        except BaseException:
            asked.cancel()
            raise
        try:
            return await answer(request, asked, form, body, self._limits)
        except ClientGone:
            return Response(status_code=CLIENT_GONE)

    def _checked(self, request: Request, body: Generation) -> Model:
        """The model that a request names. Raises ApiError for another name, and for what is not supported."""
        model = self._state.take(request.scope[HOLD], body.model)
        body.check()
        return model

    # --- other models ---

    async def load(self, body: LoadRequest) -> Response:
        """Load a model beside the one that is served, and serve it in its place: answered when it is planned."""
        assert self._loads is not None
        load = self._loads.ask(body)
        await asyncio.shield(asyncio.wrap_future(load.planned))  # it goes on where the client hangs up
        return JsonResponse(self._loads.told(), 202, {"Location": "/admin/load"})

    async def load_told(self) -> Response:
        """How far the load is that was asked for last."""
        assert self._loads is not None
        return JsonResponse(self._loads.told())

    # --- what it is, and how it does ---

    async def models(self) -> Response:
        """The model that is served, as a list of one."""
        return JsonResponse({"object": "list", "data": [self._told()]})

    async def model(self, name: str) -> Response:
        """The model by its name."""
        self._state.check_name(name)
        return JsonResponse(self._told())

    def _told(self) -> dict[str, Any]:
        model = self._state.model
        if model is None:
            return {"id": self._state.name, "object": "model", "created": self._state.created, "owned_by": "bigint8"}
        told = {"id": model.name, "object": "model", "created": model.created, "owned_by": "bigint8"}
        return {**told, "max_model_len": model.context}

    async def health(self) -> Response:
        """200 if a request would be worked on now, 503 and why if not."""
        status, said = self._state.health()
        coming = None if self._loads is None else self._loads.coming
        return JsonResponse(said if coming is None else {**said, "loading": coming}, status)

    async def metrics(self) -> Response:
        """All numbers for Prometheus."""
        return Response(await self._metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def stats(self) -> Response:
        """The numbers that the page shows."""
        said: dict[str, Any] = {"model": self._state.name, "health": self._state.health()[1]}
        if self._loads is not None:
            said["load"] = self._loads.glance()
        sample = await self._metrics.sampler.sample()
        if sample is None:
            return JsonResponse(said)
        stats, plan, said["model"] = sample.stats, sample.plan, sample.name
        stages = [
            {
                "device": stage.device.name, "first_block": stage.first_block, "last_block": stage.last_block,
                "busy": busy, "busy_seconds": done.busy_seconds, "steps": done.steps, "rows": done.rows,
                "name": done.name, "times_planned": done.times_planned,
            }
            for stage, done, busy in zip(plan.stages, stats.stages, sample.busy, strict=False)
        ]  # fmt: skip
        numbers = {
            "context": plan.workload.context, "sequences": plan.workload.sequences, "chats": sample.chats,
            "queue": sample.waiting, "running": sample.running, "tokens": sample.tokens,
            "tokens_per_s": stats.tokens_per_s, "free_pages": stats.free_pages, "pages": plan.pages,
            "restarts": sample.restarts, "stages": stages, "slow": stats.slow,
        }  # fmt: skip
        return JsonResponse({**said, **numbers})

    async def page(self) -> Response:
        """A page to try prompts on, and to see the stages."""
        text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY})
