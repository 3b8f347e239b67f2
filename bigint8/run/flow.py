"""The part of a worker that takes steps from the stage before, runs its own, and sends them on.

    driver -> stage 0 -> ... -> last stage -> driver        with a head of its own, or a copy of the embeddings
    driver -> stage 0 -> ... -> last stage -> stage 0 -> driver        where the head is tied to the embeddings

Each arrow is a link. The driver has one to every stage, on which that stage answers: with tokens or logits, with
nothing for a step that ends there, or with what went wrong. A thread computes, one message at a time, rows for the head
before steps: they end a step that others wait for.

Another thread tells the driver, several times a second, that the stage is there, and whether it is at a message.

Links belong to an epoch. When the pipeline is mended, all of them are made anew under the next one; what came by older
ones is dropped.
"""

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import WorkerError, in_one_line
from ..model.step import Step
from .doors import HELLO_SECONDS, Address, Door, Hello, Role, knock, welcome
from .links import Link, LinkLost, LinkSettings, Received
from .spans import Spans, Tally
from .tensors import Carrier, Mark
from .wire import Array, Kind, Message, pulse, result_message, rows_message, step_message, word

PULSE_SECONDS = 0.25
"""How often a stage tells the driver that it is there."""

_Make = Callable[[Step, Array, str], Message]
Values = NDArray[np.int32] | NDArray[np.float32]


class LoadedStage(Protocol):
    """What runs a step on this worker's device."""

    def run(self, step: Step, hidden: Tensor | None) -> Tensor:
        """The step's rows through the stage: hidden states (T, H); on the last stage, those of the R kept rows."""

    def answer(self, step: Step, hidden_RH: Tensor) -> Values:
        """What the step asks of its kept rows: tokens, with log probabilities or not, or logits: `Result.values`."""


@dataclass(frozen=True)
class Place:
    """Which stage of how many this is; `ring`: whether the head is in the first of several."""

    index: int
    count: int
    ring: bool

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    @property
    def comes_in(self) -> Role | None:
        """Who connects to this stage besides the driver."""
        if self.index:
            return Role.BEFORE
        return Role.RING if self.ring else None

    @property
    def goes_out(self) -> Role | None:
        """As whom this stage connects to the next one, if there is one."""
        if not self.is_last:
            return Role.BEFORE
        return Role.RING if self.ring else None

    @property
    def next(self) -> int:
        return 0 if self.is_last else self.index + 1


@dataclass
class _Inbox:
    """Messages that wait for the computing thread."""

    _rows: deque[Received] = field(default_factory=deque)
    _steps: deque[Received] = field(default_factory=deque)
    _signals: "SimpleQueue[bool]" = field(default_factory=SimpleQueue)

    def put(self, received: Received) -> None:
        (self._rows if received.message.kind is Kind.ROWS else self._steps).append(received)
        self._signals.put(True)

    def take(self) -> Received | None:
        """The next message, when there is one; None once this is closed."""
        if not self._signals.get():
            return None
        return (self._rows or self._steps).popleft()

    def close(self) -> None:
        self._signals.put(False)


@dataclass(eq=False)
class _Epoch:
    """The links of one epoch: by who came in, and to the next stage. What came by them is answered by them."""

    number: int = 0
    came_in: dict[Role, Link] = field(default_factory=dict)
    next: Link | None = None

    def tell(self, message: Message) -> None:
        """Send the driver a word, unless it is gone."""
        link = self.came_in.get(Role.DRIVER)
        if link is not None:
            with contextlib.suppress(LinkLost):
                link.send(message)

    def close(self) -> None:
        for link in [*self.came_in.values(), *filter(None, [self.next])]:
            link.close()


_LAST = 2**62
"""The epoch of a flow that is closed."""


class Flow:
    """A loaded stage and its links. `listen`, then `connect`; `connect` again under the next epoch; `close`."""

    def __init__(self, stage: LoadedStage, place: Place, device: str, settings: LinkSettings | None = None) -> None:
        """device: the stage's, as torch names it."""
        self._stage, self._place = stage, place
        self._carrier = Carrier(device)
        self._settings = settings or LinkSettings(page_locked=self._carrier.page_locked)
        self._changed = threading.Condition()
        self._now = _Epoch()
        self._inbox = _Inbox()
        self._door: Door | None = None
        self._secret = b""
        self.spans, self.tally = Spans(), Tally()
        self._handled, self._busy = 0, False
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()
        self._thread = threading.Thread(target=self._compute_all, name="compute", daemon=True)
        self._thread.start()

    # --- links ---

    def listen(self, host: str, secret: bytes) -> Address:
        """Listen on an address of this box: where. Raises WorkerError where that cannot be."""
        self._secret = secret
        if self._door is not None and self._door.address[0] != host:
            self._door.close()
            self._door = None
        if self._door is None:
            self._door = Door(host, secret, self._let_in)
        return self._door.address

    def connect(self, epoch: int, next_address: Address | None, seconds: float = HELLO_SECONDS) -> None:
        """Make this stage's links under an epoch: to the next stage, and from the one before, which does the same.

        Raises WorkerError if that has not come about within so many seconds.
        """
        self._enter(epoch)
        role = self._place.goes_out
        if role is not None:
            assert next_address is not None, "a stage that sends on knows where to"
            connection = knock(next_address, Hello(role, epoch), self._secret, seconds)
            with self._changed:
                if self._now.number != epoch:
                    connection.close()
                    raise WorkerError(f"stage {self._place.index}: its links were made anew meanwhile")
                self._now.next = self._new_link(connection, self._place.next)
        comes_in = self._place.comes_in
        with self._changed:
            if comes_in is not None and not self._changed.wait_for(lambda: comes_in in self._now.came_in, seconds):
                raise WorkerError(f"stage {self._place.index}: the stage before it has not connected to it")

    def close(self) -> None:
        """End the links and the thread that computes, after the step that it is at."""
        self._closed.set()
        if self._door is not None:
            self._door.close()
        self._enter(_LAST)
        self._inbox.close()
        self._thread.join()

    def _enter(self, epoch: int) -> None:
        """Drop the links of older epochs, and what came by them."""
        with self._changed:
            if epoch <= self._now.number:
                return
            before, self._now = self._now, _Epoch(epoch)
        before.close()

    def _let_in(self, connection: socket.socket, hello: Hello) -> bool:
        """A connection from the driver or the stage before; not one of an older epoch."""
        if hello.role not in (Role.DRIVER, self._place.comes_in):
            return False
        self._enter(hello.epoch)
        with self._changed:
            if hello.epoch != self._now.number or hello.role in self._now.came_in:
                return False
            welcome(connection)
            before = None if hello.role is Role.DRIVER else (self._place.index or self._place.count) - 1
            self._now.came_in[hello.role] = self._new_link(connection, before)
            self._changed.notify_all()
        return True

    def _new_link(self, connection: socket.socket, stage: int | None) -> Link:
        """`stage`: the other end, None for the driver."""
        epoch = self._now

        def lost(link: Link, why: str) -> None:
            if stage is not None:
                epoch.tell(word(Kind.LOST, 0, stage, why))

        link = Link(
            connection, "the driver" if stage is None else f"stage {stage}", self._inbox.put, lost, self._settings
        )
        link.start()
        return link

    # --- steps ---

    def _compute_all(self) -> None:
        """The computing thread."""
        with torch.inference_mode(), self._carrier.on_device():
            while (received := self._inbox.take()) is not None:
                self._busy = True
                with self._changed:
                    epoch = self._now
                    is_current = received.link in epoch.came_in.values()
                if is_current:
                    self._handle(received, epoch)
                else:
                    received.release()
                self._handled, self._busy = self._handled + 1, False

    def _beat(self) -> None:
        """The thread that says so: a process that is stopped, or cut off, is silent."""
        while not self._closed.wait(PULSE_SECONDS):
            with self._changed:
                epoch = self._now
            link = epoch.came_in.get(Role.DRIVER)
            if link is not None and link.is_free:  # what comes on a link says as much
                epoch.tell(pulse(self._handled, self._place.index, self._busy))

    def _handle(self, received: Received, epoch: _Epoch) -> None:
        message = received.message
        name = "ring" if message.kind is Kind.ROWS else "hop"
        self.spans.add(name, message.number, message.sent_ns, received.received_ns)
        self.spans.add("wait", message.number, received.received_ns, time.time_ns())
        free = None
        try:
            hidden = self._carrier.arrived(received)
            if message.kind is Kind.STEP:
                self._run(message.step, hidden, epoch)
            elif message.kind is Kind.ROWS and hidden is not None:
                self._answer(message.step, hidden, epoch)
            free = self._carrier.read()
        except LinkLost:
            pass  # the thread that receives on that link tells the driver
        except Exception as error:
            text = f"{type(error).__name__}: {in_one_line(error)}"
            epoch.tell(word(Kind.FAILED, message.number, self._place.index, text))
        received.release(free)

    def _run(self, step: Step, hidden: Tensor | None, epoch: _Epoch) -> None:
        """A step through this stage, and what comes after."""
        start = self._carrier.mark()
        output = self._stage.run(step, hidden)
        self._count("compute", start, step)
        ends_here = step.stages == self._place.index + 1 and not self._place.is_last
        if ends_here or (self._place.is_last and not len(step.keep)):
            epoch.tell(result_message(step.number, np.zeros(0, np.int32)))
        elif not self._place.is_last:
            self._send_on(step, output, step_message, epoch.next)
        elif self._place.ring:
            self._send_on(step, output, rows_message, epoch.next)
        else:
            self._answer(step, output, epoch)

    def _answer(self, step: Step, hidden_RH: Tensor, epoch: _Epoch) -> None:
        start = self._carrier.mark()
        values = self._stage.answer(step, hidden_RH)
        self._count("head", start, step)
        epoch.tell(result_message(step.number, values))

    def _send_on(
        self, step: Step, output: Tensor, make: Callable[[Step, Array, str], Message], to: Link | None
    ) -> None:
        assert to is not None, "a stage that sends on has a link to the next"
        start = time.time_ns()
        self._carrier.send(to, output, lambda payload, dtype: make(step, payload, dtype))
        self.spans.add("send", step.number, start, time.time_ns())

    def _count(self, name: str, start: Mark, step: Step) -> None:
        end = self._carrier.mark()
        self.tally.count(self._carrier.computed(start, end), step if name == "compute" else None)
        self.spans.add(name, step.number, start.ns, end.ns)
