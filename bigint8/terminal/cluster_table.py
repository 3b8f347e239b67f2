"""The boxes of a live cluster as a table for people."""

from collections.abc import Sequence

from rich.console import Console

from ..plan.devices import Box, Device
from ..plan.labels import short_model
from ..units import GIB
from .tables import new_table


def print_cluster(console: Console, devices: Sequence[Device]) -> None:
    """The boxes of these devices: what is in them, what else may hold weights there, and their links as measured.

    A CPU's own memory is no second one beside it.
    """
    boxes: dict[Box, list[Device]] = {}
    for device in devices:
        boxes.setdefault(device.box, []).append(device)
    linked = len(boxes) > 1
    table = new_table(f"Ray cluster: {len(boxes)} box{'es' * linked}; sizes in GiB")
    table.add_column("box")
    table.add_column("devices")
    for column in ("on devices", "host memory", "disk", *(("link GB/s", "latency us") if linked else ())):
        table.add_column(column, justify="right", no_wrap=True)
    for box, there in boxes.items():
        models = [short_model(device) for device in there]
        usable = sum(device.usable_bytes for device in there)
        host = f"{box.host_bytes / GIB:.1f}" if there[0].kind == "cuda" else "-"
        link = (f"{box.network_bytes_per_s / 1e9:.3g}", f"{2e6 * box.network_seconds:.0f}") if linked else ()
        table.add_row(
            box.name,
            ", ".join(f"{models.count(model)} x {model}" for model in dict.fromkeys(models)),
            f"{usable / GIB:.1f}",
            host,
            f"{box.disk_bytes / GIB:.1f}",
            *link,
        )
    console.print(table)
    if linked:
        console.print(
            "Links were measured from one box to each other; its own is the fastest of these.", soft_wrap=True
        )
