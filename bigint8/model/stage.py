"""A stage of a pipeline: the transformers model itself with the parts that live elsewhere neutralised.

The list of blocks is sliced and renumbered. On all but the last stage the final norm is the identity; on all but the
first the position embeddings give zero and the embedding norm is the identity. Hidden states go in as
`inputs_embeds`.
"""

import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..families.layout import Family
from .skeleton import Skeleton, Slot, set_module


class _ZeroPositions(nn.Module):
    """Position embeddings on a later stage: the first one has added them already."""

    def __init__(self) -> None:
        super().__init__()
        # no dimension, so that adding it keeps the dtype of the hidden states
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return cast(Tensor, self.zero)


class _BaseModel(Protocol):
    """What a stage calls: the transformers decoder without its head."""

    def __call__(self, **kwargs: Any) -> Any: ...


class StageModel(nn.Module):
    """One stage of a pipeline: token ids or hidden states in, hidden states or logits out."""

    def __init__(self, skeleton: Skeleton, family: Family, modules: Sequence[str]) -> None:
        """Cut the skeleton, which is used up, to these modules: what a plan says of the stage."""
        super().__init__()
        model, kept = skeleton.model, set(modules)
        blocks = model.get_submodule(family.blocks)
        indices = [i for i in range(len(blocks)) if family.block(i) in kept]
        self.family, self.indices = family, tuple(indices)
        self.is_first = family.embeddings in kept
        self.is_last = indices[-1] == len(blocks) - 1
        self.has_head = family.head in kept
        self.slots = {name: slot for name, slot in skeleton.slots.items() if owner(name, family) in kept}
        self.slots |= _copied(skeleton, family, kept)
        set_module(model, family.blocks, nn.ModuleList(blocks[i] for i in indices))
        _renumber(model.get_submodule(family.blocks))
        _trim_config(model.config, indices)
        _neutralise(model, family, kept)
        self.config = model.config
        self.base = model.get_submodule(family.blocks.rpartition(".")[0])
        self.lm_head = model.get_submodule(family.head) if self.has_head else None
        self._takes_positions = "position_ids" in inspect.signature(self.base.forward).parameters

    def part(self, name: str | None) -> nn.Module | None:
        """A module by its full name in the model, None where the model lacks it or it lives on another stage."""
        base = self.family.blocks.rpartition(".")[0]
        at: nn.Module | None = self.base
        for attribute in name.removeprefix(f"{base}.").split(".") if name else ():
            at = None if at is None else at._modules.get(attribute)
        return at if name else None

    @property
    def blocks(self) -> list[nn.Module]:
        """Its blocks, in order; `indices` has their numbers in the model."""
        return list(cast(nn.ModuleList, self.part(self.family.blocks)))

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any | None,
        **options: Any,
    ) -> Tensor:
        """Token ids (batch, tokens) on the first stage, hidden states (batch, tokens, hidden) on later ones.

        attention_mask (batch, past + tokens) or None; position_ids (batch, tokens) or None; `options` are for attention
        functions. Returns hidden states.
        """
        kwargs: dict[str, Any] = {**options, "input_ids" if self.is_first else "inputs_embeds": inputs}
        if self._takes_positions:
            kwargs["position_ids"] = position_ids
        output = cast(_BaseModel, self.base)(
            attention_mask=attention_mask, past_key_values=cache, use_cache=cache is not None, **kwargs
        )
        return cast(Tensor, output.last_hidden_state)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary) of the last stage's hidden states."""
        if self.lm_head is None:
            raise RuntimeError("this stage has no head")
        return cast(Tensor, self.lm_head(hidden))


class ModelPart:
    """Blocks [first, last) of a model that is whole in this process, with what is around them, as a stage has it.

    The model stays as it is. This has its modules, but not the model itself.
    """

    def __init__(self, model: nn.Module, family: Family, first: int, last: int) -> None:
        blocks = list(model.get_submodule(family.blocks).children())
        self.family, self.indices, self.blocks = family, tuple(range(first, last)), blocks[first:last]
        self.is_first, self.is_last = first == 0, last == len(blocks)
        elsewhere = set() if self.is_first else {family.embeddings, family.positions, family.embedding_norm}
        elsewhere |= set() if self.is_first else {family.project_in}
        elsewhere |= set() if self.is_last else {family.final_norm, family.project_out}
        base = model.get_submodule(family.blocks.rpartition(".")[0])
        around = {f"{family.blocks.rpartition('.')[0]}.{name}": module for name, module in base.named_children()}
        self._around = {name: module for name, module in around.items() if name not in {*elsewhere, family.blocks}}
        head, embeddings = model.get_submodule(family.head), model.get_submodule(family.embeddings)
        self.has_head = self.is_first if head.weight is embeddings.weight else self.is_last
        self.lm_head = head if self.has_head else None

    def part(self, name: str | None) -> nn.Module | None:
        """As `StageModel.part`."""
        return self._around.get(name) if name else None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of its blocks."""
        return itertools.chain.from_iterable(block.parameters() for block in self.blocks)

    def tensors(self) -> Iterator[Tensor]:
        """The weights that it computes with."""
        family = self.family
        names = (family.embeddings, family.positions, family.embedding_norm, family.project_in, family.final_norm)
        around = [self.part(name) for name in (*names, family.project_out)]
        for module in (*self.blocks, *filter(None, around), *filter(None, [self.lm_head])):
            yield from module.parameters()
            yield from module.buffers()

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules around its blocks."""
        return iter(self._around.items())


def owner(name: str, family: Family) -> str:
    """The module of a plan that a tensor belongs to: its block, or the module that holds it."""
    if name.startswith(f"{family.blocks}."):
        return family.block(int(name[len(family.blocks) + 1 :].partition(".")[0]))
    return name.rpartition(".")[0]


def _copied(skeleton: Skeleton, family: Family, kept: set[str]) -> dict[str, Slot]:
    """Slots of modules that are kept here for tensors that the checkpoint has for others, to which they are tied: a
    head of its own is filled with the embeddings."""
    slots = {}
    for target, origin in skeleton.tied.items():
        module = owner(target, family)
        if module in kept and owner(origin, family) not in kept:
            slots[origin] = replace(skeleton.slots[origin], module=skeleton.model.get_submodule(module))
    return slots


def _renumber(blocks: nn.Module) -> None:
    """The cache of a stage counts its own blocks from zero."""
    for index, block in enumerate(blocks.children()):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                setattr(module, "layer_idx", index)  # noqa: B010  (a Module's attributes are typed as tensors)


def _trim_config(config: Any, indices: Sequence[int]) -> None:
    types = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(indices)
    if types is not None:
        config.layer_types = [types[i] for i in indices]


def _neutralise(model: nn.Module, family: Family, kept: set[str]) -> None:
    """Let the modules around the blocks that live elsewhere do nothing."""
    instead: dict[str | None, nn.Module | None] = {
        family.embeddings: None,
        family.positions: _ZeroPositions(),
        family.embedding_norm: nn.Identity(),
        family.project_in: None,
        family.final_norm: nn.Identity(),
        family.project_out: nn.Identity(),
    }
    for name, module in instead.items():
        if name is None or name in kept:
            continue
        parent, _, attribute = name.rpartition(".")
        if model.get_submodule(parent)._modules.get(attribute) is not None:  # a model may lack it
            set_module(model, name, module)
