"""The exact search for the best pipeline: which devices, in which order, with which blocks each. Numbers only.

Blocks are cut into runs, one for each device that is used. A box is gone through once: its devices stand side by side.
Two searches, each exact:

- `fastest_stages`: the slowest stage is as fast as possible; of such pipelines one with the fewest devices. Whether a
  time is enough is a search over how many devices of each kind are used: with the same ones, further is better. The
  times that come into question are those of all runs of blocks, and they are tried by bisection.
- `shortest_way`: the sum of all stages and hops is as small as possible. A* (Hart, Nilsson, Raphael 1968) over (blocks
  placed, devices used). What is left costs at least what it would cost if devices could be filled by fractions.

Devices that are alike are a kind, boxes that hold the same kinds are alike too: a search does not tell them apart. For
the blocks of real models, which are all alike or repeat, the bounds are nearly exact, so few states are visited.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from itertools import accumulate, count
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


@dataclass(frozen=True)
class _Place:
    """How far a pipeline has come in using devices: boxes of each kind not yet opened, and the open one.

    left: devices of each of its kinds that are not used yet; kind: of the last device; used: how many in all
    """

    closed: tuple[int, ...]
    box: int
    left: tuple[int, ...]
    kind: int
    used: int


class Search:
    """All pipelines over some kinds of devices in some kinds of boxes."""

    def __init__(self, kinds: Sequence[Kind], boxes: Sequence[Boxes], ring: bool = False) -> None:
        """`boxes` name kinds by their index in `kinds`. ring: the last of several stages hands over to the first."""
        self.kinds, self.boxes, self._ring = kinds, boxes, ring
        self.blocks = len(kinds[0].seconds)
        self.devices = sum(box.boxes * number for box in boxes for _, number in box.devices)
        self._start = _Place(tuple(box.boxes for box in boxes), -1, (), -1, 0)

    def _moves(self, place: _Place) -> Iterator[tuple[_Place, float]]:
        """Each device that may come next, with the seconds of the hop to it; alike ones once."""
        if place.used:
            box, leave = self.boxes[place.box], self.kinds[place.kind].leave
            for index, (kind, _) in enumerate(box.devices):
                if place.left[index]:
                    left = (*place.left[:index], place.left[index] - 1, *place.left[index + 1 :])
                    hop = leave + box.hop + self.kinds[kind].enter
                    yield _Place(place.closed, place.box, left, kind, place.used + 1), hop
        for number, box in enumerate(self.boxes):
            if not place.closed[number]:
                continue
            closed = (*place.closed[:number], place.closed[number] - 1, *place.closed[number + 1 :])
            for index, (kind, there) in enumerate(box.devices):
                left = (*(n for _, n in box.devices[:index]), there - 1, *(n for _, n in box.devices[index + 1 :]))
                hop = 0.0
                if place.used:
                    before = self.boxes[place.box]
                    hop = self.kinds[place.kind].leave + before.leave + box.enter + self.kinds[kind].enter
                yield _Place(closed, number, left, kind, place.used + 1), hop

    def _left(self, place: _Place) -> list[int]:
        """How many devices of each kind may still be used."""
        left = [0] * len(self.kinds)
        for number, box in zip(place.closed, self.boxes, strict=True):
            for kind, there in box.devices:
                left[kind] += number * there
        if place.used:
            for (kind, _), there in zip(self.boxes[place.box].devices, place.left, strict=True):
                left[kind] += there
        return left

    # --- the slowest stage ---------------------------------------------------------------------------------------

    def fastest_stages(self, below: float = inf) -> tuple[float, list[Pick]] | None:
        """The seconds of the slowest stage and the stages, on as few devices as that takes; None if nothing fits that
        takes less than `below`.

        Hops do not count: they overlap with what the stages compute.
        """
        most = min(self.devices, self.blocks)
        found = self._stages_within(below * (1 - 2 * TOLERANCE), most)
        if found is None:
            return None
        times = self._times(self._slowest(found))
        low, high = 0, len(times) - 1  # the last one is enough
        while low < high:
            middle = (low + high) // 2
            tried = self._stages_within(times[middle], most)
            if tried is None:
                low = middle + 1
            else:
                found, high = tried, min(middle, bisect_right(times, self._slowest(tried) * (1 + TOLERANCE)) - 1)
        fewer = (self._stages_within(times[low], number) for number in range(1, len(found)))
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

    def _stages_within(self, seconds: float, most: int) -> list[Pick] | None:
        """Stages on at most so many devices none of which takes longer, or None."""
        reaches = _Reaches(self.kinds, self.blocks, seconds)
        seen: dict[_Place, int] = {}
        picks: list[Pick] = []

        def go_on(place: _Place, first: int) -> bool:
            """Whether the blocks from `first` on can be placed; then `picks` says how, from the end."""
            if seen.get(place, -1) >= first or not reaches.may_reach(first, self._left(place), most - place.used):
                return False
            seen[place] = first
            steps = [(reaches.of(after.kind, first), after) for after, _ in self._moves(place)]
            for last, after in sorted(steps, key=lambda step: -step[0]):
                if last > first and (last == self.blocks or go_on(after, last)):
                    picks.append(Pick(after.box, after.kind, first, last, after.closed != place.closed))
                    return True
            return False

        return picks[::-1] if go_on(self._start, 0) else None

    # --- the sum of all ------------------------------------------------------------------------------------------

    def shortest_way(self, below: float = inf) -> tuple[float, list[Pick]] | None:
        """The seconds of all stages and hops together and the stages; None if nothing fits that takes less than
        `below`."""
        bound = _Bound(self.kinds, self.boxes)
        enough = min(self._quick_way(bound) * (1 + TOLERANCE), below * (1 - TOLERANCE))
        numbers = count()
        waiting = [(0.0, 0, next(numbers), 0.0, self._start, 0)]
        best: dict[tuple[_Place, int], float] = {(self._start, 0): 0.0}
        came: dict[tuple[_Place, int], tuple[_Place, int]] = {}
        while waiting:
            _, _, _, so_far, place, first = heappop(waiting)
            if first == self.blocks:
                return so_far, self._way(came, place)
            if so_far > best[place, first]:
                continue
            for after, hop in self._moves(place):
                kind, left = self.kinds[after.kind], tuple(self._left(after))
                for last in range(kind.furthest(first), first, -1):
                    seconds = so_far + hop + kind.stage_seconds(first, last) + self._back(place, after, last)
                    estimate = seconds + bound.of(last, left)
                    if estimate > enough:
                        if estimate == inf:
                            break  # with fewer blocks here, even more are left
                        continue
                    if seconds < best.get((after, last), inf):
                        best[after, last], came[after, last] = seconds, (place, first)
                        heappush(waiting, (estimate, -last, next(numbers), seconds, after, last))
        return None

    def _quick_way(self, bound: "_Bound") -> float:
        """The seconds of a good pipeline, found by always filling the device that promises most; inf without luck."""
        place, first, so_far = self._start, 0, 0.0
        while first < self.blocks:
            steps = []
            for after, hop in self._moves(place):
                last = self.kinds[after.kind].furthest(first)
                if last > first:
                    seconds = so_far + hop + self.kinds[after.kind].stage_seconds(first, last)
                    seconds += self._back(place, after, last)
                    steps.append((seconds + bound.of(last, tuple(self._left(after))), -last, seconds, after))
            if not steps:
                return inf
            _, negative, so_far, place = min(steps, key=lambda step: step[:2])
            first = -negative
        return so_far

    def _back(self, place: _Place, after: _Place, last: int) -> float:
        """The part of the hop from the last stage to the first that is known with this device: in a ring of several."""
        if not self._ring or (not place.used and last == self.blocks):
            return 0.0
        kind, box, opened = self.kinds[after.kind], self.boxes[after.box], sum(self._start.closed) - sum(after.closed)
        seconds = 0.0 if place.used else kind.enter
        if opened == 2 and after.closed != place.closed:
            seconds += self.boxes[place.box].enter  # which is the first stage's
        if last == self.blocks:
            seconds += kind.leave + (box.hop if opened == 1 else box.leave)
        return seconds

    def _way(self, came: dict[tuple[_Place, int], tuple[_Place, int]], place: _Place) -> list[Pick]:
        picks, last = [], self.blocks
        while place.used:
            before, first = came[place, last]
            picks.append(Pick(place.box, place.kind, first, last, place.closed != before.closed))
            place, last = before, first
        return picks[::-1]


class _Reaches:
    """How far a stage of each kind can go within some seconds, and whether all of them may be far enough.

    That is counted twice: in blocks, and in what they weigh, their seconds on the first kind.
    """

    def __init__(self, kinds: Sequence[Kind], blocks: int, seconds: float) -> None:
        self._last = [[kind.furthest(first, seconds) for first in range(blocks)] for kind in kinds]
        self._measures = [
            _Measure(self._last, list(range(blocks + 1))),
            _Measure(self._last, [0.0, *accumulate(kinds[0].seconds)]),
        ]

    def of(self, kind: int, first: int) -> int:
        return self._last[kind][first]

    def may_reach(self, first: int, left: Sequence[int], devices: int) -> bool:
        """False only if the last block cannot be reached from `first` with so many of the devices that are left.

        Exact where all blocks are alike.
        """
        return all(measure.may_reach(first, left, devices) for measure in self._measures)


class _Measure:
    """The most that a stage of each kind takes, in some measure of blocks."""

    def __init__(self, lasts: Sequence[Sequence[int]], before: Sequence[float]) -> None:
        """`before`: what all blocks before each block measure."""
        end = len(before) - 1
        self._rest = [before[-1] - measure for measure in before]
        self._most = [max(before[last] - before[first] for first, last in enumerate(each)) for each in lasts]
        self._order = sorted(range(len(lasts)), key=lambda kind: -self._most[kind])
        # the longest last stage of each kind: it has more to do than the others
        self._end = [
            max((self._rest[first] for first, last in enumerate(each) if last == end), default=0.0) for each in lasts
        ]

    def may_reach(self, first: int, left: Sequence[int], devices: int) -> bool:
        """One device has the last stage, the others take as much as they can."""
        missing = self._rest[first] * (1 - TOLERANCE)
        return any(
            left[last] and self._end[last] and self._taken(last, left, devices) >= missing for last in self._order
        )

    def _taken(self, end: int, left: Sequence[int], devices: int) -> float:
        """By a last stage on a device of kind `end`, and by all others."""
        taken, devices = self._end[end], devices - 1
        for kind in self._order:
            used = min(left[kind] - (kind == end), devices)
            taken += used * self._most[kind]
            devices -= used
        return taken


class _Bound:
    """The least seconds in which the blocks that are left can be computed by the devices that are left.

    Blocks are weighed by their seconds on the first kind. A device gives each no faster than the one that it is fastest
    at, for its weight, and takes no more weight than the heaviest run that fits. What it takes to come to it is spread
    over these.
    """

    def __init__(self, kinds: Sequence[Kind], boxes: Sequence[Boxes]) -> None:
        weights = [max(seconds, 1e-12) for seconds in kinds[0].seconds]
        before = [0.0, *accumulate(weights)]
        self._weight = [before[-1] - weight for weight in before]
        self._most = [
            max(before[kind.furthest(first)] - before[first] for first in range(len(weights))) for kind in kinds
        ]
        hop = min([box.hop for box in boxes] + [a.leave + b.enter for a in boxes for b in boxes])
        hop += min(kind.leave for kind in kinds)
        self._rates = [
            min(seconds / weight for seconds, weight in zip(kind.seconds, weights, strict=True))
            + ((kind.enter + hop) / most if most else 0.0)
            for kind, most in zip(kinds, self._most, strict=True)
        ]
        self._order = sorted(range(len(kinds)), key=lambda kind: self._rates[kind])
        self._back = min(kind.back for kind in kinds)
        self._known: dict[tuple[int, tuple[int, ...]], float] = {}

    def of(self, first: int, left: tuple[int, ...]) -> float:
        """`left` counts the devices of each kind. Infinite if they cannot hold the blocks from `first` on."""
        known = self._known.get((first, left))
        if known is None:
            known = self._known[first, left] = self._seconds(self._weight[first], left)
        return known

    def _seconds(self, missing: float, left: tuple[int, ...]) -> float:
        if missing <= 0:
            return 0.0
        seconds = self._back
        for kind in self._order:
            most = left[kind] * self._most[kind]
            if most >= missing * (1 - TOLERANCE):
                return seconds + missing * self._rates[kind]
            seconds += most * self._rates[kind]
            missing -= most
        return inf
