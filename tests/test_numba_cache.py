"""Compiled CPU kernels do not outlive their sources."""

import subprocess
import sys
from pathlib import Path

from bigint8_kernels.numba_cache import STAMP, drop_stale_kernels

CALLER = """
from pathlib import Path
from numba import njit
from bigint8_kernels.numba_cache import drop_stale_kernels
from .called import answer
drop_stale_kernels(Path(__file__).parent)

@njit(cache=True)
def ask():
    return answer()

print(ask(), sum(ask.stats.cache_hits.values()))
"""


def called(result: int) -> str:
    return f"from numba import njit\n\n@njit\ndef answer():\n    return {result}\n"


def test_a_kernel_is_compiled_anew_when_another_file_that_it_calls_changes(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "caller.py").write_text(CALLER)

    def run() -> list[str]:
        command = [sys.executable, "-c", "import kernels.caller"]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split()

    (package / "called.py").write_text(called(1))
    assert run() == ["1", "0"]
    assert run() == ["1", "1"]
    (package / "called.py").write_text(called(2))
    assert run() == ["2", "0"]


def test_what_cannot_be_written_to_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("")
    (tmp_path / "__pycache__").write_text("not a folder")
    drop_stale_kernels(tmp_path)
    assert (tmp_path / "__pycache__").read_text() == "not a folder"
    assert not (tmp_path / STAMP).exists()
