"""The transformers model that a load returns: it holds to its plan, runs long prompts in chunks, and can be saved."""

import functools
from typing import Any

import torch
from torch import Tensor

from ..model.chunks import prompt_chunks
from ..plan.plan import Plan
from .fill import LoadReport
from .save import save_int8


def as_loaded(model: Any, plan: Plan, report: LoadReport) -> Any:
    """The model with its `plan`, its `load_report` and the method `save_int8(folder)`."""
    model.config.name_or_path = model.name_or_path = str(plan.spec.folder)
    model.plan, model.load_report = plan, report
    model.__class__ = _loaded_class(type(model))  # type: ignore[arg-type]
    return model


@functools.cache
def _loaded_class(kind: Any) -> Any:
    """A subclass of the model's class, with our `forward` and `save_int8`.

    These are not attributes of the model. An attribute that refers to the model would keep its memory until a garbage
    collection; one with a weak reference would lose the model in `load(path).save_int8(folder)`.
    """

    @functools.wraps(kind.forward)  # transformers reads from its signature what a model takes
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        ids, cache = _tokens(args, kwargs), kwargs.get("past_key_values")
        if ids is None:
            return kind.forward(self, *args, **kwargs)
        past = cache.get_seq_length() if cache is not None else 0
        self.plan.check_room(ids.shape[0], past + ids.shape[1])
        if ids.shape[1] <= self.plan.workload.chunk or not _can_be_cut(args, kwargs):
            return kind.forward(self, *args, **kwargs)
        return _in_chunks(functools.partial(kind.forward, self), ids, past, self.plan.workload.chunk, kwargs)

    members = {"save_int8": save_int8, "forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), members)


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The token ids (batch, tokens), or embeddings in their place."""
    if args and args[0] is not None:
        return args[0] if isinstance(args[0], Tensor) else None
    return next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)


CUT = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
"""The tensors that are cut with the prompt. A model that is given others gets them whole."""


def _can_be_cut(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a prompt may run chunk by chunk: with a cache, and when nothing but logits is wanted."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    return (
        len(args) <= 1
        and kwargs.get("past_key_values") is not None
        and not any(isinstance(value, Tensor) for name, value in kwargs.items() if name not in CUT)
        and not any(kwargs.get(name) for name in ("output_hidden_states", "output_attentions"))
        and kwargs.get("return_dict") is not False
        and "logits_to_keep" in kwargs
        and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))
        and (positions is None or positions.ndim == 2)
    )


def _in_chunks(forward: Any, ids: Tensor, past: int, most: int, kwargs: dict[str, Any]) -> Any:
    """What `forward` returns for the last chunk, with the wanted logits of all."""
    given = {name: value for name, value in kwargs.items() if name != "input_ids"}
    mask, positions, keep = given.get("attention_mask"), given.get("position_ids"), given["logits_to_keep"]
    order, logits = None, []
    if isinstance(keep, Tensor):  # the indices as Python has them: from the end too, in any order
        keep, order = torch.where(keep < 0, keep + ids.shape[1], keep).sort()
    for chunk in prompt_chunks(ids.shape[1], most, keep):
        if mask is not None:
            given["attention_mask"] = mask[:, : past + chunk.stop]
        if positions is not None:
            given["position_ids"] = positions[:, chunk.start : chunk.stop]
        given["logits_to_keep"] = chunk.keep if len(chunk.keep) else 1
        output = forward(input_ids=ids[:, chunk.start : chunk.stop], **given)
        if len(chunk.keep):
            logits.append(output.logits)
    output.logits = torch.cat(logits, dim=1)
    if order is not None:
        output.logits = output.logits[:, order.argsort().to(output.logits.device)]
    return output
