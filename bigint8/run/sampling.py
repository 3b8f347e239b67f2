"""The choice of the next token from logits: the likeliest, or by chance that depends on the sequence alone.

Beside it, for rows that ask, the log probabilities of the tokens.

The meanings and their order are transformers': repetition penalty, temperature, top-k, top-p, min-p. Each row is worked
on for itself, so a token does not depend on what else is in the step. Dimensions: R rows, V tokens of the vocabulary.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from ..model.step import Ints, Step

GOLDEN = 0x9E3779B97F4A7C15
WORD = 2**64 - 1
NO_IDS = torch.zeros(1, 0, dtype=torch.int64)
MOST_SORTED = 1024


def choose(logits_RV: Tensor, step: Step) -> Tensor:
    """int32 (R,): a token for each kept row, on the logits' device, as `step.choices` has it.

    With log probabilities, where any row asks for them, int32 (R, 2 + 2 K): the `Result` says what is where.
    """
    tokens_R = _tokens(logits_RV, step)
    wanted = step.choices["logprobs"]
    if not wanted.any():
        return tokens_R
    most = min(int(wanted.max()) - 1, logits_RV.shape[1])
    packed = torch.zeros(len(wanted), 2 + 2 * most, dtype=torch.int32, device=logits_RV.device)
    packed[:, 0] = tokens_R
    for row in np.flatnonzero(wanted).tolist():  # one at a time: the memory beside the logits is that of a row
        scores_V = logits_RV[row].double().log_softmax(-1)
        count = min(int(wanted[row]) - 1, most)
        found = scores_V.topk(count)
        packed[row, 1] = scores_V[tokens_R[row].long()].float().view(torch.int32)
        packed[row, 2 : 2 + count] = found.indices.int()
        packed[row, 2 + most : 2 + most + count] = found.values.float().view(torch.int32)
    return packed


def _tokens(logits_RV: Tensor, step: Step) -> Tensor:
    """int32 (R,): a token for each kept row."""
    choices = step.choices
    sampled = choices["temperature"] > 0
    penalized = choices["repetition_penalty"] != 1
    special = np.flatnonzero(sampled | penalized).tolist()
    if len(special) == len(choices) and special:
        chosen = torch.empty(len(choices), dtype=torch.int32, device=logits_RV.device)
    else:
        chosen = logits_RV.argmax(-1).int()
    for row in special:
        scores_1V = logits_RV[row : row + 1].float()
        if penalized[row]:
            scores_1V = _penalize(scores_1V, _history(step, row), _number(choices["repetition_penalty"][row]))
        chosen[row] = _sample(scores_1V, choices[row]) if sampled[row] else scores_1V[0].argmax()
    return chosen


def _history(step: Step, row: int) -> Ints:
    start = int(step.history_ends[row - 1]) if row else 0
    return step.history[start : int(step.history_ends[row])]


def _penalize(scores_1V: Tensor, history: Ints, penalty: float) -> Tensor:
    """Scores of tokens that were there before, towards less likely (Keskar et al. 2019)."""
    ids = torch.from_numpy(history.astype(np.int64))[None].to(scores_1V.device)
    rule: Callable[[Tensor, Tensor], Tensor] = RepetitionPenaltyLogitsProcessor(penalty)
    return rule(ids, scores_1V)


def _sample(scores_1V: Tensor, choice: np.void) -> Tensor:
    """A token by chance: the first whose summed probability, in the order of the ids, exceeds a number of [0, 1)."""
    scores_1V = scores_1V / _number(choice["temperature"])
    ids_N, scores_1N = _likeliest(scores_1V, int(choice["top_k"]))
    if choice["top_p"] < 1:
        ids_N, scores_1N = _nucleus(ids_N, scores_1N, _number(choice["top_p"]))
    if choice["min_p"] > 0:  # Nguyen et al. 2024
        scores_1N = MinPLogitsWarper(_number(choice["min_p"]))(NO_IDS, scores_1N)
    sums_N = scores_1N[0].double().softmax(-1).cumsum(-1)
    point = chance(int(choice["seed"]), int(choice["index"])) * sums_N[-1]
    point = torch.minimum(point, sums_N[-1].nextafter(torch.zeros_like(point)))  # rounding may have reached the end
    found = torch.searchsorted(sums_N, point[None], right=True)[0]
    return found if ids_N is None else ids_N[found]


def _nucleus(ids_N: Tensor | None, scores_1N: Tensor, top_p: float) -> tuple[Tensor | None, Tensor]:
    """The likeliest tokens whose probabilities sum up to `top_p` (Holtzman et al. 2020), ids ascending.

    To sort a whole vocabulary takes longer than all else: the MOST_SORTED likeliest are tried first.
    """
    if scores_1N.shape[1] > MOST_SORTED:
        likeliest = scores_1N[0].softmax(-1).topk(MOST_SORTED)
        before = likeliest.values.cumsum(-1) - likeliest.values
        kept = likeliest.indices[before < top_p].sort().values
        if len(kept) < MOST_SORTED:
            return kept if ids_N is None else ids_N[kept], scores_1N[:, kept]
    return ids_N, TopPLogitsWarper(top_p)(NO_IDS, scores_1N)


def _number(single: np.float32) -> float:
    """The decimal number that was meant: 0.9, not the 0.8999999761581421 that single precision makes of it."""
    return float(str(single))


def _likeliest(scores_1V: Tensor, k: int) -> tuple[Tensor | None, Tensor]:
    """The ids, ascending, and the scores of the k likeliest tokens (Fan et al. 2018), and of those equal to the last.

    Ids None: of all. What comes after works on k scores instead of the vocabulary.
    """
    if not 0 < k < scores_1V.shape[1]:
        return None, scores_1V
    least = scores_1V[0].topk(k).values[-1]
    ids = (scores_1V[0] >= least).nonzero()[:, 0]
    return ids, scores_1V[:, ids]


def chance(seed: int, index: int) -> float:
    """A number of [0, 1) that depends on seed and index only: the index-th of SplitMix64 (Steele et al. 2014)."""
    return (_mix(_mix(seed & WORD) + (index + 1) * GOLDEN) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z &= WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)
