import pytest
import torch
from accuracy import assert_accurate, normal

from evenflow.kernels.rms_norm import add_rms_norm, launch_add_rms_norm, launch_rms_norm, rms_norm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5


def weight(size: int, dtype: torch.dtype) -> torch.Tensor:
    return 1 + 0.1 * normal(size, dtype=dtype, seed=9)


def exact_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w.double()


def check(x: torch.Tensor, w: torch.Tensor) -> None:
    before = x.clone()
    found = launch_rms_norm(x, w, EPS)
    assert_accurate(found, rms_norm(x, w, EPS), exact_norm(x, w))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (3, 200), (2, 2048), (1, 4096), (33, 64), (2, 2047), (2, 2049)])
def test_rows_of_any_length(shape, dtype):
    check(normal(*shape, dtype=dtype), weight(shape[1], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "size"), [(5, 4, 128), (1, 1, 64), (7, 3, 80), (40, 2, 128)])
def test_heads_in_the_middle_of_a_joint_projection(tokens, heads, size, dtype):
    joint = normal(tokens, heads, 3 * size, dtype=dtype)
    check(joint[:, :, size : 2 * size], weight(size, dtype))
    rows = normal(tokens, (heads + 2) * size, dtype=dtype)
    check(rows[:, size : (heads + 1) * size].view(tokens, heads, size), weight(size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 200.0])
def test_size_of_the_values(scale, dtype):
    """Zero rows give zero, not NaN; squares of 200 overflow float16, so the mean must not be taken in it."""
    check(normal(2, 256, dtype=dtype) * scale, weight(256, dtype))


def test_nothing_to_do():
    assert launch_rms_norm(normal(0, 64), weight(64, torch.float32), EPS).shape == (0, 64)
    out, total = launch_add_rms_norm(normal(0, 64), normal(0, 64), weight(64, torch.float32), EPS)
    assert out.shape == total.shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (3, 200), (2, 4096), (33, 64)])
def test_the_residual_is_added_first(shape, dtype):
    x = normal(shape[0], 2 * shape[1], dtype=dtype)[:, : shape[1]]  # strided
    residual, w = normal(*shape, dtype=dtype, seed=1), weight(shape[1], dtype)
    found = launch_add_rms_norm(x, residual, w, EPS)
    eager = add_rms_norm(x, residual, w, EPS)
    total = x.double() + residual.double()
    exact = exact_norm(total, w), total
    for outputs in zip(found, eager, exact, strict=True):
        assert_accurate(*outputs)
    assert torch.equal(found[1], x + residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_percent_are_seen(dtype):
    x, w = normal(3, 200, dtype=dtype), weight(200, dtype)
    with pytest.raises(AssertionError, match="is allowed"):
        assert_accurate(launch_rms_norm(x, w, EPS) * 1.02, rms_norm(x, w, EPS), exact_norm(x, w))
