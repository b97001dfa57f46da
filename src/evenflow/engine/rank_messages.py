"""What rank 0 and the other tensor-parallel ranks say to each other: msgspec structs, framed, over Unix socket pairs.

Each rank has two: `plans`, on which steps go out in order, and `control`, on which a thread of the rank answers pings
and on which it reports. A socket pair has no name, so nothing of it can be left behind, and its end tells of either
side's.
"""

import socket
import struct
from typing import Any

import msgspec
import numpy as np

from evenflow.config import Settings
from evenflow.model_config import ModelConfig
from evenflow.request import AdmittedRequest, ScheduledRow, StepPlan, TokenMasks


class StartRank(msgspec.Struct, tag="start", array_like=True, frozen=True):
    """Rank 0 -> rank, first on plans: join the group at `address`, load your part of the model."""

    rank: int
    size: int
    address: str
    deadline_s: float
    settings: Settings
    model_config: ModelConfig
    directory: str


class Step(msgspec.Struct, tag="step", array_like=True, frozen=True, gc=False):
    """Rank 0 -> rank: launch this. masks: TokenMasks' rows, bits and the width of the bits."""

    number: int
    admitted: list[AdmittedRequest]
    rows: list[ScheduledRow]
    zero_block_ids: list[int]
    masks: tuple[list[int], bytes, int] | None

    @classmethod
    def of(cls, number: int, plan: StepPlan, masks: TokenMasks | None) -> "Step":
        packed = None
        if masks is not None:
            packed = (masks.rows, np.ascontiguousarray(masks.bits).tobytes(), masks.bits.shape[1])
        return cls(number, plan.admitted, plan.rows, plan.zero_block_ids, packed)

    def plan_and_masks(self) -> tuple[StepPlan, TokenMasks | None]:
        """A rank needs no requests."""
        plan = StepPlan(self.admitted, self.rows, [], self.zero_block_ids)
        if self.masks is None:
            return plan, None
        rows, bits, width = self.masks
        return plan, TokenMasks(rows, np.frombuffer(bytearray(bits), dtype=np.int32).reshape(-1, width))


class RankPing(msgspec.Struct, tag="ping", array_like=True, frozen=True):
    """Rank 0 -> rank, on control: are you there?"""

    number: int


class RankPong(msgspec.Struct, tag="pong", array_like=True, frozen=True):
    """Rank -> rank 0. step: the last that it received. collectives: begun since the start.

    collected, digest: a checksum of all tokens sampled up to the step `collected`.
    """

    number: int
    step: int
    collectives: int
    collected: int
    digest: int


class RankReady(msgspec.Struct, tag="ready", array_like=True, frozen=True):
    """Rank -> rank 0: the model is loaded, the cache is there."""


class RankFailed(msgspec.Struct, tag="failed", array_like=True, frozen=True):
    """Rank -> rank 0, its last word. is_peer_lost: it only noticed that another rank is gone."""

    error: str
    is_bad_input: bool
    is_peer_lost: bool


ToRank = StartRank | Step | RankPing
FromRank = RankPong | RankReady | RankFailed

_LENGTH = struct.Struct("<Q")
_encoder = msgspec.msgpack.Encoder()
_rank_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToRank)
_rank_0_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromRank)


def encode_frame(message: ToRank | FromRank) -> bytes:
    """Length, then the message: sent whole with sendall."""
    frame = bytearray(_LENGTH.size)
    _encoder.encode_into(message, frame, _LENGTH.size)
    _LENGTH.pack_into(frame, 0, len(frame) - _LENGTH.size)
    return bytes(frame)


def receive_for_rank(plans: socket.socket) -> ToRank | None:
    """The next message; None at the end. Raises msgspec.ValidationError or msgspec.DecodeError."""
    data = _receive_frame(plans)
    return None if data is None else _rank_decoder.decode(data)


def receive_from_rank(control: socket.socket) -> FromRank | None:
    data = _receive_frame(control)
    return None if data is None else _rank_0_decoder.decode(data)


def _receive_frame(stream: socket.socket) -> bytes | None:
    header = _receive_exactly(stream, _LENGTH.size)
    return None if header is None else _receive_exactly(stream, _LENGTH.unpack(header)[0])


def _receive_exactly(stream: socket.socket, num_bytes: int) -> bytes | None:
    """None where the stream ends, also in the middle of a frame: its sender is gone."""
    try:
        data = stream.recv(num_bytes, socket.MSG_WAITALL)
        while 0 < len(data) < num_bytes:  # a signal came between
            more = stream.recv(num_bytes - len(data), socket.MSG_WAITALL)
            if not more:
                return None
            data += more
    except ConnectionError:
        return None
    return data if len(data) == num_bytes else None
