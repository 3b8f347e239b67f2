"""Connections between two processes of a pipeline: a TCP connection for each pair, with time-outs on everything.

A link has a thread that receives ahead into spare buffers. What is sent goes to the kernel at once as far as it has
room; a second thread, which starts when it is first needed, sends the rest. So who computes never waits for who is
slower. When a connection ends or stalls, both ends are told at once; a box that is gone is noticed by the kernel's
probes, within DEAD_SECONDS. Works where the kernel is Linux's or macOS's.
"""

import contextlib
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..errors import WorkerError, in_one_line
from .buffers import Buffer, Buffers, Ready
from .wire import HEADER_BYTES, MOST_BYTES, Message, pack, payload_bytes, read_header, unpack

STALL_SECONDS = 20.0
"""How long a message that has begun may stand still."""

DEAD_SECONDS = 12
"""After how long a box that is gone, or the network to it, is noticed."""

SOCKET_BYTES = 4 * 2**20
"""What the kernel may hold of a connection, each way, if it allows so much."""

PIECE_BYTES = 8 * 2**20
"""A large message is received in pieces, so that who watches sees that it still comes."""

MOST_UNDER_WAY = 64
"""How many steps the driver may have under way. A link receives as many ahead, and as many may wait to be sent on it.
So nobody ever waits for room: in a ring, where each waits for the next, that would be for ever."""


class LinkLost(WorkerError):
    """A connection to another process of the pipeline that ended or stalled."""


@dataclass(frozen=True)
class LinkSettings:
    """What a link allows.

    stall_seconds: how long a message that has begun may stand still
    dead_seconds: after how long the kernel gives up a peer that does not even acknowledge
    most_bytes: of a message, taken or sent
    page_locked: whether a GPU copies from the buffers that are received into
    """

    stall_seconds: float = STALL_SECONDS
    dead_seconds: int = DEAD_SECONDS
    most_bytes: int = MOST_BYTES
    page_locked: bool = False


@dataclass(frozen=True)
class Received:
    """A message, the link that it came on, and when it was whole (`time.time_ns()`).

    `release` it when it is used up: its arrays are views of a buffer that the link receives into again.
    """

    message: Message
    link: "Link"
    received_ns: int
    buffer: Buffer

    def release(self, free: Ready | None = None) -> None:
        """The buffer may be written to again, once `free` is over."""
        self.buffer.free = free
        self.link.buffers.give(self.buffer)


@dataclass
class _Rest:
    """What is left of a message to send. `ready`: what must be over before; `sent`: called when it has gone."""

    parts: list[memoryview]
    ready: Ready | None
    sent: Callable[[], None]


class Link:
    """One end of a connection that both ends have agreed on. `start` begins to receive.

    heard: how often something came, a message or a piece of one
    on_message: called by the receiving thread for each message
    on_lost: called once by a thread of the link when the connection ends or stalls, with why; not when this end
        closes it
    """

    def __init__(
        self,
        connection: socket.socket,
        peer: str,
        on_message: Callable[[Received], None],
        on_lost: Callable[["Link", str], None],
        settings: LinkSettings = LinkSettings(),
    ) -> None:
        """`peer`: the other end, for people."""
        self.peer, self.settings, self.heard = peer, settings, 0
        self.buffers = Buffers(MOST_UNDER_WAY + 1, settings.page_locked)
        self._socket, self._on_message, self._on_lost = connection, on_message, on_lost
        self._changed = threading.Condition()
        self._waiting: deque[_Rest] = deque()
        self._rests = Buffers(MOST_UNDER_WAY + 2)
        self._reason: str | None = None  # why nothing can be sent any more
        self._over = False
        self._sender: threading.Thread | None = None
        self._receiver = threading.Thread(target=self._receive_all, name=f"from {peer}", daemon=True)
        _set_up(connection, settings)

    def start(self) -> None:
        """Begin to receive."""
        self._receiver.start()

    def close(self) -> None:
        """End the connection. What was received stays valid."""
        self._end("this end closed it", tell=False)

    # --- sending ---

    @property
    def is_free(self) -> bool:
        """Whether what is sent now goes at once, as far as is known."""
        return not self._waiting

    def send(self, message: Message) -> None:
        """Send a message; its arrays may be changed as soon as this returns.

        Raises LinkLost if the connection is gone, WireError for a message that is too large.
        """
        parts = self._parts(message)
        with self._changed:
            self._check()
            try:
                left = parts if self._waiting else _after(parts, self._socket.sendmsg(parts, [], socket.MSG_DONTWAIT))
            except BlockingIOError:
                left = parts
            except OSError as error:
                self._reason = _said(error)  # the receiving thread finds the same, and tells it
                raise LinkLost(f"{self.peer}: {self._reason}") from None
            if left:
                self._keep(left)

    def send_when(self, ready: Ready, message: Message, sent: Callable[[], None]) -> None:
        """Send a message once `ready` is over. Its payload is not copied, and stays as it is until `sent` is called.

        Raises what `send` raises; then `sent` is not called.
        """
        parts = self._parts(message)
        with self._changed:
            self._check()
            self._put(_Rest(parts, ready, sent))

    def _parts(self, message: Message) -> list[memoryview]:
        message = replace(message, sent_ns=time.time_ns())
        return [memoryview(pack(message, self.settings.most_bytes)), payload_bytes(message)]

    def _check(self) -> None:
        if self._reason is not None:
            raise LinkLost(f"{self.peer}: {self._reason}")

    def _keep(self, parts: list[memoryview]) -> None:
        """Copy what is left of a message, for the sending thread."""
        nbytes = sum(len(part) for part in parts)
        buffer = self._rests.take(nbytes)
        assert buffer is not None, "closed only after the link has ended"
        np.concatenate([np.frombuffer(part, np.uint8) for part in parts], out=buffer.data[:nbytes])
        self._put(_Rest([buffer.data.data[:nbytes]], None, lambda: self._rests.give(buffer)))

    def _put(self, rest: _Rest) -> None:
        if len(self._waiting) > MOST_UNDER_WAY:
            raise LinkLost(f"{self.peer}: {MOST_UNDER_WAY} messages wait to be sent to it")
        self._waiting.append(rest)
        if self._sender is None:
            self._sender = threading.Thread(target=self._send_rests, name=f"to {self.peer}", daemon=True)
            self._sender.start()
        self._changed.notify()

    def _send_rests(self) -> None:
        """The sending thread: what did not go at once, in order."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._reason is not None)
                if self._reason is not None:
                    return
                rest = self._waiting[0]  # it stays there until it has gone, so that nothing overtakes it
            try:
                if rest.ready is not None:
                    rest.ready.synchronize()
                while rest.parts:
                    rest.parts = _after(rest.parts, self._socket.sendmsg(rest.parts))
            except Exception as error:  # a time-out among them, or a GPU that failed to copy
                self._end(_said(error))
                return
            with self._changed:
                if self._over:
                    return
                self._waiting.popleft()
            rest.sent()

    # --- receiving ---

    def _receive_all(self) -> None:
        """The receiving thread: messages until the connection ends."""
        header_bytes = memoryview(bytearray(HEADER_BYTES))
        try:
            while True:
                self._fill(header_bytes, idle=True)
                header = read_header(header_bytes, self.settings.most_bytes)
                buffer = self.buffers.take(header.body_bytes)
                if buffer is None:
                    break
                self._fill(buffer.data.data[: header.body_bytes])
                self._on_message(Received(unpack(header, buffer.data), self, time.time_ns(), buffer))
        except Exception as error:  # a message that is none among them, or a GPU that failed to copy
            self._end(_said(error))
        finally:
            self._end("the connection ended")
            if self._sender is not None:
                self._sender.join()
            self._socket.close()

    def _fill(self, view: memoryview, idle: bool = False) -> None:
        """Receive so many bytes. `idle`: the first of them may come at any time. Raises LinkLost, OSError."""
        there = 0
        while there < len(view):
            try:
                count = self._socket.recv_into(view[there : there + PIECE_BYTES], 0, socket.MSG_WAITALL)
            except BlockingIOError:  # nothing within stall_seconds
                if idle and not there:
                    continue
                raise LinkLost(
                    f"it sent {there:,} of {len(view):,} bytes, and then nothing for {self.settings.stall_seconds:g} s"
                ) from None
            if not count:
                raise LinkLost("its process ended, or closed the connection")
            there += count
            self.heard += 1

    # --- ending ---

    def _end(self, reason: str, tell: bool = True) -> None:
        """The connection is over, for this reason unless there was one before; both threads end."""
        with self._changed:
            first, self._over = not self._over, True
            self._reason = self._reason or reason
            unsent = [*self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for rest in unsent:
            rest.sent()
        if not first:
            return
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes whoever sends or receives
        self.buffers.close()
        self._rests.close()
        if tell:
            self._on_lost(self, self._reason)


def _after(parts: list[memoryview], sent: int) -> list[memoryview]:
    """What is left of `parts` after so many bytes."""
    left = []
    for part in parts:
        if sent < len(part):
            left.append(part[sent:])
        sent = max(0, sent - len(part))
    return left


def _said(error: Exception) -> str:
    if isinstance(error, BlockingIOError):
        return "it takes nothing any more"
    return in_one_line(error)


def _set_up(connection: socket.socket, settings: LinkSettings) -> None:
    """No delay, large buffers, time-outs in the kernel (so that a call blocks in it, once), probes of a silent peer."""
    connection.settimeout(None)
    seconds, rest = divmod(settings.stall_seconds, 1)
    timeval = struct.pack("@ll", int(seconds), int(rest * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, timeval)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        tcp, third = socket.IPPROTO_TCP, max(1, settings.dead_seconds // 3)
        connection.setsockopt(tcp, socket.TCP_KEEPIDLE, third)
        connection.setsockopt(tcp, socket.TCP_KEEPINTVL, third)
        connection.setsockopt(tcp, socket.TCP_KEEPCNT, 2)
        connection.setsockopt(tcp, socket.TCP_USER_TIMEOUT, settings.dead_seconds * 1000)
