"""Phi 1 to 2: attention and feed-forward side by side, a head with a bias."""

from .layout import Config, Family, Linear, Sizes, first_set


def sizes(config: Config) -> Sizes:
    """The sizes from config.json."""
    h, f, heads = config["hidden_size"], config.get("intermediate_size", 8192), config.get("num_attention_heads", 32)
    kv_heads = first_set(config, "num_key_value_heads", default=heads)
    d = h // heads
    return Sizes(
        blocks=config["num_hidden_layers"],
        linears=(
            Linear("self_attn.q_proj", h, heads * d, True),
            Linear("self_attn.k_proj", h, kv_heads * d, True),
            Linear("self_attn.v_proj", h, kv_heads * d, True),
            Linear("self_attn.dense", heads * d, h, True),
            Linear("mlp.fc1", h, f, True),
            Linear("mlp.fc2", f, h, True),
        ),
        norm_values=2 * h + (4 * d if config.get("qk_layernorm", False) else 0),
        hidden=h,
        vocab=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        kv_values=2 * kv_heads * d,
        widest=f,
        final_norm_values=2 * h,
        head_bias=True,
        max_context=config.get("max_position_embeddings", 2048),
    )


FAMILY = Family(
    name="Phi",
    model_types=("phi",),
    blocks="model.layers",
    embeddings="model.embed_tokens",
    final_norm="model.final_layernorm",
    sizes=sizes,
)
