"""What the command lines share: flags, each once; and how errors and signals end a command.

A command is a function of one object, a dataclass whose fields are its flags; `command` makes the command line of it.
"""

import dataclasses
import inspect
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from rich.console import Console

from ..errors import BigInt8Error, PlanError
from ..options import DEFAULT_CONTEXT, Access, DeviceKind, Dtype, Workload
from ..plan.clusters import load_cluster
from ..plan.cut import fewest_devices
from ..plan.devices import (
    Device,
    cuda_devices,
    find_devices,
    gpu_presets,
    plain_torch_note,
    preset_gpus,
    wait_without_spinning,
)
from ..plan.offload import Spill, spill_of_boxes
from ..plan.spec import ModelSpec
from ..plan.ways_out import WaysOut
from ..units import parse_bytes
from .ways import print_ways_out

DEFAULT_GPU_TYPE = "rtx-3090"

Source = Annotated[str, typer.Argument(help="A checkpoint folder, a preset or a hub id.")]
Int8Head = Annotated[bool, typer.Option("--int8-head", help="The output head in int8 too.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write what was found here, as JSON.")]


@dataclass(kw_only=True)
class AccessFlags:
    """What may be fetched and run."""

    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")
    ] = False

    def access(self) -> Access:
        return Access(self.revision, self.trust_remote_code)


@dataclass(frozen=True)
class PlannedFor:
    """What a plan is made for: devices, and a note of what a person should know of them.

    spill: what may hold blocks that no device holds; only of a live Ray cluster, else None: none are offloaded
    """

    devices: list[Device]
    note: str | None = None
    spill: Spill | None = None

    @property
    def is_live(self) -> bool:
        """Whether they are those of a Ray cluster that runs."""
        return self.spill is not None


@dataclass(kw_only=True)
class PlanFlags:
    """What a plan is for: how many devices of which kind, and how much work."""

    gpus: Annotated[
        int | None, typer.Option(min=1, help="How many devices: all GPUs, or 1 CPU a node, by default.")
    ] = None
    gpu_type: Annotated[
        str | None, typer.Option(help=f"Plan for GPUs of this kind instead of this machine's: {DEFAULT_GPU_TYPE}, ...")
    ] = None
    cluster: Annotated[
        str | None, typer.Option(help="Plan for these boxes instead: a name of configs/clusters, or a YAML file.")
    ] = None
    context: Annotated[
        int | None, typer.Option(min=1, help=f"Tokens of a sequence to leave room for ({DEFAULT_CONTEXT}).")
    ] = None
    address: Annotated[
        str | None, typer.Option(help="An existing Ray cluster, as HOST:PORT or auto: its devices, not this machine's.")
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 1
    dtype: Annotated[Dtype, typer.Option(help="Of what is not int8.")] = "auto"

    def workload(self, spec: ModelSpec) -> Workload:
        return spec.workload(self.context, self.batch_size)

    def refuse_other_devices(self, purpose: str) -> None:
        """Raise BigInt8Error for flags that name devices which need not be there. `purpose`: what these are for."""
        for flag, given in (("--gpu-type", self.gpu_type), ("--cluster", self.cluster)):
            if given is not None:
                raise BigInt8Error(f"{flag} is for {purpose}, bigint8 uses the devices that are there")

    def devices_to_plan_for(self, spec: ModelSpec, kind: DeviceKind = "auto") -> PlannedFor:
        """The devices to plan for, which need not be on this machine.

        Raises BigInt8Error for flags that exclude each other, WorkerError for a Ray cluster that cannot be read.
        """
        if self.address is not None:
            return self._live_cluster(self.address, spec, kind)
        if self.cluster is not None:
            if self.gpus is not None or self.gpu_type is not None:
                raise BigInt8Error("--cluster says which GPUs there are: leave out --gpus and --gpu-type")
            machines = load_cluster(self.cluster)
            return PlannedFor(list(machines.devices), machines.note)
        if self.gpu_type is None and (kind != "auto" or cuda_devices()):
            return PlannedFor(*find_devices(kind, self.gpus))
        name = self.gpu_type or DEFAULT_GPU_TYPE
        one = preset_gpus(name, 1)[0]
        count = self.gpus or fewest_devices(spec, one, self.workload(spec))
        note = f"planned for {count} x {one.model}"
        if self.gpu_type is None:
            note = f"no GPU was found: {note}; --gpu-type names another ({', '.join(sorted(gpu_presets()))})"
        gpus = preset_gpus(name, count)
        return PlannedFor(gpus, "; ".join(filter(None, [note, plain_torch_note(gpus)])))

    def _live_cluster(self, address: str, spec: ModelSpec, kind: DeviceKind) -> PlannedFor:
        """The devices that workers would have there, and what else their boxes hold, as a run there takes them."""
        if self.cluster is not None or self.gpu_type is not None:
            raise BigInt8Error("--address says which devices there are: leave out --cluster and --gpu-type")
        from ..run.nodes import read_cluster_at

        machines = read_cluster_at(address, kind, self.gpus)
        return PlannedFor(list(machines.devices), machines.note, spill_of_boxes(spec))


Flags = TypeVar("Flags")


def command(app: typer.Typer, flags: type[Flags]) -> Callable[[Callable[[Flags], None]], Callable[[Flags], None]]:
    """Register a function as a command of `app`. Its one argument is a `flags` object."""

    def register(function: Callable[[Flags], None]) -> Callable[[Flags], None]:
        def run(**given: Any) -> None:
            function(flags(**given))

        hints, own = get_type_hints(flags, include_extras=True), inspect.get_annotations(flags)
        parameters = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
                annotation=hints[field.name],
            )
            # in the help, a command's own flags stand before those that it shares with others
            for field in sorted(dataclasses.fields(flags), key=lambda field: field.name not in own)  # type: ignore[arg-type]
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = function.__doc__
        app.command()(run)
        return function

    return register


LOG_COLUMNS = 120
"""How wide tables may be where no terminal says it, as in the log of a job."""


def new_console() -> Console:
    """Where commands print: as it is, whatever brackets a path may hold."""
    told = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, markup=False, width=None if told else LOG_COLUMNS)


def new_app() -> typer.Typer:
    """A command line: plain help, no traceback dressed up."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def bytes_of_flag(flag: str, size: str) -> int:
    """A positive number of bytes that a flag names. Raises BigInt8Error, with the flag's name, for anything else."""
    try:
        parsed = parse_bytes(size)
    except ValueError:
        parsed = 0
    if parsed < 1:
        raise BigInt8Error(f"{flag} {size}: write it as 500MB or 5GiB")
    return parsed


def write_json(file: Path | None, result: dict[str, Any]) -> None:
    """Write what --json asks for. Raises BigInt8Error for a file that cannot be written."""
    if file is not None:
        try:
            file.write_text(json.dumps(result, indent=2, default=str) + "\n", encoding="utf-8")
        except OSError as error:
            raise BigInt8Error(f"--json {file}: {error.strerror}") from None


def unwind_on_sigterm() -> None:
    """A plain kill ends the workers too: SystemExit unwinds through the pipeline's context manager."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


PARAMETERS = (
    "address", "batch_size", "checkpoint", "cluster", "context", "device", "dtype", "gpus", "gpu_type", "int8_head",
    "overwrite", "revision", "trust_remote_code",
)  # fmt: skip
"""Parameters that the library's errors write as `name=value` or `name=`, and that the commands have as flags."""


def with_flags(message: str) -> str:
    """An error of the library as the command line says it: with flags in the place of parameters.

    A parameter stands by itself, with a plain value or none. Python code and paths stay as they are.
    """

    def flag(found: re.Match[str]) -> str:
        name, value = found[1].replace("_", "-"), found[2]
        return f"--{name}" if value in ("", "True") else f"--{name} {value}"

    return re.sub(rf"(?<![^\s(])({'|'.join(PARAMETERS)})=([\w.:-]*\w|)(?=[\s,;:.)]|$)", flag, message)


def run_command(app: typer.Typer) -> None:
    """Run a command line; errors of bigint8 are printed without a traceback and exit with 2."""
    unwind_on_sigterm()
    wait_without_spinning()
    try:
        app()
    except BigInt8Error as error:
        if isinstance(error, PlanError) and isinstance(error.ways_out, WaysOut):
            print_ways_out(Console(stderr=True, highlight=False, markup=False), error.ways_out, with_flags)
        print(f"error: {with_flags(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
