"""How a checkpoint's rows are read: loading, checking and rewriting differ only in where the rows end up."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import psutil

from ..checkpoint.headers import Checkpoint
from ..model.skeleton import Skeleton, Slot
from ..plan.devices import available_memory
from .assign import Transfer, match_tensors, unused_tensors
from .convert import convert
from .host_memory import peak_host_bytes
from .stream import Chunk, RowStream

OnProgress = Callable[[int, int], None]
"""Called with the bytes that are done so far, and with the total."""


class Sink(Protocol):
    """Where rows end up."""

    def take(self, transfer: Transfer, chunk: Chunk) -> None:
        """Take a chunk of rows; several threads call this. Afterwards its buffer is reused."""

    def finish(self) -> None:
        """All rows are there: wait for what is still being done, and raise what was found on the way."""

    def abort(self) -> None:
        """Something failed: wait until nothing is written any more."""


@dataclass(frozen=True)
class Reading:
    """What was read: bytes, seconds from the first to the last, and the (file name, start, stop) of each read."""

    bytes_read: int
    seconds: float
    byte_ranges: list[tuple[str, int, int]] = field(repr=False)


class Intake:
    """A checkpoint on its way into a model's slots.

    slots: those to fill, all of the skeleton's by default
    transfers: what fills them, in no order; unused: the tensors that no module wants

    Raises CheckpointError for tensors that are missing, of another shape or dtype.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton, slots: Mapping[str, Slot] | None = None) -> None:
        self.slots = dict(skeleton.slots if slots is None else slots)
        self.transfers = match_tensors(self.slots, checkpoint, skeleton.tensors)
        self.unused = unused_tensors(skeleton)

    def run(
        self,
        sink: Sink,
        transfers: Sequence[Transfer] | None = None,
        on_progress: OnProgress | None = None,
        host_bytes: int = 0,
        gpus: int = 0,
    ) -> Reading:
        """Read the tensors of `transfers`, all by default, in file order, and give their rows to the sink.

        `gpus`: how many GPUs the sink writes to. `host_bytes`: what the sink makes of it in host memory. If the files
        and these bytes need more than half of the free memory, the files are read past the file cache, or they would
        push everything else out of it. Raises what the sink raises, and CheckpointError for a file that ends early.
        """
        transfers = self.transfers if transfers is None else transfers
        by_tensor = {transfer.tensor.name: transfer for transfer in transfers}
        total = sum(transfer.tensor.nbytes for transfer in transfers)
        stream = RowStream(
            [transfer.tensor for transfer in transfers],
            {transfer.tensor.name for transfer in transfers if transfer.whole},
            gpus=gpus,
            direct=2 * (total + host_bytes) > available_memory(),
        )
        started = time.perf_counter()
        try:
            stream.run(
                lambda chunk: sink.take(by_tensor[chunk.tensor.name], chunk),
                None if on_progress is None else lambda done: on_progress(done, total),
            )
        except BaseException:
            sink.abort()
            raise
        sink.finish()
        ranges = [(read.file.name, read.start, read.stop) for read in stream.reads]
        return Reading(stream.bytes_read, time.perf_counter() - started, ranges)


@dataclass(frozen=True)
class CheckReport:
    """What a dry run found. Bytes of tensors, of what the model would take in int8 and besides, and of this process:
    resident when reading began, at most while reading, and at most ever.

    `seconds` are of reading; `unused` are the tensors that no module wants.
    """

    tensors: int
    shards: int
    bytes_read: int
    seconds: float
    int8_bytes: int
    other_bytes: int
    first_rss_bytes: int
    most_rss_bytes: int
    peak_host_bytes: int
    unused: list[str]


class Discard:
    """A sink that checks and quantizes rows, and keeps none."""

    def take(self, transfer: Transfer, chunk: Chunk) -> None:
        convert(transfer, chunk, transfer.slot.dtype)

    def finish(self) -> None:
        """Nothing is left to do."""

    def abort(self) -> None:
        """Nothing is being written."""


def check_all(checkpoint: Checkpoint, skeleton: Skeleton, on_progress: OnProgress) -> CheckReport:
    """Read every tensor of a checkpoint as loading would, and keep none. Raises what a load raises."""
    intake = Intake(checkpoint, skeleton)
    process = psutil.Process()
    resident = [process.memory_info().rss]

    def watch(done: int, total: int) -> None:
        resident.append(process.memory_info().rss)
        on_progress(done, total)

    reading = intake.run(Discard(), on_progress=watch)
    slots = intake.slots.values()
    return CheckReport(
        tensors=len(intake.transfers),
        shards=len({transfer.tensor.file for transfer in intake.transfers}),
        bytes_read=reading.bytes_read,
        seconds=reading.seconds,
        int8_bytes=sum(slot.nbytes for slot in slots if slot.is_int8),
        other_bytes=sum(slot.nbytes for slot in slots if not slot.is_int8),
        first_rss_bytes=resident[0],
        most_rss_bytes=max(resident),
        peak_host_bytes=peak_host_bytes(),
        unused=intake.unused,
    )
