"""Llama and the families of its shape: Mistral, Qwen2, Qwen3, TinyLlama, SmolLM2."""

from typing import NamedTuple

from .conventions import activation_of
from .layout import Config, Family, Linear, Recipe, Sizes, first_set

DEFAULTS: dict[str, Config] = {
    "llama": {"num_attention_heads": 32, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
    "qwen2": {
        "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 22016, "sliding_window": 4096,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 22016, "sliding_window": 4096,
        "max_position_embeddings": 32768, "head_dim": 128,
    },
}  # fmt: skip
"""What transformers' config classes take for a key that config.json lacks."""


class _Shape(NamedTuple):
    """Query heads, key heads, values of a head."""

    heads: int
    kv_heads: int
    head_dim: int


def _shape(config: Config) -> _Shape:
    config = {**DEFAULTS[config["model_type"]], **config}
    heads = config["num_attention_heads"]
    return _Shape(
        heads,
        first_set(config, "num_key_value_heads", default=heads),
        first_set(config, "head_dim", default=config["hidden_size"] // heads),
    )


def sizes(config: Config) -> Sizes:
    """The sizes from config.json."""
    kind, shape = config["model_type"], _shape(config)
    config = {**DEFAULTS[kind], **config}
    h, f = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, d = shape.heads, shape.kv_heads, shape.head_dim
    attention_bias = config.get("attention_bias", False)
    qkv_bias = True if kind == "qwen2" else attention_bias
    out_bias = attention_bias and kind != "qwen2"
    mlp_bias = config.get("mlp_bias", False)
    return Sizes(
        blocks=config["num_hidden_layers"],
        linears=(
            Linear("self_attn.q_proj", h, heads * d, qkv_bias),
            Linear("self_attn.k_proj", h, kv_heads * d, qkv_bias),
            Linear("self_attn.v_proj", h, kv_heads * d, qkv_bias),
            Linear("self_attn.o_proj", heads * d, h, out_bias),
            Linear("mlp.gate_proj", h, f, mlp_bias),
            Linear("mlp.up_proj", h, f, mlp_bias),
            Linear("mlp.down_proj", f, h, mlp_bias),
        ),
        norm_values=2 * h + (2 * d if kind == "qwen3" else 0),
        hidden=h,
        vocab=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        kv_values=2 * kv_heads * d,
        widest=f,
        final_norm_values=h,
        windows=_windows(config, config["num_hidden_layers"]),
        max_context=config.get("max_position_embeddings"),
    )


def _windows(config: Config, blocks: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    is_qwen = config["model_type"] in ("qwen2", "qwen3")
    if is_qwen and not config.get("use_sliding_window", False):
        window = None
    if window is None or config["model_type"] == "llama":
        return (None,) * blocks
    if types := config.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    full = config.get("max_window_layers", 28) if is_qwen else 0
    return tuple(window if i >= full else None for i in range(blocks))


def recipe(config: Config) -> Recipe | None:
    """How a block computes, None where the config asks for an activation that fused blocks do not have."""
    shape, activation = _shape(config), activation_of(config.get("hidden_act", "silu"))
    if activation is None:
        return None
    has_head_norms = config["model_type"] == "qwen3"
    return Recipe(
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out="self_attn.o_proj",
        up=("mlp.gate_proj", "mlp.up_proj"),
        down="mlp.down_proj",
        activation=activation,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rotated=shape.head_dim,
        gated=True,
        centered=False,
        q_norm="self_attn.q_norm" if has_head_norms else None,
        k_norm="self_attn.k_norm" if has_head_norms else None,
        rotary="model.rotary_emb",
    )


FAMILY = Family(
    name="Llama",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    blocks="model.layers",
    embeddings="model.embed_tokens",
    final_norm="model.norm",
    weightless=("model.rotary_emb",),
    sizes=sizes,
    recipe=recipe,
)
