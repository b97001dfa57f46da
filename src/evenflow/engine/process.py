"""The engine process, `python -m evenflow.engine.process SOCKET PARENT_PID`: started by engine.client, by nobody else.

Reads messages between steps, sends one message a step, and one when an abort leaves nothing to step. Sleeps in poll()
when there is nothing to do. Standard input is a pipe that only the parent holds: its end means that the parent is gone,
and the process ends with it.
"""

import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

import zmq

from evenflow.config import EngineConfig
from evenflow.engine.building import BuiltEngine, build_engine
from evenflow.engine.engine import Engine
from evenflow.engine.messages import (
    AbortRequests,
    AddRequest,
    Failed,
    Hello,
    Phase,
    Ping,
    Pong,
    Ready,
    Start,
    StepOutput,
    Stop,
    ToEngine,
    ToFront,
    decode_for_engine,
    encode,
)
from evenflow.engine.opening import open_model, resolve_settings
from evenflow.engine.parent import end_with_parent
from evenflow.engine.rank_error import RankError
from evenflow.engine.stats import block_map
from evenflow.garbage import only_new_objects
from evenflow.request import FinishReason, RequestDelta

logger = logging.getLogger("evenflow.engine")

READING_DEADLINE_S = 600.0  # configuration and tokenizer; a hub may be slow
WEIGHTS_DEADLINE_S = 1800.0


class ParentGone(Exception):
    """The process that started this one has ended."""


class Channel:
    """The sockets to and from the front, and the pipe that tells if it lives."""

    def __init__(self, address: str, parent_fd: int) -> None:
        self._context, self._address = zmq.Context(), address
        self._inbox, self._outbox = self._context.socket(zmq.PULL), self._context.socket(zmq.PUSH)
        for socket, suffix in ((self._inbox, "-in"), (self._outbox, "-out")):
            socket.set_hwm(0)  # the front bounds how many requests there are
            socket.connect(address + suffix)
        self._parent_fd = parent_fd
        self._poller = zmq.Poller()
        self._poller.register(self._inbox, zmq.POLLIN)
        self._poller.register(parent_fd, zmq.POLLIN)

    def send(self, message: ToFront) -> None:
        self._outbox.send(encode(message))

    def send_last(self, message: ToFront) -> None:
        """From any thread, over a socket of its own: the process ends after it."""
        socket = self._context.socket(zmq.PUSH)
        socket.connect(self._address + "-out")
        socket.send(encode(message))
        socket.close(linger=1000)
        time.sleep(0.2)

    def receive(self, *, wait: bool) -> Iterator[ToEngine]:
        """Everything that has arrived; with `wait`, sleeps until there is something. Raises ParentGone."""
        events = dict(self._poller.poll(None if wait else 0))
        if self._parent_fd in events:
            raise ParentGone
        if self._inbox not in events:
            return
        while True:
            try:
                data = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield decode_for_engine(data)

    def close(self) -> None:
        """Returns when what was sent has been delivered, or after a second."""
        self._inbox.close(linger=0)
        self._outbox.close(linger=1000)
        self._context.term()


class EngineServer:
    """Applies messages to an engine, and steps it. Also the target of fault injection in the tests."""

    def __init__(self, engine: Engine, channel: Channel) -> None:
        self.engine, self.channel = engine, channel
        self._refused: list[RequestDelta] = []

    def run(self) -> None:
        """Until the front says Stop. Raises ParentGone."""
        engine, channel = self.engine, self.channel
        while True:
            for message in channel.receive(wait=not engine.has_unfinished and not self._refused):
                if isinstance(message, Stop):
                    return
                self._apply(message)
            if engine.has_unfinished or self._refused:
                refused, self._refused = self._refused, []
                deltas = engine.step()
                channel.send(StepOutput(refused + deltas, engine.stats(), engine.queue_times))

    def _apply(self, message: ToEngine) -> None:
        if isinstance(message, AddRequest):
            self._add(message)
        elif isinstance(message, AbortRequests):
            self.engine.abort(message.request_ids)
            if not self.engine.has_unfinished:  # no step will tell that nothing runs any more
                self.channel.send(StepOutput([], self.engine.stats(), []))
        elif isinstance(message, Ping):
            per_cell, cells = block_map(self.engine.scheduler.pool, message.max_cells) if message.max_cells else (1, "")
            self.channel.send(Pong(message.number, self.engine.stats(), per_cell, cells))

    def _add(self, message: AddRequest) -> None:
        try:
            self.engine.add(message.to_request())
        except ValueError as error:  # the front has checked it, so this is our mistake; it ends this request only
            logger.error("request %s could not be queued: %s", message.request_id, error)
            self._refused.append(
                RequestDelta(message.request_id, [], finish_reason=FinishReason.ERROR, error=str(error))
            )


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 when asked to stop, 1 for a failure of ours, 2 for bad input."""
    logging.basicConfig(level=logging.INFO, format="evenflow engine: %(message)s", stream=sys.stderr)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the front asks for the stacks when a deadline has passed
    end_with_parent(int(argv[1]))
    channel = Channel(argv[0], parent_fd=0)
    try:
        return serve(channel)
    except ParentGone:
        return 1
    finally:
        channel.close()


def serve(channel: Channel, server_type: Callable[[Engine, Channel], EngineServer] = EngineServer) -> int:
    """Build what the front asks for, and run it."""
    channel.send(Hello())
    try:
        (start,) = channel.receive(wait=True)
        if not isinstance(start, Start):
            raise TypeError(f"the first message must be Start, not {type(start).__name__}")
        built = build(start.config, channel)
    except (ValueError, OSError) as error:
        channel.send(Failed(str(error), is_bad_input=True))
        return 2
    except RankError as error:
        channel.send(Failed(str(error), is_bad_input=False))
        return 1
    except RuntimeError as error:  # a kernel that is wrong, a device that complains
        logger.exception("the engine could not start")
        channel.send(Failed(str(error), is_bad_input=False))
        return 1
    try:
        with only_new_objects():
            server_type(built.engine, channel).run()
    except ParentGone:
        raise
    except RankError as error:
        channel.send(Failed(str(error), is_bad_input=False))
        return 1
    except Exception as error:
        logger.exception("the engine failed")
        channel.send(Failed(f"{type(error).__name__}: {error}", is_bad_input=False))
        return 1
    finally:
        built.close()
    return 0


def build(config: EngineConfig, channel: Channel) -> BuiltEngine:
    """Each phase is announced with its deadline; the front keeps the time."""
    channel.send(Phase("reading the model's configuration", READING_DEADLINE_S))
    opened = open_model(config)
    settings = resolve_settings(config, opened.model_config).settings
    channel.send(Phase("loading the weights and making the cache", WEIGHTS_DEADLINE_S))

    def end(error: RankError) -> None:
        """A rank has failed: whatever this process does, and even if it is stuck in a collective, it ends."""
        channel.send_last(Failed(str(error), error.is_bad_input))
        os._exit(2 if error.is_bad_input else 1)

    built = build_engine(settings, opened, end)
    channel.send(Ready(built.settings, built.memory_account, built.kernel_account))
    return built


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
