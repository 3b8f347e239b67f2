"""Reading in bounded memory: every wanted byte once, none besides, in file order."""

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

from bigint8.checkpoint import TensorInfo, read_header
from bigint8.errors import CheckpointError
from bigint8.stream import RowStream, plan_reads

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def make_file(path: Path, shapes: list[tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{i}": torch.randn(shape, generator=generator).to(DTYPES[(i + seed) % 3]) for i, shape in enumerate(shapes)
    }
    save_file(tensors, path)
    return tensors


def read_all(stream: RowStream) -> dict[str, torch.Tensor]:
    parts: dict[str, list[torch.Tensor]] = {}
    rows: dict[str, int] = {}
    for chunk in stream:
        assert chunk.row_start == rows.get(chunk.tensor.name, 0), "rows come in order"
        rows[chunk.tensor.name] = chunk.row_stop
        parts.setdefault(chunk.tensor.name, []).append(chunk.data.clone())
    return {name: pieces[0] if pieces[0].ndim == 0 else torch.cat(pieces) for name, pieces in parts.items()}


shape = st.one_of(
    st.just(()), st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 40), st.integers(1, 30)),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
)  # fmt: skip


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(shape, min_size=1, max_size=8), st.integers(1, 5000), st.integers(1, 5), st.integers(1, 4), st.data())
def test_what_is_read_is_what_was_written(tmp_path, shapes, buffer_bytes, buffers, readers, data):
    tensors = make_file(tmp_path / "a.safetensors", shapes, seed=len(shapes))
    wanted = data.draw(st.sets(st.sampled_from(sorted(tensors)), min_size=1))
    whole = data.draw(st.sets(st.sampled_from(sorted(wanted))))
    infos = [info for info in read_header(tmp_path / "a.safetensors") if info.name in wanted]
    stream = RowStream(infos, whole, buffer_bytes, buffers, readers)
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
    stream = RowStream(infos, buffer_bytes=1024, buffers=3)
    buffers = {chunk.data.untyped_storage().data_ptr() for chunk in stream}
    assert len(buffers) == 3 and len(stream.reads) > 100


def test_a_file_cut_short_after_its_header_was_read_is_named(tmp_path):
    path = tmp_path / "cut.safetensors"
    make_file(path, [(400, 16), (40, 16)])
    infos = read_header(path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"cut\.safetensors.*'t"):
        read_all(RowStream(infos, buffer_bytes=1024))


def test_a_file_that_went_away_is_named(tmp_path):
    info = TensorInfo("w", "F16", (4, 4), tmp_path / "gone.safetensors", 100, 32)
    with pytest.raises(CheckpointError, match=r"gone\.safetensors.*No such file"):
        read_all(RowStream([info]))


def test_a_consumer_that_stops_early_leaves_no_thread_and_no_open_file(tmp_path):
    make_file(tmp_path / "a.safetensors", [(4000, 16)] * 4)
    before = psutil.Process().num_fds()
    iterator = iter(RowStream(read_header(tmp_path / "a.safetensors"), buffer_bytes=1024))
    next(iterator)
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bigint8-read")]
    assert psutil.Process().num_fds() == before
