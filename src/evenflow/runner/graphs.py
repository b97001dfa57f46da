"""Which steps are replayed as one graph, at which padded size, and the graphs themselves.

A step whose size was never seen runs launch by launch, so that every kernel is compiled; the second of that size is
recorded. Sizes are few: each costs memory, a moment when it is recorded, and padding is computed like the rest.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from evenflow.kernels.language import next_power_of_2
from evenflow.runner.stream import Graph, Stream

MAX_GRAPH_TOKENS = 2048
MAX_DECODE_ROWS = 1024
MIN_ROWS = 64  # of a step with prompts in it; more go by powers of two: each row costs a few idle programs


class Sizes(NamedTuple):
    """What a step is launched with, and a recording is found by.

    is_sampling_only: hidden states are returned of the rows' sample_tokens, [num_rows, hidden], not of all tokens.
    """

    num_tokens: int
    num_rows: int
    max_query_len: int
    is_sampling_only: bool = False


Forward = Callable[[Sizes], Tensor]


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# Rows above 64 that steps of decode rows are padded to: where a layer's products are no slower than with more rows (of
# LLaMA 2 7B and Llama 3 8B on H200s: benchmarks/h200/products.py --sizes). The library is not steady: those of the 8B
# take 271 us for 432 rows, 409 for 448 and 300 for 512.
_PRODUCT_SIZES = (
    72, 88, 104, 128, 152, 184, 200, 256, 304, 320, 368, 384, 432, 480, 512, 544, 592, 640, 688, 720, 768, 816, 848,
    880, 944,
)  # fmt: skip


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Rows of steps in which every row is one token."""
    largest = min(max_num_seqs, MAX_DECODE_ROWS)
    return [size for size in (1, 2, 4, *range(8, 65, 8), *_PRODUCT_SIZES) if size < largest] + [largest]


def mixed_sizes() -> list[int]:
    """Tokens of the other steps."""
    return [16, 32, 64, *range(128, MAX_GRAPH_TOKENS + 1, 128)]


class Graphs:
    """Runs `forward(sizes)` of a step, recorded where it pays."""

    def __init__(self, stream: Stream, max_num_seqs: int, *, is_enabled: bool) -> None:
        self._stream, self._max_num_seqs = stream, max_num_seqs
        self.is_enabled = is_enabled and stream.supports_graphs
        self._decode_sizes, self._mixed_sizes = decode_sizes(max_num_seqs), mixed_sizes()
        self._seen: set[Sizes] = set()
        self._recorded: dict[Sizes, tuple[Graph, Tensor]] = {}
        self.num_replays = 0

    @property
    def num_recorded(self) -> int:
        return len(self._recorded)

    def clear(self) -> None:
        """Forget the graphs, and record no more."""
        self.is_enabled = False
        self._recorded.clear()

    def padded(self, step: Sizes) -> Sizes | None:
        """The sizes that a step is computed with, or None where it is too large for a graph."""
        is_decode = step.max_query_len == 1
        sizes = self._decode_sizes if is_decode else self._mixed_sizes
        index = bisect_left(sizes, step.num_tokens)
        if index == len(sizes):
            return None
        size = sizes[index]
        if is_decode:
            return Sizes(size, size, 1, step.is_sampling_only)
        rows = min(max(next_power_of_2(step.num_rows), MIN_ROWS), size, self._max_num_seqs)
        return Sizes(size, rows, size, step.is_sampling_only)

    def run(self, step: Sizes, forward: Forward) -> Tensor:
        """Hidden states of the step, and of what it is padded with; valid until the next step."""
        sizes = self.padded(step) if self.is_enabled else None
        if sizes is None:
            # Multiples of 16, which Triton compiles once.
            rows = min(round_up(step.num_rows, 16), self._max_num_seqs)
            return forward(step._replace(num_tokens=round_up(step.num_tokens, 16), num_rows=rows))
        if sizes not in self._recorded:
            if sizes not in self._seen:
                self._seen.add(sizes)
                return forward(sizes)
            self._recorded[sizes] = self._stream.capture(lambda: forward(sizes))
        graph, hidden = self._recorded[sizes]
        graph.replay()
        self.num_replays += 1
        return hidden
