"""Fused stages: the tokens of transformers' generate(), with many sequences in a step, over one stage or several."""

import dataclasses
import gc
import time
import weakref
from typing import get_args

import numpy as np
import pytest
import torch
from bigint8_kernels import step as kernels_step
from bigint8_kernels.step import PAGE
from pretend import pretending
from pretend_cuda import install
from ragged import (
    NO_INT8,
    ROUNDED_TO_16_BITS,
    ROUNDED_TO_INT8,
    Stages,
    Text,
    assert_close,
    assert_generates_as,
    generated_by,
    loaded_stages,
    room_for,
    texts,
)
from tiny import SIZES, tiny_model
from transformers import AutoConfig

from bigint8 import BigInt8Error, Int8Config, load_sharded_int8
from bigint8.families import layout as families_layout
from bigint8.families.table import FAMILIES, family_of
from bigint8.model.fused import alibi_slopes, fuse
from bigint8.model.fused_stage import FusedStage
from bigint8.model.open_stage import open_stage
from bigint8.model.ragged import Room
from bigint8.model.step import Step
from bigint8.session import quantize

KINDS = sorted(SIZES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models, saved once."""
    made = {}

    def folder(kind, tied=True, **others):
        key = kind, tied, repr(others)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(kind)
            tiny_model(kind, tied, torch.float32, **others).save_pretrained(made[key])
        return made[key]

    return folder


def in_one_process(folder, **config):
    return load_sharded_int8(
        folder, "cpu", config=Int8Config(**config), dtype="float32", context=64, batch_size=4, progress=False
    )


# --- the tokens of generate() ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_that_run_together_give_the_tokens_of_each_by_itself(folders, kind, tied, count):
    folder = folders(kind, tied)
    stages = Stages(folder, count, skip_modules=NO_INT8)
    assert all(isinstance(stage, FusedStage) for stage in stages.stages)
    assert_generates_as(tiny_model(kind, tied, torch.float32), stages)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_int8_weights_give_the_tokens_of_transformers_modules(folders, kind, tied):
    """With 16-bit activations both compute the same."""
    folder = folders(kind, tied)
    model = in_one_process(folder, activations="16bit")
    assert_generates_as(model, Stages(folder, 2, activations="16bit"), ROUNDED_TO_16_BITS)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_activations_give_the_tokens_of_transformers_modules(folders, kind):
    """Without outliers both compute the same, but for what rounds to the next int8 value."""
    config = {"activations": "int8", "threshold": 0.0}
    assert_generates_as(in_one_process(folders(kind), **config), Stages(folders(kind), 1, **config), ROUNDED_TO_INT8)


@pytest.mark.parametrize("kind", KINDS)
def test_each_block_gives_the_hidden_states_of_transformers(folders, kind):
    """A stage for each block; the last one's are normed."""
    model, tokens = tiny_model(kind, True, torch.float32), [5, 17, 99, 3]
    with torch.no_grad():
        expected = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    stages = Stages(folders(kind), len(expected) - 1, skip_modules=NO_INT8)
    places = np.arange(len(tokens), dtype=np.int32)
    tables = np.zeros((len(stages.layout.groups), 1, 1), np.int32)
    step = Step(0, np.array(tokens, np.int32), places, places, 0 * places, 0, tables, places)
    hidden = None
    for stage, values in zip(stages.stages, expected[1:], strict=True):
        hidden = stage.run(step, hidden)
        assert hidden is not None
        if stage is not stages.stages[-1] or kind != "opt-350m":  # whose narrow ones transformers does not show
            assert_close(hidden, values[0])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_16_bits_compute_in_float32_on_the_cpu(tmp_path, kind):
    model = tiny_model(kind, False, torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_generates_as(model.float(), Stages(tmp_path, 2, skip_modules=NO_INT8, dtype="bfloat16"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_does_not_depend_on_what_runs_with_it(folders, kind):
    """Not in a single bit: int8 layers, prompts in int8, generated tokens with 16-bit activations."""
    together = texts()
    Stages(folders(kind), 2).generate(together)
    for text in together:
        alone = Text(text.tokens[: text.prompt])
        Stages(folders(kind), 1).generate([alone])
        assert torch.equal(torch.stack(alone.logits), torch.stack(text.logits))


@pytest.mark.parametrize("way", ["fused", "general"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_everything_is_on_the_gpu(folders, kind, way, monkeypatch):
    """The GPU is not there: what is checked is what meets, and that the values are those of the CPU."""
    install(monkeypatch, gpus=1, find_races=False)
    rows, pages = [(5, 0, 0), (17, 1, 0), (9, 0, 1), (33, 0, 2)], [[{0: page}] * 2 for page in range(3)]
    config = {"general": way == "general", "activations": "16bit", "int8_head": True}
    expected = Stages(folders(kind), 2, **config).run(rows, 0, pages, [1, 2, 3])
    with pretending():
        stages = Stages(folders(kind), 2, device="cuda:0", **config)
        found = stages.run(rows, 0, pages, [1, 2, 3])
        assert str(found.device) == "cuda:0"
    assert_close(found.held, expected, ROUNDED_TO_16_BITS)


UNUSUAL = {
    "biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "heads of another width": ("llama", {"head_dim": 16}),
    "scaled positions": (
        "llama",
        {"rope_scaling": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }},
    ),
    "yarn": ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}),
    "no window": ("mistral", {"sliding_window": None}),
    "gelu, no biases": ("opt", {"activation_function": "gelu", "enable_bias": False}),
    "norms without weights": ("opt", {"layer_norm_elementwise_affine": False}),
    "no final norm": ("opt", {"_remove_final_layer_norm": True}),
    "heads that are no power of two": ("bloom", {"n_head": 12}),
    "one after the other": ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu_fast"}),
    "half of a head": ("gpt_neox", {"rotary_pct": 0.5, "attention_bias": False}),
    "inner width": ("gpt2", {"n_inner": 80, "activation_function": "relu"}),
    "norms of heads": ("phi", {"qk_layernorm": True}),
    "shared heads": ("phi", {"num_key_value_heads": 2, "partial_rotary_factor": 0.34}),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_configs_ask_for_besides(folders, name):
    kind, others = UNUSUAL[name]
    folder = folders(kind, False, **others)
    stages = Stages(folder, 2, skip_modules=NO_INT8)
    assert all(isinstance(stage, FusedStage) for stage in stages.stages)
    assert_generates_as(tiny_model(kind, False, torch.float32, **others), stages)


@pytest.mark.parametrize("kind", ["llama", "opt-350m", "bloom"])
def test_an_int8_head_and_its_embeddings(folders, kind):
    config = {"int8_head": True, "activations": "16bit"}
    assert_generates_as(in_one_process(folders(kind), **config), Stages(folders(kind), 3, **config), ROUNDED_TO_16_BITS)


def test_rows_of_prompts_have_int8_activations_and_generated_ones_16_bits(folders):
    """In the same step: the first rows as where all are 16-bit, the others as where all are int8."""
    rows = [(5, 0, 0), (17, 0, 1), (99, 0, 2), (3, 1, 2), (42, 0, 3)]
    found = {}
    for activations in ("auto", "16bit", "int8"):
        stages = Stages(folders("llama"), 1, activations=activations)
        found[activations] = stages.run(rows, 2, [[{0: page}] for page in range(4)], range(5))
    assert torch.allclose(found["auto"][:2], found["16bit"][:2], atol=1e-5)
    assert torch.allclose(found["auto"][2:], found["int8"][2:], atol=1e-5)
    assert not torch.allclose(found["16bit"], found["int8"], atol=1e-3)


# --- pages -------------------------------------------------------------------------------------------------------


def test_pages_before_the_window_are_no_longer_needed(folders):
    stages = Stages(folders("mistral", False), 2, skip_modules=NO_INT8)
    long = Text([5, 17, 99], new=70)
    free = len(stages.free[0])
    assert stages.generate([long])[0] == generated_by(tiny_model("mistral", False, torch.float32), long)[0]
    assert free - len(stages.free[0]) <= 2 < len(long.tokens) // PAGE


@pytest.mark.parametrize("kind", ["qwen2", "opt"])
def test_a_copied_page_is_a_page_of_its_own(folders, kind):
    """A sequence goes on from a copy of another's page in every group, before the step writes to either."""
    stages = Stages(folders(kind), 2, skip_modules=NO_INT8)
    groups = range(len(stages.layout.groups))
    first, second = [{0: 7} for _ in groups], [{0: 3} for _ in groups]
    tokens = [5, 17, 99, 3]
    stages.run([(token, place, 0) for place, token in enumerate(tokens)], 0, [first], [])
    copies = [(group, 7, 3) for group in groups]
    both = stages.run([(42, 4, 0), (61, 4, 1)], 2, [first, second], [0, 1], copies)
    again = stages.run([(8, 5, 0), (8, 5, 1)], 2, [first, second], [0, 1])
    model = tiny_model(kind, True, torch.float32)
    for i, token in enumerate((42, 61)):
        with torch.no_grad():
            expected = model(torch.tensor([[*tokens, token, 8]])).logits[0]
        assert_close(torch.stack([both[i], again[i]]), expected[4:])


def test_the_pools_are_all_pages_of_all_blocks(folders):
    stages, spec = loaded_stages(folders("qwen2"), 2)
    layout, room = spec.known_layout, room_for(spec.known_layout)
    assert len(layout.groups) == 2
    room = dataclasses.replace(room, pages=(5, 3), dtype=torch.float16)
    for stage in stages:
        pages = sum(room.pages[layout.group_of(index)] for index in stage.indices)
        assert open_stage(stage, spec, room).kv_bytes == pages * PAGE * layout.sizes.kv_values * 2


def test_rows_that_are_no_token_change_nothing(folders):
    stages = Stages(folders("llama"), 1, skip_modules=NO_INT8)
    alone = stages.run([(5, 0, 0), (17, 1, 0)], 0, [[{0: 7}]], [1])
    stages = Stages(folders("llama"), 1, skip_modules=NO_INT8)
    beside = stages.run([(5, 0, 0), (17, 1, 0), (0, 0, 1), (0, 0, 1)], 0, [[{0: 7}], [{0: -1}]], [1])
    assert torch.allclose(alone, beside, atol=1e-5)


def test_more_rows_than_there_is_room_for_are_refused(folders):
    stages, spec = loaded_stages(folders("llama"), 1)
    room = Room((4,), 4, 3, torch.float32, torch.device("cpu"))
    rows = np.zeros(4, np.int32)
    step = Step(9, rows, rows, rows, rows, 0, np.zeros((1, 1, 1), np.int32))
    with pytest.raises(BigInt8Error, match="step 9 has 4 rows, but there is room for 3"):
        open_stage(stages[0], spec, room).run(step, None)


def test_memory_is_given_back_when_a_stage_goes(folders):
    """At once, not when Python next looks for circles: a GPU may be loaded anew."""
    (stage,), spec = loaded_stages(folders("bloom"), 1)
    ragged = open_stage(stage, spec, room_for(spec.known_layout))
    weight = weakref.ref(stage.blocks[0].mlp.dense_h_to_4h.weight)
    gc.disable()
    try:
        del stage, ragged
        for _ in range(100):  # a thread of the load may just be ending
            if weight() is None:
                break
            time.sleep(0.05)
        assert weight() is None
    finally:
        gc.enable()


# --- weights that lie side by side -------------------------------------------------------------------------------


def first_block(folder, **config):
    """The first block, fused, and the memory of its parameters."""
    (stage,), spec = loaded_stages(folder, 1, **config)
    recipe = stage.family.recipe(spec.config)
    assert recipe is not None
    tensors = [*stage.blocks[0].parameters(), *stage.blocks[0].buffers()]
    return fuse(stage.blocks[0], recipe, None, 0), stage.blocks[0], {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("skip", [None, NO_INT8], ids=["int8", "16-bit"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_the_same_input_are_one_product_over_the_modules_own_memory(folders, kind, skip):
    fused, block, memory = first_block(folders(kind), skip_modules=skip)
    assert (len(fused.qkv), len(fused.up)) == (1, 1)
    for layer in (*fused.qkv, fused.out, *fused.up, fused.down):
        for tensor in (layer.weight, layer.scale, layer.bias):
            assert tensor is None or tensor.untyped_storage().data_ptr() in memory
    if kind == "llama":
        q = block.self_attn.k_proj.weight
        assert torch.equal(fused.qkv[0].weight[48:64], q) and fused.qkv[0].weight[48].data_ptr() == q.data_ptr()


def test_a_layer_that_is_not_int8_stays_apart(folders):
    fused, _, _ = first_block(folders("opt"), skip_modules=["k_proj"])
    assert [layer.scale is None for layer in fused.qkv] == [False, True, False] and len(fused.up) == 1
    model = in_one_process(folders("opt"), skip_modules=["k_proj", "lm_head"], activations="16bit")
    stages = Stages(folders("opt"), 2, skip_modules=["k_proj", "lm_head"], activations="16bit")
    assert_generates_as(model, stages, ROUNDED_TO_16_BITS)


def test_what_is_mapped_from_an_int8_checkpoint_is_not_copied(folders, tmp_path):
    quantize(folders("llama"), tmp_path, progress=False)
    fused, _, memory = first_block(tmp_path)
    assert (len(fused.qkv), len(fused.up)) == (3, 2)
    assert all(layer.weight.untyped_storage().data_ptr() in memory for layer in (*fused.qkv, *fused.up))
    model = in_one_process(tmp_path, activations="16bit")
    assert_generates_as(model, Stages(tmp_path, 2, activations="16bit"), ROUNDED_TO_16_BITS)


# --- recipes -----------------------------------------------------------------------------------------------------


REFUSED = {
    "an activation": ("llama", {"hidden_act": "quick_gelu"}),
    "another": ("opt", {"activation_function": "relu6"}),
    "of the third": ("gpt_neox", {"hidden_act": "mish"}),
    "of the fourth": ("phi", {"hidden_act": "tanh"}),
    "of the fifth": ("gpt2", {"activation_function": "tanh"}),
    "the residual stream from the normed values": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "scores by the number of the block": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "reordered": ("gpt2", {"reorder_and_upcast_attn": True}),
    "not scaled": ("gpt2", {"scale_attn_weights": False}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_there_is_no_recipe_for_what_fused_blocks_do_not_do(name):
    kind, others = REFUSED[name]
    config = AutoConfig.for_model(kind, **others).to_dict()
    assert family_of(kind).recipe(config) is None
    assert family_of(kind).recipe(AutoConfig.for_model(kind).to_dict()) is not None


@pytest.mark.parametrize("model_type", [kind for family in FAMILIES for kind in family.model_types])
def test_a_key_that_config_json_lacks_counts_as_transformers_takes_it(model_type):
    full = AutoConfig.for_model(model_type).to_dict()
    recipe, needed = family_of(model_type).recipe, {"model_type", "hidden_size", "n_embd", "rope_parameters"}
    for key in full.keys() - needed:
        assert recipe({name: value for name, value in full.items() if name != key}) == recipe(full), key
    without_rope = {name: value for name, value in full.items() if name != "rope_parameters"}
    assert recipe(without_rope) == recipe(full)


def test_recipes_name_the_activations_that_the_kernels_know():
    assert get_args(families_layout.Activation) == get_args(kernels_step.Activation)


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 112])
def test_the_slopes_of_alibi_are_those_of_transformers(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    expected = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    assert torch.allclose(alibi_slopes(heads), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_change_with_the_batch_are_refused_by_name(folders, kind):
    others = {
        "dynamic": {"rope_type": "dynamic", "factor": 2.0},
        "longrope": {"rope_type": "longrope", "long_factor": [2.0] * 4, "short_factor": [1.0] * 4, "factor": 4.0},
    }
    folder = folders("llama", True, rope_scaling=others[kind])
    for general in (False, True):
        with pytest.raises(BigInt8Error, match=f"rope_type '{kind}'.*load_sharded_int8"):
            Stages(folder, 1, general=general)
