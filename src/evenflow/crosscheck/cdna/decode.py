"""All instruction tables in one, and the step from parsed text to something executable. Owns no instruction."""

from evenflow.crosscheck.cdna.atomics import ATOMICS
from evenflow.crosscheck.cdna.control import CONTROL
from evenflow.crosscheck.cdna.convert import CONVERT
from evenflow.crosscheck.cdna.divide import DIVIDE
from evenflow.crosscheck.cdna.dots import DOTS
from evenflow.crosscheck.cdna.errors import AssemblyError
from evenflow.crosscheck.cdna.lanes import LANE_MOVES
from evenflow.crosscheck.cdna.lds import LDS
from evenflow.crosscheck.cdna.matrix import MATRIX
from evenflow.crosscheck.cdna.operation import Operation, Step, bind
from evenflow.crosscheck.cdna.packed import PACKED
from evenflow.crosscheck.cdna.parser import Kernel
from evenflow.crosscheck.cdna.scalar import SCALAR
from evenflow.crosscheck.cdna.vector import COMPARE, FLOAT, INTEGER
from evenflow.crosscheck.cdna.vector_memory import VECTOR_MEMORY

_TABLES = (
    SCALAR,
    CONTROL,
    INTEGER,
    FLOAT,
    COMPARE,
    CONVERT,
    DIVIDE,
    DOTS,
    PACKED,
    LANE_MOVES,
    MATRIX,
    LDS,
    ATOMICS,
    VECTOR_MEMORY,
)
OPERATIONS: dict[str, Operation] = {name: operation for table in _TABLES for name, operation in table.items()}
assert len(OPERATIONS) == sum(map(len, _TABLES)), "a mnemonic is in two tables"


def decode(kernel: Kernel) -> list[Step]:
    """One step for each instruction. Raises AssemblyError, with the line, for the first that is not implemented."""
    steps = []
    for instruction in kernel.instructions:
        operation = OPERATIONS.get(instruction.name)
        if operation is None:
            raise AssemblyError(f"{instruction}: instruction {instruction.mnemonic} is not implemented")
        steps.append(bind(instruction, operation))
    return steps
