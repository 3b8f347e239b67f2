"""From a 16-bit checkpoint to an int8 one, without ever holding the model: what is read is quantized and written.

python -m bigint8.quantize SRC DST
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from .checkpoint import Checkpoint, open_checkpoint
from .command import parse_bytes, run_command
from .config import Int8Config
from .errors import CheckpointError
from .linear import is_linear
from .loader import checkpoint_skeleton, peak_host_bytes, read_hf_config, transfer_stream
from .progress import LoadProgress
from .save import check_target, copy_config_files, int8_tensors, new_checkpoint_folder
from .shards import SHARD_BYTES, ShardWriter
from .sources import find_source
from .stored_int8 import FORMAT, ROWS_AS_THEY_ARE, SCALES, quantization_config, scales_to_absmax
from .stream import TORCH_DTYPES, Chunk
from .transfer import Transfer, convert, match_tensors, stored_dtype, unused_tensors


@dataclass(frozen=True)
class QuantizeReport:
    """What a conversion did: bytes of both checkpoints' tensors, and the process's peak memory."""

    seconds: float
    bytes_read: int
    bytes_written: int
    peak_host_bytes: int
    unused: list[str]


def quantize(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    config: Int8Config | None = None,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> QuantizeReport:
    """Write the int8 checkpoint of a 16-bit one: a folder, a preset's name or a hub id.

    The int8 values are those of `load_sharded_int8(source).save_int8(folder)`; what is not int8 keeps the dtype that it
    is stored in. Needs the memory of the staging buffers, whatever the model's size; a transposed layer (GPT-2) is held
    whole. Raises CheckpointError for a source that is wrong or int8 already, a folder that is taken, a full disk.
    """
    started = time.perf_counter()
    target = Path(os.path.abspath(folder))  # noqa: PTH100  (resolve() would follow a link that is to be replaced)
    check_target(target, overwrite)
    found = find_source(os.fspath(source), revision=revision)
    if found.folder is None:
        raise found.not_found()
    checkpoint = open_checkpoint(found.folder, trust_remote_code)
    _check_apart(checkpoint, target)
    settings = config or Int8Config()
    hf_config = read_hf_config(checkpoint, trust_remote_code)
    skeleton = checkpoint_skeleton(checkpoint, hf_config, settings, stored_dtype(checkpoint), trust_remote_code)
    transfers = match_tensors(skeleton.slots, checkpoint, skeleton.tensors)
    transfers.sort(key=lambda transfer: (transfer.tensor.file, transfer.tensor.start))
    tensors = [new for t in transfers for new in int8_tensors(t.slot.name, t.slot, t.tensor.dtype)]
    by_tensor = {transfer.tensor.name: transfer for transfer in transfers}
    total = sum(transfer.tensor.nbytes for transfer in transfers)
    stream = transfer_stream(transfers, sum(tensor.nbytes for tensor in tensors))
    with (
        new_checkpoint_folder(target, overwrite, sum(tensor.nbytes for tensor in tensors)) as partial,
        ShardWriter(partial, tensors, shard_bytes) as writer,
        LoadProgress([found.name], enabled=progress) as bars,
    ):
        copy_config_files(checkpoint.folder, partial)
        stream.run(
            lambda chunk: _write(writer, by_tensor[chunk.tensor.name], chunk),
            lambda done: bars.update(0, done, total),
        )
        skipped = [name for name, module in skeleton.model.named_modules() if is_linear(module)]
        writer.finish(checkpoint.config | {"quantization_config": quantization_config(settings.threshold, skipped)})
    return QuantizeReport(
        seconds=time.perf_counter() - started,
        bytes_read=stream.bytes_read,
        bytes_written=writer.total_bytes,
        peak_host_bytes=peak_host_bytes(),
        unused=unused_tensors(skeleton),
    )


def _check_apart(checkpoint: Checkpoint, target: Path) -> None:
    """Refuse a source that is int8 already, and a target that is the source or holds it."""
    if checkpoint.is_int8:
        raise CheckpointError(f"{checkpoint.folder}: is int8 already; load it as it is")
    source = Path(os.path.realpath(checkpoint.folder))
    if Path(os.path.realpath(target)) in (source, *source.parents):
        raise CheckpointError(f"{target}: is, or holds, the checkpoint that is read; name another folder")


def _write(writer: ShardWriter, transfer: Transfer, chunk: Chunk) -> None:
    name, module = transfer.slot.name, transfer.slot.name.rpartition(".")[0]
    data, scale_R = convert(transfer, chunk, TORCH_DTYPES[chunk.tensor.dtype])
    row_bytes = data.nbytes // max(1, chunk.row_stop - chunk.row_start)
    writer.write(name, data, 0 if transfer.whole else chunk.row_start * row_bytes)
    if scale_R is not None:
        writer.write(f"{module}.{SCALES}", scales_to_absmax(scale_R), 0 if transfer.whole else 4 * chunk.row_start)
        if chunk.row_start == 0:
            writer.write(f"{module}.{FORMAT}", torch.tensor(ROWS_AS_THEY_ARE, dtype=torch.uint8))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def command(
    source: Annotated[str, typer.Argument(help="A checkpoint folder, a preset or a hub id.")],
    folder: Annotated[Path, typer.Argument(help="Where the int8 checkpoint goes: a new folder.")],
    threshold: Annotated[float, typer.Option(min=0.0, help="Outlier threshold that is saved with it.")] = 6.0,
    skip_module: Annotated[
        list[str] | None, typer.Option(help="A module to leave as it is; the head if none is named. Repeatable.")
    ] = None,
    int8_head: Annotated[bool, typer.Option("--int8-head", help="The output head in int8 too.")] = False,
    shard_size: Annotated[str, typer.Option(help="The most a shard holds, as 500MB or 5GiB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")
    ] = False,
) -> None:
    """Write the int8 checkpoint of a 16-bit one; it needs little memory, however large the model."""
    skipped = tuple(skip_module) if skip_module else None
    config = Int8Config(threshold=threshold, skip_modules=skipped, int8_head=int8_head)
    report = quantize(
        source,
        folder,
        config,
        overwrite=overwrite,
        shard_bytes=parse_bytes("--shard-size", shard_size),
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    print(
        f"{folder}: {report.bytes_written / 1e9:.2f} GB of {report.bytes_read / 1e9:.2f} GB, written in "
        f"{report.seconds:.1f} s; peak memory {report.peak_host_bytes / 1e9:.2f} GB"
    )
    if report.unused:
        print(f"not used by the model, and left out: {', '.join(report.unused)}")


if __name__ == "__main__":
    run_command(app)
