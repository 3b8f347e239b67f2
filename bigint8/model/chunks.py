"""A long prompt in chunks, so that the workspace of a forward pass is that of a chunk."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptChunk:
    """Tokens [start, stop) of a prompt. `keep` are those whose logits are wanted, counted from `start`."""

    start: int
    stop: int
    keep: Tensor


def prompt_chunks(tokens: int, most: int, logits_to_keep: int | Tensor = 0) -> list[PromptChunk]:
    """A prompt of so many tokens in chunks of at most `most`.

    `logits_to_keep` is what transformers' models take: the indices of tokens, or how many at the end, 0 for all.
    """
    if isinstance(logits_to_keep, Tensor):
        wanted = logits_to_keep.cpu()
    else:
        wanted = torch.arange(tokens - logits_to_keep if logits_to_keep else 0, tokens)
    chunks = []
    for start in range(0, tokens, most):
        stop = min(start + most, tokens)
        chunks.append(PromptChunk(start, stop, wanted[(wanted >= start) & (wanted < stop)] - start))
    return chunks
