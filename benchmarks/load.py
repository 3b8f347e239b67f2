"""Time from a checkpoint to a ready int8 model, against transformers with bitsandbytes and against the plain read.

python benchmarks/load.py CHECKPOINT [--int8 FOLDER] [--rounds 3] [--cache warm] [--cache cold] [--json FILE]

Sides, each in a process of its own, imports not counted:
- bigint8: load_sharded_int8 of the checkpoint;
- bigint8 from int8: load_sharded_int8 of --int8, the checkpoint that `python -m bigint8.quantize` made of it;
- bitsandbytes: transformers' from_pretrained with load_in_8bit;
- raw read: every tensor's bytes by `preadv` into buffers that are used again, as many threads as bigint8 reads with: no
  loader that reads the file is faster;
- first touch: one write to each page of as much fresh memory as the int8 model takes, in huge pages, by two threads:
  what the system charges for the memory alone. On a virtual machine whose host takes free memory back, that can be most
  of the time.

Warm means that the files are in the page cache, cold that they are not. Peaks are of the load alone, of the process's
resident memory and of what of it is anonymous (no file's).
"""

import json
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rounds import Comparison, Figures, interleave, print_machine, run_child, write_json

SAMPLE_SECONDS = 0.05


def main(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, as benchmarks/synthesize.py writes.")],
    int8: Annotated[Path | None, typer.Option(help="The int8 checkpoint made of it.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    cache: Annotated[list[str] | None, typer.Option(help="warm, cold; may be given twice.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="A side to leave out; may be given more than once.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    side: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare ways to load a checkpoint in int8."""
    if side is not None:
        print(json.dumps(SIDES[side](checkpoint)))
        return
    console = Console(highlight=False)
    print_machine(console)
    comparisons = []
    folders = dict.fromkeys(SIDES, checkpoint)
    if int8 is None:
        del folders["bigint8 from int8"]
    else:
        folders["bigint8 from int8"] = int8
    for state in cache or ["warm"]:
        comparison = Comparison(f"load {checkpoint.name}, {state} page cache", "seconds")

        def run(name: str, folder: Path, state: str = state) -> Figures:
            for other in {*folders.values()} - {folder}:
                prepare_cache(other, "cold")  # or both may be more than the memory, and neither is warm
            prepare_cache(folder, state)
            return run_child(__file__, [str(folder), "--side", name])

        sides: dict[str, Callable[[], Figures]] = {
            name: (lambda name=name, folder=folder: run(name, folder))
            for name, folder in folders.items()
            if name not in (without or [])
        }
        interleave(comparison, sides, rounds)
        comparison.print(console, "bigint8")
        comparisons.append(comparison)
        write_json(json_file, comparisons, "bigint8")


def prepare_cache(folder: Path, state: str) -> None:
    """Bring the shards into the page cache, or out of it."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as shard:
            if state == "cold":
                os.fsync(shard.fileno())
                os.posix_fadvise(shard.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                buffer = bytearray(2**24)
                while shard.readinto(buffer):
                    pass


def measured(work: Callable[[], None], source_bytes: int) -> Figures:
    """Seconds and peak memory of the work, GB/s of the bytes that it reads."""
    anonymous = [0]
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            anonymous.append(_status("RssAnon"))

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    sampler = threading.Thread(target=sample)
    sampler.start()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    anonymous.append(_status("RssAnon"))
    stop.set()
    sampler.join()
    return {
        "seconds": seconds,
        "GB/s": source_bytes / 1e9 / seconds,
        "peak RSS GB": _status("VmHWM") / 1e9,
        "peak anonymous GB": max(anonymous) / 1e9,
    }


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _import_model(folder: Path) -> None:
    """Import what the model needs, and build a kernel, before the clock starts."""
    import torch
    from bigint8_kernels import quantize_rows
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    _ = AutoModelForCausalLM._model_mapping[type(config)]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        quantize_rows(torch.ones(1, 64, dtype=dtype), torch.empty(1, 64, dtype=torch.int8), torch.empty(1))


def _source_bytes(folder: Path) -> int:
    from bigint8.checkpoint.headers import open_checkpoint

    return open_checkpoint(folder).weight_bytes


def load_bigint8(folder: Path) -> Figures:
    from bigint8 import load_sharded_int8

    _import_model(folder)
    kept = []
    return measured(lambda: kept.append(load_sharded_int8(folder, progress=False)), _source_bytes(folder))


def load_bitsandbytes(folder: Path) -> Figures:
    import bitsandbytes  # noqa: F401
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    _import_model(folder)
    config = BitsAndBytesConfig(load_in_8bit=True)
    kept = []
    return measured(
        lambda: kept.append(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype="auto")),
        _source_bytes(folder),
    )


def raw_read(folder: Path) -> Figures:
    from bigint8.checkpoint.headers import open_checkpoint
    from bigint8.load.stream import RowStream

    checkpoint = open_checkpoint(folder)
    stream = RowStream(checkpoint.tensors.values())
    return measured(lambda: stream.run(lambda chunk: None), checkpoint.weight_bytes)


def first_touch(folder: Path) -> Figures:
    import numpy as np

    from bigint8.checkpoint.headers import open_checkpoint

    checkpoint = open_checkpoint(folder)
    nbytes = sum(t.nbytes // (2 if len(t.shape) == 2 else 1) for t in checkpoint.tensors.values())

    def touch() -> None:
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)
        pages = np.frombuffer(block, np.uint8)
        halves = [pages[: nbytes // 2 : 4096], pages[nbytes // 2 :: 4096]]
        threads = [threading.Thread(target=half.fill, args=(1,)) for half in halves]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return measured(touch, nbytes)


SIDES: dict[str, Callable[[Path], Figures]] = {
    "bigint8": load_bigint8,
    "bigint8 from int8": load_bigint8,
    "bitsandbytes": load_bitsandbytes,
    "raw read": raw_read,
    "first touch": first_touch,
}


if __name__ == "__main__":
    typer.run(main)
