"""`python -m bigint8.plan`: what it prints and writes, and what it refuses."""

import json
import subprocess
import sys

import pytest
from commands import assert_refused

from bigint8 import plan_command
from bigint8.options import Workload
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import preset_gpus
from bigint8.plan.predict import predict
from bigint8.plan.spec import spec_of
from bigint8.sources.find import find_source


def planned(name, gpus, workload=None):
    return make_plan(spec_of(find_source(name, fetch=False)), gpus, workload or Workload())


def test_it_prints_the_plan_with_its_times_and_writes_them(run, tmp_path):
    ended = run(
        plan_command, "opt-13b", "--gpus", "2", "--gpu-type", "rtx-3060", "--batch-size", "4", "--json",
        tmp_path / "plan.json",
    )  # fmt: skip
    plan = planned("opt-13b", preset_gpus("rtx-3060", 2), Workload(sequences=4))
    times = predict(plan)
    assert (ended.code, ended.error) == (0, "")
    assert f"{times.tokens_per_s:.1f} tokens/s with 4 at once" in ended.out and "Computed, not measured." in ended.out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["plan"]["stages"][1]["last_block"] == plan.stages[1].last_block == 40
    assert written["times"]["tokens_per_s"] == pytest.approx(times.tokens_per_s)


def test_a_cluster_is_planned_by_name_and_by_file(run, tmp_path):
    named = run(plan_command, "llama-65b", "--cluster", "mixed-3060-3090-4090")
    assert named.code == 0 and "RTX 4090" in named.out
    (tmp_path / "mine.yaml").write_text("boxes: {desk: 2 x rtx-3090}\n")
    mine = run(plan_command, "llama-13b", "--cluster", tmp_path / "mine.yaml")
    assert mine.code == 0 and "2 x NVIDIA GeForce RTX 3090" in mine.out


def test_latency_and_throughput_are_different_plans(run):
    cluster = "mixed-3060-3090-4090"
    outs = [
        run(plan_command, "llama-7b", "--cluster", cluster, "--objective", objective).out
        for objective in ("throughput", "latency")
    ]
    assert "1 x NVIDIA GeForce RTX 4090" in outs[1] and "1 x NVIDIA GeForce RTX 4090" not in outs[0]


def test_the_device_map_is_all_that_is_printed(run):
    ended = run(plan_command, "opt-125m", "--gpus", "2", "--gpu-type", "rtx-3060", "--device-map")
    assert json.loads(ended.out) == planned("opt-125m", preset_gpus("rtx-3060", 2)).device_map()


def test_it_draws_simulates_and_compares(run, tmp_path):
    ended = run(
        plan_command, "opt-6.7b", "--gpus", "2", "--gpu-type", "rtx-3060", "--context", "512", "--compare",
        "accelerate", "--simulate", "--requests", "5", "--prompt-tokens", "60", "--new-tokens", "20", "--picture",
        tmp_path / "plan.svg", "--json", tmp_path / "plan.json",
    )  # fmt: skip
    assert ended.code == 0, ended.error
    assert "accelerate" in ended.out and "simulated: 5 requests, all at once" in ended.out
    assert "stage 1" in (tmp_path / "plan.svg").read_text()
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["simulated"]["done"] == 5 and sum(written["compared"]["theirs"]["blocks"]) == 32


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["opt-125m", "--gpus", "2", "--gpu-type", "rtx-3009"], "did you mean rtx-3090"),
        (["opt-125m", "--cluster", "8x-rtx309"], "did you mean 8x-rtx3090"),
        (["opt-125m", "--cluster", "8x-rtx3090", "--gpus", "2"], "leave out --gpus"),
        (["opt-125m", "--gpus", "2", "--gpu-type", "rtx-3090", "--context", "4096"], "--context 4096 is longer"),
        (["opt-125m", "--gpus", "2", "--gpu-type", "rtx-3090", "--picture", "plan.bmp"], "plan.bmp: "),
        (["opt-66b", "--gpus", "1", "--gpu-type", "rtx-3090"], "opt-66b does not fit"),
        (["opt-125m", "--gpus", "1", "--gpu-type", "rtx-3090", "--simulate", "--rate", "-1"], "--rate -1: "),
    ],
    ids=["GPU", "cluster", "cluster and GPUs", "context", "picture", "does not fit", "rate"],
)
def test_a_mistake_is_told_in_one_line(run, arguments, said):
    assert_refused(run(plan_command, *arguments), said)


def test_no_gpus_are_refused_by_the_command_line(run):
    ended = run(plan_command, "opt-125m", "--gpus", "0")
    assert ended.code == 2 and "--gpus" in ended.error


def test_it_is_a_module_and_a_subcommand():
    for command in (["bigint8.plan"], ["bigint8", "plan"]):
        options = ["opt-125m", "--gpus", "1", "--gpu-type", "rtx-3090"]
        done = subprocess.run([sys.executable, "-m", *command, *options], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "tokens/s with 1 at once" in done.stdout, done.stderr
