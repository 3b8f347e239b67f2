"""The int8 linear layer against float32, bfloat16, bitsandbytes and torchao, over rows, layer shapes and outliers.

python benchmarks/matmul.py [--rounds 5] [--model tinyllama-1.1b]... [--rows 1]... [--outliers 0]... [--json FILE]

All sides run in this process, in turn. Each side has several copies of the weight, used one after the other, so that a
weight comes from memory, as it does in a model. `--outliers` is the share of columns of X with a value of 8; the sides
without a decomposition do not care. GB/s are of the weights as that side stores them.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bigint8_kernels import quantize_rows
from rich.console import Console
from rounds import Comparison, Figures, interleave, print_machine, write_json
from torch import Tensor, nn

from bigint8 import Int8Linear

SHAPES = {  # out_features, in_features of attention and of both ways of the feed-forward layer
    "tinyllama-1.1b": ((2048, 2048), (5632, 2048), (2048, 5632)),
    "opt-6.7b": ((4096, 4096), (16384, 4096), (4096, 16384)),
    "opt-175b": ((12288, 12288), (49152, 12288), (12288, 49152)),
}

DISTINCT_BYTES = 2**28
"""How many bytes of weights a side goes through before it comes to the first again: more than a cache holds."""

SIDE_SECONDS = 0.5
"""How long one side runs in one round, at most a few calls more."""

Layer = Callable[[Tensor], Any]


def main(
    model: Annotated[list[str] | None, typer.Option(help=", ".join(SHAPES))] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Rows of X; 1, 4, 16, 64, 256 and 1024 by default.")] = None,
    outliers: Annotated[list[float] | None, typer.Option(help="Shares of columns; 0, 0.001, 0.05 if none.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Compare linear layers."""
    console = Console(highlight=False)
    print_machine(console)
    comparisons = []
    for name in model or list(SHAPES):
        for n, k in SHAPES[name]:
            makers: dict[str, Callable[[], tuple[Layer, int]]] = {
                "bigint8": lambda n=n, k=k: make_bigint8(n, k, "auto"),
                "bigint8 int8 activations": lambda n=n, k=k: make_bigint8(n, k, "int8"),
                "float32": lambda n=n, k=k: make_float(n, k, torch.float32),
                "bfloat16": lambda n=n, k=k: make_float(n, k, torch.bfloat16),
                "bitsandbytes": lambda n=n, k=k: make_bitsandbytes(n, k),
                "torchao": lambda n=n, k=k: make_torchao(n, k),
            }
            layers, failed = {}, {}
            for side, make in makers.items():
                try:
                    layers[side] = make()
                    layers[side][0](activations(1, k, 0.0))
                except Exception as error:
                    layers.pop(side, None)
                    failed[side] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            for t in rows or [1, 4, 16, 64, 256, 1024]:
                for share in outliers or [0.0, 0.001, 0.05]:
                    title = f"{name}: {t} x {k} times {k} x {n}, {share:.1%} outlier columns"
                    comparison = Comparison(title, "ms", failed=dict(failed))
                    x = activations(t, k, share)
                    sides = {
                        side: (lambda layer=layer, nbytes=nbytes, x=x: timed(layer, x, nbytes))
                        for side, (layer, nbytes) in layers.items()
                    }
                    interleave(comparison, sides, rounds)
                    comparison.print(console, "bigint8", {"ms": 3, "GB/s": 1})
                    comparisons.append(comparison)
                    write_json(json_file, comparisons, "bigint8")


def activations(t: int, k: int, share: float) -> Tensor:
    """Random X (T, K), with a value of 8 in some row of a share of its columns."""
    generator = torch.Generator().manual_seed(t + k)
    x = torch.randn(t, k, generator=generator).clamp(-5, 5)
    columns = torch.randperm(k, generator=generator)[: round(share * k)]
    x[torch.randint(t, (len(columns),), generator=generator), columns] = 8.0
    return x


@torch.inference_mode()
def timed(layer: Layer, x: Tensor, nbytes: int) -> Figures:
    """The median time of a call."""
    layer(x)
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < 3 or time.perf_counter() - began < SIDE_SECONDS:
        started = time.perf_counter()
        layer(x)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return {"ms": 1e3 * median, "GB/s": nbytes / median / 1e9}


def in_turn(layers: list[nn.Module], dtype: torch.dtype, nbytes: int) -> tuple[Layer, int]:
    """One layer after the other, each call with the next; X is brought into the dtype of the layers."""
    at = 0

    def call(x: Tensor) -> Any:
        nonlocal at
        at = (at + 1) % len(layers)
        return layers[at](x.to(dtype))

    return call, nbytes


def copies(nbytes: int) -> int:
    return max(2, min(32, DISTINCT_BYTES // nbytes))


def make_bigint8(n: int, k: int, mode: str) -> tuple[Layer, int]:
    layers = []
    for _ in range(copies(n * k)):
        layer = Int8Linear(k, n, bias=False, activations=mode)  # type: ignore[arg-type]
        quantize_rows(torch.randn(n, k) * 0.02, layer.weight.data, layer.scale)
        layers.append(layer)
    return in_turn(layers, torch.float32, n * k)


def make_float(n: int, k: int, dtype: torch.dtype) -> tuple[Layer, int]:
    layers = [nn.Linear(k, n, bias=False, dtype=dtype) for _ in range(copies(n * k * dtype.itemsize))]
    return in_turn(layers, dtype, n * k * dtype.itemsize)


def make_bitsandbytes(n: int, k: int) -> tuple[Layer, int]:
    import bitsandbytes

    layers = []
    for _ in range(copies(n * k)):
        layer = bitsandbytes.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.load_state_dict({"weight": torch.randn(n, k) * 0.02})
        layers.append(layer.to("cpu"))
    return in_turn(layers, torch.bfloat16, n * k)


def make_torchao(n: int, k: int) -> tuple[Layer, int]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layers = []
    for _ in range(copies(n * k)):
        layer = nn.Sequential(nn.Linear(k, n, bias=False, dtype=torch.bfloat16))
        quantize_(layer, Int8WeightOnlyConfig())
        layers.append(layer)
    return in_turn(layers, torch.bfloat16, n * k)


if __name__ == "__main__":
    typer.run(main)
