"""CUDA graphs of GPUs that are not there: what is captured is written down, and a replay runs it again.

As on a GPU, a replay knows no Python: it repeats operations on the very tensors that they had when they were captured.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pretend
import pretend_cuda
import pytest
import torch
from pretend import PretendTensor
from torch.utils._pytree import tree_leaves, tree_map


class Recorder:
    """What stands in for `torch.cuda`'s graphs. `events` says what the stream was given, in order."""

    def __init__(self, cuda: pretend_cuda.PretendCuda) -> None:
        self.cuda, self.events, self.graphs = cuda, [], []
        self.recording: Any = None

    def watch(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if self.recording is None:
            self.events.append(func.__name__)
        elif not func.is_view:
            self.recording.operations.append((func, args, kwargs, result))

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local" and pool == "the pool"
        self.recording = graph
        with self.cuda.use_stream(stream):
            yield
        self.recording = None
        self.graphs.append(graph)
        self.cuda.current_stream().wait_stream(stream)  # nothing ran there


def held(value: Any) -> Any:
    return value.held if isinstance(value, PretendTensor) else value


def install(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Let this machine have GPUs that capture graphs, for what runs in `pretending()`."""
    cuda = pretend_cuda.install(monkeypatch)
    recorder = Recorder(cuda)

    class Graph:
        def __init__(self) -> None:
            self.operations: list[Any] = []

        def replay(self) -> None:
            recorder.events.append("replay")
            for func, args, kwargs, result in self.operations:
                again = func(*tree_map(held, args), **tree_map(held, {**kwargs, **on_the_host(kwargs)}))
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, PretendTensor) and old.held is not new:
                        old.held.copy_(new)

    for name, value in {
        "CUDAGraph": Graph, "graph": recorder.graph, "graph_pool_handle": lambda: "the pool",
        "memory_reserved": lambda device: 1000 * len(recorder.graphs),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(pretend, "watchers", [*pretend.watchers, recorder.watch])
    return recorder


def on_the_host(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"device": torch.device("cpu")} if "device" in kwargs else {}
