"""The command line as a user meets it: what it prints, how it ends, and in real processes what it leaves behind."""

import fcntl
import importlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from importlib.metadata import entry_points
from pathlib import Path

import psutil
import pytest
from commands import assert_refused

import bigint8.__main__
import bigint8.launch
from bigint8.plan.devices import cuda_devices
from bigint8.sources.gguf import cache_folder
from bigint8.units import decimal

LAUNCH = [sys.executable, "-m", "bigint8.launch"]


def test_a_plan_needs_neither_weights_nor_torch():
    program = (
        "import sys\n"
        "from bigint8.launch import app\n"
        "try: app(['--model', 'opt-175b', '--gpus', '8', '--plan-only', '--gpu-type', 'rtx-3090'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'accelerate', 'ray'} & sys.modules.keys()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "head room" in result.stdout and "KV cache" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if "cuda:" in line]
    assert [row[2] for row in rows] == [f"{12 * i}-{12 * i + 11}" for i in range(8)]
    assert rows[1][3:] == ["20.26", "1.12", "0.27", "1.16", "22.81"]


@pytest.mark.skipif(bool(cuda_devices()), reason="this machine has a GPU")
def test_a_plan_without_gpus_says_what_it_was_made_for_and_finds_the_fewest(run):
    ended = run(bigint8.launch, "--model", "bloom-176b", "--plan-only")
    assert ended.code == 0
    assert "no GPU was found: planned for 8 x NVIDIA GeForce RTX 3090" in ended.out


def test_weights_that_are_nowhere_print_the_plan_then_where_was_looked(run, monkeypatch, tmp_path):
    monkeypatch.setenv("BIGINT8_CACHE", str(tmp_path))
    ended = run(bigint8.launch, "--model", "opt-175b", "--gpus", 8, "--gpu-type", "rtx-3090")
    assert ended.code == 2
    assert "84-95" in ended.out
    assert ended.error.startswith("error: no weights for opt-175b")
    assert str(tmp_path / "opt-175b") in ended.error and "--checkpoint" in ended.error
    assert "Traceback" not in ended.error


@pytest.mark.skipif(bool(cuda_devices()), reason="this machine has a GPU")
def test_asking_for_a_gpu_where_there_is_none_is_an_error(run):
    ended = run(bigint8.launch, "--model", "smollm2-135m", "--gpus", 2, "--device", "cuda")
    assert_refused(ended, "--device cuda: no CUDA GPU was found", "--device cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/model/at all"], "no folder, hub id or preset"),
        (["--model", "opt-125m", "--plan-only", "--context", "4096"], "--context 4096 is longer than the 2048 tokens"),
        (
            ["--model", "opt-125m", "--plan-only", "--gpus", "20", "--gpu-type", "rtx-3090"],
            "--gpus 20: opt-125m has 12",
        ),
        (["--model", "opt-66b", "--plan-only", "--gpus", "1", "--gpu-type", "rtx-3090"], "3 such devices"),
        (["--model", "opt-125m", "--plan-only", "--gpu-type", "voodoo-2"], "--gpu-type voodoo-2: no such GPU"),
        (["--model", "smollm2-135m", "--gpus", "31", "--device", "cpu"], "30 blocks"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line_with_the_flag_and_exits_with_2(run, arguments, message):
    assert_refused(run(bigint8.launch, *arguments), message)


def test_a_flag_that_is_not_there_is_told_with_a_usage_line(run):
    ended = run(bigint8.launch, "--model", "opt-125m", "--gpu", "2")
    assert ended.code == 2 and "--gpu" in ended.error and "Traceback" not in ended.error


@pytest.mark.usefixtures("on_running_workers")
def test_two_workers_write_text_and_a_report(run, tmp_path):
    report = tmp_path / "report.json"
    prompts = ["The capital of France is", "Water boils at", "One, two, three,"]
    ended = run(
        bigint8.launch,
        "--model", "smollm2-135m", "--gpus", 2, "--device", "cpu", "--max-new-tokens", 8, "--batch-size", 2,
        "--raw", "--json", report, *(word for prompt in prompts for word in ("--prompt", prompt)),
    )  # fmt: skip
    assert ended.code == 0, ended.error
    assert "Paris" in ended.out
    written = json.loads(report.read_text())
    for worker, load in enumerate(written["load"]):
        size = decimal(load["bytes_read"])
        line = rf"^worker {worker} \(.*: {size} of {size}$"
        assert re.search(line, ended.error, re.MULTILINE), "plain progress lines"
    assert "269 MB read at " in ended.out and "B/s" in ended.out
    assert [generation["prompt"] for generation in written["generations"]] == prompts
    assert "Paris" in written["generations"][0]["text"]
    assert len(written["plan"]["stages"]) == len(written["load"]) == 2
    for stage, load in zip(written["plan"]["stages"], written["load"], strict=True):
        assert sum(load["device_bytes"].values()) == stage["weight_bytes"]
        assert load["bytes_read"] > 0 and load["peak_host_bytes"] > load["bytes_read"]
    assert written["timings"]["load_seconds"] > 0


@pytest.mark.parametrize(
    "module", ["bigint8", "bigint8.launch", "bigint8.serve", "bigint8.check", "bigint8.quantize", "bigint8.doctor"]
)
def test_each_command_runs_as_a_module_and_helps_without_torch(module):
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['bigint8', '--help']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'ray' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout


@pytest.mark.parametrize("command", ["launch", "serve", "check", "quantize", "doctor"])
def test_the_console_script_has_every_command_with_its_flags(run, command):
    """And the script itself is this function."""
    (script,) = entry_points(group="console_scripts", name="bigint8")
    assert script.load() is bigint8.__main__.main
    module = importlib.import_module(f"bigint8.{command}")
    ours, theirs = run(bigint8.__main__, command, "--help"), run(module, "--help")
    flags = set(re.findall(r"--[a-z][a-z0-9-]+", theirs.out))
    assert ours.code == 0 and flags and flags <= set(re.findall(r"--[a-z][a-z0-9-]+", ours.out))


def take_terminal() -> None:
    """In the new process: Ctrl-C becomes a signal, even where a shell runs the tests in its background."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _name(process: psutil.Process) -> str:
    try:
        return " ".join([process.name(), *process.cmdline()[:1]])
    except psutil.Error:
        return ""


class Terminal:
    """A bigint8.launch in a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.main, side = pty.openpty()
        self.process = subprocess.Popen(
            [*LAUNCH, *arguments], stdin=side, stdout=side, stderr=side, start_new_session=True,
            preexec_fn=take_terminal,
        )  # fmt: skip
        os.close(side)
        self.seen = ""

    def read_until(self, text: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline and self.process.poll() is None, self.seen
            if select.select([self.main], [], [], 0.2)[0]:
                self.seen += os.read(self.main, 65536).decode(errors="replace")

    def type(self, text: str) -> None:
        self.seen = ""
        os.write(self.main, text.encode())

    def family(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def family_with(self, name: str, seconds: float = 120) -> list[psutil.Process]:
        """Its processes, once one of this name is among them."""
        deadline = time.monotonic() + seconds
        while True:
            family = self.family()
            if any(name in _name(process) for process in family):
                return family
            assert time.monotonic() < deadline and self.process.poll() is None, self.seen
            time.sleep(0.1)

    def interrupt(self) -> int:
        """Ctrl-C, and again after a while: a signal that comes just before input() begins to wait is seen late."""
        for _ in range(4):
            self.type("\x03")
            try:
                return self.end(15)
            except subprocess.TimeoutExpired:
                continue
        return self.end(15)

    def end(self, seconds: float = 60) -> int:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if select.select([self.main], [], [], 0.2)[0]:
                    self.seen += os.read(self.main, 65536).decode(errors="replace")
            except OSError:  # every process on the other side is gone
                break
        return self.process.wait(timeout=max(1, deadline - time.monotonic()))


def assert_all_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive


@pytest.fixture
def terminal():
    """Starts programs in terminals; what a failed test leaves is ended."""
    started: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal(*arguments))
        return started[-1]

    yield start
    for each in started:
        for process in each.family():
            process.kill()
        each.process.kill()
        each.process.wait()


def test_a_chat_answers_and_ctrl_c_ends_it_with_every_process(terminal):
    terminal = terminal("--model", "smollm2-135m", "--gpus", "2", "--device", "cpu", "--max-new-tokens", "12")
    terminal.read_until("> ")
    family = terminal.family()
    assert any("raylet" in process.name() for process in family)
    terminal.type("What is the capital of France?\n")
    terminal.read_until("Paris")
    terminal.read_until("\n> ")
    assert terminal.interrupt() in (128 + signal.SIGINT, -signal.SIGINT)  # the same to a shell
    assert "Traceback" not in terminal.seen
    assert_all_gone(family)


def test_a_kill_while_loading_ends_every_process(terminal):
    terminal = terminal("--model", "smollm2-135m", "--gpus", "2", "--device", "cpu", "--prompt", "x")
    terminal.read_until("head room")
    family = terminal.family_with("ray::Worker")
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.end() > 0, "it unwound and exited; no signal ended it"
    assert "Traceback" not in terminal.seen
    assert_all_gone(family)


def test_a_wheel_runs_from_another_folder_and_adds_no_other_names(tmp_path):
    """Its dependencies are those of this environment; bigint8 itself comes from the wheel."""
    import site

    root = Path(__file__).parent.parent
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(root)], check=True, timeout=180)
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=60)
    packages = next(environment.glob("lib/python*/site-packages"))
    (wheel,) = tmp_path.glob("bigint8-*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(packages), str(wheel)], check=True, timeout=60)
    # a path in a .pth file is only a path: the editable install in that folder does not come along
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    python = str(environment / "bin" / "python")
    program = (
        "import bigint8, bigint8_kernels, importlib.util as u; print(bigint8.__file__)\n"
        "print([n for n in ('kernels', 'launch', 'configs') if u.find_spec(n)])\n"
    )
    found = subprocess.run(
        [python, "-E", "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=True
    )
    assert found.stdout.splitlines() == [str(packages / "bigint8" / "__init__.py"), "[]"]
    command = [python, "-E", "-m", "bigint8.launch", "--model", "opt-13b", "--plan-only", "--gpu-type", "rtx-3060"]
    plan = subprocess.run(
        [*command, "--gpus", "2"], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False
    )
    assert plan.returncode == 0 and "cuda:1" in plan.stdout, plan.stderr


def test_the_cache_folder_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("BIGINT8_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("BIGINT8_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sys.platform != "linux" or cache_folder() == tmp_path / "bigint8"
