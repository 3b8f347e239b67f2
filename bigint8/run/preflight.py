"""What must be alike on all nodes is compared before a byte of weights is read: versions, clocks, the checkpoint.

Everything that differs is told at once, with the node, what it has, what this machine has, and what to do.
"""

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle

from ..checkpoint.headers import INDEX_FILE, open_checkpoint
from ..errors import CheckpointError, WorkerError
from ..plan.spec import ModelSpec
from . import versions
from .cluster import is_own
from .tasks import answer_of, called, on_node

CLOCK_SECONDS = 30.0
"""How far a node's clock may be off. What is traced on several nodes would not fit together, nor would their logs, and
far more makes certificates and tokens of the hub invalid."""

TAIL_BYTES = 4096
"""Of the end of a shard, which are compared with its header: copies of the same shape differ there."""


# --- versions and clocks ---


def check_nodes(nodes: Iterable[str]) -> None:
    """Compare nodes, by their ids in Ray, with this machine. Raises WorkerError for all that differs.

    A cluster that this process has started has nothing to compare: it is this machine, with the same programs.
    """
    if is_own():
        return
    cloudpickle.register_pickle_by_value(versions)
    asked_at = time.time()
    asked = {node: on_node(node, versions.state_here).remote() for node in sorted(set(nodes))}
    here, _ = versions.state_here()
    wrong: list[str] = []
    for node, reference in asked.items():
        there, clock = answer_of(reference, node)
        wrong += differences(called(node), here, there)
        off = clock_error(asked_at, clock, time.time())
        if abs(off) > CLOCK_SECONDS:
            wrong.append(
                f"the clock of node {called(node)} is {abs(off):,.0f} s {'ahead of' if off > 0 else 'behind'} this "
                f"machine's, more than the {CLOCK_SECONDS:g} s within which traces, logs and certificates agree: set "
                "both (timedatectl set-ntp true)"
            )
    if wrong:
        raise WorkerError("; ".join(wrong))


def differences(node: str, here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """What to say of a node whose versions are not those of this machine."""
    return [
        f"node {node} has {name} {there[name]}, this machine {here[name]}: {_remedy(name, here[name])}"
        for name in here
        if there[name] != here[name]
    ]


def _remedy(name: str, version: str) -> str:
    if name == "Python":
        return f"start Ray there from an environment with Python {version}"
    if name == "bigint8":
        return "install the same sources there, into the environment that Ray was started from"
    return f"pip install {name}=={version} there, into the environment that Ray was started from, and start Ray again"


def clock_error(asked_at: float, clock: float, answered_at: float) -> float:
    """By how many seconds at least a clock is ahead, if it was read between two times of ours; 0 if it may be right."""
    return max(0.0, clock - answered_at) + min(0.0, clock - asked_at)


# --- the checkpoint ---


@dataclass(frozen=True)
class FileMark:
    """What tells a file from another of its name, without reading it all: its size, and a digest of parts of it.

    error: why it cannot be read, if it cannot
    """

    nbytes: int = 0
    digest: str = ""
    error: str | None = None


def marks(files: Iterable[Path]) -> list[FileMark]:
    """A mark for each file: of a shard's header and end, and of all of another file."""
    return [_mark(file) for file in files]


def _mark(file: Path) -> FileMark:
    try:
        nbytes = file.stat().st_size
        with file.open("rb") as opened:
            if file.suffix == ".safetensors":
                prefix = opened.read(8)
                told = prefix + opened.read(min(int.from_bytes(prefix, "little"), nbytes))
                opened.seek(max(0, nbytes - TAIL_BYTES))
                told += opened.read()
            else:
                told = opened.read()
    except OSError as error:
        return FileMark(error=error.strerror or "cannot be read")
    return FileMark(nbytes, hashlib.sha256(told).hexdigest())


def check_files(spec: ModelSpec, workers: Mapping[str, Any]) -> None:
    """Compare the checkpoint's files on other nodes with those here.

    workers: one for each node, by its id in Ray. Raises CheckpointError for nodes that lack files or have other ones.
    """
    elsewhere = {node: worker for node, worker in workers.items() if node != ray.get_runtime_context().get_node_id()}
    if not elsewhere or spec.folder is None or spec.hub is not None:  # of a commit, all have the same
        return
    files = files_of(spec)
    asked = {node: worker.marks.remote(files) for node, worker in elsewhere.items()}
    here, wrong = marks(files), []
    for node, reference in asked.items():
        wrong += file_differences(called(node), files, here, answer_of(reference, node))
    if wrong:
        raise CheckpointError("; ".join(wrong))


def files_of(spec: ModelSpec) -> list[Path]:
    """What a worker reads of a checkpoint: its config, index and shards, and its Python code if that may run."""
    assert spec.folder is not None
    read = [spec.folder / "config.json", spec.folder / INDEX_FILE]
    code = sorted(spec.folder.glob("*.py")) if spec.access.trust_remote_code else []
    return [file for file in [*read, *code] if file.is_file()] + open_checkpoint(spec.folder, spec.access).shards


def file_differences(node: str, files: list[Path], here: list[FileMark], there: list[FileMark]) -> list[str]:
    """What to say of a node whose files are not those of this machine: the first of each kind, and how many more."""
    absent, other = [], []
    for file, ours, theirs in zip(files, here, there, strict=True):
        if theirs.error is not None:
            absent.append(f"{file} ({theirs.error})")
        elif theirs.nbytes != ours.nbytes:
            other.append(f"{file} has {theirs.nbytes:,} bytes there, {ours.nbytes:,} here")
        elif theirs.digest != ours.digest:
            other.append(f"{file} has the {ours.nbytes:,} bytes that it has here, with other content")
    found = []
    if absent:
        found.append(
            f"node {node} cannot read {_first(absent)}: copy the checkpoint there, under the same path, or keep it in "
            "a folder that all nodes mount"
        )
    if other:
        found.append(f"node {node} has another checkpoint: {_first(other)}; copy it there again")
    return found


def _first(words: list[str]) -> str:
    more = len(words) - 1
    return words[0] + (f" and {more} more file{'s' if more > 1 else ''}" if more else "")
