"""A pipeline of several loaded stages in this process."""

import collections

import numpy as np

from bigint8.model.step import Result, Step
from bigint8.plan.plan import Plan
from bigint8.run.running import RunningStage
from bigint8.run.stages import StageLost, StageStats


class SeveralStages:
    """The stages of a plan, each with keys and values of its own. What is sent runs when its result is received.

    fails: numbers of the steps, counted as they run, that are lost with the last stage after the others have run them
    rows: how many rows each step had
    """

    def __init__(self, plan: Plan, fails=()) -> None:
        self.plan, self.fails = plan, set(fails)
        self.count = len(plan.stages)
        self.stages = [self.loaded(index) for index in range(self.count)]
        self.sent: collections.deque[Step] = collections.deque()
        self.rows: list[int] = []
        self.number = 0

    def loaded(self, index):
        return RunningStage(self.plan, index, "cpu", lambda done, total: None)

    def send(self, step):
        self.sent.append(step)

    def receive(self, timeout):
        step = self.sent.popleft()
        self.number += 1
        self.rows.append(step.rows)
        hidden = None
        for index, stage in enumerate(self.stages[: step.stages or self.count]):
            if index and index == self.count - 1 and self.number in self.fails:
                self.sent.clear()
                raise StageLost(index, "the last stage is gone")
            hidden = stage.run(step, hidden)
        if step.stages:
            return Result(step.number, np.zeros(0, np.int32))
        return Result(step.number, self.stages[0 if self.plan.spec.tied else -1].answer(step, hidden))

    def restore(self):
        self.stages[-1] = self.loaded(self.count - 1)
        return [self.count - 1]

    def lost(self):
        return None

    def quiet(self):
        return None

    def stats(self):
        return [StageStats(0.0, self.number, sum(self.rows))] * self.count
