"""Compilation of the CPU's kernels ahead of their use.

numba compiles a kernel when it is first called and keeps it on disk. A fresh installation thus waits at its first
tokens, in each of its processes. Called from a thread while files are read and modules imported, `compile_cpu_kernels`
does that earlier, and processes that call it together share the work.
"""

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from numba import types

from . import (
    cpu,
    cpu_attention,
    cpu_float,
    cpu_outliers,
    cpu_pages,
    cpu_product,
    cpu_program,
    cpu_prompt,
    cpu_rows,
    cpu_threads,
    cpu_weights,
)
from .numba_cache import compile_in_turns

_NUMBERS = {torch.float16: types.uint16, torch.bfloat16: types.int16, torch.float32: types.float32}
"""What the kernels read each float dtype as (`numba_bits.BITS`)."""


def compile_cpu_kernels(dtypes: Iterable[torch.dtype], pools: Iterable[torch.dtype] | None = None) -> float:
    """Compile, or load from numba's cache, every kernel that loads weights of these dtypes and runs steps with them.

    `dtypes` are those that checkpoints store: float16, bfloat16 and float32; none for weights that are int8 already.
    `pools` are the dtypes of keys and values, by default those of the weights. Returns how many seconds it took. May be
    called from any thread, and from several processes at once. Raises TypeError for other dtypes.
    """
    start = time.perf_counter()
    compilations: dict[str, Callable[[], None]] = {}
    stored = list(dict.fromkeys(dtypes))
    pooled = stored if pools is None else list(dict.fromkeys(pools))
    for dtype in (*stored, *pooled):
        if dtype not in _NUMBERS:
            raise TypeError(f"compile_cpu_kernels knows float16, bfloat16 and float32, not {dtype}")
    if stored:
        compilations |= {
            "quantize": partial(_compile_quantization, stored),
            "copy": partial(_compile_copies, stored),
            "quantize_columns": partial(_compile_transposed, stored),
        }
    kernels = [cpu_attention.ATTEND[dtype] for dtype in pooled]  # these take longest
    kernels += [*(cpu_pages.PREPARE[dtype] for dtype in pooled), cpu_attention.add_chunks]
    kernels += [cpu_product.multiply, cpu.to_int16, cpu.to_int8, cpu.to_int8_without]
    kernels += [cpu_rows.add_norm, cpu_rows.activate, cpu_prompt.to_int8_by_token]
    kernels += [cpu_outliers.list_outliers, cpu_outliers.add_outliers]
    if cpu.has_int8_dot():
        kernels += [cpu.rescale, cpu_prompt.rescale_in_place]
    kernels += [cpu_float.PRODUCTS[dtype] for dtype in stored]
    compilations |= {kernel.name: kernel.compile for kernel in kernels}
    compilations |= {"_call_parts": cpu_threads.compile_calls, "_run_together": cpu_program.compile_runs}
    compile_in_turns(compilations, Path(cpu_weights.copy.stats.cache_path))
    return time.perf_counter() - start


def _array(number: types.Type, dimensions: int) -> types.Array:
    return types.Array(number, dimensions, "C")


def _compile_quantization(dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        source = _array(_NUMBERS[dtype], 2)
        cpu_weights.quantize.compile((source, _array(types.int8, 2), _array(types.float32, 1)))


def _compile_copies(dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        for target in _NUMBERS.values():
            cpu_weights.copy.compile((_array(_NUMBERS[dtype], 1), _array(target, 1)))


def _compile_transposed(dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        source = _array(_NUMBERS[dtype], 2)
        largest = _array(types.uint32 if dtype == torch.float32 else types.uint16, 1)
        cpu_weights.largest_of_columns.compile((source, largest))
        cpu_weights.quantize_columns.compile((source, largest, _array(types.int8, 2), _array(types.float32, 1)))
