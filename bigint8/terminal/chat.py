"""Prompts and conversations on a terminal: text in, tokens through a model, text out as it is made."""

import sys
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, TextStreamer
from transformers.utils import logging

from ..errors import BigInt8Error, in_one_line
from ..options import Access
from .flags import with_flags


class Prompter:
    """Turns text into token ids: as a message where the checkpoint has a chat template, else as it is."""

    def __init__(self, folder: Path, access: Access, raw: bool = False) -> None:
        """Raises BigInt8Error for a folder whose tokenizer cannot be read."""
        logging.set_verbosity_error()
        trust = access.trust_remote_code
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust, padding_side="left")
        except Exception as error:  # a garbled file can raise anything here
            raise BigInt8Error(f"{folder}: no tokenizer could be read: {in_one_line(error, 300)}") from error
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.chats = bool(self.tokenizer.chat_template) and not raw

    def encode(self, text: str, context: int) -> list[int]:
        """A prompt's token ids. Raises BigInt8Error for an empty one, or one that leaves no room in the context."""
        ids = self.conversation([{"role": "user", "content": text}]) if text and self.chats else self._plain(text)
        if not ids:
            raise BigInt8Error(f"--prompt {text!r}: no tokens in it")
        if len(ids) >= context:
            raise BigInt8Error(
                f"--prompt: {len(ids)} tokens leave no room in a context of {context}; shorten it or raise --context"
            )
        return ids

    def conversation(self, turns: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins."""
        if not self.chats:
            return self._plain("\n".join(turn["content"] for turn in turns))
        return list(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])


class Generation:
    """Generates text on a loaded model and prints it as it is made."""

    def __init__(self, model: Any, prompter: Prompter, max_new_tokens: int) -> None:
        self._model, self._prompter, self._most = model, prompter, max_new_tokens
        self._context: int = model.plan.workload.context

    def run(self, prompts: list[str], encoded: list[list[int]], batch_size: int) -> list[dict[str, Any]]:
        """The prompts in batches; a batch of one is streamed. Returns texts and timings."""
        results = []
        for start in range(0, len(prompts), batch_size):
            texts, ids = prompts[start : start + batch_size], encoded[start : start + batch_size]
            alone = len(texts) == 1
            if alone:
                print(f"\n{self._opening(texts[0])}", end="", flush=True)
            began = time.perf_counter()
            answers, tokens = self._generate(ids, stream=alone)
            seconds = time.perf_counter() - began
            if not alone:
                for text, answer in zip(texts, answers, strict=True):
                    print(f"\n{self._opening(text)}{answer}")
            print(f"\n[{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s]", flush=True)
            results += [
                {"prompt": text, "text": answer, "batch_seconds": seconds, "batch_tokens": tokens}
                for text, answer in zip(texts, answers, strict=True)
            ]
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
                answer, _ = self._generate([self._fit(turns)], stream=True)
            except BigInt8Error as error:
                print(f"error: {with_flags(str(error))}", file=sys.stderr)
                turns.pop()
                continue
            turns.append({"role": "assistant", "content": answer[0]})

    def _opening(self, text: str) -> str:
        """What is printed before an answer: a chat message on its own line, or the text that the answer continues."""
        return f"> {text}\n" if self._prompter.chats else text

    def _generate(self, prompts: list[list[int]], stream: bool) -> tuple[list[str], int]:
        """What follows each prompt, and how many tokens were made in all."""
        tokenizer = self._prompter.tokenizer
        inputs = tokenizer.pad({"input_ids": prompts}, padding=True, return_tensors="pt").to(self._model.device)
        length = inputs["input_ids"].shape[1]
        output = self._model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=min(self._most, self._context - length),
            do_sample=False,
            eos_token_id=self._ends(),
            pad_token_id=tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
        )
        new = output[:, length:]
        ends = set(self._ends() or ())
        made = sum(next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in new.tolist())
        return tokenizer.batch_decode(new, skip_special_tokens=True), max(made, 1)

    def _ends(self) -> list[int] | None:
        """The tokens that end a text: the model's, and the tokenizer's end of text, which is the end of a turn."""
        told = self._model.generation_config.eos_token_id
        ends = set() if told is None else {told} if isinstance(told, int) else set(told)
        if self._prompter.tokenizer.eos_token_id is not None:
            ends.add(self._prompter.tokenizer.eos_token_id)
        return sorted(ends) or None

    def _fit(self, turns: list[dict[str, str]]) -> list[int]:
        """Token ids of the conversation; its oldest turns are dropped until it leaves room for an answer."""
        room = min(self._most, self._context // 4)
        while True:
            ids = self._prompter.conversation(turns)
            if len(ids) + room <= self._context:
                return ids
            if len(turns) <= 1:
                raise BigInt8Error(
                    f"{len(ids)} tokens leave no room in a context of {self._context}; write less, or start with a "
                    "larger --context"
                )
            del turns[:2]
