"""Plain torch: what the int8 layer takes of memory there, and that it holds large and small numbers."""

import weakref

import pytest
import torch
from bigint8_kernels import generic, reference
from torch.utils._python_dispatch import TorchDispatchMode

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}
DTYPES = sorted(TOLERANCE, key=str)


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside have held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known | given:
                    self.known.add(storage._cdata)
                    self.held += storage.nbytes()
                    weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return result

    def release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size


def layer(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.quantize_rows(torch.randn(n, k, generator=torch.Generator().manual_seed(n)) * 0.05)


def assert_close(y: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.isfinite(y).all()
    assert (y.double() - expected).abs().max() <= TOLERANCE[y.dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_of_the_weight_takes_its_dtype_and_nothing_of_its_size_besides(dtype):
    n, k, t = 1024, 2048, 4
    weight, scale = layer(n, k)
    x = torch.randn(t, k).to(dtype)
    with PeakMemory() as memory:
        y = generic.int8_linear(x, weight, scale, None, 6.0, "16bit")
    assert_close(y, reference.int8_linear(x, weight, scale, None, 6.0, "16bit", torch.float64))
    small = 64 * (x.nbytes + y.nbytes)
    assert n * k * dtype.itemsize <= memory.peak <= n * k * dtype.itemsize + small
    assert memory.peak <= 5 * n * k


@pytest.mark.parametrize("activations", ["int8", "16bit"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_torch_equals_the_definition(dtype, activations):
    weight, scale = layer(37, 300)
    x = torch.randn(20, 300).to(dtype)
    x[3, 7] = 40.0
    bias = torch.linspace(-1, 1, 37).to(dtype)
    y = generic.int8_linear(x, weight, scale, bias, 6.0, activations)
    assert y.dtype == dtype
    expected = reference.int8_linear(x, weight, scale, bias, 6.0, activations, torch.float64)
    assert (y.double() - expected).abs().max() <= 2 * TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("value", [1e-7, 3.0, 2800.0, 65504.0])
@pytest.mark.parametrize("k", [64, 12288, 49152])
def test_float16_sums_stay_finite_however_large_the_values(k, value):
    weight, scale = torch.full((3, k), -127, dtype=torch.int8), torch.tensor([1e-6, 1e-9, 1e-7])
    scale *= 1e3 / (value * k * 127 * 1e-6)
    x = torch.full((2, k), value, dtype=torch.float16)
    x[1] = 0
    y = generic.int8_linear(x, weight, scale, None, 0.0, "16bit")
    assert_close(y, reference.int8_linear(x, weight, scale, None, 0.0, "16bit", torch.float64))


def test_one_huge_value_leaves_the_small_ones_of_its_row_as_precise_as_they_were():
    """As in a real model's down_proj. Its own weight is 0, so the result is what the small values give."""
    k = 12288
    weight, scale = layer(64, k)
    weight[:, 100] = 0
    x = torch.randn(5, k, generator=torch.Generator().manual_seed(1)).half()
    x[:, 100] = 2823.0
    y = generic.int8_linear(x, weight, scale, None, 0.0, "16bit")
    assert_close(y, reference.int8_linear(x, weight, scale, None, 0.0, "16bit", torch.float64))


def test_each_row_is_scaled_by_itself():
    weight, scale = layer(16, 512)
    x = torch.randn(2, 512).half()
    alone = generic.int8_linear(x[1:], weight, scale, None, 0.0, "16bit")
    x[0] = 60000.0
    both = generic.int8_linear(x, weight, scale * 1e-4, None, 0.0, "16bit")
    assert_close(both[1:] * 1e4, alone.double())
