"""Fixtures that several modules use, and the compilation that runs beside the tests."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from bigint8.plan.devices import wait_without_spinning

if "torch" not in sys.modules:  # tests, workers and a compilation share the CPUs
    wait_without_spinning()

import torch

if not torch.cuda.is_available():  # before triton is imported: it asks once
    os.environ.setdefault("TRITON_INTERPRET", "1")

from folders import save_tokenizer
from tiny import save_tiny

COMPILED_MODULE = "test_gpu_resources.py"
_compilation: dict[str, object] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that read compiled kernels come last: compiling takes minutes, and other tests leave a CPU idle."""
    items.sort(key=lambda item: item.path.name == COMPILED_MODULE)


def pytest_runtestloop(session: pytest.Session) -> None:
    """Begin to compile, in a process of its own: in this one, kernels are interpreted."""
    if session.config.option.collectonly or all(item.path.name != COMPILED_MODULE for item in session.items):
        return
    folder = tempfile.TemporaryDirectory(prefix="bigint8-triton-")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = folder.name
    command = [sys.executable, "-m", "bigint8_kernels.resources", "--json", f"{folder.name}/resources.json"]
    with Path(f"{folder.name}/log.txt").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    _compilation.update(folder=folder, process=process)


def pytest_sessionfinish() -> None:
    process, folder = _compilation.get("process"), _compilation.get("folder")
    if isinstance(process, subprocess.Popen) and isinstance(folder, tempfile.TemporaryDirectory):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        folder.cleanup()


@pytest.fixture(scope="session")
def compiled() -> list[dict[str, Any]]:
    """What `python -m bigint8_kernels.resources` reports of every kernel."""
    process, folder = _compilation["process"], _compilation["folder"]
    assert isinstance(process, subprocess.Popen) and isinstance(folder, tempfile.TemporaryDirectory)
    assert process.wait() == 0, Path(f"{folder.name}/log.txt").read_text()
    found: list[dict[str, Any]] = json.loads(Path(f"{folder.name}/resources.json").read_text())
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit checkpoint of several shards, with a tokenizer; not to be written to."""
    folder = save_tiny("llama", False, tmp_path_factory.mktemp("source") / "source")
    save_tokenizer(folder)
    return folder
