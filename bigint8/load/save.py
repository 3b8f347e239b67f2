"""Writing int8 checkpoints as bitsandbytes has them: of a loaded model, or straight from a 16-bit checkpoint."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoint.folder import absolute, copy_config_files, new_checkpoint_folder
from ..checkpoint.headers import Checkpoint
from ..checkpoint.int8_format import quantization_config
from ..checkpoint.writer import NewTensor, ShardWriter, int8_tensors
from ..errors import CheckpointError
from ..model.layers import Int8Embedding, Int8Linear, Linear16bit, is_linear
from ..model.skeleton import Skeleton, Slot, model_slots
from ..options import SHARD_BYTES
from .assign import Transfer
from .convert import convert
from .host_memory import peak_host_bytes
from .intake import Intake, OnProgress
from .stream import TORCH_DTYPES, Chunk

SLICE_BYTES = 2**26
"""What is written of a tensor at once, and copied from a GPU for it."""

STORED_AS = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def save_int8(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Save a model with int8 layers as sharded safetensors, with index, config and tokenizer.

    folder: a new or an empty folder; with `overwrite`, also one that holds a checkpoint, which is replaced as a whole
    shard_bytes: the most that one file holds, unless a single tensor is larger

    The layout is that of bitsandbytes (`bigint8.checkpoint.int8_format`). The folder appears when everything is
    written, so a save that is killed leaves none that loads. Raises CheckpointError for a folder that is taken and a
    full disk.
    """
    target = absolute(folder)
    slots = model_slots(model)
    int8_layers = [m for m in model.modules() if isinstance(m, Int8Linear)]
    if not int8_layers:
        raise CheckpointError(f"{target}: the model has no int8 layer; save_pretrained saves 16-bit models")
    tensors = _new_tensors({name: (slot, STORED_AS.get(slot.dtype, "")) for name, slot in slots.items()})
    origin = Path(str(getattr(model, "name_or_path", "") or ""))
    with new_checkpoint_folder(target, overwrite, sum(tensor.nbytes for tensor in tensors)) as partial:
        if (origin / "config.json").is_file():
            copy_config_files(origin, partial)
        with ShardWriter(partial, tensors, shard_bytes) as writer:
            for name, slot in slots.items():
                _save_slot(writer, name, slot)
            config = json.loads(model.config.to_json_string())  # type: ignore[union-attr, operator]
            config |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
            writer.finish(_int8_config(config, model, int8_layers[0].threshold))


def _new_tensors(slots: Mapping[str, tuple[Slot, str]]) -> list[NewTensor]:
    """What is written of slots, given with the format of those that are not int8."""
    tensors = []
    for name, (slot, stored) in slots.items():
        shape = slot.data_shape
        tensors += int8_tensors(name, shape) if slot.is_int8 else [NewTensor(name, stored, shape)]
    return tensors


def _int8_config(config: Mapping[str, Any], model: nn.Module, threshold: float) -> dict[str, Any]:
    """config.json of the int8 checkpoint, with the linear layers that are not int8 as skipped."""
    skipped = [name for name, module in model.named_modules() if is_linear(module) or isinstance(module, Linear16bit)]
    return {**config, "quantization_config": quantization_config(threshold, skipped)}


def _save_slot(writer: ShardWriter, name: str, slot: Slot) -> None:
    data: Tensor = getattr(slot.module, slot.attribute).detach()
    rows = max(1, SLICE_BYTES // max(1, data[0].nbytes)) if data.ndim and data.numel() else 1
    if data.ndim:
        for start in range(0, len(data), rows):
            part = data[start : start + rows].cpu().contiguous()
            writer.write(name, part, start * data[0].nbytes)
    else:
        writer.write(name, data.cpu())
    if isinstance(slot.module, Int8Linear | Int8Embedding) and slot.is_int8:
        writer.write_scales(name, slot.module.scale.cpu())


# --- from checkpoint to checkpoint ---


@dataclass(frozen=True)
class QuantizeReport:
    """What a conversion did: bytes of both checkpoints' tensors, and the process's peak memory."""

    seconds: float
    bytes_read: int
    bytes_written: int
    peak_host_bytes: int
    unused: list[str]


class ShardSink:
    """Rows into the files of an int8 checkpoint."""

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer

    def take(self, transfer: Transfer, chunk: Chunk) -> None:
        name = transfer.slot.name
        first_row = 0 if transfer.whole else chunk.row_start
        data, scale_R = convert(transfer, chunk, TORCH_DTYPES[chunk.tensor.dtype])
        row_bytes = data.nbytes // max(1, chunk.row_stop - chunk.row_start)
        self._writer.write(name, data, first_row * row_bytes)
        if scale_R is not None:
            self._writer.write_scales(name, scale_R, first_row)

    def finish(self) -> None:
        """Nothing is left to do: `take` has written it."""

    def abort(self) -> None:
        """Nothing is still being written: `take` waits."""


def rewrite(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    folder: str | os.PathLike[str],
    threshold: float,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    on_progress: OnProgress | None = None,
) -> QuantizeReport:
    """Write the int8 checkpoint of a 16-bit one, without holding the model: what is read is quantized and written.

    What is not int8 keeps the dtype that it is stored in; `threshold` is saved with it. Raises CheckpointError for a
    source that is wrong or int8 already, a folder that is taken, a full disk.
    """
    started = time.perf_counter()
    target = absolute(folder)
    intake = Intake(checkpoint, skeleton)
    ordered = sorted(intake.transfers, key=lambda transfer: (transfer.tensor.file, transfer.tensor.start))
    tensors = _new_tensors({t.slot.name: (t.slot, t.tensor.dtype) for t in ordered})
    total = sum(tensor.nbytes for tensor in tensors)
    with (
        new_checkpoint_folder(target, overwrite, total) as partial,
        ShardWriter(partial, tensors, shard_bytes) as writer,
    ):
        copy_config_files(checkpoint.folder, partial)
        reading = intake.run(ShardSink(writer), on_progress=on_progress, host_bytes=total)
        writer.finish(_int8_config(checkpoint.config, skeleton.model, threshold))
    return QuantizeReport(
        seconds=time.perf_counter() - started,
        bytes_read=reading.bytes_read,
        bytes_written=writer.total_bytes,
        peak_host_bytes=peak_host_bytes(),
        unused=intake.unused,
    )


def check_apart(checkpoint: Checkpoint, target: Path) -> None:
    """Refuse a source that is int8 already, and a target that is the source or holds it."""
    if checkpoint.is_int8:
        raise CheckpointError(f"{checkpoint.folder}: is int8 already; load it as it is")
    source = Path(os.path.realpath(checkpoint.folder))
    if Path(os.path.realpath(target)) in (source, *source.parents):
        raise CheckpointError(f"{target}: is, or holds, the checkpoint that is read; name another folder")
