"""Answers as OpenAI's objects: whole, or chunk by chunk."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .answers import Part, TokenText


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """How many tokens there were."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(frozen=True)
class Format:
    """What the objects of one request have in common. `logprobs`: whether they are asked for."""

    model: str
    logprobs: bool
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""

    def envelope(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An object around choices."""
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more
        }  # fmt: skip


@dataclass(frozen=True)
class CompletionFormat(Format):
    """The objects of /v1/completions. `echoes`: the text before each answer, where the prompt is to be said back."""

    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    echoes: Sequence[str] = ()

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The chunks before the first of an answer."""
        return [self.chunk(Part(index, self.echoes[index]))] if self.echoes else []

    def chunk(self, part: Part) -> dict[str, Any]:
        """A part of a stream."""
        return self.envelope("text_completion", [self._choice(part)])

    def whole(self, answers: Sequence[Part]) -> dict[str, Any]:
        """All answers at once."""
        said = [self._choice(answer, self.echoes[answer.index] if self.echoes else "") for answer in answers]
        return self.envelope("text_completion", said)

    def last(self, tokens: dict[str, int]) -> dict[str, Any]:
        """The chunk that says how many tokens there were."""
        return self.envelope("text_completion", [], usage=tokens)

    def _choice(self, part: Part, before: str = "") -> dict[str, Any]:
        logprobs = _parallel_lists(part.tokens) if self.logprobs else None
        return {
            "index": part.index, "text": before + part.text, "logprobs": logprobs, "finish_reason": part.reason
        }  # fmt: skip


@dataclass(frozen=True)
class ChatFormat(Format):
    """The objects of /v1/chat/completions."""

    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The chunks before the first of an answer."""
        return [self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, None, None)]

    def chunk(self, part: Part) -> dict[str, Any]:
        """A part of a stream."""
        delta = {"content": part.text} if part.text or part.reason is None else {}
        logprobs = _entries(part.tokens) if self.logprobs and part.tokens else None
        return self._chunk(part.index, delta, logprobs, part.reason)

    def whole(self, answers: Sequence[Part]) -> dict[str, Any]:
        """All answers at once."""
        said = [
            {
                "index": answer.index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": _entries(answer.tokens) if self.logprobs else None,
                "finish_reason": answer.reason,
            }
            for answer in answers
        ]
        return self.envelope("chat.completion", said)

    def last(self, tokens: dict[str, int]) -> dict[str, Any]:
        """The chunk that says how many tokens there were."""
        return self.envelope("chat.completion.chunk", [], usage=tokens)

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.envelope("chat.completion.chunk", [choice])


def joined(parts: Sequence[Part]) -> Part:
    """All parts of one answer as one."""
    tokens = tuple(token for part in parts for token in part.tokens)
    return Part(parts[-1].index, "".join(part.text for part in parts), tokens, parts[-1].reason)


def _parallel_lists(tokens: Sequence[TokenText]) -> dict[str, Any]:
    """Log probabilities as /v1/completions has them."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_by_text(token.likeliest) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _by_text(likeliest: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The likeliest first; of tokens that read alike, the likelier."""
    found: dict[str, float] = {}
    for text, logprob in likeliest:
        found.setdefault(text, logprob)
    return found


def _entries(tokens: Sequence[TokenText]) -> dict[str, Any]:
    """Log probabilities as /v1/chat/completions has them."""
    content = [
        {**_entry(token.text, token.logprob), "top_logprobs": [_entry(*other) for other in token.likeliest]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    """A part of a character has no bytes that its text could tell."""
    told = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": told}
