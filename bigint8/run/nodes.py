"""What the nodes of a Ray cluster are: boxes, the devices in them, and how fast the network between them is.

A small task on each node looks. The network is measured over a connection of our own, as steps take: from the first
node to each other one, once.
"""

import itertools
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median

import ray

from ..errors import WorkerError, in_one_line
from ..options import DeviceKind
from ..plan.clusters import Machines
from ..plan.devices import HOST_RESERVE_BYTES, Box, Device, available_memory, cpu_device, cuda_devices, share_of
from ..plan.offload import free_disk_bytes
from .cluster import connect, leave, pick, places
from .doors import Door, Hello, Role, knock, new_secret, welcome
from .placement import share_out
from .preflight import check_nodes
from .tasks import answer_of, called, on_node

LINK_SECONDS = 20.0
"""How long anything may take on a connection that is measured."""

LINK_BYTES, LINK_SENDS, LINK_PINGS = 8 * 2**20, 3, 20
"""What is sent to measure a link, how often, and how many short messages before."""

_SIZE = struct.Struct("<q")


@dataclass(frozen=True)
class Node:
    """What a node says of itself. `host_bytes`: the memory that can be had there now, the CPU's workers' included.

    disk_bytes: what its disk has free for offloaded weights
    """

    id: str
    host: str
    host_bytes: int
    disk_bytes: int
    cpu: Device
    gpus: tuple[Device, ...]


@dataclass(frozen=True)
class LinkSpeed:
    """What was measured between two nodes. `seconds`: of a message of no bytes, one way."""

    bytes_per_s: float
    seconds: float


def read_cluster_at(address: str, device: DeviceKind = "auto", count: int | None = None) -> Machines:
    """`read_cluster` of the cluster at an address, to which this process is connected meanwhile. Raises WorkerError."""
    began = connect(None, address)
    try:
        return read_cluster(device, count)
    finally:
        if began:
            leave()


def read_cluster(device: DeviceKind = "auto", count: int | None = None) -> Machines:
    """The boxes and devices of the Ray cluster that this process is connected to, as `count` workers would have them.

    By default these are all its GPUs, or a CPU of each node where it has none. Fewer GPUs are of as few boxes as hold
    them, fewer CPUs of as many as there are. GPUs are named cuda:0 and on over all boxes. Raises WorkerError for a node
    that does not answer, or is not like this machine (`check_nodes`), and for a cluster that has too few devices.
    """
    kind, count = pick(count, device)
    used = share_out(places(kind), count, kind)
    check_nodes(used)
    asked = {node: on_node(node, look).remote(workers if kind == "cuda" else 0) for node, workers in used.items()}
    nodes: list[Node] = [answer_of(reference, node) for node, reference in asked.items()]
    nodes.sort(key=lambda node: (node.host, node.id))
    boxes = linked_boxes([(node.id, node.host) for node in nodes])
    numbers, there, devices = itertools.count(), [], []
    for node in nodes:
        workers = used[node.id]
        box = box_with(boxes[node.id], node.host_bytes, node.disk_bytes, workers if kind == "cuda" else 0)
        there.append(box)
        if kind == "cuda":
            _check_gpus(node, workers)
            devices += [replace(gpu, name=f"cuda:{next(numbers)}", box=box) for gpu in node.gpus]
        else:
            share = share_of(node.cpu.usable_bytes, workers)
            devices += [replace(node.cpu, usable_bytes=share, box=box)] * workers
    return Machines("Ray cluster", tuple(there), tuple(devices))


def box_with(box: Box, host_bytes: int, disk_bytes: int, gpu_workers: int) -> Box:
    """The box with what its memory and its disk may hold of weights that no GPU of it holds.

    host_bytes: of memory that can be had. Each worker takes some of it, and on a CPU the workers take it all.
    """
    left = host_bytes - gpu_workers * HOST_RESERVE_BYTES if gpu_workers else 0
    return replace(box, host_bytes=max(0, left), disk_bytes=disk_bytes)


def _check_gpus(node: Node, workers: int) -> None:
    if len(node.gpus) < workers:
        raise WorkerError(
            f"node {node.host}: Ray has {workers} GPUs to give there, and {len(node.gpus)} can be seen; nvidia-smi on "
            "that node shows them, and ray start --num-gpus N tells Ray how many there are"
        )


def look(gpus: int) -> Node:
    """What there is on the node where this runs, with so many of its GPUs."""
    hidden = os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # a task without a GPU is shown none
    try:
        found = cuda_devices()[:gpus] if gpus else []
    finally:
        if hidden is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = hidden
    context = ray.get_runtime_context()
    host, memory, disk = socket.gethostname(), available_memory(), free_disk_bytes()
    return Node(context.get_node_id(), host, memory, disk, cpu_device(), tuple(found))


def boxes_of(nodes: Sequence[tuple[str, str]]) -> dict[str, Box]:
    """A box for each node, by its id, from (id, host). Its name is the host's, with the id where two share it."""
    hosts = Counter(host for _, host in set(nodes))
    return {node: Box(name=host if hosts[host] == 1 else f"{host} ({node[:8]})") for node, host in nodes}


def linked_boxes(nodes: Iterable[tuple[str, str]]) -> dict[str, Box]:
    """A box for each node, by its id, from (id, host), with its link as measured. Raises as `measure_links`."""
    boxes = boxes_of(sorted(nodes))
    for node, speed in measure_links(boxes).items():
        boxes[node] = replace(boxes[node], network_bytes_per_s=speed.bytes_per_s, network_seconds=speed.seconds / 2)
    return boxes


# --- links ---


def measure_links(nodes: Iterable[str]) -> dict[str, LinkSpeed]:
    """The link of each of these nodes, by their ids: from one of them to each other; its own is the fastest of these.

    One node alone is not measured, and a link is measured once in this process. Raises WorkerError for nodes that do
    not reach each other.
    """
    first, *others = sorted(set(nodes))
    speeds = {node: measure_link(first, node) for node in others}
    if speeds:
        speeds[first] = max(speeds.values(), key=lambda speed: speed.bytes_per_s)
    return speeds


@cache
def measure_link(first: str, second: str) -> LinkSpeed:
    """How fast one node sends to another, by their ids in Ray: measured once in this process.

    Raises WorkerError where a node does not answer, or they do not reach each other.
    """
    secret = new_secret()
    end = on_node(second, LinkEnd).remote(secret)
    try:
        address = answer_of(end.address.remote(), second)
        found: LinkSpeed | str = answer_of(on_node(first, try_link).remote(address, secret), first)
    finally:
        ray.kill(end)
    if isinstance(found, str):
        raise WorkerError(
            f"node {called(first)} does not reach node {called(second)}: {found}; workers connect to each other on "
            "ports that the system chooses: let these boxes through each other's firewalls"
        )
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


def try_link(address: tuple[str, int], secret: bytes) -> LinkSpeed | str:
    """`send_over`, or why it fails."""
    try:
        return send_over(address, secret)
    except WorkerError as error:
        return str(error)


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
