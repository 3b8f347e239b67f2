"""What is compared between machines before loading, and what is said of each difference."""

import time
from pathlib import Path

import pytest
import torch
from tiny import save_tiny

import bigint8
from bigint8.options import Access
from bigint8.run.preflight import TAIL_BYTES, FileMark, clock_error, differences, file_differences, files_of, marks
from bigint8.run.versions import state_here
from bigint8.session import find_model


def test_versions_are_those_that_run_here():
    found, clock = state_here()
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert found["bigint8"].startswith(f"{bigint8.__version__} (sources ")
    assert abs(clock - time.time()) < 60


def test_sources_that_differ_in_a_byte_are_another_bigint8(tmp_path, monkeypatch):
    """A checkout that was changed has the version that it had before."""

    class Found:
        origin = "there"

        def __init__(self, folder: Path) -> None:
            self.submodule_search_locations = [str(folder)]

    for package in ("bigint8", "bigint8_kernels"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text('__version__ = "7.0"\n')
    monkeypatch.setattr("importlib.util.find_spec", lambda package: Found(tmp_path / package))
    before = state_here()[0]["bigint8"]
    (tmp_path / "bigint8" / "new.py").write_text("x = 1\n")
    between = state_here()[0]["bigint8"]
    (tmp_path / "bigint8" / "new.py").write_text("x = 2\n")
    assert before.startswith("7.0 (sources ") and len({before, between, state_here()[0]["bigint8"]}) == 3


def test_each_version_that_differs_is_told_with_both_values_and_the_way_out():
    here = {"Python": "3.11", "bigint8": "1 (sources a)", "torch": "2.9.0", "ray": "2.60.0"}
    assert differences("b", here, here) == []
    assert differences("b (10.0.0.2)", here, here | {"ray": "not installed", "Python": "3.12"}) == [
        "node b (10.0.0.2) has Python 3.12, this machine 3.11: start Ray there from an environment with Python 3.11",
        "node b (10.0.0.2) has ray not installed, this machine 2.60.0: pip install ray==2.60.0 there, into the "
        "environment that Ray was started from, and start Ray again",
    ]


@pytest.mark.parametrize(
    ("clock", "error"), [(99.0, -1.0), (100.0, 0.0), (103.0, 0.0), (105.0, 0.0), (107.0, 2.0), (3705.0, 3600.0)]
)
def test_a_clock_is_off_by_what_the_way_there_and_back_cannot_explain(clock, error):
    assert clock_error(100.0, clock, 105.0) == error


def test_what_is_compared_of_a_checkpoint_is_all_that_workers_read(tmp_path):
    folder = save_tiny("llama", False, tmp_path / "model")
    (folder / "code.py").write_text("x = 1\n")
    names = {file.name for file in files_of(find_model(folder).spec)}
    shards = {file.name for file in folder.glob("*.safetensors")}
    assert names == {"config.json", "model.safetensors.index.json"} | shards and len(shards) > 2
    trusted = find_model(folder, access=Access(trust_remote_code=True)).spec
    assert {file.name for file in files_of(trusted)} == names | {"code.py"}


@pytest.mark.parametrize("where", ["size", "header", "end", "config"])
def test_a_change_in_a_files_size_header_or_end_changes_its_mark(tmp_path, where):
    shard, config = tmp_path / "a.safetensors", tmp_path / "config.json"
    header = b'{"x":{}}'
    data = bytearray(len(header).to_bytes(8, "little") + header + bytes(3 * TAIL_BYTES))
    shard.write_bytes(data)
    config.write_text("{}")
    before = marks([shard, config])
    if where == "size":
        data += b"\0"
    elif where == "header":
        data[10] = ord("y")
    elif where == "end":
        data[-TAIL_BYTES] = 1
    shard.write_bytes(data)
    config.write_text("[]" if where == "config" else "{}")
    assert [a != b for a, b in zip(before, marks([shard, config]), strict=True)] == [
        where != "config",
        where == "config",
    ]


def test_files_that_cannot_be_read_and_files_that_differ_are_told_apart(tmp_path):
    files = [tmp_path / name for name in "abcd"]
    here = [FileMark(1234, "x")] * 4
    there = [FileMark(1234, "x"), FileMark(error="Permission denied"), FileMark(5678, "x"), FileMark(1234, "y")]
    assert file_differences("b", files, here, here) == []
    absent, other = file_differences("b", files, here, there)
    assert absent.startswith(f"node b cannot read {files[1]} (Permission denied): copy the checkpoint there")
    assert other.startswith(
        f"node b has another checkpoint: {files[2]} has 5,678 bytes there, 1,234 here and 1 more file;"
    )
    (other,) = file_differences("b", files[3:], here[3:], there[3:])
    assert f"{files[3]} has the 1,234 bytes that it has here, with other content" in other
    assert marks([tmp_path / "nowhere"]) == [FileMark(error="No such file or directory")]
