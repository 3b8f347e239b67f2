"""The exact search for the best pipeline: which devices, in which order, with which blocks each. Numbers only.

Blocks are cut into runs, one for each device that is used. A box is gone through once: its devices stand side by side.
Two searches, each exact:

- `fastest_stages`: the slowest stage is as fast as possible; of such pipelines one with the fewest devices. The times
  that come into question are those of all runs of blocks, and they are tried by bisection. Whether a time is enough is
  a search over the boxes that are used: with the same ones, further is better. How far the devices of a box come is
  known for all choices of them at once (`reach`).
- `shortest_way`: the sum of all stages and hops is as small as possible (`shortest`).

Devices that are alike are a kind, boxes that hold the same kinds are alike too: a search does not tell them apart.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from math import inf

from .kinds import TOLERANCE, Boxes, Kind, Pick
from .reach import BoxReaches, Orders, Reaches
from .shortest import ShortestWay


class Search:
    """All pipelines over some kinds of devices in some kinds of boxes."""

    def __init__(self, kinds: Sequence[Kind], boxes: Sequence[Boxes], ring: bool = False) -> None:
        """`boxes` name kinds by their index in `kinds`. ring: the last of several stages hands over to the first."""
        self.kinds, self.boxes, self._ring = kinds, boxes, ring
        self.blocks = len(kinds[0].seconds)
        self.devices = sum(box.boxes * number for box in boxes for _, number in box.devices)
        self.orders = [Orders([number for _, number in box.devices]) for box in boxes]
        self._in_boxes: dict[tuple[int, ...], list[int]] = {}

    def left(self, closed: tuple[int, ...]) -> list[int]:
        """How many devices of each kind are in so many boxes of each kind."""
        left = self._in_boxes.get(closed)
        if left is None:
            left = self._in_boxes[closed] = [0] * len(self.kinds)
            for number, box in zip(closed, self.boxes, strict=True):
                for kind, there in box.devices:
                    left[kind] += number * there
        return left

    # --- the slowest stage ---------------------------------------------------------------------------------------

    def fastest_stages(self, below: float = inf) -> tuple[float, list[Pick]] | None:
        """The seconds of the slowest stage and the stages, on as few devices as that takes; None if nothing fits that
        takes less than `below`.

        Hops do not count: they overlap with what the stages compute.
        """
        found = _Within(self, below * (1 - 2 * TOLERANCE)).stages()
        if found is None:
            return None
        times = self._times(self._slowest(found))
        low, high = 0, len(times) - 1  # the last one is enough
        while low < high:
            middle = (low + high) // 2
            tried = _Within(self, times[middle]).stages()
            if tried is None:
                low = middle + 1
            else:
                found, high = tried, min(middle, bisect_right(times, self._slowest(tried) * (1 + TOLERANCE)) - 1)
        within = _Within(self, times[low])
        fewer = (within.stages(number) for number in range(1, len(found)))
        return times[low], next((stages for stages in fewer if stages is not None), found)

    def _times(self, most: float) -> list[float]:
        """All times that a stage can take, up to one that is enough, in order."""
        ordered = sorted(
            kind.stage_seconds(first, last)
            for kind in self.kinds
            for first in range(self.blocks)
            for last in range(first + 1, kind.furthest(first, most) + 1)
        )
        distinct = ordered[:1]
        for time in ordered[1:]:
            if time > distinct[-1] * (1 + TOLERANCE):
                distinct.append(time)
        return distinct

    def _slowest(self, picks: Sequence[Pick]) -> float:
        return max(self.kinds[pick.kind].stage_seconds(pick.first, pick.last) for pick in picks)

    # --- the sum of all ------------------------------------------------------------------------------------------

    def shortest_way(self, below: float = inf) -> tuple[float, list[Pick]] | None:
        """The seconds of all stages and hops together and the stages; None if nothing fits that takes less than
        `below`."""
        fitting = _Within(self, inf).stages()
        return None if fitting is None else ShortestWay(self.kinds, self.boxes, fitting, self._ring).find(below)


class _Within:
    """The pipelines in which no stage takes longer than some seconds: the boxes one after the other.

    With all devices of a box, or so many of them, a pipeline had better come as far as it can: `BoxReaches`.
    """

    def __init__(self, search: Search, seconds: float) -> None:
        self._search = search
        self._reaches = Reaches(search.kinds, search.blocks, seconds)
        self._boxes = [
            BoxReaches(orders, self._reaches.lasts[[kind for kind, _ in box.devices]])
            for orders, box in zip(search.orders, search.boxes, strict=True)
        ]
        # the last first block from which boxes that are left are not enough, with so many of their devices
        self._failed: dict[tuple[tuple[int, ...], int], int] = {}

    def stages(self, most: int | None = None) -> list[Pick] | None:
        """The stages, on at most so many devices, or None if that is not enough."""
        picks: list[Pick] = []
        self._scarce = most is not None
        closed = tuple(box.boxes for box in self._search.boxes)
        enough = min(self._search.devices, self._search.blocks) if most is None else most
        return picks[::-1] if self._go_on(closed, enough, 0, picks) else None

    def _go_on(self, closed: tuple[int, ...], most: int, first: int, picks: list[Pick]) -> bool:
        """Whether the blocks from `first` on can be placed in these boxes; then `picks` gets how, from the end."""
        failed = self._failed.get((closed, most))
        if failed is None:
            failed = self._failed[closed, most] = self._cannot_reach(closed, most)
        if first <= failed:
            return False
        for last, number, box in self._steps(closed, most, first):
            fewer = (*closed[:box], closed[box] - 1, *closed[box + 1 :])
            rest = most - number if self._scarce else most
            if last == self._search.blocks or self._go_on(fewer, rest, last, picks):
                kinds = [kind for kind, _ in self._search.boxes[box].devices]
                stages = self._boxes[box].way(first, number)
                picks += [Pick(box, kinds[kind], a, b, a == first) for kind, a, b in reversed(stages)]
                return True
        self._failed[closed, most] = first
        return False

    def _cannot_reach(self, closed: tuple[int, ...], most: int) -> int:
        """The last block from which these boxes are not enough, by what is known without a search; -1 for none."""
        left = self._search.left(closed)
        return bisect_left(range(self._search.blocks), True, key=lambda f: self._reaches.may_reach(f, left, most)) - 1

    def _steps(self, closed: Sequence[int], most: int, first: int) -> list[tuple[int, int, int]]:
        """Where devices of the next box may end, with how many of them and the box; the furthest first."""
        steps = []
        for box, there in enumerate(closed):
            if there:
                lasts = self._boxes[box].of(first)
                numbers = range(1, min(most + 1, len(lasts))) if self._scarce else [len(lasts) - 1]
                steps += [(lasts[n], n, box) for n in numbers if lasts[n] > lasts[n - 1 if self._scarce else 0]]
        return sorted(steps, key=lambda step: (-step[0], step[1]))
