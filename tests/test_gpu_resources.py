"""The GPU kernels as machine code: every configuration that can be chosen, for every architecture."""

import re
from typing import Any

import pytest
from architectures import architectures_compiled
from bigint8_kernels.gpu_tiles import (
    ARCHITECTURES,
    FEW_ROW_TILES,
    MATMUL_TILES,
    architecture_of,
    matmul_tiles,
    split_of,
)

MULTIPLIERS = ("int8_matmul", "int8_gemv")


def named(found: dict[str, Any]) -> str:
    variant = found["variant"]
    return f"{variant['kernel']} {variant['dtype']} {variant['label']} on sm_{variant['capability']}"


def test_every_kernel_is_compiled_for_every_architecture(compiled):
    pairs = {(found["variant"]["kernel"], found["variant"]["capability"]) for found in compiled}
    kernels = {
        "quantize_rows", "mark_outliers", "mark_by_token", "quantize_activations", "int8_matmul", "gather_columns",
        "finish_matmul", "int8_gemv", "add_parts", "add_norm", "activate", "rotate_write", "attend_tokens",
        "attend_rows",
    }  # fmt: skip
    assert pairs == {(kernel, capability) for kernel in kernels for capability in architectures_compiled()}


def test_nothing_spills(compiled):
    assert [named(found) for found in compiled if found["local_bytes"]] == []


def test_shared_memory_is_what_the_architecture_has(compiled):
    for found in compiled:
        assert found["shared_bytes"] <= ARCHITECTURES[found["variant"]["capability"]].shared_bytes, named(found)
        assert found["blocks"] >= 1, named(found)


def test_the_matmul_multiplies_int8_on_tensor_cores(compiled):
    for found in compiled:
        if found["variant"]["kernel"] == "int8_matmul":
            assert any(re.search(r"s32\.s8\.s8", name) for name in found["products"]), named(found)
            assert any(re.match(r"I(G)?MMA", opcode) for opcode in found["loop"]), named(found)


def test_weights_are_loaded_128_bits_at_a_time(compiled):
    for found in compiled:
        if found["variant"]["kernel"] in MULTIPLIERS:
            loads = {name for name in found["loop"] if name.startswith(("LDG", "LDGSTS"))}
            assert any(name.endswith(".128") or ".128." in name for name in loads), named(found)
            assert not any(name.endswith((".U8", ".S8")) for name in loads), named(found)


def test_rows_are_loaded_and_stored_in_wide_pieces(compiled):
    for found in compiled:
        if found["variant"]["kernel"] == "quantize_rows":
            names = set(found["instructions"])
            assert any(name.startswith("LDG") and ".128" in name for name in names), named(found)
            assert not any(name.startswith("STG") and name.endswith(".U8") for name in names), named(found)


def test_keys_and_values_are_loaded_128_bits_at_a_time_and_multiplied_on_tensor_cores(compiled):
    for found in compiled:
        if found["variant"]["kernel"].startswith("attend"):
            names = set(found["instructions"])
            assert any(re.match(r"LDG(STS)?\b.*\.128", name) for name in names), named(found)
            assert not any(re.match(r"LDG.*\.U8", name) for name in names), named(found)
            assert bool(found["products"]) == (found["variant"]["dtype"] != "fp32"), named(found)


def test_parts_of_a_context_are_added_behind_a_fence_and_past_the_l1_cache(compiled):
    """Before a program counts itself as done, all it wrote is visible; what others wrote is not read from L1."""
    for found in compiled:
        if found["variant"]["kernel"] == "attend_tokens":
            names = set(found["instructions"])
            assert any(name.startswith("MEMBAR") and name.endswith("GPU") for name in names), named(found)
            assert any(name.startswith("ATOMG") and "GPU" in name for name in names), named(found)
            assert any(name.startswith("LDG") and "STRONG.GPU" in name for name in names), named(found)


def test_int8_becomes_float_without_conversion_instructions(compiled):
    for found in compiled:
        if found["variant"]["kernel"] == "int8_gemv":
            assert not any(name.startswith("I2F") for name in found["loop"]), named(found)


def test_one_row_is_multiplied_without_waiting_for_other_threads(compiled):
    for found in one_row(compiled):
        waits = [name for name in found["loop"] if name.startswith(("BAR", "WARPSYNC", "LDS", "STS", "DEPBAR"))]
        assert waits == [], named(found)


def test_one_row_takes_at_most_4_instructions_a_weight(compiled):
    """Least with float32 sums: a byte placed, an offset taken off and a multiplication, and a fraction of the rest."""
    for found in one_row(compiled):
        instructions = sum(found["loop"].values()) * 32 / found["variant"]["weights"]
        assert 3 < instructions <= 4, f"{named(found)}: {instructions:.2f}"


def one_row(compiled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [f for f in compiled if f["variant"]["kernel"] == "int8_gemv" and f["variant"]["label"].startswith("1 x")]
    assert {(f["variant"]["dtype"], f["variant"]["capability"]) for f in found} == {
        (dtype, capability) for dtype in ("fp16", "bf16", "fp32") for capability in architectures_compiled()
    }
    return found


def test_the_tiles_are_those_of_their_arithmetic():
    for name, tiles in MATMUL_TILES.items():
        limit = int(name.split()[0]) * 1024
        assert all(tile.shared_bytes <= limit for tile in tiles)
    for most, tile in FEW_ROW_TILES.items():
        assert tile.rows == most and tile.shared_bytes <= 99 * 1024


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), 80), ((8, 6), 86), ((8, 7), 86), ((8, 9), 89), ((10, 0), 90), ((12, 1), 120)]
)
def test_a_gpu_gets_the_tiles_of_the_newest_architecture_that_it_runs(capability, expected):
    assert architecture_of(*capability).capability == expected
    assert matmul_tiles(architecture_of(*capability), 2048)


def test_a_tile_that_would_need_masks_is_no_choice_but_the_first():
    ada = ARCHITECTURES[89]
    first, wide, short = matmul_tiles(ada, 2048, features=4096)
    assert matmul_tiles(ada, 2048, features=4096 + wide.depth) == (wide,)
    assert matmul_tiles(ada, 2048, features=4095) == (first,)
    assert short.depth == first.depth > wide.depth


def test_a_gpu_older_than_8_0_is_refused():
    with pytest.raises(ValueError, match=r"7\.5.*8\.0"):
        architecture_of(7, 5)


def test_k_is_split_only_as_far_as_the_gpu_needs_and_k_allows():
    assert split_of(1000, 4, 82, 24) == 1
    assert split_of(64, 4, 82, 24) == 4
    assert split_of(64, 2, 82, 24) == 8
    assert split_of(1, 4, 82, 100) == 8
    assert split_of(1, 4, 82, 3) == 1
