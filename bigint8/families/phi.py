"""Phi 1 to 2: attention and feed-forward side by side, a head with a bias."""

from .conventions import activation_of, rotated_values
from .layout import Config, Family, Linear, Recipe, Sizes, first_set


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


def recipe(config: Config) -> Recipe | None:
    """How a block computes, None where the config asks for an activation that fused blocks do not have."""
    activation, heads = activation_of(config.get("hidden_act", "gelu_new")), config.get("num_attention_heads", 32)
    if activation is None:
        return None
    head_dim, has_head_norms = config["hidden_size"] // heads, config.get("qk_layernorm", False)
    return Recipe(
        attention_norm="input_layernorm",
        mlp_norm=None,
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out="self_attn.dense",
        up=("mlp.fc1",),
        down="mlp.fc2",
        activation=activation,
        heads=heads,
        kv_heads=first_set(config, "num_key_value_heads", default=heads),
        head_dim=head_dim,
        rotated=rotated_values(config, head_dim, config.get("partial_rotary_factor", 0.5)),
        parallel=True,
        q_norm="self_attn.q_layernorm" if has_head_norms else None,
        k_norm="self_attn.k_layernorm" if has_head_norms else None,
        rotary="model.rotary_emb",
    )


FAMILY = Family(
    name="Phi",
    model_types=("phi",),
    blocks="model.layers",
    embeddings="model.embed_tokens",
    final_norm="model.final_layernorm",
    weightless=("model.rotary_emb", "model.embed_dropout"),
    sizes=sizes,
    recipe=recipe,
)
