"""What every request passes first: its key, whether the service is ready, and its body, in time and of bounded size."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .errors import ApiError
from .limits import ADMIN_VARIABLE, KEY_VARIABLE, Keys, Limits
from .metrics import Metrics
from .state import State

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/health", "/openapi.json")
"""Paths that need no key: they tell nothing of what the model is asked."""

WORK = ("/v1/completions", "/v1/chat/completions")
"""Paths that need the model."""

ADMIN = "/admin/"
"""What paths begin with that only whoever runs the service may use."""

HOLD = "bigint8.hold"
"""Where a request's scope has its hold on a model."""

BODIES = 32
"""Bodies of the largest size that the service holds at once."""

CLIENT_GONE = 499
"""The status under which requests are counted whose client hung up before it had an answer."""


class ClientGone(Exception):
    """The client has hung up."""


class Gate:
    """ASGI middleware. It hands on requests that it has read whole, and counts how all of them were answered."""

    def __init__(self, app: App, state: State, limits: Limits, keys: Keys, metrics: Metrics, admin_keys: Keys) -> None:
        self._app, self._state, self._limits, self._metrics = app, state, limits, metrics
        self._keys, self._admin_keys = keys, admin_keys
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), CLIENT_GONE

        async def counted(event: Event) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = event["status"]
            await send(event)

        try:
            await self._pass(scope, receive, counted)
        except ClientGone:
            pass
        except Exception:
            status = 500
            raise
        finally:
            self._metrics.answered(scope["path"], status, time.monotonic() - began)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.ExitStack() as stack:
            try:
                self._check_key(scope)
                if scope["path"] in WORK and scope["method"] == "POST":
                    scope[HOLD] = stack.enter_context(self._state.request())
                body = bytearray()
                stack.callback(self._let_go, body)
                await self._read(scope, receive, body)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            await self._app(scope, _again(bytes(body), receive), send)

    def _check_key(self, scope: Scope) -> None:
        """Without admin keys what begins with ADMIN is a path like any that is not there."""
        keys, variable = self._keys, KEY_VARIABLE
        if self._admin_keys and scope["path"].startswith(ADMIN):
            keys, variable = self._admin_keys, ADMIN_VARIABLE
        if scope["path"] not in OPEN and not keys.allow(_header(scope, b"authorization")):
            message = f"no valid API key: send one of {variable} as 'Authorization: Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key")

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> None:
        """Read the body. Raises ApiError for one that is too large or takes too long, ClientGone."""
        told = _header(scope, b"content-length")
        if told.isdigit() and int(told) > self._limits.body_bytes:
            raise self._too_large()
        until, more = time.monotonic() + self._limits.client_seconds, True
        while more:
            try:
                event = await asyncio.wait_for(receive(), until - time.monotonic())
            except asyncio.TimeoutError:
                raise ApiError(
                    408, f"the body did not come within {self._limits.client_seconds:g} s", code="request_timeout"
                ) from None
            if event["type"] == "http.disconnect":
                raise ClientGone
            piece, more = event.get("body", b""), event.get("more_body", False)
            body += piece
            self._held += len(piece)
            if len(body) > self._limits.body_bytes:
                raise self._too_large()
            if self._held > BODIES * self._limits.body_bytes:
                raise ApiError(503, "the service has too many large requests at once", code="overloaded")

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self._limits.body_bytes:,} bytes"
        return ApiError(413, message, code="request_too_large")

    def _let_go(self, body: bytearray) -> None:
        self._held -= len(body)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _again(body: bytes, receive: Receive) -> Receive:
    """What was read, as if it came now; after it what comes."""
    events: list[Event] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_event() -> Event:
        return events.pop() if events else await receive()

    return next_event
