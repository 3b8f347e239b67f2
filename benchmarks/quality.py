"""Perplexity of a model under each way to quantize it: what int8 costs in quality.

python benchmarks/quality.py [--model smollm2-135m] [--tokens 16384] [--json FILE]

The text is that of Python's own help topics (`pydoc_data.topics`), in windows of --window tokens, each predicted from
those before it in its window. Lower is better; the float32 model is the reference.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rounds import machine, print_machine
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from bigint8 import Int8Config, load_sharded_int8
from bigint8.sources.find import find_source


def main(
    model: Annotated[str, typer.Option(help="A preset or a checkpoint folder.")] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(min=2)] = 16384,
    window: Annotated[int, typer.Option(min=2)] = 512,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure perplexity."""
    source = find_source(model)
    folder = source.folder
    if folder is None:
        raise source.not_found()
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][0]
    windows = ids[: tokens // window * window].view(-1, window)
    int8: Callable[..., Any] = lambda **kw: load_sharded_int8(folder, config=Int8Config(**kw), progress=False)  # noqa: E731
    bits = BitsAndBytesConfig(load_in_8bit=True)
    sides: dict[str, Callable[[], Any]] = {
        "float32": lambda: AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        "bigint8, 16-bit activations": lambda: int8(activations="16bit"),
        "bigint8, LLM.int8() (threshold 6)": lambda: int8(activations="int8"),
        "bigint8, LLM.int8() (threshold 3)": lambda: int8(activations="int8", threshold=3.0),
        "bigint8, 16-bit activations, int8_head": lambda: int8(activations="16bit", int8_head=True),
        "bitsandbytes LLM.int8()": lambda: AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=bits, dtype="float32"
        ),
    }
    console = Console(highlight=False)
    print_machine(console)
    table = Table("side", "perplexity", "against float32", title=f"{source.name}, {windows.numel()} tokens")
    results: dict[str, float] = {}
    for side, load in sides.items():
        results[side] = perplexity(load(), windows)
        table.add_row(side, f"{results[side]:.3f}", f"{results[side] / results['float32'] - 1:+.2%}")
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine(), "perplexity": results}, indent=2) + "\n")


@torch.inference_mode()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of each token but the first of its window."""
    total = 0.0
    for window in windows:
        logits = model(window[None]).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


if __name__ == "__main__":
    typer.run(main)
