"""A model that does not fit: what is short, and ways out that work, since each was planned."""

import pickle
from dataclasses import replace

import pytest
from commands import Command
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_planner import devices_with, preset, spec_with

import bigint8.launch
from bigint8.errors import PlanError
from bigint8.options import PAGE_TOKENS, Int8Config, Workload
from bigint8.plan.cut import fill_in_order, make_plan
from bigint8.plan.devices import Device, preset_gpus
from bigint8.plan.plan import Plan
from bigint8.plan.spec import ModelSpec
from bigint8.plan.ways_out import SHORTEST_CONTEXT, WaysOut, more_devices, used_bytes
from bigint8.units import GIB

MOST_PLANS = 60
"""That a refusal takes: a plan takes milliseconds, and a person waits."""


def refused(spec: ModelSpec, devices: list[Device], workload: Workload, plan=make_plan) -> WaysOut:
    with pytest.raises(PlanError) as error:
        plan(spec, devices, workload)
    assert isinstance(error.value.ways_out, WaysOut) and str(error.value) == str(error.value.ways_out)
    return error.value.ways_out


def fits(spec: ModelSpec, devices: list[Device], workload: Workload, plan=make_plan) -> Plan | None:
    try:
        return plan(spec, devices, workload)
    except PlanError:
        return None


@st.composite
def too_large(draw):
    """A model with large keys and values for its weights, in part; devices of up to two sizes; some work."""
    spec = spec_with(
        draw(st.lists(st.integers(1, 10**9), min_size=3, max_size=9)),
        draw(st.integers(0, 10**9)),
        draw(st.sampled_from([0, 10**8, 10**9])),
    )
    sizes = replace(spec.known_layout.sizes, kv_values=draw(st.sampled_from([4, 10**4, 10**6])), widest=10**5)
    head = draw(st.sampled_from([None, False]))
    spec = replace(
        spec, layout=replace(spec.known_layout, sizes=sizes), int8=spec.int8.model_copy(update={"int8_head": head})
    )
    kinds = draw(st.lists(st.integers(10**8, 3 * 10**9), min_size=1, max_size=2))
    count = draw(st.integers(1, min(3, len(spec.known_layout.blocks))))
    devices = devices_with([draw(st.sampled_from(kinds)) for _ in range(count)])
    devices = [replace(device, usable_bytes=device.usable_bytes - 2**29) for device in devices]
    workload = Workload(
        draw(st.integers(1, 4096)), draw(st.integers(1, 40)), draw(st.sampled_from([16, 100, 512, 2048]))
    )
    return spec, devices, workload


@settings(deadline=None, max_examples=150)
@given(too_large(), st.sampled_from([make_plan, fill_in_order]))
def test_each_way_that_is_offered_plans(case, planner):
    spec, devices, workload = case
    assume(fits(spec, devices, workload, planner) is None)
    found = refused(spec, devices, workload, planner)
    assert found.plans <= MOST_PLANS and found.short_bytes > 0
    for way in found.ways:
        plan, changed = way.plan, dict.fromkeys(("context", "sequences", "chunk"))
        assert all(stage.headroom_bytes >= 0 for stage in plan.stages)
        asked, there = spec, devices
        if way.change in changed:
            changed[way.change] = getattr(workload, way.change)
        same = {name: value for name, value in changed.items() if value is not None}
        assert replace(plan.workload, **same | {"chunk": workload.chunk}) == workload, "one change; chunks as it must"
        assert plan.workload.chunk <= workload.chunk
        if way.change == "head":
            asked = replace(spec, int8=Int8Config(int8_head=True), layout=spec.known_layout.with_int8_head())
        if way.change in ("devices", "memory"):
            there = list(dict.fromkeys(stage.device for stage in plan.stages))
        again = planner(asked, there, plan.workload)
        assert all(stage.headroom_bytes >= 0 for stage in again.stages)
        assert way.prediction.tokens_per_s > 0


@settings(deadline=None, max_examples=100)
@given(too_large())
def test_the_most_that_is_offered_is_the_most_that_fits_and_what_is_not_offered_does_not(case):
    spec, devices, workload = case
    assume(fits(spec, devices, workload) is None)
    found = refused(spec, devices, workload)
    context, sequences = found.way("context"), found.way("sequences")
    shortest = replace(workload, context=min(SHORTEST_CONTEXT, workload.context))
    if context is None:
        assert fits(spec, devices, shortest) is None
    else:
        longer = context.plan.workload.context + PAGE_TOKENS
        assert context.plan.workload.context >= SHORTEST_CONTEXT
        assert longer >= workload.context or fits(spec, devices, replace(workload, context=longer)) is None
    most = 0 if sequences is None else sequences.plan.workload.sequences
    assert fits(spec, devices, replace(workload, sequences=most + 1)) is None
    for device in {(device.model, device.usable_bytes): device for device in devices}.values():
        ways = [way for way in found.ways if way.change == "devices"]
        needed = [fits(spec, more_devices(devices, device, n), workload) is not None for n in range(1, 3)]
        blocks = len(spec.known_layout.blocks)
        assert bool(ways) or not any(needed[: max(0, blocks - len(devices))])


@pytest.mark.parametrize(
    ("name", "gpu", "count", "workload", "said"),
    [
        ("opt-175b", "rtx-3090", 6, Workload(), {"8 such devices instead of 6"}),
        ("llama-7b", "rtx-3060", 1, Workload(sequences=8), {"context=1", "batch_size=4", "2 such devices"}),
        ("opt-30b", "rtx-3090", 1, Workload(), {"2 such devices instead of 1"}),
    ],
)
def test_models_that_people_have_get_the_ways_that_there_are(name, gpu, count, workload, said):
    found = refused(preset(name), preset_gpus(gpu, count), workload)
    assert all(words in str(found) for words in said)
    assert found.way("head") is None, "the planner has tried it"


def test_the_fewest_more_of_each_kind_are_offered_where_kinds_are_mixed():
    small = [replace(gpu, name=f"cuda:{4 + i}") for i, gpu in enumerate(preset_gpus("rtx-3060", 2))]
    devices = [*preset_gpus("rtx-3090", 4), *small]
    found = refused(preset("opt-175b"), devices, Workload())
    ways = [way for way in found.ways if way.change == "devices"]
    assert [way.text.partition(" ")[2] for way in ways] == [
        "more NVIDIA GeForce RTX 3090",
        "more NVIDIA GeForce RTX 3060",
    ]
    for way, kind in zip(ways, (devices[0], devices[-1]), strict=True):
        more = int(way.text.partition(" ")[0])
        assert fits(preset("opt-175b"), more_devices(devices, kind, more), Workload())
        assert fits(preset("opt-175b"), more_devices(devices, kind, more - 1), Workload()) is None
    assert "4 x NVIDIA GeForce RTX 3090 and 2 x NVIDIA GeForce RTX 3060 have" in str(found)


def just_enough(spec: ModelSpec, workload: Workload) -> Device:
    """A GPU that one plan of the model fills to the last byte."""
    (stage,) = make_plan(spec, preset_gpus("a100-80gb", 1), workload).stages
    return replace(stage.device, usable_bytes=used_bytes(stage))


def test_a_head_that_the_settings_keep_in_16_bit_is_a_way_out():
    gpu = just_enough(preset("opt-6.7b", Int8Config(int8_head=True)), Workload())
    way = refused(preset("opt-6.7b", Int8Config(int8_head=False)), [gpu], Workload()).way("head")
    assert way is not None and way.plan.spec.int8.int8_head and "int8_head=True" in way.text
    assert make_plan(preset("opt-6.7b"), [gpu], Workload()).spec.int8.int8_head, "left open, it is no way but a note"


def test_smaller_chunks_of_a_prompt_are_a_way_out_where_its_workspace_is_too_much():
    spec = preset("opt-6.7b", Int8Config(int8_head=False))
    gpu = just_enough(spec, Workload(chunk=1024))
    way = refused(spec, [gpu], Workload(chunk=2048), fill_in_order).way("chunk")
    assert way is not None and way.plan.workload == Workload(chunk=1024)
    assert "chunks of 1024 tokens" in way.text and way.prediction.prompt == 1024
    assert make_plan(spec, [gpu], Workload(chunk=2048)).workload.chunk < 1024, "that planner takes them by itself"


def test_memory_that_would_do_is_exact():
    spec, (gpu,) = preset("opt-13b", Int8Config(int8_head=False)), preset_gpus("rtx-3060", 1)
    way = refused(spec, [gpu], Workload()).way("memory")
    (stage,) = way.plan.stages
    assert stage.headroom_bytes == 0
    less = replace(stage.device, usable_bytes=stage.device.usable_bytes - 1)
    assert fits(spec, [less], Workload()) is None


def test_blocks_in_host_memory_are_a_way_out_where_the_box_has_enough_of_it():
    def with_host(size: int) -> list[Device]:
        return [replace(gpu, box=replace(gpu.box, host_bytes=size)) for gpu in preset_gpus("rtx-3090", 2)]

    spec = preset("opt-66b")
    assert refused(spec, with_host(0), Workload()).way("offload") is None
    assert refused(spec, with_host(2**30), Workload()).way("offload") is None
    way = refused(spec, with_host(64 * 2**30), Workload()).way("offload")
    blocks = [block for stage in way.plan.stages for block in stage.host_blocks]
    assert f"{len(blocks)} blocks (" in way.text and 0 < len(blocks) < 64
    assert all(stage.headroom_bytes >= 0 for stage in way.plan.stages)
    assert sum(stage.host_bytes for stage in way.plan.stages) <= 64 * 2**30


def test_an_error_travels_between_processes_with_its_ways_out():
    with pytest.raises(PlanError) as error:
        make_plan(preset("opt-30b"), preset_gpus("rtx-3090", 1), Workload())
    sent = pickle.loads(pickle.dumps(error.value))
    assert str(sent) == str(error.value) and sent.ways_out == error.value.ways_out


def test_the_command_shows_a_table_with_flags_before_its_error(run: Command):
    asked = ("--model", "llama-7b", "--plan-only", "--gpu-type", "rtx-3060", "--gpus", 1, "--batch-size", 8)
    ended = run(bigint8.launch, *asked)
    assert ended.code == 2
    table, _, last = ended.error.rpartition("error: ")
    found = refused(preset("llama-7b"), preset_gpus("rtx-3060", 1), Workload(sequences=8))
    sizes = (found.needed_bytes, found.there_bytes, found.short_bytes)
    assert all(words in table for words in ("needed", "there", "short", *(f"{size / GIB:.2f}" for size in sizes)))
    longest = found.way("context").plan.workload.context
    assert f"--context {longest}" in table and "--batch-size 4" in table and "context=" not in ended.error
    assert f"--context {longest}, the longest that fits" in last
    instead = run(bigint8.launch, *asked[:-1], 4)
    assert instead.code == 0, "what is offered works"
    assert run(bigint8.launch, *asked, "--context", longest).code == 0
    assert run(bigint8.launch, *asked, "--context", longest + PAGE_TOKENS).code == 2
