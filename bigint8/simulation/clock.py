"""Simulated time: what happens next happens at once."""

import heapq
from collections.abc import Callable


class Clock:
    """Calls what was put off, in the order of time; of the same time, in the order in which it was put off."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def at(self, seconds: float, call: Callable[[], None]) -> None:
        """Call this at a time that is not over."""
        self._number += 1
        heapq.heappush(self._events, (seconds, self._number, call))

    def go_on(self) -> bool:
        """The next call; whether there was one."""
        if not self._events:
            return False
        self.now, _, call = heapq.heappop(self._events)
        call()
        return True
