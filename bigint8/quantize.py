"""From a 16-bit checkpoint to an int8 one, without ever holding the model: what is read is quantized and written.

python -m bigint8.quantize SRC DST
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .options import DEFAULT_THRESHOLD, SHARD_BYTES, Int8Config
from .session import quantize
from .terminal.flags import AccessFlags, Int8Head, Source, bytes_of_flag, command, new_app, run_command
from .units import decimal

app = new_app()


@dataclass(kw_only=True)
class QuantizeFlags(AccessFlags):
    """The flags of this command."""

    source: Source
    folder: Annotated[Path, typer.Argument(help="Where the int8 checkpoint goes: a new folder.")]
    threshold: Annotated[float, typer.Option(min=0.0, help="Outlier threshold that is saved with it.")] = (
        DEFAULT_THRESHOLD
    )
    skip_module: Annotated[
        list[str] | None, typer.Option(help="A module to leave as it is; the head if none is named. Repeatable.")
    ] = None
    int8_head: Int8Head = False
    shard_size: Annotated[str, typer.Option(help="The most a shard holds, as 500MB or 5GiB.")] = (
        f"{SHARD_BYTES // 10**9}GB"
    )
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False


@command(app, QuantizeFlags)
def run(flags: QuantizeFlags) -> None:
    """Write the int8 checkpoint of a 16-bit one; it needs little memory, however large the model."""
    skipped = tuple(flags.skip_module) if flags.skip_module else None
    report = quantize(
        flags.source,
        flags.folder,
        Int8Config(threshold=flags.threshold, skip_modules=skipped, int8_head=flags.int8_head),
        overwrite=flags.overwrite,
        shard_bytes=bytes_of_flag("--shard-size", flags.shard_size),
        access=flags.access(),
    )
    print(
        f"{flags.folder}: {decimal(report.bytes_written)} of {decimal(report.bytes_read)}, written in "
        f"{report.seconds:.1f} s; peak memory {decimal(report.peak_host_bytes)}"
    )
    if report.unused:
        print(f"not used by the model, and left out: {', '.join(report.unused)}")


if __name__ == "__main__":
    run_command(app)
