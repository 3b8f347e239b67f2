"""Sequences that are fed from outside, token by token as transformers' `generate` wants it, for logits."""

from collections import deque
from collections.abc import Sequence as Several

import numpy as np
from numpy.typing import ArrayLike

from ..errors import BigInt8Error, PlanError
from ..model.step import Ints
from ..options import PAGE_TOKENS
from .flights import Feed, Logits, Rows
from .sequence import Sequence
from .tables import Promise, Tables

Fed = tuple[Sequence, ArrayLike, ArrayLike, bool]
"""A sequence, its new token ids, their positions, and whether they are computed as generated tokens are."""


class Feeds:
    """The sequences that are fed from outside, and what was asked of them."""

    def __init__(self, tables: Tables, context: int, chunk: int, most_flights: int) -> None:
        self._tables, self._context, self._chunk = tables, context, chunk
        self._most_flights = most_flights
        self.live: dict[Sequence, None] = {}
        self.calls: deque[Feed] = deque()

    def open(self) -> Sequence:
        """A sequence without tokens."""
        sequence = Sequence(self._tables.open(loose=True), np.zeros(64, np.int32), 0, [], np.zeros(64, np.int32))
        self.live[sequence] = None
        return sequence

    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same tokens; both hold the same pages until one of them goes on."""
        self._check_idle(sequence)
        other = self.open()
        self._tables.fork(sequence.table, other.table)
        other.copy_tokens(sequence)
        return other

    def crop(self, sequence: Sequence, tokens: int) -> None:
        """Only the first `tokens` stay. Raises PlanError where a window has moved on by more than the last call."""
        self._check_idle(sequence)
        if not 0 <= tokens <= sequence.count:
            raise BigInt8Error(f"a sequence of {sequence.count} tokens cannot be cropped to {tokens}")
        self._tables.crop(sequence.table, tokens)
        sequence.cut(tokens)

    def drop(self, sequence: Sequence) -> None:
        """Forget it, once no step of it is under way."""
        sequence.dropped = True
        if not sequence.flights and not self._queued(sequence):
            self.live.pop(sequence, None)
            self._tables.drop(sequence.table)

    def call(self, fed: Several[Fed], keep: ArrayLike) -> Feed:
        """Take rows in. `keep`: which rows' logits are wanted, counted over all rows in their order here.

        Raises PlanError if there is no room, BigInt8Error for rows that make no sense.
        """
        parts = [(s, np.asarray(ids, np.int32), np.asarray(at, np.int32), few) for s, ids, at, few in fed]
        if len({sequence for sequence, *_ in parts}) < len(parts):
            raise BigInt8Error("a sequence is named twice in one call: its rows belong together")
        for sequence, ids, positions, _ in parts:
            self._check_idle(sequence)
            if not len(ids) or len(ids) != len(positions):
                raise BigInt8Error(f"{len(ids)} tokens with {len(positions)} positions: there must be one of each")
            if sequence.count + len(ids) > self._context:
                raise PlanError(
                    f"{sequence.count + len(ids)} tokens in one sequence, but the model was loaded for a context of "
                    f"{self._context}; ask for fewer, or load with a larger context="
                )
            self._tables.retire(sequence.table, sequence.count)
        promise = self._promise(parts)
        waiting: deque[tuple[int, Rows]] = deque()
        first = 0
        for sequence, ids, positions, few in parts:
            waiting.append((first, Rows(sequence, sequence.count, sequence.count + len(ids), few)))
            sequence.note(ids, positions, few)
            sequence.table.promise = promise
            first += len(ids)
        wanted = np.asarray(keep, np.int64).reshape(-1)
        order = wanted.argsort(kind="stable")
        made = Feed(waiting, wanted[order].astype(np.int32), order, promise)
        self.calls.append(made)
        return made

    def _promise(self, parts: Several[tuple[Sequence, Ints, Ints, bool]]) -> Promise:
        """Room for all new pages of all these sequences, with a copy of a page that others hold too."""
        needs = [0] * len(self._tables.pools)
        for sequence, ids, *_ in parts:
            stop, table = sequence.count + len(ids), sequence.table
            own = table.shared_tail and sequence.count % PAGE_TOKENS > 0
            for pool in self._tables.pools:
                new = -(-stop // PAGE_TOKENS) - table.runs + own
                most = pool.group.most_runs(stop, self._most_flights * self._chunk)
                needs[pool.index] += max(0, min(new, most + own - (table.runs - table.begins[pool.index])))
        promise = self._tables.promise(needs)
        if promise is None:
            short = next(pool for pool in self._tables.pools if needs[pool.index] > self._tables.room(pool))
            raise PlanError(
                f"{sum(len(ids) for _, ids, *_ in parts)} more tokens take {needs[short.index]} pages of {PAGE_TOKENS} "
                f"tokens, and {self._tables.room(short)} of {short.group.pages} are neither in use nor promised; run "
                "fewer sequences at a time, or load with a larger batch_size= or context="
            )
        return promise

    def next_rows(self) -> tuple[Feed, list[Rows], list[int], Ints] | None:
        """The rows of the next step: few ones first; which rows of the step are kept, and which of `keep` they are."""
        feed = next((feed for feed in self.calls if feed.flights < self._most_flights), None)
        if feed is None:
            return None
        taken: list[tuple[int, Rows]] = []
        left = self._chunk
        while left and feed.waiting:
            first, rows = feed.waiting.popleft()
            part = min(left, rows.stop - rows.start)
            taken.append((first, Rows(rows.sequence, rows.start, rows.start + part, rows.few)))
            if rows.start + part < rows.stop:
                rest = Rows(rows.sequence, rows.start + part, rows.stop, rows.few)
                feed.waiting.appendleft((first + part, rest))
            left -= part
        taken.sort(key=lambda each: not each[1].few)
        kept_rows: list[int] = []
        kept: list[int] = []
        before = 0
        for first, rows in taken:
            a, b = np.searchsorted(feed.keep, [first, first + rows.stop - rows.start]).tolist()
            kept_rows += (feed.keep[a:b] - first + before).tolist()
            kept += range(a, b)
            before += rows.stop - rows.start
        feed.flights += 1
        if not feed.waiting:
            self.calls.remove(feed)
        return feed, [rows for _, rows in taken], kept_rows, np.array(kept, np.int32)

    def settle(self, feed: Feed, rows: list[Rows], kept: Ints, values: Logits) -> None:
        """A step is back: its logits, and the end of the call if it was the last."""
        for each in rows:
            if each.stop < each.sequence.count:  # more of it comes: what it has passed can go
                self._tables.retire(each.sequence.table, each.stop)
        if len(kept):
            if feed.logits is None:
                feed.logits = np.empty((len(feed.keep), values.shape[-1]), np.float32)
            feed.logits[feed.order[kept]] = values
        feed.flights -= 1
        if not feed.flights and not feed.waiting:
            self._tables.end(feed.promise)  # copies that were not needed after all
            found = np.zeros((0, 0), np.float32) if feed.logits is None else feed.logits
            if not feed.result.done():
                feed.result.set_result(found)
        for each in rows:
            if each.sequence.dropped:
                self.drop(each.sequence)

    def _queued(self, sequence: Sequence) -> bool:
        return any(rows.sequence is sequence for feed in self.calls for _, rows in feed.waiting)

    def _check_idle(self, sequence: Sequence) -> None:
        if sequence.dropped:
            raise BigInt8Error(
                "this sequence was lost with a stage, and there were no pages to fill it again; feed its tokens to "
                "another one"
                if sequence.lost
                else "this sequence was dropped; open another"
            )
        if sequence.flights or self._queued(sequence):
            raise BigInt8Error("this sequence is computing; wait for the call before")
