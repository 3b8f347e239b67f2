"""A model over several devices in one process: what a block is given is sent to the block's device first."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..model.skeleton import token_embeddings


def follow_devices(model: nn.Module, named: Mapping[str, str], device_of: Callable[[str], str]) -> None:
    """Send the inputs of each block, and of each module beside the blocks, to its device.

    named: devices by module name; device_of: the device of any module, where its computing is done

    A block gets more than hidden states, such as masks and position embeddings, and it adds its results to its input.
    So all inputs of a block are sent to its device, before any layer in it runs. If the map names modules within a
    block, these return their results to where their inputs came from.

    The model's own inputs are sent to where its embeddings are, and its output to where these inputs came from.

    The hooks are torch's own. Those of accelerate put a function that refers to the module in the place of its
    `forward`: the module would keep its memory until a garbage collection, and hide the `forward` of its class.
    """
    sent = _Sent(tuple(getattr(model, "_skip_keys_device_placement", None) or ("past_key_values",)))

    def above_a_named_one(name: str) -> bool:
        return any(other != name and (not name or other.startswith(f"{name}.")) for other in named)

    def hook(module: nn.Module, name: str, in_block: bool, returns: bool) -> None:
        is_list = isinstance(module, nn.ModuleList)  # nobody calls a list, and some models not all that is around it
        around_blocks = not in_block and any(isinstance(below, nn.ModuleList) for below in module.modules())
        apart = is_list or around_blocks or above_a_named_one(name)
        if name and not is_list and (not apart or in_block or module._parameters or module._buffers):
            follow = _Follow(torch.device(device_of(name)), sent)
            module.register_forward_pre_hook(follow.send, with_kwargs=True)
            if returns:
                module.register_forward_hook(follow.send_back)
        if apart:
            are_blocks = is_list and not in_block
            for child, below in module.named_children():
                # what the model itself calls, and blocks, leave results where they are: the next one fetches them
                below_returns = bool(name) and not are_blocks
                hook(below, f"{name}.{child}" if name else child, in_block or are_blocks, below_returns)

    hook(model, "", False, False)
    entrance = token_embeddings(model) or ""
    model.register_forward_pre_hook(sent.forget)
    if entrance:  # somebody may call the base model itself
        model.get_submodule(entrance).register_forward_pre_hook(sent.forget)
    follow = _Follow(torch.device(device_of(entrance)), sent)
    model.register_forward_pre_hook(follow.send, with_kwargs=True)
    model.register_forward_hook(follow.send_back)


class _Sent(threading.local):
    """What a forward pass, in this thread, has sent where: a mask goes to each device once, and not to each block.

    skip: what is never sent, by the name of the argument: caches, whose layers lie with their blocks
    came_from: the device from which the inputs came, for each module that returns its results there
    """

    def __init__(self, skip: tuple[str, ...]) -> None:
        self._skip = skip
        self._copies: dict[torch.device, WeakIdKeyDictionary] = {}
        self.came_from: dict[int, torch.device | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _Sent, (self._skip,)  # a copy of the model has its own

    def forget(self, *_: Any) -> None:
        """A forward pass begins."""
        self._copies.clear()

    def send(self, value: Any, device: torch.device) -> Any:
        """The same on this device: tensors, and what holds them."""
        if isinstance(value, Tensor):
            return value if value.device == device else self._copy(value, device)
        if type(value) in (tuple, list):
            return type(value)(self.send(each, device) for each in value)
        if type(value) is dict:
            return {name: each if name in self._skip else self.send(each, device) for name, each in value.items()}
        from accelerate.utils import send_to_device

        return send_to_device(value, device, skip_keys=list(self._skip))

    def _copy(self, value: Tensor, device: torch.device) -> Tensor:
        copies = self._copies.setdefault(device, WeakIdKeyDictionary())
        if value not in copies:
            copies[value] = value.to(device)
        copy: Tensor = copies[value]
        return copy


class _Follow:
    """The hooks of one module: before its forward pass, and after it."""

    def __init__(self, device: torch.device, sent: _Sent) -> None:
        self._device, self._sent = device, sent

    def send(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._sent.came_from[id(self)] = device_of_tensors((args, kwargs))
        return self._sent.send(args, self._device), self._sent.send(kwargs, self._device)

    def send_back(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        device = self._sent.came_from[id(self)]
        return output if device is None else self._sent.send(output, device)


def device_of_tensors(values: Any) -> torch.device | None:
    """The device of the first tensor in there, None if there is none."""
    from accelerate.utils import find_device

    found: torch.device | None = find_device(values)
    return found
