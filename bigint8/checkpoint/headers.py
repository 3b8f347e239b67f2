"""Safetensors headers and the index, read without loading a byte of weights; all validation of untrusted files.

A safetensors file is: 8 bytes, the header's length N (unsigned, little-endian); N bytes of JSON, an object that maps
each tensor's name to its dtype, shape and [begin, end) within the data, and may hold `__metadata__`, strings to
strings; then the data, which the tensors cover exactly: no overlap, no hole, nothing left over.
Source: https://github.com/huggingface/safetensors, "Format".
"""

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..options import Access
from ..units import SAFETENSORS_BITS, STORED_FLOATS, TORCH_NAMES
from .int8_format import FORMAT, SCALES, is_int8_config
from .sizes import check_sizes

MAX_HEADER_BYTES = 100_000_000
"""The limit that the safetensors library sets too."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes of `file` from byte `start` on, row after row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Size of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def stop(self) -> int:
        return self.start + self.nbytes


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a config and safetensors shards, headers read and checked."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(repr=False)

    @property
    def is_int8(self) -> bool:
        """Whether its linear layers are in int8 already."""
        return is_int8_config(self.config)

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def shards(self) -> list[Path]:
        return sorted({tensor.file for tensor in self.tensors.values()})

    @cached_property
    def int8_modules(self) -> frozenset[str]:
        """The modules that it holds in int8, by its own names for them."""
        ending = f".{SCALES}"
        return frozenset(name.removesuffix(ending) for name in self.tensors if self.is_int8 and name.endswith(ending))

    @cached_property
    def stored_dtype(self) -> str:
        """The float format of most of the bytes, by torch's name. int8 weights and their scales do not count.

        Raises CheckpointError for a checkpoint without such tensors.
        """
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            if tensor.dtype in STORED_FLOATS and not tensor.name.endswith((f".{SCALES}", f".{FORMAT}")):
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        if not sizes:
            check_weight_dtypes(self.tensors.values())
            raise CheckpointError(f"{self.folder}: the checkpoint holds no tensors")
        return TORCH_NAMES[max(sizes, key=lambda dtype: sizes[dtype])]


def open_checkpoint(folder: str | os.PathLike[str], access: Access = Access()) -> Checkpoint:  # noqa: B008  (frozen)
    """Read and check the config, the index and every shard's header of a local checkpoint folder.

    Raises CheckpointError for whatever is wrong with them. No weights are read.
    """
    folder = Path(folder)
    config = read_config(folder, access)
    checkpoint = Checkpoint(folder, config, _read_tensors(folder))
    check_sizes(folder / "config.json", config, {name: tensor.shape for name, tensor in checkpoint.tensors.items()})
    if checkpoint.is_int8 and not any(name.endswith(f".{SCALES}") for name in checkpoint.tensors):
        raise CheckpointError(
            f"{folder / 'config.json'}: its quantization_config describes int8 weights, but no tensor holds their "
            f"scales (.{SCALES}). If the weights are not int8, remove quantization_config; else save the model again"
        )
    return checkpoint


def read_config(folder: Path, access: Access = Access()) -> dict[str, Any]:  # noqa: B008  (frozen)
    """The folder's config.json, refused if it asks for remote code or for weights quantized by something else."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no config.json, so the model's architecture is unknown; copy it from where the weights are from"
        )
    config = _read_json_object(path)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path}: no model_type, so the model's architecture is unknown")
    if "auto_map" in config and not access.trust_remote_code and not _is_native(config["model_type"]):
        raise CheckpointError(
            f"{path}: model type {config['model_type']!r} needs Python code that comes with the checkpoint. Read that "
            "code first; then allow it with trust_remote_code=True"
        )
    quantized = config.get("quantization_config") or config.get("compression_config")
    if quantized and not is_int8_config(config):
        method = quantized.get("quant_method", "an unnamed method") if isinstance(quantized, dict) else quantized
        raise CheckpointError(
            f"{path}: the checkpoint is already quantized ({method}); bigint8 reads float16, bfloat16 and float32 "
            "weights, and int8 ones as bitsandbytes and bigint8 save them, so name the original checkpoint"
        )
    return config


def _is_native(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        if (size := path.stat().st_size) > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: {size:,} bytes, more than the {MAX_HEADER_BYTES:,} that are read of JSON")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, not an object; download it again")
    return value


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    if (folder / SINGLE_FILE).is_file():
        return {tensor.name: tensor for tensor in read_header(folder / SINGLE_FILE)}
    if (folder / INDEX_FILE).is_file():
        return _read_indexed(folder)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1 and "-of-" not in found[0].name:
        return {tensor.name: tensor for tensor in read_header(found[0])}
    if found:
        raise CheckpointError(
            f"{folder}: {len(found)} safetensors files but no {INDEX_FILE}; the download is incomplete, fetch it again"
        )
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: only pickle weights ({pickles[0]}{', ...' if len(pickles) > 1 else ''}), which run code when "
            f"opened and are never opened here. If you trust them, convert once: {how_to_convert(folder)}"
        )
    raise CheckpointError(f"{folder}: no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def how_to_convert(model: object) -> str:
    """The command that turns pickles, of a folder or a hub id, into safetensors."""
    return (
        'python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{model}', dtype='auto').save_pretrained('NEW_FOLDER')\""
    )


def _read_indexed(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX_FILE
    weight_map = _read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map; download it again")
    names_by_file: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            raise CheckpointError(f"{index}: tensor {name!r} is mapped to {file!r}, not to a file name")
        names_by_file.setdefault(file, set()).add(name)
    tensors: dict[str, TensorInfo] = {}
    for file, names in sorted(names_by_file.items()):
        check_shard_name(index, file)
        path = folder / file
        if not _is_file(path):
            raise CheckpointError(f"{index}: names shard {file}, which is not in the folder; download {path}")
        header = {tensor.name: tensor for tensor in read_header(path)}
        if absent := sorted(names - header.keys()):
            raise CheckpointError(f"{path}: tensor {absent[0]!r} is in {INDEX_FILE} but not in this shard")
        if extra := sorted(header.keys() - names):
            where = weight_map.get(extra[0])
            there = f"which places it in {where}" if where else "which does not name it"
            raise CheckpointError(f"{path}: tensor {extra[0]!r} is in this shard but not in {INDEX_FILE}, {there}")
        tensors |= header
    return tensors


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long to be one
        return False


def check_shard_name(index: Path, file: str) -> None:
    """Raise CheckpointError unless a shard lies in the checkpoint's folder or below it.

    An index must not point at other files of this machine.
    """
    parts = re.split(r"[/\\]", file)
    if file.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", file) or "\0" in file:
        raise CheckpointError(f"{index}: names shard {file!r}, which is outside the checkpoint's folder; refused")


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file in file order. Raises CheckpointError for a file that breaks the format."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file; download it again")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: header of {length:,} bytes, more than the format's limit of {MAX_HEADER_BYTES:,}; "
                    "this is not a safetensors file, or a damaged one"
                )
            if length > size - 8:
                raise CheckpointError(
                    f"{path}: header of {length:,} bytes in a file of {size:,}; truncated or damaged, download it again"
                )
            header = _parse_header(path, file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ does not map strings to strings")
    data_start = 8 + length
    tensors = [_parse_entry(path, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_cover(path, tensors, data_start, size)
    return tensors


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: {twice!r} stands twice in the header")
        return result

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error}); download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(header).__name__}, not an object")
    return header


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63

    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: tensor {name!r} is described by {entry!r}, not by an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_BITS:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype!r}, which safetensors does not define")
    if not isinstance(shape, list) or not all(is_size(size) for size in shape):
        raise CheckpointError(f"{path}: tensor {name!r} has shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(offset) for offset in offsets):
        raise CheckpointError(f"{path}: tensor {name!r} has data_offsets {offsets!r}")
    begin, end = offsets
    if end < begin:
        raise CheckpointError(f"{path}: tensor {name!r} has data_offsets {offsets} that run backwards")
    needed_bits = math.prod(shape) * SAFETENSORS_BITS[dtype]
    if needed_bits != 8 * (end - begin):
        raise CheckpointError(
            f"{path}: tensor {name!r} of dtype {dtype} and shape {shape} needs {-(-needed_bits // 8):,} bytes, "
            f"but its data_offsets give it {end - begin:,}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def _check_cover(path: Path, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    """The data is covered exactly: every byte belongs to one tensor. `tensors` are in file order."""
    at, previous = data_start, "the header"
    for tensor in tensors:
        if tensor.start < at:
            raise CheckpointError(f"{path}: tensor {tensor.name!r} overlaps {previous} by {at - tensor.start:,} bytes")
        if tensor.start > at:
            raise CheckpointError(
                f"{path}: a hole of {tensor.start - at:,} bytes between {previous} and tensor {tensor.name!r}"
            )
        at, previous = tensor.stop, f"tensor {tensor.name!r}"
    if at > size:
        last = next(tensor for tensor in tensors if tensor.stop > size)
        raise CheckpointError(
            f"{path}: truncated: tensor {last.name!r} ends at byte {last.stop:,} of a file of {size:,}; the header "
            f"describes {at:,} bytes, so download the shard again"
        )
    if at < size:
        raise CheckpointError(f"{path}: {size - at:,} bytes after {previous} that belong to no tensor")


def check_weight_dtypes(tensors: Iterable[TensorInfo]) -> None:
    """Raise CheckpointError for the first tensor stored as something that cannot be loaded as a weight."""
    for tensor in tensors:
        if tensor.dtype not in STORED_FLOATS:
            hint = "; int8 weights need the quantization_config and scales of bitsandbytes" * (tensor.dtype == "I8")
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} is stored as {tensor.dtype}; weights must be "
                f"{', '.join(STORED_FLOATS[:-1])} or {STORED_FLOATS[-1]}{hint}"
            )
