"""The tokens of one sequence, and how far the stages are with them."""

from collections.abc import Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass, field

import numpy as np

from ..model.step import Ints
from ..options import SHORT_PROMPT
from .requests import Completion
from .tables import Table


@dataclass(eq=False)
class Sequence:
    """One sequence. What decides how a token is computed is the sequence alone, never what else a step has.

    tokens, positions: int32, room for all; positions None: each token's position is its place
    count: tokens that are known; sent: of those, how many are in steps that were sent; settled: in steps that are back
    kinds: up to which place tokens are computed as prompt or as generated ones ("few"); beyond the last, as few
    flights: steps under way; dropped: nobody feeds it any more, its pages go when no step is under way
    lost: it was dropped because it could not be filled again
    """

    table: Table
    tokens: Ints
    count: int
    kinds: list[tuple[int, bool]]
    positions: Ints | None = None
    completion: Completion | None = None
    sent: int = 0
    settled: int = 0
    flights: int = 0
    dropped: bool = False
    lost: bool = False

    def append(self, token: int) -> None:
        """One more token; there is room for it."""
        self.tokens[self.count] = token
        self.count += 1

    def spans(self, stop: int) -> Iterator[tuple[int, int, bool]]:
        """The places [0, stop) in runs of one kind: first, end, few."""
        first = 0
        for end, few in [*self.kinds, (stop, True)]:
            if min(end, stop) > first:
                yield first, min(end, stop), few
                first = min(end, stop)

    def positions_of(self, start: int, stop: int) -> Ints:
        """int32: the positions of the places [start, stop)."""
        return np.arange(start, stop, dtype=np.int32) if self.positions is None else self.positions[start:stop]

    def note(self, ids: Ints, positions: Ints, few: bool) -> None:
        """More tokens of a sequence that is fed from outside. Makes room by doubling."""
        assert self.positions is not None
        while self.count + len(ids) > len(self.tokens):
            self.tokens = np.concatenate([self.tokens, np.zeros_like(self.tokens)])
            self.positions = np.concatenate([self.positions, np.zeros_like(self.positions)])
        self.tokens[self.count : self.count + len(ids)] = ids
        self.positions[self.count : self.count + len(ids)] = positions
        self.count += len(ids)
        if self.kinds and self.kinds[-1][1] == few:
            self.kinds[-1] = self.count, few
        else:
            self.kinds.append((self.count, few))

    def cut(self, count: int) -> None:
        """Only the first `count` tokens stay."""
        self.count = self.sent = self.settled = count
        kept = list(self.spans(count))
        self.kinds = [(end, few) for _, end, few in kept]

    def copy_tokens(self, other: "Sequence") -> None:
        """All that is known of `other`'s tokens is known of these."""
        if len(self.tokens) < other.count:
            self.tokens = other.tokens.copy()
        self.tokens[: other.count] = other.tokens[: other.count]
        self.positions = None if other.positions is None else other.positions.copy()
        if self.positions is not None:
            self.tokens = other.tokens.copy()
        self.kinds = list(other.kinds)
        self.count, self.sent, self.settled = other.count, other.sent, other.settled


@dataclass(eq=False)
class Request:
    """A prompt and its continuations. The first sequence computes the prompt; then the others share its pages.

    prompt: int32, its tokens; completions: one for each continuation
    sequences: one for each, from when it was admitted on; prompted: the prompt is done; open: sequences that go on
    """

    prompt: Ints
    completions: Several[Completion]
    sequences: list[Sequence] = field(default_factory=list)
    prompted: bool = False
    open: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)

    @property
    def places(self) -> int:
        """Places that a sequence needs at most. The last token is never computed."""
        return self.tokens + self.completions[0].settings.max_new_tokens - 1

    @property
    def few(self) -> bool:
        """Whether its prompt is computed as generated tokens are."""
        return self.tokens <= SHORT_PROMPT

    @property
    def dropped(self) -> bool:
        """Whether nobody wants it any more."""
        return all(completion.done for completion in self.completions)
