"""The GPU architectures that kernels are compiled for, as data. Owns no decision: `gate` has the rules.

Sources: AMD's ISA documents and LLVM's AMDGPU subtargets, checked against the occupancy that LLVM prints; NVIDIA's
table of technical specifications per compute capability.
"""

import difflib
import re
from dataclasses import dataclass

KIB = 1024
MAX_BLOCKS = 32  # workgroups that a unit holds, on all of them


@dataclass(frozen=True, slots=True)
class Target:
    """One architecture. A unit is AMD's CU or NVIDIA's SM; its SIMDs are NVIDIA's sub-partitions.

    shared_bytes: limit of one workgroup (LDS, shared memory). shared_per_unit_bytes: what the workgroups of a unit
    share; each takes reserved_bytes on top of its own. num_registers: 32-bit registers that a SIMD has for each lane;
    a warp gets them in steps of register_granule, at most max_registers. max_warps: resident warps of a SIMD.
    matrix_dtypes: types, as TTIR spells them, whose dot belongs on the matrix units, even in IEEE precision; their
    mnemonics match matrix_pattern. fp8_dtype: the native 8-bit float, or None.
    """

    arch: str
    gpus: str
    backend: str
    warp_size: int
    shared_bytes: int
    shared_per_unit_bytes: int
    shared_granule_bytes: int
    reserved_bytes: int
    num_registers: int
    register_granule: int
    max_registers: int
    max_warps: int
    num_simds: int
    matrix_pattern: str
    matrix_dtypes: frozenset[str]
    fp8_dtype: str | None

    @property
    def is_amd(self) -> bool:
        return self.backend == "hip"

    @property
    def triton_arch(self) -> str | int:
        """As triton's GPUTarget spells it: "gfx942", or 90 for sm_90."""
        return self.arch if self.is_amd else int(self.arch.removeprefix("sm_"))

    def is_matrix(self, mnemonic: str) -> bool:
        """Does this instruction run on the matrix units?"""
        return re.match(self.matrix_pattern, mnemonic) is not None


LOW_PRECISION = frozenset({"f16", "bf16", "f8E4M3FN", "f8E4M3FNUZ", "f8E5M2", "f8E5M2FNUZ", "i8"})


def _cdna(arch: str, gpus: str, fp8_dtype: str | None, lds_kib: int = 64, lds_granule: int = 512) -> Target:
    return Target(
        arch=arch,
        gpus=gpus,
        backend="hip",
        warp_size=64,
        shared_bytes=lds_kib * KIB,
        shared_per_unit_bytes=lds_kib * KIB,
        shared_granule_bytes=lds_granule,
        reserved_bytes=0,
        num_registers=512,
        register_granule=8,
        max_registers=512,
        max_warps=8,
        num_simds=4,
        matrix_pattern=r"v_s?mfma",
        matrix_dtypes=LOW_PRECISION | {"f32", "f64"},
        fp8_dtype=fp8_dtype,
    )


def _rdna(arch: str, gpus: str, fp8_dtype: str | None) -> Target:
    return Target(
        arch=arch,
        gpus=gpus,
        backend="hip",
        warp_size=32,
        shared_bytes=64 * KIB,
        shared_per_unit_bytes=64 * KIB,
        shared_granule_bytes=1024,
        reserved_bytes=0,
        num_registers=1536,
        register_granule=24,
        max_registers=256,
        max_warps=16,
        num_simds=2,
        matrix_pattern=r"v_s?wmma",
        matrix_dtypes=LOW_PRECISION,
        fp8_dtype=fp8_dtype,
    )


def _cuda(arch: str, gpus: str, fp8_dtype: str | None, shared_kib: int) -> Target:
    return Target(
        arch=arch,
        gpus=gpus,
        backend="cuda",
        warp_size=32,
        shared_bytes=shared_kib * KIB,
        shared_per_unit_bytes=(shared_kib + 1) * KIB,
        shared_granule_bytes=128,
        reserved_bytes=KIB,
        num_registers=512,
        register_granule=8,
        max_registers=255,
        max_warps=16,
        num_simds=4,
        matrix_pattern=r"(UTC)?[A-Z]G?MMA\b(?!_)",
        matrix_dtypes=LOW_PRECISION | {"f64"},
        fp8_dtype=fp8_dtype,
    )


TARGETS: dict[str, Target] = {
    target.arch: target
    for target in (
        _cdna("gfx90a", "MI210, MI250X", None),
        _cdna("gfx942", "MI300X, MI325X", "f8E4M3FNUZ"),
        _cdna("gfx950", "MI350X, MI355X", "f8E4M3FN", lds_kib=160, lds_granule=1280),
        _rdna("gfx1100", "RX 7900, W7900", None),
        _rdna("gfx1201", "RX 9070, R9700", "f8E4M3FN"),
        _cuda("sm_80", "A100", None, 163),
        _cuda("sm_90", "H100, H200", "f8E4M3FN", 227),
        _cuda("sm_100", "B200", "f8E4M3FN", 227),
    )
}


def find_target(arch: str) -> Target:
    """The target of that name. Raises ValueError with the nearest name."""
    if arch in TARGETS:
        return TARGETS[arch]
    near = difflib.get_close_matches(arch, TARGETS, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"target {arch!r} is not known; {hint}Targets are {', '.join(TARGETS)}")


def occupancy(target: Target, num_registers: int, shared_bytes: int, num_warps: int) -> int:
    """Warps that a SIMD holds at once, when each has `num_registers` a lane. 0: the kernel cannot start."""
    if shared_bytes > target.shared_bytes or num_registers > target.max_registers:
        return 0
    allocated = max(_round_up(num_registers, target.register_granule), target.register_granule)
    warps = min(target.num_registers // allocated, target.max_warps)
    num_blocks = min(warps * target.num_simds // num_warps, MAX_BLOCKS)
    taken_bytes = _round_up(shared_bytes, target.shared_granule_bytes) + target.reserved_bytes
    if taken_bytes:
        num_blocks = min(num_blocks, target.shared_per_unit_bytes // taken_bytes)
    return -(-num_blocks * num_warps // target.num_simds)


def _round_up(amount: int, step: int) -> int:
    return -(-amount // step) * step
