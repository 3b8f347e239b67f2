"""What a checkpoint's tensors are called in the model: names change between versions and with what was saved."""

from collections.abc import Callable, Iterable
from typing import Any

from .stored_int8 import FORMAT, SCALES


def model_names(model: Any, wanted: Iterable[str]) -> Callable[[str], str]:
    """A function from a checkpoint's tensor names to the model's; names that are none of `wanted` stay as they are.

    Handles what transformers renamed since (GPT-NeoX's `embed_out`) and checkpoints saved from the base model, whose
    names lack its prefix (BLOOM, GPT-2, OPT). The scales of an int8 weight go where the weight goes.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    known = dict.fromkeys(wanted, True)
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]

    def ours(name: str) -> str:
        if name in known:
            return name
        module, _, attribute = name.rpartition(".")
        if attribute in (SCALES, FORMAT):
            return f"{ours(f'{module}.weight').removesuffix('.weight')}.{attribute}"
        return str(rename_source_key(name, renamings, [], model.base_model_prefix, known)[0])

    return ours
