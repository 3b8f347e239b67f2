"""The engine over simulated stages: requests stream, stages die and come back, and nobody waits for ever."""

import asyncio
import json
import random
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated import Alone, SimulatedStages, alone, check_pages, nothing_left, short_prompts  # noqa: F401  (a fixture for all tests here)

from bigint8.errors import BigInt8Error, PlanError, WorkerError
from bigint8.model.step import Result
from bigint8.options import Workload
from bigint8.run.engine import MAX_RESTARTS, Engine
from bigint8.run.pages import PageGroup
from bigint8.run.settings import Settings
from bigint8.run.stages import Health, LocalStages, StageLost
from bigint8.run.trace import Trace

FULL, WINDOW = PageGroup(None, 64), PageGroup(20, 64)


WORK = Workload(context=256, sequences=8, chunk=32)
WAIT = 60.0
"""Seconds after which a test takes it that nothing comes any more."""


def engine_of(groups=(FULL,), stages=1, work=WORK, trace=None, **simulated):
    return Engine(SimulatedStages(list(groups), stages, **simulated), groups, work, trace)


def idle(engine):
    """Wait until the engine has nothing left to do, as its last tokens may be out before their pages are back."""
    for _ in range(2000):
        with engine._lock:
            if not engine._scheduler.flights and not engine._scheduler.live:
                return engine._scheduler
        threading.Event().wait(0.005)
    raise AssertionError("the engine does not come to rest")


# --- requests ------------------------------------------------------------------------------------------------------


def test_tokens_stream_and_are_those_of_the_request_alone():
    with engine_of() as engine:
        completion = engine.submit([1, 2, 3], Settings(20))
        assert list(completion) == alone([1, 2, 3], Settings(20), [FULL])
        assert completion.result(WAIT).reason == "length"
        assert list(completion) == completion.result().tokens, "it may be read again"


def test_tokens_stream_to_several_coroutines_at_once():
    asked = [Settings(15, temperature=1.0, seed=seed) for seed in range(6)]

    async def read(engine, each):
        return [token async for token in engine.submit([4] * 20, each)]

    async def read_all(engine):
        return await asyncio.wait_for(asyncio.gather(*(read(engine, each) for each in asked)), WAIT)

    with engine_of(stages=2) as engine:
        assert asyncio.run(read_all(engine)) == [alone([4] * 20, each, [FULL], 2) for each in asked]


def test_an_end_token_ends_a_request():
    expected = alone([7], Settings(40), [FULL])
    end = expected[5]
    with engine_of() as engine:
        done = engine.submit([7], Settings(40, eos=frozenset([end]))).result(WAIT)
    assert done.reason == "stop" and done.tokens == expected[: expected.index(end) + 1] and done.stop is None


def test_the_same_seed_gives_the_same_tokens_whatever_else_runs():
    asked = Settings(12, temperature=1.0, seed=5)
    with engine_of(stages=2) as engine:
        first = engine.submit([3] * 20, asked).result(WAIT).tokens
        others = [engine.submit([n] * 30, Settings(9, temperature=1.0, seed=n)) for n in range(10)]
        again = engine.submit([3] * 20, asked).result(WAIT).tokens
        different = engine.submit([3] * 20, Settings(12, temperature=1.0, seed=6)).result(WAIT).tokens
        assert [other.result(WAIT).reason for other in others] == ["length"] * 10
    assert first == again != different


def test_several_continuations_of_a_prompt():
    asked = Settings(12, temperature=1.0, seed=5, sequences=4)
    with engine_of() as engine:
        first = engine.submit([3] * 20, asked)
        tokens = [each.result(WAIT).tokens for each in first.sequences]
    assert first.sequences[0] is first and len({tuple(each) for each in tokens}) == 4
    assert tokens == [alone([3] * 20, asked, [FULL], sequence=n) for n in range(4)]


def test_a_cancelled_request_ends_with_the_tokens_it_has():
    with engine_of() as engine:
        completion = engine.submit([1], Settings(200))
        tokens = []
        for token in completion:
            tokens.append(token)
            if len(tokens) == 3:
                completion.cancel()
        done = completion.result(WAIT)
        assert done.reason == "cancelled" and done.tokens[:3] == tokens[:3] and len(done.tokens) < 200
        completion.cancel()
        assert nothing_left(idle(engine))


def test_one_of_several_continuations_may_be_cancelled():
    with engine_of() as engine:
        first = engine.submit([1] * 20, Settings(60, temperature=1.0, sequences=3))
        first.cancel()
        for number, each in enumerate(first.sequences[1:], 1):
            assert each.result(WAIT).tokens == alone([1] * 20, first.settings, [FULL], sequence=number)
        assert nothing_left(idle(engine))


# --- stop strings --------------------------------------------------------------------------------------------------

BYTES = list(b"abcdefghijklmnopqrstuvwxyz .,") + list("ü€".encode())


def text_of(tokens):
    return bytes(BYTES[token % len(BYTES)] for token in tokens).decode(errors="replace")


def spoken(tokens):
    """A stage that says these tokens one after the other, whatever it is asked."""

    def run(step):
        return Result(step.number, np.array([tokens[index] for index in step.choices["index"]], np.int32))

    return LocalStages(run)


def said(text, stop, most=100):
    tokens = [BYTES.index(byte) for byte in text.encode()]
    with Engine(spoken(tokens), [FULL], WORK) as engine:
        done = engine.submit([1], Settings(min(most, len(tokens)), stop=stop), text_of).result(WAIT)
    return text_of(done.tokens), done.reason, done.stop


def test_a_stop_string_that_spans_tokens_ends_a_request():
    assert said("one two. three", (". th",)) == ("one two. th", "stop", ". th")
    assert said("aaab", ("aab", "zz")) == ("aaab", "stop", "aab")
    assert said("one two", ("three",)) == ("one two", "length", None)


def test_a_stop_string_may_have_characters_of_several_tokens():
    assert said("a € b", ("€",)) == ("a €", "stop", "€")
    assert said("für", ("ür",)) == ("für", "stop", "ür")


@settings(max_examples=40, deadline=None)
@given(
    st.text("ab €", min_size=1, max_size=30), st.lists(st.text("ab €", min_size=1, max_size=4), min_size=1, max_size=3)
)
def test_a_request_ends_where_the_first_stop_string_does(text, stops):
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    expected = text[: min(ends)] if ends else text
    assert said(text, tuple(stops))[:2] == (expected, "stop" if ends else "length")


def test_stop_strings_without_a_tokenizer_are_refused():
    with engine_of() as engine, pytest.raises(BigInt8Error, match="stop strings need a tokenizer"):
        engine.submit([1], Settings(5, stop=("x",)))


def test_a_tokenizer_that_fails_fails_its_request_alone():
    def broken(tokens):
        raise ValueError("no such token")

    with engine_of() as engine:
        with pytest.raises(WorkerError, match="no such token"):
            engine.submit([1], Settings(5, stop=("x",)), broken).result(WAIT)
        assert engine.submit([1], Settings(5)).result(WAIT).reason == "length"
        assert nothing_left(idle(engine))


# --- sequences that are fed from outside ----------------------------------------------------------------------------


class Fed:
    """A sequence of the engine and the same one alone, which must agree on every logit."""

    def __init__(self, engine, groups, stages=1, calls=()):
        self.engine, self.groups, self.stages = engine, groups, stages
        self.sequence = engine.open_sequence()
        self.calls = list(calls)  # all that was fed: ids, positions, few

    def expected(self, ids, positions, few):
        model = Alone(self.groups, self.stages)
        for call in [*self.calls, (ids, positions, few)]:
            found = model.run(call[0], call[2], range(len(call[0])), positions=call[1])
        self.calls.append((ids, positions, few))
        return found.values

    def fork(self):
        other = Fed.__new__(Fed)
        other.engine, other.groups, other.stages = self.engine, self.groups, self.stages
        other.sequence, other.calls = self.engine.fork(self.sequence), list(self.calls)
        return other

    def crop(self, tokens):
        self.engine.crop(self.sequence, tokens)
        kept = []
        for ids, positions, few in self.calls:
            part = min(len(ids), tokens)
            kept += [(ids[:part], positions[:part], few)] if part else []
            tokens -= part
        self.calls = kept

    @property
    def tokens(self):
        return sum(len(ids) for ids, _, _ in self.calls)


def feed(engine, parts, keep=None):
    """Feed (sequence, ids, positions, few), hold all kept logits against those of each sequence alone."""
    expected = np.concatenate([fed.expected(ids, positions, few) for fed, ids, positions, few in parts])
    keep = list(range(len(expected))) if keep is None else keep
    found = engine.forward([(fed.sequence, ids, positions, few) for fed, ids, positions, few in parts], keep)
    assert found.dtype == np.float32 and np.array_equal(found, expected[keep])


def test_logits_of_fed_sequences_are_those_of_each_alone():
    with engine_of([FULL, WINDOW], stages=2) as engine:
        one, two = Fed(engine, [FULL, WINDOW], 2), Fed(engine, [FULL, WINDOW], 2)
        feed(engine, [(one, list(range(50)), list(range(50)), False), (two, [5, 6], [9, 10], True)], keep=[51, 3, 49])
        feed(engine, [(two, [7], [11], True), (one, [8], [50], True)])
        assert engine.forward([(one.sequence, [1], [51], True)], []).size == 0


def test_beams_share_pages_until_they_go_their_own_ways():
    with engine_of() as engine:
        first = Fed(engine, [FULL])
        feed(engine, [(first, [1] * 20, list(range(20)), False)])
        beams = [first, first.fork(), first.fork(), first.fork()]
        with engine._lock:
            assert engine._scheduler.tables.pools[0].available == 62
        for place in range(20, 40):
            feed(engine, [(beam, [number], [place], True) for number, beam in enumerate(beams)])
            beams, old = [beams[0].fork(), beams[0].fork(), beams[1].fork(), beams[3].fork()], beams
            for beam in old:
                engine.drop(beam.sequence)
        for beam in beams:
            engine.drop(beam.sequence)
        assert nothing_left(idle(engine))


def test_a_sequence_goes_back_after_tokens_that_were_not_accepted():
    with engine_of([WINDOW]) as engine:
        fed = Fed(engine, [WINDOW])
        feed(engine, [(fed, [1] * 40, list(range(40)), False)])
        other = fed.fork()
        for _ in range(12):
            start = fed.tokens
            feed(engine, [(fed, [2] * 5, list(range(start, start + 5)), True)])
            fed.crop(start + 2)
        feed(engine, [(other, [3], [40], True)])
        with pytest.raises(PlanError, match=r"cannot go back to 10 tokens: its window of 20"):
            fed.crop(10)


def test_calls_that_make_no_sense_are_refused_and_change_nothing():
    with engine_of([PageGroup(None, 8)]) as engine:
        fed = Fed(engine, [PageGroup(None, 8)])
        feed(engine, [(fed, [1] * 100, list(range(100)), False)])
        sequence = fed.sequence
        with pytest.raises(PlanError, match=r"30 more tokens take 2 pages.*1 of 8"):
            engine.forward([(sequence, [1] * 30, range(30), False)], [])
        with pytest.raises(PlanError, match=r"300 tokens in one sequence.*context of 256"):
            engine.forward([(sequence, [1] * 200, range(200), False)], [])
        with pytest.raises(BigInt8Error, match="named twice"):
            engine.forward([(sequence, [1], [1], True), (sequence, [1], [1], True)], [])
        with pytest.raises(BigInt8Error, match="2 tokens with 1 positions"):
            engine.forward([(sequence, [1, 2], [1], True)], [])
        with pytest.raises(BigInt8Error, match="100 tokens cannot be cropped to 101"):
            engine.crop(sequence, 101)
        feed(engine, [(fed, [4], [100], True)])
        engine.drop(sequence)
        with pytest.raises(BigInt8Error, match="was dropped"):
            engine.forward([(sequence, [1], [1], True)], [])
        assert nothing_left(idle(engine))


def test_a_finalizer_may_drop_a_sequence_whoever_holds_the_lock():
    with engine_of([PageGroup(None, 8)]) as engine:
        fed = Fed(engine, [PageGroup(None, 8)])
        feed(engine, [(fed, [1] * 100, list(range(100)), False)])
        waiting = engine.submit([1] * 50, Settings(40))
        with engine._lock:
            engine.drop(fed.sequence)
        assert waiting.result(WAIT).reason == "length"
        assert nothing_left(idle(engine))


def test_fed_sequences_and_requests_run_side_by_side():
    groups = [FULL, WINDOW]
    with engine_of(groups, stages=3) as engine:
        requests = [(Settings(25, temperature=1.0, seed=n), [n] * 40) for n in range(12)]
        made = [engine.submit(prompt, asked) for asked, prompt in requests]
        fed = Fed(engine, groups, 3)
        for number in range(30):
            feed(engine, [(fed, [number], [number], True)])
        for completion, (asked, prompt) in zip(made, requests, strict=True):
            assert completion.result(WAIT).tokens == alone(prompt, asked, groups, 3)


# --- stages that die -----------------------------------------------------------------------------------------------

losses = st.dictionaries(st.integers(0, 400), st.integers(0, 2), max_size=MAX_RESTARTS)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    windows=st.sampled_from([(None,), (20,), (5, None)]),
    stages=st.integers(1, 3),
    losses=losses,
    pages=st.integers(18, 60),
    seed=st.integers(0, 2**16),
)
def test_nobody_notices_that_stages_died(windows, stages, losses, pages, seed):
    """Any stages at any time, in the middle of prompts, while others share their pages and the pool is nearly full."""
    groups = [PageGroup(window, pages) for window in windows]
    chance = random.Random(seed)
    asked = []
    for number in range(10):
        tokens = chance.choice([3, 16, 17, 40, 70])
        several = Settings(
            chance.randint(1, 30), temperature=1.0, seed=number, sequences=chance.choice([1, 1, 2]),
            repetition_penalty=chance.choice([1.0, 1.5]),
        )  # fmt: skip
        asked.append(([chance.choice([1, 2])] * tokens, several))
    at = {work: stage % stages for work, stage in losses.items()}
    with engine_of(groups, stages, Workload(128, 6, 32), losses=at, seed=seed) as engine:
        made = [engine.submit(prompt, each) for prompt, each in asked]
        made[chance.randrange(10)].cancel()
        for completion, (prompt, each) in zip(made, asked, strict=True):
            for number, sequence in enumerate(completion.sequences):
                done = sequence.result(WAIT)
                expected = alone(prompt, each, groups, stages, number)
                assert done.tokens == (expected[: len(done.tokens)] if done.reason == "cancelled" else expected)
        assert nothing_left(idle(engine))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    windows=st.sampled_from([(None,), (20,), (20, None)]),
    stages=st.integers(1, 3),
    losses=losses,
    seed=st.integers(0, 99),
)
def test_fed_sequences_do_not_notice_it_either(windows, stages, losses, seed):
    groups = [PageGroup(window, 64) for window in windows]
    chance = random.Random(seed)
    at = {work // 4: stage % stages for work, stage in losses.items()}
    with engine_of(groups, stages, losses=at, seed=seed) as engine:
        request = engine.submit([5] * 40, Settings(40))
        beams = [Fed(engine, groups, stages)]
        feed(engine, [(beams[0], [1] * 45, list(range(45)), False)])
        for number in range(12):
            beams.append(chance.choice(beams).fork())
            parts = []
            for beam in beams:
                count, start = chance.randint(1, 4), beam.tokens
                parts.append((beam, [number + i for i in range(count)], list(range(start, start + count)), True))
            feed(engine, parts)
            for beam in beams:
                beam.crop(beam.tokens - chance.randint(0, 1))
            if len(beams) > 3:
                engine.drop(beams.pop(chance.randrange(4)).sequence)
            with engine._lock:
                if not engine._sends_alone:  # while pages are filled again, some are borrowed
                    check_pages(engine._scheduler)
        assert request.result(WAIT).tokens == alone([5] * 40, Settings(40), groups, stages)


def test_only_the_stages_up_to_the_lost_one_run_again():
    stages = SimulatedStages([FULL], 3, losses={60: 1})
    with Engine(stages, [FULL], WORK) as engine:
        engine.submit([1] * 40, Settings(60)).result(WAIT)
        assert engine.stats().restarts == 1
    again = [step for step in stages.sent if step.stages]
    assert again and {step.stages for step in again} == {2}
    kinds = Counter((step.few == step.rows) for step in again)
    assert kinds[False] == 2 and kinds[True] == 1, "the prompt in chunks, then the generated tokens"


def test_a_stage_that_dies_while_another_is_filled_again():
    for later in range(61, 66):
        with engine_of(stages=2, losses={60: 1, later: 0}) as engine:
            assert engine.submit([1] * 40, Settings(60)).result(WAIT).tokens == alone([1] * 40, Settings(60), [FULL], 2)
            assert engine.stats().restarts == 2


def test_beginnings_that_nobody_uses_are_forgotten_with_a_lost_stage():
    stages = SimulatedStages([FULL], 1)
    with Engine(stages, [FULL], WORK) as engine:
        expected = engine.submit([1] * 40, Settings(5)).result(WAIT).tokens
        idle(engine)
        stages.losses[stages.work + 2] = 0
        engine.submit([2] * 40, Settings(5)).result(WAIT)
        assert engine.stats().restarts == 1
        assert engine.submit([1] * 40, Settings(5)).result(WAIT).tokens == expected


@pytest.mark.parametrize("free", [1, 0])
def test_a_fed_sequence_passes_through_the_pages_that_are_free(free):
    """Its first places need pages again until it is where it was: with one free page few rows run at once, without
    any the sequence cannot come back."""
    groups = [PageGroup(20, 6), PageGroup(20, 6)]
    stages = SimulatedStages(groups, 2)
    with Engine(stages, groups, WORK) as engine:
        fed, other, third = (Fed(engine, groups, 2) for _ in range(3))
        feed(engine, [(fed, [number % 7 for number in range(100)], list(range(100)), False)])
        feed(engine, [(fed, [1], [100], True)])
        feed(engine, [(other, [2] * 34, list(range(34)), False)])
        if not free:
            feed(engine, [(third, [2], [0], True)])
        assert engine.stats().free_pages == (free, free)
        stages.losses[stages.work] = 1
        feed(engine, [(other, [3], [34], True)])
        assert engine.stats().restarts == 1
        if free:
            feed(engine, [(fed, [1], [101], True)])
        else:
            with pytest.raises(BigInt8Error, match="this sequence was lost"):
                engine.forward([(fed.sequence, [1], [101], True)], [0])
        for each in (fed, other, third):
            engine.drop(each.sequence)
        assert nothing_left(idle(engine))


class Dying(SimulatedStages):
    """Stages of which one dies whenever a result is waited for."""

    def receive(self, timeout):
        self.gone.add(0)
        return super().receive(timeout)


def test_stages_that_keep_dying_fail_every_request():
    with Engine(Dying([FULL]), [FULL], WORK) as engine:
        first, second = engine.submit([1], Settings(5)), engine.submit([2], Settings(5))
        for completion in (first, second):
            with pytest.raises(WorkerError, match=r"stages died 4 times in a row, at last: stage 0 is lost"):
                completion.result(WAIT)
        with pytest.raises(WorkerError, match="the engine has ended: stages died"):
            engine.submit([1], Settings(5))


def test_a_stage_that_is_lost_while_nothing_runs_is_restored_before_anything_does():
    with engine_of(stages=2) as engine:
        expected = engine.submit([1, 2, 3], Settings(20)).result(WAIT).tokens
        stages, restore = engine._stages, threading.Event()
        assert engine.health() == Health("running")
        mend = stages.restore
        stages.restore = lambda: restore.wait(WAIT) and mend()
        stages.gone.add(1)
        assert engine.health() == Health("restoring", 1), "it is known at once"
        waiting = engine.submit([1, 2, 3], Settings(20))
        assert engine.health() == Health("restoring", 1)
        restore.set()
        assert waiting.result(WAIT).tokens == expected
        assert engine.health() == Health("running") and engine.stats().restarts == 1
        stages.gone.add(0)  # and again, without a request that shows it
        for _ in range(2000):
            if engine.stats().restarts == 2 and engine.health() == Health("running"):
                break
            threading.Event().wait(0.005)
        assert engine.health() == Health("running") and engine.stats().restarts == 2 and not stages.gone
    assert engine.health().state == "ended" and "was closed" in engine.health().error


def test_a_step_at_which_a_stage_hangs_each_time_ends_the_engine_however_long_that_takes(monkeypatch):
    monkeypatch.setattr("bigint8.run.engine.STEADY_SECONDS", -1.0)
    with Engine(Dying([FULL]), [FULL], WORK) as engine, pytest.raises(WorkerError, match="died 4 times in a row"):
        engine.submit([1], Settings(5)).result(WAIT)


class Unrestorable(Dying):
    def restore(self):
        raise WorkerError("no box is left")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (LocalStages(lambda step: 1 // 0), "the engine failed: integer division"),
        (LocalStages(lambda step: Result(step.number + 1, np.zeros(1, np.int32))), "the result of step 2 came before"),
        (Unrestorable([FULL]), "no box is left"),
    ],
    ids=["a stage fails", "results out of order", "nothing to restore"],
)
def test_whatever_ends_the_engine_ends_all_who_wait(stages, message):
    with Engine(stages, [PageGroup(None, 4)], WORK) as engine:
        sequence = engine.open_sequence()
        errors = []

        def wait(asked):
            try:
                asked()
            except BigInt8Error as error:
                errors.append(str(error))

        running, queued = engine.submit([1], Settings(50)), engine.submit([1], Settings(50))
        waiting = [lambda: list(running), queued.result, lambda: engine.forward([(sequence, [1], [0], True)], [0])]
        threads = [threading.Thread(target=wait, args=(asked,)) for asked in waiting]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
    assert len(errors) == 3 and all(message in error for error in errors)


def test_closing_ends_requests_that_are_not_done():
    release = threading.Event()

    def slow(step):
        release.wait(WAIT)
        return Result(step.number, np.zeros(len(step.keep), np.int32))

    engine = Engine(LocalStages(slow), [FULL], WORK)
    completion = engine.submit([1], Settings(50))
    threading.Timer(0.1, release.set).start()
    engine.close()
    with pytest.raises(WorkerError, match="closed before the request was done"):
        completion.result(WAIT)
    engine.close()


def test_a_lost_stage_crosses_processes_with_its_number():
    import pickle

    error = pickle.loads(pickle.dumps(StageLost(3, "stage 3 on box b is gone")))
    assert (error.index, str(error)) == (3, "stage 3 on box b is gone")


# --- what it tells -------------------------------------------------------------------------------------------------


def test_statistics_count_tokens_requests_and_pages():
    with engine_of() as engine:
        for _ in range(3):
            engine.submit([1] * 20, Settings(7)).result(WAIT)
        idle(engine)
        stats = engine.stats()
    assert (stats.tokens, stats.waiting, stats.running, stats.restarts) == (21, 0, 0, 0)
    assert stats.free_pages == (64,) and stats.tokens_per_s > 0
    assert len(stats.stages) == len(stats.busy) == 1 and stats.stages[0].steps > 0


def test_a_trace_shows_each_step_and_what_the_driver_does(tmp_path):
    trace = Trace()
    with engine_of(stages=2, trace=trace, losses={20: 1}) as engine:
        engine.submit([1] * 20, Settings(20)).result(WAIT)
        idle(engine)
    trace.write(tmp_path / "trace.json")
    names = [
        each["name"] for each in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if each["ph"] == "X"
    ]
    assert "send 1" in names and "hand out 1" in names and "step 1" in names
    assert any(name.startswith("restore") for name in names) and any(name.endswith("lost") for name in names)
