"""How a connection between two processes of a pipeline begins: one listens, the other names itself and a secret.

The secret is random, made by the driver, and reaches the workers through Ray. Who does not know it, or says nothing, is
dropped: nobody else on the network can feed a worker. What crosses the connection afterwards is not encrypted.
"""

import contextlib
import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from ..errors import WorkerError, in_one_line

LOOPBACK = "127.0.0.1"

HELLO_SECONDS = 10.0
"""How long the two ends of a new connection may take to agree."""

MOST_STRANGERS = 32
"""How many connections may be open at once whose other end has not named itself yet."""

SECRET_BYTES = 32

_HELLO = struct.Struct(f"<8sHq{SECRET_BYTES}s")
_MAGIC = b"bigint8?"
_WELCOME = b"bigint8!"

Address = tuple[str, int]


class Role(IntEnum):
    """Who comes in by a door: the driver, the stage before, or the last stage with rows for the head."""

    DRIVER = 0
    BEFORE = 1
    RING = 2


@dataclass(frozen=True)
class Hello:
    """What the one who connects says first. `epoch` counts how often the pipeline's links were made."""

    role: Role
    epoch: int


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_BYTES)


class Door:
    """Listens on a port of its own. `address`: where.

    on_visitor: called, by a thread of the door, with each connection whose other end knew the secret. It keeps the
        connection and returns True, or returns False: then it is closed
    """

    def __init__(
        self,
        host: str,
        secret: bytes,
        on_visitor: Callable[[socket.socket, Hello], bool],
        hello_seconds: float = HELLO_SECONDS,
    ) -> None:
        """Listen on an address of this box. Raises WorkerError where that cannot be."""
        self._secret, self._on_visitor, self._hello_seconds = secret, on_visitor, hello_seconds
        self._strangers = threading.BoundedSemaphore(MOST_STRANGERS)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, 0), family=family, backlog=MOST_STRANGERS)
        except OSError as error:
            raise WorkerError(f"a worker cannot listen on {host}: {in_one_line(error)}") from error
        self.address: Address = (host, self._socket.getsockname()[1])
        threading.Thread(target=self._accept_all, name="door", daemon=True).start()

    def close(self) -> None:
        """Listen no more. Connections that are open stay."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._socket.close()

    def _accept_all(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                if self._socket.fileno() < 0:
                    return
                time.sleep(0.05)  # such as too many open files
                continue
            if self._strangers.acquire(blocking=False):
                threading.Thread(target=self._meet, args=(connection,), daemon=True).start()
            else:
                connection.close()

    def _meet(self, connection: socket.socket) -> None:
        kept = False
        try:
            hello = self._hello_of(connection)
            if hello is not None and self._on_visitor(connection, hello):
                kept = True
        except OSError:
            pass
        finally:
            self._strangers.release()
            if not kept:
                connection.close()

    def _hello_of(self, connection: socket.socket) -> Hello | None:
        """What the other end says of itself, if it knows the secret."""
        data = _receive(connection, _HELLO.size, self._hello_seconds)
        magic, role, epoch, secret = _HELLO.unpack(data)
        if not hmac.compare_digest(secret, self._secret) or magic != _MAGIC or role not in set(Role):
            return None
        return Hello(Role(role), epoch)


def welcome(connection: socket.socket) -> None:
    """Tell the other end that it was let in. Raises OSError."""
    connection.sendall(_WELCOME)


def knock(address: Address, hello: Hello, secret: bytes, seconds: float = HELLO_SECONDS) -> socket.socket:
    """A connection to a door that let us in. Raises WorkerError where nobody listens, or we are not let in."""
    where = f"{address[0]}:{address[1]}"
    try:
        connection = socket.create_connection(address, timeout=seconds)
    except OSError as error:
        raise WorkerError(f"a worker at {where} cannot be reached: {in_one_line(error)}") from error
    try:
        connection.sendall(_HELLO.pack(_MAGIC, hello.role, hello.epoch, secret))
        if _receive(connection, len(_WELCOME), seconds) != _WELCOME:
            raise OSError("it is no worker of this pipeline")
    except OSError as error:
        connection.close()
        raise WorkerError(f"a worker at {where} did not let us in: {in_one_line(error)}") from error
    return connection


def _receive(connection: socket.socket, nbytes: int, seconds: float) -> bytes:
    """Exactly so many bytes, within so many seconds. Raises OSError."""
    data, until = b"", time.monotonic() + seconds
    while len(data) < nbytes:
        connection.settimeout(max(0.001, until - time.monotonic()))
        if time.monotonic() > until:
            raise TimeoutError(f"it said nothing for {seconds:g} s")
        more = connection.recv(nbytes - len(data))
        if not more:
            raise ConnectionError("it closed the connection, as it does for a secret that is not its own")
        data += more
    return data
