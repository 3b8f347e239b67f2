"""A page about a model's plans, in one file and without network: a person chooses devices, context and sequences."""

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from ..errors import BigInt8Error
from ..options import Workload
from .devices import Device
from .draft import Objective
from .grid import Grid
from .spec import ModelSpec


def write_page(
    spec: ModelSpec,
    devices: Sequence[Device],
    file: Path,
    start: Workload | None = None,
    objective: Objective = "throughput",
) -> None:
    """Write the page that begins with these devices and this work, by default the model's own.

    It holds some hundred plans and their predictions, of a `Grid`; the planner takes some milliseconds for each.
    Raises BigInt8Error if the file cannot be written, PlanError for a model without a layout.
    """
    grid = Grid(spec, devices, start or spec.workload(), objective)
    try:
        with Path(file).open("w", encoding="utf-8") as out:  # before the plans are made, which takes seconds
            out.write(page(grid))
    except OSError as error:
        raise BigInt8Error(f"{file}: the page cannot be written: {error.strerror}; name another file") from None


def page(grid: Grid) -> str:
    """The page's text: the template with the grid's plans in it."""
    template = files("bigint8.plan").joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps(grid.to_dict(), ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # nothing in the data ends the script that holds it
    before, after = template.split("{{data}}")
    return before.replace("{{model}}", html.escape(grid.spec.name)) + data + after
