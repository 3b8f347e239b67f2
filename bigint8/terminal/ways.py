"""A model that does not fit, as tables for people: what each device lacks, and what would help."""

from collections.abc import Callable

from rich.console import Console

from ..plan.ways_out import WaysOut, used_bytes
from ..units import GIB
from .tables import new_table


def print_ways_out(console: Console, found: WaysOut, worded: Callable[[str], str] = str) -> None:
    """What is needed, there and short on each device in the closest cut, then each way out with what it promises.

    worded: how parameters are named to whom reads it, in the text of a way
    """
    _print_closest(console, found)
    if found.ways:
        _print_ways(console, found, worded)


def _print_closest(console: Console, found: WaysOut) -> None:
    work = found.workload
    table = new_table(
        f"{found.closest.spec.name} does not fit: context {work.context}, batch {work.sequences}; the closest cut, "
        "sizes in GiB"
    )
    table.add_column("stage", justify="right")
    table.add_column("device", no_wrap=True)
    table.add_column("blocks", justify="right")
    for column in ("needed", "there", "short"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in found.closest.stages:
        table.add_row(
            str(stage.index),
            stage.device.name,
            f"{stage.first_block}-{stage.last_block - 1}",
            *_gib(used_bytes(stage), stage.device.usable_bytes, max(0, -stage.headroom_bytes)),
        )
    table.add_section()
    table.add_row("all", "", "", *_gib(found.needed_bytes, found.there_bytes, found.short_bytes))
    console.print(table)


def _print_ways(console: Console, found: WaysOut, worded: Callable[[str], str]) -> None:
    table = new_table("what would help, each planned; times are computed by the time model")
    table.add_column("change", min_width=32)
    table.add_column("stages", justify="right")
    table.add_column("least head room, GiB", justify="right")
    table.add_column("tokens/s", justify="right")
    table.add_column("prompt, s", justify="right")
    for way in found.ways:
        room = min(stage.headroom_bytes for stage in way.plan.stages)
        times = way.prediction
        figures = f"{times.tokens_per_s:.1f}", f"{times.prompt_seconds:.2f}"
        table.add_row(worded(way.text), str(len(way.plan.stages)), *_gib(room), *figures)
    console.print(table)
    prompts = sorted({way.prediction.prompt for way in found.ways})
    console.print(
        f"tokens/s: of all sequences at full context; prompt: until the first token of one of {prompts[-1]} tokens"
        f"{f' ({prompts[0]} where chunks or contexts are shorter)' if len(prompts) > 1 else ''}.",
        soft_wrap=True,
    )


def _gib(*sizes: int) -> list[str]:
    return [f"{size / GIB:.2f}" for size in sizes]
