"""The operations of a step as torch's tracers see them: fake tensors on GPUs that are not there, and torch.compile."""

from typing import Any

import pytest
import torch
from bigint8_kernels import ops, reference
from bigint8_kernels.reference_step import ReferenceOperations
from bigint8_kernels.step import PAGE, Attention, Batch, Linear, Norm, Operations, pool_shape
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bigint8.model.fused import FusedBlock, run_block

HIDDEN, HEADS, KV_HEADS, WIDTH, FEED = 32, 4, 2, 16, 48


def block_on(device: str) -> FusedBlock:
    torch.manual_seed(0)

    def layer(outputs: int, features: int) -> Linear:
        q, scale = reference.quantize_rows(torch.randn(outputs, features) * 0.1)
        return Linear(q.to(device), scale.to(device), torch.randn(outputs).half().to(device), 6.0)

    norm = Norm(torch.ones(HIDDEN, dtype=torch.float16, device=device), None, 1e-5, centered=False)
    heads = Norm(torch.ones(WIDTH, dtype=torch.float16, device=device), None, 1e-5, centered=False)
    q, kv = HEADS * WIDTH, KV_HEADS * WIDTH
    places = (0, WIDTH), (q, WIDTH), (q + kv, WIDTH)
    return FusedBlock(
        attention_norm=norm,
        mlp_norm=norm,
        qkv=(layer(q, HIDDEN), layer(2 * kv, HIDDEN)),
        attention=Attention(HEADS, KV_HEADS, WIDTH, *places, 0.25, WIDTH, heads, heads, window=100),
        out=layer(HIDDEN, q),
        up=(layer(2 * FEED, HIDDEN),),
        down=layer(HIDDEN, FEED),
        activation="silu",
        gated=True,
        parallel=False,
        norm_last=False,
    )


def batch_on(device: str, counts: list[int], few: int) -> Batch:
    """Sequences from their beginnings, with so many rows each."""
    places = torch.cat([torch.arange(count) for count in counts]).int()
    sequences = torch.cat([torch.full((count,), s) for s, count in enumerate(counts)]).int()
    tables = torch.arange(2 * len(counts)).int().view(-1, 2)
    torch.manual_seed(1)
    cos, sin = (torch.randn(len(places), WIDTH // 2).to(device) for _ in range(2))
    return Batch(places.to(device), sequences.to(device), (tables.to(device),), few, cos, sin)


def step(operations: type[Any], block: FusedBlock, batch: Batch, x: Tensor, delta: Tensor, pool: Tensor) -> Tensor:
    ops: Operations = operations(batch)
    x, delta_after = run_block(ops, block, x, delta, pool)
    assert delta_after is not None
    return ops.add_norm(x, delta_after, block.attention_norm)


KINDS = {"tokens": ([1, 1, 1], 3), "a prompt": ([20], 0), "both": ([1, 1, 17], 2)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_shapes_dtypes_and_devices_are_known_without_a_gpu(device, kind):
    with FakeTensorMode():
        block, batch = block_on(device), batch_on(device, *KINDS[kind])
        x, delta = (torch.empty(batch.rows, HIDDEN, dtype=torch.float16, device=device) for _ in range(2))
        pool = torch.empty(pool_shape(8, block.attention), dtype=torch.float16, device=device)
        operations = ops.GpuOperations(batch)
        qkv = operations.linear(x, block.qkv, "qkv")
        assert qkv.shape == (batch.rows, (HEADS + 2 * KV_HEADS) * WIDTH) and str(qkv.device) == device
        assert operations.attend(qkv, block.attention, pool).shape == (batch.rows, HEADS * WIDTH)
        y = step(ops.GpuOperations, block, batch, x, delta, pool)
        assert (y.shape, y.dtype, str(y.device)) == ((batch.rows, HIDDEN), torch.float16, device)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_one_graph_that_computes_what_the_reference_does(kind, backend):
    """And changes what the reference changes: the residual stream and the pool."""
    block, batch = block_on("cpu"), batch_on("cpu", *KINDS[kind])
    torch.manual_seed(1)
    given = torch.randn(batch.rows, HIDDEN).half(), torch.randn(batch.rows, HIDDEN).half()
    results = []
    for operations in (ops.GpuOperations, ReferenceOperations):
        pool = torch.zeros(pool_shape(8, block.attention), dtype=torch.float16)
        x, delta = (each.clone() for each in given)

        def run(x: Tensor, delta: Tensor, pool: Tensor, operations: type[Any] = operations) -> Tensor:
            return step(operations, block, batch, x, delta, pool)

        if operations is ops.GpuOperations:
            torch.compiler.reset()
            run = torch.compile(run, fullgraph=True, backend=backend)
        with torch.no_grad():
            results.append((run(x, delta, pool), x, pool))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() <= 0.02 * expected.abs().max()
    assert PAGE == 16 and results[0][2].any()


@pytest.mark.parametrize("name", ["norm", "add_norm", "int8_linears", "attend", "activate"])
def test_each_operator_does_what_its_schema_says(name):
    """torch's own checks: what is changed is declared, nothing that comes out is what went in, fakes tell the truth."""
    block, batch = block_on("cpu"), batch_on("cpu", [1, 1], 2)
    x = torch.randn(2, HIDDEN).half()
    norm = block.attention_norm
    tensors, slopes, numbers, reals = ops._packed(block.attention)
    qkv, pool = torch.randn(2, 128).half(), torch.zeros(pool_shape(8, block.attention)).half()
    where = (batch.places_T, batch.sequences_T, batch.tables[0], [batch.cos_TR, batch.sin_TR])
    layer = block.down
    arguments: dict[str, tuple[Any, ...]] = {
        "norm": (x, norm.weight, None, 1e-5, False),
        "add_norm": (x, x.clone(), norm.weight, None, 1e-5, True),
        "int8_linears": (torch.randn(2, FEED).half(), [layer.weight], [layer.scale], [layer.bias], [6.0], ["auto"], 2),
        "attend": (qkv, pool, *where, tensors, slopes, None, numbers, reals, 2),
        "activate": (x, "gelu", False),
    }
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.bigint8, name), arguments[name], test_utils=checks)
