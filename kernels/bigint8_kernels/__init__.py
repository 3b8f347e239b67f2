"""Device code of bigint8: quantization to int8 and the mixed-precision int8 matmul.

Needs torch, numba and, on GPUs, triton; usable without the rest of bigint8.

- `reference`: the definition, in plain torch, in float64 where it matters;
- `cpu_weights`: quantization of weights on the CPU, in numba (`numba_bits`: numbers from their bits; `numba_cache`:
  what numba compiled, dropped when the sources change);
- `cpu`: the linear layer on the CPU, numba kernels with an integer or a float GEMM (`cpu_product`: that of integers;
  `numba_vectors`: the vectors it is made of; `cpu_threads`: kernels on several threads);
- `cpu_float`: float weights on the CPU, multiplied in float32 (`numba_floats`: its vectors);
- `cpu_step`: the operations of a step on the CPU (`step`), recorded as one program of kernels: `cpu_program` runs it on
  several threads, `cpu_rows` has norms and activations, `cpu_pages` keys and values, `cpu_attention` and `cpu_scores`
  attention over them, `cpu_prompt` int8 rows of prompts, `cpu_outliers` what is too large in them for int8;
- `cpu_ahead`: all kernels for the CPU, compiled before they are needed;
- `triton_weights`, `triton_activations`, `triton_matmul`, `triton_gemv`: the kernels for GPUs, a family a file
  (`triton_numbers`: what they share); `gpu_tiles`: their configurations; `gpu`: which of them serves how many rows;
- `gpu_step`: the operations of a step on GPUs, `ops`: these as operators of torch; their kernels are `triton_norm`,
  `triton_heads`, `triton_attention` and `triton_activation`;
- `resources`: what they need of a GPU, from their machine code: `python -m bigint8_kernels.resources` (`variants`:
  every kernel with every choice that is compiled into it);
- `generic`: plain torch for every other device;
- `dispatch`: which of them serves a device. The functions here are its own.
"""

from .dispatch import (
    compile_cpu_kernels,
    copy_values,
    float_linear,
    int8_linear,
    operations,
    prepare_layers,
    quantize_rows,
    quantize_rows_counting,
    recorder,
)
from .reference import FEW_ROWS, Activations

__all__ = [
    "FEW_ROWS",
    "Activations",
    "compile_cpu_kernels",
    "copy_values",
    "float_linear",
    "int8_linear",
    "operations",
    "prepare_layers",
    "quantize_rows",
    "quantize_rows_counting",
    "recorder",
]
