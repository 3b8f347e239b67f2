"""A dry run of a load: read every byte as loading would, check and quantize it, and throw the result away.

python -m bigint8.check CHECKPOINT [--gpus N]
"""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from rich.console import Console

from .errors import PlanError
from .options import Int8Config
from .plan.cut import make_plan
from .plan.plan import Plan
from .plan.spec import ModelSpec
from .session import check, find_model
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
    with_flags,
    write_json,
)
from .terminal.tables import print_plan, print_unused
from .units import decimal, speed

if TYPE_CHECKING:
    from .load.intake import CheckReport

app = new_app()


@dataclass(kw_only=True)
class CheckFlags(AccessFlags, PlanFlags):
    """The flags of this command."""

    checkpoint: Source
    int8_head: Int8Head = False
    json_file: JsonFile = None


@command(app, CheckFlags)
def run(flags: CheckFlags) -> None:
    """Read and quantize a whole checkpoint without keeping anything: what can go wrong, before it costs anything."""
    console = new_console()
    int8 = Int8Config(int8_head=True) if flags.int8_head else Int8Config()
    found = find_model(flags.checkpoint, int8, flags.access())
    found.opened()
    plan, note = plan_stages(found.spec, flags)
    if plan is not None:
        print_plan(console, plan)
        found = replace(found, spec=plan.spec)  # what the plan decided about the head
    if note:
        console.print(note, soft_wrap=True)
    report = check(found, flags.dtype)
    _print_report(console, found.source.name, report)
    write_json(flags.json_file, {"plan": plan.to_dict() if plan else None, "check": asdict(report)})
    if plan is None and flags.gpus is not None:
        raise PlanError(f"the checkpoint is good, but {note}")


def plan_stages(spec: ModelSpec, flags: PlanFlags) -> tuple[Plan | None, str]:
    """A plan for this checkpoint and a note about it. If no plan is possible: None and the reason."""
    if spec.layout is None:
        model_type = spec.config["model_type"]
        return None, f"model type {model_type!r} cannot be cut into stages: it loads in one process only"
    try:
        there = flags.devices_to_plan_for(spec)
        return make_plan(spec, there.devices, flags.workload(spec), spill=there.spill), there.note or ""
    except PlanError as error:
        return None, f"no plan: {with_flags(str(error))}"


def _print_report(console: Console, name: str, report: "CheckReport") -> None:
    console.print(
        f"{name}: {report.tensors} tensors in {report.shards} shard{'s' * (report.shards > 1)} are whole, finite and "
        "of the right shape.\n"
        f"{decimal(report.bytes_read)} read in {report.seconds:.1f} s, {speed(report.bytes_read, report.seconds)}. "
        f"Loaded, the model takes {decimal(report.int8_bytes)} in int8 and {decimal(report.other_bytes)} besides.\n"
        f"Memory of this process: {decimal(report.first_rss_bytes)} when reading began, "
        f"{decimal(report.most_rss_bytes)} at most while reading, {decimal(report.peak_host_bytes)} in all.",
        soft_wrap=True,
    )
    print_unused(console, report.unused)


if __name__ == "__main__":
    run_command(app)
