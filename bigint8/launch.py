"""Plan a model, load it over several devices, generate text with it.

python -m bigint8.launch --model NAME_OR_PATH --gpus N [--prompt TEXT]...
"""

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from .model_pipeline import ModelPipeline
from .options import DEFAULT_THRESHOLD, Cluster, DeviceKind, Int8Config
from .plan.cut import make_plan
from .session import FoundModel, find_model
from .terminal.cluster_table import print_cluster
from .terminal.flags import (
    AccessFlags,
    Int8Head,
    JsonFile,
    PlanFlags,
    command,
    new_app,
    new_console,
    run_command,
    write_json,
)
from .terminal.tables import print_plan, print_summary

app = new_app()


@dataclass(kw_only=True)
class LaunchFlags(AccessFlags, PlanFlags):
    """The flags of this command."""

    model: Annotated[str, typer.Option(help="A preset (opt-175b), a checkpoint folder or a hub id.")]
    checkpoint: Annotated[str | None, typer.Option(help="Where a preset's weights are: a folder or a hub id.")] = None
    prompt: Annotated[list[str] | None, typer.Option(help="Text for the model; may be given more than once.")] = None
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue a prompt as it is, also where the model has a chat template.")
    ] = False
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 64
    device: Annotated[DeviceKind, typer.Option(help="What the workers run on.")] = "auto"
    threshold: Annotated[
        float | None, typer.Option(min=0.0, help=f"Outlier threshold of LLM.int8() ({DEFAULT_THRESHOLD}); 0 is none.")
    ] = None
    int8_head: Int8Head = False
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Print the plan and stop; needs no weights.")] = False
    json_file: JsonFile = None
    trace: Annotated[
        Path | None,
        typer.Option(help="A file that says what ran when, for https://ui.perfetto.dev: loading, steps, hops."),
    ] = None

    def int8(self) -> Int8Config:
        chosen: dict[str, Any] = {"int8_head": True} if self.int8_head else {}
        if self.threshold is not None:
            chosen["threshold"] = self.threshold
        return Int8Config(dtype=self.dtype, **chosen)


@command(app, LaunchFlags)
def launch(flags: LaunchFlags) -> None:
    """Load a model in int8 over several devices and generate text with it."""
    console = new_console()
    weights, elsewhere = not flags.plan_only, flags.address is not None
    found = find_model(flags.model, flags.int8(), flags.access(), flags.checkpoint, weights, elsewhere)
    if flags.plan_only or found.checkpoint is None:
        _plan_only(console, found, flags)
        if not flags.plan_only:
            raise found.source.not_found()
        return
    flags.refuse_other_devices("--plan-only: to run")
    _run(console, found, flags)


def _plan_only(console: Console, found: FoundModel, flags: LaunchFlags) -> None:
    there = flags.devices_to_plan_for(found.spec, flags.device)
    if there.is_live:
        print_cluster(console, there.devices)
    if there.note:
        console.print(there.note, soft_wrap=True)
    plan = make_plan(found.spec, there.devices, flags.workload(found.spec), spill=there.spill)
    print_plan(console, plan)
    write_json(flags.json_file, {"model": flags.model, "plan": plan.to_dict()})


def _run(console: Console, found: FoundModel, flags: LaunchFlags) -> None:
    started = time.perf_counter()
    cluster = Cluster(flags.device, flags.address)
    with ModelPipeline(found, flags.gpus, flags.workload(found.spec), cluster, flags.trace) as pipeline:
        if flags.address is not None:
            print_cluster(console, pipeline.devices)
        if pipeline.note:
            console.print(pipeline.note)
        print_plan(console, pipeline.plan)
        planned = pipeline.plan

        _read_text_while(pipeline.start, pipeline, flags.raw)
        if pipeline.plan is not planned:
            console.print(pipeline.note)
            print_plan(console, pipeline.plan)

        from .terminal.chat import Generation

        prompts = flags.prompt or []
        for text in prompts:  # one that does not fit is told before the load
            pipeline.text.encode(text, pipeline.plan.workload.context)
        load_started = time.perf_counter()
        reports = pipeline.load()
        load_seconds = time.perf_counter() - load_started
        print_summary(console, pipeline.plan, reports, load_seconds)
        generation = Generation(pipeline, flags.max_new_tokens)
        result = {
            "model": flags.model,
            "plan": pipeline.plan.to_dict(),
            "load": [asdict(report) for report in reports],
            "timings": {"start_seconds": load_started - started, "load_seconds": load_seconds},
            "generations": generation.run(prompts),
        }
        write_json(flags.json_file, result)
        if not prompts and sys.stdin.isatty() and sys.stdout.isatty():
            generation.chat()


def _read_text_while(start: Callable[[], None], pipeline: ModelPipeline, raw: bool) -> None:
    """Read the tokenizer, whose imports take seconds, while the workers start, which is mostly waiting."""
    from .load.warm_up import importing

    def read() -> None:
        with importing():
            pipeline.read_text(raw)

    done = _in_background(read)
    start()
    done()


Result = TypeVar("Result")


def _in_background(work: Callable[[], Result]) -> Callable[[], Result]:
    """Begin some work in a thread. The function that is returned waits for it, and returns or raises what it did."""
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result


def main() -> None:
    """Run the command line."""
    run_command(app)


if __name__ == "__main__":
    main()
