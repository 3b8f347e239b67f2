"""The operations of a step on GPUs against the reference: on a GPU where there is one, else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from bigint8_kernels import gpu, ops, reference
from bigint8_kernels.gpu_tiles import ARCHITECTURES, whole_gemv_tile
from bigint8_kernels.reference_step import ReferenceOperations
from bigint8_kernels.step import PAGE, Activation, Attention, Batch, Linear, Norm, pool_shape
from bigint8_kernels.triton_activations import quantize_by_token
from bigint8_kernels.triton_attention import PART_PAGES, parts_of, row_tiles
from bigint8_kernels.triton_matmul import GATHERED
from bigint8_kernels.triton_norm import LARGEST
from interpreted import bfloat16_in_the_interpreter  # noqa: F401
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
TOLERANCE = {torch.float16: 0.004, torch.bfloat16: 0.02, torch.float32: 2e-5}
"""The largest error allowed, as a part of the largest result."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_close(y: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    assert y.dtype == expected.dtype and y.shape == expected.shape
    limit = (tolerance or TOLERANCE[y.dtype]) * max(1e-6, expected.abs().max().item())
    assert (y.double() - expected.double()).abs().max().item() <= limit


def some_batch(rows: int, few: int) -> Batch:
    """Rows for operations that look at each row alone."""
    zeros = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    return Batch(zeros, zeros, (), few)


# --- norms and activations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 48), (2, 4097), (2, LARGEST + 77)])
def test_a_norm_of_the_sum_is_the_reference_and_the_sum_stays(rows, columns, centered, dtype):
    weight, bias = random(columns, seed=1), random(columns, seed=2).to(dtype)
    for norm in (Norm(weight, bias, 1e-5, centered), Norm(weight.to(dtype), None, 1e-3, centered)):
        for delta in (random(rows, columns, seed=3).to(dtype), None):
            x = random(rows, columns, seed=4).to(dtype)
            x_expected, batch = x.clone(), some_batch(rows, 0)
            y = ops.GpuOperations(batch).add_norm(x, delta, norm)
            expected = ReferenceOperations(batch).add_norm(x_expected, delta, norm)
            assert torch.equal(x, x_expected)
            assert_close(y, expected, {torch.bfloat16: 0.008, torch.float16: 0.001}.get(dtype, 1e-5))


def test_without_a_norm_the_sum_itself_is_the_result():
    x, delta = random(3, 20), random(3, 20, seed=1)
    y = ops.GpuOperations(some_batch(3, 0)).add_norm(x, delta, None)
    assert y is x and torch.equal(x, random(3, 20) + delta)


def test_a_row_that_lies_apart_from_the_next_is_normed():
    wide = random(4, 100)
    x, expected = wide[:, :60], wide.clone()[:, :60]
    norm, batch = Norm(random(60, seed=1), None, 1e-6, False), some_batch(4, 0)
    y = ops.GpuOperations(batch).add_norm(x, wide[:, 40:], norm)
    assert_close(y, ReferenceOperations(batch).add_norm(expected, random(4, 100)[:, 40:], norm))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["silu", "relu", "gelu", "gelu_tanh"])
def test_an_activation_is_the_reference(kind: Activation, gated, dtype):
    for rows, columns in ((1, 2), (3, 2 * 1030)):
        x = (random(rows, columns) * 8).to(dtype)
        x[0, 0], x[-1, 1] = -200.0, 200.0
        batch = some_batch(rows, 0)
        y = ops.GpuOperations(batch).activate(x, kind, gated)
        assert_close(y, ReferenceOperations(batch).activate(x, kind, gated), {torch.float32: 1e-6}.get(dtype, 0.004))


# --- linear layers -----------------------------------------------------------------------------------------------


def int8_layer(outputs: int, features: int, bias: torch.dtype | None = None, **settings) -> Linear:
    q, scale = reference.quantize_rows(random(outputs, features, seed=outputs) * 0.05)
    return Linear(q, scale, None if bias is None else random(outputs, seed=7).to(bias), **{"threshold": 6.0} | settings)


def rows_with_outliers(rows: int, features: int, dtype: torch.dtype) -> Tensor:
    """Small rows, of which some have a value of 20 times their RMS, far below 6.0; a row with values just below its
    bound in columns where others have outliers; a large row of values above 6.0 without an outlier; zeros."""
    x = random(rows, features).clamp(-4, 4) * 0.05
    x[rows // 2, ::7] = 0.2
    for row, column in ((rows // 3, features // 2), (rows - 1, 0)):
        x[row, column] = 0.0
        rest = x[row].square().sum().item()
        # 20 times the RMS of the row itself, where it is wide enough for that, else of its other values
        x[row, column] = -20 * (rest / (features - 400 if features > 500 else features)) ** 0.5
    if rows > 5:
        x[2] = random(features, seed=1).sign() * 9.0
        x[5] = 0.0
    return x.to(dtype)


def outliers_of(x: Tensor, threshold: float) -> Tensor:
    least = threshold * x.float().square().mean(1, keepdim=True).sqrt()
    return (x.abs().float() >= least) & (least > 0)


def assert_each_row_close(y: Tensor, expected: Tensor) -> None:
    """To about the precision of X's format, relative to the row: an outlier more or less makes far more."""
    assert y.dtype == expected.dtype and y.shape == expected.shape
    limit = {torch.float16: 0.001, torch.bfloat16: 0.005, torch.float32: 1e-5}[y.dtype] * expected.abs().amax(1)
    assert ((y.double() - expected.double()).abs().amax(1) <= limit).all()


@pytest.mark.parametrize("features", [70, 600])
def test_rows_have_outliers_below_6_and_values_above_6_that_are_none(features):
    """What the tests below rely on: no threshold that is the same for all rows tells these apart."""
    x = rows_with_outliers(9, features, torch.float32)
    found, rms = outliers_of(x, 6.0), x.square().mean(1).sqrt()
    assert found.any(1).tolist() == [row in (3, 8) for row in range(9)]
    assert x[found].abs().max() < 6.0 < x[2].abs().min()
    assert features == 70 or torch.allclose(x.abs().amax(1)[[3, 8]] / rms[[3, 8]], torch.tensor(20.0))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "few"), [(1, 1), (5, 5), (5, 0), (20, 20), (40, 37), (20, 3), (70, 66), (80, 0)])
def test_layers_side_by_side_are_the_reference(rows, few, dtype):
    layers = [int8_layer(37, 70, dtype), int8_layer(16, 70), int8_layer(130, 70, dtype)]
    x, batch = rows_with_outliers(rows, 70, dtype), some_batch(rows, few)
    for count in (1, 2, 3):
        y = ops.GpuOperations(batch).linear(x, layers[:count], "y")
        assert_close(y, ReferenceOperations(batch).linear(x, layers[:count], "y"), 0.01 if dtype != FLOATS[2] else 1e-4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "features", "outputs"), [(9, 1100, 70), (20, 70, 40), (139, 70, 37)])
def test_each_token_of_a_prompt_is_the_reference_to_the_precision_of_its_own_row(rows, features, outputs, dtype):
    """With K split and whole, columns gathered and not."""
    layer, x, batch = int8_layer(outputs, features), rows_with_outliers(rows, features, dtype), some_batch(rows, 0)
    y = ops.GpuOperations(batch).linear(x, [layer], "y")
    assert_each_row_close(y, ReferenceOperations(batch).linear(x, [layer], "y"))


def test_each_layer_keeps_its_own_rows_in_16_bits():
    kinds = ("auto", "16bit", "int8", "int8", "auto")
    layers = [int8_layer(20 + i, 64, activations=kind, threshold=3.0 + i) for i, kind in enumerate(kinds)]
    x, batch = rows_with_outliers(9, 64, torch.float16), some_batch(9, 4)
    y = ops.GpuOperations(batch).linear(x, layers, "y")
    assert_close(y, ReferenceOperations(batch).linear(x, layers, "y"))


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_layers_beside_int8_layers_are_the_reference(dtype):
    layers = [Linear(random(30, 64).to(dtype), None, random(30).to(dtype)), int8_layer(20, 64, dtype)]
    layers += [Linear(random(11, 64).to(torch.float16))]
    x, batch = random(9, 64).to(dtype), some_batch(9, 4)
    y = ops.GpuOperations(batch).linear(x, layers, "y")
    assert_close(y, ReferenceOperations(batch).linear(x, layers, "y"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [17, 70])
def test_a_token_of_a_prompt_gets_the_same_bits_whoever_runs_with_it(rows, dtype):
    """Its neighbour's outliers are in other columns; the sums are exact or in the same order."""
    layer, x = int8_layer(40, 64), rows_with_outliers(rows, 64, dtype)
    batch, token = some_batch(rows, 0), rows // 3
    calm = torch.full_like(x, 0.1)
    calm[token] = x[token]
    y, alone = (ops.GpuOperations(batch).linear(each, [layer], "y")[token] for each in (x, calm))
    assert_close(y, alone, 1e-6 if dtype == torch.float32 else 0.002)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [70, 16384 + 5])
def test_outliers_of_a_token_alone_are_left_out_bit_for_bit(columns, dtype):
    x = rows_with_outliers(9, columns, dtype)
    (q, scale, listed, count), least = quantize_by_token(x, 6.0)
    outliers = outliers_of(x, 6.0)
    assert outliers.any() and least is not None and torch.equal(x.abs().float() >= least[:, None], outliers)
    assert torch.allclose(least[:5], 6 * x[:5].float().square().mean(1).sqrt(), rtol=1e-5) and least[5].isinf()
    q_expected, scale_expected = reference.quantize_rows(torch.where(outliers, 0.0, x.float()))
    assert torch.equal(q, q_expected) and torch.equal(scale, scale_expected)
    assert listed[: int(count)].tolist() == outliers.any(0).nonzero().flatten().tolist()


def test_without_a_threshold_no_value_of_a_token_is_an_outlier():
    x = rows_with_outliers(9, 70, torch.float16)
    (q, scale, _, count), least = quantize_by_token(x, 0.0)
    q_expected, scale_expected = reference.quantize_rows(x)
    assert torch.equal(q, q_expected) and torch.equal(scale, scale_expected) and int(count) == 0 and least is None


def test_more_outlier_columns_than_are_gathered_are_the_reference():
    """At a threshold of 2, five of a hundred values of a row are outliers; some in every column."""
    layer, x = int8_layer(24, GATHERED + 40, threshold=2.0), random(139, GATHERED + 40).half()
    assert outliers_of(x, 2.0).any(0).all()
    batch = some_batch(139, 0)
    y = ops.GpuOperations(batch).linear(x, [layer], "y")
    assert_each_row_close(y, ReferenceOperations(batch).linear(x, [layer], "y"))


@pytest.mark.parametrize("processors", [82, 132, 1000])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_tile_that_does_not_split_k_multiplies_right(processors, dtype, monkeypatch):
    monkeypatch.setattr(ops, "gpu_of", lambda device: gpu.Gpu(ARCHITECTURES[86], processors))
    for outputs, features in ((37, 4100), (700, 1030)):
        layers = [int8_layer(outputs, features, dtype)]
        for rows in (1, 3, 19, 35):
            x, batch = random(rows, features).to(dtype), some_batch(rows, rows)
            y = ops.GpuOperations(batch).linear(x, layers, "y")
            assert_close(y, ReferenceOperations(batch).linear(x, layers, "y"), 0.01)


def test_a_launch_that_does_not_split_k_fills_the_gpu_with_warps_or_smaller_tiles():
    for rows, outputs in ((1, 576), (1, 4096), (1, 12288), (16, 576), (16, 4096), (16, 12288)):
        tile = whole_gemv_tile(rows, outputs, 4096, False, 82)
        programs = -(-outputs // tile.outputs)
        assert programs * tile.warps >= 8 * 82 or tile.warps == 16 or (rows > 1 and programs >= min(82, outputs // 16))
    assert whole_gemv_tile(1, 576, 600, False, 82).depth <= 600


# --- attention ---------------------------------------------------------------------------------------------------


def attention_of(heads: int, kv_heads: int, d: int, order: str = "split", **settings) -> Attention:
    if order == "heads":
        q, k, v = (0, 3 * d), (d, 3 * d), (2 * d, 3 * d)
    else:
        q, k, v = (0, d), (heads * d, d), ((heads + kv_heads) * d, d)
    return Attention(heads, kv_heads, d, q, k, v, d**-0.5, **settings)


def head_norm(d: int, centered: bool, dtype: torch.dtype, seed: int) -> Norm:
    return Norm(
        random(d, seed=seed).to(dtype), random(d, seed=seed + 1).to(dtype) if centered else None, 1e-5, centered
    )


ATTENTIONS = {
    "plain": attention_of(4, 4, 64),
    "queries share keys": attention_of(6, 2, 64, rotated=64),
    "many queries share keys": attention_of(20, 1, 12, rotated=8),
    "narrow heads, each by itself": attention_of(3, 3, 12, "heads", rotated=4),
    "part of a head is rotated": attention_of(2, 2, 80, "heads", rotated=32),
    "wide heads": attention_of(4, 2, 128, rotated=128),
    "widest heads": attention_of(2, 1, 256, rotated=64),
    "alibi": attention_of(6, 6, 16, slopes=torch.tensor([0.5, 0.25, 0.1, 0.03, 0.01, 0.002])),
    "a window": attention_of(4, 2, 32, rotated=32, window=21),
    "a window of one": attention_of(2, 2, 16, window=1),
    "norms of heads": attention_of(4, 2, 32, rotated=32),
    "centered norms of heads": attention_of(4, 4, 20, rotated=8),
}


def named_attention(name: str, dtype: torch.dtype) -> Attention:
    attention = ATTENTIONS[name]
    if "norms" in name:
        d, centered = attention.head_dim, "centered" in name
        norms = {"q_norm": head_norm(d, centered, dtype, 1), "k_norm": head_norm(d, centered, dtype, 5)}
        attention = replace(attention, **norms)
    return attention if attention.slopes is None else replace(attention, slopes=attention.slopes.to(DEVICE))


def ragged(attention: Attention, counts: list[tuple[int, int]], few: int, table_pages: int, absent: int = -1) -> Batch:
    """A step of sequences with (places before, rows): row `absent` is no token. Their pages lie in any order."""
    places = [before + i for before, rows in counts for i in range(rows)]
    sequences = [s for s, (_, rows) in enumerate(counts) for _ in range(rows)]
    generator = torch.Generator().manual_seed(len(places))
    tables = torch.full((len(counts), table_pages), -1, dtype=torch.int32)
    free = torch.randperm(table_pages * len(counts), generator=generator).int()
    for s, (before, rows) in enumerate(counts):
        used = (before + rows - 1) // PAGE + 1
        seen = 0 if attention.window is None else max(0, before + 1 - attention.window) // PAGE
        tables[s, seen:used] = free[s * table_pages : s * table_pages + used - seen]
    if absent >= 0:
        tables[sequences[absent], places[absent] // PAGE] = -1
    half = attention.rotated // 2
    cos, sin = (random(len(places), half, seed=seed) if half else None for seed in (8, 9))
    on = [torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in (places, sequences)]
    return Batch(*on, (tables.to(DEVICE),), few, cos, sin)


def check_attention(attention: Attention, batch: Batch, dtype: torch.dtype, pool_dtype: torch.dtype) -> None:
    """The rows' results and the whole pool; what no sequence has written is not a number."""
    pool = torch.full(pool_shape(batch.tables[0].numel(), attention), float("nan"), dtype=pool_dtype, device=DEVICE)
    keys = pool[:, 0].view(len(pool), attention.kv_heads, attention.head_dim, PAGE)
    values = pool[:, 1].view(len(pool), attention.kv_heads, PAGE, attention.head_dim)
    starts = {s: int(batch.places_T[batch.sequences_T == s].min()) for s in batch.sequences_T.unique().tolist()}
    for s, start in starts.items():
        for place in range(start):
            page, slot = int(batch.tables[0][s, place // PAGE]), place % PAGE
            if page >= 0:
                keys[page, :, :, slot] = random(attention.kv_heads, attention.head_dim, seed=place + 1).to(pool_dtype)
                values[page, :, slot] = random(attention.kv_heads, attention.head_dim, seed=place + 9000).to(pool_dtype)
    qkv = random(batch.rows, (attention.heads + 2 * attention.kv_heads) * attention.head_dim, seed=3).to(dtype)
    pool_expected = pool.clone()
    y = ops.GpuOperations(batch).attend(qkv, attention, pool)
    expected = ReferenceOperations(batch).attend(qkv, attention, pool_expected)
    limit = max(TOLERANCE[dtype], TOLERANCE[pool_dtype])
    assert torch.equal(pool.isnan(), pool_expected.isnan())
    assert_close(pool.nan_to_num(), pool_expected.nan_to_num(), limit)
    assert_close(y, expected, limit)


CASES = [(name, torch.float16) for name in ATTENTIONS]
CASES += [(name, dtype) for name in ("norms of heads", "alibi") for dtype in (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_generated_tokens_attend_as_the_reference(name, dtype):
    """One launch: places at the beginning of a page, at its end, the first of all."""
    attention = named_attention(name, dtype)
    batch = ragged(attention, [(0, 1), (15, 1), (16, 1), (70, 1)], 4, 6)
    check_attention(attention, batch, dtype, dtype)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_prompts_and_generated_tokens_attend_as_the_reference(name, dtype):
    """Sequences begin within tiles of rows, a prompt is longer than a tile, and has a part before it."""
    attention = named_attention(name, dtype)
    batch = ragged(attention, [(33, 1), (0, 1), (40, 3), (0, 70), (17, 5)], 2, 8)
    check_attention(attention, batch, dtype, dtype)


@pytest.mark.parametrize("pool_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_keys_and_values_may_be_of_another_format_than_the_rows(dtype, pool_dtype):
    attention = ATTENTIONS["queries share keys"]
    check_attention(attention, ragged(attention, [(5, 1), (50, 1)], 2, 4), dtype, pool_dtype)
    check_attention(attention, ragged(attention, [(5, 1), (50, 9)], 1, 4), dtype, pool_dtype)


def test_several_generated_rows_of_one_sequence_see_each_other():
    attention = ATTENTIONS["wide heads"]
    check_attention(attention, ragged(attention, [(30, 3), (2, 1)], 4, 4), torch.float16, torch.float16)


@pytest.mark.parametrize("name", ["queries share keys", "a window", "many queries share keys"])
def test_a_long_context_is_attended_in_parts_in_one_launch(name):
    """More pages than a part has, by a number that is no multiple; a short context beside it is in one part."""
    attention = replace(ATTENTIONS[name], window=700 if ATTENTIONS[name].window else None)
    pages = 4 * PART_PAGES + 5
    assert parts_of(2, attention, pages, 82) > 1
    for absent in (-1, 1):
        batch = ragged(attention, [(pages * PAGE - 3, 1), (40, 1)], 2, pages, absent)
        check_attention(attention, batch, torch.float16, torch.float16)


def test_a_row_that_is_no_token_writes_nothing_and_gives_zeros():
    attention = ATTENTIONS["plain"]
    check_attention(attention, ragged(attention, [(5, 1), (50, 1)], 2, 4, absent=0), torch.float16, torch.float16)
    check_attention(attention, ragged(attention, [(5, 1), (20, 9)], 1, 4, absent=2), torch.float16, torch.float16)


def test_rows_are_cut_into_tiles_of_one_sequence_each():
    sequences = torch.tensor([9, 9, 4, 4, 4, 0, 7, 7, 7, 7, 7, 7, 7], dtype=torch.int32)
    tiles = row_tiles(sequences, 2, 4, 4).tolist()
    assert tiles[:6] == [2, 5, 6, 10, 13, 13] and set(tiles[5:]) == {13}


def test_a_context_is_in_more_parts_the_fewer_rows_there_are():
    attention = ATTENTIONS["wide heads"]
    assert parts_of(1, attention, 128, 82) == 8
    assert parts_of(40, attention, 128, 82) == 3
    assert parts_of(400, attention, 128, 82) == 1
    assert parts_of(1, attention, PART_PAGES, 82) == 1
