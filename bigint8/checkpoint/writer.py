"""Writing safetensors files: the shards of a checkpoint, their headers and their index.

The sizes of all tensors are known before the first byte is written, so the shards are laid out, and their room on the
disk is taken, up front; rows are then written to their places in any order.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..options import SHARD_BYTES
from ..units import SAFETENSORS_BITS
from .headers import INDEX_FILE, SINGLE_FILE
from .int8_format import FORMAT, ROWS_AS_THEY_ARE, SCALES, scales_to_absmax

HEADER_ALIGNMENT = 64
"""Data begin at a multiple of this, so that each tensor can begin at a multiple of its item size, and be mapped."""


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * SAFETENSORS_BITS[self.dtype] // 8


def int8_tensors(name: str, shape: tuple[int, ...]) -> list[NewTensor]:
    """What is written of an int8 weight (out_features, in_features): values, scales and the note of its format."""
    module = name.rpartition(".")[0]
    return [
        NewTensor(name, "I8", shape),
        NewTensor(f"{module}.{SCALES}", "F32", shape[:1]),
        NewTensor(f"{module}.{FORMAT}", "U8", ()),
    ]


AnyTensor = TypeVar("AnyTensor", bound=NewTensor)


def split(tensors: Sequence[AnyTensor], shard_bytes: int) -> dict[str, list[AnyTensor]]:
    """File names, and their tensors: in order, as many as fit; one that is larger than a shard has its own."""
    shards: list[list[AnyTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}


def header_bytes(tensors: Sequence[NewTensor]) -> bytes:
    """The header of a file with these tensors, in their order: its length in 8 bytes, then JSON, padded with blanks."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        at += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def index_of(file_of: Mapping[str, str], total_bytes: int) -> dict[str, Any]:
    """The index: in which file each tensor is."""
    return {"metadata": {"total_size": total_bytes}, "weight_map": dict(file_of)}


class ShardWriter:
    """The shards of a checkpoint, open for writing in any order and from any thread."""

    def __init__(self, folder: Path, tensors: Sequence[NewTensor], shard_bytes: int = SHARD_BYTES) -> None:
        """Lay the shards out, write their headers and take their room on the disk."""
        self._places: dict[str, tuple[int, int]] = {}  # descriptor and offset of each tensor
        self._descriptors: list[int] = []
        self.folder, self.total_bytes = folder, sum(tensor.nbytes for tensor in tensors)
        self._file_of: dict[str, str] = {}
        try:
            for file, shard in split(tensors, shard_bytes).items():
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
        ordered = sorted(tensors, key=lambda tensor: -SAFETENSORS_BITS[tensor.dtype])
        header = header_bytes(ordered)
        start = len(header)
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._descriptors.append(descriptor)
        for tensor in ordered:
            self._places[tensor.name] = (descriptor, start)
            start += tensor.nbytes
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, start)
        else:
            os.truncate(descriptor, start)
        _write_all(descriptor, header, 0)

    def write(self, name: str, data: Tensor, first_byte: int = 0) -> None:
        """Write values of a tensor, in its stored dtype and contiguous on the CPU, `first_byte` bytes into it."""
        descriptor, start = self._places[name]
        if data.numel():
            _write_all(descriptor, data.reshape(-1).view(torch.uint8).numpy().data, start + first_byte)

    def write_scales(self, name: str, scale_R: Tensor, first_row: int = 0) -> None:
        """Write scales of the int8 weight `name`, from `first_row` on; with the first row also the format's note."""
        module = name.rpartition(".")[0]
        self.write(f"{module}.{SCALES}", scales_to_absmax(scale_R), 4 * first_row)
        if first_row == 0:
            self.write(f"{module}.{FORMAT}", torch.tensor(ROWS_AS_THEY_ARE, dtype=torch.uint8))

    def finish(self, config: dict[str, Any]) -> None:
        """Everything is written: flush it to the disk, then write the index and config.json, without which no loader
        takes the folder for a checkpoint."""
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        if len(self._descriptors) > 1:
            write_synced_json(self.folder / INDEX_FILE, index_of(self._file_of, self.total_bytes))
        write_synced_json(self.folder / "config.json", config)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


def _write_all(descriptor: int, data: Any, at: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(descriptor, view, at)
        view, at = view[count:], at + count


def write_synced_json(file: Path, value: dict[str, Any]) -> None:
    """Write a file of JSON and flush it to the disk."""
    with file.open("w", encoding="utf-8") as out:
        out.write(json.dumps(value, indent=2) + "\n")
        out.flush()
        os.fsync(out.fileno())
