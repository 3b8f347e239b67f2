"""What differs between model families: where a model is cut into stages, and how many bytes its parts take.

Plain data, without torch, so that a plan is printed at once. A new family is one entry of `FAMILIES`: the names of
its modules in transformers, and a function that counts its layers from the config.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import PlanError
from .stored_int8 import has_int8_head

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """Sizes of a group of modules: values in int8, int8 rows (one float32 scale each), values in the model's own dtype,
    and values of tables that are 16-bit whatever that dtype is."""

    int8_values: int = 0
    int8_rows: int = 0
    other_values: int = 0
    table_values: int = 0

    def weight_bytes(self, dtype_bytes: int) -> int:
        """Bytes on a device where a value of the model's own dtype takes `dtype_bytes`."""
        return self.int8_values + 4 * self.int8_rows + dtype_bytes * self.other_values + 2 * self.table_values

    def __add__(self, other: "Part") -> "Part":
        return Part(
            self.int8_values + other.int8_values,
            self.int8_rows + other.int8_rows,
            self.other_values + other.other_values,
            self.table_values + other.table_values,
        )


@dataclass(frozen=True)
class Layout:
    """The sizes of a model: `blocks` decoder layers around the embeddings, the final norm and the head.

    `head` lacks its matrix when it is tied to the embeddings; `head_width` is that matrix's number of columns.
    `kv_values` is the size of a token in a block's cache; `windows` holds each block's sliding window in tokens, None
    where it attends to all; `eager_heads` the heads whose attention scores are written out, 0 where attention is fused.
    """

    embeddings: Part
    blocks: tuple[Part, ...]
    final: Part
    head: Part
    tied: bool
    kv_values: int
    windows: tuple[int | None, ...]
    hidden: int
    widest: int
    vocab: int
    max_context: int | None
    head_width: int
    eager_heads: int = 0

    def kv_bytes(self, block: int, context: int, batch_size: int, dtype_bytes: int) -> int:
        """Bytes of one block's cache once `batch_size` sequences of `context` tokens are in it."""
        window = self.windows[block]
        # transformers keeps window - 1 tokens: the window of the next token, without that token
        tokens = context if window is None else min(context, window - 1)
        return self.kv_values * tokens * batch_size * dtype_bytes

    def weight_bytes(self, dtype_bytes: int) -> int:
        whole = sum(self.blocks, self.embeddings + self.final + self.head)
        return whole.weight_bytes(dtype_bytes)


@dataclass(frozen=True)
class Family:
    """One model family: full module names in its transformers model, and its sizes.

    first_stage: modules that only the first stage keeps; on later stages `embedding_norm` becomes the identity,
        `positions` gives zeros, `project_in` is dropped
    last_stage: modules that only the last stage keeps; the identity elsewhere
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    embeddings: str
    final_norm: str
    layout: Callable[[Config], Layout]
    head: str = "lm_head"
    positions: str | None = None
    embedding_norm: str | None = None
    project_in: str | None = None
    project_out: str | None = None

    @property
    def first_stage(self) -> tuple[str, ...]:
        names = (self.embeddings, self.positions, self.embedding_norm, self.project_in)
        return tuple(name for name in names if name)

    @property
    def last_stage(self) -> tuple[str, ...]:
        return tuple(name for name in (self.final_norm, self.project_out) if name)


def _linears(*linears: tuple[int, int, bool]) -> Part:
    """Linear layers given as (in_features, out_features, has a bias)."""
    return Part(
        int8_values=sum(k * n for k, n, _ in linears),
        int8_rows=sum(n for _, n, _ in linears),
        other_values=sum(n for _, n, bias in linears if bias),
    )


def _others(values: int) -> Part:
    return Part(other_values=values)


def _layout(
    config: Config,
    *,
    block: Part,
    widest: int,
    kv_heads: int,
    head_dim: int,
    norm: int,
    tied: bool,
    embeddings: Part | None = None,
    final: Part | None = None,
    head_bias: bool = False,
    windows: tuple[int | None, ...] | None = None,
    max_context: int | None = None,
    eager_heads: int = 0,
) -> Layout:
    hidden, layers = _first(config, "hidden_size", "n_embd", "n_embed"), layers_of(config)
    vocab = config["vocab_size"]
    return Layout(
        embeddings=embeddings or _others(vocab * hidden),
        blocks=(block,) * layers,
        final=final or _others(norm),
        head=_others((0 if tied else vocab * hidden) + (vocab if head_bias else 0)),
        tied=tied,
        kv_values=2 * kv_heads * head_dim,
        windows=windows or (None,) * layers,
        hidden=hidden,
        widest=widest,
        vocab=vocab,
        max_context=max_context,
        head_width=hidden,
        eager_heads=eager_heads,
    )


def _first(config: Config, *names: str, default: Any = None) -> Any:
    """The first of these keys that the config sets; config files of different ages name the same thing differently."""
    for name in names:
        if config.get(name) is not None:
            return config[name]
    return default


def layers_of(config: Config) -> int:
    """The number of blocks that a config names."""
    layers = _first(config, "num_hidden_layers", "n_layer")
    if not isinstance(layers, int):
        raise ValueError(f"number of layers: {layers!r}")
    return layers


def _windows(config: Config, layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if config["model_type"] in ("qwen2", "qwen3") and not config.get("use_sliding_window", False):
        window = None
    if window is None or config["model_type"] == "llama":
        return (None,) * layers
    if types := config.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    full = config.get("max_window_layers", 28) if config["model_type"] in ("qwen2", "qwen3") else 0
    return tuple(window if i >= full else None for i in range(layers))


def _llama(config: Config) -> Layout:
    kind = config["model_type"]
    h, f, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv_heads = _first(config, "num_key_value_heads", default=heads)
    d = _first(config, "head_dim", default=h // heads)
    attention_bias = config.get("attention_bias", False)
    qkv_bias = True if kind == "qwen2" else attention_bias
    out_bias = attention_bias and kind != "qwen2"
    mlp_bias = config.get("mlp_bias", False)
    block = _linears(
        (h, heads * d, qkv_bias), (h, kv_heads * d, qkv_bias), (h, kv_heads * d, qkv_bias), (heads * d, h, out_bias),
        (h, f, mlp_bias), (h, f, mlp_bias), (f, h, mlp_bias),
    )  # fmt: skip
    return _layout(
        config,
        block=block + _others(2 * h + (2 * d if kind == "qwen3" else 0)),
        widest=f,
        kv_heads=kv_heads,
        head_dim=d,
        norm=h,
        tied=config.get("tie_word_embeddings", False),
        windows=_windows(config, layers_of(config)),
        max_context=config.get("max_position_embeddings"),
    )


def _opt(config: Config) -> Layout:
    h, f, bias = config["hidden_size"], config["ffn_dim"], config.get("enable_bias", True)
    norm = 2 * h if config.get("layer_norm_elementwise_affine", True) else 0
    width = _first(config, "word_embed_proj_dim", default=h)
    positions, vocab = config.get("max_position_embeddings", 2048), config["vocab_size"]
    has_final_norm = config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False)
    block = _linears(*[(h, h, bias)] * 4, (h, f, bias), (f, h, bias)) + _others(2 * norm)
    final = _others(norm if has_final_norm else 0)
    embeddings = _others(vocab * width + (positions + 2) * h)
    if width != h:
        embeddings += _linears((width, h, False))
        final += _linears((h, width, False))
    tied = config.get("tie_word_embeddings", True)
    layout = _layout(
        config,
        block=block,
        widest=f,
        kv_heads=config["num_attention_heads"],
        head_dim=h // config["num_attention_heads"],
        norm=norm,
        tied=tied,
        embeddings=embeddings,
        final=final,
        max_context=positions,
    )
    return replace(layout, head_width=width, head=layout.head if tied else _others(vocab * width))


def _bloom(config: Config) -> Layout:
    h, heads = _first(config, "hidden_size", "n_embed"), _first(config, "n_head", "num_attention_heads")
    return _layout(
        config,
        block=_linears((h, 3 * h, True), (h, h, True), (h, 4 * h, True), (4 * h, h, True)) + _others(4 * h),
        widest=4 * h,
        kv_heads=heads,
        head_dim=h // heads,
        norm=2 * h,
        tied=config.get("tie_word_embeddings", True),
        embeddings=_others(config["vocab_size"] * h + 2 * h),
        eager_heads=heads,
    )


def _gpt_neox(config: Config) -> Layout:
    h, f, bias = config["hidden_size"], config["intermediate_size"], config.get("attention_bias", True)
    return _layout(
        config,
        block=_linears((h, 3 * h, bias), (h, h, bias), (h, f, True), (f, h, True)) + _others(4 * h),
        widest=f,
        kv_heads=config["num_attention_heads"],
        head_dim=h // config["num_attention_heads"],
        norm=2 * h,
        tied=config.get("tie_word_embeddings", False),
        max_context=config.get("max_position_embeddings"),
    )


def _gpt2(config: Config) -> Layout:
    h, heads = _first(config, "n_embd", "hidden_size"), _first(config, "n_head", "num_attention_heads")
    f = _first(config, "n_inner", default=4 * h)
    positions = _first(config, "n_positions", "max_position_embeddings", default=1024)
    return _layout(
        config,
        block=_linears((h, 3 * h, True), (h, h, True), (h, f, True), (f, h, True)) + _others(4 * h),
        widest=f,
        kv_heads=heads,
        head_dim=h // heads,
        norm=2 * h,
        tied=config.get("tie_word_embeddings", True),
        embeddings=_others((config["vocab_size"] + positions) * h),
        max_context=positions,
    )


def _phi(config: Config) -> Layout:
    h, f, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv_heads = _first(config, "num_key_value_heads", default=heads)
    d = h // heads
    block = _linears(
        (h, heads * d, True), (h, kv_heads * d, True), (h, kv_heads * d, True), (heads * d, h, True),
        (h, f, True), (f, h, True),
    )  # fmt: skip
    return _layout(
        config,
        block=block + _others(2 * h + (4 * d if config.get("qk_layernorm", False) else 0)),
        widest=f,
        kv_heads=kv_heads,
        head_dim=d,
        norm=2 * h,
        tied=config.get("tie_word_embeddings", False),
        head_bias=True,
        max_context=config.get("max_position_embeddings"),
    )


FAMILIES = (
    Family(
        name="Llama",
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        blocks="model.layers",
        embeddings="model.embed_tokens",
        final_norm="model.norm",
        layout=_llama,
    ),
    Family(
        name="OPT",
        model_types=("opt",),
        blocks="model.decoder.layers",
        embeddings="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        project_in="model.decoder.project_in",
        final_norm="model.decoder.final_layer_norm",
        project_out="model.decoder.project_out",
        layout=_opt,
    ),
    Family(
        name="BLOOM",
        model_types=("bloom",),
        blocks="transformer.h",
        embeddings="transformer.word_embeddings",
        embedding_norm="transformer.word_embeddings_layernorm",
        final_norm="transformer.ln_f",
        layout=_bloom,
    ),
    Family(
        name="GPT-NeoX",
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        embeddings="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        layout=_gpt_neox,
    ),
    Family(
        name="GPT-2",
        model_types=("gpt2",),
        blocks="transformer.h",
        embeddings="transformer.wte",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        layout=_gpt2,
    ),
    Family(
        name="Phi",
        model_types=("phi",),
        blocks="model.layers",
        embeddings="model.embed_tokens",
        final_norm="model.final_layernorm",
        layout=_phi,
    ),
)


def family_of(model_type: str) -> Family:
    """The family of a transformers model type. Raises PlanError for one that is not in the table."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = "; ".join(f"{family.name} ({', '.join(family.model_types)})" for family in FAMILIES)
    raise PlanError(
        f"model type {model_type!r} cannot be cut into a pipeline yet; the families that can: {known}. "
        "In one process, load_sharded_int8 loads it all the same"
    )


def layout_of(config: Config, int8_head: bool = False, stored: str | None = None) -> Layout:
    """The sizes of a model from its config.json, with its head in int8 if that is asked for or stored so.

    `stored` is the dtype of the checkpoint: where it is a 16-bit one, the token embeddings and the head stay in it.
    Raises PlanError for an unknown family or a config without a size.
    """
    family = family_of(config["model_type"])
    try:
        layout = family.layout(config)
        _check(layout)
        int8_head = int8_head or has_int8_head(config, family.head)
        if int8_head:
            layout = _with_int8_head(layout)
        if stored in ("float16", "bfloat16"):
            layout = _with_16bit_tables(layout, int8_head)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise PlanError(f"the config of this {family.name} model lacks or garbles a size ({error!r})") from None
    return layout


def _with_int8_head(layout: Layout) -> Layout:
    """The head's matrix, and with it the embeddings where the two are tied, in int8."""
    values = layout.vocab * layout.head_width
    change = Part(int8_values=values, int8_rows=layout.vocab, other_values=-values)
    if layout.tied:
        return replace(layout, embeddings=layout.embeddings + change)
    return replace(layout, head=layout.head + change)


def _with_16bit_tables(layout: Layout, int8_head: bool) -> Layout:
    """Token embeddings and head, those that are not int8, in 16-bit whatever the model's own dtype is."""
    values = layout.vocab * layout.head_width
    change = Part(other_values=-values, table_values=values)
    if layout.tied:
        return layout if int8_head else replace(layout, embeddings=layout.embeddings + change)
    head = layout.head if int8_head else layout.head + change
    return replace(layout, embeddings=layout.embeddings + change, head=head)


def _check(layout: Layout) -> None:
    """Raise ValueError for sizes that no model has."""
    whole = sum(layout.blocks, layout.embeddings + layout.final + layout.head)
    sizes = {
        "blocks": len(layout.blocks), "hidden size": layout.hidden, "widest layer": layout.widest,
        "vocabulary": layout.vocab, "cache values": layout.kv_values, "int8 values": whole.int8_values,
        "int8 rows": whole.int8_rows, "16-bit values": whole.other_values,
    }  # fmt: skip
    if layout.max_context is not None:
        sizes["context"] = layout.max_context
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: {size!r}")
    if len(layout.windows) != len(layout.blocks):
        raise ValueError(f"{len(layout.windows)} layer_types for {len(layout.blocks)} blocks")
    for window in layout.windows:
        if window is not None and (not isinstance(window, int) or window < 2):
            raise ValueError(f"sliding window: {window!r}")
