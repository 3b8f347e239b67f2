"""Where workers go: a place on a node of the Ray cluster for each, that Ray keeps for it.

Which nodes these are is said here, not by Ray, whose own spreading fills one node while places that were just given
back still count as taken.
"""

from collections.abc import Mapping
from typing import Any

from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..errors import WorkerError
from .cluster import places

START_SECONDS = 180
"""How long a cluster may take to give us workers."""

CHOSEN_SECONDS = 10
"""How long to wait for the nodes that were chosen. Where others hold their places, any nodes do."""

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


class Reserved:
    """Places for `count` workers of a kind: a CPU each, and a GPU. `free` gives them back.

    They are those of `share_out`, or any where others hold these. Raises WorkerError if the cluster gives none in time.

    Workers of a second model that is loaded beside a first one share its places, and ask Ray for nothing. A place
    stands for a device, and the plan has seen to it that the device has memory for both. So no second GPU or CPU has to
    be free in Ray's books, and whoever else uses the cluster gets none of these until the last worker has left.
    """

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.count, self._users = kind, count, 1
        bundle = {"CPU": 1, "GPU": 1} if kind == "cuda" else {"CPU": 1}
        chosen = [node for node, share in share_out(places(kind), count, kind).items() for _ in range(share)]
        self._group = placement_group([bundle] * count, bundle_label_selector=[{NODE: node} for node in chosen])
        if self._group.wait(CHOSEN_SECONDS):
            return
        remove_placement_group(self._group)
        self._group = placement_group([bundle] * count, strategy="PACK" if kind == "cuda" else "SPREAD")
        if not self._group.wait(START_SECONDS):
            self.free()
            raise WorkerError(
                f"the cluster gave no place for {count} x {bundle} within {START_SECONDS} s; other jobs may hold it "
                "(ray status shows them)"
            )

    def share(self) -> "Reserved":
        """The same places, for the workers of one more model. Each `free` says that one model's have left."""
        self._users += 1
        return self

    def options(self, index: int, shared: bool = False) -> dict[str, Any]:
        """Of the actor that takes a place, or shares one."""
        at = PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=index)
        gpus = 1 if self.kind == "cuda" and not shared else 0
        return {"num_cpus": 0 if shared else 1, "num_gpus": gpus, "scheduling_strategy": at}

    def nodes(self) -> list[str]:
        """The node of each place, by its id in Ray."""
        return list(placement_group_table(self._group)["bundles_to_node_id"].values())

    def free(self) -> None:
        """The workers have left; the last to go gives the places back."""
        self._users -= 1
        if not self._users:
            remove_placement_group(self._group)
