"""Processes that may take no more memory than was planned: a model loads, and fills its whole context in every slot.

python benchmarks/limits.py [--model smollm2-135m]... [--stages 1] [--sequences 4] [--spare 0.05] [--json FILE]

A control group of the system's holds each process to what its stage is planned to take and 5 % (--spare): a process
that takes more is killed. What Python, libraries, compiled kernels and the tokenizer take is not planned: in one
process a small model runs, and the tokenizer is read, before the limit is there; workers get what the same workers of a
small model took for that. Needs the right to make control groups, as root has on Linux.

Each of --sequences prompts fills the context but for 16 tokens, all at once, and those are generated. "needed MB" is
the plan, "peak / limit" how near the group came to its limit: the kernel drops cached files first, so 1 is nothing bad.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from generate import SYNTHESIZE
from memory import held_by, save
from rich.console import Console
from rounds import Comparison, Figures, print_machine, run_child, write_json

GROUPS = Path("/sys/fs/cgroup")
GENERATED = 16


def main(
    model: Annotated[list[str] | None, typer.Option(help="Presets, or checkpoint folders.")] = None,
    stages: Annotated[int, typer.Option(min=1, help="Of one process each; 1 is this process.")] = 1,
    sequences: Annotated[int, typer.Option(min=1)] = 4,
    context: Annotated[int | None, typer.Option(help="Tokens of a sequence; the model's own by default.")] = None,
    spare: Annotated[float, typer.Option(help="What a process may take beyond its plan, in parts of that.")] = 0.05,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    child: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run models whose processes are held to their plans."""
    if child is not None:
        print(json.dumps(run_within(child, stages, sequences, context, spare)))
        return
    console = Console(highlight=False)
    print_machine(console)
    comparison = Comparison(f"{sequences} sequences of the whole context, {stages} stages", "needed MB")
    for name in model or ["smollm2-135m", "tinyllama-1.1b"]:
        with tempfile.TemporaryDirectory(prefix="bigint8-bench-") as folder:
            where = Path(name)
            if not where.is_dir():
                where = Path(folder) / name
                subprocess.run([sys.executable, str(SYNTHESIZE), name, str(where)], check=True)
            options = ["--stages", str(stages), "--sequences", str(sequences), "--spare", str(spare)]
            options += [] if context is None else ["--context", str(context)]
            try:
                comparison.add(name, run_child(__file__, [*options, "--child", str(where)]))
            except RuntimeError as error:
                comparison.add(name, None, str(error))
                sweep()
    comparison.print(console, "", {"peak / limit": 3, "needed MB": 0})
    write_json(json_file, [comparison], "")


class Group:
    """A control group for one process: it may hold no more memory than `limit_bytes`. Linux, version 1 or 2."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        """Raises OSError without the right to make it."""
        old = (GROUPS / "memory").is_dir()
        self._folder = (GROUPS / "memory" if old else GROUPS) / f"bigint8-{os.getpid()}-{name}"
        self._peak, self._own = ("memory.max_usage_in_bytes", "rss") if old else ("memory.peak", "anon")
        self._folder.mkdir()
        try:
            (self._folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit_bytes))
            if not old and (self._folder / "memory.swap.max").exists():
                (self._folder / "memory.swap.max").write_text("0")
        except OSError:
            self._folder.rmdir()
            raise
        self._members: list[int] = []

    def take(self, process: int) -> None:
        """Hold this process to the limit: what it takes from here on counts."""
        (self._folder / "cgroup.procs").write_text(str(process))
        self._members.append(process)

    @property
    def peak_bytes(self) -> int:
        """The most that was counted, cached files included."""
        return int((self._folder / self._peak).read_text())

    @property
    def held_bytes(self) -> int:
        """What its processes took since they are in it and hold now, without files."""
        lines = dict(line.split() for line in (self._folder / "memory.stat").read_text().splitlines())
        return int(lines[self._own])

    def end(self) -> None:
        """Let the processes go, which are in the group above again."""
        for process in self._members:
            if Path(f"/proc/{process}").exists():
                (self._folder.parent / "cgroup.procs").write_text(str(process))
        self._folder.rmdir()


def sweep() -> None:
    """Remove the groups of processes that were killed before they could."""
    for folder in [*GROUPS.glob("bigint8-*"), *GROUPS.glob("memory/bigint8-*")]:
        maker = folder.name.split("-")[1]
        if not Path(f"/proc/{maker}").exists():
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def groups(limits: list[int]) -> Iterator[list[Group]]:
    """A group for each limit; all are gone afterwards."""
    made: list[Group] = []
    try:
        for index, limit in enumerate(limits):
            made.append(Group(str(index), limit))
        yield made
    finally:
        for group in made:
            group.end()


def run_within(folder: Path, stages: int, sequences: int, context: int | None, spare: float) -> Figures:
    """Load and fill a model within its plan. Raises what the model raises where a process is killed."""
    from bigint8 import BigInt8Error, Workload
    from bigint8.model_pipeline import ModelPipeline
    from bigint8.session import find_model

    with tempfile.TemporaryDirectory(prefix="bigint8-bench-") as small:
        save("llama", Path(small), small=True)
        besides = libraries(Path(small), stages)
    found = find_model(folder)
    context = context or found.spec.known_layout.sizes.max_context
    assert context is not None
    with ModelPipeline(found, stages, Workload(context, sequences)) as pipeline:
        before = started(pipeline)
        with suppress(BigInt8Error):  # random weights have no tokenizer
            pipeline.read_text()
        needed = [stage.needed_bytes for stage in pipeline.plan.stages]
        limits = [int((1 + spare) * size) + more for size, more in zip(needed, besides, strict=True)]
        with groups(limits) as held:
            for group, process in zip(held, before, strict=True):
                group.take(process)
            pipeline.load(progress=False)
            fill(pipeline, context, sequences)
            if processes(pipeline) != before:
                raise RuntimeError("a worker was replaced: it took more than its limit")
            peaks = [group.peak_bytes for group in held]
    return {
        "needed MB": max(needed) / 1e6,
        "limit MB": max(limits) / 1e6,
        "peak / limit": max(peak / limit for peak, limit in zip(peaks, limits, strict=True)),
        "tokens": float(context * sequences),
    }


def libraries(small: Path, stages: int) -> list[int]:
    """Bytes of what is not planned and yet to come, by stage: nothing in this process, where a model runs first."""
    from bigint8 import Workload
    from bigint8.model_pipeline import ModelPipeline
    from bigint8.session import find_model

    with ModelPipeline(find_model(small), stages, Workload(128, 2)) as pipeline, groups([2**50] * stages) as held:
        for group, process in zip(held, started(pipeline), strict=True):
            group.take(process)
        pipeline.load(progress=False)
        fill(pipeline, 128, 2)
        return [0] if stages == 1 else [group.held_bytes for group in held]


def started(pipeline: Any) -> list[int]:
    """The processes that hold the stages, once they have imported what they import by themselves."""
    pipeline.start()
    found, before, now = processes(pipeline), -1, 0
    while now != before:
        time.sleep(2)
        before, now = now, sum(held_by(process)[0] // 2**21 for process in found)
    return found


def processes(pipeline: Any) -> list[int]:
    """The processes that hold the stages, in their order."""
    workers = pipeline._workers  # no part of the interface
    return [os.getpid()] if workers is None else [info.pid for info in workers.infos]


def fill(pipeline: Any, context: int, sequences: int) -> None:
    """Fill the whole context in every slot. Raises RuntimeError if a token is missing."""
    chance = random.Random(0)
    prompts = [[chance.randrange(5, 250) for _ in range(context - GENERATED)] for _ in range(sequences)]
    asked = {"do_sample": False, "max_new_tokens": GENERATED, "eos_token_id": None}
    submitted = [pipeline.submit(prompt, **asked) for prompt in prompts]
    made = [len(completion.result().tokens) for completion in submitted]
    if made != [GENERATED] * sequences:
        raise RuntimeError(f"of {GENERATED} tokens each there came {made}")


if __name__ == "__main__":
    typer.run(main)
