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


STEP_PROGRAM = Path(__file__).with_name("step_launches.py")


def run(folder: Path, *arguments: str, program: Path = PROGRAM) -> list[dict[str, Any]]:
    """In a process of its own: in this one, kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    done = subprocess.run([sys.executable, program, *arguments], env=environment, capture_output=True, text=True)
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
    return ", ".join(f"{name} {value}" for name, value in call.items() if name not in ("compiled", "launched", "torch"))


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


# --- steps of blocks ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(cache: Path) -> list[dict[str, Any]]:
    return run(cache, program=STEP_PROGRAM)


def test_a_block_of_llama_takes_8_launches_for_generated_tokens(steps):
    """Whether the weights of queries, keys and values lie side by side or not. torch launches nothing besides, but the
    very first time, when it makes the counters of contexts in parts."""
    linear = ["int8_gemv_kernel"]
    attention = ["add_norm_kernel", *linear, "attend_tokens_kernel", *linear]
    feed_forward = ["add_norm_kernel", *linear, "activate_kernel", *linear]
    tokens = [step for step in steps if step["step"].endswith(("token", "tokens"))]
    assert len(tokens) == 16
    for step in tokens:
        assert step["launched"] == attention + feed_forward, named(step)
        assert step["torch"] == (["zeros.default"] if step is tokens[0] else []), named(step)


def test_a_prompt_writes_its_keys_in_one_launch_and_attends_in_another(steps):
    for step in steps:
        if step["step"] == "a prompt":
            attention = [name for name in step["launched"] if name.startswith(("attend", "rotate"))]
            assert attention == ["rotate_write_kernel", "attend_rows_kernel"], named(step)


def test_tokens_beside_a_prompt_attend_and_multiply_as_tokens_do(steps):
    for step in steps:
        if step["step"] == "two tokens and a prompt":
            attention = [name for name in step["launched"] if name.startswith(("attend", "rotate"))]
            assert attention == ["rotate_write_kernel", "attend_tokens_kernel", "attend_rows_kernel"], named(step)
            assert step["launched"].count("int8_gemv_kernel") == 4


def test_layers_of_one_x_quantize_it_once_by_token(steps):
    for step in steps:
        if "prompt" in step["step"]:
            quantizing = [name for name in step["launched"] if name.startswith(("mark", "quantize"))]
            assert quantizing == ["mark_by_token_kernel", "quantize_activations_kernel"] * 4, named(step)


def test_a_later_block_and_other_contexts_compile_nothing_and_cut_no_rows_into_tiles(steps):
    for step in steps:
        if step["block"] == "second" or "other" in step["step"]:
            assert step["compiled"] == [], named(step)
        if step["block"] == "second":
            assert {name.partition(".")[0] for name in step["torch"]} <= {"zeros"}, named(step)
