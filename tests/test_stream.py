"""Reading in bounded memory: every wanted byte once, none besides, in file order."""

import mmap
import os
import threading
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bigint8.checkpoint.headers import TensorInfo, read_header
from bigint8.errors import CheckpointError
from bigint8.load.stream import Chunk, RowStream, _is_cached, plan_reads

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def make_file(path: Path, shapes: list[tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{i}": torch.randn(shape, generator=generator).to(DTYPES[(i + seed) % 3]) for i, shape in enumerate(shapes)
    }
    save_file(tensors, path)
    return tensors


def read_all(stream: RowStream) -> dict[str, torch.Tensor]:
    parts: dict[str, dict[int, torch.Tensor]] = {}

    def work(chunk: Chunk) -> None:
        pieces = parts.setdefault(chunk.tensor.name, {})
        assert chunk.row_start not in pieces, "each row comes once"
        pieces[chunk.row_start] = chunk.data.clone()

    stream.run(work)
    ordered = {name: [pieces[row] for row in sorted(pieces)] for name, pieces in parts.items()}
    return {name: pieces[0] if pieces[0].ndim == 0 else torch.cat(pieces) for name, pieces in ordered.items()}


shape = st.one_of(
    st.just(()), st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 40), st.integers(1, 30)),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
)  # fmt: skip


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(shape, min_size=1, max_size=8), st.integers(1, 5000), st.integers(1, 4), st.booleans(), st.data())
def test_what_is_read_is_what_was_written(tmp_path, shapes, buffer_bytes, readers, direct, data):
    tensors = make_file(tmp_path / "a.safetensors", shapes, seed=len(shapes))
    wanted = data.draw(st.sets(st.sampled_from(sorted(tensors)), min_size=1))
    whole = data.draw(st.sets(st.sampled_from(sorted(wanted))))
    infos = [info for info in read_header(tmp_path / "a.safetensors") if info.name in wanted]
    stream = RowStream(infos, whole, buffer_bytes, readers, direct=direct)
    result = read_all(stream)
    assert result.keys() == wanted
    for name in wanted:
        assert torch.equal(result[name], tensors[name])
    assert stream.bytes_read == sum(info.nbytes for info in infos)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(shape, min_size=1, max_size=8), st.integers(1, 5000))
def test_reads_are_bounded_ordered_and_disjoint(tmp_path, shapes, buffer_bytes):
    make_file(tmp_path / "a.safetensors", shapes)
    infos = read_header(tmp_path / "a.safetensors")
    reads = plan_reads(infos, buffer_bytes=buffer_bytes)
    for read in reads:
        widest_row = max(piece.tensor.nbytes // piece.tensor.rows for piece in read.pieces)
        assert read.stop - read.start <= max(buffer_bytes, widest_row)
        assert sum(piece.nbytes for piece in read.pieces) == read.stop - read.start, "no byte that no tensor wants"
    for first, second in pairwise(reads):
        assert first.stop <= second.start


def test_neighbouring_tensors_share_a_read(tmp_path):
    make_file(tmp_path / "a.safetensors", [(8, 4)] * 6)
    assert len(plan_reads(read_header(tmp_path / "a.safetensors"))) <= 2


def test_chunks_are_views_of_a_few_buffers_whatever_the_size(tmp_path):
    make_file(tmp_path / "a.safetensors", [(400, 16)] * 9)
    infos = read_header(tmp_path / "a.safetensors")
    stream = RowStream(infos, buffer_bytes=1024, readers=3)
    buffers, kept = set(), []  # what is kept is not freed, so no address is used twice

    def work(chunk: Chunk) -> None:
        kept.append(chunk.data)
        buffers.add(chunk.data.untyped_storage().data_ptr())

    stream.run(work)
    assert 1 <= len(buffers) <= 3 * 2 and len(stream.reads) > 100


def test_a_file_that_went_away_is_named(tmp_path):
    info = TensorInfo("w", "F16", (4, 4), tmp_path / "gone.safetensors", 100, 32)
    with pytest.raises(CheckpointError, match=r"gone\.safetensors.*No such file") as caught:
        read_all(RowStream([info]))
    assert str(info.file) in str(caught.value)


@pytest.mark.parametrize("readers", [1, 4])
def test_work_that_fails_leaves_no_thread_and_no_open_file_and_the_first_failure_is_told(tmp_path, readers):
    make_file(tmp_path / "a.safetensors", [(4000, 16)] * 4)
    before = psutil.Process().num_fds()
    infos = read_header(tmp_path / "a.safetensors")

    def work(chunk: Chunk) -> None:
        if chunk.tensor.name == infos[1].name:
            raise ValueError(f"row {chunk.row_start}")

    stream = RowStream(infos, buffer_bytes=1024, readers=readers)
    with pytest.raises(ValueError, match=r"^row 0$"):
        stream.run(work)
    assert infos[0].nbytes <= stream.bytes_read + 1024 * readers
    assert stream.bytes_read < infos[0].nbytes + infos[1].nbytes
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bigint8-read")]
    assert psutil.Process().num_fds() == before


def test_what_the_file_cache_lacks_is_read_past_it_and_what_it_has_is_not(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = make_file(path, [(4000, 64)] * 4)
    infos = read_header(path)
    middle = infos[1].start, infos[1].stop

    def is_cached() -> bool:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
            return _is_cached(pages, *middle)

    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if is_cached():
            pytest.skip("the file system keeps its files in memory")
    except (AttributeError, OSError):
        pytest.skip("the file system has no reads past the cache")
    finally:
        os.close(descriptor)
    for direct, cached in ((True, False), (False, True), (True, True)):
        for name, tensor in read_all(RowStream(infos, buffer_bytes=100_000, direct=direct)).items():
            assert torch.equal(tensor, tensors[name])
        assert is_cached() == cached


def test_progress_is_told_to_the_thread_that_runs_the_stream(tmp_path):
    make_file(tmp_path / "a.safetensors", [(4000, 16)] * 2)
    infos = read_header(tmp_path / "a.safetensors")
    seen: list[tuple[str, int]] = []
    RowStream(infos).run(lambda chunk: None, lambda done: seen.append((threading.current_thread().name, done)))
    assert seen[-1] == (threading.current_thread().name, sum(info.nbytes for info in infos))
    assert [done for _, done in seen] == sorted(done for _, done in seen)
