"""The memory model: what a stage takes of its device besides its weights."""

from ..families.layout import Layout
from ..options import Workload
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


def workspace_bytes(layout: Layout, workload: Workload, dtype_bytes: int) -> int:
    """An estimate of what a stage needs besides weights and cache: computed, not measured.

    Loading needs the staging ring, on the device too; running comes after it and needs, for the tokens of a prompt's
    chunk: the residual stream, its norm, and q, k and v (five hidden vectors), two of the widest layer's outputs.
    Besides: the cache of one block again (a growing cache is copied to grow), the logits, a product's slice; and where
    attention is not fused (BLOOM), its scores in the model's dtype and their softmax in float32.
    """
    sizes, sequences = layout.sizes, workload.sequences
    chunk = min(workload.chunk, workload.context)
    activations = sequences * chunk * (5 * sizes.hidden + 2 * sizes.widest) * dtype_bytes
    growing = max(layout.kv_bytes(b, workload.context, sequences, dtype_bytes) for b in range(len(layout.blocks)))
    scores = sequences * sizes.eager_heads * chunk * workload.context * (2 * dtype_bytes + 4)
    running = activations + growing + scores + sequences * sizes.vocab * 4 + KERNEL_BYTES
    return max(running, GPU_CHUNKS * GPU_BUFFER_BYTES)


def kv_bytes(layout: Layout, context: int, sequences: int, dtype_bytes: int) -> int:
    """Bytes of the whole model's cache once `sequences` of `context` tokens are in it."""
    return sum(layout.kv_bytes(block, context, sequences, dtype_bytes) for block in range(len(layout.blocks)))
