"""Prompts and conversations on a terminal: text in, text out as it is made."""

import sys
import time
from typing import TYPE_CHECKING, Any

from ..errors import BigInt8Error
from ..run.text import Pieces, Prompt, Text
from .flags import with_flags

if TYPE_CHECKING:
    from ..model_pipeline import ModelPipeline


class Generation:
    """Generates text on a loaded pipeline, greedily, and prints it as it is made."""

    def __init__(self, pipeline: "ModelPipeline", max_new_tokens: int) -> None:
        self._pipeline, self._most = pipeline, max_new_tokens
        self._context = pipeline.plan.workload.context

    @property
    def _text(self) -> Text:
        return self._pipeline.text

    def run(self, prompts: list[str]) -> list[dict[str, Any]]:
        """All prompts at once, as far as there is room; each is shown in its turn. Returns texts and timings.

        "seconds" are from the start of all to the end of this one.
        """
        began = time.perf_counter()
        asked = [self._submit(prompt, len(self._text.encode(prompt, self._context))) for prompt in prompts]
        results: list[dict[str, Any]] = []
        for prompt, completion in zip(prompts, asked, strict=True):
            print(f"\n{self._opening(prompt)}", end="", flush=True)
            text = self._show(completion)
            seconds = time.perf_counter() - began
            results.append({"prompt": prompt, "text": text, "tokens": len(completion.tokens), "seconds": seconds})
            print(flush=True)
        if results:
            tokens, seconds = sum(len(completion.tokens) for completion in asked), time.perf_counter() - began
            print(f"[{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s]", flush=True)
        return results

    def chat(self) -> None:
        """Prompt, answer, prompt, until end of input or Ctrl-C. Turns that no longer fit are forgotten first."""
        print("\nType a message; Ctrl-D or Ctrl-C ends.")
        turns: list[dict[str, str]] = []
        while True:
            try:
                text = input("\n> ").strip()
            except EOFError:
                print()
                return
            if not text:
                continue
            turns.append({"role": "user", "content": text})
            try:
                tokens = self._fit(turns)
                answer = self._show(self._submit(turns, tokens))
                print()
            except BigInt8Error as error:
                print(f"error: {with_flags(str(error))}", file=sys.stderr)
                turns.pop()
                continue
            turns.append({"role": "assistant", "content": answer})

    def _opening(self, text: str) -> str:
        """What is printed before an answer: a chat message on its own line, or the text that the answer continues."""
        return f"> {text}\n" if self._text.chats else text

    def _submit(self, prompt: Prompt, tokens: int) -> Any:
        most = min(self._most, self._context - tokens)
        return self._pipeline.submit(prompt, do_sample=False, max_new_tokens=most)

    def _show(self, completion: Any) -> str:
        """Print an answer as it comes; returns it."""
        pieces, shown = Pieces(self._text), []
        try:
            for token in completion:
                shown.append(pieces.push(token))
                print(shown[-1], end="", flush=True)
        finally:
            completion.cancel()
        shown.append(pieces.finish())
        print(shown[-1], end="", flush=True)
        return "".join(shown)

    def _fit(self, turns: list[dict[str, str]]) -> int:
        """Drop the oldest turns until the conversation leaves room for an answer; returns its tokens."""
        room = min(self._most, self._context // 4)
        while True:
            tokens = len(self._text.conversation(turns))
            if tokens + room <= self._context:
                return tokens
            if len(turns) <= 1:
                raise BigInt8Error(
                    f"{tokens} tokens leave no room in a context of {self._context}; write less, or start with a "
                    "larger --context"
                )
            del turns[:2]
