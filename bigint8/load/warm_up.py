"""What can be prepared before a load: the model's code, and compiled kernels."""

import contextlib
import gc
import importlib
import threading
from collections.abc import Iterator

from ..plan.devices import cpu_device, pick_dtype
from ..plan.spec import ModelSpec


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Turn garbage collection off for a block that imports much. Imports make millions of objects, and all of them
    stay: looking for garbage among them takes a sixth of the time."""
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
    # the module may have another name, or come with the checkpoint: it is imported when the model is built
    with contextlib.suppress(Exception):
        importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")


def compile_kernels(spec: ModelSpec) -> None:
    """Compile what the CPU needs of kernels, in the background, once for all processes of the box.

    Nothing has to wait for it: a kernel that is needed earlier is compiled then.
    """
    import torch
    from bigint8_kernels import compile_cpu_kernels

    def compile_them() -> None:
        with contextlib.suppress(Exception):  # whoever needs a kernel meets the error again
            dtype = pick_dtype(spec.int8.dtype, spec.stored, [cpu_device()])  # that of the keys and values
            compile_cpu_kernels([getattr(torch, spec.stored)], [getattr(torch, dtype)])

    threading.Thread(target=compile_them, daemon=True).start()
