"""Links between the processes of a pipeline: what travels on them, who is let in, what happens when one goes away."""

import contextlib
import ctypes
import os
import queue
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigint8 import WorkerError
from bigint8.model.step import CHOICE, Step
from bigint8.run.doors import (
    _HELLO,
    LOOPBACK,
    MOST_STRANGERS,
    NONCE_BYTES,
    PROOF_BYTES,
    Door,
    Hello,
    Role,
    knock,
    new_secret,
    welcome,
)
from bigint8.run.links import Link, LinkLost, LinkSettings
from bigint8.run.wire import (
    ALIGN,
    HEADER_BYTES,
    Kind,
    WireError,
    pack,
    payload_bytes,
    read_header,
    result_message,
    result_of,
    rows_message,
    step_message,
    unpack,
)

WAIT = 20
"""Seconds that a test waits for what must happen."""


def ints(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


def make_step(number: int = 0, rows: int = 3, keep: tuple[int, ...] = (2,), **others: object) -> Step:
    tables = np.zeros((1, 1, 2), np.int32)
    return Step(number, ints(rows), ints(rows), ints(rows), ints(rows), 0, tables, np.array(keep, np.int32), **others)


# --- the layout --------------------------------------------------------------------------------------------------


@st.composite
def steps(draw: st.DrawFn) -> Step:
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, kept, history = (draw(st.integers(0, 20)) for _ in range(3))
    choices = np.zeros(draw(st.sampled_from([0, kept])), CHOICE)
    for name in CHOICE.names:
        choices[name] = random.random(len(choices)) * 1000

    def some(*shape: int) -> np.ndarray:
        return random.integers(-(2**31), 2**31, shape, dtype=np.int32)

    table = tuple(draw(st.integers(0, 4)) for _ in range(3))
    copies = draw(st.integers(0, 3))
    return Step(
        draw(st.integers(0, 2**62)), *(some(rows) for _ in range(4)), draw(st.integers(0, rows)), some(*table),
        some(kept), choices, some(history), some(draw(st.integers(0, 5))), some(copies, 3), draw(st.integers(0, 9)),
    )  # fmt: skip


def sent_and_read(message):
    data = bytes(pack(message)) + bytes(payload_bytes(message))
    header = read_header(data[:HEADER_BYTES])
    assert HEADER_BYTES + header.body_bytes == len(data)
    return unpack(header, np.frombuffer(data, np.uint8)[HEADER_BYTES:])


def assert_same(ours: Step, theirs: Step) -> None:
    for each in fields(Step):
        mine, other = getattr(ours, each.name), getattr(theirs, each.name)
        assert np.array_equal(mine, other) and np.asarray(mine).dtype == np.asarray(other).dtype, each.name


@settings(max_examples=150, deadline=None)
@given(steps(), st.integers(0, 9), st.sampled_from(["float32", "float16", "bfloat16"]))
def test_a_step_and_its_hidden_states_arrive_bit_for_bit(step, width, dtype):
    kind = {"float32": np.float32, "float16": np.float16, "bfloat16": np.int16}[dtype]
    hidden = np.random.default_rng(0).integers(0, 255, (step.rows, width * 4), np.uint8).view(kind)
    read = sent_and_read(step_message(step, hidden, dtype))
    assert_same(read.step, step)
    assert read.kind is Kind.STEP and read.number == step.number and read.dtype == dtype
    assert read.payload.shape == hidden.shape and read.payload.tobytes() == hidden.tobytes()


@settings(max_examples=50, deadline=None)
@given(steps())
def test_a_step_without_hidden_states_and_its_kept_rows_arrive_too(step):
    assert_same(sent_and_read(step_message(step)).step, step)
    kept = np.ones((len(step.keep), 5), np.float32)
    read = sent_and_read(rows_message(step, kept, "float32"))
    assert np.array_equal(read.payload, kept) and read.step.rows == 0
    for name in ("keep", "choices", "history", "history_ends", "number"):  # what choosing tokens needs
        assert np.array_equal(getattr(read.step, name), getattr(step, name)), name


@pytest.mark.parametrize("values", [ints(4), ints(0), np.ones((2, 7), np.float32), np.ones((0, 7), np.float32)])
def test_tokens_and_logits_arrive_as_they_were(values):
    result = result_of(sent_and_read(result_message(5, values)))
    assert result.number == 5 and result.values.dtype == values.dtype and np.array_equal(result.values, values)


def test_arrays_begin_at_a_cache_line():
    header = read_header(pack(step_message(make_step(rows=5), np.ones((5, 3), np.float32), "float32")))
    body = np.zeros(header.body_bytes, np.uint8)
    read = unpack(header, body)
    for array in (read.step.ids, read.step.places, read.step.keep, read.payload):
        assert (array.ctypes.data - body.ctypes.data) % ALIGN == 0


HEADER = bytes(pack(step_message(make_step())))[:HEADER_BYTES]


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n".ljust(HEADER_BYTES, b"x"),
        HEADER.replace(b"bigint8\0", b"bigint9\0"),
        HEADER[:8] + b"\x01" + HEADER[9:],  # the version before this one
        HEADER[:10] + b"\x63" + HEADER[11:],  # the kind
        HEADER[:11] + b"\x63" + HEADER[12:],  # the dtype
        HEADER[:40] + struct.pack("<Q", 2**62) + HEADER[48:],  # the size of the body
        HEADER[:40] + struct.pack("<Q", 8) + HEADER[48:],
        HEADER[:48] + b"\xff" * 44 + HEADER[92:],  # the counts
    ],
)
def test_garbage_is_refused_before_memory_is_taken_for_it(data):
    with pytest.raises(WireError):
        read_header(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), st.integers(0, HEADER_BYTES))
def test_a_header_of_any_bytes_is_refused_or_tells_its_true_size(data, keep):
    with contextlib.suppress(WireError):
        header = read_header(HEADER[:keep] + data[keep:], most_bytes=10**6)
        assert header.body_bytes <= 10**6
        unpack(header, np.zeros(header.body_bytes, np.uint8))


def test_a_message_beyond_the_limit_is_neither_sent_nor_taken():
    message = step_message(make_step(), np.zeros((3, 1000), np.float32), "float32")
    with pytest.raises(WireError, match=r"12,\d\d\d bytes.*at most 10,000"):
        pack(message, most_bytes=10_000)
    with pytest.raises(WireError, match="at most 10,000"):
        read_header(pack(message), most_bytes=10_000)


@pytest.mark.parametrize("change", [{"positions": ints(2)}, {"ids": np.zeros(3, np.int64)}, {"copies": ints(2, 2)}])
def test_a_step_whose_arrays_do_not_belong_together_is_refused_by_name(change):
    with pytest.raises(WireError, match=r"step 7: (positions|ids|copies) is int"):
        pack(step_message(replace(make_step(7), **change)))


# --- one link ----------------------------------------------------------------------------------------------------


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server((LOOPBACK, 0)) as server:
        near = socket.create_connection(server.getsockname())
        return near, server.accept()[0]


class End:
    """One end of a link, and what came by it."""

    def __init__(self, connection: socket.socket, stall_seconds: float = WAIT, **limits: int) -> None:
        self.came: queue.SimpleQueue = queue.SimpleQueue()
        self.lost: queue.SimpleQueue = queue.SimpleQueue()
        self.link = Link(
            connection, "the other end", self.came.put, lambda _, why: self.lost.put(why),
            LinkSettings(stall_seconds=stall_seconds, **limits),
        )  # fmt: skip

    def next(self):
        return self.came.get(timeout=WAIT)

    def why(self) -> str:
        return self.lost.get(timeout=WAIT)


@contextlib.contextmanager
def two_ends(stall_seconds: float = WAIT, **limits: int) -> Iterator[tuple[End, End]]:
    near, far = (End(connection, stall_seconds, **limits) for connection in connected())
    near.link.start()
    yield near, far
    near.link.close()
    far.link.close()


def big(number: int, megabytes: int = 32):
    hidden = np.full((megabytes, 2**18), number, np.float32)
    return step_message(make_step(number), hidden, "float32")


def test_messages_arrive_in_order_large_and_small_and_as_they_were_when_sent():
    with two_ends() as (near, far):
        sizes = [1, 30_000, 1, 300_000, 7]
        sent = [np.full((size, 16), number, np.float32) for number, size in enumerate(sizes)]
        for number, hidden in enumerate(sent):
            near.link.send(step_message(make_step(number), hidden, "float32"))
            hidden[:] = -1  # who computes uses this memory again
        far.link.start()
        for number, size in enumerate(sizes):
            received = far.next()
            assert received.message.number == number and received.message.payload.shape == (size, 16)
            assert (received.message.payload == number).all()
            assert received.message.sent_ns <= received.received_ns
            received.release()


def test_a_message_that_nobody_takes_does_not_hold_its_sender():
    """The other end has not begun to receive when `send` returns: 96 MB are far more than a kernel keeps."""
    with two_ends() as (near, far):
        for number in range(3):
            near.link.send(big(number))
        far.link.start()
        for number in range(3):
            received = far.next()
            assert (received.message.payload == number).all()
            received.release()


def test_buffers_are_used_again():
    with two_ends() as (near, far):
        far.link.start()
        addresses = set()
        for number in range(10):
            near.link.send(step_message(make_step(number), np.ones((20, 500), np.float32), "float32"))
            received = far.next()
            addresses.add(received.buffer.data.__array_interface__["data"][0])
            received.release()
        assert len(addresses) == 1


def test_both_ends_know_at_once_when_one_closes():
    with two_ends() as (near, far):
        far.link.start()
        far.link.close()
        assert "closed the connection" in near.why() or "reset" in near.why()
        with pytest.raises(LinkLost, match="the other end: "):
            near.link.send(step_message(make_step()))
        assert far.lost.empty()  # it did so itself
        with pytest.raises(LinkLost):
            far.link.send(step_message(make_step()))


def test_a_peer_that_goes_away_frees_who_waits_to_send():
    near, far = connected()
    end = End(near)
    end.link.start()
    end.link.send(big(0))
    far.close()
    assert end.why()
    with pytest.raises(LinkLost):
        end.link.send(step_message(make_step()))


def test_a_message_that_stands_still_ends_the_link():
    near, far = connected()
    end = End(near, stall_seconds=0.2)
    end.link.start()
    far.sendall(HEADER[:50])
    assert "50 of 128 bytes, and then nothing for 0.2 s" in end.why()
    assert far.recv(1) == b""
    far.close()


def test_a_peer_that_takes_nothing_ends_the_link():
    near, far = connected()
    end = End(near, stall_seconds=0.2)
    end.link.start()
    end.link.send(big(0))
    assert "takes nothing" in end.why()
    far.close()


def test_a_link_may_be_idle_for_longer_than_a_message_may_stand_still():
    with two_ends(stall_seconds=0.05) as (near, far):
        far.link.start()
        time.sleep(0.3)
        near.link.send(step_message(make_step(4)))
        assert far.next().message.number == 4


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n".ljust(HEADER_BYTES, b"x"), bytes(pack(big(0)))])
def test_what_is_no_message_or_too_large_ends_the_link(garbage):
    near, far = connected()
    end = End(near, most_bytes=10_000)
    end.link.start()
    far.sendall(garbage)
    assert "no message" in (why := end.why()) or "at most 10,000" in why
    assert end.came.empty()
    far.close()


def test_a_message_is_sent_from_its_memory_once_that_is_ready():
    """As from a GPU, whose copy into this memory is not over when the message is handed to the link."""

    @dataclass
    class Copy:
        hidden: np.ndarray
        over: threading.Event = field(default_factory=threading.Event)

        def synchronize(self) -> None:
            assert self.over.wait(WAIT)

    with two_ends() as (near, far):
        far.link.start()
        copy, sent = Copy(np.zeros((4, 4), np.float32)), threading.Event()
        near.link.send_when(copy, step_message(make_step(0), copy.hidden, "float32"), sent.set)
        near.link.send(step_message(make_step(1)))
        assert far.came.empty() and not sent.is_set()
        copy.hidden[:] = 8
        copy.over.set()
        assert (far.next().message.payload == 8).all() and sent.wait(WAIT)
        assert far.next().message.number == 1  # nothing overtakes


# --- doors -------------------------------------------------------------------------------------------------------


@pytest.fixture
def door() -> Iterator[tuple[Door, bytes, queue.SimpleQueue]]:
    secret, visitors = new_secret(), queue.SimpleQueue()

    def let_in(connection: socket.socket, hello: Hello) -> bool:
        if hello.epoch < 3:
            return False
        visitors.put((connection, hello))
        welcome(connection)
        return True

    opened = Door(LOOPBACK, secret, let_in, hello_seconds=0.3)
    yield opened, secret, visitors
    opened.close()


def test_who_knows_the_secret_is_let_in(door):
    opened, secret, visitors = door
    connection = knock(opened.address, Hello(Role.RING, 3), secret)
    theirs, hello = visitors.get(timeout=WAIT)
    assert hello == Hello(Role.RING, 3)
    theirs.sendall(b"after the welcome")
    assert connection.recv(100) == b"after the welcome"


def test_a_wrong_secret_and_an_old_epoch_are_dropped(door):
    opened, secret, visitors = door
    for told, epoch in ((new_secret(), 3), (secret, 2)):
        with pytest.raises(WorkerError, match="did not let us in"):
            knock(opened.address, Hello(Role.DRIVER, epoch), told)
    assert visitors.empty()


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"x" * 1000])
def test_strangers_are_told_nothing_and_keep_nobody_out(door, said):
    opened, secret, visitors = door
    strangers = [socket.create_connection(opened.address, timeout=WAIT) for _ in range(MOST_STRANGERS + 5)]
    for stranger in strangers:
        with contextlib.suppress(ConnectionError):  # it had to give way already
            stranger.sendall(said)
    knock(opened.address, Hello(Role.DRIVER, 3), secret).close()
    assert visitors.get(timeout=WAIT)[1].role is Role.DRIVER
    for stranger in strangers:
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
        stranger.close()


def overheard(door: Door, secret: bytes) -> bytes:
    """What one who knows the secret says when it connects."""
    said = bytearray()
    with socket.create_server((LOOPBACK, 0)) as between:

        def pass_on() -> None:
            theirs, _ = between.accept()
            ours = socket.create_connection(door.address, timeout=WAIT)
            with theirs, ours:
                for wanted in (_HELLO.size + PROOF_BYTES, PROOF_BYTES):
                    part = theirs.recv(wanted, socket.MSG_WAITALL)
                    said.extend(part)
                    ours.sendall(part)
                    theirs.sendall(ours.recv(1000))

        with ThreadPoolExecutor(1) as thread:
            done = thread.submit(pass_on)
            knock(between.getsockname(), Hello(Role.DRIVER, 3), secret).close()
            done.result()
    return bytes(said)


def test_what_was_overheard_opens_no_door_and_does_not_have_the_secret_in_it(door):
    opened, secret, visitors = door
    said = overheard(opened, secret)
    assert visitors.get(timeout=WAIT)[1] == Hello(Role.DRIVER, 3) and secret not in said
    with socket.create_connection(opened.address, timeout=WAIT) as replayed:
        replayed.sendall(said)
        while replayed.recv(1000):  # a number of the door's, another one than before
            pass
    assert visitors.empty()


def test_who_speaks_too_slowly_is_dropped(door):
    opened, _, visitors = door
    with socket.create_connection(opened.address, timeout=WAIT) as slow, pytest.raises(OSError):
        while True:
            slow.sendall(b"b")
            slow.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                if not slow.recv(1):
                    raise ConnectionError
    assert visitors.empty()


def test_one_who_only_pretends_to_be_a_door_learns_nothing_that_opens_one():
    with socket.create_server((LOOPBACK, 0)) as false:

        def pretend() -> bytes:
            connection, _ = false.accept()
            with connection:
                connection.recv(_HELLO.size + PROOF_BYTES, socket.MSG_WAITALL)
                connection.sendall(bytes(NONCE_BYTES + PROOF_BYTES))
                return connection.recv(PROOF_BYTES)

        with ThreadPoolExecutor(1) as thread:
            done = thread.submit(pretend)
            with pytest.raises(WorkerError, match="it does not know this pipeline's secret"):
                knock(false.getsockname(), Hello(Role.DRIVER, 3), new_secret())
            assert done.result() == b""


def test_a_door_that_is_closed_is_not_there(door):
    opened, secret, _ = door
    opened.close()
    with pytest.raises(WorkerError, match="cannot be reached"):
        knock(opened.address, Hello(Role.DRIVER, 3), secret, seconds=0.5)


# --- two boxes ---------------------------------------------------------------------------------------------------

CLONE_NEWNET = 0x40000000


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Box:
    """A network namespace with an address of its own: for sockets, another machine."""

    name: str
    address: str

    def do(self, what):
        """The result of a function that makes sockets, in a thread of this box."""

        def there():
            with Path(f"/run/netns/{self.name}").open() as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            return what()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(there).result()


@pytest.fixture
def boxes() -> Iterator[tuple[Box, Box]]:
    made = Box(f"bigint8-{os.getpid()}-a", "10.231.77.1"), Box(f"bigint8-{os.getpid()}-b", "10.231.77.2")
    try:
        for box in made:
            ip("netns", "add", box.name)
        ip("link", "add", "b8", "netns", made[0].name, "type", "veth", "peer", "name", "b8", "netns", made[1].name)
        for box in made:
            ip("-n", box.name, "addr", "add", f"{box.address}/24", "dev", "b8")
            ip("-n", box.name, "link", "set", "b8", "up")
            ip("-n", box.name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    else:
        yield made
    finally:
        for box in made:
            subprocess.run(["ip", "netns", "del", box.name], capture_output=True)


def test_two_boxes_are_linked_and_a_cable_that_is_pulled_is_noticed_by_both(boxes):
    here, there = boxes
    secret, visitors = new_secret(), queue.SimpleQueue()

    def let_in(connection: socket.socket, hello: Hello) -> bool:
        welcome(connection)
        visitors.put(connection)
        return True

    door = here.do(lambda: Door(here.address, secret, let_in))
    assert door.address[0] == here.address
    connection = there.do(lambda: knock(door.address, Hello(Role.BEFORE, 1), secret))
    ends = [End(one, dead_seconds=3) for one in (connection, visitors.get(timeout=WAIT))]
    for end in ends:
        end.link.start()
    ends[0].link.send(big(7))
    assert (ends[1].next().message.payload == 7).all()
    ip("-n", here.name, "link", "set", "b8", "down")
    ends[0].link.send(step_message(make_step(8)))  # the other end sends nothing, and has to find out
    assert [bool(end.why()) for end in ends] == [True, True]
    door.close()
