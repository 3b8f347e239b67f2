"""Saving int8 checkpoints: sharded safetensors as bitsandbytes has them, in a folder that appears when it is whole.

Everything is written into a partial folder beside the wanted one, which takes its place at the end.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import CheckpointError
from .linear import Int8Embedding, Int8Linear, is_linear
from .planner import readable
from .shards import SHARD_BYTES, NewTensor, ShardWriter
from .stage import Slot, model_slots
from .stored_int8 import FORMAT, ROWS_AS_THEY_ARE, SCALES, quantization_config, scales_to_absmax
from .stream import TORCH_DTYPES

SLICE_BYTES = 2**26
"""What is written of a tensor at once, and copied from a GPU for it."""

CONFIG_FILES = ("*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.py")
"""What a checkpoint's folder holds besides weights; config.json and indices are written anew."""

STORED_AS = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def int8_tensors(name: str, slot: Slot, dtype: str) -> list[NewTensor]:
    """What is written of a slot; `dtype` is that of a slot that is not int8."""
    if not slot.is_int8:
        return [NewTensor(name, dtype, slot.data_shape)]
    module = name.rpartition(".")[0]
    return [
        NewTensor(name, "I8", slot.data_shape),
        NewTensor(f"{module}.{SCALES}", "F32", (slot.out_features,)),
        NewTensor(f"{module}.{FORMAT}", "U8", ()),
    ]


@contextlib.contextmanager
def new_checkpoint_folder(folder: Path, overwrite: bool, needed_bytes: int) -> Iterator[Path]:
    """A folder to write into, beside the one that is wanted, which it becomes when the block ends without an error.

    After an error it is removed. One that a killed process left is removed by the next save to the same place. Raises
    CheckpointError for a place that is taken, unless it is a checkpoint that may be overwritten, and a full disk.
    """
    check_target(folder, overwrite)
    partial = folder.parent / f".{folder.name}.partial"
    lock = None
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = _lock(partial, folder)
        try:
            _empty(partial)
            free = shutil.disk_usage(partial).free
            if free < needed_bytes:
                reason = f"{readable(needed_bytes)} are needed, {readable(free)} are free"
                raise CheckpointError(_no_room(folder, reason))
            yield partial
            check_target(folder, overwrite)
            _replace(folder, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = f"{error.strerror} while writing {readable(needed_bytes)}"
            raise CheckpointError(_no_room(folder, reason)) from None
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror}") from None
    finally:
        if lock is not None:
            os.close(lock)


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise CheckpointError if the folder is there already and may not, or must not, be replaced."""
    try:
        if not os.path.lexists(folder):
            return
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: exists and is no folder; name another place")
        if not any(folder.iterdir()):
            return
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror}") from None
    if not overwrite:
        raise CheckpointError(f"{folder}: exists already; name another folder, or ask to overwrite it (--overwrite)")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: exists and is no checkpoint, so it is not overwritten; name another folder")


def copy_config_files(source: Path, target: Path) -> None:
    """Tokenizer, generation settings and the like, beside the weights."""
    for pattern in CONFIG_FILES:
        for file in source.glob(pattern):
            if file.is_file() and file.name != "config.json" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)


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

    The layout is that of bitsandbytes (`bigint8.stored_int8`). The folder appears when everything is written, so a save
    that is killed leaves none that loads. Raises CheckpointError for a folder that is taken and a full disk.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100  (resolve() would follow a link that is to be replaced)
    slots = model_slots(model)
    int8_layers = [m for m in model.modules() if isinstance(m, Int8Linear)]
    if not int8_layers:
        raise CheckpointError(f"{folder}: the model has no int8 layer; save_pretrained saves 16-bit models")
    tensors = [t for name, slot in slots.items() for t in int8_tensors(name, slot, STORED_AS.get(slot.dtype, ""))]
    skipped = [name for name, module in model.named_modules() if is_linear(module)]
    origin = Path(str(getattr(model, "name_or_path", "") or ""))
    with new_checkpoint_folder(folder, overwrite, sum(tensor.nbytes for tensor in tensors)) as partial:
        if (origin / "config.json").is_file():
            copy_config_files(origin, partial)
        with ShardWriter(partial, tensors, shard_bytes) as writer:
            for name, slot in slots.items():
                _save_slot(writer, name, slot)
            config = json.loads(model.config.to_json_string())  # type: ignore[union-attr, operator]
            config |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
            writer.finish(config | {"quantization_config": quantization_config(int8_layers[0].threshold, skipped)})


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
        module = name.rpartition(".")[0]
        writer.write(f"{module}.{SCALES}", scales_to_absmax(slot.module.scale.cpu()))
        writer.write(f"{module}.{FORMAT}", torch.tensor(ROWS_AS_THEY_ARE, dtype=torch.uint8))


def _lock(partial: Path, folder: Path) -> int | None:
    """Hold the partial folder against other saves, for as long as the descriptor is open."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return None
    descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino != partial.stat().st_ino:  # the other save is through: this is its result
            raise BlockingIOError
    except OSError:
        os.close(descriptor)
        raise CheckpointError(f"{folder}: another process is saving there; wait for it, or name another one") from None
    return descriptor


def _empty(folder: Path) -> None:
    """Remove what a killed save has left."""
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _replace(folder: Path, partial: Path) -> None:
    """The new folder takes the place of the old one, which is removed after that."""
    if not folder.exists():
        partial.rename(folder)
        return
    old = folder.parent / f".{folder.name}.replaced"
    _remove(old)
    folder.rename(old)
    partial.rename(folder)
    _remove(old)


def _remove(folder: Path) -> None:
    """Remove a folder, or a link to one, if it is there."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _no_room(folder: Path, reason: str) -> str:
    return f"{folder}: no room on the disk: {reason}. Nothing was kept; free some, or name a folder on another disk"
