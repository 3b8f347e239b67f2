"""GPT-2, whose linear layers are stored as (in_features, out_features)."""

from .layout import Config, Family, Linear, Sizes, first_set


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
    )


FAMILY = Family(
    name="GPT-2",
    model_types=("gpt2",),
    blocks="transformer.h",
    embeddings="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    sizes=sizes,
)
