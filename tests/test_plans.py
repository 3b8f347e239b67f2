"""Plans of random models over random devices: within memory, never worse with more of anything, devices in order."""

import itertools
import random
from dataclasses import replace

import pytest
from test_planner import spec_with

from bigint8.errors import PlanError
from bigint8.options import Workload
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import Box, Device
from bigint8.plan.predict import PlanTimes
from bigint8.plan.speed import gpu_speed
from bigint8.plan.time import hop_seconds

INSTANCES = 10_000
PARTS = 8
WORK = Workload(context=64)
LEFT, RIGHT = Box("left"), Box("right", network_bytes_per_s=1.2e9, network_seconds=2e-4)


def random_spec(chance):
    sizes = [chance.choice((1, 2, 3, 5)) * 10**8 for _ in range(chance.randint(1, 9))]
    return spec_with(sizes, chance.choice((0, 10**8)), chance.choice((0, 3 * 10**8)))


def random_devices(chance, most=4):
    kinds = [
        (
            f"kind {i}",
            chance.choice((3, 6, 12)) * 10**8 + 2**28,
            gpu_speed(chance.choice((2e11, 9e11)), 1e14, 5e13, 2e10),
        )
        for i in range(2)
    ]
    devices = []
    for i in range(chance.randint(1, most)):
        model, usable, speed = chance.choice(kinds)
        devices.append(Device(f"cuda:{i}", model, usable, "float16", speed, chance.choice((LEFT, RIGHT))))
    return devices


def planned(spec, devices, objective="throughput"):
    try:
        return make_plan(spec, devices[: len(spec.layout.blocks)], WORK, objective)
    except PlanError:
        return None


def slowest(plan):
    return max(PlanTimes(plan).decode(1, WORK.context).stages) if plan else float("inf")


def way(plan):
    """All stages and the hops between them, and to the head if it is in the first one."""
    if plan is None:
        return float("inf")
    devices, times = [stage.device for stage in plan.stages], PlanTimes(plan)
    devices += devices[:1] if times.is_ring else []
    hops = sum(hop_seconds(a, b, 2) for a, b in itertools.pairwise(devices))
    return sum(times.decode(1, WORK.context).stages) + hops


@pytest.mark.parametrize("part", range(PARTS))
def test_no_plan_takes_more_than_a_device_has(part):
    fit = 0
    for seed in range(part, INSTANCES, PARTS):
        chance = random.Random(seed)
        spec, devices = random_spec(chance), random_devices(chance)
        plan = planned(spec, devices, chance.choice(("throughput", "latency")))
        if plan is None:
            continue
        fit += 1
        assert all(stage.headroom_bytes >= 0 for stage in plan.stages), seed
        assert plan.stages[0].first_block == 0 and plan.stages[-1].last_block == len(spec.layout.blocks)
        assert all(a.last_block == b.first_block for a, b in zip(plan.stages[:-1], plan.stages[1:], strict=True))
        names = [stage.device.name for stage in plan.stages]
        assert len(set(names)) == len(names)
        boxes = [stage.device.box.name for stage in plan.stages]
        assert sum(a != b for a, b in zip([None, *boxes], boxes, strict=False)) == len(set(boxes)), seed
    assert fit > INSTANCES / PARTS / 3


@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_more_memory_bandwidth_or_devices_never_give_a_worse_plan(objective):
    cost = slowest if objective == "throughput" else way
    for seed in range(300):
        chance = random.Random(seed)
        spec, devices = random_spec(chance), random_devices(chance)
        before = cost(planned(spec, devices, objective))
        i = chance.randrange(len(devices))
        one = devices[i]
        faster = replace(one.speed, read_bytes_per_s=2 * one.speed.read_bytes_per_s)
        for better in (replace(one, usable_bytes=2 * one.usable_bytes), replace(one, speed=faster)):
            changed = [*devices[:i], better, *devices[i + 1 :]]
            assert cost(planned(spec, changed, objective)) <= before * (1 + 1e-9), seed
        more = [*devices, replace(random_devices(chance, 1)[0], name="cuda:9")]
        assert cost(planned(spec, more, objective)) <= before * (1 + 1e-9), seed


def test_the_way_with_least_time_stays_on_the_fastest_device_where_it_can():
    fast, slow = gpu_speed(1e12, 1e14, 5e13, 2e10), gpu_speed(5e11, 1e14, 5e13, 2e10)
    devices = [
        Device("cuda:0", "slow", 2**34, "float16", slow),
        Device("cuda:1", "fast", 2**32, "float16", fast),
        Device("cuda:2", "fast", 2**32, "float16", fast),
    ]
    spec = spec_with([10**9] * 7)
    assert {stage.device.model for stage in make_plan(spec, devices, WORK, "latency").stages} == {"fast"}
    assert len(make_plan(spec, devices, WORK, "throughput").stages) == 3
