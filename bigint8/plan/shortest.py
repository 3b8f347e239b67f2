"""The exact search for the pipeline whose stages and hops take least time together. Numbers only.

A place says which devices may still be used. For each, a vector has the least seconds in which so many blocks are
placed: dynamic programming over all places, from those with most devices left to those with fewest, in which what
cannot become the best any more is left out. That is known from a bound: the best pipeline of devices that are there
without end, at a price for each (Lagrangian relaxation; Geoffrion 1974), less what the devices that are left cost.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from .kinds import TOLERANCE, Boxes, Kind, Pick

NARROW = 16
"""So many places with as many devices left are gone on from at first, to find a good pipeline soon."""

PRICINGS, PATIENCE = 100, 3
"""How often prices are tried at most, and how often without a better bound before their steps become smaller."""


@dataclass(frozen=True)
class _Place:
    """Boxes of each kind that are not opened, the open one, -1 at the start, and what is left of each kind in it."""

    closed: tuple[int, ...]
    box: int
    left: tuple[int, ...]


class ShortestWay:
    """The search over pipelines of some kinds of devices in some kinds of boxes."""

    def __init__(
        self, kinds: Sequence[Kind], boxes: Sequence[Boxes], known: Sequence[Pick], ring: bool = False
    ) -> None:
        """known: a pipeline that fits; ring: the last of several stages hands over to the first."""
        self._kinds, self._boxes, self._blocks = kinds, boxes, len(kinds[0].seconds)
        self._ring = ring
        self._costs = np.stack([_costs(kind, ring) for kind in kinds])
        self._best, self._picks = self._seconds(known), list(known)
        self._start = _Place(tuple(box.boxes for box in boxes), -1, ())
        hop = min([box.hop for box in boxes] + [a.leave + b.enter for a in boxes for b in boxes])
        self._hops = np.array([kind.enter + hop for kind in kinds])
        self._bound = _Bound(self._costs, self._hops, self._left(self._start))

    def find(self, below: float = inf) -> tuple[float, list[Pick]] | None:
        """The seconds of all stages and hops together, and the stages; None if none takes less than `below`."""
        if self._best >= below * (1 - TOLERANCE):
            self._best, self._picks = below, []
        self._go(NARROW)
        self._bound.tighten(self._best)
        self._go(NARROW)
        self._go(None)
        return (self._best, self._picks) if self._picks else None

    def _go(self, width: int | None) -> None:
        """Go through all places that may be on a better way than is known, or at most so many with as many devices."""
        nothing = np.full(self._blocks + 1, inf)
        placed = {self._start: np.where(np.arange(self._blocks + 1) == 0, 0.0, inf)}
        waiting: list[set[_Place]] = [set() for _ in range(int(self._left(self._start).sum()) + 1)]
        waiting[-1].add(self._start)
        done: dict[_Place, np.ndarray] = {}
        came: dict[_Place, list[_Place]] = defaultdict(list)
        for places in reversed(waiting):
            least = {place: self._promising(place, placed.pop(place)) for place in places}
            kept = sorted((place for place in least if least[place][0] < inf), key=lambda place: least[place][0])
            for place in kept[:width]:
                done[place] = seconds = least[place][1]
                for after, so_far in self._moves(place, seconds):
                    came[after].append(place)
                    if so_far[-1] < self._best * (1 - TOLERANCE):
                        self._best = float(so_far[-1])
                        self._picks = self._way(done, came, after, self._best)
                    before = placed.get(after, nothing)
                    if (so_far < before).any():
                        placed[after] = np.minimum(before, so_far)
                        waiting[int(self._left(after).sum())].add(after)

    def _promising(self, place: _Place, seconds: np.ndarray) -> tuple[float, np.ndarray]:
        """The least that a way through a place may take, and the seconds with those left out that take too much."""
        estimates = seconds + self._bound.of(self._left(place))
        good = estimates < self._best * (1 - TOLERANCE)
        good[-1] = False
        return float(estimates.min(where=good, initial=inf)), np.where(good, seconds, inf)

    def _moves(self, place: _Place, seconds: np.ndarray) -> Iterator[tuple[_Place, np.ndarray]]:
        """Each device that may come next, alike ones once, with the least seconds up to it, itself included."""
        rows = np.flatnonzero(seconds < inf)
        after: dict[int, np.ndarray] = {}
        for target, kind, hop in self._next(place):
            if kind not in after:
                after[kind] = (seconds[rows, None] + self._costs[kind][rows]).min(0)
            so_far = after[kind] + hop
            so_far[-1] += self._back(place, target)
            yield target, so_far

    def _next(self, place: _Place) -> Iterator[tuple[_Place, int, float]]:
        """Where a pipeline may go on: the place, the kind of device, the seconds of the hop to it."""
        for index, (kind, _) in enumerate(self._boxes[place.box].devices if place.left else ()):
            if place.left[index]:
                hop = self._boxes[place.box].hop + self._kinds[kind].enter
                yield _Place(place.closed, place.box, _less(place.left, index)), kind, hop
        for number, box in enumerate(self._boxes):
            if place.closed[number]:
                for index, (kind, _) in enumerate(box.devices):
                    left = _less(tuple(there for _, there in box.devices), index)
                    hop = 0.0
                    if place.box >= 0:
                        hop = self._boxes[place.box].leave + box.enter + self._kinds[kind].enter
                        hop += self._boxes[place.box].enter if self._ring and self._opened(place) == 1 else 0.0
                    yield _Place(_less(place.closed, number), number, left), kind, hop

    def _opened(self, place: _Place) -> int:
        """How many boxes the pipeline goes through so far."""
        return sum(self._start.closed) - sum(place.closed)

    def _back(self, before: _Place, last: _Place) -> float:
        """What the boxes add to the hop from the last stage, at this place, to the first, in a ring of several stages.

        What the first stage's box adds where there are several is counted as the second one is opened.
        """
        if not self._ring or before.box < 0:
            return 0.0
        box = self._boxes[last.box]
        return box.hop if self._opened(last) == 1 else box.leave

    def _left(self, place: _Place) -> np.ndarray:
        """How many devices of each kind may still be used."""
        left = np.zeros(len(self._kinds))
        for number, box in zip(place.closed, self._boxes, strict=True):
            for kind, there in box.devices:
                left[kind] += number * there
        for (kind, _), there in zip(self._boxes[place.box].devices, place.left, strict=False):
            left[kind] += there
        return left

    def _way(
        self, done: dict[_Place, np.ndarray], came: dict[_Place, list[_Place]], place: _Place, seconds: float
    ) -> list[Pick]:
        """The stages of the way that leads to a place, and to the last block, in so many seconds."""
        picks, last = [], self._blocks
        while place != self._start:
            back = [self._back(before, place) if last == self._blocks else 0.0 for before in came[place]]
            ways = (
                (before, kind, done[before] + self._costs[kind][:, last] + hop + back[number])
                for number, before in enumerate(came[place])
                for after, kind, hop in self._next(before)
                if after == place
            )
            least = seconds * (1 + TOLERANCE)
            before, kind, found = next(way for way in ways if way[2].min() <= least)
            first = int(np.flatnonzero(found <= least)[-1])  # of those that are equal, the longest stages come first
            picks.append(Pick(place.box, kind, first, last, place.closed != before.closed))
            place, last, seconds = before, first, float(done[before][first])
        return picks[::-1]

    def _seconds(self, picks: Sequence[Pick]) -> float:
        """All stages and hops of a pipeline together."""
        total = 0.0
        for before, pick in zip([None, *picks], picks, strict=False):
            total += float(self._costs[pick.kind][pick.first, pick.last])
            if before is not None:
                a, b = self._boxes[before.box], self._boxes[pick.box]
                total += self._kinds[pick.kind].enter + (a.leave + b.enter if pick.opens else a.hop)
        if self._ring and len(picks) > 1:
            first, last = self._boxes[picks[0].box], self._boxes[picks[-1].box]
            total += last.leave + first.enter if any(pick.opens for pick in picks[1:]) else last.hop
        return total


def _less(numbers: tuple[int, ...], index: int) -> tuple[int, ...]:
    return (*numbers[:index], numbers[index] - 1, *numbers[index + 1 :])


def _costs(kind: Kind, ring: bool) -> np.ndarray:
    """(blocks + 1, blocks + 1): seconds of each stage [first, last) and of the way out of it; inf where none fits.

    In a ring of several stages, the first one's has the way into it too, and the last one has a way out.
    """
    blocks = len(kind.seconds)
    found = np.full((blocks + 1, blocks + 1), inf)
    for first in range(blocks):
        for last in range(first + 1, kind.furthest(first) + 1):
            found[first, last] = kind.stage_seconds(first, last) + (kind.leave if last < blocks else 0.0)
    if ring:
        found[0, :blocks] += kind.enter
        found[1:, blocks] += kind.leave
    return found


class _Bound:
    """The least seconds of what is left to place, by the devices that are left.

    That is what the best pipeline costs where each stage may be on any kind of device, for a price: less what all
    devices that are left cost, it is never more than the best pipeline of these takes, whatever the prices are.
    """

    def __init__(self, costs: np.ndarray, hops: np.ndarray, left: np.ndarray) -> None:
        """costs: (kinds, blocks + 1, blocks + 1), seconds of stages; hops: of the way into each kind, at least.

        left: how many devices of each kind there are
        """
        self._stages = costs.copy()
        self._stages[:, 1:] += hops[:, None, None]
        self._left = left
        none = np.zeros(len(left))
        self._priced = [(none, self._cheapest(none)[0])]
        self._known: dict[bytes, np.ndarray] = {}

    def of(self, left: np.ndarray) -> np.ndarray:
        """(blocks + 1): the least seconds from each block on, with so many devices of each kind."""
        key = left.tobytes()
        if key not in self._known:
            bounds = [seconds - prices @ left for prices, seconds in self._priced]
            self._known[key] = np.maximum.reduce([*bounds, np.zeros(len(bounds[0]))])
        return self._known[key]

    def tighten(self, enough: float) -> None:
        """Find prices under which all devices together are known to need the most, up to `enough` (subgradients)."""
        prices, best, share, tries = self._priced[0][0], -inf, 1.0, 0
        for _ in range(PRICINGS):
            seconds, used = self._cheapest(prices)
            bound = float(seconds[0] - prices @ self._left)
            tries += 1
            if bound > best:
                best, self._priced[1:], tries = bound, [(prices, seconds)], 0
            elif tries == PATIENCE:
                prices, share, tries = self._priced[1][0], share / 2, 0
                bound, (_, used) = best, self._cheapest(prices)
            asked = used - self._left
            asked[(prices == 0) & (asked < 0)] = 0
            if best >= enough * (1 - TOLERANCE) or not asked.any():
                break
            prices = np.maximum(0, prices + share * (enough - bound) / (asked @ asked) * asked)
        self._known.clear()

    def _cheapest(self, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(blocks + 1): the cheapest stages from each block on; (kinds): the devices of those from the first on."""
        blocks = self._stages.shape[1] - 1
        seconds = np.zeros(blocks + 1)
        chosen = np.zeros((blocks, 2), int)
        stages = self._stages + prices[:, None, None]
        for first in range(blocks - 1, -1, -1):
            ways = stages[:, first, first + 1 :] + seconds[first + 1 :]
            kind, last = divmod(int(ways.argmin()), ways.shape[1])
            seconds[first], chosen[first] = ways[kind, last], (kind, first + 1 + last)
        used, first = np.zeros(len(prices)), 0
        while first < blocks:
            kind, first = chosen[first]
            used[kind] += 1
        return seconds, used
