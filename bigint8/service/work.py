"""From a request's body to the engine, and back to the client."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ..errors import BigInt8Error, in_one_line
from ..run.requests import Completion
from ..run.settings import Settings
from .answers import AnswerText, Part, parts_of, together
from .errors import ApiError, JsonResponse, of_bigint8
from .formats import ChatFormat, CompletionFormat, joined, usage
from .gate import ClientGone
from .limits import Limits
from .metrics import Metrics
from .schemas import ChatRequest, CompletionRequest, Generation
from .state import Model

Result = TypeVar("Result")


class Asked:
    """What the engine was asked for one request: completions, with the tokens of their prompts."""

    def __init__(self, model: Model, body: Generation, metrics: Metrics, began: float) -> None:
        self._model, self._body, self._metrics, self._began = model, body, metrics, began
        self._completions: list[tuple[Completion, list[int]]] = []
        self._prompt_tokens = 0
        self._has_token = False

    def submit(self, ids: list[int]) -> None:
        """Ask for the answers to one prompt. Raises BigInt8Error where that cannot be."""
        settings = _settings(self._model, self._body, ids)
        completion = self._model.engine.submit(ids, settings, self._model.text.decode)
        self._completions += [(each, ids) for each in completion.sequences]
        self._prompt_tokens += len(ids)
        self._metrics.prompt_tokens.inc(len(ids))

    @property
    def admitted(self) -> bool:
        """Whether any of it runs, or has run."""
        return any(completion.admitted for completion, _ in self._completions)

    @property
    def count(self) -> int:
        """How many answers there are."""
        return len(self._completions)

    def usage(self) -> dict[str, int]:
        """How many tokens there were."""
        return usage(self._prompt_tokens, sum(len(completion.tokens) for completion, _ in self._completions))

    def parts(self) -> AsyncIterator[Part]:
        """The parts of all answers, as they come."""
        goes_on = isinstance(self._body, CompletionRequest)
        answers = [AnswerText(self._model.text, self._body.stops(), ids, goes_on) for _, ids in self._completions]
        return together([
            parts_of(completion, answer, index, self._first)
            for index, ((completion, _), answer) in enumerate(zip(self._completions, answers, strict=True))
        ])  # fmt: skip

    def cancel(self) -> None:
        """Nobody wants what is not there yet: its pages are free after the step that is under way."""
        for completion, _ in self._completions:
            completion.cancel()

    def _first(self) -> None:
        if not self._has_token:
            self._has_token = True
            self._metrics.first_token.observe(time.monotonic() - self._began)


async def prompts_of(model: Model, body: CompletionRequest) -> list[list[int]]:
    """The token ids of each prompt. Raises ApiError for ids that the model does not know."""
    prompts = []
    for prompt in body.prompts():
        if isinstance(prompt, str):
            prompts.append(await _encoded(partial(model.text.plain, prompt), "prompt"))
        else:
            wrong = next((token for token in prompt if not 0 <= token < model.vocabulary), None)
            if wrong is not None:
                message = f"prompt: token {wrong} is not one of the model's {model.vocabulary}"
                raise ApiError(400, message, "prompt", "invalid_value")
            prompts.append(prompt)
    return prompts


async def conversation_of(model: Model, body: ChatRequest) -> list[int]:
    """The token ids of a conversation. Raises ApiError for a model without a chat template."""
    if not model.text.chats:
        message = "the model has no chat template: ask /v1/completions with the text of a prompt"
        raise ApiError(400, message, "messages", "no_chat_template")
    turns = [message.turn() for message in body.messages]
    return await _encoded(partial(model.text.conversation, turns), "messages")


async def _encoded(encode: Callable[[], list[int]], param: str) -> list[int]:
    """In a thread: a long text takes a while. A chat template refuses what it does not like with errors of any kind."""
    try:
        return await asyncio.to_thread(encode)
    except Exception as error:
        raise ApiError(400, f"{param}: {in_one_line(error)}", param, "invalid_value") from error


def _settings(model: Model, body: Generation, ids: Sequence[int]) -> Settings:
    """What a request asks for. Raises ApiError for a prompt and an answer that the context does not hold."""
    param = "messages" if isinstance(body, ChatRequest) else "prompt"
    left, wanted = model.context - len(ids), body.most_tokens()
    if not ids:
        raise ApiError(400, f"{param}: there is no token in it", param, "invalid_value")
    if left < 1 or (wanted is not None and wanted > left):
        asked = "" if wanted is None else f" and {wanted} for the answer"
        raise ApiError(
            400, f"the context is {model.context} tokens; {len(ids)} of {param}{asked} are too many", param,
            "context_length_exceeded",
        )  # fmt: skip
    return Settings(
        max_new_tokens=left if wanted is None else wanted,
        eos=model.ends,
        stop=body.stops(),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        seed=secrets.randbits(64) if body.seed is None else body.seed % 2**64,
        sequences=body.n or 1,
        logprobs=body.likeliest(),
    )


def check_queue(model: Model, prompts: int, limits: Limits) -> None:
    """Raise ApiError where the line is full, or so many prompts are more than it ever takes."""
    if prompts > limits.queue:
        message = f"prompt: {prompts} prompts at once, of which at most {limits.queue} are taken"
        raise ApiError(400, message, "prompt", "invalid_value")
    waiting, _ = model.engine.queue
    if waiting + prompts > limits.queue:
        raise ApiError(429, f"{waiting} requests wait in line already; try again later", code="queue_full")


async def answer(
    request: Request, asked: Asked, form: CompletionFormat | ChatFormat, body: Generation, limits: Limits
) -> Response:
    """The response to a request that was submitted, a stream or not. Raises ApiError, BigInt8Error, ClientGone."""
    parts = asked.parts()
    if body.stream:
        try:
            first = await _unless_gone(request, _next(parts), asked, limits.queue_seconds)
        except BaseException:
            asked.cancel()
            raise
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(_events(first, parts, asked, form, with_usage), asked.cancel)
    try:
        answers = await _unless_gone(request, _collected(parts, asked.count), asked, limits.queue_seconds)
    finally:
        asked.cancel()
    return JsonResponse({**form.whole(answers), "usage": asked.usage()})


async def _next(parts: AsyncIterator[Part]) -> Part:
    return await anext(parts)


async def _collected(parts: AsyncIterator[Part], count: int) -> list[Part]:
    """All answers, each as one part."""
    found: list[list[Part]] = [[] for _ in range(count)]
    async for part in parts:
        found[part.index].append(part)
    return [joined(each) for each in found]


async def _unless_gone(
    request: Request, work: Coroutine[Any, Any, Result], asked: Asked, queue_seconds: float
) -> Result:
    """What some work gives. Raises ClientGone when the client hangs up, ApiError when it waited in line too long."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(hang_up())
    timeout: float | None = queue_seconds
    try:
        while True:
            await asyncio.wait({working, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if gone.done():
                raise ClientGone
            if not asked.admitted:
                raise ApiError(
                    503, f"there was no room for the request within {queue_seconds:g} s", code="queue_timeout"
                )
            timeout = None
    finally:
        working.cancel()
        gone.cancel()


class EventStream(StreamingResponse):
    """A stream of events. However it ends, `at_end` is called."""

    def __init__(self, events: AsyncIterator[str], at_end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._at_end = at_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer as ASGI has it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


async def _events(
    first: Part, parts: AsyncIterator[Part], asked: Asked, form: CompletionFormat | ChatFormat, with_usage: bool
) -> AsyncIterator[str]:
    more: dict[str, Any] = {"usage": None} if with_usage else {}
    opened: set[int] = set()
    part: Part | None = first
    try:
        while part is not None:
            chunks = [] if part.index in opened else form.opening(part.index)
            opened.add(part.index)
            for chunk in [*chunks, form.chunk(part)]:
                yield _event({**chunk, **more})
            part = await anext(parts, None)  # type: ignore[arg-type]
        if with_usage:
            yield _event(form.last(asked.usage()))
        yield "data: [DONE]\n\n"
    except BigInt8Error as error:
        yield _event(of_bigint8(error).body())


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'), allow_nan=False)}\n\n"
