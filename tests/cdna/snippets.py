"""Run a few lines of assembly on the simulator and look at the registers, without memory or a compiled kernel."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from evenflow.crosscheck.cdna.decode import decode
from evenflow.crosscheck.cdna.lds import LocalMemory
from evenflow.crosscheck.cdna.machine import Machine
from evenflow.crosscheck.cdna.memory import GlobalMemory, ScratchMemory
from evenflow.crosscheck.cdna.operands import EXEC, parse_operand
from evenflow.crosscheck.cdna.parser import parse
from evenflow.crosscheck.cdna.races import RaceDetector

WAVES = 3  # more than one, so that indexing by wave is tested


def machine(arch: str = "gfx942", waves: int = WAVES, lds_bytes: int = 4096) -> Machine:
    """Waves of one workgroup with empty memory."""
    result = Machine(arch, 512, np.zeros(waves, np.int64), np.zeros((1, 3), np.int64))
    result.memory = GlobalMemory(1 << 16)
    result.lds = LocalMemory(1, lds_bytes, result.workgroup, None)
    result.lds.races = RaceDetector(1, result.lds.pitch, result.workgroup)
    result.scratch = ScratchMemory(waves, 64)
    return result


def load(state: Machine, registers: Mapping[str, Any]) -> None:
    """Set registers: "v3" to what broadcasts to [waves, 64], "v[2:3]" from uint64, "s4" from [waves], "scc"."""
    for name, value in registers.items():
        if name == "scc":
            state.scc[:] = value
            continue
        operand = parse_operand(name)
        bank = state.vector if operand.kind == "v" else state.scalar
        value = np.asarray(value)
        if operand.count == 2:
            value = np.ascontiguousarray(value).view(np.uint64) if value.dtype.kind == "f" else value.astype(np.uint64)
            bank[operand.index] = (value & np.uint64(0xFFFFFFFF)).astype(np.uint32)
            bank[operand.index + 1] = (value >> np.uint64(32)).astype(np.uint32)
        else:
            is_float = value.dtype.kind == "f"
            bank[operand.index] = np.ascontiguousarray(value, np.float32).view(np.uint32) if is_float else value
        if operand.index == EXEC and operand.kind == "s":
            state.write_exec(np.broadcast_to(value, state.num_waves))


def fetch(state: Machine, name: str, dtype: Any = np.uint32) -> np.ndarray:
    """A register as [waves, 64] or [waves]; a pair as uint64, viewed as `dtype` of its size."""
    operand = parse_operand(name)
    bank = state.vector if operand.kind == "v" else state.scalar
    if operand.count == 2:
        words = np.stack([bank[operand.index], bank[operand.index + 1]], axis=-1)
        wide = np.uint64 if dtype is np.uint32 else dtype
        return np.ascontiguousarray(words).view(wide)[..., 0]
    return bank[operand.index].copy().view(dtype)


def execute(text: str, registers: Mapping[str, Any], state: Machine | None = None, arch: str = "gfx942") -> Machine:
    """Run straight-line code; registers are set first, as `load` does."""
    state = state or machine(arch)
    load(state, registers)
    with np.errstate(all="ignore"):
        for step in decode(parse(text, state.architecture)):
            step.run(state)
    return state


def lanes_of(*values: Any) -> np.ndarray:
    """[WAVES, 64] with these values over and over, in different lanes of each wave."""
    flat = np.resize(np.array(values), WAVES * 64)
    return flat.reshape(WAVES, 64)
