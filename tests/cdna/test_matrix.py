"""Matrix instructions: the published register layout written out element by element, and A @ B against numpy.

The layouts are those of AMD's matrix instruction calculator, as loops over elements, not the simulator's reshapes.
"""

import numpy as np
import pytest
import torch
from snippets import WAVES, execute, machine

from evenflow.crosscheck.cdna.errors import AssemblyError
from evenflow.crosscheck.cdna.floats import FP4_VALUES
from evenflow.crosscheck.cdna.matrix import SHAPES, result_layout

TORCH = {
    "f32": torch.float32,
    "xf32": torch.float32,
    "f64": torch.float64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i8": torch.int8,
}
FP8 = {
    "gfx942": {"fp8": torch.float8_e4m3fnuz, "bf8": torch.float8_e5m2fnuz},
    "gfx950": {"fp8": torch.float8_e4m3fn, "bf8": torch.float8_e5m2},
}
RESULT = {"f32": (np.float32, 1), "i32": (np.int32, 1), "f64": (np.float64, 2)}


def input_place(size, k_total, blocks, row, k, block):
    """(lane, element) that holds element [row, k] of A, or [k, row] of B."""
    elements = size * k_total * blocks // 64
    return row + size * (block + blocks * (k // elements)), k % elements


def result_place(shape, row, column, block):
    """(lane, element) of D[row, column]."""
    if shape.result == "f64":
        rows_at_once = 64 // shape.n // shape.blocks
        return column + shape.n * (block + shape.blocks * (row % rows_at_once)), row // rows_at_once
    if shape.m == 4:
        return column + 4 * block, row
    groups = 64 // shape.n
    per_block = shape.m * shape.n // 64
    return column + shape.n * (row // 4 % groups), block * per_block + row // (4 * groups) * 4 + row % 4


def random_matrix(generator, dtype, *shape):
    if dtype == torch.int8:
        return torch.from_numpy(generator.integers(-128, 128, shape).astype(np.int8))
    return torch.from_numpy(generator.standard_normal(shape)).to(dtype)


def spread(matrix, size, k_total, blocks):
    """The 32-bit registers, [words, 64], that hold [block, row, k] of this tensor."""
    elements = size * k_total * blocks // 64
    lanes = torch.zeros(64, elements, dtype=matrix.dtype)
    for block in range(blocks):
        for row in range(size):
            for k in range(k_total):
                lane, element = input_place(size, k_total, blocks, row, k, block)
                lanes[lane, element] = matrix[block, row, k]
    raw = lanes.view(torch.uint8).numpy().reshape(64, -1)
    padded = np.zeros((64, -(-raw.shape[1] // 4) * 4), np.uint8)
    padded[:, : raw.shape[1]] = raw
    return padded.view(np.uint32).T


def span(first, count, bank="v"):
    return f"{bank}{first}" if count == 1 else f"{bank}[{first}:{first + count - 1}]"


def exact(matrix, kind):
    values = matrix.double().numpy()
    if kind != "xf32":
        return values
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(mantissa * 2**11), exponent - 11)


@pytest.mark.parametrize("name", SHAPES)
def test_layout_and_product(name):
    shape = SHAPES[name]
    arch = "gfx942"
    kinds = {**TORCH, **FP8[arch]}
    generator = np.random.default_rng(0)
    a = random_matrix(generator, kinds[shape.a], shape.blocks, shape.m, shape.k)
    b = random_matrix(generator, kinds[shape.b], shape.blocks, shape.n, shape.k)
    dtype, words = RESULT[shape.result]
    c = generator.integers(-100, 100, (shape.results, WAVES, 64)).astype(dtype)

    state = machine(arch)
    a_words, b_words = spread(a, shape.m, shape.k, shape.blocks), spread(b, shape.n, shape.k, shape.blocks)
    state.vector[0 : len(a_words)] = a_words[:, None]
    state.vector[8 : 8 + len(b_words)] = b_words[:, None]
    raw = np.ascontiguousarray(c).view(np.uint32).reshape(shape.results, WAVES, 64, words)
    state.vector[256 : 256 + shape.results * words] = np.moveaxis(raw, -1, 1).reshape(-1, WAVES, 64)
    # Idle lanes take part all the same.
    registers = {"exec": np.array([0, 1, 0xFFFF], np.uint64)}
    c_span = span(0, shape.results * words, "a")
    execute(
        f"{name} {span(64, shape.results * words)}, {span(0, len(a_words))}, {span(8, len(b_words))}, {c_span}",
        registers,
        state,
    )

    got = state.vector[64 : 64 + shape.results * words].reshape(shape.results, words, WAVES, 64)
    got = np.ascontiguousarray(np.moveaxis(got, 1, -1)).view(dtype)[..., 0]
    product = exact(a, shape.a) @ exact(b, shape.b).swapaxes(1, 2)
    for block in range(shape.blocks):
        for row in range(shape.m):
            for column in range(shape.n):
                lane, element = result_place(shape, row, column, block)
                expected = product[block, row, column] + c[element, :, lane]
                assert np.allclose(got[element, :, lane], expected, rtol=1e-5, atol=1e-4), (block, row, column)


@pytest.mark.parametrize("name", SHAPES)
def test_every_result_has_one_place(name):
    shape = SHAPES[name]
    block, row, column = (part.ravel() for part in result_layout(shape))
    places = set(zip(block.tolist(), row.tolist(), column.tolist(), strict=True))
    assert len(places) == shape.m * shape.n * shape.blocks


def wide_place(size, k_total, row, k, bits):
    """(lane, element) of f8f6f4 operands: 8-bit codes in two runs of 16, half of K apart, 4-bit codes in one of 32."""
    if bits == 4:
        return row + size * (k // 32), k % 32
    half, rest = divmod(k, k_total // 2)
    return row + size * (rest // 16), 16 * half + rest % 16


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("size", "k_total"), [(16, 128), (32, 64)])
@pytest.mark.parametrize("scaled", [False, True])
def test_f8f6f4(size, k_total, bits, scaled):
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 1 << bits, (2, size, k_total)).astype(np.uint8)
    if bits == 8:
        codes = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)  # no NaN
        values = [torch.from_numpy(part).view(torch.float8_e4m3fn).double().numpy() for part in codes]
    else:
        values = [FP4_VALUES[part].astype(np.float64) for part in codes]
    scales = generator.integers(120, 135, (2, size, k_total // 32))
    lanes = np.zeros((2, 64, 32), np.uint8)
    for side in range(2):
        for row in range(size):
            for k in range(k_total):
                lane, element = wide_place(size, k_total, row, k, bits)
                lanes[side, lane, element] = codes[side, row, k]
    if bits == 4:
        lanes = lanes[..., 0::2] | lanes[..., 1::2] << 4
    state = machine("gfx950")
    words = np.ascontiguousarray(lanes).view(np.uint32)
    count = words.shape[-1]
    state.vector[0:count], state.vector[8 : 8 + count] = (np.moveaxis(part, -1, 0)[:, None] for part in words)
    lane = np.arange(64)
    state.vector[40] = scales[0][lane % size, lane // size] << 8
    state.vector[41] = scales[1][lane % size, lane // size] << 16
    formats = "cbsz:4 blgp:4" if bits == 4 else ""
    results = size * size // 64
    text = f"{span(64, results)}, {span(0, count)}, {span(8, count)}, 0"
    if scaled:
        text = f"v_mfma_scale_f32_{size}x{size}x{k_total}_f8f6f4 {text}, v40, v41 {formats}"
        text += " op_sel:[1,0,0] op_sel_hi:[0,1,0]"
        values = [
            value * np.repeat(2.0 ** (scale - 127), 32, axis=1) for value, scale in zip(values, scales, strict=True)
        ]
    else:
        text = f"v_mfma_f32_{size}x{size}x{k_total}_f8f6f4 {text} {formats}"
    execute(text, {}, state)
    product = values[0] @ values[1].T
    _, row, column = result_layout(SHAPES[f"v_mfma_f32_{size}x{size}x{256 // size}_f16"])
    got = state.vector[64 : 64 + results, 1].view(np.float32)
    assert np.allclose(got, product[row, column], rtol=1e-5, atol=np.abs(product).max() * 1e-6)


def test_fp8_means_what_the_architecture_says():
    """Code 0x38 is 1.0 in e4m3fn, and 0.5 in e4m3fnuz."""
    text = "v_mfma_f32_16x16x32_fp8_fp8 v[64:67], v[0:1], v[2:3], 0"
    for arch, one in (("gfx942", 0.5), ("gfx950", 1.0)):
        state = execute(text, {f"v{index}": 0x38383838 for index in range(4)}, arch=arch)
        assert (state.vector[64].view(np.float32) == 32 * one * one).all()


@pytest.mark.parametrize("modifier", ["cbsz:2", "abid:1", "blgp:1"])
def test_broadcasts_are_refused(modifier):
    with pytest.raises(AssemblyError, match=modifier.split(":")[0]):
        execute(f"v_mfma_f32_16x16x16_f16 v[64:67], v[0:1], v[2:3], 0 {modifier}", {})


def test_six_bit_formats_are_refused():
    with pytest.raises(AssemblyError, match="cbsz:2"):
        execute("v_mfma_f32_16x16x128_f8f6f4 v[64:67], v[0:5], v[8:13], 0 cbsz:2 blgp:2", {}, arch="gfx950")
