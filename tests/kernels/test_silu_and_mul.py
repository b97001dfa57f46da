import pytest
import torch
from accuracy import assert_accurate, normal

from evenflow.kernels.silu_and_mul import BLOCK, launch_silu_and_mul, silu_and_mul

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def exact_product(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def check(x: torch.Tensor) -> None:
    before = x.clone()
    assert_accurate(launch_silu_and_mul(x), silu_and_mul(x), exact_product(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1100), (2, BLOCK), (1, BLOCK + 1), (5, 16)])
def test_any_width(shape, dtype):
    check(normal(shape[0], 2 * shape[1], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_be_strided(dtype):
    check(normal(3, 500, dtype=dtype)[:, 100:300])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_gates_neither_overflow_nor_vanish(dtype):
    """exp(-gate) is infinite in float32 from -89 on; the product is 0, not NaN."""
    gate = torch.tensor([-1000.0, -200.0, -90.0, -30.0, 0.0, -0.0, 30.0, 90.0, 1000.0])
    check(torch.cat([gate, torch.full_like(gate, 2.0)]).to(dtype)[None, :])


def test_nothing_to_do():
    assert launch_silu_and_mul(normal(0, 64)).shape == (0, 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_percent_are_seen(dtype):
    x = normal(3, 200, dtype=dtype)
    with pytest.raises(AssertionError, match="is allowed"):
        assert_accurate(launch_silu_and_mul(x) * 1.02, silu_and_mul(x), exact_product(x))
