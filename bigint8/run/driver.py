"""Transformers models whose forward pass runs on an engine: `generate()` and all that it does, over pages.

`PagedCache` is the cache that `generate` gets. Its keys and values are pages of the stages; it holds their sequences.
"""

import weakref
from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import BigInt8Error
from ..families.table import find_family
from ..options import SHORT_PROMPT
from ..plan.plan import Plan
from .feed import Fed


class Sequences(Protocol):
    """What a cache needs of an engine: see `engine.Engine`."""

    def open_sequence(self) -> Any: ...

    def fork(self, sequence: Any) -> Any: ...

    def crop(self, sequence: Any, tokens: int) -> None: ...

    def drop(self, sequence: Any) -> None: ...

    def forward(self, fed: Sequence[Fed], keep: Any) -> NDArray[np.float32]: ...


class PagedCache(Cache):
    """The sequences of one batch: their keys and values are pages, and what is masked takes none.

    `forward` computes the next tokens. Edits (beam search, assisted decoding) share pages. When the object goes, the
    pages are free again.
    """

    def __init__(self, engine: Sequences) -> None:
        super().__init__(layers=[])
        self._engine = engine
        self._sequences: list[Any] = []
        self._tokens_BP: Tensor | None = None  # which columns so far are tokens, and not padding
        self._finalizer = weakref.finalize(self, _drop_all, engine, self._sequences)

    def forward(
        self, ids_BT: Tensor, mask: Tensor | None, positions: Tensor | None, keep: int | Tensor, from_mask: bool
    ) -> Tensor:
        """Logits, float32 (batch, kept, vocabulary), of the next tokens (batch, T); zeros where they are masked.

        mask: (batch, past + T) or None; positions: (batch or 1, T); None counts columns, or with `from_mask` tokens
        keep: as transformers' logits_to_keep: the last so many columns, 0 for all, or their indices
        """
        batch, columns = ids_BT.shape
        tokens_BT = self._new_tokens(batch, columns, mask)
        positions_BT = self._positions(tokens_BT, positions, from_mask)
        wanted = _wanted(keep, columns)
        if not self._sequences:
            self._sequences += [self._engine.open_sequence() for _ in range(batch)]
        fed: list[Fed] = []
        kept: list[int] = []
        places: list[tuple[int, int]] = []
        before = 0
        for b, sequence in enumerate(self._sequences):
            there = tokens_BT[b]
            count = int(there.sum())
            if not count:
                continue
            past = 0 if self._tokens_BP is None else int(self._tokens_BP[b].sum())
            few = count == 1 if past else count <= SHORT_PROMPT
            fed.append((sequence, ids_BT[b].cpu()[there].numpy(), positions_BT[b][there].numpy(), few))
            rank = there.cumsum(0) - 1 + before
            for k, column in enumerate(wanted):
                if there[column]:
                    kept.append(int(rank[column]))
                    places.append((b, k))
            before += count
        if not fed:
            raise BigInt8Error("attention_mask: all new tokens are masked; nothing is left to compute")
        values = torch.from_numpy(self._engine.forward(fed, kept))
        self._tokens_BP = tokens_BT if self._tokens_BP is None else torch.cat([self._tokens_BP, tokens_BT], dim=1)
        logits = values.new_zeros(batch, len(wanted), values.shape[-1])
        if places:
            logits[tuple(torch.tensor(places).T)] = values
        return logits

    def _new_tokens(self, batch: int, columns: int, mask: Tensor | None) -> Tensor:
        """Bool (batch, columns): which new columns are tokens."""
        past = self.get_seq_length()
        if self._sequences and batch != len(self._sequences):
            raise BigInt8Error(f"a batch of {batch}, but past_key_values is of {len(self._sequences)} sequences")
        if mask is None:
            return torch.ones(batch, columns, dtype=torch.bool)
        if mask.shape != (batch, past + columns):
            raise BigInt8Error(
                f"attention_mask {tuple(mask.shape)}: {batch} sequences have {past} tokens before these {columns}, so "
                f"it must be {(batch, past + columns)}"
            )
        tokens = mask.cpu() != 0
        if self._tokens_BP is not None and not torch.equal(tokens[:, :past], self._tokens_BP):
            raise BigInt8Error("attention_mask: it masks other earlier tokens than before; drop past_key_values")
        return tokens[:, past:]

    def _positions(self, tokens_BT: Tensor, positions: Tensor | None, from_mask: bool) -> Tensor:
        """Int (batch, T)."""
        batch, columns = tokens_BT.shape
        if positions is not None:
            return positions.cpu().expand(batch, -1)
        if from_mask:
            before = 0 if self._tokens_BP is None else self._tokens_BP.sum(1, keepdim=True)
            return (tokens_BT.cumsum(1) - 1 + before).clamp(min=0)
        past = self.get_seq_length()
        return torch.arange(past, past + columns).expand(batch, -1)

    # --- what transformers asks of a cache ---

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self._tokens_BP is None else self._tokens_BP.shape[1]

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(indices.nonzero().flatten().tolist() if indices.dtype == torch.bool else indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take([i for i in range(len(self._sequences)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        removed = abs(tokens_to_remove)
        if not removed or self._tokens_BP is None:
            return
        self._tokens_BP = self._tokens_BP[:, :-removed]
        for sequence, tokens in zip(self._sequences, self._tokens_BP.sum(1).tolist(), strict=True):
            self._engine.crop(sequence, tokens)

    def _take(self, indices: list[int]) -> None:
        """These sequences in this order; a sequence that is named again is forked."""
        before, named = list(self._sequences), set[int]()
        taken = []
        for i in indices:
            taken.append(self._engine.fork(before[i]) if i in named else before[i])
            named.add(i)
        self._sequences[:] = taken
        for i, sequence in enumerate(before):
            if i not in named:
                self._engine.drop(sequence)
        if self._tokens_BP is not None:
            self._tokens_BP = self._tokens_BP[indices]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PagedCache":
        """A cache that goes on from here on its own; both share the pages so far."""
        other = PagedCache(self._engine)
        other._sequences += [self._engine.fork(sequence) for sequence in self._sequences]
        other._tokens_BP = self._tokens_BP
        return other


def _wanted(keep: int | Tensor, columns: int) -> list[int]:
    """The columns whose logits are wanted."""
    if isinstance(keep, int):
        return list(range(columns))[-keep if keep else None :]
    wanted: list[int] = keep.tolist()
    if any(not -columns <= column < columns for column in wanted):
        raise BigInt8Error(f"logits_to_keep={wanted}: there are {columns} new tokens; name 0 to {columns - 1}")
    return [column % columns for column in wanted]


def _drop_all(engine: Sequences, sequences: list[Any]) -> None:
    for sequence in sequences:
        engine.drop(sequence)


def counts_tokens(config: Any) -> bool:
    """Whether a model counts positions by the mask where none are given."""
    family = find_family(config.model_type)
    return family is not None and family.masked_positions


class PipelineModel(PreTrainedModel, GenerationMixin):
    """A causal language model whose forward pass runs on workers: all of `generate()` works on it."""

    main_input_name = "input_ids"

    def __init__(self, config: Any, engine: Sequences, plan: Plan) -> None:
        super().__init__(config)
        self.engine, self.plan = engine, plan
        self._dtype = getattr(torch, plan.dtype)
        self._from_mask = counts_tokens(config)

    @property
    def device(self) -> torch.device:
        """Where token ids go in and logits come out."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self._dtype)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = PagedCache(self.engine)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PagedCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, float32 (batch, kept tokens, vocabulary), of token ids (batch, tokens).

        Raises BigInt8Error for sequences that the plan has no room for, WorkerError when workers fail for good. A
        worker that dies is started again, and its keys and values are computed anew.
        """
        cache = PagedCache(self.engine) if past_key_values is None else past_key_values
        kept = past_key_values is not None or use_cache  # not its truth: a cache without layers counts as empty
        logits = cache.forward(input_ids, attention_mask, position_ids, logits_to_keep, self._from_mask)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache if kept else None)
