"""One model in one dtype under one workload, as sizes and times, and the ways to cut it. Over plain data, no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from math import ceil, inf
from typing import Literal

from ..options import Workload
from ..units import FLOAT_BYTES, readable
from .devices import Box, Device
from .kinds import TOLERANCE, Boxes, Kind, Pick
from .memory import Workspace, kv_bytes, pages, workspace
from .offload import Spill, file_bytes_per_s, host_bytes_per_s, keep_beside, offloaded_blocks
from .plan import Plan, Stage
from .search import Search
from .spec import ModelSpec
from .speed import Speed
from .streaming import StreamingKind
from .time import Rows, TimeModel, enter_seconds, inside_seconds, network_seconds

Objective = Literal["throughput", "latency"]
"""What a cut is best at: the slowest stage, or the sum of all stages and hops."""


@dataclass(frozen=True)
class _Alike:
    """What devices have in common that a plan does not tell apart."""

    kind: str
    model: str
    usable_bytes: int
    speed: Speed

    @classmethod
    def of(cls, device: Device) -> "_Alike":
        return cls(device.kind, device.model, device.usable_bytes, device.speed)


class _Offer:
    """The devices that a plan may use, by kind, and the boxes, by what they hold and how they are linked."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self.examples = {_Alike.of(device): device for device in reversed(devices)}
        self.kinds = list(dict.fromkeys(_Alike.of(device) for device in devices))
        boxes: dict[Box, list[Device]] = {}
        for device in devices:
            boxes.setdefault(device.box, []).append(device)
        self._alike: dict[tuple[tuple[tuple[int, int], ...], Box], list[list[Device]]] = {}
        for box, there in boxes.items():
            numbers = [self.kinds.index(_Alike.of(device)) for device in there]
            held = tuple((kind, numbers.count(kind)) for kind in sorted(set(numbers)))
            self._alike.setdefault((held, replace(box, name="")), []).append(there)

    def boxes(self, hop_bytes: int) -> list[Boxes]:
        """As the search takes them."""
        return [
            Boxes(held, len(same), inside_seconds(same[0][0]), *2 * (network_seconds(same[0][0], hop_bytes),))
            for (held, _), same in self._alike.items()
        ]

    def devices(self, picks: Sequence[Pick]) -> list[Device]:
        """The devices of what was picked: of those alike, the first that are not taken."""
        boxes = [list(same) for same in self._alike.values()]
        order: list[Device] = []
        there: list[Device] = []
        for pick in picks:
            if pick.opens:
                there = list(boxes[pick.box].pop(0))
            at = next(i for i, device in enumerate(there) if _Alike.of(device) == self.kinds[pick.kind])
            order.append(there.pop(at))
        return order


class Draft:
    """The sizes of one model in one dtype under one workload, and the ways to cut it."""

    def __init__(
        self, spec: ModelSpec, workload: Workload, dtype: str, devices: int, spill: Spill | None = None
    ) -> None:
        """`spill`: what may hold blocks that no device holds, None to leave offloading out."""
        self.spill = spill
        self.spec, self.workload, self.dtype = spec, workload, dtype
        self.layout, self._size = spec.known_layout, FLOAT_BYTES[dtype]
        self._devices, self._workspaces = devices, dict[str, Workspace]()
        self.pages = pages(self.layout, workload, devices)
        kvs = (kv_bytes(self.layout, block, self.pages, self._size) for block in range(len(self.layout.blocks)))
        self._kv = list(kvs)
        self._block_bytes = [
            module.part.weight_bytes(self._size) + kv for module, kv in zip(self.layout.blocks, self._kv, strict=True)
        ]
        self._able = [module.part.int8_values for module in self.layout.blocks]  # bytes that may be offloaded
        # what the first and the last stage have besides their blocks; a stage may be both
        blocks = len(self.layout.blocks)
        self._front_bytes = self.layout.part(0, 0).weight_bytes(self._size)
        self._back_bytes = self.layout.part(blocks, blocks).weight_bytes(self._size)

    def plan(self, cuts: Sequence[int], devices: Sequence[Device]) -> Plan:
        """The plan with these cuts, whether it fits or not."""
        bounds = zip(devices, cuts[:-1], cuts[1:], strict=True)
        stages = tuple(self.stage(i, device, first, last) for i, (device, first, last) in enumerate(bounds))
        if self.spill is not None:
            stages = self._offloaded(stages, self.spill)
        return Plan(self.spec, self.workload, self.dtype, stages, self.pages)

    def workspace(self, device: Device) -> int:
        """Bytes that a stage on the device needs besides; its blocks take more, and what it has at its ends."""
        return self._workspace(device).inner_bytes

    def _workspace(self, device: Device) -> Workspace:
        """On the CPU activations are float32."""
        kind = "cpu" if device.kind in ("cpu", "disk") else "cuda"
        if kind not in self._workspaces:
            on_cpu = kind == "cpu"
            self._workspaces[kind] = workspace(self.layout, self.workload, self._size, on_cpu, self._devices)
        return self._workspaces[kind]

    def stage(self, index: int, device: Device, first: int, last: int) -> Stage:
        """The stage with blocks [first, last)."""
        return Stage(
            index=index,
            device=device,
            first_block=first,
            last_block=last,
            modules=tuple(module.name for module in self.layout.stage(first, last)),
            weight_bytes=self.layout.part(first, last).weight_bytes(self._size),
            kv_bytes=sum(self._kv[first:last]),
            workspace_bytes=self._workspace(device).of(first, last, len(self.layout.blocks)),
        )

    def _offloaded(self, stages: Sequence[Stage], spill: Spill) -> tuple[Stage, ...]:
        """The stages with as few blocks as they must offloaded: from GPUs to the host's memory while there is some."""
        left: dict[Box, list[int]] = {}
        done = []
        for stage in stages:
            box = stage.device.box
            host, disk = left.setdefault(box, [spill.of(box).host_bytes, spill.of(box).disk_bytes])
            sizes = self._able[stage.first_block : stage.last_block]
            chosen = offloaded_blocks(sizes, -stage.headroom_bytes)
            size = sum(sizes[block] for block in chosen or ())
            if chosen and stage.device.kind == "cuda" and size <= host:
                stage = keep_beside(stage, sizes, chosen, "host")
                left[box][0] -= size
            elif chosen and size <= disk:
                stage = keep_beside(stage, sizes, chosen, "disk")
                left[box][1] -= size
            done.append(stage)
        return tuple(done)

    def best_plan(self, devices: Sequence[Device], objective: Objective, spare: float) -> Plan | None:
        """The best plan over some of the devices that leaves a share of each free, None if there is none.

        A head that is tied to the embeddings lives with them in the first stage, or in the last one as a copy, if that
        is better by the objective or the model does not fit otherwise.
        """
        found = self._best_plan(devices, objective, spare)
        copied = self.spec.with_copied_head() if len(devices) > 1 else None
        if copied is None:
            return None if found is None else found[1]
        draft = Draft(copied, self.workload, self.dtype, self._devices, self.spill)
        if found is None and all(draft._front(device) >= self._front(device) for device in devices):
            return None  # no stage needs less with a copy
        better = draft._best_plan(devices, objective, spare, inf if found is None else found[0])
        if better is None:
            return None if found is None else found[1]
        plan = better[1]
        return replace(plan, notes=(_copy_note(plan, None if found is None else objective),))

    def _best_plan(
        self, devices: Sequence[Device], objective: Objective, spare: float, below: float = inf
    ) -> tuple[float, Plan] | None:
        """The plan, where the head is as the layout has it, and what it takes by the objective: less than `below`."""
        rows = Rows(decode=ceil(self.workload.sequences / len(devices)), context=self.workload.context)
        if self.spill is None and not self._has_room(devices, spare):
            return None
        offer, times = _Offer(devices), TimeModel(self.layout, self._size)
        kinds: Sequence[Kind] = [self._kind(offer.examples[kind], times, rows, spare) for kind in offer.kinds]
        if self.spill is not None:
            kinds = self._streaming(kinds, [offer.examples[kind] for kind in offer.kinds], devices)
        search = Search(kinds, offer.boxes(times.hop_bytes(rows)), ring=self.layout.tied)
        found = search.fastest_stages(below) if objective == "throughput" else search.shortest_way(below)
        if found is None:
            return None
        seconds, picks = found
        order = offer.devices(picks)
        cuts = [*(pick.first for pick in picks), picks[-1].last]
        if objective == "throughput":
            most = seconds * (1 + TOLERANCE)
            costs = [kinds[pick.kind] for pick in picks]
            emptiest = self.emptiest_cut(
                order,
                lambda i, first, last: costs[i].fits(first, last) and costs[i].stage_seconds(first, last) <= most,
            )
            cuts = emptiest or cuts
        plan = Draft(self.spec, self.workload, self.dtype, len(order), self.spill).plan(cuts, order)
        fits = self.spill is None or all(stage.headroom_bytes >= 0 for stage in plan.stages)
        return (seconds, plan) if fits else None

    def _front(self, device: Device) -> int:
        """Bytes that the first stage takes besides its blocks."""
        return self._front_bytes + self._workspace(device).front_bytes

    def _has_room(self, devices: Sequence[Device], spare: float) -> bool:
        """Whether the devices together have as much as the model takes: if not, there is no cut to search for."""
        needed = sum(self._block_bytes) + self._front_bytes + self._back_bytes
        for device in devices:
            room = self._workspace(device)
            least = room.inner_bytes - room.received - room.sent  # of a stage alone
            needed -= max(0, int(device.usable_bytes * (1 - spare)) - least)
        return needed <= 0

    def _kind(self, device: Device, times: TimeModel, rows: Rows, spare: float) -> Kind:
        """A device as costs."""
        room = self._workspace(device)
        head, hop = times.head_seconds(device.speed, rows), enter_seconds(device, times.hop_bytes(rows))
        return Kind(
            seconds=times.blocks_seconds(device.speed, rows),
            bytes=tuple(size + room.block_bytes for size in self._block_bytes),
            capacity=int(device.usable_bytes * (1 - spare)) - room.inner_bytes,
            front=head if self.layout.tied else 0.0,
            back=0.0 if self.layout.tied else head,
            front_bytes=self._front(device),
            back_bytes=self._back_bytes + room.back_bytes,
            enter=hop,
            leave=hop,
        )

    def _streaming(
        self, kinds: Sequence[Kind], examples: Sequence[Device], devices: Sequence[Device]
    ) -> list[StreamingKind]:
        """The same costs where blocks that do not fit are brought in: from the host's memory if all of them find room
        there, else from the disk, which the devices of a box share."""
        assert self.spill is not None
        missing = sum(self._block_bytes) + self._front_bytes + self._back_bytes
        missing -= sum(max(0, device.usable_bytes - self.workspace(device)) for device in devices)
        hosts = {device.box: self.spill.of(device.box).host_bytes for device in devices}
        found = []
        for kind, device in zip(kinds, examples, strict=True):
            sharing = sum(other.box == device.box for other in devices)
            in_host = device.kind == "cuda" and sum(hosts.values()) >= missing
            rate = host_bytes_per_s(device) if in_host else file_bytes_per_s(device, missing, sharing)
            overlaps = device.kind == "cuda"
            costs = {field.name: getattr(kind, field.name) for field in fields(kind)}
            found.append(StreamingKind(**costs, able=tuple(self._able), second_per_byte=1 / rate, overlaps=overlaps))
        return found

    def emptiest_cut(
        self, devices: Sequence[Device], allowed: Callable[[int, int, int], bool] = lambda *_: True
    ) -> list[int]:
        """Block indices where the stages begin, and the end: dynamic programming over (device, blocks placed).

        Minimises the largest share of a device's memory that its stage fills, over all devices in this order.
        `allowed(i, first, last)`: whether the device may have that stage; if not, it may have no longer one either,
        unless blocks are offloaded: a stage of one block may have no room for two buffers where one of three has.
        Empty if no cut is allowed. A stage that is not the first fills no less with more blocks, so none is tried that
        is longer than one which already fills as much as the best cut.
        """
        blocks, count = len(self.layout.blocks), len(devices)
        best = [[inf] * (blocks + 1) for _ in range(count + 1)]
        came_from = [[0] * (blocks + 1) for _ in range(count + 1)]
        best[0][0] = 0.0
        for d, device in enumerate(devices, start=1):
            room, usable = self._workspace(device), max(1, device.usable_bytes)
            below = [0, *accumulate(size + room.block_bytes for size in self._block_bytes)]
            front = self._front_bytes + room.front_bytes if d == 1 else 0
            for last in range(d, blocks - (count - d) + 1):
                used = below[last] + room.inner_bytes + front
                used += self._back_bytes + room.back_bytes if last == blocks else 0
                for first in range(last - 1, d - 2, -1) if d > 1 else (0,):
                    share = (used - below[first]) / usable
                    if share >= best[d][last]:
                        break
                    if not allowed(d - 1, first, last):
                        if self.spill is None:
                            break
                        continue
                    worst = max(best[d - 1][first], share)
                    if worst < best[d][last]:
                        best[d][last], came_from[d][last] = worst, first
        if best[count][blocks] == inf:
            return []
        cuts = [blocks]
        for d in range(count, 0, -1):
            cuts.append(came_from[d][cuts[-1]])
        return cuts[::-1]

    def fill(self, devices: Sequence[Device]) -> list[Stage] | None:
        """Stages that fill each device before the next, on the fewest of equal devices. None if it does not fit."""
        blocks, at = len(self.layout.blocks), 0
        stages: list[Stage] = []
        for device in devices:
            best = None
            for last in range(at + 1, blocks + 1):
                stage = self.stage(len(stages), device, at, last)
                if stage.headroom_bytes < 0:
                    break
                best = stage
            if best is not None:
                stages.append(best)
                at = best.last_block
            if at == blocks:
                return stages
        return None


def _copy_note(plan: Plan, objective: Objective | None) -> str:
    """Why the output head is a copy. `objective`: by which that is better, None where nothing else fits."""
    reasons = {
        "throughput": "with the head in the first stage, the slowest stage would be slower",
        "latency": "so a step need not go back to the first stage",
        None: "with the head in the first stage, the model would not fit, or only barely",
    }
    size = readable(plan.copied_head_bytes)
    return f"the output head is a copy of the embeddings in the last stage ({size}): {reasons[objective]}"
