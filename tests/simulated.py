"""Stages without a model: a hash over what a row sees takes the place of attention.

Each stage keeps a value for each place in real pages, and a row's value depends on every value that it sees through the
tables, on its position and on how it is computed. So a wrong page, a copy that was not made, or a page that was given
away too early shows as another token.
"""

import random
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest

from bigint8.model.step import CHOICE, Result, Step
from bigint8.options import PAGE_TOKENS
from bigint8.run import sequence as sequence_module
from bigint8.run.pages import PageGroup
from bigint8.run.scheduler import Scheduler
from bigint8.run.settings import Settings
from bigint8.run.stages import StageLost, StageStats


@pytest.fixture(autouse=True, scope="module")
def short_prompts():
    """Prompts of at most 16 tokens are short here, so that few tokens make a long one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequence_module, "SHORT_PROMPT", 16)
        yield


VOCABULARY = 97


def mix(values):
    """uint64 of the same shape: SplitMix64's finalizer."""
    with np.errstate(over="ignore"):
        z = np.asarray(values, np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class SimulatedStage:
    """One stage: a value for each place, in the pages of each group."""

    def __init__(self, groups, index):
        self.groups, self.index = groups, index
        self.pools = [np.zeros((group.pages, PAGE_TOKENS), np.uint64) for group in groups]
        self.lose()

    def lose(self):
        for pool in self.pools:
            pool[:] = np.random.default_rng(self.index).integers(1, 2**63, pool.shape)

    def run(self, step: Step, values):
        for group, source, to in step.copies.tolist():
            self.pools[group][to] = self.pools[group][source]
        for group, pool, table in zip(self.groups, self.pools, step.tables, strict=True):
            runs, within = step.places // PAGE_TOKENS, step.places % PAGE_TOKENS
            pages = table[step.sequences, runs]
            assert (pages >= 0).all(), "a row has no page"
            pool[pages, within] = values
            rows = zip(step.sequences, step.places, strict=True)
            values = np.array([self._attend(pool, group, table[s], int(place)) for s, place in rows])
        return values

    def _attend(self, pool, group: PageGroup, table, place):
        first = 0 if group.window is None else max(0, place - group.window + 1)
        seen = np.arange(first, place + 1)
        pages = table[seen // PAGE_TOKENS]
        assert (pages >= 0).all(), "a row sees a place without a page"
        with np.errstate(over="ignore"):
            found = pool[pages, seen % PAGE_TOKENS] + seen.astype(np.uint64)
            return mix(mix(found).sum() + np.uint64(self.index))


def entered(step: Step):
    """The values that enter the first stage."""
    few = np.arange(step.rows) < step.few
    return mix(mix(step.ids) + mix(step.positions) * np.uint64(3) + few.astype(np.uint64))


def left(step: Step, values) -> Result:
    """The result of the values that leave the last stage."""
    kept = values[step.keep]
    if not len(step.choices):
        spread = mix(kept[:, None] + np.arange(VOCABULARY, dtype=np.uint64))
        return Result(step.number, (spread >> np.uint64(40)).astype(np.float32))
    sampled = step.choices["temperature"] > 0
    chance = mix(step.choices["seed"] + mix(step.choices["index"])) * sampled.astype(np.uint64)
    history = np.zeros(len(kept), np.uint64)
    start = 0
    for row, end in enumerate(step.history_ends.tolist()):
        history[row] = mix(step.history[start:end]).sum()
        start = end
    return Result(step.number, (mix(kept + chance + history) % np.uint64(VOCABULARY)).astype(np.int32))


class Alone:
    """One sequence alone, in as many pages as it wants: what every engine has to agree with."""

    def __init__(self, groups, stages=1):
        self.groups = [PageGroup(group.window, 256) for group in groups]
        self.stages = [SimulatedStage(self.groups, index) for index in range(stages)]
        self.places = 0

    def run(self, ids, few, keep=(), choices=None, history=(), positions=None) -> Result:
        places = np.arange(self.places, self.places + len(ids), dtype=np.int32)
        self.places += len(ids)
        step = Step(
            0,
            np.array(ids, np.int32),
            places if positions is None else np.array(positions, np.int32),
            places,
            np.zeros(len(ids), np.int32),
            len(ids) if few else 0,
            np.tile(np.arange(256, dtype=np.int32), (len(self.groups), 1, 1)),
            np.array(keep, np.int32),
            np.zeros(0, CHOICE) if choices is None else choices,
            np.array(history, np.int32),
            np.array([len(history)] if len(history) else [], np.int32),
        )
        values = entered(step)
        for stage in self.stages:
            values = stage.run(step, values)
        return left(step, values)


def alone(prompt, settings: Settings, groups, stages=1, sequence=0) -> list[int]:
    """The tokens that a request gives when nothing else runs."""
    return list(_alone(tuple(prompt), settings, tuple(group.window for group in groups), stages, sequence))


@cache
def _alone(prompt, settings, windows, stages, sequence):
    groups = [PageGroup(window, 256) for window in windows]
    model, choice, tokens = Alone(groups, stages), settings.choice(sequence).reshape(1), []
    ids, few = list(prompt), len(prompt) <= 16
    while len(tokens) < settings.max_new_tokens:
        choice["index"] = len(tokens)
        history = [*prompt, *tokens] if settings.repetition_penalty != 1 else ()
        token = int(model.run(ids, few, [len(ids) - 1], choice, history).values[0])
        tokens.append(token)
        ids, few = [token], True
        if token in settings.eos:
            break
    return tuple(tokens)


@dataclass
class SimulatedStages:
    """Stages that run when somebody waits for a result, in an order by chance; any of them may die at any time."""

    groups: list
    count: int = 1
    losses: dict[int, int] = field(default_factory=dict)  # after so many pieces of work, which stage dies
    seed: int = 0
    gone: set[int] = field(default_factory=set)

    def __post_init__(self):
        self.stages = [SimulatedStage(self.groups, index) for index in range(self.count)]
        self.chance = random.Random(self.seed)
        self.queues = [deque() for _ in range(self.count + 1)]
        self.sent: list[Step] = []
        self.work = 0

    def send(self, step: Step) -> None:
        self.sent.append(step)
        self.queues[0].append((step, entered(step)))

    def receive(self, timeout: float) -> Result:
        while True:
            if (lost := self.lost()) is not None:
                raise lost
            if self.queues[-1] and self.chance.random() < 0.5:
                return self.queues[-1].popleft()
            busy = [index for index in range(self.count) if self.queues[index]]
            if not busy:
                return self.queues[-1].popleft()
            if self.work in self.losses:
                index = self.losses.pop(self.work)
                self.gone.add(index)
                self.stages[index].lose()
                continue
            self._work(self.chance.choice(busy))

    def _work(self, index):
        step, values = self.queues[index].popleft()
        values = self.stages[index].run(step, values)
        self.work += 1
        if index + 1 == (step.stages or self.count):
            self.queues[-1].append(left(step, values))
        else:
            self.queues[index + 1].append((step, values))

    def restore(self) -> list[int]:
        for queue in self.queues:
            queue.clear()
        lost, self.gone = sorted(self.gone), set()
        return lost

    def lost(self):
        return StageLost(min(self.gone), f"stage {min(self.gone)} is lost") if self.gone else None

    def quiet(self):
        return None

    def stats(self):
        return [StageStats(0.0, self.work, 0) for _ in self.stages]


def check_pages(scheduler: Scheduler) -> None:
    """Each page is held as often as tables and copies name it, and there are as many as were promised."""
    tables = scheduler.tables
    for pool in tables.pools:
        held = Counter()
        for sequence in [*scheduler.live, *scheduler.feeds.live]:
            table = sequence.table
            row = tables.array[pool.index, table.row]
            assert (row[: table.begins[pool.index]] == -1).all() and (row[table.runs :] == -1).all()
            held.update(row[table.begins[pool.index] : table.runs].tolist())
            assert table.promise is None or table.promise.owed[pool.index] >= 0
        for flight in scheduler.flights:
            held.update(source for group, source, _ in flight.copies if group == pool.index)
        assert held == Counter({page: count for page, count in enumerate(pool.holders) if count})
        assert pool.available == pool.group.pages - len(held)
        assert tables.room(pool) >= 0


def nothing_left(scheduler: Scheduler) -> bool:
    """No page is held or promised, no sequence and no step is there."""
    tables = scheduler.tables
    return (
        all(pool.available == pool.group.pages == tables.room(pool) for pool in tables.pools)
        and (tables.array == -1).all()
        and not (scheduler.live or scheduler.flights or scheduler.ready or scheduler.prompts or scheduler.waiting)
        and (scheduler.admitted, scheduler.decoding, scheduler._unsent) == (0, 0, 0)
    )
