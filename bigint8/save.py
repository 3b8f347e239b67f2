"""Saving int8 checkpoints: sharded safetensors as bitsandbytes has them, in a folder that appears when it is whole.

The sizes of all tensors are known before the first byte is written, so the shards are laid out, and their room on the
disk is taken, up front; rows are then written to their places in any order.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import DTYPE_BITS, INDEX_FILE, SINGLE_FILE
from .errors import CheckpointError
from .linear import Int8Embedding, Int8Linear, is_linear
from .planner import readable
from .stage import Slot, model_slots
from .stored_int8 import FORMAT, ROWS_AS_THEY_ARE, SCALES, quantization_config, scales_to_absmax
from .stream import TORCH_DTYPES

SHARD_BYTES = 5 * 10**9
"""The most that a shard holds, unless one tensor is larger: what transformers writes, too."""

SLICE_BYTES = 2**26
"""What is written of a tensor at once, and copied from a GPU for it."""

CONFIG_FILES = ("*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.py")
"""What a checkpoint's folder holds besides weights; config.json and indices are written anew."""

STORED_AS = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


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


class ShardWriter:
    """The shards of a checkpoint, open for writing in any order and from any thread."""

    def __init__(self, folder: Path, tensors: Sequence[NewTensor], shard_bytes: int = SHARD_BYTES) -> None:
        """Lay the shards out, write their headers and take their room on the disk."""
        self._places: dict[str, tuple[int, int]] = {}  # descriptor and offset of each tensor
        self._descriptors: list[int] = []
        self.folder, self.total_bytes = folder, sum(tensor.nbytes for tensor in tensors)
        self._file_of: dict[str, str] = {}
        shards = _split(tensors, shard_bytes)
        try:
            for i, shard in enumerate(shards):
                file = SINGLE_FILE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
                self._begin(folder / file, shard)
                self._file_of |= dict.fromkeys((tensor.name for tensor in shard), file)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, file: Path, tensors: Sequence[NewTensor]) -> None:
        # Large items first: then each tensor begins at a multiple of its item size, and can be mapped.
        ordered = sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor in ordered:
            offsets = [at, at + tensor.nbytes]
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
            at += tensor.nbytes
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-(8 + len(header)) % 64)
        start = 8 + len(header)
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._descriptors.append(descriptor)
        for tensor in ordered:
            self._places[tensor.name] = (descriptor, start)
            start += tensor.nbytes
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, start)
        else:
            os.truncate(descriptor, start)
        _write_all(descriptor, len(header).to_bytes(8, "little") + header, 0)

    def write(self, name: str, data: Tensor, first_byte: int = 0) -> None:
        """Write values of a tensor, in its stored dtype and contiguous on the CPU, `first_byte` bytes into it."""
        descriptor, start = self._places[name]
        if data.numel():
            _write_all(descriptor, data.reshape(-1).view(torch.uint8).numpy().data, start + first_byte)

    def finish(self, config: dict[str, Any]) -> None:
        """Everything is written: flush it to the disk, then write the index and config.json, without which no loader
        takes the folder for a checkpoint."""
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        if len(self._descriptors) > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self._file_of}
            _write_json(self.folder / INDEX_FILE, index)
        _write_json(self.folder / "config.json", config)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


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


def _split(tensors: Sequence[NewTensor], shard_bytes: int) -> list[list[NewTensor]]:
    """Tensors in order, as many a shard as fit."""
    shards: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _write_all(descriptor: int, data: Any, at: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(descriptor, view, at)
        view, at = view[count:], at + count


def _write_json(file: Path, value: dict[str, Any]) -> None:
    with file.open("w", encoding="utf-8") as out:
        out.write(json.dumps(value, indent=2) + "\n")
        out.flush()
        os.fsync(out.fileno())


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
