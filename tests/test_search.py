"""The exact search against all pipelines there are."""

import random
from dataclasses import fields, replace
from itertools import combinations, pairwise, permutations

import pytest

from bigint8.plan.kinds import Boxes, Kind
from bigint8.plan.search import Search
from bigint8.plan.shortest import ShortestWay
from bigint8.plan.streaming import StreamingKind

INSTANCES = 500
"""Of each sort of devices, for both searches."""


def random_instance(chance, ring=False):
    """Kinds of devices in one or two boxes: at most four devices, nine blocks of unlike sizes."""
    blocks = chance.randint(1, 9)
    sizes = [chance.choice((1, 2, 3, 5, 8)) for _ in range(blocks)]
    kinds = []
    for _ in range(chance.randint(1, 3)):
        speed = chance.choice((1.0, 0.5, 2.5))
        kinds.append(
            Kind(
                seconds=tuple(size / speed + 0.1 for size in sizes),
                bytes=tuple(size * 10 for size in sizes),
                capacity=chance.choice((30, 60, 120, 200, 400)),
                front=chance.choice((0.0, 0.7)),
                back=chance.choice((0.0, 1.3, 4.0)) / speed,
                front_bytes=chance.choice((0, 15)),
                back_bytes=chance.choice((0, 25)),
                enter=chance.choice((0.0, 0.2, 3.0)),
                leave=chance.choice((0.0, 0.1)),
            )
        )
    devices = chance.randint(1, 4)
    places = [(chance.randrange(2), chance.randrange(len(kinds))) for _ in range(devices)]
    boxes = []
    for box in sorted({box for box, _ in places}):
        there = [kind for where, kind in places if where == box]
        counts = tuple((kind, there.count(kind)) for kind in sorted(set(there)))
        hop, enter = chance.choice((0.0, 0.3)), chance.choice((0.0, 0.5, 6.0))
        boxes.append(Boxes(counts, 1, hop=hop, enter=enter, leave=chance.choice((0.0, 0.4))))
    return Search(kinds, boxes, ring)


def streamed(kind, second_per_byte, overlaps=True):
    """The kind, where nine tenths of each block may be brought in."""
    costs = {field.name: getattr(kind, field.name) for field in fields(Kind)}
    able = tuple(int(0.9 * size) for size in kind.bytes)
    return StreamingKind(**costs, able=able, second_per_byte=second_per_byte, overlaps=overlaps)


def streaming_instance(chance, ring=False):
    """As `random_instance`, on devices that may bring in most of each block."""
    search, kinds = random_instance(chance, ring), []
    for kind in search.kinds:
        smaller = replace(kind, capacity=chance.choice((20, 30, 60, 120)))
        kinds.append(streamed(smaller, chance.choice((0.0, 0.02, 0.5)), chance.random() < 0.5))
    return Search(kinds, search.boxes, ring)


def all_pipelines(search, ring=False):
    """Every order of every choice of devices that goes through a box once, with every cut: slowest, sum, devices."""
    devices = [
        (box, kind)
        for box, held in enumerate(search.boxes)
        for kind, number in held.devices
        for _ in range(number * held.boxes)
    ]
    for number in range(1, min(len(devices), search.blocks) + 1):
        for order in set(permutations(devices, number)):
            boxes = [box for box, _ in order]
            if len(set(boxes)) != sum(a != b for a, b in zip([None, *boxes], boxes, strict=False)):
                continue
            hops = [0.0]
            for (box, kind), (there, other) in pairwise([*order, order[0]] if ring and number > 1 else order):
                seconds = search.kinds[kind].leave + search.kinds[other].enter
                between = search.boxes[box].leave + search.boxes[there].enter
                hops.append(seconds + (search.boxes[box].hop if box == there else between))
            for cuts in combinations(range(1, search.blocks), number - 1):
                bounds = [0, *cuts, search.blocks]
                stages = [
                    (search.kinds[kind], a, b) for (_, kind), a, b in zip(order, bounds[:-1], bounds[1:], strict=True)
                ]
                if all(kind.fits(a, b) for kind, a, b in stages):
                    times = [kind.stage_seconds(a, b) for kind, a, b in stages]
                    yield max(times), sum(times) + sum(hops), number


def hop_seconds(search, before, after):
    """From one pick to the next."""
    there, here = search.boxes[before.box], search.boxes[after.box]
    between = there.leave + here.enter if after.opens else here.hop
    return search.kinds[before.kind].leave + between + search.kinds[after.kind].enter


def check_picks(search, picks, ring=False):
    """The stages follow each other, fit, and use no device twice. The seconds of the slowest, and of all with hops."""
    assert picks[0].first == 0 and picks[-1].last == search.blocks
    assert all(a.last == b.first for a, b in pairwise(picks))
    assert all(search.kinds[pick.kind].fits(pick.first, pick.last) for pick in picks)
    for index, box in enumerate(search.boxes):
        assert sum(pick.opens for pick in picks if pick.box == index) <= box.boxes
        for kind, number in box.devices:
            assert sum(pick.box == index and pick.kind == kind for pick in picks) <= number * box.boxes
    assert picks[0].opens and all(b.opens for a, b in pairwise(picks) if a.box != b.box)
    times = [search.kinds[pick.kind].stage_seconds(pick.first, pick.last) for pick in picks]
    hops = sum(hop_seconds(search, a, b) for a, b in pairwise(picks))
    if ring and len(picks) > 1:
        boxes = sum(pick.opens for pick in picks)
        hops += hop_seconds(search, picks[-1], replace(picks[0], opens=boxes > 1))
    return max(times), sum(times) + hops


def check_against_all_pipelines(search, seed, ring):
    """Both searches find what is best of everything, or nothing where there is nothing."""
    everything = list(all_pipelines(search, ring))
    fastest, shortest = search.fastest_stages(), search.shortest_way()
    if not everything:
        assert fastest is None and shortest is None, seed
        return
    slowest, picks = fastest
    assert slowest == pytest.approx(check_picks(search, picks, ring)[0]), seed
    least = min(time for time, _, _ in everything)
    assert slowest == pytest.approx(least), seed
    assert len(picks) == min(number for time, _, number in everything if time <= least * (1 + 1e-9)), seed
    seconds, picks = shortest
    assert seconds == pytest.approx(check_picks(search, picks, ring)[1]), seed
    assert seconds == pytest.approx(min(total for _, total, _ in everything)), seed


@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("ring", [False, True], ids=["one way", "ring"])
def test_no_pipeline_has_a_faster_slowest_stage_or_takes_less_time_in_all(part, ring):
    for seed in range(part * INSTANCES // 10, (part + 1) * INSTANCES // 10):
        check_against_all_pipelines(random_instance(random.Random(seed), ring), seed, ring)


@pytest.mark.parametrize("way", ["fastest_stages", "shortest_way"])
def test_a_search_below_some_seconds_finds_what_takes_less_and_nothing_else(way):
    found_something = 0
    for seed in range(100):
        search = random_instance(random.Random(20_000 + seed))
        found = getattr(search, way)()
        if found is None:
            continue
        found_something += 1
        assert getattr(search, way)(found[0]) is None, "as fast is not less"
        again = getattr(search, way)(found[0] * 1.001)
        assert again is not None and again[0] == pytest.approx(found[0]), seed
    assert found_something > 50


@pytest.mark.parametrize("part", range(10))
def test_nor_has_one_of_devices_that_bring_blocks_in(part):
    for seed in range(part * INSTANCES // 10, (part + 1) * INSTANCES // 10):
        ring = seed % 2 == 0
        check_against_all_pipelines(streaming_instance(random.Random(seed), ring), seed, ring)


def large_instance(streaming):
    """Blocks of two sizes on 24 GPUs of three kinds in three boxes."""
    sizes, kinds = [10**9 if block % 3 else 6 * 10**8 for block in range(96)], []
    for capacity, speed, bus in ((3.5e9, 7e11, 1.3e10), (4.5e9, 2.8e11, 1.2e10), (4e9, 8e11, 2.5e10)):
        costs = {"seconds": tuple(size / speed for size in sizes), "bytes": tuple(sizes), "enter": 1e-6, "leave": 1e-6}
        kind = Kind(**costs, capacity=int(capacity if streaming else 2 * capacity), back=3e8 / speed)
        kinds.append(streamed(kind, 1 / bus) if streaming else kind)
    held = (((0, 4), (1, 4)), ((1, 4), (2, 4)), ((0, 4), (2, 4)))
    return Search(kinds, [Boxes(devices, hop=1e-4, enter=3e-4, leave=3e-4) for devices in held])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_large_instance_visits_few_places(streaming, monkeypatch):
    """The bound leaves out nearly all of them: a search without it would not end."""
    visited = []
    promising = ShortestWay._promising
    monkeypatch.setattr(ShortestWay, "_promising", lambda *args: visited.append(1) or promising(*args))
    search = large_instance(streaming)
    fastest, shortest = search.fastest_stages(), search.shortest_way()
    assert fastest[0] == pytest.approx(check_picks(search, fastest[1])[0])
    assert shortest[0] == pytest.approx(check_picks(search, shortest[1])[1])
    assert len(visited) < 5000
