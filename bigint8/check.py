"""A dry run of a load: read every byte as loading would, check and quantize it, and throw the result away.

python -m bigint8.check CHECKPOINT [--gpus N]
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from .checkpoint import open_checkpoint
from .command import DEFAULT_CONTEXT, DtypeChoice, devices_to_plan_for, run_command, write_json
from .config import Int8Config
from .errors import PlanError
from .families import FAMILIES, layout_of
from .hardware import pick_dtype
from .loader import checkpoint_skeleton, peak_host_bytes, read_hf_config, transfer_stream
from .planner import Plan, make_plan
from .progress import LoadProgress
from .report import print_plan
from .sources import Source, find_source
from .transfer import convert, match_tensors, stored_dtype, unused_tensors


@dataclass(frozen=True)
class CheckReport:
    """What was read, and how: `first_rss_bytes` when reading began, `most_rss_bytes` at any time while it went on.

    `int8_bytes` and `other_bytes` are what the loaded model takes, in all.
    """

    tensors: int
    shards: int
    bytes_read: int
    seconds: float
    int8_bytes: int
    other_bytes: int
    first_rss_bytes: int
    most_rss_bytes: int
    peak_host_bytes: int
    unused: list[str]


def check(
    folder: Path, config: Int8Config, dtype: str, progress: bool = True, trust_remote_code: bool = False
) -> CheckReport:
    """Read and quantize a whole checkpoint, keeping nothing. Raises what `load_sharded_int8` raises."""
    checkpoint = open_checkpoint(folder, trust_remote_code)
    hf_config = read_hf_config(checkpoint, trust_remote_code)
    skeleton = checkpoint_skeleton(checkpoint, hf_config, config, dtype, trust_remote_code)
    transfers = match_tensors(skeleton.slots, checkpoint, skeleton.tensors)
    by_tensor = {transfer.tensor.name: transfer for transfer in transfers}
    total = sum(transfer.tensor.nbytes for transfer in transfers)
    stream = transfer_stream(transfers, 0)
    process = psutil.Process()
    resident = [process.memory_info().rss]
    started = time.perf_counter()
    with LoadProgress([str(folder)], enabled=progress) as bars:

        def on_progress(done: int) -> None:
            resident.append(process.memory_info().rss)
            bars.update(0, done, total)

        stream.run(
            lambda chunk: convert(by_tensor[chunk.tensor.name], chunk, by_tensor[chunk.tensor.name].slot.dtype),
            on_progress,
        )
    slots = skeleton.slots.values()
    return CheckReport(
        tensors=len(transfers),
        shards=len({transfer.tensor.file for transfer in transfers}),
        bytes_read=stream.bytes_read,
        seconds=time.perf_counter() - started,
        int8_bytes=sum(slot.nbytes for slot in slots if slot.is_int8),
        other_bytes=sum(slot.nbytes for slot in slots if not slot.is_int8),
        first_rss_bytes=resident[0],
        most_rss_bytes=max(resident),
        peak_host_bytes=peak_host_bytes(),
        unused=unused_tensors(skeleton),
    )


def plan_stages(
    source: Source,
    stored: str,
    gpus: int | None,
    gpu_type: str | None,
    context: int | None,
    batch_size: int,
    int8_head: bool,
) -> tuple[Plan | None, str]:
    """The plan that this checkpoint is meant for, and a note about it; no plan where none is possible, with why.

    `stored` is the dtype that its tensors are stored in.
    """
    config = source.config(trust_remote_code=True)
    if all(config["model_type"] not in family.model_types for family in FAMILIES):
        return None, f"model type {config['model_type']!r} cannot be cut into stages: it loads in one process only"
    layout = layout_of(config, int8_head, stored)
    context = context or min(DEFAULT_CONTEXT, layout.max_context or DEFAULT_CONTEXT)
    try:
        devices, note = devices_to_plan_for(layout, source, gpus, "auto", gpu_type, "auto", context, batch_size)
        dtype = pick_dtype("auto", stored, devices)
        return make_plan(source.name, layout, devices, dtype, context, batch_size), note or ""
    except PlanError as error:
        return None, f"no plan: {error}"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def command(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder, a preset or a hub id.")],
    gpus: Annotated[int | None, typer.Option(min=1, help="Show the stages for so many GPUs.")] = None,
    gpu_type: Annotated[str | None, typer.Option(help="GPUs to plan for, as in configs/gpus.yaml.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence to plan for (2048).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once to plan for.")] = 1,
    int8_head: Annotated[bool, typer.Option("--int8-head", help="The output head in int8 too.")] = False,
    dtype: Annotated[DtypeChoice, typer.Option(help="Of what is not int8: as stored, if auto.")] = DtypeChoice.auto,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write plan and report here.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")
    ] = False,
) -> None:
    """Read and quantize a whole checkpoint without keeping anything: what can go wrong, before it costs anything."""
    console = Console(highlight=False)
    source = find_source(checkpoint, revision=revision)
    if source.folder is None:
        raise source.not_found()
    stored = stored_dtype(open_checkpoint(source.folder, trust_remote_code))
    plan, note = plan_stages(source, stored, gpus, gpu_type, context, batch_size, int8_head)
    if plan is not None:
        print_plan(console, plan)
    if note:
        console.print(note, soft_wrap=True)
    chosen = stored if dtype is DtypeChoice.auto else dtype.value
    report = check(source.folder, Int8Config(int8_head=int8_head), chosen, True, trust_remote_code)
    _print_report(console, source.name, report)
    write_json(json_file, {"plan": plan.to_dict() if plan else None, "check": asdict(report)})
    if plan is None and gpus is not None:
        raise PlanError(f"the checkpoint is good, but {note}")


def _print_report(console: Console, name: str, report: CheckReport) -> None:
    speed = report.bytes_read / 1e9 / max(report.seconds, 1e-9)
    console.print(
        f"{name}: {report.tensors} tensors in {report.shards} shard{'s' * (report.shards > 1)} are whole, finite and "
        "of the right shape.\n"
        f"{report.bytes_read / 1e9:.2f} GB read in {report.seconds:.1f} s, {speed:.2f} GB/s. Loaded, the model takes "
        f"{report.int8_bytes / 1e9:.2f} GB in int8 and {report.other_bytes / 1e9:.2f} GB besides.\n"
        f"Memory of this process: {report.first_rss_bytes / 1e9:.2f} GB when reading began, "
        f"{report.most_rss_bytes / 1e9:.2f} GB at most while reading, {report.peak_host_bytes / 1e9:.2f} GB in all.",
        soft_wrap=True,
    )
    if report.unused:
        more = f" and {len(report.unused) - 5} more" if len(report.unused) > 5 else ""
        console.print(f"not used by the model: {', '.join(report.unused[:5])}{more}", soft_wrap=True)


if __name__ == "__main__":
    run_command(app)
