"""Operands and modifiers of one instruction: text to data. Owns no instruction; `parser` reads whole files.

Registers live in two files. Vector: v0 to v255 are rows 0 to 255, the accumulation registers a0 to a255 rows 256 to
511. Scalar: s0 to s105, then the named ones of `NAMED_SCALARS` at the numbers of the machine encoding.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evenflow.crosscheck.cdna.errors import AssemblyError
from evenflow.crosscheck.cdna.floats import Array

VCC, M0, EXEC = 106, 124, 126
ACCUMULATION_BASE = 256
NAMED_SCALARS = {
    "flat_scratch": (102, 2),
    "flat_scratch_lo": (102, 1),
    "flat_scratch_hi": (103, 1),
    "vcc": (VCC, 2),
    "vcc_lo": (VCC, 1),
    "vcc_hi": (VCC + 1, 1),
    "m0": (M0, 1),
    "exec": (EXEC, 2),
    "exec_lo": (EXEC, 1),
    "exec_hi": (EXEC + 1, 1),
}
FLAGS = set("offen idxen glc slc sc0 sc1 nt lds gds clamp row_mirror row_half_mirror".split())
VALUED = set(
    "offset offset0 offset1 op_sel op_sel_hi neg_lo neg_hi quad_perm row_shl row_shr row_ror row_newbcast"
    " row_bcast wave_shl wave_shr wave_rol wave_ror row_mask bank_mask bound_ctrl dst_sel dst_unused src0_sel"
    " src1_sel cbsz abid blgp bitop3 mul div".split()
)
# What each selection of a sub-dword operand means: (shift, mask).
SELECTIONS = {
    "BYTE_0": (0, 0xFF),
    "BYTE_1": (8, 0xFF),
    "BYTE_2": (16, 0xFF),
    "BYTE_3": (24, 0xFF),
    "WORD_0": (0, 0xFFFF),
    "WORD_1": (16, 0xFFFF),
    "DWORD": (0, 0xFFFFFFFF),
}
UNUSED = {"UNUSED_PAD", "UNUSED_SEXT", "UNUSED_PRESERVE"}
INLINE_INTEGERS = range(-16, 65)
_REGISTER = re.compile(r"^([vsa])(?:(\d+)|\[(\d+):(\d+)\])$")
_INTEGER = re.compile(r"^-?(0x[0-9a-fA-F]+|\d+)$")
_FLOAT = re.compile(r"^-?\d+\.\d*(e[-+]?\d+)?$|^-?\d+e[-+]?\d+$")
_FLOAT_TYPES = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
_UNSIGNED = {16: np.uint16, 32: np.uint32, 64: np.uint64}

Modifiers = dict[str, Any]


@dataclass
class Operand:
    """One operand. kind: "v", "s", "literal", "off" (no register), "scc", "label" or "function" (such as
    hwreg(...))."""

    kind: str
    text: str
    index: int = 0
    count: int = 1
    value: Any = None
    is_float: bool = False
    negate: bool = False
    absolute: bool = False
    sign_extend: bool = False
    select: tuple[int, int] | None = None  # sub-dword selection: shift, mask
    constants: dict[str, Array] = field(default_factory=dict)

    def constant(self, kind: str) -> Array:
        """The literal's bits as an array of one element, for an operand of this type: u16, u32, u64, f16, f32 or
        f64."""
        if kind not in self.constants:
            self.constants[kind] = _literal_bits(self, kind)
        return self.constants[kind]


def _literal_bits(operand: Operand, kind: str) -> Array:
    bits = int(kind[1:])
    if operand.is_float:
        # An integer instruction sees the bits of the float32, or of the double where it is 64 bits wide.
        like = _FLOAT_TYPES[kind if kind[0] == "f" else f"f{max(bits, 32)}"]
        number = np.array([operand.value], like).view(_UNSIGNED[like().itemsize * 8])
        return number.astype(_UNSIGNED[max(bits, 32)])
    if kind == "f64" and operand.value not in INLINE_INTEGERS:
        raise AssemblyError(f"operand {operand.text}: a 32-bit literal as a double is not implemented")
    width = max(bits, 32)
    return np.array([operand.value & ((1 << width) - 1)], _UNSIGNED[width])


def _register(text: str) -> Operand | None:
    if text in NAMED_SCALARS:
        index, count = NAMED_SCALARS[text]
        return Operand("s", text, index, count)
    match = _REGISTER.match(text)
    if match is None:
        return None
    bank, single, first, last = match.groups()
    index = int(single or first)
    count = 1 if single else int(last) - index + 1
    limit = 106 if bank == "s" else 256
    if count < 1 or index + count > limit:
        raise AssemblyError(f"operand {text}: no such registers")
    base = ACCUMULATION_BASE if bank == "a" else 0
    return Operand("s" if bank == "s" else "v", text, base + index, count)


def parse_operand(text: str) -> Operand:
    """One operand, with its source modifiers: -x, |x|, neg(x), abs(x), sext(x)."""
    inner, marks = text, {"negate": False, "absolute": False, "sign_extend": False}
    while True:
        if _INTEGER.match(inner) or _FLOAT.match(inner):
            break
        if inner.startswith("-"):
            inner, marks["negate"] = inner[1:], True
        elif inner.startswith("|") and inner.endswith("|"):
            inner, marks["absolute"] = inner[1:-1], True
        elif match := re.match(r"^(neg|abs|sext)\((.*)\)$", inner):
            inner = match[2]
            marks[{"neg": "negate", "abs": "absolute", "sext": "sign_extend"}[match[1]]] = True
        else:
            break
    operand = _plain_operand(inner)
    if any(marks.values()) and operand.kind not in ("v", "s", "literal"):
        raise AssemblyError(f"operand {text}: cannot be understood")
    for mark, is_set in marks.items():
        setattr(operand, mark, is_set)
    operand.text = text
    return operand


def _plain_operand(text: str) -> Operand:
    if register := _register(text):
        return register
    if text in ("off", "null"):
        return Operand("off", text, count=0)
    if text in ("scc", "src_scc"):
        return Operand("scc", text)
    if _INTEGER.match(text):
        return Operand("literal", text, value=int(text, 0))
    if _FLOAT.match(text):
        return Operand("literal", text, value=float(text), is_float=True)
    if match := re.match(r"^(hwreg|sendmsg|vmcnt|lgkmcnt|expcnt)\((.*)\)$", text):
        return Operand("function", text, value=(match[1], [part.strip() for part in match[2].split(",")]))
    if re.match(r"^\.?[A-Za-z_][\w.$]*$", text) and text.startswith((".L", "BB")):
        return Operand("label", text, value=text)
    raise AssemblyError(f"operand {text}: cannot be understood")


def _modifier_value(name: str, text: str) -> Any:
    if text.startswith("["):
        return [int(part, 0) for part in text[1:-1].split(",")]
    if _INTEGER.match(text):
        return int(text, 0)
    if text in SELECTIONS or text in UNUSED or (name == "offset" and text.startswith("swizzle(")):
        return text
    raise AssemblyError(f"modifier {name}:{text}: cannot be understood")


def parse_operands(text: str) -> tuple[list[Operand], Modifiers]:
    """Everything after the mnemonic: operands separated by commas, then modifiers separated by blanks."""
    operands: list[Operand] = []
    modifiers: Modifiers = {}
    for token in re.findall(r"(?:\[[^\]]*\]|\([^)]*\)|[^\s,\[\]()])+", text):
        name, colon, value = token.partition(":")
        if colon and name in VALUED:
            modifiers[name] = _modifier_value(name, value)
        elif token in FLAGS:
            modifiers[token] = True
        elif colon and "[" not in name:
            raise AssemblyError(f"modifier {token}: not implemented")
        else:
            operands.append(parse_operand(token))
    return operands, modifiers
