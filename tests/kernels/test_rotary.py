"""Rotary and store against float64, and against the two CPU functions."""

import pytest
import torch
from accuracy import assert_accurate, normal

from evenflow.kernels.rotary import launch_rotary_and_store, rotary_and_store

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
NUM_BLOCKS, BLOCK_SIZE, MAX_POSITION = 5, 4, 32
STORE_INDEX = [3, -1, 19, 8, 0, 13]
POSITIONS = [0, 5, 31, 2, 2, 17]


def make_inputs(
    num_heads: int, num_kv_heads: int, size: int, dtype: torch.dtype, cache_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    """(qkv, kv_cache, cos, sin, positions, store_index), qkv in rows with a gap, the cache of ones."""
    width = (num_heads + 2 * num_kv_heads) * size
    qkv = normal(len(POSITIONS), width + 16, dtype=dtype)[:, :width]
    cache = torch.ones(NUM_BLOCKS, 2, num_kv_heads, BLOCK_SIZE, size).to(cache_dtype or dtype)
    angles = 3 * normal(MAX_POSITION, size // 2, seed=1)
    return qkv, cache, angles.cos(), angles.sin(), torch.tensor(POSITIONS), torch.tensor(STORE_INDEX)


def exact(qkv, kv_cache, cos, sin, positions, store_index, num_heads, num_kv_heads):
    """(qkv, cache) in float64, a head at a time."""
    size = kv_cache.shape[-1]
    heads = qkv.double().unflatten(-1, (-1, size)).clone()
    cache = kv_cache.double().clone()
    for token, (position, index) in enumerate(zip(positions.tolist(), store_index.tolist(), strict=True)):
        c, s = cos[position].double(), sin[position].double()
        for head in range(num_heads + num_kv_heads):
            first, second = heads[token, head].clone().chunk(2)
            heads[token, head] = torch.cat([first * c - second * s, second * c + first * s])
        if index >= 0:
            page = cache[index // kv_cache.shape[-2], :, :, index % kv_cache.shape[-2]]
            page[:] = heads[token, num_heads:].unflatten(0, (2, -1))
    return heads.flatten(1), cache


def both(inputs, *arguments):
    """What the kernel and the reference write."""
    found, eager = ([inputs[0].clone(), inputs[1].clone()] for _ in range(2))
    launch_rotary_and_store(*found, *inputs[2:], *arguments)
    rotary_and_store(*eager, *inputs[2:], *arguments)
    return found, eager


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 2), (3, 1), (16, 16)])
def test_against_float64(num_heads, num_kv_heads, size, dtype):
    inputs = make_inputs(num_heads, num_kv_heads, size, dtype)
    found, eager = both(inputs, num_heads, num_kv_heads)
    for made, reference, right in zip(found, eager, exact(*inputs, num_heads, num_kv_heads), strict=True):
        assert_accurate(made, reference, right)
    values = (num_heads + num_kv_heads) * size
    assert torch.equal(found[0][:, values:], inputs[0][:, values:])


def test_only_pages_of_the_index_are_written():
    inputs = make_inputs(2, 1, 64, torch.float32)
    cache = both(inputs, 2, 1)[0][1]
    is_written = (cache != 1).any(-1).any(2).any(1).flatten()
    assert is_written.nonzero()[:, 0].tolist() == sorted(index for index in STORE_INDEX if index >= 0)


def test_a_cache_of_more_than_two_gib():
    """Element offsets overflow 32 bits. Memory that nobody touches costs nothing."""
    inputs = list(make_inputs(2, 1, 64, torch.float32, torch.float8_e4m3fn))
    small, _ = both(inputs, 2, 1)
    first = 2**31 // inputs[1][0].numel()
    large = torch.empty(first + NUM_BLOCKS, *inputs[1].shape[1:], dtype=torch.uint8)
    large[first:] = inputs[1].view(torch.uint8)
    index = torch.where(inputs[5] < 0, -1, inputs[5] + first * BLOCK_SIZE)
    launch_rotary_and_store(inputs[0].clone(), large.view(torch.float8_e4m3fn), *inputs[2:5], index, 2, 1)
    assert torch.equal(large[first:], small[1].view(torch.uint8))


def test_three_dimensions_are_the_same_as_two():
    inputs = make_inputs(4, 2, 64, torch.float32)
    qkv, cache = inputs[0].contiguous().unflatten(-1, (8, 64)), inputs[1].clone()
    launch_rotary_and_store(qkv, cache, *inputs[2:], 4, 2)
    found = both(inputs, 4, 2)[0]
    assert torch.equal(qkv.flatten(1), found[0])
    assert torch.equal(cache, found[1])


def test_infinity_in_a_value_stays_in_its_place():
    inputs = make_inputs(2, 1, 64, torch.float32)
    inputs[0][0, 3 * 64 + 5] = torch.inf
    found, eager = both(inputs, 2, 1)
    assert torch.equal(found[1], eager[1])
    assert found[1].isinf().sum() == 1


@pytest.mark.parametrize("cache_dtype", FP8, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", [None, ([0.5], [0.005]), ([0.25, 2.0], [0.001, 4.0])])
def test_small_caches(scales, dtype, cache_dtype):
    """Exactly what the reference stores; a scale of 0.005 sends most values beyond the largest number."""
    inputs = make_inputs(4, 2, 80, dtype, cache_dtype)
    tensors = [torch.tensor(scale) for scale in scales] if scales else [None, None]
    found, eager = both(inputs, 4, 2, *tensors)
    stored, expected = found[1].float(), eager[1].float()
    assert stored.isfinite().all()
    # A key's product may round differently in its last place, and then cross a boundary of the 8-bit type.
    assert (stored != expected).float().mean() < 0.002
    torch.testing.assert_close(stored, expected, rtol=0.13, atol=2**-9)
    assert (expected.abs().max() == torch.finfo(cache_dtype).max) == (scales is not None and scales[1][0] < 0.01)


def test_nothing_to_do():
    inputs = make_inputs(2, 1, 64, torch.float32)
    launch_rotary_and_store(inputs[0][:0], inputs[1], *inputs[2:4], inputs[4][:0], inputs[5][:0], 2, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swapped_angles_are_seen(dtype):
    qkv, cache, cos, sin, positions, store_index = inputs = make_inputs(2, 1, 64, dtype)
    found, _ = both((qkv, cache, sin, cos, positions, store_index), 2, 1)
    _, eager = both(inputs, 2, 1)
    with pytest.raises(AssertionError, match="is allowed"):
        assert_accurate(found[0], eager[0], exact(*inputs, 2, 1)[0])
