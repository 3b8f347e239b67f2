"""What a person chooses: how a model is quantized, how much work to leave room for, what may be fetched and run."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from typing_extensions import Self

from .errors import BigInt8Error, PlanError
from .units import FLOAT_BYTES

Dtype = Literal["auto", "float16", "bfloat16", "float32"]

Activations = Literal["auto", "int8", "16bit"]
"""The same choice as `bigint8_kernels.Activations`, which cannot be imported without torch."""

DEFAULT_THRESHOLD = 6.0
"""Of outliers, as in Dettmers et al. 2022."""

DEFAULT_CONTEXT = 2048

PREFILL_CHUNK = 512
"""Tokens of a prompt that run at once. More would make the products no faster (their arithmetic is the limit from some
hundred rows on) and take more workspace."""

PAGE_TOKENS = 16
"""Tokens of a page of keys and values: `bigint8_kernels.step.PAGE`, which cannot be imported without torch."""

SHORT_PROMPT = 48
"""A prompt of at most so many tokens is computed as generated tokens are: with 16-bit activations, which lose nothing,
and with so few rows take no longer than int8 ones."""

LEAST_PIECE = 4 * PAGE_TOKENS
"""Prompt tokens are not spread any thinner: below, the time of a step is that of reading the weights."""

PIECES = 4
"""Steps for each stage that a burst of prompts is cut into at least. The later stages have nothing to do until the
first has done one, and the first ones nothing while the last one is done."""

SERVED_CPU_CHUNK = 2 * PAGE_TOKENS
"""Tokens of a prompt that run at once on CPUs that serve many: whoever comes while a long prompt is computed waits for
the steps under way. More are hardly faster there: 1,500 tokens of SmolLM2-135M over two stages of a core took, at best,
1.9 s in chunks of 512, 1.8 of 192, 1.7 of 64, 2.0 of 32, 3.0 of 16."""

SHARD_BYTES = 5 * 10**9
"""The most that a shard holds, unless one tensor is larger."""


class Int8Config(BaseModel):
    """Settings of the int8 layers.

    threshold: columns of the activations with any |x| at or above it are multiplied in 16-bit; 0 turns that off
    skip_modules: modules left in 16-bit, by full name, name prefix or last component; None means the output head,
        unless `int8_head`
    int8_head: the output head in int8 too, and the embeddings if the two are tied. None: only if the model does not
        fit, or barely, otherwise. Without it a tied head is never int8
    dtype: of everything that is not int8. "auto" is the checkpoint's, or a faster one where the device is slow at it
    activations: "int8" is LLM.int8(); "16bit" leaves them as they are; "auto" picks by the number of rows

    Raises pydantic.ValidationError, a ValueError, for values out of range and unknown names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(default=DEFAULT_THRESHOLD, ge=0, allow_inf_nan=False)
    skip_modules: tuple[str, ...] | None = None
    int8_head: bool | None = None
    dtype: Dtype = "auto"
    activations: Activations = "auto"

    @field_validator("skip_modules")
    @classmethod
    def _no_empty_names(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and any(not name for name in names):
            raise ValueError("a name in skip_modules is empty")
        return names

    def skips(self, name: str, head: str | None) -> bool:
        """Whether the module with this full name stays in 16-bit; `head` is the output head's full name."""
        if self.skip_modules is None:
            return name == head and not self.int8_head
        return any(
            name == skip or name.startswith(f"{skip}.") or name.endswith(f".{skip}") or f".{skip}." in name
            for skip in self.skip_modules
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold; `from_dict` takes it back."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The config that `to_dict` wrote."""
        return cls.model_validate(values)


@dataclass(frozen=True)
class Workload:
    """How much work a plan leaves room for: `sequences` at once, of `context` tokens each.

    `chunk` is how many tokens of a prompt run at once. Raises PlanError for less than one of any.
    """

    context: int = DEFAULT_CONTEXT
    sequences: int = 1
    chunk: int = PREFILL_CHUNK

    def __post_init__(self) -> None:
        if self.context < 1 or self.sequences < 1 or self.chunk < 1:
            raise PlanError(
                f"context {self.context}, batch size {self.sequences} and prompt chunk {self.chunk} must be at least 1"
            )

    @property
    def most_rows(self) -> int:
        """The most tokens that run at once: a chunk of prompts, and a token of each sequence."""
        return min(self.chunk, self.sequences * self.context) + self.sequences

    def piece(self, unsent: int, stages: int) -> int:
        """How many tokens of the prompts that wait, `unsent` in all, the next step takes at most over so many stages.

        Whole pages, and no more than a chunk.
        """
        part = max(LEAST_PIECE, -(-unsent // (1 if stages == 1 else PIECES * stages)))
        return min(self.chunk, -(-part // PAGE_TOKENS) * PAGE_TOKENS)

    @classmethod
    def of(cls, context: int | None, sequences: int, longest: int | None) -> Self:
        """The work asked for. Without a `context` it is the default, or the model's `longest` if that is shorter."""
        return cls(min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT) if context is None else context, sequences)


@dataclass(frozen=True)
class Access:
    """What may be fetched and run: a branch, tag or commit on the hub, and Python code that a checkpoint brings."""

    revision: str | None = None
    trust_remote_code: bool = False


DeviceKind = Literal["auto", "cuda", "cpu"]


@dataclass(frozen=True)
class Cluster:
    """Where workers run.

    device: the kind of device; "auto" takes GPUs if there are any
    address: of a Ray cluster; None is this machine
    """

    device: DeviceKind = "auto"
    address: str | None = None


def dtype_name(dtype: object) -> Dtype:
    """A dtype by name, from "auto", a name or a torch dtype. Raises BigInt8Error for one that no model computes in."""
    name = str(dtype).removeprefix("torch.")
    if name != "auto" and name not in FLOAT_BYTES:
        *others, last = FLOAT_BYTES
        raise BigInt8Error(f"dtype={name}: must be auto, {', '.join(others)} or {last}")
    return name  # type: ignore[return-value]
