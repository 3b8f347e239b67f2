"""What a user sees of a wrong checkpoint, device map or flag: one error with the name, the number and the way out."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import Command, assert_refused
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, StableLmConfig

import bigint8.launch
from bigint8 import BigInt8Error, CheckpointError, PlanError, load_sharded_int8
from bigint8.checkpoint.headers import INDEX_FILE, open_checkpoint
from bigint8.launch import LaunchFlags, launch
from bigint8.load.stream import Chunk, RowStream

Tensors = dict[str, Tensor]

INT8_WEIGHT = "model.layers.1.mlp.down_proj.weight"
EMBEDDINGS = "model.embed_tokens.weight"
NORM = "model.layers.0.input_layernorm.weight"
MODEL_CONTEXT = 64
PROMPT_12 = torch.arange(3, 15).unsqueeze(0)


def save_llama(folder: Path, tied: bool = False) -> Path:
    """A random Llama of two blocks in float16, in several shards, with a tokenizer of one word a token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MODEL_CONTEXT,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).half().save_pretrained(folder, max_shard_size="20KB")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2").save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged checkpoint, not to be written to."""
    return save_llama(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture(scope="module")
def good_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("good-tied") / "model", tied=True)


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to damage."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def shard_of(folder: Path, name: str) -> Path:
    return Path(folder / json.loads((folder / INDEX_FILE).read_text())["weight_map"][name])


def rewrite(folder: Path, edit: Callable[[Tensors], object]) -> None:
    """Apply `edit` to each shard's tensors and save them as valid safetensors, with an index that agrees."""
    weight_map = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        edit(tensors)
        path.unlink()
        if tensors:
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
        weight_map.update(dict.fromkeys(tensors, path.name))
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def replace(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change one tensor of the checkpoint."""
    rewrite(folder, lambda tensors: tensors.update({name: change(tensors[name])} if name in tensors else {}))


def poison(folder: Path, name: str, row: int, value: float) -> None:
    """Set one value in a row of a tensor."""

    def change(tensor: Tensor) -> Tensor:
        tensor[row].view(-1)[-1] = value
        return tensor

    replace(folder, name, change)


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(error: type[BigInt8Error], path: Path | str, *args: Any, **options: Any) -> str:
    """The message with which loading is refused, by exactly this class of error."""
    with pytest.raises(BigInt8Error) as caught:
        load_sharded_int8(path, *args, progress=False, **options)
    assert type(caught.value) is error
    return str(caught.value)


def test_undamaged_checkpoint_loads_and_generates(copy: Path) -> None:
    rewrite(copy, lambda tensors: None)
    model = load_sharded_int8(copy, progress=False)
    assert model.load_report.unused == []
    assert model.generate(PROMPT_12, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 14)


# --- tensors that do not fit the config --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [(INT8_WEIGHT, [32, 63], [32, 64]), (EMBEDDINGS, [95, 32], [96, 32]), (NORM, [31], [32])],
)
def test_tensor_of_the_wrong_shape_is_refused(copy: Path, name: str, shape: list[int], wanted: list[int]) -> None:
    replace(copy, name, lambda tensor: torch.zeros(shape, dtype=tensor.dtype))
    message = refusal(CheckpointError, copy)
    assert str(shard_of(copy, name)) in message
    assert repr(name) in message
    assert str(shape) in message
    assert str(wanted) in message


def test_tensor_of_the_right_size_and_the_wrong_shape_is_refused(copy: Path) -> None:
    replace(copy, INT8_WEIGHT, lambda tensor: tensor.T.contiguous())
    assert repr(INT8_WEIGHT) in refusal(CheckpointError, copy)


def test_config_of_another_model_is_refused(copy: Path) -> None:
    set_config(copy, num_hidden_layers=3)
    message = refusal(CheckpointError, copy)
    assert "9 tensors are missing" in message
    assert "model.layers.2.mlp.down_proj.weight" in message


@pytest.mark.parametrize("name", [INT8_WEIGHT, EMBEDDINGS, NORM, "lm_head.weight"])
def test_missing_tensor_is_refused_by_name(copy: Path, name: str) -> None:
    rewrite(copy, lambda tensors: tensors.pop(name, None))
    message = refusal(CheckpointError, copy)
    assert str(copy) in message
    assert f"1 tensor is missing: {name};" in message


def test_many_missing_tensors_are_counted_and_ten_are_shown(copy: Path) -> None:
    gone: list[str] = []

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.") or ".self_attn." in name]:
            del tensors[name]
            gone.append(name)

    rewrite(copy, edit)
    message = refusal(CheckpointError, copy)
    assert len(gone) == 13
    assert "13 tensors are missing" in message
    assert sum(name in message for name in gone) == 10
    assert "and 3 more" in message


def test_tensors_that_no_module_wants_are_reported_whatever_their_dtype(copy: Path) -> None:
    def edit(tensors: Tensors) -> None:
        if NORM in tensors:
            tensors["model.left.over"] = torch.arange(3)

    rewrite(copy, edit)
    assert load_sharded_int8(copy, progress=False).load_report.unused == ["model.left.over"]


@pytest.mark.parametrize("name", [INT8_WEIGHT, NORM])
@pytest.mark.parametrize(
    ("dtype", "called"),
    [(torch.float64, "F64"), (torch.int32, "I32"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_weight_of_an_unsupported_dtype_is_refused(copy: Path, name: str, dtype: torch.dtype, called: str) -> None:
    replace(copy, name, lambda tensor: tensor.to(dtype))
    message = refusal(CheckpointError, copy)
    assert str(shard_of(copy, name)) in message
    assert repr(name) in message
    assert f"stored as {called};" in message
    assert "F16, BF16 or F32" in message


def test_checkpoint_all_in_an_unsupported_dtype_is_refused(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.update({name: tensor.double() for name, tensor in tensors.items()}))
    assert "stored as F64;" in refusal(CheckpointError, copy)


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [INT8_WEIGHT, EMBEDDINGS, NORM])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_value_that_is_not_finite_is_refused(copy: Path, name: str, value: float, dtype: torch.dtype) -> None:
    rewrite(copy, lambda tensors: tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()}))
    poison(copy, name, row=7, value=value)
    message = refusal(CheckpointError, copy)
    assert str(shard_of(copy, name)) in message
    assert repr(name) in message
    rows = re.search(r"NaN or infinity in rows (\d+) to (\d+)", message)
    assert rows is not None
    assert int(rows[1]) <= 7 <= int(rows[2])


@pytest.mark.parametrize("name", [EMBEDDINGS, NORM])
def test_value_too_large_for_the_dtype_is_refused_with_one_that_holds_it(copy: Path, name: str) -> None:
    rewrite(copy, lambda tensors: tensors.update({key: tensor.float() for key, tensor in tensors.items()}))
    poison(copy, name, row=7, value=1e6)
    message = refusal(CheckpointError, copy, dtype="float16")
    assert str(shard_of(copy, name)) in message
    assert repr(name) in message
    assert "too large for torch.float16" in message
    assert "dtype=float32 or dtype=bfloat16" in message
    load_sharded_int8(copy, dtype="float32", progress=False)
    load_sharded_int8(copy, dtype="bfloat16", progress=False)


def test_large_value_in_an_int8_weight_is_held_by_its_scale(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.update({key: tensor.float() for key, tensor in tensors.items()}))
    poison(copy, INT8_WEIGHT, row=7, value=1e6)
    model = load_sharded_int8(copy, dtype="float16", progress=False)
    assert model.model.layers[1].mlp.down_proj.scale[7].item() == pytest.approx(1e6 / 127)


# --- device maps -------------------------------------------------------------------------------------------------

PARTS = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")


@pytest.mark.parametrize("missing", ["model.embed_tokens", "model.norm", "lm_head"])
def test_device_map_that_misses_a_module_is_refused(good: Path, missing: str) -> None:
    message = refusal(PlanError, good, {part: "cpu" for part in PARTS if part != missing})
    assert f"gives no device to {missing};" in message


def test_device_map_that_misses_many_modules_shows_ten(good: Path) -> None:
    message = refusal(PlanError, good, {part: "cpu" for part in PARTS if part != "model.layers"})
    assert "model.layers.0.self_attn.q_proj" in message
    assert "and 8 more" in message


@pytest.mark.parametrize("name", ["model.layerz", "model.layers.2", "model.layers.0.mlp.up", 3])
def test_device_map_that_names_an_unknown_module_is_refused(good: Path, name: Any) -> None:
    message = refusal(PlanError, good, {"": "cpu", name: "cpu"})
    assert f"{name!r}, which is no module" in message


@pytest.mark.parametrize("device_map", ["cuda:7", 7, torch.device("cuda:7"), {"": "cuda:7"}, {"": "cpu", "lm_head": 7}])
def test_device_that_is_not_there_is_refused(good: Path, device_map: Any) -> None:
    assert "cuda:7, which this machine does not have" in refusal(PlanError, good, device_map)


@pytest.mark.parametrize("device", ["gpu", "tpu:0", "meta", ""])
def test_device_of_no_known_kind_is_refused(good: Path, device: str) -> None:
    for device_map in (device, {"": device}):
        assert f"device {device!r}" in refusal(PlanError, good, device_map)


@pytest.mark.parametrize("device_map", ["disk", {"": "disk"}, {"": "cpu", "lm_head": "disk"}])
def test_disk_without_an_offload_folder_is_refused(good: Path, device_map: Any) -> None:
    assert "offload_folder=" in refusal(PlanError, good, device_map)


def test_offload_folder_that_is_a_file_is_refused(good: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refusal(PlanError, good, "disk", offload_folder=tmp_path / "file")


def test_tied_head_apart_from_its_embeddings_is_refused(good_tied: Path, tmp_path: Path) -> None:
    apart = dict.fromkeys(PARTS, "cpu") | {"lm_head": "disk"}
    message = refusal(PlanError, good_tied, apart, offload_folder=tmp_path)
    assert "lm_head.weight on disk" in message
    assert "model.embed_tokens.weight on cpu" in message
    assert "one device" in message


def test_tied_head_beside_its_embeddings_is_loaded(good_tied: Path) -> None:
    model = load_sharded_int8(good_tied, dict.fromkeys(PARTS, "cpu"), progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- memory and context ------------------------------------------------------------------------------------------


def assert_says_needed_there_and_help(message: str, needed: str, there: str) -> None:
    """The message holds two amounts, different as they are printed, and a way out."""
    amounts = [re.search(pattern, message) for pattern in (needed, there)]
    assert all(amounts), message
    assert len({amount[1] for amount in amounts if amount}) == 2, message
    assert "What would help" in message


def test_too_little_memory_is_told_with_the_amounts_when_planned(good: Path) -> None:
    message = refusal(PlanError, good, "auto", max_memory={"cpu": "10KB"})
    assert_says_needed_there_and_help(message, r"needs ([\d.]+ \w+)", r"have ([\d.]+ \w+)")


def test_too_little_memory_is_told_with_the_amounts_for_a_given_map(good: Path) -> None:
    message = refusal(PlanError, good, {"": "cpu"}, max_memory={"cpu": "10KB"})
    assert message.startswith("cpu:")
    assert_says_needed_there_and_help(message, r"needs ([\d.]+ \w+)", r"([\d.]+ \w+) may be used")


def test_memory_of_a_cache_that_does_not_fit_is_told_for_a_given_map(good: Path) -> None:
    batch = 200_000  # x 64 tokens x 2 blocks x 32 values
    message = refusal(PlanError, good, {"": "cpu"}, max_memory={"cpu": "1GB"}, batch_size=batch, dtype="float16")
    assert_says_needed_there_and_help(message, r"needs ([\d.]+ \w+)", r"([\d.]+ \w+) may be used")


@pytest.mark.parametrize("name", ["cuda:7", 7])
def test_max_memory_of_a_device_that_is_not_there_is_refused(good: Path, name: Any) -> None:
    message = refusal(PlanError, good, max_memory={name: "1GB", "cpu": "1GB"})
    assert "max_memory names cuda:7," in message


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("size", ["lots", "GB", "", "1 parsec", -1, None, 1.5e9])
def test_max_memory_that_is_no_size_is_refused(good: Path, size: Any, device_map: Any) -> None:
    message = refusal(PlanError, good, device_map, max_memory={"cpu": size})
    assert "max_memory" in message
    assert str(size) in message


def test_empty_max_memory_is_refused(good: Path) -> None:
    assert "no devices" in refusal(PlanError, good, max_memory={})


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("offload", [False, True])
def test_context_longer_than_the_models_is_refused(good: Path, tmp_path: Path, device_map: Any, offload: bool) -> None:
    folder = tmp_path / "offload" if offload else None
    message = refusal(PlanError, good, device_map, context=100, offload_folder=folder)
    assert "context=100" in message
    assert str(MODEL_CONTEXT) in message


def test_context_longer_than_the_models_is_refused_for_a_family_outside_the_table(copy: Path) -> None:
    config = StableLmConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    set_config(copy, **config.to_dict() | {"max_position_embeddings": MODEL_CONTEXT})
    message = refusal(PlanError, copy, context=100)
    assert "context=100" in message


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("sizes", [{"context": 0}, {"context": -1}, {"batch_size": 0}], ids=str)
def test_context_or_batch_below_one_is_refused(
    good: Path, tmp_path: Path, device_map: Any, offload: bool, sizes: dict[str, int]
) -> None:
    folder = tmp_path / "offload" if offload else None
    assert "at least 1" in refusal(PlanError, good, device_map, offload_folder=folder, **sizes)


@pytest.fixture(scope="module")
def short_model(good: Path) -> Any:
    return load_sharded_int8(good, context=8, progress=False)


def test_prompt_longer_than_the_context_is_refused(short_model: Any) -> None:
    with pytest.raises(BigInt8Error) as caught:
        short_model.generate(PROMPT_12, max_new_tokens=1, do_sample=False)
    assert "12 tokens" in str(caught.value)
    assert "context of 8" in str(caught.value)


def test_prompt_that_outgrows_the_context_is_refused(short_model: Any) -> None:
    with pytest.raises(BigInt8Error, match=r"9 tokens.*context of 8"):
        short_model.generate(PROMPT_12[:, :6], max_new_tokens=5, min_new_tokens=5, do_sample=False)


def test_prompt_that_fills_the_context_is_run(short_model: Any) -> None:
    output = short_model.generate(PROMPT_12[:, :6], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert output.shape == (1, 9)


def test_embedded_prompt_longer_than_the_context_is_refused(short_model: Any) -> None:
    with pytest.raises(BigInt8Error, match=r"12 tokens.*context of 8"):
        short_model(inputs_embeds=torch.zeros(1, 12, 32))


@pytest.mark.parametrize("dtype", ["int4", "fp16", "float64", torch.float64, None])
def test_unknown_dtype_is_refused(good: Path, dtype: Any) -> None:
    message = refusal(BigInt8Error, good, dtype=dtype)
    assert str(dtype).removeprefix("torch.") in message
    assert "float16, bfloat16 or float32" in message


# --- folders and configs -----------------------------------------------------------------------------------------


def test_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refusal(CheckpointError, tmp_path / "nowhere")


@pytest.mark.parametrize(
    "path", ["~no-such-user/model", "x" * 300, "/" + "x" * 5000, "a\0b"], ids=lambda p: ascii(p[:9])
)
def test_path_that_cannot_be_is_refused(path: str) -> None:
    refusal(CheckpointError, path)


def test_folder_without_a_config_is_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    message = refusal(CheckpointError, copy)
    assert str(copy) in message
    assert "no config.json" in message


def test_folder_of_pickles_is_refused_with_the_way_to_convert_them(copy: Path) -> None:
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    torch.save({"a": torch.ones(2)}, copy / "pytorch_model.bin")
    message = refusal(CheckpointError, copy)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_checkpoint_that_is_already_quantized_is_refused(copy: Path) -> None:
    set_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    message = refusal(CheckpointError, copy)
    assert str(copy / "config.json") in message
    assert "already quantized (gptq)" in message


GARBLED = {
    "layers that are a word": {"num_hidden_layers": "two"},
    "no layers": {"num_hidden_layers": 0},
    "a fraction of layers": {"num_hidden_layers": 2.5},
    "a negative size": {"hidden_size": -32},
    "no size": {"hidden_size": None},
    "a context that is a word": {"max_position_embeddings": "many"},
    "a window that is a word": {"model_type": "mistral", "sliding_window": "wide"},
    "layer types of fewer layers": {
        "model_type": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention"],
    },
    "a model without text": {"model_type": "clip"},
    "a model that is unknown": {"model_type": "fancy"},
}
ONLY_TRANSFORMERS_MINDS = {
    "an unknown activation": {"hidden_act": "nonsense"},
    "unknown rotary positions": {"rope_parameters": {"rope_type": "nonsense"}},
    "padding beyond the vocabulary": {"pad_token_id": 1000},
}


@pytest.mark.parametrize("case", [*GARBLED, *ONLY_TRANSFORMERS_MINDS])
def test_garbled_config_is_refused_when_loading(copy: Path, case: str) -> None:
    set_config(copy, **(GARBLED | ONLY_TRANSFORMERS_MINDS)[case])
    with pytest.raises((CheckpointError, PlanError)):
        load_sharded_int8(copy, progress=False)


def test_config_value_that_transformers_refuses_is_named_with_its_file(copy: Path) -> None:
    set_config(copy, num_hidden_layers="two")
    message = refusal(CheckpointError, copy)
    assert str(copy / "config.json") in message
    assert "num_hidden_layers" in message
    assert "two" in message


@pytest.mark.parametrize("case", GARBLED)
def test_garbled_config_is_refused_when_planning(copy: Path, case: str) -> None:
    set_config(copy, **GARBLED[case])
    with pytest.raises((CheckpointError, PlanError)):
        launch(LaunchFlags(model=str(copy), gpus=1, plan_only=True))


@pytest.mark.parametrize("raw", ["{", "[]", "3"])
def test_garbled_generation_config_is_refused(copy: Path, raw: str) -> None:
    (copy / "generation_config.json").write_text(raw)
    assert str(copy / "generation_config.json") in refusal(CheckpointError, copy)


@pytest.mark.parametrize("raw", ["{", "{}", '{"version": "1.0", "model": {"type": "nonsense"}}'])
def test_garbled_tokenizer_is_refused_before_anything_is_loaded(copy: Path, raw: str) -> None:
    (copy / "tokenizer.json").write_text(raw)
    with pytest.raises(BigInt8Error, match="tokenizer") as caught:
        launch(LaunchFlags(model=str(copy), prompt=["w3"]))
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("prompt", ["", "  "])
def test_empty_prompt_is_refused_before_anything_is_loaded(good: Path, prompt: str) -> None:
    with pytest.raises(BigInt8Error, match="no tokens in it"):
        launch(LaunchFlags(model=str(good), prompt=[prompt]))


def test_gpus_that_are_not_there_are_refused(good: Path) -> None:
    with pytest.raises(BigInt8Error, match=r"gpu_type=rtx-1: .*rtx-3090"):
        launch(LaunchFlags(model=str(good), plan_only=True, gpu_type="rtx-1"))


# --- files that change while they are read -----------------------------------------------------------------------


def test_file_that_is_cut_short_while_it_is_read_is_refused(copy: Path) -> None:
    opened = open_checkpoint(copy)
    path = shard_of(copy, INT8_WEIGHT)
    last = max((info for info in opened.tensors.values() if info.file == path), key=lambda info: info.stop)
    os.truncate(path, last.stop - 5)
    with pytest.raises(CheckpointError) as caught:
        RowStream(opened.tensors.values()).run(lambda chunk: None)
    message = str(caught.value)
    assert str(path) in message
    assert repr(last.name) in message
    assert f"{last.stop - 5:,}" in message
    assert f"{last.stop:,}" in message


def test_file_that_is_cut_within_an_earlier_tensor_names_that_tensor(copy: Path) -> None:
    opened = open_checkpoint(copy)
    path = shard_of(copy, INT8_WEIGHT)
    first = min((info for info in opened.tensors.values() if info.file == path), key=lambda info: info.start)
    os.truncate(path, first.start + 1)
    with pytest.raises(CheckpointError) as caught:
        RowStream(opened.tensors.values()).run(lambda chunk: None)
    assert repr(first.name) in str(caught.value)


def test_file_that_is_cut_between_two_reads_gives_the_rows_before_the_cut(copy: Path) -> None:
    opened = open_checkpoint(copy)
    info = opened.tensors[INT8_WEIGHT]
    whole = load_file(info.file)[INT8_WEIGHT]
    row_bytes = info.nbytes // info.rows
    rows: list[int] = []

    def work(chunk: Chunk) -> None:
        assert torch.equal(chunk.data, whole[chunk.row_start : chunk.row_stop])
        rows.extend(range(chunk.row_start, chunk.row_stop))
        os.truncate(info.file, info.start + 10 * row_bytes)

    with pytest.raises(CheckpointError, match="cut short"):
        RowStream([info], buffer_bytes=4 * row_bytes, readers=1).run(work)
    assert rows == list(range(8))


# --- the command line --------------------------------------------------------------------------------------------

MARK = "BIGINT8_TEST_RUN"
END_SECONDS = 15
"""How long the processes of a run may take to end after it: Ray's end when they notice that their parent did."""


def has_mark(process: psutil.Process, mark: str) -> bool:
    """Whether the process was started, at whatever remove, with this value in its environment."""
    try:
        return process.environ().get(MARK) == mark
    except psutil.Error:
        return False


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Run:
    """One run of the command line: how it ended, what it printed, the processes it started and those it left."""

    def __init__(self, *arguments: str) -> None:
        mark = uuid.uuid4().hex
        self._family: dict[int, psutil.Process] = {}
        self.names: set[str] = set()
        with subprocess.Popen(
            [sys.executable, "-m", "bigint8.launch", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {MARK: mark, "HF_HUB_OFFLINE": "1"},
        ) as process:
            while process.poll() is None:
                self._look(process.pid, mark)
                time.sleep(0.25)
            self.stdout, self.stderr = process.communicate()
        self.code = process.returncode
        self._look(process.pid, mark)
        deadline = time.monotonic() + END_SECONDS
        while (
            survivors := [member for member in self._family.values() if runs(member)]
        ) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.survivors = survivors
        for member in survivors:
            member.kill()

    def _look(self, pid: int, mark: str) -> None:
        """Note the descendants, by parent and, should a parent have ended, by mark."""
        found = [process for process in psutil.process_iter() if has_mark(process, mark)]
        with contextlib.suppress(psutil.NoSuchProcess):
            found += psutil.Process(pid).children(recursive=True)
        for process in found:
            if process.pid != pid:
                self._family.setdefault(process.pid, process)
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.names.add(process.name())

    @property
    def error(self) -> str:
        """What stands on standard error from the line on that begins with "error:"."""
        at = re.search(r"^error: ", self.stderr, re.MULTILINE)
        assert at is not None, self.stderr
        return self.stderr[at.start() :]


def test_truncated_shard_ends_the_command_line_with_2_before_any_worker_starts(
    run: Command, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard_of(copy, INT8_WEIGHT)
    os.truncate(path, path.stat().st_size - 10)
    monkeypatch.setattr("bigint8.run.pipeline.Pipeline", None)  # nobody can start workers
    ended = run(bigint8.launch, "--model", copy, "--device", "cpu", "--gpus", 2)
    assert_refused(ended, f"error: {path}: truncated")
    assert ended.error.startswith("error: ")


def test_nan_that_a_worker_finds_ends_the_command_line_with_2_and_leaves_no_process(copy: Path) -> None:
    poison(copy, INT8_WEIGHT, row=7, value=float("nan"))
    run = Run("--model", str(copy), "--device", "cpu", "--gpus", "2")
    assert run.code == 2
    assert run.error.startswith(f"error: {shard_of(copy, INT8_WEIGHT)}: tensor {INT8_WEIGHT!r} holds NaN")
    assert "Traceback" not in run.stderr
    assert "raylet" in run.names
    assert not run.survivors


def test_prompt_too_long_ends_the_command_line_with_2(run: Command, good: Path) -> None:
    ended = run(bigint8.launch, "--model", good, "--device", "cpu", "--context", 8, "--prompt", "w3 " * 12)
    assert_refused(ended, "error: a prompt of 12 tokens leaves no room in a context of 8")
    assert ended.error.startswith("error: ")
