"""The driver's ends of a pipeline's links: steps go out, and their results come back in the order of sending."""

import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from queue import Empty, SimpleQueue

from ..errors import WorkerError
from ..model.step import Result, Step
from .doors import HELLO_SECONDS, Address, Hello, Role, knock
from .links import MOST_UNDER_WAY, Link, LinkLost, LinkSettings, Received
from .stages import StageLost
from .watch import TICK_SECONDS, Patience, Watch
from .wire import BUSY, Kind, Message, detached, result_of, step_message


class Answers:
    """Links from the driver to every stage, of one epoch. Steps may be sent by one thread and received by another.

    A stage may answer before a stage that has had an earlier step: results wait here for their turn.

    hung: stages that said nothing, or stayed at one step, for too long, and why: their processes may still be there
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        epoch: int,
        secret: bytes,
        settings: LinkSettings = LinkSettings(),  # noqa: B008  (frozen)
        patience: Sequence[Patience] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Connect to the stages' addresses, in order. Raises WorkerError if one is not reached in HELLO_SECONDS.

        patience: with each stage that says nothing; names: what they are called, with where they are
        """
        self._lock = threading.Lock()
        self._under_way: deque[int] = deque()
        self._came: dict[int, Message | Result] = {}
        self._signals: SimpleQueue[None] = SimpleQueue()
        self._names = names or [f"stage {index}" for index in range(len(addresses))]
        self._lost: tuple[int, str] | None = None
        self.hung: dict[int, str] = {}
        self._links: list[Link] = []
        self._closed = threading.Event()
        self._watch = Watch(patience or [Patience()] * len(addresses))
        try:
            for index, address in enumerate(addresses):
                connection = knock(address, Hello(Role.DRIVER, epoch), secret, HELLO_SECONDS)
                self._links.append(self._new_link(connection, index, settings))
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._watch_all, name="watch", daemon=True).start()

    def _new_link(self, connection: socket.socket, index: int, settings: LinkSettings) -> Link:
        def lost(_: Link, why: str) -> None:
            self._lose(index, f"{self._names[index]} is lost: {why}")

        link = Link(connection, f"stage {index}", self._take, lost, settings)
        link.start()
        return link

    def send(self, step: Step) -> None:
        """Send a step to the first stage; returns at once. If a stage is lost, `receive` tells.

        Raises WorkerError for a step that is none, and for more steps under way than MOST_UNDER_WAY.
        """
        with self._lock:
            if len(self._under_way) >= MOST_UNDER_WAY:
                raise WorkerError(f"{MOST_UNDER_WAY} steps are under way: receive some before sending more")
            if not 0 <= step.stages <= len(self._links):
                raise WorkerError(f"step {step.number} is to end after stage {step.stages} of {len(self._links)}")
            self._under_way.append(step.number)
        try:
            self._links[0].send(step_message(step))
        except LinkLost:
            pass  # the thread that receives on that link says why
        except BaseException:
            with self._lock:
                self._under_way.remove(step.number)
            raise

    def receive(self, timeout: float) -> Result:
        """The result of the step that was sent first of those under way.

        Raises StageLost when a stage is gone: then none of the steps under way has a result any more. Raises
        WorkerError for a step that a stage could not run, and after `timeout` seconds; then it is still under way.
        """
        until = time.monotonic() + timeout
        while True:
            with self._lock:
                number = self._under_way[0] if self._under_way else None
                if number in self._came:
                    self._under_way.popleft()
                    return self._result(self._came.pop(number))
                if self._lost is not None:
                    raise StageLost(*self._lost)
                if self._closed.is_set():
                    raise WorkerError("the links to the workers were closed")
            try:
                self._signals.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                step = "no step is under way" if number is None else f"step {number} has no result"
                raise WorkerError(f"{step} after {timeout:g} s") from None

    def lost(self) -> StageLost | None:
        """The stage that was lost first."""
        return None if self._lost is None else StageLost(*self._lost)

    def quiet(self) -> int | None:
        """A stage that has said nothing for a while, and may be lost."""
        return self._watch.quiet()

    def _watch_all(self) -> None:
        """The thread that finds stages that hang."""
        while not self._closed.wait(TICK_SECONDS):
            for index, why in self._watch.tick([link.heard for link in self._links]).items():
                self.hung[index] = why
                self._lose(index, f"{self._names[index]} is lost: {why}")

    def close(self) -> None:
        """End the links. Who waits for a result gets a WorkerError."""
        self._closed.set()
        self._signals.put(None)
        for link in self._links:
            link.close()

    def _result(self, message: Message | Result) -> Result:
        if isinstance(message, Result):
            return message
        raise WorkerError(f"stage {message.place} could not run step {message.number}: {message.text}")

    def _take(self, received: Received) -> None:
        """What a stage says."""
        message = received.message
        if message.kind is Kind.LOST:
            self._lose(message.place, f"{self._names[message.place]} is lost to another stage: {message.text}")
        elif message.kind is Kind.PULSE:
            self._watch.heard(message.place, message.number, message.text == BUSY)
        elif message.kind in (Kind.RESULT, Kind.FAILED):
            answer = result_of(message) if message.kind is Kind.RESULT else detached(message)
            with self._lock:
                if message.number in self._under_way:
                    self._came[message.number] = answer
            self._signals.put(None)
        received.release()

    def _lose(self, index: int, why: str) -> None:
        with self._lock:
            self._lost = self._lost or (index, why)
        self._signals.put(None)
