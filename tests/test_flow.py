"""Steps through stages over links: the order of what comes back, the ring, stages that fail or are lost, epochs.

The stages compute something simple that can be foretold; everything between them is what workers run.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from test_links import WAIT, ints, make_step
from torch import Tensor

from bigint8 import WorkerError
from bigint8.model.step import CHOICE, Step
from bigint8.run.answers import Answers
from bigint8.run.cores import Share, cores_of
from bigint8.run.doors import LOOPBACK, new_secret
from bigint8.run.flow import Flow, Place
from bigint8.run.links import MOST_UNDER_WAY
from bigint8.run.spans import Span, draw
from bigint8.run.stages import StageLost
from bigint8.run.trace import DRIVER, Trace

WIDTH = 6


@dataclass
class Arithmetic:
    """A stage that triples each row and adds its number. `ran`: what it was asked; `gate`: what it waits for."""

    place: Place
    dtype: torch.dtype = torch.float32
    ran: list[tuple[str, int]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def run(self, step: Step, hidden: Tensor | None) -> Tensor:
        assert self.gate.wait(WAIT)
        self.ran.append(("run", step.number))
        if (step.ids < 0).any():
            raise ValueError("a negative token")
        if hidden is None:
            hidden = torch.from_numpy(step.ids)[:, None].expand(-1, WIDTH).to(self.dtype)
        assert hidden.shape == (step.rows, WIDTH) and hidden.dtype == self.dtype
        hidden = hidden * 3 + self.place.index
        return hidden[torch.from_numpy(step.keep).long()] if self.place.is_last else hidden

    def answer(self, step: Step, hidden: Tensor) -> np.ndarray:
        self.ran.append(("answer", step.number))
        logits = hidden.float().numpy()
        return logits[:, 0].astype(np.int32) if len(step.choices) else logits


class Chain:
    """Stages with their flows, in this process, and the driver's links to them."""

    def __init__(
        self,
        count: int,
        ring: bool = False,
        dtype: torch.dtype = torch.float32,
        kind: type[Arithmetic] = Arithmetic,
        device: str = "cpu",
    ) -> None:
        self.secret, self.epoch = new_secret(), 0
        self.places = [Place(i, count, ring and count > 1) for i in range(count)]
        self.stages = [kind(place, dtype) for place in self.places]
        self.flows = [Flow(stage, stage.place, device) for stage in self.stages]
        self.connect()

    def connect(self) -> None:
        self.epoch += 1
        self.addresses = [flow.listen(LOOPBACK, self.secret) for flow in self.flows]
        threads = [
            threading.Thread(target=flow.connect, args=(self.epoch, self.addresses[place.next], WAIT))
            for flow, place in zip(self.flows, self.places, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.answers = Answers(self.addresses, self.epoch, self.secret)

    def lose(self, index: int) -> None:
        """A stage goes as a process does that dies: all its connections at once."""
        self.stages[index].gate.set()
        self.flows[index].close()

    def replace(self, index: int) -> None:
        self.stages[index] = Arithmetic(self.places[index])
        self.flows[index] = Flow(self.stages[index], self.places[index], "cpu")

    def close(self) -> None:
        for stage in self.stages:
            stage.gate.set()
        self.answers.close()
        for flow in self.flows:
            flow.close()


@contextlib.contextmanager
def chain(count: int, ring: bool = False, **options: object) -> Iterator[Chain]:
    made = Chain(count, ring, **options)
    try:
        yield made
    finally:
        made.close()


def foretold(ids: np.ndarray, stages: int) -> np.ndarray:
    for index in range(stages):
        ids = ids * 3 + index
    return ids


def choosing(step: Step) -> Step:
    return replace(step, choices=np.zeros(len(step.keep), CHOICE))


def until(condition) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_step_gives_its_tokens_in_the_order_of_sending(count, ring):
    with chain(count, ring) as there:
        for number in range(20):
            there.answers.send(choosing(make_step(number, rows=5, keep=(0, 4))))
        for number in range(20):
            result = there.answers.receive(WAIT)
            assert result.number == number and result.values.dtype == np.int32
            assert result.values.tolist() == foretold(np.array([0, 4]), count).tolist()
        head = 0 if ring else count - 1
        assert [("answer" in dict(stage.ran)) for stage in there.stages] == [i == head for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ring", [False, True])
def test_logits_come_back_where_no_token_is_chosen(ring, dtype):
    with chain(2, ring, dtype=dtype) as there:
        there.answers.send(make_step(keep=(1, 2)))
        values = there.answers.receive(WAIT).values
    assert values.dtype == np.float32 and values.shape == (2, WIDTH)
    assert values[:, 0].tolist() == foretold(np.array([1, 2]), 2).tolist()


@pytest.mark.parametrize("ring", [False, True])
def test_a_step_that_keeps_no_row_or_ends_early_gives_an_empty_result_in_its_turn(ring):
    with chain(3, ring) as there:
        there.stages[2].gate.clear()  # the steps that end earlier are through long before the first
        steps = [choosing(make_step(0)), make_step(1, stages=1), make_step(2, stages=2), make_step(3, keep=())]
        for step in [*steps, choosing(make_step(4, stages=3))]:
            there.answers.send(step)
        until(lambda: ("run", 4) in there.stages[1].ran)
        there.stages[2].gate.set()
        results = [there.answers.receive(WAIT) for _ in range(5)]
        assert [result.number for result in results] == [0, 1, 2, 3, 4]
        assert [len(result.values) for result in results] == [1, 0, 0, 0, 1]
        ran = [[number for what, number in stage.ran if what == "run"] for stage in there.stages]
        assert ran == [[0, 1, 2, 3, 4], [0, 2, 3, 4], [0, 3, 4]]


def test_rows_for_the_head_go_before_steps_that_wait():
    """The first stage is at step 1 when the rows of step 0 come round; steps 2 and 3 have been there for longer."""
    with chain(2, ring=True) as there:
        there.stages[1].gate.clear()
        there.answers.send(choosing(make_step(0)))
        until(lambda: ("run", 0) in there.stages[0].ran)
        there.stages[0].gate.clear()
        for number in (1, 2, 3):
            there.answers.send(choosing(make_step(number)))
        inbox = there.flows[0]._inbox
        until(lambda: len(inbox._steps) == 2)
        there.stages[1].gate.set()
        until(lambda: len(inbox._rows) == 1)
        there.stages[0].gate.set()
        assert [there.answers.receive(WAIT).number for _ in range(4)] == [0, 1, 2, 3]
        assert there.stages[0].ran[:3] == [("run", 0), ("run", 1), ("answer", 0)]


def test_a_full_ring_does_not_stand_still():
    """As many steps as may be under way, each with more hidden states than the kernel keeps for a connection."""
    with chain(3, ring=True) as there:
        for number in range(MOST_UNDER_WAY):
            there.answers.send(choosing(make_step(number, rows=30_000, keep=(1,))))
        with pytest.raises(WorkerError, match=f"{MOST_UNDER_WAY} steps are under way"):
            there.answers.send(make_step(99))
        assert [there.answers.receive(WAIT).number for _ in range(MOST_UNDER_WAY)] == [*range(MOST_UNDER_WAY)]


def test_a_step_that_a_stage_cannot_run_is_an_error_in_its_turn_and_the_next_ones_go_on():
    with chain(3) as there:
        bad = replace(make_step(1), ids=-ints(3))
        for step in (make_step(0), bad, make_step(2)):
            there.answers.send(step)
        assert there.answers.receive(WAIT).number == 0
        with pytest.raises(WorkerError, match="stage 0 could not run step 1: ValueError: a negative token"):
            there.answers.receive(WAIT)
        assert there.answers.receive(WAIT).number == 2


def test_a_step_that_is_none_is_refused_when_it_is_sent():
    with chain(2) as there:
        with pytest.raises(WorkerError, match="end after stage 3 of 2"):
            there.answers.send(make_step(0, stages=3))
        with pytest.raises(WorkerError, match="positions is int32"):
            there.answers.send(replace(make_step(1), positions=ints(2)))
        there.answers.send(make_step(2))
        assert there.answers.receive(WAIT).number == 2


def test_no_result_in_time_is_an_error_and_the_step_is_still_under_way():
    with chain(2) as there:
        with pytest.raises(WorkerError, match=r"no step is under way after 0\.01 s"):
            there.answers.receive(0.01)
        there.stages[1].gate.clear()
        there.answers.send(make_step(5))
        with pytest.raises(WorkerError, match=r"step 5 has no result after 0\.05 s"):
            there.answers.receive(0.05)
        there.stages[1].gate.set()
        assert there.answers.receive(WAIT).number == 5


def test_who_waits_for_a_result_is_told_when_the_links_are_closed():
    with chain(2) as there, ThreadPoolExecutor(1) as pool:
        there.stages[1].gate.clear()
        there.answers.send(make_step(0))
        waits = pool.submit(there.answers.receive, 600)
        time.sleep(0.05)
        there.answers.close()
        with pytest.raises(WorkerError, match="were closed"):
            waits.result(WAIT)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_stage_that_is_lost_is_told_at_once_with_its_number(victim, ring):
    """Far sooner than `receive` would give up; what had come back before is still handed out."""
    with chain(3, ring) as there:
        there.answers.send(make_step(0))
        until(lambda: 0 in there.answers._came)
        there.stages[(victim + 1) % 3].gate.clear()
        there.answers.send(make_step(1))
        there.lose(victim)
        assert there.answers.receive(600).number == 0
        with pytest.raises(StageLost, match=f"stage {victim} is lost") as lost:
            there.answers.receive(600)
        assert lost.value.index == victim
        there.answers.send(make_step(2))  # whoever sends need not know yet
        with pytest.raises(StageLost):
            there.answers.receive(600)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_after_a_loss_all_goes_on_under_the_next_epoch_without_what_was_under_way(victim, ring):
    with chain(3, ring) as there:
        waits = there.stages[(victim + 1) % 3]
        waits.gate.clear()
        for number in range(6):
            there.answers.send(choosing(make_step(number)))
        there.lose(victim)
        with pytest.raises(StageLost):
            while True:
                there.answers.receive(600)
        there.answers.close()
        there.replace(victim)
        there.connect()
        waits.gate.set()
        for number in (100, 101):
            there.answers.send(choosing(make_step(number)))
        assert [there.answers.receive(WAIT).number for _ in range(2)] == [100, 101]
        assert {number for _, number in there.stages[victim].ran} == {100, 101}


def test_a_driver_that_goes_away_leaves_stages_that_a_new_one_may_use():
    with chain(2) as there:
        there.stages[1].gate.clear()
        there.answers.send(make_step(0))
        there.answers.close()
        there.stages[1].gate.set()
        there.connect()
        there.answers.send(make_step(1))
        assert there.answers.receive(WAIT).number == 1


def test_a_stage_whose_neighbour_does_not_come_says_so():
    place = Place(1, 2, ring=False)
    flow = Flow(Arithmetic(place), place, "cpu")
    flow.listen(LOOPBACK, new_secret())
    with pytest.raises(WorkerError, match="stage 1: the stage before it has not connected"):
        flow.connect(1, None, seconds=0.05)
    flow.close()


def test_stages_count_what_they_do_and_keep_spans_while_they_are_traced():
    with chain(2, ring=True) as there:
        for number in range(4):
            there.answers.send(make_step(number, rows=7))
            there.answers.receive(WAIT)
        stats = [flow.tally.stats() for flow in there.flows]
        assert [(each.steps, each.rows) for each in stats] == [(4, 28), (4, 28)]
        assert all(0 < each.busy_seconds <= each.seconds for each in stats)
        assert all(0 < each.memory_bytes <= each.peak_bytes for each in stats)
        assert [flow.spans.take() for flow in there.flows] == [[], []]
        for flow in there.flows:
            flow.spans.on = True
        there.answers.send(make_step(9))
        there.answers.receive(WAIT)

        def spans(index: int) -> list[Span]:
            return [span for span in there.flows[index].spans._kept if span.number == 9]

        until(lambda: (len(spans(0)), len(spans(1))) == (7, 4))  # a message may arrive before the span of its sending
        assert [span.name for span in spans(0)] == ["hop", "wait", "compute", "send", "ring", "wait", "head"]
        assert [span.name for span in spans(1)] == ["hop", "wait", "compute", "send"]
        assert all(span.start_ns <= span.end_ns for span in [*spans(0), *spans(1)])


def test_a_record_shows_each_hop_as_an_arrow_from_where_it_was_sent_to_where_it_was_computed(tmp_path):
    trace = Trace()
    with chain(3, ring=True) as there:
        for flow in there.flows:
            flow.spans.on = True
        for number in range(4):
            start = time.time_ns()
            there.answers.send(make_step(number))
            trace.span(DRIVER, f"send {number}", start, time.time_ns())
        for _ in range(4):
            there.answers.receive(WAIT)
        until(lambda: [len(flow.spans._kept) for flow in there.flows] == [28, 16, 16])
        draw(trace, [flow.spans.take() for flow in there.flows])
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    arrows = [event for event in events if event["ph"] in "sf"]
    found = [
        (names[end["tid"]], span["name"])
        for end in arrows
        for span in events
        if span["ph"] == "X" and span["tid"] == end["tid"] and span["ts"] <= end["ts"] <= span["ts"] + span["dur"]
    ]
    assert len(arrows) == 2 * 4 * 4  # from the driver, to the second, to the third, and back to the first
    expected = [(DRIVER, "send"), *[(f"stage {i}", what) for i in range(3) for what in ("compute", "send")]]
    for number in range(4):
        for row, what in [*expected, ("stage 0", "head")]:
            assert (row, f"{what} {number}") in found


@pytest.mark.parametrize(
    ("cores", "count", "shares"),
    [(8, 2, [4, 4]), (8, 3, [2, 3, 3]), (2, 2, [1, 1]), (2, 3, [2, 2, 2]), (1, 1, [1]), (5, 1, [5])],
)
def test_workers_of_a_box_have_cores_of_their_own_where_there_are_enough(cores, count, shares):
    given = [cores_of(Share(index, count), list(range(cores))) for index in range(count)]
    assert [len(each) for each in given] == shares
    if cores >= count:
        assert sorted(core for each in given for core in each) == list(range(cores))
