"""Plans against accelerate's, over models and machines that people have. Nothing is measured: all times are computed.

python benchmarks/plans.py [--model llama-65b]... [--context N] [--all] [--markdown FILE] [--json FILE]

Each model is cut over each machine by accelerate, as transformers asks it for 8-bit layers of bitsandbytes, and by
bigint8. Without --all, machines that are far too small or too large for a model are left out: those whose GPUs have
less than nine tenths of its int8 weights, or more than five times as much. "fullest" counts keys and values of one
sequence and the workspace, which accelerate is not told of. The exit code is 1 where accelerate's cut fits and ours
does not, or ours has the slower slowest stage.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from bigint8.compare_plans import Compared, compare, markdown, print_compared
from bigint8.plan.devices import Device, preset_gpus
from bigint8.plan.spec import ModelSpec, spec_of
from bigint8.sources.find import find_source
from bigint8.sources.presets import preset_names

MACHINES = (
    {"rtx-3060": 2}, {"rtx-3060": 4}, {"rtx-3060": 8}, {"rtx-3090": 1}, {"rtx-3090": 2}, {"rtx-3090": 4},
    {"rtx-3090": 8}, {"rtx-4080": 2}, {"rtx-4090": 2}, {"rtx-4090": 4}, {"rtx-5090": 2}, {"rtx-5090": 8},
    {"a6000": 4}, {"a100-80gb": 2}, {"rtx-4090": 1, "rtx-3060": 1}, {"rtx-3060": 2, "rtx-3090": 2},
    {"rtx-3060": 1, "rtx-3090": 1, "rtx-4090": 1}, {"rtx-5090": 2, "rtx-3090": 4}, {"rtx-3060": 4, "a6000": 2},
)  # fmt: skip
"""GPUs of one box, in the order in which a person counts them."""

LEAST_SHARE, MOST_SHARE = 0.9, 5
"""How much memory for a model's int8 weights makes a case worth a look."""

SAME = 1 + 1e-9


def main(
    model: Annotated[list[str] | None, typer.Option(help="A preset; may be given more than once: all.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also machines that are far too small or large.")] = False,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Compare cuts of many models over many machines."""
    console = Console(highlight=False)
    specs = [spec_of(find_source(name, fetch=False)) for name in model or preset_names()]
    pairs = [
        (spec, gpus) for spec in specs for gpus in map(devices_of, MACHINES) if everything or in_question(spec, gpus)
    ]
    cases = [
        compare(spec, gpus, spec.workload(context)) for spec, gpus in track(pairs, console=console, transient=True)
    ]
    print_compared(console, cases)
    worse = [case for case in cases if is_worse(case)]
    console.print(summary(cases, worse), soft_wrap=True)
    if markdown_file is not None:
        markdown_file.write_text(markdown(cases), encoding="utf-8")
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(case) for case in cases], indent=2) + "\n", encoding="utf-8")
    if worse:
        raise typer.Exit(1)


def devices_of(machine: dict[str, int]) -> list[Device]:
    """The GPUs of a machine, numbered."""
    gpus = [gpu for name, count in machine.items() for gpu in preset_gpus(name, count)]
    return [replace(gpu, name=f"cuda:{i}") for i, gpu in enumerate(gpus)]


def in_question(spec: ModelSpec, devices: list[Device]) -> bool:
    """Whether the model nearly fits, or does without most of the memory being empty."""
    there = sum(device.usable_bytes for device in devices)
    layout = spec.known_layout
    return len(devices) <= len(layout.blocks) and LEAST_SHARE < there / layout.weight_bytes(2) < MOST_SHARE


def is_worse(case: Compared) -> bool:
    """Whether accelerate's cut spills nothing, and ours does not fit or has a slower slowest stage."""
    theirs, ours = case.theirs, case.ours
    if theirs.slowest_seconds is None:
        return False
    return ours is None or ours.slowest_seconds is None or ours.slowest_seconds > theirs.slowest_seconds * SAME


def summary(cases: list[Compared], worse: list[Compared]) -> str:
    """The cases in one sentence each."""
    spills = sum(bool(case.theirs.spilled) for case in cases)
    saved = sum(bool(case.theirs.spilled) and case.ours is not None for case in cases)
    faster = [
        case.theirs.slowest_seconds / case.ours.slowest_seconds
        for case in cases
        if case.ours and case.ours.slowest_seconds and case.theirs.slowest_seconds
    ]
    lines = [
        f"{len(cases)} cases. accelerate spills modules in {spills}; in {saved} of these bigint8 keeps all on GPUs.",
        f"Where neither spills ({len(faster)}), accelerate's slowest stage takes {min(faster, default=1):.2f} to "
        f"{max(faster, default=1):.2f} times as long as ours.",
        *(f"WORSE: {case.model} on {case.devices}" for case in worse),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
