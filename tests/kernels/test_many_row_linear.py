from unittest.mock import patch

import pytest
import torch
from accuracy import normal
from test_linear import check_gated, exact_in_float32

from evenflow.kernels import linear, many_row_linear
from evenflow.kernels.language import ALIGNED
from evenflow.kernels.linear import gated_tile
from evenflow.kernels.many_row_linear import launch_many_row_gated_linear, many_row_tile, tiles_taken
from evenflow.kernels.silu_and_mul import silu_and_mul
from evenflow.kernels.tuning import MANY_ROW_TILES, ManyRowTile

DTYPES = (torch.float16, torch.bfloat16)
# tokens, gates, inputs: one tile and several, not full down, across, nor along K; groups that are not full, and fewer
# programs than tiles
SHAPES = [
    (16, 16, 32), (1, 8, 8), (37, 40, 72), (16, 16, 200), (96, 48, 64), (97, 24, 40), (80, 104, 48), (33, 16, 136),
]  # fmt: skip


def tile_of(**changes: float) -> ManyRowTile:
    options = {
        "block_m": 16, "block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 1, "group": 2, "max_rows": 1 << 30,
        "min_fill": 0.0,
    }  # fmt: skip
    return ManyRowTile(**options | changes)


def check(x: torch.Tensor, weight: torch.Tensor, tile: ManyRowTile, num_programs: int = 3) -> None:
    """Into memory that nothing was written to, nor is beside it."""
    (num_tokens, _), num_gates = x.shape, weight.shape[0] // 2
    padded = torch.full((num_tokens + 20, num_gates), torch.nan, dtype=x.dtype)
    with (
        patch.object(torch, "empty", lambda *shape, **_: padded[: shape[0]]),
        patch.object(many_row_linear, "num_multiprocessors", lambda: num_programs),
    ):
        found = launch_many_row_gated_linear(x, weight, tile)
    assert padded[num_tokens:].isnan().all(), "rows beyond the last are written"
    check_gated(x, weight, found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape(shape, dtype):
    num_tokens, num_gates, size = shape
    x, weight = normal(num_tokens, size, dtype=dtype), normal(2 * num_gates, size, dtype=dtype, seed=1) / size**0.5
    check(x, weight, tile_of())


@pytest.mark.parametrize("num_programs", [1, 2, 7, 100])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_any_order_of_tiles(group, num_programs):
    x, weight = normal(70, 32, dtype=torch.float16), normal(2 * 40, 32, dtype=torch.float16, seed=1) / 6
    check(x, weight, tile_of(group=group), num_programs)


def test_the_tiles_of_a_gpu():
    """Interpreted as they are there: a whole one and a part, down and across."""
    for tile in MANY_ROW_TILES["sm_90"]:
        num_gates = tile.block_n // 2 + 8
        x, weight = normal(tile.block_m + 5, 136, dtype=torch.float16), normal(2 * num_gates, 136, seed=1).half() / 12
        check(x, weight, tile)


def test_gates_are_rounded_before_the_activation():
    """As by a kernel of its own: to the bit, where sums are exact in float32 and not in float16."""
    x, weight, sums = exact_in_float32(40)
    assert torch.equal(launch_many_row_gated_linear(x, weight, tile_of()), silu_and_mul(sums.half()))


def test_sums_are_in_float32():
    """In float16, 4096 + 1 is 4096."""
    x, weight = torch.ones(20, 192, dtype=torch.float16), torch.ones(32, 192, dtype=torch.float16)
    weight[:, :64], weight[:, 128:] = 4096, -4096
    expected = silu_and_mul(torch.full((20, 32), 64.0))
    assert torch.equal(launch_many_row_gated_linear(x, weight, tile_of()), expected.half())


def test_two_percent_are_seen():
    x, weight = normal(20, 64, dtype=torch.float16), normal(32, 64, dtype=torch.float16, seed=1) / 8
    with pytest.raises(AssertionError, match="is allowed"):
        check_gated(x, weight, launch_many_row_gated_linear(x, weight, tile_of()) * 1.02)


NO_MEMORY = torch.device("meta")


def half(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=NO_MEMORY)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "arch", "is_ours"),
    [  # of Llama 3 8B
        (half(128, 4096), half(28672, 4096), None, "sm_90", True),
        (half(256, 4096), half(28672, 4096), None, "sm_90", True),
        (half(640, 4096), half(28672, 4096), None, "sm_90", True),
        (half(16384, 4096), half(28672, 4096), None, "sm_90", True),
        (half(16384, 4096, dtype=torch.float16), half(28672, 4096, dtype=torch.float16), None, "sm_90", True),
        (half(64, 4096), half(28672, 4096), None, "sm_90", False),  # few rows
        (half(200, 4096), half(28672, 4096), None, "sm_90", False),  # the second tile of rows is half empty
        (half(720, 4096), half(28672, 4096), None, "sm_90", False),
        (half(128, 4096), half(2048, 4096), None, "sm_90", False),  # few outputs
        (half(16384, 4096), half(28672, 4096), half(28672), "sm_90", False),
        (half(16384, 4096), half(28672, 4096, dtype=torch.float16), None, "sm_90", False),
        (half(16384, 4096).float(), half(28672, 4096).float(), None, "sm_90", False),
        (half(4096, 16384).T, half(28672, 4096), None, "sm_90", False),
        (half(16384, 4096), half(4096, 28672).T, None, "sm_90", False),
        (half(16384, 4100), half(28672, 4100), None, "sm_90", False),  # rows that do not begin at 16 bytes
        (half(16384, 4096), half(28680, 4096), None, "sm_90", False),
        (half(16384, 4096), half(28672, 4096), None, "sm_80", False),
        (half(16384, 4096), half(28672, 4096), None, "sm_100", False),
        (half(16384, 4096), half(28672, 4096), None, "gfx942", False),
        (half(16384, 4096), half(28672, 4096), None, None, False),
        (half(0, 4096), half(28672, 4096), None, "sm_90", False),
    ],
)
def test_which_products_are_ours(x, weight, bias, arch, is_ours, monkeypatch):
    monkeypatch.setattr(linear, "num_multiprocessors", lambda: 132)
    assert (gated_tile(x, weight, bias, arch=arch) is not None) == is_ours


def test_gated_products_come_here(monkeypatch):
    """With a rule that takes all of them."""
    tile = tile_of()
    monkeypatch.setattr(linear, "many_row_tiles", lambda arch: (tile,))
    monkeypatch.setattr(linear, "many_row_tile", lambda *_: tile)
    x, weight, bias = normal(37, 40).half(), normal(48, 40, seed=1).half(), normal(48, seed=2).half()
    with patch.object(linear, "launch_many_row_gated_linear", wraps=launch_many_row_gated_linear) as launch:
        found = linear.gated_linear(x, weight)
        linear.gated_linear(x, weight, bias)
        linear.linear(x, weight)
    launch.assert_called_once_with(x, weight, tile)
    assert torch.equal(found, launch_many_row_gated_linear(x, weight, tile))


@pytest.mark.parametrize(
    ("num_tokens", "num_gates", "num_programs", "block_n"),
    [
        (128, 14336, 132, 256), (128, 14336, 114, 256), (128, 14336, 78, 128), (128, 11008, 132, None),
        (256, 14336, 132, 256), (256, 13824, 132, None), (384, 11008, 132, 256), (512, 14336, 132, 128),
        (592, 14336, 132, None), (880, 14336, 132, 256), (16384, 1000, 132, 256), (16384, 1001, 132, None),
    ],
)  # fmt: skip
def test_a_tile_is_taken_where_the_last_round_is_full(num_tokens, num_gates, num_programs, block_n):
    tile = many_row_tile("sm_90", num_tokens, num_gates, 4096, num_programs)
    assert (tile and tile.block_n) == block_n


def test_tiles_fit():
    for tiles in MANY_ROW_TILES.values():
        for tile in tiles:
            operands = tile.num_stages * (tile.block_m + tile.block_n) * tile.block_k * 2
            assert operands + tile.block_m * tile.block_n // 2 * 2 <= 227 * 1024
            assert tile.block_k % ALIGNED == 0


@pytest.mark.parametrize("num_gates", [14336, 11008, 13824, 4864, 896])
def test_what_is_checked_at_the_start_is_what_is_taken(num_gates):
    taken = {many_row_tile("sm_90", rows, num_gates, 4096, 132) for rows in range(16, 16385, 16)} - {None}
    assert tiles_taken("sm_90", num_gates, 4096, 132) == taken
