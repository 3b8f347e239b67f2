"""Fixtures that several modules use, and the compilation that runs beside the tests.

With `-n 2` (make test) two processes share the tests: a module's tests stay together, and so do all that use the Ray
workers, which start once.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigint8.plan.devices import wait_without_spinning

if "torch" not in sys.modules:  # tests, workers and a compilation share the CPUs
    wait_without_spinning()

import torch

if not torch.cuda.is_available():  # before triton is imported: it asks once
    os.environ.setdefault("TRITON_INTERPRET", "1")

from architectures import architectures_compiled
from commands import Command, Ended
from folders import save_tokenizer
from tiny import save_tiny

from bigint8.options import Cluster
from bigint8.plan.devices import usable_cpus
from bigint8.run.pipeline import Pipeline
from bigint8.sources.find import find_source
from bigint8.terminal.flags import run_command

# --- one process or several --------------------------------------------------------------------------------------

SHARED = os.environ.get("PYTEST_XDIST_WORKER")
"""The name of this process where several share the tests, of which each has a CPU for itself."""

USES_WORKERS = (
    "test_pipeline.py", "test_workers.py", "test_faults.py", "test_nodes.py", "test_examples.py", "test_launch.py",
    "test_offload.py",
)  # fmt: skip
"""Modules whose tests share one set of Ray workers."""

COMPILED_MODULE = "test_gpu_resources.py"
ORDER = (
    "test_pipeline.py", "test_workers.py", "test_faults.py", "test_lost_nodes.py", "test_launch.py", "test_examples.py",
    "test_service_faults.py", "test_machines.py", "test_ray_serve.py", "test_jobs.py", "test_gpu_step.py",
    "test_graph_stages.py", "test_numba_cache.py", "test_graphs.py", "test_plans.py", "test_presets_fit.py",
    "test_kernels.py", "test_recipes.py", "test_sources.py", "test_planned_peak.py",
)  # fmt: skip
"""Modules that take long come first, so that no process is left alone with them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long modules first; last the one that reads compiled kernels: compiling takes minutes."""

    def place(item: pytest.Item) -> int:
        name = item.path.name
        return len(ORDER) + 1 if name == COMPILED_MODULE else ORDER.index(name) if name in ORDER else len(ORDER)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which tests run in one process, and in which order their groups are given out: as they were collected."""
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = Path(nodeid.partition("::")[0]).name
            return "workers" if module in USES_WORKERS else module

    config.option.loadscopereorder = False
    return ByModule(config, log)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> None:
    """Each process computes on its own CPU; waiting for each other's threads would cost more than they give.

    What is compared with Ray workers runs on as many threads as these do: other threads add in another order.
    """
    if SHARED is not None:
        torch.set_num_threads(usable_cpus() if request.path.name in USES_WORKERS else 1)


# --- kernels that compile beside the tests -----------------------------------------------------------------------


MOST_SECONDS = 1200


class Compilation:
    """`python -m bigint8_kernels.resources`, in a process of its own: in this one, kernels are interpreted.

    Where several processes share the tests, their parent runs it, and they know of it by the folder.
    """

    def __init__(self, folder: Path, collect_only: bool) -> None:
        self._collect_only = collect_only
        self._report, self._log, self._ended = folder / "resources.json", folder / "log.txt", folder / "exit-code.txt"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._process is not None or self._collect_only:
            return
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(self._report.parent)
        command = [sys.executable, "-m", "bigint8_kernels.resources", "--json", str(self._report)]
        command += [word for number in architectures_compiled() for word in ("--architecture", str(number))]
        with self._log.open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self._process = process

        def note_its_end() -> None:
            code = process.wait()
            if self._report.parent.is_dir():
                self._ended.write_text(str(code))

        threading.Thread(target=note_its_end, daemon=True).start()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def result(self) -> list[dict[str, Any]]:
        """What it reports of every kernel, once it is through."""
        deadline = time.monotonic() + MOST_SECONDS
        while not self._ended.is_file() or not (code := self._ended.read_text()):
            assert time.monotonic() < deadline, "the process that compiles has ended without a word, or never will"
            time.sleep(0.2)
        assert code == "0", self._log.read_text()
        found: list[dict[str, Any]] = json.loads(self._report.read_text())
        return found


COMPILATION = pytest.StashKey[Compilation]()
FOLDER = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """A folder for compiled kernels, which the process that starts the others tells them."""
    there: str | None = getattr(config, "workerinput", {}).get("compilation")
    if there is None:
        config.stash[FOLDER] = tempfile.TemporaryDirectory(prefix="bigint8-triton-")
        there = config.stash[FOLDER].name
    config.stash[COMPILATION] = Compilation(Path(there), config.option.collectonly)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["compilation"] = node.config.stash[FOLDER].name


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to compile if a test reads compiled kernels; where processes share the tests, that is for their parent."""
    if SHARED is None and any(item.path.name == COMPILED_MODULE for item in session.items):
        session.config.stash[COMPILATION].start()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    if any(COMPILED_MODULE in nodeid for nodeid in ids):
        node.config.stash[COMPILATION].start()


def pytest_unconfigure(config: pytest.Config) -> None:
    if COMPILATION in config.stash:
        config.stash[COMPILATION].stop()
    if FOLDER in config.stash:
        config.stash[FOLDER].cleanup()


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What `python -m bigint8_kernels.resources` reports of every kernel."""
    return request.config.stash[COMPILATION].result()


# --- checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit checkpoint of several shards, with a tokenizer; not to be written to."""
    folder = save_tiny("llama", False, tmp_path_factory.mktemp("source") / "source")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M: a small model with real weights."""
    folder = find_source("smollm2-135m").folder
    assert folder is not None
    return folder


# --- command lines and workers -----------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """The command line, in this process."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("COLUMNS", "200")

    def command(module: Any, *arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_command(module.app)
        out, error = capsys.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, out, error)

    yield command
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def pipeline() -> Iterator[Pipeline]:
    """Three CPU workers on a Ray cluster of their own."""
    with Pipeline(3, Cluster("cpu")) as three:
        yield three


class _Lent:
    """Workers that run on when whoever borrows them is through."""

    def __init__(self, workers: Pipeline) -> None:
        self._lent = workers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lent, name)

    def close(self) -> None:
        """They are not ours to end."""


@pytest.fixture
def on_running_workers(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would start workers of its own gets those of `pipeline`."""

    def lend(count: int | None, *_: object) -> _Lent:
        assert count is not None and count <= len(pipeline.infos)
        return _Lent(pipeline)

    monkeypatch.setattr("bigint8.run.pipeline.Pipeline", lend)
