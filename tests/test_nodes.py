"""A live Ray cluster as boxes and devices: what its nodes say of themselves, and what is measured between them."""

import socket

import pytest
import ray

from bigint8 import WorkerError
from bigint8.options import Workload
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import HOST_RESERVE_BYTES, Device, available_memory, cpu_device, cuda_devices
from bigint8.run import nodes
from bigint8.run.doors import LOOPBACK, Door, Hello, Role, knock, new_secret
from bigint8.run.nodes import LINK_BYTES, boxes_of, look, measure_link, read_cluster, send_over
from bigint8.session import find_model
from bigint8.units import GIB


def test_the_nodes_of_a_cluster_are_boxes_with_their_devices(pipeline):
    cluster = read_cluster()
    (box,) = cluster.boxes
    assert box.name == socket.gethostname()
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
    """What Ray would bring from three nodes, two of which have GPUs and share a host."""
    gpu = Device("cuda:0", "NVIDIA GeForce RTX 3090", 24 * GIB, "bfloat16")
    one_more = Device("cuda:1", "NVIDIA GeForce RTX 3060", 12 * GIB, "bfloat16")
    there = {
        "b" * 56: nodes.Node("b" * 56, "tower", 64 * GIB, cpu_device(), (gpu, one_more)),
        "a" * 56: nodes.Node("a" * 56, "tower", 32 * GIB, cpu_device(), (gpu,)),
        "c" * 56: nodes.Node("c" * 56, "laptop", 16 * GIB, cpu_device(), ()),
    }
    listed = [
        {"Alive": True, "NodeID": node.id, "NodeManagerHostname": node.host, "Resources": {"GPU": len(node.gpus)}}
        for node in there.values()
    ]
    listed.append({"Alive": False, "NodeID": "d" * 56, "NodeManagerHostname": "gone", "Resources": {}})
    speeds = {"b" * 56: nodes.LinkSpeed(1e9, 4e-5), "a" * 56: nodes.LinkSpeed(1e8, 2e-4)}
    monkeypatch.setattr(ray, "nodes", lambda: listed)
    monkeypatch.setattr(nodes, "_on", lambda node, _: _Answers(there[node]))
    monkeypatch.setattr(nodes, "_get", lambda reference, _: reference)
    monkeypatch.setattr(nodes, "measure_link", lambda first, second: speeds[second])
    cluster = read_cluster()
    assert [(device.name, device.box.name) for device in cluster.devices] == [
        ("cuda:0", "tower (aaaaaaaa)"),
        ("cuda:1", "tower (bbbbbbbb)"),
        ("cuda:2", "tower (bbbbbbbb)"),
    ]
    assert [box.host_bytes // GIB for box in cluster.boxes] == [31, 62]
    assert [box.network_bytes_per_s for box in cluster.boxes] == [1e8, 1e9]
    assert [box.network_seconds for box in cluster.boxes] == [1e-4, 2e-5]


class _Answers:
    def __init__(self, node):
        self._node = node

    def remote(self, gpus):
        assert gpus == len(self._node.gpus)
        return self._node


def test_a_node_without_gpus_in_ray_shows_none_and_its_environment_stays(pipeline, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = look(0)
    assert found.gpus == () and found.host == socket.gethostname()
    assert nodes.os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_link_is_measured_between_tasks_of_ray(pipeline):
    node = ray.get_runtime_context().get_node_id()
    speed = measure_link(node, node)
    assert 0 < speed.seconds < 1 and speed.bytes_per_s > 1e6
    assert measure_link(node, node) is speed  # once


def test_a_link_to_a_node_that_is_gone_says_which(pipeline, monkeypatch):
    monkeypatch.setattr(nodes, "NODE_SECONDS", 5)
    with pytest.raises(WorkerError, match=f"node {'e' * 56}"):
        measure_link(ray.get_runtime_context().get_node_id(), "e" * 56)


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
