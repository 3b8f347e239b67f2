"""The HTTP interface: which path does what."""

import time
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from . import errors
from .errors import ApiError, JsonResponse
from .formats import ChatFormat, CompletionFormat
from .gate import CLIENT_GONE, ClientGone, Gate
from .limits import Keys, Limits
from .metrics import Metrics
from .schemas import ChatRequest, CompletionRequest, Generation
from .state import Model, State
from .work import Asked, answer, check_queue, conversation_of, prompts_of

PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
"""What the page may load: itself, and answers of this service."""


def new_app(state: State, limits: Limits = Limits(), keys: Keys = Keys()) -> FastAPI:  # noqa: B008  (constants)
    """The ASGI application over a service's state. It answers /health with 503 until the state has a model."""
    metrics = Metrics(state)
    api = _Api(state, limits, metrics)
    # FastAPI's own pages of documentation load scripts from elsewhere
    app = FastAPI(title="bigint8", version="1", docs_url=None, redoc_url=None)
    errors.install(app)
    app.add_middleware(Gate, state=state, limits=limits, keys=keys, metrics=metrics)
    for method, path, call in (
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

    def __init__(self, state: State, limits: Limits, metrics: Metrics) -> None:
        self._state, self._limits, self._metrics = state, limits, metrics

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        """Continue one or several prompts."""
        began, model = time.monotonic(), self._checked(body)
        prompts = await prompts_of(model, body)
        echoes = [model.text.decode(ids) for ids in prompts for _ in range(body.n or 1)] if body.echo else ()
        form = CompletionFormat(self._state.name, body.logprobs is not None, echoes=echoes)
        return await self._answer(request, body, model, prompts, form, began)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        began, model = time.monotonic(), self._checked(body)
        prompts = [await conversation_of(model, body)]
        form = ChatFormat(self._state.name, bool(body.logprobs))
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

    def _checked(self, body: Generation) -> Model:
        """The model that a request names. Raises ApiError for another name, and for what is not supported."""
        self._check_name(body.model)
        body.check()
        if self._state.model is None:
            raise ApiError(503, "the service is still loading its model", code="loading")
        return self._state.model

    def _check_name(self, name: str) -> None:
        if name != self._state.name:
            message = f"there is no model {name!r} here: this service has {self._state.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    # --- what it is, and how it does ---

    async def models(self) -> Response:
        """The model that is served, as a list of one."""
        return JsonResponse({"object": "list", "data": [self._told()]})

    async def model(self, name: str) -> Response:
        """The model by its name."""
        self._check_name(name)
        return JsonResponse(self._told())

    def _told(self) -> dict[str, Any]:
        told = {"id": self._state.name, "object": "model", "created": self._state.created, "owned_by": "bigint8"}
        return told if self._state.model is None else {**told, "max_model_len": self._state.model.context}

    async def health(self) -> Response:
        """200 if a request would be worked on now, 503 and why if not."""
        status, said = self._state.health()
        return JsonResponse(said, status)

    async def metrics(self) -> Response:
        """All numbers for Prometheus."""
        return Response(await self._metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def stats(self) -> Response:
        """The numbers that the page shows."""
        said: dict[str, Any] = {"model": self._state.name, "health": self._state.health()[1]}
        sample, model = await self._metrics.sampler.sample(), self._state.model
        if sample is None or model is None:
            return JsonResponse(said)
        stats, plan = sample.stats, model.plan
        stages = [
            {
                "device": stage.device.name, "first_block": stage.first_block, "last_block": stage.last_block,
                "busy": busy, "busy_seconds": done.busy_seconds, "steps": done.steps, "rows": done.rows,
            }
            for stage, done, busy in zip(plan.stages, stats.stages, sample.busy, strict=False)
        ]  # fmt: skip
        numbers = {
            "context": model.context, "sequences": plan.workload.sequences, "chats": model.text.chats,
            "queue": stats.waiting, "running": stats.running, "tokens": stats.tokens,
            "tokens_per_s": stats.tokens_per_s, "free_pages": stats.free_pages, "pages": plan.pages,
            "restarts": stats.restarts, "stages": stages,
        }  # fmt: skip
        return JsonResponse({**said, **numbers})

    async def page(self) -> Response:
        """A page to try prompts on, and to see the stages."""
        text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY})
