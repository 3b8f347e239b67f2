"""The exact search against all pipelines there are."""

import random
from itertools import combinations, pairwise, permutations

import pytest

from bigint8.plan.search import Boxes, Kind, Search

INSTANCES = 500
"""Of each search: 1,000 in all."""


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


def check_picks(search, picks):
    """The stages follow each other, fit, and use no device twice."""
    assert picks[0].first == 0 and picks[-1].last == search.blocks
    assert all(a.last == b.first for a, b in pairwise(picks))
    assert all(search.kinds[pick.kind].fits(pick.first, pick.last) for pick in picks)
    for index, box in enumerate(search.boxes):
        assert sum(pick.opens for pick in picks if pick.box == index) <= box.boxes
        for kind, number in box.devices:
            assert sum(pick.box == index and pick.kind == kind for pick in picks) <= number * box.boxes


@pytest.mark.parametrize("part", range(10))
def test_the_slowest_stage_is_as_fast_as_in_any_pipeline(part):
    for seed in range(part * INSTANCES // 10, (part + 1) * INSTANCES // 10):
        search = random_instance(random.Random(seed))
        everything = list(all_pipelines(search))
        found = search.fastest_stages()
        if not everything:
            assert found is None
            continue
        seconds, picks = found
        check_picks(search, picks)
        slowest = min(slowest for slowest, _, _ in everything)
        assert seconds == pytest.approx(slowest), seed
        assert len(picks) == min(number for time, _, number in everything if time <= slowest * (1 + 1e-9)), seed


@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("ring", [False, True], ids=["one way", "ring"])
def test_the_sum_of_all_stages_is_as_small_as_in_any_pipeline(part, ring):
    for seed in range(part * INSTANCES // 10, (part + 1) * INSTANCES // 10):
        search = random_instance(random.Random(10_000 + seed), ring)
        everything = list(all_pipelines(search, ring))
        found = search.shortest_way()
        if not everything:
            assert found is None
            continue
        seconds, picks = found
        check_picks(search, picks)
        assert seconds == pytest.approx(min(total for _, total, _ in everything)), seed


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
