"""BLOOM: a norm after the embeddings, attention biased by distance (alibi), which transformers does not fuse."""

from .layout import Config, Family, Linear, Recipe, Sizes, first_set


def sizes(config: Config) -> Sizes:
    """The sizes from config.json."""
    h, heads = (
        first_set(config, "hidden_size", "n_embed"),
        first_set(config, "n_head", "num_attention_heads", default=8),
    )
    blocks = first_set(config, "num_hidden_layers", "n_layer")
    return Sizes(
        blocks=blocks,
        linears=(
            Linear("self_attention.query_key_value", h, 3 * h, True),
            Linear("self_attention.dense", h, h, True),
            Linear("mlp.dense_h_to_4h", h, 4 * h, True),
            Linear("mlp.dense_4h_to_h", 4 * h, h, True),
        ),
        norm_values=4 * h,
        hidden=h,
        vocab=config["vocab_size"],
        tied=config.get("tie_word_embeddings", True),
        kv_values=2 * heads * (h // heads),
        widest=4 * h,
        final_norm_values=2 * h,
        embedding_norm_values=2 * h,
    )


def recipe(config: Config) -> Recipe | None:
    """How a block computes, None where the residual stream starts from the normed values."""
    h, heads = (
        first_set(config, "hidden_size", "n_embed"),
        first_set(config, "n_head", "num_attention_heads", default=8),
    )
    if config.get("apply_residual_connection_post_layernorm", False):
        return None
    return Recipe(
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        qkv=("self_attention.query_key_value",),
        out="self_attention.dense",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        activation="gelu_tanh",
        heads=heads,
        kv_heads=heads,
        head_dim=h // heads,
        order="heads",
        alibi=True,
    )


FAMILY = Family(
    name="BLOOM",
    model_types=("bloom",),
    blocks="transformer.h",
    embeddings="transformer.word_embeddings",
    embedding_norm="transformer.word_embeddings_layernorm",
    final_norm="transformer.ln_f",
    sizes=sizes,
    recipe=recipe,
)
