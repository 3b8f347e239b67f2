"""What a request may say: OpenAI's parameters, with the types and ranges that are taken.

Values are strict: a number in quotes is no number. Parameters that are not supported are known, so that the value that
changes nothing is taken, and any other is refused by name.
"""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..options import Dtype
from ..run.settings import MOST_LOGPROBS
from .errors import ApiError

COMPLETION_TOKENS = 16
"""How many tokens /v1/completions gives where nobody says, as OpenAI has it."""

Unsupported = Annotated[Any, Field(description="Not supported: leave it out.")]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "prediction": (),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Parameters that are not supported, and the values beside null at which they change nothing."""


class StreamOptions(BaseModel):
    """What a stream has beside the text. `include_usage`: a last chunk with the numbers of tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Generation(BaseModel, ABC):
    """What both kinds of requests may say."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.01, le=100)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    presence_penalty: Unsupported = None
    frequency_penalty: Unsupported = None
    logit_bias: Unsupported = None

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @abstractmethod
    def likeliest(self) -> int | None:
        """How many log probabilities of other tokens are wanted beside the token's own, None for none at all."""

    def most_tokens(self) -> int | None:
        """How many tokens at most, None where nobody says."""
        return self.max_tokens

    def check(self) -> None:
        """Raise ApiError for what is known but not supported, and for what does not go together."""
        for name, neutral in NEUTRAL.items():
            value = getattr(self, name, None)
            if value is not None and value not in neutral:
                raise ApiError(400, f"{name} is not supported: leave it out", name, "unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is for streams: set stream to true", "stream_options", "invalid_value")
        if any(not text for text in self.stops()):
            raise ApiError(400, "stop: a stop string is empty", "stop", "invalid_value")


class CompletionRequest(Generation):
    """The body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: int | None = None
    suffix: Unsupported = None

    def likeliest(self) -> int | None:
        return self.logprobs

    def most_tokens(self) -> int | None:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    def check(self) -> None:
        super().check()
        if self.best_of not in (None, self.n or 1):
            raise ApiError(400, "best_of is not supported: leave it out", "best_of", "unsupported_parameter")
        if self.echo and self.logprobs is not None:
            message = "log probabilities of the prompt are not supported: leave out echo or logprobs"
            raise ApiError(400, message, "echo", "unsupported_parameter")
        if not self.prompts():
            raise ApiError(400, "prompt: the list is empty", "prompt", "invalid_value")


class LoadRequest(BaseModel):
    """The body of POST /admin/load. What is left out is as the service was started with.

    model: a preset, a folder or a hub id; checkpoint: where a preset's weights are
    name: for clients; by default the model as given here, or the name as it is where the same model is loaded anew
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)] | None = None
    checkpoint: Annotated[str, Field(min_length=1)] | None = None
    context: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    dtype: Dtype | None = None
    int8_head: bool | None = None


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation. What else OpenAI's objects have may be there, empty."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def turn(self) -> dict[str, str]:
        """The turn as chat templates take it."""
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], {}, "") and name != "name":
                raise ApiError(400, f"messages: {name} is not supported: leave it out", "messages", "invalid_value")
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Generation):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    tools: Unsupported = None
    tool_choice: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    response_format: Unsupported = None
    modalities: Unsupported = None
    store: Unsupported = None
    prediction: Unsupported = None
    audio: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None

    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: set it to true", "top_logprobs", "invalid_value")
