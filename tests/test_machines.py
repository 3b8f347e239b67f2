"""Two machines that run one model: the tokens are those of one process, and what differs is told before loading."""

import json
import shutil
import subprocess
import sys
import time
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


HUB = "someone/tiny"
HUB_PORT = 8000


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoMachines]:
    """A Ray cluster of two nodes, each on a machine of its own, with caches of the hub of its own."""
    cache, late = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("late")
    (cache / "hub").mkdir()
    with two_machines(cache) as made:
        for machine in made:
            machine.empty(cache / "hub")
            machine.environment |= {
                "HF_ENDPOINT": f"http://{made.first.address}:{HUB_PORT}",
                "HF_HOME": str(made.temporary / "hf"),
                "HF_HUB_DISABLE_XET": "1",
            }
        made.second.environment["PYTHONPATH"] = f"{late}:{made.second.environment.get('PYTHONPATH', '')}"
        made.start_ray()
        yield made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", False, tmp_path_factory.mktemp("llama") / "llama")
    save_tokenizer(folder)
    return folder


def launch(machine: Machine, model: object, *words: object) -> "subprocess.CompletedProcess[str]":
    common = ["--context", 64, "--max-new-tokens", 12, "--raw", "--prompt", PROMPT]
    return machine.python("-m", "bigint8.launch", "--model", model, *common, *words)


def refusal(machines: TwoMachines, folder: Path) -> str:
    """What a launch over both machines says that is refused, before it loads."""
    done = launch(machines.first, folder, "--address", machines.address)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "reading" not in done.stdout
    return done.stderr


@pytest.fixture(scope="module")
def one_process(machines: TwoMachines, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one process writes."""
    file = tmp_path_factory.mktemp("alone") / "one.json"
    done = launch(machines.first, llama, "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(json.loads(file.read_text())["generations"][0]["text"])


def test_a_launch_over_two_machines_has_the_tokens_of_one_process(machines, llama, tmp_path, one_process):
    file = tmp_path / "two.json"
    done = launch(machines.first, llama, "--address", machines.address, "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(file.read_text())
    boxes = [stage["device"]["box"]["name"] for stage in written["plan"]["stages"]]
    assert sorted(boxes) == ["box-a", "box-b"]
    assert written["generations"][0]["text"] == one_process != ""


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


def test_a_checkpoint_that_lacks_a_shard_there_or_has_stale_ones_is_told(machines, llama, tmp_path):
    stale = tmp_path / "stale"
    shutil.copytree(llama, stale)
    lost, longer, other = sorted(stale.glob("*.safetensors"))[:3]
    nbytes = longer.stat().st_size
    lost.unlink()
    longer.write_bytes(longer.read_bytes() + b"\0")
    other.write_bytes(other.read_bytes()[:-2] + b"\1\2")
    machines.second.put(stale, llama)
    try:
        said = refusal(machines, llama)
    finally:
        machines.second.take_away(llama)
    node = f"node box-b ({machines.second.address})"
    assert f"{node} cannot read {llama / lost.name} (No such file or directory): copy the checkpoint there" in said
    first = f"{llama / longer.name} has {nbytes + 1:,} bytes there, {nbytes:,} here"
    assert f"{node} has another checkpoint: {first} and 1 more file; copy it there again" in said
    assert "box-a" not in said


def test_of_a_hubs_model_each_machine_fetches_the_shards_of_its_stage(machines, llama, tmp_path, one_process):
    hub = machines.first.start(sys.executable, ROOT / "tests" / "hub.py", HUB, llama, machines.first.address, HUB_PORT)
    file = tmp_path / "hub.json"
    done = launch(machines.first, HUB, "--address", machines.address, "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr + str(hub.poll())
    assert json.loads(file.read_text())["generations"][0]["text"] == one_process
    find = ("find", machines.temporary / "hf", "-name", "*.safetensors")
    there = [{Path(line).name for line in machine.run(*find).stdout.splitlines()} for machine in machines]
    shards = {shard.name for shard in llama.glob("*.safetensors")}
    assert there[0] | there[1] == shards and there[0] < shards and there[1] < shards


# --- links -------------------------------------------------------------------------------------------------------

DRIVER = """
import json, sys
from bigint8 import Cluster, Int8Config, Workload, open_pipeline
folder, address, prompt = sys.argv[1:]
chosen, work = Int8Config(dtype="float32"), Workload(context=64)
with open_pipeline(folder, 2, config=chosen, workload=work, cluster=Cluster("cpu", address), progress=False) as pipe:
    for _ in sys.stdin:
        (answer,) = pipe.generate([prompt], max_new_tokens=40)
        print(json.dumps(answer.text), flush=True)
print("ended", flush=True)
"""
"""Loads a model over a cluster, and answers the same prompt for each line that it is sent."""


def ask(driver: "subprocess.Popen[str]") -> str:
    assert driver.stdin is not None and driver.stdout is not None
    driver.stdin.write("\n")
    driver.stdin.flush()
    line = driver.stdout.readline()
    assert line, driver.communicate()
    return str(json.loads(line))


@pytest.fixture(scope="module")
def driver(machines: TwoMachines, llama: Path) -> "subprocess.Popen[str]":
    """Runs on the first machine, with a stage on each, until the machines are switched off."""
    return machines.first.start(sys.executable, "-c", DRIVER, llama, machines.address, PROMPT)


def doors(machine: Machine) -> list[str]:
    """The addresses at which our workers there listen. Ray's own ports are at every address (*)."""
    lines = machine.run("ss", "-Hltnp").stdout.splitlines()
    return [words[3] for words in map(str.split, lines) if "ray::Worker" in words[-1] and words[3][0] != "*"]


def test_data_connections_are_at_the_address_of_their_node_only(machines, driver):
    ask(driver)
    for machine in machines:
        (door,) = doors(machine)
        assert door.startswith(f"{machine.address}:")


def end(driver: "subprocess.Popen[str]") -> str:
    """Let a driver end; what it prints last."""
    assert driver.stdin is not None and driver.stdout is not None and driver.stderr is not None
    driver.stdin.close()
    assert driver.wait(300) == 0, driver.stderr.read()
    return driver.stdout.read()


def test_a_network_that_is_cut_while_requests_run_changes_no_token_and_leaves_nothing_behind(machines, driver):
    """The last of this module: the second machine's Ray ends when it finds that the cluster gave it up."""
    answers = [ask(driver) for _ in range(3)]
    machines.cut()
    answers += [ask(driver) for _ in range(3)]
    assert len(set(answers)) == 1 and len(doors(machines.first)) == 2
    machines.mend()
    assert end(driver) == "ended\n"
    until = time.monotonic() + 120
    while there := doors(machines.first) + doors(machines.second):
        assert time.monotonic() < until, there
        time.sleep(0.5)
