"""Filling the pages of lost stages again, from the tokens of the sequences that go on.

A sequence runs again from its first place, through the same pages as before, up to what had come back: so stages that
were not lost get the same keys and values again, and the steps that were under way can follow. Where a window has moved
on, the first places pass through some of the sequence's pages and through free ones, in turn, and the last ones end up
where they were.
"""

from collections.abc import Generator, Iterable

import numpy as np

from ..model.step import Ints, Step
from ..options import PAGE_TOKENS
from .flights import Flight
from .pages import Pool
from .sequence import Sequence
from .steps import StepMaker
from .tables import Tables


class Refill:
    """The steps that fill the pages of the first `stages` stages. A second loss takes a new one.

    steps: one after the other; each stage executes them in this order. Close it when it is not needed any more
    lost: sequences that found no pages to pass through: only those that are fed from outside, in a full pool
    """

    def __init__(
        self,
        tables: Tables,
        maker: StepMaker,
        flights: Iterable[Flight],
        stages: int,
        chunk: int,
        sequences: Iterable[Sequence],
    ) -> None:
        self._tables, self._maker, self._stages, self._chunk = tables, maker, stages, chunk
        self._sources = {(group, to): source for flight in flights for group, source, to in flight.copies}
        self._filled: set[tuple[int, ...]] = set()
        self.lost: list[Sequence] = []
        self.steps = self._steps(sequences)

    def _steps(self, sequences: Iterable[Sequence]) -> Generator[Step, None, None]:
        for sequence in sequences:
            if sequence.settled and sequence.table.open:
                yield from self._sequence(sequence)

    def _sequence(self, sequence: Sequence) -> Generator[Step, None, None]:
        borrowed: list[tuple[Pool, int]] = []
        try:
            table, rows = self._passage(sequence, borrowed)
            if rows < 1:
                self.lost.append(sequence)
                return
            for first, end, few in sequence.spans(sequence.settled):
                for start in range(max(first, self._known(table)), end, rows):
                    yield self._step(sequence, table, start, min(end, start + rows), few)
            whole = sequence.settled // PAGE_TOKENS
            self._filled |= {tuple(pages) for pages in table[:, :whole].T.tolist()}
        finally:
            for pool, page in borrowed:
                pool.leave(page)

    def _passage(self, sequence: Sequence, borrowed: list[tuple[Pool, int]]) -> tuple[Ints, int]:
        """The pages that it passes through, int32 (groups, runs), and how many rows of it may run at once."""
        runs = -(-sequence.settled // PAGE_TOKENS)
        table: Ints = np.empty((len(self._tables.pools), runs), np.int32)
        rows = self._chunk
        for pool in self._tables.pools:
            held = self._tables.array[pool.index, sequence.table.row, :runs]
            table[pool.index] = [self._sources.get((pool.index, page), page) for page in held.tolist()]
            begin = min(sequence.table.begins[pool.index], runs)
            if begin:
                ring = self._ring(pool, sequence, table[pool.index], begin, borrowed)
                table[pool.index] = [ring[run % len(ring)] for run in range(runs)]
                if len(ring) < runs:  # so many rows that they and what they see fit into the ring
                    rows = min(rows, len(ring) * PAGE_TOKENS - (pool.group.window or 0) - PAGE_TOKENS + 2)
        return table, rows

    def _ring(
        self, pool: Pool, sequence: Sequence, held: Ints, begin: int, borrowed: list[tuple[Pool, int]]
    ) -> list[int]:
        """Pages such that run r of the sequence may be in page r modulo their number, the held ones in their place."""
        runs = len(held)
        size = max(runs - begin, pool.group.most_runs(sequence.settled, self._chunk))
        size = min(size, runs - begin + pool.available)
        ring = [-1] * size
        for run in range(begin, runs):
            ring[run % size] = int(held[run])
        for index in range(size):
            if ring[index] < 0:
                ring[index] = pool.take()
                borrowed.append((pool, ring[index]))
        return ring

    def _known(self, table: Ints) -> int:
        """The first place whose run was not filled for another sequence already."""
        if any(pool.group.window is not None for pool in self._tables.pools):
            return 0  # what stands before a window is not in a page of its own
        runs = 0
        while runs < table.shape[1] and tuple(table[:, runs].tolist()) in self._filled:
            runs += 1
        return runs * PAGE_TOKENS

    def _step(self, sequence: Sequence, table: Ints, start: int, stop: int, few: bool) -> Step:
        places = np.arange(start, stop, dtype=np.int32)
        return Step(
            number=self._maker.number(),
            ids=sequence.tokens[start:stop].copy(),
            positions=sequence.positions_of(start, stop),
            places=places,
            sequences=np.zeros(stop - start, np.int32),
            few=stop - start if few else 0,
            tables=table[:, None],
            stages=self._stages,
        )
