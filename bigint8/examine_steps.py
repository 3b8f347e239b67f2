"""Steps of a transformer on this machine's GPUs: right, and how fast. What `examine` says of them; and how it times."""

import statistics
import time
from collections.abc import Callable

import torch
from bigint8_kernels import operations
from bigint8_kernels.reference_step import ReferenceOperations
from bigint8_kernels.step import PAGE, Attention, Batch, Linear, Norm, Operations, pool_shape
from torch import Tensor

from .model.fused import FusedBlock, run_block
from .model.graphs import Graphs, Shape

REPEATS = 5

TOLERANCE = 0.05
"""The largest error of a block allowed, as a part of the largest result. Where a value before it is rounded to another
float16, an int8 row after it rounds to another number: a hundredth and more."""

STACK, STEP_CONTEXT = 8, 512
"""Blocks that are timed, and the tokens before the one of a step."""

CONTEXTS = (512, 4096, 32768)


class LlamaStack:
    """Random blocks of Llama's kind with a pool of keys and values for each, in float16."""

    def __init__(self, blocks: int, hidden: int, pages: int, device: torch.device) -> None:
        heads, width = hidden // 64, 64
        kv_heads, feed = max(1, heads // 4), 3 * hidden
        self.hidden, self.width, self.device = hidden, width, device
        places = (0, width), (heads * width, width), ((heads + kv_heads) * width, width)
        attention = Attention(heads, kv_heads, width, *places, scale=width**-0.5, rotated=width)

        def linear(outputs: int, features: int, spread: float = 1.0) -> Linear:
            """Its weights' spread keeps that of X, or so much of it."""
            weight = torch.randint(-127, 128, (outputs, features), dtype=torch.int8, device=device)
            scale = spread * (torch.rand(outputs, device=device) + 0.5) / (73 * features**0.5)
            return Linear(weight, scale, None, 6.0)

        def block() -> FusedBlock:
            norm = Norm(torch.ones(hidden, dtype=torch.float16, device=device), None, 1e-5, centered=False)
            qkv, out = (linear((heads + 2 * kv_heads) * width, hidden),), linear(hidden, heads * width)
            # gate and up are multiplied: as in trained models, hardly anything exceeds the threshold then
            up, down = (linear(2 * feed, hidden, 0.75),), linear(hidden, feed)
            return FusedBlock(norm, norm, qkv, attention, out, up, down, "silu", True, False, False)

        self.blocks = [block() for _ in range(blocks)]
        self.pools = [torch.randn(pool_shape(pages, attention), device=device).half() for _ in range(blocks)]

    def given(self, counts: list[tuple[int, int]], few: int) -> tuple[Tensor, Batch]:
        """Rows of sequences with (tokens before, rows), of which the first `few` are generated."""
        places = [before + i for before, rows in counts for i in range(rows)]
        sequences = [s for s, (_, rows) in enumerate(counts) for _ in range(rows)]
        place, sequence = (torch.tensor(each, dtype=torch.int32, device=self.device) for each in (places, sequences))
        pages = torch.arange(len(self.pools[0]) // len(counts) * len(counts), dtype=torch.int32, device=self.device)
        x = torch.randn(len(places), self.hidden, device=self.device).half()
        cos, sin = torch.randn(2, len(places), self.width // 2, device=self.device).unbind()
        return x, Batch(place, sequence, (pages.view(len(counts), -1),), few, cos, sin)

    @property
    def kv_bytes(self) -> int:
        """Bytes of a token's keys and values in one block."""
        return self.pools[0][0].nbytes // PAGE

    def weight_values(self, block: int) -> int:
        """Values of a block's int8 layers."""
        of = self.blocks[block]
        return sum(linear.weight.numel() for linear in (*of.qkv, of.out, *of.up, of.down))

    @property
    def values_a_row(self) -> int:
        """Values that go into a block's int8 layers and come out of them, for each row: `Layout.values_a_row`."""
        of = self.blocks[0]
        groups = (of.qkv, (of.out,), of.up, (of.down,))
        return sum(group[0].weight.shape[1] + sum(linear.weight.shape[0] for linear in group) for group in groups)

    def run(self, x: Tensor, batch: Batch, reference_instead: bool = False) -> Tensor:
        """All blocks, with the kernels of the device or in plain torch."""
        return self.program(ReferenceOperations(batch) if reference_instead else operations(batch), x)

    def program(self, ops: Operations, x: Tensor) -> Tensor:
        """All blocks, with these operations."""
        delta: Tensor | None = None
        for block, pool in zip(self.blocks, self.pools, strict=True):
            x, delta = run_block(ops, block, x, delta, pool)
        return ops.add_norm(x, delta, self.blocks[-1].attention_norm)


def check_step(device: torch.device) -> str | None:
    """Generated tokens, a prompt, and both together: results, keys and values are those of plain torch."""
    for what, counts, few in (
        ("tokens", [(33, 1), (600, 1)], 2),
        ("a prompt", [(7, 70)], 0),
        ("both", [(9, 1), (0, 40)], 1),
    ):
        stack = LlamaStack(1, 256, 80, device)
        x, batch = stack.given(counts, few)
        before = stack.pools[0].clone()
        results = [(stack.run(x.clone(), batch), stack.pools[0].clone())]
        stack.pools[0].copy_(before)
        results.append((stack.run(x.clone(), batch, reference_instead=True), stack.pools[0]))
        for found, expected in zip(*results, strict=True):
            error, largest = float((found - expected).abs().max()), float(expected.abs().max())
            if not error <= TOLERANCE * largest:
                return f"{what}: off by {error / largest:.1e} of the largest value"
    return None


def step_speed(device: torch.device, rows: int) -> str:
    """Milliseconds of a step as it is and as a graph, and how many kernels it launches."""
    pages = STEP_CONTEXT // PAGE + 1
    stack = LlamaStack(STACK, 2048, rows * pages, device)
    x, batch = stack.given([(STEP_CONTEXT, 1)] * rows, rows)
    graphs = Graphs(stack.run, Shape(2048, torch.float16, (pages,), stack.width), device, (rows,))
    plain = seconds_of(lambda: stack.run(x, batch), device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        stack.run(x, batch)
        wait_for(device)
    launches = sum(event.count for event in profile.key_averages())
    graphs.capture()
    as_graph = seconds_of(lambda: graphs(x, batch), device)
    return f"{plain * 1e3:.2f} ms, {launches} launches; as a graph {as_graph * 1e3:.2f} ms ({plain / as_graph:.1f} x)"


def attention_speed(device: torch.device, context: int) -> str:
    """Milliseconds, and GB/s of keys and values."""
    width, heads = 128, 32
    attention = Attention(heads, heads, width, (0, width), (heads * width, width), (2 * heads * width, width), 0.1)
    pool = torch.zeros(pool_shape(context // PAGE + 1, attention), dtype=torch.float16, device=device)
    place, sequence = (torch.tensor([value], dtype=torch.int32, device=device) for value in (context, 0))
    table = torch.arange(len(pool), dtype=torch.int32, device=device)[None]
    qkv = torch.randn(1, 3 * heads * width, device=device).half()
    ops = operations(Batch(place, sequence, (table,), 1))
    seconds = seconds_of(lambda: ops.attend(qkv, attention, pool), device)
    return f"{seconds * 1e3:.3f} ms, {pool.nbytes / seconds / 1e9:.0f} GB/s"


# --- time ---


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """The median time of a call, after one that does not count."""

    def once() -> float:
        wait_for(device)
        started = time.perf_counter()
        work()
        wait_for(device)
        return time.perf_counter() - started

    once()
    return statistics.median(once() for _ in range(repeats))


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
