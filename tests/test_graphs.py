"""Steps as CUDA graphs, on a GPU that is not there (`pretend_graphs`)."""

from collections.abc import Iterator

import pytest
import torch
from bigint8_kernels.ops import GpuOperations
from bigint8_kernels.reference_step import ReferenceOperations
from bigint8_kernels.step import Batch, pool_shape
from pretend import pretending
from pretend_graphs import Recorder, install
from test_gpu_tracing import HIDDEN, WIDTH, block_on
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bigint8.model.fused import run_block
from bigint8.model.graphs import Graphs, Shape, compile_steps

DEVICE = torch.device("cuda", 0)
SHAPE = Shape(HIDDEN, torch.float16, (4,), WIDTH)
BUCKETS = (1, 2, 4)
SEQUENCES, PAGES = 7, 28


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return install(monkeypatch)


class Steps:
    """Steps of one block, run by graphs and, on the CPU, by the reference."""

    def __init__(self) -> None:
        self.block, self.reference = block_on("cuda:0"), block_on("cpu")
        self.expected_pool = torch.randn(pool_shape(PAGES, self.reference.attention)).half()
        self.pool = self.expected_pool.to(DEVICE)
        self.tables = torch.randperm(PAGES).int().view(SEQUENCES, 4)
        self.ran: list[int] = []
        self.graphs = Graphs(self.run, SHAPE, DEVICE, BUCKETS)

    def run(self, x: Tensor, batch: Batch) -> Tensor:
        self.ran.append(batch.rows)
        x, delta = run_block(GpuOperations(batch), self.block, x, None, self.pool)
        assert delta is not None
        return x + delta

    def given(self, places: dict[int, list[int]], few: int, width: int = 4) -> tuple[Tensor, Batch]:
        """Rows of these sequences at these places."""
        numbers = [(place, s) for s, each in enumerate(places.values()) for place in each]
        rows = torch.tensor(numbers, dtype=torch.int32)
        cos, sin = torch.randn(2, len(numbers), WIDTH // 2).unbind()
        tables = (self.tables[list(places), :width],)
        return torch.randn(len(numbers), HIDDEN).half(), Batch(rows[:, 0], rows[:, 1], tables, few, cos, sin)

    def check(self, places: dict[int, list[int]], few: int) -> None:
        """A step gives what the reference does, and leaves the pool as it does."""
        x, batch = self.given(places, few, width=max(max(each) for each in places.values()) // 16 + 1)
        found = self.graphs(x.to(DEVICE), on_gpu(batch))
        expected, delta = run_block(ReferenceOperations(batch), self.reference, x, None, self.expected_pool)
        expected = expected + delta
        assert found.shape == expected.shape
        assert (found.held - expected).abs().max() <= 0.02 * expected.abs().max()
        assert (self.pool.held - self.expected_pool).abs().max() <= 0.02


def on_gpu(batch: Batch) -> Batch:
    tensors = [batch.places_T, batch.sequences_T, batch.cos_TR, batch.sin_TR]
    places, sequences, cos, sin = (each.to(DEVICE) for each in tensors if each is not None)
    return Batch(places, sequences, tuple(table.to(DEVICE) for table in batch.tables), batch.few, cos, sin)


@pytest.fixture
def steps(recorder: Recorder) -> Iterator[Steps]:
    torch.manual_seed(0)
    with pretending():
        made = Steps()
        before = made.pool.held.clone()
        made.graphs.capture()
        assert torch.equal(made.pool.held, before), "rows that are no tokens write nothing"
        made.ran.clear()
        yield made


def test_steps_of_any_number_of_tokens_are_replayed_and_right(steps, recorder):
    """Batches grow and shrink, so that what a larger one left behind would be seen; contexts differ."""
    for sequences in ([0], [3, 1, 2, 0], [5, 6], [6, 2, 4], [1]):
        steps.check({s: [7 * s + len(sequences)] for s in sequences}, len(sequences))
    assert steps.ran == [] and recorder.events.count("replay") == 5
    assert recorder.cuda.races == []


def test_prompts_more_rows_than_a_bucket_and_several_rows_of_a_sequence_run_as_they_are(steps, recorder):
    steps.check({0: [3], 1: [0, 1, 2, 3, 4]}, 1)
    steps.check({s: [5 + s] for s in range(6)}, 6)
    steps.check({0: [20, 21], 1: [9]}, 3)
    assert steps.ran == [6, 6, 3] and "replay" not in recorder.events


def test_before_anything_is_captured_a_step_runs_as_it_is(recorder):
    torch.manual_seed(0)
    with pretending():
        steps = Steps()
        steps.check({0: [3]}, 1)
        assert steps.ran == [1]


def test_each_bucket_warms_up_before_any_is_captured_the_largest_first(recorder):
    torch.manual_seed(0)
    with pretending():
        steps = Steps()
        steps.graphs.capture()
        assert steps.ran == [4, 4, 4, 2, 2, 2, 1, 1, 1, 4, 2, 1]


def test_a_step_copies_its_inputs_then_replays_and_waits_for_nothing(steps, recorder):
    x, batch = steps.given({0: [3], 2: [40], 4: [5]}, 3)
    x, batch = x.to(DEVICE), on_gpu(batch)
    recorder.events.clear()
    known = dict(recorder.cuda.host())
    y = steps.graphs(x, batch)
    work = [event for event in recorder.events if not event.startswith(("slice", "select", "alias", "detach"))]
    assert work == ["_foreach_copy_.default", "replay"]
    assert recorder.cuda.host() == known, "the host has learned nothing of the GPU"
    assert y.shape == (3, HIDDEN)


def test_its_memory_can_be_planned_and_is_known_afterwards(steps):
    held_by_inputs = [each for each in vars(steps.graphs._inputs).values() if each is not None]
    tensors = [leaf for each in held_by_inputs for leaf in tree_leaves(each) if isinstance(leaf, Tensor)]
    assert steps.graphs.input_bytes == sum(tensor.nbytes for tensor in tensors) == SHAPE.input_bytes(4)
    assert steps.graphs.pool_bytes == 3000


def test_steps_of_prompts_are_compiled_with_rows_that_write_nothing(recorder):
    torch.manual_seed(0)
    with pretending():
        steps = Steps()
        before, kinds = steps.pool.held.clone(), []

        def run(x: Tensor, batch: Batch) -> Tensor:
            kinds.append((batch.rows, batch.few))
            return steps.run(x, batch)

        compile_steps(run, SHAPE, DEVICE, 40)
        assert kinds == [(16, 0), (32, 0), (40, 0), (40, 1), (40, 2)]
        assert torch.equal(steps.pool.held, before)
