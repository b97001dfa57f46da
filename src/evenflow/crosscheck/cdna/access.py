"""How an instruction reads its sources and writes its result: types, sub-dword selection, lane moves, clamping.

Owns the meaning of operand types and of the SDWA, DPP and VOP3 modifiers; the mathematics is in the instruction tables.
A reader gives an array that broadcasts to [n, 64]: [n, 64] from a vector register, [n, 1] from a scalar one, [1] of a
literal.

Types: u16 i16 f16 bf16 u24 i24 u32 i32 f32 u64 i64 f64; "mask" is a lane mask in two scalar registers, bool [n, 64].
16-bit floats are computed in float32 and rounded once when they are written.
"""

from collections.abc import Callable

import numpy as np

from evenflow.crosscheck.cdna.errors import AssemblyError
from evenflow.crosscheck.cdna.floats import Array, bf16_to_f32, f16_to_f32, f32_to_f16
from evenflow.crosscheck.cdna.machine import LANES, Machine, high, join, low, to_lanes, to_mask
from evenflow.crosscheck.cdna.operands import SELECTIONS, Modifiers, Operand
from evenflow.crosscheck.cdna.parser import Instruction

Reader = Callable[[Machine], Array]
Writer = Callable[[Machine, Array], None]

U16, U32, U64 = np.uint32(0xFFFF), np.uint32, np.uint64
# What the literals of each type are written as.
_LITERAL = {
    "u16": "u32",
    "i16": "u32",
    "f16": "f16",
    "bf16": "u32",
    "u24": "u32",
    "i24": "u32",
    "i32": "u32",
    "i64": "u64",
}
_SIGN = {"f16": 0x8000, "bf16": 0x8000, "f32": 0x80000000, "u32": 0x80000000}


def raw32(operand: Operand, literal: str = "u32", word: int = 0) -> Reader:
    """uint32 bits; `word` counts registers from the operand's first."""
    if operand.kind == "v":
        row = operand.index + word
        return lambda machine: machine.read_vector(row)
    if operand.kind == "s":
        row = operand.index + word
        return lambda machine: machine.read_scalar(row)[:, None]
    if operand.kind == "literal":
        constant = operand.constant(literal).astype(np.uint64)
        bits = low(constant) if word == 0 else high(constant)
        return lambda machine: bits
    if operand.kind == "scc":
        return lambda machine: machine.scc[machine.waves].astype(np.uint32)[:, None]
    raise AssemblyError(f"operand {operand.text}: cannot be read here")


def raw64(operand: Operand, literal: str = "u64") -> Reader:
    """uint64 bits of a pair of registers."""
    if operand.kind == "literal":
        bits = operand.constant(literal)
        return lambda machine: bits
    if operand.count != 2:
        raise AssemblyError(f"operand {operand.text}: a pair of registers is needed here")
    lower, upper = raw32(operand), raw32(operand, word=1)
    return lambda machine: join(lower(machine), upper(machine))


def _sign_extended(bits: Array, width: int) -> Array:
    shift = np.uint32(32 - width)
    return np.ascontiguousarray(bits << shift).view(np.int32) >> np.int32(32 - width)


_FROM_BITS: dict[str, Callable[[Array], Array]] = {
    "u16": lambda bits: bits & U16,
    "i16": lambda bits: _sign_extended(bits, 16),
    "f16": f16_to_f32,
    "bf16": lambda bits: bf16_to_f32(bits & U16),
    "u24": lambda bits: bits & np.uint32(0xFFFFFF),
    "i24": lambda bits: _sign_extended(bits, 24),
    "u32": lambda bits: bits,
    "i32": lambda bits: np.ascontiguousarray(bits).view(np.int32),
    "f32": lambda bits: np.ascontiguousarray(bits).view(np.float32),
    "u64": lambda bits: bits,
    "i64": lambda bits: np.ascontiguousarray(bits).view(np.int64),
    "f64": lambda bits: np.ascontiguousarray(bits).view(np.float64),
}


def _selected(read: Reader, operand: Operand) -> Reader:
    """SDWA and op_sel: one byte or half of a register."""
    if operand.select is None or operand.select == SELECTIONS["DWORD"]:
        return read
    shift, mask = (np.uint32(part) for part in operand.select)
    width = int(mask).bit_length()
    if operand.sign_extend:
        return lambda machine: _sign_extended((read(machine) >> shift) & mask, width).view(np.uint32)
    return lambda machine: (read(machine) >> shift) & mask


def _signed(read: Reader, operand: Operand, kind: str) -> Reader:
    """The source modifiers |x| and -x; they work on the sign bit."""
    if not (operand.negate or operand.absolute):
        return read
    if kind == "f64":
        sign: Array = np.uint64(1 << 63)
    elif kind in _SIGN:
        sign = np.uint32(_SIGN[kind])
    else:
        raise AssemblyError(f"operand {operand.text}: sign modifiers on an integer")
    absolute, negate = operand.absolute, operand.negate

    def run(machine: Machine) -> Array:
        bits = read(machine)
        if absolute:
            bits = bits & ~sign
        return bits ^ sign if negate else bits

    return run


def lane_mask(operand: Operand) -> Reader:
    """bool [n, 64] of two scalar registers or a constant."""
    bits = raw64(operand)
    if operand.kind == "literal":
        return lambda machine: to_lanes(bits(machine))
    return lambda machine: to_lanes(bits(machine)[:, 0])


class LaneMove:
    """DPP: the first source comes from another lane. Lanes without a source are not written, or get 0 (bound_ctrl)."""

    def __init__(self, modifiers: Modifiers) -> None:
        self.lanes, self.in_range = _lane_pattern(modifiers)
        rows = (modifiers.get("row_mask", 15) >> (LANES // 16)) & 1
        banks = (modifiers.get("bank_mask", 15) >> (LANES // 4 % 4)) & 1
        self.enabled = (rows & banks).astype(bool)
        if modifiers.get("bound_ctrl", 1) != 1:
            raise AssemblyError("bound_ctrl must be 1")
        self.fills_zero = "bound_ctrl" in modifiers

    def has_source(self, machine: Machine) -> Array:
        return self.in_range & machine.active[:, self.lanes]

    def fetch(self, machine: Machine, value: Array) -> Array:
        moved = machine.broadcast(value)[:, self.lanes]
        return np.where(self.has_source(machine), moved, np.uint32(0))

    def written(self, machine: Machine) -> Array:
        """bool [n, 64]: the lanes whose destination may change."""
        if self.fills_zero:
            return machine.broadcast(self.enabled)
        return self.enabled & self.has_source(machine)


def _lane_pattern(modifiers: Modifiers) -> tuple[Array, Array]:
    """(source lane of each lane, whether there is one)."""
    row, position, everywhere = LANES & ~15, LANES & 15, np.ones(64, bool)
    controls = {name: value for name, value in modifiers.items() if name in _PATTERNS}
    if len(controls) != 1:
        raise AssemblyError("exactly one DPP control is needed")
    ((name, value),) = controls.items()
    lanes = _PATTERNS[name](row, position, value)
    valid = {
        "row_shl": position + (value if name == "row_shl" else 0) < 16,
        "row_shr": lanes >= row,
        "row_bcast": lanes >= 0,
        "wave_shl": lanes < 64,
        "wave_shr": lanes >= 0,
    }.get(name, everywhere)
    return np.where(valid, lanes, 0), valid


_PATTERNS: dict[str, Callable[..., Array]] = {
    "quad_perm": lambda row, position, value: (LANES & ~3) + np.array(value)[LANES & 3],
    "row_shl": lambda row, position, value: LANES + value,
    "row_shr": lambda row, position, value: LANES - value,
    "row_ror": lambda row, position, value: row + ((position - value) & 15),
    "row_mirror": lambda row, position, value: row + 15 - position,
    "row_half_mirror": lambda row, position, value: (LANES & ~7) + 7 - (LANES & 7),
    "row_newbcast": lambda row, position, value: row + value,
    "row_bcast": lambda row, position, value: LANES // (value + 1) * (value + 1) - 1,
    "wave_shl": lambda row, position, value: LANES + 1,
    "wave_shr": lambda row, position, value: LANES - 1,
    "wave_rol": lambda row, position, value: (LANES + 1) & 63,
    "wave_ror": lambda row, position, value: (LANES - 1) & 63,
}


def lane_move(instruction: Instruction) -> LaneMove | None:
    """The DPP control of this instruction, None without one."""
    return LaneMove(instruction.modifiers) if instruction.encoding == "dpp" else None


def reader(operand: Operand, kind: str, move: LaneMove | None = None) -> Reader:
    """Read one source as this type, with its modifiers."""
    if kind == "mask":
        return lane_mask(operand)
    literal = _LITERAL.get(kind, kind)
    bits = raw64(operand, literal) if kind.endswith("64") else raw32(operand, literal)
    if move is not None:
        plain, fetch = bits, move.fetch
        bits = lambda machine: fetch(machine, plain(machine))  # noqa: E731
    bits = _signed(_selected(bits, operand), operand, kind)
    if kind in ("u32", "u64"):
        return bits
    convert, source = _FROM_BITS[kind], bits
    return lambda machine: convert(source(machine))


def select_sources(instruction: Instruction, sources: list[Operand], destinations: int = 1) -> None:
    """Put the SDWA selection, or the half that op_sel names, on each source operand."""
    modifiers = instruction.modifiers
    if instruction.encoding == "sdwa":
        for position, operand in enumerate(sources[:2]):
            operand.select = SELECTIONS[modifiers.get(f"src{position}_sel", "DWORD")]
    elif "op_sel" in modifiers:
        for operand, is_high in zip(sources, modifiers["op_sel"], strict=False):
            operand.select = SELECTIONS["WORD_1" if is_high else "WORD_0"]


def _scale_output(instruction: Instruction) -> Callable[[Array], Array] | None:
    """The output modifiers of float instructions: multiply by 2 or 4, halve, then clamp to [0, 1]."""
    factor = instruction.modifiers.get("mul", 1) / instruction.modifiers.get("div", 1)
    clamps = "clamp" in instruction.modifiers
    if factor == 1 and not clamps:
        return None

    def scale(value: Array) -> Array:
        scaled = value * value.dtype.type(factor) if factor != 1 else value
        # With DX10_CLAMP (a required setting, see parser) a NaN clamps to 0.
        return np.where(np.isnan(scaled), 0, np.clip(scaled, 0, 1)).astype(value.dtype) if clamps else scaled

    return scale


def round_to_f16(machine: Machine, value: Array) -> Array:
    """float32 or float64 to fp16 codes; overflow becomes the largest finite value where the wave's mode says so."""
    codes = f32_to_f16(value)
    if machine.clamps_overflow[machine.waves].any():
        overflowed = np.isfinite(value) & ((codes & np.uint32(0x7FFF)) == 0x7C00)
        clamps = machine.clamps_overflow[machine.waves][:, None]
        codes = np.where(overflowed & clamps, codes - np.uint32(1), codes)
    return codes


def writer(instruction: Instruction, operand: Operand, kind: str, move: LaneMove | None = None) -> Writer:
    """Write a result of this type, with the instruction's output modifiers."""
    if kind == "mask":
        return _mask_writer(operand)
    if operand.kind != "v":
        raise AssemblyError(f"operand {operand.text}: the result goes to a vector register")
    scale = _scale_output(instruction) if kind[0] == "f" else None
    index = operand.index
    if kind.endswith("64"):
        return _pair_writer(operand, scale)
    merge = _partial_write(instruction, kind)

    def write(machine: Machine, value: Array) -> None:
        if scale is not None:
            value = scale(value)
        if kind == "f16":
            bits = round_to_f16(machine, value)
        elif kind in ("u16", "i16"):
            bits = np.asarray(value).astype(np.uint32) & U16
        elif value.dtype == np.bool_:
            bits = value.astype(np.uint32)
        else:
            bits = np.ascontiguousarray(value).view(np.uint32)
        if merge is not None:
            bits = merge(bits, machine.read_vector(index))
        machine.write_vector(index, bits, None if move is None else move.written(machine))

    return write


def _mask_writer(operand: Operand) -> Writer:
    """Lane masks have 0 for the lanes that do not execute."""
    if operand.kind != "s" or operand.count != 2:
        raise AssemblyError(f"operand {operand.text}: a lane mask goes to a pair of scalar registers")
    index = operand.index
    return lambda machine, lanes: machine.write_scalar64(index, to_mask(machine.broadcast(lanes) & machine.active))


def _pair_writer(operand: Operand, scale: Callable[[Array], Array] | None) -> Writer:
    if operand.count != 2:
        raise AssemblyError(f"operand {operand.text}: the result needs a pair of registers")
    index = operand.index

    def write(machine: Machine, value: Array) -> None:
        bits = np.ascontiguousarray(value if scale is None else scale(value)).view(np.uint64)
        lower, upper = low(bits), high(bits)
        machine.write_vector(index, lower)
        machine.write_vector(index + 1, upper)

    return write


def _partial_write(instruction: Instruction, kind: str) -> Callable[[Array, Array], Array] | None:
    """SDWA's dst_sel, or op_sel's last bit: only a byte or a half of the destination is the result."""
    modifiers = instruction.modifiers
    name, unused = modifiers.get("dst_sel", "DWORD"), modifiers.get("dst_unused", "UNUSED_PAD")
    if instruction.encoding != "sdwa" and kind in ("u16", "i16", "f16") and modifiers.get("op_sel"):
        name, unused = ("WORD_1" if modifiers["op_sel"][-1] else "WORD_0"), "UNUSED_PRESERVE"
    if name == "DWORD":
        return None
    shift, mask = (np.uint32(part) for part in SELECTIONS[name])
    kept = np.uint32(~(int(mask) << int(shift)) & 0xFFFFFFFF)
    if unused == "UNUSED_SEXT":
        raise AssemblyError("dst_unused:UNUSED_SEXT is not implemented")
    if unused == "UNUSED_PRESERVE":
        return lambda bits, old: ((bits & mask) << shift) | (old & kept)
    return lambda bits, old: (bits & mask) << shift
