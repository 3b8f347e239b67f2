"""Devices and boxes as the search sees them. Numbers only."""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import inf

TOLERANCE = 1e-9
"""Times that differ by less, relatively, are the same: sums in another order."""


@dataclass(frozen=True)
class Kind:
    """Devices that are alike, as costs: seconds and bytes of each block there, and what comes with them.

    front, back: seconds, and front_bytes, back_bytes: what the first and the last stage have besides their blocks
    capacity: bytes that blocks may take; enter, leave: seconds in which hidden states come in and go out
    """

    seconds: tuple[float, ...]
    bytes: tuple[int, ...]
    capacity: int
    front: float = 0.0
    back: float = 0.0
    front_bytes: int = 0
    back_bytes: int = 0
    enter: float = 0.0
    leave: float = 0.0

    @cached_property
    def _seconds_before(self) -> list[float]:
        return [0.0, *accumulate(self.seconds)]

    @cached_property
    def _bytes_before(self) -> list[int]:
        return [0, *accumulate(self.bytes)]

    def stage_seconds(self, first: int, last: int) -> float:
        """What the stage with blocks [first, last) takes for a step, without hops."""
        ends = (self.front if first == 0 else 0.0) + (self.back if last == len(self.seconds) else 0.0)
        return self._seconds_before[last] - self._seconds_before[first] + ends

    def fits(self, first: int, last: int) -> bool:
        """Whether that stage has room."""
        ends = (self.front_bytes if first == 0 else 0) + (self.back_bytes if last == len(self.bytes) else 0)
        return self._bytes_before[last] - self._bytes_before[first] + ends <= self.capacity

    def furthest(self, first: int, seconds: float = inf) -> int:
        """The last block, exclusively, of the longest stage from `first` on that fits and takes at most `seconds`.

        `first` if there is none, also where that is only because the last stage has more to do.
        """
        blocks = len(self.seconds)
        allowed = seconds * (1 + TOLERANCE)
        if self.fits(first, blocks) and self.stage_seconds(first, blocks) <= allowed:
            return blocks
        front, front_bytes = (self.front, self.front_bytes) if first == 0 else (0.0, 0)
        last = bisect_right(self._bytes_before, self._bytes_before[first] + self.capacity - front_bytes) - 1
        if allowed < inf:
            last = min(last, bisect_right(self._seconds_before, self._seconds_before[first] + allowed - front) - 1)
        return max(first, min(last, blocks - 1))


@dataclass(frozen=True)
class Boxes:
    """Boxes that are alike: how many devices of each kind one of them holds, and how many boxes there are.

    hop: seconds between two of its devices; enter, leave: seconds by which one from or to another box takes longer
    """

    devices: tuple[tuple[int, int], ...]
    boxes: int = 1
    hop: float = 0.0
    enter: float = 0.0
    leave: float = 0.0


@dataclass(frozen=True)
class Pick:
    """A stage of what was found: the kind of box, the kind of device in it, the blocks [first, last).

    opens: this is another box than that of the stage before
    """

    box: int
    kind: int
    first: int
    last: int
    opens: bool
