"""Loading onto GPUs that are not there: what waits for what, and the memory that is locked for it.

`pretend` and `pretend_cuda` keep the values on the CPU and look for races between streams; no GPU has shown this.
"""

import itertools
import re
from pathlib import Path

import pretend_cuda
import pytest
import torch
from folders import replace
from pretend import pretending
from pretend_cuda import Event, PretendCuda, Stream, install
from safetensors.torch import save_file
from tiny import save_tiny

from bigint8 import CheckpointError, load_sharded_int8
from bigint8.checkpoint.headers import read_header
from bigint8.load import gpu, stream
from bigint8.plan.memory import GPU_BUFFER_BYTES, GPU_READERS, workspace_bytes


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendCuda:
    return install(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", False, tmp_path_factory.mktemp("llama"))


def load(folder, device_map="auto", **kwargs):
    with pretending():
        return load_sharded_int8(folder, device_map, context=64, progress=False, **kwargs)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """Tiny models need more than one read, too, and more than one chunk for a weight."""
    monkeypatch.setattr("bigint8.load.stream.GPU_BUFFER_BYTES", 3000)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loading_over_two_gpus_races_nowhere_and_gives_the_values_of_the_cpu(cuda, kind, tmp_path):
    save_tiny(kind, True, tmp_path)
    model, expected = load(tmp_path), load(tmp_path, "cpu", dtype="float16")
    assert cuda.races == [] and cuda.all_is_over()
    theirs = expected.state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cuda" and torch.equal(tensor.cpu(), theirs[name]), name
    assert {tensor.device.index for tensor in model.state_dict().values()} == {0, 1}


@pytest.mark.parametrize(
    ("left_out", "race"),
    [
        ((Stream, "wait_event"), r"on stream 1 of cuda:0 does not wait for stream 0"),
        ((Stream, "wait_stream"), "on stream 1 of cuda:0 does not wait for the default stream"),
        ((Event, "synchronize"), "the next read on the host does not wait for stream"),
        ((PretendCuda, "record_stream"), "stream 0 of cuda:0 is given memory that stream 1 of cuda:0 still uses"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else None,
)
def test_every_wait_is_needed(cuda, folder, monkeypatch, left_out, race):
    """The proof that the test above can fail: without any one of them there is a race."""
    monkeypatch.setattr(*left_out, lambda *args: None)
    load(folder)
    assert any(re.search(race, found) for found in cuda.races), cuda.races[:3]


def test_a_reader_that_waits_for_a_gpu_leaves_its_cpu_to_others(cuda, folder):
    load(folder)
    assert cuda.events and all(event.blocking for event in cuda.events)


def test_a_gpu_has_no_more_chunks_at_once_than_a_plan_leaves_room_for(cuda, folder, monkeypatch):
    """In one process, the readers of two GPUs may all be busy with one."""
    monkeypatch.setattr(stream, "usable_cpus", lambda: 64)
    model = load(folder)
    assert GPU_READERS < cuda.most_under_way <= gpu.GPU_CHUNKS
    assert workspace_bytes(model.plan.spec.layout, model.plan.workload, 2) >= gpu.GPU_CHUNKS * GPU_BUFFER_BYTES


def fail_at(monkeypatch, chunk):
    """Let the launch of a kernel fail, as for want of memory."""
    count = itertools.count()

    def quantize(source, out, scale, bad):
        if next(count) == chunk:
            raise torch.OutOfMemoryError("CUDA out of memory")
        pretend_cuda._quantize_rows_counting(source, out, scale, bad)

    monkeypatch.setattr(gpu, "quantize_rows_counting", quantize)


def test_a_load_that_fails_waits_for_the_gpus_before_its_memory_goes(cuda, folder, monkeypatch):
    fail_at(monkeypatch, 7)
    with pytest.raises(torch.OutOfMemoryError):
        load(folder)
    assert len(cuda.streams) == 4 and cuda.all_is_over() and cuda.races == []


def test_without_waiting_that_memory_would_go_too_early(cuda, folder, monkeypatch):
    """The proof that the test above can fail."""
    fail_at(monkeypatch, 7)
    monkeypatch.setattr(gpu.GpuWriter, "wait", lambda self: None)
    with pytest.raises(torch.OutOfMemoryError):
        load(folder)
    assert not cuda.all_is_over()


@pytest.mark.parametrize("value", [float("nan"), 1e6])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.4.mlp.up_proj.weight"])
def test_values_that_no_weight_has_are_found_on_either_gpu(cuda, name, value, tmp_path):
    save_tiny("llama", False, tmp_path, torch.float32)
    replace(tmp_path, name, lambda tensor: tensor.view(-1).index_fill(0, torch.tensor([3]), value).view_as(tensor))
    if value == 1e6 and name.endswith("up_proj.weight"):
        load(tmp_path, dtype="float16")  # int8 holds it
        return
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}.*{'too large for' if value == 1e6 else 'NaN'}"):
        load(tmp_path, dtype="float16")
    assert cuda.all_is_over() and cuda.races == []


# --- page-locked memory ---


def test_staging_buffers_take_no_more_than_the_power_of_two_that_they_are_planned_with(cuda, monkeypatch, tmp_path):
    """torch page-locks powers of two: a byte more than 16 MiB would take 32."""
    monkeypatch.setattr(stream, "GPU_BUFFER_BYTES", GPU_BUFFER_BYTES)
    rows = torch.zeros(9 * 2**20, 4, dtype=torch.float16)  # 72 MiB: several whole buffers
    save_file({"w": rows}, tmp_path / "model.safetensors")
    (tensor,) = read_header(tmp_path / "model.safetensors")
    for direct in (False, True):
        reads = stream.RowStream([tensor], gpus=1, direct=direct)
        reads.run(lambda chunk: None)
        assert max(read.stop - read.start for read in reads.reads) > GPU_BUFFER_BYTES - 16
    sizes = {buffer.nbytes for buffer in cuda.pinned}
    assert 8 * 2**20 < max(sizes) <= 16 * 2**20


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_box_with_many_cpus_has_four_readers_for_each_gpu(cuda, folder, monkeypatch, gpus):
    monkeypatch.setattr(stream, "usable_cpus", lambda: 64)
    load(folder, "auto" if gpus == 2 else 0)
    assert len({buffer.thread for buffer in cuda.pinned}) <= GPU_READERS * gpus
    assert stream.default_readers(gpus=gpus) == stream.default_readers(direct=True, gpus=gpus) == GPU_READERS * gpus


def test_page_locked_memory_is_given_back_after_loading(cuda, folder):
    load(folder)
    assert cuda.pinned and cuda.given_back == [True]


@pytest.mark.parametrize("chunk", [0, 7])
def test_page_locked_memory_is_given_back_when_a_load_fails(cuda, folder, monkeypatch, chunk):
    """Whoever holds the error does not hold the buffers."""
    fail_at(monkeypatch, chunk)
    with pytest.raises(torch.OutOfMemoryError) as error:
        load(folder)
    assert error.value.__traceback__ is not None
    assert cuda.pinned and cuda.given_back == [True]


def test_a_load_onto_the_cpu_locks_no_memory(cuda, folder):
    load(folder, "cpu")
    assert cuda.pinned == [] and cuda.given_back == [] and cuda.streams == []
