"""Is this machine all right? Every kernel against the reference on the devices that are here, and what they measure.

Nothing of a model is needed: layers have the shapes of real ones and random values. A figure is printed for a person to
judge: machines differ.
"""

import importlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bigint8_kernels import copy_values, float_linear, int8_linear, quantize_rows, reference
from bigint8_kernels.dispatch import backend_of
from torch import Tensor

from .checkpoint.headers import TensorInfo
from .errors import in_one_line
from .examine_steps import (
    CONTEXTS,
    REPEATS,
    STACK,
    STEP_CONTEXT,
    attention_speed,
    check_step,
    seconds_of,
    step_speed,
)
from .load.stream import RowStream

LAYERS = {"opt-6.7b fc1": (16384, 4096), "tinyllama-1.1b down_proj": (2048, 5632)}
"""Layers that are tried on every device, as (outputs, inputs)."""

LARGE_LAYER = ("opt-175b fc1", (49152, 12288))
"""Tried on GPUs: 604 MB in int8."""

ROWS = (1, 4, 16, 64, 300)
"""Rows of X: a token, a few, prompts."""

TOLERANCE = {torch.float16: 0.01, torch.bfloat16: 0.01, torch.float32: 1e-4}
"""The largest error allowed, as a part of the largest result."""

SLICE_ROWS = 2048
"""Outputs whose weights the reference holds in float64 at once."""

COPY_BYTES = 2**28


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was tried where, what came out, and a verdict: "good" or "WRONG" of what can be
    either, "measured" of what is a figure."""

    device: str
    what: str
    result: str
    verdict: str = "measured"


def examine(devices: Iterable[str], folder: Path) -> Iterator[Finding]:
    """All findings, one by one: of each device, then of the disk that `folder` is on."""
    names = list(devices)
    for name in names:
        device = torch.device(name)
        yield Finding(name, "int8 layers run in", {"cpu": "numba", "triton": "Triton"}.get(backend_of(device), "torch"))
        for what, check in kernel_checks(device):
            yield _checked(name, what, check)
        for what, measure in measurements(device):
            yield _measured(name, what, measure)
    for name in names:
        if name.startswith("cuda"):
            for what, measure in copies(name, [other for other in names if other != name]):
                yield _measured(name, what, measure)
    if not any(name.startswith("cuda") for name in names):
        yield Finding("cuda", "steps with and without graphs, attention", "unmeasured: there is no GPU here")
    yield _measured("disk", f"read past the file cache, {folder}", lambda: disk_speed(folder))


def _checked(device: str, what: str, check: Callable[[], str | None]) -> Finding:
    try:
        wrong = check()
    except Exception as error:
        wrong = f"{type(error).__name__}: {in_one_line(error, 300)}"
    return Finding(device, what, wrong or "equals the reference", "WRONG" if wrong else "good")


def _measured(device: str, what: str, measure: Callable[[], str]) -> Finding:
    try:
        return Finding(device, what, measure())
    except Exception as error:  # a peer may fail: then only its figure is missing
        return Finding(device, what, f"not measured: {type(error).__name__}: {in_one_line(error, 120)}")


# --- values ---


def kernel_checks(device: torch.device) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Each kernel's name and its check: None, or what is wrong."""
    for dtype in TOLERANCE:
        short = str(dtype).removeprefix("torch.")
        yield f"quantize_rows, {short}", partial(check_quantize_rows, device, dtype)
        yield f"copy_values, {short}", partial(check_copy_values, device, dtype)
    layers = dict(LAYERS) | (dict([LARGE_LAYER]) if device.type == "cuda" else {})
    for layer, shape in layers.items():
        weight = _RandomLayer(shape, device)
        for dtype in TOLERANCE:
            if device.type == "cpu" and dtype == torch.bfloat16:
                continue  # becomes float32 there, as float16 does
            for activations in ("16bit", "int8"):
                what = f"int8_linear, {activations}, {str(dtype).removeprefix('torch.')}, {layer}"
                yield what, partial(check_linear, weight, dtype, activations)
    yield "float_linear, float16 weights", partial(check_float_linear, device)
    if device.type == "cuda":
        yield "a step of Llama's blocks", partial(check_step, device)


def check_quantize_rows(device: torch.device, dtype: torch.dtype) -> str | None:
    """Bit for bit, in widths that are no multiple of anything, wider than a block, and transposed; NaN is noticed."""
    for rows, columns in ((300, 1021), (7, 49152), (5, 1)):
        for transposed in (False, True):
            w = torch.randn(columns, rows) if transposed else torch.randn(rows, columns)
            w = (w.T if transposed else w).to(dtype).to(device)
            out, scale = torch.empty(w.shape, dtype=torch.int8, device=device), torch.empty(rows, device=device)
            finite = quantize_rows(w, out, scale)
            expected, expected_scale = reference.quantize_rows(w.cpu())
            if not finite or not torch.equal(out.cpu(), expected) or not torch.equal(scale.cpu(), expected_scale):
                return f"{rows} x {columns} differs from the reference"
            w[-1, -1] = float("nan")
            if quantize_rows(w, out, scale):
                return f"NaN in {rows} x {columns} is not noticed"
    return None


def check_copy_values(device: torch.device, dtype: torch.dtype) -> str | None:
    values = torch.randn(70_001)
    for target in TOLERANCE:
        out = torch.empty(len(values), dtype=target, device=device)
        given = values.to(dtype).to(device)
        if copy_values(given, out) != (True, True) or not torch.equal(out, given.to(target)):
            return f"to {target} differs from torch"
    return None


class _RandomLayer:
    """Int8 weights of a layer, made when first asked for."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self._made: tuple[Tensor, Tensor] | None = None

    def tensors(self) -> tuple[Tensor, Tensor]:
        if self._made is None:
            weight = torch.randint(-127, 128, self.shape, dtype=torch.int8, device=self.device)
            self._made = weight, torch.rand(self.shape[0], device=self.device) * 2e-4 + 1e-4
        return self._made


def check_linear(layer: _RandomLayer, dtype: torch.dtype, activations: Any) -> str | None:
    """Against the definition, for one row to many, with outliers in one column of a hundred and a row of zeros."""
    weight, scale = layer.tensors()
    outputs, features = weight.shape
    bias = torch.linspace(-1, 1, outputs, device=layer.device).to(dtype)
    for rows in ROWS:
        x = torch.randn(rows, features).clamp(-4, 4)
        x[0, ::100] = 8.0
        if rows > 2:
            x[rows // 2] = 0.0
        x = x.to(dtype).to(layer.device)
        y = int8_linear(x, weight, scale, bias, 6.0, activations)
        error, largest = 0.0, 0.0
        for start in range(0, outputs, SLICE_ROWS):
            part = slice(start, start + SLICE_ROWS)
            expected = reference.int8_linear(x, weight[part], scale[part], bias[part], 6.0, activations, torch.float64)
            error = max(error, float((y[:, part].double() - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
        if not error <= TOLERANCE[dtype] * largest:
            return f"{rows} rows: off by {error / largest:.1e} of the largest result, {TOLERANCE[dtype]:.0e} allowed"
    return None


def check_float_linear(device: torch.device) -> str | None:
    weight = torch.randn(3001, 1021).half().to(device)
    for rows in (1, 5, 300):
        x = torch.randn(rows, 1021, device=device)
        expected = x.double() @ weight.double().T
        if (float_linear(x, weight).double() - expected).abs().max() > 1e-5 * expected.abs().max():
            return f"{rows} rows differ from the product in float64"
    return None


# --- speed ---


def measurements(device: torch.device) -> Iterator[tuple[str, Callable[[], str]]]:
    """What is timed on a device, each beside its peers."""
    layer, shape = LARGE_LAYER if device.type == "cuda" else next(iter(LAYERS.items()))
    yield "memory, torch.sum", lambda: f"{read_speed(device):.0f} GB/s"
    yield f"quantize_rows, {layer} from float16", partial(quantize_speed, device, shape)
    for rows in (1, 256):
        yield f"{rows} row{'s' * (rows > 1)} times {layer}", partial(linear_speed, device, shape, rows)
    if device.type == "cuda":
        for rows in (1, 8):
            what = f"step of {STACK} small Llama blocks, {rows} token{'s' * (rows > 1)} after {STEP_CONTEXT}"
            yield what, partial(step_speed, device, rows)
        for context in CONTEXTS:
            yield (
                f"attention of a token to {context} others, 32 heads of 128",
                partial(attention_speed, device, context),
            )


def read_speed(device: torch.device) -> float:
    """GB/s at which torch adds up 1 GB."""
    numbers = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    return numbers.nbytes / seconds_of(lambda: numbers.sum(), device) / 1e9


def quantize_speed(device: torch.device, shape: tuple[int, int]) -> str:
    source = torch.randn(min(shape[0], 8192), shape[1], dtype=torch.float16, device=device)
    out = torch.empty(source.shape, dtype=torch.int8, device=device)
    scale = torch.empty(len(source), device=device)
    return f"{source.nbytes / seconds_of(lambda: quantize_rows(source, out, scale), device) / 1e9:.1f} GB/s of float16"


def linear_speed(device: torch.device, shape: tuple[int, int], rows: int) -> str:
    """Milliseconds of ours, of torch in 16-bit (float32 on a CPU) and of bitsandbytes; GB/s or TOP/s of ours."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    x = torch.randn(rows, shape[1], device=device, dtype=dtype)
    weight, scale = _RandomLayer(shape, device).tensors()
    ours = seconds_of(lambda: int8_linear(x, weight, scale), device)
    work = f"{weight.nbytes / ours / 1e9:.1f} GB/s"
    if rows > 1:
        work = f"{2 * rows * weight.numel() / ours / 1e12:.2f} TOP/s"
    wide = weight.to(dtype)
    theirs = seconds_of(lambda: x @ wide.T, device)
    result = f"{ours * 1e3:.2f} ms, {work}; torch {str(dtype).removeprefix('torch.')} {theirs * 1e3:.2f} ms"
    result += f" ({theirs / ours:.1f} x)"
    if importlib.util.find_spec("bitsandbytes") is not None:
        peer = bitsandbytesseconds_of(x, shape, device)
        result += f"; bitsandbytes {peer * 1e3:.2f} ms ({peer / ours:.1f} x)"
    return result


def bitsandbytesseconds_of(x: Tensor, shape: tuple[int, int], device: torch.device) -> float:
    """A peer to compare with, where someone has installed it; nothing else here uses it."""
    peer: Any = importlib.import_module("bitsandbytes").nn
    layer = peer.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False, threshold=6.0).to(device)
    x = x.to(torch.float16 if device.type == "cuda" else torch.bfloat16)
    with torch.inference_mode():
        return seconds_of(lambda: layer(x), device, repeats=1 if device.type == "cpu" else REPEATS)


def copies(name: str, others: Iterable[str]) -> Iterator[tuple[str, Callable[[], str]]]:
    """Copies from the host, page-locked and not, and to each other GPU."""
    device = torch.device(name)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    for kind, pinned in (("page-locked", True), ("pageable", False)):

        def from_host(pinned: bool = pinned) -> str:
            source = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=pinned)
            return f"{COPY_BYTES / seconds_of(lambda: target.copy_(source, non_blocking=True), device) / 1e9:.1f} GB/s"

        yield f"from {kind} host memory", from_host
    for other in others:

        def to_gpu(other: str = other) -> str:
            there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=other)
            return f"{COPY_BYTES / seconds_of(lambda: there.copy_(target), device) / 1e9:.1f} GB/s"

        yield f"to {other}", to_gpu


def disk_speed(folder: Path) -> str:
    """GB/s at which the loader's stream reads a file of its own that is not in the file cache."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="bigint8-doctor-") as file:
        block = os.urandom(2**22)
        for _ in range(COPY_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        tensor = TensorInfo("bytes", "U8", (COPY_BYTES // 4096, 4096), Path(file.name), 0, COPY_BYTES)
        started = time.perf_counter()
        RowStream([tensor], direct=True).run(lambda chunk: None)
        return f"{COPY_BYTES / (time.perf_counter() - started) / 1e9:.2f} GB/s"
