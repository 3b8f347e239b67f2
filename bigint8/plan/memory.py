"""The memory model: what a stage takes of its device besides its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

from ..families.layout import Layout, Recipe, Sizes
from ..options import PAGE_TOKENS, Workload
from ..units import MIB
from .devices import usable_cpus

FEWEST_READERS, MOST_READERS = 2, 16
"""Threads that read a checkpoint for the CPU: one for each CPU, within these bounds."""

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

FEWEST_HEAD_ROWS, MOST_HEAD_ROWS = 16, 64
"""Rows that the head takes at once: its results are as wide as the vocabulary."""

CACHE_LINE = 64
"""Bytes by which each memory of a step on the CPU is larger than its rows, so that these begin with a cache line."""

ACTIVATION_BLOCK = 512
"""Values of a row that share a scale as int16: `bigint8_kernels.reference.BLOCK`."""

ATTENTION_CHUNK, RESULT_BYTES, SPLIT_TILES_A_THREAD, TILE = 128, 8448, 4, 4
"""Places that share a softmax; the results of a tile of four queries for them; tiles for each thread that are split:
CHUNK, RESULTS, SPLIT_TILES_A_THREAD and TILE of `bigint8_kernels`' attention on the CPU."""

OUTLIER_BYTES = 2 * 2**20
"""The list of a prompt's outliers, MOST_LISTED of `bigint8_kernels.cpu_outliers`, and tiles of weights for 16 threads.
"""

POSITIONS = 1024
"""Rotary positions whose cosines and sines are computed together: `model.rotary.POSITIONS`."""

PACKED_ROWS = 128
"""Up to so many rows, torch's integer product packs no weights."""

PACKED_SHARE = 0.51
"""Of a product's int8 weights what oneDNN packs at once. Measured with torch 2.13's on a CPU with AVX512-VNNI, on 1 to
8 threads: 0.41 to 0.53."""

PACKED_HEAD_SHARE = 0.63
"""Of a 16-bit head's weights what torch's own product packs, where transformers' modules run. Measured as above."""

PACKINGS = 4
"""How often the allocator keeps that: aligned memory that was freed seldom fits the next product (glibc). Measured: 3
to 5 times. What is larger than MAPPED_BYTES goes back to the system."""

MODULES_KEEP = 1.2
"""How much more transformers' modules take than their values at one time: holes in the heap. Runs differ by 10 %."""

MAPPED_BYTES = 32 * MIB
"""From this size on, glibc maps each allocation by itself (M_MMAP_THRESHOLD's largest value)."""

SPARE_BUFFERS = 4
"""Buffers that a link keeps, and their size beyond the message: `run.buffers`."""

BLOCK_OBJECT_BYTES = 2**15
"""Python's objects of a block's recorded operations, and their steps."""


@dataclass(frozen=True)
class Workspace:
    """What a stage takes of its device besides weights, keys and values, in bytes, each by what it is for.

    anywhere: of any stage; block: of each of its blocks besides; front, back: of the stage with the first block, and of
    that with the last one; received, sent: of all stages but the first, and of all but the last
    loading: while its weights are read, which comes before all that is `anywhere`
    """

    anywhere: Mapping[str, int]
    block: Mapping[str, int] = field(default_factory=dict)
    front: Mapping[str, int] = field(default_factory=dict)
    back: Mapping[str, int] = field(default_factory=dict)
    received: int = 0
    sent: int = 0
    loading: int = 0

    @cached_property
    def inner_bytes(self) -> int:
        """Of a stage that is neither the first nor the last, without its blocks."""
        return max(self.loading, sum(self.anywhere.values())) + self.received + self.sent

    @cached_property
    def block_bytes(self) -> int:
        """Of each block."""
        return sum(self.block.values())

    @cached_property
    def front_bytes(self) -> int:
        """By how much the first stage needs more than an inner one: it may be less."""
        return sum(self.front.values()) - self.received

    @cached_property
    def back_bytes(self) -> int:
        """By how much the last stage needs more than an inner one: it may be less."""
        return sum(self.back.values()) - self.sent

    def of(self, first: int, last: int, blocks: int) -> int:
        """Bytes of the stage with blocks [first, last) of so many."""
        ends = (self.front_bytes if first == 0 else 0) + (self.back_bytes if last == blocks else 0)
        return self.inner_bytes + (last - first) * self.block_bytes + ends


def workspace_bytes(layout: Layout, workload: Workload, dtype_bytes: int, on_cpu: bool = False) -> int:
    """What a stage that has the whole model needs besides weights, keys and values."""
    blocks = len(layout.blocks)
    return workspace(layout, workload, dtype_bytes, on_cpu).of(0, blocks, blocks)


def workspace(layout: Layout, workload: Workload, dtype_bytes: int, on_cpu: bool = False, stages: int = 1) -> Workspace:
    """What the stages of a model need besides weights, keys and values, in a pipeline of so many.

    On a CPU it was measured (`benchmarks/memory.py --families`), on a GPU it is computed.
    """
    if on_cpu:
        return _cpu_workspace(layout, workload, dtype_bytes, stages)
    return _gpu_workspace(layout, workload, dtype_bytes)


def head_rows(workload: Workload) -> int:
    """Rows that the head takes at once: those of all sequences, if they are neither very few nor very many."""
    wanted = min(MOST_HEAD_ROWS, max(FEWEST_HEAD_ROWS, workload.sequences))
    return min(wanted, workload.most_rows)


# --- GPUs: computed, not measured ---------------------------------------------------------------------------------


def _gpu_workspace(layout: Layout, workload: Workload, dtype_bytes: int) -> Workspace:
    """The CUDA context, cuBLAS and what torch's allocator cannot hand out are held back by `devices`, not here.

    A step has as many rows as a prompt's chunk and a token of every sequence. CUDA graphs have rows of their own.
    """
    row = _gpu_row_bytes(layout.sizes, dtype_bytes)
    return Workspace(
        {
            "rows of a step": workload.most_rows * row,
            "rows of CUDA graphs": GRAPH_ROWS * row,
            "what CUDA graphs read": graph_input_bytes(layout, workload, dtype_bytes),
            "logits": head_rows(workload) * layout.sizes.vocab * 4,
            "a slice of a product's weights": KERNEL_BYTES,
        },
        loading=GPU_CHUNKS * GPU_BUFFER_BYTES,
    )


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


# --- the CPU -------------------------------------------------------------------------------------------------------


def _cpu_workspace(layout: Layout, workload: Workload, dtype_bytes: int, stages: int) -> Workspace:
    """Activations are float32, in memory that a stage keeps (`cpu_row_bytes`). What else there is was bounded."""
    sizes, recipe = layout.sizes, layout.recipe
    rows, hidden = workload.most_rows, 4 * layout.sizes.hidden
    kept = cpu_row_bytes(layout, workload)
    anywhere = {"rows of a step": kept["blocks"], "hidden states of a step": rows * hidden}
    if recipe is not None:
        anywhere |= {
            "positions": _position_bytes(recipe, workload),
            "chunks of attention": _split_bytes(recipe, workload),
        }
    else:
        anywhere |= {"modules of transformers": int(MODULES_KEEP * rows * _module_row_bytes(sizes, dtype_bytes))}
    anywhere |= {"packed weights": _packed_bytes(layout, workload), "outliers": OUTLIER_BYTES}
    values = sizes.position_values is not None
    front = {"embeddings": rows * (2 * (sizes.width or 0) + 10 * sizes.hidden * values), "before": kept["before"]}
    back = {"after": kept["after"]}
    head = {"head": kept["head"], "logits": min(head_rows(workload), workload.sequences) * sizes.vocab * 4}
    head |= {"choice": 24 * sizes.vocab}
    if recipe is None and not layout.int8_head:
        head |= {"packed head": int(PACKED_HEAD_SHARE * dtype_bytes * sizes.vocab * (sizes.width or 0))}
    (front if layout.tied else back).update(head)
    block = {"vectors in float32": _vector_bytes(layout, dtype_bytes), "operations": BLOCK_OBJECT_BYTES}
    sent = rows * hidden if stages > 1 else 0  # and received into a few buffers a little larger than that
    received = (min(SPARE_BUFFERS, stages + 1) + 1) * ceil(sent * 9 / 8)
    return Workspace(anywhere, block, front, back, received, sent, _staging_bytes(layout, dtype_bytes))


def cpu_row_bytes(layout: Layout, workload: Workload) -> dict[str, int]:
    """The memory that a stage on the CPU keeps for rows: of its blocks, and of what is before and after them, and the
    head. `FusedStage.row_bytes` is the sum of those that a stage has; 0 where transformers' own blocks run."""
    sizes, rows = layout.sizes, workload.most_rows
    few, width = min(head_rows(workload), rows), sizes.width or sizes.hidden
    parts = {name: _Rows(0) for name in ("blocks", "before", "after", "head")}
    if layout.recipe is None:
        return dict.fromkeys(parts, 0)
    parts["blocks"] = _block_rows(layout, layout.recipe, rows)
    projected = width != sizes.hidden
    if projected or sizes.embedding_norm_values is not None:
        parts["before"] = _around(rows, width, sizes.embedding_norm_values is not None)
        if projected:
            parts["before"].linear(width, "projected", sizes.hidden, bool(layout.first[-1].part.int8_values))
    if projected or sizes.final_norm_values is not None:
        parts["after"] = _around(few, sizes.hidden, sizes.final_norm_values is not None)
        if projected:
            parts["after"].linear(sizes.hidden, "projected", width, bool(layout.last[-1].part.int8_values))
    parts["head"] = _around(few, width, False)
    parts["head"].linear(width, "projected", sizes.vocab, layout.int8_head)
    return {name: part.nbytes for name, part in parts.items()}


class _Rows:
    """Memory for rows by name and width, as `bigint8_kernels.cpu_step.CpuStep` has it."""

    def __init__(self, rows: int) -> None:
        self._rows, self._row_bytes = rows, dict[tuple[str, int], int]()

    def add(self, name: str, width: int, value_bytes: int = 4) -> None:
        self._row_bytes[name, width] = width * value_bytes

    def linear(self, inputs: int, name: str, outputs: int, int8: bool) -> None:
        """What a linear layer writes, and its inputs as integers."""
        self.add(name, outputs)
        if int8:
            self.add("int16", inputs, 2)
            self.add("int16 scales", ceil(inputs / ACTIVATION_BLOCK))

    @property
    def nbytes(self) -> int:
        return sum(self._rows * size + CACHE_LINE for size in self._row_bytes.values())


def _around(rows: int, width: int, norm: bool) -> _Rows:
    found = _Rows(rows)
    found.add("x", width)
    if norm:
        found.add("normed", width)
    return found


def _block_rows(layout: Layout, recipe: Recipe, rows: int) -> _Rows:
    """As `model.fused.run_block` names them."""
    hidden, found = layout.sizes.hidden, _Rows(rows)
    by_name = {linear.name: linear for linear in layout.sizes.linears}
    names = ["x", "stream", "next_stream"] if recipe.norm_last else ["x", "normed"]
    names += ["normed_too"] if recipe.parallel and recipe.mlp_norm is not None else []
    for name in names:
        found.add(name, hidden)
    for name in ("queries", "attended"):
        found.add(name, recipe.heads * recipe.head_dim)
    for name, layers in (("qkv", recipe.qkv), ("out", (recipe.out,)), ("up", recipe.up), ("down", (recipe.down,))):
        outputs = sum(by_name[layer].outputs for layer in layers)
        found.linear(by_name[layers[0]].inputs, name, outputs, any(layer in layout.int8_linears for layer in layers))
    found.add("activated", by_name[recipe.down].inputs)
    return found


def _position_bytes(recipe: Recipe, workload: Workload) -> int:
    """The table of rotary positions, twice while it grows, and the rows of a step."""
    table = ceil(workload.context / POSITIONS) * POSITIONS
    return 4 * recipe.rotated * (2 * table + workload.most_rows)


def _split_bytes(recipe: Recipe, workload: Workload) -> int:
    """Where there are few tiles of generated tokens, threads take chunks of them."""
    threads = usable_cpus()
    tiles = workload.sequences * recipe.kv_heads * ceil(recipe.heads // recipe.kv_heads / TILE)
    split = 0 if threads == 1 else min(SPLIT_TILES_A_THREAD * threads, tiles)
    return split * ceil(workload.context / ATTENTION_CHUNK) * RESULT_BYTES


def _packed_bytes(layout: Layout, workload: Workload) -> int:
    """What torch's integer product takes for a prompt's rows, and the allocator keeps of it."""
    if workload.most_rows <= PACKED_ROWS or not layout.int8_linears:
        return 0
    largest = max(sum(linear.inputs * linear.outputs for linear in group) for group in layout.products)
    packed = int(PACKED_SHARE * largest)
    return packed if packed > MAPPED_BYTES else PACKINGS * packed


def _module_row_bytes(sizes: Sizes, dtype_bytes: int) -> int:
    """Of a row in transformers' own blocks: the stream, its norm, q, k and v twice, the feed-forward part, and what an
    int8 layer makes of it: its inputs in float32 and as integers, sums and outputs in float32."""
    outputs = max(linear.outputs for linear in sizes.linears)
    inputs = max(linear.inputs for linear in sizes.linears)
    attention = 2 * (sizes.hidden + sizes.kv_values) * (dtype_bytes + 4)
    return (3 * sizes.hidden + (_ups(sizes) + 1) * sizes.widest) * dtype_bytes + attention + 6 * inputs + 8 * outputs


def _vector_bytes(layout: Layout, dtype_bytes: int) -> int:
    """Norms and biases of a block, which kernels read in float32; and weights in 16 bits that are stored turned."""
    if layout.recipe is None:
        return 0
    sizes = layout.sizes
    vectors = sizes.norm_values + sum(linear.outputs * linear.bias for linear in sizes.linears)
    turned = [linear for linear in sizes.linears if sizes.transposed and linear.name not in layout.int8_linears]
    weights = sum(linear.inputs * linear.outputs * dtype_bytes for linear in turned)
    return weights + (0 if dtype_bytes == 4 else 4 * vectors)


def _staging_bytes(layout: Layout, dtype_bytes: int) -> int:
    """The readers' buffers. A weight that is stored turned comes whole."""
    whole = max(linear.inputs * linear.outputs for linear in layout.sizes.linears) * layout.sizes.transposed
    readers = min(MOST_READERS, max(FEWEST_READERS, usable_cpus()))
    return readers * (max(HOST_BUFFER_BYTES, whole * dtype_bytes) + 3 * 4096)


# --- keys and values -----------------------------------------------------------------------------------------------


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
