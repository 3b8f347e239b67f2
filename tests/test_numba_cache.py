"""Compiled CPU kernels are made once, ahead of use, and do not outlive their sources."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bigint8_kernels import compile_cpu_kernels
from bigint8_kernels.numba_cache import STAMP, compile_in_turns, drop_stale_kernels

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

COMPILING = """
import sys
import torch
from numba.core import event
from bigint8_kernels import compile_cpu_kernels, copy_values, cpu_threads, float_linear, int8_linear, quantize_rows

compiled = []

class Listener(event.Listener):
    def on_start(self, event):
        if "nopython_type_inference" in event.data["name"]:
            compiled.append(event.data["qualname"])

    def on_end(self, event):
        pass

event.register("numba:run_pass", Listener())
"""

USING = (
    COMPILING
    + """
def load_and_multiply(dtype):
    source = torch.randn(6, 600).to(dtype)
    weight, scale = torch.empty(6, 600, dtype=torch.int8), torch.empty(6)
    quantize_rows(source, weight, scale)
    quantize_rows(source.T.contiguous().T, weight, scale)
    for target in (torch.float16, torch.bfloat16, torch.float32):
        copy_values(source, torch.empty(6, 600, dtype=target))
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, 600).to(dtype)
        x[0, 3] = 20.0
        for bias in (None, torch.ones(6)):
            for activations in ("16bit", "int8"):
                int8_linear(x, weight, scale, bias, 6.0, activations)
        if dtype != torch.float32:
            float_linear(x, source)

def run_a_step(dtype):
    from bigint8_kernels.cpu_step import CpuStep
    from bigint8_kernels.step import Attention, Batch, Linear, Norm, pool_shape

    attention = Attention(2, 1, 16, (0, 16), (32, 16), (48, 16), 0.25)
    weight, scale = torch.ones(64, 64, dtype=torch.int8), torch.ones(64)
    for threads in (1, 2):
        step = CpuStep(2, threads)
        x = step.rows("x", 64)
        y = step.linear(step.add_norm(x, None, Norm(None, None, 1e-5, False)), [Linear(weight, scale)], "y")
        y = step.attend(y, attention, torch.zeros(pool_shape(1, attention), dtype=dtype))
        y = step.linear(step.activate(y, "silu", False), [Linear(torch.ones(8, 32, dtype=dtype))], "z")
        places, sequences = torch.arange(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        step.run(Batch(places, sequences, (torch.zeros(1, 1, dtype=torch.int32),), few=1))

for dtype in (torch.float16, torch.bfloat16, torch.float32):
    compiled.clear()
    compile_cpu_kernels([dtype])
    print(dtype, "ahead", len(compiled))
    compiled.clear()
    for cpu_threads.PARALLEL_VALUES in (2**62, 0):
        load_and_multiply(dtype)
    run_a_step(dtype)
    print(dtype, "later", *compiled)
"""
)

TOGETHER = (
    COMPILING
    + """
compile_cpu_kernels([torch.bfloat16])
print(*compiled, sep="\\n")
"""
)


def started(code: str, cache: Path) -> "subprocess.Popen[str]":
    """A Python process that runs the code and keeps its compiled kernels in a folder."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def output_of(process: "subprocess.Popen[str]") -> list[str]:
    output, _ = process.communicate()
    assert process.returncode == 0
    return output.splitlines()


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


def test_what_is_compiled_ahead_leaves_nothing_to_compile_when_weights_load_and_multiply(tmp_path: Path) -> None:
    lines = output_of(started(USING, tmp_path))
    ahead, later = lines[0::2], lines[1::2]
    assert len(ahead) == 3 and all(int(line.split()[-1]) > 3 for line in ahead)
    assert [line.split()[1:] for line in later] == [["later"]] * 3


def test_two_processes_that_start_together_compile_each_kernel_once(tmp_path: Path) -> None:
    processes = [started(TOGETHER, tmp_path) for _ in range(2)]
    compiled = [set(output_of(process)) for process in processes]
    kept = {file.name.split("-")[0].split(".")[-1] for file in tmp_path.glob("*/*.nbi")}  # module.kernel-line.python
    assert len(kept) > 8
    assert kept <= compiled[0] | compiled[1]
    assert not kept & compiled[0] & compiled[1]
    assert output_of(started(TOGETHER, tmp_path)) == [""]


def test_a_process_does_what_is_free_first_and_then_waits_for_what_another_compiles(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    code = f"""
import time
from pathlib import Path
from bigint8_kernels.numba_cache import compile_in_turns
folder = Path({str(tmp_path)!r})
def slow():
    (folder / "begun").touch()
    time.sleep(1)
    (folder / "done").touch()
compile_in_turns({{"slow": slow}}, folder)
"""
    other = started(code, tmp_path)
    while not (tmp_path / "begun").exists():
        assert other.poll() is None
        time.sleep(0.01)
    seen = []

    def see(name: str) -> Callable[[], None]:
        return lambda: seen.append((name, (tmp_path / "done").exists()))

    compile_in_turns({"slow": see("slow"), "free": see("free")}, tmp_path)
    assert [name for name, _ in seen] == ["free", "slow"]
    assert seen[1] == ("slow", True)
    output_of(other)


def test_kernels_compile_where_no_lock_can_be_written(tmp_path: Path) -> None:
    done = []
    compile_in_turns({"one": lambda: done.append(1), "two": lambda: done.append(2)}, tmp_path / "missing")
    assert done == [1, 2]


def test_weights_of_another_dtype_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="float64"):
        compile_cpu_kernels([torch.float16, torch.float64])
