"""What is under way: the rows of a step, and what is to be done with its result."""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..model.step import Ints, Step
from .sequence import Request, Sequence
from .tables import Copy, Promise

Logits = NDArray[np.float32]


@dataclass
class Rows:
    """The rows that one sequence has in a step: its places [start, stop).

    request: of which they are a part of the prompt; few: they are computed as generated tokens are
    """

    sequence: Sequence
    start: int
    stop: int
    few: bool = True
    request: Request | None = None


@dataclass(eq=False)
class Feed:
    """One call of `forward`: rows of some sequences, in steps of at most a chunk, and the logits that come back.

    waiting: rows that were not sent, with the index of the first among all rows of the call
    keep: the wanted rows, ascending, and `order` which of them the caller wants first, second, ...
    """

    waiting: deque[tuple[int, Rows]]
    keep: Ints
    order: NDArray[np.int64]
    promise: Promise
    flights: int = 0
    logits: Logits | None = None
    result: "Future[Logits]" = field(default_factory=Future)


@dataclass
class Flight:
    """A step that was sent, and what to do with its result.

    takers: the sequence that gets the token of each kept row; copies: whose sources are held until it is back
    feed: whose logits it computes, and which of the feed's kept rows they are
    """

    step: Step
    rows: list[Rows]
    takers: list[Sequence]
    copies: list[Copy]
    feed: Feed | None = None
    kept: Ints | None = None
