"""Many requests at once through a pipeline of two CPU workers, one core each, against one step at a time.

python benchmarks/pipeline.py [--model tinyllama-1.1b] [--requests 16] [--prompt 64] [--tokens 64] [--rounds 3] [--hops]

Sides, each in processes of its own, one after the other in each round:
- together: bigint8 with as many steps under way as it wants (one more than stages), each with half of the requests;
- the same steps: those steps, half of the requests each, but one under way at a time, so that one stage always waits;
- one batch: one step under way, with all requests in it: it reads the weights half as often;
- llama.cpp, Q8_0, decoding the same requests together (n_seq_max) on the same two cores, where llama-cpp-python is
  installed.

All requests arrive at once, each with a prompt of its own. "simulated" are the tokens/s that `bigint8 plan
--simulate` would say of the same requests, with the speed that `bigint8 doctor --save` measured before. "busy" is the
smaller of both stages' shares of the time from the first request to the last token. With --hops, models of two blocks
whose hidden states are 4096 wide are timed instead: a hop is what lies between a worker's start of sending and the
next one's having all of it.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from generate import SYNTHESIZE, write_gguf
from rich.console import Console
from rounds import Comparison, Figures, interleave, print_machine, run_child, write_json

WIDTH = 4096
"""Of the hidden states whose hops are timed."""


def main(
    model: Annotated[str, typer.Option(help="A preset of configs/models.")] = "tinyllama-1.1b",
    checkpoint: Annotated[Path | None, typer.Option(help="A checkpoint of that preset's shape.")] = None,
    requests: Annotated[int, typer.Option(min=1)] = 16,
    prompt: Annotated[int, typer.Option(min=1)] = 64,
    tokens: Annotated[int, typer.Option(min=2)] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    hops: Annotated[bool, typer.Option("--hops", help="Time hops between two workers instead.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    side: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare ways to serve requests that arrive together."""
    if side is not None:
        assert checkpoint is not None
        print(json.dumps(SIDES[side](checkpoint, requests, prompt, tokens)))
        return
    console = Console(highlight=False)
    print_machine(console)
    with tempfile.TemporaryDirectory(prefix="bigint8-bench-") as temporary:
        comparisons = (
            [time_hops(Path(temporary), count, tokens, rounds) for count in (1, 16)]
            if hops
            else [time_requests(Path(temporary), checkpoint, model, (requests, prompt, tokens), rounds)]
        )
        ours = "1 worker to the next" if hops else "together"
        for comparison in comparisons:
            comparison.print(console, ours, {"hop ms": 3, "slowest of 20 ms": 3})
        write_json(json_file, comparisons, ours)


def time_requests(
    temporary: Path, checkpoint: Path | None, model: str, sizes: tuple[int, int, int], rounds: int
) -> Comparison:
    """Seconds for all requests, side by side."""
    folder = checkpoint or temporary / model
    if checkpoint is None:
        subprocess.run([sys.executable, str(SYNTHESIZE), model, str(folder)], check=True)
    names = list(SIDES)
    write_gguf(folder, temporary / "model.gguf", names)
    requests, prompt, tokens = sizes

    def run(name: str) -> Figures:
        where = temporary / "model.gguf" if name.startswith("llama.cpp") else folder
        options = ["--requests", str(requests), "--prompt", str(prompt), "--tokens", str(tokens), "--side", name]
        return run_child(__file__, ["--checkpoint", str(where), *options])

    title = f"{model}, {requests} requests at once, {prompt} tokens in and {tokens} out, two stages of one core"
    comparison = Comparison(title, "seconds")
    interleave(comparison, {name: (lambda name=name: run(name)) for name in names}, rounds)
    return comparison


def prompts_for(requests: int, prompt: int) -> list[list[int]]:
    """Prompts that share no beginning."""
    import numpy as np

    ids: list[list[int]] = np.random.default_rng(0).integers(5, 1000, (requests, prompt)).tolist()
    return ids


def run_pipeline(
    folder: Path, requests: int, prompt: int, tokens: int, slots: int | None = None, batches: int = 1
) -> Figures:
    from bigint8 import Workload
    from bigint8.model_pipeline import ModelPipeline
    from bigint8.session import find_model
    from bigint8.simulation.load import Load
    from bigint8.simulation.simulate import simulate

    asked: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None}
    workload = Workload(prompt + tokens + 16, requests)
    with ModelPipeline(find_model(folder), 2, workload, slots=slots) as pipeline:
        pipeline.load(progress=False)
        pipeline.generate([[5, 6, 7, 8]] * 2, **{**asked, "max_new_tokens": 4})
        before, started = pipeline.stats(), time.perf_counter()
        prompts = prompts_for(requests, prompt)
        size = -(-requests // batches)
        answers = [
            answer
            for first in range(0, requests, size)
            for answer in pipeline.generate(prompts[first : first + size], **asked)
        ]
        seconds, after = time.perf_counter() - started, pipeline.stats()
        simulated = simulate(pipeline.plan, Load(requests, None, prompt, tokens, 0.0))
    made = sum(len(answer.tokens) for answer in answers)
    busy = [b.busy_seconds - a.busy_seconds for a, b in zip(before.stages, after.stages, strict=True)]
    return {
        "seconds": seconds,
        "tokens/s": made / seconds,
        "simulated": float("nan") if slots or batches > 1 else simulated.tokens_per_s,
        "busy": min(busy) / seconds,
    }


def run_llama_cpp(file: Path, requests: int, prompt: int, tokens: int) -> Figures:
    """All requests as sequences of one batch, through llama.cpp's own API."""
    import os

    import llama_cpp
    import numpy as np

    threads = len(os.sched_getaffinity(0))
    quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept, or it is called after it is gone
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = requests * (prompt + tokens + 16), 2048, 512
    params.n_seq_max, params.n_threads, params.n_threads_batch = requests, threads, threads
    context = llama_cpp.llama_init_from_model(model, params)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(2048, 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """The likeliest token after each row (token, place, sequence, wanted) whose logits are wanted."""
        batch.n_tokens = len(rows)
        for i, (token, place, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, place, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        kept = [i for i, row in enumerate(rows) if row[3]]
        return [
            int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (vocabulary,)).argmax()) for i in kept
        ]

    decode([(5, 0, 0, True)])
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    started = time.perf_counter()
    rows = [
        (token, place, sequence, place == prompt - 1)
        for sequence, ids in enumerate(prompts_for(requests, prompt))
        for place, token in enumerate(ids)
    ]
    last: list[int] = []
    for part in itertools.batched(rows, 2048) if hasattr(itertools, "batched") else _batches(rows, 2048):
        last += decode(list(part))
    for place in range(prompt, prompt + tokens - 1):
        last = decode([(token, place, sequence, True) for sequence, token in enumerate(last)])
    seconds = time.perf_counter() - started
    unknown = float("nan")
    return {"seconds": seconds, "tokens/s": requests * tokens / seconds, "simulated": unknown, "busy": unknown}


def _batches(rows: list[Any], most: int) -> list[list[Any]]:
    return [rows[first : first + most] for first in range(0, len(rows), most)]


def time_hops(temporary: Path, sequences: int, tokens: int, rounds: int) -> Comparison:
    """Hops of decode steps of so many sequences."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = temporary / "wide"
    if not folder.exists():
        config = LlamaConfig(
            hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=1024, tie_word_embeddings=False,
        )  # fmt: skip
        LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    comparison = Comparison(f"hops of {sequences} sequences, hidden states {WIDTH} wide", "hop ms")
    interleave(comparison, {"1 worker to the next": lambda: run_hops(folder, sequences, tokens)}, rounds)
    return comparison


def run_hops(folder: Path, sequences: int, tokens: int) -> Figures:
    """The hops of one run, from its trace."""
    from bigint8 import Workload
    from bigint8.model_pipeline import ModelPipeline
    from bigint8.session import find_model

    file = folder.parent / "trace.json"
    asked: dict[str, Any] = {"do_sample": False, "max_new_tokens": max(tokens, 64), "eos_token_id": None}
    with ModelPipeline(find_model(folder), 2, Workload(128, sequences), trace=file) as pipeline:
        pipeline.load(progress=False)
        pipeline.generate(prompts_for(sequences, 4), **asked)
    events = json.loads(file.read_text())["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    took = sorted(e["args"]["hop ms"] for e in events if "hop ms" in e.get("args", {}) and rows[e["tid"]] == "stage 1")
    return {"hop ms": statistics.median(took), "slowest of 20 ms": took[len(took) * 19 // 20], "hops": float(len(took))}


SIDES = {
    "together": run_pipeline,
    "the same steps": lambda *sizes: run_pipeline(*sizes, slots=1, batches=2),
    "one batch": lambda *sizes: run_pipeline(*sizes, slots=1),
    "llama.cpp Q8_0": run_llama_cpp,
}


if __name__ == "__main__":
    typer.run(main)
