"""Which cores a CPU worker computes on: those of a box are shared by its workers."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from ..plan.devices import usable_cpus


@dataclass(frozen=True)
class Share:
    """One of `count` equal shares of a box's cores, from 0."""

    index: int = 0
    count: int = 1


def cores_of(share: Share, cores: list[int]) -> list[int]:
    """The cores of a share; all of them where there are fewer than shares."""
    if len(cores) < share.count:
        return cores
    first, end = (i * len(cores) // share.count for i in (share.index, share.index + 1))
    return cores[first:end]


class Cores:
    """The cores that this process may run on. Make it before anything changes them."""

    def __init__(self) -> None:
        self._all = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def take(self, share: Share) -> int:
        """Keep this process to its share, if it may; returns how many threads should compute there.

        Threads that start later are kept to it too. Without cores of their own, threads of several workers would
        interrupt each other in the middle of a product, and all wait for the last.
        """
        if self._all:
            cores = cores_of(share, self._all)
            tasks = Path("/proc/self/task")
            for thread in [int(task.name) for task in tasks.iterdir()] if tasks.is_dir() else [0]:
                with contextlib.suppress(OSError):  # it has ended, or a sandbox forbids it
                    os.sched_setaffinity(thread, cores)
        return max(1, (len(self._all) or usable_cpus()) // share.count)
