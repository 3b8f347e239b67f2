"""The memory model: what a stage takes of its device besides its weights."""

from collections.abc import Sequence
from math import ceil

from ..families.layout import Layout, Sizes
from ..options import PAGE_TOKENS, Workload
from ..units import MIB

HOST_BUFFER_BYTES = 2 * MIB
"""Size of a staging buffer for the CPU. Two of them fit in its last cache, where their rows are quantized."""

GPU_BUFFER_BYTES = 16 * MIB - 2**14
"""Size of a staging buffer for a GPU: large enough that a copy runs at the speed of the bus. torch hands out
page-locked memory in powers of two. So the size stays 16 KiB below one, because reads are padded to whole pages."""

GPU_READERS = 4
"""Readers, and staging buffers, for each GPU at most: each box may have many."""

GPU_CHUNKS = 2 * GPU_READERS
"""Chunks that a GPU works on at once while a model is loaded, each in memory of its own there."""

KERNEL_BYTES = 64 * MIB
"""What a product may take besides its result: a slice of the weight in a float format."""

GRAPH_ROWS = 64
"""Rows of the largest step that a GPU captures in a CUDA graph. Smaller ones share its memory (`model/graphs.py`)."""

LOGITS_ROWS = 32
"""Rows that the head multiplies at once."""


def workspace_bytes(layout: Layout, workload: Workload, dtype_bytes: int, on_cpu: bool = False) -> int:
    """An estimate of what a stage needs besides weights and cache: computed, not measured.

    Loading needs the staging ring, on the device too. Running comes after it. A step has as many rows as a prompt's
    chunk and a token of every sequence. Besides its rows it needs the logits of those that the head takes at once, a
    slice of a product, and on a GPU what CUDA graphs keep: rows of their own, and what they read.
    """
    logits = LOGITS_ROWS * layout.sizes.vocab * 4
    if on_cpu:
        rows = workload.most_rows * _cpu_row_bytes(layout.sizes)
    else:
        rows = (workload.most_rows + GRAPH_ROWS) * _gpu_row_bytes(layout.sizes, dtype_bytes)
        rows += graph_input_bytes(layout, workload, dtype_bytes)
    return max(rows + logits + KERNEL_BYTES, GPU_CHUNKS * GPU_BUFFER_BYTES)


def graph_input_bytes(layout: Layout, workload: Workload, dtype_bytes: int) -> int:
    """The most that the places take from which the CUDA graphs of a stage read.

    A row has its hidden state, its pages in each group, five more integers, and the cosines and sines of its position:
    no more values than its keys in a block.
    """
    integers = 5 + len(layout.groups) * ceil(workload.context / PAGE_TOKENS)
    return GRAPH_ROWS * (layout.sizes.hidden * dtype_bytes + 4 * integers + 4 * (layout.sizes.kv_values // 2))


def _ups(sizes: Sizes) -> int:
    """How many layers lead into the feed-forward part: two where it is gated."""
    return sum(linear.outputs == sizes.widest and linear.inputs == sizes.hidden for linear in sizes.linears)


def _gpu_row_bytes(sizes: Sizes, dtype_bytes: int) -> int:
    """The residual stream, its norm, and q, k and v (five hidden vectors), the feed-forward part before and after its
    activation; the widest input in int8."""
    return (5 * sizes.hidden + (_ups(sizes) + 1) * sizes.widest) * dtype_bytes + sizes.widest


def _cpu_row_bytes(sizes: Sizes) -> int:
    """Memory of its own for each kind of activation, in float32: the residual stream, its norm, what attention gives,
    the outputs of all linear layers and the activated feed-forward part. Besides, the widest input as int16, and the
    int32 sums of the widest product."""
    outputs = sum(linear.outputs for linear in sizes.linears)
    return 4 * (3 * sizes.hidden + outputs + sizes.widest) + (2 + 4 * _ups(sizes)) * sizes.widest


def pages(layout: Layout, workload: Workload, stages: int) -> tuple[int, ...]:
    """How many pages of keys and values each group of blocks has (`Layout.groups`): the whole context of each sequence.

    Blocks with a sliding window keep what the next token sees. While a prompt's chunk runs, its own tokens come on top;
    that many chunks run at once as there are slots: one, or one more than there are stages.
    """
    context, slots = workload.context, 1 if stages == 1 else stages + 1
    whole, chunk = ceil(context / PAGE_TOKENS), ceil(min(workload.chunk, context) / PAGE_TOKENS)

    def group(window: int | None) -> int:
        if window is None:
            return workload.sequences * whole
        kept = min(whole, ceil((window - 1) / PAGE_TOKENS) + 1)  # the first and the last may be partly used
        return min(workload.sequences * whole, workload.sequences * kept + slots * chunk)

    return tuple(group(window) for window in layout.groups)


def kv_bytes(layout: Layout, block: int, pages: Sequence[int], dtype_bytes: int) -> int:
    """Bytes of one block's pool of keys and values."""
    return pages[layout.group_of(block)] * layout.page_bytes(dtype_bytes)
