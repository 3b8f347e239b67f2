"""The commands `python -m bigint8.check` and `python -m bigint8.quantize`: what they print, and how they end."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import assert_refused
from folders import INDEX, quantization_of, read_tensors, replace, rewrite, set_config, shard_of
from torch import Tensor
from transformers import StableLmConfig, StableLmForCausalLM

import bigint8.check
import bigint8.quantize
from bigint8 import Int8Config, Int8Linear, load_sharded_int8
from bigint8.session import check, find_model, quantize
from bigint8.units import decimal

LAYER = "model.layers.1.mlp.down_proj"
NORM = "model.layers.2.input_layernorm.weight"


@pytest.fixture(scope="module")
def int8(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its int8 checkpoint, not to be written to."""
    folder = tmp_path_factory.mktemp("int8") / "int8"
    quantize(source, folder, progress=False, shard_bytes=40_000)
    return folder


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A copy of the 16-bit checkpoint, to damage."""
    return Path(shutil.copytree(source, tmp_path / "model"))


# --- check -------------------------------------------------------------------------------------------------------


def test_a_check_reports_the_bytes_that_a_load_reads_and_holds(source):
    for config in (Int8Config(), Int8Config(int8_head=True)):
        report = check(find_model(source, config), "float16", progress=False)
        model = load_sharded_int8(source, config=config, dtype="float16", progress=False)
        tensors = read_tensors(source)
        assert report.bytes_read == sum(tensor.nbytes for tensor in tensors.values()) == model.load_report.bytes_read
        assert report.int8_bytes + report.other_bytes == model.load_report.device_bytes["cpu"]
        assert (report.tensors, report.unused) == (len(tensors), [])
        assert report.shards == len(list(source.glob("*.safetensors"))) > 1
        assert 0 < report.first_rss_bytes <= report.most_rss_bytes


def test_a_check_prints_a_summary_and_the_stages_for_so_many_gpus(run, source):
    ended = run(bigint8.check, source, "--gpus", 2, "--context", 64)
    assert ended.code == 0
    assert f"{len(read_tensors(source))} tensors in " in ended.out
    assert "are whole, finite and of the right shape" in ended.out
    model = load_sharded_int8(source, dtype="float16", progress=False)
    int8 = sum(m.weight.nbytes + m.scale.nbytes for m in model.modules() if isinstance(m, Int8Linear))
    besides = sum(model.load_report.device_bytes.values()) - int8
    assert f"the model takes {decimal(int8)} in int8 and {decimal(besides)} besides" in ended.out
    assert "rtx" in ended.out.lower() or "cuda:1" in ended.out
    assert "not used by the model" not in ended.out


def test_a_check_writes_its_plan_and_report_as_json(run, source, tmp_path):
    ended = run(bigint8.check, source, "--gpus", 2, "--context", 64, "--json", tmp_path / "check.json")
    assert ended.code == 0
    written = json.loads((tmp_path / "check.json").read_text())
    stages = written["plan"]["stages"]
    assert len(stages) == 2 and stages[0]["first_block"] == 0
    assert stages[0]["last_block"] == stages[1]["first_block"] and stages[1]["last_block"] == 5
    report = written["check"]
    assert sum(stage["weight_bytes"] for stage in stages) == report["int8_bytes"] + report["other_bytes"]
    assert report["bytes_read"] == sum(tensor.nbytes for tensor in read_tensors(source).values())
    assert report["unused"] == []


def test_a_json_file_that_cannot_be_written_is_told(run, source, tmp_path):
    place = tmp_path / "nowhere" / "check.json"
    assert_refused(run(bigint8.check, source, "--json", place), f"--json {place}", "No such file")


def test_a_check_names_tensors_that_no_module_wants(run, copy, tmp_path):
    def edit(tensors: dict[str, Tensor]) -> None:
        if NORM in tensors:
            tensors |= {f"model.left.over.{i}": torch.arange(3) for i in range(7)}

    rewrite(copy, edit)
    ended = run(bigint8.check, copy, "--json", tmp_path / "check.json")
    assert ended.code == 0
    assert "not used by the model: model.left.over.0, " in ended.out and "and 2 more" in ended.out
    assert len(json.loads((tmp_path / "check.json").read_text())["check"]["unused"]) == 7


def test_a_check_reads_int8_checkpoints_too(run, int8, source, tmp_path):
    ended = run(bigint8.check, int8, "--gpus", 2, "--context", 64, "--json", tmp_path / "int8.json")
    assert ended.code == 0
    report = json.loads((tmp_path / "int8.json").read_text())
    assert report["check"]["bytes_read"] == sum(tensor.nbytes for tensor in read_tensors(int8).values())
    of_source = check(find_model(source), "float16", progress=False)
    assert report["check"]["int8_bytes"] == of_source.int8_bytes
    assert report["check"]["other_bytes"] == of_source.other_bytes
    assert report["check"]["unused"] == []
    assert len(report["plan"]["stages"]) == 2


def test_the_plan_of_a_check_counts_an_int8_head(run, source, tmp_path):
    for name, flags in (("16", []), ("8", ["--int8-head"])):
        arguments = (source, "--gpus", 2, "--context", 64, "--json", tmp_path / name, *flags)
        assert run(bigint8.check, *arguments).code == 0
        written = json.loads((tmp_path / name).read_text())
        planned = sum(stage["weight_bytes"] for stage in written["plan"]["stages"])
        assert planned == written["check"]["int8_bytes"] + written["check"]["other_bytes"]
    read = [json.loads((tmp_path / name).read_text())["check"]["int8_bytes"] for name in ("16", "8")]
    assert read[1] - read[0] == 128 * 48 + 4 * 128


def poison(folder: Path) -> str:
    replace(folder, NORM, lambda norm: norm.index_fill(0, torch.tensor([7]), float("nan")))
    return f"{shard_of(folder, NORM)}: tensor {NORM!r} holds NaN"


def poison_int8_weight(folder: Path) -> str:
    name = f"{LAYER}.weight"
    replace(folder, name, lambda weight: weight.index_fill(0, torch.tensor([7]), float("inf")))
    return f"{shard_of(folder, name)}: tensor {name!r} holds NaN or infinity"


def lose(folder: Path) -> str:
    replace(folder, NORM, lambda norm: None)
    return f"{folder}: 1 tensor is missing: {NORM};"


def cut(folder: Path) -> str:
    shard = shard_of(folder, NORM)
    os.truncate(shard, shard.stat().st_size - 10)
    return f"{shard}: truncated"


def reshape(folder: Path) -> str:
    replace(folder, NORM, lambda norm: norm[:-1])
    return f"{shard_of(folder, NORM)}: tensor {NORM!r} has shape [47]"


def lose_shard(folder: Path) -> str:
    shard = shard_of(folder, NORM)
    shard.unlink()
    return shard.name


def garble_config(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return f"{folder / 'config.json'}: not JSON"


DAMAGES = [poison, poison_int8_weight, lose, cut, reshape, lose_shard, garble_config]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("gpus", [(), ("--gpus", 2)], ids=["plain", "gpus"])
def test_a_damaged_checkpoint_ends_a_check_with_2(damage: Callable[[Path], str], gpus, run, copy):
    said = damage(copy)
    assert_refused(run(bigint8.check, copy, *gpus), said)


def test_damaged_scales_of_an_int8_checkpoint_end_a_check_with_2(run, int8, tmp_path):
    damaged = Path(shutil.copytree(int8, tmp_path / "int8"))
    replace(damaged, f"{LAYER}.SCB", lambda scales: scales.index_fill(0, torch.tensor([7]), -1.0))
    assert_refused(run(bigint8.check, damaged), f"{LAYER}.SCB", "negative")


def test_nan_that_a_load_would_map_unread_ends_a_check_with_2(run, int8, tmp_path):
    damaged = Path(shutil.copytree(int8, tmp_path / "int8"))
    said = poison(damaged)
    assert_refused(run(bigint8.check, damaged), said)


def test_a_folder_that_is_not_there_ends_a_check_with_2(run, tmp_path):
    assert_refused(run(bigint8.check, tmp_path / "nowhere"), str(tmp_path / "nowhere"))


def test_code_that_a_checkpoint_brings_is_not_run_and_the_flag_that_allows_it_is_named(run, copy):
    set_config(copy, model_type="fancy-new-model", auto_map={"AutoConfig": "configuration_fancy.FancyConfig"})
    (copy / "configuration_fancy.py").write_text("raise SystemExit('it ran')\n")
    assert_refused(run(bigint8.check, copy), str(copy / "config.json"), "'fancy-new-model'", "--trust-remote-code")


def test_a_value_that_a_dtype_cannot_hold_is_found_for_that_dtype(run, copy):
    replace(copy, NORM, lambda norm: norm.float().index_fill(0, torch.tensor([7]), 1e6))
    assert_refused(run(bigint8.check, copy), NORM, "bfloat16")
    assert run(bigint8.check, copy, "--dtype", "bfloat16").code == 0


def test_a_model_of_no_family_is_checked_but_not_cut(run, tmp_path):
    config = StableLmConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    StableLmForCausalLM(config).save_pretrained(tmp_path / "model")
    ended = run(bigint8.check, tmp_path / "model", "--json", tmp_path / "check.json")
    assert ended.code == 0
    assert "'stablelm' cannot be cut into stages: it loads in one process only" in ended.out
    assert "are whole, finite and of the right shape" in ended.out
    assert json.loads((tmp_path / "check.json").read_text())["plan"] is None
    ended = run(bigint8.check, tmp_path / "model", "--gpus", 2)
    assert "are whole, finite and of the right shape" in ended.out
    assert_refused(ended, "the checkpoint is good, but model type 'stablelm' cannot be cut")


def test_more_stages_than_blocks_are_refused_after_the_check(run, source):
    ended = run(bigint8.check, source, "--gpus", 6)
    assert "are whole, finite and of the right shape" in ended.out
    assert_refused(ended, "the checkpoint is good, but no plan: ")


# --- quantize ----------------------------------------------------------------------------------------------------


def test_quantize_prints_what_it_wrote_and_refuses_to_write_it_twice(run, source, tmp_path):
    folder = tmp_path / "int8"
    ended = run(bigint8.quantize, source, folder, "--shard-size", "40KB", "--int8-head", "--threshold", 4.5)
    assert ended.code == 0, ended.error
    (line,) = ended.out.strip().splitlines()
    written, read = (sum(tensor.nbytes for tensor in read_tensors(f).values()) for f in (folder, source))
    assert line.startswith(f"{folder}: {decimal(written)} of {decimal(read)}, written in ") and "peak memory" in line
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert read_tensors(folder)["lm_head.weight"].dtype == torch.int8
    assert quantization_of(folder)["llm_int8_threshold"] == 4.5
    assert quantization_of(folder)["llm_int8_skip_modules"] == []
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert_refused(run(bigint8.quantize, source, folder), str(folder), "--overwrite")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_quantize_overwrites_when_it_is_told_to(run, source, tmp_path):
    folder = tmp_path / "int8"
    assert run(bigint8.quantize, source, folder, "--shard-size", "40KB").code == 0
    assert (folder / INDEX).is_file()
    assert run(bigint8.quantize, source, folder, "--overwrite").code == 0
    assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert not (folder / INDEX).exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["int8"]


def test_quantize_leaves_out_and_names_what_the_model_does_not_use(run, copy, tmp_path):
    rewrite(copy, lambda tensors: tensors.update({"model.left.over": torch.arange(3)}) if NORM in tensors else None)
    ended = run(bigint8.quantize, copy, tmp_path / "int8")
    assert ended.code == 0
    assert "not used by the model, and left out: model.left.over" in ended.out
    assert "model.left.over" not in read_tensors(tmp_path / "int8")


def test_quantize_skips_the_modules_that_are_named(run, source, tmp_path):
    flags = ("--skip-module", "lm_head", "--skip-module", "down_proj")
    assert run(bigint8.quantize, source, tmp_path / "int8", *flags).code == 0
    tensors = read_tensors(tmp_path / "int8")
    assert tensors[f"{LAYER}.weight"].dtype == tensors["lm_head.weight"].dtype == torch.float16
    assert tensors["model.layers.1.mlp.up_proj.weight"].dtype == torch.int8


@pytest.mark.parametrize("size", ["", "0", "-5GB", "many", "5 apples", "GB", "nan", "infGB", "1e400GB"])
def test_quantize_refuses_a_shard_size_that_is_none(size, run, source, tmp_path):
    ended = run(bigint8.quantize, source, tmp_path / "int8", f"--shard-size={size}")
    assert_refused(ended, "--shard-size", "500MB or 5GiB")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_quantize_refuses_a_damaged_checkpoint_and_leaves_no_folder(damage: Callable[[Path], str], run, copy, tmp_path):
    said = damage(copy)
    assert_refused(run(bigint8.quantize, copy, tmp_path / "int8"), said)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_quantize_refuses_an_int8_checkpoint(run, int8, tmp_path):
    assert_refused(run(bigint8.quantize, int8, tmp_path / "again"), str(int8), "is int8 already")


def test_quantize_refuses_a_checkpoint_quantized_in_another_way(run, copy, tmp_path):
    set_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    assert_refused(run(bigint8.quantize, copy, tmp_path / "int8"), "already quantized (gptq)")


def test_quantize_refuses_a_negative_threshold_and_an_unknown_flag(run, source, tmp_path):
    for flags in (("--threshold", "-1"), ("--threshold", "nan"), ("--bits", "4")):
        ended = run(bigint8.quantize, source, tmp_path / "int8", *flags)
        assert ended.code == 2 and "Traceback" not in ended.error, flags
        assert flags[0] in ended.error
    assert list(tmp_path.iterdir()) == []
