"""Every preset on every kind of machine: what is allocated is what was planned, with all sizes of the real models."""

from functools import cache

import pytest
import torch
from transformers import AutoConfig

from bigint8.errors import PlanError
from bigint8.model.skeleton import build_skeleton
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import gpu_presets, preset_gpus
from bigint8.plan.plan import DeviceMap
from bigint8.plan.spec import spec_of
from bigint8.sources.find import find_source
from bigint8.sources.presets import preset_names

MACHINES = [(kind, count) for kind in sorted(gpu_presets()) for count in (1, 2, 4, 8)]


@cache
def plans(name):
    """A plan for each machine that the preset fits; plans of one cut are one."""
    found = {}
    for kind, count in MACHINES:
        spec = spec_of(find_source(name, fetch=False))
        devices = preset_gpus(kind, min(count, len(spec.known_layout.blocks)))
        try:
            plan = make_plan(spec, devices, spec.workload())
        except PlanError:
            continue
        assert all(stage.headroom_bytes >= 0 for stage in plan.stages), (name, kind, count)
        found[plan.dtype, plan.spec.int8, tuple(stage.last_block for stage in plan.stages)] = plan
    return list(found.values())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_takes_what_its_plans_say_on_the_meta_device(name):
    skeletons = {}
    for plan in plans(name):
        key = plan.dtype, plan.spec.int8
        if key not in skeletons:
            config = AutoConfig.for_model(**plan.spec.config)
            skeletons[key] = build_skeleton(config, plan.spec.int8, getattr(torch, plan.dtype))
        owners = DeviceMap(plan.device_map())
        held = dict.fromkeys((stage.device.name for stage in plan.stages), 0)
        for slot, there in skeletons[key].slots.items():
            held[owners[slot]] += there.nbytes
        assert held == {stage.device.name: stage.weight_bytes for stage in plan.stages}, name


def test_every_preset_fits_some_machine():
    assert all(plans(name) for name in preset_names())
