"""GPUs that are not there: tensors that say they are on cuda:0 or cuda:1, and keep their values in the CPU's memory.

What may meet what is torch's own rule: where the tensors of an operation are on several devices, its fake tensors are
asked (`torch._subclasses.FakeTensorMode`), and they raise what a machine with GPUs would.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

OnOperation = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]
"""Called with each operation that touches a GPU: itself, its arguments and its result."""

watchers: list[OnOperation] = []


class PretendTensor(Tensor):
    """A tensor of a device that is not there."""

    held: Tensor

    @staticmethod
    def __new__(cls: Any, held: Tensor, device: torch.device) -> "PretendTensor":
        made: PretendTensor = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=device
        )
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.device}: {self.held!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _INSTEAD.get(func, func)(*args, **(kwargs or {}))


class _Pretending(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """In this thread, what is asked for on a GPU is a PretendTensor."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with contextlib.ExitStack() as stack:
            if not torch.cuda.is_available():
                stack.enter_context(mock.patch("torch.cuda._lazy_init"))
            stack.enter_context(_Pretending())
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the values, its results on the device where they would be."""
    device = _device_of_result(func, args, kwargs)
    asked = (args, kwargs)
    if "device" in kwargs and device.type == "cuda":
        kwargs = kwargs | {"device": torch.device("cpu")}
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    ours = {id(t.held): t for t in given if isinstance(t, PretendTensor)}
    if func is torch.ops.aten._softmax.default and args[2]:  # what a GPU does in one step
        args = (args[0].float(), args[1], False)
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in ours:  # an operation in place returns what it was given
            return ours[id(value)]
        return PretendTensor(value, device) if device.type == "cuda" else value

    result = tree_map(wrap, result)
    if ours or device.type == "cuda":
        for watcher in watchers:
            watcher(func, *asked, result)
    return result


def _held(value: Any) -> Any:
    return value.held if isinstance(value, PretendTensor) else value


def _device_of_result(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    devices = {tensor.device for tensor in tensors}
    if len(devices) <= 1:
        return devices.pop() if devices else torch.device("cpu")
    if func is torch.ops.aten.copy_.default:  # between any two devices; fake tensors would be seen to copy, too
        return tensors[0].device
    with FakeTensorMode():
        fake = tree_map(_fake, (args, kwargs))
        results = [t for t in tree_leaves(func(*fake[0], **fake[1])) if isinstance(t, Tensor)]
    return results[0].device if results else torch.device("cpu")


def _fake(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _index(tensor: Tensor, index: Any, value: Any = None) -> Any:
    """`tensor[index]`, in torch's operations; with a value, `tensor[index] = value`."""
    view, dimension, chosen = tensor, 0, []
    parts = list(index) if isinstance(index, tuple) else [index]
    taken = sum(_dimensions(part) for part in parts if part is not ...)
    for part in parts:
        if part is ...:
            dimension += tensor.ndim - taken
        elif part is None:
            view, dimension = view.unsqueeze(dimension), dimension + 1
        elif isinstance(part, slice):
            size = view.shape[dimension]
            bounds = (None if bound is None else int(_held(bound)) for bound in (part.start, part.stop, part.step))
            start, stop, step = slice(*bounds).indices(size)
            view, dimension = torch.ops.aten.slice(view, dimension, start, max(start, stop), step), dimension + 1
        elif isinstance(part, int) and not isinstance(part, bool):
            view = view.select(dimension, part)
        else:
            where = part if isinstance(part, Tensor) else torch.tensor(part)
            chosen += [None] * (dimension - len(chosen)) + [where]
            dimension += _dimensions(part)
    if value is None:
        return torch.ops.aten.index(view, chosen) if chosen else torch.ops.aten.alias(view)
    filler = value if isinstance(value, Tensor) else torch.tensor(value, dtype=view.dtype)
    if chosen:
        torch.ops.aten.index_put_(view, chosen, filler.to(view.device) if not filler.ndim else filler)
    else:
        _copy_(view, filler)
    return None


def _dimensions(part: Any) -> int:
    if part is None:
        return 0
    return part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1


def _copy_(tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
    return _run(torch.ops.aten.copy_.default, (tensor, source), {"non_blocking": non_blocking})


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def _nonzero(tensor: Tensor, as_tuple: bool = False) -> Any:
    found = torch.ops.aten.nonzero.default(tensor)
    return found.unbind(1) if as_tuple else found


def _deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Any:
    """torch's own would copy the memory of the tensor that this one is a part of."""
    return memo.setdefault(id(tensor), tensor.clone())


_INSTEAD: dict[Any, Any] = {
    Tensor.__deepcopy__: _deepcopy,
    Tensor.__repr__: PretendTensor.__repr__,
    Tensor.data.__get__: Tensor.detach,  # type: ignore[attr-defined]
    Tensor.tolist: lambda tensor: tensor.held.tolist(),
    Tensor.__int__: lambda tensor: int(tensor.held),
    Tensor.__index__: lambda tensor: int(tensor.held),
    Tensor.__float__: lambda tensor: float(tensor.held),
    # torch's own would set the current device, before it asks what kind of tensor this is
    Tensor.__getitem__: _index,
    Tensor.__setitem__: _index,
    Tensor.__invert__: torch.bitwise_not,
    Tensor.nonzero: _nonzero,
    torch.nonzero: _nonzero,
    Tensor.contiguous: _contiguous,
    Tensor.copy_: _copy_,
}
