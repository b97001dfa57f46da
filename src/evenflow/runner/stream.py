"""A device's queue of work, as the runner uses it: it runs in order, some time before somebody waits for it.

Owns what differs between a GPU and the stand-in that tests use: when work runs, pinned memory, events and graphs.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Graph(Protocol):
    """Work that was recorded once."""

    def replay(self) -> None: ...


class Stream(Protocol):
    """The queue of one device."""

    device: torch.device
    supports_graphs: bool

    def submit(self, work: Callable[[], None]) -> None:
        """Have `work` run after everything that was submitted before."""

    def mark(self) -> Any:
        """A point in the queue."""

    def wait(self, mark: Any) -> None:
        """Returns when everything submitted before the mark has run. Raises what the device has to complain about."""

    def pinned(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Host memory that the device copies from and to without the host."""

    def capture(self, work: Callable[[], T]) -> tuple[Graph, T]:
        """Record `work` without running it; and what it returned, which each replay fills anew."""


class GpuStream:
    """The current stream of a GPU of either vendor: work is queued by being called."""

    supports_graphs = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def submit(self, work: Callable[[], None]) -> None:
        work()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def pinned(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, pin_memory=True)

    def capture(self, work: Callable[[], T]) -> tuple[Graph, T]:
        """Graphs share one pool of memory: they never run at the same time."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        return graph, result
