"""Run one compiled kernel on the simulator: arguments in, results written back, a report out. The way in to this
package.

Pointers are numpy arrays or torch tensors; each storage gets an allocation of its own, and what the kernel wrote is
copied back. Every access is checked; a kernel that does something wrong raises one of the errors in `errors`.
"""

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from evenflow.crosscheck.cdna.dataflow import analyse
from evenflow.crosscheck.cdna.decode import decode
from evenflow.crosscheck.cdna.errors import SimulationError
from evenflow.crosscheck.cdna.floats import Array
from evenflow.crosscheck.cdna.launch import Launch
from evenflow.crosscheck.cdna.machine import WAVE
from evenflow.crosscheck.cdna.memory import ALIGNMENT, GUARD_BYTES, Allocation, GlobalMemory, Traffic
from evenflow.crosscheck.cdna.operation import Step
from evenflow.crosscheck.cdna.parser import Argument, Kernel, parse
from evenflow.crosscheck.cdna.waits import check_waits

LDS_LIMIT_BYTES = {"gfx90a": 64 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10}
MAX_WARPS = 16
_INTEGERS = {1: "B", 2: "H", 4: "I", 8: "Q"}
_FLOATS = {4: "f", 8: "d"}


@dataclass(frozen=True)
class RunReport:
    """What a run did. counts: wave instructions executed, by mnemonic."""

    counts: Counter[str]
    traffic: Traffic
    num_waves: int

    @property
    def num_instructions(self) -> int:
        """Wave instructions executed, over all waves."""
        return sum(self.counts.values())


@lru_cache(maxsize=64)
def prepare(assembly: str, architecture: str) -> tuple[Kernel, list[Step]]:
    """Parse and bind a kernel's text, and find out from which argument each of its addresses comes. Cached by text."""
    kernel = parse(assembly, architecture)
    steps = decode(kernel)
    analyse(kernel, steps)
    return kernel, steps


def _storage_bytes(argument: Any) -> tuple[Array, int]:
    """(uint8 view of the whole storage, the first element's offset in it) of an array or tensor."""
    if isinstance(argument, np.ndarray):
        whole = argument
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        flat = whole.reshape(-1)
        if not np.shares_memory(flat, whole) and whole.size:
            raise ValueError("a pointer argument's array must be contiguous, or a view of a contiguous one")
        start = argument.__array_interface__["data"][0] - flat.__array_interface__["data"][0]
        return flat.view(np.uint8), start
    import torch

    if not isinstance(argument, torch.Tensor) or argument.device.type != "cpu":
        raise TypeError(f"a pointer argument must be a numpy array or a CPU tensor, not {type(argument).__name__}")
    raw = torch.empty(0, dtype=torch.uint8).set_(argument.untyped_storage())
    return raw.numpy(), int(argument.storage_offset()) * argument.element_size()


def _describe(position: int, argument: Any) -> str:
    dtype = str(argument.dtype).removeprefix("torch.")
    return f"argument {position} ({dtype} {list(argument.shape)})"


def _upload(memory: GlobalMemory, pointers: dict[int, tuple[Array, int]], args: Sequence[Any]) -> dict[int, Allocation]:
    """One allocation for each storage; arguments that share a storage share its allocation."""
    by_storage: dict[int, list[int]] = {}
    for position, (data, _) in pointers.items():
        key = data.__array_interface__["data"][0] if data.size else -1 - position
        by_storage.setdefault(key, []).append(position)
    blocks = {}
    for positions in by_storage.values():
        data, name = (
            pointers[positions[0]][0],
            " and ".join(_describe(position, args[position]) for position in positions),
        )
        block = memory.allocate(data, name, tuple(positions))
        blocks.update(dict.fromkeys(positions, block))
    return blocks


def _pack(declared: Argument, value: Any) -> bytes:
    """A by-value argument's bytes."""
    if isinstance(value, float):
        if declared.size not in _FLOATS:
            raise ValueError(f"kernel argument at offset {declared.offset}: {declared.size} bytes cannot hold a float")
        return struct.pack(f"<{_FLOATS[declared.size]}", value)
    if not isinstance(value, (int, np.integer)):
        raise TypeError(f"kernel argument at offset {declared.offset} is a number, not {type(value).__name__}")
    bits = 8 * declared.size
    if not -(1 << (bits - 1)) <= value < 1 << bits:
        raise ValueError(f"kernel argument at offset {declared.offset}: {value} does not fit {declared.size} bytes")
    return struct.pack(f"<{_INTEGERS[declared.size]}", int(value) & ((1 << bits) - 1))


def _hidden_values(grid: Sequence[int], num_warps: int) -> dict[str, int]:
    """What the launch tells the kernel unasked. Everything else of that kind is 0: a null pointer, if it is one."""
    group_sizes = (num_warps * WAVE, 1, 1)
    counts = {f"hidden_block_count_{axis}": size for axis, size in zip("xyz", grid, strict=True)}
    sizes = {f"hidden_group_size_{axis}": size for axis, size in zip("xyz", group_sizes, strict=True)}
    return {**counts, **sizes, "hidden_grid_dims": 1}


def _argument_segment(kernel: Kernel, args: Sequence[Any], addresses: dict[int, int], hidden: dict[str, int]) -> Array:
    """The bytes that the kernel finds its arguments in. Trailing pointers that the caller does not give are null."""
    declared = [item for item in kernel.arguments if not item.is_hidden]
    if len(args) > len(declared) or not all(item.is_pointer for item in declared[len(args) :]):
        raise ValueError(f"{kernel.name} takes {len(declared)} arguments, {len(args)} were given")
    ends = (item.offset + item.size for item in kernel.arguments)
    size = max(kernel.descriptor.get("kernarg_size", 0), *ends)
    segment = np.zeros(-(-max(size, 1) // 64) * 64, np.uint8)
    for position, item in enumerate(kernel.arguments):
        if item.is_hidden:
            raw = _pack(item, hidden.get(item.kind, 0))
        elif item.is_pointer:
            raw = struct.pack("<Q", addresses.get(position, 0))
        else:
            raw = _pack(item, args[position])
        segment[item.offset : item.offset + item.size] = np.frombuffer(raw, np.uint8)
    return segment


def _check_launch(kernel: Kernel, grid: Sequence[int], num_warps: int, lds_bytes: int) -> None:
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"grid {tuple(grid)}: three positive sizes are needed")
    if not 1 <= num_warps <= MAX_WARPS:
        raise ValueError(f"num_warps {num_warps}: 1 to {MAX_WARPS} waves of 64 threads make a workgroup")
    limit = LDS_LIMIT_BYTES[kernel.architecture]
    if lds_bytes > limit:
        raise SimulationError(f"{kernel.name} needs {lds_bytes} bytes of LDS, {kernel.architecture} has {limit}")


def run_kernel(
    assembly: str,
    arch: str,
    grid: Sequence[int],
    args: Sequence[Any],
    *,
    num_warps: int,
    shared_bytes: int = 0,
    preload: bool = True,
    find_races: bool = True,
    find_missing_waits: bool = True,
    max_workgroups: int = 64,
    max_steps: int = 50_000_000,
) -> RunReport:
    """Execute a compiled kernel over the whole grid; arrays and tensors among `args` are changed in place.

    assembly: the `amdgcn` text. args: pointers (numpy arrays or CPU tensors; None is a null pointer), ints and floats,
    as the kernel declares them. shared_bytes: LDS that the launch adds to what the text declares. preload: start where
    firmware that preloads arguments does. max_workgroups run at a time; a kernel whose workgroups wait for each other
    needs all of them. Raises AssemblyError for what is not implemented and a SimulationError for what the kernel does
    wrong.
    """
    kernel, steps = prepare(assembly, arch)
    lds_bytes = kernel.descriptor.get("group_segment_fixed_size", 0) + shared_bytes
    _check_launch(kernel, grid, num_warps, lds_bytes)
    declared = [item for item in kernel.arguments if not item.is_hidden]
    pointers = {
        position: _storage_bytes(value)
        for position, value in enumerate(args[: len(declared)])
        if declared[position].is_pointer and value is not None
    }
    total = sum(data.size + GUARD_BYTES + ALIGNMENT for data, _ in pointers.values())
    memory = GlobalMemory(total + 4 * (GUARD_BYTES + ALIGNMENT) + 16 * len(kernel.arguments))
    blocks = _upload(memory, pointers, args)
    addresses = {position: blocks[position].address + start for position, (_, start) in pointers.items()}
    segment = memory.allocate(
        _argument_segment(kernel, args, addresses, _hidden_values(grid, num_warps)), "the kernel's arguments", (-1,)
    )

    entry = kernel.entry if preload else 0
    launch = Launch(
        kernel, steps, memory, segment.address, num_warps, lds_bytes, entry, find_races, find_missing_waits, max_steps
    )
    places = np.array([(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])])
    for first in range(0, len(places), max_workgroups):
        launch.run(places[first : first + max_workgroups])
    if find_missing_waits:
        check_waits(steps, launch.segments)
    for position, (data, _) in pointers.items():
        after = memory.contents(blocks[position])
        if not np.array_equal(data, after):  # an array that is only read may be read-only
            data[:] = after
    return _report(launch)


def _report(launch: Launch) -> RunReport:
    counts: Counter[str] = Counter()
    for step, count in zip(launch.steps, launch.counts, strict=True):
        if count:
            counts[step.instruction.mnemonic] += int(count)
    return RunReport(counts, launch.memory.traffic, launch.num_started)
