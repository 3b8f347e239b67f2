"""Memory over many requests: the peak of a loaded model's process against its plan.

python benchmarks/memory.py [--model smollm2-135m] [--tokens 100000] [--context 2048] [--sequences 8] [--json FILE]

Requests of unlike lengths arrive as others leave, until so many tokens went through; the first has a prompt that fills
the context. "planned" are the plan's weights, keys and values, and workspace. "peak" is the most that the process held,
less what it held before the load with all libraries and kernels in memory. The pool is full at times: "waited" says how
many requests had to wait for pages, "lost" how many did not get all their tokens.
"""

import gc
import json
import random
import threading
import time
from collections import deque
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rounds import Comparison, Figures, print_machine, run_child, write_json


def main(
    model: Annotated[str, typer.Option(help="A preset or a checkpoint folder.")] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that go through, of prompts and generated.")] = 100_000,
    context: Annotated[int, typer.Option(min=64)] = 2048,
    sequences: Annotated[int, typer.Option(min=1)] = 8,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    child: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Compare a process's memory with its plan."""
    if child:
        print(json.dumps(measure(model, tokens, context, sequences)))
        return
    console = Console(highlight=False)
    print_machine(console)
    comparison = Comparison(f"{model}, {tokens} tokens, {sequences} sequences of {context}, MB", "peak")
    options = ["--tokens", str(tokens), "--context", str(context), "--sequences", str(sequences), "--child"]
    comparison.add("bigint8", run_child(__file__, ["--model", model, *options]))
    comparison.print(console, "bigint8", {"peak / planned": 3})
    write_json(json_file, [comparison], "bigint8")


class Peak:
    """The most that this process holds, looked at every few milliseconds."""

    def __init__(self) -> None:
        self._process, self.bytes, self._stop = psutil.Process(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, self._process.memory_info().rss)

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.bytes


def measure(model: str, tokens: int, context: int, sequences: int) -> Figures:
    from bigint8 import Workload, open_pipeline

    asked: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    with open_pipeline(model, 1, workload=Workload(64, 1), progress=False) as pipeline:  # libraries and kernels
        pipeline.generate([list(range(5, 40))], **asked, max_new_tokens=4)
    del pipeline
    gc.collect()
    time.sleep(1)
    before = psutil.Process().memory_info().rss
    peak = Peak()
    with open_pipeline(model, 1, workload=Workload(context, sequences), progress=False) as pipeline:
        planned = sum(s.weight_bytes + s.kv_bytes + s.workspace_bytes for s in pipeline.plan.stages)
        chance = random.Random(0)
        through = waited = lost = 0
        running: deque[tuple[Any, int]] = deque()
        first = [[chance.randrange(5, 1000) for _ in range(context - 8)]]
        while through < tokens or running:
            while through < tokens and len(running) < 2 * sequences:
                prompt = first.pop() if first else [chance.randrange(5, 1000) for _ in range(chance.randrange(4, 600))]
                wanted = min(chance.randrange(4, 120), context - len(prompt))
                running.append((pipeline.submit(prompt, **asked, max_new_tokens=wanted), wanted))
                through += len(prompt) + wanted
            waited += pipeline.stats().waiting > 0
            completion, wanted = running.popleft()
            lost += len(completion.result().tokens) != wanted
    most = peak.stop() - before
    return {
        "planned": planned / 1e6,
        "peak": most / 1e6,
        "peak / planned": most / planned,
        "waited": float(waited),
        "lost": float(lost),
    }


if __name__ == "__main__":
    typer.run(main)
