from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, normal

from evenflow.kernels.linear import (
    MAX_SUMS,
    MAX_TILES,
    few_row_launch,
    gated_linear,
    is_own_product,
    launch_few_row_linear,
    launch_linear,
    linear,
    split_sums,
)
from evenflow.kernels.silu_and_mul import silu_and_mul
from evenflow.kernels.tuning import (
    FEW_ROW_TILES,
    PRODUCT_TILES,
    FewRowTile,
    few_row_tiles,
    own_product_rows,
    product_tile,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# tokens, outputs, inputs: one piece and several of each tile, rows that end within a piece, and shorter than one
SHAPES = [
    (1, 8, 2048), (1, 6, 4096), (1, 2, 8192), (1, 4, 1024), (1, 2, 3072), (1, 4, 512), (1, 8, 1536), (1, 4, 1192),
    (1, 12, 520), (1, 4, 504), (1, 8, 8), (3, 8, 1192), (3, 8, 1704), (2, 8, 2048),
]  # fmt: skip


def check(x: torch.Tensor, weight: torch.Tensor) -> None:
    assert_accurate(launch_linear(x, weight), F.linear(x, weight), x.double() @ weight.double().T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_any_length(shape, dtype):
    num_tokens, num_outs, size = shape
    check(normal(num_tokens, size, dtype=dtype), normal(num_outs, size, dtype=dtype, seed=1))


def test_sums_are_in_float32():
    """In float16, 4096 + 1 is 4096."""
    x, weight = torch.ones(1, 6144, dtype=torch.float16), torch.ones(8, 6144, dtype=torch.float16)
    weight[:, :2048], weight[:, 4096:] = 4096, -4096
    check(x, weight)


def check_gated(x: torch.Tensor, weight: torch.Tensor, found: torch.Tensor) -> None:
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    assert_accurate(found, silu_and_mul(F.linear(x, weight)), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_rows_of_any_length(shape, dtype):
    num_tokens, num_outs, size = shape
    x, weight = normal(num_tokens, size, dtype=dtype), normal(num_outs, size, dtype=dtype, seed=1) / size**0.5
    check_gated(x, weight, launch_linear(x, weight, gated=True))


def exact_in_float32(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, weight and their product, whose sums are exact in float32 and not in float16."""
    x = torch.randint(-8, 9, (num_tokens, 512), generator=torch.Generator().manual_seed(0)).half()
    weight = torch.randint(-64, 65, (64, 512), generator=torch.Generator().manual_seed(1)).half() / 1024
    sums = x.float() @ weight.float().T
    assert (sums.half() != sums).any()
    assert torch.equal(sums.double(), x.double() @ weight.double().T)
    return x, weight, sums


def test_gates_are_rounded_before_the_activation():
    """As by a kernel of its own: to the bit."""
    x, weight, sums = exact_in_float32(1)
    assert torch.equal(launch_linear(x, weight, gated=True), silu_and_mul(sums.half()))


def test_gated_elsewhere_is_two_steps():
    x, weight, bias = normal(3, 24), normal(10, 24, seed=1), normal(10, seed=2)
    assert torch.equal(gated_linear(x, weight, bias), silu_and_mul(F.linear(x, weight, bias)))


def test_nothing_to_do():
    assert launch_linear(normal(0, 64), normal(4, 64)).shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_percent_are_seen(dtype):
    x, weight = normal(1, 520, dtype=dtype), normal(8, 520, dtype=dtype, seed=1)
    with pytest.raises(AssertionError, match="is allowed"):
        assert_accurate(launch_linear(x, weight) * 1.02, F.linear(x, weight), x.double() @ weight.double().T)


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "arch", "is_ours"),
    [
        (half(1, 4096), half(6, 4096), None, "sm_90", True),
        (half(1, 1192), half(8, 1192), None, "sm_90", True),
        (half(3, 4096)[1:2], half(6, 4096), None, "sm_90", True),
        (half(2, 4096), half(6, 4096), None, "sm_90", False),
        (half(2, 4096), half(64, 4096), None, "sm_90", True),
        (half(64, 4096), half(64, 4096), None, "sm_90", True),
        (half(64, 4096)[3:8], half(64, 4096), None, "sm_90", True),
        (half(16, 896), half(192, 896), None, "sm_90", True),
        (half(65, 4096), half(64, 4096), None, "sm_90", False),
        (half(16, 4096), half(96, 4096), None, "sm_90", False),
        (half(16, 4160), half(64, 4160), None, "sm_90", False),
        (half(16, 384), half(64, 384), None, "sm_90", False),  # too few steps
        (half(16, 4096), half(64, 4096), half(64), "sm_90", False),
        (half(16, 4096).float(), half(64, 4096).float(), None, "sm_90", False),
        (half(16, 4096), half(64, 4096).half(), None, "sm_90", False),
        (half(4096, 16).T, half(64, 4096), None, "sm_90", False),
        (half(16, 8192)[:, :4096], half(64, 4096), None, "sm_90", False),
        (half(16, 4096), half(4096, 64).T, None, "sm_90", False),
        (half(16, 4096), half(64, 4096), None, "sm_80", False),
        (half(16, 4096), half(64, 4096), None, "sm_100", False),
        (half(16, 4096), half(64, 4096), None, "gfx942", False),
        (half(16, 4096), half(64, 4096), None, None, False),
        (half(0, 4096), half(6, 4096), None, "sm_90", False),
        (half(1, 4096), half(6, 4096), half(6), "sm_90", False),
        (half(1, 4096), half(7, 4096), None, "sm_90", False),  # no whole number of programs
        (half(1, 1192), half(6, 1192), None, "sm_90", False),
        (half(1, 1196), half(8, 1196), None, "sm_90", False),  # rows that do not begin at 16 bytes
        (half(1, 4096).float(), half(6, 4096).float(), None, "sm_90", False),
        (half(1, 4096), half(6, 4096).half(), None, "sm_90", False),
        (half(1, 4096), half(4096, 6).T, None, "sm_90", False),
        (half(1, 4096), half(6, 4096), None, "sm_80", False),
        (half(1, 4096), half(6, 4096), None, "sm_100", False),
        (half(1, 4096), half(6, 4096), None, "gfx942", False),
        (half(1, 4096), half(6, 4096), None, None, False),
    ],
)
def test_which_products_are_ours(x, weight, bias, arch, is_ours):
    assert is_own_product(x, weight, bias, arch=arch) == is_ours


def test_the_rest_is_the_library_s():
    x, weight, bias = normal(3, 24), normal(5, 24, seed=1), normal(5, seed=2)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize(("size", "block_k"), [(8192, 4096), (14336, 1024), (5120, 1024), (11008, 512), (896, 512)])
def test_the_longest_piece_that_divides_a_row(size, block_k):
    assert product_tile(size).block_k == block_k
    assert all(tile.block_n * tile.block_k % (32 * 8 * tile.num_warps) == 0 for tile in PRODUCT_TILES.values())


def test_architectures():
    assert [own_product_rows(arch) for arch in ("sm_90", "sm_100", "sm_80", "gfx942", "")] == [64, 0, 0, 0, 0]
    assert few_row_tiles("gfx1100", 16) == FEW_ROW_TILES["gfx"][16]
    assert few_row_tiles("sm_90", 128) == ()


@pytest.mark.parametrize(
    ("rows", "outs", "size", "block_n", "grid"),
    [  # of Llama 3 8B and LLaMA 2 7B, and small ones
        (2, 4096, 4096, 64, (64, 4)), (16, 4096, 14336, 64, (64, 4)), (16, 4096, 11008, 64, (64, 4)),
        (32, 4096, 14336, 64, (64, 4)), (33, 4096, 4096, 64, (64, 2)), (64, 4096, 11008, 64, (64, 2)),
        (16, 6144, 4096, 64, (96, 2)), (64, 6144, 4096, 64, (96, 1)), (64, 12288, 4096, 64, (192, 1)),
        (16, 28672, 4096, 64, (448, 1)), (17, 28672, 4096, 128, (224, 1)), (64, 22016, 4096, 128, (172, 1)),
        (64, 128256, 4096, 128, (1002, 1)), (16, 128256, 4096, 64, (2004, 1)), (16, 28672, 896, 64, (448, 1)),
        (16, 896, 896, 64, (14, 1)), (16, 896, 1536, 64, (14, 2)), (64, 28736, 4096, 64, (449, 1)),
    ],
)  # fmt: skip
def test_how_products_are_cut(rows, outs, size, block_n, grid):
    launch = few_row_launch("sm_90", rows, outs, size)
    assert launch.grid == grid
    assert launch.arguments["BLOCK_N"] == block_n
    assert launch.arguments["SPLITS"] == grid[1]


@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize("arch", FEW_ROW_TILES)
def test_what_is_split_has_room_and_tiles_fit(arch, rows):
    for tile in few_row_tiles(arch, rows):
        assert tile.num_stages * (rows + tile.block_n) * tile.block_k * 2 <= 227 * 1024
        for num_tiles in range(1, 2 * MAX_TILES):
            launch = few_row_launch(arch, rows, num_tiles * tile.block_n, 1 << 14, tile)
            if launch is not None and launch.grid[1] > 1:
                assert num_tiles <= MAX_TILES
                assert num_tiles * launch.grid[1] * tile.block_n * rows <= MAX_SUMS
                assert num_tiles * launch.grid[1] <= tile.num_programs
        assert tile.num_programs == 0 or arch.startswith("sm_")


def test_products_without_room_for_their_sums_are_not_split():
    for tile in (FewRowTile(16, 64, 4, 3, num_programs=1 << 20), FewRowTile(128, 64, 4, 3, num_programs=1 << 20)):
        assert few_row_launch("", 64, 64 * tile.block_n, 4096, tile).grid == (64, 4 if tile.block_n == 16 else 2)
        assert few_row_launch("", 64, 1025 * tile.block_n, 4096, tile).grid == (1025, 1)


# rows, outputs, inputs, splits: each number of padded rows, not full and full, and steps that splits do not divide
FEW_ROWS = [
    (2, 64, 256, 1), (3, 192, 320, 1), (16, 128, 512, 2), (17, 64, 1024, 4), (33, 64, 576, 2), (48, 64, 1216, 4),
    (64, 128, 1024, 4), (64, 64, 256, 1), (1, 64, 1088, 4),
]  # fmt: skip


def few_row_tile(outs: int, splits: int) -> FewRowTile:
    return FewRowTile(64, 64, 4, 3, num_programs=outs // 64 * splits)


def check_few_rows(x: torch.Tensor, weight: torch.Tensor, splits: int) -> None:
    """Twice: into memory that nothing was written to, nor is beside it."""
    (rows, size), outs = x.shape, weight.shape[0]
    tile = few_row_tile(outs, splits)
    assert few_row_launch("", rows, outs, size, tile).grid == (outs // 64, splits)
    _, arrived = split_sums(x.device)
    padded = torch.empty(80, outs, dtype=x.dtype)
    for _ in range(2):
        padded.fill_(torch.nan)
        with patch.object(torch, "empty", lambda *shape, **_: padded[: shape[0]]):
            found = launch_few_row_linear(x, weight, tile=tile)
        assert padded[rows:].isnan().all(), "rows beyond the last are written"
        assert_accurate(found, F.linear(x, weight), x.double() @ weight.double().T)
        assert not arrived.any(), "a count is left"


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", FEW_ROWS, ids=str)
def test_few_rows(shape, dtype):
    rows, outs, size, splits = shape
    check_few_rows(normal(rows, size, dtype=dtype), normal(outs, size, dtype=dtype, seed=1), splits)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", FEW_ROWS, ids=str)
def test_few_gated_rows(shape, dtype):
    rows, outs, size, splits = shape
    x, weight = normal(rows, size, dtype=dtype), normal(outs, size, dtype=dtype, seed=1) / size**0.5
    check_gated(x, weight, launch_few_row_linear(x, weight, gated=True, tile=few_row_tile(outs, splits)))


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_sums_of_few_rows_are_in_float32(splits):
    """Within a step, over the steps and over the splits, whose sums are as large as float16 goes."""
    x, weight = torch.ones(3, 2048, dtype=torch.float16), torch.ones(64, 2048, dtype=torch.float16)
    weight[:, :512], weight[:, 1536:] = 4096, -4096
    check_few_rows(x, weight, splits)


@pytest.mark.parametrize("rows", [2, 17, 64])
def test_the_tiles_of_a_gpu(rows):
    """Interpreted as they are there: outputs and inputs for each."""
    for tile in few_row_tiles("sm_90", max(16, 1 << (rows - 1).bit_length())):
        x = normal(rows, 16 * tile.block_k, dtype=torch.float16)
        weight = normal(2 * tile.block_n, 16 * tile.block_k, dtype=torch.float16, seed=1)
        found = launch_few_row_linear(x, weight, tile=FewRowTile(tile.block_n, tile.block_k, 4, 1, tile.num_programs))
        assert_accurate(found, F.linear(x, weight), x.double() @ weight.double().T)


@pytest.mark.parametrize("shape", [(2, 96, 256), (2, 64, 288), (2, 64, 192)], ids=str)
def test_few_rows_of_what_fits_no_tile(shape):
    rows, outs, size = shape
    with pytest.raises(AssertionError, match="no tile fits"):
        launch_few_row_linear(half(rows, size), half(outs, size))


def test_two_percent_of_few_rows_are_seen():
    x, weight = normal(3, 512, dtype=torch.float16), normal(64, 512, dtype=torch.float16, seed=1)
    with pytest.raises(AssertionError, match="is allowed"):
        assert_accurate(launch_few_row_linear(x, weight) * 1.02, F.linear(x, weight), x.double() @ weight.double().T)
