"""Facts about the GPU that PyTorch sees, of either vendor."""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from evenflow.platforms.platform import Platform
from evenflow.platforms.specs import match_device

T = TypeVar("T")
KIB = 1024
# Longest prefix wins. Shared memory that one workgroup may take, and the 8-bit float of the matrix units.
LDS_BYTES = {
    "gfx950": 160 * KIB,
    "gfx": 64 * KIB,
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "sm_": 48 * KIB,
}
FP8_DTYPES = {
    "gfx942": "float8_e4m3fnuz",
    "gfx950": "float8_e4m3fn",
    "gfx12": "float8_e4m3fn",
    "sm_89": "float8_e4m3fn",
    "sm_90": "float8_e4m3fn",
    "sm_10": "float8_e4m3fn",
    "sm_12": "float8_e4m3fn",
}
PEER_SUM_SIZES: dict[str, tuple[int, ...]] = {"sm_90": (2,)}  # of two H200: docs/tensor-parallel.md


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What PyTorch says of a GPU. hip_arch: as in "gfx942:sramecc+:xnack-", None where it is CUDA."""

    name: str
    memory_bytes: int
    warp_size: int
    capability: tuple[int, int]
    hip_arch: str | None
    num_devices: int = 1


def detect() -> Platform | None:
    """The first GPU's platform, or None where PyTorch sees none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return platform_of(
        DeviceFacts(
            name=properties.name,
            memory_bytes=properties.total_memory,
            warp_size=properties.warp_size,
            capability=(properties.major, properties.minor),
            hip_arch=properties.gcnArchName if torch.version.hip else None,
            num_devices=torch.cuda.device_count(),
        )
    )


def fp8_dtype_of(arch: str) -> str | None:
    """torch's name of the 8-bit float that an architecture converts in hardware."""
    return _by_prefix(FP8_DTYPES, arch)


def driver_version() -> str:
    """Of the kernel's module; for one that came with the kernel, the kernel's."""
    for module in ("nvidia", "amdgpu"):
        try:
            return Path(f"/sys/module/{module}/version").read_text().strip()
        except OSError:
            pass  # not this one, or without a version of its own
    return platform.release()


def platform_of(facts: DeviceFacts) -> Platform:
    """A pure function of the facts."""
    arch = facts.hip_arch.split(":")[0] if facts.hip_arch else "sm_{}{}".format(*facts.capability)
    specs = match_device(facts.name)
    return Platform(
        name=facts.name,
        device="cuda",
        arch=arch,
        warp_size=facts.warp_size,
        fp8_dtype=fp8_dtype_of(arch),
        lds_bytes=_by_prefix(LDS_BYTES, arch) or 48 * KIB,
        supports_graphs=True,
        memory_bytes=facts.memory_bytes,
        default_dtype="bfloat16",
        specs=specs.key if specs else None,
        num_devices=facts.num_devices,
        peer_sum_sizes=_by_prefix(PEER_SUM_SIZES, arch) or (),
    )


def _by_prefix(table: dict[str, T], arch: str) -> T | None:
    matches = [prefix for prefix in table if arch.startswith(prefix)]
    return table[max(matches, key=len)] if matches else None
