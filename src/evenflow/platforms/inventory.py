"""The machine as it stands: GPUs with driver, clocks and power as the driver tells them, the CPU. No torch.

Read only: nothing here sets a clock or a limit. What cannot be read is left out, not guessed.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

QUERY = (
    "name",
    "driver_version",
    "clocks.current.sm",
    "clocks.current.memory",
    "clocks.max.sm",
    "power.limit",
    "temperature.gpu",
)
QUERY_TIMEOUT_S = 10
DRM = Path("/sys/class/drm")
CPU = Path("/sys/devices/system/cpu/cpu0/cpufreq")


def gpus() -> list[dict[str, Any]]:
    """One entry per GPU that a driver tells of, with what it tells."""
    return _queried() or _amd_devices(DRM)


def _queried() -> list[dict[str, Any]]:
    if (smi := shutil.which("nvidia-smi")) is None:
        return []
    command = [smi, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_query(answer)


def parse_query(answer: str) -> list[dict[str, Any]]:
    """The CSV lines of nvidia-smi -> entries by the names of QUERY."""
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.strip()]
    return [dict(zip(QUERY, row, strict=True)) for row in rows if len(row) == len(QUERY)]


def _amd_devices(drm: Path) -> list[dict[str, Any]]:
    found = []
    for device in sorted(drm.glob("card[0-9]*/device")):
        if _read(device / "vendor") != "0x1002":
            continue
        entry = {
            "name": _read(device / "product_name") or f"AMD device {_read(device / 'device')}",
            "driver_version": _read(Path("/sys/module/amdgpu/version")) or f"kernel {os.uname().release}",
            "clocks.current.sm": _active_clock(device / "pp_dpm_sclk"),
            "clocks.current.memory": _active_clock(device / "pp_dpm_mclk"),
            "power.limit": next((_watts(path) for path in sorted(device.glob("hwmon/*/power1_cap"))), None),
            "performance_level": _read(device / "power_dpm_force_performance_level"),
        }
        found.append({name: value for name, value in entry.items() if value})
    return found


def _active_clock(path: Path) -> str | None:
    """'1: 1700Mhz *' is the one in use."""
    match = re.search(r"^\d+:\s*(\S+)\s*\*", _read(path) or "", re.MULTILINE)
    return match[1] if match else None


def _watts(path: Path) -> str | None:
    text = _read(path)
    return f"{int(text) / 1e6:.2f} W" if text and text.isdigit() else None


def cpu() -> dict[str, Any]:
    """Name, cores that this process may use, clock and governor as found."""
    info = _read(Path("/proc/cpuinfo")) or ""
    name = re.search(r"model name\s*:\s*(.+)", info)
    mhz = [float(value) for value in re.findall(r"cpu MHz\s*:\s*([\d.]+)", info)]
    entry = {
        "name": name[1] if name else None,
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "mhz": round(sum(mhz) / len(mhz), 1) if mhz else None,
        "governor": _read(CPU / "scaling_governor"),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    return {name: value for name, value in entry.items() if value is not None}


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
