"""benchmarks/synthesize.py: the layout is transformers' own, the values are finite, holes take no disk."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from bigint8 import BigInt8Error, load_sharded_int8
from bigint8.checkpoint.headers import Checkpoint, open_checkpoint
from bigint8.sources.presets import ModelPreset, find_preset

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "synthesize.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("synthesize", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["synthesize"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def preset(name: str) -> ModelPreset:
    found = find_preset(name)
    assert found is not None
    return found


def shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in checkpoint.tensors.items()}


def transformers_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes that transformers itself has for the folder's config; a tied head counts once."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        state: dict[str, Any] = AutoModelForCausalLM.from_config(config).state_dict()
    return {n: tuple(t.shape) for n, t in state.items() if n != "lm_head.weight" or not config.tie_word_embeddings}


@pytest.mark.parametrize(
    ("name", "sparse", "stored_as"),
    [
        ("opt-125m", False, "F16"),
        ("gpt2", False, "F32"),
        ("bloom-560m", False, "F16"),
        ("tinyllama-1.1b", True, "BF16"),
    ],
)
def test_layout_is_that_of_transformers(
    script: ModuleType, tmp_path: Path, name: str, sparse: bool, stored_as: str
) -> None:
    script.synthesize(preset(name), tmp_path, layers=1, sparse=sparse)
    checkpoint = open_checkpoint(tmp_path)
    assert shapes(checkpoint) == transformers_shapes(tmp_path)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {stored_as}
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        names = list(opened.keys())
        assert {name: tuple(opened.get_slice(name).get_shape()) for name in names} == shapes(checkpoint)


def test_all_layers_of_the_preset_are_written(script: ModuleType, tmp_path: Path) -> None:
    script.synthesize(preset("opt-125m"), tmp_path, sparse=True)
    names = open_checkpoint(tmp_path).tensors
    assert {int(name.split(".")[3]) for name in names if ".layers." in name} == set(range(12))


def test_a_name_that_transformers_changed_is_written_as_the_hub_has_it(script: ModuleType, tmp_path: Path) -> None:
    script.synthesize(preset("gpt-neox-20b"), tmp_path, layers=1, sparse=True)
    names = open_checkpoint(tmp_path).tensors
    assert "embed_out.weight" in names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_look_trained_norms_are_one_and_biases_zero(script: ModuleType, tmp_path: Path, dtype: str) -> None:
    script.synthesize(preset("opt-125m"), tmp_path, dtype=dtype, layers=1)
    norms = weights = 0
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        for name in list(opened.keys()):
            tensor = opened.get_tensor(name)
            assert tensor.dtype == getattr(torch, dtype)
            if name.endswith(".bias"):
                assert not tensor.any(), name
            elif "norm" in name:
                norms += 1
                assert (tensor == 1).all(), name
            else:
                weights += 1
                values = tensor.double()
                assert abs(values.mean()) < 1e-3, name
                assert 0.0195 < values.std() < 0.0205, name
                assert 0.06 < values.abs().max() < 0.2, name  # the tails of a normal distribution, and no more
                assert not torch.equal(tensor[0], tensor[1]), name
    assert (norms, weights) == (3, 8)


def test_a_seed_gives_the_same_bytes_and_another_seed_others(script: ModuleType, tmp_path: Path) -> None:
    contents = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        script.synthesize(preset("opt-125m"), tmp_path / folder, layers=1, seed=seed)
        contents.append((tmp_path / folder / "model.safetensors").read_bytes())
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_shards_hold_no_more_than_asked_and_the_same_tensors(script: ModuleType, tmp_path: Path) -> None:
    script.synthesize(preset("opt-125m"), tmp_path, layers=1, shard_bytes=4_000_000)
    checkpoint = open_checkpoint(tmp_path)
    assert shapes(checkpoint) == transformers_shapes(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == checkpoint.weight_bytes
    assert set(index["weight_map"]) == set(checkpoint.tensors)
    for shard in checkpoint.shards:
        inside = [tensor.nbytes for tensor in checkpoint.tensors.values() if tensor.file == shard]
        assert sum(inside) <= 4_000_000 or len(inside) == 1
    assert len(checkpoint.shards) > 3


def test_a_file_larger_than_the_buffer_is_whole(script: ModuleType, tmp_path: Path) -> None:
    script.synthesize(preset("opt-125m"), tmp_path, layers=1)
    file = tmp_path / "model.safetensors"
    assert file.stat().st_size > script.BUFFER_BYTES
    assert file.stat().st_size % script.DIRECT_ALIGNMENT  # its end is not where an aligned write ends
    last = max(open_checkpoint(tmp_path).tensors.values(), key=lambda tensor: tensor.stop)
    assert last.stop == file.stat().st_size


def test_the_model_loads_in_int8_and_computes_finite_numbers(script: ModuleType, tmp_path: Path) -> None:
    script.synthesize(preset("opt-125m"), tmp_path, layers=1)
    model = load_sharded_int8(tmp_path, device_map="cpu", progress=False)
    with torch.no_grad():
        logits = model(torch.arange(2, 18)[None]).logits
    assert logits.shape == (1, 16, 50272)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_sparse_175b_takes_almost_no_disk(script: ModuleType, tmp_path: Path) -> None:
    made = script.synthesize(preset("opt-175b"), tmp_path, sparse=True)
    on_disk = sum(512 * file.stat().st_blocks for file in tmp_path.iterdir())
    assert on_disk < 10e6
    assert made.disk_bytes == on_disk
    checkpoint = open_checkpoint(tmp_path)
    assert 345e9 < checkpoint.weight_bytes < 355e9
    assert len(checkpoint.shards) == made.shards > 60
    norm = checkpoint.tensors["model.decoder.layers.95.final_layer_norm.weight"]
    with safe_open(norm.file, "pt") as opened:
        assert (opened.get_tensor(norm.name) == 1).all()


def test_a_folder_with_something_in_it_is_refused(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")
    with pytest.raises(BigInt8Error, match="not an empty folder"):
        script.synthesize(preset("opt-125m"), tmp_path, layers=1)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_a_disk_with_too_little_room_is_refused_with_the_numbers(script: ModuleType, tmp_path: Path) -> None:
    huge = preset("opt-175b")
    wider = huge.model_copy(update={"config": huge.config | {"ffn_dim": 2**40}})
    with pytest.raises(BigInt8Error, match=r"needs [\d,]{18,} bytes and [\d,]+ are free"):
        script.synthesize(wider, tmp_path / "new", layers=2)
    assert not (tmp_path / "new").exists()


def test_the_command_line_writes_and_refuses(script: ModuleType, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(script.main)
    command = [
        "gpt2",
        str(tmp_path / "new"),
        "--layers",
        "1",
        "--shard-size",
        "50MB",
        "--dtype",
        "bfloat16",
        "--sparse",
    ]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "2 shards" in first.stdout or "3 shards" in first.stdout
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "new").tensors.values()} == {"BF16"}
    second = CliRunner().invoke(app, command)
    assert second.exit_code == 2
    assert second.stderr.startswith(f"error: {tmp_path / 'new'}: exists")
    assert "Traceback" not in second.stderr
