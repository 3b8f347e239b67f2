"""Safetensors files, indexes and configs from strangers: what is right is read exactly, the rest is refused by name."""

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bigint8 import CheckpointError
from bigint8.checkpoint.headers import (
    INDEX_FILE,
    MAX_HEADER_BYTES,
    SINGLE_FILE,
    TensorInfo,
    open_checkpoint,
    read_header,
)
from bigint8.options import Access

CONFIG = {"model_type": "llama", "hidden_size": 32}

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def entry(begin: int, end: int, shape: Any = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def shard(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file laid out as safetensors: `header` as JSON, or the raw bytes; `length` is what the first 8 bytes claim."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def refusal(path: Path) -> str:
    """The message with which `read_header` refuses the file; it names the file."""
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message
    return message


def checkpoint(folder: Path, config: Any = CONFIG, shards: dict[str, dict[str, Tensor]] | None = None) -> Path:
    """A checkpoint folder: `config` as JSON or raw bytes, and the shards with an index that describes them."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    for file, tensors in (shards or {}).items():
        save_file(tensors, folder / file)
    if shards:
        index(folder, {name: file for file, tensors in shards.items() for name in tensors})
    return folder


def index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def folder_refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, **options)
    return str(caught.value)


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def bytes_at(info: TensorInfo) -> bytes:
    with info.file.open("rb") as file:
        file.seek(info.start)
        return file.read(info.nbytes)


# --- what is right is read exactly -------------------------------------------------------------------------------


def test_file_of_the_safetensors_library_reads_back_exactly(tmp_path: Path) -> None:
    tensors = {
        f"layer.{name}": torch.arange(24).remainder(2 if dtype == torch.bool else 100).to(dtype).reshape(4, 6)
        for dtype, name in SAFETENSORS_NAMES.items()
    }
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 7, dtype=torch.float16), "vector": torch.ones(3)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": 'quotes " and \\'})
    read = {info.name: info for info in read_header(path)}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = read[name]
        assert (info.shape, info.dtype) == (tuple(tensor.shape), SAFETENSORS_NAMES[tensor.dtype])
        assert (info.file, info.nbytes, info.stop) == (path, tensor.nbytes, info.start + tensor.nbytes)
        assert bytes_at(info) == raw_bytes(tensor)
    assert (read["scalar"].rows, read["empty"].rows, read["vector"].rows) == (1, 0, 3)


def test_tensors_come_in_file_order_whatever_the_order_of_the_header(tmp_path: Path) -> None:
    path = shard(tmp_path, {"last": entry(5, 9), "first": entry(0, 2), "middle": entry(2, 5)}, bytes(9))
    assert [info.name for info in read_header(path)] == ["first", "middle", "last"]


def test_header_padded_with_spaces_is_read(tmp_path: Path) -> None:
    raw = json.dumps({"a": entry(0, 4)}).encode() + b" " * 13
    (info,) = read_header(shard(tmp_path, raw, b"\1\2\3\4"))
    assert bytes_at(info) == b"\1\2\3\4"


def test_file_without_tensors_is_read_as_none(tmp_path: Path) -> None:
    assert read_header(shard(tmp_path, {})) == []


@st.composite
def named_tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors of any dtype and small shape, zero sizes and scalars among them, under any names that JSON can hold."""
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
    names = draw(st.lists(text.filter(lambda name: name != "__metadata__"), unique=True, max_size=6))
    tensors = {}
    for name in names:
        shape = draw(array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
        values = torch.arange(torch.Size(shape).numel()).remainder(2)
        tensors[name] = values.to(draw(st.sampled_from(list(SAFETENSORS_NAMES)))).reshape(shape)
    return tensors


# No empty metadata: with no tensors either, the library writes a header that is no JSON and that it cannot read itself.
METADATA = st.none() | st.dictionaries(st.text("ab", max_size=3), st.text(max_size=5), min_size=1)


@settings(deadline=None, max_examples=100)
@given(tensors=named_tensors(), metadata=METADATA)
def test_headers_are_read_as_the_safetensors_library_reads_them(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], metadata: dict[str, str] | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "agree.safetensors"
    save_file(tensors, path, metadata=metadata)
    read = read_header(path)
    assert [info.start for info in read] == sorted(info.start for info in read)
    with safe_open(path, framework="pt") as peer:
        assert sorted(info.name for info in read) == sorted(peer.keys())
        for info in read:
            theirs = peer.get_slice(info.name) if info.shape else None
            tensor = peer.get_tensor(info.name)
            assert info.shape == tuple(tensor.shape)
            assert info.dtype == (theirs.get_dtype() if theirs else SAFETENSORS_NAMES[tensor.dtype])
            assert bytes_at(info) == raw_bytes(tensor)


def test_single_file_checkpoint_is_opened(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16)}, folder / SINGLE_FILE)
    opened = open_checkpoint(str(folder))
    assert opened.config == CONFIG
    assert (opened.folder, opened.shards, opened.weight_bytes) == (folder, [folder / SINGLE_FILE], 24 + 8)


def test_single_file_of_any_name_is_opened(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    save_file({"a": torch.ones(2)}, folder / "weights.safetensors")
    assert open_checkpoint(folder).shards == [folder / "weights.safetensors"]


def test_sharded_checkpoint_is_opened(tmp_path: Path) -> None:
    shards = {"one.safetensors": {"a": torch.ones(2)}, "two.safetensors": {"b": torch.ones(3), "c": torch.ones(1)}}
    folder = checkpoint(tmp_path / "model", shards=shards)
    opened = open_checkpoint(folder)
    assert {name: info.file.name for name, info in opened.tensors.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
        "c": "two.safetensors",
    }
    assert opened.shards == [folder / "one.safetensors", folder / "two.safetensors"]


def test_shards_in_a_folder_below_are_opened(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    (folder / "parts").mkdir()
    save_file({"a": torch.ones(2)}, folder / "parts" / "one.safetensors")
    index(folder, {"a": "parts/one.safetensors"})
    assert open_checkpoint(folder).tensors["a"].file == folder / "parts" / "one.safetensors"


# --- one safetensors file ----------------------------------------------------------------------------------------


def test_truncated_shard_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"first": torch.ones(100), "last": torch.ones(100)}, path)
    whole = path.stat().st_size
    os.truncate(path, whole - 3)
    message = refusal(path)
    assert "truncated" in message
    assert "'last'" in message
    assert f"{whole:,}" in message
    assert f"{whole - 3:,}" in message


def test_shard_cut_within_an_earlier_tensor_names_that_tensor(tmp_path: Path) -> None:
    path = shard(tmp_path, {"first": entry(0, 10), "last": entry(10, 20)}, bytes(4))
    assert "'first'" in refusal(path)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_file_shorter_than_eight_bytes_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(size))
    assert f"{size} bytes" in refusal(path)


def test_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.safetensors")


def test_header_length_beyond_the_file_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path, {"a": entry(0, 4)}, bytes(4), length=5000)
    message = refusal(path)
    assert "5,000" in message
    assert str(path.stat().st_size) in message


def test_header_length_one_byte_beyond_the_file_is_refused(tmp_path: Path) -> None:
    refusal(shard(tmp_path, b"{}", length=3))


def test_header_over_100_mb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = shard(tmp_path, b"{}", length=MAX_HEADER_BYTES + 1)
    os.truncate(path, MAX_HEADER_BYTES + 100)
    message = refusal(path)
    assert "100,000,001" in message
    assert "100,000,000" in message


def test_largest_header_length_is_refused(tmp_path: Path) -> None:
    assert f"{2**64 - 1:,}" in refusal(shard(tmp_path, b"{}", length=2**64 - 1))


@pytest.mark.parametrize("raw", [b"", b"not json", b'{"a": ', b"{} {}", b"{'a': 1}", b"\xff\xfe{}", b'{"a\x80": 1}'])
def test_header_that_is_not_json_is_refused(tmp_path: Path, raw: bytes) -> None:
    assert "not JSON" in refusal(shard(tmp_path, raw))


@pytest.mark.parametrize(("raw", "kind"), [(b"[]", "list"), (b"3", "int"), (b'"a"', "str"), (b"null", "NoneType")])
def test_header_that_is_not_an_object_is_refused(tmp_path: Path, raw: bytes, kind: str) -> None:
    assert kind in refusal(shard(tmp_path, raw))


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_deeply_nested_header_is_refused(tmp_path: Path, opening: bytes) -> None:
    assert "not JSON" in refusal(shard(tmp_path, opening * 100_000))


def test_overlapping_offsets_are_refused(tmp_path: Path) -> None:
    message = refusal(shard(tmp_path, {"first": entry(0, 8), "second": entry(5, 12)}, bytes(12)))
    assert "'first'" in message
    assert "'second'" in message
    assert "overlaps" in message
    assert "3 bytes" in message


def test_two_tensors_in_one_place_are_refused(tmp_path: Path) -> None:
    assert "8 bytes" in refusal(shard(tmp_path, {"first": entry(0, 8), "second": entry(0, 8)}, bytes(8)))


def test_tensor_within_another_is_refused(tmp_path: Path) -> None:
    assert "'inner'" in refusal(shard(tmp_path, {"outer": entry(0, 8), "inner": entry(2, 4)}, bytes(8)))


def test_hole_at_the_start_is_refused(tmp_path: Path) -> None:
    message = refusal(shard(tmp_path, {"first": entry(4, 8)}, bytes(8)))
    assert "hole of 4 bytes" in message
    assert "'first'" in message


def test_hole_in_the_middle_is_refused(tmp_path: Path) -> None:
    message = refusal(shard(tmp_path, {"first": entry(0, 4), "second": entry(9, 12)}, bytes(12)))
    assert "hole of 5 bytes" in message
    assert "'first'" in message
    assert "'second'" in message


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    message = refusal(shard(tmp_path, {"first": entry(0, 4)}, bytes(10)))
    assert "6 bytes after" in message
    assert "'first'" in message


def test_bytes_after_an_empty_header_are_refused(tmp_path: Path) -> None:
    assert "7 bytes after" in refusal(shard(tmp_path, {}, bytes(7)))


def test_offsets_that_run_backwards_are_refused(tmp_path: Path) -> None:
    message = refusal(shard(tmp_path, {"first": entry(0, 8), "second": entry(12, 8, shape=[4])}, bytes(12)))
    assert "'second'" in message
    assert "[12, 8]" in message
    assert "backwards" in message


def test_offsets_past_the_end_are_refused(tmp_path: Path) -> None:
    path = shard(tmp_path, {"first": entry(0, 4), "second": entry(4, 4004)}, bytes(8))
    message = refusal(path)
    assert "'second'" in message
    assert f"{path.stat().st_size - 8 + 4004:,}" in message
    assert f"file of {path.stat().st_size:,}" in message


@pytest.mark.parametrize(
    ("shape", "dtype", "needed"),
    [([3, 4], "F32", 48), ([], "F64", 8), ([0, 9], "F16", 0), ([65_536] * 4, "F16", 2**65)],
)
def test_shape_that_disagrees_with_the_bytes_is_refused(
    tmp_path: Path, shape: list[int], dtype: str, needed: int
) -> None:
    message = refusal(shard(tmp_path, {"odd": entry(0, 20, shape, dtype)}, bytes(20)))
    assert "'odd'" in message
    assert f"{needed:,} bytes" in message
    assert "20" in message


def test_duplicate_tensor_names_are_refused(tmp_path: Path) -> None:
    first, second = json.dumps(entry(0, 4)), json.dumps(entry(4, 8))
    message = refusal(shard(tmp_path, f'{{"twin": {first}, "twin": {second}}}'.encode(), bytes(8)))
    assert "'twin'" in message
    assert "twice" in message


def test_duplicate_keys_of_a_tensor_are_refused(tmp_path: Path) -> None:
    raw = b'{"a": {"dtype": "U8", "shape": [4], "shape": [2], "data_offsets": [0, 4]}}'
    assert "'shape'" in refusal(shard(tmp_path, raw, bytes(4)))


@pytest.mark.parametrize("shape", [[-2, -2], [4, True], [4.0], ["4"], [None], [[4]]], ids=str)
def test_size_that_is_no_count_is_refused_in_a_shape(tmp_path: Path, shape: list[Any]) -> None:
    message = refusal(shard(tmp_path, {"odd": entry(0, 4, shape=shape)}, bytes(4)))
    assert "'odd'" in message
    assert str(shape) in message


@pytest.mark.parametrize("shape", [4, "4", None, {"0": 4}])
def test_shape_that_is_no_list_is_refused(tmp_path: Path, shape: Any) -> None:
    header = {"odd": {"dtype": "U8", "shape": shape, "data_offsets": [0, 4]}}
    assert "'odd'" in refusal(shard(tmp_path, header, bytes(4)))


@pytest.mark.parametrize(
    "offsets",
    [
        [-4, 0],
        [False, 4],
        [0, 4.0],
        ["0", "4"],
        [0, None],
        [0],
        [0, 4, 8],
        [],
        None,
        4,
        {"begin": 0, "end": 4},
    ],
)
def test_offsets_that_are_no_two_counts_are_refused(tmp_path: Path, offsets: Any) -> None:
    header = {"odd": {"dtype": "U8", "shape": [4], "data_offsets": offsets}}
    assert "'odd'" in refusal(shard(tmp_path, header, bytes(4)))


HUGE = pytest.mark.parametrize(
    "size", [2**31, 2**63, 2**64, 10**400, 10**4300 - 1], ids=["2**31", "2**63", "2**64", "10**400", "10**4300"]
)


@HUGE
def test_size_beyond_any_memory_is_refused_in_a_shape(tmp_path: Path, size: int) -> None:
    assert "'odd'" in refusal(shard(tmp_path, {"odd": entry(0, 4, shape=[size])}, bytes(4)))


@HUGE
def test_offset_beyond_any_file_is_refused_as_a_begin(tmp_path: Path, size: int) -> None:
    assert "'odd'" in refusal(shard(tmp_path, {"odd": entry(size - 4, size)}, bytes(4)))


@HUGE
def test_offset_beyond_any_file_is_refused_as_an_end(tmp_path: Path, size: int) -> None:
    assert "'odd'" in refusal(shard(tmp_path, {"odd": entry(0, size)}, bytes(4)))


@pytest.mark.parametrize("dtype", ["F128", "f32", "", None, 32, ["F32"], {}])
def test_unknown_dtype_is_refused(tmp_path: Path, dtype: Any) -> None:
    header = {"odd": {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}}
    message = refusal(shard(tmp_path, header, bytes(4)))
    assert "'odd'" in message
    assert repr(dtype) in message


@pytest.mark.parametrize("described", [3, None, [], "U8", {}, {"dtype": "U8"}])
def test_tensor_that_is_not_described_is_refused(tmp_path: Path, described: Any) -> None:
    assert "'odd'" in refusal(shard(tmp_path, {"odd": described}, bytes(4)))


@pytest.mark.parametrize("metadata", [3, [], "pt", None, {"format": 3}, {"format": {"a": "b"}}])
def test_metadata_that_does_not_map_strings_to_strings_is_refused(tmp_path: Path, metadata: Any) -> None:
    assert "__metadata__" in refusal(shard(tmp_path, {"__metadata__": metadata, "a": entry(0, 4)}, bytes(4)))


# --- files that were damaged at random ---------------------------------------------------------------------------


def read_or_refuse(path: Path) -> None:
    """The file either reads as tensors that cover its data exactly or is refused by name, and nothing else happens."""
    try:
        tensors = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    size = path.stat().st_size
    at = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for info in tensors:
        assert info.start == at
        at = info.stop
    assert at == size


@pytest.fixture(scope="module")
def good_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "model.safetensors"
    tensors = {
        "model.embed": torch.ones(3, 5),
        "model.norm": torch.ones(5, dtype=torch.float16),
        "s": torch.tensor(1.0),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return path.read_bytes()


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_header_with_damaged_bytes_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, good_bytes: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    damaged = bytearray(good_bytes)
    header_stop = 8 + int.from_bytes(good_bytes[:8], "little")
    likely = st.sampled_from(b'0123456789-.eE"[]{},: NaIU')
    for at in data.draw(st.lists(st.integers(0, header_stop - 1), max_size=4)):
        damaged[at] = data.draw(likely | st.integers(0, 255))
    keep = data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))
    path.write_bytes(damaged[:keep])
    read_or_refuse(path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.integers(0, 8) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
SIZES = st.integers(0, 16) | st.sampled_from([2**31, 2**63, 2**64, 10**400])
NEARLY_TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F16", "F32", "F4", "F6_E2M3"]) | JSON_VALUES,
        "shape": st.lists(SIZES, max_size=3) | JSON_VALUES,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JSON_VALUES,
    }
)


@settings(deadline=None, max_examples=300)
@given(
    header=st.dictionaries(st.text(max_size=3), NEARLY_TENSORS | JSON_VALUES, max_size=3) | JSON_VALUES,
    data_bytes=st.integers(0, 16),
)
def test_header_of_any_json_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: Any, data_bytes: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-json"
    folder.mkdir(exist_ok=True)
    read_or_refuse(shard(folder, header, bytes(data_bytes)))


# --- the index ---------------------------------------------------------------------------------------------------


def test_index_that_names_a_missing_shard_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", shards={"one.safetensors": {"a": torch.ones(2)}})
    index(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    message = folder_refusal(folder)
    assert str(folder / INDEX_FILE) in message
    assert "two.safetensors" in message


def test_damaged_shard_among_good_ones_is_refused_by_name(tmp_path: Path) -> None:
    shards = {"one.safetensors": {"a": torch.ones(2)}, "two.safetensors": {"b": torch.ones(2)}}
    folder = checkpoint(tmp_path / "model", shards=shards)
    os.truncate(folder / "two.safetensors", (folder / "two.safetensors").stat().st_size - 1)
    message = folder_refusal(folder)
    assert str(folder / "two.safetensors") in message
    assert "'b'" in message


@pytest.mark.parametrize(
    "file",
    [
        "{outside}/secret.safetensors",
        "../outside/secret.safetensors",
        "parts/../../outside/secret.safetensors",
        "..\\outside\\secret.safetensors",
        "parts\\..\\..\\outside\\secret.safetensors",
        "\\\\server\\share\\secret.safetensors",
        "\\secret.safetensors",
        "C:\\secret.safetensors",
        "C:/secret.safetensors",
        "c:secret.safetensors",
        "..",
        "/",
    ],
)
def test_index_that_points_outside_the_folder_is_refused(tmp_path: Path, file: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    save_file({"a": torch.ones(2)}, outside / "secret.safetensors")
    folder = checkpoint(tmp_path / "model")
    (folder / "parts").mkdir()
    file = file.format(outside=outside)
    # On POSIX a backslash or a colon is a letter like any other: the file is there, and is refused all the same.
    if "/" not in file and file != "..":
        save_file({"a": torch.ones(2)}, folder / file)
    index(folder, {"a": file})
    message = folder_refusal(folder)
    assert str(folder / INDEX_FILE) in message
    assert repr(file) in message
    assert "outside" in message.replace(str(outside), "")


@pytest.mark.parametrize("file", [3, None, True, ["one.safetensors"], {"file": "one.safetensors"}, ""])
def test_index_that_maps_a_tensor_to_no_file_name_is_refused(tmp_path: Path, file: Any) -> None:
    folder = checkpoint(tmp_path / "model", shards={"one.safetensors": {"a": torch.ones(2)}})
    index(folder, {"a": "one.safetensors", "odd": file})
    message = folder_refusal(folder)
    assert str(folder / INDEX_FILE) in message
    assert "'odd'" in message
    assert repr(file) in message


@pytest.mark.parametrize("file", ["x" * 300, "x" * 5000, "a\0b", "\ud800", "."], ids=lambda file: ascii(file[:9]))
def test_index_with_a_file_name_that_cannot_be_is_refused(tmp_path: Path, file: str) -> None:
    folder = checkpoint(tmp_path / "model")
    index(folder, {"a": file})
    assert str(folder / INDEX_FILE) in folder_refusal(folder)


def test_tensor_in_the_index_but_not_in_its_shard_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", shards={"one.safetensors": {"a": torch.ones(2)}})
    index(folder, {"a": "one.safetensors", "ghost": "one.safetensors"})
    message = folder_refusal(folder)
    assert str(folder / "one.safetensors") in message
    assert "'ghost'" in message


def test_tensor_in_the_shard_but_not_in_the_index_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", shards={"one.safetensors": {"a": torch.ones(2), "stray": torch.ones(1)}})
    index(folder, {"a": "one.safetensors"})
    message = folder_refusal(folder)
    assert str(folder / "one.safetensors") in message
    assert "'stray'" in message


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards = {"one.safetensors": {"a": torch.ones(2), "b": torch.ones(1)}, "two.safetensors": {"b": torch.ones(1)}}
    folder = checkpoint(tmp_path / "model", shards=shards)
    message = folder_refusal(folder)
    assert "'b'" in message
    assert str(folder / "one.safetensors") in message
    assert "two.safetensors" in message


@pytest.mark.parametrize("raw", [b"", b"{", b"<html>not found</html>", b"\xff\xfe\xfd", b"[" * 100_000])
def test_index_that_is_not_json_is_refused(tmp_path: Path, raw: bytes) -> None:
    folder = checkpoint(tmp_path / "model")
    (folder / INDEX_FILE).write_bytes(raw)
    message = folder_refusal(folder)
    assert str(folder / INDEX_FILE) in message
    assert "not JSON" in message


@pytest.mark.parametrize("content", [{}, {"metadata": {}}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": "a"}])
def test_index_without_a_weight_map_is_refused(tmp_path: Path, content: Any) -> None:
    folder = checkpoint(tmp_path / "model")
    (folder / INDEX_FILE).write_text(json.dumps(content))
    message = folder_refusal(folder)
    assert str(folder / INDEX_FILE) in message
    assert "weight_map" in message


def test_index_that_is_a_list_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    (folder / INDEX_FILE).write_text("[1, 2]")
    assert f"{folder / INDEX_FILE}: holds a JSON list" in folder_refusal(folder)


def test_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file({file: torch.ones(2)}, folder / file)
    message = folder_refusal(folder)
    assert str(folder) in message
    assert "2 safetensors files" in message
    assert INDEX_FILE in message


def test_one_shard_of_several_without_an_index_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    assert INDEX_FILE in folder_refusal(folder)


# --- pickles -----------------------------------------------------------------------------------------------------


class TouchesAFile:
    """Creates `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_is_refused_with_the_way_to_convert_it_and_never_opened(tmp_path: Path, file: str) -> None:
    folder, marker = checkpoint(tmp_path / "model"), tmp_path / "pickle-was-opened"
    (folder / file).write_bytes(pickle.dumps(TouchesAFile(marker)))
    message = folder_refusal(folder)
    assert str(folder) in message
    assert file in message
    assert "save_pretrained" in message
    assert not marker.exists()
    pickle.loads((folder / file).read_bytes())
    assert marker.exists()


@pytest.mark.parametrize("as_single_file", [True, False])
def test_pickle_under_a_safetensors_name_is_refused_and_never_opened(tmp_path: Path, as_single_file: bool) -> None:
    folder, marker = checkpoint(tmp_path / "model"), tmp_path / "pickle-was-opened"
    path = folder / (SINGLE_FILE if as_single_file else "pytorch_model.bin")
    path.write_bytes(pickle.dumps(TouchesAFile(marker)))
    if not as_single_file:
        index(folder, {"a": path.name})
    assert str(path) in folder_refusal(folder)
    assert not marker.exists()


# --- the folder and its config -----------------------------------------------------------------------------------


def test_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    message = folder_refusal(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message
    assert "no such folder" in message


def test_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in folder_refusal(tmp_path / "file")


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    message = folder_refusal(tmp_path)
    assert str(tmp_path) in message
    assert "config.json" in message


def test_folder_with_a_config_and_no_weights_is_refused(tmp_path: Path) -> None:
    message = folder_refusal(checkpoint(tmp_path / "model"))
    assert str(tmp_path / "model") in message
    assert SINGLE_FILE in message
    assert INDEX_FILE in message


def test_weights_without_a_config_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE_FILE)
    message = folder_refusal(tmp_path)
    assert str(tmp_path) in message
    assert "no config.json" in message


@pytest.mark.parametrize("raw", [b"", b"{", b"version https://git-lfs.github.com/spec/v1", b"\xff\xfe", b"[" * 100_000])
def test_config_that_is_not_json_is_refused(tmp_path: Path, raw: bytes) -> None:
    folder = checkpoint(tmp_path / "model", config=raw, shards={"one.safetensors": {"a": torch.ones(2)}})
    message = folder_refusal(folder)
    assert str(folder / "config.json") in message
    assert "not JSON" in message


def test_config_that_is_a_list_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", config=[CONFIG], shards={"one.safetensors": {"a": torch.ones(2)}})
    assert f"{folder / 'config.json'}: holds a JSON list" in folder_refusal(folder)


@pytest.mark.parametrize("config", [{}, {"hidden_size": 32}, {"model_type": None}, {"model_type": ["llama"]}])
def test_config_without_a_model_type_is_refused(tmp_path: Path, config: Any) -> None:
    folder = checkpoint(tmp_path / "model", config=config, shards={"one.safetensors": {"a": torch.ones(2)}})
    message = folder_refusal(folder)
    assert str(folder / "config.json") in message
    assert "model_type" in message


REMOTE_CODE = {"model_type": "fancy-new-model", "auto_map": {"AutoConfig": "configuration_fancy.FancyConfig"}}


def test_config_that_needs_remote_code_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", config=REMOTE_CODE, shards={"one.safetensors": {"a": torch.ones(2)}})
    message = folder_refusal(folder)
    assert str(folder / "config.json") in message
    assert "'fancy-new-model'" in message
    assert "trust_remote_code=True" in message


def test_config_that_needs_remote_code_is_opened_when_that_is_trusted(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", config=REMOTE_CODE, shards={"one.safetensors": {"a": torch.ones(2)}})
    assert open_checkpoint(folder, Access(trust_remote_code=True)).config == REMOTE_CODE


def test_native_model_that_offers_remote_code_is_opened_without_it(tmp_path: Path) -> None:
    config = REMOTE_CODE | {"model_type": "llama"}
    folder = checkpoint(tmp_path / "model", config=config, shards={"one.safetensors": {"a": torch.ones(2)}})
    assert open_checkpoint(folder).config == config


@pytest.mark.parametrize(
    ("extra", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"load_in_8bit": True}}, "unnamed"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": "awq"}, "awq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ],
)
def test_checkpoint_that_is_already_quantized_is_refused(tmp_path: Path, extra: dict[str, Any], method: str) -> None:
    shards = {"one.safetensors": {"a": torch.ones(2)}}
    folder = checkpoint(tmp_path / "model", config=CONFIG | extra, shards=shards)
    message = folder_refusal(folder)
    assert str(folder / "config.json") in message
    assert "already quantized" in message
    assert method in message


@settings(deadline=None, max_examples=100)
@given(weight_map=JSON_VALUES | st.dictionaries(st.sampled_from(["a", "b"]), st.just("one.safetensors") | JSON_VALUES))
def test_index_of_any_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, weight_map: Any) -> None:
    folder = checkpoint(tmp_path_factory.getbasetemp() / "any-index")
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    index(folder, weight_map)
    try:
        opened = open_checkpoint(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)
    else:
        assert opened.tensors.keys() == {"a"}
