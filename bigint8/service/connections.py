"""Connections that come too many or too slowly: uvicorn's protocol with deadlines, and with a bound on how many stay.

A connection waits from its beginning, and after each answer, until a request's headers are whole. One that waits longer
than a deadline is closed; when there are too many, the one that has waited longest makes room for the new one, so that
thousands that say nothing do not keep out the one that does. A client that does not read its answer is hung up on.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from .errors import ApiError
from .limits import Limits

TOO_MANY = ApiError(503, "the service has too many connections", code="too_many_connections")


class Connections:
    """Those that are open; `waiting` for a request, the longest first."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.open: set[GuardedProtocol] = set()
        self.waiting: dict[GuardedProtocol, None] = {}

    def enter(self, new: "GuardedProtocol") -> bool:
        """Whether there is room for one more, or one that waits has made some."""
        if len(self.open) >= self.limits.connections:
            longest = next(iter(self.waiting), None)
            if longest is None:
                return False
            self.leave(longest)
            longest.give_way()
        self.open.add(new)
        return True

    def leave(self, gone: "GuardedProtocol") -> None:
        """One less."""
        self.open.discard(gone)
        self.waiting.pop(gone, None)


class GuardedProtocol(H11Protocol):
    """One connection, whose client has to be quick."""

    def __init__(self, *, guard: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._guard = guard
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        if self._guard.enter(self):
            self._look()
        else:
            self.refuse(TOO_MANY)

    def data_received(self, data: bytes) -> None:
        """A client has sent something."""
        self._begun = True
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """A request is answered."""
        self._begun = False
        super().on_response_complete()
        self._look()

    def give_way(self) -> None:
        """Make room for another connection. Who has not asked yet may be about to, and is told why."""
        if self.cycle is None:
            self.refuse(TOO_MANY)
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._guard.leave(self)
        for timer in (self._deadline, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client has left much of its answer unread."""
        super().pause_writing()
        self._unread = self.loop.call_later(self._guard.limits.client_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read on."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self.refuse(ApiError(400, msg, code="invalid_http"))

    def _look(self) -> None:
        """Whether it waits for a request, now that something has happened."""
        waits = self.cycle is None or self.cycle.response_complete
        if not waits:
            self._guard.waiting.pop(self, None)
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None
        elif self._deadline is None and self in self._guard.open:
            self._guard.waiting[self] = None
            self._deadline = self.loop.call_later(self._guard.limits.client_seconds, self._late)

    def _late(self) -> None:
        if self._begun:
            seconds = self._guard.limits.client_seconds
            self.refuse(ApiError(408, f"no request came within {seconds:g} s", code="request_timeout"))
        else:
            self.transport.abort()

    def refuse(self, error: ApiError) -> None:
        """Answer without the application, and close."""
        if self.transport.is_closing():
            return
        body = json.dumps(error.body()).encode()
        head = [b"HTTP/1.1 %d %s" % (error.status, STATUS_PHRASES[error.status])]
        head += [b"content-type: application/json", b"content-length: %d" % len(body), b"connection: close"]
        self.transport.write(b"\r\n".join([*head, b"", body]))
        self.transport.close()
