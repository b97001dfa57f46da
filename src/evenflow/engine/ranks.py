"""The processes of ranks 1, 2, ...: rank 0 starts them, sends them every plan, and watches them by a thread.

A step that fails on any rank ends all of them, since the others stand in a collective that will not come to an end:
RankError names the rank and the cause.
"""

import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from evenflow import distributed
from evenflow.config import Settings
from evenflow.distributed import Group, PeerLost, RendezvousError
from evenflow.engine.rank_error import RankError
from evenflow.engine.rank_messages import (
    RankFailed,
    RankPing,
    RankPong,
    RankReady,
    Step,
    encode_frame,
    receive_from_rank,
)
from evenflow.engine.worker import failure_of
from evenflow.model_config import ModelConfig
from evenflow.request import StepPlan, TokenMasks

logger = logging.getLogger("evenflow")

WORKER_COMMAND = (sys.executable, "-m", "evenflow.engine.worker")
RENDEZVOUS_DEADLINE_S = 120.0  # most of it is the import of torch, by all ranks at once
LOADING_DEADLINE_S = 1800.0
SLOWEST_CPU_FLOPS = 5e10  # as engine.client's: what a CPU does at least, all ranks together
STOP_TIMEOUT_S = 5.0
CAUSE_WAIT_S = 2.0  # a rank that lost a peer may be heard before the peer's end is seen
TICK_S = 0.5


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds. heartbeat_s: a rank with work that answers no ping for so long is hung. step_s: so is one step."""

    rendezvous_s: float = RENDEZVOUS_DEADLINE_S
    loading_s: float = LOADING_DEADLINE_S
    heartbeat_s: float = 10.0
    step_s: float = 40.0

    @classmethod
    def of(cls, settings: Settings, model: ModelConfig) -> "Deadlines":
        """A step's is shorter than the front's, whose message could not name the rank."""
        if settings.device != "cpu":
            return cls()
        step_flops = 2 * settings.max_num_batched_tokens * model.num_parameters
        return cls(step_s=max(cls().step_s, 0.8 * step_flops / SLOWEST_CPU_FLOPS))


@dataclass(slots=True, eq=False)
class _Rank:
    """A rank's process as rank 0 sees it. unanswered_s: how long a ping is open, in the watching thread's own time."""

    rank: int
    plans: socket.socket
    control: socket.socket
    process: "subprocess.Popen[bytes] | None" = None
    has_spoken: bool = False
    is_ready: bool = False
    has_ended: bool = False
    unanswered_s: float | None = None
    pong: RankPong | None = None
    failed: RankFailed | None = None


class Ranks:
    """The processes of ranks 1 to size - 1. on_failure: called once, by the watching thread, when all have ended."""

    def __init__(
        self,
        size: int,
        deadlines: Deadlines,
        on_failure: Callable[[RankError], None] | None = None,
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self.size = size
        self.group: Group | None = None  # rank 0's, once it has joined
        self.step = 0  # the last that was sent
        self.error: RankError | None = None
        self._deadlines, self._on_failure, self._command = deadlines, on_failure, command
        self._work: tuple[str, float, float] | None = None  # what rank 0 does, since when, and how long it may
        self._has_failed, self._is_closing = threading.Event(), False
        self._pongs = threading.Condition()
        self._wake, self._woken = socket.socketpair()
        self._ranks: list[_Rank] = []
        theirs = []
        for rank in range(1, size):
            (plans, their_plans), (control, their_control) = socket.socketpair(), socket.socketpair()
            self._ranks.append(_Rank(rank, plans, control))
            theirs.append((their_plans, their_control))
        # It also starts the processes: on Linux a child ends with the thread that started it.
        self._thread = threading.Thread(target=self._run, args=(theirs,), name="evenflow-ranks", daemon=True)
        self._thread.start()

    def send(self, frame_of: Callable[[int], bytes]) -> None:
        """To every rank its frame. Raises RankError when one is gone."""
        try:
            for rank in self._ranks:
                rank.plans.sendall(frame_of(rank.rank))
        except OSError as error:
            raise self.cause(error) from None

    def send_step(self, plan: StepPlan, masks: TokenMasks | None) -> int:
        """To all the same. Returns its number."""
        self.step += 1
        frame = encode_frame(Step.of(self.step, plan, masks))
        self.send(lambda rank: frame)
        return self.step

    @contextmanager
    def working(self, what: str, deadline_s: float) -> Iterator[None]:
        """While rank 0 does something that needs the others, they are asked for signs of life.

        Whatever ends it early ends the ranks; what is raised then is the cause of it.
        """
        self.raise_if_failed()
        self._work = (what, time.monotonic(), deadline_s)
        try:
            yield
        except Exception as error:
            raise self.cause(error) from error
        except BaseException:  # interrupted in the middle: the others wait in a collective for ever
            self.fail(RankError(f"tensor-parallel rank 0 was interrupted while {what}; make a new engine"))
            raise
        finally:
            self._work = None
        self.raise_if_failed()  # a collective that was aborted ends as if all were well

    def raise_if_failed(self) -> None:
        if self.error is not None:
            raise self.error

    def cause(self, error: Exception) -> Exception:
        """Why rank 0 got `error`: what befell another rank, or its own failure, which then ends the others."""
        if isinstance(error, RankError):
            return error
        is_consequence = isinstance(error, PeerLost | RendezvousError | OSError)
        if is_consequence and self._has_failed.wait(2 * CAUSE_WAIT_S):
            assert self.error is not None
            return self.error
        failed = failure_of(error)
        text = failed.error if isinstance(error, RendezvousError) else f"tensor-parallel rank 0: {failed.error}"
        self.fail(RankError(text, failed.is_bad_input))
        if failed.is_bad_input and not is_consequence:
            return error  # as without ranks
        assert self.error is not None
        return self.error

    def fail(self, error: RankError) -> None:
        """End all ranks for this cause, unless there was one before."""
        if self.error is None and not self._is_closing:
            self.error = error
            self._kill()
            self._has_failed.set()
            distributed.abort(self.group)
        self._has_failed.set()

    def wait_ready(self) -> None:
        """Until all ranks are. Raises RankError."""
        while not all(rank.is_ready for rank in self._ranks):
            self.raise_if_failed()
            with self._pongs:
                self._pongs.wait(0.1)

    def progress(self, timeout_s: float = 5.0) -> list[RankPong]:
        """What every rank says of itself now."""
        for rank in self._ranks:
            rank.pong = None
        self._wake.send(b"p")
        end_s = time.monotonic() + timeout_s
        with self._pongs:
            while not all(rank.pong is not None for rank in self._ranks):
                self.raise_if_failed()
                if not self._pongs.wait(max(end_s - time.monotonic(), 0)):
                    raise RankError("a tensor-parallel rank did not answer")
        return [rank.pong for rank in self._ranks if rank.pong is not None]

    def pids(self) -> list[int]:
        """Of ranks 1, 2, ..."""
        return [rank.process.pid for rank in self._ranks if rank.process is not None]

    def close(self) -> None:
        """End the ranks, orderly if they are idle. Leaves no process and no thread."""
        if self._is_closing:
            return
        self._is_closing = True
        for rank in self._ranks:
            with suppress(OSError):
                rank.plans.shutdown(socket.SHUT_WR)
        end_s = time.monotonic() + STOP_TIMEOUT_S
        is_idle = self.error is None and self._work is None and all(rank.is_ready for rank in self._ranks)
        if is_idle:
            leave_group()
            for rank in self._ranks:
                if rank.process is not None:
                    with suppress(subprocess.TimeoutExpired):
                        rank.process.wait(max(end_s - time.monotonic(), 0))
        self._kill()
        with suppress(OSError):
            self._wake.send(b"c")
        self._thread.join(STOP_TIMEOUT_S)
        self._wake.close()
        self._woken.close()
        if not is_idle:
            leave_group()
        elif self.group is not None:
            self.group.close()

    def _kill(self) -> None:
        for rank in self._ranks:
            if rank.process is not None and rank.process.returncode is None:
                rank.process.kill()

    # The watching thread

    def _run(self, theirs: list[tuple[socket.socket, socket.socket]]) -> None:
        try:
            for rank, sockets in zip(self._ranks, theirs, strict=True):
                rank.process = self._spawn(*sockets)
                for each in sockets:
                    each.close()  # or their end would not be seen
            self._watch()
        except OSError as error:
            self.fail(RankError(f"the tensor-parallel ranks could not be started: {error}"))
        except Exception as error:  # nobody would watch any more, and nobody would know
            logger.exception("the tensor-parallel ranks are not watched any more")
            self.fail(RankError(f"the tensor-parallel ranks are not watched any more: {type(error).__name__}"))
        finally:
            self._kill()
            for rank in self._ranks:
                if rank.process is not None:
                    rank.process.wait()
                rank.plans.close()
                rank.control.close()
        if self.error is not None and self._on_failure is not None and not self._is_closing:
            self._on_failure(self.error)

    def _spawn(self, plans: socket.socket, control: socket.socket) -> "subprocess.Popen[bytes]":
        fds = plans.fileno(), control.fileno()
        return subprocess.Popen(
            [*self._command, *map(str, fds), str(os.getpid())],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_fd(sys.stderr) else subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for rank 0, which tells the others
        )

    def _watch(self) -> None:
        """Until the ranks have ended, for whatever cause. Silence is counted in ticks: a machine's sleep is none."""
        selector = selectors.DefaultSelector()
        selector.register(self._woken, selectors.EVENT_READ)
        for rank in self._ranks:
            selector.register(rank.control, selectors.EVENT_READ, rank)
        with selector:
            while not self._is_closing and self.error is None:
                events = selector.select(TICK_S)
                for key, _ in events:
                    if key.data is None:
                        self._woken.recv(64)
                        self._ping(with_idle=True)
                    else:
                        self._receive(key.data)
                if not self._is_closing and self.error is None and self._is_any_lost():
                    self.fail(self._find_cause(selector))
                elif not events:
                    self._tick()

    def _receive(self, rank: _Rank) -> None:
        message = receive_from_rank(rank.control)
        rank.has_spoken = True
        match message:
            case None:
                rank.has_ended = True
            case RankReady():
                rank.is_ready = True
            case RankPong():
                rank.pong, rank.unanswered_s = message, None
            case RankFailed():
                rank.failed = message
        with self._pongs:
            self._pongs.notify_all()

    def _is_any_lost(self) -> bool:
        return any(rank.has_ended or rank.failed is not None for rank in self._ranks)

    def _find_cause(self, selector: selectors.BaseSelector) -> RankError:
        """The rank that failed by itself. Those that only noticed may be heard first, so it is waited for a while."""
        end_s = time.monotonic() + CAUSE_WAIT_S
        while True:
            for rank in self._ranks:
                if rank.failed is not None and not rank.failed.is_peer_lost:
                    return RankError(f"tensor-parallel rank {rank.rank}: {rank.failed.error}", rank.failed.is_bad_input)
                if rank.has_ended and rank.failed is None:
                    return RankError(f"tensor-parallel rank {rank.rank} {self._how_it_ended(rank)}")
            if time.monotonic() > end_s:
                break
            for key, _ in selector.select(0.1):
                if key.data is not None and not key.data.has_ended:
                    self._receive(key.data)
                    if key.data.has_ended:
                        selector.unregister(key.fileobj)
        first = next(rank for rank in self._ranks if rank.failed is not None)
        assert first.failed is not None
        return RankError(f"tensor-parallel rank {first.rank}: {first.failed.error}")

    def _how_it_ended(self, rank: _Rank) -> str:
        assert rank.process is not None
        try:
            code = rank.process.wait(CAUSE_WAIT_S)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"

    def _ping(self, *, with_idle: bool) -> None:
        if self._work is None and not with_idle:
            return
        for rank in self._ranks:
            if rank.unanswered_s is None:
                rank.unanswered_s = 0.0
                with suppress(OSError):
                    rank.control.send(encode_frame(RankPing(self.step)), socket.MSG_DONTWAIT)

    def _tick(self) -> None:
        """Nothing was heard for TICK_S. A rank that has not said anything yet is importing torch, maybe for long."""
        for rank in self._ranks:
            if rank.unanswered_s is not None and rank.has_spoken:
                rank.unanswered_s += TICK_S
        most_s = self._deadlines.heartbeat_s
        silent = [rank.rank for rank in self._ranks if (rank.unanswered_s or 0.0) > most_s]
        if silent:
            self.fail(RankError(f"tensor-parallel rank {silent[0]} gave no sign of life for {most_s:g} s"))
        elif (work := self._work) is not None:
            what, since_s, deadline_s = work
            if time.monotonic() - since_s > deadline_s:
                self.fail(RankError(f"{self._who_is_behind()} while {what}, which took longer than {deadline_s:g} s"))
            elif time.monotonic() - since_s > TICK_S:
                self._ping(with_idle=False)

    def _who_is_behind(self) -> str:
        """The rank that has come least far in the step that does not end: the others wait for it."""
        found = [(self.step, self.group.num_collectives if self.group is not None else 0, 0)]
        found += [(rank.pong.step, rank.pong.collectives, rank.rank) for rank in self._ranks if rank.pong is not None]
        behind = [entry for entry in found if entry[:2] == min(found)[:2]]
        if len(behind) == len(found):
            return "all tensor-parallel ranks hang at the same place"
        names = ", ".join(str(rank) for *_, rank in behind)
        return f"tensor-parallel rank{'s' if len(behind) > 1 else ''} {names} did not go on"


def leave_group() -> None:
    """In a thread of its own: a library may wait for peers that will not come."""
    thread = threading.Thread(target=distributed.leave, name="evenflow-leave", daemon=True)
    thread.start()
    thread.join(STOP_TIMEOUT_S)
    if thread.is_alive():
        logger.warning("the tensor-parallel group has not ended yet; until then, this process can join no other")


def _has_fd(stream: object) -> bool:
    try:
        stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
    return True
