"""The command line: plan a model, load it over workers, generate text.

python -m bigint8.launch --model NAME_OR_PATH --gpus N [--prompt TEXT]...
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .command import (
    DEFAULT_CONTEXT,
    DEFAULT_GPU_TYPE,
    DeviceChoice,
    DtypeChoice,
    devices_to_plan_for,
    dtype_of_source,
    run_command,
    unwind_on_sigterm,
    write_json,
)
from .errors import BigInt8Error
from .families import layout_of
from .hardware import find_devices, pick_dtype
from .planner import Plan, make_plan
from .report import print_plan, print_summary
from .sources import find_source

if TYPE_CHECKING:
    from .pipeline import Pipeline


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def launch(
    model: Annotated[str, typer.Option(help="A preset (opt-175b), a checkpoint folder or a hub id.")],
    gpus: Annotated[int | None, typer.Option(min=1, help="How many devices: all GPUs, or 1 CPU, by default.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Where a preset's weights are: a folder or a hub id.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given more than once.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 64,
    device: Annotated[DeviceChoice, typer.Option(help="What the workers run on.")] = DeviceChoice.auto,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence to leave room for (2048).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that run at once.")] = 1,
    threshold: Annotated[
        float | None, typer.Option(min=0.0, help="Outlier threshold of LLM.int8(), 6.0 by default; 0 is none.")
    ] = None,
    int8_head: Annotated[bool, typer.Option("--int8-head", help="The output head in int8 too.")] = False,
    dtype: Annotated[DtypeChoice, typer.Option(help="Of what is not int8.")] = DtypeChoice.auto,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Print the plan and stop; needs no weights.")] = False,
    gpu_type: Annotated[
        str | None, typer.Option(help=f"Plan for GPUs of this kind instead of this machine's: {DEFAULT_GPU_TYPE}, ...")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write plan, load report and timings here.")] = None,
    address: Annotated[str | None, typer.Option(help="An existing Ray cluster; by default a local one starts.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")
    ] = False,
) -> None:
    """Load a model in int8 over several devices and generate text with it."""
    console = Console(highlight=False)
    result: dict[str, Any] = {"model": model}
    source = find_source(model, checkpoint, revision, fetch=not plan_only)
    config = source.config(trust_remote_code)
    layout = layout_of(config, int8_head, dtype_of_source(source))
    context = context or min(DEFAULT_CONTEXT, layout.max_context or DEFAULT_CONTEXT)
    if plan_only or source.folder is None:
        devices, note = devices_to_plan_for(
            layout, source, gpus, device.value, gpu_type, dtype.value, context, batch_size
        )
        if note:
            console.print(note, soft_wrap=True)
        plan = make_plan(
            source.name, layout, devices, pick_dtype(dtype.value, dtype_of_source(source), devices), context, batch_size
        )
        print_plan(console, plan)
        write_json(json_file, result | {"plan": plan.to_dict()})
        if not plan_only:
            raise source.not_found()
        return
    if gpu_type is not None:
        raise BigInt8Error("--gpu-type is for --plan-only: to run, bigint8 uses the devices that are there")

    from .checkpoint import open_checkpoint
    from .config import Int8Config
    from .pipeline import Pipeline
    from .transfer import stored_dtype

    started = time.perf_counter()
    stored = stored_dtype(open_checkpoint(source.folder, trust_remote_code))
    layout = layout_of(config, int8_head, stored)
    tokenizer = _tokenizer(source.folder, trust_remote_code)
    encoded = [_encode(tokenizer, text, context) for text in prompt or []]  # a prompt too long is told before loading
    count, kind = gpus, device.value
    if address is None:
        here, note = find_devices(device.value, gpus)
        count, kind = len(here), here[0].kind
        if note:
            console.print(note)
    if count is not None and count > len(layout.blocks):
        raise BigInt8Error(
            f"--gpus {count}: {source.name} has {len(layout.blocks)} blocks; use at most that many devices"
        )
    with Pipeline(count, kind, address) as pipeline:  # type: ignore[arg-type]
        unwind_on_sigterm()  # again: Ray has put a handler in its place that aborts
        devices = pipeline.devices()
        plan = make_plan(source.name, layout, devices, pick_dtype(dtype.value, stored, devices), context, batch_size)
        print_plan(console, plan)
        load_started = time.perf_counter()
        chosen: dict[str, Any] = {"int8_head": int8_head} | ({} if threshold is None else {"threshold": threshold})
        reports = pipeline.load(source.folder, plan, Int8Config(**chosen), True, trust_remote_code)
        load_seconds = time.perf_counter() - load_started
        print_summary(console, plan, reports, stored, load_seconds)
        result |= {
            "plan": plan.to_dict(),
            "load": [asdict(report) for report in reports],
            "timings": {"start_seconds": load_started - started, "load_seconds": load_seconds},
        }
        runner = _Runner(pipeline, source.folder, plan, tokenizer, max_new_tokens, trust_remote_code)
        result["generations"] = runner.run_prompts(encoded, batch_size)
        write_json(json_file, result)
        if not prompt and sys.stdin.isatty() and sys.stdout.isatty():
            runner.chat()


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, padding_side="left")
    except Exception as error:  # a garbled file can raise anything here
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BigInt8Error(f"{folder}: no tokenizer could be read: {reason[:300]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _encode(tokenizer: Any, text: str, context: int) -> dict[str, Any]:
    """A prompt's token ids. Raises BigInt8Error for an empty one, or one that leaves no room in the context."""
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise BigInt8Error(f"--prompt {text!r}: no tokens in it")
    if len(ids) >= context:
        raise BigInt8Error(
            f"--prompt: {len(ids)} tokens leave no room in a context of {context}; shorten it or raise --context"
        )
    return {"text": text, "ids": ids}


class _Runner:
    """Generates text on loaded workers and prints it as it is made."""

    def __init__(
        self, pipeline: "Pipeline", folder: Path, plan: Plan, tokenizer: Any, max_new_tokens: int, trust: bool
    ) -> None:
        self._model = pipeline.model(folder, plan, trust)
        self._plan, self._tokenizer, self._max_new_tokens = plan, tokenizer, max_new_tokens

    def run_prompts(self, prompts: list[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
        """The prompts in batches; a batch of one is streamed. Returns texts and timings."""
        results = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            if len(batch) == 1:
                print(f"\n{batch[0]['text']}", end="", flush=True)
            began = time.perf_counter()
            texts, tokens = self._generate([prompt["ids"] for prompt in batch], stream=len(batch) == 1)
            seconds = time.perf_counter() - began
            if len(batch) > 1:
                for prompt, text in zip(batch, texts, strict=True):
                    print(f"\n{prompt['text']}{text}")
            print(f"\n[{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s]", flush=True)
            results += [
                {"prompt": prompt["text"], "text": text, "batch_seconds": seconds, "batch_tokens": tokens}
                for prompt, text in zip(batch, texts, strict=True)
            ]
        return results

    def _generate(self, prompts: list[list[int]], stream: bool) -> tuple[list[str], int]:
        """The continuations, and how many tokens were made in all."""
        from transformers import TextStreamer

        inputs = self._tokenizer.pad({"input_ids": prompts}, padding=True, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        output = self._model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=min(self._max_new_tokens, self._plan.context - length),
            do_sample=False,
            pad_token_id=self._tokenizer.pad_token_id,
            streamer=TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
        )
        new = output[:, length:]
        made = int((new != self._tokenizer.pad_token_id).sum())
        return self._tokenizer.batch_decode(new, skip_special_tokens=True), max(made, 1)

    def chat(self) -> None:
        """Prompt, answer, prompt, until end of input or Ctrl-C. Turns that no longer fit are forgotten first."""
        print("\nType a message; Ctrl-D or Ctrl-C ends.")
        turns: list[dict[str, str]] = []
        while True:
            try:
                text = input("\n> ").strip()
            except EOFError:
                print()
                return
            if not text:
                continue
            turns.append({"role": "user", "content": text})
            try:
                answer, _ = self._generate([self._fit(turns)], stream=True)
            except BigInt8Error as error:
                print(f"error: {error}", file=sys.stderr)
                turns.pop()
                continue
            turns.append({"role": "assistant", "content": answer[0]})

    def _fit(self, turns: list[dict[str, str]]) -> list[int]:
        """Token ids of the conversation; its oldest turns are dropped until it leaves room for an answer."""
        room = min(self._max_new_tokens, self._plan.context // 4)
        while True:
            if self._tokenizer.chat_template:
                ids = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            else:
                ids = self._tokenizer("\n".join(turn["content"] for turn in turns))["input_ids"]
            if len(ids) + room <= self._plan.context:
                return list(ids)
            if len(turns) <= 1:
                raise BigInt8Error(
                    f"{len(ids)} tokens leave no room in a context of {self._plan.context}; write less, or start "
                    "with a larger --context"
                )
            del turns[:2]


def main() -> None:
    """Run the command line."""
    run_command(app)


if __name__ == "__main__":
    main()
