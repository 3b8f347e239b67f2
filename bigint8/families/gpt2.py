"""GPT-2, whose linear layers are stored as (in_features, out_features)."""

from .conventions import activation_of
from .layout import Config, Family, Linear, Recipe, Sizes, first_set


def sizes(config: Config) -> Sizes:
    """The sizes from config.json."""
    h, heads = (
        first_set(config, "n_embd", "hidden_size"),
        first_set(config, "n_head", "num_attention_heads", default=12),
    )
    f = first_set(config, "n_inner", default=4 * h)
    positions = first_set(config, "n_positions", "max_position_embeddings", default=1024)
    return Sizes(
        blocks=first_set(config, "num_hidden_layers", "n_layer"),
        linears=(
            Linear("attn.c_attn", h, 3 * h, True),
            Linear("attn.c_proj", h, h, True),
            Linear("mlp.c_fc", h, f, True),
            Linear("mlp.c_proj", f, h, True),
        ),
        norm_values=4 * h,
        hidden=h,
        vocab=config["vocab_size"],
        tied=config.get("tie_word_embeddings", True),
        kv_values=2 * heads * (h // heads),
        widest=f,
        final_norm_values=2 * h,
        position_values=positions * h,
        max_context=positions,
        transposed=True,
    )


def recipe(config: Config) -> Recipe | None:
    """How a block computes, None where the config asks for another attention or activation than fused blocks have."""
    h, heads = (
        first_set(config, "n_embd", "hidden_size"),
        first_set(config, "n_head", "num_attention_heads", default=12),
    )
    activation = activation_of(config.get("activation_function", "gelu_new"))
    unusual = ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention")
    is_unusual = not config.get("scale_attn_weights", True) or any(config.get(name, False) for name in unusual)
    if activation is None or is_unusual:
        return None
    return Recipe(
        attention_norm="ln_1",
        mlp_norm="ln_2",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        activation=activation,
        heads=heads,
        kv_heads=heads,
        head_dim=h // heads,
    )


FAMILY = Family(
    name="GPT-2",
    model_types=("gpt2",),
    blocks="transformer.h",
    embeddings="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    weightless=("transformer.drop",),
    sizes=sizes,
    recipe=recipe,
)
