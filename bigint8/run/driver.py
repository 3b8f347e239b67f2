"""The driver: a transformers model whose forward pass runs on the workers, and the cache that `generate` gets."""

import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import WorkerDied, WorkerError
from ..model.chunks import prompt_chunks
from ..plan.plan import Plan
from .packed import CacheEdit, CacheKey, SequenceLost

MAX_RESTARTS = 3
"""How often one step is tried again after a worker died."""


class Workers(Protocol):
    """What the driver needs of the workers. `loads` counts the models that they have loaded so far."""

    loads: int

    def step(
        self, inputs: Tensor, key: CacheKey | None, mask: Tensor | None, positions: Tensor | None, keep: int | Tensor
    ) -> Tensor:
        """Token ids (batch, tokens) through all stages: logits (batch, kept tokens, vocabulary)."""

    def new_cache_id(self) -> int:
        """An id under which they keep the keys and values of one batch of sequences."""

    def drop(self, cache_id: int) -> None:
        """Forget a batch of sequences."""

    def restart_dead(self) -> list[int]:
        """Start each dead worker again and load its stage; their indices."""


class PipelineCache(Cache):
    """What the driver keeps of a batch of sequences: an id, the tokens so far and their positions.

    The keys and values are with the workers, from the first step on (`started`). Edits (beam search, assisted
    decoding) are noted and go along with the next step. After a step that failed midway (`broken`) the stages disagree,
    so the next one replays all tokens. When the object goes, the workers forget the sequences.
    """

    def __init__(self, workers: Workers) -> None:
        super().__init__(layers=[])
        self._workers = workers
        self.edits: list[CacheEdit] = []
        self.started = self.broken = False
        self.tokens: Tensor | None = None
        self.positions: Tensor | None = None
        self._finalizer: Callable[[], Any] | None = None
        self._renew()

    def replay(self, tokens: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Start anew under another id: all tokens so far and these, and their positions, for one long step."""
        self._renew()
        if self.tokens is None:
            return tokens, positions
        if positions is not None and self.positions is not None:
            positions = torch.cat([self.positions, positions.expand(tokens.shape[0], -1)], dim=1)
        return torch.cat([self.tokens, tokens], dim=1), positions

    def _renew(self) -> None:
        """A new id: the workers drop what they keep for the old one."""
        if self._finalizer is not None:
            self._finalizer()
        self.id = self._workers.new_cache_id()
        self.edits, self.started = [], False
        self._finalizer = weakref.finalize(self, self._workers.drop, self.id)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.tokens is None else self.tokens.shape[1]

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    def key(self) -> CacheKey:
        """The key for the next step. From that step on the workers keep the sequences, and the edits are done."""
        key = CacheKey(self.id, self.started, tuple(self.edits))
        self.edits, self.started = [], True
        return key

    def note(self, tokens: Tensor, positions: Tensor | None) -> None:
        """These tokens have passed through the workers."""
        self.broken = False
        self.tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], dim=1)
        if positions is not None:
            positions = positions.expand(tokens.shape[0], -1)
            self.positions = positions if self.positions is None else torch.cat([self.positions, positions], dim=1)

    def _edit(self, method: str, argument: Any, change: Callable[[Tensor], Tensor]) -> None:
        self.edits.append((method, argument))
        self.tokens = None if self.tokens is None else change(self.tokens)
        self.positions = None if self.positions is None else change(self.positions)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._edit("reorder_cache", beam_idx.tolist(), lambda t: t[beam_idx.cpu()])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._edit("batch_select_indices", indices.tolist(), lambda t: t[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._edit("batch_repeat_interleave", repeats, lambda t: t.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            self._edit("crop", tokens_to_remove, lambda t: t[:, : -abs(tokens_to_remove)])


class PipelineModel(PreTrainedModel, GenerationMixin):
    """A causal language model whose forward pass runs on the workers: all of `generate()` works on it."""

    main_input_name = "input_ids"

    def __init__(self, config: Any, workers: Workers, plan: Plan) -> None:
        super().__init__(config)
        self.workers, self.plan = workers, plan
        self._load = workers.loads
        self._dtype = getattr(torch, plan.dtype)

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
            model_kwargs["past_key_values"] = PipelineCache(self.workers)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PipelineCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, kept tokens, vocabulary) of token ids (batch, tokens).

        Raises BigInt8Error for sequences that the plan has no room for, WorkerError when a worker fails. A worker that
        dies is started again and the sequences are run through anew.
        """
        cache = past_key_values
        if cache is None and use_cache:
            cache = PipelineCache(self.workers)
        past = cache.get_seq_length() if cache is not None else 0
        if self._load != self.workers.loads:
            raise WorkerError("the workers have loaded another model since; use the model of the last load")
        self.plan.check_room(input_ids.shape[0], past + input_ids.shape[1])
        inputs, positions, keep = input_ids, position_ids, logits_to_keep
        if not isinstance(keep, Tensor):
            keep = keep or input_ids.shape[1]  # 0 is all of these, also where earlier ones are run again
        for attempt in range(MAX_RESTARTS + 1):
            try:
                if attempt:
                    time.sleep(attempt - 1)
                    self.workers.restart_dead()
                if cache is not None and cache.broken:
                    inputs, positions = cache.replay(input_ids, position_ids)
                    if isinstance(logits_to_keep, Tensor):  # negative indices count from the same end as before
                        keep = torch.where(logits_to_keep < 0, logits_to_keep, logits_to_keep + past)
                if cache is not None:
                    cache.broken = True  # until the step is through: if it is not, some stages have these tokens
                logits = self._run(inputs, attention_mask, positions, keep, cache)
                break
            except (WorkerDied, SequenceLost) as error:
                if attempt == MAX_RESTARTS:
                    raise WorkerError(f"a worker died {attempt + 1} times in one step: {error}") from error
        if cache is not None:
            cache.note(input_ids, position_ids)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _run(
        self,
        inputs: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        keep: int | Tensor,
        cache: PipelineCache | None,
    ) -> Tensor:
        """These tokens through all stages, in chunks where they are many: the wanted logits."""
        tokens = inputs.shape[1]
        if tokens <= self.plan.workload.chunk:
            return self.workers.step(inputs, None if cache is None else cache.key(), mask, positions, keep)
        if cache is None:  # not `or`: a transformers cache without layers of its own counts as empty
            cache = PipelineCache(self.workers)  # the next chunk needs what this one leaves
        past = (mask.shape[1] if mask is not None else tokens) - tokens
        order, logits = None, []
        if isinstance(keep, Tensor):  # the indices as Python has them: from the end too, in any order
            keep, order = torch.where(keep < 0, keep + tokens, keep).sort()
        for chunk in prompt_chunks(tokens, self.plan.workload.chunk, keep):
            part = slice(chunk.start, chunk.stop)
            some = self.workers.step(
                inputs[:, part],
                cache.key(),
                None if mask is None else mask[:, : past + chunk.stop],
                None if positions is None else positions[:, part],
                chunk.keep if len(chunk.keep) else 1,
            )
            if len(chunk.keep):
                logits.append(some)
        found = torch.cat(logits, dim=1)
        return found if order is None else found[:, order.argsort()]
