"""Operations of a step on the CPU against their definition, and their promise: a row's bits depend on no other row."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from bigint8_kernels import cpu_program, recorder, reference
from bigint8_kernels.cpu_step import CpuStep
from bigint8_kernels.reference_step import ReferenceOperations
from bigint8_kernels.step import PAGE, Attention, Batch, Linear, Norm, Operations, pool_shape
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

POOLS = [torch.float32, torch.float16, torch.bfloat16]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8(n: int, k: int, seed: int = 0, **rest) -> Linear:
    weight, scale = reference.quantize_rows(random(n, k, seed=seed) * 0.05)
    return Linear(weight, scale, **rest)


def rms(width: int, seed: int = 0) -> Norm:
    return Norm(1 + 0.1 * random(width, seed=seed), None, 1e-5, centered=False)


@dataclass(frozen=True)
class Rows:
    """Some rows of a sequence: its first `before` places are in the pool already."""

    before: int
    count: int = 1
    is_token: bool = True


def batch_of(sequences: Sequence[Rows], few: int | None = None, rotated: int = 0, groups: int = 1) -> Batch:
    """A batch whose sequences have pages in a random order, which depends on a sequence's number only."""
    places = [place for rows in sequences for place in range(rows.before, rows.before + rows.count)]
    owners = [s for s, rows in enumerate(sequences) for _ in range(rows.count)]
    width = max(places) // PAGE + 2
    pages = torch.arange(len(sequences) * width).view(len(sequences), width).flip(1)
    pages[[s for s, rows in enumerate(sequences) if not rows.is_token]] = -1
    angles = torch.tensor(places)[:, None] * torch.logspace(0, -3, rotated // 2)
    return Batch(
        torch.tensor(places, dtype=torch.int32),
        torch.tensor(owners, dtype=torch.int32),
        (pages.int(),) * groups,
        len(places) if few is None else few,
        angles.cos() if rotated else None,
        angles.sin() if rotated else None,
    )


def pool_of(attention: Attention, batch: Batch, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(*pool_shape(int(batch.tables[0].max()) + 1, attention), seed=9).to(dtype)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert torch.isfinite(got).all()
    assert (got - expected).abs().max().item() <= tolerance * max(1.0, expected.abs().max().item())


def run_linear(x_TK: Tensor, layers: Sequence[Linear], few: int, threads: int = 2) -> Tensor:
    step = CpuStep(len(x_TK), threads)
    x = step.rows("x", x_TK.shape[1])
    y = step.linear(x, layers, "y")
    x[:] = x_TK
    step.run_rows(len(x_TK), few)
    return y


def reference_linear(x_TK: Tensor, layers: Sequence[Linear], few: int) -> Tensor:
    return ReferenceOperations(batch_of([Rows(0)] * len(x_TK), few)).linear(x_TK, layers, "y")


# --- norms, activations ---


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("with_weight, with_bias", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("width", [1, 12, 80, 577])
def test_a_sum_and_its_norm_equal_their_definition(centered, with_weight, with_bias, width):
    weight, bias = (random(width, seed=3).half() if on else None for on in (with_weight, with_bias))
    norm, x, delta = Norm(weight, bias, 1e-5, centered), random(5, width), random(5, width, seed=1)
    step = CpuStep(8)
    x_rows, delta_rows = step.rows("x", width), step.rows("delta", width)
    y_rows = step.add_norm(x_rows, delta_rows, norm)
    x_rows[:5], delta_rows[:5] = x, delta
    step.run_rows(5)
    assert torch.equal(x_rows[:5], x + delta)
    expected = ReferenceOperations(batch_of([Rows(0)] * 5)).add_norm(x, delta, norm)
    assert_close(y_rows[:5], expected)


def test_without_a_norm_the_sum_itself_comes_back():
    step = CpuStep(2)
    x, delta = step.rows("x", 3), step.rows("delta", 3)
    assert step.add_norm(x, delta, None) is x
    x[:], delta[:] = 1, 2
    step.run_rows(1)
    assert x.tolist() == [[3, 3, 3], [1, 1, 1]]


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [False, True])
def test_activations_equal_their_definition_far_from_zero_too(activation, gated):
    width = 1030
    x = random(4, 2 * width) * 3
    x[3, :width] = torch.linspace(-200, 200, width)
    step = CpuStep(4)
    x_rows = step.rows("x", 2 * width)
    y = step.activate(x_rows, activation, gated)
    x_rows[:] = x
    step.run_rows(4)
    expected = ReferenceOperations(batch_of([Rows(0)])).activate(x, activation, gated)
    # torch's gelu in float32 is off by 1e-6 itself where 1 + erf is nearly 0, here times a gate of up to 10
    assert torch.allclose(y, expected, rtol=1e-5, atol=2e-5)


# --- linear layers ---

shapes = st.tuples(st.integers(1, 40), st.integers(1, 600), st.integers(1, 90))


@settings(deadline=None, max_examples=60)
@given(shapes, st.floats(0, 1), st.sampled_from(["auto", "16bit", "int8"]), st.sampled_from([0.0, 2.5]), st.booleans())
def test_int8_layers_equal_their_definition(shape, share, activations, threshold, with_bias):
    (t, k, n), few = shape, int(shape[0] * share)
    bias = random(n, seed=5).half() if with_bias else None
    layer = int8(n, k, seed=k, bias=bias, threshold=threshold, activations=activations)
    x = random(t, k, seed=t)
    assert_close(run_linear(x, [layer], few), reference_linear(x, [layer], few), 1e-4)


def test_int8_layers_equal_their_definition_without_integer_instructions(monkeypatch):
    monkeypatch.setattr("bigint8_kernels.cpu_prompt.has_int8_dot", lambda: False)
    layer, x = int8(33, 530, threshold=2.0, bias=random(33)), random(9, 530, seed=1)
    assert_close(run_linear(x, [layer], 2), reference_linear(x, [layer], 2), 1e-4)


@pytest.mark.parametrize("t, k, n", [(5, 2100, 130), (3, 1024, 64), (2, 1025, 63), (9, 530, 200)])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 3.5])
def test_outliers_in_any_number_of_columns_equal_their_definition(t, k, n, threshold):
    """Tiles of 64 outputs, and runs of 1024 columns."""
    layers = [int8(n, k, seed=1, threshold=threshold), int8(70, k, seed=2, threshold=threshold, bias=random(70))]
    x = random(t, k, seed=3)
    assert_close(run_linear(x, layers, 0), reference_linear(x, layers, 0), 1e-4)


def test_outliers_that_are_listed_a_few_tokens_at_a_time_add_the_same_bits(monkeypatch):
    layer, x = int8(133, 1530, threshold=0.5, bias=random(133)), random(19, 1530, seed=1)
    at_once = run_linear(x, [layer], 2)
    monkeypatch.setattr("bigint8_kernels.cpu_outliers.MOST_LISTED", 2000)
    assert torch.equal(run_linear(x, [layer], 2), at_once)
    assert_close(at_once, reference_linear(x, [layer], 2), 1e-4)


def test_the_outliers_of_other_tokens_change_no_bit_of_a_token():
    layer, x = int8(133, 2500, threshold=1.5), random(19, 2500, seed=1)
    together = run_linear(x, [layer], 0)
    alone = torch.cat([run_linear(x[t : t + 1], [layer], 0) for t in range(len(x))])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("t, k, n", [(1, 576, 300), (7, 12, 3), (16, 100, 33), (40, 515, 2)])
def test_float_layers_equal_their_definition(dtype, t, k, n):
    layer, x = Linear(random(n, k).to(dtype), bias=random(n, seed=2).to(dtype)), random(t, k, seed=1)
    assert_close(run_linear(x, [layer], t), reference_linear(x, [layer], t), 1e-5)


def test_layers_of_every_kind_write_side_by_side():
    layers = [
        int8(20, 80, threshold=3.0, bias=random(20)),
        int8(7, 80, seed=1, threshold=2.0),
        int8(5, 80, seed=2, activations="16bit"),
        int8(6, 80, seed=3, activations="int8", threshold=2.0),
        Linear(random(9, 80, seed=4).bfloat16()),
    ]
    x = random(10, 80, seed=7)
    assert_close(run_linear(x, layers, 4), reference_linear(x, layers, 4), 1e-4)


def test_wrong_weights_and_rows_are_refused():
    step = CpuStep(4)
    x = step.rows("x", 80)
    with pytest.raises(ValueError, match="rows of 80"):
        step.linear(x, [int8(5, 81)], "y")
    with pytest.raises(TypeError, match="float64"):
        step.linear(x, [Linear(random(5, 80).double())], "y")
    with pytest.raises(ValueError, match=r"\(5,\)"):
        step.linear(x, [int8(5, 80, bias=torch.zeros(6))], "y")
    with pytest.raises(ValueError, match="rows"):
        step.linear(x[:2], [int8(5, 80)], "y")
    step.linear(x, [int8(5, 80)], "y")
    with pytest.raises(ValueError, match="at most 4"):
        step.run_rows(5)


# --- attention ---


def attention_of(heads: int, kv_heads: int, d: int, **rest) -> Attention:
    q, k = (0, d), (heads * d, d)
    return Attention(heads, kv_heads, d, q, k, ((heads + kv_heads) * d, d), scale=d**-0.5, **rest)


def run_attend(qkv: Tensor, attention: Attention, pool: Tensor, batch: Batch, threads: int = 2) -> Tensor:
    step = CpuStep(len(qkv), threads)
    rows = step.rows("qkv", qkv.shape[1])
    out = step.attend(rows, attention, pool)
    rows[:] = qkv
    step.run(batch)
    return out


def check_attend(attention: Attention, batch: Batch, dtype: torch.dtype = torch.float32, width: int = 0) -> None:
    qkv = random(batch.rows, width or (attention.heads + 2 * attention.kv_heads) * attention.head_dim)
    pool = pool_of(attention, batch, dtype)
    expected_pool = pool.clone()
    got = run_attend(qkv, attention, pool, batch)
    expected = ReferenceOperations(batch).attend(qkv, attention, expected_pool)
    tokens = batch.tables[attention.group][batch.sequences_T, batch.places_T // PAGE] >= 0
    assert_close(pool.float(), expected_pool.float(), max(1e-6, torch.finfo(dtype).eps))
    assert_close(got[tokens], expected[tokens], max(1e-5, torch.finfo(dtype).eps))


MIXED = [Rows(0), Rows(15), Rows(300), Rows(127), Rows(128), Rows(0, 37), Rows(250, 13), Rows(16, 1)]


@pytest.mark.parametrize("dtype", POOLS)
@pytest.mark.parametrize(
    "heads, kv_heads, d", [(4, 4, 64), (9, 3, 64), (6, 2, 12), (5, 1, 80), (3, 3, 17), (8, 1, 128)]
)
def test_attention_equals_its_definition(dtype, heads, kv_heads, d):
    rotated = d // 2 // 2 * 2
    check_attend(attention_of(heads, kv_heads, d, rotated=rotated), batch_of(MIXED, 5, rotated), dtype)


@pytest.mark.parametrize("window", [1, 16, 100, 1000])
def test_a_window_hides_what_is_farther(window):
    check_attend(attention_of(4, 2, 32, window=window), batch_of(MIXED, 5))


def test_pages_that_a_window_has_passed_may_be_gone():
    attention, batch = attention_of(4, 2, 32, window=20), batch_of([Rows(300), Rows(260, 30)], 1)
    for pages in batch.tables:
        pages[:, : (260 - 20) // PAGE] = -1
    check_attend(attention, batch)


def test_alibi_slopes_are_added_to_scores():
    check_attend(attention_of(4, 2, 32, slopes=torch.tensor([0.5, 0.25, 0.1, 0.01])), batch_of(MIXED, 5))


@pytest.mark.parametrize("centered", [False, True])
def test_heads_are_normed_before_they_are_rotated(centered):
    q, k = (Norm(1 + random(80, seed=s), random(80, seed=s + 2), 1e-5, centered) for s in (1, 2))
    check_attend(attention_of(4, 2, 80, q_norm=q, k_norm=k, rotated=80), batch_of(MIXED, 5, 80))


def test_heads_may_lie_between_each_other():
    attention = Attention(4, 4, 16, q=(0, 48), k=(16, 48), v=(32, 48), scale=0.3)
    check_attend(attention, batch_of(MIXED, 5))


def test_rows_that_are_no_token_write_nothing():
    sequences = [Rows(20), Rows(7, is_token=False), Rows(3, 6), Rows(9, 5, is_token=False)]
    check_attend(attention_of(4, 2, 32), batch_of(sequences, 2))


def test_each_attention_reads_the_table_of_its_group():
    first, second = attention_of(2, 1, 16), attention_of(2, 1, 16, group=1)
    batch = batch_of(MIXED, 5, groups=2)
    batch = replace(batch, tables=(batch.tables[0], batch.tables[1].flip(0)))
    for attention in (first, second):
        check_attend(attention, batch)


def test_wrong_pools_and_batches_are_refused():
    attention = attention_of(2, 1, 16, rotated=16, group=1)
    step = CpuStep(4)
    qkv = step.rows("qkv", 64)
    with pytest.raises(ValueError, match="pool"):
        step.attend(qkv, attention, torch.zeros(3, 2, 1, 17 * PAGE))
    with pytest.raises(TypeError, match="float64"):
        step.attend(qkv, attention, torch.zeros(pool_shape(3, attention), dtype=torch.float64))
    with pytest.raises(ValueError, match="rows of 64"):
        step.attend(qkv, replace(attention, v=(49, 16)), torch.zeros(pool_shape(3, attention)))
    step.attend(qkv, attention, torch.zeros(pool_shape(3, attention)))
    with pytest.raises(ValueError, match="2"):
        step.run(batch_of([Rows(1)], rotated=16))
    with pytest.raises(ValueError, match="cos_TR"):
        step.run(batch_of([Rows(1)], groups=2))
    with pytest.raises(ValueError, match=r"\(1, 8\)"):
        step.run(batch_of([Rows(1)], groups=2, rotated=8))
    with pytest.raises(ValueError, match="batch"):
        step.run_rows(1)


def test_nan_is_not_hidden():
    attention, batch = attention_of(2, 1, 16), batch_of([Rows(40)])
    qkv, pool = random(1, 64), pool_of(attention, batch)
    first, *_, unseen = batch.tables[0][0].tolist()
    pool[unseen] = torch.nan
    assert run_attend(qkv, attention, pool, batch).isfinite().all()
    pool[first] = torch.nan
    assert run_attend(qkv, attention, pool, batch).isnan().all()
    step = CpuStep(1)
    x = step.rows("x", 16)
    y = step.activate(x, "silu", False)
    x[:] = torch.nan
    step.run_rows(1)
    assert y.isnan().all()


# --- whole blocks ---


class Block:
    """A block of a small model with everything in it, two layers of which have outliers."""

    def __init__(self, heads: int = 6, kv_heads: int = 2, d: int = 12, h: int = 80, f: int = 100) -> None:
        self.width, self.attention = h, attention_of(heads, kv_heads, d, rotated=8)
        self.norm, kv = rms(h), kv_heads * d
        self.qkv = [int8(heads * d, h, threshold=2.5), int8(kv, h, seed=1, bias=random(kv)), int8(kv, h, seed=2)]
        self.out, self.down = int8(h, heads * d, seed=3), int8(h, f, seed=6, threshold=0.5)
        self.up, self.head = [int8(f, h, seed=4), int8(f, h, seed=5)], Linear(random(50, h, seed=8).bfloat16())

    def record(self, operations: Operations, x: Tensor, pool: Tensor) -> Tensor:
        y = operations.linear(operations.add_norm(x, None, self.norm), self.qkv, "qkv")
        y = operations.linear(operations.attend(y, self.attention, pool), [self.out], "out")
        y = operations.linear(operations.add_norm(x, y, self.norm), self.up, "up")
        y = operations.linear(operations.activate(y, "silu", True), [self.down], "down")
        return operations.linear(operations.add_norm(x, y, self.norm), [self.head], "logits")

    def run(self, x_TH: Tensor, pool: Tensor, batch: Batch, threads: int = 2, most_rows: int = 80) -> Tensor:
        """The residual stream and the logits of the rows, side by side."""
        step = CpuStep(most_rows, threads)
        x = step.rows("x", self.width)
        y = self.record(step, x, pool)
        x[: batch.rows] = x_TH
        step.run(batch)
        return torch.cat([x, y], dim=1)[: batch.rows]


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_a_block_equals_its_definition_on_any_number_of_threads(threads):
    block, batch = Block(), batch_of(MIXED, 5, 8)
    x, pool = random(batch.rows, 80), pool_of(block.attention, batch)
    expected_x, expected_pool = x.clone(), pool.clone()
    logits = block.record(ReferenceOperations(batch), expected_x, expected_pool)
    got = block.run(x, pool, batch, threads)
    # a value that is rounded the other way changes int8 activations by one in 127
    assert_close(got, torch.cat([expected_x, logits], dim=1), 1e-3)
    assert_close(pool, expected_pool, 1e-3)


def test_a_program_ends_with_one_thread_where_many_were_to_come():
    step = CpuStep(4, threads=3)
    x = step.rows("x", 80)
    y = step.linear(step.add_norm(x, None, rms(80)), [int8(90, 80)], "y")
    x[:] = random(4, 80)
    step.run_rows(4)
    expected, program = y.clone(), step._program
    y.zero_()
    cpu_program._run_together(program._steps, 0, sum(map(len, program._groups)), 1, cpu_program._GIVE_WAY)
    assert torch.equal(y, expected)


def test_a_recorded_step_runs_again_with_other_rows():
    block, step = Block(), CpuStep(80)
    x, batches = step.rows("x", 80), [batch_of(MIXED, 5, 8), batch_of([Rows(40)], rotated=8)]
    pool = pool_of(block.attention, batches[0])
    y = block.record(step, x, pool)
    for batch in (*batches, *batches):
        rows, alone = random(batch.rows, 80), pool.clone()
        x[: batch.rows] = rows
        step.run(batch)
        assert torch.equal(torch.cat([x, y], dim=1)[: batch.rows], block.run(rows, alone, batch))


# --- no row depends on another ---


def rows_of(sequences: Sequence[Rows], wanted: int) -> slice:
    start = sum(rows.count for rows in sequences[:wanted])
    return slice(start, start + sequences[wanted].count)


def one_sequence(batch: Batch, wanted: slice, few: int) -> Batch:
    """Some rows of a batch by themselves, with the tables of the whole."""
    turns = [turn[wanted] for turn in (batch.cos_TR, batch.sin_TR) if turn is not None]
    return Batch(batch.places_T[wanted], batch.sequences_T[wanted], batch.tables, few, *turns)


SIXTY_FOUR = [*(Rows(17 * i) for i in range(11)), Rows(0, 30), Rows(200, 22), Rows(31, 1)]


def test_the_rows_of_a_mixed_batch_are_the_same_bits_alone():
    block, few = Block(), 11
    batch = batch_of(SIXTY_FOUR, few, 8)
    assert batch.rows == 64
    x, pool = random(64, 80), pool_of(block.attention, batch)
    together = block.run(x, pool.clone(), batch, threads=2)
    for i in range(len(SIXTY_FOUR)):
        wanted = rows_of(SIXTY_FOUR, i)
        alone = one_sequence(batch, wanted, 1 if i < few else 0)
        for threads in (1, 3):
            assert torch.equal(block.run(x[wanted], pool.clone(), alone, threads), together[wanted])


@pytest.mark.parametrize("cuts", [[30], [1] * 30, [7, 16, 7], [16, 14]])
def test_a_prompt_gives_the_same_bits_however_it_is_cut(cuts):
    block = Block()
    whole = batch_of([Rows(100, 30)], 0, 8)
    x, pool = random(30, 80), pool_of(block.attention, whole)
    expected = block.run(x, pool.clone(), whole)
    first, got = 0, []
    for count in cuts:
        wanted = slice(first, first + count)
        got.append(block.run(x[wanted], pool, one_sequence(whole, wanted, 0)))
        first += count
    assert torch.equal(torch.cat(got), expected)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 600), st.integers(1, 90), st.sampled_from([*POOLS, torch.int8]), st.data())
def test_a_row_of_a_product_is_the_same_bits_with_any_neighbours(t, k, n, dtype, data):
    layer = int8(n, k, threshold=2.5, bias=random(n)) if dtype == torch.int8 else Linear(random(n, k).to(dtype))
    x, few = random(t, k, seed=t), data.draw(st.integers(0, t))
    together = run_linear(x, [layer], few)
    row = data.draw(st.integers(0, t - 1))
    assert torch.equal(run_linear(x[row : row + 1], [layer], int(row < few), threads=1)[0], together[row])


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([(4, 4, 20), (9, 3, 64), (5, 1, 80)]), st.sampled_from([None, 5, 150]), st.booleans(), st.data())
def test_a_row_of_attention_is_the_same_bits_with_any_neighbours(shape, window, with_slopes, data):
    slopes = torch.linspace(0.1, 1, shape[0]) if with_slopes else None
    attention = attention_of(*shape, window=window, slopes=slopes)
    kinds = st.builds(Rows, st.integers(0, 300), st.integers(1, 20))
    sequences = data.draw(st.lists(kinds, min_size=1, max_size=4))
    batch = batch_of(sequences, 0)
    qkv, pool = random(batch.rows, (shape[0] + 2 * shape[1]) * shape[2]), pool_of(attention, batch)
    together = run_attend(qkv, attention, pool, batch)  # which leaves all keys and values in the pool
    row = data.draw(st.integers(0, batch.rows - 1))
    wanted = slice(row, row + 1)
    alone = one_sequence(batch, wanted, data.draw(st.integers(0, 1)))
    assert torch.equal(run_attend(qkv[wanted], attention, pool, alone, threads=1)[0], together[row])


def test_only_the_cpu_has_this_recorder():
    assert isinstance(recorder(torch.device("cpu"), 4), CpuStep)
    assert recorder(torch.device("meta"), 4) is None
