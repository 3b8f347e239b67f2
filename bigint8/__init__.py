"""bigint8: stream a safetensors checkpoint of any size to int8 and run it as a pipeline over the devices you own."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import BigInt8Error, CheckpointError, PlanError, WorkerError

if TYPE_CHECKING:
    from .config import Int8Config
    from .linear import Int8Linear, make_int8_linear
    from .loader import load_sharded_int8

__version__ = "0.1.0"

# torch and transformers take seconds to import; planning needs neither, so these names load on first use.
_HOMES = {
    "Int8Config": "config",
    "Int8Linear": "linear",
    "make_int8_linear": "linear",
    "load_sharded_int8": "loader",
}

__all__ = [
    "BigInt8Error",
    "CheckpointError",
    "Int8Config",
    "Int8Linear",
    "PlanError",
    "WorkerError",
    "load_sharded_int8",
    "make_int8_linear",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
