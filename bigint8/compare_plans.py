"""The plan for a model beside what accelerate's planner answers for the same model and devices.

Theirs is what transformers does for `device_map="auto"` with 8-bit layers of bitsandbytes: accelerate's
`get_balanced_memory`, of which the quantizer takes nine tenths, then `infer_auto_device_map`, over the model on the
meta device. Its linear layers except the head count a byte a weight. Both cuts are then weighed by one memory model and
one time model, ours.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .errors import PlanError
from .families.layout import Module
from .options import Workload
from .plan.cut import make_plan
from .plan.devices import SLACK_BYTES, Device, pick_dtype
from .plan.memory import kv_bytes, pages, workspace_bytes
from .plan.plan import DeviceMap
from .plan.spec import ModelSpec
from .plan.time import DRIVER_SECONDS, Rows, TimeModel, hop_seconds
from .terminal.tables import new_table
from .units import FLOAT_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

QUANTIZER_SHARE = 0.9
"""Of each device's memory, what transformers lets 8-bit models of bitsandbytes use (`Bnb8BitHfQuantizer`)."""

HOST_BYTES = 2**42
"""Host memory that accelerate may spill to: all of it goes there, and nothing to disk."""


@dataclass(frozen=True)
class Cut:
    """How a model lies on devices, by the memory model and the time model.

    blocks: on each device that was offered, 0 for one that is not used; devices: how many are
    spilled: modules that no GPU has; fullest: the largest share of a device's memory that its weights, keys and values
        and workspace take, more than 1 where they do not fit
    slowest_seconds: of the slowest stage in a step of one sequence at full context; tokens_per_s: of that sequence
        alone; both None where modules are spilled
    """

    blocks: tuple[int, ...]
    devices: int
    spilled: tuple[str, ...]
    fullest: float
    slowest_seconds: float | None
    tokens_per_s: float | None


@dataclass(frozen=True)
class Compared:
    """One model on some devices: accelerate's cut, and ours, None where the model does not fit."""

    model: str
    devices: str
    workload: Workload
    theirs: Cut
    ours: Cut | None


def compare(spec: ModelSpec, devices: Sequence[Device], workload: Workload) -> Compared:
    """Both cuts of a model of a known family over GPUs. Raises PlanError for work that the model cannot do."""
    names = [device.model.removeprefix("NVIDIA ").removeprefix("GeForce ") for device in devices]
    counted = " + ".join(f"{len(list(same))} x {name}" for name, same in groupby(names))
    return Compared(spec.name, counted, workload, their_cut(spec, devices, workload), our_cut(spec, devices, workload))


def our_cut(spec: ModelSpec, devices: Sequence[Device], workload: Workload) -> Cut | None:
    """The plan as a cut, None where the model does not fit."""
    try:
        plan = make_plan(spec, devices, workload)
    except PlanError as error:
        if error.ways_out is None:
            raise
        return None
    held = [(stage.device, stage.modules) for stage in plan.stages]
    return _weighed(plan.spec, plan.workload, plan.dtype, devices, held)


def their_cut(spec: ModelSpec, devices: Sequence[Device], workload: Workload) -> Cut:
    """What accelerate answers."""
    named = DeviceMap({name: str(where) for name, where in accelerate_map(spec, devices).items()})
    layout = spec.known_layout
    modules = [*layout.first, *layout.blocks, *layout.last, layout.head]
    held: list[tuple[Device, list[str]]] = [(device, []) for device in devices]
    for module in modules:
        where = named[module.name]
        if where.isdigit():
            held[int(where)][1].append(module.name)
    dtype = pick_dtype(spec.int8.dtype, spec.stored, list(devices))
    return _weighed(spec, workload, dtype, devices, [(device, names) for device, names in held if names])


def accelerate_map(spec: ModelSpec, devices: Sequence[Device]) -> dict[str, int | str]:
    """accelerate's device map: GPUs by number, "cpu" for what it spills. It is not told of keys and values."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    dtype = pick_dtype(spec.int8.dtype, spec.stored, list(devices))
    model, int8 = _meta_model(spec.name, tuple(_flat(spec.config)), dtype)
    free: dict[int | str, int | str] = {i: device.usable_bytes + SLACK_BYTES for i, device in enumerate(devices)}
    free["cpu"] = HOST_BYTES
    asked = {"no_split_module_classes": sorted(model._no_split_modules or ()), "special_dtypes": int8}
    with _quiet():
        balanced = get_balanced_memory(model, max_memory=free, **asked)
        reduced = {name: int(QUANTIZER_SHARE * size) for name, size in balanced.items()}
        return dict(infer_auto_device_map(model, max_memory=reduced, **asked))


def _flat(config: Mapping[str, Any]) -> "Iterator[tuple[str, Any]]":
    """A config as what a cache can take as its key."""
    for name, value in config.items():
        yield name, tuple(value) if isinstance(value, list) else value


@lru_cache(maxsize=2)
def _meta_model(name: str, config: tuple[tuple[str, Any], ...], dtype: str) -> tuple[Any, dict[str, Any]]:
    """A transformers model on the meta device, which takes seconds for a large one, and its int8 weights by name."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    del name  # of the error's reader, and part of the cache's key
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in config}
    hf_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, dtype))
    model.tie_weights()
    head = model.get_output_embeddings()
    linears = ((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head)
    return model, {f"{module_name}.weight": torch.int8 for module_name, _ in linears}


@contextmanager
def _quiet() -> "Iterator[None]":
    """accelerate warns of each GPU that this machine does not have."""
    import logging

    logger = logging.getLogger("accelerate.utils.modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- one memory model and one time model for both ---


def _weighed(
    spec: ModelSpec,
    workload: Workload,
    dtype: str,
    devices: Sequence[Device],
    held: Sequence[tuple[Device, Sequence[str]]],
) -> Cut:
    """The cut that gives devices these modules, in the order in which a token meets them."""
    layout, size = spec.known_layout, FLOAT_BYTES[dtype]
    times, rows = TimeModel(layout, size), Rows(decode=1, context=workload.context)
    by_name: dict[str, Module] = {m.name: m for m in (*layout.first, *layout.blocks, *layout.last, layout.head)}
    numbers = {module.name: i for i, module in enumerate(layout.blocks)}
    room = pages(layout, workload, max(1, len(held)))
    blocks, fullest, seconds = dict.fromkeys(devices, 0), 0.0, []
    for device, names in held:
        mine = [numbers[name] for name in names if name in numbers]
        used = sum(by_name[name].part.weight_bytes(size) for name in names)
        used += sum(kv_bytes(layout, block, room, size) for block in mine) + workspace_bytes(layout, workload, size)
        blocks[device], fullest = len(mine), max(fullest, used / device.usable_bytes)
        stage = sum(times.block_seconds(block, device.speed, rows) for block in mine)
        seconds.append(stage + (times.head_seconds(device.speed, rows) if layout.head.name in names else 0.0))
    there = {name for _, names in held for name in names}
    spilled = tuple(name for name in by_name if name not in there)
    order = [device for device, _ in held]
    if spec.tied and len(order) > 1:
        order.append(order[0])
    hops = sum(hop_seconds(a, b, times.hop_bytes(rows)) for a, b in pairwise(order))
    whole = sum(seconds) + hops + (DRIVER_SECONDS if len(held) > 1 else 0.0)
    return Cut(
        blocks=tuple(blocks.values()),
        devices=len(held),
        spilled=spilled,
        fullest=fullest,
        slowest_seconds=None if spilled else max(seconds),
        tokens_per_s=None if spilled else 1 / whole,
    )


# --- for people ---

COLUMNS = ("blocks", "spilled", "fullest", "slowest, ms", "tokens/s")


def print_compared(console: Console, cases: Sequence[Compared]) -> None:
    """A table of all cases; two rows a case."""
    table = new_table("accelerate's cut and ours; times and memory by one model, computed")
    for column in ("model", "devices", "planner", *COLUMNS):
        table.add_column(column, justify="left" if column in ("model", "devices", "planner", "blocks") else "right")
    for case in cases:
        table.add_row(case.model, case.devices, "accelerate", *cells(case.theirs))
        table.add_row("", "", "bigint8", *cells(case.ours), end_section=True)
    console.print(table)


def markdown(cases: Sequence[Compared]) -> str:
    """The same as a table in markdown: a row a case, theirs / ours."""
    lines = [f"| model | devices | {' | '.join(COLUMNS)} |", f"| {' | '.join(['---'] * (2 + len(COLUMNS)))} |"]
    for case in cases:
        both = (f"{a} / {b}" for a, b in zip(cells(case.theirs), cells(case.ours), strict=True))
        lines.append(f"| {case.model} | {case.devices} | {' | '.join(both)} |")
    return "\n".join(lines) + "\n"


def cells(cut: Cut | None) -> tuple[str, ...]:
    """A cut as the cells of a table."""
    if cut is None:
        return ("does not fit", *["-"] * (len(COLUMNS) - 1))
    runs = [(number, len(list(same))) for number, same in groupby(cut.blocks)]
    return (
        ", ".join(f"{times} x {number}" if times > 1 else f"{number}" for number, times in runs),
        str(len(cut.spilled)),
        f"{100 * cut.fullest:.0f} %",
        "-" if cut.slowest_seconds is None else f"{1e3 * cut.slowest_seconds:.2f}",
        "-" if cut.tokens_per_s is None else f"{cut.tokens_per_s:.1f}",
    )
