"""What a simulation found, as a table for people."""

from rich import box
from rich.console import Console
from rich.table import Table

from ..simulation.result import Simulated, Spread


def print_simulated(console: Console, found: Simulated) -> None:
    """Tokens a second, and how long requests wait and for what: in seconds, computed."""
    load = found.load
    table = Table(
        title=f"simulated: {found.done} requests, {_arrival(found)}, on {_several(found.pipelines, 'pipeline')} of "
        f"{_several(len(found.busy), 'device')}; seconds",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("")
    for column in ("mean", "median", "95 %", "99 %", "most"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = (
        ("in the queue", found.queue),
        ("until the first token", found.first_token),
        ("between two tokens", found.between_tokens),
        ("until the last token", found.whole),
    )
    for name, spread in rows:
        table.add_row(name, *_times(spread))
    console.print(table)
    lines = [
        f"{found.tokens_per_s:,.1f} tokens/s generated, {found.all_tokens_per_s:,.1f} with those of the prompts "
        f"({load.prompt_tokens} and {load.new_tokens} a request, {'on average' if load.spread else 'each'}), in "
        f"{found.seconds:,.1f} s",
        f"stages are busy {', '.join(f'{share:.0%}' for share in found.busy)} of the time; of the pages for keys and "
        f"values a pipeline held at most {_pages(found)}",
    ]
    if found.failures or found.failures_asked is not None:
        line = (
            f"{_several(found.failures, 'device')} died; pipelines stood still for {found.down_seconds:,.1f} s in all"
        )
        if found.failed:
            line += f"; {_several(found.failed, 'request')} failed"
        lines.append(line)
    for line in [*lines, "Computed by the time model and the scheduler, not measured."]:
        console.print(line, soft_wrap=True, highlight=False)


def _arrival(found: Simulated) -> str:
    load = found.load
    if load.sessions is not None:
        return f"from {load.sessions} who wait for each answer"
    return "all at once" if load.rate_per_s is None else f"{load.rate_per_s:g} a second"


def _times(spread: Spread) -> list[str]:
    times = (
        spread.mean_seconds,
        spread.median_seconds,
        spread.p95_seconds,
        spread.p99_seconds,
        spread.most_seconds,
    )
    return [f"{seconds:.3f}" for seconds in times]


def _pages(found: Simulated) -> str:
    return ", ".join(f"{most} of {there}" for most, there in zip(found.most_pages, found.pages, strict=True))


def _several(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
