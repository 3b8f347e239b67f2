"""bigint8: stream a safetensors checkpoint of any size to int8 and run it as a pipeline over the devices you own."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import BigInt8Error, CheckpointError, PlanError, WorkerError

if TYPE_CHECKING:
    from .model.layers import Int8Linear, make_int8_linear
    from .model_pipeline import open_pipeline
    from .options import Access, Cluster, Int8Config, Workload
    from .session import load_sharded_int8

__version__ = "0.1.0"

# torch and transformers take seconds to import; planning needs neither, so these names load on first use.
_HOMES = {
    "Access": "options",
    "Cluster": "options",
    "Int8Config": "options",
    "Int8Linear": "model.layers",
    "Workload": "options",
    "load_sharded_int8": "session",
    "make_int8_linear": "model.layers",
    "open_pipeline": "model_pipeline",
}

__all__ = [
    "Access",
    "BigInt8Error",
    "CheckpointError",
    "Cluster",
    "Int8Config",
    "Int8Linear",
    "PlanError",
    "WorkerError",
    "Workload",
    "load_sharded_int8",
    "make_int8_linear",
    "open_pipeline",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
