"""Memory over many requests: the peak of a loaded model's process against its plan.

python benchmarks/memory.py [--model smollm2-135m] [--tokens 100000] [--context 2048] [--sequences 8] [--json FILE]
python benchmarks/memory.py --families [--only llama] [--json FILE]

Requests of unlike lengths arrive as others leave, until so many tokens went through; the first has a prompt that fills
the context. "planned" are the plan's weights, keys and values, and workspace. "peak" is the most that the process held,
less what it held before the load with all libraries and kernels in memory. The pool is full at times: "waited" says how
many requests had to wait for pages, "lost" how many did not get all their tokens.

`--families`: a random model of each family, of some 75 MB of int8 weights, in one process and over two workers; all
sequences are busy, and half of the prompts fill the context. For each stage the same two figures.
"""

import gc
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rounds import Comparison, Figures, print_machine, run_child, write_json

from bigint8 import Cluster, Workload, open_pipeline


def main(
    model: Annotated[str, typer.Option(help="A preset or a checkpoint folder.")] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that go through, of prompts and generated.")] = 100_000,
    context: Annotated[int, typer.Option(min=64)] = 2048,
    sequences: Annotated[int, typer.Option(min=1)] = 8,
    families: Annotated[bool, typer.Option("--families", help="Random models of all families instead.")] = False,
    only: Annotated[str | None, typer.Option(help="Of these families, one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    child: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Compare a process's memory with its plan."""
    if child:
        print(json.dumps(measure(model, tokens, context, sequences)))
        return
    console = Console(highlight=False)
    print_machine(console)
    if families:
        compared = compare_families([only] if only else list(LARGE))
        compared.print(console, "", {"ratio": 3})
        write_json(json_file, [compared], "")
        return
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


# --- families ----------------------------------------------------------------------------------------------------


GLU: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16,
    "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
PLAIN: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16}
LARGE: dict[str, dict[str, Any]] = {
    "llama": GLU,
    "llama, no recipe": GLU | {"hidden_act": "tanh"},
    "mistral": GLU | {"sliding_window": 256},
    "qwen2": GLU,
    "qwen3": GLU | {"head_dim": 64},
    "opt": PLAIN | {"ffn_dim": 4096, "word_embed_proj_dim": 1024, "max_position_embeddings": 2048},
    "opt, 350m": PLAIN
    | {"ffn_dim": 4096, "word_embed_proj_dim": 512, "max_position_embeddings": 2048, "do_layer_norm_before": False},
    "bloom": {"hidden_size": 1024, "n_layer": 6, "n_head": 16},
    "gpt_neox": PLAIN | {"intermediate_size": 4096, "max_position_embeddings": 2048},
    "gpt2": {"n_embd": 1024, "n_layer": 6, "n_head": 16, "n_positions": 2048},
    "phi": PLAIN | {"intermediate_size": 4096, "max_position_embeddings": 2048},
}
"""Keys of each model's config; what stands before a comma is its type."""

VOCABULARY, FEWEST = 16384, 256
SMALL = {1024: 64, 2816: 128, 4096: 128, 6: 2, 16: 4, 512: 32, 64: 16}
"""What the sizes become of a model that brings libraries and kernels into memory, and takes hardly any itself."""


def save(kind: str, folder: Path, small: bool = False) -> None:
    """A checkpoint of a random model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {key: SMALL.get(value, value) if small else value for key, value in LARGE[kind].items()}
    config = AutoConfig.for_model(
        kind.partition(",")[0], vocab_size=FEWEST if small else VOCABULARY, bos_token_id=1, eos_token_id=None,
        pad_token_id=0, tie_word_embeddings=False, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)


def compare_families(kinds: list[str], chunk: int = 512) -> Comparison:
    """Each in processes of their own."""
    comparison = Comparison("random models, 1024 tokens x 4 sequences, MB", "peak")
    with tempfile.TemporaryDirectory() as memory:
        for kind in kinds:
            large, small = Path(memory) / "large", Path(memory) / "small"
            save(kind, large)
            save(kind, small, small=True)
            for stages in (1, 2)["no recipe" in kind :]:  # requests need workers there
                for stage, figures in enumerate(peaks_in_child(large, small, stages, chunk)):
                    comparison.add(f"{kind}, stage {stage} of {stages}", figures)
    return comparison


def peaks_in_child(large: Path, small: Path, stages: int, chunk: int = 512) -> list[Figures]:
    """`peaks` in a process of its own."""
    command = [sys.executable, __file__, "--peaks", str(large), str(small), str(stages), str(chunk)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr)
    figures: list[Figures] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def peaks(large: str, small: str, stages: int, chunk: int, context: int = 1024, sequences: int = 4) -> list[Figures]:
    """Planned and measured for each stage. Workers are new processes: those of the small model say what they begin
    with. In this process the small model ran before."""
    before = [held for held, _, _ in run(small, stages, Workload(256, 2, 64), 1)]
    found = []
    for first, (_, most, planned) in zip(
        before, run(large, stages, Workload(context, sequences, chunk), 3), strict=True
    ):
        found.append({"planned": planned / 1e6, "peak": (most - first) / 1e6, "ratio": (most - first) / planned})
    return found


def run(model: str, stages: int, work: Workload, rounds: int) -> list[tuple[int, int, int]]:
    """Of each stage's process: the bytes that it held at the end, the most, and what was planned.

    All requests, `rounds` for each sequence, are there at once, so that steps are as large as they may be.
    """
    chance = random.Random(0)
    if stages == 1:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    with open_pipeline(model, stages, workload=work, cluster=Cluster("cpu"), progress=False) as pipeline:
        completions = [
            pipeline.submit(
                [chance.randrange(5, FEWEST) for _ in range(work.context // (1 + i % 2) - 12)],
                do_sample=False,
                max_new_tokens=12,
            )
            for i in range(rounds * work.sequences)
        ]
        assert all(len(completion.result().tokens) == 12 for completion in completions)
        planned = [stage.weight_bytes + stage.kv_bytes + stage.workspace_bytes for stage in pipeline.plan.stages]
        workers = pipeline._workers
        held = [held_by("self" if workers is None else workers.infos[i].pid) for i in range(stages)]
    if stages == 1:
        del pipeline, completions
        gc.collect()
        held = [(held_by("self")[0], held[0][1])]
    return [(now, most, plan) for (now, most), plan in zip(held, planned, strict=True)]


def held_by(process: str | int) -> tuple[int, int]:
    """Bytes that a process holds, and the most that it ever held. Linux only."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    now, most = (1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return now, most


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peaks"]:
        print(json.dumps(peaks(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))))
    else:
        typer.run(main)
