"""The plans that a page holds: every point of a small grid of devices, contexts and sequences, made by the planner."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from ..errors import PlanError
from ..options import Workload
from .cut import fewest_devices, make_plan
from .devices import Device, gpu_presets, preset_gpus
from .draft import Objective
from .labels import memory_parts, place, short_model
from .plan import Plan
from .predict import Prediction, predict
from .spec import ModelSpec

SEQUENCES = (1, 4, 16)
CONTEXTS, SHORTEST = 3, 64
"""How many contexts at most, each a quarter of the one before, and the shortest."""

MOST_CONTEXT = 131_072

PARTNERS = ("rtx-3090", "rtx-4090", "rtx-3060")
"""GPUs that are offered beside those a person has, until three kinds mix."""

MIXED_KINDS, MOST_KINDS = 3, 6
"""Of more kinds than the first a person chooses all or none; those after the second stay."""

Bag = tuple[int, ...]
"""How many devices of each kind of a grid."""


@dataclass(frozen=True)
class Offer:
    """A kind of device that a page offers: those that are there, and how many of it one may choose.

    mixes: any of the counts goes with any of the other kinds that mix; the rest is chosen alone
    """

    example: Device
    there: tuple[Device, ...]
    counts: tuple[int, ...]
    mixes: bool


class Grid:
    """All points: `bags` of devices, `contexts` and `sequences`. Plans are made when they are asked for."""

    def __init__(
        self, spec: ModelSpec, devices: Sequence[Device], start: Workload, objective: Objective = "throughput"
    ) -> None:
        """`devices` and `start` are a point of the grid: where a page begins."""
        self.spec, self.start, self.objective = spec, start, objective
        longest = min(spec.max_context or 4 * start.context, MOST_CONTEXT)
        contexts = {longest // 4**i for i in range(CONTEXTS) if longest // 4**i >= SHORTEST}
        self.contexts = sorted(contexts | {start.context})
        self.sequences = sorted({*SEQUENCES, start.sequences})
        self.kinds = [*_mixing(spec, devices), *_alone(spec, devices, start)]

    @cached_property
    def bags(self) -> list[Bag]:
        """Every choice of devices: the product of the kinds that mix, and each count of the others by itself."""
        mixed = product(*(kind.counts if kind.mixes else (0,) for kind in self.kinds))
        most = len(self.spec.known_layout.blocks)
        bags = [bag for bag in mixed if 0 < sum(bag) <= most]
        for i, kind in enumerate(self.kinds):
            if not kind.mixes:
                alone = [tuple(count * (i == j) for j in range(len(self.kinds))) for count in kind.counts if count]
                bags += alone
        start = self.start_bag()
        return bags if start in bags else [start, *bags]

    def start_bag(self) -> Bag:
        """The devices that are there."""
        return tuple(len(kind.there) for kind in self.kinds)

    def devices(self, bag: Bag) -> list[Device]:
        """The devices of a bag: of each kind first those that are there, then more like them in the same box."""
        chosen = [device for kind, count in zip(self.kinds, bag, strict=True) for device in kind.there[:count]]
        taken = {device.name for device in chosen}
        free = (name for name in (f"cuda:{i}" for i in range(sum(bag) + len(taken))) if name not in taken)
        for kind, count in zip(self.kinds, bag, strict=True):
            chosen += [replace(kind.example, name=next(free)) for _ in range(count - len(kind.there))]
        return chosen

    def workloads(self) -> Iterator[Workload]:
        """Each context with each number of sequences."""
        for context, sequences in product(self.contexts, self.sequences):
            yield replace(self.start, context=context, sequences=sequences)

    def plan(self, bag: Bag, workload: Workload) -> Plan:
        """The plan of a point. Raises PlanError where the model does not fit."""
        return make_plan(self.spec, self.devices(bag), workload, self.objective)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON, each stage that plans share once: what the page reads."""
        stages: dict[tuple[Any, ...], int] = {}
        names: dict[str, int] = {}
        points = []
        for bag in self.bags:
            for workload in self.workloads():
                try:
                    plan = self.plan(bag, workload)
                except PlanError as error:
                    points.append({"error": str(error)})
                    continue
                points.append(_point(plan, predict(plan), stages, names))
        return {
            "model": self.spec.name,
            "objective": self.objective,
            "chunk": self.start.chunk,
            "contexts": self.contexts,
            "sequences": self.sequences,
            "kinds": [_kind(kind) for kind in self.kinds],
            "bags": [list(bag) for bag in self.bags],
            "start": [list(self.start_bag()), self.start.context, self.start.sequences],
            "stages": [list(stage) for stage in stages],
            "names": list(names),
            "points": points,
        }


def _alike(device: Device) -> tuple[object, ...]:
    return (device.kind, device.model, device.usable_bytes, device.speed)


def _mixing(spec: ModelSpec, devices: Sequence[Device]) -> list[Offer]:
    """The kinds that are there, and some that often stand beside them."""
    kinds: dict[tuple[object, ...], list[Device]] = {}
    for device in devices:
        kinds.setdefault(_alike(device), []).append(device)
    gpus = all(device.kind == "cuda" for device in devices)
    offers: list[Offer] = []
    for there in kinds.values():
        count = len(there)
        counts = {0, count // 2, count, 2 * count} if len(kinds) == 1 else {0, count // 2, count}
        if len(kinds) > MIXED_KINDS or not gpus:
            counts = {0, count}  # CPUs share one memory: half of them would have it all
        if len(offers) >= MOST_KINDS:
            counts = {count}
        offers.append(Offer(there[0], tuple(there), tuple(sorted(counts)), mixes=gpus))
    models = {device.model for device in devices}
    partners = [name for name in PARTNERS if name in gpu_presets() and gpu_presets()[name].model not in models]
    for name in partners[: max(0, MIXED_KINDS - len(kinds))] if gpus else []:
        most = max(1, len(devices) // len(kinds))
        example = replace(preset_gpus(name, 1)[0], box=devices[0].box)
        offers.append(Offer(example, (), tuple(sorted({0, (most + 1) // 2, most})), mixes=True))
    return offers


def _alone(spec: ModelSpec, devices: Sequence[Device], start: Workload) -> list[Offer]:
    """All other GPUs with a preset: as many as the model needs for the work that a page starts with."""
    mixing = {offer.example.model for offer in _mixing(spec, devices)}
    offers: list[Offer] = []
    for name, preset in gpu_presets().items():
        example = preset_gpus(name, 1)[0]
        if preset.model in mixing:
            continue
        try:
            fewest = fewest_devices(spec, example, start)
        except PlanError:
            continue  # no number of these is enough
        power = 1 << (fewest - 1).bit_length()  # people have 1, 2, 4 or 8
        count = power if power <= len(spec.known_layout.blocks) else fewest
        offers.append(Offer(example, (), (0, count), mixes=False))
    return offers


def _kind(offer: Offer) -> dict[str, Any]:
    device = offer.example
    return {
        "name": short_model(device),
        "usable": device.usable_bytes,
        "there": len(offer.there),
        "speed": device.speed.source,
        "counts": list(offer.counts),
        "mixes": offer.mixes,
    }


def _point(plan: Plan, times: Prediction, stages: dict[tuple[Any, ...], int], names: dict[str, int]) -> dict[str, Any]:
    """A plan as indices into the tables of stages and of devices' names, which it extends, and its figures."""
    rows = []
    for stage, took in zip(plan.stages, times.stages, strict=True):
        seconds = (took.decode_seconds, took.hop_seconds, took.prefill_seconds, took.load_seconds)
        blocks = stage.last_block - stage.first_block
        row = (short_model(stage.device), blocks, *memory_parts(stage).values(), *(_rounded(s) for s in seconds))
        name = place(plan, stage)
        rows.append([stages.setdefault(row, len(stages)), names.setdefault(name, len(names))])
    figures = (times.tokens_per_s, times.token_seconds, times.prompt_seconds, times.load_seconds)
    return {
        "stages": rows,
        "dtype": plan.dtype,
        "groups": times.groups,
        "rows": times.rows,
        "prompt": times.prompt,
        "figures": [_rounded(figure) for figure in figures],
        "notes": list(plan.notes),
    }


def _rounded(value: float) -> float:
    """With six digits."""
    return float(f"{value:.6g}")
