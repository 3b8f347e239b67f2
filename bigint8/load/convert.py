"""What happens to rows on their way into a slot: they are quantized, copied, or taken as they are."""

import torch
from bigint8_kernels import copy_values, quantize_rows
from torch import Tensor

from ..checkpoint.int8_format import ROWS_AS_THEY_ARE, absmax_to_scales
from ..errors import CheckpointError
from .assign import Step, Transfer
from .stream import Chunk


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
    """The memory for these rows: the slot's weight, or its scales for `Step.SCALES`. If the slot is int8, also the
    memory for the scales of these rows."""
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


def too_large(transfer: Transfer, dtype: torch.dtype | None = None) -> CheckpointError:
    """The error for values that do not fit the dtype they are stored in, that of the slot if none is given."""
    tensor = transfer.tensor
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name!r} holds values too large for {dtype or transfer.slot.dtype}; load with "
        "dtype=float32 or dtype=bfloat16"
    )


def damaged(chunk: Chunk, what: str) -> CheckpointError:
    """The error for a chunk that holds what no weight does."""
    return CheckpointError(
        f"{chunk.tensor.file}: tensor {chunk.tensor.name!r} holds {what} in rows {chunk.row_start} to "
        f"{chunk.row_stop - 1}; the checkpoint is damaged, download it again"
    )
