"""Devices as the search sees them where blocks that have no room are brought in for every step. Numbers only."""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import inf

from .kinds import TOLERANCE, Kind


@dataclass(frozen=True)
class StreamingKind(Kind):
    """A kind whose stages keep what has room, and bring in the rest through two buffers.

    able: bytes of each block that may be elsewhere; second_per_byte: of bringing these in; overlaps: while it computes
    """

    able: tuple[int, ...] = ()
    second_per_byte: float = 0.0
    overlaps: bool = True

    @cached_property
    def _able_before(self) -> list[int]:
        return [0, *accumulate(self.able)]

    @cached_property
    def _buffer_bytes(self) -> int:
        return 2 * max(self.able)

    def _outside(self, first: int, last: int) -> int:
        """Bytes of the stage with blocks [first, last) that are elsewhere: what it lacks, and what its buffers take."""
        ends = (self.front_bytes if first == 0 else 0) + (self.back_bytes if last == len(self.bytes) else 0)
        missing = self._bytes_before[last] - self._bytes_before[first] + ends - self.capacity
        return missing + self._buffer_bytes if missing > 0 else 0

    def stage_seconds(self, first: int, last: int) -> float:
        """As `Kind.stage_seconds`, with what is brought in."""
        computing, streaming = super().stage_seconds(first, last), self._outside(first, last) * self.second_per_byte
        return max(computing, streaming) if self.overlaps else computing + streaming

    def fits(self, first: int, last: int) -> bool:
        """Whether what cannot be elsewhere has room, beside the buffers, or all of it without them."""
        return self._outside(first, last) <= self._able_before[last] - self._able_before[first]

    def furthest(self, first: int, seconds: float = inf) -> int:
        """As `Kind.furthest`: a longer stage never has more room, nor is it faster."""
        blocks, allowed = len(self.seconds), seconds * (1 + TOLERANCE)

        def is_too_long(last: int) -> bool:
            return not self.fits(first, last) or self.stage_seconds(first, last) > allowed

        if not is_too_long(blocks):
            return blocks
        return first + bisect_left(range(first + 1, blocks), True, key=is_too_long)
