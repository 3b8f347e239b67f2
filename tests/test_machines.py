"""Two machines that run one model: the tokens are those of one process, and what differs is told before loading."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from folders import save_tokenizer
from machines import ROOT, Machine, TwoMachines, two_machines
from tiny import save_tiny

import bigint8

PROMPT = "w5 w7 w11 w13"
SITE = Path(torch.__file__).parents[1]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoMachines]:
    """A Ray cluster of two nodes, each on a machine of its own."""
    with two_machines(tmp_path_factory.mktemp("cache")) as made:
        late = tmp_path_factory.mktemp("late")
        made.second.environment["PYTHONPATH"] = f"{late}:{made.second.environment.get('PYTHONPATH', '')}"
        made.start_ray()
        yield made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", False, tmp_path_factory.mktemp("llama") / "llama")
    save_tokenizer(folder)
    return folder


def launch(machine: Machine, folder: Path, *words: object) -> "subprocess.CompletedProcess[str]":
    common = ["--context", 64, "--max-new-tokens", 12, "--raw", "--prompt", PROMPT]
    return machine.python("-m", "bigint8.launch", "--model", folder, *common, *words)


def refusal(machines: TwoMachines, folder: Path) -> str:
    """What a launch over both machines says that is refused, before it loads."""
    done = launch(machines.first, folder, "--address", machines.address)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "reading" not in done.stdout
    return done.stderr


def test_a_launch_over_two_machines_has_the_tokens_of_one_process(machines, llama, tmp_path):
    file, alone = tmp_path / "two.json", tmp_path / "one.json"
    done = launch(machines.first, llama, "--address", machines.address, "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(file.read_text())
    boxes = [stage["device"]["box"]["name"] for stage in written["plan"]["stages"]]
    assert sorted(boxes) == ["box-a", "box-b"]
    done = launch(machines.first, llama, "--json", alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert written["generations"][0]["text"] == json.loads(alone.read_text())["generations"][0]["text"] != ""


def test_another_version_and_a_clock_that_is_off_are_told_together(machines, llama, tmp_path):
    other = tmp_path / "bigint8"
    shutil.copytree(ROOT / "bigint8", other, ignore=shutil.ignore_patterns("__pycache__"))
    (other / "__init__.py").write_text(
        (ROOT / "bigint8" / "__init__.py").read_text().replace(bigint8.__version__, "0.0.9")
    )
    (metadata,) = SITE.glob("torch-*.dist-info/METADATA")
    older = tmp_path / "METADATA"
    older.write_text(metadata.read_text().replace(f"Version: {torch.__version__.partition('+')[0]}", "Version: 2.0.1"))
    late = Path(machines.second.environment["PYTHONPATH"].partition(":")[0]) / "sitecustomize.py"
    late.write_text("import time\nnow = time.time\ntime.time = lambda: now() + 3600\n")
    machines.second.put(other, ROOT / "bigint8")
    machines.second.put(older, metadata)
    try:
        said = refusal(machines, llama)
    finally:
        late.unlink()
        machines.second.take_away(ROOT / "bigint8")
        machines.second.take_away(metadata)
    node = f"node box-b ({machines.second.address})"
    ours = torch.__version__.partition("+")[0]
    assert f"{node} has bigint8 0.0.9 (sources " in said and f"this machine {bigint8.__version__} (sources" in said
    assert f"{node} has torch 2.0.1, this machine {ours}: pip install torch=={ours} there" in said
    assert f"the clock of {node} is 3,5" in said or f"the clock of {node} is 3,600 s ahead" in said
    assert "box-a" not in said and "Traceback" not in said


def test_a_node_without_bigint8_is_named(machines, llama, tmp_path):
    machines.second.put(tmp_path, ROOT / "bigint8")
    try:
        said = refusal(machines, llama)
    finally:
        machines.second.take_away(ROOT / "bigint8")
    assert f"node box-b ({machines.second.address}) has bigint8 not installed, this machine" in said


def test_a_checkpoint_that_is_on_one_machine_only_is_told(machines, llama, tmp_path):
    machines.second.put(tmp_path, llama)
    try:
        said = refusal(machines, llama)
    finally:
        machines.second.take_away(llama)
    assert f"node box-b ({machines.second.address}) cannot read {llama / 'config.json'} (No such file" in said
    assert "more files: copy the checkpoint there" in said


@pytest.mark.parametrize("change", ["longer", "other values"])
def test_a_stale_copy_of_a_shard_is_found(machines, llama, tmp_path, change):
    stale = tmp_path / "stale"
    shutil.copytree(llama, stale)
    shard = sorted(stale.glob("*.safetensors"))[1]
    told = shard.read_bytes()
    shard.write_bytes(told + b"\0" if change == "longer" else told[:-2] + b"\1\2")
    machines.second.put(stale, llama)
    try:
        said = refusal(machines, llama)
    finally:
        machines.second.take_away(llama)
    expected = {
        "longer": f"{llama / shard.name} has {len(told) + 1:,} bytes there, {len(told):,} here; copy it there again",
        "other values": f"{llama / shard.name} has the {len(told):,} bytes that it has here, with other content",
    }
    assert f"node box-b ({machines.second.address}) has another checkpoint: {expected[change]}" in said
