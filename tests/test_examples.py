"""The examples as a user would run them, from another folder; with workers on those that the tests share."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bigint8 import BigInt8Error

EXAMPLES = Path(__file__).parent.parent / "examples"

Example = Callable[..., str]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Example:
    """What an example prints; it must end well."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_generate_continues_the_prompt(example: Example) -> None:
    assert example("generate.py").startswith("The capital of France is Paris")


def test_generate_takes_the_model_as_its_argument(example: Example) -> None:
    with pytest.raises(BigInt8Error, match="no-such-preset/"):
        example("generate.py", "no-such-preset/")


@pytest.mark.usefixtures("on_running_workers")
def test_two_workers_share_all_blocks_and_continue_the_prompt(example: Example) -> None:
    first, second, text = example("two_workers.py", "smollm2-135m").split("\n", 2)
    blocks = [int(n) for line in (first, second) for n in re.findall(r"\d+", line.partition("blocks")[2])]
    assert len(blocks) == 4, (first, second)
    assert (blocks[0], blocks[1] + 1, blocks[3]) == (0, blocks[2], 29)
    assert text.startswith("The capital of France is Paris. The capital of Italy is Rome")


@pytest.mark.usefixtures("on_running_workers")
def test_ray_job_runs_on_the_workers_of_the_cluster_it_is_in(example: Example) -> None:
    assert "3 workers: The capital of France is Paris" in example("ray_job.py", "smollm2-135m", "3")


def test_many_requests_each_get_an_answer(example: Example) -> None:
    printed = example("many_requests.py")
    answers = re.findall(r"^> (.+)\n(.+)", printed, re.MULTILINE)
    assert len({question for question, _ in answers}) == 4 and all(answer.strip() for _, answer in answers)
    assert re.search(r"^\d+ tokens, [\d.]+ a second; stages busy", printed, re.MULTILINE)


def test_one_layer_halves_the_bytes_at_a_small_error(example: Example) -> None:
    sizes, error = example("one_layer.py").splitlines()
    before, after = (int(size.replace(",", "")) for size in re.findall(r"([\d,]+) bytes", sizes))
    assert before == 2 * (4096 * 1024 + 1024)
    assert after == 4096 * 1024 + 4 * 1024 + 2 * 1024  # weights, float32 scales, float16 bias
    assert 0 < float(error.removeprefix("relative error: ")) < 0.02
