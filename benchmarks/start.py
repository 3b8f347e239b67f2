"""From the command to the text: seconds until the model is loaded, until its last token, and until the process ends.

python benchmarks/start.py [--model smollm2-135m] [--tokens 32] [--rounds 3] [--json FILE]

The sides are whole processes that take turns: `python -m bigint8.launch` with two workers and with one device, which
needs no Ray, and a transformers program that does the same in the checkpoint's own format.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rounds import Comparison, Figures, interleave, print_machine, write_json

from bigint8.sources.find import find_source

PROMPT = "The capital of France is"

PEER = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(prompt, return_tensors="pt")
model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
print("loaded", flush=True)
output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
print(tokenizer.decode(output[0]))
print(f"[{tokens} tokens", flush=True)
"""


def main(
    model: Annotated[str, typer.Option(help="A preset or a checkpoint folder.")] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(min=1)] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Time starts."""
    source = find_source(model)
    if source.folder is None:
        raise source.not_found()
    folder = str(source.folder)
    launch = [sys.executable, "-m", "bigint8.launch", "--model", folder, "--device", "cpu", "--raw", "--prompt", PROMPT]
    launch += ["--max-new-tokens", str(tokens)]
    sides: dict[str, Callable[[], Figures]] = {
        "one device": partial(timed, [*launch, "--gpus", "1"]),
        "two workers": partial(timed, [*launch, "--gpus", "2"]),
        "transformers, bfloat16": partial(timed, [sys.executable, "-c", PEER, folder, PROMPT, str(tokens)]),
    }
    console = Console(highlight=False)
    print_machine(console)
    comparison = Comparison(f"{source.name}, {tokens} tokens, seconds from the command", "to the last token")
    interleave(comparison, sides, rounds)
    comparison.print(console, "one device")
    write_json(json_file, [comparison], "one device")


def timed(command: list[str]) -> Figures:
    """Run a program; seconds from its start to the lines that say "loaded" and "[N tokens", and to its end."""
    started = time.perf_counter()
    seconds: Figures = {}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        now = time.perf_counter() - started
        if line.startswith("loaded"):
            seconds["to loaded"] = now
        elif line.startswith("["):
            seconds = {"to the last token": now, "tokens": now - seconds.get("to loaded", 0.0), **seconds}
    error = process.stderr.read()
    if process.wait() or "to the last token" not in seconds:
        raise RuntimeError(error.strip() or f"exit status {process.returncode}")
    return {**seconds, "to its end": time.perf_counter() - started}


if __name__ == "__main__":
    typer.run(main)
