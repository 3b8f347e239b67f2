"""Is this machine all right? Checks every kernel against the reference on this machine, and measures it.

python -m bigint8.doctor [--device auto|cuda|cpu] [--folder DIR] [--save] [--json FILE]

Exits with 1 if a kernel gives wrong results or fails. The values and figures are those of `bigint8.examine`.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .options import DeviceKind
from .plan.devices import Device, find_devices
from .plan.speed import save_disk, save_speeds, speeds_file
from .terminal.flags import JsonFile, command, new_app, new_console, run_command, write_json

app = new_app()


@dataclass(kw_only=True)
class DoctorFlags:
    """The flags of this command."""

    device: Annotated[DeviceKind, typer.Option(help="What to examine.")] = "auto"
    folder: Annotated[Path | None, typer.Option(help="Where checkpoints are: the disk to time.")] = None
    save: Annotated[
        bool, typer.Option("--save", help="Measure what the time model needs, and keep it: plans take it from then on.")
    ] = False
    json_file: JsonFile = None


@command(app, DoctorFlags)
def run(flags: DoctorFlags) -> None:
    """Check every kernel on this machine against the reference, and measure it."""
    import torch

    from .examine import examine

    console = new_console()
    devices, note = find_devices(flags.device)
    if note:
        console.print("no GPU was found: this is the CPU", soft_wrap=True)
    console.print(f"{', '.join(f'{d.name}: {d.model}' for d in devices)}; torch {torch.__version__}", soft_wrap=True)
    findings = []
    with console.status("examining") as status:
        for finding in examine([d.name for d in devices], flags.folder or Path.cwd()):
            findings.append(finding)
            status.update(f"{finding.device}: {finding.what}")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("device", "what", "result", "verdict"):
        table.add_column(heading)
    for finding in findings:
        table.add_row(finding.device, finding.what, finding.result, finding.verdict)
    console.print(table)
    write_json(flags.json_file, {"findings": [asdict(finding) for finding in findings]})
    wrong = [finding for finding in findings if finding.verdict == "WRONG"]
    for finding in wrong:
        print(f"wrong: {finding.device}: {finding.what}: {finding.result}", file=sys.stderr)
    if wrong:
        raise typer.Exit(1)
    console.print("Every kernel computes what it should.")
    if flags.save:
        _save(console, devices)


def _save(console: Console, devices: list[Device]) -> None:
    """Measure one device of each kind, and keep the figures for plans."""
    from .measure_speed import measure_device, measure_disk

    for model, device in {device.model: device for device in devices}.items():
        with console.status(f"measuring {model}"):
            speeds = dict(measure_device(device))
        save_speeds(model, speeds)
        for cores, speed in speeds.items():
            named = f", {cores} core{'s' * (cores > 1)}" if device.kind == "cpu" else ""
            console.print(
                f"{model}{named}: weights are read at {speed.read_bytes_per_s / 1e9:.1f} GB/s, keys and values at "
                f"{speed.cache_bytes_per_s / 1e9:.1f} GB/s; {speed.row_ops_per_s / 1e9:.0f} GOP/s for a row more, "
                f"{speed.prompt_ops_per_s / 1e9:.0f} for prompts; a block takes {1e6 * speed.block_seconds:.0f} us "
                "besides",
                soft_wrap=True,
            )
    with console.status("measuring the disk"):
        disk = measure_disk(speeds_file().parent)
    save_disk(disk)
    console.print(
        f"{speeds_file().parent}: a file is read at {disk.bytes_per_s / 1e9:.1f} GB/s past the file cache, at "
        f"{disk.cached_bytes_per_s / 1e9:.1f} GB/s from it",
        soft_wrap=True,
    )
    console.print(f"Plans take this from {speeds_file().parent}.", soft_wrap=True)


if __name__ == "__main__":
    run_command(app)
