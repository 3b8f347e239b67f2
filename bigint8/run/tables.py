"""Which sequence has which page for which of its places, in every group, and how many pages are promised."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..errors import PlanError
from ..model.step import Ints
from ..options import PAGE_TOKENS
from .pages import PageGroup, Pool, Prefix

Copy = tuple[int, int, int]
"""Group, from, to: as in `Step.copies`."""


@dataclass(eq=False)
class Promise:
    """Pages that some sequences may still take, and that nobody else may.

    owed: for each group without a window, how many more; windows: for each with one, how many they hold at once
    """

    owed: list[int]
    windows: list[int]


@dataclass(eq=False)
class Table:
    """The pages of one sequence: its row in `Tables.array`.

    runs: it has pages for the places [0, PAGE_TOKENS * runs), but in group g none before the run begins[g]
    shared_tail: others may hold the page in which its next place is
    prefix: how far its prompt is in the tree of beginnings; loose: it takes pages that nobody promised
    """

    row: int
    begins: list[int]
    prefix: Prefix
    loose: bool = False
    promise: Promise | None = None
    runs: int = 0
    shared_tail: bool = False
    open: bool = field(default=True)


class Tables:
    """The tables of all sequences. `array` is int32 (groups, rows, runs): pages, -1 where there is none."""

    def __init__(self, groups: Sequence[PageGroup], context: int, rows: int = 16) -> None:
        self.pools = [Pool(group, index) for index, group in enumerate(groups)]
        self.array: Ints = np.full((len(groups), rows, -(-context // PAGE_TOKENS)), -1, np.int32)
        self._rows = list(range(rows - 1, -1, -1))
        self._owed, self._windows = [0] * len(groups), [0] * len(groups)
        self._loose: list[set[int]] = [set() for _ in groups]
        self._sources: Counter[tuple[int, int]] = Counter()  # group and page: how many copies hold it
        self._root = Prefix(None, b"", [-1] * len(groups))
        self._windowed = any(group.window is not None for group in groups)
        self.left = 0
        """Counts the pages that were left and the promises that ended: while it stands, no room was made."""

    # --- sequences -----------------------------------------------------------------------------------------------

    def open(self, loose: bool = False) -> Table:
        """A sequence without places."""
        if not self._rows:
            rows = self.array.shape[1]
            self._rows = list(range(2 * rows - 1, rows - 1, -1))
            self.array = np.concatenate([self.array, np.full_like(self.array, -1)], axis=1)
        return Table(self._rows.pop(), [0] * len(self.pools), self._root, loose)

    def extend(self, table: Table, start: int, stop: int, copies: list[Copy]) -> None:
        """Pages for the places [start, stop), which nobody else holds; what is copied first goes to `copies`."""
        if table.shared_tail:
            table.shared_tail = False
            if start < table.runs * PAGE_TOKENS:
                self._own(table, start // PAGE_TOKENS, copies)
        while table.runs * PAGE_TOKENS < stop:
            for pool in self.pools:
                self.array[pool.index, table.row, table.runs] = self._take(table, pool)
            table.runs += 1

    def _own(self, table: Table, run: int, copies: list[Copy]) -> None:
        """A copy of the pages of this run where others hold them too. These stay held: `copied` leaves them."""
        for pool in self.pools:
            page = int(self.array[pool.index, table.row, run])
            if pool.holders[page] - self._sources[pool.index, page] > 1:
                own = self._take(table, pool)
                self.array[pool.index, table.row, run] = own
                self._sources[pool.index, page] += 1
                copies.append((pool.index, page, own))

    def copied(self, copies: Sequence[Copy]) -> None:
        """These copies have been made: their sources are not held for them any more."""
        for group, source, _ in copies:
            self._sources[group, source] -= 1
            if not self._sources[group, source]:
                del self._sources[group, source]
            self._leave(self.pools[group], source)

    def retire(self, table: Table, place: int) -> None:
        """Give back what no query at `place` or later sees."""
        if not self._windowed:
            return
        for pool in self.pools:
            first, begin = min(pool.group.first_seen(place), table.runs), table.begins[pool.index]
            if first > begin:
                self._leave_runs(table, pool, begin, first)
                table.begins[pool.index] = first

    def fork(self, table: Table, other: Table) -> None:
        """`other`, which has no places, gets those of `table`: both hold the same pages until one writes."""
        for pool in self.pools:
            held = self.array[pool.index, table.row, : table.runs]
            self.array[pool.index, other.row, : table.runs] = held
            for page in held[table.begins[pool.index] :].tolist():
                pool.hold(page)
        other.runs, other.begins, other.prefix = table.runs, list(table.begins), table.prefix
        table.shared_tail = other.shared_tail = True

    def crop(self, table: Table, places: int) -> None:
        """Only the first `places` stay. Raises PlanError if a window has moved on since."""
        runs = -(-places // PAGE_TOKENS)
        for pool in self.pools:
            if pool.group.first_seen(places) < min(table.begins[pool.index], runs):
                raise PlanError(
                    f"a sequence cannot go back to {places} tokens: its window of {pool.group.window} has moved on"
                )
        for pool in self.pools:
            self._leave_runs(table, pool, max(table.begins[pool.index], runs), table.runs)
            table.begins[pool.index] = min(table.begins[pool.index], runs)
        table.runs, table.shared_tail = min(table.runs, runs), True

    def drop(self, table: Table) -> None:
        """All its pages are left, the last first: so the beginning of a prompt is the last that is forgotten."""
        if not table.open:
            return
        table.open = False
        for pool in self.pools:
            self._leave_runs(table, pool, table.begins[pool.index], table.runs)
        self._rows.append(table.row)

    def _take(self, table: Table, pool: Pool) -> int:
        if table.promise is not None and pool.group.window is None:
            table.promise.owed[pool.index] -= 1
            self._owed[pool.index] -= 1
        page = pool.take()
        if table.loose:
            self._loose[pool.index].add(page)
        return page

    def _leave(self, pool: Pool, page: int) -> None:
        if pool.leave(page):
            self._loose[pool.index].discard(page)
        self.left += 1

    def _leave_runs(self, table: Table, pool: Pool, first: int, end: int) -> None:
        if first < end:
            runs = self.array[pool.index, table.row, first:end]
            for page in reversed(runs.tolist()):
                self._leave(pool, page)
            runs[:] = -1

    # --- room ----------------------------------------------------------------------------------------------------

    def room(self, pool: Pool) -> int:
        """How many pages are neither held nor promised."""
        if pool.group.window is None:
            return pool.available - self._owed[pool.index]
        return pool.group.pages - self._windows[pool.index] - len(self._loose[pool.index])

    def promise(self, pages: Sequence[int]) -> Promise | None:
        """A promise of so many pages of each group, or None if one of them has no room for it."""
        if any(count > self.room(pool) for pool, count in zip(self.pools, pages, strict=True)):
            return None
        windowed = [pool.group.window is not None for pool in self.pools]
        made = Promise(
            [0 if window else count for count, window in zip(pages, windowed, strict=True)],
            [count if window else 0 for count, window in zip(pages, windowed, strict=True)],
        )
        self._change(made, 1)
        return made

    def end(self, promise: Promise) -> None:
        """Nothing is promised any more; may be called again."""
        self._change(promise, -1)
        promise.owed, promise.windows = [0] * len(self.pools), [0] * len(self.pools)

    def give_back(self, promise: Promise, pages: Sequence[int]) -> None:
        """So many pages of each group are not needed after all."""
        for pool, count in zip(self.pools, pages, strict=True):
            part = promise.owed if pool.group.window is None else promise.windows
            whole = self._owed if pool.group.window is None else self._windows
            part[pool.index] -= count
            whole[pool.index] -= count
        self.left += 1

    def _change(self, promise: Promise, sign: int) -> None:
        for index in range(len(self.pools)):
            self._owed[index] += sign * promise.owed[index]
            self._windows[index] += sign * promise.windows[index]
        self.left += 1

    # --- beginnings that prompts share ---------------------------------------------------------------------------

    def shared_runs(self, table: Table, prompt: Ints) -> list[Prefix]:
        """The beginnings that continue this sequence's, as far as all groups have what the next token sees.

        The last token of the prompt is never among them: it has to be computed.
        """
        found: list[Prefix] = []
        node: Prefix | None = table.prefix
        full = [pool.index for pool in self.pools if pool.group.window is None]
        for tokens in _runs(prompt[:-1], table.runs):
            node = node.children.get(tokens) if node is not None else None
            if node is None or any(node.pages[index] < 0 for index in full):
                break
            found.append(node)
        while found and not self._seen_whole(table, found):
            found.pop()
        return found

    def _seen_whole(self, table: Table, found: list[Prefix]) -> bool:
        """Whether each window that ends after these beginnings is there."""
        runs = table.runs + len(found)
        for pool in self.pools:
            first = max(0, pool.group.first_seen(runs * PAGE_TOKENS) - table.runs)
            if any(node.pages[pool.index] < 0 for node in found[first:]):
                return False
        return True

    def admit(self, table: Table, prompt: Ints, pages: Sequence[int], share: bool) -> bool:
        """Promise so many pages of each group to a sequence without places; whether there is room.

        Where it may `share`, it begins with what others have of its prompt; pages that they hold are not counted again.
        """
        found = self.shared_runs(table, prompt) if share else []
        held = [
            0 if pool.group.window is not None else sum(pool.holders[node.pages[pool.index]] > 0 for node in found)
            for pool in self.pools
        ]
        made = self.promise([count - shared for count, shared in zip(pages, held, strict=True)])
        if made is None:
            return False
        self.give_back(made, [-shared for shared in held])  # for a moment: `adopt` counts all that it holds
        table.promise = made
        self.adopt(table, found)
        return True

    def adopt(self, table: Table, found: Sequence[Prefix]) -> None:
        """The sequence goes on with these beginnings, whose pages it holds from now on."""
        for pool in self.pools:
            before = table.runs
            first = min(pool.group.first_seen((before + len(found)) * PAGE_TOKENS), before + len(found))
            if first > before:
                self._leave_runs(table, pool, table.begins[pool.index], before)
                table.begins[pool.index] = first
            for run, node in enumerate(found[max(0, first - before) :], max(first, before)):
                pool.hold(node.pages[pool.index])
                self.array[pool.index, table.row, run] = node.pages[pool.index]
                if table.promise is not None and pool.group.window is None:
                    table.promise.owed[pool.index] -= 1
                    self._owed[pool.index] -= 1
        table.runs += len(found)
        if found:
            table.prefix = found[-1]

    def publish(self, table: Table, prompt: Ints, start: int, stop: int) -> None:
        """The places [start, stop) of a prompt are computed by a step that was sent: others may share whole pages."""
        for run, tokens in enumerate(_runs(prompt[:stop], start // PAGE_TOKENS), start // PAGE_TOKENS):
            table.prefix = table.prefix.child(tokens)
            for pool in self.pools:
                page = int(self.array[pool.index, table.row, run])
                if page >= 0 and table.prefix.pages[pool.index] < 0:
                    pool.remember(page, table.prefix)

    def forget_idle(self) -> None:
        """Beginnings that nobody holds are forgotten."""
        for pool in self.pools:
            pool.forget_idle()

    def rows_of(self, tables: Sequence[Table]) -> Ints:
        """What a step gets: int32 (groups, sequences, runs), as many runs as the longest has."""
        runs = max([table.runs for table in tables], default=0)
        found: NDArray[np.int32] = self.array[:, [table.row for table in tables], :runs]
        return found


def _runs(tokens: Ints, first: int) -> Iterator[bytes]:
    """The whole runs of PAGE_TOKENS tokens from run `first` on."""
    for start in range(first * PAGE_TOKENS, len(tokens) - PAGE_TOKENS + 1, PAGE_TOKENS):
        yield tokens[start : start + PAGE_TOKENS].tobytes()
