"""Where the int8 weights of offloaded blocks are kept: in the host's memory, in a file, or in the checkpoint itself.

They are quantized on their way there, chunk by chunk: no block is ever held in 16 bits. The file has no name while it
is used, so that its room on the disk is free again when the process ends, however it ends. An int8 checkpoint is that
file already.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BigInt8Error, PlanError
from ..families.layout import Family
from ..model.offload import ALIGNMENT, Extent, KeptBlock, OpenFile
from ..model.skeleton import Slot
from ..model.stage import owner
from ..plan.plan import Stage
from ..sources.gguf import cache_folder
from .assign import Step, Transfer
from .convert import convert
from .host_memory import HostMemory, MappedFiles, map_file
from .intake import Sink
from .pieces import Piece, pieces_of
from .stream import Chunk

PAGE_BYTES = 4096
"""Blocks begin at a multiple of this in the file."""


class Offload:
    """The int8 weights of some blocks of a model, beside their devices.

    names: of their slots; device_bytes: by "host" and "disk"; kept: the blocks, once `allocate` was called
    """

    def __init__(self, slots: Mapping[str, Slot], homes: Mapping[str, tuple[int, str]], folder: Path | None) -> None:
        """`homes`: the block of each slot to offload, and "host" or "disk"; `folder`: of the file, by default beside
        what is converted."""
        self.names = frozenset(homes)
        self.kept: dict[int, KeptBlock] = {}
        self._slots, self._homes = {name: slots[name] for name in homes}, homes
        self._folder = folder
        self._writers: dict[str, tuple[OpenFile, int]] = {}

    @property
    def device_bytes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, (_, home) in self._homes.items():
            found[home] = found.get(home, 0) + self._slots[name].data_bytes
        return found

    def allocate(
        self, transfers: Sequence[Transfer], devices: Mapping[str, str], together: Sequence[tuple[str, ...]]
    ) -> list[Transfer]:
        """Take the room for all of them; scales are on `devices`. Returns the transfers that need not be read.

        Raises PlanError for a folder that cannot be used or a disk with too little room.
        """
        mapped = self._map(transfers, devices)
        rest = {name: slot for name, slot in self._slots.items() if name not in mapped}
        labels = {name: f"block {self._homes[name][0]} {self._homes[name][1]}" for name in rest}
        blocks: dict[int, list[Piece]] = {}
        for piece in pieces_of(rest, labels, together):
            blocks.setdefault(self._homes[piece.slots[0].name][0], []).append(piece)
        sizes = {block: sum(_aligned(piece.nbytes) for piece in pieces) for block, pieces in blocks.items()}
        host = {block: size for block, size in sizes.items() if self._home(blocks[block]) == "host"}
        memory = self._memory(sum(host.values())) if host else None
        disk = {block: size for block, size in sizes.items() if block not in host}
        file, starts, whole = self._new_file(disk) if disk else (None, {}, torch.empty(0))
        for block, pieces in blocks.items():
            if memory is not None and block in host:
                extent = Extent(memory.take(torch.uint8, sizes[block]))
            else:
                extent = Extent(whole[starts[block] : starts[block] + sizes[block]], file, starts[block])
            self.kept[block] = KeptBlock((*self._extents(block), extent))
            self._fill(pieces, extent, devices)
        return [t for t in transfers if t.slot.name in mapped and t.step is Step.INT8]

    def _memory(self, size: int) -> HostMemory:
        try:
            return HostMemory(size)
        except OSError as error:
            raise PlanError(
                f"{size:,} bytes of offloaded weights do not go into the host's memory: {error.strerror}; what would "
                "help: a smaller max_memory for the CPU, which lets them go to the disk"
            ) from None

    def _home(self, pieces: Sequence[Piece]) -> str:
        return self._homes[pieces[0].slots[0].name][1]

    def _extents(self, block: int) -> tuple[Extent, ...]:
        return self.kept[block].extents if block in self.kept else ()

    def _map(self, transfers: Sequence[Transfer], devices: Mapping[str, str]) -> set[str]:
        """Let weights for the disk that an int8 checkpoint holds be its own bytes; returns their slots' names."""
        files, opened = MappedFiles(), dict[Path, OpenFile]()
        mapped = set()
        for transfer in transfers:
            slot, tensor = transfer.slot, transfer.tensor
            if slot.name not in self.names or self._homes[slot.name][1] != "disk" or transfer.step is not Step.INT8:
                continue
            data = files.tensor(tensor)
            if data is None:
                continue
            file = opened.get(tensor.file) or opened.setdefault(tensor.file, OpenFile(tensor.file))
            block = self._homes[slot.name][0]
            extent = Extent(data.view(torch.uint8).view(-1), file, tensor.start)
            self.kept[block] = KeptBlock((*self._extents(block), extent))
            slot.fill(data, torch.empty(slot.out_features, dtype=torch.float32, device=devices[slot.name]))
            mapped.add(slot.name)
        return mapped

    def _new_file(self, sizes: Mapping[int, int]) -> tuple[OpenFile, dict[int, int], Tensor]:
        """A file for blocks of these sizes: the file, where each begins, and its mapping, uint8."""
        starts, end = {}, 0
        for block, size in sizes.items():
            starts[block], end = end, end + -(-size // PAGE_BYTES) * PAGE_BYTES
        folder = self._folder or cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix="bigint8-offload-", dir=folder)
            path = Path(name)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(descriptor, 0, end)
                else:
                    os.truncate(descriptor, end)
                file, mapping = OpenFile(path, os.O_RDWR), map_file(path)
            finally:
                os.close(descriptor)
                with contextlib.suppress(OSError):
                    path.unlink()  # it goes when the last of those that hold it does
        except OSError as error:
            raise PlanError(
                f"{folder}: {end:,} bytes of offloaded weights do not go there: {error.strerror}; free some, or name "
                "another folder: offload_folder=, or the environment's BIGINT8_CACHE"
            ) from None
        return file, starts, torch.frombuffer(mapping, dtype=torch.uint8)

    def _fill(self, pieces: Sequence[Piece], extent: Extent, devices: Mapping[str, str]) -> None:
        at = 0
        for piece in pieces:
            data = extent.data[at : at + piece.nbytes].view(torch.int8).view(piece.shape)
            piece.fill(data, piece.scales(devices[piece.slots[0].name]))
            start = extent.start + at
            for slot in piece.slots:
                if extent.file is not None:
                    self._writers[slot.name] = (extent.file, start)
                start += slot.data_bytes
            at += _aligned(piece.nbytes)

    def sink(self, rest: Sink) -> Sink:
        """What takes the rows of these weights, and gives all others to `rest`."""
        return _OffloadSink(self.names, self._writers, rest)


class _OffloadSink:
    def __init__(self, names: frozenset[str], writers: Mapping[str, tuple[OpenFile, int]], rest: Sink) -> None:
        self._names, self._writers, self._rest = names, writers, rest

    def take(self, transfer: Transfer, chunk: Chunk) -> None:
        slot = transfer.slot
        if slot.name not in self._names or transfer.step in (Step.SCALES, Step.FORMAT):
            self._rest.take(transfer, chunk)
            return
        data, scale_R = convert(transfer, chunk, torch.int8)
        rows = slice(0, len(data)) if transfer.whole else slice(chunk.row_start, chunk.row_stop)
        if slot.name in self._writers:
            file, start = self._writers[slot.name]
            file.write(data.reshape(-1).view(torch.uint8).numpy().data, start + rows.start * data[0].numel())
        else:
            getattr(slot.module, slot.attribute).data[rows] = data
        if scale_R is not None:
            slot.module.scale[rows] = scale_R  # type: ignore[index, operator]

    def finish(self) -> None:
        self._rest.finish()

    def abort(self) -> None:
        self._rest.abort()


def offload_of(
    stages: Sequence[Stage], slots: Mapping[str, Slot], family: Family, folder: str | os.PathLike[str] | None = None
) -> Offload | None:
    """What these stages of a plan offload of the slots; None for nothing. Raises BigInt8Error where it cannot be."""
    homes = {family.block(block): (block, "host") for stage in stages for block in stage.host_blocks}
    homes |= {family.block(block): (block, "disk") for stage in stages for block in stage.disk_blocks}
    if not homes:
        return None
    if sys.platform == "win32":
        raise BigInt8Error("offloaded blocks are read from files as Windows does not read them; use more memory")
    owners = {name: owner(name, family) for name, slot in slots.items() if slot.is_int8}
    found = {name: homes[module] for name, module in owners.items() if module in homes}
    return Offload(slots, found, None if folder is None else Path(folder))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
