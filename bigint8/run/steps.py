"""Makes a step of the rows of some sequences."""

from collections.abc import Sequence as Several

import numpy as np
from numpy.typing import NDArray

from ..model.step import CHOICE, Ints, Step
from .flights import Rows
from .sequence import Sequence
from .tables import Copy, Tables


class StepMaker:
    """Makes steps: numbers them, and keeps how each sequence's tokens are chosen, by its table's row."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._choices: NDArray[np.void] = np.zeros(0, CHOICE)
        self._number = 0

    def number(self) -> int:
        """The next step's number."""
        self._number += 1
        return self._number

    def choose(self, sequence: Sequence, choice: NDArray[np.void]) -> None:
        """The tokens of this sequence are chosen so from now on."""
        row = sequence.table.row
        if row >= len(self._choices):
            grown = np.zeros(max(2 * len(self._choices), row + 1), CHOICE)
            grown[: len(self._choices)] = self._choices
            self._choices = grown
        self._choices[row] = choice

    def step(self, rows: Several[Rows], keep: Several[int], takers: Several[Sequence], copies: Several[Copy]) -> Step:
        """The step of these rows, the few ones first, that keeps the rows `keep` and chooses a token for each taker."""
        ids, positions, places = _tokens(rows)
        history, ends = _history(takers)
        lengths = [each.stop - each.start for each in rows]
        few = sum(length for length, each in zip(lengths, rows, strict=True) if each.few)
        return Step(
            number=self.number(),
            ids=ids,
            positions=positions,
            places=places,
            sequences=np.repeat(np.arange(len(rows), dtype=np.int32), lengths),
            few=few,
            tables=self._tables.rows_of([each.sequence.table for each in rows]),
            keep=np.array(keep, np.int32),
            choices=self._chosen(takers),
            history=history,
            history_ends=ends,
            copies=np.array(copies, np.int32).reshape(-1, 3),
        )

    def _chosen(self, takers: Several[Sequence]) -> NDArray[np.void]:
        found: NDArray[np.void] = self._choices[[taker.table.row for taker in takers]]
        found["index"] = [len(taker.completion.tokens) for taker in takers if taker.completion is not None]
        return found


def _tokens(rows: Several[Rows]) -> tuple[Ints, Ints, Ints]:
    """ids, positions and places of the rows."""
    if all(each.stop - each.start == 1 and each.sequence.positions is None for each in rows):  # as when all decode
        places = np.array([each.start for each in rows], np.int32)
        return np.array([each.sequence.tokens[each.start] for each in rows], np.int32), places, places
    ids = [each.sequence.tokens[each.start : each.stop] for each in rows]
    positions = [each.sequence.positions_of(each.start, each.stop) for each in rows]
    spans = [np.arange(each.start, each.stop, dtype=np.int32) for each in rows]
    return np.concatenate(ids), np.concatenate(positions), np.concatenate(spans)


def _history(takers: Several[Sequence]) -> tuple[Ints, Ints]:
    """All tokens of the sequences with a repetition penalty, and where each taker's end; empty if there is none."""
    penalized = [taker.completion is not None and taker.completion.settings.repetition_penalty != 1 for taker in takers]
    if not any(penalized):
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    parts = [taker.tokens[: taker.count if has else 0] for taker, has in zip(takers, penalized, strict=True)]
    return np.concatenate(parts), np.cumsum([len(part) for part in parts]).astype(np.int32)
