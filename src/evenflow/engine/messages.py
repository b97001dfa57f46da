"""What the front and the engine process say to each other: msgspec structs in msgpack, no pickle.

Owns the shapes only. Both ends check them: a message of another shape does not decode.
"""

from typing import Any

import msgspec

from evenflow.config import EngineConfig, Settings
from evenflow.engine.stats import EngineStats
from evenflow.request import Request, RequestDelta
from evenflow.sampling_params import SamplingParams


class Start(msgspec.Struct, tag="start", array_like=True, frozen=True):
    """Front -> engine, first: build this."""

    config: EngineConfig


class AddRequest(msgspec.Struct, tag="add", array_like=True, frozen=True, gc=False):
    """Front -> engine: queue this, checked and complete."""

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    stop_token_ids: list[int]
    bad_words_ids: list[list[int]]
    cache_salt: str

    @classmethod
    def of(cls, request: Request) -> "AddRequest":
        return cls(
            request.request_id,
            request.token_ids,
            request.params,
            request.max_tokens,
            sorted(request.stop_token_ids),
            request.bad_words_ids,
            request.cache_salt,
        )

    def to_request(self) -> Request:
        return Request(
            request_id=self.request_id,
            token_ids=self.token_ids,
            params=self.params,
            max_tokens=self.max_tokens,
            stop_token_ids=frozenset(self.stop_token_ids),
            bad_words_ids=self.bad_words_ids,
            cache_salt=self.cache_salt,
        )


class AbortRequests(msgspec.Struct, tag="abort", array_like=True, frozen=True):
    """Front -> engine: the only word that travels against the current."""

    request_ids: list[str]


class Ping(msgspec.Struct, tag="ping", array_like=True, frozen=True):
    """Front -> engine: answer with a Pong of the same number. max_cells > 0: with a map of the blocks too."""

    number: int
    max_cells: int = 0


class Stop(msgspec.Struct, tag="stop", array_like=True, frozen=True):
    """Front -> engine: end, whatever still runs."""


class Hello(msgspec.Struct, tag="hello", array_like=True, frozen=True):
    """Engine -> front, first: listening."""


class Phase(msgspec.Struct, tag="phase", array_like=True, frozen=True):
    """Engine -> front: start-up enters a phase that must end within deadline_s."""

    name: str
    deadline_s: float


class Ready(msgspec.Struct, tag="ready", array_like=True, frozen=True):
    """Engine -> front: what runs, with the context that the cache can hold. Accounts: see BuiltEngine."""

    settings: Settings
    memory_account: str
    kernel_account: str


class Failed(msgspec.Struct, tag="failed", array_like=True, frozen=True):
    """Engine -> front: the engine ends for this cause. is_bad_input: the user can mend it."""

    error: str
    is_bad_input: bool


class StepOutput(msgspec.Struct, tag="step", array_like=True, frozen=True):
    """Engine -> front, once a step and when the last request is aborted: also the sign that the engine lives.

    queue_times: of the requests whose first tokens were computed in this step, the seconds that they had waited.
    """

    deltas: list[RequestDelta]
    stats: EngineStats
    queue_times: list[tuple[str, float]]


class Pong(msgspec.Struct, tag="pong", array_like=True, frozen=True):
    """Engine -> front. block_map: one character per cell of blocks_per_cell blocks, see engine.stats.block_map."""

    number: int
    stats: EngineStats
    blocks_per_cell: int = 1
    block_map: str = ""


ToEngine = Start | AddRequest | AbortRequests | Ping | Stop
ToFront = Hello | Phase | Ready | Failed | StepOutput | Pong

_encoder = msgspec.msgpack.Encoder()
_engine_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToEngine)
_front_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToFront)


def encode(message: ToEngine | ToFront) -> bytes:
    return _encoder.encode(message)


def decode_for_engine(data: bytes) -> ToEngine:
    """Raises msgspec.ValidationError or msgspec.DecodeError."""
    return _engine_decoder.decode(data)  # type: ignore[no-any-return]


def decode_for_front(data: bytes) -> ToFront:
    return _front_decoder.decode(data)  # type: ignore[no-any-return]
