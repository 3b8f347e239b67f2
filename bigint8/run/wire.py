"""How messages look on a connection: a header of fixed size, then arrays one after the other. Nothing is pickled.

A message is a step with its hidden states, a step's result, or a word about what went wrong. All numbers are
little-endian. Each array begins at a multiple of ALIGN bytes after the header, so that a message is read where it was
received. What is refused with a WireError before any memory is taken for it:

- a header that does not begin with MAGIC, of another version, or with a kind or a dtype that is not known;
- counts that do not add up to the size that the header tells;
- a message that is larger than the receiver allows.
"""

import struct
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import WorkerError
from ..model.step import CHOICE, Result, Step

MAGIC = b"bigint8\0"
VERSION = 3
ALIGN = 64
"""Bytes of a cache line: vector instructions read what begins there fastest."""

MOST_BYTES = 2**30
"""The largest message that is sent or taken, header aside, unless a link is told otherwise."""

BUSY = "busy"
"""What a PULSE says of a stage that is at a message."""

Array = NDArray[Any]


class WireError(WorkerError):
    """Bytes that are no message, or a message that is too large."""


class Kind(IntEnum):
    """What a message is.

    STEP: a step, and unless it goes to the first stage its hidden states (T, H)
    ROWS: the kept rows (R, H) of a step, back at the first stage, which has the head
    RESULT: tokens int32 (R, 1), or with log probabilities as a `Result` has them (R, 2 + 2 K), or logits float32 (R, V)
        of a step, for the driver
    FAILED: why a stage could not run a step, for the driver; `place` is the stage
    LOST: that a stage lost the connection to stage `place`, and why, for the driver
    PULSE: that stage `place` is there, has worked on `number` messages, and whether it is at one, for the driver
    """

    STEP = 1
    ROWS = 2
    RESULT = 3
    FAILED = 4
    LOST = 5
    PULSE = 6


DTYPES = ("none", "float32", "float16", "bfloat16", "int32", "uint8")
"""Of a message's payload, in the order of their codes. numpy has no bfloat16: its bits travel as int16."""

_NUMPY = {name: np.dtype("int16" if name == "bfloat16" else name) for name in DTYPES[1:]}
_KINDS = {int(kind): kind for kind in Kind}
_NO_PAYLOAD: Array = np.zeros((0, 0), np.uint8)
_NO_STEP = Step(0, *(np.zeros(0, np.int32),) * 4, 0, np.zeros((0, 0, 0), np.int32))

# magic, version, kind, dtype, place, few, stages, number, sent_ns, body bytes, then the counts
_LAYOUT = struct.Struct("<8sHBBiiiqqQ11I36x")
HEADER_BYTES = _LAYOUT.size


@dataclass(frozen=True)
class Message:
    """One message. `payload`, of two dimensions, is of `dtype`; bfloat16 as the int16 of its bits.

    sent_ns: when its sender began to send it, as `time.time_ns()` has it
    step: of a STEP or ROWS. The latter's has no rows, only what is needed to choose tokens
    """

    kind: Kind
    number: int
    step: Step = _NO_STEP
    payload: Array = field(default_factory=lambda: _NO_PAYLOAD)
    dtype: str = "none"
    place: int = 0
    sent_ns: int = 0

    @property
    def text(self) -> str:
        """What a FAILED, LOST or PULSE message says."""
        return self.payload.tobytes().decode("utf-8", "replace")


@dataclass(frozen=True)
class Header:
    """The first HEADER_BYTES of a message.

    message, step: their fields that are numbers; counts: of what the shapes follow from; sizes: the bytes of each
    array of the step; body_bytes: of all that follows
    """

    message: dict[str, Any]
    step: dict[str, Any]
    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    body_bytes: int


def step_message(step: Step, payload: Array = _NO_PAYLOAD, dtype: str = "none") -> Message:
    """A step on its way to a stage, with its hidden states (T, H), or without on its way to the first."""
    return Message(Kind.STEP, step.number, step, payload, dtype)


def rows_message(step: Step, payload: Array, dtype: str) -> Message:
    """A step's kept rows (R, H), on their way to the stage that has the head."""
    no_rows = _NO_STEP.ids
    short = replace(
        step, ids=no_rows, positions=no_rows, places=no_rows, sequences=no_rows, tables=_NO_STEP.tables, few=0
    )
    return Message(Kind.ROWS, step.number, replace(short, copies=_NO_STEP.copies), payload, dtype)


def result_message(number: int, values: Array) -> Message:
    """What a `Result` has: tokens int32 (R,), with log probabilities int32 (R, 2 + 2 K), or logits float32 (R, V)."""
    dtype = "int32" if values.ndim == 1 or values.dtype == np.int32 else "float32"
    columns = values[:, None] if values.ndim == 1 else values
    return Message(Kind.RESULT, number, payload=columns.astype(_NUMPY[dtype], copy=False), dtype=dtype)


def word(kind: Kind, number: int, place: int, text: str) -> Message:
    """A message of a kind that bears a text."""
    payload = np.frombuffer(text.encode(), np.uint8)[None]
    return Message(kind, number, payload=payload, dtype="uint8", place=place)


def pulse(handled: int, place: int, busy: bool) -> Message:
    """A PULSE message."""
    return word(Kind.PULSE, handled, place, BUSY if busy else "")


def result_of(message: Message) -> Result:
    """What a RESULT message bears; its values are copied out of the buffer that the message was received in."""
    values = message.payload
    if message.dtype == "int32" and values.shape[1] == 1:
        values = values[:, 0]
    return Result(message.number, values.copy())


def detached(message: Message) -> Message:
    """A FAILED or LOST message that owns its payload."""
    return replace(message, payload=message.payload.copy(), step=_NO_STEP)


# --- sizes ---

_INTS = np.dtype(np.int32)
_FIELDS = tuple(
    (name, CHOICE if name == "choices" else _INTS)
    for name in (
        "ids", "positions", "places", "sequences", "tables", "keep", "choices", "history", "history_ends", "copies"
    )
)  # fmt: skip
"""The arrays of a step in their order."""

_PADDING = tuple(bytes(count) for count in range(ALIGN))


def _counts(message: Message) -> tuple[int, ...]:
    """How many there are of what: all that the shapes follow from, the payload's at the end."""
    step = message.step
    return (
        len(step.ids), *step.tables.shape, len(step.keep), len(step.choices), len(step.history),
        len(step.history_ends), len(step.copies), *message.payload.shape,
    )  # fmt: skip


def _shapes(counts: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The shape of each array of a step."""
    rows, groups, sequences, pages, keep, choices, history, ends, copies = counts[:9]
    of_rows = ((rows,),) * 4
    return (*of_rows, (groups, sequences, pages), (keep,), (choices,), (history,), (ends,), (copies, 3))


def _sizes(counts: tuple[int, ...]) -> tuple[int, ...]:
    """The bytes of each array of a step, and those up to the next one. Counts are Python's, which do not overflow."""
    rows, groups, sequences, pages, keep, choices, history, ends, copies = counts[:9]
    row = _aligned(4 * rows)
    return (
        row, row, row, row, _aligned(4 * groups * sequences * pages), _aligned(4 * keep),
        _aligned(CHOICE.itemsize * choices), _aligned(4 * history), _aligned(4 * ends), _aligned(12 * copies),
    )  # fmt: skip


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def _payload_bytes(counts: tuple[int, ...], dtype: str) -> int:
    return 0 if dtype == "none" else counts[9] * counts[10] * _NUMPY[dtype].itemsize


# --- writing ---


def pack(message: Message, most_bytes: int = MOST_BYTES) -> bytes:
    """The header and the step as bytes. The payload's bytes, which are not copied, come after them.

    Raises WireError for a message larger than `most_bytes`, and for arrays of other shapes or dtypes than they should
    have.
    """
    counts = _counts(message)
    shapes = _shapes(counts)
    body_bytes = sum(_sizes(counts)) + _payload_bytes(counts, message.dtype)
    if body_bytes > most_bytes:
        raise WireError(
            f"step {message.number}: a message of {body_bytes:,} bytes, of which at most {most_bytes:,} are sent; run "
            "fewer tokens at once, or ask for the logits of fewer"
        )
    if message.dtype != "none" and message.payload.dtype != _NUMPY[message.dtype]:
        raise WireError(f"step {message.number}: a payload of {message.payload.dtype} that is to be {message.dtype}")
    step = message.step
    fixed = (MAGIC, VERSION, message.kind, DTYPES.index(message.dtype), message.place, step.few, step.stages)
    parts = [_LAYOUT.pack(*fixed, message.number, message.sent_ns, body_bytes, *counts)]
    for (name, dtype), shape in zip(_FIELDS, shapes, strict=True):
        array = getattr(step, name)
        if array.shape != shape or (array.dtype is not dtype and array.dtype != dtype):
            raise WireError(f"step {message.number}: {name} is {array.dtype} {array.shape}, not {dtype} {shape}")
        parts += (array.tobytes(), _PADDING[-array.nbytes % ALIGN])
    return b"".join(parts)


def payload_bytes(message: Message) -> memoryview:
    """The bytes of the payload, where it lies."""
    if message.dtype == "none":
        return memoryview(b"")
    return np.ascontiguousarray(message.payload).reshape(-1).view(np.uint8).data


# --- reading ---


def read_header(data: bytes | memoryview, most_bytes: int = MOST_BYTES) -> Header:
    """What the first HEADER_BYTES of a message say. Raises WireError for what the module's first lines name."""
    magic, version, kind, dtype, place, few, stages, number, sent_ns, body_bytes, *rest = _LAYOUT.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise WireError(f"bytes that are no message of bigint8's version {VERSION}: {bytes(magic)!r}, {version}")
    if kind not in _KINDS or dtype >= len(DTYPES):
        raise WireError(f"a message of kind {kind} and dtype {dtype}, which there is none of")
    counts = tuple(rest)
    sizes = _sizes(counts)
    expected = sum(sizes) + _payload_bytes(counts, DTYPES[dtype])
    if body_bytes > most_bytes or body_bytes != expected:
        raise WireError(
            f"a message that tells {body_bytes:,} bytes, of which its counts make {expected:,}, and at most "
            f"{most_bytes:,} are taken"
        )
    fields = {"kind": _KINDS[kind], "number": number, "dtype": DTYPES[dtype], "place": place, "sent_ns": sent_ns}
    return Header(fields, {"number": number, "few": few, "stages": stages}, counts, sizes, body_bytes)


def unpack(header: Header, body: Array) -> Message:
    """The whole message; its arrays are views of `body` (uint8), of which `header.body_bytes` are read."""
    step: dict[str, Any] = dict(header.step)
    start, memory = 0, body.data
    for (name, dtype), shape, size in zip(_FIELDS, _shapes(header.counts), header.sizes, strict=True):
        step[name] = np.ndarray(shape, dtype, memory, start)
        start += size
    named = header.message["dtype"]
    payload = _NO_PAYLOAD if named == "none" else np.ndarray(header.counts[9:], _NUMPY[named], memory, start)
    return Message(step=Step(**step), payload=payload, **header.message)
