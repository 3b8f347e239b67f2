"""Command lines run in this process, and what is asked of how they end."""

from collections.abc import Callable
from typing import NamedTuple


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    error: str


Command = Callable[..., Ended]
"""A module with an `app`, and its arguments."""


def assert_refused(ended: Ended, *said: str) -> None:
    """One line of error, no traceback, exit code 2."""
    assert ended.code == 2
    assert "Traceback" not in ended.error and "Traceback" not in ended.out
    assert ended.error.strip(), ended
    last = ended.error.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for part in said:
        assert part in last
