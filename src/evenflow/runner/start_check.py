"""The self-check of a device's kernels at start: when it is due, what it says, and the memory of what was right.

A version of the kernels that was right on a GPU, with a driver, a PyTorch and a Triton, stays so: that is kept in
kernel_checks.json in the user's cache directory, and checked again when any of these changes.
"""

import dataclasses
import hashlib
import json
import logging
import os
import time
from pathlib import Path

import msgspec
import torch

import evenflow.kernels
from evenflow import __version__
from evenflow.kernels.language import current_arch, triton_version
from evenflow.kernels.self_check import CheckedShape, KernelError, check_kernels
from evenflow.platforms.gpu import driver_version

MAX_ENTRIES = 64  # the oldest are forgotten

logger = logging.getLogger("evenflow")


@dataclasses.dataclass(frozen=True, slots=True)
class Passed:
    """A check that found nothing wrong. worst: the kernel whose error is the largest share of what is allowed."""

    facts: dict[str, str]
    num_comparisons: int
    worst: str
    worst_share: float


def check_at_start(shape: CheckedShape, device: torch.device, directory: Path | None = None) -> str:
    """Have every kernel compared with its reference, or remember that it was. Returns, and logs, a line about it.

    "" where no kernel runs. Raises KernelError that names the kernel, its error, and what it ran on. directory: of the
    memory, if it is not the user's.
    """
    facts = device_facts(device)
    if facts is None:
        return ""
    facts |= {"evenflow": __version__, "kernels": sources_hash(Path(evenflow.kernels.__path__[0]))}
    facts |= {"shape": json.dumps(dataclasses.asdict(shape))}
    path = (directory or cache_directory()) / "kernel_checks.json"
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    known = _read(path)
    if (passed := known.get(key)) is not None:
        line = f"{_describe(passed)} (cached)"
    else:
        start_s = time.perf_counter()
        passed = _check(shape, device, facts)
        _write(path, known | {key: passed})
        line = f"{_describe(passed)} ({time.perf_counter() - start_s:.1f} s)"
    logger.info("%s", line)
    return line


def _describe(passed: Passed) -> str:
    return (
        f"kernels: {passed.num_comparisons} comparisons with their references are right on {passed.facts['gpu']}, "
        f"the worst is {passed.worst} with {passed.worst_share:.0%} of the allowed error"
    )


def _check(shape: CheckedShape, device: torch.device, facts: dict[str, str]) -> Passed:
    place = f"on {facts['gpu']} ({facts['arch']}, Triton {facts['triton']}), for {shape}"
    way_out = "Use another version of PyTorch and Triton, or device='cpu'"
    try:
        found = check_kernels(shape, device)
    except KernelError as error:
        raise KernelError(f"{error} {place}. {way_out}") from error.__cause__
    for comparison in found:
        if not comparison.is_right:
            raise KernelError(
                f"kernel {comparison.kernel} computes something else than its reference {place}: its error is "
                f"{comparison.error:.3g}, {comparison.bound:.3g} is allowed. The text would be wrong. {way_out}"
            )
    worst = max(found, key=lambda comparison: comparison.error / (comparison.bound or 1.0))
    return Passed(facts, len(found), worst.kernel, worst.error / (worst.bound or 1.0))


def device_facts(device: torch.device) -> dict[str, str] | None:
    """What the kernels' results depend on beside their sources; None where no kernel runs."""
    if device.type != "cuda":
        return None
    return {
        "gpu": torch.cuda.get_device_properties(device).name,
        "arch": current_arch(),
        "driver": driver_version(),
        "torch": str(torch.__version__),
        "triton": triton_version(),
    }


def sources_hash(directory: Path) -> str:
    """Of every Python file in it."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.py")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/evenflow, or ~/.cache/evenflow."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "evenflow"


def _read(path: Path) -> dict[str, Passed]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Passed])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        logger.warning("%s is ignored: %s", path, error)
        return {}


def _write(path: Path, entries: dict[str, Passed]) -> None:
    """In one piece: other processes may read, and write, at the same time."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(msgspec.json.encode(dict(list(entries.items())[-MAX_ENTRIES:])))
        part.replace(path)
    except OSError as error:
        logger.warning("%s cannot be written, so the kernels are checked at every start: %s", path, error)
