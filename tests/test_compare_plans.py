"""accelerate's cut and ours: both are weighed alike, and ours is no worse. `benchmarks/plans.py` has more cases."""

from dataclasses import replace

import pytest
from rich.console import Console
from test_planner import preset

from bigint8.compare_plans import Compared, accelerate_map, compare, markdown, our_cut, print_compared, their_cut
from bigint8.errors import PlanError
from bigint8.options import Workload
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import Device, preset_gpus
from bigint8.plan.predict import predict


def mixed(*machine: tuple[str, int]) -> list[Device]:
    gpus = [gpu for name, count in machine for gpu in preset_gpus(name, count)]
    return [replace(gpu, name=f"cuda:{i}") for i, gpu in enumerate(gpus)]


CASES = {
    "gpt2-xl, 2 alike": ("gpt2-xl", mixed(("rtx-3060", 2))),
    "phi-2, slow and fast": ("phi-2", mixed(("rtx-3060", 1), ("rtx-4090", 1))),
    "opt-30b, 2 alike": ("opt-30b", mixed(("rtx-3090", 2))),
    "opt-30b, mixed": ("opt-30b", mixed(("rtx-3060", 2), ("rtx-3090", 1))),
    "gpt-neox-20b, 1": ("gpt-neox-20b", mixed(("rtx-3090", 1))),
    "llama-13b, large and small": ("llama-13b", mixed(("rtx-4090", 1), ("rtx-3060", 1))),
}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Compared:
    name, devices = CASES[request.param]
    spec = preset(name)
    return compare(spec, devices, spec.workload())


def test_where_accelerate_spills_nothing_our_plan_fits_and_its_slowest_stage_is_no_slower(case):
    assert sum(case.theirs.blocks) + sum("." in name for name in case.theirs.spilled) > 0
    if not case.theirs.spilled:
        assert case.ours is not None and not case.ours.spilled and case.ours.fullest <= 1
        assert case.ours.slowest_seconds <= case.theirs.slowest_seconds * (1 + 1e-9)


def test_opt_175b_over_eight_3090s_spills_in_accelerates_plan_only():
    case = compare(preset("opt-175b"), preset_gpus("rtx-3090", 8), Workload())
    assert len(case.theirs.spilled) > 0 and sum(case.theirs.blocks) < 96 and case.theirs.slowest_seconds is None
    assert case.ours is not None and case.ours.blocks == (12,) * 8 and not case.ours.spilled


def test_our_cut_has_the_times_of_its_plan():
    spec, devices = preset("llama-13b"), mixed(("rtx-3060", 1), ("rtx-4090", 1))
    plan, cut = make_plan(spec, devices, Workload()), our_cut(spec, devices, Workload())
    promised = predict(plan)
    assert cut.slowest_seconds == pytest.approx(max(stage.decode_seconds for stage in promised.stages))
    assert cut.tokens_per_s == pytest.approx(promised.tokens_per_s)
    fullest = max(1 - stage.headroom_bytes / stage.device.usable_bytes for stage in plan.stages)
    assert cut.fullest == pytest.approx(fullest)
    assert sum(cut.blocks) == 40 and cut.devices == len(plan.stages)


def test_accelerates_cut_is_weighed_as_ours_where_it_is_the_same():
    """On one GPU with room there is one cut."""
    spec, devices = preset("phi-2"), preset_gpus("a100-80gb", 1)
    assert their_cut(spec, devices, Workload()) == our_cut(spec, devices, Workload())


def test_accelerate_is_asked_with_a_byte_a_weight_and_a_tenth_held_back():
    """Its map changes where nine tenths of the memory hold the model's int8 weights and no longer do."""
    spec, (gpu,) = preset("opt-6.7b"), preset_gpus("rtx-3090", 1)
    block = spec.known_layout.blocks[0].part.weight_bytes(2)
    needed = spec.known_layout.weight_bytes(2)

    def spilled(size: float) -> bool:
        return "cpu" in accelerate_map(spec, [replace(gpu, usable_bytes=int(size) - 2**28)]).values()

    assert spilled((needed - block) / 0.9) and spilled(needed)
    assert not spilled((needed + 3 * block) / 0.9), "with room for the largest layer, which it keeps free"


def test_a_model_that_does_not_fit_at_all_has_no_cut_of_ours_and_work_beyond_the_model_is_refused():
    case = compare(preset("opt-30b"), preset_gpus("rtx-3060", 1), Workload())
    assert case.ours is None and case.theirs.spilled
    with pytest.raises(PlanError, match="4096"):
        compare(preset("phi-2"), preset_gpus("rtx-3060", 1), Workload(context=4096))


def test_the_table_has_both_cuts_of_each_case(capsys):
    cases = [compare(preset("phi-2"), preset_gpus("rtx-3060", count), Workload()) for count in (1, 2)]
    print_compared(Console(width=140), cases)
    shown = capsys.readouterr().out
    assert shown.count("accelerate") >= 2 and "2 x RTX 3060" in shown and "tokens/s" in shown
    rows = markdown(cases).splitlines()
    assert len(rows) == 4 and rows[2].startswith("| phi-2 | 1 x RTX 3060 | 32 / 32 | 0 / 0 |")
    assert len({row.count("|") for row in rows}) == 1
