"""Facts about a machine without a GPU."""

import os

from evenflow.platforms.platform import Platform


def total_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory_bytes() -> int:
    """What the system says can be used without swapping, within the control group's limit where there is one."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 0
    try:
        with open("/proc/meminfo") as file:
            meminfo = dict(line.split(":") for line in file)
        available = int(meminfo["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        pass  # not Linux: the free pages are the best that is known
    return min(available, _cgroup_headroom_bytes() or available)


def _cgroup_headroom_bytes() -> int | None:
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = file.read().strip()
        with open("/sys/fs/cgroup/memory.current") as file:
            current = int(file.read())
    except OSError:
        return None
    return None if limit == "max" else max(int(limit) - current, 0)


def detect() -> Platform:
    return Platform(
        name="CPU",
        device="cpu",
        arch="cpu",
        warp_size=1,
        fp8_dtype=None,
        lds_bytes=0,
        supports_graphs=False,
        memory_bytes=total_memory_bytes(),
        default_dtype="float32",
    )
