"""The transformers model as a skeleton: built on the meta device, its linear layers int8 in shape."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..checkpoint.headers import Checkpoint, TensorInfo
from ..checkpoint.int8_format import SCALES
from ..errors import BigInt8Error
from ..families.layout import Int8Choice
from ..options import Access, Int8Config
from ..plan.spec import ModelSpec
from ..units import GIB, TABLE_FORMATS, TORCH_NAMES, readable
from .config import read_hf_config, refused
from .layers import Embedding16bit, Int8Embedding, Int8Linear, Linear16bit, empty_like, is_linear, is_transposed
from .names import model_names, name_tensors

MOST_BUFFER_BYTES = GIB
"""The most that a model's computed buffers may take: real models have some MiB."""


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
            set_module(self.model, target, getattr(origin, attribute))
            if isinstance(origin, Int8Embedding):
                self.model.get_submodule(target.rpartition(".")[0]).scale = origin.scale


def skeleton_of(checkpoint: Checkpoint, spec: ModelSpec, dtype: str) -> Skeleton:
    """The model that the checkpoint's tensors go into. Raises CheckpointError for a config that makes none."""
    hf_config = read_hf_config(checkpoint, spec.access)
    stored = list(checkpoint.tensors) if checkpoint.is_int8 else None
    try:
        if spec.layout is None:
            _check_buffers(hf_config, spec.access)
        skeleton = build_skeleton(hf_config, spec.int8, getattr(torch, dtype), spec.access, stored)
    except BigInt8Error:
        raise
    except Exception as error:  # the model's own code meets a config's values here, with many kinds of exceptions
        raise refused(checkpoint, error) from error
    skeleton.tensors = name_tensors(checkpoint, skeleton.model, skeleton.slots, skeleton.tied)
    keep_16bit_tables(skeleton, {name: tensor.dtype for name, tensor in skeleton.tensors.items()})
    return skeleton


def _check_buffers(config: Any, access: Access) -> None:
    """Raise ValueError if the buffers that no checkpoint holds (tables of positions, masks) would be huge.

    They are computed while the model is built; here they are only shapes. The families in the table have none such.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=access.trust_remote_code)
    size = sum(buffer.nbytes for buffer in model.buffers())
    if size > MOST_BUFFER_BYTES:
        raise ValueError(f"its buffers, which grow with the number of positions, would take {readable(size)}")


def build_skeleton(
    config: Any,
    int8: Int8Config,
    dtype: torch.dtype,
    access: Access = Access(),  # noqa: B008  (frozen)
    stored: Iterable[str] | None = None,
) -> Skeleton:
    """Build the model that a transformers config describes, its linear layers replaced by empty Int8Linears.

    `stored` are the tensor names of a checkpoint that holds linear layers in int8 already, None for another one. Then
    these layers are int8, and besides them only the head, if the settings say so.

    Parameters are on the meta device and take no memory; buffers that no checkpoint holds (rotary frequencies) are
    computed on the CPU.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=access.trust_remote_code)
    model.eval().requires_grad_(False)
    head_module = model.get_output_embeddings()
    head = next((name for name, module in model.named_modules() if module is head_module), None)
    tied = dict(model.get_expanded_tied_weights_keys(all_submodels=True))
    int8_there = None if stored is None else _stored_int8(model, stored)
    transposed = _replace_linears(model, Int8Choice(int8, head, int8_there), tied)
    skeleton = Skeleton(model, _slots(model, tied, transposed), tied, head)
    skeleton.tie()  # so that each parameter counts once
    return skeleton


def _stored_int8(model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """The modules whose int8 scales are among a checkpoint's tensors."""
    ours_of = model_names(model, model.state_dict())
    ours = [ours_of(name) for name in names if name.endswith(f".{SCALES}")]
    return frozenset(name.removesuffix(f".{SCALES}") for name in ours)


def _replace_linears(model: nn.Module, choice: Int8Choice, tied: Mapping[str, str]) -> set[str]:
    """Put an empty Int8Linear in the place of each chosen linear layer; the names of those stored transposed."""
    transposed = set()
    origin_of = {target.rpartition(".")[0]: source.rpartition(".")[0] for target, source in tied.items()}
    for name, module in list(model.named_modules()):
        if not is_linear(module) or name in origin_of.values() or not choice.takes(name, origin_of.get(name)):
            continue
        if name in origin_of:
            _replace_embedding(model, origin_of[name])
        if is_transposed(module):
            transposed.add(name)
        set_module(model, name, empty_like(module, choice.config.threshold, choice.config.activations))
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
    set_module(model, name, Int8Embedding(rows, width, module.weight.device, module.weight.dtype))


def keep_16bit_tables(skeleton: Skeleton, stored: Mapping[str, str]) -> None:
    """In a float32 model, let the token embeddings and the head stay in the 16-bit format that they are stored in.

    `stored` has the dtype of each slot's tensor in the checkpoint, as safetensors names it. Modules that do more than
    look up or multiply are left as they are, and with them what is tied to them.
    """
    modules = {name: skeleton.model.get_submodule(name) for name in _table_names(skeleton)}
    origins = {name: skeleton.tied.get(f"{name}.weight", f"{name}.weight") for name in modules}
    plain = {name for name, module in modules.items() if _is_plain_float32(module)}
    for name, module in modules.items():
        format_there = stored.get(origins[name], "")
        together = {other for other, origin in origins.items() if origin == origins[name]}
        if format_there in TABLE_FORMATS and together <= plain:
            dtype = getattr(torch, TORCH_NAMES[format_there])
            table = Embedding16bit(module, dtype) if isinstance(module, nn.Embedding) else Linear16bit(module, dtype)
            set_module(skeleton.model, name, table)
            for slot in skeleton.slots.values():
                if slot.module is module:
                    slot.module = table
    skeleton.tie()


def _table_names(skeleton: Skeleton) -> list[str]:
    """The token embeddings and the head."""
    tables = {token_embeddings(skeleton.model), skeleton.head}
    return [name for name, _ in skeleton.model.named_modules() if name and name in tables]


def token_embeddings(model: Any) -> str | None:
    """The name of the module that takes the token ids, None if transformers cannot find it."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # what transformers raises for such a model; there is no way to ask without it
        return None
    return next((name for name, module in model.named_modules() if module is embeddings), None)


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


def set_module(model: nn.Module, name: str, value: Any) -> None:
    """Put a module, or whatever else a module's attribute may be, in the place with this full name."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, value)
