"""What a checkpoint's tensors are called in the model: names change between versions and with what was saved."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..checkpoint.headers import Checkpoint, TensorInfo
from ..checkpoint.int8_format import FORMAT, SCALES
from ..errors import CheckpointError


def model_names(model: Any, wanted: Iterable[str]) -> Callable[[str], str]:
    """A function from a checkpoint's tensor names to the model's; names that are none of `wanted` stay as they are.

    Handles what transformers renamed since (GPT-NeoX's `embed_out`) and checkpoints saved from the base model, whose
    names lack its prefix (BLOOM, GPT-2, OPT). The scales of an int8 weight go where the weight goes.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    known, prefix = dict.fromkeys(wanted, True), model.base_model_prefix
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]

    def renamed(name: str) -> str:
        return name if name in known else str(rename_source_key(name, renamings, [], prefix, known)[0])

    def ours(name: str) -> str:
        """It holds neither the model nor itself: a circle would keep the model's memory until a garbage collection."""
        module, _, attribute = name.rpartition(".")
        if name not in known and attribute in (SCALES, FORMAT):
            return f"{renamed(f'{module}.weight').removesuffix('.weight')}.{attribute}"
        return renamed(name)

    return ours


def name_tensors(
    checkpoint: Checkpoint, model: Any, slots: Iterable[str], tied: Mapping[str, str]
) -> dict[str, TensorInfo]:
    """The checkpoint's tensors by the names that the model has for them; those it does not want keep their own.

    slots: the names that the model wants; tied: names that share another one's tensor. Of a tied pair, the one that was
    saved is the one that is kept, whichever that is.
    """
    ours_of = model_names(model, [*slots, *tied])
    named: dict[str, TensorInfo] = {}
    for name, tensor in checkpoint.tensors.items():
        ours = ours_of(name)
        if ours in named:
            raise CheckpointError(f"{tensor.file}: tensor {name!r} and {named[ours].name!r} are both {ours!r}")
        named[ours] = tensor
    for target, origin in tied.items():
        if origin not in named and target in named:
            named[origin] = named.pop(target)
    return named
