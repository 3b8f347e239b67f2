"""How a connection between two processes of a pipeline begins: both prove that they know a secret, and neither says it.

The secret is random, made by the driver, and reaches the workers through Ray. The one who connects says what it wants,
with a number drawn for this connection and a digest of both that takes the secret to make (HMAC-SHA256). The door says
nothing to anybody else. To that one it answers with a number of its own and a digest over both, which the other end
answers in turn: so what was overheard opens no door a second time, and nobody can pretend to be a door. Who does not
know the secret, or says nothing, is dropped. What crosses the connection afterwards is neither encrypted nor signed.
"""

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from ..errors import WorkerError, in_one_line

LOOPBACK = "127.0.0.1"

HELLO_SECONDS = 10.0
"""How long the two ends of a new connection may take to agree."""

MOST_STRANGERS = 32
"""How many connections may be open at once whose other end has not shown that it knows the secret. The oldest gives way
to one more: silent strangers keep nobody out."""

SECRET_BYTES = 32
NONCE_BYTES = 32
PROOF_BYTES = hashlib.sha256().digest_size

_HELLO = struct.Struct(f"<8sHq{NONCE_BYTES}s")
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
        self._lock = threading.Lock()
        self._strangers: deque[socket.socket] = deque()
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
            with self._lock:
                self._strangers.append(connection)
                if len(self._strangers) > MOST_STRANGERS:
                    with contextlib.suppress(OSError):
                        self._strangers.popleft().shutdown(socket.SHUT_RDWR)  # its thread closes it
            threading.Thread(target=self._meet, args=(connection,), daemon=True).start()

    def _meet(self, connection: socket.socket) -> None:
        kept = False
        try:
            hello = self._hello_of(connection)
            if hello is not None and self._on_visitor(connection, hello):
                kept = True
        except OSError:
            pass
        finally:
            if not kept:
                connection.close()

    def _hello_of(self, connection: socket.socket) -> Hello | None:
        """What the other end says of itself, if it knows the secret."""
        until = time.monotonic() + self._hello_seconds
        try:
            told = _receive(connection, _HELLO.size, until)
            proof = _receive(connection, PROOF_BYTES, until)
            magic, role, epoch, _ = _HELLO.unpack(told)
            if not hmac.compare_digest(proof, _proof(self._secret, b"knock", told)):
                return None
            if magic != _MAGIC or role not in set(Role):
                return None
            told += (nonce := secrets.token_bytes(NONCE_BYTES))
            connection.sendall(nonce + _proof(self._secret, b"door", told))
            proof = _receive(connection, PROOF_BYTES, until)
            known = hmac.compare_digest(proof, _proof(self._secret, b"visitor", told))
            return Hello(Role(role), epoch) if known else None
        finally:
            with self._lock, contextlib.suppress(ValueError):  # it had to give way
                self._strangers.remove(connection)


def _proof(secret: bytes, who: bytes, told: bytes) -> bytes:
    """What only one who knows the secret can say of all that was said so far. `who`: which of the three proofs."""
    return hmac.digest(secret, who + told, "sha256")


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
        until = time.monotonic() + seconds
        told = _HELLO.pack(_MAGIC, hello.role, hello.epoch, secrets.token_bytes(NONCE_BYTES))
        connection.sendall(told + _proof(secret, b"knock", told))
        told += _receive(connection, NONCE_BYTES, until)
        proof = _receive(connection, PROOF_BYTES, until)
        if not hmac.compare_digest(proof, _proof(secret, b"door", told)):
            raise OSError("it does not know this pipeline's secret")
        connection.sendall(_proof(secret, b"visitor", told))
        if _receive(connection, len(_WELCOME), until) != _WELCOME:
            raise OSError("it is no worker of this pipeline")
    except OSError as error:
        connection.close()
        raise WorkerError(f"a worker at {where} did not let us in: {in_one_line(error)}") from error
    return connection


def _receive(connection: socket.socket, nbytes: int, until: float) -> bytes:
    """Exactly so many bytes, until a time of the monotonic clock. Raises OSError."""
    data = b""
    while len(data) < nbytes:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("it did not say in time what it had to")
        connection.settimeout(left)
        more = connection.recv(nbytes - len(data))
        if not more:
            raise ConnectionError("it closed the connection, as it does for a secret that is not its own")
        data += more
    return data
