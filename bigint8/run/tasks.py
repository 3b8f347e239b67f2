"""Functions and actors that Ray runs on a node which is named, and what they return."""

import re
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import WorkerError, in_one_line

NODE_SECONDS = 120
"""How long a node may take to answer: Ray starts a process there, which imports this."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def on_node(node: str, target: Any) -> Any:
    """A function or an actor as Ray runs it on this node, beside all else. A task has a process of its own."""
    once = {} if isinstance(target, type) else {"max_calls": 1}
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=where, **once)(target)


def answer_of(reference: Any, node: str) -> Any:
    """What a task on a node returns. Raises WorkerError that names the node."""
    try:
        return ray.get(reference, timeout=NODE_SECONDS)
    except GetTimeoutError:
        raise WorkerError(
            f"node {called(node)} did not answer within {NODE_SECONDS} s; ray status shows the cluster"
        ) from None
    except RayError as error:
        why = in_one_line(error.cause if isinstance(error, RayTaskError) else error)
        raise WorkerError(
            f"node {called(node)} cannot be looked at: {_COLOURS.sub('', why)}; ray status shows whether it is there, "
            "and it needs the same bigint8 as this machine"
        ) from error


def called(node: str) -> str:
    """A node as people know it, by its host and address; by its id where Ray knows no such node."""
    known = {each["NodeID"]: each for each in ray.nodes()}
    there = known.get(node)
    return node if there is None else f"{there['NodeManagerHostname']} ({there['NodeManagerAddress']})"
