"""Sizes that a config names, held against the tensors that the checkpoint has, before any module is built from them.

A config from a stranger may name 10^9 layers or heads. transformers would build them one by one, which takes hours and
all memory. A size that the checkpoint has no tensors for is refused, by name.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

FEW_MODULES = 64
"""Up to this many blocks or experts are always allowed: they are built quickly, and missing tensors are named then."""

WIDE = 2**16
"""Widths up to this are always allowed: on the meta device they cost nothing."""

LONG = 2**24
"""Positions up to this are always allowed: the longest models take 10 million tokens."""

COUNTS = re.compile(r"layers?$|depths?$|experts")
POSITIONS = re.compile(r"position|n_ctx|seq_?len|context_length|window")
WIDTHS = re.compile(
    r"hidden_size|n_embd|n_embed|d_model|_dim$|^dim$|intermediate|ffn|n_inner|head|vocab|d_ff|d_kv|rank$|_size$|groups$"
)
NO_MODULES = {"max_window_layers", "num_experts_per_tok", "experts_per_token"}
"""Keys that match COUNTS but count no modules."""


def check_sizes(file: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError for a size in the config, nested ones too, that no checkpoint with these tensors can have.

    `tensors` has the shape of each by name.
    """
    indices = [[int(part) for part in name.split(".") if part.isdigit()] for name in tensors]
    blocks = 1 + max((found[0] for found in indices if found), default=0)
    # experts are numbered after their block, or stacked in one tensor
    experts = 1 + max((max(found[1:], default=0) for found in indices), default=0)
    experts = max([experts, *(shape[0] for shape in tensors.values() if len(shape) > 2)])
    widest = max((size for shape in tensors.values() for size in shape), default=0)
    for name, size in _sizes(config):
        key = name.rpartition(".")[2]
        if key in NO_MODULES:
            continue
        if COUNTS.search(key):
            most, there = (experts, "experts") if "expert" in key else (blocks, "blocks")
            limit, has = max(FEW_MODULES, most), f"has {most} {there}"
        elif POSITIONS.search(key):
            limit, has = max(LONG, widest), f"has no tensor of more than {widest:,} rows or columns"
        elif WIDTHS.search(key):
            limit, has = max(WIDE, widest), f"has no tensor of more than {widest:,} rows or columns"
        else:
            continue
        if size > limit:
            raise CheckpointError(
                f"{file}: {name} is {size:,}, but the checkpoint {has}; the config is damaged or another model's, "
                "download it again"
            )


def _sizes(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """All whole numbers in the config, by key; those of nested configs as vision_config.hidden_size."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield name, value
    elif isinstance(value, Mapping):
        for key, below in value.items():
            yield from _sizes(below, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for below in value:
            yield from _sizes(below, name)
