"""The presets that ship with bigint8: architectures of known models, and where their weights come from."""

from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from ..errors import BigInt8Error


class WheelSource(BaseModel):
    """Weights that come as a GGUF file in a package: which package, which file in it, what it becomes."""

    model_config = ConfigDict(extra="forbid")

    package: str
    version: str
    module: str
    file: str


class ModelPreset(BaseModel):
    """One file of configs/models.

    config: what config.json holds, enough to plan and to build the model
    dtype: of the published weights; hub: the hub id, None where the weights are not on the hub
    how: what a person must do to get weights that are not on the hub
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    dtype: str
    hub: str | None = None
    wheel: WheelSource | None = None
    how: str | None = None
    config: dict[str, Any]


def read_yaml(path: str) -> dict[str, Any]:
    """A file of configs/, which is a package here: found alike in a wheel and in an editable install."""
    loaded: dict[str, Any] = yaml.safe_load(files("bigint8.configs").joinpath(path).read_text(encoding="utf-8"))
    return loaded


@cache
def preset_names() -> tuple[str, ...]:
    """The names that --model takes besides folders and hub ids."""
    names = (entry.name for entry in files("bigint8.configs").joinpath("models").iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def find_preset(name: str) -> ModelPreset | None:
    """The preset of this name, or None. Raises BigInt8Error for a preset file that is wrong."""
    if name.lower() not in preset_names():
        return None
    try:
        return ModelPreset.model_validate(read_yaml(f"models/{name.lower()}.yaml"))
    except ValueError as error:
        raise BigInt8Error(f"configs/models/{name}.yaml: {error}") from None
