"""An answer's text as its tokens come: characters whole, and nothing of a stop string."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from ..model.step import Logprobs
from ..run.requests import Completion
from ..run.text import LONGEST_CHARACTER, Pieces, Text

LEAST_LOGPROB = -9999.0
"""What stands for a probability of 0, which JSON has no logarithm for: OpenAI's number."""


@dataclass(frozen=True)
class TokenText:
    """One token as text, with log probabilities. `offset`: characters of the answer before it."""

    text: str
    offset: int
    logprob: float
    likeliest: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Part:
    """A piece of the answer `index`: more text, the tokens that it is of where they are asked for, and why it ends.

    reason: "stop" or "length" in the last part
    """

    index: int
    text: str
    tokens: tuple[TokenText, ...] = ()
    reason: str | None = None


class AnswerText:
    """The text of one answer. What may be the beginning of a stop string is held back until it is not."""

    def __init__(self, text: Text, stops: Sequence[str], before: Sequence[int], goes_on: bool) -> None:
        """before: the prompt's tokens. goes_on: the answer reads as their continuation, not as a text of its own."""
        self._text, self._stops = text, stops
        self._pieces = Pieces(text, before[-LONGEST_CHARACTER:] if goes_on else ())
        self._last = list(before[-1:])
        self._held, self._known, self._given = "", 0, 0
        self._tokens: list[TokenText] = []
        self.stopped = False

    def push(self, token: int, logprobs: Logprobs | None = None) -> tuple[str, tuple[TokenText, ...]]:
        """The text that is certain with this token, and the tokens that begin in it."""
        if logprobs is not None:
            self._tokens.append(self._named(token, logprobs))
        self._last = [token]
        return self._give(self._pieces.push(token), last=False)

    def finish(self) -> tuple[str, tuple[TokenText, ...]]:
        """What is left at the end."""
        return self._give(self._pieces.finish(), last=True)

    def _give(self, piece: str, last: bool) -> tuple[str, tuple[TokenText, ...]]:
        self._held += piece
        self._known += len(piece)
        cuts = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if cuts:
            self.stopped = True
            text = self._held[: min(cuts)]
        else:
            text = self._held if last else self._held[: len(self._held) - self._may_stop()]
        self._held = self._held[len(text) :]
        self._given += len(text)
        whole = last and not self.stopped
        count = len(self._tokens) if whole else sum(token.offset < self._given for token in self._tokens)
        tokens, self._tokens = tuple(self._tokens[:count]), self._tokens[count:]
        return text, tokens

    def _may_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)

    def _named(self, token: int, logprobs: Logprobs) -> TokenText:
        likeliest = tuple((self._read(other), max(value, LEAST_LOGPROB)) for other, value in logprobs.likeliest)
        return TokenText(self._read(token), self._known, max(logprobs.token, LEAST_LOGPROB), likeliest)

    def _read(self, token: int) -> str:
        """How a token reads here: after the one before it, which may make a space of its beginning."""
        before, both = self._text.spell(self._last), self._text.spell([*self._last, token])
        return both[len(before) :] if both.startswith(before) else self._text.spell([token])


async def parts_of(
    completion: Completion, answer: AnswerText, index: int, first: Callable[[], None]
) -> AsyncIterator[Part]:
    """The parts of one answer as they come, the last with its reason. Raises what made the request fail.

    `first` is called when the first token is there.
    """
    at = 0
    async for token in completion:
        if not at:
            first()
        if token in completion.settings.eos:
            break  # it is no part of the answer
        text, tokens = answer.push(token, completion.logprobs[at] if completion.logprobs else None)
        at += 1
        if answer.stopped:
            completion.cancel()
            yield Part(index, text, tokens, "stop")
            return
        if text or tokens:
            yield Part(index, text, tokens)
    reason = completion.result().reason
    text, tokens = answer.finish()
    yield Part(index, text, tokens, "stop" if answer.stopped else reason)


async def together(answers: Sequence[AsyncIterator[Part]]) -> AsyncIterator[Part]:
    """The parts of several answers, in the order in which they come."""
    came: asyncio.Queue[Part | BaseException | None] = asyncio.Queue()

    async def read(answer: AsyncIterator[Part]) -> None:
        try:
            async for part in answer:
                came.put_nowait(part)
            came.put_nowait(None)
        except Exception as error:
            came.put_nowait(error)

    tasks = [asyncio.ensure_future(read(answer)) for answer in answers]
    try:
        left = len(tasks)
        while left:
            part = await came.get()
            if isinstance(part, BaseException):
                raise part
            if part is None:
                left -= 1
            else:
                yield part
    finally:
        for task in tasks:
            task.cancel()
