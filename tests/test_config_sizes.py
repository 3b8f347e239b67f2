"""Sizes from an untrusted config: what no checkpoint of that size can be is refused by name, at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import set_config
from tiny import SIZES, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from bigint8 import CheckpointError, PlanError
from bigint8.checkpoint.headers import open_checkpoint
from bigint8.checkpoint.sizes import check_sizes
from bigint8.families.table import MOST_BLOCKS, layout_of
from bigint8.session import find_model, load_sharded_int8
from bigint8.sources.presets import find_preset, preset_names

HUGE = 10**9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny("llama", False, tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"num_hidden_layers": 20_000}, "num_hidden_layers is 20,000, but the checkpoint has 5 blocks"),
        ({"num_hidden_layers": HUGE}, "num_hidden_layers is 1,000,000,000"),
        ({"num_attention_heads": HUGE}, "num_attention_heads is 1,000,000,000"),
        ({"num_key_value_heads": 10**30}, "num_key_value_heads is"),
        ({"head_dim": HUGE}, "head_dim is"),
        ({"hidden_size": HUGE}, "hidden_size is"),
        ({"intermediate_size": HUGE}, "intermediate_size is"),
        ({"num_local_experts": HUGE}, "num_local_experts is 1,000,000,000, but the checkpoint has 1 experts"),
        ({"n_routed_experts": 20_000}, "n_routed_experts is"),
        ({"vocab_size": HUGE}, "vocab_size is 1,000,000,000, but the checkpoint has no tensor of more than 128 rows"),
        ({"max_position_embeddings": HUGE}, "max_position_embeddings is"),
        ({"text_config": {"num_hidden_layers": HUGE}}, "text_config.num_hidden_layers is"),
        ({"vision_config": {"inner": [{"hidden_size": HUGE}]}}, "vision_config.inner.hidden_size is"),
    ],
)
def test_a_size_that_the_tensors_cannot_have_is_refused_before_a_module_is_built(values, named, checkpoint, tmp_path):
    for shard in checkpoint.iterdir():
        (tmp_path / shard.name).symlink_to(shard)
    (tmp_path / "config.json").unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(CheckpointError) as error:
        load_sharded_int8(tmp_path, progress=False)
    assert named in str(error.value) and str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_the_sizes_of_a_real_checkpoint_are_believed(kind, tmp_path):
    open_checkpoint(save_tiny(kind, True, tmp_path))
    set_config(tmp_path, max_window_layers=70, rope_theta=75_000_000, num_experts_per_tok=8, eos_token_id=10**6)
    open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", preset_names())
def test_the_sizes_of_every_preset_are_believed_beside_its_own_tensors(name):
    """Shapes as large as its embeddings, and a tensor for each block."""
    config = find_preset(name).config
    layout = layout_of(config)
    tensors = {f"{block.name}.weight": (layout.sizes.hidden, layout.sizes.widest) for block in layout.blocks}
    check_sizes(Path("config.json"), config, tensors | {"embeddings.weight": (layout.sizes.vocab, layout.sizes.hidden)})


def test_experts_are_counted_whether_numbered_or_stacked():
    config = {"num_local_experts": 300}
    check_sizes(Path("c"), config, {f"model.layers.0.experts.{i}.weight": (2, 2) for i in range(300)})
    check_sizes(Path("c"), config, {"model.layers.0.experts.weight": (300, 2, 2)})
    with pytest.raises(CheckpointError, match="num_local_experts is 300, but the checkpoint has 200 experts"):
        check_sizes(Path("c"), config, {"model.layers.0.experts.weight": (200, 2, 2)})


def test_a_plan_from_a_config_alone_refuses_blocks_that_no_model_has():
    """In a process that may not take much memory: a list of so many blocks would take 8 GB."""
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30,) * 2)\n"
        "from bigint8.families.table import layout_of\n"
        "from bigint8.sources.presets import find_preset\n"
        f"layout_of(find_preset('llama-7b').config | {{'num_hidden_layers': {HUGE}}})\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert "PlanError: the config of this Llama model" in ended.stderr
    assert f"num_hidden_layers: {HUGE}; models have" in ended.stderr
    with pytest.raises(PlanError, match="num_hidden_layers: 1025"):
        layout_of(find_preset("llama-7b").config | {"num_hidden_layers": MOST_BLOCKS + 1})


def test_buffers_that_grow_with_the_positions_are_measured_before_they_are_computed(tmp_path):
    """GPT-J's table of sines has a row for each position, and no checkpoint holds it."""
    config = AutoConfig.for_model(
        "gptj", vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=8, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    load_sharded_int8(tmp_path, progress=False)
    set_config(tmp_path, n_positions=2**24, rotary_dim=128)
    assert find_model(tmp_path).spec.layout is None
    with pytest.raises(CheckpointError, match=r"config\.json: .*buffers.* would take 16\.00 GiB"):
        load_sharded_int8(tmp_path, progress=False)


def test_a_config_of_a_gigabyte_is_not_read(checkpoint, tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(CheckpointError, match=r"config\.json: 1,073,741,824 bytes, more than the"):
        open_checkpoint(tmp_path)
