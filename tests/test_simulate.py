"""Pipelines in simulated time: the figures that the time model gives, everyone's tokens, and what failures do."""

import json
import random
import subprocess
import sys
import threading
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from simulated import nothing_left

from bigint8.errors import BigInt8Error, PlanError
from bigint8.model.step import Result, Step
from bigint8.options import Workload
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import Box, Device, preset_gpus
from bigint8.plan.predict import PlanTimes, predict
from bigint8.plan.spec import spec_of
from bigint8.plan.speed import UNKNOWN_CORE
from bigint8.plan.time import Rows, TimeModel
from bigint8.run.engine import MAX_RESTARTS, Engine
from bigint8.run.settings import Settings
from bigint8.run.stages import StageLost
from bigint8.simulation.clock import Clock
from bigint8.simulation.load import Failure, Failures, Load
from bigint8.simulation.simulate import Simulation, simulate
from bigint8.simulation.stages import SimulatedStages
from bigint8.sources.find import find_source
from bigint8.terminal.simulated_table import print_simulated

CORE = Device("cpu", "test", 2**34, "bfloat16", UNKNOWN_CORE)


def plan_of(name, devices, work):
    return make_plan(spec_of(find_source(name, fetch=False)), devices, work)


@pytest.fixture(scope="module")
def llama():
    """TinyLlama over two CPU devices."""
    return plan_of("tinyllama-1.1b", [CORE] * 2, Workload(512, 16))


@pytest.fixture(scope="module")
def opt():
    """OPT-175B over eight GPUs: as many sequences as there is room for."""
    return plan_of("opt-175b", preset_gpus("rtx-3090", 8), Workload(128, 16))


def left_nothing(simulation):
    return all(nothing_left(each.scheduler) for each in simulation.pipelines)


# --- times -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("windows", [(None,), (64, None), (64, 300, None)])
def test_costs_that_are_added_up_once_say_what_the_blocks_say_one_by_one(windows, tied):
    chance, plan = random.Random(len(windows)), plan_of("tinyllama-1.1b", [CORE] * 2, Workload(512, 16))
    layout = plan.spec.known_layout
    sizes = replace(layout.sizes, windows=tuple(windows[block % len(windows)] for block in range(22)), tied=tied)
    plan = replace(plan, spec=replace(plan.spec, layout=replace(layout, sizes=sizes)))
    times, model = PlanTimes(plan), TimeModel(plan.spec.known_layout, 2)
    for _ in range(20):
        decode, prompt = chance.choice([(0, 300), (1, 0), (7, 0), (5, 512)])
        rows = Rows(decode, chance.randrange(1, 700), prompt, chance.randrange(700))
        for stage in plan.stages:
            seconds = sum(block_seconds(plan, block, rows) for block in range(stage.first_block, stage.last_block))
            if (stage.index == 0) == tied:
                seconds += model.head_seconds(UNKNOWN_CORE, rows)
            assert times.stage_seconds(stage, rows) == pytest.approx(seconds, rel=1e-12)


def block_seconds(plan, block, rows):
    """A block's, term by term, as the time model's page describes it."""
    layout, speed = plan.spec.known_layout, UNKNOWN_CORE
    sizes, part, window = layout.sizes, layout.blocks[block].part, layout.sizes.windows[block] or 10**9
    int8, others = 2 * part.int8_values, 2 * part.other_values
    few = int8 / speed.row_ops_per_s + others / speed.float_row_ops_per_s
    values = (
        (2048 + 2560) + (2048 + 2048) + (2048 + 2 * 5632) + (5632 + 2048)
    )  # TinyLlama's: qkv, out, gate and up, down
    many = int8 / speed.prompt_ops_per_s + values / speed.prompt_values_per_s + others / speed.float_row_ops_per_s
    seconds = speed.block_seconds
    if rows.decode:
        seconds += part.weight_bytes(2) / speed.read_bytes_per_s + (rows.decode - 1) * few
    if rows.prompt:
        seconds += part.weight_bytes(2) / speed.prompt_read_bytes_per_s + rows.prompt * many
    seconds += rows.decode * min(window, rows.context) * 2 * sizes.kv_values / speed.cache_bytes_per_s
    seen = min(window, rows.prompt_after + rows.prompt / 2)
    return seconds + 4 * sizes.hidden * rows.prompt * seen / speed.attention_ops_per_s


@pytest.mark.parametrize(
    ("name", "devices", "prompt"),
    [
        ("tinyllama-1.1b", [CORE], 300),
        ("tinyllama-1.1b", [CORE] * 2, 64),
        ("smollm2-135m", [CORE] * 3, 64),  # its head is in the first stage: a ring
        ("opt-6.7b", preset_gpus("rtx-3090", 2), 64),
    ],
)
def test_a_request_alone_takes_what_is_predicted(name, devices, prompt):
    plan = plan_of(name, devices, Workload(512, 4))
    assert len(plan.stages) == len(devices)
    times, found = PlanTimes(plan), simulate(plan, Load(1, prompt_tokens=prompt, new_tokens=20))
    assert found.first_token.most_seconds == pytest.approx(predict(plan, prompt=prompt).prompt_seconds)
    later = sum(times.decode(1, prompt + n).seconds for n in range(1, 20))
    assert found.seconds == pytest.approx(found.first_token.most_seconds + later)
    assert found.between_tokens.most_seconds == pytest.approx(times.decode(1, prompt + 19).seconds)
    assert (found.queue.most_seconds, found.done, found.new_tokens) == (0, 1, 20)


@pytest.mark.parametrize(("name", "new"), [("llama", 250), ("opt", 64)])
def test_full_pipelines_are_as_fast_as_their_slowest_stage(name, new, request):
    plan = request.getfixturevalue(name)
    found = simulate(plan, Load(48, prompt_tokens=64, new_tokens=new))
    assert max(found.busy) > 0.94 and all(0 < share <= 1 for share in found.busy)
    predicted = predict(plan, context=64 + new // 2, sequences=16)
    assert 0.6 * predicted.tokens_per_s < found.tokens_per_s < 1.02 * predicted.tokens_per_s


def test_a_stage_that_is_slower_than_the_one_before_computes_one_step_at_a_time(llama):
    slow = replace(CORE, speed=replace(UNKNOWN_CORE, read_bytes_per_s=3e9))
    plan = replace(llama, stages=(llama.stages[0], replace(llama.stages[1], device=slow)))
    found = simulate(plan, Load(16, prompt_tokens=64, new_tokens=200))
    assert 0.9 < found.busy[1] <= 1 and found.busy[0] < 0.8
    assert found.tokens_per_s < predict(plan, context=64, sequences=16).tokens_per_s


def test_a_link_carries_one_step_at_a_time(llama):
    far = replace(CORE, box=Box("far", network_bytes_per_s=1e4))
    plan = replace(llama, stages=(llama.stages[0], replace(llama.stages[1], device=far)))
    found = simulate(plan, Load(16, prompt_tokens=64, new_tokens=20))
    assert found.seconds > PlanTimes(plan).hop_seconds(0, 16 * (64 + 19))


def test_rows_for_a_head_in_the_first_stage_go_before_steps():
    plan, clock, came = plan_of("smollm2-135m", [CORE] * 3, Workload(256, 8)), Clock(), []
    times = PlanTimes(plan)
    stages = SimulatedStages(times, clock, lambda result: came.append((result.number, clock.now)))
    zero, one = np.zeros(1, np.int32), np.zeros((1, 1, 1), np.int32)
    for number in range(400):
        stages.send(Step(number, zero, zero, zero, zero, 1, one, keep=zero))
    while clock.go_on():
        pass
    alone = times.decode(1, 1)
    assert [number for number, _ in came] == list(range(400))
    assert came[0][1] <= alone.seconds + alone.stages[0]
    assert came[-1][1] == clock.now >= 400 * alone.stages[0]


def test_the_busy_seconds_are_those_of_the_steps(llama):
    found = simulate(llama, Load(1, prompt_tokens=64, new_tokens=2))
    times = PlanTimes(llama)
    steps = [times.prompt(64, 0), times.decode(1, 65)]
    for stage, share in enumerate(found.busy):
        assert share * found.seconds == pytest.approx(sum(step.stages[stage] for step in steps))


def test_a_lost_step_counts_as_far_as_it_was_computed(llama):
    times = PlanTimes(llama)
    prompt, decode = times.prompt(64, 0), times.decode(1, 65)
    half = prompt.stages[0] / 2
    found = simulate(llama, Load(1, prompt_tokens=64, new_tokens=2), failures=Failures(at=(Failure(half, 0, 0),)))
    assert found.busy[0] * found.seconds == pytest.approx(half + prompt.stages[0] + decode.stages[0])
    assert found.busy[1] * found.seconds == pytest.approx(prompt.stages[1] + decode.stages[1])


# --- the same steps as the engine's --------------------------------------------------------------------------------


class InstantStages:
    """Stages for a real engine that answer at once, when the gate is open; one is lost after so many results."""

    def __init__(self, count, lost_after, stage):
        self.count, self.lost_after, self.stage = count, lost_after, stage
        self.sent, self.under_way, self.results = [], deque(), 0
        self.first, self.gate = threading.Event(), threading.Event()

    def send(self, step):
        self.sent.append(contents(step))
        self.under_way.append(step)
        self.first.set()

    def receive(self, timeout):
        assert self.gate.wait(timeout)
        if self.results == self.lost_after:
            self.lost_after = None
            raise StageLost(self.stage, "lost")
        step = self.under_way.popleft()
        self.results += 1
        return Result(step.number, np.zeros(len(step.keep), np.int32))

    def restore(self):
        self.under_way.clear()
        return [self.stage]

    def lost(self):
        return None

    def quiet(self):
        return None

    def stats(self):
        return []


def contents(step):
    return step.number, step.few, step.places.tolist(), step.keep.tolist(), step.tables.tolist(), step.stages


@pytest.mark.parametrize("seed", range(6))
def test_the_steps_are_those_that_the_engine_sends(seed, llama, opt):
    """One by one, with those that fill lost pages again, and those that are sent again."""
    chance, plan = random.Random(seed), (llama, opt)[seed % 2]
    load = Load(30, None, 50, 12, spread=0.5, shared_tokens=chance.choice([0, 40]), seed=seed)
    lost_after, stage = (None, 0) if seed < 2 else (chance.randrange(1, 40), chance.randrange(2))
    instant = InstantStages(len(plan.stages), lost_after, stage)
    with Engine.of(plan, instant) as engine:
        completions = []
        for asked in load.asked(plan.workload.context):
            completions.append(engine.submit(asked.prompt(load.shared_tokens), Settings(asked.new_tokens)))
            assert instant.first.wait(60)
        instant.gate.set()
        assert sum(len(each.result(60).tokens) for each in completions) > 0
    times, sent = simulated_steps(plan, load, None)
    if lost_after is not None:
        _, sent = simulated_steps(plan, load, Failures(at=(Failure(times[lost_after] - 1e-9, 0, stage),)))
    assert sent == instant.sent


def simulated_steps(plan, load, failures):
    """When results come, and what is sent, on one pipeline."""
    simulation, times, sent = Simulation(plan, load, 1, failures), [], []
    pipeline = simulation.pipelines[0]
    send, back = pipeline.stages.send, pipeline.stages._back

    def noted(step):
        sent.append(contents(step))
        send(step)

    def noted_back(result):
        times.append(simulation.clock.now)
        back(result)

    pipeline.stages.send, pipeline.stages._back = noted, noted_back
    simulation.run()
    return times, sent


# --- load --------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_result_and_another_one_another(llama):
    load = Load(40, 0.5, prompt_tokens=100, new_tokens=20, spread=0.7, seed=3)
    failures = Failures(device_seconds=100.0, restart_seconds=0.1)
    first, second = (simulate(llama, load, 2, failures) for _ in range(2))
    assert first == second and first.failures and not first.failed
    other = simulate(llama, replace(load, seed=4), 2, failures)
    assert other.new_tokens != first.new_tokens and other.seconds != first.seconds


def test_requests_come_at_the_rate_that_is_asked_with_the_lengths_that_are_asked():
    asked = Load(4000, 5.0, prompt_tokens=300, new_tokens=80, spread=0.5, seed=1).asked(2048)
    assert asked[-1].seconds == pytest.approx(800, rel=0.06)
    assert sum(each.prompt_tokens for each in asked) / 4000 == pytest.approx(300, rel=0.05)
    assert sum(each.new_tokens for each in asked) / 4000 == pytest.approx(80, rel=0.05)
    short = Load(4000, 5.0, prompt_tokens=300, new_tokens=80, spread=1.5, seed=1).asked(400)
    assert max(each.prompt_tokens + each.new_tokens for each in short) == 400
    assert min(min(each.prompt_tokens, each.new_tokens) for each in short) >= 1


def test_an_infinite_rate_is_all_at_once(llama):
    load = Load(5, float("inf"), 64, 8)
    assert load == Load(5, None, 64, 8) and {each.seconds for each in load.asked(512)} == {0.0}
    json.dumps(simulate(llama, load).to_dict(), allow_nan=False)


def test_more_pipelines_give_more_tokens_a_second_and_shorter_queues(llama):
    found = [simulate(llama, Load(120, 1000.0, 64, 32, seed=1), pipelines) for pipelines in (1, 2, 4)]
    assert found[0].tokens_per_s < 0.7 * found[1].tokens_per_s < 0.5 * found[2].tokens_per_s
    assert found[0].queue.mean_seconds > found[1].queue.mean_seconds > found[2].queue.mean_seconds
    assert [each.devices for each in found] == [2, 4, 8]


def test_requests_wait_when_all_sequences_or_pages_are_taken(llama):
    assert (
        simulate(llama, Load(16, None, 64, 32)).queue.most_seconds < simulate(llama, Load(17, None, 64, 32)).seconds / 2
    )
    found = simulate(llama, Load(40, None, 64, 32))
    assert found.queue.most_seconds > found.seconds / 3
    assert found.most_pages == (16 * (64 + 32) // 16,) and found.pages == (512,)
    full = replace(llama, pages=(12,))  # room for two such requests
    found = simulate(full, Load(6, None, 64, 32))
    assert found.queue.most_seconds > found.seconds / 2 and found.most_pages == (12,) and found.done == 6


def test_a_rate_that_the_pipeline_keeps_up_with_leaves_it_idle_at_times(llama):
    found = simulate(llama, Load(30, 0.2, 64, 16))
    assert max(found.busy) < 0.5 and found.queue.median_seconds == 0


def test_people_who_wait_for_answers_are_never_more_than_they_are(llama):
    found = simulate(llama, Load(20, sessions=1, prompt_tokens=64, new_tokens=8))
    alone = simulate(llama, Load(1, prompt_tokens=64, new_tokens=8))
    assert found.done == 20 and found.queue.most_seconds == 0
    assert found.seconds == pytest.approx(20 * alone.seconds)
    assert simulate(llama, Load(20, sessions=4, prompt_tokens=64, new_tokens=8)).seconds < 0.6 * found.seconds


def test_prompts_that_begin_alike_are_computed_once(llama):
    apart = simulate(llama, Load(12, sessions=1, prompt_tokens=400, new_tokens=2))
    shared = simulate(llama, Load(12, sessions=1, prompt_tokens=400, new_tokens=2, shared_tokens=384))
    assert shared.first_token.median_seconds < 0.3 * apart.first_token.median_seconds


# --- nobody is forgotten -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_everybody_gets_all_tokens_whenever_devices_die(seed, llama, opt):
    chance = random.Random(seed)
    plan = (llama, opt, plan_of("smollm2-135m", [CORE] * 3, Workload(256, 8)))[seed % 3]
    rate = chance.choice([None, 2.0, 30.0])
    load = Load(60, rate, 40, 20, spread=chance.choice([0.0, 0.6]), seed=seed)
    asked = load.asked(plan.workload.context)
    calm = simulate(plan, load, 2)
    at = tuple(Failure(chance.uniform(0, calm.seconds), chance.randrange(2), chance.randrange(2)) for _ in range(3))
    simulation = Simulation(plan, load, 2, Failures(at=at, restart_seconds=chance.choice([0.0, 1.0, 30.0])))
    found = simulation.run()
    assert (found.done, found.failed, found.failures) == (60, 0, 3) and left_nothing(simulation)
    assert found.new_tokens == calm.new_tokens == sum(each.new_tokens for each in asked)
    assert found.prompt_tokens == calm.prompt_tokens == sum(each.prompt_tokens for each in asked)
    assert all(0 <= share <= 1 for share in found.busy)
    assert found.seconds >= calm.seconds or rate is not None


def test_a_failure_costs_its_restart_its_load_and_the_pages_that_are_filled_again(llama):
    load, times = Load(4, None, 200, 40), PlanTimes(llama)
    calm = simulate(llama, load)
    middle = Failures(at=(Failure(calm.seconds / 2, 0, 1),), restart_seconds=7.0)
    found = simulate(llama, load, failures=middle)
    standing = 7.0 + times.load_seconds(llama.stages[1], alone=True)
    assert standing < found.down_seconds < standing + calm.seconds
    assert found.seconds == pytest.approx(calm.seconds + found.down_seconds, rel=0.1)
    assert found.steps > calm.steps and found.failures == 1


def test_a_device_that_dies_while_nothing_runs_is_replaced_when_it_is_needed(llama):
    load = Load(2, 0.001, 64, 8)
    second = load.asked(512)[1].seconds
    found = simulate(llama, load, failures=Failures(at=(Failure(second - 60, 0, 0),), restart_seconds=5.0))
    alone = simulate(llama, Load(1, None, 64, 8))
    assert found.first_token.most_seconds > 5 and found.seconds == pytest.approx(second + found.whole.most_seconds)
    assert found.whole.most_seconds == pytest.approx(alone.seconds + found.down_seconds)


def test_a_pipeline_whose_stages_die_time_and_again_ends_as_the_engine_does(llama):
    at = tuple(Failure(0.01 + n, 0, 0) for n in range(MAX_RESTARTS + 1))
    found = simulate(llama, Load(6, None, 64, 8), 2, Failures(at=at))
    assert (found.done, found.failed) == (3, 3)
    found = simulate(llama, Load(6, sessions=2, prompt_tokens=64, new_tokens=8), 1, Failures(at=at))
    assert (found.done, found.failed) == (0, 6)
    apart = tuple(Failure(100.0 * n + 0.01, 0, 0) for n in range(2 * MAX_RESTARTS))
    found = simulate(llama, Load(60, 0.1, 64, 8), 1, Failures(at=apart))
    assert (found.done, found.failed, found.failures) == (60, 0, len(apart))
    found = simulate(llama, Load(6, None, 64, 8), 2, Failures(at=at[:-1]))
    assert (found.done, found.failed) == (6, 0)


# --- what comes in and what comes out ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"requests": 0}, "requests=0: must be at least 1"),
        ({"rate_per_s": 0.0}, "rate_per_s=0.0: must be above 0"),
        ({"rate_per_s": float("nan")}, "rate_per_s=nan"),
        ({"prompt_tokens": 0}, "prompt_tokens=0"),
        ({"new_tokens": -1}, "new_tokens=-1"),
        ({"spread": -0.1}, "spread=-0.1"),
        ({"shared_tokens": 512}, "shared_tokens=512"),
        ({"sessions": 0}, "sessions=0"),
        ({"sessions": 4, "rate_per_s": 1.0}, "give one of them"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused_by_name(wrong, message):
    with pytest.raises(BigInt8Error, match=message):
        Load(**({"requests": 1} | wrong))


def test_what_a_plan_cannot_do_is_refused_with_the_numbers(llama):
    with pytest.raises(PlanError, match=r"500 tokens with 100 new ones are 600.*context of 512"):
        simulate(llama, Load(1, None, 500, 100))
    with pytest.raises(BigInt8Error, match="pipelines=0"):
        simulate(llama, Load(1, None, 64, 8), 0)
    with pytest.raises(BigInt8Error, match=r"stage 2 of pipeline 0.*1 pipelines of 2 stages"):
        simulate(llama, Load(1, None, 64, 8), 1, Failures(at=(Failure(1.0, 0, 2),)))
    with pytest.raises(BigInt8Error, match="device_seconds=0"):
        Failures(device_seconds=0)
    with pytest.raises(BigInt8Error, match="no pages"):
        simulate(replace(llama, pages=()), Load(1, None, 64, 8))


def test_the_result_is_plain_data_and_a_table_for_people(llama):
    found = simulate(llama, Load(8, 4.0, 64, 8), 2, Failures(device_seconds=3.0, restart_seconds=1.0))
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["tokens_per_s"] == found.tokens_per_s and plain["load"]["requests"] == 8
    console = Console(record=True, width=100)
    print_simulated(console, found)
    text = console.export_text()
    assert "first token" in text and "tokens/s" in text and f"{found.failures} device" in text


def test_simulating_imports_nothing_slow():
    code = "import sys, bigint8.simulation.simulate; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
