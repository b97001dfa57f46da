"""Assembly text to a `Kernel`: descriptor, arguments, instructions and branch targets. Owns no meaning of instructions.

Anything that is not recognised is an error that names the thing and its line. Debug sections are skipped whole.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from evenflow.crosscheck.cdna.errors import AssemblyError
from evenflow.crosscheck.cdna.operands import Modifiers, Operand, parse_operands

ARCHITECTURES = ("gfx90a", "gfx942", "gfx950")
IGNORED_DIRECTIVES = set(
    ".amdhsa_code_object_version .text .globl .protected .p2align .p2alignl .type .size .set .fill .file .loc .ident"
    " .cfi_sections .cfi_startproc .cfi_endproc .cfi_escape .cfi_undefined .addrsig .addrsig_sym .weak .hidden".split()
)
# Sections whose contents are not executed; .rodata holds the descriptor, which is read, and nothing else here.
SKIPPED_SECTIONS = (".debug", ".note", ".AMDGPU", ".comment", ".llvm")
_DESCRIPTOR = set(
    "group_segment_fixed_size private_segment_fixed_size kernarg_size user_sgpr_count user_sgpr_private_segment_buffer"
    " user_sgpr_dispatch_ptr user_sgpr_queue_ptr user_sgpr_kernarg_segment_ptr user_sgpr_dispatch_id"
    " user_sgpr_flat_scratch_init user_sgpr_kernarg_preload_length user_sgpr_kernarg_preload_offset"
    " user_sgpr_private_segment_size uses_dynamic_stack enable_private_segment"
    " system_sgpr_private_segment_wavefront_offset system_sgpr_workgroup_id_x system_sgpr_workgroup_id_y"
    " system_sgpr_workgroup_id_z system_sgpr_workgroup_info system_vgpr_workitem_id next_free_vgpr next_free_sgpr"
    " accum_offset reserve_vcc reserve_flat_scratch reserve_xnack_mask float_round_mode_32 float_round_mode_16_64"
    " float_denorm_mode_32 float_denorm_mode_16_64 dx10_clamp ieee_mode fp16_overflow tg_split"
    " exception_fp_ieee_invalid_op exception_fp_denorm_src exception_fp_ieee_div_zero exception_fp_ieee_overflow"
    " exception_fp_ieee_underflow exception_fp_ieee_inexact exception_int_div_zero".split()
)
# Settings under which the simulator's arithmetic would be wrong.
_REQUIRED = {
    "float_round_mode_32": 0,
    "float_round_mode_16_64": 0,
    "float_denorm_mode_32": 3,
    "float_denorm_mode_16_64": 3,
    "fp16_overflow": 0,
    "tg_split": 0,
    "uses_dynamic_stack": 0,
    "dx10_clamp": 1,
    "ieee_mode": 1,
    "system_sgpr_workgroup_info": 0,
}
_ENCODING = re.compile(r"^(.*)_(e32|e64|sdwa|dpp)$")


@dataclass
class Instruction:
    """One line of code. `name` is the mnemonic without its encoding suffix; `target` the index that a branch goes to;
    `provenance` the arguments from which its address may derive (None: not known), as `dataflow` finds them."""

    mnemonic: str
    name: str
    encoding: str
    operands: list[Operand]
    modifiers: Modifiers
    line: int
    text: str
    target: int = -1
    provenance: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass
class Argument:
    """One kernel argument as the metadata declares it. Offsets and sizes in bytes."""

    offset: int
    size: int
    kind: str

    @property
    def is_hidden(self) -> bool:
        """Whether the launch fills it in, not the caller."""
        return self.kind.startswith("hidden_")

    @property
    def is_pointer(self) -> bool:
        return self.kind == "global_buffer"


@dataclass
class Kernel:
    """A parsed kernel. `entry` skips the code that loads arguments on firmware that does not preload them."""

    architecture: str
    name: str = ""
    instructions: list[Instruction] = field(default_factory=list)
    descriptor: dict[str, int] = field(default_factory=dict)
    arguments: list[Argument] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    entry: int = 0


def _strip(line: str) -> str:
    return line.split(";")[0].rstrip()


def _parse_instruction(line: str, number: int) -> Instruction:
    mnemonic, _, rest = line.strip().partition(" ")
    mnemonic, _, tail = mnemonic.partition("\t")
    match = _ENCODING.match(mnemonic)
    name, encoding = (match[1], match[2]) if match else (mnemonic, "")
    try:
        operands, modifiers = parse_operands(f"{tail} {rest}")
    except AssemblyError as error:
        raise AssemblyError(f"line {number}: {line.strip()}: {error}") from None
    return Instruction(mnemonic, name, encoding, operands, modifiers, number, " ".join(line.split()))


class _Reader:
    """Walks the lines once; each section has its own rule for what a line may be."""

    def __init__(self, architecture: str) -> None:
        self.kernel = Kernel(architecture)
        self.section = ".text"
        self.in_descriptor = False
        self.metadata: list[str] | None = None
        self.alignments: list[int] = []

    def read(self, number: int, raw: str) -> None:
        line = _strip(raw)
        word = line.split()[0] if line.strip() else ""
        if self.metadata is not None and word != ".end_amdgpu_metadata":
            self.metadata.append(raw)
        elif not word:
            return
        elif match := re.match(r"^([.\w$]+):", line):
            self.kernel.labels[match[1]] = len(self.kernel.instructions)
        elif word.startswith("."):
            self.directive(number, word, line)
        elif self.section == ".text":
            self.kernel.instructions.append(_parse_instruction(line, number))
        elif not self.section.startswith(SKIPPED_SECTIONS):
            raise AssemblyError(f"line {number}: {line.strip()}: data in section {self.section} is not implemented")

    def directive(self, number: int, word: str, line: str) -> None:
        rest = line.split(None, 1)[1] if len(line.split(None, 1)) > 1 else ""
        if word == ".section":
            self.section = rest.split(",")[0].strip('"')
        elif word == ".text":
            self.section = ".text"
        elif word == ".amdgpu_metadata":
            self.metadata = []
        elif word == ".end_amdgpu_metadata":
            self.kernel.arguments = list(_parse_arguments(self.metadata or []))
            self.metadata = None
        elif word == ".amdgcn_target":
            self.target(number, rest)
        elif word == ".amdhsa_kernel":
            self.kernel.name, self.in_descriptor = rest, True
        elif word == ".end_amdhsa_kernel":
            self.in_descriptor = False
        elif self.in_descriptor:
            self.descriptor(number, word.removeprefix(".amdhsa_"), rest)
        elif word == ".p2align" and self.section == ".text":
            self.alignments.append(len(self.kernel.instructions))
        elif word not in IGNORED_DIRECTIVES and not self.section.startswith(SKIPPED_SECTIONS):
            raise AssemblyError(f"line {number}: directive {word} is not implemented")

    def target(self, number: int, text: str) -> None:
        architecture = text.strip('"').rsplit("-", 1)[-1].split(":")[0]
        if architecture != self.kernel.architecture:
            raise AssemblyError(f"line {number}: the text is for {architecture}, not for {self.kernel.architecture}")

    def descriptor(self, number: int, key: str, text: str) -> None:
        if key not in _DESCRIPTOR:
            raise AssemblyError(f"line {number}: kernel descriptor entry {key} is not implemented")
        value = int(text, 0)
        if value != _REQUIRED.get(key, value):
            raise AssemblyError(f"line {number}: kernel descriptor entry {key} {value} is not implemented")
        self.kernel.descriptor[key] = value


def _parse_arguments(lines: Iterable[str]) -> Iterable[Argument]:
    """The .args list of the metadata: each entry begins with a dash and has .offset, .size and .value_kind."""
    entry: dict[str, str] = {}
    in_arguments, depth = False, 0
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.strip() == ".args:":
            in_arguments, depth = True, indent
            continue
        if in_arguments and (indent < depth or (indent == depth and not line.lstrip().startswith("-"))):
            break
        if not in_arguments:
            continue
        if line.lstrip().startswith("-") and entry:
            yield _argument(entry)
            entry = {}
        key, _, value = line.strip().removeprefix("- ").partition(":")
        entry[key] = value.strip()
    if entry:
        yield _argument(entry)


def _argument(entry: dict[str, str]) -> Argument:
    argument = Argument(int(entry[".offset"]), int(entry[".size"]), entry[".value_kind"])
    if argument.kind not in ("global_buffer", "by_value") and not argument.kind.startswith("hidden_"):
        raise AssemblyError(
            f"kernel argument at offset {argument.offset}: value kind {argument.kind} is not implemented"
        )
    return argument


def parse(text: str, architecture: str) -> Kernel:
    """The kernel in this text, which must hold exactly one. Raises AssemblyError on what is not implemented."""
    if architecture not in ARCHITECTURES:
        raise AssemblyError(f"architecture {architecture}: not one of {', '.join(ARCHITECTURES)}")
    reader = _Reader(architecture)
    for number, line in enumerate(text.splitlines(), 1):
        reader.read(number, line)
    kernel = reader.kernel
    for instruction in kernel.instructions:
        for operand in instruction.operands:
            if operand.kind == "label":
                if operand.value not in kernel.labels:
                    raise AssemblyError(f"{instruction}: label {operand.value} is not defined")
                instruction.target = kernel.labels[operand.value]
    if kernel.descriptor.get("user_sgpr_kernarg_preload_length"):
        kernel.entry = next((at for at in reader.alignments if at > 0), 0)
    return kernel
