"""The examples, run as a user would run them, from another folder. ray_job.py needs a cluster: test_recipes.py."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(example: str, *arguments: str, cwd: Path) -> str:
    """What the example prints; it must end well."""
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generate_continues_the_prompt(tmp_path: Path) -> None:
    assert run("generate.py", cwd=tmp_path).startswith("The capital of France is Paris")


def test_generate_takes_the_model_as_its_argument(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "generate.py"), "no-such-preset/"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "no-such-preset/" in done.stderr


def test_two_workers_share_all_blocks_and_continue_the_prompt(tmp_path: Path) -> None:
    first, second, text = run("two_workers.py", "smollm2-135m", cwd=tmp_path).split("\n", 2)
    blocks = [int(n) for line in (first, second) for n in re.findall(r"\d+", line.partition("blocks")[2])]
    assert len(blocks) == 4, (first, second)
    assert (blocks[0], blocks[1] + 1, blocks[3]) == (0, blocks[2], 29)
    assert text.startswith("The capital of France is Paris")


def test_one_layer_halves_the_bytes_at_a_small_error(tmp_path: Path) -> None:
    sizes, error = run("one_layer.py", cwd=tmp_path).splitlines()
    before, after = (int(size.replace(",", "")) for size in re.findall(r"([\d,]+) bytes", sizes))
    assert before == 2 * (4096 * 1024 + 1024)
    assert after == 4096 * 1024 + 4 * 1024 + 2 * 1024  # weights, float32 scales, float16 bias
    assert 0 < float(error.removeprefix("relative error: ")) < 0.02
