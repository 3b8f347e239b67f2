"""Streams and events of GPUs that are not there, and what finds races between them.

Each stream, and each thread of the host, is an agent with a vector clock (Fidge and Mattern 1988): what it knows to be
over. A launch tells the stream what the host knows, an event what its stream knew when it was recorded. Two accesses to
one piece of memory, one of them a write, are a race unless the later agent knows the earlier one to be over. Memory
that is let go is handed out again at once to the stream that it was taken on, as torch's allocator does.
"""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from bigint8_kernels import dispatch, reference
from pretend import PretendTensor, pretending, watchers
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from bigint8.load import device_map, gpu, stream
from bigint8.plan.devices import Device

Clock = dict[Any, int]

GPU_BYTES = 2**33


def _learn(mine: Clock, other: Clock) -> None:
    for agent, count in list(other.items()):
        mine[agent] = max(mine.get(agent, 0), count)


def _tick(agent: Any, clock: Clock) -> None:
    clock[agent] = clock.get(agent, 0) + 1


class Stream:
    def __init__(self, cuda: "PretendCuda", name: str) -> None:
        self.cuda, self.name, self.clock = cuda, name, Clock()

    def wait_stream(self, other: "Stream") -> None:
        _learn(self.clock, other.clock)

    def wait_event(self, event: "Event") -> None:
        _learn(self.clock, event.clock)

    def synchronize(self) -> None:
        _learn(self.cuda.host(), self.clock)


class Event:
    def __init__(self, cuda: "PretendCuda", blocking: bool) -> None:
        self.cuda, self.blocking, self.clock = cuda, blocking, Clock()

    def record(self, on: Stream) -> None:
        self.clock = dict(on.clock)

    def synchronize(self) -> None:
        _learn(self.cuda.host(), self.clock)


@dataclass
class _Memory:
    """One piece of memory: the stream it was taken on, those that its allocator was told of, and each agent's last
    accesses."""

    alive: StorageWeakRef
    taken_on: Any
    recorded: set[Any] = field(default_factory=set)
    writes: Clock = field(default_factory=dict)
    reads: Clock = field(default_factory=dict)


@dataclass(frozen=True)
class Pinned:
    """Memory of the host that was page-locked: for which thread, and how much."""

    thread: str
    nbytes: int
    alive: StorageWeakRef


class PretendCuda:
    """What stands in for `torch.cuda`: `races` says in words what was found, the rest what was asked for.

    `most_under_way`: how many tensors at most one stream was told to keep, before any thread knew its work to be over.
    """

    def __init__(self) -> None:
        self.races: list[str] = []
        self.events: list[Event] = []
        self.streams: list[Stream] = []
        self.pinned: list[Pinned] = []
        self.given_back: list[bool] = []
        self.most_under_way = 0
        self.prepared: list[tuple[Any, ...]] = []
        self._defaults: dict[str, Stream] = {}
        self._memory: dict[int, _Memory] = {}
        self._clocks: dict[int, Clock] = defaultdict(dict)
        self._under_way: dict[Stream, list[int]] = defaultdict(list)
        self._lock = threading.RLock()
        self._thread = threading.local()

    # --- what torch.cuda offers ---

    def current_stream(self, device: Any = None) -> Stream:
        device = str(device or "cuda:0")
        with self._lock:
            default = self._defaults.setdefault(device, Stream(self, f"the default stream of {device}"))
        return getattr(self._thread, "stream", None) or default

    @contextlib.contextmanager
    def use_stream(self, on: Stream) -> Iterator[None]:
        before = getattr(self._thread, "stream", None)
        self._thread.stream = on
        try:
            yield
        finally:
            self._thread.stream = before

    def record_stream(self, tensor: Tensor, on: Stream) -> None:
        with self._lock:
            self._of(tensor, None).recorded.add(on)
            self._under_way[on].append(on.clock.get(on, 0))
            known = max(clock.get(on, 0) for clock in self._clocks.values())
            self.most_under_way = max(self.most_under_way, sum(count > known for count in self._under_way[on]))

    def new_pinned(self, tensor: Tensor) -> None:
        with self._lock:
            buffer = Pinned(threading.current_thread().name, tensor.nbytes, StorageWeakRef(tensor.untyped_storage()))
            self.pinned.append(buffer)

    def give_back(self) -> None:
        """torch unlocks the buffers that nobody holds any more; noted is whether that is all of them."""
        self.given_back.append(all(buffer.alive.expired() for buffer in self.pinned))

    # --- what is watched ---

    def host(self) -> Clock:
        """What this thread knows to be over."""
        return self._clocks[threading.get_ident()]

    def all_is_over(self) -> bool:
        """Whether this thread has waited for all that was launched."""
        known = self.host()
        return all(known.get(on, 0) >= on.clock.get(on, 0) for on in self.streams)

    def host_writes(self, tensor: Tensor) -> None:
        """This thread writes to memory of the host."""
        with self._lock:
            me, clock = threading.get_ident(), self.host()
            _tick(me, clock)
            self._access(tensor, me, clock, True, "the next read")

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """An operation on tensors of a GPU, launched on its current stream."""
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        with self._lock:
            if func.is_view or not (given or results):
                return
            device = next(t.device for t in (*results, *given) if isinstance(t, PretendTensor))
            on = self.current_stream(device)
            _learn(on.clock, self.host())
            self._hand_out_again(on)
            _tick(on, on.clock)
            written = _written(func, args, kwargs)
            for tensor in given:
                self._access(tensor, on, on.clock, any(tensor is w for w in written), str(func))
            for tensor in results:
                if isinstance(tensor, PretendTensor) and all(tensor is not t for t in given):
                    self._access(tensor, on, on.clock, True, str(func))
            from_host = any(not isinstance(t, PretendTensor) and t.ndim for t in given)
            to_host = result is not None and not any(isinstance(t, PretendTensor) for t in results)
            if (from_host or to_host) and not kwargs.get("non_blocking"):
                _learn(self.host(), on.clock)

    def _of(self, tensor: Tensor, agent: Any) -> _Memory:
        held = tensor.held if isinstance(tensor, PretendTensor) else tensor
        storage = held.untyped_storage()
        return self._memory.setdefault(storage._cdata, _Memory(StorageWeakRef(storage), agent))

    def _access(self, tensor: Tensor, agent: Any, clock: Clock, write: bool, what: str) -> None:
        memory = self._of(tensor, agent)
        for earlier in (memory.writes, memory.reads) if write else (memory.writes,):
            for other, count in earlier.items():
                if other is not agent and isinstance(other, Stream) and clock.get(other, 0) < count:
                    self.races.append(f"{what} on {_name(agent)} does not wait for {_name(other)}")
        (memory.writes if write else memory.reads)[agent] = clock[agent]

    def _hand_out_again(self, on: Stream) -> None:
        """What was let go of the memory that was taken on this stream may be written to from now on."""
        for key, memory in list(self._memory.items()):
            if memory.taken_on is on and memory.alive.expired():
                for other, count in {**memory.reads, **memory.writes}.items():
                    if isinstance(other, Stream) and other not in memory.recorded and on.clock.get(other, 0) < count:
                        self.races.append(f"{_name(on)} is given memory that {_name(other)} still uses")
                del self._memory[key]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation changes."""
    arguments = func._schema.arguments
    values = [*args, *(kwargs.get(argument.name) for argument in arguments[len(args) :])]
    changed = [v for a, v in zip(arguments, values, strict=True) if a.alias_info is not None and a.alias_info.is_write]
    return [tensor for tensor in tree_leaves(changed) if isinstance(tensor, Tensor)]


def _name(agent: Any) -> str:
    return agent.name if isinstance(agent, Stream) else "the host"


def _quantize_rows_counting(source_RK: Tensor, out_RK: Tensor, scale_R: Tensor, bad: Tensor) -> None:
    """In torch's operations, as a GPU's kernel does it: without waiting for anything."""
    q_RK, s_R = reference.quantize_rows(source_RK)
    out_RK.copy_(q_RK)
    scale_R.copy_(s_R)
    bad += (~torch.isfinite(s_R)).sum()


def install(monkeypatch: pytest.MonkeyPatch, gpus: int = 2, find_races: bool = True) -> PretendCuda:
    """Let this machine have so many GPUs, for what runs in `pretending()`."""
    cuda = PretendCuda()

    class NewStream(Stream):
        def __init__(self, device: Any) -> None:
            number = sum(on.name.endswith(f"of {device}") for on in cuda.streams)
            super().__init__(cuda, f"stream {number} of {device}")
            cuda.streams.append(self)

    class NewEvent(Event):
        def __init__(self, blocking: bool = False) -> None:
            super().__init__(cuda, blocking)
            cuda.events.append(self)

    for name, value in {
        "Stream": NewStream,
        "Event": NewEvent,
        "current_stream": cuda.current_stream,
        "stream": cuda.use_stream,
        "device": lambda device: contextlib.nullcontext(),
        "max_memory_allocated": lambda device: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, on: cuda.record_stream(tensor, on))
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", cuda.give_back, raising=False)
    monkeypatch.setattr(device_map, "prepare_layers", lambda *args: cuda.prepared.append(args))
    monkeypatch.setattr(dispatch, "backend_of", lambda device: "torch")
    monkeypatch.setattr(gpu, "quantize_rows_counting", _quantize_rows_counting)
    devices = [Device(f"cuda:{i}", "a GPU", GPU_BYTES, "float16") for i in range(gpus)]
    monkeypatch.setattr(device_map, "cuda_devices", lambda: devices)
    _watch(monkeypatch, cuda)
    if find_races:
        monkeypatch.setattr("pretend.watchers", [*watchers, cuda.operation])
    return cuda


def _watch(monkeypatch: pytest.MonkeyPatch, cuda: PretendCuda) -> None:
    empty, read, store = torch.empty, stream._File.read, gpu.GpuWriter.store

    def new_tensor(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        if pin_memory:
            cuda.new_pinned(made)
        return made

    def read_into(self: Any, what: Any, buffer: Tensor) -> Tensor:
        cuda.host_writes(buffer)
        return read(self, what, buffer)

    def store_there(self: Any, *args: Any) -> None:
        with pretending():  # a reader's thread has no mode of its own
            store(self, *args)

    monkeypatch.setattr(torch, "empty", new_tensor)
    monkeypatch.setattr(stream._File, "read", read_into)
    monkeypatch.setattr(gpu.GpuWriter, "store", store_there)
