"""Models that are larger than their devices: blocks that no device holds are brought in as int8, ahead of their use."""

from dataclasses import replace

import pytest
import torch
from ragged import Stages, texts
from test_workers import WORK, AsOneStage
from tiny import SIZES, save_tiny, tiny_model

from bigint8 import Int8Config, load_sharded_int8
from bigint8.plan.cut import make_plan
from bigint8.plan.offload import Spill
from bigint8.plan.plan import Stage
from bigint8.session import find_model, quantize

PROMPT = torch.tensor([[5, 17, 99, 3, 42, 7]])
LONG = torch.arange(1, 91).view(1, -1)  # more rows than stay 16-bit: its activations are int8


def load(folder, saving=None, **settings):
    """The model within what it needs less `saving` bytes, by default with all it asks for."""
    options = {"context": 128, "progress": False} | settings
    if saving is None:
        return load_sharded_int8(folder, **options)
    (whole,) = load_sharded_int8(folder, **options).plan.stages
    return load_sharded_int8(folder, max_memory={"cpu": whole.needed_bytes - saving}, **options)


def tokens(model, prompt=PROMPT, new=16):
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0).tolist()


def block_bytes(model) -> int:
    """What a block's int8 weights take."""
    return int(model.plan.spec.known_layout.blocks[0].part.int8_values)


def the_stage(model) -> Stage:
    (stage,) = model.plan.stages
    return stage


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_offloaded_blocks_give_the_tokens_and_logits_of_those_that_stay(kind, tied, tmp_path):
    save_tiny(kind, tied, tmp_path)
    expected = load(tmp_path)
    model = load(tmp_path, block_bytes(expected) * 3 // 2)
    assert len(the_stage(model).disk_blocks) == 4 and model.engine is not None
    for prompt in (PROMPT, LONG):
        assert tokens(model, prompt) == tokens(expected, prompt)
        assert torch.equal(model(prompt).logits, expected(prompt).logits)


def tight_plan(folder, devices, blocks):
    """A plan over the devices, each with room for all but so many blocks of its stage."""
    found = find_model(folder, Int8Config(dtype="float32"))
    plan = make_plan(found.spec, devices, WORK)
    size = found.spec.known_layout.blocks[0].part.int8_values
    tight = [replace(stage.device, usable_bytes=stage.needed_bytes - blocks * size) for stage in plan.stages]
    return plan, make_plan(found.spec, tight, WORK, spill=Spill(disk_bytes=2**30))


@pytest.mark.parametrize("stored", ["16-bit", "int8"])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_two_workers_that_offload_give_the_tokens_of_two_that_do_not(pipeline, kind, stored, tmp_path):
    folder = tmp_path / "model"
    tiny_model(kind, kind == "opt", num_hidden_layers=9).save_pretrained(folder)
    if stored == "int8":
        quantize(folder, tmp_path / "int8", progress=False)
        folder = tmp_path / "int8"
    given = []
    for plan in tight_plan(folder, pipeline.devices()[:2], blocks=2):
        reports = pipeline.load(plan, progress=False)
        for stage, report in zip(plan.stages, reports, strict=True):
            assert report.device_bytes.get("disk", 0) == stage.disk_bytes
            assert report.device_bytes["cpu"] == stage.weight_bytes
        stages, ours = Stages(folder, 1), texts()
        stages.stages = [AsOneStage(pipeline)]
        given.append((plan, stages.generate(ours), torch.stack([torch.stack(text.logits) for text in ours])))
    (whole, tokens, logits), (offloaded, ours, our_logits) = given
    assert not whole.is_offloaded and all(stage.disk_blocks for stage in offloaded.stages)
    assert ours == tokens and torch.equal(our_logits, logits)
