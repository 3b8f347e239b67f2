"""Saves that fail, what they leave behind, and int8 checkpoints that are damaged: one error, nothing half there."""

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import INDEX, quantization_of, read_tensors, replace, rewrite, set_config, shard_of
from torch import Tensor

from bigint8 import BigInt8Error, CheckpointError, Int8Config, load_sharded_int8
from bigint8.checkpoint.folder import new_checkpoint_folder
from bigint8.session import quantize

LAYER = "model.layers.1.mlp.down_proj"
NORM = "model.layers.2.input_layernorm.weight"
SHARD = 40_000


def load(folder: Path, **kwargs: Any) -> Any:
    return load_sharded_int8(folder, progress=False, context=64, dtype="float16", **kwargs)


def to_int8(source: Path, folder: Path, **kwargs: Any) -> Path:
    quantize(source, folder, progress=False, shard_bytes=SHARD, **kwargs)
    return folder


def save_loaded(source: Path, folder: Path, **kwargs: Any) -> Path:
    load(source).save_int8(folder, shard_bytes=SHARD, **kwargs)
    return folder


Save = Callable[..., Path]
BOTH_WAYS = pytest.mark.parametrize("save", [to_int8, save_loaded])


def refusal(action: Callable[..., object], *args: Any, error: type[BigInt8Error] = CheckpointError, **kw: Any) -> str:
    """The message with which something is refused, by exactly this class of error."""
    with pytest.raises(BigInt8Error) as caught:
        action(*args, **kw)
    assert type(caught.value) is error
    return str(caught.value)


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.fixture(scope="module")
def good(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 checkpoint of several shards, not to be written to."""
    folder = to_int8(source, tmp_path_factory.mktemp("good") / "int8")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    """A copy of the int8 checkpoint, to damage."""
    return Path(shutil.copytree(good, tmp_path / "int8"))


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own in memory; skips the test where it may not be mounted."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a file system")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# --- a place that is taken ---------------------------------------------------------------------------------------


@BOTH_WAYS
def test_a_folder_that_is_there_is_refused_unless_it_may_be_overwritten(save: Save, source, copy, tmp_path):
    (copy / "notes.txt").write_text("of the old one")
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    message = refusal(save, source, copy)
    assert str(copy) in message and "exists already" in message and "overwrite=True" in message
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before
    rewrite(copy, lambda tensors: tensors.pop("lm_head.weight", None))
    save(source, copy, overwrite=True)
    assert not (copy / "notes.txt").exists()
    assert "lm_head.weight" in load(copy).state_dict()
    assert names_in(tmp_path) == {"int8"}


@BOTH_WAYS
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_checkpoint_is_never_overwritten(save: Save, overwrite, source, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "one.jpg").write_text("irreplaceable")
    message = refusal(save, source, photos, overwrite=overwrite)
    assert str(photos) in message and "exists" in message
    assert (photos / "one.jpg").read_text() == "irreplaceable"
    assert names_in(tmp_path) == {"photos"}


@BOTH_WAYS
def test_a_file_is_never_overwritten(save: Save, source, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "is no folder" in refusal(save, source, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "x"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is no folder" in refusal(save, source, tmp_path / "link", overwrite=True)


@BOTH_WAYS
def test_an_empty_folder_and_missing_parents_are_no_hindrance(save: Save, source, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new" / "parents" / "int8"):
        assert load(save(source, folder)).load_report.unused == []
    assert names_in(tmp_path) == {"empty", "new"}


def test_a_folder_that_is_filled_while_it_is_written_beside_is_not_overwritten(source, tmp_path):
    with pytest.raises(CheckpointError, match="exists already"), new_checkpoint_folder(tmp_path / "int8", False, 0):
        (tmp_path / "int8").mkdir()
        (tmp_path / "int8" / "other").write_text("of someone else")
    assert names_in(tmp_path) == {"int8"} and names_in(tmp_path / "int8") == {"other"}


@BOTH_WAYS
def test_a_link_to_a_checkpoint_is_replaced_and_what_it_points_to_is_kept(save: Save, source, copy, tmp_path):
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    (tmp_path / "link").symlink_to(copy)
    assert "exists already" in refusal(save, source, tmp_path / "link")
    save(source, tmp_path / "link", overwrite=True)
    assert not (tmp_path / "link").is_symlink()
    assert load(tmp_path / "link").load_report.unused == []
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before
    assert names_in(tmp_path) == {"int8", "link"}


def test_what_an_interrupted_replacement_left_is_in_no_ones_way(source, copy, tmp_path):
    (tmp_path / ".int8.replaced").mkdir()
    (tmp_path / ".int8.replaced" / "config.json").write_text("{}")
    to_int8(source, copy, overwrite=True)
    assert names_in(tmp_path) == {"int8"}


@pytest.mark.parametrize("where", [".", "..", "link"])
def test_a_target_that_is_the_source_or_holds_it_is_refused(where, source, tmp_path):
    inner = tmp_path / "outer" / "source"
    shutil.copytree(source, inner)
    (tmp_path / "outer" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(inner)
    target = tmp_path / "link" if where == "link" else inner / where
    before = names_in(inner)
    assert "is, or holds, the checkpoint" in refusal(to_int8, inner, target, overwrite=True)
    assert names_in(inner) == before


# --- a disk that is full or not to be written to -----------------------------------------------------------------


@BOTH_WAYS
def test_a_disk_with_too_little_room_is_told_before_anything_is_written(save: Save, source, tmp_path):
    with mounted(tmp_path / "disk", "size=64k") as disk:
        message = refusal(save, source, disk / "int8")
        assert names_in(disk) == set()
    assert str(disk / "int8") in message and "no room on the disk" in message
    assert "are needed" in message and "are free" in message


@BOTH_WAYS
def test_a_disk_that_fills_up_when_its_room_is_taken_is_told_and_nothing_is_kept(save: Save, source, good, tmp_path):
    needed = sum(tensor.nbytes for tensor in read_tensors(good).values())
    room = -(-needed // 4096) * 4096  # the tensors, but not the headers, nor whole pages for every file
    with mounted(tmp_path / "disk", f"size={room}") as disk:
        message = refusal(save, source, disk / "int8")
        assert names_in(disk) == set()
    assert "no room on the disk: No space left on device while writing" in message


@BOTH_WAYS
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_while_rows_are_written_is_told_and_nothing_is_kept(
    save: Save, number, source, tmp_path, monkeypatch
):
    write, calls = os.pwrite, iter(range(10**6))

    def fail(descriptor: int, data: Any, at: int) -> int:
        if next(calls) == 40:
            raise OSError(number, os.strerror(number))
        return write(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", fail)
    message = refusal(save, source, tmp_path / "int8")
    assert os.strerror(number) in message and str(tmp_path / "int8") in message
    assert ("no room on the disk" in message) == (number != errno.EIO)
    assert names_in(tmp_path) == set()
    monkeypatch.undo()
    assert load(save(source, tmp_path / "int8")).load_report.unused == []


@BOTH_WAYS
def test_short_writes_are_continued(save: Save, source, good, tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: write(descriptor, data[:100], at))
    written, expected = read_tensors(save(source, tmp_path / "int8")), read_tensors(good)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


@BOTH_WAYS
def test_a_failed_overwrite_leaves_the_old_checkpoint(save: Save, source, copy, tmp_path, monkeypatch):
    before = {file.name: file.read_bytes() for file in copy.iterdir()}

    def fail(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    assert "no room" in refusal(save, source, copy, overwrite=True)
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before
    assert names_in(tmp_path) == {"int8"}


@BOTH_WAYS
def test_a_parent_that_cannot_be_written_to_is_refused(save: Save, source, tmp_path):
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o555)
        message = refusal(save, source, tmp_path / "closed" / "int8")
        assert "cannot be written: Permission denied" in message
    else:
        with mounted(tmp_path / "closed", "ro") as closed:
            message = refusal(save, source, closed / "int8")
        assert "cannot be written: Read-only file system" in message
    assert str(tmp_path / "closed" / "int8") in message


@BOTH_WAYS
@pytest.mark.parametrize("where", ["file/int8", "x" * 300, "x" * 250])
def test_a_place_that_cannot_be_is_refused(save: Save, where, source, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in refusal(save, source, tmp_path / where)
    assert names_in(tmp_path) == {"file"}


# --- a save that is killed, and two at once ----------------------------------------------------------------------

KILLED_MIDWAY = """
import os, signal, sys
from bigint8.session import quantize

write, calls = os.pwrite, iter(range(10**6))

def kill_at_the_40th(descriptor, data, at):
    if next(calls) == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(descriptor, data, at)

os.pwrite = kill_at_the_40th
quantize(sys.argv[1], sys.argv[2], progress=False)
"""


def test_a_save_that_is_killed_leaves_nothing_that_loads_and_the_next_one_clears_it_away(source, tmp_path):
    folder = tmp_path / "int8"
    child = subprocess.run([sys.executable, "-c", KILLED_MIDWAY, str(source), str(folder)])
    assert child.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".") and list(left.glob("*.safetensors"))
    for place in (folder, left):
        refusal(load, place)
    with pytest.raises(BigInt8Error):
        quantize(left, tmp_path / "more", progress=False)
    to_int8(source, folder)
    assert load(folder).load_report.unused == []
    assert names_in(tmp_path) == {"int8"}


@BOTH_WAYS
def test_of_two_saves_to_one_place_at_once_the_second_is_refused(save: Save, source, tmp_path, monkeypatch):
    begun, go_on, write = threading.Event(), threading.Event(), os.pwrite

    def wait_and_write(descriptor: int, data: Any, at: int) -> int:
        begun.set()
        assert go_on.wait(60)
        return write(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", wait_and_write)
    first = threading.Thread(target=save, args=(source, tmp_path / "int8"))
    first.start()
    try:
        assert begun.wait(60)
        message = refusal(save, source, tmp_path / "int8")
    finally:
        go_on.set()
        first.join()
    assert str(tmp_path / "int8") in message and "another process is saving there" in message
    assert load(tmp_path / "int8").load_report.unused == []
    assert names_in(tmp_path) == {"int8"}


# --- what is not to be made int8, or not to be saved -------------------------------------------------------------


def test_an_int8_checkpoint_is_not_quantized_again(good, tmp_path):
    message = refusal(to_int8, good, tmp_path / "again")
    assert str(good) in message and "is int8 already" in message
    assert names_in(tmp_path) == set()


def test_a_model_without_int8_layers_is_not_saved(source, tmp_path):
    model = load(source, config=Int8Config(skip_modules=("model", "lm_head")))
    assert "no int8 layer" in refusal(model.save_int8, tmp_path / "int8")
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("name", [f"{LAYER}.weight", NORM, "lm_head.weight"])
def test_a_source_that_holds_nan_is_refused_by_name_and_leaves_no_folder(name, source, tmp_path):
    damaged = Path(shutil.copytree(source, tmp_path / "source"))
    replace(damaged, name, lambda tensor: tensor.index_fill(0, torch.tensor([3]), float("nan")))
    message = refusal(to_int8, damaged, tmp_path / "int8")
    assert str(shard_of(damaged, name)) in message and repr(name) in message and "NaN" in message
    assert names_in(tmp_path) == {"source"}


# --- int8 folders that are half there, or of another kind --------------------------------------------------------


def test_a_missing_shard_is_refused_by_name(copy):
    shard = shard_of(copy, f"{LAYER}.weight")
    shard.unlink()
    assert shard.name in refusal(load, copy)


def test_a_config_without_weights_is_refused(copy):
    for file in (*copy.glob("*.safetensors"), copy / INDEX):
        file.unlink()
    assert f"{copy}: no weights" in refusal(load, copy)


def test_weights_without_a_config_are_refused(copy):
    (copy / "config.json").unlink()
    assert "no config.json" in refusal(load, copy)


def test_shards_without_their_index_are_refused(copy):
    (copy / INDEX).unlink()
    assert f"no {INDEX}" in refusal(load, copy)


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "gptq", "bits": 8},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
        {"quant_method": "bitsandbytes", "_load_in_4bit": True, "load_in_4bit": True, "load_in_8bit": True},
        {"quant_method": "bitsandbytes"},
        {"load_in_8bit": True},
        {"quant_method": "fp8"},
        "int8",
        ["bitsandbytes"],
    ],
)
def test_a_checkpoint_quantized_in_another_way_is_refused(stored, copy, tmp_path):
    set_config(copy, quantization_config=stored)
    for action in (load, lambda folder: to_int8(folder, tmp_path / "more")):
        message = refusal(action, copy)
        assert str(copy / "config.json") in message and "already quantized" in message


def test_a_config_that_says_int8_of_a_16_bit_checkpoint_is_refused(good, source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    set_config(folder, quantization_config=quantization_of(good))
    message = refusal(load, folder)
    assert str(folder / "config.json") in message and ".SCB" in message and "remove quantization_config" in message


def test_int8_weights_without_quantization_config_are_refused(copy, tmp_path):
    set_config(copy, quantization_config=None)
    for action in (load, lambda folder: to_int8(folder, tmp_path / "more")):
        message = refusal(action, copy)
        assert "stored as I8" in message and "quantization_config" in message
        assert re.search(r"model\S+\.safetensors: tensor 'model\.layers\.0\.\S+weight'", message)


def test_scales_that_are_missing_for_one_layer_are_named(copy):
    replace(copy, f"{LAYER}.SCB", lambda scales: None)
    message = refusal(load, copy)
    assert str(shard_of(copy, f"{LAYER}.weight")) in message
    assert repr(f"{LAYER}.weight") in message
    assert "stored as I8" in message or f"{LAYER}.SCB, are missing" in message


def test_a_missing_int8_weight_is_named(copy):
    replace(copy, f"{LAYER}.weight", lambda weight: None)
    assert f"1 tensor is missing: {LAYER}.weight;" in refusal(load, copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(lambda scales: scales.half(), "stored as F16; scales must be F32", id="dtype"),
        pytest.param(lambda scales: scales[:-1], "has shape [47], but the config asks for [48]", id="short"),
        pytest.param(lambda scales: scales[:, None], "has shape [48, 1]", id="column"),
        *(
            pytest.param(
                lambda scales, value=value: scales.index_fill(0, torch.tensor([7]), value),
                "a scale that is negative, NaN or infinite",
                id=str(value),
            )
            for value in (float("nan"), float("inf"), -float("inf"), -1.0)
        ),
    ],
)
def test_scales_that_are_wrong_are_refused_with_file_and_tensor(change: Callable[[Tensor], Tensor], said, copy):
    replace(copy, f"{LAYER}.SCB", change)
    message = refusal(load, copy)
    assert str(shard_of(copy, f"{LAYER}.SCB")) in message and repr(f"{LAYER}.SCB") in message
    assert said in message


def test_a_row_of_zeros_has_a_scale_of_zero(copy):
    """Which is no damage: it is what quantizing such a row gives."""
    replace(copy, f"{LAYER}.SCB", lambda scales: scales.index_fill(0, torch.tensor([7]), 0.0))
    assert load(copy).get_submodule(LAYER).scale[7] == 0


@pytest.mark.parametrize("shape", [[48, 79], [80, 48]])
def test_an_int8_weight_of_the_wrong_shape_is_refused(shape, copy):
    replace(copy, f"{LAYER}.weight", lambda weight: torch.zeros(shape, dtype=torch.int8))
    message = refusal(load, copy)
    assert repr(f"{LAYER}.weight") in message and str(shape) in message and "[48, 80]" in message


def test_a_norm_in_int8_is_refused(copy):
    replace(copy, NORM, lambda norm: norm.to(torch.int8))
    message = refusal(load, copy)
    assert repr(NORM) in message and "stored as I8" in message


def test_nan_beside_the_int8_layers_is_refused_where_it_is_read(copy):
    """What is mapped is not read, so only a load that converts can tell; `bigint8.check` reads everything."""
    replace(copy, NORM, lambda norm: norm.index_fill(0, torch.tensor([7]), float("nan")))
    message = refusal(load_sharded_int8, copy, progress=False, dtype="float32")
    assert repr(NORM) in message and "NaN" in message


@pytest.mark.parametrize("value", [1, 2, 3, 255])
def test_an_order_of_values_of_old_gpus_is_refused(value, copy):
    replace(copy, f"{LAYER}.weight_format", lambda order: torch.tensor(value, dtype=torch.uint8))
    message = refusal(load, copy)
    assert str(shard_of(copy, f"{LAYER}.weight_format")) in message
    assert repr(f"{LAYER}.weight_format") in message and f"is {value}, an order" in message


@pytest.mark.parametrize("order", [torch.zeros(2, dtype=torch.uint8), torch.tensor(0), torch.tensor(0.0)])
def test_a_note_of_order_that_is_not_one_byte_is_refused(order, copy):
    replace(copy, f"{LAYER}.weight_format", lambda _: order)
    message = refusal(load, copy)
    assert repr(f"{LAYER}.weight_format") in message and "not one uint8" in message


def test_skipping_a_module_that_is_stored_in_int8_is_refused(copy):
    config = Int8Config(skip_modules=("lm_head", "down_proj"))
    message = refusal(load, copy, config=config, error=BigInt8Error)
    assert "skip_modules names model.layers.0.mlp.down_proj" in message and "in int8" in message


def test_a_tensor_that_is_not_of_the_model_is_reported(copy):
    def edit(tensors: dict[str, Tensor]) -> None:
        if NORM in tensors:
            tensors["model.left.SCB"] = torch.ones(3)

    rewrite(copy, edit)
    assert load(copy).load_report.unused == ["model.left.SCB"]
