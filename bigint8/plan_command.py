"""Plan a model over devices that need not be here: what goes where, how fast it would be, pictures of it.

python -m bigint8.plan MODEL [--gpus N --gpu-type NAME | --cluster NAME_OR_FILE] [--objective throughput|latency]
    [--json FILE] [--device-map]
"""

import json
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from .options import Int8Config
from .plan.cut import make_plan
from .plan.draft import Objective
from .session import find_model
from .terminal.flags import (
    AccessFlags,
    Int8Head,
    JsonFile,
    PlanFlags,
    Source,
    command,
    new_app,
    new_console,
    run_command,
    write_json,
)
from .terminal.plan_table import print_plan_with_times

app = new_app()


@dataclass(kw_only=True)
class PlanCommandFlags(AccessFlags, PlanFlags):
    """The flags of this command."""

    model: Source
    objective: Annotated[
        Objective, typer.Option(help="Make the slowest stage fast (many requests), or the way through all (one).")
    ] = "throughput"
    int8_head: Int8Head = False
    device_map: Annotated[
        bool, typer.Option("--device-map", help="Print only the plan as a device_map of transformers.")
    ] = False
    json_file: JsonFile = None


@command(app, PlanCommandFlags)
def plan(flags: PlanCommandFlags) -> None:
    """Plan a model, without its weights: which stage goes where, and how fast that would be."""
    console = new_console()
    int8 = Int8Config(dtype=flags.dtype, int8_head=flags.int8_head or None)
    spec = find_model(flags.model, int8, flags.access(), weights=False).spec
    devices, note = flags.devices_to_plan_for(spec)
    made = make_plan(spec, devices, flags.workload(spec), flags.objective)
    if flags.device_map:
        print(json.dumps(made.device_map(), indent=2))
        return
    if note:
        console.print(note, soft_wrap=True)
    times = print_plan_with_times(console, made)
    write_json(flags.json_file, {"model": flags.model, "plan": made.to_dict(), "times": asdict(times)})


def main() -> None:
    """Run the command line."""
    run_command(app)


if __name__ == "__main__":
    main()
