"""The byte counts of every family, exact, against the transformers model that is really built."""

import pytest
import torch
from tiny import SIZES, save_tiny, tiny_config, tiny_model
from transformers import AutoConfig

from bigint8.checkpoint.headers import open_checkpoint
from bigint8.errors import PlanError
from bigint8.families.table import FAMILIES, family_of, layout_of
from bigint8.model.config import read_hf_config
from bigint8.model.skeleton import build_skeleton, checkpoint_skeleton
from bigint8.model.stage import StageModel
from bigint8.options import Int8Config
from bigint8.sources.presets import find_preset, preset_names

BYTES = {torch.float16: 2, torch.float32: 4}


def slot_bytes(slots):
    return sum(slot.nbytes for slot in slots.values())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_stage_bytes_are_those_of_the_real_stage(kind, tied):
    layout = layout_of(tiny_config(kind, tied).to_dict())
    for dtype, size in BYTES.items():
        blocks = len(layout.blocks)
        for first, last in ((0, blocks), (0, 1), (1, 3), (blocks - 2, blocks)):
            config = tiny_config(kind, tied)
            skeleton = build_skeleton(config, Int8Config(), dtype)
            stage = StageModel(skeleton, family_of(config.model_type), first, last)
            assert stage_part(layout, first, last).weight_bytes(size) == slot_bytes(stage.slots), (first, last)


@pytest.mark.parametrize("int8_head", [False, True], ids=["head16", "head8"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_stage_bytes_of_a_float32_model_count_the_tables_that_stay_16_bit(kind, tied, int8_head, tmp_path):
    checkpoint = open_checkpoint(save_tiny(kind, tied, tmp_path))
    config = Int8Config(int8_head=int8_head)
    layout = layout_of(checkpoint.config, int8_head, "float16")
    blocks = len(layout.blocks)
    for first, last in ((0, 1), (1, blocks)):
        hf_config = read_hf_config(checkpoint, False)
        skeleton = checkpoint_skeleton(checkpoint, hf_config, config, "float32", False)
        stage = StageModel(skeleton, family_of(hf_config.model_type), first, last)
        assert stage_part(layout, first, last).weight_bytes(4) == slot_bytes(stage.slots), (first, last)


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_cache_bytes_are_those_of_a_real_cache(kind):
    layout = layout_of(tiny_config(kind, True).to_dict())
    ids = torch.randint(3, 100, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = tiny_model(kind, True, torch.float32)(ids, use_cache=True).past_key_values
    assert len(cache.layers) == len(layout.blocks)
    for block, layer in enumerate(cache.layers):
        assert layout.kv_bytes(block, 50, 2, 4) == layer.keys.nbytes + layer.values.nbytes


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_model_of_its_bytes(name):
    preset = find_preset(name)
    values = dict(preset.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    skeleton = build_skeleton(config, Int8Config(), torch.float16)
    layout = layout_of(preset.config)
    assert layout.weight_bytes(2) == slot_bytes(skeleton.slots)
    assert layout == layout_of(config.to_dict())


@pytest.mark.parametrize(
    ("name", "billions"),
    [("opt-175b", 174.6), ("bloom-176b", 176.2), ("gpt-neox-20b", 20.55), ("llama-65b", 65.3), ("gpt2-xl", 1.56)],
)
def test_presets_have_the_published_number_of_parameters(name, billions):
    layout = layout_of(find_preset(name).config)
    parts = [layout.embeddings, *layout.blocks, layout.final, layout.head]
    assert sum(part.int8_values + part.other_values for part in parts) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_an_unknown_family_is_told_which_there_are():
    with pytest.raises(PlanError) as error:
        layout_of({"model_type": "mamba"})
    assert "mamba" in str(error.value)
    for family in FAMILIES:
        assert family.name in str(error.value)


def test_a_config_without_a_size_is_refused():
    with pytest.raises(PlanError, match="hidden_size"):
        layout_of({"model_type": "opt"})
