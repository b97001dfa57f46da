"""Progress bars for people who wait. Everything goes to standard error."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from evenflow.request import RequestOutput


class GenerationProgress:
    """Requests done of all, with tokens per second in and out; vanishes where standard error is no terminal."""

    def __init__(self, num_requests: int) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("requests"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("requests", total=num_requests, rate="")
        self._start_s = time.perf_counter()
        self._num_prompt_tokens = self._num_output_tokens = 0

    def advance(self, output: RequestOutput) -> None:
        """Count a finished request."""
        self._num_prompt_tokens += len(output.prompt_token_ids)
        self._num_output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        elapsed_s = max(time.perf_counter() - self._start_s, 1e-9)
        rate = f"{self._num_prompt_tokens / elapsed_s:,.0f} in, {self._num_output_tokens / elapsed_s:,.0f} out tokens/s"
        self._progress.update(self._task, advance=1, rate=rate)

    def __enter__(self) -> "GenerationProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
