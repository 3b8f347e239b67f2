"""How far devices come together within some seconds for each stage. Numbers only."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from .kinds import TOLERANCE, Kind

AT_ONCE = 2**20
"""So many numbers may be computed to know what a box reaches from every block, rather than from the one asked for."""


class Reaches:
    """How far a stage of each kind can go within some seconds, and whether all of them may be far enough.

    That is counted twice: in blocks, and in what they weigh, their seconds on the first kind.
    """

    def __init__(self, kinds: Sequence[Kind], blocks: int, seconds: float) -> None:
        self._last = [[kind.furthest(first, seconds) for first in range(blocks)] for kind in kinds]
        self.lasts = np.array([[*each, blocks, -1] for each in self._last], np.int32)
        self._measures = [
            _Measure(self._last, list(range(blocks + 1))),
            _Measure(self._last, [0.0, *accumulate(kinds[0].seconds)]),
        ]

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


class Orders:
    """All choices of devices of which some are alike, as counts of each kind: those of fewer devices first.

    What a choice reaches is the most that any of its devices reaches from where the others come without it. So the
    orders of the devices need not be tried.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        shape = [number + 1 for number in counts]
        taken = np.indices(shape, dtype=np.int16).reshape(len(shape), -1)
        used = taken.sum(0)
        order = np.argsort(used, kind="stable")
        place = np.empty(len(order), np.int32)
        place[order] = np.arange(len(order))
        self.choices, self.devices = len(order), int(used.max())
        self._bounds = np.searchsorted(used[order], range(self.devices + 2))
        strides = [int(np.prod(shape[kind + 1 :])) for kind in range(len(shape))]
        # the choice without one device of each kind; behind all choices where there is none
        self._without = np.stack(
            [
                np.where(there[order] > 0, place[order - stride], np.int32(self.choices))
                for there, stride in zip(taken, strides, strict=True)
            ]
        )

    def reached(self, lasts: np.ndarray, firsts: np.ndarray) -> np.ndarray:
        """(choices + 1, firsts): the last block that each choice reaches from each first block.

        lasts: (kinds, blocks + 2), of each kind from each block; the last column is -1, for what is not there
        """
        found = np.full((self.choices + 1, len(firsts)), -1, np.int32)
        found[0] = firsts
        for begin, end in pairwise(self._bounds[1:]):
            found[begin:end] = lasts[0][found[self._without[0, begin:end]]]
            for last, without in zip(lasts[1:], self._without[1:], strict=True):
                np.maximum(found[begin:end], last[found[without[begin:end]]], out=found[begin:end])
        return found

    def by_number(self, found: np.ndarray) -> np.ndarray:
        """(devices + 1, firsts): the furthest that so many devices reach, of what `reached` found."""
        return np.maximum.reduceat(found[:-1], self._bounds[:-1])

    def way(self, lasts: np.ndarray, first: int, number: int) -> list[tuple[int, int, int]]:
        """The stages of so many devices that reach furthest from `first`: kind, first and last block of each."""
        found = self.reached(lasts, np.array([first]))[:, 0]
        begin, end = self._bounds[number : number + 2]
        furthest = np.flatnonzero(found[begin:end] == found[begin:end].max())
        choice, stages = int(begin + furthest[-1]), []  # of those that are equal, the one with most of the first kinds
        while choice:
            last = int(found[choice])
            ways = [
                (int(found[without[choice]]), kind, int(without[choice]))
                for kind, without in enumerate(self._without)
                if lasts[kind][found[without[choice]]] == last
            ]
            _, kind, choice = max(ways)  # of those that are equal, the one with the shortest stage at the end
            if last > found[choice]:
                stages.append((kind, int(found[choice]), last))
        return stages[::-1]


class BoxReaches:
    """How far the devices of one box come within some seconds for each stage."""

    def __init__(self, orders: Orders, lasts: np.ndarray) -> None:
        """`lasts`: as `Orders.reached` takes it, of the kinds of the box."""
        self._orders, self._lasts = orders, lasts
        self._known: dict[int, list[int]] = {}

    def of(self, first: int) -> list[int]:
        """The last block that is reached from `first` by no device, by one, and so on."""
        if first not in self._known:
            blocks = self._lasts.shape[1] - 2
            firsts = np.arange(blocks) if self._orders.choices * blocks <= AT_ONCE else np.array([first])
            found = self._orders.by_number(self._orders.reached(self._lasts, firsts))
            self._known.update(zip(firsts.tolist(), found.T.tolist(), strict=True))
        return self._known[first]

    def way(self, first: int, number: int) -> list[tuple[int, int, int]]:
        """As `Orders.way`, the kinds counted as those of the box."""
        return self._orders.way(self._lasts, first, number)
