"""Where workers go: a place on a node of the Ray cluster for each, that Ray keeps for it.

Which nodes these are is said here, not by Ray, whose own spreading fills one node while places that were just given
back still count as taken. A worker whose node is gone gets a place on another one.
"""

import socket
from collections.abc import Collection, Mapping
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..errors import WorkerError
from .cluster import places

START_SECONDS = 180
"""How long a cluster may take to give us workers."""

CHOSEN_SECONDS = 10
"""How long to wait for the nodes that were chosen. Where others hold their places, any nodes do."""

ANSWER_SECONDS = 2.0
"""How long a node may take to accept a connection."""

NODE = "ray.io/node-id"
"""The label of a node that has its id."""


def share_out(places: Mapping[str, int], workers: int, kind: str) -> dict[str, int]:
    """How many of the workers each node gets, of those it has place for: on GPUs of few nodes, or on CPUs of many.

    Nodes without a worker are left out.
    """
    shares = dict.fromkeys(places, 0)
    for _ in range(workers):
        free = [node for node in places if shares[node] < places[node]]
        if kind == "cuda":
            chosen = max(free, key=lambda node: (shares[node] > 0, places[node]))
        else:
            chosen = min(free, key=lambda node: shares[node])
        shares[chosen] += 1
    return {node: share for node, share in shares.items() if share}


def gone(nodes: Collection[str]) -> set[str]:
    """Those of the nodes, by their ids, that Ray has given up, and those that accept no connection.

    Ray notices a node that is cut off after some 20 s. One whose processes are stopped accepts connections until then.
    """
    there = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    return {node for node in nodes if node not in there or not _accepts(there[node])}


def _accepts(node: Mapping[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


class Reserved:
    """Places for `count` workers of a kind: a CPU each, and a GPU. `free` gives them back.

    They are those of `share_out`, or any where others hold these. Raises WorkerError if the cluster gives none in time.

    Workers of a second model that is loaded beside a first one share its places, and ask Ray for nothing. A place
    stands for a device, and the plan has seen to it that the device has memory for both. So no second GPU or CPU has to
    be free in Ray's books, and whoever else uses the cluster gets none of these until the last worker has left.
    """

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.count, self._users = kind, count, 1
        self._bundle = {"CPU": 1, "GPU": 1} if kind == "cuda" else {"CPU": 1}
        chosen = [node for node, share in share_out(places(kind), count, kind).items() for _ in range(share)]
        group = placement_group([self._bundle] * count, bundle_label_selector=[{NODE: node} for node in chosen])
        if not group.wait(CHOSEN_SECONDS):
            remove_placement_group(group)
            group = placement_group([self._bundle] * count, strategy="PACK" if kind == "cuda" else "SPREAD")
            if not group.wait(START_SECONDS):
                remove_placement_group(group)
                raise WorkerError(
                    f"the cluster gave no place for {count} x {self._bundle} within {START_SECONDS} s; other jobs may "
                    "hold it (ray status shows them)"
                )
        self._places: list[tuple[PlacementGroup, int]] = [(group, index) for index in range(count)]
        self._nodes: list[str] = list(placement_group_table(group)["bundles_to_node_id"].values())

    def share(self) -> "Reserved":
        """The same places, for the workers of one more model. Each `free` says that one model's have left."""
        self._users += 1
        return self

    def options(self, index: int, shared: bool = False) -> dict[str, Any]:
        """Of the actor that takes a place, or shares one."""
        group, bundle = self._places[index]
        at = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
        gpus = 1 if self.kind == "cuda" and not shared else 0
        return {"num_cpus": 0 if shared else 1, "num_gpus": gpus, "scheduling_strategy": at}

    def nodes(self) -> list[str]:
        """The node of each place, by its id in Ray."""
        return list(self._nodes)

    def move(self, index: int, avoid: Collection[str]) -> None:
        """Another place instead of this one, on the node with most free ones that is not to be avoided.

        Raises WorkerError where there is none.
        """
        free = {node: min(there.get(name, 0.0) for name in self._bundle) for node, there in _available().items()}
        lost = gone(free)
        there = sorted(
            (node for node in free if free[node] >= 1 and node not in {*avoid, *lost}), key=lambda n: -free[n]
        )
        for node in there:
            group = placement_group([self._bundle], bundle_label_selector=[{NODE: node}])
            if group.wait(CHOSEN_SECONDS):
                before, _ = self._places[index]
                self._places[index], self._nodes[index] = (group, 0), node
                if all(other.id != before.id for other, _ in self._places):
                    remove_placement_group(before)
                return
            remove_placement_group(group)
        raise WorkerError(
            f"no node that is left has a free {'GPU' if self.kind == 'cuda' else 'CPU'}, as Ray counts them "
            "(ray status shows them)"
        )

    def free(self) -> None:
        """The workers have left; the last to go gives the places back."""
        self._users -= 1
        if self._users:
            return
        for group in {group.id: group for group, _ in self._places}.values():
            remove_placement_group(group)


def _available() -> dict[str, dict[str, float]]:
    """What each node that Ray has not given up has free, by its id."""
    found: dict[str, dict[str, float]] = available_resources_per_node()
    return found
