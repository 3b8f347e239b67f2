"""The GPU kernels against the reference: on a GPU where there is one, in Triton's interpreter elsewhere."""

import sys
import warnings
from dataclasses import replace

import pytest
import torch
from bigint8_kernels import dispatch, reference, triton_activations, triton_gemv, triton_matmul, triton_weights
from bigint8_kernels.gpu import MOST_GEMV_ROWS, Gpu, int8_linear
from bigint8_kernels.gpu_tiles import ARCHITECTURES, gemv_tile, matmul_tiles
from bigint8_kernels.triton_matmul import GATHERED
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from interpreted import bfloat16_in_the_interpreter  # noqa: F401

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float16: 0.01, torch.bfloat16: 0.01, torch.float32: 1e-4}
DTYPES = sorted(TOLERANCE, key=str)

shapes = st.tuples(st.integers(1, 130), st.integers(1, 300), st.integers(1, 150))
outlier_kinds = st.sampled_from(["none", "some", "all"])


def few(examples: int):
    """No shrinking: in the interpreter it takes longer than reading a large example."""
    return settings(
        deadline=None,
        max_examples=examples,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
    )


def random_weight(n: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, scale = reference.quantize_rows(torch.randn(n, k, generator=generator) * 0.05)
    return q.to(DEVICE), scale.to(DEVICE)


def random_activations(t: int, k: int, dtype: torch.dtype, outliers: str, seed: int, apart: int = 0) -> torch.Tensor:
    """Rows that lie `apart` values from each other, one of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(t, k, generator=generator).clamp(-4, 4)
    if outliers != "none":
        columns = torch.randperm(k, generator=generator)[: k if outliers == "all" else max(1, k // 20)]
        x[torch.randint(t, (len(columns),), generator=generator), columns] = -9.0
    if t > 2:
        x[t // 2] = 0.0
    wide = torch.full((t, k + apart), float("nan"), dtype=dtype, device=DEVICE)
    wide[:, :k] = x
    return wide[:, :k]


def assert_close(y: torch.Tensor, expected: torch.Tensor) -> None:
    limit = TOLERANCE[y.dtype] * expected.abs().max().item()
    assert (y.double() - expected).abs().max().item() <= limit


@few(15)
@given(
    st.integers(1, 130), st.integers(1, 700), st.sampled_from(DTYPES), st.sampled_from([1.0, 1e-4, 3e4, 1e-38]),
    st.sampled_from([0, 5]),
)  # fmt: skip
def test_weights_are_quantized_bit_for_bit_as_defined(rows, k, dtype, spread, apart):
    w = (torch.randn(rows, k, generator=torch.Generator().manual_seed(rows * 1000 + k)) * spread).clamp(-6e4, 6e4)
    wide = torch.full((rows, k + apart), float("nan"), dtype=dtype, device=DEVICE)
    wide[:, :k] = w
    wide[rows // 2, :k] = 0
    assert_quantized(wide[:, :k])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [16384, 16385, 49152, 49157])
def test_rows_wider_than_a_block_are_quantized_bit_for_bit(k, dtype):
    w = torch.randn(2, k, generator=torch.Generator().manual_seed(k))
    w[0, -1], w[1, 0] = 77.0, -99.0
    assert_quantized(w.to(dtype))


def assert_quantized(w: torch.Tensor) -> None:
    w = w.to(DEVICE)
    out, scale = torch.full(w.shape, 99, dtype=torch.int8, device=DEVICE), torch.full((len(w),), 9.0, device=DEVICE)
    assert triton_weights.quantize_rows(w, out, scale)
    q_expected, scale_expected = reference.quantize_rows(w)
    assert torch.equal(scale, scale_expected)
    assert torch.equal(out, q_expected)


def test_every_float16_is_read_right():
    """All of them, 2048 a row: a row's absmax and its values' places on its grid show how they were read."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    numbers = numbers[torch.isfinite(numbers)].view(-1, 2048)
    assert_quantized(numbers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_counted_and_leave_zeros(dtype):
    w = torch.randn(5, 70).to(dtype)
    w[1, 3], w[1, 69], w[4, 0] = float("nan"), float("inf"), float("-inf")
    out, scale = torch.full((5, 70), 9, dtype=torch.int8, device=DEVICE), torch.full((5,), 9.0, device=DEVICE)
    bad = torch.tensor([10], dtype=torch.int32, device=DEVICE)
    triton_weights.quantize_rows_into(w.to(DEVICE), out, scale, bad)
    assert int(bad) == 13
    good = [0, 2, 3]
    q_expected, scale_expected = reference.quantize_rows(w[good])
    assert torch.equal(out[good].cpu(), q_expected) and torch.equal(scale[good].cpu(), scale_expected)
    assert not out[[1, 4]].any() and not scale[[1, 4]].any()
    assert not triton_weights.quantize_rows(w.to(DEVICE), out, scale)


def test_a_transposed_weight_is_quantized_by_its_own_rows():
    w = torch.randn(50, 40).half().T
    assert w.stride() == (1, 40)
    assert_quantized(w)


def test_rows_go_into_a_slice_beyond_two_to_the_31_bytes():
    """As in a 175B model's layers. The memory between the rows is never touched."""
    k = 100
    out = torch.empty_strided((3, k), (2**31 + 16, 1), dtype=torch.int8, device=DEVICE)
    scale = torch.empty(5, device=DEVICE)
    w = torch.randn(2, k).half().to(DEVICE)
    assert triton_weights.quantize_rows(w, out[1:], scale[2:4])
    q_expected, scale_expected = reference.quantize_rows(w)
    assert torch.equal(out[1:], q_expected) and torch.equal(scale[2:4], scale_expected)


@few(15)
@given(st.integers(1, 130), st.integers(1, 600), st.sampled_from(DTYPES), outlier_kinds, st.sampled_from([0, 5]))
def test_activations_are_quantized_bit_for_bit_as_defined(t, k, dtype, outliers, apart):
    assert_activations_quantized(random_activations(t, k, dtype, outliers, t, apart), 6.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_wider_than_a_block_are_quantized_bit_for_bit(dtype):
    assert_activations_quantized(random_activations(3, 49152, dtype, "some", 1), 6.0)


def test_without_a_threshold_no_column_is_an_outlier():
    assert_activations_quantized(random_activations(5, 40, torch.float16, "all", 1), 0.0)


def test_a_value_at_the_threshold_is_an_outlier():
    x = torch.tensor([[5.996, 6.0, -6.0, 6.004, 0.0]], dtype=torch.float16, device=DEVICE)
    assert_activations_quantized(x, 6.0)
    _, _, outliers, count = triton_activations.quantize_activations(x, 6.0)
    assert outliers[: int(count)].tolist() == [1, 2, 3]


def assert_activations_quantized(x: torch.Tensor, threshold: float) -> None:
    q, scale, outliers, count = triton_activations.quantize_activations(x, threshold)
    q_expected, scale_expected, mask_expected = reference.quantize_activations(x, threshold)
    assert torch.equal(scale, scale_expected)
    assert torch.equal(q, q_expected)
    assert outliers[: int(count)].tolist() == mask_expected.nonzero().squeeze(1).tolist()


@few(20)
@given(
    shapes, st.sampled_from(DTYPES), outlier_kinds, st.sampled_from(["int8", "16bit", "auto"]), st.booleans(),
    st.sampled_from([86, 80]), st.sampled_from([1, 82]),
)  # fmt: skip
def test_the_gpu_layer_equals_the_float64_definition(
    shape, dtype, outliers, activations, has_bias, capability, processors
):
    t, k, n = shape
    weight, scale = random_weight(n, k, seed=k)
    x = random_activations(t, k, dtype, outliers, t, apart=k % 3)
    bias = torch.linspace(-1, 1, n).to(dtype).to(DEVICE) if has_bias else None
    y = int8_linear(x, weight, scale, bias, 6.0, activations, Gpu(ARCHITECTURES[capability], processors))
    assert y.dtype == dtype
    assert_close(y, reference.int8_linear(x, weight, scale, bias, 6.0, activations, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k", "n", "split"), [(3, 70, 37, 1), (40, 1100, 70, 4), (20, 1024, 128, 2)])
def test_every_tile_multiplies_right_with_k_whole_and_split(rows, k, n, split, dtype):
    weight, scale = random_weight(n, k, seed=k)
    x = random_activations(rows, k, dtype, "some", 1)
    bias = torch.linspace(-1, 1, n).to(dtype).to(DEVICE)
    q, x_scale, outliers, count = triton_activations.quantize_activations(x, 6.0)
    expected = reference.int8_linear(x, weight, scale, bias, 6.0, "int8", torch.float64)
    is_float32 = dtype == torch.float32
    tiles = {tile for a in (86, 90) for r in (16, 2048) for tile in matmul_tiles(ARCHITECTURES[a], r, is_float32)}
    for tile in tiles:
        tile = replace(tile, split=split)
        assert_close(triton_matmul.int8_matmul(q, x_scale, x, outliers, count, weight, scale, bias, (tile,)), expected)
    x = reference.round_to_16bit(x)
    expected = reference.int8_linear(x, weight, scale, bias, 6.0, "16bit", torch.float64)
    for some in (1, rows):
        tile = replace(gemv_tile(some, is_float32), split=split)
        y = triton_gemv.int8_gemv(x[:some], weight, scale, bias, tile)
        limit = TOLERANCE[dtype] * expected.abs().max()
        assert (y.double() - expected[:some]).abs().max() <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [GATHERED - 7, GATHERED, GATHERED + 7, 2 * GATHERED + 3])
def test_more_outlier_columns_than_are_gathered_are_multiplied_right(k, dtype):
    """All columns have outliers, so there are as many as features; rows fill several tiles and their last in part."""
    weight, scale = random_weight(37, k, seed=k)
    x = random_activations(139, k, dtype, "none", 1) + 20.0
    y = int8_linear(x, weight, scale, None, 6.0, "int8", Gpu(ARCHITECTURES[86], 1))
    assert_close(y, reference.int8_linear(x, weight, scale, None, 6.0, "int8", torch.float64))


def test_outlier_columns_are_gathered_as_far_as_there_is_room():
    k, n = GATHERED + 50, 70
    weight, _ = random_weight(n, k, seed=1)
    listed = torch.arange(k - 1, -1, -1, dtype=torch.int32, device=DEVICE)
    for found in (0, 1, 33, GATHERED, k):
        w_outliers = triton_matmul._gather_columns(weight, listed, torch.tensor([found], dtype=torch.int32).to(DEVICE))
        expected = weight[:, listed[: min(found, GATHERED)].long()]
        assert w_outliers.shape == (n, GATHERED)
        assert torch.equal(w_outliers[:, : expected.shape[1]], expected)


def test_the_largest_float16_and_sums_of_the_largest_products_stay_finite():
    k = 2048
    weight, scale = torch.full((5, k), -127, dtype=torch.int8, device=DEVICE), torch.full((5,), 1e-6, device=DEVICE)
    for rows in (1, 17):
        for value in (3.0, 65504.0):
            x = torch.full((rows, k), value, dtype=torch.float16, device=DEVICE)
            for activations in ("int8", "16bit"):
                y = int8_linear(x, weight, scale, None, 0.0, activations, Gpu(ARCHITECTURES[86], 82))
                assert_close(y, reference.int8_linear(x, weight, scale, None, 0.0, activations, torch.float64))


def test_tuning_that_had_too_little_memory_is_not_tried_again_for_these_rows(monkeypatch):
    tries = []

    class OutOfMemory:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                tries.append(grid)
                raise torch.OutOfMemoryError

            return launch

    monkeypatch.setattr(triton_matmul, "_tuned", lambda tiles: OutOfMemory())
    monkeypatch.setattr(triton_matmul, "_untuned", set())
    weight, scale = random_weight(40, 128, seed=0)
    tiles = matmul_tiles(ARCHITECTURES[86], 2048)
    for rows, expected_tries in ((70, 1), (128, 1), (129, 2), (100, 2)):
        x = random_activations(rows, 128, torch.float16, "some", rows)
        q, x_scale, outliers, count = triton_activations.quantize_activations(x, 6.0)
        y = triton_matmul.int8_matmul(q, x_scale, x, outliers, count, weight, scale, None, tiles)
        assert_close(y, reference.int8_linear(x, weight, scale, None, 6.0, "int8", torch.float64))
        assert len(tries) == expected_tries


def test_many_rows_of_16_bit_activations_take_the_plain_path():
    weight, scale = random_weight(20, 50, seed=0)
    x = random_activations(MOST_GEMV_ROWS + 1, 50, torch.float16, "some", 0)
    y = int8_linear(x, weight, scale, None, 6.0, "16bit", Gpu(ARCHITECTURES[86], 82))
    assert_close(y, reference.int8_linear(x, weight, scale, None, 6.0, "16bit", torch.float64))


# --- which device is served by what -------------------------------------------------------------------------------


@pytest.fixture
def capability(monkeypatch):
    """As if there were a GPU of this compute capability: as far as choosing goes, which is plain Python."""

    def pretend(major: int, minor: int) -> torch.device:
        dispatch.backend_of.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        return torch.device("cuda", 0)

    yield pretend
    dispatch.backend_of.cache_clear()


def test_an_old_gpu_is_served_by_plain_torch_and_told_so_once(capability):
    device = capability(7, 5)
    with pytest.warns(UserWarning, match=r"Tesla T4.*plain torch.*7\.5.*8\.0"):
        assert dispatch.backend_of(device) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.backend_of(device) == "torch"


@pytest.mark.parametrize("version", [(8, 0), (8, 6), (9, 0), (12, 0)])
def test_a_newer_gpu_is_served_by_triton(capability, version, monkeypatch):
    monkeypatch.setattr(dispatch, "missing_to_launch", lambda: None)
    assert dispatch.backend_of(capability(*version)) == "triton"


@pytest.mark.parametrize("compiler", [None, "no-such-compiler"])
def test_a_gpu_without_a_c_compiler_is_served_by_plain_torch_and_told_what_to_install(
    capability, compiler, monkeypatch, tmp_path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if compiler:
        monkeypatch.setenv("CC", compiler)
    device = capability(8, 6)
    with pytest.warns(UserWarning, match=f"plain torch.*C compiler.*{compiler or 'install gcc or clang'}"):
        assert dispatch.backend_of(device) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.backend_of(device) == "torch"


@pytest.mark.parametrize("name", ["gcc", "clang", "my-cc"])
def test_a_compiler_that_triton_finds_is_enough(capability, name, monkeypatch, tmp_path):
    (tmp_path / name).write_text("#!/bin/sh\n")
    (tmp_path / name).chmod(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(dispatch.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    if name == "my-cc":
        monkeypatch.setenv("CC", name)
    assert dispatch.backend_of(capability(8, 6)) == "triton"


def test_a_gpu_without_pythons_headers_is_served_by_plain_torch_and_told_what_to_install(
    capability, monkeypatch, tmp_path
):
    monkeypatch.setattr(dispatch.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", sys.executable)
    with pytest.warns(UserWarning, match=r"Python\.h.*python3-dev"):
        assert dispatch.backend_of(capability(8, 6)) == "torch"


def test_there_is_nothing_to_prepare_on_a_cpu():
    dispatch.prepare_layers([torch.zeros(8, 8, dtype=torch.int8)], torch.float16, 128)


def test_a_dtype_that_no_kernel_takes_is_not_prepared():
    with pytest.raises(TypeError, match="float64"):
        dispatch.prepare_layers([], torch.float64, 128)


def test_other_devices_are_served_by_plain_torch():
    assert dispatch.backend_of(torch.device("cpu")) == "cpu"
    assert dispatch.backend_of(torch.device("meta")) == "torch"
