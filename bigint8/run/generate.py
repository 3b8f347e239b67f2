"""Prompts in, answers out: text and tokens over an engine that runs many requests at once."""

import asyncio
import contextlib
import copy
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BigInt8Error
from ..plan.plan import Plan
from .engine import Engine
from .requests import Completion, Generated, Reason
from .settings import settings_from
from .stages import EngineStats
from .text import Pieces, Prompt, Text, ids_within


@dataclass(frozen=True)
class Answer:
    """What follows a prompt.

    tokens: their ids, the one that ended it among them; text: theirs, without special tokens; empty without a tokenizer
    reason: "stop" (an end token or a stop string) or "length"; prompt_tokens: how many the prompt had
    """

    text: str
    tokens: list[int]
    reason: Reason
    prompt_tokens: int


class Generator:
    """Requests to an engine as text.

    Settings are those of transformers' GenerationConfig: the model's own, then `generation_config`, then single ones by
    name. Without any limit an answer may fill the context. `seed`: the same seed gives the same tokens, whatever else
    runs. Raises BigInt8Error for settings that are not supported, and prompts that do not fit; WorkerError when the
    workers fail for good.
    """

    def __init__(self, engine: Engine, read_text: Callable[[], Text], plan: Plan, generation_config: Any) -> None:
        """`read_text` gives the tokenizer. A checkpoint without one takes and gives token ids only."""
        self._engine, self._context, self._config = engine, plan.workload.context, generation_config
        self._read_text = read_text
        self._text: Text | None = None
        with contextlib.suppress(BigInt8Error):  # told when there is text to read
            self._text = read_text()

    def submit(
        self, prompt: Prompt, generation_config: Any = None, *, seed: int = 0, **settings: Any
    ) -> tuple[Completion, int]:
        """Ask for an answer; returns at once: its tokens as they come, and how many the prompt has."""
        ids = self._ids(prompt)
        config = copy.deepcopy(self._config if generation_config is None else generation_config)
        unknown = config.update(**settings)
        if unknown:
            raise BigInt8Error(f"{', '.join(sorted(unknown))}: no such setting; see transformers' GenerationConfig")
        if config.max_new_tokens is None and config.max_length is None:
            config.max_new_tokens = self._context - len(ids)
        if self._text is not None and "eos_token_id" not in settings:
            config.eos_token_id = self._text.ends(config)
        elif self._text is None and config.stop_strings:
            self._read_text()  # raises what is wrong with it
        decode = None if self._text is None else self._text.decode
        return self._engine.submit(ids, settings_from(config, len(ids), seed), decode), len(ids)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        generation_config: Any = None,
        *,
        seed: int = 0,
        **settings: Any,
    ) -> list[Answer]:
        """The answers to all prompts, which run together: `num_return_sequences` for each, in order.

        A prompt is a text, a list of token ids, or a conversation: a list of {"role": ..., "content": ...}.
        """
        with self._asked(prompts, generation_config, seed, settings) as asked:
            return [self._answer(one.result(), tokens) for one, tokens in asked]

    def stream(self, prompt: Prompt, generation_config: Any = None, *, seed: int = 0, **settings: Any) -> Iterator[str]:
        """The answer to one prompt, piece by piece as it is made. To stop early, close the iterator."""
        completion, _ = self.submit(prompt, generation_config, seed=seed, **settings)
        pieces = Pieces(self._text or self._read_text())
        try:
            for token in completion:
                if piece := pieces.push(token):
                    yield piece
            if piece := pieces.finish():
                yield piece
        finally:
            completion.cancel()

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        generation_config: Any = None,
        *,
        seed: int = 0,
        **settings: Any,
    ) -> list[Answer]:
        """`generate` for asyncio: other tasks go on meanwhile. Requests end when the task is cancelled."""

        async def tokens_of(one: Completion) -> None:
            async for _ in one:
                pass

        with self._asked(prompts, generation_config, seed, settings) as asked:
            await asyncio.gather(*(tokens_of(one) for one, _ in asked))
            return [self._answer(one.result(), tokens) for one, tokens in asked]

    async def astream(
        self, prompt: Prompt, generation_config: Any = None, *, seed: int = 0, **settings: Any
    ) -> AsyncIterator[str]:
        """`stream` for asyncio."""
        completion, _ = self.submit(prompt, generation_config, seed=seed, **settings)
        pieces = Pieces(self._text or self._read_text())
        try:
            async for token in completion:
                if piece := pieces.push(token):
                    yield piece
            if piece := pieces.finish():
                yield piece
        finally:
            completion.cancel()

    def stats(self) -> EngineStats:
        """Tokens a second, the queue, and the busy share and memory of each stage."""
        return self._engine.stats()

    @contextlib.contextmanager
    def _asked(
        self, prompts: Prompt | Sequence[Prompt], generation_config: Any, seed: int, settings: Mapping[str, Any]
    ) -> Iterator[list[tuple[Completion, int]]]:
        """All answers that are asked for, in order, each with the prompt's tokens. What nobody waits for any more in
        the end, after Ctrl-C too, is cancelled."""
        each = [self.submit(prompt, generation_config, seed=seed, **settings) for prompt in _each(prompts)]
        asked = [(one, tokens) for completion, tokens in each for one in completion.sequences]
        try:
            yield asked
        finally:
            for one, _ in asked:
                one.cancel()

    def _answer(self, generated: Generated, prompt_tokens: int) -> Answer:
        text = "" if self._text is None else self._text.decode(generated.tokens)
        return Answer(text, generated.tokens, generated.reason, prompt_tokens)

    def _ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises BigInt8Error where it has none, or leaves no room."""
        is_text = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping))
        if self._text is not None or is_text:
            return (self._text or self._read_text()).encode(prompt, self._context)
        return ids_within(prompt, self._context)


def _each(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt as a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    alone = bool(items) and isinstance(items[0], int | dict)
    return [items] if alone else items
