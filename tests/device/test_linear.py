"""Our products of few rows on a real GPU, and kernels whose programs start before the kernel before them has ended."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, normal

from evenflow.kernels.language import current_arch
from evenflow.kernels.linear import (
    gated_linear,
    gated_tile,
    is_own_product,
    launch_few_row_linear,
    launch_linear,
    linear,
)
from evenflow.kernels.many_row_linear import launch_many_row_gated_linear
from evenflow.kernels.rms_norm import launch_add_rms_norm
from evenflow.kernels.silu_and_mul import launch_silu_and_mul, silu_and_mul
from evenflow.kernels.tuning import many_row_tiles

DTYPES = (torch.bfloat16, torch.float16)
# Outputs and inputs: of LLaMA 2 7B and 13B, Llama 3 8B and Qwen2.5 0.5B.
SHAPES = [
    (12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096), (5120, 5120), (5120, 13824),
    (4096, 14336), (128256, 4096), (896, 896), (896, 4864),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_row_against_float64(gpu, shape, dtype):
    num_outs, size = shape
    x, weight = normal(1, size, dtype=dtype).to(gpu), (0.02 * normal(num_outs, size, seed=1)).to(dtype).to(gpu)
    torch.cuda.synchronize()
    exact = torch.cat([x.double() @ part.double().T for part in weight.split(8192)], dim=1)
    eager = F.linear(x, weight)
    assert_accurate(launch_linear(x, weight), eager, exact)
    found = linear(x, weight)
    assert_accurate(found, eager, exact)
    assert is_own_product(x, weight) or torch.equal(found, eager)


# Outputs and inputs: of Llama 3 8B and LLaMA 2 7B.
FEW_ROW_SHAPES = [
    (4096, 14336), (28672, 4096), (6144, 4096), (4096, 4096), (4096, 11008), (12288, 4096), (128256, 4096),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FEW_ROW_SHAPES, ids=str)
def test_few_rows_against_float64(gpu, shape, dtype):
    """And again: which of the splits comes last changes nothing."""
    num_outs, size = shape
    weight = (0.02 * normal(num_outs, size, seed=1)).to(dtype).to(gpu)
    for num_rows in (2, 16, 17, 64):
        x = normal(num_rows, size, dtype=dtype, seed=num_rows).to(gpu)
        exact = torch.cat([x.double() @ part.double().T for part in weight.split(8192)], dim=1)
        eager = F.linear(x, weight)
        first = launch_few_row_linear(x, weight)
        assert_accurate(first, eager, exact)
        for _ in range(20):
            assert torch.equal(launch_few_row_linear(x, weight), first)
        assert torch.equal(linear(x, weight), first if is_own_product(x, weight) else eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(22016, 4096), (28672, 4096), (9728, 896), (27648, 5120)], ids=str)
def test_gated_products_against_float64(gpu, shape, dtype):
    num_outs, size = shape
    weight = (0.02 * normal(num_outs, size, seed=1)).to(dtype).to(gpu)
    for num_rows in (1, 2, 16, 17, 33, 64, 65):
        x = normal(num_rows, size, dtype=dtype, seed=num_rows).to(gpu)
        eager = silu_and_mul(F.linear(x, weight))
        exact = torch.cat([x.double() @ part.double().T for part in weight.split(8192)], dim=1)
        gate, up = exact.chunk(2, dim=1)
        found = gated_linear(x, weight)
        assert_accurate(found, eager, F.silu(gate) * up)
        assert is_own_product(x, weight) == (num_rows < 65)
        assert torch.equal(gated_linear(x, weight), found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(22016, 4096), (28672, 4096), (9728, 896), (27648, 5120), (5440, 2056)], ids=str)
def test_many_gated_rows_against_float64(gpu, shape, dtype):
    """Every tile of this architecture, whether it is taken or not."""
    num_outs, size = shape
    weight = (0.02 * normal(num_outs, size, seed=1)).to(dtype).to(gpu)
    for num_rows in (1, 105, 128, 209, 256, 721, 1024, 2100):
        x = normal(num_rows, size, dtype=dtype, seed=num_rows).to(gpu)
        eager = silu_and_mul(F.linear(x, weight))
        exact = torch.cat([x.double() @ part.double().T for part in weight.split(8192)], dim=1)
        gate, up = exact.chunk(2, dim=1)
        for tile in many_row_tiles(current_arch()):
            found = launch_many_row_gated_linear(x, weight, tile)
            assert_accurate(found, eager, F.silu(gate) * up)
            for _ in range(5):
                assert torch.equal(launch_many_row_gated_linear(x, weight, tile), found)
        if (tile := gated_tile(x, weight)) is not None and not is_own_product(x, weight):
            assert torch.equal(gated_linear(x, weight), launch_many_row_gated_linear(x, weight, tile))


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Of an MLP: what is next of the token's values, by the weights of gates and ups, and of down.
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def mlp(product: Product) -> list[Step]:
    return [
        lambda x, gate_up, down: product(x, gate_up),
        lambda x, gate_up, down: launch_silu_and_mul(x),
        lambda x, gate_up, down: product(x, down),
    ]


def mlp_of_many_rows() -> list[Step]:
    tile = many_row_tiles(current_arch())[0]
    return [
        lambda x, gate_up, down: launch_many_row_gated_linear(x, gate_up, tile),
        lambda x, gate_up, down: F.linear(x, down),
    ]


def layers(x: torch.Tensor, weights: list[tuple[torch.Tensor, ...]], is_apart: bool, steps: list[Step]) -> torch.Tensor:
    """is_apart: each kernel ends before the next is launched."""
    wait = torch.cuda.synchronize if is_apart else lambda: None
    residual = torch.zeros_like(x)
    for norm, gate_up, down in weights:
        x, residual = launch_add_rms_norm(x, residual, norm, 1e-5)
        wait()
        for step in steps:
            x = step(x, gate_up, down)
            wait()
    return x + residual


@pytest.mark.parametrize(
    ("num_rows", "product"),
    [
        (1, launch_linear), (5, launch_linear), (5, launch_few_row_linear), (40, launch_few_row_linear),
        (300, None),
    ],
)  # fmt: skip
def test_kernels_that_start_early_change_nothing(gpu, num_rows, product):
    """Small ones, whose programs all start at once; memory is used again and again, in a graph as well.

    product: None for the gated one of many rows, which only some GPUs have.
    """
    if product is None and not many_row_tiles(current_arch()):
        pytest.skip("only the library has products of many rows here")
    steps = mlp(product) if product is not None else mlp_of_many_rows()
    sizes = ((512,), (2 * 1536, 512), (512, 1536))
    weights = [
        tuple((0.05 * normal(*size, seed=3 * layer + i)).to(torch.bfloat16).to(gpu) for i, size in enumerate(sizes))
        for layer in range(24)
    ]
    x = normal(num_rows, 512, dtype=torch.bfloat16).to(gpu)
    expected = layers(x, weights, is_apart=True, steps=steps)
    for _ in range(50):
        found = layers(x, weights, is_apart=False, steps=steps)
    assert torch.equal(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layers(x, weights, is_apart=False, steps=steps)
    for _ in range(50):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)
