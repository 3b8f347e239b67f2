"""Jobs of Slurm and services of systemd as launch/ has them, run by the real tools where these are installed."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from serving import NAME, WAIT, save_model, until
from slurm import NODES, Ended, Slurm, slurm

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / NAME, ends=False)


@pytest.mark.parametrize("script", ["submit.sh", "slurm.sh"])
def test_scripts_are_shell(script: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity=warning", LAUNCH / script], check=True)


# --- Slurm -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


ENVIRONMENT = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": ":".join(path for path in sys.path if path)}


def submit(queue: Slurm, where: Path, *arguments: object) -> int:
    return queue.submit(where, ENVIRONMENT, LAUNCH / "slurm.sh", *arguments)


def end_of(queue: Slurm, job: int) -> Ended:
    until(lambda: queue.ended(job) is not None, 300)
    ended = queue.ended(job)
    assert ended is not None
    return ended


def assert_nothing_is_left(job: int, where: Path) -> None:
    files = f"/tmp/bigint8-ray-{job}"
    until(lambda: not [process for process in psutil.process_iter() if files in " ".join(_words(process))])
    assert not Path(files).exists()
    assert not list(where.glob(".bigint8-*")), "the token is gone"


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_slurm_job_runs_over_its_nodes_and_leaves_a_log_a_result_and_nothing_else(
    queue: Slurm, folder: Path, tmp_path: Path
) -> None:
    words = ["--gpus", NODES, "--device", "cpu", "--raw", "--prompt", "w5 w17", "--max-new-tokens", 8]
    job = submit(queue, tmp_path, "--model", folder, *words, "--json", "out.json")
    ended = end_of(queue, job)
    assert ended.code == 0, ended.log
    written = yaml.safe_load((tmp_path / "out.json").read_text())
    assert len(written["generations"][0]["text"].split()) == 8
    boxes = {stage["device"]["box"]["name"] for stage in written["plan"]["stages"]}
    assert len(boxes) == NODES, "a stage on each node"
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", ended.log), "a log is lines of text"
    assert re.search(r"^worker [01] \(.*: (\S+ kB) of \1$", ended.log, re.MULTILINE)
    assert_nothing_is_left(job, tmp_path)


def test_a_slurm_job_that_is_cancelled_ends_what_it_started(queue: Slurm, folder: Path, tmp_path: Path) -> None:
    words = ["--gpus", NODES, "--device", "cpu", "--prompt", "w5", "--max-new-tokens", 2000]
    job = submit(queue, tmp_path, "--model", folder, *words)
    until(lambda: f"{NODES} nodes are there" in queue.log(job) or queue.ended(job) is not None, 300)
    assert queue.ended(job) is None, queue.log(job)
    (token,) = tmp_path.glob(".bigint8-*/token")
    assert token.parent.stat().st_mode & 0o077 == 0, "nobody else may read the token"
    queue.cancel(job)
    end_of(queue, job)
    until(lambda: not list(tmp_path.glob(".bigint8-*")))
    assert_nothing_is_left(job, tmp_path)


def test_a_slurm_script_outside_of_slurm_says_how_to_use_it() -> None:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run([LAUNCH / "slurm.sh"], env=bare, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "usage: sbatch" in done.stderr


# --- systemd -----------------------------------------------------------------------------------------------------


@pytest.fixture
def unit() -> ConfigParser:
    """The unit; of a key that stands there several times, the last."""
    parser = ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(LAUNCH / "bigint8.service")
    return parser


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed here")
def test_systemd_accepts_the_unit_and_calls_what_it_may_do_ok(tmp_path: Path) -> None:
    here = (LAUNCH / "bigint8.service").read_text().replace("/opt/bigint8/bin", str(BIN))
    file = tmp_path / "bigint8.service"
    file.write_text(here.replace("User=bigint8", "User=root"))  # it must exist
    checked = subprocess.run(
        ["systemd-analyze", "verify", file], capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode == 0 and str(file) not in checked.stderr, checked.stderr
    file.write_text(here)
    rated = ["systemd-analyze", "security", "--offline=yes", "--threshold=45", file]
    done = subprocess.run(rated, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout[-200:]


def test_a_unit_stops_its_command_first_and_longer_than_requests_are_let_go_on(unit: ConfigParser) -> None:
    service = unit["Service"]
    words = service["ExecStart"].split()
    assert service["KillMode"] == "mixed" and service["KillSignal"] == "SIGTERM"
    assert int(service["TimeoutStopSec"]) > 30 + int(words[words.index("--drain-seconds") + 1])
    assert "BIGINT8_API_KEY" not in service["Environment"], "keys stand in the file that only root reads"


def test_the_command_of_the_unit_serves_and_ends_well(unit: ConfigParser, folder: Path, tmp_path: Path) -> None:
    """As systemd starts it: `$NAME` that is a word by itself becomes several words."""
    variables = {"BIGINT8_MODEL": str(folder), "BIGINT8_FLAGS": f"--device cpu --name {NAME} --port 0"}
    words = [
        part
        for word in unit["Service"]["ExecStart"].replace("/opt/bigint8/bin", str(BIN)).split()
        for part in (variables[word[1:]].split() if word.startswith("$") else [word])
    ]
    log = tmp_path / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "bigint8", *words[1:]], stdout=out, stderr=out)
    try:
        until(lambda: "serving tiny on " in log.read_text() or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()
        url = re.findall(r"serving tiny on (\S+)", log.read_text())[0]
        assert httpx.get(f"{url}/health", timeout=WAIT).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(float(unit["Service"]["TimeoutStopSec"])) == 0
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
