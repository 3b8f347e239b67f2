"""Stages are loaded by their workers, all at once. One that dies or hangs meanwhile is replaced, and loads again."""

from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import ray

from ..errors import WorkerDied
from ..load.bars import LoadProgress, Shown
from ..plan.plan import Plan
from .cores import Share
from .crew import Crew, get
from .recovery import replace_lost

if TYPE_CHECKING:
    from ..load.fill import LoadReport

MOST_STARTS = 3
"""How often a worker may begin one load: then something is wrong that a start does not mend."""

POLL_SECONDS = 0.05
"""How often loading workers are asked how far they are."""

SILENT_SECONDS = 30.0
"""A worker that does not say how far it is for so long is stopped or cut off. Counted in polls: see `watch`."""


class Loading:
    """The loads of some stages of a plan. `finish` waits for them.

    plan: with the devices that its stages are on, which are others where a worker was replaced elsewhere
    """

    def __init__(self, crew: Crew, plan: Plan, indices: Collection[int], progress: Shown = False) -> None:
        self._crew, self.plan, self._indices = crew, plan, sorted(indices)
        self._bars = LoadProgress([crew.name(i) for i in self._indices], enabled=progress)
        self._loads: dict[Any, int] = {}
        self._asked: dict[int, Any] = {}
        self._silent: Counter[int] = Counter()
        self._starts: Counter[int] = Counter()

    def finish(self) -> "list[LoadReport]":
        """Load them: what that did for each. Raises what the first load raises that fails, and WorkerDied for a worker
        that dies again and again."""
        reports: dict[int, LoadReport] = {}
        with self._bars:
            for index in self._indices:
                self._begin(index)
            while self._loads:
                ready, _ = ray.wait([*self._loads], num_returns=len(self._loads), timeout=POLL_SECONDS)
                lost = {}
                for reference in ready:
                    index = self._loads.pop(reference)
                    try:
                        reports[index] = get(reference)
                    except WorkerDied as error:
                        lost[index] = str(error)
                    else:
                        self._show_end(index, reports[index].bytes_read)
                lost |= self._look() | self._hung()
                if lost:
                    self._again(lost)
        return [reports[index] for index in self._indices]

    def _show_end(self, index: int, size: int) -> None:
        """The end of a load comes between two polls."""
        if size:
            self._bars.update(self._indices.index(index), size, size)

    def _begin(self, index: int) -> None:
        """CPU workers of one box share its cores."""
        share = Share()
        if self._crew.kind == "cpu":
            nodes = [info.node for info in self._crew.infos[: len(self.plan.stages)]]
            share = Share(nodes[:index].count(nodes[index]), nodes.count(nodes[index]))
        self._starts[index] += 1
        self._loads[self._crew.workers[index].load.remote(self.plan, index, share)] = index

    def _look(self) -> dict[int, str]:
        """Ask them how far they are, and show what those said that were asked before. Those that have loaded and died
        since, and why."""
        lost = {}
        for bar, index in enumerate(self._indices):
            asked = self._asked.get(index)
            if asked is not None and not ray.wait([asked], timeout=0)[0]:
                self._silent[index] += 1
                continue
            self._silent[index] = 0
            if asked is not None:
                try:
                    done, total = get(asked)
                except WorkerDied as error:
                    total = 0
                    if index not in self._loads.values():  # otherwise its load says so
                        lost[index] = str(error)
                if total:
                    self._bars.update(bar, done, total)
            self._asked[index] = self._crew.workers[index].progress.remote()
        return lost

    def _hung(self) -> dict[int, str]:
        late = [index for index in self._loads.values() if self._silent[index] * POLL_SECONDS >= SILENT_SECONDS]
        return dict.fromkeys(late, f"it has said nothing for {SILENT_SECONDS:.0f} s")

    def _again(self, lost: dict[int, str]) -> None:
        """Replace these workers; they begin once more. The others' loads go on."""
        for index, why in lost.items():
            if self._starts[index] >= MOST_STARTS:
                raise WorkerDied(
                    f"{self._crew.name(index)} was started {MOST_STARTS} times to load stage {index}, and died each "
                    f"time: {why}"
                )
        self._loads = {reference: index for reference, index in self._loads.items() if index not in lost}
        self.plan = replace_lost(self._crew, self.plan, lost)
        for index in lost:
            self._asked.pop(index, None)
            self._silent[index] = 0
            self._begin(index)
