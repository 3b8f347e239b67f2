"""The sizes of a model, module by module: what a plan counts, and the names by which stages are cut."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from ..errors import BigInt8Error
from ..options import PAGE_TOKENS, Int8Config

Config = Mapping[str, Any]

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]
"""The same choice as `bigint8_kernels.step.Activation`, which cannot be imported without torch."""


@dataclass(frozen=True)
class Part:
    """Sizes of one or more modules: values in int8, int8 rows (one float32 scale each), values in the model's own
    dtype, and values of tables that are 16-bit whatever that dtype is."""

    int8_values: int = 0
    int8_rows: int = 0
    other_values: int = 0
    table_values: int = 0

    def weight_bytes(self, dtype_bytes: int) -> int:
        """Bytes on a device where a value of the model's own dtype takes `dtype_bytes`."""
        return self.int8_values + 4 * self.int8_rows + dtype_bytes * self.other_values + 2 * self.table_values

    def stored_bytes(self, dtype_bytes: int, int8: bool) -> int:
        """Bytes in a checkpoint whose floats take `dtype_bytes`, and whose int8 layers are `int8` or floats there."""
        layers = self.int8_values + 4 * self.int8_rows if int8 else dtype_bytes * self.int8_values
        return layers + dtype_bytes * (self.other_values + self.table_values)

    def __add__(self, other: "Part") -> "Part":
        return Part(
            self.int8_values + other.int8_values,
            self.int8_rows + other.int8_rows,
            self.other_values + other.other_values,
            self.table_values + other.table_values,
        )


@dataclass(frozen=True)
class Module:
    """A module that is never cut: its full name in the transformers model, and its sizes."""

    name: str
    part: Part


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block: its name within the block, and its features."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False


@dataclass(frozen=True)
class Sizes:
    """What a config says of a model, before it is decided which linear layers are int8.

    linears, norm_values: the linear layers of one block, and how many other values it has
    width: columns of the token embeddings; if not `hidden`, `project_in` and `project_out` convert between the two
    position_values, embedding_norm_values, final_norm_values: values of each module, None if the model lacks it
    kv_values: keys and values of a token in one block; windows: each block's sliding window in tokens, None where it
        attends to all; widest: outputs of the widest layer
    transposed: linear layers are stored as (inputs, outputs), and come whole when they are read
    """

    blocks: int
    linears: tuple[Linear, ...]
    norm_values: int
    hidden: int
    vocab: int
    tied: bool
    kv_values: int
    widest: int
    final_norm_values: int | None
    width: int | None = None
    position_values: int | None = None
    embedding_norm_values: int | None = None
    head_bias: bool = False
    windows: tuple[int | None, ...] = ()
    max_context: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Recipe:
    """How a block computes, by the names of its modules within the block: what a fused block is made from.

    attention_norm, mlp_norm: the norms; mlp_norm None: the feed-forward part takes what attention does (Phi)
    qkv: q, k and v, or the one layer that gives all three; order: how its outputs lie: "split" (all q, all k, all v) or
        "heads" (q, k and v of each head together: GPT-NeoX, BLOOM); out: the layer after attention
    up, down: the feed-forward part; gated: `up` are gate and up
    activation: as `bigint8_kernels.step` names it
    heads, kv_heads, head_dim, rotated: as in `bigint8_kernels.step.Attention`; alibi: scores are biased by distance
    q_norm, k_norm: norms of the heads, None without
    centered: layer norms rather than RMS norms
    parallel: attention and feed-forward part start from the same residual stream
    norm_last: each norm comes after its part, over the residual stream (OPT-350M)
    rotary: the full name of the module in the model that has the rotary frequencies, None without
    """

    attention_norm: str
    mlp_norm: str | None
    qkv: tuple[str, ...]
    out: str
    up: tuple[str, ...]
    down: str
    activation: Activation
    heads: int
    kv_heads: int
    head_dim: int
    order: Literal["split", "heads"] = "split"
    rotated: int = 0
    alibi: bool = False
    gated: bool = False
    centered: bool = True
    parallel: bool = False
    norm_last: bool = False
    q_norm: str | None = None
    k_norm: str | None = None
    rotary: str | None = None


@dataclass(frozen=True)
class Family:
    """One model family: full module names in its transformers model, and its sizes.

    `recipe` says how a block computes, None for a config that asks for what fused blocks do not do. `old_names`: from a
    module's name in older checkpoints to its name here. `weightless`: modules beside the blocks that have no weights.
    `masked_positions`: where no positions are given, masked tokens are not counted.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    embeddings: str
    final_norm: str
    sizes: Callable[[Config], Sizes]
    recipe: Callable[[Config], Recipe | None]
    head: str = "lm_head"
    positions: str | None = None
    embedding_norm: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    weightless: tuple[str, ...] = ()
    old_names: Mapping[str, str] = field(default_factory=dict)
    masked_positions: bool = False

    def block(self, index: int) -> str:
        """The full name of a block."""
        return f"{self.blocks}.{index}"

    def module_name(self, stored: str) -> str:
        """The full name in the transformers model of what a checkpoint calls `stored`.

        Older checkpoints, and those saved without the head, leave out the first part: `h.0` for `transformer.h.0`.
        """
        stored = self.old_names.get(stored, stored)
        base = self.blocks.partition(".")[0]
        known = stored == self.head or stored.startswith((f"{base}.", f"{self.head}."))
        return stored if known else f"{base}.{stored}"


@dataclass(frozen=True)
class Int8Choice:
    """Which linear layers are int8: by the settings, or by what an int8 checkpoint holds.

    `head` is the output head's full name; `stored` are the modules that the checkpoint holds in int8, None for one in
    16-bit.
    """

    config: Int8Config
    head: str | None
    stored: frozenset[str] | None = None

    def takes(self, name: str, origin: str | None = None) -> bool:
        """Whether the linear layer `name` is int8; `origin` is the module that it is tied to, if it is.

        Raises BigInt8Error where the settings want a layer in 16-bit that the checkpoint has in int8.
        """
        origin = origin or name
        if self.stored is None:
            return not self.config.skips(name, self.head) and (name == origin or bool(self.config.int8_head))
        takes = origin in self.stored or (name == self.head and bool(self.config.int8_head))
        if takes and self.config.skip_modules is not None and self.config.skips(name, self.head):
            raise BigInt8Error(
                f"skip_modules names {name}, which this checkpoint holds in int8; load the original checkpoint, "
                "or leave it out of skip_modules"
            )
        return takes


@dataclass(frozen=True)
class Layout:
    """A model cut into modules: those before the blocks, the blocks, those after them, the head.

    `head` lacks its matrix when it is tied to the embeddings; then it lives where they do, unless it is a copy of them
    (`copied_head`). `recipe`: how its blocks compute, None for those that fused blocks do not know. `int8_linears`: the
    layers that are int8 in some block.
    """

    first: tuple[Module, ...]
    blocks: tuple[Module, ...]
    last: tuple[Module, ...]
    head: Module
    sizes: Sizes
    recipe: Recipe | None = None
    int8_linears: frozenset[str] = frozenset()
    copied_head: bool = False

    @property
    def int8_head(self) -> bool:
        """Whether the head's matrix is int8."""
        return bool((self.first[0] if self.tied else self.head).part.int8_values)

    @property
    def tied(self) -> bool:
        """Whether the head's matrix is that of the embeddings, in one place."""
        return self.sizes.tied and not self.copied_head

    @cached_property
    def groups(self) -> tuple[int | None, ...]:
        """The sliding windows that its blocks have, each once: blocks of one window share their numbering of pages."""
        return tuple(dict.fromkeys(self.sizes.windows))

    def group_of(self, block: int) -> int:
        """Which group of pages a block belongs to."""
        return self.groups.index(self.sizes.windows[block])

    @cached_property
    def alike(self) -> tuple[int, ...]:
        """For each block, the first one that has its sizes and its window: what such blocks cost is computed once."""
        first: dict[tuple[Part, int | None], int] = {}
        both = zip((module.part for module in self.blocks), self.sizes.windows, strict=True)
        return tuple(first.setdefault(same, block) for block, same in enumerate(both))

    def stage(self, first_block: int, last_block: int) -> tuple[Module, ...]:
        """The modules of the stage with blocks [first_block, last_block), in the order in which they run."""
        is_first, is_last = first_block == 0, last_block == len(self.blocks)
        modules = (*self.first,) if is_first else ()
        modules += self.blocks[first_block:last_block]
        if is_last:
            modules += self.last
        return (*modules, self.head) if (is_first if self.tied else is_last) else modules

    def part(self, first_block: int, last_block: int) -> Part:
        """The sizes of that stage's weights."""
        return sum((module.part for module in self.stage(first_block, last_block)), Part())

    def weight_bytes(self, dtype_bytes: int) -> int:
        """Bytes of the whole model."""
        return self.part(0, len(self.blocks)).weight_bytes(dtype_bytes)

    def with_int8_head(self) -> "Layout":
        """The same model with its head's matrix in int8, and the embeddings where the two are tied."""
        table = Part(int8_values=self.sizes.vocab * (self.sizes.width or 0), int8_rows=self.sizes.vocab)
        first, head = self.first, self.head
        if self.sizes.tied:
            first = (replace(first[0], part=table), *first[1:])
        if not self.tied:
            head = replace(head, part=table + Part(other_values=self.sizes.vocab * self.sizes.head_bias))
        return replace(self, first=first, head=head)

    def with_copied_head(self) -> "Layout":
        """The same model, whose head is tied to the embeddings, with a copy of their matrix in the last stage."""
        return replace(self, head=replace(self.head, part=self.first[0].part + self.head.part), copied_head=True)

    @cached_property
    def products(self) -> tuple[tuple[Linear, ...], ...]:
        """A block's linear layers, those together that take the same inputs and whose weights lie side by side."""
        linears = {linear.name: linear for linear in self.sizes.linears}
        if self.recipe is None:
            return tuple((linear,) for linear in linears.values())
        groups = (self.recipe.qkv, (self.recipe.out,), self.recipe.up, (self.recipe.down,))
        return tuple(tuple(linears[name] for name in group) for group in groups)

    @cached_property
    def values_a_row(self) -> int:
        """What goes into a block's products and comes out of them, for each row."""
        return sum(group[0].inputs + sum(linear.outputs for linear in group) for group in self.products)

    def page_bytes(self, dtype_bytes: int) -> int:
        """Bytes of a page of keys and values in one block."""
        return self.sizes.kv_values * PAGE_TOKENS * dtype_bytes


def first_set(config: Config, *names: str, default: Any = None) -> Any:
    """The first of these keys that the config sets; config files of different ages name the same thing differently."""
    for name in names:
        if config.get(name) is not None:
            return config[name]
    return default
