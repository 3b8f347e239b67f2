"""A request as the one who made it sees it: tokens that come one after the other, and how it ended."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ..errors import BigInt8Error, WorkerError, in_one_line
from ..model.step import Logprobs
from .settings import Detokenize, Settings

Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Generated:
    """The tokens of a request, in order, and why there are no more.

    reason: "stop" is an end token or a stop string (both are among the tokens), "length" max_new_tokens
    stop: the stop string that ended it, None otherwise
    """

    tokens: list[int]
    reason: Reason
    stop: str | None = None


class Completion:
    """One continuation of a prompt. Iterate over it (`for` or `async for`) for its tokens as they come.

    Each iteration begins with the first token. `sequences` are all continuations of the request, this one among them.

    tokens: those that are there; logprobs: theirs, if the settings ask for them; admitted: it waits in line no longer
    """

    def __init__(self, settings: Settings, detokenize: Detokenize | None = None) -> None:
        self.settings = settings
        self.sequences: tuple[Completion, ...] = (self,)
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.admitted = False
        self._stop = StopText(settings.stop, detokenize) if settings.stop and detokenize else None
        self._lock = threading.Lock()
        self._waiting: list[Callable[[], None]] = []
        self._at_end: list[Callable[[], None]] = []
        self._reason: Reason | None = None
        self._error: BigInt8Error | None = None
        self.on_cancel: Callable[[], None] = partial(self.end, "cancelled")

    # --- for the one who asked -----------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether no more tokens come."""
        return self._reason is not None or self._error is not None

    def __iter__(self) -> Iterator[int]:
        """The tokens, as they come. Raises what made the request fail, after the tokens that came before."""
        at = 0
        while True:
            while at < len(self.tokens):
                yield self.tokens[at]
                at += 1
            arrived = threading.Event()
            if not self._when_more(at, arrived.set):
                arrived.wait()
            elif at == len(self.tokens):
                break
        self._raise()

    async def __aiter__(self) -> AsyncIterator[int]:
        loop, at = asyncio.get_running_loop(), 0
        while True:
            while at < len(self.tokens):
                yield self.tokens[at]
                at += 1
            arrived = asyncio.Event()

            def wake(arrived: asyncio.Event = arrived) -> None:
                with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(arrived.set)

            if not self._when_more(at, wake):
                await arrived.wait()
            elif at == len(self.tokens):
                break
        self._raise()

    def result(self, timeout: float | None = None) -> Generated:
        """All its tokens, once it has ended. Raises what made it fail, and TimeoutError after `timeout` seconds."""
        ended = threading.Event()
        if not self._when_more(None, ended.set) and not ended.wait(timeout):
            raise TimeoutError(f"the request has {len(self.tokens)} tokens after {timeout} s, and is not at its end")
        self._raise()
        assert self._reason is not None
        return Generated(list(self.tokens), self._reason, self._stop.found if self._stop else None)

    def cancel(self) -> None:
        """End it now, with the tokens that it has."""
        self.on_cancel()

    def _when_more(self, at: int | None, wake: Callable[[], None]) -> bool:
        """Whether it has more than `at` tokens (None: any number) or has ended; if not, `wake` is called then."""
        with self._lock:
            if self.done or (at is not None and at < len(self.tokens)):
                return True
            if at is None:
                self._at_end.append(wake)
            else:
                self._waiting.append(wake)
            return False

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    # --- for the engine ------------------------------------------------------------------------------------------

    def put(self, token: int, logprobs: Logprobs | None = None) -> Reason | None:
        """The next token; why it is the last, if it is. A request that has ended takes no more."""
        if self.done:
            return self._reason or "cancelled"
        reason: Reason | None = None
        if token in self.settings.eos or self._ends_text(token):
            reason = "stop"
        elif len(self.tokens) + 1 == self.settings.max_new_tokens:
            reason = "length"
        if self._error is not None:
            return "cancelled"
        with self._lock:
            if logprobs is not None:
                self.logprobs.append(logprobs)
            self.tokens.append(token)
            self._reason = reason
            waiting, self._waiting = self._waiting, []
            if reason is not None:
                waiting += self._at_end
        for wake in waiting:
            wake()
        return reason

    def end(self, outcome: Reason | BigInt8Error) -> None:
        """No more tokens come. Without effect on a request that has ended."""
        with self._lock:
            if self.done:
                return
            if isinstance(outcome, BigInt8Error):
                self._error = outcome
            else:
                self._reason = outcome
            waiting = self._waiting + self._at_end
        for wake in waiting:
            wake()

    def _ends_text(self, token: int) -> bool:
        """Whether a stop string ends with this token. A `detokenize` that fails fails this request alone."""
        try:
            return self._stop is not None and self._stop.ends_with(token)
        except Exception as error:
            self.end(WorkerError(f"the text of token {token} was not to be had: {in_one_line(error)}"))
            return False


class StopText:
    """The text of the tokens so far, as much of its end as a stop string may reach into.

    A token's text depends on those before it (spaces, characters of several tokens), so the new text is what a few
    tokens together have more than the same without the last (as text-generation-inference and vLLM do it).
    """

    def __init__(self, stops: tuple[str, ...], detokenize: Detokenize) -> None:
        self._stops, self._detokenize = stops, detokenize
        self._reach = max(len(stop) for stop in stops) - 1
        self._tokens: list[int] = []
        self._known = 0  # how many of these tokens have given their text
        self._tail = ""
        self.found: str | None = None

    def ends_with(self, token: int) -> bool:
        """Add a token: whether a stop string ends in its text."""
        self._tokens.append(token)
        before = self._detokenize(self._tokens[: self._known])
        whole = self._detokenize(self._tokens)
        if whole.endswith("\ufffd"):  # half a character: the next token has the rest
            return False
        text = self._tail + whole[len(before) :]
        self.found = next((stop for stop in self._stops if stop in text), None)
        self._tail = text[-self._reach :] if self._reach else ""
        self._tokens, self._known = self._tokens[self._known :], len(self._tokens) - self._known
        return self.found is not None
