"""What is on this machine and what keeps it from being used: facts first, then small checks over them."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evenflow import __version__
from evenflow.demo import MODEL_DIR
from evenflow.platforms.cpu import available_memory_bytes, total_memory_bytes

MIN_TORCH, BELOW_TORCH = (2, 9), (2, 14)
MIN_FREE_BYTES = 2**30
DRIVER_VERSIONS = {
    "nvidia": ("/proc/driver/nvidia/version", r"\s(\d+\.\d+(?:\.\d+)?)\s"),
    "amdgpu": ("/sys/module/amdgpu/version", r"(\S+)"),
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found. has_*: whether the hardware's driver is there; gpus: those that PyTorch can use."""

    python: str = ""
    machine: str = ""
    num_cores: int = 0
    total_memory_bytes: int = 0
    available_memory_bytes: int = 0
    torch: str | None = None
    torch_build: str = ""  # "cpu", "cuda 13.0" or "rocm 7.0"
    torch_error: str | None = None
    triton: str | None = None
    has_nvidia: bool = False
    has_amd: bool = False
    unreadable_devices: tuple[str, ...] = ()
    driver: str = ""
    gpus: tuple[str, ...] = ()
    gpus_without_peer: tuple[tuple[int, int], ...] = ()
    missing_demo_files: tuple[str, ...] = field(default=())

    def lines(self) -> Iterator[tuple[str, str]]:
        """Name and value of each fact, for people."""
        gib = 2**30
        yield "evenflow", __version__
        yield "python", self.python
        yield "machine", f"{self.machine}, {self.num_cores} cores"
        yield (
            "memory",
            f"{self.available_memory_bytes / gib:.1f} GiB free of {self.total_memory_bytes / gib:.1f} GiB",
        )
        yield "torch", f"{self.torch} ({self.torch_build})" if self.torch else "not installed"
        yield "triton", self.triton or "not installed (needed on GPUs only, where torch brings it)"
        yield "driver", self.driver or "no GPU driver"
        yield "GPUs", ", ".join(self.gpus) or "none that PyTorch sees"


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and the command or step that mends it."""

    what: str
    fix: str


def checkup(facts: Facts) -> list[Problem]:
    """Everything that is wrong, the most fundamental first."""
    checks = (_torch, _nvidia_wheel, _amd_wheel, _device_access, _peers, _memory, _demo)
    return [problem for check in checks if (problem := check(facts)) is not None]


def _torch(facts: Facts) -> Problem | None:
    if facts.torch is None:
        return Problem("PyTorch is not installed", "pip install torch==2.13.0")
    if facts.torch_error:
        return Problem(
            f"PyTorch {facts.torch} cannot be imported: {facts.torch_error}",
            "reinstall it: pip install --force-reinstall torch==2.13.0",
        )
    version = tuple(int(part) for part in re.findall(r"\d+", facts.torch)[:2])
    if not MIN_TORCH <= version < BELOW_TORCH:
        return Problem(f"PyTorch {facts.torch} is outside 2.9 to 2.13", "pip install 'torch>=2.9,<2.14'")
    return None


def _nvidia_wheel(facts: Facts) -> Problem | None:
    if facts.has_nvidia and facts.torch and not facts.torch_build.startswith("cuda"):
        return Problem(
            f"there is an NVIDIA GPU, but this PyTorch is built for {facts.torch_build}",
            "pip install --force-reinstall torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130",
        )
    return None


def _amd_wheel(facts: Facts) -> Problem | None:
    if facts.has_amd and not facts.has_nvidia and facts.torch and not facts.torch_build.startswith("rocm"):
        return Problem(
            f"there is an AMD GPU, but this PyTorch is built for {facts.torch_build}",
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/rocm7.0 "
            "(pytorch.org lists the newest)",
        )
    return None


def _device_access(facts: Facts) -> Problem | None:
    if facts.has_amd and facts.unreadable_devices:
        return Problem(
            f"no access to {', '.join(facts.unreadable_devices)}",
            "sudo usermod -a -G render,video $USER, then log in again",
        )
    return None


def _peers(facts: Facts) -> Problem | None:
    if facts.gpus_without_peer:
        pairs = ", ".join(f"{a} and {b}" for a, b in facts.gpus_without_peer)
        return Problem(
            f"GPUs {pairs} cannot read each other's memory, so several GPUs are slow together",
            "switch off the IOMMU or ACS in the firmware, or use GPUs on one PCIe switch",
        )
    return None


def _memory(facts: Facts) -> Problem | None:
    if facts.available_memory_bytes < MIN_FREE_BYTES:
        return Problem(
            f"only {facts.available_memory_bytes / 2**20:.0f} MiB of memory are free",
            "close other programs, or set a small cache: --kv-cache-memory 256MiB",
        )
    return None


def _demo(facts: Facts) -> Problem | None:
    if facts.missing_demo_files:
        return Problem(
            f"the demo model lacks {', '.join(facts.missing_demo_files)}", "pip install --force-reinstall evenflow"
        )
    return None


def collect() -> Facts:
    """Look at this machine. Imports torch, if it is there, to see what it sees."""
    has_nvidia = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    has_amd = Path("/dev/kfd").exists()
    torch_version = _version("torch")
    seen: dict[str, Any] = _torch_facts() if torch_version else {}
    return Facts(
        python=platform.python_version(),
        machine=_cpu_name(),
        num_cores=os.cpu_count() or 0,
        total_memory_bytes=total_memory_bytes(),
        available_memory_bytes=available_memory_bytes(),
        torch=torch_version,
        triton=_version("triton") or _version("pytorch-triton-rocm"),
        has_nvidia=has_nvidia,
        has_amd=has_amd,
        unreadable_devices=_unreadable_devices() if has_amd else (),
        driver=_driver(),
        missing_demo_files=tuple(
            name for name in ("config.json", "tokenizer.json", "model.safetensors") if not (MODEL_DIR / name).is_file()
        ),
        **seen,
    )


def _torch_facts() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken installation fails in many ways
        return {"torch_build": "unknown", "torch_error": str(error).splitlines()[0] if str(error) else repr(error)}
    hip, cuda = torch.version.hip, torch.version.cuda
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    return {
        "torch_build": f"rocm {hip}" if hip else f"cuda {cuda}" if cuda else "cpu",
        "gpus": tuple(torch.cuda.get_device_name(i) for i in range(count)),
        "gpus_without_peer": tuple(p for p in pairs if not torch.cuda.can_device_access_peer(*p)),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unreadable_devices() -> tuple[str, ...]:
    nodes = [Path("/dev/kfd"), *sorted(Path("/dev/dri").glob("renderD*"))]
    return tuple(str(node) for node in nodes if not os.access(node, os.R_OK | os.W_OK))


def _driver() -> str:
    for name, (path, pattern) in DRIVER_VERSIONS.items():
        try:
            if match := re.search(pattern, Path(path).read_text()):
                return f"{name} {match[1]}"
        except OSError:
            continue
    if (smi := shutil.which("nvidia-smi")) is None:
        return ""
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi does not answer"
    return f"nvidia {answer.splitlines()[0]}" if answer.strip() else ""


def _cpu_name() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()
