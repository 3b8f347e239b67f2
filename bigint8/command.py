"""What the command lines share: choices, the devices to plan for, and how errors and signals end them."""

import json
import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from .errors import BigInt8Error
from .families import Layout
from .hardware import Device, cuda_devices, find_devices, gpu_presets, pick_dtype, preset_gpus
from .planner import fewest_devices
from .sources import Source

DEFAULT_GPU_TYPE = "rtx-3090"
DEFAULT_CONTEXT = 2048


class DeviceChoice(str, Enum):
    """Values of --device."""

    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


class DtypeChoice(str, Enum):
    """Values of --dtype."""

    auto = "auto"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def devices_to_plan_for(
    layout: Layout,
    source: Source,
    count: int | None,
    kind: str,
    gpu_type: str | None,
    dtype: str,
    context: int,
    batch_size: int,
) -> tuple[list[Device], str | None]:
    """The devices of a plan that need not be there, and a note that says so."""
    if gpu_type is None and (kind != "auto" or cuda_devices()):
        return find_devices(kind, count)  # type: ignore[arg-type]
    name = gpu_type or DEFAULT_GPU_TYPE
    one = preset_gpus(name, 1)[0]
    if count is None:
        chosen = pick_dtype(dtype, dtype_of_source(source), [one])
        count = fewest_devices(source.name, layout, one, chosen, context, batch_size)
    note = f"planned for {count} x {one.model}"
    if gpu_type is None:
        note = f"no GPU was found: {note}; --gpu-type names another ({', '.join(sorted(gpu_presets()))})"
    return preset_gpus(name, count), note


def dtype_of_source(source: Source) -> str:
    """What the weights are stored as, as far as a config or preset tells."""
    if source.folder is None and source.preset is not None:
        return source.preset.dtype
    config = source.config(trust_remote_code=True)
    stored = config.get("dtype") or config.get("torch_dtype")
    return stored if stored in ("float16", "bfloat16", "float32") else "float16"


def write_json(file: Path | None, result: dict[str, Any]) -> None:
    """Write what --json asks for. Raises BigInt8Error for a file that cannot be written."""
    if file is not None:
        try:
            file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise BigInt8Error(f"--json {file}: {error.strerror}") from None


def unwind_on_sigterm() -> None:
    """A plain kill ends the workers too: SystemExit unwinds through the pipeline's context manager."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def run_command(app: typer.Typer) -> None:
    """Run a command line; errors of bigint8 are printed without a traceback and exit with 2."""
    unwind_on_sigterm()
    try:
        app()
    except BigInt8Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def parse_bytes(flag: str, size: str) -> int:
    """A number of bytes from what a person writes. Raises BigInt8Error, with the flag's name, for anything else."""
    from accelerate.utils import convert_file_size_to_int

    try:
        parsed = int(convert_file_size_to_int(size))
    except (ValueError, OverflowError):
        parsed = 0
    if parsed < 1:
        raise BigInt8Error(f"{flag} {size}: write it as 500MB or 5GiB")
    return parsed
