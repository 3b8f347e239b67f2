"""Reading and damaging checkpoint folders, with safetensors' own functions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

INDEX = "model.safetensors.index.json"


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's shards; checks that each name stands in one shard, and in the index."""
    tensors: dict[str, Tensor] = {}
    where = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        loaded = load_file(shard)
        assert not tensors.keys() & loaded.keys()
        tensors |= loaded
        where |= dict.fromkeys(loaded, shard.name)
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        assert index["weight_map"] == where
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


def shard_of(folder: Path, name: str) -> Path:
    """The file that holds a tensor."""
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            if name in file.keys():  # noqa: SIM118  (not a mapping)
                return shard
    raise KeyError(name)


def rewrite(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Apply `edit` to each shard's tensors and save them as valid safetensors, with an index that agrees."""
    weight_map, total_bytes = {}, 0
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = load_file(shard)
        edit(tensors)
        shard.unlink()
        if tensors:
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if (folder / INDEX).is_file():
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}))


def replace(folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Change one tensor; None takes it away."""

    def edit(tensors: dict[str, Tensor]) -> None:
        if name in tensors and (changed := change(tensors.pop(name))) is not None:
            tensors[name] = changed

    rewrite(folder, edit)


def set_config(folder: Path, **values: Any) -> None:
    """Change values of config.json; None takes one away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def quantization_of(folder: Path) -> dict[str, Any]:
    """What config.json says of int8."""
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])


def save_tokenizer(folder: Path) -> None:
    """One word a token."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2").save_pretrained(folder)
