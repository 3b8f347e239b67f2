"""Transformers' own blocks over ragged rows: the tokens of generate(); models that cannot are refused by name."""

import pytest
import torch
from ragged import NO_INT8, ROUNDED_TO_16_BITS, Stages, assert_generates_as, loaded_stages, room_for
from tiny import SIZES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bigint8 import BigInt8Error, Int8Config, load_sharded_int8
from bigint8.model.general import NAME, GeneralStage, refuse_other_attention
from bigint8.model.open_stage import open_stage


def saved(folder, kind, tied=True, **others):
    tiny_model(kind, tied, torch.float32, **others).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_sequences_that_run_together_give_the_tokens_of_each_by_itself(tmp_path, kind, tied):
    saved(tmp_path, kind, tied)
    model = tiny_model(kind, tied, torch.float32)
    for count in (1, 3):
        assert_generates_as(model, Stages(tmp_path, count, general=True, skip_modules=NO_INT8))


@pytest.mark.parametrize("kind", ["llama", "opt-350m", "bloom"])
def test_int8_weights_give_the_tokens_of_one_process(tmp_path, kind):
    saved(tmp_path, kind)
    model = load_sharded_int8(
        tmp_path, "cpu", config=Int8Config(activations="16bit"), dtype="float32", context=64, progress=False
    )
    assert_generates_as(model, Stages(tmp_path, 2, general=True, activations="16bit"), ROUNDED_TO_16_BITS)


WITHOUT_RECIPE = {
    "an activation": ("llama", {"hidden_act": "quick_gelu"}),
    "the residual stream from the normed values": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "scores by the number of the block": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "scores that are not scaled": ("gpt2", {"scale_attn_weights": False}),
}


@pytest.mark.parametrize("name", WITHOUT_RECIPE)
def test_models_without_a_recipe_take_it(tmp_path, name):
    kind, others = WITHOUT_RECIPE[name]
    saved(tmp_path, kind, **others)
    stages = Stages(tmp_path, 2, skip_modules=NO_INT8)
    assert all(isinstance(stage, GeneralStage) for stage in stages.stages)
    assert_generates_as(tiny_model(kind, True, torch.float32, **others), stages)


def test_values_of_16_bits_run_on_the_cpu_too(tmp_path):
    """Between the stages they are float32."""
    saved(tmp_path, "qwen3")
    whole = Stages(tmp_path, 1, skip_modules=NO_INT8, general=True)
    half = Stages(tmp_path, 2, skip_modules=NO_INT8, general=True, dtype="bfloat16")
    rows, pages = [(5, 0, 0), (17, 1, 0), (9, 0, 1)], [[{0: 7}], [{0: 3}]]
    found, expected = half.run(rows, 0, pages, [1, 2]), whole.run(rows, 0, pages, [1, 2])
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.99


def test_the_pools_are_as_large_as_those_of_fused_stages(tmp_path):
    saved(tmp_path, "qwen2")
    for general, fused in zip(loaded_stages(tmp_path, 2)[0], loaded_stages(tmp_path, 2)[0], strict=True):
        _, spec = loaded_stages(tmp_path, 2)
        room = room_for(spec.known_layout)
        stage = GeneralStage(general, spec.known_layout, room)
        assert stage.kv_bytes == open_stage(fused, spec, room).kv_bytes


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("gptj", {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}),
        ("falcon", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}),
        ("mpt", {"d_model": 16, "n_layers": 1, "n_heads": 2}),
    ],
)
def test_a_model_with_an_attention_of_its_own_is_refused_by_name(kind, sizes):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=32, **sizes))
    with pytest.raises(BigInt8Error, match=rf"\({kind}\) brings an attention of its own.*load_sharded_int8"):
        refuse_other_attention(model)


def test_a_model_that_goes_through_the_interface_is_not():
    config = AutoConfig.for_model(
        "olmo", vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    refuse_other_attention(AutoModelForCausalLM.from_config(config))


class _Caller(torch.nn.Module):
    """What calls an attention function: a module that knows which block it is in."""

    layer_idx = 0


def test_attention_that_ours_does_not_do_is_refused(tmp_path):
    (stage,), spec = loaded_stages(saved(tmp_path, "llama"), 1)
    ragged = GeneralStage(stage, spec.known_layout, room_for(spec.known_layout))._attention
    attend, x = ALL_ATTENTION_FUNCTIONS[NAME], torch.zeros(1, 2, 3, 8)
    with pytest.raises(BigInt8Error, match=r"_Caller asks for softcap.*load_sharded_int8"):
        attend(_Caller(), x, x, x, None, softcap=30.0, ragged=ragged)
    with pytest.raises(BigInt8Error, match="_Caller asks for attention of another shape"):
        attend(_Caller(), x, x, x[..., :4], None, ragged=ragged)
    with pytest.raises(BigInt8Error, match="_Caller keeps to itself what the model is called with"):
        attend(_Caller(), x, x, x, None)
    with pytest.raises(BigInt8Error, match="sliding window of 5, but its pages are planned for None"):
        attend(_Caller(), x, x, x, None, sliding_window=5, ragged=ragged)


def test_a_block_that_does_not_attend_is_refused(tmp_path):
    (stage,), spec = loaded_stages(saved(tmp_path, "llama"), 1)

    class Silent(torch.nn.Module):
        def forward(self, hidden_states, **_):
            return hidden_states, None

    stage.blocks[2].self_attn = Silent()
    with pytest.raises(BigInt8Error, match="block 2 of this stage does not attend through transformers' interface"):
        GeneralStage(stage, spec.known_layout, room_for(spec.known_layout))
