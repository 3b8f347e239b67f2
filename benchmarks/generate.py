"""Prefill and decode speed of a preset's shape with random weights, against other ways to run it.

python benchmarks/generate.py PRESET [--checkpoint FOLDER] [--batch 1]... [--prompt 256] [--tokens 32] [--json FILE]

Sides, each in a process of its own, one after the other in each round: bigint8 (requests to a pipeline of one device;
the transformers model's forward pass; with int8_head), float32, bfloat16, bitsandbytes (load_in_8bit), and llama.cpp
with Q8_0 weights where llama-cpp-python is installed (Llama-like presets, batch 1). Without --checkpoint, one with
random weights is written to a temporary folder.

decode tokens/s is the batch divided by the median time of a step; prefill tokens/s are those of one prompt of --prompt
tokens for each sequence, after one that is not timed. Weights that do not fit into memory are told of, not measured.
GB/s, where the model's bytes are read once a step, are those bytes times steps a second; `torch.sum` shows what reading
alone reaches, and "ms a block besides" what a step takes beyond that, for each block.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rounds import Comparison, Figures, interleave, print_machine, run_child, write_json

SYNTHESIZE = Path(__file__).with_name("synthesize.py")


def main(
    preset: Annotated[str, typer.Argument(help="As in configs/models.")],
    checkpoint: Annotated[Path | None, typer.Option(help="A checkpoint of that preset's shape.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences at once; 1, 4 and 16 by default.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 24,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    without: Annotated[list[str] | None, typer.Option(help="A side to leave out; may be given more than once.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    side: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare ways to generate text."""
    if side is not None:
        assert checkpoint is not None and batch is not None
        print(json.dumps(SIDES[side](checkpoint, batch[0], prompt, tokens)))
        return
    console = Console(highlight=False)
    print_machine(console)
    with tempfile.TemporaryDirectory(prefix="bigint8-bench-") as temporary:
        folder = checkpoint or Path(temporary) / preset
        if checkpoint is None:
            subprocess.run([sys.executable, str(SYNTHESIZE), preset, str(folder)], check=True)
        sides = [name for name in SIDES if name not in (without or [])]
        if "llama.cpp Q8_0" in sides:
            write_gguf(folder, Path(temporary) / "model.gguf", sides)
        comparisons = []
        for size in batch or [1, 4, 16]:
            decode = Comparison(f"{preset}, batch {size}, decode after {prompt} tokens", "decode tokens/s", lower=False)
            prefill = Comparison(f"{preset}, batch {size}, prefill of {prompt} tokens", "prefill tokens/s", lower=False)

            def run(name: str, size: int = size) -> Figures:
                where = Path(temporary) / "model.gguf" if name.startswith("llama.cpp") else folder
                options = ["--batch", str(size), "--prompt", str(prompt), "--tokens", str(tokens), "--side", name]
                return run_child(__file__, [preset, "--checkpoint", str(where), *options])

            measured: dict[str, Callable[[], Figures]] = {
                name: (lambda name=name: run(name)) for name in sides if size == 1 or not name.startswith("llama.cpp")
            }
            interleave(decode, measured, rounds)
            prefill.rounds = {
                name: [{"prefill tokens/s": figures["prefill tokens/s"]} for figures in taken]
                for name, taken in decode.rounds.items()
            }
            for comparison in (decode, prefill):
                comparison.print(console, "bigint8")
                comparisons.append(comparison)
            write_json(json_file, comparisons, "bigint8")


def write_gguf(folder: Path, file: Path, sides: list[str]) -> None:
    """The checkpoint for llama.cpp, its linear layers in Q8_0. Drops the side where that cannot be done."""
    try:
        import llama_cpp  # noqa: F401

        convert_llama(folder, file)
    except Exception as error:
        sides.remove("llama.cpp Q8_0")
        print(f"llama.cpp Q8_0: not measured: {type(error).__name__}: {error}", file=sys.stderr)


def convert_llama(folder: Path, file: Path) -> None:
    """Write a Llama checkpoint as GGUF: matrices in Q8_0, norms in float32, a vocabulary of made-up tokens."""
    import gguf
    import numpy as np
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama":
        raise ValueError(f"model type {config['model_type']!r}; only Llama shapes are converted")
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_vocab_size(config["vocab_size"])
    words = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, config["vocab_size"]))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([gguf.TokenType.CONTROL if i < 3 else gguf.TokenType.NORMAL for i in range(len(words))])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                values = tensors.get_tensor(name).float().numpy()
                new = names.get_name(name, try_suffixes=(".weight",))
                if values.ndim == 2:
                    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
                    writer.add_tensor(new, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
                else:
                    writer.add_tensor(new, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def time_model(model: Any, batch: int, prompt: int, tokens: int, step_bytes: float) -> Figures:
    """Prefill and decode of a transformers model; greedy, so that every side does the same steps."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, min(1000, model.config.vocab_size), (batch, prompt), generator=generator)
    with torch.inference_mode():
        out = model(ids, use_cache=True, logits_to_keep=1)  # compiles what is compiled at first use
        model(ids[:, -1:], past_key_values=out.past_key_values, use_cache=True)
        del out
        started = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - started
        steps = []
        for _ in range(tokens):
            last = out.logits[:, -1:].argmax(-1)
            started = time.perf_counter()
            out = model(last, past_key_values=out.past_key_values, use_cache=True)
            steps.append(time.perf_counter() - started)
    step = statistics.median(steps)
    return {
        "decode tokens/s": batch / step,
        "prefill tokens/s": batch * prompt / prefill,
        "GB/s": step_bytes / step / 1e9,
        "torch.sum GB/s": read_rate() / 1e9,
        "ms a block besides": float("nan"),
    }


def step_bytes(model: Any) -> float:
    """Bytes of the weights that a step reads: all but the embeddings, unless the head is tied to them."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embeddings.data_ptr() != head.data_ptr():
        tensors.pop(embeddings.data_ptr(), None)
    return float(sum(tensors.values()))


def run_bigint8(folder: Path, batch: int, prompt: int, tokens: int, int8_head: bool = False) -> Figures:
    from bigint8 import Int8Config, Workload, open_pipeline

    config, workload = Int8Config(int8_head=int8_head), Workload(prompt + tokens + 8, batch)
    with open_pipeline(folder, 1, config=config, workload=workload, progress=False) as pipeline:
        return time_requests(pipeline, batch, prompt, tokens)


def time_requests(pipeline: Any, batch: int, prompt: int, tokens: int) -> Figures:
    """Prefill and decode of requests that all arrive at once, greedy, from when their tokens come out.

    A step is what lies between two tokens of the first request once all have one. What it takes besides reading the
    weights is told for each block.
    """
    import torch

    vocab, blocks = pipeline.model.config.vocab_size, pipeline.plan.stages[-1].last_block
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, min(1000, vocab), (batch, prompt), generator=generator).tolist()
    asked = {"do_sample": False, "max_new_tokens": tokens + 1, "eos_token_id": None}
    pipeline.generate([[*row[1:], 7] for row in ids], **{**asked, "max_new_tokens": 2})  # nothing shared with the next
    started = time.perf_counter()
    completions = [pipeline.submit(row, **asked) for row in ids]
    came: list[list[float]] = [[] for _ in completions]

    def take(index: int) -> None:
        for _ in completions[index]:
            came[index].append(time.perf_counter())

    threads = [threading.Thread(target=take, args=(index,)) for index in range(batch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    prefilled = max(times[0] for times in came)
    later = [at for at in came[0] if at >= prefilled]
    if len(later) < 2:
        raise RuntimeError(f"{tokens} tokens are too few: some requests got their first when others had their last")
    step = statistics.median(b - a for a, b in itertools.pairwise(later))
    size, rate = step_bytes(pipeline.model), read_rate()
    return {
        "decode tokens/s": batch / step,
        "prefill tokens/s": batch * prompt / (prefilled - started),
        "GB/s": size / step / 1e9,
        "torch.sum GB/s": rate / 1e9,
        "ms a block besides": 1e3 * (step - size / rate) / blocks,
    }


def read_rate() -> float:
    """Bytes a second that `torch.sum` reads."""
    import torch

    numbers = torch.ones(2**26)
    reads = []
    for _ in range(5):
        started = time.perf_counter()
        numbers.sum()
        reads.append(time.perf_counter() - started)
    return numbers.nbytes / statistics.median(reads)


def run_forward(folder: Path, batch: int, prompt: int, tokens: int) -> Figures:
    from bigint8 import load_sharded_int8

    model = load_sharded_int8(folder, context=prompt + tokens + 8, batch_size=batch, progress=False)
    return time_model(model, batch, prompt, tokens, step_bytes(model))


def run_float(folder: Path, batch: int, prompt: int, tokens: int, dtype: str) -> Figures:
    import psutil
    from transformers import AutoModelForCausalLM

    from bigint8.checkpoint.headers import open_checkpoint

    needed = open_checkpoint(folder).weight_bytes * (2 if dtype == "float32" else 1)
    if needed > psutil.virtual_memory().available:
        raise MemoryError(f"{needed / 1e9:.1f} GB of weights do not fit")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return time_model(model, batch, prompt, tokens, step_bytes(model))


def run_bitsandbytes(folder: Path, batch: int, prompt: int, tokens: int) -> Figures:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype="bfloat16")
    return time_model(model, batch, prompt, tokens, step_bytes(model))


def run_llama_cpp(file: Path, batch: int, prompt: int, tokens: int) -> Figures:
    import os

    import llama_cpp
    import numpy as np

    threads = len(os.sched_getaffinity(0))
    model = llama_cpp.Llama(
        str(file), n_ctx=prompt + tokens + 8, n_batch=prompt, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    ids = [int(i) for i in np.random.default_rng(0).integers(5, 1000, prompt)]
    model.eval(ids)
    model.eval([5])
    model.reset()
    started = time.perf_counter()
    model.eval(ids)
    prefill = time.perf_counter() - started
    steps = []
    for i in range(tokens):
        started = time.perf_counter()
        model.eval([5 + i])
        steps.append(time.perf_counter() - started)
    step = statistics.median(steps)
    return {
        "decode tokens/s": 1 / step,
        "prefill tokens/s": prompt / prefill,
        "GB/s": file.stat().st_size / step / 1e9,
        "torch.sum GB/s": float("nan"),
        "ms a block besides": float("nan"),
    }


SIDES: dict[str, Callable[[Path, int, int, int], Figures]] = {
    "bigint8": run_bigint8,
    "bigint8 forward": run_forward,
    "bigint8 int8_head": lambda *a: run_bigint8(*a, int8_head=True),
    "float32": lambda *a: run_float(*a, dtype="float32"),
    "bfloat16": lambda *a: run_float(*a, dtype="bfloat16"),
    "bitsandbytes": run_bitsandbytes,
    "llama.cpp Q8_0": run_llama_cpp,
}


if __name__ == "__main__":
    typer.run(main)
