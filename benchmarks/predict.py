"""The time model against the clock: predicted and measured decode and prefill, in one stage and in two.

python benchmarks/predict.py [--model smollm2-135m]... [--prompt 256] [--tokens 32] [--rounds 3] [--no-measure]

First this machine's speed is measured and kept, as `bigint8 doctor --save` does (not with --no-measure). Then each
model, with random weights, answers one request in one process and over two CPU workers. "decode off by" and "prefill
off by" are how far the prediction is from what was measured, in parts of what was measured.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from generate import SYNTHESIZE
from rich.console import Console
from rounds import Comparison, Figures, interleave, print_machine, run_child, write_json


def main(
    model: Annotated[list[str] | None, typer.Option(help="Presets of configs/models.")] = None,
    prompt: Annotated[int, typer.Option(min=1)] = 256,
    tokens: Annotated[int, typer.Option(min=4)] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    measure: Annotated[bool, typer.Option(help="Measure this machine's speed first, and keep it.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare predictions with measurements."""
    if child is not None:
        print(json.dumps(answer(Path(child), rounds, prompt, tokens)))
        return
    console = Console(highlight=False)
    print_machine(console)
    if measure:
        keep_speed()
    comparisons = []
    for name in model or ["smollm2-135m", "tinyllama-1.1b", "opt-6.7b"]:
        with tempfile.TemporaryDirectory(prefix="bigint8-bench-") as folder:
            subprocess.run([sys.executable, str(SYNTHESIZE), name, f"{folder}/{name}"], check=True)
            comparison = Comparison(f"{name}, a prompt of {prompt} tokens, {tokens} generated", "decode ms")

            def run(stages: int, where: str = f"{folder}/{name}") -> Figures:
                options = ["--rounds", str(stages), "--prompt", str(prompt), "--tokens", str(tokens)]
                return run_child(__file__, [*options, "--child", where])

            interleave(comparison, {"1 stage": lambda: run(1), "2 stages": lambda: run(2)}, rounds)
            comparison.print(console, "1 stage", {"decode off by": 3, "prefill off by": 3})
            comparisons.append(comparison)
    write_json(json_file, comparisons, "1 stage")


def keep_speed() -> None:
    """What `doctor --save` measures of the CPU and the disk."""
    from bigint8.measure_speed import measure_device, measure_disk
    from bigint8.plan.devices import cpu_device
    from bigint8.plan.speed import save_disk, save_speeds, speeds_file

    device = cpu_device()
    save_speeds(device.model, dict(measure_device(device)))
    save_disk(measure_disk(speeds_file().parent))


def answer(folder: Path, stages: int, prompt: int, tokens: int) -> Figures:
    """One request, after another that is not timed; and what was predicted of it."""
    import torch

    from bigint8 import Workload
    from bigint8.model_pipeline import ModelPipeline
    from bigint8.plan.predict import predict
    from bigint8.session import find_model

    asked: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None}
    with ModelPipeline(find_model(folder), stages, Workload(prompt + tokens + 16, 1)) as pipeline:
        pipeline.load(progress=False)
        first, *rest = torch.randint(5, 1000, (4, prompt), generator=torch.Generator().manual_seed(0)).tolist()
        pipeline.generate([first], **{**asked, "max_new_tokens": 4})
        prefills, steps = [], []
        for ids in rest:
            started = time.perf_counter()
            came = [time.perf_counter() for _ in pipeline.submit(ids, **asked)]
            prefills.append(came[0] - started)
            steps += [after - before for before, after in itertools.pairwise(came)]
        expected = predict(pipeline.plan, context=prompt + tokens // 2, sequences=1, prompt=prompt)
    decode, prefill = statistics.median(steps), statistics.median(prefills)
    return {
        "decode ms": 1e3 * decode,
        "predicted ms": 1e3 * expected.token_seconds,
        "decode off by": expected.token_seconds / decode - 1,
        "prefill ms": 1e3 * prefill,
        "predicted prefill": 1e3 * expected.prompt_seconds,
        "prefill off by": expected.prompt_seconds / prefill - 1,
    }


if __name__ == "__main__":
    typer.run(main)
