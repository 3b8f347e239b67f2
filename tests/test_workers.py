"""Stages on Ray workers, linked: what they compute, which bytes they read, what happens when one dies."""

import os
import signal
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from ragged import PAGES, Stages, texts
from test_links import WAIT
from tiny import save_tiny

from bigint8 import CheckpointError, Int8Config, WorkerError
from bigint8.checkpoint.headers import open_checkpoint
from bigint8.model.step import CHOICE, Step
from bigint8.options import PAGE_TOKENS, Cluster, Workload
from bigint8.plan.cut import make_plan
from bigint8.run import loading
from bigint8.run.doors import LOOPBACK, Hello, Role, knock, new_secret
from bigint8.run.pipeline import Pipeline
from bigint8.run.stages import StageLost
from bigint8.session import find_model

WORK = Workload(context=128, sequences=PAGES * PAGE_TOKENS // 128)


def load(pipeline, folder, workers):
    """The model on the first `workers` workers, and the reports of their loads."""
    found = find_model(folder, Int8Config(dtype="float32"))
    plan = make_plan(found.spec, pipeline.devices()[:workers], WORK)
    return plan, pipeline.load(plan, progress=False)


def test_loads_that_end_before_they_are_asked_how_far_they_are_still_say_that_they_are_done(
    pipeline, tmp_path, monkeypatch
):
    save_tiny("llama", True, tmp_path)
    monkeypatch.setattr(loading, "POLL_SECONDS", 3 * WAIT)
    told = []
    plan = make_plan(find_model(tmp_path, Int8Config(dtype="float32")).spec, pipeline.devices()[:2], WORK)
    reports = pipeline.load(plan, lambda *how_far: told.append(how_far))
    assert sorted(told)[-2:] == [(index, report.bytes_read, report.bytes_read) for index, report in enumerate(reports)]


class AsOneStage:
    """All stages of a pipeline: a step goes in, logits come out."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def run(self, step: Step, hidden: None) -> torch.Tensor:
        self.pipeline.send(step)
        return torch.from_numpy(self.pipeline.receive(WAIT).values).float()

    def logits(self, found: torch.Tensor) -> torch.Tensor:
        return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_sequences_have_the_tokens_and_logits_of_one_process_over_one_two_and_three_workers(
    pipeline, kind, tied, tmp_path
):
    save_tiny(kind, tied, tmp_path)
    expected = texts()
    Stages(tmp_path, 1).generate(expected)
    for workers in (1, 2, 3):
        load(pipeline, tmp_path, workers)
        stages, ours = Stages(tmp_path, 1), texts()
        stages.stages = [AsOneStage(pipeline)]
        stages.generate(ours)
        for mine, theirs in zip(ours, expected, strict=True):
            assert mine.tokens == theirs.tokens, f"{workers} workers"
            assert torch.allclose(torch.stack(mine.logits), torch.stack(theirs.logits), atol=1e-4)


def one_row(number: int, token: int = 5, chosen: bool = True) -> Step:
    """The first token of a sequence, in a page of its own."""
    zero, page = np.zeros(1, np.int32), np.array([[[number % PAGES]]], np.int32)
    choices = np.zeros(int(chosen), CHOICE)
    choices["repetition_penalty"] = choices["top_p"] = 1
    return Step(number, np.array([token], np.int32), zero, zero, zero, 0, page, zero, choices)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny("llama", True, tmp_path_factory.mktemp("llama"))


def test_the_token_that_is_chosen_has_the_highest_logit(pipeline, llama):
    load(pipeline, llama, 2)
    pipeline.send(one_row(0, chosen=False))
    pipeline.send(one_row(1))
    logits, token = (pipeline.receive(WAIT).values for _ in range(2))
    assert token.dtype == np.int32 and token.tolist() == [logits[0].argmax()]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_worker_that_dies_with_steps_under_way_is_replaced_and_the_others_stay(pipeline, llama, victim):
    load(pipeline, llama, 3)
    pipeline.send(one_row(0))
    expected = pipeline.receive(WAIT).values.tolist()
    before = [info.pid for info in pipeline.infos]
    for number in range(1, 40):
        pipeline.send(one_row(number))
    os.kill(before[victim], signal.SIGKILL)
    with pytest.raises(StageLost) as lost:
        for _ in range(1, 41):
            pipeline.receive(600)
    assert lost.value.index == victim
    assert len(pipeline.stats()) == 3  # whoever watches goes on watching
    assert pipeline.restore() == [victim]
    after = [info.pid for info in pipeline.infos]
    assert [new == old for new, old in zip(after, before, strict=True)] == [i != victim for i in range(3)]
    assert not psutil.pid_exists(before[victim])
    pipeline.send(one_row(100))
    result = pipeline.receive(WAIT)
    assert result.number == 100 and result.values.tolist() == expected


def test_a_worker_that_says_nothing_is_replaced(pipeline, llama, monkeypatch):
    """Its process is stopped: its connections stay open, and nothing is to be had from it."""
    monkeypatch.setattr("bigint8.run.crew.ALIVE_SECONDS", 3)
    load(pipeline, llama, 2)
    os.kill(pipeline.infos[1].pid, signal.SIGSTOP)
    pipeline.send(one_row(0))
    with pytest.raises(WorkerError, match="step 0 has no result"):
        pipeline.receive(0.5)
    assert pipeline.stats()[1].steps == 0
    assert pipeline.restore() == [1]
    pipeline.send(one_row(1))
    assert pipeline.receive(WAIT).number == 1


def test_a_pipeline_that_has_lost_nothing_is_linked_anew_and_keeps_its_pages(pipeline, llama):
    """As after a time-out: what was under way is dropped."""
    load(pipeline, llama, 2)
    pipeline.send(one_row(0))
    assert pipeline.restore() == []
    pipeline.send(one_row(1))
    assert pipeline.receive(WAIT).number == 1


def test_a_step_that_a_worker_cannot_run_says_which_and_why(pipeline, llama):
    load(pipeline, llama, 2)
    pipeline.send(one_row(3, token=10**6))
    pipeline.send(one_row(4))
    with pytest.raises(WorkerError, match="stage 0 could not run step 3: IndexError"):
        pipeline.receive(WAIT)
    assert pipeline.receive(WAIT).number == 4


def test_workers_tell_what_they_did(pipeline, llama):
    load(pipeline, llama, 2)
    pipeline.trace(True)
    for number in range(3):
        pipeline.send(one_row(number))
        pipeline.receive(WAIT)
    stats = pipeline.stats()
    assert [(each.steps, each.rows) for each in stats] == [(3, 3), (3, 3)]
    assert all(0 < each.busy_seconds < each.seconds and each.memory_bytes > 2**20 for each in stats)
    time.sleep(0.1)  # what is sent is received before its span is over
    first, last = pipeline.spans()
    assert {span.name for span in last} == {"hop", "wait", "compute", "send"}
    assert {span.name for span in first} == {"hop", "ring", "wait", "compute", "send", "head"}


def test_nobody_else_can_feed_a_worker(pipeline, llama):
    load(pipeline, llama, 2)
    ports = {
        connection.laddr.port
        for info in pipeline.infos[:2]
        for connection in psutil.Process(info.pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.ip == LOOPBACK
    }
    assert len(ports) >= 2
    for port in ports:
        with pytest.raises(WorkerError, match="did not let us in"):
            knock((LOOPBACK, port), Hello(Role.DRIVER, 10**6), new_secret(), seconds=2)
    pipeline.send(one_row(0))
    assert pipeline.receive(WAIT).number == 0


def threads_and_cores(pipeline, count):
    import ray

    def ask(_):
        return torch.get_num_threads(), os.sched_getaffinity(0)

    return ray.get([worker.__ray_call__.remote(ask) for worker in pipeline._workers[:count]])


def test_a_stage_is_loaded_by_the_worker_whose_device_the_plan_names(pipeline, llama):
    """A plan may put its stages on unlike devices in another order than theirs."""
    import ray

    told = {info.pid: info for info in pipeline.infos}
    unlike = [replace(info, device=replace(info.device, model=f"CPU {i}")) for i, info in enumerate(pipeline.infos)]
    pipeline.infos[:] = unlike
    try:
        there = pipeline.devices()
        plan = make_plan(find_model(llama, Int8Config(dtype="float32")).spec, there[:2], WORK)
        stages = zip(plan.stages, (there[2], there[0]), strict=True)
        plan = replace(plan, stages=tuple(replace(stage, device=device) for stage, device in stages))
        pipeline.load(plan, progress=False)
        assert [info.device.model for info in pipeline.infos] == ["CPU 2", "CPU 0", "CPU 1"]
        pids = [ray.get(worker.describe.remote()).pid for worker in pipeline._workers]
        assert pids == [info.pid for info in pipeline.infos] == [unlike[i].pid for i in (2, 0, 1)]
        assert [stats.memory_bytes > 0 for stats in pipeline.stats()] == [True, True]
        pipeline.send(one_row(0))
        assert pipeline.receive(WAIT).number == 0
    finally:
        pipeline.infos[:] = [told[info.pid] for info in pipeline.infos]


def test_workers_of_a_box_share_its_cores(pipeline, llama):
    cores = os.sched_getaffinity(0)
    for count in (1, 2, 3):
        load(pipeline, llama, count)
        found = threads_and_cores(pipeline, count)
        assert [threads for threads, _ in found] == [max(1, len(cores) // count)] * count
        if len(cores) >= count:
            assert set().union(*(theirs for _, theirs in found)) == cores
            assert sum(len(theirs) for _, theirs in found) == len(cores)


def test_each_worker_reads_its_own_bytes_only_and_tied_weights_once(pipeline, smollm2):
    _, reports = load(pipeline, smollm2, 2)
    checkpoint = open_checkpoint(smollm2)
    read = [set(), set()]
    for i, report in enumerate(reports):
        for file, start, stop in report.byte_ranges:
            read[i] |= {
                tensor.name
                for tensor in checkpoint.tensors.values()
                if tensor.file.name == file and tensor.start < stop and start < tensor.stop
            }
        assert report.bytes_read == sum(stop - start for _, start, stop in report.byte_ranges)
    assert not read[0] & read[1]
    assert read[0] | read[1] == checkpoint.tensors.keys()
    assert "model.embed_tokens.weight" in read[0] and "model.norm.weight" in read[1]
    assert sum(report.bytes_read for report in reports) == checkpoint.weight_bytes


def test_workers_hold_the_bytes_that_were_planned(pipeline, tmp_path):
    save_tiny("phi", False, tmp_path)
    plan, reports = load(pipeline, tmp_path, 3)
    assert [sum(r.device_bytes.values()) for r in reports] == [stage.weight_bytes for stage in plan.stages]


def test_a_damaged_checkpoint_is_a_checkpoint_error_and_nothing_stays_loaded(pipeline, tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny("llama", True, tmp_path, shard="10GB")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][7, 7] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.up_proj"):
        load(pipeline, tmp_path, 2)
    with pytest.raises(WorkerError, match="no model is loaded"):
        pipeline.send(one_row(0))


def test_the_local_cluster_and_its_workers_listen_on_loopback_only(pipeline, llama):
    load(pipeline, llama, 3)
    ours = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    listening = [c for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN and c.pid in ours]
    assert len(listening) > 3
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} <= {"127.0.0.1", "::1"}


def test_too_many_workers_for_the_cluster_are_refused(pipeline):
    with pytest.raises(WorkerError, match="gpus=2: the cluster has 0 GPUs"):
        Pipeline(2, Cluster("cuda"))
    with pytest.raises(WorkerError, match="gpus=4000"):
        Pipeline(4000, Cluster("cpu"))
