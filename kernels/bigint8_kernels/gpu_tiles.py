"""Which tiles the GPU kernels use: a short list for each class of architecture, with the arithmetic behind it.

What limits a tile, by NVIDIA's CUDA programming guide, "Features and Technical Specifications per Compute Capability":
shared memory of a block (below), 65536 registers and 1536 or 2048 threads an SM, 255 registers a thread.

The matmul keeps `stages` - 1 slices of both operands in shared memory, (rows + outputs) x depth bytes each in int8, and
its int32 sums in registers, rows x outputs / (32 x warps) a thread. Each byte of a slice is used for `rows` or
`outputs` products: 128 x 128 and more, so that an SM's tensor cores (1024 int8 products a cycle on 8.6 and 8.9, 2048 on
8.0, 4096 on 9.0) wait neither for shared memory (128 bytes a cycle) nor for L2.

A tile of W is read once for each tile of rows. The int8 weights of an OPT-175B layer (12288 x 49152) are 604 MB, which
an RTX 3090 reads in 0.65 ms (936 GB/s); 128 rows times these are 155 GOP, 0.54 ms at its 284 TOP/s. From some 150 rows
on the arithmetic is the limit, below that the bytes are.

Waves, programs / (SMs x blocks an SM), for 2048 rows on an RTX 3090 (82 SMs). The last wave is not full; in
parentheses is the share of the SMs' time that is used:

    outputs of a layer        128 x 128, 1 block    128 x 256, 1 block    64 x 128, 2 blocks
    OPT-175B, 12288           18.7 (99 %)           9.4 (94 %)            18.7 (99 %)
    OPT-175B, 49152           74.9 (100 %)          37.5 (99 %)           74.9 (100 %)
    Llama-7B, 4096            6.2 (89 %)            3.1 (78 %)            6.2 (89 %)
    Llama-7B, 11008           16.8 (99 %)           8.4 (93 %)            16.8 (99 %)

What 128 x 256 gains by reading X half as often it may lose there again, so tuning decides. One row, in programs of 8
outputs, 8 blocks an SM: 1536, 6144, 512 and 1376 programs are 2.3, 9.4, 0.8 and 2.1 waves; with fewer than eight warps
an SM, K is split.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """What the tiles must fit into: `shared_bytes` of a block, `threads` and `blocks` an SM."""

    capability: int
    shared_bytes: int
    threads: int
    blocks: int


ARCHITECTURES = {
    80: Architecture(80, 163 * 1024, 2048, 32),
    86: Architecture(86, 99 * 1024, 1536, 16),
    89: Architecture(89, 99 * 1024, 1536, 24),
    90: Architecture(90, 227 * 1024, 2048, 32),
    120: Architecture(120, 99 * 1024, 1536, 24),
}
"""By compute capability times ten: A100, RTX 30, RTX 40, H100, RTX 50."""

OLDEST = 80
"""Triton has no int8 dot product for older GPUs."""


@dataclass(frozen=True)
class MatmulTile:
    """A tile of `int8_matmul`: `rows` x `outputs` of Y, `depth` of K a step, `outliers` columns a step of the rest.

    `group` tiles of rows run side by side; K is split over `split` programs.
    """

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int
    outliers: int = 16
    group: int = 8
    split: int = 1

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the slices of both operands."""
        return (self.stages - 1) * (self.rows + self.outputs) * self.depth


@dataclass(frozen=True)
class GemvTile:
    """A tile of `int8_gemv`: `rows` of X (1, or 16 on tensor cores), `outputs` x `depth` of W a step.

    A step of one warp is 32 threads x 16 bytes of W, 512, or a multiple of it.
    """

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int
    split: int = 1


MATMUL_TILES = {
    # 64 KB; 72 KB with twice the reuse of X; 48 KB twice an SM, for lengths that 128 wastes
    "99 KB": (MatmulTile(128, 128, 128, 8, 3), MatmulTile(128, 256, 64, 8, 4), MatmulTile(64, 128, 128, 4, 3)),
    # 96 KB; 144 KB; 72 KB twice an SM
    "163 KB": (MatmulTile(128, 128, 128, 8, 4), MatmulTile(128, 256, 128, 8, 4), MatmulTile(64, 128, 128, 4, 4)),
}

FEW_ROW_TILES = {
    16: MatmulTile(16, 64, 256, 4, 4),
    64: MatmulTile(64, 64, 128, 4, 4),
}
"""For up to so many rows: memory-bound, so small tiles of outputs, of which there are many, and deep slices in flight:
60 and 48 KB."""

FLOAT32_TILE = MatmulTile(64, 64, 64, 4, 3)
"""For float32 X, whose outliers are multiplied in float32, which takes more registers."""

GEMV_TILES = {1: GemvTile(1, 8, 512, 2, 1), 16: GemvTile(16, 64, 128, 4, 4)}
"""By rows: 64 bytes of W a thread and step, in 128-bit loads.

One row: a thread has 16 features of four outputs, so X is loaded and converted once for four weights. The 16 warps of
an SM, at 128 registers, have 32 KB on their way. An RTX 3090 brings 6.7 bytes a cycle and SM: these last for more than
4,000 cycles, several times the wait for memory, so a step is not loaded ahead, which would take 16 more registers."""

FLOAT32_GEMV_TILE = GemvTile(16, 16, 64, 4, 1)
"""For a few rows of float32 X, which no tensor core multiplies exactly."""

ONE_ROW_GEMV_TILES = (GEMV_TILES[1], *(GemvTile(1, 8, 512 * n, 2 * n, 1) for n in (2, 4, 8)))
"""For one row where K is not split: more warps a program, each with its part of a step."""

FEW_ROW_GEMV_TILES = {
    16: (GEMV_TILES[16], GemvTile(16, 32, 256, 4, 3), GemvTile(16, 16, 256, 2, 4)),
    32: (GemvTile(32, 64, 128, 4, 4), GemvTile(32, 32, 128, 4, 4)),
    64: (GemvTile(64, 64, 128, 4, 3), GemvTile(64, 32, 128, 4, 3)),
}
"""For up to so many rows where K is not split: W is read once for all of them. Where the outputs are so few that SMs
would have none, a program has fewer."""

MOST_SPLITS = 8

WARPS_WANTED = 8
"""K is split until each SM has this many warps: with 64 bytes a thread, they have 16 KB on their way."""


def architecture_of(major: int, minor: int) -> Architecture:
    """The newest known architecture that a GPU of this compute capability runs code of.

    Raises ValueError for a GPU older than 8.0.
    """
    capability = 10 * major + minor
    known = [architecture for number, architecture in ARCHITECTURES.items() if number <= capability]
    if not known:
        raise ValueError(f"compute capability {major}.{minor}: int8 kernels need {OLDEST / 10:.1f} or newer")
    return known[-1]


def matmul_tiles(
    architecture: Architecture, rows: int, is_float32: bool = False, features: int = 0
) -> tuple[MatmulTile, ...]:
    """The tiles to choose from for so many rows of so many features.

    If a tile's depth does not divide `features`, it must load with masks. These take registers, and the largest tile
    has none to spare. So only tiles whose depth divides `features` are offered, or the first tile if there is none.
    """
    if is_float32:
        return (FLOAT32_TILE,)
    for most, tile in FEW_ROW_TILES.items():
        if rows <= most:
            return (tile,)
    tiles = MATMUL_TILES["163 KB" if architecture.shared_bytes >= 163 * 1024 else "99 KB"]
    return tuple(tile for tile in tiles if features % tile.depth == 0) or tiles[:1]


def gemv_tile(rows: int, is_float32: bool = False) -> GemvTile:
    """The tile for a few rows."""
    return GEMV_TILES[1] if rows == 1 else FLOAT32_GEMV_TILE if is_float32 else GEMV_TILES[16]


def whole_gemv_tile(rows: int, outputs: int, features: int, is_float32: bool, processors: int) -> GemvTile:
    """The tile for a few rows where K is not split: one launch, however few outputs there are.

    One row: a program has so many warps, each with its part of a step, that an SM has eight, as far as K allows.
    """
    if rows > 1:
        if is_float32:
            return FLOAT32_GEMV_TILE
        tiles = next((tiles for most, tiles in FEW_ROW_GEMV_TILES.items() if rows <= most), FEW_ROW_GEMV_TILES[64])
        return next((tile for tile in tiles if -(-outputs // tile.outputs) >= processors), tiles[-1])
    possible = [tile for tile in ONE_ROW_GEMV_TILES if tile.depth <= features] or ONE_ROW_GEMV_TILES[:1]
    enough = (tile for tile in possible if outputs // tile.outputs * tile.warps >= WARPS_WANTED * processors)
    return next(enough, possible[-1])


def split_of(programs: int, warps: int, processors: int, steps: int) -> int:
    """Over how many programs to split K, so that so many `processors` (SMs) have eight warps each.

    `warps` is how many a program has, `steps` how many steps K takes; each program keeps at least two.
    """
    split = 1
    while split < MOST_SPLITS and programs * split * warps < WARPS_WANTED * processors and steps >= 4 * split:
        split *= 2
    return split


def row_bucket(rows: int) -> int:
    """The number of rows rounded up to a power of two: what was tuned for it serves every length in it."""
    return 1 << max(0, rows - 1).bit_length()
