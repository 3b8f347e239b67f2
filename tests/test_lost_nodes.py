"""Nodes and drivers that are killed or stopped: workers go elsewhere, no token changes, and nothing stays behind."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tiny import save_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny("llama", True, tmp_path_factory.mktemp("llama"))


# --- nodes ---------------------------------------------------------------------------------------------------------

NODES = """
import json, signal, sys
from dataclasses import replace
import psutil
from ray.cluster_utils import Cluster as RayCluster
from bigint8 import BigInt8Error, Int8Config
from bigint8.options import Cluster, Workload
from bigint8.plan.cut import make_plan
from bigint8.run.engine import Engine
from bigint8.run.pipeline import Pipeline
from bigint8.run.settings import Settings
from bigint8.session import find_model

folder, how = sys.argv[1:]
one = dict(num_cpus=1, object_store_memory=2**27)
cluster = RayCluster(initialize_head=True, head_node_args={**one, "include_dashboard": False})
others = {node.node_id: node for node in (cluster.add_node(**one), cluster.add_node(**one))}
cluster.wait_for_nodes()

def answers(engine, fault=lambda: None):
    completions = [engine.submit(prompt, Settings(60)) for prompt in ([5, 17, 99], [3, 42, 7, 8])]
    for count, _ in enumerate(completions[0], 1):
        if count == 10:
            fault()
    return [completion.result(200).tokens for completion in completions]

def end(pipeline):
    "Kill or stop all processes of a node that has a worker, but for the first node, where this runs."
    index = next(i for i, info in enumerate(pipeline.infos[:2]) if info.node in others)
    raylet = psutil.Process(others.pop(pipeline.infos[index].node).all_processes["raylet"][0].process.pid)
    for process in [raylet, *raylet.children(recursive=True)]:
        process.send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        ended.append(process)
    return index

ended, found = [], {}
with Pipeline(2 if how == "killed" else 3, Cluster("cpu", cluster.address)) as pipeline:
    spec = find_model(folder, Int8Config(dtype="float32", activations="16bit")).spec
    plan = make_plan(spec, pipeline.devices()[:2], Workload(context=128, sequences=2))
    pipeline.load(plan, progress=False)
    with Engine.of(plan, pipeline) as engine:
        expected, before = answers(engine), list(pipeline.infos)
        lost = []
        found["same"] = answers(engine, lambda: lost.append(end(pipeline))) == expected
        after, (index,) = list(pipeline.infos[:2]), lost
        found["others stay"] = all(i == index or a.pid == b.pid for i, (a, b) in enumerate(zip(after, before)))
        found["moved"] = after[index].node != before[index].node
        if how == "killed":  # there is a place, where the stage does not fit
            cluster.add_node(**one)
            pipeline._plan = replace(plan, stages=tuple(replace(stage, kv_bytes=10**18) for stage in plan.stages))
        try:
            answers(engine, lambda: end(pipeline))
        except BigInt8Error as error:
            found["error"] = str(error)
    for process in ended:
        if process.is_running():
            process.kill()
cluster.shutdown()
print(json.dumps(found))
"""
"""A cluster of three nodes with a CPU each. The third is free, or has a worker that is not needed."""


@pytest.fixture
def environment(tmp_path) -> Iterator[dict[str, str]]:
    """Of a cluster and of those who connect to it: on loopback; a node that says nothing is given up after seconds."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # tmp_path is too long for Ray's sockets
        own = {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        }
        yield {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | own


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_node_that_is_gone_loses_its_worker_to_another_node_and_no_token_changes(llama, how, environment):
    command = [sys.executable, "-c", NODES, str(llama), how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] and found["others stay"] and found["moved"]
    if how == "killed":
        assert re.search(r"stage \d takes 10+.* GB, and worker \d \(.*\), where it would go, has ", found["error"])
    assert "is lost with its node, and no node that is left has a free CPU" in found["error"]
    assert "2 sequences were being written" in found["error"]


# --- drivers -------------------------------------------------------------------------------------------------------

DRIVER = """
import sys, time
from bigint8.options import Cluster
from bigint8.run.pipeline import Pipeline
pipeline = Pipeline(2, Cluster("cpu", *sys.argv[1:]))
print(*[info.pid for info in pipeline.infos], flush=True)
time.sleep(600)
"""

SHM = Path("/dev/shm")

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
head = dict(num_cpus=2, object_store_memory=2**27, include_dashboard=False)
cluster = Cluster(initialize_head=True, head_node_args=head)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def listeners(processes) -> set[int]:
    """The ports on which they listen."""
    pids = {process.pid for process in processes}
    return {c.laddr.port for c in psutil.net_connections("inet") if c.pid in pids and c.status == psutil.CONN_LISTEN}


def test_a_driver_that_is_killed_leaves_no_process_no_port_and_no_shared_memory(environment):
    before = set(SHM.iterdir())
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True)
    workers = driver.stdout.readline().split()
    children = psutil.Process(driver.pid).children(recursive=True)
    ports = listeners(children)
    assert len(workers) == 2 and {*map(int, workers)} < {child.pid for child in children} and ports
    driver.kill()
    driver.wait()
    assert not psutil.wait_procs(children, 30)[1]
    assert not ports & {c.laddr.port for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert set(SHM.iterdir()) <= before


def test_the_workers_of_a_driver_that_is_killed_end_on_a_cluster_that_goes_on(environment):
    piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, "-c", CLUSTER], **piped) as cluster:
        address = cluster.stdout.readline().strip()
        with subprocess.Popen([sys.executable, "-c", DRIVER, address], **piped) as driver:
            workers = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
            assert len(workers) == 2
            driver.kill()
        assert not psutil.wait_procs(workers, 30)[1]
        assert cluster.poll() is None
        cluster.stdin.close()
        cluster.wait(60)
