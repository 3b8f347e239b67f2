"""Write a checkpoint with the exact layout of a preset's and random weights: something large to load and to time.

python benchmarks/synthesize.py PRESET FOLDER [--sparse] [--shard-size 5GB] [--dtype float16] [--seed N] [--layers N]

Linear and embedding weights are drawn from N(0, 0.02), norms are one and biases zero, so the model computes finite
numbers (and nonsense). The values are tiles of one block of random numbers, taken at random places in it: drawing
every number would be slower than the disk. Files are written past the page cache where the system can, so the first
read of a fresh checkpoint is a cold one. --sparse leaves what is random a hole in the file: a 350 GB checkpoint of
zeros that takes a few MB of disk, enough to try all that does not look at the values.
"""

import math
import mmap
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from numpy.typing import NDArray

from bigint8.checkpoint.headers import INDEX_FILE
from bigint8.checkpoint.writer import NewTensor, header_bytes, index_of, split, write_synced_json
from bigint8.errors import BigInt8Error
from bigint8.sources.presets import ModelPreset, find_preset, preset_names

Bits = NDArray[np.uint16] | NDArray[np.uint32]
Fill = Literal["random", "ones", "zeros"]

SPREAD = 0.02
"""Standard deviation of the weights, that of most models' initialisation."""

BLOCK_VALUES = 2**23
"""Random numbers that are drawn; everything is tiled from them."""

BUFFER_BYTES = 2**26
"""What is written at once."""

DIRECT_ALIGNMENT = 4096
"""Sizes and places of writes past the page cache are multiples of this."""

STORED_AS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class FilledTensor(NewTensor):
    """A tensor to be written, and what with."""

    fill: Fill


@dataclass(frozen=True)
class Summary:
    """What was written: `checkpoint_bytes` of files, holes included, that take `disk_bytes`, in `seconds`."""

    shards: int
    checkpoint_bytes: int
    disk_bytes: int
    seconds: float


def synthesize(
    preset: ModelPreset,
    folder: Path,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    layers: int | None = None,
    sparse: bool = False,
    seed: int = 0,
) -> Summary:
    """Write the preset's checkpoint, of `layers` blocks if given, in its own dtype if none is.

    Raises BigInt8Error for a folder that is not empty and a disk with too little room.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BigInt8Error(f"{folder}: exists and is not an empty folder; name a new one, or empty it first")
    dtype = dtype or preset.dtype
    hf_config = transformers_config(preset, dtype, layers)
    tensors = list_tensors(hf_config, STORED_AS[dtype])
    _check_room(folder, tensors, sparse)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    hf_config.save_pretrained(folder)
    shards = split(tensors, shard_bytes)
    values = None if sparse else RandomValues(dtype, seed)
    for file, shard in shards.items():
        if values is None:
            write_sparse(folder / file, shard, dtype)
        else:
            write_shard(folder / file, shard, dtype, values)
    if len(shards) > 1:
        file_of = {tensor.name: file for file, shard in shards.items() for tensor in shard}
        write_synced_json(folder / INDEX_FILE, index_of(file_of, sum(tensor.nbytes for tensor in tensors)))
    files = [file.stat() for file in folder.iterdir()]
    disk_bytes = sum(512 * stat.st_blocks for stat in files)
    return Summary(len(shards), sum(stat.st_size for stat in files), disk_bytes, time.perf_counter() - started)


def transformers_config(preset: ModelPreset, dtype: str, layers: int | None = None) -> Any:
    """The preset's config as transformers has it, with another number of blocks if `layers` is given."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = dict(preset.config)
    model_type = config.pop("model_type")
    if layers is not None:
        key = CONFIG_MAPPING[model_type].attribute_map.get("num_hidden_layers", "num_hidden_layers")
        config.pop("num_hidden_layers", None)
        config[key] = layers
    return AutoConfig.for_model(model_type, **config, dtype=dtype)


def list_tensors(hf_config: Any, dtype: str) -> list[FilledTensor]:
    """The tensors of a checkpoint in the order of the model, as the hub names them; what is tied stands once."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with init_empty_weights(include_buffers=True):  # each tensor is made on the meta device, none in memory
        model = AutoModelForCausalLM.from_config(hf_config)
    norms = {name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")}
    fills: dict[torch.Tensor, Fill] = {}
    state = model.state_dict()
    for tied in model.get_expanded_tied_weights_keys(all_submodels=True):
        state.pop(tied, None)
    for name, tensor in state.items():
        owner, _, attribute = name.rpartition(".")
        fills[tensor] = "zeros" if attribute == "bias" else "ones" if owner in norms else "random"
    stored = revert_weight_conversion(model, state)  # the hub's names where transformers has changed its own
    return [
        FilledTensor(name, dtype, tuple(tensor.shape), fills.get(tensor, "random")) for name, tensor in stored.items()
    ]


def _check_room(folder: Path, tensors: list[FilledTensor], sparse: bool) -> None:
    needed = sum(tensor.nbytes for tensor in tensors if not sparse or tensor.fill == "ones")
    there = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise BigInt8Error(
            f"{folder}: the checkpoint needs {needed:,} bytes and {free:,} are free there; free some, name a folder on "
            "another disk, or write less (--layers, --sparse)"
        )


def to_bits(values: NDArray[np.float32], dtype: str) -> Bits:
    """The values as they are stored, each as an unsigned integer; bfloat16 is rounded half up (finite values only)."""
    if dtype == "float32":
        return values.view(np.uint32)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    return ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)


class RandomValues:
    """Numbers from N(0, 0.02) at the speed of memory: runs of one block, each from a random place in it."""

    def __init__(self, dtype: str, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        drawn = self._rng.standard_normal(BLOCK_VALUES, dtype=np.float32)
        self._block = to_bits(drawn * np.float32(SPREAD), dtype)

    def runs(self, count: int) -> Iterator[Bits]:
        """`count` values in pieces."""
        while count:
            start = int(self._rng.integers(BLOCK_VALUES))
            run = self._block[start : start + count]
            count -= len(run)
            yield run


def write_shard(file: Path, tensors: list[FilledTensor], dtype: str, values: RandomValues) -> None:
    """One safetensors file, streamed through one buffer."""
    with DirectFile(file) as out:
        out.write(header_bytes(tensors))
        for tensor in tensors:
            if tensor.fill == "random":
                for run in values.runs(math.prod(tensor.shape)):
                    out.write(run.data.cast("B"))
            else:
                out.write(_constant(tensor, dtype))


def write_sparse(file: Path, tensors: list[FilledTensor], dtype: str) -> None:
    """One safetensors file whose only data on disk are the header and the norms' ones; all else are holes."""
    header = header_bytes(tensors)
    with file.open("wb") as out:
        out.truncate(len(header) + sum(tensor.nbytes for tensor in tensors))
        out.write(header)
        at = len(header)
        for tensor in tensors:
            if tensor.fill == "ones":
                out.seek(at)
                out.write(_constant(tensor, dtype))
            at += tensor.nbytes


def _constant(tensor: FilledTensor, dtype: str) -> bytes:
    """All values of a norm or a bias."""
    value = np.float32(tensor.fill == "ones")
    return to_bits(np.full(tensor.shape, value, dtype=np.float32), dtype).tobytes()


class DirectFile:
    """A file that is written from front to back in large aligned pieces, past the page cache if the system can.

    Through the cache, a file much larger than it is written at a fraction of the disk's speed.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        try:
            self._file = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
        except OSError:  # a file system that has no such writes
            self._file = os.open(path, flags, 0o644)
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)  # begins at a page, as such writes need
        self._filled = 0
        self._size = 0

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self._filled:
                self._flush(self._filled + -self._filled % DIRECT_ALIGNMENT)
            os.ftruncate(self._file, self._size)
        finally:
            os.close(self._file)
            self._buffer.close()

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        left = memoryview(data)
        while left:
            part = left[: BUFFER_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            self._size += len(part)
            left = left[len(part) :]
            if self._filled == BUFFER_BYTES:
                self._flush(BUFFER_BYTES)

    def _flush(self, nbytes: int) -> None:
        written = 0
        with memoryview(self._buffer) as buffer:
            while written < nbytes:
                with buffer[written:nbytes] as rest:
                    written += os.write(self._file, rest)
        self._filled = 0


def main(
    preset: Annotated[str, typer.Argument(help="A preset's name, as in configs/models.")],
    folder: Annotated[Path, typer.Argument(help="Where to write: a new or an empty folder.")],
    sparse: Annotated[bool, typer.Option("--sparse", help="Leave the weights holes: zeros that take no disk.")] = False,
    shard_size: Annotated[str, typer.Option(help="The most a shard holds, as 500MB or 5GiB.")] = "5GB",
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32; by default the preset's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights.")] = 0,
    layers: Annotated[int | None, typer.Option(min=1, help="Blocks to write, instead of all.")] = None,
) -> None:
    """Write a checkpoint with the layout of a preset's and random weights."""
    from accelerate.utils import convert_file_size_to_int

    try:
        found = find_preset(preset)
        if found is None:
            raise BigInt8Error(f"{preset}: no such preset; there are {', '.join(preset_names())}")
        if dtype is not None and dtype not in STORED_AS:
            raise BigInt8Error(f"--dtype {dtype}: must be {', '.join(STORED_AS)}")
        try:
            shard_bytes = convert_file_size_to_int(shard_size)
        except ValueError:
            raise BigInt8Error(f"--shard-size {shard_size}: write it as 500MB or 5GiB") from None
        made = synthesize(found, folder, dtype, shard_bytes, layers, sparse, seed)
    except BigInt8Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(
        f"{folder}: {made.checkpoint_bytes / 1e9:.2f} GB in {made.shards} shard{'s' if made.shards > 1 else ''}, "
        f"{made.disk_bytes / 1e9:.2f} GB of it on disk; written in {made.seconds:.1f} s, "
        f"{made.disk_bytes / made.seconds / 1e9:.2f} GB/s"
    )


if __name__ == "__main__":
    typer.run(main)
