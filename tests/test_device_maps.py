"""A plan's device map, given to transformers: it covers the whole model, and the model runs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_planner import preset
from tiny import SIZES, save_tiny
from transformers import AutoModelForCausalLM

from bigint8.errors import PlanError
from bigint8.options import Workload
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import Device, preset_gpus
from bigint8.plan.plan import DeviceMap, Plan
from bigint8.session import find_model

TOKENS = torch.tensor([[1, 2, 3, 4]])


def plan_over(folder: Path, *names: str) -> Plan:
    devices = [Device(name, name, 2**30, "float16") for name in names]
    plan = make_plan(replace(find_model(folder).spec, one_process=True), devices, Workload(64))
    assert len(plan.stages) == len(names)
    return plan


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", SIZES)
def test_transformers_takes_it_for_every_family(kind, tied, tmp_path):
    save_tiny(kind, tied, tmp_path)
    plan = plan_over(tmp_path, "cuda:0", "cuda:1")
    devices = plan.device_map()
    assert set(devices.values()) == {"cuda:0", "cuda:1"}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    names = [name for name, module in plain.named_modules() if name and not list(module.children())]
    uncovered = [name for name in names if DeviceMap(devices).get(name) is None]
    assert uncovered == [], "each module that computes has a device"
    assert devices.keys() <= {name for name, _ in plain.named_modules()}

    # with no GPU here: the same map, the first stage on the CPU, the second read from host memory when it is used
    here = {name: "cpu" if device == "cuda:0" else "disk" for name, device in devices.items()}
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=here, offload_folder=tmp_path / "offload")
    assert set(mapped.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(mapped(TOKENS).logits, plain(TOKENS).logits)


def test_rotary_frequencies_go_with_the_embeddings(tmp_path):
    save_tiny("llama", False, tmp_path)
    devices = plan_over(tmp_path, "cuda:1", "cuda:0").device_map()
    assert devices["model.rotary_emb"] == devices["model.embed_tokens"] == "cuda:1"


def test_a_plan_over_two_boxes_has_no_device_map():
    gpus = preset_gpus("rtx-3090", 2)
    apart = [gpus[0], replace(gpus[0], box=replace(gpus[0].box, name="another"))]
    with pytest.raises(PlanError, match="several boxes"):
        make_plan(preset("opt-30b"), apart, Workload()).device_map()
