"""Every launch of a step of blocks on a GPU, with Triton's own specialization and compilation.

Run as a program, without TRITON_INTERPRET: prints as JSON what each step compiled and launched, in order. CUDA's driver
is the stand-in of `launches.py`; operations of torch itself that a GPU would launch are counted beside.
"""

import json
from types import SimpleNamespace
from typing import Any

import torch
from bigint8_kernels import ops
from bigint8_kernels.step import PAGE, Attention, Batch, Linear, Norm, pool_shape
from launches import Driver
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from bigint8.model.fused import FusedBlock, run_block

HIDDEN, HEADS, KV_HEADS, WIDTH, FEED = 512, 8, 2, 64, 1024
MOST_PAGES = 64


class TorchLaunches(TorchDispatchMode):
    """Which operations of torch compute something: not those that give a view, or memory as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and not func.is_view and not func.__name__.startswith(("empty", "detach")):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def layer(outputs: int, features: int) -> Linear:
    weight = torch.zeros(outputs, features, dtype=torch.int8)
    return Linear(weight, torch.ones(outputs), None, 6.0)


def llama_block(joined: bool) -> FusedBlock:
    """Queries, keys and values in one layer and gate and up in one, or each by itself."""
    q, kv = HEADS * WIDTH, KV_HEADS * WIDTH
    norm = Norm(torch.ones(HIDDEN, dtype=torch.float16), None, 1e-5, centered=False)
    qkv, up = (layer(q, HIDDEN), layer(kv, HIDDEN), layer(kv, HIDDEN)), (layer(FEED, HIDDEN), layer(FEED, HIDDEN))
    return FusedBlock(
        attention_norm=norm,
        mlp_norm=norm,
        qkv=(layer(q + 2 * kv, HIDDEN),) if joined else qkv,
        attention=Attention(
            HEADS, KV_HEADS, WIDTH, (0, WIDTH), (q, WIDTH), (q + kv, WIDTH), WIDTH**-0.5, rotated=WIDTH
        ),
        out=layer(HIDDEN, q),
        up=(layer(2 * FEED, HIDDEN),) if joined else up,
        down=layer(HIDDEN, FEED),
        activation="silu",
        gated=True,
        parallel=False,
        norm_last=False,
    )


def batch(counts: list[tuple[int, int]], few: int) -> Batch:
    """A step of sequences with (places before, rows)."""
    places = [before + i for before, rows in counts for i in range(rows)]
    sequences = [s for s, (_, rows) in enumerate(counts) for _ in range(rows)]
    tables = torch.arange(len(counts) * MOST_PAGES, dtype=torch.int32).view(len(counts), MOST_PAGES)
    angles = [torch.zeros(len(places), WIDTH // 2) for _ in range(2)]
    rows_of = [torch.tensor(each, dtype=torch.int32) for each in (places, sequences)]
    return Batch(*rows_of, (tables,), few, *angles)


STEPS = {
    "one token": ([(700, 1)], 1),
    "another token": ([(3, 1)], 1),
    "five tokens": ([(i * 40, 1) for i in range(5)], 5),
    "seven other tokens": ([(i * 90, 1) for i in range(7)], 7),
    "a prompt": ([(0, 100)], 0),
    "two tokens and a prompt": ([(700, 1), (9, 1), (32, 98)], 2),
}


def main() -> None:
    stand_in = Driver()
    driver.set_active(stand_in)
    # what the operators compute, without torch's dispatch between: so the mode sees torch's operations in them, too
    kernels = {"norm": ops._norm, "add_norm": ops._add_norm, "int8_linears": ops._int8_linears}
    torch.ops.bigint8 = SimpleNamespace(**kernels, attend=ops._attend, activate=ops._activate)
    found = []
    for joined in (True, False):
        block = llama_block(joined)
        pool = torch.zeros(pool_shape(8 * MOST_PAGES, block.attention), dtype=torch.float16)
        for name, given in STEPS.items():
            step = batch(*given)
            x, delta = (torch.zeros(step.rows, HIDDEN, dtype=torch.float16) for _ in range(2))
            operations = ops.GpuOperations(step)

            def block_of(x: Tensor, delta: Tensor) -> None:
                run_block(operations, block, x, delta, pool)  # noqa: B023  (it is called here)

            for turn in ("first", "second"):
                stand_in.compiled.clear()
                stand_in.launched.clear()
                with TorchLaunches() as torchs:
                    block_of(x, delta)
                found.append(
                    {"step": name, "joined": joined, "block": turn, "compiled": list(stand_in.compiled),
                     "launched": list(stand_in.launched), "torch": torchs.seen}
                )  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    assert PAGE == 16
    main()
