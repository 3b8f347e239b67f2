"""Llama and the families of its shape: Mistral, Qwen2, Qwen3, TinyLlama, SmolLM2."""

from .layout import Config, Family, Linear, Sizes, first_set

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


def sizes(config: Config) -> Sizes:
    """The sizes from config.json."""
    kind = config["model_type"]
    config = {**DEFAULTS[kind], **config}
    h, f, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv_heads = first_set(config, "num_key_value_heads", default=heads)
    d = first_set(config, "head_dim", default=h // heads)
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


FAMILY = Family(
    name="Llama",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    blocks="model.layers",
    embeddings="model.embed_tokens",
    final_norm="model.norm",
    sizes=sizes,
)
