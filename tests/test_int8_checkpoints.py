"""Int8 checkpoints: what is saved is what loads, bit for bit, here and in transformers with bitsandbytes."""

import gc
import hashlib
import json
import shutil
import weakref
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from bigint8_kernels import reference
from folders import INDEX, quantization_of, read_tensors, rewrite, save_tokenizer, set_config
from tiny import SIZES, save_tiny, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from bigint8 import Int8Config, Int8Linear, load_sharded_int8
from bigint8.checkpoint.headers import open_checkpoint
from bigint8.families.table import family_of, layout_of
from bigint8.model.layers import Int8Embedding
from bigint8.model.skeleton import build_skeleton, skeleton_of
from bigint8.model.stage import StageModel
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import find_devices
from bigint8.run.running import RunningStage
from bigint8.session import find_model, quantize

PROMPT = torch.tensor([[5, 17, 99, 3, 42, 7]])
SHARD = 40_000
"""Bytes: a few shards of a tiny model."""


def load(folder: Path, dtype: Any = "float32", **kwargs: Any) -> Any:
    return load_sharded_int8(folder, progress=False, context=64, dtype=dtype, **kwargs)


def to_int8(source: Path, folder: Path, config: Int8Config | None = None, **kwargs: Any) -> Path:
    quantize(source, folder, config, progress=False, shard_bytes=SHARD, **kwargs)
    return folder


def greedy(model: Any) -> torch.Tensor:
    mask = torch.ones_like(PROMPT)
    tokens = model.generate(
        input_ids=PROMPT, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0
    )  # fmt: skip
    assert isinstance(tokens, torch.Tensor)
    return tokens


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def assert_same_model(ours: Any, theirs: Any) -> None:
    assert_same_tensors(ours.state_dict(), theirs.state_dict())
    assert {n: type(m) for n, m in ours.named_modules()} == {n: type(m) for n, m in theirs.named_modules()}


def file_hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


# --- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8_head", [False, True], ids=["head16", "head8"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_a_saved_model_loads_bit_for_bit_and_quantize_writes_the_same(kind, tied, int8_head, tmp_path):
    source, config = save_tiny(kind, tied, tmp_path / "source"), Int8Config(int8_head=int8_head)
    model = load(source, "float16", config=config)
    model.save_int8(tmp_path / "saved", shard_bytes=SHARD)
    again = load(tmp_path / "saved", "float16")
    assert again.load_report.unused == []
    assert_same_model(again, model)
    if tied:
        assert torch.equal(greedy(again), greedy(model))
    assert again.load_report.device_bytes == model.load_report.device_bytes

    report = quantize(source, tmp_path / "quantized", config, progress=False, shard_bytes=SHARD)
    written = read_tensors(tmp_path / "quantized")
    assert_same_tensors(written, read_tensors(tmp_path / "saved"))
    assert quantization_of(tmp_path / "quantized") == quantization_of(tmp_path / "saved")
    assert report.bytes_written == sum(tensor.nbytes for tensor in written.values())
    assert len(list((tmp_path / "quantized").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_other_dtypes_are_quantized_from_their_own_bits_and_kept_beside_int8(kind, stored, tmp_path):
    source = save_tiny(kind, False, tmp_path / "source", stored)
    folder = to_int8(source, tmp_path / "int8")
    kept = {tensor.dtype for name, tensor in read_tensors(folder).items() if tensor.is_floating_point()}
    assert kept == {stored, torch.float32}  # scales are float32
    assert_same_model(load(folder), load(source))
    assert load(folder, "auto").load_report.dtype == load(source, "auto").load_report.dtype


def test_the_dtype_that_a_model_was_loaded_in_is_the_one_that_is_saved(tmp_path):
    model = load(save_tiny("llama", False, tmp_path / "source"), "bfloat16")
    model.save_int8(tmp_path / "int8")
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["dtype"] == "bfloat16"
    assert read_tensors(tmp_path / "int8")["lm_head.weight"].dtype == torch.bfloat16
    assert_same_model(load(tmp_path / "int8", "bfloat16"), model)


def test_the_layout_is_that_of_bitsandbytes(tmp_path):
    source = save_tiny("gpt2", False, tmp_path / "source")
    tensors = read_tensors(to_int8(source, tmp_path / "int8"))
    original = read_tensors(source)["transformer.h.1.mlp.c_fc.weight"]
    q, scale_R = reference.quantize_rows(original.T)
    layer = "transformer.h.1.mlp.c_fc"
    assert tensors[f"{layer}.weight"].dtype == torch.int8
    assert torch.equal(tensors[f"{layer}.weight"], q)  # (out_features, in_features), unlike the original's
    assert tensors[f"{layer}.SCB"].dtype == torch.float32
    assert torch.equal(tensors[f"{layer}.SCB"], scale_R * 127)
    assert torch.allclose(tensors[f"{layer}.SCB"], original.T.abs().amax(1).float())
    order = tensors[f"{layer}.weight_format"]
    assert (order.dtype, order.shape, int(order)) == (torch.uint8, torch.Size([]), 0)
    config = quantization_of(tmp_path / "int8")
    assert config["quant_method"] == "bitsandbytes" and config["load_in_8bit"] and not config["load_in_4bit"]
    assert config["llm_int8_skip_modules"] == ["lm_head"]


@pytest.mark.parametrize("shard_bytes", [500, 40_000, 10**9])
def test_shards_hold_no_more_than_they_may_unless_a_tensor_is_larger(shard_bytes, tmp_path):
    source = save_tiny("llama", True, tmp_path / "source")
    quantize(source, tmp_path / "int8", progress=False, shard_bytes=shard_bytes)
    shards = sorted((tmp_path / "int8").glob("*.safetensors"))
    tensors = read_tensors(tmp_path / "int8")
    for shard in shards:
        inside = [info for info in open_checkpoint(tmp_path / "int8").tensors.values() if info.file == shard]
        assert len(inside) == 1 or sum(info.nbytes for info in inside) <= shard_bytes
        assert all(info.start % tensors[info.name].itemsize == 0 for info in inside)
    assert (tmp_path / "int8" / INDEX).is_file() == (len(shards) > 1)
    assert_same_model(load(tmp_path / "int8"), load(source))


def test_a_checkpoint_of_the_base_model_and_old_names_are_written_under_the_models_names(tmp_path):
    """As published BLOOM: names lack the prefix."""
    model = tiny_model("bloom", True)
    model.base_model.save_pretrained(tmp_path / "source")
    tiny_config("bloom", True).save_pretrained(tmp_path / "source")
    folder = to_int8(tmp_path / "source", tmp_path / "int8")
    assert all(name.startswith("transformer.") for name in read_tensors(folder))
    assert_same_model(load(folder), load(tmp_path / "source"))


def test_a_layer_larger_than_what_is_read_at_once_is_quantized_whole_where_it_is_transposed(tmp_path, monkeypatch):
    source = save_tiny("gpt2", True, tmp_path / "source")
    expected = read_tensors(to_int8(source, tmp_path / "whole"))
    monkeypatch.setattr("bigint8.load.stream.HOST_BUFFER_BYTES", 1000)
    monkeypatch.setattr("bigint8.load.save.SLICE_BYTES", 1000)
    assert_same_tensors(read_tensors(to_int8(source, tmp_path / "pieces")), expected)
    load(source, "float16").save_int8(tmp_path / "saved")
    assert_same_tensors(read_tensors(tmp_path / "saved"), expected)


def test_a_model_is_saved_without_a_name_to_hold_it_and_its_copy_saves_itself(tmp_path):
    source = save_tiny("llama", False, tmp_path / "source")
    load(source, "float16").save_int8(tmp_path / "held by nothing")
    model = load(source, "float16")
    copy = deepcopy(model)
    assert isinstance(model, LlamaForCausalLM) and type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        copy.lm_head.weight.zero_()
    model.save_int8(tmp_path / "model")
    copy.save_int8(tmp_path / "copy")
    assert_same_tensors(read_tensors(tmp_path / "held by nothing"), read_tensors(tmp_path / "model"))
    assert not read_tensors(tmp_path / "copy")["lm_head.weight"].any()


def test_a_model_that_can_save_itself_gives_its_memory_back_at_once(tmp_path):
    model = load(save_tiny("llama", False, tmp_path / "source"))
    gc.collect()
    gc.disable()
    try:
        weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_a_saved_model_can_be_saved_again(tmp_path):
    source = save_tiny("llama", True, tmp_path / "source")
    load(source, "float16").save_int8(tmp_path / "first")
    load(tmp_path / "first", "float16").save_int8(tmp_path / "second")
    assert_same_tensors(read_tensors(tmp_path / "second"), read_tensors(tmp_path / "first"))


# --- settings ----------------------------------------------------------------------------------------------------


def test_skipped_modules_stay_as_they_are_through_a_round_trip(tmp_path):
    source = save_tiny("llama", False, tmp_path / "source")
    config = Int8Config(skip_modules=("lm_head", "down_proj", "model.layers.1"))
    folder = to_int8(source, tmp_path / "int8", config)
    skipped = quantization_of(folder)["llm_int8_skip_modules"]
    assert "lm_head" in skipped and "model.layers.0.mlp.down_proj" in skipped
    assert "model.layers.1.self_attn.q_proj" in skipped and "model.layers.0.self_attn.q_proj" not in skipped
    model = load(folder)
    assert_same_model(model, load(source, config=config))
    assert type(model.model.layers[3].mlp.down_proj) is nn.Linear
    load(source, "float16", config=config).save_int8(tmp_path / "saved")
    assert quantization_of(tmp_path / "saved") == quantization_of(folder)


def test_the_threshold_is_saved_and_used_unless_another_is_asked_for(tmp_path):
    def threshold_of(model: Any) -> set[float]:
        return {module.threshold for module in model.modules() if isinstance(module, Int8Linear)}

    source = save_tiny("opt", True, tmp_path / "source")
    folder = to_int8(source, tmp_path / "int8", Int8Config(threshold=3.5))
    assert quantization_of(folder)["llm_int8_threshold"] == 3.5
    assert threshold_of(load(folder)) == {3.5}
    assert threshold_of(load(folder, config=Int8Config(activations="int8"))) == {3.5}
    assert threshold_of(load(folder, config=Int8Config(threshold=6.0))) == {6.0}  # even when it is the default
    load(folder).save_int8(tmp_path / "saved")
    assert threshold_of(load(tmp_path / "saved")) == {3.5}


@pytest.mark.parametrize("threshold", [None, "six", -1.0, True])
def test_a_stored_threshold_that_makes_no_sense_is_not_used(threshold, tmp_path):
    folder = to_int8(save_tiny("opt", True, tmp_path / "source"), tmp_path / "int8")
    set_config(folder, quantization_config=quantization_of(folder) | {"llm_int8_threshold": threshold})
    assert load(folder).model.decoder.layers[0].fc1.threshold == 6.0


def test_an_int8_head_can_be_asked_for_when_an_int8_checkpoint_without_one_loads(tmp_path):
    source = save_tiny("llama", True, tmp_path / "source")
    folder = to_int8(source, tmp_path / "int8")
    config = Int8Config(int8_head=True)
    assert_same_model(load(folder, config=config), load(source, config=config))


# --- files of the folder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["save_int8", "quantize"])
def test_tokenizer_and_generation_settings_are_copied_and_the_source_is_not_needed(how, tmp_path):
    source = save_tiny("llama", False, tmp_path / "source")
    save_tokenizer(source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 77, "max_length": 33}))
    (source / "README.md").write_text("of the original")
    model = load(source, "float16")
    if how == "save_int8":
        model.save_int8(tmp_path / "int8", shard_bytes=SHARD)
    else:
        to_int8(source, tmp_path / "int8")
    shutil.rmtree(source)
    assert AutoTokenizer.from_pretrained(tmp_path / "int8")("w5 w17").input_ids == [5, 17]
    again = load(tmp_path / "int8", "float16")
    assert (again.generation_config.eos_token_id, again.generation_config.max_length) == (77, 33)
    assert_same_model(again, model)
    assert {file.suffix for file in (tmp_path / "int8").iterdir()} == {".json", ".safetensors"}
    assert [file.name for file in tmp_path.iterdir()] == ["int8"]


def test_an_index_of_the_source_is_not_copied_beside_a_single_file(tmp_path):
    source = save_tiny("llama", False, tmp_path / "source")
    assert (source / INDEX).is_file()
    quantize(source, tmp_path / "int8", progress=False)
    load(source).save_int8(tmp_path / "saved")
    for folder in (tmp_path / "int8", tmp_path / "saved"):
        assert not list(folder.glob("*.index.json"))
        assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]


# --- mapped files ------------------------------------------------------------------------------------------------


def test_int8_weights_on_the_cpu_are_the_files_bytes_and_only_scales_are_read(tmp_path):
    folder = to_int8(save_tiny("llama", False, tmp_path / "source"), tmp_path / "int8")
    tensors = read_tensors(folder)
    int8_bytes = sum(tensor.nbytes for tensor in tensors.values() if tensor.dtype == torch.int8)
    scale_bytes = sum(t.nbytes for n, t in tensors.items() if n.endswith((".SCB", ".weight_format")))
    total = sum(tensor.nbytes for tensor in tensors.values())
    wider = load(folder, "float32").load_report
    tables = sum(tensors[name].nbytes for name in ("model.embed_tokens.weight", "lm_head.weight"))
    assert (wider.bytes_mapped, wider.bytes_read) == (int8_bytes + tables, total - int8_bytes - tables)
    as_stored = load(folder, "float16").load_report
    assert (as_stored.bytes_mapped, as_stored.bytes_read) == (total - scale_bytes, scale_bytes)


def test_a_weight_changed_in_memory_leaves_the_file_as_it_was(tmp_path):
    folder = to_int8(save_tiny("llama", True, tmp_path / "source"), tmp_path / "int8")
    before = file_hashes(folder)
    model, other = load(folder, "float16"), load(folder, "float16")
    expected = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not model.model.layers[0].mlp.up_proj.weight.any()
    assert file_hashes(folder) == before
    assert_same_tensors(other.state_dict(), expected)


def test_a_model_of_mapped_files_replaces_them(tmp_path):
    folder = to_int8(save_tiny("llama", False, tmp_path / "source"), tmp_path / "int8")
    model = load(folder, "float16")
    expected = read_tensors(folder)
    model.save_int8(folder, overwrite=True)
    assert_same_tensors(read_tensors(folder), expected)
    assert_same_model(load(folder, "float16"), model)
    assert {entry.name for entry in tmp_path.iterdir()} == {"source", "int8"}


def test_int8_layers_can_be_offloaded(tmp_path):
    folder = to_int8(save_tiny("gpt2", True, tmp_path / "source"), tmp_path / "int8")
    expected = load(folder)
    device_map = {"transformer.h.1": "disk", "transformer.h.2.mlp": "disk", "": "cpu"}
    model = load(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    (offloaded,) = (tmp_path / "offload").iterdir()
    assert (offloaded / "transformer.h.1.mlp.c_fc.weight.dat").is_file()
    assert_same_model(model, expected)
    assert torch.equal(greedy(model), greedy(expected))
    model.save_int8(tmp_path / "saved", shard_bytes=SHARD)
    assert_same_model(load(tmp_path / "saved"), expected)


# --- the head ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt-350m"])
def test_a_tied_int8_head_and_the_embeddings_are_one_tensor(kind, tmp_path):
    source = save_tiny(kind, True, tmp_path / "source")
    folder = to_int8(source, tmp_path / "int8", Int8Config(int8_head=True))
    for model in (load(source, config=Int8Config(int8_head=True)), load(folder)):
        embeddings, head = model.get_input_embeddings(), model.lm_head
        assert isinstance(embeddings, Int8Embedding) and isinstance(head, Int8Linear)
        assert head.weight is embeddings.weight and head.scale is embeddings.scale
    heads = [name for name in read_tensors(folder) if name.startswith("lm_head.")]
    assert heads == [] and "lm_head" not in quantization_of(folder)["llm_int8_skip_modules"]
    original = tiny_model(kind, True).get_input_embeddings().weight
    q, scale_R = reference.quantize_rows(original)
    assert torch.equal(embeddings.weight, q) and torch.allclose(embeddings.scale, scale_R, rtol=1e-6, atol=0)


def test_int8_embeddings_are_their_rows_times_their_scales():
    torch.manual_seed(0)
    embeddings = Int8Embedding(10, 6, dtype=torch.float16)
    embeddings.weight.data.copy_(torch.randint(-127, 128, (10, 6)))
    embeddings.scale.copy_(torch.rand(10) * 1e-3)
    ids = torch.tensor([[1, 9], [0, 1]])
    expected = (embeddings.weight.float() * embeddings.scale[:, None])[ids]
    assert embeddings(ids).dtype == torch.float16
    assert torch.equal(embeddings(ids), expected.half())
    scale_R = embeddings.scale.clone()
    for change, dtype in ((embeddings.float, torch.float32), (embeddings.bfloat16, torch.bfloat16)):
        change()
        assert torch.equal(embeddings(ids), expected.to(dtype))
    embeddings.half().to("cpu", torch.float32)
    assert torch.equal(embeddings(ids), expected)
    assert embeddings.weight.dtype == torch.int8 and torch.equal(embeddings.scale, scale_R)
    assert embeddings.to("meta")(ids.to("meta")).shape == (2, 2, 6)
    assert embeddings.scale.device.type == "meta" and embeddings.dtype == torch.float32


def test_a_model_with_int8_embeddings_can_change_its_dtype(tmp_path):
    source = save_tiny("llama", True, tmp_path / "source")
    model = load(source, "float32", config=Int8Config(int8_head=True))
    logits = model(PROMPT).logits
    model.bfloat16()
    assert model(PROMPT).logits.dtype == torch.bfloat16
    assert (model(PROMPT).logits.float() - logits).abs().max() < 0.1 * logits.abs().max()


# --- plans and stages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_a_layout_with_an_int8_head_has_the_bytes_of_the_real_stages(kind, tied):
    settings = Int8Config(int8_head=True)
    layout = layout_of(tiny_config(kind, tied).to_dict(), settings)
    assert layout == layout_of(tiny_config(kind, tied).to_dict()).with_int8_head()
    blocks = len(layout.blocks)
    for first, last in ((0, blocks), (0, 1), (blocks - 2, blocks)):
        config = tiny_config(kind, tied)
        skeleton = build_skeleton(config, settings, torch.float16)
        stage = StageModel(skeleton, family_of(config.model_type), [m.name for m in layout.stage(first, last)])
        real = sum(slot.nbytes for slot in stage.slots.values())
        assert layout.part(first, last).weight_bytes(2) == real, (first, last)


@pytest.mark.parametrize("int8_head", [False, True], ids=["head16", "head8"])
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("opt-350m", True), ("phi", False)])
def test_a_layout_knows_from_an_int8_checkpoints_config_whether_its_head_is_int8(kind, tied, int8_head, tmp_path):
    source = save_tiny(kind, tied, tmp_path / "source")
    settings = Int8Config(int8_head=int8_head)
    found = find_model(to_int8(source, tmp_path / "int8", settings))
    skeleton = skeleton_of(found.checkpoint, found.spec, "float16")
    real = sum(slot.nbytes for slot in skeleton.slots.values())
    assert layout_of(found.spec.config).weight_bytes(2) == found.spec.known_layout.weight_bytes(2) == real
    assert layout_of(found.spec.config) == layout_of(tiny_config(kind, tied).to_dict(), settings)


@pytest.mark.parametrize(
    ("kind", "tied", "int8_head"),
    [("llama", False, True), ("llama", True, True), ("gpt2", True, False), ("opt-350m", True, False),
     ("gpt_neox", False, False)],
)  # fmt: skip
def test_stages_of_an_int8_checkpoint_are_those_of_its_source(kind, tied, int8_head, tmp_path):
    config = Int8Config(int8_head=int8_head, dtype="float32")
    source = save_tiny(kind, tied, tmp_path / "source")
    to_int8(source, tmp_path / "int8", config)
    original, stored = find_model(source, config), find_model(tmp_path / "int8", Int8Config(dtype="float32"))
    devices, _ = find_devices("cpu", 2)
    read = 0
    for index in range(2):
        stages = []
        for found in (stored, original):
            plan = make_plan(found.spec, devices, found.spec.workload())
            stages.append(RunningStage(plan, index, "cpu", lambda done, total: None))
        (stage, expected), report = (each._stage._stage for each in stages), stages[0].report
        assert_same_model(stage, expected)
        assert stage.has_head == expected.has_head
        assert report.bytes_mapped > 0 and report.unused == []
        read += report.bytes_read + report.bytes_mapped
    assert read == stored.checkpoint.weight_bytes


# --- bitsandbytes ------------------------------------------------------------------------------------------------

EXCHANGED = [
    pytest.param("llama", False, True, id="llama-head8"),
    pytest.param("gpt2", True, False, id="gpt2-tied"),
    pytest.param("gpt2", False, True, id="gpt2-head8"),
    pytest.param("gpt_neox", False, True, id="gpt_neox-head8"),
    pytest.param("opt", True, False, id="opt-tied"),
]


def int8_layers(model: Any, kind: type) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize(("kind", "tied", "int8_head"), EXCHANGED)
def test_transformers_with_bitsandbytes_loads_what_is_written_here(kind, tied, int8_head, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    source = save_tiny(kind, tied, tmp_path / "source")
    folder = to_int8(source, tmp_path / "int8", Int8Config(int8_head=int8_head))
    ours = load(folder, "float16")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu").eval()
    layers, expected = int8_layers(theirs, bitsandbytes.nn.Linear8bitLt), int8_layers(ours, Int8Linear)
    assert layers.keys() == expected.keys() and ("lm_head" in layers) == int8_head
    stored = read_tensors(folder)
    for name, layer in layers.items():
        assert torch.equal(layer.weight.data, expected[name].weight), name
        assert torch.equal(layer.weight.SCB, stored[f"{name}.SCB"]), name
    rest = {n: p for n, p in ours.named_parameters() if n.rpartition(".")[0] not in layers}
    for name, parameter in rest.items():
        assert torch.equal(theirs.get_parameter(name), parameter), name
    with torch.no_grad():
        logits, wanted = theirs(PROMPT).logits.float(), ours(PROMPT).logits.float()
    assert (logits - wanted).abs().max() < 0.2 * wanted.abs().max()


@pytest.mark.parametrize(("kind", "tied", "int8_head"), EXCHANGED)
def test_what_transformers_with_bitsandbytes_writes_loads_here(kind, tied, int8_head, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    source = save_tiny(kind, tied, tmp_path / "source")
    settings = BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_threshold=4.5, llm_int8_skip_modules=[] if int8_head else None
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, dtype=torch.float16)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    layers = int8_layers(theirs, bitsandbytes.nn.Linear8bitLt)
    ours = load(tmp_path / "theirs", "float16")
    assert ours.load_report.unused == []
    found = int8_layers(ours, Int8Linear)
    assert found.keys() == layers.keys() and ("lm_head" in found) == int8_head
    written = read_tensors(tmp_path / "theirs")
    if kind == "gpt_neox" and int8_head:
        assert "embed_out.SCB" in written  # transformers saves the head under its old name
    for name, layer in found.items():
        stored = name if f"{name}.weight" in written else "embed_out"
        assert torch.equal(layer.weight, written[f"{stored}.weight"]), name
        assert torch.allclose(layer.scale * 127, written[f"{stored}.SCB"], rtol=1e-6, atol=0), name
        assert layer.threshold == 4.5
    assert torch.equal(ours.get_input_embeddings().weight, theirs.get_input_embeddings().weight)
    assert_same_model(ours, load(source, "float16", config=Int8Config(int8_head=int8_head, threshold=4.5)))


def test_weights_without_a_note_of_their_order_are_rows_as_they_are(tmp_path):
    """bitsandbytes wrote none before 0.41."""
    folder = to_int8(save_tiny("llama", False, tmp_path / "source"), tmp_path / "int8")
    expected = load(folder)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_format")]:
            del tensors[name]

    rewrite(folder, edit)
    assert not any(name.endswith(".weight_format") for name in read_tensors(folder))
    model = load(folder)
    assert_same_model(model, expected)
    assert model.load_report.unused == []
