"""Tiles by architecture, as plain data, and the functions that read them.

Owns numbers only: a kernel is right with every tile that fits, and fast with these. The longest prefix of the
architecture's name wins, "" is everything else; within it the row is chosen by the padded head size.
"""

from dataclasses import dataclass
from functools import cache
from typing import TypeVar

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Tile:
    """block_n: keys a step. block_m: (query, head) pairs a program, of prefill; decode takes one group of heads.

    masks_all: of prefill, no loop of its own for keys that every query sees, which takes fewer registers.
    """

    block_n: int
    num_warps: int
    num_stages: int
    block_m: int = 16
    masks_all: bool = False


@dataclass(frozen=True, slots=True)
class Split:
    """How decode rows are cut, see make_plan. num_resident: programs that a multiprocessor runs at once. waves: so many
    times that number are aimed at. granule: keys that a piece is rounded up to."""

    num_resident: int
    waves: int
    granule: int


@dataclass(frozen=True, slots=True)
class ProductTile:
    """Of a matrix-vector product. block_n: outputs a program. block_k: elements of their rows a step."""

    block_n: int
    block_k: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class FewRowTile:
    """Of a product of a few rows. block_n: outputs a program. block_k: elements of their rows a step.

    num_programs: K is split over several programs while there are no more than this; 0: never. min_outs: from how many
    outputs on it is taken.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    num_programs: int = 0
    min_outs: int = 0


@dataclass(frozen=True, slots=True)
class ManyRowTile:
    """Of a gated product of many rows. block_m: rows a tile. block_n: outputs, half of them gates. block_k: elements of
    their rows a step. group: tiles of rows that take turns before the next outputs do.

    It is taken for at most max_rows rows, where what is computed is at least min_fill of the room that its programs
    have in as many rounds as they need.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int
    max_rows: int
    min_fill: float


# {architecture: {padded head size: tile}}. Registers are what limits them: none of these spills, but for those of sm_90
# in prefill, which the clock chose, and float32 with heads of 256 on gfx11 and gfx12.
DECODE_TILES: dict[str, dict[int, Tile]] = {
    "gfx": {64: Tile(32, 1, 1), 128: Tile(16, 1, 1), 256: Tile(16, 2, 1)},
    "gfx11": {64: Tile(32, 2, 1), 128: Tile(32, 4, 1), 256: Tile(16, 4, 1)},
    "gfx12": {64: Tile(32, 2, 1), 128: Tile(32, 4, 1), 256: Tile(16, 4, 1)},
    "sm_80": {64: Tile(64, 4, 3), 128: Tile(32, 4, 3), 256: Tile(32, 4, 2)},
    "sm_90": {64: Tile(64, 2, 3), 128: Tile(64, 2, 3), 256: Tile(32, 4, 3)},
    "sm_100": {64: Tile(64, 4, 3), 128: Tile(64, 4, 3), 256: Tile(32, 4, 3)},
    "": {64: Tile(32, 4, 2), 128: Tile(32, 4, 2), 256: Tile(16, 4, 2)},
}
# With a cache of 8 bits. Copies to shared memory that run ahead would be 8 bytes a lane here; loads are 16.
DECODE_TILES_8_BIT: dict[str, dict[int, Tile]] = {
    **DECODE_TILES,
    "sm_90": {64: Tile(64, 4, 1), 128: Tile(64, 4, 1), 256: Tile(32, 4, 1)},
    "sm_100": {64: Tile(64, 4, 1), 128: Tile(64, 4, 1), 256: Tile(32, 4, 1)},
}
PREFILL_TILES: dict[str, dict[int, Tile]] = {
    "gfx": {64: Tile(32, 4, 1, 128), 128: Tile(32, 4, 1, 128), 256: Tile(32, 8, 1, 128, True)},
    "gfx11": {64: Tile(32, 4, 1, 64), 128: Tile(32, 8, 1, 64, True), 256: Tile(16, 8, 1, 32, True)},
    "gfx12": {64: Tile(32, 4, 1, 64), 128: Tile(32, 8, 1, 64, True), 256: Tile(16, 8, 1, 64)},
    "sm_80": {64: Tile(64, 8, 3, 128), 128: Tile(32, 8, 2, 128, True), 256: Tile(32, 8, 2, 64)},
    "sm_90": {64: Tile(64, 4, 3, 128), 128: Tile(32, 4, 3, 128), 256: Tile(32, 8, 2, 128)},
    "sm_100": {64: Tile(128, 8, 3, 128), 128: Tile(64, 8, 3, 128), 256: Tile(32, 8, 1, 128)},
    "": {64: Tile(32, 4, 2, 64), 128: Tile(32, 8, 2, 64), 256: Tile(32, 8, 1, 64)},
}
# With a cache of 8 bits: enough keys a step that a lane reads 16 bytes, and registers for the conversion.
PREFILL_TILES_8_BIT: dict[str, dict[int, Tile]] = {
    **PREFILL_TILES,
    "gfx": {64: Tile(64, 4, 1, 128, True), 128: Tile(32, 4, 1, 128), 256: Tile(32, 8, 1, 64, True)},
    "sm_100": {64: Tile(128, 8, 3, 128), 128: Tile(64, 8, 3, 128), 256: Tile(32, 8, 2, 128)},
}
# Of 32-bit queries, in both kernels and for every head size: few have matrix units for exact float32.
FLOAT32_TILES: dict[str, Tile] = {
    "gfx": Tile(16, 4, 1, 32),
    "gfx11": Tile(16, 8, 1, 16, True),
    "gfx12": Tile(16, 8, 1, 16, True),
    "": Tile(16, 8, 2, 32),
}
SPLITS: dict[str, Split] = {
    "gfx": Split(num_resident=8, waves=2, granule=64),
    "": Split(num_resident=4, waves=3, granule=64),
}

# Does the last piece of a decode row add all of them up? It counts on the order of memory that a device-wide acquire
# and release give to a whole workgroup, which PTX promises; on AMD that was never run: a kernel of its own does it.
MERGING_DECODE: dict[str, bool] = {"sm_": True, "": False}

# Programmatic dependent launch: elsewhere its instructions do not compile.
DEPENDENT_LAUNCH: dict[str, bool] = {"sm_9": True, "sm_1": True, "": False}

# Has Triton a logarithm there that is one instruction? AMD's is nearly so.
APPROXIMATE_LOG2: dict[str, bool] = {"sm_": True, "": False}

# Up to how many rows our products are taken instead of the library's. Elsewhere nothing was measured. On one H200, with
# 128 rows the library is as fast.
OWN_PRODUCT_ROWS: dict[str, int] = {"sm_90": 64, "": 0}
# {what the length of a row is divisible by: tile}, of which the largest that divides it is taken. Whole rows are read
# before the wait where they are short: on one H200 a step of one row of LLaMA 2 7B takes 3.59 ms so, and 3.75 ms with
# 2,048 elements at a time. The library's products alone take 0.7 us (o_proj) to 5 us (gate_up_proj) longer than these.
PRODUCT_TILES: dict[int, ProductTile] = {
    4096: ProductTile(2, 4096, 8),
    2048: ProductTile(8, 1024, 8),
    1024: ProductTile(2, 1024, 2),
    1: ProductTile(4, 512, 4),
}
# Of 2 rows and more: {architecture: {padded number of rows: tiles}}, of which the first that fits the product is taken.
# On one H200, of Llama 3 8B with 16 and 64 rows and before the splits are added up: o_proj takes 9.5 and 10.1 us (12.9
# and 12.3 with the library), down_proj 29.5 and 31.7 (31.9 and 35.5), gate_up_proj 59.2 and 60.5 (62.2 and 62.6).
# num_programs is what 132 multiprocessors run at once. Elsewhere K is not split, see MERGING_DECODE.
FEW_ROW_TILES: dict[str, dict[int, tuple[FewRowTile, ...]]] = {
    "sm_90": {
        16: (FewRowTile(64, 256, 4, 4, min_outs=16384), FewRowTile(64, 128, 4, 5, num_programs=264)),
        32: (FewRowTile(128, 128, 8, 4, min_outs=16384), FewRowTile(64, 128, 4, 4, num_programs=264)),
        64: (FewRowTile(128, 128, 8, 4, min_outs=16384), FewRowTile(64, 128, 4, 4, num_programs=132)),
    },
    "gfx": {rows: (FewRowTile(64, 64, 4, 1),) for rows in (16, 32, 64)},
    "": {rows: (FewRowTile(64, 64, 4, 3),) for rows in (16, 32, 64)},
}

# Gated products of more rows, of which the first that is taken wins; none: the library's, and the activation after it.
# On one H200 at its power limit, with the activation: Llama 3 8B 70 us for 128 rows (77 with the library), 112 for 256
# (117), 242 for 640 (262), 325 for 880 (353), 5.95 ms for 16,384 (6.19); where the last round is not filled as much,
# the library is faster.
MANY_ROW_TILES: dict[str, tuple[ManyRowTile, ...]] = {
    "sm_90": (
        ManyRowTile(128, 256, 64, 8, 4, 8, 128, 0.8),
        ManyRowTile(128, 256, 64, 8, 4, 8, 256, 0.84),
        ManyRowTile(128, 256, 64, 8, 3, 8, 1 << 30, 0.89),
        ManyRowTile(128, 128, 64, 4, 5, 8, 1 << 30, 0.905),
    ),
    "": (),
}

# From how many rows on a product is added to the residual by the library, instead of by the norm that follows. On one
# H200 a step of 2,048 tokens is 0.2 to 1.7 % shorter, one of 640 rows 1.3 %; with few rows the library is slower so.
ADDING_PRODUCT_ROWS: dict[str, int] = {"sm_90": 512, "": 1 << 62}
# Rows of the pieces that such a product is done in, at least: two of 8,192 are faster than 16,384 rows at once, on one
# H200 at its power limit, for down_proj of Llama 3 8B (docs/log.md).
ADDING_PIECE_ROWS = 8192

# Warps of a program that searches a row for its threshold: 512 threads, whether a warp has 32 or 64.
FILTER_WARPS: dict[str, int] = {"gfx9": 8, "": 16}


def decode_tile(arch: str, block_d: int, query_bytes: int, cache_bytes: int) -> Tile:
    """For heads padded to block_d; query_bytes and cache_bytes are an element's."""
    if query_bytes > 2:
        return _by_prefix(FLOAT32_TILES, arch)
    return _by_size(_by_prefix(DECODE_TILES_8_BIT if cache_bytes == 1 else DECODE_TILES, arch), block_d)


def prefill_tile(arch: str, block_d: int, query_bytes: int, cache_bytes: int) -> Tile:
    """As decode_tile, for rows of several queries."""
    if query_bytes > 2:
        return _by_prefix(FLOAT32_TILES, arch)
    return _by_size(_by_prefix(PREFILL_TILES_8_BIT if cache_bytes == 1 else PREFILL_TILES, arch), block_d)


def split_of(arch: str) -> Split:
    return _by_prefix(SPLITS, arch)


def merges_in_decode(arch: str) -> bool:
    return _by_prefix(MERGING_DECODE, arch)


def has_dependent_launch(arch: str) -> bool:
    return _by_prefix(DEPENDENT_LAUNCH, arch)


@cache
def has_approximate_log2(arch: str) -> bool:
    return _by_prefix(APPROXIMATE_LOG2, arch)


@cache
def own_product_rows(arch: str) -> int:
    return _by_prefix(OWN_PRODUCT_ROWS, arch)


@cache
def adding_product_rows(arch: str) -> int:
    return _by_prefix(ADDING_PRODUCT_ROWS, arch)


@cache
def product_tile(in_features: int) -> ProductTile:
    return PRODUCT_TILES[max(size for size in PRODUCT_TILES if in_features % size == 0)]


@cache
def few_row_tiles(arch: str, block_m: int) -> tuple[FewRowTile, ...]:
    """For rows padded to block_m; the first that fits a product is to be taken."""
    return _by_prefix(FEW_ROW_TILES, arch).get(block_m, ())


@cache
def many_row_tiles(arch: str) -> tuple[ManyRowTile, ...]:
    return _by_prefix(MANY_ROW_TILES, arch)


def filter_warps(arch: str) -> int:
    return _by_prefix(FILTER_WARPS, arch)


def _by_prefix(table: dict[str, Row], arch: str) -> Row:
    return table[max((prefix for prefix in table if arch.startswith(prefix)), key=len)]


def _by_size(row: dict[int, Tile], block_d: int) -> Tile:
    return row[min((size for size in row if size >= block_d), default=max(row))]
