"""A transformers model that is whole in this process, with the fused blocks, pages and attention of a pipeline.

It still is the transformers model. Whatever looks inside (hidden states, attentions, hooks, embeddings as inputs) runs
through its own modules, with transformers' own cache.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import BigInt8Error
from ..families.layout import Family
from ..families.table import find_family
from ..load.fill import where
from ..model.fused_stage import FusedStage
from ..model.offload import Kept
from ..model.stage import ModelPart
from ..model.step import Result, Step
from ..plan.plan import DeviceMap, Plan
from .driver import PagedCache, counts_tokens
from .engine import Engine
from .running import answer, room_of
from .stages import LocalStages
from .trace import Trace

CAPTURING = "transformers.utils.output_capturing"
"""Where transformers' hooks for hidden states and attentions are from."""


def with_pages(model: Any, trace: Trace | None = None) -> Any:
    """Let a loaded model (`load.loaded.as_loaded`) run over pages, where its family and its device map allow it.

    It then has an `engine`, which runs many requests at once, and ends with the model.
    """
    model.engine = engine = engine_of(model, model.plan, trace)
    model._known = None if engine is None else _Known(model)
    if engine is not None:
        weakref.finalize(model, engine.close)
    model.__class__ = _paged_class(type(model))  # type: ignore[arg-type]
    return model


def engine_of(model: Any, plan: Plan, trace: Trace | None = None) -> Engine | None:
    """An engine for a model that is whole in this process, with keys and values of its own; None for one that has to
    run through its own modules. It does not keep the model."""
    family = find_family(model.config.model_type)
    stages = None if family is None else _stages(model, family, plan)
    if stages is None:
        return None
    for stage, _ in stages:
        stage.prepare()
    return Engine.of(plan, LocalStages(_run_through(stages)), trace)


def _stages(model: Any, family: Family, plan: Plan) -> list[tuple[FusedStage, bool]] | None:
    """The model as stages, one for each device in turn, and which has the head; None for one that has to run through
    its own modules."""
    if not plan.pages:
        return None
    devices, count = DeviceMap(plan.device_map()), len(model.get_submodule(family.blocks))
    there = [where(devices[family.block(i)]) for i in range(count)]
    runs = [i for i in range(count) if i == 0 or there[i] != there[i - 1]]
    bounds = list(zip(runs, [*runs[1:], count], strict=True))
    parts = [(ModelPart(model, family, first, last), there[first]) for first, last in bounds]
    kept: Kept = getattr(model, "kept", {})
    elsewhere = {extent.data.untyped_storage().data_ptr() for block in kept.values() for extent in block.extents}
    for part, device in parts:
        strange = (tensor for tensor in part.tensors() if tensor.device != torch.device(device))
        if any(tensor.untyped_storage().data_ptr() not in elsewhere for tensor in strange):
            return None
    recipe, layout = family.recipe(plan.spec.config), plan.spec.known_layout
    if recipe is None:
        return None
    try:
        return [
            (FusedStage(part, recipe, layout, room_of(plan, device), kept), part.has_head) for part, device in parts
        ]
    except BigInt8Error:  # rotary positions that change with the batch
        return None


def _run_through(stages: list[tuple[FusedStage, bool]]) -> Callable[[Step], Result]:
    """All stages of this process as one."""
    with_head = next(stage for stage, has_head in stages if has_head)

    @torch.no_grad()
    def run(step: Step) -> Result:
        hidden: Tensor | None = None
        for stage, _ in stages:
            hidden = stage.run(step, hidden)
        assert hidden is not None
        return Result(step.number, answer(with_head, step, hidden))

    return run


class _Known:
    """What the recorded steps of a model rest on: where its tensors are, and which hooks it has."""

    def __init__(self, model: Any) -> None:
        modules = list(model.modules())
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._count = self._hook_count()
        self._foreign = self._foreign_hooks()
        self._addresses = _addresses(model)

    def _hook_count(self) -> int:
        return sum(map(len, self._hooks))

    def _foreign_hooks(self) -> int:
        return sum(hook.__module__ != CAPTURING for hooks in self._hooks for hook in hooks.values())

    def has_new_hooks(self) -> bool:
        """Whether somebody listens in since then. Transformers' own hooks stay where hidden states were once asked for;
        they do nothing unless they are asked for again."""
        if self._hook_count() == self._count:
            return False
        return self._foreign_hooks() != self._foreign

    def holds(self, model: Any) -> bool:
        """Whether the model's tensors are still those."""
        return bool(self._addresses == _addresses(model))


def _addresses(model: Any) -> list[int]:
    return [tensor.data_ptr() for tensor in _tensors(model)]


def _tensors(model: Any) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


TAKEN = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict",
    "cache_position",
}  # fmt: skip
"""What a forward pass over pages takes. A call that says more runs through the model's own modules."""


@functools.cache
def _paged_class(kind: Any) -> Any:
    """A subclass of a loaded model's class that runs over pages where it can."""

    @functools.wraps(kind.forward)  # transformers reads from its signature what a model takes
    def forward(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        paged = isinstance(cache, PagedCache)
        if not (paged or cache is None) or args or not _is_plain(self, input_ids, kwargs):
            if paged:
                raise BigInt8Error(
                    "past_key_values holds pages, which a call with hooks, embeddings, or for attentions or hidden "
                    "states cannot use; begin without past_key_values, and with output_attentions or "
                    "output_hidden_states from the start"
                )
            if input_ids is not None:
                args = (input_ids, *args)
            return kind.forward(self, *args, **kwargs)
        use_cache = kwargs.get("use_cache")
        kept = paged or (self.config.use_cache if use_cache is None else use_cache)
        cache = PagedCache(self.engine) if cache is None else cache
        logits = cache.forward(
            input_ids,
            kwargs.get("attention_mask"),
            kwargs.get("position_ids"),
            kwargs.get("logits_to_keep", 0),
            counts_tokens(self.config),
        )
        return CausalLMOutputWithPast(logits=logits.to(self.device), past_key_values=cache if kept else None)

    def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        looks = generation_config.output_attentions or generation_config.output_hidden_states
        given = model_kwargs.get("past_key_values") is not None or generation_config.cache_implementation is not None
        off = generation_config.use_cache is False
        if looks or given or off or "inputs_embeds" in model_kwargs or not _can(self):
            return kind._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)
        model_kwargs["past_key_values"] = PagedCache(self.engine)
        return None

    def getstate(self: Any) -> dict[str, Any]:
        return {**self.__dict__, "engine": None, "_known": None, "kept": {}}  # a copy runs through its own modules

    members = {
        "forward": forward,
        "__getstate__": getstate,
        "_prepare_cache_for_generation": prepare,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (kind,), members)


def _can(model: Any) -> bool:
    """Whether the model is as it was loaded, and nobody listens in."""
    return model.engine is not None and not model._known.has_new_hooks() and model._known.holds(model)


def _is_plain(model: Any, ids: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call wants logits of token ids and no more, of a model that can give them so."""
    if model.engine is None:
        return False
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    return (
        isinstance(ids, Tensor)
        and ids.ndim == 2
        and all(name in TAKEN or not value for name, value in kwargs.items() if not isinstance(value, Tensor))
        and all(name in TAKEN for name, value in kwargs.items() if isinstance(value, Tensor))
        and kwargs.get("return_dict") is not False
        and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))
        and (positions is None or positions.ndim == 2)
        and not (model.config.output_attentions or model.config.output_hidden_states)
        and not model._known.has_new_hooks()
        and (kwargs.get("past_key_values") is not None or model._known.holds(model))
    )
