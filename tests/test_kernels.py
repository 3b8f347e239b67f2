"""Every path of the int8 arithmetic against its definition, and the definition against its paper and its peer."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from bigint8_kernels import (
    copy_values,
    cpu,
    cpu_threads,
    float_linear,
    generic,
    int8_linear,
    quantize_rows,
    quantize_rows_counting,
    reference,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite.binding import get_host_cpu_features

TOLERANCE = {torch.float16: 0.01, torch.bfloat16: 0.01, torch.float32: 1e-4}
DTYPES = sorted(TOLERANCE, key=str)


@contextmanager
def many_threads(wanted: bool) -> Iterator[None]:
    """Kernels run on all threads however small their work, or on one however large."""
    before = cpu_threads.PARALLEL_VALUES
    cpu_threads.PARALLEL_VALUES = 0 if wanted else 2**62
    try:
        yield
    finally:
        cpu_threads.PARALLEL_VALUES = before


def random_weight(n: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return reference.quantize_rows(torch.randn(n, k, generator=generator) * 0.05)


def random_activations(t: int, k: int, dtype: torch.dtype, outliers: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(t, k, generator=generator).clamp(-4, 4)
    if outliers == "all":
        x[torch.randint(t, (k,), generator=generator), torch.arange(k)] = 9.0
    elif outliers == "some":
        columns = torch.randperm(k, generator=generator)[: max(1, k // 20)]
        x[torch.randint(t, (len(columns),), generator=generator), columns] = -20.0
    return x.to(dtype)


def assert_close(y: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype] * expected.abs().max().item()
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max().item() <= limit


shapes = st.tuples(st.integers(1, 300), st.integers(1, 200), st.integers(1, 90))
outlier_kinds = st.sampled_from(["none", "some", "all"])


@settings(deadline=None, max_examples=150)
@given(
    shapes,
    st.sampled_from(DTYPES),
    outlier_kinds,
    st.sampled_from(["int8", "16bit", "auto"]),
    st.booleans(),
    st.booleans(),
)
def test_the_cpu_layer_equals_the_float64_definition(shape, dtype, outliers, activations, has_bias, parallel):
    t, k, n = shape
    weight, scale = random_weight(n, k, seed=k)
    x = random_activations(t, k, dtype, outliers, seed=t)
    bias = torch.linspace(-1, 1, n).to(dtype) if has_bias else None
    with many_threads(parallel):
        y = int8_linear(x, weight, scale, bias, 6.0, activations)
    assert_close(y, reference.int8_linear(x, weight, scale, bias, 6.0, activations, torch.float64), dtype)


@settings(deadline=None, max_examples=60)
@given(shapes, outlier_kinds, st.booleans())
def test_the_product_with_and_the_one_without_vnni_give_the_same_decomposition(shape, outliers, parallel):
    """Only one of them serves many rows on a given CPU, so each is called by name."""
    t, k, n = shape
    weight, scale = random_weight(n, k, seed=n)
    x = random_activations(t, k, torch.float32, outliers, seed=k)
    expected = reference.int8_linear(x, weight, scale, None, 6.0, "int8", torch.float64)
    with many_threads(parallel):
        assert_close(cpu.linear_vnni(x, weight, scale, None, 6.0), expected, torch.float32)
        assert_close(cpu.linear_int8(x, weight, scale, None, 6.0), expected, torch.float32)


def test_a_weight_of_one_column_is_multiplied_right():
    weight, scale = torch.tensor([[127], [-50]], dtype=torch.int8), torch.tensor([0.5, 2.0])
    x = torch.linspace(-1, 1, 17)[:, None]
    for product in (cpu.linear_vnni, cpu.linear_int8):
        assert_close(product(x, weight, scale, None, 0.0), x.double() * torch.tensor([63.5, -100.0]), torch.float32)


def compiled_elsewhere(code: str, cache, **environment: str) -> str:
    """What code prints in a process of its own, in which every kernel is compiled anew."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


MACHINE_CODE = "from bigint8_kernels import cpu_product; print(cpu_product.multiply.compile()._library.get_asm_str())"

VALUES = """
import torch
from bigint8_kernels import cpu, reference
torch.manual_seed(0)
for tokens in (1, 6, 20):
    weight, scale = reference.quantize_rows(torch.randn(37, 1100))
    x = torch.randn(tokens, 1100)
    for activations in ("16bit", "int8"):
        y = cpu.int8_linear(x, weight, scale, None, 3.0, activations)
        expected = reference.int8_linear(x, weight, scale, None, 3.0, activations, torch.float64)
        print(float((y - expected).abs().max() / expected.abs().max()))
"""

on_x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or not get_host_cpu_features().get("avx2"),
    reason="the instructions are those of x86 CPUs with AVX2",
)


@on_x86
def test_products_are_added_in_pairs_by_one_instruction(tmp_path):
    features = get_host_cpu_features()
    with_vnni = features.get("avxvnni") or (features.get("avx512vnni") and features.get("avx512vl"))
    code = compiled_elsewhere(MACHINE_CODE, tmp_path)
    assert code.count("vpdpwssd" if with_vnni else "vpmaddwd") >= 12  # the sums of both tiles


@on_x86
def test_a_cpu_with_avx2_alone_multiplies_right(tmp_path):
    haswell = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}
    code = compiled_elsewhere(MACHINE_CODE, tmp_path / "code", **haswell)
    assert code.count("vpmaddwd") >= 12
    assert "vpdpwssd" not in code and "zmm" not in code
    errors = [float(line) for line in compiled_elsewhere(VALUES, tmp_path / "values", **haswell).split()]
    assert len(errors) == 6 and max(errors) < TOLERANCE[torch.float32]


@settings(deadline=None, max_examples=60)
@given(shapes, outlier_kinds, st.booleans())
def test_16_bit_activations_are_rounded_as_defined(shape, outliers, parallel):
    x = random_activations(shape[0], 7 * shape[1], torch.float32, outliers, seed=shape[2])  # several blocks, and a part
    expected = reference.round_to_16bit(x)
    with many_threads(parallel):
        y = cpu.linear_16bit(x, torch.eye(x.shape[1], dtype=torch.int8), torch.ones(x.shape[1]), None)
    step = x.abs().amax(dim=1, keepdim=True) / 32767
    assert ((y - expected).abs() <= 1.01 * step).all()
    assert ((y - x).abs() <= 0.52 * step).all()
    assert (y != expected).sum() <= 1 + y.numel() // 1000  # a tie may fall to the other side


def test_the_smallest_activations_stay_finite():
    """32767 divided by the absmax of a block must not overflow."""
    weight, scale = random_weight(4, 64, seed=0)
    for absmax in (1e-36, 2.0**-112, 1e-33, 1e-30):
        x = torch.randn(2, 64).clamp(-1, 1) * absmax
        assert torch.isfinite(reference.round_to_16bit(x)).all()
        y = int8_linear(x, weight, scale, None, 6.0, "16bit")
        assert torch.isfinite(y).all()
        expected = reference.int8_linear(x, weight, scale, None, 6.0, "16bit", torch.float64)
        assert (y.double() - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_16_bit_floats_are_16_bit_as_they_are():
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(3, 700).to(dtype)
        assert reference.round_to_16bit(x) is x


def test_sums_of_the_largest_products_do_not_overflow():
    k = 4096
    x, weight = torch.full((17, k), -3.0), torch.full((5, k), -128, dtype=torch.int8)
    for mode in ("int8", "16bit"):
        y = cpu.int8_linear(x, weight, torch.ones(5), None, 0.0, mode)
        assert torch.allclose(y, torch.full((17, 5), 3.0 * 128 * k))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3000), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_values_are_copied_between_formats_as_torch_does(count, source, target):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).mul(10).to(source)
    values[count // 2] = 0.0
    out = torch.full((count,), 99.0, dtype=target)
    assert copy_values(values, out) == (True, True)
    assert torch.equal(out, values.to(target))


def test_values_that_do_not_fit_their_new_format_are_noticed():
    out = torch.empty(3, dtype=torch.float16)
    assert copy_values(torch.tensor([1.0, 1e6, 2.0]), out) == (True, False)
    assert copy_values(torch.tensor([1.0, float("nan"), 2.0]), out) == (False, False)
    assert copy_values(torch.tensor([1.0, float("-inf"), 2.0]), torch.empty(3)) == (False, False)
    with pytest.raises(TypeError, match="int8"):
        copy_values(torch.zeros(3, dtype=torch.int8), out)
    with pytest.raises(ValueError, match="do not belong together"):
        copy_values(torch.zeros(4), out)


@settings(deadline=None, max_examples=60)
@given(shapes, st.sampled_from(DTYPES), st.sampled_from([torch.float16, torch.bfloat16]), st.booleans(), st.booleans())
def test_16_bit_weights_multiply_as_the_same_weights_in_float32_do(shape, dtype, stored, has_bias, parallel):
    t, k, n = shape
    x = random_activations(t, k, dtype, "some", seed=t)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n)).to(stored)
    bias = torch.linspace(-1, 1, n) if has_bias else None
    expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0.0)
    with many_threads(parallel):
        assert_close(float_linear(x, weight, bias), expected, dtype)
    assert_close(generic.float_linear(x.float(), weight), x.double() @ weight.double().T, torch.float32)


@settings(deadline=None, max_examples=60)
@given(shapes, st.sampled_from(DTYPES), outlier_kinds, st.sampled_from(["int8", "16bit"]))
def test_the_plain_torch_path_equals_the_definition(shape, dtype, outliers, activations):
    t, k, n = shape
    weight, scale = random_weight(n, k, seed=k)
    x = random_activations(t, k, dtype, outliers, seed=n)
    y = generic.int8_linear(x, weight, scale, None, 6.0, activations)
    assert_close(y, reference.int8_linear(x, weight, scale, None, 6.0, activations, torch.float64), dtype)


def test_a_bias_of_another_dtype_does_not_change_that_of_the_result():
    weight, scale = random_weight(4, 8, seed=0)
    for product in (int8_linear, generic.int8_linear):
        y = product(torch.randn(3, 8).half(), weight, scale, torch.ones(4), 6.0, "16bit")
        assert y.dtype == torch.float16


def test_a_weight_larger_than_one_slice_is_multiplied_whole(monkeypatch):
    monkeypatch.setattr(generic, "SLICE_BYTES", 4 * 64 * 7)
    weight, scale = random_weight(50, 64, seed=0)
    x = random_activations(20, 64, torch.float32, "some", seed=0)
    expected = reference.int8_linear(x, weight, scale, None, 6.0, "16bit", torch.float64)
    assert_close(generic.int8_linear(x, weight, scale, None, 6.0, "16bit"), expected, torch.float32)


def test_the_definition_is_that_of_the_paper():
    """LLM.int8(), equations 4 to 8, written out in numpy for one input."""
    weight, scale = random_weight(5, 40, seed=1)
    x = random_activations(30, 40, torch.float32, "some", seed=2)
    x_np, w_np, s_np = x.numpy().astype(np.float64), weight.numpy().astype(np.int64), scale.numpy().astype(np.float64)
    outlier = (np.abs(x_np) >= 6.0).any(axis=0)
    assert 0 < outlier.sum() < 40
    rest = np.where(outlier, 0.0, x_np)
    x_scale = np.abs(rest).max(axis=1, keepdims=True) / 127
    quantized = np.rint(rest / x_scale).astype(np.int64)
    expected = (quantized @ w_np.T) * x_scale * s_np + x_np[:, outlier] @ (w_np[:, outlier] * s_np[:, None]).T
    y = reference.int8_linear(x, weight, scale, None, 6.0, "int8", torch.float64)
    assert np.allclose(y.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("activations", ["int8", "16bit"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_rows_give_finite_results(dtype, activations):
    """A row of zeros, a single value, and the largest float16."""
    weight, scale = random_weight(8, 33, seed=3)
    x = torch.zeros(20, 33)
    x[1, 7] = 0.25
    x[2, 5] = 3.0
    x[3, 9] = 65504.0
    x = x.to(dtype)
    small = scale * 1e-3  # so that 65504 times a weight stays within float16
    y = int8_linear(x, weight, small, None, 6.0, activations)
    assert torch.isfinite(y).all()
    assert (y[0] == 0).all()
    for row in (1, 2, 3):
        one = slice(row, row + 1)
        expected = reference.int8_linear(x[one], weight, small, None, 6.0, activations, torch.float64)
        step = 6e-8 if dtype == torch.float16 else 0.0  # the spacing of float16 near zero
        assert (y[one].double() - expected).abs().max() <= 0.01 * expected.abs().max() + step


def test_without_a_threshold_nothing_is_an_outlier():
    weight, scale = random_weight(6, 16, seed=4)
    x = random_activations(20, 16, torch.float32, "some", seed=4)
    assert not reference.outlier_columns(x, 0.0).any()
    y = int8_linear(x, weight, scale, None, 0.0, "int8")
    assert_close(y, reference.int8_linear(x, weight, scale, None, 0.0, "int8", torch.float64), torch.float32)
    assert not torch.allclose(y, int8_linear(x, weight, scale, None, 6.0, "int8"), atol=1e-5)


def test_a_value_at_the_threshold_is_an_outlier():
    x = torch.tensor([[5.99, 6.0, -6.0, 6.01]])
    assert reference.outlier_columns(x, 6.0).tolist() == [False, True, True, True]
    _, _, outliers = cpu.quantize_activations(x, 6.0)
    assert outliers.tolist() == [False, True, True, True]


@settings(deadline=None, max_examples=60)
@given(shapes, outlier_kinds, st.booleans())
def test_activations_are_quantized_bit_for_bit_as_defined(shape, outliers, parallel):
    x = random_activations(shape[0], shape[1], torch.float32, outliers, seed=shape[2])
    with many_threads(parallel):
        q, scale, mask = cpu.quantize_activations(x, 6.0)
    q_expected, scale_expected, mask_expected = reference.quantize_activations(x, 6.0)
    assert torch.equal(mask, mask_expected)
    assert torch.equal(scale, scale_expected)
    assert torch.equal(q, q_expected)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 200),
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([1.0, 1e-4, 3e4, 1e-38]),
    st.booleans(),
)
def test_weights_are_quantized_bit_for_bit_as_defined(rows, k, dtype, transposed, spread, parallel):
    generator = torch.Generator().manual_seed(rows * 1000 + k)
    w = (
        torch.randn(k, rows, generator=generator).T if transposed else torch.randn(rows, k, generator=generator)
    ) * spread
    w = w.clamp(-6e4, 6e4).to(dtype)
    w[rows // 2] = 0
    out, scale = torch.full((rows, k), 99, dtype=torch.int8), torch.full((rows,), 99.0)
    with many_threads(parallel):
        assert quantize_rows(w, out, scale)
    q_expected, scale_expected = reference.quantize_rows(w)
    assert torch.equal(out, q_expected)
    assert torch.equal(scale, scale_expected)
    assert (out[rows // 2] == 0).all() and scale[rows // 2] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_pattern_is_read_right(dtype):
    """All float16 and bfloat16 numbers, one a row: absmax is the number itself, so the scale shows how it was read."""
    if dtype == torch.float32:
        bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=torch.Generator().manual_seed(0)).to(
            torch.int32
        )
    else:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    numbers = bits.view(dtype)
    numbers = numbers[torch.isfinite(numbers)].unsqueeze(1)
    out, scale = torch.empty(numbers.shape, dtype=torch.int8), torch.empty(len(numbers))
    assert quantize_rows(numbers, out, scale)
    q_expected, scale_expected = reference.quantize_rows(numbers)
    assert torch.equal(scale, scale_expected)
    assert torch.equal(out, q_expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("transposed", [False, True])
def test_nan_and_infinity_are_noticed(dtype, value, transposed):
    w = torch.randn(37, 65).to(dtype)
    w[36, 64] = value
    w = w.T.contiguous().T if transposed else w
    out, scale = torch.empty(w.shape, dtype=torch.int8), torch.empty(len(w))
    assert not quantize_rows(w, out, scale)
    assert not generic.quantize_rows(w, out, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_equal_those_of_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = (torch.randn(512, 1536, generator=torch.Generator().manual_seed(5)) * 0.03).to(dtype)
    theirs, absmax, _ = functional.int8_vectorwise_quant(w)
    out, scale = torch.empty(w.shape, dtype=torch.int8), torch.empty(len(w))
    quantize_rows(w, out, scale)
    assert torch.equal(scale, absmax / 127.0)
    difference = (out.int() - theirs.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).sum() <= w.numel() / 10_000


def test_bad_values_can_be_counted_instead_of_told():
    w, bad = torch.randn(10, 24).half(), torch.tensor([5], dtype=torch.int32)
    out, scale = torch.zeros(10, 24, dtype=torch.int8), torch.zeros(10)
    quantize_rows_counting(w, out, scale, bad)
    q_expected, scale_expected = reference.quantize_rows(w)
    assert torch.equal(out, q_expected) and torch.equal(scale, scale_expected) and int(bad) == 5
    w[3, 4] = float("inf")
    quantize_rows_counting(w, out, scale, bad)
    assert int(bad) == 6
    with pytest.raises(TypeError, match="int32"):
        quantize_rows_counting(w.int(), out, scale, bad)


def test_rows_go_into_a_slice_of_a_larger_weight():
    w = torch.randn(10, 24).half()
    out, scale = torch.zeros(30, 24, dtype=torch.int8), torch.zeros(30)
    quantize_rows(w, out[5:15], scale[5:15])
    q_expected, scale_expected = reference.quantize_rows(w)
    assert torch.equal(out[5:15], q_expected) and torch.equal(scale[5:15], scale_expected)
    assert not out[:5].any() and not out[15:].any() and not scale[:5].any() and not scale[15:].any()


def test_wrong_use_is_refused_with_what_was_wrong():
    weight, scale = random_weight(4, 8, seed=6)
    x = torch.randn(3, 8)
    with pytest.raises(TypeError, match="float64"):
        int8_linear(x.double(), weight, scale)
    with pytest.raises(TypeError, match="int8 weights"):
        int8_linear(x, weight.float(), scale)
    with pytest.raises(ValueError, match=r"\(3, 7\)"):
        int8_linear(x[:, :7], weight, scale)
    with pytest.raises(ValueError, match="meta"):
        int8_linear(x.to("meta"), weight, scale)
    with pytest.raises(TypeError, match="int32"):
        quantize_rows(x.int(), weight, scale)
    with pytest.raises(ValueError, match="do not belong together"):
        quantize_rows(x, weight, scale)
    with pytest.raises(ValueError, match=r"bias \(3,\)"):
        int8_linear(x, weight, scale, torch.zeros(3))
    with pytest.raises(ValueError, match="do not belong together"):
        int8_linear(x, weight, scale[:, None])
    with pytest.raises(TypeError, match="float32"):
        float_linear(x, weight.float())
    with pytest.raises(ValueError, match=r"\(4, 7\)"):
        float_linear(x, weight[:, :7].half())


def test_leading_dimensions_are_kept_and_may_be_empty():
    weight, scale = random_weight(4, 8, seed=6)
    x = torch.randn(2, 3, 8)
    for activations in ("int8", "16bit"):
        y = int8_linear(x, weight, scale, None, 6.0, activations)
        assert torch.equal(y.view(6, 4), int8_linear(x.view(6, 8), weight, scale, None, 6.0, activations))
    assert torch.equal(float_linear(x, weight.half()).view(6, 4), float_linear(x.view(6, 8), weight.half()))
    for product in (lambda x: int8_linear(x, weight, scale), lambda x: float_linear(x, weight.half())):
        assert product(x[:, :0]).shape == (2, 0, 4)
        assert product(x[0, 0]).shape == (4,)
    assert torch.equal(int8_linear(x[..., :0], weight[:, :0], scale, torch.ones(4)), torch.ones(2, 3, 4))
