"""What a call of the GPU layer compiles and launches, seen by a stand-in for CUDA's driver (`launches.py`)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

QUANTIZE = ["mark_outliers_kernel", "quantize_activations_kernel"]
PROGRAM = Path(__file__).with_name("launches.py")


def run(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """In a process of its own: in this one, kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    done = subprocess.run([sys.executable, PROGRAM, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls: list[dict[str, Any]] = json.loads(done.stdout)
    return calls


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def everything(cache: Path) -> list[dict[str, Any]]:
    return run(cache)


@pytest.fixture(scope="module")
def calls(everything: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [call for call in everything if "activations" in call]


def named(call: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in call.items() if name not in ("compiled", "launched"))


def test_every_launch_that_can_be_chosen_has_its_kernel(calls):
    """Widths of 1 and odd ones, rows that lie apart, every bucket of rows and dtype: all compile and fit a GPU 8.6."""
    assert all(call["launched"] for call in calls)
    launched = {name for call in calls for name in call["launched"]}
    assert launched == {
        *QUANTIZE, "gather_columns_kernel", "int8_matmul_kernel", "finish_matmul_kernel", "int8_gemv_kernel",
        "add_parts_kernel",
    }  # fmt: skip


def test_quantizing_a_weight_is_one_launch(everything):
    quantizations = [given for given in everything if "activations" not in given]
    assert len(quantizations) == 10
    assert all(given["launched"] == ["quantize_rows_kernel"] for given in quantizations)


def test_few_rows_of_16_bits_take_one_launch_and_a_second_where_k_is_split(calls):
    for call in calls:
        if call["rows"] <= 16 and call["activations"] == "auto":
            split = call["outputs"] < 1000 and call["features"] > 1000
            assert call["launched"] == ["int8_gemv_kernel"] + ["add_parts_kernel"] * split, named(call)


def test_a_prompt_takes_three_launches_and_two_more_to_gather_columns_and_to_finish_what_is_split(calls):
    for call in calls:
        if call["rows"] > 16 and call["activations"] == "auto":
            assert call["launched"][:2] == QUANTIZE, named(call)
            rest = [name for name in call["launched"][2:] if name != "gather_columns_kernel"]
            assert rest in (["int8_matmul_kernel"], ["int8_matmul_kernel", "finish_matmul_kernel"]), named(call)
            assert len(call["launched"]) <= 5, named(call)


def test_rows_bias_address_and_distance_of_rows_compile_nothing_new(calls):
    """One kernel serves them all, where the distance is no multiple of 16 too: X, which is small, is copied then."""
    plain = [call for call in calls if call["features"] == 4096 and call["activations"] == "auto"]
    plain = [call for call in plain if not call["weight_address"] and not call["bias_dtype"]]
    first: set[tuple[Any, ...]] = set()
    for call in plain:
        tile = "one" if call["rows"] == 1 else next(most for most in (16, 64, 10**6) if call["rows"] <= most)
        kernels = call["dtype"], tile, "split" if "add_parts_kernel" in call["launched"] else ""
        kernels += ("gathered",) if "gather_columns_kernel" in call["launched"] else ()
        kernels += ("finished",) if "finish_matmul_kernel" in call["launched"] else ()
        if kernels in first:
            assert call["compiled"] == [], named(call)
        first.add(kernels)
    assert sum(call["has_bias"] or call["apart"] > 0 or call["address"] > 0 for call in plain) == 16


def test_after_a_device_was_prepared_no_token_and_no_prompt_compiles_anything(cache, calls):
    for call in run(cache, "prepared"):
        assert call["compiled"] == [], named(call)
        assert call["launched"]
