"""What loading needs and can be had before: the code of the model, and compiled kernels."""

import contextlib
import gc
import importlib
import threading
from collections.abc import Iterator

from ..plan.spec import ModelSpec


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """A block that imports much. Imports make objects by the million, all of which stay: looking for garbage among them
    is a sixth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def import_model(spec: ModelSpec) -> None:
    """Import transformers' code of the model, as building it would."""
    model_type = spec.config["model_type"]
    with contextlib.suppress(ImportError):  # another name, or code of its own: that is imported when it is built
        importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")


def compile_kernels(spec: ModelSpec) -> threading.Thread:
    """Compile what the CPU needs of kernels, in the background, once for all processes of the box.

    Nothing has to wait for it: a kernel that is needed earlier is compiled then.
    """
    import torch
    from bigint8_kernels import compile_cpu_kernels

    stored = [getattr(torch, spec.stored)]
    thread = threading.Thread(target=compile_cpu_kernels, args=(stored,), daemon=True)
    thread.start()
    return thread
