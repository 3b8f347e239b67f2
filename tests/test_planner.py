"""The plan: exact bytes, the best of all cuts, errors with numbers."""

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigint8.errors import BigInt8Error, PlanError
from bigint8.families.layout import Layout, Module, Part, Sizes
from bigint8.options import PAGE_TOKENS, Access, Int8Config, Workload
from bigint8.plan.cut import fewest_devices, fill_in_order, make_plan
from bigint8.plan.devices import HOST_RESERVE_BYTES, Device, find_devices, gpu_presets, pick_dtype, preset_gpus
from bigint8.plan.draft import Draft
from bigint8.plan.plan import Plan
from bigint8.plan.predict import PlanTimes
from bigint8.plan.spec import ModelSpec, spec_of
from bigint8.plan.speed import UNKNOWN_CORE
from bigint8.sources.find import find_source

SHORT = Workload(context=PAGE_TOKENS)


def spec_with(blocks: list[int], embeddings: int = 0, head: int = 0) -> ModelSpec:
    """A model of blocks of the given int8 sizes, whose head is 16-bit."""
    sizes = Sizes(
        blocks=len(blocks),
        linears=(),
        norm_values=0,
        hidden=1,
        vocab=1,
        tied=head == 0,
        kv_values=4,
        widest=1,
        final_norm_values=None,
        width=1,
        windows=(None,) * len(blocks),
    )
    layout = Layout(
        first=(Module("embeddings", Part(other_values=embeddings)),),
        blocks=tuple(Module(f"blocks.{i}", Part(int8_values=size)) for i, size in enumerate(blocks)),
        last=(),
        head=Module("head", Part(other_values=head)),
        sizes=sizes,
    )
    return ModelSpec("m", None, {}, "float16", Int8Config(int8_head=False), Access(), layout)


def preset(name: str, int8: Int8Config | None = None) -> ModelSpec:
    return spec_of(find_source(name, fetch=False), int8)


def devices_with(sizes: list[int]) -> list[Device]:
    return [Device(f"cuda:{i}", "test", size + 2**30, "float16") for i, size in enumerate(sizes)]


def fullest(plan) -> float:
    return max(1 - stage.headroom_bytes / stage.device.usable_bytes for stage in plan.stages)


CORE = Device("cpu", "test", 2**34, "bfloat16", UNKNOWN_CORE)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 10**9), min_size=3, max_size=9),
    st.lists(st.integers(10**10, 3 * 10**10), min_size=1, max_size=3),
    st.integers(0, 10**9),
    st.integers(0, 10**9),
)
def test_of_cuts_as_fast_as_any_the_fullest_device_is_emptiest(blocks, sizes, embeddings, head):
    spec, devices = spec_with(blocks, embeddings, head), devices_with(sizes)
    plan = make_plan(spec, devices, SHORT)
    assert plan.stages[0].first_block == 0 and plan.stages[-1].last_block == len(blocks)
    plans = all_plans(spec, plan) + all_plans(spec.with_copied_head(), plan)
    least = min(slowest(other) for other in plans)
    assert slowest(plan) == pytest.approx(least, rel=1e-9)
    fast = [other for other in plans if slowest(other) <= least * (1 + 1e-9)]
    assert fullest(plan) <= min(fullest(other) for other in fast if other.spec == plan.spec) + 1e-12
    assert plan.copied_head_bytes == 0 or all(other.copied_head_bytes for other in fast)


def all_plans(spec: ModelSpec | None, like: Plan) -> list[Plan]:
    """Every cut of a model over the devices of a plan, in their order; over one device, none with a copied head."""
    if spec is None or (spec.known_layout.copied_head and len(like.stages) == 1):
        return []
    devices, blocks = [stage.device for stage in like.stages], len(spec.known_layout.blocks)
    draft = Draft(spec, like.workload, like.dtype, len(devices))
    cuts = combinations(range(1, blocks), len(devices) - 1)
    return [draft.plan([0, *inner, blocks], devices) for inner in cuts]


def slowest(plan) -> float:
    return max(PlanTimes(plan).decode(1, plan.workload.context).stages)


@pytest.mark.parametrize(("name", "cuts"), [("tinyllama-1.1b", (12, 22)), ("smollm2-135m", (10, 30))])
def test_cpu_workers_take_as_long_as_each_other_in_a_step(name, cuts):
    """The head counts where it is, with the embeddings if it is tied to them."""
    plan = make_plan(preset(name), [CORE] * 2, Workload())
    assert tuple(stage.last_block for stage in plan.stages) == cuts


def test_cpu_workers_without_room_for_that_are_cut_as_they_fit():
    spec = preset("tinyllama-1.1b")
    roomy = make_plan(spec, [CORE] * 2, Workload())
    needed = [CORE.usable_bytes - stage.headroom_bytes for stage in roomy.stages]
    plan = make_plan(spec, [replace(CORE, usable_bytes=min(needed) - 1), CORE], Workload())
    small = next(stage for stage in plan.stages if stage.device.usable_bytes < CORE.usable_bytes)
    assert small.headroom_bytes >= 0 and small.last_block - small.first_block < 11
    assert slowest(plan) > slowest(roomy)


def test_prompts_run_in_shorter_chunks_before_a_model_is_said_not_to_fit():
    spec, work = preset("opt-6.7b", Int8Config(int8_head=True)), Workload(1024, 1)
    needed = {}
    for chunk in (512, 128):
        roomy = make_plan(spec, [replace(CORE, usable_bytes=2**40)], replace(work, chunk=chunk))
        needed[chunk] = 2**40 - roomy.stages[0].headroom_bytes
    assert needed[128] < needed[512]
    plan = make_plan(spec, [replace(CORE, usable_bytes=needed[128])], work)
    assert plan.workload.chunk == 128 and plan.stages[0].headroom_bytes >= 0
    assert plan.notes == ("prompts run in chunks of 128 tokens, not 512: otherwise the model would not fit",)
    with pytest.raises(PlanError):
        make_plan(spec, [replace(CORE, usable_bytes=needed[128] // 2)], work)


def test_a_device_that_makes_no_stage_faster_is_left_out_by_name():
    slow = replace(preset_gpus("rtx-3060", 1)[0], name="cuda:2")
    plan = make_plan(spec_with([10**9] * 3, head=10**10), [*preset_gpus("a100-80gb", 2), slow], SHORT)
    assert [stage.device.name for stage in plan.stages] == ["cuda:0", "cuda:1"]
    assert plan.notes == ("left out, since no stage would be faster with it: cuda:2 (NVIDIA GeForce RTX 3060)",)


def test_opt_175b_fits_eight_3090s_with_every_block_on_a_gpu():
    plan = make_plan(preset("opt-175b"), preset_gpus("rtx-3090", 8), Workload())
    assert [stage.last_block - stage.first_block for stage in plan.stages] == [12] * 8
    assert all(stage.headroom_bytes > 0 for stage in plan.stages)
    assert sum(stage.weight_bytes for stage in plan.stages) == plan.spec.known_layout.weight_bytes(2)
    assert sum(stage.kv_bytes for stage in plan.stages) == 2 * 96 * 12288 * 2048 * 2


def test_a_head_becomes_int8_where_the_model_would_barely_fit_and_the_plan_says_so():
    gpus = preset_gpus("rtx-3090", 8)
    plan = make_plan(preset("opt-175b"), gpus, Workload())
    small = make_plan(preset("opt-175b", Int8Config(int8_head=True)), gpus, Workload())
    assert plan.stages == small.stages and plan.spec.int8.int8_head
    assert "head" in plan.notes[0] and small.notes == ()
    roomy = make_plan(preset("opt-175b"), preset_gpus("a100-80gb", 8), Workload())
    assert not roomy.spec.int8.int8_head and roomy.notes == ()
    table = 50272 * 12288
    difference = sum(s.weight_bytes for s in roomy.stages) - sum(s.weight_bytes for s in plan.stages)
    assert difference == 2 * table - (table + 4 * 50272)
    told = make_plan(preset("opt-175b", Int8Config(int8_head=False)), gpus, Workload())
    assert told.stages[0].weight_bytes == roomy.stages[0].weight_bytes


def test_a_model_that_does_not_fit_gets_the_numbers_and_a_way_out():
    spec = preset("opt-175b")
    with pytest.raises(PlanError) as error:
        make_plan(spec, preset_gpus("rtx-3090", 6), Workload())
    message = str(error.value)
    assert "opt-175b" in message and "rtx" not in message and "RTX 3090" in message
    assert "162.69 GiB of weights" in message and "136.87 GiB" in message and "8 such devices" in message
    assert fewest_devices(spec, preset_gpus("rtx-3090", 1)[0], Workload()) == 8


def test_a_model_that_no_number_of_devices_holds_is_said_so():
    tiny = Device("cuda:0", "toy", 10**9, "float16")
    with pytest.raises(PlanError, match="lacks"):
        fewest_devices(preset("opt-175b"), tiny, Workload())


def test_uneven_devices_get_uneven_stages():
    plan = make_plan(spec_with([10**9] * 12), devices_with([9 * 10**9, 3 * 10**9]), SHORT)
    sizes = [stage.last_block - stage.first_block for stage in plan.stages]
    assert sizes[0] > 2 * sizes[1] - 1 and sum(sizes) == 12


def test_filling_in_order_fills_the_fast_device_first_and_drops_empty_ones():
    spec = spec_with([10**9] * 6)
    devices = devices_with([3 * 10**9, 20 * 10**9, 20 * 10**9])
    plan = fill_in_order(spec, devices, SHORT)
    assert [(s.device.name, s.first_block, s.last_block) for s in plan.stages] == [("cuda:0", 0, 3), ("cuda:1", 3, 6)]
    with pytest.raises(PlanError, match="does not fit"):
        fill_in_order(spec, devices[:1], SHORT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 4096}, "2048 tokens"),
        ({"context": 0}, "at least 1"),
        ({"sequences": 0}, "at least 1"),
        ({"chunk": 0}, "at least 1"),
        ({"devices": []}, "no devices"),
        ({"devices": preset_gpus("a100-80gb", 13)}, "12 blocks"),
    ],
)
def test_plans_that_make_no_sense_are_refused(arguments, message):
    devices = arguments.get("devices", preset_gpus("rtx-3090", 2))
    work = {name: value for name, value in arguments.items() if name != "devices"}
    with pytest.raises(PlanError, match=message):
        make_plan(preset("opt-125m"), devices, Workload(**work))


def test_a_plan_is_plain_data():
    import json

    plan = make_plan(preset("opt-125m"), preset_gpus("rtx-3090", 2), Workload())
    plain = json.loads(json.dumps(plan.to_dict()))
    assert plain["stages"][1]["headroom_bytes"] == plan.stages[1].headroom_bytes
    assert plain["stages"][0]["device"]["name"] == "cuda:0"


def test_cpu_workers_share_the_memory_of_the_machine_and_each_keeps_some_for_itself(monkeypatch):
    monkeypatch.setattr("bigint8.plan.devices.available_memory", lambda: 9 * 10**9)
    one, _ = find_devices("cpu", 1)
    three, _ = find_devices("cpu", 3)
    assert [device.usable_bytes for device in one] == [9 * 10**9 - HOST_RESERVE_BYTES]
    assert [device.usable_bytes for device in three] == [3 * 10**9 - HOST_RESERVE_BYTES] * 3


def test_an_unknown_gpu_type_is_told_which_there_are():
    with pytest.raises(BigInt8Error, match="rtx-3090"):
        preset_gpus("rtx-2060", 1)
    assert all(gpu.cuda_gib > 7 for gpu in gpu_presets().values())


@pytest.mark.parametrize(
    ("requested", "stored", "fast", "expected"),
    [
        ("auto", "float16", ["float16"], "float16"),
        ("auto", "bfloat16", ["bfloat16", "bfloat16"], "bfloat16"),
        ("auto", "float16", [None], "float32"),
        ("auto", "float16", ["bfloat16"], "float16"),
        ("auto", "bfloat16", ["bfloat16", None], "float32"),
        ("auto", "float32", ["bfloat16"], "float32"),
        ("bfloat16", "float16", [None], "bfloat16"),
    ],
)
def test_the_dtype_is_the_stored_one_unless_a_device_is_slow_at_it(requested, stored, fast, expected):
    devices = [Device("cuda:0" if name else "cpu", "d", 1, name) for name in fast]
    assert pick_dtype(requested, stored, devices) == expected


def test_a_cpu_that_is_fast_at_bfloat16_gets_it_for_float16():
    assert pick_dtype("auto", "float16", [Device("cpu", "d", 1, "bfloat16")]) == "bfloat16"
