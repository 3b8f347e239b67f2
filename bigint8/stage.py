"""The transformers model as a skeleton: built on the meta device, int8 in shape, cut into pipeline stages.

A stage is the transformers model itself with the parts that live elsewhere neutralised: the list of blocks is sliced
and renumbered, the final norm is the identity on all but the last stage, and on all but the first the position
embeddings give zero and the embedding norm is the identity. Hidden states go in as `inputs_embeds`.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from .checkpoint import TensorInfo
from .config import Int8Config
from .errors import BigInt8Error
from .families import Family
from .linear import Int8Embedding, Int8Linear, empty_like, is_linear, is_transposed
from .memory import HostMemory
from .naming import model_names
from .stored_int8 import SCALES
from .tables import Embedding16bit, Linear16bit


@dataclass
class Slot:
    """Where a tensor of a checkpoint goes: an attribute of a module.

    `shape` is the tensor's shape in the checkpoint; `transposed` that it is (in_features, out_features) there.
    An int8 slot takes a 16-bit weight, quantizes it and sets the module's scale too.
    """

    name: str
    module: nn.Module
    attribute: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def is_int8(self) -> bool:
        return isinstance(self.module, Int8Linear | Int8Embedding) and self.attribute == "weight"

    @property
    def data_shape(self) -> tuple[int, ...]:
        """The shape of the module's own tensor."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def dtype(self) -> torch.dtype:
        """What the slot holds once loaded."""
        return cast(Tensor, getattr(self.module, self.attribute)).dtype

    @property
    def nbytes(self) -> int:
        """Bytes once loaded, scales included."""
        values = torch.Size(self.shape).numel()
        return values + 4 * self.out_features if self.is_int8 else values * self.dtype.itemsize

    @property
    def data_bytes(self) -> int:
        """Bytes of the module's own tensor, without scales."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def out_features(self) -> int:
        return self.shape[-1] if self.transposed else self.shape[0]

    def allocate(self, device: torch.device | str, memory: HostMemory | None, offload_file: str | None = None) -> None:
        """Give the slot its memory: on the device, out of a block of the host's, or in a file that is mapped."""
        shape, count = self.data_shape, torch.Size(self.shape).numel()
        if offload_file is not None:
            data = torch.from_file(offload_file, shared=True, size=count, dtype=self.dtype).view(shape)
        elif memory is not None:
            data = memory.take(self.dtype, count).view(shape)
        else:
            data = torch.empty(shape, dtype=self.dtype, device=device)
        scale = torch.empty(self.out_features, dtype=torch.float32, device=device) if self.is_int8 else None
        self.fill(data, scale)

    def fill(self, data: Tensor, scale: Tensor | None) -> None:
        """Make these the module's tensors. `scale` is that of an int8 weight."""
        if scale is not None:
            self.module.scale = scale
        if self.attribute in self.module._buffers:
            self.module._buffers[self.attribute] = data
        else:
            setattr(self.module, self.attribute, nn.Parameter(data, requires_grad=False))


@dataclass
class Skeleton:
    """A causal language model on the meta device.

    `slots` by name; `tied`: names that share another slot's tensor; `head`: the output head's name; `tensors`: those of
    the checkpoint that it is made for, by the names that the model has for them.
    """

    model: Any
    slots: dict[str, Slot]
    tied: dict[str, str]
    head: str | None
    tensors: dict[str, TensorInfo] = field(default_factory=dict)

    def tie(self) -> None:
        """Let the tied names share the tensors that their slots hold by now."""
        for target, source in self.tied.items():
            origin, _, attribute = source.rpartition(".")
            origin = self.model.get_submodule(origin)
            _set(self.model, target, getattr(origin, attribute))
            if isinstance(origin, Int8Embedding):
                self.model.get_submodule(target.rpartition(".")[0]).scale = origin.scale


def build_skeleton(
    config: Any,
    int8: Int8Config,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    int8_names: Iterable[str] | None = None,
) -> Skeleton:
    """Build the model that a transformers config describes, its linear layers replaced by empty Int8Linears.

    `int8_names` are the tensor names of a checkpoint that holds linear layers in int8 already, None for another one.
    Then these layers are int8, and besides them only the head, if the settings say so.

    Parameters are on the meta device and take no memory; buffers that no checkpoint holds (rotary frequencies) are
    computed on the CPU.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.eval().requires_grad_(False)
    head_module = model.get_output_embeddings()
    head = next((name for name, module in model.named_modules() if module is head_module), None)
    tied = dict(model.get_expanded_tied_weights_keys(all_submodels=True))
    stored = None if int8_names is None else _stored_int8(model, int8_names)
    transposed = _replace_linears(model, int8, head, tied, stored)
    skeleton = Skeleton(model, _slots(model, tied, transposed), tied, head)
    skeleton.tie()  # so that each parameter counts once
    return skeleton


def _stored_int8(model: nn.Module, names: Iterable[str]) -> set[str]:
    """The modules whose int8 scales are among a checkpoint's tensors."""
    ours_of = model_names(model, model.state_dict())
    ours = [ours_of(name) for name in names if name.endswith(f".{SCALES}")]
    return {name.removesuffix(f".{SCALES}") for name in ours}


def _replace_linears(
    model: nn.Module,
    int8: Int8Config,
    head: str | None,
    tied: Mapping[str, str],
    stored: set[str] | None,
) -> set[str]:
    """Put an empty Int8Linear in the place of each linear layer; the names of those stored transposed."""
    transposed = set()
    origin_of = {target.rpartition(".")[0]: source.rpartition(".")[0] for target, source in tied.items()}
    for name, module in list(model.named_modules()):
        if not is_linear(module) or name in origin_of.values():
            continue
        origin = origin_of.get(name, name)
        if stored is None:
            convert = not int8.skips(name, head) and (name == origin or int8.int8_head)
        else:
            convert = origin in stored or (name == head and int8.int8_head)
            if int8.skip_modules is not None and convert and int8.skips(name, head):
                raise BigInt8Error(
                    f"skip_modules names {name}, which this checkpoint holds in int8; load the original checkpoint, "
                    "or leave it out of skip_modules"
                )
        if convert:
            if name in origin_of:
                _replace_embedding(model, origin)
            if is_transposed(module):
                transposed.add(name)
            _set(model, name, empty_like(module, int8.threshold, int8.activations))
    return transposed


def _replace_embedding(model: nn.Module, name: str) -> None:
    """Int8 embeddings, for a head that is tied to them."""
    module = model.get_submodule(name)
    if type(module) is not nn.Embedding:
        raise BigInt8Error(
            f"int8_head: the head is tied to {name}, a {type(module).__name__}, and only plain embeddings can be int8; "
            "leave int8_head off"
        )
    rows, width = module.weight.shape
    _set(model, name, Int8Embedding(rows, width, module.weight.device, module.weight.dtype))


def keep_16bit_tables(skeleton: Skeleton, stored: Mapping[str, str]) -> None:
    """In a float32 model, let the token embeddings and the head stay in the 16-bit format that they are stored in.

    `stored` has the dtype of each slot's tensor in the checkpoint, as safetensors names it. Modules that do more than
    look up or multiply are left as they are, and with them what is tied to them.
    """
    modules = {name: skeleton.model.get_submodule(name) for name in _table_names(skeleton)}
    origins = {name: skeleton.tied.get(f"{name}.weight", f"{name}.weight") for name in modules}
    plain = {name for name, module in modules.items() if _is_plain_float32(module)}
    for name, module in modules.items():
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(stored.get(origins[name], ""))
        together = {other for other, origin in origins.items() if origin == origins[name]}
        if dtype is not None and together <= plain:
            table = Embedding16bit(module, dtype) if isinstance(module, nn.Embedding) else Linear16bit(module, dtype)
            _set(skeleton.model, name, table)
            for slot in skeleton.slots.values():
                if slot.module is module:
                    slot.module = table
    skeleton.tie()


def _table_names(skeleton: Skeleton) -> list[str]:
    """The token embeddings and the head."""
    model = skeleton.model
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # what transformers raises for a model whose embeddings it cannot find
        embeddings = None
    return [name for name, m in model.named_modules() if m is embeddings or (skeleton.head and name == skeleton.head)]


def _is_plain_float32(module: nn.Module) -> bool:
    plain = type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None)
    return plain and cast(Tensor, module.weight).dtype == torch.float32


def model_slots(model: nn.Module) -> dict[str, Slot]:
    """The slots of a model that is loaded, tied tensors once."""
    tied = getattr(model, "get_expanded_tied_weights_keys", None)
    return _slots(model, tied(all_submodels=True) if tied else {}, set())


def _slots(model: nn.Module, tied: Mapping[str, str], transposed: set[str]) -> dict[str, Slot]:
    slots = {}
    for prefix, module in model.named_modules():
        kept = {n: p for n, p in module._parameters.items() if p is not None}
        kept |= {
            n: b for n, b in module._buffers.items() if b is not None and n not in module._non_persistent_buffers_set
        }
        for attribute, tensor in kept.items():
            name = f"{prefix}.{attribute}" if prefix else attribute
            if name in tied or (isinstance(module, Int8Linear | Int8Embedding) and attribute == "scale"):
                continue
            turned = prefix in transposed and attribute == "weight"
            shape = tuple(tensor.shape)
            slots[name] = Slot(name, module, attribute, shape[::-1] if turned else shape, turned)
    return slots


def _set(model: nn.Module, name: str, value: Any) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, value)


class _ZeroPositions(nn.Module):
    """Position embeddings on a later stage: the first one has added them already."""

    def __init__(self) -> None:
        super().__init__()
        # no dimension, so that adding it keeps the dtype of the hidden states
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return cast(Tensor, self.zero)


class _BaseModel(Protocol):
    """What a stage calls: the transformers decoder without its head."""

    def __call__(self, **kwargs: Any) -> Any: ...


class StageModel(nn.Module):
    """One stage of a pipeline: token ids or hidden states in, hidden states or logits out."""

    def __init__(self, skeleton: Skeleton, family: Family, first_block: int, last_block: int) -> None:
        """Cut the skeleton, which is used up, to blocks [first_block, last_block)."""
        super().__init__()
        model = skeleton.model
        blocks = model.get_submodule(family.blocks)
        is_first, is_last = first_block == 0, last_block == len(blocks)
        self.is_first = is_first
        tied = bool(skeleton.tied)
        self.has_head = is_first if tied else is_last
        self.slots = {
            name: slot
            for name, slot in skeleton.slots.items()
            if _belongs(name, family, skeleton.head, first_block, last_block, is_first, is_last, self.has_head)
        }
        _set(model, family.blocks, nn.ModuleList(blocks[first_block:last_block]))
        _renumber(model.get_submodule(family.blocks))
        _trim_config(model.config, first_block, last_block)
        if not is_first:
            _neutralise_first(model, family)
        if not is_last:
            for name in family.last_stage:
                if model.get_submodule(name.rpartition(".")[0])._modules.get(name.rpartition(".")[2]) is not None:
                    _set(model, name, nn.Identity())
        self.config = model.config
        self.base = model.get_submodule(family.blocks.rpartition(".")[0])
        self.lm_head = model.get_submodule(skeleton.head) if self.has_head else None
        self._takes_positions = "position_ids" in inspect.signature(self.base.forward).parameters

    def new_cache(self) -> Any:
        """An empty key-value cache for this stage's blocks."""
        from transformers import DynamicCache

        return DynamicCache(config=self.config)

    def forward(
        self, inputs: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Any | None
    ) -> Tensor:
        """Token ids (batch, tokens) on the first stage, hidden states (batch, tokens, hidden) on later ones.

        attention_mask (batch, past + tokens) or None; position_ids (batch, tokens) or None. Returns hidden states.
        """
        kwargs: dict[str, Any] = {"input_ids" if self.is_first else "inputs_embeds": inputs}
        if self._takes_positions:
            kwargs["position_ids"] = position_ids
        output = cast(_BaseModel, self.base)(
            attention_mask=attention_mask, past_key_values=cache, use_cache=cache is not None, **kwargs
        )
        return cast(Tensor, output.last_hidden_state)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary) of the last stage's hidden states."""
        if self.lm_head is None:
            raise RuntimeError("this stage has no head")
        return cast(Tensor, self.lm_head(hidden))


def _belongs(
    name: str, family: Family, head: str | None, first: int, last: int, is_first: bool, is_last: bool, has_head: bool
) -> bool:
    if name.startswith(f"{family.blocks}."):
        return first <= int(name[len(family.blocks) + 1 :].partition(".")[0]) < last
    if head is not None and name.startswith(f"{head}."):
        return has_head
    if any(name.startswith(f"{part}.") for part in family.first_stage):
        return is_first
    if any(name.startswith(f"{part}.") for part in family.last_stage):
        return is_last
    return True


def _renumber(blocks: nn.Module) -> None:
    """The cache of a stage counts its own blocks from zero."""
    for index, block in enumerate(blocks.children()):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                setattr(module, "layer_idx", index)  # noqa: B010  (a Module's attributes are typed as tensors)


def _trim_config(config: Any, first_block: int, last_block: int) -> None:
    types = getattr(config, "layer_types", None)
    config.num_hidden_layers = last_block - first_block
    if types is not None:
        config.layer_types = types[first_block:last_block]


def _neutralise_first(model: nn.Module, family: Family) -> None:
    _set(model, family.embeddings, None)
    if family.positions:
        _set(model, family.positions, _ZeroPositions())
    if family.embedding_norm:
        _set(model, family.embedding_norm, nn.Identity())
    if family.project_in:
        _set(model, family.project_in, None)
