"""From a checkpoint's tensors to a model's slots: which goes where, and what happens to its rows on the way."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from bigint8_kernels import copy_values, quantize_rows
from torch import Tensor

from .checkpoint import Checkpoint, TensorInfo, check_weight_dtypes
from .errors import CheckpointError
from .naming import model_names
from .stage import Skeleton, Slot
from .stored_int8 import FORMAT, ROWS_AS_THEY_ARE, SCALES, absmax_to_scales
from .stream import TORCH_DTYPES, Chunk

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


def name_tensors(checkpoint: Checkpoint, skeleton: Skeleton) -> dict[str, TensorInfo]:
    """The checkpoint's tensors by the names that the model has for them; those it does not want keep their own.

    Of a tied pair, the one that was saved is the one that is kept, whichever that is.
    """
    ours_of = model_names(skeleton.model, [*skeleton.slots, *skeleton.tied])
    named: dict[str, TensorInfo] = {}
    for name, tensor in checkpoint.tensors.items():
        ours = ours_of(name)
        if ours in named:
            raise CheckpointError(f"{tensor.file}: tensor {name!r} and {named[ours].name!r} are both {ours!r}")
        named[ours] = tensor
    for target, origin in skeleton.tied.items():
        if origin not in named and target in named:
            named[origin] = named.pop(target)
    return named


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


def unused_tensors(skeleton: Skeleton) -> list[str]:
    """The tensors that no module wants, by their names in the checkpoint."""
    named = skeleton.tensors
    wanted = set(skeleton.slots)
    for name, slot in skeleton.slots.items():
        if slot.is_int8 and name in named and named[name].dtype == "I8":
            module = name.rpartition(".")[0]
            wanted |= {f"{module}.{SCALES}", f"{module}.{FORMAT}"}
    return sorted(tensor.name for name, tensor in named.items() if name not in wanted)


def put_rows(transfer: Transfer, chunk: Chunk, out: Tensor, scale_R: Tensor | None) -> None:
    """Bring a chunk of rows into `out`, on its device: rows of the slot's weight, scales for `Step.SCALES`.

    `scale_R` takes the scales of rows that are quantized. Raises CheckpointError for values that no weight has.
    """
    tensor, data = transfer.tensor, chunk.data
    match transfer.step:
        case Step.INT8:
            out.copy_(data)
        case Step.SCALES:
            if not absmax_to_scales(data.to(out.device), out):
                raise damaged(chunk, "a scale that is negative, NaN or infinite")
        case Step.FORMAT:
            if (stored := int(data)) != ROWS_AS_THEY_ARE:
                raise CheckpointError(
                    f"{tensor.file}: tensor {tensor.name!r} is {stored}, an order of int8 values that only old GPUs "
                    "use; save the model again with a current bitsandbytes, or load the original checkpoint"
                )
        case Step.QUANTIZE:
            assert scale_R is not None
            data = data.to(out.device)
            if not quantize_rows(data.T if transfer.slot.transposed else data, out, scale_R):
                raise damaged(chunk, "NaN or infinity")
        case Step.COPY:
            finite, fits = copy_values(data.to(out.device), out)
            if not finite:
                raise damaged(chunk, "NaN or infinity")
            if not fits:
                raise too_large(transfer, out.dtype)


def place_of(transfer: Transfer, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
    """Where a chunk of rows goes in the slot's memory, or in its scales for `Step.SCALES`; the scales of these rows
    besides, where the slot is int8."""
    module = transfer.slot.module
    weight: Tensor = getattr(module, transfer.slot.attribute).data
    rows = slice(None) if transfer.whole else slice(chunk.row_start, chunk.row_stop)
    scale = module.scale if transfer.slot.is_int8 else None
    assert scale is None or isinstance(scale, Tensor)
    if transfer.step is Step.SCALES:
        assert scale is not None
        return scale[rows], None
    if transfer.step is Step.FORMAT:
        return weight, None
    return weight[rows] if weight.ndim else weight, None if scale is None else scale[rows]


def store(transfer: Transfer, chunk: Chunk) -> None:
    """Bring a chunk of rows into its slot's memory."""
    put_rows(transfer, chunk, *place_of(transfer, chunk))


def convert(transfer: Transfer, chunk: Chunk, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A chunk of rows as it would be stored, on the CPU, and the scales of rows that are quantized.

    `dtype` is that of values that are only copied. Raises what `put_rows` raises.
    """
    data = chunk.data
    if transfer.step is Step.QUANTIZE:
        shape = data.shape[::-1] if transfer.slot.transposed else data.shape
        out, scale_R = torch.empty(shape, dtype=torch.int8), torch.empty(shape[0])
        put_rows(transfer, chunk, out, scale_R)
        return out, scale_R
    out = torch.empty(data.shape, dtype=dtype if transfer.step is Step.COPY else data.dtype)
    put_rows(transfer, chunk, out, None)
    return out, None


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that most of the checkpoint's bytes are stored in, besides int8, as torch names it."""
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        if not tensor.name.endswith((f".{SCALES}", f".{FORMAT}")):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    floats = {dtype: size for dtype, size in sizes.items() if dtype in ("F16", "BF16", "F32")}
    if not floats:
        check_weight_dtypes(checkpoint.tensors.values())
        raise CheckpointError(f"{checkpoint.folder}: the checkpoint holds no tensors")
    return str(TORCH_DTYPES[max(floats, key=lambda dtype: floats[dtype])]).removeprefix("torch.")


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


def too_large(transfer: Transfer, dtype: torch.dtype | None = None) -> CheckpointError:
    """The error for values that do not fit the dtype they are stored in, that of the slot if none is given."""
    tensor = transfer.tensor
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name!r} holds values too large for {dtype or transfer.slot.dtype}; load with "
        "dtype='float32' or 'bfloat16'"
    )


def damaged(chunk: Chunk, what: str) -> CheckpointError:
    """The error for a chunk that holds what no weight does."""
    return CheckpointError(
        f"{chunk.tensor.file}: tensor {chunk.tensor.name!r} holds {what} in rows {chunk.row_start} to "
        f"{chunk.row_stop - 1}; the checkpoint is damaged, download it again"
    )
