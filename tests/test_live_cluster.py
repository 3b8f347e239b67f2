"""A Ray cluster of two nodes that runs: it is planned for as it was measured, and stages go where the plan has them.

Both nodes are on this machine. One keeps what it offloads in /dev/shm, so that their disks differ.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import assert_refused
from folders import save_tokenizer
from rich.console import Console
from tiny import save_tiny

from bigint8 import launch, plan_command
from bigint8.plan.clusters import load_cluster
from bigint8.plan.devices import Box
from bigint8.run import cluster as ray_cluster
from bigint8.terminal.cluster_table import print_cluster
from bigint8.units import GIB

SHM = Path("/dev/shm")

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
size = 2**27
head = dict(num_cpus=2, object_store_memory=size, include_dashboard=False)
cluster = Cluster(initialize_head=True, head_node_args=head)
cluster.add_node(num_cpus=2, object_store_memory=size, env_vars={"BIGINT8_CACHE": sys.argv[1]})
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
"""Runs a cluster until its stdin ends."""

STAGES = """
import json, sys, threading
from dataclasses import replace
import ray
from bigint8 import Int8Config
from bigint8.options import Cluster, Workload
from bigint8.plan.draft import Draft
from bigint8.plan.offload import spill_of_boxes
from bigint8.run.nodes import measure_link, read_cluster_at
from bigint8.run import placement
from bigint8.run.cluster import connect
from bigint8.run.pipeline import Pipeline
from bigint8.run.placement import Reserved
from bigint8.session import find_model
folder, address = sys.argv[1:]
cluster = Cluster("cpu", address)
spec, work = find_model(folder, Int8Config(dtype="float32")).spec, Workload(context=64)

def where(pipeline, count):
    return [ray.get(worker.describe.remote()).node for worker in pipeline._workers[:count]]

def planned(devices):
    cuts = [*range(len(devices)), len(spec.known_layout.blocks)]
    return Draft(spec, work, "float32", len(devices), spill_of_boxes(spec)).plan(cuts, devices)

found = {}
with Pipeline(4, cluster) as pipeline:
    there = pipeline.devices()
    found["boxes"] = [device.box.name for device in there]
    found["nodes"] = where(pipeline, 4)
    by_box = dict(zip(found["boxes"], found["nodes"]))
    found["disk"] = [device.box.disk_bytes for device in there]
    first, second = sorted(set(found["nodes"]))
    found["link"] = measure_link(first, second).bytes_per_s
    found["links"] = [device.box.network_bytes_per_s for device in there]
    plan = planned([there[2], there[3], there[0], there[1]])  # in another order than the workers'
    pipeline.load(plan, progress=False)
    found["planned"] = [by_box[stage.device.box.name] for stage in plan.stages]
    found["loaded"] = where(pipeline, 4)
with Pipeline(2, cluster) as pipeline:  # a plan that knows the boxes by name only
    of_names = [replace(d, usable_bytes=d.usable_bytes - 7) for d in reversed(pipeline.devices())]
    plan = planned(of_names)
    pipeline.load(plan, progress=False)
    found["named"] = [by_box[stage.device.box.name] for stage in plan.stages]
    found["loaded by name"] = where(pipeline, 2)
with Pipeline(None, cluster) as pipeline:
    found["default"] = where(pipeline, 9)
connect(None, address)
held = Reserved("cpu", 3)  # of one node both places, of the other one
threading.Timer(2, held.free).start()
with Pipeline(2, cluster) as pipeline:
    found["waited"] = where(pipeline, 2)
held = Reserved("cpu", 3)
placement.CHOSEN_SECONDS = 1
with Pipeline(1, cluster) as pipeline:
    found["left"] = where(pipeline, 1)
    found["held"] = held.nodes()
print(json.dumps(found))
"""
"""Says where workers are on the cluster, and where their stages are after a load."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of a cluster and of those who connect to it: everything listens on loopback."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # tmp_path is too long for Ray's sockets
        own = {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "BIGINT8_CACHE": str(tmp_path_factory.mktemp("cache")),
            "COLUMNS": "200",
        }
        yield {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | own


@pytest.fixture(scope="module")
def address(environment: dict[str, str]) -> Iterator[str]:
    command = [sys.executable, "-c", CLUSTER, str(SHM)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None and process.stdout is not None
    try:
        found = process.stdout.readline().strip()
        assert found, "the cluster did not start"
        yield found
    finally:
        process.stdin.close()
        process.wait(120)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", False, tmp_path_factory.mktemp("llama"))
    save_tokenizer(folder)
    return folder


def run_there(environment: dict[str, str], *words: object) -> str:
    """What a process of Python prints that ends well."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def free(folder: Path | str) -> float:
    return float(shutil.disk_usage(folder).free)


def test_stages_are_on_the_nodes_that_the_plan_has_them_on(environment, address, llama):
    found = json.loads(run_there(environment, "-c", STAGES, llama, address).splitlines()[-1])
    one, _, two, _ = found["nodes"]
    assert one != two and found["nodes"] == [one, one, two, two]  # neighbours share a box
    assert len(set(found["boxes"])) == 2
    assert found["planned"] == found["loaded"] == [two, two, one, one]
    assert found["named"] == found["loaded by name"] == [two, one]
    assert sorted(found["default"]) == sorted([one, two])
    assert sorted(found["waited"]) == sorted([one, two])  # places that are given back at that moment
    assert sorted([*found["held"], *found["left"]]) == sorted([one, one, two, two])  # others keep theirs
    assert found["links"] == [found["link"]] * 4 and found["link"] != Box().network_bytes_per_s
    free_there = sorted([free(SHM), free(environment["BIGINT8_CACHE"])])
    assert sorted({disk // 2**30 for disk in found["disk"]}) == pytest.approx([f // 2**30 for f in free_there], abs=1)


def test_a_plan_is_for_the_boxes_that_were_read(environment, address, llama, tmp_path):
    file = tmp_path / "plan.json"
    plan = ["-m", "bigint8.plan", llama, "--address", address, "--context", 64, "--json", file]
    out = run_there(environment, *plan, "--gpus", 4)
    assert "Ray cluster: 2 boxes" in out and "latency us" in out and out.count("2 x ") >= 2
    stages = json.loads(file.read_text())["plan"]["stages"]
    assert {stage["device"]["box"]["network_bytes_per_s"] for stage in stages} != {Box().network_bytes_per_s}
    device_map = json.loads(run_there(environment, *plan, "--gpus", 1, "--device-map"))
    assert set(device_map.values()) == {"cpu"}


def test_a_launch_runs_over_both_nodes(environment, address, llama, tmp_path):
    file = tmp_path / "launch.json"
    command = ["-m", "bigint8.launch", "--model", llama, "--address", address, "--context", 64, "--max-new-tokens", 3]
    out = run_there(environment, *command, "--raw", "--prompt", "a b", "--json", file)
    assert "Ray cluster: 2 boxes" in out
    written = json.loads(file.read_text())
    boxes = [stage["device"]["box"]["name"] for stage in written["plan"]["stages"]]
    assert len(written["load"]) == len(boxes) == len(set(boxes)) and all(f"{box}/cpu" in out for box in boxes)
    assert written["generations"][0]["text"]


def test_a_process_that_reads_a_cluster_leaves_it(environment, address):
    program = (
        "import sys, ray; from bigint8.run.nodes import read_cluster_at\n"
        "assert len(read_cluster_at(sys.argv[1]).boxes) == 2 and not ray.is_initialized()\n"
        "assert len(read_cluster_at(sys.argv[1], count=1).boxes) == 1\n"
    )
    run_there(environment, "-c", program, address)


def test_the_table_has_what_boxes_hold_and_links_only_between_several(capsys):
    devices = load_cluster("mixed-3060-3090-4090").devices
    boxes = list({device.box: None for device in devices})
    assert len(boxes) > 1 and boxes[0].host_bytes > 0
    print_cluster(Console(width=200), devices)
    out = capsys.readouterr().out
    for box in boxes:
        (line,) = [line for line in out.splitlines() if line.startswith(f" {box.name} ")]
        assert f" {box.host_bytes / GIB:.1f} " in line and f" {box.network_bytes_per_s / 1e9:.3g} " in line
    alone = [device for device in devices if device.box == boxes[0]]
    print_cluster(Console(width=200), alone)
    out = capsys.readouterr().out
    assert "1 box;" in out and boxes[0].name in out and "link" not in out


# --- what cannot be read ---------------------------------------------------------------------------------------------


def test_more_devices_than_the_cluster_has_are_refused_with_the_flag(environment, address, llama):
    command = [sys.executable, "-m", "bigint8.launch", "--model", str(llama), "--plan-only", "--address", address]
    for flags, said in (
        (["--gpus", "9"], "error: --gpus 9: the cluster has 4 CPUs"),
        (
            ["--device", "cuda"],
            "error: --device cuda: the cluster has 0 GPUs, as Ray counts them; ray start --num-gpus",
        ),
    ):
        done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stderr.startswith(said), done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--address", "127.0.0.1:1"], "--address 127.0.0.1:1: no Ray cluster answers"),
        (["--address", "127.0.0.1:99999"], "--address 127.0.0.1:99999: no Ray cluster answers"),
        (["--address", "127.0.0.1:1", "--gpu-type", "rtx-3090"], "leave out --cluster and --gpu-type"),
        (["--address", "127.0.0.1:1", "--cluster", "8x-rtx3090"], "leave out --cluster and --gpu-type"),
    ],
    ids=["refused", "no port", "GPU type", "cluster"],
)
def test_an_address_that_is_wrong_is_told_at_once(run, arguments, said, monkeypatch):
    """Ray would try for minutes."""
    monkeypatch.setattr(ray_cluster.ray, "is_initialized", lambda: False)  # other tests' workers may run
    monkeypatch.setattr(ray_cluster.ray, "init", lambda **_: pytest.fail("Ray was started"))
    assert_refused(run(plan_command, "opt-125m", *arguments), said)
    assert_refused(run(launch, "--model", "opt-125m", "--plan-only", *arguments), said)


def test_the_address_auto_is_that_of_the_environment(run, monkeypatch):
    monkeypatch.setattr(ray_cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_cluster.ray, "init", lambda **_: pytest.fail("Ray was started"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    refused = run(plan_command, "opt-125m", "--address", "auto")
    assert_refused(refused, "--address auto: no Ray cluster answers at ", ":1 (")  # Ray may name it by another address
