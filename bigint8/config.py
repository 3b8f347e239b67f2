"""How a model is quantized: the settings that people know from other int8 configs."""

from typing import Any, Literal

from bigint8_kernels.reference import Activations
from pydantic import BaseModel, ConfigDict, Field, field_validator
from typing_extensions import Self

Dtype = Literal["auto", "float16", "bfloat16", "float32"]


class Int8Config(BaseModel):
    """Settings of the int8 layers.

    threshold: columns of the activations with any |x| at or above it are multiplied in 16-bit; 0 turns that off
    skip_modules: modules left in 16-bit, by full name, name prefix or last component; None means the output head,
        unless `int8_head`
    int8_head: the output head in int8 too, and with it the embeddings where the two are tied; without it, a tied head
        is never quantized
    dtype: of everything that is not int8. "auto" is the checkpoint's, or a faster one where the device is slow at it
    activations: "int8" is LLM.int8(); "16bit" leaves them as they are; "auto" picks by the number of rows

    Raises pydantic.ValidationError, a ValueError, for values out of range and unknown names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(default=6.0, ge=0, allow_inf_nan=False)
    skip_modules: tuple[str, ...] | None = None
    int8_head: bool = False
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
