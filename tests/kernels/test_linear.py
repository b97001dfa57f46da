import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, normal

from evenflow.kernels.linear import is_own_product, launch_linear, linear
from evenflow.kernels.tuning import PRODUCT_TILES, own_product_rows, product_tile

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
    assert [own_product_rows(arch) for arch in ("sm_90", "sm_100", "sm_80", "gfx942", "")] == [1, 0, 0, 0, 0]
