"""What a request asks for: how many tokens, when to stop, how they are chosen. The names are transformers'."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BigInt8Error
from ..model.step import CHOICE

Detokenize = Callable[[Sequence[int]], str]
"""The text of some tokens, special ones left out or not, as the caller wants to see it."""

TEMPERATURE, TOP_K = 1.0, 50
"""What transformers samples with where neither the caller nor the model says."""

MOST_LOGPROBS = 20
"""How many likeliest tokens a request may ask for at each place, as in OpenAI's interface."""

USED = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "max_length",
    "stop_strings", "eos_token_id", "num_return_sequences",
)  # fmt: skip
"""The parts of a GenerationConfig that `settings_from` reads."""

HARMLESS = (
    "pad_token_id", "bos_token_id", "decoder_start_token_id", "use_cache", "cache_implementation", "cache_config",
    "max_cache_len", "compile_config", "disable_compile", "transformers_version", "early_stopping", "length_penalty",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size", "return_dict_in_generate",
    "prefill_chunk_size", "remove_invalid_values", "low_memory", "continuous_batching_config",
)  # fmt: skip
"""Parts that change nothing here: tokens that are not needed, caches, and what only beams or assistants ask for."""

OFF: dict[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "min_length": 0,
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "diversity_penalty": 0.0, "guidance_scale": 1.0, "penalty_alpha": 0.0, "min_new_tokens": 0,
}  # fmt: skip
"""Parts that are not supported, and the value at which they do nothing. For others it is None or False."""


@dataclass(frozen=True)
class Settings:
    """What is asked of one request. Raises BigInt8Error for a value out of range.

    max_new_tokens: how many tokens at most; eos: tokens that end it, themselves included; stop: texts that end it
    temperature: 0 takes the likeliest token; top_k 0, top_p 1, min_p 0, repetition_penalty 1 are off
    seed: with the same seed the same tokens come, whatever else runs; sequences: how many continuations
    logprobs: None is none; n gives the log probability of each token, and those of the n likeliest at its place
    """

    max_new_tokens: int
    eos: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    sequences: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        allowed = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_k": (0 <= self.top_k < 2**31, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0"),
            "sequences": (self.sequences >= 1, "at least 1"),
            "logprobs": (0 <= (self.logprobs or 0) <= MOST_LOGPROBS, f"between 0 and {MOST_LOGPROBS}"),
        }
        for name, (fine, wanted) in allowed.items():
            if not fine:
                raise BigInt8Error(f"{name}={getattr(self, name)}: must be {wanted}")
        if any(not text for text in self.stop):
            raise BigInt8Error("a stop string is empty: nothing would be generated")

    def choice(self, sequence: int = 0) -> NDArray[np.void]:
        """CHOICE (): how the tokens of one of the `sequences` are chosen, from index 0 on."""
        seed = (self.seed + sequence * 0x9E3779B97F4A7C15) % 2**64  # the first keeps the seed itself
        logprobs = 0 if self.logprobs is None else self.logprobs + 1
        row = self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, logprobs, seed, 0
        return np.array(row, CHOICE)


def settings_from(generation_config: Any, prompt_tokens: int, seed: int = 0) -> Settings:
    """The settings that a transformers GenerationConfig asks for, for a prompt of so many tokens.

    Where it says nothing, transformers' own defaults hold. Raises BigInt8Error for what is not supported, by name.
    """
    asked = {name: value for name, value in vars(generation_config).items() if value is not None and name[0] != "_"}
    unsupported = [
        f"{name}={value}"
        for name, value in asked.items()
        if name not in USED and name not in HARMLESS and value is not False and value != OFF.get(name)
    ]
    if unsupported:
        raise BigInt8Error(
            f"{', '.join(sorted(unsupported))}: not supported for streamed requests; pipe.model.generate(...) is "
            "transformers' own loop and has all of it"
        )
    sample = asked.get("do_sample", False)
    eos = asked.get("eos_token_id", ())
    stop = asked.get("stop_strings", ())
    return Settings(
        max_new_tokens=_most_tokens(asked, prompt_tokens),
        eos=frozenset([eos] if isinstance(eos, int) else eos),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        temperature=asked.get("temperature", TEMPERATURE) if sample else 0.0,
        top_k=asked.get("top_k", TOP_K) if sample else 0,
        top_p=asked.get("top_p", 1.0) if sample else 1.0,
        min_p=asked.get("min_p", 0.0) if sample else 0.0,
        repetition_penalty=asked.get("repetition_penalty", 1.0),
        seed=seed % 2**64,
        sequences=asked.get("num_return_sequences", 1),
    )


def _most_tokens(asked: dict[str, Any], prompt_tokens: int) -> int:
    """How many new tokens: max_new_tokens, or what a prompt leaves of max_length; transformers' default is 20."""
    if "max_new_tokens" in asked:
        return int(asked["max_new_tokens"])
    left = int(asked["max_length"]) - prompt_tokens if "max_length" in asked else 20
    if left < 1:
        raise BigInt8Error(
            f"a prompt of {prompt_tokens} tokens leaves no room in max_length={asked['max_length']}; "
            "set max_new_tokens instead"
        )
    return left
