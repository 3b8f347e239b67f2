"""Plans and loads as tables for people."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from ..plan.labels import place
from ..plan.plan import Plan
from ..units import GIB, decimal, speed

if TYPE_CHECKING:
    from ..load.fill import LoadReport

SHOWN_NAMES = 5

ELSEWHERE = ("host", "disk")
"""Where offloaded weights are, as a load's report has it beside devices."""


def print_plan(console: Console, plan: Plan) -> None:
    """The plan as a table: for each stage its device, blocks and GiB of weights, cache, workspace and head room.

    Where blocks are offloaded, also of what is elsewhere, and of the buffers through which it comes.
    """
    work = plan.workload
    table = new_table(
        f"{plan.spec.name}: int8, the rest {plan.dtype}; context {work.context}, batch {work.sequences}; sizes in GiB"
    )
    table.add_column("stage", justify="right")
    table.add_column("device", no_wrap=True)
    table.add_column("blocks", justify="right")
    elsewhere = ("elsewhere", "buffers") if plan.is_offloaded else ()
    for column in ("weights", "KV cache", "workspace", "head room", "usable", *elsewhere):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in plan.stages:
        sizes = (
            stage.weight_bytes,
            stage.kv_bytes,
            stage.workspace_bytes,
            stage.headroom_bytes,
            stage.device.usable_bytes,
            *((stage.host_bytes + stage.disk_bytes, stage.buffer_bytes) if plan.is_offloaded else ()),
        )
        table.add_row(
            str(stage.index),
            place(plan, stage),
            f"{stage.first_block}-{stage.last_block - 1}",
            *(f"{size / GIB:.2f}" for size in sizes),
        )
    console.print(table)
    models = sorted({stage.device.model for stage in plan.stages})
    total = sum(stage.weight_bytes + stage.host_bytes + stage.disk_bytes for stage in plan.stages)
    console.print(
        f"{len(plan.stages)} x {', '.join(models)}; {total / GIB:.2f} GiB of weights. Weights and KV cache are exact, "
        "the workspace is an estimate.",
        soft_wrap=True,
    )
    for note in plan.notes:
        console.print(f"Note: {note}.", soft_wrap=True)


def print_summary(console: Console, plan: Plan, reports: Sequence["LoadReport"], seconds: float) -> None:
    """What the load did, for each worker and in all."""
    table = new_table("loaded; sizes in GiB")
    for column in ("worker", "read", "seconds", "speed", "on device", "peak host", "peak device"):
        table.add_column(column, justify="right")
    for i, report in enumerate(reports):
        table.add_row(
            str(i),
            decimal(report.bytes_read),
            f"{report.read_seconds:.2f}",
            speed(report.bytes_read, report.read_seconds),
            f"{sum(size for device, size in report.device_bytes.items() if device not in ELSEWHERE) / GIB:.3f}",
            f"{report.peak_host_bytes / GIB:.2f}",
            f"{report.peak_device_bytes / GIB:.2f}" if report.peak_device_bytes else "-",
        )
    console.print(table)
    read = sum(report.bytes_read for report in reports)
    slowest = max(report.read_seconds for report in reports)
    line = f"{decimal(read)} read at {speed(read, slowest)}; {seconds:.1f} s with all that loading takes"
    if mapped := sum(report.bytes_mapped for report in reports):
        line += f"; {decimal(mapped)} mapped, to be read when used"
    if plan.dtype != plan.spec.stored:
        line += f"; what is not int8 is {plan.dtype}: this hardware is slow at the checkpoint's {plan.spec.stored}"
    console.print(line, soft_wrap=True)
    print_unused(console, sorted(set.intersection(*(set(report.unused) for report in reports))))


def print_unused(console: Console, names: Sequence[str]) -> None:
    """The tensors that no module wants, if there are any."""
    if names:
        more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
        console.print(f"not used by the model: {', '.join(names[:SHOWN_NAMES])}{more}", soft_wrap=True)


def new_table(title: str) -> Table:
    """A table as all commands print them."""
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
