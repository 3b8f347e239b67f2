"""What one client may take of the service, so that there is something left for the others."""

import hmac
import os
from dataclasses import dataclass

from ..errors import BigInt8Error

KEY_VARIABLE = "BIGINT8_API_KEY"
ADMIN_VARIABLE = "BIGINT8_ADMIN_KEY"


@dataclass(frozen=True)
class Limits:
    """Bounds, each a flag of `bigint8 serve`.

    body_bytes: of a request; queue: requests that wait in line; queue_seconds: how long one waits there
    client_seconds: how long a client may take for a request's headers, for its body, or without reading an answer
    connections: open at once
    """

    body_bytes: int = 8 * 2**20
    queue: int = 64
    queue_seconds: float = 60.0
    client_seconds: float = 30.0
    connections: int = 1000


class Keys:
    """The keys that requests may bear; without any, no request needs one."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        self._keys = tuple(key.encode() for key in keys)

    @classmethod
    def from_environment(cls, variable: str = KEY_VARIABLE) -> "Keys":
        """Those in a variable, comma separated. Raises BigInt8Error where it is set but has none."""
        told = os.environ.get(variable)
        if told is None:
            return cls()
        keys = tuple(key for part in told.split(",") if (key := part.strip()))
        if not keys:
            raise BigInt8Error(f"{variable} has no key in it: name one or several, or unset it")
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def allow(self, authorization: bytes) -> bool:
        """Whether an Authorization header has one of them, in a time that does not depend on what it has."""
        scheme, _, given = authorization.partition(b" ")
        found = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return not self._keys or (scheme.lower() == b"bearer" and any(found))
