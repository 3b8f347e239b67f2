"""One step of the pipeline as data: the rows of a ragged batch, where their keys and values are, what is wanted of it.

A step travels from stage to stage with its hidden states. It is plain numbers in numpy arrays, so that it crosses a
connection in a fixed layout, without pickling.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]

CHOICE = np.dtype(
    [
        ("temperature", np.float32),  # 0: the likeliest token
        ("top_k", np.int32),  # 0: all
        ("top_p", np.float32),  # 1: all
        ("min_p", np.float32),  # 0: all
        ("repetition_penalty", np.float32),  # 1: none
        ("logprobs", np.int32),  # 0: no log probabilities; n + 1: that of the token, and of the n likeliest
        ("seed", np.uint64),
        ("index", np.int64),  # tokens chosen for this sequence before: with the seed, all the chance there is
    ]
)
"""How the token after a row is chosen; the meanings are those of transformers' GenerationConfig."""


def _ints(*shape: int) -> Ints:
    return np.zeros(shape, np.int32)


@dataclass(frozen=True)
class Step:
    """One ragged batch: T rows (tokens) of S sequences, in G groups of pages, R rows of which are wanted.

    number: counts the driver's steps; what comes back bears it
    ids, positions, places, sequences: int32 (T,): the token, its position in the text, where its key and value are kept
        in its sequence, and which of the S sequences it belongs to; a sequence's rows are in order
    few: rows [0, few) are tokens that were generated, the others are of prompts: their activations may be int8
    tables: int32 (G, S, P): the page of each run of PAGE places of a sequence, -1 where it needs none
    keep: int32 (R,): the rows after which a token is chosen, or whose logits are wanted
    choices: CHOICE (R,): how it is chosen. Empty: the logits themselves are wanted
    history, history_ends: int32: the tokens of each kept row's sequence so far, one after the other, and where each
        ends; empty for rows without a repetition penalty
    copies: int32 (C, 3): group, from, to: pages that are copied before anything else
    stages: how many stages it passes through, 0 for all: a stage that was lost is filled again by the ones before it
    """

    number: int
    ids: Ints
    positions: Ints
    places: Ints
    sequences: Ints
    few: int
    tables: Ints
    keep: Ints = field(default_factory=lambda: _ints(0))
    choices: NDArray[np.void] = field(default_factory=lambda: np.zeros(0, CHOICE))
    history: Ints = field(default_factory=lambda: _ints(0))
    history_ends: Ints = field(default_factory=lambda: _ints(0))
    copies: Ints = field(default_factory=lambda: _ints(0, 3))
    stages: int = 0

    @property
    def rows(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities at one place of a text, as the model itself has them.

    That is before repetition penalty, temperature and all that cuts tokens off.

    token: of the token that was chosen; likeliest: (token id, its own) of the likeliest tokens, in their order
    """

    token: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Result:
    """What comes back of a step: int32 (R,) tokens, or float32 (R, vocabulary) logits where no choices were given.

    Where any row asks for log probabilities it is int32 (R, 2 + 2 K), with K the most that a row asks for: the token,
    the float32 bits of its log probability, K token ids, and the bits of theirs. What a row did not ask for is 0.
    """

    number: int
    values: Ints | NDArray[np.float32]

    @property
    def tokens(self) -> list[int]:
        """The chosen tokens, one for each kept row."""
        found: list[int] = (self.values if self.values.ndim == 1 else self.values[:, 0]).tolist()
        return found

    def logprobs(self, row: int, likeliest: int) -> Logprobs:
        """The log probabilities of a row that asked for so many of the likeliest tokens."""
        packed = self.values[row]
        most = (len(packed) - 2) // 2
        bits = np.ascontiguousarray(packed).view(np.float32)
        count = min(likeliest, most)  # of a vocabulary that is smaller, all
        ids, theirs = packed[2 : 2 + count].tolist(), bits[2 + most : 2 + most + count].tolist()
        return Logprobs(float(bits[1]), tuple(zip(ids, theirs, strict=True)))
