"""Text to tokens and back, with the checkpoint's tokenizer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ..errors import BigInt8Error, in_one_line
from ..options import Access

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or the turns of a conversation: {"role": "user", "content": "..."}."""

UNFINISHED = "�"
"""What a tokenizer gives for bytes that are not a whole character yet."""

LONGEST_CHARACTER = 4
"""Tokens that one character takes at most, where a tokenizer works on its UTF-8 bytes."""


class Text:
    """The tokenizer of a checkpoint. A prompt's text is a message where it has a chat template, unless `raw`."""

    def __init__(self, folder: Path, access: Access, raw: bool = False) -> None:
        """Raises BigInt8Error for a folder whose tokenizer cannot be read."""
        from transformers import AutoTokenizer  # seconds, which nobody waits for who only needs the names here
        from transformers.utils import logging

        logging.set_verbosity_error()
        trust = access.trust_remote_code
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust, padding_side="left")
        except Exception as error:  # a garbled file can raise anything here
            raise BigInt8Error(f"{folder}: no tokenizer could be read: {in_one_line(error, 300)}") from error
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.chats = bool(self.tokenizer.chat_template) and not raw

    def encode(self, prompt: Prompt, context: int) -> list[int]:
        """A prompt's token ids. Raises BigInt8Error for an empty one, or one that leaves no room in the context."""
        if isinstance(prompt, str):
            turns = [{"role": "user", "content": prompt}]
            ids = self.conversation(turns) if prompt and self.chats else self.plain(prompt)
        elif len(prompt) and isinstance(prompt[0], Mapping):
            ids = self.conversation(cast("Sequence[Mapping[str, str]]", prompt))
        else:
            ids = list(cast("Sequence[int]", prompt))
        return ids_within(ids, context)

    def conversation(self, turns: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins."""
        if not self.chats:
            return self.plain("\n".join(turn["content"] for turn in turns))
        return list(self.tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, return_dict=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def spell(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones among them."""
        return str(self.tokenizer.decode(list(tokens)))

    def ends(self, generation_config: Any) -> list[int]:
        """The tokens that end a text: the model's, and the tokenizer's end of text, which is the end of a turn."""
        told = generation_config.eos_token_id
        ends = set() if told is None else {told} if isinstance(told, int) else set(told)
        if self.tokenizer.eos_token_id is not None:
            ends.add(self.tokenizer.eos_token_id)
        return sorted(ends)

    def plain(self, text: str) -> list[int]:
        """Token ids of a text as it is, whether there is a chat template or not."""
        return list(self.tokenizer(text)["input_ids"])


def ids_within(prompt: Any, context: int) -> list[int]:
    """Token ids of a prompt. Raises BigInt8Error if there are none, or if they leave no room in the context."""
    ids = [int(token) for token in prompt]
    if not ids:
        raise BigInt8Error("a prompt with no tokens in it: give at least one")
    if len(ids) >= context:
        raise BigInt8Error(
            f"a prompt of {len(ids)} tokens leaves no room in a context of {context}; shorten it or load with a larger "
            "context="
        )
    return ids


class Pieces:
    """A text token by token. What comes before a token may change how it reads, so a few earlier ones are decoded
    with it, and what they give alone is left out."""

    def __init__(self, text: Text, before: Sequence[int] = ()) -> None:
        """before: tokens that the text goes on from, whose own text is not wanted."""
        self._text = text
        self._tokens: list[int] = list(before)
        self._known, self._shown = 0, len(before)  # tokens [_known, _shown) give a text that was handed out

    def push(self, token: int) -> str:
        """The text that is complete with this token; empty while a character is not whole."""
        self._tokens.append(token)
        return self._complete(last=False)

    def finish(self) -> str:
        """What is left, whole or not."""
        return self._complete(last=True)

    def _complete(self, last: bool) -> str:
        before = self._text.decode(self._tokens[self._known : self._shown])
        now = self._text.decode(self._tokens[self._known :])
        open_tokens = len(self._tokens) - self._shown
        if len(now) <= len(before) or (now.endswith(UNFINISHED) and not last and open_tokens < LONGEST_CHARACTER):
            return ""
        self._known, self._shown = self._shown, len(self._tokens)
        return now[len(before) :]
