"""GPT-NeoX, also Pythia."""

from .conventions import activation_of, rotated_values
from .layout import Config, Family, Linear, Recipe, Sizes


def sizes(config: Config) -> Sizes:
    """The sizes from config.json."""
    h, f, bias = config["hidden_size"], config.get("intermediate_size", 24576), config.get("attention_bias", True)
    heads = config.get("num_attention_heads", 64)
    return Sizes(
        blocks=config["num_hidden_layers"],
        linears=(
            Linear("attention.query_key_value", h, 3 * h, bias),
            Linear("attention.dense", h, h, bias),
            Linear("mlp.dense_h_to_4h", h, f, True),
            Linear("mlp.dense_4h_to_h", f, h, True),
        ),
        norm_values=4 * h,
        hidden=h,
        vocab=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        kv_values=2 * heads * (h // heads),
        widest=f,
        final_norm_values=2 * h,
        max_context=config.get("max_position_embeddings", 2048),
    )


def recipe(config: Config) -> Recipe | None:
    """How a block computes, None where the config asks for an activation that fused blocks do not have."""
    activation, heads = activation_of(config.get("hidden_act", "gelu")), config.get("num_attention_heads", 64)
    if activation is None:
        return None
    head_dim = config["hidden_size"] // heads
    return Recipe(
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        qkv=("attention.query_key_value",),
        out="attention.dense",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        activation=activation,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        order="heads",
        rotated=rotated_values(config, head_dim, config.get("rotary_pct", 0.25)),
        parallel=config.get("use_parallel_residual", True),
        rotary="gpt_neox.rotary_emb",
    )


FAMILY = Family(
    name="GPT-NeoX",
    model_types=("gpt_neox",),
    blocks="gpt_neox.layers",
    embeddings="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    weightless=("gpt_neox.rotary_emb", "gpt_neox.emb_dropout"),
    sizes=sizes,
    recipe=recipe,
    old_names={"embed_out": "lm_head"},
)
