"""What can be wrong with a kernel, one class each, so that a test can tell them apart. Owns no logic."""


class AssemblyError(ValueError):
    """The text holds something that the simulator does not implement; the message names it and its line."""


class SimulationError(RuntimeError):
    """The kernel did something wrong while it ran; the message names the instruction and its line."""


class OutOfBoundsError(SimulationError):
    """An access outside every allocation, or outside LDS or scratch."""


class ProvenanceError(SimulationError):
    """A pointer derived from one argument was used to touch another argument's memory."""


class UninitializedReadError(SimulationError):
    """A register or a byte of LDS was read before anything was written to it."""


class MissingWaitError(SimulationError):
    """A register was used while a memory operation that writes it could still be under way."""


class RaceError(SimulationError):
    """Two waves touched the same byte of LDS between two barriers, and one of them wrote it."""
