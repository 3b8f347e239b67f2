"""What the nodes of a Ray cluster are: boxes, the devices in them, and how fast the network between them is.

A small task on each node looks. The network is measured over a connection of our own, as steps take: from the first
node to each other one, once.
"""

import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from statistics import median
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import WorkerError, in_one_line
from ..plan.clusters import Machines
from ..plan.devices import HOST_RESERVE_BYTES, Box, Device, available_memory, cpu_device, cuda_devices
from .doors import Door, Hello, Role, knock, new_secret, welcome

NODE_SECONDS = 120
"""How long a node may take to answer: Ray starts a process there, which imports this."""

LINK_SECONDS = 20.0
"""How long anything may take on a connection that is measured."""

LINK_BYTES, LINK_SENDS, LINK_PINGS = 8 * 2**20, 3, 20
"""What is sent to measure a link, how often, and how many short messages before."""

_SIZE = struct.Struct("<q")


@dataclass(frozen=True)
class Node:
    """What a node says of itself. `host_bytes`: the memory that can be had there now, the CPU's workers' included."""

    id: str
    host: str
    host_bytes: int
    cpu: Device
    gpus: tuple[Device, ...]


@dataclass(frozen=True)
class LinkSpeed:
    """What was measured between two nodes. `seconds`: of a message of no bytes, one way."""

    bytes_per_s: float
    seconds: float


def read_cluster() -> Machines:
    """The boxes and devices of the Ray cluster that this process is connected to: GPUs, or CPUs where it has none.

    Devices are named cuda:0 and on over all boxes. Raises WorkerError for a node that does not answer.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    asked = [_on(node["NodeID"], look).remote(int(node["Resources"].get("GPU", 0))) for node in alive]
    nodes: list[Node] = [_get(one, node["NodeManagerHostname"]) for one, node in zip(asked, alive, strict=True)]
    nodes.sort(key=lambda node: (node.host, node.id))
    on_gpus = any(node.gpus for node in nodes)
    boxes = _linked(nodes, boxes_of([(node.id, node.host) for node in nodes]))
    numbers, there, devices = count(), [], []
    for node in nodes:
        inside = node.gpus if on_gpus else (node.cpu,)
        if inside:
            left = node.host_bytes - len(inside) * HOST_RESERVE_BYTES if on_gpus else 0
            box = replace(boxes[node.id], host_bytes=max(0, left))
            there.append(box)
            devices += [
                replace(device, name=f"cuda:{next(numbers)}" if on_gpus else "cpu", box=box) for device in inside
            ]
    return Machines("Ray cluster", tuple(there), tuple(devices))


def look(gpus: int) -> Node:
    """What there is on the node where this runs, of which Ray has so many GPUs to give."""
    hidden = os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # a task without a GPU is shown none
    try:
        found = cuda_devices()[:gpus] if gpus else []
    finally:
        if hidden is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = hidden
    context = ray.get_runtime_context()
    return Node(context.get_node_id(), socket.gethostname(), available_memory(), cpu_device(), tuple(found))


def boxes_of(nodes: Sequence[tuple[str, str]]) -> dict[str, Box]:
    """A box for each node, by its id, from (id, host). Its name is the host's, with the id where two share it."""
    hosts = Counter(host for _, host in set(nodes))
    return {node: Box(name=host if hosts[host] == 1 else f"{host} ({node[:8]})") for node, host in nodes}


def _linked(nodes: Sequence[Node], boxes: dict[str, Box]) -> dict[str, Box]:
    """The boxes with what was measured from the first to each other one; the first is as fast as the fastest."""
    if len(nodes) < 2:
        return boxes
    first = nodes[0].id
    speeds = {node.id: measure_link(first, node.id) for node in nodes[1:]}
    fastest = max(speeds.values(), key=lambda speed: speed.bytes_per_s)
    return {
        node: replace(box, network_bytes_per_s=speed.bytes_per_s, network_seconds=speed.seconds / 2)
        for node, box in boxes.items()
        for speed in (speeds.get(node, fastest),)
    }


# --- links ---


@cache
def measure_link(first: str, second: str) -> LinkSpeed:
    """How fast one node sends to another, by their ids in Ray. Raises WorkerError where they are not linked."""
    secret = new_secret()
    end = _on(second, LinkEnd).remote(secret)
    try:
        address = _get(end.address.remote(), second)
        found: LinkSpeed = _get(_on(first, send_over).remote(address, secret), first)
    finally:
        ray.kill(end)
    return found


class LinkEnd:
    """The actor at the far end of a link that is measured: it answers each message with one byte."""

    def __init__(self, secret: bytes) -> None:
        self._door = Door(ray.util.get_node_ip_address(), secret, _answer)

    def address(self) -> tuple[str, int]:
        return self._door.address


def _answer(connection: socket.socket, hello: Hello) -> bool:
    welcome(connection)
    connection.settimeout(LINK_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    space = memoryview(bytearray(LINK_BYTES))
    while _fill(connection, space[: _SIZE.size]):
        (size,) = _SIZE.unpack(space[: _SIZE.size])
        if not 0 <= size <= LINK_BYTES or not _fill(connection, space[:size]):
            break
        connection.sendall(b"\0")
    return False  # the door closes it


def send_over(address: tuple[str, int], secret: bytes) -> LinkSpeed:
    """Measure the link to a `LinkEnd`: short messages there and back, then long ones. Raises WorkerError."""
    connection = knock(address, Hello(Role.DRIVER, 0), secret)
    payload = bytes(LINK_BYTES)
    try:
        connection.settimeout(LINK_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        there_and_back = median(_seconds_of(connection, b"") for _ in range(LINK_PINGS))
        fastest = min(_seconds_of(connection, payload) for _ in range(LINK_SENDS))
    except OSError as error:
        raise WorkerError(f"the link to {address[0]}:{address[1]} broke: {in_one_line(error)}") from error
    finally:
        connection.close()
    return LinkSpeed(LINK_BYTES / max(1e-9, fastest - there_and_back), there_and_back / 2)


def _seconds_of(connection: socket.socket, payload: bytes) -> float:
    """From sending until the answer."""
    answer = memoryview(bytearray(1))
    began = time.perf_counter()
    connection.sendall(_SIZE.pack(len(payload)))
    connection.sendall(payload)
    if not _fill(connection, answer):
        raise ConnectionError("it was closed")
    return time.perf_counter() - began


def _fill(connection: socket.socket, space: memoryview) -> bool:
    """Receive so many bytes; False if the other end closed first. Raises OSError."""
    while len(space):
        received = connection.recv_into(space)
        if not received:
            return False
        space = space[received:]
    return True


# --- Ray ---


def _on(node: str, target: Any) -> Any:
    """A function or an actor as Ray runs it on this node, beside all else. A task has a process of its own."""
    once = {} if isinstance(target, type) else {"max_calls": 1}
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=where, **once)(target)


def _get(reference: Any, where: str) -> Any:
    """What a task on a node returns. Raises WorkerError that names the node."""
    try:
        return ray.get(reference, timeout=NODE_SECONDS)
    except GetTimeoutError:
        raise WorkerError(
            f"node {where} did not answer within {NODE_SECONDS} s; ray status shows the cluster"
        ) from None
    except RayError as error:
        raise WorkerError(f"node {where} cannot be looked at: {in_one_line(error)}") from error
