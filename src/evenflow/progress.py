"""Progress bars for people who wait, on standard error; nothing where it is no terminal."""

import time
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from evenflow.request import RequestOutput

AnyBar = TypeVar("AnyBar", bound="Bar")


class Bar:
    """`with Bar("requests", 100) as bar: bar.advance("a note")`."""

    def __init__(self, label: str, total: int, *, is_shown: bool = True) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not (is_shown and console.is_terminal),
        )
        self._task = self._progress.add_task(label, total=total, note="")

    def advance(self, note: str = "") -> None:
        self._progress.update(self._task, advance=1, note=note)

    def __enter__(self: AnyBar) -> AnyBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()


class GenerationProgress(Bar):
    """Requests done of all, with tokens per second in and out."""

    def __init__(self, num_requests: int) -> None:
        super().__init__("requests", num_requests)
        self._start_s = time.perf_counter()
        self._num_prompt_tokens = self._num_output_tokens = 0

    def count(self, output: RequestOutput) -> None:
        """Count a finished request."""
        self._num_prompt_tokens += len(output.prompt_token_ids)
        self._num_output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        elapsed_s = max(time.perf_counter() - self._start_s, 1e-9)
        self.advance(
            f"{self._num_prompt_tokens / elapsed_s:,.0f} in, {self._num_output_tokens / elapsed_s:,.0f} out tokens/s"
        )
