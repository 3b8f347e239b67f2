"""The workers of a pipeline as processes: started in their places, asked, ended, started again, elsewhere if need be.

A worker that is to be replaced may be dead, stopped, stuck, or on a node that is gone. Its process is ended before
another one takes its device: Ray gives a place away again when the process is gone.
"""

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from ..errors import BigInt8Error, WorkerDied, WorkerError, in_one_line
from ..plan.spec import ModelSpec
from .nodes import measure_links
from .placement import START_SECONDS, Reserved, gone
from .preflight import check_nodes
from .watch import TICK_SECONDS

if TYPE_CHECKING:
    from .worker import WorkerInfo

ALIVE_SECONDS = 10
"""How long a worker may take to say that it is alive."""

END_SECONDS = 10
"""How long the kernel may take to end a process and give its memory back."""

LOOK_SECONDS = 1.0
"""How often to look whether the nodes are still there on which workers start."""


class Crew:
    """Workers of one kind of device, in order.

    workers: the actors; infos: where each runs. Both lists stay the same objects
    """

    def __init__(self, kind: str, count: int, spec: ModelSpec | None, beside: "Crew | None" = None) -> None:
        """Start them. `spec` is that of the model that they will load, if it is known. Raises WorkerError.

        beside: those in whose places these are, on the same devices
        """
        self.kind, self._spec = kind, spec
        self.workers: list[Any] = []
        self.infos: list[WorkerInfo] = []
        self._places = list(range(count))  # of each worker, counted as `_reserved` does
        self._reserved: Reserved = Reserved(kind, count) if beside is None else beside._reserved.share()
        self._shared: dict[int, str | None] = {}  # places that another crew has taken, and their GPUs
        if beside is not None:
            self._shared = {place: info.gpu_id for place, info in zip(beside._places, beside.infos, strict=True)}
        try:
            check_nodes(self._reserved.nodes())
            # before the workers import what they need, which would be measured with the links
            measure_links(self._reserved.nodes())
            self.workers += [self._new_worker(place) for place in self._places]
            self.infos += self._described(range(count))
            order = sorted(range(count), key=lambda i: (self.infos[i].host, self.infos[i].node, self.infos[i].gpu, i))
            self.arrange(order)  # neighbours share a box
        except BaseException:
            self.close()
            raise

    def _new_worker(self, place: int) -> Any:
        from .worker import Worker

        actor = ray.remote(concurrency_groups={"control": 1})(Worker).options(
            **self._reserved.options(place, place in self._shared)
        )
        return actor.remote(self.kind, self._spec, self._shared.get(place))

    def arrange(self, order: Sequence[int]) -> None:
        """Put them in another order."""
        self.workers[:] = [self.workers[i] for i in order]
        self.infos[:] = [self.infos[i] for i in order]
        self._places[:] = [self._places[i] for i in order]

    def name(self, index: int) -> str:
        """Which worker this is, and where, for people."""
        info = self.infos[index]
        device = f"cuda:{info.gpu}" if self.kind == "cuda" else "cpu"
        return f"worker {index} ({info.host}, {device})"

    # --- those that are dead ---

    def dead(self, count: int, hung: Collection[int] = ()) -> dict[int, str]:
        """Which of the first `count` workers are dead or say nothing, and why. `hung`: they are not even asked."""
        asked = {self.workers[i].progress.remote(): i for i in range(count) if i not in hung}
        waiting = list(asked)
        for _ in range(round(ALIVE_SECONDS / TICK_SECONDS)):  # a pause of this process is not theirs
            if waiting:
                _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=TICK_SECONDS)
        found = {}
        for reference, index in asked.items():
            try:
                ray.get(reference, timeout=0)
            except GetTimeoutError:
                found[index] = f"it did not answer within {ALIVE_SECONDS} s"
            except RayActorError as error:
                found[index] = in_one_line(error)
        return found

    def replace(self, indices: Iterable[int], count: int, avoid: Collection[str] = ()) -> list[int]:
        """End these workers, and start others: in their places, or elsewhere where nodes are gone or to be avoided.

        The first `count` workers are needed. Where no place is free, one of the others takes over. Returns those that
        are elsewhere now. Raises WorkerError where there is no place, WorkerDied where another node goes meanwhile.
        """
        indices, nodes = sorted(set(indices)), self._reserved.nodes()
        lost = gone(set(nodes)) | set(avoid)
        moved = [i for i in indices if nodes[self._places[i]] in lost]
        for i in indices:
            self._end(i)
        starting = set(indices)
        for i in moved:
            try:
                self._reserved.move(self._places[i], lost)
                self._shared.pop(self._places[i], None)
            except WorkerError as error:
                others = range(count, len(self.workers))
                spare = next((j for j in others if nodes[self._places[j]] not in lost), None)
                if spare is None:
                    raise WorkerError(f"{self.name(i)} is lost with its node, and {error}") from None
                self._swap(i, spare)
                starting.discard(i)
        self._start(sorted(starting))
        return moved

    def _swap(self, one: int, other: int) -> None:
        order = list(range(len(self.workers)))
        order[one], order[other] = other, one
        self.arrange(order)

    def _start(self, indices: Sequence[int]) -> None:
        """Start workers in their places, which may be on nodes that had none before."""
        nodes = self._reserved.nodes()
        check_nodes({nodes[self._places[i]] for i in indices} - {info.node for info in self.infos})
        for i in indices:
            self.workers[i] = self._new_worker(self._places[i])
        for i, info in zip(indices, self._described(indices), strict=True):
            self.infos[i] = info

    def _end(self, index: int) -> None:
        """End a worker's process. Ray asks it first, and kills it after 5 s: one on this node is not asked."""
        ray.kill(self.workers[index])
        info = self.infos[index]
        if info.node == ray.get_runtime_context().get_node_id():
            end_process(info.pid)

    def _described(self, indices: Sequence[int]) -> "list[WorkerInfo]":
        """What workers that start say of themselves. Raises WorkerDied when a node goes before they do."""
        asked = [self.workers[i].describe.remote() for i in indices]
        waiting, until = asked, time.monotonic() + START_SECONDS
        while waiting and time.monotonic() < until:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_SECONDS)
            nodes = self._reserved.nodes()
            lost = gone({nodes[self._places[i]] for i in indices}) if waiting else set()
            if lost:
                raise WorkerDied(f"{len(lost)} nodes went away while workers started there")
        infos: list[WorkerInfo] = get(asked, 0)
        return infos

    # --- the end ---

    def close(self) -> None:
        """End them, and give their places back."""
        for worker in self.workers:
            ray.kill(worker)
        self._reserved.free()
        self.workers.clear()


def get(references: Any, timeout: float | None = None) -> Any:
    """`ray.get` with the errors of the interface: those of bigint8 as they were raised, others as WorkerError."""
    try:
        return ray.get(references, timeout=timeout)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, BigInt8Error):
            raise cause from None
        raise WorkerError(f"a worker failed: {type(cause).__name__}: {cause}") from error
    except GetTimeoutError:
        raise WorkerError(f"a worker did not answer within {timeout:.0f} s; ray status shows the cluster") from None
    except RayError as error:
        raise WorkerDied(f"a worker died, or its box went away: {in_one_line(error)}") from error


def end_process(pid: int) -> None:
    """Kill a worker of Ray on this box, also one that is stopped, and wait until it is gone. Leaves other processes."""
    command = Path(f"/proc/{pid}/cmdline")
    with contextlib.suppress(OSError, psutil.Error):
        if command.is_file() and not command.read_bytes().startswith(b"ray::"):
            return
        process = psutil.Process(pid)
        os.kill(pid, signal.SIGKILL)
        process.wait(END_SECONDS)
