"""Reading what a compiler made: machine code of AMD and NVIDIA, and the IR it came from. Pure functions of text.

The machine code says what will run: instructions, registers, spills. The LLVM IR still knows which load belongs to
which argument of the kernel, so the widths per argument come from there.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

AMD_INSTRUCTION = re.compile(r"^\t(([a-z]+_[a-z0-9_]+)\b[^;\n]*)", re.MULTILINE)
SASS_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+((?:\{ *)?(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)[^;]*)")
AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)")
SASS_ACCESS = re.compile(r"(LDG|STG|LDGSTS)\.([A-Z0-9.]+)")
AMD_BYTES = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2}
PTXAS_ROUTINE = re.compile(r"ptxas\S* info +: (?!\(C)|\s*\d+ bytes stack frame|\s*$")
DOT = re.compile(r"\btt\.dot(?:_scaled)? (?:[^\n]*?inputPrecision = (\w+))?[^\n]*?: tensor<(?:\d+x)*(\w+)>")
IR_VALUE = re.compile(r"%[\w.]+")
IR_ASSIGNMENT = re.compile(r"^\s*(%[\w.]+) = (.*)$")
# Inline assembly starts lines by \0A\09, so no word boundary stands before the mnemonic.
SHARED_STORE = re.compile(r"^\s*store .*, ptr addrspace\(3\) |(?<![a-z])st\.shared\b")
SHARED_LOAD = re.compile(r"^load .*, ptr addrspace\(3\) |(?<![a-z])ld\.shared\b")
MEMORY_ACCESS = re.compile(r"(^| )(load|store|atomicrmw|cmpxchg) |\.load|(?<![a-z])(ld\.|atom\.)|cp\.async")
UNTRACED = "?"
IR_TYPE_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}


@dataclass(frozen=True, slots=True)
class Dot:
    """A tl.dot of the source: the type of its left operand as TTIR spells it, and the precision if not IEEE."""

    dtype: str
    precision: str


@dataclass(frozen=True, slots=True)
class Code:
    """What the machine code alone tells.

    registers: 32-bit vector registers of a lane, those for accumulation included (accumulators). spills: registers that
    went to memory or to other lanes. scratch_bytes: stack of a lane. matrix: instructions by mnemonic. loads, stores:
    accesses of global memory by bytes per lane. code_hash: of the instructions, without debug information and paths.
    """

    registers: int
    accumulators: int
    scalar_registers: int
    spills: int
    scratch_bytes: int
    static_shared_bytes: int
    num_instructions: int
    mnemonics: dict[str, int]
    loads: dict[int, int]
    stores: dict[int, int]
    code_hash: str


def read_amdgcn(assembly: str) -> Code:
    """The amdgcn text that triton keeps. Raises ValueError where its metadata is missing."""
    instructions = [(match[2], match[1]) for match in AMD_INSTRUCTION.finditer(assembly)]
    mnemonics = Counter(mnemonic for mnemonic, _ in instructions)
    loads, stores = _accesses(mnemonics, AMD_ACCESS, _amd_bytes)
    return Code(
        registers=_amd_number(assembly, "vgpr_count"),
        accumulators=_amd_number(assembly, "agpr_count", missing=0),
        scalar_registers=_amd_number(assembly, "sgpr_count"),
        spills=_amd_number(assembly, "vgpr_spill_count") + _amd_number(assembly, "sgpr_spill_count"),
        scratch_bytes=_amd_number(assembly, "private_segment_fixed_size"),
        static_shared_bytes=_amd_number(assembly, "group_segment_fixed_size"),
        num_instructions=len(instructions),
        mnemonics=dict(mnemonics),
        loads=loads,
        stores=stores,
        code_hash=_hash(text for _, text in instructions),
    )


def _amd_number(assembly: str, key: str, missing: int | None = None) -> int:
    match = re.search(rf"^\s+(?:- )?\.{key}:\s*(\d+)", assembly, re.MULTILINE)
    if match is None and missing is None:
        raise ValueError(f"the metadata of the AMD assembly lacks .{key}")
    return int(match[1]) if match else missing or 0


def _amd_bytes(suffix: str) -> int:
    """Of dwordx4, b128, ushort, short_d16_hi: bytes."""
    if match := re.match(r"dwordx(\d+)", suffix):
        return 4 * int(match[1])
    if match := re.search(r"(?:^|_)[bui](\d+)(?:_w\d+)?$", suffix):
        return int(match[1]) // 8
    return AMD_BYTES.get(suffix.split("_")[0], 4)


def read_sass(sass: str, usage: str) -> Code:
    """nvdisasm's text and `cuobjdump -res-usage`'s. Raises ValueError where the usage is missing."""
    # Padding to whole cache lines is no work.
    found = [(match[2], match[1]) for match in SASS_INSTRUCTION.finditer(sass) if match[2] != "NOP"]
    mnemonics = Counter(mnemonic for mnemonic, _ in found)
    loads, stores = _accesses(mnemonics, SASS_ACCESS, _sass_bytes)
    return Code(
        registers=_usage_number(usage, "REG"),
        accumulators=0,
        scalar_registers=0,
        spills=sum(count for name, count in mnemonics.items() if re.match(r"(LDL|STL)\b", name)),
        scratch_bytes=_usage_number(usage, "STACK") + _usage_number(usage, "LOCAL"),
        static_shared_bytes=_usage_number(usage, "SHARED"),
        num_instructions=len(found),
        mnemonics=dict(mnemonics),
        loads=loads,
        stores=stores,
        code_hash=_hash(text for _, text in found),
    )


def _usage_number(usage: str, key: str) -> int:
    match = re.search(rf"\b{key}:(\d+)", usage)
    if match is None:
        raise ValueError(f"cuobjdump -res-usage does not say {key}: {usage.strip()[:200]!r}")
    return int(match[1])


def _sass_bytes(suffix: str) -> int:
    """Of E.128, E.U16, E.BYPASS.128, E.ENL2.256: bytes; 4 where no width is named."""
    widths = [int(part.lstrip("US")) for part in suffix.split(".") if re.fullmatch(r"[US]?(8|16|32|64|128|256)", part)]
    return widths[0] // 8 if widths else 4


def _accesses(
    mnemonics: Counter[str], pattern: re.Pattern[str], num_bytes: Callable[[str], int]
) -> tuple[dict[int, int], dict[int, int]]:
    """How many loads and stores of global memory, by bytes per lane."""
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for mnemonic, count in mnemonics.items():
        if match := pattern.match(mnemonic):
            widths = stores if match[1] in ("store", "STG") else loads
            widths[num_bytes(match[2])] += count
    return dict(loads), dict(stores)


def _hash(lines: Iterable[str]) -> str:
    text = "\n".join(re.sub(r"\s+", " ", line).strip() for line in lines)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def ptxas_complaints(log: str) -> str:
    """The lines of ptxas's log that are no routine: warnings, and advice such as "wgmma ... are serialized"."""
    return "\n".join(line.strip() for line in log.splitlines() if not PTXAS_ROUTINE.match(line))


def read_dots(ttir: str) -> list[Dot]:
    """Every tl.dot of the source, from TTIR."""
    return [Dot(match[2], match[1] or "ieee") for match in DOT.finditer(ttir)]


def loads_per_argument(llir: str, arguments: list[str]) -> dict[str, dict[int, int]]:
    """For each pointer argument of the kernel: how many loads of how many bytes per lane.

    arguments: names of the run-time arguments in order. A load belongs to the arguments that its address was computed
    from; what was loaded (a block table's entry) does not count as an origin of the addresses that it helps to compute.
    Loads of an address that could not be traced are listed under UNTRACED.
    """
    parameters, body = _kernel_of(llir)
    origins = {
        value: frozenset([name] if is_pointer else [])
        for (is_pointer, value), name in zip(parameters, arguments, strict=False)  # triton appends arguments of its own
    }
    lines = [_Line.parse(line) for line in body.splitlines()]
    while _spread(lines, origins):
        pass
    found: dict[str, Counter[int]] = {}
    for line in lines:
        if line.load_bytes:
            for name in sorted(line.origin(origins)) or [UNTRACED]:
                found.setdefault(name, Counter())[line.load_bytes] += 1
    return {name: dict(widths) for name, widths in found.items()}


def _spread(lines: "list[_Line]", origins: dict[str, frozenset[str]]) -> bool:
    """One pass over the code; True when a value gained an origin, as those that go round a loop do."""
    changed = False
    for line in lines:
        if line.result and not line.is_memory_access:
            known = origins.get(line.result, frozenset())
            origins[line.result] = known | line.origin(origins)
            changed = changed or origins[line.result] != known
    return changed


def _kernel_of(llir: str) -> tuple[list[tuple[bool, str]], str]:
    """(parameters as (is it a pointer?, name), body) of the first function with a body."""
    match = re.search(r"^define [^(]*\(([^\n]*)\{\n(.*?)^\}", llir, re.MULTILINE | re.DOTALL)
    if match is None:
        raise ValueError("the LLVM IR has no function")
    parameters = re.findall(r"([^%]*)(%[\w.]+)", match[1])
    return [(re.search(r"\bptr\b", declaration) is not None, name) for declaration, name in parameters], match[2]


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of LLVM IR: what it defines, what it reads, and the bytes per lane if it loads global memory."""

    result: str
    operands: tuple[str, ...]
    is_memory_access: bool
    load_bytes: int

    @staticmethod
    def parse(line: str) -> "_Line":
        match = IR_ASSIGNMENT.match(line)
        result, code = (match[1], match[2]) if match else ("", line)
        code, _, place = code.partition(", !dbg")
        operands = tuple(IR_VALUE.findall(code))
        # Addresses may change lanes by way of shared memory: what one source line stores there, it loads again.
        if SHARED_STORE.search(code):
            return _Line(f"shared memory at {place}", operands, is_memory_access=False, load_bytes=0)
        if SHARED_LOAD.search(code):
            return _Line(result, (f"shared memory at {place}",), is_memory_access=False, load_bytes=0)
        return _Line(result, operands, MEMORY_ACCESS.search(code) is not None, _load_bytes(code))

    def origin(self, origins: dict[str, frozenset[str]]) -> frozenset[str]:
        return frozenset().union(*(origins.get(value, frozenset()) for value in self.operands))


def _load_bytes(code: str) -> int:
    """Bytes per lane that a line of LLVM IR loads from global memory; 0 if it loads none."""
    if "ptr addrspace(4)" in code:  # AMD's constants, such as the size of the grid
        return 0
    if match := re.match(r"load (?:volatile )?(.*?), ptr", code):
        return _type_bytes(match[1])
    if match := re.search(r"\.load(?:\.async)?(?:\.to)?\.lds\S*\(.*?i32 (\d+)", code):
        return int(match[1])
    if match := re.search(r"call (?:\w+ )*?(<[^>]*>|\w+) @llvm\.amdgcn\.(?:raw|struct)\.(?:ptr\.)?buffer\.load", code):
        return _type_bytes(match[1])
    if match := re.search(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x[0-9a-f]+|\d+)", code):
        return int(match[1], 0)
    if match := re.search(r"ld\.global(?!\.nc\.L2::prefetch)[\w.:]*?(?:\.v(\d))?\.[bufs](\d+)", code):
        return int(match[1] or 1) * int(match[2]) // 8
    return 0


def _type_bytes(name: str) -> int:
    """Of `<8 x bfloat>`, `i32`, `float`: bytes."""
    if match := re.fullmatch(r"<(\d+) x (\S+)>", name):
        return int(match[1]) * _type_bytes(match[2])
    bits = int(name[1:]) if re.fullmatch(r"i\d+", name) else IR_TYPE_BITS.get(name, 0)
    return bits // 8
