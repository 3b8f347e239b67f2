"""Every kernel with every choice that is compiled into it: what `resources` compiles and reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

from . import (
    triton_activation,
    triton_activations,
    triton_attention,
    triton_gemv,
    triton_heads,
    triton_matmul,
    triton_norm,
    triton_weights,
)
from .gpu_tiles import (
    ARCHITECTURES,
    FEW_ROW_GEMV_TILES,
    FEW_ROW_TILES,
    FLOAT32_GEMV_TILE,
    MATMUL_TILES,
    MOST_SPLITS,
    ONE_ROW_GEMV_TILES,
    GemvTile,
    MatmulTile,
    matmul_tiles,
)
from .step import Attention, Norm

FLOATS = ("fp16", "bf16", "fp32")


@dataclass(frozen=True)
class Variant:
    """One kernel with one choice of everything that is compiled into it. `weights` is how many int8 weights of W a
    warp multiplies in a step of the inner loop, 0 for kernels that have none."""

    kernel: str
    capability: int
    dtype: str
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int
    label: str
    weights: int = 0


KERNELS: dict[str, Any] = {
    "quantize_rows": triton_weights.quantize_rows_kernel,
    "mark_outliers": triton_activations.mark_outliers_kernel,
    "mark_by_token": triton_activations.mark_by_token_kernel,
    "quantize_activations": triton_activations.quantize_activations_kernel,
    "int8_matmul": triton_matmul.int8_matmul_kernel,
    "gather_columns": triton_matmul.gather_columns_kernel,
    "finish_matmul": triton_matmul.finish_matmul_kernel,
    "int8_gemv": triton_gemv.int8_gemv_kernel,
    "add_parts": triton_gemv.add_parts_kernel,
    "add_norm": triton_norm.add_norm_kernel,
    "activate": triton_activation.activate_kernel,
    "rotate_write": triton_heads.rotate_write_kernel,
    "attend_tokens": triton_attention.attend_tokens_kernel,
    "attend_rows": triton_attention.attend_rows_kernel,
}

_POINTERS = {
    "*{dtype}": "source x y bias bias_2 bias_3 delta weight qkv queries q_out pool q_weight q_bias k_weight k_bias",
    "*i8": "out q w w_2 w_3 marks w_outliers",
    "*i32": "bad outliers count sums places sequences table tiles counters",
    "*fp32": "scale x_scale least w_scale w_scale_2 w_scale_3 parts cos sin slopes part_values part_sums",
}
POINTERS = {name: kind for kind, names in _POINTERS.items() for name in names.split()}
"""What the arguments of this name point to, in all kernels."""

FLOAT_NUMBERS = ("threshold", "epsilon", "q_epsilon", "k_epsilon", "score_scale")
"""Arguments that are float32 numbers; all others are int32."""


def variants(capability: int) -> Iterator[Variant]:
    """All that dispatch can choose on this architecture, for weights whose width is a multiple of 16."""
    for dtype in FLOATS:
        for width in triton_weights.BLOCKS:
            block, warps, wide = triton_weights.block_of(width)
            chosen = (("BLOCK", block), ("WIDE", wide))
            label = f"{block}{' and more' if wide else ''}"
            yield Variant("quantize_rows", capability, dtype, chosen, warps, 3, label)
            yield Variant("mark_by_token", capability, dtype, chosen, warps, 3, label)
            listed = (*chosen, ("LIST", triton_activations.LIST_BLOCK))
            yield Variant("quantize_activations", capability, dtype, listed, warps, 3, label)
        marks = (("BLOCK_ROWS", triton_activations.MARK_ROWS), ("BLOCK_COLUMNS", triton_activations.MARK_COLUMNS))
        yield Variant("mark_outliers", capability, dtype, marks, 4, 3, "")
        architecture = ARCHITECTURES[capability]
        is_float32 = dtype == "fp32"
        tiles = {tile for rows in (*FEW_ROW_TILES, 2048) for tile in matmul_tiles(architecture, rows, is_float32)}
        for tile in sorted(tiles, key=lambda tile: (tile.rows, tile.outputs)):
            yield from _matmul_variants(capability, dtype, tile)
        few_rows = (FLOAT32_GEMV_TILE,) if is_float32 else tuple(chain.from_iterable(FEW_ROW_GEMV_TILES.values()))
        for gemv in (*ONE_ROW_GEMV_TILES, *few_rows):
            yield from _gemv_variants(capability, dtype, gemv)
        add = (("BLOCK_N", triton_gemv.ADD_BLOCK), ("MOST", MOST_SPLITS))
        yield Variant("add_parts", capability, dtype, add, 4, 3, f"up to {MOST_SPLITS} parts")
        yield from _step_variants(capability, dtype)


def _matmul_variants(capability: int, dtype: str, tile: MatmulTile) -> Iterator[Variant]:
    weights = tile.outputs * tile.depth // tile.warps
    is_split = not any(tile in tiles for tiles in MATMUL_TILES.values())
    is_masked = not any(tile in tiles[1:] for tiles in MATMUL_TILES.values())
    for split, whole in product((False, True)[: 1 + is_split], (True, False)[: 1 + is_masked]):
        chosen = (
            ("BLOCK_T", tile.rows), ("BLOCK_N", tile.outputs), ("BLOCK_K", tile.depth), ("BLOCK_C", tile.outliers),
            ("GROUP", tile.group), ("SPLIT", split), ("WHOLE", whole),
        )  # fmt: skip
        label = f"{tile.rows} x {tile.outputs} x {tile.depth}{_label_of_k(split, whole)}"
        yield Variant("int8_matmul", capability, dtype, chosen, tile.warps, tile.stages, label, weights)
    gather = (("BLOCK_N", triton_matmul.GATHER_OUTPUTS), ("BLOCK_C", triton_matmul.GATHER_COLUMNS))
    label = f"{triton_matmul.GATHER_OUTPUTS} x {triton_matmul.GATHER_COLUMNS}"
    yield Variant("gather_columns", capability, "int8", gather, 4, 3, label)
    finish = triton_matmul.FINISH
    last = (("BLOCK_T", finish.rows), ("BLOCK_N", finish.outputs), ("BLOCK_C", finish.outliers))
    yield Variant("finish_matmul", capability, dtype, last, finish.warps, 1, f"{finish.rows} x {finish.outputs}")


def _gemv_variants(capability: int, dtype: str, tile: GemvTile) -> Iterator[Variant]:
    weights = tile.outputs * tile.depth // tile.warps
    for layers in (1, triton_gemv.MOST_LAYERS)[: 1 if tile == FLOAT32_GEMV_TILE else 2]:
        chosen = (("BLOCK_T", tile.rows), ("BLOCK_N", tile.outputs), ("BLOCK_K", tile.depth), ("LAYERS", layers))
        label = f"{tile.rows} x {tile.outputs} x {tile.depth}{f', {layers} layers' if layers > 1 else ''}"
        yield Variant("int8_gemv", capability, dtype, chosen, tile.warps, tile.stages, label, weights)


def _label_of_k(split: bool, whole: bool) -> str:
    return f"{', K split' if split else ''}{'' if whole else ', K masked'}"


_HEAD_NORM = Norm(None, None, 1e-6, centered=False)
ATTENTIONS = {
    "64": Attention(12, 12, 64, (0, 64), (768, 64), (1536, 64), 0.125),
    "80, centered norms": Attention(
        32, 32, 80, (0, 80), (2560, 80), (5120, 80), 0.1, 32, Norm(None, None, 1e-5, True), Norm(None, None, 1e-5, True)
    ),
    "128, 4 queries": Attention(32, 8, 128, (0, 128), (4096, 128), (5120, 128), 0.1, 128, _HEAD_NORM, _HEAD_NORM),
    "256": Attention(16, 8, 256, (0, 256), (4096, 256), (6144, 256), 0.0625, 256),
}
"""Of each width of a head that registers are planned for; all with alibi and in parts, which take the most."""


def _step_variants(capability: int, dtype: str) -> Iterator[Variant]:
    for columns in (4096, triton_norm.LARGEST, triton_norm.LARGEST + 1):
        block, warps, wide = triton_norm.norm_block(columns)
        norm = ("HAS_DELTA", True), ("HAS_WEIGHT", True), ("HAS_BIAS", True), ("CENTERED", True)
        label = f"{block}{' and more' if wide else ''}"
        yield Variant("add_norm", capability, dtype, (("BLOCK", block), ("WIDE", wide), *norm), warps, 3, label)
    for kind, gated in (("silu", True), ("gelu", False)):
        activation = ("BLOCK", triton_activation.BLOCK), ("KIND", kind), ("GATED", gated)
        yield Variant("activate", capability, dtype, activation, 4, 3, f"{kind}{', gated' if gated else ''}")
    for label, attention in ATTENTIONS.items():
        yield from _attention_variants(capability, dtype, label, attention)


def _attention_variants(capability: int, dtype: str, label: str, attention: Attention) -> Iterator[Variant]:
    blocks = triton_heads.head_blocks(attention)
    yield Variant("rotate_write", capability, dtype, tuple(blocks.items()), 1, 3, label)
    wide = dtype == "fp32"
    rows = {name: blocks[name] for name in ("D", "BLOCK_D", "GROUP")}
    rows |= {"BLOCK_G": triton_attention.rows_of_a_tile(wide)}
    kernels = {"attend_tokens": blocks | {"WRITE": True, "SPLIT": True}, "attend_rows": rows}
    for kernel, chosen in kernels.items():
        tile = triton_attention.tile_of(attention.head_dim, wide, kernel == "attend_rows")
        warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
        chosen = chosen | tile | {"ALIBI": True}
        yield Variant(kernel, capability, dtype, tuple(chosen.items()), warps, stages, label)
