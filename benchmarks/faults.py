"""A worker of a pipeline is killed or stopped in the middle of an answer: seconds until the next token.

python benchmarks/faults.py [--model smollm2-135m] [--workers 3] [--rounds 5] [--json FILE]

CPU workers on this machine, one request under way. The sides take turns: each stage is killed (SIGKILL) once a round,
and the last one is stopped (SIGSTOP), which is noticed only because it says nothing any more.
"""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rounds import Comparison, Figures, interleave, print_machine, write_json

from bigint8.model_pipeline import ModelPipeline
from bigint8.options import Cluster, Workload
from bigint8.session import find_model

PROMPT = "Once upon a time there was a little girl who lived in a village near the"
WAIT_SECONDS = 300.0


def main(
    model: Annotated[str, typer.Option(help="A preset or a checkpoint folder.")] = "smollm2-135m",
    workers: Annotated[int, typer.Option(min=2)] = 3,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    before: Annotated[int, typer.Option(min=1, help="Tokens that are written before the fault.")] = 16,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Time faults."""
    work = Workload(context=256, sequences=1)
    with ModelPipeline(find_model(model), workers, work, Cluster("cpu")) as pipeline:
        pipeline.load(progress=False)
        sides = {
            f"stage {stage} killed": partial(after_fault, pipeline, stage, signal.SIGKILL, before)
            for stage in range(workers)
        }
        sides[f"stage {workers - 1} stopped"] = partial(after_fault, pipeline, workers - 1, signal.SIGSTOP, before)
        console = Console(highlight=False)
        print_machine(console)
        title = f"{pipeline.found.spec.name}, {workers} CPU workers, seconds from the fault"
        comparison = Comparison(title, "to the next token")
        interleave(comparison, sides, rounds)
        comparison.print(console, "stage 0 killed")
        write_json(json_file, [comparison], "stage 0 killed")


def after_fault(pipeline: ModelPipeline, stage: int, number: signal.Signals, before: int) -> Figures:
    """Ask for an answer, and let the worker of a stage have the signal after so many tokens."""
    assert pipeline._workers is not None
    completion = pipeline.submit(PROMPT, max_new_tokens=before + 16, do_sample=False)
    until = time.monotonic() + WAIT_SECONDS
    while len(completion.tokens) < before:
        _check(until)
    os.kill(pipeline._workers.infos[stage].pid, number)
    start = time.perf_counter()
    time.sleep(0.05)  # a token that was on its way
    written = len(completion.tokens)
    while len(completion.tokens) == written:
        _check(until)
    seconds = time.perf_counter() - start
    completion.result(WAIT_SECONDS)
    return {"to the next token": seconds}


def _check(until: float) -> None:
    if time.monotonic() > until:
        raise RuntimeError(f"no token within {WAIT_SECONDS:.0f} s")
    time.sleep(0.002)


if __name__ == "__main__":
    typer.run(main)
