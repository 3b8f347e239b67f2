"""Which of a checkpoint's tensors goes into which slot of a model, what is to happen to it on the way, and which slots
lie side by side."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from ..checkpoint.headers import Checkpoint, TensorInfo, check_weight_dtypes
from ..checkpoint.int8_format import FORMAT, SCALES
from ..errors import CheckpointError
from ..families.layout import Config
from ..families.table import find_family
from ..model.skeleton import Skeleton, Slot

SHOWN_NAMES = 10
"""How many names an error lists."""


class Step(Enum):
    """What happens to a tensor: it is copied into the slot's dtype, quantized, or is a part of a stored int8 layer."""

    COPY = "copy"
    QUANTIZE = "quantize"
    INT8 = "int8"
    SCALES = "scales"
    FORMAT = "format"


@dataclass(frozen=True)
class Transfer:
    """A tensor on its way into a slot. Several tensors fill the slot of a layer that is stored in int8."""

    tensor: TensorInfo
    slot: Slot
    step: Step

    @property
    def whole(self) -> bool:
        """Whether all rows must come at once: a transposed weight's scales are known only at its end."""
        return self.step is Step.QUANTIZE and self.slot.transposed


def match_tensors(slots: dict[str, Slot], checkpoint: Checkpoint, named: dict[str, TensorInfo]) -> list[Transfer]:
    """What fills the slots, from tensors by the model's names.

    Raises CheckpointError for tensors that are missing, of another shape or dtype.
    """
    missing = sorted(slots.keys() - named.keys())
    if missing:
        more = f" and {len(missing) - SHOWN_NAMES} more" if len(missing) > SHOWN_NAMES else ""
        raise CheckpointError(
            f"{checkpoint.folder}: {len(missing)} tensor{'s are' if len(missing) > 1 else ' is'} missing: "
            f"{', '.join(missing[:SHOWN_NAMES])}{more}; it is incomplete or not this config's"
        )
    transfers = []
    for name, slot in slots.items():
        tensor = named[name]
        if tensor.dtype == "I8" and slot.is_int8 and checkpoint.is_int8:
            _check_shape(tensor, slot.data_shape)
            transfers += [Transfer(tensor, slot, Step.INT8), *_beside(name, slot, tensor, named)]
            continue
        _check_shape(tensor, slot.shape)
        check_weight_dtypes([tensor])
        transfers.append(Transfer(tensor, slot, Step.QUANTIZE if slot.is_int8 else Step.COPY))
    return transfers


def side_by_side(slots: Mapping[str, Slot], config: Config) -> list[tuple[str, ...]]:
    """The slots whose rows lie one after the other in one tensor, so that fused blocks multiply with all of it at once.

    These are the weights, or the biases, of q, k and v of a block, and of gate and up: what the recipe of the model's
    family names together. Slots that differ in more than their rows, such as one in 16-bit, are left apart.
    """
    family = find_family(config["model_type"])
    recipe = None if family is None else family.recipe(config)
    if family is None or recipe is None:
        return []
    together = []
    for parts in (recipe.qkv, recipe.up):
        for attribute in ("weight", "bias"):
            ending = f".{parts[0]}.{attribute}"
            blocks = [name.removesuffix(ending) for name in slots if name.endswith(ending)]
            together += [tuple(f"{block}.{part}.{attribute}" for part in parts) for block in blocks]
    return [names for names in together if len(names) > 1 and _differ_in_rows_only(names, slots)]


def _differ_in_rows_only(names: tuple[str, ...], slots: Mapping[str, Slot]) -> bool:
    found = [slots[name] for name in names if name in slots]
    return len(found) == len(names) and len({(slot.is_int8, slot.dtype, slot.data_shape[1:]) for slot in found}) == 1


def unused_tensors(skeleton: Skeleton) -> list[str]:
    """The tensors that no module wants, by their names in the checkpoint."""
    named = skeleton.tensors
    wanted = set(skeleton.slots)
    for name, slot in skeleton.slots.items():
        if slot.is_int8 and name in named and named[name].dtype == "I8":
            module = name.rpartition(".")[0]
            wanted |= {f"{module}.{SCALES}", f"{module}.{FORMAT}"}
    return sorted(tensor.name for name, tensor in named.items() if name not in wanted)


def _beside(name: str, slot: Slot, weight: TensorInfo, named: dict[str, TensorInfo]) -> Iterable[Transfer]:
    """The scales, and the note of their format, of a weight that is stored in int8."""
    module = name.rpartition(".")[0]
    scales, order = named.get(f"{module}.{SCALES}"), named.get(f"{module}.{FORMAT}")
    if scales is None:
        raise CheckpointError(
            f"{weight.file}: tensor {weight.name!r} is int8, but its scales, {module}.{SCALES}, are missing; without "
            "them it means nothing: save the model again, or load the original checkpoint"
        )
    if scales.dtype != "F32":
        raise CheckpointError(f"{scales.file}: tensor {scales.name!r} is stored as {scales.dtype}; scales must be F32")
    _check_shape(scales, (slot.out_features,))
    yield Transfer(scales, slot, Step.SCALES)
    if order is not None:
        if order.dtype != "U8" or order.nbytes != 1:
            raise CheckpointError(f"{order.file}: tensor {order.name!r} is not one uint8, as bitsandbytes writes it")
        yield Transfer(order, slot, Step.FORMAT)


def _check_shape(tensor: TensorInfo, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}, but the config asks for "
            f"{list(expected)}"
        )
