"""Why the tensor-parallel ranks of an engine have ended."""


class RankError(RuntimeError):
    """The ranks have ended. The message names the rank and the cause. is_bad_input: the user can mend it."""

    def __init__(self, message: str, is_bad_input: bool = False) -> None:
        super().__init__(message)
        self.is_bad_input = is_bad_input
