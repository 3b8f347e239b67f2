"""Plan a model over devices that need not be here: what goes where, how fast it would be, pictures of it.

python -m bigint8.plan MODEL [--gpus N --gpu-type NAME | --cluster NAME_OR_FILE | --address RAY]
    [--objective throughput|latency] [--json FILE] [--picture FILE.png|svg|html] [--device-map] [--compare accelerate]
    [--simulate --requests R --rate X --pipelines N]
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .compare_plans import compare, print_compared
from .errors import BigInt8Error
from .options import Int8Config
from .plan.cut import make_plan
from .plan.draft import Objective
from .plan.pictures import draw
from .session import find_model
from .simulation.load import Failures, Load
from .simulation.simulate import simulate
from .terminal.cluster_table import print_cluster
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
from .terminal.simulated_table import print_simulated

app = new_app()


@dataclass(kw_only=True)
class SimulateFlags:
    """What is simulated."""

    simulate: Annotated[bool, typer.Option("--simulate", help="Simulate requests, with the scheduler that runs.")] = (
        False
    )
    requests: Annotated[int, typer.Option(min=1, help="Requests that are simulated.")] = 1000
    rate: Annotated[float | None, typer.Option(help="Requests a second; without it, all come at once.")] = None
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of a simulated request, on average.")] = 512
    new_tokens: Annotated[int, typer.Option(min=1, help="Of a simulated answer, on average.")] = 128
    spread: Annotated[float, typer.Option(help="Of both: standard deviation of their logarithms.")] = 0.5
    pipelines: Annotated[int, typer.Option(min=1, help="Copies of the plan that share the requests.")] = 1
    days_between_failures: Annotated[
        float | None, typer.Option(help="Of one device, on average; without it, none fails.")
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Of chance: the same seed, the same requests.")] = 0

    def load(self) -> Load:
        """The requests. Raises BigInt8Error for what makes none."""
        if self.rate is not None and not self.rate > 0:
            raise BigInt8Error(f"--rate {self.rate:g}: requests a second must be above 0; without it, all come at once")
        return Load(self.requests, self.rate, self.prompt_tokens, self.new_tokens, self.spread, seed=self.seed)

    def failures(self) -> Failures | None:
        """When devices fail."""
        days = self.days_between_failures
        return None if days is None else Failures(device_seconds=days * 86400, seed=self.seed)


@dataclass(kw_only=True)
class PlanCommandFlags(AccessFlags, PlanFlags, SimulateFlags):
    """The flags of this command."""

    model: Source
    objective: Annotated[
        Objective, typer.Option(help="Make the slowest stage fast (many requests), or the way through all (one).")
    ] = "throughput"
    int8_head: Int8Head = False
    picture: Annotated[
        Path | None, typer.Option(help="Draw the plan: .png, .svg, or .html, a page in which a person changes it.")
    ] = None
    compare: Annotated[
        Literal["accelerate"] | None, typer.Option(help="Show beside it what accelerate's planner answers.")
    ] = None
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
    there = flags.devices_to_plan_for(spec)
    work, load = flags.workload(spec), flags.load()
    wanted = replace(spec, one_process=flags.device_map)
    made = make_plan(wanted, there.devices, work, flags.objective, there.spill)
    if flags.device_map:
        print(json.dumps(made.device_map(), indent=2))
        return
    if there.is_live:
        print_cluster(console, there.devices)
    if there.note:
        console.print(there.note, soft_wrap=True)
    times = print_plan_with_times(console, made)
    result: dict[str, Any] = {"model": flags.model, "plan": made.to_dict(), "times": asdict(times)}
    if flags.compare is not None:
        compared = compare(spec, there.devices, work)
        print_compared(console, [compared])
        result["compared"] = asdict(compared)
    if flags.simulate:
        found = simulate(made, load, flags.pipelines, flags.failures())
        print_simulated(console, found)
        result["simulated"] = found.to_dict()
    if flags.picture is not None:
        draw(made, flags.picture, there.devices, flags.objective)
        console.print(f"drawn: {flags.picture}", soft_wrap=True)
    write_json(flags.json_file, result)


def main() -> None:
    """Run the command line."""
    run_command(app)


if __name__ == "__main__":
    main()
