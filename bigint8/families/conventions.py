"""How config.json files say what a block computes: names of activations, and how much of a head is rotated."""

from typing import Any

from .layout import Activation, Config

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh",
}  # fmt: skip
"""The activations that fused blocks have, by the names that transformers has for them."""


def activation_of(name: Any) -> Activation | None:
    """The activation that a config names, None for one that fused blocks do not have."""
    return ACTIVATIONS.get(name) if isinstance(name, str) else None


def rotated_values(config: Config, head_dim: int, share: float) -> int:
    """How many values of a head are rotated: an even number.

    `share` is the part of the head that the config names beside its rotary parameters. If these name one, it counts.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", share)
    return 2 * -(-int(head_dim * share) // 2)  # transformers makes frequencies for 0, 2, 4, ... below that number
