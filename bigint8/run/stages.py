"""What whoever feeds a pipeline needs of it: steps in, results out in the same order, stages that may be lost."""

from typing import Protocol

from ..errors import WorkerDied
from ..model.step import Result, Step
from .spans import StageStats


class StageLost(WorkerDied):
    """A stage whose worker is gone, or not to be reached. `index`: which one."""

    def __init__(self, index: int, why: str = "") -> None:
        super().__init__(f"stage {index} is lost{': ' if why else ''}{why}")
        self.index = index


class Stages(Protocol):
    """A pipeline of `count` stages."""

    count: int

    def send(self, step: Step) -> None:
        """Send a step on its way; returns at once."""

    def receive(self, timeout: float) -> Result:
        """The result of the oldest step under way.

        Raises StageLost when a stage is gone (the steps under way are gone with it), WorkerError for a step that a
        stage could not run, and when there is no result within `timeout` seconds.
        """

    def restore(self) -> list[int]:
        """Start lost stages again and connect all of them; the indices of those whose pages are empty now."""

    def stats(self) -> list[StageStats]:
        """What each stage has done so far."""
