"""Every preset on every kind of machine: what is allocated is what was planned, with all sizes of the real models."""

from functools import cache

import pytest
import torch
from transformers import AutoConfig

from bigint8.errors import PlanError
from bigint8.model.skeleton import build_skeleton
from bigint8.plan.clusters import cluster_names, load_cluster
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import gpu_presets, preset_gpus
from bigint8.plan.plan import DeviceMap
from bigint8.plan.spec import spec_of
from bigint8.sources.find import find_source
from bigint8.sources.presets import preset_names

ALIKE = {f"{count} x {kind}": preset_gpus(kind, count) for kind in sorted(gpu_presets()) for count in (1, 2, 4, 8)}
CLUSTERS = {name: load_cluster(name).devices for name in cluster_names()}


@cache
def planned(name):
    """Of a preset: a plan for each machine that it fits, an error for each other one."""
    spec = spec_of(find_source(name, fetch=False))
    plans, errors = {}, {}
    for machine, devices in (ALIKE | CLUSTERS).items():
        try:
            plans[machine] = make_plan(spec, devices[: len(spec.known_layout.blocks)], spec.workload())
        except PlanError as error:
            errors[machine] = error
    return plans, errors


def allocated(plan, skeleton):
    """Bytes on each device of the plan. A plan over several boxes has no device map, since none of its processes has
    all devices: there a stage's modules say where a tensor is."""
    one_box = len({stage.device.box.name for stage in plan.stages}) == 1
    modules = {module: stage.device.name for stage in plan.stages for module in stage.modules}
    owners = DeviceMap(plan.device_map() if one_box else modules)
    held = dict.fromkeys((stage.device.name for stage in plan.stages), 0)
    for slot, there in skeleton.slots.items():
        held[owners[slot]] += there.nbytes
    return tuple(held.values())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_takes_what_its_plans_say_on_the_meta_device(name):
    """Plans of the same cuts take the same, so one of them is held against the tensors."""
    skeletons, taken = {}, {}
    for machine, plan in planned(name)[0].items():
        assert all(stage.headroom_bytes >= 0 for stage in plan.stages), machine
        form = plan.dtype, plan.spec.int8
        if form not in skeletons:
            config = AutoConfig.for_model(**plan.spec.config)
            skeletons[form] = build_skeleton(config, plan.spec.int8, getattr(torch, plan.dtype))
        cut = *form, len({stage.device.box.name for stage in plan.stages}) == 1, plan.spec.known_layout, *cuts(plan)
        if cut not in taken:
            taken[cut] = allocated(plan, skeletons[form])
        assert tuple(stage.weight_bytes for stage in plan.stages) == taken[cut], machine


def cuts(plan):
    return tuple(stage.last_block for stage in plan.stages)


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_that_does_not_fit_a_machine_is_told_ways_out_that_do(name):
    for machine, error in planned(name)[1].items():
        assert error.ways_out.short_bytes > 0 and error.ways_out.ways, machine
        for way in error.ways_out.ways:
            assert all(stage.headroom_bytes >= 0 for stage in way.plan.stages), (machine, way.text)


def test_every_preset_fits_some_cluster_and_every_cluster_holds_some_preset():
    fits = {(name, machine) for name in preset_names() for machine in planned(name)[0]}
    assert {name for name, machine in fits if machine in CLUSTERS} == set(preset_names())
    assert {name for name, machine in fits if machine in ALIKE} == set(preset_names())
    assert {machine for _, machine in fits} == {*ALIKE, *CLUSTERS}
