"""What a result was measured on: hardware, driver, clocks as found, versions, commit, command. No torch."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import evenflow
from evenflow.platforms import inventory

PACKAGES = ("torch", "triton", "numpy", "transformers", "httpx", "tokenizers", "vllm")


def manifest() -> dict[str, Any]:
    """JSON. Clocks and load are those of this moment, so call it before the work."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["evenflow", *sys.argv[1:]]),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"evenflow": evenflow.__version__, **_versions()},
        "commit": commit(),
        "gpus": inventory.gpus(),
        "cpu": inventory.cpu(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the source tree that runs, with "-dirty" where it was changed; None for an installed package."""
    root = Path(evenflow.__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def machine_name(found: dict[str, Any]) -> str:
    """'2 x NVIDIA H100 80GB HBM3' or the CPU, of a manifest."""
    names = [gpu.get("name", "GPU") for gpu in found.get("gpus", [])]
    if names:
        return f"{len(names)} x {names[0]}" if len(names) > 1 else str(names[0])
    cpu = found.get("cpu", {})
    return f"{cpu.get('name', 'CPU')}, {cpu.get('num_cores', '?')} cores"
