"""The port, and the thread that answers on it."""

import contextlib
import socket
import threading
from functools import partial
from types import TracebackType
from typing import Any

import uvicorn

from ..errors import BigInt8Error
from .connections import Connections, GuardedProtocol
from .limits import Limits

BACKLOG = 128
"""Connections that the system holds for us until we take them."""

SPARE_FILES = 512
"""Open files beside those of clients: the model's, the workers', those that wait to be taken."""

END_SECONDS = 2
"""How long answers may take to reach their clients when the service ends."""


class Server:
    """Answers on a port from a thread of its own, so that a model may load meanwhile. Use it in a `with`.

    address: where it listens, as a URL
    """

    def __init__(self, app: Any, host: str, port: int, limits: Limits) -> None:
        """Listen. `port` 0 takes a free one. Raises BigInt8Error where that cannot be."""
        allow_files(limits.connections + SPARE_FILES)
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._socket = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except (OSError, OverflowError) as error:
            raise BigInt8Error(f"--host {host} --port {port}: {error}") from None
        name, bound = self._socket.getsockname()[:2]
        self.address = f"http://{f'[{name}]' if ':' in name else name}:{bound}"
        protocol: Any = partial(GuardedProtocol, guard=Connections(limits))
        seconds = max(1, int(limits.client_seconds))
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, http=protocol, ws="none", lifespan="off", loop="asyncio", log_level="error", access_log=False,
                backlog=BACKLOG, timeout_keep_alive=seconds, timeout_graceful_shutdown=END_SECONDS, server_header=False,
            )
        )  # fmt: skip
        run = partial(self._server.run, sockets=[self._socket])
        self._thread = threading.Thread(target=run, name="bigint8 service", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Answer what is done, and end."""
        self._server.should_exit = True
        self._thread.join(2 * END_SECONDS)
        self._socket.close()


def allow_files(wanted: int) -> None:
    """Let this process have so many files open, or as many as it may. Raises BigInt8Error for far too few."""
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and wanted > hard:
            raise BigInt8Error(
                f"--max-connections {wanted - SPARE_FILES}: with {SPARE_FILES} files beside them these are more than "
                f"the {hard} that a process may open here (ulimit -Hn); allow fewer connections"
            )
        if soft != resource.RLIM_INFINITY and wanted > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
