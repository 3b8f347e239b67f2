"""What the command line shows of plans and loads: tables for people."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from .planner import GIB, Plan

if TYPE_CHECKING:
    from .loader import LoadReport


def print_plan(console: Console, plan: Plan) -> None:
    """The plan as a table: for each stage its device, blocks and GiB of weights, cache, workspace and head room."""
    title = f"{plan.model}: int8, the rest {plan.dtype}; context {plan.context}, batch {plan.batch_size}; sizes in GiB"
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    table.add_column("stage", justify="right")
    table.add_column("device", no_wrap=True)
    table.add_column("blocks", justify="right")
    for column in ("weights", "KV cache", "workspace", "head room", "usable"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in plan.stages:
        sizes = (
            stage.weight_bytes,
            stage.kv_bytes,
            stage.workspace_bytes,
            stage.headroom_bytes,
            stage.device.usable_bytes,
        )
        table.add_row(
            str(stage.index),
            stage.device.name,
            f"{stage.first_block}-{stage.last_block - 1}",
            *(f"{size / GIB:.2f}" for size in sizes),
        )
    console.print(table)
    models = sorted({stage.device.model for stage in plan.stages})
    total = sum(stage.weight_bytes for stage in plan.stages)
    console.print(
        f"{len(plan.stages)} x {', '.join(models)}; {total / GIB:.2f} GiB of weights. Weights and KV cache are exact, "
        "the workspace is an estimate.",
        soft_wrap=True,
    )


def print_summary(console: Console, plan: Plan, reports: Sequence["LoadReport"], stored: str, seconds: float) -> None:
    """What the load did, for each worker and in all."""
    table = Table(
        title="loaded; sizes in GiB",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    for column in ("worker", "read GB", "seconds", "GB/s", "on device", "peak host", "peak device"):
        table.add_column(column, justify="right")
    for i, report in enumerate(reports):
        table.add_row(
            str(i),
            f"{report.bytes_read / 1e9:.3f}",
            f"{report.seconds:.2f}",
            f"{report.bytes_read / 1e9 / report.seconds:.2f}",
            f"{sum(report.device_bytes.values()) / GIB:.3f}",
            f"{report.peak_host_bytes / GIB:.2f}",
            f"{report.peak_device_bytes / GIB:.2f}" if report.peak_device_bytes else "-",
        )
    console.print(table)
    read = sum(report.bytes_read for report in reports)
    line = f"{read / 1e9:.2f} GB in {seconds:.1f} s, {read / 1e9 / seconds:.2f} GB/s in all"
    if plan.dtype != stored:
        line += f"; what is not int8 is {plan.dtype}: this hardware is slow at the checkpoint's {stored}"
    console.print(line, soft_wrap=True)
    unused = sorted(set.intersection(*(set(report.unused) for report in reports)))
    if unused:
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        console.print(f"not used by the model: {', '.join(unused[:5])}{more}", soft_wrap=True)
