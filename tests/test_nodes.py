"""A live Ray cluster as boxes and devices: what its nodes say of themselves, and what is measured between them."""

import contextlib
import ipaddress
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
import ray

from bigint8 import WorkerError
from bigint8.options import Workload
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import HOST_RESERVE_BYTES, Box, Device, available_memory, cpu_device, cuda_devices
from bigint8.run import nodes, tasks
from bigint8.run.doors import LOOPBACK, Door, Hello, Role, knock, new_secret
from bigint8.run.nodes import LINK_BYTES, boxes_of, look, measure_link, read_cluster, send_over
from bigint8.run.placement import share_out
from bigint8.session import find_model
from bigint8.units import GIB


def test_the_nodes_of_a_cluster_are_boxes_with_their_devices(pipeline):
    cluster = read_cluster("cpu")
    (box,) = cluster.boxes
    assert box.name == socket.gethostname() and box.disk_bytes > 0
    if not cuda_devices():
        (device,) = cluster.devices
        assert (device.name, device.model, device.box) == ("cpu", cpu_device().model, box)
        assert 0.5 * available_memory() < device.usable_bytes + HOST_RESERVE_BYTES < 2 * available_memory()
    plan = make_plan(find_model("opt-125m").spec, list(cluster.devices), Workload())
    assert plan.stages[0].device.box == box


def test_workers_of_one_node_share_a_box(pipeline):
    devices = pipeline.devices()
    assert len(devices) == 3 and len({device.box for device in devices}) == 1
    assert devices[0].box.name == socket.gethostname()


def test_gpus_of_nodes_are_counted_over_all_boxes_and_leave_their_hosts_some_memory(monkeypatch):
    """What Ray would bring from four nodes, two of which share a host and one of which has no GPU."""
    gpu = Device("cuda:0", "NVIDIA GeForce RTX 3090", 24 * GIB, "bfloat16")
    one_more = Device("cuda:1", "NVIDIA GeForce RTX 3060", 12 * GIB, "bfloat16")
    there = {
        "b" * 56: nodes.Node("b" * 56, "tower", 64 * GIB, 900 * GIB, cpu_device(), (gpu, one_more)),
        "a" * 56: nodes.Node("a" * 56, "tower", 32 * GIB, 100 * GIB, cpu_device(), (gpu,)),
        "f" * 56: nodes.Node("f" * 56, "vault", 16 * GIB, 10 * GIB, cpu_device(), (gpu,)),
        "c" * 56: nodes.Node("c" * 56, "laptop", 16 * GIB, 50 * GIB, cpu_device(), ()),
    }
    listed = [
        {"Alive": True, "NodeID": node.id, "NodeManagerHostname": node.host, "Resources": {"GPU": len(node.gpus)}}
        for node in there.values()
    ]
    listed.append({"Alive": False, "NodeID": "d" * 56, "NodeManagerHostname": "gone", "Resources": {}})
    speeds = {"b" * 56: nodes.LinkSpeed(1e9, 4e-5), "f" * 56: nodes.LinkSpeed(1e8, 2e-4)}
    monkeypatch.setattr(ray, "nodes", lambda: listed)
    monkeypatch.setattr(nodes, "on_node", lambda node, _: _Answers(there[node]))
    monkeypatch.setattr(nodes, "answer_of", lambda reference, _: reference)
    monkeypatch.setattr(nodes, "check_nodes", lambda _: None)
    monkeypatch.setattr(nodes, "measure_link", lambda first, second: speeds[second])
    cluster = read_cluster()
    assert [(device.name, device.box.name) for device in cluster.devices] == [
        ("cuda:0", "tower (aaaaaaaa)"),
        ("cuda:1", "tower (bbbbbbbb)"),
        ("cuda:2", "tower (bbbbbbbb)"),
        ("cuda:3", "vault"),
    ]
    assert [box.host_bytes // GIB for box in cluster.boxes] == [31, 62, 15]
    assert [box.disk_bytes // GIB for box in cluster.boxes] == [100, 900, 10]
    assert [box.network_bytes_per_s for box in cluster.boxes] == [1e9, 1e9, 1e8]  # one is as fast as the fastest
    assert [box.network_seconds for box in cluster.boxes] == [2e-5, 2e-5, 1e-4]
    (box,) = read_cluster(count=2).boxes  # as few boxes as hold them
    assert (box.name, box.network_bytes_per_s) == ("tower", Box().network_bytes_per_s)
    with pytest.raises(WorkerError, match="gpus=5: the cluster has 4 GPUs"):
        read_cluster(count=5)
    there["a" * 56] = replace(there["a" * 56], gpus=())
    with pytest.raises(WorkerError, match="node tower: Ray has 1 GPUs to give there, and 0 can be seen"):
        read_cluster()


class _Answers:
    def __init__(self, node):
        self._node = node

    def remote(self, gpus):
        assert gpus <= len(self._node.gpus) or not self._node.gpus
        return replace(self._node, gpus=self._node.gpus[:gpus])


def test_a_node_without_gpus_in_ray_shows_none_and_its_environment_stays(pipeline, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = look(0)
    assert found.gpus == () and found.host == socket.gethostname()
    assert nodes.os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_nothing_of_a_local_pipeline_listens_beyond_loopback(pipeline, source):
    """Neither the driver, nor the workers with their links, nor any process of Ray."""
    plan = make_plan(find_model(source).spec, pipeline.devices(), Workload(context=64))
    pipeline.load(plan, progress=False)
    driver, where = psutil.Process(), {}
    for process in [driver, *driver.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # a task that has ended
            there = [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            where[process.pid] = process.name(), [ipaddress.ip_address(ip.removeprefix("::ffff:")) for ip in there]
    assert {"gcs_server", "raylet"} <= {name for name, _ in where.values()}
    for info in pipeline.infos[: len(plan.stages)]:
        assert len(where[info.pid][1]) >= 2  # Ray's, and the door of the stage
    for name, addresses in where.values():
        assert all(address.is_loopback for address in addresses), name


TWO_CLUSTERS = """
import json, os, subprocess, sys, ray
from ray._raylet import AuthenticationTokenLoader as Loader
from bigint8.run.cluster import connect
tokens, said = [], []
for _ in range(2):
    connect(1, None)
    tokens.append(Loader.instance().get_raw_token(ignore_auth_mode=True))
    if len(tokens) < 2:
        ray.shutdown()
program = "import sys; from bigint8.run.cluster import connect; connect(None, sys.argv[1])"
words = [sys.executable, "-c", program, ray.get_runtime_context().gcs_address]
for own in ({}, *({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} for token in ("", *tokens))):
    done = subprocess.run(words, env=os.environ | own, capture_output=True, text=True)
    said.append(done.stderr.splitlines()[-1] if done.returncode else "")
after_one_of_its_own = (
    "import os, sys; from bigint8.run.cluster import connect, leave; connect(1, None); leave();"
    "os.environ.update(RAY_AUTH_MODE='token', RAY_AUTH_TOKEN=sys.argv[2]); connect(None, sys.argv[1])"
)
words = [sys.executable, "-c", after_one_of_its_own, words[-1], tokens[-1]]
done = subprocess.run(words, capture_output=True, text=True)
said.append(done.stderr.splitlines()[-1] if done.returncode else "")
ray.shutdown()
left = [name for name in os.environ if name.startswith("RAY_AUTH")]
print(json.dumps({"tokens": tokens, "said": said, "left": left}))
"""
"""Starts two clusters, one after the other, and tries to connect to the second with no token and with each."""


def test_a_local_cluster_has_a_token_of_its_own_and_leaves_the_home_folder_alone(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # all are on loopback
    command = [sys.executable, "-c", TWO_CLUSTERS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    first, second = found["tokens"]
    assert first != second and len(second) == 64
    assert found["left"] == [] and not (tmp_path / ".ray").exists()
    without, empty, other, right, later = found["said"]
    assert "asks for its token, and RAY_AUTH_MODE is not 'token', so none was sent" in without
    assert "asks for its token, and there is none here; set RAY_AUTH_MODE" in empty
    assert "asks for its token, and the one that was sent is not its own" in other
    assert right == later == ""


def test_a_link_is_measured_between_tasks_of_ray(pipeline):
    node = ray.get_runtime_context().get_node_id()
    speed = measure_link(node, node)
    assert 0 < speed.seconds < 1 and speed.bytes_per_s > 1e6
    assert measure_link(node, node) is speed  # once


def test_a_link_to_a_node_that_is_gone_says_which(pipeline, monkeypatch):
    monkeypatch.setattr(tasks, "NODE_SECONDS", 5)
    with pytest.raises(WorkerError, match=f"node {'e' * 56}"):
        measure_link(ray.get_runtime_context().get_node_id(), "e" * 56)


def test_a_node_that_does_not_answer_is_named(pipeline, monkeypatch):
    monkeypatch.setattr(tasks, "NODE_SECONDS", 0.0)
    with pytest.raises(
        WorkerError, match=rf"node {socket.gethostname()} \(.*\) did not answer within 0.0 s; ray status"
    ):
        read_cluster("cpu")


def test_a_link_that_a_firewall_closes_is_told_with_both_nodes(pipeline, monkeypatch):
    """Nothing listens where the far end says that it does."""
    node = ray.get_runtime_context().get_node_id()

    class Nowhere:
        def __init__(self, _):
            with socket.create_server(("127.0.0.1", 0)) as listening:
                self.there = listening.getsockname()

        def address(self):
            return self.there

    monkeypatch.setattr(nodes, "LinkEnd", Nowhere)
    measure_link.cache_clear()
    host = socket.gethostname()
    with pytest.raises(WorkerError, match=rf"node {host} .* does not reach node {host} .* refused.* firewalls"):
        measure_link(node, node)


@pytest.mark.parametrize(
    ("kind", "workers", "shares"),
    [
        ("cuda", 2, {"b": 2}), ("cuda", 5, {"b": 4, "c": 1}), ("cuda", 7, {"a": 1, "b": 4, "c": 2}),
        ("cpu", 1, {"a": 1}), ("cpu", 3, {"a": 1, "b": 1, "c": 1}), ("cpu", 5, {"a": 1, "b": 2, "c": 2}),
    ],
)  # fmt: skip
def test_gpus_are_taken_from_few_nodes_and_cpus_from_many(kind, workers, shares):
    assert share_out({"a": 1, "b": 4, "c": 2}, workers, kind) == shares


@pytest.fixture
def end():
    """The far end of a link, in this process: where, and the secret."""
    secret = new_secret()
    door = Door(LOOPBACK, secret, nodes._answer)
    yield door.address, secret
    door.close()


def test_who_does_not_know_the_secret_measures_nothing(end):
    address, _ = end
    with pytest.raises(WorkerError, match="did not let us in"):
        send_over(address, new_secret())


@pytest.mark.parametrize("size", [-1, LINK_BYTES + 1, 2**62])
def test_the_far_end_takes_no_message_that_is_too_long(end, size):
    address, secret = end
    connection = knock(address, Hello(Role.DRIVER, 0), secret)
    connection.sendall(nodes._SIZE.pack(size))
    connection.settimeout(10)
    assert connection.recv(1) == b""
    connection.close()


def test_a_link_that_breaks_is_told():
    secret = new_secret()
    door = Door(LOOPBACK, secret, lambda connection, _: bool(nodes.welcome(connection)))
    with pytest.raises(WorkerError, match=r"the link to 127\.0\.0\.1:[0-9]+ broke"):
        send_over(door.address, secret)
    door.close()


def test_boxes_are_named_for_their_hosts_and_told_apart():
    named = boxes_of([("11112222x", "a"), ("11112222x", "a"), ("33334444x", "b"), ("55556666x", "b")])
    assert [box.name for box in named.values()] == ["a", "b (33334444)", "b (55556666)"]
