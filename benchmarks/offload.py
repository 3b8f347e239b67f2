"""A model of which a third has room: the split that is planned against splits made by hand, and against accelerate.

python benchmarks/offload.py [--model tinyllama-1.1b] [--share 3] [--prompt 256] [--tokens 24] [--rounds 3]

The device is the CPU, with a limit of one third (--share) of what the model would take. The rest is offloaded to a
file, which the system's file cache holds where there is memory for it. Sides, each in a process of its own, one after
the other in each round: bigint8, as it plans by itself; the same model with other blocks offloaded (the first ones, the
last ones, one or three more than needed, every block); accelerate with 16-bit weights and the same limit.

"off by": how far the predicted times are from what was measured, in parts of that, with this machine's speed measured
first, as `bigint8 doctor --save` does (not with --no-measure).
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from generate import SYNTHESIZE, time_model, time_requests
from predict import keep_speed
from rich.console import Console
from rounds import Comparison, Figures, interleave, print_machine, run_child, write_json

OURS = "bigint8"


def main(
    model: Annotated[str, typer.Option(help="A preset of configs/models.")] = "tinyllama-1.1b",
    checkpoint: Annotated[Path | None, typer.Option(help="A checkpoint of that preset's shape.")] = None,
    share: Annotated[float, typer.Option(min=1.0, help="How many times larger the model is than its room.")] = 3.0,
    prompt: Annotated[int, typer.Option(min=1)] = 256,
    tokens: Annotated[int, typer.Option(min=4)] = 24,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    measure: Annotated[bool, typer.Option(help="Measure this machine's speed first, and keep it.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    side: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare ways to run a model that does not fit."""
    if side is not None:
        assert checkpoint is not None
        figures = run_accelerate if side == "accelerate, 16-bit" else SIDES_OF_OURS[side]
        print(json.dumps(figures(checkpoint, share, prompt, tokens)))
        return
    console = Console(highlight=False)
    print_machine(console)
    if measure:
        keep_speed()
    with tempfile.TemporaryDirectory(prefix="bigint8-bench-") as temporary:
        folder = checkpoint or Path(temporary) / model
        if checkpoint is None:
            subprocess.run([sys.executable, str(SYNTHESIZE), model, str(folder)], check=True)

        def run(name: str) -> Figures:
            options = ["--share", str(share), "--prompt", str(prompt), "--tokens", str(tokens), "--side", name]
            return run_child(__file__, ["--checkpoint", str(folder), *options])

        title = f"{model}, {share:g} times as large as its room, decode after {prompt} tokens"
        comparison = Comparison(title, "decode tokens/s", lower=False)
        names = [*SIDES_OF_OURS, "accelerate, 16-bit"]
        interleave(comparison, {name: (lambda name=name: run(name)) for name in names}, rounds)
    comparison.print(console, OURS, {"offloaded MB": 0})
    write_json(json_file, [comparison], OURS)


def split_by_hand(choose: Callable[[int, int], list[int]]) -> Callable[[Path, float, int, int], Figures]:
    """A side with other blocks offloaded: `choose(blocks, least)` names them, of which so many are needed at least."""

    def run(folder: Path, share: float, prompt: int, tokens: int) -> Figures:
        return run_bigint8(folder, share, prompt, tokens, choose)

    return run


def spread(blocks: int, count: int) -> list[int]:
    """So many of the blocks, evenly spread."""
    count = min(count, blocks)
    return [(2 * i + 1) * blocks // (2 * count) for i in range(count)]


def run_bigint8(
    folder: Path, share: float, prompt: int, tokens: int, choose: Callable[[int, int], list[int]] | None = None
) -> Figures:
    """The plan that is made under the limit, or one with other blocks offloaded. BigInt8Error if those do not fit."""
    from bigint8 import BigInt8Error, Workload
    from bigint8.load.device_map import Limits, place
    from bigint8.model_pipeline import ModelPipeline
    from bigint8.plan.cut import make_plan
    from bigint8.plan.devices import cpu_device
    from bigint8.plan.draft import Draft
    from bigint8.plan.offload import keep_beside
    from bigint8.plan.predict import predict
    from bigint8.session import find_model

    workload = Workload(prompt + tokens + 8, 1)
    with ModelPipeline(find_model(folder), 1, workload) as pipeline:
        (whole,) = make_plan(pipeline.found.spec, [cpu_device()], workload).stages
        limits: Limits = {"cpu": int(whole.needed_bytes / share)}
        plan = place(pipeline.found.spec, pipeline.found.opened(), workload, "auto", limits).plan
        (ours,) = plan.stages
        if choose is not None:
            blocks = len(plan.spec.known_layout.blocks)
            stage = Draft(plan.spec, plan.workload, plan.dtype, 1).stage(0, ours.device, 0, blocks)
            sizes = [module.part.int8_values for module in plan.spec.known_layout.blocks]
            stage = keep_beside(stage, sizes, choose(blocks, len(ours.disk_blocks)), "disk")
            if stage.headroom_bytes < 0:
                raise BigInt8Error(f"{stage.needed_bytes:,} bytes do not fit into {stage.device.usable_bytes:,}")
            plan = replace(plan, stages=(stage,))
        pipeline.plan = plan
        pipeline.load(progress=False)
        figures = time_requests(pipeline, 1, prompt, tokens)
    expected = predict(plan, context=prompt + tokens // 2, sequences=1, prompt=prompt)
    return {
        "decode tokens/s": figures["decode tokens/s"],
        "prefill tokens/s": figures["prefill tokens/s"],
        "decode off by": expected.token_seconds * figures["decode tokens/s"] - 1,
        "prefill off by": expected.prompt_seconds / prompt * figures["prefill tokens/s"] - 1,
        "offloaded MB": sum(stage.disk_bytes for stage in plan.stages) / 1e6,
    }


def run_accelerate(folder: Path, share: float, prompt: int, tokens: int) -> Figures:
    """accelerate's own map and hooks, 16-bit weights, with as much memory as bigint8 has."""
    import torch
    from transformers import AutoModelForCausalLM

    from bigint8 import Workload
    from bigint8.plan.cut import make_plan
    from bigint8.plan.devices import cpu_device
    from bigint8.session import find_model

    (whole,) = make_plan(find_model(folder).spec, [cpu_device()], Workload(prompt + tokens + 8, 1)).stages
    with tempfile.TemporaryDirectory(prefix="bigint8-bench-") as disk:
        asked: dict[str, Any] = {"max_memory": {"cpu": int(whole.needed_bytes / share)}, "offload_folder": disk}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="auto", **asked)
        figures = time_model(model, 1, prompt, tokens, 0.0)
        written = sum(file.stat().st_size for file in Path(disk).iterdir())
    return {
        "decode tokens/s": figures["decode tokens/s"],
        "prefill tokens/s": figures["prefill tokens/s"],
        "decode off by": float("nan"),
        "prefill off by": float("nan"),
        "offloaded MB": written / 1e6,
    }


SIDES_OF_OURS: dict[str, Callable[[Path, float, int, int], Figures]] = {
    OURS: run_bigint8,
    "the first blocks offloaded": split_by_hand(lambda blocks, least: list(range(least))),
    "the last blocks offloaded": split_by_hand(lambda blocks, least: list(range(blocks - least, blocks))),
    "one less, spread": split_by_hand(lambda blocks, least: spread(blocks, least - 1)),
    "one more, spread": split_by_hand(lambda blocks, least: spread(blocks, least + 1)),
    "three more, spread": split_by_hand(lambda blocks, least: spread(blocks, least + 3)),
    "all blocks offloaded": split_by_hand(lambda blocks, least: list(range(blocks))),
}


if __name__ == "__main__":
    typer.run(main)
