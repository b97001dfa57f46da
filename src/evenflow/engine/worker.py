"""A tensor-parallel rank other than 0, `python -m evenflow.engine.worker PLANS_FD CONTROL_FD PARENT_PID`.

Started by engine.ranks, by nobody else. Launches every plan that it receives; what it samples is what rank 0
samples, so only a checksum of it goes back. The end of either socket means that rank 0 is gone.
"""

import faulthandler
import logging
import os
import socket
import sys
import threading
import zlib
from array import array
from pathlib import Path
from typing import Any

import torch

from evenflow.distributed import PeerLost, RendezvousError, TensorParallel, join, leave
from evenflow.engine.parent import end_with_parent
from evenflow.engine.rank_messages import (
    FromRank,
    RankFailed,
    RankPing,
    RankPong,
    RankReady,
    StartRank,
    Step,
    encode_frame,
    receive_for_rank,
)
from evenflow.garbage import only_new_objects
from evenflow.request import StepResult
from evenflow.runner.device_runner import DeviceRunner
from evenflow.runner.making import make_runner
from evenflow.runner.model_runner import ModelRunner

logger = logging.getLogger("evenflow.rank")


class Progress:
    """How far this rank is, for whoever asks over `control`. Written by the main thread, read by the other."""

    def __init__(self) -> None:
        self.step = self.collected = self.digest = 0
        self.tp = TensorParallel()

    def collect(self, number: int, result: StepResult) -> None:
        self.collected, self.digest = number, digest_of(result, self.digest)

    def answer(self, ping: RankPing) -> RankPong:
        collectives = self.tp.group.num_collectives if self.tp.group is not None else 0
        return RankPong(ping.number, self.step, collectives, self.collected, self.digest)


def digest_of(result: StepResult, before: int) -> int:
    """A checksum of the tokens of one step, and of `before`, the checksum of those before."""
    return zlib.crc32(array("q", result.token_ids), before)


def select_device(settings_device: str, rank: int) -> torch.device:
    """The device of a rank of this host; the GPU becomes the process's current one."""
    if settings_device != "cpu":
        torch.cuda.set_device(rank)
    return torch.device(settings_device)


def lag_of(runner: ModelRunner | DeviceRunner) -> int:
    """How many launched steps a rank does not wait for, so that a GPU has the next one before it ends the last."""
    return runner.max_in_flight - 1


def run(plans: socket.socket, control: socket.socket, progress: Progress) -> None:
    """Returns when rank 0 closes the plans."""
    start = receive_for_rank(plans)
    if start is None:
        return
    if not isinstance(start, StartRank):
        raise TypeError(f"the first message must be StartRank, not {type(start).__name__}")
    device = select_device(start.settings.device, start.rank)
    if device.type == "cpu":
        torch.set_num_threads(max(torch.get_num_threads() // start.size, 1))
    progress.tp = join(start.rank, start.size, start.address, device, deadline_s=start.deadline_s)
    runner = make_runner(start.settings, start.model_config, Path(start.directory), progress.tp)
    _send(control, RankReady())
    serve(runner, plans, progress, lag_of(runner))
    runner.close()
    leave()


@only_new_objects()
def serve(runner: ModelRunner | DeviceRunner, plans: socket.socket, progress: Progress, lag: int) -> None:
    """Launch every plan. lag: see lag_of."""
    launched: list[tuple[int, Any]] = []
    while (step := receive_for_rank(plans)) is not None:
        assert isinstance(step, Step)
        progress.step = step.number
        launched.append((step.number, runner.launch(*step.plan_and_masks())))
        if len(launched) > lag:
            number, pending = launched.pop(0)
            progress.collect(number, runner.collect(pending))


def _answer_forever(control: socket.socket, progress: Progress) -> None:
    while (ping := receive_for_rank(control)) is not None:
        assert isinstance(ping, RankPing)
        _send(control, progress.answer(ping))
    os._exit(1)  # rank 0 is gone, whatever the main thread does


def _send(control: socket.socket, message: FromRank) -> None:
    control.sendall(encode_frame(message))


def failure_of(error: BaseException) -> RankFailed:
    """What is told of an exception that ends a rank."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return RankFailed(
            f"ran out of memory: {str(error).splitlines()[0] if str(error) else 'no detail'}", False, False
        )
    if isinstance(error, PeerLost):
        return RankFailed(str(error).splitlines()[0], False, True)
    if isinstance(error, RendezvousError):
        return RankFailed(str(error), False, True)
    if isinstance(error, ValueError | OSError):
        return RankFailed(str(error), True, False)
    return RankFailed(f"{type(error).__name__}: {error}", False, False)


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="evenflow rank: %(message)s", stream=sys.stderr)
    faulthandler.enable()
    plans, control = socket.socket(fileno=int(argv[0])), socket.socket(fileno=int(argv[1]))
    end_with_parent(int(argv[2]))
    progress = Progress()
    threading.Thread(target=_answer_forever, args=(control, progress), daemon=True).start()
    try:
        run(plans, control, progress)
    except Exception as error:
        failed = failure_of(error)
        if not failed.is_bad_input and not failed.is_peer_lost:
            logger.exception("rank %d failed", progress.tp.rank)
        _send(control, failed)
        os._exit(1)  # a group whose ranks are gone is not left in an orderly way
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
