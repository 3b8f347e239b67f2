"""Plans of models that are larger than their devices: which blocks are offloaded, where to, and what that costs."""

import random
from dataclasses import replace

import pytest
from test_planner import SHORT, devices_with, preset, spec_with

from bigint8.errors import PlanError
from bigint8.load import device_map
from bigint8.options import Int8Config, Workload
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import Box, Device, preset_gpus
from bigint8.plan.draft import Draft
from bigint8.plan.offload import Spill, keep_beside, offloaded_blocks, spill_of_boxes
from bigint8.plan.predict import PlanTimes
from bigint8.plan.speed import UNKNOWN_CORE
from bigint8.units import GIB

MUCH = Spill(host_bytes=2**50, disk_bytes=2**50)


# --- which blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_the_fewest_blocks_that_save_enough_are_offloaded(seed):
    """Three blocks that are alike save one: two buffers take the room of two."""
    chance = random.Random(seed)
    count, size = chance.randint(1, 20), chance.choice((1, 7, 100))
    missing = chance.randint(-3, size * count)
    chosen = offloaded_blocks([size] * count, missing)
    enough = [number for number in range(count + 1) if (number - 2) * size >= missing or (missing <= 0 == number)]
    assert (chosen is None) == (not enough)
    if chosen is not None:
        assert len(chosen) == enough[0] and sorted(set(chosen)) == list(chosen)


def test_offloaded_blocks_are_spread_evenly():
    assert offloaded_blocks([10] * 12, 10) == (2, 6, 10)
    assert offloaded_blocks([10] * 12, 40) == (1, 3, 5, 7, 9, 11)


def test_a_block_without_int8_weights_stays():
    chosen = offloaded_blocks([0, 10, 0, 10, 10, 0, 10], 20)
    assert chosen == (1, 3, 4, 6)


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_a_plan_never_takes_more_than_there_is(seed):
    chance = random.Random(seed)
    blocks = [chance.choice((1, 2, 3)) * 100_000_000 for _ in range(chance.randint(1, 12))]
    devices = devices_with([chance.randint(0, 900_000_000) for _ in range(chance.randint(1, min(3, len(blocks))))])
    spill = Spill(chance.randint(0, 2_000_000_000), chance.randint(0, 2_000_000_000))
    spec = spec_with(blocks, embeddings=1000, head=1000)
    try:
        plan = make_plan(spec, devices, SHORT, spill=spill)
    except PlanError as error:
        assert "offloaded" in str(error)
        return
    assert all(stage.headroom_bytes >= 0 for stage in plan.stages)
    assert sum(stage.host_bytes for stage in plan.stages) <= spill.host_bytes
    assert sum(stage.disk_bytes for stage in plan.stages) <= spill.disk_bytes
    kept = sum(stage.weight_bytes + stage.host_bytes + stage.disk_bytes for stage in plan.stages)
    assert kept == spec.known_layout.weight_bytes(2)


@pytest.mark.parametrize("count", [1, 2])
def test_what_fits_is_planned_as_it_was_without_offload(count):
    spec, devices = preset("llama-7b"), preset_gpus("rtx-3090", count)
    assert make_plan(spec, devices, SHORT, spill=MUCH) == make_plan(spec, devices, SHORT)


def test_a_head_is_int8_rather_than_a_block_offloaded_and_16_bit_once_blocks_must_be():
    spec = preset("llama-7b")
    (gpu,) = preset_gpus("rtx-3090", 1)
    whole = make_plan(spec, [gpu], SHORT).stages[0].needed_bytes
    barely = make_plan(spec, [replace(gpu, usable_bytes=whole - 10_000_000)], SHORT, spill=MUCH)
    assert not barely.is_offloaded and barely.spec.int8.int8_head
    offloaded = make_plan(spec, [replace(gpu, usable_bytes=whole // 2)], SHORT, spill=MUCH)
    assert offloaded.is_offloaded and not offloaded.spec.int8.int8_head
    assert any("offloaded as int8" in note for note in offloaded.notes)


def test_prompts_run_in_shorter_chunks_where_a_gpu_has_no_room_for_more_beside_its_buffers():
    spec, work = preset("llama-7b", Int8Config(int8_head=True)), Workload(context=1024)
    (gpu,) = preset_gpus("rtx-3090", 1)
    least = {}
    for chunk in (512, 256):
        stage = Draft(spec, replace(work, chunk=chunk), "float16", 1, MUCH).stage(0, gpu, 0, 32)
        sizes = [module.part.int8_values for module in spec.known_layout.blocks]
        least[chunk] = keep_beside(stage, sizes, range(32), "host").needed_bytes
    enough = make_plan(spec, [replace(gpu, usable_bytes=least[512])], work, spill=MUCH)
    assert enough.workload.chunk == 512 and len(enough.stages[0].host_blocks) == 32
    short = make_plan(spec, [replace(gpu, usable_bytes=least[256])], work, spill=MUCH)
    assert short.workload.chunk == 256 and short.is_offloaded and "chunks of 256 tokens" in short.notes[0]


def test_memory_of_the_host_comes_before_the_disk_and_each_box_has_its_own():
    spec = spec_with([200_000_000] * 20)
    boxes = [Box("a", host_bytes=2**40), Box("b", host_bytes=1)]
    devices = [replace(device, box=box) for device, box in zip(devices_with([900_000_000] * 2), boxes, strict=True)]
    stages = make_plan(spec, devices, SHORT, spill=MUCH).stages
    by_box = {stage.device.box.name: stage for stage in stages}
    assert by_box["a"].host_blocks and not by_box["a"].disk_blocks
    assert by_box["b"].disk_blocks and not by_box["b"].host_blocks


def test_boxes_that_say_what_they_hold_are_held_to_it_and_one_that_lacks_room_is_named():
    """As of a live cluster: what the machine that plans has does not count."""
    spec, none = spec_with([200_000_000] * 20), spill_of_boxes(spec_with([1]))
    assert none == Spill()
    there = Box("there", disk_bytes=2**40)
    devices = [replace(device, box=there) for device in devices_with([900_000_000] * 2)]
    stages = make_plan(spec, devices, SHORT, spill=none).stages
    assert all(stage.disk_blocks for stage in stages)
    taken = sum(stage.disk_bytes for stage in stages)
    devices = [replace(device, box=replace(there, disk_bytes=taken - 1)) for device in devices]
    with pytest.raises(PlanError, match=r"in there there are 0 bytes of the host's memory and .* of the disk"):
        make_plan(spec, devices, SHORT, spill=none)


def test_an_int8_checkpoint_needs_no_room_on_the_disks_of_boxes_that_say_what_they_hold():
    converted = spec_with([200_000_000] * 20)
    spec = replace(converted, config={"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})
    devices = [replace(device, box=Box("full")) for device in devices_with([900_000_000] * 2)]
    assert all(stage.disk_blocks for stage in make_plan(spec, devices, SHORT, spill=spill_of_boxes(spec)).stages)
    with pytest.raises(PlanError, match="in full there are"):
        make_plan(converted, devices, SHORT, spill=spill_of_boxes(converted))


def test_a_step_takes_what_its_bytes_take_on_the_bus_where_that_is_longer():
    spec = preset("llama-65b", Int8Config(int8_head=False))
    plan = make_plan(spec, preset_gpus("rtx-3090", 1), Workload(context=512), spill=MUCH)
    (stage,) = plan.stages
    assert len(stage.host_blocks) > 50
    decode = PlanTimes(plan).decode(1, 512).stages[0]
    assert decode == pytest.approx(stage.host_bytes / stage.device.speed.bus_bytes_per_s)


def test_more_memory_never_makes_an_offloaded_plan_slower():
    spec, before = preset("llama-65b", Int8Config(int8_head=False)), float("inf")
    (gpu,) = preset_gpus("rtx-3090", 1)
    for gib in range(8, 80, 4):
        plan = make_plan(spec, [replace(gpu, usable_bytes=gib * GIB)], Workload(context=512), spill=MUCH)
        seconds = PlanTimes(plan).decode(1, 512).stages[0]
        assert seconds <= before * (1 + 1e-9)
        before = seconds
    assert not plan.is_offloaded


def on_a_bus(bytes_per_s: float) -> list[Device]:
    """A GPU with such a bus, then the CPU beside it."""
    (gpu,) = preset_gpus("rtx-3090", 1)
    cpu = Device("cpu", "a CPU", 2**40, None, UNKNOWN_CORE)
    return [replace(gpu, speed=replace(gpu.speed, bus_bytes_per_s=bytes_per_s)), cpu]


def test_the_cpu_computes_what_the_gpu_has_no_room_for_where_that_is_faster_than_bringing_it_in():
    spec, work = preset("llama-65b"), Workload(context=512)
    slow = device_map._plan(spec, work, on_a_bus(1e9), MUCH)
    assert [stage.device.kind for stage in slow.stages] == ["cuda", "cpu"] and not slow.is_offloaded
    fast = device_map._plan(spec, work, on_a_bus(1e11), MUCH)
    assert [stage.device.kind for stage in fast.stages] == ["cuda"] and fast.is_offloaded


@pytest.mark.parametrize("seed", range(150))
def test_a_plan_is_found_wherever_one_of_two_stages_has_room(seed):
    """By trying every cut in both orders, and each device alone."""
    chance = random.Random(seed)
    count = chance.randint(2, 8)
    spec = spec_with([100_000_000] * count)
    draft = Draft(spec, SHORT, "float16", 2, MUCH)
    room = [draft.workspace(device) + chance.randint(50, 400) * 1_000_000 for device in devices_with([0, 0])]
    devices = [replace(device, usable_bytes=size) for device, size in zip(devices_with([0, 0]), room, strict=True)]
    ways = [([0, cut, count], order) for cut in range(1, count) for order in (devices, devices[::-1])]
    ways += [([0, count], [device]) for device in devices]
    fitting = [all(stage.headroom_bytes >= 0 for stage in draft.plan(cuts, order).stages) for cuts, order in ways]
    if any(fitting):
        assert all(stage.headroom_bytes >= 0 for stage in make_plan(spec, devices, SHORT, spill=MUCH).stages)
    else:
        with pytest.raises(PlanError, match="two buffers of a block each"):
            make_plan(spec, devices, SHORT, spill=MUCH)
