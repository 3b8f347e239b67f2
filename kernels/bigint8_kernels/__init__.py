"""Device code of bigint8: quantization to int8 and the mixed-precision int8 matmul.

Needs torch and numba only; usable without the rest of bigint8.

- `reference`: the definition, in plain torch, in float64 where it matters;
- `cpu`: numba row kernels with an integer or a float GEMM;
- `generic`: plain torch for every other device;
- `dispatch`: which of them serves a device. `quantize_rows` and `int8_linear` here are its functions.
"""

from .dispatch import int8_linear, quantize_rows
from .reference import FEW_ROWS, Activations

__all__ = ["FEW_ROWS", "Activations", "int8_linear", "quantize_rows"]
