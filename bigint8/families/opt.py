"""OPT, also its 350M model, whose embeddings are narrower than its blocks."""

from .conventions import activation_of
from .layout import Config, Family, Linear, Recipe, Sizes, first_set


def sizes(config: Config) -> Sizes:
    """The sizes from config.json."""
    h, f, bias = config["hidden_size"], config.get("ffn_dim", 3072), config.get("enable_bias", True)
    norm = 2 * h if config.get("layer_norm_elementwise_affine", True) else 0
    positions = config.get("max_position_embeddings", 2048)
    has_final_norm = config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False)
    attention = tuple(Linear(f"self_attn.{name}_proj", h, h, bias) for name in ("q", "k", "v", "out"))
    return Sizes(
        blocks=config["num_hidden_layers"],
        linears=(*attention, Linear("fc1", h, f, bias), Linear("fc2", f, h, bias)),
        norm_values=2 * norm,
        hidden=h,
        vocab=config["vocab_size"],
        tied=config.get("tie_word_embeddings", True),
        kv_values=2 * h,
        widest=f,
        final_norm_values=norm if has_final_norm else None,
        width=first_set(config, "word_embed_proj_dim", default=h),
        position_values=(positions + 2) * h,  # the first two are of no token
        max_context=positions,
    )


def recipe(config: Config) -> Recipe | None:
    """How a block computes, None where the config asks for an activation that fused blocks do not have."""
    activation, heads = activation_of(config.get("activation_function", "relu")), config.get("num_attention_heads", 12)
    if activation is None:
        return None
    return Recipe(
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out="self_attn.out_proj",
        up=("fc1",),
        down="fc2",
        activation=activation,
        heads=heads,
        kv_heads=heads,
        head_dim=config["hidden_size"] // heads,
        norm_last=not config.get("do_layer_norm_before", True),
    )


FAMILY = Family(
    name="OPT",
    model_types=("opt",),
    blocks="model.decoder.layers",
    embeddings="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    project_in="model.decoder.project_in",
    final_norm="model.decoder.final_layer_norm",
    project_out="model.decoder.project_out",
    sizes=sizes,
    masked_positions=True,
    recipe=recipe,
)
