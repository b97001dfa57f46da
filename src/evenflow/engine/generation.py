"""Prompts on their way through the engine, as their caller sees them, and the times that are kept of them."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Protocol

from evenflow.engine.stats import EngineStats
from evenflow.request import RequestOutput

if TYPE_CHECKING:
    from evenflow.engine.client import EngineClient


class EngineObserver(Protocol):
    """Who wants to know how the engine does. Called on the event loop, once a step or less often."""

    def engine_stats(self, stats: EngineStats) -> None: ...

    def first_token(self, ttft_s: float, queue_s: float | None) -> None: ...

    def tokens(self, count: int, itl_s: float | None) -> None:
        """`count` tokens came, each itl_s after the one before it; None: each is its request's first."""


class Timing:
    """Of one sequence: when it was asked for, how long it waited in the engine, when its last token came."""

    __slots__ = ("asked_s", "generation", "last_s", "queue_s")

    def __init__(self, asked_s: float, generation: "Generation") -> None:
        self.asked_s, self.last_s, self.generation = asked_s, 0.0, generation
        self.queue_s: float | None = None


class Generation:
    """Prompts on their way. Iterate over it for (prompt index, RequestOutput); in any case, end it with `abort`."""

    def __init__(
        self, client: "EngineClient", request_ids: list[str], prompt_lengths: list[int], num_requests: int
    ) -> None:
        self.request_ids, self.prompt_lengths, self.num_requests = request_ids, prompt_lengths, num_requests
        self.is_closed = False
        self.ttft_s: float | None = None  # of its first token at all, and what that sequence waited for its first step
        self.queue_s: float | None = None
        self._client = client
        self._index_of = {request_id: index for index, request_id in enumerate(request_ids)}
        self._num_live = len(request_ids)
        self._touched: dict[str, None] = {}
        self._wake = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        return self._outputs()

    async def _outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """What came since the last look, merged; raises EngineDeadError."""
        while self._num_live:
            await self._wake.wait()
            self._wake.clear()
            self._client.raise_if_dead()
            touched, self._touched = self._touched, {}
            for request_id in touched:
                if (output := self._client.take(request_id)) is not None:
                    self._num_live -= output.finished
                    yield self._index_of[request_id], output

    def touch(self, request_id: str | None) -> None:
        """There is news of a request; None: of the engine."""
        if request_id is not None:
            self._touched[request_id] = None
        self._wake.set()

    def abort(self) -> None:
        """End whatever still runs. Every generation ends with this; harmless twice."""
        if not self.is_closed:
            self.is_closed = True
            self._client.forget(self)
