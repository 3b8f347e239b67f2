"""Hidden states between GPUs that are not there: what is copied when, and what waits for it. No GPU has shown this.

The stand-in does what is launched as late as it may: when somebody waits for an event that comes after it.
"""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_flow import Arithmetic, chain, choosing, foretold
from test_links import WAIT, End, connected, make_step
from torch import Tensor

from bigint8.run.links import MOST_UNDER_WAY, LinkSettings
from bigint8.run.tensors import Carrier
from bigint8.run.wire import step_message

GPU = "cuda:0"


class LateCuda:
    """Work in the order in which it was launched. `locked`: how many page-locked buffers were made."""

    def __init__(self) -> None:
        self.launched: list[Callable[[], object]] = []
        self.done = self.locked = 0
        self._lock = threading.RLock()

    def launch(self, work: Callable[[], object]) -> None:
        with self._lock:
            self.launched.append(work)

    def wait_for(self, count: int) -> None:
        """The first `count` launches are over."""
        with self._lock, torch.inference_mode():
            while self.done < count:
                self.launched[self.done]()
                self.done += 1

    def wait_for_all(self) -> None:
        self.wait_for(len(self.launched))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> LateCuda:
    late = LateCuda()
    empty, copy, to = torch.empty, Tensor.copy_, Tensor.to

    class Event:
        def __init__(self, blocking: bool = False, enable_timing: bool = False) -> None:
            self.blocking = blocking

        def record(self, stream: object) -> None:
            self.after = len(late.launched)

        def synchronize(self) -> None:
            assert self.blocking, "who waits leaves its CPU to others"
            late.wait_for(self.after)

        def query(self) -> bool:
            return late.done >= self.after

        def elapsed_time(self, other: "Event") -> float:
            return 1.0

    def new(*args: object, pin_memory: bool = False, **kwargs: object) -> Tensor:
        late.locked += pin_memory
        return empty(*args, **kwargs)

    def copy_late(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if not non_blocking:
            return copy(self, source)
        late.launch(lambda: copy(self, source))
        return self

    def to_late(self: Tensor, *args: object, non_blocking: bool = False) -> Tensor:
        if args != (torch.device(GPU),):
            return to(self, *args)
        assert non_blocking
        made = empty(self.shape, dtype=self.dtype)
        late.launch(lambda: copy(made, self))
        return made

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode())
    monkeypatch.setattr(torch, "empty", new)
    monkeypatch.setattr(Tensor, "copy_", copy_late)
    monkeypatch.setattr(Tensor, "to", to_late)
    late.event = Event
    return late


def late_arithmetic(cuda: LateCuda) -> type[Arithmetic]:
    class OnGpu(Arithmetic):
        """Returns before it has computed."""

        def run(self, step, hidden):
            output = torch.zeros(len(step.keep) if self.place.is_last else step.rows, 6, dtype=self.dtype)
            compute = super().run
            cuda.launch(lambda: output.__setitem__(slice(None), compute(step, hidden)))
            return output

        def answer(self, step, hidden):
            cuda.wait_for_all()
            return super().answer(step, hidden)

    return OnGpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ring", [False, True])
def test_steps_through_gpus_give_the_right_tokens_though_all_is_done_late(cuda, ring, dtype):
    kind = late_arithmetic(cuda)
    with chain(3, ring, dtype=dtype, kind=kind, device=GPU) as there:
        for start in range(0, 128, MOST_UNDER_WAY):
            numbers = range(start, start + MOST_UNDER_WAY)
            for number in numbers:
                there.answers.send(choosing(make_step(number, rows=2 + number % 5, keep=(number % 2,))))
            for number in numbers:
                result = there.answers.receive(WAIT)
                assert result.number == number
                assert result.values.tolist() == foretold(np.array([number % 2]), 3).tolist()
        stats = [flow.tally.stats() for flow in there.flows]
        assert all(each.busy_seconds > 0 for each in stats)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_without_waiting_for_the_copy_something_else_would_be_sent(cuda, monkeypatch):
    """The proof that the test above can fail."""
    monkeypatch.setattr(cuda.event, "synchronize", lambda self: None)
    with chain(2, kind=late_arithmetic(cuda), device=GPU) as there:
        there.answers.send(choosing(make_step(0, rows=3, keep=(2,))))
        assert there.answers.receive(WAIT).values.tolist() != foretold(np.array([2]), 2).tolist()


def test_a_buffer_is_received_into_again_once_the_gpu_has_copied_it(cuda):
    near, far = connected()
    sender, receiver = End(near), End(far, page_locked=True)
    assert receiver.link.settings == LinkSettings(WAIT, page_locked=True)
    for end in (sender, receiver):
        end.link.start()
    carrier, copies = Carrier(GPU), []
    for number in range(3):
        sender.link.send(step_message(make_step(number), np.full((3, 4), number, np.float32), "float32"))
        received = receiver.next()
        copies.append((carrier.arrived(received), received.buffer))
        received.release(carrier.read())
    cuda.wait_for_all()
    assert [there.unique().tolist() for there, _ in copies] == [[0.0], [1.0], [2.0]]
    assert len({id(buffer) for _, buffer in copies}) == cuda.locked == 1
    for end in (sender, receiver):
        end.link.close()


def test_what_a_lost_link_did_not_send_gives_its_buffers_back(cuda, monkeypatch):
    near, far = connected()
    end = End(near)
    end.link.start()
    carrier = Carrier(GPU)
    hold = threading.Event()
    monkeypatch.setattr(cuda.event, "synchronize", lambda self: hold.wait(WAIT))
    for _ in range(5):
        carrier.send(end.link, torch.ones(3, 4), lambda payload, dtype: step_message(make_step(), payload, dtype))
    assert carrier._out._lent == 5
    far.close()
    assert end.why()
    assert carrier._out._lent == 0
    hold.set()


def test_a_gpu_that_fails_to_copy_ends_the_link(cuda, monkeypatch):
    def fail(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cuda.event, "synchronize", fail)
    near, far = connected()
    end = End(near)
    end.link.start()
    Carrier(GPU).send(end.link, torch.ones(3, 4), lambda payload, dtype: step_message(make_step(), payload, dtype))
    assert "illegal memory access" in end.why()
    assert far.recv(1) == b""
    far.close()


def test_a_stage_alone_answers_too(cuda):
    with chain(1, kind=late_arithmetic(cuda), device=GPU) as there:
        there.answers.send(choosing(make_step(0, keep=(1,))))
        assert there.answers.receive(WAIT).values.tolist() == foretold(np.array([1]), 1).tolist()
