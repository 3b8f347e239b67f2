"""Continuous batching over simulated stages: who runs when and in which pages, and that nobody notices the others."""

import heapq
import random

import numpy as np
import pytest
from bigint8_kernels import FEW_ROWS as KERNELS_FEW_ROWS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated import SimulatedStages, alone, check_pages, nothing_left, short_prompts  # noqa: F401  (a fixture for all tests here)

from bigint8.errors import BigInt8Error, PlanError
from bigint8.model.step import Result
from bigint8.options import SHORT_PROMPT, Workload
from bigint8.run.pages import PageGroup
from bigint8.run.requests import Completion
from bigint8.run.scheduler import Scheduler
from bigint8.run.settings import Settings
from bigint8.run.tables import Tables

FULL, WINDOW = PageGroup(None, 64), PageGroup(20, 64)


WORK = Workload(context=256, sequences=8, chunk=32)


def scheduler_of(groups=(FULL,), stages=1, work=WORK):
    return Scheduler(Tables(groups, work.context), stages, work)


def ask(scheduler, prompt, asked):
    completions = [Completion(asked) for _ in range(asked.sequences)]
    return scheduler.add(prompt, completions)


def run(scheduler, simulated, events=()):
    """Run until nothing is left. `events`: (after so many results, what to do then)."""
    events, results = sorted(events, key=lambda each: each[0]), 0
    while True:
        while events and events[0][0] <= results:
            events.pop(0)[1]()
        while (step := scheduler.next()) is not None:
            simulated.send(step)
        check_pages(scheduler)
        if scheduler.flights:
            scheduler.settle(simulated.receive(1.0))
            results += 1
        elif events:
            results = events[0][0]
        else:
            return


def test_a_prompt_is_short_at_least_where_the_kernels_have_few_rows():
    assert SHORT_PROMPT >= KERNELS_FEW_ROWS


# --- tokens --------------------------------------------------------------------------------------------------------

prompts = st.builds(
    lambda kind, tokens: [(kind + 3 * i * (kind > 3)) % 97 for i in range(tokens)],
    st.integers(0, 6),
    st.sampled_from([1, 3, 15, 16, 17, 31, 32, 33, 48, 49, 70, 100]),
)
asked = st.builds(
    Settings,
    max_new_tokens=st.integers(1, 40),
    eos=st.sampled_from([frozenset(), frozenset(range(12))]),
    temperature=st.sampled_from([0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    seed=st.integers(0, 2**64 - 1),
    sequences=st.sampled_from([1, 1, 1, 2, 4]),
)
group_kinds = st.sampled_from([(None,), (5,), (20,), (None, 20), (33, None, 1)])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    requests=st.lists(st.tuples(prompts, asked, st.integers(0, 60)), min_size=1, max_size=12),
    windows=group_kinds,
    stages=st.integers(1, 3),
    chunk=st.sampled_from([5, 16, 32, 64]),
    slack=st.integers(0, 40),
    cancelled=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 3), st.integers(0, 80)), max_size=4),
    seed=st.integers(0, 99),
)
def test_every_request_gets_the_tokens_it_gets_alone(requests, windows, stages, chunk, slack, cancelled, seed):
    """Whatever arrives when, however full the pool is, whoever leaves early."""
    work = Workload(256, 6, chunk)
    groups = [PageGroup(window, 36 + slack) for window in windows]
    scheduler = scheduler_of(groups, stages, work)
    made, refused = {}, []

    def arrive(number):
        prompt, settings_, _ = requests[number]
        try:
            made[number] = ask(scheduler, prompt, settings_)
        except PlanError:
            refused.append(number)

    def leave(number, sequence):
        if number in made and sequence < len(made[number].completions):
            made[number].completions[sequence].end("cancelled")
            scheduler.cancel(made[number])

    events = [(when, lambda n=number: arrive(n)) for number, (_, _, when) in enumerate(requests)]
    events += [(when, lambda n=number, s=sequence: leave(n, s)) for number, sequence, when in cancelled]
    run(scheduler, SimulatedStages(groups, stages, seed=seed), events)
    for number, request in made.items():
        prompt, settings_, _ = requests[number]
        for index, completion in enumerate(request.completions):
            expected = alone(prompt, settings_, groups, stages, index)
            assert completion.done
            if completion.result().reason == "cancelled":
                assert completion.tokens == expected[: len(completion.tokens)]
            else:
                assert completion.tokens == expected
    assert nothing_left(scheduler)
    for number in refused:  # only what is too large for all pages
        prompt, settings_, _ = requests[number]
        assert len(prompt) + settings_.max_new_tokens > 16 * (36 + slack) // settings_.sequences - 16


@pytest.mark.parametrize("stages", [1, 2])
def test_thousands_of_requests_leave_no_page_behind(stages):
    chance = random.Random(stages)
    groups = [PageGroup(None, 40), PageGroup(24, 40)]
    scheduler = scheduler_of(groups, stages)
    for number in range(2000):
        prompt = [number % 5] * chance.choice([2, 18, 40, 60])
        ask(scheduler, prompt, Settings(chance.randint(1, 3), seed=number, temperature=1.0))
    steps = answer_all(scheduler)
    assert nothing_left(scheduler) and steps < 2000


def answer_all(scheduler, token=1):
    """Answer each step with the same token until nothing is left; how many steps there were."""
    steps, under_way = 0, []
    while True:
        while (step := scheduler.next()) is not None:
            under_way.append(step)
        if not under_way:
            return steps
        step = under_way.pop(0)
        scheduler.settle(Result(step.number, np.full(len(step.keep), token, np.int32)))
        steps += 1


# --- rows of a step ------------------------------------------------------------------------------------------------


def test_generated_tokens_and_short_prompts_come_first_and_are_few():
    scheduler = scheduler_of()
    ask(scheduler, [1] * 20, Settings(4))
    step = scheduler.next()
    assert (step.rows, step.few) == (20, 0)
    scheduler.settle(Result(step.number, np.array([5], np.int32)))
    ask(scheduler, [2] * 20, Settings(4))
    ask(scheduler, [3] * 3, Settings(4))
    step = scheduler.next()
    assert step.few == 4 and step.ids.tolist() == [5, 3, 3, 3] + [2] * 20
    assert step.keep.tolist() == [0, 3, 23] and step.sequences.tolist() == [0, 1, 1, 1] + [2] * 20
    assert step.places.tolist() == [20, 0, 1, 2, *range(20)]


def test_choices_say_how_and_how_many_tokens_were_chosen_before():
    scheduler = scheduler_of()
    asked = Settings(3, (), (), 0.5, 7, 0.75, 0.25, repetition_penalty=1.5, seed=2**64 - 1, logprobs=3)
    ask(scheduler, [4, 5], asked)
    ask(scheduler, [6], Settings(3))
    for index in range(3):
        step = scheduler.next()
        assert step.choices[0].tolist() == (0.5, 7, 0.75, 0.25, 1.5, 4, 2**64 - 1, index)
        assert step.choices[1].tolist() == (0, 0, 1, 0, 1, 0, 0, index)
        assert step.history.tolist() == [4, 5] + [9] * index and step.history_ends.tolist() == [2 + index] * 2
        scheduler.settle(Result(step.number, np.array([[9] + [0] * 7] * 2, np.int32)))
    assert scheduler.next() is None


def test_continuations_of_one_prompt_compute_it_once_and_share_its_pages():
    scheduler = scheduler_of()
    ask(scheduler, [1] * 24, Settings(30, sequences=4, temperature=1.0))
    step = scheduler.next()
    assert step.rows == 24 and step.keep.tolist() == [23] * 4 and len(set(step.choices["seed"].tolist())) == 4
    scheduler.settle(Result(step.number, np.arange(4, dtype=np.int32)))
    step = scheduler.next()
    assert len(set(step.tables[0, :, 0].tolist())) == 1, "the whole page is shared"
    assert len(set(step.tables[0, :, 1].tolist())) == 4, "each has its own copy of the other"
    assert len(step.copies) == 3


def test_a_lost_copy_is_made_again_from_a_page_that_only_the_copy_holds():
    scheduler, simulated = scheduler_of(stages=2), SimulatedStages([FULL], 2)
    asked = Settings(6, temperature=1.0, sequences=2)
    request = ask(scheduler, [1] * 20, asked)
    simulated.send(scheduler.next())
    scheduler.settle(simulated.receive(1.0))
    step = scheduler.next()
    assert len(step.copies) == 1
    request.completions[1].end("cancelled")
    scheduler.cancel(request)
    check_pages(scheduler)
    simulated.stages[1].lose()
    for step in [*scheduler.refill(2).steps, *scheduler.send_again()]:
        simulated.send(step)
        result = simulated.receive(1.0)
    scheduler.settle(result)
    run(scheduler, simulated)
    assert request.completions[0].tokens == alone([1] * 20, asked, [FULL], 2)
    assert nothing_left(scheduler)


# --- who runs when -------------------------------------------------------------------------------------------------


def test_a_full_pool_makes_requests_wait_in_their_order():
    scheduler = scheduler_of([PageGroup(None, 8)])
    large = [ask(scheduler, [n] * 60, Settings(10)) for n in range(3)]  # 5 pages each
    small = ask(scheduler, [9] * 3, Settings(2))
    ended = []
    for name, request in [("a", large[0]), ("b", large[1]), ("c", large[2]), ("small", small)]:
        request.completions[0]._at_end.append(lambda name=name: ended.append(name))
    step = scheduler.next()
    assert set(step.ids.tolist()) == {0}, "the small one has room, but would overtake"
    scheduler.settle(Result(step.number, np.zeros(len(step.keep), np.int32)))
    answer_all(scheduler)
    assert ended == ["a", "b", "small", "c"] or ended == ["a", "b", "c", "small"]


def test_a_request_that_could_never_fit_is_refused_with_the_numbers_and_the_way_out():
    scheduler = scheduler_of([PageGroup(None, 8)])
    with pytest.raises(PlanError, match=r"200 tokens and 100 new ones are 300.*context of 256; shorten"):
        ask(scheduler, [1] * 200, Settings(100))
    with pytest.raises(PlanError, match=r"takes up to 10 pages.*there are 8; ask for fewer"):
        ask(scheduler, [1] * 100, Settings(60))
    with pytest.raises(PlanError, match=r"9 continuations.*8 sequences"):
        ask(scheduler, [1], Settings(1, sequences=9))
    with pytest.raises(BigInt8Error, match="no tokens"):
        ask(scheduler, [], Settings(1))
    assert nothing_left(scheduler)


def test_a_window_needs_no_more_pages_than_it_sees():
    """A context of 40 pages runs in 8 where the window is 32 tokens and a chunk 32."""
    groups = [PageGroup(32, 8)]
    work = Workload(640, 1, 32)
    scheduler = scheduler_of(groups, 2, work)
    ask(scheduler, list(range(90)) * 6, Settings(90))
    request = scheduler.waiting[0]
    run(scheduler, SimulatedStages(groups, 2))
    assert request.completions[0].tokens == alone(list(range(90)) * 6, Settings(90), groups, 2)


def test_the_whole_pages_of_a_prompt_are_computed_once():
    scheduler = scheduler_of()
    prompt = list(range(50))
    ask(scheduler, prompt, Settings(2))
    answer_all(scheduler)
    ask(scheduler, prompt, Settings(2))
    assert scheduler.next().places.tolist() == [48, 49]
    scheduler = scheduler_of()
    ask(scheduler, prompt[:48], Settings(2))
    answer_all(scheduler)
    ask(scheduler, prompt[:48], Settings(2))
    assert scheduler.next().places.tolist() == list(range(32, 48)), "the last token is always computed"


def test_short_prompts_neither_give_nor_take_pages():
    """Their rows are computed in another arithmetic."""
    scheduler = scheduler_of()
    ask(scheduler, [1] * 16, Settings(2))
    answer_all(scheduler)
    ask(scheduler, [1] * 17, Settings(2))
    assert scheduler.next().rows == 17


def test_a_burst_does_not_land_in_one_slot():
    scheduler = scheduler_of([PageGroup(None, 512)], stages=2, work=Workload(256, 16, 512))
    for number in range(16):
        ask(scheduler, [number] * 40, Settings(50))
    first, second, third = scheduler.next(), scheduler.next(), scheduler.next()
    assert (first.rows, second.rows, third.rows) == (80, 80, 64)  # an eighth of what waits: soon both stages are busy
    assert scheduler.next() is None
    scheduler.settle(Result(first.number, np.zeros(2, np.int32)))
    step = scheduler.next()
    assert 1 <= step.few <= 2 and step.rows - step.few <= 80, (step.few, step.rows)


@pytest.mark.parametrize(("chunk", "under_way"), [(32, 2), (64, 3)])
def test_short_chunks_of_a_lone_prompt_leave_the_last_slot_to_whoever_comes(chunk, under_way):
    scheduler = scheduler_of([PageGroup(None, 512)], stages=2, work=Workload(512, 4, chunk))
    ask(scheduler, [1] * 400, Settings(2))
    steps = list(iter(scheduler.next, None))
    assert [step.rows for step in steps] == [chunk] * under_way
    ask(scheduler, [2] * 5, Settings(2))
    if under_way == 2:
        assert scheduler.next().rows == 5
        assert scheduler.next() is None
    else:
        assert scheduler.next() is None


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_sixteen_requests_keep_all_stages_busy(stages):
    busy, _ = simulate(stages, [(0.0, 40, 100)] * 16)
    assert min(busy) >= 0.9


def test_scattered_batches_join_again():
    """Sequences that decode alone in a slot of their own would halve the work of each step for good."""
    _, steps = simulate(2, [(n * 3.3, 40, 200) for n in range(16)])
    assert steps[-len(steps) // 2 : -len(steps) // 4] == [8] * len(steps[-len(steps) // 2 : -len(steps) // 4])


def test_a_long_prompt_does_not_hold_up_those_that_decode():
    _, steps = simulate(2, [(0.0, 20, 60), (5.0, 240, 5), (5.0, 240, 5), (5.0, 240, 5)], chunk=32)
    assert max(steps) <= 32 + 4


def simulate(stages, arrivals, chunk=512, hop=0.02):
    """A pipeline in simulated time, where a row takes 0.01 and a step 1 besides: busy shares, rows of each step."""
    scheduler = scheduler_of([PageGroup(None, 4096)], stages, Workload(512, 16, chunk))
    free, busy, rows, under_way = [0.0] * stages, [0.0] * stages, [], {}
    events = [(when, number, None) for number, (when, _, _) in enumerate(arrivals)]
    now = 0.0
    while events:
        now, number, step = heapq.heappop(events)
        if step is None:
            _, prompt, wanted = arrivals[number]
            ask(scheduler, [(number + i) % 91 for i in range(prompt)], Settings(wanted))
        else:
            step = under_way.pop(number)
            scheduler.settle(Result(step.number, np.zeros(len(step.keep), np.int32)))
        while (step := scheduler.next()) is not None:
            at, takes = now + hop, 1 + 0.01 * step.rows
            for stage in range(stages):
                free[stage] = at = max(at, free[stage]) + takes
                busy[stage] += takes
                at += hop
            rows.append(step.rows)
            under_way[1000 + step.number] = step
            heapq.heappush(events, (at, 1000 + step.number, True))
    return [share / now for share in busy], rows


# --- a short prompt beside a long one ------------------------------------------------------------------------------


def test_a_short_prompt_does_not_wait_for_the_whole_of_a_long_one_and_a_long_one_goes_on_beside_many():
    """The long one is in every second step at least, however many short ones come."""
    scheduler = scheduler_of([PageGroup(None, 512)], stages=2, work=Workload(512, 16, 32))
    long = ask(scheduler, [1] * 400, Settings(4))
    for _ in range(3):
        scheduler.next()
    shorts = []
    for number in range(6):
        scheduler.settle(Result(scheduler.flights[0].step.number, np.zeros(len(scheduler.flights[0].takers), np.int32)))
        shorts.append(ask(scheduler, [2 + number] * 20, Settings(1)))
        before = long.sequences[0].sent
        scheduler.next()
        if number == 0:
            assert shorts[0].sequences[0].sent == 20 and long.sequences[0].sent == before, "at once, and alone"
    assert long.sequences[0].sent >= 3 * 32 + 2 * 32
    assert sum(short.sequences[0].sent == 20 for short in shorts if short.sequences) >= 2
