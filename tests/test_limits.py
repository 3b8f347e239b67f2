"""A process that the system lets take no more memory than was planned, and a little, loads and fills its context."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        limits = importlib.import_module("limits")
        try:
            limits.Group("test", 2**30).end()
        except OSError as error:
            pytest.skip(f"control groups cannot be made here: {error}")
        yield limits


@pytest.fixture(scope="module")
def folder(benchmark, tmp_path_factory):
    benchmark.save("llama", where := tmp_path_factory.mktemp("limits"))
    return where


def run(benchmark, folder, stages, spare):
    options = ["--stages", str(stages), "--sequences", "2", "--context", "600", "--spare", str(spare)]
    return benchmark.run_child(benchmark.__file__, [*options, "--child", str(folder)])


def test_workers_held_to_their_plans_fill_the_context_in_every_slot(benchmark, folder):
    assert run(benchmark, folder, 2, 0.08)["tokens"] == 1200


def test_a_process_that_needs_more_than_its_limit_is_killed(benchmark, folder):
    with pytest.raises(RuntimeError):
        run(benchmark, folder, 1, -0.3)
    benchmark.sweep()
    assert not list(Path("/sys/fs/cgroup").glob("**/bigint8-*"))
