"""Matrix instructions (MFMA): D = A B + C over one wave, in the register layout that AMD publishes.

With M x N x K and B blocks, lane l holds row i = l % M of A (column j = l % N of B) in lane group g = l // M, which has
block g % B; its E elements are k = (g // B) E + e. The results' layout is in `result_layout`. EXEC is ignored, as the
hardware does. Sums are in float32 and in numpy's order, not the hardware's; so are products of float32 sources.
"""

from dataclasses import dataclass

import numpy as np

from evenflow.crosscheck.cdna.access import Reader
from evenflow.crosscheck.cdna.convert import fp8_kind
from evenflow.crosscheck.cdna.errors import AssemblyError
from evenflow.crosscheck.cdna.floats import FP4_VALUES, FP8_KINDS, Array, bf16_to_f32, fp8_values
from evenflow.crosscheck.cdna.machine import LANES, WAVE, Machine
from evenflow.crosscheck.cdna.operands import Operand
from evenflow.crosscheck.cdna.operation import Operation, Run, expect, expect_register
from evenflow.crosscheck.cdna.parser import Instruction

ELEMENT_BITS = {"f64": 64, "f32": 32, "xf32": 32, "f16": 16, "bf16": 16, "i8": 8, "fp4": 4} | dict.fromkeys(
    FP8_KINDS, 8
)
# What cbsz and blgp name in the f8f6f4 instructions; the 6-bit formats are not implemented.
F8F6F4_KINDS = {0: "e4m3fn", 1: "e5m2", 4: "fp4"}
SCALE_RUN = 32  # elements along k that share a scale


@dataclass(frozen=True)
class Shape:
    """One instruction: result type, size, blocks, element types ("fp8" and "bf8" mean what the architecture says)."""

    result: str
    m: int
    n: int
    k: int
    blocks: int
    a: str
    b: str

    @property
    def elements(self) -> int:
        """Elements of A, and of B, in each lane."""
        return self.m * self.k * self.blocks // WAVE

    @property
    def results(self) -> int:
        """Elements of the result in each lane."""
        return self.m * self.n * self.blocks // WAVE

    @property
    def result_words(self) -> int:
        return 2 if self.result == "f64" else 1


def result_layout(shape: Shape) -> tuple[Array, Array, Array]:
    """(block, row, column), each int [results, 64]: which element of D each lane holds in each place."""
    place, lane = np.arange(shape.results)[:, None], LANES[None]
    group = lane // shape.n
    column = np.broadcast_to(lane % shape.n, (shape.results, WAVE))
    if shape.result == "f64":
        # Rows go over lane groups first; the blocks of 4 x 4 are the fastest of the groups.
        return group % shape.blocks + 0 * place, group // shape.blocks + place * (WAVE // shape.n), column
    if shape.m == 4:
        return group + 0 * place, place % 4 + 0 * group, column
    per_block = shape.results // shape.blocks
    inner = place % per_block
    rows_at_once = 4 * (WAVE // shape.n)  # runs of four rows, one run for each lane group
    return place // per_block + 0 * lane, inner // 4 * rows_at_once + group * 4 + inner % 4, column


def _read_words(machine: Machine, first: int, count: int) -> Array:
    """uint32 [n, 64, count], contiguous."""
    return np.ascontiguousarray(np.moveaxis(machine.vector[first : first + count][:, machine.waves], 0, -1))


def round_to_xf32(value: Array) -> Array:
    """Ten mantissa bits, to nearest even."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    rounded = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    finite = (bits & np.uint32(0x7F800000)) != 0x7F800000
    return np.where(finite, rounded & np.uint32(0xFFFFE000), bits).astype(np.uint32).view(np.float32)


def decode(words: Array, kind: str) -> Array:
    """uint32 [..., words] to the numbers in them: float32, or float64 for the types that need it."""
    if kind == "f64":
        return words.view(np.float64)
    if kind == "f32":
        return words.view(np.float32)
    if kind == "xf32":
        return round_to_xf32(words.view(np.float32))
    if kind == "f16":
        return words.view(np.float16).astype(np.float32)
    if kind == "bf16":
        return bf16_to_f32(words.view(np.uint16))
    if kind == "i8":
        return words.view(np.int8).astype(np.float64)
    codes = words.view(np.uint8)
    if kind == "fp4":
        nibbles = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1)
        return FP4_VALUES[nibbles].reshape(*codes.shape[:-1], -1)
    return fp8_values(kind)[codes]


def _matrix(values: Array, size: int, shape: Shape) -> Array:
    """[n, 64, E] to [n, blocks, size, K]."""
    groups = WAVE // size // shape.blocks
    lanes = values.reshape(len(values), groups, shape.blocks, size, shape.elements)
    return lanes.transpose(0, 2, 3, 1, 4).reshape(len(values), shape.blocks, size, shape.k)


def _wide_matrix(values: Array, size: int, shape: Shape, kind: str) -> Array:
    """The same for f8f6f4. A lane's 32 codes of 8 bits are two runs of 16, half of K apart; those of 4 bits are one."""
    if ELEMENT_BITS[kind] != 8:
        return _matrix(values, size, shape)
    lanes = values.reshape(len(values), WAVE // size, size, 2, 16)
    return lanes.transpose(0, 2, 3, 1, 4).reshape(len(values), 1, size, shape.k)


def _element_kind(name: str, architecture: str) -> str:
    return fp8_kind(architecture, name) if name in ("fp8", "bf8") else name


def _num_words(shape: Shape, kind: str) -> int:
    return max(shape.elements * ELEMENT_BITS[kind] // 32, 1)


def _source(operand: Operand, size: int, shape: Shape, name: str) -> Reader:
    first = expect_register(operand, "v", _num_words(shape, "e5m2" if name in ("fp8", "bf8") else name))

    def read(machine: Machine) -> Array:
        kind = _element_kind(name, machine.architecture)
        words = _read_words(machine, first, _num_words(shape, kind))
        return _matrix(decode(words, kind)[:, :, : shape.elements], size, shape)

    return read


def _wide_source(operand: Operand, size: int, shape: Shape, kind: str, scale: Reader | None) -> Reader:
    first = expect_register(operand, "v", shape.elements * ELEMENT_BITS[kind] // 32)
    count = operand.count

    def read(machine: Machine) -> Array:
        matrix = _wide_matrix(decode(_read_words(machine, first, count), kind), size, shape, kind)
        if scale is None:
            return matrix
        exponents = scale(machine).reshape(machine.count, WAVE // size, size).transpose(0, 2, 1)
        factors = np.where(
            exponents == 255, np.float32(np.nan), np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
        )
        return matrix * np.repeat(factors, SCALE_RUN, axis=2)[:, None]

    return read


def _addend(operand: Operand, shape: Shape) -> Reader:
    """C as [results, n, 64] of the result's type."""
    dtype = {"f32": np.float32, "i32": np.int32, "f64": np.float64}[shape.result]
    if operand.kind == "literal":
        kind = {"f32": "f32", "i32": "u32", "f64": "f64"}[shape.result]
        constant = operand.constant(kind)
        bits = constant.astype(np.uint64 if shape.result == "f64" else np.uint32).view(dtype)
        return lambda machine: bits
    words = shape.result_words
    first = expect_register(operand, "v", shape.results * words)

    def read(machine: Machine) -> Array:
        rows = machine.vector[first : first + shape.results * words][:, machine.waves]
        if words == 1:
            return rows.view(dtype)
        pairs = rows.reshape(shape.results, 2, machine.count, WAVE)
        return np.ascontiguousarray(np.moveaxis(pairs, 1, -1)).view(dtype)[..., 0]

    return read


def _store(machine: Machine, first: int, shape: Shape, value: Array) -> None:
    """value: [results, n, 64] of the result's type."""
    words = np.ascontiguousarray(value).view(np.uint32)
    if shape.result_words == 2:
        words = np.moveaxis(words.reshape(shape.results, machine.count, WAVE, 2), -1, 1)
        words = words.reshape(2 * shape.results, machine.count, WAVE)
    machine.vector[first : first + len(words), machine.waves] = words


def _multiply(instruction: Instruction, shape: Shape, a: Reader, b: Reader) -> Run:
    operands = instruction.operands
    addend = _addend(operands[3], shape)
    first = expect_register(operands[0], "v", shape.results * shape.result_words)
    block, row, column = result_layout(shape)

    def run(machine: Machine) -> None:
        product = a(machine) @ b(machine).swapaxes(-1, -2)
        elements = np.moveaxis(product[:, block, row, column], 1, 0)
        if shape.result == "i32":
            elements = elements.astype(np.int64).astype(np.int32)
        _store(machine, first, shape, elements + addend(machine))

    return run


def _matrix_operation(shape: Shape) -> Operation:
    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 4)
        a, b = _source(operands[1], shape.m, shape, shape.a), _source(operands[2], shape.n, shape, shape.b)
        return _multiply(instruction, shape, a, b)

    return Operation(bind)


def _scale_reader(operand: Operand, place: int) -> Reader:
    """int [n, 64]: one byte of the scale register."""
    index, shift = expect_register(operand, "v", 1), np.uint32(8 * place)
    return lambda machine: ((machine.read_vector(index) >> shift) & np.uint32(0xFF)).astype(np.int64)


def _wide_operation(m: int, k: int, is_scaled: bool) -> Operation:
    """f8f6f4: cbsz and blgp name the formats of A and B; op_sel and op_sel_hi the byte of each scale register."""
    shape = Shape("f32", m, m, k, 1, "", "")

    def bind(instruction: Instruction) -> Run:
        operands = expect(instruction, 6 if is_scaled else 4)
        modifiers = instruction.modifiers
        readers = []
        for side, name in enumerate(("cbsz", "blgp")):
            code = modifiers.get(name, 0)
            if code not in F8F6F4_KINDS:
                raise AssemblyError(f"{name}:{code}: this element format is not implemented")
            scale = None
            if is_scaled:
                place = modifiers.get("op_sel", [0, 0])[side] + 2 * modifiers.get("op_sel_hi", [0, 0])[side]
                scale = _scale_reader(operands[4 + side], place)
            readers.append(_wide_source(operands[1 + side], m, shape, F8F6F4_KINDS[code], scale))
        return _multiply(instruction, shape, *readers)

    names = {"cbsz", "blgp"} | ({"op_sel", "op_sel_hi"} if is_scaled else set())
    return Operation(bind, modifiers=frozenset(names))


# type: (M = N, K, blocks) of every dense instruction.
_SIZES = {
    "f32": [(32, 1, 2), (16, 1, 4), (4, 1, 16), (32, 2, 1), (16, 4, 1)],
    "xf32": [(16, 8, 1), (32, 4, 1)],
    "f16": [(32, 4, 2), (16, 4, 4), (4, 4, 16), (32, 8, 1), (16, 16, 1), (32, 16, 1), (16, 32, 1)],
    "bf16": [(32, 4, 2), (16, 4, 4), (4, 4, 16), (32, 8, 1), (16, 16, 1), (32, 16, 1), (16, 32, 1)],
    "i8": [
        (32, 4, 2),
        (16, 4, 4),
        (4, 4, 16),
        (32, 8, 1),
        (16, 16, 1),
        (32, 16, 1),
        (16, 32, 1),
        (32, 32, 1),
        (16, 64, 1),
    ],
    "f64": [(16, 4, 1), (4, 4, 4)],
}
# The first bf16 instructions, with half the depth; gfx90a still has them beside the newer "1k" ones.
_OLD_BF16_SIZES = [(32, 2, 2), (16, 2, 4), (4, 2, 16), (32, 4, 1), (16, 8, 1)]


def _named_shapes() -> dict[str, Shape]:
    """Mnemonic: shape. gfx90a writes 16x16x16f16, the others 16x16x16_f16 and the number of blocks."""
    shapes = {}
    for kind, sizes in _SIZES.items():
        result = {"i8": "i32", "f64": "f64"}.get(kind, "f32")
        for m, k, blocks in sizes:
            shape = Shape(result, m, m, k, blocks, kind, kind)
            block_text = f"_{blocks}b" if blocks > 1 else ""
            shapes[f"v_mfma_{result}_{m}x{m}x{k}{block_text}_{kind}"] = shape
            shapes[f"v_mfma_{result}_{m}x{m}x{k}{kind}{'_1k' if kind == 'bf16' else ''}"] = shape
    for m, k, blocks in _OLD_BF16_SIZES:
        shapes[f"v_mfma_f32_{m}x{m}x{k}bf16"] = Shape("f32", m, m, k, blocks, "bf16", "bf16")
    for a in ("fp8", "bf8"):
        for b in ("fp8", "bf8"):
            for m, k in ((16, 32), (32, 16)):
                shapes[f"v_mfma_f32_{m}x{m}x{k}_{a}_{b}"] = Shape("f32", m, m, k, 1, a, b)
    return shapes


SHAPES = _named_shapes()
MATRIX: dict[str, Operation] = {
    **{name: _matrix_operation(shape) for name, shape in SHAPES.items()},
    "v_mfma_f32_16x16x128_f8f6f4": _wide_operation(16, 128, is_scaled=False),
    "v_mfma_f32_32x32x64_f8f6f4": _wide_operation(32, 64, is_scaled=False),
    "v_mfma_scale_f32_16x16x128_f8f6f4": _wide_operation(16, 128, is_scaled=True),
    "v_mfma_scale_f32_32x32x64_f8f6f4": _wide_operation(32, 64, is_scaled=True),
}
