"""The families that can be cut into stages, and the layout of a model of one of them.

A new family is a file of its own: the names of its modules in transformers, and a function that reads its sizes from
the config. It is listed here.
"""

from collections.abc import Mapping
from dataclasses import replace

from ..checkpoint.headers import Checkpoint, TensorInfo
from ..checkpoint.int8_format import is_int8_config, stored_skips
from ..errors import PlanError
from ..options import Int8Config
from ..units import SAFETENSORS_NAMES, TABLE_FORMATS
from . import bloom, gpt2, gpt_neox, llama, opt, phi
from .layout import Config, Family, Int8Choice, Layout, Linear, Module, Part, Sizes, first_set

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY, opt.FAMILY, bloom.FAMILY, gpt_neox.FAMILY, gpt2.FAMILY, phi.FAMILY,
)  # fmt: skip

MOST_BLOCKS = 1024
"""More than any model has; a config that names more is damaged, and would take long to plan for."""


def find_family(model_type: str) -> Family | None:
    """The family of a transformers model type, None for one that is not in the table."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def family_of(model_type: str) -> Family:
    """The family of a transformers model type. Raises PlanError for one that is not in the table."""
    family = find_family(model_type)
    if family is not None:
        return family
    known = "; ".join(f"{family.name} ({', '.join(family.model_types)})" for family in FAMILIES)
    raise PlanError(
        f"model type {model_type!r} cannot be cut into a pipeline yet; the families that can: {known}. "
        "In one process, load_sharded_int8 loads it all the same"
    )


def layout_of(
    config: Config,
    int8: Int8Config = Int8Config(),  # noqa: B008  (frozen)
    stored: str | None = None,
    checkpoint: Checkpoint | None = None,
) -> Layout:
    """The modules of a model and their sizes, from its config.json and what is known of its weights.

    stored: the dtype of most weights; if it is a 16-bit one, the token embeddings and the head stay in it
    checkpoint: the opened checkpoint; its headers have the dtype of each tensor, and which layers are int8 already

    Raises PlanError for an unknown family or a config whose sizes no model has.
    """
    family = family_of(config["model_type"])
    try:
        _check_blocks(config)
        sizes = family.sizes(config)
        sizes = replace(sizes, windows=sizes.windows or (None,) * sizes.blocks, width=sizes.width or sizes.hidden)
        _check(sizes)
        recipe = family.recipe(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise PlanError(f"the config of this {family.name} model lacks or garbles a size ({error!r})") from None
    choice = _choice(family, config, int8, checkpoint)
    layout = _cut(family, sizes, choice, _table_formats(family, stored, checkpoint))
    return replace(layout, recipe=recipe, int8_linears=_int8_linears(family, sizes, choice))


def _choice(family: Family, config: Config, int8: Int8Config, checkpoint: Checkpoint | None) -> Int8Choice:
    if not is_int8_config(config):
        return Int8Choice(int8, family.head)
    if checkpoint is not None:
        return Int8Choice(int8, family.head, frozenset(map(family.module_name, checkpoint.int8_modules)))
    skips = stored_skips(config)
    skips = (family.head,) if skips is None else tuple(family.old_names.get(name, name) for name in skips if name)
    told = int8.model_copy(update={"skip_modules": skips})  # without a list, bitsandbytes leaves the head out
    int8_head = bool(int8.int8_head) or not told.skips(family.head, family.head)
    return Int8Choice(told.model_copy(update={"int8_head": int8_head}), family.head)


def _table_formats(family: Family, stored: str | None, checkpoint: Checkpoint | None) -> dict[str, str]:
    """How the matrices of the token embeddings and of the head are stored, by module; safetensors' names."""
    modules = (family.embeddings, family.head)
    if checkpoint is not None:
        by_name = tables_of(checkpoint.tensors, family)
        found = {module: by_name[module].dtype for module in modules if module in by_name}
        return dict.fromkeys(modules, next(iter(found.values()), "")) | found  # of a tied pair, one is there
    return dict.fromkeys(modules, SAFETENSORS_NAMES.get(stored or "", ""))


def tables_of(tensors: Mapping[str, TensorInfo], family: Family) -> dict[str, TensorInfo]:
    """The matrices of the token embeddings and of the head, by module, as far as a checkpoint has them."""
    found = {}
    for name, tensor in tensors.items():
        module, _, attribute = name.rpartition(".")
        if attribute == "weight" and (ours := family.module_name(module)) in (family.embeddings, family.head):
            found[ours] = tensor
    return found


def _cut(family: Family, sizes: Sizes, choice: Int8Choice, formats: Mapping[str, str]) -> Layout:
    """The modules of the model, each with its sizes."""
    assert sizes.width is not None
    int8_head = choice.takes(family.head, family.embeddings if sizes.tied else None)
    table = sizes.vocab, sizes.width
    embeddings = _table(*table, formats[family.embeddings], int8_head and sizes.tied)
    head = Part() if sizes.tied else _table(*table, formats[family.head], int8_head)
    values = {
        family.positions: sizes.position_values,
        family.embedding_norm: sizes.embedding_norm_values,
        family.final_norm: sizes.final_norm_values,
    }
    others = {name: Module(name, Part(other_values=n)) for name, n in values.items() if name and n is not None}
    if sizes.width != sizes.hidden:
        for name, inputs, outputs in (
            (family.project_in, sizes.width, sizes.hidden),
            (family.project_out, sizes.hidden, sizes.width),
        ):
            if name:
                others[name] = Module(name, _linear(Linear(name, inputs, outputs), choice.takes(name)))
    first = (family.positions, family.embedding_norm, family.project_in)
    return Layout(
        first=(Module(family.embeddings, embeddings), *(others[name] for name in first if name in others)),
        blocks=tuple(_block(family.block(i), sizes, choice) for i in range(sizes.blocks)),
        last=tuple(others[name] for name in (family.final_norm, family.project_out) if name in others),
        head=Module(family.head, head + Part(other_values=sizes.vocab * sizes.head_bias)),
        sizes=sizes,
    )


def _int8_linears(family: Family, sizes: Sizes, choice: Int8Choice) -> frozenset[str]:
    names = [linear.name for linear in sizes.linears]
    taken = (name for name in names for i in range(sizes.blocks) if choice.takes(f"{family.block(i)}.{name}"))
    return frozenset(taken)


def _block(name: str, sizes: Sizes, choice: Int8Choice) -> Module:
    linears = (_linear(linear, choice.takes(f"{name}.{linear.name}")) for linear in sizes.linears)
    return Module(name, sum(linears, Part(other_values=sizes.norm_values)))


def _linear(linear: Linear, int8: bool) -> Part:
    values, bias = linear.inputs * linear.outputs, linear.outputs * linear.bias
    if int8:
        return Part(int8_values=values, int8_rows=linear.outputs, other_values=bias)
    return Part(other_values=values + bias)


def _table(rows: int, width: int, stored: str, int8: bool) -> Part:
    """The token embeddings, or the matrix of the head."""
    if int8:
        return Part(int8_values=rows * width, int8_rows=rows)
    return Part(table_values=rows * width) if stored in TABLE_FORMATS else Part(other_values=rows * width)


def _check_blocks(config: Config) -> None:
    """Raise ValueError for a number of blocks that no model has: before any list is made that long."""
    names = ("num_hidden_layers", "n_layer")
    blocks = first_set(config, *names)
    if not isinstance(blocks, int) or not 1 <= blocks <= MOST_BLOCKS:
        name = next((name for name in names if config.get(name) is not None), names[0])
        raise ValueError(f"{name}: {blocks!r}; models have 1 to {MOST_BLOCKS} blocks")


def _check(sizes: Sizes) -> None:
    """Raise ValueError for sizes that no model has."""
    named = {
        "hidden size": sizes.hidden, "embedding width": sizes.width, "vocabulary": sizes.vocab,
        "widest layer": sizes.widest, "cache values": sizes.kv_values,
    }  # fmt: skip
    named |= {linear.name: linear.inputs * linear.outputs for linear in sizes.linears}
    if sizes.max_context is not None:
        named["context"] = sizes.max_context
    for name, size in named.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: {size!r}")
    if len(sizes.windows) != sizes.blocks:
        raise ValueError(f"{len(sizes.windows)} layer_types for {sizes.blocks} blocks")
    for window in sizes.windows:
        if window is not None and (not isinstance(window, int) or window < 2):
            raise ValueError(f"sliding window: {window!r}")
