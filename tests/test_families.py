"""The byte counts of every family, exact, against the transformers model that is really built."""

import pytest
import torch
from bigint8_kernels.step import PAGE
from tiny import SIZES, save_tiny, tiny_config, tiny_model
from transformers import AutoConfig

from bigint8.errors import PlanError
from bigint8.families.table import FAMILIES, family_of, layout_of
from bigint8.model.skeleton import build_skeleton, skeleton_of
from bigint8.model.stage import StageModel
from bigint8.options import PAGE_TOKENS, Int8Config, Workload
from bigint8.plan.memory import pages
from bigint8.session import find_model
from bigint8.sources.presets import find_preset, preset_names

BYTES = {torch.float16: 2, torch.float32: 4}


def slot_bytes(slots):
    return sum(slot.nbytes for slot in slots.values())


def stage_of(skeleton, layout, first, last):
    names = [module.name for module in layout.stage(first, last)]
    return StageModel(skeleton, family_of(skeleton.model.config.model_type), names)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_stage_bytes_are_those_of_the_real_stage(kind, tied):
    layout = layout_of(tiny_config(kind, tied).to_dict())
    for dtype, size in BYTES.items():
        blocks = len(layout.blocks)
        for first, last in ((0, blocks), (0, 1), (1, 3), (blocks - 2, blocks)):
            skeleton = build_skeleton(tiny_config(kind, tied), Int8Config(), dtype)
            stage = stage_of(skeleton, layout, first, last)
            assert layout.part(first, last).weight_bytes(size) == slot_bytes(stage.slots), (first, last)


@pytest.mark.parametrize("int8_head", [False, True], ids=["head16", "head8"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_stage_bytes_of_a_float32_model_count_the_tables_that_stay_16_bit(kind, tied, int8_head, tmp_path):
    found = find_model(save_tiny(kind, tied, tmp_path), Int8Config(int8_head=int8_head))
    layout = found.spec.known_layout
    for first, last in ((0, 1), (1, len(layout.blocks))):
        skeleton = skeleton_of(found.checkpoint, found.spec, "float32")
        stage = stage_of(skeleton, layout, first, last)
        assert layout.part(first, last).weight_bytes(4) == slot_bytes(stage.slots), (first, last)


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_a_page_holds_the_keys_and_values_of_its_tokens_in_one_block(kind):
    layout = layout_of(tiny_config(kind, True).to_dict())
    ids = torch.randint(3, 100, (1, PAGE_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = tiny_model(kind, True, torch.float32)(ids, use_cache=True).past_key_values
    assert len(cache.layers) == len(layout.blocks)
    for block, layer in enumerate(cache.layers):
        window = layout.sizes.windows[block]
        kept = PAGE_TOKENS if window is None else window - 1  # transformers keeps what the next token sees
        assert layer.keys.shape[2] == kept
        assert layout.page_bytes(4) * kept == (layer.keys.nbytes + layer.values.nbytes) * PAGE_TOKENS


def test_a_pool_has_the_whole_context_of_each_sequence_or_its_window_and_the_chunks_that_run():
    layout = layout_of(tiny_config("qwen2", True).to_dict())
    assert layout.groups == (None, 8) and [layout.group_of(b) for b in range(4)] == [0, 0, 1, 1]
    assert pages(layout, Workload(context=100, sequences=3, chunk=32), 1) == (21, 3 * 2 + 2)
    assert pages(layout, Workload(context=100, sequences=3, chunk=32), 2) == (21, 3 * 2 + 3 * 2)
    assert pages(layout, Workload(context=10, sequences=3, chunk=32), 1) == (3, 3)
    assert PAGE_TOKENS == PAGE


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
    whole = layout.part(0, len(layout.blocks))
    assert (whole.int8_values + whole.other_values) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_an_unknown_family_is_told_which_there_are():
    with pytest.raises(PlanError) as error:
        layout_of({"model_type": "mamba"})
    assert "mamba" in str(error.value)
    for family in FAMILIES:
        assert family.name in str(error.value)


def test_a_config_without_a_size_is_refused():
    with pytest.raises(PlanError, match="num_hidden_layers: None"):
        layout_of({"model_type": "opt"})
    with pytest.raises(PlanError, match="hidden_size"):
        layout_of({"model_type": "opt", "num_hidden_layers": 2})
