"""Loading in one process: every family, every odd checkpoint that people have, exact values and exact bytes."""

import gc
import json

import pytest
import torch
from bigint8_kernels import reference
from safetensors.torch import load_file, save_file
from tiny import SIX_FAMILIES, SIZES, save_tiny, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from bigint8 import CheckpointError, Int8Config, Int8Linear, load_sharded_int8, make_int8_linear
from bigint8.checkpoint.headers import open_checkpoint
from bigint8.model.layers import Linear16bit, is_linear
from bigint8.model.skeleton import Skeleton, Slot, keep_16bit_tables

PROMPT = torch.tensor([[5, 17, 99, 3, 42, 7]])


def load(folder, **kwargs):
    return load_sharded_int8(folder, progress=False, context=64, **kwargs)


def by_hand(kind, tied, dtype=torch.float16, compute=torch.float32):
    """The same model, made int8 layer by layer with the reference, without the loader."""
    model = tiny_model(kind, tied, dtype).to(compute)
    for name, module in list(model.named_modules()):
        if is_linear(module) and name != "lm_head":
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, make_int8_linear(module))
    return model.eval()


def greedy(model, ids=PROMPT, tokens=8, **kwargs):
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        **kwargs,
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_a_loaded_model_is_the_one_converted_by_hand(kind, tied, tmp_path):
    save_tiny(kind, tied, tmp_path)
    model = load(tmp_path, dtype="float32")
    expected = by_hand(kind, tied)
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    with torch.no_grad():
        hidden, logits = (model(PROMPT, output_hidden_states=True)[key] for key in ("hidden_states", "logits"))
        assert torch.equal(hidden[-1], expected(PROMPT, output_hidden_states=True).hidden_states[-1])
        assert torch.allclose(logits, expected(PROMPT).logits, rtol=1e-5, atol=1e-6)  # the head sums in another order
    assert torch.equal(greedy(model), greedy(expected))
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) >= 4 * len(ours) // 40


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_every_dtype_are_quantized_from_their_own_bits(stored, tmp_path):
    save_tiny("llama", False, tmp_path, stored)
    model = load(tmp_path)
    name = "model.layers.1.mlp.down_proj"
    original = tiny_model("llama", False, stored).get_submodule(name).weight
    q, scale = reference.quantize_rows(original)
    layer = model.get_submodule(name)
    assert torch.equal(layer.weight, q) and torch.equal(layer.scale, scale)


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "opt"])
def test_a_checkpoint_saved_from_the_base_model_loads(kind, tmp_path):
    """Its names lack the prefix, as in the published BLOOM, GPT-2 and OPT."""
    model = tiny_model(kind, True)
    model.base_model.save_pretrained(tmp_path, max_shard_size="60KB")
    tiny_config(kind, True).save_pretrained(tmp_path)
    prefix = model.base_model_prefix
    assert not any(name.startswith(f"{prefix}.") for name in open_checkpoint(tmp_path).tensors)
    assert torch.equal(greedy(load(tmp_path, dtype="float32")), greedy(by_hand(kind, True)))


def test_the_old_name_of_the_gpt_neox_head_is_known(tmp_path):
    save_tiny("gpt_neox", False, tmp_path / "new", shard="10GB")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    head = tensors.pop("embed_out.weight" if "embed_out.weight" in tensors else "lm_head.weight")
    (tmp_path / "old").mkdir()
    masks = {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
    save_file(tensors | {"embed_out.weight": head} | masks, tmp_path / "old" / "model.safetensors")
    tiny_config("gpt_neox", False).save_pretrained(tmp_path / "old")
    model = load(tmp_path / "old", dtype="float32")
    assert torch.equal(model.lm_head.weight, head.float())
    assert model.load_report.unused == ["gpt_neox.layers.0.attention.bias"]


def test_a_tied_pair_is_read_once_whichever_name_was_saved(tmp_path):
    save_tiny("llama", True, tmp_path / "a", shard="10GB")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    for folder, extra in (("both", {"lm_head.weight": embeddings.clone()}), ("head", {})):
        (tmp_path / folder).mkdir()
        copied = dict(tensors)
        if folder == "head":
            copied["lm_head.weight"] = copied.pop("model.embed_tokens.weight")
        save_file(copied | extra, tmp_path / folder / "model.safetensors")
        tiny_config("llama", True).save_pretrained(tmp_path / folder)
        model = load(tmp_path / folder, dtype="float32")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.load_report.bytes_read == sum(t.nbytes for t in tensors.values())
        assert model.load_report.unused == (["lm_head.weight"] if folder == "both" else [])
        assert torch.equal(model.model.embed_tokens.weight, embeddings.float())


@pytest.mark.parametrize("model_type", ["stablelm", "gemma"])
def test_an_unknown_family_loads_in_one_process(model_type, tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        model_type, vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    with torch.no_grad():
        expected, logits = model.eval()(PROMPT).logits, loaded(PROMPT).logits
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert loaded.load_report.device_bytes["cpu"] < sum(p.nbytes for p in model.parameters())


def test_the_memory_footprint_is_the_bytes_that_are_there(tmp_path):
    save_tiny("opt", True, tmp_path)
    model = load(tmp_path)
    weights = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert model.get_memory_footprint() == sum(weights.values())
    assert model.load_report.device_bytes == {"cpu": sum(weights.values())}


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_stay_as_they_are_stored_where_the_model_computes_in_float32(tied, stored, tmp_path):
    save_tiny("llama", tied, tmp_path, stored)
    model = load(tmp_path, dtype="float32")
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embeddings.weight.dtype == head.weight.dtype == stored
    assert (embeddings.weight is head.weight) == tied
    assert embeddings(PROMPT).dtype == model(PROMPT).logits.dtype == model.dtype == torch.float32
    model.bfloat16()
    assert embeddings.weight.dtype == stored and embeddings(PROMPT).dtype == model.dtype == torch.bfloat16
    assert model(PROMPT).logits.dtype == torch.bfloat16
    for folder, dtype in ((tmp_path, "bfloat16"), (save_tiny("llama", tied, tmp_path / "32", torch.float32), "auto")):
        model = load(folder, dtype=dtype)
        assert model.get_output_embeddings().weight.dtype == model.dtype


def test_embeddings_that_do_more_than_look_up_take_the_models_dtype(tmp_path):
    """Gemma scales its embeddings, and its head is tied to them."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "gemma2", vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(config).half()
    original.save_pretrained(tmp_path)
    model = load(tmp_path, dtype="float32")
    plain = type(original.get_input_embeddings()) is torch.nn.Embedding
    assert model.get_input_embeddings().weight.dtype == (torch.float16 if plain else torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        expected, logits = original.float().eval()(PROMPT).logits, model(PROMPT).logits
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_model_whose_embeddings_transformers_cannot_find_keeps_its_head_16_bit():
    class Headed(PreTrainedModel):
        def __init__(self):
            super().__init__(PretrainedConfig())
            self.first, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 9)

    model = Headed()
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    slot = Slot("head.weight", model.head, "weight", (9, 4))
    skeleton = Skeleton(model, {"head.weight": slot}, {}, "head")
    keep_16bit_tables(skeleton, {"head.weight": "F16"})
    assert isinstance(model.head, Linear16bit) and slot.module is model.head and slot.dtype == torch.float16
    assert type(model.first) is torch.nn.Linear


def test_settings_reach_every_layer(tmp_path):
    save_tiny("llama", False, tmp_path)
    config = Int8Config(threshold=2.5, activations="int8", skip_modules=["lm_head", "down_proj"])
    model = load(tmp_path, config=config, dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.threshold == 2.5
    assert model.model.layers[0].mlp.up_proj.activations == "int8"
    assert model.model.layers[1].mlp.down_proj.weight.dtype == torch.bfloat16
    assert model.dtype == torch.bfloat16
    headless = load(tmp_path, config=Int8Config(skip_modules=[]))
    assert isinstance(headless.lm_head, Int8Linear)


def test_an_explicit_device_map_is_honoured(tmp_path):
    save_tiny("llama", False, tmp_path)
    expected = greedy(load(tmp_path))
    for device_map in ("cpu", {"": "cpu"}, {"model": "cpu", "lm_head": torch.device("cpu")}):
        model = load(tmp_path, device_map=device_map)
        assert torch.equal(greedy(model), expected)
        assert set(model.hf_device_map.values()) == {"cpu"}


def test_modules_on_disk_are_mapped_files_and_compute_the_same(tmp_path):
    save_tiny("gpt2", True, tmp_path / "model")
    expected = greedy(load(tmp_path / "model"))
    device_map = {"transformer.h.1": "disk", "transformer.h.2.mlp": "disk", "": "cpu"}
    model = load(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "off")
    assert model.hf_device_map["transformer.h.1"] == "disk"
    assert torch.equal(greedy(model), expected)
    (folder,) = (tmp_path / "off").iterdir()
    written = {file.name for file in folder.iterdir()}
    assert "transformer.h.1.mlp.c_fc.weight.dat" in written and "transformer.h.0.mlp.c_fc.weight.dat" not in written
    layer = model.transformer.h[1].mlp.c_fc
    stored = torch.from_file(
        str(folder / "transformer.h.1.mlp.c_fc.weight.dat"), size=layer.weight.numel(), dtype=torch.int8
    )
    assert torch.equal(stored.view_as(layer.weight), layer.weight)
    del model, layer
    gc.collect()
    assert not folder.exists()


def test_what_does_not_fit_spills_to_the_offload_folder(tmp_path):
    save_tiny("llama", False, tmp_path / "model")
    (whole,) = load(tmp_path / "model").plan.stages
    limit = {"cpu": whole.workspace_bytes + (whole.weight_bytes + whole.kv_bytes) * 2 // 3}
    model = load(tmp_path / "model", max_memory=limit, offload_folder=tmp_path / "off")
    assert {"cpu", "disk"} == set(model.hf_device_map.values())
    assert model.plan.stages[0].disk_blocks and (tmp_path / "off").is_dir()
    assert torch.equal(greedy(model), greedy(load(tmp_path / "model")))


def test_generation_settings_of_the_checkpoint_are_kept(tmp_path):
    save_tiny("llama", False, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 77, "max_length": 33}))
    model = load(tmp_path)
    assert model.generation_config.eos_token_id == 77
    assert model.generation_config.max_length == 33


@pytest.mark.parametrize("kind", SIX_FAMILIES)
def test_a_padded_batch_gives_what_its_prompts_give_alone(kind, tmp_path):
    save_tiny(kind, True, tmp_path)
    model = load(tmp_path, dtype="float32", config=Int8Config(activations="16bit"))
    long, short = torch.tensor([9, 8, 7, 6, 5]), torch.tensor([11, 12])
    padded = torch.stack([long, torch.cat([torch.zeros(3, dtype=torch.long), short])])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    batch = model.generate(input_ids=padded, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(batch[0, 5:], greedy(model, long[None], 6)[0, 5:])
    assert torch.equal(batch[1, 5:], greedy(model, short[None], 6)[0, 2:])


# --- on a GPU, where there is one --------------------------------------------------------------------------------

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@on_a_gpu
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", SIX_FAMILIES)
def test_a_gpu_holds_what_the_cpu_would(kind, stored, tmp_path):
    save_tiny(kind, True, tmp_path, stored)
    ours, expected = (
        load(tmp_path, device_map="cuda:0", dtype="float16"),
        load(tmp_path, device_map="cpu", dtype="float16"),
    )
    theirs = expected.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    for name, tensor in ours.state_dict().items():
        assert tensor.is_cuda and torch.equal(tensor.cpu(), theirs[name]), name
    with torch.no_grad():
        logits = expected(PROMPT).logits.float()
        assert (ours(PROMPT.cuda()).logits.cpu().float() - logits).abs().max() < 0.02 * logits.abs().max()


@on_a_gpu
@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN or infinity"), (1e6, "too large for")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_gpu_notices_values_that_no_weight_has(name, value, said, tmp_path):
    save_tiny("llama", False, tmp_path / "a", torch.float32, shard="10GB")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    if value == 1e6 and name.endswith("up_proj.weight"):
        load(tmp_path / "a", device_map="cuda:0", dtype="float16")  # int8 holds it
        return
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path / "a", device_map="cuda:0", dtype="float16")
