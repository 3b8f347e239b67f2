"""Workers that are killed, stopped, stuck or slow: no token is lost, doubled or changed, and nothing stays behind."""

import importlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from serving import save_model, until
from tiny import save_tiny

from bigint8 import Int8Config, WorkerError
from bigint8.model_pipeline import ModelPipeline
from bigint8.options import Cluster, Workload
from bigint8.plan.clusters import load_cluster
from bigint8.plan.cut import make_plan
from bigint8.run import crew, loading, watch
from bigint8.run.engine import Engine
from bigint8.run.settings import Settings
from bigint8.run.watch import TICK_SECONDS, Patience, Watch
from bigint8.session import find_model

WAIT = 120.0
WORK = Workload(context=128, sequences=4)
PROMPTS = ([5, 17, 99], [3, 42, 7, 8], list(range(20, 60)), [11])
TOKENS = 60


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """One whose prefill gives the very values that decoding gave (`activations`, below)."""
    return save_tiny("llama", True, tmp_path_factory.mktemp("llama"))


def plan_for(pipeline, folder, workers=3):
    found = find_model(folder, Int8Config(dtype="float32", activations="16bit"))
    return make_plan(found.spec, pipeline.devices()[:workers], WORK)


@pytest.fixture
def engine(pipeline, llama):
    """Requests to the model over three workers. Steps that hang are found quickly."""
    plan = plan_for(pipeline, llama)
    pipeline.load(plan, progress=False)
    with Engine.of(plan, pipeline) as engine:
        yield engine


def answers(engine, fault=lambda: None, after=10):
    """The tokens of all prompts, which run together. `fault` comes about after so many tokens of the first."""
    completions = [engine.submit(prompt, Settings(TOKENS)) for prompt in PROMPTS]
    for count, _ in enumerate(completions[0], 1):
        if count == after:
            fault()
    return [completion.result(WAIT).tokens for completion in completions]


def pid(pipeline, index):
    return pipeline.infos[index].pid


# --- workers that are killed ---------------------------------------------------------------------------------------


def test_two_workers_that_are_killed_at_once_change_no_token(pipeline, engine):
    expected = answers(engine)
    before = [info.pid for info in pipeline.infos]

    def kill():
        for index in (0, 2):
            os.kill(before[index], signal.SIGKILL)

    assert answers(engine, kill) == expected and all(len(tokens) == TOKENS for tokens in expected)
    after = [info.pid for info in pipeline.infos]
    assert [new == old for new, old in zip(after, before, strict=True)] == [False, True, False]
    assert not any(psutil.pid_exists(before[index]) for index in (0, 2))


def test_a_worker_that_is_killed_while_another_is_replaced_is_replaced_too(pipeline, engine, monkeypatch):
    expected = answers(engine)
    killed = []
    begin = loading.Loading._begin

    def kill_another(self, index):
        begin(self, index)
        if not killed:
            killed.append(pid(pipeline, 1))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(loading.Loading, "_begin", kill_another)
    assert answers(engine, lambda: os.kill(pid(pipeline, 2), signal.SIGKILL)) == expected
    assert killed and killed[0] != pid(pipeline, 1) and not psutil.pid_exists(killed[0])


def test_a_worker_that_is_killed_in_a_prompt_changes_no_token(pipeline, engine):
    """It dies when the prompts have just been sent."""
    expected = answers(engine)
    completions = [engine.submit(prompt, Settings(TOKENS)) for prompt in PROMPTS]
    os.kill(pid(pipeline, 1), signal.SIGKILL)
    assert [completion.result(WAIT).tokens for completion in completions] == expected


@pytest.fixture
def killed_loads(pipeline, monkeypatch):
    """Kills the worker of stage 1 in the middle of its load, as often as is asked. Which processes, and who loads."""
    killed, begun, times = [], [], [0]
    begin = loading.Loading._begin

    def begin_and_kill(self, index):
        begin(self, index)
        begun.append(index)
        if index == 1 and len(killed) < times[0]:
            killed.append(pid(pipeline, 1))
            os.kill(killed[-1], signal.SIGSTOP)  # so that it is not quicker than this
            threading.Timer(0.2, os.kill, (killed[-1], signal.SIGKILL)).start()

    monkeypatch.setattr(loading.Loading, "_begin", begin_and_kill)
    return killed, begun, times


def test_a_worker_that_is_killed_while_it_loads_loads_again_and_the_others_go_on(pipeline, llama, killed_loads):
    killed, begun, times = killed_loads
    times[0] = 2
    plan, before = plan_for(pipeline, llama), [info.pid for info in pipeline.infos]
    reports = pipeline.load(plan, progress=False)
    assert [sum(report.device_bytes.values()) for report in reports] == [stage.weight_bytes for stage in plan.stages]
    assert len(killed) == 2 and not any(map(psutil.pid_exists, killed))
    assert sorted(begun) == [0, 1, 1, 1, 2]
    assert [info.pid == old for info, old in zip(pipeline.infos, before, strict=True)] == [True, False, True]


def test_a_worker_that_has_loaded_and_is_killed_before_the_others_have_loads_again(pipeline, llama, monkeypatch):
    look, killed, looks = loading.Loading._look, [], []

    def look_and_kill(self):
        looks.append(1)
        if not killed and 0 not in self._loads.values():
            killed.append(pid(pipeline, 0))
            os.kill(killed[0], signal.SIGKILL)
            os.kill(pid(pipeline, 2), signal.SIGCONT)
        return look(self)

    monkeypatch.setattr(loading.Loading, "_look", look_and_kill)
    monkeypatch.setattr("bigint8.run.pipeline.UNLOAD_SECONDS", 0.5)
    plan = plan_for(pipeline, llama)
    os.kill(pid(pipeline, 2), signal.SIGSTOP)
    pipeline.load(plan, progress=False)
    assert pid(pipeline, 0) != killed[0]
    with Engine.of(plan, pipeline) as engine:
        assert [len(tokens) for tokens in answers(engine)] == [TOKENS] * len(PROMPTS)


def test_a_worker_that_is_killed_whenever_it_loads_is_given_up_by_name(pipeline, llama, killed_loads):
    killed, _, times = killed_loads
    times[0] = 100
    said = r"worker 1 \(.+, cpu\) was started 3 times to load stage 1, and died each time: a worker died"
    with pytest.raises(WorkerError, match=said) as error:
        pipeline.load(plan_for(pipeline, llama), progress=False)
    assert len(killed) == loading.MOST_STARTS and "\n" not in str(error.value)


def test_workers_that_cannot_be_started_again_end_the_engine_with_who_where_and_what_was_served(
    pipeline, engine, killed_loads, monkeypatch
):
    monkeypatch.setattr(loading, "MOST_STARTS", 1)
    monkeypatch.setattr("bigint8.run.pipeline.MAX_RESTORES", 1)

    def kill():
        killed_loads[2][0] = 1
        os.kill(pid(pipeline, 1), signal.SIGKILL)

    with pytest.raises(WorkerError) as failed:
        answers(engine, kill)
    said = str(failed.value)
    host = pipeline.infos[1].host
    # whoever notices first says so: the driver, or a stage beside it
    assert re.search(rf"stage 1 on worker 1 \({host}, cpu\) is lost( to another stage)?: its process ended", said)
    assert f"cannot be started again: worker 1 ({host}, cpu) was started 1 times to load stage 1, and died" in said
    assert "4 sequences were being written (tokens of the prompt + of the answer so far: 3 + 1" in said
    assert said.endswith("0 requests waited")


# --- workers that hang ---------------------------------------------------------------------------------------------


def test_a_worker_that_is_stopped_is_killed_and_replaced_and_no_token_changes(pipeline, llama, monkeypatch):
    monkeypatch.setattr(watch, "SILENT_SECONDS", 3.0)
    plan = plan_for(pipeline, llama)
    pipeline.load(plan, progress=False)
    with Engine.of(plan, pipeline) as engine:
        expected, stopped = answers(engine), pid(pipeline, 1)
        health = []

        def stop():
            os.kill(stopped, signal.SIGSTOP)
            until(lambda: engine.health().state != "running")
            health.append(engine.health())
            assert stopped == pid(pipeline, 1), "it is known before anything is done"

        assert answers(engine, stop) == expected
        assert (health[0].state, health[0].stage) == ("restoring", 1)
        until(lambda: engine.health().state == "running")
        assert not psutil.pid_exists(stopped) and engine.stats().restarts == 1


def test_a_worker_whose_step_never_ends_is_killed_and_replaced(pipeline, llama, monkeypatch):
    """Its process lives and answers; the thread that computes does not come back."""
    monkeypatch.setattr(watch, "STEP_SECONDS", 2.0)
    monkeypatch.setattr(watch, "MANY", 0)
    plan = plan_for(pipeline, llama)
    pipeline.load(plan, progress=False)

    def hang(worker):
        worker._flow._stage.run = lambda *_: threading.Event().wait()

    with Engine.of(plan, pipeline) as engine:
        expected, before = answers(engine), pid(pipeline, 1)
        assert answers(engine, lambda: pipeline._workers[1].__ray_call__.remote(hang)) == expected
        assert not psutil.pid_exists(before) and engine.stats().restarts == 1


def test_a_worker_that_is_stopped_while_it_loads_is_replaced(pipeline, llama, monkeypatch):
    monkeypatch.setattr(loading, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr("bigint8.run.pipeline.UNLOAD_SECONDS", 0.5)
    plan, stopped = plan_for(pipeline, llama), pid(pipeline, 2)
    os.kill(stopped, signal.SIGSTOP)
    pipeline.load(plan, progress=False)
    assert pid(pipeline, 2) != stopped and not psutil.pid_exists(stopped)
    with Engine.of(plan, pipeline) as engine:
        assert [len(tokens) for tokens in answers(engine)] == [TOKENS] * len(PROMPTS)


def test_no_other_process_is_ended_in_place_of_a_worker():
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    crew.end_process(other.pid)
    assert other.poll() is None
    other.kill()
    other.wait()


def ticks(seconds):
    return range(round(seconds / TICK_SECONDS))


def test_silence_is_counted_in_ticks_of_the_driver_so_that_a_pause_of_all_is_none():
    watched = Watch([Patience(3, 10)] * 2)
    for tick in ticks(2.75):
        assert watched.tick([tick, 0]) == {}
    assert watched.quiet() == 1
    assert watched.tick([100, 0]) == {1: "nothing was heard of it for 3 s"}
    assert watched.tick([101, 1]) == {} and watched.quiet() is None, "it is heard again"


def test_a_stage_may_be_busy_for_as_long_as_its_messages_change():
    watched, came = Watch([Patience(3, 10)]), 0
    for handled in range(3):
        for _ in ticks(9.75):
            came += 1
            watched.heard(0, handled, True)
            assert watched.tick([came]) == {}
    for _ in ticks(0.25):
        watched.heard(0, 2, True)
        came += 1
        assert watched.tick([came]) == {0: "it has been at one step for 10 s"}
    watched.heard(0, 2, False)
    assert watched.tick([came + 1]) == {}


def test_patience_grows_with_what_the_time_model_says_of_the_longest_step():
    spec = find_model("opt-175b", weights=False).spec
    devices = list(load_cluster("16x-rtx3090-2-boxes").devices)
    short, long = (
        watch.patience_of(make_plan(spec, devices, Workload(context=2048, sequences=1, chunk=chunk)))
        for chunk in (64, 512)
    )
    assert all(each.silent_seconds >= watch.SILENT_SECONDS for each in short)
    assert all(a.step_seconds <= b.step_seconds for a, b in zip(short, long, strict=True))
    assert max(each.step_seconds for each in long) > watch.STEP_SECONDS, "the load takes minutes"


# --- workers that are slow -----------------------------------------------------------------------------------------


def test_a_slow_worker_is_named_in_the_statistics(pipeline, engine):
    answers(engine)
    assert all(stage.times_planned > 0 for stage in engine.stats().stages)
    ended, slow = threading.Event(), psutil.Process(pid(pipeline, 1))

    def hinder():
        while not ended.wait(0.001):
            slow.suspend()
            ended.wait(0.02)
            slow.resume()

    thread = threading.Thread(target=hinder)
    thread.start()
    try:
        for _ in range(20):  # what else this machine does slows others for a while
            answers(engine)
            said = engine.stats().slow
            if [line[:7] for line in said] == ["stage 1"]:
                break
    finally:
        ended.set()
        thread.join()
        slow.resume()
    assert (
        len(said) == 1 and said[0].startswith("stage 1 on worker 1 (") and " x what was planned, the others" in said[0]
    )


# --- how long it takes ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_running_workers")
def test_the_benchmark_tells_the_seconds_until_the_next_token(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    faults = importlib.import_module("faults")
    found = find_model(save_model(tmp_path / "model", ends=False), Int8Config(dtype="float32"))
    with ModelPipeline(found, 2, WORK, Cluster("cpu")) as asked:
        asked.load(progress=False)
        assert faults.after_fault(asked, 1, signal.SIGKILL, 4)["to the next token"] > 0
        assert asked.stats().restarts == 1
