"""Every launch of the GPU layer, and of quantizing its weights, with Triton's own specialization and compilation.

Run as a program, without TRITON_INTERPRET: prints as JSON what was compiled and launched in each of `CALLS`. A driver
that stands in for CUDA's says that there is a GPU of compute capability 8.6. It gets each compiled kernel with its
arguments, and drops them; tensors lie in the CPU's memory, where Triton reads their addresses, dtypes and strides.
"""

import json
import sys
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CAPABILITY, PROCESSORS = 86, 82


@dataclass(frozen=True)
class Call:
    """A call of the layer: X (rows, features), rows `apart` values longer than they are, W (outputs, features).

    X and W begin `address` and `weight_address` values behind an address that is a multiple of 16 bytes.
    """

    rows: int
    features: int
    outputs: int
    dtype: str = "fp16"
    activations: str = "auto"
    has_bias: bool = False
    apart: int = 0
    address: int = 0
    weight_address: int = 0
    bias_dtype: str = ""


@dataclass(frozen=True)
class Quantization:
    """Of a weight's rows, which lie `apart` values further from each other than they are long."""

    rows: int
    features: int
    dtype: str = "fp16"
    apart: int = 0


QUANTIZATIONS = [
    *(Quantization(3, features, dtype) for dtype in DTYPES for features in (64, 16400)),
    *(Quantization(3, features) for features in (1, 70, 16401)),
    Quantization(3, 64, apart=5),
]

CALLS = [
    # every bucket of rows, of every dtype
    *(Call(rows, 4096, 48, dtype) for dtype in ("fp16", "fp32") for rows in (1, 2, 16, 17, 64)),
    *(Call(rows, 4096, 48, "bf16") for rows in (1, 16, 17)),
    *(Call(rows, 4096, 48) for rows in (65, 128, 129)),
    Call(3, 4096, 48, activations="int8"),
    Call(40, 4096, 48, activations="16bit"),
    # so many outputs that K is not split
    *(Call(rows, 4096, 12288) for rows in (1, 2, 17)),
    # a bias, rows that lie apart, and an address that no wide load takes
    *(Call(rows, 4096, 48, has_bias=True) for rows in (1, 16, 17, 65)),
    *(Call(rows, 4096, 48, apart=16) for rows in (1, 16, 17, 65)),
    *(Call(rows, 4096, 48, apart=3) for rows in (1, 16, 17, 65)),
    *(Call(rows, 4096, 48, address=1) for rows in (1, 16, 17, 65)),
    # widths that are no multiple of a step, or of 16, or are 1, and wider than a block
    *(Call(rows, 144, 37) for rows in (1, 16, 17, 65)),
    *(Call(rows, 70, 37) for rows in (1, 2, 17, 65)),
    *(Call(rows, 1, 1) for rows in (1, 2, 17, 65)),
    Call(2, 70, 37, "fp32"),
    Call(17, 70, 37, "fp32"),
    Call(17, 16400, 48),
    # a bias of another dtype, and weights that no wide load takes
    *(Call(rows, 4096, 48, has_bias=True, bias_dtype="fp32") for rows in (1, 17)),
    *(Call(rows, 4096, 48, weight_address=1) for rows in (1, 2, 17)),
]

PREPARED = [(48, 4096), (37, 70)]
"""Layers that are prepared for 300 rows, after which these are called."""

AFTERWARDS = [
    Call(rows, features, outputs, has_bias=bool(rows % 2))
    for outputs, features in PREPARED
    for rows in (1, 2, 7, 16, 17, 33, 64, 65, 100, 129, 256, 300)
]


class Driver:
    """What Triton asks of a driver. `compiled` and `launched` are the names of kernels, but of tuning's launches."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.launched: list[str] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 99 * 1024, "multiprocessor_count": PROCESSORS},
            load_binary=self.load_binary,
            unload_module=lambda module: None,
        )

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, ...]:
        assert cubin.startswith(b"\x7fELF")
        self.compiled.append(name)
        return name, name, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, *arguments: Any) -> None:
            assert x > 0 and 0 < y < 2**16 and 0 < z < 2**16  # CUDA's limits
            self.launched.append(metadata.name)

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_benchmarker(self) -> Any:
        """What times a tile: runs it once, and finds all equally fast."""

        def time(kernel: Any, quantiles: tuple[float, ...]) -> list[float]:
            before = len(self.launched)
            kernel()
            del self.launched[before:]
            return [1.0] * len(quantiles)

        return time


def arguments_of(call: Call) -> tuple[Any, ...]:
    dtype = DTYPES[call.dtype]
    width = call.features + call.apart
    memory = torch.zeros(call.rows * width + call.address, dtype=dtype)
    x = memory[call.address :].view(call.rows, width)[:, : call.features]
    weight = torch.zeros(call.outputs * call.features + call.weight_address, dtype=torch.int8)
    weight = weight[call.weight_address :].view(call.outputs, call.features)
    bias = torch.zeros(call.outputs, dtype=DTYPES[call.bias_dtype or call.dtype]) if call.has_bias else None
    return x, weight, torch.ones(call.outputs), bias, 6.0, call.activations


def main() -> None:
    stand_in = Driver()
    driver.set_active(stand_in)
    from bigint8_kernels import gpu, triton_weights
    from bigint8_kernels.gpu_tiles import ARCHITECTURES

    pretended = gpu.Gpu(ARCHITECTURES[CAPABILITY], PROCESSORS)

    def run(given: Call | Quantization) -> dict[str, Any]:
        stand_in.compiled.clear()
        stand_in.launched.clear()
        if isinstance(given, Call):
            y = gpu.int8_linear(*arguments_of(given), pretended)
            assert y.shape == (given.rows, given.outputs) and y.dtype == DTYPES[given.dtype]
        else:
            source = torch.zeros(given.rows, given.features + given.apart, dtype=DTYPES[given.dtype])
            out = torch.zeros(given.rows, given.features, dtype=torch.int8)
            bad = torch.zeros(1, dtype=torch.int32)
            triton_weights.quantize_rows_into(source[:, : given.features], out, torch.zeros(given.rows), bad)
        return asdict(given) | {"compiled": list(stand_in.compiled), "launched": list(stand_in.launched)}

    if sys.argv[1:] == ["prepared"]:
        weights = [torch.zeros(shape, dtype=torch.int8) for shape in PREPARED]
        gpu.prepare(weights, torch.float16, 300, "auto", pretended)
        print(json.dumps([run(call) for call in AFTERWARDS]))
    else:
        print(json.dumps([run(given) for given in (*CALLS, *QUANTIZATIONS)]))


if __name__ == "__main__":
    main()
